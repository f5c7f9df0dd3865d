"Depthwise conversion: what stays exact, what networks keep, which layers are chosen, and a Learner that goes on"
import copy, math
import numpy as np
import pytest, timm, torch, torchvision
from fastai.data.all import DataBlock, GrandparentSplitter, RandomSplitter, get_image_files, parent_label
from fastai.layers import ConvLayer
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.all import CategoryBlock, ImageBlock, MaskBlock, PILMask, Resize, Tensor, aug_transforms, nn, noop, params, resnet18, unet_learner, vision_learner
from timm.layers import Conv2dSame
import fastai_tricks.all as ft
from fastai_tricks import depthwise as D, separable as S
from fastai_tricks.sample import sample_images
from fastai_tricks.test_utils import sizes_seen, tiny_dls, tiny_learner

def seps(model): return [n for n,m in model.named_modules() if isinstance(m, S.DepthwiseSeparableConv)]
def convert(model, *args, **kwargs): return ft.to_depthwise(model, *args, verbose=False, **kwargs)

CONVS = {
    'plain':lambda: nn.Conv2d(6, 8, 3), 'padded':lambda: nn.Conv2d(6, 8, 3, padding=1), 'strided':lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1),
    'dilated':lambda: nn.Conv2d(6, 8, 3, padding=4, dilation=2, bias=False), 'same':lambda: nn.Conv2d(6, 8, 4, padding='same'),
    'wide':lambda: nn.Conv2d(6, 8, (1,5), padding=(0,2), stride=(2,1)), 'few outputs':lambda: nn.Conv2d(6, 2, 3, padding=1),
    'reflect':lambda: nn.Conv2d(6, 8, 3, padding=2, padding_mode='reflect'), 'circular':lambda: nn.Conv2d(6, 8, (3,5), padding=(1,2), stride=2, padding_mode='circular'),
    'replicate same':lambda: nn.Conv2d(6, 8, 3, padding='same', padding_mode='replicate', dilation=(2,1)),
    'Conv2dSame':lambda: Conv2dSame(6, 8, 3, stride=2), 'Conv2dSame, even':lambda: Conv2dSame(6, 8, 4, stride=2, dilation=2)}

@pytest.mark.parametrize('kind', CONVS)
def test_all_singular_pairs_are_exact(kind):
    torch.manual_seed(0)
    conv,x = CONVS[kind](),torch.randn(3,6,13,11)
    sep = convert(nn.Sequential(conv), init='svd', multiplier=99)[0]
    assert type(sep.depthwise) is type(conv) and sep.depthwise.groups==6
    assert torch.allclose(sep(x), conv(x), atol=1e-5)
    assert (sep.pointwise.bias is None)==(conv.bias is None)

@pytest.mark.parametrize('kind', CONVS)
def test_rank_one_kernels_are_exact_with_one_pair(kind):
    torch.manual_seed(0)
    conv,x = CONVS[kind](),torch.randn(3,6,13,11)
    o,i,h,w = conv.weight.shape
    conv.weight.data = torch.randn(o,i,1,1)*torch.randn(1,i,h,w)
    assert torch.allclose(convert(nn.Sequential(conv), init='svd')(x), conv(x), atol=1e-4)
    assert S.weight_error(conv.weight) < 1e-10

@pytest.mark.parametrize('kind', CONVS)
def test_patches_are_what_the_layer_sees(kind):
    torch.manual_seed(0)
    conv,x = CONVS[kind](),torch.randn(3,6,13,11)
    y = torch.einsum('bchwij,ocij->bohw', S._view(conv, x), conv.weight)
    assert torch.allclose(y + (0 if conv.bias is None else conv.bias[:,None,None]), conv(x), atol=1e-5)

