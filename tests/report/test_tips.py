"A tip is its lines, and a reason where it has none here"
from types import SimpleNamespace
import math, pytest, torch
from torch import nn
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.augment import aug_transforms
from fastai_tricks.data.block import block_with
from fastai_tricks.report import tips as tips_module
from fastai_tricks.report.tips import TIPS, Here, Recipe, Tip, tips_here
from fastai_tricks.train.loader_report import LoaderFacts
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
    assert t.learn=='learn.add_cb(CompiledTraining())' and t.choice

SLOW = LoaderFacts(50., 200., 50., .75, tries=(('cached',.01),), cache='1.0 GB in memory')

@pytest.fixture
def measured(monkeypatch):
    "`measured(facts, source, seconds)`: what the loader is found to do, and what an image takes one process"
    def put(facts=SLOW, source='files', seconds=.02):
        calls = []
        monkeypatch.setattr(tips_module, 'image_source', lambda dl: source)
        monkeypatch.setattr(tips_module, 'time_items', lambda dl, n: ((0,),(('opening it',seconds),('item transforms',0.),('collating',0.),('batch transforms',9.))))
        monkeypatch.setattr(tips_module, 'loader_facts', lambda *args: calls.append(args) or facts)
        return calls
    return put

def cached_here(**kwargs):
    learn = SimpleNamespace(dls=SimpleNamespace(train=SimpleNamespace(num_workers=4), device='cuda'))
    return TIPS['cached'](here(**{**dict(learner=lambda: learn, image=.02, seconds=1000.), **kwargs}))

def test_a_cache_where_the_loader_is_the_limit(measured):
    calls = measured()
    tip = cached_here()
    assert tip.block=='dblock = cached(dblock)' and tip.choice==dict(pays=True) and len(calls)==1
    assert cached_here(chosen=dict(cached=dict(pays=True)))==tip and len(calls)==1 # Not timed again

@pytest.mark.parametrize('found,kw,why', [
    ({}, dict(dblock=None), 'it changes how images are read'), (dict(source=''), {}, 'images are not opened from files'),
    (dict(source='cache'), {}, 'there is a cache already'), ({}, dict(seconds=3.8), 'a training here sees each image 1.9 times'),
    (dict(seconds=.0079), {}, 'the network, not the loader, is the limit'), # Four workers, 20 ms of training
    (dict(facts=LoaderFacts(900., 100., 98., .02)), {}, 'the network, not the loader, is the limit'),
    (dict(facts=LoaderFacts(50., 200., 50., .75, tries=(('cached',.99),))), {}, 'it would make a training less than 5% faster'),
    (dict(facts=LoaderFacts(50., 200., 50., .75, tries=(('cached',.01),), cache='90.0 GB on disk')), {}, 'the pictures would take 90.0 GB on disk')])
def test_no_cache(measured, found, kw, why):
    calls = measured(**found)
    assert cached_here(**kw).startswith(why) and len(calls)==('facts' in found) # Nothing is trained where it is plain before

def test_workers_of_the_cpu_take_its_time(measured):
    calls,cpu = measured(seconds=.0079),SimpleNamespace(dls=SimpleNamespace(train=SimpleNamespace(num_workers=4), device='cpu'))
    assert isinstance(cached_here(learner=lambda: cpu), Tip) and len(calls)==1

def test_a_cache_stands_behind_what_changes_its_pictures(measured):
    pytest.importorskip('albumentations')
    measured()
    o = here(learner=lambda: SimpleNamespace(dls=SimpleNamespace(train=SimpleNamespace(num_workers=0), device='cuda')))
    tips,_ = tips_here(['cached','sizes','draft','albumentations'], o)
    tips = sorted([tips[0],tips[1],*tips[-2:]], key=lambda t: t.place)
    assert [t.name for t in tips]==['draft','albumentations','32 px','cached'] and not any(a.clashes(b) for a in tips for b in tips if a.kind or b.kind if a is not b)
    lines = Recipe('a', accuracy, tips=tuple(tips)).dls_code().splitlines()
    assert [l.split('(')[0] for l in lines]==['dblock = block_with']*3 + ['dblock = cached','dls = dblock.dataloaders']
    names = {}
    exec('from fastai.vision.all import *\nfrom fastai_tricks.all import *', names)
    names['dblock'] = block()
    for l in lines[:-1]: exec(l, names)
    opener = next(f for fs in names['dblock'].type_tfms for f in fs if hasattr(f, 'cache'))
    assert opener.img_cls.__name__=='PILImageDraft' and [type(f).__name__ for f in opener.item_tfms][0]=='_PhotoTfm' and opener.item_tfms[0].size==(32,32)

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
