"""The ways to feed a trainer that `benchmarks/loader.py` compares, fastai's and those of other packages, each as its documentation has it

`WAYS[name](job)` prepares what the way needs, and returns `epochs(k)`: an iterator over the batches of `k` epochs, `(images,labels)` of bytes
and integers, on the CPU. All give squares of `job.size` px out of the same photos, in random order, cropped at random.
"""
import contextlib, io, math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, IndexSplitter, Image, Pipeline, PILImage, RandomResizedCrop, Resize, parent_label)
from fastai_tricks.data.cache import cached
from fastai_tricks.data.copies import resized_copies
from fastai_tricks.data.draft import PILImageDraft

BS, MIN_SCALE = 64, .35


@dataclass
class Job:
    "What is to be fed, and where files may be written"
    folder: Path # Of the photos, with a folder per class
    wh: tuple # Of each photo, pixels
    size: int # Of the squares, pixels
    crop: str # 'Resize' or 'RandomResizedCrop'
    workers: int
    tmp: Path # Empty

    @property
    def files(self): return sorted(self.folder.rglob('*.jpg'))

    @property
    def side(self):
        "Shorter side of a copy that is enough for the crops"
        return min(min(self.wh), math.ceil(self.size if self.crop=='Resize' else self.size/math.sqrt(MIN_SCALE)))


def quietly(f, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()): return f(*args, **kwargs)


# fastai ---------------------------------------------------------------------------------------------------------------------------

def fastai_block(job, cls=PILImage):
    f = Resize(job.size) if job.crop=='Resize' else RandomResizedCrop(job.size, min_scale=MIN_SCALE)
    return DataBlock((ImageBlock(cls), CategoryBlock), get_y=parent_label, splitter=IndexSplitter([0]), item_tfms=f)


def fastai_loader(block, files, workers, bs=BS):
    "fastai's loader, without its batch transforms"
    # The first photo once more, to validate: all are trained on
    dl = quietly(block.dataloaders, [files[0], *files], bs=min(bs, len(files)), num_workers=workers, device='cpu').train
    dl.after_batch = Pipeline([])
    return dl


def fastai_epochs(block, files, workers):
    dl = fastai_loader(block, files, workers)

    def epochs(k):
        # One long epoch, as fastai starts its workers for each
        dl.get_idxs = lambda: [i for _ in range(k) for i in dl.shuffle_fn(list(range(len(files))))]
        return dl
    return epochs


def by_fastai(job, cls=PILImage): return fastai_epochs(fastai_block(job, cls), job.files, job.workers)
def by_draft(job): return by_fastai(job, PILImageDraft)


def by_copies(job):
    quietly(resized_copies, job.folder, job.tmp, sizes=(job.side,), n_workers=job.workers)
    return fastai_epochs(fastai_block(job), sorted((job.tmp/str(job.side)).rglob('*.jpg')), job.workers)


def by_cache(job, where): return fastai_epochs(cached(fastai_block(job), where=where, folder=job.tmp/'cache'), job.files, job.workers)
def in_memory(job): return by_cache(job, 'memory')
def on_disk(job): return by_cache(job, 'disk')


# Yardsticks: the bytes alone ----------------------------------------------------------------------------------------------------

def _pixels(job):
    "As many bytes as there are in an epoch, and labels"
    n = len(job.files)
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, job.size, job.size), dtype=np.uint8)
    return pixels, np.arange(n)%10


