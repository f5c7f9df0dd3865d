"`to_tpu` takes the package that is installed; on a device of torch_tpu's kind a Learner trains as on the CPU"
import os, re, shutil, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from packaging.version import Version
import fastai_tricks.all
from fastai_tricks.core.test_utils import tiny_learner
import fastai_tricks.devices.tpu as tpu
from standin_tpu import compile_device
from test_xla import close, fit, left, make, standin, xla

HERE = Path(__file__).parent

@pytest.fixture
def installed(monkeypatch):
    "Say which packages there are"
    def f(*names): monkeypatch.setattr(tpu, 'find_spec', lambda name: True if name in names else None)
    return f

def test_neither_package(installed):
    installed()
    learn = tiny_learner()
    was = left(learn)
    for f in (learn.to_tpu, learn.tpu_ctx().__enter__):
        with pytest.raises(ImportError, match=r"torch_xla \(pip install 'fastai_tricks\[tpu\]'\) or torch_tpu \(pip install torch_tpu\)"): f()
    assert left(learn)==was and not tpu.has_torch_tpu()

@pytest.mark.parametrize('names,package', [(['torch_xla'],'torch_xla'), (['torch_tpu'],'torch_tpu'), (['torch_tpu','torch_xla'],'torch_xla')])
def test_the_package_that_is_installed(installed, names, package):
    installed(*names)
    assert tpu.tpu_package()==package

def test_with_torch_xla_it_is_to_xla(installed, standin, capsys):
    installed('torch_xla')
    learn = tiny_learner(bs=12)
    was = left(learn)
    with learn.tpu_ctx(bf16=False, last='pad', every=7):
        assert 'to_xla: 8 cores, batches of 16 (2 a core; 12 rounded up), fp32' in capsys.readouterr().out
        assert (learn.xla.cores, learn.xla.last, learn.xla.every)==(8,'pad',7)
    assert left(learn)==was

@xla
def test_on_all_cores_by_torch_xla():
    learn = make()
    expected = fit(make(), 1)
    with learn.tpu_ctx(bf16=False):
        assert tpu.tpu_package()=='torch_xla' and learn.xla.cores==8
        assert close(fit(learn, 1)[:2], expected[:2]) and {p.device.type for p in learn.model.parameters()}=={'xla'}
    assert {p.device.type for p in learn.model.parameters()}=={'cpu'}

@pytest.mark.parametrize('there', [None, 'cuda'])
def test_torch_tpu_without_a_tpu(installed, there, monkeypatch):
    installed('torch_tpu')
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: there and torch.device(there))
    learn = tiny_learner()
    was = left(learn)
    with pytest.raises(RuntimeError, match='found no TPU on this machine'): learn.to_tpu()
    assert left(learn)==was

@pytest.mark.parametrize('kw', [dict(last='keep'), dict(every=0), dict(bf16=None)])
def test_wrong_arguments(installed, kw):
    installed('torch_tpu')
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be'): tiny_learner().to_tpu(**kw)

@pytest.mark.skipif(not shutil.which('g++'), reason='compiles a device')
@pytest.mark.skipif(Version(torch.__version__)<Version('2.11'), reason='torch_tpu asks for torch 2.11')
@pytest.mark.skipif(find_spec('torch_xla') is not None, reason='torch_xla comes first')
def test_on_a_device_of_its_kind(tmp_path):
    env = {**os.environ, 'STANDIN_TPU':str(compile_device(tmp_path)), 'OMP_NUM_THREADS':'1'}
    r = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(HERE/'tpu_run.py')],
                       capture_output=True, text=True, env=env, timeout=500)
    assert r.returncode==0, r.stdout[-4000:] + r.stderr[-2000:]
    assert int(re.search(r'(\d+) passed', r.stdout)[1])>=25
