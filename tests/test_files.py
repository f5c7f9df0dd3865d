"Small copies of a data set, and images that cannot be decoded"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torch import nn
from fasttransform import Transform
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import ColReader, ColSplitter, GrandparentSplitter, IndexSplitter, RandomSplitter, get_image_files, parent_label
from fastai.learner import Learner, load_learner
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai_tricks.all import CorruptImagesError, PILImageDraft, ProgressiveResize, climb, cross_validate, resized_copies, skip_corrupt
from fastai_tricks.test_utils import tiny_learner, sizes_seen

def picture(seed, wh=(300,200), mode='RGB'): return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8,12,3), dtype=np.uint8)).resize(wh, Image.Resampling.BICUBIC).convert(mode)

# Copies -----------------------------------------------------------------------

@pytest.fixture
def src(tmp_path):
    "Photos of many kinds in nested folders"
    src = tmp_path/'src'
    (src/'a'/'deep').mkdir(parents=True); (src/'b').mkdir()
    exif = Image.Exif()
    exif[274],exif[270] = 6,'a long description'
    picture(0).save(src/'a'/'0.jpg', exif=exif)
    picture(1).save(src/'a'/'1.png')
    picture(2, (60,40)).save(src/'a'/'deep'/'2.jpg') # Smaller than the copies
    picture(3, mode='L').save(src/'b'/'3.jpg')
    picture(4, mode='CMYK').save(src/'b'/'4.jpg')
    picture(5, mode='RGBA').save(src/'b'/'5.png')
    picture(6, mode='P').save(src/'b'/'6.png')
    picture(7, (200,300)).save(src/'b'/'7.webp')
    picture(8, mode='1').save(src/'b'/'8.png')
    return src

def files(path): return {f.relative_to(path).as_posix():f for f in path.rglob('*') if f.is_file()}

@pytest.mark.parametrize('n_workers', [0,2])
def test_copies(src, tmp_path, n_workers):
    df = resized_copies(src, tmp_path/'dest', sizes=(64,128), n_workers=n_workers)
    originals = files(src)
    assert set(files(tmp_path/'dest'))=={f'{s}/{n}' for s in (64,128) for n in originals} | {'images.csv','resized_copies.json'}
    assert df['file'].tolist()==sorted(df['file']) and set(df['file'])==set(originals) and df['error'].isna().all()
    assert pd.read_csv(tmp_path/'dest'/'images.csv')[['file','width','height']].equals(df[['file','width','height']])
    for n,w,h in df[['file','width','height']].itertuples(index=False):
        with Image.open(originals[n]) as was:
            assert (w,h)==was.size
            for s in (64,128):
                with Image.open(tmp_path/'dest'/str(s)/n) as im:
                    assert im.format==was.format and min(im.size)==min(s, min(w, h))
                    assert im.width/im.height==pytest.approx(w/h, rel=.02)
                    a,b = (np.asarray(o.convert('RGB').resize((30,20))).astype(float) for o in (was, im))
                    assert np.abs(a-b).mean()<6, n
    with Image.open(tmp_path/'dest'/'64'/'a'/'0.jpg') as im: assert dict(im.getexif())=={274:6}
    with Image.open(tmp_path/'dest'/'64'/'b'/'5.png') as im: assert im.mode=='RGBA'
    assert (tmp_path/'dest'/'64'/'a'/'deep'/'2.jpg').read_bytes()==originals['a/deep/2.jpg'].read_bytes()

