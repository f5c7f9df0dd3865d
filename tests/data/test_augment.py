"`AlbumentationsTfm` and `albu_transforms`: what belongs on no page"
import pickle, random, re, sys
from functools import partial
from multiprocessing.reduction import ForkingPickler
import albumentations as A
import numpy as np, pytest, torch
from PIL import Image
from sklearn.datasets import load_sample_images
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import IndexSplitter, TensorMultiCategory, ToTensor
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from fastai.vision.augment import Flip, Resize, aug_transforms
from fastai.vision.core import PILImage, PILImageBW, PILMask, TensorBBox, TensorImage, TensorMask, TensorPoint
from fastai.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock, ImageDataLoaders, MaskBlock, PointBlock
from fastai_tricks.all import AlbumentationsTfm, PILImageDraft, albu_transforms
from fastai_tricks.resize.strength import at_strength
from fastai_tricks.data.transforms import at_ratio, size_set
from fastai_tricks.core.test_utils import tiny_learner
from jpegs import jpeg, psnr, scales # noqa: F401 - a fixture

PHOTOS = [Image.fromarray(a) for a in load_sample_images().images]

def pixels(i=0, h=48, w=80): return np.random.default_rng(i).integers(0, 255, (h,w,3), dtype=np.uint8)
def image(i, h=48, w=80): return PILImage.create(pixels(i, h, w))
def same_image(i): return image(0)
def mask(i): return PILMask.create(pixels(i)[...,0])
def points(i): return [[10.,20.],[70.,5.]]
def parity(i): return i%2

def loaders(blocks, tfm, n=24, num_workers=0, bs=8, **kwargs):
    return DataBlock(blocks, splitter=IndexSplitter(range(16,n)), item_tfms=tfm, **kwargs).dataloaders(list(range(n)), bs=bs, num_workers=num_workers, device='cpu')

def plain(t): return torch.as_tensor(np.asarray(t)).float() if isinstance(t, Image.Image) else torch.Tensor(t.float())

# Everything in the item -------------------------------------------------------

def item(): return (PILImage.create(pixels()), PILMask.create(pixels()[...,0]), TensorPoint.create(points(0)),
                    TensorBBox.create([[0,0,10,10],[40,10,90,50.],[20,0,40,40]]), TensorMultiCategory([1,2,3]), PILImageBW.create(pixels()[...,1]))

def test_flip_by_hand():
    im,m,p,b,l,bw = AlbumentationsTfm(A.HorizontalFlip(p=1))(item(), split_idx=0)
    assert np.array_equal(np.asarray(im), pixels()[:,::-1]) and np.array_equal(np.asarray(m), pixels()[:,::-1,0]) and np.array_equal(np.asarray(bw), pixels()[:,::-1,1])
    assert torch.allclose(plain(p), torch.tensor([[69.,20],[9,5]]))            # Pixel k becomes pixel 79-k
    assert torch.allclose(plain(b), torch.tensor([[70.,0,80,10],[0,10,40,48],[40,0,60,40]]), atol=1e-4) # Clipped at the edge, where 90 and 50 lie outside
    assert l.tolist()==[1,2,3]
    assert [type(o) for o in (im,m,p,b,l,bw)]==[PILImage,PILMask,TensorPoint,TensorBBox,TensorMultiCategory,PILImageBW]

def test_images_of_pillow():
    "Not fastai's own type"
    im = AlbumentationsTfm(A.HorizontalFlip(p=1))(Image.fromarray(pixels()), split_idx=0)
    assert type(im) is Image.Image and np.array_equal(np.asarray(im), pixels()[:,::-1])

@pytest.mark.parametrize('mode', ['P','CMYK','1','LA','RGBA'])
def test_modes(mode):
    "Colours are mixed, not indices of a palette"
    im = Image.fromarray(pixels()).resize((20,20)).resize((80,50)).convert(mode)
    res = AlbumentationsTfm(A.Resize(25, 40))((PILImage(im),), split_idx=0)[0]
    want = A.Resize(25, 40)(image=np.asarray(im.convert({'P':'RGB','CMYK':'RGB','1':'L'}.get(mode, mode))))['image']
    assert np.array_equal(np.asarray(res), want) and type(res) is PILImage

