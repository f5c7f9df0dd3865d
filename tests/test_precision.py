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
from fastai.data.all import DataBlock, DataLoaders, RandomSplitter, TfmdDL, get_image_files
from fastai.vision.all import ImageBlock, MaskBlock, Resize, np, resnet18, unet_learner
from fastai.optimizer import SGD
import fastai_tricks.all as ft
from fastai_tricks import precision as P, precision_report as R
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

def test_fastai_knows_it_by_name():
    learn = tiny_learner().to_mixed(BF16, channels_last=True)
    learn.to_channelslast()
    assert len(learn.cbs.filter(lambda o: isinstance(o, (MixedPrecision,ChannelsLast))))==2

def test_a_gpu_without_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *a, **kw: False)
    assert not P._works(torch.device('cuda'), BF16) and P._works(torch.device('cuda'), FP16) and P._works(torch.device('cpu'), BF16)
    monkeypatch.setattr(P, '_device', lambda learn: torch.device('cuda'))
    with pytest.raises(ValueError, match='this GPU has no bf16'): tiny_learner().to_mixed(BF16)

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
    ({'fp32':1, 'fp32, channels_last':.9, 'bf16':.04, 'bf16, channels_last':.04}, None, False, 'stays in fp32: this CPU has units; bf16 was not faster (too slow: timed on 2 images only); channels_last gains nothing')])
def test_it_chooses_what_was_faster(speeds, dtype, last, said, monkeypatch, capsys):
    monkeypatch.setattr(P, 'half_dtype', lambda d: (BF16,'this CPU has units'))
    with_speeds(monkeypatch, speeds)
    learn = tiny_learner()
    learn.to_mixed()
    assert hasattr(learn, 'mixed_precision')==(dtype is not None) and hasattr(learn, 'channels_last')==last
    assert said in capsys.readouterr().out
    seen = dtypes_seen(learn)
    with quiet(learn): learn.fit(1)
    assert {d for _,d in seen}=={dtype or torch.float32}

@pytest.mark.parametrize('speeds,channels_last,dtype,said', [
    ({'fp32':1, 'bf16':.5}, False, None, 'stays in fp32: this CPU has units; bf16 was not faster'),
    ({'fp32':1, 'fp32, channels_last':1.1, 'bf16':1.5, 'bf16, channels_last':.3}, True, None, 'stays in fp32 with channels_last: this CPU has units; bf16 was not faster; 1.10 times'),
    ({'fp32':1, 'fp32, channels_last':.8, 'bf16':.5, 'bf16, channels_last':1.5}, True, BF16, 'bf16 with channels_last: this CPU has units; 1.50 times')])
def test_a_layout_that_is_given_is_the_one_measured(speeds, channels_last, dtype, said, monkeypatch, capsys):
    monkeypatch.setattr(P, 'half_dtype', lambda d: (BF16,'this CPU has units'))
    with_speeds(monkeypatch, speeds)
    learn = tiny_learner().to_mixed(channels_last=channels_last)
    assert hasattr(learn, 'mixed_precision')==(dtype is not None) and hasattr(learn, 'channels_last')==channels_last
    assert said in capsys.readouterr().out

def test_the_cost_of_a_first_step_does_not_count(monkeypatch, capsys):
    monkeypatch.setattr(P, 'half_dtype', lambda d: (BF16,'units'))
    clock, stepper, first = [0.], P._stepper, []
    monkeypatch.setattr(P.time, 'perf_counter', lambda: clock[0])
    def slow(learn, xb, yb, v):
        step = stepper(learn, xb, yb, v)
        def timed():
            if v.dtype==BF16 and not first: first.append(clock.__setitem__(0, clock[0]+3))
            clock[0] += .005 if v.dtype==BF16 else .01
            return step()
        return timed
    monkeypatch.setattr(P, '_stepper', slow)
    tiny_learner().to_mixed()
    assert 'to_mixed: bf16: units; 2.00 times' in capsys.readouterr().out

def test_what_fails_in_the_timing_is_said(capsys):
    learn = tiny_learner()
    def loss(p, y): raise KeyError('boom')
    learn.loss_func = loss
    learn.to_mixed()
    assert 'stays in fp32' in (out := capsys.readouterr().out) and 'the timing failed' in out and 'boom' in out

