"Two real processes on the CPU: the same as one in every result, files of one, and an end where one is killed"
import os, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from fastai.learner import load_learner
import fastai_tricks.devices.distributed as ds
from fastai_tricks.core.test_utils import tiny_learner
import distributed_run as run
from distributed_run import CHECKS, N_VALID

SCRIPT = Path(run.__file__)
# The main process dies before a file is put in place and after it, the other one in the middle of an epoch
KILLS = ['stages:1:batch:9+stages:0:rename:3+stages','climb:1:batch:20+climb:0:rename:2+climb','cv:0:renamed:3+cv']

def environ():
    # Nothing of a launcher that the tests themselves may run under
    env = {k:v for k,v in os.environ.items() if k not in ('RANK','WORLD_SIZE','LOCAL_RANK','MASTER_ADDR','MASTER_PORT') and not k.startswith('ACCELERATE_')}
    return {**env, 'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore'}

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "All cases, in one process that forks two for each run"
    res = tmp_path_factory.mktemp('two')
    r = subprocess.run([sys.executable, str(SCRIPT), str(res), 'checks', 'stop', 'tutorial', *KILLS], capture_output=True, text=True, timeout=240, env=environ())
    if r.returncode: pytest.fail(r.stderr[-2000:], pytrace=False)
    print(re.sub('.*\r|\x1b.*', '', r.stdout))
    return res

@pytest.fixture(scope='module')
def folder(root): return root/'checks'

@pytest.fixture(scope='module')
def both(folder): return lambda name: [torch.load(folder/f'{name}-{r}.pth', weights_only=False) for r in range(2)]

@pytest.fixture
def one(tmp_path): return lambda name: CHECKS[name](tmp_path)

def same(a, b, atol=0):
    "Raise where tensors and numbers are farther apart than `atol`"
    if isinstance(a, dict):
        assert a.keys()==b.keys()
        for k in a: same(a[k], b[k], atol)
    elif isinstance(a, (list,tuple)):
        assert len(a)==len(b)
        for x,y in zip(a, b): same(x, y, atol)
    elif isinstance(a, (float,torch.Tensor)): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=atol, equal_nan=True)
    elif hasattr(a, 'columns'): assert a.equals(b), (a, b)
    else: assert a==b

def joined(a, b): return [x+y for x,y in zip(a, b)]

