"`fit_stages`: killed anywhere and run again, it ends with the weights of a run that was not"
import math, os, re, subprocess, sys, time
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastcore.basics import noop, risinstance
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import Normalize
from fastai.layers import Lambda
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import IndexSplitter, parent_label
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.optimizer import OptimWrapper
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock, PointBlock
from fastai.vision.augment import RandomResizedCrop, Resize, aug_transforms
from fastai_tricks.core import files
from fastai_tricks.core.files import save_whole
from fastai_tricks.core.runs import RunInUse
from fastai_tricks.core.state import get_state, set_state
from fastai_tricks.resize.callback import ProgressiveResize
from fastai_tricks.resize.stages import plan_stages, Stage
from fastai_tricks.core.test_utils import noise_image, tiny_dls, tiny_learner, sizes_seen
from killed import kill_from_outside, Slow
from stages_run import STAGES, make_learner, run

SCRIPT = Path(__file__).with_name('stages_run.py')
# Files: 1 in stage 1, then weights 2 and state 3; 4 and 5 in stage 2, then 6 and 7; 8 in stage 3, then 9 and 10.
# Before anything is saved, in an unfrozen epoch, before the first file, between weights and state, after it, when all is done, and three times in a row
KILLS = ['batch:2','batch:20','rename:1','rename:3','renamed:3','renamed:10','batch:10+batch:8+rename:2']

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

def killed(folder, n, stages=STAGES, make=make_learner, cbs=noop):
    learn = make(folder)
    learn.add_cb(Boom(n))
    with pytest.raises(KeyboardInterrupt): fit(learn, stages, cbs=cbs())
    return learn

def goes_on(folder, n, stages=STAGES, make=make_learner, cbs=noop):
    "Stopped in the `n`th batch and taken up by another Learner: its weights and its table"
    killed(folder, n, stages, make, cbs)
    again = make(folder, seed=7)
    df,_ = fit(again, stages, cbs=cbs())
    return weights(again),df

def uninterrupted(folder, stages=STAGES, make=make_learner, cbs=noop):
    learn = make(folder)
    df,_ = fit(learn, stages, cbs=cbs())
    return weights(learn),df

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
    assert sorted(p.name for p in (runs/kill/'models').iterdir() if p.name[0]!='.')==['stages-1-32px.pth','stages-2-48px.pth','stages-3-64px.pth','stages.pth']
    for p in (runs/'models').glob('stages-*'): assert same(torch.load(p, weights_only=True), torch.load(runs/kill/'models'/p.name, weights_only=True))

def test_killed_from_outside_at_any_moment(whole, tmp_path):
    kill_from_outside(script(tmp_path, 'slow'), (tmp_path/'models'/'stages.pth').exists, 2)
    assert not (tmp_path/'final.pth').exists()
    run(tmp_path)
    assert same(results(tmp_path)[0], weights(whole[1]))

# In this process --------------------------------------------------------------

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "As in the processes that are killed: several threads add in another order"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

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

def test_resume_false_starts_over(whole, tmp_path):
    killed(tmp_path, 20)
    learn = make_learner(tmp_path)
    _,seen = fit(learn, resume=False)
    assert len(trained(seen))==30 and same(weights(learn), weights(whole[1]))

@pytest.mark.parametrize('n', [5,20])
def test_rerun_with_the_same_learner(n, whole, tmp_path):
    "After Ctrl-C in a notebook the Learner at hand is used again"
    learn = killed(tmp_path, n)
    fit(learn)
    assert same(weights(learn), weights(whole[1]))

def frozen_at_first(folder, **kwargs):
    "As `vision_learner` gives it"
    learn = make_learner(folder, **kwargs)
    learn.freeze()
    return learn

def test_learner_frozen_at_first(tmp_path):
    "Its stage after `fine_tune` is not frozen, also in a run that begins with that stage"
    w,_ = uninterrupted(tmp_path/'whole', make=frozen_at_first)
    for n in (10,29): assert same(goes_on(tmp_path/str(n), n, make=frozen_at_first)[0], w)

def with_torch_optimizer(folder, **kwargs):
    learn = make_learner(folder, **kwargs)
    learn.opt_func = partial(OptimWrapper, opt=torch.optim.AdamW)
    return learn

