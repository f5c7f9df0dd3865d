"Schedules against their formulas, timm's and PyTorch's; zero γ over families of networks"
from functools import partial
import numpy as np
import pytest, timm, torch, torchvision
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler, SchedLin
from fastai.callback.training import GradientAccumulation
from fastai.layers import ResBlock
from fastai.learner import Learner, load_learner
from fastai.optimizer import OptimWrapper
from fastai.vision.models.xresnet import XResNet, xresnet18, xse_resnext18
from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import LinearLR, OneCycleLR, SequentialLR
import fastai_tricks.all as ft
from fastai_tricks.train.schedule import chain_scheds, schedule_table, warmup_iters, warmup_one_cycle
from fastai_tricks.core.test_utils import tiny_learner, sizes_seen

N_ITER = 3 # Batches an epoch of `tiny_learner`

class Rates(Callback):
    "What the optimiser was given at each step, over all fits"
    order, run_valid = 100, False
    def __init__(self): self.lrs, self.moms, self.epochs = [], [], []
    def before_step(self):
        self.lrs.append([h['lr'] for h in self.opt.hypers])
        self.moms.append(self.opt.hypers[-1].get('mom'))
        self.epochs.append(self.epoch)

def rates(fit, *args, **kwargs):
    learn = tiny_learner(cbs=Rates())
    with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(*args, **kwargs)
    return learn.rates

def sgd(lr): return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)

def torch_rates(sched, n):
    res = []
    for _ in range(n):
        res.append(sched.optimizer.param_groups[0]['lr'])
        sched.optimizer.step(); sched.step()
    return res

@pytest.mark.parametrize('n_epoch,warmup', [(4,1), (5,2), (4,.25), (3,'4it'), (4,0)])
def test_warmup_cos_is_timms(n_epoch, warmup):
    m, n = warmup_iters(warmup, n_epoch, N_ITER), n_epoch*N_ITER
    # timm starts at `warmup_lr_init` and reaches the full rate at update m: so i·η/m, i=1…m, is its update i
    opt = sgd(.4)
    sched = CosineLRScheduler(opt, t_initial=n-m, warmup_t=m, warmup_lr_init=0., warmup_prefix=True, t_in_epochs=False)
    expected = []
    for k in range(n):
        sched.step_update(k+1 if k<m else k)
        expected.append(opt.param_groups[0]['lr'])
    assert [o[-1] for o in rates('fit_warmup_cos', n_epoch, .4, warmup).lrs]==pytest.approx(expected, rel=1e-9, abs=1e-15)

@pytest.mark.parametrize('n_epoch,warmup', [(4,1), (5,2), (4,.25), (3,'4it')])
def test_warmup_cos_is_torchs(n_epoch, warmup):
    m, n = warmup_iters(warmup, n_epoch, N_ITER), n_epoch*N_ITER
    opt = sgd(.4)
    sched = SequentialLR(opt, [LinearLR(opt, 1/m, 1., total_iters=m-1), torch.optim.lr_scheduler.CosineAnnealingLR(opt, n-m)], [m])
    assert [o[-1] for o in rates('fit_warmup_cos', n_epoch, .4, warmup).lrs]==pytest.approx(torch_rates(sched, n), rel=1e-9, abs=1e-15)

@pytest.mark.parametrize('warmup_start', [.1,.5])
def test_the_warmup_of_the_one_cycle_is_torchs(warmup_start):
    opt = sgd(.4/25)
    expected = torch_rates(LinearLR(opt, warmup_start, 1., total_iters=2*N_ITER), 2*N_ITER)
    got = rates('fit_warmup_one_cycle', 5, .4, 2, warmup_start).lrs
    assert [o[-1] for o in got[:2*N_ITER]]==pytest.approx(expected, rel=1e-9)

def test_the_one_cycle_after_it_is_torchs():
    # PyTorch's reaches its last rate in its last batch, fastai's would one batch later
    n, start = 4*N_ITER, .25
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=.1, momentum=.9)
    sched = OneCycleLR(opt, .4, total_steps=n+1, pct_start=(start*n+1)/(n+1), div_factor=25, final_div_factor=4000, base_momentum=.85, max_momentum=.95)
    expected = [(opt.param_groups[0]['lr'], opt.param_groups[0]['momentum'])]
    for _ in range(n-1):
        opt.step(); sched.step()
        expected.append((opt.param_groups[0]['lr'], opt.param_groups[0]['momentum']))
    r = rates('fit_warmup_one_cycle', 5, .4, 1, pct_start=start)
    assert [o[-1] for o in r.lrs[N_ITER:]]==pytest.approx([e[0] for e in expected], rel=1e-9)
    assert r.moms[N_ITER:]==pytest.approx([e[1] for e in expected], rel=1e-9)
    assert r.moms[:N_ITER]==[.95]*N_ITER

