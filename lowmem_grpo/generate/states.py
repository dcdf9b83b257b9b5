"""States of layers that keep one (Gated DeltaNet, Mamba 2, short convolutions), for each slot and each prompt.

    own (slots, ...)        after the last token that a slot was fed
    prefix (prefixes, ...)  after a prompt's last token but one, where prompts are shared

of each state of each layer. Shapes and dtypes are those that the layers themselves give for one token: the recurrent
state of Qwen3.5 is (H, K, V) in fp32, the inputs that its convolution goes on with (channels, 4) in the compute dtype.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.generate.delta_rule import steps_in_place
from lowmem_grpo.generate.graphs import Kept
from lowmem_grpo.generate.shape import StoreShape
from lowmem_grpo.model.attention import Silent, UnknownAttention, attending, laid_out
from lowmem_grpo.model.mixing import Call, mixers
from lowmem_grpo.model.policy import Policy

OWN = "own states"  # in the names of tensors that are kept
Name = tuple[str, int]  # of one of a layer's states, as model/mixing.py has it


class StateShape(NamedTuple):
    size: tuple[int, ...]  # of one row
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize


StateShapes = Mapping[int, Mapping[Name, StateShape]]  # by layer
Tables = dict[int, dict[Name, Tensor]]  # by layer: (rows, ...)


class _Seen(Silent):
    """A layout in which layers show the states that they keep."""

    def __init__(self) -> None:
        self.shapes: dict[int, dict[Name, StateShape]] = {}

    def mix(self, mixer: Any, forward: Any, hidden: Tensor) -> Tensor:
        if mixer.layer_idx in self.shapes:
            raise UnknownAttention("a layer of its keeps states in more than one place")
        call = Call()
        out = forward(hidden, call)
        names = sorted(call.after)
        self.shapes[mixer.layer_idx] = {
            name: StateShape(tuple(call.after[name].shape[1:]), call.after[name].dtype) for name in names
        }
        return out


def state_shapes(policy: Policy) -> StateShapes:
    """The shapes of a policy's states, from one token that runs through its decoder; empty where no layer keeps one.

    Raises:
        UnknownAttention: two layers keep theirs under one number.
    """
    if not mixers(policy.decoder):
        return {}
    seen = _Seen()
    with policy.inference(), policy.autocast(), attending(policy.configs), laid_out(seen):
        token_ids = torch.zeros(1, 1, dtype=torch.int64, device=policy.device)
        policy.decoder(input_ids=token_ids, position_ids=token_ids, use_cache=False)
    return seen.shapes


def state_bytes(shapes: StateShapes) -> int:
    """Bytes of one slot's or one prompt's states of all layers."""
    return sum(shape.num_bytes for layer in shapes.values() for shape in layer.values())


class States:
    """The states of a rollout, zeroed."""

    def __init__(self, shapes: StateShapes, shape: StoreShape, device: torch.device, kept: Kept | None = None):
        """Allocate a row for each slot and each prefix of a store of some shape.

        With kept, for steps that are captured, the slots' rows stay where they are from rollout to rollout, and
        `commit` says whether what a step makes of them is written.
        """

        def own(layer: int, name: Name, of: StateShape) -> Tensor:
            size = (shape.slots, *of.size)
            if kept is None:
                return torch.zeros(size, dtype=of.dtype, device=device)
            return kept.zeros((OWN, layer, name), size, of.dtype, device)

        self.own: Tables = {
            layer: {name: own(layer, name, of) for name, of in named.items()} for layer, named in shapes.items()
        }
        self.prefix: Tables = {
            layer: {
                name: torch.zeros(shape.prefixes, *of.size, dtype=of.dtype, device=device) for name, of in named.items()
            }
            for layer, named in shapes.items()
        }
        # Trials of a capture run a step twice, and of two steps a state would be another.
        self.commit: Tensor | None = None
        if kept is not None:
            self.commit = kept.zeros("commit", (), torch.bool, device).fill_(True)

    def advance(self, mixer: Any, forward: Any, hidden: Tensor) -> Tensor:
        """Feed a layer one token (S, 1, D) of each of the first slots: its output, with their states moved on."""
        tables = {name: table[: len(hidden)] for name, table in self.own[mixer.layer_idx].items()}
        with steps_in_place(mixer, self.commit) as heeds_commit:
            # Any other layer that writes into the states it is given gets copies, where that may be a trial.
            call = Call(tables, writable=self.commit is not None and not heeds_commit)
            out = forward(hidden, call)
        for name, old in tables.items():
            new = call.after[name]
            if new is old:  # written in place
                continue
            if self.commit is None:
                old.copy_(new)
            else:
                torch.where(self.commit, new.to(old.dtype), old, out=old)
        return out

    def start(self, slots: Tensor, prefix_rows: Tensor) -> None:
        """Begin completions where their prompts ended."""
        for own, prefix in zip(_tensors(self.own), _tensors(self.prefix), strict=True):
            own[slots] = prefix[prefix_rows]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        for own in _tensors(self.own):
            own[targets] = own[sources]

    def copied_out(self, slot: int) -> list[Tensor]:
        """A copy of a slot's states in CPU memory."""
        return [own[slot].to("cpu", copy=True) for own in _tensors(self.own)]

    def copy_in(self, slot: int, saved: list[Tensor]) -> None:
        for own, values in zip(_tensors(self.own), saved, strict=True):
            own[slot] = values.to(own.device)


def clear(tables: Tables, rows: Tensor) -> None:
    """Zero these rows: the states of a text that begins."""
    for table in _tensors(tables):
        table[rows] = 0


def _tensors(tables: Tables) -> list[Tensor]:
    return [table for named in tables.values() for table in named.values()]
