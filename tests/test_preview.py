"""The data preview: printed and saved before the first step, by a run and by `lowmem-grpo data`."""

import asyncio
import json
import random
import re
import shutil
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import DEMO_MODEL
from torch import nn

from lowmem_grpo import GRPOConfig, cli, train
from lowmem_grpo.demo import task
from lowmem_grpo.errors import UnhealthyRunError
from lowmem_grpo.inputs.prompts import read_data_inputs
from lowmem_grpo.preview import prompts
from lowmem_grpo.preview.prompts import as_text, faults, make_previews, show_preview
from lowmem_grpo.rewards import get_judge_reward, get_soft_overlong_punishment

CONFIG = GRPOConfig(use_cpu=True)
BOXED = "Put the answer in \\boxed{}."


def look(rows, rewards, count=1, **settings):
    inputs = read_data_inputs(str(DEMO_MODEL), rewards, rows, GRPOConfig(use_cpu=True, **settings))
    return inputs, make_previews(inputs, count)


def asked(text, **columns):
    return [{"prompt": [{"role": "user", "content": text}], **columns}]


def test_a_preview_is_worded_by_hand():
    inputs, previews = look(asked(f"1+1=? {BOXED}", solution="one and one is two\n#### 2"), "accuracy_reward")
    assert as_text(inputs, previews) == (
        "data preview: prompt 1 of 1 as the model gets it, 35 tokens\n"
        "    <|user|>1+1=? Put the answer in \\boxed{}.<|assistant|>\n"
        "  gold answer, as it is read\n"
        "    2\n"
        "  a completion that is the gold answer, in the form that the prompt asks for\n"
        "    \\boxed{2}\n"
        "  accuracy_reward: 1.000 for the gold answer, 0.000 for an empty completion"
    )
    assert faults(inputs.rewards, previews) == []


@pytest.mark.parametrize(
    ("text", "rewards", "answer"),
    [
        ("1+1=?", ["accuracy_reward"], "2"),
        ("1+1=? Between <answer> and </answer>.", ["accuracy_reward"], "<answer>2</answer>"),
        ("1+1=? On a last line that begins with ####.", ["accuracy_reward"], "#### 2"),
        (f"1+1=? {BOXED}", ["accuracy_reward", "think_format_reward"], "<think></think>\\boxed{2}"),
        ("1+1=? Think in <think> and </think>.", ["accuracy_reward"], "<think></think>2"),
        ("1+1=?", ["answer_format_reward", "accuracy_reward"], "<think></think><answer>2</answer>"),
        ("1+1=?", [task.answer_reward, task.tag_format_reward], "<think></think><answer>2</answer>"),
    ],
)
def test_the_gold_answer_is_written_as_the_prompt_asks_or_as_it_earns_most(text, rewards, answer):
    inputs, (preview,) = look(asked(text, solution="2"), rewards)
    assert preview.answer == answer
    assert all(of_gold == 1 for of_gold, _ in preview.rewards.values())
    assert faults(inputs.rewards, [preview]) == []


def test_a_template_that_opens_thoughts_begins_the_answer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}<think>{% endif %}"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((DEMO_MODEL / "config.json").read_text())
    rewards = ["think_format_reward", "accuracy_reward"]
    inputs = read_data_inputs(str(tmp_path), rewards, asked(f"1+1=? {BOXED}", answer="2"), CONFIG)
    (preview,) = make_previews(inputs, 1)
    assert preview.answer == "<think></think>\\boxed{2}"
    assert preview.rewards == {"think_format_reward": (1.0, 0.0), "accuracy_reward": (1.0, 0.0)}


def length_of_answer(completions, answer, **kwargs):
    return [0.5] * len(completions)


