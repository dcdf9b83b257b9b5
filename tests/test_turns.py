"""Completions of several turns: what is not drawn is fed, and a turn goes on from what the one before left."""

from dataclasses import replace

import pytest
import torch
from test_generate import PROMPTS, ShapedSampler, ids_of, own_logprobs, paged_shapes, shapes, slow
from test_graphs import recorder
from tiny_models import make_policy

from lowmem_grpo.generate import engine, graphs, slots
from lowmem_grpo.generate.shape import StoreShape

LENGTH, COUNT = 40, 3


class Script:
    """Up to three replies to each completion, of at most 11 tokens; some are promised, and not given."""

    def __init__(self):
        self.spans: dict[int, list[tuple[int, int]]] = {}
        self.coming: dict[int, list[int]] = {}
        self.ends: list[int] = []

    def end(self, number, completion):
        self.ends.append(number)
        spans, have = self.spans.setdefault(number, []), len(completion.ids)
        size = (3 * number + 5 * len(spans)) % 12
        if completion.finish == "length" or len(spans) == 3 or have + size >= LENGTH:
            return False
        if number % 5 == 4 and spans:
            return True
        self.coming[number] = [(40 + 7 * number + place) % 90 + 5 for place in range(size)]
        spans.append((have, have + size))
        return True

    def answers(self):
        answers, self.coming = self.coming, {}
        return answers


def policy_of(family, **settings):
    """A policy whose turns end at one token of five."""
    policy = make_policy(family, **settings)
    policy.eos_token_ids = list(range(0, policy.head.weight.shape[0], 5))
    return policy


def in_turns(policy, shape=None, num_generations=COUNT, prompts=PROMPTS, turns=None, **params):
    """Completions, what was asked about them, and the metrics."""
    turns = turns or Script()
    settings = {name: params.pop(name) for name in ("rollout_kv", "rollout_weights") if name in params}
    sampler = ShapedSampler(policy, shape, max_completion_length=LENGTH, **{"rollout_weights": "4bit", **settings})
    torch.manual_seed(0)
    sampled = sampler._sample(prompts, num_generations, replace(sampler.params, **params), turns=turns)
    return sampled.completions, turns, sampled.metrics


@pytest.mark.parametrize(
    ("family", "kv"),
    [("qwen2", "full"), ("gemma2", "int8"), ("qwen3_5_text", "full"), slow("bamba", "full"), slow("gpt_oss", "full"), slow("lfm2", "int8")],
)  # fmt: skip
@pytest.mark.parametrize("stored", ["shared", "in slots", "paged", "short of pages"])
def test_log_probabilities_are_those_of_a_training_forward(family, kv, stored, monkeypatch):
    """Of all tokens that were drawn, whatever stood between."""
    policy = policy_of(family)
    every = [*shapes(PROMPTS, COUNT, LENGTH, 4), *paged_shapes(PROMPTS, COUNT, LENGTH, 4)]
    shape = every[["shared", "in slots", "paged", "short of pages"].index(stored)]
    completions, turns, metrics = in_turns(policy, shape, rollout_kv=kv)
    assert sum(len(spans) for spans in turns.spans.values()) > len(completions) > 4
    assert (metrics["rollout/preempted"] > 0) == (stored == "short of pages")
    check(policy, completions, turns, 8e-5 if kv == "full" else 0.05)


