"What a report shows: each number derived by hand from made-up scores. Nothing is trained here"
import ast, io, json, math, re, tokenize, warnings
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.text import Text
import numpy as np, pytest
from fastai_tricks.report.result import Finding, gain_at, seeds_to_tell, spread, TipsReport, Unit

BASE = [.70,.72,.71]
FRESH = dict(baseline=[.70,.72,.71], good=[.80,.823,.807])

def run(name, seed, score, stage='race', seconds=10., curve=None):
    curve = [[seconds/2,score/2],[seconds,score]] if curve is None else curve
    res = dict(name=name, seed=seed, score=score, seconds=seconds, images=1000, epochs=5, curve=curve, memory=None, wall=11., validation=1., setup=0.)
    return res | (dict(stage=stage) if stage else {})

def runs_of(scores, stage='race', first=0, **kwargs):
    return [run(k, first+i, s, stage, **kwargs) for k,ss in scores.items() for i,s in enumerate(ss)]

def make(race, fresh=None, half=None, together=None, favourite=(), tips=None, networks=(), code=None, **settings):
    s = dict(arch='made up', fit='fine_tune', train=200, valid=100, validated=100, classes=5, size=[96,96], bs=32, seeds=3, minutes=2, metric='accuracy',
             level=.95, small=.01, lower=False, lr=None, chance=None, splits='fixed', train_minutes=None)
    runs = runs_of(race) + runs_of(together or {}, 'together') + runs_of(fresh or {}, 'confirm', 10) + runs_of(half or {}, 'length', 10, seconds=5.)
    code = code or dict(imports='import math', data='source = 3', baseline='x = source', favourite='y = 1\nx = source + y')
    return TipsReport(dict(runs=runs, settings=s | settings, environment=dict(device='cpu', threads=1, fastai='2', torch='2', fastai_tricks='0'), minutes=1.5,
                           out='.', left_out={'mixed':'nothing was faster'}, tips=tips or {}, networks=list(networks), paces={}, favourite=list(favourite), code=code))

def chosen(fresh=FRESH, **kwargs):
    "A favourite of two tips, looked at again"
    return make(dict(baseline=BASE, good=[.81,.82,.82], poor=[.60,.62,.62]), fresh, favourite=['good'], **kwargs)

def lines(report): return repr(report).splitlines()
def first(report): return ' '.join(repr(report).split('\n\n')[0].split())

# The first sentence ---------------------------------------------------------------------

def test_a_favourite_that_pays():
    res = chosen()
    row = res.fresh.set_index('tip').loc['good']
    # .10, .103, .097 on fresh seeds; what chose it had .11, .10, .11
    assert row.difference==pytest.approx(.1) and row.n==3 and row.verdict=='pays' and row.low<.1<row.high
    assert res.finding.score==pytest.approx(.81) and res.finding.pays
    ends = f'{100*row.low:+.1f} to {100*row.high:+.1f}'
    assert res.advice==f'Use good: accuracy .810 instead of .710, +10.0 points (95% interval {ends}; 3 fresh seeds).'
    assert res.advice in first(res) and res.advice.replace('+','+') in res._repr_html_()
    assert chosen(splits='vary').advice.endswith('; 3 fresh seeds and splits).')

@pytest.mark.parametrize('gains,verdict,starts', [
    ([.06,-.05,.02], 'inconclusive', 'Inconclusive: good gained +1.0 points (95% interval -'),
    ([-.10,-.10,-.101], 'costs', 'No tip paid here; keep `fine_tune`. The favourite good gained -10.0 points'),
    ([.001,-.001,.0], 'no difference', 'No tip paid here; keep `fine_tune`. The favourite good gained +0.0 points'),
    ([math.nan,.1,.1], 'costs', 'No tip paid here; keep `fine_tune`. The favourite good diverged.'),
    ([.1], 'too few seeds', 'Inconclusive: good gained +10.0 points (')])
