"Depthwise conversion: the plan, what networks keep, and a Learner that goes on"
from dataclasses import replace
from types import SimpleNamespace
import pytest, timm, torch, torchvision
from torch import nn
from fastai.data.all import DataBlock, RandomSplitter, get_image_files, parent_label
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.all import CategoryBlock, DynamicUnet, Flip, ImageBlock, Resize, resnet18, vision_learner
from fastai.layers import ConvLayer
import fastai_tricks.all as ft
from fastai_tricks.core.test_utils import sizes_seen, tiny_dls
from fastai_tricks.data.sample import sample_images
from fastai_tricks.models import depthwise as D
from fastai_tricks.models.convert import dense_convs, n_params
from fastai_tricks.models.depthwise import DepthwisePlan, plan_depthwise
from fastai_tricks.models.inputs import training_images
from fastai_tricks.train.precision import DeviceMixedPrecision
from separated import convert, no_hooks, seps

# --- The plan

PLAN = DepthwisePlan(('a','b','c'), {'stem':"on the image's channels"}, dict(a=600,b=300,c=50), 1000, least=1.1)

def test_faster_layers_are_planned():
    fast = PLAN.faster(dict(a=1.1, b=1.0999, c=3.))
    assert fast.layers==('a','c') and fast.stay==PLAN.stay | dict(b='1.10 times as fast, less than 1.1')
    assert fast.params_after==350 and not fast.why and PLAN.layers==('a','b','c')

def test_a_layer_that_is_never_called_is_not_faster():
    assert PLAN.faster(dict(a=2.)).stay['b']=='never called'
    assert PLAN.faster({}).why=='no layer is 1.1 times as fast (the best: 0.00)'

@pytest.mark.parametrize('gain,layers', [(.99,()), (1.,('a','b','c')), (1.3,('a','b','c'))])
def test_the_whole_network_decides(gain, layers):
    plan = PLAN.as_whole(gain)
    assert plan.layers==layers and set(plan.stay)=={'stem','a','b','c'}-set(layers)
    assert plan.speedup==(gain if layers else None) and plan.params_after==(50 if layers else 1000)

def test_a_plan_in_words():
    assert str(replace(PLAN, init='fit', images=64))=='to_depthwise: 3 of 3 dense convolutions (fit, 64 images), 0.00 → 0.00 million parameters'
    assert str(replace(PLAN, params=2_000_000).as_whole(1.25))=='to_depthwise: 3 of 3 dense convolutions (svd), 2.00 → 2.00 million parameters, 1.25 times as fast in training'

NET = nn.Sequential(nn.Conv2d(3,8,3), nn.Conv2d(8,8,3), nn.Conv2d(8,16,3), nn.Conv2d(16,8,1))

@pytest.mark.parametrize('kw,layers,stay,least', [
    ({}, ('1','2'), {'0':"on the image's channels",'3':'1×1'}, None),
    (dict(select='faster'), ('1','2'), {'0':"on the image's channels",'3':'1×1'}, 1.1),
    (dict(select=2), ('1','2'), {'0':"on the image's channels",'3':'1×1'}, 2.),
    (dict(select=['2']), ('2',), {'0':"on the image's channels",'1':'not selected','3':'1×1'}, None),
    (dict(skip='1'), ('2',), {'0':"on the image's channels",'1':'in `skip`','3':'1×1'}, None)])
def test_what_is_asked_for_is_planned(kw, layers, stay, least):
    plan = plan_depthwise(NET, **kw)
    assert (plan.layers,plan.stay,plan.least)==(layers,stay,least) and plan.params==n_params(NET)

@pytest.mark.parametrize('kw', [{}, dict(multiplier=2), dict(norm=True), dict(select='2')])
def test_planned_parameters_are_those_of_the_copy(kw):
    assert plan_depthwise(NET, **kw).params_after==n_params(convert(NET, **kw))

@pytest.mark.parametrize('model,why', [(nn.Sequential(nn.Conv2d(8,8,1)),'there is no dense convolution'), (nn.Sequential(nn.Linear(2,2)),'there is no dense convolution')])
def test_nothing_to_convert(model, why, capsys):
    new = ft.to_depthwise(model)
    assert new is not model and why in capsys.readouterr().out

