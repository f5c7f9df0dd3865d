"`fit_fast(name=)`: killed anywhere and run again, it ends with the weights and the table of a run that was not"
import math, os, re, subprocess, sys, time
from functools import partial
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai_tricks.core.runs import Diverged, RunInUse
from fastai_tricks.core.test_utils import sizes_seen
from fastai_tricks.train.precision import ChannelsLastBatch
import fastai_tricks.fast.resume as resume
from fast_run import ARGS, make_learner, others, outcome
from killed import Slow

SCRIPT = Path(__file__).with_name('fast_run.py')
# Nothing saved yet, at the start, before and after the features, in the head, around its file, in an epoch, before the files of epochs 0 and 2, at the end, several times in a row
KILLS = ['rename:1','renamed:1','rename:2','batch:2','rename:3','renamed:3','batch:8','rename:4','rename:6','rename:8','renamed:8','batch:2+batch:9+rename:2+batch:1']

class Boom(Callback):
    "Stop as Ctrl-C would in the `n`th training batch"
    order,run_valid = 100,False
    def __init__(self, n): self.n,self.i = n,0
    def before_backward(self):
        self.i += 1
        if self.i==self.n: raise KeyboardInterrupt

def fit(learn, epochs=4, name='run', **kwargs):
    "The sizes that the model saw in training"
    with sizes_seen(learn) as seen: learn.fit_fast(epochs, name=name, **{**ARGS, **kwargs})
    return [h for t,h,w in seen if t]

def ended(learn, *args, **kwargs):
    fit(learn, *args, **kwargs)
    return outcome(learn)

def stopped(folder, n, make=make_learner, cbs=list, **kwargs):
    learn = make(folder)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=[*cbs(), Boom(n)], **kwargs)
    return learn

def same(a, b):
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(torch.nan_to_num(torch.as_tensor(a)), torch.nan_to_num(torch.as_tensor(b)))

def files(folder): return sorted(f.name for f in (folder/'models').iterdir() if f.name[0]!='.')

@pytest.fixture(autouse=True)
def one_thread():
    "As in the processes that are killed: several threads add in another order"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

# Killed processes -------------------------------------------------------------

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One process that forks all runs: to import takes longer than to train"
    root = tmp_path_factory.mktemp('fast')
    r = subprocess.run([sys.executable, str(SCRIPT), str(root), '', *KILLS], capture_output=True, text=True)
    assert r.returncode==0, r.stdout + r.stderr
    return root

def final(folder): return torch.load(folder/'final.pth', weights_only=True)

@pytest.mark.parametrize('kill', KILLS)
def test_killed_and_rerun(runs, kill):
    assert same(final(runs), final(runs/kill))
    assert files(runs/kill)==['best.pth','run.pth']
    assert same(torch.load(runs/'models'/'best.pth'), torch.load(runs/kill/'models'/'best.pth'))

def test_a_name_changes_nothing_and_without_one_nothing_is_written(tmp_path):
    want = ended(make_learner(tmp_path), name=None, cbs=others()[1:])
    assert not list(tmp_path.iterdir())
    assert same(ended(make_learner(tmp_path), cbs=others()[1:]), want)

# In this process --------------------------------------------------------------

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An uninterrupted run: its folder, Learner and outcome"
    path = tmp_path_factory.mktemp('whole')
    learn = make_learner(path)
    fit(learn)
    return path,learn,outcome(learn)

@pytest.mark.parametrize('new', [True,False])
def test_completed_run_trains_nothing(new, whole, capsys):
    "With another Learner, and with the one that it trained"
    path,learn,want = whole
    learn = make_learner(path, seed=7) if new else learn
    was = (path/'models'/'run.pth').read_bytes()
    with learn.no_bar(): learn.fit_fast(4, name='run', **ARGS)
    assert same(outcome(learn), want) and (path/'models'/'run.pth').read_bytes()==was
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith('fit_fast, all is done, nothing is trained') and len(out)==7

