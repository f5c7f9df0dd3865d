"`cached`: the same pictures, one buffer, nothing left behind, never an old picture"
import os, pickle, random, re, shutil, signal, time, traceback, warnings
import multiprocessing as mp
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pytest, torch
from PIL import ImageOps
from fastai.vision.all import (CategoryBlock, CropPad, DataBlock, DataLoaders, DihedralItem, FlipItem, Image, ImageBlock, ImageDataLoaders, IndexSplitter, L, MaskBlock, PILImage, PILImageBW, RandomResizedCrop, RandomResizedCropGPU, RegressionBlock,
                               Resize, ResizeMethod, ToTensor, Transform, aug_transforms, first, get_image_files, load_learner, parent_label, set_seed, tensor)
import fastai.callback.data # noqa: F401 - weighted_dataloaders
from fastai_tricks.all import PILImageDraft, ProgressiveResize, albu_transforms, block_with, cached, climb, cross_validate, skip_corrupt
from fastai_tricks.core.test_utils import sizes_seen, tiny_learner
from fastai_tricks.data.image_cache import Kind
from fastai_tricks.data.pixels import PixelBuffer
from fastai_tricks.data.sample import sample_images

VALID = [0,1,6,7]

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Twelve photos of two classes, of several sizes"
    d,res = tmp_path_factory.mktemp('photos'),[]
    for i,f in enumerate(sorted(get_image_files(sample_images()))[::80][:12]):
        to = d/'ab'[i//6]/f'{i}.jpg'
        to.parent.mkdir(exist_ok=True)
        Image.open(f).convert('RGB').resize((120+10*i, 200-9*i)).save(to, quality=90)
        res.append(to)
    return res

def make_block(item_tfms, cls=PILImage, **kwargs):
    return DataBlock((ImageBlock(cls),CategoryBlock), **{'get_y':parent_label, 'splitter':IndexSplitter(VALID), 'item_tfms':item_tfms, **kwargs})

def loaders(block, files, **kwargs): return block.dataloaders(files, **{'bs':4, 'num_workers':0, 'device':'cpu', **kwargs})

def epoch(dl, seed=0):
    set_seed(seed)
    dl.rng.seed(seed)
    return list(dl)

def same(a, b):
    return len(a)==len(b) and all(type(x) is type(u) and torch.equal(x, u) for one,other in zip(a, b) for x,u in zip(one, other))

def opener(dls): return dls.train_ds.tls[0].tfms.fs[-1]
def buffers(dls): return {id(s.buffer):s.buffer for slots in opener(dls).cache.slots.values() for s in slots.values()}.values()

# The same pictures -----------------------------------------------------------------------------------------------------------------

EXACT = [Resize(64), Resize((48,80)), Resize(64, ResizeMethod.Squish), Resize(64, ResizeMethod.Pad, pad_mode='zeros'), Resize(150), RandomResizedCrop(64, min_scale=.3),
         [CropPad(90), Resize(64)], [FlipItem(), Resize(64)], [Resize(80), CropPad(64)]]

@pytest.mark.parametrize('cls', [PILImage, PILImageDraft, PILImageBW])
@pytest.mark.parametrize('f', EXACT, ids=str)
def test_validation_is_the_same_to_the_bit(files, f, cls):
    a,b = loaders(make_block(f, cls), files),loaders(cached(make_block(f, cls)), files)
    for _ in range(3): assert same(epoch(a.valid), epoch(b.valid))
    assert same(epoch(a.valid), epoch(a.valid.new())) and same(epoch(a.valid), epoch(b.valid.new()))

@pytest.mark.parametrize('f', [Resize(64, ResizeMethod.Squish), [CropPad(90), Resize(64, ResizeMethod.Squish)], CropPad(64)], ids=str)
def test_training_without_a_smaller_picture_is_the_same(files, f):
    a,b = loaders(make_block(f), files),loaders(cached(make_block(f)), files)
    for seed in range(3): assert same(epoch(a.train, seed), epoch(b.train, seed))

@pytest.mark.parametrize('f', [Resize(400), RandomResizedCrop(300)], ids=str)
def test_photos_that_are_stored_whole_differ_by_a_level(files, f):
    a,b = loaders(make_block(f), files),loaders(cached(make_block(f)), files)
    for seed in range(3): assert all((x-u).abs().max()<1.01/255 for (x,_),(u,_) in zip(epoch(a.train, seed), epoch(b.train, seed), strict=True))

@pytest.mark.parametrize('f', [Resize(64), RandomResizedCrop(64, min_scale=.3), [FlipItem(), Resize(64)], [DihedralItem(), RandomResizedCrop((64,48))]], ids=str)
def test_random_crops_are_where_they_would_be(files, f):
    # Photos that are smooth: a part of a pixel beside it is nearly the same then, another place is not
    smooth = [f.with_name(f'smooth{f.name}') for f in files]
    for i,to in enumerate(smooth):
        noise = np.random.default_rng(i).integers(0, 255, (6,5,3), dtype=np.uint8)
        Image.fromarray(noise).resize(Image.open(files[i]).size, Image.BICUBIC).save(to, quality=98)
    a,b = loaders(make_block(f), smooth),loaders(cached(make_block(f)), smooth)
    off = [[(x-u).abs().mean().item() for (x,y),(u,v) in zip(epoch(a.train, seed), epoch(b.train, seed), strict=True)] for seed in range(3)]
    assert max(map(max, off))<.02
    other = [(x-u).abs().mean().item() for (x,_),(u,_) in zip(epoch(a.train, 1), epoch(b.train, 2))]
    assert min(other)>.05

def test_photos_of_a_few_pixels(tmp_path):
    sizes = [(1,1),(1,50),(50,1),(3,2),(400,7),(64,64)]
    own = [tmp_path/f'{i}.png' for i in range(len(sizes))]
    for i,f in enumerate(own): Image.fromarray(np.random.default_rng(i).integers(0, 255, (*sizes[i][::-1],3), dtype=np.uint8)).save(f)
    for f in (Resize((40,90)),Resize((90,40)),RandomResizedCrop((40,90))):
        block = DataBlock((ImageBlock,CategoryBlock), get_y=lambda f: 'a', splitter=IndexSplitter([0]), item_tfms=f)
        a,b = (loaders(make(block), own, bs=1) for make in (lambda o: o, cached))
        for i in range(len(own)-1):
            def item(dls):
                set_seed(1)
                try: return dls.train.do_item(i)[0]
                except Exception as e: return type(e)
            x,u = item(a),item(b)
            assert x is u if isinstance(x, type) else (x.shape==u.shape and (x.float()-u.float()).abs().max()<1.01)

def test_pixels_may_be_given_to_pytorch(files):
    "Which warns of arrays that cannot be written to"
    dls = loaders(cached(make_block(RandomResizedCrop(64))), files)
    for _ in range(2):
        for f in files[2:4]:
            o = opener(dls)(f, split_idx=0)
            assert o._stored.pixels().flags.writeable and o.transpose(0)._stored.pixels().flags.writeable

BY_INDEX = [Resize(64), Resize(150), Resize(64, ResizeMethod.Squish), Resize((80,48), ResizeMethod.Pad), RandomResizedCrop(64), RandomResizedCrop((96,48), min_scale=.5)]

@pytest.fixture(scope='module')
def turned(files, tmp_path_factory):
    "The photos, to be turned as their EXIF says"
    d,exif = tmp_path_factory.mktemp('turned'),Image.Exif()
    for i,f in enumerate(files):
        exif[0x0112] = (6,3,1)[i%3]
        Image.open(f).save(d/f'{f.parent.name}{f.name}', exif=exif)
    return sorted(d.iterdir())

def first_letter(f): return f.name[0]

class Upright(Transform):
    order = 0
    def encodes(self, im:PILImage): return PILImage(ImageOps.exif_transpose(im))

class PILImageUpright(PILImage):
    @classmethod
    def create(cls, f, **kwargs): return cls(ImageOps.exif_transpose(Image.open(f)).convert('RGB'))

@pytest.mark.parametrize('cls', [PILImage,PILImageDraft])
def test_transforms_see_what_the_file_says(turned, cls):
    "Its EXIF above all"
    block = make_block([Upright(),Resize(64)], cls, get_y=first_letter)
    a,b = loaders(block, turned),loaders(cached(block), turned)
    for seed in range(2): assert same(epoch(a.train, seed), epoch(b.train, seed)) and same(epoch(a.valid), epoch(b.valid))
    x,u = (dls.train_ds[0][0] for dls in (a,b))
    assert u.info==x.info and dict(u.getexif())==dict(x.getexif())!={}
    pal = turned[0].with_suffix('.png') # What it says of its colours does not hold of those it is converted to
    Image.open(turned[0]).convert('P').save(pal, transparency=b'\0')
    u = opener(b).for_items([Upright()])
    u.add([pal], [])
    assert u(pal).copy().convert('RGBA').getextrema()[3]==(255,255)

def test_image_classes_that_turn(turned):
    "The file and the image are of different sizes"
    for f in BY_INDEX + [CropPad(90), [FlipItem(),Resize(64)]]:
        block = make_block(f, PILImageUpright, get_y=first_letter)
        a,b = loaders(block, turned),loaders(cached(block), turned)
        for _ in range(2): assert same(epoch(a.valid), epoch(b.valid))
        for seed in range(2): assert all((x-u).abs().mean()<.05 for (x,_),(u,_) in zip(epoch(a.train, seed), epoch(b.train, seed), strict=True))

def test_a_size_of_your_own_is_enlarged(files, monkeypatch):
    whole,small = (loaders(cached(make_block(RandomResizedCrop(64)), size=size, fill=True), files) for size in (None,80))
    assert opener(small).cache.plans[0].nbytes<opener(whole).cache.plans[0].nbytes/2
    def decodes(*args): raise AssertionError('decoded again')
    monkeypatch.setattr(PILImage, 'create', decodes)
    off = [(x-u).abs().mean().item() for (x,_),(u,_) in zip(epoch(whole.train, 1), epoch(small.train, 1), strict=True)]
    assert 0<max(off)<.08

@contextmanager
def items_made(dl):
    "Items that a loader makes one by one"
    res,do_item = [],type(dl).do_item
    dl.do_item = lambda s: (res.append(s), do_item(dl, s))[1]
    dl.do_item.only_replaces_broken = True
    try: yield res
    finally: del dl.do_item

def test_the_first_epoch_makes_one_item_to_compare(files):
    for f in BY_INDEX:
        dls = loaders(cached(make_block(f)), files)
        with items_made(dls.train) as made: epoch(dls.train)
        assert len(made)==1 and [o.filled.sum() for o in buffers(dls)]

def test_items_one_by_one_and_by_index_are_the_same(files):
    for f in BY_INDEX:
        dls = loaders(cached(make_block(f)), files)
        for dl in dls: epoch(dl) # Fills
        with items_made(dls.train) as made: rows = [epoch(dl, 3) for dl in dls]
        assert not made
        for dl in dls: dl.before_batch.fs.append(ToTensor()) # Something that batches by index know nothing of
        for dl,was in zip(dls, rows): assert same(epoch(dl, 3), was)

def test_a_batch_that_is_not_its_items_is_never_given(files, monkeypatch):
    for way,f in dict(crops=Resize(64), rows=Resize(64, ResizeMethod.Squish), cuts=RandomResizedCrop(64)).items():
        dls = loaders(cached(make_block(f)), files)
        was = [[epoch(dl, 3) for _ in range(2)] for dl in dls][0][1]
        assert dls.train._rows.way==way
        monkeypatch.setattr(f'fastai_tricks.data.indexed._Images.{way}', lambda self, f, idxs, *args: torch.zeros(len(idxs), 3, 64, 64, dtype=torch.uint8))
        dls.train._rows.first = None
        assert same(epoch(dls.train, 3), was) and dls.train._rows.first is False
        monkeypatch.undo()

def test_masks_and_several_images(files, tmp_path):
    for i,f in enumerate(files): Image.fromarray(np.random.default_rng(i).integers(0, 5, Image.open(f).size[::-1], dtype=np.uint8)).save(tmp_path/f'{f.stem}.png')
    def mask(f): return tmp_path/f'{f.stem}.png'
    for f in (Resize(64), RandomResizedCrop(64, min_scale=.5), Resize(64, ResizeMethod.Squish)):
        block = DataBlock((ImageBlock,ImageBlock,MaskBlock), n_inp=2, get_x=[lambda f: f,lambda f: f], get_y=mask, splitter=IndexSplitter(VALID), item_tfms=f)
        a,b = loaders(block, files),loaders(cached(block), files)
        for _ in range(2): assert same(epoch(a.valid), epoch(b.valid))
        with items_made(b.train) as made: seen = epoch(b.train, 1) + epoch(b.train, 2)
        assert len(made)<2
        for x,u,m in seen:
            assert torch.equal(x, u) and set(m.unique().tolist())<=set(range(5))

@pytest.mark.parametrize('f', [*BY_INDEX, [FlipItem(),Resize(64)], [DihedralItem(),Resize(64, ResizeMethod.Squish)]], ids=str)
def test_random_numbers_are_those_without_a_cache(files, f):
    "Whatever draws after the loaders draws the same; here the last batch is not complete"
    def after(make):
        set_seed(1)
        dls = loaders(make(make_block(f)), files, bs=3)
        dls.train.rng.seed(1)
        for _ in range(3):
            for dl in dls: yield from (random.random() for _ in dl)
            yield random.random()
    assert list(after(lambda o: o))==list(after(cached))

@pytest.mark.parametrize('n', [1,2])
@pytest.mark.parametrize('f', [Resize(64), [FlipItem(),Resize(64, ResizeMethod.Squish)]], ids=['crops','flips in validation'])
def test_without_workers_random_numbers_are_those_of_workers(files, f, n):
    def epochs(make, **kwargs):
        set_seed(1)
        dls = loaders(make(make_block(f)), files, bs=3, num_workers=n, **kwargs)
        dls.train.rng.seed(1)
        for _ in range(3):
            for dl in dls: yield list(dl),random.random(),torch.rand(1).item()
        yield dls
    (*a,_),(*b,_),(*c,dls) = map(list, (epochs(lambda o: o),epochs(cached, timeout=60),epochs(cached)))
    assert not dls.valid.needs_workers and [o[1:] for o in a]==[o[1:] for o in b]==[o[1:] for o in c]
    for (x,*_),(u,*_) in zip(b, c): assert same(x, u) # With `timeout` there are workers

def test_loaders_that_are_changed(files):
    "Between epochs, in ways that batches by index must see"
    def make(): return loaders(cached(make_block(Resize(64, ResizeMethod.Squish))), files)
    def nothing(dl, seen): pass
    def before_batch(dl, seen): dl.before_batch.fs.append(lambda b, **kwargs: (seen.append(1), b)[1])
    def after_item(dl, seen): dl.after_item.fs.append(lambda o, **kwargs: (seen.append(1), o)[1])
    def create_batch(dl, seen): dl.create_batch = lambda b: (seen.append(1), type(dl).create_batch(dl, b))[1]
    def labels(dl, seen): dl.dataset.tls[1].tfms.fs.append(lambda o, **kwargs: (seen.append(1), o)[1])
    for change in (nothing,before_batch,after_item,create_batch,labels):
        dls,seen = make(),[]
        was = epoch(dls.train)
        change(dls.train, seen)
        assert same(epoch(dls.train), was) and bool(seen)==(change is not nothing), change.__name__
    tl,n = dls.train_ds.tls[1],len(dls.train_ds)
    tl.items = L([Path('b/0.jpg')]*n)
    assert all((y==1).all() for _,y in epoch(dls.train))

def test_large_labels_are_not_kept(files, monkeypatch):
    "They would take more memory than the photos"
    block = DataBlock((ImageBlock,RegressionBlock), get_y=lambda f: np.full((2,1000), f.stat().st_size), splitter=IndexSplitter(VALID), item_tfms=Resize(64, ResizeMethod.Squish))
    a,b = loaders(block, files),loaders(cached(block), files)
    monkeypatch.setattr('fastai_tricks.data.indexed._most_labels', 40_000)
    for _ in range(2): assert same(epoch(a.train), epoch(b.train))
    with items_made(b.train) as made: epoch(b.train)
    assert len(made)==8
    monkeypatch.setattr('fastai_tricks.data.indexed._most_labels', 100_000)
    b = loaders(cached(block), files)
    with items_made(b.train) as made: epoch(b.train)
    assert len(made)==1

def test_loaders_that_are_there(files):
    folder = files[0].parent.parent
    def make(): return ImageDataLoaders.from_folder(folder, valid_pct=.3, seed=1, item_tfms=Resize(64), bs=4, num_workers=0, device='cpu')
    a,b = make(),make()
    assert cached(b) is b
    for _ in range(2): assert same(epoch(a.valid), epoch(b.valid))
    assert any(o.filled.all() for o in buffers(b))

# Workers, processes ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('persistent', [False,True])
def test_workers_fill_one_buffer(files, persistent):
    a = loaders(make_block(Resize(64, ResizeMethod.Squish)), files)
    b = loaders(cached(make_block(Resize(64, ResizeMethod.Squish))), files, num_workers=2, persistent_workers=persistent)
    for seed in range(3): assert same(epoch(a.valid, seed), epoch(b.valid, seed))
    assert same([o for o in epoch(a.train.new(shuffle=False))], [o for o in epoch(b.train.new(shuffle=False))])
    assert [o.filled.all() for o in buffers(b)]==[True] # What workers stored is seen here

def test_workers_are_started_where_they_help(files, monkeypatch):
    "Rows are quicker to copy than to get from another process; cuts that are resized are not"
    started,init = [],torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__
    monkeypatch.setattr('torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__', lambda self, *args: (started.append(1), init(self, *args))[1])
    for f,wanted in [(Resize(64),[1,0,0]), (Resize(64, ResizeMethod.Squish),[1,0,0]), (RandomResizedCrop(64),[1,1,1])]:
        dl = loaders(cached(make_block(f)), files, num_workers=2, drop_last=False).train
        seen = []
        for _ in range(3):
            started.clear()
            assert sum(len(x) for x,_ in dl)==8
            seen.append(len(started))
            assert dl.fake_l.num_workers==2
        assert seen==wanted
    dl = loaders(cached(make_block(Resize(64)), fill=True), files, num_workers=2).train
    it = iter(dl)
    next(it)
    assert dl.fake_l.num_workers==2 # Not only at the end
    it.close()
    started.clear()
    dl.before_iter() # As some call it without a loop
    assert dl.fake_l.num_workers==2
    dl.timeout = 30 # Which needs workers
    next(iter(dl))
    assert started

def label(f): return Path(f).parent.name

def test_spawned_workers(files):
    method = mp.get_start_method()
    block = DataBlock((ImageBlock,CategoryBlock), get_y=label, splitter=IndexSplitter(VALID), item_tfms=Resize(64))
    a,b = loaders(block, files),loaders(cached(block), files, num_workers=1)
    mp.set_start_method('spawn', force=True)
    try: assert same(epoch(a.valid), epoch(b.valid))
    finally: mp.set_start_method(method, force=True)
    assert opener(b).cache.slot(opener(b).kinds[1], files[0]).buffer.filled.all()

def pss(pid):
    "Bytes of the buffer that belong to a process"
    return sum(1024*int(o) for o in re.findall(r'memfd:fastai_tricks.*?\nPss:\s+(\d+) kB', Path(f'/proc/{pid}/smaps').read_text().replace('\nSize', ' Size')
               .replace('\nRss', ' Rss').replace('\nKernelPageSize', ' K').replace('\nMMUPageSize', ' M')))

def forked(f, *args):
    "A process of its own group that calls `f`"
    pid = os.fork()
    if pid: return pid
    try:
        os.setsid()
        f(*args)
    except BaseException: os.write(2, traceback.format_exc().encode())
    finally: os._exit(0)

def test_memory_of_one_buffer_whatever_the_number_of_processes():
    n,base = 16*2**20,pss(os.getpid()) # Other tests may have left some
    buf,(r,w) = PixelBuffer([(1,2**20,1)]*16),os.pipe()
    def read():
        for i in range(16): buf.get(i).sum()
        os.write(w, b'.')
        time.sleep(60)
    for i in range(16): buf.put(i, np.ones((1,2**20,1), dtype=np.uint8))
    pids = [forked(read) for _ in range(3)]
    try:
        for _ in pids: os.read(r, 1)
        assert .9*n<sum(map(pss, [os.getpid(),*pids]))-base<1.1*n
    finally:
        for p in pids: os.kill(p, signal.SIGKILL); os.waitpid(p, 0)

def test_nothing_is_left_behind_by_a_killed_process(files, tmp_path):
    was,(r,w) = set(os.listdir('/dev/shm')),os.pipe()
    def train():
        dls = loaders(cached(make_block(Resize(64))), files, num_workers=2, bs=2)
        for _ in range(2): first(dls.train)
        it = iter(dls.train)
        next(it)
        os.write(w, b'.')
        time.sleep(60)
    pid = forked(train)
    assert os.read(r, 1)==b'.'
    assert set(os.listdir('/dev/shm'))==was or all('fastai_tricks' not in o for o in os.listdir('/dev/shm'))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    end = time.time()+60
    def others(): # Workers, which see that their parent is gone
        res = []
        for p in filter(str.isdigit, os.listdir('/proc')):
            try:
                if os.getpgid(int(p))==pid and 'Z' not in Path(f'/proc/{p}/stat').read_text().split()[2]: res.append(p)
            except OSError: pass
        return res
    while others() and time.time()<end: time.sleep(.2)
    assert not others() and not [o for o in set(os.listdir('/dev/shm'))-was if 'fastai_tricks' in o]

# On disk ---------------------------------------------------------------------------------------------------------------------------

def test_killed_while_it_fills_it_goes_on(files, tmp_path):
    a = loaders(make_block(Resize(64)), files)
    def make(): return loaders(cached(make_block(Resize(64)), where='disk', folder=tmp_path/'px'), files)
    def fill():
        b,count,put = make(),[0],PixelBuffer.put
        def dies(self, i, pixels):
            count[0] += 1
            if count[0]==3: # In the middle of an image
                self._at(i)[:50] = 1
                os.kill(os.getpid(), signal.SIGKILL)
            put(self, i, pixels)
        PixelBuffer.put = dies
        epoch(b.valid)
    pid = forked(fill)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1])==signal.SIGKILL
    b = make()
    assert sum(int(o.filled.sum()) for o in buffers(b))==3 # fastai looked at the first training image
    for _ in range(2): assert same(epoch(a.valid), epoch(b.valid))

