"""What ProgressiveResize is worth: seconds of training and final accuracy, against plain fastai and the usual schedule

    python benchmarks/progressive_resize.py [--data PATH] [--regime fine_tune|fine_tune_few|scratch|schedules|batches] [--seeds 0 1 2] [--out FILE]

PATH holds a folder per class; default: the pictures embedded in the package. Two regimes: `fine_tune` (tf_efficientnet_lite0 with ImageNet weights, 160 px; `fine_tune_few`: longer, on
fewer images) and `scratch` (resnet10t, 128 px). `schedules` fine-tunes with other schedules than the default one, `batches` trains from scratch with larger batches of small images. For each seed every variant runs once, in turn, in one process. Budgets: `equal epochs` gives all the same epochs;
`same time` and `0.7 time` give a variant the most whole epochs whose planned cost, by the pixels and at an efficiency of 0.95,
fits into plain's or seven tenths of it. The plain run of 0.7 time is the control: what fewer epochs alone would do.
Seconds are those of training alone; accuracy is that of the whole validation set after the last epoch. Each run is kept beside
the JSON as soon as it is done, so that a stopped benchmark goes on where it was, and several processes can share the seeds.
"""
import argparse, json, statistics as st
from functools import partial
from pathlib import Path

import timm
import torch
from torch.nn import functional as F
from fastai.callback.core import Callback, CancelValidException
from fastai.metrics import accuracy
from fastai.vision.all import Learner, vision_learner
from fastai_tricks.resize.callback import ProgressiveResize
from fastai_tricks.data.sample import lite0_weights, sample_images

from common import TrainClock, environment, loaders, photos, write_results

REGIMES = dict(fine_tune=dict(size=160, epochs=5, per_class=8, valid_per_class=8, bs=16),
               fine_tune_few=dict(size=160, epochs=12, per_class=4, valid_per_class=8, bs=16),
               schedules=dict(size=160, epochs=8, per_class=4, valid_per_class=8, bs=16),
               scratch=dict(size=128, epochs=8, per_class=10, valid_per_class=9, bs=32),
               batches=dict(size=128, epochs=8, per_class=10, valid_per_class=9, bs=16))
FROZEN = 2/3 # A frozen epoch costs about two thirds of one that trains all layers
EFFICIENCY = .95 # Assumed for the budgets of time; the measured one is in the results


class OthersSchedule(ProgressiveResize):
    "Half size until 50%, full from 75%, steps of 4 px, nearest neighbour, starting over after `fine_tune` unfreezes"
    def __init__(self): super().__init__(.5, until=.75, hold=2/3, crop=False, mult=4, where='device')
    def fit_plan(self, images, n_epoch, part=None): return super().fit_plan(images, n_epoch, None)
    def plan(self, full, n_epoch=1, freeze_epochs=None): return super().plan(full, n_epoch)
    def shrink(self, xb, yb, size, pixel_points): return tuple(F.interpolate(x, size) for x in xb),yb


class OnlyLastValidation(Callback):
    "The benchmark validates once, at the end"
    def before_validate(self): raise CancelValidException()


def schedule(px, until, crop): return partial(ProgressiveResize, sizes=[px], until=until, crop=crop)

VARIANTS = {'plain': lambda: None, 'default': ProgressiveResize, 'others': OthersSchedule,
            'shrink 96, until .6': schedule(96, .6, False), 'cut 96, until .6': schedule(96, .6, True), 'shrink 128, until .6': schedule(128, .6, False),
            'cut 128, until .4': schedule(128, .4, True), 'cut 128, until .6': schedule(128, .6, True), 'cut 128, until .8': schedule(128, .8, True), 'cut 128, until .9': schedule(128, .9, True)}
# 'larger batches' and the rule for their learning rate
for rule in ('linear', 'sqrt', None): VARIANTS[f'larger batches, {rule}'] = partial(ProgressiveResize, scale_bs=True, scale_lr=rule)
BUDGETS = {'equal epochs': None, 'same time': 1., '0.7 time': .7}
RUNS = [('plain','equal epochs'), ('default','equal epochs'), ('default','same time'), ('plain','0.7 time'), ('default','0.7 time'),
        ('others','equal epochs'), ('others','same time')]
# Variant and epochs
SCHEDULES = [('plain',8), ('shrink 96, until .6',12), ('cut 96, until .6',12), ('shrink 128, until .6',10), ('cut 128, until .6',10), ('cut 128, until .8',11), ('cut 128, until .9',8)]

BATCHES = [(v,8) for v in ('default', 'larger batches, linear', 'larger batches, sqrt', 'larger batches, None')]
OTHER_RUNS = dict(schedules=SCHEDULES, batches=BATCHES)
SCRATCH = ('scratch', 'batches')


def cost(variant, epochs, size, tuning):
    "Planned cost of a fit, in epochs at full size"
    frozen = FROZEN*tuning
    cb = VARIANTS[variant]()
    share = cb.plan(size, epochs, 1 if tuning else None).share if cb else 1.
    return share*(epochs + frozen)


