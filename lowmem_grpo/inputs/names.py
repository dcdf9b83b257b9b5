"""A run's inputs, looked up by name before anything is imported that computes, which takes seconds."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import OWN_BASE, CriticFields, RewardFields, SampledEvaluationFields
from lowmem_grpo.config.training import TrainingConfig
from lowmem_grpo.errors import InputError, counted, shown
from lowmem_grpo.lookup import has_score_head, look_up_dataset, look_up_model
from lowmem_grpo.output.folder import checkpoints, find_checkpoint, writable_folder
from lowmem_grpo.output.lock import lock_folder, releasing_locks
from lowmem_grpo.output.results import refuse_results
from lowmem_grpo.paths import expanded
from lowmem_grpo.rewards.names import look_up_rewards
from lowmem_grpo.tasks import look_up_task, refuse_missing_rewards
from lowmem_grpo.tools.names import find_factories, find_tools
from lowmem_grpo.torchrun import num_started


def look_up_inputs(inputs: Mapping[str, Any], config: Any, *, needs_rewards: bool = False) -> None:
    """Raise InputError for a model, dataset, reward or folder that a command names and that is not there.

    `inputs` are a training's by name, or an evaluation's, whose dataset is the eval_dataset.
    """
    rewards, dataset = inputs.get("reward_funcs"), inputs.get("dataset", inputs.get("eval_dataset"))
    may_score = inputs.get("environment_factory") is not None  # by its own get_reward, which is not known yet
    task = isinstance(dataset, str) and look_up_task(dataset)
    if rewards is not None:
        look_up_rewards(rewards)
        if not may_score:
            refuse_other_number(config, len(rewards) if isinstance(rewards, list) else 1)
    elif needs_rewards and not task and not may_score and getattr(config, "teacher", None) is None:
        refuse_missing_rewards(dataset)
    if needs_rewards and not task and "eval_dataset" not in inputs:
        refuse_without_evaluation(config)
    if inputs.get("tools") is not None:
        find_tools(inputs["tools"])
    if inputs.get("environment_factory") is not None:
        find_factories(inputs["environment_factory"])
    model = inputs.get("model")
    if isinstance(model, str) and getattr(config, "base_url", None) is None and not _goes_on(config):
        look_up_model(expanded(model), config.model_init_kwargs)
    for which in ("dataset", "eval_dataset"):
        given = inputs.get(which)
        for one in given if isinstance(given, list) else [given]:
            if isinstance(one, str) and not look_up_task(one):
                look_up_dataset(one, "train_dataset" if which == "dataset" else which)


def look_up_training(inputs: Mapping[str, Any], config: TrainingConfig, *, needs_rewards: bool = False) -> None:
    """Raise InputError where an input, the teacher or the critic is not there, or output_dir is none for this training.

    Checkpoints that are there are read later, since their files are compared with their checksums.
    """
    look_up_inputs(inputs, config, needs_rewards=needs_rewards)
    if isinstance(config, GRPOConfig) and config.teacher not in (None, OWN_BASE):
        look_up_model(expanded(config.teacher), what="teacher")
    if config.push_to_hub:
        from lowmem_grpo.output.hub import check_upload, repository

        check_upload(repository(config.hub_model_id, Path(expanded(config.output_dir))))
    resume, folder = config.resume_from_checkpoint, writable_folder(config.output_dir)
    if isinstance(config, GRPOConfig) and not _goes_on(config):
        refuse_critic_init(config)
    if num_started() == 1 and (not resume or not checkpoints(folder)):
        with releasing_locks():
            lock_folder(folder)
            refuse_results(folder, find_checkpoint(folder, resume), begin_anew=resume == "auto")


def _goes_on(config: Any) -> bool:
    """Tell whether a run goes on from a checkpoint. That has what is still read of an adapter that it began from."""
    resume = getattr(config, "resume_from_checkpoint", None)
    return bool(resume) and (resume != "auto" or bool(checkpoints(Path(expanded(config.output_dir)))))


def refuse_other_number(config: RewardFields, number: int) -> None:
    """Raise InputError where reward_weights are not as many as the reward functions."""
    if config.reward_weights is not None and len(config.reward_weights) != number:
        weights, functions = counted(len(config.reward_weights), "number"), counted(number, "reward function")
        raise InputError(f"reward_weights has {weights} for {functions}; give one for each")


def refuse_critic_init(config: CriticFields) -> None:
    """Raise InputError where critic_init is neither the policy nor a folder with a reward adapter."""
    if config.critic_init != "policy" and not has_score_head(expanded(config.critic_init)):
        raise InputError(
            f"critic_init={shown(config.critic_init)} is no adapter with a score head, as `lowmem-grpo reward` writes "
            "one; give such a folder, or leave critic_init out"
        )


def refuse_without_evaluation(config: Any) -> None:
    """Raise InputError where a setting of evaluations has nothing to evaluate on."""
    for setting in fields(SampledEvaluationFields):
        name, value = setting.name, getattr(config, setting.name, setting.default)
        if value != setting.default:
            raise InputError(f"{name}={value}, but there is no eval_dataset; pass one or leave {name} out")
