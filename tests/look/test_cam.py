"Attention maps: the values, the layer, and that nothing is left of them"
import copy, random
from functools import partial
from pathlib import Path
import numpy as np, pytest, timm, torch, torchvision
from fastai.callback.core import Callback, CancelEpochException
from fastai.callback.training import GradientAccumulation
from fastai.data.all import DataBlock, IndexSplitter, MultiCategoryBlock, RegressionBlock
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from fastai.torch_core import get_random_states
from fastai.vision.all import Flatten, ImageBlock, Normalize, PILImage, PointBlock, Resize, Tensor, imagenet_stats, nn, plt, vision_learner
from PIL import Image
from torchvision.models.convnext import CNBlockConfig
import fastai_tricks.all as ft
from fastai_tricks.train.precision import DeviceMixedPrecision
from fastai_tricks.look.cam import GradCAM, WatchCAM
from fastai_tricks.core.learner import items_batch
from fastai_tricks.look.layer import Layout, layout_of
from fastai_tricks.look.pictures import overlay
from fastai_tricks.core.test_utils import tiny_dls, tiny_learner

def tv(name, **kw): return lambda: getattr(torchvision.models, name)(weights=None, num_classes=7, **kw)
def tm(name, **kw): return lambda: timm.create_model(name, num_classes=7, **kw)
def vl(arch): return lambda: vision_learner(tiny_dls(), arch, pretrained=False, n_out=7, normalize=False).model
def tokens(front):
    def f(t):
        n = int((t.shape[1]-front)**.5)
        return t[:,front:].reshape(len(t), n, n, -1).permute(0,3,1,2)
    return f
def last(t): return t.permute(0,3,1,2)

# The model, the layer that the oracle's documentation or the structure asks for, how the oracle is to read its output
NETS = {
    'torchvision resnet18': (tv('resnet18'), lambda m: m.layer4[-1], None),
    'torchvision mobilenet_v2': (tv('mobilenet_v2'), lambda m: m.features[-1], None),
    'torchvision convnext': (lambda: torchvision.models.ConvNeXt([CNBlockConfig(24,48,1), CNBlockConfig(48,96,1), CNBlockConfig(96,None,1)], num_classes=7), lambda m: m.features[-1][-1], None),
    'torchvision vit': (lambda: torchvision.models.VisionTransformer(64, 16, 3, 4, 64, 128, num_classes=7), lambda m: m.encoder.layers[-1].ln_1, tokens(1)),
    'torchvision swin': (lambda: torchvision.models.SwinTransformer([4,4], 24, [1,1], [2,2], [4,4], num_classes=7), lambda m: m.norm, last),
    'timm resnet18': (tm('resnet18'), lambda m: m.layer4[-1], None),
    'timm efficientnet': (tm('tf_efficientnet_lite0'), lambda m: m.bn2, None),
    'timm convnext': (tm('convnext_atto'), lambda m: m.stages[-1], None),
    'timm vit': (tm('vit_tiny_patch16_224', img_size=64, depth=3), lambda m: m.blocks[-1].norm1, tokens(1)),
    'timm vit, averaged': (tm('vit_tiny_patch16_224', img_size=64, depth=3, class_token=False, global_pool='avg'), lambda m: m.norm, tokens(0)),
    'timm vit, registers': (tm('vit_tiny_patch16_224', img_size=64, depth=3, reg_tokens=4), lambda m: m.blocks[-1].norm1, tokens(5)),
    'timm swin': (tm('swin_tiny_patch4_window7_224', img_size=64, window_size=4, depths=(1,1,1), num_heads=(3,6,12)), lambda m: m.norm, last),
    'vision_learner resnet18': (vl(torchvision.models.resnet18), lambda m: m[0][-1], None),
    'vision_learner timm': (vl('resnet18'), lambda m: m[0].model.layer4, None)}