@pytest.mark.parametrize('name', ['fit','workers'])
def test_two_with_half_the_batch_train_as_one_with_the_whole(both, one, name):
    a,b = both(name)
    for opt,o in one(name).items():
        same(a[opt]['weights'], b[opt]['weights'])
        same(o['weights'], a[opt]['weights'], 1e-5)
        same([list(v) for v in o['values']], [list(v) for v in a[opt]['values']], 1e-5)
        same(list(o['losses']), list(b[opt]['losses']), 1e-5)
        # What the model received: each batch is halved, each validation item comes once, but for one that evens the last batch
        assert joined(a[opt]['train'], b[opt]['train'])==o['train'] and {len(ids) for ids in a[opt]['train']}=={4}
        assert [ids[:len(whole)] for ids,whole in zip(joined(a[opt]['valid'], b[opt]['valid']), o['valid'])]==o['valid']
        assert sum(map(len, a[opt]['valid']))==len(o['values'])*(N_VALID//2 + 1)
        assert all(len(v)==4 and np.isfinite(v).all() for v in a[opt]['values'])

def test_items_left_over_are_trained_on(both):
    a,b = both('rest')
    seen = joined(a['SGD']['train'], b['SGD']['train'])
    # 33 items: the last one goes to both
    assert [len(o) for o in seen]==[8,8,8,8,2]*3 and all(set(sum(seen[i:i+5], []))==set(range(33)) for i in (0,5,10))
    same(a['SGD']['weights'], b['SGD']['weights'])

def test_predictions_and_metrics_are_those_of_one_process(both, one):
    a,b = both('predict')
    o = one('predict')
    same(a, b)
    same(o, a, 1e-5)
    assert len(a['preds'][0])==N_VALID and len(a['all'][0])==N_VALID and a['test'].shape==(5,2) and a['one'].shape==(1,2)
    assert a['preds'][0].std(0).min()>.01

def test_lr_find(both, one):
    a,b = both('lr_find')
    assert a['lr']==b['lr'] and a['n']==b['n']==20 and a['same'] and b['same'] and not a['left']
    o = one('lr_find')
    assert o['n']==20 and abs(np.log(o['lr']/a['lr']))<1e-2
    same(o['weights'], a['weights'], 1e-5)

def test_fine_tune_of_different_random_states(both): same(*both('fine_tune'))

def test_head_is_trained_once(both):
    a,b = both('fit_fast')
    assert a['same_body'] and b['same_body']
    same(a['head'], b['head'])
    same(a['weights'], b['weights'])

def test_progressive_resize_gives_the_same_size_at_every_step(both, one):
    a,b = both('resize')
    o = one('resize')
    for name in o:
        assert a[name]==b[name]
        train = [[s for t,s in r[name] if t] for r in (o,a)]
        assert [s[2:] for s in train[0]]==[s[2:] for s in train[1]] and len({s[2:] for s in train[0]})>2, name
        assert [s[0] for s in train[0]]==[2*s[0] for s in train[1]]
        assert {s[2:] for t,s in a[name] if not t}=={(64,64)}
    assert len({s[0] for t,s in a['batches'] if t})>1

def test_watch_cam_draws_in_one_process(both, folder):
    a,b = both('watch')
    assert (a['rows'],b['rows'])==(2,0)
    assert len(list((folder/'cam-0').iterdir()))==3 and not (folder/'cam-1').exists()
    same(a['weights'], b['weights'])

def test_learner_is_left_as_found(both):
    a,b = both('left') # Snapshots are compared there
    same(a, b)

def test_callbacks_together(both, folder):
    a,b = both('callbacks')
    same(a, b)
    # Exported and saved within the context
    learn = load_learner(folder/'in.pkl')
    saved = torch.load(folder/'models'/'saved.pth', weights_only=False)['model']
    same(dict(saved), dict(learn.model.state_dict()))
    with learn.no_bar(), learn.no_logging(): preds = learn.get_preds(dl=learn.dls.test_dl(list(range(50-N_VALID, 50))))[0]
    same(preds, a['preds']['p'], 1e-6)

def test_more_tricks_train_alike(both):
    a,b = both('more')
    same(a, b)
    assert len(a)>8 and all(o['worked'] for o in a.values()), {k for k,o in a.items() if not o['worked']}

def test_what_cannot_be_is_said_in_every_process_before_training(both):
    a,b = both('refuse')
    assert a==b and len(a)>6

def test_subsets_are_the_same(both):
    a,b = both('subset')
    assert a==b and len(a['train'])==15 and len(a['vocab'])==3

@pytest.mark.parametrize('name', list(run.RUNS))
def test_one_process_writes(both, folder, name):
    a,b = both('files')
    assert a[name] and not b[name]
    x,y = (torch.load(folder/name/f'final-{r}.pth', weights_only=False) for r in range(2))
    same(x, y)
    assert not list(folder.rglob('*.tmp'))

def test_folds_are_those_of_one_process(both, folder, tmp_path):
    run.run_cv(tmp_path)
    o,a = (torch.load(f/'final-0.pth', weights_only=False) for f in (tmp_path,folder/'cv'))
    # Batch norm sees half the batch, so only about the same
    assert a['oof'].shape==o['oof'].shape and not a['oof'].isnan().any() and (a['oof']-o['oof']).abs().mean()<.2
    assert list(a['table'].columns)==list(o['table'].columns) and a['table'].valid.tolist()==o['table'].valid.tolist()

def test_logs_exports_and_what_only_one_met(both):
    a,b = both('tools')
    assert a['log'].count('epoch')==1 and [l.split(',')[0] for l in a['log'].splitlines()]==['epoch','0','1']
    same(a['weights'], b['weights'])
    assert (a['steps'],b['steps'])==(3,3) # 31 items, 8 a step of both
    assert a['corrupt']==b['corrupt']==['36.png','5.png']
    assert 'shuffled' in a['said'] and 'only here' in a['unsent'] and 'Local: only here' in b['unsent']

@pytest.mark.parametrize('case', KILLS)
def test_killed_and_taken_up_it_ends_as_one_that_was_not(root, folder, case):
    name = case.split(':')[0]
    for r in range(2):
        a,b = (torch.load(f/f'final-{r}.pth', weights_only=False) for f in (folder/name,root/case))
        same(a, b)

def test_one_that_stands_still_is_waited_for_until_timeout(root):
    "Without a launcher, which would watch the two"
    assert 'RuntimeError' in (root/'stop'/'0.error').read_text()

def test_script_of_the_tutorial(root):
    "Under Accelerate's launcher a process that is killed ends the run, see `distributed_run.kill_launched`; the next run goes on where it was"
    main,other = ((root/'tutorial'/f'{r}.txt').read_text() for r in range(2))
    assert 'going on after' in main and main.count('accuracy on the whole validation set')==1 and 'accuracy' not in other
    assert (root/'tutorial'/'out'/'model.pkl').exists()

@pytest.mark.parametrize('r', range(2))
def test_program_leaves_the_group_before_it_ends(root, r):
    "Else gloo's threads may abort it: seen in 29 of 40 programs of many broadcasts"
    assert (root/'tutorial'/f'{r}.left').read_text()=='True then False'

def test_one_process_says_so_and_changes_nothing(capsys):
    learn = tiny_learner()
    was = run.snapshot(learn)
    with learn.accelerate_ctx() as l: assert l is learn and run.snapshot(learn)==was
    assert 'one process' in capsys.readouterr().out

def test_without_accelerate_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(ImportError, match=r'fastai_tricks\[distributed\]'):
        with tiny_learner().accelerate_ctx(): pass

def test_synchronised_batch_norm_is_taken_back():
    m = nn.Sequential(nn.Conv2d(3,4,1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.BatchNorm2d(4).eval())
    bns = [m[1][0],m[2]]
    back = ds._sync_bn(m)
    assert isinstance(m[1][0], nn.SyncBatchNorm) and m[1][0].weight is bns[0].weight
    m[1][0].running_mean = torch.ones(4)
    back()
    assert [m[1][0],m[2]]==bns and bns[0].running_mean.tolist()==[1]*4 and not bns[1].training
