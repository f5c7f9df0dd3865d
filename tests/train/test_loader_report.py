"`loader_report`: what was measured, on a clock that the test turns; what it advises; and that nothing is left behind"
import random, time
from dataclasses import replace
import numpy as np, pytest, torch
from PIL import Image
from fastai.callback.data import WeightedDL
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import IndexSplitter, parent_label
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import Flip, RandomResizedCrop, Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from fasttransform import Transform
import fastai_tricks.all as ft
from fastai_tricks.core.test_utils import tiny_dls, tiny_learner
from fastai_tricks.train import loader_report as R, stopwatch as S
from fastai_tricks.train.loader_report import LoaderFacts, image_source, loader_advice, time_items, waited_line
from fastai_tricks.train.stopwatch import Laps, WaitClock, rounds, steady, timed

# A clock of its own --------------------------------------------------------------

@pytest.fixture
def clock(monkeypatch):
    "Seconds pass only where `Takes` says so"
    t = [0.]
    for m in (S,R): monkeypatch.setattr(m, 'now', lambda: t[0])
    return t

class Takes(Transform):
    "An item or a batch takes some seconds"
    order,split_idx = 90,0
    def __init__(self, seconds, clock=None): self.seconds,self.clock = seconds,clock
    def __call__(self, x, split_idx=None, **kwargs):
        if self.clock is None: time.sleep(self.seconds)
        else: self.clock[0] += self.seconds
        return x

def learner(item=0., batch=0., step=0., clock=None, n=128, **kwargs):
    "Seconds of an item, of the transforms of a batch of eight, and of the network's forward pass"
    dls = tiny_dls(n=n, item_tfms=[Resize(64),Takes(item, clock)], batch_tfms=[Flip(),Takes(batch, clock)], **kwargs)
    learn = tiny_learner(dls)
    learn.model.register_forward_pre_hook(Waits(step, clock))
    return learn

class Waits:
    "A network that takes some seconds; a copy of it too"
    def __init__(self, seconds, clock): self.seconds,self.clock = seconds,clock
    def __deepcopy__(self, memo): return self
    def __call__(self, *args):
        if self.clock is None: time.sleep(self.seconds)
        else: self.clock[0] += self.seconds

def report(learn, seconds=.05):
    with learn.no_bar(), learn.no_logging(): return learn.loader_report(seconds)

# What is measured ----------------------------------------------------------------

@pytest.mark.parametrize('item,batch,step,limit', [(.01,.04,.08,'loader'), (.001,.04,.08,'network'), (.003,.04,.08,'both')])
def test_what_takes_how_long(clock, item, batch, step, limit):
    "Batch transforms are training, not loading: the main process does them"
    r = report(learner(item, batch, step, clock), 1.)
    f,network = r.facts,(batch+step)/8
    assert [1/f.loader,1/f.step,1/f.training]==pytest.approx([item,network,item+network])
    assert f.waiting==pytest.approx(item/(item+network)) and f.workers==0 and r.advice.limit==limit
    assert r.advice.bound==pytest.approx(1/network) and r.advice==loader_advice(f)
    parts = dict(f.parts)
    assert parts['item transforms']==pytest.approx(item) and parts['opening it']==0 and parts['batch transforms']==pytest.approx(batch/16)

def test_the_table(clock):
    r = report(learner(.01, .04, .08, clock), 1.)
    assert list(r.df['what'])==['the loader alone','the network alone','both together'] + [f'  one process: {k}' for k,_ in r.facts.parts]
    assert list(r.df['images_s'][:3])==pytest.approx([100,66.67,40], rel=.01) and list(r.df['ms'][:3])==pytest.approx([10,15,25])
    assert repr(r).endswith(str(r.advice)) and str(r.advice).split('\n')[0] in r._repr_html_()
    assert str(r.advice).startswith('The loader is the limit: 40% of the training is waiting for images; without that it would run at 67 images/s.')

@pytest.mark.parametrize('workers', [1,2])
def test_workers_read_ahead(workers):
    "Items sleep: each worker makes a batch in 8 × 40 ms, whatever the machine does"
    r = report(learner(.04, n=200, num_workers=workers), .4)
    assert r.facts.loader<1.15*25*workers and r.facts.workers==workers
    assert r.facts.waiting>.5 and r.advice.limit=='loader'

