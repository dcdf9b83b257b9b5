"""The places of a kernel's tests: the kernel and its twin in PyTorch, each on a CPU and on a GPU, as (backend, device).

On a CPU a kernel runs in Triton's interpreter.
"""

import pytest
import torch

from lowmem_grpo.kernels.backend import triton

CUDA = torch.cuda.is_available()
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs CUDA"))
twin = pytest.param(("torch", "cpu"), id="twin")
interpreted = pytest.param(
    ("triton", "cpu"),
    id="interpreter",
    marks=pytest.mark.skipif(CUDA or triton is None, reason="the kernel runs on the GPU, or not at all"),
)
gpu = pytest.param(("triton", "cuda"), id="gpu", marks=on_gpu)
PLACES = [twin, interpreted, pytest.param(("torch", "cuda"), id="twin-gpu", marks=on_gpu), gpu]
every_place = pytest.mark.parametrize("place", PLACES)
the_kernel = pytest.mark.parametrize("place", [interpreted, gpu])
