"""A head in int8, each row with a scale, in half of its memory.

It is the head from then on: policy, reference and sampler share it, so that no ratio of theirs is touched by the
rounding. A head that is the embedding too stays as it is, since its rows are what the model reads.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowmem_grpo.errors import InputError
from lowmem_grpo.kernels.int8_product import product_int8
from lowmem_grpo.kernels.linear_logprobs import quantize_head


class Head8bit(nn.Module):
    """A linear layer (V, D) without a gradient: rows in int8, each times its scale, rounded to a dtype."""

    rows: Tensor  # (V, D) int8
    scale: Tensor  # (V,) fp32
    weight: Tensor  # (0, D) of the dtype, which such as Mamba ask a head's weight for

    def __init__(self, linear: nn.Linear, device: torch.device, dtype: torch.dtype):
        super().__init__()
        rows, scale = quantize_head(linear.weight, device)
        self.register_buffer("rows", rows)
        self.register_buffer("scale", scale)
        self.register_buffer("weight", scale.new_empty(0, rows.shape[1], dtype=dtype))
        self.bias = linear.bias
        if linear.bias is not None:
            linear.bias.data = linear.bias.data.to(device)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D), in the head's dtype."""
        dtype = self.weight.dtype
        logits = product_int8(x.to(dtype).flatten(0, -2), self.rows, self.scale).to(dtype)
        return (logits if self.bias is None else logits + self.bias).view(*x.shape[:-1], -1)


def settle_head(model: Any, device: torch.device, dtype: torch.dtype, *, in_8bit: bool) -> None:
    """Put a Head8bit on the device in place of a model's head, where that is asked.

    A few thousand of its rows are there at a time. A Head8bit stays, and computes in the dtype from now on.
    """
    head = model.get_output_embeddings()
    if isinstance(head, Head8bit):
        head.weight = head.weight.to(dtype)
    elif in_8bit:
        refuse_8bit(model)
        parent, _, name = head_path(model).rpartition(".")
        setattr(model.get_submodule(parent), name, Head8bit(head, device, dtype))


def head_path(model: Any) -> str:
    """The name of a model's head among its modules."""
    return next(path for path, module in model.named_modules() if module is model.get_output_embeddings())


def has_untied_head(model: Any) -> bool:
    """Whether a model's head is a linear layer, and none of its embeddings too."""
    head: Any = model.get_output_embeddings()
    tables = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    return type(head) is nn.Linear and not any(are_one(weight, head.weight) for weight in tables)


def refuse_8bit(model: Any) -> None:
    """Raise InputError where a model's head cannot be put in int8."""
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, Head8bit):
        raise InputError(f"load_head_in_8bit does not know {type(head).__name__}; leave load_head_in_8bit out")
    if type(head) is nn.Linear and not has_untied_head(model):
        raise InputError(
            "load_head_in_8bit: the head of this model is its embedding too, which stays in 16 bits; leave "
            "load_head_in_8bit out"
        )


def are_one(weight: Tensor, other: Tensor | None) -> bool:
    """Whether two weights lie in the same memory."""
    return other is not None and (weight is other or (not weight.is_meta and weight.data_ptr() == other.data_ptr()))
