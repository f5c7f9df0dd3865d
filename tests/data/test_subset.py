"Class subsets: what validates in the whole never trains in a part, whatever the data; labels from anywhere; many items"
import pickle, random, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import ColReader, GrandparentSplitter, IndexSplitter, RandomSplitter, RegexLabeller, get_image_files, parent_label
from fastai.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock
from fastai.vision.augment import Resize
from fastai_tricks.data.items import Items
from fastai_tricks.data.labels import read_labels
from fastai_tricks.data.subset import class_ladder
from fastai_tricks.data.sample import sample_images
from subsets import blank, block, data, having, SPLITTERS

@settings(max_examples=80, deadline=None)
@given(data())
def test_what_validates_never_trains_in_a_part(d):
    multi,labels,splitter,by,per_class,seed = d
    n = len(labels)
    db = block(lambda i: labels[i], multi, splitter=SPLITTERS[splitter](n))
    items = list(range(n))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        train,valid = map(set, Items.read(db.class_subset(None, seed=seed), items).splits)
        if db.splitter and splitter!='unseeded': assert [train,valid]==[set(s) for s in db.splitter(items)]
        present = sorted({c for i in train|valid for c in (labels[i] if multi else [labels[i]])})
        before = []
        for k in range(1, len(present)+1):
            sub = db.class_subset(k, by=by, per_class=per_class, seed=seed)
            part = Items.read(sub, items)
            t,v = map(set, part.splits)
            # The whole leakage property, by brute force
            assert not t & valid
            names = part.classes
            assert set(before)<=set(names) and len(names)==k
            before = names
            keep = having(labels, names, multi)
            assert v==valid & keep and t<=train & keep
            if per_class is None: assert t==train & keep
            else:
                for c in names: assert sum(c in labels[i] if multi else c==labels[i] for i in t)<=per_class
                if not multi: assert all(sum(labels[i]==c for i in t)==min(per_class, sum(labels[i]==c for i in train)) for c in names)

def test_loaders_get_what_the_splitter_says():
    db = block(lambda i: 'abc'[i%3], splitter=RandomSplitter(seed=5))
    sub,full = db.class_subset(2, by='name').datasets(list(range(60))),db.datasets(list(range(60)))
    assert set(sub.train.items)=={i for i in full.train.items if i%3<2} and set(sub.valid.items)=={i for i in full.valid.items if i%3<2}
    assert sub.vocab==['a','b'] and full.vocab==['a','b','c'] and {int(y) for _,y in sub.train}=={0,1}

def test_source_may_change_and_the_first_block_stays():
    db = block(lambda i: i%5)
    few = db.class_subset(2, by='name')
    with pytest.warns(UserWarning, match='draws other validation items at each call'): a = few.datasets(list(range(50)))
    b = few.datasets([i for i in range(50) if i%5>1])
    assert (a.vocab,b.vocab)==([0,1],[2,3])
    assert db.splitter is None and few.dataloaders(list(range(50)), num_workers=0).c==2

def test_random_states_stay():
    state = torch.get_rng_state(),np.random.get_state()[1].copy(),random.getstate()
    block(lambda i: i%3, splitter=RandomSplitter()).class_subset(2).fixed(list(range(20)))
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1]==np.random.get_state()[1]).all() and state[2]==random.getstate()

