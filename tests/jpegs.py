"JPEGs, how near two images are, and the scales at which they were decoded"
import io, math
import pytest
from fastai.vision.all import image2tensor
from fastai_tricks.data.draft import PILImageDraft

def jpeg(im, **kwargs):
    buf = io.BytesIO()
    im.save(buf, 'JPEG', **{'quality':92, **kwargs})
    return buf.getvalue()

def psnr(a, b):
    a,b = (image2tensor(o).float() for o in (a, b))
    return 10*math.log10(255**2/(a-b).pow(2).mean().clamp(min=1e-9).item())

@pytest.fixture
def scales(monkeypatch):
    "The scales at which `PILImageDraft` decoded"
    res,reduced = [],PILImageDraft.reduced
    monkeypatch.setattr(PILImageDraft, 'reduced', lambda self, d: (res.append(d), reduced(self, d))[1])
    return res