def with_workers(folder, **kwargs):
    learn = make_learner(folder, **kwargs)
    learn.dls = tiny_dls(n=20, bs=4, num_workers=1, item_tfms=RandomResizedCrop(64), batch_tfms=aug_transforms(size=64))
    return learn

@pytest.mark.parametrize('make,n,stages', [(with_torch_optimizer,20,STAGES), (with_workers,5,[Stage(32,1), Stage(64,1)])], ids=['torch','workers'])
def test_other_learners(make, n, stages, tmp_path):
    w,_ = uninterrupted(tmp_path/'whole', stages, make)
    assert same(goes_on(tmp_path, n, stages, make)[0], w)

def test_progressive_resize_passed_along(tmp_path):
    "The stages say the size, as with one that was added to the Learner"
    _,seen = fit(make_learner(tmp_path), cbs=ProgressiveResize(mult=8))
    assert trained(seen)==[32]*6 + [48]*18 + [64]*6

def twice(learn):
    learn.fit(2, 1e-3)
    learn.fit(2, 1e-2)

def test_own_function_of_two_fits(tmp_path):
    stages = [Stage(48,4,fit=twice)]
    w,df = uninterrupted(tmp_path/'whole', stages)
    assert df['epochs'].tolist()==[4]
    for n in (5,11): assert same(goes_on(tmp_path/str(n), n, stages)[0], w)

def test_early_stopping(tmp_path):
    "No metric gets better by 10: each stage stops after 3 epochs"
    def stop(): return EarlyStoppingCallback(monitor='accuracy', min_delta=10, patience=2)
    stages = [Stage(32,5), Stage(48,5)]
    w,df = uninterrupted(tmp_path/'whole', stages, cbs=stop)
    assert max(df['epochs'])<5
    for n in (8,14):
        w1,df1 = goes_on(tmp_path/str(n), n, stages, cbs=stop)
        assert df1['epochs'].tolist()==df['epochs'].tolist() and same(w1, w)

def test_mixup_and_accumulation(tmp_path):
    "Gradients that wait for their step at the end of an epoch are part of the state"
    def make(folder, **kwargs): return make_learner(folder, cbs=[MixUp(), GradientAccumulation(8)], **kwargs)
    w,_ = uninterrupted(tmp_path/'whole', make=make)
    for n in (5,19,28): assert same(goes_on(tmp_path/str(n), n, make=make)[0], w)

@pytest.mark.parametrize('resume', [True,False])
@pytest.mark.parametrize('other', ['architecture','stages'])
def test_other_checkpoint_refused(whole, resume, other):
    path,*_ = whole
    file = path/'models'/'stages.pth'
    was = {p:p.read_bytes() for p in (path/'models').iterdir()}
    learn = make_learner(path, ch=16 if other=='architecture' else 8)
    w = weights(learn)
    with sizes_seen(learn) as seen, pytest.raises(ValueError, match='network' if other=='architecture' else other):
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
    assert sorted(p.name for p in (tmp_path/'models').glob('[!.]*'))==['a-1-32px.pth','a.pth','b-1-48px.pth','b.pth']

class Saves(SaveModelCallback):
    "Note at which size and in which epoch a model is saved"
    def __init__(self, notes, **kwargs): super().__init__(**kwargs); self.notes = notes
    def after_batch(self):
        if self.training: self.size = self.xb[0].shape[-1]
    def _save(self, name):
        self.notes.append((self.size, self.epoch))
        super()._save(name)

@pytest.mark.parametrize('n,every_epoch', [(5,True), (20,False)])
def test_save_model_saves_no_epoch_twice(n, every_epoch, tmp_path):
    once,twice = [],[]
    w,_ = uninterrupted(tmp_path/'whole', cbs=lambda: Saves(once, fname='best', every_epoch=every_epoch))
    w1,_ = goes_on(tmp_path, n, cbs=lambda: Saves(twice, fname='best', every_epoch=every_epoch))
    assert twice==once and once and same(w1, w)

def own_fit(learn): learn.fit_flat_cos(2, 1e-3)

