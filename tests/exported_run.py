"""`FOLDER IMAGE ...`: load each Learner of a folder where neither this package nor albumentations can be imported, and write what it predicts

Beside `name.pkl` comes `name.pt`: the probabilities of the first image by `predict`, and those of all by `get_preds`."""
import sys, traceback
from importlib.abc import MetaPathFinder
from pathlib import Path

class Missing(MetaPathFinder):
    "As if these were not installed"
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('fastai_tricks','albumentations'): raise ModuleNotFoundError(f'No module named {name!r}', name=name)

def predicted(learn, images):
    with learn.no_bar(), learn.no_logging():
        return learn.predict(images[0])[2],learn.get_preds(dl=learn.dls.test_dl(images, num_workers=0))[0]

if __name__=='__main__':
    sys.meta_path.insert(0, Missing())
    import torch
    from fastai.learner import load_learner
    folder,*images = map(Path, sys.argv[1:])
    for f in sorted(folder.glob('*.pkl')):
        try: torch.save(predicted(load_learner(f), images), f.with_suffix('.pt'))
        except Exception: f.with_suffix('.txt').write_text(traceback.format_exc())
    assert not [m for m in sys.modules if m.startswith(('fastai_tricks','albumentations'))]