def by_copying(job, new=False):
    "numpy's fancy index, into one batch (pinned where there is a GPU), or into a new one each time"
    pixels, labels = _pixels(job)
    bs = min(BS, len(labels))
    batch = torch.empty((bs, *pixels.shape[1:]), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    rng = np.random.default_rng(0)

    def take(idxs):
        if new: return torch.from_numpy(pixels[idxs]), torch.from_numpy(labels[idxs])
        # In the other modes numpy copies twice
        np.take(pixels, idxs, axis=0, out=batch.numpy(), mode='clip')
        return batch, torch.from_numpy(labels[idxs])

    def epochs(k):
        for _ in range(k):
            idxs = rng.permutation(len(labels))
            for i in range(0, len(idxs)-bs+1, bs): yield take(idxs[i:i+bs])
    return epochs


def by_copying_new(job): return by_copying(job, new=True)


# Other packages -----------------------------------------------------------------------------------------------------------------

def _tfms(job):
    from torchvision import transforms as T
    crop = [T.Resize(job.size), T.RandomCrop(job.size)] if job.crop=='Resize' else [T.RandomResizedCrop(job.size, scale=(MIN_SCALE, 1))]
    return T.Compose([*crop, T.PILToTensor()])


def _classes(files): return {c: i for i, c in enumerate(sorted({f.parent.name for f in files}))}


def _chain(loader):
    def epochs(k):
        for _ in range(k): yield from loader
    return epochs


def by_webdataset(job):
    "Shards of the JPEGs as they are"
    import webdataset as wds
    files = job.files
    number = _classes(files)
    # Each worker gets shards of its own, in random order
    order = np.random.default_rng(0).permutation(len(files))
    shards = max(4, len(files)//1000)
    with wds.ShardWriter(str(job.tmp/'%06d.tar'), maxcount=math.ceil(len(files)/shards), verbose=0) as out:
        for i in order: out.write({'__key__': f'{i:06d}', 'jpg': files[i].read_bytes(), 'cls': number[files[i].parent.name]})
    urls = sorted(str(f) for f in job.tmp.glob('*.tar'))
    data = (wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode('pil').to_tuple('jpg', 'cls')
            .map_tuple(_tfms(job), lambda y: y).batched(BS))
    return _chain(wds.WebLoader(data, batch_size=None, num_workers=job.workers, persistent_workers=job.workers>0))


def by_datasets(job):
    "Hugging Face's `imagefolder`, transformed as it is read"
    import datasets
    datasets.disable_progress_bars()
    data, tfms = datasets.load_dataset('imagefolder', data_dir=str(job.folder), split='train', cache_dir=str(job.tmp)), _tfms(job)
    def transform(rows): return {'pixel_values': [tfms(im.convert('RGB')) for im in rows['image']], 'label': rows['label']}
    loader = torch.utils.data.DataLoader(data.with_transform(transform), batch_size=BS, shuffle=True, num_workers=job.workers,
                                         persistent_workers=job.workers>0)

    def epochs(k): return ((b['pixel_values'], b['label']) for b in _chain(loader)(k))
    return epochs


class _Photos:
    "What ffcv writes"
    def __init__(self, files): self.files, self.number = files, _classes(files)
    def __len__(self): return len(self.files)
    def __getitem__(self, i): return Image.open(self.files[i]).convert('RGB'), self.number[self.files[i].parent.name]


def by_ffcv(job):
    "Pixels in one file, read by threads"
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Squeeze, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter
    file, square = str(job.tmp/'photos.beton'), (job.size, job.size)
    # It limits the longer side
    longer = math.ceil(job.side*max(job.wh)/min(job.wh))
    with contextlib.redirect_stderr(io.StringIO()):
        fields = dict(image=RGBImageField(write_mode='raw', max_resolution=longer), label=IntField())
        DatasetWriter(file, fields, num_workers=max(1, job.workers)).from_indexed_dataset(_Photos(job.files))
    crop = CenterCropRGBImageDecoder(square, ratio=1) if job.crop=='Resize' else RandomResizedCropRGBImageDecoder(square, scale=(MIN_SCALE, 1))
    pipelines = dict(image=[crop, ToTensor(), ToTorchImage(convert_back_int16=False)], label=[IntDecoder(), ToTensor(), Squeeze()])
    return _chain(Loader(file, batch_size=min(BS, len(job.files)), num_workers=max(1, job.workers), order=OrderOption.RANDOM, os_cache=True, pipelines=pipelines))


WAYS = {'fastai': by_fastai, 'PILImageDraft': by_draft, 'resized_copies': by_copies, 'cached, memory': in_memory, 'cached, disk': on_disk,
        'webdataset': by_webdataset, 'datasets': by_datasets, 'ffcv': by_ffcv, 'numpy copy': by_copying, 'numpy copy, new batch': by_copying_new}
OTHERS = 'webdataset', 'datasets', 'ffcv'
YARDSTICKS = 'numpy copy', 'numpy copy, new batch'
# Ways whose second epoch is as their first
SAME_AGAIN = 'fastai', 'PILImageDraft', 'webdataset', 'datasets'
# Ways that are also measured without workers
ALONE = 'fastai', 'cached, memory', 'cached, disk'


def missing():
    "Packages that are not installed, or cannot be imported, and why"
    res = {}
    for name in OTHERS:
        if not find_spec(name): res[name] = 'not installed'
        else:
            try: __import__(name)
            except Exception as e: res[name] = f'cannot be imported: {type(e).__name__}: {e}'
    return res
