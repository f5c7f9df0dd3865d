"One pass of images: layers behind converted ones, their errors, and batch norms"
import copy, math
import pytest, torch
from torch import nn
from fastai_tricks.models.calibrate import calibrate, conv_patches, note_outputs
from fastai_tricks.models.convert import dense_convs, separable_copy
from fastai_tricks.models.inputs import training_images
from separated import CONVS, convert, no_hooks, seps

def names_of(model): return [n for n,(_,why) in dense_convs(model).items() if not why]

def calibrated(model, names, xb, fit=True):
    new = separable_copy(model, names, xb)
    return new,calibrate(new, note_outputs(model, names, xb), xb, fit)

def output_of(model, name, x):
    "What a layer takes, and what it puts out"
    seen = []
    h = model.get_submodule(name).register_forward_hook(lambda m,i,o: seen.append((i[0],o)))
    with torch.no_grad(): model.eval()(x)
    h.remove()
    return seen[0]

@pytest.mark.parametrize('kind', CONVS)
def test_patches_are_what_the_layer_sees(kind):
    torch.manual_seed(0)
    conv,x = CONVS[kind](),torch.randn(3,6,13,11)
    y = torch.einsum('bchwij,ocij->bohw', conv_patches(conv, x), conv.weight)
    assert torch.allclose(y + (0 if conv.bias is None else conv.bias[:,None,None]), conv(x), atol=1e-5)

def test_layers_are_fitted_behind_converted_ones(trained):
    "The last layer's error is smaller than with each layer fitted to the dense network's inputs"
    xb,model = training_images(trained, 48),trained.model
    names = names_of(model)[2:6]
    fitted,_ = calibrated(model, names, xb)
    apart = separable_copy(model, names, xb)
    calibrate(apart, note_outputs(model, names, xb), xb, fit=False)
    for n in names:
        one,_ = calibrated(model, [n], xb)
        apart.get_submodule(n).load_state_dict(one.get_submodule(n).state_dict())
    dense,*others = (output_of(m, names[-1], xb[0])[1] for m in (model,fitted,apart))
    errors = [(o-dense).pow(2).sum().item() for o in others]
    assert errors[0]<errors[1]

def test_error_is_that_of_the_converted_network(trained):
    xb,model = training_images(trained, 64),trained.model
    name = names_of(model)[0]
    new,errors = calibrated(model, [name], xb, fit=False)
    x,y = output_of(model, name, xb[0])
    with torch.no_grad(): out = new.get_submodule(name)(x)
    exact = ((out-y).pow(2).sum()/(y-y.mean((0,2,3), keepdim=True)).pow(2).sum()).item()
    assert math.isclose(errors[name], exact, rel_tol=.1)

def test_batch_norms_are_those_of_the_calibration(trained):
    "Behind the first converted layer the statistics are those of the images; before it, and momentum and modes, as they were"
    xb = training_images(trained, 64)
    model = copy.deepcopy(trained.model).train()
    model[0].eval()
    modes = [m.training for m in model.modules()]
    new = convert(model, xb[0], select='0.model.layer2')
    assert [m.training for m in model.modules()]==modes and next(new.modules()).training and not new[0].training
    norms = [(n,m) for n,m in new.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for _,m in norms}=={.1}
    changed = {n for n,m in norms if not torch.equal(m.running_var, model.get_submodule(n).running_var)}
    assert changed and not any('layer1' in n or 'model.bn1' in n or 'model.conv1' in n for n in changed)
    name = '0.model.layer2.0.bn1'
    x,norm = output_of(new, name, xb[0])[0],new.get_submodule(name)
    assert torch.allclose(x.mean((0,2,3)), norm.running_mean, atol=1e-4)
    assert torch.allclose(x.var((0,2,3)), norm.running_var, rtol=1e-3)

def test_a_channel_of_zeros_can_still_learn():
    model = nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.ReLU(), nn.Conv2d(8,8,3,padding=1))
    model[0].weight.data[2],model[0].bias.data[2] = 0,-1
    sep = convert(model, torch.randn(16,3,16,16))[2]
    assert all(torch.isfinite(p).all() for p in sep.parameters()) and sep.depthwise.weight[2].abs().sum()>0 and sep.pointwise.weight[:,2].abs().sum()>0

@pytest.mark.parametrize('kwargs', [{}, {'norm':True}, {'select':1e-9}], ids=['','norm','timed'])
def test_one_image_and_a_map_of_one_pixel(kwargs):
    "There are no statistics of one value: the batch norms keep theirs"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3,8,3), nn.Conv2d(8,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8,2))
    new = convert(model, torch.randn(1,3,5,5), **kwargs)
    assert seps(new)==['1'] or 'select' in kwargs
    assert all(torch.isfinite(t).all() for t in new.state_dict().values())
    for i in (2,5): assert torch.equal(new[i].running_var, torch.ones(8)) and torch.equal(new[i].running_mean, torch.zeros(8))

def test_an_error_leaves_the_model(trained, monkeypatch):
    def boom(*args): raise KeyboardInterrupt
    monkeypatch.setattr('fastai_tricks.models.calibrate._fit_layer', boom)
    model = trained.model
    was,modes = {k:v.clone() for k,v in model.state_dict().items()},[m.training for m in model.modules()]
    with pytest.raises(KeyboardInterrupt): convert(model, training_images(trained, 16)[0])
    assert list(was)==list(model.state_dict()) and all(torch.equal(v, was[k]) for k,v in model.state_dict().items())
    assert [m.training for m in model.modules()]==modes and no_hooks(model)

@pytest.mark.parametrize('kwargs', [{}, {'select':1e-3, 'skip':[f'0.model.layer{i}' for i in (1,2,3)]}], ids=['all','timed'])
def test_no_hook_is_left(trained, kwargs, monkeypatch):
    monkeypatch.setattr('fastai_tricks.models.depthwise.speedup', lambda times: 2.)
    new = convert(trained.model, training_images(trained, 16)[0], **kwargs)
    assert seps(new) and no_hooks(new) and no_hooks(trained.model)
