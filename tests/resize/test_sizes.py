"What a training does is decided as a value: exact, without a training"
import matplotlib.pyplot as plt
import pandas as pd, pytest
from fastai_tricks.core.test_utils import tiny_learner
from fastai_tricks.resize.callback import ProgressiveResize
from fastai_tricks.resize.sizes import Growth, resize_plan, ResizePlan, ResizeStep, small_sizes

FULLS = [(28,28), (64,64), (100,100), (128,96), (160,160), (224,224), (240,320)]

@pytest.mark.parametrize('part', [None,'frozen','unfrozen'])
@pytest.mark.parametrize('full', FULLS)
@pytest.mark.parametrize('growth', [Growth(), Growth(.3), Growth(until=1.), Growth(hold=1.), Growth([16,20], mult=4), Growth(.5, mult=8, hold=.25)])
def test_any_plan(growth, full, part):
    "Steps fill the training, sizes rise and fit into the image, the share is what the pixels of each moment add up to"
    plan = resize_plan(full, growth, 7, part)
    areas = [s.size[0]*s.size[1] for s in plan.steps]
    assert plan.ends==sorted(plan.ends) and plan.ends[-1]==1 and all(e>b for b,e in zip(plan.begins, plan.ends))
    assert areas==sorted(areas) and all(a<=b for s in plan.steps for a,b in zip(s.size, full))
    n = 2000
    by_moment = sum(plan.step_at((i+.5)/n).size[0]*plan.step_at((i+.5)/n).size[1] for i in range(n))/n
    assert plan.share==pytest.approx(by_moment/(full[0]*full[1]), abs=2e-3)
    assert len(plan.table())==len(plan.steps) and plan.table()['to'].iloc[-1]==pytest.approx(7)

def test_nothing_starts_over_in_fine_tune():
    frozen,rest = (resize_plan((224,224), Growth(), 3, part) for part in ('frozen','unfrozen'))
    assert [s.size for s in frozen.steps]==[(192,192)] and rest.steps[0].size==(192,192)
    both = frozen.then(rest)
    assert both.n_epoch==6 and [s.frozen for s in both.steps]==[True,False,False]
    assert both.share==pytest.approx((3*2/3*frozen.share + 3*rest.share)/(3*2/3 + 3))

def test_what_an_epoch_has_is_that_of_its_largest_size():
    plan = resize_plan((128,128), Growth([64], until=.6), 2, batches=dict(bs=8, n=640), strength=(.5,1.))
    assert plan.steps==(ResizeStep((64,64), .6, bs=32, strength=.5), ResizeStep((128,128), 1., bs=8, strength=1.))
    assert [plan.of_epoch(i).bs for i in range(2)]==[32,8]
    assert [resize_plan((128,128), Growth([64], until=.4), 2).of_epoch(i).size[0] for i in range(2)]==[128,128]

@pytest.mark.parametrize('epochs,where', [(4,'in the loader;'), (3,'in the loader, within an epoch on the device;')])
def test_says_where(epochs, where):
    assert where in str(resize_plan((64,64), Growth([32,48], .5, hold=.5), epochs, in_loader=True))

def test_says_what_it_knows():
    args = (64,64),Growth([32], .5)
    assert str(resize_plan(*args))=='32 px until 50%, then 64 px; about 62% of full-size cost'
    assert str(resize_plan(*args, crop=True, in_loader=False))=='cut to 32 px until 50%, then 64 px, on the device; about 62% of full-size cost'
    for epochs,says in ((1,'batches of 8;'), (2,'batches of 32, 8;')):
        assert says in str(resize_plan(*args, epochs, batches=dict(bs=8, n=64)))
    assert 'strength 0.5 to 1;' in str(resize_plan(*args, 2, strength=(.5,1.)))

def test_equal_facts_make_equal_plans():
    assert resize_plan((64,64), Growth([32])) == resize_plan((64,64), Growth([32])) != resize_plan((64,64), Growth([48]))

def test_table_picture_and_notebook():
    plan = resize_plan((64,96), Growth([32], .5), 4, batches=dict(bs=8, n=64))
    want = pd.DataFrame({'from':[0.,2.], 'to':[2.,4.], 'size':['32×64','64×96'], 'share':[1/3,1.], 'bs':[16,8]})
    pd.testing.assert_frame_equal(plan.table(), want)
    assert str(plan) in plan._repr_html_() and '32×64' in plan._repr_html_()
    ax = plan.plot()
    assert [t.get_text() for t in ax.texts]==['32×64 px\nbatches of 16','64×96 px\nbatches of 8'] and '67%' in ax.get_title()
    plt.close('all')

# Of the callback --------------------------------------------------------------

def test_plan_without_a_learner():
    cb = ProgressiveResize()
    assert cb.plan(128, n_epoch=4).steps==resize_plan((128,128), Growth()).steps
    assert cb.plan(128, 4, freeze_epochs=1).steps[0]==ResizeStep((96,96), .2, frozen=True)
    assert cb.plan(128, 4, freeze_epochs=0).ends==[.8,1.]

def test_plan_of_a_learner_knows_its_loader():
    learn = tiny_learner(cbs=ProgressiveResize([32], scale_bs=16))
    plan = learn.progressive_resize.plan(n_epoch=2)
    assert plan==ResizePlan((64,64), (ResizeStep((32,32), .75, bs=8), ResizeStep((64,64), 1., bs=8)), 2, in_loader=True)
    assert learn.progressive_resize.plan(n_epoch=2, freeze_epochs=1).crop
    plt.close(learn.progressive_resize.plot(n_epoch=2).figure)

@pytest.mark.parametrize('kwargs,name', [(dict(n_epoch=0), 'n_epoch'), (dict(freeze_epochs=-1), 'freeze_epochs'), (dict(full=48), 'sizes')])
def test_plan_refuses(kwargs, name):
    with pytest.raises(ValueError, match=f'`{name}`'): ProgressiveResize(64).plan(**{'full':128, **kwargs})

def test_sizes_may_be_one_or_several():
    full = (128,160)
    assert Growth(96).small(full)==small_sizes(full, 96) and Growth((64,96)).small(full)==small_sizes(full, (64,96))
    assert Growth([96]).small(full)==[(96,128)] and Growth([(64,96)]).small(full)==[(64,96)]