@pytest.mark.parametrize(
    ("rows", "rewards", "name"),
    [
        (
            asked("1+1=? Between <answer> and </answer>.", answer="2"),
            "solution_format_reward",
            "solution_format_reward",
        ),
        (asked(f"1+1=? {BOXED}", answer="2"), "answer_format_reward", "answer_format_reward"),
        (asked(f"1+1=? {BOXED}", answer="2"), "reasoning_accuracy_reward", None),
        (asked(f"1+1=? {BOXED}", answer="2"), length_of_answer, "length_of_answer"),
        (asked("1+1=?", answer="2"), get_soft_overlong_punishment(4, 2), None),
        (asked("1+1=?", answer="2"), "language_consistency_reward", None),
        (asked("1+1=?", answer="2"), "get_cosine_scaled_reward(max_len=100)", None),
    ],
)
def test_a_gold_answer_that_does_not_earn_the_most_is_warned_of(rows, rewards, name):
    inputs, previews = look(rows, rewards)
    found = faults(inputs.rewards, previews)
    assert len(found) == (name is not None)
    assert name is None or found[0].text.startswith(f"{name} does not give the gold answer the most, in its only row: ")


def in_tags(completions, answer, **kwargs):
    found = [re.search(r"<SOLUTION>(.+)</SOLUTION>", one[0]["content"]) for one in completions]
    return [float(mark is not None and mark[1] == gold) for mark, gold in zip(found, answer, strict=True)]


def in_stars(completions, answer, **kwargs):
    return [1.0 if f"*{gold}*" in one[0]["content"] else None for one, gold in zip(completions, answer, strict=True)]


def test_a_mark_of_the_prompts_own_is_tried_and_one_that_is_not_known_is_no_finding(tmp_path, capsys):
    rows = asked("1+1=? Between <SOLUTION> and </SOLUTION>.", answer="2")
    inputs, previews = look(rows, [in_tags, in_stars])
    assert previews[0].rewards["in_tags"] == (1.0, 0.0) and previews[0].answer == "<SOLUTION>2</SOLUTION>"
    assert show_preview(replace(inputs, output_dir=tmp_path)) == []
    remark = (
        "in_stars does not give the gold answer the most, in its only row: '<SOLUTION>2</SOLUTION>' gets no reward;"
    )
    assert remark in capsys.readouterr().err and remark in (tmp_path / "data_preview.txt").read_text()


SENTENCES = "Paris. It is the capital of France."


@pytest.mark.parametrize("gold", ["first line\nsecond line", f"{SENTENCES}\n\nSo it is."])
def test_an_answer_that_is_read_in_a_mark_alone_is_warned_of_where_no_prompt_asks_for_one(gold):
    inputs, previews = look(asked("Where is it?", answer=gold) * 2, "accuracy_reward", count=2)
    ((situation, found),) = faults(inputs.rewards, previews)
    assert situation == "gold_paid_if_marked/accuracy_reward" and found.startswith(
        "accuracy_reward pays the gold answer only where it is marked, and 2 of the first 2 prompts"
    )
    assert "has 0.000, and" in found and "1.000; ask for that form in the prompts or in system_prompt" in found


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        *(("Which is it, A or B?", gold) for gold in ("B", "(B)", "Paris", "yes")),
        ("1+1=?", "2"),
        ("How far?", "2 km"),
        (f"Which? {BOXED}", SENTENCES),
    ],
)
def test_an_answer_that_is_read_as_the_prompt_asks_for_it_is_not_warned_of(text, gold):
    inputs, previews = look(asked(text, answer=gold), "accuracy_reward")
    assert faults(inputs.rewards, previews) == []
    assert previews[0].answer == (gold if BOXED not in text else rf"\boxed{{{gold}}}")


class OwnModel:
    def __init__(self):
        self.model = nn.Linear(1, 1)

    def __call__(self, completions, **kwargs):
        raise AssertionError


async def asks_a_server(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.0] * len(completions)


def scored(model, completions, **kwargs):
    return [0.0] * len(completions)


def slow(completions, **kwargs):
    time.sleep(0.1 * len(completions))
    return [0.0] * len(completions)


