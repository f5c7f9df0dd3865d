"`rank_archs` on networks whose features are known, candidates that fail, and what is left of the loaders"
import matplotlib.pyplot as plt, numpy as np, pytest, timm, torch
from fastai.data.block import DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import Learner
from fastai.torch_core import get_random_states, set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from fastai.vision.models import resnet18
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.metrics import label_ranking_average_precision_score, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
import fastai_tricks.models.rank_archs as module
from fastai_tricks.models.rank_archs import ArchCost, balanced_order, rank_archs, rank_plan, ridge_outputs
from heads import colour, image, loaders

ALPHAS = np.logspace(1, 6, 11)

class Means(nn.Module):
    "Its features are the mean colours of the image"
    def __init__(self, c=4, fail=None, after=0):
        super().__init__()
        self.scale,self.fc,self.seen,self.fail,self.after = nn.Parameter(torch.ones(3)),nn.Linear(3, c),[],fail,after
    def forward(self, x):
        self.seen.append(x)
        if self.fail and len(self.seen)>self.after: raise self.fail
        return self.fc(x.mean((2,3))*self.scale)

def means(**kwargs): return lambda dls: Learner(dls, Means(dls.c, **kwargs))

def by_hand(dls, ds, c=None):
    "Mean colours and targets of a data set, as in validation"
    xs,ys = zip(*dls.test_dl(ds.items, with_labels=True))
    return torch.cat([x.mean((2,3)) for x in xs]).numpy(),torch.cat(ys).numpy()

def ridge(kind): return make_pipeline(StandardScaler(), kind(ALPHAS))

def status(res): return dict(zip(res.table.arch, res.table.status))

def test_score_is_that_of_scikit_learn():
    dls = loaders(n=64)
    row = rank_archs(dls, [means()]).table.iloc[0]
    (x,y),(new,targets) = by_hand(dls, dls.train_ds),by_hand(dls, dls.valid_ds)
    right = ridge(RidgeClassifierCV).fit(x, y).predict(new)==targets
    assert row.score==right.mean() and np.isclose(row.se, right.std(ddof=1)/4) and row.status=='ok'
    assert row.params==3 + 3*4 + 4 and row.seconds>0

@pytest.mark.parametrize('n,f', [(8,20),(8,5),(30,8)])
def test_penalty_is_that_of_leave_one_out(n, f):
    "Of many, so that a wrong error would find another one"
    alphas = np.logspace(0, 4, 400)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x,new = rng.normal(size=(n,f)),rng.normal(size=(3,f))
        y = x[:,:2] + rng.normal(size=(n,2))
        expected = make_pipeline(StandardScaler(), RidgeCV(alphas)).fit(x, y).predict(new)
        assert np.allclose(ridge_outputs(x, y, new, alphas), expected, atol=1e-8)

def test_several_labels():
    def labels(i): return [colour(i), *('e' if i%3 else '')]
    dls = loaders(n=64, block=MultiCategoryBlock, get_y=labels)
    res = rank_archs(dls, [means()])
    (x,y),(new,targets) = by_hand(dls, dls.train_ds),by_hand(dls, dls.valid_ds)
    expected = label_ranking_average_precision_score(targets, ridge(RidgeCV).fit(x, y).predict(new))
    assert res.metric=='label ranking average precision' and np.isclose(res.table.score[0], expected)

def test_numbers():
    dls = loaders(n=64, block=RegressionBlock(2), get_y=lambda i: [float(i%4), 100.*(i%3)])
    res = rank_archs(dls, [means()])
    (x,y),(new,targets) = by_hand(dls, dls.train_ds),by_hand(dls, dls.valid_ds)
    sd = y.std(0)
    assert res.metric=='R²' and np.isclose(res.table.score[0], r2_score(targets, ridge(RidgeCV).fit(x, y/sd).predict(new)*sd))

