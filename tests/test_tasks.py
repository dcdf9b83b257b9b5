import ast
import inspect
import itertools
import json
import random
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import GSM8K_ROWS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lowmem_grpo import GRPOConfig
from lowmem_grpo.data.rows import load_rows
from lowmem_grpo.data.text import tagged_answer
from lowmem_grpo.errors import InputError
from lowmem_grpo.rewards import accuracy_reward
from lowmem_grpo.rewards.accuracy import extract_answer, gold_answer
from lowmem_grpo.rewards.math_pool import math_equal
from lowmem_grpo.rewards.number import as_number
from lowmem_grpo.tasks import Task, find_task, held_out, with_tasks
from lowmem_grpo.tasks import reasoning_gym as gym
from lowmem_grpo.tasks.countdown import countdown_reward, random_expression, solves

ROOT = Path(__file__).parents[1]
STYLES = ("so it is\n#### {}", "so it is \\boxed{{{}}}.", "<think>hm</think> <answer>{}</answer>", "the answer is {}.")


def chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("style", STYLES)
def test_every_gold_answer_is_right_in_every_style(gsm8k, style):
    gold = gsm8k
    numbers = [answer.rsplit("####", 1)[1].strip() for answer in gold]
    texts = [style.format(number) for number in numbers]
    assert accuracy_reward(texts, solution=gold) == [1.0] * len(gold)
    assert accuracy_reward([chat(text) for text in texts], answer=gold) == [1.0] * len(gold)
    assert accuracy_reward([style.format(number.replace(",", "")) for number in numbers], solution=gold) == [1.0] * len(
        gold
    )
    wrong = [style.format(int(float(number.replace(",", ""))) + 1) for number in numbers]
    assert accuracy_reward(wrong, solution=gold) == [0.0] * len(gold)


PIECES = st.sampled_from(
    ["\\boxed{", "\\boxed", "}", "{", "####", "<answer>", "</answer>", "<think>", "</think>", "\\frac", "^", "72", "7,2",
     "-", ".", "1e999", "/0", "$", "%", "\n", " ", "\u2212", "\\sqrt", "(", ")", "=", "9" * 50, "\x00", "\u0661"]
)  # fmt: skip
MALFORMED = st.lists(PIECES | st.characters(), min_size=3, max_size=12).map("".join)
CALM = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def malformed():
    """700 draws of hypothesis', always the same, most of them different."""
    texts = []

    @settings(max_examples=700, phases=[Phase.generate], **CALM)
    @given(MALFORMED)
    def collect(text):
        texts.append(text)

    collect()
    assert len(texts) == 700 and len(set(texts)) > 600
    return texts


def test_malformed_completions_of_every_kind_have_an_answer_or_none(malformed):
    """What runs in the process itself; math-verify, which only its workers run, has the next test."""
    for text in malformed:
        answer = extract_answer(text)
        assert gold_answer(text) is not None
        if answer is not None and as_number(answer) is not None:
            assert math_equal([("72", answer)]) == [as_number(answer) == 72]


def test_malformed_completions_through_the_whole_reward(malformed):
    worked = [text for text in malformed if (answer := extract_answer(text)) and as_number(answer) is None][:40]
    assert len(worked) == 40
    rewards = accuracy_reward([chat(text) for text in worked], solution=["72"] * 40)
    assert set(rewards) <= {0.0, 1.0}


def test_gsm8k_asks_in_its_style_and_brings_its_reward(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K_ROWS))
    inputs = with_tasks(f"gsm8k?file={path}&style=tags&hold_out=false", None, None, GRPOConfig())
    assert inputs.reward_funcs is accuracy_reward
    assert "<answer>" in inputs.config.system_prompt
    assert inputs.eval_dataset is None
    row = load_rows(inputs.train_dataset, inputs.config)[0]
    assert row["prompt"] == [{"role": "user", "content": "?"}] and row["solution"].endswith("#### 72")
    own = with_tasks("gsm8k", None, "mine.f", GRPOConfig(system_prompt="Mine."))
    assert (own.train_dataset, own.reward_funcs, own.config.system_prompt) == ("openai/gsm8k", "mine.f", "Mine.")


