"""The step of the gated delta rule, in the place of the one that a layer's own code would take.

transformers' layers look their step up among the names of the file that they stand in. While a slot's token is
computed, that name stands for `kernels/delta_step.py`, which reads a layer's states once and writes them where they
stand. Where fla is installed, transformers takes fla's step, and so it stays.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_grpo.kernels.delta_step import delta_step

STEP = "torch_recurrent_gated_delta_rule"  # in every modeling file of transformers that has the rule


@contextmanager
def steps_in_place(mixer: nn.Module, commit: Tensor | None) -> Iterator[bool]:
    """While in force, a layer of the gated delta rule writes states where they stand; True for such a layer.

    commit () bool is read on the device: False leaves the states as they are. Any other layer, and a step whose states
    are not fp32 or not contiguous, is computed by the layer's own code.
    """
    names = inspect.unwrap(type(mixer).forward).__globals__
    own = names.get(STEP)
    if own is None or not _is_gated_delta_rule(own):
        yield False
        return
    names[STEP] = partial(_step, own, commit)
    try:
        yield True
    finally:
        names[STEP] = own


def _step(
    own: Callable[..., Any],
    commit: Tensor | None,
    query: Tensor,  # (S, T, H_k, K)
    key: Tensor,  # (S, T, H_k, K)
    value: Tensor,  # (S, T, H_v, V)
    g: Tensor,  # (S, T, H_v)
    beta: Tensor,  # (S, T, H_v)
    initial_state: Tensor | None = None,  # (S, H_v, K, V)
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[Tensor, Any]:
    """(out (S, T, H_v, V), the states after it), as transformers' step returns them; by ours where that serves."""
    state = initial_state
    if query.shape[1] != 1 or state is None or state.dtype != torch.float32 or not state[:1].is_contiguous():
        return own(
            query, key, value, g=g, beta=beta, initial_state=state, output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **others,
        )  # fmt: skip
    out = delta_step(
        query[:, 0], key[:, 0], value[:, 0], g[:, 0], beta[:, 0], state, normalize=use_qk_l2norm_in_kernel,
        commit=commit,
    )  # fmt: skip
    return out[:, None], state if output_final_state else None


@lru_cache
def _is_gated_delta_rule(own: Callable[..., Any]) -> bool:
    """Whether a step takes what transformers' takes and makes of a few numbers what ours does; False with fla."""
    if find_spec("fla") is not None:
        return False
    own = inspect.unwrap(own)  # else transformers would say that fla is missing
    shared, apart = (_as_ours(own, key_heads) for key_heads in (2, 4))
    return apart is True and shared is not False


def _as_ours(own: Callable[..., Any], key_heads: int) -> bool | None:
    """Whether a step makes of key heads and 4 value heads what ours does; None where it raises.

    Before transformers 5.21 layers hand their step as many key heads as value heads.
    """
    given = dict(
        query=_numbers(2, 1, key_heads, 3), key=1 - _numbers(2, 1, key_heads, 3), value=_numbers(2, 1, 4, 5),
        g=-_numbers(2, 1, 4).abs(), beta=_numbers(2, 1, 4).abs(),
    )  # fmt: skip
    state = _numbers(2, 4, 3, 5)
    for normalize in (True, False):
        settings: dict = dict(output_final_state=True, use_qk_l2norm_in_kernel=normalize)
        try:
            theirs = own(**given, initial_state=state.clone(), **settings)
        except (TypeError, ValueError, RuntimeError):
            return None
        ours = _step(own, None, **given, initial_state=state.clone(), **settings)
        if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(ours, theirs, strict=True)):
            return False
    return True


def _numbers(*shape: int) -> Tensor:
    """fp32 numbers of both signs in CPU memory, without PyTorch's generator, which is a run's."""
    return torch.arange(torch.Size(shape).numel(), device="cpu", dtype=torch.float32).sin().view(shape)