def test_fresh_seeds_decide_whatever_the_race_said(gains, verdict, starts):
    n = len(gains)
    noise = dict(baseline=BASE, good=[.81,.82,.82]) # Alone in the race, its chance is known but little
    res = make(noise, dict(baseline=BASE[:n], good=[b+g for b,g in zip(BASE, gains)]), favourite=['good'])
    assert res.fresh.verdict.tolist()==['',verdict] and res.advice.startswith(starts) and 'Use' not in first(res)
    assert not res.finding.pays and res.df.set_index('tip').verdict['good']=='see fresh seeds'

def test_others_that_paid_are_named():
    res = make(dict(baseline=BASE, a=[.81,.82,.815], b=[.77,.79,.78]), dict(baseline=BASE, a=[.71,.71,.70]), favourite=['a'])
    assert res.df.set_index('tip').verdict['b']=='pays' and 'Of the others, b paid in the race.' in res.advice and 'No tip paid' not in res.advice

def test_nothing_chosen():
    assert make(dict(baseline=BASE, a=[.69,.71,.70])).advice=='No tip paid here; keep `fine_tune`.'
    assert make(dict(baseline=BASE), fit='fit_one_cycle').advice=='No tip could be tried here; keep `fit_one_cycle`.'
    # A loss that may be none is nothing to look into
    res = make(dict(baseline=BASE, a=[.69,.73,.69]))
    assert res.df.verdict[1]=='inconclusive' and res.advice=='No tip paid here; keep `fine_tune`.'
    # A gain that nobody chose: said of the race, as there was no choice to pay for
    one = make(dict(baseline=BASE, a=[.80,.82,.811]))
    assert one.advice.startswith('Use a: accuracy .810 instead of .710, +10.0 points (95% interval') and one.advice.endswith('; 3 seeds).')
    assert make(dict(baseline=BASE, a=[.80,.70,.74])).advice.startswith('Inconclusive: a gained +3.7 points')

def test_a_favourite_without_fresh_seeds_does_not_pay():
    race = dict(baseline=BASE, a=[.81,.82,.815], b=[.70,.72,.715])
    res = make(race, favourite=['a'])
    assert res.advice.startswith('Inconclusive: a gained +10.5 points') and 'not tried on fresh seeds' in res.advice and not res.finding.pays
    alone = make({k:race[k] for k in ('baseline','a')}, favourite=['a'])
    assert alone.finding.pays and alone.code.endswith('x = source + y')

def test_one_tip_alone_needs_no_fresh_seeds():
    "There was no choice: half of the time is on the seeds of the race"
    race = dict(baseline=BASE, a=[.81,.82,.815])
    res = make(race, favourite=['a'])
    half = TipsReport(res.json | dict(runs=res.json['runs'] + runs_of(dict(baseline=BASE, a=[.85,.87,.86]), 'length', seconds=5.)))
    assert half.finding==res.finding and half.finding.pays and half.code.endswith('x = source + y') and '3 seeds)' in half.advice
    assert half.notes==['The difference was +15.0 points at half of the training time and +10.5 points at the end: the gain shrinks with time.']
    assert [l for l in lines(half) if l.startswith('--')]==['-- At half of the time']

def test_a_network_may_be_the_favourite():
    race,fresh = dict(baseline=BASE, a=[.70,.72,.715], net=[.81,.82,.815]),dict(baseline=BASE, net=[.81,.82,.815])
    res = make(race, fresh, favourite=['net'], networks=['net'])
    assert res.advice.startswith('Use net: accuracy .815 instead of .710') and res.notes==[] and res.df.part.tolist()==['race','race','network']

def test_lower_is_better():
    loss = dict(baseline=[.531,.551,.541], good=[.42,.44,.431])
    res = make(loss | dict(poor=[.7,.72,.711]), loss, favourite=['good'], metric='valid_loss', lower=True)
    assert res.advice.startswith('Use good: valid_loss .430 instead of .541, -.111 (95% interval -.1') and '; lower is better; 3 fresh seeds)' in res.advice
    assert 'points' not in repr(res) and res.df.tip.tolist()==['baseline','good','poor']
    worse = make(dict(baseline=loss['baseline'], poor=[.7,.72,.711]), metric='valid_loss', lower=True)
    assert worse.advice=='No tip paid here; keep `fine_tune`.'