@pytest.mark.parametrize('t', [lambda: A.RandomResizedCrop(size=(48,64), scale=(.3,1), area_for_downscale='image'), lambda: A.Resize(30, 40, interpolation=2, area_for_downscale='image'),
                               lambda: A.SmallestMaxSize(150, area_for_downscale='image'), lambda: A.RandomResizedCrop(size=(48,64))])
def test_as_albumentations_does(t):
    "A decoded image, cut before it becomes an array, comes out as if albumentations had done it all"
    tfm = AlbumentationsTfm([t(),A.HorizontalFlip(p=.5)])
    for _ in range(5):
        state = random.getstate()
        got = tfm((PILImage.create(PHOTOS[0]),), split_idx=0)[0]
        random.setstate(state)
        whole = A.Compose([t(),A.HorizontalFlip(p=.5)])
        whole.set_random_state(*tfm._seeded())
        assert np.array_equal(np.asarray(got), whole(image=np.asarray(PHOTOS[0]))['image'])

@pytest.mark.parametrize('t', [A.Resize(24, 24, area_for_downscale='image'), A.RandomResizedCrop(size=(24,24), area_for_downscale='image')])
def test_integers_that_cv2_does_not_know(t):
    im = Image.fromarray(np.full((48,80), 70000, dtype=np.int32))
    res = AlbumentationsTfm(t)((PILImage(im),), split_idx=0)[0]
    assert res.size==(24,24) and set(np.asarray(res).ravel())=={70000}

def test_each_process_makes_its_generators():
    tfm = AlbumentationsTfm(A.HorizontalFlip(p=.5))
    tfm(item(), split_idx=0)
    again = pickle.loads(ForkingPickler.dumps(tfm))
    assert again._rngs is None
    again(item(), split_idx=0)
    assert again._rngs[0] is not tfm._rngs[0]

def test_crop_by_hand():
    im,m,p,b,l,bw = AlbumentationsTfm([A.Crop(30, 5, 80, 45)])(item(), split_idx=0)
    assert np.array_equal(np.asarray(im), pixels()[5:45,30:80]) and np.array_equal(np.asarray(m), pixels()[5:45,30:80,0]) and bw.size==(50,40)
    assert torch.allclose(plain(p), torch.tensor([[-20.,15],[40,0]]))          # Points outside stay: there are as many in each item
    assert torch.allclose(plain(b), torch.tensor([[10.,5,50,40],[0,0,10,35]]), atol=1e-4) and l.tolist()==[2,3]

def test_no_box_left():
    im,b,l = AlbumentationsTfm([A.Crop(60, 40, 64, 44)])((image(0), TensorBBox.create([[0,0,10,10]]), TensorMultiCategory([1])), split_idx=0)
    assert b.shape==(0,4) and l.shape==(0,) and im.size==(4,4)
    assert (type(b),type(l))==(TensorBBox,TensorMultiCategory)

def test_two_sets_of_boxes():
    "Each drops its own labels; a label of another length is none of theirs"
    b1,b2 = TensorBBox.create([[0,0,10,10],[40,10,60,30]]),TensorBBox.create([[50,0,70,40]])
    _,r1,l1,r2,l2,tags = AlbumentationsTfm([A.Crop(30, 5, 80, 45)])((image(0), b1, TensorMultiCategory([1,2]), b2, TensorMultiCategory([3]), TensorMultiCategory([7,8,9])), split_idx=0)
    assert (l1.tolist(),l2.tolist(),tags.tolist())==([2],[3],[7,8,9])
    assert torch.allclose(plain(r2), torch.tensor([[20.,0,40,35]]), atol=1e-4) and len(r1)==1

