"""Fine-tuning on five photo sets: seconds to the accuracy that a baseline reaches at its end, and accuracy at equal time

    python benchmarks/time_to_accuracy.py --data FOLDER           all sets, networks and variants of seed 0, hours
    python benchmarks/time_to_accuracy.py --data FOLDER --nets squeezenet --sets cells --seeds 0 1 2

`FOLDER` holds the folders of `sets.py`. All variants train with fastai's defaults where nothing is said: Adam, one-cycle, fp32, batches of 64. Seconds
are CPU seconds of one thread, and all that the call takes but validation: the pass of features counts. A fixed step of training is timed right before each
run (`unit`), and ratios are of seconds in such units, so that runs hours apart can be compared on a machine with other work. Results are written
after each run; a killed benchmark goes on where it stopped.
"""
import argparse, fcntl, json, statistics as st, time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelValidException
from fastcore.basics import noop
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastai_tricks.core.learner import swapped
from fastai_tricks.fast.steps import best_share, blended
from fastai_tricks.models import fit_head
from fastai_tricks.models.fit_head import kept_features, trainable_head

from common import environment, write_results
from sets import NETS, SETS, dls_of

FILE = Path(__file__).with_suffix('.json')
SIZE = 64
SHARES = .3, .5, .7 # As `fit_fast`


def now(): return time.process_time()


class Seconds(Callback):
    "Accuracy on the validation set over the CPU seconds of all else"
    order = 100
    def __init__(self, each): self.each, self.validation, self.curve, self.began, self.skipped = each, 0., [], now(), True
    def before_validate(self):
        self.since = now()
        self.skipped = not self.each and self.lock.locked() and self.epoch+1<self.n_epoch
        if self.skipped: raise CancelValidException()
    def after_validate(self):
        value = self.learn.metrics[0].value
        if self.skipped or value is None or self.dl.dataset is not self.dls.valid_ds: return # A pass of features is no validation
        self.validation += now() - self.since
        self.curve.append([now() - self.began - self.validation, float(value)])
        self.skipped = True # `lr_find` never begins to validate


class NormsEval(Callback):
    "Batch norm in evaluation mode, below the head"
    run_valid = False
    def before_train(self):
        for m in self.model[0].modules():
            if isinstance(m, torch.nn.modules.batchnorm._BatchNorm): m.eval()


def found(learn):
    "The rate of `lr_find`, whose seconds don't count"
    began = now()
    lr = learn.lr_find(num_it=50, show_plot=False).valley
    learn.seconds.began += now() - began
    return lr


def regression(learn):
    "Logistic regression on standardised features, the strength chosen on a fifth of the training images"
    split = trainable_head(learn)
    x, y = (o.numpy() for o in kept_features(learn, split))
    def fitted(c, x, y): return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300)).fit(x, y)
    a, b, ya, yb = train_test_split(x, y, test_size=.2, stratify=y, random_state=0)
    c = max((1e-4, 1e-3, 1e-2, 1e-1), key=lambda c: fitted(c, a, ya).score(b, yb))
    model, taken = fitted(c, x, y), now() - learn.seconds.began
    with split.without_head(): x, y = learn.get_preds(act=noop)
    learn.seconds.curve = [[taken, float((model.predict(x.numpy())==y.numpy()).mean())]]


class Head(Callback):
    "Keeps the weights of epoch 0"
    def after_epoch(self):
        if self.epoch==0: self.state = {k: v.clone() for k, v in self.model.state_dict().items()}


def fast(learn, epochs=5, flips=True):
    """`fit_fast` as it is, but for its last choice, of a blend by the validation images: made on one half of them and scored on the other, both ways,
    so that no image both chooses and scores. Without `flips` the head sees no mirror images"""
    head = Head()
    with nullcontext() if flips else swapped(fit_head, 'flips_images', lambda dl: False): learn.fit_fast(epochs, best=False, cbs=head)
    seconds, last, right = learn.seconds.curve[-1][0], {k: v.clone() for k, v in learn.model.state_dict().items()}, {}
    for share in (0, *SHARES, 1):
        learn.model.load_state_dict(blended(head.state, last, share))
        preds, ys = learn.get_preds()
        right[share] = (preds.argmax(1)==ys).float()
    a, b = torch.arange(len(ys))%2==0, torch.arange(len(ys))%2==1
    def score(chooses, scores):
        share = best_share({s: float(r[chooses].mean()) for s, r in right.items()}, True)
        return float(right[share][scores].sum())
    learn.seconds.curve.append([seconds, (score(a, b) + score(b, a))/len(ys)])
    learn.blends = {str(s): float(r.mean()) for s, r in right.items()}


# Name -> the line that trains
BASELINES = {
    'fine_tune(4)': 'learn.fine_tune(4)',
    'batches of 16': 'learn.fine_tune(4)',
    'norms kept': 'learn.fine_tune(4, cbs=NormsEval())',
    'lr_find': 'learn.fine_tune(4, found(learn))',
    'twice as long': 'learn.fine_tune(8)'}
RUNS = {**BASELINES, 'regression': 'regression(learn)', 'fit_fast': 'fast(learn)', 'no mirror images': 'fast(learn, flips=False)'}


def unit(learn):
    "CPU seconds of a training step of 32 images, the median of 3; the Learner is thrown away"
    learn.unfreeze()
    learn.create_opt()
    learn.model.train()
    x, y = (t[:32] for t in learn.dls.train.one_batch())
    seconds = []
    for _ in range(4):
        began = now()
        learn.loss_func(learn.model(x), y).backward()
        learn.opt.step()
        learn.opt.zero_grad()
        seconds.append(now() - began)
    return st.median(seconds[1:])