def make(name):
    torch.manual_seed(0)
    f,layer,read = NETS[name]
    m = f().eval()
    # torchvision's ViT begins with a last layer of zeros
    if hasattr(m, 'heads'): nn.init.normal_(m.heads[-1].weight)
    # Batch norm as after some training: with the first statistics deep random networks give constant maps
    for b in m.modules():
        if isinstance(b, nn.BatchNorm2d): b.reset_running_stats(); b.momentum = None
    with torch.no_grad():
        for b in m.modules(): b.train(isinstance(b, nn.BatchNorm2d))
        m(torch.randn(8,3,64,64))
    return m.eval(),layer(m),read

def nature(b=3):
    "Images with places that differ"
    rng = np.random.default_rng(1)
    x = torch.nn.functional.interpolate(torch.tensor(rng.normal(size=(b,3,5,5)), dtype=torch.float32), (64,64), mode='bilinear')
    return x + .2*torch.tensor(rng.normal(size=(b,3,64,64)), dtype=torch.float32)

@pytest.fixture(scope='module', params=NETS)
def net(request): return make(request.param)

@pytest.mark.parametrize('method', ['gradcam','gradcam++','eigen'])
def test_values_are_those_of_grad_cam(net, method):
    oracle = pytest.importorskip('pytorch_grad_cam', reason='the oracle is the package grad-cam')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    cls = {'gradcam':oracle.GradCAM, 'gradcam++':oracle.GradCAMPlusPlus, 'eigen':oracle.EigenCAM}[method]
    (m,layer,read),x = net,nature()
    # Without targets both take the predicted class; each method does that alike
    for targets in ([0,3,6],None)[:2 if method=='gradcam' else 1]:
        with cls(model=m, target_layers=[layer], reshape_transform=read) as cam: theirs = cam(x, targets and [ClassifierOutputTarget(t) for t in targets])
        for given in (None,layer)[:2 if targets else 1]:
            with GradCAM(m, given, method) as cam: mine = cam(x, targets).numpy()
            assert mine.shape==(3,64,64) and mine.min()>=0 and mine.max()<=1
            assert np.abs(mine-theirs).max()<=1e-3
            for a,b in zip(mine, theirs):
                if b.std()>1e-6: assert np.corrcoef(a.ravel(), b.ravel())[0,1]>=.999
    assert mine.std((1,2)).max()>.05 # There was something to compare

def small_resnet(num_classes=3, **kwargs):
    return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1,1,1,1), num_classes=num_classes, channels=(8,16,24,32), stem_width=8, **kwargs)

def test_new_networks_with_a_last_layer_of_zeros():
    m = torchvision.models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=7)
    cam = GradCAM(m)
    assert (cam(nature())==0).all() and cam.layer is m.encoder.layers[-1].ln_1

def first(*hw): return Layout('channels_first', hw)
def channels_last(*hw): return Layout('channels_last', hw)
def in_tokens(front, *hw): return Layout('tokens', hw, front)

@pytest.mark.parametrize('shape,size,grid,expected', [
    ((1,512,7,7), (224,224), None, first(7,7)), ((1,512,5,5), (224,224), None, first(5,5)), ((1,8,2,7), (33,224), None, first(2,7)),
    ((1,7,7,512), (224,224), None, channels_last(7,7)), ((1,6,9,24), (96,144), None, channels_last(6,9)), ((1,8,8,8), (64,64), None, first(8,8)),
    ((1,12,200,64), (224,224), None, None), ((1,2,1,1), (64,128), None, None), ((1,1,1,512), (64,64), None, None),
    ((1,50,64), (224,224), (7,7), in_tokens(1,7,7)), ((1,24,64), (64,96), None, in_tokens(0,4,6)), ((1,49,64), (224,224), None, in_tokens(0,7,7)),
    ((1,17,64), (224,224), None, None), ((1,512), (224,224), None, None), ((1,1,64), (224,224), None, None)])
def test_layout(shape, size, grid, expected): assert layout_of(shape, size, grid)==expected

