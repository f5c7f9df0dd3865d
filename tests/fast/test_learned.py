"Are the weights pretrained? Each situation on a real network; and the head that was trained already"
import pytest, timm, torch
from fastai.callback.core import Callback
from fastai.learner import Learner, load_learner
from fastai.vision.learner import vision_learner
from torchvision.models import resnet18, squeezenet1_1
import fastai_tricks.all as ft
from fastai_tricks.fast.fit_fast import fast_facts
from fastai_tricks.fast.learned import has_learned, look_of_weights
from fastai_tricks.fast.plan import FastArgs
from fastai_tricks.fast.steps import TrainHead
from heads import as_pretrained, frozen, loaders, plain, quiet

ASK = None
def answer(learn): return has_learned(fast_facts(learn, FastArgs(1, pretrained=True)))[0]

def learner(arch='test_resnet', **kwargs):
    if 'vit' in arch: kwargs['img_size'] = 32
    return Learner(loaders(), timm.create_model(arch, num_classes=4, **kwargs), model_dir='.')

def weights(path, arch='test_resnet'):
    "A file of weights as a long training leaves them"
    torch.save(as_pretrained(learner(arch)).model.state_dict(), path/'w.pth')
    return str(path/'w.pth')

def vision(pretrained=False): return vision_learner(loaders(), 'test_resnet', pretrained=pretrained, model_dir='.')
def with_file(path, arch): return learner(arch, pretrained=True, pretrained_cfg_overlay=dict(file=weights(path, arch), num_classes=4))
def lite0(path): return vision_learner(loaders(), 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(ft.lite0_weights())))

def then(make, *fs):
    def res(path):
        learn = make(path)
        learn.path = path
        with learn.no_bar(), learn.no_logging():
            for f in fs: learn = f(learn) or learn
        return learn
    return res

class Stop(Callback):
    order = 100
    def after_batch(self): raise KeyboardInterrupt

def forward(learn): learn.model.train()(torch.randn(4,3,32,32)+3)
def find(learn): learn.lr_find(num_it=8, show_plot=False, suggest_funcs=None)
def stopped(learn):
    with pytest.raises(KeyboardInterrupt): learn.fit_fast(1, mixed=False, cbs=Stop())
def fit(learn): learn.fit_one_cycle(1, 1e-3)
def fit_20(learn): learn.fit_one_cycle(20, 4e-3)
def fast(learn): learn.fit_fast(1, mixed=False)
def fast_pretrained(learn): learn.fit_fast(1, pretrained=True, mixed=False)
def fine_tune(learn): learn.fine_tune(1)
def load(learn): learn.load('other', with_opt=False)
def load_state(learn): learn.model.load_state_dict(torch.load(learn.path/'other.pth'))
def reloaded(learn):
    learn.export('l.pkl')
    learn = load_learner(learn.path/'l.pkl')
    learn.dls = loaders()
    return learn

def other(make):
    "Weights of a long training lie in a file"
    def res(path):
        torch.save(as_pretrained(make(path)).model.state_dict(), path/'other.pth')
        return make(path)
    return res

def scratch(path): return learner()
def transformer(path): return learner('test_vit')
def vision_scratch(path): return vision()
def pretrained(path): return with_file(path, 'test_resnet')

