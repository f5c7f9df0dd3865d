"""Versions that settings.ini names, as constraints for pip: `versions.py floor` the lowest ones, `versions.py kaggle` those of Kaggle's image

    python tools/versions.py floor > constraints.txt && pip install -c constraints.txt -e .
"""
import configparser, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Beside the requirements themselves: what the tests of several packages use
EXTRAS = 'albumentations','distributed'

def settings():
    cfg = configparser.ConfigParser()
    cfg.read(ROOT/'settings.ini')
    return cfg['DEFAULT']

def floor(cfg):
    "Each requirement at the version that it begins at, then what lies beneath them"
    reqs = [o for k in ('requirements', *(f'{e}_requirements' for e in EXTRAS)) for o in cfg[k].split()]
    return [re.sub('>=', '==', o) for o in reqs if '>=' in o] + cfg['floor_constraints'].split()

def kaggle(cfg): return cfg['kaggle_image'].split()

def main():
    names = dict(floor=floor, kaggle=kaggle)
    if len(sys.argv)!=2 or sys.argv[1] not in names: raise SystemExit(__doc__)
    print('\n'.join(names[sys.argv[1]](settings())))

if __name__=='__main__': main()
