"Mixed precision: what the model computed with, what is left behind, what is chosen"
import copy
import pytest, torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.data.all import DataLoaders, TfmdDL
from fastai.optimizer import SGD
import fastai_tricks.all as ft
from fastai_tricks.core.loader import LoaderProxy
from fastai_tricks.core.test_utils import tiny_dls, tiny_learner
from fastai_tricks.train import precision as P, variants as V
from fastai_tricks.train.variants import Trial, Variant, fp32
from steps import quiet, with_speeds

BF16, FP16 = torch.bfloat16, torch.float16

@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch): monkeypatch.setattr(P, '_chosen', {})

def dtypes_seen(learn):
    "(training, dtype of the model's output) of every call"
    seen = []
    learn.model.register_forward_hook(lambda m,i,o: seen.append((m.training, o.dtype)))
    return seen

def autocast_is_off(learn): return not torch.is_autocast_enabled('cpu') and '_compiled_call_impl' not in vars(learn.model)

# What the model computes with ---------------------------------------------------

@pytest.mark.parametrize('dtype', [BF16,FP16])
def test_everything_runs_in_half_precision(dtype, tmp_path):
    learn = tiny_learner()
    learn.path = tmp_path
    seen = dtypes_seen(learn)
    with quiet(learn):
        learn.to_mixed(dtype)
        for f in (lambda: learn.fit_one_cycle(1), lambda: learn.fine_tune(1), lambda: learn.fit_warmup_cos(2), learn.validate,
                  lambda: learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None), lambda: learn.tta(n=1)):
            seen.clear()
            f()
            assert seen and {d for _,d in seen}=={dtype} and autocast_is_off(learn)
        preds,_ = learn.get_preds()
        assert preds.dtype==torch.float32
    assert {p.dtype for p in learn.model.parameters()}=={torch.float32}
    assert {s[k].dtype for _,_,s,_ in learn.opt.all_params() for k in ('grad_avg','sqr_avg') if k in s}=={torch.float32}

def test_with_workers():
    learn = tiny_learner(tiny_dls(num_workers=2))
    seen = dtypes_seen(learn)
    with quiet(learn): learn.to_mixed(BF16).fit(1)
    assert len(seen)==4 and {d for _,d in seen}=={BF16} and autocast_is_off(learn)

def test_same_weights_as_a_plain_autocast_loop():
    learn = tiny_learner()
    learn.opt_func = SGD
    model = copy.deepcopy(learn.model).train()
    batches = []
    class Note(Callback):
        order, run_valid = 100, False
        def before_batch(self): batches.append((self.xb[0].clone(), self.yb[0].clone()))
    with quiet(learn): learn.to_mixed(BF16).fit(2, .1, cbs=Note())
    opt = SGD([list(model.parameters())], .1)
    for x,y in batches:
        with torch.autocast('cpu', dtype=BF16): pred = model(x)
        learn.loss_func(pred.float(), y).backward()
        opt.step(); opt.zero_grad()
    for a,b in zip(learn.model.parameters(), model.parameters()): assert torch.allclose(a, b, atol=1e-7)
    plain = tiny_learner()
    assert len(batches)==6 and not all(torch.allclose(a, b) for a,b in zip(learn.model.parameters(), plain.model.parameters()))

def test_fp16_scales_the_gradients_and_skips_what_overflows():
    learn = tiny_learner()
    scaled = []
    class Look(Callback):
        run_valid = False
        order = MixedPrecision.order+1
        def before_backward(self): scaled.append(float(self.loss_grad/self.loss))
    with quiet(learn): learn.to_mixed(FP16, init_scale=2.**30, growth_interval=100).fit(2, cbs=Look())
    assert scaled[0]==2.**30 and scaled[-1]<2.**30 # Too large a scale is backed off from
    assert all(p.isfinite().all() for p in learn.model.parameters())
    learn = tiny_learner()
    scaled.clear()
    with quiet(learn): learn.to_mixed(BF16).fit(1, cbs=Look())
    assert set(scaled)=={1.}