def test_real_folders_regex_and_csv(tmp_path):
    path = sample_images()
    folder = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(seed=1), item_tfms=Resize(32))
    regex = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=RegexLabeller(r'[/\\]([^/\\]+)[/\\][^/\\]+$'), splitter=RandomSplitter(seed=1), item_tfms=Resize(32))
    files = get_image_files(path)
    pd.DataFrame(dict(image=[str(f.relative_to(path)) for f in files], label=[f.parent.name for f in files])).to_csv(tmp_path/'train.csv', index=False)
    table = DataBlock((ImageBlock,CategoryBlock), get_x=ColReader('image', pref=path), get_y=ColReader('label'), splitter=RandomSplitter(seed=1), item_tfms=Resize(32))
    a,b,c = [db.class_subset(5, per_class=7).dataloaders(s, bs=8, num_workers=0) for db,s in ((folder,path),(regex,path),(table,pd.read_csv(tmp_path/'train.csv')))]
    assert a.vocab==b.vocab==c.vocab and len(a.train_ds)==len(b.train_ds)==len(c.train_ds)==35
    assert list(a.train_ds.items)==list(b.train_ds.items)==[path/o for o in c.train_ds.items.image]
    assert a.one_batch()[0].shape==c.one_batch()[0].shape==(8,3,32,32)

def test_grandparent_splitter():
    files = [Path(f'{s}/{c}/{i}.jpg') for s in ('train','valid','test') for c in 'abc' for i in range(4)]
    sub = block(parent_label, splitter=GrandparentSplitter()).class_subset(2, by='name').datasets(files)
    assert {(o.parts[0],o.parts[1]) for o in sub.train.items}=={('train','a'),('train','b')} and {o.parts[0] for o in sub.valid.items}=={'valid'}

def test_chained_subsets():
    db = block(lambda i: 'abcdef'[i%6], splitter=RandomSplitter(seed=1))
    one = db.class_subset(['f','b','c']).class_subset(2, by='name').datasets(list(range(60)))
    assert one.vocab==['b','c']
    with pytest.raises(ValueError, match="must be among the 3 classes of the data, not 'a'"): db.class_subset(['f','b','c']).class_subset(['a']).datasets(list(range(60)))

def test_given_vocabulary_keeps_its_order():
    db = DataBlock((ImageBlock,CategoryBlock(vocab=['z','a','m'], sort=False)), get_x=blank, get_y=lambda i: 'amz'[i%3], splitter=RandomSplitter(seed=1))
    sub = db.class_subset(['a','z']).datasets(list(range(30)))
    assert sub.vocab==['z','a'] and {int(y) for _,y in sub.train}=={0,1}

def test_class_that_only_validates_has_its_place():
    with pytest.warns(UserWarning, match="No training image of 'b'"): sub = block(lambda i: 'ab'[i>7], splitter=IndexSplitter([6,7,8,9])).class_subset(2).datasets(list(range(10)))
    assert sub.vocab==['a','b'] and [int(y) for _,y in sub.valid]==[0,0,1,1]

def test_multi_label_in_training():
    labels = [['a','b'],['b'],['c'],['a','c'],[],['b','c']]*4
    sub = block(lambda i: labels[i], True, splitter=IndexSplitter([0,1,2,3,4,5])).class_subset(['a','b']).dataloaders(list(range(24)), bs=4, num_workers=0)
    assert sub.c==2 and {tuple(y.tolist()) for _,y in sub.train_ds}=={(1,1),(0,1),(1,0)} and sub.one_batch()[1].shape==(4,2)

class Never:
    "An image that must not be opened"
    def __call__(self, o): raise AssertionError(f'{o} was opened')

@pytest.mark.parametrize('kind', ['folder','csv','multi'])
def test_many_items_without_opening_one(kind):
    n = 100_000
    items = [Path(f'/d/c{i%1000}/{i}.jpg') for i in range(n)] if kind=='folder' else pd.DataFrame(dict(image=np.arange(n), label=[f'c{i%1000} c{i%7}' if kind=='multi' else f'c{i%1000}' for i in range(n)]))
    y = parent_label if kind=='folder' else ColReader('label', label_delim=' ' if kind=='multi' else None)
    db = DataBlock((ImageBlock,MultiCategoryBlock if kind=='multi' else CategoryBlock), get_x=Never(), get_y=y, splitter=RandomSplitter(seed=1))
    train,valid = Items.read(db.class_subset(10, per_class=100), items).splits
    assert len(train)<=1000 and len(valid)>100

