import warnings
from dataclasses import replace
from functools import partial
from math import ceil
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, make_model, make_policy
from tokenizers import Tokenizer, decoders, models
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import (
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.errors import InputError
from lowmem_grpo.generate import engine, hf, layouts, store
from lowmem_grpo.generate import shape as shape_module
from lowmem_grpo.generate.ending import ending
from lowmem_grpo.generate.hf import generation_config
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.generate.sampling import SamplingParams, choose, penalize, truncate
from lowmem_grpo.generate.scheduler import Scheduler
from lowmem_grpo.generate.shape import StoreShape, bucket, store_shape, token_bytes
from lowmem_grpo.generate.store import Store, dequantized, quantized
from lowmem_grpo.generate.weights import dense_bytes, fast_linears
from lowmem_grpo.kernels.decode_attention import decode_attention, write_token
from lowmem_grpo.model import packed_attention
from lowmem_grpo.model.attention import Scoring
from lowmem_grpo.model.layer_shapes import LayerShape
from lowmem_grpo.model.lora import plain_lora_layers
from lowmem_grpo.model.packing import pack
from lowmem_grpo.planner.trace import Live

# Of one token, of a few, and of more than a sliding window and than shape.SHARE_FROM.
PROMPTS = [[10], [20, 21, 22, 23, 24, 25], list(range(5, 85))]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def in_turn(names, *values):
    """(name, value): every name with one of the values, in turn; the other pairs are slow."""
    names = sorted(names)
    pairs = [(i % len(values) == j, name, value) for i, name in enumerate(names) for j, value in enumerate(values)]
    return [(name, value) if quick else slow(name, value) for quick, name, value in pairs]


class ShapedSampler(Sampler):
    """Samples with a given shape, if any, and without a trial of the model, which has tests of its own."""

    def __init__(self, policy, shape=None, **settings):
        config = {"max_completion_length": 12, "rollout_token_budget": 10_000, "token_budget": 100, **settings}
        super().__init__(policy, GRPOConfig(**config))
        self.given = shape
        self.engine_refusal = None

    def store_shape(self, prompts, count, tokens):
        return self.given or super().store_shape(prompts, count, tokens)

    def sampled(self, num_generations=3, seed=0, prompts=PROMPTS, **params):
        torch.manual_seed(seed)
        return self._sample(prompts, num_generations, replace(self.params, **params))

    def run(self, *given, **params):
        return self.sampled(*given, **params).completions


def run(
    policy, num_generations=3, seed=0, prompts=PROMPTS, shape=None, weights="auto", kv="full", max_completion_length=12,
    **params,
):  # fmt: skip
    settings = dict(rollout_weights=weights, rollout_kv=kv, max_completion_length=max_completion_length)
    return ShapedSampler(policy, shape, **settings).run(num_generations, seed, prompts, **params)


def shapes(prompts, num_generations, tokens, slots):
    """Shapes of so many slots, prompts shared and not."""
    longest = max(map(len, prompts)) - 1
    yield StoreShape(slots, tokens, min(len(prompts), 2 * ceil(slots / num_generations)), max(1, longest))
    yield StoreShape(slots, tokens + longest, 0, 0)


def paged_shapes(prompts, num_generations, tokens, slots):
    """Pages for every slot at full length, and for one at full length: there most are sent back."""
    longest, prefixes = max(map(len, prompts)) - 1, min(len(prompts), 2 * ceil(slots / num_generations))
    for pages in (slots * ceil(tokens / 4), ceil(tokens / 4)):
        yield StoreShape(slots, tokens, prefixes, max(1, longest), 1 + pages, 4)


def as_prompts(prompts):
    return [Prompt("", ids, {}) for ids in prompts]


def ids_of(completions):
    return [c.ids for c in completions]


def own_logprobs(policy, prompt, completion, temperature):
    with policy.inference(), policy.autocast():
        logits = policy.model(input_ids=torch.tensor([prompt + completion.ids], device=policy.device)).logits[0].float()
    chosen = torch.tensor(completion.ids, device=policy.device)[:, None]
    return (logits / temperature)[len(prompt) - 1 : -1].log_softmax(-1).gather(1, chosen)[:, 0]


@pytest.mark.parametrize(
    ("family", "truncation"),
    in_turn(FAMILIES, {}, {"top_k": 3}, {"top_p": 0.5, "repetition_penalty": 1.3, "min_p": 0.1}, {"temperature": 0}),
)
def test_logprobs_are_those_of_a_training_forward(family, truncation):
    """Under temperature and before truncation; 9e-6 apart in fp32, with 4-bit weights and adapters."""
    policy = make_policy(family)
    params = {"temperature": 0.8, **truncation}
    for index, completion in enumerate(run(policy, **params)):
        truth = own_logprobs(policy, PROMPTS[index // 3], completion, params["temperature"] or 1.0)
        torch.testing.assert_close(completion.logprobs, truth, atol=4e-5, rtol=0)


def test_what_generate_raises_is_said_in_one_sentence(monkeypatch):
    policy = make_policy()

    def fails(**_):
        raise ValueError("matC_old has wrong shape")

    monkeypatch.setattr(policy.base, "generate", fails)
    with pytest.raises(
        InputError, match="generate, which samples from Qwen2ForCausalLM, fails: matC_old has wrong shape"
    ):
        hf.sample(policy, PROMPTS, 1, SamplingParams(max_completion_length=4, temperature=0), 10_000)


def test_generate_without_memory_is_tried_again_with_half(monkeypatch):
    policy, calls = make_policy(), []
    generate = policy.base.generate

    def fails_once(input_ids, **settings):
        calls.append(len(input_ids))
        if len(calls) == 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        return generate(input_ids=input_ids, **settings)

    monkeypatch.setattr(policy.base, "generate", fails_once)
    hf.sample(policy, [[10], [11]], 2, SamplingParams(max_completion_length=4, temperature=0), 10_000)
    assert calls == [4, 2, 2]


def test_greedy_completions_are_those_of_generate(family):
    policy = make_policy(family)
    params = SamplingParams(max_completion_length=20, temperature=0)
    theirs, _ = hf.sample(policy, PROMPTS, 1, params, 10_000)
    for shape in (next(shapes(PROMPTS, 1, 20, 2)), list(paged_shapes(PROMPTS, 1, 20, 3))[1]):
        assert ids_of(run(policy, 1, shape=shape, temperature=0, max_completion_length=20)) == ids_of(theirs)


def test_proposal_logprobs_are_of_what_was_drawn_from_times_the_share_that_is_left():
    """transformers' own processors, one after the other in its order, on the logits of a full forward."""
    policy = make_policy("llama")
    params = dict(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    for index, completion in enumerate(run(policy, **params)):
        prompt = PROMPTS[index // 3]
        text = torch.tensor([prompt + completion.ids])
        with policy.inference():
            logits = policy.model(input_ids=text).logits[0]
        for t, token in enumerate(completion.ids):
            scores, before = logits[None, len(prompt) - 1 + t], text[:, : len(prompt) + t]
            for processor in (
                RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.8), TopKLogitsWarper(40),
                TopPLogitsWarper(0.9), MinPLogitsWarper(0.02),
            ):  # fmt: skip
                scores = processor(before, scores)
            share = (logits[len(prompt) - 1 + t] / 0.8).softmax(-1)[scores[0].isfinite()].sum()
            truth = scores.log_softmax(-1)[0, token] + share.log()
            torch.testing.assert_close(completion.proposal_logprobs[t], truth, atol=4e-5, rtol=0)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.7, "top_k": 9}])
def test_the_mean_importance_weight_is_one_whatever_is_truncated(truncation, penalty):
    """Over every token that can be drawn, exactly; by the behaviour's own log-probability it is the mass that is left."""
    torch.manual_seed(3)
    logits, rows = 2 * torch.randn(40), 20_000
    seen = (torch.arange(40) % 3 == 0).expand(rows, -1) if penalty != 1 else None
    params = SamplingParams(max_completion_length=1, temperature=0.7, repetition_penalty=penalty, **truncation)
    uniforms = (torch.arange(rows) + 0.5) / rows
    tokens, own, proposal = choose(logits.expand(rows, -1), uniforms, seen, params)
    penalized = logits[None] if seen is None else penalize(logits[None], seen[:1], penalty)
    probability = truncate(penalized, params).log_softmax(-1)[0, tokens]
    first = torch.stack([(tokens == token).nonzero()[0, 0] for token in tokens.unique()])
    drawn, weight, naive = (x[first].double().exp() for x in (probability, own - proposal, own - probability))
    assert drawn.sum() == pytest.approx(1, abs=2e-4), "hardly a token that can be drawn was missed"
    assert (drawn * weight).sum() == pytest.approx(1, abs=1e-3)
    if truncation:
        assert (drawn * naive).sum() < 0.99


def test_without_truncation_both_logprobs_are_one():
    assert all(torch.equal(c.logprobs, c.proposal_logprobs) for c in run(make_policy()))


@pytest.mark.parametrize("settings", [{}, {"top_k": 8, "top_p": 0.9, "min_p": 0.02}])
def test_draws_are_distributed_as_transformers_says(settings):
    """Chi-squared of 4000 draws over the kept tokens: beyond its 0.999 quantile once in 1000 seeds, and this one is fixed."""
    params = SamplingParams(max_completion_length=1, temperature=0.7, **settings)
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 30, generator=draw)
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    if settings:
        for warper in (TopKLogitsWarper(8), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)):
            expected = warper(None, expected)
    expected = 4000 * expected.softmax(-1)[0]
    tokens = choose(logits.expand(4000, 30), torch.rand(4000, generator=draw), None, params).token_ids
    counts = torch.bincount(tokens, minlength=30)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    statistic = ((counts - expected)[kept].square() / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty
    assert statistic < quantile


@pytest.mark.parametrize(
    ("family", "truncation"),
    [("gemma2", {}), ("qwen2", {"top_p": 0.9, "repetition_penalty": 1.2}), slow("qwen3_5_text", {}), slow("bamba", {})],
)
def test_what_is_sampled_does_not_depend_on_slots_or_sharing(family, truncation):
    policy = make_policy(family)
    found = [
        run(policy, 4, shape=shape, max_completion_length=9, **truncation)
        for slots in (12, 3)
        for shape in (*shapes(PROMPTS, 4, 9, slots), *paged_shapes(PROMPTS, 4, 9, slots))
    ]
    assert len({tuple(ids) for ids in ids_of(found[0])}) > 8
    for completions in found[1:]:
        assert ids_of(completions) == ids_of(found[0])
        for ours, first in zip(completions, found[0], strict=True):
            torch.testing.assert_close(ours.logprobs, first.logprobs, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "family, kv", [("qwen2", "full"), ("qwen2", "int8"), slow("lfm2", "full"), slow("qwen3_5_text", "full")]
)
def test_what_is_sampled_does_not_depend_on_how_often_the_device_is_asked(family, kv, monkeypatch):
    policy, seen = make_policy(family), []
    for every in (1, 5, 20):
        monkeypatch.setitem(engine.ASK_EVERY, "cpu", every)
        for shape in (next(shapes(PROMPTS, 3, 10, 5)), list(paged_shapes(PROMPTS, 3, 10, 5))[1]):
            found = run(policy, 3, shape=shape, kv=kv, max_completion_length=10)
            seen.append((ids_of(found), torch.cat([c.logprobs for c in found])))
            assert all(type(token) is int for c in found for token in c.ids)
    assert all(ids == seen[0][0] for ids, _ in seen)
    for _, logprobs in seen:
        torch.testing.assert_close(logprobs, seen[0][1], atol=2e-5 if kv == "full" else 4e-3, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_int8_is_half_a_step_away_and_keeps_zeros_and_large_values(kv_heads):
    x = torch.randn(5, kv_heads, 7, 64, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2] = 0, x[1] * 1e4, x[2] * 1e-4
    numbers, scales = quantized(x)
    step = x.abs().amax(-1, keepdim=True) / 127
    error = (dequantized(numbers, scales, torch.float32) - x).abs()
    assert (error <= step * (0.5 + 127 * 2**-11) + 2**-25 * 127).all()
    assert (error[0] == 0).all()


@pytest.mark.parametrize(("family", "bf16"), in_turn(FAMILIES, False, True))
def test_int8_keys_and_values_change_logprobs_by_little(family, bf16):
    """Measured: 0.0003 to 0.014 and at most 0.11 in fp32, 0.026 and 0.19 in bf16, with weights wider than trained ones."""
    policy = make_policy(family, bf16=bf16)
    found = run(policy, 4, kv="int8", max_completion_length=20)
    truth = [own_logprobs(policy, PROMPTS[i // 4], completion, 1.0) for i, completion in enumerate(found)]
    gaps = (torch.cat([completion.logprobs for completion in found]) - torch.cat(truth)).abs()
    mean, largest = (0.1, 0.7) if bf16 else (0.05, 0.4)
    assert 1e-4 < gaps.mean() < mean and gaps.max() < largest


@pytest.mark.parametrize("family", ["gemma2", slow("qwen2")])
def test_what_is_sampled_from_int8_does_not_depend_on_slots_or_sharing(family):
    policy = make_policy(family)
    found = [
        run(policy, 3, shape=shape, kv="int8", max_completion_length=9)
        for slots in (9, 2)
        for shape in (*shapes(PROMPTS, 3, 9, slots), *paged_shapes(PROMPTS, 3, 9, slots))
    ]
    for completions in found[1:]:
        assert ids_of(completions) == ids_of(found[0])


def test_int8_keys_and_values_take_the_bytes_that_are_reported():
    policy, found = make_policy("qwen3", bf16=True), {}
    for kv in ("full", "int8"):
        sampler = ShapedSampler(policy, max_completion_length=4, rollout_token_budget=1000, rollout_kv=kv)
        found[kv] = sampler.sampled(2).metrics["rollout/kv_mib"]
    assert found["int8"] == found["full"] * (1 + 2 / 16) / 2


def test_int8_keys_and_values_are_not_silently_left_out_by_generate():
    policy = make_policy("llama")
    policy.base.config.rope_parameters["rope_type"] = "dynamic"
    for name, value in (("rollout_kv", "int8"), ("rollout_weights", "dense")):
        sampler = Sampler(policy, GRPOConfig(**{name: value}))
        with (
            pytest.warns(UserWarning),
            pytest.raises(ValueError, match=f"{name}='{value}' needs the engine, .*; leave it out"),
        ):
            sampler.complete(as_prompts(PROMPTS), 2)


@pytest.mark.parametrize(
    ("at", "error"),
    [
        *((at, torch.OutOfMemoryError("made up")) for at in (1, 2)),
        (10, RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")),
    ],
)
@pytest.mark.parametrize("family", ["llama", slow("qwen3_5_text")])
def test_out_of_memory_is_tried_again_as_it_was_and_then_with_half_of_the_slots(family, at, error, monkeypatch):
    policy = make_policy(family)
    expected = run(policy, 4, max_completion_length=14)
    forward = policy.decoder.forward
    for times in (1, 2):
        calls: list[int] = []
        sampler = ShapedSampler(policy, max_completion_length=14)
        assert sampler.state_shapes is not None, "read before, by a forward of one token"

        def failing(*args, calls=calls, times=times, **kwargs):
            calls.append(len(kwargs["input_ids"]))
            if at <= len(calls) < at + times:
                raise error
            return forward(*args, **kwargs)

        monkeypatch.setattr(policy.decoder, "forward", failing)
        found = sampler.run(4)
        assert ids_of(found) == ids_of(expected) and len(calls) > at
        if times == 2:
            assert max(calls[at + 1 :]) <= 6, "half of 12 slots"
        elif at <= 2:  # later, fewer are left
            assert max(calls[at:]) == 12
            assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(found, expected, strict=True))


def test_a_late_out_of_memory_says_nothing_of_all_slots(monkeypatch):
    """What is left is done with fewer slots; the next rollout has all again."""
    policy, failures = make_policy("llama"), []
    policy.eos_token_ids = list(range(5))
    sampler = ShapedSampler(policy, max_completion_length=30)
    step = engine.Slots.step

    def failing(slots, rows):
        if slots.scheduler.running <= 5 and len(failures) < 3:
            failures.append(slots.shape.slots)
            raise torch.OutOfMemoryError("made up")
        return step(slots, rows)

    monkeypatch.setattr(engine.Slots, "step", failing)
    found = sampler.run(4)
    assert failures[0] == 12 and failures[1] <= 5 and sampler.fitting_tokens is None
    monkeypatch.undo()
    assert ids_of(found) == ids_of(sampler.run(4))


def test_generate_in_the_engines_place_goes_on_in_halves(monkeypatch):
    policy, waves = make_policy("llama"), []
    own = hf._generate

    def short_of_memory(policy, rows, params):
        waves.append(len(rows))
        if len(rows) > 4:
            raise RuntimeError("CUDA error: out of memory")
        return own(policy, rows, params)

    monkeypatch.setattr(hf, "_generate", short_of_memory)
    sampler = ShapedSampler(policy, max_completion_length=5)
    sampler.engine_refusal = "a test"
    found = ids_of(sampler.run(4, temperature=0))
    assert waves == [12, 6, 3, 3, 3, 3] and sampler.fitting_tokens == 3 * 85
    assert found == ids_of(sampler.run(4, temperature=0)) and waves[6:] == [3, 3, 3, 3], "more was not tried again"
    monkeypatch.undo()
    sampler.fitting_tokens = None
    assert found == ids_of(sampler.run(4, temperature=0))


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", slow("bamba")])
def test_a_nan_of_one_completion_is_nobody_elses(family):
    """Nor is it that of the next in its slot, or in its prompt's row."""
    policy = make_policy(family)
    with torch.no_grad():
        policy.base.get_input_embeddings().weight[120] = torch.nan
    prompts = [[120], [120] * 70, *PROMPTS[1:]]
    for shape in (*shapes(prompts, 2, 8, 2), *paged_shapes(prompts, 2, 8, 2)):
        found = run(policy, 2, prompts=prompts, shape=shape, max_completion_length=8)
        assert not any(120 in completion.ids for completion in found[4:])
        finite = [bool(completion.logprobs.isfinite().all()) for completion in found]
        assert finite == [False] * 4 + [True] * 4


def test_what_auto_came_to_is_kept(monkeypatch):
    """For later calls, and for a resumed run, however much memory is free there."""
    policy = make_policy("llama")
    sampler, resumed = (ShapedSampler(policy, max_completion_length=3) for _ in range(2))
    for available in (10**12, 1000):
        monkeypatch.setattr("psutil.virtual_memory", lambda available=available: SimpleNamespace(available=available))
        found = sampler.sampled(1)
        assert found.metrics["rollout/dense_weights_mib"] > 0 and sampler.state() == {"samples_dense": True}
    resumed.load(sampler.state())
    assert resumed.sampled(1).metrics["rollout/dense_weights_mib"] > 0
    assert ShapedSampler(policy).sampled(1).metrics["rollout/dense_weights_mib"] == 0


def test_a_plan_that_would_never_end_is_none():
    assert StoreShape(2, 8, 1, 4, 5, 4).at_most(1) == StoreShape(1, 8, 1, 4, 3, 4)
    with pytest.raises(ValueError, match="fewer pages than one slot"):
        StoreShape(2, 9, 1, 4, 3, 4)
    with pytest.raises(ValueError, match="no prefixes"):
        StoreShape(2, 8, 0, 0, 5, 4)


def test_out_of_memory_with_one_slot_is_an_error(monkeypatch):
    policy = make_policy("llama")

    def failing(*_, **__):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(policy.decoder, "forward", failing)
    with pytest.raises(torch.OutOfMemoryError):
        run(policy)


def test_a_changed_adapter_is_what_is_sampled_from():
    """A rollout leaves nothing behind that the next could use: no stale prefix."""
    policy, fresh = make_policy("qwen3"), make_policy("qwen3")
    before = run(policy, 4)
    for changed in (policy, fresh):
        draw = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in changed.parameters_of(changed.adapter).values():
                parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    after, expected = run(policy, 4), run(fresh, 4)
    assert ids_of(after) == ids_of(expected) != ids_of(before)
    assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(after, expected, strict=True))


@pytest.mark.parametrize(("family", "dense"), in_turn(FAMILIES, False, True))
def test_a_rollout_changes_no_gradient(family, dense):
    policy = make_policy(family, bf16=True)

    def gradients():
        policy.model.zero_grad()
        with policy.autocast():
            policy.model(input_ids=torch.tensor([PROMPTS[2]])).logits.float().logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in policy.parameters_of(policy.adapter).values()]

    before = gradients()
    mode = policy.base.config._attn_implementation
    run(policy, weights="dense" if dense else "4bit", max_completion_length=3)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), before, strict=True))
    assert policy.model.training and policy.base.config._attn_implementation == mode
    assert sum(gradient.abs().sum() for gradient in before) > 0


