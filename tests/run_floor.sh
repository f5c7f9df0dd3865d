#!/usr/bin/env bash
# The tests of tests/floor.txt, with whatever versions the environment on the PATH has
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONWARNINGS=ignore MPLBACKEND=agg OMP_NUM_THREADS=1
python - <<'PY'
import sys
from importlib.metadata import version
print('== Python', sys.version.split()[0], *(f'{o} {version(o)}' for o in ('fastai','fastcore','torch','timm','numpy','pandas')))
PY
# Each version must be the lowest one. What tests of a file share is made once: by file
FLOOR=${FLOOR-1} python -m pytest -q -n 2 --dist loadfile --durations=10 @floor.txt