def test_what_cannot_be(tmp_path):
    db,items = block(lambda i: 'abc'[i%3], splitter=RandomSplitter(seed=1)),list(range(30))
    for kwargs,said in ((dict(classes=0), '`classes` must be a positive integer or a list'), (dict(classes=[]), '`classes` must be'), (dict(classes=True), '`classes` must be'), (dict(classes=2, by='size'), '`by` must be one of'),
                        (dict(classes=2, per_class=0), '`per_class` must be a positive integer'), (dict(classes=2, seed=-1), '`seed` must be')):
        with pytest.raises(ValueError, match=said): db.class_subset(**kwargs)
    with pytest.raises(ValueError, match='at most the 3 classes that have images, not 4'): db.class_subset(4).datasets(items)
    with pytest.raises(ValueError, match="not 'd'"): db.class_subset(['a','d']).datasets(items)
    with pytest.raises(ValueError, match='must have a `CategoryBlock` or a `MultiCategoryBlock`'): DataBlock((ImageBlock,RegressionBlock)).class_subset(2)
    with pytest.raises(ValueError, match='not the labels of boxes'): DataBlock((ImageBlock,BBoxBlock,BBoxLblBlock), n_inp=1).class_subset(2)
    assert class_ladder(block(lambda i: 'abc'[i%3]), items, (2,None), 'random', seed=np.int64(3))==class_ladder(block(lambda i: 'abc'[i%3]), items, (2,None), 'random', seed=3)
    for sizes in ((5,None), (2,2), (3,None), (0,), ()):
        with pytest.raises(ValueError, match='`sizes` must be'): class_ladder(db, items, sizes)

def test_labels_are_those_that_fastai_reads():
    df = pd.DataFrame(dict(name=list('abcd'), n=[3,1,3,2], tag=['x','','x y','y']))
    for db in (DataBlock((ImageBlock,CategoryBlock), get_x=blank, get_y=ColReader('n')), DataBlock((ImageBlock,CategoryBlock), get_x=blank, get_y=ColReader('name', pref='p_', suff='.s')), DataBlock((ImageBlock,CategoryBlock), get_x=blank, get_y=ColReader(1)),
               DataBlock((ImageBlock,CategoryBlock), get_x=blank, get_y=lambda r: r.n + 1), DataBlock((ImageBlock,MultiCategoryBlock), get_x=blank, get_y=ColReader('tag', label_delim=' '))):
        dsets = db.datasets(df)
        y = dsets.tls[1]
        shown = [list(y.decode(o)) if isinstance(db.type_tfms[1][-1], type) else str(y.decode(o)) for o in y]
        got = read_labels(db, df)
        order = [i for s in dsets.splits for i in s]
        assert [str(o) if not isinstance(o, list) else sorted(o) for o in got]==[str(o) if not isinstance(o, list) else sorted(o) for o in shown], (got,shown,order)

def test_splitters_that_cannot_be_seeded_or_give_masks():
    own = lambda o: (lambda p: (p[10:],p[:10]))(np.random.default_rng().permutation(len(o)))
    with pytest.raises(ValueError, match='must give the same validation items at each call'): block(lambda i: i%3, splitter=own).class_subset(2).fixed(list(range(40)))
    mask = np.arange(40)%4==0
    train,valid = Items.read(block(lambda i: i%3, splitter=lambda o: (~mask,mask)).class_subset([1]), list(range(40))).splits
    assert set(valid)=={i for i in range(0,40,4) if i%3==1} and set(train)=={i for i in range(40) if i%4 and i%3==1}