def test_own_box_params_are_kept():
    crop = A.Compose([A.Crop(5, 0, 80, 48)], bbox_params=A.BboxParams('coco', min_visibility=.9))
    _,b,l = AlbumentationsTfm(crop)((image(0), TensorBBox.create([[0,0,10,10],[40,10,60,30]]), TensorMultiCategory([1,2])), split_idx=0)
    assert l.tolist()==[2] and torch.allclose(plain(b), torch.tensor([[35.,10,55,30]]), atol=1e-4)

WILD = [A.RandomResizedCrop(size=(32,32), interpolation=0, p=1), A.D4(p=1), A.Affine(rotate=(-40,40), interpolation=0, p=.7), A.HorizontalFlip(p=.5)]

def test_same_randomness_for_all():
    tfm = AlbumentationsTfm(WILD)
    for _ in range(20):
        a,m,b = tfm((image(0), PILMask.create(pixels()[...,0]), image(0)), split_idx=0)
        assert np.array_equal(np.asarray(a), np.asarray(b)) and np.array_equal(np.asarray(a)[...,0], np.asarray(m))

def test_points_follow_the_image():
    "A white pixel, and a point on it"
    tfm,hits = AlbumentationsTfm([A.RandomResizedCrop(size=(48,80), scale=(.5,1)), A.HorizontalFlip(p=.5), A.Rotate(limit=30, p=1)]),0
    set_seed(0)
    for _ in range(30):
        a = np.zeros((96,160,3), np.uint8)
        a[38:43,58:63] = 255
        im,p,b = tfm((PILImage.create(a), TensorPoint.create([[60.,40.]]), TensorBBox.create([[58,38,63,43]])), split_idx=0)
        ys,xs = np.nonzero(np.asarray(im)[...,0]>100)
        if not len(xs) or min(xs)==0 or max(xs)==79 or min(ys)==0 or max(ys)==47: continue
        hits += 1
        assert abs(xs.mean()-p[0,0].item())<1.5 and abs(ys.mean()-p[0,1].item())<1.5
        x0,y0,x1,y1 = b[0].tolist()
        assert x0-1<=xs.min() and xs.max()<=x1 and y0-1<=ys.min() and ys.max()<=y1
    assert hits>10

@pytest.mark.parametrize('mode', [2,4])
def test_mirrored_edges_multiply_nothing(mode):
    got = []
    for border in (0,mode):
        set_seed(3)
        tfm = AlbumentationsTfm([A.OneOf([A.Affine(rotate=(25,25), border_mode=border, p=1)], p=1),A.Rotate(limit=(10,10), border_mode=border, p=1)])
        got.append(tfm(item()[:5], split_idx=0)[2:])
    (p,b,l),(p2,b2,l2) = got
    assert torch.allclose(plain(p), plain(p2)) and torch.allclose(plain(b), plain(b2)) and l.tolist()==l2.tolist() and len(p)==2
    tfm = albu_transforms(64)
    for _ in range(40):
        _,_,p,_,l = tfm(item()[:5], split_idx=0)
        assert len(p)==2 and len(set(l.tolist()))==len(l)
    # Alone, images are mirrored
    white = PILImage.create(np.full((48,80,3), 255, np.uint8))
    assert np.asarray(AlbumentationsTfm(A.Rotate(limit=(30,30), border_mode=mode, p=1))(white, split_idx=0)).min()>250

def test_sizes_must_agree():
    with pytest.raises(ValueError, match='must be of one size'): AlbumentationsTfm(WILD)((image(0), image(0, 20, 20)), split_idx=0)

def test_nothing_to_do():
    x = (image(0), torch.tensor(1.))
    assert AlbumentationsTfm(None, WILD)(x, split_idx=0) is x
    assert AlbumentationsTfm(WILD)((torch.tensor(1.),), split_idx=0)==(torch.tensor(1.),)
    assert AlbumentationsTfm(A.Resize(10, 20))(image(0), split_idx=0).size==(20,10)

# Loaders ----------------------------------------------------------------------

