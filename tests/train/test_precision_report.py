"The report of precisions: what was measured, and what it advises"
import pytest, torch
from fastai_tricks.core.test_utils import tiny_learner
from fastai_tricks.train import precision_report as R, variants as V
from fastai_tricks.train.precision_report import PrecisionAdvice, precision_advice
from fastai_tricks.train.variants import Trial, Variant, fp32
from steps import quiet, with_speeds

BF16, FP16 = torch.bfloat16, torch.float16

@pytest.fixture
def plt():
    import matplotlib.pyplot as plt
    yield plt
    plt.close('all')

def test_what_is_measured(monkeypatch, plt):
    learn = tiny_learner()
    monkeypatch.setattr(R, 'half_dtype', lambda d: (BF16,''))
    with_speeds(monkeypatch, {'fp32':1, 'fp32, channels_last':1.25, 'bf16':.1, 'bf16, channels_last':.1, 'fp16':2, 'fp16, channels_last':1})
    shapes, step = [], V.training_step
    def noted(learn, xb, yb, v):
        shapes.append((*xb[0].shape, xb[0].dtype))
        return step(learn, xb, yb, v)
    monkeypatch.setattr(V, 'training_step', noted)
    with quiet(learn): report = learn.precision_report(sizes=32, bs=6, compile=False, turns=3)
    r = report.df.set_index('variant')
    assert {s[:4] for s in shapes}=={(6,3,32,32),(2,3,32,32)} # The two images show what is too slow
    assert r.loc['fp16','ratio']==pytest.approx(2) and r.loc['fp32','images_s']==pytest.approx(6) and r.loc['fp16','n']==3
    assert r.loc['bf16','note'].startswith('too slow') and r.loc['bf16','ratio']==pytest.approx(.1) and r.loc['bf16','n']==0
    assert r.loc['fp32','loss_diff']==0<r.loc['fp16','loss_diff']<.1
    assert all(r['peak_mb'][r['n']>0]>0) and set(r['size'])=={'32'}
    assert r.loc['bf16, channels_last','note']=='not tried: see bf16'
    assert report.advice==PrecisionAdvice(Variant(FP16), pytest.approx((2.,2.,2.)), (('bf16',pytest.approx(10)),))
    assert str(report.advice) in report._repr_html_() and str(report.advice) in repr(report)
    ax = report.plot()
    widths = [p.get_width() for p in ax.patches]
    assert widths[:2]==pytest.approx([1,1.25]) and [t.get_text() for t in ax.texts][4]=='12 images/s' and ax.texts[2].get_text().startswith('too slow')

def test_it_names_what_does_not_run(monkeypatch):
    "torch.compile is that of a backend which compiles nothing"
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f: compile(f, backend='eager'))
    learn, step = tiny_learner(), V.training_step
    def broken(learn, xb, yb, v):
        if v.dtype==FP16: raise RuntimeError('"conv" not implemented for Half')
        return step(learn, xb, yb, v)
    monkeypatch.setattr(V, 'training_step', broken)
    with quiet(learn): df = learn.precision_report(channels_last=False, turns=1, compile=True, dtypes=(FP16,)).df
    notes = df.set_index('variant')['note']
    assert 'not implemented for Half' in notes['fp16'] and notes['fp16, compile']=='not tried: see fp16'
    r = df.set_index('variant').loc['fp32, compile']
    assert r['n']==1 and r['compile_s']>0 and r['loss_diff']<1e-3

def test_fp32_must_run():
    learn = tiny_learner()
    def loss(p, y): raise KeyError('boom')
    learn.loss_func = loss
    with quiet(learn), pytest.raises(RuntimeError, match='not even fp32 trains here: .*boom'): learn.precision_report()

@pytest.mark.parametrize('kw', [dict(dtypes=(torch.float64,)), dict(turns=0), dict(bs=0), dict(sizes=-1), dict(sizes=[]), dict(sizes=['a']), dict(sizes=[0]), dict(dtypes=torch.float64)])
def test_bad_arguments(kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be'): tiny_learner().precision_report(**kw)

# What it advises ----------------------------------------------------------------

LAST, HALF, BOTH, COMPILED = Variant(channels_last=True), Variant(BF16), Variant(BF16, True), Variant(compiled=True)

def trials(speeds):
    "In one turn; a negative speed is one that was guessed"
    return [Trial(fp32, times=[1.])] + [Trial(v, times=[1/s]) if s>0 else Trial(v, note='too slow', guess=-s) for v,s in speeds.items()]

@pytest.mark.parametrize('speeds,code', [
    ({LAST:1.2}, '`learn.add_cb(ChannelsLastBatch())`'), ({HALF:1.2}, '`learn.to_mixed(torch.bfloat16, channels_last=False)`'),
    ({HALF:1.2, BOTH:1.3}, '`learn.to_mixed(torch.bfloat16, channels_last=True)`'), ({COMPILED:1.2}, '`learn.add_cb(CompiledTraining())`'),
    ({Variant(FP16, True, True):2}, '`learn.to_mixed(torch.float16, channels_last=True)` and `learn.add_cb(CompiledTraining())`'), ({LAST:1.04}, '')])
def test_how_to_switch_it_on(speeds, code): assert precision_advice([trials(speeds)]).code==code

def test_it_must_be_faster_at_all_sizes_together():
    a, b = trials({HALF:3, LAST:1.1}), trials({HALF:.9, LAST:1.2})
    assert precision_advice([a]).variant==HALF and precision_advice([b]).variant==LAST
    assert precision_advice([a,b])==PrecisionAdvice(LAST, pytest.approx((1.1,1.2)))
    # What was not timed at one of the sizes is not advised
    assert precision_advice([trials({HALF:3}), trials({HALF:-.2})])==PrecisionAdvice(fp32, (1.,1.), (('bf16',5.),))

def test_what_is_said():
    advice = PrecisionAdvice(HALF, (1.9,2.,2.1), (('fp16',10.),), 'no units')
    assert str(advice)=='Train in bf16, 2.00 times as fast as fp32 (1.90 to 2.10): `learn.to_mixed(torch.bfloat16, channels_last=False)`; fp16 takes 10 times as long: no units.'
    assert str(PrecisionAdvice(slow=(('bf16',5.),('fp16',10.))))=='Stay in fp32: nothing tried gains enough (5%, 16 bits 10%); bf16 takes 5 times as long and fp16 takes 10 times as long.'
