"`fit_fast(minutes=)`: what is planned, what it costs by a clock that the test turns, and what is left behind"
import csv, inspect, math
from dataclasses import replace
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.vision.learner import vision_learner
import fastai_tricks.all as ft
import fastai_tricks.fast.fit_fast as fit_fast_module
import fastai_tricks.fast.minutes as minutes_module
import fastai_tricks.train.stopwatch as stopwatch_module
from fastai_tricks.core.learner import is_training
from fastai_tricks.core.test_utils import sizes_seen, tiny_dls, tiny_learner
from fastai_tricks.fast.minutes import Pace, ScoreHead, SmallFirst, Timings, TrainAll, TrainHead, Within, WithinTime, plan_minutes, time_parts
from fastai_tricks.fast.plan import FastPlan
from fastai_tricks.train.precision import DeviceMixedPrecision
from heads import frozen, loaders, quiet, state

FEW = Timings(((32,.1),(64,.4)), n=10, start=.5, valid=2., features=6., mixed=3., size=(64,64))
WHY = (('pretrained','as asked'),)
TUNE = FastPlan(True, (TrainHead(10),TrainAll(1, 3e-4, keep_bn=True)), True, WHY)
SCRATCH = FastPlan(False, (TrainAll(1, 4e-3, resize=SmallFirst((32,))),), True, WHY)

# What is planned --------------------------------------------------------------------

def test_head_and_epochs():
    "Of 58.2 seconds the head takes 1.2*6 + 2, an epoch .5 + 10*.4 + 2"
    plan = plan_minutes(TUNE, FEW, 1)
    assert plan.steps==(TrainHead(10), TrainAll(8, 3e-4, keep_bn=True)) and plan.mixed
    assert plan.within==Within(1, pytest.approx(58.2), True, 8, pytest.approx((49-16)/4.5), ((1.,.4),), FEW, ' at 64 px')
    assert dict(plan.why)['epochs']=='what fits into 1 minute'
    assert str(plan).startswith('0.97 of 1 minute: head, then 8 epochs at 64 px; pretrained: 10 epochs of the head')
    assert plan._repr_markdown_().startswith('0.97 of 1 minute: head, then 8 epochs at 64 px. Pretrained')

@pytest.mark.parametrize('spent,epochs', [(0,8), (13,6), (40,1)])
def test_what_is_spent_counts(spent, epochs): assert plan_minutes(TUNE, FEW, 1, spent).steps[1].epochs==epochs

def test_planned_again():
    "After `to_mixed` the steps are others"
    again = plan_minutes(plan_minutes(TUNE, FEW, 1), replace(FEW, steps=((64,.1),)), 1)
    assert again==plan_minutes(TUNE, replace(FEW, steps=((64,.1),)), 1) and again.steps[1].epochs==14

def test_from_scratch():
    each = .5 + 10*(.93*.1 + .07*.4)
    plan = plan_minutes(SCRATCH, FEW, 1)
    assert plan.steps==(TrainAll(round(58.2/(each+2)), 4e-3, resize=SmallFirst((32,))),)
    assert plan.within.costs==((.93,pytest.approx(.1)),(1.,pytest.approx(.4))) and str(plan.within).endswith('16 epochs at 32, then 64 px')

def test_validations_after_the_last_epoch():
    "Blends of head and last weights: three of two seconds"
    plan = plan_minutes(TUNE, replace(FEW, closing=3), 1)
    assert plan.steps[1].epochs==round((49-6)/6.5) and plan.within.passes==pytest.approx((43-7*2)/4.5)
    pace = Pace(plan.within, 58.2)
    assert pace.left(0)==pytest.approx(58.2-(7+3)*2)

def test_sizes_that_do_not_pay():
    "The loader is slower than the network"
    slow = replace(FEW, steps=((32,.38),(64,.4)))
    plan = plan_minutes(SCRATCH, slow, 1)
    assert plan.steps[0].resize is None and plan.within.costs==((1.,.4),) and str(plan.within).endswith('at 64 px')
    three = replace(SCRATCH, steps=(replace(SCRATCH.steps[0], resize=SmallFirst((32,48))),))
    assert plan_minutes(three, replace(FEW, steps=((32,.28),(48,.3),(64,.4))), 1).steps[0].resize==SmallFirst((48,))

