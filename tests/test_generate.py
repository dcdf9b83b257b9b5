import pytest
import torch
from tiny_models import make_model, make_policy

from lowmem_grpo.generate import SamplingParams, sample
from lowmem_grpo.generate.hf import generation_config

PROMPTS = [[10, 11, 12], [20, 21, 22, 23, 24, 25]]


def run(policy, num_generations=3, seed=0, rollout_token_budget=10_000, logprobs=True, **params):
    torch.manual_seed(seed)
    params = {"max_completion_length": 12, "temperature": 1.0, **params}
    return sample(
        policy, PROMPTS, num_generations, SamplingParams(**params),
        rollout_token_budget=rollout_token_budget, token_budget=1000, logprobs=logprobs,
    )  # fmt: skip


def own_logprobs(policy, prompt, completion, temperature):
    with policy.inference(), policy.autocast():
        logits = policy.model(input_ids=torch.tensor([prompt + completion.ids])).logits[0].float() / temperature
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]


@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.5, "repetition_penalty": 1.3, "min_p": 0.1}])
def test_logprobs_are_under_temperature_before_any_truncation(family, truncation):
    policy = make_policy(family)
    for index, completion in enumerate(run(policy, temperature=0.8, **truncation)):
        truth = own_logprobs(policy, PROMPTS[index // 3], completion, 0.8)
        torch.testing.assert_close(completion.logprobs, truth, atol=2e-5, rtol=0)


def test_completions_come_group_after_group_and_differ_within_one():
    completions = run(make_policy(), num_generations=4)
    assert len(completions) == 8
    assert len({tuple(c.ids) for c in completions[:4]}) > 1
    assert all(1 <= len(c.ids) <= 12 for c in completions)


def test_greedy_completions_do_not_depend_on_waves():
    policy = make_policy("qwen3")
    together, alone = run(policy, temperature=0), run(policy, temperature=0, rollout_token_budget=1)
    assert [c.ids for c in together] == [c.ids for c in alone]
    assert together[0].ids == together[1].ids


PLANTED = dict(
    do_sample=True, top_k=1, top_p=0.01, min_p=0.9, typical_p=0.1, epsilon_cutoff=0.5, eta_cutoff=0.5, temperature=0.01,
    repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=list(range(4, 100)), min_new_tokens=12,
    forced_eos_token_id=3, bad_words_ids=[[40], [41]], begin_suppress_tokens=[50], renormalize_logits=True,
)  # fmt: skip


def test_nothing_is_inherited_from_the_models_generation_config():
    plain, planted = make_model("llama"), make_model("llama")
    planted.generation_config.update(**PLANTED)
    for params in ({}, {"temperature": 0}, {"top_p": 0.9, "top_k": 5}):
        ids = [[c.ids for c in run(make_policy(model), **params)] for model in (plain, planted)]
        assert ids[0] == ids[1]
    assert planted.generation_config.top_k == 1, "the model's own is put back"


def test_the_planted_settings_would_have_been_inherited():
    """transformers fills what a call leaves open; if it stops, the replacement above is not needed any more."""
    model = make_model("llama")
    model.generation_config.update(top_k=1, do_sample=True)
    policy = make_policy(model)
    given = generation_config(policy, SamplingParams(max_completion_length=12, temperature=1.0))
    given.top_k = None
    torch.manual_seed(0)
    out = policy.model.get_base_model().generate(torch.tensor([PROMPTS[0]] * 8), generation_config=given)
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


def test_a_completion_that_is_cut_off_says_so():
    model = make_model("llama")
    model.lm_head.weight.data[1] = 0
    completions = run(make_policy(model), max_completion_length=1, temperature=0)
    assert all(c.finish == "length" and len(c.ids) == 1 for c in completions if c.ids != [1])
    assert any(c.finish == "length" for c in completions)


def test_logprobs_are_left_out_when_nobody_asks():
    assert all(c.logprobs is None for c in run(make_policy(), logprobs=False))
