"""Does a gain at the short trainings of a report say what it is in longer ones? `fit_fast` against `fine_tune`, at lengths that double

    python benchmarks/lengths.py --data PATH [--sets cells caltech] [--seconds 8] [--doublings 3]

From half of the first length and that length, `gain_at` says what the longer ones will show; then they are trained, too.
Written to lengths.json beside this script, set by set.
"""
import argparse, json, os
from pathlib import Path

from fastai.data.all import CategoryBlock, DataBlock, parent_label
from fastai.metrics import accuracy
from fastai.vision.all import ImageBlock, Resize, aug_transforms
from fastai_tricks.all import lite0_weights
from fastai_tricks.report.bench import Bench
from fastai_tricks.report.data import read_data
from fastai_tricks.report.plan import pace_of, training_within, valid_parts
from fastai_tricks.report.report import _environment
from fastai_tricks.report.result import gain_at
from fastai_tricks.report.tips import Recipe, Tip
from common import write_results
from tips_report import source_of

FILE = Path(__file__).with_suffix('.json')
TIP = Tip('fit_fast', train='learn.fit_fast({epochs})', chooses=True)


def bench_of(name, a):
    files, splitter = source_of(name, a.data)
    dblock = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=splitter, item_tfms=Resize(a.size), batch_tfms=aug_transforms())
    data = read_data(dblock, files, a.bs, dict(num_workers=0))
    weights = dict(pretrained_cfg_overlay=dict(file=lite0_weights().name))
    return Bench(data, Recipe('tf_efficientnet_lite0', accuracy, 'fine_tune', a.bs, learner=weights, data=dict(num_workers=0)))


def difference(bench, seconds, seed, paces):
    "Score of `fit_fast` minus that of `fine_tune`, trained for the same seconds"
    parts, res = valid_parts(bench.data.n_valid, 200, 1., True), []
    for tips in ([], [TIP]):
        epochs, images = training_within(seconds, paces[len(tips)], bench.data.n, bench.data.bs)
        res.append(bench.train(tips, seed, epochs, images, parts=parts))
    return res


def measured(name, a):
    bench = bench_of(name, a)
    paces = [pace_of([bench.measure(tips), bench.measure(tips, 6)]) for tips in ([], [TIP])]
    runs = []
    for seed in range(a.seeds):
        for d in range(-1, a.doublings+1):
            for how, r in zip(('fine_tune', 'fit_fast'), difference(bench, a.seconds*2**d, 2000+seed, paces)):
                runs.append(dict(how=how, seed=seed, doublings=d, score=r['score'], seconds=r['seconds'], images=r['images'], epochs=r['epochs']))
                print(name, runs[-1], flush=True)
    return runs


def said(runs, doublings, seeds):
    "For each longer training: what was said, with its interval, and what was seen"
    score = {(r['how'], r['seed'], r['doublings']): r['score'] for r in runs}
    diffs = {d: [score['fit_fast', s, d]-score['fine_tune', s, d] for s in range(seeds)] for d in range(-1, doublings+1)}
    res = []
    for d in range(1, doublings+1):
        mean, low, high = gain_at(diffs[0], diffs[-1], d)
        seen = sum(diffs[d])/seeds
        res.append(dict(doublings=d, said=mean, low=low, high=high, seen=seen, within=bool(low<=seen<=high)))
    return dict(half=sum(diffs[-1])/seeds, whole=sum(diffs[0])/seeds, longer=res)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True, type=Path)
    p.add_argument('--sets', nargs='+', default=['cells', 'caltech'])
    p.add_argument('--seconds', type=float, default=8)
    p.add_argument('--doublings', type=int, default=3)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--bs', type=int, default=32)
    a = p.parse_args()
    a.data = a.data.resolve()
    os.chdir(lite0_weights().parent) # So that no path of this machine stands in the results
    for name in a.sets:
        runs = measured(name, a)
        old = json.loads(FILE.read_text()) if FILE.exists() else {}
        write_results(FILE, old | {name: dict(seconds=a.seconds, size=a.size, environment=_environment(), runs=runs, **said(runs, a.doublings, a.seeds))})


if __name__=='__main__': main()
