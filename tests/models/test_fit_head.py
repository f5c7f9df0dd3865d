"`fit_head` with other networks, targets and callbacks, and what it leaves behind"
import pytest, timm, torch
from fastai.callback.core import Callback
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import ShortEpochCallback
from fastai.data.block import MultiCategoryBlock, RegressionBlock
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, R2Score, accuracy, accuracy_multi, mae, rmse
from fastai.vision.augment import aug_transforms
from fastai.vision.learner import vision_learner
from torch import nn
import fastai_tricks.models.fit_head
from fastai_tricks.models.fit_head import kept_features
from fastai_tricks.models.split_head import split_head
from heads import colour, frozen, loaders, plain, quiet, state

def number(i): return float(i%4)

def changed(learn, was): return {k for k,v in learn.model.state_dict().items() if not torch.equal(v, was[k])}

def test_body_runs_once():
    learn,n = frozen(),[]
    was = state(learn.model[0])
    h = learn.model[0].register_forward_hook(lambda m,i,o: n.append((len(i[0]), m.training, torch.is_grad_enabled())))
    quiet(learn, learn.fit_head, 5)
    h.remove()
    assert sum(o[0] for o in n)==32 and {o[1:] for o in n}=={(False,False)}
    assert all(torch.equal(v, was[k]) for k,v in learn.model[0].state_dict().items())

def test_features_are_not_augmented():
    learn = frozen(loaders(batch_tfms=aug_transforms(size=32)))
    split,dls = split_head(learn.model, 4),learn.dls
    with learn.no_bar():
        x,y = kept_features(learn, split)
        expected,targs = learn.get_preds(dl=dls.test_dl(dls.train_ds.items, with_labels=True), act=lambda o: o)
    with torch.no_grad(): assert torch.allclose(split.head.eval()(x), expected, atol=1e-4) and torch.equal(y, targs)

def test_head_learns():
    learn = frozen()
    dl = learn.dls.test_dl(learn.dls.train_ds.items, with_labels=True)
    before = quiet(learn, learn.validate, dl=dl)[0]
    quiet(learn, learn.fit_head, 30, lr=1e-2, bs=8)
    assert quiet(learn, learn.validate, dl=dl)[0] < .7*before

@pytest.mark.parametrize('arch', ['test_resnet','test_convnext','test_vit'])
def test_plain_timm(arch):
    "The classifier alone is trained"
    kw = dict(img_size=32) if 'vit' in arch else {}
    learn = Learner(loaders(), timm.create_model(arch, num_classes=4, **kw), metrics=accuracy)
    was = state(learn.model)
    quiet(learn, learn.fit_head, 1)
    head = list(learn.model.get_classifier().parameters())
    assert changed(learn, was)=={n for n,p in learn.model.named_parameters() if any(p is o for o in head)}

def test_vectors_of_a_transformer():
    "Its body gives one vector per image: all layers of the head are trained"
    learn = frozen(arch='test_vit', img_size=32)
    assert len(split_head(learn.model, 4).head)==len(learn.model[1])
    was = state(learn.model)
    quiet(learn, learn.fit_head, 1)
    assert changed(learn, was)=={k for k in was if k.startswith('1.')}

@pytest.mark.parametrize('case', ['weights','number','range','numbers','labels'])
def test_losses_and_metrics(case):
    "Features meet neither"
    c = CrossEntropyLossFlat(weight=torch.tensor([1.,2,3,4]))
    data,kw = dict(
        weights=({}, dict(loss_func=c, metrics=[accuracy,F1Score(average='macro')])),
        number=(dict(block=RegressionBlock, get_y=number), dict(metrics=rmse)),
        range=(dict(block=RegressionBlock, get_y=number), dict(y_range=(0,99), metrics=R2Score())),
        numbers=(dict(block=RegressionBlock(2), get_y=lambda i: [number(i),1.]), dict(metrics=mae)),
        labels=(dict(block=MultiCategoryBlock, get_y=lambda i: [colour(i)]), dict(metrics=accuracy_multi)))[case]
    learn = frozen(loaders(**data), **kw)
    loss,metrics = learn.loss_func,list(learn.metrics)
    quiet(learn, learn.fit_head, 1)
    assert learn.loss_func is loss and list(learn.metrics)==metrics

def test_metric_of_each_class(capsys):
    "What is no number is said as it is"
    learn = frozen(metrics=F1Score(average=None))
    with learn.no_bar(): learn.fit_head(1)
    assert 'f1_score [' in capsys.readouterr().out

