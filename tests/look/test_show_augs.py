"`show_augs`: what is drawn, and that nothing is left of it"
import numpy as np, pytest
from fastai.callback.mixup import MixUp
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import get_random_states
from fastai.vision.all import ImageBlock, MaskBlock, PILImage, PILMask, PointBlock, Resize, aug_transforms, nn, plt
from fastai_tricks.all import ProgressiveResize, albu_transforms
from fastai_tricks.core.test_utils import tiny_dls, tiny_learner
from fastai_tricks.look.show_augs import augmented

def pixels(i): return np.random.default_rng(i).integers(0, 255, (48,80,3), dtype=np.uint8)
def image(i): return PILImage.create(pixels(i))
def mask(i): return PILMask.create(pixels(i)[...,0]//128)
def points(i): return [[10.,20.],[70.,5.]]
def parity(i): return i%2

@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')

def figures(): return [plt.figure(n) for n in plt.get_fignums()]

def test_changes_nothing():
    learn = tiny_learner(item_tfms=albu_transforms(64), batch_tfms=aug_transforms(), cbs=[ProgressiveResize(sizes=[32], strength=(.5,1.)),MixUp(.4)])
    learn.model.append(nn.Dropout(.4))
    dl = learn.dls.train
    def state():
        r = get_random_states()
        fs = [id(f) for p in (dl.after_item,dl.after_batch) for f in p.fs]
        return r['random_state'],r['numpy_state'][1].tolist(),r['torch_state'].tolist(),dl.rng.getstate(),fs,learn.model[-1].p,dl.bs
    was = state()
    learn.show_augs(2)
    learn.dls.show_augs(3, 2)
    assert state()==was

def test_a_column_for_each_augmentation_at_each_size():
    learn = tiny_learner(item_tfms=albu_transforms(64), cbs=ProgressiveResize(sizes=[32,48], strength=(.5,1.)))
    learn.show_augs(2, 3)
    fig, = figures()
    assert [f.get_suptitle() for f in fig.subfigs]==['32 px, strength 0.5','48 px, strength 0.75','64 px, strength 1']
    shown = [[ax.images[0].get_array().shape[:2] for ax in f.axes] for f in fig.subfigs]
    assert shown==[[(s,s)]*6 for s in (32,48,64)]

@pytest.mark.parametrize('tfms', [dict(item_tfms=albu_transforms(64)), dict(item_tfms=Resize(64)), dict(item_tfms=Resize(80), batch_tfms=aug_transforms(size=64)), dict(item_tfms=[Resize(64),lambda o: o])],
                         ids=['albumentations','fastai','presized','unknown'])
def test_at_a_size(tfms):
    "In the item transforms, in the batch transforms, or at the end of those that are not all known"
    items = augmented(tiny_dls(**tfms), 2, 3, size=(32,32), full=(64,64))
    assert [[tuple(o[0].shape[-2:]) for o in col] for col in items]==[[(32,32)]*2]*3

@pytest.mark.parametrize('blocks,get_y', [((ImageBlock,MaskBlock),mask), ((ImageBlock,PointBlock),points), ((ImageBlock,CategoryBlock),parity)])
def test_targets(blocks, get_y):
    db = DataBlock(blocks, get_x=image, get_y=get_y, splitter=IndexSplitter(range(16,24)), item_tfms=albu_transforms(32))
    dls = db.dataloaders(list(range(24)), bs=8, num_workers=0, device='cpu')
    dls.show_augs(2, 2)
    axs = figures()[0].axes
    if get_y is parity: assert [ax.get_title() for ax in axs]==['0','','1',''] # The class once in a row
    else: assert all(len(ax.images)==2 if get_y is mask else ax.collections for ax in axs)
    Learner(dls, nn.Identity(), loss_func=CrossEntropyLossFlat(), cbs=ProgressiveResize(mult=8)).show_augs(2)
    assert len(figures())==2
    for bad in (dict(n=0), dict(k=.5)):
        with pytest.raises(ValueError, match='positive integer'): dls.show_augs(**bad)