def test_order_among_fastai_transforms():
    dls = loaders((ImageBlock,PointBlock), [AlbumentationsTfm([A.Crop(0, 0, 32, 40)], [A.Crop(0, 0, 32, 40)]),Resize(64)], get_x=image, get_y=points)
    assert [type(f).__name__ for f in dls.after_item.fs]==['PointScaler','Resize','AlbumentationsTfm','ToTensor']
    assert {tuple(x.shape) for dl in dls.loaders for x,_ in dl}=={(8,3,40,32)}

@pytest.mark.parametrize('scaled', [True,False])
def test_points_in_a_batch(scaled):
    block = PointBlock if scaled else TransformBlock(type_tfms=TensorPoint.create)
    dls = loaders((ImageBlock,block), AlbumentationsTfm([A.Crop(5, 5, 75, 45)], [A.HorizontalFlip(p=1)]), get_x=same_image, get_y=points)
    for dl,px,size in zip(dls.loaders, (torch.tensor([[5.,15],[65,0]]),torch.tensor([[69.,20],[9,5]])), ((70,40),(80,48))):
        _,y = dl.one_batch()
        assert isinstance(y, TensorPoint) and torch.allclose(plain(y), (px*2/torch.tensor(size)-1 if scaled else px).expand(8,2,2), atol=1e-5)
    if scaled:
        assert torch.allclose(plain(dls.train.decode_batch(dls.train.one_batch())[0][1]), torch.tensor([[5.,15],[65,0]]), atol=1e-4)
        dls.show_batch()

def boxes(i): return [[0,0,10,10],[40,10,60,30],[20,0,40,40]][:1+i%3]
def names(i): return ['a','b','c'][:1+i%3]

def test_boxes_in_a_batch():
    dls = loaders((ImageBlock,BBoxBlock,BBoxLblBlock), AlbumentationsTfm([A.Crop(30, 5, 80, 45)], [A.Resize(20, 40)]), n_inp=1, getters=[same_image,boxes,names])
    one,two = torch.tensor([10.,5,30,25]),torch.tensor([0.,0,10,35])
    size,seen = torch.tensor([50.,40,50,40]),set()
    for x,b,l in dls.train:
        assert (type(b),type(l))==(TensorBBox,TensorMultiCategory) and x.shape==(8,3,40,50)
        for bb,ll in zip(b, l):
            ns = [dls.vocab[j] for j in ll if j]
            seen.add(tuple(ns))
            for o,px in zip(bb[:len(ns)], (one,two)): assert torch.allclose(plain(o), px*2/size-1, atol=1e-5)
    assert seen=={(),('b',),('b','c')}
    x,b,l = dls.valid.one_batch() # Squeezed to half: relative to the image nothing moves
    assert x.shape[-2:]==(20,40) and torch.allclose(plain(b)[0,0], torch.tensor([0.,0,10,10])*2/torch.tensor([80.,48,80,48])-1, atol=1e-5)
    dls.show_batch()

def test_batch_without_boxes():
    dls = loaders((ImageBlock,BBoxBlock,BBoxLblBlock), AlbumentationsTfm([A.Crop(70, 44, 74, 48)]), n_inp=1, getters=[same_image,boxes,names])
    x,b,l = dls.train.one_batch()
    assert x.shape==(8,3,4,4) and b.numel()==l.numel()==0

def test_masks_in_a_batch():
    dls = loaders((ImageBlock,MaskBlock), AlbumentationsTfm(WILD, A.Resize(32, 32)), get_x=image, get_y=mask)
    x,y = dls.train.one_batch()
    assert (type(x),type(y))==(TensorImage,TensorMask) and (x.shape,y.shape)==((8,3,32,32),(8,32,32))
    assert torch.equal((torch.Tensor(x[:,0])*255).round(), torch.Tensor(y.float()))
    dls.show_batch()

