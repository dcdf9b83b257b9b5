"""Reward functions as a run is given them, checked with the rows that they will score."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import ModelFields, RewardFields
from lowmem_grpo.data.gold import COLUMNS, gold_of
from lowmem_grpo.errors import InputError, counted, shown
from lowmem_grpo.inputs.names import refuse_other_number
from lowmem_grpo.inputs.tools import begin_with
from lowmem_grpo.model.find import find_base_of, read_config
from lowmem_grpo.rewards import RewardRunner, reads_gold, resolve_reward_funcs
from lowmem_grpo.rewards.reward_adapter import AdapterReward
from lowmem_grpo.rewards.route import RoutedReward, inner_of, kinds_of_rows, rows_for
from lowmem_grpo.tools.toolbox import Toolbox

ALONE = 3  # rows that a reward is tried on where each has one completion


def worn_by(base: PreTrainedConfig, functions: Sequence[Any]) -> list[AdapterReward]:
    """The reward adapters among functions that a base can wear."""
    return [one for one in _reward_adapters(functions) if one.is_of(base._name_or_path)]


def _reward_adapters(functions: Sequence[Any]) -> list[AdapterReward]:
    return [one for one in map(inner_of, functions) if isinstance(one, AdapterReward)]


def refuse_lost_bases(rewards: RewardRunner, model: Any, config: ModelFields) -> None:
    """Raise InputError where the base of a reward adapter, which the policy's is not, cannot be loaded beside it."""
    for one in _reward_adapters(rewards.functions):
        if not one.is_of(read_config(model, config)._name_or_path):
            find_base_of(str(one.folder), config)


def refuse_without_rewards(rewards: RewardRunner, config: GRPOConfig, eval_rows: Dataset | None) -> None:
    """Raise InputError for what needs rewards in a run that learns from its teacher alone."""
    learns_from_them = config.reward_weights is None or any(config.reward_weights)
    if rewards.names and learns_from_them:
        if config.num_generations < 2 and config.adv_estimator not in ("reinforce_plus_plus", "gae"):
            raise InputError(
                f"num_generations={config.num_generations} serves a teacher, and leaves the rewards nothing to compare "
                "a completion with; raise it, or give the rewards reward_weights of 0"
            )
        return
    for name in ("dynamic_sampling_rounds", "replay_buffer_size", "curriculum_skip"):
        if getattr(config, name) != getattr(GRPOConfig, name):
            raise InputError(f"{name} looks for differences of rewards, and nothing is learnt from any; leave it out")
    if rewards.names:
        return
    if eval_rows is not None:
        raise InputError(
            "an eval_dataset is scored by reward_funcs, and there are none; give them with reward_weights of 0, which "
            "measures alone, or leave eval_dataset out"
        )
    for name in [one.name for one in fields(RewardFields) if one.name != "mask_truncated_completions"]:
        if getattr(config, name) != getattr(GRPOConfig, name):
            raise InputError(f"{name} is about rewards, and there are no reward_funcs; give some, or leave {name} out")


def own_rewards(toolbox: Toolbox | None, config: GRPOConfig) -> list[Callable]:
    """The rewards that environments give by themselves."""
    environments = None if toolbox is None else toolbox.environments
    return [] if environments is None else environments.rewards(config.reward_timeout)


def runner_of(reward_funcs: Any, config: GRPOConfig, own: Sequence[Callable] = ()) -> tuple[RewardRunner, GRPOConfig]:
    """A runner of the reward functions, and of environments' own, and the configuration with a weight for each.

    There may be none beside a teacher. An environment's own has the weight 1 unless reward_weights has one for it, too.

    Raises:
        InputError: one cannot be found or called, or reward_weights are not as many.
    """
    has_none = reward_funcs == [] and (own or config.teacher is not None)
    given = [] if has_none else resolve_reward_funcs(reward_funcs)
    weights = config.reward_weights
    if own and weights is not None and len(weights) == len(given):
        config = replace(config, reward_weights=[*weights, *[1.0] * len(own)])
    if given or own:
        refuse_other_number(config, len(given) + len(own))
    return RewardRunner([*given, *own], config.reward_timeout), config


def try_out(
    rewards: RewardRunner, rows: Dataset, name: str, config: GRPOConfig, toolbox: Toolbox | None = None, *,
    is_eval: bool = False,
) -> list[str]:  # fmt: skip
    """Call each reward once on the first rows with made-up completions, and look for gold answers.

    It is called with whole groups, as in a step; or as in an evaluation, where that is what the rows are for.

    Returns what to tell of rows without one. Raise InputError where a reward cannot work.
    """
    if not rewards.names:
        return []
    rewards.check_rows(rows, name)
    notes = missing_golds(rewards, rows, name) + _routes(rewards, rows, name)
    try_groups(rewards, rows, name, config, toolbox, is_eval=is_eval)
    return notes


