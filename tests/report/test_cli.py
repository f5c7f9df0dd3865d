"The command: the same as `tips_report`, on a folder or a CSV"
import os, re, subprocess, sys, time
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.core import PILImage
from huggingface_hub import constants
from fastai_tricks import __version__, cli
from fastai_tricks.report import report as reports
from fastai_tricks.report.tips import TIPS
from report_world import Pretend, bench, clock

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp('photos')
    for k in 'ab':
        (root/k).mkdir()
        for i in range(20):
            PILImage.create(np.random.default_rng(i).integers(0, 255, (40,40,3), dtype=np.uint8)).save(root/k/f'{i}.jpg')
    df = pd.DataFrame([(f'{k}/{i}.jpg', k) for k in 'ab' for i in range(20)], columns=['file','kind'])
    df.to_csv(root/'all.csv', index=False)
    df[:0].to_csv(root/'no_rows.csv', index=False)
    (root/'empty').mkdir()
    (root/'empty.csv').write_text('')
    (root/'junk.pth').write_text('junk')
    return root

@pytest.fixture
def offline(tmp_path, monkeypatch):
    "Nothing in the caches, and no network"
    def refused(at, *args): raise ConnectionRefusedError(111, 'refused')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path/'torch'))
    monkeypatch.setattr('socket.create_connection', refused)
    monkeypatch.setattr(bench.Bench, 'train', lambda *args, **kwargs: pytest.fail('trained'))

def half_a_second_per_image(self):
    clock.spend(.5*len(self.xb[0]))
    self.images += len(self.xb[0])

def error_of(capsys, *args):
    "The one line that the command ends with"
    with pytest.raises(SystemExit) as e: cli.main(['report', *map(str, args)])
    said = capsys.readouterr()
    assert (e.value.code, said.out, said.err.count('\n'))==(2,'',1)
    return said.err

@pytest.mark.parametrize('csv', [False,True])
def test_command(tmp_path, photos, capsys, monkeypatch, csv):
    args = ['report', str(photos), '--arch', 'test_resnet', '--scratch', '--minutes', '3', '--seeds', '1', '--size', '32', '--bs', '4',
            '--tips', 'warmup', '--num-workers', '0', '--out', str(tmp_path/'out')]
    if csv: # Nothing is trained
        p = Pretend()
        monkeypatch.setattr(bench.Bench, 'train', lambda self, *args, **kwargs: p(*args, **kwargs))
        args += ['--csv', str(photos/'all.csv'), '--fn-col', 'file', '--label-col', 'kind', '--minutes', '5']
    else: monkeypatch.setattr(bench.TrainClock, 'after_batch', half_a_second_per_image)
    cli.main(args)
    out = capsys.readouterr().out
    assert (tmp_path/'out'/'report.html').exists() and 'warmup' in out and 'Nothing was learned' in out and out.count('source = ')==1, out
    code = out[out.index('from fastai.vision.all import *'):out.rindex('learn.f')] # Without the fit
    names = {}
    exec(code, names)
    assert (len(names['dls'].train_ds), len(names['dls'].valid_ds), names['dls'].vocab)==(32, 8, ['a','b'])

@pytest.mark.parametrize('args,what', [
    (['no/such'], "argument PATH: must be a folder, not 'no/such'"),
    (['', '--minutes', '0'], "argument --minutes: must be a number above 0, not '0'"),
    (['', '--minutes', 'inf'], "argument --minutes: must be a number above 0, not 'inf'"),
    (['', '--size', '0'], "argument --size: must be a positive integer, not '0'"),
    (['', '--seeds', '1.5'], "argument --seeds: must be a positive integer, not '1.5'"),
    (['', '--bs', '0'], "argument --bs: must be a positive integer, not '0'"),
    (['', '--lr', '-1'], "argument --lr: must be a number above 0, not '-1'"),
    (['', '--valid-pct', '1'], "argument --valid-pct: must be a fraction in (0,1), not '1'"),
    (['', '--num-workers', '-1'], "argument --num-workers: must be a non-negative integer, not '-1'"),
    (['', '--csv', 'no.csv'], "argument --csv: must be a file, not 'no.csv'"),
    (['', '--weights', 'no.pth'], "argument --weights: must be a file, not 'no.pth'"),
    (['', '--weights', 'junk.pth', '--scratch'], 'argument --scratch: not allowed with argument --weights'),
    (['', '--tips', 'warmpu'], "argument --tips: must be of draft, "),
    (['empty'], "argument PATH: no images in 'empty'"),
    (['a', '--scratch'], "argument PATH: must be images of two classes or more, not 'images of 1 class' (in 'a')"),
    (['', '--csv', 'all.csv'], "argument --fn-col: 'all.csv' has no column 'image', but 'file', 'kind'"),
    (['', '--csv', 'all.csv', '--fn-col', 'file'], "argument --label-col: 'all.csv' has no column 'label'"),
    (['', '--csv', 'no_rows.csv', '--fn-col', 'file', '--label-col', 'kind'], "argument --csv: no rows in 'no_rows.csv'"),
    (['', '--csv', 'empty.csv'], "argument --csv: 'empty.csv' cannot be read: "),
    (['', '--scratch', '--bs', '17'], 'argument --bs: must be at most half of the 32 training images, not 17'),
    (['', '--arch', 'zzz'], "argument --arch: must be a name of timm or torchvision, not 'zzz'"),
    (['', '--arch', 'resnet18.no', '--scratch'], 'argument --arch: Invalid pretrained tag (no) for resnet18'),
    (['', '--weights', 'junk.pth'], "argument --weights: 'junk.pth' cannot be read as weights of 'resnet34' ("),
    (['', '--weights', 'junk.pth', '--arch', 'alexnet'], "argument --weights: 'alexnet' is no network of timm: leave --weights out"),
    ([''], "cannot be fetched (no connection to huggingface.co: refused): give --weights FILE, or --scratch to train without them"),
    (['', '--arch', 'alexnet'], "(no connection to download.pytorch.org: refused): give --scratch to train without them")])
