"`tips_report` as a whole, with real trainings: nothing given is changed, what is wrong is said before"
import random, re
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, RegressionBlock
from fastai.data.transforms import IndexSplitter, RandomSplitter, get_image_files, parent_label
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageBlock
import fastai_tricks.data.subset # noqa: F401 - for DataBlock.class_subset
from fastai_tricks.core.test_utils import tiny_dls
from fastai_tricks.data.sample import sample_images
from fastai_tricks.report.data import read_data
from fastai_tricks.report.report import ReportOptions, tips_report
from fastai_tricks.report.result import TipsReport
from fastai_tricks.report.tips import Tip
from report_world import DATA, Score, See, Worth, bench, block, clock, net, parity, picture, report, world, worth

# A report ---------------------------------------------------------------------------

class Stop(Callback):
    "Ctrl-C, once"
    def before_batch(self):
        if self.training and not world.stopped:
            world.stopped = True
            raise KeyboardInterrupt

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "Interrupted within a training of its second round, and taken up again"
    out = tmp_path_factory.mktemp('finished')
    fails = Tip('fails', learn='learn.no_such_thing()')
    stop = Tip('<b>good</b>', learn='learn.add_cb(Worth(.02))\nif torch.initial_seed()==1: learn.add_cb(Stop())', names=dict(Worth=Worth, Stop=Stop))
    tips = ['sizes',stop,fails]
    with pytest.MonkeyPatch.context() as m:
        clock.restart()
        m.setattr(bench, 'now', clock)
        m.setattr(bench.gc, 'collect', lambda: None)
        with pytest.raises(KeyboardInterrupt): report(out, tips, 22)
        kept,spent = len(list((out/'runs').iterdir())),clock.t
        res = report(out, tips, 22)
    return res,kept,spent,clock.t

def test_budget(finished):
    res,kept,spent,now = finished
    assert world.stopped and 3<=kept<6 and len(res.json['runs'])>=9
    assert .9*60*22 < res.json['minutes']*60 <= now < 1.15*60*22 # With the training that was lost
    for r in res.json['runs']: assert r['seconds']==pytest.approx(r['budget'], rel=.1), r['name']
    small,base = ([r['images'] for r in res.runs(k)] for k in ('32 px','baseline'))
    assert np.mean(small)/np.mean(base)==pytest.approx(2.5, rel=.1) # .5 and .2 seconds an image

def test_what_it_found(finished):
    res = finished[0]
    verdicts = dict(res.df.set_index('tip').verdict)
    assert verdicts['<b>good</b>'] in ('pays','see fresh seeds') and verdicts['32 px']=='no difference' and res.json['favourite']==['<b>good</b>']
    assert list(res.left_out)==['fails'] and 'no_such_thing' in res.left_out['fails'] and res.left_out['fails'] in repr(res)
    assert res.json['settings']['bs']==4 and '40 training and 8 validation images of 2 classes at 64 px, batches of 4; 3 seeds' in res.conditions

def test_html_opens_without_a_network(finished, tmp_path):
    res = finished[0]
    text = res.to_html(tmp_path/'report.html').read_text()
    assert not re.search(r'https?://|<script|<link|@import|url\(', text) and re.findall(r'src="(.{22})', text)==['data:image/png;base64,']
    assert '<b>good</b>' not in text and '&lt;b&gt;good&lt;/b&gt;' in text and 'pays' in text and 'learn.fit_one_cycle' in text
    assert [f.name for f in tmp_path.iterdir()]==['report.html']
    loaded = TipsReport.load(res.json['out'])
    pd.testing.assert_frame_equal(loaded.df, res.df)
    assert 'too few' not in loaded._repr_html_() and loaded.to_html().parent.samefile(res.json['out'])

def test_code_runs_on_the_same_data(tmp_path, pretend):
    folder = sample_images()
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())[:2]
    dblock = DataBlock((ImageBlock,CategoryBlock), get_items=partial(get_image_files, folders=classes), get_y=parent_label,
                       splitter=RandomSplitter(.3, seed=1), item_tfms=Resize(64), batch_tfms=aug_transforms())
    small = Tip('small', block='dblock = block_with(dblock, size=32)\nadd = Worth', names=dict(Worth=Worth, gain=.02), learn='learn.add_cb(add(.02))')
    res = tips_report(dblock, folder, net, 60, [small,'progressive','batch'], metric=Score(), out=tmp_path, bs=4, options=dict(data=dict(num_workers=0)), pretrained=False)
    assert 'small' in res.json['favourite']
    names = dict(dblock=dblock, source=folder, net=net, metric=Score(), Worth=Worth)
    code = '\n'.join(l for l in res.code.splitlines() if not l.startswith('#'))
    exec(re.sub(r'learn\.fit_one_cycle\(\d+', 'learn.remove_cb(ProgressCallback)\nlearn.logger = noop\nlearn.fit_one_cycle(1', code), names)
    assert See.batches and {s for training,_,*s in See.batches if training for s in s}<={32,64}
    assert {b[2] for b in See.batches if not b[0]}=={32} # Validation too

# As it was --------------------------------------------------------------------------

def states(): return random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()

def test_nothing_of_a_data_block_is_changed(tmp_path):
    random.seed(3); np.random.seed(4); torch.manual_seed(5)
    db = block(batch_tfms=[*aug_transforms()])
    def parts(): return [*db.item_tfms],[*db.batch_tfms],db.splitter,db.get_items,[*db.type_tfms]
    was = parts(),states()
    report(tmp_path, ['sizes','albumentations'], seeds=1, minutes=8, steps=0, db=db)
    assert (parts(),states())==was

