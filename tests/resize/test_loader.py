"`ProgressiveResize` in the training loader, and with larger batches"
import numpy as np, pytest, torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from fasttransform import Transform
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.callback.data import PartialDL
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import CropPad, Flip, FlipItem, RandomResizedCrop, RandomResizedCropGPU, Resize, Rotate, aug_transforms
from fastai.vision.core import PILImage, PILMask, TensorImage, TensorMask
from fastai.vision.data import ImageBlock, ImageDataLoaders, MaskBlock
from fastai_tricks.all import PILImageDraft, ProgressiveResize, Stage
from fastai_tricks.core.test_utils import tiny_dls, tiny_learner, sizes_seen
import fastai.callback.schedule
from jpegs import jpeg, scales # noqa: F401 - a fixture


PHOTOS = [Image.fromarray(a) for a in load_sample_images().images]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Two classes of 12 photos, 512×341"
    path = tmp_path_factory.mktemp('photos')
    for c,photo in zip('ab', PHOTOS):
        (path/c).mkdir()
        for i in range(12): (path/c/f'{i}.jpg').write_bytes(jpeg(photo.resize((512,341)).rotate(i)))
    return path

# In the loader ----------------------------------------------------------------

class Item(Flip):
    "fastai's `Flip`, noting how large its images are: what the loader made"
    def before_call(self, b, split_idx):
        super().before_call(b, split_idx)
        self.seen.append((split_idx, *b[0].shape[-2:]))

def item_sizes(cb, epochs=4, item_tfms=None, batch_tfms=(), fit=None, num_workers=0, **kwargs):
    "Heights that the loader gives in training, and those that the model receives; validation is at full size in both"
    note = Item()
    note.seen = seen_by_tfms = []
    learn = tiny_learner(cbs=cb, item_tfms=item_tfms or Resize(64), batch_tfms=[note,*batch_tfms], num_workers=num_workers, **kwargs)
    shared = [(f,dict(vars(f))) for dl in learn.dls.loaders for f in dl.after_item.fs if hasattr(f, 'size')]
    seen_by_tfms.clear()
    with sizes_seen(learn) as seen: (fit or (lambda l: l.fit(epochs)))(learn)
    assert {o[1:] for o in seen if not o[0]}=={(64,64)}
    assert {f.size for f,_ in shared}=={o['size'] for _,o in shared}
    assert learn.dls.valid.one_batch()[0].shape[-2:]==(64,64)
    got = [h for t,h,_ in seen if t]
    return [h for s,h,_ in seen_by_tfms if s==0][-len(got):],got,learn # Before it looked at the sizes

@pytest.mark.parametrize('num_workers', [0,1])
def test_loader_gives_the_largest_size_of_the_epoch(num_workers):
    made,got,_ = item_sizes(ProgressiveResize(sizes=[32,48], hold=.5, until=2/3), epochs=3, num_workers=num_workers)
    assert made==got==[32]*3 + [48]*3 + [64]*3

def test_growth_within_an_epoch_goes_on_on_the_device():
    made,got,_ = item_sizes(ProgressiveResize(hold=.25, mult=8), epochs=2)
    assert got==[32,32,40,48,56,64]
    # `Item` comes after the device made it smaller still
    assert made==got

@pytest.mark.parametrize('item_tfms', [Resize(64, 'squish'), RandomResizedCrop(64), [Resize(100),RandomResizedCrop(64)], [Resize(64),FlipItem()]])
def test_item_transforms(item_tfms):
    _,got,learn = item_sizes(ProgressiveResize(sizes=[32], until=.5), epochs=2, item_tfms=item_tfms)
    assert got==[32]*3 + [64]*3

@pytest.mark.parametrize('batch_tfms', [lambda: [Rotate(size=64)], lambda: [RandomResizedCropGPU(64)], lambda: aug_transforms(size=64)], ids=['rotate','crop','aug_transforms'])
@pytest.mark.parametrize('where', ['auto','device'])
def test_presizing(batch_tfms, where):
    "Large items, and the size set by a batch transform: both become smaller"
    learn = tiny_learner(cbs=ProgressiveResize(sizes=[32], until=.5, where=where), item_tfms=Resize(96), batch_tfms=batch_tfms())
    with sizes_seen(learn) as seen: learn.fit(2)
    assert [h for t,h,_ in seen if t]==[32]*3 + [64]*3 and {h for t,h,_ in seen if not t}=={64}

def test_presized_items_are_smaller_in_the_loader():
    made,got,_ = item_sizes(ProgressiveResize(sizes=[32], until=.5), 2, item_tfms=Resize(96), batch_tfms=aug_transforms(size=64))
    assert made==[48]*3 + [96]*3 and got==[32]*3 + [64]*3

