"""The optimizer of a run, by Hugging Face's names, and its step with what comes before it."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.out_of_memory import again, or_remedy

BITSANDBYTES = {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit, "paged_adamw_32bit": PagedAdamW}


def make_optimizer(parameters: Iterable[nn.Parameter], config: GRPOConfig) -> torch.optim.Optimizer:
    """AdamW. A paged state lies in memory that CUDA moves to the CPU and back; on a CPU a run refuses it."""
    settings: dict[str, Any] = dict(
        lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    if config.optim in BITSANDBYTES:
        return BITSANDBYTES[config.optim](list(parameters), **settings)
    # Fused, a step needs no memory besides the state.
    return torch.optim.AdamW(list(parameters), **settings, fused=config.optim == "adamw_torch_fused")


def state_bytes(optim: str, sizes: Iterable[int]) -> int:
    """Of parameters of so many numbers, on the device, from the first step on.

    In 8 bits bitsandbytes has two numbers of a byte each, and two scales for each 256; it keeps the state of parameters
    below 4,096 numbers in 32 bits.
    """
    if optim.startswith("paged"):
        return 0
    if optim == "adamw_8bit":
        return sum(2 * n + 8 * ceil(n / 256) if n >= 4096 else 8 * n for n in sizes)
    return sum(8 * n for n in sizes)


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """optimizer.load_state_dict, after which a paged state is paged again: bitsandbytes loads it into the GPU."""
    optimizer.load_state_dict(state)
    if getattr(optimizer, "is_paged", False):
        for parameter, entry in optimizer.state.items():
            for name in ("state1", "state2"):
                entry[name] = optimizer.get_state_buffer(parameter, dtype=entry[name].dtype).copy_(entry[name])


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, out_of_memory: Callable[[], None] = lambda: None
) -> Tensor:
    """Scale the gradients to a norm of max_norm at most, and return what it was.

    Out of memory before they are scaled, out_of_memory() is told, and the norm is computed anew. Where the norm is not
    finite, neither are they afterwards: no step may be taken with them.
    """
    parameters = list(parameters)
    norm = total_norm([p.grad for p in parameters if p.grad is not None], out_of_memory)
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def total_norm(tensors: Sequence[Tensor], out_of_memory: Callable[[], None] = lambda: None) -> Tensor:
    """The norm of all their numbers, a scalar: not finite where one of them is not, or is above 1e19 (squared, 1e38).

    Out of memory, out_of_memory() is told, and it is computed anew.
    """
    return again(partial(get_total_norm, tensors), out_of_memory)


def loss_scale_overflows(scaler: torch.amp.GradScaler, loss: float) -> bool:
    """Whether fp16's loss scale may be all that made a gradient not finite: it is above 1, and the loss is finite.

    The scale starts at 65,536 and is halved each time, so that 16 steps in a row may be skipped before it fits.
    """
    return math.isfinite(loss) and scaler.get_scale() > 1


def step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, out_of_memory: Callable[[], None] = lambda: None
) -> None:
    """One step. A fused one's first makes all of the state and then changes weights, without any more memory.

    So out of memory in there, out_of_memory() is told, and it is begun anew; others are partly through, and their error
    ends the run, with a note that has the remedy.
    """
    if optimizer.state or not optimizer.defaults.get("fused"):
        or_remedy(partial(scaler.step, optimizer))
        return

    def first() -> None:
        optimizer.state.clear()  # half of it, where this is not the first attempt; no weight has changed yet
        scaler.step(optimizer)

    again(first, out_of_memory)