def test_each_call_in_a_batch_is_under_autocast():
    "Consistency and adversarial losses call the model from a callback"
    class Aux(Callback):
        order = 20
        def before_batch(self): self.model(self.xb[0].flip(-1))
        def after_pred(self): self.model(self.xb[0])
    learn = tiny_learner(cbs=Aux())
    seen = dtypes_seen(learn)
    with quiet(learn): learn.to_mixed(BF16).fit(1)
    assert len(seen)==12 and {d for _,d in seen}=={BF16} and autocast_is_off(learn)

@pytest.mark.parametrize('dtype', [BF16,FP16])
def test_a_call_after_the_loss_is_not(dtype):
    class Aux(Callback):
        order, run_valid = 20, False
        def _look(self): dtypes.add(self.model(self.xb[0]).dtype)
        before_backward = before_step = after_batch = after_train = before_epoch = after_epoch = _look
    learn, dtypes = tiny_learner(cbs=Aux()), set()
    learn.xb = learn.dls.one_batch()[:1]
    with quiet(learn): learn.to_mixed(dtype).fit(1)
    assert dtypes=={torch.float32}

@pytest.mark.parametrize('dtype', [BF16,FP16])
def test_a_prediction_in_the_middle_of_a_fit(dtype):
    "It leaves autocast and the scaler to the fit that goes on"
    class Mid(Callback):
        order = 70
        def after_epoch(self):
            if self.learn.lock.locked(): return
            scaler = self.learn.scaler
            self.learn.get_preds()
            assert self.learn.scaler is scaler
    learn = tiny_learner(cbs=Mid())
    seen = dtypes_seen(learn)
    with quiet(learn): learn.to_mixed(dtype).fit(2)
    assert len(seen)==2*5 and {d for _,d in seen}=={dtype} and autocast_is_off(learn) and learn.scaler is None

# Whatever ends it ---------------------------------------------------------------

class Raises(torch.nn.Module):
    def __init__(self, ex): super().__init__(); self.ex = ex
    def forward(self, x):
        if self.ex and self.training and torch.is_autocast_enabled('cpu'): raise self.ex
        return x

@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_autocast_is_off_after_an_error_in_the_model(ex):
    learn = tiny_learner()
    learn.model.append(Raises(ex('boom')))
    with quiet(learn), pytest.raises(ex): learn.to_mixed(BF16).fit(1)
    assert autocast_is_off(learn)
    assert learn.model(torch.rand(2,3,64,64)).dtype==torch.float32
    learn.model[-1].ex = None
    with quiet(learn): learn.fit(1)

def stopping(event, ex, valid=False):
    "A callback that raises in a training or validation batch"
    class Boom(Callback):
        order, run_train, run_valid = 100, not valid, valid
    def boom(self): raise ex('boom')
    setattr(Boom, event, boom)
    return Boom()

@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt, CancelBatchException, CancelFitException])
@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss','before_backward','before_step','after_step'])
def test_no_call_after_an_error_is_under_autocast(event, ex, tmp_path):
    learn = tiny_learner()
    learn.path = tmp_path
    with quiet(learn):
        try: learn.to_mixed(BF16).fit(1, cbs=stopping(event, ex))
        except (RuntimeError,KeyboardInterrupt): assert autocast_is_off(learn) # At once, with the error and its frames at hand
        else: assert not issubclass(ex, (RuntimeError,KeyboardInterrupt))
        assert autocast_is_off(learn)
        assert copy.deepcopy(learn.model)(torch.rand(2,3,64,64)).dtype==torch.float32
        learn.export('l.pkl')
        load_learner(tmp_path/'l.pkl')
        assert learn.model(torch.rand(2,3,64,64)).dtype==torch.float32
        assert autocast_is_off(learn)