def test_nothing_selected(capsys):
    assert not seps(ft.to_depthwise(NET, select=lambda n,c: False)) and '`select` chose none' in capsys.readouterr().out

def test_planning_changes_nothing():
    state = torch.random.get_rng_state()
    convert(NET, torch.randn(4,3,16,16, generator=torch.Generator()))
    assert torch.equal(state, torch.random.get_rng_state()) and not seps(NET)

def clock(monkeypatch, layers, network):
    "Layers are `layers(conv)` times as fast, and the network `network` times"
    monkeypatch.setattr(D, 'time_layers', lambda pairs, *args: {n:[[layers(c)],[1.]] for n,(c,_) in pairs.items()})
    monkeypatch.setattr(D, 'steady_times', lambda fs: [[network],[1.]])

def test_faster_takes_what_the_clock_says(monkeypatch, capsys):
    model = timm.create_model('resnet18')
    clock(monkeypatch, lambda c: 1.5 if c.in_channels>=256 else 1., 2.)
    assert {n.split('.')[0] for n in seps(convert(model, select='faster', size=32))}=={'layer3','layer4'}
    assert seps(ft.to_depthwise(model, select=1.6, size=32))==[]
    assert 'nothing is converted: no layer is 1.6 times as fast (the best: 1.50)' in capsys.readouterr().out
    clock(monkeypatch, lambda c: 1.5, .5) # Each layer gains, the whole loses
    assert seps(ft.to_depthwise(model, select='faster', size=32))==[]
    assert 'not the whole network' in capsys.readouterr().out

# --- Networks

def logits_error(learn, model):
    x,_ = learn.dls.valid.one_batch()
    with torch.no_grad(): a,b = learn.model.eval()(x),model.eval()(x)
    return ((a-b).pow(2).sum()/(a-a.mean(0)).pow(2).sum()).item()

def test_fit_beats_svd_beats_random(trained):
    x = training_images(trained, 128)[0]
    errors = [logits_error(trained, convert(trained.model, x, init=i)) for i in ('fit','svd','random')]
    assert errors==sorted(errors) and errors[0]<.6*errors[1]
    assert logits_error(trained, convert(trained.model, x, multiplier=4))<errors[0]

def test_exact_conversion_leaves_batch_norms(trained):
    assert logits_error(trained, convert(trained.model, training_images(trained, 32)[0], init='svd', multiplier=9))<1e-6

@pytest.mark.parametrize('init', ['svd','fit'])
def test_norm_changes_no_output(trained, init):
    x = training_images(trained, 32)[0]
    a,b = (convert(trained.model, x, init=init, norm=o).eval() for o in (False,True))
    assert any(hasattr(b.get_submodule(n), 'norm') for n in seps(b))
    with torch.no_grad(): assert torch.allclose(a(x), b(x), atol=1e-2)
    if init=='svd':
        a,b = (convert(trained.model, norm=o).eval() for o in (False,True))
        with torch.no_grad(): assert torch.allclose(a(x), b(x), atol=1e-2)

def _torchvision(name, **kwargs): return lambda: getattr(torchvision.models, name)(weights=None, **kwargs)
MODELS = { # How many layers convert
    'resnet18':16, 'resnet50':16, 'resnet18d':18, 'repvgg_a0':None, 'densenet121':58, 'regnetx_002':0, 'mobilenetv3_small_050':0, 'tf_efficientnet_lite0':0, 'tf_efficientnetv2_b0':5,
    'resnetv2_50x1_bit':0, 'vit_tiny_patch16_224':0, 'convnext_atto':3, 'resnest14d':None, _torchvision('resnet18'):16, _torchvision('squeezenet1_1'):8,
    _torchvision('googlenet', init_weights=False):None}

