"Trials of variants: what they leave alone, and what is noted of those that do not run"
import time
import pytest, torch
from fastai.layers import ConvLayer
from fastai.losses import CrossEntropyLossFlat
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.vision.models.unet import DynamicUnet
from fastai.data.core import DataLoaders
from fastai_tricks.core.state import get_state
from fastai_tricks.core.timing import work_clock
from fastai_tricks.core.test_utils import tiny_learner
from fastai_tricks.train import precision as P, precision_report, variants as V # noqa: F401 - for `Learner.precision_report`
from fastai_tricks.train.variants import Trial, Variant, best_variant, fp32, is_settled, left_in, race_trials
from steps import quiet, with_speeds

BF16, FP16 = torch.bfloat16, torch.float16

@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch): monkeypatch.setattr(P, '_chosen', {})

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(same, a, b))
    return a==b

ALL = ['fp32', 'fp32, channels_last', 'bf16', 'bf16, channels_last', 'fp16', 'fp16, channels_last']

@pytest.mark.parametrize('look', [lambda l: l.precision_report(sizes=[32,(48,64)], compile=False, turns=2), lambda l: l.to_mixed().from_mixed()])
def test_measuring_leaves_the_learner_as_it_was(look, monkeypatch):
    with_speeds(monkeypatch, dict.fromkeys(ALL, 1))
    learn = tiny_learner()
    with quiet(learn):
        learn.fit(1)
        learn.model.eval()
        torch.manual_seed(1)
        state, was = get_state(learn), (learn.model, learn.opt, list(learn.cbs))
        look(learn)
        assert same(state, get_state(learn))
        assert learn.model is was[0] and learn.opt is was[1] and list(learn.cbs)==was[2] and not learn.model.training
        assert learn.model[0][0].weight.is_contiguous()

def test_frozen_layers_are_trained_too():
    learn = tiny_learner()
    learn.freeze()
    trained = []
    was = learn.splitter
    learn.splitter = lambda m: trained.append([p.requires_grad for p in m.parameters()]) or was(m)
    V.training_step(learn, *V.training_batch(learn, 4), fp32)()
    assert all(trained[0]) and not learn.model[0][0].weight.requires_grad

def test_an_optimiser_given_as_an_object_is_not_stepped():
    learn = tiny_learner()
    learn.opt_func = OptimWrapper(opt=torch.optim.SGD(learn.model.parameters(), lr=.1, momentum=.9))
    w = learn.model[3].weight.clone()
    V.training_step(learn, *V.training_batch(learn, 4), fp32)()
    assert torch.equal(w, learn.model[3].weight) and not learn.opt_func.opt.state

def test_the_learners_own_loss_is_not_called():
    learn, calls = tiny_learner(), []
    class Loss(torch.nn.CrossEntropyLoss):
        def forward(self, *a):
            calls.append(self)
            return super().forward(*a)
    learn.loss_func = Loss()
    V.training_step(learn, *V.training_batch(learn, 4), fp32)()
    assert calls and learn.loss_func not in calls

def test_a_u_net_after_lr_find(tmp_path):
    body = torch.nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2), ConvLayer(16, 16, stride=2))
    data = [(torch.rand(3,32,32), torch.zeros(32,32).long())]*8
    dls = DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=4) for _ in range(2)))
    learn = Learner(dls, DynamicUnet(body, 2, (32,32)), loss_func=CrossEntropyLossFlat(axis=1))
    learn.path = tmp_path
    with quiet(learn): learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    trial = V.start_trial(learn, *V.training_batch(learn, 4), fp32)
    assert trial.step and not trial.note and len(trial.losses)==1

def test_all_variants_draw_the_same():
    "Dropout"
    learn = tiny_learner()
    learn.model.insert(3, torch.nn.Dropout(.5))
    batch = V.training_batch(learn, 8)
    losses = [V.start_trial(learn, *batch, v, n_losses=2).losses for v in (fp32,fp32)]
    assert losses[0]==losses[1]

