"The trainings of a report one after the other: fair, within the minutes, taken up after a kill. Nothing is trained here"
import json
from pathlib import Path
import numpy as np, pandas as pd, pytest
from fastai_tricks.report.plan import epochs_that_fit
from fastai_tricks.report.result import TipsReport
from fastai_tricks.report.tips import Tip
from report_world import Pretend, Score, bench, block, clock, report, worth

pytestmark = pytest.mark.usefixtures('pretend')

def order(out): return [(r['seed'],r['name']) for r in map(json.loads, (f.read_text() for f in sorted((Path(out)/'runs').glob('*.json'))))]

# Time -------------------------------------------------------------------------------

@pytest.mark.parametrize('minutes,slower', [(17, None), (18, lambda t: 1 if t<400 else 1.7), (24, lambda t: 1.5 if t<300 else 1)])
def test_budget(tmp_path, minutes, slower):
    if slower: clock.slower = slower
    res = report(tmp_path, [worth('good', .02), worth('better', .03), worth('poor', -.02), worth('small', 0, .4)], minutes)
    assert .9*60*minutes < clock.t < 1.1*60*minutes
    assert res.json['minutes']*60==pytest.approx(clock.t, rel=.01)
    # All of a seed get the same time, whatever an image takes
    for s in range(3): assert len({r['budget'] for r in res.json['runs'] if r['seed']==s})==1
    if slower is not None: return
    for r in res.json['runs']: assert r['seconds']==pytest.approx(r['budget'], rel=.1), r['name']
    small,base = ([r['images'] for r in res.runs(k)] for k in ('small','baseline'))
    assert np.mean(small)/np.mean(base)==pytest.approx(2.5, rel=.1)

def test_what_is_trained_is_what_was_planned(tmp_path, pretend):
    report(tmp_path, [worth('a', -.02), worth('b', -.02, .5)])
    runs = [json.loads(f.read_text()) for f in sorted((tmp_path/'runs').glob('*.json'))]
    for c,r in zip(pretend.trained, runs):
        cost = .5 if r['name']=='b' else 1
        assert (c['epochs'],c['images'])==epochs_that_fit(r['budget']/.5/cost, 40, 4) and c['seed']==r['seed'] and c['tips']==[r['name']][r['name']=='baseline':]

