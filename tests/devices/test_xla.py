"A Learner on eight virtual cores trains, validates and predicts as on the CPU, compiles little, and is as it was afterwards. `make test-xla` runs these"
import os, re, subprocess, sys
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import SimpleNamespace
os.environ.update({k:os.environ.get(k, v) for k,v in dict(PJRT_DEVICE='CPU', CPU_NUM_DEVICES='8', TF_CPP_MIN_LOG_LEVEL='2').items()})
import pytest, timm, torch
from torch import nn
from fastai.callback.core import Callback, CancelFitException, CancelEpochException
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.all import CategoryBlock, DataBlock, DataLoaders, IndexSplitter, Normalize, RandomSplitter, get_image_files, parent_label
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy
from fastai.optimizer import OptimWrapper, ranger
from fastai.torch_core import set_seed
from fastai.vision.all import ImageBlock, Resize, aug_transforms, imagenet_stats
import fastai.callback.schedule
import fastai_tricks.all as ft
from fastai_tricks.core.test_utils import noise_image, parity, tiny_learner
from fastai_tricks.devices.xla import start_xla
from fastai_tricks.devices.xla_parts import LazyLoss, move_with_opt

here = find_spec('torch_xla') is not None
xla = pytest.mark.skipif(not here, reason='needs torch_xla, which has an environment of its own: `make test-xla`')
if here: start_xla()

@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(): yield learn

def make(cbs=None, metrics=accuracy, n=40, valid=11, bs=16, size=32, opt_func=None, **kwargs):
    "29 training and 11 validation images of noise"
    set_seed(1)
    block = DataBlock((ImageBlock,CategoryBlock), get_x=noise_image, get_y=parity, splitter=IndexSplitter(range(n-valid, n)), item_tfms=Resize(size), **kwargs)
    learn = tiny_learner(block.dataloaders(range(n), bs=bs, num_workers=0, device='cpu'), cbs=cbs)
    learn.metrics = metrics
    if opt_func: learn.opt_func = opt_func
    return learn

def fit(learn, *args, fit='fit', seed=0, **kwargs):
    set_seed(seed)
    learn.dls.train.rng.seed(seed)
    with quiet(learn): getattr(learn, fit)(*args, **kwargs)
    return torch.tensor(learn.recorder.values[-1]).tolist()

def close(a, b, rtol=1e-2, atol=1e-4): return torch.allclose(torch.as_tensor(a).float(), torch.as_tensor(b).float(), rtol=rtol, atol=atol)
def weights(learn): return [p.detach().cpu().clone() for p in learn.model.parameters()]
def same_weights(a, b, atol=1e-4): return all(torch.allclose(p, q, atol=atol) for p,q in zip(a, b))
def compiled(learn): return int(learn.xla_report().loc['compilations','count'])
def fallbacks(learn): return [k for k in learn.xla_report().index if k.startswith('aten::')]

@contextmanager
def received(learn):
    "(training, device, shape, sharding, parameters' dtype) of each batch that reaches the model"
    seen = []
    def look(m, i):
        x = i[0]
        spec = sys.modules['torch_xla']._XLAC._get_xla_sharding_spec(x) if x.device.type=='xla' else ''
        seen.append((m.training, x.device.type, tuple(x.shape), spec, next(m.parameters()).dtype))
    h = learn.model.register_forward_pre_hook(look)
    try: yield seen
    finally: h.remove()

REAL = '''
import sys, timm, torch
sys.path.insert(0, 'devices')
from test_xla import real, fit
learn = real()
learn.to_xla(bf16=False)
print(learn.xla.cores, fit(learn, 2, 1e-3, fit='fit_one_cycle'))
'''

def real():
    "A small ResNet on embedded pictures"
    files = sorted(get_image_files(ft.sample_images()))[::4]
    set_seed(0)
    block = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, splitter=RandomSplitter(seed=1), item_tfms=Resize(32), batch_tfms=Normalize.from_stats(*imagenet_stats))
    dls = block.dataloaders(files, bs=16, num_workers=0, device='cpu')
    set_seed(0)
    return Learner(dls, timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1,1,1,1), dls.c, stem_width=8, channels=(8,16,24,32)), metrics=accuracy)