def try_groups(
    rewards: RewardRunner, rows: Dataset, name: str, config: GRPOConfig, toolbox: Toolbox | None = None, *,
    is_eval: bool,
) -> None:  # fmt: skip
    """Call each reward once with made-up completions, as many of a row as a step or an evaluation has.

    Raises:
        InputError: a reward cannot work so, as where it needs whole groups, and an evaluation has one of each.
    """
    size = (config.num_generations_eval or 1) if is_eval else config.num_generations
    # One group, or rows of one completion each, three of which are no whole groups of 2 or 4; and the first row of each
    # routed reward.
    firsts = [index for one in rewards.functions for index in rows_for(one, rows)[:1]]
    chosen = sorted({*range(min(1 if size > 1 else ALONE, len(rows))), *firsts})
    indices = [index for index in chosen for _ in range(size)]
    trial, environments = rows[indices], None
    if toolbox is not None and toolbox.environments is not None:
        begun = begin_with(toolbox.environments, list(rows.select(indices)), name)
        environments = [one.environment for one in begun]
    remedy = ""
    if is_eval and size != config.num_generations:
        remedy = (
            f"; set num_generations_eval={config.num_generations} if it needs whole groups, since an evaluation has "
            f"{counted(size, 'completion')} of a prompt"
        )
    columns = {key: values for key, values in trial.items() if key != "prompt"}
    rewards.try_out(trial["prompt"], columns, environments, f" of {name}, {size} of each prompt", remedy)


def missing_golds(rewards: RewardRunner, rows: Dataset, name: str) -> list[str]:
    """Say how many rows have no gold answer, where a built-in reward reads it.

    Raises:
        InputError: no row has one, or a row's is neither a text nor a number.
    """
    readers = {
        one: function for one, function in zip(rewards.names, rewards.functions, strict=True) if reads_gold(function)
    }
    if not readers:
        return []
    of_all = [one for one, function in readers.items() if function is inner_of(function)]
    notes = []
    for reader in [*of_all[:1], *(one for one in readers if one not in of_all)]:
        notes += _golds_of(reader, readers[reader], rows, name)
    return notes


def _golds_of(reader: str, function: Callable, rows: Dataset, name: str) -> list[str]:
    """Say how many of a reward's rows have no gold answer. Raise InputError where none has one."""
    columns = [column for column in COLUMNS if column in rows.column_names]
    if not columns:
        raise InputError(
            f"{reader} needs the gold answers: {name} has no column named solution or answer, only "
            f"{', '.join(rows.column_names)}; rename the one that has them"
        )
    missing = 0
    own, given = rows_for(function, rows), list(rows.select_columns(columns))
    for index in own:
        row: Any = given[index]
        try:
            missing += gold_of(row) is None
        except InputError as error:
            raise InputError(f"row {index} of {name} has no gold answer for {reader}: {error}") from error
    if own and missing == len(own):
        raise InputError(
            f"no row of {name} has a gold answer in solution or answer, so that {reader} would give no completion "
            "a reward; fill one of the two columns, or leave the reward out"
        )
    told = f"{reader} finds no gold answer in {missing} of {len(own)} rows of {name}, and gives no reward for them"
    return [told] if missing else []


def _routes(rewards: RewardRunner, rows: Dataset, name: str) -> list[str]:
    """Say which routed rewards are for no row, and how many rows have no reward at all."""
    told = []
    for one, function in zip(rewards.names, rewards.functions, strict=True):
        if isinstance(function, RoutedReward) and not rows_for(function, rows):
            told.append(f"{one} is for no row of {name}: none has {function.column} in {shown(function.values)}")
    without = kinds_of_rows(rewards.names, rewards.functions, rows)[()]
    if rewards.functions and without:
        told.append(f"no reward is for {without} of {len(rows)} rows of {name}, from which nothing is learnt")
    return told


def refuse_mixed_scales(rewards: RewardRunner, rows: Dataset, config: RewardFields) -> None:
    """Raise InputError where rewards of rows of different kinds would be divided by one deviation of the batch."""
    kinds = [*filter(None, kinds_of_rows(rewards.names, rewards.functions, rows))]
    by_batch = {
        "scale_rewards='batch'": config.adv_estimator == "grpo" and config.scale_rewards == "batch",
        f"adv_estimator={config.adv_estimator!r}": config.adv_estimator.startswith("reinforce_plus_plus"),
    }
    found = next((setting for setting, is_set in by_batch.items() if is_set), None)
    if found and len(kinds) > 1:
        words = " and ".join(" + ".join(kind) for kind in kinds[:3])
        raise InputError(
            f"{found} divides all advantages of a step by one deviation, and rows have different rewards ({words}), of "
            "which the one of the smaller numbers would teach little; leave it out, since scale_rewards='group' makes "
            "them comparable"
        )


def parameters_of(function: Callable) -> set[str]:
    """The names of a function's parameters; none where Python cannot tell."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of some that are written in C
        return set()