def test_nothing_of_loaders_is_changed(tmp_path):
    dls = block().dataloaders(list(range(48)), bs=4, num_workers=0, device='cpu')
    def parts(): return [(dl, [*dl.after_item.fs], [*dl.after_batch.fs], len(dl), dl.rng.getstate()) for dl in dls.loaders]
    was = parts(),states()
    # fastai adds a `Normalize` to the loaders of a pretrained network
    norm = Tip('norm', learn='dls.add_tfms([Normalize.from_stats([.5]*3, [.5]*3)], "after_batch")')
    res = tips_report(dls, arch=net, minutes=8, seeds=1, tips=['draft','progressive',norm], metric=Score(), out=tmp_path, options=dict(steps=0), pretrained=False)
    assert (parts(),states())==was and res.names==['baseline','progressive','norm'] and 'DataBlock' in res.left_out['draft']

# Arguments --------------------------------------------------------------------------

@pytest.mark.parametrize('kw,what', [
    (dict(minutes=0), '`minutes`'), (dict(minutes='x'), '`minutes`'), (dict(seeds=0), '`seeds` must be a positive integer'), (dict(tips=['no']), "`tips`.*'mixed'"),
    (dict(arch='resnet_34'), "`arch`.*'resnet34"), (dict(arch=3), '`arch`'), (dict(bs=64), '`bs` must be at most half of the 40'), (dict(bs=0), '`bs`'), (dict(metric=3), '`metric`'),
    (dict(tips=[Tip('baseline')]), '`tips`'), (dict(tips=[Tip('a'),Tip('a')]), '`tips`'), (dict(options=dict(level=2.)), '`level`'), (dict(options=dict(lr=-1)), '`lr`'),
    (dict(steps=-1), '`steps`'), (dict(options=dict(small='x')), '`small`'), (dict(options=dict(data=3)), '`data`'), (dict(options=dict(speed=3)), '`options` must be a dict with some of lr'),
    (dict(lr=.1), '`lr` belongs into options'), (dict(options=dict(seeds=2)), '`seeds` is an argument of'), (dict(resume=False), '`resume` belongs into options')])
def test_bad_arguments(tmp_path, kw, what):
    with pytest.raises(ValueError, match=what): report(tmp_path/'x', **{'tips':[worth('a', .1)], 'minutes':6, **kw})
    assert not (tmp_path/'x').exists() and clock.t==0

def test_options():
    with pytest.raises(ValueError, match='`options`'): tips_report(block(), [1], options=3)
    assert ReportOptions.of(None, {})==ReportOptions() and ReportOptions.of(dict(steps=1), {})==ReportOptions.of(ReportOptions(steps=1), {})==ReportOptions(steps=1)

def test_batches_are_made_to_fit(tmp_path, pretend, capsys):
    res = report(tmp_path/'a', [worth('a', .1)], 60, bs=None)
    assert res.json['settings']['bs']==20 and 'tips_report: batches of 20, half of the 40 training images' in capsys.readouterr().out
    assert 'bs=20' in res.code
    report(tmp_path/'b', [worth('a', .1)], 100, bs=None, n=200)
    assert 'batches of' not in capsys.readouterr().out.split('\n')[0]

# Data -------------------------------------------------------------------------------

def read(db, source, **kwargs): return read_data(db, source, 4, {**DATA, **kwargs})

def test_classes_of_a_subset():
    "Loaders made before leave the vocabulary of all classes in the `CategoryBlock`"
    db = DataBlock((ImageBlock,CategoryBlock), get_x=picture, get_y=lambda i: 'abcd'[i%4], splitter=IndexSplitter(range(8)), item_tfms=Resize(64))
    assert len(db.dataloaders(list(range(96)), bs=4, num_workers=0, device='cpu').vocab)==4
    data = read(db.class_subset(2), list(range(96)))
    assert (data.classes,data.n,data.n_valid,data.least_valid,data.chance)==(2,44,4,4,.5)

def test_bad_data(tmp_path):
    def at(db, source, what):
        with pytest.raises(ValueError, match=what): tips_report(db, source, net, bs=4, options=dict(data=DATA), out=tmp_path/'x', pretrained=False)
        assert not (tmp_path/'x').exists()
    def blocks(y, block=CategoryBlock): return DataBlock((ImageBlock,block), get_x=picture, get_y=y, splitter=IndexSplitter([0,1]), item_tfms=Resize(64))
    folders = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(64))
    at(folders, tmp_path/'nowhere', '`source`')
    at(folders, None, '`source`')
    at('photos', None, '`dblock_or_dls`')
    at(tiny_dls(bs=4), 'photos', '`source`')
    at(tiny_dls(bs=8), None, '`bs` must be left out')
    at(blocks(lambda i: 'a'), list(range(40)), '`source`.*1 class')
    at(blocks(lambda i: 'b' if i==30 else 'a'), list(range(40)), "few training images of 'b'")
    at(blocks(float, RegressionBlock), list(range(40)), 'CategoryBlock')
    at(block(n_valid=0), list(range(40)), 'validat')
    with pytest.raises(ValueError, match='`dblock_or_dls` must be such that a batch'): tips_report(tiny_dls(n=24, bs=16), None, net, out=tmp_path/'x', pretrained=False)