TRACKERS = dict(save=lambda: SaveModelCallback(monitor='accuracy', fname='m'), stop=lambda: EarlyStoppingCallback(monitor='accuracy'),
                plateau=lambda: ReduceLROnPlateau(), short=lambda: ShortEpochCallback(pct=.3, short_valid=True))

@pytest.mark.parametrize('cb', TRACKERS)
def test_trackers(cb, tmp_path, capsys):
    "Added to the Learner, they are not concerned"
    learn = frozen()
    learn.path,learn.model_dir = tmp_path,'.'
    learn.add_cb(TRACKERS[cb]())
    quiet(learn, learn.fit_head, 1)
    assert not list(tmp_path.iterdir()) and 'Better' not in capsys.readouterr().out

def test_same_seed_same_result():
    res = []
    for _ in range(2):
        learn = frozen()
        torch.manual_seed(3)
        quiet(learn, learn.fit_head, 2)
        res.append(state(learn.model[1]))
    assert all(torch.equal(v, res[1][k]) for k,v in res[0].items())

def test_head_without_gradients():
    "It is trained also where it was frozen, and stays so"
    learn = frozen()
    for p in learn.model.parameters(): p.requires_grad_(False)
    was = state(learn.model[1])
    quiet(learn, learn.fit_head, 1)
    assert not torch.equal(was['8.weight'], learn.model[1][8].weight) and not any(p.requires_grad for p in learn.model.parameters())

@pytest.mark.parametrize('behind,loss', [(nn.LogSoftmax(1),nn.NLLLoss()), (nn.BatchNorm1d(4),CrossEntropyLossFlat())], ids=['softmax','norm'])
def test_more_behind_the_head(behind, loss):
    "The head alone would not give what the model gives"
    with pytest.raises(ValueError, match='must be a network whose last layer gives its output'): plain(behind=behind, loss_func=loss).fit_head(1)

@pytest.mark.parametrize('ex', [RuntimeError,KeyboardInterrupt])
@pytest.mark.parametrize('when', ['features','head'])
def test_left_as_found(when, ex, monkeypatch):
    class Boom(Callback):
        order = 100
        def before_batch(self): raise ex('boom')
    def broken(*args): raise ex('boom')
    learn = frozen()
    was,layers,cbs = state(learn.model),[n for n,_ in learn.model.named_modules()],[cb.name for cb in learn.cbs]
    if when=='head': monkeypatch.setattr(fastai_tricks.models.fit_head, '_trained', broken)
    with pytest.raises(ex), learn.no_logging(), learn.added_cbs(Boom() if when=='features' else []): learn.fit_head(1)
    assert not changed(learn, was) and [n for n,_ in learn.model.named_modules()]==layers
    assert sorted(cb.name for cb in learn.cbs)==sorted(cbs) and learn.dls.train_ds.split_idx==0

def trained_on(learn, *args):
    "Targets that the head was trained on, and how many images passed the body"
    targs,n,loss = [],[],CrossEntropyLossFlat()
    def noting(pred, y):
        if torch.is_grad_enabled(): targs.append(y.tolist())
        return loss(pred, y)
    learn.loss_func = noting
    h = learn.model[0].register_forward_hook(lambda m,i,o: n.append(len(i[0])))
    learn.fit_head(*args)
    h.remove()
    return sum(targs, []),sum(n) - len(learn.dls.valid_ds)

def quiet_line(learn, *args):
    with learn.no_bar(): return trained_on(learn, *args)

def test_head_draws_by_the_weights_of_the_loader(capsys):
    wgts = [float(colour(i)=='b') for i in range(32) if i//4%4!=3]
    learn = frozen(loaders(dl_type=WeightedDL, dl_kwargs=({'wgts':wgts},{})))
    targs,n = quiet_line(learn, 3)
    assert targs==[1]*72 and n==24
    assert 'drawn by the weights of the loader' in capsys.readouterr().out

def test_head_draws_a_part_in_each_epoch(capsys):
    def learn(): return frozen(loaders(dl_type=PartialDL, dl_kwargs=({'partial_n':10},{})))
    targs,n = quiet_line(learn(), 2)
    assert len(targs)==20 and n==20 and max(map(targs.count, range(4)))<=10
    assert '20 images once through the body, then 2 epochs of the head on their features, 10 in each epoch' in capsys.readouterr().out
    targs,n = quiet_line(learn(), 5)
    assert len(targs)==50 and n==24
