"`learn.bs_find`: what fits, and the Learner as it was"
import random
import matplotlib.pyplot as plt
import numpy as np, pytest, torch
from torch import nn
from fastcore.foundation import L
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelTrainException
from fastai.callback.tracker import SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.progress import CSVLogger
from fastai.callback.training import GradientAccumulation
from fastai.callback.fp16 import MixedPrecision
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
import fastai.callback.schedule
from fastai_tricks.all import ProgressiveResize
from fastai_tricks.core.test_utils import tiny_learner, sizes_seen
from fastai_tricks.resize.bs_find import _Bar, BatchTrial, largest, plot_trials

SIDE = 16

def find(learn, **kwargs):
    with learn.no_logging(): return learn.bs_find(plot=False, **kwargs)

class Limited(nn.Module):
    "Refuses more than so many pixels, in the forward or the backward pass"
    def __init__(self, pixels, backward): super().__init__(); self.pixels,self.backward = pixels,backward
    def check(self, x):
        if x.shape[0]*x.shape[-1]*x.shape[-2]>self.pixels: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')
    def forward(self, x):
        if not self.backward: self.check(x)
        else:
            x = x.requires_grad_()
            x.register_hook(lambda g: self.check(g))
        return x

def limited(images, backward=False, **kwargs):
    learn = tiny_learner(n=140, item_tfms=Resize(SIDE), **kwargs)
    learn.model.insert(0, Limited(images*SIDE*SIDE, backward))
    return learn

def everything(learn):
    def plain(state): return {k:v.tolist() if isinstance(v, torch.Tensor) else v for k,v in state.items()}
    opt = learn.opt and [list(map(plain, learn.opt.state_dict()['state'])), [dict(h) for h in learn.opt.hypers]]
    return dict(model=plain(learn.model.state_dict()), modes=[m.training for m in learn.model.modules()], opt=opt,
                frozen=[p.requires_grad for p in learn.model.parameters()], bs=learn.dls.train.bs, cbs=sorted(c.name for c in learn.cbs),
                random=random.getstate(), torch=torch.get_rng_state().tolist(), numpy=str(np.random.get_state()),
                loader=learn.dls.train.rng.getstate())

@pytest.mark.parametrize('images,expected,backward', [(3,2,False), (8,8,False), (50,48,False), (50,48,True), (63,56,False), (64,64,False), (1000,128,False)])
def test_largest_that_fits(images, expected, backward): assert find(limited(images, backward))==expected