def test_second_run_does_what_is_missing_or_changed(src, tmp_path, capsys):
    dest = tmp_path/'dest'
    resized_copies(src, dest, sizes=64, n_workers=0)
    was = {n:f.stat().st_ino for n,f in files(dest/'64').items()}
    (dest/'64'/'a'/'1.png').unlink()
    picture(9).save(src/'a'/'0.jpg')
    os.utime(src/'a'/'0.jpg', ns=(1,1)) # Older than the copy, but another
    picture(10).save(src/'b'/'new.jpg')
    capsys.readouterr()
    resized_copies(src, dest, sizes=64, n_workers=0)
    assert '3 files written, 7 were there' in capsys.readouterr().out
    now = {n:f.stat().st_ino for n,f in files(dest/'64').items()}
    assert {n for n in now if now[n]!=was.get(n)} >= {'a/0.jpg','b/new.jpg'}
    assert all(now[n]==was[n] for n in now if n not in ('a/0.jpg','a/1.png','b/new.jpg'))
    resized_copies(src, dest, sizes=(64,100), n_workers=0)
    assert '10 files written, 10 were there' in capsys.readouterr().out

def test_format_and_quality(src, tmp_path):
    (src/'a'/'0.png').write_bytes((src/'a'/'1.png').read_bytes())
    with pytest.raises(ValueError, match="`format`.*a/0.png.*a/0.jpg"): resized_copies(src, tmp_path/'dest', sizes=64, format='JPEG', n_workers=0)
    assert not (tmp_path/'dest').exists()
    (src/'a'/'0.png').unlink()
    for q in (20,95): resized_copies(src, tmp_path/f'q{q}', sizes=64, format='JPEG', quality=q, n_workers=0)
    a,b = (files(tmp_path/f'q{q}'/'64') for q in (20,95))
    assert {Path(n).suffix for n in a}=={'.jpg'} and len(a)==9
    assert all(Image.open(f).format=='JPEG' for f in a.values())
    assert sum(f.stat().st_size for f in a.values()) < .7*sum(f.stat().st_size for f in b.values())
    with pytest.raises(ValueError, match="quality': 20"): resized_copies(src, tmp_path/'q20', sizes=64, format='JPEG', quality=95)

def test_masks_stay_masks(tmp_path):
    (tmp_path/'src').mkdir()
    mask = Image.fromarray(np.random.default_rng(0).choice([0,7,200], (90,120)).astype(np.uint8))
    mask.save(tmp_path/'src'/'m.png')
    resized_copies(tmp_path/'src', tmp_path/'dest', sizes=30, resample=Image.Resampling.NEAREST, n_workers=0)
    assert set(np.unique(np.array(Image.open(tmp_path/'dest'/'30'/'m.png'))))=={0,7,200}

def test_corrupt_files_are_listed(src, tmp_path, capsys):
    (src/'a'/'html.jpg').write_text('<html>404</html>')
    (src/'a'/'empty.jpg').write_bytes(b'')
    (src/'a'/'short.jpg').write_bytes((src/'b'/'3.jpg').read_bytes()[:900])
    df = resized_copies(src, tmp_path/'dest', sizes=64, n_workers=2)
    bad = df[df['error'].notna()]
    assert set(bad['file'])=={'a/html.jpg','a/empty.jpg','a/short.jpg'} and len(files(tmp_path/'dest'/'64'))==9
    assert '3 images could not be copied: a/empty.jpg' in capsys.readouterr().out

@pytest.mark.parametrize('dest', ['small','.','..'])
def test_copies_are_not_copied(src, dest, monkeypatch):
    "Within the folder of the originals, the same, or the one above; and by another spelling"
    monkeypatch.chdir(src.parent)
    for sizes,s in ((64,src), (100,src), (64,Path('src'))):
        df = resized_copies(s, src/dest, sizes=sizes, n_workers=0)
        assert len(df)==9 and len(files(src/dest/str(sizes)))==9

RUN = "import sys; from fastai_tricks.files import resized_copies; resized_copies(sys.argv[1], sys.argv[2], sizes=(200,400), n_workers=2)"

def test_killed_and_run_again(tmp_path):
    "Files are whole or absent whenever the process dies"
    src,dest = tmp_path/'src',tmp_path/'dest'
    src.mkdir()
    for i in range(60): picture(i, (900,600)).save(src/f'{i}.png')
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', RUN, str(src), str(dest)], stdout=subprocess.DEVNULL, start_new_session=True)
    done = lambda: [f for f in dest.rglob('*.png') if not f.name.startswith('.')]
    while p.poll() is None and len(done())<10: time.sleep(.005)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    assert 10<=len(done())<120
    for f in done(): Image.open(f).load()
    resized_copies(src, dest, sizes=(200,400), n_workers=0)
    assert len(get_image_files(dest/'200'))==len(get_image_files(dest/'400'))==60

