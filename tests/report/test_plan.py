"What a report decides before it trains: exact numbers of plain facts"
from dataclasses import replace
import numpy as np, pytest
from fastai_tricks.report.plan import (Budget, Pace, ReportPlan, baseline_pace, check_minutes, cost_ratio, epochs_that_fit, least_seconds, pace_of,
                                       plan_report, rough_seconds, seconds_needed)
from fastai_tricks.report.tips import Tip

BUDGET = Budget(minutes=20, seeds=3, steps=2, bs=8, n=1000, n_valid=400, least_valid=200)
PACES = dict(baseline=Pace(.1, 2, .01), a=Pace(.05, 4, .01), b=Pace(.1, 3, .01))
A,B = Tip('a', learn='x = 1', names=dict(x=1)),Tip('b', bs=2)

def test_epochs_are_close_for_any_budget():
    for n,bs in ((100,8),(1000,64),(50_000,32)):
        for images in np.geomspace(12*bs, 40*n, 60):
            e,k = epochs_that_fit(images, n, bs)
            assert e>=6 and k%bs==0 and k<=n and abs(e*k/images-1)<.08, (n, bs, images, e, k)

def test_pace_is_that_of_all_miniatures():
    runs = [dict(seconds=1., images=10, setup=3., validation=2., valid=8), dict(seconds=5., images=20, setup=1., validation=2., valid=8)]
    assert pace_of(runs)==Pace(6/30, 2, 4/16)

def test_what_is_needed():
    # 12 batches of 8 images, setting up, 4 validations of 200 images
    assert least_seconds(PACES['baseline'], 8, 200)==pytest.approx(9.6 + 2 + 8)
    assert seconds_needed(BUDGET, [1,2])==9 and seconds_needed(BUDGET, [1,2,3])==27 and seconds_needed(BUDGET, [1,2,3,3])==45
    assert seconds_needed(replace(BUDGET, steps=0), [1,2,3,3])==27
    # Twice two miniatures of 11.6 seconds, and what follows
    assert rough_seconds(BUDGET, PACES['baseline'], 2)==pytest.approx(4*11.6 + 3*2*19.6)

@pytest.mark.parametrize('seconds,slack,least', [(1200,1,None),(1201,1,'22.1'),(1800,1.5,None),(1801,1.5,'33.1')])
def test_minutes(seconds, slack, least):
    if least is None: return check_minutes(BUDGET, seconds, slack)
    with pytest.raises(ValueError, match=f'`minutes` must be at least {least} for 3 seeds .* not 20'): check_minutes(BUDGET, seconds, slack)

def test_plan():
    plan = plan_report(BUDGET, 60, PACES, [A,B], {'mixed':'nothing was faster'})
    assert plan.valid is None and plan.validated==400 and list(plan.variants)==['baseline','a','b'] and plan.variants['b']==[B]
    # 3 seeds of three variants and of one combination: 12 trainings, each sets up in 3 seconds and validates 4 times in 4
    each = 1140/12 - 3 - 16
    assert plan.round_seconds()==pytest.approx(each)
    assert plan.round_seconds(1, left=500)==pytest.approx(500/9 - 19) and plan.round_seconds(2, left=1)==pytest.approx(9.6)
    assert str(plan)==f'tips_report: 9 trainings of {each:.3g} seconds, 3 seeds of baseline, a, b; then the best together\n  left out: mixed: nothing was faster'

def test_the_faster_the_machine_the_more_of_the_validation_set():
    def validated(valid, n_valid): return plan_report(replace(BUDGET, n_valid=n_valid), 60, {k:replace(p, valid=valid) for k,p in PACES.items()}, [A,B], {})
    # A quarter of 92 seconds for 4 validations: 5.75
    part = validated(.01, 4000)
    assert part.validated==575 and part.valid==tuple(sorted(set(part.valid))) and max(part.valid)<4000
    assert validated(.01, 4000)==part and validated(.001, 4000).valid is None
    assert validated(.05, 4000).validated==200 # `least_valid`

def test_too_little_time_for_the_largest_batches():
    # 3 seeds of 19.6, 16.8 and, with twice as large batches, 30.2 seconds, and as long for the combination
    with pytest.raises(ValueError, match='`minutes` must be at least 5.4'): plan_report(replace(BUDGET, minutes=4), 0, PACES, [A,B], {})
    assert plan_report(replace(BUDGET, minutes=4), 0, {k:PACES[k] for k in ('baseline','a')}, [A], {}).validated<400

def test_kept_and_read_again():
    plan = plan_report(replace(BUDGET, n_valid=4000), 60, PACES, [A,B], {})
    kept = plan.to_dict()
    assert not any('learn' in t or 'names' in t for t in kept['tips'])
    kept['valid'] = list(kept['valid'])
    assert ReportPlan.from_dict(kept, plan.budget, [B,A])==plan
    with pytest.raises(ValueError, match="tips that are not there, or whose lines are others here: 'a'"): ReportPlan.from_dict(kept, plan.budget, [replace(A, learn='x = 2'),B])
    with pytest.raises(ValueError, match="others here: 'b'"): ReportPlan.from_dict(kept, plan.budget, [A])

def test_of_a_plan_in_a_file_no_line_is_taken():
    plan = plan_report(replace(BUDGET, n_valid=4000), 60, PACES, [A,B], {})
    kept = plan.to_dict()
    for t in kept['tips']: t.update(learn='planted()', block='planted()', names=dict(x=2), switch='planted()')
    assert ReportPlan.from_dict(kept, plan.budget, [A,B])==plan

def test_cost_of_an_image():
    def r(name, seconds, images): return dict(name=name, seconds=seconds, images=images)
    base,fast = r('baseline', 10, 100),r('a', 10, 200)
    assert cost_ratio(.6, [])==.6 and cost_ratio(.6, [(fast,base)])==pytest.approx(.55) and cost_ratio(.9, [(fast,base),(fast,base)])==.5
    # Twice the cost that is known: the machine was half as fast
    assert baseline_pace([base,r('a', 10, 100)], dict(baseline=1, a=.5).get)==pytest.approx(20/150)