@pytest.mark.parametrize('metric,scores,points', [('accuracy',[.1,1.],True), ('error_rate',[.1],True), ('f1_score',[.5,math.nan],True), ('valid_loss',[.1],False),
                                                  ('rmse',[.2],False), ('accuracy',[70.],False), ('matthews_corrcoef',[.3],False)])
def test_points_only_for_shares(metric, scores, points): assert Unit.of(dict(metric=metric, lower=False), scores).points==points

def test_nothing_learned():
    chance = dict(baseline=[.2,.22,.21], a=[.21,.2,.22])
    res = make(chance, chance=.2) # Two standard errors: .28
    assert res.advice.startswith('Nothing was learned: no accuracy is better than always') and res.df.verdict.tolist()==['','nothing learned']
    assert res.code.splitlines()[-1]=='x = source'
    assert make(dict(baseline=[.5,.52,.51], a=[.21,.2,.22]), chance=.2).df.verdict[1]=='costs'
    # The tip has learned, the baseline has not: that is a gain
    res = make(dict(baseline=[.2,.22,.21], a=[.5,.52,.511]), chance=.2)
    assert res.advice.startswith('Use a: accuracy .510 instead of .210, +30.0 points')

@pytest.mark.parametrize('d,sd,n', [(.01,.012,9), (-.01,.012,9), (.2,.01,2), (0,.01,7), (.001,1,101)])
def test_seeds_to_tell(d, sd, n):
    "Of t: 2.306*.012/3 = .0092 and 2.365*.012/2.828 = .0100; within .01 of 0: 2.447*.01/2.646 = .0092 and 2.571*.01/2.449 = .0105"
    assert seeds_to_tell(d, sd)==n

def test_how_many_seeds_would_tell():
    f = Finding(Unit('accuracy', True), name='a', difference=.011, low=-.008, high=.03, n=3, verdict='inconclusive', evidence='fresh seed', more=12)
    assert str(f)=='Inconclusive: a gained +1.1 points (95% interval -0.8 to +3.0; 3 fresh seeds); about 12 seeds would settle it.'
    res = chosen(dict(baseline=BASE, good=[.73,.71,.735]))
    row = res.fresh.iloc[1]
    assert 3<seeds_to_tell(row.difference, row.sd)==res.finding.more<20 and f'about {res.finding.more} seeds would settle it' in res.advice

# The cell to paste ----------------------------------------------------------------------

def comments(code): return [t.string for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type==tokenize.COMMENT]
def result(code):
    names = {}
    exec(code, names)
    return names['x']

def test_the_cell_runs_and_trains_with_what_pays():
    assert result(chosen().code)==4 and comments(chosen().code)==[]
    assert chosen().code.startswith('import math\n\nsource = 3\n\n')

def test_the_inconclusive_is_a_comment_that_says_so():
    code = chosen(dict(baseline=BASE, good=[.76,.67,.73])).code
    said = comments(code)
    assert result(code)==3 and said[0].startswith('# Inconclusive: good gained') and 'Not shown to pay' in said[1] and said[2:]==['# y = 1','# x = source + y']

def test_what_costs_is_not_even_a_comment():
    code = chosen(dict(baseline=BASE, good=[.60,.62,.611])).code
    assert result(code)==3 and 'y = 1' not in code and len(comments(code))==1

def test_no_name_gets_out_of_its_comment():
    name = 'a\nx = 7 #'
    res = make({'baseline':BASE, name:[.81,.70,.74]}, {'baseline':BASE, name:[.76,.67,.73]}, favourite=[name])
    assert result(res.code)==3 and len(ast.parse(res.code).body)==3

# The table ------------------------------------------------------------------------------

