"""Gradient checkpointing of a layer as one node of the graph: it keeps its input, and its backward computes again.

torch's own, without use_reentrant, hooks every tensor that is saved inside and checks each against the first forward:
half of an update's time on the host. What a node of our own cannot carry is left to it.

The gradients of a layer's parameters are added to their `.grad` as the layer is computed again: loss.backward() has
them, torch.autograd.grad and backward(inputs=...) do not reach them.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

Contexts = Callable[[], contextlib.AbstractContextManager]
_ASKS_FOR_A_GRADIENT = torch.empty(0, requires_grad=True)  # in place of an input that has none, as the first layer's


def checkpoint_layers(model: Any, again: Contexts) -> None:
    """Compute a model's layers again in the backward, each inside a context that again() makes in its forward."""
    torchs = by_torch(again)
    # transformers renamed it; the old name warns where there is a new one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(torchs.keywords)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            vars(layer)["_gradient_checkpointing_func"] = _OneNode(layer, torchs, again)


def by_torch(again: Contexts) -> partial:
    """torch's own checkpointing of a function, computed again inside a context that again() makes in its forward."""
    return partial(checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again()))


class _OneNode:
    """A layer's checkpointing: torch's from then on where a layer gives more than one tensor."""

    def __init__(self, layer: Any, torchs: Callable, again: Contexts):
        self.layer, self.torchs, self.again, self.gives_a_tensor = layer, torchs, again, True

    def __call__(self, run: partial, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*inputs)
        if getattr(vars(self.layer).get("forward"), "serves", False):  # it is a node that keeps its input alone
            return run(*inputs)
        plain = len(inputs) == 1 and isinstance(inputs[0], Tensor) and not _has_gradient(run.keywords)
        if plain and self.gives_a_tensor:
            (hidden,) = inputs
            if not hidden.requires_grad and not any(p.requires_grad for p in self.layer.parameters()):
                return run(hidden)
            out = _Layer.apply(hidden, None if hidden.requires_grad else _ASKS_FOR_A_GRADIENT, run, self.again())
            if isinstance(out, Tensor):
                return out
            self.gives_a_tensor = False
        return self.torchs(run, *inputs)


def _has_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return any(map(_has_gradient, inner))


class _Layer(torch.autograd.Function):
    """run(hidden), whose backward runs it again; None where that is not one tensor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, asks: Tensor | None, run: Callable, context: Any) -> Tensor | None:
        device = hidden.device.type
        ctx.run, ctx.context = run, context
        ctx.autocast = dict(
            device_type=device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )  # fmt: skip
        ctx.random = torch.get_rng_state(), torch.cuda.get_rng_state(hidden.device) if device == "cuda" else None
        ctx.save_for_backward(hidden)
        out = run(hidden)
        return out if isinstance(out, Tensor) else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("a checkpointed layer has no second gradient; set gradient_checkpointing=False")
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
        on_cpu, on_gpu = ctx.random
        with (
            torch.random.fork_rng([] if on_gpu is None else [hidden.device]),
            torch.enable_grad(),
            torch.autocast(**ctx.autocast),
            ctx.context,
        ):
            torch.set_rng_state(on_cpu)
            if on_gpu is not None:
                torch.cuda.set_rng_state(on_gpu, hidden.device)
            out = ctx.run(hidden)
        if out.requires_grad:
            edge = get_gradient_edge(out)
            del out  # (B, T, D), which nothing asks for
            torch.autograd.backward(edge, grad)
        return hidden.grad, None, None, None