@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('valid,run', [(False,lambda l: l.fit(1)), (True,lambda l: l.fit(1)), (True,Learner.validate), (True,Learner.get_preds)])
@pytest.mark.parametrize('bar', [False,True])
def test_nothing_is_left_in_any_loop(run, valid, ex, bar, capsys):
    learn = tiny_learner(cbs=stopping('after_pred', ex, valid))
    learn.to_mixed(BF16)
    try:
        if bar: run(learn)
        else:
            with quiet(learn): run(learn)
    except (RuntimeError,KeyboardInterrupt) as e: assert 'boom' in str(e) and autocast_is_off(learn)
    else: assert False

@pytest.mark.parametrize('valid', [False,True])
@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt])
def test_several_stand_in_for_the_loader(ex, valid):
    "`ProgressiveResize`, mixed precision and `EMA` each put something in the loader's place; an error leaves them all"
    ema = ft.EMA()
    learn = tiny_learner(cbs=[ema, ft.ProgressiveResize(mult=8, scale_bs=True, strength=(.5,1.))])
    own, dls = [], learn.dls.loaders
    class Own(Callback):
        order, run_valid = 100, False
        def after_step(self): own[:] = [self.model[3].weight.clone()]
    def state(): return [(dl.bs, list(map(id, dl.after_batch.fs)), list(map(id, dl.after_item.fs))) for dl in dls]
    was, seen = state(), dtypes_seen(learn)
    with quiet(learn):
        learn.to_mixed(BF16)
        try: learn.fit(2, cbs=[Own(), stopping('before_batch' if valid else 'before_step', ex, valid)])
        except (RuntimeError,KeyboardInterrupt): assert autocast_is_off(learn) and state()==was
        else: assert False
        if valid: assert ema.raw is None and torch.equal(learn.model[3].weight, own[0])
        seen.clear()
        learn.fit(2)
    assert {d for _,d in seen}=={BF16} and autocast_is_off(learn) and state()==was and learn.dl is None

def test_loaders_that_fastai_knows_by_their_class_stay():
    "`DistributedTrainer` shares out what is no `DistributedDL`"
    learn, loaders = tiny_learner(), []
    class Note(Callback):
        def before_batch(self): loaders.append(self.learn.dl)
    with quiet(learn):
        learn.to_mixed(BF16).fit(1, cbs=Note())
        assert all(isinstance(o, LoaderProxy) for o in loaders)
        loaders.clear()
        learn.distributed_trainer = object()
        learn.fit(1, cbs=Note())
    assert loaders and not any(isinstance(o, LoaderProxy) for o in loaders) and autocast_is_off(learn)

# With others --------------------------------------------------------------------

def test_a_compiled_model_stays_compiled():
    learn = tiny_learner()
    calls = []
    learn.model.compile(backend=lambda gm,_: (lambda *a: calls.append(torch.is_autocast_enabled('cpu')) or gm.forward(*a)))
    impl = learn.model._compiled_call_impl
    seen = dtypes_seen(learn)
    with quiet(learn):
        learn.to_mixed(BF16).fit(1)
        with pytest.raises(RuntimeError): learn.fit(1, cbs=stopping('before_batch', RuntimeError))
    assert learn.model._compiled_call_impl is impl and calls and {d for _,d in seen}=={BF16}

@pytest.mark.parametrize('cb', [MixUp, CutMix, lambda: GradientAccumulation(16), lambda: ft.ProgressiveResize(mult=8), ChannelsLast])
def test_with_other_callbacks(cb):
    learn = tiny_learner(cbs=cb())
    seen = dtypes_seen(learn)
    with quiet(learn): learn.to_mixed(BF16).fit(2)
    assert len(seen)==8 and {d for _,d in seen}=={BF16}

