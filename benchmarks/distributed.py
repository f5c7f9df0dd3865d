"""One process against two with half the batch each, on one core of this CPU: the same results, and what a step costs more

    python benchmarks/distributed.py [--turns 5] [--steps 12] [--out FILE]
    python benchmarks/distributed.py --decode

Both processes share one core, so two of them could at best be as fast as one. Measured is the processor time of a step, of both processes together,
which others on the machine disturb less than the clock: what two need more is the overhead, for gradients that go from one to the other and for
doing small things twice. It says nothing about the gain of a second device. `--decode`: images a second of one core's processor
time from the photos of `benchmarks/decode.py` and from their `resized_copies`, in turn, to distributed_decode.json. Networks have GroupNorm, as batch norm sees each process's own batch.
"""
import argparse, os, random, socket, statistics as st, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

import timm
import torch
from fastai.callback.core import Callback
from fastai.data.all import CategoryBlock, DataBlock, parent_label
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import ImageBlock, IndexSplitter, Learner, PILImage, Resize, ResizeMethod, SGD, num_distrib, rank_distrib
from timm.layers import GroupNorm
import fastai_tricks.devices.distributed
from fastai_tricks.core.processes import from_all
from fastai_tricks.data.copies import resized_copies
from fastai_tricks.data.draft import PILImageDraft
from fastai_tricks.data.sample import sample_images

from common import environment, photos, write_results
from decode import by_fastai, make_photos

MODELS, BS, SIZE = ('resnet10t', 'resnet18'), 32, 64


class Steps(Callback):
    "When each training step ended, by the clock and by the processor time of this process"
    order, run_valid = 200, False
    def __init__(self): self.ends = []
    def after_batch(self):
        if self.training: self.ends.append((time.perf_counter(), time.process_time()))


