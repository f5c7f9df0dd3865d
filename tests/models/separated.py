"Convolutions of many kinds, and what is separable in a network"
from timm.layers import Conv2dSame
from torch import nn
import fastai_tricks.all as ft

def seps(model): return [n for n,m in model.named_modules() if isinstance(m, ft.DepthwiseSeparableConv)]
def convert(model, *args, **kwargs): return ft.to_depthwise(model, *args, verbose=False, **kwargs)
def no_hooks(model): return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

CONVS = {
    'plain':lambda: nn.Conv2d(6, 8, 3), 'padded':lambda: nn.Conv2d(6, 8, 3, padding=1), 'strided':lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1),
    'dilated':lambda: nn.Conv2d(6, 8, 3, padding=4, dilation=2, bias=False), 'same':lambda: nn.Conv2d(6, 8, 4, padding='same'),
    'wide':lambda: nn.Conv2d(6, 8, (1,5), padding=(0,2), stride=(2,1)), 'few outputs':lambda: nn.Conv2d(6, 2, 3, padding=1),
    'reflect':lambda: nn.Conv2d(6, 8, 3, padding=2, padding_mode='reflect'), 'circular':lambda: nn.Conv2d(6, 8, (3,5), padding=(1,2), stride=2, padding_mode='circular'),
    'replicate same':lambda: nn.Conv2d(6, 8, 3, padding='same', padding_mode='replicate', dilation=(2,1)),
    'Conv2dSame':lambda: Conv2dSame(6, 8, 3, stride=2), 'Conv2dSame, even':lambda: Conv2dSame(6, 8, 4, stride=2, dilation=2)}
