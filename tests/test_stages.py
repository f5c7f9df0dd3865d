"`fit_stages`: killed anywhere and run again, it ends with the weights of a run that was not"
import subprocess, sys
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.optimizer import OptimWrapper
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai.vision.augment import RandomResizedCrop, aug_transforms
from fastai_tricks.core import get_state, set_state
from fastai_tricks.resize import ProgressiveResize
from fastai_tricks.stages import Stage
from fastai_tricks.test_utils import tiny_dls, tiny_learner, sizes_seen
from killed import kill_from_outside
from stages_run import STAGES, make_learner

SCRIPT = Path(__file__).with_name('stages_run.py')
# 6 training batches in stage 1, 6 frozen and 12 unfrozen ones in stage 2, 6 in stage 3.
# Files: 1 in stage 1, then weights 2 and state 3; 4 and 5 in stage 2, then 6 and 7; 8 in stage 3, then 9 and 10
KILLS = ['batch:2','batch:5','batch:10','batch:20','batch:29','rename:1','rename:3','renamed:3','rename:9','renamed:10','batch:10+batch:8+rename:2']

class Boom(Callback):
    "Stop as Ctrl-C would in the `n`th training batch"
    order,run_valid = 100,False
    def __init__(self, n, ex=KeyboardInterrupt): self.n,self.ex,self.i = n,ex,0
    def before_backward(self):
        self.i += 1
        if self.i==self.n: raise self.ex('boom')

def fit(learn, stages=STAGES, **kwargs):
    with sizes_seen(learn) as seen: df = learn.fit_stages(stages, **kwargs)
    return df,seen

def killed(folder, n, stages=STAGES, make=make_learner, **kwargs):
    learn = make(folder)
    learn.add_cb(Boom(n))
    with pytest.raises(KeyboardInterrupt): fit(learn, stages, **kwargs)
    return learn

def same(a, b):
    assert a.keys()==b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)

