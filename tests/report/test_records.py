"The folder of a report: it knows what it is of, survives company, kills and damage, and nothing in it is run. Nothing is trained here"
import json, math, os
from pathlib import Path
import pytest, torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import Resize, ResizeMethod
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageBlock
from fastai_tricks.report.result import TipsReport
from killed import forked
from report_world import Pretend, Score, bench, block, clock, net, parity, picture, report, worth

pytestmark = pytest.mark.usefixtures('pretend')

TIPS = [worth('a', .01), worth('b', .02)]

class Stopped(BaseException): "Ctrl-C, or the end of a session"

def stopped_at(monkeypatch, pretend, n):
    "The `n`th training is the last that ends"
    def train(self, *args, **kwargs):
        if len(pretend.trained)==n: raise Stopped
        return pretend(*args, **kwargs)
    monkeypatch.setattr(bench.Bench, 'train', train)

def go_on(monkeypatch, pretend): monkeypatch.setattr(bench.Bench, 'train', lambda self, *args, **kwargs: pretend(*args, **kwargs))

@pytest.fixture
def begun(tmp_path, monkeypatch, pretend):
    "A folder with the plan and two trainings of three variants"
    stopped_at(monkeypatch, pretend, 2)
    with pytest.raises(Stopped): report(tmp_path/'out', TIPS)
    go_on(monkeypatch, pretend)
    assert len(list((tmp_path/'out'/'runs').glob('*.json')))==2
    return tmp_path/'out'

# What it is of ------------------------------------------------------------------------

def changed(**kwargs):
    db = block()
    for k,v in kwargs.items(): setattr(db, k, v)
    return db

def block_of(category=CategoryBlock, image=ImageBlock, size=Resize(64)):
    return DataBlock((image,category), get_x=picture, get_y=parity, splitter=IndexSplitter(range(8)), item_tfms=size)

def flipped(*which): return changed(getters=[picture, lambda i: parity(i+1 if i in which else i)])
def other_net(pretrained=False): return torch.nn.Sequential(net(), torch.nn.ReLU())
class Twice(Score):
    @property
    def value(self): return 2*super().value
class Own(Score):
    def __init__(self, share=.5): self.share = share

OTHER = [
    (dict(db=flipped(*range(8, 48))), r"training labels of 40 items differ: '8', '9', .* and 35 more"),
    (dict(db=flipped(20, 21)), "labels of 2 items differ: '20', '21'"),
    (dict(db=flipped(2, 3)), "validation labels of 2 items differ: '2', '3'"),
    (dict(db=block_of(CategoryBlock(['b','a'], sort=False))), 'classes: "?a"? there, "?b"? here'),
    (dict(db=changed(splitter=IndexSplitter(range(4,12)))), "validation items of 8 items differ: '4', "), (dict(n=50), 'training items: 40 there, 42 here'),
    (dict(bs=5), 'bs: 4 there, 5 here'), (dict(db=block_of(size=Resize(32))), 'size: 64 there, 32 here'),
    (dict(db=block_of(size=Resize(64, method=ResizeMethod.Squish))), 'training transforms: Resize'),
    (dict(db=block_of(image=ImageBlock(PILImageBW))), 'reading of items'),
    (dict(arch=other_net), 'code of the network: '), (dict(metric=Twice()), 'code of the metric: '), (dict(loss_func=CrossEntropyLossFlat(weight=torch.tensor([1.,2.]))), 'arguments of `vision_learner`'),
    (dict(wd=.1), r'arguments of `vision_learner`: \["pretrained=False"\] there, \["pretrained=False", "wd=0.1"\] here'),
    (dict(tips=[worth('a', .01), worth('b', .03)]), 'lines of tips: "?b'), (dict(tips=[worth('a', .01), worth('b', .02, 2)]), 'lines of tips: "?b'),
    (dict(tips=TIPS[::-1]), 'tips: "?a"? there, "?b"? here'), (dict(seeds=2), 'seeds: 3 there, 2 here'), (dict(steps=1), 'steps: '),
    (dict(options=dict(lr=.1)), 'lr: None there, 0.1 here'), (dict(options=dict(level=.9)), 'level: '), (dict(options=dict(small=.1)), 'small: ')]

