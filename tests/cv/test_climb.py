"`climb`: planned before it trains; killed anywhere and run again it loses at most a fold, and ends in the same table"
import subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.learner import Learner
from fastai.metrics import accuracy_multi
from fastai.vision.augment import RandomResizedCrop, aug_transforms
from fastai.vision.data import ImageBlock
from fastai_tricks.core.test_utils import sizes_seen
from fastai_tricks.cv.climb import accuracy_on, climb, plan_climb, Submit
from fastai_tricks.cv.folds import CV
from fastai_tricks.cv.submission import Cells
from fastai_tricks.data.items import Items
from climb_run import block, kind, make_learner, noise, run
import fastai.callback.schedule, fastai_tricks.data.subset

SCRIPT = Path(__file__).with_name('climb_run.py')
# Chains of kills, and the folds that they cost. 3, 6 and 9 training batches a fold, two folds a rung. Files: weights, record and test
# predictions of each fold, 1 to 6, then the submission, 7; a run that goes on counts those that it writes itself
KILLS = {
    'batch:2+rename:1+rename:2':3, # In a training, before its weights are there, before its record is
    'renamed:2+batch:1+rename:3':1, # Just after a record, in the next training, before its test predictions
    'rename:7+renamed:1+batch:4':1, # Before the submission, just after it, in the next rung
    'batch:16+rename:3+batch:10':3, # In the last fold of a rung, before its record, in the last rung
}
ITEMS = list(range(72))
def fit_once(learn): learn.fit(1)
def args(out, **kwargs): return dict(rungs=(2,None), fit=fit_once, n_splits=2, folds=[0], num_workers=0, device='cpu', bs=4, out=out) | kwargs

# Killed processes -------------------------------------------------------------

def results(folder):
    return pd.read_json(folder/'table.json'),torch.load(folder/'oof.pth'),{p.parent.name:p.read_text() for p in (folder/'climb').glob('*/submission.csv')}

def fits(folder): return (folder/'fits.txt').read_text().splitlines()

def same(a, b):
    (t,o,s),(t1,o1,s1) = results(a),results(b)
    pd.testing.assert_frame_equal(t, t1)
    return s==s1 and len(s)==3 and all(map(torch.equal, o, o1))

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One process that forks all runs: to import takes longer than to train"
    root = tmp_path_factory.mktemp('climb')
    r = subprocess.run([sys.executable, str(SCRIPT), str(root), '', *KILLS, 'outside'], capture_output=True, text=True)
    assert r.returncode==0, r.stdout + r.stderr
    return root

@pytest.mark.parametrize('kills', KILLS)
def test_killed_and_rerun(runs, kills):
    assert same(runs, runs/kills)
    whole,again = fits(runs),fits(runs/kills)
    assert len(whole)==6 and set(whole)==set(again) and len(again)==6+KILLS[kills]

def test_killed_from_outside_at_any_moment(runs): assert same(runs, runs/'outside') and len(fits(runs/'outside'))<=7

# In this process --------------------------------------------------------------

def test_whole_run(tmp_path, capsys):
    res = run(tmp_path)
    said = capsys.readouterr().out
    assert 'climb: 3 rungs of 2, 4, 6 classes, 2 folds, 6 fits; each rung submits 10 rows of id and label\n' in said
    assert 'rung 3/3, 6 classes, fold 2/2' in said and 'epoch 1/1' in said
    t = res.table
    assert t.classes.tolist()==[2,4,6] and t.images.tolist()==[24,48,72] and t['size'].iloc[1]==24
    for cv,row in zip(res.cvs, t.itertuples()):
        assert not cv.oof.isnan().any() and list(cv.items)==[i for i in ITEMS if kind(i) in cv.vocab]
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

