"What a Learner of any kind predicts, its ONNX file predicts too; what cannot be exported says so and leaves no file"
import json, re, sys
from pathlib import Path
import numpy as np, pytest, timm, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import IndexSplitter, Normalize, parent_label
from fastai.learner import Learner, load_learner
from fastai.losses import MSELossFlat
from fastai.metrics import accuracy
from fastai.vision.augment import CropPad, RandomResizedCrop, Resize, aug_transforms
from fastai.vision.core import PILImage, PILImageBW, PILMask, imagenet_stats
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.learner import unet_learner, vision_learner
from torchvision.models import resnet18
import fastai_tricks.all as ft
from fastai_tricks.deploy.file import open_onnx
from fastai_tricks.deploy.to_onnx import CannotExport, check_torch, file_predictions
sys.path.append(str(Path(__file__).parents[1]))
from deployed import learner, loaders, Net
from together import images, use

pytest.importorskip('onnxruntime')
def differs(learn, file):
    "Largest difference of a file's predictions from those of `get_preds`, as a part of how far those of the validation set differ from each other"
    session,about = open_onnx(file)
    ims = [PILImage.create(f) for f in learn.dls.valid_ds.items]
    got,expected = file_predictions(session, ims),learn.get_preds()[0].numpy()
    return abs(got-expected).max()/expected.std(0).max()

NETS = dict(resnet=lambda c: timm.create_model('test_resnet', num_classes=c), vit=lambda c: timm.create_model('test_vit', num_classes=c, img_size=64),
            convnext=lambda c: timm.create_model('test_convnext', num_classes=c), efficientnet=lambda c: timm.create_model('test_efficientnet', num_classes=c))

@pytest.mark.parametrize('name', NETS)
def test_networks(name, photos, tmp_path, capsys):
    learn = learner(loaders(photos), NETS[name](3), tmp_path)
    f = learn.to_onnx('m.onnx')
    assert differs(learn, f)<.05 and 'the same answer for 8 of 8' in capsys.readouterr().out
    assert [o.name for o in tmp_path.iterdir()]==['m.onnx']

# More of them without ONNX in test_whole.py
TFMS = dict(pad=(Resize((64,48), method='pad'),()), random=(RandomResizedCrop(48),()), cut=(CropPad(80),()),
            presize=(Resize(96),[*aug_transforms(size=48),Normalize.from_stats(*imagenet_stats)]))

@pytest.mark.parametrize('name', TFMS)
def test_transforms(name, photos, tmp_path):
    learn = learner(loaders(photos, *TFMS[name]), path=tmp_path)
    assert differs(learn, learn.to_onnx('m.onnx'))<.02

def kinds(photos):
    names = ['a','b','c']
    many = loaders(photos, blocks=(ImageBlock,MultiCategoryBlock), get_y=lambda f: [f.parent.name, names[len(f.stem)]])
    value = loaders(photos, blocks=(ImageBlock,RegressionBlock(2)), get_y=lambda f: torch.tensor([float(f.stem), 1.]))
    grey = loaders(photos, blocks=(ImageBlock(cls=PILImageBW),CategoryBlock))
    return dict(labels=lambda: learner(many), values=lambda: learner(value, Net(2), loss_func=MSELossFlat()), grey=lambda: learner(grey, Net(3, 1)),
                plain=lambda: learner(loaders(photos), loss_func=nn.CrossEntropyLoss()), vision=lambda: vision_learner(loaders(photos), resnet18, pretrained=False))

@pytest.mark.parametrize('kind,task,output', [('labels','labels','probabilities'), ('values','values','values'), ('grey','classes','probabilities'),
                                              ('plain','classes','probabilities'), ('vision','classes','probabilities')])
def test_answers(kind, task, output, photos, tmp_path):
    learn = kinds(photos)[kind]()
    learn.path = tmp_path
    session,about = open_onnx(learn.to_onnx('m.onnx'))
    assert about['task']==task and session.get_outputs()[0].name==output and about['size']==[64,64]
    assert about['classes']==([] if task=='values' else ['a','b','c']) and 'torch' in about['versions']
    p = file_predictions(session, [PILImage.create(f) for f in learn.dls.valid_ds.items])
    if task=='classes': assert np.allclose(p.sum(1), 1, atol=1e-5)
    if kind!='plain': assert np.allclose(p, learn.get_preds()[0], atol=2e-3*max(1, abs(p).max()))

