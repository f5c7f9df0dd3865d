"The wheel holds all that the package needs, and says so"
import configparser, dataclasses, inspect, json, re, shutil, subprocess, sys, zipfile
from email.parser import Parser
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from fastai.vision.all import DataBlock, DataLoaders, Learner, PILImage
from fastcore.docments import docments
import fastai_tricks, fastai_tricks.all as ft
from fastai_tricks._modidx import d as index
from fastai_tricks.data.sample import sample_images
if sys.version_info >= (3,11): import tomllib
else: tomllib = pytest.importorskip('tomli')

ROOT = Path(__file__).resolve().parent.parent
ZIP = ROOT/'fastai_tricks'/'data'/'sample_images.zip'

def settings():
    cfg = configparser.ConfigParser()
    cfg.read(ROOT/'settings.ini')
    return cfg['DEFAULT']

@pytest.fixture(scope='module')
def tracked():
    return subprocess.run(['git','ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

@pytest.fixture(scope='module')
def wheel(tracked, tmp_path_factory):
    "Built from tracked files only, by way of an sdist: what is missing in either is missing for whoever clones or installs"
    src = tmp_path_factory.mktemp('src')
    for f in tracked:
        if not (ROOT/f).exists(): continue
        (src/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f, src/f)
    r = subprocess.run([sys.executable,'-m','build','--no-isolation','-o',str(src/'out')], cwd=src, capture_output=True, text=True)
    assert r.returncode==0, r.stdout + r.stderr
    return zipfile.ZipFile(next((src/'out').glob('*.whl')))

@pytest.fixture(scope='module')
def meta(wheel):
    return Parser().parsestr(wheel.read(next(n for n in wheel.namelist() if n.endswith('.dist-info/METADATA'))).decode())

def test_all_files_in_wheel(wheel, tracked):
    files = {f for f in tracked if f.startswith('fastai_tricks/')}
    assert 'fastai_tricks/data/sample_images.zip' in files
    assert not files - set(wheel.namelist())
    assert {n.split('/')[0] for n in wheel.namelist() if '.dist-info/' not in n}=={'fastai_tricks'}

def test_metadata(meta, wheel):
    cfg = settings()
    assert (meta['Name'], meta['Version'])==('fastai_tricks', fastai_tricks.__version__)
    assert meta['Requires-Python'] and meta['License'] and meta['Summary']==cfg['description']
    assert meta.get_payload().strip()==(ROOT/'README.md').read_text(encoding='utf-8').strip()
    reqs = list(map(Requirement, meta.get_all('Requires-Dist')))
    def of(extra): return {(r.name.replace('_','-'), r.specifier) for r in reqs if (r.marker is None)==(extra is None) and (extra is None or r.marker.evaluate({'extra':extra}))}
    def listed(key): return {(r.name.replace('_','-'), r.specifier) for r in map(Requirement, cfg[key].split())}
    assert of(None)==listed('requirements')
    assert set(meta.get_all('Provides-Extra'))=={'albumentations','onnx','tpu','distributed','demo','docs','dev'}
    for e in ('albumentations','onnx','tpu','distributed','demo','docs'): assert of(e)==listed(f'{e}_requirements')
    assert of('dev')==listed('dev_requirements') | listed('demo_requirements')
    entry = wheel.read(next(n for n in wheel.namelist() if n.endswith('entry_points.txt'))).decode()
    assert '[nbdev]\nfastai_tricks = fastai_tricks._modidx:d' in entry and '[console_scripts]\nfastai-tricks = fastai_tricks.cli:main' in entry

def test_one_name_and_all_dynamic_fields_set(meta):
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert project['name']==settings()['lib_name']==fastai_tricks.__name__
    field = {'version':'Version','description':'Summary','license':'License','authors':'Author-email','keywords':'Keywords','classifiers':'Classifier',
             'dependencies':'Requires-Dist','optional-dependencies':'Provides-Extra','readme':'Description-Content-Type'}
    # Scripts and entry points are asked for above
    assert not [d for d in project['dynamic'] if d not in ('scripts','entry-points') and not meta[field[d]]]

def test_sample_images(tmp_path):
    path = sample_images(tmp_path/'x')
    files = sorted(path.glob('*/*'))
    assert (len([d for d in path.iterdir() if d.is_dir()]), len(files))==(36,987)
    assert min(min(PILImage.create(f).size) for f in files)>=160
    was = [(f, f.stat().st_mtime_ns) for f in sorted(path.rglob('*'))]
    assert sample_images(tmp_path/'x')==path
    assert [(f, f.stat().st_mtime_ns) for f in sorted(path.rglob('*'))]==was
    assert [p.name for p in tmp_path.iterdir()]==['x']

def test_sample_images_keeps_other_files(tmp_path):
    (tmp_path/'mine.txt').write_text('mine')
    with pytest.raises(ValueError, match='dest'): sample_images(tmp_path)
    assert [p.name for p in tmp_path.iterdir()]==['mine.txt']

def test_zip_is_small(): assert ZIP.stat().st_size<=6_000_000

# Pages --------------------------------------------------------------------------
PAGES = ROOT/'nbs'
CELLS = {f.relative_to(PAGES).with_suffix('').as_posix():json.loads(f.read_text(encoding='utf-8'))['cells'] for f in sorted(PAGES.rglob('*.ipynb')) if f.parent.name!='tutorials'}
NBS = [n for n in CELLS if n not in ('all','index')]
TIP_PAGES = '''data/draft resize/callback resize/stages data/subset cv/cross_validate cv/climb train/precision devices/distributed devices/xla models/depthwise train/distill
               train/schedule data/augment look/cam look/background'''.split()
HEADINGS = ['How to use it','How it works','What it was worth','When not to use it','What it goes with']
SYMS = [k.removeprefix(f'{mod}.') for mod,syms in index['syms'].items() for k in syms] # `Learner.to_mixed` for a patch
PATCHED = dict(Learner=Learner, DataBlock=DataBlock, DataLoaders=DataLoaders)

def src(c): return ''.join(c['source'])
def text(n): return '\n'.join(src(c) for c in CELLS[n] if c['cell_type']=='markdown')
def headings(n): return [m[1] for m in re.finditer(r'^#+ (.+)$', text(n), re.M)]
# What a reader sees of the pages
SHOWN = '\n'.join(src(c) for n in NBS for c in CELLS[n] if c['cell_type']=='markdown' or not re.match(r'#\|\s*(export|hide|default_exp)', src(c)))

def public():
    "Names of the API, and what they stand for"
    res = {n:getattr(ft, n) for n in ft.__all__}
    for n in SYMS:
        cls,_,f = n.partition('.')
        if cls in PATCHED and not f.startswith('_'):
            o = inspect.getattr_static(PATCHED[cls], f)
            res[n] = o.fget if isinstance(o, property) else o
    return res

def own_params(o):
    "Those that its own code names: what is delegated is documented elsewhere"
    if dataclasses.is_dataclass(o): return [f.name for f in dataclasses.fields(o)]
    if inspect.isclass(o):
        if '__init__' not in vars(o): return []
        o = o.__init__
    c = inspect.unwrap(o).__code__
    return [p for p in c.co_varnames[:c.co_argcount + c.co_kwonlyargcount] if p not in ('self','cls') and not p.startswith('_')]

@pytest.mark.parametrize('name', list(public()))
def test_public_name_is_documented(name):
    o = public()[name]
    if callable(o):
        assert name in SYMS and inspect.getdoc(o), 'exported by a page, with a docstring'
        params = own_params(o)
        # Python 3.10 has no signature for an exception without parameters of its own
        docs = docments(o, full=True) if params else {}
        assert not [p for p in params if not (docs.get(p) or {}).get('docment')], 'a comment for each parameter'
    assert re.search(rf"\b{name.split('.')[-1]}\b", SHOWN), 'used or told of in a page'

@pytest.mark.parametrize('name', NBS)
def test_page_has_title_and_subtitle(name):
    first = CELLS[name][0]
    assert first['cell_type']=='markdown' and re.match(r'# .+\n\n> .+', src(first))

@pytest.mark.parametrize('name', TIP_PAGES)
def test_tip_page_has_all_sections(name): assert not set(HEADINGS) - set(headings(name))

@pytest.mark.parametrize('name', [*NBS, 'index'])
def test_links_between_pages(name):
    for file,anchor in re.findall(r'\]\(([^)#:\s]*)(?:#([^)\s]+))?\)', text(name)):
        target = ((PAGES/name).parent/file).resolve() if file else PAGES/f'{name}.ipynb'
        assert target.exists(), file
        page = target.relative_to(PAGES).with_suffix('').as_posix()
        if anchor: assert anchor in [re.sub('`', '', h).replace(' ', '-') for h in headings(page)], f'{file}#{anchor}'
