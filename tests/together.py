"""Which tricks go together: how each is put to use, and what is refused or worth a remark

`tests/test_together.py` runs each pair, `nbs/together.ipynb` makes its table of the same: what the table calls working is a case that a test runs."""
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch
from PIL import Image
from torch import nn
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import FuncSplitter, parent_label
from fastai.layers import ConvLayer, Flatten
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import params, set_seed
from fastai.vision.augment import Flip, Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
import fastai_tricks.all as ft
from test_contract import CALLBACKS, FASTAI, MAKE

CLASSES,SIZE = 'abcd',32

@dataclass
class Trick:
    "How it is put to use"
    page:str='' # Where it is described
    block:dict=None # Arguments of the DataBlock: `img_cls`, `item_tfms`
    dblock:callable=None # Another DataBlock
    learn:callable=None # Puts it on a Learner
    fit:callable=None # Trains a Learner: `fit(learn)`, two epochs
    worked:callable=None # Was it at work? Looks at the last Learner and at what its model saw

def _has(cls): return lambda o: any(isinstance(cb, cls) for cb in o.learn.cbs)
def _small(o): return any(t and h<SIZE for t,h,_ in o.seen)
def _warms_up(o): return o.lrs[0]<o.lrs[1]

def _drafts(o): return type(o.learn.dls.train_ds.tls[0][0]) is ft.PILImageDraft
def _skipped(o): return {Path(f).name for f in o.learn.corrupt_images['file']}=={'broken.jpg'}
def _augments(o): return any(isinstance(f, ft.AlbumentationsTfm) for f in o.learn.dls.train.after_item.fs)
def _in_bf16(o): return {d for t,_,d in o.seen if t}=={torch.bfloat16} # In validation maps of attention are in fp32
def _converted(o): return any(isinstance(m, ft.DepthwiseSeparableConv) for m in o.learn.model.modules())
def _measured(o): return 'background_share' in o.learn.recorder.metric_names
# `climb` grows a copy: its weights are looked at in tests/cv/test_climb.py
def _grown(o): return o.run is not None or type(o.learn.model[-1]).__name__=='GrownLinear'

