"`PILImageDraft` against `PILImage`, resizing in the loader, larger batches, `find_bs`"
import copy, pickle, random
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from fastcore.foundation import L
from fasttransform import Transform
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.progress import CSVLogger
from fastai.callback.training import GradientAccumulation
from fastai.callback.data import PartialDL
from fastai.callback.fp16 import MixedPrecision
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, parent_label
from fastai.layers import ConvLayer
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.augment import CropPad, Flip, FlipItem, RandomCrop, RandomResizedCrop, RandomResizedCropGPU, Resize, Rotate, aug_transforms
from fastai.vision.core import PILImage, PILMask, TensorImage, TensorMask
from fastai.vision.data import ImageBlock, ImageDataLoaders, MaskBlock
import fastai.torch_core, fastai.callback.schedule
from fastai_tricks.all import PILImageDraft, ProgressiveResize, Stage, find_bs
from fastai_tricks.resolution import draft_scale
from fastai_tricks.test_utils import tiny_dls, tiny_learner, sizes_seen
from jpegs import jpeg, psnr, scales

PHOTOS = [Image.fromarray(a) for a in load_sample_images().images]

def both(data, *tfms, split_idx=0):
    res = []
    for cls in (PILImage,PILImageDraft):
        random.seed(1)
        im = cls.create(data)
        for t in tfms: im = t(im, split_idx=split_idx)
        res.append(im)
    assert res[0].size==res[1].size and res[0].mode==res[1].mode
    return res

# Decoding ---------------------------------------------------------------------

TFMS = {**{f'{m} {p}':lambda s, m=m, p=p: Resize(s, m, pad_mode=p) for m,p in [('crop','zeros'),('squish','zeros'),('pad','zeros'),('pad','border'),('pad','reflection')]},
        'random crop':lambda s: RandomResizedCrop(s, min_scale=.3)}

@pytest.mark.parametrize('tfm', TFMS)
@pytest.mark.parametrize('wh', [(1283,857),(427,640),(2001,333)])
def test_same_picture(tfm, wh, scales):
    for photo in PHOTOS:
        data = jpeg(photo.resize(wh))
        for size in (64,(96,128)):
            for split_idx in (0,1): assert psnr(*both(data, TFMS[tfm](size), split_idx=split_idx))>=30
    assert (max(scales)>1)==(wh!=(2001,333) or tfm!='pad reflection') # Mirrored so often, it is decoded in full

def test_scale_leaves_enough_pixels(scales):
    data = jpeg(PHOTOS[0].resize((2000,1333)))
    for size in (64,128,166,167,333,334,600,700): both(data, Resize(size), split_idx=1)
    assert scales==[8,8,8,4,4,2,2,1]
    scales.clear()
    # The crop must have enough, not the whole image
    for _ in range(50):
        t,im = RandomResizedCrop(128, min_scale=.05),PILImageDraft.create(data)
        t(im, split_idx=0)
        assert scales[-1]==draft_scale(t.cp_size, (128,128))
    assert len(set(scales))>2

def test_no_scaling_is_exact(scales):
    data = jpeg(PHOTOS[0])
    for t in (Resize(400), Resize(600), Resize(64, resamples=(Image.NEAREST,Image.NEAREST)), CropPad(100), RandomCrop(100)):
        a,b = both(data, t)
        assert np.array_equal(np.array(a), np.array(b))
    assert set(scales)=={1}

def test_crop_then_resize(scales):
    a,b = both(jpeg(PHOTOS[0].resize((2000,1333))), RandomCrop(900), Resize(100))
    assert scales==[8] and psnr(a, b)>=30
    both(jpeg(PHOTOS[0]), CropPad(800), Resize(64)) # padded: in full
    assert scales==[8,1]

def test_one_image_twice():
    im = PILImageDraft.create(jpeg(PHOTOS[0]))
    small,again = (Resize(100)(im, split_idx=1) for _ in range(2))
    assert np.array_equal(np.array(small), np.array(again)) and im.size==(640,427)
    for f in (copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), lambda o: o.copy(), lambda o: o):
        assert np.array_equal(np.array(f(PILImageDraft.create(jpeg(PHOTOS[0])))), np.array(PILImage.create(jpeg(PHOTOS[0]))))

def rotated_exif():
    exif = Image.Exif()
    exif[274] = 6
    return exif.tobytes()

KINDS = dict(gray=lambda im, f: im.convert('L').save(f, 'JPEG'), cmyk=lambda im, f: im.convert('CMYK').save(f, 'JPEG'), rotated=lambda im, f: im.save(f, 'JPEG', exif=rotated_exif()),
             progressive=lambda im, f: im.save(f, 'JPEG', progressive=True), tiny=lambda im, f: im.resize((5,3)).save(f, 'JPEG'), png=lambda im, f: im.save(f, 'PNG'),
             palette=lambda im, f: im.convert('P').save(f, 'PNG'), alpha=lambda im, f: im.convert('RGBA').save(f, 'PNG'), mpo=lambda im, f: im.save(f, 'MPO', save_all=True, append_images=[im]))

