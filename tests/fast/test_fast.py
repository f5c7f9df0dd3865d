"`fit_fast`: the facts it gathers, what the model receives, and what is left behind"
from dataclasses import replace
import re
import numpy as np, pytest, timm, torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import params
from fastai.vision.augment import aug_transforms
from fastai.vision.core import PILMask
from fastai.vision.data import MaskBlock, PointBlock
from fastai.vision.learner import unet_learner, vision_learner
from fastai.vision.models import resnet18
from torch import nn
import fastai_tricks.all as ft
import fastai_tricks.fast.steps
import fastai_tricks.models.fit_head
from fastai_tricks.core.test_utils import sizes_seen
from fastai_tricks.fast.fit_fast import fast_facts
from fastai_tricks.fast.learned import FastFacts
from fastai_tricks.fast.plan import FastArgs
from fastai_tricks.fast.steps import SmallFirst, TrainAll, TrainHead
from heads import Plain, frozen, loaders, plain, quiet, state

LOW = slice(1e-4,3e-4)

class Seen(Callback):
    "Modes, rates and batch sizes of what the model received in training"
    order = 100
    def __init__(self): self.norm,self.head,self.lrs,self.bs = set(),set(),[],set()
    def after_pred(self):
        if not self.training: return
        self.norm |= {m.training for m in self.model[0].modules() if isinstance(m, nn.BatchNorm2d)}
        self.head |= {m.training for m in self.model[1].modules() if isinstance(m, nn.BatchNorm1d)}
        self.bs.add(len(self.xb[0]))
        self.lrs.append([float(h['lr']) for h in self.opt.hypers])

def facts(learn, **asked): return fast_facts(learn, FastArgs(**{'epochs':1, **asked}))

# What is gathered -------------------------------------------------------------------

TINY = FastFacts(n=24, bs=8, weights='new', norms=True)

def test_facts_of_a_frozen_network():
    tuned = FastFacts(n=24, bs=8, frozen=True, loaded=True, weights='trained', norms=True)
    assert facts(frozen())==tuned
    assert facts(frozen(), resize=True).size==(32,32)
    learn = frozen()
    quiet(learn, learn.fit_head, 1)
    assert facts(learn)==replace(tuned, head_trained=True)
    learn = vision_learner(loaders(), 'test_resnet', pretrained=False)
    assert facts(learn)==replace(TINY, loaded=False, size=(32,32))

def test_facts_of_plain_networks():
    new = Learner(loaders(), timm.create_model('test_resnet', num_classes=4))
    assert facts(new)==replace(TINY, size=(32,32))
    quiet(new, new.fit, 1)
    assert facts(new)==replace(TINY, size=(32,32), fitted=True)
    lite0 = timm.create_model('tf_efficientnet_lite0', num_classes=4, pretrained=True, pretrained_cfg_overlay=dict(file=str(ft.lite0_weights())))
    assert facts(Learner(loaders(), lite0))==replace(TINY, weights='trained')
    vit = Learner(loaders(), timm.create_model('test_vit', num_classes=4, img_size=32))
    assert facts(vit)==replace(TINY, norms=False, size=(32,32))

def test_learning_rate_finder_is_no_training(tmp_path):
    learn = vision_learner(loaders(), 'test_resnet', pretrained=False)
    learn.path = tmp_path
    was = facts(learn)
    quiet(learn, learn.lr_find, num_it=3, show_plot=False, suggest_funcs=None)
    assert facts(learn)==was

# Networks of one size ---------------------------------------------------------------

def vit(img_size=64, **kwargs): return Learner(loaders(size=64), timm.create_model('vit_tiny_patch16_224', img_size=img_size, depth=2, num_classes=4, **kwargs))

@pytest.mark.parametrize('make,said', [
    (lambda: vit(), "the network takes no images of 32 px (Input height (32) doesn't match model (64).)"),
    (lambda: vision_learner(loaders(12, size=224, bs=4), 'vit_tiny_patch16_224', pretrained=False), "the network takes no images of 64 px (Input height (64) doesn't match model (224).)"),
    (lambda: vit(dynamic_img_size=True), ''),
    (lambda: vit(img_size=32), ''), # Full size fails too: that error is fastai's to give
    (lambda: Learner(loaders(size=64), timm.create_model('test_resnet', num_classes=4)), '')], ids=['vit','vision_learner','dynamic','wrong','resnet'])
