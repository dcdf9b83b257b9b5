"""Which column has a row's gold answer, how it is read, and what is said where no row has one."""

import datetime
import logging
from decimal import Decimal

import numpy as np
import pytest
from tiny_models import DEMO_MODEL

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.data.gold import gold_of, is_marked
from lowmem_grpo.data.rows import load_rows
from lowmem_grpo.inputs.prompts import read_evaluation_inputs, read_training_inputs
from lowmem_grpo.rewards import (
    RewardRunner,
    accuracy_reward,
    exact_match_reward,
    get_cosine_scaled_reward,
    reasoning_accuracy_reward,
)

PROSE = "Since each side is as long as the other, the angle is right."
CHOICES = [  # a row, and its gold answer
    # `solution` explains, `answer` is right: trl#3903, open-r1#503
    ({"solution": PROSE, "answer": "4"}, "4"),
    ({"solution": PROSE, "answer": 4}, 4),
    ({"solution": "By AM-GM.", "answer": r"\frac{3\sqrt{3}}{16}"}, r"\frac{3\sqrt{3}}{16}"),
    ({"solution": "x + 1 = 5, so x = 4", "answer": "4"}, "4"),
    ({"solution": "## Step 1\n#### Idea\nadd\n#### Sum\nfour", "answer": "4"}, "4"),
    ({"solution": r"We get \boxed{}", "answer": "4"}, "4"),
    ({"solution": "因为它是偶数，所以等于四。", "answer": "4"}, "4"),
    ({"solution": "The proof is left to the reader", "answer": r"<answer>4</answer>"}, "<answer>4</answer>"),
    # `solution` is right, `answer` explains
    ({"solution": "7", "answer": "There are seven apples left in the box."}, "7"),
    ({"solution": r"so \boxed{3}", "answer": "4"}, r"so \boxed{3}"),
    ({"solution": "3 + 4\n#### 7", "answer": "seven"}, "3 + 4\n#### 7"),
    ({"solution": "<think>...</think> <answer>7</answer>", "answer": "seven"}, "<think>...</think> <answer>7</answer>"),
    # one hides the other
    ({"solution": None, "answer": "4"}, "4"),
    ({"solution": "", "answer": "4"}, "4"),
    ({"solution": " \n", "answer": "4"}, "4"),
    ({"solution": float("nan"), "answer": "4"}, "4"),
    ({"solution": [], "answer": "4"}, "4"),
    ({"solution": ["first", "then"], "answer": "4"}, "4"),
    ({"solution": {"code": "print(4)"}, "answer": "4"}, "4"),
    ({"solution": "4", "answer": None}, "4"),
    ({"solution": PROSE, "answer": None}, PROSE),
    ({"solution": None, "answer": None}, None),
    ({"solution": "0", "answer": ""}, "0"),
    ({"answer": 0}, 0),
    # the shapes of verl and other data sets
    ({"reward_model": {"style": "rule", "ground_truth": "4"}}, "4"),
    ({"reward_model": {"style": "rule", "ground_truth": 4}}, 4),
    ({"reward_model": {"ground_truth": '["34"]'}}, "34"),
    ({"reward_model": "{'ground_truth': '4', 'style': 'rule'}"}, "4"),
    ({"reward_model": '{"style": "rule", "ground_truth": "4"}'}, "4"),
    ({"reward_model": "a model's name", "answer": "4"}, "4"),
    ({"reward_model": "a model's name"}, None),
    ({"answer": {"ground_truth": "4"}}, "4"),
    ({"answer": ["4"]}, "4"),
    ({"answer": ("4",)}, "4"),
    ({"answer": np.array(["4"])}, "4"),
    ({"answer": np.int64(4)}, 4),
    ({"answer": Decimal("4.50")}, Decimal("4.50")),
    ({"final_answer": ["2"], "solution": PROSE}, "2"),
    ({"expected_answer": "2", "problem": "?"}, "2"),
    ({"ground_truth": "2"}, "2"),
    # a text is itself, whatever it looks like
    ({"answer": '["b", "a"]'}, '["b", "a"]'),
    ({"answer": "{1, 2}"}, "{1, 2}"),
    ({"answer": "None"}, "None"),
]  # fmt: skip
UNKNOWN = [
    {"answer": {"target": 24, "numbers": [1, 2]}}, {"answer": ["1", "2"]}, {"answer": [["1"], ["2"]]}, {"answer": True},
    {"answer": datetime.date(2023, 1, 2)}, {"answer": datetime.datetime(2023, 1, 2)}, {"answer": b"4"},
    {"answer": {"text": ["4"], "answer_start": [0]}}, {"reward_model": {"ground_truth": {"target": ["Paris"]}}},
    {"solution": None, "answer": {"value": None}},
]  # fmt: skip
CONFIG = GRPOConfig(use_cpu=True)


@pytest.mark.parametrize(("row", "gold"), CHOICES)
def test_the_gold_answer_is_chosen_by_row_and_read(row, gold):
    assert gold_of(row) == gold


@pytest.mark.parametrize("row", UNKNOWN)
def test_a_gold_answer_that_is_neither_text_nor_number_is_refused(row):
    with pytest.raises(ValueError, match="which is neither a text nor a number"):
        gold_of(row)


