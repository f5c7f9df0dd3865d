"Mixed precision: what the model computed with, what is left behind, what is chosen"
import copy
import pytest, torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from fastai.optimizer import SGD
import fastai_tricks.all as ft
from fastai_tricks import precision as P
from fastai_tricks.core import get_state
from fastai_tricks.test_utils import tiny_dls, tiny_learner

BF16, FP16 = torch.bfloat16, torch.float16

def quiet(learn):
    class _Quiet:
        def __enter__(self): self.a, self.b = learn.no_bar(), learn.no_logging(); self.a.__enter__(); self.b.__enter__()
        def __exit__(self, *e): self.b.__exit__(None, None, None); self.a.__exit__(None, None, None)
    return _Quiet()

def dtypes_seen(learn):
    "(training, dtype of the model's output) of every call"
    seen = []
    learn.model.register_forward_hook(lambda m,i,o: seen.append((m.training, o.dtype)))
    return seen

def autocast_is_off(learn): return not torch.is_autocast_enabled('cpu') and '_compiled_call_impl' not in vars(learn.model)

@pytest.mark.parametrize('dtype', [BF16,FP16])
@pytest.mark.parametrize('num_workers', [0,2])
def test_everything_runs_in_half_precision(dtype, num_workers, tmp_path):
    learn = tiny_learner(tiny_dls(num_workers=num_workers))
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
    fp32 = tiny_learner()
    assert len(batches)==6 and not all(torch.allclose(a, b) for a,b in zip(learn.model.parameters(), fp32.model.parameters()))

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

@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt, CancelBatchException, CancelFitException])
@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss','before_backward','before_step','after_step'])
def test_no_call_after_an_error_is_under_autocast(event, ex, tmp_path):
    learn = tiny_learner()
    learn.path = tmp_path
    class Boom(Callback):
        order, run_valid = 100, False
    def boom(self): raise ex('boom')
    setattr(Boom, event, boom)
    with quiet(learn):
        learn.to_mixed(BF16)
        if issubclass(ex, (RuntimeError, KeyboardInterrupt)):
            with pytest.raises(ex): learn.fit(1, cbs=Boom())
        else: learn.fit(1, cbs=Boom())
        assert not torch.is_autocast_enabled('cpu')
        assert copy.deepcopy(learn.model)(torch.rand(2,3,64,64)).dtype==torch.float32
        learn.export('l.pkl')
        load_learner(tmp_path/'l.pkl')
        assert learn.model(torch.rand(2,3,64,64)).dtype==torch.float32
        assert autocast_is_off(learn)

def test_a_compiled_model_stays_compiled():
    learn = tiny_learner()
    calls = []
    learn.model.compile(backend=lambda gm,_: (lambda *a: calls.append(torch.is_autocast_enabled('cpu')) or gm.forward(*a)))
    impl = learn.model._compiled_call_impl
    seen = dtypes_seen(learn)
    with quiet(learn): learn.to_mixed(BF16).fit(1)
    assert learn.model._compiled_call_impl is impl and calls and {d for _,d in seen}=={BF16}

@pytest.mark.parametrize('cb', [MixUp, CutMix, lambda: GradientAccumulation(16), lambda: ft.ProgressiveResize(mult=8), ChannelsLast])
def test_with_other_callbacks(cb):
    learn = tiny_learner(cbs=cb())
    seen = dtypes_seen(learn)
    with quiet(learn): learn.to_mixed(BF16).fit(2)
    assert len(seen)==8 and {d for _,d in seen}=={BF16}

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
    learn.model.register_forward_pre_hook(lambda m,i: seen.append((i[0].is_contiguous(memory_format=torch.channels_last), m[0][0].weight.is_contiguous(memory_format=torch.channels_last))))
    with quiet(learn): learn.to_mixed(BF16, channels_last=True).fit(1, cbs=ft.ProgressiveResize(start=32, mult=8))
    assert set(seen)=={(True,True)}

