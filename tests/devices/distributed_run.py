"""What `tests/devices/test_distributed.py` does in two processes, and in one to compare

`distributed_run.py FOLDER CASE...` imports once and forks two processes for each run of a case. `checks`: all of CHECKS, what each process saw is in
FOLDER/CHECK-RANK.pth. `stop`: one of two stands still. `tutorial`: its script, killed and taken up. Any other case is a chain of kills such as `stages:1:batch:10` (what to run, the process that dies,
when: see `killed.py`), joined by +, and a last run ends by itself: in FOLDER/CASE."""
import atexit, gc, os, runpy, shutil, signal, socket, subprocess, sys, time, traceback, warnings
from contextlib import redirect_stdout
from pathlib import Path
warnings.simplefilter('ignore')
import numpy as np, psutil, torch
from torch import nn
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, RandomSplitter
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy
from fastai.optimizer import SGD
from fastai.torch_core import num_distrib, params, rank_distrib, set_seed
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock
import fastai.callback.schedule
import fastai_tricks.all as ft
from fastai_tricks.train.precision import DeviceMixedPrecision
from fastai_tricks.cv.climb import climb
from fastai_tricks.core.processes import on_main
from fastai_tricks.cv.cross_validate import cross_validate
from fastai_tricks.core.test_utils import tiny_learner
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS/'resize'), str(TESTS/'cv')]
import killed, together
from climb_run import kind, make_learner as climb_learner, noise
from stages_run import STAGES, make_learner as stages_learner

N_VALID = 19 # Of two processes one has an item too many

def image(i): return PILImage.create(np.full((64,64,3), i, dtype=np.uint8)) # Tells which item it is
def label(i): return int(i%3==0)
def bs(n): return n//max(1, num_distrib())

def dls(n=50, batch=8, splitter=None, **kwargs):
    db = DataBlock((ImageBlock,CategoryBlock), get_x=image, get_y=label, splitter=splitter or IndexSplitter(list(range(n-N_VALID, n))), item_tfms=Resize(64))
    set_seed(1)
    return db.dataloaders(list(range(n)), bs=bs(batch), val_bs=bs(batch), **{'num_workers':0, 'device':'cpu', **kwargs})

def plain_model():
    "No batch norm, no dropout"
    set_seed(2)
    return nn.Sequential(nn.Conv2d(3,8,3,stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))

def learner(d=None, model=None, **kwargs):
    return Learner(d or dls(), model or plain_model(), loss_func=CrossEntropyLossFlat(), **{'metrics':[accuracy, F1Score()], 'splitter':lambda m: [params(m[0]),params(m[1:])], **kwargs})

class Seen:
    "What reached the model: training or not, sizes, and the items"
    def __init__(self, learn): self.rows,self.handle = [],learn.model.register_forward_pre_hook(self)
    def __call__(self, m, i): self.rows.append((m.training, tuple(i[0].shape), [round(float(o)*255) for o in i[0].mean((1,2,3))]))
    def ids(self, training): return [ids for t,_,ids in self.rows if t==training]

