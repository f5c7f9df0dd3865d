"""Does attention tell a network that learned the background from one that learned the object (tip 9)? And what do maps cost?

bias     the embedded clip-art on backgrounds whose texture tells the class, and on random ones; same network, same epochs
figure   the same images under both networks of a seed, with their maps -> nbs/images/cam_bias.png
speed    maps a second, and `WatchCAM`'s part of an epoch

    python benchmarks/cam.py bias
    python benchmarks/cam.py figure
    python benchmarks/cam.py speed

Results are written after each run and go on where a killed run stopped.
"""
import argparse, json, random, tempfile, time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from fastai.data.all import CategoryBlock, DataBlock, FuncSplitter
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import ImageBlock, PILImage, RandomSplitter, Resize, aug_transforms, get_image_files, parent_label, plt, vision_learner
from PIL import Image
from fastai_tricks.all import GradCAM, WatchCAM, lite0_weights, sample_images
from fastai_tricks.core.learner import evaluating, items_batch
from fastai_tricks.core.timing import interleaved
from fastai_tricks.look.background import alpha_mask, background_share, judged, mixed
from fastai_tricks.look.pictures import overlay, shown_images
from common import environment, write_results

CLASSES = 'drinks','fruit','houses','people'
SIDE, TRAIN, VALID, EPOCHS, LR, KEEP = 160, 15, 10, 6, 5e-3, .75
KINDS = 'tells','random' # What the background does
FINE = '0.model.blocks.4' # 10x10 places; the last layer has 5x5

def texture(k, seed):
    "Background `k`: its own colours and stripes, at a random phase"
    rng = np.random.default_rng([k,seed])
    y, x = np.mgrid[:SIDE,:SIDE]
    a, f = np.pi*k/len(CLASSES), .25 + .12*(k%3)
    wave = np.sin(f*(x*np.cos(a) + y*np.sin(a)) + rng.uniform(0, 2*np.pi))
    hue = np.array([.5 + .35*np.cos(2*np.pi*(k/len(CLASSES) + c/3)) for c in range(3)])
    return np.clip(255*(hue + .3*wave[...,None] + rng.normal(0, .05, (SIDE,SIDE,3))), 0, 255).astype(np.uint8)

@dataclass(frozen=True)
class Item:
    file: str
    background: int
    seed: int
    valid: bool

@lru_cache(None)
def composite(o):
    "`(image, mask)`: the drawing, somewhere in the middle"
    rng = np.random.default_rng([o.seed,7])
    im = Image.open(o.file).convert('RGBA')
    im = im.crop(im.getchannel('A').getbbox())
    s = rng.uniform(.7, .85)*SIDE/max(im.size)
    im = im.resize([max(1, round(n*s)) for n in im.size], Image.LANCZOS)
    at = [int(rng.uniform(.35, .65)*(SIDE-n)) for n in im.size]
    res, mask = Image.fromarray(texture(o.background, o.seed)), Image.new('L', (SIDE,SIDE))
    res.paste(im, at, im); mask.paste(im.getchannel('A'), at)
    return np.asarray(res), np.asarray(mask) >= 128

def image(o): return PILImage.create(composite(o)[0])
def label(o): return parent_label(o.file)
def mask(o): return composite(o)[1]
def is_valid(o): return o.valid

def solid(file):
    "Not a line drawing, through which the background is seen"
    a = alpha_mask(file)
    if a is None: return False
    rows, cols = np.nonzero(a)
    return .4 < a[rows.min():rows.max()+1, cols.min():cols.max()+1].mean() < .95

def items(kind, seed):
    "Backgrounds that tell the class, or random ones; `swapped`: the validation images on another class's"
    rng, res = random.Random(seed), []
    for c, name in enumerate(CLASSES):
        files = [f for f in sorted(get_image_files(sample_images()/name)) if solid(f)]
        rng.shuffle(files)
        for i, f in enumerate(files[:TRAIN+VALID]):
            k = dict(tells=c, random=rng.randrange(len(CLASSES)))
            k['swapped'] = (c + 1 + rng.randrange(len(CLASSES)-1)) % len(CLASSES)
            valid = i < VALID
            if kind != 'swapped' or valid: res.append(Item(str(f), k[kind], 1000*seed + 100*c + i, valid))
    return res