def test_sizes_of_ones_own():
    "Given, or there already: they stay, and cost what they cost"
    cb = ft.ProgressiveResize(sizes=[32], until=.5)
    given = replace(SCRATCH, steps=(replace(SCRATCH.steps[0], resize=cb),))
    there = replace(SCRATCH, steps=(replace(SCRATCH.steps[0], resize=None),))
    for plan,resize in ((plan_minutes(given, FEW, 1),cb), (plan_minutes(there, FEW, 1, cb=cb),None)):
        assert plan.steps[0].resize is resize and plan.within.costs==((.5,pytest.approx(.1)),(1.,pytest.approx(.4)))

def test_without_images():
    assert str(plan_minutes(TUNE, replace(FEW, size=None), 1).within)=='0.97 of 1 minute: head, then 8 epochs'

@pytest.mark.parametrize('mixed,pays', [(5.9,True), (6.1,False)])
def test_precision_is_timed_where_it_may_pay(mixed, pays):
    plan = plan_minutes(TUNE, replace(FEW, mixed=mixed), 1)
    assert plan.mixed==pays and ('mixed' in dict(plan.why))!=pays

def test_too_few_minutes():
    "The head takes 9.2 seconds, and the whole network 6.5 at least: one epoch of ten steps"
    assert plan_minutes(TUNE, FEW, 15.8/.97/60).steps[1].epochs==1
    plan = plan_minutes(TUNE, FEW, .25)
    assert plan.steps==(TrainHead(10),ScoreHead()) and not plan.mixed and dict(plan.why)['epochs']=='too few minutes for the whole network'
    assert str(plan.within)=='0.153 of 0.25 minutes: the head alone; the whole network needs 0.3'
    with pytest.raises(ValueError, match='`minutes` must be at least 0.2 on this machine, not 0.1'): plan_minutes(TUNE, FEW, .1)
    with pytest.raises(ValueError, match='`minutes` must be at least 0.1 on this machine, not 0.05'): plan_minutes(SCRATCH, FEW, .05)
    assert plan_minutes(SCRATCH, FEW, .1).steps[0].epochs==2

def test_a_part_of_an_epoch():
    "Sixteen steps of an epoch of a thousand are the least"
    many = replace(FEW, n=1000)
    assert str(plan_minutes(TUNE, many, 1).within)=='0.97 of 1 minute: head, then 0.1 of an epoch at 64 px'
    assert plan_minutes(TUNE, many, .25).steps[1]==ScoreHead()

# The clock --------------------------------------------------------------------------

def simulate(epochs=4, n=25, start=0., valid=3., sizes=1, step=lambda time: 1., tail=None, aim=None):
    "Steps of each epoch, the progress before each step, and what the clock shows at the end"
    costs = ((1.,1.),) if sizes==1 else ((.5,.25),(1.,1.))
    timings = Timings(((64,1.),), n, start, valid)
    each = start + n*(1 if sizes==1 else .625)
    seconds = aim or epochs*(each+valid)
    pace = Pace(Within(1, seconds, epochs=epochs, costs=costs, timings=timings), seconds)
    time,steps,pcts = 0.,[],[]
    while pace.epoch<epochs:
        pace.begin(n, time)
        steps.append(0)
        while not pace.over(time):
            pcts.append(pace.pct)
            took = step(time)*pace._step() + (start if steps[-1]%n==0 else 0.)
            first,time = steps[-1]%n==0,time+took
            pace.step(took, time, first)
            steps[-1] += 1
        pace.done()
        time += tail or valid
        pace.validated(tail or valid)
    return steps,pcts,time/seconds

SPEEDS = dict(as_timed=lambda t: 1., slower=lambda t: 1.6, faster=lambda t: .6, a_little=lambda t: 1.05, slower_later=lambda t: 1. if t<60 else 2.,
              faster_later=lambda t: 1. if t<60 else .5, uneven=lambda t: 1.+.8*math.sin(t/7), much_slower=lambda t: 4.)

