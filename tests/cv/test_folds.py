"Folds: those of scikit-learn, the same wherever the files lie, parts of the folds of all classes"
import warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import RandomSplitter
from fastai.vision.data import ImageBlock
from fastai_tricks.cv.folds import CV, fold_splits, Folds
from fastai_tricks.data.items import Items
from fastai_tricks.data.labels import ItemLabels
from climb_run import kind
from subsets import block, data, having, SPLITTERS
import fastai_tricks.data.subset

compared = []

@settings(max_examples=40, deadline=None)
@given(data(), st.integers(2, 3), st.booleans(), st.booleans())
def folds_of_a_part(d, n_splits, stratify, grouped):
    multi,labels,splitter,by,per_class,seed = d
    db,items = block(lambda i: labels[i], multi, splitter=SPLITTERS[splitter](len(labels))),list(range(len(labels)))
    groups = [i//2 for i in items] if grouped else None
    cv = CV(n_splits, stratify=stratify, seed=seed, bs=1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: whole = Folds.of(Items.read(db, items, seed, groups), cv)
        except ValueError as e: # scikit-learn: too few of each class
            assert 'n_splits' in str(e)
            return
        for k in range(1, len(whole.vocab)+1):
            try: part = Folds.of(Items.read(db.class_subset(k, by=by, per_class=per_class, seed=seed), items, seed, groups), cv)
            except ValueError as e:
                assert 'so few that each fold has images' in str(e) or 'classes that have images' in str(e)
                continue
            compared.append(k)
            keep = having(labels, part.vocab, multi)
            for (t,v),(wt,wv) in zip(part.splits, whole.splits):
                t,v,wt,wv = map(set, (t,v,wt,wv))
                assert not t & wv and t<=wt & keep and v==wv & keep
                if grouped: assert not {i//2 for i in t} & {i//2 for i in v}

def test_folds_of_a_part_are_parts_of_the_folds():
    folds_of_a_part()
    assert len(compared)>40 # Most of the examples can be split

def test_folds_are_scikit_learns():
    labels = [kind(i*i) for i in range(60)]
    l,g,y = ItemLabels(labels),[i//3 for i in range(60)],pd.factorize(pd.Series(labels))[0]
    for kwargs,own in ((dict(), StratifiedKFold), (dict(groups=g), StratifiedGroupKFold), (dict(groups=g, stratify=False), GroupKFold), (dict(stratify=False), KFold)):
        ours,theirs = fold_splits(l, range(60), 3, seed=7, **kwargs),own(3, shuffle=True, random_state=7).split(range(60), y, kwargs.get('groups'))
        for (a,b),(c,d) in zip(ours, theirs): assert (a==c).all() and (b==d).all()

def test_the_order_of_files_does_not_matter():
    items = [Path(f'{kind(i)}/{i}.jpg') for i in range(60)]
    db = DataBlock((ImageBlock,CategoryBlock), get_y=lambda p: p.parent.name, splitter=RandomSplitter())
    other = items[::-1]
    for (a,b),(c,d) in zip(Folds.of(Items.read(db, items), CV()).splits, Folds.of(Items.read(db, other), CV()).splits):
        assert {items[i] for i in a}=={other[i] for i in c} and [items[i] for i in b]==[other[i] for i in d]

@pytest.mark.parametrize('kwargs,said', [(dict(n_splits=1), '`n_splits` must be an integer, 2 or more'), (dict(folds=[0,0]), 'each once'), (dict(folds=[5]), 'from 0 to 4'), (dict(folds=[]), '`folds`'), (dict(bs=0), '`bs` must be a positive integer or None'),
    (dict(stratify=1), '`stratify` must be True or False'), (dict(seed=-1), '`seed` must be a non-negative integer'), (dict(resume='yes'), '`resume` must be')])
def test_arguments_are_checked(kwargs, said):
    with pytest.raises(ValueError, match=said): CV(**kwargs)

def test_seeds_of_numpy(): assert type(CV(seed=np.int64(3)).seed) is int
