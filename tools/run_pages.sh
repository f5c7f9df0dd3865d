#!/usr/bin/env bash
# Run every page, or the ones named, and save what its cells show
set -euo pipefail
cd "$(dirname "$0")/.."
# Warnings of other packages would save the paths of this machine into the pages
export PYTHONWARNINGS=ignore
if [ $# = 0 ]; then
  # Tutorials run on photos of their own: tools/run_tutorial.py. The TPU's page needs torch_xla, which has an environment of its own
  mapfile -t pages < <(find nbs -name '*.ipynb' -not -path 'nbs/tutorials/*' -not -path '*/.*' | sort)
  python -c 'import torch_xla' 2>/dev/null || { pages=("${pages[@]/#nbs\/devices\/xla.ipynb/}"); echo 'nbs/devices/xla.ipynb is left out: no torch_xla here'; }
  set -- ${pages[@]}
fi
for nb in "$@"; do MPLBACKEND= jupyter nbconvert --to notebook --execute --inplace "$nb"; done
nbdev-clean