def test_bs_find_and_clipping():
    learn = tiny_learner(cbs=GradientClip(.1))
    class Fits(Callback):
        def after_pred(self):
            if len(self.xb[0])>3: raise torch.OutOfMemoryError('out of memory')
    with quiet(learn):
        learn.to_mixed(BF16)
        learn.add_cb(Fits())
        assert learn.bs_find(step=1, plot=False)==3
        assert autocast_is_off(learn)

def test_taken_back_and_put_on_twice():
    learn = tiny_learner()
    def mine(): return sorted(type(cb).__name__ for cb in learn.cbs if isinstance(cb, (MixedPrecision,ChannelsLast)))
    with quiet(learn):
        for _ in range(2): assert learn.to_mixed(BF16, channels_last=True) is learn and mine()==['ChannelsLastBatch','DeviceMixedPrecision']
        learn.fit(1)
        assert learn.model[0][0].weight.is_contiguous(memory_format=torch.channels_last)
        for _ in range(2): assert learn.from_mixed() is learn and not mine()
        assert learn.model[0][0].weight.is_contiguous()
        assert not learn.to_fp16().to_mixed(BF16).to_fp32().cbs.filter(lambda o: isinstance(o, MixedPrecision))
        seen = dtypes_seen(learn)
        learn.fit(1)
    assert {d for _,d in seen}=={torch.float32}

def test_the_batch_follows_channels_last():
    learn = tiny_learner()
    seen = []
    def last(t): return t.is_contiguous(memory_format=torch.channels_last)
    learn.model.register_forward_pre_hook(lambda m,i: seen.append((last(i[0]), last(m[0][0].weight))))
    with quiet(learn): learn.to_mixed(BF16, channels_last=True).fit(1, cbs=ft.ProgressiveResize(32, mult=8))
    assert set(seen)=={(True,True)}

@pytest.mark.parametrize('dtype', [BF16,FP16])
def test_an_exported_learner_predicts_in_fp32_on_a_cpu(dtype, tmp_path):
    learn = tiny_learner()
    learn.path = tmp_path
    seen = dtypes_seen(learn)
    with quiet(learn):
        learn.to_mixed(dtype, channels_last=True).fit(1)
        learn.predict(3)
        assert seen[-1][1]==dtype
        learn.model._forward_hooks.clear()
        learn.export('l.pkl')
        expected = learn.from_mixed().predict(3)[2]
    loaded = load_learner(tmp_path/'l.pkl')
    assert not loaded.cbs.filter(lambda o: isinstance(o, (MixedPrecision,ChannelsLast)))
    with loaded.no_bar(): assert torch.allclose(loaded.predict(3)[2], expected, atol=1e-6)

def test_fastai_knows_it_by_name():
    learn = tiny_learner().to_mixed(BF16, channels_last=True)
    learn.to_channelslast()
    assert len(learn.cbs.filter(lambda o: isinstance(o, (MixedPrecision,ChannelsLast))))==2

# Which 16 bits ------------------------------------------------------------------

def on_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d=None: capability)
    monkeypatch.setattr(P, 'device_of', lambda learn: torch.device('cuda'))

def test_a_gpu_without_bf16(monkeypatch):
    on_gpu(monkeypatch, (7,5))
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *a, **kw: False)
    with pytest.raises(ValueError, match='this GPU has no bf16'): tiny_learner().to_mixed(BF16)
    learn = tiny_learner().to_mixed(FP16)
    assert learn.mixed_precision.dtype==FP16

@pytest.mark.parametrize('capability,dtype,said', [((7,5),BF16,'as asked, though this GPU has no bf16 units'), ((7,5),FP16,'as asked'), ((8,9),BF16,'as asked')])
def test_what_is_emulated_is_said(capability, dtype, said, monkeypatch, capsys):
    "`is_bf16_supported` says yes on a T4, where it is many times as slow"
    on_gpu(monkeypatch, capability)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation or capability>=(8,0))
    learn = tiny_learner().to_mixed(dtype)
    line = capsys.readouterr().out.strip()
    assert said in line and ('though' in line)==('though' in said) and learn.mixed_precision.dtype==dtype

