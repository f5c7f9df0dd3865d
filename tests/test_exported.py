"What an exported Learner needs where it is loaded: nothing of this package, and what the pages say of it"
import json, os, pickletools, re, subprocess, sys, zipfile
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
import albumentations as A
import cloudpickle, pytest, torch, torch.multiprocessing as mp
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import parent_label
from fastai.learner import Learner, load_learner
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock
from fastai.vision.all import ItemTransform
import fastai_tricks.all as ft
from fastai_tricks.core.plain import OnlyInTraining
from exported_run import predicted
import together
from together import here, images, model, TRICKS, use, _block

# As functions of a notebook are: in the file themselves
cloudpickle.register_pickle_by_value(together)

PAGE = Path(__file__).resolve().parents[1]/'nbs'/'tutorials'/'kaggle.ipynb'
AREA = A.Resize(32, 32, area_for_downscale='image')
ONE = {name:(name,) for name in TRICKS if here(name)}
SEVERAL = {
    'most':('PILImageDraft','skip_corrupt','albu_transforms','ProgressiveResize','to_mixed','ChannelsLastBatch','CompiledTraining',
            'to_depthwise','Distill','EMA','WatchCAM','background_metrics','MixUp'),
    'stages':('PILImageDraft','class_subset','fit_stages','fine_tune_warmup','EMA','grow_head'),
    'climbed':('PILImageDraft','albu_transforms','EMA','to_depthwise','climb')}

def trained(block, files, path):
    "A Learner with loaders of another DataBlock"
    dls = block.dataloaders(files, bs=4, num_workers=0, device='cpu')
    return Learner(dls, model(dls.c), path=path)

def _cached(files, path, **kwargs):
    "Drafts whose pictures are stored"
    return trained(ft.cached(_block([SimpleNamespace(block=dict(img_cls=ft.PILImageDraft, **kwargs), dblock=None)])), files, path)

def _loaders(files, path):
    learn = trained(_block([]), files, path)
    ft.cached(learn.dls)
    return learn

def _with(tfm):
    def make(files, path): return trained(DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, item_tfms=tfm), files, path)
    return make

OTHERS = {
    'cached':_cached,
    'cached albumentations':lambda *args: _cached(*args, item_tfms=lambda: ft.albu_transforms(32)),
    'cached loaders':_loaders,
    'augmented':_with([Resize(32),ft.AlbumentationsTfm(A.HorizontalFlip())]),
    'cut':_with(ft.AlbumentationsTfm(A.RandomCrop(32, 32), A.CenterCrop(32, 40))),
    'squished':_with(ft.AlbumentationsTfm(A.RandomCrop(32, 32), AREA)),
}

@pytest.fixture(scope='module')
def photos(tmp_path_factory): return images(tmp_path_factory.mktemp('photos'))

@pytest.fixture(scope='module')
def files(photos): return sorted(f for f in photos.glob('*/*.jpg') if f.stem!='broken')

def in_fp32(learn): return learn.removed_cbs(learn.cbs.filter(lambda cb: isinstance(cb, MixedPrecision)))

@pytest.fixture(scope='module')
def exports(photos, files, tmp_path_factory):
    "Of each Learner itself, its file, and what it predicts there (or the error) and here"
    to,out = tmp_path_factory.mktemp('exported'),{}
    def keep(name, learn):
        for m in learn.model.modules(): m._forward_hooks.clear() # Which `use` hung in
        with in_fp32(learn): want = predicted(learn, files)
        learn.path = to
        learn.export(f'{name}.pkl')
        out[name] = SimpleNamespace(learn=learn, want=want, file=to/f'{name}.pkl')
    for name,tricks in (ONE | SEVERAL).items(): keep(name, use(tricks, photos, tmp_path_factory.mktemp('run')).learn)
    for name,make in OTHERS.items(): keep(name, make(files, to))
    # Without the folder of this package on its path
    env = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
    script = Path(__file__).with_name('exported_run.py')
    subprocess.run([sys.executable, script, to, *files], cwd=to, env=env, check=True)
    for name,o in out.items():
        error = o.file.with_suffix('.txt')
        o.error = error.read_text() if error.exists() else ''
        o.got = None if o.error else torch.load(o.file.with_suffix('.pt'))
    return out

def names_in(file):
    "Modules of this package whose code a pickle asks for"
    with zipfile.ZipFile(file) as z: ops = list(pickletools.genops(z.read(next(n for n in z.namelist() if n.endswith('data.pkl')))))
    return {a for op,a,_ in ops if op.name=='GLOBAL' and a.startswith(('fastai_tricks','albumentations'))}

def same(got, want, atol=1e-5): return all(torch.allclose(a, b, atol=atol) for a,b in zip(got, want, strict=True))

@pytest.mark.parametrize('name', [*ONE, *SEVERAL, *OTHERS])
def test_loads_without_the_package(name, exports, files):
    o = exports[name]
    assert not o.error, o.error
    assert not names_in(o.file)
    # Of 255 levels one on average
    atol = .01 if name=='squished' else 1e-5
    assert same(o.got, o.want, atol) and len(o.got[1])==len(files)
    assert same(predicted(load_learner(o.file), files), o.want, atol) # With the package at hand
    with in_fp32(o.learn): assert same(predicted(o.learn, files), o.want) # The Learner itself is as it was