@pytest.mark.parametrize('m', [1,2,5,9])
def test_svd_is_the_closest(m):
    "Eckart and Young, against numpy, and against other pairs"
    torch.manual_seed(0)
    w = torch.randn(12,5,3,3)
    d,p = S.separate(w, m)
    product = torch.einsum('imk,oim->oik', d.view(5,m,9), p.view(12,5,m))
    best = 0
    for i in range(5):
        u,s,v = np.linalg.svd(w[:,i].flatten(1).double().numpy(), full_matrices=False)
        best += (s[m:]**2).sum()
        assert np.allclose(product[:,i].numpy(), (u[:,:m]*s[:m])@v[:m], atol=1e-5)
    assert math.isclose((product-w.flatten(2)).pow(2).sum().item(), best, rel_tol=1e-4, abs_tol=1e-4)
    assert math.isclose(S.weight_error(w, m), best/w.double().pow(2).sum().item(), rel_tol=1e-4, abs_tol=1e-6)

def test_fit_finds_a_separable_layer():
    "Outputs that a separable layer gave, from patches with dependent channels"
    torch.manual_seed(0)
    i,k,o = 5,9,7
    x = (torch.randn(3000,3)@torch.randn(3,i*k) + torch.randn(3000,i*k)).view(-1,i,k)
    d,p = torch.randn(i,k),torch.randn(o,i)
    y = torch.einsum('nik,ik,oi->no', x, d, p)
    def error(d, p): return ((torch.einsum('nik,ik,oi->no', x, d, p)-y).pow(2).sum()/y.pow(2).sum()).item()
    start = torch.randn(i,k, generator=torch.Generator().manual_seed(1)),torch.zeros(o,i)
    errors = [error(*S.fit_separable(x, y, *start, s)) for s in (0,1,4,30)]
    assert errors==sorted(errors, reverse=True) and errors[-1]<1e-3

def test_fit_keeps_what_patches_do_not_determine():
    "From few patches an exact layer stays exact, and a channel that is always 0 keeps its weights"
    torch.manual_seed(0)
    x,d,p = torch.randn(20,6,9),torch.randn(6,9),torch.randn(8,6)
    x[:,2] = 0
    y = torch.einsum('nik,ik,oi->no', x, d, p)
    d2,p2 = S.fit_separable(x, y, d, p)
    assert torch.allclose(torch.einsum('ik,oi->oik', d2, p2), torch.einsum('ik,oi->oik', d, p), atol=1e-4)
    conv = nn.Sequential(nn.Conv2d(6,8,3))
    few = torch.randn(4,6,4,4)
    assert torch.allclose(convert(conv, few, multiplier=8)(torch.randn(2,6,7,7, generator=torch.Generator().manual_seed(1))), convert(conv, init='svd', multiplier=8)(torch.randn(2,6,7,7, generator=torch.Generator().manual_seed(1))), atol=1e-4)

@pytest.fixture(scope='module')
def trained():
    "A small resnet that has learned something of the embedded pictures: Learner and calibration batch"
    torch.manual_seed(0)
    block = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, splitter=RandomSplitter(seed=1), item_tfms=Resize(48), batch_tfms=aug_transforms())
    dls = block.dataloaders(get_image_files(sample_images())[::3], bs=16, num_workers=0, device='cpu')
    learn = vision_learner(dls, 'resnet10t', pretrained=False, normalize=False, metrics=accuracy)
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 5e-3)
    return learn

def logits_error(learn, model):
    x,_ = learn.dls.valid.one_batch()
    with torch.no_grad(): a,b = learn.model.eval()(x),model.eval()(x)
    return ((a-b).pow(2).sum()/(a-a.mean(0)).pow(2).sum()).item()

def test_fit_beats_svd_beats_random(trained):
    xb = D._training_images(trained, 128)
    errors = [logits_error(trained, convert(trained.model, xb[0], init=i)) for i in ('fit','svd','random')]
    assert errors==sorted(errors) and errors[0]<.6*errors[1]
    more = [logits_error(trained, convert(trained.model, xb[0], multiplier=m)) for m in (1,4)]
    assert more[1]<more[0]