@pytest.mark.parametrize('capability,hip,expected', [((7,5),None,FP16), ((6,0),None,FP16), ((8,0),None,BF16), ((8,9),None,BF16), ((12,0),None,BF16), ((6,0),'6.0',BF16)])
def test_the_rule_on_gpus(capability, hip, expected, monkeypatch):
    "Of the GPU that is asked about: T4 has no bf16 units, L4 has"
    asked = []
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d=None: asked.append(d) or capability)
    monkeypatch.setattr(torch.version, 'hip', hip)
    assert P.half_dtype('cuda:1')[0]==expected and (hip or asked==['cuda:1'])

@pytest.mark.parametrize('amx,avx,expected', [(True,False,BF16),(False,True,BF16),(False,False,None)])
def test_the_rule_on_cpus(amx, avx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx, raising=False)
    assert P.half_dtype('cpu')[0]==expected
    assert P.half_dtype('xla')[0]==BF16 and P.half_dtype('mps')[0] is None

# What is chosen -----------------------------------------------------------------

LAST, HALF, BOTH = Variant(channels_last=True), Variant(BF16), Variant(BF16, True)
SLOW = 'too slow: timed on 2 images only'

def trials(speeds, turns=5):
    "What a timing gives in which each variant is so many times as fast as fp32; a text is the note of one that was not timed"
    return [Trial(v, note=s) if isinstance(s, str) else Trial(v, times=[1/s]*turns) for v,s in {fp32:1, **speeds}.items()]

@pytest.mark.parametrize('speeds,asked,dtype,last,why', [
    ({LAST:1.01, HALF:1.5, BOTH:2}, None, BF16, True, '2.00 times as fast as fp32 (2.00 to 2.00, 5 turns of 12 images)'),
    ({LAST:1.01, HALF:1.5, BOTH:1.2}, None, BF16, False, '1.50 times as fast as fp32 (1.50 to 1.50, 5 turns of 12 images)'),
    ({LAST:1.2, HALF:.9, BOTH:1.1}, None, None, True, 'bf16 gains too little (1.10 times as fast); 1.20 times as fast as fp32 (1.20 to 1.20, 5 turns of 12 images)'),
    ({LAST:1.2, HALF:1.25, BOTH:1.31}, None, None, True, 'bf16 gains too little (1.31 times as fast); 1.20 times as fast as fp32 (1.20 to 1.20, 5 turns of 12 images)'),
    ({LAST:1.2, HALF:1.25, BOTH:1.33}, None, BF16, True, '1.33 times as fast as fp32 (1.33 to 1.33, 5 turns of 12 images)'),
    ({LAST:1.04, HALF:.9, BOTH:1.09}, None, None, False, 'bf16 gains too little (1.09 times as fast); channels_last gains too little (1.04 times as fast)'),
    ({LAST:.9, HALF:SLOW, BOTH:'not tried: see bf16'}, None, None, False, f'bf16 gains nothing ({SLOW}); channels_last gains nothing'),
    ({HALF:.5}, False, None, False, 'bf16 gains nothing'),
    ({LAST:1.1, BOTH:.3}, True, None, True, 'bf16 gains nothing; 1.10 times as fast as fp32 (1.10 to 1.10, 5 turns of 12 images)'),
    ({LAST:.8, BOTH:.7}, True, None, True, 'bf16 gains nothing; 0.80 times as fast as fp32 (0.80 to 0.80, 5 turns of 12 images)'),
    ({LAST:.8, BOTH:1.5}, True, BF16, True, '1.50 times as fast as fp32 (1.50 to 1.50, 5 turns of 12 images)'),
    ({LAST:'does not run here', BOTH:'does not run here'}, True, None, True, 'bf16 gains nothing (does not run here)'),
    ({HALF:1.04}, False, None, False, 'bf16 gains too little (1.04 times as fast)')])