@pytest.mark.parametrize('name', MODELS, ids=lambda n: n if isinstance(n, str) else 'torchvision')
def test_networks(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7) if isinstance(name, str) else name()
    size = 224 if 'vit' in str(name) else 48
    model.eval()
    was = {k:v.clone() for k,v in model.state_dict().items()}
    x = torch.randn(2,3,size,size)
    new = convert(model, x)
    found = seps(new)
    if MODELS[name] is not None: assert len(found)==MODELS[name]
    with torch.no_grad(): a,b = model(x),new(x)
    assert a.shape==b.shape and torch.isfinite(b).all()
    assert not seps(model) and all(torch.equal(v, was[k]) for k,v in model.state_dict().items())
    if not found: assert torch.equal(a, b)
    assert no_hooks(model) and no_hooks(new)
    assert all(c.in_channels<=4 for c,why in dense_convs(new).values() if not why or 'image' in why)
    assert n_params(new)==plan_depthwise(model).params_after<=n_params(model)

@pytest.mark.parametrize('kw,word', [
    (dict(init='pca'), '`init`'), (dict(multiplier=0), '`multiplier`'), (dict(multiplier=1.5), '`multiplier`'), (dict(select='layer9'), '`select`'), (dict(select=['conv1']), "image's channels"),
    (dict(skip=['nope']), '`skip`'), (dict(select=0), '`select`'), (dict(select=-1.5), '`select`'), (dict(select=True), '`select`'), (dict(select=None), '`select` must be'),
    (dict(init='fit'), '`batches`'), (dict(n=0), '`n`')])
def test_bad_input(kw, word):
    with pytest.raises(ValueError, match=word): convert(timm.create_model('resnet18'), **kw)

def test_not_a_model():
    with pytest.raises(ValueError, match='`model`'): convert('resnet18')

def test_half_and_double_weights():
    for dtype in (torch.bfloat16,torch.float64):
        model = timm.create_model('resnet10t', channels=(16,16,16,16)).to(dtype)
        new = convert(model, torch.randn(8,3,32,32))
        assert {p.dtype for p in new.parameters()}=={dtype} and torch.isfinite(new.eval()(torch.randn(1,3,32,32, dtype=dtype))).all()

# --- Learner

def make(arch=resnet18, cbs=None, **kwargs):
    files = sorted(f for p in sorted(sample_images().iterdir())[:5] if p.is_dir() for f in get_image_files(p))[::2]
    block = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, splitter=RandomSplitter(seed=1), item_tfms=Resize(48), batch_tfms=Flip())
    dls = block.dataloaders(files, bs=8, num_workers=0, device='cpu')
    return vision_learner(dls, arch, pretrained=False, normalize=False, metrics=accuracy, cbs=cbs, **kwargs)

