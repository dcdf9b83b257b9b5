"""The inputs of a run, checked before long work: models, data, rewards, folders, and a plan."""

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedConfig, set_seed

from lowmem_grpo.config.fields import refuse_changes
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import CriticFields, DataFields, ModelFields, RewardFields, SampledEvaluationFields
from lowmem_grpo.config.training import TrainingConfig
from lowmem_grpo.data.chats import is_text
from lowmem_grpo.data.gold import COLUMNS, gold_of
from lowmem_grpo.data.prompts import Prompt, chat_prompts, tokenize_prompts
from lowmem_grpo.data.rows import load_rows
from lowmem_grpo.distributed import is_main, main_first, take_from_main, world_size
from lowmem_grpo.errors import InputError, shown
from lowmem_grpo.identity import columns_of, digest_of, identity_of, identity_of_data, refuse_another_run
from lowmem_grpo.model.adapter_folder import is_adapter, read_adapter_config
from lowmem_grpo.model.chat_template import reading_texts
from lowmem_grpo.model.find import adapter_config, beyond_context, ends_of_model, find_base_of, find_model, read_config
from lowmem_grpo.model.load import load_policy, load_tokenizer
from lowmem_grpo.model.load import run_device as device_of
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.score_head import has_score_head
from lowmem_grpo.model.teacher import FoundTeacher, Teacher, files_of, find_teacher, load_teacher, refuse_other_tokens
from lowmem_grpo.model.turn_end import unseen_turn_end
from lowmem_grpo.output.folder import find_checkpoint, read_state, writable_folder
from lowmem_grpo.output.hub import check_upload, repository
from lowmem_grpo.output.lock import lock_folder
from lowmem_grpo.output.results import refuse_results
from lowmem_grpo.output.trackers import tracker_names
from lowmem_grpo.planner.plan import STEP_SIZES, Plan, limit_memory, plan_to_fit
from lowmem_grpo.rewards import BUILT_IN, BUILT_IN_FACTORIES, RewardRunner, reads_gold, resolve_reward_funcs
from lowmem_grpo.rewards.reward_adapter import AdapterReward
from lowmem_grpo.rewards.route import RoutedReward, inner_of, kinds_of_rows, rows_for
from lowmem_grpo.tasks import find_task, held_out, with_tasks
from lowmem_grpo.warn import warn

TRANSFORMERS_EVENT = "on_step_end"  # which each of its TrainerCallbacks has
# Kinds of functions of which a call runs nothing yet.
NOT_RUN = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """The inputs of any run, checked, before any weights are read."""

    model: Any  # as find_model() accepts it
    peft_config: Any = None
    tokenizer: Any
    given: Any  # the configuration as the caller and the task say it, which a resumed run has to repeat
    config: Any  # with what the plan chose
    device: torch.device
    notes: list[str]  # sentences for whoever watches the run
    output_dir: Path | None = None
    resume: Path | None = None  # the checkpoint to go on from
    plan: Plan | None = None  # where there is a vram_budget
    callbacks: Sequence[Callable[[int, dict[str, Any], Policy], None]] = ()
    num_dropped: int = 0  # training rows that are too long
    identity: dict[str, Any] = field(default_factory=dict)  # what a resumed run must share with its checkpoint
    datasets: dict[str, Any] = field(default_factory=dict)  # "train" and "eval": each as name_of() has it

    @property
    def num_rows(self) -> int:
        """How many rows an epoch has."""
        raise NotImplementedError

    @property
    def num_eval_rows(self) -> int:
        """How many rows are held out to be evaluated on."""
        raise NotImplementedError

    @property
    def total_steps(self) -> int:
        """How many steps the run has: max_steps, or as many as num_train_epochs take."""
        if self.config.max_steps > 0:
            return self.config.max_steps
        return ceil(self.config.num_train_epochs * self.num_rows / self.config.prompts_per_step)

    def load_policy(self) -> Policy:
        """The policy, its adapters drawn by the configuration's seed."""
        set_seed(self.config.seed)
        with limit_memory(self.plan, self.device):
            policy = load_policy(self.model, self.tokenizer, self.config, self.peft_config)
        take_from_main([*policy.parameters_of(policy.adapter).values()])  # a loaded model's may be random
        return policy


