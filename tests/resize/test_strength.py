"Augmentation, dropout and mixup that rise with the size"
import numpy as np, pytest, torch
import albumentations as A
from torch import nn
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.layers import ConvLayer
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import Flip, Resize, aug_transforms
from fastai.vision.core import PILImage, TensorImage
from fastai.vision.data import ImageBlock
from fasttransform import Pipeline
from fastai_tricks.all import AlbumentationsTfm, ProgressiveResize, albu_transforms
from fastai_tricks.core.test_utils import tiny_dls, tiny_learner
from fastai_tricks.resize.strength import at_strength

def parity(i): return i%2

def test_fastai_transforms_at_half_strength():
    fs = aug_transforms(flip_vert=True)
    def ps(fs): return [f.keywords['p'] if hasattr(f, 'keywords') else f.p for t in fs for k in ('aff_fs','coord_fs','fs') for f in getattr(t, k, [])]
    was = ps(fs)
    assert ps(at_strength(fs, .5))==[.5*p for p in was] and ps(fs)==was and len(was)>=5
    x = TensorImage(torch.rand(64, 3, 16, 16))
    def changed(s):
        y = Pipeline(at_strength([Flip(p=1.)], s), split_idx=0)(x.clone())
        return (torch.Tensor(y-x).abs().amax((1,2,3))>1e-3).float().mean().item()
    assert changed(1.)==1 and .2<changed(.5)<.8 and changed(0.)==0
    r = Resize(9)
    assert at_strength([r], .5)[0] is r

@pytest.mark.parametrize('val', [.5, (1.,.5), (.5,), (.5,2.), (-.5,1.), ('a',1)])
def test_bad_strength(val):
    with pytest.raises(ValueError, match='`strength`'): ProgressiveResize(strength=val)

class Note(Callback):
    "What the training step works with"
    order = 100
    def before_fit(self): self.got,self.valid = [],[]
    def before_batch(self):
        drop = self.model[0][3].p
        mix = [cb.distrib.concentration1.item() for cb in self.learn.cbs if isinstance(cb, (MixUp,CutMix))]
        (self.got if self.training else self.valid).append((self.x.shape[-1], drop, *mix))

class Raise(Callback):
    order,run_valid = 101,False
    def __init__(self, ex, event): setattr(self, event, self.go); self.ex = ex
    def go(self):
        if self.iter==1: raise self.ex('boom')

def strong_learner(*cbs, item=None, num_workers=0):
    dls = tiny_dls(item_tfms=item or albu_transforms(64), batch_tfms=aug_transforms(), num_workers=num_workers)
    m = nn.Sequential(nn.Sequential(ConvLayer(3,8,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.4)), nn.Linear(8,2))
    return Learner(dls, m, loss_func=CrossEntropyLossFlat(), splitter=lambda m: [list(m[0].parameters()),list(m[1].parameters())], cbs=[*cbs,Note()])

def rising(**kwargs): return ProgressiveResize(mult=8, hold=.25, strength=(.5,1.), **kwargs)

@pytest.mark.parametrize('mix', [MixUp,CutMix])
@pytest.mark.parametrize('first', [True,False])
def test_strength_rises(mix, first):
    cbs = [rising(),mix(.4)]
    learn = strong_learner(*(cbs if first else cbs[::-1]))
    with learn.no_bar(), learn.no_logging(): learn.fit(4)
    got = learn.note.got
    for i in (1,2): assert [o[i] for o in got]==pytest.approx([.25]*3 + [.3]*3 + [.35]*3 + [.4]*3)
    assert all(o==pytest.approx((64,.4,.4)) for o in learn.note.valid) and len(learn.note.valid)==4

def test_off_by_default():
    learn = strong_learner(ProgressiveResize(mult=8, hold=.25), MixUp(.4))
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert all(o[1:]==pytest.approx((.4,.4)) for o in learn.note.got) and len(learn.note.got)==6

