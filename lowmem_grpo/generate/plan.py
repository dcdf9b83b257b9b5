"""How many completions are sampled at once: slots and their memory, from a model's shape and a budget. Pure."""

from dataclasses import dataclass
from math import ceil

SHARE_FROM = 64  # prompt tokens from which one copy of a prompt's keys and values serves its whole group


@dataclass(frozen=True)
class KVShape:
    """What one token's keys and values take."""

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes


@dataclass(frozen=True)
class RolloutPlan:
    """The store's shape. Where shared, a prompt's keys and values stand once, in a prefix row, else in every slot."""

    slots: int  # completions in flight
    slot_tokens: int  # tokens that a slot has room for: a completion, and its prompt unless that is shared
    prefixes: int  # prompts resident at once; 0 where they are not shared
    prefix_tokens: int  # tokens that a prefix row has room for; 0 likewise

    @property
    def shared(self) -> bool:
        return self.prefixes > 0

    def tokens(self) -> int:
        return self.slots * self.slot_tokens + self.prefixes * self.prefix_tokens

    def halved(self) -> "RolloutPlan":
        """The same with half of the slots, for after an out-of-memory."""
        return RolloutPlan(max(1, self.slots // 2), self.slot_tokens, ceil(self.prefixes / 2), self.prefix_tokens)


def plan_rollout(
    *, prompt_tokens: int, prompts: int, num_generations: int, max_completion_length: int, budget_tokens: int,
    share: bool | None = None, max_slots: int | None = None,
) -> RolloutPlan:  # fmt: skip
    """The most slots whose keys and values fit in budget_tokens; at least one.

    prompt_tokens is the longest prompt's. The last token of a prompt is the first that decoding feeds, so that
    prompt_tokens - 1 are prefilled, and max_completion_length are stored: the prompt's last and all but the last
    sampled. share says whether prompts are shared; None leaves it to SHARE_FROM.

    A group whose slots are freed at different times keeps its prefix: there are twice as many prefixes as full groups.
    """
    prefilled = prompt_tokens - 1
    if share is None:
        share = num_generations > 1 and prefilled >= SHARE_FROM
    best = None
    for slots in range(1, min(prompts * num_generations, max_slots or 2**31) + 1):
        prefixes = min(prompts, 2 * ceil(slots / num_generations)) if share else 0
        own = max_completion_length + (0 if share else prefilled)
        plan = RolloutPlan(slots, own, prefixes, max(1, prefilled) if share else 0)
        if best is not None and plan.tokens() > budget_tokens:
            break
        best = plan
    assert best is not None
    return best


def bucket(rows: int) -> int:
    """The least of 1, 2, 4, 8, 16, 32, 48, 64, ... that is not below rows: shapes change rarely as slots run out."""
    return 1 << (rows - 1).bit_length() if rows <= 16 else ceil(rows / 16) * 16
