"Images to calibrate with: of loaders, lists and Learners, and what is refused"
import numpy as np
import pytest, torch
from torch import nn
from fastai.data.core import DataLoaders
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, parent_label
from fastai.learner import Learner
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai_tricks.all import skip_corrupt
from fastai_tricks.core.test_utils import tiny_dls, tiny_learner
from fastai_tricks.models.inputs import images_of, training_images
from separated import convert

NET = nn.Sequential(nn.Conv2d(3,8,3), nn.Conv2d(8,8,3))
X = torch.zeros(2,3,8,8)

@pytest.mark.parametrize('bad', [X[:0], X[:,:,:0], X.byte(), X[0], 5, 'photos', dict(x=X), (X,torch.zeros(2))],
    ids=['none','no pixels','bytes','one image','number','path','dict','images and targets'])
def test_what_is_no_images_is_refused(bad):
    with pytest.raises(ValueError, match='`batches` must be'): convert(NET, bad)

@pytest.mark.parametrize('bad', [[], [X[:0]], [X.byte()], [X,X[...,:5]], ['a'], [dict(x=X)], [(X.byte(),torch.zeros(2))]],
    ids=['nothing','no image','bytes','two sizes','text','dict','bytes and targets'])
def test_what_a_loader_gives_is_refused(bad):
    with pytest.raises(ValueError, match='`batches` must give'): convert(NET, iter(bad) if not bad else bad)

def test_a_batch_and_loaders_are_refused():
    "`dls.one_batch()` has targets, of a mask too; a DataLoaders is two loaders"
    dls = tiny_dls()
    for bad in (dls.one_batch(), (X,torch.zeros(2,8,8, dtype=torch.long)), dls):
        with pytest.raises(ValueError, match='`batches` must be'): convert(NET, bad)
    assert images_of(dls.train, 12)[0].shape==(12,3,64,64)

def test_a_loader_gives_the_same_once_more():
    "Its random state, and all others, are as they were"
    dls = tiny_dls()
    state = torch.random.get_rng_state()
    a,b = (images_of(dls.train, 8)[0] for _ in range(2))
    assert torch.equal(a, b) and torch.equal(state, torch.random.get_rng_state())

@pytest.mark.parametrize('n_inp', [1,2])
def test_all_inputs_of_a_network_are_taken(n_inp):
    class Loader(list): n_inp = 2
    batches = [(X+i,torch.full((2,3), i),torch.zeros(2)) for i in range(3)]
    xb = images_of(Loader(batches) if n_inp==2 else batches, 5)
    assert [tuple(t.shape) for t in xb]==[(5,3,8,8),(5,3)][:n_inp] and xb[0][4,0,0,0]==2

@pytest.mark.parametrize('size', [0, -1, 2.5, '64', (0,5), (64,), (64,64,3)])
def test_bad_size(size):
    with pytest.raises(ValueError, match='`size` must be'): convert(NET, size=size)

def test_training_images_without_augmentation(trained):
    dls = trained.dls
    state,np_state = torch.random.get_rng_state(),np.random.get_state()[1].copy()
    a,b = (training_images(trained, 8)[0] for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state()) and (np_state==np.random.get_state()[1]).all()
    assert torch.equal(a, b) and len(a)==8
    plain = dls.test_dl(list(dls.train_ds.items), bs=200).one_batch()[0]
    where = [(plain==x).flatten(1).all(1).nonzero().flatten().tolist() for x in a]
    assert all(where) and len({tuple(o) for o in where})==8

def test_workers_give_the_same_images():
    one,two = (tiny_learner(tiny_dls(num_workers=w)) for w in (0,2))
    assert torch.equal(training_images(one, 8)[0], training_images(two, 8)[0])

def test_corrupt_images_are_skipped(tmp_path):
    "As they are in training: the next of their class takes their place"
    files = [tmp_path/'ab'[i%2]/f'{i}.png' for i in range(12)]
    for i,f in enumerate(files):
        f.parent.mkdir(exist_ok=True)
        PILImage.create(np.full((16,16,3), 10*i, dtype=np.uint8)).save(f)
    files[5].write_bytes(b'no image')
    block = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, splitter=IndexSplitter([10,11]), item_tfms=Resize(16))
    dls = skip_corrupt(block, .2).dataloaders(files, bs=4, num_workers=0, device='cpu')
    x = training_images(Learner(dls, NET, loss_func=nn.MSELoss()), 10)[0]
    assert sorted((x[:,0,0,0]*25.5).round().int().tolist())==[0,1,2,3,4,6,7,7,8,9]

def test_bytes_of_a_learner_are_refused():
    ds = torch.utils.data.TensorDataset(torch.zeros(8,3,16,16, dtype=torch.uint8), torch.zeros(8, dtype=torch.long))
    learn = Learner(DataLoaders(*(torch.utils.data.DataLoader(ds, batch_size=4) for _ in range(2))), NET, loss_func=nn.MSELoss())
    with pytest.raises(ValueError, match='torch.uint8'): learn.to_depthwise()