@pytest.mark.parametrize('name,val', [('sizes',()), ('sizes',(0,)), ('sizes','64'), ('quality',0), ('format','JPG'), ('src','nowhere')])
def test_bad_argument(src, tmp_path, name, val):
    with pytest.raises(ValueError, match=f'`{name}`'): resized_copies(**{**dict(src=src, dest=tmp_path/'dest'), name:val})
    assert not (tmp_path/'dest').exists()

# Corrupt images ---------------------------------------------------------------

@pytest.fixture
def photos(tmp_path):
    "Two classes of 12 in train and 4 in valid; three corrupt ones in train, one in valid, and a PNG named .jpg"
    for split,n in (('train',12),('valid',4)):
        for c in 'ab':
            (tmp_path/split/c).mkdir(parents=True)
            # The class is in the picture
            for i in range(n): Image.new('RGB', (40,40), (0,0,0) if c=='a' else (255,255,255)).save(tmp_path/split/c/f'{i}.jpg')
    (tmp_path/'train'/'a'/'0.jpg').write_text('<html>404</html>')
    (tmp_path/'train'/'a'/'1.jpg').write_bytes(b'')
    f = tmp_path/'train'/'b'/'2.jpg'
    f.write_bytes(f.read_bytes()[:-200])
    (tmp_path/'valid'/'b'/'1.jpg').write_text('no photo')
    Image.new('RGB', (40,40)).save(tmp_path/'train'/'a'/'3.jpg', 'PNG')
    return tmp_path

BAD = {'train/a/0.jpg','train/a/1.jpg','train/b/2.jpg','valid/b/1.jpg'}
def sorted_files(path): return sorted(get_image_files(path))
def block(cls=PILImage, **kwargs):
    return DataBlock(**{**dict(blocks=(ImageBlock(cls),CategoryBlock), get_items=sorted_files, get_y=parent_label, splitter=GrandparentSplitter(), item_tfms=Resize(32)), **kwargs})

class Received(Callback):
    "Mean brightness and label of each image that the model sees"
    order = 100
    def before_fit(self): self.got = []
    def before_batch(self): self.got += list(zip((self.x>.5).float().mean((1,2,3)).tolist(), self.y.tolist()))

def names(learn, path): return {Path(f).relative_to(path).as_posix() for f in learn.corrupt_images['file']}

@pytest.mark.parametrize('num_workers', [0,2])
@pytest.mark.parametrize('cls', [PILImage,PILImageDraft])
@pytest.mark.parametrize('how', ['dblock','dls'])
def test_replaced_by_one_of_the_same_class(photos, num_workers, cls, how, capsys):
    kwargs = dict(bs=6, num_workers=num_workers, device='cpu')
    if how=='dblock': dls = skip_corrupt(block(cls), max_share=.5).dataloaders(photos, **kwargs)
    else:
        dls = block(cls, get_items=lambda p: sorted_files(p)[2:]).dataloaders(photos, **kwargs) # fastai looks at the first one
        assert skip_corrupt(dls, max_share=.5) is dls
    learn = tiny_learner(dls, cbs=[Received(), ProgressiveResize(mult=8)])
    with learn.no_bar(): learn.fit(2)
    bad = BAD if how=='dblock' else BAD - {'train/a/0.jpg','train/a/1.jpg'}
    assert names(learn, photos)==bad
    assert len(learn.received.got)==2*((24 if how=='dblock' else 18) + 8) # 24 of 24, 18 of 22: the last batch is dropped
    assert all(x==y for x,y in learn.received.got)
    out = capsys.readouterr().out
    assert 'skip_corrupt' in out and 'b/1.jpg' in out
    # What a prediction for the validation set needs is the whole set, in its order
    with learn.no_bar(): preds,targs = learn.get_preds()
    assert len(preds)==8 and targs.tolist()==[0]*4 + [1]*4