def test_a_second_notebook_decodes_nothing(files, tmp_path, monkeypatch):
    def make(): return loaders(cached(make_block(Resize(64)), where='disk', folder=tmp_path/'px', fill=True), files)
    was = epoch(make().valid)
    b = make()
    monkeypatch.setattr(Kind, 'make', None)
    assert same(epoch(b.valid), was)
    # A power cut, or a disk that forgets
    file = next((tmp_path/'px').glob('*valid*/*/pixels'))
    monkeypatch.undo()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    b = loaders(cached(make_block(Resize(64)), where='disk', folder=tmp_path/'px'), files)
    assert sorted(len(o)-int(o.filled.sum()) for o in buffers(b))==[0,1]
    assert same(epoch(b.valid), was)

def test_workers_take_a_file_as_it_is(tmp_path, monkeypatch):
    "It was read when the loaders were made; a spawned worker that reads all of it, in each epoch, would take minutes"
    buf = PixelBuffer([(1,4,4)]*3, tmp_path/'px')
    buf.put(1, np.ones((1,4,4), dtype=np.uint8))
    monkeypatch.setattr(PixelBuffer, '_sum', None)
    other = pickle.loads(pickle.dumps(buf))
    assert other.filled.tolist()==[False,True,False] and (other.get(1)==1).all() and other.file==buf.file
    monkeypatch.undo()
    other.put(2, np.full((1,4,4), 7, dtype=np.uint8))
    assert (buf.get(2)==7).all()

