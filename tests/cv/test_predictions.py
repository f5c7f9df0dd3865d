"Test images that cannot be read are named and counted, and have a row as chosen; what is no fault of theirs is not said to be"
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import parent_label
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai_tricks.cv.climb import climb
from fastai_tricks.cv.cross_validate import cross_validate
from fastai_tricks.cv.predictions import ToPredict
from climb_run import noise

def block(**kwargs): return DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, item_tfms=Resize(16), **kwargs)
def make_learner(dls): return Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12,dls.c)), metrics=accuracy)
def fit_once(learn): learn.fit(1)
def never(learn): raise AssertionError('trained')
def args(out, **kwargs): return dict(n_splits=2, fit=fit_once, num_workers=0, device='cpu', bs=4, out=out, topk=None) | kwargs

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Images to train on and to predict, of which three cannot be read"
    d = tmp_path_factory.mktemp('photos')
    for f in [*(d/'train'/'ab'[i%2]/f'{i}.png' for i in range(16)), *(d/'test'/f'{i}.png' for i in range(5))]:
        f.parent.mkdir(parents=True, exist_ok=True)
        noise(int(f.stem)).save(f)
    (d/'test'/'1.png').write_bytes((d/'test'/'0.png').read_bytes()[:200]) # Cut off
    (d/'test'/'3.png').write_bytes(b'')
    return sorted((d/'train').rglob('*.png')),[*sorted((d/'test').iterdir()), d/'test'/'gone.png']

def test_they_are_refused_before_training(photos, tmp_path):
    train,test = photos
    with pytest.raises(ValueError, match="3 test images of 6 cannot be read: 'test/1.png', 'test/3.png', 'test/gone.png'. .* corrupt='mean' or 'uniform'"):
        climb(make_learner, block(), train, test_items=test, **args(tmp_path, rungs=[None], fit=never))
    with pytest.raises(ValueError, match='2 test images of 2 cannot be read'): # No row to take the mean of
        climb(make_learner, block(), train, test_items=[test[1],test[3]], corrupt='mean', **args(tmp_path, rungs=[None], fit=never))
    with pytest.raises(ValueError, match="`corrupt` must be one of 'refuse', 'mean', 'uniform'"): climb(make_learner, block(), train, corrupt='skip', **args(tmp_path))

def test_they_have_the_row_that_was_chosen(photos, tmp_path, capsys):
    train,test = photos
    kwargs = args(tmp_path, rungs=[None])
    def sub(corrupt, **more): return pd.read_csv(climb(make_learner, block(), train, test_items=test, corrupt=corrupt, **kwargs | more).table.submission.iloc[0])[['a','b']].to_numpy()
    bad,good = [1,3,5],[0,2,4]
    mean = sub('mean')
    assert 'their row is the mean of the others' in capsys.readouterr().out
    uniform = sub('uniform', fit=never, resume='force')
    assert np.allclose(mean[bad], mean[good].mean(0), atol=1e-6) and (uniform[bad]==.5).all() and np.allclose(uniform[good], mean[good])
    sub('uniform', fit=never, resume='force')
    with pytest.raises(ValueError, match='3 test images of 6'): sub('refuse')
    cv = cross_validate(make_learner, block(), train, **{k:v for k,v in args(tmp_path/'cv').items() if k!='topk'})
    with pytest.raises(ValueError, match='3 test images of 6 cannot be read'): cv.predict(test)
    p = cv.predict(test, corrupt='mean')
    assert torch.allclose(p[good], cv.predict([test[i] for i in good])) and torch.allclose(p[bad], p[good].mean(0).expand(3, -1), atol=1e-6)

def test_tables_of_images(photos, tmp_path):
    train,test = photos
    db = DataBlock((ImageBlock,CategoryBlock), get_x=lambda r: r.file, get_y=lambda r: r.label, item_tfms=Resize(16))
    df = pd.DataFrame(dict(file=train, label=[f.parent.name for f in train]))
    cv = cross_validate(make_learner, db, df, **{k:v for k,v in args(tmp_path, folds=[0]).items() if k!='topk'})
    with pytest.raises(ValueError, match="2 test images of 3 cannot be read: 'test/1.png', 'test/gone.png'"): cv.predict(pd.DataFrame(dict(file=[test[0],test[1],test[-1]])))

def test_faults_of_loaders_are_not_those_of_test_items(photos, tmp_path):
    train,test = photos
    class Breaks(Resize):
        def encodes(self, x): raise RuntimeError('transform')
    def breaks(x): raise RuntimeError('batch')
    for kwargs,said in ((dict(item_tfms=Breaks(16)), 'transform'), (dict(batch_tfms=breaks), 'batch')):
        db = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, **dict(item_tfms=Resize(16)) | kwargs)
        with pytest.raises(RuntimeError, match=said): climb(make_learner, db, train, test_items=test[:1], **args(tmp_path, rungs=[None], fit=never))

def test_predictions_with_other_passes_are_others(photos, tmp_path):
    "`tta=True` is four passes, not one"
    train,test = photos
    assert [ToPredict([1], t).belongs['passes'] for t in (False,True,1,4)]==[0,4,1,4]
    import fastai_tricks.cv.training as m
    n,predict = [],m.predict
    def counted(learn, to, *args):
        n.append(to.tta)
        return predict(learn, to, *args)
    m.predict = counted
    try:
        for tta in (True,1,1,True): climb(make_learner, block(), train, test_items=test[:1], tta=tta, **args(tmp_path, rungs=[None], folds=[0]))
    finally: m.predict = predict
    assert n==[True,1,True]