@pytest.mark.parametrize('layout,shape', [(first(2,3),(2,5,2,3)), (channels_last(2,3),(2,2,3,5)), (in_tokens(2,2,3),(2,8,5))])
def test_maps_of_a_layout(layout, shape):
    "Places keep their order"
    o = torch.zeros(shape)
    o[(..., 1, 2) if layout.kind=='channels_first' else (slice(None), 1, 2) if layout.kind=='channels_last' else (slice(None), 7)] = 1.
    maps = layout.to_maps(o)
    assert maps.shape==(2,5,2,3) and maps.sum()==10 and maps[:,:,1,2].sum()==10

def test_layer_follows_the_size():
    m = small_resnet()
    cam = GradCAM(m)
    for hw,layer in (((96,64),m.layer4), ((32,32),m.layer3), ((96,64),m.layer4)): # At 32 px the last block has one place
        assert cam(torch.randn(1,3,*hw)).shape==(1,*hw) and cam.layer is layer

def test_pooled_maps_have_lost_places():
    m = nn.Sequential(nn.Sequential(nn.Conv2d(3,4,3), nn.MaxPool2d(2), nn.Conv2d(4,8,3), nn.ReLU(inplace=True), nn.MaxPool2d(2)), nn.AdaptiveAvgPool2d(7), Flatten(), nn.Linear(8*49,3))
    cam = GradCAM(m)
    cam(torch.randn(1,3,64,64))
    assert cam.layer is m[0][3] # The activation in front of the last pooling

