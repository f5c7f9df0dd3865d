"`benchmarks/gpu.py`: its parts in miniature on the CPU, and what becomes of a part that fails or takes too long"
import importlib, json, math, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from fastai_tricks.core.test_utils import gpu_line
from fastai_tricks.data.sample import sample_images

HERE = Path(__file__).parents[1]/'benchmarks'

@pytest.fixture(scope='module')
def on_path():
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(HERE))
        yield

@pytest.fixture(scope='module')
def gpu(on_path): return importlib.import_module('gpu')

@pytest.fixture(scope='module')
def parts(on_path): return importlib.import_module('gpu_parts')

def test_a_part_has_a_share_and_a_generator(gpu, parts): assert list(gpu.PARTS)==list(parts.PARTS)

# In miniature ---------------------------------------------------------------------

@pytest.fixture(scope='module')
def small(gpu, parts, tmp_path_factory):
    "All parts, as the processes that measure go through them; one file of weights is broken"
    state, weights = tmp_path_factory.mktemp('state'), tmp_path_factory.mktemp('weights')
    (weights/'resnet18-broken.safetensors').write_bytes(b'no weights')
    todo, codes = list(gpu.PARTS.items()), []
    with torch.random.fork_rng():
        while todo:
            codes.append(parts.main(str(state), todo, time.time()+600, True, None, str(weights)))
            todo = [o for o in todo if not (state/f'part-{o[0]}.json').exists()]
    read = lambda f: json.loads(f.read_text())
    res = {f.stem.removeprefix('part-'):read(f) for f in state.glob('part-*.json')}
    return SimpleNamespace(codes=codes, head=read(state/'head.json'), parts=res, left=[p.name for p in state.iterdir() if p.name.startswith('tmp')])

def spreads(o):
    "All measured values within"
    if isinstance(o, dict) and {'n','median','min','max'}<=o.keys(): yield o
    elif isinstance(o, (dict,list)):
        for v in (o.values() if isinstance(o, dict) else o): yield from spreads(v)

def test_all_parts_measure(small, gpu):
    assert set(small.parts)==set(gpu.PARTS) and small.left==[]
    for name,p in small.parts.items():
        if name!='pretrained': assert p['status']=='done', p
        assert p['results'] and p['seconds']>0 and p['says'].endswith('.')
        found = list(spreads(p['results']))
        for o in found: assert all(map(math.isfinite, o.values())) and o['min']<=o['median']<=o['max']
        if name not in ('precision','bs_find'): assert found
        if name not in ('precision','bs_find','pretrained','scratch'): assert min(o['n'] for o in found)>=3, name

def test_what_is_measured(small):
    p = {k:v['results'] for k,v in small.parts.items()}
    assert {'fp32','fp32, channels_last'} <= {v['variant'] for v in p['precision'][0]['variants']} and p['precision'][0]['n']>=3 and p['precision'][0]['of_best']>0
    assert [r['side'] for r in p['resize'] if 'side' in r and r['bs']==8]==[32,64] and [r['larger_batches'] for r in p['resize'] if 'plan' in r]==[False,True]
    full = next(r for r in p['resize'] if r.get('side')==64)
    assert full['time']['median']==full['efficiency']['max']==full['pixels']==1
    assert {r['what'] for r in p['depthwise']}=={'layer','training','inference'}
    assert all(r['bs']==8 and r['trains'] and r['seconds']>0 for r in p['bs_find'])
    assert {r['way'] for r in p['loader']}=={'plain','PILImageDraft','resized_copies','cached'} and small.parts['loader']['gpu']
    assert [r['line'] for r in p['scratch']]==['learn.fit_one_cycle(1)','learn.to_fp16().fit_one_cycle(1)','learn.fit_fast(2)']
    assert p['scratch'][0]['time']['median']==1 and p['scratch'][0]['points']['median']==0
    assert p['compile'][0]['note']=='' and p['compile'][0]['to_eager']['median']>0

