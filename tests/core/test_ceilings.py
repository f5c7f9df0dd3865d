"""Ceilings of the generated modules that ruff (pyproject.toml) does not know. As a script it lists what is above them: `test_ceilings.py [PACKAGE]`"""
import ast, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[2]/'fastai_tricks'
MODULES = [f for f in sorted(ROOT.rglob('*.py')) if f.name not in ('_modidx.py','__init__.py')]
WIDTH,COMPLEXITY,LENGTH,PACKED,EXCEPTIONS = 140,15,40,2,10
# `module:function` and why it may be above a ceiling
EXCUSED = {}

BRANCH = ast.If,ast.IfExp,ast.For,ast.While,ast.ExceptHandler,ast.comprehension

def complexity(fn):
    "1 + branches, ternaries, comprehensions, handlers and boolean operands: more than ruff's C901 counts"
    def n(o): return len(o.values)-1 if isinstance(o, ast.BoolOp) else isinstance(o, BRANCH)
    return 1 + sum(map(n, ast.walk(fn)))

def nested_ternaries(tree):
    for n in (n for n in ast.walk(tree) if isinstance(n, ast.IfExp)):
        if any(isinstance(o, ast.IfExp) for o in ast.walk(n) if o is not n): yield n.lineno

def packed(tree):
    "Assignments of several values at once to more names than two"
    for n in (n for n in ast.walk(tree) if isinstance(n, ast.Assign)):
        if any(isinstance(t, ast.Tuple) and isinstance(n.value, ast.Tuple) and len(t.elts)>PACKED for t in n.targets): yield n.lineno

def above(text, name):
    "`(what, where)` of all that is above a ceiling"
    tree = ast.parse(text)
    res = [(f'line of {len(l)} characters', f'{name}:{i+1}') for i,l in enumerate(text.splitlines()) if len(l)>WIDTH]
    for f in (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef,ast.AsyncFunctionDef))):
        if (c := complexity(f))>COMPLEXITY: res.append((f'complexity {c}', f'{name}:{f.name}'))
        if (k := f.end_lineno-f.lineno+1)>LENGTH: res.append((f'function of {k} lines', f'{name}:{f.name}'))
    res += [('ternary in a ternary', f'{name}:{i}') for i in nested_ternaries(tree)]
    res += [(f'more than {PACKED} names in a packed assignment', f'{name}:{i}') for i in packed(tree)]
    return res

def of(f): return above(f.read_text(encoding='utf-8'), f.relative_to(ROOT).as_posix())

@pytest.mark.parametrize('f', MODULES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_below_the_ceilings(f): assert not [o for o in of(f) if o[1] not in EXCUSED]

def test_few_exceptions_and_each_is_needed():
    found = {where for f in MODULES for _,where in of(f)}
    assert len(EXCUSED)<=EXCEPTIONS and all(EXCUSED.values()) and set(EXCUSED)<=found

@pytest.mark.parametrize('src,n', [
    ('def f(a):\n    if a: return 1\n', 0), ('x = 1 if a else 2 if b else 3', 1), ('a,b,c = 1,2,3', 1), ('a,b = 1,2', 0), ('a,b,c = f()', 0), ('x = "' + 'a'*140 + '"', 1),
    ('def f(a):\n' + '    a += 1\n'*40, 1), ('def f(a):\n' + '    if a: a += 1\n'*15, 1), ('def f(a): return ' + ' or '.join('a'*16), 1), ('def f(a): return ' + ' or '.join('a'*15), 0)])
def test_what_is_above_is_found(src, n): assert len(above(src, 'm.py'))==n

if __name__=='__main__':
    for f in MODULES:
        if not sys.argv[1:] or f.relative_to(ROOT).parts[0].removesuffix('.py') in sys.argv[1:]:
            for what,where in of(f): print(where, what)