def test_fixed_size_is_found_out(make, said):
    learn = make()
    was,rng,modes = state(learn.model),torch.get_rng_state(),[m.training for m in learn.model.modules()]
    assert facts(learn, pretrained=False).fixed==said
    assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in learn.model.modules()]==modes

def test_fixed_size_trains_at_full_size():
    learn = vit()
    assert "; at full size throughout: the network takes no images of 32 px (Input" in str(learn.fit_fast_plan(1, pretrained=False))
    with sizes_seen(learn) as sizes: learn.fit_fast(1, pretrained=False, mixed=False)
    assert sizes[:2]==[(False,32,32),(False,64,64)] and {s[1:] for s in sizes[2:]}=={(64,64)}

@pytest.mark.parametrize('resize', [True,ft.ProgressiveResize(.5)])
@pytest.mark.parametrize('pretrained', [True,False])
def test_small_images_asked_for_where_none_are_taken(resize, pretrained):
    learn = vit()
    was = state(learn.model)
    with pytest.raises(ValueError, match='`resize` must be False or None here, as the network takes no images of 32 px'): learn.fit_fast(1, pretrained=pretrained, resize=resize)
    assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items())

def test_wrong_full_size_is_an_ordinary_error():
    learn = vit(img_size=32)
    with pytest.raises(AssertionError, match='Input height'): quiet(learn, learn.fit_fast, 1, pretrained=False, mixed=False)

@pytest.mark.parametrize('cb,fact', [(ft.ProgressiveResize,'resized'), (ft.ChannelsLastBatch,'precise'), (MixedPrecision,'precise')])
def test_callbacks_that_count(cb, fact):
    "On the Learner or for this fit, as a class or an object, as fastai takes them"
    for cbs in (cb, [cb()]): assert getattr(fast_facts(frozen(), FastArgs(1), [cbs] if isinstance(cbs, type) else cbs), fact)
    assert getattr(facts(frozen(cbs=cb())), fact) and not getattr(facts(frozen()), fact)

def masks():
    data = loaders(16, block=MaskBlock(['a','b']), get_y=lambda i: PILMask.create(np.zeros((40,40), dtype=np.uint8)))
    learn = unet_learner(data, resnet18, pretrained=False)
    learn.freeze()
    return learn

def points(): return frozen(loaders(block=PointBlock, get_y=lambda i: [[1.,2.],[3.,4.]]), metrics=[])

def pytorch():
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8,3,32,32), torch.randint(0, 4, (8,))), batch_size=4)
    data = DataLoaders(dl, dl)
    data.c = 4
    return plain(data, loss_func=CrossEntropyLossFlat())

class Odd(nn.Module):
    "No vector of features"
    def __init__(self): super().__init__(); self.body,self.fc = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU()),nn.Conv2d(8, 4, 3)
    def forward(self, x): return self.fc(self.body(x)).mean((2,3))

def odd():
    learn = Learner(loaders(), Odd(), splitter=lambda m: [params(m.body),params(m.fc)])
    learn.freeze()
    return learn

def behind(): return plain(behind=nn.LogSoftmax(1), loss_func=nn.NLLLoss())

ONE = '`learn.dls` must be loaders with one target per image','the targets are not one category or vector per image'
NO_HEAD = dict(masks=(masks,*ONE), points=(points,*ONE), pytorch=(pytorch,"`learn.dls` must be loaders of fastai's","the loaders are not fastai's"),
               odd=(odd,'`learn.model` must end in a linear layer','the network does not end in one linear layer'),
               behind=(behind,'`learn.model` must be a network whose last layer gives its output','something follows the last layer'))

@pytest.mark.parametrize('case', NO_HEAD)
def test_no_head_to_be_found(case):
    "Chosen by default it is left out, with the reason in plain words; asked for it is an error"
    make,error,why = NO_HEAD[case]
    learn = make()
    assert facts(learn, pretrained=True).no_head==why and str(learn.fit_fast_plan(1, pretrained=True)).endswith(f'; the whole network at once: {why}')
    with pytest.raises(ValueError, match=f'`head` must be 0 or None here, as {why}'): learn.fit_fast(1, head=3, pretrained=True)
    with pytest.raises(ValueError, match=f'`epochs` must be a positive integer here, as {why}'): learn.fit_fast(0, pretrained=True)
    with pytest.raises(ValueError, match=error): learn.fit_head(1)
    quiet(learn, learn.fit_fast, 1, mixed=False, pretrained=True)