def test_a_slow_network_hides_the_loader():
    r,slow = (report(learner(item, step=.08, n=200, num_workers=1), .3) for item in (.002,.04))
    assert r.facts.waiting<slow.facts.waiting and r.facts.step<101 and not {h.code for h in r.advice.helps} & {'`cached(dblock)`'}

def test_it_says_beforehand(capsys):
    learn = tiny_learner()
    with learn.no_bar(): learn.loader_report(.01)
    assert capsys.readouterr().out.startswith('loader_report: batches of 8, 0 workers: loader, network, both; 0.01 seconds or more each')

@pytest.mark.parametrize('workers,n,at', [(0,1,slice(1,1)), (0,3,slice(1,3)), (1,3,slice(1,3)), (3,5,slice(3,3)), (3,6,slice(3,6)), (3,11,slice(3,9))])
def test_whole_rounds(workers, n, at): assert rounds(n, workers)==at

def test_a_burst_of_batches():
    "Three workers, three seconds for a batch of two: a batch per second, in whole rounds"
    took = [4.,0.,0., 3.,0.,0., 3.,0.,0., 3.]
    assert steady(took, [2]*10, 3)==(3.,.5)
    assert Laps([4.,0.,0., 2.,0.,0., 2.,0.,0., 2.], took, [2]*10).waiting(3)==pytest.approx(2/3)

def test_few_batches():
    "Of fewer than two rounds all count"
    assert steady([4.,0.], [2,2], 3)==(0.,1.) and Laps([3.,0.], [4.,1.], [2,2]).waiting(3)==.6

def test_the_next_batch_is_asked_for_after_the_step(clock):
    def batches():
        while True:
            clock[0] += 2
            yield [torch.zeros(4)]
    laps = Laps()
    for _ in timed(batches(), laps, 12, 2, lambda b: clock.__setitem__(0, clock[0]+1) or b): clock[0] += 3
    assert (laps.waits,laps.seconds,laps.items)==([2.]*2,[6.]*2,[4]*2)

# What is left behind ---------------------------------------------------------------

def found(learn):
    dl = learn.dls.train
    return dict(weights=[p.clone() for p in learn.model.state_dict().values()], modes=[m.training for m in learn.model.modules()],
                grads=[p.grad for p in learn.model.parameters()], wants=[p.requires_grad for p in learn.model.parameters()],
                random=(random.getstate(),torch.get_rng_state().tolist(),np.random.get_state()[1].tolist()),
                rng=[dl.rng.getstate() for dl in learn.dls.loaders], cbs=[id(cb) for cb in learn.cbs if not isinstance(cb, ProgressCallback)], opt=id(learn.opt),
                pipes=[id(getattr(dl, nm)) for nm in ('after_item','before_batch','after_batch')], loss=id(learn.loss_func),
                fs=[[id(f) for f in fs] for fs in (dl.after_item.fs,dl.after_batch.fs,*(tl.tfms.fs for tl in dl.dataset.tls))],
                loader=(dl.device,dl.bs,dl.n,dl.fake_l.num_workers,sorted(vars(dl))), names=sorted(vars(learn)), logger=learn.logger)

def same(a, b):
    assert all(map(torch.equal, a.pop('weights'), b.pop('weights')))
    for k in a: assert a[k]==b[k], k

class Stop(Transform):
    "Raises at its n-th item"
    def __init__(self, error, n): self.error,self.left = error,n
    def __call__(self, x, split_idx=None, **kwargs):
        self.left -= 1
        if not self.left: raise self.error
        return x

@pytest.mark.parametrize('workers', [0,2])
def test_the_learner_stays_as_it_was(workers):
    learn = learner(num_workers=workers)
    learn.add_cb(ft.ProgressiveResize())
    learn.create_opt()
    learn.freeze()
    was = found(learn)
    report(learn)
    same(was, found(learn))

@pytest.mark.parametrize('error', [KeyboardInterrupt,RuntimeError,MemoryError])
@pytest.mark.parametrize('where', ['loader','both','network'])
def test_so_after_an_error(error, where):
    learn = tiny_learner(tiny_dls(item_tfms=[Resize(64),stop := Stop(error('stop'), 10**9)], batch_tfms=Flip()))
    stop.left = dict(loader=10, both=3*8+4, network=10**9)[where]
    if where=='network':
        calls = []
        def broken(*args):
            calls.append(1)
            if len(calls)==3: raise error('stop')
        learn.model.register_forward_pre_hook(broken)
    was = found(learn)
    with pytest.raises(error, match='stop'): report(learn, .001)
    same(was, found(learn))

