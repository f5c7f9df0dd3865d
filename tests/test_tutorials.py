"Tutorials are not run in the tests: what they saved is whole, and what they call is still there"
import ast, builtins, inspect, json, re
from pathlib import Path
import pytest
import fastai.vision.all, fastai_tricks.all
from fastai.data.block import DataBlock
from fastai_tricks.cv.climb import Climb
from fastai_tricks.cv.cross_validate import CrossValidation
from fastai_tricks.report.result import TipsReport
from fastai_tricks.core.test_utils import tiny_learner

FOLDER = Path(__file__).resolve().parent.parent/'nbs'/'tutorials'
TUTORIALS = sorted(FOLDER.glob('*.ipynb'))
NOT_RUN = 'two_gpus.ipynb','kaggle.ipynb' # Needs two GPUs; the folders of Kaggle (`make test-kaggle`)
each = pytest.mark.parametrize('file', TUTORIALS, ids=lambda f: f.stem)

def cells(file): return json.loads(file.read_text(encoding='utf-8'))['cells']

def code(file):
    "Parsed cells without lines for the shell and without magic, with their outputs"
    for c in cells(file):
        if c['cell_type']!='code': continue
        src = ''.join(o for o in c['source'] if not o.startswith(('!','%')))
        yield src,ast.parse(src),c['outputs']

def names():
    "What a notebook has after both imports"
    return {**vars(builtins), **{k:getattr(m, k) for m in (fastai.vision.all,fastai_tricks.all) for k in getattr(m, '__all__', vars(m))}, 'display':print}

def bound(trees):
    "Names that the cells themselves define, wherever"
    res = set()
    for n in (n for t in trees for n in ast.walk(t)):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load): res.add(n.id)
        elif isinstance(n, (ast.FunctionDef,ast.ClassDef)): res.add(n.name)
        elif isinstance(n, ast.arg): res.add(n.arg)
        elif isinstance(n, (ast.Import,ast.ImportFrom)): res |= {(a.asname or a.name).split('.')[0] for a in n.names}
    return res

def methods():
    "What a name of the tutorials stands for: an object, or a class with the attributes that its code sets"
    learn = tiny_learner()
    return dict(learn=(learn,''), dls=(learn.dls,''), block=(DataBlock,''), **{k:(c,inspect.getsource(c)) for k,c in dict(run=Climb, cv=CrossValidation, report=TipsReport).items()})

def accepts(f, kw):
    try: ps = inspect.signature(f).parameters
    except (TypeError,ValueError): return True
    return kw in ps or any(p.kind==p.VAR_KEYWORD for p in ps.values())

def unknown(trees):
    "Names, attributes and arguments that nothing knows"
    trees,known = list(trees),names()
    own,objects,bad = bound(trees),methods(),[]
    functions = {n.name for t in trees for n in ast.walk(t) if isinstance(n, ast.FunctionDef)}
    for n in (n for t in trees for n in ast.walk(t)):
        if isinstance(n, ast.Name) and n.id not in known and n.id not in own: bad.append(n.id)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in objects and n.value.id not in functions:
            o,src = objects[n.value.id]
            if not hasattr(o, n.attr) and not re.search(rf'\bself\.(\w+,self\.)*{n.attr}\b', src) and f"'{n.attr}'" not in src: bad.append(f'{n.value.id}.{n.attr}')
        if isinstance(n, ast.Call):
            f = n.func
            if isinstance(f, ast.Name) and f.id in known and f.id not in own: f = known[f.id]
            elif isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id in objects: f = getattr(objects[f.value.id][0], f.attr, None)
            else: continue
            # fastai's own pass on what their signatures hide
            if callable(f) and (getattr(f, '__module__', None) or '').startswith('fastai_tricks'): bad += [f'{ast.unparse(n.func)}({k.arg}=)' for k in n.keywords if k.arg and not accepts(f, k.arg)]
    return bad

@each
def test_not_run_by_nbdev(file): assert ''.join(cells(file)[0]['source']).splitlines()==['---','skip_exec: true','---']

@each
def test_outputs_saved(file):
    for src,tree,outputs in code(file):
        assert not [o for o in outputs if o['output_type']=='error'], src
        # An expression at the end shows itself, unless a semicolon says otherwise
        if file.name not in NOT_RUN and tree.body and isinstance(tree.body[-1], ast.Expr) and not src.rstrip().endswith(';'): assert outputs, src

@each
def test_no_paths_of_a_machine(file):
    for c in cells(file):
        texts = [c['source'], *(o.get('text', '') for o in c.get('outputs', [])), *(t for o in c.get('outputs', []) for k,t in o.get('data', {}).items() if k.startswith('text/'))]
        found = re.search(r'/(tmp|root|work|home|private|Users)/.{0,40}', '\n'.join(''.join(t) for t in texts))
        assert not found, found[0]

@each
def test_names_are_known(file): assert not unknown(t for _,t,_ in code(file))

@pytest.mark.parametrize('src,bad', [
    ('learn.fit_in_stages([Stage(64, 1)])',['learn.fit_in_stages']), ('climbs(block)',['climbs']), ('albu_transforms(96, power=2)',['albu_transforms(power=)']),
    ('learn.show_cam(3, number=2)',['learn.show_cam(number=)']), ('run.tables',['run.tables']), ('run.table; run.cvs; cv.scores; report.plot(); learn.show_cam(3)',[])])
def test_unknown_is_found(src, bad): assert unknown([ast.parse('learn = run = cv = report = block = None'), ast.parse(src)])==bad

@each
def test_links(file):
    "Pages and headings that a tutorial links to are there"
    here = [''.join(c['source']) for c in cells(file) if c['cell_type']=='markdown']
    for link,anchor in re.findall(r'\]\(([^)#:]*)(?:#([^)]*))?\)', '\n'.join(here)):
        target = (FOLDER/link).resolve() if link else file
        assert target.is_file(), link
        if anchor: assert anchor in [h.strip().replace(' ', '-').replace('?', '').replace('`', '') for c in cells(target) if c['cell_type']=='markdown' for h in re.findall(r'(?m)^#+ (.*)', ''.join(c['source']))], (link,anchor)
