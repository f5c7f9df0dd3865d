"Which tips go on"
import importlib.util
from pathlib import Path
import numpy as np, pandas as pd, pytest
from fastai_tricks.report.racing import still_racing
from fastai_tricks.report.verdicts import intervals, verdicts

def table(**scores): return pd.DataFrame([dict(tip=k, seed=i, score=v) for k,vs in scores.items() for i,v in enumerate(vs) if v is not None])

NINE = {f't{i}':[i/10,i/10] for i in range(9)} | dict(baseline=[.5,.5])

def test_half_goes_on_until_three_are_left():
    runs,tips = table(**NINE),[]
    for seed in range(2, 6):
        tips.append(still_racing(runs))
        runs = pd.concat([runs, pd.DataFrame([dict(tip=k, seed=seed, score=.5 if k=='baseline' else int(k[1])/10) for k in ['baseline',*tips[-1]]])])
    assert tips==[['t8','t7','t6','t5','t4'], ['t8','t7','t6'], ['t8','t7','t6'], ['t8','t7','t6']]
    # Who is out does not come back, whatever becomes of the others
    bad = runs.assign(score=np.where((runs.seed>2) & (runs.tip!='baseline'), 0., runs.score))
    assert set(still_racing(bad))=={'t8','t7','t6'}

@pytest.mark.parametrize('kw,want', [({}, ['t8','t7','t6','t5','t4']), (dict(lower=True), ['t0','t1','t2','t3','t4']), (dict(share=.2), ['t8','t7','t6']),
    (dict(share=.2, least=1), ['t8','t7']), (dict(share=1), [f't{i}' for i in range(8,-1,-1)]), (dict(first=3), [f't{i}' for i in range(9)])])
def test_rules(kw, want): assert still_racing(table(**NINE), **kw)==want

def test_rounds_that_are_not_complete_decide_nothing():
    runs = table(**NINE)
    assert still_racing(runs[~((runs.tip=='t3') & (runs.seed==1))])==[f't{i}' for i in range(9)]
    assert still_racing(runs[~((runs.tip=='baseline') & (runs.seed==1))])==[f't{i}' for i in range(9)]
    # The order of the rows within a round is not that of the names; seeds count in the order they ran
    again = runs.replace(dict(seed={0:7, 1:3}))
    assert still_racing(again)==still_racing(runs)==['t8','t7','t6','t5','t4']

@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_diverges_is_out(bad):
    assert still_racing(table(**NINE | dict(t8=[.9,bad], t7=[bad,bad])))==['t6','t5','t4','t3','t2']
    few = table(baseline=[.5,.5], a=[.4,.4], b=[.9,bad])
    assert still_racing(few)==['a'] and still_racing(few, baseline='a')==['baseline']
    assert set(still_racing(table(baseline=[.5,bad], a=[.4,.4], b=[.9,.9])))=={'a','b'}

def test_what_failed_is_out_once_others_have_gone_on():
    runs = table(**NINE | dict(t8=[.9]))
    assert len(still_racing(runs))==9
    later = pd.concat([runs, pd.DataFrame([dict(tip=k, seed=2, score=.5) for k in NINE if k!='t8'])])
    assert still_racing(later)==['t7','t6','t5']

# What the benchmark of verdicts simulates is this race, and what it says of the rates holds

spec = importlib.util.spec_from_file_location('verdicts_benchmark', Path(__file__).parents[2]/'benchmarks'/'verdicts.py')
bench = importlib.util.module_from_spec(spec)
with pytest.MonkeyPatch.context() as m:
    m.syspath_prepend(str(Path(__file__).parents[2]/'benchmarks'))
    spec.loader.exec_module(bench)

def as_runs(y): return pd.DataFrame([dict(tip=f't{i}' if i else 'baseline', seed=j, score=y[i,j]) for j in range(y.shape[1]) for i in range(len(y)) if np.isfinite(y[i,j])])

@pytest.mark.parametrize('seeds', [3, 5])
def test_the_simulated_race_is_this_one(seeds):
    for y in bench.simulate([1,2]+[0]*7, seeds, race=True, reports=10):
        ran = np.isfinite(y)
        assert ran.sum()<=10*seeds<ran.sum()+2
        for j in range(2, y.shape[1]):
            goes_on = still_racing(as_runs(y[:,:j]))
            now = [f't{i}' for i in np.flatnonzero(ran[1:,j])+1]
            assert set(goes_on[:len(now)])==set(now) and (len(now)==len(goes_on) or not ran[1:,j+1:].any())

def test_rates():
    "Two standard errors are the margin"
    res = {(m,n,g):bench.measure([g]+[0]*8, n, m, reports=4000 if not g else 2000, seed=3) for m in ('before','together','race') for n,g in ((3,0),(5,0),(3,2),(5,2))}
    false = {k:r['false'][0] for k,r in res.items()}
    assert false['before',3,0]>.3 and all(false[m,n,0]<.05+.007 for m in ('together','race') for n in (3,5))
    power = {k:r['found']['2'][0] for k,r in res.items() if k[2]}
    assert power['together',3,2]>.68-.02 and power['together',5,2]>.94-.01
    assert power['race',3,2]>power['together',3,2]+.1 and power['race',5,2]>power['together',5,2]+.03
    # The favourite on fresh seeds, where there is none
    assert all(res[m,n,0]['favourite_pays'][0]<.025+.0045 for m in ('together','race') for n in (3,5)) and res['before',3,0]['favourite_pays'][0]>.06

def test_verdicts_of_a_race_are_those_of_the_simulation():
    y = bench.simulate([2]+[0]*8, 3, race=True, reports=5)
    found = intervals(y)
    for i in range(5):
        rows = verdicts(as_runs(y[i]))
        assert rows.low.to_numpy()==pytest.approx(found.low[i], abs=2e-3) and list(rows.n)==list(found.n[i])