def test_too_large_a_batch_is_halved(monkeypatch):
    stepper, sizes = P._stepper, []
    def small(learn, xb, yb, v):
        sizes.append(len(xb[0]))
        if len(xb[0])>10: raise torch.OutOfMemoryError('out of memory')
        return stepper(learn, xb, yb, v)
    monkeypatch.setattr(P, '_stepper', small)
    v,_ = P._choose(tiny_learner(bs=16), None, None, 24)
    assert 24 in sizes and 12 in sizes and sizes[-1]<=10

def test_an_interrupt_keeps_the_former_precision(monkeypatch):
    learn = tiny_learner().to_mixed(BF16)
    def interrupt(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(P, '_choose', interrupt)
    with pytest.raises(KeyboardInterrupt): learn.to_mixed()
    assert learn.mixed_precision.dtype==BF16

def test_the_learners_own_loss_is_not_called(capsys):
    learn, calls = tiny_learner(), []
    class Loss(torch.nn.CrossEntropyLoss):
        def forward(self, *a):
            calls.append(self)
            return super().forward(*a)
    learn.loss_func = Loss()
    learn.to_mixed()
    assert calls and learn.loss_func not in calls

def test_without_images_channels_last_is_not_tried(capsys):
    x = torch.rand(40, 8)
    ds = [[(x[i], (x[i].sum()>4).long()) for i in o] for o in (range(32), range(32,40))]
    learn = Learner(DataLoaders(*(TfmdDL(d, bs=8) for d in ds)), torch.nn.Linear(8, 2), loss_func=CrossEntropyLossFlat())
    learn.to_mixed()
    assert 'channels_last' not in capsys.readouterr().out and not hasattr(learn, 'channels_last')
    with pytest.raises(ValueError, match='an input of images'): ft.precision_report(learn)

def test_a_u_net_after_lr_find(tmp_path):
    files = get_image_files(ft.sample_images())[:16]
    block = DataBlock((ImageBlock, MaskBlock(codes=['a','b'])), get_y=lambda f: np.zeros((48,48), dtype=np.uint8), splitter=RandomSplitter(seed=1), item_tfms=Resize(32))
    learn = unet_learner(block.dataloaders(files, bs=4, num_workers=0, device='cpu'), resnet18, pretrained=False, n_out=2)
    learn.path = tmp_path
    with quiet(learn):
        learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
        df = ft.precision_report(learn, compile=False, turns=1, dtypes=(), plot=False)
    assert list(df['n'])==[1,1]

def test_pytorchs_loaders(capsys):
    data = [(torch.rand(3,32,32), i%2) for i in range(24)]
    dls = DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=6) for _ in range(2)))
    learn = Learner(dls, tiny_learner().model, loss_func=CrossEntropyLossFlat())
    learn.to_mixed()
    assert 'the timing failed' not in capsys.readouterr().out

def test_without_units_nothing_is_tried_but_channels_last(monkeypatch, capsys):
    monkeypatch.setattr(P, 'half_dtype', lambda d: (None,'this CPU has no bf16 units'))
    with_speeds(monkeypatch, {'fp32':1, 'fp32, channels_last':1})
    learn = tiny_learner().to_mixed()
    assert not hasattr(learn, 'mixed_precision') and not hasattr(learn, 'channels_last')
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
    monkeypatch.setattr(R, 'half_dtype', lambda d: (BF16,''))
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
    assert df.attrs['advice'].startswith('Train in fp16, 2.00 times as fast as fp32 (2.00 to 2.00): `learn.to_mixed(torch.float16, channels_last=False)`; bf16 takes 10 times as long')

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

@pytest.mark.parametrize('kw', [dict(dtypes=(torch.float64,)), dict(turns=0), dict(bs=0), dict(sizes=-1), dict(sizes=[]), dict(sizes=['a']), dict(sizes=[0]), dict(dtypes=torch.float64)])
def test_report_bad_arguments(kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be'): ft.precision_report(tiny_learner(), **kw)

@pytest.mark.parametrize('kw', [dict(scale=1), dict(enabled=False), dict(device='cpu')])
def test_wrong_arguments_raise_before_the_timing(kw, monkeypatch):
    monkeypatch.setattr(P, '_choose', lambda *a: pytest.fail('timed'))
    with pytest.raises(TypeError): tiny_learner().to_mixed(**kw)

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