def test_layers_are_fitted_behind_converted_ones(trained):
    "The last layer's error is smaller than with each layer fitted to the dense network's inputs"
    xb = D._training_images(trained, 64)
    names = [n for n,(_,why) in ft_convs(trained.model).items() if not why]
    _,errors = D._converted(trained.model, names, xb, 'fit', 1, False, xb)
    apart = convert(trained.model, xb[0], init='svd')
    for n in names:
        one,_ = D._converted(trained.model, [n], xb, 'fit', 1, False, xb)
        apart.get_submodule(n).load_state_dict(one.get_submodule(n).state_dict())
    noted = S._noted(copy.deepcopy(trained.model), [], xb, 10)
    last = names[-1]
    with torch.no_grad():
        outs = {}
        for k,m in (('dense',trained.model),('apart',apart),('fit',convert(trained.model, xb[0]))):
            h = m.get_submodule(last).register_forward_hook(lambda mod,i,o: outs.__setitem__(k, o))
            m.eval()(xb[0])
            h.remove()
    dist = {k:(outs[k]-outs['dense']).pow(2).sum().item() for k in ('apart','fit')}
    assert dist['fit']<dist['apart'] and noted=={}

def ft_convs(model): return D.dense_convs(model)

def test_error_is_that_of_the_converted_network(trained):
    xb = D._training_images(trained, 64)
    names = [n for n,(_,why) in ft_convs(trained.model).items() if not why][:1]
    new,errors = D._converted(trained.model, names, xb, 'svd', 1, False, xb)
    with torch.no_grad():
        x = {}
        h = trained.model.get_submodule(names[0]).register_forward_hook(lambda m,i,o: x.update(i=i[0], o=o))
        trained.model.eval()(xb[0])
        h.remove()
        y = new.get_submodule(names[0])(x['i'])
    exact = ((y-x['o']).pow(2).sum()/(x['o']-x['o'].mean((0,2,3), keepdim=True)).pow(2).sum()).item()
    assert math.isclose(errors[names[0]], exact, rel_tol=.1)

def test_batch_norms_are_those_of_the_calibration(trained):
    "Behind the first converted layer the statistics are those of the images; before it, and momentum and modes, as they were"
    xb = D._training_images(trained, 64)
    model = copy.deepcopy(trained.model).train()
    model[0].eval()
    modes = [m.training for m in model.modules()]
    new = convert(model, xb[0], select='0.model.layer2')
    assert [m.training for m in model.modules()]==modes and next(new.modules()).training and not new[0].training
    norms = [(n,m) for n,m in new.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for _,m in norms}=={.1}
    changed = {n for n,m in norms if not torch.equal(m.running_var, model.get_submodule(n).running_var)}
    assert changed and not any('layer1' in n or 'model.bn1' in n or 'model.conv1' in n for n in changed)
    seen = {}
    name = '0.model.layer2.0.bn1'
    h = new.get_submodule(name).register_forward_pre_hook(lambda m,i: seen.update(x=i[0]))
    with torch.no_grad(): new.eval()(xb[0])
    h.remove()
    assert torch.allclose(seen['x'].mean((0,2,3)), new.get_submodule(name).running_mean, atol=1e-4)
    assert torch.allclose(seen['x'].var((0,2,3)), new.get_submodule(name).running_var, rtol=1e-3)

def test_exact_conversion_leaves_batch_norms(trained):
    xb = D._training_images(trained, 32)
    assert logits_error(trained, convert(trained.model, xb[0], init='svd', multiplier=9))<1e-6

@pytest.mark.parametrize('init', ['svd','fit'])
def test_norm_changes_no_output(trained, init):
    xb = D._training_images(trained, 64)
    a,b = (convert(trained.model, xb[0], init=init, norm=o).eval() for o in (False,True))
    assert any(hasattr(b.get_submodule(n), 'norm') for n in seps(b))
    with torch.no_grad(): assert torch.allclose(a(xb[0]), b(xb[0]), atol=1e-2)
    without = convert(trained.model, init='svd', norm=True).eval()
    with torch.no_grad(): assert torch.allclose(without(xb[0]), convert(trained.model, init='svd').eval()(xb[0]), atol=1e-2)

