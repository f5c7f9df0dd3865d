"The report: what it says of each layer, and that it changes nothing"
import matplotlib.pyplot as plt
import pytest, torch
from fastai.layers import ConvLayer, Flatten
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from fastai_tricks.models.convert import dense_convs
from fastai_tricks.models.depthwise_report import depthwise_report
from fastai_tricks.core.test_utils import tiny_dls

def small():
    "A Learner with two convolutions to convert, and two that stay"
    model = nn.Sequential(ConvLayer(3,8,stride=2), ConvLayer(8,16,stride=2), ConvLayer(16,8,ks=1), ConvLayer(8,16), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(16,2))
    return Learner(tiny_dls(), model, loss_func=CrossEntropyLossFlat())

def test_report(capsys):
    learn = small()
    was = {k:v.clone() for k,v in learn.model.state_dict().items()}
    cbs,opt = list(learn.cbs),learn.opt
    report = learn.depthwise_report(n=16)
    df = report.df
    assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items()) and learn.opt is opt and list(learn.cbs)==cbs
    assert list(df['layer'])==list(dense_convs(learn.model))==['0.0','1.0','2.0','3.0'] and (report.plan.init,report.plan.images)==('fit',16)
    ok = df[df['converted']]
    assert tuple(ok['layer'])==report.plan.layers==('1.0','3.0')
    assert ok['ms'].gt(0).all() and ok['ms_after'].gt(0).all() and ok['output_error'].between(0, 1).all() and ok['weight_error'].between(0, 1).all()
    assert df[~df['converted']]['why'].ne('').all() and (df[~df['converted']]['params']==df[~df['converted']]['params_after']).all()
    assert str(report) in capsys.readouterr().out
    axs = plt.subplots(1, 2)[1]
    report.plot(axs)
    assert [o.get_text().split()[0] for o in axs[0].get_yticklabels()]==['3.0','1.0'] and len(axs[1].lines)==2
    plt.close('all')

NET = nn.Sequential(nn.Conv2d(3,8,3), nn.Conv2d(8,8,3), nn.ReLU(), nn.Conv2d(8,8,3))

def test_what_the_clock_refuses_is_said(capsys):
    report = depthwise_report(NET, size=16, select=1e9, bs=2)
    assert not report.df['converted'].any() and report.plan.params==report.plan.params_after and report.macs==report.macs_after
    assert all('times as fast, less than 1e+09' in o for o in report.df['why'][1:]) and 'none of 2' in capsys.readouterr().out
    assert (report.inference,report.training,report.bs,report.size)==(1.,1.,2,(16,16))

def test_selected_and_multiplied():
    report = depthwise_report(NET, size=(12,16), select='3', skip='1', multiplier=2, bs=2)
    assert list(report.df['why'])==["on the image's channels",'in `skip`',''] and list(report.df['output'])==['10×14','8×12','6×10']
    assert report.df['params_after'][2]==2*8*9 + 2*8*8 + 8 and report.df['macs_after'][2]==(2*8*9 + 2*8*8)*60

def test_nothing_to_draw():
    depthwise_report(nn.Sequential(nn.Conv2d(3,8,1)), size=8).plot()
    assert not plt.get_fignums()

@pytest.mark.parametrize('kw,word', [(dict(model='resnet18'), '`model`'), (dict(init='fit'), '`batches`'), (dict(n=0), '`n`'), (dict(select='x'), '`select`'),
    (dict(multiplier=0), '`multiplier`'), (dict(bs=1), '`bs`'), (dict(size=0), '`size`')])
def test_report_bad_input(kw, word):
    with pytest.raises(ValueError, match=word): depthwise_report(**{'model':NET, **kw})

def test_report_of_a_learner_bad_input():
    with pytest.raises(ValueError, match='`bs`'): small().depthwise_report(bs=1)