@pytest.mark.parametrize('kind', KINDS)
def test_kinds_of_files(kind, tmp_path):
    f = tmp_path/'photo.jpg' # A wrong extension too
    KINDS[kind](PHOTOS[0], f)
    for o in (f, str(f), f.read_bytes()):
        a,b = (c.create(o) for c in (PILImage,PILImageDraft))
        assert (a.size,a.mode)==(b.size,b.mode) and np.array_equal(np.array(a), np.array(b))
        assert psnr(*both(o, Resize(64), split_idx=1))>=30

@pytest.mark.parametrize('data', [b'', b'<html>404</html>', b'\xff\xd8\xff', jpeg(PHOTOS[0])[:9000]], ids=['empty','html','header','truncated'])
def test_broken_file_is_named(data, tmp_path):
    f = tmp_path/'broken.jpg'
    f.write_bytes(data)
    with pytest.raises(OSError, match='broken.jpg'): Resize(64)(PILImageDraft.create(f))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Two classes of 12 photos, 512×341"
    path = tmp_path_factory.mktemp('photos')
    for c,photo in zip('ab', PHOTOS):
        (path/c).mkdir()
        for i in range(12): (path/c/f'{i}.jpg').write_bytes(jpeg(photo.resize((512,341)).rotate(i)))
    return path

@pytest.mark.parametrize('num_workers', [0,2])
def test_loaders(folder, num_workers, scales):
    make = lambda cls: ImageDataLoaders.from_folder(folder, valid_pct=.25, seed=1, img_cls=cls, item_tfms=Resize(64), bs=4, num_workers=num_workers, device='cpu')
    draft,full = make(PILImageDraft),make(PILImage)
    for a,b in zip(draft.valid, full.valid): assert (a[0]-b[0]).abs().mean()<.02 and torch.equal(a[1], b[1])
    test = [o.test_dl(sorted(folder.glob('a/*'))) for o in (draft,full)]
    for a,b in zip(*test): assert (a[0]-b[0]).abs().mean()<.02
    if not num_workers: assert set(scales)=={4}

@pytest.mark.parametrize('how', ['from_df','from_csv','from_name_func','from_path_re'])
def test_other_factories(folder, tmp_path, how, scales):
    files = sorted(folder.glob('*/*.jpg'))
    df = pd.DataFrame(dict(name=[f.relative_to(folder).as_posix() for f in files], label=[f.parent.name for f in files]))
    kwargs = dict(img_cls=PILImageDraft, item_tfms=Resize(64), bs=4, num_workers=0, device='cpu')
    if how=='from_df': dls = ImageDataLoaders.from_df(df, folder, **kwargs)
    elif how=='from_csv':
        df.to_csv(tmp_path/'labels.csv', index=False)
        dls = ImageDataLoaders.from_csv(folder, csv_fname=tmp_path/'labels.csv', **kwargs)
    elif how=='from_name_func': dls = ImageDataLoaders.from_name_func(folder, files, lambda n: n[0], **kwargs)
    else: dls = ImageDataLoaders.from_path_re(folder, files, r'/([ab])/', **kwargs)
    assert dls.one_batch()[0].shape==(4,3,64,64) and set(scales)=={4}

def test_predict(folder, tmp_path):
    dls = ImageDataLoaders.from_folder(folder, valid_pct=.25, img_cls=PILImageDraft, item_tfms=Resize(64), bs=4, num_workers=0, device='cpu')
    learn,f = tiny_learner(dls),folder/'a'/'1.jpg'
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging():
        array = np.array(PILImage.create(f))
        inputs = f,str(f),f.read_bytes(),PILImage.create(f),PILImageDraft.create(f),array,TensorImage(array).permute(2,0,1)
        preds = [learn.predict(o)[2] for o in inputs]
        learn.export('l.pkl')
        loaded = load_learner(tmp_path/'l.pkl')
        with loaded.no_bar(): preds += [loaded.predict(o)[2] for o in inputs]
    assert all(torch.allclose(p, preds[0], atol=1e-2) for p in preds)

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

@pytest.mark.parametrize('num_workers', [0,2])
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

