"""What the doctor sees before the first step, in data, tokenizer and settings."""

import json
import shutil
import time

import pytest
from tiny_models import DEMO_MODEL
from transformers import AutoTokenizer

from lowmem_grpo import GRPOConfig
from lowmem_grpo.checkup.prompts import SITUATIONS, findings
from lowmem_grpo.checkup.training import OF_ANY
from lowmem_grpo.demo import run as demo
from lowmem_grpo.demo import task
from lowmem_grpo.inputs.prompts import read_training_inputs

TRAIN, EVAL = task.splits()
TAIL = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
WHOLE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def look(
    tmp_path, rows=None, eval_rows=None, rewards="accuracy_reward", tokenizer=None, model=str(DEMO_MODEL), **settings
):
    settings = {"max_completion_length": 64, **settings}
    config = GRPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=6, **settings)
    rows = task.rows(TRAIN[:16]) if rows is None else rows
    inputs = read_training_inputs(model, rewards, rows, eval_rows, config, None, tokenizer)
    return findings(inputs)


def asked(*problems, **columns):
    """Rows of problems, with columns in place of theirs."""
    return [{**row, **columns} for row in task.rows(problems)]


def with_template(template):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = template
    return tokenizer


def ending_with(token):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.eos_token = token
    return tokenizer


def mmlu(prompt):
    """Rows as MMLU has them, whose gold answer is a place in a list; `prompt` may show question and choices."""
    rows = [{"question": f"{n}+{n}=", "choices": [str(2 * n), str(n)][:: 1 - n % 2 * 2]} for n in range(20, 36)]
    return [{**row, "prompt": prompt.format(**row), "solution": n % 2} for n, row in enumerate(rows)]


A, B, *REST = TRAIN[:20]
SICK = {
    "evaluated_on_training_prompts": dict(eval_rows=asked(*EVAL[:6], A, B)),
    "one_prompt": dict(rows=asked(A), prompts_per_step=1),
    "repeated_prompts": dict(rows=asked(A, A, A, A, B, *REST)),
    "contradicting_golds": dict(rows=[*asked(*TRAIN[:16]), *asked(A, solution="7")]),
    "same_gold": dict(rows=asked(*TRAIN[:16], solution="7")),
    "answer_in_prompt": dict(
        rows=[{"prompt": f"{task.question(p)}\n#### {sum(p)}", "solution": str(sum(p))} for p in TRAIN[:16]]
    ),
    "golds_begin_with_zero": dict(rows=[{**row, "solution": f"{n:03}"} for n, row in enumerate(task.rows(TRAIN[:16]))]),
    "gold_is_an_index": dict(rows=mmlu("{question} A. {choices[0]} B. {choices[1]}")),
    "question_not_in_prompt": dict(rows=[{**row, "solution": "AB"[n % 2]} for n, row in enumerate(mmlu("{question}"))]),
    "fewer_prompts_than_a_step": dict(rows=asked(*TRAIN[:7])),
    "most_prompts_dropped": dict(
        rows=[
            *asked(*TRAIN[:8]),
            *({"prompt": [{"role": "user", "content": "1+1=" * n}], "solution": "2"} for n in range(30, 39)),
        ],
        max_prompt_length=20,
    ),
    "beyond_the_context": dict(max_completion_length=250),
    "odd_end_of_sequence": dict(tokenizer=ending_with("7")),
    "unseen_end_of_turn": dict(tokenizer=with_template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}[END]{% endfor %}" + TAIL
    )),
    "no_chat_template": dict(tokenizer=with_template(None)),
    "no_generation_prompt": dict(tokenizer=with_template(WHOLE)),
    "template_drops_messages": dict(tokenizer=with_template(TAIL)),
    "implausible_learning_rate": dict(learning_rate=1e-2),
    "warmup_beyond_the_end": dict(warmup_steps=6),
    "implausible_temperature": dict(temperature=0.01),
    "one_token_to_choose": dict(top_k=1),
    "reward_without_weight": dict(rewards=["accuracy_reward", "think_format_reward"], reward_weights=[1.0, 0.0]),
    "answers_do_not_fit": dict(max_completion_length=2),
}  # fmt: skip


@pytest.mark.parametrize("name", SICK)
def test_a_situation_is_seen_and_no_other(tmp_path, name):
    found = look(tmp_path, **SICK[name])
    assert [one.name for one in found] == [name]


@pytest.mark.parametrize(
    "rows",
    [
        mmlu("{question} 0. {choices[0]} 1. {choices[1]}"),
        [{**row, "choices": ["0", "1"]} for row in mmlu("{question} 0 or 1?")],
        [{**row, "choices": None, "input": ""} for row in mmlu("{question}")],
    ],
    ids=["numbered from 0", "numbers themselves", "empty"],
)
def test_choices_that_are_read_are_no_finding(tmp_path, rows):
    assert look(tmp_path, rows) == []