def test_the_plan_is_what_was_faster(speeds, asked, dtype, last, why):
    assert P.mixed_plan(BF16, trials(speeds), asked, images=12)==P.MixedPlan(dtype, last, why)

@pytest.mark.parametrize('ratios,dtype', [([2,2,2,.9],None), ([2,2,2,2,.9],BF16), ([1.1,1.1,.9],None)])
def test_most_turns_must_be_faster(ratios, dtype):
    timed = [Trial(fp32, times=[1.]*len(ratios)), Trial(HALF, times=[1/r for r in ratios])]
    assert P.mixed_plan(BF16, timed, False).dtype==dtype

def test_plans_without_units_and_without_a_timing():
    assert P.mixed_plan(None, trials({LAST:1}), why='no units')==P.MixedPlan(None, False, 'no units; channels_last gains nothing')
    failed = [Trial(fp32, note='does not run here: boom')]
    assert P.mixed_plan(BF16, failed, True, 'units')==P.MixedPlan(None, True, 'units; the timing failed: does not run here: boom')

def test_variants_that_are_tried():
    assert P.mixed_variants(BF16)==[fp32,LAST,HALF,BOTH]
    assert P.mixed_variants(BF16, True)==[fp32,LAST,BOTH] and P.mixed_variants(BF16, False)==[fp32,HALF]
    assert P.mixed_variants(None)==[fp32,LAST] and P.mixed_variants(BF16, images=False)==[fp32,HALF]

@pytest.mark.parametrize('speeds,dtype,last', [
    ({'fp32':1, 'fp32, channels_last':1.01, 'bf16':1.5, 'bf16, channels_last':2}, BF16, True),
    ({'fp32':1, 'fp32, channels_last':.9, 'bf16':.04, 'bf16, channels_last':.04}, None, False)])
def test_what_is_planned_is_done(speeds, dtype, last, monkeypatch, capsys):
    monkeypatch.setattr(P, 'half_dtype', lambda d: (BF16,'this CPU has units'))
    with_speeds(monkeypatch, speeds)
    learn = tiny_learner()
    learn.to_mixed()
    assert hasattr(learn, 'mixed_precision')==(dtype is not None) and hasattr(learn, 'channels_last')==last
    said = capsys.readouterr().out.splitlines()
    assert said[0]=='to_mixed: timing a few training steps' and said[1].startswith('to_mixed: ') and 'this CPU has units; ' in said[1] and len(said)==2
    seen = dtypes_seen(learn)
    with quiet(learn): learn.fit(1)
    assert {d for _,d in seen}=={dtype or torch.float32}

def test_the_cost_of_a_first_step_does_not_count(monkeypatch):
    monkeypatch.setattr(P, 'half_dtype', lambda d: (BF16,'units'))
    with_speeds(monkeypatch, {'fp32':64, 'fp32, channels_last':64, 'bf16':128, 'bf16, channels_last':128}, first={'bf16':3.})
    learn = tiny_learner()
    with quiet(learn): assert P._plan(learn, None, None)==P.MixedPlan(BF16, False, 'units; 2.00 times as fast as fp32 (2.00 to 2.00, 3 turns of 32 images)')

@pytest.mark.parametrize('device,hw,n,expected', [('cpu',(64,64),None,16), ('cpu',(40,40),None,40), ('cpu',(16,16),None,64), ('cpu',(512,512),None,8),
    ('cpu',(64,64),5,5), ('cpu',None,None,64), ('cuda',(64,64),None,64), ('cuda',(64,64),40,40)])
def test_items_of_a_timed_step(device, hw, n, expected): assert P.timing_bs(64, n, hw, device)==expected

