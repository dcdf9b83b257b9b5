"""get_routed_reward(): a reward function that sees its own rows alone; and the part of a completion that is judged."""

import asyncio
import pickle
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import DEMO_MODEL, make_policy

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.data.text import part_of
from lowmem_grpo.demo import task
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs.identity import _of_the_users as source_of
from lowmem_grpo.inputs.identity import _settings as settings_of
from lowmem_grpo.rewards import RewardRunner, reads_gold, resolve_reward_funcs
from lowmem_grpo.rewards.judge import get_judge_reward
from lowmem_grpo.rewards.route import get_routed_reward, kinds_of_rows

pytestmark = pytest.mark.usefixtures("known_trials")

KINDS = ["math", "chat", "math", None]


def lengths(prompts, completions, task, log_extra, log_metric, **columns):
    """A reward that says what it has been given."""
    log_extra("seen", [f"{prompt} {kind}" for prompt, kind in zip(prompts, task, strict=True)])
    log_metric("how_many", len(completions))
    return [float(len(text)) for text in completions]


async def later(completions, **columns):
    await asyncio.sleep(0)
    return torch.tensor([2.0 * len(text) for text in completions])


def run(*functions, kinds=KINDS):
    count = len(kinds)
    texts = ["x" * (index + 1) for index in range(count)]
    prompts = [f"p{index}" for index in range(count)]
    return RewardRunner(functions)(prompts, texts, [[1]] * count, {"task": kinds}, 1)


def test_the_inner_function_gets_its_rows_alone_and_the_others_have_no_reward():
    found = run(get_routed_reward(lengths, values=["math"]))
    assert found.rewards[:, 0].tolist() == pytest.approx([1, float("nan"), 3, float("nan")], nan_ok=True)
    assert found.extra_columns == {"seen": ["p0 math", None, "p2 math", None]} and found.metrics["how_many"] == 2


def test_a_function_without_a_row_of_its_own_is_not_called():
    def never(**given):
        raise AssertionError("it was called")

    found = run(get_routed_reward(never, values=["code"]))
    assert found.rewards.isnan().all() and found.metrics["rewards/never_code/failures"] == 0


def test_an_async_function_is_awaited_and_a_tensor_is_read():
    found = run(get_routed_reward(later, values=["chat", "math"]), get_routed_reward(lengths, values="chat"))
    assert found.rewards[:, 0].tolist() == pytest.approx([2, 4, 6, float("nan")], nan_ok=True)
    assert found.rewards[:, 1].tolist() == pytest.approx([float("nan"), 2, float("nan"), float("nan")], nan_ok=True)


def test_what_an_inner_function_does_wrong_is_counted_as_always():
    found = run(get_routed_reward(lambda completions, **_: [1.0], values=["math"], name="one"))
    assert found.rewards.isnan().all() and found.metrics["rewards/one/failures"] == 4


def test_values_for_all_rows_are_not_taken_for_those_of_its_own():
    found = run(get_routed_reward(lambda completions, **_: [1.0, 2.0, 3.0, 4.0], values=["math"], name="one"))
    assert found.rewards.isnan().all() and found.metrics["rewards/one/failures"] == 4


def test_routes_of_one_function_have_names_of_their_own():
    names = RewardRunner([get_routed_reward(lengths, values=[kind]) for kind in ("math", "chat")]).names
    assert names == ["lengths_math", "lengths_chat"]
    assert get_routed_reward(lengths, values=["math"], name="mine").__name__ == "mine"


