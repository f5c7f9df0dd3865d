"""Runs of `climb` that are killed: `climb_run.py FOLDER CASE...`

A case is a chain of kills such as `batch:10+rename:2`, '' for none: batch:N at the Nth training batch, rename:N just
before the Nth file is put in place, renamed:N just after it, slow at no point of its own but slowly. With one case its first run
happens in this process. With more, each run is forked, to import once, and a last run of each ends by itself: in FOLDER/CASE."""
import os, signal, sys, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import numpy as np, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.learner import Learner
from fastai.layers import ConvLayer
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai_tricks.climb import climb

def noise(i): return PILImage.create(np.random.default_rng(i).integers(0, 255, (32,32,3), dtype=np.uint8))
def kind(i): return 'abcdef'[i%6]

def make_learner(dls):
    m = nn.Sequential(ConvLayer(3,8,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.3), nn.Linear(8,dls.c))
    return Learner(dls, m, metrics=accuracy)

def die(): os.kill(os.getpid(), signal.SIGKILL)

class KillAt(Callback):
    "Die at the `n`th training batch of the run"
    run_valid = False
    i = 0
    def __init__(self, n): self.n = n
    def before_backward(self):
        KillAt.i += 1
        if KillAt.i==self.n: die()

class Slow(Callback):
    run_valid = False
    def before_backward(self): time.sleep(.05)

HOW = {} # Not in `fit` itself, whose code and constants are compared when a run goes on

def run(folder, kill='', **kwargs):
    HOW['what'],_,HOW['n'] = kill.partition(':')
    KillAt.i,replace,count = 0,os.replace,[0]
    def counted(*args, **kwargs):
        count[0] += 1
        if kill==f'rename:{count[0]}': die()
        replace(*args, **kwargs)
        if kill==f'renamed:{count[0]}': die()
    os.replace = counted
    def fit(learn):
        with open(folder/'fits.txt', 'a') as f: f.write(f'{learn.dls.c} {len(learn.dls.train_ds)} {sum(learn.dls.train_ds.items)}\n')
        learn.fit_one_cycle(1, cbs=dict(batch=lambda: KillAt(int(HOW['n'])), slow=Slow).get(HOW['what'], lambda: None)())
    # Nothing may depend on where the random states begin
    set_seed(int(time.time()))
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    res = climb(make_learner, db, list(range(72)), rungs=[2,(4,24),None], fit=fit, n_splits=2, test_items=list(range(100, 110)), ids=[f'{i}.jpg' for i in range(10)], out=folder/'climb', bs=4, num_workers=0, device='cpu', **kwargs)
    res.table.drop(columns=['seconds','submission']).to_json(folder/'table.json')
    torch.save([cv.oof for cv in res.cvs], folder/'oof.pth')
    return res

def forked(folder, kill):
    "True where the run died by SIGKILL, False where it ended well"
    pid = os.fork()
    if not pid:
        try: run(folder, kill)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0,-signal.SIGKILL), (folder, kill, code)
    return code!=0

if __name__=='__main__':
    torch.set_num_threads(1)
    root,*cases = sys.argv[1:]
    if len(cases)==1: run(Path(root), cases[0])
    else:
        for case in cases:
            folder = Path(root)/case
            folder.mkdir(parents=True, exist_ok=True)
            for kill in filter(None, case.split('+')): assert forked(folder, kill), f'{case}: {kill} was never reached'
            assert not forked(folder, '')
