"A small network that has learned something, for the tests of conversion"
import pytest
from fastai.data.all import DataBlock, RandomSplitter, get_image_files, parent_label
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import CategoryBlock, Flip, ImageBlock, Resize, vision_learner
from fastai_tricks.data.sample import sample_images

@pytest.fixture(scope='session')
def trained():
    "A Learner with a narrow resnet that tells six classes of the embedded pictures apart; a test leaves it as it is"
    set_seed(0)
    folders = sorted(p for p in sample_images().iterdir() if p.is_dir())[:6]
    block = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, splitter=RandomSplitter(seed=1), item_tfms=Resize(48), batch_tfms=Flip())
    dls = block.dataloaders(sorted(f for p in folders for f in get_image_files(p)), bs=16, num_workers=0, device='cpu')
    learn = vision_learner(dls, 'resnet10t', pretrained=False, normalize=False, metrics=accuracy, channels=(24,32,48,48))
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, 5e-3)
    return learn
