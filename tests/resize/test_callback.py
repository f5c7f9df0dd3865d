"`ProgressiveResize`: what the model received, in the kinds of data and fit that its page does not show"
import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
import numpy as np, pytest, torch
from fastcore.basics import GetAttr
from torch import nn
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import IndexSplitter
from fastai.layers import ConvLayer
from fastai.learner import Learner, load_learner
from fastai.optimizer import OptimWrapper
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.torch_core import set_seed, get_random_states, trainable_params
from fastai.vision.core import PILImage, PILMask, TensorPoint
from fastai.vision.data import ImageBlock, MaskBlock, PointBlock
from fastai_tricks.resize import loader
from fastai_tricks.all import ProgressiveResize, Stage
from fastai_tricks.core.test_utils import tiny_learner, sizes_seen

GROWS = [32,40,48,56,64]

PLACES = ['loader','before batch transforms','after']

def set_place(monkeypatch, place):
    if place!='loader': monkeypatch.setattr(loader, 'size_set', lambda *fs: None)
    if place=='after': monkeypatch.setattr(loader, 'any_batch_size', lambda fs: False)

@pytest.fixture(params=PLACES)
def place(request, monkeypatch):
    "For what must hold at each place where a batch is made small"
    set_place(monkeypatch, request.param)

@pytest.fixture
def last_place(monkeypatch): set_place(monkeypatch, 'after')

def image(i, h=64, w=64): return PILImage.create(np.random.default_rng(i).integers(0, 255, (h,w,3), dtype=np.uint8))
def wide(i): return image(i, 64, 96)
def image2(i): return image(i, 32, 32)
def mask(i): return PILMask.create(np.random.default_rng(i).integers(0, 2, (64,64), dtype=np.uint8))
def point(i): return TensorPoint([[16.,48.]])
def vector(i): return torch.tensor([float(i)])
def parity(i): return i%2

def loaders(blocks, n=24, **kwargs):
    return DataBlock(blocks, splitter=IndexSplitter(range(16,n)), **kwargs).dataloaders(list(range(n)), bs=8, num_workers=0, device='cpu')

def trained(seen): return [h for t,h,w in seen if t]
def distinct(hs): return list(dict.fromkeys(hs))

def fit_sizes(learn, f):
    "Heights of the training batches; validation is all at full size, no size falls"
    with sizes_seen(learn) as seen: f(learn)
    hs = trained(seen)
    assert {o for o in seen if not o[0]}=={(False,64,64)}
    assert hs==sorted(hs)
    return hs

class Received(Callback):
    "Note what came out of the model, and which targets it is judged by"
    order,run_valid = 100,False
    def before_fit(self): self.got = []
    def before_batch(self): self.got.append(([tuple(x.shape[-2:]) for x in self.xb], self.yb[0].clone()))

def grows(**kwargs): return ProgressiveResize(hold=.25, mult=8, **kwargs)
def grower(**kwargs): return tiny_learner(cbs=grows(), **kwargs)

# Fits -------------------------------------------------------------------------

@pytest.mark.parametrize('f', [lambda l: l.fit(4), lambda l: l.fit_flat_cos(4), lambda l: l.fit_sgdr(2, 1), lambda l: l.fit_warmup_cos(4)],
                         ids=['fit','flat_cos','sgdr','warmup_cos'])
def test_each_fit_grows_to_full(f): assert distinct(fit_sizes(grower(), f))==GROWS

def test_the_same_at_each_place(place): assert distinct(fit_sizes(grower(), lambda l: l.fit_one_cycle(4)))==GROWS

def test_it_does_what_the_plan_says(capsys):
    "The line is that of the plan, and the sizes are those of its steps"
    learn = grower()
    plan = learn.progressive_resize.plan(n_epoch=4)
    assert fit_sizes(learn, lambda l: l.fit(4))==[plan.step_at(i/12).size[0] for i in range(12)]
    capsys.readouterr()
    with learn.no_bar(): learn.fit(4)
    assert capsys.readouterr().out.splitlines()[0]==f'ProgressiveResize: {plan}'

# fine_tune --------------------------------------------------------------------

TUNES = [48]*6 + [48]*3 + [56]*2 + [64]*7 # 2 and 4 epochs of 3 batches, full size from 80% on: until=.4 here