@pytest.mark.parametrize('num_workers', [0,2])
def test_randomness(num_workers):
    "One picture over and over: no two of it come out the same, in no batch, epoch or worker; and all of it again from the same seed"
    tfm = AlbumentationsTfm([A.RandomResizedCrop(size=(24,24), scale=(.3,1)), A.GaussNoise(p=1)])
    def epochs():
        set_seed(42, reproducible=True)
        dls = loaders((ImageBlock,CategoryBlock), tfm, get_x=same_image, get_y=parity, num_workers=num_workers, bs=4)
        return torch.stack([torch.cat([torch.Tensor(x) for x,_ in dls.train]) for _ in range(2)])
    a,b = epochs(),epochs()
    assert torch.equal(a, b)
    assert len(a.flatten(0, 1).flatten(1).unique(dim=0))==2*16

def test_validation_test_and_tta():
    tfm = AlbumentationsTfm([A.Crop(0, 0, 32, 32),A.InvertImg(p=1)], [A.Crop(0, 0, 32, 32)])
    dls = loaders((ImageBlock,CategoryBlock), tfm, get_x=image, get_y=parity)
    plain_ = torch.from_numpy(pixels(16)[:32,:32]).permute(2, 0, 1)/255
    assert torch.allclose(torch.Tensor(dls.valid.one_batch()[0][0]), plain_)
    assert torch.allclose(torch.Tensor(dls.test_dl([16]).one_batch()[0][0]), plain_)
    assert torch.allclose(torch.Tensor(dls.test_dl([16], with_labels=True).one_batch()[0][0]), plain_)
    learn,seen = tiny_learner(dls),[]
    learn.model.register_forward_pre_hook(lambda m,i: seen.append(torch.Tensor(i[0][0])))
    with learn.no_bar(), learn.no_logging():
        learn.predict(16)
        assert torch.allclose(seen[-1], plain_)
        seen.clear()
        learn.tta(n=2)
    assert torch.allclose(seen[-1], plain_) and all(torch.allclose(o, 1-plain_) for o in seen[:-1]) and len(seen)==3
    assert torch.allclose(torch.Tensor(dls.valid.one_batch()[0][0]), plain_)

def test_valid_stays_as_it_is_without_a_pipeline():
    dls = loaders((ImageBlock,CategoryBlock), AlbumentationsTfm([A.Crop(0, 0, 32, 32)]), get_x=image, get_y=parity)
    assert dls.valid.one_batch()[0].shape==(8,3,48,80)

def test_export_and_load(tmp_path):
    learn = tiny_learner(loaders((ImageBlock,CategoryBlock), albu_transforms(32), get_x=image, get_y=parity))
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        expected = learn.predict(3)[2]
        learn.export('l.pkl')
        loaded = load_learner(tmp_path/'l.pkl')
        with loaded.no_bar(): assert torch.allclose(loaded.predict(3)[2], expected)
    copy = pickle.loads(ForkingPickler.dumps(AlbumentationsTfm(WILD)))
    assert copy((image(0),), split_idx=0)[0].size==(32,32)

def test_image_dataloaders(tmp_path):
    for split in ('train','valid'):
        for c in 'ab':
            (tmp_path/split/c).mkdir(parents=True)
            for i in range(4): PHOTOS[0].resize((200,150)).save(tmp_path/split/c/f'{i}.jpg')
    dls = ImageDataLoaders.from_folder(tmp_path, item_tfms=albu_transforms((32,48)), img_cls=PILImageDraft, bs=4, num_workers=0)
    assert [dl.one_batch()[0].shape for dl in dls.loaders]==[(4,3,32,48)]*2

def test_pipeline_given_is_not_touched():
    "Neither its generators nor its targets; and it may be used for two sets at once"
    aug = A.Compose(WILD, seed=3)
    was = pickle.dumps(aug.py_random.getstate())
    tfm = AlbumentationsTfm(aug, aug)
    tfm((image(0), mask(0)), split_idx=0)
    tfm((image(0), mask(0)), split_idx=1)
    assert pickle.dumps(aug.py_random.getstate())==was and not aug.additional_targets and not aug.processors

# Drafts -----------------------------------------------------------------------