def test_presized_items_are_smaller_in_the_loader(monkeypatch):
    from fastai_tricks import resize
    made,pipe = [],resize._pipe
    monkeypatch.setattr(resize, '_pipe', lambda dl, nm, fs: (made.append((nm, [tuple(f.size) if isinstance(f.size, tuple) else f.size for f in fs if getattr(f, 'size', None)])), pipe(dl, nm, fs))[1])
    learn = tiny_learner(cbs=ProgressiveResize(sizes=[32], until=.5), item_tfms=Resize(96), batch_tfms=aug_transforms(size=64))
    with sizes_seen(learn): learn.fit(2)
    assert made[0]==('after_item',[(48,48)]) and made[1]==('after_batch',[(32,32)]) and made[-1]==('after_batch',[(64,64)])

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

@pytest.mark.parametrize('where,epochs,says', [('auto',4,'in the loader;'), ('auto',3,'in the loader, within an epoch on the device;'), ('device',4,'on the device;')])
def test_says_where(where, epochs, says, capsys):
    learn = tiny_learner(cbs=ProgressiveResize(sizes=[32,48], hold=.5, until=.5, where=where))
    with learn.no_bar(): learn.fit(epochs)
    assert says in capsys.readouterr().out

# Larger batches ---------------------------------------------------------------

class Batches(Callback):
    "Batch sizes, rates, and progress as the model sees them"
    order,run_valid = 100,False
    def before_fit(self): self.bs,self.lr,self.pct = [],[],[]
    def before_batch(self): self.bs.append(len(self.x))
    def after_step(self):
        self.lr.append(self.opt.hypers[-1]['lr'])
        self.pct.append(self.pct_train)

@pytest.mark.parametrize('num_workers', [0,2])
def test_batches_keep_their_pixels(num_workers):
    learn = tiny_learner(n=72, cbs=[ProgressiveResize(sizes=[32], until=.5, scale_bs=True), Batches()], num_workers=num_workers)
    with sizes_seen(learn) as seen: learn.fit(2)
    assert learn.batches.bs==[32]*2 + [8]*8 and [h for t,h,_ in seen if t]==[32]*2 + [64]*8
    assert learn.dls.train.bs==8 and [len(b[0]) for b in learn.dls.valid]==[8]
    assert learn.batches.pct==pytest.approx([0,.25] + [.5 + i/16 for i in range(8)])

@pytest.mark.parametrize('rule,growth', [('linear',4), ('sqrt',2), (None,1)])
@pytest.mark.parametrize('fit', ['fit','fit_one_cycle'])
def test_learning_rate_rule(rule, growth, fit):
    def rates(cb):
        learn = tiny_learner(n=72, cbs=[cb, Batches()])
        with sizes_seen(learn): getattr(learn, fit)(2, 1e-2)
        return learn,dict(zip(learn.batches.pct, learn.batches.lr))
    _,plain = rates(ProgressiveResize(sizes=[32], until=.5))
    learn,scaled = rates(ProgressiveResize(sizes=[32], until=.5, scale_bs=True, scale_lr=rule))
    for pct,lr in scaled.items():
        near = plain[min(plain, key=lambda p: abs(p-pct))]
        assert lr==pytest.approx(near*(growth if pct<.499 else 1), rel=1e-3)
    assert learn.recorder.lrs==pytest.approx(learn.batches.lr)

@pytest.mark.parametrize('epochs,says', [(1,'batches of 8;'), (2,'batches of 32, 8;')])
def test_says_the_batches_there_will_be(epochs, says, capsys):
    learn = tiny_learner(n=72, cbs=ProgressiveResize(sizes=[32], until=.5, scale_bs=True))
    with learn.no_bar(): learn.fit(epochs)
    assert says in capsys.readouterr().out

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

def test_max_bs_and_fine_tune():
    learn = tiny_learner(n=72, cbs=[ProgressiveResize(sizes=[32], until=.5, scale_bs=True, max_bs=16), Batches(), GradientAccumulation(16)])
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

@pytest.mark.parametrize('name,val', [('where','gpu'), ('scale_bs','yes'), ('max_bs',0), ('max_bs',1.5), ('scale_lr','cube')])
def test_bad_argument(name, val):
    with pytest.raises(ValueError, match=f'`{name}`'): ProgressiveResize(**{name:val})

def test_stage_of_as_many_pixels(tmp_path):
    learn = tiny_learner(n=72, cbs=Batches())
    learn.path = tmp_path
    with sizes_seen(learn): learn.fit_stages([Stage(32, 1, bs='pixels')])
    assert learn.batches.bs==[32]*2 and learn.dls.train.bs==8
    with pytest.raises(ValueError, match="`bs`.*'pixel'"): Stage(32, 1, bs='pixel')

# The largest batch ------------------------------------------------------------

class Limited(nn.Module):
    "Refuses more than so many pixels, in the forward or the backward pass"
    def __init__(self, pixels, backward): super().__init__(); self.pixels,self.backward = pixels,backward
    def check(self, x):
        if x.shape[0]*x.shape[-1]*x.shape[-2]>self.pixels: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')
    def forward(self, x):
        if not self.backward: self.check(x)
        else:
            x = x.requires_grad_()
            x.register_hook(lambda g: self.check(g))
        return x