def _torchvision(name): return lambda: getattr(torchvision.models, name)(weights=None)
MODELS = { # How many layers convert
    'resnet18':16, 'resnet50':16, 'resnet18d':18, 'repvgg_a0':None, 'densenet121':58, 'regnetx_002':0, 'mobilenetv3_small_050':0, 'tf_efficientnet_lite0':0, 'tf_efficientnetv2_b0':5,
    'resnetv2_50x1_bit':0, 'vit_tiny_patch16_224':0, 'convnext_atto':3, 'resnest14d':None, _torchvision('resnet18'):16, _torchvision('squeezenet1_1'):8, _torchvision('googlenet'):None}

@pytest.mark.parametrize('name', MODELS, ids=lambda n: n if isinstance(n, str) else 'torchvision')
def test_networks(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7) if isinstance(name, str) else name()
    size = 224 if 'vit' in str(name) or not isinstance(name, str) else 64
    model.eval()
    was = {k:v.clone() for k,v in model.state_dict().items()}
    x = torch.randn(4,3,size,size)
    new = convert(model, x)
    found = seps(new)
    if MODELS[name] is not None: assert len(found)==MODELS[name]
    with torch.no_grad(): a,b = model(x),new(x)
    assert a.shape==b.shape and torch.isfinite(b).all()
    assert not seps(model) and all(torch.equal(v, was[k]) for k,v in model.state_dict().items())
    if not found: assert torch.equal(a, b)
    assert not any(m._forward_hooks or m._forward_pre_hooks for o in (model,new) for m in o.modules())
    assert all(c.in_channels<=4 for c,why in D.dense_convs(new).values() if not why or 'image' in why)
    assert sum(p.numel() for p in new.parameters())<=sum(p.numel() for p in model.parameters())

def test_other_convolutions_stay():
    w = nn.utils.parametrizations.weight_norm(nn.Conv2d(8,8,3,padding=1))
    model = nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.Conv2d(8,8,1), nn.Conv2d(8,8,3,padding=1,groups=8), nn.Conv2d(8,8,3,padding=1,groups=2), nn.ConvTranspose2d(8,8,3), w, nn.Conv2d(8,8,3))
    assert seps(convert(model, size=16))==['6']
    assert seps(convert(model, size=16, skip='6'))==[]

def test_select():
    model = timm.create_model('resnet18')
    assert seps(convert(model, select=['layer1.0.conv1','layer4.1']))==['layer1.0.conv1','layer4.1.conv1','layer4.1.conv2']
    assert seps(convert(model, select=lambda n,c: c.in_channels>=512))==['layer4.0.conv2','layer4.1.conv1','layer4.1.conv2']
    assert len(seps(convert(model, skip=['layer1','layer2.0.conv1'])))==11

@pytest.mark.parametrize('kw,word', [
    (dict(init='pca'), '`init`'), (dict(multiplier=0), '`multiplier`'), (dict(multiplier=1.5), '`multiplier`'), (dict(select='layer9'), '`select`'), (dict(select=['conv1']), "image's channels"),
    (dict(skip=['nope']), '`skip`'), (dict(size=0), '`size`'), (dict(min_gain=0), '`min_gain`'), (dict(init='fit'), '`batches`'), (dict(n=0), '`n`'), (dict(batches=[]), '`batches`'),
    (dict(batches=[torch.zeros(1,3,8,8),torch.zeros(1,3,9,9)]), '`batches`'), (dict(batches=['a']), '`batches`')])
def test_bad_input(kw, word):
    with pytest.raises(ValueError, match=word): convert(timm.create_model('resnet18'), **kw)

def test_not_a_model():
    with pytest.raises(ValueError, match='`model`'): convert('resnet18')