@pytest.mark.parametrize('speed', SPEEDS)
@pytest.mark.parametrize('kw', [{}, dict(epochs=1), dict(epochs=12), dict(start=5.), dict(sizes=2), dict(sizes=2, epochs=12)], ids=str)
def test_ends_with_the_time(speed, kw):
    steps,pcts,ratio = simulate(step=SPEEDS[speed], **kw)
    assert .9<ratio<1.03 and len(steps)==kw.get('epochs', 4)
    # The last step ends where the schedule does
    assert pcts==sorted(pcts) and pcts[0]==0 and pcts[-1]<1 and 2*pcts[-1]-pcts[-2]>.85

def test_whole_passes_where_all_is_as_timed():
    steps,pcts,ratio = simulate()
    assert steps==[25]*4 and ratio==1 and pcts==pytest.approx([i/100 for i in range(100)])

def test_the_last_epoch_takes_a_small_difference():
    for factor,last in ((1.05,20),(.95,30)):
        steps = simulate(step=lambda t: factor)[0]
        assert steps[:3]==[25]*3 and steps[3]==pytest.approx(last, abs=1)

def test_a_large_difference_is_shared():
    assert simulate(step=lambda t: 2.)[0][1:]==pytest.approx([12]*3, abs=2)
    assert simulate(step=lambda t: .5)[0][1:]==pytest.approx([50]*3, abs=5)

def test_validations_that_take_all_the_time():
    "What cannot be had any more is left out, and the progress reaches its end"
    steps,pcts,ratio = simulate(epochs=20, tail=40.)
    assert len(steps)<20 and ratio<1.03 and pcts[-1]>.9

# The callback, by a clock that the test turns ---------------------------------------

class Takes(Callback):
    "Each batch turns the clock"
    order = 39
    def __init__(self, clock, train, valid): self.clock,self.train_s,self.valid_s = clock,train,valid
    def after_batch(self): self.clock[0] += self.train_s if self.training else self.valid_s

class Steps(Callback):
    "Rates and progress of what is trained, by epoch"
    order = 100
    def __init__(self): self.lrs,self.pcts = [],[]
    def before_train(self):
        self.lrs.append([]); self.pcts.append([])
    def before_step(self):
        self.lrs[-1].append(self.opt.hypers[-1]['lr']); self.pcts[-1].append(self.pct_train)

@pytest.fixture
def clock(monkeypatch):
    time = [100.]
    for m in (minutes_module,fit_fast_module,stopwatch_module): monkeypatch.setattr(m, 'now', lambda: time[0])
    return time

def timed(n=6, valid=1.): return Timings(((64,1.),), n, valid=valid, size=(64,64))

def fit(clock, learn, train=1., cbs=(), epochs=3, seconds=21., costs=((1.,1.),)):
    "Three epochs of six steps and a second of validation, if steps take a second"
    steps = Steps()
    within = Within(1, seconds, epochs=epochs, costs=costs, timings=timed())
    cbs = [WithinTime(within, clock[0]+seconds), Takes(clock, train, 1/len(learn.dls.valid)), steps, *cbs]
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1., cbs=cbs)
    return steps

@pytest.mark.parametrize('train,lengths,took', [(1.,[6,6,6],21), (1.05,[6,6,5],20.85), (2.,[3,3,3],21), (.5,[12,12,12],21)])
def test_epochs_follow_the_clock(clock, train, lengths, took):
    learn = tiny_learner(tiny_dls(n=56))
    assert len(learn.dls.train)==6
    steps = fit(clock, learn, train)
    assert [len(o) for o in steps.lrs]==pytest.approx(lengths, abs=2) and clock[0]-100==pytest.approx(took, abs=1)
    assert len(learn.recorder.values)==3 and all(len(row)==2 for row in learn.recorder.values) # Each is validated
    lrs,pcts = sum(steps.lrs, []),sum(steps.pcts, [])
    # One-cycle to its end: up, and down to a small share
    assert pcts==sorted(pcts) and 2*pcts[-1]-pcts[-2]>.9 and max(lrs)>.9 and lrs[-1]<.15
    assert pcts[0]==0 and lrs[0]==pytest.approx(1/25)