def test_images_are_decoded_once_for_all():
    read = []
    def get(i):
        read.append(i)
        return image(i)
    block = DataBlock((ImageBlock,RegressionBlock), get_x=get, get_y=lambda i: float(i), splitter=IndexSplitter(range(8)), item_tfms=Resize(32))
    dls = block.dataloaders(range(32), bs=8, num_workers=0, device='cpu')
    read.clear()
    rank_archs(dls, dict(a=means(), b=means(), c=means()))
    assert sorted(set(read))==list(range(32)) and len(read)<=32+8+3 # A batch to see how long it takes, and fastai's looks at the first

def test_no_augmentation_and_own_normalisation(tmp_path):
    "Of a pretrained network its own; otherwise that of the loaders"
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path/'w.pth')
    theirs,seen = Normalize.from_stats([.1]*3, [.7]*3, cuda=False),{}
    dls = loaders(batch_tfms=[*aug_transforms(p_affine=1., p_lighting=1.), theirs])
    def watched(name, **kwargs):
        def build(d):
            learn = module._vision(d, 'test_resnet', **kwargs)
            learn.model.register_forward_pre_hook(lambda m,i: seen.setdefault(name, []).append(i[0]))
            return learn
        return build
    res = rank_archs(dls, dict(old=watched('old', pretrained_cfg_overlay=dict(file=str(tmp_path/'w.pth'))), new=watched('new', pretrained=False)))
    assert set(res.table.status)=={'ok'}
    cfg = timm.get_pretrained_cfg('test_resnet')
    plain = loaders().train.new(shuffle=False, drop_last=False)
    x = torch.cat([b[0] for b in plain])
    for name,mean,sd in (('old',cfg.mean,cfg.std),('new',[.1]*3,[.7]*3)):
        mean,sd = (torch.tensor(o)[:,None,None] for o in (mean, sd))
        inputs = torch.cat(seen[name])[-32:-8] # The last pass: 24 training images, then 8 for validation
        assert torch.allclose(inputs, (x-mean)/sd, atol=1e-5), name

def test_candidates_that_fail_are_listed():
    other = loaders()
    def not_finite(dls):
        learn = vision_learner(dls, 'test_resnet', pretrained=False)
        for p in learn.model[0].parameters(): nn.init.constant_(p, float('nan'))
        return learn
    res = rank_archs(loaders(n=64), dict(
        typo='test_resnett', file=('test_resnet','none.pth'), size=dict(arch='vit_tiny_patch16_224', pretrained=False), memory=means(fail=RuntimeError('CUDA out of memory.')),
        late=means(fail=MemoryError(), after=4), heads=lambda dls: Learner(dls, timm.create_model('deit_tiny_distilled_patch16_224', num_classes=4, img_size=32)),
        loaders=lambda dls: Learner(other, Means()), nan=not_finite, torch=dict(arch=resnet18, pretrained=False, pretrained_cfg_overlay={}), good=means()))
    found = status(res)
    assert res.table.arch[0]=='good' and found.pop('good')=='ok'
    for k,text in dict(typo="no network 'test_resnett'; it has 'test_resnet'", file="there is no file 'none.pth'", size="doesn't match model", memory='out of memory in batches of 8',
                       late='out of memory', heads='must end in one layer', loaders='return a Learner on them', nan='features are finite', torch='TypeError').items():
        assert text in found.pop(k), k
    assert not found and 'no network' in str(res) and 'no network' in res._repr_html_()

def test_all_fail():
    res = rank_archs(loaders(), ['nothing'])
    assert res.plan is None and len(res.table)==1 and 'no network' in str(res)
    res.plot()

@pytest.mark.parametrize('fails', [False,True])
def test_loaders_are_left_as_found(fails):
    dls = loaders(batch_tfms=aug_transforms())
    def state(): return [[*map(id, dl.after_batch.fs), *map(id, dl.after_item.fs)] for dl in dls.loaders],[dl.dataset.split_idx for dl in dls.loaders],dls.device,dls.train.bs
    dls.one_batch()
    was,rng = state(),dls.train.rng.getstate()
    set_seed(3)
    a = torch.rand(1),np.random.rand(),get_random_states()['random_state']
    set_seed(3)
    rank_archs(dls, dict(new=dict(arch='test_resnet', pretrained=False), bad=means(fail=KeyError('x') if fails else None)))
    b = torch.rand(1),np.random.rand(),get_random_states()['random_state']
    assert state()==was and dls.train.rng.getstate()==rng and a==b