def test_models_servers_and_programs_are_not_run_and_that_is_said(monkeypatch):
    own, calls = OwnModel(), []
    monkeypatch.setattr(
        OwnModel, "__call__", lambda self, completions, **kwargs: calls.append(1) or [0.0] * len(completions)
    )
    held = nn.Linear(1, 1)

    def closure(completions, **kwargs):
        calls.append(held)
        return [0.0] * len(completions)

    def tested(completions, tests, **kwargs):
        calls.append(2)
        return [0.0] * len(completions)

    rows = asked("1+1=?", answer="2", tests=["assert f(1) == 1"])
    made = partial(scored, held)
    made.__name__ = "made"  # type: ignore[attr-defined]
    inputs, previews = look(
        rows, [own, asks_a_server, slow, get_judge_reward(), closure, tested, made], num_generations=2
    )
    assert len(calls) == 3, "each is tried out once, and not called again"
    assert previews[0].rewards == {}
    lines = as_text(inputs, previews).splitlines()[-7:]
    assert lines == [
        "  OwnModel: not called for this, since it asks a model",
        "  asks_a_server: not called for this, since it is async, as those that ask a server are",
        "  slow: not called for this, since it took 0.1 s for each made-up completion",
        "  judge_reward: not called for this, since it asks a model",
        "  closure: not called for this, since it asks a model",
        "  tested: not called for this, since it runs programs",
        "  made: not called for this, since it asks a model",
    ]


def test_a_prompt_that_is_a_whole_chat_with_its_answer_is_warned_of(tmp_path):
    chat = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "So it is \\boxed{2}"}]
    inputs, previews = look([{"prompt": chat, "answer": "2"}], ["accuracy_reward"])
    ((situation, fault),) = faults(inputs.rewards, previews)
    assert situation == "nothing_paid/accuracy_reward"
    assert "gives an empty completion the most, in its only row: the prompt ends with the answer" in fault
    assert show_preview(replace(inputs, output_dir=tmp_path)) == [(situation, fault)]
    begun = [chat[0], {"role": "assistant", "content": "It is \\boxed{"}]
    inputs, previews = look([{"prompt": begun, "answer": "2"}], ["accuracy_reward"])
    assert not [fault for fault in faults(inputs.rewards, previews) if "empty completion" in fault.text]


def test_a_row_without_a_gold_answer_shows_what_an_empty_completion_earns():
    inputs, previews = look(asked("1+1=?", solution=None), ["think_format_reward"])
    shown = as_text(inputs, previews)
    assert (
        "  gold answer: none that the built-in rewards read\n  think_format_reward: 0.000 for an empty completion"
        in shown
    )


def test_what_a_terminal_would_obey_is_written_out_and_a_long_prompt_is_cut():
    inputs, previews = look(
        asked("\x1b[2J" + "x" * 500 + "?", answer="\x1b2"), "accuracy_reward", max_prompt_length=None
    )
    shown = as_text(inputs, previews, 100)
    assert "\x1b" not in shown and "\\x1b" in shown and " characters ...\n" in shown
    assert "x" * 500 in as_text(inputs, previews)


def in_eights(completions, answer, **kwargs):
    right = np.array([one[0]["content"] == "2" for one in completions], dtype=float).reshape(-1, 8)
    return (right > right.min(axis=1, keepdims=True)).astype(float).ravel().tolist()


def test_a_reward_of_whole_groups_is_shown_them():
    inputs, previews = look(asked("1+1=?", answer="2") * 2, in_eights, count=2)
    assert [preview.rewards["in_eights"] for preview in previews] == [(1.0, 0.0)] * 2
    assert faults(inputs.rewards, previews) == []


def draws(completions, **kwargs):
    return [random.random() + torch.rand(()).item() for _ in completions]


