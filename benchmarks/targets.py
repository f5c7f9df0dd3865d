"""Several labels, a number, a mask: `fit_fast(5)` against `fine_tune(4)` where the target is not one class

    python benchmarks/targets.py --data FOLDER --resnet18 resnet18.safetensors

`FOLDER` holds the folders `pbc3k` and `caltech96-160`, each with a folder per class. `--resnet18` are weights of timm's resnet18. Images are decoded
before the clock starts and are of 64 px, those with masks of 32. Seconds are CPU seconds of one thread, and all that the call takes: features, choice of the
precision, validation. `fit_fast` chooses its weights by the validation images; both are scored on test images, which neither sees. The runs are
interleaved; results are written after each, and a killed benchmark goes on where it stopped.
"""
import argparse, json, random, statistics as st, time
from collections import namedtuple
from pathlib import Path

import torch, torchvision
from fastai.data.all import DataBlock, IndexSplitter, MultiCategoryBlock, RegressionBlock, get_image_files
from fastai.metrics import Dice, F1ScoreMulti, mae
from fastai.torch_core import set_seed
from fastai.vision.all import ImageBlock, MaskBlock, PILImage, PILMask, aug_transforms, model_meta, unet_learner, vision_learner
from fastai_tricks.all import lite0_weights, sample_images
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from common import environment, photos, write_results
from sets import squeezenet

FILE = Path(__file__).with_suffix('.json')
LINES = {'fine_tune(4)': 'learn.fine_tune(4)', 'fit_fast(5)': 'learn.fit_fast(5)'}
ATTRIBUTES = dict(granulocyte='basophil eosinophil neutrophil ig', mononuclear='lymphocyte monocyte', white='basophil eosinophil neutrophil ig lymphocyte monocyte',
                  nucleus='basophil eosinophil neutrophil ig lymphocyte monocyte erythroblast', immature='ig erythroblast')


# Images and targets, drawn with the seed: training, validation and test, in this order -----

def drawn(folder, n, seed, classes=()):
    "Random photos, of all classes or of these"
    files, _ = photos(folder, n, 0, seed)
    return random.Random(seed).sample([f for f in files if f.parent.name in classes or not classes], n)


def cells(a, n, seed):
    "A blood cell: its class, and which of five attributes it has"
    def labels(f): return [f.parent.name, *(k for k, v in ATTRIBUTES.items() if f.parent.name in v.split())]
    return [(square(Image.open(f)), labels(f)) for f in drawn(a.data/'pbc3k', n, seed)]


def square(im, size=64):
    side = min(im.size)
    x, y = ((o - side)//2 for o in im.size)
    return PILImage.create(im.convert('RGB').crop((x, y, x+side, y+side)).resize((size, size), Image.Resampling.BILINEAR))


def turned(a, n, seed):
    "A face or a motorbike, without the corners of the photo, and how far it was turned: -1 to 1 for 45 degrees either way; a constant 0 is 22.5 degrees off"
    rng, res = random.Random(seed), []
    for f in drawn(a.data/'caltech96-160', n, seed, ('Faces', 'Motorbikes')):
        angle, im = rng.uniform(-45, 45), Image.open(f).convert('RGB')
        side = min(im.size)
        im, cut = im.resize((side, side)).rotate(angle, Image.Resampling.BILINEAR), round(side*(1 - .5**.5)/2)
        res.append((square(im.crop((cut, cut, side-cut, side-cut))), angle/45))
    return res


def pasted(a, n, seed):
    "An embedded picture on a photo, and where it is"
    rng, pictures, res, side = random.Random(seed), sorted(get_image_files(sample_images())), [], 32
    for f, g in zip(drawn(a.data/'caltech96-160', n, seed), rng.sample(pictures, n)):
        photo, im = square(Image.open(f), side), Image.open(g).convert('RGB')
        im.thumbnail([rng.randint(10, 22)]*2)
        w, h = im.size
        outside = Image.new('RGB', (w+2, h+2), 'white') # A border joins all white that reaches an edge
        outside.paste(im, (1, 1))
        ImageDraw.floodfill(outside, (0, 0), (255, 0, 255), thresh=40)
        at = rng.randint(0, side-w), rng.randint(0, side-h)
        shape = Image.new('L', (w, h))
        shape.putdata([255*(o!=(255, 0, 255)) for o in outside.crop((1, 1, w+1, h+1)).getdata()])
        photo.paste(im, at, shape)
        mask = Image.new('L', (side, side))
        mask.paste(1, at, shape)
        res.append((photo, PILMask(mask)))
    return res


# Learners ---------------------------------------------------------------------

def lite0(dls, a, **kwargs): return vision_learner(dls, 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), **kwargs)
def squeeze(dls, a, **kwargs): return vision_learner(dls, squeezenet, **kwargs)