def tunes(cbs=None, **kwargs): return tiny_learner(cbs=ProgressiveResize(until=.4, hold=.6, mult=8) if cbs is None else cbs, **kwargs)
def fine_tune(learn, **kwargs): learn.fine_tune(4, freeze_epochs=2, **kwargs)

class Small(ProgressiveResize):
    "For where fastai takes a class"
    def __init__(self): super().__init__(until=.4, hold=.6, mult=8)

class Fails(Callback):
    "Raise in the first batch of the `n`th fit"
    run_valid = False
    def __init__(self, n, ex): self.n,self.ex,self.fits = n,ex,0
    def before_train(self):
        if self.epoch==0: self.fits += 1
    def before_batch(self):
        if self.fits==self.n: raise self.ex('boom')

def test_fine_tune_never_shrinks():
    learn = tunes()
    assert fit_sizes(learn, fine_tune)==TUNES
    assert 'after_frozen' not in vars(learn)
    # The one after it is another fit
    assert fit_sizes(learn, lambda l: l.fit_one_cycle(4))[0]==32

@pytest.mark.parametrize('f', [
    lambda l: fine_tune(l, pct_start=.5, div=10., div_final=1.), lambda l: l.fine_tune_warmup(4, freeze_epochs=2)], ids=['other_schedule','warmup'])
def test_fine_tune_is_known_by_its_frozen_part(f): assert fit_sizes(tunes(), f)==TUNES

def test_fine_tune_without_parameter_groups():
    "Nothing can be frozen, so the optimiser does not tell the first part from the second"
    learn = tunes()
    learn.splitter = trainable_params
    assert fit_sizes(learn, fine_tune)==TUNES

def test_fine_tune_with_an_optimizer_of_torch():
    learn = tunes()
    learn.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
    assert fit_sizes(learn, fine_tune)==TUNES

def test_fine_tune_with_a_class_has_a_callback_in_each_part():
    assert fit_sizes(tunes(()), lambda l: fine_tune(l, cbs=Small))==TUNES

@pytest.mark.parametrize('f', [
    lambda l: l.fine_tune(4, freeze_epochs=0), lambda l: l.fine_tune_warmup(4, freeze_epochs=0), lambda l: l.fine_tune_warmup(4, freeze_epochs=2, start_epoch=2)],
    ids=['fine_tune','warmup','warmup_goes_on'])
def test_fine_tune_without_frozen_epochs(f): assert fit_sizes(tunes(), f)==TUNES[6:]

def test_fine_tune_by_hand_with_something_between():
    def by_hand(learn):
        learn.freeze()
        learn.fit_one_cycle(2, 2e-3, pct_start=.99)
        learn.validate()
        learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)
        learn.tta(n=1)
        learn.unfreeze()
        learn.fit_one_cycle(4)
    learn = tunes()
    with sizes_seen(learn) as seen: by_hand(learn)
    assert [h for h in trained(seen) if h<64]==[48]*9 + [56]*2

@pytest.mark.parametrize('n', [1,2])
def test_fine_tune_that_failed_is_forgotten(n):
    learn = tunes()
    with sizes_seen(learn), pytest.raises(RuntimeError): fine_tune(learn, cbs=Fails(n, RuntimeError))
    learn.unfreeze()
    assert fit_sizes(learn, lambda l: l.fit_one_cycle(4))[0]==32

def test_frozen_part_that_was_cancelled():
    "fastai goes on with the other part"
    learn = tunes()
    with sizes_seen(learn) as seen: fine_tune(learn, cbs=Fails(1, CancelFitException))
    assert trained(seen)==TUNES[6:]

@pytest.mark.parametrize('f', [lambda l: l.fit_one_cycle(4), lambda l: l.fit_warmup_cos(4), lambda l: l.fit(4)], ids=['one_cycle','warmup_cos','fit'])
def test_own_frozen_fit_ends_at_full(f):
    learn = grower()
    learn.freeze()
    assert distinct(fit_sizes(learn, f))==GROWS

# Fits that go on --------------------------------------------------------------

def test_start_epoch_takes_up_the_same_sizes():
    whole = fit_sizes(grower(), lambda l: l.fit_one_cycle(4))
    late = fit_sizes(grower(), lambda l: l.fit_one_cycle(4, start_epoch=2))
    assert late==whole[6:] and late[0]>32

