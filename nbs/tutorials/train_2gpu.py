"""Fine-tune on two GPUs, or with --cpu in two processes of this machine's CPU

    accelerate launch --multi_gpu --num_processes 2 train_2gpu.py --data photos     # a folder with a folder for each class
    torchrun --nproc_per_node 2 train_2gpu.py --cpu --small                         # the pictures inside the package, two minutes
"""
import argparse
from pathlib import Path

from fastai.vision.all import *
from fastai_tricks.all import *
from fastai_tricks.core.processes import is_main

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--data', type=Path, help='default: the pictures inside the package')
p.add_argument('--out', type=Path, default=Path('train_2gpu'), help='where checkpoints go; a killed run goes on from them')
p.add_argument('--arch', default='resnet34')
p.add_argument('--bs', type=int, default=64, help='of each process')
p.add_argument('--cpu', action='store_true')
p.add_argument('--small', action='store_true', help='a small network from scratch, small images, one epoch')
args = p.parse_args()

size, bs, workers = (64, 16, 0) if args.small else (224, args.bs, 4)
# A seed for the split: every process must have the same
block = DataBlock((ImageBlock(PILImageDraft), CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(seed=42),
                  item_tfms=Resize(size), batch_tfms=aug_transforms())
dls = block.dataloaders(args.data or sample_images(), bs=bs, num_workers=workers, **({'device': 'cpu'} if args.cpu else {}))
if args.small: learn = Learner(dls, xresnet18(n_out=dls.c), metrics=accuracy, path=args.out)
else:
    learn = vision_learner(dls, args.arch, metrics=accuracy, path=args.out)
    learn.to_mixed()

stages = [Stage(48, 1), Stage(64, 1)] if args.small else [Stage(160, 3, fit='fine_tune', freeze_epochs=1), Stage(224, 2)]
with learn.accelerate_ctx(cpu=args.cpu or None): # Two processes take twice the batch: a larger learning rate may pay, see `linear_scaled_lr`
    table = learn.fit_stages(stages)
    acc = learn.validate()[1]
    learn.export('model.pkl') # In the main process alone
if is_main(): print(table.to_string(), f'accuracy on the whole validation set: {acc:.3f}', sep='\n')
