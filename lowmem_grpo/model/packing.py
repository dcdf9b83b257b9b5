"""Sequences packed into micro-batches under a token budget: no padding, a prompt once for its group."""

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

SHARE_FROM = 1.2  # tokens of the separate sequences over those of the shared layout, from which a prompt is shared
KEYS = 4  # times the token budget: a micro-batch's keys, which attention copies, a prompt's for each of its tails


@dataclass(frozen=True)
class Block:
    """One call of attention: G prompts of P tokens, and n tails of up to C tokens after each.

    A tail is a completion without its last token. Where P is 0 nothing is before the tails, which are prompts and
    whole sequences.
    """

    prompts: Tensor  # (G, P) int64: where the prompts' tokens stand
    tails: Tensor  # (G, n, C) int64: where the tails' tokens stand, each filled up with its last


@dataclass(frozen=True)
class Segment:
    """Tokens of a packed row that stand one after the other, and the prompt whose tail they are."""

    places: range
    prompt: range  # empty where nothing is before them


@dataclass(frozen=True)
class Run:
    """One call of a layer that keeps a state: B segments, padded to T tokens.

    Segments that others go on from are padded on the left, so that their state is that after their last token. All
    others are padded on the right, where nothing comes after.
    """

    places: Tensor  # (B, T) int64: where their tokens stand, with the first or the last one's in place of padding
    mask: Tensor | None  # (B, T) bool, False for padding on the left; None where there is none
    prompts: Tensor | None  # (B,) int64: the prompt that each goes on from, numbered over all runs; None for texts


@dataclass(frozen=True)
class Runs:
    """The calls of a layer that keeps a state, for a packed row of T tokens."""

    prompts: tuple[Run, ...]  # those that tails go on from
    others: tuple[Run, ...]
    outputs: Tensor  # (T,) int64: where each token's result stands among those of all runs


@dataclass(frozen=True)
class Packing:
    """A packed row of T tokens: which token sees which in attention, and which texts go on from which.

    The row is a list of segments: prompts, tails, and at most one of padding. As varlen attention takes it, segment s
    has the queries [query_starts[s], query_starts[s + 1]) and the keys keys[key_starts[s]:key_starts[s + 1]], the
    last of which is the last query's own.
    """

    blocks: tuple[Block, ...]
    outputs: Tensor  # (T,) int64: where each token's result stands among the blocks' tails
    query_starts: Tensor  # (segments + 1,) int32
    key_starts: Tensor  # (segments + 1,) int32
    keys: Tensor  # (K,) int64: places in the row
    longest_query: int
    longest_key: int
    segments: tuple[Segment, ...]  # without the padding
    masks: dict = field(default_factory=dict, compare=False)  # of attention, made by the first layer that asks

    @cached_property
    def runs(self) -> Runs:
        """Made by the first layer that asks. Segments of alike lengths are one: to 31 tokens, 63, 127 and so on."""
        return _runs(self.segments, self.outputs)


@dataclass(frozen=True)
class MicroBatch:
    """R rows of T tokens, and the N completion tokens in them."""

    input_ids: Tensor  # (R, T) int64
    predictors: Tensor  # (N,) int64: index into the R * T positions, of the one that predicts each token
    labels: Tensor  # (N,) int64
    token_index: Tensor  # (N,) int64: index of each token among the rollout's M
    sequences: Tensor  # (N,) int64: the completion that each token belongs to
    # None where each row is a prompt, its completion and padding, which a causal model never looks at. Else R is 1.
    position_ids: Tensor | None = None  # (1, T) int64: each token's place in its own sequence
    packing: Packing | None = None

    def only(self, chosen: Tensor) -> "MicroBatch":
        """The micro-batch with the chosen of its N tokens, (N,) bool, as those that count; what they see stays."""
        return replace(
            self, predictors=self.predictors[chosen], labels=self.labels[chosen], token_index=self.token_index[chosen],
            sequences=self.sequences[chosen],
        )  # fmt: skip


