"""The slots that completions are sampled in: their tensors, and the model that fills them."""

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from lowmem_grpo.generate.graphs import Kept
from lowmem_grpo.generate.layouts import SPAN, Decode, Prefill, Shifts
from lowmem_grpo.generate.sampling import SamplingParams, choose
from lowmem_grpo.generate.scheduler import NOBODYS, Scheduler
from lowmem_grpo.generate.shape import StoreShape, bucket, one_of_five
from lowmem_grpo.generate.states import States, clear
from lowmem_grpo.generate.store import Store, goes_by_table
from lowmem_grpo.kernels.sample_tokens import sample_next
from lowmem_grpo.model.attention import laid_out
from lowmem_grpo.model.policy import Policy

LEFT_FREE = 2**31  # bytes of CPU memory, which keys and values of turns leave alone


class Parked(NamedTuple):
    """A completion that waits for pages, or for what comes after a turn, with what it goes on with."""

    token: Tensor  # () the next to feed, on the device
    fed: int  # how many were, from its prompt's last on
    seen: Tensor | None  # (V,) bool, on the device
    # Its keys and values, in CPU memory: its pages, or its row, with the prompt's where no prefix has them.
    saved: list[list[Tensor]]
    states: list[Tensor] | None  # of its layers that keep one, in CPU memory


