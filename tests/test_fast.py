"`fit_head` and `fit_fast` with other networks and callbacks, and what they leave behind"
import pytest, timm, torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, R2Score, accuracy, accuracy_multi, mae, rmse
from fastai.vision.all import (CategoryBlock, DataBlock, DataLoaders, ImageBlock, Learner, MaskBlock, MultiCategoryBlock, PILMask, PointBlock, RandomSplitter, RegressionBlock, Resize, aug_transforms, get_image_files, load_learner, params,
                               parent_label, resnet18, set_seed, unet_learner, vision_learner)
from torch import nn
import fastai_tricks.all as ft
from fastai_tricks.fast import _KeepStatistics, _kept_features, split_head, split_head
from fastai_tricks.test_utils import sizes_seen, tiny_learner

def block(y=CategoryBlock, get_y=parent_label): return DataBlock((ImageBlock, y), get_y=get_y, splitter=RandomSplitter(seed=0), item_tfms=Resize(64), batch_tfms=aug_transforms())

FILES = [f for d in sorted(ft.sample_images().ls())[:5] for f in sorted(get_image_files(d))[:16]]

@pytest.fixture(scope='module')
def dls(): return block().dataloaders(FILES, bs=16, num_workers=0)

def quiet(learn, f, *args, **kw):
    with learn.no_bar(), learn.no_logging(): return f(*args, **kw)

def made(dls, arch='resnet18'):
    "A frozen network, as `vision_learner` makes one of pretrained weights"
    set_seed(0)
    learn = vision_learner(dls, resnet18 if arch=='resnet18' else arch, pretrained=False, metrics=accuracy)
    learn.freeze()
    return learn

def state(model): return {k: v.clone() for k, v in model.state_dict().items()}

def stats(learn): return {n: m.running_mean.clone() for n, m in learn.model[0].named_modules() if isinstance(m, nn.BatchNorm2d)}

class Modes(Callback):
    "Sizes and modes of what the model received in training"
    order = 100
    def __init__(self): self.norm, self.head, self.lrs = set(), set(), []
    def after_pred(self):
        if not self.training: return
        self.norm |= {m.training for m in self.model[0].modules() if isinstance(m, nn.BatchNorm2d)}
        self.head |= {m.training for m in self.model[1].modules() if isinstance(m, nn.BatchNorm1d)}
        self.lrs.append([float(h['lr']) for h in self.opt.hypers])

def test_head_first_then_all(dls, capsys):
    learn, modes = made(dls), Modes()
    learn.add_cb(modes)
    was, mean, opt = state(learn.model), stats(learn), learn.opt
    with learn.no_bar(): learn.fit_fast(1)
    assert modes.norm=={False} and modes.head=={True}
    now = learn.model.state_dict()
    for n, m in stats(learn).items(): assert torch.equal(m, mean[n]), n
    assert all(not torch.equal(was[n], now[n]) for n, p in learn.model.named_parameters()) # All of it is trained
    assert max(r[0] for r in modes.lrs)==pytest.approx(1e-4, rel=.05) and max(r[-1] for r in modes.lrs)==pytest.approx(3e-4, rel=.05)
    out = capsys.readouterr().out
    assert 'fit_fast, pretrained: head first (10 epochs on kept features), 1 epochs of the whole network, rates up to 0.0003, batch norm keeps its statistics, to_mixed' in out
    assert not [cb for cb in learn.cbs if isinstance(cb, (_KeepStatistics, ft.ProgressiveResize))]
    modes.norm.clear()
    quiet(learn, learn.fit, 1)
    assert modes.norm=={True} # Of that fit alone

def test_the_head_alone(dls):
    learn = made(dls)
    was = state(learn.model)
    quiet(learn, learn.fit_fast, 0, mixed=False)
    now = learn.model.state_dict()
    assert all(torch.equal(was[k], now[k]) for k in was if k.startswith('0.'))
    assert not any(torch.equal(was[n], now[n]) for n, p in learn.model.named_parameters() if n.startswith('1.'))

def test_features_are_not_augmented(dls):
    learn = made(dls)
    *at, head = split_head(learn.model, dls.c)
    with learn.no_bar():
        x, y = _kept_features(learn, *at)
        expected, targs = learn.get_preds(dl=dls.test_dl(dls.train_ds.items, with_labels=True), act=lambda o: o)
    with torch.no_grad(): assert torch.allclose(head.eval()(x), expected, atol=1e-4) and torch.equal(y, targs)