def test_a_training_is_the_same_after_it():
    res = []
    for looks in (False,True):
        torch.manual_seed(0)
        learn = tiny_learner(batch_tfms=Flip())
        learn.dls.train.rng.seed(0)
        if looks: report(learn)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
        res.append(learn.recorder.losses)
    assert res[0]==res[1]

# With what there is --------------------------------------------------------------

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Twenty JPEGs of 600×450 px in two classes, of which one is broken"
    d = tmp_path_factory.mktemp('photos')
    for i in range(20):
        (d/'ab'[i%2]).mkdir(exist_ok=True)
        a = np.random.default_rng(i).integers(0, 255, (30,40,3), dtype=np.uint8)
        Image.fromarray(a).resize((600,450)).save(d/'ab'[i%2]/f'{i}.jpg')
    return sorted(d.glob('*/*.jpg'))

def block(img_cls=PILImage, item_tfms=None):
    return DataBlock((ImageBlock(img_cls),CategoryBlock), get_y=parent_label, splitter=IndexSplitter([0,10]), item_tfms=item_tfms or Resize(32), batch_tfms=Flip())

def photo_learner(block, photos, **kwargs): return tiny_learner(block.dataloaders(photos, **{'bs':4, 'num_workers':0, 'device':'cpu', **kwargs}))

@pytest.fixture
def limits(monkeypatch):
    "The loader is the limit, however fast this machine is"
    monkeypatch.setattr(Laps, 'waiting', lambda self, workers=1: .9)

def test_ways_to_open_large_photos(limits, photos, capsys):
    r = report(photo_learner(block(), photos))
    assert 'cached' not in capsys.readouterr().out # The cache that was tried says nothing
    tries = dict(r.facts.tries)
    assert set(tries)=={'draft','cached','copies'} and r.facts.side==32
    assert tries['draft']<.7 and tries['copies']<.5 and tries['cached']<.2
    # Twenty pictures, whole but for what a crop never sees: 32 × 43 px
    assert r.facts.cache=='0.1 MB in memory'
    assert {h.code for h in r.advice.helps}>={'`cached(dblock)`','`ImageBlock(PILImageDraft)`','`resized_copies(source, dest, 32)`'}

def test_only_what_is_not_there_already(limits, photos):
    assert set(dict(report(photo_learner(block(ft.PILImageDraft), photos)).facts.tries))=={'cached','copies'}
    small = [f for f in photos]
    assert 'copies' not in dict(report(photo_learner(block(item_tfms=Resize(400)), small)).facts.tries) # They are hardly larger
    assert report(photo_learner(block(item_tfms=RandomResizedCrop(32)), photos)).facts.side==64

def test_nothing_is_tried_where_the_network_limits(monkeypatch, photos):
    monkeypatch.setattr(Laps, 'waiting', lambda self, workers=1: .05)
    r = report(photo_learner(block(), photos))
    assert not r.facts.tries and r.advice.limit=='network' and not r.advice.helps

def test_a_cache(limits, photos):
    learn = photo_learner(ft.cached(block()), photos)
    r = report(learn)
    assert r.facts.cached=='filling' and not r.facts.tries and r.advice.note.startswith('The cache is still being filled')
    r = report(photo_learner(ft.cached(block(), fill=True), photos))
    assert r.facts.cached=='full' and not r.advice.note and not r.facts.parts # Batches are taken by index
    assert image_source(learn.dls.train)=='cache'

def test_a_full_cache_needs_no_workers(photos):
    learn = photo_learner(ft.cached(block(), fill=True), photos, num_workers=2)
    r = report(learn)
    assert r.facts.workers==0 and not r.facts.shared and learn.dls.train.fake_l.num_workers==2

def test_a_corrupt_image(limits, photos, tmp_path):
    (tmp_path/'a').mkdir()
    (bad := tmp_path/'a'/'bad.jpg').write_bytes(photos[0].read_bytes()[:500])
    files = [*photos[:3], bad, *photos[3:]]
    for first in (files, [photos[0], bad, *photos[1:]]):
        r = report(photo_learner(ft.skip_corrupt(block(), max_share=.2), first))
        assert r.facts.loader>0 and 'draft' in dict(r.facts.tries)

