"`grow_head`: rows follow the names of classes, old logits stay to the last bit, all that belongs to them goes along"
from functools import partial
import numpy as np, pytest, timm, torch, torchvision
from torch import nn
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.transforms import Normalize
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy
from fastai.optimizer import OptimWrapper, SGD, ranger
from fastai.torch_core import params
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock, imagenet_stats
from fastai.vision.learner import vision_learner
from fastai.vision.models.xresnet import xresnet18
import fastai_tricks.train.precision
from fastai_tricks.models.head import GrowPlan, GrownLinear
from fastai_tricks.data.items import fixed_block
from fastai_tricks.resize.callback import ProgressiveResize

OLD,NEW = ['b','d','e'],['a','b','c','d','e','f']
KEPT = [NEW.index(c) for c in OLD]
FRESH = [i for i in range(6) if i not in KEPT]

def noise(i): return PILImage.create(np.random.default_rng(i).integers(0, 255, (32,32,3), dtype=np.uint8))
def label(i): return NEW[i%6]
def tags(i): return [NEW[i%6],NEW[i//6%6]]

def loaders(names, multi=False, **kwargs):
    db = DataBlock((ImageBlock,MultiCategoryBlock if multi else CategoryBlock), get_x=noise, get_y=tags if multi else label, item_tfms=Resize(32), **kwargs)
    of = [i for i in range(48) if (set(tags(i)) & set(names) if multi else label(i) in names)]
    return fixed_block(db, list(range(48)), (of[8:],of[:8]), names).dataloaders(None, bs=8, num_workers=0, device='cpu')

def tiny(c, end=()): return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, c), *end)
def tiny_learner(names=OLD, multi=False, **kwargs):
    dls = loaders(names, multi)
    return Learner(dls, tiny(dls.c), splitter=lambda m: [params(m[:3]), params(m[3:])], **kwargs)

def fit(learn, n=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kwargs)

def grow(learn, names, **kwargs):
    with learn.no_logging(): return learn.grow_head(loaders(names, **kwargs))

MODELS = dict(
    tiny=lambda dls: Learner(dls, tiny(dls.c)),
    xresnet=lambda dls: Learner(dls, xresnet18(n_out=dls.c)),
    vision_resnet=lambda dls: vision_learner(dls, torchvision.models.resnet18, pretrained=False),
    vision_bn_final=lambda dls: vision_learner(dls, 'test_resnet', pretrained=False, bn_final=True),
    vision_timm=lambda dls: vision_learner(dls, 'test_resnet', pretrained=False),
    **{n:(lambda dls, n=n: Learner(dls, getattr(torchvision.models, n)(num_classes=dls.c))) for n in ('squeezenet1_1','mobilenet_v3_small')},
    **{n:(lambda dls, n=n: Learner(dls, timm.create_model(n, num_classes=dls.c)))
       for n in ('repvit_m0_9','resnet10t','mobilenetv3_small_050','test_convnext','test_efficientnet')},
    **{n:(lambda dls, n=n: Learner(dls, timm.create_model(n, num_classes=dls.c, img_size=64)))
       for n in ('test_vit','deit_tiny_distilled_patch16_224','swin_tiny_patch4_window7_224')})

@pytest.mark.parametrize('name', MODELS)
def test_old_logits_stay_to_the_last_bit(name):
    learn = MODELS[name](loaders(OLD))
    xs = [torch.randn(bs,3,64,64) for bs in (1,5)]
    model = learn.model.eval()
    with torch.no_grad():
        before = list(map(model, xs))
        grow(learn, NEW)
        after = list(map(model, xs))
        for a,b in zip(after, before): assert a.shape==(len(b),6) and torch.equal(a[:,KEPT], b)
        # and down again: the rows are the same, their products to rounding
        grow(learn, ['e','b'])
        for x,b in zip(xs, before): assert torch.allclose(model(x), b[:,[2,0]], atol=1e-5)

@pytest.mark.parametrize('name', ['tiny','vision_timm','squeezenet1_1','mobilenetv3_small_050'])
def test_trains_on_and_exports(name, tmp_path):
    learn = MODELS[name](loaders(OLD))
    learn.metrics = [accuracy]
    grow(learn, NEW)
    was = {k:v.clone() for k,v in learn.model.state_dict().items()}
    fit(learn)
    rows = [v for k,v in learn.model.state_dict().items() if v.shape[:1]==(6,) and not torch.equal(v, was[k])]
    assert rows and learn.dls.c==6
    with learn.no_bar(), learn.no_logging():
        preds,targs = learn.get_preds()
        assert preds.shape==(8,6) and learn.validate()[1]==pytest.approx((preds.argmax(1)==targs).float().mean().item())
        learn.path = tmp_path
        learn.export('l.pkl')
        loaded = load_learner(tmp_path/'l.pkl')
        with loaded.no_bar(): kind,_,p = loaded.predict(3)
    assert kind in NEW and p.shape==(6,) and list(loaded.dls.vocab)==NEW
    # A plain network of as many classes takes the weights
    MODELS[name](loaders(NEW)).model.load_state_dict(learn.model.state_dict())