def test_times_are_counted(photos):
    learn = tiny_learner(skip_corrupt(block(), .5).dataloaders(photos, bs=24, num_workers=0, device='cpu'))
    with sizes_seen(learn): learn.fit(3)
    df = learn.corrupt_images.set_index('file')
    assert df.loc[str(photos/'train'/'b'/'2.jpg'),'times']==3 and df.loc[str(photos/'valid'/'b'/'1.jpg'),'times']==3
    assert 'truncated' in df.loc[str(photos/'train'/'b'/'2.jpg'),'error'].lower()

@pytest.mark.parametrize('num_workers', [0,2])
def test_too_many_stop_the_run(photos, num_workers):
    learn = tiny_learner(skip_corrupt(block(get_items=lambda p: sorted_files(p)[2:]).dataloaders(photos, bs=6, num_workers=num_workers, device='cpu'), max_share=0))
    with learn.no_bar(), learn.no_logging(), pytest.raises(CorruptImagesError, match='b/2.jpg'): learn.fit(1)

@pytest.mark.parametrize('blocks,get_y', [((ImageBlock,CategoryBlock),ColReader('label')), ((ImageBlock,MultiCategoryBlock),ColReader('label', label_delim=' '))], ids=['one','many'])
def test_data_frames(photos, blocks, get_y):
    fs = sorted_files(photos)
    df = pd.DataFrame(dict(name=[str(f) for f in fs], label=[f.parent.name + (' x' if i%2 else '') if len(blocks)==2 and blocks[1] is MultiCategoryBlock else f.parent.name for i,f in enumerate(fs)],
                           is_valid=['valid' in str(f) for f in fs])).sample(frac=1, random_state=0)
    db = DataBlock(blocks, get_x=ColReader('name'), get_y=get_y, splitter=ColSplitter(), item_tfms=Resize(32))
    dls = skip_corrupt(db, .5).dataloaders(df, bs=6, num_workers=0, device='cpu')
    seen = [b for _ in range(2) for b in dls.train]
    assert sum(len(b[0]) for b in seen)==48
    # `a` is black and its column of the targets the first
    for x,y in seen:
        is_b = y if y.ndim==1 else y[:,1].long()
        assert torch.equal(torch.Tensor((x.float().mean((1,2,3))>.5).float()).long(), torch.Tensor(is_b.float()).long())
    # Each corrupt one was replaced by one of its class: there are still as many of each
    assert sum(((y if y.ndim==1 else y[:,1]).sum()).item() for _,y in seen)==24

def test_share_is_of_each_split(photos):
    "3 of 24 to train on and 1 of 8 to validate on are an eighth of each"
    learn = tiny_learner(skip_corrupt(block(), max_share=.125).dataloaders(photos, bs=6, num_workers=0, device='cpu'))
    with sizes_seen(learn): learn.fit(2)
    assert names(learn, photos)==BAD

def test_one_is_allowed_in_a_small_set(photos):
    "1 of 8 to validate on is more than a tenth"
    for f in ('a/0.jpg','a/1.jpg','b/2.jpg'): (photos/'train'/f).unlink()
    make = lambda share: tiny_learner(skip_corrupt(block(), share).dataloaders(photos, bs=6, num_workers=0, device='cpu'))
    with sizes_seen(learn := make(.1)): learn.fit(1)
    assert names(learn, photos)=={'valid/b/1.jpg'}
    with sizes_seen(learn := make(0)), pytest.raises(CorruptImagesError, match='1 validation images'): learn.fit(1)

def test_errors_of_labels_are_raised_at_once(photos):
    calls = []
    def no_label(f):
        calls.append(f)
        raise FileNotFoundError('labels.csv')
    with pytest.raises(FileNotFoundError, match='labels.csv'): skip_corrupt(block(get_items=lambda p: sorted_files(p)[2:], get_y=no_label)).dataloaders(photos, bs=6)
    assert len(calls)==1