@dataclass(frozen=True, kw_only=True)
class Inputs(RunInputs):
    """The inputs of a run that samples completions, checked, before any weights are read."""

    given: GRPOConfig
    config: GRPOConfig
    prompts: list[Prompt]
    eval_prompts: list[Prompt]  # empty where nothing is evaluated
    rewards: RewardRunner
    teacher: FoundTeacher | None = None

    @property
    def num_rows(self) -> int:
        """How many prompts an epoch has."""
        return len(self.prompts)

    @property
    def num_eval_rows(self) -> int:
        """How many prompts are held out to be evaluated on."""
        return len(self.eval_prompts)

    def longest_prompt(self) -> list[int]:
        """Ids of the training prompt of the most tokens."""
        return max((prompt.ids for prompt in self.prompts), key=len)

    def load_policy(self) -> Policy:
        """The policy, its adapters drawn by the configuration's seed, given to the rewards that judge with it."""
        policy = super().load_policy()
        self.notes.extend(self.rewards.bind(policy))
        return policy

    def load_teacher(self, policy: Policy) -> Teacher | None:
        """The teacher, worn on the policy's base or loaded beside it; None where there is none."""
        if self.teacher is None:
            return None
        with limit_memory(self.plan, self.device):
            return load_teacher(self.teacher, policy, self.config)


@main_first
def read_training_inputs(
    model: Any, reward_funcs: Any, train_dataset: Any, eval_dataset: Any, config: GRPOConfig, peft_config: Any = None,
    tokenizer: Any = None, callbacks: Any = (),
) -> Inputs:  # fmt: skip
    """The inputs of train(), which documents them.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    refuse_other_config(config, GRPOConfig)
    callbacks = callbacks_of(callbacks)
    datasets = {"train": name_of(train_dataset), "eval": name_of(eval_dataset)}
    train_dataset, eval_dataset, reward_funcs, config = with_tasks(train_dataset, eval_dataset, reward_funcs, config)
    model = expanded(model)
    rewards = _rewards(reward_funcs, config)
    output_dir, resume, notes = begin(config)
    rows = load_rows(train_dataset, config)
    eval_rows = None if eval_dataset is None else load_rows(eval_dataset, config, name="eval_dataset", split="test")
    refuse_without_evaluation(config, eval_rows)
    if eval_rows is not None and datasets["eval"] is None:
        datasets["eval"] = f"held out by {datasets['train']}"
    find_model(model, config, peft_config)
    _refuse_lost_bases(rewards, model, config)
    teacher = find_teacher(model, config)
    refuse_without_rewards(rewards, config, eval_rows)
    is_continued = isinstance(model, PeftModel) or is_adapter(model)
    if config.sync_ref_model and config.reference == "base" and is_continued:
        raise InputError("sync_ref_model follows the adapter that training starts from; set reference='initial'")
    if config.beta > 0 and config.reference == "base" and is_continued:
        warn(
            "the KL draws the policy back to the base, away from the adapter that training goes on from; set "
            "reference='initial' to hold it near that adapter"
        )
    device = device_of(config)
    refuse_mixed_scales(rewards, rows, config)
    notes += _try_out(rewards, rows, "train_dataset")
    if eval_rows is not None:
        rewards.check_rows(eval_rows, "eval_dataset")
        notes += _golds(rewards, eval_rows, "eval_dataset")
    tokenizer = tokenizer_of(tokenizer, model, config)
    if teacher is not None:
        refuse_other_tokens(teacher, model, tokenizer, config)
    prompts, dropped = tokenize_prompts(rows, tokenizer, config, teachers=config.teacher_system_prompt)
    eval_prompts, eval_dropped = [], 0
    if eval_rows is not None:
        eval_prompts, eval_dropped = tokenize_prompts(eval_rows, tokenizer, config, name="eval_dataset")
    check_prompts(model, prompts + eval_prompts, config)
    if teacher is not None:
        read_by = model if teacher.model is None else teacher.name
        check_prompts(read_by, [prompt.for_teacher for prompt in prompts], config, whose="for the teacher, ")
    notes += _left_out(dropped, "prompts", config) + _left_out(eval_dropped, "evaluation prompts", config)
    plan, given = None, config
    base, adapter = read_config(model, config), adapter_config(model, config, peft_config)
    _refuse_critic(base, config)
    identity = identity_of(base, adapter, tokenizer, columns_of(prompts), rewards)
    if teacher is not None:
        asked = digest_of(prompt.for_teacher.ids for prompt in prompts)
        identity["teacher"] = {"weights": files_of(teacher), "prompts": asked}
    if resume is not None:
        refuse_another_run(resume, identity)
    if config.vram_budget is not None:
        read = [*prompts, *eval_prompts, *(prompt.for_teacher for prompt in prompts)]
        longest = max(len(prompt.ids) for prompt in read)
        worn = worn_by(base, rewards.functions)
        plan = plan_to_fit(base, config, adapter, longest, [one.config for one in worn], teacher)
        for one in worn:
            one.budget.num_tokens = min(one.budget.num_tokens, plan.config.token_budget)
        config = plan.config
    inputs = Inputs(
        model=model, peft_config=peft_config, tokenizer=tokenizer, prompts=prompts, eval_prompts=eval_prompts,
        rewards=rewards, given=given, config=config, device=device, notes=notes, output_dir=output_dir, resume=resume,
        plan=plan, callbacks=callbacks, num_dropped=dropped, identity=identity, teacher=teacher,
        datasets=datasets,
    )  # fmt: skip
    if inputs.total_steps <= config.critic_warmup:
        raise InputError(
            f"critic_warmup={config.critic_warmup} leaves the policy none of the run's {inputs.total_steps} steps to "
            "learn in; lower critic_warmup"
        )
    return inputs


def _refuse_critic(base: PreTrainedConfig, config: CriticFields) -> None:
    """Raise InputError where critic_init is neither the policy nor a folder with a reward adapter.

    One of another base, by its name, is told: as a reward it would be scored with that base, and a critic has none.
    """
    if config.critic_init == "policy":
        return
    if not has_score_head(config.critic_init):
        raise InputError(
            f"critic_init={shown(config.critic_init)} is no adapter with a score head, as `lowmem-grpo reward` writes "
            "one; give such a folder, or leave critic_init out"
        )
    trained_on = str(read_adapter_config(config.critic_init).base_model_name_or_path)
    if os.path.realpath(trained_on) != os.path.realpath(base._name_or_path):
        warn(
            f"critic_init={shown(config.critic_init)} is an adapter of {shown(trained_on)}, and is put on "
            f"{shown(base._name_or_path)}, where its values mean nothing unless the two are one model"
        )


def worn_by(base: PreTrainedConfig, functions: Sequence[Any]) -> list[AdapterReward]:
    """The reward adapters among functions that a base can wear."""
    return [one for one in _reward_adapters(functions) if one.is_of(base._name_or_path)]


def _reward_adapters(functions: Sequence[Any]) -> list[AdapterReward]:
    return [one for one in map(inner_of, functions) if isinstance(one, AdapterReward)]


def _refuse_lost_bases(rewards: RewardRunner, model: Any, config: ModelFields) -> None:
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


def refuse_other_config(config: Any, wanted: type) -> None:
    """Raise InputError where a configuration is none of ours for this training, but TRL's, say."""
    if not isinstance(config, wanted):
        kind = type(config)
        name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise InputError(f"config is a {name}; pass the {wanted.__name__} of lowmem_grpo")


