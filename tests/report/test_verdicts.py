"What differences allow to say"
import numpy as np, pytest
from fastai_tricks.report.verdicts import Rules, compare, differences, interval, scores_of, verdict

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
