"The packages of the house: imports go one way, and what is private to a package stays in it"
import ast, re
from graphlib import TopologicalSorter
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[2]/'fastai_tricks'
# From the ground up: a package imports from those before it
LEVELS = ['core','data','train','models','resize','look','devices','fast','cv','report','deploy','cli','all']
MODULES = [f for f in sorted(ROOT.rglob('*.py')) if f.name not in ('_modidx.py','__init__.py')]

def name(f): return f.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')
def package(module): return module.split('.')[0]

def imports(f):
    "`(module, name)` of all that a module takes from this package; the name is None where the module itself is imported"
    here = ['fastai_tricks', *name(f).split('.')[:-1]]
    for n in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
        if isinstance(n, ast.Import): found = [(a.name,None) for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = '.'.join([*here[:len(here)-n.level+1], *filter(None, [n.module])]) if n.level else n.module
            found = [(base,a.name) for a in n.names]
        else: continue
        yield from ((m.removeprefix('fastai_tricks.'),o) for m,o in found if m.startswith('fastai_tricks.'))

def test_each_package_has_its_level(): assert {package(name(f)) for f in MODULES}==set(LEVELS)

@pytest.mark.parametrize('f', MODULES, ids=name)
def test_imports_go_one_way(f):
    mine = LEVELS.index(package(name(f)))
    assert not [m for m,_ in imports(f) if LEVELS.index(package(m))>mine]

@pytest.mark.parametrize('f', MODULES, ids=name)
def test_nothing_private_crosses_a_border(f):
    assert not [(m,o) for m,o in imports(f) if package(m)!=package(name(f)) and (o or m.split('.')[-1]).startswith('_')]

def test_no_circle_within_a_package():
    TopologicalSorter({name(f):{m for m,_ in imports(f)} for f in MODULES}).prepare()

@pytest.mark.parametrize('src,found', [('from .checks import check_arg',[('core.checks','check_arg')]), ('from ..data.items import Items',[('data.items','Items')]),
                                       ('import fastai_tricks.models.head',[('models.head',None)]), ('from fastai.vision.all import *',[])])
def test_imports_are_found(src, found, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    (f := tmp_path/'core'/'x.py').parent.mkdir()
    f.write_text(src)
    assert list(imports(f))==found
