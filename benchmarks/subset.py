"""Seconds to choose a subset of 10 classes among a million items, from DataBlock and items to the two splits

    python benchmarks/subset.py
"""
import time
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.data.all import CategoryBlock, ColReader, DataBlock, MultiCategoryBlock, RandomSplitter, RegexLabeller, parent_label
from fastai.vision.all import ImageBlock
from fastai_tricks.data.items import Items
import fastai_tricks.data.subset # noqa: F401 - for DataBlock.class_subset
from common import environment, write_results

N, RUNS = 1_000_000, 5

def main():
    files = [Path(f'/data/class{i%1000}/{i}.jpg') for i in range(N)]
    one = pd.DataFrame(dict(image=np.arange(N), label=[f'class{i%1000}' for i in range(N)]))
    two = pd.DataFrame(dict(image=np.arange(N), label=[f'class{i%1000} kind{i%7}' for i in range(N)]))
    kinds = {'folders': (files, CategoryBlock, parent_label), 'regular expression': (files, CategoryBlock, RegexLabeller(r'class(\d+)/')), 'column': (one, CategoryBlock, ColReader('label')),
             'two labels an item': (two, MultiCategoryBlock, ColReader('label', label_delim=' '))}
    seconds = {k: [] for k in kinds}
    for _ in range(RUNS):
        for k, (items, target, get_y) in kinds.items():
            block = DataBlock((ImageBlock, target), get_y=get_y, splitter=RandomSplitter(seed=42))
            began = time.perf_counter()
            train, valid = Items.read(block.class_subset(10, per_class=100), items).splits
            seconds[k].append(time.perf_counter()-began)
            print(f'{k:20} {seconds[k][-1]:.2f} s, {len(train)} + {len(valid)} items', flush=True)
    write_results(Path(__file__).with_suffix('.json'), dict(environment=environment('pandas'), items=N, n=RUNS,
        seconds={k: dict(mean=float(np.mean(v)), sd=float(np.std(v, ddof=1)), max=max(v)) for k,v in seconds.items()}))

if __name__=='__main__':
    main()