def test_parts_and_their_order():
    res = make(dict(baseline=BASE, poor=[.60,.62,.61], net=[.9,.91,.92], good=[.81,.82,.82], fair=[.75,.77,.76]), FRESH | {'good + fair':[.80,.82,.81]},
               together={'good + fair':[.83,.84,.86]}, favourite=['good','fair'], networks=['net'])
    assert res.df.tip.tolist()==['baseline','good','fair','poor','good + fair','net']
    assert res.df.part.tolist()==['race']*4 + ['together','network']
    assert res.df.difference.tolist()[1:]==pytest.approx([.32/3,.05,-.1,.4/3,.2])
    assert res.df.n.tolist()==[3]*6 and res.fresh.tip.tolist()==['baseline','good + fair']
    text = [l for l in lines(res) if l.startswith('-- ')]
    assert text==['-- Combinations','-- Other networks','-- On fresh seeds']
    assert 'Another network did better in the same time: net +20.0 points' in first(res)
    assert [m for m in re.findall('<strong>(.*?)</strong>', res._repr_html_())][1:]==['Combinations','Other networks','On fresh seeds']

def test_unequal_seeds_are_compared_on_what_both_have():
    res = make(dict(baseline=[.70,.72,.71,.79,.80], a=[.60,.62]))
    df = res.df.set_index('tip')
    assert df.n.tolist()==[5,2] and df.difference['a']==pytest.approx(-.1) and res.differences('a')==pytest.approx([-.1,-.1])
    assert '2 to 5 seeds' in res.conditions
    splits = [make(dict(baseline=BASE[:n], a=BASE[:n]), splits='vary').conditions for n in (1,2)]
    assert '; 1 seed, 1.5 of' in splits[0] and '; 2 seeds, each on its own split, 1.5 of' in splits[1]
    # The baseline's final score on these two seeds is .71, its training takes 10 seconds: .61 never gets there
    assert make(dict(baseline=[.70,.72,.71,.79,.80], a=[.71,.73])).df.to_baseline[1]<10
    assert math.isnan(df.to_baseline['a']) and df.share['baseline']==pytest.approx(1)

def test_time_to_the_baseline():
    "From (5, .405) to (10, .81): .71 is there at 5 + 5*.305/.405"
    df = chosen().fresh.set_index('tip')
    assert df.to_baseline['good']==pytest.approx(5+5*.305/.405) and df.share['good']==pytest.approx(.5+.5*.305/.405)

@pytest.mark.parametrize('memory', [None,2**30])
def test_text_fits_and_verdicts_are_whole(memory):
    long = 'progressive + mixed + label smoothing + fit_head'
    res = make({'baseline':BASE, 'x'*60:[.71,.70,.74], long:[.6,.62,.61]}, {'baseline':BASE, long:[.8,.82,.81]}, favourite=[long], tips={long:'y'*200})
    for r in res.json['runs']: r['memory'] = memory
    table = repr(res).split('\n\n')[1].splitlines()
    assert max(map(len, table))<=95 and ('peak MB' in table[0])==bool(memory)
    at = table[0].index('verdict')
    found = [l[at:].split('  ')[0] for l in table[1:] if l[at:] and not l.startswith('--')]
    assert sorted(found)==sorted([*res.df.verdict,*res.fresh.verdict]) and 'see fresh seeds' in found
    assert long in ' '.join(l[:at].strip() for l in table) # Over several lines
    assert 'y'*200 in repr(res) and f'<td style="text-align:left">{long}</td>' in res._repr_html_()
    head = re.findall('<th>(.*?)</th>', res._repr_html_())
    assert head[:2]==['tip','verdict']

def test_lines_of_tips_and_reasons():
    res = make(dict(baseline=BASE, a=[.81,.82,.82]), tips=dict(a='learn.a() # <b>', unused='learn.b()'))
    assert '- a: learn.a() # <b>' in lines(res) and '- mixed: nothing was faster' in lines(res) and 'learn.b()' not in repr(res)
    assert '<li>a: <code>learn.a() # &lt;b&gt;</code></li>' in res._repr_html_() and '<li>mixed: nothing was faster</li>' in res._repr_html_()
    assert res.left_out==dict(mixed='nothing was faster')

