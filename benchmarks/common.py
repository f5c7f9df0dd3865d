"What the benchmarks share: photos, learners, a clock for training alone, and a JSON with hardware and versions"
import json, os, platform, random, re, time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, get_image_files, parent_label
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import ImageBlock, Learner, Resize, aug_transforms, vision_learner


def photos(path, per_class, valid_per_class, seed=0, classes=None):
    "Files and the indices of the validation set: the same for every run, at most so many a class, of the first `classes` or all"
    files, valid, rng = [], [], random.Random(seed)
    for folder in sorted(p for p in Path(path).iterdir() if p.is_dir())[:classes]:
        fs = sorted(get_image_files(folder))
        rng.shuffle(fs)
        n_valid = min(valid_per_class, len(fs)//3)
        valid += range(len(files), len(files) + n_valid)
        files += fs[:n_valid + per_class]
    return files, valid


def loaders(files, valid, size, seed, bs=32, num_workers=0):
    "Squares of `size` px with fastai's standard augmentations"
    set_seed(seed, reproducible=False)
    block = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=IndexSplitter(valid), item_tfms=Resize(size), batch_tfms=aug_transforms())
    return block.dataloaders(files, bs=bs, num_workers=num_workers)


class TrainClock(Callback):
    "Seconds and images of training alone, with the validation metrics after each epoch"
    order, run_valid = 100, False
    def __init__(self): self.seconds, self.images, self.curve = 0., 0, []
    def before_train(self): self.began = time.perf_counter()
    def after_batch(self): self.images += len(self.xb[0])
    def after_train(self): self.seconds += time.perf_counter() - self.began
    def after_epoch(self): self.curve.append((self.seconds, *self.recorder.log[1:3], *self.recorder.log[3:-1]))


def environment(*packages):
    "Hardware and versions, those of `packages` too, for the JSON of results"
    cpu = platform.processor()
    if Path('/proc/cpuinfo').exists():
        cpu = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')), cpu)
    return dict(cpu=cpu, cores=os.cpu_count(), torch_threads=torch.get_num_threads(), cuda=torch.cuda.is_available(), python=platform.python_version(),
                **{p: version(p) for p in ('fastai', 'torch', 'timm', 'fastai_tricks', *packages)})


def write_results(file, results, flat=False):
    "A JSON, whole or not at all; `flat`: the innermost lists and dicts are a line each"
    file = Path(file)
    tmp = file.with_name(f'{file.name}.{os.getpid()}.tmp')
    text = json.dumps(results, indent=1)
    if flat: text = re.sub(r'([\[{])\s+([^\[\]{}]*?)\s+([\]}])', lambda m: m[1] + re.sub(r'\n\s+', ' ', m[2]) + m[3], text)
    tmp.write_text(text + '\n')
    os.replace(tmp, file)
