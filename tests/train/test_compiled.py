"`torch.compile` in training: what is compiled, how often, and what is left of it"
import copy
import pytest, torch
from torch import nn
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.hook import ActivationStats
from fastai.learner import load_learner
from fastai.torch_core import set_seed, trainable_params
import fastai_tricks.all as ft
from fastai_tricks.core.test_utils import tiny_learner
from fastai_tricks.fast.steps import KeepStatistics
from fastai_tricks.train import compiled as C, precision as P
from fastai_tricks.train.compiled import CompilePlan, compile_plan
from fastai_tricks.train.variants import hooked, start_trial, training_batch, Trial, Variant
from steps import quiet

BF16 = torch.bfloat16

@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(P, '_chosen', {})
    torch.compiler.reset()

@pytest.fixture
def graphs(monkeypatch):
    "What was compiled, with a backend that takes no time"
    seen,compile = [],torch.compile
    def backend(graph, inputs):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled('cpu')))
        return graph.forward
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: compile(f, **{'backend':backend, **kwargs}))
    return seen

def is_plain(learn): return not {'_compiled_call_impl','forward'} & vars(learn.model).keys()

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

# What is compiled ---------------------------------------------------------------

def test_training_steps_alone_are_compiled(graphs, tmp_path):
    learn = tiny_learner()
    keys = list(learn.model.state_dict())
    with quiet(learn):
        learn.to_mixed(BF16, compile=True).fit(2)
        assert graphs==[(True,True)] and is_plain(learn) # Once, under autocast
        learn.path = tmp_path
        for f in (learn.validate, learn.get_preds, lambda: learn.tta(n=1), lambda: learn.predict(0), lambda: learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)): f()
        learn.fit(1)
    assert len(graphs)==1 and list(learn.model.state_dict())==keys

@pytest.mark.parametrize('dtype', [None,BF16])
def test_the_same_weights(dtype):
    "With a backend that computes as ever: what the callback does is not what a compiler rounds"
    def trained(cbs):
        set_seed(0)
        learn = tiny_learner(cbs=cbs)
        with quiet(learn):
            if dtype: learn.add_cb(P.DeviceMixedPrecision(dtype))
            learn.fit(2)
        return weights(learn)
    assert torch.allclose(trained([ft.CompiledTraining(backend='eager')]), trained(None), atol=1e-6)

# How often ------------------------------------------------------------------------

def test_sizes_freezing_and_statistics_compile_a_few_times(graphs):
    "Older torch does not look whether weights are frozen: at most so often"
    learn = tiny_learner(n=40)
    with quiet(learn):
        learn.add_cb(ft.CompiledTraining()).fit(6, cbs=ft.ProgressiveResize(sizes=[16,24,32,40,48,56,64], mult=8))
        assert len(graphs)==2 # One size, then any
        learn.fit(1)
        assert len(graphs)==2
        learn.freeze()
        learn.fit(1)
        learn.unfreeze()
        learn.fit(1)
        assert len(graphs)<=3
        learn.fit(1, cbs=KeepStatistics(None))
        assert len(graphs)<=4
        learn.fine_tune(1)
        assert len(graphs)<=4

def test_a_network_of_the_same_structure_is_compiled_already(graphs):
    "PyTorch compiles a method eight times, and then no more; older versions compile each network"
    for _ in range(12):
        learn = tiny_learner(cbs=ft.CompiledTraining())
        with quiet(learn): learn.fit(1)
    assert len(graphs) in (1,12)

def test_the_ninth_structure_is_compiled_too(graphs):
    for n in range(1, 12):
        learn = tiny_learner(cbs=ft.CompiledTraining())
        learn.model = nn.Sequential(nn.Conv2d(3, n, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 2))
        learn.splitter = trainable_params
        with quiet(learn): learn.fit(1)
        assert len(graphs)==n

# What it leaves alone ---------------------------------------------------------------

