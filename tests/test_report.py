"`tips_report`: equal time for all within one budget, killed and taken up again, and a verdict only where the seeds allow one"
import json, random, re
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, RegressionBlock
from fastai.data.transforms import IndexSplitter, Normalize, RandomSplitter, get_image_files, parent_label
from fastai.learner import Metric
from fastai.metrics import accuracy, error_rate
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai_tricks import cli
from fastai_tricks.block import block_with
from fastai_tricks.report import tips_report
from fastai_tricks.report_run import TrainClock, epochs_that_fit, part_of
from fastai_tricks.report_view import TipsReport, interval, seconds_to, verdict
from fastai_tricks.resolution import PILImageDraft
from fastai_tricks.sample import sample_images
from fastai_tricks.tips import TIPS, Recipe, Tip
from fastai_tricks.test_utils import tiny_dls
import fastai_tricks.report_run as report_run

# A world with a clock of its own ----------------------------------------------

class Clock:
    "Seconds that pass only where the model computes"
    def __init__(self, slower=None): self.t,self.slower = 0.,slower or (lambda t: 1)
    def __call__(self): return self.t
    def spend(self, seconds): self.t += seconds*self.slower(self.t)

class Net(nn.Sequential):
    def forward(self, x):
        See.batches.append((self.training, len(x), *x.shape[-2:]))
        # A third for a prediction; a share of each image does not depend on its size
        if clock: clock.spend(len(x)*(1 if self.training else 1/3)*(.1 + .4*x.shape[-1]*x.shape[-2]/64**2))
        return super().forward(x)

