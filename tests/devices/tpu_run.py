"A Learner on a device of torch_tpu's kind. `test_tpu.py` runs these in a process of its own, with the file of the device in STANDIN_TPU"
import os, subprocess, sys
from functools import partial
import pytest, torch
from torch import nn
import standin_tpu
KEPT = standin_tpu.register(os.environ['STANDIN_TPU'])
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.all import DataLoaders, Normalize
from fastai.metrics import F1Score, accuracy
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper, ranger
from fastai.vision.all import aug_transforms, imagenet_stats
import fastai_tricks.all as ft
from fastai_tricks.core.test_utils import tiny_learner
from fastai_tricks.devices.xla_parts import LazyLoss
from test_xla import close, fit, fits, left, make, quiet, real, same_weights, weights

def on_tpu(learn): return {p.device.type for p in learn.model.parameters()}=={'tpu'}

def test_a_resize_that_it_has_no_kernel_for_fails():
    "So the test of `ProgressiveResize` below shows something"
    x = torch.rand(1, 3, 8, 8).to('tpu')
    with pytest.raises(NotImplementedError): nn.functional.interpolate(x, (4,4), mode='bilinear', antialias=True)
    assert nn.functional.interpolate(x, (4,4), mode='bilinear').device.type=='tpu'

def test_moving_the_loaders_is_not_enough():
    learn = make()
    w = weights(learn)
    learn.dls.to('tpu')
    fit(learn, 2, 1e-1)
    assert on_tpu(learn) and same_weights(w, weights(learn), 0)
    assert not any(p is q for p,(q,*_) in zip(learn.model.parameters(), learn.opt.all_params()))

def test_same_as_on_the_cpu():
    cpu,learn = real(),real()
    expected = fit(cpu, 2, 1e-3, fit='fit_one_cycle')
    learn.to_tpu(bf16=False)
    assert close(fit(learn, 2, 1e-3, fit='fit_one_cycle'), expected, 1e-4)
    assert close(learn.recorder.losses, cpu.recorder.losses, 1e-4) and on_tpu(learn)
    with quiet(cpu), quiet(learn): (p,t),(q,u) = cpu.get_preds(),learn.get_preds()
    assert torch.equal(t, u) and close(p, q, 1e-3)

@pytest.mark.parametrize('bf16', [True, False])
def test_what_the_model_receives(bf16, capsys):
    learn = make(bs=12, batch_tfms=aug_transforms())
    assert learn.to_tpu(bf16=bf16) is learn.to_tpu()
    line, = [l for l in capsys.readouterr().out.splitlines() if l.startswith('to_')]
    assert line.startswith(f"to_tpu: torch_tpu, one device, batches of 12, {'bf16' if bf16 else 'fp32'}; batch transforms on the CPU: ")
    seen,losses = [],[]
    learn.model[0].register_forward_hook(lambda m,i,o: seen.append((m.training, type(i[0]), i[0].device.type, tuple(i[0].shape), o.dtype)))
    look = Callback(after_loss=lambda self: losses.append((self.training, self.loss.device.type, self.loss.dtype)))
    fit(learn, 2, cbs=look)
    half = torch.bfloat16 if bf16 else torch.float32
    # Eleven images validate, and are filled up
    assert seen==[(t, torch.Tensor, 'tpu', (12,3,32,32), half) for t in (True,True,False)*2]
    assert losses==[(t, 'tpu' if t else 'cpu', torch.float32) for t in (True,True,False)*2]
    assert {p.dtype for p in learn.model.parameters()}=={torch.float32}
    assert all(p is q for p,(q,*_) in zip(learn.model.parameters(), learn.opt.all_params()))
    with pytest.raises(RuntimeError, match='to_xla'): learn.xla_report()

def test_to_mixed_on_the_device_is_bf16(capsys):
    "As on the XLA device; it does not take `to_tpu`'s bf16 away"
    learn = make()
    learn.to_tpu()
    learn.to_mixed()
    assert 'to_mixed: bf16: TPU devices have bf16 units' in capsys.readouterr().out
    seen = []
    learn.model[0].register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    fit(learn, 1)
    assert {*seen}=={torch.bfloat16}
    with pytest.raises(ValueError, match='`compile` must be False on tpu'): learn.to_mixed(compile=True)

def test_losses_stay_on_the_device_until_they_are_fetched():
    learn = make(n=75)
    learn.to_tpu(bf16=False, every=3)
    where = []
    class Look(Callback):
        order = 100 # After the recorder
        def after_batch(self):
            if self.training: where.append([l.device.type for _,l in self.recorder.smooth_loss.waiting])
    fit(learn, 1, cbs=Look())
    # The first at once, for the progress bar
    assert where==[[],['tpu'],['tpu']*2,[]]

@pytest.mark.parametrize('last,steps', [('drop',1),('pad',2)])
def test_last_training_batch(last, steps):
    learn = make(bs=16)
    learn.dls.train.drop_last = False
    learn.to_tpu(last=last, bf16=False)
    ys = []
    fit(learn, 1, cbs=Callback(after_loss=lambda self: ys.append(self.yb[0].cpu()) if self.training else None))
    assert [len(y) for y in ys]==[16]*steps
    if last=='pad': assert torch.equal(ys[1][13:], ys[1][:3])
    learn.from_tpu()
    assert not learn.dls.train.drop_last