def test_without_warmup_it_is_fastais():
    a, b = rates('fit_warmup_one_cycle', 3, slice(1e-3,1e-2), warmup=0, moms=(.9,.8,.9)), rates('fit_one_cycle', 3, slice(1e-3,1e-2), moms=(.9,.8,.9))
    assert [x for o in a.lrs for x in o]==pytest.approx([float(x) for o in b.lrs for x in o], rel=1e-6)
    assert a.moms==pytest.approx(b.moms, rel=1e-6)
    a, b = rates('fine_tune_warmup', 3, warmup=0), rates('fine_tune', 3)
    assert [x for o in a.lrs for x in o]==pytest.approx([float(x) for o in b.lrs for x in o], rel=1e-6)
    assert a.moms==pytest.approx(b.moms, rel=1e-6)

def test_fine_tune_warms_up_in_each_part():
    r = rates('fine_tune_warmup', 4, 1e-2, freeze_epochs=2, warmup='2it', lr_mult=10)
    frozen, rest = r.lrs[:2*N_ITER], r.lrs[2*N_ITER:]
    a, b = warmup_one_cycle(2/6, 1e-2, pct_start=.99), warmup_one_cycle(2/12, 5e-3, pct_start=.3, div=5.)
    assert [o[-1] for o in frozen]==pytest.approx([a['lr'](i/6) for i in range(6)], rel=1e-9)
    assert [o[-1] for o in rest]==pytest.approx([b['lr'](i/12) for i in range(12)], rel=1e-9)
    assert [o[0] for o in rest]==pytest.approx([b['lr'](i/12)/10 for i in range(12)], rel=1e-9)
    assert rest[0][-1]==0 and rest[2][-1]==pytest.approx(1e-3)

@pytest.mark.parametrize('fit,kw', [('fit_warmup_one_cycle',dict(n_epoch=4, warmup=1)), ('fit_warmup_cos',dict(n_epoch=4, warmup=1)),
                                    ('fine_tune_warmup',dict(epochs=3, freeze_epochs=2, warmup='1it'))])