@pytest.mark.parametrize('kw,what', OTHER, ids=[what.split(':')[0][:30] for _,what in OTHER])
def test_each_part_changed_alone_is_refused_and_named(begun, pretend, kw, what):
    calls = len(pretend.calls)
    was = {f:f.read_bytes() for f in begun.rglob('*') if f.is_file()}
    with pytest.raises(ValueError, match=f'holds a report of other data or settings: .*{what}'): report(begun, **{**dict(tips=TIPS, minutes=12.), **kw})
    assert len(pretend.calls)==calls and {f:f.read_bytes() for f in begun.rglob('*') if f.is_file()}==was

def test_another_machine_is_refused_other_versions_are_said(begun, monkeypatch, capsys):
    from fastai_tricks.report import report as module
    env = module._environment()
    monkeypatch.setattr(module, '_environment', lambda: env | dict(device='another'))
    with pytest.raises(ValueError, match='device: '): report(begun, TIPS)
    monkeypatch.setattr(module, '_environment', lambda: env | dict(fastai='3.0'))
    report(begun, TIPS)
    assert f"tips_report: version of fastai: {env['fastai']} there, 3.0 here" in capsys.readouterr().out

def test_what_a_run_notes_down_is_no_part_of_what_it_is(tmp_path, monkeypatch, pretend):
    "A metric of one's own holds the Learner after a training; the same call goes on in the same process"
    metric = Own(.3)
    stopped_at(monkeypatch, pretend, 2)
    with pytest.raises(Stopped): report(tmp_path/'out', TIPS, metric=metric)
    metric.learn = metric.total = 3
    go_on(monkeypatch, pretend)
    report(tmp_path/'out', TIPS, metric=metric)
    with pytest.raises(ValueError, match='code of the metric: '): report(tmp_path/'out', TIPS, metric=Own(.4))
    # As asked
    assert report(tmp_path/'out', TIPS, metric=Own(.4), options=dict(resume='force')).json['favourite']
    with pytest.raises(ValueError, match='`resume`'): report(tmp_path/'out', TIPS, options=dict(resume='always'))

# Company ------------------------------------------------------------------------------

def test_two_at_once_one_is_refused_in_one_line(tmp_path, monkeypatch, pretend):
    out,said = tmp_path/'out',tmp_path/'said'
    def second():
        try: report(out, TIPS)
        except Exception as e: said.write_text(f'{type(e).__name__}: {e}')
    def train(self, *args, **kwargs):
        if len(pretend.trained)==1 and not said.exists(): # Within the first round
            was = {f:f.read_bytes() for f in out.rglob('*') if f.is_file()}
            if not os.fork():
                second()
                os._exit(0)
            os.wait()
            assert {f:f.read_bytes() for f in out.rglob('*') if f.is_file()}==was
        return pretend(*args, **kwargs)
    monkeypatch.setattr(bench.Bench, 'train', train)
    res = report(out, TIPS)
    text = said.read_text()
    assert text.startswith(f"RunInUse: 'out/report.json' is in use by process {os.getpid()} since ") and text.endswith('Wait for it, or choose another `out`') and '\n' not in text
    assert res.json['favourite']==['b','a'] and report(out, TIPS).code==res.code # Free again

def test_killed_at_a_rename_and_run_again(tmp_path):
    "What it left half written goes at the next start"
    for kill in ('rename:1','rename:2','rename:4','renamed:4'): # Settings, plan, a training
        out = tmp_path/kill
        assert forked(lambda out: report(out, TIPS[:1], 6.5), out, kill)
        parts = [f for f in out.rglob('*') if '.part' in f.suffixes]
        assert len(parts)==kill.startswith('rename:')
        clock.restart()
        assert report(out, TIPS[:1], 6.5).names==['baseline','a'] and not any(f.exists() for f in parts)

# Deleting -----------------------------------------------------------------------------