TABLE = dict(
    vision_with_weights=(lite0,True), vision_without=(vision_scratch,False), vision_without_frozen=(then(vision_scratch, lambda l: l.freeze()),False),
    vision_random_though_asked=(lambda path: frozen(look=False),ASK),
    resnet=(scratch,False), vit=(transformer,False), convnext=(lambda path: learner('test_convnext'),False), nfnet=(lambda path: learner('test_nfnet'),False),
    resnet_with_weights=(pretrained,True), vit_with_weights=(lambda path: with_file(path, 'test_vit'),True), convnext_with_weights=(lambda path: with_file(path, 'test_convnext'),True),
    torchvision=(lambda path: Learner(loaders(), resnet18(num_classes=4)),False), torchvision_with_weights=(lambda path: as_pretrained(Learner(loaders(), resnet18(num_classes=4))),True),
    torchvision_no_norm=(lambda path: vision_learner(loaders(), squeezenet1_1, pretrained=False),False),
    forward=(then(scratch, forward),False), forward_vision=(then(vision_scratch, forward),False),
    lr_find=(then(scratch, find),False), lr_find_no_batch_norm=(then(transformer, find),False), lr_find_pretrained=(then(pretrained, find),True),
    stopped=(then(scratch, stopped),False), stopped_vision=(then(vision_scratch, stopped),False), stopped_then_loaded=(then(other(scratch), stopped, load),ASK),
    one_epoch=(then(scratch, fit),False), one_epoch_vision=(then(vision_scratch, fit),False), one_epoch_no_batch_norm=(then(transformer, fit),False),
    fast=(then(vision_scratch, fast),False), fast_plain=(then(scratch, fast),False), fast_twice=(then(scratch, fast, fast),False),
    fast_then_loaded=(then(other(vision_scratch), fast, load),ASK), fast_pretrained=(then(pretrained, fast, fast),True),
    fast_told=(then(lambda path: plain(), fast_pretrained),True), fast_reloaded=(then(scratch, fast, reloaded),False),
    fine_tune=(then(lambda path: frozen(), fine_tune),True), fine_tune_plain=(then(pretrained, fine_tune),ASK), pretrained_reloaded=(then(lambda path: frozen(), fine_tune, reloaded),True),
    load=(then(other(scratch), load),True), load_vision=(then(other(vision_scratch), load),True), load_state_dict=(then(other(scratch), load_state),True),
    nothing_tells=(lambda path: plain(),ASK), nothing_tells_after_a_fit=(then(lambda path: plain(), fit),ASK))

@pytest.mark.parametrize('case', TABLE)
def test_pretrained_or_not(case, tmp_path):
    make,expected = TABLE[case]
    learn = make(tmp_path)
    assert answer(learn) is expected
    if expected is ASK:
        with pytest.raises(ValueError, match='`pretrained` must be True or False here, as '): learn.fit_fast(1)
    else: assert learn.fit_fast_plan(1).pretrained is expected

def test_long_training_from_scratch(tmp_path):
    "It is never taken for pretrained; where it has come far, the question is asked"
    assert answer(then(scratch, fit_20)(tmp_path)) is not True and answer(then(vision_scratch, fit_20)(tmp_path)) is not True
    far = as_pretrained(then(scratch, fit)(tmp_path))
    assert answer(far) is ASK

@pytest.mark.parametrize('arch', ['test_resnet','test_vit','test_convnext','test_byobnet','test_efficientnet_gn','test_nfnet','vit_tiny_patch16_224','levit_128s','resnet18'])
def test_look_of_new_weights(arch): assert look_of_weights(timm.create_model(arch))=='new'

# The head ---------------------------------------------------------------------------

def trains_head(learn, epochs=1): return any(isinstance(s, TrainHead) for s in learn.fit_fast_plan(epochs).steps)

@pytest.mark.parametrize('first', [lambda l: l.fit_fast(0, mixed=False), lambda l: l.fit_head(2)])
def test_trained_head_is_remembered(first, tmp_path):
    learn = frozen()
    assert trains_head(learn)
    quiet(learn, first, learn)
    assert not trains_head(learn) and trains_head(learn, 0) and dict(learn.fit_fast_plan(1).why)['head']=='`fit_head` has trained it'
    learn.path = tmp_path
    learn.export('l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    again.dls = learn.dls
    assert not trains_head(again)

def more_classes(learn):
    learn.grow_head(loaders(get_y=lambda i: 'abcde'[i%5]))
def another_body(learn):
    for p in learn.model[0].parameters(): p.data.mul_(1.1)
def trained_on(learn):
    learn.unfreeze()
    learn.fit(1)
    learn.freeze()

@pytest.mark.parametrize('change', [more_classes,another_body,trained_on])
def test_changed_head_is_trained_again(change):
    "It has other rows, or other features"
    learn = frozen()
    quiet(learn, learn.fit_head, 1)
    quiet(learn, change, learn)
    assert trains_head(learn)

def test_notes_are_plain():
    "An exported Learner is loaded without this package"
    learn = frozen()
    quiet(learn, learn.fit_fast, 0, mixed=False)
    def kinds(o): return {type(o)} | (set().union(*map(kinds, o)) if isinstance(o, tuple) else set())
    notes = {k:v for k,v in vars(learn.model).items() if k in ('_trained_head','_began_pretrained')}
    assert len(notes)==2 and kinds(tuple(notes.values()))<={tuple,int,float,bool}
