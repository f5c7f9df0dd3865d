"What `EMA` averages, when, and where the averaged and the own weights are"
import pytest, timm, torch
from fastai.callback.core import Callback, CancelFitException, CancelEpochException, CancelTrainException, CancelValidException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.all import vision_learner
import fastai_tricks.all as ft
from fastai_tricks.train.precision import DeviceMixedPrecision
from fastai_tricks.train.ema import EMA, all_tensors, copy_tensors, decay_at, load_tensors, update_average
from fastai_tricks.resize.stages import Stage
from fastai_tricks.core.test_utils import tiny_dls, tiny_learner

def own(learn): return copy_tensors(all_tensors(learn.model))
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def close(a, b): return a.keys()==b.keys() and all(torch.allclose(a[k].float(), b[k].float(), atol=1e-6) for k in a)

class Watch(Callback):
    "The model's tensors at the start, after each step that was taken, in each validation, at the end of each epoch"
    order,n = 100,0
    def before_fit(self):
        if not self.learn.lock.locked(): self.ws,self.valid,self.epochs,self.w0 = [],[],[],own(self.learn)
    def before_step(self): self.was = own(self.learn)
    def after_step(self): self.ws.append(own(self.learn))
    def after_batch(self):
        if not self.training: self.valid.append(own(self.learn))
    def after_epoch(self): self.epochs.append(own(self.learn))

def by_hand(w0, ws, decay=.999):
    avg = {k:t.double() for k,t in w0.items()}
    for i,w in enumerate(ws): avg = {k:decay_at(i, decay)*avg[k] + (1-decay_at(i, decay))*t.double() if t.is_floating_point() else t for k,t in w.items()}
    return avg

def fit(learn, n=2, cbs=(), lr=1e-2, how='fit', **kwargs):
    watch = Watch()
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n, lr, cbs=[watch, *cbs], **kwargs)
    return watch

# What the model has, and when ---------------------------------------------------

def test_validation_and_end_have_the_average_training_the_own():
    set_seed(1); plain = fit(tiny_learner())
    set_seed(1); learn = tiny_learner(); w = fit(learn, cbs=[EMA()])
    n = len(learn.dls.train)
    assert all(map(same, w.ws, plain.ws)) and len(w.ws)==2*n
    assert close(w.valid[0], by_hand(w.w0, w.ws[:n])) and close(w.valid[-1], by_hand(w.w0, w.ws))
    assert same(w.epochs[0], w.valid[0]) and same(own(learn), w.valid[-1]) and not same(own(learn), w.ws[-1])

def test_validation_with_the_own_weights():
    learn = tiny_learner()
    w = fit(learn, cbs=[EMA(validate=False)])
    assert same(w.valid[-1], w.ws[-1]) and same(w.epochs[-1], w.ws[-1]) and close(own(learn), by_hand(w.w0, w.ws))

def test_batch_norm():
    learn = tiny_learner()
    w = fit(learn, cbs=[EMA()])
    bn = learn.model[0][1]
    assert torch.allclose(bn.running_mean.double(), by_hand(w.w0, w.ws)['0.1.running_mean'], atol=1e-7)
    assert not torch.equal(bn.running_mean, w.ws[-1]['0.1.running_mean']) and bn.num_batches_tracked==2*len(learn.dls.train)

def test_each_fit_has_its_own_average():
    learn,ema = tiny_learner(),EMA()
    learn.add_cb(ema)
    fit(learn)
    first = own(learn)
    w = fit(learn)
    assert same(w.w0, first) and close(own(learn), by_hand(w.w0, w.ws))
    assert ema.averages is None and ema.raw is None

def test_fine_tune_goes_on_from_the_average():
    learn,ws = tiny_learner(),[]
    class Fits(Watch):
        def after_fit(self): ws.append((self.w0, self.ws, own(self.learn)))
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, 1e-2, cbs=[EMA(), Fits()])
    assert len(ws)==2 and same(ws[1][0], ws[0][2])
    for w0,steps,end in ws: assert close(end, by_hand(w0, steps))
    frozen = {'0.0.weight'}
    assert all(torch.equal(ws[0][2][k], ws[0][0][k]) for k in frozen)

# Steps that are none ------------------------------------------------------------

def test_lr_find_averages_nothing(tmp_path):
    learn,ema = tiny_learner(),EMA()
    learn.add_cb(ema)
    learn.path = tmp_path
    was,updates = own(learn),[]
    class Updates(Callback):
        order = 100
        def after_step(self): updates.append(ema.n_averaged)
    with learn.no_bar(), learn.no_logging(): learn.add_cb(Updates()).lr_find(num_it=8, show_plot=False, suggest_funcs=None)
    assert set(updates)=={0} and ema.averages is None and same(own(learn), was)