def test_a_head_alone_has_no_images():
    res = make(dict(baseline=BASE, fit_head=[.81,.82,.82]))
    for r in res.runs('fit_head'): r['images'] = 0
    assert math.isnan(res.df.images_per_second[1]) and res.df.images_per_second[0]==100 and 'nan' not in repr(res)

def test_what_diverged():
    res = make(dict(baseline=BASE, a=[math.nan,.82,.82], b=[.7,.72,.711]))
    assert res.df.set_index('tip').verdict['a']=='costs' and res.df.tip.tolist()[-1]=='a' and 'nan' not in repr(res).split('\n\n')[1]
    plt.close(res.plot())

def test_numbers_are_not_changed_from_outside():
    res = chosen()
    df = res.df
    df['score'] = 7
    assert res.df.score[0]==pytest.approx(.71)

def test_records_without_a_stage_raced():
    old = make(dict(baseline=BASE, a=[.80,.82,.811])).json
    for r in old['runs']: del r['stage']
    del old['favourite'], old['networks']
    res = TipsReport(old | dict(together=[], code='learn.fine_tune(3)'))
    assert res.df.tip.tolist()==['baseline','a'] and res.code.endswith('learn.fine_tune(3)') and len(res.fresh)==0
    plt.close(res.plot())

# Another length -------------------------------------------------------------------------

def test_gain_at_another_length():
    "One doubling on, each seed gains or loses once more what it did from the half to the whole: .03 and .07"
    mean,low,high = gain_at([.04,.06], [.05,.05], 1)
    half = 12.7062*.04/2**.5/2**.5
    assert (mean,low,high)==pytest.approx((.05,.05-half,.05+half), abs=1e-5)
    assert gain_at([.04], [.05], 0)[0]==pytest.approx(.04) and math.isnan(gain_at([.04], [.05], 1)[1])

def test_what_is_said_of_the_length():
    half = dict(baseline=BASE, good=[.851,.872,.859])
    res = chosen(half=half)
    # .151, .152, .149 at the half; .10, .103, .097 at the end
    assert res.notes==['The difference was +15.1 points at half of the training time and +10.0 points at the end: the gain shrinks with time.']
    assert '-- At half of the time' in lines(res)
    # 20 seconds are one doubling: .049, .054, .045
    longer = chosen(half=half, train_minutes=1/3).notes[0]
    assert longer.endswith(' If that goes on, it is +4.9 points (+3.8 to +6.1) at 0.333333 minutes.')
    assert '-0.' in (turn := chosen(half=half, train_minutes=2/3).notes[0]) and turn.endswith(': the order may turn.')
    assert chosen(half=half, train_minutes=1.).notes[0].endswith('-3.1 points (-4.8 to -1.4) at 1 minute: the order turns.')
    assert 'too far' in chosen(half=half, train_minutes=60).notes[0] and chosen(half=half, train_minutes=.1).notes==res.notes

# The plot -------------------------------------------------------------------------------

@pytest.fixture
def axes():
    made = []
    def draw(res):
        made.append(res.plot())
        made[-1].canvas.draw()
        return made[-1].axes
    yield draw
    for f in made: plt.close(f)

def test_rows_of_the_plot(axes):
    left,_ = axes(chosen(networks=['poor']))
    assert [t.get_text() for t in left.get_yticklabels()]==['good, fresh seeds  n=3','good  n=3','poor (network)  n=3']
    at = [float(c[0].get_xdata()[0]) for c in left.containers]
    assert at==pytest.approx([10.,32/3,-29/3]) and [c[0].get_marker() for c in left.containers]==['D','o','o']
    assert 'points of accuracy (right is better)'==left.get_xlabel()