def weights(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def quiet(learn): return learn.no_bar()

def check_fit(folder, epochs=3, opts=(None,SGD), **kwargs):
    res = {}
    for opt in opts:
        learn = learner(dls(**kwargs), **({'opt_func':opt} if opt else {}))
        with quiet(learn), learn.no_logging(), learn.accelerate_ctx(): # Seen here, as the model is wrapped in a fit only
            seen = Seen(learn)
            learn.fit_one_cycle(epochs, 1e-2)
        res[opt.__name__ if opt else 'Adam'] = dict(weights=weights(learn), values=list(learn.recorder.values), losses=learn.recorder.losses, train=seen.ids(True), valid=seen.ids(False))
    return res

def check_workers(folder): return check_fit(folder, 1, [SGD], num_workers=1)

def check_rest(folder): return check_fit(folder, opts=[SGD], n=52, drop_last=False) # 33 items to train on

def check_predict(folder):
    learn = learner()
    with torch.no_grad(): # Predictions from .05 to .95
        learn.model[-1].weight.mul_(200)
        learn.model[-1].bias.copy_(torch.tensor([-11.6,0.]))
    test = [3,7,1,250,90]
    with quiet(learn), learn.no_logging(), learn.accelerate_ctx():
        dl = learn.dls.test_dl(test)
        return dict(validate=learn.validate(), train=learn.validate(0), preds=learn.get_preds(), all=learn.get_preds(with_input=True, with_loss=True, with_decoded=True), test=learn.get_preds(dl=dl)[0],
                    one=learn.get_preds(dl=learn.dls.test_dl([9]))[0], tta=learn.tta(n=1)[0], predict=learn.predict(7)[2], unordered=learn.get_preds(dl=learn.dls.train.new(shuffle=False, drop_last=False))[0])

def check_lr_find(folder):
    learn = learner(path=folder)
    was = weights(learn)
    with quiet(learn), learn.no_logging(), learn.accelerate_ctx():
        lr = learn.lr_find(num_it=20, show_plot=False).valley
        n = len(learn.recorder.lrs)
        same = all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items())
        learn.fit(1)
    return dict(lr=lr, n=n, same=same, weights=weights(learn), left=sorted(p.name for p in (folder/'models').iterdir() if p.is_dir()))

def check_fine_tune(folder):
    learn = tiny_learner(dls()) # With batch norm
    set_seed(10+rank_distrib())
    with quiet(learn), learn.no_logging(), learn.accelerate_ctx(): learn.fine_tune(1, freeze_epochs=1)
    return weights(learn)

def check_fit_fast(folder):
    learn = tiny_learner(dls())
    learn.freeze()
    body = [p.clone() for p in learn.model[:-1].state_dict().values()]
    set_seed(10+rank_distrib())
    with quiet(learn), learn.no_logging(), learn.accelerate_ctx():
        learn.fit_fast(0, head=2, pretrained=True)
        head,same_body = weights(learn),all(map(torch.equal, body, learn.model[:-1].state_dict().values()))
        learn.fit_fast(1, head=1, pretrained=True)
    return dict(head=head, same_body=same_body, weights=weights(learn))

def check_resize(folder):
    res = {}
    for name,kwargs in dict(auto={}, device=dict(where='device'), batches=dict(scale_bs=True), crop=dict(crop=True)).items():
        learn = learner(dls(n=64+N_VALID), cbs=ft.ProgressiveResize(mult=8, **kwargs))
        with quiet(learn), learn.no_logging(), learn.accelerate_ctx():
            seen = Seen(learn)
            learn.fit(4)
        res[name] = [(t,s) for t,s,_ in seen.rows]
    return res

def check_watch(folder):
    watch = ft.WatchCAM(n=2, save=folder/f'cam-{rank_distrib()}')
    learn = tiny_learner(dls(), cbs=watch)
    with quiet(learn), learn.no_logging(), learn.accelerate_ctx(): learn.fit(2)
    return dict(rows=len(watch.rows), weights=weights(learn))

class NaNHere(Callback):
    "One process alone has a bad batch"
    def after_loss(self):
        if self.training and self.iter==1 and rank_distrib()==num_distrib()-1: self.learn.loss_grad,self.learn.loss = self.loss_grad*float('nan'),self.loss*float('nan')

class FailsHere(Callback):
    "Something breaks in every process"
    run_valid = False
    def __init__(self, ex): self.ex = ex
    def after_loss(self):
        if self.iter==1: raise self.ex('boom')

