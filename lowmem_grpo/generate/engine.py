"""Sampling from the resident weights: slots that are refilled as completions end, prompts prefilled once a group.

A completion's token t is drawn by inverse CDF from uniforms[completion, t], and a row of a batch does not depend on the
others. So which completions share a batch, in what order they start and how often one has to wait does not change
what is sampled, up to the rounding of the matrix products, which in fp32 is far below what moves a token.
"""

import gc
from collections.abc import Callable
from functools import partial
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.attention import attending, laid_out
from lowmem_grpo.attention import refusal as attention_refusal
from lowmem_grpo.generate.ending import ending
from lowmem_grpo.generate.graphs import Graphs, cuda_capture
from lowmem_grpo.generate.plan import PAGE, RolloutPlan, bucket, kv_shape
from lowmem_grpo.generate.sampling import SamplingParams, choose
from lowmem_grpo.generate.scheduler import NOBODYS, Scheduler
from lowmem_grpo.generate.store import SPAN, Decode, Prefill, Rows, Store
from lowmem_grpo.lora import plain_lora_layers
from lowmem_grpo.out_of_memory import as_torch_says_it
from lowmem_grpo.packing import pack
from lowmem_grpo.policy import Policy
from lowmem_grpo.rollout import Completion
from lowmem_grpo.trial import LAST, distances, in_fp32, outputs, outputs_kept, pieces, refused, too_far

# How far a step in 16 bits may be from the fp32 truth in the first layer, where SmolLM2 and Gemma 3 270M are 0.017 away
# at most, with int8 keys and values, and in its last hidden state, after the rounding of all layers: 0.18.
FIRST_LAYER, LAST_STATE = 0.1, 0.5
# A GPU is asked what it sampled only every so many tokens; a slot that ended in between goes on for nothing until then.
ASK_EVERY = {"cuda": 8, "cpu": 1}
CAPTURE = {"cuda": cuda_capture}


def refusal(policy: Policy, kv_dtype: torch.dtype) -> str | None:
    """Why this model cannot be sampled from here, or None. Runs it on a few tokens, beside its own forward."""
    return attention_refusal(policy.base) or refused(policy, partial(_difference, kv_dtype=kv_dtype))


def _difference(policy: Policy, text: str, kv_dtype: torch.dtype) -> str | None:
    """Compare prefill and one decoded token of three texts with the model's own forward, in each kind of store.

    In fp32 each output of each layer. In the run's precision the first layer's, in which no other's rounding is, and
    roughly the last hidden state.
    """
    texts = pieces(policy, text, (14, 9, 11))
    plans = [RolloutPlan(3, 1, 3, 13), RolloutPlan(3, 14, 0, 0)]
    if policy.device.type == "cuda":
        plans.append(RolloutPlan(3, 2 * PAGE, 3, 13, 7, PAGE))  # several pages a slot: another kernel
    than = "in a step from stored keys and values from what it is in its own forward"
    nexts = [ids[-1:] for ids in texts]  # any: what is looked at are the tokens that predict them
    with in_fp32(policy) as exact:
        batches = pack(texts, nexts, token_budget=100, pad_token_id=policy.pad_token_id, device=policy.device)
        with attending(policy.configs, "eager"):
            truth = outputs(exact, batches, len(texts))
        for plan in plans:
            reason = too_far(distances(_stepped(exact, texts, plan, torch.float32), truth), {})
            if reason:
                return f"{reason} {than}"
    first_layer = next(iter(truth)).rpartition(".")[0]
    for plan in plans if kv_dtype != torch.float32 else ():
        for name, error in distances(_stepped(policy, texts, plan, kv_dtype), truth).items():
            if not error <= (
                FIRST_LAYER if name.startswith(first_layer) else LAST_STATE if name == LAST else torch.inf
            ):
                return f"{name} is {error:.1g} away {than}"
    return None


