#!/usr/bin/env bash
# All checks, the short ones first, with the environment's commands on the PATH. Each says what failed
set -euo pipefail
cd "$(dirname "$0")/.."
# One thread each: networks this small gain nothing by a second, and two processes share the cores
export PYTHONWARNINGS=ignore MPLBACKEND=agg OMP_NUM_THREADS=1

echo '== linter, ceilings, imports between packages'
ruff check fastai_tricks
python -m pytest -q tests/core/test_ceilings.py tests/core/test_imports.py

echo '== export in sync, pages clean, README current'
before=$(git ls-files -z '*.ipynb' 'fastai_tricks/*.py' README.md | xargs -0 cat | cksum)
nbdev-export
nbdev-clean
python tools/readme.py
after=$(git ls-files -z '*.ipynb' 'fastai_tricks/*.py' README.md | xargs -0 cat | cksum)
[ "$before" = "$after" ] || { echo 'nbdev-export, nbdev-clean or tools/readme.py changed files: commit what they made'; git diff --stat; exit 1; }

echo '== pages'
python tools/test_pages.py --jobs 2

echo '== tests'
# The site has a run of its own, `make test-docs`
python -m pytest -q -n 2 --dist worksteal --durations=15 --ignore tests/test_docs.py tests