def test_weights(limits, photos):
    db = block()
    db.dl_type = WeightedDL
    learn = tiny_learner(db.dataloaders(photos, bs=4, num_workers=0, device='cpu', dl_kwargs=[dict(wgts=np.arange(1,19.)),{}]))
    assert isinstance(learn.dls.train, WeightedDL) and 'cached' in dict(report(learn).facts.tries)

def test_in_its_precision():
    learn,seen = tiny_learner(),set()
    learn.to_mixed(torch.bfloat16)
    learn.model[0].register_forward_hook(lambda m,i,o: seen.add((m.training,o.dtype)))
    report(learn)
    assert {d for t,d in seen if t}=={torch.bfloat16} and learn.cbs.filter(lambda cb: isinstance(cb, MixedPrecision))

@pytest.mark.parametrize('arch', ['vision_learner','timm'])
def test_networks(arch):
    dls = tiny_dls(batch_tfms=Flip())
    if arch=='vision_learner': learn = vision_learner(dls, 'test_resnet', pretrained=False)
    else:
        import timm
        learn = Learner(dls, timm.create_model('test_resnet', num_classes=2), loss_func=CrossEntropyLossFlat())
    assert report(learn).facts.step>0

def test_all_layers_are_trained(monkeypatch):
    learn,wants = tiny_learner(),[]
    learn.freeze()
    train = R.copy_learner
    monkeypatch.setattr(R, 'copy_learner', lambda *args: wants.append(train(*args)) or wants[-1])
    report(learn)
    assert all(p.requires_grad for sub in wants for p in sub.model.parameters()) and not all(p.requires_grad for p in learn.model.parameters())

def test_compiled_where_the_training_is():
    "What compiling takes is in none of the times"
    taken = []
    def backend(graph, inputs):
        taken.append(time.sleep(2))
        return graph.forward
    torch.compiler.reset()
    learn = tiny_learner(cbs=ft.CompiledTraining(backend=backend))
    facts = report(learn).facts
    assert taken and facts.step>20
    assert not {'_compiled_call_impl','forward'} & vars(learn.model).keys()

PAIRS = [(torch.randn(3,8,8),i%2) for i in range(32)]
def plain_learner(train): return tiny_learner(DataLoaders(train, DataLoader(PAIRS[:8], bs=4), device=torch.device('cpu')))

@pytest.mark.parametrize('make', [lambda: DataLoader(PAIRS, bs=4, shuffle=True), lambda: torch.utils.data.DataLoader(PAIRS, batch_size=4)])
def test_other_loaders(make):
    learn = plain_learner(make())
    r = report(learn)
    assert r.facts.loader>0 and not r.facts.tries and image_source(learn.dls.train)==''
    assert not vars(learn.dls.train).keys() & {'after_batch'}

# Bad input -----------------------------------------------------------------------

