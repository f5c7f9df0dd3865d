"Runs of `climb` that are killed: `climb_run.py FOLDER CASE...`, see `killed.py`; the case 'outside' is killed by another process"
import gc, os, random, signal, sys, time, warnings
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
from fastai_tricks.cv.climb import climb
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from killed import forked, killer, main, start

def noise(i): return PILImage.create(np.random.default_rng(i).integers(0, 255, (16,16,3), dtype=np.uint8))
def kind(i): return 'abcdef'[i%6]
def block(y=kind, target=CategoryBlock, **kwargs): return DataBlock((ImageBlock,target), get_x=noise, get_y=y, item_tfms=Resize(16), **kwargs)

def make_learner(dls):
    m = nn.Sequential(ConvLayer(3,8,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.3), nn.Linear(8,dls.c))
    return Learner(dls, m, metrics=accuracy)

def run(folder, **kwargs):
    def fit(learn):
        with open(folder/'fits.txt', 'a') as f: f.write(f'{learn.dls.c} {len(learn.dls.train_ds)} {sum(learn.dls.train_ds.items)}\n')
        learn.fit_one_cycle(1, cbs=killer())
    # Nothing may depend on where the random states begin
    set_seed(int(time.time()))
    res = climb(make_learner, block(), list(range(72)), rungs=[2,(4,24),None], fit=fit, n_splits=2, test_items=list(range(100, 110)),
                ids=[f'{i}.jpg' for i in range(10)], out=folder/'climb', bs=4, num_workers=0, device='cpu', **kwargs)
    res.table.drop(columns=['seconds','submission']).to_json(folder/'table.json')
    torch.save([cv.oof for cv in res.cvs], folder/'oof.pth')
    return res

def outside(folder):
    "Killed at some moment after the first fold, then run again"
    folder.mkdir(parents=True)
    pid = os.fork()
    if not pid:
        start('slow')
        run(folder)
        os._exit(0)
    end = time.time() + 60
    while not list((folder/'climb').glob('*/fold-0-oof.pth')) and time.time()<end: time.sleep(.02)
    time.sleep(random.random()*1.5)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not (folder/'table.json').exists() and not forked(run, folder, '')

if __name__=='__main__':
    gc.freeze() # Each fold ends in `gc.collect()`
    root,*cases = sys.argv[1:]
    if 'outside' in cases: outside(Path(root)/'outside')
    sys.argv[2:] = [c for c in cases if c!='outside']
    main(run)
