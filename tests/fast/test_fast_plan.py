"The plans of `fit_fast`, from facts alone: no training, no Learner"
from dataclasses import replace
import pytest
from fastai_tricks.fast.learned import FastFacts, has_learned
from fastai_tricks.fast.plan import FastArgs, FastPlan, fast_plan
from fastai_tricks.fast.steps import ScoreHead, SmallFirst, TrainAll, TrainHead
from fastai_tricks.resize.callback import ProgressiveResize

# As `vision_learner` leaves a Learner with pretrained weights; the same after a fit; a network from scratch; a plain transformer
TUNE = FastFacts(n=1200, bs=64, frozen=True, loaded=True, weights='trained', norms=True)
AGAIN = replace(TUNE, frozen=False, fitted=True)
SCRATCH = FastFacts(n=1200, bs=64, weights='new', norms=True, size=(128,128))
BLIND = FastFacts(n=1200, bs=64)
LOW,HIGH = slice(1e-4,3e-4),4e-3
SMALL = SmallFirst((32,64), until=.93, strength=(.3,1.))
MINE = ProgressiveResize(.75)
def tune(epochs=5, **kwargs): return TrainAll(epochs, **{'lr':LOW, 'keep_bn':True, **kwargs})
def scratch(epochs=5, **kwargs): return TrainAll(epochs, **{'lr':HIGH, 'resize':SMALL, **kwargs})

CASES = dict(
    tune=(TUNE, {}, (TrainHead(10),tune())),
    again=(AGAIN, {}, (tune(),)),
    new_weights=(replace(AGAIN, fitted=False), {}, (TrainHead(10),tune())), # Loaded into a plain network, never frozen
    head_alone=(TUNE, dict(epochs=0), (TrainHead(10),ScoreHead())),
    head_asked=(AGAIN, dict(head=3), (TrainHead(3),tune())),
    no_head_asked=(TUNE, dict(head=0), (tune(),)),
    rate=(TUNE, dict(lr=1e-3), (TrainHead(10),tune(lr=1e-3))),
    rates=(TUNE, dict(lr=slice(1e-5,1e-3)), (TrainHead(10),tune(lr=slice(1e-5,1e-3)))),
    norm_learns=(TUNE, dict(keep_bn=False), (TrainHead(10),tune(keep_bn=False))),
    tpu=(replace(TUNE, tpu=True), {}, (TrainHead(10),tune(keep_bn=False))),
    no_norm=(replace(TUNE, norms=False), {}, (TrainHead(10),tune(keep_bn=False))),
    tune_small=(replace(TUNE, size=(128,128)), dict(resize=True), (TrainHead(10),tune(resize=SMALL))),
    tune_mine=(TUNE, dict(resize=MINE), (TrainHead(10),tune(resize=MINE))),
    tune_batches=(TUNE, dict(bs=16), (TrainHead(10),tune(bs=16))),
    tune_few=(replace(TUNE, n=100), {}, (TrainHead(10),tune())), # The loader's batches stay
    tune_fewer=(replace(TUNE, n=60), {}, (TrainHead(10),tune(bs=56))), # As long as images fill one
    tune_last=(replace(TUNE, n=60, drop_last=False), {}, (TrainHead(10),tune())),
    told_pretrained=(SCRATCH, dict(pretrained=True), (TrainHead(10),tune())),
    scratch=(SCRATCH, {}, (scratch(),)),
    scratch_few=(replace(SCRATCH, n=360), {}, (scratch(bs=16),)),
    scratch_batches=(replace(SCRATCH, n=360), dict(bs=64), (scratch(),)),
    scratch_norm=(SCRATCH, dict(keep_bn=True), (scratch(keep_bn=True),)),
    scratch_head=(SCRATCH, dict(head=2), (TrainHead(2),scratch())),
    scratch_full=(SCRATCH, dict(resize=False), (scratch(resize=None),)),
    scratch_tiny=(replace(SCRATCH, size=(32,48)), {}, (scratch(resize=None),)), # Nothing is below 32 px
    scratch_fixed=(replace(SCRATCH, fixed='it takes none'), {}, (scratch(resize=None),)),
    fixed_not_asked=(replace(SCRATCH, fixed='it takes none'), dict(resize=False), (scratch(resize=None),)),
    scratch_there=(replace(SCRATCH, resized=True), dict(resize=True), (scratch(resize=None),)),
    scratch_pytorch=(replace(SCRATCH, n=360, bs=None), {}, (scratch(),)),
    scratch_endless=(replace(SCRATCH, n=None), {}, (scratch(),)),
    told_scratch=(replace(BLIND, size=(128,128)), dict(pretrained=False), (scratch(),)),
    blind_again=(replace(BLIND, fitted=True, noted=True), {}, (tune(keep_bn=False),)),
    scratch_again=(replace(SCRATCH, weights='trained', fitted=True, noted=False), {}, (scratch(),)),
    head_trained=(replace(TUNE, head_trained=True), {}, (tune(),)),
    head_trained_again=(replace(TUNE, head_trained=True), dict(epochs=0), (TrainHead(10),ScoreHead())),
    no_head_here=(replace(TUNE, no_head='there is none'), {}, (tune(),)))

