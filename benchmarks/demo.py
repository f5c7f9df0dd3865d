"""Fine-tune a pretrained network twice, plain at full size and with ProgressiveResize, in the same training time

    python benchmarks/demo.py [--data PATH] [--size 160] [--epochs 4] [--max-images 1000] [--seed 0] [--out demo]

PATH holds a folder per class; default: the pictures embedded in the package. Writes a table and a picture to `demo/`.
"""
import argparse
from pathlib import Path

import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import pandas as pd
from fastai.metrics import accuracy
from fastai.vision.all import vision_learner
from fastai_tricks.all import ProgressiveResize, lite0_weights, sample_images

from common import TrainClock, loaders, photos


def check_folder(path):
    "The folder, or an end with the reason in one line"
    if not path.is_dir(): raise SystemExit(f'--data must be a folder with a folder of images per class, not {str(path)!r}')
    classes = [p for p in path.iterdir() if p.is_dir()]
    if len(classes)<2: raise SystemExit(f'--data must hold two or more folders, one per class; {str(path)!r} holds {len(classes)}')
    return len(classes)


def train(name, files, valid, args, epochs, cb):
    "One fine-tuning: a row for the table, the curve for the picture"
    print(f'\n== {name}: fine_tune({epochs}) at {args.size} px', flush=True)
    dls = loaders(files, valid, args.size, args.seed)
    learn = vision_learner(dls, 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy, cbs=cb)
    clock = TrainClock()
    learn.fine_tune(epochs, cbs=clock)
    plan = cb.plan(args.size, epochs, 1) if cb else None
    row = dict(run=name, epochs=epochs, seconds=round(clock.seconds, 1), images_per_s=round(clock.images/clock.seconds, 1), accuracy=round(clock.curve[-1][3], 4),
               expected_share=round(plan.share, 2) if cb else 1., measured_share=clock.seconds/clock.images)
    return row, clock.curve, plan


def draw(file, plain, resized, plan, size):
    "Validation accuracy over seconds of training, with the size of the training images at the end of each epoch"
    fig, ax = plt.subplots(figsize=(8, 4.5), layout='constrained')
    for label, curve, color in (('full size', plain, 'tab:gray'), ('ProgressiveResize', resized, 'tab:blue')):
        ax.plot([c[0] for c in curve], [c[3] for c in curve], 'o-', label=label, color=color)
    for i, c in enumerate(resized):
        ax.annotate(str(plan.of_epoch(i)), (c[0], c[3]), textcoords='offset points', xytext=(0, 8), ha='center', fontsize=8, color='tab:blue')
    ax.set(xlabel='seconds of training', ylabel='accuracy on the validation images', title=f'Same seed, {size} px at the end')
    ax.margins(y=.15)
    ax.legend(loc='lower right')
    fig.savefig(file, dpi=120)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path)
    p.add_argument('--size', type=int, default=160)
    p.add_argument('--epochs', type=int, default=4)
    p.add_argument('--max-images', type=int, default=1000)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=Path('demo'))
    args = p.parse_args()
    path = args.data or sample_images()
    n_classes = check_folder(path)
    per_class = max(2, args.max_images//n_classes)
    files, valid = photos(path, per_class - per_class//5, max(1, per_class//5))
    if not files: raise SystemExit(f'no images in the folders of {str(path)!r}')

    cb = ProgressiveResize()
    # By the pixels: the epochs that plain's training time buys at the smaller sizes
    cost = lambda n: cb.plan(args.size, n, 1).share*(n + 2/3)
    more = max(n for n in range(1, 10*args.epochs) if cost(n)<=args.epochs + 2/3 + 1e-9)
    print(f'{len(files)-len(valid)} training and {len(valid)} validation images of {n_classes} classes (at most {args.max_images}: --max-images)')
    print(f'1. plain: fine_tune({args.epochs}) at {args.size} px    2. ProgressiveResize: fine_tune({more}), about the same training time', flush=True)
    plain, curve, _ = train('plain', files, valid, args, args.epochs, None)
    resized, curve2, plan = train('ProgressiveResize', files, valid, args, more, cb)
    table = pd.DataFrame([plain, resized])
    table['measured_share'] = (table['measured_share']/plain['measured_share']).round(2)
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out/'table.csv', index=False)
    draw(args.out/'accuracy_over_time.png', curve, curve2, plan, args.size)
    print(f"\n{table.to_string(index=False)}\n\nshare: cost of an image, in full-size images (plain = 1). One seed: differences of a few points are noise.\nWritten to {args.out}/: table.csv, accuracy_over_time.png")


if __name__=='__main__': main()
