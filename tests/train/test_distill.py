"Distillation: the loss that is minimised, what the teacher sees, and what is left of it"
import copy
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from fastai.torch_core import set_seed
from fastai.vision.all import F, Flatten, Tensor, nn
import fastai_tricks.all as ft
from fastai_tricks.train.precision import DeviceMixedPrecision
from fastai_tricks.train.distill import soft_loss
from fastai_tricks.core.test_utils import tiny_dls, tiny_learner

class Look(Callback):
    "The parts of the loss of each training batch"
    order,run_valid = ft.Distill.order+1,False # Behind it, before anything scales the loss
    def before_fit(self): self.seen = []
    def after_loss(self): self.seen.append(dict(x=self.xb[0].clone(), y=self.yb[0].clone(), pred=self.pred.detach().clone(), loss=self.learn.loss_grad.item(), shown=self.learn.loss.item()))

def fit(learn, cbs, n=1, lr=1e-3):
    look = Look()
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, cbs=[*cbs, look])
    return look.seen

def plain(x): return x.as_subclass(Tensor)

@pytest.mark.parametrize('alpha,T', [(0.,2.), (.3,1.), (.5,4.), (1.,2.)])
def test_loss_by_hand(alpha, T):
    learn,teacher = tiny_learner(),tiny_learner().model
    seen = fit(learn, [ft.Distill(teacher, alpha=alpha, T=T)])
    assert len(seen)==3
    for o in seen:
        with torch.no_grad(): t = teacher.eval()(plain(o['x']))
        p,q = (t/T).softmax(1),(o['pred']/T).softmax(1)
        kl = (p*(p.log()-q.log())).sum(1).mean()*T*T
        expected = (1-alpha)*F.cross_entropy(o['pred'], plain(o['y'])) + alpha*kl
        assert o['loss']==pytest.approx(expected.item(), rel=1e-4, abs=1e-6) and o['shown']==o['loss']

def test_validation_is_without_the_teacher():
    learn,teacher = tiny_learner(),tiny_learner().model
    fit(learn, [ft.Distill(teacher, alpha=1.)])
    with learn.no_bar(): shown = learn.recorder.values[-1][1]
    preds,y = learn.dls.valid.one_batch()[0],learn.dls.valid.one_batch()[1]
    with torch.no_grad(): assert shown==pytest.approx(F.cross_entropy(learn.model.eval()(plain(preds)), plain(y)).item(), rel=1e-5)

def test_student_becomes_the_teacher():
    "With soft targets alone the student ends near the teacher's logits; features too"
    set_seed(0)
    learn,teacher = tiny_learner(),tiny_learner().model
    teacher[-1].weight.data *= 5
    x = plain(learn.dls.valid.one_batch()[0])
    gap = lambda: (learn.model.eval()(x).softmax(1)-teacher.eval()(x).softmax(1)).abs().mean().item()
    before = gap()
    fit(learn, [ft.Distill(teacher, alpha=1.)], n=10, lr=1e-2)
    assert gap()<.5*before

def test_features_by_hand():
    learn,teacher = tiny_learner(),tiny_learner().model
    for o in (seen := fit(learn, [ft.Distill(teacher, alpha=0., features={'0':'0'}, beta=3.)], lr=0.)):
        model = copy.deepcopy(learn.model).train()
        model[0][1].momentum = 0. # Batch statistics, as in the step
        with torch.no_grad(): a,b = model[0](plain(o['x'])),teacher.eval()[0](plain(o['x']))
        assert o['loss']==pytest.approx((F.cross_entropy(o['pred'], plain(o['y'])) + 3*(a-b).pow(2).sum()/b.pow(2).sum()).item(), rel=1e-3)
    assert seen and not any(m._forward_hooks for o in (learn.model,teacher) for m in o.modules())