def test_from_scratch(dls, capsys):
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    with learn.no_bar(): learn.fit_fast(4, mixed=False)
    out = capsys.readouterr().out
    batches = []
    h = learn.model.register_forward_pre_hook(lambda m, i: batches.append(len(i[0])) if m.training else None)
    with sizes_seen(learn) as seen: learn.fit_fast(4, mixed=False, pretrained=False)
    h.remove()
    assert set(batches)=={8} and dls.train.bs==16
    assert {s[1:] for s in seen if s[0]}=={(32,32),(64,64)} and {s[1:] for s in seen if not s[0]}=={(64,64)}
    assert 'fit_fast, from scratch: 4 epochs of the whole network, rates up to 0.004, small images first' in out and 'head' not in out

def test_body_runs_once(dls):
    learn, n = made(dls), []
    h = learn.model[0].register_forward_hook(lambda m, i, o: n.append((len(i[0]), m.training, torch.is_grad_enabled())))
    quiet(learn, learn.fit_head, 5)
    h.remove()
    assert sum(o[0] for o in n)==len(dls.train_ds)+len(dls.valid_ds) and {o[1:] for o in n}=={(False,False)}

def test_head_learns(dls):
    learn = made(dls)
    dl = dls.test_dl(dls.train_ds.items, with_labels=True)
    before = quiet(learn, learn.validate, dl=dl)[0]
    quiet(learn, learn.fit_head, 20)
    assert quiet(learn, learn.validate, dl=dl)[0] < .7*before

@pytest.mark.parametrize('arch', ['resnet10t','convnext_atto','vit_tiny_patch16_224'])
def test_plain_timm(dls, arch):
    kw = dict(img_size=64) if arch.startswith('vit') else {}
    def split(m):
        head = list(m.get_classifier().parameters())
        return [[p for p in m.parameters() if not any(p is o for o in head)], head]
    learn = Learner(dls, timm.create_model(arch, num_classes=dls.c, **kw), splitter=split, metrics=accuracy)
    learn.freeze()
    body = {k: v for k, v in state(learn.model).items()}
    quiet(learn, learn.fit_head, 1)
    changed = {k for k, v in learn.model.state_dict().items() if not torch.equal(v, body[k])}
    names = {n for n, p in learn.model.named_parameters() if any(p is o for o in learn.model.get_classifier().parameters())}
    assert changed==names
    quiet(learn, learn.fit_fast, 1)
    assert len(learn.get_preds()[0])==len(dls.valid_ds)

def test_several_labels():
    data = block(MultiCategoryBlock, lambda o: [parent_label(o)]).dataloaders(FILES[::2], bs=8, num_workers=0)
    learn = vision_learner(data, resnet18, pretrained=False)
    learn.freeze()
    quiet(learn, learn.fit_fast, 1)