def test_layer_by_name_and_wrong_ones():
    m,x = small_resnet(),nature(1)
    assert torch.equal(GradCAM(m, 'layer3')(x), GradCAM(m, m.layer3)(x))
    for bad,why in (('layer9','a name of a module'), (nn.Conv2d(3,3,1),'a module of'), (3,'a module of'), (m.fc,'a layer that is called'), (m.global_pool,'a layer that is called')):
        with pytest.raises(ValueError, match=f'`layer` must be {why}'): GradCAM(m, bad)(x)
    class Side(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.never = nn.Conv2d(3,4,1),nn.Conv2d(3,4,1),nn.Conv2d(3,4,1)
        def forward(self, x): self.b(x); return self.a(x).mean((2,3))
    with pytest.raises(ValueError, match='`layer` must be a layer that the class scores depend on'): GradCAM(Side(), 'b')(x)
    with pytest.raises(ValueError, match='`layer` must be a layer that is called'): GradCAM(Side(), 'never')(x)
    with pytest.raises(ValueError, match='`layer` must be given'): GradCAM(nn.Sequential(Flatten(), nn.Linear(3*64*64,2)))(x)

def test_bad_input():
    m,x = tiny_learner().model,nature(2)
    with pytest.raises(ValueError, match='`model`'): GradCAM('resnet18')
    with pytest.raises(ValueError, match='`method`'): GradCAM(m, method='score')
    for bad in (x[0], x.long(), 'x', x[:0]):
        with pytest.raises(ValueError, match='`x` must be a float tensor'): GradCAM(m)(bad)
    for bad in ([0], [0,2], [0,-1], [0,.5], 1, 'ab'):
        with pytest.raises(ValueError, match='`targets` must be 2 class indices from 0 to 1'): GradCAM(m)(x, bad)
    with pytest.raises(ValueError, match='`model` must be one that gives class scores'): GradCAM(nn.Sequential(nn.Conv2d(3,4,1)), '0')(x)
    for ok in ([0,1], (0,1), torch.tensor([0,1]), np.array([0,1])): GradCAM(m)(x, ok)

def state(m):
    rng = get_random_states()
    return dict(modes=[c.training for c in m.modules()], grads=[None if p.grad is None else p.grad.clone() for p in m.parameters()], versions=[t._version for t in (*m.parameters(),*m.buffers())],
        needs=[p.requires_grad for p in m.parameters()], values={k:v.clone() for k,v in m.state_dict().items()}, hooks=[[list(d.values()) for k,d in sorted(vars(c).items()) if 'hooks' in k and isinstance(d, dict)] for c in m.modules()],
        attrs=[sorted(vars(c)) for c in m.modules()], random=(rng['random_state'], rng['numpy_state'][1].tolist(), rng['torch_state'].tolist()), on=(torch.is_grad_enabled(), torch.is_autocast_enabled('cpu'), torch.is_inference_mode_enabled()))

def same(a, b):
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a is b if callable(a) else a==b

class Draws(nn.Module):
    "Draws random numbers in evaluation too, and may break"
    broken = False
    def forward(self, x):
        if self.broken: raise RuntimeError('broken')
        return x + 0*torch.rand(1) + 0*random.random()

def with_all():
    m = small_resnet(drop_rate=.5)
    m.layer1.eval(); m.layer2[0].bn1.eval()
    for p in m.layer1.parameters(): p.requires_grad_(False)
    m.fc.register_forward_hook(lambda *a: None)
    m.layer4.register_forward_hook(lambda *a: None)
    m.fc = nn.Sequential(m.fc, Draws())
    m(nature()).sum().backward()
    return m

@pytest.mark.parametrize('around', ['nothing','no_grad','inference_mode','autocast','frozen','eval'])
@pytest.mark.parametrize('method', ['gradcam','gradcam++','eigen'])
def test_changes_nothing(method, around):
    m,x = with_all(),nature()
    if around=='frozen': m.requires_grad_(False)
    if around=='eval': m.eval()
    expected = GradCAM(copy.deepcopy(m), method=method)(x, [0,1,2])
    ctx = dict(no_grad=torch.no_grad, inference_mode=torch.inference_mode, autocast=lambda: torch.autocast('cpu', dtype=torch.bfloat16)).get(around, torch.enable_grad)
    with ctx():
        before,v = state(m),x._version
        with GradCAM(m, method=method) as cam: maps = cam(x if around!='inference_mode' else x*1, [0,1,2])
        assert same(before, state(m)) and x._version==v and not x.requires_grad
    assert torch.allclose(maps, expected, atol=1e-5) and maps.std()>0 and type(maps) is Tensor and not maps.requires_grad
    assert not cam.logits.requires_grad
    assert torch.allclose(m.eval()(x), cam.logits, atol=1e-5)

@pytest.mark.parametrize('ex', [RuntimeError,KeyboardInterrupt])
def test_changes_nothing_when_it_raises(ex, monkeypatch):
    m,x = with_all(),nature()
    cam,m.fc[1].broken = GradCAM(m),False
    cam(x)
    before = state(m)
    m.fc[1].broken = True
    for c in (cam,GradCAM(m),GradCAM(m, 'layer3')): # After the layer, while looking for it, and where it is given
        with pytest.raises(RuntimeError): c(x)
    m.fc[1].broken = False
    assert same(before, state(m))
    def stop(*a, **k): raise ex('stop')
    monkeypatch.setattr(torch.autograd, 'grad', stop)
    with pytest.raises(ex): cam(x)
    monkeypatch.undo()
    with pytest.raises(ValueError): cam(x, [0])
    assert same(before, state(m))
    cam(x)
    assert same(before, state(m))

def test_layers_changed_in_place_afterwards():
    "The map is of what the layer gave"
    m = nn.Sequential(nn.Conv2d(3,6,3,padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(6,3))
    x = nature(2)
    act = m[0](x).detach().requires_grad_()
    g, = torch.autograd.grad(m[4](act.relu().mean((2,3))).gather(1, torch.tensor([[1],[2]])).sum(), act)
    by_hand = (act*g.mean((2,3), keepdim=True)).sum(1).clamp_min(0)
    assert torch.allclose(GradCAM(m, '0')(x, [1,2]), (by_hand-by_hand.amin((1,2), keepdim=True))/(by_hand.amax((1,2), keepdim=True)-by_hand.amin((1,2), keepdim=True)), atol=1e-4)

def test_dtypes_and_compiled():
    m,x = small_resnet().eval(),nature()
    plain = GradCAM(m)(x)
    maps = GradCAM(copy.deepcopy(m).bfloat16())(x)
    assert maps.dtype==torch.float32 and maps.isfinite().all()
    m.compile(backend='eager')
    m(x)
    assert torch.equal(GradCAM(m)(x), plain) and torch.equal(GradCAM(torch.compile(m, backend='eager'))(x), plain)
    with torch.no_grad(): m.fc.weight.fill_(torch.nan)
    assert (GradCAM(m)(x)==0).all() # Diverged: nothing to see, and no error

def test_grey_images_and_one_score():
    m = small_resnet(in_chans=1, num_classes=1)
    assert GradCAM(m)(torch.randn(2,1,64,48)).shape==(2,64,48)
    assert overlay(torch.rand(1,4,4), torch.rand(4,4)).shape==overlay(torch.rand(9,4,4), torch.rand(4,4)).shape==(4,4,3)

class Look(Callback):
    "Maps in the middle of a training, at each event in turn"
    order = 100
    def __init__(self, off=False): self.off,self.n,self.changed = off,0,0
    def look(self):
        if self.off: return
        before = state(self.model)
        with GradCAM(self.model) as cam: cam(self.xb[0])
        self.n += 1
        self.changed += not same(before, state(self.model))
    def before_batch(self): self.look()
    def after_pred(self): self.look()
    def before_backward(self): self.look()
    def before_step(self): self.look()
    def after_batch(self): self.look()

class Small(nn.Sequential):
    def __init__(self): super().__init__(nn.Conv2d(3,8,3,stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout2d(.3), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8,2))

@pytest.mark.parametrize('mixed', [False,True])
def test_middle_of_a_fit_with_gradient_accumulation(mixed):
    def run(off):
        torch.manual_seed(0); random.seed(0)
        learn = tiny_learner()
        learn.model = Small()
        learn.splitter = lambda m: list(m.parameters())
        if mixed: learn.add_cb(DeviceMixedPrecision(torch.bfloat16))
        look = Look(off)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=[GradientAccumulation(16), look])
        return learn,look
    (a,look),(b,_) = run(False),run(True)
    assert look.n>=20 and not look.changed
    assert all(torch.equal(v, b.model.state_dict()[k]) for k,v in a.model.state_dict().items())
    assert np.array_equal(np.array(a.recorder.values), np.array(b.recorder.values))

# Learner

def colours(i):
    "Half of it says the class: left or right is bright"
    im = np.random.default_rng(i).integers(0, 90, (64,64,3), dtype=np.uint8)
    im[16:48, 4:28 if i%2 else 60] += 100
    return PILImage.create(im)

def test_batch_of_items_is_that_of_the_loader():
    dls = tiny_dls(batch_tfms=[Normalize.from_stats(*imagenet_stats)])
    x,y = items_batch(dls.valid, [3,1])
    full = dls.valid.one_batch()
    assert torch.equal(x, full[0][[3,1]]) and torch.equal(y, full[1][[3,1]])
    before,rng = get_random_states()['torch_state'],dls.train.rng.getstate()
    items_batch(dls.train, [0])
    assert torch.equal(before, get_random_states()['torch_state']) and dls.train.rng.getstate()==rng

def titles(): return [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]
def pictures(): return [ax.images[0].get_array() for ax in plt.gcf().axes if ax.images]

@pytest.fixture
def learn(tmp_path):
    torch.manual_seed(0)
    plt.close('all')
    learn = tiny_learner(batch_tfms=[Normalize.from_stats(*imagenet_stats)])
    learn.model[3].weight.data.mul_(5)
    learn.path = tmp_path
    with learn.no_bar(): yield learn
    plt.close('all')

def test_show_cam_worst_first(learn):
    preds,targs,losses = learn.get_preds(with_loss=True)
    order = losses.argsort(descending=True)[:5]
    learn.model.train()
    before = state(learn.model)
    learn.show_cam(5)
    vocab = learn.dls.vocab
    assert titles()==[f'{vocab[targs[i]]} → {vocab[preds[i].argmax()]} {float(preds[i].max()):.0%}' for i in order]
    shown = [np.asarray(learn.dls.valid_ds[int(i)][0]) for i in order]
    assert all(np.abs(p[:,:64].astype(int)-s).max()<=1 for p,s in zip(pictures(), shown)) # Decoded, not normalised
    maps = GradCAM(learn.model)(items_batch(learn.dls.valid, order.tolist())[0])
    assert all(np.abs(p[:,64:].astype(int)-overlay(torch.tensor(s).permute(2,0,1)/255., m)).max()<=1 for p,s,m in zip(pictures(), shown, maps))
    red = [ax.title.get_color()=='firebrick' for ax in plt.gcf().axes if ax.get_title()]
    assert red==[bool(preds[i].argmax()!=targs[i]) for i in order]
    assert same(before, state(learn.model))

@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), nn.functional.cross_entropy, nn.BCEWithLogitsLoss(), nn.MultiLabelSoftMarginLoss(), partial(nn.functional.binary_cross_entropy_with_logits, reduction='sum')])
def test_show_cam_of_pytorchs_losses(learn, loss):
    "Which have no `activation`"
    learn.loss_func = loss
    learn.show_cam(3, which='first')
    logits = learn.model.eval()(items_batch(learn.dls.valid, range(3))[0]).detach()
    p = logits.softmax(1) if 'cross_entropy' in getattr(loss, '__name__', '') or isinstance(loss, nn.CrossEntropyLoss) else logits.sigmoid()
    assert [t.split(' ')[-1] for t in titles()]==[f'{float(o.max()):.0%}' for o in p]

