#!/usr/bin/env bash
# The checks that need torch_xla, on XLA's CPU backend with eight virtual cores
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONWARNINGS=ignore MPLBACKEND=agg PJRT_DEVICE=CPU CPU_NUM_DEVICES=8 TF_CPP_MIN_LOG_LEVEL=2

echo '== page'
nbdev-test nbs/devices/xla.ipynb --n-workers 0 --flags tpu --timing

echo '== tests'
python -m pytest -q tests/devices/test_xla.py tests/devices/test_tpu.py
