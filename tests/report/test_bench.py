"A training of a report: what the model got, what the clock counted"
from collections import Counter
from dataclasses import replace
from functools import partial
from gc import collect
import weakref
import numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, parent_label
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from fastai_tricks.data.image_cache import Kind
from fastai_tricks.data.indexed import Rows
import fastai_tricks.report.bench as bench_module
from fastai_tricks.report.bench import Bench, TrainClock, failure, part_of
from fastai_tricks.report.data import ReportData
from fastai_tricks.report.tips import TIPS, Recipe, Tip
from report_world import DATA, See, block, net, picture
from test_tips import here

def loaders(n=100, n_valid=8, bs=8): return block(n_valid).dataloaders(list(range(n)), bs=bs, num_workers=0, device='cpu')

def test_validation_is_timed_apart():
    c = TrainClock(epochs=4, points=2)
    learn = Learner(loaders(60, 20), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=c)
    c.start()
    with learn.no_bar(), learn.no_logging(): learn.fit(4)
    # The second point is the final score
    assert c.seconds==pytest.approx(4*40*.5) and c.validation==pytest.approx(20*.5/3)
    assert len(c.curve)==1 and c.curve[0][0]==pytest.approx(2*40*.5)

def test_features_of_training_images_count_as_training():
    c = TrainClock(epochs=1, every=True)
    learn = Learner(loaders(60, 20), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=c)
    c.start()
    with learn.no_bar(), learn.no_logging():
        learn.get_preds(dl=learn.dls.train.new(shuffle=False, drop_last=False))
        assert c.head is None and c.seconds==pytest.approx(40*.5/3) and c.validation==0
        learn.fit(1)
    assert c.head==pytest.approx(40*.5/3) and c.seconds==pytest.approx(40*.5/3 + 40*.5) and c.validation==pytest.approx(20*.5/3)

def test_part_of_is_drawn_again_for_training_and_fixed_for_validation():
    dls = loaders()
    part = part_of(dls, 16, [3,7])
    got = [tuple(part.train.get_idxs()) for _ in range(5)]
    assert len(set(got))==5 and all(len(set(g))==16 for g in got)
    assert [len(y) for _,y in part.valid]==[2] and len(dls.train)==11 and len(dls.valid)==1

def test_a_weighted_loader_draws_by_its_weights():
    "In parts of the images, and in all"
    wgts = np.zeros(40)
    wgts[8:13] = 1 # The first five to train on
    dls = block().weighted_dataloaders(list(range(40)), wgts, bs=8, num_workers=0, device='cpu')
    for n in (16,32):
        part = part_of(dls, n).train
        assert len(part)==n//8 and len(part.get_idxs())==n and set(part.get_idxs())<=set(range(5))

def test_what_failed_holds_no_memory(monkeypatch):
    class Big: pass
    def fails(refs):
        big = Big()
        refs.append(weakref.ref(big))
        big.itself = big
        raise MemoryError('too big')
    monkeypatch.setattr(bench_module.gc, 'collect', collect)
    refs = []
    try: fails(refs)
    except MemoryError as e: assert failure(e)=='fails here: MemoryError: too big' and refs[0]() is None

class Watched(Callback):
    "How many images each validation of a fit has"
    def __init__(self, seen): self.seen = seen
    def before_validate(self): self.seen.append(len(self.dl.get_idxs()))

def test_a_fit_that_chooses_never_sees_what_it_is_scored_on():
    seen = []
    t = Tip('own', train='learn.fit_one_cycle({epochs}, cbs=Watched(seen))', chooses=True, names=dict(Watched=Watched, seen=seen))
    w = watched([t], parts=((1,3,4,6,7),(0,2)))
    assert seen==[2]*6 # It may look after each epoch
    scored = [n for training,n,*_ in See.batches if not training and n>1]
    assert scored==[2]*6+[5] and w.record['curve'][-1]==[w.record['seconds'],w.record['score']] and len(w.record['curve'])==7
    See.batches = []
    assert watched([], parts=((1,3,4,6,7),(0,2))).record['images']==6*16
    assert [n for training,n,*_ in See.batches if not training and n>1]==[5]*4 # All others on the same images