def test_own_function(tmp_path):
    stages = [Stage(32,1), Stage(48,2,fit=own_fit)]
    learn = make_learner(tmp_path/'whole')
    df,seen = fit(learn, stages)
    assert trained(seen)==[32]*3 + [48]*6 and df['epochs'].tolist()==[1,2]
    assert same(goes_on(tmp_path, 8, stages)[0], weights(learn))

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

# Between two runs -------------------------------------------------------------

def noise(i): return noise_image(int(Path(i).stem))

def labelled(label=parent_label, vocab=None, loss=None, max_rotate=10, items=tuple(f'{c}/{i}.png' for i in range(6) for c in 'ab'), folder=None):
    block = DataBlock((ImageBlock,CategoryBlock(vocab, sort=vocab is None)), get_x=noise, get_y=label, splitter=IndexSplitter([0,1]),
                      item_tfms=Resize(64), batch_tfms=aug_transforms(max_rotate=max_rotate))
    learn = tiny_learner(block.dataloaders(list(items), bs=4, num_workers=0, device='cpu'))
    learn.path = folder
    if loss: learn.loss_func = loss
    return learn

@pytest.mark.parametrize('change,said', [
    (dict(vocab=['b','a']), "classes: a there, b here"), (dict(label=lambda o: 'a' if '5' in o else parent_label(o)), "training labels of 1 item differ: 'b/5.png'"),
    (dict(loss=CrossEntropyLossFlat(label_smoothing=.1)), 'loss: '), (dict(max_rotate=90), ' with other parameters')])
def test_what_would_mix_two_runs_is_refused(change, said, tmp_path):
    fit(labelled(folder=tmp_path), [Stage(32,1)])
    was = (tmp_path/'models'/'stages.pth').read_bytes()
    learn = labelled(**change, folder=tmp_path)
    with sizes_seen(learn) as seen, pytest.raises(ValueError, match=re.escape(said)): learn.fit_stages([Stage(32,1)])
    assert not seen and (tmp_path/'models'/'stages.pth').read_bytes()==was
    fit(labelled(folder=tmp_path), [Stage(32,1)])

def test_the_data_may_have_moved_and_versions_are_said(tmp_path, monkeypatch, capsys):
    fit(labelled(folder=tmp_path), [Stage(32,1)])
    monkeypatch.setattr('fastai_tricks.resize.stages.versions', lambda: dict(torch='0'))
    learn = labelled(items=[f'/mnt/{c}/{i}.png' for i in range(6) for c in 'ab'], folder=tmp_path)
    with learn.no_bar(): learn.fit_stages([Stage(32,1)])
    assert 'versions: ' in capsys.readouterr().out

def wait_for(file):
    end = time.time() + 60
    while not file.exists() and time.time()<end: time.sleep(.01)

def test_two_processes_at_once(tmp_path):
    "The second is refused by name, the first is as if alone"
    pid = os.fork()
    if not pid:
        learn = make_learner(tmp_path, cbs=Slow())
        with learn.no_bar(), learn.no_logging(): learn.fit_stages(STAGES[:1])
        os._exit(0)
    try:
        wait_for(tmp_path/'models'/'.stages.pth.who')
        learn = make_learner(tmp_path)
        with sizes_seen(learn) as seen, pytest.raises(RunInUse, match=f"'models/stages.pth' is in use by process {pid} since .* Choose another `name`"):
            learn.fit_stages(STAGES[:1])
        assert not seen
    finally: assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==0
    alone = uninterrupted(tmp_path/'alone', STAGES[:1])[0]
    assert same(torch.load(tmp_path/'models'/'stages-1-32px.pth', weights_only=True), alone)

def test_what_a_killed_process_left_is_removed(tmp_path):
    learn = make_learner(tmp_path)
    (dead := subprocess.Popen(['true'])).wait()
    left = files._part_of(tmp_path/'models'/'stages.pth')
    left = left.with_name(left.name.replace(f'-{os.getpid()}-', f'-{dead.pid}-'))
    for f in (left,left.with_name('.mine.part')): save_whole(0, f)
    fit(learn, [Stage(32,1)])
    assert not left.exists() and left.with_name('.mine.part').exists()

