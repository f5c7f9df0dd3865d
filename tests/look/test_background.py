"Attention beside the object: exact on maps, masks and boxes made by hand; through transforms; as columns of a fit"
import copy
import numpy as np, pytest, torch
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import BBoxBlock, BBoxLblBlock, Flatten, ImageBlock, MaskBlock, Normalize, PILImage, PILMask, RandomResizedCrop, Resize, aug_transforms, imagenet_stats, nn
from PIL import Image
from fastai_tricks.look.background import _others, alpha_mask, background_metrics, background_share, box_mask, masked_batch, mixed, pointing_game
from fastai_tricks.core.test_utils import tiny_learner

def test_share_and_pointing_by_hand():
    m = torch.zeros(4,2,3, dtype=torch.bool)
    m[:,0,:2] = True
    maps = torch.tensor([[[1.,0,0],[0,0,0]], [[0,0,1.],[0,0,0]], [[.5,.25,0],[0,.75,0]], [[0,0,0],[0,0,0.]]])
    share,hit = background_share(maps, m),pointing_game(maps, m)
    assert share[:3].tolist()==[0.,1.,.5] and share[3].isnan()
    assert hit[:3].tolist()==[1.,0.,0.] and hit[3].isnan()
    assert background_share(torch.ones(1,4,6), torch.ones(1,4,6)<0).tolist()==[1.]

@pytest.mark.parametrize('boxes,rows,cols', [((1,0,3,2),(0,2),(1,3)), ([[1,0,3,2]],(0,2),(1,3)), ([[-5,-5,2,1]],(0,1),(0,2)), ([[3,2,99,99]],(2,4),(3,6)), (torch.tensor([[1.4,.6,3.4,2.2]]),(1,2),(1,3))])
def test_boxes_by_hand(boxes, rows, cols):
    expected = np.zeros((4,6), bool)
    expected[slice(*rows),slice(*cols)] = True
    assert np.array_equal(box_mask(boxes, (6,4)), expected)
def test_several_boxes_and_none():
    assert box_mask([[0,0,1,1],[2,0,3,1]], (4,2)).tolist()==[[True,False,True,False],[False]*4]
    assert not box_mask([], (4,2)).any()

def test_alpha(tmp_path):
    a = np.zeros((4,6), np.uint8)
    a[1:3,2:5] = 200
    a[0,0] = 100
    Image.fromarray(np.dstack([np.zeros((4,6,3), np.uint8), a])).save(tmp_path/'a.png')
    assert np.array_equal(alpha_mask(tmp_path/'a.png'), a==200) and alpha_mask(tmp_path/'a.png', 50)[0,0]
    Image.new('RGB', (6,4)).save(tmp_path/'b.png')
    assert alpha_mask(tmp_path/'b.png') is None

def bright(i, wh=(80,60)):
    "A bright rectangle, and where it is"
    x,y = 10 + 3*(i%8),8 + 2*(i%5)
    im = np.zeros((wh[1],wh[0],3), np.uint8)
    im[y:y+30,x:x+25] = 200
    return im,im[...,0]>0
def picture(i): return PILImage.create(bright(i)[0])
def where(i): return bright(i)[1]
def odd(i): return 'odd' if i%2 else 'even'

def bright_dls(item_tfms=Resize(48), batch_tfms=None, blocks=(ImageBlock,CategoryBlock), get_y=odd, n_inp=None, **kwargs):
    return DataBlock(blocks, get_x=picture, get_y=get_y, n_inp=n_inp, splitter=IndexSplitter(list(range(12))), item_tfms=item_tfms, batch_tfms=batch_tfms).dataloaders(list(range(32)), bs=8, num_workers=0, device='cpu', **kwargs)

@pytest.mark.parametrize('item_tfms', [Resize(48), Resize((40,64), method='squish'), Resize(48, method='pad', pad_mode='zeros'), RandomResizedCrop(48, min_scale=.5)], ids=str)
def test_masks_go_the_way_of_the_images(item_tfms):
    dls = bright_dls(item_tfms, aug_transforms(size=40) + [Normalize.from_stats(*imagenet_stats)])
    x,m,y,kept = masked_batch(dls.valid, range(12), where)
    grey = dls.valid.after_batch.decode((x,))[0].float().mean(1)
    grey = grey/grey.max()
    assert kept==tuple(range(12)) and m.dtype==torch.bool and m.shape==grey.shape
    assert ((grey>.5)==m).float().mean()>.97 and .1<m.float().mean()<.7
    assert torch.equal(x, dls.valid.one_batch()[0][:8]) if len(x)==8 else torch.equal(x[:8], dls.valid.one_batch()[0])