def test_noise_is_not_taken_for_speed(tmp_path):
    "Two that cost the same train on about as many images, though the machine is up to three times as slow at times"
    rng = np.random.default_rng(0)
    speed = [rng.choice([1,1.5,3]) for _ in range(300)]
    clock.slower = lambda t: speed[int(t//10)%300]
    res = report(tmp_path, [worth(k, -.01) for k in 'abcd'], 45)
    for s in range(3):
        images = [r['images'] for r in res.json['runs'] if r['seed']==s]
        assert max(images)<1.4*min(images), images

def test_one_bad_minute_does_not_count(tmp_path):
    "Three times as slow in the second round: in the third it trains on as many images as the others"
    res = report(tmp_path, [worth('a', -.01, lambda seed: 3 if seed==1 else 1), worth('b', -.01)], 20)
    assert len({r['images'] for r in res.json['runs'] if r['seed']==2})==1 and res.runs('a')[1]['seconds']>2*res.runs('b')[1]['seconds']

def test_large_validation_set_is_drawn_once(tmp_path, pretend):
    res = report(tmp_path, [worth('a', .02)], 24, n=840, db=block(800), steps=0)
    n = res.json['settings']['validated']
    assert 200<=n<800 and .9*24*60<clock.t<1.1*24*60 and f'40 training and {n} of 800 validation images' in res.conditions
    drawn = {c['valid'] for c in pretend.trained}
    assert len(drawn)==1 and len(set(*drawn))==n

def test_too_few_minutes(tmp_path):
    with pytest.raises(ValueError, match=r'`minutes` must be at least ([\d.]+).* not 0.5') as e: report(tmp_path, [worth('good', .02)], .5)
    assert not (tmp_path/'runs').exists() and clock.t<60
    enough = float(str(e.value).split('at least ')[1].split()[0])
    report(tmp_path/'enough', [worth('good', .02)], enough)
    assert (tmp_path/'enough'/'report.json').exists()

def test_what_is_out_of_the_question_is_refused_after_two_batches(tmp_path, pretend, monkeypatch):
    monkeypatch.setattr(bench, 'step_seconds', lambda learn, steps: (8.,9.))
    # 6 trainings of 6 epochs of 2 batches, 4 seconds each: 288 seconds, and a tenth more
    with pytest.raises(ValueError, match='`minutes` must be at least 5.3 on this machine .one tip with 3 seeds'): report(tmp_path, [worth('a', .02)], 3)
    assert pretend.calls==[] and clock.t<1
    report(tmp_path/'enough', [worth('a', .02)], 6)

# Order and combinations ---------------------------------------------------------------

def test_fair_order(tmp_path):
    report(tmp_path, [worth('a', -.01), worth('b', -.01)])
    got = order(tmp_path)
    assert [s for s,_ in got[:9]]==[0]*3 + [1]*3 + [2]*3
    assert [[k for t,k in got if t==s] for s in range(3)]==[['baseline','a','b'],['a','b','baseline'],['b','baseline','a']]

def test_verdicts_and_combination(tmp_path):
    res = report(tmp_path, [worth('good', .02), worth('poor', -.03), worth('better', .03), worth('spoils', .01)])
    df = res.df.set_index('tip')
    assert set(df.index)=={'baseline','good','poor','better','spoils','better + good','better + good + spoils'}
    assert dict(df.verdict[['good','better','spoils']])==dict(good='pays', better='pays', spoils='pays') and df.n['poor']==2
    assert df.n['better']>=3 and df.verdict['poor'] in ('costs','too few seeds')
    assert df.difference['poor']==pytest.approx(-.0295) and df.score['baseline']==pytest.approx(.502)
    assert res.json['favourite']==['better','good','spoils']
    assert [l for l in res.code.splitlines() if 'Worth' in l]==['learn.add_cb(Worth(0.02))','learn.add_cb(Worth(0.03))','learn.add_cb(Worth(0.01))']
    assert np.isnan(df.to_baseline['poor']) and df.to_baseline['good']<=df.seconds['good']

def test_two_of_a_kind_are_not_combined(tmp_path):
    res = report(tmp_path, [worth('a', .03, kind='size'), worth('b', .02, kind='size'), worth('c', .01)])
    assert [k for k in res.names if '+' in k]==['a + c']

def test_lower_is_better(tmp_path):
    class Loss(Score): name = 'made_up_loss'
    res = report(tmp_path, [worth('good', -.03), worth('poor', .03)], metric=Loss())
    assert dict(res.df.set_index('tip').verdict)=={'baseline':'', 'good':'see fresh seeds', 'poor':'costs'}
    assert res.json['favourite']==['good'] and res.advice.startswith('Use good')

def test_combination_that_fails_costs_nothing_else(tmp_path, pretend, monkeypatch):
    def fails(self, tips, *args, **kwargs):
        assert len(tips)<2
        return pretend(tips, *args, **kwargs)
    monkeypatch.setattr(bench.Bench, 'train', fails)
    res = report(tmp_path, [worth('a', .02), worth('b', .01)])
    assert res.json['favourite']==['a'] and 'AssertionError' in res.left_out['a + b']

def breaks(monkeypatch, pretend, *lost):
    "Trainings of a name with a seed that raise, after a while"
    def train(self, tips, seed, *args, **kwargs):
        if kwargs.get('parts') is not None and (' + '.join(t.name for t in tips),seed) in lost:
            clock.spend(30)
            raise RuntimeError('breaks')
        return pretend(tips, seed, *args, **kwargs)
    monkeypatch.setattr(bench.Bench, 'train', train)

@pytest.mark.parametrize('seed', [0,1,2])
def test_a_tip_that_fails_in_the_race_is_given_up(tmp_path, pretend, monkeypatch, seed):
    breaks(monkeypatch, pretend, ('b',seed))
    minutes = 24
    res = report(tmp_path, [worth('a', .02), worth('b', .5), worth('c', -.02), worth('d', .01)], minutes)
    assert res.left_out=={'b':'fails here: RuntimeError: breaks'} and 'b' not in res.json['favourite'] and 'a' in res.json['favourite']
    assert len(res.runs('b'))==seed and sorted(r['seed'] for r in res.runs('baseline', 'race'))==list(range(len(res.runs('a', 'race'))))
    assert .8*60*minutes<clock.t<1.1*60*minutes and res.json['minutes']*60==pytest.approx(clock.t, rel=.01)
    n = len(pretend.calls)
    again = report(tmp_path, [worth('a', .02), worth('b', .5), worth('c', -.02), worth('d', .01)], minutes)
    assert len(pretend.calls)==n, 'not tried again'
    pd.testing.assert_frame_equal(res.df, again.df)
    assert again.left_out==res.left_out and again.code==res.code

def test_one_tip_that_fails(tmp_path, pretend, monkeypatch):
    breaks(monkeypatch, pretend, ('a',1))
    res = report(tmp_path, [worth('a', .5)], 6)
    assert res.json['favourite']==[] and 'a' in res.left_out and 'Worth' not in res.code

def test_a_favourite_that_fails_on_fresh_seeds(tmp_path, pretend, monkeypatch):
    for lost in (1000,1001):
        breaks(monkeypatch, pretend, ('a',lost))
        res = report(tmp_path/str(lost), [worth('a', .02), worth('b', -.01)])
        assert 'a' in res.left_out and not res.finding.pays and res.advice.startswith('Inconclusive') and len(res.runs('a', 'confirm'))==lost-1000
        assert res.df.set_index('tip').verdict['a']!='see fresh seeds' or len(res.fresh)
        res.plot(), repr(res)

def test_after_a_combination_that_failed_the_next_is_tried_and_kept(tmp_path, pretend, monkeypatch):
    "Also when the report goes on, with less time left than there was"
    breaks(monkeypatch, pretend, ('a + b',0))
    tips = [worth('a', .03), worth('b', .02), worth('c', .01)]
    res = report(tmp_path, tips)
    assert res.json['favourite']==['a','c'] and 'a + b' in res.left_out
    again = report(tmp_path, tips)
    assert again.json['favourite']==['a','c'] and again.left_out==res.left_out

def test_killed_after_failures_and_taken_up_again(tmp_path, pretend, monkeypatch):
    "The same trainings of the same length, wherever it was killed"
    tips = [worth('a', .03, 1.3), worth('b', .04), worth('c', -.01, .7), worth('e', .02)]
    def go(out): return report(out, tips, 30, train_minutes=5)
    def runs(res): return [(r['name'],r['seed'],r['stage'],r['budget'],r['images'],r['score']) for r in res.json['runs']]
    breaks(monkeypatch, pretend, ('b',1), ('a + e',1))
    lossy = bench.Bench.train
    res = go(tmp_path/'whole')
    assert set(res.left_out)=={'b','a + e'} and res.favourite=='a'
    looks,n = len(pretend.calls)-len(res.json['runs']),len(res.json['runs'])
    for kill in (5,12,16,n-7,n-1): # In the race, the combination, on fresh seeds, half as long
        clock.restart()
        del pretend.calls[:]
        def dies(self, *args, **kwargs):
            if len(pretend.calls)==looks+kill: raise KeyboardInterrupt
            return lossy(self, *args, **kwargs)
        monkeypatch.setattr(bench.Bench, 'train', dies)
        with pytest.raises(KeyboardInterrupt): go(tmp_path/str(kill))
        monkeypatch.setattr(bench.Bench, 'train', lossy)
        again = go(tmp_path/str(kill))
        assert runs(again)==runs(res) and again.left_out==res.left_out and again.advice==res.advice

def test_the_favourite_is_judged_by_fresh_seeds_alone(tmp_path):
    "What gained in the race, and loses with seeds that had no part in the choice, is not recommended"
    lucky = Tip('lucky', learn='learn.add_cb(Lucky(0))', names=dict(gain=lambda seed: .02 if seed<1000 else -.3))
    res = report(tmp_path, [lucky, worth('poor', -.02)])
    assert res.json['favourite']==['lucky'] and res.df.set_index('tip').difference['lucky']>0
    assert {r['seed'] for r in res.json['runs'] if r['stage']=='confirm'}>={1000,1001,1002}
    assert 'Lucky' not in res.code and 'keep `fit_one_cycle`' in res.advice

def test_seeds_of_a_repeated_report_are_others(tmp_path):
    res = report(tmp_path, [worth('a', .02), worth('b', -.02)], options=dict(seed=500))
    seeds = {stage:{r['seed'] for r in res.json['runs'] if r['stage']==stage} for stage in ('race','confirm')}
    assert seeds['race']=={500,501,502} and seeds['confirm']>={1500,1501,1502}

@pytest.mark.parametrize('n', [1,2])
def test_no_verdict_without_seeds(tmp_path, n):
    assert list(report(tmp_path, [worth('good', .2)], n+2.4, seeds=n).df.verdict)==['','too few seeds']

def test_no_tips(tmp_path):
    res = report(tmp_path, [], 4)
    assert res.names==['baseline'] and [r['seed'] for r in res.json['runs']]==[0,1,2] and 'vision_learner' in res.code

# Resumption ---------------------------------------------------------------------------

TIPS = [worth('a', .01), worth('b', .02)]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A report that nothing stopped, and its trainings"
    p,out = Pretend(),tmp_path_factory.mktemp('whole')
    with pytest.MonkeyPatch.context() as m:
        clock.restart()
        m.setattr(bench, 'now', clock)
        m.setattr(bench, 'step_seconds', lambda learn, steps: (0.,0.))
        m.setattr(bench.Bench, 'train', lambda self, *args, **kwargs: p(*args, **kwargs))
        return report(out, TIPS),p

def test_killed_anywhere_and_taken_up_again(tmp_path, pretend, monkeypatch, whole):
    res,before = whole
    for kill in range(len(before.calls)):
        clock.restart()
        calls,out = [0],tmp_path/str(kill)
        def dies(self, *args, **kwargs):
            calls[0] += 1
            if calls[0]==kill+1: raise KeyboardInterrupt
            return pretend(*args, **kwargs)
        monkeypatch.setattr(bench.Bench, 'train', dies)
        with pytest.raises(KeyboardInterrupt): report(out, TIPS)
        looks = len(before.calls)-len(before.trained)
        assert len(list((out/'runs').glob('*')))==max(0, kill-looks) and not (out/'report.json').exists()
        calls[0] = -999
        again = report(out, TIPS)
        assert calls[0]==-999 + len(before.calls) - (kill if kill>=looks else 0), 'each finished training once'
        if kill<looks: continue # The time of another look is other
        pd.testing.assert_frame_equal(res.df, again.df)
        assert again.code==res.code and order(out)==order(res.json['out'])

def test_all_done_trains_nothing(whole, pretend, capsys):
    res,_ = whole
    again = report(res.json['out'], TIPS)
    assert pretend.calls==[] and 'going on after' in capsys.readouterr().out
    pd.testing.assert_frame_equal(res.df, again.df)

@pytest.mark.parametrize('kw,what', [(dict(minutes=5), 'minutes: 18.0 there, 5 here'), (dict(options=dict(lr=.1)), 'lr: None there, 0.1 here'), (dict(n=90), 'training items: 40 there, 82 here'),
                                     (dict(tips=[worth('c', .1)]), 'tips: \\["a", "b"\\] there')])
def test_other_settings_are_refused(whole, kw, what):
    was = sorted(Path(whole[0].json['out']).rglob('*'))
    with pytest.raises(ValueError, match=f'of other data or settings:.*{what}'): report(whole[0].json['out'], **{**dict(tips=TIPS), **kw})
    assert sorted(Path(whole[0].json['out']).rglob('*'))==was

def test_begun_again(tmp_path, pretend):
    report(tmp_path, TIPS[:1], 6.5)
    n = len(pretend.calls)
    res = report(tmp_path, TIPS[:1], 7, seeds=1, options=dict(resume=False))
    assert res.json['settings']['minutes']==7 and len(pretend.trained[n:]) <= len(res.json['runs']) and set(order(tmp_path))=={(r['seed'],r['name']) for r in res.json['runs']}
    assert TipsReport.load(tmp_path).json['settings']['minutes']==7 and len({r['budget'] for r in res.json['runs'] if r['seed']==0})==1
