"""Rows to examples: their tokens, and which of them are learnt."""

import math

import pytest
from datasets import Dataset
from tiny_models import DEMO_MODEL
from transformers import AutoTokenizer

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.data.examples import tokenize_examples
from lowmem_grpo.data.prompts import tokenize_prompts
from lowmem_grpo.errors import InputError

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Takes the thoughts out of all turns but the last, as Qwen3's and DeepSeek's do.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer_with(template=PLAIN):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = template
    return tokenizer


def say(role, content):
    return {"role": role, "content": content}


def marked(rows, template=PLAIN, **settings):
    """The first row with what is learnt in brackets."""
    tokenizer = tokenizer_with(template)
    examples, _ = tokenize_examples(Dataset.from_list(rows), tokenizer, SFTConfig(use_cpu=True, **settings))
    text, inside = "", False
    for token_id, counted in zip(examples[0].ids, examples[0].counted, strict=True):
        text += "[" * (counted and not inside) + "]" * (inside and not counted) + tokenizer.decode([token_id])
        inside = counted
    return text + "]" * inside


TURNS = [say("user", "1+1="), say("assistant", "2"), say("user", "2+2="), say("assistant", "4")]
SLIM = [
    {"from": "system", "value": "Add.", "weight": None}, {"from": "human", "value": "1+1=", "weight": 0},
    {"from": "gpt", "value": "2", "weight": 1},
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "settings", "learnt"),
    [
        ({"text": "1+1=2"}, {}, "1[+1=2<|end|>]"),
        ({"text": "1+1=2<|end|>"}, {}, "1[+1=2<|end|>]"),
        ({"prompt": "1+1=", "completion": "2"}, {}, "1+1=[2<|end|>]"),
        ({"prompt": "1+1=", "completion": "2"}, {"completion_only_loss": False}, "1[+1=2<|end|>]"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:2]}, {}, "<|user|>1+1=<|assistant|>[2<|end|>\n]"),
        ({"prompt": TURNS[:3], "completion": TURNS[3:]}, {},
         "<|user|>1+1=<|assistant|>2<|end|>\n<|user|>2+2=<|assistant|>[4<|end|>\n]"),
        ({"messages": TURNS[:2]}, {}, "<|user|>[1+1=<|assistant|>2<|end|>\n]"),
        ({"messages": TURNS}, {"assistant_only_loss": True},
         "<|user|>1+1=<|assistant|>[2<|end|>]\n<|user|>2+2=<|assistant|>[4<|end|>]\n"),
        ({"prompt": TURNS[:2], "completion": TURNS[2:]}, {"assistant_only_loss": True},
         "<|user|>1+1=<|assistant|>2<|end|>\n<|user|>2+2=<|assistant|>[4<|end|>]\n"),
        ({"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]},
         {"assistant_only_loss": True}, "<|user|>1+1=<|assistant|>[2<|end|>]\n"),
        ({"prompt": [TURNS[0], say("assistant", "so ")], "completion": [say("assistant", "2")]}, {},
         "<|user|>1+1=<|assistant|>so [2<|end|>\n]"),
        ({"messages": TURNS[:2]}, {"assistant_only_loss": True, "system_prompt": "Add."},
         "<|system|>Add.<|user|>1+1=<|assistant|>[2<|end|>]\n"),
        ({"conversations": SLIM}, {}, "<|system|>Add.<|user|>1+1=[<|assistant|>2<|end|>\n]"),
        ({"conversations": SLIM}, {"assistant_only_loss": True}, "<|system|>Add.<|user|>1+1=<|assistant|>[2<|end|>]\n"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]}, {"assistant_only_loss": True},
         "<|user|>1+1=<|assistant|>2<|end|>\n<|user|>2+2=<|assistant|>[4<|end|>]\n"),
        ({"prompt": TURNS[:1], "completion": [TURNS[1], TURNS[2], {**TURNS[3], "weight": 0.0}]}, {},
         "<|user|>1+1=<|assistant|>[2<|end|>\n]<|user|>2+2=<|assistant|>4<|end|>\n"),
    ],
)  # fmt: skip
def test_what_is_learnt_is_worked_out_by_hand(row, settings, learnt):
    assert marked([row], **settings) == learnt


def test_the_masks_of_a_template_with_and_without_generation_tags_are_the_same():
    rows = [{"messages": TURNS}]
    assert marked(rows, PLAIN, assistant_only_loss=True) == marked(rows, TAGGED, assistant_only_loss=True)