def test_each_fold_begins_with_its_own_weights_of_the_rung_before(tmp_path):
    starts = []
    def fit(learn):
        starts.append({k:v.clone() for k,v in learn.model.state_dict().items()})
        learn.fit(1)
    new = [100,101,102]
    res = climb(make_learner, block(), ITEMS, test_items=new, topk=None, **args(tmp_path, fit=fit, by='name', folds=None))
    for k in range(2):
        before,now = res.cvs[0].learner(k).model.state_dict(),starts[2+k]
        for n in before: assert torch.equal(now[n][:2] if before[n].shape[:1]==(2,) else now[n], before[n]), (k, n)
    assert not torch.equal(starts[2]['4.weight'][:2], starts[3]['4.weight'][:2])
    # What is submitted is the mean of the folds, 0 for classes to come
    for cv,file in zip(res.cvs, res.table.submission):
        sub,one = pd.read_csv(file),cv.learner(0)
        with one.no_bar(): p = one.get_preds(dl=one.dls.test_dl(new))[0]
        assert np.allclose(sub[cv.vocab], cv.predict(new), atol=1e-6) and not np.allclose(sub[cv.vocab], p, atol=1e-4)
        assert not sub[[c for c in 'abcdef' if c not in cv.vocab]].to_numpy().any()

def test_sizes_of_rungs(tmp_path):
    seen = []
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=RandomResizedCrop((32,48)), batch_tfms=[*aug_transforms(size=(16,24))])
    def fit(learn):
        with sizes_seen(learn) as s: learn.fit(1)
        seen.append({o for o in s})
    climb(make_learner, db, ITEMS, **args(tmp_path, rungs=[(2,8),(4,16),(None,None)], fit=fit))
    assert seen==[{(True,8,12),(False,8,12)},{(True,16,24),(False,16,24)},{(True,16,24),(False,16,24)}]

def test_min_gain_stops_with_the_reason(tmp_path, capsys):
    kwargs = args(tmp_path, rungs=(2,4,None))
    res = climb(make_learner, block(), ITEMS, min_gain=1, **kwargs)
    assert len(res.table)==2 and 'Stopped after rung 2 of 3: the accuracy on the first 2 classes changed by' in res.stopped
    assert res.stopped in capsys.readouterr().out and res.stopped in res._repr_html_()
    res = climb(make_learner, block(), ITEMS, min_gain=-1, **kwargs)
    assert len(res.table)==3 and res.stopped is None