def test_learner_goes_on(tmp_path):
    learn = make(path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        dense,n_groups = learn.model,len(learn.splitter(learn.model))
        assert learn.to_depthwise(n=16) is learn and learn.model is not dense and not seps(dense)
        assert len(seps(learn.model))==16
        # The body stays frozen, its batch norms train
        frozen = [n for n,p in learn.model.named_parameters() if not p.requires_grad]
        assert frozen==[n for n,p in learn.model[0].named_parameters(prefix='0') if 'bn' not in n and 'downsample.1' not in n and n!='0.1.weight' and n!='0.1.bias']
        assert len(learn.opt.param_lists)==n_groups
        opt = {id(p) for p,*_ in learn.opt.all_params(slice(0,None))}
        assert opt=={id(p) for p in learn.model.parameters()}
        before = {n:p.clone() for n,p in learn.model.named_parameters()}
        learn.fine_tune(1, freeze_epochs=1)
        assert all(not torch.equal(p, before[n]) for n,p in learn.model.named_parameters() if 'pointwise' in n or 'depthwise' in n)
        learn.fit_one_cycle(1, slice(1e-5,1e-3))
        assert len({h['lr'] for h in learn.opt.hypers})==n_groups
        learn.lr_find(num_it=6, show_plot=False)
        learn.validate(); learn.get_preds(); learn.tta(n=1)
        learn.save('m'); learn.load('m')
        expected = learn.predict(learn.dls.valid_ds.items[0])[2]
        learn.export('l.pkl')
        loaded = load_learner(tmp_path/'l.pkl')
        with loaded.no_bar(): assert torch.allclose(loaded.predict(learn.dls.valid_ds.items[0])[2], expected, atol=1e-5)
        was = learn.model
        learn.to_depthwise(n=4) # A second time there is nothing left
        assert seps(learn.model)==seps(was)
    # The saved weights load into a network that was converted in the same way
    other = make(path=tmp_path)
    with other.no_bar(), other.no_logging(): other.to_depthwise(init='random', n=4)
    other.load('m')
    assert torch.equal(other.model[1][-1].weight, learn.model[1][-1].weight)

def test_conversion_advances_no_random_state():
    learn = make('resnet10t', channels=(16,16,16,16))
    state = torch.random.get_rng_state()
    with learn.no_bar(), learn.no_logging(): learn.to_depthwise(init='svd', n=4)
    assert torch.equal(state, torch.random.get_rng_state())

def test_the_plan_is_said_before_it_is_done(monkeypatch, capsys):
    learn = make('resnet10t', channels=(16,16,16,16))
    del learn.progress
    said = []
    monkeypatch.setattr(D, 'converted', lambda model, plan, *args: said.append((str(plan), capsys.readouterr().out)) or (model,{}))
    learn.to_depthwise(n=4)
    plan,out = said[0]
    assert out==plan+'\n' and '10 of 10 dense convolutions (fit, 4 images)' in plan

def test_unknown_arguments():
    with pytest.raises(TypeError, match='min_gain'): make('resnet10t').to_depthwise(min_gain=2)

def test_own_loaders_and_a_plain_network():
    "PyTorch's loaders, a Learner without a splitter"
    ds = torch.utils.data.TensorDataset(torch.randn(32,3,32,32), torch.randint(2, (32,)))
    dls = DataLoaders(*(torch.utils.data.DataLoader(ds, batch_size=8) for _ in range(2)))
    learn = Learner(dls, timm.create_model('resnet10t', num_classes=2, channels=(16,16,16,16)), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.to_depthwise(n=16)
        learn.fit_one_cycle(1)
    assert len(seps(learn.model))==10

def test_unet():
    "After a training fastai's U-Nets cannot be copied just so"
    ds = torch.utils.data.TensorDataset(torch.randn(8,3,32,32), torch.randint(2, (8,32,32)))
    dls = DataLoaders(*(torch.utils.data.DataLoader(ds, batch_size=4) for _ in range(2)))
    body = nn.Sequential(ConvLayer(3,8,stride=2), ConvLayer(8,16,stride=2), ConvLayer(16,24,stride=2))
    learn = Learner(dls, DynamicUnet(body, 2, (32,32)), loss_func=CrossEntropyLossFlat(axis=1))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        n_dense = sum(not why for _,why in dense_convs(learn.model).values())
        learn.to_depthwise(n=4)
        assert len(seps(learn.model))==n_dense>=10
        learn.fit(1)
        learn.validate()
        with torch.no_grad(): assert learn.model.eval()(torch.randn(2,3,32,32)).shape==(2,2,32,32)
        # The encoder's outputs still reach the decoder
        hooks = [h for m in learn.model.modules() for h in m._forward_hooks]
        learn.to_depthwise(n=4)
        assert len(hooks)==len([h for m in learn.model.modules() for h in m._forward_hooks])>0

def test_with_half_precision_and_sizes(monkeypatch):
    seen_dtype = []
    def timed(pairs, shapes, dtype, bar):
        seen_dtype.append(dtype)
        return {n:[[2.],[1.]] for n in list(pairs)[:2]}
    monkeypatch.setattr(D, 'time_layers', timed)
    learn = make('resnet10t', channels=(16,16,16,16), cbs=[ft.ProgressiveResize(32, mult=16)])
    learn.add_cbs([DeviceMixedPrecision(torch.bfloat16), ft.ChannelsLastBatch()])
    with learn.no_bar(), learn.no_logging():
        learn.to_depthwise(select='faster', n=8) # The network is timed in truth
        assert seen_dtype==[torch.bfloat16] and len(seps(learn.model)) in (0,2)
        learn.to_depthwise(n=8)
        with sizes_seen(learn) as seen: learn.fine_tune(1)
    assert len(seps(learn.model))==10 and len({o[1:] for o in seen if o[0]})>1
