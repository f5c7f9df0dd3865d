"What an export cannot hold is named, and what it can hold is held: several statistics, masks, values of any size"
import zipfile
from pathlib import Path
import numpy as np, PIL.Image, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import IntToFloatTensor, Normalize, parent_label
from fastai.layers import SigmoidRange
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.vision.augment import RandomResizedCropGPU, Resize, aug_transforms
from fastai.vision.core import PILImage, PILMask
from fastai.vision.data import ImageBlock, MaskBlock
import fastai_tricks.all as ft
from fastai_tricks.deploy.file import open_onnx
from fastai_tricks.deploy.images import images_of, RawImages
from fastai_tricks.deploy.int8 import quantized
from fastai_tricks.deploy.latency import _Timed
from fastai_tricks.deploy.to_onnx import ToExport, expected_predictions, file_predictions, onnx_proto, plainly
from deployed import learner, loaders, Net

pytest.importorskip('onnxruntime')
ODD = dict(turned=(dict(item=[Resize(64), lambda o: o.rotate(90) if isinstance(o, PILImage) else o]), 'lambda'),
           nearest=(dict(item=Resize(96), batch=aug_transforms(size=48, mode='nearest')), "mode='bilinear', not .*mode='nearest'"),
           nearest_crop=(dict(item=Resize(96), batch=[RandomResizedCropGPU(48, mode='nearest')]), "RandomResizedCropGPU.mode='nearest'"),
           scaled=(dict(batch=[IntToFloatTensor(div=127.5)]), 'IntToFloatTensor'))

@pytest.mark.parametrize('name', ODD)
def test_transforms_that_are_not_in_the_graph_are_named(name, photos, tmp_path):
    "Not left to the comparison of predictions, which a network that sees little would pass"
    kwargs,said = ODD[name]
    with pytest.raises(ValueError, match=said): learner(loaders(photos, **kwargs), path=tmp_path).to_onnx('m.onnx')
    assert not list(tmp_path.iterdir())

def folds(photos, tmp_path):
    block = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, item_tfms=Resize(32), batch_tfms=[Normalize()])
    return ft.cross_validate(lambda dls: learner(dls), block, photos, n_splits=3, fit=lambda l: l.fit(1), num_workers=0, device='cpu', bs=4, out=tmp_path/'cv')

def test_folds_with_statistics_of_their_own(photos, tmp_path):
    "`Normalize()` takes those of a fold's first batch"
    cv = folds(photos, tmp_path)
    means = [cv.learner(k).dls.after_batch.fs[-1].mean.flatten() for k in range(3)]
    assert not torch.allclose(means[0], means[1], atol=.01)
    session,_ = open_onnx(cv.to_onnx(tmp_path/'m.onnx'))
    got = file_predictions(session, [PILImage.create(f) for f in photos])
    assert np.allclose(got, cv.predict(photos), atol=2e-3)
    cv.sound = []
    with pytest.raises(ValueError, match='all folds diverged'): cv.to_onnx(tmp_path/'n.onnx')

class Swapped(Callback):
    def before_batch(self): self.learn.xb = (self.xb[0].flip(1),)

def values(photos, path, top, **kwargs):
    dls = loaders(photos, blocks=(ImageBlock,RegressionBlock()), get_y=lambda f: top*len(f.stem)/3)
    return learner(dls, nn.Sequential(Net(1), SigmoidRange(0, top)), path, loss_func=nn.MSELoss(), **kwargs)

def test_wrong_values_are_refused_however_small(photos, tmp_path):
    assert values(photos, tmp_path, 1e-3).to_onnx('m.onnx', 'fp16').exists()
    with pytest.raises(ValueError, match='not those of `get_preds`'): values(photos, tmp_path, 1e-3, cbs=Swapped()).to_onnx('n.onnx')

def test_what_is_left_of_it(photos, tmp_path):
    "Modes as they were; of a compiled network the plain one is exported"
    learn = learner(loaders(photos), path=tmp_path)
    learn.model.train()
    learn.model[1].eval()
    with plainly(learn): learn.get_preds()
    assert [m.training for m in learn.model]==[True,False,True,True,True,True]
    plain = learn.model
    learn.model = torch.compile(plain, backend='eager')
    assert ToExport([learn], 2).networks[0].state_dict().keys()==plain.state_dict().keys()