AREA = dict(area_for_downscale='image')
SIZED = {'resize':(A.Resize(64, 96, **AREA),30), 'smallest':(A.SmallestMaxSize(100, **AREA),30), 'smallest hw':(A.SmallestMaxSize(max_size_hw=(64,96), **AREA),30),
         'longest':(A.LongestMaxSize(100, **AREA),30), 'crop':(A.RandomResizedCrop(size=(64,64), scale=(.35,1.), **AREA),30)}

@pytest.mark.parametrize('wh', [(2000,1333),(1283,857),(857,1283)])
@pytest.mark.parametrize('kind', SIZED)
def test_same_picture_from_a_draft(kind, wh, scales):
    "As albumentations makes it of all pixels"
    t,least = SIZED[kind]
    tfm = AlbumentationsTfm(t)
    for photo in PHOTOS:
        data,got = jpeg(photo.resize(wh)),[]
        set_seed(5)
        seed = random.getrandbits(64)
        aug = A.Compose([t])
        aug.set_random_state(np.random.default_rng(seed), random.Random(seed))
        full = PILImage.create(data)
        expected = PILImage.create(aug(image=np.asarray(full))['image'])
        for im in (full,PILImageDraft.create(data)):
            set_seed(5)
            got = tfm((im,), split_idx=0)[0]
            assert got.size==expected.size and psnr(got, expected)>=least
        assert kind!='crop' or psnr(tfm((full,), split_idx=0)[0], expected)<18 # Another crop
    assert max(scales)>1

def test_scale_leaves_enough_pixels(scales):
    "Of the crop, not of the image; and no more than that"
    data = jpeg(PHOTOS[0].resize((2000,1333)))
    for _ in range(40):
        t = A.RandomResizedCrop(size=(128,128), scale=(.05,1), ratio=(.7,1.5))
        crops,params = [],t.get_params_dependent_on_data
        def noted(*args, **kwargs):
            crops.append(params(*args, **kwargs)['crop_coords'])
            return dict(crop_coords=crops[-1])
        tfm = AlbumentationsTfm(t)
        tfm.train_aug.transforms[0].get_params_dependent_on_data = noted
        tfm((PILImageDraft.create(data),), split_idx=0)
        (x0,y0,x1,y1), = crops
        least = min(x1-x0, y1-y0)
        assert scales[-1]==next((d for d in (8,4,2) if least>=128*d), 1)
    assert len(set(scales))>2 and len(scales)==40

@pytest.mark.parametrize('tfms', [[A.RandomCrop(64, 64)], [A.HorizontalFlip(p=1),A.Resize(64, 64)], [A.Resize(64, 64, p=.5)], [A.Resize(64, 64, interpolation=0)], [A.Resize(1300, 900)], [A.LongestMaxSize([50,80])],
                                  [A.Affine(rotate=(5,5), p=1)]], ids=['pixels','second','sometimes','nearest','large','one of some','no size'])
def test_decoded_in_full(tfms, scales):
    AlbumentationsTfm(tfms)((PILImageDraft.create(jpeg(PHOTOS[0].resize((2000,1333)))),), split_idx=0)
    assert scales==[1]

def test_pipelines_that_sometimes_do_nothing(scales):
    AlbumentationsTfm(A.Compose([A.Resize(64, 64)], p=.5))((PILImageDraft.create(jpeg(PHOTOS[0].resize((2000,1333)))),), split_idx=0)
    assert scales==[1]

def test_scales_decoded(scales):
    set_seed(2) # How much is cut out is drawn
    data = jpeg(PHOTOS[0].resize((2000,1333)))
    for size in (64,100,128,224,320,640): albu_transforms(size)((PILImageDraft.create(data),), split_idx=0)
    assert len(scales)==6 and scales==sorted(scales, reverse=True) and scales[0]==8 and scales[-1]==1
    scales.clear()
    for size in (128,224,500): albu_transforms(size)((PILImageDraft.create(data),), split_idx=1)
    assert scales==[8,4,2]

