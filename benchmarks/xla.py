"""A Learner on XLA's virtual cores against the plain CPU: are the results the same, what does a step take, what does the compiler do?

    python benchmarks/xla.py [--cores 1 2 4 8] [--steps 20]      with the environment of `make test-xla`

Each number of cores is a process of its own. Virtual cores share the real ones: their times show what sharing costs, and nothing of a TPU's speed.
Results go to `xla.json`.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path

SIZE, BS, EPOCHS = 32, 32, 3

def make_learner():
    "A small ResNet on a quarter of the embedded pictures; no augmentation, as random numbers differ between devices"
    import timm
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Learner, Normalize, RandomSplitter, Resize, accuracy, get_image_files, imagenet_stats, parent_label, set_seed
    from fastai_tricks.all import sample_images
    set_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=RandomSplitter(seed=1), item_tfms=Resize(SIZE), batch_tfms=Normalize.from_stats(*imagenet_stats))
    dls = block.dataloaders(sorted(get_image_files(sample_images()))[::4], bs=BS, num_workers=0, device='cpu')
    set_seed(0)
    return Learner(dls, timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1,1,1,1), dls.c, stem_width=8, channels=(8,16,24,32)), metrics=accuracy)

def run(cores, steps):
    "Train, predict, then time steps; `cores=0`: the plain CPU"
    from fastai.vision.all import Callback, set_seed
    from fastai_tricks.devices.xla import start_xla
    wait = lambda: None
    if cores:
        assert start_xla()==cores
        import torch_xla.core.xla_model as xm
        wait = xm.wait_device_ops

    class Clock(Callback):
        "Seconds a training step, without the loading of its batch"
        order, run_valid = -99, False # Before the loss is fetched
        def before_fit(self): self.seconds = []
        def before_batch(self): self.began = time.perf_counter()
        def after_batch(self):
            wait()
            self.seconds.append(time.perf_counter() - self.began)

    learn = make_learner()
    row = dict(cores=cores or None)
    with learn.no_bar(), learn.no_logging():
        if cores: learn.to_xla(bf16=False)
        set_seed(0)
        learn.dls.train.rng.seed(0)
        learn.fit_one_cycle(EPOCHS, 1e-3)
        row['losses'] = [list(map(float, v[:2])) for v in learn.recorder.values]
        row['preds'] = learn.get_preds()[0].tolist()
        if cores: row.update(compilations=int(learn.xla_report().loc['compilations', 'count']), compile_s=float(learn.xla_report().loc['compilations', 'seconds']))
        clock = Clock()
        n = -(-steps//len(learn.dls.train))
        learn.fit(n, 1e-3, cbs=clock)
        if cores: row.update(compilations_later=int(learn.xla_report().loc['compilations', 'count']) - row['compilations'], fallbacks=sum(k.startswith('aten::') for k in learn.xla_report().index))
    ms = [1000*s for s in clock.seconds[:steps]]
    return dict(row, ms=statistics.median(ms), ms_min=min(ms), ms_max=max(ms), n=len(ms))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--cores', type=int, nargs='+', default=[1, 2, 4, 8])
    p.add_argument('--steps', type=int, default=20)
    p.add_argument('--one', type=int)
    a = p.parse_args()
    if a.one is not None: return print(json.dumps(run(a.one, a.steps)))
    rows = []
    for cores in [0, *a.cores]:
        env = {**os.environ, 'PJRT_DEVICE': 'CPU', 'CPU_NUM_DEVICES': str(max(1, cores)), 'TF_CPP_MIN_LOG_LEVEL': '2'}
        r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', str(cores), '--steps', str(a.steps)], env=env, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(r.stdout.splitlines()[-1]))
        cpu, row = rows[0], rows[-1]
        row['loss_diff'] = max(abs(x-y)/y for u, v in zip(row['losses'], cpu['losses']) for x, y in zip(u, v))
        row['pred_diff'] = max(abs(x-y) for u, v in zip(row['preds'], cpu['preds']) for x, y in zip(u, v))
        row['same_class'] = sum(u.index(max(u))==v.index(max(v)) for u, v in zip(row['preds'], cpu['preds']))/len(cpu['preds'])
        print({k: v for k, v in row.items() if k!='preds'}, flush=True)
    from common import environment, write_results
    learn = make_learner()
    for row in rows: del row['preds']
    write_results(Path(__file__).with_suffix('.json'), dict(environment=environment('torch_xla'), settings=dict(model='timm ResNet, BasicBlock (1,1,1,1), channels 8, 16, 24, 32', size=SIZE, bs=BS, epochs=EPOCHS,
        images=len(learn.dls.train_ds)+len(learn.dls.valid_ds), steps_an_epoch=len(learn.dls.train)), results=rows))

if __name__=='__main__': main()