def test_goes_on_by_itself_and_others_are_refused(tmp_path, capsys):
    n = []
    def fit(learn): n.append(1); learn.fit(1)
    kwargs = args(tmp_path, fit=fit)
    climb(make_learner, block(), ITEMS, **kwargs)
    assert 'already done' not in capsys.readouterr().out
    climb(make_learner, block(), ITEMS, **kwargs)
    assert len(n)==2 and f'2 fits; 2 already done in {tmp_path.name!r} (resume=False starts over)' in capsys.readouterr().out
    for other,said in ((dict(seed=1), 'seed: 42 there, 1 here'), (dict(groups=[i//2 for i in ITEMS]), 'groups: not recorded'), (dict(n_splits=3), 'n_splits: '), (dict(bs=2), 'batch size: 4 there, 2 here'),
                       (dict(rungs=[(2,8),None]), 'transforms: Resize'), (dict(rungs=[3,None]), "holds the rung '1-2-classes' of another ladder"),
                       (dict(fit=lambda learn: learn.fit(1, 1e-2)), "fit: another one.*resume='force'")):
        with pytest.raises(ValueError, match=said): climb(make_learner, block(), ITEMS, **kwargs | other)
    with pytest.raises(ValueError, match='labels: 12 there, 10 here'): climb(make_learner, block(), ITEMS[:60], **kwargs)
    with pytest.raises(ValueError, match='make_learner: '): climb(lambda dls: make_learner(dls), block(), ITEMS, **kwargs)
    assert len(climb(make_learner, block(), ITEMS, **kwargs | dict(fit=lambda learn: 1/0, resume='force')).table)==2
    assert len(n)==2
    climb(make_learner, block(), ITEMS, resume=False, **kwargs)
    assert len(n)==4

def test_a_run_begun_anew_never_mixes_with_the_one_before(tmp_path):
    n = []
    def dies(learn):
        n.append(1)
        if len(n)==2: raise RuntimeError
        learn.fit(1)
    climb(make_learner, block(), ITEMS, **args(tmp_path))
    with pytest.raises(RuntimeError): climb(make_learner, block(), ITEMS, resume=False, **args(tmp_path, fit=dies))
    climb(make_learner, block(), ITEMS, **args(tmp_path, fit=dies))
    assert len(n)==3
    # Records of a rung that lost what it began from
    (tmp_path/'1-2-classes'/'fold-0-oof.pth').unlink()
    with pytest.raises(ValueError, match="did not begin from what '1-2-classes' holds"): climb(make_learner, block(), ITEMS, **args(tmp_path, fit=dies))

def test_test_items_may_come_later_or_in_another_order(tmp_path):
    n,t = [],list(range(100, 108))
    def fit(learn): n.append(1); learn.fit(1)
    kwargs = args(tmp_path, fit=fit, topk=None)
    def sub(**more): return pd.read_csv(climb(make_learner, block(), ITEMS, **kwargs, **more).table.submission.iloc[-1]).set_index('id')
    climb(make_learner, block(), ITEMS, **kwargs)
    one,two = sub(test_items=t),sub(test_items=t[::-1])
    assert len(n)==2 and list(two.index)==list(one.index[::-1]) and np.allclose(one, two.loc[one.index], atol=1e-6)

def test_na_class_and_losses_of_pytorch(tmp_path):
    def plain(dls): return Learner(dls, make_learner(dls).model, loss_func=torch.nn.CrossEntropyLoss())
    res = climb(plain, block(target=CategoryBlock(add_na=True)), ITEMS, **args(tmp_path, folds=[1], test_items=[100,101], topk=None))
    cv = res.cvs[-1]
    assert cv.vocab==['#na#',*'abcdef'] and cv.oof.shape==(72,7) and res.table.classes.tolist()==[2,6]
    assert torch.allclose(cv.oof[cv.done].sum(1), torch.ones(len(cv.done))) and [cv.vocab[i] for i in cv.targs[cv.done]]==[kind(cv.items[int(i)]) for i in cv.done]
    assert list(pd.read_csv(res.table.submission.iloc[0]).columns)==['id',*'abcdef']
    cv.plot()

def test_several_labels(tmp_path):
    def make(dls): return Learner(dls, make_learner(dls).model, metrics=accuracy_multi)
    db = block(lambda i: [kind(i)] + (['x'] if i%4==0 else []), MultiCategoryBlock)
    res = climb(make, db, ITEMS, **args(tmp_path, rungs=(3,None)))
    assert res.table.classes.tolist()==[3,7] and res.table.first_accuracy.between(0, 1).all()

def test_the_data_block_is_read_once(tmp_path):
    n = dict(items=0, splits=0)
    def get_items(source):
        n['items'] += 1
        return source
    def splitter(items):
        n['splits'] += 1
        return list(range(8, len(items))),list(range(8))
    climb(make_learner, block(get_items=get_items, splitter=splitter), ITEMS, **args(tmp_path, rungs=[2,(4,8),None], test_items=[1,2]))
    assert n==dict(items=1, splits=3) # A splitter of one's own is tried three times

# Plans ------------------------------------------------------------------------

def planned(db=None, rungs=(2,None), **kwargs): return plan_climb(Items.read(db or block(), ITEMS), rungs, **kwargs)

def test_items_without_any_label_join_with_all_classes():
    y = lambda i: [] if i%4==0 else [kind(i)]
    a,b = planned(block(y, MultiCategoryBlock)).rungs
    assert len(a.folds.rows)==sum(bool(set(y(i)) & set(a.folds.vocab)) for i in ITEMS) and len(b.folds.rows)==72

def test_default_rungs_go_as_far_as_there_are_classes():
    assert str(planned(rungs=(10,20,None), cv=CV(3, folds=[1]))).startswith('1 rung of 6 classes, 1 fold, 1 fit')
    assert [r.folds.vocab for r in planned(block(lambda i: i%12), (10,20,None)).rungs]==[list(range(10)),list(range(12))]

def test_batches_fit_each_rung_unless_they_are_asked_for(tmp_path, capsys):
    p = planned(cv=CV(2))
    assert [r.folds.bs for r in p.rungs]==[8,32]
    assert p.fitted()==['batches of 8 on rung 1, as fold 0 has 12 training images','batches of 32 on rung 2, as fold 0 has 36 training images']
    assert planned(cv=CV(2, bs=4)).fitted()==[] and planned(cv=CV(2), drop_last=False).rungs[0].folds.bs==64
    climb(make_learner, block(), ITEMS, **args(tmp_path, bs=None))
    assert 'climb: batches of 8 on rung 1, as fold 0 has 12 training images\n' in capsys.readouterr().out

def test_a_submission_is_planned_without_predictions():
    sample = pd.DataFrame({'id':['1','0'], **{c:[0,0] for c in 'fedcba'}})
    plan = Submit([0,1], sample).plan(list('abcdef'), Cells())
    assert (plan.ids,plan.order,plan.columns)==(['1','0'],[1,0],[5,4,3,2,1,0])
    assert Submit().plan(list('ab'), Cells()) is None

def test_what_cannot_be_is_said_before_training(tmp_path):
    def never(learn): raise AssertionError('trained')
    sample = pd.DataFrame({'id':['0','1'], **{c:[0,0] for c in 'abcdef'}})
    bad = [(dict(rungs=(2,9)), '`rungs` must be .*of which there are 6'), (dict(rungs=[]), '`rungs` must be'), (dict(rungs=[(2,3,4)]), '`rungs` must be'), (dict(rungs=[(2,0)]), 'size in pixels'),
        (dict(bs=64), 'at most the 12 training images of fold 0 of 2 classes'), (dict(bs=0), '`bs` must be'), (dict(tta=-1), '`tta` must be'), (dict(test_items=[]), '`test_items` must be one or more items'),
        (dict(test_items='folder'), '`test_items` must be'), (dict(sep=''), '`sep` must be a text'), (dict(resume=2), '`resume` must be'), (dict(groups=[None]*72), 'given for each item'),
        (dict(test_items=['x']), "1 test image of 1 cannot be read: 'x'"), (dict(test_items=[0,-1]), 'of 2 items 1 cannot be read, the first fails with ValueError'), (dict(min_gain='much'), '`min_gain` must be'), (dict(n_splits=1), '`n_splits` must be'), (dict(folds=[7]), '`folds` must be a list of numbers from 0 to 1'),
        (dict(fit='fine_tune'), '`fit` must be'), (dict(groups='patient'), 'a column of the items'), (dict(groups=[1,2]), 'a group for each of the 72 items'), (dict(by='size'), '`by` must be one of'),
        (dict(test_items=[1,2,3], sample=sample), 'are not in the sample'), (dict(test_items=[0,1], sample=sample.drop(columns='b')), "classes without a column: 'b'"),
        (dict(test_items=[0,1], topk=9), '`topk` must be'), (dict(test_items=[0,1], ids=['a','a']), 'not \'a\' twice')]
    for kwargs,said in bad:
        with pytest.raises(ValueError, match=said): climb(make_learner, block(), ITEMS, **args(tmp_path, fit=never) | kwargs)
    with pytest.raises(TypeError, match="climb got an unexpected argument 'test_files'; did you mean 'test_items'"): climb(make_learner, block(), ITEMS, test_files=[1], **args(tmp_path, fit=never))
    with pytest.raises(ValueError, match='must return a Learner'): climb(lambda dls: 1, block(), ITEMS, **args(tmp_path, fit=never))
    assert not list(tmp_path.glob('*/[!.]*'))

def test_accuracy_on_the_first_classes():
    rng = np.random.default_rng(0)
    p,y,vocab = torch.tensor(rng.random((50,5))),torch.tensor(rng.integers(0, 5, 50)),list('abcde')
    got = accuracy_on(p, y, vocab, ['d','b'])
    assert got==pytest.approx(np.mean([max((float(p[i,c]),c) for c in (3,1))[1]==y[i] for i in range(50) if y[i] in (3,1)]))
