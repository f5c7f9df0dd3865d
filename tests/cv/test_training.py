"Folds know what they are, are shared by processes, delete only their own files, and a bad one does not spoil the rest"
import os, shutil, signal, time, traceback
from contextlib import redirect_stdout
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, RegressionBlock
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.metrics import F1Score, accuracy
from fastai.vision.augment import Resize, Rotate
from fastai.vision.data import ImageBlock
from fastai_tricks.core.runs import RunInUse
from fastai_tricks.cv.climb import climb
from fastai_tricks.cv.cross_validate import cross_validate
from fastai_tricks.resize.stages import Stage
from fastai_tricks.train import precision as P
from fastai_tricks.train.variants import fp32, Trial, Variant
from climb_run import kind, noise

ITEMS = list(range(16))
def two(i): return 'ab'[i%2]
def other_noise(i): return noise(i+1000)
def block(y=two, x=noise, target=CategoryBlock, **kwargs): return DataBlock((ImageBlock,target), get_x=x, get_y=y, item_tfms=Resize(16), **kwargs)
def net(c): return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, c))
def make_learner(dls): return Learner(dls, net(dls.c), metrics=accuracy)
def fit_once(learn): learn.fit(1)
def never(learn): raise AssertionError('trained')
def args(out, **kwargs): return dict(n_splits=2, fit=fit_once, num_workers=0, device='cpu', bs=4, out=out) | kwargs
def cv_of(out, dblock=None, items=ITEMS, make=make_learner, **kwargs): return cross_validate(make, dblock or block(), items, **args(out, **kwargs))
def climb_of(out, **kwargs): return climb(make_learner, block(kind), list(range(24)), **args(out, rungs=[2,None]) | kwargs)
def files(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if not p.name.startswith('.'))

# Identity ---------------------------------------------------------------------

class Fit:
    def __init__(self, epochs): self.epochs = epochs
    def __call__(self, learn): learn.fit(self.epochs)

def small(c): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, c))
def fit_with(used):
    def fit(learn): learn.fit(len(used))
    return fit
def makes_by(arch): return lambda dls: Learner(dls, arch(dls.c), metrics=accuracy)

