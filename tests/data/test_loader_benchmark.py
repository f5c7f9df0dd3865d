"`benchmarks/loader.py` in miniature, and its verdicts"
import importlib.util, json, mmap, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest

HERE = Path(__file__).parents[2]/'benchmarks'

@pytest.fixture(scope='module')
def bench():
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(HERE))
        spec = importlib.util.spec_from_file_location('loader_benchmark', HERE/'loader.py')
        res = importlib.util.module_from_spec(spec)
        m.setitem(sys.modules, 'loader_benchmark', res)
        spec.loader.exec_module(res)
        yield res

def test_rates(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, 'missing', lambda: dict(webdataset='not installed', datasets='not installed', ffcv='not installed'))
    out = tmp_path/'loader.json'
    bench.main(['--parts', 'rates', '--photos', '90x60:6', '--sizes', '32', '--crop-sizes', '--workers', '0', '1', '--rounds', '2', '--seconds', '.001', '--out', str(out)])
    res = json.loads(out.read_text())['rates']
    assert list(res['missing'])==['webdataset','datasets','ffcv'] and res['source']['made'][0]['photos']==6
    ways = ['fastai','PILImageDraft','resized_copies','cached, memory','cached, disk','numpy copy','numpy copy, new batch']
    alone = ['fastai','cached, memory','cached, disk','numpy copy','numpy copy, new batch']
    for workers,names in ((0,alone), (1,ways)):
        rows = [r for r in res['summary'] if r['workers']==workers]
        by = {r['way']:r for r in rows}
        assert sorted(r['way'] for r in rows)==sorted(names) and {r['n'] for r in rows}=={2}
        assert by['fastai']['second_to_fastai']==dict(median=1, min=1, max=1) and 'first' not in by['numpy copy']
        assert by['cached, memory']['second_to_fastai']['max']>0 and by['cached, memory']['copy_to_second']['max']>0

def test_ratios_are_of_one_round(bench):
    def row(rnd, way, second): return dict(round=rnd, photo=500, crop='Resize', size=160, workers=1, way=way, setup=0, first=second, first_batch=0, second=second, cpu_ms=1, epochs=1)
    speeds = dict(fastai=(10,100,20), cached=(40,300,100))
    got = {r['way']:r for r in bench.summarise([row(i, way, v) for way,vs in speeds.items() for i,v in enumerate(vs)])}
    assert got['cached']['second_to_fastai']==dict(median=4, min=3, max=5) and got['cached']['second']['median']==100

def test_an_epoch_holds_every_photo_as_often_as_it_is_repeated(bench, tmp_path):
    import loader_ways as w
    bench.make_photos(bench.sample_images(), tmp_path/'photos', (60,80), 6)
    for i,name in enumerate(('fastai','resized_copies','cached, memory','cached, disk','numpy copy')):
        tmp = tmp_path/str(i)
        tmp.mkdir()
        batches = list(w.WAYS[name](w.Job(tmp_path/'photos', (60,80), 32, 'Resize', 0, tmp))(3))
        assert [tuple(x.shape) for x,_ in batches]==[(6,3,32,32)]*3
        if name.startswith('numpy'): continue # One batch, filled again and again
        # Labels tell photos apart: all are of different classes
        assert [sorted(y.tolist()) for _,y in batches]==[list(range(6))]*3

def test_memory_counts_what_is_shared_once(bench, tmp_path):
    bench.make_photos(bench.sample_images(), tmp_path/'photos', (90,60), 6)
    for way in ('memory','disk'):
        res = bench.memory_of(tmp_path/'photos', (90,60), way, 1, 32, tmp_path)
        assert res['first']>0 and res['buffer']>=7*3*32*32
    shared,was = mmap.mmap(-1, 50_000_000),bench.tree_pss()
    shared.write(bytes(len(shared)))
    if not (pid := os.fork()):
        try: sum(shared[::4096]), time.sleep(60)
        finally: os._exit(0)
    time.sleep(.5)
    more = bench.tree_pss()-was
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert 45e6<more<75e6

def test_parts_are_kept_beside_each_other(bench, tmp_path, monkeypatch):
    def run(command, **kwargs):
        given = json.loads(command[-1])
        return SimpleNamespace(stdout=json.dumps(dict(way=given['way'], workers=given['workers'], first=300, second=200 if given['way']=='fastai' else 250, buffer=50)))
    monkeypatch.setattr(bench.subprocess, 'run', run)
    out = tmp_path/'loader.json'
    out.write_text(json.dumps(dict(rates=dict(summary=[]))))
    bench.main(['--parts','memory','--photos','90x60:4','--memory-rounds','2','--memory-workers','0','3','--out',str(out)])
    res = json.loads(out.read_text())
    assert set(res)=={'rates','memory','verdicts'} and [o.split(':')[0] for o in res['verdicts']]==['reached']*4
    rows = [r for r in res['memory']['summary'] if r['way']!='fastai']
    assert [(r['way'],r['workers'],r['n'],r['first_buffers']['median'],r['second_buffers']['median']) for r in rows]==[(w,n,2,0,1) for n in (0,3) for w in ('memory','disk')]

def spread(v): return dict(median=v, min=v, max=v)

def test_verdicts(bench):
    def row(**kwargs): return dict(photo=500, crop='Resize', size=160, workers=1, way='cached, memory', n=5, **{k:spread(v) for k,v in kwargs.items()})
    def said(**kwargs): return [o.split(':')[0] for o in bench.verdicts(kwargs)]
    assert said(rates=dict(summary=[row(second_to_fastai=10, copy_to_second=1.5, first_to_fastai=1)]))==['reached']*3
    assert said(rates=dict(summary=[row(second_to_fastai=9.9, copy_to_second=1.6, first_to_fastai=.9)]))==['MISSED']*3
    assert said(memory=dict(summary=[dict(way='disk', workers=4, first_buffers=spread(f), second_buffers=spread(s)) for f,s in ((1,1.2),(1,1.3),(2,1))]))==['reached','MISSED','MISSED']
    def trained(speedup, accuracy): return dict(photos='a', way='disk', n=3, speedup=spread(speedup), accuracy=spread(accuracy), accuracy_more=spread(0))
    assert said(end_to_end=dict(classes=10, summary=[trained(1.2, .5), trained(.9, .5)]))==['reached','MISSED']
    lines = bench.verdicts(dict(end_to_end=dict(classes=10, summary=[trained(1.2, .5), trained(1.2, .1)])))
    assert ['chance' in o for o in lines]==[False,True]
    assert said()==[]