def test_two_processes_share_a_folder(files, tmp_path):
    "Both make the loaders at the same moment, and both fill"
    a,(r,w),(go,start) = loaders(make_block(Resize(64)), files),os.pipe(),os.pipe()
    def make(): return loaders(cached(make_block(Resize(64)), where='disk', folder=tmp_path/'px'), files)
    def train():
        os.read(go, 1)
        b = make()
        ok = same(epoch(a.valid), epoch(b.valid)) and epoch(b.train) and same(epoch(a.valid), epoch(b.valid))
        os.write(w, b'y' if ok else b'n')
    pids = [forked(train) for _ in range(2)]
    os.write(start, b'..')
    assert all(os.WEXITSTATUS(os.waitpid(p, 0)[1])==0 for p in pids) and os.read(r, 2)==b'yy'
    assert len(list((tmp_path/'px').glob('*/*/pixels')))==2 # One file of each kind
    assert sum(int(o.filled.sum()) for o in buffers(make()))==12

def test_other_settings_have_their_own_place(files, tmp_path):
    for f in (Resize(64), Resize(48)):
        b = loaders(cached(make_block(f), where='disk', folder=tmp_path/'px', fill=True), files)
        assert same(epoch(b.valid), epoch(loaders(make_block(f), files).valid))
    assert len(list((tmp_path/'px').glob('*/000/index.json')))==4