@pytest.mark.parametrize('text', [b'', b'half a file'])
def test_a_damaged_checkpoint_is_named(text, tmp_path):
    learn = make_learner(tmp_path)
    (tmp_path/'models').mkdir()
    (tmp_path/'models'/'stages.pth').write_bytes(text)
    with sizes_seen(learn) as seen, pytest.raises(ValueError, match="stages.pth' is damaged .*: delete it"): learn.fit_stages([Stage(32,1)])
    assert not seen

def test_a_folder_that_cannot_be_written_to_is_found_before(tmp_path):
    learn = make_learner(tmp_path)
    (tmp_path/'models').touch()
    with sizes_seen(learn) as seen, pytest.raises(ValueError, match='`learn.path` must be a folder that can be written to'): learn.fit_stages([Stage(32,1)])
    assert not seen

def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    learn = killed(tmp_path, 5)
    was = {f.name:f.read_bytes() for f in (tmp_path/'models').iterdir()}
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(files, '_flush', full)
    with pytest.raises(OSError, match=r"no space left on '.*models' for 'stages.*pth', needs 1 MB"): fit(make_learner(tmp_path))
    assert {f.name:f.read_bytes() for f in (tmp_path/'models').iterdir()}==was

def kinds(kind, folder, n=12):
    "A Learner on other kinds of targets and loaders"
    y,blocks,loss,c = {'multi':(lambda i: ['ab'[i%2],'c'], MultiCategoryBlock, None, 3), 'number':(lambda i: float(i), RegressionBlock, MSELossFlat(), 1),
        'points':(lambda i: [[i,2.],[3.,4.]], PointBlock, MSELossFlat(), 4), 'normalize':(lambda i: i%2, CategoryBlock, None, 2)}[kind]
    tfms = Normalize() if kind=='normalize' else None
    block = DataBlock((ImageBlock,blocks), get_x=noise_image, get_y=y, splitter=IndexSplitter([0,1]), item_tfms=Resize(64), batch_tfms=tfms)
    dls = block.dataloaders(list(range(n)), bs=4, num_workers=0, device='cpu')
    return Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3,c)), loss_func=loss, path=folder)

@pytest.mark.parametrize('kind', ['multi','number','points','normalize'])
def test_other_kinds_go_on(kind, tmp_path):
    set_seed(1)
    killed(tmp_path, 4, [Stage(32,3)], make=partial(kinds, kind))
    set_seed(2) # `Normalize()` takes its statistics from another batch
    learn = kinds(kind, tmp_path)
    _,seen = fit(learn, [Stage(32,3)])
    assert len(trained(seen))==4 # One of three epochs was done
    if kind!='normalize': return
    state = torch.load(tmp_path/'models'/'stages.pth', weights_only=True)['state']
    assert torch.equal(learn.dls.train.after_batch[-1].mean, state['statistics'][0][0])

def test_a_function_as_a_layer_is_the_same_in_each_process(tmp_path):
    def make(folder, **kwargs):
        learn = make_learner(folder, **kwargs)
        learn.model = nn.Sequential(*learn.model, Lambda(lambda x: x))
        return learn
    killed(tmp_path, 5, STAGES[:1], make=make)
    assert len(fit(make(tmp_path), STAGES[:1])[1])

@pytest.mark.parametrize('change', [dict(labels=1), dict(images=1), dict(bs=2)])
def test_loaders_of_pytorch_are_told_apart(change, tmp_path):
    def make(labels=0, images=0, bs=4):
        data = torch.utils.data.TensorDataset(torch.full((8,3,64,64), float(images)), torch.full((8,), labels))
        learn = tiny_learner(DataLoaders(*[torch.utils.data.DataLoader(data, batch_size=bs) for _ in range(2)]))
        learn.path = tmp_path
        return learn
    fit(make(), [Stage(32,1)])
    fit(make(), [Stage(32,1)])
    with pytest.raises(ValueError, match='training batch size' if 'bs' in change else 'training content'): fit(make(**change), [Stage(32,1)])

def test_force_goes_on_with_other_code_and_nothing_else(tmp_path):
    fit(labelled(folder=tmp_path), [Stage(32,1)])
    with pytest.raises(ValueError, match="resume='force' goes on"): fit(labelled(max_rotate=90, folder=tmp_path), [Stage(32,1)])
    fit(labelled(max_rotate=90, folder=tmp_path), [Stage(32,1)], resume='force')
    with pytest.raises(ValueError, match='classes'): fit(labelled(vocab=['b','a'], folder=tmp_path), [Stage(32,1)], resume='force')

