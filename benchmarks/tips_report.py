"""Which tips pay when a pretrained network is fine-tuned on a few hundred photos: `tips_report` on some classes

    python benchmarks/tips_report.py --data PATH [--minutes 14]

PATH is a folder per class. A killed run goes on where it stopped. The report is written to tips_report.json beside this script.
"""
import argparse, os, tempfile
from pathlib import Path

import torch
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, parent_label
from fastai.vision.all import ImageBlock, Resize, aug_transforms
from fastai_tricks.all import lite0_weights, tips_report
from common import photos, write_results

FILE = Path(__file__).with_suffix('.json')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True, help='a folder per class')
    p.add_argument('--minutes', type=float, default=14)
    p.add_argument('--classes', type=int, default=24)
    p.add_argument('--per-class', type=int, default=20)
    p.add_argument('--valid-per-class', type=int, default=10)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--size', type=int, default=96)
    p.add_argument('--tips', nargs='+', default='all')
    p.add_argument('--bs', type=int, default=16)
    p.add_argument('--out', type=Path, default=Path(tempfile.gettempdir())/'tips_report')
    a = p.parse_args()
    a.data,a.out = Path(a.data).resolve(),Path(a.out).resolve() # Before the chdir below
    files, valid = photos(a.data, a.per_class, a.valid_per_class, classes=a.classes)
    dblock = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=IndexSplitter(valid), item_tfms=Resize(a.size), batch_tfms=aug_transforms())
    os.chdir(lite0_weights().parent) # So that no path of this machine stands in the results
    report = tips_report(dblock, files, 'tf_efficientnet_lite0', a.minutes, a.tips, a.seeds, bs=a.bs, out=a.out, options=dict(data=dict(num_workers=0)),
                         pretrained_cfg_overlay=dict(file=lite0_weights().name))
    print(report)
    write_results(FILE, dict(report.json, out='tips_report', data=Path(a.data).name))

if __name__=='__main__': main()
