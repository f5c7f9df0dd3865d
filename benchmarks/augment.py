"""What augmentation with albumentations costs, and what it is worth (tip 9)

    python benchmarks/augment.py speed --data PATH       images/s on one core, from JPEG to a batch: the same operations by fastai and by albumentations, interleaved
    python benchmarks/augment.py accuracy --data PATH    fine-tuning without augmentation, with aug_transforms, with albu_transforms, with strength rising with the size

PATH is a folder per class. Results are written after each run; a killed run goes on where it stopped.
"""
import argparse, io, json, time
from pathlib import Path

import albumentations as A
import numpy as np
import torch
from PIL import Image
from fastai.callback.core import Callback, CancelValidException
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, IntToFloatTensor, Pipeline, ToTensor, parent_label
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import DihedralItem, FlipItem, ImageBlock, PILImage, RandomResizedCrop, Resize, ResizeMethod, TensorImage, aug_transforms, vision_learner
from fastai_tricks.all import AlbumentationsTfm, PILImageDraft, ProgressiveResize, albu_transforms, lite0_weights
from common import environment, photos, write_results

FILE = Path(__file__).with_suffix('.json')

def load(part, settings):
    "What earlier runs of the same settings left"
    old = json.loads(FILE.read_text()).get(part, {}) if FILE.exists() else {}
    return old.get('runs', []) if old.get('settings')==json.loads(json.dumps(settings)) else []

def save(part, **res):
    all_ = json.loads(FILE.read_text()) if FILE.exists() else {}
    write_results(FILE, {**all_, part: dict(environment=environment('albumentations'), **res)})

# Speed ------------------------------------------------------------------------

def area(**kwargs): return dict(area_for_downscale='image', **kwargs) # Antialiased, as Pillow's resize is

# The same operations: of fastai's item transforms (and of its batch transforms on the CPU), and of albumentations. fastai sorts its own: flips come before crops
OPERATIONS = {
    'random crop, flip': (lambda n: [RandomResizedCrop(n, min_scale=.35), FlipItem()],
                          lambda n: [A.RandomResizedCrop(size=(n,n), scale=(.35,1), **area()), A.HorizontalFlip(p=.5)]),
    'random crop, dihedral': (lambda n: [RandomResizedCrop(n, min_scale=.35), DihedralItem()],
                              lambda n: [A.RandomResizedCrop(size=(n,n), scale=(.35,1), **area()), A.D4(p=1)]),
    'squish, flip': (lambda n: [Resize(n, ResizeMethod.Squish), FlipItem()],
                     lambda n: [A.Resize(n, n, **area()), A.HorizontalFlip(p=.5)]),
    'crop, flip, rotate, warp, lighting': (lambda n: [RandomResizedCrop(n, min_scale=.35)], lambda n: albu_transforms(n))}
BATCH = {'crop, flip, rotate, warp, lighting': lambda: aug_transforms(max_zoom=1.)}

def rate(cls, tfms, batch, files, bs=32):
    "Images/s from file to a batch of floats"
    pipe, batch = Pipeline([cls.create, *tfms, ToTensor()], split_idx=0), Pipeline([IntToFloatTensor(), *batch], split_idx=0)
    def run(files):
        for i in range(0, len(files), bs): batch(TensorImage(torch.stack([pipe(f) for f in files[i:i+bs]])))
    run(files[:bs])
    began = time.perf_counter()
    run(files)
    return len(files)/(time.perf_counter()-began)

def enlarged(file, side):
    "The photo as a JPEG with a longer side of `side` px, in memory; so that disk and cache play no part"
    im, out = Image.open(file).convert('RGB'), io.BytesIO()
    f = side/max(im.size)
    im.resize((round(im.width*f), round(im.height*f)), Image.LANCZOS).save(out, 'JPEG', quality=90)
    return out.getvalue()

