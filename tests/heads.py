"Small images of four colours, and small networks with a head: what the tests of `fit_head` and `fit_fast` share"
import numpy as np
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import params, set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from torch import nn

def image(i): return PILImage.create((np.random.default_rng(i).integers(0, 128, (40,40,3)) + 40*(i%4)*np.array([1,0,-1]) + 60).clip(0, 255).astype(np.uint8))
def colour(i): return 'abcd'[i%4]

def loaders(n=32, size=32, bs=8, block=CategoryBlock, get_y=colour, batch_tfms=None, **kwargs):
    "Three of four items train"
    db = DataBlock((ImageBlock,block), get_x=image, get_y=get_y, splitter=IndexSplitter([i for i in range(n) if i//4%4==3]), item_tfms=Resize(size), batch_tfms=batch_tfms)
    return db.dataloaders(list(range(n)), bs=bs, **{'num_workers':0, 'device':'cpu', **kwargs})

def as_pretrained(learn):
    "Norm layers as far from their start as those of pretrained networks"
    body = learn.model[0] if isinstance(learn.model, nn.Sequential) else learn.model
    for m in body.modules():
        if 'norm' in type(m).__name__.lower() and hasattr(m, 'weight'): m.weight.data.add_(.5)
    return learn

def frozen(dls=None, arch='test_resnet', look=True, **kwargs):
    "As `vision_learner` makes one of pretrained weights"
    set_seed(0)
    learn = vision_learner(dls or loaders(), arch, pretrained=False, **{'metrics':accuracy, **kwargs})
    learn.freeze()
    learn.pretrained = True # As it notes it
    return as_pretrained(learn) if look else learn

class Plain(nn.Module):
    "A body, a linear layer, and what comes behind it"
    def __init__(self, c=4, behind=None):
        super().__init__()
        self.body,self.fc = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),nn.Linear(8, c)
        self.behind = behind or nn.Identity()
    def forward(self, x): return self.behind(self.fc(self.body(x)))

def plain(dls=None, behind=None, **kwargs):
    "A frozen `Plain`"
    learn = Learner(dls or loaders(), Plain(behind=behind), splitter=lambda m: [params(m.body),params(m.fc)], **kwargs)
    learn.freeze()
    return learn

def quiet(learn, f, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return f(*args, **kwargs)

def state(model): return {k:v.clone() for k,v in model.state_dict().items()}
