import asyncio
import contextlib
import hashlib
import os
import re
import signal
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from lowmem_grpo import GRPOConfig
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs.rewards import try_groups, try_out
from lowmem_grpo.objective.advantages import compare, nanstd
from lowmem_grpo.rewards import (
    BUILT_IN,
    RewardRunner,
    accuracy_reward,
    get_cosine_scaled_reward,
    math_pool,
    resolve_reward_funcs,
    think_format_reward,
)
from lowmem_grpo.rewards.accuracy import extract_answer, gold_answer
from lowmem_grpo.rewards.isolation import workers
from lowmem_grpo.rewards.isolation.limit import SIGNAL
from lowmem_grpo.rewards.isolation.workers import WorkerPool
from lowmem_grpo.rewards.math_pool import math_equal
from lowmem_grpo.rewards.number import as_number
from lowmem_grpo.rewards.protocol import LARGEST


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{3}, no: \boxed{\frac{1}{2}}. #### 9", r"\frac{1}{2}"),
        (r"<answer> 7 </answer> #### 9", "7"),
        ("3 + 4 = 7\n#### 1,234\nthanks", "1,234"),
        ("first 3, then -4.5 apples.", "-4.5"),
        ("it costs $1,250.", "$1,250"),
        ("half is 1/2", "1/2"),
        ("between 3-4", "3-4"),
        ("It is 72, I think", "72"),
        ("72, 73,", "73"),
        ("1,2345", "1,2345"),
        ("12,345,678.5!", "12,345,678.5"),
        (r"\boxed{never closes 3", None),
        ("no digits here", None),
        ("", None),
    ],
)
def test_the_answer_is_boxed_or_tagged_or_marked_or_the_last_number(text, answer):
    assert extract_answer(text) == answer


def test_a_gold_text_without_a_mark_stands_for_itself():
    assert gold_answer("2 and 3") == "2 and 3"
    assert gold_answer("steps: 5\n#### 1,000") == "1,000"
    assert gold_answer(72) == "72"
    assert gold_answer(None) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234.50", 1234.5), ("$3", 3), ("-.5", -0.5), ("50%", 50), ("3/4", 0.75), ("7.", 7), ("+2", 2), (r"\$18", 18)],
)
def test_plain_numbers_are_read(text, number):
    assert as_number(text) == number


@pytest.mark.parametrize(
    "text", ["1,2", "x", "", "1e99999999", "1/0", "1.5/2", "-", "1_000", "\\frac{1}{2}", "7 apples"]
)
def test_anything_else_is_no_plain_number(text):
    assert as_number(text) is None


@pytest.mark.parametrize(
    ("gold", "completion", "reward"),
    [
        ("#### 72", "The answer is 72.", 1.0),
        ("#### 72", "The answer is 73.", 0.0),
        ("72", "#### 72.00", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", 1.0),
        ("x^2 - 1", r"\boxed{(x-1)(x+1)}", 1.0),
        ("x^2 - 1", r"\boxed{(x-1)(x+2)}", 0.0),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", 1.0),
        ("72", "I do not know", 0.0),
        (None, "72", None),
        ("-5", "it is \u22125", 1.0),
        ("5", "1" * 5000, 0.0),
        ("5", "1" * 5000 + " million", 0.0),
        ("Paris", "1" * 5000 + " million", 0.0),
        ("5", r"\boxed{" + "1" * 5000 + "}", 0.0),
        ("x", r"\boxed{" + "1" * 900 + "x}", 0.0),
    ],
)
def test_accuracy(gold, completion, reward):
    assert accuracy_reward([completion], solution=[gold]) == [reward]
    assert accuracy_reward([[{"role": "assistant", "content": completion}]], answer=[gold]) == [reward]


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{18 dollars}", r"\boxed{18 \text{ dollars}}", r"\boxed{\$18 \text{ per day}}", r"\boxed{x = 18}",
        r"\boxed{\text{Total} = 18}", r"\boxed{9+9=18}", "#### 18 dollars", "#### 18 apples.", "#### **18**",
        "#### Answer: 18", "<answer>The answer is 18</answer>", "<answer>$18 per day</answer>",
        "<answer>18.00 dollars/day</answer>", "#### Step 1\nfoo\nThe answer is 18", "#### 1. Setup\n2 * 9 is 18",
        "#### Conclusion\nIt is 18", "#### 18\nThat took 3 steps.",
    ],
)  # fmt: skip
def test_words_around_the_one_number_of_an_answer_do_not_make_it_wrong(completion):
    assert (
        accuracy_reward([completion], solution=["18"]) == accuracy_reward([completion], solution=["#### 18"]) == [1.0]
    )
    assert accuracy_reward([completion.replace("18", "81")], solution=["18"]) == [0.0]


