"""What `to_mixed` chooses on this machine and whether that is faster, and what bf16 does to a fine-tuned network

    python benchmarks/precision.py speed --name amx         training steps of four networks at 128 and 224 px, each precision in turn
    python benchmarks/precision.py accuracy --name amx --data PATH [--weights FILE]     fp32 against bf16 after the same epochs, on the first classes of a folder per class
    python benchmarks/precision.py compile --name amx       training steps of two networks with `torch.compile` and without, in fp32 and bf16, and how long compiling takes

Results go to `precision_NAME.json`: name the kind of device. `--weights`: of timm's resnet18, which is then fine-tuned instead of lite0.
Runs of `accuracy` with other settings stand beside each other, and a killed one goes on.
"""
import argparse, io, itertools, json, os, re, time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import timm
import torch
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import Learner, vision_learner
from fastai_tricks.all import lite0_weights, sample_images
from fastai_tricks.core.timing import calls_in, interleaved, speedups, work_clock
from fastai_tricks.train.variants import dtype_names, start_trial, training_batch, Variant
from safetensors import safe_open
from common import environment, loaders, photos, write_results

MODELS = 'resnet18', 'resnet50', 'tf_efficientnet_lite0', 'convnext_atto'

def file(a): return Path(__file__).parent/f'precision_{a.name}.json'
def results(a): return json.loads(file(a).read_text()) if file(a).exists() else {}
def save(a, part, res): write_results(file(a), {**results(a), part: res})

def chosen(learn, turns, **kwargs):
    "What `to_mixed` chooses, and how it stands among all that `precision_report` measures; the latter's table"
    out = io.StringIO()
    began = time.perf_counter()
    with redirect_stdout(out): learn.to_mixed()
    seconds, said = time.perf_counter()-began, re.sub(r'\s+', ' ', out.getvalue()).strip()
    dtype, last = dtype_names[getattr(getattr(learn, 'mixed_precision', None), 'dtype', torch.float32)], hasattr(learn, 'channels_last')
    learn.from_mixed()
    with learn.no_logging(): df = learn.precision_report(turns=turns, compile=False, **kwargs).df
    row = df[(df['dtype']==dtype) & (df['channels_last']==last)].iloc[0]
    variants = json.loads(df.drop(columns=['size','dtype']).to_json(orient='records'))
    return dict(chose=row['variant'], said=said, seconds_to_choose=seconds, ratio=row['ratio'], ratio_min=row['ratio_min'], ratio_max=row['ratio_max'], n=int(row['n']), variants=variants), df

def speed(a):
    files, valid = photos(sample_images(), 4, 2)
    rows = []
    for name in a.models or MODELS:
        for size in a.sizes:
            learn = Learner(loaders(files, valid, size, 0, bs=a.bs), timm.create_model(name, num_classes=36))
            row, df = chosen(learn, a.turns)
            rows.append(dict(model=name, size=size, **row))
            print(f"{name:22} {size} px: {row['chose']}, {row['ratio']:.2f} of fp32's speed ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})  [{row['said']}, {row['seconds_to_choose']:.0f} s]", flush=True)
            print(df.drop(columns=['size','dtype','channels_last','compile']).to_string(float_format='{:.3f}'.format), flush=True)
            save(a, 'speed', dict(environment=environment(), settings=dict(bs=a.bs, turns=a.turns, images='embedded pictures'), results=rows))

def cpu_seconds(): return sum(os.times()[:4]) # Of this process and of the compilers that it started