def test_a_command_names_a_route_and_what_is_within():
    text = """get_routed_reward(reward="get_judge_reward(criterion='Is it kind?', part='answer')", values=['chat'])"""
    accuracy = "get_routed_reward(reward='accuracy_reward', column='kind', values=[1])"
    judge, right = resolve_reward_funcs([text, accuracy])
    assert judge.__name__ == "judge_reward_chat" and right.__name__ == "accuracy_reward_1"
    assert reads_gold(right) and not reads_gold(judge) and not reads_gold(get_routed_reward(lengths, values=["a"]))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"reward": "accuracy_reward", "values": None}, "get_routed_reward needs values"),
        ({"reward": "accuracy_reward"}, "get_routed_reward needs values"),
        ({"reward": "acuracy_reward", "values": ["a"]}, "did you mean accuracy_reward"),
        ({"reward": "get_judge_reward", "values": ["a"]}, "makes a reward function; call it"),
        ({"reward": "os.system", "values": ["a"]}, "is of Python's own and no reward function"),
        ({"reward": "accuracy_reward", "column": "", "values": ["a"]}, "is no name of a column"),
    ],
)
def test_a_route_to_nowhere_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        get_routed_reward(**arguments)


def test_a_judge_is_given_the_policy_and_a_route_can_be_pickled():
    policy: Any = make_policy("llama")
    judge = get_routed_reward(get_judge_reward("Right?", yes="y", no="n"), values=["chat"])
    judge.bind(policy)
    assert run(judge).rewards[:, 0].isnan().tolist() == [True, False, True, True]
    get_routed_reward(lengths, values=["math"]).bind(policy)  # to which it means nothing
    copied = pickle.loads(pickle.dumps(get_routed_reward("get_cosine_scaled_reward(max_len=5)", values=["math"])))
    assert copied.__name__ == "cosine_scaled_reward_math" and copied.values == ["math"]


def test_a_resumed_run_has_to_repeat_the_route_and_what_is_within():
    def of(*arguments, **settings):
        return settings_of(get_routed_reward(*arguments, **settings))

    one = of("get_regex_reward(pattern='a')", values=["math"])
    assert one == of("get_regex_reward(pattern='a')", values=["math"])
    others = [
        of("get_regex_reward(pattern='b')", values=["math"]), of("get_regex_reward(pattern='a')", values=["chat"]),
        of("get_regex_reward(pattern='a')", column="kind", values=["math"]), of("accuracy_reward", values=["math"]),
    ]  # fmt: skip
    assert one not in others
    sources = [source_of(get_routed_reward(one, values=["math"])) for one in (lengths, lengths, later)]
    assert sources[0] == sources[1] != sources[2] and source_of(get_routed_reward("code_reward", values=[1])) is None


def test_kinds_of_rows_are_counted():
    functions = [get_routed_reward(lengths, values=["math"]), lengths]
    rows = Dataset.from_dict({"task": KINDS})
    assert kinds_of_rows(["a", "b"], functions, rows) == {("a", "b"): 2, ("b",): 2}
    assert kinds_of_rows(["a"], functions[:1], rows) == {("a",): 2, (): 2}


ROWS = [{"task": "math" if index % 2 else "chat", **row} for index, row in enumerate(task.rows(task.splits()[0][:16]))]
ROUTES: list[Any] = [
    get_routed_reward(task.answer_reward, values=["math"]),
    get_routed_reward(task.tag_format_reward, values=["chat"]),
]


def config(folder, **settings):
    return GRPOConfig(**{
        "output_dir": str(folder), "use_cpu": True, "max_steps": 2, "prompts_per_step": 4, "num_generations": 3,
        "max_completion_length": 12, "doctor": "off", "gradient_checkpointing": False, **settings,
    })  # fmt: skip


def test_a_run_learns_from_rows_of_two_kinds_and_logs_each_reward(tmp_path):
    result = train(str(DEMO_MODEL), ROUTES, ROWS, eval_dataset=ROWS[:4], config=config(tmp_path))
    assert {"rewards/answer_reward_math/mean", "rewards/tag_format_reward_chat/mean"} <= result.history[0].keys()
    of_math, of_chat = (result.eval_history[0][f"eval_rewards/{route.__name__}/mean"] for route in ROUTES)
    assert 0 <= of_math <= 1 and 0 <= of_chat <= 1  # over the rows that each is for, of which there are two