def epochs_for(variant, budget, cfg, tuning):
    "Whole epochs of `variant` that fit into the share `budget` of plain's time"
    if isinstance(budget, int): return budget
    budget = BUDGETS[budget]
    if budget is None: return cfg['epochs']
    of_time = 1. if variant=='plain' else EFFICIENCY
    fits = lambda n: cost(variant, n, cfg['size'], tuning)/of_time <= budget*cost('plain', cfg['epochs'], cfg['size'], tuning) + 1e-9
    return max([n for n in range(1, 20*cfg['epochs']) if fits(n)], default=1)


def train(args, cfg, files, valid, variant, epochs, seed):
    "One run: seconds of training, final accuracy"
    dls = loaders(files, valid, cfg['size'], seed, bs=cfg['bs'], num_workers=args.num_workers)
    if args.regime not in SCRATCH:
        learn = vision_learner(dls, 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy)
    else: learn = Learner(dls, timm.create_model('resnet10t', num_classes=dls.c), metrics=accuracy)
    clock, last, cb = TrainClock(), OnlyLastValidation(), VARIANTS[variant]()
    with learn.no_bar(), learn.no_logging(), learn.added_cbs([clock] + ([cb] if cb else [])):
        with learn.added_cbs(last):
            if args.regime not in SCRATCH: learn.fine_tune(epochs)
            else: learn.fit_one_cycle(epochs, 4e-3)
        loss, acc = learn.validate()
    return dict(seed=seed, variant=variant, epochs=epochs, seconds=clock.seconds, images=clock.images, accuracy=acc, valid_loss=loss)


def summary(runs, todo, cfg, tuning):
    "Means and spreads for each variant and budget; ratios are to the first of `todo` with the same seed"
    plain = {r['seed']: r for r in runs if (r['variant'], r['budget'])==todo[0]}
    sd = lambda xs: st.stdev(xs) if len(xs)>1 else None
    rows = []
    for variant, budget in todo:
        rs = [r for r in runs if (r['variant'], r['budget'])==(variant, budget) and r['seed'] in plain]
        if not rs: continue
        ratio = [r['seconds']/plain[r['seed']]['seconds'] for r in rs]
        diff = [r['accuracy'] - plain[r['seed']]['accuracy'] for r in rs]
        epochs = rs[0]['epochs']
        # The pixels of this run over those of plain: what the ratio of seconds would be if pixels were all
        ideal = cost(variant, epochs, cfg['size'], tuning)/cost(todo[0][0], cfg['epochs'], cfg['size'], tuning)
        rows.append(dict(variant=variant, budget=budget, n=len(rs), epochs=epochs, seconds=st.mean(r['seconds'] for r in rs), ratio=st.mean(ratio), ratio_sd=sd(ratio),
                         ideal_ratio=ideal, efficiency=ideal/st.mean(ratio), accuracy=st.mean(r['accuracy'] for r in rs), accuracy_sd=sd([r['accuracy'] for r in rs]),
                         difference=st.mean(diff), difference_sd=sd(diff)))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data')
    p.add_argument('--regime', choices=REGIMES, default='fine_tune')
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--variants', nargs='+', choices=VARIANTS, help='only these, each with the epochs of its budgets')
    p.add_argument('--epochs', type=int)
    p.add_argument('--per-class', type=int)
    p.add_argument('--num-workers', type=int, default=0)
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument('--out', type=Path)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    cfg = dict(REGIMES[args.regime])
    if args.epochs: cfg['epochs'] = args.epochs
    if args.per_class: cfg['per_class'] = args.per_class
    args.data = args.data or sample_images()
    files, valid = photos(args.data, cfg['per_class'], cfg['valid_per_class'])
    out = args.out or Path(__file__).parent/f'progressive_resize_{args.regime}.json'
    kept = out.with_suffix('.runs')
    kept.mkdir(exist_ok=True)
    tuning = args.regime not in SCRATCH
    todo = OTHER_RUNS.get(args.regime, RUNS)
    wanted = [(v, b) for v, b in todo if not args.variants or v in args.variants]
    head = dict(regime=args.regime, data=Path(args.data).name, **cfg, num_workers=args.num_workers, train_images=len(files)-len(valid), valid_images=len(valid))
    print(head, {f'{v} {b}': epochs_for(v, b, cfg, tuning) for v, b in todo}, flush=True)

    def save():
        runs = [json.loads(f.read_text()) for f in sorted(kept.glob('*.json'))]
        res = dict(head, environment=environment(), summary=summary(runs, todo, cfg, tuning), runs=runs)
        write_results(out, res)
        return res['summary']

    for seed in args.seeds:
        for variant, budget in wanted:
            file = kept/f"{seed} {variant} {budget}.json"
            if file.exists(): continue
            r = dict(train(args, cfg, files, valid, variant, epochs_for(variant, budget, cfg, tuning), seed), budget=budget)
            print(f"seed {seed} {variant:8} {budget!s:13} {r['epochs']:2} epochs {r['seconds']:6.1f} s accuracy {r['accuracy']:.4f}", flush=True)
            write_results(file, r)
            save()
    for row in save(): print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__=='__main__': main()