def test_an_exported_learner_predicts_without_such_a_device(tmp_path, monkeypatch):
    learn = tiny_learner()
    learn.path = tmp_path
    monkeypatch.setattr(P, 'half_dtype', lambda d: (BF16,'units'))
    monkeypatch.setattr(P, '_choose', lambda learn, dtype, bs, **kw: (P._Variant(dtype),[2.],bs))
    seen = dtypes_seen(learn)
    with quiet(learn):
        learn.to_mixed().fit(1)
        assert seen[-1][1]==BF16
        learn.export('l.pkl')
        expected = learn.from_mixed().predict(3)[2]
    monkeypatch.setattr(P, 'half_dtype', lambda d: (None,'none'))
    loaded = load_learner(tmp_path/'l.pkl')
    with loaded.no_bar(): assert torch.equal(loaded.predict(3)[2], expected)

@pytest.mark.parametrize('bf16,expected', [(True,BF16),(False,FP16)])
def test_the_rule_on_gpus(bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: bf16 or including_emulation)
    assert P.half_dtype('cuda')[0]==expected

@pytest.mark.parametrize('amx,avx,expected', [(True,False,BF16),(False,True,BF16),(False,False,None)])
def test_the_rule_on_cpus(amx, avx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx, raising=False)
    assert P.half_dtype('cpu')[0]==expected
    assert P.half_dtype('xla')[0]==BF16 and P.half_dtype('mps')[0] is None

def with_speeds(monkeypatch, speeds):
    "Steps that take as long as `speeds` says: for each variant its speed as a multiple of fp32's"
    clock, stepper = [0.], P._stepper
    monkeypatch.setattr(P.time, 'perf_counter', lambda: clock[0])
    def slow(learn, xb, yb, v):
        step = stepper(learn, xb, yb, v)
        def timed():
            clock[0] += 1/speeds[str(v)]
            return step()
        return timed
    monkeypatch.setattr(P, '_stepper', slow)

@pytest.mark.parametrize('speeds,dtype,last,said', [
    ({'fp32':1, 'fp32, channels_last':1.01, 'bf16':1.5, 'bf16, channels_last':2}, BF16, True, 'bf16 with channels_last: this CPU has units; 2.00 times as fast as fp32'),
    ({'fp32':1, 'fp32, channels_last':1.01, 'bf16':1.5, 'bf16, channels_last':1.2}, BF16, False, 'bf16: this CPU has units; 1.50 times'),
    ({'fp32':1, 'fp32, channels_last':1.2, 'bf16':.9, 'bf16, channels_last':1.1}, None, True, 'stays in fp32 with channels_last: this CPU has units; bf16 was not faster; 1.20 times'),
    ({'fp32':1, 'fp32, channels_last':.9, 'bf16':.9, 'bf16, channels_last':1.04}, None, False, 'stays in fp32: this CPU has units; bf16 was not faster'),
    ({'fp32':1, 'fp32, channels_last':.9, 'bf16':.04, 'bf16, channels_last':.04}, None, False, 'stays in fp32: this CPU has units; bf16 was not faster')])
def test_it_chooses_what_was_faster(speeds, dtype, last, said, monkeypatch, capsys):
    monkeypatch.setattr(P, 'half_dtype', lambda d: (BF16,'this CPU has units'))
    with_speeds(monkeypatch, speeds)
    learn = tiny_learner()
    learn.to_mixed()
    assert hasattr(learn, 'device_mixed_precision')==(dtype is not None) and hasattr(learn, 'channels_last_batch')==last
    assert said in capsys.readouterr().out
    seen = dtypes_seen(learn)
    with quiet(learn): learn.fit(1)
    assert {d for _,d in seen}=={dtype or torch.float32}

def test_without_units_nothing_is_tried_but_channels_last(monkeypatch, capsys):
    monkeypatch.setattr(P, 'half_dtype', lambda d: (None,'this CPU has no bf16 units'))
    with_speeds(monkeypatch, {'fp32':1, 'fp32, channels_last':1})
    learn = tiny_learner().to_mixed()
    assert not hasattr(learn, 'device_mixed_precision') and not hasattr(learn, 'channels_last_batch')
    assert 'to_mixed: stays in fp32: this CPU has no bf16 units; channels_last gains nothing' in capsys.readouterr().out

