"""How fast each way to use a network answers on one thread, and how well: fastai, PyTorch, ONNX in fp32 and int8, dense and depthwise

    python benchmarks/latency.py --name imagenette --data imagenette-2k --weights resnet18-imagenette.safetensors
    python benchmarks/latency.py --name caltech --data caltech96-160

With weights the network is timm's `resnet18` trained on the classes of `--data`, which has `calib/` and `val/`; without them lite0, whose head is
fitted to a folder with a folder a class. Without data: the embedded pictures."""
import argparse, statistics
from pathlib import Path

import timm, torch
from fastai.vision.all import *
from safetensors.torch import load_file

from common import environment, photos, write_results
from fastai_tricks.all import *


def trained(args):
    "A resnet18 that knows the classes"
    block = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=GrandparentSplitter('calib', 'val'),
        item_tfms=Resize(args.size or 144), batch_tfms=Normalize.from_stats(*imagenet_stats))
    dls = block.dataloaders(get_image_files(args.data), bs=32, num_workers=0)
    learn = Learner(dls, timm.create_model('resnet18', num_classes=dls.c), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(args.weights).items()})
    return learn


def fitted(args):
    "A lite0 with a head of these classes"
    files, valid = photos(Path(args.data) if args.data else sample_images(), 24, 10)
    block = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=IndexSplitter(valid), item_tfms=Resize(args.size or 128))
    dls = block.dataloaders(files, bs=32, num_workers=0)
    learn = vision_learner(dls, 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy)
    learn.fit_head(20)
    return learn


def ratios(df):
    "Times as fast as the dense network in PyTorch, at batch 1"
    base = df[(df['way']=='network') & (df['network']=='dense')].iloc[0]
    return {f"{r['network']} {r['way']}": base['ms, batch 1']/r['ms, batch 1'] for _, r in df.iterrows()}


def summary(res):
    "By network that was converted: how many times as fast as the dense network in PyTorch, over the runs, and the score"
    out = {}
    for name in {r['converted']: 1 for r in res}:
        each = [r for r in res if r['converted']==name]
        for k in each[0]['ratios']:
            rs = [r['ratios'][k] for r in each if r['ratios'][k]==r['ratios'][k]]
            row = next(o for o in each[0]['rows'] if f"{o['network']} {o['way']}"==k)
            if rs: out[f'{name}: {k}'] = dict(median=statistics.median(rs), min=min(rs), max=max(rs), n=len(rs), score=row.get('accuracy'), mb=row['MB'])
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--name', default='sample')
    p.add_argument('--data')
    p.add_argument('--weights')
    p.add_argument('--size', type=int)
    p.add_argument('--n-valid', type=int, default=500)
    p.add_argument('--turns', type=int, default=15)
    p.add_argument('--calibrate', type=int, default=128)
    p.add_argument('--runs', type=int, default=3)
    p.add_argument('--out', default=str(Path(__file__).parent))
    args = p.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    learn = trained(args) if args.weights else fitted(args)
    convert = {'faster': True} if args.weights else {'none': False} # lite0 has depthwise convolutions
    res = []
    settings = vars(args) | {k: Path(v).name for k, v in vars(args).items() if k in ('data', 'weights') and v}
    del settings['out']
    for run in range(args.runs):
        for name, depthwise in convert.items():
            report = learn.latency_report(depthwise=depthwise, n_valid=args.n_valid, calibrate=args.calibrate, turns=args.turns)
            rows = report.df.astype(object).where(report.df.notna(), None).to_dict('records')
            res.append(dict(run=run, converted=name, size=report.size, n=report.n, ratios=ratios(report.df), rows=rows))
            print(report.df.to_string(), flush=True)
            write_results(Path(args.out)/f'latency_{args.name}.json', dict(environment=environment('onnx', 'onnxruntime', 'onnxscript'), settings=settings, summary=summary(res), results=res))
    for k, v in summary(res).items(): print(f"{k}: {v['median']:.2f} times as fast ({v['min']:.2f} to {v['max']:.2f}), {v['score']:.3f}")


if __name__=='__main__': main()
