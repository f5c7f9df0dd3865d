"Which layers can be converted, which are chosen, and what hangs on them"
import pytest, timm, torch
from torch import nn
from fastai_tricks.models.convert import dense_convs
from separated import convert, seps

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

def test_convolutions_that_share_a_parameter_stay():
    m = nn.Sequential(nn.Conv2d(8,8,3), nn.Conv2d(8,8,3), nn.Conv2d(8,8,3))
    m[1].weight = m[0].weight
    assert [why for _,why in dense_convs(m, skip=None).values()]==['shares its weights with another']*2 + ['']

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
    assert seps(convert(model, torch.randn(8,3,16,16), select=1e-9)) in (['a'],[]) # The clock cannot time the unused one

def test_hooks_and_what_is_frozen_go_along():
    conv,calls = nn.Conv2d(8,8,3),[]
    conv.register_full_backward_hook(lambda *a: calls.append(1))
    conv.weight.requires_grad_(False)
    new = convert(nn.Sequential(conv), size=8)
    new(torch.randn(1,8,8,8, requires_grad=True)).sum().backward()
    assert calls==[1]
    assert {n:p.requires_grad for n,p in new[0].named_parameters()}=={'depthwise.weight':False, 'pointwise.weight':False, 'pointwise.bias':True}