# What it does -----------------------------------------------------------------------

def test_plan_is_what_happens_and_trains_nothing(capsys):
    learn = frozen()
    was,rng,cbs = state(learn.model),torch.get_rng_state(),[cb.name for cb in learn.cbs]
    plan = learn.fit_fast_plan(1, wd=.1, cbs=MixUp)
    assert plan.pretrained and plan.steps==(TrainHead(10),TrainAll(1, LOW, keep_bn=True, best=True)) and plan.mixed
    assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items()) and learn.opt.frozen_idx and [cb.name for cb in learn.cbs]==cbs
    assert torch.equal(rng, torch.get_rng_state()) and not capsys.readouterr().out
    learn.fit_fast(1, mixed=False)
    assert f'fit_fast, {replace(plan, mixed=False)}' in capsys.readouterr().out.splitlines()

def test_head_first_then_all():
    learn,seen = frozen(),Seen()
    learn.add_cb(seen)
    was = state(learn.model)
    quiet(learn, learn.fit_fast, 1, mixed=False, best=False)
    assert seen.norm=={False} and seen.head=={True} and len(seen.lrs)==3 and seen.bs=={8}
    now = learn.model.state_dict()
    assert all(torch.equal(v, was[k]) for k,v in now.items() if k.startswith('0.') and 'running' in k)
    assert not any(torch.equal(was[n], now[n]) for n,_ in learn.model.named_parameters()) # All of it is trained
    assert max(r[0] for r in seen.lrs)==pytest.approx(1e-4, rel=.3) and max(r[-1] for r in seen.lrs)==pytest.approx(3*max(r[0] for r in seen.lrs))
    # A second one trains on, without the head first; and what `fit_fast` kept was kept by it alone
    assert learn.fit_fast_plan(1).steps==(TrainAll(1, LOW, keep_bn=True),)
    seen.norm.clear()
    quiet(learn, learn.fit, 1)
    assert seen.norm=={True}

def test_the_head_alone():
    learn = frozen()
    was = state(learn.model)
    quiet(learn, learn.fit_fast, 0, mixed=False)
    now = learn.model.state_dict()
    assert all(torch.equal(now[k], was[k]) for k in was if k.startswith('0.'))
    assert not any(torch.equal(was[n], now[n]) for n,_ in learn.model.named_parameters() if n.startswith('1.'))

def test_statistics_of_an_unfrozen_network():
    "Pretrained weights, unfrozen by `fine_tune`: no head first, the head's own batch norm learns"
    learn = frozen()
    quiet(learn, learn.fine_tune, 1)
    seen = Seen()
    assert learn.fit_fast_plan(1).steps==(TrainAll(1, LOW, keep_bn=True),)
    quiet(learn, learn.fit_fast, 1, mixed=False, cbs=seen)
    assert seen.norm=={False} and seen.head=={True}

@pytest.mark.parametrize('make', [frozen, lambda dls: vision_learner(dls, 'test_resnet', pretrained=False)])
def test_fewer_images_than_a_batch(make):
    "fastai's loop would take no step, and not say so"
    learn,seen = make(loaders(64, size=64, bs=512)),Seen()
    n = len(learn.dls.train_ds)
    assert n<512 and not len(learn.dls.train)
    quiet(learn, learn.fit_fast, 1, mixed=False, cbs=seen)
    assert seen.lrs and max(seen.bs)<=n and learn.dls.train.bs==512

def test_from_scratch():
    learn,seen = vision_learner(loaders(64, size=64, bs=16), 'test_resnet', pretrained=False),Seen()
    small = SmallFirst((32,))
    assert learn.fit_fast_plan(4).steps==(TrainAll(4, 4e-3, resize=small, bs=8),)
    with sizes_seen(learn) as sizes: learn.fit_fast(4, mixed=False, cbs=seen)
    assert seen.bs=={8} and learn.dls.train.bs==16 and seen.norm=={True} and max(max(r) for r in seen.lrs)==pytest.approx(4e-3, rel=.05)
    assert sizes.pop(0)==(False,32,32) # Does it take small images?
    train = [s[1:] for s in sizes if s[0]]
    assert set(train)=={(32,32),(64,64)} and train==sorted(train) and {s[1:] for s in sizes if not s[0]}=={(64,64)}