@pytest.mark.parametrize("settings", [{"scale_rewards": "batch"}, {"adv_estimator": "reinforce_plus_plus"}])
def test_one_deviation_of_rewards_of_different_rows_is_refused(tmp_path, settings):
    ((name, value),) = settings.items()
    with pytest.raises(InputError, match=rf"{name}='{value}' divides .*answer_reward_math.* leave it out"):
        train(str(DEMO_MODEL), ROUTES, ROWS, config=config(tmp_path, **settings))


def test_rows_of_one_kind_may_be_scaled_in_the_batch(tmp_path):
    result = train(str(DEMO_MODEL), ROUTES[0], ROWS[1::2], config=config(tmp_path, scale_rewards="batch", max_steps=1))
    assert len(result.history) == 1


def test_data_without_the_column_is_refused_and_a_route_without_rows_is_told(tmp_path, capsys):
    rows = [{name: value for name, value in row.items() if name != "task"} for row in ROWS]
    with pytest.raises(InputError, match="row 0 of train_dataset: answer_reward_math is for rows by their column task"):
        train(str(DEMO_MODEL), ROUTES, rows, config=config(tmp_path))
    train(str(DEMO_MODEL), [*ROUTES[:1], get_routed_reward("code_reward", values=["code"])], ROWS,
          config=config(tmp_path, max_steps=1))  # fmt: skip
    told = capsys.readouterr().err
    assert "code_reward_code is for no row of train_dataset: none has task in ['code']" in told
    assert "no reward is for 8 of 16 rows of train_dataset, from which nothing is learnt" in told


def test_gold_answers_are_looked_for_in_the_rows_of_a_route_alone(tmp_path):
    rows = [row if row["task"] == "math" else {**row, "solution": None} for row in ROWS]
    accuracy = [get_routed_reward("accuracy_reward", values=[kind]) for kind in ("math", "chat")]
    train(str(DEMO_MODEL), accuracy[0], rows, config=config(tmp_path / "a", max_steps=1))
    with pytest.raises(InputError, match="so that accuracy_reward_chat would give no completion"):
        train(str(DEMO_MODEL), accuracy, rows, config=config(tmp_path / "b"))


def test_a_function_is_tried_on_the_first_row_that_it_is_for(tmp_path):
    def broken(completions, **kwargs):
        raise RuntimeError("no server")

    routed = get_routed_reward(broken, values=["rare"])
    rows = [*ROWS, {**ROWS[0], "task": "rare"}]
    with pytest.raises(InputError, match="broken_rare raised RuntimeError: no server"):
        train(str(DEMO_MODEL), [*ROUTES, routed], rows, config=config(tmp_path))


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("<think>hm</think>\n\nfour", "four"),
        ("<think>a</think> b <think>c</think>d", "d"),
        ("<think>it never ends", ""),
        ("no thought", "no thought"),
        ([{"role": "assistant", "content": "<think>hm</think>four"}], [{"role": "assistant", "content": "four"}]),
    ],
)
def test_the_answer_is_what_follows_the_last_thought(completion, answer):
    assert part_of(completion, "answer") == answer and part_of(completion, "all") == completion


def test_a_judge_sees_the_part_that_it_is_told_to():
    policy = make_policy("llama")
    judges = {part: get_judge_reward("Right?", yes="y", no="n", part=part) for part in ("answer", "all")}
    for judge in judges.values():
        judge.bind(policy)  # type: ignore[union-attr] # the base's judge

    def of(part, text):
        return judges[part](["1+1="], [text])  # type: ignore[operator]

    assert of("answer", "<think>one and one</think>2") == of("all", "2") != of("all", "<think>one and one</think>2")
    with pytest.raises(InputError, match="part='thoughts' is not known; choose all or answer"):
        get_judge_reward("Right?", part="thoughts")