def _box(f): return [[5,5,60,50]]
def _measure(learn): learn.metrics = [*learn.metrics, *ft.background_metrics(_box, n=4)]
def _distill(learn): learn.add_cb(ft.Distill(deepcopy(learn.model)))
def _fit_fast(learn): learn.fit_fast(2, pretrained=True, head=2, mixed=False)
def _fine_tune(learn): learn.fine_tune_warmup(1, freeze_epochs=1, warmup=.5)
def _one_cycle(learn): learn.fit_warmup_one_cycle(2, warmup=1)
def _stages(fit, n=1):
    stages = [ft.Stage(SIZE//2, n, fit=fit), ft.Stage(SIZE, n, fit=fit)]
    return lambda learn: learn.fit_stages(stages, name=f'{learn.dls.c} classes')

TRICKS = {
    'PILImageDraft':Trick('data/draft', block=dict(img_cls=ft.PILImageDraft), worked=_drafts),
    'skip_corrupt':Trick('data/corrupt', dblock=lambda b: ft.skip_corrupt(b, max_share=.4), worked=_skipped),
    'albu_transforms':Trick('data/augment', block=dict(item_tfms=lambda: ft.albu_transforms(SIZE)), worked=_augments),
    'class_subset':Trick('data/subset', dblock=lambda b: b.class_subset(3), worked=lambda o: list(o.learn.dls.vocab)==list('abc')),
    'ProgressiveResize':Trick('resize/callback', worked=_small),
    'fit_stages':Trick('resize/stages', fit=_stages('one_cycle'), worked=_small),
    'to_mixed':Trick('train/precision', learn=lambda learn: learn.to_mixed(torch.bfloat16), worked=_in_bf16),
    'ChannelsLastBatch':Trick('train/precision', worked=_has(ft.ChannelsLastBatch)),
    'CompiledTraining':Trick('train/compiled', worked=lambda o: bool(getattr(o.learn.compiled_training, '_call', None))),
    'to_depthwise':Trick('models/depthwise', learn=lambda learn: learn.to_depthwise(n=8), worked=_converted),
    'Distill':Trick('train/distill', learn=_distill, worked=_has(ft.Distill)),
    'EMA':Trick('train/ema', worked=_has(ft.EMA)),
    'fit_warmup_one_cycle':Trick('train/schedule', fit=_one_cycle, worked=_warms_up),
    'fine_tune_warmup':Trick('train/schedule', fit=_fine_tune, worked=_warms_up),
    'fit_fast':Trick('fast/fit_fast', fit=_fit_fast, worked=lambda o: max(o.lrs[1:])<4e-4),
    'WatchCAM':Trick('look/cam', worked=lambda o: bool(o.learn.watch_cam.rows)),
    'background_metrics':Trick('look/background', learn=_measure, worked=_measured),
    'grow_head':Trick('models/head', worked=_grown),
    'climb':Trick('cv/climb', worked=lambda o: list(o.run.table.classes)==[2,o.learn.dls.c]),
    # In tests/devices
    'accelerate_ctx':Trick('devices/distributed'),
    'to_xla':Trick('devices/xla'),
}
# In the contract's tests by another name
SAME = dict(DeviceMixedPrecision='to_mixed')
TRICKS |= {k:Trick(worked=_has(getattr(ft, k))) for k in CALLBACKS if SAME.get(k, k) not in TRICKS}
TRICKS |= {k:Trick(worked=lambda o, k=k: k in [type(cb).__name__ for cb in o.learn.cbs]) for k in FASTAI}
IN_CONTRACT = {SAME.get(k, k) for k in MAKE}

# Pairs in the order of TRICKS. What is refused is said before anything is trained
REFUSED = {
    ('Distill','grow_head'):'`teacher` must have the outputs of the model',
}
REMARKS = {
    ('ProgressiveResize','fit_stages'):'The stages say the size; the callback is set aside meanwhile',
    ('fit_stages','grow_head'):'After growing, another `name`: a checkpoint of the smaller head is refused',
    ('fit_stages','fit_warmup_one_cycle'):'As the `fit` of a `Stage`, a function of the Learner',
    ('fit_stages','fine_tune_warmup'):'As the `fit` of a `Stage`, a function of the Learner',
    ('fit_stages','fit_fast'):'As the `fit` of a `Stage`, a function of the Learner',
    ('ProgressiveResize','fit_fast'):'One that is there already stays, and is the only one',
    ('to_mixed','background_metrics'):'The maps are made in fp32',
    ('background_metrics','climb'):'Seen in the epochs of each fold; NaN in the table of `climb`, which has its scores from the pass that predicts',
    ('grow_head','climb'):'`climb` grows the head itself, rung by rung',
}
# One or the other
EITHER = {('fit_warmup_one_cycle','fine_tune_warmup'), ('fit_warmup_one_cycle','fit_fast'), ('fine_tune_warmup','fit_fast')}
# In two processes, and on the cores of a TPU: which test has the trick
def _each(test, names): return dict.fromkeys(names.split(), test)

WITH = dict(
    accelerate_ctx={
        **_each('test_head_is_trained_once', 'fit_fast'),
        **_each('test_progressive_resize_gives_the_same_size_at_every_step', 'ProgressiveResize'),
        **_each('test_watch_cam_draws_in_one_process', 'WatchCAM'),
        **_each('test_logs_exports_and_what_only_one_met', 'skip_corrupt'),
        **_each('test_subsets_are_the_same', 'class_subset'),
        **_each('test_one_process_writes', 'fit_stages climb'),
        **_each('test_callbacks_together', 'to_mixed ChannelsLastBatch Distill EMA MixUp GradientAccumulation'),
        **_each('test_more_tricks_train_alike', 'PILImageDraft albu_transforms to_depthwise fit_warmup_one_cycle fine_tune_warmup '
                'background_metrics grow_head CutMix ChannelsLast')},
    to_xla={
        **_each('test_head_first_as_on_the_cpu', 'fit_fast'),
        **_each('test_fits_of_fastai_and_of_ours', 'fit_stages'),
        **_each('test_graphs_depend_on_sizes_alone', 'ProgressiveResize'),
        **_each('test_with_other_callbacks', 'MixUp GradientAccumulation Distill WatchCAM')})

def images(folder):
    "Four classes of JPEGs, the colour tells them apart; one file of the first is broken"
    rng = np.random.default_rng(0)
    for i,c in enumerate(CLASSES):
        (folder/c).mkdir(parents=True)
        # The first classes are the largest
        for j in range(8-i): Image.fromarray((rng.integers(0, 100, (60,80,3)) + 40*i).astype(np.uint8)).save(folder/c/f'{j}.jpg')
    (folder/'a'/'broken.jpg').write_bytes((folder/'a'/'0.jpg').read_bytes()[:400])
    return folder

def model(c):
    set_seed(0)
    return nn.Sequential(ConvLayer(3,8,stride=2), ConvLayer(8,8), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8,c))

def _body_head(m): return [params(m[:2]),params(m[2:])]
def _validates(f): return f.stem in ('1','2') # The broken one trains

def _block(tricks):
    "The DataBlock as the tricks want it"
    kw = dict(img_cls=PILImage, item_tfms=lambda: Resize(SIZE))
    for t in tricks: kw |= t.block or {}
    block = DataBlock((ImageBlock(kw['img_cls']),CategoryBlock), get_y=parent_label, splitter=FuncSplitter(_validates),
                      item_tfms=kw['item_tfms'](), batch_tfms=Flip())
    for t in tricks:
        if t.dblock: block = t.dblock(block)
    return block

def _fit(names):
    "How to train; another fit than `fit_stages` becomes that of the stages"
    fits = {n:TRICKS[n].fit for n in names if TRICKS[n].fit}
    if 'fit_stages' in fits and len(fits)==2: return _stages(next(f for n,f in fits.items() if n!='fit_stages'), 2)
    return next(iter(fits.values()), lambda learn: learn.fit_one_cycle(2))

def use(names, photos, out, within=lambda learn: nullcontext()):
    "Train with these tricks together, in a context of the Learner; what there is to look at"
    o = SimpleNamespace(seen=[], run=None, learn=None)
    files = sorted(f for f in photos.glob('*/*.jpg') if 'skip_corrupt' in names or f.stem!='broken')
    block,trains = _block([TRICKS[n] for n in names]),_fit(names)
    # A fold of the first rung has few images
    loaders = dict(bs=2 if 'climb' in names else 4, num_workers=0, device='cpu')

    def make_learner(dls):
        learn = Learner(dls, model(dls.c), splitter=_body_head, metrics=[accuracy], path=out)
        for n in names:
            if TRICKS[n].learn: TRICKS[n].learn(learn)
            elif n in MAKE: learn.add_cb(MAKE[n]())
        # Of the whole: hooks of inner layers would keep it from being compiled
        o.handle = learn.model.register_forward_hook(lambda m,i,out: o.seen.append((m.training, i[0].shape[-2], out.dtype)))
        return learn
    def fit(learn):
        o.learn = learn
        trains(learn)
        o.lrs = list(learn.recorder.lrs) # A validation empties it

    if 'climb' in names: o.run = ft.climb(make_learner, block, files, rungs=[2,None], fit=fit, n_splits=2, folds=[0], out=out/'climb', **loaders)
    else:
        grows = 'grow_head' in names
        learn = make_learner((block.class_subset(2) if grows else block).dataloaders(files, **loaders))
        with learn.no_bar(), learn.no_logging(), within(learn):
            fit(learn)
            if grows:
                learn.grow_head(block.dataloaders(files, **loaders))
                fit(learn)
    o.handle.remove()
    return o

def here(k): return k not in WITH

def pairs():
    "Each pair that `use` can run, but those of callbacks among themselves: these are in the contract's tests"
    return [p for p in combinations(filter(here, TRICKS), 2) if not set(p)<=IN_CONTRACT and p not in EITHER]

def cell(a, b):
    "What is known of two tricks: 'works', 'remark', 'refused', or '' where no test runs them; and what there is to say"
    a,b = sorted((a,b), key=list(TRICKS).index)
    if (a,b) in REFUSED: return 'refused',REFUSED[a,b]
    if not _tested(a, b): return '',''
    return ('remark',REMARKS[a,b]) if (a,b) in REMARKS else ('works','')

def _tested(a, b):
    "Does a test run the two?"
    if here(a) and here(b): return (a,b) not in EITHER and not {a,b}<=set(FASTAI)
    return b in WITH.get(a, ()) or a in WITH.get(b, ())
