"What holds for all tests"
import gc, random, sys
import pytest

def pytest_collection_finish(session):
    # `cross_validate` collects garbage after each fold: half a second each time, were it to look at all that was imported
    gc.collect()
    gc.freeze()
    # Where `torch.compile` is loaded before the first backward pass, autograd starts threads, and no test can fork from then on
    if 'torch' in sys.modules: sys.modules['torch'].ones(1, requires_grad=True).sum().backward()

@pytest.fixture(autouse=True)
def seeded():
    "Each test begins alike, whatever ran before it"
    random.seed(0)
    if 'numpy' in sys.modules: sys.modules['numpy'].random.seed(0)
    if 'torch' in sys.modules: sys.modules['torch'].manual_seed(0)