def snapshot(learn):
    loaders = [{k:repr(v) if not isinstance(v, int) else v for k,v in vars(dl).items() if k not in ('rng','_DataLoader__idxs','it')} for dl in learn.dls.loaders]
    return dict(model=id(learn.model), cls=type(learn.model).__name__, loaders=loaders, cbs=sorted(cb.name for cb in learn.cbs), ids={id(cb) for cb in learn.cbs}, logger=id(learn.logger), keys=sorted(k for k in vars(learn) if k not in ('pred','loss','loss_grad','xb','yb','dl','n_iter','iter','pct_train','train_iter','epoch','n_epoch','opt','final_record','smooth_loss','log')), device=str(learn.dls.device),
                hooks=[len(m._forward_pre_hooks) for m in learn.model.modules()])

def check_left(folder):
    res = {}
    for name,ex in dict(finishes=None, cancelled=CancelFitException, error=RuntimeError, ctrl_c=KeyboardInterrupt).items():
        learn = learner()
        was = snapshot(learn)
        try:
            with learn.no_logging(), learn.accelerate_ctx(): learn.fit(1, cbs=FailsHere(ex) if ex else None)
        except (RuntimeError,KeyboardInterrupt) as e: assert 'boom' in str(e), e
        now = snapshot(learn)
        assert now==was, (name, {k:(was[k],now[k]) for k in was if was[k]!=now[k]})
        # The same within one context: the next fit finds what the first needed
        with quiet(learn), learn.no_logging(), learn.accelerate_ctx():
            if ex in (RuntimeError,KeyboardInterrupt):
                try: learn.fit(1, cbs=FailsHere(ex))
                except ex: pass
            learn.validate()
            learn.fit(1)
        res[name] = weights(learn)
    return res

class PredictsWithin(Callback):
    "Validates in the middle of a fit"
    order,run_valid = 55,False
    def after_epoch(self):
        if self.learn.lock.locked(): return
        with self.learn.no_logging(): self.n = len(self.learn.get_preds(inner=False)[0])

def check_callbacks(folder):
    "All of this at once trains to the same weights in both processes"
    res = {}
    def fit(name, cbs, n=2, **kwargs):
        set_seed(20+rank_distrib())
        learn = tiny_learner(dls(), cbs=cbs)
        learn.path,learn.metrics = folder,[accuracy]
        with quiet(learn), learn.no_logging(), learn.accelerate_ctx(**kwargs): learn.fit(n)
        res[name] = weights(learn)
        return learn
    assert len(fit('nan', [TerminateOnNaNCallback(), NaNHere()]).recorder.lrs)==1
    fit('tricks', [ft.ProgressiveResize(mult=8, scale_bs=True, strength=(.5,1.)), ft.ChannelsLastBatch(), DeviceMixedPrecision(torch.bfloat16), ft.Distill(tiny_learner().model, features=['0']), ft.EMA(.9)])
    fit('fastai', [MixUp(), GradientAccumulation(8), SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=1)])
    fit('within', w := PredictsWithin())
    assert w.n==N_VALID, w.n
    learn = tiny_learner(dls(), cbs=ft.ProgressiveResize(mult=8))
    learn.path = folder
    with quiet(learn), learn.accelerate_ctx():
        learn.fit(1)
        learn.export('in.pkl')
        learn.save('saved')
        with learn.accelerate_ctx(): p = learn.get_preds()[0] # Within another it changes nothing
    res['preds'] = dict(p=p)
    return res

def photos(folder):
    "40 images; one to train on and one to validate on cannot be decoded"
    for i in range(40):
        PILImage.create(np.full((32,32,3), i, dtype=np.uint8)).save(folder/f'{i}.png')
        if i in (5,36): (folder/f'{i}.png').write_bytes(b'no image')

