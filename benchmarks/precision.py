"""What `to_mixed` chooses on this machine and whether that is faster, and what bf16 does to a fine-tuned network

    python benchmarks/precision.py speed        training steps of four networks at 128 and 224 px, each precision in turn
    python benchmarks/precision.py accuracy --data PATH     fp32 against bf16 after the same epochs, on the first classes of a folder per class
"""
import argparse, io, json, re, time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import timm
import torch
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import Learner, vision_learner
from fastai_tricks.all import lite0_weights, precision_report, sample_images
from common import environment, loaders, photos, write_results

FILE = Path(__file__).with_suffix('.json')
MODELS = 'resnet18', 'resnet50', 'tf_efficientnet_lite0', 'convnext_atto'

def save(part, res):
    all_ = json.loads(FILE.read_text()) if FILE.exists() else {}
    write_results(FILE, {**all_, part: dict(environment=environment(), **res)})

def speed(a):
    files, valid = photos(sample_images(), 4, 2)
    rows = []
    for name in a.models:
        for size in a.sizes:
            learn = Learner(loaders(files, valid, size, 0, bs=a.bs), timm.create_model(name, num_classes=36))
            out = io.StringIO()
            began = time.perf_counter()
            with redirect_stdout(out): learn.to_mixed()
            seconds, said = time.perf_counter()-began, re.sub(r'\s+', ' ', out.getvalue()).strip()
            dtype, last = ('bf16' if hasattr(learn, 'mixed_precision') else 'fp32'), hasattr(learn, 'channels_last')
            learn.from_mixed()
            with learn.no_logging(): df = precision_report(learn, turns=a.turns, compile=False, plot=False)
            row = df[(df['dtype']==dtype) & (df['channels_last']==last)].iloc[0]
            rows.append(dict(model=name, size=size, chose=row['variant'], said=said, seconds_to_choose=seconds, ratio=row['ratio'], ratio_min=row['ratio_min'], ratio_max=row['ratio_max'], n=int(row['n']),
                             variants=json.loads(df.drop(columns=['size','dtype']).to_json(orient='records'))))
            print(f"{name:22} {size} px: {row['variant']}, {row['ratio']:.2f} of fp32's speed ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})  [{said}, {seconds:.0f} s]", flush=True)
            print(df.drop(columns=['size','dtype','channels_last','compile']).to_string(float_format='{:.3f}'.format), flush=True)
            save('speed', dict(settings=dict(bs=a.bs, turns=a.turns, images='embedded pictures'), results=rows))

def fine_tune(dtype, seed, files, valid, a):
    learn = vision_learner(loaders(files, valid, a.size, seed), 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy)
    set_seed(seed)
    with learn.no_bar(), learn.no_logging():
        if dtype: learn.to_mixed(dtype)
        learn.fine_tune(a.epochs)
    return float(learn.recorder.values[-1][2]), float(learn.recorder.values[-1][1])

def compare(a):
    files, valid = photos(a.data, a.per_class, a.per_class)
    classes = sorted({f.parent.name for f in files})[:a.classes]
    keep = [i for i,f in enumerate(files) if f.parent.name in classes]
    files, valid = [files[i] for i in keep], [j for j,i in enumerate(keep) if i in set(valid)]
    settings = dict(model='tf_efficientnet_lite0, ImageNet weights', data=Path(a.data).name, classes=a.classes, size=a.size, fine_tune=a.epochs, train=len(files)-len(valid), valid=len(valid))
    old = json.loads(FILE.read_text()).get('accuracy', {}) if FILE.exists() else {}
    runs = old['runs'] if old.get('settings')==settings else []
    for seed in range(len(runs), a.seeds):
        acc = {k: fine_tune(d, seed, files, valid, a) for k,d in (('fp32',None), ('bf16',torch.bfloat16))}
        runs.append(dict(seed=seed, **{f'{k}_accuracy': v[0] for k,v in acc.items()}, **{f'{k}_valid_loss': v[1] for k,v in acc.items()}))
        print(runs[-1], flush=True)
        diff = 100*np.array([r['bf16_accuracy']-r['fp32_accuracy'] for r in runs])
        save('accuracy', dict(settings=settings, runs=runs,
             results=dict(n=len(runs), points=float(diff.mean()), points_sd=float(diff.std(ddof=1)) if len(runs)>1 else None, fp32=float(np.mean([r['fp32_accuracy'] for r in runs])))))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', choices=['speed','accuracy'])
    p.add_argument('--data', help='a folder per class')
    p.add_argument('--classes', type=int, default=24)
    p.add_argument('--per-class', type=int, default=12)
    p.add_argument('--models', nargs='*', default=MODELS)
    p.add_argument('--sizes', nargs='*', type=int, default=[128,224])
    p.add_argument('--bs', type=int, default=8)
    p.add_argument('--turns', type=int, default=7)
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--epochs', type=int, default=3)
    p.add_argument('--size', type=int, default=64)
    a = p.parse_args()
    if a.part=='accuracy' and not a.data: p.error('accuracy needs --data: a folder per class')
    (speed if a.part=='speed' else compare)(a)

if __name__=='__main__':
    main()