def test_masks_are_refused():
    from fastai.vision.all import MaskBlock, PILMask
    import numpy as np
    data = DataBlock((ImageBlock, MaskBlock(['a','b'])), get_y=lambda o: PILMask.create(np.zeros((64,64), dtype=np.uint8)), item_tfms=Resize(64)).dataloaders(FILES[:16], bs=4, num_workers=0)
    learn = Learner(data, nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with pytest.raises(ValueError, match='`learn.dls` must be loaders with one target an image'): learn.fit_head(1)

@pytest.mark.parametrize('workers', [0, 2])
def test_workers(workers):
    data = block().dataloaders(FILES[::2], bs=8, num_workers=workers)
    learn = made(data)
    quiet(learn, learn.fit_fast, 1, mixed=False)

@pytest.mark.parametrize('cb', [lambda: MixUp(), lambda: GradientAccumulation(32), lambda: ft.ProgressiveResize(mult=16), lambda: ft.WatchCAM(n=2)], ids=['mixup','accumulation','resize','cam'])
def test_with_others(dls, cb):
    learn = made(dls)
    loss = learn.loss_func
    quiet(learn, learn.fit_fast, 1, mixed=False, cbs=[cb()])
    assert len(learn.get_preds()[0])==len(dls.valid_ds) and learn.loss_func is loss
    assert len(learn.tta(n=1)[0])==len(dls.valid_ds)

def test_in_sixteen_bits(dls):
    learn = made(dls).to_mixed(torch.bfloat16)
    with learn.no_bar(), learn.no_logging():
        learn.fit_fast(1)
    assert [cb for cb in learn.cbs if isinstance(cb, ft.DeviceMixedPrecision)] # Chosen by the user, it stays
    assert {p.dtype for p in learn.model.parameters()}=={torch.float32}

@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('when', ['features', 'head', 'all'])
def test_left_as_found(dls, when, ex, monkeypatch):
    class Boom(Callback):
        order = 100
        def before_batch(self):
            if (when=='all')==self.training: raise ex('boom')
    learn = made(dls)
    was, frozen, layers = state(learn.model), learn.opt.frozen_idx, [n for n, _ in learn.model.named_modules()]
    cbs, pipes = [cb.name for cb in learn.cbs], [list(map(id, dl.after_item.fs)) for dl in dls.loaders]
    if when=='head':
        import fastai_tricks.fast as fast
        def broken(*args): raise ex('boom')
        monkeypatch.setattr(fast, '_train_head', broken)
    boom = Boom()
    with pytest.raises(ex), learn.no_bar(), learn.no_logging():
        if when=='all': learn.fit_fast(1, cbs=boom)
        else:
            with learn.added_cbs(boom if when=='features' else []): learn.fit_fast(1)
    assert [n for n, _ in learn.model.named_modules()]==layers
    assert sorted(cb.name for cb in learn.cbs if cb.name!='progress')==sorted(n for n in cbs if n!='progress')
    assert [list(map(id, dl.after_item.fs)) for dl in dls.loaders]==pipes and dls.train_ds.split_idx==0
    if when!='all':
        assert all(torch.equal(v, was[k]) for k, v in learn.model.state_dict().items()) and learn.opt.frozen_idx==frozen

def test_export(dls, tmp_path):
    learn = made(dls)
    learn.path = tmp_path
    quiet(learn, learn.fit_fast, 1)
    learn.export('l.pkl')
    dl = dls.test_dl(dls.valid_ds.items)
    with load_learner(tmp_path/'l.pkl').no_bar() as loaded: assert torch.allclose(loaded.get_preds(dl=dl)[0], learn.get_preds(dl=dl)[0], atol=1e-4)

def test_same_seed_same_result(dls):
    res = []
    for _ in range(2):
        learn = made(dls)
        set_seed(3, reproducible=True)
        quiet(learn, learn.fit_head, 2)
        res.append(state(learn.model[1]))
    assert all(torch.equal(v, res[1][k]) for k, v in res[0].items())

def test_no_head_to_be_found(dls, capsys):
    "Chosen by default it is left out with the reason; asked for it is an error"
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.body, self.out = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU()), nn.Conv2d(8, dls.c, 3)
        def forward(self, x): return self.out(self.body(x)).mean((2,3))
    def learner():
        learn = Learner(dls, Odd(), splitter=lambda m: [params(m.body), params(m.out)])
        learn.freeze()
        return learn
    learn = learner()
    with learn.no_bar(): learn.fit_fast(1, mixed=False)
    assert 'no head first: `learn.model` must end in a linear layer' in capsys.readouterr().out
    with pytest.raises(ValueError, match='must end in a linear layer'): learner().fit_fast(1, head=3)

@pytest.mark.parametrize('bad', [dict(epochs=-1), dict(epochs=1.5), dict(lr=0), dict(head=-1), dict(head='yes'), dict(keep_bn=2), dict(pretrained=2), dict(bs=0), dict(resize=.5), dict(mixed='fp16')])
def test_bad_input(dls, bad):
    learn = made(dls)
    was = state(learn.model)
    with pytest.raises(ValueError, match=f'`{list(bad)[0]}` must be'): learn.fit_fast(**{'epochs': 1, **bad})
    assert all(torch.equal(v, was[k]) for k, v in learn.model.state_dict().items())

def test_second_fit_goes_on(dls, capsys):
    "Weights that have been trained are not taken for random ones"
    learn, modes = made(dls), Modes()
    quiet(learn, learn.fit_fast, 1, mixed=False)
    learn.add_cb(modes)
    with learn.no_bar(): learn.fit_fast(1, mixed=False)
    out = capsys.readouterr().out
    assert 'fit_fast, pretrained: 1 epochs' in out and 'fit_head' not in out and 'small' not in out
    assert modes.norm=={False} and max(r[-1] for r in modes.lrs)<=3e-4