def pack(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    token_budget: int,
    pad_token_id: int,
    device: torch.device,
    chosen: Sequence[bool] | None = None,
    num_generations: int = 1,
    padding_free: bool = False,
    last_only: bool = False,
) -> Iterator[MicroBatch]:
    """Micro-batches of at most token_budget tokens, padding included, the longest first, of the chosen completions.

    completions[b] is of prompts[b // num_generations]. Tokens are numbered completion after completion, all of them. A
    sequence longer than the budget still makes a micro-batch of its own. With last_only each completion's last token is
    the only one that counts, as where the text before it is scored.

    padding_free puts sequences into one row for the attention of packed_attention.py, and a prompt once for its
    completions, where that leaves 1 / SHARE_FROM of the tokens or less. A group that does not fit is split, and so is
    one with more than KEYS token_budget keys.
    """
    offsets = [0, *accumulate(map(len, completions))]
    rows = [b for b in range(len(completions)) if completions[b] and (chosen is None or chosen[b])]
    if padding_free:
        pieces = _pieces(rows, prompts, completions, num_generations, token_budget)
        for filled in _bins(pieces, token_budget):
            yield _packed(filled, completions, offsets, token_budget, pad_token_id, device, last_only)
        return
    owners = [prompts[b // num_generations] for b in range(len(completions))]
    rows.sort(key=lambda b: len(owners[b]) + len(completions[b]), reverse=True)
    while rows:
        longest = len(owners[rows[0]]) + len(completions[rows[0]])
        width = _rounded_up(longest, token_budget, device)
        count = max(1, token_budget // width)
        yield _padded(rows[:count], owners, completions, offsets, width, pad_token_id, device, last_only)
        rows = rows[count:]


def _padded(rows, prompts, completions, offsets, width, pad_token_id, device, last_only) -> MicroBatch:
    ids, predictors, labels, token_index, sequences = [], [], [], [], []
    for row, b in enumerate(rows):
        prompt, completion = prompts[b], completions[b]
        ids.append(prompt + completion + [pad_token_id] * (width - len(prompt) - len(completion)))
        count = 1 if last_only else len(completion)
        end = row * width + len(prompt) + len(completion) - 1  # the prompt's last token predicts the completion's first
        predictors += range(end - count, end)
        labels += completion[-count:]
        token_index += range(offsets[b + 1] - count, offsets[b + 1])
        sequences += [b] * count
    ids, predictors, labels, token_index, sequences = (
        torch.tensor(x, device=device) for x in (ids, predictors, labels, token_index, sequences)
    )
    return MicroBatch(ids, predictors, labels, token_index, sequences)


@dataclass(frozen=True)
class Piece:
    """Completions of one prompt that stay together."""

    rows: list[int]
    prompt: list[int]  # before all of the tails; empty where each has it itself
    tails: list[list[int]]  # each completion without its last token, which predicts nothing

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.tails))

    @property
    def num_keys(self) -> int:
        return self.num_tokens + len(self.prompt) * len(self.tails)


def _pieces(rows, prompts, completions, num_generations, token_budget) -> list[Piece]:
    groups: dict[int, list[int]] = {}
    for b in sorted(rows, key=lambda b: len(completions[b]), reverse=True):
        groups.setdefault(b // num_generations, []).append(b)
    pieces = []
    for group, members in groups.items():
        prompt = prompts[group]
        apart = [Piece([b], [], [prompt + completions[b][:-1]]) for b in members]
        together = _split(members, prompt, completions, token_budget)
        shared = sum(piece.num_tokens for piece in apart) >= SHARE_FROM * sum(piece.num_tokens for piece in together)
        pieces += together if shared else apart
    return pieces


def _split(members: list[int], prompt: list[int], completions, token_budget: int) -> list[Piece]:
    """A group in pieces within the budget, each with its own copy of the prompt."""
    pieces: list[Piece] = []
    for b in members:
        if pieces:
            longer = Piece([*pieces[-1].rows, b], prompt, [*pieces[-1].tails, completions[b][:-1]])
            if longer.num_tokens <= token_budget and longer.num_keys <= KEYS * token_budget:
                pieces[-1] = longer
                continue
        pieces.append(Piece([b], prompt, [completions[b][:-1]]))
    return pieces


def _bins(pieces: list[Piece], token_budget: int) -> list[list[Piece]]:
    """Pieces in bins within the budget: first fit, the largest first."""
    bins: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # for tokens and for keys
    for piece in sorted(pieces, key=lambda piece: piece.num_tokens, reverse=True):
        fits = (
            i
            for i, (num_tokens, num_keys) in enumerate(room)
            if num_tokens >= piece.num_tokens and num_keys >= piece.num_keys
        )
        place = next(fits, None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append((token_budget, KEYS * token_budget))
        bins[place].append(piece)
        num_tokens, num_keys = room[place]
        room[place] = num_tokens - piece.num_tokens, num_keys - piece.num_keys
    return bins


def fills_one(
    prompt_tokens: int, completion_tokens: int, *, num_prompts: int, num_generations: int, token_budget: int
) -> list[int] | None:
    """The completions' lengths of a step that fills one micro-batch and has it cost the most memory.

    Every group has one completion of full length and others of one length, the longest with which all still fit: so
    attention has keys and filling for many tails. None where not even one group fits.
    """

    def step(groups: int, others: int) -> list[int]:
        return [completion_tokens, *[others] * (num_generations - 1)] * groups

    def fit(groups: int, others: int) -> bool:
        completions = [[0] * length for length in step(groups, others)]
        asked = [[0] * prompt_tokens] * groups
        pieces = _pieces(range(len(completions)), asked, completions, num_generations, token_budget)
        filled = _bins(pieces, token_budget)
        return len(filled) == 1 and sum(piece.num_tokens for piece in filled[0]) <= token_budget

    groups = bisect(range(1, num_prompts + 1), False, key=lambda groups: not fit(groups, 1))
    if not groups:
        return None
    return step(groups, bisect(range(1, completion_tokens + 1), False, key=lambda others: not fit(groups, others)))


def filling_lengths(longest: int, most: int, token_budget: int) -> list[int]:
    """Lengths of at most `most` examples that fill a micro-batch: full ones, and one that takes what is left.

    An example's last token predicts nothing, and takes no room: two of 64 tokens and one of 3 fill 128.
    """
    full, left = divmod(token_budget, max(longest - 1, 1))
    return ([longest] * full + [left + 1] * (left > 0))[:most] or [longest]


def _packed(pieces, completions, offsets, token_budget, pad_token_id, device, last_only) -> MicroBatch:
    ids, positions, predictors, labels, token_index, sequences = [], [], [], [], [], []
    alike: dict[tuple, list[tuple[range, list[range]]]] = {}  # prompts, with tails, that one call of attention serves
    query_starts, key_starts, keys = [0], [0], []
    segments: list[Segment] = []

    def segment(new: list[int], before: range) -> range:
        """Append tokens that see the places before and each other; returns the places they got."""
        places = range(len(ids), len(ids) + len(new))
        ids.extend(new)
        positions.extend(range(len(before), len(before) + len(new)))
        keys.extend([*before, *places])
        query_starts.append(len(ids))
        key_starts.append(len(keys))
        segments.append(Segment(places, before))
        return places

    for piece in pieces:
        prompt = range(0)
        if piece.prompt:
            prompt = segment(piece.prompt, range(0))
            alike.setdefault((0, 1, _length_class(0, len(prompt))), []).append((range(0), [prompt]))
        classes: dict[int, list[range]] = {}
        for b, tail in zip(piece.rows, piece.tails, strict=True):
            places = segment(tail, prompt) if tail else range(0)
            if tail:
                classes.setdefault(_length_class(len(prompt), len(tail)), []).append(places)
            # The completion's first token is predicted by its prompt's last, and each other by the one before it.
            count = 1 if last_only else len(completions[b])
            predictors += [*prompt, *places][-count:]
            labels += completions[b][-count:]
            token_index += range(offsets[b + 1] - count, offsets[b + 1])
            sequences += [b] * count
        for length_class, tails in classes.items():
            alike.setdefault((len(prompt), len(tails), length_class), []).append((prompt, tails))
    padding = _rounded_up(len(ids), token_budget, device) - len(ids)
    if padding:
        segment([pad_token_id] * padding, range(0))
        segments.pop()

    def tensor(values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    blocks, results = [], 0
    outputs = [0] * len(ids)  # any for padding, from which nothing follows
    for same in alike.values():
        widest = max(len(tail) for _, tails in same for tail in tails)
        if device.type == "cpu":  # fewer shapes of attention's products: see _rounded_up
            widest = -(-widest // 8) * 8
        filled = []
        for tail in (tail for _, tails in same for tail in tails):
            outputs[tail.start : tail.stop] = range(results, results + len(tail))
            results += widest
            filled.append([*tail, *[tail[-1]] * (widest - len(tail))])
        prompts = tensor([[*prompt] for prompt, _ in same])
        blocks.append(Block(prompts, tensor(filled).view(len(same), -1, widest)))
    return MicroBatch(
        tensor([ids]), tensor(predictors), tensor(labels), tensor(token_index), tensor(sequences), tensor([positions]),
        Packing(
            tuple(blocks), tensor(outputs), tensor(query_starts, torch.int32), tensor(key_starts, torch.int32),
            tensor(keys), _longest(query_starts), _longest(key_starts), tuple(segments),
        ),
    )  # fmt: skip


def _runs(segments: Sequence[Segment], like: Tensor) -> Runs:
    """The calls for the segments of a row that has as many tokens as like, on its device."""
    device = like.device
    outputs = [0] * len(like)  # any for padding, from which nothing follows
    gone_on_from = {segment.prompt for segment in segments}
    kinds: dict[tuple[bool, bool, int], list[Segment]] = {}
    for segment in segments:
        kind = segment.places not in gone_on_from, bool(segment.prompt), _length_class(1, len(segment.places))
        kinds.setdefault(kind, []).append(segment)
    number: dict[range, int] = {}  # of each prompt
    found: dict[bool, list[Run]] = {False: [], True: []}
    results = 0
    for (is_last, goes_on, _), alike in sorted(kinds.items(), key=lambda item: item[0]):
        longest = max(len(segment.places) for segment in alike)
        # One token alone is a step of decoding, which has no gradient in some kernels. On a CPU as in _packed.
        width = -(-longest // 8) * 8 if device.type == "cpu" else max(longest, 2)
        places, mask = [], []
        for segment in alike:
            padding = width - len(segment.places)
            left = 0 if is_last else padding
            first, last = segment.places[0], segment.places[-1]
            places.append([*[first] * left, *segment.places, *[last] * (padding - left)])
            mask.append([False] * left + [True] * (width - left))
            outputs[first : last + 1] = range(results + left, results + left + len(segment.places))
            results += width
            number.setdefault(segment.places, len(number))
        found[is_last].append(
            Run(
                torch.tensor(places, device=device),
                None if all(map(all, mask)) else torch.tensor(mask, device=device),
                torch.tensor([number[segment.prompt] for segment in alike], device=device) if goes_on else None,
            )
        )
    return Runs(tuple(found[False]), tuple(found[True]), torch.tensor(outputs, device=device))


def _longest(starts: list[int]) -> int:
    return max(b - a for a, b in pairwise(starts))


def _length_class(prompt: int, length: int) -> int:
    """The class of tails that are padded to one length: 0 for up to 31 tokens, 1 for 32 to 63.

    From 64 tokens on, tails after a prompt have classes that double (64 to 127, 128 to 255), lone sequences and prompts
    one for each 32 lengths. Attention alone pays for the padding.
    """
    return (length // 32).bit_length() if prompt else length // 32


def _rounded_up(width: int, token_budget: int, device: torch.device) -> int:
    """The width of a padded row: a multiple of 8, or the width itself where that exceeds the budget.

    On a CPU there are only 4 to 16 widths between powers of two, since each matrix product of a new shape takes 0.3 ms
    and 0.3 MiB for a kernel that is never let go, and a width has 25 shapes. From 1024 on 256 tokens of padding are the
    larger cost, from 4096 on a sixteenth.
    """
    step, power = 8, 1 << (width.bit_length() - 1)
    if device.type == "cpu":
        step = max(step, min(power // 4, 256), power // 16)
    rounded = -(-width // step) * step
    return rounded if rounded <= token_budget else width
