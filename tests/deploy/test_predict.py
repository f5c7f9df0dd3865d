"A folder becomes a CSV in constant memory; what cannot be decoded is named, and nothing half-written stays"
import csv, os, time, tracemalloc
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from torch import nn
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import get_image_files, parent_label
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock
import fastai_tricks.deploy.to_onnx # noqa: F401
from fastai_tricks import cli
from fastai_tricks.deploy import predict as module
from fastai_tricks.deploy.predict import image_ids, image_names, predict_folder, read_pixels

pytest.importorskip('onnxruntime')

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    d,rng = tmp_path_factory.mktemp('photos'),np.random.default_rng(0)
    for i in range(12):
        f = d/'abc'[i%3]/f'{i}.png'
        f.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4,4,3), dtype=np.uint8)).resize((40+i, 50), Image.BICUBIC).save(f)
    return d

def made(photos, tmp, blocks=(ImageBlock,CategoryBlock), get_y=parent_label, n=3, **kwargs):
    dls = DataBlock(blocks, get_items=get_image_files, get_y=get_y, item_tfms=Resize(32)).dataloaders(photos, bs=4, num_workers=0)
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, n)), path=tmp, **kwargs)
    nn.init.normal_(learn.model[-1].weight, std=3)
    with learn.no_logging(): file = learn.to_onnx('model.onnx')
    learn.export('model.pkl')
    return learn,file

@pytest.fixture(scope='module')
def model(photos, tmp_path_factory): return made(photos, tmp_path_factory.mktemp('model'))

def go(file, *args, **kwargs): return predict_folder(file, *args, progress=False, **kwargs)
def rows(f):
    with open(f, newline='', encoding='utf-8', errors='surrogateescape') as o: return list(csv.reader(o))

def expected(learn, files): return learn.get_preds(dl=learn.dls.test_dl(files))[0].numpy()

def test_rows_are_those_of_get_preds(model, photos, tmp_path):
    learn,file = model
    with learn.no_bar(): p = expected(learn, [photos/o for o in image_names(photos)])
    go(file, photos, tmp_path/'a.csv', topk=None)
    df = pd.read_csv(tmp_path/'a.csv')
    assert list(df.columns)==['id','a','b','c'] and df['id'].tolist()==[Path(o).name for o in image_names(photos)]
    assert abs(df.iloc[:,1:].values-p).max()<.05*p.std(0).max() # Of how far answers differ from each other
    go(file, photos, tmp_path/'b.csv')
    assert [r[1] for r in rows(tmp_path/'b.csv')[1:]]==[learn.dls.vocab[i] for i in p.argmax(1)]
    go(file, photos, tmp_path/'c.csv', topk=2, sep='|')
    assert rows(tmp_path/'c.csv')[1][1]=='|'.join(learn.dls.vocab[i] for i in (-p[0]).argsort()[:2])

@pytest.mark.parametrize('columns', [['name','what'], ['name','c','a','b']])
def test_sample(model, photos, tmp_path, columns):
    ids = [f'{i}' for i in reversed(range(12))] # Without the ending, in another order
    pd.DataFrame([[o, *[0]*(len(columns)-1)] for o in ids], columns=columns).to_csv(tmp_path/'s.csv', index=False)
    go(model[1], photos, tmp_path/'a.csv', sample=tmp_path/'s.csv')
    go(model[1], photos, tmp_path/'b.csv', **(dict(topk=None) if len(columns)>2 else {}))
    got,plain = rows(tmp_path/'a.csv'),{r[0].split('.')[0]:r[1:] for r in rows(tmp_path/'b.csv')}
    assert got[0]==columns and [r[0] for r in got[1:]]==ids
    order = [2,0,1] if len(columns)>2 else [0]
    assert all(r[1:]==[plain[r[0]][i] for i in order] for r in got[1:])

@pytest.mark.parametrize('id', ['99', '../../etc/passwd', '/etc/passwd'])
def test_a_sample_names_no_other_files(model, photos, tmp_path, id):
    "Its ids are looked up among the files of the folder, never opened"
    pd.DataFrame([[f'{i}.png','a'] for i in range(11)] + [[id,'a']], columns=['id','label']).to_csv(tmp_path/'s.csv', index=False)
    with pytest.raises(ValueError, match='1 of the sample are missing'): go(model[1], photos, tmp_path/'a.csv', sample=tmp_path/'s.csv')
    assert not (tmp_path/'a.csv').exists()