def unet(dls, a, **kwargs):
    "U-Net on a pretrained resnet18 without its last stage, for images this small"
    def resnet18(weights=None):
        model = torchvision.models.resnet18()
        ws = {k: v.float() if v.is_floating_point() else v for k, v in load_file(a.resnet18).items() if not k.startswith('fc.')}
        missing, _ = model.load_state_dict(ws, strict=False)
        assert missing==['fc.weight', 'fc.bias'], missing
        return model
    model_meta[resnet18] = model_meta[torchvision.models.resnet18]
    return unet_learner(dls, resnet18, cut=7, **kwargs)


def mae_degrees(inp, targ): return 45*mae(inp, targ)


def flips(): return aug_transforms()
def no_turns(): return aug_transforms(do_flip=False, max_rotate=0., max_warp=0.) # Flips and turns would change the target


# `n`: images of training, validation and test
Target = namedtuple('Target', 'items block tfms learner metric is_higher bs n')
TARGETS = {
    'several labels': Target(cells, MultiCategoryBlock, flips, squeeze, lambda: dict(metrics=F1ScoreMulti()), True, 32, (320, 80, 320)),
    'a number': Target(turned, RegressionBlock, no_turns, lite0, lambda: dict(metrics=mae_degrees, y_range=(-1.1, 1.1)), False, 8, (400, 60, 200)),
    'a mask': Target(pasted, lambda: MaskBlock(['photo', 'object']), flips, unet, lambda: dict(metrics=Dice()), True, 16, (160, 40, 120))}


def train(o, a):
    "One run: CPU seconds, scores on validation and test images"
    t = TARGETS[o['target']]
    items = t.items(a, sum(t.n), o['seed'])
    set_seed(o['seed'], reproducible=False)
    block = DataBlock((ImageBlock, t.block()), get_x=lambda i: items[i][0], get_y=lambda i: items[i][1], splitter=IndexSplitter(range(t.n[0], sum(t.n[:2]))), batch_tfms=t.tfms())
    dls = block.dataloaders(range(sum(t.n[:2])), bs=t.bs, num_workers=0)
    learn = t.learner(dls, a, **t.metric())
    test = dls.test_dl(range(sum(t.n[:2]), sum(t.n)), with_labels=True)
    with learn.no_bar(), learn.no_logging():
        began = time.process_time()
        exec(LINES[o['name']], dict(learn=learn))
        seconds = time.process_time() - began
        return dict(o, seconds=seconds, valid=float(learn.validate()[1]), test=float(learn.validate(dl=test)[1]))


def summary(runs):
    "Means over the seeds; differences within a seed, above 0 where `fit_fast` is better"
    res = {}
    for name, t in TARGETS.items():
        by = {(r['name'], r['seed']): r for r in runs if r['target']==name}
        seeds = sorted({s for _, s in by if all((k, s) in by for k in LINES)})
        if not seeds: continue
        row = {k: {m: st.mean(by[k, s][m] for s in seeds) for m in ('seconds', 'test')} for k in LINES}
        gains = [(by['fit_fast(5)', s]['test'] - by['fine_tune(4)', s]['test'])*(1 if t.is_higher else -1) for s in seeds]
        res[name] = dict(row, gain=st.mean(gains), gains=gains, n=len(seeds))
    return res


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, required=True)
    p.add_argument('--resnet18', required=True)
    p.add_argument('--targets', nargs='*', default=list(TARGETS), choices=list(TARGETS))
    p.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2])
    p.add_argument('--out', type=Path, default=FILE)
    a = p.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(a.out.read_text())['runs'] if a.out.exists() else []
    for o in (dict(target=t, seed=s, name=n) for s in a.seeds for t in a.targets for n in LINES):
        if any({k: r[k] for k in o}==o for r in runs): continue
        runs.append(train(o, a))
        r = runs[-1]
        print(f"{o['target']:15} {o['name']:13} {o['seed']} {r['seconds']:6.1f} s  {r['test']:.4f}", flush=True)
        write_results(a.out, dict(environment=environment(), lines=LINES, images={k: t.n for k, t in TARGETS.items()}, summary=summary(runs), runs=runs))


if __name__=='__main__': main()