def test_pixels_of_other_files_are_never_served(files, tmp_path):
    "A part of the folder was deleted, or its list; the pixels that are left are as many as those that come"
    block,px = make_block(Resize(64, ResizeMethod.Squish), get_y=lambda f: 'a', splitter=IndexSplitter([0])),tmp_path/'px'
    def make(fs): return loaders(cached(block, where='disk', folder=px, fill=True), fs, bs=2)
    for gone in ('*/000','*/001/index.json'):
        shutil.rmtree(px, ignore_errors=True)
        make(files[:3]), make(files[:6])
        for o in px.glob(gone): shutil.rmtree(o) if o.is_dir() else o.unlink()
        assert len(list(px.glob('*/*/pixels')))==(1 if gone=='*/000' else 2)
        for dl,was in zip(make(files[6:9]).loaders, loaders(block, files[6:9], bs=2).loaders): assert same(epoch(dl), epoch(was))

@pytest.mark.parametrize('where', ['memory','disk'])
def test_changed_files_are_never_served(files, tmp_path, where):
    own = [Path(shutil.copy(f, tmp_path/f.name)) for f in files]
    block = cached(DataBlock((ImageBlock,CategoryBlock), get_y=lambda f: 'a', splitter=IndexSplitter(VALID), item_tfms=Resize(64, ResizeMethod.Squish)), where=where, folder=tmp_path/'px')
    b = loaders(block, own)
    was = [epoch(b.valid) for _ in range(2)][1]
    stat = own[1].stat()
    shutil.copy(files[9], own[1]) # Of another size
    os.utime(own[7]) # Of another time
    with pytest.warns(UserWarning, match='1.jpg.* has changed'): now = epoch(b.valid)
    assert [torch.equal(x, u) for x,u in zip(was[0][0], now[0][0])]==[True,False,True,True]
    assert torch.equal((now[0][0][1]*255).round().byte(), tensor(Resize(64, ResizeMethod.Squish)(PILImage.create(files[9]))).permute(2,0,1))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for dls in (loaders(block, own),loaders(block, own)): assert same(epoch(dls.valid), now)
    assert stat.st_size!=own[1].stat().st_size