@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt, CancelFitException])
def test_nothing_is_left_after_an_end(ex, graphs):
    class Boom(Callback):
        def after_loss(self): raise ex('boom')
    learn = tiny_learner(cbs=ft.CompiledTraining())
    with quiet(learn):
        if ex is CancelFitException: learn.fit(1, cbs=Boom())
        else:
            with pytest.raises(ex): learn.fit(1, cbs=Boom())
    assert graphs and is_plain(learn)

def test_an_exported_learner_a_copy_and_from_mixed(graphs, tmp_path):
    learn = tiny_learner()
    learn.path = tmp_path
    with quiet(learn):
        learn.to_mixed(torch.bfloat16, compile=True).fit(1)
        expected = learn.predict(3)[2]
        learn.export('l.pkl')
        loaded = load_learner(tmp_path/'l.pkl')
        assert is_plain(loaded) and copy.deepcopy(learn.model).state_dict().keys()==learn.model.state_dict().keys()
        with loaded.no_bar(): assert torch.allclose(loaded.predict(3)[2], expected, atol=1e-2)
        n = len(graphs)
        learn.from_mixed().fit(1)
    assert len(graphs)==n and not learn.cbs.filter(lambda cb: isinstance(cb, ft.CompiledTraining))

def test_hooks_of_inner_layers_are_called(graphs, capsys):
    "A compiled network would not call them, and not say so"
    learn = tiny_learner(cbs=[ft.CompiledTraining(), ActivationStats()])
    with learn.no_bar(): learn.fit(1)
    assert not graphs and len(learn.activation_stats.stats)==3
    assert 'batches are not compiled while inner layers have hooks' in capsys.readouterr().out
    learn.remove_cb(ActivationStats)
    with quiet(learn): learn.fit(1)
    assert len(graphs)==1

def test_hooks_of_the_model_itself_are_called(graphs):
    learn,seen = tiny_learner(cbs=ft.CompiledTraining()),[]
    for f in (seen.append, seen.append):
        with learn.model.register_forward_hook(lambda m,i,o: f(m.training)), quiet(learn): learn.fit(1)
    assert len(graphs)==1 and sum(seen)==2*len(learn.dls.train)

def test_replicas_are_not_compiled(graphs):
    "A replica of `DataParallel` has all attributes of the network, and would call that one in its place"
    class TwoGPUs(nn.DataParallel):
        def forward(self, x): return torch.cat([self.module._replicate_for_data_parallel()(o) for o in x.chunk(2)])
    learn = tiny_learner(cbs=ft.CompiledTraining())
    learn.model = TwoGPUs(learn.model)
    learn.model.device_ids,learn.splitter = [0,1],trainable_params
    with quiet(learn): learn.fit(1)
    assert not graphs
    learn.model.device_ids = [0]
    with quiet(learn): learn.fit(1)
    assert graphs

def test_who_has_compiled_the_model_has_it_so(graphs):
    learn = tiny_learner()
    learn.model.compile(backend='eager')
    was = vars(learn.model)['_compiled_call_impl']
    with quiet(learn): learn.to_mixed(BF16, compile=True).fit(1)
    learn.from_mixed()
    assert vars(learn.model)['_compiled_call_impl'] is was and not graphs

def test_another_model(graphs):
    learn = tiny_learner(cbs=ft.CompiledTraining())
    with quiet(learn):
        learn.fit(1)
        learn.model = nn.Sequential(learn.model, nn.Identity())
        learn.fit(1)
    assert len(graphs)==2 and is_plain(learn)

def test_ema_gradcam_and_fit_fast(graphs):
    learn = tiny_learner(cbs=[ft.EMA(.9), ft.WatchCAM(n=2)])
    with quiet(learn):
        learn.to_mixed(BF16, compile=True).fit(2)
        assert len(graphs)==1 and len(learn.watch_cam.rows)==2
        learn.fit_fast(1, pretrained=False, resize=False)
    # What was chosen before holds
    assert len(graphs)==1 and learn.cbs.filter(lambda cb: isinstance(cb, ft.CompiledTraining))