def test_only_at_steps_of_the_optimiser():
    learn,ns = tiny_learner(),[]
    class Count(Callback):
        order,run_valid = 100,False
        def after_train(self): ns.append(self.learn.ema.n_averaged)
    w = fit(learn, cbs=[EMA(), GradientAccumulation(16), Count()])
    assert len(w.ws)==ns[-1]<2*len(learn.dls.train)
    assert close(own(learn), by_hand(w.w0, w.ws))

class Overflow(Callback):
    "Infinite gradients in one batch"
    order,run_valid = MixedPrecision.order-1,False
    def before_step(self):
        if self.iter==1:
            for p in self.model.parameters():
                if p.grad is not None: p.grad.fill_(torch.inf)

def test_step_left_out_by_the_scaler():
    learn,counts = tiny_learner(),[]
    class Count(Callback):
        order,run_valid = 100,False
        def after_batch(self): counts.append(self.learn.ema.n_averaged)
    w = fit(learn, 1, [EMA(), DeviceMixedPrecision(torch.float16), Overflow(), Count()])
    assert counts==[1,1,2] and len(w.ws)==3 and all(torch.equal(w.ws[0][k], w.ws[1][k]) for k in ('0.0.weight','3.weight'))
    assert all(t.isfinite().all() for t in own(learn).values())
    assert torch.allclose(by_hand(w.w0, [w.ws[0],w.ws[2]])['3.weight'].float(), learn.model[3].weight, atol=1e-6)

def test_weights_of_16_bits_are_averaged_in_32():
    t = dict(w=torch.ones(3, dtype=torch.bfloat16), i=torch.ones(2, dtype=torch.long))
    avg = copy_tensors(t, torch.float32)
    assert avg['w'].dtype==torch.float32 and avg['i'].dtype==torch.long
    t['w'] += 1
    for _ in range(100): update_average(avg, t, .9999)
    assert torch.allclose(avg['w'], torch.tensor(2-.9999**100), atol=1e-5)

def test_tied_weights():
    m = torch.nn.Sequential(torch.nn.Linear(2,2), torch.nn.Linear(2,2))
    m[1].weight = m[0].weight
    raw = copy_tensors(all_tensors(m))
    assert len(raw)==3
    load_tensors(m, {k:t+1 for k,t in raw.items()})
    load_tensors(m, raw)
    assert m[1].weight is m[0].weight and same(copy_tensors(all_tensors(m)), raw)

# Whatever ends it ---------------------------------------------------------------

class Stop(Callback):
    order = 100
    def __init__(self, ex, ev, epoch=1): self.ex,self.ev,self.at = ex,ev,epoch
    def _stop(self, ev):
        if ev==self.ev and self.epoch==self.at and self.iter==1: raise self.ex('boom')
    def before_backward(self): self._stop('train')
    def after_pred(self):
        if not self.training: self._stop('valid')

@pytest.mark.parametrize('bar', [False,True])
@pytest.mark.parametrize('ev', ['train','valid'])
@pytest.mark.parametrize('ex', [RuntimeError,KeyboardInterrupt])
def test_after_an_error_the_own_weights(ex, ev, bar):
    learn,watch,ema = tiny_learner(tiny_dls(bs=4)),Watch(),EMA()
    learn.logger = lambda *a: None
    try:
        if bar: learn.fit(3, 1e-2, cbs=[watch, ema, Stop(ex, ev)])
        else:
            with learn.no_bar(): learn.fit(3, 1e-2, cbs=[watch, ema, Stop(ex, ev)])
    except (RuntimeError,KeyboardInterrupt) as e: # Held here, with its frames
        assert 'boom' in str(e)
        if ev=='valid': assert same(own(learn), watch.ws[-1])
        else: assert torch.equal(learn.model[3].weight, watch.ws[-1]['3.weight'])
        assert close(ema.averages, by_hand(watch.w0, watch.ws))
    else: assert False
    # What is left of it does not come back
    zero = {k:torch.zeros_like(t) for k,t in own(learn).items()}
    load_tensors(learn.model, zero)
    learn.add_cb(ema)
    with learn.no_bar(): learn.validate()
    assert same(own(learn), zero)
    w = fit(learn, 1)
    assert same(w.w0, zero) and close(own(learn), by_hand(w.w0, w.ws))

@pytest.mark.parametrize('ex,ev', [(CancelFitException,'train'), (CancelEpochException,'train'), (CancelTrainException,'train'),
                                   (CancelFitException,'valid'), (CancelEpochException,'valid'), (CancelValidException,'valid')])
def test_cancelled(ex, ev):
    learn = tiny_learner(tiny_dls(bs=4))
    w = fit(learn, 3, [EMA(), Stop(ex, ev)])
    assert same(w.epochs[0], w.valid[1]) # An epoch of two validation batches
    n = len(learn.dls.train)
    if ex is not CancelFitException: assert close(w.epochs[1], by_hand(w.w0, w.ws[:n+1 if ev=='train' else 2*n]))
    assert not same(own(learn), w.ws[-1])
    expected = by_hand(w.w0, w.ws)
    assert torch.allclose(learn.model[3].weight.double(), expected['3.weight'], atol=1e-6)