def test_every_situation_is_provoked():
    assert {one.__name__ for one in (*SITUATIONS, *OF_ANY)} == set(SICK)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("implausible_learning_rate", dict(learning_rate=1.0)),
        ("implausible_learning_rate", dict(learning_rate=1e-9)),
        ("implausible_temperature", dict(temperature=10.0)),
        ("one_token_to_choose", dict(min_p=1.0)),
        ("template_drops_messages", dict(tokenizer=with_template(
            "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + TAIL
        ), system_prompt="Add.")),
    ],
)  # fmt: skip
def test_further_cases_of_a_situation_are_seen(tmp_path, name, settings):
    assert name in [one.name for one in look(tmp_path, **settings)]


def model_without_end(tmp_path, **settings):
    """The demo's model, of whose files none names an end-of-sequence token; tokenizer_config.json gets settings."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        found = json.loads((folder / name).read_text())
        found.pop("eos_token", found.pop("eos_token_id", None))
        (folder / name).write_text(json.dumps({**found, **(settings if name.startswith("tok") else {})}))
    return str(folder)


def test_a_made_up_end_of_sequence_is_seen_where_nothing_else_ends_a_completion(tmp_path):
    """Without eos_token, the class of Qwen's tokenizer adds `<|endoftext|>`, a new id, to a vocabulary without it."""
    model = model_without_end(tmp_path)
    (found,) = look(tmp_path, [{"prompt": task.question(p), "solution": str(sum(p))} for p in TRAIN[:16]], model=model)
    assert found.name == "odd_end_of_sequence"
    assert "'<|endoftext|>' is one that it never learnt" in found.text
    assert look(tmp_path, model=model) == [], "the template ends a turn with <|end|>, where sampling stops"


def test_an_ordinary_word_in_the_tokenizers_file_is_an_odd_end_too(tmp_path):
    """Loaded from there, the word becomes a special token."""
    (found,) = look(tmp_path, model=model_without_end(tmp_path, eos_token="7"))
    assert found.name == "odd_end_of_sequence" and "ends sequences with '7'" in found.text


def test_one_gold_answer_among_rows_without_any_is_not_of_every_row(tmp_path):
    rows = task.rows(TRAIN[:16])
    assert look(tmp_path, [rows[0], *({**row, "solution": None} for row in rows[1:])]) == []


def test_two_ways_to_write_a_gold_answer_do_not_contradict(tmp_path):
    for one, other in (("0.5", "1/2"), ("5", "5.0"), ("B", "(B)"), ("1,000", "$1000$")):
        assert look(tmp_path, [*asked(*REST), *asked(A, solution=one), *asked(A, solution=other)]) == []


def test_what_the_doctor_says_of_a_model_is_no_warning_besides(tmp_path, recwarn):
    for name in ("beyond_the_context", "unseen_end_of_turn"):
        assert len(look(tmp_path, **SICK[name])) == 1
    assert not [one for one in recwarn if issubclass(one.category, UserWarning)]


def test_the_sentences_name_numbers_and_remedies(tmp_path):
    (found,) = look(tmp_path, **SICK["evaluated_on_training_prompts"])
    assert found.text == (
        "the training data have 2 of 8 evaluation prompts too, so that the evaluation measures what was learnt by heart; "
        "take them out of one of the two"
    )
    (found,) = look(tmp_path, **SICK["no_generation_prompt"])
    assert "ends before '<|assistant|>'" in found.text


def test_a_healthy_run_is_left_in_peace(tmp_path):
    assert look(tmp_path, eval_rows=asked(*EVAL[:16])) == []
    for settings in (dict(learning_rate=1e-3), dict(learning_rate=1e-6), dict(temperature=0.6), dict(warmup_steps=2)):
        assert look(tmp_path, **settings) == []


def test_the_demo_is_left_in_peace(tmp_path):
    rewards = [task.answer_reward, task.tag_format_reward]
    config = demo.recipe(str(tmp_path), 0)
    assert findings(read_training_inputs(str(demo.MODEL), rewards, task.rows(TRAIN), task.rows(EVAL), config)) == []


@pytest.mark.parametrize(
    "name", ["countdown?size=300", "reasoning_gym:chain_sum?size=300", "reasoning_gym:leg_counting?size=300"]
)
def test_a_task_is_left_in_peace(tmp_path, name):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=6, max_prompt_length=None)
    found = findings(read_training_inputs(str(DEMO_MODEL), None, name, None, config))
    assert [one.name for one in found] == ["beyond_the_context"], "the demo's model was made for 256 characters"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
    ],
    ids=["llama2", "qwen3", "opens_thoughts"],
)
def test_templates_of_well_known_models_are_left_in_peace(tmp_path, template):
    ends = ["</s>", "<|im_end|>"]  # which the demo's tokenizer has not
    assert look(tmp_path, tokenizer=with_template(template), max_prompt_length=None, stop_strings=ends) == []


def test_seven_thousand_rows_are_looked_at_in_less_than_a_second(tmp_path):
    rows = [
        {"prompt": f"{task.question(p)} {n}", "solution": f"so it is\n#### {sum(p)}"} for n in range(4) for p in TRAIN
    ]
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=6, max_completion_length=64)
    inputs = read_training_inputs(str(DEMO_MODEL), "accuracy_reward", rows[:7473], None, config)
    started = time.process_time()
    assert findings(inputs) == []
    assert time.process_time() - started < 1
