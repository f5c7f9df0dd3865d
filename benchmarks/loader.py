"""What a cache of decoded images is worth: images/s of the loader alone, memory, and whole trainings

    python benchmarks/loader.py [--data FOLDER] [--parts rates memory end_to_end] [--weights FILE] [--out FILE]

`rates`: images/s from JPEGs to batches of bytes on the CPU, before batch transforms, for the ways of `benchmarks/loader_ways.py`; packages that are not
installed are named and left out. The first epoch includes all that is done before it (scanning, copying, writing shards, compiling), the start of
workers and the first batch; the second one the start of workers (fastai starts them for each epoch), and takes `--seconds` at least: epochs of small sets
are repeated within it. `memory`: PSS of the whole process tree, without libraries, in processes of their own. `end_to_end`: seconds and accuracy of `fine_tune(4)`.
All are interleaved: each round measures every way once, and a ratio is of one round. Each part replaces that part of `--out`.

Photos are those of `--data` (a folder per class), else the embedded pictures, enlarged, with some grain, JPEG quality 90.
"""
import argparse, gc, json, os, re, statistics as st, subprocess, sys, tempfile, time, warnings
from pathlib import Path

import numpy as np
import timm
import torch
from fastai.data.all import get_image_files
from fastai.vision.all import (CategoryBlock, DataBlock, Image, ImageBlock, IndexSplitter, Learner, Resize, accuracy, aug_transforms, parent_label, set_seed,
                               vision_learner)
from fastai_tricks.data.cache import cached
from fastai_tricks.data.sample import sample_images

from common import environment, photos, write_results
from loader_ways import ALONE, BS, MIN_SCALE, SAME_AGAIN, WAYS, YARDSTICKS, Job, fastai_block, fastai_loader, missing, quietly

HERE = Path(__file__).resolve()
HZ = os.sysconf('SC_CLK_TCK')
GRAIN = 6 # Levels (standard deviation): enlarged photos alone would be smaller files than a camera's


# Photos ---------------------------------------------------------------------------------------------------------------------------

def enlarge(file, out, wh, seed):
    "A JPEG of `wh` px"
    im = Image.open(file)
    # What is transparent becomes white
    if im.mode in ('P', 'LA', 'RGBA'): im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im.convert('RGBA'))
    a = np.asarray(im.convert('RGB').resize(wh, Image.Resampling.BICUBIC), dtype=np.float32)
    grain = np.random.default_rng(seed).standard_normal((wh[1], wh[0], 1), dtype=np.float32)*GRAIN
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((a+grain).clip(0, 255).astype(np.uint8)).save(out, quality=90)