class Slots:
    """The slots' tensors, and the model that fills them; a step computes the first num_rows."""

    def __init__(
        self, policy: Policy, store: Store, shape: StoreShape, scheduler: Scheduler,
        params: SamplingParams | None = None, uniforms: Tensor | None = None, kept: Kept | None = None,
        fast: Callable[[Tensor, Decode], Tensor] | None = None, states: States | None = None,
    ):  # fmt: skip
        """Make empty slots, whose tensors are views of what is kept. step() needs params and uniforms.

        fast decodes tokens to their last hidden states (S, D) in place of the model's own layers. states are those of
        layers that keep one.
        """
        self.fast, self.states = fast, states
        self.policy, self.store, self.shape, self.scheduler, self.params = policy, store, shape, scheduler, params
        self.num_rows = len(scheduler.slots)
        kept = kept or Kept()

        def zeros(name: str, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return kept.zeros(name, size, dtype, policy.device)

        self.token_ids = zeros("token_ids", self.num_rows)  # the next to feed
        self.positions = zeros("positions", self.num_rows)  # where that stands in its text
        self.prefilled = zeros("prefilled", self.num_rows)  # how many prompt tokens stand before the first fed
        self.completions = zeros("completions", self.num_rows)
        self.prefix_rows = zeros("prefix_rows", self.num_rows)
        self.columns = [0] * self.num_rows  # where each slot's next token goes, as the host knows it
        self.parked: dict[int, Parked] = {}  # by completion, until it goes on
        self.given: dict[int, list[int]] = {}  # by completion, the next tokens, which are not drawn
        self.coming: Tensor | None = None  # (steps, S) those of the next steps, -1 where a token is drawn
        self.members: tuple[Tensor, Tensor] | None = None  # and places, of a Decode
        self.table: Tensor | None = None  # filled with NOBODYS, 0, where a slot has no page
        if shape.paged:
            self.table = zeros("table", self.num_rows, ceil(shape.slot_tokens / shape.page_tokens))
        elif goes_by_table(shape, policy.device):
            self.table = zeros("table", self.num_rows, 1)
            self.table += torch.arange(self.num_rows, device=policy.device)[:, None]
        self.seen = None
        if params is not None and params.repetition_penalty != 1:
            self.seen = zeros("seen", self.num_rows, policy.head.weight.shape[0], dtype=torch.bool)
        self.uniforms = None
        if uniforms is not None:
            self.uniforms = zeros("uniforms", *uniforms.shape, dtype=uniforms.dtype).copy_(uniforms)

    def admit(self, prompts: list[list[int]], prefill_tokens: int, ahead: int) -> list[int]:
        """Start waiting completions in free slots and prefill their prompts; returns the new slots.

        A completion starts only where all have room for `ahead` more tokens.
        """
        new, prefixes = self.scheduler.admit(self._ahead(ahead), lambda completion: self._more(completion, ahead))
        if not new:
            return new
        if self.table is None:
            self.store.own.clear(self._tensor(new))
            self.store.prefix.clear(self._tensor(prefixes))
        completions = [self.scheduler.slots[slot] for slot in new]
        asked = [self.scheduler.prompt_of(c) for c in completions]  # type: ignore[arg-type] # a new slot holds one
        at = self._tensor(new)
        if self.shape.shared:
            rows = {self.scheduler.prefixes[row]: [row] for row in prefixes}
            self._prefill(prompts, rows, prefill_tokens)
            if self.states is not None:
                self.states.start(at, self._tensor([self.scheduler.prefixes.index(prompt) for prompt in asked]))
        else:
            rows = {}
            for slot, prompt, completion in zip(new, asked, completions, strict=True):
                if completion not in self.parked:  # whose prompt was saved with it
                    rows.setdefault(prompt, []).append(slot)
            self._prefill(prompts, rows, prefill_tokens)
        lengths = [len(prompts[p]) - 1 for p in asked]
        self.token_ids[at] = self._tensor([prompts[p][-1] for p in asked])
        self.positions[at] = self.prefilled[at] = self._tensor(lengths)
        self.completions[at] = self._tensor(completions)
        for slot, length in zip(new, lengths, strict=True):
            self.columns[slot] = 0 if self.shape.shared else length
        if self.seen is not None:
            self.seen[at] = False
            for slot, prompt in zip(new, asked, strict=True):
                self.seen[slot, self._tensor(prompts[prompt])] = True
        for slot, completion in zip(new, completions, strict=True):
            if completion in self.parked:
                self._go_on(slot, self.parked[completion])
                if not self.shape.paged:
                    self.store.own.copy_in([slot], self.parked.pop(completion).saved)
        self._arrange()
        return new

    def _ahead(self, ahead: int) -> list[int]:
        """Number of tokens that each slot will hold, `ahead` from now."""
        return [min(column + ahead, self.shape.slot_tokens) for column in self.columns]

    def _more(self, completion: int, ahead: int) -> int:
        """Number of tokens that a waiting completion will hold, `ahead` after it goes on."""
        fed = self.parked[completion].fed if completion in self.parked else 0
        return min(fed + ahead, self.shape.slot_tokens)

    def held(self) -> list[int]:
        """The rows in use that have a completion."""
        return [slot for slot, completion in enumerate(self.scheduler.slots[: self.num_rows]) if completion is not None]

    def _go_on(self, slot: int, parked: Parked) -> None:
        """Continue a parked completion in a new slot; its pages are copied when the slot has some."""
        self.token_ids[slot] = parked.token
        self.positions[slot] += parked.fed
        self.columns[slot] += parked.fed
        if self.states is not None and parked.states is not None:
            self.states.copy_in(slot, parked.states)
        if self.seen is not None and parked.seen is not None:
            self.seen[slot] = parked.seen

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.policy.device)

    def _prefill(self, prompts: list[list[int]], rows: dict, prefill_tokens: int) -> None:
        """Keys, values and states of prompt[:-1] into the rows of each prompt, in batches of about prefill_tokens."""
        store = self.store.prefix if self.shape.shared else self.store.own
        states = self.states and (self.states.prefix if self.shape.shared else self.states.own)
        if states is not None:  # a prompt of one token is not prefilled
            clear(states, self._tensor([target for targets in rows.values() for target in targets]))
        order = sorted((p for p in rows if len(prompts[p]) > 1), key=lambda p: len(prompts[p]))
        while order:
            # Longest first, each padded to the first of its batch.
            width = len(prompts[order[-1]]) - 1
            batch = [order.pop() for _ in range(min(len(order), max(1, prefill_tokens // width)))]
            ids = torch.full((len(batch), width), self.policy.pad_token_id)
            for row, prompt in enumerate(batch):
                ids[row, : len(prompts[prompt]) - 1] = torch.tensor(prompts[prompt][:-1])
            sources = [row for row, prompt in enumerate(batch) for _ in rows[prompt]]
            targets = [target for prompt in batch for target in rows[prompt]]
            lengths, shifts = [len(prompts[prompt]) - 1 for prompt in batch], None
            if states is not None and min(lengths) < width:
                shifts = Shifts.of(self._tensor(lengths), width)
            with laid_out(Prefill(store, self._tensor(sources), self._tensor(targets), states, shifts)):
                self.policy.decoder(
                    input_ids=ids.to(self.policy.device), position_ids=self._tensor([list(range(width))]),
                    use_cache=False,
                )  # fmt: skip

    def _arrange(self) -> None:
        """Tell each slot its prefix row, and each prefix row its slots."""
        if not self.shape.shared:
            return
        held = self.scheduler.prefixes
        members: list[list[int]] = [[] for _ in range(max(r for r, p in enumerate(held) if p is not None) + 1)]
        row_of = {prompt: row for row, prompt in enumerate(held) if prompt is not None}
        places, prefix_rows = [0] * self.num_rows, [0] * self.num_rows
        for slot, completion in enumerate(self.scheduler.slots[: self.num_rows]):
            if completion is not None:
                row = row_of[self.scheduler.prompt_of(completion)]
                prefix_rows[slot], places[slot] = row, len(members[row])
                members[row].append(slot)
        self.prefix_rows[: self.num_rows] = self._tensor(prefix_rows)
        if self.table is not None:
            return
        widest = max(map(len, members))
        filled = [slots + [0] * (widest - len(slots)) for slots in members]
        flat = [row * widest + place for row, place in zip(prefix_rows, places, strict=True)]
        self.members = self._tensor(filled), self._tensor(flat)

    def reserve(self, ahead: int) -> None:
        """Give every running slot pages for `ahead` more tokens, from younger slots if need be."""
        if not self.shape.paged:
            return
        assert self.table is not None
        held, completions = [list(pages) for pages in self.scheduler.pages], list(self.scheduler.slots)
        for slot in self.scheduler.reserve(self._ahead(ahead)):
            self._park(slot, completions[slot], held[slot])  # type: ignore[arg-type] # it held one
        # Only now, since they may have the pages of those.
        for slot, completion in enumerate(self.scheduler.slots):
            if completion in self.parked:
                parked = self.parked.pop(completion)
                self.store.own.copy_in(self._filled(self.scheduler.pages[slot], parked.fed), parked.saved)
        width = self.table.shape[1]
        self.table.copy_(self._tensor([pages + [NOBODYS] * (width - len(pages)) for pages in self.scheduler.pages]))

    def _park(self, slot: int, completion: int, pages: list[int]) -> None:
        """Save the keys and values of a preempted slot, before its pages are written over."""
        fed = self.columns[slot]  # a prompt has no column of a slot with pages
        if completion in self.parked or not fed:  # not gone on since the last time, or not begun
            return
        saved = self.store.own.copied_out(self._filled(pages, fed), self.shape.page_tokens)
        self.parked[completion] = self._as_it_is(slot, self.token_ids[slot].clone(), fed, saved)

    def set_aside(self, slot: int, prompt: list[int], ids: list[int]) -> Parked | None:
        """Copy what the completion in a slot, which ends with ids, goes on with after a turn.

        None where CPU memory is short. Nothing may have been drawn after ids where a step moves more on than keys and
        values, as states.
        """
        if psutil.virtual_memory().available < LEFT_FREE:
            return None
        own, shape = self.store.own, self.shape
        if shape.paged:
            saved = own.copied_out(self._filled(self.scheduler.pages[slot], len(ids)), shape.page_tokens)
        else:
            saved = own.copied_out([slot], len(ids) + (0 if shape.shared else len(prompt) - 1))
        return self._as_it_is(slot, self._tensor(ids[-1:])[0], len(ids), saved)

    def _as_it_is(self, slot: int, token: Tensor, fed: int, saved: list[list[Tensor]]) -> Parked:
        seen = None if self.seen is None else self.seen[slot].clone()
        return Parked(token, fed, seen, saved, None if self.states is None else self.states.copied_out(slot))

    def _filled(self, pages: list[int], columns: int) -> list[int]:
        """The first pages of a slot, as many as `columns` tokens fill."""
        return pages[: ceil(columns / self.shape.page_tokens)]

    def shrink(self, captured: bool) -> None:
        """Compute with fewer rows once nobody waits and a smaller number of them holds all that run.

        A replay of 64 rows takes 1.04 times as long as one of 16 (1.5B, H200): of captured steps few numbers are made.
        """
        running = max(1, self.scheduler.running)
        num_rows = one_of_five(running, len(self.scheduler.slots)) if captured else bucket(running)
        if self.scheduler.waiting or num_rows >= self.num_rows:
            return
        moves = self.scheduler.compact(num_rows)
        if moves:
            sources, targets = (self._tensor(list(side)) for side in zip(*moves, strict=True))
            for values in (self.token_ids, self.positions, self.prefilled, self.completions, self.seen):
                if values is not None:
                    values[targets] = values[sources]
            if self.shape.paged:
                assert self.table is not None
                self.table[targets] = self.table[sources]
            else:
                self.store.own.move(sources, targets)
            if self.states is not None:
                self.states.move(sources, targets)
            for source, target in moves:
                self.columns[target] = self.columns[source]
        self.num_rows = num_rows
        if self.scheduler.running:
            self._arrange()

    def hidden(self, num_rows: int) -> Tensor:
        """Feed each of the first S rows its next token: last hidden states (S, D)."""
        token_ids, now = self.token_ids[:num_rows], self.layout(num_rows)
        if self.fast is not None:
            return self.fast(token_ids, now)
        with laid_out(now):
            out = self.policy.decoder(
                input_ids=token_ids[:, None], position_ids=now.positions[:, None], use_cache=False
            )
        return out.last_hidden_state[:, -1]

    def layout(self, num_rows: int) -> Decode:
        """The layout in which the first rows attend."""
        positions, prefilled = self.positions[:num_rows], self.prefilled[:num_rows]
        columns = positions - prefilled if self.shape.shared else positions
        lengths, prefix_rows = (prefilled, self.prefix_rows[:num_rows]) if self.shape.shared else (None, None)
        members, places = self.members or (None, None)
        table, span = (None, self._span()) if self.table is None else (self.table[:num_rows], 0)
        return Decode(
            self.store, columns, positions, span, lengths, members, places, prefix_rows, table, {}, self.states
        )

    def _span(self) -> int:
        needed = 1 + max(c for c, holder in zip(self.columns, self.scheduler.slots, strict=True) if holder is not None)
        return min(self.shape.slot_tokens, -(-needed // SPAN) * SPAN)

    def state(self) -> list[Tensor]:
        """The tensors that a step changes, but for keys and values, which a repetition writes once more."""
        return [self.token_ids, self.positions, *(() if self.seen is None else (self.seen,))]

    def feed(self, token_ids: list[int]) -> None:
        """Have each slot go on with a token that was not sampled."""
        at = slice(len(token_ids))
        self.token_ids[at] = self._tensor(token_ids)
        self.positions[at] += 1
        self.columns = [column + 1 for column in self.columns]

    def step(self, num_rows: int) -> Tensor:
        """Decode one more token of each of the first S rows: a Choice's tensors as (3, S) fp64.

        With a table it depends on nothing that only the host knows, but on num_rows.
        """
        assert self.params is not None and self.uniforms is not None
        hidden = self.hidden(num_rows)
        if self.fast is not None and self.seen is None and not self.params.greedy and not self.params.truncates:
            rows = (x[:num_rows] for x in (self.completions, self.token_ids, self.positions, self.prefilled))
            head = self.policy.head
            return sample_next(
                self.policy.bare_logits(hidden), self.uniforms, *rows, temperature=self.params.temperature,
                scale=head.logit_scale, softcap=head.softcap,
            )  # fmt: skip
        now = (self.positions - self.prefilled)[:num_rows]
        logits = self.policy.logits(hidden)
        seen = None if self.seen is None else self.seen[:num_rows]
        choice = choose(logits, self.uniforms[self.completions[:num_rows], now], seen, self.params)
        if seen is not None:
            seen.scatter_(1, choice.token_ids[:, None], True)
        self.token_ids[:num_rows] = choice.token_ids
        # A slot that ended since the host last looked, or holds nothing, writes its last column again and again.
        positions, last = self.positions[:num_rows], self.prefilled[:num_rows] + self.uniforms.shape[1] - 1
        torch.minimum(positions + 1, last, out=positions)
        return torch.stack([values.double() for values in choice])

    def give(self, num_steps: int) -> list[int]:
        """Have the next steps go on with what is given; returns in how many of them each slot does."""
        counts, self.coming = [0] * self.num_rows, None
        if not self.given:
            return counts
        coming = torch.full((num_steps, self.num_rows), -1)
        for slot, completion in enumerate(self.scheduler.slots[: self.num_rows]):
            if completion in self.given:
                ids = self.given.pop(completion)
                now, later = ids[:num_steps], ids[num_steps:]
                counts[slot] = len(now)
                coming[: len(now), slot] = torch.tensor(now)
                if later:
                    self.given[completion] = later
        if any(counts):
            self.coming = coming.to(self.policy.device)
        return counts

    def advance(self, step: Callable[[int], Tensor], number: int = 0) -> Tensor:
        """Run a step, or a replay of one, on the rows in use, and move each slot's column on.

        It is the step of that number since give(): a token that was given stands in for the one that was drawn.
        """
        given = None if self.coming is None else self.coming[number]
        seen = None if given is None or self.seen is None else self.seen[: self.num_rows].clone()
        made = step(self.num_rows)
        if given is not None:
            now, is_given = self.token_ids[: self.num_rows], given >= 0
            now.copy_(torch.where(is_given, given, now))
            if seen is not None and self.seen is not None:
                seen.scatter_(1, now[:, None], True)  # and not what was drawn
                self.seen[: self.num_rows] = torch.where(is_given[:, None], seen, self.seen[: self.num_rows])
        self.columns = [min(column + 1, self.shape.slot_tokens - 1) for column in self.columns]
        return made