@pytest.mark.parametrize('case', CASES)
def test_steps(case):
    facts,asked,steps = CASES[case]
    plan = fast_plan(facts, FastArgs(**{'epochs':5, **asked}))
    if isinstance(steps[0], TrainHead): steps = tuple(replace(s, best=True) if isinstance(s, TrainAll) else s for s in steps)
    assert plan.steps==steps and plan.mixed==isinstance(plan.steps[-1], TrainAll) and plan==fast_plan(facts, FastArgs(**{'epochs':5, **asked}))
    # Each choice has a reason
    args = ['pretrained','head'] + (['lr','keep_bn','resize','bs'] if any(isinstance(s, TrainAll) for s in steps) else ['mixed'])
    assert [k for k,_ in plan.why]==args and all(reason for _,reason in plan.why)
    assert all(reason=='as asked' for k,reason in plan.why if k in asked and not (k=='resize' and facts.resized))

def test_whole_plan():
    assert fast_plan(TUNE, FastArgs(5))==FastPlan(True, (TrainHead(10),TrainAll(5, LOW, keep_bn=True, best=True)), True, (
        ('pretrained','loaded by `vision_learner`'), ('head','it is new on pretrained weights'), ('lr','pretrained weights move little, the first layers least'),
        ('keep_bn','the head was trained on features under those of pretraining'), ('resize','small images cost pretrained weights accuracy'), ('bs',"the loader's")))
    assert fast_plan(replace(SCRATCH, n=360), FastArgs(5))==FastPlan(False, (TrainAll(5, HIGH, resize=SMALL, bs=16),), True, (
        ('pretrained','the weights are as initialised'), ('head','the body has learned nothing yet'), ('lr','from scratch'), ('keep_bn','from scratch'),
        ('resize','from scratch'), ('bs','more steps in an epoch of 360 images')))

@pytest.mark.parametrize('facts,asked,mixed', [(TUNE,{},True), (TUNE,dict(mixed=False),False), (replace(TUNE, precise=True),{},False), (TUNE,dict(epochs=0),False)])
def test_precision(facts, asked, mixed): assert fast_plan(facts, FastArgs(**{'epochs':5, **asked})).mixed==mixed

def test_last_weights_where_asked():
    assert fast_plan(TUNE, FastArgs(5, best=False)).steps[-1]==tune() and fast_plan(TUNE, FastArgs(5)).steps[-1]==tune(best=True)

def test_why_no_head():
    why = dict(fast_plan(replace(TUNE, no_head='there is none'), FastArgs(5)).why)['head']
    assert why=='there is none' and dict(fast_plan(AGAIN, FastArgs(5)).why)['head']=='the head was trained before'

