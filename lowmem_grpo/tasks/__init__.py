"""Tasks: rows, and the verifier that knows when they are solved.

One of your own is a Task, given as the dataset; the others go by name. A name is `gsm8k`, `countdown` or
`reasoning_gym:<one of its tasks>`, with options as in an address: `countdown?size=5000&seed=1`. What a task may be
given is what its function here takes.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError, did_you_mean
from lowmem_grpo.tasks.countdown import countdown_task
from lowmem_grpo.tasks.gsm8k import gsm8k_task
from lowmem_grpo.tasks.options import options_of, refuse_unknown_options
from lowmem_grpo.tasks.reasoning_gym import reasoning_gym_task, refuse_unknown
from lowmem_grpo.tasks.task import Task

__all__ = ["TASKS", "Inputs", "Task", "find_task", "held_out", "is_task_name", "with_tasks"]

TASKS: dict[str, Callable[..., Task]] = {"gsm8k": gsm8k_task, "countdown": countdown_task}
REASONING_GYM = "reasoning_gym"


class Inputs(NamedTuple):
    """The inputs of a run, with datasets and rewards in place of names of tasks."""

    train_dataset: Any
    eval_dataset: Any
    reward_funcs: Any
    config: GRPOConfig


def with_tasks(
    train_dataset: Any, eval_dataset: Any, reward_funcs: Any, config: GRPOConfig, *, needs_rewards: bool = True
) -> Inputs:
    """Inputs with datasets in place of names of tasks; the training task fills what is left open.

    Without reward_funcs its verifier is the reward, without a system_prompt or stop_strings its own are used, and
    without an eval_dataset what it holds out. Generated rows that are held out never have a training row's prompt.
    Where something else gives rewards, there need be no reward_funcs.

    Raises:
        InputError: no task of that name, an option that it has not, or neither a task nor reward_funcs.
    """
    task, other = find_task(train_dataset), find_task(eval_dataset)
    is_generated = other is not None and not isinstance(eval_dataset, Task)  # of one's own every row is measured on
    if other is not None:
        eval_dataset = held_out(other)
    if task is not None:
        train_dataset = task.rows if eval_dataset is None or task.whole is None else task.whole
        eval_dataset = task.eval_rows if eval_dataset is None else eval_dataset
        reward_funcs = task.reward if reward_funcs is None else reward_funcs
        if config.system_prompt is None and task.system_prompt is not None:
            config = dataclasses.replace(config, system_prompt=task.system_prompt)
        if config.stop_strings is None and task.stop_strings is not None:
            config = dataclasses.replace(config, stop_strings=task.stop_strings)
    if reward_funcs is None and (config.teacher is not None or not needs_rewards):
        reward_funcs = []  # the teacher says what to learn, or an environment
    if reward_funcs is None:
        refuse_missing_rewards(train_dataset)
    if is_generated and isinstance(train_dataset, list) and isinstance(eval_dataset, list):
        eval_dataset = without_prompts_of(train_dataset, eval_dataset)
        if not eval_dataset:
            raise InputError("every row of eval_dataset is one of train_dataset's; give it others, by another seed say")
    return Inputs(train_dataset, eval_dataset, reward_funcs, config)


def refuse_missing_rewards(train_dataset: Any) -> NoReturn:
    """Raise InputError, since there are neither reward_funcs nor a task nor a teacher."""
    meant = did_you_mean(str(train_dataset), TASKS, "") if isinstance(train_dataset, str) else ""
    hint = meant or "give one or several, or train on a task, which has its own"
    raise InputError(f"reward_funcs is missing; {hint}")


def is_task_name(name: str) -> bool:
    """Tell whether a name is a task's, options and all, without making the task's rows."""
    head = name.partition("?")[0]
    return head in TASKS or head.partition(":")[0] == REASONING_GYM


def find_task(given: Any) -> Task | None:
    """A Task itself, or the one of a name; None for anything else: a hub id, a file, a Dataset."""
    if isinstance(given, Task):
        return given
    make = _maker(given) if isinstance(given, str) else None
    return None if make is None else make()


def look_up_task(name: str) -> bool:
    """Tell whether a name is a task's, without making its rows. Raise InputError for a task or option that is none."""
    return _maker(name) is not None


def _maker(name: str) -> Callable[[], Task] | None:
    """The maker of a name's task, or None where the name is no task's."""
    head, _, query = name.partition("?")
    family, colon, member = head.partition(":")
    if colon and family == REASONING_GYM:
        options = options_of(name, query)
        refuse_unknown(member, options)
        return partial(reasoning_gym_task, member, **options)
    if head in TASKS:
        options = options_of(name, query)
        refuse_unknown_options(name, options, inspect.signature(TASKS[head]).parameters)
        return partial(TASKS[head], **options)
    if head == REASONING_GYM:
        raise InputError("reasoning_gym is many tasks; name one, such as reasoning_gym:chain_sum")
    if (query and "/" not in head) or (colon and did_you_mean(family, [REASONING_GYM], "")):
        known = ", ".join([*TASKS, f"{REASONING_GYM}:NAME"])
        raise InputError(f"no task is named {head!r}; the tasks are {known}")
    return None


def held_out(task: Task) -> Any:
    """The rows to measure on; of a dataset with splits its name, whose test split an evaluation takes."""
    if task.whole is not None:
        return task.whole
    return task.rows if task.eval_rows is None else task.eval_rows


def without_prompts_of(train_rows: list[dict], eval_rows: list[dict]) -> list[dict]:
    seen = {json.dumps(row.get("prompt"), default=str) for row in train_rows if isinstance(row, dict)}
    return [row for row in eval_rows if json.dumps(row["prompt"]) not in seen]
