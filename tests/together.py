"""Which tricks go together: how each is put to use, and what is refused or worth a remark

`tests/test_together.py` runs each pair, `nbs/80_together.ipynb` makes its table of the same: what the table calls working is a case that a test runs."""
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

CLASSES,SIZE = 'abcd',64

@dataclass
class Trick:
    "How it is put to use"
    page:str='' # Where it is described
    block:dict=None # Arguments of the DataBlock: `img_cls`, `item_tfms`
    dblock:callable=None # Another DataBlock
    learn:callable=None # Puts it on a Learner
    fit:callable=None # Trains a Learner: `fit(learn)`, two epochs
    worked:callable=None # Was it at work? Looks at the last Learner and at what its model saw

def _small(o): return any(t and h<SIZE for t,h,_ in o.seen)
def _has(cls): return lambda o: any(isinstance(cb, cls) for cb in o.learn.cbs)
def _box(f): return [[8,8,100,80]]
def _stages(fit, n=1): return lambda learn: learn.fit_stages([ft.Stage(32, n, fit=fit), ft.Stage(SIZE, n, fit=fit)], name=f'{learn.dls.c} classes')

TRICKS = {
    'PILImageDraft':Trick('10_resolution', block=dict(img_cls=ft.PILImageDraft), worked=lambda o: type(o.learn.dls.train_ds.tls[0][0]) is ft.PILImageDraft),
    'skip_corrupt':Trick('13_files', dblock=lambda b: ft.skip_corrupt(b, max_share=.4), worked=lambda o: {Path(f).name for f in o.learn.corrupt_images['file']}=={'broken.jpg'}),
    'albu_transforms':Trick('60_augment', block=dict(item_tfms=lambda: ft.albu_transforms(SIZE)), worked=lambda o: any(isinstance(f, ft.AlbumentationsTfm) for f in o.learn.dls.train.after_item.fs)),
    'class_subset':Trick('20_subset', dblock=lambda b: b.class_subset(3), worked=lambda o: list(o.learn.dls.vocab)==list('abc')),
    'ProgressiveResize':Trick('11_resize', worked=_small),
    'fit_stages':Trick('12_stages', fit=_stages('one_cycle'), worked=_small),
    # In validation maps of attention are in fp32
    'to_mixed':Trick('30_precision', learn=lambda learn: learn.to_mixed(torch.bfloat16), worked=lambda o: {d for t,_,d in o.seen if t}=={torch.bfloat16}),
    'ChannelsLastBatch':Trick('30_precision', worked=_has(ft.ChannelsLastBatch)),
    'to_depthwise':Trick('40_depthwise', learn=lambda learn: learn.to_depthwise(n=8), worked=lambda o: any(isinstance(m, ft.DepthwiseSeparableConv) for m in o.learn.model.modules())),
    'Distill':Trick('42_distill', learn=lambda learn: learn.add_cb(ft.Distill(deepcopy(learn.model))), worked=_has(ft.Distill)),
    'fit_warmup_one_cycle':Trick('50_schedule', fit=lambda learn: learn.fit_warmup_one_cycle(2, warmup=1), worked=lambda o: o.lrs[0]<o.lrs[1]),
    'fine_tune_warmup':Trick('50_schedule', fit=lambda learn: learn.fine_tune_warmup(1, freeze_epochs=1, warmup=.5), worked=lambda o: o.lrs[0]<o.lrs[1]),
    'fit_fast':Trick('75_fast', fit=lambda learn: learn.fit_fast(2, pretrained=True, head=2, mixed=False), worked=lambda o: max(o.lrs)<4e-4),
    'WatchCAM':Trick('61_cam', worked=lambda o: bool(o.learn.watch_cam.rows)),
    'background_metrics':Trick('62_background', learn=lambda learn: setattr(learn, 'metrics', [*learn.metrics, *ft.background_metrics(_box, n=4)]), worked=lambda o: 'background_share' in o.learn.recorder.metric_names),
    # `climb` grows a copy: its weights are looked at in tests/test_climb.py
    'grow_head':Trick('23_head', worked=lambda o: o.run is not None or type(o.learn.model[-1]).__name__=='GrownLinear'),
    'climb':Trick('22_climb', worked=lambda o: list(o.run.table.classes)==[2,o.learn.dls.c]),
    # In tests/test_distributed.py and tests/test_xla.py
    'accelerate_ctx':Trick('31_distributed'),
    'to_xla':Trick('33_xla'),
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
WITH = dict(
    accelerate_ctx={'fit_fast':'test_head_is_trained_once', **dict.fromkeys(['to_mixed','ChannelsLastBatch','Distill','MixUp','GradientAccumulation'], 'test_callbacks_together'), 'ProgressiveResize':'test_progressive_resize_gives_the_same_size_at_every_step',
                    'WatchCAM':'test_watch_cam_draws_in_one_process', 'skip_corrupt':'test_logs_exports_and_what_only_one_met', 'class_subset':'test_subsets_are_the_same', 'fit_stages':'test_one_process_writes', 'climb':'test_one_process_writes',
                    **dict.fromkeys(['PILImageDraft','albu_transforms','to_depthwise','fit_warmup_one_cycle','fine_tune_warmup','background_metrics','grow_head','CutMix','ChannelsLast'], 'test_more_tricks_train_alike')},
    to_xla={'fit_fast':'test_head_first_as_on_the_cpu', 'fit_stages':'test_fits_of_fastai_and_of_ours', 'ProgressiveResize':'test_graphs_depend_on_sizes_alone', **dict.fromkeys(['MixUp','GradientAccumulation','Distill','WatchCAM'], 'test_with_other_callbacks')})

def images(folder):
    "Four classes of JPEGs, the colour tells them apart; one file of the first is broken"
    rng = np.random.default_rng(0)
    for i,c in enumerate(CLASSES):
        (folder/c).mkdir(parents=True)
        # The first classes are the largest
        for j in range(8-i): Image.fromarray((rng.integers(0, 100, (120,160,3)) + 40*i).astype(np.uint8)).save(folder/c/f'{j}.jpg')
    (folder/'a'/'broken.jpg').write_bytes((folder/'a'/'0.jpg').read_bytes()[:400])
    return folder

def model(c):
    set_seed(0)
    return nn.Sequential(ConvLayer(3,8,stride=2), ConvLayer(8,8), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8,c))