def own(x): return x

class CutBatch(Transform):
    "A batch transform of one's own that changes the size"
    order = 50
    def encodes(self, x:TensorImage): return x[...,:64,:64]

@pytest.mark.parametrize('kwargs', [dict(item_tfms=CropPad(64)), dict(item_tfms=[Resize(64),own]), dict(batch_tfms=own), dict(item_tfms=Resize(96), batch_tfms=CutBatch())],
                         ids=['crop_pad','own_item','own_batch','another_size'])
def test_unknown_pipelines(kwargs):
    "On the device with 'auto'; an error with 'loader', before the first batch"
    learn = tiny_learner(cbs=ProgressiveResize(sizes=[32], until=.5), **kwargs)
    with sizes_seen(learn) as seen: learn.fit(2)
    assert [h for t,h,_ in seen if t]==[32]*3 + [64]*3
    learn.remove_cb(ProgressiveResize)
    with sizes_seen(learn) as seen, pytest.raises(ValueError, match="`where` must be 'auto' or 'device'.*'loader'"): learn.fit(1, cbs=ProgressiveResize(where='loader', sizes=[32]))
    assert not seen

def test_decoded_smaller_in_small_epochs(folder, scales):
    dls = ImageDataLoaders.from_folder(folder, valid_pct=.25, seed=1, img_cls=PILImageDraft, item_tfms=Resize(160), bs=6, num_workers=0, device='cpu')
    learn = tiny_learner(dls, cbs=ProgressiveResize(sizes=[64], until=.5))
    scales.clear()
    with sizes_seen(learn): learn.fit(2)
    assert scales[:2]==[2,4] # A look at the full size, and at half of it
    assert scales[2:20]==[4]*18 and set(scales[20:])=={2}

