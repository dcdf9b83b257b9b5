"""The score head of an adapter: what it computes, and that it is learnt, saved and loaded with its adapter."""

from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from safetensors.torch import load_file, save_file
from test_adapters import gradients, logprobs, same, wake
from tiny_models import DEMO_MODEL, make_model, make_policy
from transformers import AutoTokenizer

from lowmem_grpo.errors import InputError
from lowmem_grpo.lookup import has_score_head
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.score_head import SCORE, ScoreHead
from lowmem_grpo.run.checkpoint import load_adapter, save_checkpoint

TEXTS = [[*range(5, 25)], [*range(30, 41)], [7]]
CPU = torch.device("cpu")


def named_model(family: str = "qwen2", name: str = "tiny") -> Any:
    model = make_model(family)
    model.name_or_path = name  # which its adapters name as their base
    return model


def policy_with_critic(model: Any = None, **settings) -> Policy:
    policy = make_policy(model or named_model(), **settings)
    policy.add("critic", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    wake(policy, "critic")
    policy.add_score_head("critic", seed=3)
    return policy


def scores(policy: Policy, texts=TEXTS, padding_free=True) -> torch.Tensor:
    """Of each whole text, in order."""
    found: list[Any] = [None] * len(texts)
    batches = pack(
        texts, [[0]] * len(texts), token_budget=64, pad_token_id=0, device=policy.device, padding_free=padding_free
    )
    for batch in batches:
        for sequence, score in zip(batch.sequences.tolist(), policy.scores(batch), strict=True):
            found[sequence] = score
    return torch.stack(found)


def test_a_score_is_the_product_of_hidden_state_and_weight():
    head = ScoreHead(2, CPU, seed=0)
    head.load(torch.tensor([[3.0, -0.5]]))
    states = torch.tensor([[1.0, 2.0], [0.0, 4.0]], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(states)
    assert found.tolist() == [2.0, -2.0] and found.dtype == torch.float32


def test_a_new_head_has_the_variance_of_one_over_the_width_and_draws_by_its_own_seed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    head, again, other = (ScoreHead(4095, CPU, seed).weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert head.std().item() == pytest.approx(1 / 64, rel=0.03)
    assert torch.equal(head, again) and not torch.equal(head, other)


def test_a_head_learns_with_the_adapter_that_is_worn_and_no_other_does():
    policy = policy_with_critic()
    own = logprobs(policy)
    with policy.wearing("critic"):
        scores(policy).square().sum().backward()
    learned = gradients(policy)
    assert {*policy.parameters_of("critic")} == {*learned, SCORE}
    assert policy.score_heads["critic"].weight.grad.count_nonzero() == 64
    assert SCORE not in policy.parameters_of(policy.adapter) and torch.equal(logprobs(policy), own)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3", "phi3"])
def test_peft_loads_an_adapter_with_its_head_from_its_folder(family, tmp_path):
    model = named_model(family, str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "base")
    policy = policy_with_critic(model, load_in_4bit=False)
    with policy.wearing("critic"):
        wanted = scores(policy)
    policy.save(tmp_path / "critic", "critic")
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "critic", num_labels=1, dtype=torch.float32
    )
    found = torch.stack([theirs(input_ids=torch.tensor([text])).logits[0, 0] for text in TEXTS])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert has_score_head(tmp_path / "critic") and not has_score_head(tmp_path / "base")


def test_a_saved_adapter_is_put_on_another_copy_of_its_base_and_scores_alike(tmp_path):
    policy = policy_with_critic()
    policy.save(tmp_path / "critic", "critic")
    policy.save(tmp_path / "own")
    other = make_policy()
    before = logprobs(other)
    other.add_from("reward", str(tmp_path / "critic"))
    other.add_from("teacher", str(tmp_path / "own"))
    assert torch.equal(logprobs(other), before) and [*other.score_heads] == ["reward"]
    for mine, theirs in (("reward", "critic"), ("teacher", policy.adapter)):
        one = {path.replace(mine, theirs): values for path, values in other.parameters_of(mine).items()}
        assert same(one, policy.parameters_of(theirs))
    with policy.wearing("critic"), other.wearing("reward"):
        assert torch.equal(scores(policy), scores(other))


def test_an_adapter_of_another_base_is_refused(tmp_path):
    policy = policy_with_critic(named_model("llama"))
    policy.save(tmp_path / "critic", "critic")
    weights = load_file(tmp_path / "critic/adapter_model.safetensors")
    save_file(dict([*weights.items()][1:]), tmp_path / "critic/adapter_model.safetensors")
    with pytest.raises(InputError, match="has other weights than one of LlamaForCausalLM"):
        policy.add_from("reward", str(tmp_path / "critic"))


@pytest.mark.parametrize("padding_free", [True, False])
def test_scores_are_those_of_each_text_alone(padding_free):
    policy = policy_with_critic(load_in_4bit=False)
    assert policy.packs
    with policy.wearing("critic"), torch.no_grad():
        found = scores(policy, padding_free=padding_free)
        for text, score in zip(TEXTS, found, strict=True):
            states = policy.decoder(input_ids=torch.tensor([text])).last_hidden_state[0, -1]
            torch.testing.assert_close(score, states @ policy.score_heads["critic"].weight[0], rtol=0, atol=1e-5)


def test_a_checkpoint_has_the_head_of_the_policys_own_adapter(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    policy, other = make_policy(tokenizer=tokenizer), make_policy(tokenizer=tokenizer)
    policy.add_score_head(policy.adapter, seed=1)
    save_checkpoint(tmp_path / "checkpoint-1", policy, {}, {})
    with pytest.raises(InputError, match="holds another adapter than this run's"):
        load_adapter(tmp_path / "checkpoint-1", other)
    other.add_score_head(other.adapter, seed=2)
    load_adapter(tmp_path / "checkpoint-1", other)
    assert torch.equal(scores(policy), scores(other))
