"""Runs of `fit_fast` that are killed: `fast_run.py FOLDER CASE...`, see `killed.py`

3 batches of the head, then 4 epochs of 3 batches. Files: 1 the start, 2 features, 3 the head, 4 to 7 after epochs 0 to 3, 8 the end."""
import sys, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.layers import ConvLayer
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import defaults, set_seed
from torch import nn
import fastai_tricks.fast.fit_fast
from fastai_tricks.core.learner import swapped
from fastai_tricks.core.test_utils import tiny_dls
from fastai_tricks.train.ema import EMA
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from killed import killer, main

def body_head(m): return [list(m[0].parameters()), list(m[1:].parameters())]

def make_learner(folder, cbs=None, seed=42, ch=8, frozen=True, metrics=accuracy, **kwargs):
    "Dropout draws random numbers in each step, the batchnorm of `ConvLayer` has buffers"
    set_seed(seed, reproducible=True)
    body = nn.Sequential(ConvLayer(3,ch,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    m = nn.Sequential(body, nn.Sequential(nn.Dropout(.3), nn.Linear(ch,2)))
    learn = Learner(tiny_dls(**{'n':20, 'bs':4, **kwargs}), m, splitter=body_head, loss_func=CrossEntropyLossFlat(), metrics=metrics, path=folder, cbs=cbs)
    if frozen: learn.freeze()
    return learn

def others(): return [SaveModelCallback(fname='best'), MixUp(), EMA()]

ARGS = dict(pretrained=True, head=3, mixed=False)

def everywhere(cb):
    "In each Learner that is made, that of the head too"
    here = type('Here', (type(cb),), dict(vars(cb), __init__=Callback.__init__)) if cb else None
    return swapped(defaults, 'callbacks', [*defaults.callbacks, *filter(None, [here])])

def outcome(learn):
    "All that a run ends with, as tensors"
    rec = learn.recorder
    curves = dict(values=torch.tensor(rec.values), losses=torch.tensor([float(o) for o in rec.losses]), lrs=torch.tensor(rec.lrs, dtype=torch.float64))
    return dict(model={k:v.clone() for k,v in learn.model.state_dict().items()}, drawn=torch.rand(3), **curves)

def run(folder):
    # Where there is something to take up, nothing may depend on how the Learner begins
    seed = 7 if (folder/'models'/'run.pth').exists() else 42
    with everywhere(killer()):
        learn = make_learner(folder, seed=seed)
        with learn.no_bar(), learn.no_logging(): learn.fit_fast(4, **ARGS, name='run', cbs=others())
    torch.save(outcome(learn), folder/'final.pth')

if __name__=='__main__': main(run)