def run(code, **env):
    return subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True, env={**{k:v for k,v in os.environ.items() if k!='XLA_USE_SPMD'}, **env}, cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

def test_without_torch_xla_the_error_names_the_extra(monkeypatch):
    for k in [k for k in sys.modules if k.split('.')[0]=='torch_xla']: monkeypatch.delitem(sys.modules, k)
    monkeypatch.setitem(sys.modules, 'torch_xla', None)
    learn = tiny_learner()
    cbs = list(learn.cbs)
    for f in (learn.to_xla, learn.xla_ctx().__enter__, start_xla):
        with pytest.raises(ImportError, match=r'pip install fastai_tricks\[tpu\]'): f()
    assert list(learn.cbs)==cbs and learn.dls.train.bs==8

@pytest.mark.parametrize('kw', [dict(last='keep'), dict(every=0), dict(bf16=None), dict(mesh=8)])
def test_wrong_arguments(kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be'): tiny_learner().to_xla(**kw)

def test_a_parameter_that_moves_keeps_its_place_in_the_optimiser():
    "With the CPU's own way of making new parameters"
    learn = make()
    learn.model.tied = nn.Linear(8, 2)
    learn.model.tied.weight = learn.model[3].weight
    learn.model.forward = lambda x: learn.model[:4](x)
    fit(learn, 1)
    old,state = list(learn.model.parameters()),learn.opt.state_dict()['state']
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try: move_with_opt(learn, torch.device('cpu'))
    finally: torch.__future__.set_overwrite_module_params_on_conversion(False)
    new = list(learn.model.parameters())
    assert not any(p is q for p,q in zip(old, new)) and learn.model.tied.weight is learn.model[3].weight
    assert [id(p) for p,*_ in learn.opt.all_params()]==[id(p) for p in new]
    pairs = [(a['grad_avg'], b['grad_avg']) for a,b in zip(state, learn.opt.state_dict()['state']) if 'grad_avg' in a]
    assert len(pairs)==5 and all(torch.equal(a, b) for a,b in pairs)

def test_losses_that_are_fetched_late_are_the_same():
    a,b = make(),make()
    b.recorder.smooth_loss = LazyLoss(b.recorder, 7)
    b.add_cb(Callback(after_train=lambda self: self.recorder.smooth_loss.fetch()))
    fit(a, 5); fit(b, 5)
    assert torch.equal(torch.stack(a.recorder.losses), torch.stack(b.recorder.losses)) and len(b.recorder.losses)==5*(29//16)
    assert [v[:2] for v in a.recorder.values]==[v[:2] for v in b.recorder.values]

# What is Python's is tested without torch_xla too, the CPU in its place ---------
@pytest.fixture
def standin(monkeypatch):
    "In torch_xla's place one that compiles nothing and shares nothing out: what was to be shared, and along which axes"
    shared,ns = [],SimpleNamespace
    class Mesh:
        def __init__(self, ids, shape, names): self.mesh_shape,self.axis_names = shape,names
    spmd = ns(Mesh=Mesh, mark_sharding=lambda t, mesh, axes: shared.append((tuple(t.shape), axes)))
    runtime,metrics = ns(is_spmd=lambda: True, global_runtime_device_count=lambda: 8),ns(metric_data=lambda name: None, counter_names=list)
    debug,distributed,core = ns(metrics=metrics),ns(spmd=spmd),ns(xla_model=ns(wait_device_ops=lambda: None))
    tx = ns(runtime=runtime, debug=debug, distributed=distributed, core=core, device=lambda: torch.device('cpu'), sync=lambda: None,
            __spec__=ModuleSpec('torch_xla', None)) # PyTorch 2.6 asks for it
    for k,v in {'':tx, '.runtime':runtime, '.debug':debug, '.debug.metrics':metrics, '.distributed':distributed, '.distributed.spmd':spmd}.items():
        monkeypatch.setitem(sys.modules, f'torch_xla{k}', v)
    return shared

def loaders(learn): return [(dl.bs, dl.drop_last, dl.device, repr(dl.after_batch)) for dl in learn.dls.loaders]
def left(learn):
    return dict(loaders=loaders(learn), cbs=sorted(cb.name for cb in learn.cbs), dls=sorted(vars(learn.dls)), smooth=type(learn.recorder.smooth_loss),
                hooks=sum(len(m._forward_hooks) for m in learn.model.modules()))

def test_batches_are_padded_shared_out_and_cut_again(standin, capsys):
    learn = make(bs=12)
    cpu = make(bs=16)
    learn.to_xla(bf16=False)
    assert 'to_xla: 8 cores, batches of 16 (2 a core; 12 rounded up), fp32' in capsys.readouterr().out
    sizes = []
    learn.model.register_forward_pre_hook(lambda m,i: sizes.append((m.training, len(i[0]))))
    losses = fit(learn, 2, 1e-2)
    assert sizes==[(True,16),(False,16)]*2 # 29 training items, 11 of validation
    x,y,pred = (16,3,32,32),(16,),(16,2)
    assert standin[:4]==[(x,('data',None,None,None)), (y,('data',)), (x,('data',None,None,None)), (pred,(None,None))]
    assert close(losses, fit(cpu, 2, 1e-2), 1e-5) and len(learn.recorder.losses)==2
    with quiet(learn), quiet(cpu): (p,t),(q,u) = learn.get_preds(),cpu.get_preds()
    assert len(p)==11 and torch.equal(t, u) and close(p, q, 1e-5)
    assert list(learn.xla_report().index)==['compilations','executions','fetches']

def test_a_last_batch_is_padded_with_its_own_items(standin):
    learn = make(bs=16)
    learn.dls.train.drop_last = False
    ys = []
    learn.to_xla(last='pad', bf16=False)
    fit(learn, 1, cbs=Callback(after_loss=lambda self: ys.append(self.yb[0]) if self.training else None))
    assert [len(y) for y in ys]==[16,16] and torch.equal(ys[1][13:], ys[1][:3])

@pytest.mark.parametrize('ex', [None, CancelFitException, RuntimeError, KeyboardInterrupt])
def test_the_context_leaves_the_learner_as_found(standin, ex):
    class Boom(Callback):
        run_valid = False
        def before_backward(self):
            if ex: raise ex('boom')
    learn = make(bs=12, batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn.to_mixed(torch.bfloat16)
    fit(learn, 1)
    was,smooth = left(learn),learn.recorder.smooth_loss
    try:
        with learn.xla_ctx():
            assert loaders(learn)!=was['loaders'] and isinstance(learn.recorder.smooth_loss, LazyLoss) and learn.to_xla() is learn
            with learn.xla_ctx(): pass # The outer one ends it
            assert hasattr(learn, 'xla')
            with quiet(learn): learn.fit(1, cbs=Boom())
    except (RuntimeError,KeyboardInterrupt) as e: assert isinstance(e, ex)
    assert left(learn)==was and learn.recorder.smooth_loss is smooth and not hasattr(learn, 'xla')
    assert learn.from_xla() is learn
    with pytest.raises(RuntimeError, match='to_xla'): learn.xla_report()

def test_new_loaders_are_prepared_and_put_back_too(standin):
    learn = make()
    first,second = learn.dls,make(bs=10).dls
    learn.to_xla(bf16=False)
    learn.dls = second
    fit(learn, 1)
    assert [(dls.train.bs,dls._device) for dls in (first,second)]==[(16,torch.device('cpu'))]*2
    learn.from_xla()
    assert (second.train.bs,first.train.bs)==(10,16) and second._device=='cpu'

def test_too_few_images_for_a_batch(standin):
    learn = make(n=16, valid=11, bs=4)
    was = left(learn)
    with pytest.raises(ValueError, match="`bs` must be at most the 5 training items, unless `last='pad'`, not 8"): learn.to_xla()
    assert left(learn)==was and not hasattr(learn, 'xla')

# On XLA's own CPU backend ---------------------------------------------------------
@xla
def test_same_as_on_the_cpu():
    cpu,learn = real(),real()
    expected = fit(cpu, 2, 1e-3, fit='fit_one_cycle')
    learn.to_xla(bf16=False)
    assert close(fit(learn, 2, 1e-3, fit='fit_one_cycle')[:2], expected[:2])
    assert close(learn.recorder.losses, cpu.recorder.losses)
    with quiet(cpu), quiet(learn): (p,t),(q,u) = cpu.get_preds(),learn.get_preds()
    assert torch.equal(t, u) and (p-q).abs().max()<.03 and not fallbacks(learn)
    r = run(REAL, CPU_NUM_DEVICES='1')
    assert r.returncode==0, r.stderr
    cores,*losses = re.findall(r'[\d.]+', r.stdout.splitlines()[-1])
    assert cores=='1' and close(list(map(float, losses[:2])), expected[:2])

@xla
def test_what_the_model_receives(capsys):
    learn = make(bs=12)
    learn.to_xla()
    assert 'to_xla: 8 cores, batches of 16 (2 a core; 12 rounded up), bf16' in capsys.readouterr().out
    outs = []
    learn.model[0].register_forward_hook(lambda m,i,o: outs.append(o.dtype))
    with received(learn) as seen: fit(learn, 2)
    assert {o[:3] for o in seen}=={(True,'xla',(16,3,32,32)),(False,'xla',(16,3,32,32))} and len(seen)==2*(1+1)
    assert all(o[3].startswith('{devices=[8,1,1,1]') for o in seen)
    assert {o[4] for o in seen}=={torch.float32} and set(outs)=={torch.bfloat16}
    assert all(p is q for p,(q,*_) in zip(learn.model.parameters(), learn.opt.all_params()))
    assert learn.xla_report().loc['executions','count']==4
    learn.from_xla()
    learn = make()
    learn.to_xla(bf16=False)
    learn.model[0].register_forward_hook(lambda m,i,o: outs.append(o.dtype))
    outs.clear()
    fit(learn, 1)
    assert set(outs)=={torch.float32}

@xla
def test_a_mesh_of_ones_own():
    import numpy as np, torch_xla.distributed.spmd as xs
    learn = make(bs=10)
    learn.to_xla(xs.Mesh(np.arange(8), (4,2), ('batch','rest')), bf16=False)
    with received(learn) as seen: losses = fit(learn, 1)
    assert {o[2][0] for o in seen}=={12} and all(o[3].startswith('{devices=[4,1,1,1,2]') for o in seen)
    assert close(losses[:2], fit(make(bs=12), 1)[:2])

@xla
@pytest.mark.parametrize('last,steps', [('drop',1),('pad',2)])
def test_last_training_batch(last, steps):
    learn = make(bs=16)
    learn.dls.train.drop_last = False
    learn.to_xla(last=last, bf16=False)
    ys = []
    with received(learn) as seen: fit(learn, 1, cbs=Callback(after_loss=lambda self: ys.append(self.yb[0].cpu()) if self.training else None))
    assert [o[2][0] for o in seen if o[0]]==[16]*steps
    if last=='pad': assert torch.equal(ys[1][13:], ys[1][:3])
    learn.from_xla()
    assert not learn.dls.train.drop_last

@xla
def test_validation_and_prediction_see_each_item_once(tmp_path):
    learn = make(size=36, metrics=[accuracy, F1Score(average='macro')])
    learn.loss_func = CrossEntropyLossFlat(weight=torch.tensor([1.,3.]))
    learn.path = tmp_path
    fit(learn, 1)
    test = learn.dls.test_dl([3,4,5])
    def all_of():
        with quiet(learn):
            set_seed(0)
            inp,preds,targs,losses = learn.get_preds(with_input=True, with_loss=True)
            return dict(validate=learn.validate(), inp=inp, preds=preds, targs=targs, losses=losses, test=learn.get_preds(dl=test)[0],
                        order=learn.get_preds(ds_idx=0)[1], tta=learn.tta(n=1)[0], predict=learn.predict(5)[2])
    expected = all_of()
    with learn.xla_ctx(bf16=False):
        with received(learn) as seen: got = all_of()
        assert {o[1] for o in seen}=={'xla'} and {o[2][0] for o in seen}=={16}
        assert compiled(learn)==1 # One for all of them
    for k,v in expected.items():
        assert torch.as_tensor(v).shape==torch.as_tensor(got[k]).shape and close(got[k], v), k
    assert len(got['preds'])==11 and torch.equal(got['inp'], expected['inp']) and torch.equal(got['targs'], expected['targs'])

@xla
def test_the_optimisers_state_goes_along_both_ways():
    for opt_func in (None, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)):
        learns = cpu,there,back,lost = [make(opt_func=opt_func) for _ in range(4)]
        for l in learns: fit(l, 3, 1e-2)
        there.to_xla(bf16=False); back.to_xla(bf16=False)
        lost.opt.clear_state()
        for l in (cpu,there,back,lost): fit(l, 1, 1e-2, seed=1)
        back.from_xla()
        assert {p.device.type for p in back.model.parameters()}=={'cpu'}
        for l in (cpu,there,back,lost): fit(l, 1, 1e-2, seed=2)
        assert same_weights(weights(cpu), weights(there)) and same_weights(weights(cpu), weights(back))
        assert not same_weights(weights(cpu), weights(lost), 3e-4)

@xla
def test_graphs_depend_on_sizes_alone():
    def graphs(epochs, size, cbs=None):
        # Each time another size: what was compiled once in a process is there
        learn = make(n=75, batch_tfms=aug_transforms(), size=size) # Four steps an epoch
        learn.to_xla(bf16=False)
        with received(learn) as seen: fit(learn, epochs, 1e-3, fit='fit_one_cycle', cbs=cbs)
        assert not fallbacks(learn) and len(learn.recorder.losses)==4*epochs
        return compiled(learn),len({o[2] for o in seen})
    few,sizes = graphs(2, 40)
    assert (few,sizes)==(3,1) and graphs(5, 44)==(few,sizes)
    def small(size): return ft.ProgressiveResize(sizes=[size], until=.5, mult=4)
    more,sizes = graphs(4, 72, small(52))
    assert sizes==2 and few<more<=few+2 and graphs(8, 76, small(56))==(more,sizes)

@xla
def test_predictions_are_put_together_within_the_graph():
    learn = make(size=28)
    learn.model[0] = nn.Conv2d(3, 8, 3, stride=2) # Without batch norm they stay shared out
    learn.to_xla(bf16=False)
    with quiet(learn): learn.validate(), learn.validate()
    assert compiled(learn)==1

STAGES = ft.Stage(32, 1), ft.Stage(48, 1)

def fits(learn, path):
    "Weights after `fine_tune` and `fit_stages`, on any device; `lr_find` leaves them as they were"
    learn.path = path
    was = weights(learn)
    with quiet(learn):
        learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
        assert same_weights(was, weights(learn), 0) and len(learn.recorder.losses)==6
        learn.fine_tune(1, freeze_epochs=1)
        assert len(learn.fit_stages([*STAGES]))==2
    done = weights(learn)
    assert not same_weights(was, done)
    return done

@xla
def test_fits_of_fastai_and_of_ours(tmp_path):
    done,again = fits(make(size=48).to_xla(bf16=False), tmp_path),make(size=48)
    again.path = tmp_path
    with quiet(again): again.to_xla(bf16=False).fit_stages([*STAGES])
    assert same_weights(weights(again), done, 0)

@xla
def test_head_first_as_on_the_cpu():
    from fastai_tricks.models.fit_head import kept_features
    from fastai_tricks.models.split_head import split_head
    res = []
    for tpu in (False,True):
        learn = make()
        learn.freeze()
        if tpu: learn.to_xla(bf16=False)
        with quiet(learn): res.append(kept_features(learn, split_head(learn.model, 2)))
    assert close(res[0][0], res[1][0], 1e-3) and torch.equal(res[0][1], res[1][1])
    w = weights(learn)
    with quiet(learn): learn.fit_fast(0, pretrained=True)
    changed = [not torch.equal(a, b) for a,b in zip(w, weights(learn))]
    assert any(changed[-2:]) and not any(changed[:-2]) and {p.device.type for p in learn.model.parameters()}=={'xla'}
    with pytest.raises(ValueError, match='`keep_bn` must be False or None on a TPU'): learn.fit_fast(1, keep_bn=True)
    with quiet(learn): learn.fit_fast(1)
    assert not any(torch.equal(a, b) for a,b in zip(w, weights(learn)))

@xla
def test_a_killed_run_of_stages_goes_on(tmp_path):
    class Killed(Exception): pass
    class Kill(Callback):
        order,n = 90,0
        def after_epoch(self):
            self.n += 1
            if self.n==2: raise Killed('at the end of the second epoch')
    stages = [ft.Stage(32, 3)]
    a,b,c = [make(size=32) for _ in range(3)]
    for l,p in ((a,'a'),(b,'b'),(c,'b')):
        l.path = tmp_path/p
        l.to_xla(bf16=False)
    with quiet(a), quiet(b), quiet(c):
        set_seed(0); a.dls.train.rng.seed(0); a.fit_stages(stages)
        set_seed(0); b.dls.train.rng.seed(0)
        with pytest.raises(Killed): b.fit_stages(stages, cbs=Kill())
        c.fit_stages(stages)
    assert same_weights(weights(a), weights(c), 1e-6)

@xla
def test_save_and_load_across_devices(tmp_path):
    a,b,c = make(),make(),make()
    for l in (a,b,c): l.path = tmp_path
    a.to_xla(bf16=False)
    fit(a, 2, 1e-2)
    a.save('there')
    b.load('there')
    assert same_weights(weights(a), weights(b), 0) and {p.device.type for p in b.model.parameters()}=={'cpu'}
    b.save('back')
    c.to_xla(bf16=False)
    c.load('back')
    for l in (a,b,c): fit(l, 1, 1e-2, seed=1)
    assert same_weights(weights(a), weights(b), 1e-3) and same_weights(weights(a), weights(c), 1e-3)

LOAD = '''
import sys
sys.modules['torch_xla'] = None
from fastai.vision.all import *
learn = load_learner({path!r})
assert {{p.device.type for p in learn.model.parameters()}}=={{'cpu'}} and not [cb for cb in learn.cbs if 'xla' in cb.name]
with learn.no_bar(): print(learn.predict(3)[2].tolist())
'''

@xla
@pytest.mark.parametrize('bf16', [True, False])
def test_export_comes_back_on_the_cpu(bf16, tmp_path):
    learn = make()
    learn.path = tmp_path
    learn.to_xla(bf16=bf16)
    fit(learn, 1)
    with quiet(learn):
        expected = learn.predict(3)[2]
        learn.export('l.pkl')
        w = weights(learn)
        fit(learn, 1) # Goes on
        assert not same_weights(w, weights(learn), 0)
        r = run(LOAD.format(path=str(tmp_path/'l.pkl')))
    assert r.returncode==0, r.stderr
    assert close(eval(r.stdout.splitlines()[-1]), expected, atol=.01)

def snapshot(learn):
    dls = learn.dls
    return dict(model=id(learn.model), opt=id(learn.opt), cbs=sorted(cb.name for cb in learn.cbs), bs=[dl.bs for dl in dls.loaders], drop=[dl.drop_last for dl in dls.loaders], devices=[dl.device for dl in dls.loaders],
                dls=(id(dls), dls.device, sorted(vars(dls))), fs=[id(f) for dl in dls.loaders for f in dl.after_batch.fs], loss=id(learn.loss_func), smooth=type(learn.recorder.smooth_loss),
                model_on={p.device.type for p in learn.model.parameters()}, weight=learn.loss_func.func.weight.device, mode=learn.model.training,
                state={t.device.type for s in learn.opt.state.values() for t in s.values() if torch.is_tensor(t)}, pipes=[str(dl.after_batch) for dl in dls.loaders], attrs=sorted(vars(learn)))

@xla
@pytest.mark.parametrize('ex', [None, CancelFitException, CancelEpochException, RuntimeError, KeyboardInterrupt])
def test_leaves_learner_as_found(ex):
    class Boom(Callback):
        order,run_valid = 100,False
        def before_backward(self):
            if ex and self.epoch==1: raise ex('boom')
    learn = make(bs=12, batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn.loss_func = CrossEntropyLossFlat(weight=torch.ones(2))
    learn.to_mixed(torch.bfloat16)
    fit(learn, 1)
    was,w = snapshot(learn),weights(learn)
    try:
        with learn.xla_ctx() as inner:
            assert inner is learn and snapshot(learn)!=was
            cbs = list(learn.cbs)
            assert learn.to_xla() is learn and list(learn.cbs)==cbs
            fit(learn, 2, cbs=Boom())
    except (RuntimeError, KeyboardInterrupt) as e: assert isinstance(e, ex)
    assert not same_weights(w, weights(learn), 0) # What it learned stays
    now = snapshot(learn)
    now['attrs'] = [k for k in now['attrs'] if k in was['attrs']]
    was['attrs'] = [k for k in was['attrs'] if k in now['attrs']]
    if ex: now.pop('mode'); was.pop('mode')
    assert now==was
    assert learn.from_xla() is learn
    fit(learn, 1)
    with pytest.raises(RuntimeError, match='to_xla'): learn.xla_report()

@xla
@pytest.mark.parametrize('cb', [MixUp, lambda: GradientAccumulation(32), lambda: ft.Distill(tiny_learner().model), lambda: ft.WatchCAM(n=2)])
def test_with_other_callbacks(cb):
    learn = make(n=75)
    learn.to_xla(bf16=False)
    learn.add_cb(cb())
    w = weights(learn)
    fit(learn, 2, 1e-2)
    n = compiled(learn)
    assert not same_weights(w, weights(learn))
    fit(learn, 2, 1e-2)
    assert compiled(learn)==n

@xla
def test_new_loaders_and_new_layers_go_along():
    learn = make()
    learn.to_xla(bf16=False)
    fit(learn, 1)
    learn.dls = make(bs=10).dls
    learn.model[3] = nn.Linear(8, 2)
    learn.create_opt()
    w = weights(learn)
    with received(learn) as seen: fit(learn, 1, 1e-2)
    assert {o[1] for o in seen}=={'xla'} and not same_weights(w, weights(learn))
    dls = learn.dls
    learn.from_xla()
    assert dls.train.bs==10 and str(dls.device)=='cpu'

@xla
def test_pytorchs_loaders_and_workers():
    data = [(torch.rand(3,32,32), i%2) for i in range(28)]
    dls = DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=12) for _ in range(2)))
    learn = Learner(dls, tiny_learner().model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.to_xla(bf16=False)
    with quiet(learn), received(learn) as seen: learn.fit(1)
    assert {o[2][0] for o in seen}=={16} and len(seen)==6
    with quiet(learn): assert len(learn.get_preds(dl=dls.valid)[0])==28
    learn.from_xla()
    assert '_device' not in vars(dls)
    learn = make()
    learn.dls.train.fake_l.num_workers = 2
    with learn.xla_ctx(bf16=False): losses = fit(learn, 1)
    assert close(losses[:2], fit(make(), 1)[:2])

@xla
def test_too_few_images():
    learn = make(n=16, valid=11, bs=4)
    was = [dl.bs for dl in learn.dls.loaders]
    with pytest.raises(ValueError, match='`bs` must be'): learn.to_xla()
    assert [dl.bs for dl in learn.dls.loaders]==was and not hasattr(learn, 'xla') and str(learn.dls.device)=='cpu'

EARLY = '''
import torch_xla, torch_xla.runtime as xr
from fastai_tricks.devices.xla import start_xla
torch_xla.device(); xr.global_runtime_device_count()
start_xla()
'''
LATE = '''
import torch
torch.ones(1, requires_grad=True).sum().backward()
from fastai_tricks.devices.xla import start_xla
start_xla()
'''
@xla
@pytest.mark.parametrize('code,said', [(EARLY,'an XLA device was used before'), (LATE,'something was trained in this kernel')])
def test_the_wrong_order_is_an_error(code, said):
    r = run(code)
    assert said in r.stderr and 'restart the kernel and call `start_xla()` at the top' in r.stderr

@xla
def test_within_another():
    "The outer one ends it"
    learn = make()
    with learn.xla_ctx():
        with learn.xla_ctx(): pass
        assert next(learn.model.parameters()).device.type=='xla' and hasattr(learn, 'xla')
    assert next(learn.model.parameters()).device.type=='cpu' and not hasattr(learn, 'xla')