def test_start_epoch_goes_on(fit, kw):
    whole = rates(fit, **kw)
    for s in range(1, len(whole.lrs)//N_ITER):
        rest = rates(fit, start_epoch=s, **kw)
        assert len(rest.lrs)==len(whole.lrs)-s*N_ITER
        assert [x for o in rest.lrs for x in o]==pytest.approx([x for o in whole.lrs[s*N_ITER:] for x in o], rel=1e-9, abs=1e-15)
        assert rest.epochs==whole.epochs[s*N_ITER:]
        assert rest.moms==pytest.approx(whole.moms[s*N_ITER:], rel=1e-9)

def test_any_split_lasts_to_the_end():
    "fastai's `combine_scheds` refuses some of these: their lengths don't sum to 1 in floating point"
    refused = 0
    for n in range(3, 60):
        for m in range(1, n-1):
            ends = [m/n, m/n+.3*(n-m)/n]
            refused += sum([m/n, .3*(n-m)/n, .7*(n-m)/n])!=1.
            f = chain_scheds(ends, [lambda p: ('warm',p), lambda p: ('up',p), lambda p: ('down',p)])
            assert f(0.)==('warm',0.) and f(1.)==('down',1.)
            assert f(sum([1/n]*m))[0]=='up' # Progress as fastai adds it up
    assert refused>10

@pytest.mark.parametrize('fit', ['fit_warmup_one_cycle','fit_warmup_cos'])
@pytest.mark.parametrize('warmup', [4, 5, 1., 1.5, -1, -.1, '12it', '5', 'it', None, True, float('nan')])
def test_impossible_warmup(fit, warmup):
    learn = tiny_learner(cbs=Rates())
    with pytest.raises(ValueError, match='`warmup` must be'): getattr(learn, fit)(4, 1e-2, warmup)
    with pytest.raises(ValueError, match='`warmup` must be'): learn.fine_tune_warmup(4, warmup=warmup)
    assert not learn.rates.lrs

def test_one_frozen_epoch_cannot_be_all_warmup():
    learn = tiny_learner(cbs=Rates())
    with pytest.raises(ValueError, match=r'shorter than the frozen part \(1 × 3 batches\)'): learn.fine_tune_warmup(4, warmup=1)
    assert not learn.rates.lrs and all(p.requires_grad for p in learn.model.parameters())

def test_with_accumulation_torch_optimisers_and_growing_batches():
    learn = tiny_learner(cbs=[Rates(), GradientAccumulation(16)])
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(4, .1)
    learn = tiny_learner(cbs=Rates())
    learn.opt_func = lambda params, **kw: OptimWrapper(params, torch.optim.SGD, momentum=.9, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(4, .1)
    assert learn.rates.lrs[2][-1]==pytest.approx(.1)
    # Batches twice as large at half the size: an epoch then has fewer of them, and warm-up still ends with the first epoch
    learn = tiny_learner(cbs=[Rates(), ft.ProgressiveResize(32, mult=8, until=.5, hold=1, scale_bs=True, scale_lr=None)], n=56)
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(4, .1, warmup=1)
    n = learn.rates.epochs.count(0)
    assert n<learn.rates.epochs.count(3)
    assert [o[-1] for o in learn.rates.lrs[:n]]==pytest.approx([.1*(i+1)/n for i in range(n)])
    assert learn.rates.lrs[n][-1]==pytest.approx(.1)

def test_progressive_resize_sees_fine_tuning():
    learn = tiny_learner(cbs=ft.ProgressiveResize(mult=8))
    with sizes_seen(learn) as a: learn.fine_tune(3)
    learn = tiny_learner(cbs=ft.ProgressiveResize(mult=8))
    with sizes_seen(learn) as b: learn.fine_tune_warmup(3)
    assert a==b and (True,48,48) in a

def test_looking_at_a_schedule_changes_nothing():
    learn = tiny_learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    def snap(): return [(k, v.clone() if isinstance(v, torch.Tensor) else v) for p,_,s,h in learn.opt.all_params() for k,v in {**s,**h}.items()]
    opt, was, rg = learn.opt, snap(), [p.requires_grad for p in learn.model.parameters()]
    for fit,args in [('fine_tune',(2,)), ('fine_tune_warmup',(2,)), ('fit_warmup_cos',(3,)), ('fit',(1,))]:
        schedule_table(getattr(learn, fit), *args)
        with pytest.raises(ValueError): schedule_table(learn.fit_warmup_cos, 3, warmup=-1)
        assert learn.opt is opt and 'fit' not in vars(learn) and opt.frozen_idx==1
        assert [p.requires_grad for p in learn.model.parameters()]==rg
        assert all(a[0]==b[0] and (torch.equal(a[1], b[1]) if isinstance(a[1], torch.Tensor) else a[1]==b[1]) for a,b in zip(was, snap())) and len(snap())==len(was)
    with pytest.raises(ValueError, match='without calling it'): schedule_table(None)
    assert len(schedule_table(partial(learn.fit_warmup_cos, 3, warmup=0), .1))==3*N_ITER
    for fit in (print, learn.validate, learn.lr_find, learn.fit_stages, learn.fit_fast, learn.fit_head):
        with pytest.raises(ValueError, match='`fit` must be'): schedule_table(fit)

def trained_as_shown(learn, fit, *args, **kwargs):
    df = schedule_table(getattr(learn, fit), *args, **kwargs)
    learn.add_cb(Rates())
    with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(*args, **kwargs)
    r = learn.rates
    learn.remove_cb(Rates)
    assert list(df['lr'])==pytest.approx([float(o[-1]) for o in r.lrs], rel=1e-6)
    if r.moms[0] is not None: assert list(df['mom'])==pytest.approx(r.moms, rel=1e-6)

def test_a_schedule_is_trained_as_shown():
    learn = tiny_learner()
    trained_as_shown(learn, 'fit_one_cycle', 2, 1e-2)
    trained_as_shown(learn, 'fit', 1) # At `Learner.lr`, not at the last rate
    trained_as_shown(learn, 'fit', 1, reset_opt=True)
    trained_as_shown(learn, 'fit_warmup_cos', 2, cbs=ParamScheduler({'mom':SchedLin(.95,.5)}))
    learn = tiny_learner()
    learn.opt_func = OptimWrapper(opt=torch.optim.SGD(learn.model.parameters(), lr=.1, momentum=.9))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    n, opt, lr = len(learn.opt.state), learn.opt, learn.opt.hypers[0]['lr']
    schedule_table(learn.fit_one_cycle, 1, .7)
    assert n==len(learn.opt.state)>0 and learn.opt is opt and learn.opt.hypers[0]['lr']==lr
    trained_as_shown(learn, 'fit_warmup_one_cycle', 2, 1e-2)
    class My(Learner):
        def fit(self, *a, **kw): return super().fit(*a, **kw)
    base = tiny_learner()
    learn = My(base.dls, base.model, loss_func=base.loss_func)
    w = [p.clone() for p in learn.model.parameters()]
    assert len(schedule_table(learn.fit, 1, .1))==N_ITER and all(map(torch.equal, w, learn.model.parameters()))
    assert len(schedule_table(learn.fit_one_cycle, 2, start_epoch=2))==0

@pytest.mark.parametrize('fit', ['fit_warmup_one_cycle','fine_tune_warmup'])
def test_a_rate_under_another_name_is_not_dropped(fit):
    learn = tiny_learner(cbs=Rates())
    with pytest.raises(TypeError, match="multiple values for argument 'lr'"): getattr(learn, fit)(2, lr=1e-3)
    assert not learn.rates.lrs

def test_an_optimiser_without_momentum():
    learn = tiny_learner(cbs=Rates())
    learn.opt_func = partial(OptimWrapper, opt=torch.optim.Adagrad)
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_one_cycle(2, 1e-2)
    assert learn.rates.lrs[N_ITER][-1]==pytest.approx(1e-2/25) and learn.rates.moms[0] is None

@pytest.mark.parametrize('lr', [-1, 0, float('nan'), 'a', slice(None), [1e-3,1e-2,1e-1], slice(-1,1)])
def test_bad_rates(lr):
    learn = tiny_learner(cbs=Rates())
    for fit in (learn.fit_warmup_one_cycle, learn.fit_warmup_cos):
        with pytest.raises(ValueError, match='`lr` must be'): fit(2, lr)
    with pytest.raises(ValueError, match='`base_lr` must be'): learn.fine_tune_warmup(2, lr)
    assert not learn.rates.lrs

def test_rates_of_other_types():
    for lr in (torch.tensor(.1), np.float32(.1), np.float64(.1)): assert rates('fit_warmup_cos', 2, lr).lrs[N_ITER-1][-1]==pytest.approx(.1)
    assert rates('fit_warmup_cos', 2, [.1,.2]).lrs[N_ITER-1]==pytest.approx([.1,.2])
    assert rates('fit_warmup_cos', np.int64(2), .1, warmup=np.float64(.5)).lrs[N_ITER-1][-1]==pytest.approx(.1)

@pytest.mark.parametrize('kw', [dict(pct_start=1.5), dict(div=0), dict(div_final=-1), dict(warmup_start=2), dict(moms=.9), dict(moms=(.9,.8)), dict(lr_mult=0), dict(freeze_epochs=-1)])
def test_fine_tune_refuses_before_the_first_part(kw):
    learn = tiny_learner(cbs=Rates())
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be'): learn.fine_tune_warmup(2, **kw)
    assert not learn.rates.lrs and all(p.requires_grad for p in learn.model.parameters())

def test_fine_tune_goes_on_with_the_optimisers_state(tmp_path):
    class Stop(Callback):
        order = 101
        def __init__(self, n): self.n = n
        def after_epoch(self):
            self.n -= 1
            if not self.n: raise KeyboardInterrupt
    def fresh(cbs=None):
        torch.manual_seed(0)
        learn = tiny_learner(cbs=cbs)
        for dl in learn.dls.loaders: dl.shuffle = False
        learn.path = tmp_path
        return learn
    kw = dict(freeze_epochs=2, warmup='1it')
    whole = fresh()
    with whole.no_bar(), whole.no_logging(): whole.fine_tune_warmup(3, **kw)
    for n in (1,2,3,4):
        learn = fresh(Stop(n))
        with learn.no_bar(), learn.no_logging():
            with pytest.raises(KeyboardInterrupt): learn.fine_tune_warmup(3, **kw)
            learn.save('at')
            learn = fresh()
            learn.create_opt()
            learn.load('at', with_opt=True)
            learn.fine_tune_warmup(3, start_epoch=n, **kw)
        for a,b in zip(whole.model.parameters(), learn.model.parameters()): assert torch.allclose(a, b, atol=1e-7), n

def test_export_after_a_warm_up(tmp_path):
    learn = tiny_learner()
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_one_cycle(2)
        learn.fit_warmup_cos(2)
        learn.fine_tune_warmup(2)
        learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
        expected = learn.predict(3)[2]
        learn.export('l.pkl')
        loaded = load_learner(tmp_path/'l.pkl')
        with loaded.no_bar(): assert torch.allclose(loaded.predict(3)[2], expected)

# Model, its residual blocks, and what is not part of their branch
def torchvision_model(name): return getattr(torchvision.models, name)(weights=None, num_classes=10)
def torchvision_bottlenecks(): return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2,1,1,1], num_classes=10)
MODELS = {
    **{f'torchvision {n}': (lambda n=n: torchvision_model(n), k) for n,k in
       dict(resnet18=8, regnet_y_400mf=16, regnet_x_400mf=22, mobilenet_v2=10, mobilenet_v3_small=6, efficientnet_b0=9).items()},
    'torchvision bottlenecks': (torchvision_bottlenecks, 5),
    **{f'timm {n}': (lambda n=n: timm.create_model(n, num_classes=10), k) for n,k in
       dict(resnet10t=4, resnet18=8, resnet26=8, seresnext26d_32x4d=8, ecaresnet26t=8, skresnet18=8, res2net50_26w_4s=16, resnest26d=8, resnetv2_50=16,
            regnety_002=13, tf_efficientnet_lite0=9, mobilenetv3_small_100=6, efficientnetv2_rw_t=34, mobilenetv4_conv_small=10).items()},
    'fastai xresnet18': (lambda: xresnet18(n_out=10), 8), 'fastai xse_resnext18': (lambda: xse_resnext18(n_out=10), 8),
    'fastai bottlenecks': (lambda: XResNet(ResBlock, 4, [2,1,1,1], n_out=10), 5)}