def test_masks_from_targets_boxes_and_functions():
    expected = masked_batch(bright_dls().valid, range(6), where)[1]
    def box(i): rows,cols = np.nonzero(where(i)); return [[cols.min(), rows.min(), cols.max()+1, rows.max()+1]]
    boxes = bright_dls(blocks=(ImageBlock,BBoxBlock,BBoxLblBlock), get_y=[box, lambda i: ['thing']], n_inp=1)
    masks = bright_dls(blocks=(ImageBlock,MaskBlock), get_y=lambda i: PILMask.create(where(i).astype(np.uint8)))
    for got in (masked_batch(bright_dls().valid, range(6), box), masked_batch(bright_dls().valid, range(6), lambda i: torch.tensor(where(i))), masked_batch(bright_dls().valid, range(6), lambda i: Image.fromarray(where(i))),
                masked_batch(boxes.valid, range(6)), masked_batch(masks.valid, range(6))): assert torch.equal(got[1], expected)

def test_images_without_a_mask_are_left_out():
    dls = bright_dls()
    none = lambda i: None if i==2 else np.ones((60,80)) if i==3 else np.zeros((60,80)) if i==4 else where(i)
    assert masked_batch(dls.valid, range(7), none).idxs==(0,1,5,6)
    assert masked_batch(dls.valid, [2], none).x is None
    with pytest.raises(ValueError, match='`mask` must be a mask of the picture'): masked_batch(dls.valid, [0], lambda i: np.ones((9,9)))

@pytest.fixture
def learn(tmp_path):
    torch.manual_seed(0)
    learn = Learner(bright_dls(), nn.Sequential(nn.Conv2d(3,1,1,bias=False), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(1,2)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    learn.model[0].weight.data.fill_(1.)
    learn.model[3].weight.data.copy_(torch.tensor([[1.],[-1.]]))
    learn.model[3].bias.data.copy_(torch.tensor([0.,0.]))
    return learn

def test_report_by_hand(learn):
    "This model says 'even', and looks at what is bright"
    before = copy.deepcopy(learn.model.state_dict())
    df = learn.background_report(where)
    _,m,_,_ = masked_batch(learn.dls.valid, range(12), where)
    assert list(df.index[-1:])==['all'] and set(df.index)=={'odd','even','all'} and list(df['n'])==[6,6,12]
    assert (df['background_share']<.05).all() and (df['pointing_game']==1).all() # Interpolation blurs the border
    assert df.loc['all','background_area']==pytest.approx((~m).float().mean().item())
    assert (df.loc['even','accuracy'], df.loc['odd','accuracy'], df.loc['all','accuracy'])==(1,0,.5)
    assert learn.background_report(where, n=5).loc['all','n']==5
    # For 'odd' nothing that is bright speaks: no attention at all
    assert np.isnan(learn.background_report(where, targets='true').loc['odd','background_share'])
    # The other way round: what is dark
    learn.model[0].weight.data.fill_(-1.)
    learn.model.insert(1, nn.Softplus())
    df = learn.background_report(where)
    assert df.loc['all','background_share']>.95 and df.loc['all','pointing_game']==0
    learn.model.__delitem__(1)
    assert all(k in before for k in learn.model.state_dict())

def test_columns_of_a_fit(learn):
    learn.metrics = [accuracy, *background_metrics(where, n=None)]
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 0.)
    names = list(learn.recorder.metric_names)
    assert names==['epoch','train_loss','valid_loss','accuracy','background_share','pointing_game','time']
    all_ = learn.background_report(where).loc['all']
    for v in learn.recorder.values: assert list(v)[-2:]==pytest.approx([all_['background_share'],all_['pointing_game']])
    with learn.no_bar(), learn.no_logging():
        assert list(learn.validate())[-2:]==pytest.approx([all_['background_share'],all_['pointing_game']])
        assert len(learn.get_preds()[0])==12
        learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)
        learn.export()
        assert len(load_learner(learn.path/'export.pkl').predict(3)[2])==2
        learn.fit(1, 0.)
    assert list(learn.recorder.values[-1])[-2:]==pytest.approx([all_['background_share'],all_['pointing_game']])

