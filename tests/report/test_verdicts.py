"What differences allow to say"
import numpy as np, pandas as pd, pytest
from scipy import stats
from fastai_tricks.report.verdicts import (SPENT, STOPPED, Rules, blocks, compare, confirm, critical, differences, expected_sd, interval, least_difference, scores_of, verdict,
    verdicts)

@pytest.mark.parametrize('diffs,kw,want', [
    ([.1], {}, 'too few seeds'), ([.1,.1], {}, 'too few seeds'), ([.1,.1,.1], {}, 'pays'), ([-.1,-.1,-.1], {}, 'costs'), ([0.,0.,0.], {}, 'no difference'),
    ([.02,.04,.06], {}, 'inconclusive'), ([.03,.04,.05], {}, 'pays'), ([.03,.04,.05], dict(level=.99), 'inconclusive'),
    ([.03,.04,.05], dict(lower=True), 'costs'), ([-.03,-.04,-.05], dict(lower=True), 'pays'),
    ([.002,-.002,.001], {}, 'no difference'), ([.002,-.002,.001], dict(small=.001), 'inconclusive')])
def test_verdict(diffs, kw, want):
    assert verdict(diffs, **kw)==want
    # The same of the scores of a report
    scores = dict(baseline={i:.5 for i in range(3)}, tip={i:.5+d for i,d in enumerate(diffs)})
    assert compare(scores, Rules(**kw))['tip'].verdict==want

def test_interval():
    # t of 95% with 2 and 4 degrees of freedom: 4.3027 and 2.7764
    assert interval([.03,.04,.05])==pytest.approx((.04, .04-4.302653*.01/3**.5, .04+4.302653*.01/3**.5), abs=1e-7)
    assert interval([1.,2.,3.,4.,5.])[1]==pytest.approx(3-2.776445*2.5**.5/5**.5, abs=1e-5)
    m,a,b = interval([.5])
    assert m==.5 and np.isnan(a) and np.isnan(b)

@pytest.mark.parametrize('score,chance,said', [(.5,.5,'nothing learned'),(.9,.5,'no difference'),(.5,None,'no difference')])
def test_two_that_learned_nothing_are_not_alike(score, chance, said):
    same = {i:score for i in range(3)}
    assert compare(dict(baseline=same, tip=same), Rules(chance=chance, validated=40))['tip'].verdict==said

def test_seed_by_seed_where_both_have_run():
    runs = [dict(name=k, seed=s, score=v) for k,s,v in (('baseline',0,.5),('a',1,.6),('baseline',1,.4),('a',0,.7),('a',2,.9))]
    scores = scores_of(runs)
    assert differences(scores, 'a')==pytest.approx([.2,.2]) and differences(scores, 'a', {0})==pytest.approx([.2]) and differences(scores, 'b')==[]

def table(**scores):
    "A score for each seed; None where it has not run"
    return pd.DataFrame([dict(tip=k, seed=i, score=v) for k,vs in scores.items() for i,v in enumerate(vs) if v is not None])

def half(k): return (np.ones((k,k))+np.eye(k))/2

# Dunnett 1964, table II: two-sided, 95%; tips, degrees of freedom, value
@pytest.mark.parametrize('k,df,want', [(1,10,2.23),(2,5,3.03),(2,10,2.57),(2,20,2.38),(3,10,2.76),(5,20,2.73),(9,10,3.24),(9,18,2.98),(9,20,2.95),(9,60,2.77)])
def test_critical_values_of_dunnetts_tables(k, df, want):
    assert critical(half(k), df)==pytest.approx(want, abs=.015)

def test_critical_values_need_no_order_and_grow_with_independence():
    corr = np.array([[1,.5,.3],[.5,1,.4],[.3,.4,1]])
    turned = corr[np.ix_([2,0,1],[2,0,1])]
    assert critical(corr, 12)==critical(turned, 12) and critical(half(3), 12)<critical(np.eye(3), 12)
    assert critical(np.eye(3), 12)<stats.t.isf(.025/3, 12)

def test_the_intervals_are_dunnetts():
    "Without seeds as blocks: each score a seed of its own but one"
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((4,6))
    theirs = stats.dunnett(*groups[1:], control=groups[0], rng=np.random.default_rng(0)).confidence_interval(.95)
    corr,s2 = half(3),groups.var(1, ddof=1).mean()
    reach = critical(corr, 20)*np.sqrt(2*s2/6)
    mean = groups[1:].mean(1)-groups[0].mean()
    assert theirs.low==pytest.approx(mean-reach, abs=3e-3) and theirs.high==pytest.approx(mean+reach, abs=3e-3)