def test_validation_and_prediction_see_each_item_once(tmp_path):
    learn = make(size=36, metrics=[accuracy, F1Score(average='macro')])
    learn.loss_func = CrossEntropyLossFlat(weight=torch.tensor([1.,3.]))
    learn.path = tmp_path
    fit(learn, 1)
    test = learn.dls.test_dl([3,4,5])
    def all_of():
        with quiet(learn):
            inp,preds,targs,losses = learn.get_preds(with_input=True, with_loss=True)
            return dict(validate=learn.validate(), inp=inp, preds=preds, targs=targs, losses=losses, test=learn.get_preds(dl=test)[0],
                        tta=learn.tta(n=1)[0], predict=learn.predict(5)[2])
    expected = all_of()
    with learn.tpu_ctx(bf16=False):
        assert on_tpu(learn)
        got = all_of()
    for k,v in expected.items():
        assert torch.as_tensor(v).shape==torch.as_tensor(got[k]).shape and close(got[k], v, 1e-4), k

@pytest.mark.parametrize('opt_func', [None, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_the_optimisers_state_goes_along_both_ways(opt_func):
    learns = cpu,there,back,lost = [make(opt_func=opt_func) for _ in range(4)]
    for l in learns: fit(l, 3, 1e-2)
    there.to_tpu(bf16=False); back.to_tpu(bf16=False)
    lost.opt.clear_state()
    for l in learns: fit(l, 1, 1e-2, seed=1)
    back.from_tpu()
    assert {p.device.type for p in back.model.parameters()}=={'cpu'}
    for l in learns: fit(l, 1, 1e-2, seed=2)
    assert same_weights(weights(cpu), weights(there)) and same_weights(weights(cpu), weights(back))
    assert not same_weights(weights(cpu), weights(lost), 3e-4)

@pytest.mark.parametrize('ex', [None, CancelFitException, RuntimeError, KeyboardInterrupt])
def test_the_context_leaves_the_learner_as_found(ex):
    class Boom(Callback):
        run_valid = False
        def before_backward(self):
            if ex: raise ex('boom')
    learn = make(bs=12, batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn.to_mixed(torch.bfloat16)
    fit(learn, 1)
    was,smooth = left(learn),learn.recorder.smooth_loss
    try:
        with learn.tpu_ctx():
            assert left(learn)!=was and isinstance(learn.recorder.smooth_loss, LazyLoss)
            with learn.tpu_ctx(): pass # The outer one ends it
            assert on_tpu(learn)
            with quiet(learn): learn.fit(1, cbs=Boom())
    except (RuntimeError,KeyboardInterrupt) as e: assert isinstance(e, ex) and 'boom' in str(e)
    assert left(learn)==was and learn.recorder.smooth_loss is smooth
    assert {p.device.type for p in learn.model.parameters()}=={'cpu'} and learn.from_tpu() is learn

@pytest.mark.parametrize('cb', [MixUp, lambda: GradientAccumulation(32), lambda: GradientClip(.1), ft.EMA, lambda: ft.Distill(tiny_learner().model), lambda: ft.WatchCAM(n=2),
                                lambda: ft.ProgressiveResize(sizes=[16], mult=4)])
def test_with_other_callbacks(cb):
    learn = make(n=75)
    learn.to_tpu()
    w = weights(learn)
    fit(learn, 2, 1e-2, cbs=cb())
    assert on_tpu(learn) and not same_weights(w, weights(learn)) and len(learn.recorder.values)==2

def test_fits_of_fastai_and_of_ours(tmp_path):
    learn = make(size=48).to_tpu(bf16=False)
    done = fits(learn, tmp_path)
    with quiet(learn): learn.fit_fast(1, pretrained=True)
    assert not same_weights(done, weights(learn), 0) and on_tpu(learn)
    with pytest.raises(ValueError, match='on a TPU'): learn.fit_fast(minutes=1)

def test_workers():
    learn = make()
    learn.dls = DataLoaders(*[dl.new(num_workers=2) for dl in learn.dls.loaders], device='cpu')
    learn.to_tpu(bf16=False)
    assert close(fit(learn, 1)[1:2], fit(make(), 1)[1:2], 1e-4)

def test_save_and_load_across_devices(tmp_path):
    a,b = make(),make()
    a.path = b.path = tmp_path
    fit(a, 1); fit(b, 1)
    with a.tpu_ctx():
        fit(a, 1, seed=1)
        a.save('there')
    b.load('there')
    assert same_weights(weights(a), weights(b), 0) and {p.device.type for p in b.model.parameters()}=={'cpu'}
    b.save('here')
    with a.tpu_ctx():
        fit(a, 1)
        a.load('here')
        assert on_tpu(a) and same_weights(weights(a), weights(b), 0)
        fit(a, 1)
        assert not same_weights(weights(a), weights(b), 1e-4)

LOAD = '''
import sys, torch
sys.path.insert(0, 'devices')
import fastai_tricks.all
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
with learn.no_bar(): print(learn.predict(5)[2].tolist(), next(learn.model.parameters()).device, [cb.name for cb in learn.cbs if 'xla' in cb.name])
'''
def test_export_comes_back_where_there_is_no_tpu(tmp_path):
    learn = make()
    learn.path = tmp_path
    learn.to_tpu(bf16=False)
    fit(learn, 1)
    with quiet(learn): p = learn.predict(5)[2].tolist()
    learn.export()
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', LOAD, str(tmp_path/'export.pkl')], capture_output=True, text=True, cwd=here)
    assert r.returncode==0, r.stderr
    got,rest = r.stdout.splitlines()[-1].split(']', 1)
    assert close([float(o) for o in got[1:].split(',')], p, 1e-4) and rest.split()==['cpu','[]']
    fit(learn, 1)
    assert on_tpu(learn)

def test_several_processes_are_refused(monkeypatch):
    learn = make()
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='`cpu` must be True on a machine with torch_tpu'):
        with learn.accelerate_ctx(): pass