def test_draft_with_masks_points_and_boxes(scales):
    "All of it where albumentations alone has it: of a decoded image it makes all, as nothing filters"
    wh,got = (1283,857),[]
    lum = PILMask.create((np.asarray(PHOTOS[0].convert('L').resize((12,8)).resize(wh, Image.BICUBIC))>110).astype(np.uint8))
    for cls in (PILImage,PILImageDraft):
        set_seed(5)
        b = TensorBBox.create([[100,200,400,700.],[900,100,1200,300]])
        got.append(AlbumentationsTfm([A.RandomResizedCrop(size=(96,96), scale=(.4,.6)), A.HorizontalFlip(p=1), A.Affine(rotate=(10,10), p=1)])(
            (cls.create(jpeg(PHOTOS[0].resize(wh))), lum, TensorPoint.create([[300.,300.],[640,428]]), b, TensorMultiCategory([1,2])), split_idx=0))
    (a,m,p,b,l),(a2,m2,p2,b2,l2) = got
    assert scales in ([4],[8])
    assert psnr(a, a2)>=20 and torch.allclose(plain(p), plain(p2), atol=.01) and torch.allclose(plain(b), plain(b2), atol=.01) and l.tolist()==l2.tolist()
    assert (np.asarray(m)==np.asarray(m2)).mean()>.97 and .1<np.asarray(m).mean()<.9

def test_boxes_cut_off_by_a_draft(scales):
    got = []
    for cls in (PILImage,PILImageDraft):
        set_seed(5)
        b = TensorBBox.create([[0,0,20,20],[300,300,1200,800],[1200,800,1283,857]])
        got.append(AlbumentationsTfm(A.RandomResizedCrop(size=(64,64), scale=(.3,.3), ratio=(1,1)))((cls.create(jpeg(PHOTOS[0].resize((1283,857)))), b, TensorMultiCategory([1,2,3])), split_idx=0)[1:])
    assert scales==[8] or scales==[4]
    assert got[0][1].tolist()==got[1][1].tolist() and torch.allclose(plain(got[0][0]), plain(got[1][0]), atol=.01) and len(got[0][1])<3

def test_thresholds_see_the_crop(scales):
    "A box of which little is left is judged by albumentations, so that decodes in full"
    aug = A.Compose([A.Resize(64, 64)], bbox_params=A.BboxParams('pascal_voc', min_visibility=.5))
    AlbumentationsTfm(aug)((PILImageDraft.create(jpeg(PHOTOS[0].resize((1283,857)))), TensorBBox.create([[0,0,20,20]])), split_idx=0)
    assert scales==[1]

def test_another_image_that_is_no_draft(scales):
    data = jpeg(PHOTOS[0].resize((2000,1333)))
    AlbumentationsTfm(A.Resize(64, 64))((PILImageDraft.create(data), PILImage.create(data)), split_idx=0)
    assert scales==[1]
    scales.clear()
    a,b = AlbumentationsTfm(A.Resize(64, 64))((PILImageDraft.create(data), PILImageDraft.create(data)), split_idx=0)
    assert scales==[8,8] and np.array_equal(np.asarray(a), np.asarray(b))

# The default pipeline ---------------------------------------------------------

def test_no_strength_is_validation():
    tfm = albu_transforms(64, strength=0)
    for wh in ((500,375),(375,500),(600,600)):
        a,b = (np.asarray(tfm((PILImage(PHOTOS[0].resize(wh)),), split_idx=i)[0]).astype(float) for i in (0,1))
        assert a.shape==b.shape==(64,64,3) and abs(a-b).mean()<8

def test_strength_is_monotone():
    "The further from the image without augmentation, the stronger"
    def change(s):
        set_seed(1)
        tfm,res = albu_transforms(64, strength=s),[]
        for _ in range(30):
            for im in PHOTOS:
                a,b = (np.asarray(tfm((PILImage(im),), split_idx=i)[0]).astype(float) for i in (0,1))
                res.append(abs(a-b).mean())
        return np.mean(res)
    cs = [change(s) for s in (0,.25,.5,1,2)]
    assert cs==sorted(cs) and cs[1]>1.2*cs[0] and cs[-1]>1.2*cs[2]
    def numbers(s): # Of the transforms themselves
        crop,flip,affine,warp,light = albu_transforms(64, strength=s).train_aug.transforms
        return [1-crop.scale[0], crop.ratio[1], flip.p, affine.p, affine.rotate[1], warp.p, warp.scale[1], light.p, light.brightness_limit[1], light.contrast_limit[1]]
    for a,b in zip(map(numbers, (0,.3,.6)), map(numbers, (.3,.6,1.))): assert all(x<y for x,y in zip(a, b))