def _body_head(m): return [params(m[:2]),params(m[2:])]
def _validates(f): return f.stem in ('1','2') # The broken one trains

def use(names, photos, out, within=lambda learn: nullcontext()):
    "Train with these tricks together, in a context of the Learner; what there is to look at"
    tricks = [TRICKS[n] for n in names]
    o = SimpleNamespace(seen=[], run=None, learn=None)
    o.files = sorted(f for f in photos.glob('*/*.jpg') if 'skip_corrupt' in names or f.stem!='broken')
    kw = dict(img_cls=PILImage, item_tfms=lambda: Resize(SIZE))
    for t in tricks: kw |= t.block or {}
    block = DataBlock((ImageBlock(kw['img_cls']),CategoryBlock), get_y=parent_label, splitter=FuncSplitter(_validates), item_tfms=kw['item_tfms'](), batch_tfms=Flip())
    for t in tricks:
        if t.dblock: block = t.dblock(block)
    # A fold of the first rung has few images
    loaders = dict(bs=2 if 'climb' in names else 4, num_workers=0, device='cpu')

    def make_learner(dls):
        learn = Learner(dls, model(dls.c), splitter=_body_head, metrics=[accuracy], path=out)
        for n,t in zip(names, tricks):
            if t.learn: t.learn(learn)
            elif n in MAKE: learn.add_cb(MAKE[n]())
        o.handle = learn.model[0].register_forward_hook(lambda m,i,out: o.seen.append((m.training, i[0].shape[-2], out.dtype)))
        return learn

    fits = [t.fit for t in tricks if t.fit]
    trains = fits[0] if fits else lambda learn: learn.fit_one_cycle(2)
    if 'fit_stages' in names and len(fits)==2: trains = _stages(next(t.fit for n,t in zip(names, tricks) if t.fit and n!='fit_stages'), 2)
    def fit(learn):
        o.learn = learn
        trains(learn)
        o.lrs = list(learn.recorder.lrs) # A validation empties it

    if 'climb' in names: o.run = ft.climb(make_learner, block, o.files, rungs=[2,None], fit=fit, n_splits=2, folds=[0], out=out/'climb', **loaders)
    else:
        grows = 'grow_head' in names
        learn = make_learner((block.class_subset(2) if grows else block).dataloaders(o.files, **loaders))
        with learn.no_bar(), learn.no_logging(), within(learn):
            fit(learn)
            if grows:
                learn.grow_head(block.dataloaders(o.files, **loaders))
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
    if not here(a) or not here(b):
        if here(a)==here(b) or (b if here(a) else a) not in WITH or (a if here(a) else b) not in WITH[b if here(a) else a]: return '',''
    elif (a,b) in EITHER or {a,b}<=set(FASTAI): return '',''
    return ('remark',REMARKS[a,b]) if (a,b) in REMARKS else ('works','')