def test_gsm8k_holds_out_the_hubs_test_split_or_an_eighth_of_a_file(tmp_path):
    assert with_tasks("gsm8k", None, None, GRPOConfig()).eval_dataset == "openai/gsm8k"  # of which inputs take `test`
    assert with_tasks("gsm8k?hold_out=false", None, None, GRPOConfig()).eval_dataset is None
    rows = [{"question": f"{n} apples and 1 more?", "answer": f"#### {n + 1}"} for n in range(400)]
    asked = []
    for name, order in ("rows.jsonl", rows), ("others.jsonl", rows[::-1] + rows[:3]):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in order))
        inputs = with_tasks(f"gsm8k?file={tmp_path / name}", None, None, GRPOConfig())
        asked.append([{str(prompt) for prompt in part["prompt"]} for part in inputs[:2]])
    (train_rows, held_out_rows), again = asked
    assert again == [train_rows, held_out_rows] and not train_rows & held_out_rows
    assert 30 <= len(held_out_rows) <= 70 and len(train_rows | held_out_rows) == 400


def test_all_of_a_gsm8k_file_is_measured_on_or_trained_on_beside_other_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": str(n), "answer": f"#### {n}"}) + "\n" for n in range(40)))
    name = f"gsm8k?file={path}"
    assert held_out(find_task(name)) == str(path)
    beside = with_tasks(name, "others.jsonl", None, GRPOConfig())
    assert beside[:2] == (str(path), "others.jsonl")
    assert with_tasks("others.jsonl", name, "accuracy_reward", GRPOConfig())[:2] == ("others.jsonl", str(path))
    path.write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}))
    assert with_tasks(name, None, None, GRPOConfig())[:2] == (str(path), None)  # too small to be parted


def reachable(numbers):
    """Every value of an expression that uses each of the numbers once."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for (i, a), (j, b) in itertools.permutations(enumerate(numbers), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for value in {a + b, a - b, a * b, a / b if b else None} - {None}:
            found |= reachable([*rest, value])
    return found


def test_a_base_model_stops_at_the_end_of_its_answer():
    """It was never taught another end; a stop string of the run's own is kept."""
    assert with_tasks("countdown?size=5", None, None, GRPOConfig()).config.stop_strings == ["</answer>"]
    assert with_tasks("countdown?size=5&chat=true", None, None, GRPOConfig()).config.stop_strings is None
    assert with_tasks("countdown?size=5", None, None, GRPOConfig(stop_strings=["x"])).config.stop_strings == ["x"]


def test_no_size_trains_on_what_another_holds_out():
    for name in ("countdown", "reasoning_gym:chain_sum"):
        large, small = find_task(f"{name}?size=800&eval_size=10"), find_task(f"{name}?size=20&eval_size=200")
        asked = {str(row["prompt"]) for row in large.rows}
        assert not asked & {str(row["prompt"]) for row in small.eval_rows}, name


def test_countdown_problems_are_reachable_seeded_and_held_out():
    task, again, other = (find_task(f"countdown?size=50&eval_size=20&seed={seed}") for seed in (3, 3, 4))
    assert task.rows == again.rows and task.rows != other.rows
    assert (len(task.rows), len(task.eval_rows)) == (50, 20)
    assert not {row["prompt"] for row in task.rows} & {row["prompt"] for row in task.eval_rows}
    for row in [*task.rows, *task.eval_rows]:
        assert 3 <= len(row["numbers"]) <= 4 and 1 <= row["target"] <= 100
        assert str(row["target"]) in row["prompt"] and row["prompt"].endswith("Assistant: ")
        assert solves(row["one_solution"], row["numbers"], row["target"])
    for row in task.rows[:5]:
        assert row["target"] in reachable([Fraction(n) for n in row["numbers"]])


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("(25 - 5) * 3 / 2", True),
        ("3*(25-5)/2", True),
        (" ( ( 25 - 5 ) / 2 ) * 3 ", True),
        ("30", False),
        ("25 + 5", False),
        ("(25 - 5) * 3 / 2 + 2 - 2", False),
        ("(25 - 5) * 3 // 2", False),
        ("25 ** 2 - 5 * 3", False),
        ("(25 - 5) * 3 / 2 = 30", False),
        ("-5 + 25 * 3 / 2", False),
        ("25 5 3 2", False),
        ("(25 - 5) * 3 / 2)", False),
        ("25(5)(3)(2)", False),
        ("25 / (5 - 3 - 2)", False),
        ("(25 - 5) * 3.0 / 2", False),
        ("2_5 - 5 * 3 / 2", False),
        ("__import__('os').abort()", False),
        ("(25 - 5) * True", False),
        ("(" * 100_000, False),
        ("(" * 99 + "1" + ")" * 99, False),
        ("9*" * 90 + "9", False),
        ("9" * 5000, False),
        ("05 + 25", False),
        ("", False),
        ("\n", False),
    ],
)
def test_countdown_is_verified_by_arithmetic_alone(expression, right):
    assert solves(expression, [2, 3, 5, 25], 30) is right


