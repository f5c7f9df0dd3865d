"`climb` and `cross_validate`: killed anywhere and run again it loses at most a fold, and ends in the same table"
import random, subprocess, sys
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import ColReader, RandomSplitter
from fastai.learner import Learner, defaults
from fastai.metrics import accuracy_multi
from fastai.vision.augment import Flip, RandomResizedCrop, Resize, aug_transforms
from fastai.vision.data import ImageBlock
from fastai.vision.models.xresnet import xresnet18
from fastai_tricks.climb import accuracy_on, climb
from fastai_tricks.evaluate import cross_validate
from fastai_tricks.folds import fold_splits
from fastai_tricks.labels import ItemLabels
from fastai_tricks.stages import Stage
from fastai_tricks.submission import submission_ids as ids_of
from fastai_tricks.test_utils import sizes_seen
from killed import kill_from_outside
from climb_run import kind, make_learner, noise, run
import fastai.callback.schedule, fastai_tricks.subset

SCRIPT = Path(__file__).with_name('climb_run.py')
# 3, 6 and 9 training batches a fold, two folds a rung. Files: the submission tried beforehand, 1; weights, record and test predictions of each fold, 2 to 7, then the submission, 8; and so on
KILLS = ['batch:2','batch:5','batch:16','batch:30','rename:2','rename:3','renamed:3','rename:4','rename:8','renamed:8','rename:13','batch:10+rename:3+batch:1']
ALL = dict(out='x', num_workers=0, device='cpu', bs=4)

def script(*args): return [sys.executable, str(SCRIPT), *map(str, args)]
def results(folder): return pd.read_json(folder/'table.json'),torch.load(folder/'oof.pth'),{p.parent.name:p.read_text() for p in (folder/'climb').glob('*/submission.csv')}
def fits(folder): return (folder/'fits.txt').read_text().splitlines()

@contextmanager
def sizes_of_all():
    "Sizes of the training batches of any Learner made within"
    seen = []
    class See(Callback):
        order,run_valid = 100,False
        def after_pred(self): seen.append(self.xb[0].shape[-1])
    defaults.callbacks.append(See)
    try: yield seen
    finally: defaults.callbacks.remove(See)

def same(a, b):
    (t,o,s),(t1,o1,s1) = results(a),results(b)
    pd.testing.assert_frame_equal(t, t1)
    return s==s1 and len(s)==3 and all(map(torch.equal, o, o1))

# Killed processes -------------------------------------------------------------

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One process that forks all runs: to import takes longer than to train"
    root = tmp_path_factory.mktemp('climb')
    r = subprocess.run(script(root, '', *KILLS), capture_output=True, text=True)
    assert r.returncode==0, r.stdout + r.stderr
    return root

@pytest.mark.parametrize('kill', KILLS)
def test_killed_and_rerun(runs, kill):
    assert same(runs, runs/kill)
    whole,again = fits(runs),fits(runs/kill)
    # Each kill costs at most the fold it fell into
    assert len(whole)==6 and set(whole)==set(again) and len(again)<=6 + len(kill.split('+'))
    assert len(again)==6 + sum(k.startswith('batch') or k in ('rename:2','rename:3','rename:13') for k in kill.split('+'))

def test_killed_from_outside_at_any_moment(runs, tmp_path):
    kill_from_outside(script(tmp_path, 'slow'), lambda: list((tmp_path/'climb').glob('*/fold-0-oof.pth')), 1.5)
    assert not (tmp_path/'table.json').exists()
    subprocess.run(script(tmp_path, ''), check=True, capture_output=True)
    assert same(runs, tmp_path) and len(fits(tmp_path))<=7

# In this process --------------------------------------------------------------