def _stepped(policy: Policy, texts: list[list[int]], plan: RolloutPlan, kv_dtype: torch.dtype) -> dict[str, Tensor]:
    """What the layers make of each text's last token, decoded after a prefill of those before it."""
    store = Store(kv_shape(policy.base.config, kv_dtype), plan, kv_dtype, policy.device)
    scheduler = Scheduler(list(range(len(texts))), 1, len(texts), plan.prefixes, plan.pages, plan.page_tokens)
    slots = Slots(policy, store, plan, scheduler)
    found: dict[str, Tensor] = {}
    with policy.autocast(), attending(policy.configs):
        slots.admit(texts, prefill_tokens=100, ahead=1)
        slots.reserve(ahead=1)
        with outputs_kept(policy.decoder, lambda name, output: found.update({name: output[:, -1].float().cpu()})):
            slots.hidden(slots.rows)
    return found


class Ran(NamedTuple):
    """What a rollout made, and how."""

    completions: list[Completion]  # B, group after group
    plan: RolloutPlan  # the given one, or of its kind what was enough where all of it was not
    graphs: int  # replayed
    preempted: int  # times that a completion had to wait for pages
    out_of_memory: int  # times


class Parked(NamedTuple):
    """A completion that has to wait for pages: it goes on with the very keys and values that it had."""

    token: Tensor  # () the next to feed, on the device
    column: int  # where that goes
    seen: Tensor | None  # (V,) bool, on the device
    saved: list[list[Tensor]]  # its pages, in CPU memory


def run(
    policy: Policy,
    prompts: list[list[int]],
    num_generations: int,
    params: SamplingParams,
    plan: RolloutPlan,
    uniforms: Tensor,  # (B, max_completion_length) fp32 in [0, 1)
    prefill_tokens: int,
    kv_dtype: torch.dtype,  # the policy's, or int8
    graphs: bool,  # whether CUDA graphs may be captured
    dense: bool = False,  # whether the layers are those of dense weights, whose captures are others
) -> Ran:
    """num_generations completions of each prompt.

    Out of memory, everything in flight is let go, and what is not finished is begun again: once as it was, since what
    others could let go may be enough, and then with half of the slots.
    """
    done: dict[int, Completion] = {}
    captured, preempted, out_of_memory = 0, 0, 0
    now = plan
    while len(done) < len(prompts) * num_generations:
        todo = [i for i in range(len(prompts) * num_generations) if i not in done]
        now = now.at_most(len(todo))
        scheduler = Scheduler(todo, num_generations, now.slots, now.prefixes, now.pages, now.page_tokens)
        try:
            with as_torch_says_it():
                captured = _run(
                    policy, prompts, params, now, scheduler, uniforms, prefill_tokens, kv_dtype, graphs, dense, done
                )
        except torch.OutOfMemoryError as error:
            out_of_memory += 1
            if out_of_memory > 1 and now.slots == 1:
                error.add_note("One completion at a time does not fit. Lower max_completion_length or token_budget.")
                raise
            if out_of_memory > 1:  # what failed with few slots in use says nothing of all of them
                plan, now = now.halved() if now == plan else plan, now.halved()
        preempted += scheduler.preempted
        if len(done) < len(prompts) * num_generations:
            gc.collect()
        if policy.device.type == "cuda" and (graphs or len(done) < len(prompts) * num_generations):
            torch.cuda.empty_cache()  # the graphs' pool serves nobody else
    return Ran([done[i] for i in range(len(prompts) * num_generations)], plan, captured, preempted, out_of_memory)