def test_only_image_of_its_class(photos):
    for f in sorted_files(photos/'train'/'a')[1:]: f.unlink()
    learn = tiny_learner(skip_corrupt(block(), .5).dataloaders(photos, bs=6, num_workers=0, device='cpu'), cbs=Received())
    with sizes_seen(learn): learn.fit(1)
    assert len(learn.received.got)==12+8 and all(x==y for x,y in learn.received.got)

def test_other_errors_are_not_hidden(photos):
    class Fails(Transform):
        order = 0
        def encodes(self, x:PILImage): raise ZeroDivisionError
    dls = block(cls=PILImage, get_items=lambda p: sorted_files(p)[2:]).dataloaders(photos, bs=6, num_workers=0, device='cpu')
    skip_corrupt(dls, .5).train.after_item.add(Fails())
    with pytest.raises(ZeroDivisionError): dls.train.one_batch()

def test_test_images_are_not_replaced(photos, tmp_path):
    learn = tiny_learner(skip_corrupt(block(), .5).dataloaders(photos, bs=6, num_workers=0, device='cpu'))
    learn.path = tmp_path
    dl = learn.dls.test_dl([photos/'valid'/'a'/'0.jpg', photos/'valid'/'b'/'1.jpg'])
    with learn.no_bar(), pytest.raises(OSError, match='1.jpg'): learn.get_preds(dl=dl)
    with learn.no_bar(), learn.no_logging():
        learn.export('l.pkl')
        loaded = load_learner(tmp_path/'l.pkl')
        with loaded.no_bar(): loaded.get_preds(dl=loaded.dls.test_dl([photos/'valid'/'a'/'0.jpg']))

def test_nothing_noted_without():
    assert len(tiny_learner().corrupt_images)==0

@pytest.mark.parametrize('data', [None, [1], DataLoaders(torch.utils.data.DataLoader([1]))], ids=['none','list','torch'])
def test_skip_corrupt_of_something_else(data):
    with pytest.raises((ValueError,TypeError), match='DataLoaders|fastai'): skip_corrupt(data)

def test_max_share_out_of_range():
    with pytest.raises(ValueError, match='`max_share`'): skip_corrupt(block(), max_share=5)

def test_skip_corrupt_with_class_subsets_and_folds(tmp_path):
    for c in 'abc':
        (tmp_path/'photos'/c).mkdir(parents=True)
        for i in range(12): Image.fromarray(np.random.default_rng(i).integers(0, 255, (40,40,3), dtype=np.uint8)).save(tmp_path/'photos'/c/f'{i:02}.jpg')
    for f in ('a/00.jpg','b/05.jpg'): (tmp_path/'photos'/f).write_bytes((tmp_path/'photos'/f).read_bytes()[:300])
    block,met = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(seed=1), item_tfms=Resize(32)),set()
    def fit(learn):
        learn.fit(1)
        met.update(Path(f).relative_to(tmp_path/'photos').as_posix() for f in learn.corrupt_images['file'])
    def make(dls): return Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48,dls.c)))
    args = dict(fit=fit, n_splits=3, bs=4, num_workers=0, device='cpu', out=tmp_path/'out')
    for b in (skip_corrupt(block, max_share=.5), skip_corrupt(block, max_share=.5).class_subset(['a','b']), skip_corrupt(block.class_subset(['a','b']), max_share=.5)):
        met.clear()
        cv = cross_validate(make, b, tmp_path/'photos', **args)
        assert met=={'a/00.jpg','b/05.jpg'} and len(cv.items)==(36 if len(cv.vocab)==3 else 24) and not cv.oof.isnan().any()
    met.clear()
    climb(make, skip_corrupt(block, max_share=.5), tmp_path/'photos', rungs=[(2,16),None], by='name', **args)
    assert met=={'a/00.jpg','b/05.jpg'}