def check_tools(folder):
    "Logs and graphs, an export from within, a shuffled loader, images that only one process met"
    learn,res = tiny_learner(dls()),{}
    learn.path = folder
    with learn.accelerate_ctx():
        learn.fit(2, cbs=[CSVLogger(append=True), ShowGraphCallback()])
        learn.fit(1)
        learn.export('within.pkl')
        dl = learn.dls.train.new(shuffle=True, drop_last=False)
        dl.rng.seed(rank_distrib())
        res['said'] = raises(lambda: learn.get_preds(dl=dl), '`dl` must give its items in the same order')
        res['unsent'] = raises(lambda: on_main(lambda: 1/0 if False else (_ for _ in ()).throw(type('Local', (Exception,), {})('only here'))), 'only here')
    res['log'] = (folder/'history.csv').read_text()
    again = load_learner(folder/'within.pkl')
    again.dls = dls()
    with quiet(again), again.accelerate_ctx(): again.fit(1)
    res.update(weights=weights(again), steps=len(again.recorder.lrs))
    with learn.accelerate_ctx(): on_main(photos, folder)
    db = ft.skip_corrupt(DataBlock((ImageBlock,CategoryBlock), get_y=lambda f: int(f.stem)%2, splitter=IndexSplitter(list(range(31, 40))), item_tfms=Resize(32)), .2)
    learn = tiny_learner(db.dataloaders([folder/f'{i}.png' for i in range(40)], bs=4, num_workers=0, device='cpu'))
    with quiet(learn), learn.accelerate_ctx(): learn.fit(1)
    res['corrupt'] = sorted(Path(f).name for f in learn.corrupt_images['file'])
    return res

def raises(f, *said):
    try: f()
    except Exception as e:
        assert all(s in str(e) for s in said), e
        return f'{type(e).__name__}: {e}'
    raise AssertionError(f'no error: {said}')

def boxes():
    db = DataBlock((ImageBlock,BBoxBlock,BBoxLblBlock), get_x=image, get_y=[lambda i: [[1.,1.,9.,9.]], lambda i: ['a']], n_inp=1, splitter=IndexSplitter([0]), item_tfms=Resize(64))
    return Learner(db.dataloaders(list(range(20)), bs=4, num_workers=0, device='cpu'), plain_model(), loss_func=CrossEntropyLossFlat())

def check_refuse(folder):
    def fit(learn, **kwargs):
        with quiet(learn), learn.no_logging(), learn.accelerate_ctx(**kwargs): learn.fit(1)
    said = [raises(lambda: fit(learner(dls(splitter=RandomSplitter(seed=rank_distrib())))), '`dls` must be the same in all processes', 'seed'),
            raises(lambda: fit(learner(dls(batch=100))), '`bs` must be at most 15', 'share 31 training items'),
            raises(lambda: fit(learner(), sync_bn=True), '`sync_bn` must be False or None on the CPU'),
            raises(lambda: fit(boxes()), '`dls` must be loaders whose targets'),
            raises(lambda: fit(learner(), timeout=0), '`timeout` must be seconds'),
            raises(lambda: fit(learner(), cpu=False), '`cpu` must be True or None') if not torch.cuda.is_available() else None,
            raises(lambda: fit(learner(), mixed_precision='fp16'), 'to_mixed')]
    learn = learner()
    loaders = learn.dls.loaders
    learn.dls.loaders = [torch.utils.data.DataLoader(dl.dataset, batch_size=4) for dl in loaders]
    said.append(raises(lambda: fit(learn), "`dls.train` must be a loader of fastai's"))
    return [s for s in said if s]

def check_subset(folder):
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, splitter=RandomSplitter(), item_tfms=Resize(32))
    # Whatever the state of each process
    set_seed(int(time.time()*1000)%1000 + rank_distrib())
    d = db.class_subset(3, by='random', per_class=5).dataloaders(list(range(72)), bs=4, num_workers=0, device='cpu')
    return dict(vocab=list(d.vocab), train=list(d.train.items), valid=list(d.valid.items), ladder=ft.class_ladder(db, list(range(72)), (2,4), by='random'))