def test_other_tasks(photos, tmp_path, capsys):
    several = made(photos, tmp_path/'1', (ImageBlock,MultiCategoryBlock), lambda o: [parent_label(o)], loss_func=BCEWithLogitsLossFlat(thresh=.3))
    go(several[1], photos, tmp_path/'a.csv')
    with several[0].no_bar(): p = expected(several[0], [photos/o for o in image_names(photos)])
    clear = abs(p-.3).min(1)>.02
    sets = [{k for k,v in zip('abc', o) if v>=.3} for o in p]
    got = [set(r[1].split()) for r in rows(tmp_path/'a.csv')[1:]]
    assert clear.sum()>6 and all(a==b for a,b,ok in zip(got, sets, clear) if ok) and len({len(s) for s in sets})>1
    values = made(photos, tmp_path/'2', (ImageBlock,RegressionBlock(2)), lambda o: [1.,2.], n=2, loss_func=MSELossFlat())[1]
    go(values, photos, tmp_path/'b.csv')
    assert rows(tmp_path/'b.csv')[0]==['id','value_0','value_1'] and len(rows(tmp_path/'b.csv'))==13
    with pytest.raises(ValueError, match='`topk` must be left out where answers are numbers'): go(values, photos, tmp_path/'c.csv', topk=2)

def test_masks_are_refused():
    with pytest.raises(ValueError, match='`model` must be one with probabilities or numbers, for a CSV'): module.rows_plan(['a.png'], dict(task='mask'), 3)

# Which images, and their names

def test_images_as_fastai_finds_them(photos, tmp_path):
    for o in ('b/2.JPG','b/1.png','a.jpeg','b/c/1.png','.hidden.png','.git/3.png','text.txt','b/4.jpg.txt'):
        (tmp_path/o).parent.mkdir(exist_ok=True)
        (tmp_path/o).touch()
    (tmp_path/'d.jpg').mkdir() # A folder of that name
    (tmp_path/'linked').symlink_to(photos/'a')
    (tmp_path/'b'/'up').symlink_to(tmp_path) # Without end
    got = image_names(tmp_path)
    (tmp_path/'b'/'up').unlink()
    assert sorted(got)==sorted(Path(f).relative_to(tmp_path).as_posix() for f in get_image_files(tmp_path)) and got[0]=='a.jpeg'
    assert image_ids(got)==got # 1.png twice
    assert image_ids(['a/1.png','b/2.png'])==['1.png','2.png']

NAMES = 'a,b.png','a"b.png','a\nb.png','a\rb.png','=cmd|x!A1.png',' lead.png',"it's.png",'ü.png',os.fsdecode(b'\xff\xfe.png'),'-1+1.png'

def test_names_are_quoted(model, photos, tmp_path):
    d = tmp_path/'d'
    d.mkdir()
    for o in NAMES: os.link(photos/'a'/'0.png', d/o)
    go(model[1], d, tmp_path/'a.csv')
    got = rows(tmp_path/'a.csv')
    assert sorted(r[0] for r in got[1:])==sorted(NAMES) and {len(r) for r in got}=={2}

# Corrupt images

def bomb(f):
    "A PNG of a few bytes that claims 10^10 pixels"
    import struct, zlib
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    head = struct.pack('>IIBBBBB', 100000, 100000, 8, 2, 0, 0, 0)
    f.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'\0'*1000)) + chunk(b'IEND', b''))

