"""From scratch: seconds of training until the score that plain fastai reaches at its end, for plain and for `fit_fast`, and the score at equal time

    python benchmarks/scratch.py              resnet10t on the embedded pictures

Plain is what fastai does if nothing is said: `vision_learner`, then `fit_one_cycle`, full size, fp32, its batch size and rates. Each seed trains all variants in turn, in one process. Seconds are all that the call takes but validation: the pass for kept features, the timing
of `to_mixed` and the decoding of images count. They are the processor's, of one thread, so that other work on the machine counts for little; the wall
clock's are kept too. Results are written after each run; a killed benchmark goes on where it stopped.
"""
import argparse, json, statistics as st, time
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.metrics import accuracy
from fastai.vision.all import vision_learner
from fastai_tricks.all import sample_images

from common import environment, loaders, photos, write_results

FILE = Path(__file__).with_suffix('.json')
SETTINGS = dict(arch='resnet10t', size=128, per_class=10, valid_per_class=9, bs=64, every=3)
# Name, the line that trains
RUNS = [('plain', 'learn.fit_one_cycle(10)'), ('fit_fast, a third', 'learn.fit_fast(10)'), ('fit_fast', 'learn.fit_fast(32)')]


def now(): return np.array([time.process_time(), time.perf_counter()])


class Seconds(Callback):
    "Scores on the validation set over the seconds of all else: processor, wall clock"
    order = 100
    def __init__(self, every): self.every, self.validation, self.curve, self.began = every, np.zeros(2), [], now()
    def before_validate(self):
        self.since = now()
        # Within a fit each so many epochs, and at the end
        self.skipped = not self.lock.locked() and self.epoch+1<self.n_epoch and (self.epoch+1)%self.every>0
        if self.skipped: raise CancelValidException()
    def after_validate(self):
        # The features of the training images are no validation
        if self.skipped or self.dl.dataset is not self.dls.valid_ds: return
        self.validation += now() - self.since
        self.curve.append([self.total()[0], float(self.learn.metrics[0].value)])
    def total(self): return (now() - self.began - self.validation).tolist()


def train(line, files, valid, seed):
    "One run: seconds, final score, the curve"
    o = SETTINGS
    dls = loaders(files, valid, o['size'], seed, bs=o['bs'])
    learn = vision_learner(dls, o['arch'], metrics=accuracy, pretrained=False)
    clock = Seconds(o['every'])
    learn.add_cb(clock)
    with learn.no_bar(), learn.no_logging():
        clock.began = now()
        exec(line, dict(learn=learn))
        seconds, wall = clock.total()
    return dict(seconds=seconds, wall=wall, accuracy=clock.curve[-1][1], curve=clock.curve)


def reached(curve, score):
    "Seconds until `score`, None where it is not reached"
    return next((s for s, a in curve if a>=score), None)


def summary(runs):
    "For each variant: seconds, score, and when plain's final score was reached, as shares of plain of the same seed"
    rows, plain = [], {r['seed']: r for r in runs if r['name']=='plain'}
    spread = lambda xs: dict(mean=st.mean(xs), min=min(xs), max=max(xs), sd=st.stdev(xs) if len(xs)>1 else None)
    for name, line in RUNS:
        rs = [r for r in runs if r['name']==name and r['seed'] in plain]
        if not rs: continue
        to_score = [reached(r['curve'], plain[r['seed']]['accuracy']) for r in rs]
        shares = [s/plain[r['seed']]['seconds'] for s, r in zip(to_score, rs) if s is not None]
        rows.append(dict(name=name, line=line, n=len(rs), seconds=spread([r['seconds'] for r in rs]), time_ratio=spread([r['seconds']/plain[r['seed']]['seconds'] for r in rs]),
                         accuracy=spread([r['accuracy'] for r in rs]), difference=spread([r['accuracy'] - plain[r['seed']]['accuracy'] for r in rs]),
                         reached=len(shares), seconds_to_plain=spread([s for s in to_score if s is not None]) if shares else None, ratio_to_plain=spread(shares) if shares else None))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='*', default=[0,1,2])
    p.add_argument('--out', type=Path, default=FILE)
    a = p.parse_args()
    torch.set_num_threads(1)
    files, valid = photos(sample_images(), SETTINGS['per_class'], SETTINGS['valid_per_class'])
    settings = dict(SETTINGS, data='embedded pictures', train=len(files)-len(valid), valid=len(valid), runs=RUNS)
    settings = json.loads(json.dumps(settings))
    res = json.loads(a.out.read_text()) if a.out.exists() else dict(environment=environment(), settings=settings, runs=[])
    if res['settings']!=settings: raise SystemExit(f'{a.out} holds runs of other settings: delete it, or choose another --out')
    for seed in a.seeds:
        for name, line in RUNS:
            if any(r['name']==name and r['seed']==seed for r in res['runs']): continue
            r = dict(name=name, seed=seed, **train(line, files, valid, seed))
            res['runs'].append(r)
            res['summary'] = summary(res['runs'])
            write_results(a.out, res)
            print(f"seed {seed}  {name:20} {r['seconds']:6.1f} s  accuracy {r['accuracy']:.4f}  {[(round(s), round(v, 3)) for s, v in r['curve']]}", flush=True)
    for row in res['summary']: print({k: v for k, v in row.items() if k!='line'})


if __name__=='__main__': main()
