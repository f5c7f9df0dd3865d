"What a report decides before it trains: exact numbers of plain facts"
from dataclasses import replace
import numpy as np, pytest
from fastai_tricks.report.plan import (Budget, Pace, ReportPlan, affordable, check_minutes, cost_factor, epochs_that_fit, least_seconds, machine_scale,
                                       pace_of, plan_report, seconds_needed, training_within)
from fastai_tricks.report.tips import Tip
from fastai_tricks.report.verdicts import expected_sd, least_difference

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
    # A head first: its seconds apart, by the faster of the two, as the first of a process times precisions before it
    heads = [dict(r, head=h, head_images=40) for r,h in zip(runs, (.8,.4))]
    assert pace_of(heads)==Pace(pytest.approx(4.8/30), 2, 4/16, pytest.approx(.01))
    alone = pace_of([dict(seconds=2., images=0, head=2., head_images=40, setup=1., validation=2., valid=8)])
    assert alone.image==0 and alone.head==.05 and alone.seconds(6, 16, 100)==5 and alone.seconds(6, 4, 100)==2

def test_training_with_a_head_first_takes_its_seconds():
    for n in (200,1000,50_000):
        for seconds in np.geomspace(20, 2000, 20):
            p = Pace(.05, 1, .01, head=.02)
            e,k = training_within(seconds, p, n, 16)
            assert e>=1 and k%16==0 and k<=n and (p.seconds(e, k, n)==pytest.approx(seconds, rel=.15) or (e,k)==(1,32)), (n, seconds, e, k)
            assert e==1 or k>.4*n or n<1000, 'whole epochs'

def test_what_is_needed():
    # 12 batches of 8 images, setting up, 4 validations of 200 images
    assert least_seconds(PACES['baseline'], 8, 200)==pytest.approx(9.6 + 2 + 8)
    # 3 seeds of each; then 3 of each combination and 6 on fresh seeds, as slow as the slowest
    assert seconds_needed(BUDGET, [1,2])==9 and seconds_needed(BUDGET, [1,2,3])==3*6 + 9*3 and seconds_needed(BUDGET, [1,2,3,3])==3*9 + 12*3
    assert seconds_needed(replace(BUDGET, steps=0), [1,2,3,3])==3*9 + 6*3
    assert seconds_needed(replace(BUDGET, lengths=True), [1,2])==9 + 3*2 and seconds_needed(BUDGET, [1])==3

def test_less_tips_before_less_seeds():
    assert affordable(BUDGET, 45, [1,2,3])==(2,3,2) and affordable(BUDGET, 44, [1,2,3])==(2,3,0) and affordable(BUDGET, 35, [1,2,3])==(1,3,2)
    assert affordable(replace(BUDGET, seeds=9), 20, [1,2,3])==(1,6,0) and affordable(BUDGET, 8, [1,2,3])==(0,3,0)
    assert affordable(replace(BUDGET, seeds=2), 6, [1,2])==(1,2,2) # As asked

@pytest.mark.parametrize('spent,least', [(1191,None),(1192,'22.1')])
def test_minutes(spent, least):
    if least is None: return check_minutes(BUDGET, spent, [1,2,9])
    with pytest.raises(ValueError, match=rf'`minutes` must be at least {least} on this machine \(one tip with 3 seeds; .*, not 20'):
        check_minutes(BUDGET, spent, [1,2,9])

def test_plan():
    plan = plan_report(replace(BUDGET, minutes=24), 60, PACES, [A,B], {'mixed':'nothing was faster'})
    assert plan.valid is None and plan.validated==400 and list(plan.variants)==['baseline','a','b'] and plan.variants['b']==[B]
    # 9 trainings of the race, 3 of a combination, 6 on fresh seeds; each sets up in 3 seconds and validates 4 times in 4
    each = 1380/18 - 3 - 16
    assert plan.trainings==18 and plan.training_seconds()==pytest.approx(each)
    assert plan.training_seconds(9, left=500)==pytest.approx(500/9 - 19) and plan.training_seconds(9, left=1)==pytest.approx(9.6)
    assert str(plan).split('\n')==[f'tips_report: with 24 minutes: 2 tips × 3 seeds; 18 trainings of {each:.3g} seconds',
                                   '  baseline, a, b; then the best together, judged on 3 fresh seeds', '  left out: mixed: nothing was faster']

def test_what_it_will_find_is_said_before():
    points = plan_report(replace(BUDGET, points=True), 60, PACES, [A,B], {})
    finds = least_difference(2, 3, expected_sd(400))
    assert f'2 tips × 3 seeds, differences above about {100*finds:.1g} points;' in str(points) or f'{100*finds:.0f} points' in str(points)

