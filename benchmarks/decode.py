"""Images/s on one core, from a JPEG of 2000×1333 pixels to a tensor of 64, 128 or 224 px

    python benchmarks/decode.py [--rounds 7] [--images 24] [--out FILE]

The ways are interleaved: each round runs all of them over the same files, so that a machine that slows down hurts all alike. The ratio to
fastai's own is of the same round. `limit` is libjpeg's reduced decode alone: no resize, no tensor. The two photos come with scikit-learn.
"""
import argparse, statistics as st, tempfile
from functools import partial
from pathlib import Path

import torch
from fastai.vision.all import Image, PILImage, Resize, ToTensor
from fastai_tricks.core.timing import interleaved
from fastai_tricks.data.draft import PILImageDraft, draft_scale
from sklearn.datasets import load_sample_images
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import center_crop, resize

from common import environment, write_results

SIZES = (64, 128, 224)


def make_photos(folder, n, wh=(2000,1333)):
    "`n` JPEGs, no two the same"
    photos = [Image.fromarray(a) for a in load_sample_images().images]
    for i in range(n): photos[i%2].rotate(i, expand=False).resize(wh, Image.Resampling.BICUBIC).save(folder/f'{i}.jpg', quality=90)
    return sorted(folder.glob('*.jpg'))


def by_fastai(cls, size):
    tfm, to_tensor = Resize(size), ToTensor()
    return lambda f: to_tensor(tfm(cls.create(f), split_idx=1))


def to_image(size):
    "Without the tensor"
    tfm = Resize(size)
    return lambda f: tfm(PILImageDraft.create(f), split_idx=1)


def by_torchvision(size): return lambda f: center_crop(resize(decode_image(str(f), ImageReadMode.RGB), size, antialias=True), size)


def by_cv2(size):
    import cv2
    cv2.setNumThreads(1)
    # The flags of cv2's reduced decode; never below the size wanted
    flags = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8, 1: cv2.IMREAD_COLOR}
    flag = flags[draft_scale((1333,1333), (size,size))]

    def f(file):
        im = cv2.imread(str(file), flag)
        h, w = im.shape[:2]
        s = min(h, w)
        im = im[(h-s)//2:(h+s)//2, (w-s)//2:(w+s)//2]
        return torch.from_numpy(cv2.cvtColor(cv2.resize(im, (size, size), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)).permute(2, 0, 1)
    return f


def limit(size):
    d = draft_scale((1333,1333), (size,size))

    def f(file):
        im = Image.open(file)
        im.draft(None, tuple(s//d for s in im.size))
        im.load()
    return f


WAYS = {'fastai': partial(by_fastai, PILImage), 'PILImageDraft': partial(by_fastai, PILImageDraft), 'PILImageDraft, to image': to_image, 'torchvision': by_torchvision, 'cv2 reduced': by_cv2, 'limit': limit}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--images', type=int, default=24)
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'decode.json')
    args = p.parse_args()
    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as d:
        files = make_photos(Path(d), args.images)
        ways = {}
        for size in SIZES:
            for name, make in WAYS.items():
                try: ways[size, name] = make(size)
                except ImportError: print(f'{name}: not installed, left out')
        for f in ways.values(): f(files[0])
        def over_files(f): return lambda: [f(file) for file in files]
        seconds = interleaved([over_files(f) for f in ways.values()], args.rounds, tick=lambda i: print(f'round {i} of {args.rounds}', flush=True))
        for (size, name), ts in zip(ways, seconds): runs += [dict(round=i, size=size, way=name, images_per_second=len(files)/t) for i, t in enumerate(ts)]
    speed = {(r['round'], r['size'], r['way']): r['images_per_second'] for r in runs}
    summary = []
    for size, name in ways:
        rs = [speed[i, size, name] for i in range(args.rounds)]
        to_fastai, to_limit = ([speed[i, size, name]/speed[i, size, o] for i in range(args.rounds)] for o in ('fastai', 'limit'))
        summary.append(dict(size=size, way=name, n=args.rounds, images_per_second=st.mean(rs), sd=st.stdev(rs), ratio=st.mean(to_fastai), ratio_sd=st.stdev(to_fastai),
                            of_limit=st.mean(to_limit), of_limit_sd=st.stdev(to_limit)))
    write_results(args.out, dict(photo='2000×1333', images=args.images, environment=environment('pillow', 'torchvision'), summary=summary, runs=runs))
    for row in summary: print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})


if __name__=='__main__': main()