def test_to_fp16_without_cuda():
    learn = grower().to_fp16()
    assert distinct(fit_sizes(learn, lambda l: l.fit_one_cycle(4)))==GROWS
    assert all(p.isfinite().all() for p in learn.model.parameters())

# Loaders ----------------------------------------------------------------------

def test_workers(last_place): assert fit_sizes(grower(num_workers=1), lambda l: l.fit(2))==[32,32,40,48,56,64]

@pytest.mark.parametrize('kwargs,sizes', [
    (dict(mult=16), [(32,48),(48,64),(64,96)]), # 48x72 has no such width: 64 and 80 are as near
    (dict(sizes=(32,64), mult=16), [(32,64),(48,80),(64,96)]),
    (dict(sizes=[(32,96)]), [(32,96),(64,96)])])
def test_rectangles(kwargs, sizes):
    learn = tiny_learner(loaders((ImageBlock,CategoryBlock), get_x=wide, get_y=parity), cbs=ProgressiveResize(**kwargs))
    with sizes_seen(learn) as seen: learn.fit(4)
    assert distinct([o[1:] for o in seen if o[0]])==sizes
    assert {o[1:] for o in seen if not o[0]}=={(64,96)}

class Wrapped(GetAttr):
    "A loader that hands on what another one gives"
    _default = 'dl'
    def __init__(self, dl): self.dl = dl
    def __len__(self): return len(self.dl)
    def __iter__(self): return iter(self.dl)

class WrapLoader(Callback):
    "As callbacks that move batches to other devices do"
    order = ProgressiveResize.order+1
    def before_train(self): self.learn.dl = Wrapped(self.learn.dl)

def test_loader_wrapped_by_another_callback(place):
    assert fit_sizes(tiny_learner(cbs=[ProgressiveResize(sizes=32, hold=.25, mult=8), WrapLoader()]), lambda l: l.fit(2))==[32,32,40,48,56,64]

def test_wrapped_loader(place):
    learn = grower()
    learn.dls.loaders[0] = Wrapped(learn.dls.train)
    assert fit_sizes(learn, lambda l: l.fit(2))==[32,32,40,48,56,64]

def test_smaller_batch_among_larger_ones(last_place):
    "Not an error in the middle of a training"
    class Shrink(Callback):
        order,run_valid = ProgressiveResize.order-1,False
        def before_batch(self):
            if self.iter==2: self.learn.xb = (self.x[...,:24,:24],)
    learn = tiny_learner(cbs=[ProgressiveResize(sizes=32, hold=.25, mult=8), Shrink()])
    with sizes_seen(learn) as seen: learn.fit(2)
    assert trained(seen)==[32,32,24,48,56,24]

# Predictions in between -------------------------------------------------------

@pytest.mark.parametrize('event', ['after_train','after_batch'])
def test_prediction_in_the_middle(event, place):
    class InBetween(Callback):
        order,run_valid = 90,False
        def look(self):
            self.learn.predict(3)
            self.model.train()
            self.learn.training = True
    learn = grower()
    cb = InBetween()
    setattr(cb, event, cb.look)
    with sizes_seen(learn) as seen: learn.fit(2, cbs=cb)
    assert trained(seen)==[32,32,40,48,56,64]

def test_tta_of_an_exported_learner(tmp_path):
    learn = grower()
    learn.path = tmp_path
    with sizes_seen(learn): learn.fit(1)
    learn.export('l.pkl')
    loaded = load_learner(tmp_path/'l.pkl')
    with sizes_seen(loaded) as seen: loaded.tta(dl=loaded.dls.test_dl([1,2,3]), n=2)
    assert set(seen)=={(False,64,64)}

def test_two_at_a_time():
    learn = grower()
    with sizes_seen(learn) as seen, pytest.raises(ValueError, match='one `ProgressiveResize` at a time'): learn.fit(1, cbs=ProgressiveResize(mult=16))
    assert not seen

# Targets ----------------------------------------------------------------------

class PixelLoss:
    "Cross entropy of maps with one loss an item, as `MixUp` needs it; fails where sizes differ"
    y_int,reduction = True,'mean'
    def __call__(self, pred, y):
        assert pred.shape[-2:]==y.shape[-2:]
        res = nn.functional.cross_entropy(pred, y.long(), reduction='none').mean((1,2))
        return res.mean() if self.reduction=='mean' else res