def test_a_fit_that_chooses_is_scored_on_other_images():
    plan = plan_report(BUDGET, 60, PACES, [replace(A, chooses=True),B], {})
    assert len(plan.valid)==266 and len(plan.choice)==134 and set(plan.valid) | set(plan.choice)==set(range(400))

def test_the_faster_the_machine_the_more_of_the_validation_set():
    def validated(valid, n_valid): return plan_report(replace(BUDGET, n_valid=n_valid), 60, {k:replace(p, valid=valid) for k,p in PACES.items()}, [A,B], {})
    # A quarter of 1140/18 - 3 seconds for 4 validations: 3.77
    part = validated(.01, 4000)
    assert part.validated==377 and part.valid==tuple(sorted(set(part.valid))) and max(part.valid)<4000
    assert validated(.01, 4000)==part and validated(.0005, 4000).valid is None
    assert validated(.05, 4000).validated==200 # `least_valid`

def test_too_little_time_for_the_largest_batches():
    # b, with twice as large batches, takes 30.2 seconds at least: 3*(19.6 + 16.8 + 30.2) and 6*30.2 on fresh seeds
    less = plan_report(replace(BUDGET, minutes=6), 0, PACES, [A,B], {})
    assert [t.name for t in less.tips]==['a'] and less.left_out=={'b':'no time for it in 6 minutes'} and less.budget.seeds==3
    both = plan_report(replace(BUDGET, minutes=6.4), 0, PACES, [A,B], {})
    assert len(both.tips)==2 and both.budget.steps==0
    with pytest.raises(ValueError, match='`minutes` must be at least 2.1'): plan_report(replace(BUDGET, minutes=1.5), 0, PACES, [A,B], {})

def test_the_first_of_the_list_stay_and_stand_in_the_order_of_their_lines():
    tips = [replace(B, bs=1, place=7), replace(A, place=3)]
    assert [t.name for t in plan_report(BUDGET, 0, PACES, tips, {}).tips]==['a','b']
    assert [t.name for t in plan_report(replace(BUDGET, minutes=3), 0, PACES, tips, {}).tips]==['b']

def test_kept_and_read_again():
    plan = plan_report(replace(BUDGET, n_valid=4000), 60, PACES, [A,B], {})
    kept = plan.to_dict()
    assert not any('learn' in t or 'names' in t for t in kept['tips'])
    kept['valid'] = list(kept['valid'])
    assert ReportPlan.from_dict(kept, replace(plan.budget, steps=2), [B,A])==plan
    with pytest.raises(ValueError, match="tips that are not there, or whose lines are others here: 'a'"): ReportPlan.from_dict(kept, plan.budget, [replace(A, learn='x = 2'),B])
    with pytest.raises(ValueError, match="others here: 'b'"): ReportPlan.from_dict(kept, plan.budget, [A])
    for bad in (dict(seeds=4), dict(seeds='3'), dict(steps=9)):
        with pytest.raises(ValueError, match='`(seeds|steps)` must be'): ReportPlan.from_dict(kept | bad, plan.budget, [A,B])

def test_of_a_plan_in_a_file_no_line_is_taken():
    plan = plan_report(replace(BUDGET, n_valid=4000), 60, PACES, [A,B], {})
    kept = plan.to_dict()
    for t in kept['tips']: t.update(learn='planted()', block='planted()', names=dict(x=2), switch='planted()')
    assert ReportPlan.from_dict(kept, plan.budget, [A,B])==plan

def test_cost_of_an_image():
    assert cost_factor([])==1 and cost_factor([((10,20),(10,10))])==pytest.approx(.75) and cost_factor([((10,20),(10,10))]*2)==.5
    # Twice what was planned: the machine was half as fast
    assert machine_scale([(10,5,1),(10,10,.5)])==pytest.approx(2)

def test_a_tip_that_is_too_slow_does_not_cost_the_others():
    "Though it is the most promising; and the least minutes are those of the fastest"
    slow,paces = Tip('slow'),PACES | dict(slow=Pace(20, 2, .01))
    plan = plan_report(replace(BUDGET, minutes=24), 60, paces, [slow,A,B], {})
    assert list(plan.variants)==['baseline','a','b'] and set(plan.left_out)=={'slow'} and plan.trainings==18
    def least(tips):
        with pytest.raises(ValueError, match='at least') as e: plan_report(replace(BUDGET, minutes=1.2), 60, paces, tips, {})
        return float(str(e.value).split('at least ')[1].split()[0])
    assert least([slow,B])==least([B])<least([slow])
