"The ten lines of the tutorial, in a Python that has neither PyTorch, fastai nor this package"
import importlib.util, json, subprocess, sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from packaging.requirements import Requirement
from torch import nn
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import Normalize, get_image_files, parent_label
from fastai.learner import Learner
from fastai.vision.augment import Resize
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageBlock
import fastai_tricks.deploy.to_onnx # noqa: F401

pytest.importorskip('onnxruntime')
TUTORIAL = Path(__file__).resolve().parents[2]/'nbs'/'tutorials'/'onnx.ipynb'

def ten_lines():
    "The cell that writes product.py"
    cells = [''.join(c['source']) for c in json.loads(TUTORIAL.read_text(encoding='utf-8'))['cells']]
    return next(c.split('\n', 1)[1] for c in cells if c.startswith('%%writefile product.py'))

def needed(*names):
    "Packages, and what those need"
    res,left = set(),list(names)
    while left:
        name = left.pop().lower()
        if name in res: continue
        try: dist = distribution(name)
        except PackageNotFoundError: continue
        res.add(name)
        left += [r.name for r in map(Requirement, dist.requires or []) if not r.marker or r.marker.evaluate({'extra':''})]
    return res

@pytest.fixture
def alone(tmp_path):
    "A folder with links to what the lines need"
    site = tmp_path/'site'
    site.mkdir()
    for name in needed('onnxruntime', 'numpy', 'pillow'):
        for top in {f.parts[0] for f in distribution(name).files or () if f.parts[0] not in ('..','__pycache__')}:
            if not (site/top).exists(): (site/top).symlink_to(distribution(name).locate_file(top))
    return site

def isolated(site, code, *args, cwd):
    "In a Python that finds the standard library and `site`"
    start = f'import sys; sys.path.append({str(site)!r}); sys.argv[1:] = {list(map(str, args))!r}\n'
    return subprocess.run([sys.executable, '-S', '-I', '-c', start + code], cwd=cwd, capture_output=True, text=True, timeout=100)

def test_there_is_nothing_else(alone, tmp_path):
    code = '''import importlib.util
print([m for m in ('torch','torchvision','fastai','fastcore','timm','fastai_tricks','pandas','onnx','scipy') if importlib.util.find_spec(m)])
try: import torch
except ImportError: print('no torch')'''
    r = isolated(alone, code, cwd=tmp_path)
    assert r.stdout=='[]\nno torch\n', r.stderr
    assert importlib.util.find_spec('torch') # Here it is

def test_ten_lines(alone, tmp_path):
    lines,rng = ten_lines(),np.random.default_rng(0)
    assert len([l for l in lines.splitlines() if l.strip()])<=10
    for i in range(12):
        f = tmp_path/'photos'/'abc'[i%3]/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4,4,3), dtype=np.uint8)).resize((60+i, 50), Image.BICUBIC).save(f)
    files = get_image_files(tmp_path/'photos').sorted()
    block = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, item_tfms=Resize(32), batch_tfms=Normalize.from_stats(*imagenet_stats))
    dls = block.dataloaders(files, bs=4, num_workers=0)
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)), path=tmp_path)
    nn.init.normal_(learn.model[-1].weight, std=3)
    with learn.no_bar(), learn.no_logging():
        model = learn.to_onnx('model.onnx')
        p = learn.get_preds(dl=dls.test_dl(files))[0].numpy()
    r = isolated(alone, lines, model, *files, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    got = [l.rsplit(' ', 2) for l in r.stdout.splitlines()]
    assert [g[0] for g in got]==list(map(str, files)) and [g[1] for g in got]==[dls.vocab[i] for i in p.argmax(1)] and len({g[1] for g in got})>1
    assert np.allclose([float(g[2]) for g in got], p.max(1), atol=.01)
