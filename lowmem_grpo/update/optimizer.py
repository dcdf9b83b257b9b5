"""The optimizer of a run, by Hugging Face's names: its schedule, its loss scale, and its step."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import ceil
from typing import Any, TypeVar

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import get_scheduler

from lowmem_grpo.config.sections import OptimizerFields
from lowmem_grpo.distributed import sum_over_ranks
from lowmem_grpo.out_of_memory import tried_again
from lowmem_grpo.output.saved import number, whole

T = TypeVar("T")
BITSANDBYTES = {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit, "paged_adamw_32bit": PagedAdamW}


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerFields) -> torch.optim.Optimizer:
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
    """Bytes of the optimizer's state on the device, from the first step on, for parameters of these sizes.

    In 8 bits bitsandbytes has two numbers of a byte each, and two scales for each 256; it keeps the state of parameters
    below 4,096 numbers in 32 bits.
    """
    if optim.startswith("paged"):
        return 0
    if optim == "adamw_8bit":
        return sum(2 * n + 8 * ceil(n / 256) if n >= 4096 else 8 * n for n in sizes)
    return sum(8 * n for n in sizes)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, out_of_memory: Callable[[], None]) -> Tensor:
    """Scale the gradients to a norm of max_norm at most, and return the norm before.

    Out of memory before they are scaled, out_of_memory() is told, and the norm is computed anew. Where the norm is not
    finite, neither are they afterwards: no step may be taken with them.
    """
    parameters = list(parameters)
    norm = total_norm([p.grad for p in parameters if p.grad is not None], out_of_memory)
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def total_norm(tensors: Sequence[Tensor], out_of_memory: Callable[[], None]) -> Tensor:
    """The norm of all numbers, a scalar: not finite where one is not, or is above 1e19 (squared, 1e38).

    Out of memory, out_of_memory() is told, and the norm is computed anew.
    """
    return _tried(2, partial(get_total_norm, tensors), out_of_memory)


def loss_scale_overflows(scaler: torch.amp.GradScaler, loss: float) -> bool:
    """True where fp16's loss scale may be all that made a gradient not finite: it is above 1, the loss finite.

    The scale starts at 65,536 and is halved each time, so that 16 steps in a row may be skipped before it fits.
    """
    return math.isfinite(loss) and scaler.get_scale() > 1


def step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, out_of_memory: Callable[[], None]) -> None:
    """Take one optimizer step, and begin anew after an out-of-memory where no weight has changed yet.

    A fused optimizer's first step makes all of the state and then changes weights, without any more memory; there
    out_of_memory() is told and the step begun anew. Other steps are partly through, and their error ends the run, with
    a note that has the remedy.
    """
    if optimizer.state or not optimizer.defaults.get("fused"):
        _tried(1, partial(scaler.step, optimizer), out_of_memory)
        return

    def first() -> None:
        optimizer.state.clear()  # half of it, where this is not the first attempt; no weight has changed yet
        scaler.step(optimizer)

    _tried(2, first, out_of_memory)


def _tried(attempts: int, work: Callable[[], T], out_of_memory: Callable[[], None]) -> T:
    """The result of work() in so many attempts; of a failed one, out_of_memory() is told."""
    failures = 0

    def failed(error: torch.OutOfMemoryError) -> None:
        nonlocal failures
        failures += 1
        if failures == attempts:
            error.add_note(
                "The optimizer's step does not fit. Set optim='adamw_8bit', or lower lora_r or token_budget."
            )
            raise error
        out_of_memory()

    return tried_again(work, failed)


class Learner:
    """Parameters that learn: their optimizer, the schedule of its learning rate, and fp16's loss scale.

    A part of a checkpoint: state() and load().
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: OptimizerFields, scaler: torch.amp.GradScaler,
        total_steps: int, *, keep_gradients: bool = True,
    ):  # fmt: skip
        """Make optimizer and schedule; without keep_gradients, their memory is let go after each step."""
        self.parameters = list(parameters)
        self.max_grad_norm, self.optim, self.scaler = config.max_grad_norm, config.optim, scaler
        self.keep_gradients, self.has_moved = keep_gradients, False
        # How many optimizer steps in a row, up to now, changed no weight, and the cause of the last of those.
        self.nonfinite_steps, self.cause = 0, ""
        self.optimizer = make_optimizer(self.parameters, config)
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, self.optimizer, num_warmup_steps=config.warmup_steps,
            num_training_steps=total_steps,
        )  # fmt: skip

    @property
    def learning_rate(self) -> float:
        """The rate of the next optimizer step."""
        return float(self.scheduler.get_last_lr()[0])

    def bytes_to_come(self) -> int:
        """Bytes that the optimizer's state will take on the device; 0 once it is there."""
        return 0 if self.optimizer.state else state_bytes(self.optim, (p.numel() for p in self.parameters))

    def sum_over_ranks(self, *others: Tensor) -> None:
        """Replace gradients, and other tensors, by their sums over all ranks, in one call."""
        sum_over_ranks([*(p.grad for p in self.parameters if p.grad is not None), *others])

    def clip(self, out_of_memory: Callable[[], None]) -> Tensor:
        """Undo the loss scale, clip the gradients, and return the norm before, a scalar."""
        self.scaler.unscale_(self.optimizer)
        return clip_gradients(self.parameters, self.max_grad_norm, out_of_memory)

    def step(self, out_of_memory: Callable[[], None]) -> None:
        """Take one optimizer step of the gradients as they are."""
        step(self.optimizer, self.scaler, out_of_memory)
        self.has_moved = True

    def advance(self) -> None:
        """Go on in the schedule, where a step was taken since the last time."""
        if self.has_moved:
            self.scheduler.step()
        self.has_moved = False

    def release(self) -> None:
        """Let the gradients go, whether or not a step was taken, and update the loss scale."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)

    def weights_norm(self, out_of_memory: Callable[[], None]) -> Tensor:
        """The norm of all parameters, a scalar."""
        return total_norm([parameter.detach() for parameter in self.parameters], out_of_memory)

    def state(self) -> dict[str, Any]:
        """The optimizer's tensors as `{parameter}.{entry}`, and what else a resumed run goes on with.

        Settings and schedule are made anew from the config, and only the place in the schedule is kept.
        """
        entries = _flattened(self.optimizer.state_dict()["state"])
        # A copy each: bitsandbytes shares one table among all parameters, and a file has room for each tensor alone.
        tensors = {path: value.clone() for path, value in entries.items() if isinstance(value, Tensor)}
        return {
            **tensors, "numbers": {path: value for path, value in entries.items() if path not in tensors},
            "schedule_position": self.scheduler.last_epoch, "scaler": self.scaler.state_dict(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what state() returned. The rate is this run's schedule's, even if that is longer."""
        tensors = {path: value for path, value in state.items() if isinstance(value, Tensor)}
        numbers = {path: whole(value, path) for path, value in state["numbers"].items()}
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": _nested({**tensors, **numbers}), "param_groups": settings})
        optimizer: Any = self.optimizer
        if getattr(optimizer, "is_paged", False):  # bitsandbytes has loaded it into the GPU
            for parameter, entry in optimizer.state.items():
                for name in ("state1", "state2"):
                    entry[name] = optimizer.get_state_buffer(parameter, dtype=entry[name].dtype).copy_(entry[name])
        # To one step before the saved position, and one step on.
        position = whole(state["schedule_position"], "schedule_position")
        before: Any = {**self.scheduler.state_dict(), "last_epoch": position - 1, "_step_count": 2}
        self.scheduler.load_state_dict(before)
        self.scheduler.step()  # at a count of 1 it would warn that no optimizer step came before it
        self.scheduler._step_count = position + 1
        if self.scaler.is_enabled():
            scale, growth = state["scaler"]["scale"], state["scaler"]["_growth_tracker"]
            read = {"scale": number(scale, "scale"), "_growth_tracker": whole(growth, "_growth_tracker")}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **read})


def _flattened(entries: dict, path: str = "") -> dict[str, Any]:
    """{"0.exp_avg": ...} of {0: {"exp_avg": ...}}, however deep: bitsandbytes has entries of entries."""
    found: dict[str, Any] = {}
    for key, value in entries.items():
        found |= _flattened(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def _nested(entries: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """{0: {"exp_avg": ...}} of {"0.exp_avg": ...}: the inverse of _flattened."""
    state: dict[Any, Any] = {}
    for path, value in entries.items():
        parameter, *within, last = path.split(".")
        entry = state.setdefault(int(parameter), {})
        for key in within:
            entry = entry.setdefault(key, {})
        entry[last] = value
    return state
