"""Runs that are killed, for tests: `main(run)` is a script `FOLDER CASE...`

A case is a chain of kills such as `batch:10+rename:2`, '' for none: batch:N at the Nth training batch, rename:N just
before the Nth file is put in place, renamed:N just after it, slow at no point of its own but slowly. With one case its first run
happens in this process. With more, each run is forked, to import once, and a last run of each ends by itself: in FOLDER/CASE."""
import gc, os, random, signal, subprocess, sys, time, traceback
from pathlib import Path
import torch
from fastai.callback.core import Callback

def die(): os.kill(os.getpid(), signal.SIGKILL)

class KillAt(Callback):
    "Die at the `n`th training batch of the run, whatever the Learner"
    run_valid,i = False,0
    def __init__(self, n): self.n = n
    def before_backward(self):
        KillAt.i += 1
        if KillAt.i==self.n: die()

class Slow(Callback):
    run_valid = False
    def before_backward(self): time.sleep(.1)

def killer():
    "The callback of this run's kill, if it has one"
    kind,_,n = os.environ.get('KILL', '').partition(':') # Not in the code that `climb` compares when a run goes on
    return KillAt(int(n)) if kind=='batch' else Slow() if kind=='slow' else None

def start(kill):
    "Begin a run that dies as `kill` says"
    os.environ['KILL'],KillAt.i,replace,count = kill,0,os.replace,[0]
    def counted(*args, **kwargs):
        count[0] += 1
        if kill==f'rename:{count[0]}': die()
        replace(*args, **kwargs)
        if kill==f'renamed:{count[0]}': die()
    os.replace = counted

def forked(run, folder, kill):
    "True where the run died by SIGKILL, False where it ended well"
    pid = os.fork()
    if not pid:
        try:
            start(kill)
            run(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0,-signal.SIGKILL), (folder, kill, code)
    return code!=0

def main(run):
    torch.set_num_threads(1)
    gc.freeze() # What was imported is no garbage: see conftest.py
    root,*cases = sys.argv[1:]
    if len(cases)==1:
        start(cases[0])
        return run(Path(root))
    for case in cases:
        folder = Path(root)/case
        folder.mkdir(parents=True, exist_ok=True)
        for kill in filter(None, case.split('+')): assert forked(run, folder, kill), f'{case}: {kill} was never reached'
        assert not forked(run, folder, '')

def kill_from_outside(command, ready, within):
    "Start a process, wait until `ready()`, and kill it within so many seconds"
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        end = time.time() + 60
        while not ready():
            assert p.poll() is None and time.time()<end, 'it never got there'
            time.sleep(.02)
        time.sleep(random.random()*within)
    finally:
        p.kill()
        p.communicate()