def test_one_line_says_what_is_wrong(tmp_path, photos, capsys, monkeypatch, offline, args, what):
    monkeypatch.chdir(photos)
    assert what in error_of(capsys, args[0] or '.', *args[1:], '--out', tmp_path/'x')

def test_similar_networks_are_told_once(tmp_path, photos, capsys):
    said = error_of(capsys, photos, '--arch', 'resnet19', '--out', tmp_path/'x')
    assert said.count('such as')==1 and re.search("such as '.*resnet18' or '.+', not 'resnet19'$", said)

def test_help_names_all_tips(capsys):
    with pytest.raises(SystemExit) as e: cli.main(['report', '--help'])
    assert e.value.code==0 and f'of {", ".join(TIPS)} (default: all)' in ' '.join(capsys.readouterr().out.split())

def test_defaults_of_the_command(photos, monkeypatch):
    seen = {}
    class Done(Exception): pass
    def fake(*args, **kwargs):
        seen.update(args=args, offline=constants.HF_HUB_OFFLINE, **kwargs)
        raise Done
    monkeypatch.setattr(reports, 'tips_report', fake)
    monkeypatch.setattr(cli, '_check_weights', lambda a: None)
    weights = str(photos/'junk.pth')
    with pytest.raises(Done): cli.main(['report', str(photos), '--restart', '--lr', '.01', '--weights', weights])
    assert seen['args'][1:]==(photos,'resnet34',20,'all',3) and seen['bs'] is None and seen['pretrained_cfg_overlay']==dict(file=weights)
    assert seen['offline'] and not constants.HF_HUB_OFFLINE # No requests within timed trainings
    assert (seen['options'].lr,seen['options'].resume,seen['options'].data)==(.01,False,{})

def run(*args, cwd):
    "In a process of its own, and the seconds it took"
    began,env = time.monotonic(),{**os.environ, 'PYTHONPATH':os.pathsep.join(sys.path)}
    r = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    return r,time.monotonic()-began

def test_help_imports_nothing_heavy(tmp_path):
    code = '''import sys
from fastai_tricks.cli import main
for argv in (['--version'], ['--help'], ['report','--help'], ['report','.','--minutes','0'], ['report','no/such'], []):
    try: main(argv)
    except SystemExit as e: print('code', e.code)
print('heavy', [m for m in ('torch','fastai','timm','numpy','pandas','fastcore') if m in sys.modules])'''
    r,seconds = run('-c', code, cwd=tmp_path)
    lines = r.stdout.splitlines()
    assert lines[0]==f'fastai-tricks {__version__}' and [l for l in lines if l.startswith('code')]==[f'code {c}' for c in (0,0,0,2,2,2)]
    assert lines[-1]=='heavy []' and seconds<2, r.stderr

def test_as_a_module_and_without_warnings_of_others(tmp_path, photos):
    r,_ = run('-m', 'fastai_tricks.cli', 'report', str(photos), '--arch', 'zzz', cwd=tmp_path)
    assert (r.returncode,r.stdout)==(2,'')
    assert r.stderr=="fastai-tricks: error: argument --arch: must be a name of timm or torchvision, not 'zzz'\n"