def check_more(folder):
    "Tricks that are in no other check, each alone"
    photos,res = folder/'more photos',{}
    with learner().accelerate_ctx(): on_main(together.images, photos)
    for name in [k for k,v in together.WITH['accelerate_ctx'].items() if v=='test_more_tricks_train_alike']:
        set_seed(30+rank_distrib())
        o = together.use((name,), photos, folder/name, lambda learn: learn.accelerate_ctx())
        res[name] = dict(weights=weights(o.learn), worked=bool(together.TRICKS[name].worked(o)))
    return res

WRITTEN = []
_replace = os.replace
def _noted(a, b, *args, **kwargs):
    WRITTEN.append(Path(b).name)
    return _replace(a, b, *args, **kwargs)

def run_stages(folder):
    seed = 7 if (folder/'models'/'stages.pth').exists() else 42
    learn = stages_learner(folder, seed=seed, cbs=killed.killer())
    with quiet(learn), learn.no_logging(), learn.accelerate_ctx(): df = learn.fit_stages(STAGES)
    torch.save(dict(table=df.drop(columns=['file','seconds']), weights=weights(learn)), folder/f'final-{rank_distrib()}.pth')

def run_climb(folder, resume=True):
    def fit(learn): learn.fit_one_cycle(1, cbs=killed.killer())
    set_seed(int(time.time()*1000)%1000 + rank_distrib()) # Nothing may depend on where the random states begin
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    res = climb(climb_learner, db, list(range(72)), rungs=[2,(None,24)], fit=fit, n_splits=2, test_items=list(range(100, 105)), ids=[f'{i}.jpg' for i in range(5)], out=folder/'climb', bs=bs(4), num_workers=0, device='cpu', resume=resume)
    torch.save(dict(table=res.table.drop(columns=['seconds','submission']), oof=[cv.oof for cv in res.cvs], csv=res.table.submission.iloc[-1].read_text()), folder/f'final-{rank_distrib()}.pth')

def run_cv(folder, resume=True):
    def fit(learn): learn.fit_one_cycle(1, cbs=killed.killer())
    db = DataBlock((ImageBlock,CategoryBlock), get_x=noise, get_y=kind, item_tfms=Resize(32))
    cv = cross_validate(climb_learner, db, list(range(72)), n_splits=2, fit=fit, out=folder/'cv', bs=bs(8), num_workers=0, device='cpu', resume=resume)
    torch.save(dict(table=cv.scores.drop(columns='seconds'), oof=cv.oof, test=cv.predict(list(range(5)))), folder/f'final-{rank_distrib()}.pth')

RUNS = dict(stages=run_stages, climb=run_climb, cv=run_cv)

def check_files(folder):
    res = {}
    os.replace = _noted
    try:
        for name,run in RUNS.items():
            WRITTEN.clear()
            (folder/name).mkdir(exist_ok=True)
            run(folder/name)
            res[name] = list(WRITTEN)
    finally: os.replace = _replace
    return res

CHECKS = {k[6:]:v for k,v in list(globals().items()) if k.startswith('check_')}

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def fork_two(run, folder, who=None, kill=''):
    "Fork two processes as a launcher starts them; their ids"
    env,pids = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port())),[]
    for r in range(2):
        pids.append(os.fork())
        if pids[-1]: continue
        os.environ.update(env, RANK=str(r), LOCAL_RANK=str(r))
        try:
            killed.start(kill if r==who else '')
            run(folder)
        except BaseException:
            (folder/f'{r}.error').write_text(traceback.format_exc())
            if not kill: traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pids

