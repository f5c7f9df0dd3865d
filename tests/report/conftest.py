import pytest
from report_world import Pretend, See, bench, clock

@pytest.fixture(autouse=True)
def world(monkeypatch):
    "Time and batches begin again"
    clock.restart()
    See.batches = []
    monkeypatch.setattr(bench, 'now', clock)
    monkeypatch.setattr(bench.gc, 'collect', lambda: None) # Slow, with all that pytest holds

@pytest.fixture
def pretend(monkeypatch):
    "Nothing is trained"
    p = Pretend()
    monkeypatch.setattr(bench, 'step_seconds', lambda learn, steps: (0.,0.))
    monkeypatch.setattr(bench.Bench, 'train', lambda self, *args, **kwargs: p(*args, **kwargs))
    return p