def test_show_cam_others(learn):
    learn.show_cam(3, which='first')
    assert len(titles())==3 and np.abs(pictures()[0][:,:64].astype(int)-np.asarray(learn.dls.valid_ds[0][0])).max()<=1
    plt.close('all')
    learn.show_cam(50, which='random')
    assert len(titles())==8
    plt.close('all')
    learn.show_cam(items=[4,5], method='eigen')
    assert len(titles())==2 and not any('→' in t for t in titles())
    plt.close('all')
    learn.show_cam(items=[4,5], with_labels=True, targets='true', layer='0')
    assert [t.split(' ')[0] for t in titles()]==['0','1']
    x,y = items_batch(learn.dls.test_dl([4,5], with_labels=True), [0,1])
    maps = GradCAM(learn.model)(x, y)
    for p,m in zip(pictures(), maps): assert np.abs(p[:,64:].astype(int) - overlay(torch.tensor(p[:,:64].copy()).permute(2,0,1)/255., m)).max()<=1

def test_show_cam_bad_input(learn):
    for kw,why in ((dict(k=0),'k'), (dict(k=['x.png']),'k'), (dict(items=[]),'items'), (dict(items='x.png'),'items'), (dict(which='best'),'which'), (dict(targets='all'),'targets'), (dict(items=[1], targets='true'),'targets'), (dict(method='x'),'method')):
        with pytest.raises(ValueError, match=f'`{why}` must be'): learn.show_cam(**kw)