def test_faster_takes_what_the_clock_says(monkeypatch, capsys):
    model = timm.create_model('resnet18')
    times = lambda conv, sep, shape, **kw: ([3.,3.,1.],[2.,2.,2.]) if conv.in_channels>=256 else ([1.,1.,9.],[1.,1.,1.])
    monkeypatch.setattr(D, 'layer_times', times)
    monkeypatch.setattr(D, 'in_turn', lambda fs, turns=5: [[2.]*5,[1.]*5])
    assert {n.split('.')[0] for n in seps(convert(model, select='faster', size=32))}=={'layer3','layer4'}
    assert seps(ft.to_depthwise(model, select='faster', size=32, min_gain=1.6))==[]
    assert 'nothing converted: no layer is 1.6 times as fast (the best: 1.50)' in capsys.readouterr().out
    monkeypatch.setattr(D, 'in_turn', lambda fs, turns=5: [[1.]*5,[2.]*5]) # Each layer gains, the whole loses
    assert seps(ft.to_depthwise(model, select='faster', size=32))==[]
    assert 'not the whole network' in capsys.readouterr().out

def test_clock_tells_slow_from_fast():
    "A layer that sleeps is slower than one that does not"
    import time
    class Slow(nn.Conv2d):
        def forward(self, x): time.sleep(.01); return super().forward(x)
    fast,slow = nn.Conv2d(4,4,3,padding=1),Slow(4,4,3,padding=1)
    assert D._gain(D.layer_times(slow, fast, (1,4,8,8)))>1.5 and D._gain(D.layer_times(fast, slow, (1,4,8,8)))<.7

def test_inplace(trained):
    xb = D._training_images(trained, 32)
    model = copy.deepcopy(trained.model)
    expected = convert(trained.model, xb[0])
    assert convert(model, xb[0], inplace=True) is model
    assert seps(model)==seps(expected)
    with torch.no_grad(): assert torch.equal(model.eval()(xb[0]), expected.eval()(xb[0]))

@pytest.mark.parametrize('inplace', [False,True])
def test_an_error_leaves_the_model(trained, inplace, monkeypatch):
    def boom(*args): raise KeyboardInterrupt
    monkeypatch.setattr(S, '_fit_layer', boom)
    was = {k:v.clone() for k,v in trained.model.state_dict().items()}
    modes = [m.training for m in trained.model.modules()]
    with pytest.raises(KeyboardInterrupt): convert(trained.model, D._training_images(trained, 16)[0], inplace=inplace)
    assert list(was)==list(trained.model.state_dict()) and all(torch.equal(v, was[k]) for k,v in trained.model.state_dict().items())
    assert [m.training for m in trained.model.modules()]==modes and not any(m._forward_hooks or m._forward_pre_hooks for m in trained.model.modules())

def test_shared_layers_hooks_and_unused_ones():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem,self.a,self.unused = nn.Conv2d(3,8,3,padding=1),nn.Conv2d(8,8,3,padding=1),nn.Conv2d(8,8,3)
            self.b = self.a
        def forward(self, x): return self.b(self.a(self.stem(x)).relu())
    model,calls = Net(),[]
    model.a.register_forward_hook(lambda m,i,o: calls.append(type(m).__name__))
    new = convert(model, torch.randn(8,3,16,16))
    assert new.a is new.b and seps(new)==['a','unused']
    calls.clear()
    new(torch.randn(1,3,16,16))
    assert calls==['DepthwiseSeparableConv']*2

def test_a_channel_of_zeros_can_still_learn():
    model = nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.ReLU(), nn.Conv2d(8,8,3,padding=1))
    model[0].weight.data[2],model[0].bias.data[2] = 0,-1
    sep = convert(model, torch.randn(16,3,16,16))[2]
    assert all(torch.isfinite(p).all() for p in sep.parameters()) and sep.depthwise.weight[2].abs().sum()>0 and sep.pointwise.weight[:,2].abs().sum()>0

def test_half_and_double_weights():
    for dtype in (torch.bfloat16,torch.float64):
        model = timm.create_model('resnet10t').to(dtype)
        new = convert(model, torch.randn(8,3,32,32))
        assert {p.dtype for p in new.parameters()}=={dtype} and torch.isfinite(new.eval()(torch.randn(1,3,32,32, dtype=dtype))).all()

# --- Learner