def test_as_planned_it_is_an_ordinary_fit(clock):
    "The same batches, rates and weights as without the callback"
    def weights(within):
        torch.manual_seed(0)
        learn = tiny_learner(tiny_dls(n=56))
        torch.manual_seed(1)
        learn.dls.train.rng.seed(1)
        if within: fit(clock, learn)
        else:
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1.)
        return state(learn.model),learn.recorder.values
    (a,rows),(b,others) = weights(True),weights(False)
    assert all(torch.allclose(v, b[k]) for k,v in a.items())
    assert [list(r) for r in rows]==[pytest.approx(list(r)) for r in others]

def test_with_callbacks_of_epochs(clock, tmp_path):
    learn = tiny_learner(tiny_dls(n=56))
    learn.path,learn.model_dir = tmp_path,'.'
    fit(clock, learn, 1.7, cbs=[CSVLogger('log.csv'), SaveModelCallback(every_epoch=True, fname='m'), ft.EMA(), GradientAccumulation(16)])
    rows = list(csv.reader((tmp_path/'log.csv').open()))
    assert [r[0] for r in rows]==['epoch','0','1','2'] and len({len(r) for r in rows})==1
    assert sorted(f.name for f in tmp_path.glob('m*'))==['m_0.pth','m_1.pth','m_2.pth']

def test_what_an_epoch_took_besides_is_put_aside(clock):
    "A checkpoint of two seconds after each epoch"
    class Slow(Callback):
        order = 90
        def after_epoch(self): clock[0] += 2
    fit(clock, tiny_learner(tiny_dls(n=56)), cbs=[Slow()])
    assert clock[0]-100==pytest.approx(21, abs=1)

def test_stopped_early(clock):
    learn = tiny_learner(tiny_dls(n=56))
    fit(clock, learn, cbs=[EarlyStoppingCallback(patience=0, min_delta=100)])
    assert len(learn.recorder.values)<3
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(learn.recorder.losses)==6

def test_no_time_for_the_last_epochs(clock):
    "Validations ten times as long as timed: the second epoch is the last one, and is logged"
    learn = tiny_learner(tiny_dls(n=56))
    class Slow(Callback):
        def after_validate(self): clock[0] += 10
    steps = fit(clock, learn, cbs=[Slow()])
    assert len(learn.recorder.values)==2 and len(learn.recorder.values[-1])==2 and steps.pcts[-1][0]==pytest.approx(1/3)

@pytest.mark.parametrize('train', [1.,2.,.5])
def test_sizes_follow_the_clock(clock, train):
    learn = tiny_learner(tiny_dls(n=56))
    resize = ft.ProgressiveResize(sizes=[32], until=.5)
    steps = Steps()
    with sizes_seen(learn) as seen: steps = fit(clock, learn, train, cbs=[resize])
    sizes,pcts = [h for training,h,_ in seen if training],sum(steps.pcts, [])
    assert sizes==[32 if p<.5-1e-9 else 64 for p in pcts] and {h for training,h,_ in seen if not training}=={64}

@pytest.mark.parametrize('ex', [RuntimeError,KeyboardInterrupt])
def test_error_leaves_the_loaders(clock, ex):
    learn = tiny_learner(tiny_dls(n=56))
    class Boom(Callback):
        def after_loss(self): raise ex('boom')
    with pytest.raises(ex): fit(clock, learn, cbs=[Boom()])
    assert not learn.cbs.filter(lambda cb: isinstance(cb, WithinTime))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(learn.recorder.losses)==6 and type(learn.dls.train).__name__=='TfmdDL'

def test_predictions_within_an_epoch_are_no_training(clock):
    "They only take time"
    learn = tiny_learner(tiny_dls(n=56))
    class Look(Callback):
        order = 80
        def after_epoch(self):
            if is_training(self.learn): self.learn.get_preds()
    steps = fit(clock, learn, cbs=[Look()])
    assert [len(o) for o in steps.lrs][:2]==[6,6] and len(steps.lrs)==3

# What is timed ----------------------------------------------------------------------