def test_fit_fast_and_fit_head_are_trained_as_they_are():
    names = dict(two=two)
    lines = {k:TIPS[k](here(learner=lambda: vision_learner(loaders(), two, pretrained=False), tuning=True)) for k in ('fit_fast','fit_head')}
    assert lines['fit_head'].train=='learn.fit_head()' and lines['fit_fast'].chooses
    fast = replace(lines['fit_fast'], names=names, train='learn.fit_fast({epochs}, pretrained=True)')
    w = watched([fast], epochs=2, images=32, arch=two, parts=((1,3,4,6,7),(0,2)))
    assert w.record['images']==2*32 and 0<len(w.record['curve'])==4 and 'head' in w.record # The head, two epochs, the score
    w = watched([replace(lines['fit_head'], names=names)], epochs=1, images=32, arch=two, parts=((1,3,4,6,7),(0,2)))
    assert w.record['images']==0 and len(w.record['curve'])==1 and w.shapes==[]

class Least(Callback):
    "The smallest number that a validation batch has"
    def __init__(self, seen): self.seen = seen
    def before_batch(self):
        if not self.training: self.seen.append((len(self.xb[0]),float(self.xb[0].min())))

@pytest.mark.parametrize('chooses', [False,True])
def test_scored_on_images_normalized_as_in_training(chooses):
    "Making the Learner of a pretrained network puts `Normalize` into its loaders"
    seen = []
    t = Tip('own', learn="learn.dls.add_tfms([Normalize.from_stats([-9]*3, [1]*3)], 'after_batch')\nlearn.add_cb(Least(seen))",
            chooses=chooses, names=dict(Least=Least, seen=seen))
    watched([t], parts=((1,3,4,6,7),(0,2)))
    assert seen[-1][0]==5 and all(least>=9 for _,least in seen)

def test_a_head_first_is_timed_apart():
    t = Tip('head', train='learn.get_preds(dl=learn.dls.train.new(shuffle=False, drop_last=False)); learn.fit_one_cycle({epochs})')
    r = watched([t]).record
    assert r['head']==pytest.approx(32*.5/3) and r['head_images']==32 and r['seconds']==pytest.approx(32*.5/3 + 96*.5)
    alone = watched([Tip('alone', train='learn.get_preds(dl=learn.dls.train.new(shuffle=False, drop_last=False))')]).record
    assert alone['images']==0 and alone['head']==alone['seconds']==pytest.approx(32*.5/3)

# The lines ------------------------------------------------------------------------

class Watch(Callback):
    "What the model and the optimiser got"
    order,run_valid = 99,False
    def __init__(self): self.shapes,self.lrs,self.images = [],[],[]
    def after_pred(self):
        self.shapes.append(tuple(self.xb[0].shape))
        self.images.append(self.xb[0].mean((1,2,3)).tolist())
    def after_step(self): self.lrs.append(self.opt.hypers[-1]['lr'])
    def after_fit(self): self.weights = torch.cat([p.flatten() for p in self.model.parameters()]).tolist()

def watched(tips, epochs=6, images=16, arch=net, fit='fit_one_cycle', seed=0, **kwargs):
    recipe = Recipe(arch, accuracy, fit, 8, learner=dict(pretrained=False), data=DATA)
    bench = Bench(ReportData(loaders(40), dblock=block(), source=list(range(40))), recipe, dict(net=net, accuracy=accuracy, device=DATA['device']))
    watch = Watch()
    watch.record = bench.train(tips, seed, epochs, images, cbs=watch, **kwargs)
    return watch

def test_plain_training():
    w = watched([])
    assert set(w.shapes)=={(8,3,64,64)} and len(w.shapes)==6*2 and max(w.lrs)==pytest.approx(1e-3, rel=.01)
    r = w.record
    assert r['images']==6*16 and len(r['curve'])==4 and r['seconds']==pytest.approx(96*.5) and r['validation']==pytest.approx(4*8*.5/3)
    assert r['wall']==pytest.approx(r['seconds']+r['setup']+r['validation'])

def test_the_same_seed_gives_the_same():
    assert watched([]).weights==watched([]).weights!=watched([], seed=1).weights