def test_least_squares_by_hand():
    "Two-way analysis of variance, written out, and the design matrix where cells are missing"
    rng = np.random.default_rng(1)
    y = rng.standard_normal((2,4,5)); y[1,1,3:] = y[1,3,0] = np.nan
    effects,unit,rss,df = blocks(y)
    left = y[0]-y[0].mean(0)-y[0].mean(1, keepdims=True)+y[0].mean()
    assert rss[0]==pytest.approx((left**2).sum()) and df[0]==12 and effects[0]-effects[0,0]==pytest.approx(y[0].mean(1)-y[0].mean(1)[0])
    arm,seed = np.nonzero(np.isfinite(y[1]))
    x = np.concatenate([np.eye(5)[seed], np.eye(4)[arm][:,1:]], 1)
    beta,ss,rank,_ = np.linalg.lstsq(x, y[1][arm,seed], rcond=None)
    cov = np.linalg.inv(x.T@x)[5:,5:]
    mine = unit[1][1:,1:]+unit[1][0,0]-unit[1][1:,:1]-unit[1][:1,1:]
    assert effects[1][1:]-effects[1][0]==pytest.approx(beta[5:]) and rss[1]==pytest.approx(ss[0]) and df[1]==len(arm)-rank and mine==pytest.approx(cov)

def test_verdicts_by_hand():
    y = dict(baseline=[.50,.53,.51], a=[.51,.53,.50], b=[.57,.58,.57], c=[.43,.44,.43])
    got = verdicts(table(**y))
    m = np.array(list(y.values())); left = m-m.mean(0)-m.mean(1, keepdims=True)+m.mean()
    sd = np.sqrt(2*(left**2).sum()/6)
    reach = critical(half(3), 6, 1-.05*SPENT)*sd/3**.5
    assert list(got.index)==['a','b','c'] and list(got.n)==[3]*3 and got.sd.to_numpy()==pytest.approx(sd)
    assert got.difference.to_numpy()==pytest.approx([0,.06,-.08]) and (got.high-got.difference).to_numpy()==pytest.approx(reach) and (got.difference-got.low).to_numpy()==pytest.approx(reach)
    assert list(got.verdict)==['inconclusive','pays','costs']
    turned = verdicts(table(**y), lower=True)
    assert list(turned.verdict)==['inconclusive','costs','pays'] and (turned.difference==got.difference).all()
    # A name of the user's own, in whatever order the runs come
    renamed = table(**y).replace('baseline', 'plain').sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(verdicts(renamed, baseline='plain').sort_index(), got.sort_index())

def test_one_tip_alone_gets_students_t():
    got = verdicts(table(baseline=[.5,.5,.5], a=[.53,.54,.55])).loc['a']
    assert (got.difference,got.low,got.high)==pytest.approx(interval([.03,.04,.05])) and got.verdict=='pays' and got.sd==pytest.approx(.01)

@pytest.mark.parametrize('tips,said', [(1,'too few seeds'), (5,'too few seeds'), (6,'pays')])
def test_two_seeds_are_enough_where_six_tips_share_their_residuals(tips, said):
    y = {f't{i}':[.5+.001*(i%2),.5+.001*(i%3)] for i in range(tips)} | dict(baseline=[.4,.4])
    assert verdicts(table(**y)).verdict['t0']==said

def test_a_tip_that_diverges_costs_and_harms_no_other():
    y = dict(baseline=[.50,.53,.51], a=[.51,.53,.50], b=[.57,.58,.57])
    for bad in (np.nan, np.inf, -np.inf):
        with_it = verdicts(table(wild=[.9,bad,.9], **y))
        assert with_it.verdict['wild']=='costs' and with_it.verdict['b']=='pays' and with_it.difference['b']==pytest.approx(.06)
        assert with_it.sd['b']==pytest.approx(verdicts(table(**y)).sd['b'])
        assert verdicts(table(wild=[.9,bad,.9], **y), lower=True).verdict['wild']=='costs'
    # The baseline's own seed tells nothing then
    got = verdicts(table(baseline=[.5,np.nan,.5,.5], a=[.6,.6,.61,.6], b=[.6,np.nan,.6,.61]))
    assert list(got.n)==[3,3] and list(got.verdict)==['pays','pays']

def test_seeds_that_only_some_have():
    y = dict(baseline=[.50,.53,.51,.52,.50], a=[.56,.58,.57,.58,.57], b=[.51,.53,.50,None,None], c=[.6,None,None,None,None])
    got = verdicts(table(**y))
    assert list(got.n)==[5,3,1] and list(got.verdict)==['pays','inconclusive','too few seeds']
    assert got.high.a-got.low.a < got.high.b-got.low.b
    # A seed that the baseline never had changes nothing
    pd.testing.assert_frame_equal(verdicts(pd.concat([table(**y), pd.DataFrame([dict(tip='b', seed=9, score=.9)])])), got)