def wrapped(params, **kwargs): return OptimWrapper(params, torch.optim.AdamW, **kwargs)

@pytest.mark.parametrize('opt', [None, wrapped, partial(SGD, mom=.9)], ids=['adam','wrapped','sgd'])
def test_optimiser_state_goes_along(opt):
    learn = tiny_learner(**({} if opt is None else dict(opt_func=opt)))
    fit(learn)
    w = learn.model[-1].weight
    states = lambda: learn.opt.opt.state if isinstance(learn.opt, OptimWrapper) else learn.opt.state
    before,n = dict(states()[w]),sum(map(len, learn.opt.param_lists))
    grow(learn, NEW)
    new = learn.model[-1].weight
    after = states()[new]
    assert new is not w and w not in states() and sum(map(len, learn.opt.param_lists))==n
    assert any(p is new for p in learn.opt.param_lists[-1]) and not any(p is w for ps in learn.opt.param_lists for p in ps)
    tensors = [k for k,v in before.items() if isinstance(v, torch.Tensor) and v.shape==w.shape]
    assert tensors
    for k,v in before.items():
        if k in tensors: assert torch.equal(after[k][KEPT], v) and not after[k][FRESH].any()
        else: assert torch.equal(torch.as_tensor(after[k]), torch.as_tensor(v))
    old = new.detach().clone()
    fit(learn, reset_opt=False)
    assert (new.detach()!=old).any(1).all()

def test_freeze_and_unfreeze():
    learn = tiny_learner()
    learn.freeze()
    grow(learn, NEW)
    last,first = learn.model[-1].weight,learn.model[0].weight
    assert last.requires_grad and not first.requires_grad
    was = first.detach().clone(),last.detach().clone()
    fit(learn)
    assert torch.equal(first, was[0]) and not torch.equal(last, was[1])
    learn.unfreeze()
    assert learn.opt.frozen_idx==0 and first.requires_grad
    fit(learn)
    assert not torch.equal(first, was[0])
    learn.opt.freeze_to(-1)
    grow(learn, OLD)
    assert not first.requires_grad and learn.opt.frozen_idx==len(learn.opt.param_lists)-1
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)

def test_new_rows_have_the_mean_norm_and_a_direction_of_their_own():
    learn = Learner(loaders(OLD), nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192,3)))
    w,b = (p.detach().clone() for p in learn.model.parameters())
    grow(learn, NEW)
    new = learn.model[2].weight.detach()[FRESH]
    assert torch.allclose(new.norm(dim=1), w.norm(dim=1).mean().expand(3)) and torch.nn.functional.cosine_similarity(new[0], new[1], dim=0).abs()<.5
    assert torch.allclose(learn.model[2].bias.detach()[FRESH], b.mean().expand(3))

def test_loss_metrics_and_loaders_follow():
    learn = tiny_learner(loss_func=CrossEntropyLossFlat(weight=torch.tensor([1.,2.,3.])), metrics=[accuracy,F1Score(average='macro')])
    mine = learn.loss_func
    fit(learn)
    grow(learn, NEW)
    assert learn.loss_func.func.weight.tolist()==[2,1,2,2,3,2] and mine.func.weight.tolist()==[1,2,3]
    fit(learn)
    assert len(learn.recorder.values[-1])==4
    plain = tiny_learner()
    loss = plain.loss_func
    assert grow(plain, NEW).loss_func is loss

def test_several_labels():
    learn = tiny_learner(multi=True, loss_func=BCEWithLogitsLossFlat(pos_weight=torch.tensor([1.,2.,3.])))
    fit(learn)
    grow(learn, NEW, multi=True)
    assert learn.loss_func.func.pos_weight.tolist()==[2,1,2,2,3,2]
    fit(learn)
    with learn.no_bar(): assert learn.get_preds()[0].shape==(8,6)