def begin(config: TrainingConfig) -> tuple[Path, Path | None, list[str]]:
    """The output folder, locked; the checkpoint to go on from, if there is one; and what to tell of that.

    Raises:
        InputError: the configuration cannot be saved, a tracker or the hub's token is missing, or the folder cannot be
            used for it.
    """
    try:
        json.dumps(asdict(config))
    except TypeError as error:
        raise InputError(f"config holds what JSON does not: {error}; use texts, numbers, lists and mappings") from error
    if world_size() > config.prompts_per_step:
        name = STEP_SIZES.get(config.kind, "prompts_per_step")
        raise InputError(
            f"torchrun has started {world_size()} processes, and {name}={config.prompts_per_step} does not give each "
            f"something to do; start fewer, or raise {name}"
        )
    tracker_names(config.trackers)
    if config.push_to_hub:
        check_upload(repository(config.hub_model_id, Path(config.output_dir)))
    output_dir = writable_folder(config.output_dir)
    if is_main():
        lock_folder(output_dir)
    resume = find_checkpoint(output_dir, config.resume_from_checkpoint)
    refuse_results(output_dir, resume, begin_anew=config.resume_from_checkpoint == "auto")
    if resume is None:
        return output_dir, None, []
    changed = refuse_changes(config, read_state(resume)["config"])
    return output_dir, resume, [f"going on from {resume}, with {', '.join(changed)}"] if changed else []