def test_small_images_are_augmented_less():
    plan = SmallFirst((32,64)).callback().plan(128, n_epoch=10)
    assert plan.sizes==[(32,32),(64,64)] and plan.ends[-2:]==[.93,1]
    assert (plan.steps[0].strength,plan.steps[-1].strength)==pytest.approx((.3,1))

@pytest.mark.parametrize('arch', ['test_resnet','test_convnext','test_vit'])
def test_plain_timm(arch):
    def split(m):
        head = list(m.get_classifier().parameters())
        return [[p for p in m.parameters() if not any(p is o for o in head)], head]
    learn = Learner(loaders(), timm.create_model(arch, num_classes=4, **(dict(img_size=32) if 'vit' in arch else {})), splitter=split, metrics=accuracy)
    learn.freeze()
    was = state(learn.model)
    assert learn.fit_fast_plan(1, pretrained=True).steps[0]==TrainHead(10)
    quiet(learn, learn.fit_fast, 1, mixed=False, best=False, pretrained=True)
    trained = [n for n,p in learn.model.named_parameters() if not torch.equal(p, was[n])]
    assert len(learn.get_preds()[0])==8 and len(trained)>.9*len(list(learn.model.parameters()))

def test_workers():
    learn = frozen(loaders(num_workers=2))
    quiet(learn, learn.fit_fast, 1, mixed=False)
    assert len(learn.get_preds()[0])==8

OTHERS = dict(mixup=MixUp, accumulation=lambda: GradientAccumulation(16), resize=lambda: ft.ProgressiveResize(mult=8), cam=lambda: ft.WatchCAM(n=2))

@pytest.mark.parametrize('cb', OTHERS)
def test_with_others(cb):
    learn = frozen(loaders(batch_tfms=aug_transforms()))
    loss = learn.loss_func
    quiet(learn, learn.fit_fast, 1, mixed=False, cbs=[OTHERS[cb]()])
    assert len(learn.get_preds()[0])==8 and learn.loss_func is loss
    assert len(learn.tta(n=1)[0])==8

# The head is a result ---------------------------------------------------------------

def test_the_head_is_row_0(tmp_path):
    learn,seen = frozen(cbs=CSVLogger()),Seen()
    learn.path = tmp_path
    quiet(learn, learn.fit_fast, 0, mixed=False)
    values = learn.recorder.values
    head = learn.validate()
    assert len(values)==1 and list(values[0][1:])==pytest.approx(list(head)) and learn.opt.frozen_idx
    learn = frozen(cbs=CSVLogger())
    learn.path = tmp_path
    quiet(learn, learn.fit_fast, 2, mixed=False, cbs=seen)
    rows = learn.csv_logger.read_log()
    assert list(rows['epoch'])==[0,1,2] and list(rows.loc[0, ['valid_loss','accuracy']])==pytest.approx(list(head))
    assert len(seen.lrs)==2*len(learn.dls.train) and rows.notna().all().all()

def test_seconds_of_the_head_are_in_the_table(monkeypatch):
    times = iter([100.,107.])
    monkeypatch.setattr(fastai_tricks.fast.steps.time, 'perf_counter', lambda: next(times))
    learn,rows = frozen(),[]
    with learn.no_bar():
        learn.logger = rows.append
        learn.fit_fast(1, mixed=False)
    assert rows[0][-1]>='00:07' and rows[1][-1]<'00:07'

class Worse(Callback):
    "Spoils the network in the epochs that train"
    def after_train(self):
        if self.epoch: self.model[1][-1].weight.data.normal_(0, 1e4)

@pytest.mark.parametrize('best', [True,False])
def test_epochs_that_end_below_the_head(best, capsys):
    kept = []
    class Keep(Callback):
        def after_epoch(self): kept.append(state(self.model))
    learn = frozen()
    with learn.no_bar(): learn.fit_fast(1, mixed=False, head=40, best=best, cbs=[Worse(),Keep()])
    scores = [v[2] for v in learn.recorder.values]
    assert scores[0]>scores[1]
    expected = kept[0 if best else 1]
    assert all(torch.equal(v, expected[k]) for k,v in learn.model.state_dict().items())
    assert ('ends 0% of the way' in capsys.readouterr().out)==best