def test_what_fails_in_the_timing_is_said(capsys):
    learn = tiny_learner()
    def loss(p, y): raise KeyError('boom')
    learn.loss_func = loss
    learn.to_mixed()
    assert 'stays in fp32' in (out := capsys.readouterr().out) and 'the timing failed' in out and 'boom' in out

def test_too_large_a_batch_is_halved(monkeypatch):
    step, sizes = V.training_step, []
    def small(learn, xb, yb, v):
        sizes.append(len(xb[0]))
        if len(xb[0])>10: raise torch.OutOfMemoryError('out of memory')
        return step(learn, xb, yb, v)
    monkeypatch.setattr(V, 'training_step', small)
    P._tried(tiny_learner(bs=16), None, None, 24)
    assert 24 in sizes and 12 in sizes and sizes[-1]<=10

def test_an_interrupt_keeps_the_former_precision(monkeypatch):
    learn = tiny_learner().to_mixed(BF16)
    def interrupt(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(P, '_tried', interrupt)
    with pytest.raises(KeyboardInterrupt): learn.to_mixed()
    assert learn.mixed_precision.dtype==BF16

def test_without_images_channels_last_is_not_tried(monkeypatch, capsys):
    x = torch.rand(40, 8)
    ds = [[(x[i], (x[i].sum()>4).long()) for i in o] for o in (range(32), range(32,40))]
    learn = Learner(DataLoaders(*(TfmdDL(d, bs=8) for d in ds)), torch.nn.Linear(8, 2), loss_func=CrossEntropyLossFlat())
    with_speeds(monkeypatch, {'fp32':1, 'bf16':1})
    learn.to_mixed()
    assert 'channels_last' not in capsys.readouterr().out and not hasattr(learn, 'channels_last')
    with pytest.raises(ValueError, match='an input of images'): learn.precision_report()

def test_pytorchs_loaders(monkeypatch, capsys):
    data = [(torch.rand(3,32,32), i%2) for i in range(24)]
    dls = DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=6) for _ in range(2)))
    learn = Learner(dls, tiny_learner().model, loss_func=CrossEntropyLossFlat())
    with_speeds(monkeypatch, dict.fromkeys(['fp32','fp32, channels_last','bf16','bf16, channels_last'], 1))
    learn.to_mixed()
    assert 'the timing failed' not in capsys.readouterr().out

@pytest.mark.parametrize('kw', [dict(scale=1), dict(enabled=False), dict(device='cpu')])
def test_wrong_arguments_raise_before_the_timing(kw, monkeypatch):
    monkeypatch.setattr(P, '_tried', lambda *a: pytest.fail('timed'))
    with pytest.raises(TypeError): tiny_learner().to_mixed(**kw)

# What is remembered -------------------------------------------------------------

def timings(monkeypatch, *speeds):
    "Each timing finds bf16 as fast as the next of `speeds` says; gives a list of the batches that were timed"
    timed, left = [], list(speeds)
    def tried(learn, half, channels_last, bs):
        timed.append(bs)
        return trials({HALF:left.pop(0)}, 3), 12
    monkeypatch.setattr(P, '_tried', tried)
    monkeypatch.setattr(P, 'half_dtype', lambda d: (BF16,'units'))
    return timed

def chosen(learn, **kwargs):
    with quiet(learn): learn.to_mixed(**kwargs)
    return learn.mixed_precision.dtype if hasattr(learn, 'mixed_precision') else None

def test_a_second_call_does_not_time(monkeypatch, capsys, tmp_path):
    timed = timings(monkeypatch, 2, .5)
    learn = tiny_learner()
    learn.path, was = tmp_path, set(vars(learn))
    assert chosen(learn)==BF16
    learn.from_mixed()
    assert set(vars(learn))==was # Nothing is kept on it
    learn.to_mixed()
    said = capsys.readouterr().out.splitlines()
    assert timed==[8] and said==['to_mixed: bf16: as before: units; 2.00 times as fast as fp32 (2.00 to 2.00, 3 turns of 12 images)']
    assert learn.mixed_precision.dtype==BF16 and chosen(tiny_learner())==BF16 and len(timed)==1 # Another Learner of the same kind
    assert chosen(learn, again=True) is None and len(timed)==2
    assert chosen(learn.from_mixed()) is None and len(timed)==2
    learn.export('l.pkl')