def test_what_has_learned(dls):
    from fastai_tricks.fast import has_learned
    new = Learner(dls, timm.create_model('resnet10t', num_classes=dls.c))
    assert not has_learned(new)
    with new.no_bar(): new.fit(1)
    assert has_learned(new)
    trained = Learner(dls, timm.create_model('tf_efficientnet_lite0', num_classes=dls.c, pretrained=True, pretrained_cfg_overlay=dict(file=str(ft.lite0_weights()))))
    assert has_learned(trained)
    vit = Learner(dls, timm.create_model('vit_tiny_patch16_224', num_classes=dls.c, img_size=64))
    assert has_learned(vit) is None
    with pytest.raises(ValueError, match='`pretrained` must be True or False'): vit.fit_fast(1)

def test_learning_rate_finder_is_no_training(dls, tmp_path, capsys):
    learn = vision_learner(dls, 'resnet10t', pretrained=False)
    learn.path = tmp_path
    quiet(learn, learn.lr_find, num_it=3, show_plot=False, suggest_funcs=None)
    with learn.no_bar(): learn.fit_fast(1, mixed=False)
    assert 'fit_fast, from scratch' in capsys.readouterr().out

def test_nothing_to_do():
    with pytest.raises(ValueError, match='`epochs` must be'): tiny_learner().fit_fast(0)

def few(y=CategoryBlock, get_y=parent_label, bs=8): return block(y, get_y).dataloaders(FILES[::3], bs=bs, num_workers=0)

def head_and_body(m): return [params(m.body), params(m.fc)]

class Plain(nn.Module):
    "A body, a linear layer, and what comes behind it"
    def __init__(self, c, behind):
        super().__init__()
        self.body, self.fc, self.behind = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, c), behind
    def forward(self, x): return self.behind(self.fc(self.body(x)))

def frozen(data, model, **kw):
    learn = Learner(data, model, splitter=head_and_body, **kw)
    learn.freeze()
    return learn

def test_with_the_bar(dls):
    "As most will call it: with progress bars and the log"
    made(few()).fit_fast(1, mixed=False)

@pytest.mark.parametrize('case', ['weights','number','range','numbers','labels'])
def test_losses_and_metrics(case):
    "Features meet neither"
    c = CrossEntropyLossFlat(weight=torch.tensor([1.,2,3,4]))
    y, get_y, kw = dict(weights=(CategoryBlock, parent_label, dict(loss_func=c, metrics=[accuracy, F1Score(average='macro')])), number=(RegressionBlock, size_of, dict(metrics=rmse)),
        range=(RegressionBlock, size_of, dict(y_range=(0,99), metrics=R2Score())), numbers=(RegressionBlock(2), lambda o: [size_of(o), 1.], dict(metrics=mae)),
        labels=(MultiCategoryBlock, lambda o: [parent_label(o)], dict(metrics=accuracy_multi)))[case]
    learn = vision_learner(few(y, get_y), resnet18, pretrained=False, **kw)
    learn.freeze()
    loss, metrics = learn.loss_func, list(learn.metrics)
    quiet(learn, learn.fit_fast, 1, mixed=False)
    assert learn.loss_func is loss and list(learn.metrics)==metrics

def size_of(o): return float(len(o.name))

def test_metric_of_each_class(capsys):
    "What is no number is said as it is"
    learn = made(few())
    learn.metrics = F1Score(average=None)
    with learn.no_bar(): learn.fit_head(1)
    assert 'f1_score [' in capsys.readouterr().out

@pytest.mark.parametrize('cb', [lambda: SaveModelCallback(monitor='accuracy', fname='m'), lambda: EarlyStoppingCallback(monitor='accuracy'), lambda: ReduceLROnPlateau(), lambda: ShortEpochCallback(pct=.3, short_valid=True)],
                         ids=['save','stop','plateau','short'])
def test_trackers(cb, tmp_path, capsys):
    "Added to the Learner, they follow the fit of the whole network alone"
    learn = made(few())
    learn.path, learn.model_dir = tmp_path, '.'
    learn.add_cb(cb())
    quiet(learn, learn.fit_head, 1)
    assert not list(tmp_path.iterdir()) and 'Better' not in capsys.readouterr().out
    quiet(learn, learn.fit_fast, 1, mixed=False)
    assert len(list(tmp_path.iterdir()))==bool(learn.cbs.filter(lambda o: isinstance(o, SaveModelCallback)))