def refuse_without_evaluation(config: TrainingConfig, eval_rows: Dataset | None) -> None:
    """Raise InputError for a setting of evaluations where there is nothing to evaluate on."""
    for setting in fields(SampledEvaluationFields):
        name, value = setting.name, getattr(config, setting.name, setting.default)
        if value != setting.default and eval_rows is None:
            raise InputError(f"{name}={value}, but there is no eval_dataset; pass one or leave {name} out")


def tokenizer_of(tokenizer: Any, model: Any, config: ModelFields) -> Any:
    """The tokenizer that is given or named, or the model's. Raise InputError for what is none."""
    if tokenizer is None or isinstance(tokenizer, str):
        return load_tokenizer(tokenizer or model, config)
    if not hasattr(tokenizer, "chat_template"):
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__}; pass one that transformers loads, or its hub id or folder"
        )
    return reading_texts(tokenizer)


def read_evaluation_inputs(model: Any, reward_funcs: Any, dataset: Any, config: GRPOConfig) -> Inputs:
    """The inputs of an evaluation: a task's held-out rows, or a hub dataset's `test` split.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    if config.vram_budget is not None:
        raise InputError("vram_budget plans a training run; leave it out, and set rollout_token_budget if need be")
    model, task = expanded(model), find_task(dataset)
    _, _, reward_funcs, config = with_tasks(dataset, None, reward_funcs, config)
    rows = load_rows(dataset if task is None else held_out(task), config, name="eval_dataset", split="test")
    rewards = _rewards(reward_funcs, config)
    if not rewards.names:
        raise InputError("an evaluation needs reward_funcs, and a teacher is none; give one or several")
    find_model(model, config)
    _refuse_lost_bases(rewards, model, config)
    notes = _try_out(rewards, rows, "eval_dataset")
    tokenizer = load_tokenizer(model, config)
    prompts, dropped = tokenize_prompts(rows, tokenizer, config, name="eval_dataset")
    ends = ends_of_model(model, config) | {tokenizer.eos_token_id}
    open_end = unseen_turn_end(tokenizer, ends, config.stop_strings or [])
    notes += filter(None, [check_prompts(model, prompts, config), open_end])
    if dropped:
        notes += [f"{dropped} of {len(rows)} prompts have more than {config.max_prompt_length} tokens and are left out"]
    return Inputs(
        model=model, tokenizer=tokenizer, prompts=[], eval_prompts=prompts, rewards=rewards, given=config,
        config=config, device=device_of(config), notes=notes,
    )  # fmt: skip


def read_sampling_inputs(
    model: Any, reward_funcs: Any, dataset: Any, config: GRPOConfig, tokenizer: Any = None
) -> Inputs:
    """The inputs of completions that are sampled into a file: training rows, and rewards if there are any.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    found = read_data_inputs(model, reward_funcs, dataset, config, tokenizer, needs_weights=True)
    model, tokenizer, config = found.model, found.tokenizer, found.config
    ends = ends_of_model(model, config) | {tokenizer.eos_token_id}
    open_end = unseen_turn_end(tokenizer, ends, config.stop_strings or [])
    notes = [*found.notes, *filter(None, [check_prompts(model, found.prompts, config), open_end])]
    base, adapter = read_config(model, config), adapter_config(model, config)
    identity = identity_of(base, adapter, tokenizer, columns_of(found.prompts), found.rewards)
    plan, device = None, device_of(config)
    if config.vram_budget is not None:
        plan = plan_to_fit(base, config, adapter, max(len(prompt.ids) for prompt in found.prompts))
        config = plan.config
    return replace(found, notes=notes, identity=identity, device=device, plan=plan, config=config)


