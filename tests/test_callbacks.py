"""Callbacks: what could not be called is refused before long work, and what one does wrong is said."""

import json
from functools import partial

import pytest
import torch
from tiny_models import DEMO_MODEL
from transformers import TrainerCallback

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs.prompts import read_training_inputs

pytestmark = pytest.mark.usefixtures("known_trials")

ROWS = [{"prompt": "1+1="}, {"prompt": "2+2="}]


def settings(folder, **changes) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder), use_cpu=True, max_steps=2, max_completion_length=4, num_generations=2,
        prompts_per_step=1, **changes,
    )  # fmt: skip


def alternate(completions, **_):
    return [float(place % 2) for place in range(len(completions))]


def run(folder, callbacks, **changes):
    return train(str(DEMO_MODEL), alternate, ROWS, config=settings(folder, **changes), callbacks=callbacks)


async def awaits(step, metrics, policy): ...


def yields(step, metrics, policy):
    yield step


async def awaits_and_yields(step, metrics, policy):
    yield step


class Awaits:
    async def __call__(self, step, metrics, policy): ...

    async def method(self, step, metrics, policy): ...


class Called:
    def __call__(self, step, metrics, policy): ...

    def method(self, step, metrics, policy): ...


class OfTransformers(TrainerCallback):
    def __call__(self, step, metrics, policy): ...


CANNOT_BE_CALLED = "cannot be called with .step, metrics, policy.:"


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (5, "callbacks=5 is neither a function nor a list of functions"),
        ("log", "callbacks='log' is neither"),
        ({"a": print}, "is neither a function nor a list"),
        ([print, 5], "callbacks has 5, which is no function of .step, metrics, policy."),
        ([None], "callbacks has None, which is no function"),
        (lambda: None, CANNOT_BE_CALLED),
        (lambda step: None, CANNOT_BE_CALLED),
        (lambda step, metrics: None, CANNOT_BE_CALLED),
        (lambda step, metrics, policy, more: None, CANNOT_BE_CALLED),
        (lambda *, step, metrics, policy: None, CANNOT_BE_CALLED),
        (lambda step, metrics, policy, *, more: None, CANNOT_BE_CALLED),
        (partial(lambda step, metrics, policy: None, 1), CANNOT_BE_CALLED),
        (Called.method, CANNOT_BE_CALLED),
        (Called, "callback Called is a class"),
        (awaits, "callback awaits is async or yields"),
        (yields, "callback yields is async or yields"),
        (awaits_and_yields, "is async or yields"),
        (Awaits(), "callback Awaits is async or yields"),
        (Awaits().method, "callback method is async or yields"),
        (partial(awaits, 1), "is async or yields"),
        (TrainerCallback(), "callback TrainerCallback is one of transformers' Trainer"),
        (TrainerCallback, "callback TrainerCallback is one of transformers' Trainer"),
        ([print, OfTransformers()], "callback OfTransformers is one of transformers' Trainer"),
    ],
)
def test_a_callback_that_could_not_be_called_is_refused_before_anything_is_read(callbacks, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        read_training_inputs("/no/model", None, "/no/data.jsonl", None, settings(tmp_path), callbacks=callbacks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "callbacks",
    [
        None, (), [], print, [print, Called(), Called().method], lambda *_: 1, lambda step, *rest: 1,
        lambda a, b, c, d=4: 1, partial(lambda x, step, metrics, policy: 1, 0),
    ],
)  # fmt: skip
def test_what_can_be_called_is_taken(callbacks, tmp_path):
    with pytest.raises(InputError, match="/no/data.jsonl' is not a file"):  # which is looked at later
        read_training_inputs(
            str(DEMO_MODEL), alternate, "/no/data.jsonl", None, settings(tmp_path), callbacks=callbacks
        )


def test_a_callback_that_changes_its_metrics_changes_neither_log_nor_what_others_get(tmp_path):
    given = []

    def change(step, metrics, policy):
        given.append(metrics["loss"])
        metrics.update(loss=7.0, mine=1.0)
        del metrics["reward"]

    result = run(tmp_path, [change, change])
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in result.history] == given[::2] == given[1::2] != [7.0, 7.0]
    assert all("reward" in line and "mine" not in line for line in [*result.history, *logged] if "loss" in line)


def test_a_callback_that_returns_something_to_await_is_said_to_and_the_step_is_saved(tmp_path, capsys):
    class Awaited:
        def __await__(self): ...

    def later(step, metrics, policy):
        return Awaited()

    with pytest.raises(InputError, match="callback later returned something to await"):
        run(tmp_path, later)
    assert (tmp_path / "checkpoint-1").is_dir() and "everything up to step 1" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_in_a_callback_is_raised_as_it_is_after_the_step_is_saved(error, tmp_path):
    def fail(step, metrics, policy):
        raise error

    with pytest.raises(type(error)) as caught:
        run(tmp_path, fail)
    assert caught.value is error and (tmp_path / "checkpoint-1").is_dir()


def test_the_callback_that_spoils_a_weight_is_named_at_once(tmp_path):
    def harmless(step, metrics, policy): ...

    def spoil(step, metrics, policy):
        next(iter(policy.parameters_of(policy.adapter).values())).data[0, 0] = torch.inf

    with pytest.raises(FloatingPointError, match="callback spoil left a weight that is not finite at step 1"):
        run(tmp_path, [harmless, spoil])
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_callback_ends_the_run_as_its_last_step_would(tmp_path, capsys):
    """The others are called, and the end is measured, saved and written; resumed, the run goes on to its own end."""
    called = []

    def enough(step, metrics, policy):
        raise StopIteration

    def measured(callbacks, **changes):
        return train(
            str(DEMO_MODEL), alternate, ROWS, ROWS[:1], settings(tmp_path, **changes), callbacks=callbacks
        ).eval_history

    lines = measured([enough, lambda step, metrics, policy: called.append(step)])
    assert [line["step"] for line in lines] == [0, 1] and called == [1]
    assert (tmp_path / "checkpoint-1").is_dir() and (tmp_path / "adapter").is_dir()
    assert "A callback ended the run after step 1 of 2." in (tmp_path / "report.html").read_text(encoding="utf-8")
    said = capsys.readouterr().err
    assert "callback enough ends the run after 1 step" in said and "evaluation after 1 step" in said
    assert [line["step"] for line in measured([], resume_from_checkpoint="auto")] == [0, 1, 2]


def test_a_run_that_is_cut_off_right_after_a_callback_ended_it_ends_when_it_is_resumed(tmp_path):
    def enough(step, metrics, policy):
        raise StopIteration

    def killed(step, metrics, policy):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [enough, killed])
    assert len(run(tmp_path, [enough, killed], resume_from_checkpoint=True).history) == 1