def test_unet(photos, tmp_path):
    block = DataBlock((ImageBlock,MaskBlock(['a','b','c'])), get_y=lambda f: PILMask.create(np.asarray(PILImage.create(f).convert('L'))//86),
                      splitter=IndexSplitter(range(0, 24, 3)), item_tfms=Resize(64))
    dls = block.dataloaders(photos, bs=4, num_workers=0)
    learn = unet_learner(dls, resnet18, pretrained=False, path=tmp_path)
    session,about = open_onnx(learn.to_onnx('m.onnx'))
    got = file_predictions(session, [PILImage.create(f) for f in dls.valid_ds.items])
    expected = learn.get_preds()[0].argmax(1).numpy()
    assert got.dtype==np.uint8 and got.shape==(8,64,64) and (got==expected).mean()>.99 and len(np.unique(got))>1
    learn.to_onnx('q.onnx', precision='int8', calibrate=4, force=True)
    learn.fit(1) # It goes on

def test_batches_of_any_number_and_size(photos, tmp_path):
    session,_ = open_onnx(learner(loaders(photos), path=tmp_path).to_onnx('m.onnx'))
    x = np.random.default_rng(0).integers(0, 256, (5,33,47,3), dtype=np.uint8)
    many,one = session.run(None, {'image':x})[0],[session.run(None, {'image':o[None]})[0][0] for o in x]
    assert many.shape==(5,3) and np.allclose(many, one, atol=1e-5)

@pytest.fixture(scope='module')
def together(tmp_path_factory): return images(tmp_path_factory.mktemp('together'))

# Those that leave something in the model, the loaders or the callbacks
LEAVES = 'PILImageDraft albu_transforms ProgressiveResize fit_stages to_mixed CompiledTraining to_depthwise Distill EMA grow_head'.split()

@pytest.mark.parametrize('name', LEAVES)
def test_after_each_trick(name, together, tmp_path):
    learn = use((name,), together, tmp_path).learn
    for m in learn.model.modules(): m._forward_hooks.clear() # Which the test hung in
    learn.path = tmp_path
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    session,_ = open_onnx(learn.to_onnx('m.onnx'))
    assert session.get_inputs()[0].shape==['batch','height','width',3] and session.get_outputs()[0].shape[0]=='batch'
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

def test_loaded_learner(photos, tmp_path):
    learn = learner(loaders(photos), path=tmp_path)
    learn.export('l.pkl')
    loaded = load_learner(tmp_path/'l.pkl')
    assert differs(learn, loaded.to_onnx(tmp_path/'m.onnx'))<.01
    with pytest.raises(ValueError, match='without training and validation images'): loaded.to_onnx(tmp_path/'q.onnx', precision='int8')

def test_ensemble(photos, tmp_path):
    block = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, item_tfms=Resize(32))
    cv = ft.cross_validate(lambda dls: learner(dls), block, photos, n_splits=3, fit=lambda l: l.fit(1), num_workers=0, device='cpu', bs=4, out=tmp_path/'cv')
    session,_ = open_onnx(cv.to_onnx(tmp_path/'m.onnx'))
    got = file_predictions(session, [PILImage.create(f) for f in photos[:6]])
    assert np.allclose(got, cv.predict(photos[:6]), atol=2e-3) and not np.allclose(got, cv.learner(0).get_preds(dl=cv.learner(0).dls.test_dl(photos[:6]))[0], atol=1e-3)

def test_fp16(photos, tmp_path):
    learn = learner(loaders(photos), timm.create_model('test_resnet', num_classes=3), tmp_path)
    half,whole = learn.to_onnx('h.onnx', 'fp16'),learn.to_onnx('m.onnx')
    assert differs(learn, half)<.1 and half.stat().st_size<.75*whole.stat().st_size

def trained(photos, path):
    learn = learner(loaders(photos, batch=[Normalize.from_stats(*imagenet_stats)]), timm.create_model('test_resnet', num_classes=3), path, metrics=accuracy)
    return learn

def test_int8(photos, tmp_path, capsys):
    learn = trained(photos, tmp_path)
    f = learn.to_onnx('q.onnx', 'int8', calibrate=8, force=True)
    out = capsys.readouterr().out
    session,about = open_onnx(f)
    said = about['int8']
    assert f"accuracy {said['fp32']:.3f} in fp32, {said['int8']:.3f} in int8 on 8 validation images" in out and about['precision']=='int8'
    preds = file_predictions(session, [PILImage.create(o) for o in learn.dls.valid_ds.items])
    targs = np.array([int(y) for _,y in learn.dls.valid_ds])
    assert said['int8']==round((preds.argmax(1)==targs).mean(), 4) and said['fp32']==round(float(learn.validate()[1]), 4)
    assert f.stat().st_size<.8*learn.to_onnx('m.onnx').stat().st_size

