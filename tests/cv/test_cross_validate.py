"`cross_validate`: no model is scored on what it saw; it goes on by itself, and takes up nothing of another run"
import random
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import ColReader, RandomSplitter
from fastai.learner import Learner, defaults
from fastai.losses import MSELossFlat
from fastai.metrics import accuracy_multi
from fastai.vision.augment import Flip, Resize
from fastai.vision.data import ImageBlock
from fastai_tricks.cv.cross_validate import cross_validate
from fastai_tricks.resize.stages import Stage
from climb_run import block, kind, make_learner, noise
import fastai_tricks.data.subset

def fit_once(learn): learn.fit(1)
def args(out, **kwargs): return dict(n_splits=2, fit=fit_once, num_workers=0, device='cpu', bs=4, out=out) | kwargs

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

def table_block(): return DataBlock((ImageBlock,CategoryBlock), get_x=lambda r: noise(r.i), get_y=ColReader('label'), item_tfms=Resize(16))

def test_with_groups_in_a_table(tmp_path):
    df = pd.DataFrame(dict(i=range(48), label=[kind(i) for i in range(48)], patient=[i//4 for i in range(48)]))
    cv = cross_validate(make_learner, table_block(), df, **args(tmp_path, n_splits=3, groups='patient'))
    for t,v in cv.folds.splits: assert not set(df.patient[t]) & set(df.patient[v])
    assert [cv.vocab[y] for y in cv.targs]==cv.items.label.tolist() and cv.scores.valid.sum()==48
    new = pd.DataFrame(dict(i=[500,501], label='a', patient=0))
    p = cv.predict(new)
    assert p.shape==(2,6) and torch.allclose(p.sum(1), torch.ones(2)) and cv.predict(new, tta=2).shape==(2,6)
    assert torch.allclose(p, torch.stack([(l := cv.learner(k)).get_preds(dl=l.dls.test_dl(new))[0] for k in range(3)]).mean(0), atol=1e-6)

def test_each_item_is_predicted_by_the_model_that_did_not_see_it(tmp_path):
    seen = {}
    def fit(learn):
        seen[len(seen)] = set(learn.dls.train_ds.items)
        learn.fit(1)
    db = block(batch_tfms=Flip(), splitter=RandomSplitter(seed=1)).class_subset(3)
    cv = cross_validate(make_learner, db, list(range(72)), **args(tmp_path, fit=fit))
    assert len(cv.items)==36
    new,each = [500,501,502],[]
    for k in range(2):
        rows = cv.folds.at(k)
        assert not {cv.items[int(i)] for i in rows} & seen[k]
        learn = cv.learner(k)
        def preds(items): return learn.get_preds(dl=learn.dls.test_dl(items))[0]
        with learn.no_bar():
            p = preds([cv.items[int(i)] for i in rows])
            each.append(torch.cat([preds([i]) for i in new]))
        assert torch.allclose(p, cv.oof[rows], atol=1e-5)
        learn.load(Path(cv.files[k]).resolve().with_suffix(''), with_opt=False)
    # The ensemble, in the order of its items
    p = cv.predict(new)
    assert torch.allclose(p, torch.stack(each).mean(0), atol=1e-5) and not torch.allclose(p, p.flip(0), atol=1e-4)

def test_some_folds_only(tmp_path):
    cv = cross_validate(make_learner, block(), list(range(72)), **args(tmp_path, n_splits=5, folds=[3]))
    assert list(cv.scores.index)==[3] and (~cv.oof.isnan().any(1)).nonzero().flatten().tolist()==list(cv.done) and (cv.targs==-1).sum()==72-len(cv.done)
    with pytest.raises(ValueError, match=r'`fold` must be one of \[3\]'): cv.learner(0)

def test_several_labels_and_numbers(tmp_path):
    multi = block(lambda i: [kind(i)] + (['x'] if i%4==0 else []), MultiCategoryBlock)
    def make(dls): return Learner(dls, make_learner(dls).model, metrics=accuracy_multi)
    cv = cross_validate(make, multi, list(range(72)), **args(tmp_path/'multi'))
    assert cv.targs.shape==cv.oof.shape==(72,7) and cv.vocab==list('abcdefx') and cv.oof.min()>0 and cv.targs[0].tolist()==[1,0,0,0,0,0,1]
    cv.plot()
    def regress(dls): return Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12,1)), loss_func=MSELossFlat())
    cv = cross_validate(regress, block(lambda i: i/72, RegressionBlock), list(range(24)), **args(tmp_path/'number'))
    assert cv.oof.shape==(24,1) and torch.allclose(cv.targs, torch.arange(24)/72) and cv.vocab is None
    cv.plot()

def test_workers(tmp_path):
    cv = cross_validate(make_learner, block(), list(range(36)), **args(tmp_path, folds=[0], num_workers=2))
    assert cv.learner(0).dls.test_dl([1]).fake_l.num_workers==2 and cv.predict([1,2,3]).shape==(3,6)

def test_random_states_stay(tmp_path):
    torch.manual_seed(123) # Two runs of one seed would end in the same state
    before = torch.get_rng_state()
    cv = cross_validate(make_learner, block(), list(range(36)), **args(tmp_path, folds=[0]))
    assert torch.equal(torch.get_rng_state(), before)
    state = random.getstate()
    cv.predict([1])
    assert random.getstate()==state