def test_several_labels():
    dls = tiny_dls()
    learn = tiny_learner(dls)
    learn.loss_func = BCEWithLogitsLossFlat()
    class Hot(Callback):
        order = -5
        def before_batch(self): self.learn.yb = (F.one_hot(plain(self.yb[0]), 2).float(),)
    teacher = tiny_learner().model
    for o in fit(learn, [ft.Distill(teacher, alpha=1., T=3.), Hot()]):
        with torch.no_grad(): t = (teacher.eval()(plain(o['x']))/3).sigmoid()
        q = (o['pred']/3).sigmoid()
        kl = (t*(t/q).log() + (1-t)*((1-t)/(1-q)).log()).mean()*9
        assert o['loss']==pytest.approx(kl.item(), rel=1e-3, abs=1e-5)

def test_positions_of_a_segmentation():
    a,b = torch.randn(2,5,4,4),torch.randn(2,5,4,4)
    each = [soft_loss(a[...,i,j], b[...,i,j]) for i in range(4) for j in range(4)]
    assert soft_loss(a, b).item()==pytest.approx((sum(each)/16).item(), rel=1e-5)

def test_teacher_stays_as_it_was():
    "Batch norm statistics, modes, gradients, weights"
    learn,teacher = tiny_learner(),tiny_learner().model
    teacher.train()[0].eval()
    was,modes = {k:v.clone() for k,v in teacher.state_dict().items()},[m.training for m in teacher.modules()]
    grads = [p.requires_grad for p in teacher.parameters()]
    fit(learn, [ft.Distill(teacher, features=['0'])], n=2)
    assert all(torch.equal(v, was[k]) for k,v in teacher.state_dict().items())
    assert [m.training for m in teacher.modules()]==modes and [p.requires_grad for p in teacher.parameters()]==grads and all(p.grad is None for p in teacher.parameters())

def test_teacher_sees_mixed_and_small_batches():
    learn,teacher,xs = tiny_learner(tiny_dls(n=64)),tiny_learner().model,[]
    h = teacher.register_forward_pre_hook(lambda m,i: xs.append(i[0].clone()))
    seen = fit(learn, [ft.Distill(teacher), MixUp(), ft.ProgressiveResize(mult=8)], n=2)
    h.remove()
    assert len(seen)==len(xs)-1 and all(torch.equal(plain(a), plain(o['x'])) for a,o in zip(xs[1:], seen))
    assert len({x.shape[-1] for x in xs[1:]})>1

def test_accumulated_gradients_are_those_of_a_large_batch():
    def weights(bs, cbs):
        set_seed(0)
        learn = tiny_learner(tiny_dls(bs=bs, shuffle=False))
        learn.model[0] = nn.Conv2d(3,8,3) # Without batch norm, which sees batches
        torch.manual_seed(1)
        teacher = nn.Sequential(nn.Conv2d(3,8,3), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8,2))
        learn.opt = None
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=[ft.Distill(teacher, alpha=.7), *cbs])
        return torch.cat([p.flatten() for p in learn.model.parameters()])
    assert torch.allclose(weights(24, []), weights(8, [GradientAccumulation(24)]), atol=1e-5)

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
def test_half_precision(dtype):
    "The teacher computes in the precision of the training; one in 16 bits stays so"
    learn,teacher,dtypes = tiny_learner(cbs=DeviceMixedPrecision(dtype)),tiny_learner().model,[]
    h = teacher[0].register_forward_hook(lambda m,i,o: dtypes.append(o.dtype))
    seen = fit(learn, [ft.Distill(teacher)])
    assert set(dtypes)=={dtype} and all(torch.isfinite(torch.tensor(o['loss'])) for o in seen)
    h.remove()
    half = tiny_learner().model.to(torch.bfloat16)
    assert fit(tiny_learner(), [ft.Distill(half)])
    assert {p.dtype for p in half.parameters()}=={torch.bfloat16}

