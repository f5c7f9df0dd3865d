"Random data sets for tests of class subsets and of folds"
import numpy as np
from hypothesis import strategies as st
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.transforms import FuncSplitter, IndexSplitter, RandomSplitter, RandomSubsetSplitter, TrainTestSplitter
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock

def blank(o): return PILImage.create(np.zeros((4,4,3), dtype=np.uint8))
def block(y, multi=False, **kwargs): return DataBlock((ImageBlock,MultiCategoryBlock if multi else CategoryBlock), get_x=blank, get_y=y, **kwargs)

SPLITTERS = {'random': lambda n: RandomSplitter(seed=3), 'unseeded': lambda n: RandomSplitter(), 'none': lambda n: None, 'index': lambda n: IndexSplitter(list(range(0, n, 3))),
    'func': lambda n: FuncSplitter(lambda i: i%4==1), 'sklearn': lambda n: TrainTestSplitter(random_state=1), 'part': lambda n: RandomSubsetSplitter(.5, .3, seed=1)}

@st.composite
def data(draw):
    multi,n = draw(st.booleans()),draw(st.integers(12, 40))
    names = 'abcdef'[:draw(st.integers(2, 6))]
    one = st.sampled_from(names)
    labels = draw(st.lists(st.lists(one, max_size=3, unique=True) if multi else one, min_size=n, max_size=n))
    return multi,labels,draw(st.sampled_from(list(SPLITTERS))),draw(st.sampled_from(['frequency','random','name'])),draw(st.none() | st.integers(1, 4)),draw(st.integers(0, 5))

def having(labels, names, multi): return {i for i,o in enumerate(labels) if (set(o) & set(names) if multi else o in names)}