def limited(images, backward=False, **kwargs):
    learn = tiny_learner(n=400, **kwargs)
    learn.model.insert(0, Limited(images*64*64, backward))
    return learn

def everything(learn):
    states = dict(random=random.getstate(), torch=torch.get_rng_state().tolist(), numpy=str(np.random.get_state()), loader=learn.dls.train.rng.getstate())
    return dict(model={k:v.tolist() for k,v in learn.model.state_dict().items()}, modes=[m.training for m in learn.model.modules()], frozen=[p.requires_grad for p in learn.model.parameters()],
                opt=learn.opt and [{k:v.tolist() if isinstance(v, torch.Tensor) else v for k,v in s.items()} for s in learn.opt.state_dict()['state']],
                hypers=learn.opt and [dict(h) for h in learn.opt.hypers], bs=learn.dls.train.bs, cbs=sorted(c.name for c in learn.cbs), **states)

@pytest.mark.parametrize('backward', [False,True], ids=['forward','backward'])
@pytest.mark.parametrize('images,expected', [(3,2), (8,8), (50,48), (63,56), (64,64), (1000,128)])
def test_find_bs(images, expected, backward):
    learn = limited(images, backward)
    with learn.no_logging(): assert find_bs(learn)==expected

def test_find_bs_of_a_size_and_a_maximum():
    with (learn := limited(16)).no_logging():
        assert find_bs(learn, size=32)==64 and find_bs(learn, size=(32,64))==32 and find_bs(learn, max_bs=12)==12
        with pytest.raises(ValueError, match='batch of 1'): find_bs(limited(0))

@pytest.mark.parametrize('trained', [False,True])
def test_find_bs_leaves_all_as_it_was(trained, tmp_path):
    learn = limited(50, cbs=[SaveModelCallback(), CSVLogger(), ProgressiveResize(mult=8)])
    learn.path = tmp_path
    if trained:
        with sizes_seen(learn): learn.fine_tune(1)
    learn.freeze()
    learn.model[2].eval()
    opt = learn.opt
    was,values,files = everything(learn),[list(o) for o in learn.recorder.values] if trained else None,{f:f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    with learn.no_logging(): assert find_bs(learn)==48
    assert everything(learn)==was and learn.opt is opt
    if trained: assert [list(o) for o in learn.recorder.values]==values
    assert {f:f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}==files

def test_find_bs_with_several_targets():
    "The model gets the inputs alone"
    learn = limited(50)
    learn.dls = DataBlock((ImageBlock,CategoryBlock,CategoryBlock), getters=[lambda i: PILImage.create(np.full((32,32,3), i, dtype=np.uint8)), lambda i: i%2, lambda i: i%2], n_inp=1,
                          splitter=IndexSplitter(range(8))).dataloaders(list(range(100)), bs=8, num_workers=0, device='cpu')
    learn.model[0].pixels = 50*32*32
    learn.loss_func = lambda pred, a, b: nn.functional.cross_entropy(pred, a) + nn.functional.cross_entropy(pred, b)
    with learn.no_logging(): assert find_bs(learn)==48

class CPUMixed(MixedPrecision):
    "fastai's, which knows CUDA only, on the CPU"
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', dtype=torch.bfloat16),torch.amp.GradScaler('cpu', enabled=False),L()
    def after_batch(self): pass

def test_find_bs_leaves_autocast():
    learn = limited(50, cbs=CPUMixed())
    with learn.no_logging(): assert find_bs(learn)==48
    assert not torch.is_autocast_enabled('cpu')

def test_find_bs_measures_the_step_despite_accumulation():
    learn = tiny_learner(n=400, cbs=GradientAccumulation(1000))
    learn.create_opt()
    step = learn.opt.step
    def limit(*args):
        if len(learn.xb[0])>20: raise torch.OutOfMemoryError('CUDA out of memory')
        step(*args)
    learn.opt.step = limit
    with learn.no_logging(): assert find_bs(learn)==16

def test_find_bs_bad_argument():
    with pytest.raises(ValueError, match='`max_bs`'): find_bs(limited(50), max_bs=0)

def test_other_errors_are_raised():
    learn = limited(50)
    learn.loss_func = lambda *args: 1/0
    with learn.no_logging(), pytest.raises(ZeroDivisionError): find_bs(learn)
    assert learn.opt is None

def test_find_bs_of_fastai():
    assert find_bs((torch.rand(5,3), torch.rand(5)))==5==fastai.torch_core.find_bs((torch.rand(5,3), torch.rand(5)))
