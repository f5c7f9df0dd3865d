"""Minutes asked of `fit_fast(minutes=)`, planned, and taken by the wall clock

    python benchmarks/minutes.py --data PATH     PATH is a folder per class

Each run is a new Learner: tf_efficientnet_lite0 with ImageNet weights, or timm's resnet10t from scratch, with and without workers and callbacks. The
machine is as it is, with whatever else it does: the load of its cores is noted. Results are written after each run; a killed benchmark goes on where it
stopped.
"""
import argparse, json, os, statistics as st, tempfile, time
from pathlib import Path

import torch
from fastai.callback.tracker import SaveModelCallback
from fastai.metrics import accuracy
from fastai.vision.all import vision_learner
import fastai_tricks.fast.minutes as minutes_module
from fastai_tricks.all import WatchCAM, lite0_weights

from common import environment, loaders, photos, write_results

FILE = Path(__file__).with_suffix('.json')
SETTINGS = dict(size=64, bs=32, per_class=40, valid_per_class=10)
# Weights, workers, callbacks, minutes
RUNS = [('ImageNet', 0, '', 1), ('ImageNet', 2, '', 1), (None, 0, '', 1), (None, 2, '', 1), ('ImageNet', 0, 'checkpoints, WatchCAM', 1),
        ('ImageNet', 0, '', .15), ('ImageNet', 0, '', .4), (None, 0, 'checkpoints', .5), ('ImageNet', 0, '', 2), ('ImageNet', 2, '', 2), (None, 0, '', 2)]


def callbacks(names): return ([SaveModelCallback(monitor='accuracy', every_epoch=True)] if 'checkpoints' in names else []) + ([WatchCAM(n=4)] if 'CAM' in names else [])


def train(weights, workers, names, minutes, files, valid, folder):
    "One run: what was planned, what was done, what it took"
    dls = loaders(files, valid, SETTINGS['size'], 0, bs=SETTINGS['bs'], num_workers=workers)
    kw = dict(pretrained_cfg_overlay=dict(file=str(lite0_weights()))) if weights else dict(pretrained=False)
    learn = vision_learner(dls, 'tf_efficientnet_lite0' if weights else 'resnet10t', metrics=accuracy, path=folder, **kw)
    lines, say = [], minutes_module.say
    minutes_module.say = lambda learn, msg: lines.append(msg)
    began = time.perf_counter()
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit_fast(minutes=minutes, cbs=callbacks(names))
    except ValueError as e: lines.append(f'refused: {e}') # Too few minutes
    finally: minutes_module.say = say
    taken = (time.perf_counter() - began)/60
    rows, lrs = (learn.recorder.values, learn.recorder.lrs) if getattr(learn.recorder, 'lrs', None) else ([], [])
    return dict(plan=lines[0], taken=taken, ratio=taken/minutes, epochs=len(rows), accuracy=float(learn.validate()[1]), steps=len(lrs),
                last_rate=float(lrs[-1]/max(lrs)) if lrs else None, load=os.getloadavg()[0])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True, help='a folder per class')
    p.add_argument('--out', type=Path, default=FILE)
    a = p.parse_args()
    files, valid = photos(a.data, SETTINGS['per_class'], SETTINGS['valid_per_class'])
    settings = dict(SETTINGS, data=Path(a.data).name, train=len(files)-len(valid), valid=len(valid))
    res = json.loads(a.out.read_text()) if a.out.exists() else dict(environment=environment(), settings=settings, runs=[])
    if res['settings']!=settings: raise SystemExit(f'{a.out} holds runs of other settings: delete it, or choose another --out')
    for weights, workers, names, minutes in RUNS:
        key = dict(weights=weights, workers=workers, callbacks=names, minutes=minutes)
        if any(key.items()<=r.items() for r in res['runs']): continue
        with tempfile.TemporaryDirectory() as folder: r = dict(key, **train(weights, workers, names, minutes, files, valid, Path(folder)))
        res['runs'].append(r)
        trained = [r['ratio'] for r in res['runs'] if r['steps']>1] # Not the head alone, which takes what it takes
        if trained: res['summary'] = dict(n=len(trained), median=st.median(trained), min=min(trained), max=max(trained))
        write_results(a.out, res)
        print(r, flush=True)
    print(res['summary'])


if __name__=='__main__':
    torch.set_num_threads(1)
    main()
