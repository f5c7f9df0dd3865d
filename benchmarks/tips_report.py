"""Which tips pay where: `tips_report` on four photo sets with a pretrained network, and from scratch on the embedded pictures

    python benchmarks/tips_report.py --data PATH [--sets caltech cells] [--minutes 30]

PATH holds the folders of the sets (see `sets.py`). 'cells, again' repeats one report with other seeds. A killed report goes on where it stopped.
Each is written to tips_report.json beside this script when it is done.
"""
import argparse, json, os, random, tempfile
from pathlib import Path

from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, RandomSplitter, get_image_files, parent_label
from fastai.vision.all import ImageBlock, Resize, aug_transforms
from fastai_tricks.all import lite0_weights, sample_images, tips_report
from fastai_tricks.report.result import TipsReport
from common import write_results
from sets import by_blocks, by_folder

FILE = Path(__file__).with_suffix('.json')

# name -> folder, classes, images of a class, how they are split (None: at random), first seed
REPORTS = {
    'caltech': ('caltech96-160', 24, 45, None, 0),
    'grocery': ('grocery', 24, 80, by_folder, 0),        # The official test set validates
    'satellite': ('rsscn7', 7, 220, by_blocks, 0),       # Neighbours can share ground: blocks of 20 validate
    'cells': ('pbc3k', 8, 200, None, 0),
    'scratch': (None, 12, 60, None, 0),
    'cells, again': ('pbc3k', 8, 200, None, 500)}


def source_of(name, data):
    "Files and a splitter; which classes and images there are does not depend on the seed of a report"
    folder, classes, per_class, split, _ = REPORTS[name]
    root, rng, by_class = Path(data)/folder if folder else sample_images(), random.Random(0), {}
    for f in sorted(get_image_files(root)): by_class.setdefault(f.parent.name, []).append(f)
    largest = sorted(by_class, key=lambda k: (-len(by_class[k]), k))[:classes]
    files = [f for k in sorted(largest) for f in rng.sample(by_class[k], min(per_class, len(by_class[k])))]
    return files, IndexSplitter([i for i, f in enumerate(files) if split(f)]) if split else RandomSplitter(.3)


def report_on(name, a):
    "A finished report"
    files, splitter = source_of(name, a.data)
    dblock = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=splitter, item_tfms=Resize(a.size), batch_tfms=aug_transforms())
    tuned = dict(arch='tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=lite0_weights().name))
    how = dict(arch='resnet10t', pretrained=False) if name=='scratch' else tuned
    return tips_report(dblock, files, minutes=a.minutes, bs=a.bs, out=a.out/name.replace(', ', '_'), **how,
                       options=dict(data=dict(num_workers=0), seed=REPORTS[name][-1]))


def kept(report):
    "What the pages show, and each training: no curves, no paths"
    runs = [{k: r[k] for k in ('name', 'seed', 'stage', 'score', 'seconds', 'images', 'epochs', 'wall')} for r in report.json['runs']]
    res = {k: v for k, v in report.json.items() if k not in ('out', 'code', 'paces', 'runs')}
    tables = {k: json.loads(v.to_json(orient='records', double_precision=5)) for k, v in report.tables.items()}
    return res | dict(advice=report.advice, tables=tables, runs=runs)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True, type=Path)
    p.add_argument('--sets', nargs='+', default=list(REPORTS), choices=list(REPORTS))
    p.add_argument('--minutes', type=float, default=30)
    p.add_argument('--size', type=int, default=96)
    p.add_argument('--bs', type=int, default=32)
    p.add_argument('--out', type=Path, default=Path(tempfile.gettempdir())/'tips_reports')
    a = p.parse_args()
    a.data, a.out = a.data.resolve(), a.out.resolve() # Before the chdir below
    os.chdir(lite0_weights().parent) # So that no path of this machine stands in the results
    for name in a.sets:
        folder = a.out/name.replace(', ', '_')
        report = TipsReport.load(folder) if (folder/'report.json').exists() else report_on(name, a)
        print(report)
        old = json.loads(FILE.read_text()) if FILE.exists() else {}
        write_results(FILE, old | {name: kept(report)})


if __name__=='__main__': main()