@pytest.mark.parametrize(
    "answer",
    [
        "17=18", "18=17", "x=17=18", r"\sqrt{18}", "18x", "18 x", "x18", "18!", "18^2", "18\N{SUPERSCRIPT TWO}", "-18 dollars",
        "- 18 dollars", "minus 18", "17 or 18", "17, 18", "18 thousand", "root of 18", "1/18 of it", "18e3", r"18\pi", "f(18)",
    ],
)  # fmt: skip
def test_another_number_or_an_expression_is_not_read_as_the_number_in_it(answer):
    texts = [rf"\boxed{{{answer}}}", f"<answer>{answer}</answer>", f"#### {answer}"]
    assert accuracy_reward(texts, solution=["18"] * 3) == [0.0] * 3


def test_a_gold_answer_that_is_no_number_is_compared_with_the_whole_mark():
    completions = [r"#### \frac{x}{2}" + "\nin 2 steps", "#### x\n2", r"\boxed{3 apples}"]
    assert accuracy_reward(completions, solution=[r"\frac{x}{2}", "x", "y"]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("message", [{"content": None}, {}, {"content": ""}])
def test_a_message_without_words_is_an_empty_completion(message):
    assert accuracy_reward([[{"role": "assistant", **message}]], solution=["5"]) == [0.0]


@pytest.mark.parametrize("completion", [[], None, 5, ["5"], [{"content": 5}], [{"content": [{"text": "5"}]}]])
def test_what_is_no_completion_is_refused_in_one_sentence(completion):
    with pytest.raises(ValueError, match="a completion is .*; give a text, or a list of messages"):
        accuracy_reward([completion], solution=["5"])


def test_accuracy_needs_a_gold_column():
    with pytest.raises(ValueError, match="column named solution or answer"):
        accuracy_reward(["72"])


@pytest.fixture
def math_pool_of(monkeypatch, tmp_path):
    """Make a pool of one worker that runs some lines of Python first, once or always; then it is math_worker.py."""
    pools = []

    def make(lines, *, always=False):
        program, mark = tmp_path / "worker.py", tmp_path / "mark"
        mark.touch()
        forget = "" if always else f"    os.unlink({str(mark)!r})\n"
        program.write_text(
            "import os, runpy, signal\n"
            f"if os.path.exists({str(mark)!r}):\n{forget}{textwrap.indent(lines, '    ')}\n"
            f"reply = runpy.run_path({str(math_pool.POOL.program)!r})['reply']\n"
        )
        pools.append(WorkerPool(program, workers=1))
        monkeypatch.setattr(math_pool, "POOL", pools[0])
        monkeypatch.setattr(workers, "LOOK_EVERY_S", 0.05)
        monkeypatch.setattr(workers, "FROZEN_S", 0.5)
        return mark

    yield make
    for pool in pools:
        pool.stop()


def test_an_answer_that_takes_for_ever_is_wrong_and_the_next_one_is_still_judged(math_pool_of, monkeypatch):
    mark = math_pool_of("while True: pass", always=True)
    with monkeypatch.context() as impatient:
        impatient.setattr(math_pool, "START_LIMIT_S", 0.5)
        impatient.setattr(workers, "FROZEN_S", 60.0)  # a busy machine may leave it no time
        assert math_equal([("x + x", "2x")]) == [False]
    mark.unlink()
    assert math_equal([("x + x", "2x")]) == [True]


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "signal.pause()"])
def test_a_worker_that_dies_or_stands_still_is_replaced_and_asked_once_more(end, math_pool_of, monkeypatch):
    monkeypatch.setattr(math_pool, "START_LIMIT_S", 2.0 if end == "signal.pause()" else 60.0)
    monkeypatch.setattr(workers, "FROZEN_S", 20.0 if end != "signal.pause()" else 1.0)
    mark = math_pool_of(end)
    assert math_equal([("x + x", "2x"), ("1", "1")]) == [True, True]
    assert not mark.exists()


