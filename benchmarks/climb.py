"""What the ladder from few classes to all is worth (tip 2)

carry    one validation set: weights carried up 10, 20, all classes, against training on all from the start
         for the same time, and against the last rung alone. Variants run in turn, seed after seed
signal   seconds until the cross-validation of 10 classes is there, against that of all classes, in turn

    python benchmarks/climb.py carry --data PATH      a folder per class
    python benchmarks/climb.py signal --data PATH

Results are written after each run and go on where a killed run stopped.
"""
import argparse, json, shutil, tempfile, time
from functools import partial
from pathlib import Path

import numpy as np
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, parent_label
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import ImageBlock, Resize, aug_transforms, vision_learner
from fastai_tricks.all import PILImageDraft, class_ladder, cross_validate, lite0_weights
from fastai_tricks.cv.climb import accuracy_on
from common import TrainClock, environment, photos, write_results

EPOCHS, RUNGS = 2, (10, 20, None)
# Rungs and the epochs of each, beside one with a frozen body; 3 epochs on all cost about what the three rungs do
VARIANTS = {'ladder 10, 20, all': (RUNGS, EPOCHS), 'all from the start, same time': ((None,), EPOCHS+1), 'last rung alone': ((None,), EPOCHS)}

def make_learner(dls, cbs=None):
    return vision_learner(dls, 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy, cbs=cbs)

def blocks(files, valid, size):
    return DataBlock((ImageBlock(PILImageDraft), CategoryBlock), get_y=parent_label, splitter=IndexSplitter(valid), item_tfms=Resize(size), batch_tfms=aug_transforms())

def carry(name, seed, files, valid, size, bs):
    rungs, epochs = VARIANTS[name]
    block, learn, clock = blocks(files, valid, size), None, TrainClock()
    ladder = class_ladder(block, files, RUNGS, by='random', seed=seed)
    set_seed(seed)
    curve = []
    for n in rungs:
        dls = block.class_subset(ladder[RUNGS.index(n)]).dataloaders(files, bs=bs, num_workers=0)
        if learn is None: learn = make_learner(dls, clock)
        else: learn.grow_head(dls)
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(epochs, freeze_epochs=1)
        curve.append(dict(classes=dls.c, seconds=clock.seconds, accuracy=clock.curve[-1][-1]))
    with learn.no_bar(): preds, targs = learn.get_preds()
    return dict(variant=name, seed=seed, epochs=epochs, accuracy=float(accuracy(preds, targs)), first_accuracy=accuracy_on(preds, targs, learn.dls.vocab, ladder[0]),
                seconds=clock.seconds, images=clock.images, curve=curve)

def signal(name, seed, files, valid, size, bs):
    block = blocks(files, valid, size)
    out = Path(tempfile.mkdtemp())
    began = time.perf_counter()
    subset = block.class_subset(10 if name=='10 classes' else None, by='random', seed=seed)
    cv = cross_validate(make_learner, subset, files, fit=partial(fine_tune, epochs=EPOCHS), n_splits=5, seed=seed, out=out, bs=bs, num_workers=0)
    shutil.rmtree(out)
    return dict(variant=name, seed=seed, seconds=time.perf_counter()-began, images=len(cv.items), accuracy=float(cv.scores.accuracy.mean()), accuracy_sd=float(cv.scores.accuracy.std()))

def fine_tune(learn, epochs): learn.fine_tune(epochs)

def summary(runs, base):
    "Per variant mean and standard deviation; seconds as ratio to `base` of the same seed"
    res = {}
    for v in dict.fromkeys(r['variant'] for r in runs):
        own = [r for r in runs if r['variant']==v]
        of = {r['seed']: r for r in runs if r['variant']==base}
        ratio = [r['seconds']/of[r['seed']]['seconds'] for r in own if r['seed'] in of]
        cols = {k: [r[k] for r in own] for k in ('accuracy','first_accuracy','seconds','images') if k in own[0]} | dict(ratio=ratio)
        res[v] = dict(n=len(own), **{f'{k}{s}': float(f(o)) for k,o in cols.items() if o for s,f in (('', np.mean), ('_sd', partial(np.std, ddof=1))) if not s or len(o)>1})
        if 'accuracy' in own[0] and base in [r['variant'] for r in runs]:
            diff = [r['accuracy']-of[r['seed']]['accuracy'] for r in own if r['seed'] in of]
            res[v] |= dict(accuracy_gain=float(np.mean(diff)), accuracy_gain_sd=float(np.std(diff, ddof=1)) if len(diff)>1 else None)
    return res

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', choices=['carry','signal'])
    p.add_argument('--data', required=True)
    p.add_argument('--seeds', type=int, nargs='*', default=[0,1,2])
    p.add_argument('--size', type=int, help='pixels; default 96 for carry, 64 for signal')
    p.add_argument('--per-class', type=int, default=16)
    p.add_argument('--bs', type=int, default=32)
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    size, out = a.size or (96 if a.part=='carry' else 64), a.out or Path(__file__).with_name(f'climb_{a.part}.json')
    files, valid = photos(a.data, a.per_class, 8)
    settings = dict(model='tf_efficientnet_lite0', size=size, bs=a.bs, rungs=RUNGS, fit=f'fine_tune({EPOCHS}) at each rung', train=len(files)-len(valid), valid=len(valid), folds=5 if a.part=='signal' else None)
    res = json.loads(out.read_text()) if out.exists() else dict(environment=environment(), settings=json.loads(json.dumps(settings)), runs=[])
    if res['settings']!=json.loads(json.dumps(settings)): raise SystemExit(f'{out} holds runs of other settings: delete it, or choose another --out')
    names = list(VARIANTS) if a.part=='carry' else ['10 classes','all classes']
    for seed in a.seeds:
        for name in names[seed%len(names):] + names[:seed%len(names)]:
            if any(r['variant']==name and r['seed']==seed for r in res['runs']): continue
            res['runs'].append((carry if a.part=='carry' else signal)(name, seed, files, valid, size, a.bs))
            r = res['runs'][-1]
            print(f"seed {seed}  {name:30} accuracy {r['accuracy']:.3f}  {r['seconds']:.0f} s", flush=True)
            res['results'] = summary(res['runs'], names[1])
            write_results(out, res)

if __name__=='__main__':
    main()