def untouched(learn):
    torch.manual_seed(1)
    state = get_state(learn)
    yield
    now = get_state(learn)
    def same(a, b):
        if isinstance(a, torch.Tensor): return torch.equal(a, b)
        if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(same, a, b))
        return a==b
    assert same(state, now)

@pytest.mark.parametrize('look', [lambda l: ft.precision_report(l, sizes=[32,(48,64)], compile=False, turns=2, plot=False), lambda l: l.to_mixed().from_mixed()])
def test_measuring_leaves_the_learner_as_it_was(look):
    learn = tiny_learner()
    with quiet(learn):
        learn.fit(1)
        learn.model.eval()
        check = untouched(learn)
        next(check)
        model,opt,cbs = learn.model,learn.opt,list(learn.cbs)
        look(learn)
        next(check, None)
        assert learn.model is model and learn.opt is opt and list(learn.cbs)==cbs and not model.training
        assert model[0][0].weight.is_contiguous()

def test_report(monkeypatch):
    learn = tiny_learner()
    with_speeds(monkeypatch, {'fp32':1, 'fp32, channels_last':1.25, 'bf16':.1, 'bf16, channels_last':.1, 'fp16':2, 'fp16, channels_last':1})
    shapes = []
    stepper = P._stepper
    def noted(learn, xb, yb, v):
        shapes.append((str(v), *xb[0].shape, xb[0].dtype))
        return stepper(learn, xb, yb, v)
    monkeypatch.setattr(P, '_stepper', noted)
    with quiet(learn): df = ft.precision_report(learn, sizes=[32], bs=6, compile=False, turns=3)
    r = df.set_index('variant')
    assert {s[1:5] for s in shapes}=={(6,3,32,32),(2,3,32,32)} # The two images show what is too slow
    assert r.loc['fp16','ratio']==pytest.approx(2) and r.loc['fp32','images_s']==pytest.approx(6) and r.loc['fp16','n']==3
    assert r.loc['bf16','note'].startswith('too slow') and r.loc['bf16','ratio']==pytest.approx(.1) and r.loc['bf16','n']==0
    assert r.loc['fp32','loss_diff']==0<r.loc['fp16','loss_diff']<.1
    assert all(r['peak_mb'][r['n']>0]>0)
    assert r.loc['bf16, channels_last','note']=='not tried: see bf16'
    assert df.attrs['advice'].startswith('Train in fp16, 2.00 times as fast as fp32 (2.00 to 2.00): `learn.to_mixed(torch.float16, channels_last=False)`; bf16 is 10 times slower here')

def test_report_names_what_does_not_run(monkeypatch):
    learn = tiny_learner()
    stepper = P._stepper
    def broken(learn, xb, yb, v):
        if v.dtype==FP16: raise RuntimeError('"conv" not implemented for Half')
        return stepper(learn, xb, yb, v)
    monkeypatch.setattr(P, '_stepper', broken)
    with quiet(learn): df = ft.precision_report(learn, channels_last=False, turns=1, compile=True, dtypes=(FP16,), plot=False)
    notes = df.set_index('variant')['note']
    assert 'not implemented for Half' in notes['fp16'] and notes['fp16, compile'].startswith('not tried')
    r = df.set_index('variant').loc['fp32, compile']
    assert r['n']==1 and r['compile_s']>0 and r['loss_diff']<1e-3

@pytest.mark.parametrize('kw', [dict(dtypes=(torch.float64,)), dict(turns=0), dict(bs=0), dict(sizes=32), dict(sizes=[])])
def test_report_bad_arguments(kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be'): ft.precision_report(tiny_learner(), **kw)

def test_find_bs_and_clipping():
    learn = tiny_learner(cbs=GradientClip(.1))
    class Fits(Callback):
        def after_pred(self):
            if len(self.xb[0])>11: raise torch.OutOfMemoryError('out of memory')
    with quiet(learn):
        learn.to_mixed(BF16)
        learn.add_cb(Fits())
        assert ft.find_bs(learn, step=1)==11
        assert autocast_is_off(learn)
