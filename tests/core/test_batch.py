"Batches resized and cut: every kind of input and target, exact where it can be"
import pytest, torch
from torch.nn import functional as F
from fastai.torch_core import TensorCategory, TensorImage, TensorMask
from fastai.vision.core import TensorBBox, TensorPoint
from fastai_tricks.core.batch import crop_batch, is_oom, resize_batch

FULL,SMALL = (48,64),(24,32)

def image(c=3, dtype=torch.float32):
    x = torch.rand(2,c,*FULL)
    return TensorImage((x if dtype.is_floating_point else 255*x).to(dtype))

@pytest.mark.parametrize('dtype', [torch.float32,torch.float16,torch.bfloat16,torch.uint8])
@pytest.mark.parametrize('c', [1,3,5])
def test_images_of_any_kind(c, dtype):
    x = image(c, dtype)
    (small,),() = resize_batch((x,), (), SMALL)
    want = F.interpolate(x.float().as_subclass(torch.Tensor), SMALL, mode='bilinear', antialias=True)
    assert small.dtype==dtype and type(small) is TensorImage and small.shape==(2,c,*SMALL)
    assert torch.allclose(small.float().as_subclass(torch.Tensor), want, atol=.51 if dtype==torch.uint8 else 1e-2)

@pytest.mark.parametrize('shape', [(2,*FULL), (2,1,*FULL)])
@pytest.mark.parametrize('dtype', [torch.int64,torch.uint8,torch.bool])
def test_masks_get_no_new_classes(shape, dtype):
    mask = TensorMask(torch.randint(0, 2, shape).to(dtype))
    _,(small,) = resize_batch((image(),), (mask,), SMALL)
    assert small.dtype==dtype and small.shape[-2:]==SMALL and torch.equal(small, mask[...,1::2,1::2])

def test_what_does_not_lie_on_the_image_stays():
    ys = TensorCategory(torch.tensor([0,1])),torch.rand(2),torch.rand(2,4),'name',None
    _,got = resize_batch((image(),), ys, SMALL)
    assert all(a is b for a,b in zip(ys, got))

def test_the_same_size_changes_nothing():
    x,mask = image(),TensorMask(torch.randint(0, 5, (2,*FULL)))
    (x1,),(m1,) = resize_batch((x,), (mask,), FULL)
    assert x1 is x and m1 is mask

def test_a_map_at_another_stride_keeps_its_ratio():
    x,flow = image(),TensorImage(torch.rand(2,2,12,16))
    (_,other),(small,) = resize_batch((x,TensorImage(torch.rand(2,3,96,128))), (flow,), SMALL)
    assert other.shape[-2:]==(48,64) and small.shape[-2:]==(6,8)

@pytest.mark.parametrize('pixels', [True,False])
def test_points_and_boxes(pixels):
    ys = TensorPoint(torch.tensor([[[64.,48.]]])),TensorBBox(torch.tensor([[[0.,24.,32.,48.]]]))
    _,(p,b) = resize_batch((image(),), ys, SMALL, pixel_points=pixels)
    k = .5 if pixels else 1
    assert torch.equal(p, ys[0]*k) and torch.equal(b, ys[1]*k) and (type(p),type(b))==(TensorPoint,TensorBBox)

def test_each_image_is_cut_at_its_place():
    x,mask = image(),TensorMask(torch.randint(0, 5, (2,*FULL)))
    (a,),(m,) = crop_batch((x,), (mask,), SMALL, torch.tensor([[0.,0.],[.9999,.5]]))
    for got,of in ((a,x),(m,mask)):
        assert torch.equal(got[0], of[0][...,:24,:32]) and torch.equal(got[1], of[1][...,24:,16:48]) and type(got) is type(of)

def test_parts_are_within_the_image_and_reach_its_edges():
    y,x = torch.meshgrid(torch.arange(FULL[0]), torch.arange(FULL[1]), indexing='ij')
    grid = TensorImage(torch.stack([y,x]).float()[None].repeat(500,1,1,1))
    (got,),_ = crop_batch((grid,), (), SMALL, torch.rand(500,2))
    assert got[:,0].min()==0 and got[:,0].max()==47 and got[:,1].min()==0 and got[:,1].max()==63
    assert (got[:,0].diff(dim=1)==1).all() and (got[:,1].diff(dim=2)==1).all()

@pytest.mark.parametrize('y', [TensorPoint(torch.zeros(2,1,2)), TensorBBox(torch.zeros(2,1,4))])
def test_points_are_not_cut(y):
    with pytest.raises(ValueError, match='points and boxes'): crop_batch((image(),), (y,), SMALL, torch.rand(2,2))

@pytest.mark.parametrize('e,oom', [
    (torch.OutOfMemoryError('x'), True), (MemoryError(), True), (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED'), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True), (RuntimeError('shapes differ'), False), (ValueError('out of memory'), False)])
def test_is_oom(e, oom): assert is_oom(e)==oom