def compile(a):
    torch.compiler.config.force_disable_caches = True # What was compiled once is not compiled again
    torch._inductor.config.compile_threads = 1
    files, valid = photos(sample_images(), 4, 2)
    clock, rows = work_clock(torch.device('cpu')), []
    for dtype, name in itertools.product((torch.float32, torch.bfloat16), a.models or ('resnet18','tf_efficientnet_lite0')):
        learn = Learner(loaders(files, valid, a.sizes[0], 0, bs=a.bs), timm.create_model(name, num_classes=36))
        xb, yb = training_batch(learn, a.bs)
        torch.compiler.reset()
        plain, began = start_trial(learn, xb, yb, Variant(dtype), n_losses=2), cpu_seconds()
        fast = start_trial(learn, xb, yb, Variant(dtype, compiled=True), n_losses=2)
        compiling = cpu_seconds()-began
        plain.times, fast.times = interleaved([plain.step, fast.step], a.turns, calls_in(plain.step, .3), clock=clock)
        ratios = speedups(plain.times, fast.times)
        step, after = (float(np.median(t.times)) for t in (plain, fast))
        row = dict(model=name, size=a.sizes[0], bs=a.bs, dtype=dtype_names[dtype], compile_s=compiling, step_s=step, compiled_step_s=after, n=len(ratios),
                   ratio=float(np.median(ratios)), ratio_min=min(ratios), ratio_max=max(ratios), loss_diff=max(abs(x-y) for x,y in zip(plain.losses, fast.losses)))
        row['pays_after_minutes'] = compiling/(1-1/row['ratio'])/60 if row['ratio']>1 else None
        rows.append(row)
        print(row, flush=True)
        save(a, 'compile', dict(environment=environment(), settings=dict(turns=a.turns, images='embedded pictures', seconds='of the CPU'), results=rows))

def make_learner(dls, a):
    if not a.weights: return vision_learner(dls, 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy)
    with safe_open(a.weights, 'pt') as f: n = len(f.metadata()['classes'].split(','))
    return vision_learner(dls, 'resnet18', pretrained_cfg_overlay=dict(file=a.weights, num_classes=n), metrics=accuracy)

def fine_tune(dtype, seed, files, valid, a):
    learn = make_learner(loaders(files, valid, a.size, seed), a)
    set_seed(seed)
    with learn.no_bar(), learn.no_logging():
        if dtype: learn.to_mixed(dtype)
        learn.fine_tune(a.epochs, a.lr)
    return float(learn.recorder.values[-1][2]), float(learn.recorder.values[-1][1])

def compare(a):
    files, valid = photos(a.data, a.per_class, a.valid_per_class, classes=a.classes)
    settings = dict(model='resnet18, weights given' if a.weights else 'tf_efficientnet_lite0, ImageNet weights', data=Path(a.data).name, classes=len({f.parent for f in files}), size=a.size, fine_tune=a.epochs, lr=a.lr, train=len(files)-len(valid), valid=len(valid))
    others = [o for o in results(a).get('accuracy', []) if o['settings']!=settings]
    runs = next((o['runs'] for o in results(a).get('accuracy', []) if o['settings']==settings), [])
    for seed in range(len(runs), a.seeds):
        acc = {k: fine_tune(d, seed, files, valid, a) for k,d in (('fp32',None), ('bf16',torch.bfloat16))}
        runs.append(dict(seed=seed, **{f'{k}_accuracy': v[0] for k,v in acc.items()}, **{f'{k}_valid_loss': v[1] for k,v in acc.items()}))
        print(runs[-1], flush=True)
        diff = 100*np.array([r['bf16_accuracy']-r['fp32_accuracy'] for r in runs])
        res = dict(n=len(runs), points=float(diff.mean()), points_sd=float(diff.std(ddof=1)) if len(runs)>1 else None, fp32=float(np.mean([r['fp32_accuracy'] for r in runs])))
        save(a, 'accuracy', [*others, dict(environment=environment(), settings=settings, runs=runs, results=res)])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', choices=['speed','accuracy','compile'])
    p.add_argument('--name', default='here', help='of the device, in the name of the JSON')
    p.add_argument('--data', help='a folder per class')
    p.add_argument('--weights', help="of timm's resnet18, a safetensors file that names its classes")
    p.add_argument('--classes', type=int, default=96)
    p.add_argument('--per-class', type=int, default=8)
    p.add_argument('--valid-per-class', type=int, default=24)
    p.add_argument('--lr', type=float, default=2e-3)
    p.add_argument('--models', nargs='*')
    p.add_argument('--sizes', nargs='*', type=int, default=[128,224])
    p.add_argument('--bs', type=int, default=8)
    p.add_argument('--turns', type=int, default=7)
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--epochs', type=int, default=3)
    p.add_argument('--size', type=int, default=64)
    a = p.parse_args()
    if a.part=='accuracy' and not a.data: p.error('accuracy needs --data: a folder per class')
    dict(speed=speed, accuracy=compare, compile=compile)[a.part](a)

if __name__=='__main__':
    main()