def test_masks_in_the_loader():
    def image(i): return PILImage.create(np.random.default_rng(i).integers(0, 255, (96,96,3), dtype=np.uint8))
    def mask(i): return PILMask.create(np.array(image(i))[...,0]//128)
    block = DataBlock((ImageBlock,MaskBlock(codes=['a','b'])), get_x=image, get_y=mask, splitter=IndexSplitter(range(16,24)), item_tfms=Resize(64))
    sizes = []
    class Sizes(Callback):
        order,run_valid = 100,False
        def before_batch(self): sizes.append((tuple(self.x.shape[-2:]), tuple(self.y.shape[-2:]), set(self.y.unique().tolist())))
    learn = Learner(block.dataloaders(list(range(24)), bs=8, num_workers=0, device='cpu'), nn.Conv2d(3,2,3,padding=1), loss_func=CrossEntropyLossFlat(axis=1),
                    cbs=[ProgressiveResize(sizes=[32], until=.5), Sizes()])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert sizes==[((32,32),(32,32),{0,1})]*2 + [((64,64),(64,64),{0,1})]*2

def test_target_that_the_item_transforms_leave_alone():
    "A mask that is no PIL image: then the device makes both small"
    def image(i): return PILImage.create(np.random.default_rng(i).integers(0, 255, (64,64,3), dtype=np.uint8))
    def mask(i): return TensorMask(torch.tensor(np.array(image(i))[...,0]//128).long())
    dls = DataBlock((ImageBlock,TransformBlock), get_x=image, get_y=mask, splitter=IndexSplitter(range(16,24)), item_tfms=Resize(64)).dataloaders(list(range(24)), bs=8, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Conv2d(3,2,3,padding=1), loss_func=CrossEntropyLossFlat(axis=1), cbs=ProgressiveResize(sizes=[32], until=.5))
    with sizes_seen(learn) as seen: learn.fit(2)
    assert [h for t,h,_ in seen if t]==[32]*2 + [64]*2
    learn.remove_cb(ProgressiveResize)
    with sizes_seen(learn) as seen, pytest.raises(ValueError, match='`where`'): learn.fit(1, cbs=ProgressiveResize(where='loader', sizes=[32]))
    assert not seen

# Larger batches ---------------------------------------------------------------

class Batches(Callback):
    "Batch sizes, rates, and progress as the model sees them"
    order,run_valid = 100,False
    def before_fit(self): self.bs,self.lr,self.pct = [],[],[]
    def before_batch(self): self.bs.append(len(self.x))
    def after_step(self):
        self.lr.append(self.opt.hypers[-1]['lr'])
        self.pct.append(self.pct_train)

@pytest.mark.parametrize('num_workers', [0,1])
def test_batches_keep_their_pixels(num_workers):
    learn = tiny_learner(n=72, cbs=[ProgressiveResize(sizes=[32], until=.5, scale_bs=True), Batches()], num_workers=num_workers)
    with sizes_seen(learn) as seen: learn.fit(2)
    assert learn.batches.bs==[32]*2 + [8]*8 and [h for t,h,_ in seen if t]==[32]*2 + [64]*8
    assert learn.dls.train.bs==8 and [len(b[0]) for b in learn.dls.valid]==[8]
    assert learn.batches.pct==pytest.approx([0,.25] + [.5 + i/16 for i in range(8)])

def rates(fit, **kwargs):
    "The Learner, and the rate of each step by its progress"
    learn = tiny_learner(n=72, cbs=[ProgressiveResize(sizes=[32], until=.5, **kwargs), Batches()])
    with sizes_seen(learn): getattr(learn, fit)(2, 1e-2)
    return learn,dict(zip(learn.batches.pct, learn.batches.lr))

@pytest.mark.parametrize('fit,rule,growth', [('fit','linear',4), ('fit_one_cycle','linear',4), ('fit_one_cycle','sqrt',2), ('fit_one_cycle',None,1)])
def test_learning_rate_rule(fit, rule, growth):
    _,plain = rates(fit)
    learn,scaled = rates(fit, scale_bs=True, scale_lr=rule)
    for pct,lr in scaled.items():
        near = plain[min(plain, key=lambda p: abs(p-pct))]
        assert lr==pytest.approx(near*(growth if pct<.499 else 1), rel=1e-3)
    assert learn.recorder.lrs==pytest.approx(learn.batches.lr)

def test_rate_is_given_back():
    learn = tiny_learner(n=72, cbs=[ProgressiveResize(sizes=[32], until=1, scale_bs=True, scale_lr='linear')])
    with sizes_seen(learn): learn.fit(1, 1e-2)
    assert [h['lr'] for h in learn.opt.hypers]==[1e-2]*2

@pytest.mark.parametrize('n,expected', [(20,[8]*1 + [8]*1), (40,[32]*1 + [8]*4)])
def test_no_epoch_is_swallowed(n, expected):
    "12 and 32 training images: four times the batch of 8 is more than there are, or all"
    learn = tiny_learner(n=n, cbs=[ProgressiveResize(sizes=[32], until=.5, scale_bs=True), Batches()])
    with sizes_seen(learn): learn.fit(2)
    assert learn.batches.bs==expected

def test_largest_batch_and_fine_tune():
    learn = tiny_learner(n=72, cbs=[ProgressiveResize(sizes=[32], until=.5, scale_bs=16), Batches(), GradientAccumulation(16)])
    with sizes_seen(learn): learn.fine_tune(2)
    assert learn.batches.bs==[16]*4 + [8]*8

@pytest.mark.parametrize('n_acc,growth', [(4,2), (16,2**.5), (32,1)])
def test_accumulated_batches(n_acc, growth):
    "The rate grows with the items of a step: accumulated ones are as many at both sizes"
    learn = tiny_learner(n=72, cbs=[ProgressiveResize(sizes=[32], until=.5, scale_bs=True), Batches(), GradientAccumulation(n_acc)])
    with sizes_seen(learn): learn.fit(2, 1e-2)
    assert learn.batches.bs[0]==32 and learn.batches.lr[0]==pytest.approx(1e-2*growth)

def test_part_of_the_data():
    "An epoch of 16 of 64 images has two batches of 8, not half a batch of 32"
    dls = tiny_dls(n=72)
    dls.loaders[0] = PartialDL(dls.train.dataset, bs=8, partial_n=16, shuffle=True, drop_last=True, num_workers=0, after_item=dls.train.after_item, after_batch=dls.train.after_batch, device='cpu')
    learn = tiny_learner(dls, cbs=[ProgressiveResize(sizes=[32], until=.5, scale_bs=True), Batches()])
    with sizes_seen(learn): learn.fit(2)
    assert learn.batches.bs==[16] + [8]*2

def test_scale_bs_needs_a_loader_of_fastai():
    data = torch.utils.data.TensorDataset(torch.rand(16,3,64,64), torch.zeros(16).long())
    dls = DataLoaders(*[torch.utils.data.DataLoader(data, batch_size=8) for _ in range(2)])
    learn = tiny_learner(dls, cbs=ProgressiveResize(sizes=[32], scale_bs=True))
    with learn.no_bar(), pytest.raises(ValueError, match='`scale_bs` must be False'): learn.fit(1)

def test_stage_of_as_many_pixels(tmp_path):
    learn = tiny_learner(n=72, cbs=Batches())
    learn.path = tmp_path
    with sizes_seen(learn): learn.fit_stages([Stage(32, 1, bs='pixels')])
    assert learn.batches.bs==[32]*2 and learn.dls.train.bs==8
    with pytest.raises(ValueError, match="`bs`.*'pixel'"): Stage(32, 1, bs='pixel')