def _run(
    policy: Policy, prompts: list[list[int]], params: SamplingParams, plan: RolloutPlan, scheduler: Scheduler,
    uniforms: Tensor, prefill_tokens: int, kv_dtype: torch.dtype, graphs: bool, dense: bool,
    done: dict[int, Completion],
) -> int:  # fmt: skip
    """Fill done; how many graphs were replayed for it."""
    store = Store(kv_shape(policy.base.config, kv_dtype), plan, kv_dtype, policy.device)
    slots = Slots(policy, store, plan, scheduler, params, uniforms)
    capture = CAPTURE.get(policy.device.type) if graphs else None
    adapters = [layer.disable_adapters for layer in plain_lora_layers(policy.base)]  # off in the base's own rollouts
    kind = params, kv_dtype, plan.shared, plan.paged, dense, any(adapters)
    captured = None if capture is None else Graphs(policy, slots.step, slots.state(), capture(), slots.held, kind)
    step = captured or slots.step
    finish_of = ending(policy, params)
    block = ASK_EVERY[policy.device.type]
    texts: dict[int, list[list]] = {}
    while scheduler.waiting or scheduler.running:
        for slot in slots.admit(prompts, prefill_tokens, block):
            texts.setdefault(scheduler.slots[slot], [[], [], [], []])  # type: ignore[arg-type]
        slots.reserve(block)
        slots.shrink(1 if captured is None else 2)
        made = torch.stack([slots.advance(step) for _ in range(block)]).tolist()  # one copy to the host for the block
        for slot, completion in enumerate(scheduler.slots):
            if completion is None:
                continue
            text = texts[completion]
            for tokens, *logprobs in made:
                for kept, value in zip(text, (int(tokens[slot]), *(x[slot] for x in logprobs)), strict=True):
                    kept.append(value)
                finish = finish_of(text[0])
                if finish is not None:
                    own, behaviour, proposal = (torch.tensor(values) for values in text[1:])
                    done[completion] = Completion(text[0], own, behaviour, proposal, finish)
                    del texts[completion]
                    scheduler.finish(slot)
                    break
    return 0 if captured is None else len(captured.replays)