@pytest.mark.parametrize('write', [lambda l: l.save('stages', with_opt=False), lambda l: l.save('stages'), lambda l: save_whole(dict(stage=1), l.path/l.model_dir/'stages.pth')])
def test_a_file_of_another_origin_is_left_alone(write, tmp_path):
    learn = make_learner(tmp_path)
    learn.create_opt()
    (tmp_path/'models').mkdir()
    write(learn)
    was = (tmp_path/'models'/'stages.pth').read_bytes()
    with pytest.raises(ValueError, match='was not written by .*ove it away'): fit(learn, [Stage(32,1)])
    assert (tmp_path/'models'/'stages.pth').read_bytes()==was

def test_broken_off_within_mixup_it_goes_on(tmp_path):
    learn = make_learner(tmp_path, cbs=MixUp())
    was = learn.loss_func
    learn.add_cb(Boom(5))
    with pytest.raises(KeyboardInterrupt): fit(learn, STAGES[:1])
    assert learn.loss_func is was
    learn.remove_cb(Boom)
    fit(learn, STAGES[:1])

# Callbacks --------------------------------------------------------------------

class Plateau(ReduceLROnPlateau):
    def before_batch(self): self.learn.rates.append(self.opt.hypers[-1]['lr'])

def test_a_lowered_rate_stays_low(tmp_path):
    "The optimiser must not change the checkpoint that it goes on from"
    def flat(learn): learn.fit(4, 1e-2)
    def make(folder, **kwargs):
        learn = make_learner(folder, cbs=Plateau(min_delta=100, factor=10), **kwargs)
        learn.rates = []
        return learn
    def rates(learn):
        fit(learn, [Stage(32,4,fit=flat)])
        return learn.rates[-3:]
    whole = rates(make(tmp_path/'whole'))
    assert whole==pytest.approx([1e-4]*3) or whole[-1]<1e-2
    killed(tmp_path, 11, [Stage(32,4,fit=flat)], make=make)
    assert rates(make(tmp_path, seed=7))==whole

def test_two_callbacks_of_one_class_keep_their_own(tmp_path):
    def two(): return [SaveModelCallback(fname='low'), SaveModelCallback(fname='high', comp=np.greater)]
    learn = make_learner(tmp_path, cbs=two())
    learn.create_opt()
    for cb,best in zip(learn.cbs.filter(risinstance(SaveModelCallback)), (.1,.9)): cb.best = best
    state = get_state(learn)
    learn = make_learner(tmp_path, cbs=two())
    learn.create_opt()
    set_state(learn, state)
    assert [cb.best for cb in learn.cbs.filter(risinstance(SaveModelCallback))]==[.1,.9]

class Odd(Callback):
    def before_fit(self): self.best,self.count = Path('x'),3

def test_state_that_is_no_plain_value_is_said_when_it_is_saved(tmp_path):
    learn = make_learner(tmp_path, cbs=Odd())
    with pytest.warns(UserWarning, match='Odd.best is a .*Path and no plain value: it is not saved'): fit(learn, [Stage(32,2)])
    fit(make_learner(tmp_path), [Stage(32,2)])

# A loss that is no number -----------------------------------------------------

class Explode(Callback):
    "The weights become NaN in the `n`th training batch"
    order,run_valid = 0,False
    def __init__(self, n): self.n,self.i = n,0
    def before_batch(self):
        self.i += 1
        if self.i==self.n:
            for p in self.model.parameters(): p.data.fill_(math.nan)

@pytest.mark.parametrize('cbs', [[], [TerminateOnNaNCallback()]])
def test_a_run_that_diverged_goes_on_from_the_last_good_epoch(cbs, tmp_path):
    stages = [Stage(32,2,lr=1e-2),Stage(48,2,lr=1e-2)]
    learn = make_learner(tmp_path, cbs=Explode(10))
    with pytest.raises(RuntimeError, match='the loss became nan or infinite in epoch 2 of stage 2; .* it goes on from there'): fit(learn, stages, cbs=cbs)
    again = make_learner(tmp_path, seed=7)
    df,seen = fit(again, [Stage(32,2,lr=1e-2),Stage(48,2,lr=1e-3)])
    assert trained(seen)==[48]*3 and np.isfinite(df.train_loss).all()
    with pytest.raises(ValueError, match='rates of stages'): fit(make_learner(tmp_path), stages)

