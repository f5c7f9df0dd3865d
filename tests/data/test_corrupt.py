"Images that cannot be decoded are named and replaced"
import struct, zlib
from pathlib import Path
import numpy as np, pandas as pd, pytest, timm, torch
from PIL import Image
from torch import nn
from fasttransform import Transform
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import ColReader, ColSplitter, GrandparentSplitter, IndexSplitter, RandomSplitter, get_image_files, parent_label
from fastai.learner import Learner, load_learner
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai_tricks.all import CorruptImagesError, PILImageDraft, ProgressiveResize, climb, cross_validate, skip_corrupt
from fastai_tricks.core.test_utils import tiny_learner, sizes_seen

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

@pytest.mark.parametrize('num_workers,cls,how', [(0,PILImage,'dblock'), (0,PILImageDraft,'dls'), (2,PILImage,'dls'), (2,PILImageDraft,'dblock')])
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

def test_a_pass_of_features_counts_training_images(photos):
    "It reads them in evaluation; of each split there are fewer corrupt ones than allowed"
    dls = skip_corrupt(block(), max_share=.15).dataloaders(photos, bs=6, num_workers=0, device='cpu')
    learn = Learner(dls, timm.create_model('test_resnet', num_classes=2))
    with learn.no_bar(), learn.no_logging(): learn.fit_fast(1, pretrained=True, mixed=False)
    log = dls.train.do_item.log
    assert names(learn, photos)==BAD and len(log.table(0))==3 and len(log.table(1))==1

@pytest.mark.parametrize('num_workers', [0,2])
def test_too_many_stop_the_run(photos, num_workers):
    dls = block(get_items=lambda p: sorted_files(p)[2:]).dataloaders(photos, bs=6, num_workers=num_workers, device='cpu')
    learn = tiny_learner(skip_corrupt(dls, max_share=0))
    with learn.no_bar(), learn.no_logging(), pytest.raises(CorruptImagesError, match='b/2.jpg'): learn.fit(1)
    # After an error in one of its workers PyTorch waits 5 seconds for each
    for p in torch.multiprocessing.active_children(): p.terminate()

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

@pytest.fixture(scope='module')
def three(tmp_path_factory):
    "Three classes of 6 photos, of which two are cut short, and their DataBlock"
    path = tmp_path_factory.mktemp('three')
    for c in 'abc':
        (path/c).mkdir()
        for i in range(6): Image.fromarray(np.random.default_rng(i).integers(0, 255, (24,24,3), dtype=np.uint8)).save(path/c/f'{i}.jpg')
    for f in ('a/0.jpg','b/3.jpg'): (path/f).write_bytes((path/f).read_bytes()[:300])
    return path,block(splitter=RandomSplitter(seed=1), item_tfms=Resize(16))

def small_learner(dls): return Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48,dls.c)))

def met_in(f, path, **kwargs):
    "What `f` returned, and the names of the files that its trainings met"
    met = set()
    def fit(learn):
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        met.update(names(learn, path))
    return f(small_learner, fit=fit, n_splits=2, bs=4, num_workers=0, device='cpu', **kwargs),met

def test_the_next_of_its_class_is_taken(three):
    path,db = three
    dl = skip_corrupt(db, max_share=.5).dataloaders(path, bs=4, num_workers=0, device='cpu').train
    files,broken = list(dl.dataset.items),{path/'a'/'0.jpg',path/'b'/'3.jpg'}
    bad = [i for i,f in enumerate(files) if f in broken]
    assert bad
    for i in bad:
        j = next(k%len(files) for k in range(i+1, i+len(files)) if files[k%len(files)].parent==files[i].parent and files[k%len(files)] not in broken)
        got,wanted = dl.do_item(i),dl.do_item(j)
        assert torch.equal(got[0], wanted[0]) and got[1]==wanted[1]==dl.vocab.o2i[files[i].parent.name]