@pytest.mark.parametrize('name', ['most','cached albumentations'])
def test_goes_on_training(name, exports, files):
    learn = exports[name].learn
    was,cbs = [p.clone() for p in learn.model.parameters()],{type(cb) for cb in learn.cbs}
    state = deepcopy(learn.opt.state_dict()['state']) if learn.opt else []
    learn.export('again.pkl')
    assert str(learn.opt.state_dict()['state'] if state else [])==str(state)
    assert name!='most' or any('grad_avg' in o for o in state)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert {type(cb) for cb in learn.cbs}==cbs and not all(map(torch.equal, was, learn.model.parameters()))

def test_the_weights_are_the_average(photos, tmp_path):
    learn = use(('EMA',), photos, tmp_path).learn
    learn.path = tmp_path
    learn.export('l.pkl')
    loaded = load_learner(tmp_path/'l.pkl')
    assert type(learn.ema) is ft.EMA and type(loaded.ema) is Callback
    assert all(map(torch.equal, learn.model.parameters(), loaded.model.parameters()))

def test_names_of_weights_stay(exports):
    for name in ('to_depthwise','grow_head'):
        learn,loaded = exports[name].learn,load_learner(exports[name].file)
        assert list(learn.model.state_dict())==list(loaded.model.state_dict())
        learn.model.load_state_dict(loaded.model.state_dict())
    assert type(load_learner(exports['grow_head'].file).model[-1]) is nn.Linear

def test_metrics_say_nan(exports):
    learn = exports['background_metrics'].learn
    loaded = load_learner(exports['background_metrics'].file)
    assert [m.name for m in loaded.metrics]==[m.name for m in learn.metrics]==['accuracy','background_share','pointing_game']
    loaded.dls = learn.dls
    with loaded.no_bar(): *_,share,game = loaded.validate()
    assert share!=share and game!=game

def test_albumentations_is_named_once(files, tmp_path, capsys):
    def said(tfm, learn=None):
        learn = _with(tfm)(files, tmp_path)
        capsys.readouterr()
        learn.export('l.pkl')
        return capsys.readouterr().out
    out = said(ft.AlbumentationsTfm(A.HorizontalFlip(), [A.Resize(32, 32),A.CLAHE(p=1)]))
    assert out.count('\n')==1 and 'Resize, CLAHE' in out and 'install fastai_tricks[albumentations]' in out
    assert names_in(tmp_path/'l.pkl')
    load_learner(tmp_path/'l.pkl').predict(files[0])
    out = said(ft.albu_transforms(32))
    assert out.count('\n')==1 and "fastai's Resize" in out and not names_in(tmp_path/'l.pkl')

# In worker processes

class IsDraft(ItemTransform):
    "What it says is seen in the batch"
    order = 0
    def encodes(self, o):
        assert type(o[0]) is ft.PILImageDraft and o[0].undecoded, type(o[0])
        return o

@pytest.mark.parametrize('method', ['fork','spawn','forkserver'])
def test_workers_have_drafts(method, files):
    block = DataBlock((ImageBlock(ft.PILImageDraft),CategoryBlock), get_y=parent_label, item_tfms=[IsDraft(),Resize(32)])
    dls,was = block.dataloaders(files, bs=4, num_workers=0, device='cpu'),mp.get_start_method()
    mp.set_start_method(method, force=True)
    try: assert len(list(dls.valid.new(num_workers=1)))==len(dls.valid)
    finally: mp.set_start_method(was, force=True)

def test_workers_have_albumentations(files):
    dls = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, item_tfms=ft.AlbumentationsTfm(A.Resize(24, 40), AREA))
    dls,was = dls.dataloaders(files, bs=4, num_workers=0, device='cpu'),mp.get_start_method()
    mp.set_start_method('spawn', force=True)
    try: assert {b[0].shape[-2:] for b in dls.train.new(num_workers=1)}=={(24,40)}
    finally: mp.set_start_method(was, force=True)

# All of the package

def subclasses(cls): return {o for c in cls.__subclasses__() for o in {c} | subclasses(c)}

def test_all_callbacks_and_layers_are_plain():
    import fastai_tricks.report.report # noqa: F401 - all modules
    ours = [c for base in (Callback,nn.Module) for c in subclasses(base) if c.__module__.startswith('fastai_tricks.')]
    ours = [c for c in ours if not c.__module__.startswith('fastai_tricks.deploy.')] # Written as ONNX, and in no Learner
    assert len(ours)>20
    assert not [c for c in ours if c.__reduce_ex__ is object.__reduce_ex__]
    assert not [c for c in ours if issubclass(c, Callback) and not issubclass(c, OnlyInTraining)]

def test_tutorial_says_so():
    text = next(s for c in json.loads(PAGE.read_text(encoding='utf-8'))['cells'] if '## Submit' in (s := ''.join(c['source'])))
    changed,none = re.search(r'stands for these: (.*?)\. These leave .*?: (.*?)\. ', text).groups()
    def named(s): return set(re.findall(r'`(\w+)`', s))
    ours = {o for o in TRICKS if here(o) and TRICKS[o].page}
    assert named(changed) | named(none)==ours and not named(changed) & named(none)