def found(learn):
    "All that timing could change"
    return dict(weights=state(learn.model), modes=[m.training for m in learn.model.modules()], grads=[p.grad for p in learn.model.parameters()],
                wants=[p.requires_grad for p in learn.model.parameters()], torch=torch.get_rng_state(), loaders=[dl.rng.getstate() for dl in learn.dls.loaders],
                bs=[dl.bs for dl in learn.dls.loaders], cbs=[id(cb) for cb in learn.cbs], frozen=learn.opt.frozen_idx, hypers=[dict(h) for h in learn.opt.hypers],
                state=[dict(s) for s in learn.opt.state.values()], metrics=[vars(m).get('total') for m in learn.metrics],
                pipes=[[id(f) for f in dl.after_item.fs] for dl in learn.dls.loaders], split=learn.dls.train_ds.split_idx)

def same(a, b):
    for k in a:
        if k=='weights': assert all(torch.equal(v, b[k][n]) for n,v in a[k].items())
        elif k=='torch': assert torch.equal(a[k], b[k])
        else: assert str(a[k])==str(b[k]), k

@pytest.mark.parametrize('num_workers', [0,2])
def test_timing_changes_nothing(num_workers):
    learn = frozen(loaders(64, size=64, bs=16, num_workers=num_workers))
    was = found(learn)
    timings = time_parts(learn, TrainAll(3, slice(1e-4,3e-4), keep_bn=True, bs=8), [32], wanted=.01)
    same(was, found(learn))
    assert timings.n==6 and timings.size==(64,64) and [s for s,_ in timings.steps]==[32,64]
    assert all(s>0 for _,s in timings.steps) and timings.valid>0 and timings.features>0 and timings.mixed>=1.5

@pytest.mark.parametrize('ex', [RuntimeError,KeyboardInterrupt])
@pytest.mark.parametrize('when', ['train','valid'])
def test_an_error_in_the_timing_changes_nothing(ex, when):
    learn = frozen(loaders(64, size=64))
    class Loss:
        def __call__(self, pred, y):
            if pred.requires_grad==(when=='train'): raise ex('boom')
            return torch.nn.functional.cross_entropy(pred, y)
    learn.loss_func = Loss()
    was = found(learn)
    with pytest.raises(ex): learn.fit_fast(minutes=1)
    same(was, found(learn))

def test_timed_by_the_real_loader(clock):
    "Batches of a slow loader, at their cost; the first one took longer"
    learn = frozen(loaders(64))
    dl = learn.dls.train
    do_item = dl.do_item
    def slow(i):
        clock[0] += .25
        return do_item(i)
    dl.do_item = slow
    timings = time_parts(learn, TrainAll(1, 1e-3), wanted=3.)
    assert timings.step==pytest.approx(8*.25) and timings.start==0

def test_callbacks_of_the_user_are_not_called():
    class Never(Callback):
        def before_batch(self): raise AssertionError
    learn = frozen(cbs=Never())
    learn.fit_fast_plan(minutes=5, cbs=[Never()])

def test_in_the_precision_of_the_learner():
    "What is timed runs under the callbacks of precision that are there"
    learn = frozen().to_mixed(torch.bfloat16)
    seen = []
    learn.model.register_forward_hook(lambda m, i, o: seen.append((o.dtype, m is learn.model)))
    time_parts(learn, TrainAll(1, 1e-3), wanted=.01)
    assert (torch.bfloat16,False) in seen and not any(own for _,own in seen)

@pytest.mark.parametrize('of_the_fit', [False,True])
def test_compiled_where_the_training_is(of_the_fit, clock):
    "Compiling, which takes 100 seconds, is not a step, nor what a loader takes to start; steps are compiled for the batches of the training"
    sizes = []
    def backend(graph, inputs):
        clock[0] += 100
        def step(*args):
            clock[0] += .1
            sizes.extend(len(o) for o in args if isinstance(o, torch.Tensor) and o.ndim==4 and o.shape[1:]==(3,128,128))
            return graph(*args)
        return step
    torch.compiler.reset()
    learn,cb = frozen(loaders(64, size=128, bs=16)),ft.CompiledTraining(backend=backend)
    if not of_the_fit: learn.add_cb(cb)
    was = found(learn)
    timings = time_parts(learn, TrainAll(1, 1e-3), wanted=.01, cbs=[cb] if of_the_fit else ())
    same(was, found(learn))
    assert timings.step==pytest.approx(.1) and timings.start==0 and {*sizes}=={16}

