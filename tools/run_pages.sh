#!/usr/bin/env bash
# Run every page, or the ones named, and save what its cells show
set -euo pipefail
cd "$(dirname "$0")/.."
# Warnings of other packages would save the paths of this machine into the pages
export PYTHONWARNINGS=ignore
[ $# -gt 0 ] || set -- nbs/*.ipynb
for nb in "$@"; do MPLBACKEND= jupyter nbconvert --to notebook --execute --inplace "$nb"; done
nbdev-clean
