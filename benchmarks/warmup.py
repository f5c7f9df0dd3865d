"""What warm-up and zero γ are worth from scratch, with a large batch at a linearly scaled rate (Bag of Tricks, table 4)

The usual batch has the rate that is right for it; the large one that rate times its growth. Variants run in turn,
seed after seed; results are written after each run and go on where a killed run stopped.

    python benchmarks/warmup.py --data PATH     a folder per class
"""
import argparse, json, time
from functools import partial
from pathlib import Path

import numpy as np
import torchvision
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, parent_label
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastai.vision.all import Flip, ImageBlock, Learner, Resize
from fastai_tricks.all import PILImageDraft, linear_scaled_lr, zero_gamma
from common import environment, photos, write_results

BASE, BASE_BS = .01, 32 # SGD with momentum .9, which fastai's `SGD` has only if told at its creation
# Batch size, share of the training that is warm-up, zero γ
VARIANTS = {'usual batch, cosine': (32, 0, False), 'large batch, cosine': (256, 0, False), 'large batch, warm-up': (256, .15, False),
            'large batch, warm-up, zero γ': (256, .15, True), 'usual batch, zero γ': (32, 0, True)}

def run(name, seed, files, valid, size, epochs):
    bs, warmup, gamma = VARIANTS[name]
    set_seed(seed)
    block = DataBlock((ImageBlock(PILImageDraft), CategoryBlock), get_y=parent_label, splitter=IndexSplitter(valid), item_tfms=Resize(size), batch_tfms=Flip())
    dls = block.dataloaders(files, bs=bs, val_bs=64, num_workers=0)
    model = torchvision.models.resnet18(num_classes=dls.c)
    if gamma: zero_gamma(model)
    learn = Learner(dls, model, opt_func=partial(SGD, mom=.9), metrics=accuracy, wd=1e-4)
    began = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(epochs, linear_scaled_lr(bs, BASE, BASE_BS), warmup=warmup)
    curve = [[float(x) for x in v] for v in learn.recorder.values]
    losses = np.array([float(o) for o in learn.recorder.losses])
    return dict(variant=name, seed=seed, accuracy=curve[-1][2], valid_loss=curve[-1][1], curve=curve, largest_loss=float(np.nan_to_num(losses, nan=np.inf).max()),
                batches=len(losses), seconds=time.perf_counter()-began)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True)
    p.add_argument('--seeds', type=int, nargs='*', default=[0,1,2])
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--size', type=int, default=32)
    p.add_argument('--per-class', type=int, default=20)
    p.add_argument('--variants', nargs='*', default=list(VARIANTS))
    p.add_argument('--out', default=Path(__file__).with_suffix('.json'), type=Path)
    a = p.parse_args()
    files, valid = photos(a.data, a.per_class, 8)
    settings = dict(model='torchvision resnet18 from scratch', size=a.size, epochs=a.epochs, train=len(files)-len(valid), valid=len(valid), optimiser='SGD, momentum .9, wd 1e-4',
                    base=f'{BASE} at batch {BASE_BS}')
    res = json.loads(a.out.read_text()) if a.out.exists() else dict(environment=environment('torchvision'), settings=settings, runs=[])
    if res['settings']!=settings: raise SystemExit(f'{a.out} holds runs of other settings: delete it, or choose another --out')
    for seed in a.seeds:
        for name in a.variants:
            if any(r['variant']==name and r['seed']==seed for r in res['runs']): continue
            res['runs'].append(run(name, seed, files, valid, a.size, a.epochs))
            r = res['runs'][-1]
            print(f"seed {seed}  {name:30} accuracy {r['accuracy']:.3f}  loss {r['valid_loss']:.3f}  largest training loss {r['largest_loss']:.2f}  {r['seconds']:.0f} s", flush=True)
            res['results'] = {}
            for v,(bs,warmup,gamma) in VARIANTS.items():
                acc, loss = ([r[k] for r in res['runs'] if r['variant']==v] for k in ('accuracy','valid_loss'))
                if acc: res['results'][v] = dict(bs=bs, lr=linear_scaled_lr(bs, BASE, BASE_BS), warmup=warmup, zero_gamma=gamma, n=len(acc), accuracy=float(np.mean(acc)), accuracy_sd=float(np.std(acc, ddof=1)) if len(acc)>1 else None, valid_loss=float(np.mean(loss)))
            write_results(a.out, res)

if __name__=='__main__':
    main()
