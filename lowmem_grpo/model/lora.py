"""LoRA with PEFT's numbers, but for rounding in 16 bits, with less of the host and less saved for the backward.

PEFT casts an adapted layer's input to the adapter's fp32, which autocast casts back: the backward then keeps a copy of
the input for each adapted layer. Here a layer's product and its adapter are one node of the graph. It keeps the very
input, once for all that share it (q, k and v; gate and up), and r numbers a token.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lowmem_grpo.model.product_4bit import dequantized, product_of

# torch's own optimizers call these, and no public name does.
foreach_copy: Any = getattr(torch, "_foreach_copy_")  # noqa: B009
foreach_mul: Any = getattr(torch, "_foreach_mul")  # noqa: B009
foreach_mul_: Any = getattr(torch, "_foreach_mul_")  # noqa: B009


class Worn(NamedTuple):
    """An adapter of one linear layer."""

    a: Tensor  # (r, K) fp32
    b: Tensor  # (N, r) fp32
    scale: float


class _Adapted(torch.autograd.Function):
    """product(x) + scale x A^T B^T of rows x (T, in).

    product(x) is x W^T + bias, and W and bias are frozen. The result (T, out) is no view, which a model could not
    change in place: Gemma 3n multiplies its own.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, a: Tensor, b: Tensor, scale: float, base: Any, product: Any) -> Tensor:
        low = rows @ a.to(rows.dtype).t()  # (T, r)
        ctx.save_for_backward(rows, low, a, b)
        ctx.scale, ctx.base = scale, base
        return product(rows).addmm_(low, b.to(rows.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        grad_low = (grad @ b.to(rows.dtype)).mul_(ctx.scale)  # (T, r)
        grad_a = (grad_low.t() @ rows).to(a.dtype)
        grad_b = (grad.t() @ low).to(b.dtype).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_low @ a.to(rows.dtype)).addmm_(grad, _weight(ctx.base, rows.dtype))
        return grad_x, grad_a, grad_b, None, None, None


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    return dequantized(base, dtype) if type(base) is Linear4bit else base.weight


def keep_one_input(model: nn.Module) -> None:
    """Let the linear layers that wear one plain adapter, or none, go past PEFT."""
    for layer in _linear_lora_layers(model):
        layer.forward = _Forward(layer)


class _Forward:
    """The forward of a linear layer: _Adapted, the bare product where no adapter is worn, or else PEFT's."""

    def __init__(self, layer: Any):
        self.layer, self.base = layer, layer.get_base_layer()
        self.weight = self.product = None  # what the product was made of; a merge makes another weight

    def __call__(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        layer, base = self.layer, self.base
        device = x.device.type
        given = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        ours = not (arguments or keywords or layer.merged) and given.dtype == _computes_in(base)
        if ours and layer.disable_adapters and given is x and not (torch.is_grad_enabled() and x.requires_grad):
            return self._product()(x)
        names = worn_by(layer)
        ours = ours and not layer.disable_adapters and len(names) == 1 and is_plain(layer, names[0])
        if not ours or drops(layer.lora_dropout[names[0]]):
            return type(layer).forward(layer, x, *arguments, **keywords)
        a, b = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
        rows = given.flatten(0, -2)
        out = _Adapted.apply(rows, a, b, layer.scaling[names[0]], base, self._product())
        return out.view(*given.shape[:-1], -1)

    def _product(self) -> Any:
        if "forward" in vars(self.base):  # a copy of its weight to sample from, or accelerate's hook
            return self.base
        if self.weight is not self.base.weight:
            self.weight, self.product = self.base.weight, product_of(self.base)
        return self.product


def _computes_in(base: Any) -> torch.dtype | None:
    """The dtype that a base layer computes in; None where it is another class than those that are known here."""
    if type(base) is Linear4bit:
        return base.compute_dtype
    return base.weight.dtype if type(base) is nn.Linear else None


def drops(dropout: nn.Module) -> bool:
    """Whether a layer's dropout does something now."""
    return dropout.training and not isinstance(dropout, nn.Identity)


def computes_as_its_class(module: nn.Module) -> bool:
    """Whether a module has no forward of its own but that of keep_one_input()."""
    return isinstance(vars(module).get("forward"), _Forward | None)


def plain_lora_layers(model: nn.Module) -> list[Any]:
    """Linear layers that wear plain LoRA, or nothing. DoRA, 8-bit weights and the like are left to PEFT."""
    return [layer for layer in _linear_lora_layers(model) if all(is_plain(layer, name) for name in worn_by(layer))]


def worn_by(layer: Any) -> list[str]:
    """The names of the adapters that a layer computes with; it may lack one that other layers wear."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def adapters_of(linear: Any) -> list[Worn]:
    """The adapters that a linear layer wears; none where it is not PEFT's."""
    if not isinstance(linear, LoraLayer) or linear.disable_adapters:
        return []
    layer: Any = linear
    return [Worn(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in worn_by(layer)]


def matmul_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32; a CPU rounds it to their dtype before."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter of a layer is LoRA's two factors and nothing else."""
    return name not in layer.lora_variant and layer.lora_B[name].bias is None


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of a model, each once, as modules() has them, but in another order and without making up names."""
    waiting, seen = [model], {model}
    while waiting:
        module = waiting.pop()
        yield module
        new = [child for child in vars(module)["_modules"].values() if child is not None and child not in seen]
        seen.update(new)
        waiting += reversed(new)


def _linear_lora_layers(model: nn.Module) -> list[Any]:
    return [
        layer
        for layer in every_module(model)
        if isinstance(layer, LoraLayer) and type(layer.get_base_layer()) in (nn.Linear, Linear4bit)
    ]