def train(o, data):
    "One run: seconds, accuracy, the curve"
    def learner():
        dls = dls_of(o['set'], data, o['seed'], SIZE, bs=16 if o['name']=='batches of 16' else 64)
        return NETS[o['net']](dls)
    per_step, learn = unit(learner()), learner()
    learn.add_cb(Seconds(o['name'] not in BASELINES))
    with learn.no_bar(), learn.no_logging():
        learn.seconds.began = now()
        exec(RUNS[o['name']], dict(globals(), learn=learn))
    curve = learn.seconds.curve
    return dict(o, unit=per_step, seconds=curve[-1][0], accuracy=curve[-1][1], curve=curve, **({'blends': learn.blends} if hasattr(learn, 'blends') else {}), n=len(learn.dls.train_ds), valid=len(learn.dls.valid_ds))


# What came out ----------------------------------------------------------------

def pair(runs, name='fit_fast'):
    "One set, network and seed: `name` against the best of the baselines that have run, and against logistic regression on the same features"
    by = {r['name']: r for r in runs}
    if name not in by: return
    ours, base = by[name], [by[n] for n in BASELINES if n in by]
    if not {'fine_tune(4)', 'norms kept', 'regression'} <= by.keys(): return
    time = lambda r: r['seconds']/r['unit']
    best = max(base, key=lambda r: (r['accuracy'], -time(r)))
    rivals = [r for r in base if time(r)<=1.15*time(ours)] # Of about equal time, or less
    per_unit = ours['unit']
    reached = next((s/per_unit for s, a in ours['curve'] if a>=best['accuracy']), None)
    return dict(set=ours['set'], net=ours['net'], seed=ours['seed'], best=best['name'], best_accuracy=best['accuracy'], best_time=time(best),
                plain_accuracy=by['fine_tune(4)']['accuracy'], plain_time=time(by['fine_tune(4)']), equal_time=max(r['accuracy'] for r in rivals),
                rivals=len(base), regression=by['regression']['accuracy'], head=ours['curve'][0][1], head_time=ours['curve'][0][0]/per_unit,
                accuracy=ours['accuracy'], time=time(ours), ratio=reached/time(best) if reached else None, n=ours['n'], valid=ours['valid'])


def pairs(runs, name='fit_fast'):
    "Of all sets, networks and seeds where all has run"
    keys = sorted({(r['set'], r['net'], r['seed']) for r in runs if r['name']=='fit_fast'})
    found = (pair([r for r in runs if (r['set'], r['net'], r['seed'])==k], name) for k in keys)
    return [p for p in found if p]


def overall(ps):
    "Means over pairs; where the best baseline was not reached, the ratio counts as that of the whole run, 1 or more"
    ratios = [p['ratio'] or max(1, p['time']/p['best_time']) for p in ps]
    gains = [p['accuracy'] - p['equal_time'] for p in ps]
    se = [(2*p['accuracy']*(1-p['accuracy'])/p['valid'])**.5 for p in ps] # Of a difference of two accuracies, at most
    least = min(ps, key=lambda p: p['accuracy'] - p['equal_time'])
    return dict(n=len(ps), ratio=float(np.exp(np.mean(np.log(ratios)))), ratio_min=min(ratios), ratio_max=max(ratios), reached=sum(p['ratio'] is not None for p in ps),
                gain=st.mean(gains), gain_min=min(gains), gain_max=max(gains), below=sum(g<-2*e for g, e in zip(gains, se)), least=[least['set'], least['net']],
                over_best=st.mean(p['accuracy'] - p['best_accuracy'] for p in ps), over_regression=st.mean(p['accuracy'] - p['regression'] for p in ps),
                below_regression=sum(p['accuracy'] - p['regression']<-2*e for p, e in zip(ps, se)))


def add(file, run):
    "Add a run to the file; two processes may work at it"
    with open(file.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        res = json.loads(file.read_text()) if file.exists() else dict(environment=environment(), size=SIZE, lines=RUNS, runs=[])
        res['runs'].append(run)
        res['pairs'] = pairs(res['runs'])
        if res['pairs']: res['overall'] = overall(res['pairs'])
        write_results(file, res)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True)
    p.add_argument('--sets', nargs='*', default=list(SETS), choices=list(SETS))
    p.add_argument('--nets', nargs='*', default=list(NETS), choices=list(NETS))
    p.add_argument('--names', nargs='*', default=list(RUNS), choices=list(RUNS))
    p.add_argument('--seeds', type=int, nargs='*', default=[0])
    p.add_argument('--out', type=Path, default=FILE)
    a = p.parse_args()
    torch.set_num_threads(1)
    for seed in a.seeds:
        for net in a.nets:
            for s in a.sets:
                for name in a.names:
                    o = dict(set=s, net=net, name=name, seed=seed)
                    done = json.loads(a.out.read_text())['runs'] if a.out.exists() else []
                    if any({k: r[k] for k in o}==o for r in done): continue
                    r = train(o, a.data)
                    add(a.out, r)
                    print(f"{s:12} {net:11} {name:14} {seed} {r['seconds']:6.1f} s {r['seconds']/r['unit']:6.0f} units  {r['accuracy']:.4f}", flush=True)


if __name__=='__main__': main()
