"`PILImageDraft` against `PILImage`"
import copy, pickle, random
from functools import lru_cache
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from sklearn.datasets import load_sample_images
from fastai.learner import load_learner
from fastai.vision.augment import CropPad, RandomCrop, RandomResizedCrop, Resize
from fastai.vision.core import PILImage, TensorImage
from fastai.vision.data import ImageDataLoaders
from fastai_tricks.all import PILImageDraft
from fastai_tricks.data.draft import ReducedSpan, draft_scale, reduced_span
from fastai_tricks.core.test_utils import tiny_learner
from jpegs import jpeg, psnr, scales # noqa: F401 - a fixture

PHOTOS = [Image.fromarray(a) for a in load_sample_images().images]

@lru_cache(None)
def photo(i, wh): return jpeg(PHOTOS[i].resize(wh))

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
@pytest.mark.parametrize('wh', [(643,429),(427,640),(2001,333)])
def test_same_picture(tfm, wh, scales):
    for i,size,split_idx in ((0,32,0), (1,(48,64),0), (1,32,1), (0,(48,64),1)):
        assert psnr(*both(photo(i, wh), TFMS[tfm](size), split_idx=split_idx))>=30
    assert (max(scales)>1)==(wh!=(2001,333) or tfm!='pad reflection') # Mirrored so often, it is decoded in full

@pytest.mark.parametrize('args,span', [
    (dict(at=0, length=96, size=96, d=8, n=12), ReducedSpan(0, 12, 0, 0, 0., 12.)),       # All of it
    (dict(at=0, length=90, size=90, d=8, n=12), ReducedSpan(0, 12, 0, 0, 0., 11.25)),     # Sides are rounded up: the last pixel holds a quarter
    (dict(at=20, length=70, size=100, d=4, n=25), ReducedSpan(5, 23, 0, 0, 0., 17.5)),
    (dict(at=21, length=9, size=100, d=4, n=25), ReducedSpan(5, 8, 0, 0, .25, 2.5)),
    (dict(at=3, length=10, size=20, origin=5, d=2, n=50), ReducedSpan(4, 9, 0, 0, 0., 5.)), # Of a part that begins at 5
    (dict(at=-6, length=40, size=30, d=4, n=8), ReducedSpan(0, 8, 2, 1, .5, 10.5)),
    (dict(at=-8, length=20, size=40, d=4, n=10), ReducedSpan(0, 3, 2, 0, 0., 5.))])
def test_part_at_a_smaller_scale(args, span): assert reduced_span(**args)==span

def test_scale_leaves_enough_pixels(scales):
    data = photo(0, (1000,667))
    for size in (32,64,83,84,166,167,300,350): both(data, Resize(size), split_idx=1)
    assert scales==[8,8,8,4,4,2,2,1]
    scales.clear()
    # The crop must have enough, not the whole image
    for _ in range(50):
        t,im = RandomResizedCrop(64, min_scale=.05),PILImageDraft.create(data)
        t(im, split_idx=0)
        assert scales[-1]==draft_scale(t.cp_size, (64,64))
    assert len(set(scales))>2

def test_no_scaling_is_exact(scales):
    data = jpeg(PHOTOS[0])
    for t in (Resize(400), Resize(600), Resize(64, resamples=(Image.NEAREST,Image.NEAREST)), CropPad(100), RandomCrop(100)):
        a,b = both(data, t)
        assert np.array_equal(np.array(a), np.array(b))
    assert set(scales)=={1}

def test_crop_then_resize(scales):
    a,b = both(photo(0, (1000,667)), RandomCrop(450), Resize(50))
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