def test_items_without_a_label():
    df = pd.DataFrame(dict(name=range(20), label=['a','b',None,'a']*5))
    db = block(ColReader('label'), splitter=RandomSplitter(seed=1))
    with pytest.raises(ValueError, match="must give each item a label; 5 have none .NaN., the first is {'name': 2"): db.class_subset(1).fixed(df)
    na = DataBlock((ImageBlock,CategoryBlock(add_na=True)), get_x=blank, get_y=ColReader('label'), splitter=RandomSplitter(seed=1))
    sub = na.class_subset(['a','b']).datasets(df.dropna())
    assert sub.vocab==['#na#','a','b'] and {int(y) for _,y in sub.train}=={1,2}
    tags = DataBlock((ImageBlock,MultiCategoryBlock(add_na=True)), get_x=blank, get_y=lambda i: ['ab'[i%2]], splitter=RandomSplitter(seed=1)).class_subset(None).datasets(list(range(20)))
    assert {len(y) for _,y in tags.train}=={3}

def test_names_from_pandas_and_classes_without_images():
    labels = ['a']*6+['b']*4+['c']*2
    db = DataBlock((ImageBlock,CategoryBlock(vocab=['a','b','c','u'])), get_x=blank, get_y=lambda i: labels[i], splitter=IndexSplitter([0,6,10]))
    for names in (pd.Series(labels).value_counts().index[:2], np.array(['a','b']), {'a','b'}, pd.Series(['a','b'])): assert db.class_subset(names).datasets(list(range(12))).vocab==['a','b']
    with pytest.warns(UserWarning, match="No training image of 'u'"): assert db.class_subset(None).datasets(list(range(12))).vocab==['a','b','c','u']
    with pytest.raises(ValueError, match='at most the 3 classes that have images'): db.class_subset(None).class_subset(4).fixed(list(range(12)))
    with pytest.raises(ValueError, match='`source` must be one in which'): db.class_subset(2).datasets([])

class MyBlock(DataBlock):
    "As fastai's documentation makes one: what it needs are attributes of the class"
    blocks,splitter = (ImageBlock,CategoryBlock),staticmethod(RandomSplitter(seed=1))

def label_of(i): return 'abc'[i%3]
def first_three(items): return list(items)[3:],list(items)[:3]
def labels_in(dls): return {label_of(i) for d in (dls.train_ds,dls.valid_ds) for i in d.items}

def test_a_block_of_a_class_of_its_own_and_one_that_was_pickled():
    items = list(range(30))
    sub = MyBlock(get_x=blank, get_y=label_of).class_subset(['a','c'])
    assert isinstance(sub, MyBlock) and type(sub.whole()) is MyBlock and sub.dataloaders(items, bs=2, num_workers=0).vocab==['a','c']
    assert sub.class_subset(['c']).dataloaders(items, bs=2, num_workers=0).vocab==['c'] and sub.dataloaders(items, bs=2, num_workers=0).vocab==['a','c']
    sub = pickle.loads(pickle.dumps(block(label_of, splitter=first_three).class_subset(2, 'name')))
    assert labels_in(sub.dataloaders(items, bs=2, num_workers=0))==set('ab')

def test_a_subset_of_a_subset_without_a_limit_keeps_what_has_no_label():
    labels = [['a'],[],['b'],['a','b']]*5
    db,items = block(lambda i: labels[i], True, splitter=IndexSplitter([0,1,2,3])),list(range(20))
    assert len(Items.read(db.class_subset(None, per_class=3).class_subset(None), items).splits[1])==4
    assert len(Items.read(db.class_subset(2).class_subset(None), items).splits[1])==3

def test_items_are_read_once():
    n = dict(items=0, y=0, split=0)
    def called(k, o):
        n[k] += 1
        return o
    db = DataBlock((ImageBlock,CategoryBlock), get_items=lambda s: called('items', s), get_x=blank, get_y=lambda i: called('y', label_of(i)), splitter=lambda o: called('split', (list(o)[3:],list(o)[:3])))
    items = Items.read(db.class_subset(2).class_subset(1), list(range(12)))
    assert n==dict(items=1, y=12, split=3) # A splitter of one's own is tried three times
    items.block(); items.counts(); items.with_splits(([3,4],[0]))
    assert n==dict(items=1, y=12, split=3) and items.classes==['a']
