"""Runs of `fit_stages` that are killed: `stages_run.py FOLDER CASE...`

A case is a chain of kills such as `batch:10+rename:2`, '' for none: batch:N at the Nth training batch, rename:N just
before the Nth file is put in place, renamed:N just after it, slow at no point of its own but slowly. With one case its first run
happens in this process. With more, each run is forked, to import once, and a last run of each ends by itself: in FOLDER/CASE."""
import os, signal, sys, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import torch
from torch import nn
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.layers import ConvLayer
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
import fastai.callback.schedule
from fastai_tricks.stages import Stage
from fastai_tricks.test_utils import tiny_dls

STAGES = [Stage(32,2), Stage(48,2,bs=4,fit='fine_tune',freeze_epochs=1), Stage(64,2)]

def body_head(m): return [list(m[0].parameters()), list(m[1:].parameters())]

def make_learner(folder, cbs=None, ch=8, seed=42):
    "Dropout draws random numbers in each step, the batchnorm of `ConvLayer` has buffers"
    set_seed(seed, reproducible=True)
    m = nn.Sequential(ConvLayer(3,ch,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.3), nn.Linear(ch,2))
    return Learner(tiny_dls(), m, splitter=body_head, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=folder, cbs=cbs)

def die(): os.kill(os.getpid(), signal.SIGKILL)

class KillAt(Callback):
    "Die at the `n`th training batch"
    run_valid = False
    def __init__(self, n): self.n,self.i = n,0
    def before_backward(self):
        self.i += 1
        if self.i==self.n: die()

class Slow(Callback):
    run_valid = False
    def before_backward(self): time.sleep(.1)

def run(folder, kill=''):
    kind,_,n = kill.partition(':')
    # Where there is something to take up, nothing may depend on how the Learner begins
    seed = 7 if (folder/'models'/'stages.pth').exists() else 42
    learn = make_learner(folder, seed=seed, cbs=KillAt(int(n)) if kind=='batch' else Slow() if kind=='slow' else None)
    replace,count = os.replace,[0]
    def counted(*args, **kwargs):
        count[0] += 1
        if kill==f'rename:{count[0]}': die()
        replace(*args, **kwargs)
        if kill==f'renamed:{count[0]}': die()
    os.replace = counted
    with learn.no_bar(), learn.no_logging(): df = learn.fit_stages(STAGES)
    df.drop(columns='file').to_json(folder/'table.json')
    torch.save(learn.model.state_dict(), folder/'final.pth')

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