def test_starting_again_deletes_only_its_own(begun):
    mine = [begun/'notes.txt',begun/'runs'/'notes.json',begun/'runs'/'000 first.json',begun/'runs'/'plots'/'000 0 a.json',begun/'plan.json.bak']
    for f in mine:
        f.parent.mkdir(exist_ok=True)
        f.write_text('mine')
    res = report(begun, TIPS[:1], 6.5, options=dict(resume=False))
    assert res.names==['baseline','a'] and [f.read_text() for f in mine]==['mine']*5 # Nor were they read

@pytest.mark.parametrize('resume', [True,False])
@pytest.mark.parametrize('file', ['notes.txt','settings.json'])
def test_a_folder_of_somebody_else_is_refused(tmp_path, file, resume):
    (tmp_path/file).write_text('{"color": "blue"}')
    with pytest.raises(ValueError, match='`out` must be a new or an empty folder, or one of `tips_report`'): report(tmp_path, TIPS, options=dict(resume=resume))
    assert (tmp_path/file).read_text()=='{"color": "blue"}' and {f.name for f in tmp_path.iterdir()}<={file,'.report.json.lock'} and clock.t==0

# Damage -------------------------------------------------------------------------------

def test_a_folder_that_cannot_be_written_to_is_found_before_anything(tmp_path, monkeypatch):
    (tmp_path/'file').touch()
    def never(*args): raise AssertionError('it looked at the data')
    for out in (tmp_path/'file'/'out', Path('/proc/no/such')):
        with pytest.raises(ValueError, match='`out` must be a folder that can be written to'): report(out, TIPS, db=changed(splitter=never))
    def fails(*args): raise OSError(30, 'Read-only file system')
    monkeypatch.setattr(Path, 'touch', fails)
    with pytest.raises(ValueError, match='`out` must be .*Read-only file system'): report(tmp_path/'new', TIPS, db=changed(splitter=never))
    assert [f.name for f in tmp_path.iterdir()]==['file'] and clock.t==0

@pytest.mark.parametrize('text', ['','{"seed": 0, "na'])
@pytest.mark.parametrize('file,what', [('settings.json',"'settings.json' is damaged.*Choose another `out`"), ('plan.json',"plan.json' is damaged: start again with options=dict.resume=False."),
                                       ('runs/000 0 baseline.json',"000 0 baseline.json' is damaged .*delete it, and what it recorded is made again")])
def test_what_is_damaged_is_named_with_what_to_do(begun, pretend, file, what, text):
    (begun/file).write_text(text)
    with pytest.raises(ValueError, match=what): report(begun, TIPS)
    if file=='settings.json': return
    if file=='plan.json':
        (begun/file).unlink()
        with pytest.raises(ValueError, match="plan.json' is gone, and 2 trainings of this plan are there: start again"): report(begun, TIPS)
        return report(begun, TIPS, options=dict(resume=False))
    (begun/file).unlink()
    n = len(pretend.trained)
    res = report(begun, TIPS)
    assert len(pretend.trained[n:])==len(res.json['runs'])-1 and len({(r['name'],r['seed']) for r in res.json['runs']})==len(res.json['runs'])
    assert sorted(f.name[:3] for f in (begun/'runs').glob('*.json'))==[f'{i:03d}' for i in range(1, 1+len(res.json['runs']))]

def test_a_report_that_is_damaged_is_made_again(tmp_path, pretend):
    res,n = report(tmp_path, TIPS[:1], 6.5),len(pretend.calls)
    for text in ('','[]'):
        (tmp_path/'report.json').write_text(text)
        with pytest.raises(ValueError, match="report.json' is damaged|must be the folder of a finished report"): TipsReport.load(tmp_path)
    assert report(tmp_path, TIPS[:1], 6.5).code==TipsReport.load(tmp_path).code==res.code and len(pretend.calls)==n

# Values and names ---------------------------------------------------------------------

def strictly(file):
    def no(name): raise AssertionError(f'{name} is no JSON')
    return json.loads(file.read_text(), parse_constant=no)

