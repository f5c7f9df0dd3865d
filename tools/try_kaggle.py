"""Run the cells of the tutorial "On Kaggle" in an environment of Kaggle's versions, without a network

    python tools/try_kaggle.py dist/kaggle .venv-kaggle/bin/python

A temporary folder stands for `/kaggle`. Then what the notebook wrote becomes an input, as a version that was saved does, and all is run once more."""
import json, os, re, shutil, socket, subprocess, sys, tempfile, zipfile
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1]/'nbs'/'tutorials'/'kaggle.ipynb'

def cells():
    nb = json.loads(PAGE.read_text(encoding='utf-8'))
    return [''.join(c['source']) for c in nb['cells'] if c['cell_type']=='code']

def starts_processes(src): return 'notebook_launcher(' in src

def make_inputs(wheels, kaggle):
    "The wheels, a few photos with a sample of a submission, and files of weights (random ones)"
    import timm, torch, torchvision
    from safetensors.torch import save_file
    shutil.copytree(wheels, kaggle/'input'/'fastai-tricks')
    with zipfile.ZipFile(next(wheels.glob('fastai_tricks-*.whl'))) as z: z.extract('fastai_tricks/data/sample_images.zip', kaggle)
    with zipfile.ZipFile(kaggle/'fastai_tricks/data/sample_images.zip') as z: z.extractall(kaggle/'all')
    photos,rows = kaggle/'input'/'photos',[]
    (photos/'test').mkdir(parents=True)
    folders = sorted({f.parent for f in (kaggle/'all').rglob('*.png')}, key=lambda d: (-len(list(d.iterdir())), d))[:5]
    for d in folders:
        *train,test = sorted(d.glob('*.png'))[:18]
        (photos/'train'/d.name).mkdir(parents=True)
        for f in train: shutil.copy(f, photos/'train'/d.name)
        rows.append(f'{d.name}-{test.name}')
        shutil.copy(test, photos/'test'/rows[-1])
    (photos/'sample.csv').write_text('\n'.join(['id,label', *(f'{o},{folders[0].name}' for o in rows)]) + '\n')
    weights = kaggle/'input'/'weights'
    weights.mkdir()
    torch.manual_seed(1)
    save_file(timm.create_model('resnet18').state_dict(), weights/'resnet18.safetensors')
    url = torchvision.models.get_model_weights('resnet18').DEFAULT.url
    torch.save(torchvision.models.resnet18().state_dict(), weights/url.split('/')[-1])

def run_cell(src, kaggle, names):
    "A cell, with lines for the shell"
    # A CPU has no time for larger images
    src = src.replace('/kaggle/', f'{kaggle}/').replace('size=224', 'size=96')
    for line in re.findall(r'(?m)^!(.*)$', src): subprocess.run(line, shell=True, check=True)
    exec(compile(re.sub(r'(?m)^!.*$', '', src), '<cell>', 'exec'), names)

def run_cells(kaggle, launches):
    "In this process: all but what starts processes of its own, or what that needs"
    assert [n for _,n in socket.if_nameindex()]==['lo'] or os.environ.get('NETWORK'), 'there is a network'
    srcs,names = cells(),dict(__name__='__main__')
    os.chdir(kaggle/'working')
    if launches: srcs = srcs[:2] + [s for s in srcs if starts_processes(s)]
    for src in srcs:
        if launches or not starts_processes(src):
            print('> ' + src.split('\n')[0], flush=True)
            run_cell(src, kaggle, names)

def in_env(python, *args):
    "Run a step with another Python, in a network namespace that has nothing but itself"
    alone = 'ip link set lo up; exec "$@"'
    cut = [] if os.environ.get('NETWORK') else ['unshare', '--map-root-user', '--net', 'sh', '-c', alone, 'sh']
    env = {**os.environ, 'PATH':f'{Path(python).parent}:{os.environ["PATH"]}', 'PYTHONWARNINGS':'ignore', 'MPLBACKEND':'agg', 'OMP_NUM_THREADS':'1', 'HF_HUB_OFFLINE':'1'}
    env.pop('PYTHONPATH', None)
    r = subprocess.run([*cut, python, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    if r.returncode: raise SystemExit(f'{r.stdout}\n{" ".join(args)} failed')
    return r.stdout

def main(wheels, python):
    python = os.path.abspath(python)
    def pip(*args): return [o for o in in_env(python, '-m', 'pip', '--disable-pip-version-check', *args).splitlines() if not o.startswith('WARNING')]
    own = {f.name.split('-')[0] for f in wheels.glob('*.whl')}
    pip('uninstall', '-q', '-y', *own)
    image = pip('freeze')
    with tempfile.TemporaryDirectory() as d:
        kaggle = Path(d)/'kaggle'
        os.environ['TORCH_HOME'] = f'{d}/torch'
        in_env(python, __file__, 'inputs', str(wheels.resolve()), str(kaggle))
        for again in (False,True):
            (kaggle/'working').mkdir()
            for step in ('cells',) if again else ('cells','launches'):
                said = in_env(python, __file__, step, str(kaggle))
                print('\n'.join(re.findall(r'(?m)^(?:> .*|\w+: .*)$', said)), flush=True)
                assert not again or 'all is done, nothing is trained' in said, said
            wrote = {f.name for f in (kaggle/'working').rglob('*') if f.is_file()}
            assert {'submission.csv','lite0.pkl','model.pkl','lite0.pth'}<=wrote, wrote # `model.pkl` of the first time too
            if not again: (kaggle/'working').rename(kaggle/'input'/'first-run')
    new = {o.split(' @ ')[0].split('==')[0].replace('-', '_') for o in set(pip('freeze'))-set(image)}
    assert new==own and set(image)<=set(pip('freeze')), f'the wheels changed the image: {new ^ own}'
    print('The tutorial "On Kaggle" runs without a network; the image gained', *sorted(own))

if __name__=='__main__':
    step,*args = sys.argv[1:] or [None]
    if step=='inputs': make_inputs(*map(Path, args))
    elif step in ('cells','launches'): run_cells(Path(args[0]), step=='launches')
    elif len(args)==1: main(Path(step), args[0])
    else: raise SystemExit(__doc__)