def test_of_a_size_and_a_maximum():
    learn = limited(16)
    assert find(learn, size=SIDE//2)==64 and find(learn, size=(SIDE//2,SIDE))==32
    assert find(learn, max_bs=12)==12 and find(learn, step=1)==16
    with pytest.raises(ValueError, match='batch of 1'): find(limited(0))

@pytest.mark.parametrize('trained', [False,True])
def test_leaves_all_as_it_was(trained, tmp_path):
    learn = limited(50, cbs=[SaveModelCallback(), CSVLogger(), ProgressiveResize(mult=8)])
    learn.path = tmp_path
    if trained:
        with sizes_seen(learn): learn.fine_tune(1)
    learn.freeze()
    learn.model[2].eval()
    def files(): return {f:f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    def values(): return [list(o) for o in learn.recorder.values] if trained else None
    was,opt = (everything(learn),values(),files()),learn.opt
    assert find(learn)==48
    assert (everything(learn),values(),files())==was and learn.opt is opt

def test_several_targets():
    "The model gets the inputs alone"
    learn = limited(50)
    getters = [lambda i: PILImage.create(np.full((SIDE,SIDE,3), i, dtype=np.uint8)), lambda i: i%2, lambda i: i%2]
    block = DataBlock((ImageBlock,CategoryBlock,CategoryBlock), getters=getters, n_inp=1, splitter=IndexSplitter(range(8)))
    learn.dls = block.dataloaders(list(range(100)), bs=8, num_workers=0, device='cpu')
    learn.loss_func = lambda pred, a, b: nn.functional.cross_entropy(pred, a) + nn.functional.cross_entropy(pred, b)
    assert find(learn)==48

class CPUMixed(MixedPrecision):
    "fastai's, which knows CUDA only, on the CPU"
    def before_fit(self):
        self.autocast,self.scales = torch.autocast('cpu', dtype=torch.bfloat16),L()
        self.learn.scaler = torch.amp.GradScaler('cpu', enabled=False)
    def after_batch(self): pass

def test_leaves_autocast():
    assert find(limited(50, cbs=CPUMixed()))==48
    assert not torch.is_autocast_enabled('cpu')

def test_measures_the_step_despite_accumulation():
    learn = limited(1000, cbs=GradientAccumulation(1000))
    learn.create_opt()
    step = learn.opt.step
    def limit(*args):
        if len(learn.xb[0])>20: raise torch.OutOfMemoryError('CUDA out of memory')
        step(*args)
    learn.opt.step = limit
    assert find(learn)==16

def test_other_errors_are_raised():
    learn = limited(50)
    learn.loss_func = lambda *args: 1/0
    with pytest.raises(ZeroDivisionError): find(learn)
    assert learn.opt is None

@pytest.mark.parametrize('name,val', [('max_bs',0), ('max_bs',1.5), ('step',0)])
def test_bad_argument(name, val):
    with pytest.raises(ValueError, match=f'`{name}` must be a positive integer'): find(limited(50), **{name:val})

def test_draws_what_was_tried(capsys):
    learn = limited(20)
    assert learn.bs_find()==16
    ax = plt.gca()
    assert ax.lines[0].get_xdata().tolist()==[8,16] and min(ax.lines[0].get_ydata())>0
    assert ax.lines[1].get_xdata().tolist()==[24,32]
    assert 'bs_find: 16 images fit\n' in capsys.readouterr().out
    plt.close('all')

def test_memory_has_an_axis_of_its_own():
    ax = plot_trials([BatchTrial(16,True,.02,1.5), BatchTrial(8,True,.01,1.), BatchTrial(32,False)])
    right = next(o for o in ax.figure.axes if o is not ax)
    assert ax.lines[0].get_ydata().tolist()==[800.,800.] and right.lines[0].get_ydata().tolist()==[1.,1.5]
    plt.close('all')

def test_search_tries_no_size_twice():
    for limit,step in ((1,8), (7,8), (9,8), (100,8), (300,8), (13,1), (37,5)):
        tried = []
        n = largest(lambda n: tried.append(n) or n<=limit, 300, step)
        assert n<=limit and len(tried)==len(set(tried)) and (limit-n<step or limit<step)

@pytest.mark.parametrize('top,step', [(128,8), (8,8), (5,8), (100,1), (100,7)])
def test_bar_has_room_for_each_search(top, step):
    for limit in range(0, top+1):
        tried = []
        largest(lambda n: tried.append(n) or n<=limit, top, step)
        assert len(tried)<=len(_Bar(top, step).costs)

def test_hides_no_name_of_fastai():
    import fastai.torch_core, fastai_tricks.all
    assert not hasattr(fastai_tricks.all, 'find_bs') and fastai.torch_core.find_bs((torch.rand(5,3), torch.rand(5)))==5

class Passes(Callback):
    "Ends or passes over a step in `event`"
    order = -10
    def __init__(self, event, ex):
        def end(): raise ex()
        setattr(self, event, end)

@pytest.mark.parametrize('event,ex', [('before_batch',CancelBatchException), ('before_batch',CancelFitException), ('after_batch',CancelTrainException), ('before_fit',CancelFitException)])
def test_a_callback_that_ends_or_passes_over_steps(event, ex):
    assert find(tiny_learner(cbs=Passes(event, ex)), max_bs=16)==16

def test_a_loss_that_is_no_number():
    learn = tiny_learner(cbs=TerminateOnNaNCallback())
    learn.model[-1].bias.data.fill_(float('nan'))
    assert find(learn, max_bs=16)==16
