"A tip is its lines, and a reason where it has none here"
from types import SimpleNamespace
import math, pytest, torch
from torch import nn
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.augment import aug_transforms
from fastai_tricks.data.block import block_with
from fastai_tricks.report.tips import TIPS, Here, Recipe, Tip, tips_here
from report_world import block

def here(**kwargs): return Here(**{**dict(learner=None, dblock=block(), items=['a.jpg'], size=(64,64), n=100, bs=8, tuning=False), **kwargs})

def test_fit_code():
    tune,scratch = Recipe('a', accuracy),Recipe('a', accuracy, 'fit_one_cycle', 16, .01)
    warm,batch,switch = Tip('w', fit=dict(fine_tune='fine_tune_warmup', fit_one_cycle='fit_warmup_one_cycle')),Tip('b', bs=2),Tip('s', switch='x = 1', cbs='C()')
    def code(r, *tips, n=9): return Recipe(r.arch, r.metric, r.fit, r.bs, r.lr, tips=tips).fit_code(n)
    assert code(tune)=='learn.fine_tune(8)' and code(scratch)=='lr = 0.01\nlearn.fit_one_cycle(9, lr)'
    assert code(tune, warm)=='learn.fine_tune_warmup(8)' and code(scratch, warm)=='lr = 0.01\nlearn.fit_warmup_one_cycle(9, lr)'
    assert code(tune, batch)=='lr = linear_scaled_lr(128, 0.002, 64)\nlearn.fine_tune(8, lr)'
    assert code(tune, warm, switch)=='lr = 0.002\nlearn.fine_tune_warmup(2, lr)\nx = 1\nlearn.fit_one_cycle(6, slice(lr/200, lr/2), cbs=[C()])'

@pytest.mark.parametrize('kw,names', [
    (dict(dblock=None), {'draft','albumentations','sizes','batch'}), # Loaders
    (dict(size=(32,32), dblock=block_with(block(), size=32)), {'sizes','progressive'}),
    (dict(items=['a.png']), {'draft'}), (dict(n=31), {'batch'}), (dict(n=32), set())])
def test_what_cannot_apply_is_left_out(kw, names):
    entries = ['draft','albumentations','sizes','progressive','ema','warmup','batch']
    found,left_out = tips_here(entries, here(**kw))
    assert set(left_out)==names and all(left_out.values()) and 'ema' in [t.name for t in found]

def test_reasons():
    assert 'DataBlock' in TIPS['draft'](here(dblock=None)) and 'multiple of 32' in TIPS['sizes'](here(size=(32,32)))
    unknown = block(batch_tfms=lambda x: x)
    assert 'set the size' in TIPS['sizes'](here(dblock=unknown)) and 'set the size' in TIPS['albumentations'](here(dblock=unknown))

def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setattr('fastai_tricks.report.tips.find_spec', lambda name: None)
    assert 'pip install fastai_tricks[albumentations]' in TIPS['albumentations'](here())

def test_albumentations_takes_the_place_of_augmentations():
    pytest.importorskip('albumentations')
    db,names = block(batch_tfms=aug_transforms()),{}
    exec('from fastai.vision.all import *\nfrom fastai_tricks.all import *', names)
    names['dblock'] = db
    exec(TIPS['albumentations'](here()).block, names)
    assert {type(f).__name__ for f in names['dblock'].item_tfms}=={'_PhotoTfm','ToTensor'} and [type(f).__name__ for f in names['dblock'].batch_tfms]==['IntToFloatTensor']
    assert {type(f).__name__ for f in db.item_tfms}=={'Resize','ToTensor'} and len(db.batch_tfms)>1

def test_what_was_measured_is_looked_at_before_lines_are_made_of_it():
    "It may have been kept in a file"
    convs = SimpleNamespace(model=nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))
    def tip(name, **choice): return TIPS[name](here(learner=lambda: convs, chosen={name:choice}))
    t = tip('depthwise', select=['1'])
    assert "select=['1']" in t.switch and t.choice==dict(select=['1'])
    for bad in (['2'], ["1'] or planted() or ['"], '1', [['1']]):
        with pytest.raises(ValueError, match='`select` must be'): tip('depthwise', select=bad)
    assert tip('mixed', dtype='float16', channels_last=False).learn=='learn.to_mixed(torch.float16)'
    assert tip('mixed', dtype=None, channels_last=True).learn=='learn.add_cb(ChannelsLastBatch())' and isinstance(tip('mixed', dtype=None, channels_last=False), str)
    for bad in ('float16) or planted(', 16, 'float32'):
        with pytest.raises(ValueError, match='`dtype` must be'): tip('mixed', dtype=bad, channels_last=False)

def test_a_report_that_goes_on_does_not_time_compiling_again():
    t = TIPS['compile'](here(chosen=dict(compile=dict(pays=True)), seconds=math.inf))
    assert t.learn=='learn.model.compile()' and t.choice

def test_smoothing_does_not_cost_the_weights_of_classes():
    def tip(**kwargs): return TIPS['smoothing'](here(learner=lambda: SimpleNamespace(loss_func=CrossEntropyLossFlat(**kwargs))))
    assert tip().name=='label smoothing' and 'weights' in tip(weight=torch.ones(2))

def test_own_tips_that_would_change_nothing():
    "Without a DataBlock; beside another one that trains; under the name of a combination"
    found,left_out = tips_here([Tip('size', block='x = 1'), Tip('twice', bs=2), Tip('plain', learn='x = 1')], here(dblock=None))
    assert [t.name for t in found]==['plain'] and set(left_out)=={'size','twice'} and 'DataBlock' in left_out['size']
    own,line = Tip('own', train='learn.fit(1)'),Tip('line', learn='x = 1')
    for other in (Tip('a', train='learn.fit(2)'), Tip('b', fit=dict(fine_tune='fit_flat_cos')), Tip('c', switch='x = 1')): assert own.clashes(other) and other.clashes(own)
    assert not own.clashes(line) and Tip('a', arch='x').clashes(Tip('b', arch='y')) and not line.clashes(Tip('a', arch='x'))
    with pytest.raises(ValueError, match='`name` must be a name without'): Tip('a + b')
