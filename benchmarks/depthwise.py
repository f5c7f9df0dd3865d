"""What conversion to depthwise convolutions costs in accuracy and gains in time

    python benchmarks/depthwise.py convert --name imagenette --weights resnet18.safetensors --data imagenette-2k
    python benchmarks/depthwise.py recover --name caltech --weights resnet18.safetensors --data caltech96-160 --dense dense.pth
    python benchmarks/depthwise.py speed --name imagenette ...

`--data` is a folder with `calib/` and `val/`, on whose classes the weights (of timm's resnet18) were trained, or one with a folder a class, to which
the network is fine-tuned first. Without data and weights a small resnet is trained on the embedded pictures. `--dense` keeps the dense network in a file."""
import argparse, statistics, time
from copy import deepcopy
from pathlib import Path

import timm, torch
from fastai.vision.all import *
from safetensors import safe_open
from safetensors.torch import load_file

from common import environment, photos, write_results
from fastai_tricks.all import *
from fastai_tricks.models.convert import dense_convs
from fastai_tricks.models.layer_times import steady_times
from fastai_tricks.train.precision import half_dtype


def loaders(files, split, size, seed=0):
    set_seed(seed)
    block = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=split, item_tfms=Resize(size),
        batch_tfms=[*aug_transforms(max_rotate=5, max_zoom=1.05, max_warp=0.05), Normalize.from_stats(*imagenet_stats)])
    return block.dataloaders(files, bs=32, num_workers=0)


def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f()


