"`latency_report` times what it says, scores each file, and leaves the Learner as it was"
import numpy as np, pandas as pd, pytest, torch
import fastai_tricks.all # noqa: F401 - patches Learner
from fastai_tricks.deploy.latency import LatencyReport, pareto
from deployed import learner, loaders

pytest.importorskip('onnxruntime')
WAYS = ['network','predict','get_preds','torch.export','onnx fp32','onnx int8']

@pytest.mark.parametrize('ms,score,best', [([3,1,2,2],[.9,.5,.4,.8],[1,3,0]), ([1,2],[.5,.5],[0]), ([1],[0.],[0]), ([2,1],[.1,.9],[1])])
def test_pareto(ms, score, best): assert pareto(ms, score)==best

def test_report(photos, tmp_path, capsys):
    learn = learner(loaders(photos), path=tmp_path)
    learn.fit(1)
    model,opt,threads = learn.model,learn.opt,torch.get_num_threads()
    before = {k:v.clone() for k,v in model.state_dict().items()}
    r = learn.latency_report(bs=(1,2), n_valid=8, calibrate=4, turns=2, folder=tmp_path/'kept')
    assert learn.model is model and learn.opt is opt and torch.get_num_threads()==threads
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert list(r.df['way'])==WAYS*2 and list(r.df['network'])==['dense']*6+['depthwise']*6 and r.n==8
    assert (r.df['ms, batch 1']>0).all() and list(r.df['ms, batch 2'].isna())==[w=='predict' for w in WAYS]*2
    assert (r.df['least']<=r.df['ms, batch 1']).all() and (r.df['most']>=r.df['ms, batch 1']).all()
    exact = r.df[r.df['way'].isin(WAYS[:5]) & (r.df['network']=='dense')]['accuracy']
    with learn.no_bar(): targs = learn.get_preds()
    assert np.allclose(exact, (targs[0].argmax(1)==targs[1]).float().mean())
    assert sorted(f.name for f in (tmp_path/'kept').iterdir())==sorted(f'{n}{e}' for n in ('dense','depthwise') for e in ('.pt2','_fp32.onnx','_int8.onnx'))
    for _,row in r.df[r.df['way']=='onnx fp32'].iterrows():
        assert row['MB']==pytest.approx((tmp_path/'kept'/f"{row['network']}_fp32.onnx").stat().st_size/1e6)
    r.plot()
    assert 'times as long' in capsys.readouterr().out and 'onnx int8' in r._repr_html_()

def test_dense_and_depthwise_are_timed_each_by_itself(photos, tmp_path, monkeypatch):
    learn,seen = learner(loaders(photos), path=tmp_path),{}
    real = learn.model
    def ask(ways, bs, turns):
        for w in ways:
            if w.name in ('predict','get_preds'):
                def hook(m, i, key=(w.network,w.name)): seen[key] = m is real
                hooks = [m.register_forward_pre_hook(hook) for m in (real, learn.model)]
                w.calls(1)()
                for h in hooks: h.remove()
        return {i:[1.] for i in range(len(ways))}
    monkeypatch.setattr('fastai_tricks.deploy.latency._times', ask)
    learn.latency_report(bs=[1], n_valid=2, calibrate=2, turns=1)
    assert seen=={('dense','predict'):True, ('dense','get_preds'):True, ('depthwise','predict'):False, ('depthwise','get_preds'):False}

def test_a_converted_learner_of_ones_own(photos, tmp_path):
    learn,other = learner(loaders(photos), path=tmp_path),learner(loaders(photos), path=tmp_path)
    other.to_depthwise(n=8)
    r = learn.latency_report(depthwise=other, bs=[1], n_valid=4, calibrate=2, turns=1)
    p = [o.get_preds(dl=o.dls.valid)[0] for o in (learn, other)]
    assert not torch.allclose(*p) and list(r.df['network'].unique())==['dense','depthwise']

def test_the_learner_has_its_network_again_after_an_error(photos, tmp_path, monkeypatch):
    learn = learner(loaders(photos), path=tmp_path)
    model = learn.model
    def fails(*args): raise RuntimeError('stop')
    monkeypatch.setattr('fastai_tricks.deploy.latency._table', fails)
    with pytest.raises(RuntimeError, match='stop'): learn.latency_report(bs=[1], n_valid=2, calibrate=2, turns=1)
    assert learn.model is model

def test_verdict():
    row = dict(network='dense', MB=1.)
    df = pd.DataFrame([row | dict(way='network', accuracy=.9) | {'ms, batch 1':8.}, row | dict(way='onnx int8', network='depthwise', accuracy=.88) | {'ms, batch 1':2.}])
    said = str(LatencyReport(df, 'accuracy', 10, (64,64)))
    assert 'onnx int8 (depthwise): 2.0 ms, the network alone in PyTorch 8.0 ms (4.0 times as long); accuracy 0.880 against 0.900' in said
    LatencyReport(df, 'accuracy', 10, (64,64)).plot()

@pytest.mark.parametrize('kwargs', [dict(bs=[0]), dict(n_valid=0), dict(calibrate=0), dict(turns=1.5)])
def test_wrong_arguments(kwargs, photos, tmp_path):
    with pytest.raises(ValueError, match=f'`{next(iter(kwargs))}` must be a positive integer'): learner(loaders(photos), path=tmp_path).latency_report(**kwargs)
