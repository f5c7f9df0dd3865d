#!/usr/bin/env bash
# All checks, with the environment's commands on the PATH. Each says what failed
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONWARNINGS=ignore MPLBACKEND=agg

echo '== export in sync, pages clean, README current'
before=$(cat nbs/*.ipynb fastai_tricks/*.py README.md | cksum)
nbdev-export
nbdev-clean
python tools/readme.py
after=$(cat nbs/*.ipynb fastai_tricks/*.py README.md | cksum)
[ "$before" = "$after" ] || { echo 'nbdev-export, nbdev-clean or tools/readme.py changed files: commit what they made'; git diff --stat; exit 1; }

echo '== pages'
nbdev-test --n-workers 0 --timing

echo '== tests'
# One thread each: networks this small gain nothing by a second. The site has a run of its own, `make test-docs`
OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile --ignore tests/test_docs.py tests