def task(args):
    "Loaders, a function that makes a Learner, and the weights of its dense network"
    folder = Path(args.data) if args.data else sample_images()
    if (folder/'calib').exists():
        dls = loaders(get_image_files(folder), GrandparentSplitter('calib', 'val'), args.size or 144)
        make = lambda: Learner(dls, timm.create_model('resnet18', num_classes=dls.c), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
        dense = {k: v.float() if v.is_floating_point() else v for k, v in load_file(args.weights).items()}
        return dls, make, dense
    files, valid = photos(folder, 24, 10)
    dls = loaders(files, IndexSplitter(valid), args.size or 96)
    if args.weights:
        with safe_open(args.weights, 'pt') as f: n = len(f.metadata()['classes'].split(','))
        overlay = dict(file=args.weights, num_classes=n)
        make = lambda: vision_learner(dls, 'resnet18', pretrained_cfg_overlay=overlay, normalize=False, metrics=accuracy)
    else: make = lambda: vision_learner(dls, 'resnet10t', pretrained=False, normalize=False, metrics=accuracy)
    if args.dense and Path(args.dense).exists(): return dls, make, torch.load(args.dense, weights_only=True)
    set_seed(0)
    learn = make()
    quiet(learn, lambda: learn.fine_tune(12, 5e-3) if args.weights else (learn.unfreeze(), learn.fit_one_cycle(12, 5e-3)))
    dense = learn.model.state_dict()
    if args.dense: torch.save(dense, args.dense)
    return dls, make, dense


def dense_learner(make, dense, seed=0):
    set_seed(seed, reproducible=True)
    learn = make()
    learn.model.load_state_dict(dense)
    learn.unfreeze()
    learn.logger = noop
    learn.remove_cb(ProgressCallback)
    return learn


def validated(learn): return quiet(learn, learn.validate)[1]
def millions(model): return sum(p.numel() for p in model.parameters())/1e6


def macs(model, size):
    "Multiply-adds of one image by PyTorch's own counter, in millions"
    from torch.utils.flop_counter import FlopCounterMode
    with torch.no_grad(), FlopCounterMode(display=False) as c: model.eval()(torch.randn(1, 3, size, size))
    return c.get_total_flops()/2/1e6


def tucker(model, share):
    "Dense convolutions as tensorly's Tucker triples (1x1, kxk, 1x1) of about `share` of their parameters; None without tensorly-torch"
    try: from tltorch import FactorizedConv
    except ImportError: return None
    model = deepcopy(model)
    for name, (conv, why) in dense_convs(model).items():
        if why: continue
        k2 = conv.kernel_size[0]*conv.kernel_size[1]
        parent, _, key = name.rpartition('.')
        # Ranks r of both channel axes, so that i r + k2 r^2 + r o is the separable layer's k2 i + i o
        i, o = conv.in_channels, conv.out_channels
        budget = (k2*i + i*o)*share
        r = int((-(i+o) + ((i+o)**2 + 4*k2*budget)**.5)/(2*k2))
        setattr(model.get_submodule(parent) if parent else model, key, FactorizedConv.from_conv(conv, rank=(min(r, o), min(r, i), *conv.kernel_size), factorization='tucker', implementation='factorized', decompose_weights=True))
    return model


def restat(model, dls, n=256):
    "Batch norm statistics on training images, as `to_depthwise` takes them"
    items = [dls.train_ds.items[i] for i in np.random.default_rng(0).permutation(len(dls.train_ds))[:n]]
    xb = torch.cat([b[0].as_subclass(Tensor) for b in dls.test_dl(items, bs=64)])
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms: m.momentum = 1.
    with torch.no_grad(): model.train()(xb)
    for m in norms: m.momentum = .1


def convert(args, dls, make, dense):
    learn = dense_learner(make, dense)
    base, logits = validated(learn), quiet(learn, lambda: learn.get_preds(act=noop))[0]
    res = [dict(variant='dense', accuracy=base, error=0., parameters=millions(learn.model))]
    print(res[-1], flush=True)
    def note(variant, learn, seconds):
        out = quiet(learn, lambda: learn.get_preds(act=noop))
        error = float((out[0]-logits).pow(2).sum()/(logits-logits.mean(0)).pow(2).sum())
        res.append(dict(variant=variant, accuracy=float(accuracy(*out)), error=error, parameters=millions(learn.model), seconds=seconds))
        print(res[-1], flush=True)
    for init, multiplier in [(i, m) for m in args.multipliers for i in ('random', 'svd', 'fit')]:
        learn = dense_learner(make, dense)
        t = time.perf_counter()
        learn.to_depthwise(init=init, multiplier=multiplier)
        note(f'{init}, multiplier {multiplier}', learn, time.perf_counter()-t)
    for n in args.images:
        learn = dense_learner(make, dense)
        t = time.perf_counter()
        learn.to_depthwise(n=n)
        note(f'fit, multiplier 1, {n} images', learn, time.perf_counter()-t)
    learn = dense_learner(make, dense)
    t = time.perf_counter()
    if (model := tucker(learn.model, 1)) is not None:
        learn.model = model
        restat(model, dls)
        note('Tucker, as many parameters', learn, time.perf_counter()-t)
    return res


class NoValidation(Callback):
    "It is of interest at the end only"
    def before_validate(self): raise CancelValidException()


def fit(learn, epochs, lr, teacher=None, features=True):
    names = [n for n, _ in learn.model.named_modules() if n.split('.')[-1] in ('layer1', 'layer2', 'layer3', 'layer4')] if features else None
    cbs = [NoValidation(), *([Distill(teacher, features=names)] if teacher is not None else [])]
    clock = time.perf_counter()
    quiet(learn, lambda: learn.fit_one_cycle(epochs, lr, cbs=cbs))
    return time.perf_counter()-clock


def recover(args, dls, make, dense):
    res, kept = [], {}
    def convert(learn, kind):
        "The same for each seed, as weights and images are; not with random weights"
        if kind not in kept:
            init, _, norm = kind.partition('/')
            learn.to_depthwise(init=init, norm=bool(norm))
            if init!='random': kept[kind] = deepcopy(learn.model)
        else: learn.model, learn.opt = deepcopy(kept[kind]), None
    for seed in args.seeds:
        for variant in args.variants:
            learn = dense_learner(make, dense, seed)
            teacher = deepcopy(learn.model)
            what, _, lr = variant.partition('@')
            kind, _, how = what.partition('+')
            lr = float(lr or args.lr)
            if kind=='progressive': # The second half of the layers first
                names = [n for n, (_, why) in dense_convs(learn.model).items() if not why]
                learn.to_depthwise(select=names[len(names)//2:])
                seconds = fit(learn, args.epochs//2, lr, teacher, how=='features')
                learn.to_depthwise()
                seconds += fit(learn, args.epochs-args.epochs//2, lr, teacher, how=='features')
            else:
                if kind!='dense': convert(learn, kind)
                set_seed(seed, reproducible=True)
                seconds = fit(learn, args.epochs, lr, teacher if how else None, how=='features')
            res.append(dict(variant=variant, seed=seed, accuracy=validated(learn), seconds=seconds))
            print(res[-1], flush=True)
            save(args, res)
    return res


def speed(args, dls, make, dense):
    size = dls.one_batch()[0].shape[-1]
    base = dense_learner(make, dense).model
    models = {'dense': base} | {f'all, multiplier {m}': to_depthwise(base, init='svd', multiplier=m, verbose=False) for m in (1, 2, 4)}
    models['all, norm'] = to_depthwise(base, init='svd', norm=True, verbose=False)
    models['faster'] = to_depthwise(base, init='svd', select='faster', size=size, verbose=False)
    if (t := tucker(base, 1)) is not None: models['Tucker, as many parameters'] = t
    models = {k: (m, None) for k, m in models.items()}
    x, y = torch.randn(args.bs, 3, size, size), torch.randint(dls.c, (args.bs,))
    last = x.to(memory_format=torch.channels_last)
    if half_dtype('cpu')[0]:
        halves = {k: deepcopy(models[k][0]) for k in ('dense', 'all, multiplier 1')}
        learn = dense_learner(make, dense)
        learn.to_mixed(torch.bfloat16, channels_last=True)
        learn.to_depthwise(init='svd', select='faster')
        halves['faster'] = learn.model
        models |= {f'{k}, bf16': (m.to(memory_format=torch.channels_last), torch.bfloat16) for k, m in halves.items()}
    def logits(m, dtype):
        with torch.autocast('cpu', dtype=dtype or torch.bfloat16, enabled=dtype is not None): return m(last if dtype else x).float()
    def infer(m, dtype):
        def f():
            m.eval()
            with torch.no_grad(): logits(m, dtype)
        return f
    def train(m, dtype):
        opt = torch.optim.SGD(m.parameters(), 1e-6)
        def f():
            m.train()
            F.cross_entropy(logits(m, dtype), y).backward()
            opt.step(); opt.zero_grad()
        return f
    out = []
    times = {k: steady_times([f(*m) for m in models.values()], args.turns, .2) for k, f in (('inference', infer), ('training', train))}
    for i, (name, (m, _)) in enumerate(models.items()):
        row = dict(variant=name, parameters=millions(m), macs=macs(m, size), n=args.turns)
        for k, t in times.items():
            r = [a/b for a, b in zip(t[0], t[i])]
            row |= {f'{k}_images_s': args.bs/statistics.median(t[i]), f'{k}_ratio': statistics.median(r), f'{k}_min': min(r), f'{k}_max': max(r)}
        out.append(row)
        print(row, flush=True)
    return out


def save(args, results):
    settings = {k: v for k, v in vars(args).items() if k not in ('data', 'weights', 'dense')} | dict(data=args.data and Path(args.data).name)
    write_results(Path(__file__).parent/f'depthwise_{args.name}_{args.part}.json', dict(environment=environment(), settings=settings, results=results))


if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', choices=['convert', 'recover', 'speed'])
    p.add_argument('--name', default='sample', help='of the task, in the JSON')
    p.add_argument('--data'); p.add_argument('--weights'); p.add_argument('--dense')
    p.add_argument('--size', type=int)
    p.add_argument('--bs', type=int, default=16)
    p.add_argument('--turns', type=int, default=7)
    p.add_argument('--epochs', type=int, default=2)
    p.add_argument('--lr', type=float, default=1e-4)
    p.add_argument('--multipliers', type=int, nargs='*', default=[1, 2, 4])
    p.add_argument('--images', type=int, nargs='*', default=[128, 256])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--variants', nargs='+', default=['dense', 'fit', 'fit+distill', 'fit+features', 'random+features'],
        help='init: dense, random, svd, fit, fit/norm, progressive (from fit, the last half of the layers first); +distill or +features; @learning rate')
    args = p.parse_args()
    save(args, dict(convert=convert, recover=recover, speed=speed)[args.part](args, *task(args)))