def test_blends_of_head_and_end(monkeypatch, capsys):
    "The best of five is kept: here the one in the middle"
    learn,kept,scored = frozen(),[],[]
    class Keep(Callback):
        def after_epoch(self): kept.append(state(self.model))
    def score(learn, column):
        scored.append(state(learn.model))
        return 2. if len(scored)==2 else 0.
    monkeypatch.setattr(fastai_tricks.fast.steps, '_score', score)
    with learn.no_bar(): learn.fit_fast(1, mixed=False, cbs=Keep())
    first,last = kept[0],kept[-1]
    for share,st in zip((.3,.5,.7), scored):
        assert all(torch.allclose(v, first[k]+share*(last[k]-first[k]), atol=1e-6) for k,v in st.items() if v.is_floating_point())
    assert all(torch.equal(v, scored[1][k]) for k,v in learn.model.state_dict().items())
    assert 'ends 50% of the way from the head to the last epoch (accuracy 2.0000;' in capsys.readouterr().out

def test_scores_of_blends_are_those_of_the_network():
    "And leave no trace in the record"
    learn = frozen()
    quiet(learn, learn.fit_fast, 2, mixed=False)
    assert len(learn.recorder.values)==3 and len(learn.recorder.losses)==1+2*len(learn.dls.train)
    values = list(learn.recorder.values)
    assert fastai_tricks.fast.steps._score(learn, 'accuracy')==learn.validate()[1]>=max(values[0][2], values[-1][2])

def test_saved_where_it_is_the_best(tmp_path, capsys):
    "The user's own choice of the best comes first"
    learn = frozen(cbs=SaveModelCallback(monitor='accuracy', fname='m'))
    learn.path,learn.model_dir = tmp_path,'.'
    quiet(learn, learn.fit_fast, 0, mixed=False)
    assert [f.name for f in tmp_path.iterdir()]==['m.pth']
    learn = frozen(cbs=SaveModelCallback(monitor='accuracy', fname='m'))
    learn.path,learn.model_dir = tmp_path,'.'
    quiet(learn, learn.fit_fast, 2, mixed=False, head=40, cbs=Worse())
    scores = [v[2] for v in learn.recorder.values]
    learn.remove_cb(SaveModelCallback) # fastai's `validate` fails with it
    assert learn.validate()[1]==scores[0]>scores[1]
    assert 'at epoch 0 with accuracy' in capsys.readouterr().out

def test_stopped_early():
    learn = frozen()
    quiet(learn, learn.fit_fast, 3, mixed=False, head=40, cbs=[Worse(),EarlyStoppingCallback(monitor='accuracy')])
    scores = [v[2] for v in learn.recorder.values]
    assert len(scores)==2 and learn.validate()[1]==scores[0]