def test_whole_run(tmp_path, capsys):
    res = run(tmp_path)
    said = capsys.readouterr().out
    assert 'climb: 3 rungs of 2, 4, 6 classes, 2 folds, 6 fits' in said and 'rung 3/3, 6 classes, fold 2/2' in said and 'epoch 1/1' in said
    t = res.table
    assert t.classes.tolist()==[2,4,6] and t.images.tolist()==[24,48,72] and t['size'].iloc[1]==24
    for cv,row in zip(res.cvs, t.itertuples()):
        assert not cv.oof.isnan().any() and list(cv.items)==[i for i in range(72) if kind(i) in cv.vocab]
        assert [cv.vocab[y] for y in cv.targs]==[kind(i) for i in cv.items]
        by_fold = [float((cv.oof[i].argmax(1)==cv.targs[i]).float().mean()) for i in map(cv.folds.at, range(2))]
        assert row.accuracy==pytest.approx(np.mean(by_fold)) and row.accuracy_std==pytest.approx(np.std(by_fold, ddof=1))
        # An item validates once, and never in the fold that trains on it
        assert sorted(i for _,v in cv.folds.splits for i in v)==list(cv.items) and all(not set(a) & set(b) for a,b in cv.folds.splits)
    for k in range(2):
        for a,b in zip(res.cvs, res.cvs[1:]): assert not set(a.folds.splits[k][0]) & set(b.folds.splits[k][1])
    # The submission is the mean of the folds, over all classes
    sub = pd.read_csv(t.submission.iloc[0])
    p = res.cvs[0].predict(list(range(100, 110)))
    assert sub.label.tolist()==[res.cvs[0].vocab[i] for i in p.argmax(1)] and sub.id.tolist()==[f'{i}.jpg' for i in range(10)]

def test_sizes_of_rungs(tmp_path):
    seen = []
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=RandomResizedCrop((32,48)), batch_tfms=[*aug_transforms(size=(16,24))])
    def fit(learn):
        with sizes_seen(learn) as s: learn.fit(1)
        seen.append({o for o in s})
    climb(make_learner, db, list(range(72)), rungs=[(2,8),(4,16),(None,None)], fit=fit, n_splits=2, folds=[1], **{**ALL, 'out':tmp_path})
    assert seen==[{(True,8,12),(False,8,12)},{(True,16,24),(False,16,24)},{(True,16,24),(False,16,24)}]

def test_min_gain_stops_with_the_reason(tmp_path, capsys):
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    args = dict(rungs=(2,4,None), fit=lambda learn: learn.fit(1), n_splits=2, **{**ALL, 'out':tmp_path})
    res = climb(make_learner, db, list(range(72)), min_gain=1, **args)
    assert len(res.table)==2 and 'Stopped after rung 2 of 3: the accuracy on the first 2 classes changed by' in res.stopped and res.stopped in capsys.readouterr().out and res.stopped in res._repr_html_()
    assert len(climb(make_learner, db, list(range(72)), min_gain=-1, **args).table)==3

def test_resume_false_starts_anew_and_others_are_refused(tmp_path):
    db,n = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32)),[]
    def fit(learn): n.append(1); learn.fit(1)
    args = dict(rungs=(2,None), fit=fit, n_splits=2, **{**ALL, 'out':tmp_path})
    climb(make_learner, db, list(range(72)), **args)
    climb(make_learner, db, list(range(72)), **args)
    assert len(n)==4
    climb(make_learner, db, list(range(72)), resume=False, **args)
    assert len(n)==8
    for kwargs,said in ((dict(seed=1), 'other seed'), (dict(groups=[i//2 for i in range(72)]), 'other groups'), (dict(n_splits=3), 'other n_splits'), (dict(bs=2), 'other bs'), (dict(rungs=[(2,16),None]), 'other transforms'), (dict(rungs=[3,None]), "holds the rung '1-2-classes' of another ladder")):
        with pytest.raises(ValueError, match=said): climb(make_learner, db, list(range(72)), **{**args, **kwargs})
    with pytest.raises(ValueError, match='other labels'): climb(make_learner, db, list(range(60)), **args)
    assert len(n)==8

def test_other_code_is_refused_unless_forced(tmp_path):
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    args = dict(rungs=(2,None), n_splits=2, **{**ALL, 'out':tmp_path})
    climb(make_learner, db, list(range(72)), fit=lambda learn: learn.fit(1), **args)
    with pytest.raises(ValueError, match="other fit.*resume='force'"): climb(make_learner, db, list(range(72)), fit=lambda learn: learn.fit(1, 1e-2), **args)
    with pytest.raises(ValueError, match='other make_learner'): climb(lambda dls: make_learner(dls), db, list(range(72)), fit=lambda learn: learn.fit(1), **args)
    never = lambda learn: 1/0
    assert len(climb(make_learner, db, list(range(72)), fit=never, resume='force', **args).table)==2

def test_a_run_begun_anew_never_mixes_with_the_one_before(tmp_path):
    db,n = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32)),[]
    def fit(learn): n.append(1); learn.fit(1)
    def dies(learn):
        n.append(1)
        if len(n)==6: raise RuntimeError
        learn.fit(1)
    args = dict(rungs=(2,None), n_splits=2, **{**ALL, 'out':tmp_path})
    climb(make_learner, db, list(range(72)), fit=fit, **args)
    with pytest.raises(RuntimeError): climb(make_learner, db, list(range(72)), fit=dies, resume=False, **args)
    climb(make_learner, db, list(range(72)), fit=dies, **args)
    assert len(n)==6+3
    # Records of a rung that lost what it began from
    (tmp_path/'1-2-classes'/'fold-0-oof.pth').unlink()
    with pytest.raises(ValueError, match="did not begin from what '1-2-classes' holds"): climb(make_learner, db, list(range(72)), fit=dies, **args)

def test_test_items_may_come_later_or_in_another_order(tmp_path):
    db,n = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32)),[]
    def fit(learn): n.append(1); learn.fit(1)
    args,t = dict(rungs=(2,None), fit=fit, n_splits=2, submit=dict(topk=None), **{**ALL, 'out':tmp_path}),list(range(100, 108))
    def sub(**kwargs): return pd.read_csv(climb(make_learner, db, list(range(72)), **args, **kwargs).table.submission.iloc[-1]).set_index('id')
    climb(make_learner, db, list(range(72)), **args)
    one = sub(test_items=t)
    two = sub(test_items=t[::-1])
    assert len(n)==4 and list(two.index)==list(one.index[::-1])
    assert np.allclose(one, two.loc[one.index], atol=1e-6)

