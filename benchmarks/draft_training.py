"""What `PILImageDraft` saves in a whole training with `ProgressiveResize`: seconds, and how much of them is waiting for batches

    python benchmarks/draft_training.py [--seeds 0 1 2] [--workers 0 2] [--out FILE]

Photos of 1024×768 are made of the embedded pictures. For each number of workers and each seed the four variants (`PILImage` or `PILImageDraft`;
images made small in the loader, or on the device only) train one after the other. `waiting` is the time from the end of a training step to the next batch.
"""
import argparse, statistics as st, tempfile, time
from pathlib import Path

import timm
import torch
from fastai.vision.all import (Callback, CategoryBlock, DataBlock, GrandparentSplitter, Image, ImageBlock, Learner, PILImage, Resize, accuracy,
                               aug_transforms, get_image_files, parent_label, set_seed)
from fastai_tricks.resize.callback import ProgressiveResize
from fastai_tricks.data.draft import PILImageDraft
from fastai_tricks.data.sample import sample_images

from common import environment, photos, write_results

SIZE, EPOCHS, BS, WH = 128, 4, 16, (1024, 768)
VARIANTS = {'PILImage, device': (PILImage, 'device'), 'PILImage, loader': (PILImage, 'loader'),
            'PILImageDraft, device': (PILImageDraft, 'device'), 'PILImageDraft, loader': (PILImageDraft, 'loader')}


def make_photos(folder, per_class=6):
    "A folder of large JPEGs; a third of them, no class left out, to validate"
    files, valid = photos(sample_images(), per_class, 2)
    for i, f in enumerate(files):
        out = folder/('valid' if i in set(valid) else 'train')/f.parent.name/f'{f.stem}.jpg'
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.open(f).convert('RGB').resize(WH, Image.Resampling.BICUBIC).save(out, quality=90)


class Waiting(Callback):
    "Seconds of the training, and those spent between a step and the next batch"
    order, run_valid = -100, False
    def __init__(self): self.seconds = self.waiting = 0.
    def before_train(self): self.began = self.step_ended = time.perf_counter()
    def before_batch(self): self.waiting += time.perf_counter() - self.step_ended
    def after_batch(self): self.step_ended = time.perf_counter()
    def after_train(self): self.seconds += time.perf_counter() - self.began


def train(folder, variant, seed, num_workers):
    cls, where = VARIANTS[variant]
    set_seed(seed, reproducible=False)
    block = DataBlock((ImageBlock(cls), CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=GrandparentSplitter(),
                      item_tfms=Resize(SIZE), batch_tfms=aug_transforms())
    dls = block.dataloaders(folder, bs=BS, num_workers=num_workers)
    clock = Waiting()
    learn = Learner(dls, timm.create_model('resnet10t', num_classes=dls.c), metrics=accuracy, cbs=[clock, ProgressiveResize(where=where)])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(EPOCHS, 4e-3)
    return dict(variant=variant, num_workers=num_workers, seed=seed, seconds=clock.seconds, waiting=clock.waiting/clock.seconds, accuracy=learn.recorder.values[-1][-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--workers', type=int, nargs='+', default=[0, 2])
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'draft_training.json')
    args = p.parse_args()
    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        make_photos(d)
        n = len(get_image_files(d/'train'))
        print(f'{n} photos of {WH[0]}×{WH[1]} to train, {SIZE} px, {EPOCHS} epochs', flush=True)
        for seed in args.seeds:
            for num_workers in args.workers:
                for variant in VARIANTS:
                    runs.append(train(d, variant, seed, num_workers))
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in runs[-1].items()}, flush=True)
    base = {(r['num_workers'], r['seed']): r['seconds'] for r in runs if r['variant']=='PILImage, device'}
    summary = []
    sd = lambda xs: st.stdev(xs) if len(xs)>1 else None
    for num_workers in args.workers:
        for variant in VARIANTS:
            rs = [r for r in runs if (r['variant'], r['num_workers'])==(variant, num_workers)]
            ratio = [r['seconds']/base[num_workers, r['seed']] for r in rs]
            summary.append(dict(workers=num_workers, variant=variant, n=len(rs), seconds=st.mean(r['seconds'] for r in rs), ratio=st.mean(ratio), ratio_sd=sd(ratio),
                                waiting=st.mean(r['waiting'] for r in rs), accuracy=st.mean(r['accuracy'] for r in rs)))
    write_results(args.out, dict(images=n, photo=f'{WH[0]}×{WH[1]}', size=SIZE, epochs=EPOCHS, bs=BS, environment=environment(), summary=summary, runs=runs))
    for row in summary: print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__=='__main__': main()
