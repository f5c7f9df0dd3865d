"Small Learners to export"
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, parent_label
from fastai.learner import Learner
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock
from PIL import Image
from torch import nn
import numpy as np, pytest

SIZES = (90,70),(64,64),(41,120),(200,131)

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    d,rng = tmp_path_factory.mktemp('photos'),np.random.default_rng(0)
    for i in range(24):
        small = rng.integers(0, 256, (5,5,3), dtype=np.uint8)
        f = d/'abc'[i%3]/f'{i}.jpg'
        f.parent.mkdir(exist_ok=True)
        Image.fromarray(small).resize(SIZES[i%4], Image.BICUBIC).save(f)
    return sorted(d.rglob('*.jpg'))

def loaders(photos, item=None, batch=(), blocks=(ImageBlock,CategoryBlock), get_y=parent_label):
    block = DataBlock(blocks, get_y=get_y, splitter=IndexSplitter(range(0, 24, 3)), item_tfms=item or Resize(64), batch_tfms=list(batch))
    return block.dataloaders(photos, bs=4, num_workers=0)

class Net(nn.Sequential):
    def __init__(self, c, n_in=3): super().__init__(nn.Conv2d(n_in, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, c))

def learner(dls, model=None, path=None, **kwargs):
    model = model or Net(dls.c)
    for m in model.modules():
        if isinstance(m, nn.Linear): nn.init.normal_(m.weight, std=.3) # Answers that differ from image to image
    return Learner(dls, model, path=path, **kwargs)
