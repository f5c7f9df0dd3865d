"Runs of `fit_stages` that are killed: `stages_run.py FOLDER CASE...`, see `killed.py`"
import sys, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import torch
from torch import nn
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.layers import ConvLayer
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
import fastai.callback.schedule
from fastai_tricks.resize.stages import Stage
from fastai_tricks.core.test_utils import tiny_dls
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from killed import killer, main

# 12 images: 6 batches in stage 1, 6 frozen and 12 unfrozen ones in stage 2, 6 in stage 3
STAGES = [Stage(32,2), Stage(48,2,bs=2,fit='fine_tune',freeze_epochs=1), Stage(64,2)]

def body_head(m): return [list(m[0].parameters()), list(m[1:].parameters())]

def make_learner(folder, cbs=None, ch=8, seed=42):
    "Dropout draws random numbers in each step, the batchnorm of `ConvLayer` has buffers"
    set_seed(seed, reproducible=True)
    m = nn.Sequential(ConvLayer(3,ch,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.3), nn.Linear(ch,2))
    return Learner(tiny_dls(n=20, bs=4), m, splitter=body_head, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=folder, cbs=cbs)

def run(folder):
    # Where there is something to take up, nothing may depend on how the Learner begins
    seed = 7 if (folder/'models'/'stages.pth').exists() else 42
    learn = make_learner(folder, seed=seed, cbs=killer())
    with learn.no_bar(), learn.no_logging(): df = learn.fit_stages(STAGES)
    df.drop(columns='file').to_json(folder/'table.json')
    torch.save(learn.model.state_dict(), folder/'final.pth')

if __name__=='__main__': main(run)
