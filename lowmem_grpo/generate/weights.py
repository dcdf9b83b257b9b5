"""The linear layers while sampling: training's numbers, rounded as training rounds them, in fewer calls.

Beside a fast step they share its factors, which have the adapter's scale in them (step.py).
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_grpo.model.lora import every_module, plain_lora_layers, worn_by
from lowmem_grpo.model.product_4bit import dequantized, product_of

Copy = Callable[[Hashable, Tensor, torch.dtype], Tensor]  # values under a name, in a dtype


def _in_dtype(name: Hashable, values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype)


@contextlib.contextmanager
def fast_linears(
    model: nn.Module, dtype: torch.dtype, *, dense: bool, matrices: Mapping[Any, Tensor] | None = None,
    factors: Mapping[Any, tuple[Tensor, Tensor]] | None = None, copy: Copy = _in_dtype,
) -> Iterator[None]:  # fmt: skip
    """Compute each adapter in two products on top of the base layer: 2 calls where PEFT makes 7.

    copy is what makes the adapters' factors in the compute dtype, each under a name of its own.

    With dense, every 4-bit layer is dequantized once for the while, which takes dense_bytes. Adapters stay apart from
    that copy: after 20 steps of SmolLM2-135M the rounding of a merged one, in bf16, was 0.83 of what they add.
    matrices (N, K) and factors (K, R) and (R, N), by layer, take the place of copies that somebody holds already.
    """
    held, shared = matrices or {}, factors or {}
    forwards: dict[Any, Callable] = {}
    if dense:
        forwards = {layer: _dense(layer, held.get(layer), dtype) for layer in _in_4bit(model)}
    for layer in plain_lora_layers(model):
        if not layer.disable_adapters and not layer.merged:
            base = layer.get_base_layer()
            its = [(*shared[layer], 1.0)] if layer in shared else _factors(layer, dtype, copy)
            forwards[layer] = _adapted(forwards.get(base) or product_of(base), dtype, its)
    before = {layer: vars(layer).get("forward") for layer in forwards}  # training's, or accelerate's
    try:
        for layer, forward in forwards.items():  # past nn.Module.__setattr__, which looks among parameters and modules
            vars(layer)["forward"] = forward
        yield
    finally:
        for layer, forward in before.items():
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward


def dense_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that fast_linears allocates where dense; 0 without 4-bit layers."""
    return sum(layer.in_features * layer.out_features * dtype.itemsize for layer in _in_4bit(model))


def _in_4bit(model: nn.Module) -> list[Any]:
    return [layer for layer in every_module(model) if type(layer) is Linear4bit]


def _dense(layer: Any, weight: Tensor | None, dtype: torch.dtype) -> Callable:
    weight = dequantized(layer, dtype) if weight is None else weight
    bias = None if layer.bias is None else layer.bias.to(dtype)

    def forward(x: Tensor) -> Tensor:
        return F.linear(x.to(dtype), weight, bias).to(x.dtype)

    return forward


def _factors(layer: Any, dtype: torch.dtype, copy: Copy) -> list[tuple[Tensor, Tensor, float]]:
    """Factors (K, r) and (r, N) and scale of each adapter that a layer wears."""
    return [
        (
            copy((layer, name, "A"), layer.lora_A[name].weight.t(), dtype),
            copy((layer, name, "B"), layer.lora_B[name].weight.t(), dtype),
            layer.scaling[name],
        )
        for name in worn_by(layer)
    ]


def _adapted(base: Callable, dtype: torch.dtype, factors: list[tuple[Tensor, Tensor, float]]) -> Callable:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        rows = x.flatten(0, -2).to(dtype)
        out = base(rows).to(dtype)
        for a, b, scale in factors:
            out.addmm_(rows @ a, b, alpha=scale)  # as lora.py: a scale that is folded into B rounds it once more
        return out.view(*x.shape[:-1], -1)

    return forward
