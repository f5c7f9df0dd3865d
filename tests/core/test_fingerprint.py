"Fingerprints: what changes what comes out is seen, what a run notes down is not"
import re, sys, time, types
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.layers import Lambda
from fasttransform import Transform
from fastai_tricks.core.fingerprint import fingerprint

def world(code, **names):
    "Run code as a notebook's cell; its globals"
    res = {'__name__':'__main__', 'np':np, 'torch':torch, 'pd':pd, **names}
    exec(code, res)
    return res

NOTES = dict(
    factory=("RES = defaultdict(list)\ndef f(learn): RES[learn].append(1)", dict(defaultdict=defaultdict)),
    nested=("D = {'a':[]}\ndef f(learn): D['a'].append(1)", {}),
    counts=("L = [[0]]\ndef f(learn): L[0][0] += 1", {}),
    attribute=("C = SimpleNamespace(n=0)\ndef f(learn): C.n += 1", dict(SimpleNamespace=SimpleNamespace)),
    array=("A = np.zeros(2)\ndef f(learn): A[0] += 1", {}),
    table=("T = pd.DataFrame(dict(a=[0.]))\ndef f(learn): T.loc[0,'a'] += 1", {}),
    tensor=("T = torch.zeros(2)\ndef f(learn): T.add_(1)", {}),
    method=("class Log:\n    def __init__(self): self.log,self.d = [],{}\n    def __call__(self, learn):\n        self.log.append(1)\n        self.d[learn] = 1\nf = Log()", {}),
    cached=("class Get:\n    def __init__(self): self.cache = {}\n    def __call__(self, o):\n        if o not in self.cache: self.cache[o] = 1\n        return self.cache[o]\nf = Get()", {}),
    key=("R = SimpleNamespace(learns={})\ndef f(learn): R.learns[len(R.learns)] = learn", dict(SimpleNamespace=SimpleNamespace)))

@pytest.mark.parametrize('case', NOTES)
def test_what_a_run_notes_down_says_nothing_of_it(case):
    f = world(NOTES[case][0], **NOTES[case][1])['f']
    was = fingerprint(f)
    for i in range(3): f(i)
    assert fingerprint(f)==was

def other_module(code):
    m = types.ModuleType('my_helpers')
    exec(code, m.__dict__)
    sys.modules['my_helpers'] = m
    return m

CODE = dict(
    namespace=lambda v: world(f"C = SimpleNamespace(lr={v})\ndef f(learn): return C.lr", SimpleNamespace=SimpleNamespace)['f'],
    module=lambda v: world("def f(learn): return my_helpers.g(learn)", my_helpers=other_module(f"def g(o): return {v}"))['f'],
    cached=lambda v: world(f"@cache\ndef g(o): return {v}\ndef f(learn): return g(learn)", cache=cache)['f'],
    pattern=lambda v: world(f"P = re.compile('{v}')\ndef f(o): return P.match(o)", re=re)['f'],
    slots=lambda v: world(f"@dataclass(slots=True)\nclass C: lr:float\nc = C({v})\ndef f(learn): return c.lr", dataclass=dataclass)['f'],
    setter=lambda v: world(f"class C:\n    def __init__(self, lr): self.lr = lr\n    def __call__(self, learn): return self.lr\nf = C({v})")['f'],
    callback=lambda v: world(f"class C(Callback):\n    def __init__(self, a): self.b = a*2\nf = C({v})", Callback=Callback)['f'],
    forward=lambda v: world(f"class M(nn.Module):\n    def forward(self, x): return x*{v}\nf = M()", nn=nn)['f'],
    scale=lambda v: world(f"class M(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.scale = {v}\nf = M()", nn=nn)['f'],
    mixup=lambda v: MixUp(float(v)), layer=lambda v: Lambda(eval(f'lambda x: x+{v}')), transform=lambda v: Transform(eval(f'lambda x: x+{v}')),
    objects=lambda v: np.array([{v,'a'}, None], dtype=object), table=lambda v: pd.DataFrame(dict(a=[[v]])), index=lambda v: pd.Index([v]))

@pytest.mark.parametrize('case', CODE)
def test_what_changes_the_result_is_seen_and_nothing_else(case):
    make = CODE[case]
    a,b = make(1),make(1) # Kept alive: other addresses
    assert fingerprint(a)==fingerprint(b)!=fingerprint(make(2))

def test_helpers_that_call_each_other_take_no_time():
    code = 'def f0(): return 1\ndef f1(): return 1\n' + '\n'.join(f'def f{i}(): return f{i-1}() + f{i-2}()' for i in range(2, 60))
    began = time.process_time()
    fingerprint(world(code)['f59'])
    assert time.process_time()-began<5

@pytest.mark.parametrize('t', [torch.zeros(2, device='meta'), torch.eye(2).to_sparse()])
def test_tensors_without_data(t): assert len(fingerprint(t))==12