def test_all_sizes_are_compiled_before_the_plan(clock):
    "In the training nothing is: it would take what was planned for steps"
    compiled = []
    def backend(graph, inputs):
        compiled.append(graph)
        clock[0] += 100
        def step(*args):
            clock[0] += .1
            return graph(*args)
        return step
    torch.compiler.reset()
    learn = frozen(loaders(64, size=64, bs=8))
    learn.add_cb(ft.CompiledTraining(backend=backend))
    learn.fit_fast_plan(minutes=60, pretrained=False, resize=True, bs=8)
    n = len(compiled)
    assert n>=2
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-3, cbs=ft.ProgressiveResize(sizes=[32], until=.6))
    assert len(compiled)==n or len(compiled)==2*n # Before torch 2.14 each network is compiled

def test_callbacks_of_the_fit_are_asked(monkeypatch):
    asked,there = [],minutes_module.compiles
    monkeypatch.setattr(minutes_module, 'compiles', lambda cbs: asked.extend(cbs) or there(()))
    cb = ft.CompiledTraining(backend='eager')
    frozen().fit_fast_plan(minutes=5, cbs=[cb])
    assert cb in asked

# All of it --------------------------------------------------------------------------

@pytest.mark.parametrize('bad,match', [
    (dict(epochs=5, minutes=20), '`minutes` must be None where `epochs` are given'), ({}, '`epochs` must be a non-negative integer, or `minutes`'),
    (dict(minutes=0), '`minutes` must be a number above 0'), (dict(minutes=-1), '`minutes` must be a number above 0'),
    (dict(minutes='20'), '`minutes` must be a number above 0'), (dict(minutes=True), '`minutes` must be a number above 0'),
    (dict(minutes=math.nan), '`minutes` must be a number above 0'), (dict(minutes=.0001), '`minutes` must be at least')])
def test_bad_input(bad, match):
    learn = frozen()
    was = found(learn)
    for f in (learn.fit_fast,learn.fit_fast_plan):
        with pytest.raises(ValueError, match=match): f(**bad)
    same(was, found(learn))

def test_not_where_clocks_differ(monkeypatch):
    monkeypatch.setattr(minutes_module, 'num_distrib', lambda: 2)
    with pytest.raises(ValueError, match='`minutes` must be None with several processes'): frozen().fit_fast(minutes=1)

def given(monkeypatch, timings, seen=None):
    "Timings of the test instead of those of the machine"
    def parts(learn, step, sides=(), wanted=1., cbs=(), **kwargs):
        if seen is not None: seen.append((step,list(sides),kwargs,[type(cb).__name__ for cb in learn.cbs]))
        return timings
    monkeypatch.setattr(minutes_module, 'time_parts', parts)

def test_fit_fast_within_minutes(clock, monkeypatch, capsys):
    seen = []
    given(monkeypatch, Timings(((32,1.),), 3, valid=1., features=3., mixed=1e9, size=(32,32)), seen)
    learn,steps = frozen(),Steps()
    plan = learn.fit_fast_plan(minutes=.5, wd=.1)
    assert seen[0][:3]==(TrainAll(1, slice(1e-4,3e-4), keep_bn=True, best=True),[],dict(wd=.1)) and not capsys.readouterr().out
    assert plan.steps==(TrainHead(10),TrainAll(5, slice(1e-4,3e-4), keep_bn=True, best=True)) and clock[0]==100
    with learn.no_bar(): learn.fit_fast(minutes=.5, cbs=[Takes(clock, 1., 1/len(learn.dls.valid)), steps])
    assert '0.485 of 0.5 minutes: head, then 5 epochs at 32 px; pretrained: 10 epochs of the head' in capsys.readouterr().out
    assert [len(r) for r in learn.recorder.values]==[3]*6 and sum(map(len, steps.lrs))>=15 and clock[0]-100<30*1.02
    # The head took no time by this clock: what it left went to the whole network
    assert clock[0]-100>30*.85