def test_room_is_asked_for_before(files, tmp_path, monkeypatch):
    monkeypatch.setattr('fastai_tricks.data.image_cache.free_memory', lambda: 10_000)
    with pytest.raises(ValueError, match="`where` must be 'disk', or `size` smaller: the pictures need"): loaders(cached(make_block(Resize(64)), where='memory'), files)
    b = loaders(cached(make_block(Resize(64)), folder=tmp_path/'px'), files)
    plan, = opener(b).cache.plans
    assert (plan.where,plan.images,plan.why)==('disk',12,'memory has 0.1 MB free')
    monkeypatch.setattr('fastai_tricks.data.image_cache.shutil.disk_usage', lambda p: shutil._ntuple_diskusage(0, 0, 10))
    with pytest.raises(ValueError, match='`folder` must be on a disk with room'): loaders(cached(make_block(Resize(64)), folder=tmp_path/'px2'), files)
    assert not (tmp_path/'px2').exists()

# With the others -------------------------------------------------------------------------------------------------------------------

def fit_once(learn): learn.fit(1)
def tiny(dls):
    res = tiny_learner(dls)
    res.model[-1] = torch.nn.Linear(8, dls.c)
    return res

def test_folds_share_a_cache(files, tmp_path):
    block = cached(make_block(Resize(32), batch_tfms=aug_transforms()))
    kwargs = dict(fit=fit_once, n_splits=3, num_workers=0, device='cpu', bs=4)
    cross_validate(tiny, block, files, out=tmp_path/'cv', **kwargs)
    cache = opener(loaders(block, files)).cache
    n = [len(o) for o in cache.slots.values()]
    assert n==[12,12] and sum(p.images for p in cache.plans)==24 # Each once to train on, once to validate
    climb(tiny, block, files, rungs=[(2,48)], out=tmp_path/'climb', **kwargs)
    assert sum(p.images for p in cache.plans)==48 # At another size others