# With others --------------------------------------------------------------------

def test_save_model_keeps_what_was_validated(tmp_path):
    learn = tiny_learner()
    learn.path = tmp_path
    w = fit(learn, 3, [EMA(), SaveModelCallback(every_epoch=True)])
    for i in range(3):
        saved = torch.load(tmp_path/'models'/f'model_{i}.pth', weights_only=True)
        assert all(torch.equal(saved[k], w.valid[i][k]) for k in saved)

@pytest.mark.parametrize('cancel', [False,True])
def test_save_model_loads_its_best_at_the_end(cancel, tmp_path):
    learn = tiny_learner()
    learn.path = tmp_path
    class Worse(Callback):
        "The first epoch is the best"
        order = 51
        def after_epoch(self): self.learn.recorder.values[-1] = [0,self.epoch]
    w = fit(learn, 3, [EMA(), Worse(), SaveModelCallback()] + [Stop(CancelFitException, 'train', 2)]*cancel)
    assert all(torch.equal(t, w.valid[0][k]) for k,t in own(learn).items())

def test_early_stopping_ends_with_the_average():
    learn = tiny_learner()
    class Worse(Callback):
        order = 51
        def after_epoch(self): self.learn.recorder.values[-1] = [0,self.epoch]
    w = fit(learn, 5, [EMA(), Worse(), EarlyStoppingCallback(patience=1)])
    assert len(w.ws)==2*len(learn.dls.train) and close(own(learn), by_hand(w.w0, w.ws))

def test_prediction_in_the_middle_sees_the_weights_of_the_moment():
    learn,seen = tiny_learner(),[]
    class Predict(Callback):
        order = 70
        def before_epoch(self):
            if not self.learn.lock.locked(): self.done = False
        def after_epoch(self):
            if self.learn.lock.locked(): return
            before = own(self.learn)
            self.learn.get_preds()
            seen.append(same(before, own(self.learn)))
    w = fit(learn, 2, [EMA(), Predict()])
    assert seen==[True]*2 and close(own(learn), by_hand(w.w0, w.ws))

class Kill(Callback):
    "Stop in the `n`th training batch"
    order,run_valid,i = 100,False,0
    def __init__(self, n): self.n = n
    def before_backward(self):
        self.i += 1
        if self.i==self.n: raise KeyboardInterrupt

def stages(folder, cbs=()):
    set_seed(1)
    learn = tiny_learner(cbs=[EMA(), *cbs])
    learn.path = folder
    with learn.no_bar(), learn.no_logging(): learn.fit_stages([Stage(32,3,lr=1e-2), Stage(64,2,lr=1e-2)])
    return own(learn)

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return stages(tmp_path_factory.mktemp('whole'))

@pytest.mark.parametrize('n', [2,8,11]) # Of 9 batches, then 6: before the first checkpoint, after one, in the second stage
def test_killed_and_resumed(n, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt): stages(tmp_path, [Kill(n)])
    assert same(stages(tmp_path), whole)

@pytest.mark.parametrize('make', [
    lambda dls: vision_learner(dls, 'resnet10t', pretrained=False),
    lambda dls: Learner(dls, timm.create_model('test_vit', num_classes=2, img_size=64), loss_func=CrossEntropyLossFlat())])
def test_larger_networks(make, tmp_path):
    learn = make(tiny_dls())
    learn.path = tmp_path
    w = fit(learn, 2, [EMA()], 1e-3, 'fit_one_cycle')
    assert close(own(learn), by_hand(w.w0, w.ws))
    with learn.no_bar():
        preds = learn.get_preds()[0]
        learn.add_cb(EMA())
        learn.export('l.pkl')
        loaded = load_learner(tmp_path/'l.pkl')
        with loaded.no_bar(): assert torch.allclose(loaded.get_preds(dl=learn.dls.valid)[0], preds, atol=1e-6)

def test_with_workers():
    learn = tiny_learner(tiny_dls(num_workers=2))
    w = fit(learn, 2, [EMA()])
    assert close(own(learn), by_hand(w.w0, w.ws)) and same(w.valid[-1], own(learn))

def test_depthwise_between_two_fits():
    learn = vision_learner(tiny_dls(), 'resnet10t', pretrained=False, cbs=EMA())
    fit(learn, 1)
    dense = learn.model
    with learn.no_bar(), learn.no_logging(): learn.to_depthwise()
    w = fit(learn, 1, [ft.Distill(dense)])
    assert w.w0.keys()!=dict(all_tensors(dense)).keys() and close(own(learn), by_hand(w.w0, w.ws))

def test_said_once(capsys):
    learn = tiny_learner()
    with learn.no_bar():
        learn.fit(2, cbs=[EMA(), GradientAccumulation(16)])
        learn.add_cb(EMA())
        learn.validate()
    said = [l for l in capsys.readouterr().out.splitlines() if l.startswith('EMA')]
    assert said==['EMA: in the end about the last 1 of 3 steps (decay 0.25); validation and result are the average']
