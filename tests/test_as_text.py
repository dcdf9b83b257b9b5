"""Completions as rewards and people see them, and the tokens that end them."""

import pytest
from tiny_models import DEMO_MODEL, make_model, make_policy
from transformers import AutoTokenizer

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.data.prompts import Prompt, tokenize_prompts
from lowmem_grpo.data.rows import load_rows
from lowmem_grpo.generate import as_text
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.model.policy import eos_token_ids
from lowmem_grpo.model.turn_end import TurnEnd, turn_end, unseen_turn_end
from lowmem_grpo.rewards import think_format_reward

SPECIAL = ["<think>", "</think>", "<answer>", "</answer>", "[THINK]", "<|im_end|>"]
ASK = [{"role": "user", "content": "1+1="}]


@pytest.fixture
def tokenizer():
    """The demo's, in which the tags are special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False)
    return tokenizer


@pytest.fixture
def policy(tokenizer):
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    return make_policy(model, tokenizer)


def completion(tokenizer, text, finish="eos"):
    return Completion(tokenizer(text, add_special_tokens=False)["input_ids"], None, None, finish)


@pytest.mark.parametrize(
    ("sampled", "finish", "seen"),
    [
        ("<think>x</think><answer>2</answer><|end|>", "eos", "<think>x</think><answer>2</answer>"),
        ("[THINK]x<|user|>y<|end|>", "eos", "[THINK]x<|user|>y"),
        ("<think>x</think>", "length", "<think>x</think>"),
        ("2</answer>", "stop", "2</answer>"),
        ("2<|end|>", "eos", "2"),
        ("<|end|>", "eos", ""),
        ("2<|pad|><|end|>", "eos", "2"),
        (" , . ' ", "length", " , . ' "),
    ],
)
def test_rewards_see_all_that_was_sampled_but_the_end_token_and_padding(sampled, finish, seen, policy):
    made = completion(policy.tokenizer, sampled, finish)
    assert as_text(policy, Prompt("1+1=", [5], {}), made) == seen
    assert as_text(policy, Prompt(ASK, [5], {}), made) == [{"role": "assistant", "content": seen}]


@pytest.mark.parametrize("said", ["<think>\n", "<think>\n\n</think>\n\n", "The answer is "])
def test_rewards_see_what_the_prompt_says_in_front_of_a_completion(said, policy):
    prompt = Prompt(ASK, policy.tokenizer(f"1+1={said}")["input_ids"], {}, said)
    (message,) = as_text(policy, prompt, completion(policy.tokenizer, " 2<|end|>"))
    assert message["content"] == said + " 2"


def test_a_template_that_opens_thoughts_can_earn_the_format_reward(policy):
    policy.tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}<A><think>\n{% endif %}"
    (prompt,), _ = tokenize_prompts(load_rows([{"prompt": ASK}], GRPOConfig()), policy.tokenizer, GRPOConfig())
    texts = [as_text(policy, prompt, completion(policy.tokenizer, text)) for text in ("x</think>2<|end|>", "x<|end|>")]
    assert think_format_reward(texts) == [1.0, 0.0]


def test_a_run_hands_its_rewards_what_the_prompt_says(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    seen = []

    def own(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(one)) for one in completions]

    config = GRPOConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=1, prompts_per_step=2, num_generations=2,
        max_completion_length=3, log_completions=True,
    )  # fmt: skip
    rows = [
        {"prompt": [*ASK, {"role": "assistant", "content": "<think>17"}]},
        {"prompt": [*ASK, {"role": "assistant", "content": "It is"}]},
    ]
    train(str(DEMO_MODEL), own, rows, config=config, tokenizer=tokenizer)
    sampled = seen[-4:]
    assert all(prompt == ASK for prompt, _ in sampled)
    assert sorted(chat[0]["content"][:5] for _, chat in sampled) == ["<thin", "<thin", "It is", "It is"]


# C6: the token that ends a turn

TURN = "{% for m in messages %}<|user|>{{ m.content }}{% if m.role == 'assistant' %}END{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("end", "found"),
    [
        ("<|im_end|>", "<|im_end|>"),
        ("<|im_end|>\n", "<|im_end|>"),
        ("\n<|im_end|>\n", "<|im_end|>"),
        ("<|end|>", None),
        ("<|end|>\n", None),
        ("<|im_end|><|end|>", None),
        ("\n", "<|user|>"),  # the next turn's beginning is all that ends one
        ("", "<|user|>"),
    ],
)
def test_the_token_that_ends_a_turn_is_found(end, found, tokenizer):
    tokenizer.chat_template = TURN.replace("END", end)
    expected = None if found is None else TurnEnd(found, tokenizer.convert_tokens_to_ids(found))
    assert turn_end(tokenizer, [tokenizer.eos_token_id]) == expected


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages[0].content }}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content }}\n\n{% endfor %}",
    ],
)
def test_a_template_that_ends_no_turn_adds_no_token(template, tokenizer):
    tokenizer.chat_template = template
    assert turn_end(tokenizer, [tokenizer.eos_token_id]) is None


def test_sampling_stops_where_a_turn_ends(tokenizer):
    tokenizer.chat_template = TURN.replace("END", "<|im_end|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    assert end in eos_token_ids(model, tokenizer) and tokenizer.eos_token_id in eos_token_ids(model, tokenizer)


def test_an_end_of_several_tokens_is_said_by_name(tokenizer):
    tokenizer.chat_template = TURN.replace("END", "[END]")
    ends = {tokenizer.eos_token_id}
    told = unseen_turn_end(tokenizer, ends, [])
    assert told is not None and "'[END]'" in told and "add it to stop_strings" in told
    assert unseen_turn_end(tokenizer, ends, ["[END]"]) is None
    tokenizer.chat_template = TURN.replace("END", "<|end|>")
    assert unseen_turn_end(tokenizer, ends, []) is None