def test_fit_fast_times_once(monkeypatch):
    timed, learn = timings(monkeypatch, 2), tiny_learner()
    with quiet(learn):
        for _ in range(2): learn.fit_fast(1, pretrained=True, head=0)
    assert len(timed)==1

def deeper(learn): learn.model.insert(1, torch.nn.ReLU())
def depthwise(learn):
    c = learn.model[0][0]
    learn.model[0][0] = torch.nn.Sequential(torch.nn.Conv2d(c.in_channels, c.in_channels, 3, c.stride, 1, groups=c.in_channels), torch.nn.Conv2d(c.in_channels, c.out_channels, 1))
def more_classes(learn): learn.model[3] = torch.nn.Linear(learn.model[3].in_features, 7)
def strided(learn): learn.model[0][0].dilation = (2,2) # The same weights

@pytest.mark.parametrize('change', [deeper, depthwise, more_classes, strided])
def test_another_network_is_timed(change, monkeypatch):
    timed, learn = timings(monkeypatch, 2, 2), tiny_learner()
    chosen(learn)
    change(learn)
    chosen(learn)
    chosen(learn)
    assert len(timed)==2

def test_other_conditions_are_timed(monkeypatch):
    timed = timings(monkeypatch, *[2]*6)
    def n(learn=None, **kwargs):
        chosen(learn or tiny_learner(), **kwargs)
        return len(timed)
    assert n()==1 and n(tiny_learner(bs=4))==2 and n(channels_last=True)==3
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 7)
    assert n()==4
    monkeypatch.setattr(P, 'half_dtype', lambda d: (FP16,'units'))
    assert n()==5 and n()==5

def test_a_timing_that_failed_is_not_remembered(monkeypatch):
    timed, learn = timings(monkeypatch, 2), tiny_learner()
    tried = P._tried
    monkeypatch.setattr(P, '_tried', lambda *a: ([Trial(fp32, note='does not run here: boom')],0))
    assert chosen(learn) is None
    monkeypatch.setattr(P, '_tried', tried)
    assert chosen(learn)==BF16 and len(timed)==1

def test_a_run_keeps_what_was_chosen_first(monkeypatch, tmp_path):
    timed, file = timings(monkeypatch, 2, .5, .5), tmp_path/'run'/'.precision.json'
    with P.run_precision(file, writes=False): assert chosen(tiny_learner())==BF16
    assert not file.exists()
    with P.run_precision(file): assert chosen(tiny_learner())==BF16 # What the process knows is the run's from now on
    assert file.exists() and len(timed)==1
    P._chosen.clear() # Another process
    assert chosen(tiny_learner()) is None and len(timed)==2
    for writes in (False,True):
        with P.run_precision(file, writes): assert chosen(tiny_learner())==BF16
    P._chosen.clear()
    was = P._of_run
    seen = []
    def blind(): # It looks before another process has written
        seen.append(1)
        return {} if len(seen)<3 else was()
    monkeypatch.setattr(P, '_of_run', blind)
    with P.run_precision(file): assert chosen(tiny_learner())==BF16 and len(timed)==3
    assert chosen(tiny_learner())==BF16

@pytest.mark.parametrize('text', ['[1]', '{"a": 1}', '{"a": {"dtype": "int8", "channels_last": false, "why": ""}}', '{'])
def test_a_file_that_holds_no_precisions_is_named(text, tmp_path):
    (tmp_path/'p.json').write_text(text)
    with P.run_precision(tmp_path/'p.json'), pytest.raises(ValueError, match='p.json'): chosen(tiny_learner())