def test_no_legend_over_data_and_no_warnings(axes):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        left,right = axes(chosen(together={'good + poor':[.8,.81,.82]}))
    box = left.get_legend().get_window_extent()
    assert box.y1<left.get_window_extent().y0 and right.get_legend() is None
    boxes = sorted((Text.get_window_extent(t) for t in right.texts), key=lambda b: b.y0) # Without the line to its curve
    assert len(boxes)==4 and all(b.x0>right.get_window_extent().x1-1 for b in boxes) and all(a.y1<=b.y0+1 for a,b in zip(boxes, boxes[1:]))

@pytest.mark.parametrize('n,title', [([3,3],'mean of 3 seeds'), ([5,2],'mean of 2 to 5 seeds'), ([1,1],'mean of 1 seed')])
def test_seeds_in_the_title(axes, n, title):
    _,right = axes(make(dict(baseline=[.7]*n[0], a=[.8]*n[1]), seeds=2))
    assert right.get_title()==f'Score over time, {title}'
    assert [t.get_text() for t in right.texts]==(['baseline','a'] if n[0]==n[1] else ['baseline  n=5','a  n=2'])

def test_lines_are_means(axes):
    _,right = axes(chosen())
    lines = [l.get_xydata().tolist() for l in right.lines]
    assert np.allclose(lines[0], [[5,.355],[10,.71]]) and np.allclose(lines[1], [[5,.4083333],[10,.8166667]])

def test_only_a_baseline(axes):
    left,right = axes(make(dict(baseline=BASE)))
    assert not left.axison and not left.containers and len(right.lines)==1

@pytest.mark.parametrize('ys,gap,res', [([1.,1.,5.],1.,[.5,1.5,5.]), ([3.,0.,3.],1.,[2.5,0.,3.5]), ([0.,0.,0.,.5],1.,[-1.375,-.375,.625,1.625]), ([],1.,[])])
def test_labels_move_apart(ys, gap, res): assert spread(ys, gap)==pytest.approx(res)

# The file -------------------------------------------------------------------------------

def test_file_opens_without_a_network(tmp_path):
    text = chosen().to_html(tmp_path/'r.html').read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and 'http' not in text
    body = text.split('<body>')[1]
    assert body.index('Use good: accuracy') < body.index('x = source + y') < body.index('<img') < body.index('<table')
    assert 'best together' not in text.lower() and 'data:image/png;base64,' in text

def test_read_again(tmp_path):
    res = chosen()
    (tmp_path/'report.json').write_text(json.dumps(res.json))
    again = TipsReport.load(tmp_path)
    assert (again.advice,again.code,repr(again))==(res.advice,res.code,repr(res)) and again.to_html()==tmp_path/'report.html'
    (tmp_path/'report.json').write_text('[]')
    with pytest.raises(ValueError, match='the folder of a finished report'): TipsReport.load(tmp_path)

def test_texts_are_escaped(tmp_path):
    bad = '<script>alert(1)</script> $x'
    res = make({'baseline':BASE, bad:[.81,.82,.82]}, {'baseline':BASE, bad:[.81,.82,.82]}, favourite=[bad], tips={bad:'<i>'}, arch='<b>x',
               code=dict(imports='</pre><script>', data='', baseline='', favourite='<script>'))
    text = res.to_html(tmp_path/'r.html').read_text()
    assert '<script' not in text and '<i>' not in text and '<b>x' not in text and 'mathjax_ignore' in res._repr_html_()

def test_unequal_times_are_said():
    "On a busy machine a plan may miss; what trains a head alone is meant to end early"
    def notes(*seconds, images=100):
        res = make(dict(baseline=[.5,.51,.52], a=[.5,.51,.52]))
        runs = [r | (dict(seconds=s, images=images) if r['name']=='a' else dict(seconds=10., images=100)) for r,s in zip(res.json['runs'], [0,0,0,*seconds])]
        return ' '.join(TipsReport(res.json | dict(runs=runs)).notes)
    assert 'Not the same time' not in notes(12., 9., 12.) + notes(2., 2., 2., images=0)
    assert 'a 1.5 times as long as the baseline' in notes(10., 15., 20.) and 'a 0.5 times' in notes(4., 5., 6.)