def test_lighting_changes_photos_as_much_as_fastais():
    "By brightness and contrast together, in the mean over many draws"
    set_seed(0)
    photos = [np.asarray(p.resize((48,48))) for p in PHOTOS]*400
    x = TensorImage(np.stack(photos)).permute(0,3,1,2).float()/255
    want = x
    for t in aug_transforms(do_flip=False, max_rotate=0, max_warp=0, max_zoom=1.): want = t(want, split_idx=0)
    light = albu_transforms(48).train_aug.transforms[-1]
    light.set_random_seed(0) # `set_seed` doesn't reach a transform outside a pipeline
    got = torch.stack([torch.as_tensor(light(image=p)['image']) for p in photos]).permute(0,3,1,2).float()/255
    change = [float((plain(o)-plain(x)).abs().mean()) for o in (got,want)]
    assert .8<change[0]/change[1]<1.25, change

def test_sides():
    for size in (33,(40,64),(64,40),[32,48]):
        tfm = albu_transforms(size, flip_vert=True)
        hw = (size,size) if isinstance(size, int) else tuple(size)
        for wh in ((500,375),(33,500),(20,20)):
            for split_idx in (0,0,0,1): assert tfm((PILImage(PHOTOS[0].resize(wh)),), split_idx=split_idx)[0].size==hw[::-1]

def test_other_sizes_and_strengths():
    tfm = albu_transforms(64, strength=.8, min_scale=.5)
    assert size_set([tfm,ToTensor()], [])==(64,64)
    small, = at_ratio([tfm], (.5,.5))
    weak, = at_strength([small], .5)
    assert (tfm.size,small.size,weak.size)==((64,64),(32,32),(32,32))
    assert [o.augs.strength for o in (tfm,small,weak)]==[.8,.8,.4] and weak.augs.min_scale==.5
    assert size_set([AlbumentationsTfm(A.Resize(9, 9))], []) is None

# Bad input --------------------------------------------------------------------

@pytest.mark.parametrize('name,val', [('size',0), ('size',(3,)), ('size',1.5), ('strength',-1), ('strength',3), ('strength','1'), ('min_scale',0), ('min_scale',1.5), ('max_rotate',200),
                                      ('max_warp',2), ('max_lighting',-1), ('p_affine',1.1), ('p_lighting',None)])
def test_bad_argument(name, val):
    with pytest.raises(ValueError, match=f'`{name}`.*{re.escape(repr(val))}'): albu_transforms(**{'size':64, name:val})

@pytest.mark.parametrize('val', [3, [Flip()], [A.HorizontalFlip,1], lambda image: image])
def test_no_pipeline(val):
    for name in ('train_aug','valid_aug'):
        with pytest.raises(ValueError, match=f'`{name}` must be a transform of albumentations'): AlbumentationsTfm(**{'train_aug':None, name:val})

@pytest.mark.parametrize('t', [A.Normalize(), A.ToTensorV2(), A.OneOf([A.ToFloat(),A.HorizontalFlip()])])
def test_what_fastai_does_itself(t):
    with pytest.raises(ValueError, match='`train_aug` must be without'): AlbumentationsTfm([A.Resize(9, 9),t])

def test_without_albumentations(monkeypatch):
    monkeypatch.setitem(sys.modules, 'albumentations', None)
    for f in (partial(albu_transforms, 64),partial(AlbumentationsTfm, [])):
        with pytest.raises(ImportError, match=re.escape('pip install fastai_tricks[albumentations]')): f()
