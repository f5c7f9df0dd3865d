"What only a GPU would show: its capability is faked, the paths that depend on it are looked at"
import pytest, torch
from fastai.torch_core import defaults
from fastai_tricks.core import state as S
from fastai_tricks.core.batch import is_oom
from fastai_tricks.core.learner import check_device, has_kernels, keep_random
from fastai_tricks.core.test_utils import tiny_learner
from fastai_tricks.report import report as R
import fastai_tricks.all # noqa: F401 - for the Learner's methods

CU13 = ['sm_75','sm_80','sm_86','sm_90','sm_100','sm_120','compute_120'] # torch's own wheel, since CUDA 13
CU126 = ['sm_50','sm_60','sm_70','sm_75','sm_80','sm_86','sm_90']
P100,V100,T4,L4,H100,NEWER = (6,0),(7,0),(7,5),(8,9),(9,0),(13,0)

@pytest.mark.parametrize('capability,archs,ok', [
    (P100,CU13,False), (P100,CU126,True), (V100,CU13,False), (T4,CU13,True), (L4,CU13,True), (H100,CU13,True), (H100,['sm_90a'],True),
    (NEWER,CU13,True), (NEWER,CU126,False), ((8,0),['sm_86'],False), (T4,['compute_70'],True), (P100,[],True), (P100,['gfx90a'],True)])
def test_machine_code_runs_within_a_generation_and_ptx_on_all_later_ones(capability, archs, ok): assert has_kernels(capability, archs)==ok

def fake_gpu(monkeypatch, capability, archs=CU13, name='Tesla P100-PCIE-16GB'):
    for k,v in dict(is_available=lambda: True, current_device=lambda: 'cuda:0', get_device_capability=lambda d=None: capability, get_arch_list=lambda: archs, get_device_name=lambda d=None: name).items():
        monkeypatch.setattr(torch.cuda, k, v)

def test_a_gpu_without_kernels_is_named_in_one_line(monkeypatch):
    fake_gpu(monkeypatch, P100)
    with pytest.raises(RuntimeError) as e: check_device('cuda:0')
    said = str(e.value)
    assert '\n' not in said and 'Tesla P100-PCIE-16GB (sm_60)' in said and torch.__version__ in said and 'sm_75' in said and 'no kernel image' in said
    check_device('cpu')
    check_device(torch.device('meta'))
    fake_gpu(monkeypatch, T4)
    check_device('cuda')
    monkeypatch.setattr(torch.version, 'hip', '6.0')
    fake_gpu(monkeypatch, P100)
    check_device('cuda') # AMD's have other numbers

@pytest.mark.parametrize('f', [lambda o: o.to_mixed(), lambda o: o.to_mixed(torch.float16), lambda o: o.precision_report(), lambda o: o.bs_find(plot=False),
                               lambda o: o.fit_fast(1, pretrained=False), lambda o: o.fit_fast(minutes=1, pretrained=False), lambda o: o.fit_head(), lambda o: o.show_cam(),
                               lambda o: o.depthwise_report()])
def test_it_is_said_before_anything_else_is_done(f, monkeypatch):
    learn = tiny_learner()
    fake_gpu(monkeypatch, P100)
    for dl in learn.dls.loaders: dl._device = torch.device('cuda:0')
    monkeypatch.setattr(type(learn.dls), 'device', torch.device('cuda:0'))
    with pytest.raises(RuntimeError, match='Tesla P100'): f(learn)

def test_a_worker_does_not_touch_cuda(monkeypatch):
    "After a fork CUDA cannot be used, and a new process would set up the GPU for itself"
    def fails(*args): raise RuntimeError('Cannot re-initialize CUDA in forked subprocess')
    class Items(torch.utils.data.Dataset):
        def __len__(self): return 1
        def __getitem__(self, i):
            before = torch.rand(1)
            with keep_random(): a = torch.rand(1)
            return before,a,torch.rand(1)
    monkeypatch.setattr(torch.cuda, 'get_rng_state_all', lambda: fails() if torch.utils.data.get_worker_info() else [])
    monkeypatch.setattr(torch.cuda, 'set_rng_state_all', lambda o: fails() if o else None)
    _,a,b = next(iter(torch.utils.data.DataLoader(Items(), num_workers=1)))
    assert torch.equal(a, b)

def test_the_gpus_own_random_state_is_kept(monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, 'get_rng_state_all', lambda: ['as it was'])
    monkeypatch.setattr(torch.cuda, 'set_rng_state_all', given.append)
    with keep_random(): pass
    assert given==[['as it was']]

@pytest.mark.parametrize('saved,here,want', [(2,1,1), (1,2,1), (2,2,2), (0,1,0)])
def test_a_run_goes_on_with_other_gpus_than_it_was_saved_on(saved, here, want, monkeypatch):
    "torch knows no generator of a GPU that is not there"
    given = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: here)
    monkeypatch.setattr(torch.cuda, 'set_rng_state_all', given.append)
    learn = tiny_learner()
    learn.create_opt()
    state = S.get_state(learn)
    for o in state['random']: o['torch_cuda_state'] = [torch.zeros(16, dtype=torch.uint8)]*saved
    S.set_random_state(learn, state)
    assert len(given[-1])==want

@pytest.mark.parametrize('text,oom', [
    ('CUDA out of memory. Tried to allocate 2.00 GiB.',True), ('CUDA error: out of memory',True), ('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling',True),
    ('cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.',True),
    ('cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED',True), ('cuDNN error: CUDNN_STATUS_ALLOC_FAILED',True),
    ('cuDNN error: CUDNN_STATUS_NOT_SUPPORTED_ARCH_MISMATCH',False), ('cuDNN error: CUDNN_STATUS_NOT_SUPPORTED_DATA_TYPE',False),
    ('CUDA error: no kernel image is available for execution on the device',False), ('CUDA error: device-side assert triggered',False)])
def test_what_says_that_memory_ran_out(text, oom): assert is_oom(RuntimeError(text))==oom

def test_a_report_made_on_the_cpu_names_no_gpu(monkeypatch):
    monkeypatch.setattr(defaults, 'use_cuda', False)
    fake_gpu(monkeypatch, P100)
    assert R._environment()['device']!='Tesla P100-PCIE-16GB'