def test_a_part_that_fails_keeps_what_it_had_and_the_others_run(small):
    p = small.parts['pretrained']
    assert p['status']=='failed' and 'SafetensorError' in p['error'] and small.codes==[1,0]
    assert {r['net'] for r in p['results']}=={'lite0'} and len(p['results'])==3

def test_a_cpu_is_no_gpu(small, parts, tmp_path):
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    assert small.head['device']['type']=='cpu'
    res = dict(**small.head, parts=small.parts, small=False)
    assert gpu_line('resize', results=res)=='Not measured on a GPU.'
    assert 'On one' in gpu_line('resize', results={**res, 'device':dict(type='cuda', name='Card', torch='2', cuda='13')})
    with pytest.raises(SystemExit, match='no CUDA GPU'): parts.main(str(tmp_path), [('resize',1)], time.time()+60, False, None, None)
    assert not list(tmp_path.glob('part-*'))

def test_line_is_of_the_file_above(tmp_path, monkeypatch):
    (tmp_path/'nbs'/'x').mkdir(parents=True)
    (tmp_path/'benchmarks').mkdir()
    res = dict(device=dict(type='cuda', name='Card', torch='2.9', cuda='13.0'), small=False, parts=dict(loader=dict(status='done', says='The loader keeps up.')))
    (tmp_path/'benchmarks'/'gpu.json').write_text(json.dumps(res))
    monkeypatch.chdir(tmp_path/'nbs'/'x')
    assert gpu_line('loader')=='On one Card (torch 2.9, CUDA 13.0): The loader keeps up.'
    monkeypatch.chdir(tmp_path/'nbs')
    assert gpu_line('resize')=='Not measured on a GPU.'

def test_compared_with_the_first_line_of_the_same_seed(parts):
    def run(line, seed, seconds, acc, curve): return dict(net='n', line=line, seed=seed, seconds=seconds, accuracy=acc, curve=curve)
    runs = [run('a', 0, 10, .5, [[4,.2],[10,.4]]), run('b', 0, 5, .6, [[2,.4],[5,.6]]), run('a', 1, 20, .6, [[20,.7]]), run('b', 1, 5, .5, [[5,.6]]), run('b', 2, 1, 1., [[1,1.]])]
    a,b = parts.compared(runs, ['a','b'])
    assert a['time']['median']==1 and b['time']==dict(n=2, median=.375, min=.25, max=.5)
    assert b['points']['min']==pytest.approx(-10) and b['points']['max']==pytest.approx(10) and b['accuracy']['n']==2
    assert b['reached']==1 and b['time_to']['median']==.2
    assert '(1 of 2 runs)' in parts._says([a,b], ['a','b'], dict(train=1, size=1, test=1))

def test_no_turn_begins_that_would_not_end_in_time(parts, monkeypatch):
    clock,seen = SimpleNamespace(now=0.),[]
    monkeypatch.setattr(parts, 'time', SimpleNamespace(time=lambda: clock.now))
    def turns():
        for i in range(99):
            clock.now += 1
            yield dict(last=i==99, results=[i])
    parts.measure(turns(), 5.5, lambda o: seen.append(dict(o)))
    assert seen[-1]['status']=='out of time' and clock.now==5 and seen[-1]['results']==[4] and seen[-1]['seconds']==5
    assert [o['results'] for o in seen[:3]]==[[],[0],[1]] and seen[1]['status']=='running'
    # The last one took long: nothing is left that another such turn would be needed for
    clock.now = 0.
    def two():
        for i in (1,2):
            clock.now += 1
            yield dict(last=i==2, results=[i])
    parts.measure(two(), 2.5, lambda o: seen.append(dict(o)))
    assert seen[-1]['status']=='done' and seen[-1]['results']==[2] and 'last' not in seen[-1]

# The process that watches ---------------------------------------------------------------

