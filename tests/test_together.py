"Each pair of tricks on one Learner: it trains, both are at work, and validation is at full size"
from itertools import combinations
from pathlib import Path
import pytest, torch
from fastai.torch_core import set_seed
from test_contract import PAIRS
from together import REFUSED, REMARKS, SAME, SIZE, TRICKS, WITH, cell, images, pairs, use

@pytest.fixture(scope='module')
def photos(tmp_path_factory): return images(tmp_path_factory.mktemp('photos')/'all')

@pytest.mark.parametrize('names', pairs(), ids='+'.join)
def test_pair(names, photos, tmp_path):
    set_seed(1)
    if names in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[names]): use(names, photos, tmp_path)
        return
    o = use(names, photos, tmp_path)
    assert {h for t,h,_ in o.seen if not t}=={SIZE}
    assert all(torch.isfinite(p).all() for p in o.learn.model.parameters())
    for n in names: assert TRICKS[n].worked is None or TRICKS[n].worked(o), n
    if 'climb' not in names:
        with o.learn.no_bar(), o.learn.no_logging(): preds,targs = o.learn.get_preds()
        assert len(preds)==len(o.learn.dls.valid_ds) and preds.shape[1]==o.learn.dls.c

def test_the_table_says_nothing_that_no_test_runs():
    run = set(map(frozenset, pairs()))
    contract = {frozenset(SAME.get(n, n) for n in c) for c in PAIRS}
    known = {frozenset(p):cell(*p)[0] for p in combinations(TRICKS, 2)}
    assert all(known[p] for p in run | contract) and set(REFUSED) | set(REMARKS) <= set(pairs())
    for p in (p for p,said in known.items() if said and p not in run | contract):
        where = next(k for k in p if k in WITH)
        file = Path(__file__).parent/'devices'/dict(accelerate_ctx='test_distributed.py', to_xla='test_xla.py')[where]
        assert f'def {WITH[where][next(iter(p - {where}))]}(' in file.read_text(), p

@pytest.mark.parametrize('page', sorted({t.page for t in TRICKS.values() if t.page}))
def test_page_is_there(page): assert (Path(__file__).parents[1]/'nbs'/f'{page}.ipynb').exists()