def weights(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def trained(seen): return [h for t,h,w in seen if t]

# Killed processes -------------------------------------------------------------

def script(*args): return [sys.executable, str(SCRIPT), *map(str, args)]

def results(folder): return torch.load(folder/'final.pth', weights_only=True),pd.read_json(folder/'table.json')

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One process that forks all runs: to import takes longer than to train"
    root = tmp_path_factory.mktemp('stages')
    r = subprocess.run(script(root, '', *KILLS), capture_output=True, text=True)
    assert r.returncode==0, r.stdout + r.stderr
    return root

@pytest.mark.parametrize('kill', KILLS)
def test_killed_and_rerun(runs, kill):
    (w,df),(w1,df1) = results(runs),results(runs/kill)
    assert same(w, w1)
    assert df1.columns.tolist()==['size','epochs','seconds','train_loss','valid_loss','accuracy']
    assert df1['size'].tolist()==[32,48,64] and df1['epochs'].tolist()==[2,3,2]
    pd.testing.assert_frame_equal(df1.drop(columns='seconds'), df.drop(columns='seconds'))
    assert sorted(p.name for p in (runs/kill/'models').iterdir() if p.suffix!='.tmp')==['stages-1-32px.pth','stages-2-48px.pth','stages-3-64px.pth','stages.pth']
    for p in (runs/'models').glob('stages-*'): assert same(torch.load(p, weights_only=True), torch.load(runs/kill/'models'/p.name, weights_only=True))

def test_killed_from_outside_at_any_moment(runs, tmp_path):
    kill_from_outside(script(tmp_path, 'slow'), (tmp_path/'models'/'stages.pth').exists, 2)
    assert not (tmp_path/'final.pth').exists()
    subprocess.run(script(tmp_path, ''), check=True, capture_output=True)
    assert same(results(runs)[0], results(tmp_path)[0])

# In this process --------------------------------------------------------------

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An uninterrupted run: its folder, Learner, table and the sizes its model saw"
    path = tmp_path_factory.mktemp('whole')
    learn = make_learner(path)
    df,seen = fit(learn)
    return path,learn,df,seen

def test_sizes(whole):
    _,_,df,seen = whole
    assert trained(seen)==[32]*6 + [48]*18 + [64]*6
    assert {o[1:] for o in seen if not o[0]}=={(64,64)}
    assert df.columns.tolist()==['size','epochs','seconds','train_loss','valid_loss','accuracy','file']

def test_completed_run_trains_nothing(whole):
    path,learn,df,_ = whole
    again = make_learner(path, seed=7)
    df1,seen = fit(again)
    assert not seen
    pd.testing.assert_frame_equal(df1, df)
    assert same(weights(again), weights(learn))

def test_weights_load(whole):
    path,learn,df,_ = whole
    assert [Path(f).name for f in df['file']]==['stages-1-32px.pth','stages-2-48px.pth','stages-3-64px.pth']
    for f in df['file']:
        other = make_learner(path, seed=7)
        other.load(Path(f).stem)
        assert same(weights(other), torch.load(f, weights_only=True))
    assert same(weights(other), weights(learn))

def test_resume_false_starts_anew(whole, tmp_path):
    killed(tmp_path, 20)
    learn = make_learner(tmp_path)
    _,seen = fit(learn, resume=False)
    assert len(trained(seen))==30 and same(weights(learn), weights(whole[1]))

@pytest.mark.parametrize('n', [5,10,20,29])
def test_rerun_with_the_same_learner(n, whole, tmp_path):
    "After Ctrl-C in a notebook the Learner at hand is used again"
    learn = killed(tmp_path, n)
    fit(learn)
    assert same(weights(learn), weights(whole[1]))

@pytest.mark.parametrize('n', [5,10,20,29])
def test_learner_frozen_at_first(n, tmp_path):
    "`vision_learner` gives a frozen one; its stage after `fine_tune` is not, also in a run that begins with that stage"
    def make(folder, **kwargs):
        learn = make_learner(folder, **kwargs)
        learn.freeze()
        return learn
    learn = make(tmp_path/'whole')
    fit(learn)
    killed(tmp_path, n, make=make)
    again = make(tmp_path, seed=7)
    fit(again)
    assert same(weights(again), weights(learn))

def with_torch_optimizer(folder, **kwargs):
    learn = make_learner(folder, **kwargs)
    learn.opt_func = partial(OptimWrapper, opt=torch.optim.AdamW)
    return learn

def with_workers(folder, **kwargs):
    learn = make_learner(folder, **kwargs)
    learn.dls = tiny_dls(num_workers=2, item_tfms=RandomResizedCrop(64), batch_tfms=aug_transforms(size=64))
    return learn

@pytest.mark.parametrize('n', [10,29])
@pytest.mark.parametrize('make', [with_torch_optimizer, with_workers])
def test_other_learners(make, n, tmp_path):
    learn = make(tmp_path/'whole')
    fit(learn)
    killed(tmp_path, n, make=make)
    again = make(tmp_path, seed=7)
    fit(again)
    assert same(weights(again), weights(learn))

def test_progressive_resize_passed_along(tmp_path):
    "The stages say the size, as with one that was added to the Learner"
    _,seen = fit(make_learner(tmp_path), cbs=ProgressiveResize(mult=8))
    assert trained(seen)==[32]*6 + [48]*18 + [64]*6

def twice(learn):
    learn.fit(2, 1e-3)
    learn.fit(2, 1e-2)

@pytest.mark.parametrize('n', [5,8,11])
def test_own_function_of_two_fits(n, tmp_path):
    stages = [Stage(48,4,fit=twice)]
    learn = make_learner(tmp_path/'whole')
    df,_ = fit(learn, stages)
    assert df['epochs'].tolist()==[4]
    killed(tmp_path, n, stages)
    again = make_learner(tmp_path, seed=7)
    fit(again, stages)
    assert same(weights(again), weights(learn))

@pytest.mark.parametrize('n', [5,8,14])
def test_early_stopping(n, tmp_path):
    "No metric gets better by 10: each stage stops after 3 epochs"
    def stop(): return EarlyStoppingCallback(monitor='accuracy', min_delta=10, patience=2)
    stages = [Stage(32,5), Stage(48,5)]
    learn = make_learner(tmp_path/'whole')
    df,_ = fit(learn, stages, cbs=stop())
    killed(tmp_path, n, stages, cbs=stop())
    again = make_learner(tmp_path, seed=7)
    df1,_ = fit(again, stages, cbs=stop())
    assert df1['epochs'].tolist()==df['epochs'].tolist() and max(df['epochs'])<5
    assert same(weights(again), weights(learn))

@pytest.mark.parametrize('n', [3,5,9,12,19,28])
def test_mixup_and_accumulation(n, tmp_path):
    "Gradients that wait for their step at the end of an epoch are part of the state"
    def make(folder, **kwargs): return make_learner(folder, cbs=[MixUp(), GradientAccumulation(16)], **kwargs)
    learn = make(tmp_path/'whole')
    fit(learn)
    killed(tmp_path, n, make=make)
    again = make(tmp_path, seed=7 if n>3 else 42)
    fit(again)
    assert same(weights(again), weights(learn))

@pytest.mark.parametrize('resume', [True,False])
@pytest.mark.parametrize('other', ['architecture','stages'])
def test_other_checkpoint_refused(whole, resume, other):
    path,*_ = whole
    file = path/'models'/'stages.pth'
    was = {p:p.read_bytes() for p in (path/'models').iterdir()}
    learn = make_learner(path, ch=16 if other=='architecture' else 8)
    w = weights(learn)
    with sizes_seen(learn) as seen, pytest.raises(ValueError, match=other):
        learn.fit_stages(STAGES if other=='architecture' else STAGES[:2] + [Stage(64,3)], resume=resume)
    assert not seen and same(weights(learn), w)
    assert {p:p.read_bytes() for p in (path/'models').iterdir()}==was

def image(i): return PILImage.create(np.full((64,64,3), i, dtype=np.uint8))

def test_another_fold_is_refused(tmp_path):
    "As many items, but others: going on would validate on what was trained"
    def fold(valid):
        block = DataBlock((ImageBlock,CategoryBlock), get_x=image, get_y=lambda i: i%2, splitter=IndexSplitter(valid))
        learn = tiny_learner(block.dataloaders(list(range(32)), bs=8, num_workers=0, device='cpu'))
        learn.path = tmp_path
        return learn
    with sizes_seen(learn := fold(range(8))): learn.fit_stages([Stage(32,1)])
    with sizes_seen(learn := fold(range(8,16))) as seen, pytest.raises(ValueError, match='other data'): learn.fit_stages([Stage(32,1)])
    assert not seen
    with sizes_seen(learn) as seen: learn.fit_stages([Stage(32,1)], name='fold2')
    assert seen

def test_two_names_side_by_side(tmp_path):
    fit(make_learner(tmp_path), [Stage(32,1)], name='a')
    fit(make_learner(tmp_path), [Stage(48,1)], name='b')
    assert sorted(p.name for p in (tmp_path/'models').iterdir())==['a-1-32px.pth','a.pth','b-1-48px.pth','b.pth']

class Saves(SaveModelCallback):
    "Note at which size and in which epoch a model is saved"
    def __init__(self, notes, **kwargs): super().__init__(**kwargs); self.notes = notes
    def after_batch(self):
        if self.training: self.size = self.xb[0].shape[-1]
    def _save(self, name):
        self.notes.append((self.size, self.epoch))
        super()._save(name)

@pytest.mark.parametrize('every_epoch', [False,True])
@pytest.mark.parametrize('n', [5,20,29])
def test_save_model_saves_no_epoch_twice(n, every_epoch, tmp_path):
    def saves(notes): return Saves(notes, fname='best', every_epoch=every_epoch)
    once,twice = [],[]
    learn = make_learner(tmp_path/'whole')
    fit(learn, cbs=saves(once))
    killed(tmp_path, n, cbs=saves(twice))
    again = make_learner(tmp_path)
    fit(again, cbs=saves(twice))
    assert twice==once and once
    assert same(weights(again), weights(learn))

def own_fit(learn): learn.fit_flat_cos(2, 1e-3)

def test_own_function(tmp_path):
    stages = [Stage(32,1), Stage(48,2,fit=own_fit)]
    learn = make_learner(tmp_path/'whole')
    df,seen = fit(learn, stages)
    assert trained(seen)==[32]*3 + [48]*6 and df['epochs'].tolist()==[1,2]
    killed(tmp_path, 8, stages)
    again = make_learner(tmp_path, seed=7)
    fit(again, stages)
    assert same(weights(again), weights(learn))

def test_own_function_of_another_process(tmp_path):
    "The same function after a restart is another object at another address"
    def stages(): return [Stage(32,1), Stage(48,2,fit=lambda learn: learn.fit_flat_cos(2, 1e-3))]
    first = stages() # Kept alive, so that its address is not used again
    killed(tmp_path, 8, first)
    _,seen = fit(make_learner(tmp_path), stages())
    assert len(trained(seen))==3

@pytest.mark.parametrize('ex', [None,RuntimeError,KeyboardInterrupt])
def test_learner_as_before(ex, tmp_path):
    learn = make_learner(tmp_path, cbs=ProgressiveResize(mult=8))
    resize = learn.progressive_resize
    def state(): return [id(cb) for cb in learn.cbs if cb.name!='progress'],[dl.bs for dl in learn.dls.loaders],id(learn.loss_func)
    was = state()
    if ex:
        with pytest.raises(ex): fit(learn, cbs=Boom(9, ex))
    else:
        _,seen = fit(learn, cbs=Boom(99))
        # The stages say the size, not the `ProgressiveResize` that is there
        assert trained(seen)==[32]*6 + [48]*18 + [64]*6
    assert state()==was and learn.progressive_resize is resize
    assert not [k for k in vars(learn) if 'boom' in k or 'train_at' in k or 'epochs' in k]
    learn.unfreeze()
    with sizes_seen(learn) as seen: learn.fit(4)
    assert list(dict.fromkeys(trained(seen)))==[32,40,48,56,64]

@pytest.mark.parametrize('kwargs,name', [
    (dict(size=0,epochs=1), 'size'), (dict(size=32.5,epochs=1), 'size'), (dict(size=32,epochs=0), 'epochs'), (dict(size=32,epochs=1,bs=0), 'bs'),
    (dict(size=32,epochs=1,fit='sgdr'), 'fit'), (dict(size=32,epochs=1,freeze_epochs=-1), 'freeze_epochs')])
def test_bad_stage(kwargs, name):
    with pytest.raises(ValueError, match=f'`{name}`'): Stage(**kwargs)

@pytest.mark.parametrize('stages,kwargs', [([], {}), ([32], {}), ([Stage(96,1)], {}), ([Stage(32,1,freeze_epochs=1)], {}), ([Stage(32,1)], dict(fit='sgdr'))])
def test_bad_stages_write_nothing(stages, kwargs, tmp_path):
    learn = make_learner(tmp_path)
    with sizes_seen(learn) as seen, pytest.raises(ValueError): learn.fit_stages(stages, **kwargs)
    assert not seen and not list(tmp_path.iterdir())

def test_random_states_of_a_file_of_one_process():
    "Where they stand alone, not in a list"
    learn = tiny_learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    state = get_state(learn)
    want = torch.rand(3)
    set_state(learn, {**state, 'random':state['random'][0]})
    assert torch.equal(torch.rand(3), want)