BASE = dict(dblock=block(batch_tfms=[Rotate(10)]), make=makes_by(net), fit=fit_with([1]))
CHANGES = dict(
    item=(dict(items=[*ITEMS[:-1],99]), 'items of 1 item differ'), labels=(dict(dblock=block(lambda i: 'ab'[(i//2)%2], batch_tfms=[Rotate(10)])), 'labels of .* differ'),
    classes=(dict(dblock=block(target=CategoryBlock(['b','a'], sort=False), batch_tfms=[Rotate(10)])), 'classes: a there, b here'),
    tfm=(dict(dblock=block(batch_tfms=[Rotate(90)])), 'transforms: Rotate'), images=(dict(dblock=block(x=other_noise, batch_tfms=[Rotate(10)])), 'get_x and input blocks: '),
    seed=(dict(seed=1), 'seed: 42 there, 1 here'), n_splits=(dict(n_splits=4), 'n_splits: 2 there, 4 here'), bs=(dict(bs=2), 'batch size: 4 there, 2 here'),
    stratify=(dict(stratify=False), 'stratify: '), loaders=(dict(val_bs=2), 'loader arguments: {} there'), arch=(dict(make=makes_by(small)), 'make_learner: '),
    closure=(dict(fit=fit_with([1,1])), 'fit: '))

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp('base')
    cv_of(out, **BASE, folds=[0])
    return out

@pytest.mark.parametrize('what', CHANGES)
def test_each_part_of_identity_changed_alone_is_refused(base, what):
    change,said = CHANGES[what]
    was = (base/'fold-0.pth').read_bytes()
    with pytest.raises(ValueError, match=said) as e: cv_of(base, **BASE | change, folds=[0])
    # What is the same is not said to differ, also where its objects have been at work
    parts = 'transforms','fit: ','make_learner','get_x','loader arguments','stratify','batch size','classes'
    assert not [k for k in parts if k in str(e.value).split('Choose')[0] and k not in said]
    assert (base/'fold-0.pth').read_bytes()==was

def test_nothing_changed_is_taken_up_with_other_versions_said(base, capsys, monkeypatch):
    import fastai_tricks.cv.folds as m
    monkeypatch.setattr(m, 'versions', lambda: dict(torch='0.1'))
    cv_of(base, **BASE | dict(dblock=block(batch_tfms=[Rotate(10)]), make=makes_by(net), fit=fit_with([1])), folds=[0])
    assert 'versions: ' in capsys.readouterr().out

def test_force_takes_other_code_and_nothing_else(base):
    cv_of(base, **BASE | dict(fit=never), folds=[0], resume='force')
    with pytest.raises(ValueError, match='transforms: '): cv_of(base, **BASE | dict(dblock=block(batch_tfms=[Rotate(90)])), folds=[0], resume='force')

def test_attributes_of_what_trains_count(tmp_path):
    cv_of(tmp_path, fit=Fit(1), folds=[0])
    cv_of(tmp_path, fit=Fit(1), folds=[0])
    with pytest.raises(ValueError, match='fit: another one'): cv_of(tmp_path, fit=Fit(2), folds=[0])

def test_numbers_as_targets_count_too(tmp_path):
    def run(y): return cv_of(tmp_path, block(y, target=RegressionBlock), make=lambda dls: Learner(dls, net(1), loss_func=MSELossFlat()), folds=[0])
    run(lambda i: i/16)
    with pytest.raises(ValueError, match='training labels of 8 items differ.*validation labels of 7 items differ'): run(lambda i: i/8)

def forked(f, out=None):
    "The id of a forked process that calls `f`"
    pid = os.fork()
    if pid: return pid
    try:
        with open(out or os.devnull, 'w', buffering=1) as o, redirect_stdout(o): f()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def end_of_one(): return os.waitstatus_to_exitcode(os.wait()[1])

# Company ----------------------------------------------------------------------

def wait_for(ready, seconds=30):
    end = time.time() + seconds
    while not ready():
        assert time.time()<end, 'it never got there'
        time.sleep(.01)

def logged(folder, pause=.05):
    "A `fit` that writes down who trains what, one line whole at a time, and takes its time"
    def fit(learn):
        with open(folder/'fits.txt', 'a') as f: f.write(f'{learn.path.parent.name}/{learn.path.name} {os.getpid()}\n')
        time.sleep(pause)
        learn.fit(1)
    return fit

def shared(run, folder):
    "Two processes at once; what each returned, the fits, what each said"
    (folder/'out').mkdir()
    def one(i):
        def f(): torch.save(run(folder/'out', fit=logged(folder)), folder/f'{i}.pth')
        return forked(f, out=folder/f'{i}.txt')
    for i in range(2): one(i)
    assert [end_of_one() for _ in range(2)]==[0,0]
    return [torch.load(folder/f'{i}.pth', weights_only=False) for i in range(2)],[l.split() for l in (folder/'fits.txt').read_text().splitlines()],[(folder/f'{i}.txt').read_text() for i in range(2)]

def cv_result(out, **kwargs):
    cv = cv_of(out, n_splits=4, **kwargs)
    return dict(oof=cv.oof, scores=cv.scores, preds=cv.predict([100,101]))

def climb_result(out, **kwargs):
    res = climb_of(out, test_items=[100,101], **kwargs)
    return dict(table=res.table, oof=[cv.oof for cv in res.cvs], csv=[f.read_text() for f in res.table.submission])

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, pd.DataFrame): return a.equals(b)
    if isinstance(a, list): return len(a)==len(b) and all(map(same, a, b))
    return a==b

@pytest.mark.parametrize('run,n', [(cv_result,4),(climb_result,4)])
def test_two_processes_share_the_folds(tmp_path, run, n):
    (a,b),fits,said = shared(run, tmp_path)
    assert all(same(a[k], b[k]) for k in a)
    assert len(fits)==n==len({f for f,_ in fits}) and len({pid for _,pid in fits})==2
    alone = run(tmp_path/'alone')
    assert all(same(a[k], alone[k]) for k in ('oof','preds') if k in a)

def test_a_fold_that_another_process_holds_is_waited_for_and_taken_over_when_it_dies(tmp_path):
    def stuck(learn):
        (tmp_path/'stuck').touch()
        time.sleep(60)
    pid = forked(lambda: cv_of(tmp_path/'cv', make=make_learner, fit=stuck, folds=[0], resume=True))
    wait_for((tmp_path/'stuck').exists)
    # Other code would be refused where there is a record; there is none yet
    other = forked(lambda: cv_of(tmp_path/'cv', folds=[0,1]), out=tmp_path/'said.txt')
    try:
        wait_for(lambda: f"waits for fold 1/2: 'cv/fold-0' is in use by process {pid} since" in (tmp_path/'said.txt').read_text() if (tmp_path/'said.txt').exists() else False)
        assert (tmp_path/'cv'/'fold-1-oof.pth').exists() and not (tmp_path/'cv'/'fold-0-oof.pth').exists()
        with pytest.raises(RunInUse, match=f"'cv/fold-0' is in use by process {pid} since .* Without resume=False this process takes part"): cv_of(tmp_path/'cv', resume=False)
    finally: os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])==0 and (tmp_path/'cv'/'fold-0-oof.pth').exists()

def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path):
    from fastai_tricks.core.files import _part_of
    pid = forked(lambda: _part_of(tmp_path/'fold-0.pth').write_bytes(b'half'))
    os.waitpid(pid, 0)
    assert len(list(tmp_path.glob('.*.part*')))==1
    cv_of(tmp_path, folds=[0])
    assert not list(tmp_path.glob('.*.part*'))

# Deleting ---------------------------------------------------------------------

def users(folder):
    "Files of the user beside those of the run"
    (folder/'fold-notes').mkdir(parents=True)
    (folder/'fold-1').mkdir()
    for f in ('fold-0.csv','fold-notes/a.txt','fold-1/mine.txt','submission.csv'): (folder/f).write_text('mine')
    return lambda: all((folder/f).read_text()=='mine' for f in ('fold-0.csv','fold-notes/a.txt','fold-1/mine.txt','submission.csv'))

def writes(learn):
    learn.fit(1)
    (learn.path/'history.csv').write_text('a')

def test_only_files_of_the_run_are_deleted_and_of_the_folds_asked_for(tmp_path):
    untouched = users(tmp_path)
    for k in range(2): cv_of(tmp_path, fit=writes, folds=[k])
    cv_of(tmp_path, fit=never, resume='force')
    assert untouched() and (tmp_path/'fold-0'/'history.csv').exists()
    was = (tmp_path/'fold-0.pth').read_bytes(),(tmp_path/'fold-0-oof.pth').read_bytes()
    cv_of(tmp_path, folds=[1], resume=False)
    assert ((tmp_path/'fold-0.pth').read_bytes(),(tmp_path/'fold-0-oof.pth').read_bytes())==was and untouched()
    cv_of(tmp_path, resume=False)
    assert untouched() and not (tmp_path/'fold-0').exists()

def test_weights_of_the_user_are_not_written_over(tmp_path):
    (tmp_path/'fold-0.pth').write_bytes(b'mine')
    for resume in (True,False):
        with pytest.raises(ValueError, match='no run wrote down that it is its own'): cv_of(tmp_path, resume=resume)
    assert (tmp_path/'fold-0.pth').read_bytes()==b'mine'

def test_rungs_are_deleted_likewise(tmp_path):
    untouched = users(tmp_path/'1-2-classes')
    climb_of(tmp_path, fit=writes)
    climb_of(tmp_path, rungs=[3,None], resume=False, test_items=[100])
    assert untouched() and not [f for f in files(tmp_path/'1-2-classes') if f.endswith('.pth')]
    (tmp_path/'1-3-classes'/'submission.csv').write_text('of the run')
    with pytest.raises(ValueError, match="holds the rung '1-3-classes' of another ladder"): climb_of(tmp_path)
    was = (tmp_path/'1-3-classes'/'fold-0.pth').read_bytes()
    with pytest.raises(ValueError, match="holds the rung '1-3-classes' of another ladder"): climb_of(tmp_path, resume=False, folds=[1])
    assert (tmp_path/'1-3-classes'/'fold-0.pth').read_bytes()==was
    climb_of(tmp_path, resume=False)
    assert not [f for f in files(tmp_path/'1-3-classes')]

# Durability -------------------------------------------------------------------

def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_batch(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='`out` must be a folder that can be written to'): cv_of(tmp_path/'file', fit=never)
    with pytest.raises(ValueError, match='`out` must be a folder that can be written to'): climb_of(tmp_path/'file'/'climb', fit=never)

def test_what_is_done_needs_no_folder_that_can_be_written_to(tmp_path, monkeypatch):
    import fastai_tricks.cv.training as m
    a = cv_of(tmp_path)
    def fails(*args): raise ValueError('read-only')
    monkeypatch.setattr(m, 'check_writable', fails)
    assert torch.equal(cv_of(tmp_path).oof, a.oof)
    with pytest.raises(ValueError, match='read-only'): cv_of(tmp_path, resume=False)

@pytest.mark.parametrize('data', [b'', b'half'])
def test_a_damaged_record_is_named(tmp_path, data):
    cv_of(tmp_path)
    (tmp_path/'fold-1-oof.pth').write_bytes(data)
    with pytest.raises(ValueError, match=r'fold-1-oof.pth.* is damaged .*delete it'): cv_of(tmp_path)
    (tmp_path/'fold-1-oof.pth').unlink()
    n = []
    def fit(learn): n.append(1); learn.fit(1)
    cv_of(tmp_path, fit=fit, resume='force')
    assert len(n)==1

def test_a_fold_whose_weights_are_gone_is_trained_again(tmp_path, capsys):
    a = cv_of(tmp_path)
    (tmp_path/'fold-1.pth').unlink()
    with pytest.raises(ValueError, match='is gone: the same call again trains this fold again'): a.learner(1)
    b = cv_of(tmp_path)
    assert "fold 1 in" in (out := capsys.readouterr().out) and "trained again, as its weights 'fold-1.pth' are gone" in out
    assert torch.equal(a.oof, b.oof) and b.learner(1) and a.trainings.records[0]['id']==b.trainings.records[0]['id']

def test_an_old_record_never_stands_next_to_new_weights(tmp_path, monkeypatch):
    "Stopped between the two files of a fold that is trained again"
    import fastai_tricks.cv.training as m
    cv_of(tmp_path, folds=[0])
    (tmp_path/'fold-0.pth').unlink()
    save = m.save_whole
    def stops(obj, file):
        if 'oof' in file.name: raise KeyboardInterrupt
        return save(obj, file)
    with monkeypatch.context() as patch:
        patch.setattr(m, 'save_whole', stops)
        with pytest.raises(KeyboardInterrupt): cv_of(tmp_path, folds=[0])
    assert (tmp_path/'fold-0.pth').exists() and not (tmp_path/'fold-0-oof.pth').exists()
    assert cv_of(tmp_path, folds=[0]).learner(0)

def test_rungs_that_began_from_a_fold_whose_weights_are_gone_are_trained_again(tmp_path):
    a = climb_of(tmp_path)
    (tmp_path/'1-2-classes'/'fold-1.pth').unlink()
    n = []
    def fit(learn): n.append(1); learn.fit(1)
    b = climb_of(tmp_path, fit=fit, resume='force')
    assert len(n)==2 and all(torch.equal(x.oof, y.oof) for x,y in zip(a.cvs, b.cvs))
    climb_of(tmp_path, fit=never, resume='force')

def test_records_of_an_earlier_version_are_said_to_be(tmp_path):
    torch.save(dict(id='1', belongs={}, preds=torch.zeros(8,2)), tmp_path/'fold-0-oof.pth')
    with pytest.raises(ValueError, match='was written by an earlier version'): cv_of(tmp_path, fit=never)
    assert cv_of(tmp_path, resume=False).sound==[0,1]

def test_records_that_came_without_what_is_hidden_are_taken_up(tmp_path):
    cv_of(tmp_path/'a')
    shutil.copytree(tmp_path/'a', tmp_path/'b', ignore=shutil.ignore_patterns('.*'))
    cv_of(tmp_path/'b')
    cv_of(tmp_path/'b', resume=False)

# Folds that diverged ----------------------------------------------------------

def diverges_in(folds, seeds=None):
    "A `fit` after which predictions are NaN in some folds; with `seeds` in so many trainings of them"
    n = []
    def fit(learn):
        learn.fit(1)
        if learn.path.name not in [f'fold-{k}' for k in folds]: return
        n.append(1)
        if seeds is None or len(n)<=seeds: nn.init.constant_(list(learn.model.parameters())[-1], float('nan'))
    return fit

def test_a_diverged_fold_is_named_and_left_out(tmp_path, capsys):
    cv = cv_of(tmp_path, fit=diverges_in([1]))
    assert 'fold 1 in' in (out := capsys.readouterr().out) and 'diverged (predictions are not finite)' in out
    assert cv.sound==[0] and list(cv.done)==list(cv.folds.at(0)) and list(cv.scores.index)==[0,1]
    assert cv.table.loc['mean','accuracy']==cv.scores.accuracy[0] and np.isfinite(cv.table.loc['mean','valid_loss'])
    assert torch.isfinite(cv.predict([100])).all() and torch.equal(cv.predict([100]), cv_of(tmp_path/'one', folds=[0]).predict([100]))
    cv.plot()

def test_a_diverged_fold_is_trained_once_again_as_asked(tmp_path):
    fit = diverges_in([1], seeds=1)
    cv = cv_of(tmp_path/'a', fit=fit, diverged='again')
    assert cv.sound==[0,1] and cv.trainings.records[1]['attempt']==1
    # Found in the folder; it diverges again, and that is that
    cv_of(tmp_path/'b', fit=diverges_in([1]))
    n = []
    def again(learn): n.append(1); diverges_in([1])(learn)
    for _ in range(2): assert cv_of(tmp_path/'b', fit=again, diverged='again', resume='force').sound==[0]
    assert len(n)==1

def test_a_climb_goes_on_after_a_diverged_fold(tmp_path, capsys):
    def fit(learn): (diverges_in([1]) if learn.dls.c==2 else fit_once)(learn)
    res = climb_of(tmp_path, fit=fit, test_items=[100,101])
    assert [cv.sound for cv in res.cvs]==[[0],[0,1]] and all(f.exists() for f in res.table.submission) and np.isfinite(res.table.first_accuracy).all()
    assert 'begins from weights of its own, as the one before it diverged' in capsys.readouterr().out
    assert len(climb_of(tmp_path, fit=never, test_items=[100,101], resume='force').table)==2
    # All of them
    res = climb_of(tmp_path/'all', fit=diverges_in([0,1]), rungs=[None], test_items=[100])
    assert 'no submission' in capsys.readouterr().out and not res.cvs[0].sound and repr(res) and repr(res.cvs[0])
    with pytest.raises(ValueError, match='all folds diverged'): res.cvs[0].predict([100])

def test_stages_that_diverge_end_the_fold_and_not_the_run(tmp_path, capsys):
    class Bad(Callback):
        run_valid = False
        def after_loss(self):
            if 'fold-1' in str(self.learn.path): self.learn.loss = self.learn.loss*float('nan')
    def fit(learn): learn.fit_stages([Stage(16,1)], cbs=Bad())
    cv = cv_of(tmp_path, fit=fit)
    assert cv.sound==[0] and 'the loss became nan' in capsys.readouterr().out and cv.oof[cv.folds.at(1)].isnan().all()
    assert cv_of(tmp_path, fit=never, resume='force').sound==[0]

def test_wrong_choice_is_refused():
    from fastai_tricks.cv.folds import CV
    with pytest.raises(ValueError, match="`diverged` must be 'leave out' or 'again'"): CV(diverged=True)

# Metrics ----------------------------------------------------------------------

def test_a_metric_of_each_class_is_kept(tmp_path):
    cv = cv_of(tmp_path, make=lambda dls: Learner(dls, net(dls.c), metrics=[accuracy,F1Score(average=None)]))
    assert {'accuracy','f1_score_a','f1_score_b'} <= set(cv.scores) and cv.scores.f1_score_a.notna().all()
    res = climb(lambda dls: Learner(dls, net(dls.c), metrics=[accuracy,F1Score(average=None)]), block(kind), list(range(24)), **args(tmp_path/'climb', rungs=[2,None]))
    assert 'f1_score_a_std' in res.table

# Loaders ----------------------------------------------------------------------

def test_workers_of_the_user_read_test_images(tmp_path, monkeypatch):
    from fastai.learner import Learner as L_
    seen,get = [],L_.get_preds
    def get_preds(self, ds_idx=1, dl=None, **kwargs):
        seen.append(dl.fake_l.num_workers)
        return get(self, ds_idx, dl, **kwargs)
    monkeypatch.setattr(L_, 'get_preds', get_preds)
    climb_of(tmp_path/'climb', rungs=[None], folds=[0], num_workers=1, test_items=[100])
    cv_of(tmp_path/'cv', folds=[0], num_workers=1).predict([100], tta=1)
    assert len(seen)>=3 and set(seen)=={1}

# Precision --------------------------------------------------------------------

def fit_mixed(learn): learn.to_mixed().fit(1)
def make_mixed(dls): return make_learner(dls).to_mixed()

@pytest.fixture
def timings(monkeypatch):
    "Each timing finds another variant to be the fastest; gives what was timed, and what the model computed in, fold by fold"
    timed, seen = [], []
    def tried(learn, half, channels_last, bs):
        timed.append(learn)
        bf16 = .5 if len(timed)%2 else 2.
        return [Trial(fp32, times=[1.]*3), Trial(Variant(torch.bfloat16), times=[bf16]*3)], 1
    monkeypatch.setattr(P, '_tried', tried)
    monkeypatch.setattr(P, '_chosen', {})
    monkeypatch.setattr(P, 'half_dtype', lambda d: (torch.bfloat16,''))
    fit = Learner.fit
    monkeypatch.setattr(Learner, 'fit', lambda self, *a, **k: seen.append(hasattr(self, 'mixed_precision')) or fit(self, *a, **k))
    return timed, seen

def other_process(monkeypatch): monkeypatch.setattr(P, '_chosen', {})

@pytest.mark.parametrize('kw', [dict(fit=fit_mixed), dict(make=make_mixed)])
def test_all_folds_train_in_one_precision(kw, timings, tmp_path, monkeypatch):
    timed, seen = timings
    res = cv_of(tmp_path/'cv', **kw, n_splits=4, folds=[0,1])
    assert len(timed)==1 and seen==[True,True]
    other_process(monkeypatch) # It would choose fp32
    cv_of(tmp_path/'cv', **kw, n_splits=4)
    assert len(timed)==1 and seen==[True]*4
    other_process(monkeypatch)
    assert hasattr(res.learner(0), 'mixed_precision')==('make' in kw) and len(timed)==1
    other_process(monkeypatch)
    cv_of(tmp_path/'cv', **kw, n_splits=4, folds=[1], resume=False) # The other folds stay
    assert len(timed)==1 and seen==[True]*5
    other_process(monkeypatch)
    cv_of(tmp_path/'cv', **kw, n_splits=4, resume=False)
    assert len(timed)==2 and seen==[True]*5+[False]*4

def test_what_is_asked_of_a_done_run_writes_nothing(timings, tmp_path, monkeypatch):
    res = cv_of(tmp_path/'cv', make=make_mixed)
    (tmp_path/'cv'/'.precision.json').unlink()
    res.learner(0)
    assert not (tmp_path/'cv'/'.precision.json').exists()

def test_each_rung_of_a_climb_chooses_once(timings, tmp_path, monkeypatch):
    timed, seen = timings
    for _ in range(2):
        climb_of(tmp_path/'climb', fit=fit_mixed, n_splits=2)
        other_process(monkeypatch)
    assert len(timed)==2 and seen==[True,True,False,False] # Other classes are another network