def read_data_inputs(
    model: Any, reward_funcs: Any, dataset: Any, config: GRPOConfig, tokenizer: Any = None, *,
    needs_weights: bool = False,
) -> Inputs:  # fmt: skip
    """The inputs of a look at training data: prompts and rewards, without folder and weights.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    model = expanded(model)
    rows, rewards, config = _rows_and_rewards(dataset, reward_funcs, config)
    find_model(model, config, needs_weights=needs_weights)
    if needs_weights:
        _refuse_lost_bases(rewards, model, config)
    notes = _try_out(rewards, rows, "train_dataset")
    tokenizer = tokenizer_of(tokenizer, model, config)
    prompts, dropped = tokenize_prompts(rows, tokenizer, config, teachers=config.teacher_system_prompt)
    notes += _left_out(dropped, "prompts", config)
    return Inputs(
        model=model, tokenizer=tokenizer, prompts=prompts, eval_prompts=[], rewards=rewards, given=config,
        config=config, device=torch.device("cpu"), notes=notes,
    )  # fmt: skip


def read_endpoint_inputs(model: Any, reward_funcs: Any, dataset: Any, config: GRPOConfig, tokenizer: Any) -> Inputs:
    """The inputs of completions that a model behind an endpoint writes: rows, and rewards if there are any.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    if not isinstance(model, str) or not model:
        raise InputError(f"model is {shown(model)}, and base_url is given; name the model as the server lists it")
    if tokenizer is not None:
        raise InputError("tokenizer is given, and a server behind base_url has its own; leave it out")
    rows, rewards, config = _rows_and_rewards(dataset, reward_funcs, config)
    for name, function in zip(rewards.names, map(inner_of, rewards.functions), strict=True):
        if hasattr(function, "bind"):
            raise InputError(
                f"{name} scores by a model that is sampled on this machine, and this one is behind base_url; leave it "
                "out, or sample first and score with another reward"
            )
        if _reads_ids(function):
            raise InputError(f"{name} reads completion_ids, and an endpoint gives texts alone; leave it out")
    prompts, num_texts, notes = chat_prompts(rows, config), sum(map(is_text, rows["prompt"])), []
    if num_texts:
        columns = {name: list(rows[name]) for name in rows.column_names}
        rows = Dataset.from_dict({**columns, "prompt": [prompt.text for prompt in prompts]})
        notes = [f"{num_texts} prompts are texts, which the endpoint is given as what a user says"]
    notes += _try_out(rewards, rows, "train_dataset")
    data = {**columns_of(prompts), "prompt": [prompt.text for prompt in prompts]}
    identity = {"endpoint": {"model": model}, **identity_of_data(data, rewards)}
    return Inputs(
        model=model, tokenizer=None, prompts=prompts, eval_prompts=[], rewards=rewards, given=config, config=config,
        device=torch.device("cpu"), notes=notes, identity=identity,
    )  # fmt: skip


