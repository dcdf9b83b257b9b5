"""Sampling from the resident weights: slots that are refilled as completions end, prompts prefilled once a group.

A completion's token t is drawn by inverse CDF from uniforms[completion, t], and a row of a batch does not depend on the
others. So which completions share a batch, in what order they start and how often one has to wait does not change
what is sampled, up to the rounding of the matrix products, which in fp32 is far below what moves a token.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.ending import ending
from lowmem_grpo.generate.graphs import Captures, Counts, Graphs, Kept, cuda_capture
from lowmem_grpo.generate.sampling import SamplingParams
from lowmem_grpo.generate.scheduler import Scheduler
from lowmem_grpo.generate.shape import PAGE, StoreShape, stored
from lowmem_grpo.generate.slots import Parked, Slots
from lowmem_grpo.generate.states import OWN, States, StateShapes, state_shapes
from lowmem_grpo.generate.step import FastStep
from lowmem_grpo.generate.store import Store, can_outlive, goes_by_table
from lowmem_grpo.generate.turns import Turns
from lowmem_grpo.generate.weights import fast_linears
from lowmem_grpo.kernels.decode_attention import prefix_splits
from lowmem_grpo.model.attention import attending
from lowmem_grpo.model.attention import refusal as attention_refusal
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.trial import LAST, distances, in_fp32, outputs, outputs_kept, pieces, refused, too_far
from lowmem_grpo.out_of_memory import tried_again

# How far a step in 16 bits may be from the fp32 truth in the first layer, where SmolLM2 and Gemma 3 270M are 0.017 away
# at most, with int8 keys and values, and in its last hidden state, after the rounding of all layers: 0.18.
FIRST_LAYER, LAST_STATE = 0.1, 0.5
# A GPU is asked what it sampled only every so many tokens; a slot that ended in between goes on for nothing until then.
ASK_EVERY = {"cuda": 8, "cpu": 1}
CAPTURE = {"cuda": cuda_capture}


def refusal(policy: Policy, kv_dtype: torch.dtype) -> str | None:
    """Why this model cannot be sampled from here, or None. Runs it on a few tokens, beside its own forward."""
    reason = attention_refusal(policy.base) or policy.state_refusal
    return reason or refused(policy, partial(_difference, kv_dtype=kv_dtype))


def _difference(policy: Policy, text: str, kv_dtype: torch.dtype) -> str | None:
    """Name the layer whose output, from stored keys and values, differs from the model's own forward; or None.

    In fp32 each output of each layer. In the run's precision the first layer's, in which no other's rounding is, and
    roughly the last hidden state.
    """
    texts = pieces(policy, text, (14, 9, 11))
    shapes = [StoreShape(3, 2, 3, 13), StoreShape(3, 14, 0, 0)]
    if policy.device.type == "cuda":
        shapes.append(StoreShape(3, 2 * PAGE, 3, 13, 7, PAGE))  # several pages a slot: another kernel
    than = "in a step from stored keys and values from what it is in its own forward"
    nexts = [ids[-1:] for ids in texts]  # any: what is looked at are the tokens that predict them
    with in_fp32(policy) as exact:
        batches = pack(texts, nexts, token_budget=100, pad_token_id=policy.pad_token_id, device=policy.device)
        with attending(policy.configs, "eager"):
            truth = outputs(exact, batches, len(texts))
        for shape in shapes:
            reason = too_far(distances(_stepped(exact, texts, shape, torch.float32), truth), {})
            if reason:
                return f"{reason} {than}"
    first_layer = next(iter(truth)).rpartition(".")[0]
    for shape in shapes if kv_dtype != torch.float32 else ():
        for name, error in distances(_stepped(policy, texts, shape, kv_dtype), truth).items():
            if not error <= (
                FIRST_LAYER if name.startswith(first_layer) else LAST_STATE if name == LAST else torch.inf
            ):
                return f"{name} is {error:.1g} away {than}"
    return None


def _stepped(policy: Policy, texts: list[list[int]], shape: StoreShape, kv_dtype: torch.dtype) -> dict[str, Tensor]:
    """The layers' outputs at each text's last token, decoded after a prefill of those before it.

    Where layers keep a state the last two are decoded, the second from states that the first left.
    """
    shapes = state_shapes(policy)
    states = States(shapes, shape, policy.device) if shapes else None
    decoded = 2 if shapes else 1
    store = Store(policy.layer_shapes, shape, kv_dtype, policy.device)
    scheduler = Scheduler(list(range(len(texts))), 1, len(texts), shape.prefixes, shape.pages, shape.page_tokens)
    slots = Slots(policy, store, shape, scheduler, states=states)
    found: dict[str, Tensor] = {}
    with policy.autocast(), attending(policy.configs):
        slots.admit([ids[: len(ids) - decoded + 1] for ids in texts], prefill_tokens=100, ahead=decoded)
        slots.reserve(ahead=decoded)
        if shapes:
            slots.hidden(slots.num_rows)
            slots.feed([ids[-1] for ids in texts])
        with outputs_kept(policy.decoder, lambda name, output: found.update({name: output[:, -1].float().cpu()})):
            slots.hidden(slots.num_rows)
    return found


@dataclass(frozen=True)
class Request:
    """B = prompts x num_generations completions to sample, and from what."""

    policy: Policy
    prompts: list[list[int]]
    num_generations: int
    params: SamplingParams
    uniforms: Tensor  # (B, max_completion_length) fp32 in [0, 1)
    prefill_tokens: int  # of prompts that go through the model at once
    kv_dtype: torch.dtype  # the policy's, or int8
    dense: bool  # whether 4-bit layers are dequantized once for all
    captures: Captures | None  # None: no step is captured as a CUDA graph
    fast: FastStep | None  # None: the model's own layers decode
    states: StateShapes = field(default_factory=dict)  # of its layers that keep one
    turns: Turns | None = None  # what stands between the turns of completions; None: they have one each


class Turned(NamedTuple):
    """A completion with a turn behind it, as far as it is."""

    ids: list[int]
    logprobs: Tensor  # (T, 2) fp32 on the CPU, 0 of what was not drawn
    parked: Parked | None  # what it goes on with; None: from its prompt on

    def answered(self, ids: list[int]) -> "Turned":
        """This, with tokens behind it that are not drawn."""
        return self._replace(ids=[*self.ids, *ids], logprobs=torch.cat([self.logprobs, torch.zeros(len(ids), 2)]))


@dataclass
class _Text:
    """A completion that is drawn."""

    ids: list[int]
    known: list[Tensor]  # (T, 2) log-probabilities of some of its tokens each, and of some behind the last
    behind: int  # number of tokens before this turn

    @staticmethod
    def going_on(turned: Turned | None) -> "_Text":
        """A completion in its first turn, or in the one after another."""
        return _Text([], [], 0) if turned is None else _Text([*turned.ids], [turned.logprobs], len(turned.ids))

    @property
    def turn(self) -> list[int]:
        """The tokens of this turn."""
        return self.ids[self.behind :] if self.behind else self.ids


class Ran(NamedTuple):
    """The completions of a rollout, and how they came about."""

    completions: list[Completion]  # B, group after group
    shape: StoreShape  # the given one, or a smaller one of its kind that fitted after an out-of-memory
    graphs: int  # that steps were replayed from
    replayed_share: float  # of the steps of decoding
    capture_s: float  # time in captures
    preempted: int  # times that a completion had to wait for pages
    out_of_memory: int  # times


def run(request: Request, shape: StoreShape) -> Ran:
    """Sample the completions of a request, in a store of the given shape.

    Out of memory, everything in flight is let go, and what is not finished is begun again: once as it was, since what
    others could let go may be enough, and then with half of the slots.
    """
    policy, count = request.policy, len(request.prompts) * request.num_generations
    done: dict[int, Completion] = {}  # with the turn that is drawn
    turned: dict[int, Turned] = {}  # those that go on after it, or came to it after another
    captures = _captures(request, shape)
    preempted, out_of_memory, num_graphs = 0, 0, 0
    now = shape

    def attempt() -> None:
        nonlocal now, preempted
        todo = [i for i in range(count) if i not in done]
        if captures is None:  # else numbers of rows that are captured follow from the number of slots
            now = now.at_most(len(todo))
        scheduler = Scheduler(todo, request.num_generations, now.slots, now.prefixes, now.pages, now.page_tokens)
        try:
            _run(request, now, scheduler, done, turned, captures)
        finally:
            preempted += scheduler.preempted

    def failed(error: torch.OutOfMemoryError) -> None:
        nonlocal shape, now, out_of_memory
        out_of_memory += 1
        if captures is not None:
            captures.drop_graphs()
            captures.kept.forget(OWN)  # which the next attempt may need fewer of
        if out_of_memory > 1 and now.slots == 1:
            error.add_note("One completion at a time does not fit. Lower max_completion_length or token_budget.")
            raise error
        if out_of_memory > 1:  # what failed with few slots in use says nothing of all of them
            shape, now = now.halved() if now == shape else shape, now.halved()

    while len(done) < count:
        with _ready(request, captures):
            tried_again(attempt, failed)
        if captures is not None:
            num_graphs = max(num_graphs, len(captures.replays))
            if not captures.last or captures.refusal is not None or not _can_last(request):
                captures.release()
                if policy.device.type == "cuda":
                    torch.cuda.empty_cache()  # the graphs' pool serves nobody else
        answers = {} if request.turns is None else request.turns.answers()
        turned = {i: turned[i].answered(ids) for i, ids in answers.items()}
        for i in answers:
            del done[i]
        now = shape
    counts = Counts() if captures is None else captures.counts
    share = counts.replayed / counts.steps if counts.steps else 0.0
    completions = [done[i] for i in range(count)]
    return Ran(completions, shape, num_graphs, share, counts.capture_s, preempted, out_of_memory)


@contextlib.contextmanager
def _ready(request: Request, captures: Captures | None) -> Iterator[None]:
    """The policy ready to decode: its weights as steps read them, and its attention as the engine has it."""
    policy = request.policy
    keeping: dict[str, Any] = {} if captures is None else {"copy": captures.kept.copy}
    with contextlib.ExitStack() as ready:
        if request.fast is not None:
            kept = None if captures is None else captures.kept
            shared = ready.enter_context(request.fast.ready(dense=request.dense, kept=kept))
            keeping |= {"matrices": shared.matrices, "factors": shared.factors}
        linears = fast_linears(policy.base, policy.dtype, dense=request.dense, **keeping)
        for context in (policy.inference(), policy.autocast(), attending(policy.configs), linears):
            ready.enter_context(context)
        yield


def _captures(request: Request, shape: StoreShape) -> Captures | None:
    """The request's, with its counts at 0; or None where steps are not captured."""
    device, captures = request.policy.device, request.captures
    if captures is None or device.type not in CAPTURE or not goes_by_table(shape, device):
        return None
    captures.counts = Counts()
    return captures


