"Training steps on a clock of their own"
from contextlib import contextmanager
from fastai_tricks.train import variants as V

@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(): yield

def with_speeds(monkeypatch, speeds, first={}):
    "Steps take as long as `speeds` says, steps/s for each variant by its name; the first one made of it `first` more seconds, once"
    clock, step, first = [0.], V.training_step, dict(first)
    for nm in ('perf_counter','process_time'): monkeypatch.setattr(f'time.{nm}', lambda: clock[0])
    def slow(learn, xb, yb, v):
        train = step(learn, xb, yb, v)
        def timed():
            clock[0] += 1/speeds[str(v)] + first.pop(str(v), 0)
            return train()
        return timed
    monkeypatch.setattr(V, 'training_step', slow)