def _reads_ids(function: Any) -> bool:
    """Tell whether a reward function names token ids among what it is called with."""
    try:
        return not {"completion_ids", "prompt_ids"}.isdisjoint(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of some functions in C
        return False


def _rows_and_rewards(dataset: Any, reward_funcs: Any, config: GRPOConfig) -> tuple[Dataset, RewardRunner, GRPOConfig]:
    """Training rows and what scores them, which may be nothing, with what a task says of them."""
    rewards = RewardRunner([])
    if reward_funcs is not None or find_task(dataset) is not None:
        dataset, _, reward_funcs, config = with_tasks(dataset, None, reward_funcs, config)
        rewards = _rewards(reward_funcs, config)
    return load_rows(dataset, config), rewards, config


def _left_out(dropped: int, what: str, config: DataFields) -> list[str]:
    return [f"{dropped} {what} have more than {config.max_prompt_length} tokens and are left out"] if dropped else []


def check_prompts(model: Any, prompts: list[Prompt], config: GRPOConfig, *, whose: str = "") -> str | None:
    """Say whether the longest sequence may have more tokens than the model was made for.

    Raises:
        InputError: one may have more tokens than a budget, or ids or positions that the model lacks.
    """
    longest = max(len(prompt.ids) for prompt in prompts) + config.max_completion_length
    for name in ("token_budget", "rollout_token_budget"):
        if longest > getattr(config, name):
            raise InputError(
                f"{whose}the longest prompt and its completion may have {longest} tokens, more than {name}="
                f"{getattr(config, name)}; raise it, or lower max_prompt_length or max_completion_length"
            )
    largest = max(max(prompt.ids) for prompt in prompts)
    num_ids = read_config(model, config).get_text_config().vocab_size
    if largest >= num_ids:
        raise InputError(
            f"the tokenizer makes id {largest}, and the model has {num_ids}; pass the tokenizer of the model"
        )
    return beyond_context(model, config, longest, f"{whose}the longest prompt and its completion")


def name_of(given: Any) -> Any:
    """A model or a dataset as its user named it, or in words: "12 rows in memory". Of several a list."""
    if given is None or isinstance(given, (str, Path)):
        return None if given is None else str(given)
    if isinstance(given, torch.nn.Module):
        base = getattr(getattr(given, "config", None), "_name_or_path", "")
        return f"{type(given).__name__} in memory{f', of {base}' if base else ''}"
    if isinstance(given, (list, tuple)) and not all(isinstance(one, Mapping) for one in given):
        return [name_of(one) for one in given]
    return f"{len(given)} rows in memory" if isinstance(given, Sized) else f"{type(given).__name__} in memory"


def expanded(model: Any) -> Any:
    """A path as a text without ~; anything else unchanged."""
    is_path = isinstance(model, Path) or (isinstance(model, str) and model.startswith("~"))
    return os.path.expanduser(model) if is_path else model


def callbacks_of(given: Any) -> list[Callable]:
    """The callbacks as a list. Raise InputError for one that could not be called after a step, or would do nothing."""
    callbacks = [given] if callable(given) or hasattr(given, TRANSFORMERS_EVENT) else [] if given is None else given
    if not isinstance(callbacks, list | tuple):
        raise InputError(f"callbacks={shown(given)} is neither a function nor a list of functions")
    for callback in callbacks:
        name = getattr(callback, "__name__", type(callback).__name__)
        if hasattr(callback, TRANSFORMERS_EVENT):
            raise InputError(
                f"callback {name} is one of transformers' Trainer, whose events do not occur here; pass a function of "
                "(step, metrics, policy)"
            )
        if not callable(callback):
            raise InputError(f"callbacks has {shown(callback)}, which is no function of (step, metrics, policy)")
        if isinstance(callback, type):
            raise InputError(f"callback {name} is a class; pass a function of (step, metrics, policy)")
        if any(is_one(called) for is_one in NOT_RUN for called in (callback, type(callback).__call__)):
            raise InputError(
                f"callback {name} is async or yields, and a call of it does nothing; make it a plain function"
            )
        try:
            inspect.signature(callback).bind(1, {}, None)
        except TypeError as error:
            raise InputError(f"callback {name} cannot be called with (step, metrics, policy): {error}") from error
        except ValueError:  # of some functions in C, whose arguments are not known
            pass
    return list(callbacks)


def _rewards(reward_funcs: Any, config: GRPOConfig) -> RewardRunner:
    if config.teacher is not None and reward_funcs == []:
        return RewardRunner([])
    functions: list[Callable] = resolve_reward_funcs(reward_funcs, BUILT_IN, BUILT_IN_FACTORIES)
    rewards = RewardRunner(functions, config.reward_timeout)
    if config.reward_weights is not None and len(config.reward_weights) != len(rewards.names):
        raise InputError(
            f"reward_weights has {len(config.reward_weights)} entries for {len(rewards.names)} reward functions"
        )
    return rewards


def _try_out(rewards: RewardRunner, rows: Dataset, name: str) -> list[str]:
    """Call each reward once on the first rows with made-up completions, and look for gold answers.

    Returns what to tell of rows without one. Raise InputError where a reward cannot work.
    """
    if not rewards.names:
        return []
    rewards.check_rows(rows, name)
    notes = _golds(rewards, rows, name) + _routes(rewards, rows, name)
    # The first two rows, and the first of each reward that is not for those.
    firsts = [index for one in rewards.functions for index in rows_for(one, rows)[:1]]
    trial = rows[sorted({*range(min(2, len(rows))), *firsts})]
    rewards.try_out(trial["prompt"], {key: values for key, values in trial.items() if key != "prompt"})
    return notes


def _golds(rewards: RewardRunner, rows: Dataset, name: str) -> list[str]:
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
            f"{', '.join(rows.column_names)}"
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
    told = f"{missing} of {len(own)} rows of {name} have no gold answer, for which {reader} gives no reward"
    return [told] if missing else []


def _routes(rewards: RewardRunner, rows: Dataset, name: str) -> list[str]:
    """Say which routed rewards are for no row, and how many rows have no reward at all."""
    told = []
    for one, function in zip(rewards.names, rewards.functions, strict=True):
        if isinstance(function, RoutedReward) and not rows_for(function, rows):
            told.append(f"{one} is for no row of {name}: none has {function.column} in {shown(function.values)}")
    without = kinds_of_rows(rewards.names, rewards.functions, rows)[()]
    if rewards.functions and without:
        told.append(f"{without} of {len(rows)} rows of {name} have no reward, and teach nothing")
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
