"""A trial of a fast step beside the model's own layers: what each calls attention with, and what it adds.

Each layer is given the first one's input. The residual stream of a deep layer is so large that its rounding in 16 bits
would hide what the layer adds, or feign a difference; the embedding's rows are small beside that.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_grpo.generate.layouts import Decode
from lowmem_grpo.generate.scheduler import Scheduler
from lowmem_grpo.generate.shape import PAGE, StoreShape
from lowmem_grpo.generate.slots import Slots
from lowmem_grpo.generate.step import FastStep
from lowmem_grpo.generate.store import Store
from lowmem_grpo.kernels.decode_layer import normed
from lowmem_grpo.model.attention import Scoring, attending, laid_out
from lowmem_grpo.model.layer_shapes import LayerShape
from lowmem_grpo.model.outline import Listening, Unknown, read
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.trial import TEXTS, WINDOW, distance, narrow_windows, pieces, softened

# How far off a result may be, relative to its norm. In fp32 tiny models of 19 families are 4e-7 off, and with a share,
# scale or gain that is 1 % wrong 1e-3 or more. In 16 bits they are 0.02 off, so that only structure is held there; the
# numbers come from calls and from probes in fp32.
EXACT, ROUGH = 1e-4, 3e-2
LENGTHS = (24, 17)  # tokens of the texts, more than WINDOW


def known_step(policy: Policy, num_positions: int) -> FastStep:
    """A fast step for the adapters that are worn now, with so many positions at least.

    Raises:
        Unknown: the model's layers are not understood, or a step computes something else than they do.
    """
    fast = FastStep(policy, read(policy), num_positions)
    reason = difference(fast)
    if reason:
        raise Unknown(reason)
    return fast


def difference(fast: FastStep) -> str | None:
    """A sentence on the first result that differs from the model's own, or None."""
    policy = fast.policy
    limit = EXACT if policy.dtype == torch.float32 else ROUGH
    with fast.ready(dense=False), policy.inference(), attending(policy.configs):
        for distances in (_of_calls, _of_results):
            for name, error in distances(fast):
                if not error <= limit:  # a NaN is too far, too
                    return f"{name} is {error:.1g} away from the model's own"
    return None


def _of_calls(fast: FastStep) -> Iterator[tuple[str, float]]:
    """Distances of what attention is called with, by name, up to the last position and for windows of any length."""
    policy, last = fast.policy, fast.num_positions - 1
    positions = torch.tensor([0, 1, 7, last // 2, last], device=policy.device)
    ids = torch.tensor(pieces(policy, TEXTS[0], [len(positions)]), device=policy.device)
    listening = Listening()
    with policy.autocast(), laid_out(listening), _fed_alike(policy.decoder.layers) as seen:
        policy.decoder(input_ids=ids, position_ids=positions[None], use_cache=False)
    table = torch.arange(len(positions), device=policy.device)[:, None]
    for index, layer in enumerate(fast.outline.layers):
        call = listening.calls[index]
        asked = Scoring(index, layer.scaling, layer.window, layer.softcap, call.asked.sink)
        if call.asked != asked or call.asked.sink is not layer.sink:
            yield f"the scaling, window, softcap or sinks of layer {index}", torch.inf
        kv = {index: LayerShape(call.query.shape[1], layer.kv_heads, layer.head_dim, index)}
        pages = StoreShape(len(positions), PAGE, 1, 1, len(positions), PAGE)  # of a token each
        store = Store(kv, pages, policy.dtype, policy.device)
        h = normed(seen[index][0][0], layer.before[0])
        query = fast.heads(index, h, store, layer=index, table=table, positions=positions, prefilled=positions)
        key, value = store.own.groups[0].numbers[0, :, :, :, 0]
        for name, ours, theirs in (("query", query, call.query), ("key", key, call.key), ("value", value, call.value)):
            yield f"the {name} of layer {index}", distance(ours, theirs[0].transpose(0, 1))


def _of_results(fast: FastStep) -> Iterator[tuple[str, float]]:
    """Distances of what each layer adds in a step from stored keys and values, by name.

    Windows are narrow, and attention is soft.
    """
    policy = fast.policy
    texts = pieces(policy, TEXTS[0], LENGTHS)
    shape = StoreShape(len(texts), PAGE, len(texts), max(LENGTHS) - 1, 1 + len(texts), PAGE)
    store = Store(policy.layer_shapes, shape, policy.dtype, policy.device)
    scheduler = Scheduler([*range(len(texts))], 1, len(texts), shape.prefixes, shape.pages, shape.page_tokens)
    slots = Slots(policy, store, shape, scheduler)
    with policy.autocast(), narrow_windows(policy.base), _fed_alike(policy.decoder.layers) as seen:
        slots.admit(texts, prefill_tokens=100, ahead=1)
        slots.reserve(ahead=1)
        now = slots.layout(len(texts))
        soft = Soft(now)
        with laid_out(soft):
            last = policy.decoder(
                input_ids=slots.token_ids[:, None], position_ids=slots.positions[:, None], use_cache=False
            ).last_hidden_state[:, 0]
    near = copy.copy(fast)
    near.outline = replace(
        fast.outline,
        layers=[
            replace(layer, window=layer.window and min(WINDOW, layer.window), scaling=soft.scalings[index])
            for index, layer in enumerate(fast.outline.layers)
        ],
    )
    yield "its embedding", distance(fast.begin(slots.token_ids)[0], seen[0][0][:, 0])
    for index, layer in enumerate(near.outline.layers):
        given, theirs = (x[:, 0] for x in seen[index])
        stream = given.clone(memory_format=torch.contiguous_format)
        near.layer(index, stream, normed(stream, layer.before[0]), None, now)
        yield f"what layer {index} adds", distance(stream.float() - given.float(), theirs.float() - given.float())
    yield "its last hidden state", distance(normed(seen[-1][1][:, 0], fast.outline.norm), last)


class Soft:
    """A Decode whose scores are softened().

    Attributes:
        scalings: what the scores of each layer were multiplied by.
    """

    def __init__(self, now: Decode):
        self.now = now
        self.scalings: dict[int, float] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        soft = softened(query, key, asked)
        self.scalings[asked.layer] = soft.scaling
        return self.now.attend(query, key, value, soft)


@contextlib.contextmanager
def _fed_alike(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Give each layer the first one's input inside the `with`; yields input and output of each in the last forward."""
    inputs: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []

    def feed(index: int, _: Any, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if index == 0:
            inputs[:] = [arguments[0] if arguments else keywords["hidden_states"]]
            seen.clear()
        if arguments:
            return (inputs[0], *arguments[1:]), keywords
        return arguments, keywords | {"hidden_states": inputs[0]}

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append((inputs[0], output[0] if isinstance(output, tuple) else output))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    hooks += [
        layer.register_forward_pre_hook(partial(feed, index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