def train(name, steps):
    files, valid = photos(sample_images(), 60, 3)
    set_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=IndexSplitter(valid), item_tfms=Resize(SIZE, ResizeMethod.Squish)) # No random crop, which each process would draw for itself
    train_items = random.Random(0).sample(sorted(set(range(len(files))) - set(valid)), steps*BS)
    keep = [files[i] for i in [*train_items, *valid]]
    block.splitter = IndexSplitter(range(len(train_items), len(keep)))
    dls = block.dataloaders(keep, bs=BS//max(1, num_distrib()), num_workers=0, device='cpu')
    model = timm.create_model(name, num_classes=dls.c, norm_layer=partial(GroupNorm, num_groups=8))
    flat = lambda: torch.cat([p.detach().flatten() for p in model.parameters()])
    began_with = flat()
    clock = Steps()
    learn = Learner(dls, model, metrics=accuracy, cbs=clock, opt_func=SGD) # Adam makes a difference of a step out of one of rounding
    with learn.no_bar(), learn.no_logging(), learn.accelerate_ctx(cpu=True): learn.fit(1, 1e-2)
    warm = 2 # The first steps allocate
    wall, cpu = ((b-a)/(len(clock.ends)-1-warm) for a, b in zip(clock.ends[warm], clock.ends[-1]))
    return dict(wall=wall, cpu=sum(from_all(cpu)), steps=len(clock.ends), parameters=sum(p.numel() for p in model.parameters()),
                train_items=len(train_items), valid_items=len(valid), valid_loss=learn.recorder.values[-1][1], accuracy=learn.recorder.values[-1][2],
                weights=flat(), moved=float((flat()-began_with).abs().max()))


def launch(n, steps, core, folder):
    "What the first of `n` processes measured"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    how = [] if n==1 else ['-m', 'torch.distributed.run', '--nproc_per_node', str(n), '--master_port', str(port)]
    out = folder/'run.pth'
    subprocess.run([sys.executable, '-W', 'ignore', *how, __file__, '--child', str(out), '--steps', str(steps)], check=True, timeout=600, stdout=subprocess.DEVNULL,
                   preexec_fn=lambda: os.sched_setaffinity(0, {core}), env={**os.environ, 'OMP_NUM_THREADS': '1'})
    return torch.load(out, weights_only=True)


def decode(rounds=9, n=12, side=256):
    "Images a second to a tensor, from photos and from small copies of them"
    ways = {(size, what, cls.__name__): by_fastai(cls, size) for size in (128, 224) for what in ('originals', 'copies') for cls in (PILImage, PILImageDraft)}
    rates = {k: [] for k in ways}
    with tempfile.TemporaryDirectory() as d:
        src, dest = Path(d)/'src', Path(d)/'dest'
        src.mkdir()
        make_photos(src, n)
        resized_copies(src, dest, sizes=(side,), n_workers=0)
        files = dict(originals=sorted(src.glob('*.jpg')), copies=sorted((dest/str(side)).glob('*.jpg')))
        assert len(files['copies'])==n
        for k, f in ways.items(): f(files[k[1]][0])
        for _ in range(rounds):
            for k, f in ways.items():
                began = time.process_time() # Others on the machine do not count
                for file in files[k[1]]: f(file)
                rates[k].append(n/(time.process_time()-began))
    summary = [dict(size=size, photos=what, way=way, n=rounds, images_per_second=st.mean(r), sd=st.stdev(r)) for (size, what, way), r in rates.items()]
    write_results(Path(__file__).parent/'distributed_decode.json', dict(photo='2000×1333', copies=side, images=n, environment=environment('pillow'), summary=summary))
    for s in summary: print(s)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--turns', type=int, default=5)
    p.add_argument('--steps', type=int, default=12)
    p.add_argument('--decode', action='store_true')
    p.add_argument('--child', type=Path, help=argparse.SUPPRESS)
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'distributed.json')
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.decode: return decode()
    if args.child:
        res = {name: train(name, args.steps) for name in MODELS}
        if not rank_distrib(): torch.save(res, args.child)
        return
    core, runs = max(os.sched_getaffinity(0)), []
    with tempfile.TemporaryDirectory() as d:
        for turn in range(args.turns):
            one, two = (launch(n, args.steps, core, Path(d)) for n in (1, 2))
            for name in MODELS:
                a, b = one[name], two[name]
                runs.append(dict(model=name, turn=turn, parameters=a['parameters'], steps=a['steps'], one_wall=a['wall'], two_wall=b['wall'], one=a['cpu'], two=b['cpu'], train_items=a['train_items'], valid_items=a['valid_items'],
                                 weights_moved=a['moved'], weights_apart=float((a['weights']-b['weights']).abs().max()), valid_loss_apart=abs(a['valid_loss']-b['valid_loss']), accuracy_apart=abs(a['accuracy']-b['accuracy'])))
                print({k: float(f'{v:.3g}') if isinstance(v, float) else v for k, v in runs[-1].items()}, flush=True)
    summary = []
    for name in MODELS:
        rs = [r for r in runs if r['model']==name]
        more = [1000*(r['two']-r['one']) for r in rs]
        summary.append(dict(model=name, n=len(rs), parameters=rs[0]['parameters'], steps=rs[0]['steps'], one_wall_ms=st.median(1000*r['one_wall'] for r in rs), two_wall_ms=st.median(1000*r['two_wall'] for r in rs),
                            one_ms=st.median(1000*r['one'] for r in rs), two_ms=st.median(1000*r['two'] for r in rs),
                            overhead_ms=st.median(more), overhead_ms_min=min(more), overhead_ms_max=max(more), ratio=st.median(r['two']/r['one'] for r in rs),
                            ratio_min=min(r['two']/r['one'] for r in rs), ratio_max=max(r['two']/r['one'] for r in rs),
                            **{k: max(r[k] for r in rs) for k in ('weights_moved', 'weights_apart', 'valid_loss_apart', 'accuracy_apart')}))
    write_results(args.out, dict(batch=BS, size=SIZE, cores_used=1, environment=environment('accelerate'), summary=summary, runs=runs))


if __name__=='__main__': main()