FAKE = '''
import json, os, sys, time
from pathlib import Path
state, todo, deadline = Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
def put(name, o): (state/'tmp').write_text(json.dumps(o)); os.replace(state/'tmp', state/name)
put('head.json', dict(device=dict(type='cpu', name='fake'), pid=os.getpid()))
for name, share in todo:
    put('now.json', dict(part=name, deadline=min(deadline, time.time()+.3)))
    part = dict(status='running', seconds=.1, results=[name], says='')
    put(f'part-{name}.json', part)
    if name=='hangs': time.sleep(600)
    if name=='dies': os.abort()
    put(f'part-{name}.json', dict(part, status='failed' if name=='fails' else 'done', pid=os.getpid()))
    if name=='fails': sys.exit(1)
'''

def run_fake(gpu, tmp_path, names, seconds=60, code=FAKE):
    (tmp_path/'fake.py').write_text(code)
    saved, res, deadline = [], dict(parts={}, small=True), time.time()+seconds
    command = lambda state, todo: [sys.executable, str(tmp_path/'fake.py'), str(state), json.dumps(todo), str(deadline)]
    gpu.measure(res, [(n,1) for n in names], deadline, command, lambda r: saved.append(json.loads(json.dumps(r))))
    return res, saved

def test_what_hangs_is_ended_and_the_rest_goes_on(gpu, tmp_path):
    began = time.time()
    res,saved = run_fake(gpu, tmp_path, ['one','hangs','two','fails','dies','three'])
    assert time.time()-began<50
    status = {k:v['status'] for k,v in res['parts'].items()}
    assert status==dict(one='done', hangs='out of time', two='done', fails='failed', dies='failed', three='done')
    assert res['parts']['hangs']['results']==['hangs'] and 'ended with -6' in res['parts']['dies']['error']
    # A new process after each of those that did not end well
    pids = [res['parts'][k]['pid'] for k in ('one','two','fails','three')]
    assert pids[1]==pids[2] and len({*pids})==3
    assert saved[-1]==res and any(o['parts'].get('hangs', {}).get('status')=='running' for o in saved), 'written while it goes on'
    assert not Path(f"/proc/{pids[0]}").exists()

def test_parts_that_no_time_is_left_for(gpu, tmp_path):
    res,_ = run_fake(gpu, tmp_path, ['hangs','later'], seconds=.5)
    assert {k:v['status'] for k,v in res['parts'].items()}=={k:'out of time' for k in ('hangs','later')}

def test_a_process_that_never_starts_is_an_error(gpu, tmp_path):
    with pytest.raises(SystemExit, match='ended with 3, before the first part'): run_fake(gpu, tmp_path, ['one'], code='raise SystemExit(3)')

def test_results_of_another_device_stay(gpu, tmp_path):
    res = dict(device=dict(type='cuda', name='other'), parts=dict(one=dict(status='done')))
    (tmp_path/'head.json').write_text(json.dumps(dict(device=dict(type='cuda', name='this'))))
    with pytest.raises(SystemExit, match='delete it, or choose another --out'): gpu.gather(res, tmp_path)
    assert res['device']['name']=='other'

def test_command(tmp_path):
    "As it is typed: a part again, the others stay; in miniature it leaves the measurement alone"
    def run(*args): return subprocess.run([sys.executable, str(HERE/'gpu.py'), *args], capture_output=True, text=True)
    out = tmp_path/'small.json'
    r = run('--small', '--parts', 'resize', '--out', str(out), '--data', str(sample_images()))
    assert r.returncode==0, r.stderr
    res = json.loads(out.read_text())
    assert res['small'] and list(res['parts'])==['resize'] and res['parts']['resize']['status']=='done' and res['seconds']<60*res['minutes']
    assert 'ProgressiveResize' in r.stdout and res['environment']['fastai_tricks']
    for args,said in ((['--small'],'an --out of its own'), (['--out',str(out)],'results of another kind'), (['--data',str(out)],'is no folder')):
        r = run(*args)
        assert r.returncode==2 and said in r.stderr