def test_metrics_change_nothing():
    def run(metrics):
        set_seed(0)
        learn = tiny_learner(bright_dls())
        learn.metrics = metrics
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
        return learn.model.state_dict()
    a,b = run([]),run(background_metrics(where))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_bad_input(learn):
    for kw,why in ((dict(mask='x'),'mask'), (dict(n=0),'n'), (dict(n=.5),'n'), (dict(targets='x'),'targets'), (dict(method='x'),'method')):
        with pytest.raises(ValueError, match=f'`{why}` must be'): learn.background_report(**kw)
    for kw,why in ((dict(mask='x'),'mask'), (dict(n=0),'n'), (dict(method='x'),'method')):
        with pytest.raises(ValueError, match=f'`{why}` must be'): background_metrics(**kw)
    with pytest.raises(ValueError, match='`mask` must give masks or boxes for some images'): learn.background_report()
    learn.metrics = background_metrics()
    with pytest.raises(ValueError, match='`mask` must give masks or boxes for some images'), learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_mixed_by_hand():
    x,o = torch.ones(1,2,4,8),torch.zeros(1,2,4,8)
    res = mixed(x, o, .5)
    assert res[0,0].tolist()==[[0]*8, [0,0,1,1,1,1,0,0], [0,0,1,1,1,1,0,0], [0]*8] and torch.equal(res[:,0], res[:,1]) and o.sum()==0

class Sees(nn.Module):
    "Says 'odd' where a part of the image is bright"
    def __init__(self, part): super().__init__(); self.part,self.w = part,nn.Parameter(torch.zeros(1))
    def forward(self, x):
        m = torch.zeros_like(x[:,0], dtype=torch.bool)
        m[:,8:24,8:24] = True
        if self.part=='border': m = ~m
        v = (x.mean(1)*m).sum((1,2))/m.sum((1,2)) - .5
        return torch.stack([-v,v], 1)*20 + self.w

def halves(i): return PILImage.create(np.full((32,32,3), 255*(i%2), np.uint8))

@pytest.mark.parametrize('part', ['middle','border'])
def test_probe_by_hand(part):
    dls = DataBlock((ImageBlock,CategoryBlock), get_x=halves, get_y=odd, splitter=IndexSplitter(list(range(10)))).dataloaders(list(range(20)), bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, Sees(part).train(), loss_func=CrossEntropyLossFlat())
    df = learn.background_probe(keep=.5)
    assert list(df.index)==['as they are','border of another','middle of another'] and list(df.columns)==['accuracy','probability','other']
    other = {'middle':'middle of another', 'border':'border of another'}[part]
    same = ({*df.index[1:]}-{other}).pop()
    assert df.loc[['as they are',same],['accuracy','other']].values.tolist()==[[1,0]]*2 and df.loc[other,['accuracy','other']].tolist()==[0,1]
    assert df.loc['as they are','probability']>.99 and df.loc[other,'probability']<.01 and learn.model.training
    assert learn.background_probe(keep=.5, n=3).shape==(3,3)

def test_probe_bad_input(learn):
    for kw,why in ((dict(keep=0.),'keep'), (dict(keep=1.),'keep'), (dict(keep=75),'keep'), (dict(n=1),'n'), (dict(dl=learn.dls.test_dl([0,2], with_labels=True)),'dl')):
        with pytest.raises(ValueError, match=f'`{why}` must be'): learn.background_probe(**kw)

def test_images_looked_at_are_spread_over_the_set(learn):
    seen = []
    def note(i): seen.append(i); return where(i)
    assert learn.background_report(note, n=5).loc['all','n']==5
    assert seen==[0,2,4,7,9]

@pytest.mark.parametrize('y', [[0,0,0,0,1,1], [0,1,0,1], [2,2,1,1,0,0,0,0,0]])
def test_other_images_are_of_another_class(y): assert all(y[i]!=y[o] for i,o in enumerate(_others(torch.tensor(y)).tolist()))