def test_an_answer_of_which_two_workers_died_has_no_reward_and_is_counted(math_pool_of, caplog):
    math_pool_of("os._exit(0)", always=True)
    runner = RewardRunner(
        [accuracy_reward, get_cosine_scaled_reward(max_len=10), BUILT_IN["reasoning_accuracy_reward"]]
    )
    answers = [r"</think> \boxed{x + 1}", r"</think> \boxed{1 + x}", "none"]
    scores = runner(["p"] * 3, answers, [[1]] * 3, {"solution": ["x + 1"] * 3}, 1)
    assert scores.rewards[:, 0].tolist()[::2] == [1.0, 0.0] and scores.rewards[1].isnan().all()
    assert [scores.metrics[f"rewards/{name}/failures"] for name in runner.names] == [1, 1, 1]
    assert "reward function accuracy_reward failed: EOFError: the worker process died, or was stopped" in caplog.text


def test_a_worker_that_gets_no_cpu_time_is_waited_for(math_pool_of, monkeypatch):
    """The limits are of CPU time: a worker that is stopped for longer than they are makes no right answer wrong."""
    math_pool_of("pass")
    assert math_equal([("x", "y")]) == [False]
    monkeypatch.setattr(workers, "FROZEN_S", 60.0)
    monkeypatch.setattr(math_pool, "TIME_LIMIT_S", 0.5)
    worker = math_pool.POOL.started[0].process
    os.kill(worker.pid, signal.SIGSTOP)
    timer = threading.Timer(1.0, os.kill, [worker.pid, signal.SIGCONT])
    timer.start()
    assert math_equal([("x + x", "2x")]) == [True]
    assert math_pool.POOL.started[0].process is worker


def test_math_verify_works_outside_the_main_thread():
    async def in_a_thread():
        return await asyncio.to_thread(math_equal, [("x + x", "2x"), ("x", "y")])

    assert asyncio.run(in_a_thread()) == [True, False]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a\nb</think>c", 1.0),
        ("<think></think>", 1.0),
        ("<think>a</think>b</think>", 1.0),
        (" <think>a</think>c", 0.0),
        ("<think>a", 0.0),
        ("<think>a</think><think>b</think>", 0.0),
        ("c<think>a</think>", 0.0),
    ],
)
def test_think_format(text, reward):
    assert think_format_reward([text]) == [reward]
    assert think_format_reward([[{"role": "assistant", "content": text}]]) == [reward]


def score(*functions, columns=None, completions=("a", "bb"), timeout_s=None):
    return RewardRunner(functions, timeout_s)(
        ["p"] * len(completions), list(completions), [[1]] * len(completions), columns or {}, 3
    )


def test_a_reward_gets_everything_by_keyword():
    given = {}

    def reward(*, prompts, completions, completion_ids, difficulty, trainer_state, log_extra, log_metric):
        assert trainer_state.max_steps == 1, "there is no run"
        given.update(prompts=prompts, ids=completion_ids, difficulty=difficulty, step=trainer_state.global_step)
        log_extra("length", [len(c) for c in completions])
        log_metric("mine", 1)
        log_metric("mine", 2)
        return [float(len(c)) for c in completions]

    scores = score(reward, columns={"difficulty": [5, 6]})
    assert given == {"prompts": ["p", "p"], "ids": [[1], [1]], "difficulty": [5, 6], "step": 3}
    assert scores.rewards.tolist() == [[1.0], [2.0]]
    assert scores.extra_columns == {"length": [1, 2]}
    assert scores.metrics["mine"] == 1.5
    assert "time/reward/reward_s" in scores.metrics


def test_a_function_that_is_called_in_parts_has_the_same_to_say():
    def reward(completions, number, log_extra, log_metric, **_):
        if 3 in number:
            raise ValueError
        log_extra("of", number)
        log_metric("mine", len(completions))
        return [float(one) for one in number]

    given = ["p"] * 5, ["x"] * 5, [[1]] * 5, {"number": [1, 2, 3, 4, 5]}
    scores = RewardRunner([reward])(*given, 0, at_most=2)
    assert scores.rewards[:, 0].nan_to_num(nan=-1.0).tolist() == [1, 2, -1, -1, 5]
    assert scores.extra_columns == {"of": [1, 2, None, None, 5]}
    assert scores.metrics["mine"] == 1.5 and scores.metrics["rewards/reward/failures"] == 2


def test_none_is_a_reward_that_does_not_apply():
    assert score(lambda **_: [None, 1.0]).rewards[:, 0].isnan().tolist() == [True, False]