def test_other_sizes_of_the_block(files):
    block = cached(make_block(Resize(96), batch_tfms=aug_transforms()))
    a,b = loaders(make_block(Resize(48), batch_tfms=aug_transforms()), files),loaders(block_with(block, size=48), files)
    assert opener(b).cache is opener(loaders(block, files)).cache
    for _ in range(2): assert torch.equal(epoch(a.valid)[0][0], epoch(b.valid)[0][0])

def test_progressive_resize_cuts_from_the_same_buffer(files, monkeypatch):
    dls = loaders(cached(make_block(Resize(64)), fill=True), files)
    def decodes(*args): raise AssertionError('decoded again')
    monkeypatch.setattr(Kind, 'make', decodes)
    monkeypatch.setattr(PILImage, 'create', decodes)
    learn = tiny_learner(dls, cbs=ProgressiveResize(mult=16))
    with items_made(dls.train) as made, sizes_seen(learn) as seen: learn.fit(3)
    assert len(made)<6 # fastai's look at an item, and one for each size, to compare
    assert {o[1] for o in seen if o[0]}=={32,48,64} and {o[1] for o in seen if not o[0]}=={64}

@pytest.mark.parametrize('cls', [PILImage,PILImageDraft])
def test_albu_transforms_take_stored_pictures(files, monkeypatch, cls):
    pytest.importorskip('albumentations')
    block = make_block(albu_transforms(48), cls)
    a,b = loaders(block, files),loaders(cached(block, fill=True), files)
    whole = sum(3*w*h for w,h in (Image.open(f).size for f in files))
    assert opener(b).cache.plans[0].nbytes<whole/2
    x,seen = epoch(a.valid),[epoch(a.train, seed) for seed in range(3)]
    def decodes(*args): raise AssertionError('decoded again')
    monkeypatch.setattr(Image, 'open', decodes)
    assert same(x, epoch(b.valid))
    off = [(x-u).abs().mean().item() for seed in range(3) for (x,_),(u,_) in zip(seen[seed], epoch(b.train, seed), strict=True)]
    other = [(x-u).abs().mean().item() for (x,_),(u,_) in zip(seen[1], epoch(b.train, 2))]
    assert max(off)<.06<.1<min(other)

