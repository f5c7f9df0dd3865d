"What settings.ini names is what `make test-floor` and `make test-kaggle` install, and every package has tests that run there"
import os, re, sys
from importlib.metadata import version
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
import fastai_tricks.all as ft

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import kaggle, versions
sys.path.pop(0)

def required():
    "Name and lowest version"
    cfg = versions.settings()
    reqs = [Requirement(o) for k in ('requirements','albumentations_requirements','distributed_requirements') for o in cfg[k].split()]
    return {r.name:Version(s.version) for r in reqs for s in r.specifier if s.operator=='>='}

@pytest.mark.parametrize('name', required())
def test_version_of_this_environment(name):
    have = Version(Version(version(name)).base_version) # Without `+cpu`
    # `make test-floor` sets it
    if os.environ.get('FLOOR')=='1': assert have==required()[name]
    else: assert have>=required()[name]

def test_the_floor_is_that_of_settings():
    named = {r.name:next(iter(r.specifier)) for r in map(Requirement, versions.floor(versions.settings()))}
    assert {'fastai','fastcore','torch','torchvision','timm','scikit-learn'}<=required().keys()<=named.keys()
    assert all(s.operator=='==' for s in named.values())
    assert {n:Version(named[n].version) for n in required()}==required()

def test_no_name_is_lost():
    "Before 1.9, fastcore's `patch` leaves None under the name of a method that a function has too"
    assert not [n for n in ft.__all__ if getattr(ft, n) is None]

def test_every_package_is_tested_there():
    files = re.findall(r'(?m)^(\w+)/', (ROOT/'tests'/'floor.txt').read_text())
    assert set(files)=={d.name for d in (ROOT/'fastai_tricks').iterdir() if (d/'__init__.py').exists()}

# Kaggle --------------------------------------------------------------------------------------------------------------------------
def image(): return {r.name:next(iter(r.specifier)).version for r in map(Requirement, versions.kaggle(versions.settings()))}

def test_kaggle_has_all_that_is_required():
    cfg = versions.settings()
    assert not [o for k in ('requirements','albumentations_requirements','distributed_requirements') for o in cfg[k].split() if kaggle.lacks(Requirement(o), image())]

def test_what_kaggle_lacks():
    assert not kaggle.lacks(Requirement('fastai>=2.8.1'), image())
    assert kaggle.lacks(Requirement('not-there>=1'), image())
    assert not kaggle.lacks(Requirement('Scikit_Learn'), image())
    with pytest.raises(SystemExit, match='fastai>=99 is required, and the image has'): kaggle.lacks(Requirement('fastai>=99'), image())