def make(num_workers=0, arch=resnet18, step=8, **kwargs):
    block = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, splitter=RandomSplitter(seed=1), item_tfms=Resize(48), batch_tfms=aug_transforms())
    dls = block.dataloaders(get_image_files(sample_images())[::step], bs=16, num_workers=num_workers, device='cpu')
    return vision_learner(dls, arch, pretrained=False, normalize=False, metrics=accuracy, **kwargs)

@pytest.mark.parametrize('num_workers', [0,2])
def test_learner_goes_on(num_workers, tmp_path):
    learn = make(num_workers, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        dense,n_groups = learn.model,len(learn.splitter(learn.model))
        assert learn.to_depthwise(n=32) is learn and learn.model is not dense and not seps(dense)
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
        learn.lr_find(num_it=5, show_plot=False)
        learn.validate(); learn.get_preds(); learn.tta(n=1)
        learn.save('m'); learn.load('m')
        expected = learn.predict(learn.dls.valid_ds.items[0])[2]
        learn.export('l.pkl')
        loaded = load_learner(tmp_path/'l.pkl')
        with loaded.no_bar(): assert torch.allclose(loaded.predict(learn.dls.valid_ds.items[0])[2], expected, atol=1e-5)
        was = learn.model
        learn.to_depthwise(n=16) # A second time there is nothing left
        assert seps(learn.model)==seps(was)
    # The saved weights load into a network that was converted in the same way
    other = make(path=tmp_path)
    with other.no_bar(), other.no_logging(): other.to_depthwise(init='random', n=4)
    other.load('m')
    assert torch.equal(other.model[1][-1].weight, learn.model[1][-1].weight)

def test_images_are_training_images_without_augmentation():
    learn = make()
    dls = learn.dls
    state,np_state = torch.random.get_rng_state(),np.random.get_state()[1].copy()
    with learn.no_bar(), learn.no_logging(): learn.to_depthwise(init='svd', n=4)
    assert torch.equal(state, torch.random.get_rng_state()) and (np_state==np.random.get_state()[1]).all()
    a,b = D._training_images(learn, 8)[0],D._training_images(learn, 8)[0]
    assert torch.equal(a, b) and len(a)==8
    plain = dls.test_dl(list(dls.train_ds.items), bs=200).one_batch()[0]
    where = [(plain==x).flatten(1).all(1).nonzero().flatten().tolist() for x in a]
    assert all(where) and len({tuple(o) for o in where})==8

def test_own_loaders_and_a_plain_network():
    "PyTorch's loaders, a Learner without a splitter"
    from fastai.data.core import DataLoaders
    ds = torch.utils.data.TensorDataset(torch.randn(32,3,32,32), torch.randint(2, (32,)))
    dls = DataLoaders(*(torch.utils.data.DataLoader(ds, batch_size=8) for _ in range(2)))
    learn = Learner(dls, timm.create_model('resnet10t', num_classes=2), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.to_depthwise(n=16)
        learn.fit_one_cycle(1)
    assert len(seps(learn.model))==10

def test_unet(tmp_path):
    block = DataBlock((ImageBlock,MaskBlock(['a','b'])), get_y=lambda f: PILMask.create(np.zeros((40,40), dtype=np.uint8)), splitter=RandomSplitter(seed=1), item_tfms=Resize(32))
    dls = block.dataloaders(get_image_files(sample_images())[:24], bs=4, num_workers=0, device='cpu')
    learn = unet_learner(dls, resnet18, pretrained=False, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1) # After it fastai's U-Nets cannot be copied just so
        learn.to_depthwise(n=4)
        assert len(seps(learn.model))>20
        learn.unfreeze()
        learn.fit(1)
        assert learn.get_preds()[0].shape==(4,2,32,32)
        # The encoder's outputs still reach the decoder
        hooks = [h for m in learn.model.modules() for h in m._forward_hooks]
        learn.to_depthwise(n=4)
        assert len(hooks)==len([h for m in learn.model.modules() for h in m._forward_hooks])>0

def test_with_half_precision_and_sizes():
    learn = make(arch='resnet10t', cbs=[ft.ProgressiveResize(start=32, mult=16)])
    learn.add_cbs([ft.DeviceMixedPrecision(torch.bfloat16), ft.ChannelsLastBatch()])
    with learn.no_bar(), learn.no_logging():
        learn.to_depthwise(select='faster', n=8)
        learn.to_depthwise(n=8)
        with sizes_seen(learn) as seen: learn.fine_tune(1)
    assert seps(learn.model) and len({o[1:] for o in seen if o[0]})>1

# --- Report

def test_report(trained):
    was = {k:v.clone() for k,v in trained.model.state_dict().items()}
    cbs,opt = list(trained.cbs),trained.opt
    df = ft.depthwise_report(trained, n=32, plot=False)
    assert all(torch.equal(v, was[k]) for k,v in trained.model.state_dict().items()) and trained.opt is opt and list(trained.cbs)==cbs
    convs = D.dense_convs(trained.model)
    assert list(df['layer'])==list(convs) and df.attrs['total']['init']=='fit'
    ok = df[df['converted']]
    assert set(ok['layer'])=={n for n,(_,why) in convs.items() if not why}
    assert ok['ms'].gt(0).all() and ok['ms_after'].gt(0).all() and ok['output_error'].between(0, 1).all() and ok['weight_error'].between(0, 1).all()
    assert df[~df['converted']]['why'].ne('').all() and (df[~df['converted']]['params']==df[~df['converted']]['params_after']).all()
    none = ft.depthwise_report(trained.model, size=32, select='faster', min_gain=1e9, plot=False, bs=2)
    assert not none['converted'].any() and none.attrs['total']['params']==none.attrs['total']['params_after']

@pytest.mark.parametrize('kw,word', [(dict(model='resnet18'), '`model`'), (dict(init='fit'), '`batches`'), (dict(n=0), '`n`'), (dict(select='x'), '`select`'), (dict(multiplier=0), '`multiplier`')])
def test_report_bad_input(kw, word):
    with pytest.raises(ValueError, match=word): ft.depthwise_report(**{'model':timm.create_model('resnet10t'), **kw})

def test_hooks_and_what_is_frozen_go_along():
    conv,calls = nn.Conv2d(8,8,3),[]
    conv.register_full_backward_hook(lambda *a: calls.append(1))
    conv.weight.requires_grad_(False)
    new = convert(nn.Sequential(conv), size=8)
    new(torch.randn(1,8,8,8, requires_grad=True)).sum().backward()
    assert calls==[1]
    assert {n:p.requires_grad for n,p in new[0].named_parameters()}=={'depthwise.weight':False, 'pointwise.weight':False, 'pointwise.bias':True}

def test_convolutions_that_share_a_parameter_stay():
    m = nn.Sequential(nn.Conv2d(8,8,3), nn.Conv2d(8,8,3), nn.Conv2d(8,8,3))
    m[1].weight = m[0].weight
    assert [why for _,why in D.dense_convs(m, skip=None).values()]==['shares its weights with another']*2 + ['']

@pytest.mark.parametrize('bad', [torch.zeros(0,3,8,8), torch.zeros(2,3,8,8, dtype=torch.uint8), 5, (torch.zeros(2,3,8,8),torch.zeros(2))], ids=['none','bytes','number','images and targets'])
def test_what_is_no_images_is_refused(bad):
    with pytest.raises(ValueError, match='`batches` must be'): convert(nn.Sequential(nn.Conv2d(3,8,3), nn.Conv2d(8,8,3)), bad)

def test_selecting_nothing_is_refused():
    with pytest.raises(ValueError, match='`select` must be'): convert(nn.Sequential(nn.Conv2d(8,8,3)), select=None)

@pytest.mark.parametrize('kwargs', [{}, {'select':'faster', 'min_gain':1e-3}], ids=['all','faster'])
def test_no_hook_is_left(trained, kwargs):
    new = convert(trained.model, D._training_images(trained, 16)[0], **kwargs)
    assert seps(new) and not any(m._forward_hooks or m._forward_pre_hooks for m in [*new.modules(), *trained.model.modules()])