def test_random_generators_stay_where_they_are():
    inputs, _ = look(asked("1+1=?", answer="2"), draws)
    states = random.getstate(), torch.get_rng_state()
    make_previews(inputs, 1)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def run(tmp_path, rows, rewards, **settings):
    config = GRPOConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, prompts_per_step=1, num_generations=2, max_completion_length=2,
        max_steps=1, **settings,
    )  # fmt: skip
    return train(str(DEMO_MODEL), rewards, rows, config=config)


def test_a_run_prints_and_saves_the_preview_of_its_first_row_once(tmp_path, capsys):
    rows = [row for n in range(6) for row in asked(f"{n}+1=? {BOXED}", answer=n + 1)]
    run(tmp_path, rows, "accuracy_reward")
    shown = capsys.readouterr().err
    assert shown.index("data preview: prompt 1 of 6") < shown.index("step 1/1")
    assert (tmp_path / "out/data_preview.txt").read_text() == shown[: shown.index("step 1/1")]
    run(tmp_path, rows, "accuracy_reward", resume_from_checkpoint=True)
    assert "data preview" not in capsys.readouterr().err


def test_the_doctor_says_where_gold_answers_do_not_earn_the_most(tmp_path, capsys):
    texts = [f"1+1=? {BOXED}", "1+1=? <answer>", f"1+1=? {BOXED}", "1+1=? <answer>"]
    rows = [row for text in texts for row in asked(text, answer="2")]
    said = (
        "solution_format_reward does not give the gold answer the most, in 2 of the first 4 rows: '<answer>2</answer>'"
    )
    with pytest.raises(UnhealthyRunError, match=said):
        run(tmp_path, rows, "solution_format_reward", doctor="stop")
    found = {line["doctor"]: line["text"] for line in run(tmp_path, rows, "solution_format_reward").findings}
    assert found["gold_not_paid/solution_format_reward"].startswith(said)
    assert capsys.readouterr().err.count(f"doctor: {said}") == 1
    assert said in (tmp_path / "out/data_preview.txt").read_text()


def test_a_command_shows_several_rows_without_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, tmp_path)
    rows = [row for n in range(5) for row in asked(f"{n}+1=? {BOXED}", answer=str(n + 1))] + asked(
        "x" * 600, answer="2"
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["data", "--model", str(tmp_path), "--dataset", "rows.jsonl"]
    assert cli.main([*given, "--reward-funcs", "accuracy_reward", "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert "prompt 1 of 5" in shown and "prompt 2 of 5" in shown and "prompt 3 of 5" not in shown
    assert shown.count("accuracy_reward: 1.000 for the gold answer, 0.000") == 2
    assert "1 prompt is left out, with more than 512 tokens" in shown
    assert cli.main(given) == 0
    assert "prompt 3 of 5" in capsys.readouterr().out
    assert list(tmp_path.glob("grpo-output")) == []


@pytest.mark.parametrize("name", ["countdown?size=3&eval_size=1", "countdown?size=3&eval_size=1&chat=true"])
def test_a_tasks_own_solution_earns_the_most(name, monkeypatch):
    monkeypatch.setattr(prompts, "SLOW_S", 60.0)  # for a busy machine
    inputs, previews = look(name, None, count=3)
    assert [preview.rewards["countdown_reward"] for preview in previews] == [(1.0, 0.0)] * 3
    assert faults(inputs.rewards, previews) == []


@pytest.mark.parametrize("style", ["boxed", "tags", "hash"])
def test_gsm8ks_gold_answers_earn_the_most_in_every_style(style, tmp_path):
    rows = [
        {"question": f"{n} apples and {n} more?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n:,}"} for n in (1, 700, 12345)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    inputs, previews = look(f"gsm8k?style={style}&file={tmp_path}/rows.jsonl", None, count=3)
    assert all(preview.is_asked_for for preview in previews)
    assert [preview.rewards["accuracy_reward"] for preview in previews] == [(1.0, 0.0)] * 3
    assert faults(inputs.rewards, previews) == []