def end_of(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def run_checks(folder):
    for name,check in CHECKS.items():
        t = time.time()
        torch.save(check(folder), folder/f'{name}-{rank_distrib()}.pth')
        if not rank_distrib(): print(name, f'{time.time()-t:.1f} s', flush=True)

def run_slowly(folder):
    "Until somebody stops a process; the timeout ends the wait for it"
    learn = learner(cbs=killed.Slow())
    with quiet(learn), learn.no_logging(), learn.accelerate_ctx(timeout=3):
        learn.validate()
        (folder/f'{rank_distrib()}.ready').touch()
        learn.fit(1000)

def stop_one(folder):
    "A process that stands still is waited for until the timeout"
    first,second = fork_two(run_slowly, folder, kill='none')
    try:
        while not all((folder/f'{r}.ready').exists() for r in range(2)):
            assert not list(folder.glob('*.error')), 'it never got there'
            time.sleep(.02)
        os.kill(second, signal.SIGSTOP)
        assert end_of(first)==1
    finally:
        os.kill(second, signal.SIGKILL)
        end_of(second)

SCRIPT = TESTS.parent/'nbs'/'tutorials'/'train_2gpu.py'
def script_args(folder): return ['--cpu', '--small', '--data', str(folder/'data'), '--out', str(folder/'out')]

def run_script(folder):
    sys.argv = [str(SCRIPT), *script_args(folder)]
    with open(folder/f'{rank_distrib()}.txt', 'w') as f, redirect_stdout(f): runpy.run_path(str(SCRIPT), run_name='__main__')
    was = torch.distributed.is_initialized()
    atexit._run_exitfuncs() # As at the end of a program
    (folder/f'{rank_distrib()}.left').write_text(f'{was} then {torch.distributed.is_initialized()}')

def some_images(folder):
    "Three classes of the embedded pictures"
    for c in sorted(p for p in ft.sample_images().iterdir() if p.is_dir())[:3]:
        (folder/c.name).mkdir(parents=True)
        for f in sorted(c.iterdir())[:20]: shutil.copy(f, folder/c.name)

def launched(p):
    "Processes that the launcher `p` has started, by rank"
    return {int(o.environ()['RANK']):o for o in psutil.Process(p.pid).children(recursive=True) if SCRIPT.name in ' '.join(o.cmdline())}

def kill_launched(folder):
    "Accelerate's launcher starts the script; one of two is killed once the first stage is on the disk"
    launch = f'-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port {free_port()}'
    with open(folder/'launcher.txt', 'w') as f:
        p = subprocess.Popen([sys.executable, *launch.split(), str(SCRIPT), *script_args(folder)], stdout=f, stderr=f)
    try:
        while not (folder/'out'/'models'/'stages.pth').exists():
            assert p.poll() is None, (folder/'launcher.txt').read_text()[-4000:]
            time.sleep(.02)
        two = launched(p)
        assert sorted(two)==[0,1]
        os.kill(two[0].pid, signal.SIGKILL)
        assert p.wait(60)!=0 and not (folder/'out'/'model.pkl').exists()
        assert not any(o.is_running() and o.status()!=psutil.STATUS_ZOMBIE for o in two.values()), 'the launcher left one'
    finally:
        p.kill()
        p.wait()

def tutorial(folder):
    some_images(folder/'data')
    kill_launched(folder)
    assert [end_of(pid) for pid in fork_two(run_script, folder)]==[0,0]

def chain(folder, case):
    "Runs that are killed, each where the one before it left off"
    for step in case.split('+'):
        name,who,kill = (step.split(':', 2) + ['',''])[:3]
        ends = [end_of(pid) for pid in fork_two(RUNS[name], folder, int(who or 0), kill)]
        if kill: assert ends[int(who)]==-signal.SIGKILL and ends[1-int(who)] in (1,-signal.SIGKILL,-signal.SIGABRT), (case, ends)
        else: assert ends==[0,0], (case, ends)

def main():
    torch.set_num_threads(1)
    gc.freeze() # What was imported is no garbage: see conftest.py
    root,*cases = sys.argv[1:]
    for case in cases:
        t,folder = time.time(),Path(root)/case
        folder.mkdir(parents=True)
        if case=='checks': assert [end_of(pid) for pid in fork_two(run_checks, folder)]==[0,0]
        elif case=='stop': stop_one(folder)
        elif case=='tutorial': tutorial(folder)
        else: chain(folder, case)
        print(case, f'{time.time()-t:.1f} s', flush=True)

if __name__=='__main__': main()