@pytest.fixture
def broken(photos, tmp_path):
    d = tmp_path/'broken'
    d.mkdir()
    whole = (photos/'a'/'0.png').read_bytes()
    for name,data in dict(empty=b'', byte=b'x', text=b'<html>', cut=whole[:len(whole)//2], lfs=b'version https://git-lfs').items(): (d/f'{name}.png').write_bytes(data)
    bomb(d/'bomb.png')
    (d/'nothing.png').symlink_to('no/such/file.png')
    (d/'etc.png').symlink_to('/etc/passwd')
    (d/'null.png').symlink_to('/dev/zero') # Would never end
    os.mkfifo(d/'fifo.png')
    n = len(list(d.iterdir()))
    (d/'sound.png').write_bytes(whole)
    return d,n

def test_corrupt_images_are_named_or_refused(model, broken, tmp_path):
    d,n = broken
    began = time.monotonic()
    (tmp_path/'a.csv').write_text('before')
    with pytest.raises(ValueError, match=f"{n} of {n+1} images cannot be decoded: 'bomb.png', .* and {n-5} more .*Nothing was written"): go(model[1], d, tmp_path/'a.csv')
    assert (tmp_path/'a.csv').read_text()=='before' and sorted(o.name for o in tmp_path.iterdir())==['a.csv','broken']
    done = go(model[1], d, tmp_path/'a.csv', corrupt='empty', topk=None)
    got = {r[0]:r[1:] for r in rows(tmp_path/'a.csv')[1:]}
    assert done.n_bad==n and got.pop('sound.png')!=['']*3 and len(got)==n and all(v==['']*3 for v in got.values())
    assert time.monotonic()-began<5
    assert 'DecompressionBombError' in read_pixels(d/'bomb.png') and 'root:' not in read_pixels(d/'etc.png')

@pytest.mark.parametrize('mode,ending', [('L','png'), ('1','png'), ('P','gif'), ('RGBA','png'), ('LA','png'), ('CMYK','jpg'), ('I;16','png'), ('F','tiff'), ('YCbCr','jpg')])
def test_modes(model, tmp_path, mode, ending):
    rng = np.random.default_rng(0)
    im = Image.fromarray(rng.integers(0, 60000, (20,30)).astype(np.uint16)) if mode=='I;16' else Image.fromarray(rng.integers(0, 255, (20,30,3), dtype=np.uint8)).convert(mode)
    im.save(tmp_path/f'a.{ending}')
    x = read_pixels(tmp_path/f'a.{ending}')
    with Image.open(tmp_path/f'a.{ending}') as again: assert (x[0]==np.asarray(again.convert('RGB'))).all() and x.shape==(1,20,30,3)
    assert go(model[1], tmp_path, tmp_path/'o.csv').n_bad==0

def test_not_turned_by_exif(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (30,20)).save(tmp_path/'a.jpg', exif=exif)
    assert read_pixels(tmp_path/'a.jpg').shape==(1,20,30,3)

# Memory, errors within

class Session:
    "In the place of onnxruntime's"
    def __init__(self, n): self.n,self.calls = n,0
    def get_outputs(self): return [type('Output', (), dict(shape=['b',self.n]))]
    def run(self, names, feed):
        self.calls += 1
        assert feed['image'].dtype==np.uint8
        return [np.full((1,self.n), 1/self.n, np.float32)]

@pytest.fixture
def fake(monkeypatch):
    s = Session(50_000)
    monkeypatch.setattr(module, 'open_onnx', lambda file, threads: (s, dict(task='classes', classes=[f'c{i}' for i in range(s.n)])))
    return s

def links(photos, d, n):
    d.mkdir()
    for i in range(n): os.link(photos/'a'/'0.png', d/f'{i:05}.png')
    return d

def peak(f):
    tracemalloc.start()
    try:
        f()
        return tracemalloc.get_traced_memory()[1]/1e6
    finally: tracemalloc.stop()

def test_memory_is_constant(fake, photos, tmp_path):
    "Kept answers alone would be 60 MB more, kept images 75 MB"
    big = Image.new('RGB', (500,500))
    (tmp_path/'big').mkdir()
    big.save(tmp_path/'big'/'0.png')
    (tmp_path/'d').mkdir()
    def some(n):
        for i in range(n):
            if not (tmp_path/'d'/f'{i}.png').exists(): os.link(tmp_path/'big'/'0.png', tmp_path/'d'/f'{i}.png')
        return peak(lambda: go('m', tmp_path/'d', tmp_path/'a.csv', threads=2))
    some(3) # What is made once
    few,many = some(20),some(320)
    assert fake.calls==343 and many<few+8, (few,many)

def test_threads_are_a_few_items_ahead():
    taken = []
    answers = module.in_order(lambda o: -o, (taken.append(i) or i for i in range(100)), 3)
    assert [next(answers) for _ in range(5)]==[0,-1,-2,-3,-4] and len(taken)<=5+2*3
    answers.close()

def test_a_million_names(monkeypatch):
    "Held as texts, and without a second list where all are in one folder"
    names = [f'image_{i:07}.jpg' for i in range(100_000)]
    n = peak(lambda: module.rows_plan(names, dict(task='classes', classes=['a','b']), 2))
    assert n<2

def test_interrupted(fake, photos, tmp_path, monkeypatch):
    d = links(photos, tmp_path/'d', 30)
    def stop(self, i): raise KeyboardInterrupt
    monkeypatch.setattr(module._Bar, 'update', stop)
    with pytest.raises(KeyboardInterrupt): go('m', d, tmp_path/'a.csv')
    assert [o.name for o in tmp_path.iterdir()]==['d'] and fake.calls<30

def test_what_is_no_number_is_refused(fake, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, 'run', lambda *args: [np.full((1,50_000), np.nan)])
    with pytest.raises(ValueError, match="'00000.png': the network gives NaN"): go('m', links(photos, tmp_path/'d', 5), tmp_path/'a.csv')
    assert not (tmp_path/'a.csv').exists()

@pytest.mark.parametrize('kw,said', [(dict(corrupt='skip'), "`corrupt` must be 'refuse' or 'empty'"), (dict(threads=0), '`threads` must be a positive integer'),
                                     (dict(out='.'), '`out` must be a file to write'), (dict(path='none'), '`path` must be a folder'), (dict(topk=9), '`topk` must be 1 to 3')])
def test_arguments(model, photos, tmp_path, monkeypatch, kw, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said): go(model[1], **(dict(path=photos) | kw))
    assert not list(tmp_path.iterdir())

# The command

def error_of(capsys, *args):
    with pytest.raises(SystemExit) as e: cli.main([*map(str, args)])
    said = capsys.readouterr()
    assert (e.value.code, said.out, said.err.count('\n'))==(2,'',1)
    return said.err

def test_command(model, photos, broken, tmp_path, capsys, monkeypatch):
    learn,file = model
    monkeypatch.chdir(tmp_path)
    cli.main(['export', str(learn.path/'model.pkl'), 'again.onnx', '--trust'])
    assert 'the same answer for' in capsys.readouterr().out
    cli.main(['predict', 'again.onnx', str(photos), '--topk', 'all'])
    assert capsys.readouterr().out.startswith('predictions.csv: 12 rows, ')
    go(file, photos, tmp_path/'b.csv', topk=None)
    a,b = pd.read_csv('predictions.csv'),pd.read_csv('b.csv')
    assert a['id'].equals(b['id']) and abs(a.iloc[:,1:]-b.iloc[:,1:]).values.max()<1e-4
    d,n = broken
    assert f'{n} of {n+1} images cannot be decoded' in error_of(capsys, 'predict', file, d, '--out', 'c.csv') and not Path('c.csv').exists()
    cli.main(['predict', str(file), str(d), '--out', 'c.csv', '--corrupt', 'empty'])
    assert f'{n} of {n+1} images cannot be decoded' in capsys.readouterr().err and len(rows('c.csv'))==n+2

class Planted:
    def __init__(self, f): self.f = f
    def __reduce__(self): return os.mkdir, (str(self.f),)

def test_a_pickle_is_not_loaded_without_trust(model, tmp_path, capsys):
    import torch
    f = tmp_path/'model.pkl'
    torch.save(Planted(tmp_path/'it ran'), f)
    assert 'runs the code in it, as it is a pickle: give --trust' in error_of(capsys, 'export', f, tmp_path/'m.onnx')
    assert 'it is a zip file' in error_of(capsys, 'predict', f, tmp_path) and not (tmp_path/'it ran').exists()
    error_of(capsys, 'export', f, tmp_path/'m.onnx', '--trust') # No Learner; but it ran
    assert (tmp_path/'it ran').exists() and not (tmp_path/'m.onnx').exists()

@pytest.mark.parametrize('args,said', [
    (['export','none.pkl','m.onnx','--trust'], "argument PKL: must be a file, not 'none.pkl'"),
    (['export','text.pkl','m.onnx','--trust'], "argument PKL: 'text.pkl' cannot be loaded: "),
    (['export','text.pkl','m.onnx','--trust','--precision','int8'], "argument --precision: invalid choice: 'int8'"),
    (['predict','none.onnx','.'], "'none.onnx' is not a file"), (['predict','text.pkl','none'], "argument PATH: must be a folder, not 'none'"),
    (['predict','text.pkl','.','--topk','0'], "argument --topk: must be a positive integer, not '0'"),
    (['predict','text.pkl','.','--threshold','2'], "argument --threshold: must be a probability in [0,1], not '2'")])
def test_one_line_says_what_is_wrong(tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    Path('text.pkl').write_text('<html>')
    assert said in error_of(capsys, *args)

def test_other_endings(model, photos, tmp_path, capsys):
    learn,file = model
    assert "argument ONNX: must be a file name that ends in '.onnx'" in error_of(capsys, 'export', learn.path/'model.pkl', tmp_path/'m.txt', '--trust')
    (tmp_path/'d').mkdir()
    assert 'argument PATH: must be a folder with images' in error_of(capsys, 'predict', file, tmp_path/'d')
    assert 'argument --topk: must be 1 to 3, or None' in error_of(capsys, 'predict', file, photos, '--topk', '4')
