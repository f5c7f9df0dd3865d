"What a plan makes of an image is what fastai's loaders make of it, on the lowest versions too, which have no ONNX"
import numpy as np, pytest, torch
from PIL import Image
from fastai.data.transforms import Transform
from fastai.torch_core import TensorImage
from fastai.vision.augment import CropPad, RandomCrop, RandomResizedCrop, RandomResizedCropGPU, Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai_tricks.deploy.plan import batch_steps, InferencePlan, item_steps
from fastai_tricks.deploy.whole import Prepare, sample_matrices

def test_pillow_pixel_for_pixel():
    "In all kinds, filters and ways to pad, no pixel is more than one of 255 levels away"
    rng = np.random.default_rng(0)
    tfms = [Resize(96), Resize(96, resamples=(Image.BICUBIC,0)), Resize((64,100)), Resize(77, method='squish'), RandomResizedCrop(96), RandomCrop(80),
            *(Resize((100,64), method='pad', pad_mode=p) for p in ('zeros','border','reflection')), *(CropPad(150, pad_mode=p) for p in ('zeros','reflection'))]
    for wh in ((301,199),(40,90),(97,97),(500,60),(1200,801)):
        im = Image.fromarray(rng.integers(0, 256, (9,9,3), dtype=np.uint8)).resize(wh, Image.BICUBIC)
        for t in tfms:
            expected = np.asarray(t(PILImage(im), split_idx=1)).astype(float)
            got = Prepare(InferencePlan(item_steps(t)))(torch.tensor(np.asarray(im))[None])[0].permute(1,2,0).numpy()*255
            assert abs(got-expected).max()<1.01 and abs(got-expected).mean()<.15, (wh, t)

@pytest.mark.parametrize('tfm', [RandomResizedCropGPU(40), RandomResizedCropGPU((64,40), valid_scale=.8), aug_transforms(size=60)[0], aug_transforms(size=(30,90))[0],
                                 aug_transforms(size=200)[0]])
def test_batch_transforms(tfm):
    x = torch.rand(2, 3, 100, 140)
    down,across = sample_matrices(*batch_steps(tfm, (100,140)), (100,140))
    assert torch.allclose(down @ x @ across.T, tfm(TensorImage(x), split_idx=1).as_subclass(torch.Tensor), atol=1e-4)

def test_only_an_empty_transform_does_nothing():
    assert item_steps(Transform())==() and item_steps(Transform(lambda x: x)) is None