@pytest.mark.parametrize('num_workers', [0,2])
def test_augmentation_rises(num_workers):
    "Seen in how often the loader's own copies invert a white image"
    class Sure(AlbumentationsTfm):
        "Inverts with the probability that its strength is"
        def __init__(self, s=1.): super().__init__([A.Resize(64, 64),A.InvertImg(p=s)], [A.Resize(64, 64)]); self.s = s
        def at_strength(self, s): return Sure(self.s*s)
    class Dark(Callback):
        order = 100
        def before_fit(self): self.got = []
        def before_batch(self): self.got.append((self.training, (torch.Tensor(self.x).mean((1,2,3))<.3).float().mean().item()))
    white = lambda i: PILImage.create(np.full((64,64,3), 255, np.uint8))
    dls = DataBlock((ImageBlock,CategoryBlock), get_x=white, get_y=parity, splitter=IndexSplitter(range(8)), item_tfms=Sure()).dataloaders(list(range(208)), bs=50, num_workers=num_workers, device='cpu')
    learn = tiny_learner(dls, cbs=[ProgressiveResize(sizes=[32], until=.5, strength=(.2,1.)),Dark()])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    train = [d for t,d in learn.dark.got if t]
    assert np.mean(train[:4])==pytest.approx(.2, abs=.12) and train[4:]==[1.]*4
    assert {d for t,d in learn.dark.got if not t}=={0.}
    assert dls.train.after_item.fs[0].s==1

ENDS = [(None,None), (RuntimeError,'before_batch')] + [(ex,'before_backward') for ex in (CancelFitException,CancelEpochException,CancelTrainException,RuntimeError,KeyboardInterrupt)]

@pytest.mark.parametrize('ex,event', ENDS)
def test_all_is_given_back(ex, event):
    learn = strong_learner(rising(), MixUp(.4))
    distrib,item_fs,batch_fs = learn.mix_up.distrib,list(learn.dls.train.after_item.fs),list(learn.dls.train.after_batch.fs)
    loss_func = learn.loss_func
    with learn.no_bar(), learn.no_logging():
        cbs = [Raise(ex, event)] if ex else []
        if ex in (RuntimeError,KeyboardInterrupt):
            with pytest.raises(ex): learn.fit(2, cbs=cbs)
        else: learn.fit(1, cbs=cbs)
        assert learn.model[0][3].p==.4 and learn.mix_up.distrib is distrib
        assert all(a is b for a,b in zip(learn.dls.train.after_item.fs, item_fs)) and all(a is b for a,b in zip(learn.dls.train.after_batch.fs, batch_fs))
        learn.loss_func = loss_func # fastai's own `MixUp` leaves its own behind after an error
        learn.fit(2)
    assert [o[1] for o in learn.note.got]==pytest.approx([.3]*3 + [.4]*3)

def test_prediction_within_a_training():
    ps = []
    class InBetween(Callback):
        order,run_valid = 90,False
        def after_batch(self):
            self.learn.predict(3)
            self.model.train()
            self.learn.training = True
            ps.append(self.model[0][3].p)
    learn = strong_learner(rising())
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=InBetween())
    assert ps==pytest.approx([.3]*3 + [.4]*3) and learn.model[0][3].p==.4

def test_fine_tune_is_weakest_while_frozen():
    learn = strong_learner(rising())
    got = []
    class Keep(Callback):
        order,run_valid = 102,False
        def before_batch(self): got.append(self.model[0][3].p)
    learn.add_cb(Keep())
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(4, freeze_epochs=2)
    assert got[:6]==pytest.approx([.2]*6) and got==sorted(got) and got[-1]==.4

def test_without_small_sizes_it_is_full_strength():
    learn = strong_learner(ProgressiveResize(1., strength=(.5,1.)))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert {o[1] for o in learn.note.got}=={.4}

def test_in_the_loader_where_it_can_be(capsys):
    learn = strong_learner(ProgressiveResize(sizes=[32], until=.5, strength=(.5,1.)))
    with learn.no_bar(): learn.fit(2)
    out = capsys.readouterr().out
    assert 'in the loader' in out and 'strength 0.5 to 1' in out
    assert [o[0] for o in learn.note.got]==[32]*3 + [64]*3