@pytest.mark.parametrize('mixup', [(), ('first',), ('last',)], ids=['alone','mixup_first','mixup_last'])
def test_masks_follow(mixup, place):
    cbs = [grows(), Received()]
    if mixup: cbs.insert(0 if mixup==('first',) else 1, MixUp())
    dls = loaders((ImageBlock,MaskBlock(codes=['a','b'])), get_x=image, get_y=mask)
    learn = Learner(dls, nn.Conv2d(3,2,3,padding=1), loss_func=PixelLoss(), cbs=cbs)
    assert distinct(fit_sizes(learn, lambda l: l.fit(4)))==GROWS
    got = learn.received.got
    assert all(xs==[tuple(y.shape[-2:])] for xs,y in got)
    # No class is invented between two
    assert all(y.dtype==torch.int64 and set(y.unique().tolist())=={0,1} for _,y in got)

def test_masks_with_fastai_loss(place):
    dls = loaders((ImageBlock,MaskBlock(codes=['a','b'])), get_x=image, get_y=mask)
    learn = Learner(dls, nn.Conv2d(3,2,3,padding=1), loss_func=CrossEntropyLossFlat(axis=1), cbs=grows())
    assert distinct(fit_sizes(learn, lambda l: l.fit(4)))==GROWS

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.a,self.head = ConvLayer(3,4,stride=2),nn.Linear(8,2)
    def forward(self, a, b): return self.head(torch.cat([self.a(o).mean((2,3)) for o in (a,b)], 1))