@pytest.mark.parametrize('name', MODELS)
def test_zero_gamma_makes_blocks_the_identity(name, capsys):
    torch.manual_seed(0)
    make, n = MODELS[name]
    model = make().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=.1) # Nothing is zero by chance, nor from the start
    assert ft.zero_gamma(model)==n
    assert f'{n} residual blocks' in capsys.readouterr().out
    ins, outs = {}, {}
    blocks = {k:m for k,m in model.named_modules() if residual(m)}
    assert len(blocks)==n
    def note(k): return lambda m,i,o: ins.update({k:i[0].clone()}) or outs.update({k:o.clone()})
    for k,m in blocks.items(): m.register_forward_hook(note(k))
    with torch.no_grad():
        model(torch.rand(1,3,32,32))
        same = [k for k in blocks if torch.equal(ins[k], outs[k])]
        for k,m in blocks.items():
            if k in same: continue
            # A block with a projection: what comes out does not depend on the branch
            kept = {id(p) for o in (getattr(m, a, None) for a in ('downsample','proj','idpath','shortcut')) if o is not None for p in o.parameters()}
            zeroed = [p for p in m.parameters() if p.ndim and not p.any()]
            assert zeroed
            for p in m.parameters():
                if id(p) not in kept and not any(p is z for z in zeroed) and p.ndim>1: p.add_(torch.randn_like(p))
            assert torch.equal(m(ins[k]), outs[k]), k
    assert same

def residual(m):
    "Blocks as their families name them"
    if type(m).__name__ in ('InvertedResidual','MBConv','FusedMBConv','DepthwiseSeparableConv','EdgeResidual','UniversalInvertedResidual','ConvBnAct'):
        return getattr(m, 'use_res_connect', False) or getattr(m, 'has_skip', False)
    return type(m).__name__ in ('BasicBlock','Bottleneck','Bottle2neck','ResNestBottleneck','SelectiveKernelBasic','PreActBottleneck','ResBottleneckBlock','ResBlock')

def test_zero_gamma_warns_of_pretrained_networks(recwarn):
    model = torchvision_model('resnet18')
    ft.zero_gamma(model)
    assert not recwarn.list
    torch.nn.init.normal_(model.bn1.weight)
    with pytest.warns(UserWarning, match='looks pretrained'): ft.zero_gamma(model)

def test_zero_gamma_needs_residual_blocks():
    with pytest.raises(ValueError, match='none was found in this Sequential'): ft.zero_gamma(tiny_learner().model)