def test_the_same_learner_goes_on(whole, tmp_path, capsys):
    "Half trained it would be planned for otherwise"
    learn = stopped(tmp_path, 8)
    assert [type(s).__name__ for s in learn.fit_fast_plan(4, mixed=False).steps]==['TrainAll']
    with learn.no_bar(): learn.fit_fast(4, name='run', **ARGS)
    assert '; going on after the head and 2 epochs\n' in capsys.readouterr().out
    assert same(outcome(learn), whole[2])

def test_images_go_through_the_body_once(whole, tmp_path, monkeypatch):
    was = resume.kept_features
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr('fastai_tricks.models.fit_head._trained', stop)
    with pytest.raises(KeyboardInterrupt): fit(make_learner(tmp_path))
    assert files(tmp_path)==['run-features.pth','run.pth']
    monkeypatch.undo()
    monkeypatch.setattr(resume, 'kept_features', stop)
    again = make_learner(tmp_path, seed=7)
    fit(again)
    assert same(outcome(again), whole[2]) and files(tmp_path)==['run.pth']
    monkeypatch.setattr(resume, 'kept_features', was)

def adamw(params, **kwargs): return OptimWrapper(params, torch.optim.AdamW, **kwargs)

def with_torch_optimizer(folder, **kwargs):
    learn = make_learner(folder, frozen=False, **kwargs)
    learn.opt_func = adamw
    learn.freeze()
    return learn

GOES_ON = dict(
    scratch=(dict(pretrained=False, resize=True, bs=2, head=0), list, make_learner),
    statistics=(dict(keep_bn=True), list, make_learner),
    accumulation=({}, lambda: [MixUp(), GradientAccumulation(8)], make_learner),
    stopping=({}, lambda: [EarlyStoppingCallback(monitor='accuracy', min_delta=10, patience=2)], make_learner),
    workers=({}, list, partial(make_learner, num_workers=1)),
    torch=({}, list, with_torch_optimizer))

@pytest.mark.parametrize('case', GOES_ON)
def test_goes_on(case, tmp_path):
    args,cbs,make = GOES_ON[case]
    learn = make(tmp_path/'whole')
    seen = fit(learn, 3, cbs=cbs(), **args)
    want = outcome(learn)
    stopped(tmp_path/'run', 5 if case!='scratch' else 14, make, cbs, epochs=3, **args)
    again = make(tmp_path/'run', seed=7)
    later = fit(again, 3, cbs=cbs(), **args)
    assert same(outcome(again), want) and later and later==seen[-len(later):] and len(later)<len(seen)
    if case=='scratch': assert set(seen)=={32,64}

def test_the_head_is_kept_where_it_is_better(tmp_path, capsys):
    def make(folder, **kwargs): return make_learner(folder, metrics=None, **kwargs)
    want = ended(make(tmp_path/'whole'), lr=10.)
    stopped(tmp_path/'run', 8, make, lr=10.)
    again = make(tmp_path/'run', seed=7)
    with again.no_bar(): again.fit_fast(4, lr=10., name='run', **ARGS)
    assert same(outcome(again), want) and 'ends 0% of the way from the head' in capsys.readouterr().out

def test_with_the_bar(whole, tmp_path):
    "As most will call it"
    stopped(tmp_path, 8)
    again = make_learner(tmp_path, seed=7)
    assert hasattr(again, 'progress')
    again.fit_fast(4, name='run', **ARGS)
    assert same(outcome(again), whole[2])

def test_the_head_alone(tmp_path):
    learn = make_learner(tmp_path)
    fit(learn, 0)
    again = make_learner(tmp_path, seed=7)
    fit(again, 0)
    assert same(learn.model.state_dict(), again.model.state_dict()) and again.recorder.values==learn.recorder.values

def test_the_precision_that_was_chosen_stays(tmp_path, monkeypatch):
    class Precision(Callback):
        order = 100
        def before_batch(self):
            if self.training: self.learn.seen.add((getattr(self.learn, 'mixed_precision').dtype, hasattr(self.learn, 'channels_last')))
    def choose(self):
        self.add_cb(ChannelsLastBatch())
        return to_mixed(self, torch.bfloat16)
    def choose_otherwise(self): raise AssertionError
    to_mixed = Learner.to_mixed
    monkeypatch.setattr(Learner, 'to_mixed', choose)
    want = ended(make_learner(tmp_path/'whole'), 3, mixed=True)
    stopped(tmp_path/'run', 5, epochs=3, mixed=True)
    monkeypatch.setattr(Learner, 'to_mixed', choose_otherwise)
    again = make_learner(tmp_path/'run', seed=7)
    again.seen = set()
    assert same(ended(again, 3, mixed=True, cbs=Precision()), want) and again.seen=={(torch.bfloat16,False)}
    assert not again.cbs.filter(lambda cb: isinstance(cb, MixedPrecision))