def test_show_cam_of_paths_and_several_labels(tmp_path):
    files = []
    for i in range(12):
        (tmp_path/f'c{i%2}').mkdir(exist_ok=True)
        files.append(tmp_path/f'c{i%2}'/f'{i}.png')
        colours(i).save(files[-1])
    dls = DataBlock((ImageBlock,MultiCategoryBlock), get_y=lambda f: [f.parent.name,'all'] if f.parent.name=='c1' else [f.parent.name], splitter=IndexSplitter([0,1,2,3]), item_tfms=Resize(64)).dataloaders(files, bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3,4,3,2), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(4,3)), loss_func=BCEWithLogitsLossFlat())
    with learn.no_bar(): learn.show_cam(4)
    assert sorted(t.split(' →')[0] for t in titles())==['all c1']*2+['c0']*2
    with pytest.raises(ValueError, match='`targets`'), learn.no_bar(): learn.show_cam(4, targets='true')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=(w := WatchCAM(n=2)))
    assert len(w.rows)==1
    plt.close('all')
    learn.show_cam(items=files[:2])
    assert len(titles())==2
    plt.close('all')

def watched(cb, n=2, fit=None, **kw):
    torch.manual_seed(0)
    learn = tiny_learner(cbs=cb, **kw)
    with learn.no_bar(), learn.no_logging(): (fit or (lambda l: l.fit(n)))(learn)
    return learn