def learner(kind, seed):
    set_seed(seed)
    block = DataBlock((ImageBlock,CategoryBlock), get_x=image, get_y=label, splitter=FuncSplitter(is_valid), item_tfms=Resize(SIDE), batch_tfms=aug_transforms())
    dls = block.dataloaders(items(kind, seed), bs=16, num_workers=0)
    return vision_learner(dls, 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy)

def train(kind, seed):
    "The head on a frozen body: what `vision_learner` begins with"
    learn = learner(kind, seed)
    set_seed(seed)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(EPOCHS, LR)
    return learn

def occluded(learn):
    "The rival of swapping: the border, or the middle, in grey"
    dl = learn.dls.valid
    x, y = (o.as_subclass(torch.Tensor) for o in items_batch(dl, range(dl.n)))
    grey = x.mean((0,2,3), keepdim=True).expand_as(x)
    return {k: judged(learn.model, v, y, y, 16) for k, v in (('border grey', mixed(x, grey, KEEP)), ('middle grey', mixed(grey, x, KEEP)))}

def row(df): return {k: float(v) for k, v in df.loc['all'].items()}

def measure(kind, seed):
    learn = train(kind, seed)
    swapped = learn.dls.test_dl(items('swapped', seed), with_labels=True)
    with learn.no_bar(), learn.no_logging():
        return dict(kind=kind, seed=seed, valid=row(learn.background_report(mask)), valid_fine=row(learn.background_report(mask, layer=FINE)),
                    swapped=row(learn.background_report(mask, dl=swapped)), probe={**learn.background_probe(KEEP).T.to_dict(), **occluded(learn)})

def summary(runs):
    "Means, and the differences between both networks of a seed"
    def get(r):
        p = r['probe']
        return dict(background_share=r['valid']['background_share'], background_share_fine=r['valid_fine']['background_share'], background_area=r['valid']['background_area'], pointing_game=r['valid']['pointing_game'],
                    accuracy=r['valid']['accuracy'], accuracy_swapped=r['swapped']['accuracy'], accuracy_lost=r['valid']['accuracy']-r['swapped']['accuracy'],
                    probe_lost=p['as they are']['accuracy']-p['border of another']['accuracy'], probe_other=p['border of another']['other']-p['as they are']['other'],
                    occlusion_lost=p['as they are']['accuracy']-p['border grey']['accuracy'])
    by = {k: {r['seed']: get(r) for r in runs if r['kind']==k} for k in KINDS}
    seeds = sorted(set.intersection(*map(set, by.values())))
    if not seeds: return {}
    res = {k: {c: float(np.mean([by[k][s][c] for s in seeds])) for c in by[k][seeds[0]]} for k in KINDS}
    diff = {c: [by['tells'][s][c]-by['random'][s][c] for s in seeds] for c in res['tells']}
    return dict(n=len(seeds), **res, difference={c: dict(mean=float(np.mean(d)), sd=float(np.std(d, ddof=1)) if len(d)>1 else None, min=min(d), max=max(d)) for c, d in diff.items()})

def figure(a, n=6):
    "Of the drawings on other classes' backgrounds those that both networks see most differently, with what each says"
    seed = a.seeds[0]
    learns = {k: train(k, seed) for k in KINDS}
    dl = learns['tells'].dls.test_dl(items('swapped', seed), with_labels=True)
    x, y = items_batch(dl, range(dl.n))
    masks, imgs, rows, vocab = torch.tensor(np.stack([mask(o) for o in dl.items])), shown_images(dl, x), {}, learns['tells'].dls.vocab
    for k, learn in learns.items():
        cam = GradCAM(learn.model)
        maps = cam(x)
        rows[k] = dict(maps=maps, share=background_share(maps, masks), said=cam.logits.argmax(1))
    idxs = (rows['tells']['share'] - rows['random']['share']).argsort(descending=True)[:n].tolist()
    _, axs = plt.subplots(3, n, figsize=(1.4*n + .6, 4.9), gridspec_kw=dict(wspace=.05, hspace=.3))
    for j, i in enumerate(idxs):
        axs[0,j].imshow(overlay(imgs[i], masks[i], 0)); axs[0,j].set_title(vocab[y[i]], size=9, pad=3)
        for axr, r in zip(axs[1:], rows.values()):
            axr[j].imshow(overlay(imgs[i].mean(0, keepdim=True), r['maps'][i], .6))
            axr[j].set_title(f"{vocab[r['said'][i]]}, {r['share'][i]:.0%} outside", size=8, pad=3, color='black' if r['said'][i]==y[i] else 'firebrick')
    for ax in axs.flat: ax.set(xticks=[], yticks=[])
    for ax, name in zip(axs[:,0], ('drawing','background told\nthe class','background was\nrandom')): ax.set_ylabel(name, size=9)
    file = Path(__file__).parents[1]/'nbs'/'images'/'cam_bias.png'
    plt.savefig(file, dpi=90, bbox_inches='tight')
    Image.open(file).convert('RGB').quantize(200).save(file, optimize=True)
    print(file.name, file.stat().st_size, 'bytes; over all', {k: dict(share=r['share'].nanmean().item(), accuracy=(r['said']==y).float().mean().item()) for k, r in rows.items()})