def test_a_part_is_the_same_for_all_and_balanced(monkeypatch, capsys):
    monkeypatch.setattr(module, '_memory', 3*32*32*48)
    def rare(i): return 'a' if i%4 else 'b'
    seen = {}
    def watched(name):
        def build(dls):
            seen[name] = learn = Learner(dls, Means(dls.c))
            return learn
        return build
    res = rank_archs(loaders(n=160, get_y=rare), dict(one=watched('one'), two=watched('two')))
    assert (res.plan.train,res.plan.valid,res.plan.of_train,res.plan.of_valid)==(32,16,120,40)
    one,two = (torch.cat(o.model.seen) for o in seen.values())
    assert torch.equal(one, two)
    labels = [int(o[1]) for o in seen['one'].dls.train_ds]
    assert labels.count(0)==labels.count(1)==16
    assert 'the same for all' in capsys.readouterr().out

def test_same_again():
    "Weights that are random are those of the argument `seed`"
    def ranked(state, **kwargs):
        set_seed(state)
        built = []
        def build(dls):
            built.append(means()(dls))
            return built[-1]
        return rank_archs(loaders(n=64), [build], **kwargs).table.score[0],built[-1].model.fc.weight
    (a,w),(b,again),(_,other) = ranked(1),ranked(2),ranked(1, seed=1)
    assert a==b and torch.equal(w, again) and not torch.equal(w, other)

def test_time_is_over(monkeypatch):
    "A network that is slower than a few images said does not cost the rest of the afternoon"
    now,real = [0.],module.time.perf_counter
    monkeypatch.setattr(module.time, 'perf_counter', lambda: real()+now[0])
    def slow(dls):
        learn = Learner(dls, Means(dls.c))
        if len(dls.train_ds)>8: now[0] += 80
        return learn
    res = rank_archs(loaders(n=64), dict(slow=slow, next=means()), minutes=1)
    assert status(res)==dict(slow='ok', next='not run: 1 minutes are over')

def test_minutes_too_few():
    costs = dict(fast=ArchCost(1, .001, 10), slow=ArchCost(1, 1., 10))
    with pytest.raises(ValueError, match=r"`minutes` must be 0\.6 or more for 2 networks \('slow' is the slowest\), not 0\.4"):
        rank_plan(1000, 500, 4, costs, 0, .4, 6, 10**6)
    plan = rank_plan(1000, 500, 4, costs, 0, 1, 6, 10**6) # 52 s of images at 1.001 s
    assert (plan.train,plan.valid)==(34,17) and plan.seconds<=54

def test_balanced_order():
    labels = ['a']*50 + ['b']*5 + ['c']*10
    order = balanced_order(labels)
    assert sorted(order)==list(range(65)) and order!=balanced_order(labels, 1)
    for n in range(1, 16):
        counts = [sum(labels[i]==k for i in order[:n]) for k in 'abc']
        assert max(counts)-min(counts)<=1

def test_plot():
    archs = dict(means=means(), net=dict(arch='test_resnet', pretrained=False))
    res = rank_archs(loaders(n=64), archs)
    _,ax = plt.subplots()
    res.plot(ax)
    assert ax.get_xscale()=='log' and {t.get_text() for t in ax.texts}==set(archs)
    front = res.table[res.table.front].sort_values('seconds')
    assert np.allclose(ax.lines[0].get_xdata(), front.seconds*1e3)
    plt.close()

@pytest.mark.parametrize('bad', [dict(minutes=0), dict(minutes=True), dict(seed=-1), dict(archs=[]), dict(archs='resnet18'), dict(archs=[('resnet18',)]), dict(dls=None)])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=f'`{list(bad)[0]}` must be'): rank_archs(**{'dls':loaders(), 'archs':[means()], **bad})
