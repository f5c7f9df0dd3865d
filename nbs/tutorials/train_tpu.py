"""Fine-tune on a TPU VM such as Kaggle's: one process, no launcher, each batch sharded over all cores

    python train_tpu.py --data photos     # needs torch_xla: pip install 'fastai_tricks[tpu]'
"""
import argparse, importlib.util
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--data', type=Path, required=True, help='a folder with a folder for each class')
p.add_argument('--arch', default='resnet34')
p.add_argument('--bs', type=int, default=256, help='of all cores together, a multiple of their number')
args = p.parse_args()
if importlib.util.find_spec('torch_xla') is None: raise SystemExit("torch_xla is needed, on a machine with a TPU: pip install 'fastai_tricks[tpu]'")

from fastai.vision.all import *
from fastai_tricks.all import *

# Small copies once: the host must decode for all cores
resized_copies(args.data, 'copies', sizes=(256,))
dls = ImageDataLoaders.from_folder('copies/256', valid_pct=.2, seed=42, img_cls=PILImageDraft, item_tfms=Resize(224), bs=args.bs, device='cpu')
learn = vision_learner(dls, args.arch, metrics=accuracy)
with learn.xla_ctx(): learn.fine_tune(4) # Or `learn.to_xla()` and `learn.detach_xla()`
learn.export('model.pkl')