class See: batches = []
clock = None
def net(pretrained=False):
    return nn.Sequential(Net(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

class Worth(Callback):
    "Makes the score of a training what a test wants"
    def __init__(self, gain): self.gain = gain
class Score(Metric):
    "Half, what tips are worth, and a little that depends on the seed and the training"
    name = 'score'
    def reset(self): pass
    def accumulate(self, learn): self.learn = learn
    @property
    def value(self):
        gains = [cb.gain for cb in self.learn.cbs if isinstance(cb, Worth)]
        return .5 + sum(gains) + .002*(torch.initial_seed()%7) + .001*len(gains)*(torch.initial_seed()%3)

def worth(name, gain, **kwargs): return Tip(name, learn=f'learn.add_cb(Worth({gain}))', names=dict(Worth=Worth), **kwargs)

PICTURES = {}
def picture(i):
    if i not in PICTURES: PICTURES[i] = PILImage.create(np.random.default_rng(i).integers(0, 255, (64,64,3), dtype=np.uint8))
    return PICTURES[i]
def parity(i): return 'ab'[i%2]
def block(n_valid=8, **kwargs):
    return DataBlock((ImageBlock,CategoryBlock), get_x=picture, get_y=parity, splitter=IndexSplitter(range(n_valid)), item_tfms=Resize(64), **kwargs)
ALL = dict(arch=net, pretrained=False, bs=4, data=dict(num_workers=0, device=torch.device('cpu')))

@pytest.fixture(autouse=True)
def world(monkeypatch):
    See.batches = []
    monkeypatch.setitem(globals(), 'clock', Clock())
    monkeypatch.setattr(report_run.gc, 'collect', lambda: None) # Slow, with all that pytest holds
    yield

def report(out, tips, minutes=None, n=48, db=None, seeds=3, steps=2, **kwargs):
    "About 15 batches for each training"
    if minutes is None: minutes = 1.*max(seeds, 1)*(1+len(tips)+min(steps, len(tips)-1))
    return tips_report(db or block(), list(range(n)), **{**ALL, 'minutes':minutes, 'tips':tips, 'metric':Score(), 'out':out, 'clock':clock, 'seeds':seeds, 'steps':steps, **kwargs})
def order(out): return [(r['seed'],r['name']) for r in (json.loads(f.read_text()) for f in sorted((Path(out)/'runs').glob('*.json')))]

# Time -------------------------------------------------------------------------

@pytest.mark.parametrize('minutes,slower', [(17, None), (18, lambda t: 1 if t<400 else 1.7), (24, lambda t: 1.5 if t<300 else 1)])
def test_budget(tmp_path, minutes, slower):
    clock.slower = slower or clock.slower
    res = report(tmp_path, [worth('good', .02), worth('better', .03), worth('poor', -.02), 'sizes'], minutes)
    assert .9*60*minutes < clock.t < 1.1*60*minutes
    assert res.json['minutes']*60==pytest.approx(clock.t, rel=.01)
    # All of a seed get the same time, whatever an image takes
    for r in res.json['runs']:
        if slower is None: assert r['seconds']==pytest.approx(r['budget'], rel=.1), r['name']
    for s in range(3): assert len({r['budget'] for r in res.json['runs'] if r['seed']==s})==1
    small,base = ([r['images'] for r in res.runs(k)] for k in ('32 px','baseline'))
    if slower is None: assert np.mean(small)/np.mean(base)==pytest.approx(2.5, rel=.1) # .5 and .2 seconds an image

def test_noise_is_not_taken_for_speed(tmp_path):
    "Two that cost the same train on about as many images, though the machine is up to three times as slow at times"
    rng = np.random.default_rng(0)
    speed = [rng.choice([1,1.5,3]) for _ in range(100)]
    clock.slower = lambda t: speed[int(t//40)%100]
    res = report(tmp_path, [worth(k, -.01) for k in "abcd"], 45)
    for s in range(3):
        images = [r['images'] for r in res.json['runs'] if r['seed']==s]
        assert max(images)<1.7*min(images), images

def test_validation_is_timed_apart(tmp_path):
    c = TrainClock(clock, epochs=4, points=2)
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    dls = block(20).dataloaders(list(range(60)), bs=8, num_workers=0, device='cpu')
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=c)
    with learn.no_bar(), learn.no_logging(): learn.fit(4)
    assert c.seconds==pytest.approx(4*40*.5) and c.validation==pytest.approx(2*20*.5/3) and len(c.curve)==2 and c.curve[-1][0]==pytest.approx(c.seconds)

def test_large_validation_set_is_drawn_once(tmp_path):
    seen = []
    class SeeItems(Callback):
        def before_fit(self): seen.append(tuple(self.dls.valid.get_idxs()))
    with_many = report(tmp_path, [Tip('see', learn='learn.add_cb(SeeItems())', names=dict(SeeItems=SeeItems))], 24, n=840, db=block(800), steps=0)
    n,seen = with_many.json['settings']['validated'],seen[-3:] # Without the miniatures
    assert 200<=n<800 and .9*24*60<clock.t<1.1*24*60
    assert f'40 + {n} of 800 images' in with_many.conditions and {len(s) for s in seen}=={n} and len(set(seen))==1

def test_classes_of_a_subset(tmp_path):
    "Loaders made before leave the vocabulary of all classes in the `CategoryBlock`"
    db = DataBlock((ImageBlock,CategoryBlock), get_x=picture, get_y=lambda i: 'abcd'[i%4], splitter=IndexSplitter(range(8)), item_tfms=Resize(64))
    assert len(db.dataloaders(list(range(96)), bs=4, num_workers=0, device='cpu').vocab)==4
    res = report(tmp_path, [worth('good', .02)], n=96, db=db.class_subset(2))
    assert [res.json['settings'][k] for k in ('classes','train','valid')]==[2,44,4]

def test_too_few_minutes(tmp_path):
    with pytest.raises(ValueError, match=r'`minutes` must be at least ([\d.]+).* not 0.5') as e: report(tmp_path, [worth('good', .02)], .5)
    assert not (tmp_path/'runs').exists() and clock.t<60
    report(tmp_path/'enough', [worth('good', .02)], float(re.search(r'at least ([\d.]+)', str(e.value))[1]))
    assert (tmp_path/'enough'/'report.json').exists()

def test_the_best_is_judged_again_with_the_new_seeds(tmp_path):
    "What gained with the first three, and loses more with those that the time left allows, is not recommended"
    class Lucky(Worth):
        @property
        def gain(self): return .02 if torch.initial_seed()<3 else -.3
        @gain.setter
        def gain(self, v): pass
    lucky = Tip('lucky', learn='learn.add_cb(Lucky(0))', names=dict(Lucky=Lucky))
    res = report(tmp_path, [lucky, worth('poor', -.02)], 14) # The time for combinations is left
    assert len(res.differences('lucky'))>3 and np.mean(res.differences('lucky')[:3])>0>np.mean(res.differences('lucky'))
    assert res.json['together']==[] and 'Lucky' not in res.code

@pytest.mark.parametrize('score,said', [(.5,'nothing learned'),(.9,'no difference')])
def test_two_that_learned_nothing_are_not_alike(tmp_path, score, said):
    runs = [dict(name=k, seed=i, score=score, seconds=1., images=10, curve=[[1.,score]]) for i in range(3) for k in ('baseline','tip')]
    settings = dict(level=.95, small=.01, lower=False, train=10, chance=.5, validated=40)
    assert TipsReport(dict(settings=settings, tips={}, runs=runs, left_out={}, together=[])).df.verdict.tolist()==['',said]

def test_epochs_are_close_for_any_budget():
    for n,bs in ((100,8),(1000,64),(50_000,32)):
        for images in np.geomspace(12*bs, 40*n, 60):
            e,k = epochs_that_fit(images, n, bs)
            assert e>=6 and k%bs==0 and k<=n and abs(e*k/images-1)<.08, (n, bs, images, e, k)

# Order and resumption -----------------------------------------------------------

def test_fair_order(tmp_path):
    report(tmp_path, [worth('a', -.01), worth('b', -.01)])
    got = order(tmp_path)
    assert [s for s,_ in got[:9]]==[0]*3 + [1]*3 + [2]*3
    assert [[k for t,k in got if t==s] for s in range(3)]==[['baseline','a','b'],['a','b','baseline'],['b','baseline','a']]

@pytest.mark.parametrize('kill', [4, 9]) # In the second round, and in the combination
def test_killed_and_taken_up_again(tmp_path, monkeypatch, kill):
    tips = [worth('a', .01), worth('b', .02)]
    whole = report(tmp_path/'whole', tips)
    clock.t,train,n = 0.,report_run._Bench.train,[0]
    def dies(self, *args, points=4, **kwargs):
        if self.plan is not None:
            n[0] += 1
            if n[0]==kill+1: raise KeyboardInterrupt
        return train(self, *args, **kwargs) if points==4 else train(self, *args, points=points, **kwargs)
    monkeypatch.setattr(report_run._Bench, 'train', dies)
    with pytest.raises(KeyboardInterrupt): report(tmp_path/'killed', tips)
    assert len(order(tmp_path/'killed'))==kill and not (tmp_path/'killed'/'report.json').exists()
    # Half of a file is none
    (tmp_path/'killed'/'runs'/'099 0 a.json.tmp').write_text('{"name": "a"')
    n[0] = -99
    again = report(tmp_path/'killed', tips)
    assert n[0]==-99+len(again.json['runs'])-kill
    pd.testing.assert_frame_equal(whole.df, again.df)
    assert again.code==whole.code and order(tmp_path/'killed')==order(tmp_path/'whole')
    # All done: nothing is trained
    n[0],See.batches = 0,[]
    report(tmp_path/'killed', tips)
    assert n[0]==0 and not any(training for training,*_ in See.batches)

def test_other_settings_are_refused(tmp_path):
    tips = [worth('a', -.01)]
    report(tmp_path, tips)
    for kw,what in ((dict(minutes=5), "minutes 6.0"), (dict(lr=.1), 'lr = 0.1'), (dict(n=90), 'items'), (dict(tips=[worth('b', .1)]), "tips \\['a'\\]")):
        with pytest.raises(ValueError, match=f'other settings:.*{what}'): report(tmp_path, **{**dict(tips=tips), **kw})
    See.batches = []
    report(tmp_path, tips, 6.5, seeds=1, resume=False)
    assert TipsReport.load(tmp_path).json["settings"]["minutes"]==6.5 and len({r['budget'] for r in TipsReport.load(tmp_path).json['runs'] if r['seed']==0})==1
    assert sum(n for training,n,*_ in See.batches if training)>sum(r['images'] for r in TipsReport.load(tmp_path).json['runs'])
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='`out`'): report(tmp_path/'mine', tips, resume=False)
    assert (tmp_path/'mine'/'notes.txt').read_text()=='mine'

# What it says -------------------------------------------------------------------

@pytest.mark.parametrize('diffs,kw,want', [([.1], {}, 'too few seeds'), ([.1,.1], {}, 'too few seeds'), ([.1,.1,.1], {}, 'pays'), ([-.1,-.1,-.1], {}, 'costs'), ([0.,0.,0.], {}, 'no difference'),
    ([.02,.04,.06], {}, 'not told apart'), ([.03,.04,.05], {}, 'pays'), ([.03,.04,.05], dict(level=.99), 'not told apart'), ([.03,.04,.05], dict(lower=True), 'costs'),
    ([-.03,-.04,-.05], dict(lower=True), 'pays'), ([.002,-.002,.001], {}, 'no difference'), ([.002,-.002,.001], dict(small=.001), 'not told apart')])
def test_verdict(diffs, kw, want): assert verdict(diffs, **kw)==want

def test_interval():
    # t of 95% with 2 and 4 degrees of freedom: 4.3027 and 2.7764
    assert interval([.03,.04,.05])==pytest.approx((.04, .04-4.302653*.01/3**.5, .04+4.302653*.01/3**.5), abs=1e-7)
    assert interval([1.,2.,3.,4.,5.])[1]==pytest.approx(3-2.776445*2.5**.5/5**.5, abs=1e-5)
    m,a,b = interval([.5])
    assert m==.5 and np.isnan(a) and np.isnan(b)

def test_verdicts_and_combination(tmp_path):
    res = report(tmp_path, [worth('good', .02), worth('poor', -.03), worth('better', .03), worth('spoils', .01)])
    df = res.df.set_index('tip')
    assert list(df.index)==['baseline','good','poor','better','spoils','good + better' if 'good + better' in df.index else 'better + good','better + good + spoils']
    assert dict(df.verdict.iloc[1:5])==dict(good='pays', poor='costs', better='pays', spoils='pays')
    assert df.difference['poor']==pytest.approx(-.029) and df.score['baseline']==pytest.approx(.502)
    assert res.json['together']==['better','good','spoils'] and [l for l in res.code.splitlines() if 'Worth' in l]==['learn.add_cb(Worth(0.02))','learn.add_cb(Worth(0.03))','learn.add_cb(Worth(0.01))']
    assert np.isnan(df.to_baseline['poor']) and df.to_baseline['good']<=df.seconds['good']

def test_lower_is_better(tmp_path):
    class Loss(Score): name = 'made_up_loss'
    res = report(tmp_path, [worth('good', -.03), worth('poor', .03)], metric=Loss())
    assert dict(res.df.set_index('tip').verdict)=={'baseline':'', 'good':'pays', 'poor':'costs'} and res.json['together']==['good']

def test_no_verdict_without_seeds(tmp_path):
    for n in (1,2): assert list(report(tmp_path/str(n), [worth('good', .2)], n+2.4, seeds=n).df.verdict)==['','too few seeds']

def test_tips_that_cannot_apply_are_listed(tmp_path, capsys):
    fails = Tip('fails', learn='learn.no_such_thing()')
    dls = block().dataloaders(list(range(32)), bs=4, num_workers=0, device='cpu')
    res = tips_report(dls, **{**ALL, 'data':None}, minutes=11, tips=['draft','albumentations','sizes','batch',fails,worth('a', .01)], metric=Score(), out=tmp_path, clock=clock)
    said = capsys.readouterr().out
    assert set(res.left_out)=={'draft','albumentations','sizes','batch','fails'} and res.names==['baseline','a']
    for k,v in res.left_out.items(): assert f'left out: {k}: {v}' in said and v in repr(res)
    assert 'DataBlock' in res.left_out['draft'] and "no_such_thing" in res.left_out['fails']
    small = block_with(block(), size=32)
    res = report(tmp_path/'small', ['sizes','progressive','draft',worth('a', .01)], db=small)
    assert set(res.left_out)=={'sizes','progressive'} and 'multiple of 32' in res.left_out['sizes'] and 'draft' in res.names

def test_combination_that_fails_costs_nothing_else(tmp_path):
    once = 'assert not hasattr(learn, "mine")\nlearn.mine = 1'
    res = report(tmp_path, [Tip('a', learn='learn.add_cb(Worth(.02))\n'+once, names=dict(Worth=Worth)), Tip('b', learn='learn.add_cb(Worth(.01))\n'+once, names=dict(Worth=Worth))])
    assert res.json['together']==['a'] and 'AssertionError' in res.left_out['a + b']

def test_html_opens_without_a_network(tmp_path):
    res = report(tmp_path, [worth('<b>good</b>', .02)])
    text = res.to_html().read_text()
    assert not re.search(r'https?://|<script|<link|@import|url\(', text) and re.findall(r'src="(.{22})', text)==['data:image/png;base64,']
    assert '<b>good</b>' not in text and '&lt;b&gt;good&lt;/b&gt;' in text and 'pays' in text and 'learn.fit_one_cycle' in text
    assert not list(tmp_path.glob('*.tmp'))
    loaded = TipsReport.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.df, res.df)
    assert 'too few' not in loaded._repr_html_()

# The lines ----------------------------------------------------------------------

class Watch(Callback):
    "What the model and the optimiser got"
    order,run_valid = 99,False
    def __init__(self): self.shapes,self.lrs,self.types = [],[],set()
    def after_pred(self): self.shapes.append(tuple(self.xb[0].shape))
    def after_step(self): self.lrs.append(self.opt.hypers[-1]['lr'])

def watched(tips, epochs=6, images=48, recipe=None, db=None, n=100):
    db,recipe = db or block(),recipe or Recipe(net, accuracy, 'fit_one_cycle', 8, learner=dict(pretrained=False), data=ALL['data'])
    data = type('Data', (), dict(dblock=db, source=list(range(n)), loaders=False, bs=8))
    bench = report_run._Bench(data, recipe, 1, [0], 2, Path('none'), clock, dict(net=net, accuracy=accuracy, device=ALL['data']['device'], data=ALL['data']))
    watch = Watch()
    watch.record = bench.train(tips, 0, epochs, images, cbs=watch)
    return watch

def here(**kwargs): return type('O', (), {**dict(no_block=None, no_size=None, dblock=block(), items=['a.jpg'], size=(64,64), n=100, bs=8, tuning=False), **kwargs})

def test_plain_training():
    w = watched([])
    assert set(w.shapes)=={(8,3,64,64)} and len(w.shapes)==6*6 and max(w.lrs)==pytest.approx(1e-3, rel=.01)
    assert w.record['images']==6*48 and len(w.record['curve'])==4

def test_each_tip_changes_what_the_model_gets():
    assert set(watched([TIPS['sizes'](here())[0]]).shapes)=={(8,3,32,32)}
    sizes = [s[-1] for s in watched([TIPS['progressive'](here())]).shapes]
    assert sizes[0]==32 and sizes[-1]==64 and sizes==sorted(sizes)
    w = watched([TIPS['batch'](here())])
    assert set(w.shapes)=={(16,3,64,64)} and max(w.lrs)==pytest.approx(2e-3, rel=.01)
    w = watched([TIPS['warmup'](here())])
    assert w.lrs[0]==0 and w.lrs[5]==pytest.approx(1e-3/25, rel=.25)
    w = watched([TIPS['sizes'](here())[0], TIPS['batch'](here())])
    assert set(w.shapes)=={(16,3,32,32)}

def test_albumentations_takes_the_place_of_augmentations():
    pytest.importorskip('albumentations')
    t = TIPS['albumentations'](here())
    db = block(batch_tfms=aug_transforms())
    names = {}
    exec('from fastai.vision.all import *\nfrom fastai_tricks.all import *', names)
    names['dblock'] = db
    exec(t.block, names)
    assert {type(f).__name__ for f in names['dblock'].item_tfms}=={'_PhotoTfm','ToTensor'} and [type(f).__name__ for f in names['dblock'].batch_tfms]==['IntToFloatTensor']
    assert {type(f).__name__ for f in db.item_tfms}=={'Resize','ToTensor'} and len(db.batch_tfms)>1
    assert set(watched([t], db=db).shapes)=={(8,3,64,64)}

def test_depthwise_learns_from_the_network_it_was():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Conv2d(3, 8, 3, 2, 1),nn.Conv2d(8, 8, 3, 2, 1)
        def forward(self, x): return self.b(self.a(x))
    def two(pretrained=False): return nn.Sequential(Body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    t = Tip('depthwise', switch="dense = learn.model\nlearn.to_depthwise(select=['0.0.b'])", cbs='Distill(dense), look', names=dict(look=(look := Look()), two=two))
    for fit,first in (('fit_one_cycle', 2), ('fine_tune', 2)):
        look.names = None
        recipe = Recipe(two, accuracy, fit, 8, learner=dict(pretrained=False), data=ALL['data'])
        w = watched([t], recipe=recipe)
        assert w.record['images']==6*48 and 'DepthwiseSeparableConv' in look.names and look.distil

class Look(Callback):
    def before_fit(self): self.names,self.distil = {type(m).__name__ for m in self.model.modules()},hasattr(self.learn, 'distill')

def test_fit_code():
    tune,scratch = Recipe('a', accuracy),Recipe('a', accuracy, 'fit_one_cycle', 16, .01)
    warm,batch,switch = Tip('w', fit=dict(fine_tune='fine_tune_warmup', fit_one_cycle='fit_warmup_one_cycle')),Tip('b', bs=2),Tip('s', switch='x = 1', cbs='C()')
    def code(r, *tips, n=9): return Recipe(r.arch, r.metric, r.fit, r.bs, r.lr, tips=tips).fit_code(n)
    assert code(tune)=='learn.fine_tune(8)' and code(scratch)=='lr = 0.01\nlearn.fit_one_cycle(9, lr)'
    assert code(tune, warm)=='learn.fine_tune_warmup(8)' and code(scratch, warm)=='lr = 0.01\nlearn.fit_warmup_one_cycle(9, lr)'
    assert code(tune, batch)=='lr = linear_scaled_lr(128, 0.002, 64)\nlearn.fine_tune(8, lr)'
    assert code(tune, warm, switch)=='lr = 0.002\nlearn.fine_tune_warmup(2, lr)\nx = 1\nlearn.fit_one_cycle(6, slice(lr/200, lr/2), cbs=[C()])'

def test_code_runs_on_the_same_data(tmp_path):
    folder = sample_images()
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())[:3]
    dblock = DataBlock((ImageBlock,CategoryBlock), get_items=partial(get_image_files, folders=classes), get_y=parent_label, splitter=RandomSplitter(.3, seed=1), item_tfms=Resize(64), batch_tfms=aug_transforms())
    one = Tip('small', block='dblock = block_with(dblock, size=32)\nadd = Worth', names=dict(Worth=Worth), learn='learn.add_cb(add(.02))')
    res = tips_report(dblock, folder, net, 16, [one,'progressive','batch'], seeds=1, metric=Score(), out=tmp_path, bs=8, data=dict(num_workers=0), pretrained=False, clock=clock)
    assert 'small' in res.json['together']
    See.batches = []
    names = dict(dblock=dblock, source=folder, net=net, metric=Score(), Worth=Worth)
    exec('from fastai.basics import defaults\n' + res.code.replace('learn.fit_one_cycle(', 'ctx = [learn.no_bar(), learn.no_logging()]\nfor c in ctx: c.__enter__()\nlearn.fit_one_cycle('), names)
    assert See.batches and {s for training,_,*s in See.batches if training for s in s}<={32,64}
    assert {b[2] for b in See.batches if not b[0]}=={32} # Validation too

# As it was ----------------------------------------------------------------------

def test_nothing_given_is_changed(tmp_path):
    random.seed(3); np.random.seed(4); torch.manual_seed(5)
    states = random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state()
    db = block(batch_tfms=[*aug_transforms()])
    was = [*db.item_tfms],[*db.batch_tfms],db.splitter,db.get_items,[*db.type_tfms]
    report(tmp_path/'a', ['sizes','albumentations',worth('a', .01)], seeds=1, minutes=9, db=db)
    assert ([*db.item_tfms],[*db.batch_tfms],db.splitter,db.get_items,[*db.type_tfms])==was
    assert random.getstate()==states[0] and np.random.get_state()[1].tolist()==states[1] and torch.equal(torch.get_rng_state(), states[2])
    dls = block().dataloaders(list(range(100)), bs=8, num_workers=0, device='cpu')
    was = [(dl, [*dl.after_item.fs], [*dl.after_batch.fs], len(dl), dl.rng.getstate()) for dl in dls.loaders]
    # fastai adds a `Normalize` to the loaders of a pretrained network
    tips_report(dls, arch=lambda pretrained=False: net(), minutes=12, seeds=1, tips=['progressive',Tip('norm', learn='dls.add_tfms([Normalize.from_stats([.5]*3, [.5]*3)], "after_batch")')], metric=Score(), out=tmp_path/'b', pretrained=False, clock=clock)
    assert [(dl, [*dl.after_item.fs], [*dl.after_batch.fs], len(dl), dl.rng.getstate()) for dl in dls.loaders]==was

def test_part_of_is_drawn_anew_for_training_and_fixed_for_validation():
    dls = block().dataloaders(list(range(100)), bs=8, num_workers=0, device='cpu')
    part = part_of(dls, 16, [3,7])
    got = [tuple(part.train.get_idxs()) for _ in range(5)]
    assert len(set(got))==5 and all(len(set(g))==16 for g in got)
    assert [len(y) for _,y in part.valid]==[2] and len(dls.train)==11 and len(dls.valid)==1

# Bad input ----------------------------------------------------------------------

@pytest.mark.parametrize('kw,what', [(dict(minutes=0), '`minutes`'), (dict(minutes='x'), '`minutes`'), (dict(seeds=0), '`seeds`'), (dict(tips=['no']), "`tips`.*'mixed'"), (dict(arch='resnet_34'), "`arch`.*'resnet34"),
    (dict(arch=3), '`arch`'), (dict(bs=64), '`bs`'), (dict(metric=3), '`metric`'), (dict(level=2.), '`level`'), (dict(tips=[Tip('baseline')]), '`tips`'), (dict(lr=-1), '`lr`'), (dict(steps=-1), '`steps`')])
def test_bad_arguments(tmp_path, kw, what):
    with pytest.raises(ValueError, match=what): report(tmp_path/'x', **{'tips':[worth('a', .1)], **kw})
    assert not (tmp_path/'x').exists() and clock.t==0

def test_bad_data(tmp_path):
    def at(db, source, what):
        with pytest.raises(ValueError, match=what): tips_report(db, source, **ALL, minutes=4, out=tmp_path/'x', clock=clock)
        assert not (tmp_path/'x').exists()
    folders = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(64))
    at(folders, tmp_path/'nowhere', '`source`')
    at(folders, None, '`source`')
    at('photos', None, '`dblock_or_dls`')
    at(tiny_dls(), 'photos', '`source`')
    at(DataBlock((ImageBlock,CategoryBlock), get_x=picture, get_y=lambda i: 'a', splitter=IndexSplitter([0,1]), item_tfms=Resize(64)), list(range(40)), '`source`.*1 class')
    at(DataBlock((ImageBlock,CategoryBlock), get_x=picture, get_y=lambda i: 'b' if i==30 else 'a', splitter=IndexSplitter([0,1]), item_tfms=Resize(64)), list(range(40)), 'few training images of b')
    at(DataBlock((ImageBlock,RegressionBlock), get_x=picture, get_y=float, splitter=IndexSplitter([0,1]), item_tfms=Resize(64)), list(range(40)), 'CategoryBlock')
    at(block(n_valid=0), list(range(40)), 'validat')