def test_a_score_that_is_no_number(tmp_path, pretend):
    "Null in JSON, NaN where it is read; what diverged gains nothing"
    tips = [worth('diverges', math.nan), worth('explodes', math.inf), worth('good', .02)]
    res = report(tmp_path, tips)
    kept,n = [strictly(f) for f in tmp_path.rglob('*.json')],len(pretend.calls)
    assert {r['score'] for r in kept if r.get('name')=='diverges'}=={None} and res.json['favourite']==['good']
    for again in (res, report(tmp_path, tips), TipsReport.load(tmp_path)):
        df = again.df.set_index('tip')
        assert dict(df.score.isna())==dict(baseline=False, diverges=True, explodes=True, good=False) and df.verdict['diverges']==df.verdict['explodes']=='costs'
        assert again.advice.startswith('Use good')
        assert 'diverges' in repr(again) and again.to_html().exists()
    assert len(pretend.calls)==n

def test_names_that_are_long_or_hold_dollars(tmp_path):
    names = ['x'*300, 'ä'*130, 'costs $5 or $\\frac{', '$a$', '../../up']
    res = report(tmp_path/'out', [worth(k, .001*i) for i,k in enumerate(names)], 30)
    assert set(names)<set(res.names) and [f.name for f in tmp_path.iterdir()]==['out']
    text,fig = res.to_html().read_text(),res.plot()
    assert 'costs $5' in text and 'mathjax_ignore' in res._repr_html_()
    labels = [t.get_text() for ax in fig.axes for t in [*ax.texts, *ax.get_yticklabels()]]
    assert any(r'\$a\$' in o for o in labels)
    import matplotlib.pyplot as plt
    plt.close(fig)
    assert len(report(tmp_path/'out', [worth(k, .001*i) for i,k in enumerate(names)], 30).json['runs'])==len(res.json['runs'])

# Trust --------------------------------------------------------------------------------

PLANTED = []
def planted(): PLANTED.append(1)

def plant(begun, edit):
    "A folder from somebody else: the plan is `edit`ed, settings and trainings are as they were"
    plan = json.loads((begun/'plan.json').read_text())
    edit(plan)
    (begun/'plan.json').write_text(json.dumps(plan))

LINE = 'from test_records import planted; planted()'

@pytest.mark.parametrize('train', [False,True])
def test_lines_of_a_file_are_not_run(begun, monkeypatch, train):
    "Neither those of the plan nor what stands in the place of a name"
    def lines(plan):
        for t in plan['tips']: t.update(dict.fromkeys(('block','learn','switch','code','cbs'), LINE), names=dict(x=1))
    plant(begun, lines)
    for f in (begun/'runs').glob('*.json'):
        run = json.loads(f.read_text())
        f.write_text(json.dumps(run | dict(code=LINE, learn=LINE, tips=[LINE])))
    if train: # For real, as far as the lines go
        seen = []
        def made(self, tips, seed, epochs, images, points=4, **kwargs):
            recipe = bench.replace(self.recipe, tips=tuple(tips))
            seen.append(recipe.code(6))
            return Pretend()(tips, seed, epochs, images, points, **kwargs)
        monkeypatch.setattr(bench.Bench, 'train', made)
    res = report(begun, TIPS)
    assert PLANTED==[] and 'planted' not in res.code and 'planted' not in (begun/'report.json').read_text().replace(LINE, '', 6)
    if train: assert seen and not any('planted' in c for c in seen)

def test_a_tip_that_only_the_file_has_is_refused(begun, pretend):
    n = len(pretend.calls)
    def name(plan): plan['tips'][0]['name'] = "a'); planted(); ('"
    plant(begun, name)
    with pytest.raises(ValueError, match="plan.json' is no plan of this report .*start again"): report(begun, TIPS)
    plant(begun, lambda plan: plan.update(paces=LINE, tips=[dict(name='a', choice=LINE, lines=LINE)]))
    with pytest.raises(ValueError, match="plan.json' is no plan of this report"): report(begun, TIPS)
    assert len(pretend.calls)==n and PLANTED==[]

def test_minutes_that_were_refused_leave_nothing_to_go_on_with(tmp_path):
    with pytest.raises(ValueError, match='`minutes` must be at least'): report(tmp_path/'out', TIPS, .1)
    assert report(tmp_path/'out', TIPS).names[:1]==['baseline'] # More minutes in the same folder
