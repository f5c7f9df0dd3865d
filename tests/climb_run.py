"Runs of `climb` that are killed: `climb_run.py FOLDER CASE...`, see `killed.py`"
import time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import numpy as np, torch
from torch import nn
from fastai.data.block import CategoryBlock, DataBlock
from fastai.learner import Learner
from fastai.layers import ConvLayer
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai_tricks.climb import climb
from killed import killer, main

def noise(i): return PILImage.create(np.random.default_rng(i).integers(0, 255, (32,32,3), dtype=np.uint8))
def kind(i): return 'abcdef'[i%6]

def make_learner(dls):
    m = nn.Sequential(ConvLayer(3,8,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.3), nn.Linear(8,dls.c))
    return Learner(dls, m, metrics=accuracy)

def run(folder, **kwargs):
    def fit(learn):
        with open(folder/'fits.txt', 'a') as f: f.write(f'{learn.dls.c} {len(learn.dls.train_ds)} {sum(learn.dls.train_ds.items)}\n')
        learn.fit_one_cycle(1, cbs=killer())
    # Nothing may depend on where the random states begin
    set_seed(int(time.time()))
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    res = climb(make_learner, db, list(range(72)), rungs=[2,(4,24),None], fit=fit, n_splits=2, test_items=list(range(100, 110)), ids=[f'{i}.jpg' for i in range(10)], out=folder/'climb', bs=4, num_workers=0, device='cpu', **kwargs)
    res.table.drop(columns=['seconds','submission']).to_json(folder/'table.json')
    torch.save([cv.oof for cv in res.cvs], folder/'oof.pth')
    return res

if __name__=='__main__': main(run)
