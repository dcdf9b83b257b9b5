import pytest
import torch
from tiny_models import make_policy

from lowmem_grpo.rewards import get_judge_reward
from lowmem_grpo.rewards.judge import QUESTION

PROMPTS = ["1+2=", [{"role": "user", "content": "3+4="}], "5"]
COMPLETIONS = ["3", [{"role": "assistant", "content": "7, of course"}], ""]


def judge(policy, **settings):
    function = get_judge_reward(**{"criterion": "Is it right?", "yes": "y", "no": "n", **settings})
    function.bind(policy)
    return function


@pytest.mark.parametrize("token_budget", [16384, 1])
def test_a_judgement_is_the_bases_own_next_word_and_not_the_adapters(token_budget):
    policy = make_policy("llama")
    found = judge(policy, token_budget=token_budget)(PROMPTS, COMPLETIONS)
    tokenizer = policy.tokenizer
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("y", "n")]
    for asked, answer, value in zip(("1+2=", "3+4=", "5"), ("3", "7, of course", ""), found, strict=True):
        text = QUESTION.format(prompt=asked, completion=answer, criterion="Is it right?")
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with policy.as_base():
            logits = policy.model(input_ids=ids).logits[0, -1, words]
        assert value == pytest.approx(logits.softmax(-1)[0].item(), rel=6e-6)
        with policy.inference():
            adapted = policy.model(input_ids=ids).logits[0, -1, words]
        assert not torch.allclose(adapted, logits), "the adapters would say something else"


def test_a_snapshot_of_the_reference_does_not_judge():
    policy = make_policy("llama")
    before = judge(policy)(PROMPTS, COMPLETIONS)
    policy.snapshot_reference()
    assert judge(policy)(PROMPTS, COMPLETIONS) == before


def test_before_there_is_a_model_nothing_is_judged():
    assert get_judge_reward()(PROMPTS, COMPLETIONS) == [None] * 3


def test_verdicts_that_begin_alike_are_refused():
    with pytest.raises(ValueError, match="'yes' and 'yeah' begin with the same token; choose other words"):
        judge(make_policy("llama"), yes="yes", no="yeah")