class Endless(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(PAIRS)

@pytest.mark.parametrize('make,match', [
    (lambda: plain_learner(torch.utils.data.DataLoader(Endless(), batch_size=4)), '`learn` must be one whose training loader has a length'),
    (lambda: plain_learner(DataLoader(PAIRS, bs=64, drop_last=True)), '`bs` must be at most the 32 training images'),
    (lambda: plain_learner(DataLoader([o for o,_ in PAIRS], bs=4)), '`learn` must be one whose training loader gives tuples of tensors')])
def test_loaders_that_will_not_do(make, match):
    with pytest.raises(ValueError, match=match): report(make())

@pytest.mark.parametrize('bad', [0,-1,True,'3',float('nan'),float('inf'),None])
def test_bad_seconds(bad):
    with pytest.raises(ValueError, match='`seconds` must be a number above 0'): tiny_learner().loader_report(bad)

def test_not_in_several_processes(monkeypatch):
    monkeypatch.setattr(R, 'num_distrib', lambda: 2)
    with pytest.raises(ValueError, match='`learn` must be in a single process'): tiny_learner().loader_report()

# What it advises -----------------------------------------------------------------

SLOW = LoaderFacts(50., 200., 50., .75, workers=1, spare=4, tries=(('draft',.5),('cached',.02),('copies',.4)), cache='2.0 GB on disk', side=224)

def codes(facts): return [h.code.strip('`').split('(')[0] for h in loader_advice(facts).helps]

def test_what_gains_most_comes_first():
    assert codes(SLOW)==['num_workers=4','cached','resized_copies','ImageBlock']
    assert [round(h.gain, 2) for h in loader_advice(SLOW).helps]==[4,4,2.5,2] # The simpler of two that gain alike
    assert codes(replace(SLOW, spare=2))==['cached','resized_copies','num_workers=2','ImageBlock']
    assert codes(replace(SLOW, spare=1, tries=()))==[]

@pytest.mark.parametrize('lost,limit,n', [(.25,'loader',1), (.24,'both',1), (.11,'both',1), (.1,'network',0), (0.,'network',0)])
def test_the_limit(lost, limit, n):
    advice = loader_advice(LoaderFacts(100., 100., 50., lost, tries=(('cached',0.),)))
    assert (advice.limit,len(advice.helps))==(limit,n) and advice.bound==pytest.approx(50/(1-lost))

def test_no_gain_beyond_the_waiting():
    "20 ms of loading, of which 5 are waited for: half of the loader's work is more than that"
    advice = loader_advice(LoaderFacts(50., 60., 50., .25, workers=1, tries=(('cached',0.),('draft',.5),('copies',.98))))
    assert [h.rate for h in advice.helps]==pytest.approx([50/.75]*2) # What gains less than 5% is left out

def test_reading_ahead():
    "Without workers the loader's seconds are the training's; one worker takes them off, and no more than that"
    def rate(loader, step): return loader_advice(LoaderFacts(loader, step, 1/(1/loader+1/step), step/(loader+step), spare=1)).helps[0].rate
    assert rate(100, 50)==pytest.approx(50) and rate(50, 100)==pytest.approx(50)

@pytest.mark.parametrize('workers,rate', [(0,1/(.2*.25+.8*.25*.1)), (1,1/(.25*.2))])
def test_a_machine_that_became_slower(workers, rate):
    "The loader alone was timed at twice its speed: what counts is what the training waited"
    advice = loader_advice(LoaderFacts(10., 30., 4., .8, workers=workers, tries=(('cached',.1),)))
    assert advice.helps[0].rate==pytest.approx(rate)

def test_workers_on_the_cores_of_the_training():
    busy = LoaderFacts(400., 200., 150., .05, workers=2, shared=True, tries=(('cached',.01),))
    assert busy.lost==pytest.approx(.25) and loader_advice(busy).limit=='loader' and 'workers on the same cores' in str(loader_advice(busy))
    assert loader_advice(replace(busy, shared=False)).limit=='network'
    assert replace(busy, training=250.).lost==.05 # Faster than the network alone: nothing was taken

def test_the_words():
    said = str(loader_advice(SLOW)).split('\n')
    assert said[0]=='The loader is the limit: 75% of the training is waiting for images; without that it would run at 200 images/s. What would help:'
    assert said[1]=='- `num_workers=4`: about 200 images/s, 4.0 times as fast (now 1)'
    assert said[2]=='- `cached(dblock)`: about 200 images/s, 4.0 times as fast (from the second epoch on, 2.0 GB on disk)'
    assert str(loader_advice(replace(SLOW, spare=0, tries=()))).endswith('Nothing that applies here would gain 5%.')
    assert str(loader_advice(replace(SLOW, waiting=.03)))=='The network is the limit: a faster loader would save at most 3% of the training.'

@pytest.mark.parametrize('kind,threads,spare', [('cuda',4,6), ('cpu',4,2), ('cpu',8,0)])
def test_cores_for_workers(monkeypatch, kind, threads, spare):
    monkeypatch.setattr(R, 'num_cpus', lambda: 6)
    monkeypatch.setattr(R.sys, 'platform', 'linux')
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    assert R.spare_cores(torch.device(kind))==spare

# After a fit -----------------------------------------------------------------------

def test_a_clock_in_a_fit(clock):
    "Sixteen batches: of 80 ms of waiting and 120 of training each; validation counts as nothing"
    learn,c = learner(.01, .04, .08, clock, n=136),WaitClock()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=c)
    # Batch transforms come with the batch
    assert (c.waited,c.total,c.items)==pytest.approx((32*.12,32*.2,256))

@pytest.mark.parametrize('waited,total,source,said', [
    (50,100,'files','waited 50% of the time for images: `cached(dblock)` decodes each one once, `learn.loader_report()` says what would help'),
    (50,100,'','waited 50% of the time for images: `learn.loader_report()` says what would help'),
    (24,100,'files',''), (9,10,'files',''), (50,100,'cache','')])
def test_what_is_said_after_a_fit(waited, total, source, said): assert waited_line(waited, total, source)==said