def test_each_row_of_a_batch_has_its_own_column():
    solutions, answers = [PROSE, r"\boxed{5}", None, "7"], ["4", "0", "6", None]
    completions = [rf"\boxed{{{number}}}" for number in (4, 5, 6, 7)]
    assert accuracy_reward(completions, solution=solutions, answer=answers) == [1.0] * 4
    assert exact_match_reward(completions, solution=solutions, answer=answers) == [1.0] * 4
    thought = [f"<think></think>{completion}" for completion in completions]
    assert reasoning_accuracy_reward(thought, solution=solutions, answer=answers) == [1.0] * 4
    scaled = get_cosine_scaled_reward(max_len=8)
    assert scaled(completions=completions, completion_ids=[[]] * 4, solution=solutions, answer=answers) == [1.0] * 4
    of_verl = [{"style": "rule", "ground_truth": str(number)} for number in (4, 5, 6, 8)]
    assert accuracy_reward(completions, reward_model=of_verl) == [1.0, 1.0, 1.0, 0.0]
    assert scaled(completions=completions, completion_ids=[[]] * 4, reward_model=of_verl)[:3] == [1.0] * 3


def test_maths_rows_have_the_better_column_as_their_solution():
    rows = [
        {"problem": "?", "solution": PROSE, "answer": "4"},
        {"problem": "?", "solution": r"\boxed{5}", "answer": "0"},
        {"problem": "?", "solution": None, "answer": r"\boxed{6}"},
        {"problem": "?", "solution": "7", "answer": None},
    ]
    assert load_rows(rows, CONFIG)["solution"] == [r"\boxed{4}", r"\boxed{5}", r"\boxed{6}", "7"]


@pytest.mark.parametrize(
    "text", [r"\boxed{4}", r"\boxed {x}", "<answer>4</answer>", "3 + 1\n#### 4", "#### 4\n\n", "so 4 #### 4"]
)
def test_a_mark_is_found(text):
    assert is_marked(text)


@pytest.mark.parametrize(
    "text", ["", "4", r"\boxed{ }", "<answer></answer>", "<answer>4", "####", "#### Step\n4", r"\boxed"]
)
def test_what_marks_nothing_is_no_mark(text):
    assert not is_marked(text)


def read(rows, rewards="accuracy_reward", eval_rows=None, **settings):
    config = GRPOConfig(use_cpu=True, **settings)
    return read_training_inputs(str(DEMO_MODEL), rewards, rows, eval_rows, config)


@pytest.mark.parametrize(
    "rewards",
    [
        "accuracy_reward",
        "reasoning_accuracy_reward",
        "exact_match_reward",
        "get_cosine_scaled_reward(max_len=9)",
        ["think_format_reward", "accuracy_reward"],
    ],
)
@pytest.mark.parametrize(
    "gold",
    [{"solution": None}, {"answer": None}, {"solution": "", "answer": " "}, {"answer": float("nan")}, {"solution": []}],
)
def test_data_without_a_gold_answer_in_any_row_is_refused_at_the_start(gold, rewards, tmp_path):
    rows = [{"prompt": "1+1=", **gold}] * 3
    with pytest.raises(ValueError, match="no row of train_dataset has a gold answer in solution or answer"):
        read(rows, rewards, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no row of eval_dataset has a gold answer"):
        read_evaluation_inputs(str(DEMO_MODEL), rewards, rows, CONFIG)


def test_rows_without_a_gold_answer_are_counted_and_one_of_another_form_is_named(tmp_path):
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": None}, {"prompt": "1+3=", "answer": "4"}]
    notes = read(rows, output_dir=str(tmp_path / "out")).notes
    assert notes == [
        "accuracy_reward finds no gold answer in 1 of 3 rows of train_dataset, and gives no reward for them"
    ]
    with pytest.raises(
        ValueError, match="row 2 of train_dataset has no gold answer for accuracy_reward: the column answer"
    ):
        read([{"prompt": "1", "answer": ["2"]}] * 2 + [{"prompt": "1", "answer": ["2", "3"]}], output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="accuracy_reward needs the gold answers: eval_dataset has no column named"):
        read([{"prompt": "1", "answer": "2"}], eval_rows=[{"prompt": "1"}], output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="row 0 of train_dataset has no gold answer for accuracy_reward"):
        read([{"prompt": "1", "answer": True}], output_dir=str(tmp_path))


def test_a_reward_of_ones_own_may_read_any_form(tmp_path):
    def own(completions, answer, **kwargs):
        return [float(len(one)) for one in answer]

    rows = [{"prompt": "1+1=", "answer": ["2", "3"]}] * 2
    assert read(rows, own, output_dir=str(tmp_path / "out")).notes == []


def test_a_run_whose_rewards_all_say_none_is_told_so(tmp_path, caplog):
    def own(completions, **kwargs):
        return [None] * len(completions)

    config = GRPOConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=2, prompts_per_step=1, num_generations=2,
        max_completion_length=2,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        train(str(DEMO_MODEL), own, [{"prompt": "1+1="}], config=config)
    told = [record.message for record in caplog.records if "returned None for every completion" in record.message]
    assert len(told) == 2 and "after 0 steps: " in told[0] and "mend own" in told[0]


def test_a_function_that_says_none_for_a_few_is_no_trouble(caplog):
    runner = RewardRunner([lambda completions, **kwargs: [None, 1.0]])
    with caplog.at_level(logging.WARNING):
        runner(["p"] * 2, ["a", "b"], [[1], [2]], {}, 1)
    assert not caplog.records