def test_statistics_of_the_pretrained_network_go_along():
    learn = tiny_learner()
    learn.dls.add_tfms([Normalize.from_stats(*imagenet_stats, cuda=False)], 'after_batch') # As `vision_learner` does for a pretrained network
    new = grow(learn, NEW).dls
    for dl in new.loaders: assert len([f for f in dl.after_batch.fs if isinstance(f, Normalize)])==1
    assert new.valid.one_batch()[0].min()<-1
    own = grow(learn, NEW, batch_tfms=Normalize.from_stats([0.]*3, [1.]*3, cuda=False)).dls
    assert len([f for f in own.after_batch.fs if isinstance(f, Normalize)])==1

@pytest.mark.parametrize('old,new,weighted,rows,line', [
    ('bde', 'abcdef', False, [None,0,None,1,2,None], '3 classes before, 6 now; 3 kept, 3 new, 0 dropped'),
    ('bde', 'abcdef', True, [None,0,None,1,2,None], '3 classes before, 6 now; 3 kept, 3 new, 0 dropped; class weights of the loss for new classes are the mean of the others'),
    ('abc', 'ca', True, [2,0], '3 classes before, 2 now; 2 kept, 0 new, 1 dropped')])
def test_plan(old, new, weighted, rows, line):
    plan = GrowPlan(tuple(old), tuple(new), weighted)
    assert plan.rows==rows and str(plan)==line

def test_a_second_call_changes_nothing(capsys):
    learn = tiny_learner()
    fit(learn)
    learn.grow_head(loaders(NEW))
    assert capsys.readouterr().out.strip()==f'grow_head: {GrowPlan(tuple(OLD), tuple(NEW))}'
    was,params = {k:v.clone() for k,v in learn.model.state_dict().items()},list(learn.model.parameters())
    assert learn.grow_head(loaders(NEW)) is learn
    assert not capsys.readouterr().out and all(a is b for a,b in zip(params, learn.model.parameters())) and all(torch.equal(was[k], v) for k,v in learn.model.state_dict().items())

def test_what_cannot_be_leaves_the_learner():
    learn = tiny_learner()
    dls = learn.dls
    with pytest.raises(ValueError, match="must have a class of the Learner, such as 'b'; its own are 'a', 'c'"): learn.grow_head(loaders(['a','c']))
    with pytest.raises(ValueError, match='`dls` must be DataLoaders with the new classes, not int'): learn.grow_head(8)
    odd = Learner(loaders(OLD), tiny(7))
    with pytest.raises(ValueError, match='an output for each of the 3 classes'): odd.grow_head(loaders(NEW))
    assert learn.dls is dls and learn.model[-1].out_features==3 and type(learn.model[-1]) is nn.Linear

def test_with_other_tricks():
    learn = tiny_learner(cbs=ProgressiveResize(mult=8))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1)
        learn.to_mixed(torch.bfloat16)
        learn.grow_head(loaders(NEW))
        learn.fit_one_cycle(1)
        learn.lr_find(num_it=5, show_plot=False, suggest_funcs=None)
        assert learn.tta(n=1)[0].shape==(8,6)

def test_grown_twice_keeps_each_group():
    learn = Learner(loaders(['b','d']), nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192,2)))
    x = torch.randn(7,3,64,64)
    first = learn.model(x)
    second = grow(learn, OLD).model(x)
    third = grow(learn, NEW).model(x)
    assert isinstance(learn.model[2], GrownLinear) and len(learn.model[2].row_groups)==3
    assert torch.equal(second[:,:2], first) and torch.equal(third[:,KEPT], second)

def test_lookahead_goes_along():
    learn = tiny_learner(opt_func=ranger)
    fit(learn)
    at = next(i for i,p in enumerate(learn.opt.param_lists[1]) if p is learn.model[-1].weight)
    slow = learn.opt.slow_weights[1][at].clone()
    grow(learn, NEW)
    grown = learn.opt.slow_weights[1][at]
    assert slow.shape==(3,8) and torch.equal(grown[KEPT], slow) and torch.equal(grown[FRESH], learn.model[-1].weight.detach()[FRESH])
    fit(learn, reset_opt=False)

def test_a_hidden_layer_is_not_taken_for_the_last():
    odd = Learner(loaders(['b','d']), tiny(2, [nn.ReLU(), nn.Linear(2,5)]))
    with pytest.raises(ValueError, match='an output for each of the 2 classes'): odd.grow_head(loaders(NEW))
    normed = Learner(loaders(OLD), nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(192,3))))
    with pytest.raises(ValueError, match='must end in a plain linear layer'): normed.grow_head(loaders(NEW))