def test_countdown_is_exact_where_floats_are_not():
    assert solves("3 / (1 - 9 / 10)", [1, 3, 9, 10], 30)
    assert not solves("(1 + 1) / 3 * 3", [1, 1, 3], 2), "a number that is used twice"
    assert solves("(1 + 1) / 3 * 3", [1, 1, 3, 3], 2)


def test_countdown_rewards_the_last_tag_of_texts_and_chats():
    texts = ["<answer>1 + 1</answer> no: <answer> 1 + 2 </answer>", "1 + 2", "<answer>1 + 2", "</answer><answer>1 + 2"]
    for completions in (texts, [chat(text) for text in texts]):
        assert countdown_reward(completions, numbers=[[1, 2]] * 4, target=[3] * 4) == [1.0, 0.0, 0.0, 0.0]


@settings(max_examples=300, **CALM)
@given(st.text(alphabet="0123456789+-*/() ", max_size=220))
def test_no_text_breaks_the_countdown_verifier(text):
    assert solves(text, [1, 2, 3], 6) in (True, False)


def test_a_random_expression_has_the_value_that_is_said():
    draw = random.Random(0)
    for _ in range(200):
        value, expression = random_expression(draw, [draw.randint(1, 99) for _ in range(4)])
        if value.denominator == 1:
            numbers = [int(n) for n in "".join(c if c.isdigit() else " " for c in expression).split()]
            assert solves(expression, numbers, int(value))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("countdwn?size=3", "no task is named 'countdwn'; the tasks are gsm8k, countdown"),
        ("countdown?sise=3", "has no option 'sise'; did you mean size"),
        ("countdown?size", "not option=value"),
        ("countdown?size=3&size=4", "gives an option twice"),
        ("countdown?size=-1", "size=-1 must be a whole number of at least 1"),
        ("countdown?size=many", "size='many' must be a whole number"),
        ("countdown?max_numbers=2", "must be from min_numbers=3 to 6"),
        ("countdown?chat=7", "chat=7 must be true or false"),
        ("countdown?min_numbers=2&max_numbers=2&max_target=10&size=9000", "fewer than 9000 such problems to train on"),
        ("countdown?size=99999999999", "size=99999999999 is more than 50000, which are made in about a minute"),
        ("countdown?size=5&eval_size=5001", "eval_size=5001 is more than 5000"),
        ("countdown?size=1" + 5000 * "0", "must be a whole number"),
        ("gsm8k?style=latex", "style='latex' is not one of boxed, tags, hash"),
        ("gsm8k?style=[1]", "is not one of boxed, tags, hash"),
        ("gsm8k?style={}", "is not one of boxed, tags, hash"),
        ("gsm8k?file=[1]", "is not the name of a file"),
        ("gsm8k?file=3", "file=3 is not the name of a file"),
        ("gsm8k?file=", "names nothing"),
        ("gsm8k?file=/no/such.jsonl", "is not a file on this machine"),
        ("gsm8k?hold_out=1", "hold_out=1 must be true or false"),
        ("reasoning_gym:chain_sum?size=99999999999", "size=99999999999 is more than 50000"),
        ("reasoning_gym:chain_sum?eval_size=99999999999", "eval_size=99999999999 is more than 5000"),
        ("reasoning_gym:chain_sum?min_terms=x", "does not take these options"),
        (
            "reasoning_gym:chain_sum?size=3&eval_size=2&min_digits=9999&max_digits=10000",
            "reasoning_gym:chain_sum makes no problem of these options: Exceeds the limit",
        ),
        ("reasoning_gym", "name one, such as reasoning_gym:chain_sum"),
        ("reasoning-gym:chain_sum", "no task is named"),
        ("reasoning_gym:chian_sum", "did you mean chain_sum"),
        ("reasoning_gym:chain_sum?max_term=3", "did you mean max_terms"),
        ("reasoning_gym:chain_sum?max_terms=0", "does not take these options"),
        ("reasoning_gym:chain_sum?name=x", "has no option 'name'"),
        ("reasoning_gym:chain_sum?partial=yes", "partial='yes' must be true or false"),
        ("reasoning_gym:chain_sum?partial=1", "partial=1 must be true or false"),
        ("reasoning_gym:chain_sum?partial=null", "partial=None must be true or false"),
        ("reasoning_gym:chain_sum?partail=true", "did you mean partial"),
        ("reasoning_gym:composite", "does not take these options"),
        ("reasoning_gym:chain_sum?seed=x", "seed='x' must be a whole number"),
        ("reasoning_gym:needle_haystack?size=0", "size=0 must be"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused_in_one_sentence(name, message, monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr("lowmem_grpo.tasks.countdown.MOST_IN_VAIN", 200)
    with pytest.raises(ValueError, match=message) as caught:
        find_task(name)
    assert "\n" not in str(caught.value)


def test_options_of_a_generator_that_take_for_ever_are_refused(monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(gym, "SLOWEST_S", 0.3)
    with pytest.raises(InputError, match="makes no problem of these options in 0.3 s; choose smaller ones"):
        find_task("reasoning_gym:chain_sum?size=3&eval_size=2&min_terms=99999998&max_terms=99999999")


def test_a_misspelled_task_without_rewards_is_named():
    with pytest.raises(InputError, match="reward_funcs is missing; did you mean countdown"):
        with_tasks("countdwn", None, None, GRPOConfig())


@pytest.mark.parametrize(
    "name", ["openai/gsm8k", "rows.jsonl", "./dir/countdown", None, [{"prompt": "x"}], "who/what?"]
)
def test_what_is_no_task_is_left_alone(name):
    assert find_task(name) is None


def test_a_run_without_a_task_needs_reward_functions():
    with pytest.raises(ValueError, match="reward_funcs is missing"):
        with_tasks([{"prompt": "x"}], None, None, GRPOConfig())


def test_an_evaluation_of_the_same_name_is_of_what_is_held_out():
    name = "countdown?size=30&eval_size=10"
    inputs = with_tasks(name, name, None, GRPOConfig())
    assert inputs.eval_dataset == find_task(name).eval_rows == with_tasks(name, None, None, GRPOConfig()).eval_dataset
    assert with_tasks("countdown?size=30&eval_size=0", None, None, GRPOConfig()).eval_dataset is None
    with pytest.raises(ValueError, match="by another seed"):
        with_tasks(name, "countdown?size=30&eval_size=0", None, GRPOConfig())


def test_a_reasoning_gym_task_has_its_rows_and_its_verifier():
    pytest.importorskip("reasoning_gym")
    task = find_task("reasoning_gym:chain_sum?size=20&eval_size=10&seed=5&max_terms=3&max_digits=2")
    assert (len(task.rows), len(task.eval_rows)) == (20, 10)
    prompts = {row["prompt"][0]["content"] for row in task.rows}
    assert not prompts & {row["prompt"][0]["content"] for row in task.eval_rows}
    columns = {name: [row[name] for row in task.rows] for name in ("task", "index")}
    answers = [gym.problem(row["task"], row["index"])["answer"] for row in task.rows]
    assert task.reward([f"<answer> {a} </answer>" for a in answers], **columns) == [1.0] * 20
    assert task.reward([chat(f"thoughts\n{a}\n") for a in answers], **columns) == [1.0] * 20
    assert task.reward([f"thoughts of 7\nThe answer is {a}." for a in answers], **columns) == [1.0] * 20
    assert task.reward([f"<answer>{int(a) + 1}</answer>" for a in answers], **columns) == [0.0] * 20
    assert task.reward(["", "\n", "<answer>", "x"] * 5, **columns) == [0.0] * 20


def test_the_next_seed_of_reasoning_gym_has_the_same_problems_but_one():
    """Which is why held-out problems begin where the training ones end."""
    pytest.importorskip("reasoning_gym")
    made = [gym.problem(f"chain_sum?seed={seed}&size=9", place)["question"] for seed, place in ((1, 1), (2, 0))]
    assert made[0] == made[1]


def members():
    try:
        return sorted(set(gym._registry()) - {"composite"})
    except ValueError:
        return []


def test_every_reasoning_gym_task_is_made_and_its_own_answer_scores_full():
    pytest.importorskip("reasoning_gym")
    assert len(members()) > 100
    without_answer = set()
    for name in members():
        task = find_task(f"reasoning_gym:{name}?size=1&eval_size=0&seed=3")
        row = task.rows[0]
        answer = gym.problem(row["task"], row["index"])["answer"]
        if answer is None:
            without_answer.add(name)
            continue
        assert gym.harmless(answer, name), name
        assert gym.reasoning_gym_reward([f"<answer>{answer}</answer>"], [row["task"]], [row["index"]]) == [1.0], name
        assert json.loads(json.dumps(row)) == row
    assert without_answer == {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


WRONG = ("", "x", "7777", "-7777", "[]", "{}", "[[0]]", "1 2 3", "None", "the answer", "<answer>7777", "a\nb\nc")


def test_what_is_no_solution_earns_nothing_in_any_task():
    pytest.importorskip("reasoning_gym")
    crumbs = 0
    for name in members():
        task = find_task(f"reasoning_gym:{name}?size=1&eval_size=0&seed=3")
        row = task.rows[0]
        texts = [*(f"<answer>{text}</answer>" for text in WRONG), *WRONG]
        columns = {"task": [row["task"]] * len(texts), "index": [row["index"]] * len(texts)}
        assert set(task.reward(texts, **columns)) == {0.0}, name
        crumbs += sum(0 < reward < 1 for reward in gym.reasoning_gym_partial_reward(texts, **columns))
    assert crumbs > 100


def test_crumbs_are_given_where_they_are_asked_for():
    pytest.importorskip("reasoning_gym")
    name = "reasoning_gym:rectangle_count?size=2&eval_size=2&seed=3"
    default, off, on = (find_task(name + option) for option in ("", "&partial=false", "&partial=true"))
    assert default.rows == off.rows == on.rows and "partial" not in on.rows[0]["task"]
    columns = {name: [default.rows[0][name]] * 3 for name in ("task", "index")}
    gold = int(gym.problem(columns["task"][0], columns["index"][0])["answer"])
    texts = [f"<answer>{number}</answer>" for number in (gold, gold - 1, "x")]
    assert default.reward(texts, **columns) == off.reward(texts, **columns) == [1.0, 0.0, 0.0]
    partly = on.reward(texts, **columns)
    assert partly[0] == 1 > partly[1] > 0 == partly[2]


@pytest.mark.parametrize(("scored", "reward"), [(1.0, 1.0), (0.9999999, 1.0), (0.999, 0.0), (0.2, 0.0), (0.004, 0.0)])
def test_only_a_full_score_counts_but_for_the_last_digits_of_a_float(monkeypatch, scored, reward):
    pytest.importorskip("reasoning_gym")
    row = find_task("reasoning_gym:chain_sum?size=1&eval_size=0").rows[0]
    monkeypatch.setattr(type(gym.dataset(row["task"])), "score_answer", lambda *_: scored)
    assert gym.reasoning_gym_reward(["<answer>7</answer>"], [row["task"]], [row["index"]]) == [reward]
    assert gym.reasoning_gym_partial_reward(["<answer>7</answer>"], [row["task"]], [row["index"]]) == [scored]


@pytest.mark.parametrize(
    ("text", "gold", "among", "not_among"),
    [
        ("so 12 + 30 is\nThe answer is 42.", "42", "42", "12"),
        ("The answer is **42**", "42", "42", ""),
        ("It is \\boxed{42}", "42", "42", ""),
        ("$1,042 in all", "1042", "1042", ""),
        ("that is \N{MINUS SIGN}42 degrees", "-42", "-42", "42"),
        ("I had 41\nthen 42 apples", "42", "42", "41"),
        ("half, 1/2 of it", "1/2", "1/2", "2"),
        ("a\n$\\frac{1}{2}$", "$1/2$", "$\\frac{1}{2}$", "1"),
        ("the day before\nThe answer is Tuesday.", "Tuesday", "Tuesday", "the day before"),
        ("**Answer:** Tuesday", "Tuesday", "Tuesday", ""),
        ("3 days later\nFriday", "Friday", "Friday", "3"),
        ("<answer>The answer is 42.</answer> 43", "42", "The answer is 42.", "43"),
        ("42\n<answer>41</answer>", "42", "41", "42"),
    ],
)
def test_a_completion_without_a_tag_is_asked_for_its_last_line_and_number(text, gold, among, not_among):
    assert among in gym.answers_of(text, gold) and not_among not in gym.answers_of(text, gold)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gsm_symbolic", lambda gold: [f"-{gold}", f"{gold} or 7", f"{int(float(gold)) + 1}"]),
        ("coin_flip", lambda gold: [gold[0], "0.", "7", f"{float(gold) + 0.001}"]),
        ("game_of_life_halting", lambda gold: ["x", "0", str(gold != "True"), f"not {gold}"]),
    ],
)
def test_a_verifier_that_pays_for_other_answers_is_not_left_alone(name, wrong):
    pytest.importorskip("reasoning_gym")
    for row in find_task(f"reasoning_gym:{name}?size=8&eval_size=0&seed=5").rows:
        place = [row["task"]], [row["index"]]
        gold = gym.problem(row["task"], row["index"])["answer"]
        assert gym.reasoning_gym_reward([f"<answer>{gold}</answer>"], *place) == [1.0]
        for answer in wrong(gold):
            assert gym.reasoning_gym_partial_reward([f"<answer>{answer}</answer>"], *place) == [0.0], (gold, answer)


def test_a_problem_that_reasoning_gym_itself_could_not_solve_is_left_out():
    pytest.importorskip("reasoning_gym")
    task = find_task("reasoning_gym:intermediate_integration?size=8&eval_size=0&seed=11")
    golds = [gym.problem(row["task"], row["index"])["answer"] for row in task.rows]
    assert not any("Integral" in gold for gold in golds) and [row["index"] for row in task.rows] != list(range(8))


def test_every_verifier_that_evaluates_an_answer_is_known():
    """A new version of reasoning-gym that evaluates elsewhere fails here, not in somebody's training run."""
    pytest.importorskip("reasoning_gym")
    own_text_alone = {"number_sorting", "propositional_logic"}  # eval of its own answer; a parser of its own
    evaluating = set()
    for name, (dataset, _) in gym._registry().items():
        tree = ast.parse(inspect.getsource(inspect.getmodule(dataset)))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name == "score_answer":
                called = {
                    getattr(n.func, "id", getattr(n.func, "attr", ""))
                    for n in ast.walk(function)
                    if isinstance(n, ast.Call)
                }
                if called & {"eval", "exec", "parse_expr", "sympify", "parse_latex", "S", "compile"}:
                    evaluating.add(name)
    assert evaluating - own_text_alone == gym.EVALUATED | gym.ALGEBRA


@pytest.mark.parametrize(
    ("name", "answer", "passes"),
    [
        ("n_queens", "_ Q _ _\n_ _ _ Q", True),
        ("n_queens", "[['_', 'Q'], ['Q', '_']]", True),
        ("n_queens", "__import__('os').abort()", False),
        ("binary_matrix", "[0] * 10", False),
        ("binary_matrix", "[0 for x in [1]]", False),
        ("binary_matrix", "1 << 9", False),
        ("spiral_matrix", "f'{1:99999999999}'", False),
        ("countdown", "(25 - 5) * 3 / 2", True),
        ("countdown", "9**9**9", False),
        ("countdown", "9**999", False),
        ("countdown", "9**(9**9)", False),
        ("countdown", "exit()", False),
        ("countdown", "().__class__", False),
        ("countdown", "'a'", False),
        ("simple_integration", "3*x**2/2 + C", True),
        ("simple_integration", "x**(3/2) - 2*x^3 + C", True),
        ("intermediate_integration", "-exp(-x)*sin(2*x) + C", True),
        ("intermediate_integration", "test()", False),
        ("intermediate_integration", "x.diff", False),
        ("puzzle24", "1" * 501, False),
        ("chain_sum", "__import__('os').abort()", True),
        ("chain_sum", "1" * 20_001, False),
    ],
)
def test_only_harmless_answers_reach_a_verifier_that_evaluates_them(name, answer, passes):
    assert gym.harmless(answer, name) is passes


def test_the_last_answer_tag_is_found_in_linear_time():
    assert tagged_answer("<answer>1</answer> <answer> 2 </answer> <answer>") == "2"
    assert tagged_answer("<answer>" * 200_000) is None
    assert tagged_answer("<answer>" * 200_000 + "3</answer>") == "3"


def test_a_task_of_ones_own_brings_rows_verifier_and_what_is_held_out():
    task = Task(rows=[{"prompt": "1+1="}], reward=lambda completions, **_: [1.0], eval_rows=[{"prompt": "2+2="}])
    rows, eval_rows, reward, config = with_tasks(task, None, None, GRPOConfig())
    assert (rows, eval_rows, reward, config) == (task.rows, task.eval_rows, task.reward, GRPOConfig())
    assert with_tasks(task, task, accuracy_reward, GRPOConfig()).reward_funcs is accuracy_reward
    assert held_out(task) == task.eval_rows
    asked = Task(rows=[{"question": "1+1=", "answer": "2"}], reward=accuracy_reward)
    assert with_tasks(asked.rows, asked, accuracy_reward, GRPOConfig()).eval_dataset == asked.rows, "all of it"