def test_after_conversion(tmp_path):
    learn = tiny_learner()
    learn.model[0] = nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.ReLU(), nn.Conv2d(8,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU())
    learn.path,learn.opt,teacher = tmp_path,None,learn.model
    with learn.no_bar(), learn.no_logging():
        learn.to_depthwise(n=24)
        learn.fine_tune(1, cbs=ft.Distill(teacher, features=['0.2','0']))
        learn.lr_find(num_it=3, show_plot=False)

def test_export_leaves_the_teacher_out(tmp_path):
    learn = tiny_learner(cbs=ft.Distill(nn.Sequential(nn.Conv2d(3,2,3), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(2,300000), nn.Linear(300000,2))))
    learn.path = tmp_path
    learn.export('l.pkl')
    assert (tmp_path/'l.pkl').stat().st_size<1e6 and learn.distill.teacher is not None
    loaded = load_learner(tmp_path/'l.pkl')
    with loaded.no_bar(): loaded.predict(3)
    assert type(loaded.distill) is Callback
    copied = copy.deepcopy(learn.distill)
    assert copied.teacher is learn.distill.teacher

def test_a_crash_in_the_model_leaves_nothing_that_counts(tmp_path):
    "Hooks of layers that were not reached are gone with the next batch, and do not keep the Learner from being exported"
    learn = tiny_learner()
    learn.path = tmp_path
    class Boom(nn.Module):
        on = True
        def forward(self, x):
            if self.on and self.training: raise RuntimeError('boom')
            return x
    learn.model = nn.Sequential(*learn.model[:2], Boom(), *learn.model[2:])
    learn.splitter,learn.opt = lambda m: [list(m.parameters())],None
    teacher = tiny_learner().model
    with pytest.raises(RuntimeError, match='boom'): fit(learn, [ft.Distill(teacher, features={'0':'0','4':'3'})])
    learn.model[2].on = False
    learn.opt = None
    assert fit(learn, [ft.Distill(teacher, features={'0':'0','4':'3'})])
    assert not any(m._forward_hooks for m in learn.model.modules())

@pytest.mark.parametrize('kw,word', [(dict(teacher=3), '`teacher`'), (dict(alpha=1.1), '`alpha`'), (dict(alpha='a'), '`alpha`'), (dict(T=0), '`T`'), (dict(beta=-1), '`beta`')])
def test_bad_input(kw, word):
    with pytest.raises(ValueError, match=word): ft.Distill(**{'teacher':tiny_learner().model, **kw})

@pytest.mark.parametrize('cb,word', [
    (lambda l: ft.Distill(l.model), 'shares layers'), (lambda l: ft.Distill(nn.Sequential(l.model[0], nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8,2))), 'shares layers'),
    (lambda l: ft.Distill(tiny_learner().model, features='7'), '`features`'), (lambda l: ft.Distill(tiny_learner().model, features={'0':'3'}), '`features`'),
    (lambda l: ft.Distill(nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(3,3))), '`teacher` must have the outputs')])
def test_what_does_not_fit_raises_before_the_first_batch(cb, word):
    learn = tiny_learner()
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=word): fit(learn, [cb(learn)])
    assert all(map(torch.equal, before, learn.model.parameters())) and not any(m._forward_hooks for m in learn.model.modules())

def test_regression_has_no_soft_targets():
    learn = tiny_learner()
    learn.loss_func = MSELossFlat()
    with pytest.raises(ValueError, match='loss_func'): fit(learn, [ft.Distill(tiny_learner().model)])

def test_a_learner_may_teach():
    other = tiny_learner()
    assert ft.Distill(other).teacher is other.model

def test_several_labels_by_a_function():
    from torch.nn import functional as F
    learn = tiny_learner()
    cb = ft.Distill(tiny_learner().model)
    for loss,multi in ((F.binary_cross_entropy_with_logits,True), (F.cross_entropy,False)):
        learn.loss_func = loss
        cb.learn = learn
        learn.create_opt()
        cb.before_fit(); cb.before_train()
        assert cb.multi is multi