WITH = dict(whole=lambda b: skip_corrupt(b, max_share=.5), then_subset=lambda b: skip_corrupt(b, max_share=.5).class_subset(['a','b']),
            of_subset=lambda b: skip_corrupt(b.class_subset(['a','b']), max_share=.5))

@pytest.mark.parametrize('how', WITH)
def test_with_class_subsets_and_folds(three, how, tmp_path):
    path,db = three
    cv,met = met_in(lambda *args, **kwargs: cross_validate(args[0], WITH[how](db), path, out=tmp_path/'out', **kwargs), path)
    assert met=={'a/0.jpg','b/3.jpg'} and len(cv.items)==(18 if how=='whole' else 12) and not cv.oof.isnan().any()

def test_with_climb(three, tmp_path):
    path,db = three
    def run(make, **kwargs): return climb(make, skip_corrupt(db, max_share=.5), path, rungs=[(2,16),None], by='name', out=tmp_path/'out', **kwargs)
    assert met_in(run, path)[1]=={'a/0.jpg','b/3.jpg'}

def test_without_a_training_image_the_error_is_of_fastai(photos):
    "And no other"
    with pytest.raises(IndexError): skip_corrupt(block(splitter=IndexSplitter(range(32)))).dataloaders(photos, bs=4, num_workers=0, device='cpu')

# Images that Pillow refuses ------------------------------------------------------------

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

def png(side, *chunks):
    "A PNG whose header says that it has this side"
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + b''.join(chunks) + chunk(b'IDAT', zlib.compress(b'\0'*(side//8 + 1)*8)) + chunk(b'IEND', b'')

BOMB = png(20_000) # 400 million pixels
TEXT = png(8, chunk(b'zTXt', b'Comment\0\0' + zlib.compress(b'x'*2_000_000)))

@pytest.mark.parametrize('num_workers', [0,2])
@pytest.mark.parametrize('data,error', [(BOMB,'DecompressionBombError'), (TEXT,'ValueError: Decompressed data too large')], ids=['bomb','text'])
def test_the_first_is_refused_by_pillow(tmp_path, capsys, data, error, num_workers):
    "Named, counted and replaced, as one that is broken; in validation too"
    for split,n in (('train',4),('valid',2)):
        for c in 'ab':
            (tmp_path/split/c).mkdir(parents=True)
            for i in range(n): Image.new('RGB', (40,40), (0,0,0) if c=='a' else (255,255,255)).save(tmp_path/split/c/f'{i}.png')
    bad = ['train/a/0.png','train/b/3.png','valid/b/0.png']
    for f in bad: (tmp_path/f).write_bytes(data)
    dls = skip_corrupt(block(), max_share=.5).dataloaders(tmp_path, bs=4, num_workers=num_workers, device='cpu')
    learn = tiny_learner(dls, cbs=Received())
    with learn.no_bar(): learn.fit(1)
    # Pillow 10 capitalises each word
    assert names(learn, tmp_path)==set(bad) and all(error.lower() in e.lower() for e in learn.corrupt_images['error']) and set(learn.corrupt_images['times'])=={1}
    assert len(learn.received.got)==8+4 and all(x==y for x,y in learn.received.got)
    assert "skip_corrupt: 2 images cannot be decoded: 'a/0.png', 'b/3.png'" in capsys.readouterr().out.replace("'b/3.png', 'a/0.png'", "'a/0.png', 'b/3.png'")

def test_a_value_error_of_ones_own_is_none_of_an_image(photos):
    "Also where a function opens the image first"
    def create(f):
        PILImage.create(f)
        raise ValueError('my own')
    db = DataBlock((TransformBlock(create),CategoryBlock), get_items=lambda p: sorted_files(p)[2:], get_y=parent_label, splitter=GrandparentSplitter(), item_tfms=Resize(32))
    with pytest.raises(ValueError, match='my own'): skip_corrupt(db).dataloaders(photos, bs=4, num_workers=0, device='cpu')