class Slots:
    """The slots' tensors, of which the first `rows` are computed with, and the model that fills them."""

    def __init__(
        self, policy: Policy, store: Store, plan: RolloutPlan, scheduler: Scheduler,
        params: SamplingParams | None = None, uniforms: Tensor | None = None,
    ):  # fmt: skip
        """To step, and not only for hidden states, it takes params and uniforms."""
        self.uniforms = uniforms
        self.policy, self.store, self.plan, self.scheduler, self.params = policy, store, plan, scheduler, params
        self.rows = len(scheduler.slots)
        zeros = torch.zeros(3, self.rows, dtype=torch.int64, device=policy.device)
        # The next token to feed, where it stands in its text, and how many prompt tokens stand before the first fed.
        self.tokens, self.positions, self.prefilled = zeros
        self.completions = torch.zeros(self.rows, dtype=torch.int64, device=policy.device)
        self.columns = [0] * self.rows  # where each slot's next token goes, as the host knows it
        self.parked: dict[int, Parked] = {}  # by completion, until its pages are there again
        self.prefix_rows = torch.zeros_like(self.completions)
        self.members: tuple[Tensor, Tensor] | None = None  # and places, of a Decode
        self.table: Tensor | None = None  # filled with NOBODYS where a slot has no page
        if plan.paged:
            self.table = self.completions.new_full((self.rows, ceil(plan.slot_tokens / plan.page_tokens)), NOBODYS)
        elif policy.device.type == "cuda":
            self.table = torch.arange(self.rows, device=policy.device)[:, None]
        self.seen = None
        if params is not None and params.repetition_penalty != 1:
            shape = (self.rows, policy.head.weight.shape[0])
            self.seen = torch.zeros(shape, dtype=torch.bool, device=policy.device)

    def admit(self, prompts: list[list[int]], prefill_tokens: int, ahead: int) -> list[int]:
        """Start waiting completions in free slots, where `ahead` more tokens of all have room. The slots that are new.

        Their prompts are prefilled.
        """
        new, prefixes = self.scheduler.admit(self._ahead(ahead), lambda completion: self._more(completion, ahead))
        if not new:
            return new
        if self.table is None:
            self.store.own.clear(self._tensor(new))
            self.store.prefix.clear(self._tensor(prefixes))
        completions = [self.scheduler.slots[slot] for slot in new]
        asked = [self.scheduler.prompt_of(c) for c in completions]  # type: ignore[arg-type]
        if self.plan.shared:
            rows = {self.scheduler.prefixes[row]: [row] for row in prefixes}
            self._prefill(prompts, rows, self.store.prefix, prefill_tokens)
        else:
            rows = {prompt: [s for s, p in zip(new, asked, strict=True) if p == prompt] for prompt in asked}
            self._prefill(prompts, rows, self.store.own, prefill_tokens)
        at = self._tensor(new)
        lengths = [len(prompts[p]) - 1 for p in asked]
        self.tokens[at] = self._tensor([prompts[p][-1] for p in asked])
        self.positions[at] = self.prefilled[at] = self._tensor(lengths)
        self.completions[at] = self._tensor(completions)
        for slot, length in zip(new, lengths, strict=True):
            self.columns[slot] = 0 if self.plan.shared else length
        if self.seen is not None:
            self.seen[at] = False
            for slot, prompt in zip(new, asked, strict=True):
                self.seen[slot, self._tensor(prompts[prompt])] = True
        for slot, completion in zip(new, completions, strict=True):
            if completion in self.parked:
                self._go_on(slot, self.parked[completion])
        self._arrange()
        return new

    def _ahead(self, ahead: int) -> list[int]:
        """How many tokens each slot will hold."""
        return [min(column + ahead, self.plan.slot_tokens) for column in self.columns]

    def _more(self, completion: int, ahead: int) -> int:
        """The same of a completion that waits."""
        column = self.parked[completion].column if completion in self.parked else 0
        return min(column + ahead, self.plan.slot_tokens)

    def held(self) -> list[int]:
        """The rows in use that have a completion."""
        return [slot for slot, completion in enumerate(self.scheduler.slots[: self.rows]) if completion is not None]

    def _go_on(self, slot: int, parked: Parked) -> None:
        """In a slot that was just filled, from where the completion was; its pages follow when it has some."""
        self.tokens[slot] = parked.token
        self.positions[slot] += parked.column
        self.columns[slot] = parked.column
        if self.seen is not None and parked.seen is not None:
            self.seen[slot] = parked.seen

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.policy.device)

    def _prefill(self, prompts: list[list[int]], rows: dict, store: Rows, prefill_tokens: int) -> None:
        """Keys and values of prompt[:-1] into the rows of each prompt, in batches of about prefill_tokens."""
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
            with laid_out(Prefill(store, self._tensor(sources), self._tensor(targets))):
                self.policy.decoder(
                    input_ids=ids.to(self.policy.device), position_ids=self._tensor([list(range(width))]),
                    use_cache=False,
                )  # fmt: skip

    def _arrange(self) -> None:
        """Which slots read which prefix row."""
        if not self.plan.shared:
            return
        held = self.scheduler.prefixes
        members: list[list[int]] = [[] for _ in range(max(r for r, p in enumerate(held) if p is not None) + 1)]
        row_of = {prompt: row for row, prompt in enumerate(held) if prompt is not None}
        places, prefix_rows = [0] * self.rows, [0] * self.rows
        for slot, completion in enumerate(self.scheduler.slots[: self.rows]):
            if completion is not None:
                row = row_of[self.scheduler.prompt_of(completion)]
                prefix_rows[slot], places[slot] = row, len(members[row])
                members[row].append(slot)
        self.prefix_rows[: self.rows] = self._tensor(prefix_rows)
        if self.table is not None:
            return
        widest = max(map(len, members))
        filled = [slots + [0] * (widest - len(slots)) for slots in members]
        flat = [row * widest + place for row, place in zip(prefix_rows, places, strict=True)]
        self.members = self._tensor(filled), self._tensor(flat)

    def reserve(self, ahead: int) -> None:
        """Pages for so many more tokens of every slot that runs, from slots that started later if need be."""
        if not self.plan.paged:
            return
        assert self.table is not None
        held, completions = [list(pages) for pages in self.scheduler.pages], list(self.scheduler.slots)
        for slot in self.scheduler.reserve(self._ahead(ahead)):
            self._park(slot, completions[slot], held[slot])  # type: ignore[arg-type]
        # Only now, since they may have the pages of those.
        for slot, completion in enumerate(self.scheduler.slots):
            if completion in self.parked:
                parked = self.parked.pop(completion)
                self.store.own.copy_in(self._filled(self.scheduler.pages[slot], parked.column), parked.saved)
        width = self.table.shape[1]
        self.table.copy_(self._tensor([pages + [NOBODYS] * (width - len(pages)) for pages in self.scheduler.pages]))

    def _park(self, slot: int, completion: int, pages: list[int]) -> None:
        """Save what is in the pages that a slot had until now, which are still as they were."""
        column = self.columns[slot]
        if completion in self.parked or not column:  # not gone on since the last time, or not begun
            return
        seen = None if self.seen is None else self.seen[slot].clone()
        saved = self.store.own.copied_out(self._filled(pages, column))
        self.parked[completion] = Parked(self.tokens[slot].clone(), column, seen, saved)

    def _filled(self, pages: list[int], columns: int) -> Tensor:
        """Those of a slot's pages that have any of so many columns."""
        return self._tensor(pages[: ceil(columns / self.plan.page_tokens)])

    def shrink(self, times: int = 1) -> None:
        """Compute with fewer rows once nobody waits and a smaller bucket, of 1 / times at most, holds what still runs.

        A replay of 64 rows takes 1.04 times as long as one of 16 (1.5B, H200): a capture for each bucket would cost
        more than it saves.
        """
        rows = bucket(max(1, self.scheduler.running))
        if self.scheduler.waiting or rows >= self.rows or times * rows > self.rows:
            return
        moves = self.scheduler.compact(rows)
        if moves:
            sources, targets = (self._tensor(list(side)) for side in zip(*moves, strict=True))
            for values in (self.tokens, self.positions, self.prefilled, self.completions, self.seen):
                if values is not None:
                    values[targets] = values[sources]
            if self.plan.paged:
                assert self.table is not None
                self.table[targets] = self.table[sources]
            else:
                self.store.own.move(sources, targets)
            for source, target in moves:
                self.columns[target] = self.columns[source]
        self.rows = rows
        if self.scheduler.running:
            self._arrange()

    def hidden(self, rows: int) -> Tensor:
        """Feed each of the first S rows its next token: last hidden states (S, D)."""
        tokens, positions, prefilled = (x[:rows] for x in (self.tokens, self.positions, self.prefilled))
        columns = positions - prefilled if self.plan.shared else positions
        lengths, prefix_rows = (prefilled, self.prefix_rows[:rows]) if self.plan.shared else (None, None)
        members, places = self.members or (None, None)
        table, span = (None, self._span()) if self.table is None else (self.table[:rows], 0)
        now = Decode(self.store, columns, positions, span, lengths, members, places, prefix_rows, table, {})
        with laid_out(now):
            out = self.policy.decoder(input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False)
        return out.last_hidden_state[:, -1]

    def _span(self) -> int:
        needed = 1 + max(c for c, holder in zip(self.columns, self.scheduler.slots, strict=True) if holder is not None)
        return min(self.plan.slot_tokens, -(-needed // SPAN) * SPAN)

    def state(self) -> list[Tensor]:
        """What a step changes, but for the keys and values, which it would only write again."""
        return [self.tokens, self.positions, *(() if self.seen is None else (self.seen,))]

    def step(self, rows: int) -> Tensor:
        """One more token of each of the first `rows`: (4, rows) fp64, which holds ids and fp32 alike, as a Choice has.

        With a table it depends on nothing that only the host knows, but on rows.
        """
        assert self.params is not None and self.uniforms is not None
        now = (self.positions - self.prefilled)[:rows]
        logits = self.policy.logits(self.hidden(rows))
        seen = None if self.seen is None else self.seen[:rows]
        choice = choose(logits, self.uniforms[self.completions[:rows], now], seen, self.params)
        if seen is not None:
            seen.scatter_(1, choice.tokens[:, None], True)
        self.tokens[:rows] = choice.tokens
        # A slot that ended since the host last looked, or holds nothing, writes its last column again and again.
        last = self.prefilled + self.uniforms.shape[1] - 1
        torch.minimum(self.positions + 1, last, out=self.positions)
        return torch.stack([values.double() for values in choice])

    def advance(self, step: Callable[[int], Tensor]) -> Tensor:
        """What a step, this one's own or a replay of it, gives for the rows in use."""
        made = step(self.rows)
        self.columns = [min(column + 1, self.plan.slot_tokens - 1) for column in self.columns]
        return made
