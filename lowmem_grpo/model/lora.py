"""LoRA with PEFT's numbers, but for rounding in 16 bits, and with less saved for the backward.

PEFT casts an adapted layer's input to the adapter's fp32, which autocast casts back: the backward then keeps a copy of
the input for each adapted layer. Here it keeps the very tensor that the base layer got, once for all that share it (q,
k and v; gate and up), and r numbers a token.
"""

from functools import partial
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class _AddAdapter(torch.autograd.Function):
    """out + scale x A^T B^T."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.flatten(0, -2)  # (T, in)
        low = rows @ a.t().to(x.dtype)  # (T, r)
        ctx.save_for_backward(rows, low, a, b)
        ctx.scale = scale
        return torch.addmm(out.flatten(0, -2), low, b.t().to(x.dtype), alpha=scale).view(out.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)  # (T, out)
        grad_low = (flat @ b.to(rows.dtype)).mul_(ctx.scale)  # (T, r)
        grad_x = (grad_low @ a.to(rows.dtype)).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        grad_a = (grad_low.t() @ rows).to(a.dtype) if ctx.needs_input_grad[2] else None
        grad_b = (flat.t() @ low).to(b.dtype).mul_(ctx.scale) if ctx.needs_input_grad[3] else None
        return grad, grad_x, grad_a, grad_b, None


def keep_one_input(model: nn.Module) -> None:
    """Let the linear layers that wear one plain adapter go through _AddAdapter."""
    for layer in _linear_lora_layers(model):
        layer.forward = partial(_forward, layer)


def _forward(layer: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    names = worn_by(layer)
    own = len(names) == 1 and _is_plain(layer, names[0]) and not _drops(layer.lora_dropout[names[0]])
    if not own or arguments or keywords or layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x, *arguments, **keywords)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    out = layer.base_layer(x)
    with torch.autocast(device, enabled=False):
        a, b = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
        return _AddAdapter.apply(out.to(x.dtype), x, a, b, layer.scaling[names[0]])


def _drops(dropout: nn.Module) -> bool:
    return dropout.training and not isinstance(dropout, nn.Identity)


def plain_lora_layers(model: nn.Module) -> list[Any]:
    """Linear layers that wear plain LoRA, or nothing. DoRA, 8-bit weights and the like are left to PEFT."""
    return [layer for layer in _linear_lora_layers(model) if all(_is_plain(layer, name) for name in worn_by(layer))]


def worn_by(layer: Any) -> list[str]:
    """The names of the adapters that a layer computes with; it may lack one that other layers wear."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_plain(layer: Any, name: str) -> bool:
    return name not in layer.lora_variant and layer.lora_B[name].bias is None


def _linear_lora_layers(model: nn.Module) -> list[Any]:
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and type(layer.get_base_layer()) in (nn.Linear, Linear4bit)
    ]