def _can_last(request: Request) -> bool:
    """Whether all that a graph reads may stay: no copy of the weights, nor a store by its own address."""
    return not request.dense and can_outlive(request.policy.device)


def _run(
    request: Request, shape: StoreShape, scheduler: Scheduler, done: dict[int, Completion], turned: dict[int, Turned],
    captures: Captures | None,
) -> None:  # fmt: skip
    """Sample a turn of the scheduler's completions into done, and into turned those that may go on."""
    policy, params, kv_dtype = request.policy, request.params, request.kv_dtype
    lasting = Kept() if captures is None else captures.kept
    layers = policy.layer_shapes
    names = [f"addresses of group {number}" for number, _ in enumerate(stored(layers))]
    addresses = [lasting.zeros(name, (5,), torch.int64, policy.device) for name in names]
    store = Store(layers, shape, kv_dtype, policy.device, addresses)
    states = None
    if request.states:
        states = States(request.states, shape, policy.device, None if captures is None else lasting)
    slots = Slots(policy, store, shape, scheduler, params, request.uniforms, lasting, request.fast, states)
    step: Callable[[int], Tensor] = slots.step
    if captures is not None:
        captures.in_new_pool = CAPTURE[policy.device.type]
        assert slots.table is not None
        kind = (  # all that a recorded step holds besides its number of rows and what is in memory
            params, kv_dtype, store.own.num_tokens, slots.table.shape[1], shape.shared,
            prefix_splits(shape.prefix_tokens), request.dense, policy.adapters.worn,
            request.fast and request.fast.num_positions,
        )  # fmt: skip
        step = Graphs(captures, slots.step, slots.state(), slots.held, kind, None if states is None else states.commit)
    finish_of = ending(policy, params)
    length = params.max_completion_length
    # What is drawn behind a turn's end would stay in states, and in what a penalty has seen.
    only_one = request.turns is not None and (states is not None or slots.seen is not None)
    block = 1 if only_one else ASK_EVERY[policy.device.type]
    slots.parked = {i: text.parked for i, text in turned.items() if text.parked is not None and i not in done}
    texts: dict[int, _Text] = {}
    for i in scheduler.waiting:
        texts[i] = _Text.going_on(turned.get(i))
        if texts[i].ids:
            slots.given[i] = texts[i].ids[slots.parked[i].fed if i in slots.parked else 0 :]

    def ended(slot: int, text: _Text, finish: str) -> None:
        completion = scheduler.slots[slot]
        assert completion is not None
        turned.pop(completion, None)  # whose keys and values nobody needs any more
        known = torch.cat(text.known)[: len(text.ids)]
        own, proposal = (values.clone() for values in known.unbind(1))
        done[completion] = Completion(text.ids, own, proposal, finish)
        if request.turns is not None and request.turns.end(completion, done[completion]):
            turned[completion] = Turned(text.ids, known, None)  # out of memory from here on, it is begun anew
            prompt = request.prompts[scheduler.prompt_of(completion)]
            turned[completion] = Turned(text.ids, known, slots.set_aside(slot, prompt, text.ids))
        scheduler.finish(slot)

    while scheduler.waiting or scheduler.running:
        slots.admit(request.prompts, request.prefill_tokens, block)
        slots.reserve(block)
        slots.shrink(captured=captures is not None)
        to_come = [length - len(texts[i].ids) + len(slots.given.get(i, ())) for i in scheduler.slots if i is not None]
        steps = min(block, max(to_come))
        given = slots.give(steps)
        made = torch.stack([slots.advance(step, number) for number in range(steps)]).cpu()  # one copy to the host
        token_ids, logprobs = made[:, 0].long().t().tolist(), made[:, 1:].float().unbind(2)
        for slot, completion in enumerate(scheduler.slots):
            if completion is None:
                continue
            text, drawn = texts[completion], slice(given[slot], None)
            text.known.append(logprobs[slot][drawn])
            for token_id in token_ids[slot][drawn]:
                text.ids.append(token_id)
                finish = finish_of(text.turn) or ("length" if len(text.ids) == length else None)
                if finish is not None:
                    ended(slot, texts.pop(completion), finish)
                    break