# Whether ----------------------------------------------------------------------------

@pytest.mark.parametrize('steps,step,fast,compiling,clear,compiled', [
    (1000,1.,.8,199,True,True), (1000,1.,.8,200,True,False), (1000,1.,1.1,1,True,False), (10,1.,.5,4,True,True), (10**6,1.,.5,4,False,False)])
def test_saving_against_compiling(steps, step, fast, compiling, clear, compiled):
    assert compile_plan(steps, step, fast, compiling, clear).compiled==compiled

def with_seconds(monkeypatch, plain, fast, compiling):
    "Steps take these seconds"
    def start(learn, xb, yb, v, earlier=(), **kwargs):
        assert len(xb[0])==learn.dls.train.bs
        return Trial(v, lambda: None, compile_s=compiling if v.compiled else float('nan'))
    def timed(trials, turns=5):
        for t in trials: t.times = [fast if t.variant.compiled else plain]*turns
    monkeypatch.setattr(C, 'start_trial', start)
    monkeypatch.setattr(C, 'time_trials', timed)

@pytest.mark.parametrize('epochs,plain,fast,compiling,compiled,said', [
    (100,1.,.8,50,True,'to_mixed: compiled: it takes 50 s and saves 60 of 300 s'), (100,1.,.8,70,False,'to_mixed: not compiled: it takes 70 s and saves 60 of 300 s'),
    (100,1.,.97,1,False,'hardly faster (1.03 times)'), (40,1.,.1,1,False,'a training of 120 s is too short')])
def test_epochs_decide(epochs, plain, fast, compiling, compiled, said, monkeypatch, capsys):
    with_seconds(monkeypatch, plain, fast, compiling)
    learn = tiny_learner()
    assert len(learn.dls.train)==3
    learn.to_mixed(BF16, compile=epochs)
    assert said in capsys.readouterr().out and hasattr(learn, 'compiled_training')==compiled

def test_nothing_is_tried_where_inner_layers_have_hooks(monkeypatch, capsys):
    "As those of fastai's U-Net: the training would not be compiled"
    learn = tiny_learner()
    with learn.model[0].register_forward_hook(lambda *args: None):
        trial = start_trial(learn, *training_batch(learn, 4), Variant(compiled=True))
        with_seconds(monkeypatch, 1., .1, 1)
        learn.to_mixed(BF16, compile=1000)
    assert trial.note==hooked and trial.step is None and not hasattr(learn, 'compiled_training')
    assert f'to_mixed: not compiled: {hooked}' in capsys.readouterr().out

def test_a_loader_without_length():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self): return iter([])
    learn = tiny_learner()
    learn.dls.loaders[0] = torch.utils.data.DataLoader(Endless())
    cbs = list(learn.cbs)
    with pytest.raises(ValueError, match='`compile` must be True or False with a training loader that has no length, not 20'):
        learn.to_mixed(BF16, compile=20)
    assert list(learn.cbs)==cbs and hasattr(learn.to_mixed(BF16, compile=True), 'compiled_training')

def test_processes_choose_nothing(monkeypatch):
    monkeypatch.setattr(P, 'num_distrib', lambda: 2)
    assert not hasattr(tiny_learner().to_mixed(BF16, compile=100), 'compiled_training')
    assert hasattr(tiny_learner().to_mixed(BF16, compile=True), 'compiled_training')

@pytest.mark.parametrize('compile', [0,-1,1.5,'auto',None])
def test_bad_arguments(compile):
    with pytest.raises(ValueError, match='`compile` must be True, False or the epochs'): tiny_learner().to_mixed(compile=compile)

def test_not_on_a_tpu(monkeypatch):
    monkeypatch.setattr(P, 'device_of', lambda learn: torch.device('xla'))
    with pytest.raises(ValueError, match='`compile` must be False on xla'): tiny_learner().to_mixed(BF16, compile=True)