def test_networks_and_losses_that_do_not_fit(photos, tmp_path):
    with pytest.raises(ValueError, match=r'takes images .1, 3, 64, 64. of torch.float32.*4 channels'): learner(loaders(photos), Net(3, 4), tmp_path).to_onnx('m.onnx')
    plain = learner(loaders(photos), path=tmp_path, loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match=r'`learn.loss_func` must be .* not .*answers .8, 3. for targets .8,'): plain.to_onnx('m.onnx', 'int8', calibrate=2)
    assert not list(tmp_path.iterdir())

def labels(photos, path, loss):
    dls = loaders(photos, blocks=(ImageBlock,MultiCategoryBlock), get_y=lambda f: [f.parent.name])
    return learner(dls, path=path, loss_func=loss)

def test_threshold_of_numpy(photos, tmp_path):
    _,about = open_onnx(labels(photos, tmp_path, BCEWithLogitsLossFlat(thresh=np.float32(.25))).to_onnx('m.onnx'))
    assert about['threshold']==.25

def test_labels_are_scored_by_probabilities(photos, tmp_path):
    "Also of a loss of PyTorch's, which has no activation"
    learn = labels(photos, tmp_path, nn.BCEWithLogitsLoss())
    with torch.no_grad(): learn.model[5].bias.fill_(.25)
    logits,targs = learn.get_preds()
    assert ((logits>0)!=(logits>.5)).any()
    way = next(_Timed(learn, 'dense', 8).of_torch())
    assert way.score==pytest.approx(float(((logits>0)==targs).float().mean()))

def test_masks_take_little_memory(photos, tmp_path):
    block = dict(blocks=(ImageBlock,MaskBlock()), get_y=lambda f: PILMask.create(np.asarray(PILImage.create(f).convert('L'))//86))
    learn = learner(loaders(photos, **block), nn.Conv2d(3, 3, 1), tmp_path, loss_func=CrossEntropyLossFlat(axis=1))
    images,real,seen = RawImages(learn.dls.valid, [*range(8),*range(8),3]),learn.get_preds,[]
    def get_preds(dl, **kwargs):
        seen.append(dl.n)
        return real(dl=dl, **kwargs)
    learn.get_preds = get_preds
    got = expected_predictions(learn, images, ToExport([learn], 1).plan)
    assert max(seen)==8 and np.array_equal(got, real(dl=images.loader, reorder=False)[0].argmax(1))
    targs = images.targets(learn.dls)
    assert targs.dtype==np.int16 and np.array_equal(targs, torch.cat([y for _,y in images.loader]))

def test_folders_that_cannot_be_written_to_are_named_at_once(photos, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setattr('fastai_tricks.deploy.to_onnx.ToExport', None)
    learn = learner(loaders(photos), path=tmp_path)
    for f in (lambda: learn.to_onnx('file/m.onnx'), lambda: learn.to_program('file/sub/m.pt2')):
        with pytest.raises(ValueError, match='`path.parent` must be a folder that can be written to'): f()

def test_images_too_large_for_pillow_are_left_out(photos, tmp_path, monkeypatch):
    learn = learner(loaders(photos), path=tmp_path)
    monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', 5000)
    with pytest.warns(match='was not used: Image size .26200 pixels. exceeds'): images = images_of(learn, 8)
    assert 0<len(images)<8

def test_quantising_prints_nothing(photos, tmp_path, capsys):
    learn = learner(loaders(photos), path=tmp_path)
    proto,_ = onnx_proto(ToExport([learn], 1).program(), 'probabilities')
    capsys.readouterr()
    quantized(proto, [PILImage.create(f) for f in photos[:2]], method='Percentile')
    assert capsys.readouterr().out==''

def test_no_pixel_is_left_of_a_thin_image(photos, tmp_path):
    "1/49*49 is less than 1: fastai makes black of it"
    learn = learner(loaders(photos, Resize(49)), path=tmp_path)
    black,thin = (torch.full((1,h,w,3), v, dtype=torch.uint8) for h,w,v in ((49,49,0), (1,100,200)))
    whole = ToExport([learn], 1).whole()
    assert torch.equal(whole(thin), whole(black))

def test_nothing_of_this_machine_is_in_a_program(photos, tmp_path):
    file = learner(loaders(photos), path=tmp_path).to_program('m.pt2')
    with zipfile.ZipFile(file) as z: data = b''.join(map(z.read, z.namelist()))
    assert b'whole.py' not in data and str(Path(__file__).parents[2]).encode() not in data and str(tmp_path).encode() not in data
