"""In torch_tpu's place a device of its kind and its name, which has the memory and the operations of the CPU.
PyTorch takes one such device in a process, for good: `tpu_run.py` has a process of its own"""
import subprocess, sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
import torch
from torch.library import Library, fallthrough_kernel
from torch.utils.cpp_extension import include_paths, library_paths

def compile_device(
    folder, # For the library
): # Its file
    so,abi = Path(folder)/'standin_tpu.so',int(torch._C._GLIBCXX_USE_CXX11_ABI)
    dirs = [*(f'-I{p}' for p in include_paths()), *(f'-L{p}' for p in library_paths())]
    subprocess.run(['g++', '-shared', '-fPIC', '-O0', '-w', '-std=c++20', f'-D_GLIBCXX_USE_CXX11_ABI={abi}',
                    str(Path(__file__).with_suffix('.cpp')), '-o', str(so), *dirs, '-lc10', '-ltorch_cpu'], check=True)
    return so

def _casts(op, dtype):
    "`op` with its floats in `dtype`, as autocast does it"
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    def cast(a): return a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
    def f(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(keys): return op(*map(cast, args), **kwargs)
    return f

def _batch_norm(x, weight, bias, mean, var, *args):
    "What falls back to the CPU leaves running statistics as they were: the operation does not declare that it changes them"
    mean_,var_ = (t if t is None else t.cpu() for t in (mean,var))
    res = torch.ops.aten.native_batch_norm.default(x.cpu(), *(t if t is None else t.cpu() for t in (weight,bias)), mean_, var_, *args)
    for t,new in (mean,mean_),(var,var_):
        if t is not None: t.copy_(new)
    return tuple(t.to(x.device) for t in res)

def register(
    so, # The library
):
    "Do what `torch_tpu._loader` 0.2.0 does where it finds a TPU, as far as a Learner meets it"
    torch.ops.load_library(so)
    torch.utils.rename_privateuse1_backend('tpu')
    m = ModuleType('torch.tpu')
    m.is_available,m.device_count,m.current_device,m._is_in_bad_fork = lambda: True,lambda: 1,lambda: 0,lambda: False
    m.manual_seed_all,m.get_rng_state = lambda seed: None,lambda device='tpu': torch.empty(0)
    m.device = lambda device: nullcontext()
    m.get_amp_supported_dtype = lambda: [torch.bfloat16,torch.float16,torch.float32]
    torch._register_device_module('tpu', m)
    torch.utils.generate_methods_for_privateuse1_backend()
    sys.modules['torch_tpu'] = ModuleType('torch_tpu')
    sys.modules['torch_tpu'].__spec__ = ModuleSpec('torch_tpu', None)
    # Of what torch_tpu's autocast casts, what a small network calls
    anything,aten = Library('_', 'IMPL'),Library('aten', 'IMPL')
    anything.fallback(fallthrough_kernel, 'AutocastPrivateUse1')
    for name,dtype in dict(conv2d=torch.bfloat16, linear=torch.bfloat16, cross_entropy_loss=torch.float32).items():
        aten.impl(name, _casts(getattr(torch.ops.aten, name).default, dtype), 'AutocastPrivateUse1')
    aten.impl('native_batch_norm', _batch_norm, 'PrivateUse1')
    # The one operation of these tests that torch_tpu 0.2.0 has no kernel for
    def missing(*args, **kwargs): raise NotImplementedError('_upsample_bilinear2d_aa on tpu')
    aten.impl('_upsample_bilinear2d_aa', missing, 'PrivateUse1')
    return anything,aten # Alive as long as these are
