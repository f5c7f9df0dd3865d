"A separable layer in the place of a dense one: what is exact, what is closest"
import math
import numpy as np
import pytest, torch
from torch import nn
from fastai_tricks.models.separable import DepthwiseSeparableConv, fit_separable, separate, weight_error
from separated import CONVS, convert

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
    assert weight_error(conv.weight) < 1e-10

@pytest.mark.parametrize('m', [1,2,5,9])
def test_svd_is_the_closest(m):
    "Eckart and Young, against numpy, and against other pairs"
    torch.manual_seed(0)
    w = torch.randn(12,5,3,3)
    d,p = separate(w, m)
    product = torch.einsum('imk,oim->oik', d.view(5,m,9), p.view(12,5,m))
    best = 0
    for i in range(5):
        u,s,v = np.linalg.svd(w[:,i].flatten(1).double().numpy(), full_matrices=False)
        best += (s[m:]**2).sum()
        assert np.allclose(product[:,i].numpy(), (u[:,:m]*s[:m])@v[:m], atol=1e-5)
    assert math.isclose((product-w.flatten(2)).pow(2).sum().item(), best, rel_tol=1e-4, abs_tol=1e-4)
    assert math.isclose(weight_error(w, m), best/w.double().pow(2).sum().item(), rel_tol=1e-4, abs_tol=1e-6)

def test_fit_finds_a_separable_layer():
    "Outputs that a separable layer gave, from patches with dependent channels"
    torch.manual_seed(0)
    i,k,o = 5,9,7
    x = (torch.randn(3000,3)@torch.randn(3,i*k) + torch.randn(3000,i*k)).view(-1,i,k)
    d,p = torch.randn(i,k),torch.randn(o,i)
    y = torch.einsum('nik,ik,oi->no', x, d, p)
    def error(d, p): return ((torch.einsum('nik,ik,oi->no', x, d, p)-y).pow(2).sum()/y.pow(2).sum()).item()
    start = torch.randn(i,k, generator=torch.Generator().manual_seed(1)),torch.zeros(o,i)
    errors = [error(*fit_separable(x, y, *start, s)) for s in (0,1,4,30)]
    assert errors==sorted(errors, reverse=True) and errors[-1]<1e-3

def test_fit_keeps_what_patches_do_not_determine():
    "From few patches an exact layer stays exact, and a channel that is always 0 keeps its weights"
    torch.manual_seed(0)
    x,d,p = torch.randn(20,6,9),torch.randn(6,9),torch.randn(8,6)
    x[:,2] = 0
    y = torch.einsum('nik,ik,oi->no', x, d, p)
    d2,p2 = fit_separable(x, y, d, p)
    assert torch.allclose(torch.einsum('ik,oi->oik', d2, p2), torch.einsum('ik,oi->oik', d, p), atol=1e-4)
    conv,few,new = nn.Sequential(nn.Conv2d(6,8,3)),torch.randn(4,6,4,4),torch.randn(2,6,7,7)
    assert torch.allclose(convert(conv, few, multiplier=8)(new), convert(conv, init='svd', multiplier=8)(new), atol=1e-4)

def test_the_layer_alone():
    "Its arguments are those of a convolution"
    sep = DepthwiseSeparableConv(4, 8, 3, 2, 1, dilation=2, padding_mode='reflect', bias=False, multiplier=2, norm=True, dtype=torch.float64)
    assert sep(torch.randn(2,4,9,9, dtype=torch.float64)).shape==nn.Conv2d(4, 8, 3, 2, 1, dilation=2)(torch.randn(2,4,9,9)).shape
    assert [type(m) for m in sep]==[nn.Conv2d,nn.BatchNorm2d,nn.Conv2d] and sep.depthwise.padding_mode=='reflect'
    assert {p.dtype for p in sep.parameters()}=={torch.float64} and sep.pointwise.bias is None and sep.pointwise.in_channels==8
