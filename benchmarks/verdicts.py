"""Simulated reports: what they find, and what they find falsely

Each tip by Student's t (as before), all tips together, and a race, at equal trainings. Scores are normal; the unit is the standard
deviation of a paired difference. 30 trainings are those of nine tips and a baseline with three seeds each.

    python benchmarks/verdicts.py
"""
import argparse
from pathlib import Path

import numpy as np
from scipy import stats

from common import environment, write_results
from fastai_tricks.report.verdicts import intervals

FILE = Path(__file__).with_suffix('.json')
POINTS = 1.5 # Standard deviation of a paired difference in points of accuracy, where truths are given in points
TRUTHS = dict({'nine useless tips': [0]*9}, **{f'one gains {g:g}': [g]+[0]*8 for g in (.5,1,1.5,2,2.5,3)}, **{
    'three gain 1, 1.5, 2': [1,1.5,2]+[0]*6,
    'mixed, one gains 12 points': [p/POINTS for p in (-10,-3,-1,0,0,0,1,2,12)],
    'mixed, best gains 3 points': [p/POINTS for p in (-10,-6,-3,-1,0,0,1,2,3)]})
NOISE = {'one tip twice as noisy': [1,1,2]+[1]*7, 'one tip 5 times as noisy': [1,1,5]+[1]*7, 'baseline twice as noisy': [2]+[1]*9}


def still_in(ran, y, share, least):
    "`still_racing` for many reports at once: `(reports, arms)`"
    n = ran.sum(-1)
    alive = n==n.max(1, keepdims=True)
    means = np.where(alive, np.where(ran, y, 0).sum(-1)/np.maximum(n, 1), -np.inf)
    means[:,0] = np.inf
    keep = np.maximum(np.ceil(share*(alive.sum(1)-1)), least)[:,None]
    return alive & ((-means).argsort(1, kind='stable').argsort(1, kind='stable')<=keep)


def simulate(truth, seeds, race=False, noise=None, reports=1000, seed=0, share=.5, least=3):
    "Scores `(reports, arms, seeds)`, NaN where a tip was out, of as many trainings as `seeds` of all arms"
    rng, arms = np.random.default_rng(seed), len(truth)+1
    most = 2 + arms*(seeds-2)//2 if race else seeds
    y = rng.standard_normal((reports,arms,most))/2**.5*(np.ones(arms) if noise is None else np.asarray(noise))[:,None]
    y[:,1:] += np.asarray(truth, float)[:,None]
    if not race: return y
    ran, left = np.zeros(y.shape, bool), arms*(seeds-2)
    ran[:,:,:2] = True
    for s in range(2, most):
        alive = still_in(ran, y, share, least)
        if left<2: break
        if alive[0].sum()>left: alive &= still_in(ran, y, 0, left-1) # Of the last round the best only
        ran[:,:,s] = alive
        left -= alive[0].sum()
    return np.where(ran, y, np.nan)


def students_t(y, level=.95):
    "Low and high of each tip alone, as before"
    diffs = y[:,1:]-y[:,:1]
    n, mean = diffs.shape[-1], diffs.mean(-1)
    half = stats.t.isf((1-level)/2, n-1)*diffs.std(-1, ddof=1)/n**.5
    return mean-half, mean+half, mean


def favourites(y, difference):
    "The best of those that ran on all seeds"
    n = np.isfinite(y).sum(-1)[:,1:]
    return np.where(n==n.max(1, keepdims=True), difference, -np.inf).argmax(1)


def confirmed(truth, found, fav, noise=None, fresh=3, seed=1, level=.95):
    "Does the favourite pay on fresh seeds? As `confirm`"
    rng, i = np.random.default_rng(seed), np.arange(len(fav))
    noise = np.ones(len(truth)+1) if noise is None else np.asarray(noise, float)
    diffs = (rng.standard_normal((len(fav),fresh))*noise[1:][fav,None] - rng.standard_normal((len(fav),fresh))*noise[0])/2**.5
    diffs += np.asarray(truth, float)[fav,None]
    own, known, df = diffs.var(1, ddof=1), found.sd[i,fav]**2, found.df[i,fav]
    noisier = stats.f.sf(own/known, fresh-1, df)<.01
    variance = np.where(noisier, own, ((fresh-1)*own+df*known)/(fresh-1+df))
    return diffs.mean(1) > stats.t.isf((1-level)/2, np.where(noisier, fresh-1, fresh-1+df))*np.sqrt(variance/fresh)


def rate(x):
    "Share, and its standard error"
    return [round(float(np.mean(x)), 4), round(float(np.std(x)/len(x)**.5), 4)]


def measure(truth, seeds, method, noise=None, reports=1000, seed=0):
    "What the reports of a truth find"
    y, truth = simulate(truth, seeds, method=='race', noise, reports, seed), np.asarray(truth, float)
    found = intervals(y)
    low, high, difference = (found.low, found.high, found.difference) if method!='before' else students_t(y)
    pays, costs = low>0, high<0
    fav = favourites(y, difference)
    found_of = {f'{t:.3g}': rate((pays if t>0 else costs)[:,truth==t].mean(1)) for t in np.unique(truth) if t}
    res = dict(method=method, trainings=seeds*(len(truth)+1), reports=reports, false=rate((pays&(truth<=0) | costs&(truth>=0)).any(1)),
               false_pays=rate((pays&(truth<=0)).any(1)), found=found_of, best=rate(truth[fav]==truth.max()),
               seeds=round(float(np.isfinite(y[:,0]).sum(1).mean()), 1))
    # Before, the seeds that chose the favourite also judged it
    said = pays[np.arange(reports),fav] if method=='before' else confirmed(truth, found, fav, noise)
    return res | dict(favourite_pays=rate(said))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--reports', type=int, default=4000, help='of nine useless tips five times as many')
    p.add_argument('--out', type=Path, default=FILE)
    a = p.parse_args()
    rows = []
    for name, truth, noise in [*((k, t, None) for k, t in TRUTHS.items()), *((k, [0]*9, n) for k, n in NOISE.items())]:
        for seeds in (3, 5):
            for method in ('before', 'together', 'race'):
                rows.append(dict(truth=name, **measure(truth, seeds, method, noise, a.reports*(1 if any(truth) or noise else 5))))
                print({k: v for k, v in rows[-1].items() if k!='reports'}, flush=True)
    write_results(a.out, dict(environment=environment('numpy', 'scipy'), unit='standard deviation of a paired difference', points=POINTS,
                              truths={k: [round(x, 4) for x in t] for k, t in TRUTHS.items()}, noise=NOISE, rows=rows))


if __name__=='__main__': main()
