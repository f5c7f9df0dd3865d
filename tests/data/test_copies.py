"Small copies of a data set"
import os, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from fastai.data.transforms import get_image_files
from fastai_tricks.all import resized_copies
from killed import forked

def picture(seed, wh=(300,200), mode='RGB'): return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8,12,3), dtype=np.uint8)).resize(wh, Image.Resampling.BICUBIC).convert(mode)

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
    assert set(files(tmp_path/'dest'))=={f'{s}/{n}' for s in (64,128) for n in originals} | {'images.csv','resized_copies.json','.resized_copies.json.lock'}
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
    assert "3 images could not be copied: 'a/empty.jpg'" in capsys.readouterr().out

@pytest.mark.parametrize('dest', ['small','.','..'])
def test_copies_are_not_copied(src, dest, monkeypatch):
    "Within the folder of the originals, the same, or the one above; and by another spelling"
    monkeypatch.chdir(src.parent)
    for sizes,s in ((64,src), (100,src), (64,Path('src'))):
        df = resized_copies(s, src/dest, sizes=sizes, n_workers=0)
        assert len(df)==9 and len(files(src/dest/str(sizes)))==9

@pytest.mark.parametrize('kill', ['rename:6','renamed:7'])
def test_killed_and_run_again(tmp_path, kill):
    "Files are whole or absent when the process dies as it puts one in its place; the next run makes the others"
    src,dest = tmp_path/'src',tmp_path/'dest'
    src.mkdir()
    for i in range(5): picture(i, (90,60)).save(src/f'{i}.png')
    def run(dest): resized_copies(src, dest, sizes=(20,40), n_workers=0)
    assert forked(run, dest, kill) # The first file is the record
    done = {f:f.stat().st_ino for f in get_image_files(dest)}
    left = [n for n in files(dest) if '.part' in n]
    assert len(left)==(kill=='rename:6')
    assert len(done)==(4 if kill=='rename:6' else 6) and not (dest/'images.csv').exists()
    for f in done: Image.open(f).load()
    run(dest)
    assert len(get_image_files(dest/'20'))==len(get_image_files(dest/'40'))==5 and (dest/'images.csv').exists()
    assert all(f.stat().st_ino==i for f,i in done.items()) and not any('.part' in n for n in files(dest))

@pytest.mark.parametrize('name,val', [('sizes',()), ('sizes',(0,)), ('sizes','64'), ('quality',0), ('quality',101), ('format','JPG'), ('src','nowhere')])
def test_bad_argument(src, tmp_path, name, val):
    with pytest.raises(ValueError, match=f'`{name}`'): resized_copies(**{**dict(src=src, dest=tmp_path/'dest'), name:val})
    assert not (tmp_path/'dest').exists()

# Nothing mixed up ----------------------------------------------------------------------

def small(path, *names):
    for i,n in enumerate(names):
        (path/n).parent.mkdir(parents=True, exist_ok=True)
        picture(i, (30,20)).save(path/n)
    return path

def bytes_of(path): return {n:f.read_bytes() for n,f in files(path).items()}

def test_a_class_that_is_called_like_a_size(tmp_path):
    "It is neither left out nor written over"
    src = small(tmp_path/'src', '128/a.jpg', '64/a.jpg', '64/128/a.jpg', 'cats/a.jpg')
    was = bytes_of(src)
    for dest in (src,src/'..'/'src'):
        with pytest.raises(ValueError, match="`dest` must be one without a folder '128', unless `resized_copies` made it; or choose another size"): resized_copies(src, dest, sizes=(16,128), n_workers=0)
    with pytest.raises(ValueError, match="folder '128'"): resized_copies(src/'cats', src, sizes=128, n_workers=0)
    assert bytes_of(src)==was
    df = resized_copies(src, src, sizes=16, n_workers=0)
    assert set(df['file'])==set(was) and set(was)<={n[3:] for n in files(src) if n.startswith('16/')}
    (src/'32').mkdir() # Nothing in it
    assert len(resized_copies(src, src, sizes=32, n_workers=0))==4
    # A class of this name that came later
    small(src, '16/dogs/b.jpg')
    was = bytes_of(src)
    with pytest.raises(ValueError, match="no originals lie among copies, as 'dogs/b.jpg' do"): resized_copies(src, src, sizes=16, n_workers=0)
    assert bytes_of(src)==was

def test_another_image_with_the_same_time(tmp_path, capsys):
    src,dest = small(tmp_path/'src', 'a.jpg', 'b.jpg'),tmp_path/'dest'
    resized_copies(src, dest, sizes=(8,10), n_workers=0)
    stat,was = (src/'a.jpg').stat(),bytes_of(dest)
    picture(7, (40,40)).save(src/'a.jpg')
    os.utime(src/'a.jpg', ns=(stat.st_mtime_ns,)*2)
    capsys.readouterr()
    resized_copies(src, dest, sizes=8, n_workers=0)
    resized_copies(src, dest, sizes=(8,10), n_workers=0) # The larger copy was not asked for before
    assert [l.split(',')[0] for l in capsys.readouterr().out.splitlines() if 'written' in l]==['1 files written','1 files written']
    now = bytes_of(dest)
    assert {n for n in was if n.endswith('.jpg') and was[n]!=now[n]}=={'8/a.jpg','10/a.jpg'}