def test_what_was_stopped_earlier_errs_less():
    "Its critical value is that of a sixth of the error; the others keep theirs"
    y = dict(baseline=[.50,.53,.51,.52,.50], a=[.56,.58,.57,.58,.57], b=[.51,.53,.50,None,None])
    got = verdicts(table(**y))
    _,unit,rss,df = blocks(np.array([list(y.values())], float))
    cov = (unit[0][1:,1:]+unit[0][0,0]-unit[0][1:,:1]-unit[0][:1,1:])*rss/df
    se = np.sqrt(np.diag(cov))
    for i,(tip,errs) in enumerate(dict(a=1, b=1/STOPPED).items()):
        want = critical(cov/np.outer(se, se), df[0], 1-.05*SPENT*errs)*se[i]
        assert got.high[tip]-got.difference[tip]==pytest.approx(want, rel=1e-4)

def test_a_noisy_tip_rests_on_itself():
    rng = np.random.default_rng(0)
    y = .5+.01*rng.standard_normal((10,5)); y[4] = [.2,.9,.3,.8,.95]; y[1] += .06
    got = verdicts(table(baseline=y[0], **{f't{i}':y[i] for i in range(1,10)}))
    without = verdicts(table(baseline=y[0], **{f't{i}':y[i] for i in (1,2,3,5,6,7,8,9)}))
    own = np.std(y[4]-y[0], ddof=1)
    assert got.sd.t4==pytest.approx(own) and got.verdict.t4=='inconclusive'
    assert (got.high-got.difference).t4==pytest.approx(stats.t.isf(.025*SPENT/9, 4)*own/5**.5)
    # The others pay for it with a variance that is larger, but not by much
    assert got.verdict.t1=='pays' and without.sd.t1<got.sd.t1<1.2*without.sd.t1

def test_no_residuals_no_rounding():
    got = verdicts(table(baseline=[.1+.2,.4,.5], a=[.3,.4,.5], b=[.3,.1+.3,.5]))
    assert list(got.verdict)==['no difference']*2 and (got.low==0).all()
    assert list(verdicts(table(baseline=[.3,.4,.5], a=[.4,.5,.6], b=[.2,.3,.4])).verdict)==['pays','costs']
    assert len(verdicts(table(baseline=[.3,.4])))==0

def test_runs_that_cannot_be_compared():
    with pytest.raises(ValueError, match="'a' has two scores for seed 0"): verdicts(pd.DataFrame([dict(tip=k, seed=0, score=.5) for k in ('baseline','a','a')]))
    with pytest.raises(ValueError, match="baseline: 'plain' is not in"): verdicts(table(baseline=[.5], a=[.6]), baseline='plain')

def test_the_favourite_rests_on_fresh_seeds():
    y = dict(baseline=[.50,.53,.51], a=[.51,.53,.50], b=[.57,.58,.57], c=[.43,.44,.43])
    fresh = table(baseline=[.52,.50,.51], b=[.56,.55,.56]).assign(seed=[7,8,9]*2)
    row,alone = confirm(fresh, table(**y), 'b'),confirm(fresh, None, 'b')
    diffs = [.04,.05,.05]
    assert (alone.difference,alone.low,alone.high)==pytest.approx(interval(diffs)) and row.difference==pytest.approx(np.mean(diffs))
    s2 = (2*np.var(diffs, ddof=1)+6*verdicts(table(**y)).sd.b**2)/8
    assert row.sd==pytest.approx(s2**.5) and row.high-row.difference==pytest.approx(stats.t.isf(.025, 8)*(s2/3)**.5) and row.verdict=='pays'
    # Plainly noisier than before: itself alone; a score that is not finite costs; two seeds where enough is known
    wild = fresh.assign(score=[.52,.50,.51,.9,.1,.6])
    assert confirm(wild, table(**y), 'b').sd==pytest.approx(np.std([.38,-.4,.09], ddof=1))
    assert confirm(fresh.assign(score=[.5,.5,.5,.9,np.nan,.9]), table(**y), 'b').verdict=='costs'
    assert confirm(fresh[fresh.seed<9], table(**y), 'b').verdict=='pays' and confirm(fresh[fresh.seed<9], None, 'b').verdict=='too few seeds'
    assert confirm(fresh, table(**y), 'b', lower=True).verdict=='costs'
    with pytest.raises(ValueError, match=r'fresh: seeds 0, 1, 2 have chosen'): confirm(table(**y), table(**y), 'b')
    with pytest.raises(ValueError, match='no runs of'): confirm(fresh, table(**y), 'a')

def test_what_can_be_found():
    "Power of the exact non-central t, and in the units of the standard deviation"
    d = least_difference(9, 3, .02)
    assert stats.nct.sf(critical(half(9), 18, 1-.05*SPENT), 18, d/.02*3**.5)==pytest.approx(.8, abs=1e-4)
    assert least_difference(9, 3, .04)==pytest.approx(2*d) and least_difference(9, 5, .02)<d<least_difference(12, 3, .02)
    assert least_difference(9, 1, .02)==least_difference(5, 2, .02)==np.inf and np.isfinite(least_difference(6, 2, .02))
    assert expected_sd(100)==pytest.approx((1/600+1e-4)**.5) and expected_sd(10**9)==pytest.approx(.01, abs=1e-4)