def test_int8_that_loses_is_refused(photos, tmp_path, monkeypatch):
    learn = trained(photos, tmp_path)
    scores = iter([.9,.88])
    monkeypatch.setattr('fastai_tricks.deploy.int8.answer_score', lambda *a: next(scores))
    with pytest.raises(ValueError, match='int8 loses 2.0 points of accuracy'): learn.to_onnx('q.onnx', 'int8', calibrate=4)
    assert not list(tmp_path.iterdir())

def test_program(photos, tmp_path):
    learn = learner(loaders(photos), path=tmp_path)
    module = torch.export.load(learn.to_program('m.pt2')).module()
    got = torch.cat([module(torch.tensor(np.asarray(PILImage.create(f)))[None]) for f in learn.dls.valid_ds.items])
    assert torch.allclose(got, learn.get_preds()[0], atol=1e-3)
    about = {'classes':''}
    torch.export.load(tmp_path/'m.pt2', extra_files=about)
    assert json.loads(about['classes'])==['a','b','c']

class Odd(nn.Module):
    "Has an operator that ONNX does not know"
    def forward(self, x): return torch.special.bessel_j1(x)
class Branches(nn.Module):
    "Decides by what it sees"
    def forward(self, x): return x if x.sum()>0 else -x
class Two(nn.Module):
    def forward(self, x): return x,x

@pytest.mark.parametrize('layer,said', [(Odd, r'bessel_j1.*networks\.0\.3'), (Branches, r'networks\.0\.3 \(Branches\)')])
def test_what_cannot_be_exported_is_named(layer, said, photos, tmp_path):
    learn = learner(loaders(photos), nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3), layer()), tmp_path)
    with pytest.raises(CannotExport, match=said): learn.to_onnx('m.onnx')
    assert not list(tmp_path.iterdir())

class Doubled(Callback):
    def after_pred(self): self.learn.pred = self.pred*5

def test_other_predictions_are_refused(photos, tmp_path):
    learn = learner(loaders(photos), path=tmp_path, cbs=Doubled())
    with pytest.raises(ValueError, match="its predictions are not those of `get_preds` .8 images: largest difference"): learn.to_onnx('m.onnx')
    assert not list(tmp_path.iterdir())

def test_wrong_arguments(photos, tmp_path):
    learn = learner(loaders(photos), path=tmp_path)
    for args,said in ((('m.pkl',), "`path` must be a file name that ends in '.onnx'"), (('m.onnx','int4'), "`precision` must be 'fp32', 'fp16' or 'int8', not 'int4'"),
                      (('m.onnx','int8',0), '`calibrate` must be a positive integer'), (('m.onnx','fp32',1,0), '`n_check` must be')):
        with pytest.raises(ValueError, match=said): learn.to_onnx(*args)
    plain = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(8, 3, 8, 8), torch.zeros(8).long()), 4)
    with pytest.raises(ValueError, match="loaders of fastai's"): Learner(DataLoaders(plain, plain), Net(3), loss_func=nn.CrossEntropyLoss(), path=tmp_path).to_onnx('m.onnx')
    vectors = TfmdDL(Datasets(range(8), [[lambda i: torch.rand(4)], [lambda i: i%2]]), bs=4)
    with pytest.raises(ValueError, match='whose input is an image'): Learner(DataLoaders(vectors, vectors), nn.Linear(4, 2), loss_func=nn.CrossEntropyLoss(), path=tmp_path).to_onnx('m.onnx')
    two = learner(loaders(photos), nn.Sequential(Net(3), Two()), tmp_path)
    with pytest.raises(ValueError, match='a network that gives a tuple'): two.to_onnx('m.onnx')
    with pytest.raises(ValueError, match='lambda'): learner(loaders(photos, [Resize(64), lambda x: x]), path=tmp_path).to_onnx('m.onnx')
    assert not list(tmp_path.iterdir())

def test_nothing_of_this_machine_is_in_the_file(photos, tmp_path):
    data = learner(loaders(photos), path=tmp_path).to_onnx('m.onnx').read_bytes()
    assert b'.py' not in data and str(Path(__file__).parents[2]).encode() not in data and str(tmp_path).encode() not in data

@pytest.mark.parametrize('version,fine', [('2.6.0+cu124',False), ('2.9.1',False), ('2.10.0',True), ('2.14.1+cpu',True), ('3.0.0a0',True)])
def test_older_torch_is_named(version, fine, monkeypatch):
    monkeypatch.setattr(torch, '__version__', version)
    if fine: return check_torch()
    with pytest.raises(RuntimeError, match=f'needs torch 2.10 or later, not {re.escape(version)}'): check_torch()