# What is taken up -------------------------------------------------------------

def test_goes_on_after_a_crash_by_itself_and_deletes_nothing(tmp_path, capsys):
    n = []
    def fit(learn):
        n.append(1)
        if len(n)==2: raise RuntimeError('out of memory')
        learn.fit(1)
    kwargs = args(tmp_path, fit=fit)
    with pytest.raises(RuntimeError): cross_validate(make_learner, block(), list(range(36)), **kwargs)
    assert f"cross_validate: 2 fits of 18 images, 6 classes; files in '{tmp_path.name}'" in capsys.readouterr().out
    first = (tmp_path/'fold-0.pth').read_bytes()
    cv = cross_validate(make_learner, block(), list(range(36)), **kwargs)
    assert len(n)==3 and list(cv.scores.index)==[0,1] and (tmp_path/'fold-0.pth').read_bytes()==first
    assert f"1 already done in '{tmp_path.name}' (resume=False starts over)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="fit: .*Choose another `out`, or start over with resume=False; where only the code is another, resume='force' takes what is there"):
        cross_validate(make_learner, block(), list(range(36)), **kwargs | dict(fit=fit_once))
    assert (tmp_path/'fold-0.pth').read_bytes()==first

def test_rows_and_labels_are_checked(tmp_path):
    df = pd.DataFrame(dict(i=range(48), label=[kind(i) for i in range(48)], g=[i//4 for i in range(48)]))
    kwargs = args(tmp_path, n_splits=3, folds=[0], groups='g', stratify=False)
    cross_validate(make_learner, table_block(), df, **kwargs)
    with pytest.raises(ValueError, match='training items of .* differ'): cross_validate(make_learner, table_block(), df.sample(frac=1, random_state=1), **kwargs)
    with pytest.raises(ValueError, match='training labels of 32 items differ'): cross_validate(make_learner, table_block(), df.assign(label=df.label[::-1].tolist()), **kwargs)

def test_weights_of_another_run_are_not_taken(tmp_path):
    kwargs = args(tmp_path, folds=[0])
    a = cross_validate(make_learner, block(), list(range(36)), **kwargs)
    b = cross_validate(make_learner, block(), list(range(36)), **kwargs | dict(fit=lambda learn: learn.fit(2, .1), resume=False))
    with pytest.raises(ValueError, match='was overwritten by another run'): a.predict([1,2])
    assert b.predict([1,2]).shape==(2,6)

def test_callbacks_that_write_files(tmp_path):
    fit = lambda learn: learn.fit(1, cbs=[CSVLogger(),SaveModelCallback()])
    cross_validate(make_learner, block(), list(range(36)), **args(tmp_path, fit=fit, seed=np.int64(3)))
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*.*') if p.parent.name!=tmp_path.name)==['fold-0/history.csv','fold-0/models/model.pth','fold-1/history.csv','fold-1/models/model.pth']

def test_fit_stages_in_a_fold(tmp_path):
    "Each fold has its own checkpoint; a crash in between costs no stage; resume=False starts over"
    n = []
    def fit(learn):
        n.append(len(learn.fit_stages([Stage(8,1),Stage(16,1)], resume=True)))
        if len(n)==2: raise RuntimeError('boom')
    kwargs = args(tmp_path, fit=fit)
    with pytest.raises(RuntimeError): cross_validate(make_learner, block(), list(range(36)), **kwargs)
    with sizes_of_all() as seen: cv = cross_validate(make_learner, block(), list(range(36)), **kwargs)
    assert len(cv.done)==36 and not seen # The second fold's stages were done
    with sizes_of_all() as seen: cross_validate(make_learner, block(), list(range(36)), resume=False, **kwargs)
    assert len(seen)==2*2*4 and (tmp_path/'fold-1'/'models'/'stages.pth').exists()

# Batches ----------------------------------------------------------------------

def test_default_batches_are_made_to_fit_and_it_is_said(tmp_path, capsys):
    seen = []
    def fit(learn):
        seen.append(learn.dls.bs)
        learn.fit(1)
    cross_validate(make_learner, block(), list(range(60)), **args(tmp_path, fit=fit, bs=None, folds=[1]))
    assert seen==[24] and 'cross_validate: batches of 24, as fold 0 has 30 training images\n' in capsys.readouterr().out
    with pytest.raises(ValueError, match='`bs` must be at most the 30 training images of fold 0 of 6 classes, not 31'):
        cross_validate(make_learner, block(), list(range(60)), **args(tmp_path, bs=31))

def test_a_learner_or_loaders_in_the_place_of_what_makes_them(tmp_path):
    from fastai_tricks.core.test_utils import tiny_learner
    learn = tiny_learner()
    with pytest.raises(ValueError, match='`make_learner` must be a function'): cross_validate(learn, DataBlock(), [1,2], out=tmp_path/'a')
    with pytest.raises(ValueError, match='`dblock` must be a DataBlock'): cross_validate(tiny_learner, learn.dls, [1,2], out=tmp_path/'a')
    assert not (tmp_path/'a').exists()
