"""The adapted linear layers while sampling: the same numbers as PEFT's, in fewer calls."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_grpo.lora import plain_lora_layers


@contextlib.contextmanager
def fast_linears(model: nn.Module, dtype: torch.dtype, *, dense: bool) -> Iterator[None]:
    """Each adapter in two products, the second added onto the base layer's output: 2 calls where PEFT makes 7.

    With dense, each layer is one matrix in the compute dtype instead, dequantized and merged with its adapters in fp32:
    dense_bytes more memory, and in 16 bits the merged weights are rounded where the adapters were not, which the logged
    sampling/sampling_logp_difference shows.
    """
    replace = _merged if dense else _fused
    layers = [layer for layer in plain_lora_layers(model) if not layer.disable_adapters and not layer.merged]
    forwards = [replace(layer, dtype) for layer in layers]
    before = [vars(layer).get("forward") for layer in layers]  # training's, or accelerate's
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def dense_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What fast_linears allocates where dense."""
    return sum(layer.in_features * layer.out_features * dtype.itemsize for layer in plain_lora_layers(model))


def _factors(layer: Any) -> list[tuple[Tensor, Tensor]]:
    """(A (r, in), scale B (out, r)) of each active adapter, fp32."""
    return [
        (layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name])
        for name in layer.active_adapters
        if name in layer.lora_A
    ]


def _fused(layer: Any, dtype: torch.dtype) -> Callable:
    base = layer.get_base_layer()
    factors = [(a.t().to(dtype), b.t().to(dtype)) for a, b in _factors(layer)]

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        out = base(x)
        rows, flat = x.flatten(0, -2).to(dtype), out.flatten(0, -2)
        for a, b in factors:
            flat = torch.addmm(flat, rows @ a, b)
        return flat.view(out.shape)

    return forward


def _merged(layer: Any, dtype: torch.dtype) -> Callable:
    base = layer.get_base_layer()
    weight = base.weight
    if isinstance(base, Linear4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    weight = weight.float()
    with torch.autocast(weight.device.type, enabled=False):  # which would do it in 16 bits
        for a, b in _factors(layer):
            weight = weight.addmm(b, a)
    weight, bias = weight.to(dtype), None if base.bias is None else base.bias.to(dtype)

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return F.linear(x.to(dtype), weight, bias)

    return forward