def test_rows_and_labels_are_checked(tmp_path):
    df = pd.DataFrame(dict(i=range(48), label=[kind(i) for i in range(48)], g=[i//4 for i in range(48)]))
    db = lambda: DataBlock((ImageBlock,CategoryBlock), get_x=lambda r: noise(r.i), get_y=ColReader('label'), item_tfms=Resize(32))
    args = dict(n_splits=3, groups='g', stratify=False, fit=fit_once, resume=True, **{**ALL, 'out':tmp_path})
    cross_validate(make_learner, db(), df, **args)
    with pytest.raises(ValueError, match='is of a run with other'): cross_validate(make_learner, db(), df.sample(frac=1, random_state=1), **args)
    with pytest.raises(ValueError, match='other labels'): cross_validate(make_learner, db(), df.assign(label=df.label[::-1].tolist()), **args)

def fit_once(learn): learn.fit(1)

def test_weights_of_another_run_are_not_taken(tmp_path):
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    args = dict(n_splits=2, **{**ALL, 'out':tmp_path})
    a = cross_validate(make_learner, db, list(range(36)), fit=fit_once, **args)
    b = cross_validate(make_learner, db, list(range(36)), fit=lambda learn: learn.fit(2, .1), **args)
    with pytest.raises(ValueError, match='was overwritten by another run'): a.predict([1,2])
    state = random.getstate()
    assert b.predict([1,2]).shape==(2,6) and random.getstate()==state

def test_items_without_any_label_join_with_all_classes(tmp_path):
    y = lambda i: [] if i%4==0 else [kind(i)]
    db = DataBlock((ImageBlock,MultiCategoryBlock), get_x=noise, get_y=y, item_tfms=Resize(32))
    def make(dls): return Learner(dls, make_learner(dls).model, metrics=accuracy_multi)
    res = climb(make, db, list(range(72)), rungs=(2,None), fit=fit_once, n_splits=2, folds=[0], **{**ALL, 'out':tmp_path})
    assert [len(cv.folds.rows) for cv in res.cvs]==[sum(bool(set(y(i)) & set(res.cvs[0].vocab)) for i in range(72)),72]

def test_na_class_and_losses_of_pytorch(tmp_path):
    na = DataBlock((ImageBlock,CategoryBlock(add_na=True)), get_x=noise, get_y=kind, item_tfms=Resize(32))
    def plain(dls): return Learner(dls, make_learner(dls).model, loss_func=torch.nn.CrossEntropyLoss())
    res = climb(plain, na, list(range(72)), rungs=(2,None), fit=fit_once, n_splits=2, folds=[1], test_items=[100,101], submit=dict(topk=None), **{**ALL, 'out':tmp_path})
    cv = res.cvs[-1]
    assert cv.vocab==['#na#',*'abcdef'] and cv.oof.shape==(72,7) and res.table.classes.tolist()==[2,6]
    assert torch.allclose(cv.oof[cv.done].sum(1), torch.ones(len(cv.done))) and [cv.vocab[i] for i in cv.targs[cv.done]]==[kind(cv.items[int(i)]) for i in cv.done]
    assert list(pd.read_csv(res.table.submission.iloc[0]).columns)==['id',*'abcdef']
    cv.plot()

def test_callbacks_that_write_files(tmp_path):
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    cross_validate(make_learner, db, list(range(36)), n_splits=2, fit=lambda learn: learn.fit(1, cbs=[CSVLogger(),SaveModelCallback()]), seed=np.int64(3), **{**ALL, 'out':tmp_path})
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*.*') if p.parent.name!=tmp_path.name)==['fold-0/history.csv','fold-0/models/model.pth','fold-1/history.csv','fold-1/models/model.pth']

def test_what_cannot_be_is_said_before_training(tmp_path):
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    def never(learn): raise AssertionError('trained')
    sample = pd.DataFrame({'id':['0','1'], **{c:[0,0] for c in 'abcdef'}})
    bad = [(dict(rungs=(2,9)), '`rungs` must be .*of which there are 6'), (dict(rungs=[]), '`rungs` must be'), (dict(rungs=[(2,3,4)]), '`rungs` must be'), (dict(rungs=[(2,0)]), 'size in pixels'), (dict(bs=64), 'at most the 19 training images of fold 0 of 2 classes'), (dict(bs=0), '`bs` must be'),
        (dict(tta=-1), '`tta` must be'), (dict(test_items=[]), '`test_items` must be one or more items'), (dict(test_items='folder'), '`test_items` must be'), (dict(submit='s.csv'), '`submit` must be a dict'), (dict(resume=2), '`resume` must be'), (dict(groups=[None]*72), 'given for each item'), (dict(test_items=['x']), 'the first fails with'), (dict(min_gain='much'), '`min_gain` must be'),
        (dict(n_splits=1), '`n_splits` must be'), (dict(folds=[7]), '`folds` must be a list of numbers from 0 to 4'), (dict(fit='fine_tune'), '`fit` must be'), (dict(groups='patient'), 'a column of the items'), (dict(groups=[1,2]), 'a group for each of the 72 items'),
        (dict(test_items=[1,2,3], sample=sample), 'are not in the sample'), (dict(test_items=[0,1], sample=sample.drop(columns='b')), "classes without a column: 'b'"), (dict(test_items=[0,1], submit=dict(topk=9)), '`topk` must be'), (dict(test_items=[0,1], ids=['a','a']), 'not \'a\' twice')]
    for kwargs,said in bad:
        with pytest.raises(ValueError, match=said): climb(make_learner, db, list(range(72)), **{**dict(rungs=(2,None), fit=never, **{**ALL, 'out':tmp_path}), **kwargs})
    with pytest.raises(TypeError, match="unexpected argument 'test_files'; did you mean 'test_items'"): climb(make_learner, db, list(range(72)), rungs=(2,None), fit=never, test_files=[1], **{**ALL, 'out':tmp_path})
    with pytest.raises(ValueError, match='must return a Learner'): climb(lambda dls: 1, db, list(range(72)), rungs=(2,None), fit=never, **{**ALL, 'out':tmp_path})
    assert not list(tmp_path.glob('*/*'))

def test_a_crash_keeps_the_folds_before(tmp_path):
    db,n = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32)),[]
    def fit(learn):
        n.append(1)
        if len(n)==3: raise RuntimeError('out of memory')
        learn.fit(1)
    args = dict(rungs=(2,None), fit=fit, n_splits=2, **{**ALL, 'out':tmp_path})
    with pytest.raises(RuntimeError): climb(make_learner, db, list(range(72)), **args)
    climb(make_learner, db, list(range(72)), **args)
    assert len(n)==5

# Cross-validation -------------------------------------------------------------

def test_cross_validation_with_groups_in_a_table(tmp_path):
    df = pd.DataFrame(dict(i=range(48), label=[kind(i) for i in range(48)], patient=[i//4 for i in range(48)]))
    db = DataBlock((ImageBlock,CategoryBlock), get_x=lambda r: noise(r.i), get_y=ColReader('label'), item_tfms=Resize(32))
    for stratify in (True,False):
        cv = cross_validate(make_learner, db, df, n_splits=3, groups='patient', stratify=stratify, fit=lambda learn: learn.fit(1), **{**ALL, 'out':tmp_path})
        for t,v in cv.folds.splits: assert not set(df.patient[t]) & set(df.patient[v])
        assert [cv.vocab[y] for y in cv.targs]==cv.items.label.tolist() and cv.scores.valid.sum()==48
    new = pd.DataFrame(dict(i=[500,501], label='a', patient=0))
    assert cv.predict(new).shape==(2,6) and torch.allclose(cv.predict(new).sum(1), torch.ones(2)) and cv.predict(new, tta=2).shape==(2,6)
    assert torch.allclose(cv.predict(new), torch.stack([cv.learner(k).get_preds(dl=cv.learner(k).dls.test_dl(new))[0] for k in range(3)]).mean(0), atol=1e-6)

def test_each_item_is_predicted_by_the_model_that_did_not_see_it(tmp_path):
    seen = {}
    def fit(learn):
        seen[len(seen)] = set(learn.dls.train_ds.items)
        learn.fit(1)
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32), batch_tfms=Flip(), splitter=RandomSplitter(seed=1))
    cv = cross_validate(make_learner, db.class_subset(3), list(range(72)), n_splits=4, fit=fit, **{**ALL, 'out':tmp_path})
    assert len(cv.items)==36
    for k in range(4):
        rows = cv.folds.at(k)
        assert not {cv.items[int(i)] for i in rows} & seen[k]
        learn = cv.learner(k)
        with learn.no_bar(): p = learn.get_preds(dl=learn.dls.test_dl([cv.items[int(i)] for i in rows]))[0]
        assert torch.allclose(p, cv.oof[rows], atol=1e-5)
        learn.load(Path(cv.files[k]).resolve().with_suffix(''), with_opt=False)

def test_some_folds_only(tmp_path):
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    cv = cross_validate(make_learner, db, list(range(72)), folds=[3], fit=lambda learn: learn.fit(1), **{**ALL, 'out':tmp_path})
    assert list(cv.scores.index)==[3] and (~cv.oof.isnan().any(1)).nonzero().flatten().tolist()==list(cv.done) and (cv.targs==-1).sum()==72-len(cv.done)
    with pytest.raises(ValueError, match=r'`fold` must be one of \[3\]'): cv.learner(0)

def test_several_labels_and_numbers(tmp_path):
    multi = DataBlock((ImageBlock,MultiCategoryBlock), get_x=noise, get_y=lambda i: [kind(i)] + (['x'] if i%4==0 else []), item_tfms=Resize(32))
    def make(dls):
        learn = make_learner(dls)
        learn.metrics = accuracy_multi
        return learn
    cv = cross_validate(make, multi, list(range(72)), n_splits=3, fit=lambda learn: learn.fit(1), **{**ALL, 'out':tmp_path/'multi'})
    assert cv.targs.shape==cv.oof.shape==(72,7) and cv.vocab==list('abcdefx') and cv.oof.min()>0 and cv.targs[0].tolist()==[1,0,0,0,0,0,1]
    cv.plot()
    res = climb(make, multi, list(range(72)), rungs=(3,None), fit=lambda learn: learn.fit(1), n_splits=2, **{**ALL, 'out':tmp_path/'climb'})
    assert res.table.classes.tolist()==[3,7] and res.table.first_accuracy.between(0, 1).all()
    number = DataBlock((ImageBlock,RegressionBlock), get_x=noise, get_y=lambda i: i/72, item_tfms=Resize(32))
    def regress(dls): return Learner(dls, xresnet18(n_out=1))
    cv = cross_validate(regress, number, list(range(24)), n_splits=2, fit=lambda learn: learn.fit(1), **{**ALL, 'out':tmp_path/'number'})
    assert cv.oof.shape==(24,1) and torch.allclose(cv.targs, torch.arange(24)/72) and cv.vocab is None
    cv.plot()

@pytest.mark.parametrize('workers', [0,2])
def test_workers(tmp_path, workers):
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    cv = cross_validate(make_learner, db, list(range(36)), n_splits=2, fit=lambda learn: learn.fit(1), **{**ALL, 'out':tmp_path, 'num_workers':workers})
    assert len(cv.done)==36 and cv.predict([1,2,3]).shape==(3,6)

def test_random_states_stay(tmp_path):
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    torch.manual_seed(123) # Two runs of one seed would end in the same state
    state = torch.get_rng_state()
    cross_validate(make_learner, db, list(range(36)), n_splits=2, fit=lambda learn: learn.fit(1), **{**ALL, 'out':tmp_path})
    assert torch.equal(torch.get_rng_state(), state)

def test_folds_are_scikit_learns():
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
    labels = [kind(i*i) for i in range(60)]
    l,g,y = ItemLabels(labels),[i//3 for i in range(60)],pd.factorize(pd.Series(labels))[0]
    for kwargs,own in ((dict(), StratifiedKFold), (dict(groups=g), StratifiedGroupKFold), (dict(groups=g, stratify=False), GroupKFold), (dict(stratify=False), KFold)):
        ours,theirs = fold_splits(l, range(60), 3, seed=7, **kwargs),own(3, shuffle=True, random_state=7).split(range(60), y, kwargs.get('groups'))
        for (a,b),(c,d) in zip(ours, theirs): assert (a==c).all() and (b==d).all()

def test_the_order_of_files_does_not_matter():
    from fastai_tricks.folds import Folds
    items = [Path(f'{kind(i)}/{i}.jpg') for i in range(60)]
    db = DataBlock((ImageBlock,CategoryBlock), get_y=lambda p: p.parent.name, splitter=RandomSplitter())
    other = items[::-1]
    for (a,b),(c,d) in zip(Folds(db, items, bs=8).splits, Folds(db, other, bs=8).splits):
        assert {items[i] for i in a}=={other[i] for i in c} and [items[i] for i in b]==[other[i] for i in d]

def test_ids_of_test_items():
    df = pd.DataFrame(dict(n=[1,2], image=['a','b']))
    assert ids_of(df)==['1','2'] and ids_of(df, pd.DataFrame(dict(image=['b','a'], label='')))==['a','b']
    assert ids_of(['x/a.png'], pd.DataFrame(dict(i=['a.png'], l='')))==['a.png'] and ids_of([Path('x/a.png')], pd.DataFrame(dict(i=['a'], l='')))==['a']

def test_accuracy_on_the_first_classes():
    rng = np.random.default_rng(0)
    p,y,vocab = torch.tensor(rng.random((50,5))),torch.tensor(rng.integers(0, 5, 50)),list('abcde')
    got = accuracy_on(p, y, vocab, ['d','b'])
    assert got==pytest.approx(np.mean([max((float(p[i,c]),c) for c in (3,1))[1]==y[i] for i in range(50) if y[i] in (3,1)]))

def test_fit_stages_in_a_fold(tmp_path):
    "Each fold has its own checkpoint; a crash in between costs no stage; a new call starts anew"
    db,n = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32)),[]
    def fit(learn):
        n.append(len(learn.fit_stages([Stage(16,1),Stage(32,1)], resume=True)))
        if len(n)==2: raise RuntimeError('boom')
    args = dict(n_splits=2, fit=fit, resume=True, **{**ALL, 'out':tmp_path})
    with pytest.raises(RuntimeError): cross_validate(make_learner, db, list(range(36)), **args)
    with sizes_of_all() as seen: cv = cross_validate(make_learner, db, list(range(36)), **args)
    assert len(cv.done)==36 and not seen # The second fold's stages were done
    with sizes_of_all() as seen: cross_validate(make_learner, db, list(range(36)), **{**args, 'resume':False})
    assert len(seen)==2*2*4 and (tmp_path/'fold-1'/'models'/'stages.pth').exists()

def test_each_fold_begins_with_its_own_weights_of_the_rung_before(tmp_path):
    db,starts = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32)),[]
    def fit(learn):
        starts.append({k:v.clone() for k,v in learn.model.state_dict().items()})
        learn.fit(1)
    res = climb(make_learner, db, list(range(72)), rungs=(2,None), fit=fit, n_splits=2, by='name', **{**ALL, 'out':tmp_path})
    for k in range(2):
        before,now = res.cvs[0].learner(k).model.state_dict(),starts[2+k]
        for n in before: assert torch.equal(now[n][:2] if before[n].shape[:1]==(2,) else now[n], before[n]), (k, n)
    assert not torch.equal(starts[2]['4.weight'][:2], starts[3]['4.weight'][:2])