def test_a_reward_may_be_async():
    async def slow(completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0 for _ in completions]

    assert score(slow).rewards.tolist() == [[1.0], [1.0]]


BROKEN = [
    ([1.0], "returned 1 value for 2 completions", 2),
    (None, "returned NoneType", 2),
    (["x", 1.0], "returned 'x'", 1),
    ([1e300, 1.0], "returned 1e", 1),
    ([10**400, 1.0], "returned a whole number of 1329 bits", 1),
    ([torch.zeros(2), 1.0], "returned tensor", 1),
    ([float("inf"), 1], "returned inf; a reward is a finite number", 1),
    ([TimeoutError("too slow"), 1.0], "failed: TimeoutError: too slow", 1),
]


@pytest.mark.parametrize(("returned", "message", "failures"), [*BROKEN, ([float("nan"), 1], "returned nan", 1)])
def test_what_is_no_reward_is_left_out_and_counted_and_the_run_goes_on(returned, message, failures, caplog):
    def broken(**kwargs):
        return returned

    def sound(**kwargs):
        return [0.5, 0.25]

    scores = score(broken, sound)
    assert scores.rewards[:, 0].isnan().sum() == failures and (scores.rewards[:, 0].nansum() == 1) == (failures == 1)
    assert scores.rewards[:, 1].tolist() == [0.5, 0.25]
    assert scores.metrics["rewards/broken/failures"] == failures and scores.metrics["rewards/sound/failures"] == 0
    assert f"reward function broken {message}" in caplog.text
    assert f"no such reward for {failures} of 2 completions" in caplog.text


@pytest.mark.parametrize(("returned", "message", "failures"), BROKEN)
def test_what_is_no_reward_stops_the_run_at_its_start(returned, message, failures):
    def broken(**kwargs):
        return returned

    with pytest.raises(ValueError, match=f"reward function broken {message}.*made-up completions"):
        RewardRunner([broken]).try_out(["p", "p"], {})


def test_one_that_does_not_take_every_column_is_told_how():
    with pytest.raises(ValueError, match=r"unexpected keyword argument '\w+'; let it take \*\*kwargs, since"):
        RewardRunner([lambda completions: [1.0]]).try_out(["p"], {"solution": ["2"]})


@pytest.mark.parametrize(
    ("function", "prompt", "remedy"),
    [
        (lambda completions, **_: [one[0]["content"] for one in completions], "p", "; each completion is a text, since"),
        (lambda completions, **_: [one.strip() for one in completions], [{}], '; each completion is a list as [{"role"'),
        (lambda answer, **_: [1.0], "p", "missing 1 required positional argument: 'answer'; the data's columns, which "
         "it is called with, are prompts, solution (on 1 made-up"),
    ],
)  # fmt: skip
def test_one_that_takes_completions_or_columns_for_others_is_told_what_they_are(function, prompt, remedy):
    with pytest.raises(InputError, match=re.escape(remedy)):
        RewardRunner([function]).try_out([prompt], {"solution": ["2"]})


def by_group(completions, **kwargs) -> list[float]:
    lengths = np.array([len(one) for one in completions], dtype=float).reshape(-1, 4)
    return (lengths == lengths.max(axis=1, keepdims=True)).astype(float).ravel().tolist()


def test_a_reward_of_whole_groups_is_tried_on_them_and_is_told_of_evaluations_that_have_none():
    rows = Dataset.from_list([{"prompt": f"{number}+1=", "answer": "2"} for number in range(8)])
    config, rewards = GRPOConfig(num_generations=4), RewardRunner([by_group])
    assert try_out(rewards, rows, "train_dataset", config) == []
    few = "(on 3 made-up completions of eval_dataset, 1 of each prompt, which every reward is tried on first)"
    remedy = "; set num_generations_eval=4 if it needs whole groups, since an evaluation has 1 completion of a prompt "
    with pytest.raises(InputError, match=re.escape(remedy + few)):
        try_groups(rewards, rows, "eval_dataset", config, is_eval=True)
    try_groups(rewards, rows, "eval_dataset", replace(config, num_generations_eval=4), is_eval=True)
    with pytest.raises(InputError, match=r"\(on 6 made-up completions of train_dataset, 6 of each prompt, which"):
        try_groups(rewards, rows, "train_dataset", replace(config, num_generations=6), is_eval=False)