def px(file): return np.asarray(Image.open(file)).astype(int)

def test_watch_files_and_strip(tmp_path):
    w = WatchCAM(n=3, save=tmp_path/'a'/'b')
    learn = watched(w, 3)
    assert sorted(p.name for p in (tmp_path/'a'/'b').iterdir())==['epoch-1.png','epoch-2.png','epoch-3.png','strip.png']
    strip,one = px(tmp_path/'a'/'b'/'strip.png'),px(tmp_path/'a'/'b'/'epoch-3.png')
    assert strip.shape==(4*96, 24+3*96, 3) and one.shape==(2*96, 24+3*96, 3)
    # Items spread over the 8 of the validation set; the maps of the last epoch are those of the model as it is now
    x,y = items_batch(learn.dls.valid, [0,2,5])
    cam = GradCAM(learn.model)
    maps,inner = cam(x).numpy(),(slice(8,-8),)*2
    for j in range(3):
        here = slice(24+96*j, 24+96*(j+1))
        img = np.asarray(Image.fromarray((255*x[j].permute(1,2,0).numpy()).round().astype(np.uint8)).resize((96,96), Image.BILINEAR)).astype(int)
        assert np.abs(strip[:96,here]-img).max()<=1 and np.array_equal(one[:96], strip[:96])
        seen = np.asarray(Image.fromarray(overlay(torch.tensor(x[j].numpy()), torch.tensor(maps[j]))).resize((96,96), Image.BILINEAR)).astype(int)
        assert np.abs(strip[3*96:,here][inner]-seen[inner]).max()<=1 and np.abs(one[96:,here][inner]-seen[inner]).max()<=1
        red = (strip[3*96,24+96*j+48]==(220,30,30)).all()
        assert red==bool(cam.logits[j].argmax()!=y[j])

class Steps(Callback):
    n = 0
    def after_step(self): Steps.n += 1

def test_watch_in_a_folder_that_cannot_be_written_to_is_found_before(tmp_path):
    (tmp_path/'file').touch()
    Steps.n = 0
    with pytest.raises(ValueError, match='`save` must be a folder that can be written to'): watched([WatchCAM(n=1, save=tmp_path/'file'), Steps()])
    assert not Steps.n

def test_watch_every_other_epoch_and_the_last(tmp_path):
    watched(WatchCAM(n=1, every=2, save=tmp_path), 5)
    assert sorted(p.name for p in tmp_path.iterdir())==['epoch-2.png','epoch-4.png','epoch-5.png','strip.png']

def test_watch_goes_on_through_fits_and_begins_anew_with_other_images(tmp_path):
    w = WatchCAM(n=2, save=tmp_path)
    learn = watched(w, fit=lambda l: l.fine_tune(2))
    assert [l for l,_ in w.rows]==['1','2','3']
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        assert [l for l,_ in w.rows]==['1','2','3','4']
        learn.validate(); learn.get_preds(); learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)
        assert len(w.rows)==4
        learn.dls = tiny_dls(n=40)
        learn.fit(1)
    assert [l for l,_ in w.rows]==['1'] and px(tmp_path/'strip.png').shape[0]==2*96

def test_watch_given_items_and_stages(tmp_path):
    w = WatchCAM(items=[3,4,5])
    learn = watched(w, fit=lambda l: None)
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging():
        learn.add_cb(ft.ProgressiveResize(mult=8))
        learn.fit(2)
        learn.remove_cb(ft.ProgressiveResize)
        learn.fit_stages([ft.Stage(32, 1), ft.Stage(64, 1)])
    assert [l for l,_ in w.rows]==['1','2','3','4'] and w.rows[0][1].shape==(96,3*96,3)
    x = learn.dls.test_dl([3,4,5]).one_batch()[0]
    assert np.abs(w.images[:,:96].astype(int) - np.asarray(Image.fromarray((255*x[0].permute(1,2,0).numpy()).round().astype(np.uint8)).resize((96,96), Image.BILINEAR))).max()<=1