def test_copies_of_images_that_are_gone(tmp_path, capsys):
    "They would be trained on; those of another source and files that are no copies stay"
    src,other,dest = small(tmp_path/'src', 'a.png', 'b.png', 'c/d.png'),small(tmp_path/'other', 'c/d.png', 'e.png'),tmp_path/'dest'
    for s in (src,other): resized_copies(s, dest, sizes=(8,10), format='JPEG', n_workers=0)
    small(dest, '8/mine.jpg')
    (dest/'8'/'notes.txt').write_text('mine')
    for n in ('a.png','c/d.png'): (src/n).unlink()
    capsys.readouterr()
    resized_copies(src, dest, sizes=8, format='JPEG', n_workers=0)
    assert "copies of 1 image no longer there were removed: 'a.png'" in capsys.readouterr().out
    left = {n for n in files(dest) if n[0] in '81'}
    assert left=={'8/b.jpg','8/c/d.jpg','8/e.jpg','8/mine.jpg','8/notes.txt','10/b.jpg','10/c/d.jpg','10/e.jpg'}
    resized_copies(src, dest, sizes=8, format='JPEG', n_workers=0)
    assert 'no longer' not in capsys.readouterr().out

def test_two_at_once(tmp_path, monkeypatch):
    "The second waits, says for whom, and finds everything made"
    from fastai_tricks.data import copies
    src,dest = small(tmp_path/'src', *(f'{i}.jpg' for i in range(6))),tmp_path/'dest'
    made,said = [tmp_path/'made1',tmp_path/'made2'],[]
    write = copies._write_copies
    def slow(im, file, *args):
        with open(made[0], 'a') as f: f.write(f'{file.name} ')
        time.sleep(.02)
        write(im, file, *args)
    monkeypatch.setattr(copies, '_write_copies', slow)
    pid = os.fork()
    if not pid:
        try: resized_copies(src, dest, sizes=(8,10), n_workers=0)
        except BaseException: os._exit(1)
        os._exit(0)
    while not made[0].exists(): time.sleep(.001)
    monkeypatch.setattr(copies, '_write_copies', lambda *args: made[1].touch() or write(*args))
    monkeypatch.setattr('builtins.print', lambda *args, **kwargs: said.append(' '.join(map(str, args))))
    resized_copies(src, dest, sizes=(8,10), n_workers=0)
    assert os.waitpid(pid, 0)[1]==0
    assert any(f"resized_copies: 'dest' is in use by process {pid} since" in l and 'waiting until it is done' in l for l in said)
    assert any('0 files written, 12 were there' in l for l in said) and len(made[0].read_text().split())==6 and not made[1].exists()

def test_a_folder_that_cannot_be_written_to(tmp_path):
    src = small(tmp_path/'src', 'a.jpg')
    (tmp_path/'file').touch()
    for dest in (tmp_path/'file'/'dest', '/proc/no/such'):
        with pytest.raises(ValueError, match='`dest` must be a folder that can be written to'): resized_copies(src, dest, sizes=8, n_workers=0)

@pytest.mark.parametrize('text', ['','{"quality": 90'])
def test_a_damaged_record(tmp_path, text):
    src,dest = small(tmp_path/'src', 'a.jpg'),tmp_path/'dest'
    resized_copies(src, dest, sizes=8, n_workers=0)
    (dest/'resized_copies.json').write_text(text)
    with pytest.raises(ValueError, match="resized_copies.json' is damaged.*choose another `dest`, or delete it"): resized_copies(src, dest, sizes=8, n_workers=0)

def test_copies_of_before_there_was_a_list_of_them(tmp_path, capsys):
    import json
    src,dest = small(tmp_path/'src', 'a.jpg', 'b.jpg'),tmp_path/'src'/'small'
    resized_copies(src, dest, sizes=8, n_workers=0)
    kept = json.loads((dest/'resized_copies.json').read_text())
    del kept['made']
    (dest/'resized_copies.json').write_text(json.dumps(kept))
    capsys.readouterr()
    resized_copies(src, dest, sizes=8, n_workers=0)
    assert '0 files written, 2 were there' in capsys.readouterr().out

def test_long_names(tmp_path):
    names = ['n'*244 + '.jpg', 'n'*251 + '.png', 'ä'*125 + '.jpg']
    src = small(tmp_path/'src', *names)
    df = resized_copies(src, tmp_path/'dest', sizes=8, n_workers=0)
    assert df['error'].isna().all() and {n[2:] for n in files(tmp_path/'dest') if n[:2]=='8/'}==set(names)

def test_a_full_disk_is_no_fault_of_the_images(tmp_path, monkeypatch):
    "It is said once; what was copied before is whole, and the next run makes the others"
    src,dest,save = small(tmp_path/'src', *(f'{i}.png' for i in range(4))),tmp_path/'dest',Image.Image.save
    def full(im, file, **kwargs):
        if len(files(dest))>=5: raise OSError(28, 'No space left on device') # Record, lock, its holder, two copies
        save(im, file, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(Image.Image, 'save', full)
        with pytest.raises(OSError, match="no space left on '.*8' for '2.png'"): resized_copies(src, dest, sizes=8, n_workers=0)
    was = bytes_of(dest/'8')
    assert set(was)=={'0.png','1.png'}
    resized_copies(src, dest, sizes=8, n_workers=0)
    assert len(files(dest/'8'))==4 and {n:b for n,b in bytes_of(dest/'8').items() if n in was}==was
