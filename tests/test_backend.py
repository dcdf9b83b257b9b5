"""Where a call runs by its kernel, where by its twin, and what is said where it cannot."""

import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_grpo.kernels import backend as module
from lowmem_grpo.kernels.backend import runs_by_triton

ROOT = Path(__file__).parents[1]
WITHOUT_TRITON = """
import importlib, sys
sys.modules["triton"] = None
import torch
kernels = {name: importlib.import_module(f"lowmem_grpo.kernels.{name}") for name in sys.argv[1:]}
hidden = torch.ones(2, 4, requires_grad=True)
logprobs = kernels["linear_logprobs"].linear_logprobs(hidden, torch.zeros(8, 4), torch.tensor([0, 7]))
settings = dict(epsilon_low=0.2, epsilon_high=0.2, delta=None, beta=0.0, use_bias_correction_kl=False)
loss, _ = kernels["policy_loss"].policy_loss(logprobs, None, None, torch.ones(2), torch.ones(2), **settings)
loss.backward()
print(logprobs.exp(), hidden.grad.shape)
"""


def test_without_triton_every_file_of_kernels_is_imported_and_the_twins_run():
    names = [path.stem for path in (ROOT / "kernels").glob("*.py")]
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("tensor([0.1250, 0.1250]") and ran.stdout.endswith("torch.Size([2, 4])\n")


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="must be 'auto', 'triton' or 'torch', not 'cuda'"):
        runs_by_triton("cuda", "cpu")
    if module.triton is not None:
        monkeypatch.setattr(module.triton.knobs.runtime, "interpret", False)
        with pytest.raises(RuntimeError, match="on cpu runs only in Triton's interpreter: set TRITON_INTERPRET=1"):
            runs_by_triton("triton", "cpu")
        assert runs_by_triton("triton", "cuda")
    monkeypatch.setattr(module, "triton", None)
    with pytest.raises(RuntimeError, match="needs Triton installed; backend='torch' does without"):
        runs_by_triton("triton", "cuda")
    assert not runs_by_triton("auto", "cuda")


@pytest.mark.skipif(module.triton is None, reason="needs Triton")
@pytest.mark.parametrize(("value", "taken"), [(None, True), ("1", True), ("0", False)])
def test_a_gpu_takes_triton_unless_the_environment_forbids_it(value, taken, monkeypatch):
    monkeypatch.delenv("LOWMEM_GRPO_TRITON", raising=False)
    if value is not None:
        monkeypatch.setenv("LOWMEM_GRPO_TRITON", value)
    assert runs_by_triton("auto", "cuda") == taken
    assert not runs_by_triton("auto", "cpu") and not runs_by_triton("torch", "cuda")
