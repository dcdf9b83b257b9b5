"""Chains of kernels of which each is launched while the one before it runs, by programmatic dependent launch.

A step of few rows is hundreds of kernels, and each waits for its launch and for its first numbers from memory. In a
chain a kernel, in this order,

    lets the next one be launched, as soon as all of its own programs have begun                        launch_next
    asks for what no kernel of a step writes, its weights, adapters and gains, in the L2 cache          prefetch
    waits until the kernel before it is complete, and sees what that wrote                              wait_for_last
    loads and stores

so that it computes the same to the last bit: before the wait nothing is loaded or stored, and a prefetch gives no value
that could be an old one. All programs of all kernels wait, so that where one kernel is complete all before it are, and
memory that they read may be written over. A kernel that is launched in the ordinary way, as torch's, cuBLAS' and
bitsandbytes', begins when all before it are complete, and one of a chain waits for it as for any other. CUDA graphs
keep such launches when they are captured.

https://docs.nvidia.com/cuda/cuda-programming-guide/04-special-topics/programmatic-dependent-launch.html
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS
    triton: Any = None

OLDEST = 90  # compute capability that has it
_on = False

if triton is not None:
    MOST: Any = tl.constexpr(2**23)  # bytes of a tensor: several kernels' are in an H200's 50 MiB of L2 at once
    _ONE_THREAD: Any = tl.constexpr(
        "{ .reg .pred p; .reg .b32 t; .reg .b64 a; mov.u32 t, %tid.x; setp.eq.s32 p, t, 0; setp.gt.and.s32 p, $2, 0, p;"
        " and.b64 a, $1, -16; @p cp.async.bulk.prefetch.L2.global [a], $2; mov.b32 $0, 0; }"
    )

    @triton.jit
    def launch_next():
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def prefetch(pointer, COUNT: tl.constexpr, part, PARTS: tl.constexpr):
        """Ask for one of PARTS parts of a tensor's first COUNT numbers; for nothing where part is beyond them."""
        WIDTH: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
        BYTES: tl.constexpr = min((COUNT * WIDTH + 15) // 16 * 16, MOST)
        SHARE: tl.constexpr = (BYTES + 128 * PARTS - 1) // (128 * PARTS) * 128
        begin = part * SHARE
        tl.inline_asm_elementwise(
            _ONE_THREAD, "=r,l,r", [pointer.to(tl.int64) + begin, tl.minimum(SHARE, BYTES - begin)], tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip

    @triton.jit
    def wait_for_last():
        tl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)


def launched() -> dict[str, Any]:
    """Arguments for the launch of a kernel that may be one of a chain."""
    return {"OVERLAP": True, "launch_pdl": True} if _on else {"OVERLAP": False}


@contextlib.contextmanager
def overlapping(on: bool) -> Iterator[None]:
    """Launch kernels as a chain inside the `with`, if `on`, which takes a device of OLDEST or newer."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def can_overlap(device: torch.device) -> bool:
    """Whether a device has programmatic dependent launch."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (OLDEST // 10, 0)


def pays(device: torch.device) -> bool:
    """Whether bench_overlap found steps on a device's card to be faster as chains, and the same to the last bit."""
    return can_overlap(device) and measured().get(torch.cuda.get_device_name(device)) is True


def measured() -> dict[str, bool]:
    """Choices that bench_overlap kept, by card; none where its file cannot be read."""
    path = table_path()
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(f"{path} is not read, and no kernels overlap: {error}", stacklevel=2)
        return {}


def table_path() -> Path:
    """The file of what was measured, JSON by card."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem_grpo" / "overlap.json"