LINES = [
    (TUNE, {}, 'pretrained: 10 epochs of the head on features computed once; then 5 epochs of the whole network at rates up to 0.0003, batch norm keeps its statistics; to_mixed'),
    (TUNE, dict(epochs=0, mixed=False), 'pretrained: 10 epochs of the head on features computed once; then its score'),
    (AGAIN, dict(epochs=1, lr=.01), 'pretrained: 1 epoch of the whole network at rates up to 0.01, batch norm keeps its statistics; to_mixed; the whole network at once: the head was trained before'),
    (replace(TUNE, no_head='there is none'), dict(mixed=False), 'pretrained: 5 epochs of the whole network at rates up to 0.0003, batch norm keeps its statistics; the whole network at once: there is none'),
    (replace(TUNE, no_head='there is none'), dict(mixed=False, head=0, keep_bn=False), 'pretrained: 5 epochs of the whole network at rates up to 0.0003; the whole network at once: as asked'),
    (replace(SCRATCH, fixed='it takes none'), dict(epochs=1, mixed=False), 'from scratch: 1 epoch of the whole network at rates up to 0.004; at full size throughout: it takes none'),
    (SCRATCH, dict(resize=False, mixed=False), 'from scratch: 5 epochs of the whole network at rates up to 0.004'),
    (replace(SCRATCH, size=(32,48)), dict(mixed=False), 'from scratch: 5 epochs of the whole network at rates up to 0.004; at full size throughout: no multiple of 32 px is below 32×48 px'),
    (replace(SCRATCH, n=360), {}, 'from scratch: 5 epochs of the whole network at rates up to 0.004, images of 32 and 64 px until 93%, batches of 16; to_mixed'),
    (TUNE, dict(resize=MINE, head=1, keep_bn=False), 'pretrained: 1 epoch of the head on features computed once; then 5 epochs of the whole network at rates up to 0.0003, small images first; to_mixed')]

@pytest.mark.parametrize('facts,asked,line', LINES)
def test_line(facts, asked, line): assert str(fast_plan(facts, FastArgs(**{'epochs':5, **asked})))==line

def test_table():
    shown = fast_plan(TUNE, FastArgs(5))._repr_markdown_()
    assert '2. 5 epochs of the whole network' in shown and '| `pretrained` | loaded by `vision_learner` |' in shown

@pytest.mark.parametrize('facts,learned', [
    (TUNE,True), (AGAIN,True), (replace(TUNE, weights='new'),None), (replace(TUNE, noted=False),False), (SCRATCH,False), (replace(SCRATCH, fitted=True, frozen=True),False),
    (replace(SCRATCH, loaded=False),False), (replace(SCRATCH, noted=True),True), (replace(SCRATCH, weights='trained'),True), (replace(SCRATCH, weights='trained', fitted=True),None),
    (replace(SCRATCH, loaded=False, weights='trained'),True), (replace(SCRATCH, loaded=False, weights='trained', fitted=True),None),
    (replace(SCRATCH, weights='between'),None), (replace(SCRATCH, loaded=False, weights='between', fitted=True),False), (replace(BLIND, loaded=False),False),
    (replace(BLIND, loaded=False, fitted=True),None), (BLIND,None), (replace(BLIND, fitted=True, frozen=True),None)])
def test_what_has_learned(facts, learned): assert has_learned(facts)[0] is learned

@pytest.mark.parametrize('facts,asked,match', [
    (BLIND, {}, '`pretrained` must be True or False'),
    (replace(TUNE, no_head='there is none'), dict(head=3), '`head` must be 0 or None here, as there is none, not 3'),
    (replace(TUNE, no_head='there is none'), dict(epochs=0), '`epochs` must be a positive integer here, as there is none, not 0'),
    (replace(SCRATCH, fixed='it takes none'), dict(resize=True), '`resize` must be False or None here, as it takes none, not True'),
    (replace(TUNE, fixed='it takes none'), dict(resize=MINE), '`resize` must be False or None here, as it takes none'),
    (AGAIN, dict(epochs=0), '`epochs` must be a positive integer where no head is trained first'),
    (replace(TUNE, tpu=True), dict(keep_bn=True), '`keep_bn` must be False or None on a TPU'),
    (replace(TUNE, n=60), dict(bs=64), '`bs` must be at most the 60 training images'),
    (replace(TUNE, bs=None), dict(bs=8), '`bs` must be None with loaders')])
def test_refused(facts, asked, match):
    with pytest.raises(ValueError, match=match): fast_plan(facts, FastArgs(**{'epochs':5, **asked}))

@pytest.mark.parametrize('bad', [dict(epochs=-1), dict(epochs=1.5), dict(lr=0), dict(lr='high'), dict(head=-1), dict(head='yes'), dict(head=True), dict(keep_bn=2), dict(pretrained=2),
                                 dict(bs=0), dict(resize=.5), dict(mixed='fp16'), dict(best='first')])
def test_bad_input(bad):
    with pytest.raises(ValueError, match=f'`{list(bad)[0]}` must be'): FastArgs(**{'epochs':1, **bad})