def make_photos(source, folder, wh, n):
    "`n` photos, spread over up to 20 classes; `{bytes, ...}` of them"
    folders = sorted(p for p in Path(source).iterdir() if p.is_dir())
    step = max(1, len(folders)//20)
    piles = [sorted(get_image_files(p)) for p in folders[::step][:20]]
    files = [p[i] for i in range(max(map(len, piles))) for p in piles if i<len(p)]
    for i in range(n): enlarge(files[i%len(files)], folder/files[i%len(files)].parent.name/f'{i:05d}.jpg', wh, i)
    size = sum(f.stat().st_size for f in folder.rglob('*.jpg'))
    return dict(photos=n, wh=list(wh), bytes_per_photo=round(size/n), bytes_per_pixel=round(size/n/wh[0]/wh[1], 3))


# The process tree ---------------------------------------------------------------------------------------------------------------

def tree(root=None):
    "This process and all that come of it: `{pid: fields of its stat from the third on}`"
    stats = {}
    for p in Path('/proc').glob('[0-9]*/stat'):
        try: stats[int(p.parent.name)] = p.read_text().rpartition(')')[2].split()
        except OSError: pass # It has ended meanwhile
    res, todo = {}, [root or os.getpid()]
    while todo:
        pid = todo.pop()
        if pid in stats: res[pid] = stats[pid]
        todo += [k for k, v in stats.items() if int(v[1])==pid]
    return res


def tree_cpu():
    "CPU seconds of the tree, those of children that have ended too"
    return sum(sum(map(int, v[11:15])) for v in tree().values())/HZ


def tree_pss(folder=None):
    "Bytes of memory that the tree has, and of files in `folder` that it maps; what processes share counts once, libraries do not"
    total = 0
    for pid in tree():
        # What is had of a library depends on who else on the machine has it open
        try: text = Path(f'/proc/{pid}/smaps_rollup').read_text()
        except OSError: continue
        total += sum(int(n) for n in re.findall(r'^Pss_(?:Anon|Shmem):\s+(\d+)', text, re.M))
        if folder: total += _mapped(pid, str(folder))
    return 1024*total


def _mapped(pid, folder):
    "kB of files in `folder`"
    total, ours = 0, False
    for line in Path(f'/proc/{pid}/smaps').read_text().splitlines():
        if line.startswith('Pss:') and ours: total += int(line.split()[1])
        elif '-' in line.partition(' ')[0]: ours = folder in line
    return total


# Rates ----------------------------------------------------------------------------------------------------------------------------

def run_epochs(epochs, k):
    "Images, seconds, seconds to the first batch and CPU seconds of `k` epochs"
    images, first, cpu, began = 0, None, tree_cpu(), time.perf_counter()
    for x, y in epochs(k):
        first = first or time.perf_counter()-began
        assert x.dtype==torch.uint8 and len(x)==len(y)
        images += len(x)
    return images, time.perf_counter()-began, first, tree_cpu()-cpu


def measure(name, job, seconds):
    "One way: its first epoch, from photos in a folder on, and its second"
    began = time.perf_counter()
    epochs = WAYS[name](job)
    setup = time.perf_counter()-began
    res, n = dict(way=name, setup=setup), len(job.files)
    last = run_epochs(epochs, 1)
    if name not in YARDSTICKS: res.update(first=last[0]/(setup+last[1]), first_batch=last[2])
    again, k = name in SAME_AGAIN and last[1]>=seconds, 1
    while not again:
        last = run_epochs(epochs, k)
        again = last[1]>=seconds
        k = max(k+1, int(1.3*k*seconds/last[1])+1)
    images, wall, _, cpu = last
    res.update(second=images/wall, cpu_ms=1000*cpu/images, epochs=round(images/n))
    return res


def cells(args):
    "`(crop, size, workers, ways)` of each group that is compared"
    there = [w for w in WAYS if w not in args.missing and (not args.ways or w in (*args.ways, 'fastai'))]
    for crop, sizes in (('Resize', args.sizes), ('RandomResizedCrop', args.crop_sizes)):
        for size in sizes:
            for workers in args.workers:
                yield crop, size, workers, [w for w in there if workers or w in (*ALONE, *YARDSTICKS)]


def rates(args, sets):
    rows = []
    for rnd in range(args.rounds):
        for folder, wh in sets:
            for crop, size, workers, ways in cells(args):
                r = rnd%len(ways)
                for name in ways[r:] + ways[:r]:
                    with tempfile.TemporaryDirectory(dir=args.tmp) as tmp:
                        row = measure(name, Job(folder, wh, size, crop, workers, Path(tmp)), args.seconds)
                    gc.collect()
                    rows.append(dict(round=rnd, photo=max(wh), crop=crop, size=size, workers=workers, **row))
                    say(rows[-1])
    return dict(bs=BS, min_scale=MIN_SCALE, seconds=args.seconds, rounds=args.rounds, missing=args.missing, summary=summarise(rows))


def spread(xs):
    "Median, least and greatest"
    return dict(median=sig(st.median(xs)), min=sig(min(xs)), max=sig(max(xs)))


def sig(x): return float(f'{x:.4g}')


def summarise(rows):
    "For each group and way: images/s, and the ratio to fastai and to numpy's copy in the same round"
    keys = ('photo', 'crop', 'size', 'workers')
    def group(r): return tuple(r[k] for k in keys)
    by = {(*group(r), r['way'], r['round']): r for r in rows}
    res = []
    for g in dict.fromkeys(map(group, rows)):
        for way in dict.fromkeys(r['way'] for r in rows if group(r)==g):
            rs = [r for r in rows if group(r)==g and r['way']==way]
            row = dict(zip(keys, g), way=way, n=len(rs), epochs=round(st.median(r['epochs'] for r in rs)))
            for k in ('setup', 'first_batch', 'first', 'second', 'cpu_ms'):
                if k in rs[0]: row[k] = spread([r[k] for r in rs])
            for k in ('first', 'second'):
                if k in rs[0]: row[f'{k}_to_fastai'] = spread([r[k]/by[(*g, 'fastai', r['round'])][k] for r in rs])
            copies = [by.get((*g, YARDSTICKS[0], r['round'])) for r in rs]
            if all(copies): row['copy_to_second'] = spread([c['second']/r['second'] for c, r in zip(copies, rs)])
            res.append(row)
    return res


# Memory ---------------------------------------------------------------------------------------------------------------------------

def wait_idle(most=60):
    "Until workers have filled their queues: a loader that is slow has as many batches under way then as one that is fast"
    began, idle = time.perf_counter(), 0
    while idle<3 and time.perf_counter()-began<most:
        cpu = tree_cpu()
        time.sleep(.1)
        idle = idle+1 if tree_cpu()-cpu<=.02 else 0


def memory_of(folder, wh, way, workers, size, tmp):
    "In a process of its own: the greatest memory of the tree in the first epoch and in the second, and what the cache said it would take"
    job = Job(Path(folder), wh, size, 'Resize', workers, Path(tmp))
    block = fastai_block(job)
    if way!='fastai': block = cached(block, where=way, folder=Path(tmp)/'cache')
    dl = fastai_loader(block, job.files, workers, bs=32)
    res = dict(way=way, workers=workers, before=tree_pss(tmp))
    for epoch in ('first', 'second'):
        looks = []
        for i, _ in enumerate(dl):
            if i%4==0:
                wait_idle()
                looks.append(tree_pss(tmp))
        res[epoch] = max(looks)
    if way!='fastai': res['buffer'] = sum(p.nbytes for p in dl.dataset.tls[0].tfms.fs[-1].cache.plans)
    return res


def memory(args, sets):
    folder, wh = sets[0]
    rows = []
    for rnd in range(args.memory_rounds):
        for workers in args.memory_workers:
            for way in ('fastai', 'memory', 'disk'):
                with tempfile.TemporaryDirectory(dir=args.tmp) as tmp:
                    given = json.dumps(dict(folder=str(folder), wh=list(wh), way=way, workers=workers, size=args.sizes[-1], tmp=tmp))
                    done = subprocess.run([sys.executable, '-W', 'ignore', str(HERE), '--child', given], check=True, stdout=subprocess.PIPE, text=True)
                rows.append(dict(round=rnd, **json.loads(done.stdout.splitlines()[-1])))
                say(rows[-1])
    plain = {(r['workers'], r['round']): r for r in rows if r['way']=='fastai'}
    summary = []
    for workers in args.memory_workers:
        for way in ('fastai', 'memory', 'disk'):
            rs = [r for r in rows if (r['way'], r['workers'])==(way, workers)]
            row = dict(way=way, workers=workers, n=len(rs), **{f'{k}_mb': spread([r[k]/1e6 for r in rs]) for k in ('first', 'second')})
            if way!='fastai':
                row['buffer_mb'] = sig(rs[0]['buffer']/1e6)
                # More than fastai's loader has, in buffers
                for k in ('first', 'second'): row[f'{k}_buffers'] = spread([(r[k]-plain[workers, r['round']][k])/r['buffer'] for r in rs])
            summary.append(row)
    return dict(photo=f'{wh[0]}×{wh[1]}', photos=len(list(folder.rglob('*.jpg'))), size=args.sizes[-1], bs=32, rounds=args.memory_rounds, summary=summary)


# Whole trainings ------------------------------------------------------------------------------------------------------------------

def train(args, files, valid, way, seed, tmp):
    "Seconds of all from the DataBlock on, and the accuracy in the end"
    set_seed(seed)
    began = time.perf_counter()
    block = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=IndexSplitter(valid), item_tfms=Resize(args.train_size), batch_tfms=aug_transforms())
    if way!='fastai': block = cached(block, where=way, folder=tmp/'cache')
    dls = quietly(block.dataloaders, files, bs=32, num_workers=args.train_workers)
    if args.weights: learn = vision_learner(dls, args.arch, pretrained_cfg_overlay=dict(file=str(args.weights)), metrics=accuracy)
    else: learn = Learner(dls, timm.create_model(args.arch, num_classes=dls.c), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(4)
    return dict(way=way, seed=seed, seconds=time.perf_counter()-began, accuracy=float(learn.recorder.values[-1][-1]))


def training_sets(args):
    "Photos as they are in `--data`, and enlarged to the largest size"
    small = photos(args.source, *args.per_class, classes=args.classes)
    few, valid = photos(args.source, *args.per_class_large, classes=args.classes)
    large = [args.tmp/'large'/f.parent.name/f'{f.stem}.jpg' for f in few]
    for i, (f, out) in enumerate(zip(few, large)): enlarge(f, out, args.photos[-1][0], i)
    return {'as they are': small, f'{args.photos[-1][0][0]} px': (large, valid)}


def small_files(sets): return next(iter(sets.values()))[0]


def end_to_end(args, _):
    rows, sets = [], training_sets(args)
    ways = ['fastai', 'memory', 'disk']
    for seed in args.seeds:
        for name, (files, valid) in sets.items():
            for way in ways[seed%3:] + ways[:seed%3]:
                with tempfile.TemporaryDirectory(dir=args.tmp) as tmp: rows.append(dict(photos=name, **train(args, files, valid, way, seed, Path(tmp))))
                say(rows[-1])
    plain = {(r['photos'], r['seed']): r for r in rows if r['way']=='fastai'}
    summary = []
    for name, (files, valid) in sets.items():
        for way in ways:
            rs = [r for r in rows if (r['photos'], r['way'])==(name, way)]
            base = [plain[name, r['seed']] for r in rs]
            summary.append(dict(photos=name, train=len(files)-len(valid), valid=len(valid), way=way, n=len(rs), seconds=spread([r['seconds'] for r in rs]),
                                speedup=spread([b['seconds']/r['seconds'] for b, r in zip(base, rs)]), accuracy=spread([r['accuracy'] for r in rs]),
                                accuracy_more=spread([r['accuracy']-b['accuracy'] for b, r in zip(base, rs)])))
    return dict(arch=args.arch, classes=len({f.parent.name for f in small_files(sets)}), pretrained=bool(args.weights), size=args.train_size, workers=args.train_workers, bs=32, seeds=len(args.seeds), summary=summary)


# Verdicts -------------------------------------------------------------------------------------------------------------------------

def _line(what, wanted, found, ok): return f'{"reached" if ok else "MISSED"}: {what}: {found} (wanted: {wanted})'


def _rate_verdicts(summary):
    for way in ('cached, memory', 'cached, disk'):
        rows = [r for r in summary if r['way']==way]
        at = [r for r in rows if r['crop']=='Resize' and r['size']==160]
        for key, rs, good, wanted, what in (
                ('second_to_fastai', at, lambda v: v>=10, '10 or more', "second epoch at 160 px, times fastai's"),
                ('copy_to_second', at, lambda v: v<=1.5, '1.5 or less', "second epoch at 160 px, numpy's copy in times of it"),
                ('first_to_fastai', rows, lambda v: v>=1, '1 or more', "first epoch, times fastai's")):
            for r in rs:
                if key not in r: continue
                v = r[key]
                where = f"{way}, {r['photo']} px, {r['crop']}({r['size']}), {r['workers']} workers"
                yield _line(f'{where}: {what}', wanted, f"{v['median']:.3g} ({v['min']:.3g} to {v['max']:.3g}, n={r['n']})", good(v['median']))


def verdicts(results):
    "What was to be reached, and whether it was"
    res = list(_rate_verdicts(results['rates']['summary'])) if 'rates' in results else []
    chance = 1.5/results['end_to_end']['classes'] if 'end_to_end' in results else 0
    for r in results.get('memory', {}).get('summary', []):
        if r['way']=='fastai': continue
        most = max(r[f'{k}_buffers']['median'] for k in ('first', 'second'))
        res.append(_line(f"cache in {r['way']}, {r['workers']} workers: buffers in memory", '1.25 or less', f'{most:.2f}', most<=1.25))
    for r in results.get('end_to_end', {}).get('summary', []):
        if r['way']=='fastai': continue
        v, d = r['speedup'], r['accuracy_more']
        res.append(_line(f"fine_tune(4), photos {r['photos']}, cache in {r['way']}: speedup", 'more than 1', f"{v['median']:.2f} ({v['min']:.2f} to {v['max']:.2f}, n={r['n']}); "
                         f"accuracy {d['median']:+.3f} ({d['min']:+.3f} to {d['max']:+.3f})"
                         + ('' if r['accuracy']['median']>chance else ', which says nothing: no better than chance'), v['median']>1))
    return res


# All ------------------------------------------------------------------------------------------------------------------------------

def say(row): print({k: sig(v) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def photo_arg(text):
    "'500x375:512' -> ((500,375), 512)"
    wh, n = text.split(':')
    return tuple(map(int, wh.split('x'))), int(n)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--parts', nargs='+', choices=list(PARTS), default=list(PARTS))
    p.add_argument('--data', type=Path, help='folder of photos with a folder per class; default: the embedded pictures')
    p.add_argument('--photos', type=photo_arg, nargs='+', default=[((500, 375), 512), ((2000, 1500), 128)], help='WIDTHxHEIGHT:NUMBER')
    p.add_argument('--sizes', type=int, nargs='+', default=[128, 160, 224], help='with `Resize`; the last also for `memory`')
    p.add_argument('--crop-sizes', type=int, nargs='*', default=[160], help='with `RandomResizedCrop`')
    p.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--ways', nargs='+', help='of `loader_ways.py`; default: all')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--seconds', type=float, default=.5, help='that a second epoch takes at least')
    p.add_argument('--memory-workers', type=int, nargs='+', default=[0, 1, 2, 4])
    p.add_argument('--memory-rounds', type=int, default=3)
    p.add_argument('--weights', type=Path, help='of `--arch`; default: not pretrained')
    p.add_argument('--arch', help='of timm; default: resnet18 with `--weights`, else mobilenetv3_small_050')
    p.add_argument('--train-size', type=int, default=128)
    p.add_argument('--train-workers', type=int, default=2)
    p.add_argument('--classes', type=int, default=10, help='of `--data`, in trainings')
    p.add_argument('--per-class', type=int, nargs=2, default=[60, 20], help='to train and to validate')
    p.add_argument('--per-class-large', type=int, nargs=2, default=[15, 6], help='the same of large photos')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--child', type=json.loads, help=argparse.SUPPRESS)
    p.add_argument('--out', type=Path, default=HERE.with_suffix('.json'))
    return p


PARTS = dict(rates=rates, memory=memory, end_to_end=end_to_end)


def main(argv=None):
    args = parser().parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    if args.child: return print(json.dumps(memory_of(**args.child)))
    args.arch = args.arch or ('resnet18' if args.weights else 'mobilenetv3_small_050')
    args.source, args.missing = args.data or sample_images(), missing()
    for name, why in args.missing.items(): print(f'{name}: {why}, left out', flush=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as tmp:
        args.tmp = Path(tmp)
        made = []
        if {'rates', 'memory'} & {*args.parts}:
            made = [make_photos(args.source, args.tmp/f'{wh[0]}', wh, n) for wh, n in args.photos]
        source = dict(name=args.data.name if args.data else 'embedded pictures', grain=GRAIN, quality=90, made=made)
        sets = [(args.tmp/f'{wh[0]}', wh) for wh, _ in args.photos]
        there = [o for o in ('webdataset', 'datasets', 'ffcv') if o not in args.missing]
        for part in args.parts:
            began = time.perf_counter()
            res = PARTS[part](args, sets)
            results[part] = dict(environment=environment('pillow', 'numpy', *there), source=source, minutes=sig((time.perf_counter()-began)/60), **res)
            results['verdicts'] = verdicts(results)
            write_results(args.out, results, flat=True)
    for line in results['verdicts']: print(line)


if __name__=='__main__': main()