def test_it_says_that_it_waited(clock, monkeypatch, capsys):
    "Two seconds for the items of a batch, one for its step"
    given(monkeypatch, Timings(((32,3.),), 3, valid=1., features=3., mixed=1e9, size=(32,32)))
    learn = frozen()
    do_item = learn.dls.train.do_item
    def slow(i):
        clock[0] += .25
        return do_item(i)
    learn.dls.train.do_item = slow
    with learn.no_bar(): learn.fit_fast(minutes=2, head=0, pretrained=True, cbs=Takes(clock, 1., 1/len(learn.dls.valid)))
    assert 'fit_fast: waited 67% of the time for images: `learn.loader_report()`' in capsys.readouterr().out

def test_from_scratch_at_its_sizes(monkeypatch):
    seen = []
    given(monkeypatch, Timings(((32,.2),(64,1.)), 6, valid=1., size=(64,64)), seen)
    learn = vision_learner(loaders(64, size=64, bs=16), 'test_resnet', pretrained=False)
    plan = learn.fit_fast_plan(minutes=1)
    assert seen[0][1]==[32] and plan.steps[0].resize==SmallFirst((32,))
    there = vision_learner(loaders(64, size=64, bs=16), 'test_resnet', pretrained=False, cbs=ft.ProgressiveResize(sizes=[32], until=.5))
    plan = there.fit_fast_plan(minutes=1)
    assert seen[1][1]==[32] and plan.steps[0].resize is None and [end for end,_ in plan.within.costs]==[.5,1.]

def test_precision_is_chosen_and_timed_again(clock, monkeypatch):
    seen = []
    given(monkeypatch, Timings(((32,1.),), 3, valid=1., features=1., size=(32,32)), seen)
    monkeypatch.setattr(Learner, 'to_mixed', lambda self: self.add_cb(DeviceMixedPrecision(torch.bfloat16)))
    learn = frozen()
    quiet(learn, learn.fit_fast, minutes=.5, cbs=[Takes(clock, 1., .5)])
    assert len(seen)==2 and 'DeviceMixedPrecision' in seen[1][3] and not learn.cbs.filter(lambda cb: isinstance(cb, MixedPrecision))
    monkeypatch.setattr(Learner, 'to_mixed', lambda self: self) # Stays in fp32: nothing is to be timed again
    learn = frozen()
    quiet(learn, learn.fit_fast, minutes=.5, cbs=[Takes(clock, 1., .5)])
    assert len(seen)==3

def test_the_head_alone(clock, monkeypatch):
    given(monkeypatch, Timings(((32,5.),), 100, valid=1., features=3., size=(32,32)))
    learn = frozen()
    was = state(learn.model)
    quiet(learn, learn.fit_fast, minutes=.2)
    now = learn.model.state_dict()
    assert all(torch.equal(now[k], was[k]) for k in was if k.startswith('0.')) and not torch.equal(now['1.8.weight'], was['1.8.weight'])

def test_no_time_after_the_head(clock, monkeypatch, capsys):
    "A head that took all of the time is kept"
    given(monkeypatch, Timings(((32,1.),), 3, valid=1., features=3., mixed=1e9, size=(32,32)))
    learn = frozen()
    fit = TrainHead.fit
    def slow(*args, **kwargs):
        clock[0] += 100
        return fit(*args, **kwargs)
    monkeypatch.setattr(TrainHead, 'fit', slow)
    was = state(learn.model)
    with learn.no_bar(): learn.fit_fast(minutes=.5)
    assert 'no time is left for the whole network' in capsys.readouterr().out and len(learn.recorder.values)==1
    assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items() if k.startswith('0.'))

def test_by_the_real_clock(monkeypatch):
    "However long it takes here: each epoch is validated, and the last step is near the end of the schedule"
    given(monkeypatch, Timings(((32,.05),), 6, valid=.05, mixed=1e9, size=(32,32)))
    learn,steps = frozen(loaders(64), metrics=accuracy),Steps()
    quiet(learn, learn.fit_fast, minutes=.05, head=0, cbs=steps)
    assert len(steps.lrs)==len(learn.recorder.values) and all(len(r)==3 for r in learn.recorder.values)
    assert 'minutes' in inspect.signature(Learner.fit_fast).parameters