def test_dense_weights_sample_the_same_tokens_in_fp32(family):
    policy = make_policy(family)
    for dense, in_4bit in zip(run(policy, weights="dense"), run(policy, weights="4bit"), strict=True):
        assert dense.ids == in_4bit.ids
        torch.testing.assert_close(dense.logprobs, in_4bit.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dense_weights_keep_what_the_adapters_learned_in_bf16(family):
    """Each of their entries is below half a unit of the weight's last place, and all point where the input does."""
    policy, draw = make_policy(family, bf16=True), torch.Generator().manual_seed(1)
    with torch.no_grad():
        policy.base.get_input_embeddings().weight += 1
        for name, parameter in policy.parameters_of(policy.adapter).items():
            sizes = 3e-5 * torch.randn(parameter.shape[0], 1, generator=draw)
            parameter.copy_(sizes.expand(parameter.shape) if "lora_B" in name else torch.full(parameter.shape, 0.25))
    errors = {}
    for weights in ("4bit", "dense"):
        found = [
            (completion.logprobs - own_logprobs(policy, PROMPTS[index // 8], completion, 1.0)).abs()
            for index, completion in enumerate(run(policy, 8, weights=weights))
        ]
        errors[weights] = torch.cat(found).mean().item()
    assert errors["dense"] < 1.3 * errors["4bit"], errors


EXACT = {
    "bf16": {"bf16": True},
    "fp16": {"bf16": None, "fp16": True},
    "fp32": {},
    "not in 4 bits": {"bf16": True, "load_in_4bit": False},
    "dropout": {"bf16": True, "lora_dropout": 0.3},
    "not all adapted": {"bf16": True, "lora_target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize(("adapters", "dense"), [("on", False), ("off", True), slow("on", True), slow("off", False)])
@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
def test_sampling_rounds_where_training_does(settings, adapters, dense):
    """Bit for bit, as the kernels of a CPU are the same. The scale is 1.5: in bf16 it is no shift of the exponent."""
    policy = make_policy("qwen2", lora_alpha=24, **settings)
    text = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    with policy.as_base() if adapters == "off" else policy.inference(), policy.autocast():
        expected = policy.decoder(input_ids=text).last_hidden_state
        with fast_linears(policy.base, policy.dtype, dense=dense):
            assert torch.equal(policy.decoder(input_ids=text).last_hidden_state, expected)


def test_a_checkpoint_made_from_another_dtype_is_dequantized_as_its_product_does_it():
    policy = make_policy("llama", bf16=True)
    for layer in plain_lora_layers(policy.base):
        layer.get_base_layer().weight.quant_state.dtype = torch.float16
    text = torch.tensor([PROMPTS[2]])
    with policy.inference(), policy.autocast():
        expected = policy.decoder(input_ids=text).last_hidden_state
        with fast_linears(policy.base, policy.dtype, dense=True):
            assert torch.equal(policy.decoder(input_ids=text).last_hidden_state, expected)


@pytest.mark.parametrize("settings", [{}, {"lora_target_modules": ["q_proj"]}, {"load_in_4bit": False}], ids=str)
def test_a_dense_copy_takes_what_was_said_and_is_let_go(settings):
    policy = make_policy("llama", bf16=True, **settings)
    text = torch.tensor([PROMPTS[0]])
    with policy.inference(), policy.autocast(), Live(policy.model) as live:
        for dense in (False, True, True):
            before = live.now
            with fast_linears(policy.base, policy.dtype, dense=dense):
                policy.decoder(input_ids=text)
                taken = live.now - before
            assert live.now == before
            if not dense:
                without = taken
        assert taken - without == dense_bytes(policy.base, torch.bfloat16)
    assert (dense_bytes(policy.base, torch.bfloat16) > 0) == settings.get("load_in_4bit", True)


@pytest.mark.parametrize("dense", [False, True])
def test_fused_adapters_are_pefts(family, dense):
    policy = make_policy(family)
    text = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    with policy.inference():
        expected = policy.decoder(input_ids=text).last_hidden_state
        with fast_linears(policy.base, policy.dtype, dense=dense):
            found = policy.decoder(input_ids=text).last_hidden_state
        again = policy.decoder(input_ids=text).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-5)
    assert torch.equal(again, expected)


def test_a_refused_model_is_sampled_from_by_generate_after_one_warning():
    policy = make_policy("llama")
    policy.base.config.rope_parameters["rope_type"] = "dynamic"
    sampler = Sampler(policy, GRPOConfig(max_completion_length=12))
    with pytest.warns(UserWarning, match="rotary embedding depends on the longest text") as caught:
        completions = sampler.complete(as_prompts(PROMPTS), 3).completions
        sampler.complete_greedily(as_prompts(PROMPTS))
    assert len(caught) == 1
    assert len(completions) == 9 and all(c.logprobs is None for c in completions)


def test_an_attention_argument_that_is_not_understood_is_a_refusal(monkeypatch):
    policy = make_policy("llama")
    attention = policy.decoder.layers[0].self_attn
    monkeypatch.setattr(type(attention), "forward", _with_indices(type(attention).forward))
    assert "takes indices, which is not known here" in engine.refusal(policy, policy.dtype)


def _with_indices(forward):
    return lambda self, *args, **kwargs: forward(self, *args, **kwargs, indices=torch.zeros(4))


def test_a_model_whose_steps_do_not_add_up_is_refused(monkeypatch):
    policy = make_policy("llama")
    layer = policy.decoder.layers[0].mlp
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: forward(x) * x.shape[1])  # as if tokens saw each other there
    assert "away in a step from stored keys and values" in engine.refusal(policy, policy.dtype)


def one_token_is_a_thousandth_off(policy, monkeypatch):
    policy.decoder.layers[1].mlp.register_forward_hook(lambda _, __, out: out * (1 + 1e-3 * (out.shape[1] == 1)))


def a_step_is_one_place_further(policy, monkeypatch):
    def moved(decoder, arguments, keywords):
        if keywords["input_ids"].shape[1] == 1 and "position_ids" in keywords:
            keywords["position_ids"] = keywords["position_ids"] + 1
        return arguments, keywords

    policy.decoder.register_forward_pre_hook(moved, with_kwargs=True)


def attention_changed(name, change):
    def changed(policy, monkeypatch):
        layout = getattr(layouts, name)
        own = layout.attend
        monkeypatch.setattr(layout, "attend", lambda *given: own(*given[:-1], given[-1]._replace(**change(given[-1]))))

    return changed


STEPS = {
    "a weak layer": one_token_is_a_thousandth_off,
    "a position": a_step_is_one_place_further,
    "a prompt's window": attention_changed("Prefill", lambda asked: {"window": asked.window and asked.window + 1}),
    "a step's window": attention_changed("Decode", lambda asked: {"window": asked.window and asked.window + 1}),
    "no window": attention_changed("Decode", lambda asked: {"window": None}),
    "a scale": attention_changed("Decode", lambda asked: {"scaling": asked.scaling * 1.01}),
}


@pytest.mark.parametrize(
    ("name", "precision"), in_turn(STEPS, (False, torch.float32), (True, torch.bfloat16), (True, torch.int8))
)
def test_a_step_that_is_a_little_wrong_is_refused_in_every_precision(name, precision, monkeypatch):
    """Windows are of 24 tokens, and a trial's texts of 14."""
    bf16, kv_dtype = precision
    policy = make_policy("gemma3", bf16=bf16)
    assert engine.refusal(policy, kv_dtype) is None
    STEPS[name](policy, monkeypatch)
    assert "away in a step" in engine.refusal(policy, kv_dtype)


@pytest.mark.parametrize("bf16", [False, True])
def test_int8_that_is_read_wrongly_is_refused(bf16, monkeypatch):
    """Which the trial in fp32 does not see."""
    policy = make_policy("llama", bf16=bf16)

    def wrong(numbers, scales, dtype):
        return dequantized(numbers, scales.float().roll(1, -1), dtype)

    monkeypatch.setattr(store, "dequantized", wrong)
    assert "layers.0.self_attn is" in engine.refusal(policy, torch.int8)


@pytest.mark.parametrize(
    ("family", "precision"), in_turn(FAMILIES, (True, torch.int8), (False, torch.float32), (True, torch.bfloat16))
)
def test_a_known_model_is_not_refused(family, precision):
    bf16, kv_dtype = precision
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert engine.refusal(make_policy(family, bf16=bf16), kv_dtype) is None


on_a_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))


def one_layer(family):
    """A model of a family with one layer: kernels are slow in the interpreter."""
    model = make_model(family)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def endless(model="qwen3", **settings):
    """A policy that no token ends."""
    policy = make_policy(model, **settings)
    policy.eos_token_ids = [999]
    return policy


@pytest.mark.parametrize(("bf16", "kv"), [(False, "full"), (True, "int8"), slow(False, "int8"), slow(True, "full")])
@pytest.mark.parametrize("cpu", [True, pytest.param(False, marks=on_a_gpu)])
def test_several_pages_a_slot_have_the_logprobs_of_training(cpu, bf16, kv):
    """Of 4 slots with 3 pages each at full length, and 7 pages: some start over. In groups that share a prompt."""
    policy, page = endless(use_cpu=cpu, bf16=bf16), 16 if cpu else 64
    tokens = 2 * page + 2
    found = run(policy, 2, shape=StoreShape(4, tokens, 3, 79, 1 + 7, page), kv=kv, max_completion_length=tokens)
    assert all(len(completion.ids) == tokens for completion in found)
    texts, completions = [prompt for prompt in PROMPTS for _ in range(2)], ids_of(found)
    gaps = torch.cat([completion.logprobs for completion in found]).to(policy.device)
    with policy.inference():
        for batch in pack(texts, completions, token_budget=500, pad_token_id=0, device=policy.device):
            gaps[batch.token_index] -= policy.logprobs(batch, 1.0)
    exact = (4e-6, 4e-5) if cpu else (1e-4, 1e-3)
    mean, largest = (0.07, 0.5) if bf16 or kv == "int8" else exact
    assert gaps.abs().mean() < mean and gaps.abs().max() < largest


@pytest.mark.parametrize(
    "cpu",
    [
        pytest.param(True, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")),
        pytest.param(False, marks=on_a_gpu),
    ],
)
@pytest.mark.parametrize("kv", ["full", "int8"])
def test_the_kernel_in_the_engine_samples_what_its_twin_samples(cpu, kv, monkeypatch):
    pytest.importorskip("triton")
    policy, found = endless(one_layer("qwen3") if cpu else "qwen3", use_cpu=cpu), []
    tokens = 5 if cpu else 100  # the interpreter is slow
    pages = StoreShape(2, tokens, 1, 5, 1 + 2 * ceil(tokens / 4), 4)
    for backend in ("torch", "triton"):
        for name, both in (("decode_attention", decode_attention), ("write_token", write_token)):
            monkeypatch.setattr(store, name, partial(both, backend=backend))
        found.append(run(policy, 2, prompts=PROMPTS[1:2], shape=pages, kv=kv, max_completion_length=tokens))
    assert ids_of(found[0]) == ids_of(found[1])
    atol = {"full": 6e-6, "int8": 4e-3}[kv] if cpu else {"full": 1e-4, "int8": 2e-2}[kv]  # of another exp()
    for twin, kernel in zip(*found, strict=True):
        torch.testing.assert_close(twin.logprobs, kernel.logprobs, atol=atol, rtol=0)


def counted_bytes(store):
    """By the allocator, whatever the shape says."""
    tensors = [tensor for rows in (store.own, store.prefix) for group in rows.groups for tensor in group.tensors()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_a_store_shape_is_what_is_allocated_and_keeps_to_its_budget(monkeypatch):
    draw = torch.Generator().manual_seed(0)

    def number(high):
        return int(torch.randint(1, high, (1,), generator=draw))

    # The first and the third layer are of one size, the second of another, and the fourth has the second's.
    layers = {n: LayerShape(4, *sizes) for n, sizes in enumerate([(2, 4, 0), (1, 8, 1), (2, 4, 2), (1, 8, 1)])}
    full, small = (token_bytes(layers, dtype) for dtype in (torch.bfloat16, torch.int8))
    assert (full, small) == (2 * 2 * (2 * 2 * 4 + 8), 2 * (2 * 2 * (4 + 2) + 8 + 2))
    for _ in range(200):
        asked = dict(
            prompt_tokens=number(300),
            num_prompts=number(6),
            num_generations=number(8),
            max_completion_length=number(200),
        )
        budget = number(8000)
        for share_from, paged in ((64, False), (10**9, False), (0, False), (64, True)):
            monkeypatch.setattr(shape_module, "SHARE_FROM", share_from)
            shape = store_shape(**asked, budget_tokens=budget, paged=paged)
            bytes_ = counted_bytes(Store(layers, shape, torch.bfloat16, torch.device("cpu")))
            assert bytes_ == shape.num_tokens() * full
            rounded = counted_bytes(Store(layers, shape, torch.int8, torch.device("cpu")))
            assert rounded == shape.num_tokens() * small
            one = asked["prompt_tokens"] + asked["max_completion_length"]  # check_prompts refuses a smaller budget
            assert bytes_ <= max(budget, one) * full
            assert not paged or shape.slots >= store_shape(**asked, budget_tokens=budget, paged=False).slots
            # A captured step is of one length of slots, also where each prompt has one completion.
            assert not paged or asked["prompt_tokens"] == 1 or shape.slot_tokens == asked["max_completion_length"]
            more = store_shape(**asked, budget_tokens=10**9, paged=paged)
            assert 1 <= shape.slots <= more.slots == asked["num_prompts"] * asked["num_generations"]


def test_buckets_are_few_and_large_enough():
    assert [bucket(n) for n in (1, 2, 3, 5, 9, 16, 17, 33, 49)] == [1, 2, 4, 8, 16, 16, 32, 48, 64]


def test_every_completion_has_a_slot_once_its_prompt_a_row_and_its_tokens_pages():
    """Random lengths, slots, prefix rows and pages; everything ends, and nothing is shared that must not be."""
    draw = torch.Generator().manual_seed(0)

    def number(high):
        return int(torch.randint(1, high, (1,), generator=draw))

    sent_back = 0
    for _ in range(200):
        generations, prompts, slots, rows, longest = number(6), number(6), number(9), number(5) - 1, number(20)
        pages = (ceil(longest / 4) + number(12)) if number(3) == 1 else 0
        scheduler = Scheduler(list(range(prompts * generations)), generations, slots, rows, pages, 4 if pages else 0)
        lengths = [number(longest + 1) for _ in range(prompts * generations)]
        finished, at, was = [], [0] * slots, {}
        while scheduler.waiting or scheduler.running:
            new, new_rows = scheduler.admit([tokens + 1 for tokens in at], lambda c, was=was: was.get(c, 0) + 1)
            for slot in new:
                at[slot] = was.pop(scheduler.slots[slot], 0)
            assert all(scheduler.slots[slot] is not None for slot in new)
            assert not rows or all(
                scheduler.prefixes[row] in {scheduler.slots[s] // generations for s in new} for row in new_rows
            )
            holders = list(scheduler.slots)
            preempted = scheduler.reserve([tokens + 1 for tokens in at])
            assert not set(preempted) & set(new), "who is let in has its pages"
            was |= {holders[slot]: at[slot] for slot in preempted}
            sent_back += len(preempted)
            running = [c for c in scheduler.slots if c is not None]
            assert len(running) == len(set(running)) > 0
            if rows:
                resident = [p for p in scheduler.prefixes if p is not None]
                assert len(resident) == len(set(resident))
                assert {c // generations for c in running} <= set(resident)
            held = [page for own in scheduler.pages for page in own]
            assert sorted(held + scheduler.free) == list(range(1, pages))
            for slot, completion in enumerate(scheduler.slots):
                at[slot] += 1
                assert completion is None or not pages or len(scheduler.pages[slot]) * 4 >= at[slot]
                if completion is not None and at[slot] == lengths[completion]:
                    scheduler.finish(slot)
                    finished.append(completion)
            if not scheduler.waiting and scheduler.running:
                before = {c: (at[s], scheduler.pages[s]) for s, c in enumerate(scheduler.slots) if c is not None}
                for source, target in scheduler.compact(len(before)):
                    at[target] = at[source]
                after = {c: (at[s], scheduler.pages[s]) for s, c in enumerate(scheduler.slots) if c is not None}
                assert after == before and None not in scheduler.slots[: len(before)]
        assert sorted(finished) == list(range(prompts * generations))
    assert sent_back > 100


@pytest.mark.parametrize(
    "family, kv, every, sampling",
    [
        slow("qwen2", "full", 1, {}), ("qwen2", "full", 3, {"repetition_penalty": 1.3, "top_k": 20}),
        ("qwen2", "int8", 1, {}), ("qwen3_5_text", "full", 3, {}), slow("bamba", "int8", 1, {}),
    ],
)  # fmt: skip
def test_a_completion_that_waits_for_pages_goes_on_where_it_was(family, kv, every, sampling, monkeypatch):
    """No step of any completion is computed twice, and what is sampled is as where nobody waits."""
    policy, computed = make_policy(family), []
    monkeypatch.setitem(engine.ASK_EVERY, "cpu", every)
    step = engine.Slots.step

    def watched(self, rows):
        now = (self.positions - self.prefilled)[:rows].tolist()
        computed.extend((c, t) for c, t in zip(self.scheduler.slots, now, strict=False) if c is not None)
        return step(self, rows)

    monkeypatch.setattr(engine.Slots, "step", watched)
    roomy, short = paged_shapes(PROMPTS, 4, 18, 8)
    sampled = partial(run, policy, 4, kv=kv, weights="4bit", max_completion_length=18, **sampling)
    truth = sampled(shape=roomy)
    computed.clear()
    found = sampled(shape=short)
    assert ids_of(found) == ids_of(truth)
    for ours, first in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.logprobs, first.logprobs, atol=2e-5 if kv == "full" else 4e-3, rtol=0)
    steps = [(c, t) for c, t in computed if t < len(found[c].ids)]
    assert len(steps) == len(set(steps)) == sum(len(c.ids) for c in found)


def test_no_step_is_computed_after_all_completions_have_their_length(monkeypatch):
    """A block of 8 steps is cut short; captured or not, each is a launch of the whole model."""
    steps, step = [], engine.Slots.step
    monkeypatch.setitem(engine.ASK_EVERY, "cpu", 8)
    monkeypatch.setattr(engine.Slots, "step", lambda self, rows: steps.append(rows) or step(self, rows))
    found = run(make_policy(), max_completion_length=12)
    assert len(steps) == max(len(c.ids) for c in found) == 12


def test_waiting_for_pages_is_counted():
    policy = make_policy("qwen2")
    counts = []
    for shape in paged_shapes(PROMPTS, 3, 16, 6):
        sampler = ShapedSampler(policy, shape, max_completion_length=16)
        counts.append(sampler.sampled(3).metrics["rollout/preempted"])
    assert counts[0] == 0 < counts[1]


def test_completions_come_group_after_group_and_differ_within_one():
    completions = run(make_policy(), num_generations=4)
    assert len(completions) == 12
    assert len({tuple(c.ids) for c in completions[:4]}) > 1
    assert all(1 <= len(c.ids) <= 12 for c in completions)


PLANTED = dict(
    do_sample=True, top_k=1, top_p=0.01, min_p=0.9, typical_p=0.1, epsilon_cutoff=0.5, eta_cutoff=0.5, temperature=0.01,
    repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=list(range(4, 100)), min_new_tokens=12,
    forced_eos_token_id=3, bad_words_ids=[[40], [41]], begin_suppress_tokens=[50], renormalize_logits=True,
)  # fmt: skip


def test_nothing_is_inherited_from_the_models_generation_config():
    planted = make_model("llama")
    planted.generation_config.update(**PLANTED)
    plain, planting = make_policy("llama"), make_policy(planted)
    for given in ({}, {"temperature": 0}, {"top_p": 0.9, "top_k": 5}):
        params = SamplingParams(**{"max_completion_length": 12, "temperature": 1.0, **given})
        assert ids_of(run(plain, **given)) == ids_of(run(planting, **given))
        assert ids_of(by_generate(plain, params)) == ids_of(by_generate(planting, params))
    assert planted.generation_config.top_k == 1, "the model's own is put back"


def by_generate(policy, params):
    torch.manual_seed(0)
    return hf.sample(policy, PROMPTS, 3, params, 10_000)[0]


def test_the_planted_settings_would_have_been_inherited():
    """transformers fills what a call leaves open; if it stops, the replacement above is not needed any more."""
    model = make_model("llama")
    model.generation_config.update(top_k=1, do_sample=True)
    policy = make_policy(model)
    given = generation_config(policy, SamplingParams(max_completion_length=12, temperature=1.0))
    given.top_k = None
    torch.manual_seed(0)
    out = policy.base.generate(torch.tensor([PROMPTS[0]] * 8), generation_config=given)
    assert (out == out[0]).all(), "top_k=1 leaves one choice"


def test_every_setting_of_a_config_reaches_generate():
    params = SamplingParams(
        max_completion_length=5, temperature=0.7, top_p=0.8, top_k=9, min_p=0.05, repetition_penalty=1.2
    )
    config = generation_config(make_policy(), params)
    assert (config.max_new_tokens, config.temperature, config.top_p, config.top_k) == (5, 0.7, 0.8, 9)
    assert (config.min_p, config.repetition_penalty, config.do_sample) == (0.05, 1.2, True)


def test_any_end_of_sequence_id_ends_a_completion():
    model = make_model("llama")
    ends = list(range(2, 60))
    model.generation_config.eos_token_id = ends
    completions = run(make_policy(model), num_generations=8, max_completion_length=30)
    assert all(c.finish == "eos" and c.ids[-1] in {1, *ends} for c in completions)
    assert all(not {1, *ends} & set(c.ids[:-1]) for c in completions)


def test_a_stop_string_ends_a_completion_that_keeps_it():
    policy = make_policy("llama")
    free = run(policy, max_completion_length=30)
    texts = [policy.tokenizer.decode(c.ids) for c in free]
    pair = next(text[8:10] for text in texts if len(text) > 20)
    stopped = run(policy, max_completion_length=30, stop_strings=(pair, "not in any"))
    assert any(c.finish == "stop" for c in stopped)
    for completion, text, whole in zip(stopped, texts, free, strict=True):
        assert (pair in text) == (completion.finish == "stop")
        assert pair not in policy.tokenizer.decode(completion.ids[:-1])
        assert completion.ids == whole.ids[: len(completion.ids)]


def test_generate_stops_at_the_same_strings():
    policy = make_policy("llama")
    params = SamplingParams(max_completion_length=30, temperature=0)
    (greedy,), _ = hf.sample(policy, PROMPTS[1:2], 1, params, 10_000)
    text = policy.tokenizer.decode(greedy.ids)
    params = SamplingParams(max_completion_length=30, temperature=0, stop_strings=(text[3:5],))
    theirs, _ = hf.sample(policy, PROMPTS, 2, params, 10_000)
    ours = run(policy, 2, max_completion_length=30, temperature=0, stop_strings=(text[3:5],))
    assert [(c.ids, c.finish) for c in ours] == [(c.ids, c.finish) for c in theirs]
    assert any(c.finish == "stop" for c in ours)


def test_a_completion_that_is_cut_off_says_so():
    model = make_model("llama")
    model.lm_head.weight.data[1] = 0
    completions = run(make_policy(model), max_completion_length=1, temperature=0)
    assert all(c.finish == "length" and len(c.ids) == 1 for c in completions if c.ids != [1])
    assert any(c.finish == "length" for c in completions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnAGpu:
    def test_greedy_completions_are_those_of_generate_in_fp32(self, family):
        policy = make_policy(family, use_cpu=False)
        assert policy.device.type == "cuda" and Sampler(policy, GRPOConfig()).engine_refusal is None
        params = SamplingParams(max_completion_length=30, temperature=0)
        theirs = ids_of(hf.sample(policy, PROMPTS, 1, params, 10_000)[0])
        for shape in (*shapes(PROMPTS, 1, 30, 2), *paged_shapes(PROMPTS, 1, 30, 3)):
            assert ids_of(run(policy, 1, shape=shape, temperature=0, max_completion_length=30)) == theirs

    def test_bf16_logprobs_are_near_those_of_a_training_forward(self, family):
        policy = make_policy(family, use_cpu=False, bf16=True)
        found = run(policy, 4, max_completion_length=30)
        for index, completion in enumerate(found):
            truth = own_logprobs(policy, PROMPTS[index // 4], completion, 1.0).cpu()
            assert (completion.logprobs - truth).abs().mean() < 0.05

    def test_the_store_is_gone_when_sampling_is_done(self):
        sampler = Sampler(make_policy("qwen2", use_cpu=False), GRPOConfig(max_completion_length=9, bf16=False))
        sampler.complete(as_prompts(PROMPTS), 4)
        sampler.captures.release()
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            sampler.complete(as_prompts(PROMPTS), 4)
            sampler.captures.release()  # what lasts, else
            assert torch.cuda.memory_allocated() == before


def test_greedy_sampling_leaves_torchs_generator_alone():
    """So that training is the same with evaluations and without, and after one that was cut short."""
    policy = make_policy("llama")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Sampler(policy, GRPOConfig(max_completion_length=2)).complete_greedily(as_prompts(PROMPTS))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("error", [AttributeError("no layer_idx"), RuntimeError(), ValueError("\nno")])
def test_whatever_the_trial_raises_is_a_refusal_with_a_reason(error, monkeypatch):
    policy = make_policy("llama")

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(policy.decoder.layers[0], "forward", failing)
    assert engine.refusal(policy, policy.dtype) and "\n" not in engine.refusal(policy, policy.dtype)
    assert policy.model.training and policy.base.config._attn_implementation != "lowmem_grpo"


def test_a_window_that_is_not_passed_on_is_a_refusal():
    """Qwen2-MoE's layers have one and leave it to the mask, which is not made here."""
    policy = make_policy("llama")
    policy.decoder.layers[1].self_attn.sliding_window = 24
    assert "sliding window" in engine.refusal(policy, policy.dtype)


def test_a_linear_layer_of_another_kind_is_left_to_peft():
    """Its weight may be codes with a scale (8-bit), which cannot be merged as they stand."""
    policy = make_policy("llama", load_in_4bit=False)

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    policy.decoder.layers[0].self_attn.q_proj.get_base_layer().__class__ = Scaled
    text = torch.tensor([PROMPTS[2]])
    with policy.inference():
        expected = policy.decoder(input_ids=text).last_hidden_state
        with fast_linears(policy.base, policy.dtype, dense=True):
            found = policy.decoder(input_ids=text).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-5)


def test_a_stop_string_may_begin_with_a_space():
    """Also where the decoder takes the space away that a text begins with."""
    tokens = Tokenizer(models.WordLevel({"▁": 0, "a": 1, "b": 2}, unk_token="b"))
    tokens.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    policy = make_policy("llama")
    policy.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens)
    policy.eos_token_ids = [99]
    found = ending(policy, SamplingParams(max_completion_length=9, temperature=1.0, stop_strings=(" a",)))
    assert found([2, 0]) is None and found([2, 0, 1]) == "stop"


def test_a_stop_string_is_found_among_tokens_of_a_byte():
    """The window begins within the four bytes of an emoji, which alone would hide the bytes after it."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    tokens.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    policy = make_policy("llama")
    policy.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens)
    policy.eos_token_ids = [0]
    for text in ("xx🙂é!", "🙂🙂é!", "ééé!", "x🙂xé!"):
        found = ending(policy, SamplingParams(max_completion_length=99, temperature=1.0, stop_strings=("é!",)))
        ids = list(text.encode())
        assert found(ids) == "stop" and found(ids[:-1]) is None, text


def test_what_fitted_is_remembered_and_reported(monkeypatch):
    policy = make_policy("llama")
    sampler = ShapedSampler(policy, max_completion_length=12)
    whole = sampler.sampled(4)
    failures, forward = [], policy.decoder.forward

    def short_of_memory(*args, **kwargs):
        if kwargs["input_ids"].shape[1] == 1 and len(kwargs["input_ids"]) > 3:
            failures.append(1)
            raise torch.OutOfMemoryError("made up")
        return forward(*args, **kwargs)

    monkeypatch.setattr(policy.decoder, "forward", short_of_memory)
    first = sampler.sampled(4)
    assert len(failures) == 3 and first.metrics["rollout/slots"] == 3 and first.metrics["rollout/out_of_memory"] == 3
    assert first.metrics["rollout/kv_mib"] < whole.metrics["rollout/kv_mib"]
    second = sampler.sampled(4)
    assert len(failures) == 3, "it was not tried again"
    assert second.metrics["rollout/slots"] <= 3 and ids_of(second.completions) == ids_of(first.completions)


def test_a_call_may_take_fewer_tokens_than_the_configuration_but_not_more():
    """As an evaluation of a planned run does. What is drawn does not depend on it."""
    sampler = ShapedSampler(make_policy("llama"), max_completion_length=20, rollout_token_budget=400)
    found = []
    for at_most in (None, 200, 4000):
        torch.manual_seed(0)
        found.append(sampler.complete(as_prompts(PROMPTS), 4, at_most=at_most))
    slots = [sampled.metrics["rollout/slots"] for sampled in found]
    assert slots[1] < slots[0] == slots[2] < 12
    assert ids_of(found[0].completions) == ids_of(found[1].completions) == ids_of(found[2].completions)


@pytest.mark.parametrize("paged", [True, False])
def test_keys_and_values_are_in_pages_on_a_gpu_where_that_is_asked_for(paged):
    policy = make_policy("llama")
    sampler = ShapedSampler(policy, max_completion_length=200, rollout_paged=paged)
    assert not sampler.store_shape(PROMPTS, 4, 900).paged
    policy.device = torch.device("cuda")
    assert sampler.store_shape(PROMPTS, 4, 900).paged == paged


def test_no_prompt_makes_no_completion_and_an_empty_one_is_refused():
    policy = make_policy("llama")
    assert run(policy, prompts=[]) == []
    with pytest.raises(ValueError, match="prompt 1 has no token; a completion needs one to go on from"):
        run(policy, prompts=[[5], []])


def test_generate_in_the_engines_place_leaves_the_random_numbers_alone():
    sampler = ShapedSampler(make_policy("llama"))
    sampler.engine_refusal = "a test"
    first = sampler.run()
    after = torch.rand(3)
    torch.manual_seed(0)
    torch.randint(2**62, ())
    assert torch.equal(torch.rand(3), after), "one number is taken, whatever is sampled"
    assert ids_of(sampler.run()) == ids_of(first) != ids_of(sampler.run(seed=1))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_batch_are_refused(kind):
    policy = make_policy("llama")
    policy.base.config.rope_parameters = {"rope_type": kind, "rope_theta": 10_000.0}
    assert engine.refusal(policy, policy.dtype) == "its rotary embedding depends on the longest text of a batch"


def test_a_forward_that_others_put_on_a_layer_survives():
    policy = make_policy("llama")
    layer = policy.decoder.layers[0].mlp.up_proj
    own = layer.forward = lambda x, given=layer.forward: given(x)
    run(policy)
    assert layer.forward is own


def with_bytes(policy):
    """The policy with a decoder as Llama 2's: a byte of each character that is not in the vocabulary is a token."""
    ids = {f"<0x{byte:02X}>": byte for byte in range(100, 228)}
    ids = {token: place for place, token in enumerate(ids)}  # bytes 100 ... 227 are ids 0 ... 127
    tokens = Tokenizer(models.BPE(ids, [], byte_fallback=True))
    tokens.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    policy.tokenizer, policy.eos_token_ids = PreTrainedTokenizerFast(tokenizer_object=tokens), [999]
    return policy, lambda text: [byte - 100 for byte in text.encode()]


@pytest.mark.parametrize("stop", ["é", "éx", "xé"])
@pytest.mark.parametrize("before", ["", "ßß", "xßxß", "ߐ"])
def test_a_stop_string_is_found_behind_other_bytes(before, stop):
    """A window that begins inside a character has replacement characters up to the next ordinary token."""
    policy, encode = with_bytes(make_policy("llama"))
    found = ending(policy, SamplingParams(max_completion_length=99, temperature=1.0, stop_strings=(stop,)))
    ids = encode(before + stop)
    assert [found(ids[: n + 1]) for n in range(len(ids))] == [None] * (len(ids) - 1) + ["stop"]


def test_a_stop_string_that_the_whole_text_does_not_show_is_none():
    """The last bytes of one character and the first of another, between bytes that are no text."""
    policy, encode = with_bytes(make_policy("llama"))
    found = ending(policy, SamplingParams(max_completion_length=99, temperature=1.0, stop_strings=("é",)))
    lone = encode("é")[-1:] * 9  # nine continuation bytes: the decoder gives up the whole run
    assert policy.tokenizer.decode(lone + encode("é")) == "\ufffd" * 11
    assert found(lone + encode("é")) is None


def test_what_generate_stopped_is_not_padded_out():
    """generate's own criterion compares tokens, and stops where the decoder shows replacement characters."""
    policy, _ = with_bytes(make_policy("llama"))
    params = SamplingParams(max_completion_length=40, temperature=1.0, stop_strings=("x",))
    torch.manual_seed(0)
    for completion in hf.sample(policy, PROMPTS, 8, params, 10_000)[0]:
        shown = "x" in policy.tokenizer.decode(completion.ids)
        assert completion.finish == ("stop" if shown else "length")
        assert completion.finish == "stop" or len(completion.ids) == 40


def test_a_share_of_the_prompts_is_completed_as_among_all():
    sampler = Sampler(make_policy("qwen2"), GRPOConfig(max_completion_length=6, temperature=1.2))

    def ids(share=None):
        torch.manual_seed(3)
        return [completion.ids for completion in sampler.complete(as_prompts(PROMPTS), 2, share).completions]

    whole = ids()
    assert ids(range(1)) + ids(range(1, len(PROMPTS))) == whole and ids(range(0)) == []
    after = torch.rand(())
    ids()
    assert torch.rand(()) == after  # one number is drawn, whatever the share
    sampler.engine_refusal = "a test"
    first, second = ids(range(1)), ids(range(1, 2))
    assert len(first) == len(second) == 2 and first == ids(range(1))


def test_prompts_are_prefilled_where_attention_knows_no_grouped_queries(family, monkeypatch):
    """As on a GPU without flash attention."""
    policy = make_policy(family)
    truth = run(policy)
    monkeypatch.setattr(layouts, "takes_groups", lambda query, key: False)
    monkeypatch.setattr(packed_attention, "takes_groups", lambda query, key: False)
    for found, stepped in zip(run(policy), truth, strict=True):
        assert found.ids == stepped.ids
        torch.testing.assert_close(found.logprobs, stepped.logprobs, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("flash", "heads", "size", "grouped"),
    [(False, 4, 128, False), (True, 4, 128, True), (True, 4, 512, False), (False, 28, 128, True)],
)
def test_a_gpu_never_has_all_scores_of_prompts_in_memory(flash, heads, size, grouped, monkeypatch):
    """Its kernels but flash's leave grouped queries to plain products: 4 x 28 x 2048 x 2048 numbers, here."""
    monkeypatch.setattr(packed_attention, "flash_serves", lambda device, dtype: flash)
    shape, calls = (4, heads, 2048, size), []
    query, key, value = (torch.empty(4, n, *shape[2:], dtype=torch.half, device="meta") for n in (28, heads, heads))

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                calls.append(args[0].shape[1] != args[1].shape[1])
            return func(*args, **kwargs or {})

    kv = {0: LayerShape(28, heads, size, 0)}
    rows = Store(kv, StoreShape(4, 2048, 0, 0), torch.half, torch.device("meta")).own
    each = torch.arange(4, device="meta")
    with Watching():
        out = layouts.Prefill(rows, each, each).attend(query, key, value, Scoring(0, 0.1, None, None))
        alone = packed_attention.causal_attention((query, key, value), {}, Scoring(0, 0.1, None, None))
    assert out.shape == alone.shape == (4, 2048, 28, size)
    assert any(calls) == (grouped and heads < 28)