def test_watch_is_told_of_wrong_arguments_before_a_fit():
    for kw,why in ((dict(n=0),'n'), (dict(n=True),'n'), (dict(every=0),'every'), (dict(every=.5),'every'), (dict(items=[]),'items'), (dict(items='a'),'items'), (dict(save=3),'save'), (dict(method='x'),'method')):
        with pytest.raises(ValueError, match=f'`{why}` must be'): WatchCAM(**kw)
    seen = []
    class Batches(Callback):
        def before_batch(self): seen.append(1)
    learn = tiny_learner(cbs=[WatchCAM(layer='nope'), Batches()])
    with pytest.raises(ValueError, match='`layer`'), learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not seen

def test_watch_changes_nothing_and_shows_in_place(monkeypatch):
    import IPython, IPython.display, fastai_tricks.look.cam as mod
    from types import SimpleNamespace
    from fastai.torch_core import set_seed
    shown = []
    class Handle:
        def update(self, o): shown.append(('update',o))
    monkeypatch.setattr(mod, 'IN_NOTEBOOK', True)
    monkeypatch.setattr(IPython, 'get_ipython', lambda: SimpleNamespace(execution_count=cell))
    monkeypatch.setattr(IPython.display, 'display', lambda o, display_id: shown.append(('display',o)) or Handle())
    def run(cb):
        set_seed(0)
        learn = tiny_learner(cbs=cb)
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(2)
        return learn
    cell = 1
    a,b = run(WatchCAM(n=2)),run(None)
    assert [k for k,_ in shown]==['display','update','update'] and shown[0][1].data[:3]==b'\xff\xd8\xff'
    assert all(torch.equal(v, b.model.state_dict()[k]) for k,v in a.model.state_dict().items())
    assert [list(v) for v in a.recorder.values]==[list(v) for v in b.recorder.values]
    cell = 2
    with a.no_bar(), a.no_logging(): a.fit(1)
    assert shown[-1][0]=='display'

def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    watched(WatchCAM(n=1, save=tmp_path), 1)
    was = {p.name:p.read_bytes() for p in tmp_path.iterdir()}
    def half(self, f, fmt):
        Path(f).write_bytes(b'half')
        raise OSError('disk full')
    monkeypatch.setattr(Image.Image, 'save', half)
    with pytest.raises(OSError): watched(WatchCAM(n=1, save=tmp_path), 1)
    assert {p.name:p.read_bytes() for p in tmp_path.iterdir()}==was and len(was)==2

def test_watch_is_exported_without_pictures(tmp_path):
    learn = watched(WatchCAM(n=2), 1)
    learn.path = tmp_path
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    assert type(loaded.watch_cam) is Callback and len(learn.watch_cam.rows)==1

class SkipSecond(Callback):
    def before_epoch(self):
        if self.epoch==1: raise CancelEpochException()

def test_watch_shows_no_epoch_that_trained_nothing():
    w = WatchCAM(n=1)
    watched([w,SkipSecond()], 3)
    assert [l for l,_ in w.rows]==['1','3']

@pytest.mark.parametrize('block,y,n', [(PointBlock, [[5.,5],[20,20]], 4), (RegressionBlock, 1.5, 1)], ids=['points','numbers'])
def test_targets_that_are_no_classes_are_refused_before_training(block, y, n):
    db = DataBlock((ImageBlock,block), get_x=lambda i: Image.new('RGB', (32,32)), get_y=lambda i: y, splitter=IndexSplitter([0,1,2,3]))
    learn = Learner(db.dataloaders(list(range(12)), bs=4, num_workers=0, device='cpu'), nn.Sequential(nn.Conv2d(3,4,3), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(4,n)), loss_func=MSELossFlat())
    was = [p.clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match='targets are classes'): learn.fit(1, cbs=WatchCAM(n=2))
        with pytest.raises(ValueError, match='targets are classes'): learn.show_cam(2)
    assert all(map(torch.equal, was, learn.model.parameters()))
