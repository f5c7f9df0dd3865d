"`fit_fast` says at its end that it waited for images, where that took more than a quarter of its time"
import numpy as np, pytest, torch
from PIL import Image
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, parent_label
from fastai.vision.augment import Flip, Resize
from fastai.vision.data import ImageBlock
import fastai_tricks.all as ft
from fastai_tricks.train import loader_report as R, stopwatch as S
from heads import frozen, loaders, plain

@pytest.fixture
def clock(monkeypatch):
    t = [0.]
    for m in (S,R): monkeypatch.setattr(m, 'now', lambda: t[0])
    return t

def slow(learn, clock, item=0., batch=0., step=0.):
    "Seconds of an item, of the transforms of a batch, and of a training step"
    dl = learn.dls.train
    do_item,after_item,pipe = dl.do_item,dl.after_item,dl.after_batch
    def slower(o, seconds):
        clock[0] += seconds
        return o
    dl.do_item = lambda i: slower(do_item(i), item)
    pipe.fs.append(Batch(lambda b: slower(b, batch)))
    class Step(Callback):
        def before_backward(self): clock[0] += step
    return Step()

class Batch:
    name,order = 'batch',100
    def __init__(self, f): self.f = f
    def __call__(self, b, split_idx=None, **kwargs): return self.f(b) if split_idx==0 else b

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    d = tmp_path_factory.mktemp('photos')
    for i in range(32):
        (d/'ab'[i%2]).mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40,50,3), dtype=np.uint8)).save(d/'ab'[i%2]/f'{i}.jpg')
    return sorted(d.glob('*/*.jpg'))

def dls(photos, cached=False):
    block = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, splitter=IndexSplitter(range(8)), item_tfms=Resize(32), batch_tfms=Flip())
    return (ft.cached(block) if cached else block).dataloaders(photos, bs=8, num_workers=0, device='cpu')

ASKED = dict(pretrained=True, head=0, mixed=False)

def said(learn, clock, capsys, epochs=4, **kwargs):
    step = slow(learn, clock, **kwargs)
    learn.recorder.train_metrics = False
    cbs = [id(cb) for cb in learn.cbs]
    capsys.readouterr()
    learn.fit_fast(epochs, cbs=step, **ASKED)
    assert not learn.cbs.filter(lambda cb: isinstance(cb, S.WaitClock))
    return [l for l in capsys.readouterr().out.splitlines() if 'waited' in l]

def test_a_line_at_the_end(photos, clock, capsys):
    "12 steps: .8 seconds of waiting, 1.2 of training"
    learn = frozen(dls(photos))
    assert said(learn, clock, capsys, item=.2, step=2.4)==['fit_fast: waited 40% of the time for images: `cached(dblock)` decodes each one once, '
                                                            '`learn.loader_report()` says what would help']

def test_images_that_are_no_files(clock, capsys):
    assert said(frozen(), clock, capsys, item=.2, step=2.4)==['fit_fast: waited 40% of the time for images: `learn.loader_report()` says what would help']

@pytest.mark.parametrize('kw', [dict(item=.1, step=2.5), dict(item=.02, step=.1), dict(batch=1.6, step=2.4)], ids=['network','short','batch_transforms'])
def test_no_line(photos, clock, capsys, kw): assert not said(frozen(dls(photos)), clock, capsys, **kw)

def test_none_with_a_cache(photos, clock, capsys):
    assert not said(frozen(dls(photos, cached=True)), clock, capsys, item=.2, step=2.4)

def test_none_where_logging_is_off(photos, clock, capsys):
    learn = frozen(dls(photos))
    with learn.no_logging(), learn.no_bar(): assert not said(learn, clock, capsys, item=.2, step=2.4)

def test_none_after_an_error(photos, clock, capsys):
    class Fails(Callback):
        def after_fit(self): raise RuntimeError('stop')
    learn = frozen(dls(photos))
    step = slow(learn, clock, item=.2, step=2.4)
    with pytest.raises(RuntimeError, match='stop'): learn.fit_fast(4, cbs=[step,Fails()], **ASKED)
    assert 'waited' not in capsys.readouterr().out

def test_the_same_weights(photos):
    "The clock changes nothing"
    res = []
    for looks in (False,True):
        learn = frozen(dls(photos))
        torch.manual_seed(1)
        learn.dls.train.rng.seed(1)
        with learn.no_logging(), learn.no_bar():
            if looks: learn.loader_report(.01)
            learn.fit_fast(1, **ASKED)
        res.append([p.clone() for p in learn.model.state_dict().values()])
    assert all(map(torch.equal, *res))

