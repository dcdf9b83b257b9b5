"""Layers that keep a state (Gated DeltaNet, Mamba 2, short convolutions), called by the layout in force.

Such a layer reads and writes its states through a cache, by one protocol for all families (`update_conv_state`,
`update_recurrent_state` in transformers/cache_utils.py). Here that cache is a `Call`: states go in and come out, and a
gradient flows through. So one text can begin with the states of another.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_grpo.model.attention import layout_in_force

# States of a mixer, by kind and number: ("conv", 0) is (B, channels, kernel), ("recurrent", 0) may be (B, heads, K, V).
States = dict[tuple[str, int], Tensor]
CACHES = ("cache", "cache_params", "past_key_values")  # transformers' names of a cache: the first, from 5.24 on
Forward = Callable[[Tensor, "Call", Tensor | None], Tensor]  # a mixer's own, of rows, states and mask: see one_call


class Call:
    """The cache of one call of one mixer: the states before it and, in `after`, those after it.

    Where there are none before, texts begin. `writable` hands out copies of recurrent states: Mamba 2 writes into the
    one that it gets where the call is of one token.
    """

    def __init__(self, before: Mapping[tuple[str, int], Tensor] | None = None, *, writable: bool = False):
        self.before, self.writable = before or {}, writable
        self.after: States = {}
        self.mask: Tensor | None = None  # (B, T) bool, False for padding on the left
        self.tells_inputs = False  # whether the mixer puts the inputs so far in front by itself

    @property
    def layers(self) -> "_At":
        """States where transformers before 5.21 looks for them: layers[layer_idx].conv_states[state_idx]."""
        return _At(
            lambda layer_idx: SimpleNamespace(
                record_past=True,  # so a convolution of one token goes by update_conv_state
                conv_states=_At(lambda _: None),
                recurrent_states=_At(partial(self.get_recurrent_state, layer_idx)),
            )
        )

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """None, so that a convolution goes by `update_conv_state`, that of one token too, wherever it can.

        A mixer that is told its inputs so far writes into them where the call is of one token (Kimi Linear).
        """
        return self.before.get(("conv", state_idx)) if self.tells_inputs else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        state = self.before.get(("recurrent", state_idx))
        if state is None:
            return None
        self.after["recurrent", state_idx] = state.clone() if self.writable else state  # until it is updated
        return self.after["recurrent", state_idx]

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Inputs of the convolution (B, channels, T), with the last ones of the text before in front of them."""
        kernel = conv_kernel_size or conv_states.shape[-1]
        if self.mask is not None:  # the input of a projection is masked, and its bias makes something of that
            late = F.pad(self.mask, (conv_states.shape[-1] - self.mask.shape[-1], 0))  # of the last inputs alone (ZAYA)
            conv_states = conv_states * late[:, None]
        before = self.before.get(("conv", state_idx))
        if before is None:
            whole = F.pad(conv_states, (max(0, kernel - conv_states.shape[-1]), 0))
        else:
            whole = torch.cat([before.to(conv_states.dtype), conv_states], -1)
        self.after["conv", state_idx] = whole[..., -kernel:]
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self.after["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.before)


class _At:
    """A function of a number that is asked by brackets."""

    def __init__(self, of: Callable[[int], Any]):
        self.of = of

    def __getitem__(self, number: int) -> Any:
        return self.of(number)


def mixers(model: nn.Module) -> list[Any]:
    """The modules that keep a state: each knows its layer, has a depthwise convolution, and takes a cache."""
    return [module for module in model.modules() if _is_mixer(module)]


def _is_mixer(module: Any) -> bool:
    return (
        hasattr(module, "layer_idx")
        and any(isinstance(child, nn.Conv1d) and child.groups == child.in_channels for child in module.children())
        and _cache_of(module) in CACHES
    )


def _cache_of(module: Any) -> str:
    """The name of a forward's second parameter, which stands between a mixer's input and its mask."""
    _, *names = inspect.signature(type(module).forward).parameters
    return names[1] if len(names) > 2 else ""


@cache
def _drops_inputs(kind: type) -> bool:
    """Whether a mixer's code makes nothing of what `update_conv_state` gives back, as ZAYA's, which asks before."""
    try:
        return bool(re.search(r"^\s*\w+\.update_conv_state\(", inspect.getsource(kind), re.MULTILINE))
    except (OSError, TypeError):  # of code that came without its source
        return False


def install(model: nn.Module) -> None:
    """Have a model's mixers ask the layout in force, in training, sampling and recomputation."""
    for mixer in mixers(model):
        mixer.forward = _Mixed(mixer)


class _Mixed:
    """The forward of a mixer: by the layout in force, or else its own.

    Its own always gets a cache, in training an empty one: without, some mixers take a kernel of mamba-ssm's for the
    whole layer, which reads the weight of out_proj as it is, be it 4-bit bytes or a weight that wears an adapter.
    """

    def __init__(self, mixer: Any):
        self.mixer, self.cache = mixer, _cache_of(mixer)
        self.own: Any = vars(mixer).get("forward") or type(mixer).forward.__get__(mixer)
        if isinstance(self.own, _Mixed):  # of an earlier load
            self.own = self.own.own
        self.sizes: list[torch.Size] | None = None  # of a token's outputs, where there are several

    def __call__(self, hidden: Tensor | None = None, *arguments: Any, **keywords: Any) -> Any:
        hidden = keywords.pop("hidden_states") if hidden is None else hidden
        mix = getattr(layout_in_force(), "mix", None)  # not of layouts that look at attention alone
        if mix is not None:
            return self._parted(mix(self.mixer, self.one_call, hidden))
        if not arguments and keywords.get(self.cache) is None:
            keywords[self.cache] = Call()
        return self.own(hidden, *arguments, **keywords)

    def one_call(self, hidden: Tensor, call: Call, mask: Tensor | None = None) -> Tensor:
        """The mixer's own output (B, T, E) for rows hidden (B, T, D) that begin with the call's states.

        Where it gives several (B, T, ...), as ZAYA's gives queries, keys and values, they stand beside one another.

        The mask (B, T) is 0 where a row is padding, on its left. What else the model hands its layers, as positions in
        the packed row or sequence lengths, is of other rows than these, and is left out.
        """
        call.mask, call.tells_inputs = mask, _drops_inputs(type(self.mixer))
        out: Any = self.own(hidden, call, mask)
        if isinstance(out, Tensor):
            return out
        self.sizes = [part.shape[2:] for part in out]
        return torch.cat([part.flatten(2) for part in out], -1)

    def _parted(self, out: Tensor) -> Any:
        """The mixer's output as its own code gives it."""
        if self.sizes is None:
            return out
        parts = out.split([size.numel() for size in self.sizes], -1)
        return tuple(part.unflatten(-1, size) for part, size in zip(parts, self.sizes, strict=True))