# What would mix two runs ------------------------------------------------------

@pytest.mark.parametrize('change,said', [
    (dict(epochs=5), 'settings: epochs=4 there, epochs=5 here'), (dict(head=2), 'settings: head=3 there, head=2 here'), (dict(lr=.1), 'lr: None there, 0.1 here'),
    (dict(wd=.1), 'settings: '), (dict(keep_bn=False), 'settings: keep_bn=None there, keep_bn=False here'), (dict(bs=2), 'settings: bs')])
@pytest.mark.parametrize('going_on', [True,False])
def test_other_settings_are_refused(change, said, going_on, whole):
    path = whole[0]
    was,learn = (path/'models'/'run.pth').read_bytes(),make_learner(path)
    with pytest.raises(ValueError, match=re.escape(said)): fit(learn, resume=going_on, **change)
    assert (path/'models'/'run.pth').read_bytes()==was and learn.opt.frozen_idx

@pytest.mark.parametrize('make,said', [(dict(ch=16), 'network'), (dict(n=24), 'training items'), (dict(bs=2), 'training batch size')])
def test_other_learners_are_refused(make, said, whole):
    with pytest.raises(ValueError, match=said): fit(make_learner(whole[0], **make))

@pytest.mark.parametrize('args,said', [(dict(resume='yes'), '`resume` must be True, False or '), (dict(name=''), '`name` must be'), (dict(name=3), '`name` must be')])
def test_bad_arguments_write_nothing(args, said, tmp_path):
    with pytest.raises(ValueError, match=said): fit(make_learner(tmp_path), **args)
    assert not list(tmp_path.iterdir())

def test_starting_over(tmp_path):
    "With features of its own"
    stopped(tmp_path, 8)
    torch.save(0, tmp_path/'models'/'run-features.pth')
    again = make_learner(tmp_path)
    seen = fit(again, resume=False)
    assert len(seen)==12 and files(tmp_path)==['run.pth']

def test_a_checkpoint_of_another_method_is_left_alone(tmp_path):
    import fastai_tricks.resize.stages as stages
    learn = make_learner(tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_stages([stages.Stage(32,1)], name='run')
    with pytest.raises(ValueError, match='was not written by `fit_fast` of this version'): fit(make_learner(tmp_path))

def wait_for(file):
    end = time.time() + 60
    while not file.exists() and time.time()<end: time.sleep(.01)

def test_two_processes_at_once(tmp_path):
    "The second is refused by name, the first is as if alone"
    pid = os.fork()
    if not pid:
        fit(make_learner(tmp_path, cbs=Slow()), 2)
        os._exit(0)
    try:
        wait_for(tmp_path/'models'/'run.pth')
        with pytest.raises(RunInUse, match=f"'models/run.pth' is in use by process {pid} since .* Choose another `name`"): fit(make_learner(tmp_path), 2)
    finally: assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==0
    alone = ended(make_learner(tmp_path/'alone'), 2)
    assert same(ended(make_learner(tmp_path), 2), alone)

class Explode(Callback):
    "The weights become NaN in the `n`th training batch"
    order,run_valid = 0,False
    def __init__(self, n): self.n,self.i = n,0
    def before_batch(self):
        self.i += 1
        if self.i==self.n:
            for p in self.model.parameters(): p.data.fill_(math.nan)

def test_a_run_that_diverged_goes_on_at_another_rate(tmp_path):
    with pytest.raises(Diverged, match='fit_fast: the loss became nan or infinite in epoch 3; .* with smaller rates too, it goes on from there'):
        fit(make_learner(tmp_path), cbs=Explode(8))
    again = make_learner(tmp_path)
    assert len(fit(again, lr=1e-4))==6 and torch.isfinite(outcome(again)['values']).all()
