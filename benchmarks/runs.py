"""Runs that are killed, and two processes at once on one folder: what is tried, what is held

    python benchmarks/runs.py            # kills at every file that is put in place, and in training batches; pairs
    python benchmarks/runs.py --pairs 12
    python benchmarks/runs.py --only fast # The others stay as they were measured

A kill is held where the run that goes on ends with the results of one that was not stopped, to the bit. A pair is held where both end well, or the
second is refused by name, the results are those of one process alone, and no temporary file is left. The small runs are those of the tests."""
import argparse, gc, json, os, random, sys, tempfile, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')
HERE = Path(__file__).resolve()
TESTS = HERE.parents[1]/'tests'
sys.path[:0] = [str(TESTS), str(TESTS/'resize'), str(TESTS/'cv'), str(TESTS/'fast')]
import torch
import killed, climb_run, fast_run, stages_run
from common import environment, write_results
from fastai_tricks.all import cross_validate, resized_copies, sample_images
from fastai_tricks.core.runs import RunInUse

FILE = HERE.with_suffix('.json')

def stages(folder): stages_run.run(folder)
def fast(folder): fast_run.run(folder)
def climb(folder): climb_run.run(folder)

def folds(folder):
    def fit(learn): learn.fit_one_cycle(1, cbs=killed.killer())
    res = cross_validate(climb_run.make_learner, climb_run.block(), list(range(72)), fit=fit, n_splits=4, bs=4, out=folder/'cv', num_workers=0, device='cpu')
    torch.save(res.oof, folder/'oof.pth')

def copies(folder):
    resized_copies(sample_images()/'birds', folder/'small', sizes=(16,32), n_workers=0)

def result(folder):
    "What must be the same: bytes of copies, numbers of everything else"
    if (folder/'small').exists(): return {f.relative_to(folder).as_posix():f.read_bytes() for f in sorted((folder/'small').rglob('*.*g'))}
    return torch.load(next(f for f in (folder/'final.pth',folder/'oof.pth') if f.exists()), weights_only=True)

def same(a, b):
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list): return len(a)==len(b) and all(map(same, a, b))
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) if isinstance(a, torch.Tensor) else a==b

def left(folder): return [f.name for f in folder.rglob('.*.part*')]

def child(run, folder, kill='', wait=0):
    "A process of its own; 0: ended well, 3: refused as in use"
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid: return pid
    code = 1
    with open(os.devnull, 'w') as null:
        os.dup2(null.fileno(), 1)
        try:
            time.sleep(wait)
            killed.start(kill)
            run(folder)
            code = 0
        except RunInUse: code = 3
        except BaseException as e: print(f'{run.__name__} {kill}: {type(e).__name__}: {e}'[:300], file=sys.stderr, flush=True)
        os._exit(code)

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def count(run, folder):
    "How many files a run puts in place, and training batches"
    n,was = [0],os.replace
    def counted(*args): n[0] += 1; return was(*args)
    pid = os.fork()
    if not pid:
        sys.stdout = open(os.devnull, 'w')
        os.replace = counted
        os.environ['KILL'],killed.KillAt.i = 'batch:1000000',0
        folder.mkdir()
        run(folder)
        (folder/'count').write_text(f'{n[0]} {killed.KillAt.i}')
        os._exit(0)
    assert ended(pid)==0
    return tuple(map(int, (folder/'count').read_text().split()))

def kills(run, root, most):
    "Killed at each moment, then run again"
    files,batches = count(run, root/'whole')
    want,rng = result(root/'whole'),random.Random(0)
    moments = [f'{m}:{i}' for i in range(1, files+1) for m in ('rename','renamed')]
    moments += [f'batch:{i}' for i in range(1, batches+1)]
    if len(moments)>most: moments = sorted(rng.sample(moments, most))
    held = 0
    for m in moments:
        folder = root/m
        died = ended(child(run, folder, m))
        again = ended(child(run, folder))
        ok = died==-9 and again==0 and same(result(folder), want) and not left(folder)
        if not ok: print('NOT HELD', run.__name__, m, died, again, left(folder))
        held += ok
    return dict(files=files, batches=batches, tried=len(moments), held=held)

def pairs(run, root, n):
    "Two processes at once, the second up to half a second later"
    want,rng,res = result(root/'whole'),random.Random(1),dict(tried=n, held=0, refused=0)
    for i in range(n):
        folder = root/f'pair-{i}'
        ends = [ended(p) for p in [child(run, folder), child(run, folder, wait=rng.random()/2)]]
        ok = 0 in ends and set(ends)<={0,3} and same(result(folder), want) and not left(folder)
        if not ok: print('NOT HELD', run.__name__, 'pair', i, ends, left(folder))
        res['held'] += ok
        res['refused'] += 3 in ends
    return res

RUNS = stages, fast, folds, climb, copies

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kills', type=int, default=60, help='at most so many moments of each')
    p.add_argument('--pairs', type=int, default=12)
    p.add_argument('--only', nargs='*', choices=[f.__name__ for f in RUNS], help='these runs')
    p.add_argument('--out', type=Path, default=FILE)
    a = p.parse_args()
    torch.set_num_threads(1)
    gc.freeze()
    res = json.loads(a.out.read_text())['runs'] if a.only and a.out.exists() else {}
    for run in [f for f in RUNS if not a.only or f.__name__ in a.only]:
        with tempfile.TemporaryDirectory() as root:
            root = Path(root)
            res[run.__name__] = dict(environment=environment('filelock'), kills=kills(run, root, a.kills), pairs=pairs(run, root, a.pairs))
        print(run.__name__, res[run.__name__], flush=True)
    write_results(a.out, dict(runs=res))

if __name__=='__main__': main()
