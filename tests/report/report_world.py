"""A world for the tests of reports, with a clock of its own: seconds pass only where a model computes

`pretend` is a training that does not train: it takes as long as its tips say, and scores what they say. With `net` a
training is a real one, and `See.batches` is what the model got."""
import math, sys
from pathlib import Path
import numpy as np, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.learner import Metric
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai_tricks.report import bench
from fastai_tricks.report.report import tips_report
from fastai_tricks.report.tips import Tip

class Clock:
    "Seconds that pass when it is told"
    def __init__(self): self.restart()
    def __call__(self): return self.t
    def restart(self, slower=lambda t: 1): self.t,self.slower = 0.,slower
    def spend(self, seconds):
        "As long as it takes on a machine that is `slower(t)` times as slow at the time `t`"
        n = math.ceil(seconds)
        for _ in range(n): self.t += seconds/n*self.slower(self.t)
clock = Clock()

# Real trainings ------------------------------------------------------------------

class See: batches = []

world = sys.modules[__name__] # What a network notes down here is no part of what it is
stopped = False

class Net(nn.Sequential):
    def forward(self, x):
        world.See.batches.append((self.training, len(x), *x.shape[-2:]))
        # A third for a prediction; a share of each image does not depend on its size
        world.clock.spend(len(x)*(1 if self.training else 1/3)*(.1 + .4*x.shape[-1]*x.shape[-2]/64**2))
        return super().forward(x)

def net(pretrained=False):
    return nn.Sequential(Net(nn.Conv2d(3, 2, 3, 4, 1), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4))

class Worth(Callback):
    "Makes the score of a training what a test wants"
    def __init__(self, gain): self.gain = gain

class Score(Metric):
    "Half, and what tips are worth"
    name = 'score'
    def reset(self): pass
    def accumulate(self, learn): self.learn = learn
    @property
    def value(self): return .5 + .002*torch.initial_seed() + sum(cb.gain for cb in self.learn.cbs if isinstance(cb, Worth))

def worth(name, gain, cost=1, **kwargs):
    "A tip, for real trainings and for pretended ones"
    return Tip(name, learn=f'learn.add_cb(Worth({gain}))', names=dict(Worth=Worth, gain=gain, cost=cost), **kwargs)

# Pretended ones ------------------------------------------------------------------

class Pretend:
    "Stands for `Bench.train`: half a second per image, times what the tips cost"
    def __init__(self): self.calls,self.noise = [],.001
    def __call__(self, tips, seed, epochs, images, points=4, parts=(None,None), cbs=None):
        valid = parts[0]
        self.calls.append(dict(tips=[t.name for t in tips], seed=seed, epochs=epochs, images=images, points=points, valid=valid))
        began = clock()
        clock.spend(2)
        began_training = clock()
        def of(k, default): return [v(seed) if callable(v := t.names.get(k, default)) else v for t in tips]
        clock.spend(.5*epochs*images*np.prod(of('cost', 1)))
        seconds,began_validation = clock()-began_training,clock()
        clock.spend(points*len(valid or range(8))/6)
        validation = clock()-began_validation
        gains = of('gain', 0)
        score = .5 + .002*(seed%100) + sum(gains) + self.noise*len(gains)*(seed%3)
        curve = [[seconds*(k+1)/points, score*(k+1)/points] for k in range(points)]
        wall = clock()-began
        return dict(seconds=seconds, images=epochs*images, epochs=epochs, epoch_images=images, curve=curve, score=score, validation=validation,
                    memory=None, wall=wall, setup=wall-seconds-validation)
    @property
    def trained(self): return [c for c in self.calls if c['points']==4]

# Data ----------------------------------------------------------------------------

PICTURES = [PILImage.create(np.random.default_rng(i).integers(0, 255, (64,64,3), dtype=np.uint8)) for i in range(8)]
def picture(i): return PICTURES[i%8]
def parity(i): return 'ab'[i%2]
def block(n_valid=8, **kwargs):
    return DataBlock((ImageBlock,CategoryBlock), get_x=picture, get_y=parity, splitter=IndexSplitter(range(n_valid)), item_tfms=Resize(64), **kwargs)

DATA = dict(num_workers=0, device=torch.device('cpu'))

def report(out, tips, minutes=None, n=48, db=None, seeds=3, steps=2, options=None, **kwargs):
    "About 15 batches for each training"
    n_tips = len(tips)
    if minutes is None: minutes = 1.*seeds*(1+n_tips + max(0, min(steps, n_tips-1)) + 2*(n_tips>1))
    args = dict(arch=net, pretrained=False, bs=4, minutes=minutes, tips=tips, metric=Score(), out=out, seeds=seeds)
    return tips_report(db or block(), list(range(n)), **{**args, **kwargs}, options=dict(steps=steps, data=DATA) | (options or {}))