def test_what_is_too_slow_is_not_tried_on_the_batch(monkeypatch):
    with_speeds(monkeypatch, {'fp32':1, 'bf16':.1})
    learn, sizes, step = tiny_learner(), [], V.training_step
    monkeypatch.setattr(V, 'training_step', lambda l, xb, yb, v: sizes.append(len(xb[0])) or step(l, xb, yb, v))
    trial = V.start_trial(learn, *V.training_batch(learn, 8), Variant(BF16))
    assert set(sizes)=={2} and trial.step is None and trial.note=='too slow: timed on 2 images only' and trial.guess==pytest.approx(.1)
    after = V.start_trial(learn, *V.training_batch(learn, 8), Variant(BF16, True, True), [trial])
    assert after.note=='not tried: see bf16' and after.step is None

def test_what_does_not_run_is_noted(monkeypatch):
    def broken(learn, xb, yb, v): raise torch.OutOfMemoryError('CUDA out of memory') if v==fp32 else RuntimeError('"conv" not\nimplemented for Half')
    monkeypatch.setattr(V, 'training_step', broken)
    learn = tiny_learner()
    batch = V.training_batch(learn, 4)
    assert V.start_trial(learn, *batch, fp32).note==V.out_of_memory
    assert V.start_trial(learn, *batch, Variant(channels_last=True)).note=='does not run here: RuntimeError: "conv" not implemented for Half'

def test_steps_of_a_turn(monkeypatch):
    with_speeds(monkeypatch, {'fp32':8, 'fp32, channels_last':16})
    learn = tiny_learner()
    batch = V.training_batch(learn, 4)
    trials = [V.start_trial(learn, *batch, v) for v in (fp32,Variant(channels_last=True))]
    ticks = []
    assert V.time_trials(trials, turns=3, seconds=.3, tick=ticks.append)==3
    assert trials[0].times==[1/8]*3 and trials[1].times==[1/16]*3 and ticks==[1,2,3]

# Which one is taken ---------------------------------------------------------------

LAST, HALF, BOTH = Variant(channels_last=True), Variant(BF16), Variant(BF16, True)

@pytest.mark.parametrize('compiled,best', [(1.56,BOTH), (1.68,BOTH), (1.72,Variant(BF16, True, True))])
def test_compiling_has_to_gain_a_tenth_over_all_that_is_not(compiled, best):
    "bf16 with channels_last is the fastest, though it beats neither of those before it by the gain it needs"
    speeds = {fp32:[1.]*4, LAST:[1.46]*4, HALF:[1.4]*4, BOTH:[1.54]*4, Variant(BF16, True, True):[compiled]*4}
    assert best_variant(speeds)==(best if best.compiled else LAST)

@pytest.mark.parametrize('last,half,both,best,settled', [
    ([1.06]*4, [.9]*4, [.9]*4, LAST, True),
    ([1.04]*4, [1.09]*4, [1.09]*4, fp32, True), # A layout needs 5%, 16 bits 10%
    ([1.04]*4, [1.11]*4, [1.11]*4, HALF, True),
    ([1.04]*4, [1.11]*4, [1.17]*4, BOTH, True),
    ([1.2]*4, [1.3]*4, [1.3]*4, LAST, True), # 16 bits against the best of 32
    ([1.2]*4, [1.3]*4, [1.33]*4, BOTH, True),
    ([1.2]*4, [.5]*2, [1.5]*4, BOTH, True), # One dropped out
    ([1.2,1.2,1.2,.9], [.9]*4, [.9]*4, fp32, False), # Three of four turns
    ([1.2,1.2,1.2,1.2,.9], [.9]*5, [.9]*5, LAST, False),
    ([1.2]*9+[.9], [.9]*10, [.9]*10, LAST, True), # But for one in ten
    ([1.02,1.04,1.06,1.07], [.9]*4, [.9]*4, LAST, False), # Around 5%
    ([1.01,1.02,1.03,1.2], [.9]*4, [.9]*4, fp32, False),
    ([1.2]*5, [1.19,1.4,1.4,1.4,1.4], [.9]*5, HALF, False)])