@pytest.mark.parametrize('behind,loss', [(nn.LogSoftmax(1), nn.NLLLoss()), (nn.BatchNorm1d(4), CrossEntropyLossFlat())], ids=['softmax','norm'])
def test_more_behind_the_head(behind, loss, capsys):
    "The head alone would not give what the model gives"
    with pytest.raises(ValueError, match='must be a network whose last layer gives its output'): frozen(few(), Plain(4, behind), loss_func=loss).fit_head(1)
    learn = frozen(few(), Plain(4, behind), loss_func=loss)
    with learn.no_bar(): learn.fit_fast(1, mixed=False)
    assert 'no head first: `learn.model` must be a network whose last layer' in capsys.readouterr().out
    with pytest.raises(ValueError, match='must be a network whose last layer'): frozen(few(), Plain(4, behind), loss_func=loss).fit_fast(0)

def test_vectors_of_a_transformer():
    "Its body gives one vector an image: all layers of the head are trained"
    learn = vision_learner(few(), 'vit_tiny_patch16_224', pretrained=False, img_size=64)
    assert len(split_head(learn.model, 4)[3])==len(learn.model[1])
    learn.freeze()
    was = state(learn.model[1])
    quiet(learn, learn.fit_head, 1)
    assert not any(torch.equal(v, was[k]) for k, v in learn.model[1].state_dict().items())

@pytest.mark.parametrize('kind', ['masks','points','pytorch'])
def test_no_vector_no_head(kind, capsys):
    "Chosen by default, the head first is left out with the reason"
    if kind=='masks':
        import numpy as np
        data = DataBlock((ImageBlock, MaskBlock(['a','b'])), get_y=lambda o: PILMask.create(np.zeros((64,64), dtype=np.uint8)), item_tfms=Resize(64)).dataloaders(FILES[:16], bs=4, num_workers=0)
        learn = unet_learner(data, resnet18, pretrained=False)
    elif kind=='points': learn = vision_learner(few(PointBlock, lambda o: [[1.,2.],[3.,4.]]), resnet18, pretrained=False)
    else:
        dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.randint(0, 4, (8,))), batch_size=4)
        data = DataLoaders(dl, dl)
        data.c = 4
        learn = Learner(data, Plain(4, nn.Identity()), loss_func=CrossEntropyLossFlat(), splitter=head_and_body)
    learn.freeze()
    with learn.no_bar(): learn.fit_fast(1, mixed=False)
    assert 'no head first: `learn.dls` must be loaders' in capsys.readouterr().out
    with pytest.raises(ValueError, match='`learn.dls` must be loaders'): learn.fit_head(1)

def test_twice(capsys):
    "A network that was pretrained is not trained as from scratch the second time"
    learn = frozen(few(), Plain(4, nn.Identity()))
    for _ in range(2):
        with learn.no_bar(): learn.fit_fast(1, mixed=False)
    lines = [o for o in capsys.readouterr().out.splitlines() if o.startswith('fit_fast')]
    assert lines[1]=='fit_fast, pretrained: 1 epochs of the whole network, rates up to 0.0003' # There is no batch norm
    learn = made(few())
    learn.pretrained = True # As `vision_learner` notes it
    quiet(learn, learn.fine_tune, 1)
    modes = Modes()
    with learn.no_bar(): learn.fit_fast(1, mixed=False, cbs=modes)
    assert 'fit_fast, pretrained: 1 epochs of the whole network, rates up to 0.0003, batch norm keeps its statistics\n' in capsys.readouterr().out
    assert modes.norm=={False} and modes.head=={True}

@pytest.mark.parametrize('bad', [dict(lr_max=1e-3), dict(epoch=3)])
def test_unknown_arguments(dls, bad):
    "Before the head is trained"
    learn = made(dls)
    was = state(learn.model)
    with pytest.raises(TypeError): quiet(learn, learn.fit_fast, 1, mixed=False, **bad)
    assert all(torch.equal(v, was[k]) for k, v in learn.model.state_dict().items())

def test_callbacks_as_classes(capsys):
    "A precision or a `ProgressiveResize` among `cbs` counts, as a class too, as fastai takes them"
    learn = vision_learner(few(), resnet18, pretrained=False)
    with learn.no_bar(): learn.fit_fast(1, cbs=[ft.ProgressiveResize, ft.ChannelsLastBatch])
    out = capsys.readouterr().out
    assert 'small images first' not in out and 'to_mixed' not in out and 'ProgressiveResize: 32 px until 75%' in out

def test_head_without_gradients():
    "`fit_head` trains it wherever it was frozen, and leaves it so"
    learn = made(few())
    for p in learn.model.parameters(): p.requires_grad_(False)
    was = state(learn.model[1])
    quiet(learn, learn.fit_head, 1)
    assert not torch.equal(was['8.weight'], learn.model[1][8].weight) and not any(p.requires_grad for p in learn.model.parameters())
