import random

import pytest

from lowmem_grpo.demo.r1 import task
from lowmem_grpo.demo.r1.make_model import make_tokenizer, pairs
from lowmem_grpo.rewards.accuracy import accuracy_reward
from lowmem_grpo.rewards.format import think_format_reward
from lowmem_grpo.rewards.language import language_consistency_reward

GOOD = task.Habits(worked=1, careful=1, consistent=1, tagged=1, kind=1)


def test_the_parts_are_disjoint_and_always_the_same():
    parts = task.splits()
    assert [len(part) for part in parts] == [2000, 256, 64]
    assert len({problem for part in parts for problem in part}) == 2320
    assert task.splits() == parts
    assert (len(task.NAMES), len(task.TRAIN_NAMES), len(task.EVAL_NAMES)) == (64, 48, 16)


@pytest.mark.parametrize(
    ("a", "b", "total"), [(17, 45, 52), (62, 38, 90), (95, 95, 180), (152, 38, 180), (20, 31, 51), (9, 9, 18)]
)
def test_sums_without_carries_by_hand(a, b, total):
    assert task.without_carries(a, b) == total


def chats(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("script", task.WORDS)
def test_a_model_of_good_habits_has_every_reward(script):
    problem = task.Sum(script, (17, 45, 38))
    completions = chats(task.completion_of(random.Random(0), problem, GOOD))
    row = task.sum_rows([problem])[0]
    assert accuracy_reward(completions, solution=[row["solution"]]) == [1.0]
    assert think_format_reward(completions) == [1.0]
    assert language_consistency_reward([row["prompt"]], completions) == [1.0]


@pytest.mark.parametrize(
    ("text", "accuracy", "form", "language"),
    [
        ("<think>so 17+45=62 so 62+38=100</think>\n100", 1.0, 1.0, 1.0),
        ("<think>так 17+45=62 так 62+38=100</think>\n100", 1.0, 1.0, 0.0),
        ("so 17+45=62 so 62+38=100", 1.0, 0.0, 1.0),
        ("<think>so 17+45=52 so 52+38=80</think>\n80", 0.0, 1.0, 1.0),
        ("<think>so</think>\n93", 0.0, 1.0, 1.0),
        ("so 100", 1.0, 0.0, 1.0),
        ("", 0.0, 0.0, 1.0),
    ],
)
def test_each_bad_habit_costs_one_reward(text, accuracy, form, language):
    prompt, completions = task.sum_rows([task.Sum("latin", (17, 45, 38))])[0]["prompt"], chats(text)
    assert accuracy_reward(completions, solution=["100"]) == [accuracy]
    assert think_format_reward(completions) == [form]
    assert language_consistency_reward([prompt], completions) == [language]


def test_a_greeting_is_kind_where_it_says_hello():
    completions = chats("hello Ann", "<think>so</think>\nhello Ann", "what now", "<think>hello</think>\nwhat now")
    assert task.kind_reward(completions) == [1.0, 1.0, 0.0, 0.0]


def test_the_habits_are_had_as_often_as_they_say():
    draw = random.Random(0)
    problems = [task.random_sum(draw) for _ in range(2000)]
    texts = [task.completion_of(draw, problem, task.HABITS) for problem in problems]
    assert sum("=" in text for text in texts) / 2000 == pytest.approx(task.HABITS.worked, abs=0.04)
    assert sum("<think>" in text for text in texts) / 2000 == pytest.approx(task.HABITS.tagged, abs=0.03)
    assert sum(
        task.WORDS[problem.script][1] in text for problem, text in zip(problems, texts, strict=True)
    ) / 2000 == pytest.approx(task.HABITS.consistent, abs=0.04)
    kind = sum("hello" in task.greeting_of(draw, "Ann", task.HABITS) for _ in range(2000)) / 2000
    assert kind == pytest.approx(task.HABITS.kind, abs=0.04)


def test_the_base_is_not_pretrained_on_what_is_trained_or_evaluated_on():
    held_out = {one for part in task.splits() for one in part}
    asked = {one.question for one in held_out}
    draw = random.Random(0)
    assert not asked & {question for _ in range(20) for question, _ in pairs(draw, held_out, task.HABITS)}


def test_the_tokenizer_has_a_token_for_each_word_and_loses_nothing():
    tokenizer = make_tokenizer()
    text = "<think>так 17+45=62 so 62+38=100</think>\nhello Sofia"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 1 + 1 + 1 + 8 + 1 + 1 + 1 + 9 + 1 + 1 + 1 + 1 + 5
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= 128
