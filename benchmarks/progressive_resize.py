"""What ProgressiveResize is worth: seconds of training and final accuracy, against plain fastai and the usual schedule

    python benchmarks/progressive_resize.py [--data PATH] [--regime fine_tune|scratch] [--seeds 3] [--out FILE]

PATH holds a folder per class; default: the pictures embedded in the package. Two regimes: `fine_tune` (tf_efficientnet_lite0 with ImageNet weights, 160 px) and `scratch`
(resnet10t, 128 px). For each seed every variant runs once, in turn, in one process. `equal epochs` gives all the same epochs;
`same time` gives a variant the whole epochs that plain's seconds buy, `0.7 time` those that seven tenths of them buy.
Seconds are those of training alone; accuracy is that of the whole validation set after the last epoch. Runs done are kept in
the JSON after each run, so that a stopped benchmark goes on where it was.
"""
import argparse, json, statistics as st
from pathlib import Path

import timm
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.metrics import accuracy
from fastai.vision.all import Learner, vision_learner
from fastai_tricks.resize import ProgressiveResize
from fastai_tricks.sample import lite0_weights, sample_images

from common import TrainClock, environment, loaders, photos, write_results

REGIMES = dict(fine_tune=dict(size=160, epochs=4, per_class=6, valid_per_class=8, bs=16),
               scratch=dict(size=128, epochs=8, per_class=16, valid_per_class=9, bs=16))


class OthersSchedule(ProgressiveResize):
    "Half size until 50%, full from 75%, steps of 4 px, nearest neighbour, starting over after `fine_tune` unfreezes"
    def __init__(self): super().__init__(start=.5, until=.75, mult=4, mode='nearest')
    def before_batch(self):
        self._fit.frozen = False
        super().before_batch()
    def schedule(self, full, tuning=False):
        sizes, until = super().schedule(full, False)
        # As many shares of the first size as make it last until 50% of the training
        return sizes[:1]*(2*len(sizes)) + sizes, until


class OnlyLastValidation(Callback):
    "The benchmark validates once, at the end"
    def before_validate(self): raise CancelValidException()


VARIANTS = dict(plain=lambda: None, default=ProgressiveResize, others=OthersSchedule)


def train(args, cfg, files, valid, variant, epochs, seed):
    "One run: seconds of training, seconds of its first epoch, final accuracy"
    dls = loaders(files, valid, cfg['size'], seed, bs=cfg['bs'], num_workers=args.num_workers)
    if args.regime=='fine_tune':
        learn = vision_learner(dls, 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy)
    else: learn = Learner(dls, timm.create_model('resnet10t', num_classes=dls.c), metrics=accuracy)
    clock, last, cb = TrainClock(), OnlyLastValidation(), VARIANTS[variant]()
    with learn.no_bar(), learn.no_logging(), learn.added_cbs([clock] + ([cb] if cb else [])):
        with learn.added_cbs(last):
            if args.regime=='fine_tune': learn.fine_tune(epochs)
            else: learn.fit_one_cycle(epochs, 4e-3)
        loss, acc = learn.validate()
    return dict(variant=variant, seed=seed, epochs=epochs, seconds=clock.seconds, first_epoch=clock.curve[0][0], images=clock.images, accuracy=acc, valid_loss=loss)


def epochs_for(budget, run, frozen):
    "Whole epochs that `budget` seconds buy at the pace of `run`"
    before = run['first_epoch'] if frozen else 0
    return max(1, int((budget - before)/((run['seconds'] - before)/run['epochs']) + .05))


def summary(runs, cfg, regime):
    "Means and spreads for each variant and budget; ratios to plain are of the same seed"
    plain = {r['seed']: r for r in runs if r['variant']=='plain'}
    rows = []
    for key in dict.fromkeys((r['variant'], r['budget']) for r in runs):
        rs = [r for r in runs if (r['variant'], r['budget'])==key and r['seed'] in plain]
        ratio = [r['seconds']/plain[r['seed']]['seconds'] for r in rs]
        diff = [r['accuracy'] - plain[r['seed']]['accuracy'] for r in rs]
        full = (cfg['size'],)*2
        share = 1.
        if key[0]!='plain':
            cb, e = VARIANTS[key[0]](), rs[0]['epochs']
            share = cb.plan(full, e, 1 if regime=='fine_tune' else None).attrs['share']
        epochs = st.mean(r['epochs'] for r in rs)
        # The pixels of this run over those of plain: what the ratio of seconds would be if pixels were all
        ideal = share*(epochs + FROZEN*(regime=='fine_tune'))/(cfg['epochs'] + FROZEN*(regime=='fine_tune'))
        sd = lambda xs: st.stdev(xs) if len(xs)>1 else None
        rows.append(dict(variant=key[0], budget=key[1], n=len(rs), epochs=epochs, seconds=st.mean(r['seconds'] for r in rs), ratio=st.mean(ratio), ratio_sd=sd(ratio),
                         ideal_ratio=ideal, efficiency=ideal/st.mean(ratio), accuracy=st.mean(r['accuracy'] for r in rs), accuracy_sd=sd([r['accuracy'] for r in rs]),
                         difference=st.mean(diff), difference_sd=sd(diff)))
    return rows


FROZEN = 2/3 # A frozen epoch costs about two thirds of one that trains all layers


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data')
    p.add_argument('--regime', choices=REGIMES, default='fine_tune')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int)
    p.add_argument('--per-class', type=int)
    p.add_argument('--num-workers', type=int, default=0)
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument('--out')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    cfg = dict(REGIMES[args.regime])
    if args.epochs: cfg['epochs'] = args.epochs
    if args.per_class: cfg['per_class'] = args.per_class
    args.data = args.data or sample_images()
    files, valid = photos(args.data, cfg['per_class'], cfg['valid_per_class'])
    out = Path(args.out or Path(__file__).parent/f'progressive_resize_{args.regime}.json')
    head = dict(regime=args.regime, data=Path(args.data).name, **cfg, num_workers=args.num_workers, train_images=len(files)-len(valid), valid_images=len(valid))
    runs = json.loads(out.read_text())['runs'] if out.exists() else []
    done = {(r['seed'], r['variant'], r['budget']): r for r in runs}

    def run(seed, variant, budget, epochs):
        if (seed, variant, budget) in done: return done[seed, variant, budget]
        r = dict(train(args, cfg, files, valid, variant, epochs, seed), budget=budget)
        runs.append(r)
        print(f"seed {seed} {variant:8} {budget:13} {epochs:2} epochs {r['seconds']:6.1f} s accuracy {r['accuracy']:.4f}", flush=True)
        write_results(out, dict(head, environment=environment(), summary=summary(runs, cfg, args.regime), runs=runs))
        return r

    frozen = args.regime=='fine_tune'
    for seed in range(args.seeds):
        plain = run(seed, 'plain', 'equal epochs', cfg['epochs'])
        for variant in ('default', 'others'):
            equal = run(seed, variant, 'equal epochs', cfg['epochs'])
            run(seed, variant, 'same time', epochs_for(plain['seconds'], equal, frozen))
            if variant=='default': run(seed, variant, '0.7 time', epochs_for(.7*plain['seconds'], equal, frozen))
    for row in summary(runs, cfg, args.regime): print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__=='__main__': main()