def test_albu_transforms_of_masks(files, tmp_path):
    pytest.importorskip('albumentations')
    for i,f in enumerate(files): Image.fromarray(np.random.default_rng(i).integers(0, 5, Image.open(f).size[::-1], dtype=np.uint8)).save(tmp_path/f'{f.stem}.png')
    block = DataBlock((ImageBlock,MaskBlock), get_y=lambda f: tmp_path/f'{f.stem}.png', splitter=IndexSplitter(VALID), item_tfms=albu_transforms(48))
    a,b = loaders(block, files),loaders(cached(block), files)
    assert same(epoch(a.valid), epoch(b.valid))
    assert all(torch.equal(m, n) for (_,m),(_,n) in zip(epoch(a.train, 1), epoch(b.train, 1), strict=True))

def test_crops_on_the_device(files):
    f,tfms = Resize(96, ResizeMethod.Squish),[RandomResizedCropGPU(48),*aug_transforms()]
    a,b = loaders(make_block(f, batch_tfms=tfms), files),loaders(cached(make_block(f, batch_tfms=tfms)), files)
    with items_made(b.train) as made: assert same(epoch(a.train, 1), epoch(b.train, 1)) and same(epoch(a.valid, 2), epoch(b.valid, 2))
    assert len(made)==1 and epoch(b.train)[0][0].shape[-2:]==(48,48)

def test_class_subset(files):
    block = cached(make_block(Resize(64))).class_subset(['b'])
    dls = loaders(block, files, bs=2)
    assert dls.vocab==['b'] and all(torch.equal(x, u) for (x,_),(u,_) in zip(epoch(dls.valid), epoch(loaders(make_block(Resize(64)).class_subset(['b']), files, bs=2).valid), strict=True))
    n = [len(o) for o in opener(dls).cache.slots.values()]
    assert sum(n)==6
    loaders(block, files, bs=2)
    assert [len(o) for o in opener(dls).cache.slots.values()]==n

@pytest.mark.parametrize('first', ['cached','skip'])
def test_corrupt_images(files, tmp_path, first):
    own = [Path(shutil.copy(f, tmp_path/f'{f.parent.name}{f.name}')) for f in files]
    own[2].write_text('no photo')
    own[8].write_bytes(own[8].read_bytes()[:-300])
    block = DataBlock((ImageBlock,CategoryBlock), get_y=lambda f: f.name[0], splitter=IndexSplitter(VALID), item_tfms=Resize(32))
    both = skip_corrupt(cached(block), max_share=.5) if first=='cached' else cached(skip_corrupt(block, max_share=.5), fill=True)
    learn = tiny_learner(loaders(both, own))
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    assert {Path(f).name for f in learn.corrupt_images['file']}=={own[2].name,own[8].name}
    assert opener(learn.dls).cache.slots, 'nothing was cached'

def test_a_deleted_file_is_a_corrupt_image(files, tmp_path):
    own = [Path(shutil.copy(f, tmp_path/f'{f.parent.name}{f.name}')) for f in files]
    block = skip_corrupt(cached(DataBlock((ImageBlock,CategoryBlock), get_y=lambda f: f.name[0], splitter=IndexSplitter(VALID), item_tfms=Resize(32))), max_share=.5)
    learn = tiny_learner(loaders(block, own))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    own[2].unlink()
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.filterwarnings('error', 'cached:') # It has not changed
        learn.fit(1)
    assert [Path(f).name for f in learn.corrupt_images['file']]==[own[2].name]