def test_an_array_with_nan_for_what_does_not_apply_passes_the_try_out():
    RewardRunner([lambda **_: np.array([np.nan, 1.0])]).try_out(["p", "p"], {})


@pytest.mark.parametrize("adv_estimator", ["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("multi_objective_aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_the_largest_rewards_of_thousands_of_completions_have_finite_advantages(
    adv_estimator, scale_rewards, multi_objective_aggregation
):
    options = dict(
        adv_estimator=adv_estimator,
        scale_rewards=scale_rewards,
        multi_objective_aggregation=multi_objective_aggregation,
    )

    def large(completions, **kwargs):
        return [LARGEST, -LARGEST] * (len(completions) // 2)

    rewards = score(large, completions=["a"] * 4096).rewards
    assert rewards.isfinite().all()
    found = compare(rewards, num_generations=8, reward_weights=[10.0], **options)
    assert found.advantages.isfinite().all() and found.advantages[0] > 0 > found.advantages[1]
    assert nanstd(found.rewards, dim=0).isfinite() and not found.zero_std.any()
    assert score(lambda **_: [2 * LARGEST, 1.0]).rewards[:, 0].isnan().tolist() == [True, False]


def test_a_failure_is_logged_the_first_second_fourth_time(caplog):
    runner = RewardRunner([lambda **_: 1 / 0], None)
    for step in range(9):
        runner(["p"], ["c"], [[1]], {}, step)
    said = [record.message for record in caplog.records if "ZeroDivisionError" in record.message]
    assert [message.split("(")[-1].split()[0] for message in said] == ["1", "2", "4", "8"]
    assert sum("there is nothing to learn from" in record.message for record in caplog.records) == 4


def hang_in_python(**kwargs):
    while True:
        pass


def hang_in_sleep(**kwargs):
    time.sleep(600)


def hang_and_catch(**kwargs):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(600)


async def hang_in_await(**kwargs):
    await asyncio.sleep(600)


async def hang_the_loop(**kwargs):
    time.sleep(600)


async def refuse_to_be_cancelled(**kwargs):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(600)


async def quick(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [1.0 for _ in completions]


HANGING = [hang_in_python, hang_in_sleep, hang_and_catch, hang_in_await, hang_the_loop, refuse_to_be_cancelled]


@pytest.mark.parametrize("in_main_thread", [True, False])
@pytest.mark.parametrize("function", HANGING)
def test_a_reward_that_hangs_is_stopped_and_the_others_count(function, in_main_thread, caplog):
    def work():
        runner = RewardRunner([quick, function, length], timeout_s=0.3)
        return runner(["p", "p"], ["a", "bb"], [[1], [1]], {}, 1)

    def length(completions, **kwargs):
        return [float(len(c)) for c in completions]

    started = time.monotonic()
    if in_main_thread:
        scores = work()
    else:
        with ThreadPoolExecutor(1) as pool:
            scores = pool.submit(work).result()
    assert time.monotonic() - started < 60  # of 600
    assert scores.rewards[:, 2].tolist() == [1.0, 2.0] and scores.rewards[:, 1].isnan().all()
    assert function is hang_the_loop or scores.rewards[:, 0].tolist() == [1.0, 1.0]
    assert scores.metrics[f"rewards/{function.__name__}/failures"] == 2
    assert "took longer than reward_timeout=0.3 s" in caplog.text


def test_a_reward_that_hangs_stops_the_run_at_its_start():
    with pytest.raises(ValueError, match="hang_in_sleep took longer than reward_timeout=0.2 s; raise reward_timeout"):
        RewardRunner([hang_in_sleep], timeout_s=0.2).try_out(["p"], {})


def test_a_time_limit_leaves_no_signal_behind():
    before, threads = signal.getsignal(SIGNAL), threading.active_count()
    score(lambda **_: [1.0, 1.0], timeout_s=5.0)
    assert signal.getsignal(SIGNAL) == before and threading.active_count() == threads


def test_c_code_that_keeps_the_interpreters_lock_is_stopped(caplog):
    scores = score(lambda **_: re.match(r"(a|a)*$", "a" * 28 + "b"), timeout_s=0.3)
    assert scores.rewards.isnan().all() and "took longer than reward_timeout=0.3 s" in caplog.text


def test_threads_that_compute_do_not_shorten_a_time_limit():
    def busy(completions, **kwargs):
        until = time.monotonic() + 0.6
        with ThreadPoolExecutor(2) as pool:
            list(
                pool.map(
                    lambda _: [hashlib.sha256(bytes(1 << 20)) for _ in iter(lambda: time.monotonic() < until, False)],
                    range(2),
                )
            )
        return [1.0 for _ in completions]

    assert score(busy, timeout_s=5.0).rewards.tolist() == [[1.0], [1.0]]


def test_a_time_limit_gives_a_timer_back():
    signal.setitimer(signal.ITIMER_VIRTUAL, 1000.0, 500.0)
    try:
        score(lambda **_: [1.0, 1.0], timeout_s=5.0)
        left, interval = signal.getitimer(signal.ITIMER_VIRTUAL)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    assert 900 < left < 1001 and interval == pytest.approx(500)
    score(lambda **_: [1.0, 1.0], timeout_s=5.0)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_async_rewards_run_concurrently():
    """None ends before all have begun; their time is what they took, not what it took to make them."""
    together = asyncio.Barrier(4)

    def slow(name):
        async def function(completions, **kwargs):
            await together.wait()
            await asyncio.sleep(0.05)
            return [1.0 for _ in completions]

        function.__name__ = name
        return function

    scores = score(*(slow(f"slow_{n}") for n in range(4)), timeout_s=60.0)
    assert scores.rewards.tolist() == [[1.0] * 4] * 2
    assert scores.metrics["time/reward/slow_3_s"] > 0.04


@pytest.mark.parametrize("stop", [asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("timeout_s", [None, 5.0])
def test_no_exception_goes_through(stop, timeout_s, caplog):
    def stopped(**kwargs):
        raise stop("gone")

    async def async_stopped(**kwargs):
        raise stop("gone")

    scores = score(stopped, async_stopped, quick, timeout_s=timeout_s)
    assert scores.rewards[:, :2].isnan().all() and scores.rewards[:, 2].tolist() == [1.0, 1.0]
    assert f"reward function stopped raised {stop.__name__}: gone" in caplog.text
    assert f"reward function async_stopped raised {stop.__name__}: gone" in caplog.text


def test_torchs_settings_are_the_same_for_the_next_reward_and_for_the_run():
    def change():
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return [1.0, 1.0]

    async def async_changing(**kwargs):
        return change()

    def changing(**kwargs):
        return change()

    def failing(**kwargs):
        return change() and 1 / 0

    def next_one(**kwargs):
        return [float(torch.is_grad_enabled()), float(torch.get_default_dtype() == torch.float32)]

    try:
        assert score(changing, failing, next_one, async_changing).rewards[:, 2].tolist() == [1.0, 1.0]
        assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)


def test_math_verify_works_in_a_reward_with_a_time_limit():
    def own(completions, **kwargs):
        from math_verify import parse, verify

        return [float(verify(parse("$2x$"), parse("$x+x$"))) for _ in completions]

    assert score(own, timeout_s=30.0).rewards.tolist() == [[1.0], [1.0]]


def test_a_slow_reward_is_reported_once_and_again_when_twice_as_slow(caplog, monkeypatch):
    clock, seconds = [0.0], iter([11.0, 12.0, 50.0])

    def slow(completions, **kwargs):
        clock[0] += next(seconds)
        return [1.0 for _ in completions]

    monkeypatch.setattr("lowmem_grpo.rewards.runner.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    runner = RewardRunner([slow])
    for step in range(3):
        runner(["p"], ["c"], [[1]], {}, step)
    assert caplog.text.count("s for 1 completion") == 2


def test_what_a_failed_call_logged_does_not_count():
    def broken(log_metric, log_extra, **kwargs):
        log_metric("mine", 1)
        log_extra("column", [1])

    scores = score(broken)
    assert "mine" not in scores.metrics and not scores.extra_columns


@pytest.mark.parametrize("name", ["kl", "step", "eval_reward", "rewards/other/failures", "memory/mine", 3])
def test_a_metric_under_one_of_the_trainers_names_fails_like_any_error(name, caplog):
    def broken(completions, log_metric, **kwargs):
        log_metric(name, 1)
        return [1.0 for _ in completions]

    scores = score(broken)
    assert scores.rewards.isnan().all() and not set(scores.metrics) - {
        "time/reward/broken_s",
        "rewards/broken/failures",
    }
    assert scores.metrics["rewards/broken/failures"] == 2 and f"log_metric({name!r}) takes a text" in caplog.text
    with pytest.raises(ValueError, match=r"log_metric\(.* choose another name"):
        RewardRunner([broken]).try_out(["p", "p"], {})


@pytest.mark.parametrize(
    "returned", [np.array([0.5, 1.0]), torch.tensor([0.5, 1.0]), (0.5, True), [np.float32(0.5), 1]]
)
def test_arrays_tensors_and_tuples_are_rewards_too(returned):
    assert score(lambda **_: returned).rewards.tolist() == [[0.5], [1.0]]


def test_a_reward_that_changes_its_arguments_changes_nothing_for_the_next():
    def greedy(completions, prompts, gold, **kwargs):
        values = [1.0 for _ in completions]
        for given in (completions, prompts, gold):
            given.clear()
        return values

    def second(completions, prompts, gold, **kwargs):
        return [float(len(completions) + len(prompts) + len(gold))] * 2

    assert score(greedy, second, columns={"gold": [1, 2]}).rewards[:, 1].tolist() == [6.0, 6.0]


def test_an_async_reward_works_where_a_loop_is_running():
    async def slow(completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0 for _ in completions]

    async def notebook():
        return score(slow)

    assert asyncio.run(notebook()).rewards.tolist() == [[1.0], [1.0]]


def test_a_reward_that_raises_is_named(caplog):
    def broken(**kwargs):
        raise KeyError("gold")

    assert score(broken).rewards.isnan().all()
    assert "reward function broken raised KeyError: 'gold'; no such reward for 2 of 2 completions" in caplog.text


def test_rewards_of_one_name_are_numbered_in_their_order():
    """As two folders that end alike, or two judges; all that is measured of each is under its own name."""

    class Scored:
        def __init__(self, name, value):
            self.__name__, self.value = name, value

        def __call__(self, completions, log_metric, **kwargs):
            log_metric(f"{self.__name__}/length", self.value)
            return [self.value for _ in completions]

    names = ("rm", "rm", "rm_2", "rm")
    runner = RewardRunner([Scored(name, float(value)) for value, name in enumerate(names)])
    assert runner.names == ["rm", "rm_2", "rm_2_2", "rm_3"]
    scores = runner(["p"], ["c"], [[1]], {}, 1)
    assert scores.rewards.tolist() == [[0.0, 1.0, 2.0, 3.0]]
    assert [scores.metrics[f"{name}/length"] for name in runner.names] == [0.0, 1.0, 2.0, 3.0]
    assert {f"time/reward/{name}_s" for name in runner.names} <= scores.metrics.keys()


def test_a_rewards_name_is_trls():
    trl = pytest.importorskip("trl.trainer.utils")

    class Scored:
        def __call__(self, completions, **kwargs):
            return [1.0]

    functions = [Scored(), partial(think_format_reward), partial(partial(score, 1), completions="a"), lambda **_: [1.0]]
    assert RewardRunner(functions).names == [*map(trl.get_callable_name, functions)]


def test_what_a_trainer_state_lacks_is_said():
    def curious(trainer_state, **kwargs):
        assert getattr(trainer_state, "log_history", None) is None
        return [trainer_state.epoch]

    with pytest.raises(ValueError, match="trainer_state has global_step and max_steps here, and no epoch"):
        RewardRunner([curious]).try_out(["p"], {})


def test_a_reward_that_is_given_twice_is_refused():
    with pytest.raises(ValueError, match="reward function len is given twice; give it once, with another of reward_we"):
        RewardRunner([len, len])


def test_names_become_functions(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_a_test.py").write_text(
        "def one(completions, **kwargs):\n    return [1.0 for _ in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    functions = resolve_reward_funcs(["accuracy_reward", "my_rewards_for_a_test.one", len])
    assert [function.__name__ for function in functions] == ["accuracy_reward", "one", "len"]
    sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy_reward", "did you mean accuracy_reward"),
        ("zzz", "the built-in ones are accuracy_reward, .*think_format_reward"),
        (
            "no_such_module.f",
            r"'no_such_module'; 'no_such_module.py' is looked for in the current folder and on PYTHON",
        ),
        ("answers.ANSWERS", "answers.ANSWERS is .*, which is no reward function; name a function of answers"),
        ("math.no_such_function", "is of Python's own"),
        (3, "cannot be called"),
        (threading.Thread, r"reward function Thread is a class; give what it makes, Thread\(\.\.\.\)"),
        ([], "reward_funcs is empty"),
    ],
)
def test_what_is_no_reward_is_refused_by_name(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_reward_funcs(name)
