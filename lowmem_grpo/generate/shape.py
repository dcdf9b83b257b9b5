"""Sizes of the store of keys and values: how many completions fit in a budget at once. Pure."""

from dataclasses import dataclass, replace
from math import ceil

import torch

from lowmem_grpo.model.layer_shapes import LayerShape

SHARE_FROM = 64  # prompt tokens from which one copy of a prompt's keys and values serves its whole group, without pages
PAGE = 64  # tokens of a page


def stored(layers: dict[int, LayerShape]) -> dict[tuple[int, int], list[int]]:
    """The layers whose keys and values are stored, by (H_kv, D), ascending: a layer that shares another's has none."""
    found: dict[tuple[int, int], list[int]] = {}
    for number, layer in sorted(layers.items()):
        if layer.source == number:
            found.setdefault((layer.kv_heads, layer.head_dim), []).append(number)
    return found


def token_bytes(layers: dict[int, LayerShape], dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers, and of the fp16 scales of int8 ones."""
    scale = torch.float16.itemsize if dtype == torch.int8 else 0
    return sum(
        2 * len(numbers) * kv_heads * (head_dim * dtype.itemsize + scale)
        for (kv_heads, head_dim), numbers in stored(layers).items()
    )


def state_tokens(state_bytes: int, token_bytes: int) -> int:
    """Number of tokens whose keys and values take as much as states of state_bytes; 0 where no layer attends.

    There is no measure there, and a budget counts the tokens of completions as that of any other model.
    """
    return ceil(state_bytes / token_bytes) if token_bytes else 0


@dataclass(frozen=True)
class StoreShape:
    """How many slots, prefixes and pages a store of keys and values has, and of how many tokens.

    Where shared, a prompt's keys and values stand once, in a prefix row, else in every slot. Where paged, slots take
    pages as they grow, and there may be more slots than the pages hold at full length: then the youngest has to wait.
    """

    slots: int  # completions in flight
    slot_tokens: int  # the most tokens of a slot: a completion's, and its prompt's unless that is shared
    prefixes: int  # prompts resident at once; 0 where they are not shared
    prefix_tokens: int  # tokens that a prefix row has room for; 0 where they are not shared
    pages: int = 0  # the first belongs to nobody: slots that hold nothing write there; 0 where every slot has its own
    page_tokens: int = 0
    state_tokens: int = 0  # as many tokens' keys and values take what the states of a slot, or a prefix, take

    def __post_init__(self) -> None:
        if self.paged and (not self.shared or (self.pages - 1) * self.page_tokens < self.slot_tokens):
            raise ValueError(f"{self} has no prefixes, or fewer pages than one slot and nobody's take")

    @property
    def shared(self) -> bool:
        return self.prefixes > 0

    @property
    def paged(self) -> bool:
        return self.pages > 0

    @property
    def num_states(self) -> int:
        """Number of slots and prefixes, each with the states of every layer that keeps one."""
        return self.slots + self.prefixes

    def num_tokens(self) -> int:
        """Number of tokens that there is room for, of keys and values."""
        own = self.pages * self.page_tokens if self.paged else self.slots * self.slot_tokens
        return own + self.prefixes * self.prefix_tokens

    def cost(self) -> int:
        """Number of tokens that a budget counts: those that there is room for, and those that states are worth."""
        return self.num_tokens() + self.num_states * self.state_tokens

    def at_most(self, num_completions: int) -> "StoreShape":
        """A shape of no more slots than num_completions, and no more memory than they can use."""
        if num_completions >= self.slots:
            return self
        pages = min(self.pages, 1 + num_completions * ceil(self.slot_tokens / self.page_tokens)) if self.paged else 0
        return replace(self, slots=num_completions, prefixes=min(self.prefixes, num_completions), pages=pages)

    def halved(self) -> "StoreShape":
        """A shape of half the slots and, down to one slot's, half the memory, for after an out-of-memory."""
        pages = max(self.pages // 2, 1 + ceil(self.slot_tokens / self.page_tokens)) if self.paged else 0
        return replace(self, slots=max(1, self.slots // 2), prefixes=ceil(self.prefixes / 2), pages=pages)


def store_shape(
    *, prompt_tokens: int, num_prompts: int, num_generations: int, max_completion_length: int, budget_tokens: int,
    paged: bool, state_tokens: int = 0,
) -> StoreShape:  # fmt: skip
    """The shape of most slots whose keys, values and states fit in budget_tokens; at least one slot.

    prompt_tokens is the longest prompt's. The last token of a prompt is the first that decoding feeds, so that
    prompt_tokens - 1 are prefilled, and max_completion_length are stored: the prompt's last and all but the last
    sampled. A group of several shares a prompt of SHARE_FROM tokens or more. A group whose slots are freed at different
    times keeps its prefix: there are twice as many prefixes as full groups, if the budget allows it, and if a prompt's
    keys and values take more than its states.

    paged, if a completion takes more than a page and not all fit at full length: prompts are shared, and there are
    slots for completions of half the maximum. paged, prompts always stand in prefixes, so that slots have one length
    whatever the prompts': captured steps serve that alone. But that of a single completion stands in its slot where
    layers keep states, which a prefix would have twice.
    """
    prefilled = prompt_tokens - 1
    share = num_generations > 1 and (paged or prefilled >= SHARE_FROM)
    share = share or (paged and prefilled > 0 and not state_tokens)
    every = num_prompts * num_generations
    most_prefixes = 2 if num_generations > 1 and prefilled >= state_tokens else 1  # a group
    dense = _largest(
        every, prefilled, num_prompts, num_generations, max_completion_length, budget_tokens, share, most_prefixes,
        state_tokens,
    )  # fmt: skip
    if not paged or dense.slots == every or max_completion_length <= PAGE:
        return dense
    best = None
    for slots in range(1, every + 1):
        prefixes = min(num_prompts, most_prefixes * ceil(slots / num_generations))
        room = budget_tokens - prefixes * max(1, prefilled) - (slots + prefixes) * state_tokens
        pages = room // PAGE
        one = 1 + ceil(max_completion_length / PAGE)
        if pages < max(one, 1 + slots * ceil(max_completion_length / 2 / PAGE)):
            break
        best = StoreShape(slots, max_completion_length, prefixes, max(1, prefilled), pages, PAGE, state_tokens)
    return best if best is not None and best.slots > dense.slots else dense


def _largest(
    most: int, prefilled: int, num_prompts: int, num_generations: int, completion: int, budget: int, share: bool,
    most_prefixes: int, state_tokens: int,
) -> StoreShape:  # fmt: skip
    """The shape of most slots without pages; at least one slot, within the budget or not."""

    def shape(slots: int, per_group: int) -> StoreShape:
        if not share:
            return StoreShape(slots, completion + prefilled, 0, 0, state_tokens=state_tokens)
        prefixes = min(num_prompts, per_group * ceil(slots / num_generations))
        return StoreShape(slots, completion, prefixes, max(1, prefilled), state_tokens=state_tokens)

    # One prefix a group where the budget does not hold two of even one slot's.
    per_group = most_prefixes if shape(1, most_prefixes).cost() <= budget else 1
    fitting = (slots for slots in range(1, most + 1) if shape(slots, per_group).cost() <= budget)
    return shape(max(fitting, default=1), per_group)


def bucket(num_rows: int) -> int:
    """The least of 1, 2, 4, 8, 16, 32, 48, 64, ... that is num_rows or more."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 16 else ceil(num_rows / 16) * 16


def one_of_five(num_rows: int, every: int) -> int:
    """The least of every, every / 2, / 4, / 8 and 1 that is num_rows or more: five numbers of rows are captured."""
    return min(rows for rows in (1, *(ceil(every / part) for part in (8, 4, 2, 1))) if rows >= num_rows)