def test_a_tip_that_draws_random_numbers_trains_on_the_same_images():
    "As its pair, the baseline of this seed: what making a Learner drew is set back before the fit"
    draws = Tip('draws', learn='torch.rand(3), np.random.rand(3), random.random()')
    assert watched([]).images==watched([draws]).images!=watched([draws], seed=1).images

def test_validates_on_the_items_that_were_drawn():
    watched([], parts=((1,3,4),None))
    assert [n for training,n,*_ in See.batches if not training and n>1]==[3]*4 # fastai tries each model with one image

def test_each_tip_changes_what_the_model_gets():
    size,batch = TIPS['sizes'](here())[0],TIPS['batch'](here())
    sizes = [s[-1] for s in watched([TIPS['progressive'](here())], images=8).shapes]
    assert sizes[0]==32 and sizes[-1]==64 and sizes==sorted(sizes)
    w = watched([size,batch])
    assert set(w.shapes)=={(16,3,32,32)} and max(w.lrs)==pytest.approx(2e-3, rel=.05)
    w = watched([TIPS['warmup'](here())])
    assert w.lrs[0]==0 and max(w.lrs)==pytest.approx(1e-3, rel=.1)

def test_albumentations():
    pytest.importorskip('albumentations')
    assert set(watched([TIPS['albumentations'](here())], images=8).shapes)=={(8,3,64,64)}

class Look(Callback):
    def before_fit(self): self.names,self.distil = {type(m).__name__ for m in self.model.modules()},hasattr(self.learn, 'distill')

class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Conv2d(3, 8, 3, 2, 1),nn.Conv2d(8, 8, 3, 2, 1)
    def forward(self, x): return self.b(self.a(x))
def two(pretrained=False): return nn.Sequential(Body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

@pytest.mark.parametrize('fit', ['fit_one_cycle','fine_tune'])
def test_depthwise_learns_from_the_network_it_was(fit):
    look = Look()
    t = Tip('depthwise', switch="dense = learn.model\nlearn.to_depthwise(select=['0.0.b'])", cbs='Distill(dense), look', names=dict(look=look, two=two))
    w = watched([t], arch=two, fit=fit)
    assert w.record['images']==6*16 and 'DepthwiseSeparableConv' in look.names and look.distil

@pytest.mark.parametrize('arch', [partial(two), two])
def test_a_tip_trains_its_own_network(arch):
    "Also where its name says nothing, or is known to nobody else"
    w = watched([Tip('own', arch=arch, learner=dict(pretrained=False))])
    assert See.batches==[] and len(w.lrs)==12

# A cache ----------------------------------------------------------------------------

def test_each_training_fills_a_cache_of_its_own(tmp_path, monkeypatch, capsys):
    "Twenty of the forty images train in each of six epochs; each of the 40 and of the 8 that validate is decoded once, and again by the next training"
    files = []
    for i in range(48):
        (tmp_path/'ab'[i%2]).mkdir(exist_ok=True)
        files.append(tmp_path/'ab'[i%2]/f'{i}.jpg')
        picture(i).save(files[-1])
    db = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, splitter=IndexSplitter(range(8)), item_tfms=Resize(64, method='squish'))
    recipe = Recipe(net, accuracy, 'fit_one_cycle', 10, learner=dict(pretrained=False), data=DATA)
    data = ReportData(db.dataloaders(files, bs=10, **DATA), dblock=db, source=files)
    bench,tip = Bench(data, recipe, dict(net=net, accuracy=accuracy, device=DATA['device'])),Tip('cached', block='dblock = cached(dblock)')
    decoded,make = [],Kind.make
    monkeypatch.setattr(Kind, 'make', lambda self, file, part: decoded.append(str(file)) or make(self, file, part))
    batches = []
    rows = Rows.batch
    monkeypatch.setattr(Rows, 'batch', lambda self, *args: batches.append(rows(self, *args)) or batches[-1])
    for n in (1,2):
        r = bench.train([tip], 0, 6, 20)
        assert r['images']==120 and set(Counter(decoded).values())=={n} and len(decoded)<=n*48
    assert not capsys.readouterr().out and any(b is not None for b in batches) # By index, also where a part is drawn for each epoch