def speed(a):
    files = photos(a.data, 4, 0)[0][:a.n]
    settings = dict(images=len(files), data=Path(a.data).name, rounds=a.rounds)
    runs = load('speed', settings)
    for side, size in ((160,96), (512,128), (512,224), (2000,128)):
        data = [Path(f).read_bytes() for f in files] if side==160 else [enlarged(f, side) for f in files[:len(files)//(1 if side<2000 else 4)]]
        for name, (fastai, albu) in OPERATIONS.items():
            if any((r['side'], r['size'], r['operations'])==(side, size, name) for r in runs): continue
            def tfm(): return o if isinstance(o := albu(size), AlbumentationsTfm) else AlbumentationsTfm(o)
            batch = BATCH.get(name, list)()
            variants = {'fastai': (PILImage, fastai(size), batch), 'albumentations': (PILImage, [tfm()], []),
                        'fastai, draft': (PILImageDraft, fastai(size), batch), 'albumentations, draft': (PILImageDraft, [tfm()], [])}
            got = {k: [] for k in variants}
            for i in range(a.rounds):
                for k in list(variants)[i%4:] + list(variants)[:i%4]: got[k].append(rate(*variants[k], data))
            def ratio(k, base):
                r = [x/y for x,y in zip(got[k], got[base])]
                return dict(ratio=float(np.median(r)), ratio_min=min(r), ratio_max=max(r), n=len(r))
            runs.append(dict(side=side, size=size, operations=name, images_per_second={k: float(np.median(v)) for k,v in got.items()},
                             plain=ratio('albumentations', 'fastai'), draft=ratio('albumentations, draft', 'fastai, draft')))
            print(side, size, name, {k: round(v) for k,v in runs[-1]['images_per_second'].items()}, {k: round(runs[-1][k]['ratio'], 2) for k in ('plain','draft')}, flush=True)
            save('speed', settings=settings, runs=runs)

# Accuracy ---------------------------------------------------------------------

def variants(size):
    "Item transforms, batch transforms, callbacks"
    return {'none': (Resize(size), None, None),
            'aug_transforms': (Resize(size), aug_transforms(), None),
            'albu_transforms': (albu_transforms(size), None, None),
            'albu_transforms(min_scale=.7)': (albu_transforms(size, min_scale=.7), None, None),
            'albu_transforms, sizes cut': (albu_transforms(size), None, lambda: ProgressiveResize(64, crop=True)),
            'albu_transforms, sizes cut, strength': (albu_transforms(size), None, lambda: ProgressiveResize(64, crop=True, strength=(.5,1.))),
            'albu_transforms, sizes': (albu_transforms(size), None, lambda: ProgressiveResize(64, crop=False)),
            'albu_transforms, sizes, strength': (albu_transforms(size), None, lambda: ProgressiveResize(64, crop=False, strength=(.5,1.)))}

class ValidateLast(Callback):
    "Validate after the last epoch only"
    order = -100 # Before anything is computed
    def before_validate(self):
        if self.epoch<self.n_epoch-1: raise CancelValidException()

def train(name, seed, files, valid, a):
    item, batch, cbs = variants(a.size)[name]
    block = DataBlock((ImageBlock(PILImageDraft), CategoryBlock), get_y=parent_label, splitter=IndexSplitter(valid), item_tfms=item, batch_tfms=batch)
    set_seed(seed)
    learn = vision_learner(block.dataloaders(files, bs=a.bs, num_workers=0), 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy)
    set_seed(seed)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(a.epochs, cbs=[ValidateLast()] + ([cbs()] if cbs else []))
    return dict(variant=name, seed=seed, accuracy=float(learn.recorder.values[-1][2]), valid_loss=float(learn.recorder.values[-1][1]), train_loss=float(learn.recorder.values[-1][0]))

def summary(runs, base='aug_transforms'):
    res = []
    of = {r['seed']: r for r in runs if r['variant']==base}
    for v in dict.fromkeys(r['variant'] for r in runs):
        own = [r for r in runs if r['variant']==v]
        both = [r for r in own if r['seed'] in of]
        row = dict(variant=v, n=len(own))
        diffs = {'accuracy': [r['accuracy'] for r in own], 'valid_loss': [r['valid_loss'] for r in own], 'train_loss': [r['train_loss'] for r in own],
                 'points': [100*(r['accuracy']-of[r['seed']]['accuracy']) for r in both], 'loss_difference': [r['valid_loss']-of[r['seed']]['valid_loss'] for r in both]}
        for k, o in diffs.items(): row |= {k: float(np.mean(o)) if o else None, f'{k}_sd': float(np.std(o, ddof=1)) if len(o)>1 else None}
        res.append(row)
    return res

def compare(a):
    files, valid = photos(a.data, a.per_class, a.valid_per_class, classes=a.classes)
    settings = dict(model='tf_efficientnet_lite0, ImageNet weights', data=Path(a.data).name, classes=len({f.parent for f in files}), size=a.size, bs=a.bs, fine_tune=a.epochs, train=len(files)-len(valid), valid=len(valid))
    runs = load('accuracy', settings)
    names = a.variants or list(variants(a.size))
    for seed in range(a.seeds):
        for name in names[seed%len(names):] + names[:seed%len(names)]:
            if any((r['variant'], r['seed'])==(name, seed) for r in runs): continue
            runs.append(train(name, seed, files, valid, a))
            print({k: round(v, 3) if isinstance(v, float) else v for k,v in runs[-1].items()}, flush=True)
            save('accuracy', settings=settings, runs=runs, results=summary(runs))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', choices=['speed','accuracy'])
    p.add_argument('--data', required=True, help='a folder per class')
    p.add_argument('--n', type=int, default=200, help='images for the speed')
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--variants', nargs='*')
    p.add_argument('--classes', type=int, default=96)
    p.add_argument('--per-class', type=int, default=8)
    p.add_argument('--valid-per-class', type=int, default=10)
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--epochs', type=int, default=4)
    p.add_argument('--size', type=int, default=96)
    p.add_argument('--bs', type=int, default=32)
    a = p.parse_args()
    (speed if a.part=='speed' else compare)(a)

if __name__=='__main__':
    main()