def test_loggers_of_experiments(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    wandb = pytest.importorskip('wandb')
    import fastai.callback.wandb
    from fastai.callback.tensorboard import TensorBoardCallback
    from fastai.callback.wandb import WandbCallback
    monkeypatch.setattr(fastai.callback.wandb, '_format_config', lambda config: config.clear()) # It fails on numbers under fastcore 2.2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = wandb.init(dir=tmp_path, project='test')
    logged,log = [],run.log
    monkeypatch.setattr(wandb, 'log', lambda d, **kwargs: logged.append(d))
    learn = frozen()
    learn.path = tmp_path
    cbs = [WandbCallback(log_preds=False, log_model=False), TensorBoardCallback(log_dir=tmp_path/'tb', trace_model=False, log_preds=False)]
    quiet(learn, learn.fit_fast, 2, mixed=False, cbs=cbs)
    run.finish()
    accuracies = [v[2] for v in learn.recorder.values]
    assert [d['accuracy'] for d in logged if 'accuracy' in d]==pytest.approx(accuracies)
    events = EventAccumulator(str(tmp_path/'tb')).Reload()
    assert [e.value for e in events.Scalars('accuracy')]==pytest.approx(accuracies)

def test_in_sixteen_bits():
    "Chosen by the user, it stays"
    learn = frozen().to_mixed(torch.bfloat16)
    quiet(learn, learn.fit_fast, 1)
    assert learn.cbs.filter(lambda cb: isinstance(cb, MixedPrecision)) and {p.dtype for p in learn.model.parameters()}=={torch.float32}

def test_with_the_bar_and_the_precision_of_its_choice(capsys):
    "As most will call it"
    learn = frozen()
    learn.fit_fast(0)
    assert 'to_mixed' not in capsys.readouterr().out # The head alone takes no step of the whole network
    learn.fit_fast(1)
    assert 'to_mixed' in capsys.readouterr().out and not learn.cbs.filter(lambda cb: isinstance(cb, (MixedPrecision,ChannelsLast)))

@pytest.mark.parametrize('ex', [RuntimeError,KeyboardInterrupt])
@pytest.mark.parametrize('when', ['features','head','all'])
def test_left_as_found(when, ex, monkeypatch):
    class Boom(Callback):
        order = 100
        def before_batch(self):
            if (when=='all')==self.training: raise ex('boom')
    def broken(*args): raise ex('boom')
    to_mixed = Learner.to_mixed
    monkeypatch.setattr(Learner, 'to_mixed', lambda self: to_mixed(self, torch.bfloat16)) # Without timing
    if when=='head': monkeypatch.setattr(fastai_tricks.models.fit_head, '_trained', broken)
    learn = frozen()
    was,frozen_idx,layers = state(learn.model),learn.opt.frozen_idx,[n for n,_ in learn.model.named_modules()]
    cbs,pipes = sorted(cb.name for cb in learn.cbs),[list(map(id, dl.after_item.fs)) for dl in learn.dls.loaders]
    with pytest.raises(ex), learn.no_logging():
        if when=='all': learn.fit_fast(1, cbs=Boom(), bs=4)
        else:
            with learn.added_cbs(Boom() if when=='features' else []): learn.fit_fast(1)
    assert [n for n,_ in learn.model.named_modules()]==layers and sorted(cb.name for cb in learn.cbs)==cbs
    assert [list(map(id, dl.after_item.fs)) for dl in learn.dls.loaders]==pipes and learn.dls.train_ds.split_idx==0 and learn.dls.train.bs==8
    if when!='all': assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items()) and learn.opt.frozen_idx==frozen_idx

def test_export(tmp_path):
    learn = frozen()
    learn.path = tmp_path
    quiet(learn, learn.fit_fast, 1, mixed=False)
    learn.export('l.pkl')
    dl = learn.dls.test_dl(learn.dls.valid_ds.items)
    with load_learner(tmp_path/'l.pkl').no_bar() as loaded: assert torch.allclose(loaded.get_preds(dl=dl)[0], learn.get_preds(dl=dl)[0], atol=1e-4)

@pytest.mark.parametrize('bad,match', [(dict(lr_max=1e-3),'use `lr`'), (dict(base_lr=1e-3),'use `lr`'), (dict(epoch=3),'did you mean `epochs`?'), (dict(pretraned=True),'did you mean `pretrained`?')])
def test_other_keywords(bad, match):
    learn = frozen()
    for f in (learn.fit_fast,learn.fit_fast_plan):
        with pytest.raises(TypeError, match=f'`fit_fast` takes no `{list(bad)[0]}`: {re.escape(match)}'): f(1, **bad)

@pytest.mark.parametrize('error,bad', [(TypeError,dict(lr_max=1e-3)), (TypeError,dict(epoch=3)), (ValueError,dict(lr=0)), (ValueError,dict(resize=.5))])
def test_wrong_arguments(error, bad):
    "Raised before the head is trained"
    learn = frozen()
    was = state(learn.model)
    for f in (learn.fit_fast,learn.fit_fast_plan):
        with pytest.raises(error): f(1, **bad)
    assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items())

def test_arguments_of_the_fit_go_on():
    learn,seen = plain(),[]
    class Wd(Callback):
        def before_batch(self):
            if self.training: seen.append(self.opt.hypers[0]['wd'])
    quiet(learn, learn.fit_fast, 1, .01, pretrained=True, mixed=False, cbs=Wd, wd=.2)
    assert set(seen)=={.2}

def test_its_own_resize(capsys):
    learn = frozen(loaders(size=64))
    with sizes_seen(learn) as sizes: learn.fit_fast(2, mixed=False, head=0, resize=ft.ProgressiveResize(.5, mult=8))
    assert (True,32,32) in sizes and not learn.cbs.filter(lambda cb: isinstance(cb, ft.ProgressiveResize))