def test_two_image_inputs_keep_their_ratio(place):
    dls = loaders((ImageBlock,ImageBlock,CategoryBlock), n_inp=2, getters=[image,image2,parity])
    learn = Learner(dls, TwoInputs(), loss_func=CrossEntropyLossFlat(), cbs=[grows(), Received()])
    assert distinct(fit_sizes(learn, lambda l: l.fit(4)))==GROWS
    assert all(b==(a[0]//2,a[1]//2) for (a,b),_ in learn.received.got)

@pytest.mark.parametrize('pixels', [False,True], ids=['scaled','pixels'])
def test_points(pixels, place):
    block = TransformBlock(type_tfms=TensorPoint.create) if pixels else PointBlock
    m = nn.Sequential(ConvLayer(3,8,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))
    learn = Learner(loaders((ImageBlock,block), get_x=image, get_y=point), m, loss_func=MSELossFlat(), cbs=[grows(), Received()])
    assert distinct(fit_sizes(learn, lambda l: l.fit(4)))==GROWS
    for [(h,w)],y in learn.received.got:
        expected = torch.tensor([16.*w/64, 48.*h/64] if pixels else [-.5,.5])
        assert torch.allclose(torch.Tensor(y).reshape(-1,2), expected.expand(8,2))

# Cutting ----------------------------------------------------------------------

def ramp(i):
    "Red is the row, green the column: a part cut out still counts by ones, a shrunk one by more"
    y,x = np.mgrid[:64,:64].astype(np.uint8)
    return PILImage.create(np.stack([y,x,0*y], -1))
def ramp_mask(i): return PILMask.create(np.array(ramp(i))[...,0]%2)

class Steps(Callback):
    "From one row and column to the next, and the first of each, of what the model receives"
    order,run_valid = 100,False
    def before_fit(self): self.got = []
    def before_batch(self):
        x = torch.Tensor(self.x)*255
        self.got.append((x.shape[-1], x[:,0].diff(dim=1).mean().item(), x[:,1].diff(dim=2).mean().item(), x[:,:2,0,0].round().tolist()))

@pytest.mark.parametrize('crop,f,cut', [
    (None, lambda l: l.fine_tune(4, freeze_epochs=1), True), (None, lambda l: l.fit(4), False),
    (False, lambda l: l.fine_tune(4, freeze_epochs=1), False), (True, lambda l: l.fit(4), True)],
    ids=['fine_tune','fit','fine_tune_shrunk','fit_cut'])
def test_cut_or_shrunk(crop, f, cut, place):
    learn = tiny_learner(loaders((ImageBlock,CategoryBlock), get_x=ramp, get_y=parity), cbs=[grows(crop=crop), Steps()])
    fit_sizes(learn, f)
    small = [o for o in learn.steps.got if o[0]<64]
    assert small
    for size,rows,cols,first in small:
        assert rows==pytest.approx(1 if cut else 64/size, rel=.05) and cols==pytest.approx(1 if cut else 64/size, rel=.05)
        if cut: assert len(set(map(tuple, first)))>1 and all(0<=o<=64-size for yx in first for o in yx)

def test_stages_shrink():
    learn = tiny_learner(loaders((ImageBlock,CategoryBlock), get_x=ramp, get_y=parity), cbs=Steps())
    with sizes_seen(learn), TemporaryDirectory() as d:
        learn.path = Path(d)
        learn.fit_stages([Stage(32, 1, fit='fine_tune', freeze_epochs=1)])
    assert [o[0] for o in learn.steps.got]==[32]*2 and all(o[1]==pytest.approx(2, rel=.05) for o in learn.steps.got)

def test_masks_are_cut_with_the_image(place):
    dls = loaders((ImageBlock,MaskBlock(codes=['a','b'])), get_x=ramp, get_y=ramp_mask)
    class Same(Callback):
        order,run_valid = 100,False
        def before_batch(self): assert torch.equal(torch.Tensor(self.x[:,0]*255).round()%2, torch.Tensor(self.y.float()))
    learn = Learner(dls, nn.Conv2d(3,2,3,padding=1), loss_func=CrossEntropyLossFlat(axis=1), cbs=[grows(crop=True), Same()])
    assert distinct(fit_sizes(learn, lambda l: l.fit(4)))==GROWS

def test_points_are_not_cut():
    m = nn.Sequential(ConvLayer(3,8,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))
    learn = Learner(loaders((ImageBlock,PointBlock), get_x=ramp, get_y=point), m, loss_func=MSELossFlat(), cbs=[grows(), Steps()])
    fit_sizes(learn, lambda l: l.fine_tune(2))
    assert all(rows==pytest.approx(64/size, rel=.05) for size,rows,*_ in learn.steps.got)
    learn.remove_cb(learn.progressive_resize)
    with sizes_seen(learn) as seen, raises('crop', True): learn.fit(1, cbs=ProgressiveResize(crop=True))
    assert not seen

# Reproducibility --------------------------------------------------------------

def run(cbs):
    set_seed(42, reproducible=True)
    learn = tiny_learner(cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2)
    return [p.detach().clone() for p in learn.model.state_dict().values()],get_random_states()

def test_shrinking_uses_no_random_number(place):
    (w,rng),(w1,rng1),(_,rng2) = run(None),run(ProgressiveResize(sizes=1.)),run(grows())
    assert all(map(torch.equal, w, w1))
    for o in (rng1,rng2):
        assert o['random_state']==rng['random_state'] and torch.equal(o['torch_state'], rng['torch_state'])
        assert np.array_equal(o['numpy_state'][1], rng['numpy_state'][1]) and o['numpy_state'][2]==rng['numpy_state'][2]

# Bad arguments ----------------------------------------------------------------

def raises(name, val): return pytest.raises(ValueError, match=f'`{name}`.*{re.escape(repr(val))}')

@pytest.mark.parametrize('name,val', [
    ('sizes',0), ('sizes',-.5), ('sizes',1.5), ('sizes',16), ('sizes',(16,64)), ('sizes','half'), ('sizes',float('nan')),
    ('sizes',[96,64]), ('sizes',[64,64]), ('sizes',[]), ('sizes',[0]), ('sizes',['48']),
    ('until',0), ('until',1.5), ('until','.5'), ('mult',0), ('mult',.5), ('crop','yes'), ('where','gpu'),
    ('scale_bs','yes'), ('scale_bs',0), ('scale_bs',1.5), ('scale_lr','cube'), ('strength',.5), ('strength',(1.,.5))])
def test_bad_argument(name, val):
    with raises(name, val): ProgressiveResize(**{name:val})

@pytest.mark.parametrize('name,val', [('sizes',[96]), ('sizes',[32,96]), ('sizes',[(32,96)]), ('sizes',96), ('sizes',(96,96))])
def test_larger_than_the_images(name, val):
    learn = tiny_learner(cbs=ProgressiveResize(**{name:val}))
    with sizes_seen(learn) as seen, raises(name, val): learn.fit(1)
    assert not seen

def test_no_images():
    learn = Learner(loaders((TransformBlock,CategoryBlock), get_x=vector, get_y=parity), nn.Linear(1,2), cbs=ProgressiveResize(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='images'), learn.no_bar(): learn.fit(1)