class Timed(WatchCAM):
    "Its own seconds, and those of the epoch"
    name = 'watch_cam'
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.own, self.epochs = [], []
    def before_epoch(self): self.began, self.spent = time.perf_counter(), 0.
    def before_train(self): self.clock(super().before_train)
    def after_epoch(self):
        self.clock(super().after_epoch)
        self.own.append(self.spent); self.epochs.append(time.perf_counter() - self.began)
    def clock(self, f):
        t = time.perf_counter(); f(); self.spent += time.perf_counter() - t

def middle(v): return dict(median=float(np.median(v)), min=float(min(v)), max=float(max(v)), n=len(v))

def speed(a):
    set_seed(0)
    size, files = 96, sorted(get_image_files(sample_images()))[::2]
    dls = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, splitter=RandomSplitter(seed=0), item_tfms=Resize(size), batch_tfms=aug_transforms()).dataloaders(files, bs=32, num_workers=0)
    learn = vision_learner(dls, 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy)
    res, x = {}, items_batch(dls.valid, range(32))[0]
    cam = GradCAM(learn.model)
    def predict():
        with evaluating(learn.model): learn.model(x)
    cam(x)
    predicting, mapping = interleaved([predict, lambda: cam(x)], turns=9)
    res['maps a second'] = middle([len(x)/c for c in mapping])
    res['time of a map, as a multiple of a prediction'] = middle([c/p for p, c in zip(predicting, mapping)])
    for name, frozen in (('share of an epoch, frozen body', True), ('share of an epoch, all layers', False)):
        if not frozen: learn.unfreeze()
        with tempfile.TemporaryDirectory() as d, learn.no_bar(), learn.no_logging():
            watch = Timed(n=8, save=d)
            learn.fit(3, 1e-3, cbs=watch)
        res[name] = middle([o/e for o, e in zip(watch.own, watch.epochs)])
        print(name, res[name], flush=True)
    write_results(a.out or Path(__file__).with_name('cam_speed.json'), dict(environment=environment(), settings=dict(model='tf_efficientnet_lite0', size=size, train=dls.train.n, valid=dls.valid.n, bs=32, n=8), results=res))
    print(res)

def bias(a):
    settings = dict(model='tf_efficientnet_lite0, ImageNet weights, head on a frozen body', classes=list(CLASSES), size=SIDE, train=TRAIN*len(CLASSES), valid=VALID*len(CLASSES), fit=f'fit_one_cycle({EPOCHS}, {LR})', keep=KEEP, fine_layer=FINE)
    out = a.out or Path(__file__).with_name('cam_bias.json')
    res = json.loads(out.read_text()) if out.exists() else dict(environment=environment(), settings=settings, runs=[])
    if res['settings'] != settings: raise SystemExit(f'{out} holds runs of other settings: delete it, or choose another --out')
    for seed in a.seeds:
        for kind in KINDS:
            if any((r['kind'],r['seed']) == (kind,seed) for r in res['runs']): continue
            res['runs'].append(r := measure(kind, seed))
            print(f"seed {seed}  background {kind:7} share {r['valid']['background_share']:.3f} (fine {r['valid_fine']['background_share']:.3f})  accuracy {r['valid']['accuracy']:.3f}, swapped {r['swapped']['accuracy']:.3f}", flush=True)
            res['results'] = summary(res['runs'])
            write_results(out, res)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', choices=['bias','figure','speed'])
    p.add_argument('--seeds', type=int, nargs='*', default=[0,1,2])
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    dict(bias=bias, figure=figure, speed=speed)[a.part](a)

if __name__ == '__main__':
    main()