# Command line -------------------------------------------------------------------

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp('photos')
    for k in 'ab':
        (root/k).mkdir()
        for i in range(20): PILImage.create(np.random.default_rng(i).integers(0, 255, (40,40,3), dtype=np.uint8)).save(root/k/f'{i}.jpg')
    pd.DataFrame([(f'{k}/{i}.jpg', k) for k in 'ab' for i in range(20)], columns=['file','kind']).to_csv(root/'all.csv', index=False)
    return root

@pytest.mark.parametrize('csv', [False,True])
def test_command(tmp_path, photos, capsys, csv):
    args = ['report', str(photos), '--arch', 'test_resnet', '--scratch', '--minutes', '.2', '--seeds', '1', '--size', '32', '--bs', '4', '--tips', 'warmup', '--num-workers', '0', '--out', str(tmp_path/'out')]
    cli.main(args + (['--csv', str(photos/'all.csv'), '--fn-col', 'file', '--label-col', 'kind'] if csv else []))
    out = capsys.readouterr().out
    assert (tmp_path/'out'/'report.html').exists() and 'warmup' in out and 'too few seeds' in out
    code = out[out.index('from fastai.vision.all import *'):out.rindex('learn.f')] # Without the fit
    names = {}
    exec(code, names)
    assert (len(names['dls'].train_ds), len(names['dls'].valid_ds), names['dls'].vocab)==(32, 8, ['a','b'])

def test_command_says_what_is_wrong(tmp_path, photos, capsys):
    for args,what in ((['no/such'], 'PATH must be a folder'), ([str(photos), '--csv', 'no.csv'], '--csv must be'), ([str(photos), '--csv', str(photos/'all.csv')], "no column 'image'"),
                      ([str(photos), '--arch', 'nonet', '--out', str(tmp_path/'x')], '`arch`')):
        with pytest.raises(SystemExit) as e: cli.main(['report', *args])
        assert e.value.code==2 and what in capsys.readouterr().err