def test_a_prompt_has_the_ids_that_training_by_rewards_gives_it():
    tokenizer = tokenizer_with()
    rows = Dataset.from_list([{"prompt": TURNS[:3], "completion": TURNS[3:]}])
    (example,), _ = tokenize_examples(rows, tokenizer, SFTConfig(use_cpu=True))
    (prompt,), _ = tokenize_prompts(rows, tokenizer, GRPOConfig(use_cpu=True))
    assert example.ids[: example.start] == prompt.ids


def test_what_is_too_long_is_dropped_whole_and_counted():
    rows = Dataset.from_list([{"text": "1+1=2"}, {"text": "1+1=2" * 9}])
    examples, dropped = tokenize_examples(rows, tokenizer_with(), SFTConfig(use_cpu=True, max_length=10))
    assert len(examples) == dropped == 1 and len(examples[0].ids) == 6


def test_without_a_template_a_chat_is_a_transcript_with_an_end():
    assert marked([{"conversations": SLIM}], None) == "System: Add.\n\nUser: 1+1=[\n\nAssistant: 2<|end|>]"
    assert marked([{"prompt": TURNS[:1], "completion": TURNS[1:2]}], None).endswith("Assistant:[ 2<|end|>]")


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([{"question": "1+1", "answer": "2"}], {}, "neither prompt and completion nor messages"),
        ([{"text": "1+1"}], {"completion_only_loss": True}, "completion_only_loss is for rows with prompt and completion"),
        ([{"text": "1+1"}], {"assistant_only_loss": True}, "assistant_only_loss is for chats"),
        ([{"prompt": "1", "completion": "2"}], {"assistant_only_loss": True}, "row 0 of train_dataset has texts"),
        ([{"messages": TURNS[:1]}], {"assistant_only_loss": True}, "row 0 of train_dataset has no token to learn"),
        ([{"text": "1+1=2" * 9}], {"max_length": 10}, "every row of train_dataset is longer than max_length=10"),
        ([{"text": None}, {"text": "1"}], {}, "row 0 of train_dataset has no text; fill it"),
        ([{"prompt": "1", "completion": math.nan}], {}, "row 0 of train_dataset has no completion; fill it"),
        ([{"text": "1", "tools": [{"type": "function"}]}], {}, "row 0 of train_dataset has tools, and its prompt is a text"),
        ([{"text": "1", "weight": -1.0}], {}, "row 0 of train_dataset has the weight -1.0"),
        ([{"text": "1", "weight": 1e39}], {}, "row 0 of train_dataset has the weight 1e\\+39; it has to be 0, or a number"),
        ([{"messages": "1+1"}], {}, "row 0 of train_dataset has the messages"),
        ([{"messages": [say("narrator", "1")]}], {}, "has a message of the role 'narrator', which is none of"),
        ([{"conversations": [{"from": "narrator", "value": "1"}]}], {}, "has a message of the role 'narrator'"),
        ([{"conversations": [{"from": ["human"], "value": "1"}]}], {}, "row 0 of train_dataset has the conversations"),
        ([{"messages": TURNS, "tools": [{"type": "function"}]}], {}, "has tools, which the chat template leaves out"),
        ([{"prompt": "1", "completion": TURNS[1:2]}], {}, "has a text and a list of messages side by side"),
        ([{"messages": [{**one, "weight": 0} for one in TURNS]}], {}, "row 0 of train_dataset has no token to learn"),
        ([{"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}], {}, "has a message of weight 0.5; it has to be 1, or 0"),
        ([{"prompt": TURNS[:1], "completion": []}], {}, "row 0 of train_dataset has the completion '\\[\\]'; a chat is a"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_is_refused_in_a_sentence(rows, settings, words):
    with pytest.raises(InputError, match=words):
        tokenize_examples(Dataset.from_list(rows), tokenizer_with(), SFTConfig(use_cpu=True, **settings))


def test_a_template_that_forgets_thoughts_is_refused_where_turns_cannot_be_told():
    turns = [say("user", "1+1="), say("assistant", "<think>1</think>2"), *TURNS[2:]]
    with pytest.raises(InputError, match=r"rendered otherwise as it grows.*generation"):
        marked([{"messages": turns}], FORGETFUL, assistant_only_loss=True)
    with pytest.raises(InputError, match="rendered otherwise as it grows, so that turn 1, of weight 0, cannot be"):
        marked([{"messages": [turns[0], {**turns[1], "weight": 0}, *turns[2:]]}], FORGETFUL)
    assert marked([{"prompt": turns[:3], "completion": turns[3:]}], FORGETFUL).endswith("2+2=<|assistant|>[4<|end|>]")