@pytest.mark.parametrize('trains', [lambda l: l.fit_stages([Stage(32,1)]), lambda l: l.fit(1, cbs=ProgressiveResize(32))])
def test_fewer_images_than_a_batch(trains, tmp_path):
    learn = tiny_learner(tiny_dls(n=20, bs=64))
    learn.path = tmp_path
    with learn.no_bar(), pytest.raises(ValueError, match='`bs` must be at most the 12 training images'): trains(learn)

# What is decided --------------------------------------------------------------

def test_plan():
    plan = plan_stages([Stage((32,48),1), Stage(48,2,bs='pixels',fit='fine_tune',freeze_epochs=1), Stage(64,1,fit=own_fit,bs=4)], (64,96), bs=8, batches=BATCHES)
    assert [(s.size,s.bs,s.n_epoch,s.share) for s in plan.stages]==[((32,48),8,1,.25), ((48,72),8,3,.5625), ((64,96),4,1,1.)]
    assert plan.n_epoch==5 and plan.share==pytest.approx((.25 + 3*.5625 + 1)/5)
    assert [str(s).split(';')[0] for s in plan.stages]==['32×48 px, 1 epoch, one_cycle, bs 8', '48×72 px, 2 epochs and 1 frozen before, fine_tune, bs 8', '64×96 px, 1 epoch, own_fit, bs 4']

BATCHES = dict(bs=8, n=24, drop_last=True)

@pytest.mark.parametrize('stage,kwargs,name', [
    (Stage(96,1), {}, 'size'), (Stage((64,96),1), {}, 'size'), (Stage(32,1,freeze_epochs=1), {}, 'freeze_epochs'), (Stage(32,1), dict(fit='sgdr'), 'fit'),
    (Stage(32,1,bs=25), {}, 'bs'), (Stage(32,1,bs=4), dict(batches=None), 'bs'), (32, {}, 'stages')])
def test_plan_is_refused(stage, kwargs, name):
    with pytest.raises(ValueError, match=f'`{name}`'): plan_stages([stage], (64,64), **{**dict(bs=8, batches=BATCHES), **kwargs})

def test_a_larger_batch_than_there_are_images_where_none_is_dropped():
    assert plan_stages([Stage(32,1,bs=25)], (64,64), batches={**BATCHES, 'drop_last':False}).stages[0].bs==25

def test_trains_at_the_size_it_says(tmp_path):
    "Of a rectangle too, whose longer side is no multiple of anything"
    def wide(i): return PILImage.create(np.zeros((64,96,3), dtype=np.uint8))
    block = DataBlock((ImageBlock,CategoryBlock), get_x=wide, get_y=lambda i: i%2, splitter=IndexSplitter(range(4)))
    learn = tiny_learner(block.dataloaders(list(range(12)), bs=4, num_workers=0, device='cpu'))
    learn.path = tmp_path
    df,seen = fit(learn, [Stage(48,1)])
    assert {o[1:] for o in seen if o[0]}=={(48,72)} and df['size'].tolist()==['48×72']

def test_loaders_of_pytorch(tmp_path):
    data = torch.utils.data.TensorDataset(torch.rand(8,3,64,64), torch.zeros(8).long())
    learn = tiny_learner(DataLoaders(*[torch.utils.data.DataLoader(data, batch_size=4) for _ in range(2)]))
    learn.path = tmp_path
    _,seen = fit(learn, [Stage(32,1)])
    assert trained(seen)==[32]*2
    with pytest.raises(ValueError, match='`bs`'): fit(learn, [Stage(32,1,bs=2)], name='b')

def test_loaders_of_fastai_without_transforms(tmp_path):
    data = [(torch.rand(3,64,64), 0) for _ in range(8)]
    learn = tiny_learner(DataLoaders(*[DataLoader(data, bs=4) for _ in range(2)]))
    learn.path = tmp_path
    _,seen = fit(learn, [Stage(32,1,bs=2)])
    assert trained(seen)==[32]*4

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