def test_new_images_and_saved_learners(files, tmp_path):
    new = [Path(shutil.copy(files[3], tmp_path/'new.jpg')),files[0]]
    a,b = (tiny_learner(loaders(make(make_block(Resize(64))), files)) for make in (lambda o: o, cached))
    b.model.load_state_dict(a.model.state_dict())
    assert same(list(a.dls.test_dl(new)), list(b.dls.test_dl(new)))
    b.path = tmp_path
    b.export('b.pkl')
    c = load_learner(tmp_path/'b.pkl')
    assert type(c.dls.train).__module__=='fastai.data.core' and type(c.dls.train_ds.tls[0].tfms.fs[0]).__module__.startswith('fasttransform')
    with a.no_bar(), c.no_bar(): assert all(torch.equal(a.predict(o)[2], l.predict(o)[2]) for l in (b,c) for o in (new[0],files[0]))
    assert torch.equal(b.predict(b.dls.valid_ds[0][0])[2], a.predict(files[0])[2])
    with pytest.raises(TypeError, match='cannot be saved'): pickle.dumps(next(iter(buffers(b.dls))))

def test_weighted_loaders(files):
    wgts = np.array([1.,0]*6)
    dls = cached(make_block(Resize(64))).weighted_dataloaders(files, wgts, bs=4, num_workers=0, device='cpu')
    for x,y in dls.train: assert x.shape==(4,3,64,64)
    assert any(o.filled.any() for o in buffers(dls))
    dls = cached(make_block(Resize(64)).weighted_dataloaders(files, wgts, bs=4, num_workers=0, device='cpu'))
    with items_made(dls.train) as made: seen = [y for _ in range(5) for _,y in dls.train]
    assert len(made)==1 and len(seen)==10
    drawn = {f for f,w in zip(dls.train_ds.items, dls.train.wgts) if w}
    assert {f for f,s in opener(dls).cache.slots[opener(dls).kinds[0].name].items() if s.buffer.sums[s.i]}<={str(f) for f in drawn}

def test_training_images_are_evaluated_as_they_are(files):
    "Whoever evaluates training images gets those of validation, not of random crops"
    a,b = (tiny_learner(loaders(make(make_block(Resize(64))), files)) for make in (lambda o: o, cached))
    b.model.load_state_dict(a.model.state_dict())
    for learn in (a,b): learn.dls.train.drop_last = False
    for learn in (a,b):
        with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=0)
    b.model.load_state_dict(a.model.state_dict())
    with a.no_bar(), b.no_bar(), a.dls.train_ds.set_split_idx(1), b.dls.train_ds.set_split_idx(1): assert torch.equal(a.get_preds(ds_idx=0)[0], b.get_preds(ds_idx=0)[0])

def test_only_files_that_changed_are_said_to_have_changed(files):
    "Photos that are asked for in another way than they are stored for: `predict` of a training photo, TTA, training photos as in validation"
    a,b = (tiny_learner(loaders(make(make_block(Resize(64))), files)) for make in (lambda o: o, cached))
    b.model.load_state_dict(a.model.state_dict())
    train = [f for f in files if f not in b.dls.valid_ds.items]
    def asked(learn):
        set_seed(1)
        with learn.no_bar(), learn.no_logging():
            yield learn.predict(train[0])[2]
            yield learn.tta(n=1)[0]
            with learn.dls.train_ds.set_split_idx(1): yield learn.get_preds(dl=learn.dls.train.new(shuffle=False, drop_last=False))[0]
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'cached:')
        assert all(torch.equal(x, u) for x,u in zip(*(list(asked(o)) for o in (a,b)), strict=True))

# Bad input -------------------------------------------------------------------------------------------------------------------------

def test_bad_input(files, tmp_path):
    with pytest.raises(ValueError, match="`item_tfms` must make images one size, as with Resize.224.: 'a/2.jpg' has 140×182 px"): loaders(cached(make_block(None)), files)
    with pytest.raises(ValueError, match="`where` must be 'auto', 'memory' or 'disk', not 'ram'"): cached(make_block(Resize(64)), where='ram')
    with pytest.raises(ValueError, match='`size` must be a positive integer or None, not 0'): cached(make_block(Resize(64)), size=0)
    with pytest.raises(ValueError, match='`data` must be a `DataBlock` or `DataLoaders`'): cached(files)
    class Deep(PILImage): _open_args = {'mode':'I;16'}
    with pytest.raises(ValueError, match="opened as one of .'L', 'RGB', 'RGBA'.*, not \"Deep with mode 'I;16'"): cached(make_block(Resize(64), Deep))
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='`folder` must be a folder that can be written to'): loaders(cached(make_block(Resize(64)), where='disk', folder=tmp_path/'file'), files)
    with pytest.raises(ValueError, match="loaders that one of fastai's made"): cached(DataLoaders(torch.utils.data.DataLoader([1]), torch.utils.data.DataLoader([1])))

def test_a_worker_does_not_touch_cuda(files, monkeypatch):
    "A forked one cannot: batches by index are compared with an item, whose random numbers are given back"
    def fails(): raise RuntimeError('Cannot re-initialize CUDA in forked subprocess')
    monkeypatch.setattr(torch.cuda, 'get_rng_state_all', lambda: fails() if torch.utils.data.get_worker_info() else [])
    dls = loaders(cached(make_block(Resize(64))), files, num_workers=1)
    assert len(epoch(dls.train))==2 and dls.train._rows is not None