def test_it_must_be_clear(last, half, both, best, settled):
    speeds = {fp32:[1.]*len(last), LAST:last, HALF:half, BOTH:both}
    assert best_variant(speeds)==best and is_settled(speeds)==settled

@pytest.mark.parametrize('last,half,left', [
    ([.9], [.9], [fp32,LAST,HALF]), ([.9]*2, [.9]*2, [fp32]), ([.9,1.06], [.9]*2, [fp32,LAST]),
    ([1.]*2, [1.]*2, [fp32,LAST]), ([1.]*3, [1.]*3, [fp32]), ([1.]*3, [1.06]*3, [fp32]), # 16 bits need 10%
    ([1.]*2, [1.06]*2, [fp32,LAST,HALF]), ([1.]*3, [1.06,1.06,1.11], [fp32,HALF]),
    ([1.2]*3, [1.3]*3, [fp32,LAST]), ([1.2]*3, [1.3,1.3,1.33], [fp32,LAST,HALF])]) # Against the best of 32
def test_what_drops_out(last, half, left): assert left_in({fp32:[1.]*len(last), LAST:last, HALF:half})==left

def racing(monkeypatch, times):
    "Trials whose steps take the seconds that `times` says, in turn, the last one for ever; and how often each ran"
    clock, ran = [0.], {}
    monkeypatch.setattr('time.perf_counter', lambda: clock[0])
    def step_of(v, ts):
        def step():
            n = ran[v] = ran.get(v, 0)+1
            clock[0] += ts[min(n, len(ts))-1]
        return step
    return [Trial(v, step_of(v, ts)) for v,ts in times.items()], ran

@pytest.mark.parametrize('times,ran', [
    ({fp32:[1.], LAST:[.8], HALF:[1.2], BOTH:[2.]}, {fp32:4, LAST:4, HALF:2, BOTH:2}), # Warm-up and three turns
    ({fp32:[1.], LAST:[5.]}, {fp32:1, LAST:1}), # Hopeless
    ({fp32:[1.], LAST:[1.2]}, {fp32:2, LAST:2}),
    ({fp32:[1.], LAST:[.8], HALF:[.75], BOTH:[.98]}, {fp32:4, LAST:4, HALF:3, BOTH:2}),
    ({fp32:[.1], LAST:[.09,.1,.09,.1,.09,.1,.09]}, {fp32:13, LAST:13}), # Not settled: twelve turns
    ({fp32:[.8], LAST:[.72,.8,.72,.8,.72,.8,.72]}, {fp32:7, LAST:7}), # Six, as they take more than 4 seconds
    ({fp32:[.8], LAST:[.6,.9]+[.6]*9}, {fp32:7, LAST:7})]) # One was slower: not settled in three
def test_as_many_turns_as_it_takes(times, ran, monkeypatch):
    trials, counted = racing(monkeypatch, times)
    assert race_trials(trials)==1 and counted==ran
    assert [len(t.times) for t in trials]==[n-1 for n in ran.values()]

def test_short_steps_are_timed_several_at_a_time(monkeypatch):
    trials, counted = racing(monkeypatch, {fp32:[.02], LAST:[.01]})
    assert race_trials(trials)==3 and counted=={fp32:10, LAST:10} and trials[1].times==pytest.approx([.01]*3)

def test_cpu_seconds_count_on_one_thread(monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    assert work_clock(torch.device('cpu')) is time.process_time and work_clock(torch.device('cuda')) is time.perf_counter
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    assert work_clock(torch.device('cpu')) is time.perf_counter

def test_more_networks_than_pytorch_compiles_by_itself(monkeypatch):
    "Of the ninth and all others it would time the same step twice"
    compile,seen = torch.compile,[]
    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, 'compile', lambda f: compile(f, backend=backend))
    torch.compiler.reset()
    for n in range(1, 11):
        learn = tiny_learner()
        learn.model = torch.nn.Sequential(torch.nn.Conv2d(3, n, 3, 2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(n, learn.dls.c))
        trial = V.start_trial(learn, *V.training_batch(learn, 2), Variant(compiled=True))
        assert not trial.note and len(seen)==n