def check(policy, completions, turns, bound):
    for number, one in enumerate(completions):
        assert turns.ends.count(number) == len(turns.spans[number]) + 1
        assert len(one.ids) == len(one.logprobs) <= LENGTH
        for place, (start, stop) in enumerate(turns.spans[number]):
            size = (3 * number + 5 * place) % 12
            assert one.ids[start:stop] == [(40 + 7 * number + i) % 90 + 5 for i in range(size)]
        drawn = was_drawn(turns, number, one)
        assert drawn[-1]
        truth = own_logprobs(policy, PROMPTS[number // COUNT], one, 1.0).cpu()
        torch.testing.assert_close(one.logprobs[drawn], truth[drawn], atol=bound, rtol=0)


def was_drawn(turns, number, completion):
    drawn = torch.ones(len(completion.ids), dtype=torch.bool)
    for start, stop in turns.spans[number]:
        drawn[start:stop] = False
    return drawn


@pytest.fixture(scope="module")
def undisturbed():
    """What is drawn with room for all, by family: made once."""
    known = {}

    def drawn(policy, family, params):
        if family not in known:
            known[family] = in_turns(policy, next(shapes(PROMPTS, COUNT, LENGTH, 9)), **params)
        return known[family]

    return drawn


@pytest.mark.parametrize(
    "setting", ["short", "all at once", "in slots", "asked late", "replayed", "dense", "out of memory", "no CPU memory"]
)
@pytest.mark.parametrize(
    ("family", "params"),
    [
        ("qwen2", {"repetition_penalty": 1.4}), ("qwen3_5_text", {}), slow("gemma2", {"temperature": 0}),
        slow("bamba", {"top_k": 20, "repetition_penalty": 1.4}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_drawn_depends_on_nothing_else(family, params, setting, undisturbed, monkeypatch):
    """Neither on the store, nor on what is drawn behind an end before it is seen, nor on what is computed anew."""
    policy = policy_of(family)
    truth, before, _ = undisturbed(policy, family, params)
    shape = list(paged_shapes(PROMPTS, COUNT, LENGTH, 4))[1]
    if setting == "all at once":
        shape = None
    elif setting == "in slots":
        shape = list(shapes(PROMPTS, COUNT, LENGTH, 2))[1]
    elif setting in ("asked late", "replayed", "dense"):
        monkeypatch.setitem(engine.ASK_EVERY, "cpu", 8)
    if setting == "dense":
        params = params | {"rollout_weights": "dense"}
    if setting in ("replayed", "dense"):
        monkeypatch.setattr(graphs, "EAGER", 2)
        monkeypatch.setitem(engine.CAPTURE, "cpu", recorder)
    elif setting == "out of memory":
        fail_now_and_then(monkeypatch)
    elif setting == "no CPU memory":
        monkeypatch.setattr(slots, "LEFT_FREE", 2**60)
    found, turns, metrics = in_turns(policy, shape, **params)
    assert ids_of(found) == ids_of(truth) and turns.spans == before.spans
    assert sorted(turns.ends) == sorted(before.ends), "each turn ended once"
    assert (metrics["rollout/out_of_memory"] > 1) == (setting == "out of memory")
    assert (metrics["rollout/replayed_share"] > 0.5) == (setting in ("replayed", "dense"))
    assert metrics["rollout/cuda_graphs"] <= 3, "of 1, 2 and 4 rows, whatever goes on"
    for number, (ours, theirs) in enumerate(zip(found, truth, strict=True)):
        drawn = was_drawn(turns, number, ours)
        torch.testing.assert_close(ours.logprobs[drawn], theirs.logprobs[drawn], atol=2e-5, rtol=0)
        assert not ours.logprobs[~drawn].any()


def fail_now_and_then(monkeypatch):
    """Out of memory in some steps, and where a turn is saved."""
    step, set_aside, count = engine.Slots.step, engine.Slots.set_aside, [0]

    def failing(own):
        def call(*given):
            count[0] += 1
            if count[0] in (7, 40, 90):
                raise torch.OutOfMemoryError("made up")
            return own(*given)

        return call

    monkeypatch.setattr(engine.Slots, "step", failing(step))
    monkeypatch.setattr(engine.Slots, "set_aside", failing(set_aside))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.4}, {"rollout_weights": "dense"}], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3_5_text"])
def test_turns_on_a_gpu(family, params):
    """Eight tokens at a time and by graphs, with and without pages, and with too few."""
    policy = policy_of(family, use_cpu=False)
    pages = [StoreShape(9, LENGTH, 3, 79, count, 16) for count in (28, 12)]
    for shape in (*shapes(PROMPTS, COUNT, LENGTH, 9), *pages):
        completions, turns, _ = in_turns(policy, shape, **params)
        check(policy, completions, turns, 3e-4)
