"""Fine-tune on a TPU VM such as Kaggle's: one process, no launcher, each batch sharded over all cores

    python train_tpu.py --data photos     # needs the extra `tpu`, and torch and torch_xla of one version, such as 2.9
    PJRT_DEVICE=CPU CPU_NUM_DEVICES=8 python train_tpu.py --small     # to try it without a TPU: eight virtual cores, the pictures inside the package
"""
import argparse, importlib.util
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--data', type=Path, help='a folder with a folder for each class')
p.add_argument('--arch', default='resnet34')
p.add_argument('--bs', type=int, default=256, help='of all cores together, a multiple of their number')
p.add_argument('--small', action='store_true', help='a small network from scratch on small images')
args = p.parse_args()
if not (args.data or args.small): p.error('--data or --small is needed')
if importlib.util.find_spec('torch_xla') is None: raise SystemExit("torch_xla is needed, of the version that torch has: the extra `tpu` of fastai_tricks")

from fastai.vision.all import *
from fastai_tricks.all import *

start_xla() # Before anything is trained
copy, size, bs, lr = (64, 32, 32, 2e-2) if args.small else (256, 224, args.bs, 2e-3)
# Small copies once: the host must decode for all cores
resized_copies(args.data or sample_images(), 'copies', sizes=(copy,))
dls = ImageDataLoaders.from_folder(f'copies/{copy}', valid_pct=.2, seed=42, img_cls=PILImageDraft, item_tfms=Resize(size), bs=bs, device='cpu')
if args.small: learn = Learner(dls, nn.Sequential(ConvLayer(3, 16, stride=2), ConvLayer(16, 32, stride=2), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(32, dls.c)), metrics=accuracy, path='.')
else: learn = vision_learner(dls, args.arch, metrics=accuracy, path='.')
with learn.xla_ctx(): # Or `learn.to_xla()` and `learn.from_xla()`
    learn.fine_tune(4, lr)
    print(learn.xla_report())
learn.export('model.pkl')
