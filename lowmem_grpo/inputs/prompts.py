"""The inputs of what samples completions, checked before long work: models, prompts, rewards, folders, a plan."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedConfig

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import CriticFields, DataFields
from lowmem_grpo.data.chats import is_text
from lowmem_grpo.data.prompts import Prompt, chat_prompts, tokenize_prompts
from lowmem_grpo.data.rows import load_rows
from lowmem_grpo.distributed import main_first
from lowmem_grpo.errors import InputError, counted, shown
from lowmem_grpo.inputs.callbacks import callbacks_of
from lowmem_grpo.inputs.identity import (
    MODELS,
    columns_of,
    digest_of,
    files_of,
    files_of_teacher,
    identity_of_data,
    identity_of_tools,
    models_of,
    refuse_other_models,
    source_of_objective,
)
from lowmem_grpo.inputs.names import refuse_critic_init
from lowmem_grpo.inputs.rewards import (
    missing_golds,
    own_rewards,
    parameters_of,
    refuse_lost_bases,
    refuse_mixed_scales,
    refuse_without_rewards,
    runner_of,
    try_groups,
    try_out,
)
from lowmem_grpo.inputs.texts import unseen_columns
from lowmem_grpo.inputs.tools import resets_of, scenes_of, schemas_of, toolbox_of
from lowmem_grpo.inputs.training import (
    RunInputs,
    begin,
    evaluation_rows,
    left_out,
    name_of,
    refuse_other_config,
    settled,
    tokenizer_of,
    too_long,
)
from lowmem_grpo.lookup import is_adapter
from lowmem_grpo.model.adapter_folder import read_adapter_config
from lowmem_grpo.model.find import ends_of_model, find_model, read_config
from lowmem_grpo.model.load import load_tokenizer, run_device
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.teacher import FoundTeacher, Teacher, find_teacher, load_teacher, refuse_other_tokens
from lowmem_grpo.model.turn_end import named_ends, unseen_turn_end
from lowmem_grpo.objective.loss import try_out as try_out_objective
from lowmem_grpo.output.folder import read_state
from lowmem_grpo.paths import expanded
from lowmem_grpo.planner.plan import limit_memory
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.rewards.route import inner_of
from lowmem_grpo.tasks import find_task, held_out, with_tasks
from lowmem_grpo.tools.toolbox import Toolbox
from lowmem_grpo.update.critic import saved_config
from lowmem_grpo.warn import warn


@dataclass(frozen=True, kw_only=True)
class Inputs(RunInputs):
    """The inputs of a run that samples completions, checked, before any weights are read."""

    given: GRPOConfig
    config: GRPOConfig
    prompts: list[Prompt]
    eval_prompts: list[Prompt]  # empty where nothing is evaluated
    rewards: RewardRunner
    teacher: FoundTeacher | None = None
    toolbox: Toolbox | None = None  # what the policy may call

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
        self.identity[MODELS] = models_of(self.rewards)
        if self.resume is not None:
            refuse_other_models(self.resume, self.identity[MODELS])
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
    tokenizer: Any = None, callbacks: Any = (), tools: Any = None, environment_factory: Any = None,
) -> Inputs:  # fmt: skip
    """The inputs of train(), which documents them.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    refuse_other_config(config, GRPOConfig)
    callbacks = callbacks_of(callbacks)
    datasets = {"train": name_of(train_dataset), "eval": name_of(eval_dataset)}
    if train_dataset is None and environment_factory is not None:
        raise InputError(
            "train_dataset is missing; an environment that asks by itself is given rows, too: as many as an epoch has "
            'of {"prompt": [{"role": "user", "content": ""}], "seed": 0}, each with another seed'
        )
    toolbox = toolbox_of(tools, environment_factory, config)
    own = own_rewards(toolbox, config)
    train_dataset, eval_dataset, reward_funcs, config = with_tasks(
        train_dataset, eval_dataset, reward_funcs, config, needs_rewards=not own
    )
    if eval_dataset is not None and datasets["eval"] is None:
        datasets["eval"] = f"held out by {datasets['train']}"
    rewards, config = runner_of(reward_funcs, config, own)
    try_out_objective(config, run_device(config))
    run = begin(model, config, peft_config, tokenizer, callbacks, datasets)
    model, tokenizer = run.model, run.tokenizer
    rows, eval_rows = load_rows(train_dataset, config), evaluation_rows(eval_dataset, config, load_rows)
    _refuse_continued_base(model, config)
    refuse_lost_bases(rewards, model, config)
    refuse_without_rewards(rewards, config, eval_rows)
    refuse_mixed_scales(rewards, rows, config)
    teacher = find_teacher(model, config)
    if teacher is not None:
        refuse_other_tokens(teacher, model, tokenizer, config)
    run.notes.extend(try_out(rewards, rows, "train_dataset", config, toolbox))
    if eval_rows is not None:
        rewards.check_rows(eval_rows, "eval_dataset")
        run.notes.extend(missing_golds(rewards, eval_rows, "eval_dataset"))
        try_groups(rewards, eval_rows, "eval_dataset", config, toolbox, is_eval=True)
    described = schemas_of(toolbox, tokenizer, config)
    prompts, dropped = tokenize_prompts(
        rows, tokenizer, config, teachers=config.teacher_system_prompt, tools=described,
        scenes=scenes_of(toolbox, rows, "train_dataset"),
    )  # fmt: skip
    eval_prompts, eval_dropped = [], 0
    if eval_rows is not None:
        eval_prompts, eval_dropped = tokenize_prompts(
            eval_rows, tokenizer, config, name="eval_dataset", tools=described,
            scenes=scenes_of(toolbox, eval_rows, "eval_dataset"),
        )  # fmt: skip
    check_prompts(model, prompts + eval_prompts, config)
    more = {"objective": source_of_objective(config.loss_type), **identity_of_tools(toolbox)}
    if teacher is not None:
        theirs = [prompt.for_teacher for prompt in prompts]
        read_by = model if teacher.model is None else teacher.name
        check_prompts(read_by, theirs, config, whose="for the teacher, ")
        asked = digest_of(prompt.ids for prompt in theirs)
        more["teacher"] = {**files_of_teacher(teacher), "prompts": asked}
    run.notes.extend(_left_out(dropped, eval_dropped, config))
    if config.has_critic:
        more["critic_init"] = _files_of_critic(run, read_config(model, config))
    read = [*prompts, *eval_prompts, *(prompt.for_teacher for prompt in prompts)]
    longest = max(len(prompt.ids) for prompt in read)
    readers = [*rewards.functions, *resets_of(toolbox)]  # as a judge may need a context
    known = set().union(*map(parameters_of, readers))
    unseen = [column for column in unseen_columns(rows) if column not in known]
    run = settled(run, columns_of(prompts), longest, rewards, teacher, more)
    run = replace(run, num_dropped=dropped, unseen=unseen)
    inputs = Inputs(
        **vars(run), prompts=prompts, eval_prompts=eval_prompts, rewards=rewards, teacher=teacher, toolbox=toolbox,
    )  # fmt: skip
    if inputs.total_steps <= config.critic_warmup:
        raise InputError(
            f"critic_warmup={config.critic_warmup} leaves the policy none of the run's {inputs.total_steps} steps to "
            "learn in; lower critic_warmup"
        )
    rewards.max_steps = inputs.total_steps
    return inputs


def _refuse_continued_base(model: Any, config: GRPOConfig) -> None:
    """Raise InputError, or warn, where a KL to the base acts against an adapter that training goes on from."""
    if config.reference != "base" or not (isinstance(model, PeftModel) or is_adapter(model)):
        return
    if config.sync_ref_model:
        raise InputError("sync_ref_model follows the adapter that training starts from; set reference='initial'")
    if config.beta > 0:
        warn(
            "the KL draws the policy back to the base, away from the adapter that training goes on from; set "
            "reference='initial' to hold it near that adapter"
        )


def _files_of_critic(run: RunInputs, base: PreTrainedConfig) -> dict[str, str]:
    """SHA-256 of what a critic starts from, or where that is gone, what the checkpoint has of it.

    Raises:
        InputError: critic_init is no folder with a reward adapter.
    """
    name, config = run.config.critic_init, run.config
    if name == "policy":
        return {"weights": name}
    if run.resume is None or saved_config(run.resume) is None:
        _refuse_critic(base, config)
    else:
        saved = read_state(run.resume)
        if name != saved["config"]["critic_init"]:
            refuse_critic_init(config)
        elif not os.path.isdir(expanded(name)):
            return saved["identity"].get("critic_init", {})
    return {"weights": files_of(expanded(name))}


def _refuse_critic(base: PreTrainedConfig, config: CriticFields) -> None:
    """Raise InputError where critic_init is no folder with a reward adapter.

    One of another base, by its name, is told: as a reward it would be scored with that base, and a critic has none.
    """
    refuse_critic_init(config)
    trained_on = str(read_adapter_config(expanded(config.critic_init)).base_model_name_or_path)
    if os.path.realpath(trained_on) != os.path.realpath(base._name_or_path):
        warn(
            f"critic_init={shown(config.critic_init)} is an adapter of {shown(trained_on)}, and is put on "
            f"{shown(base._name_or_path)}, where its values mean nothing unless the two are one model"
        )


def read_evaluation_inputs(
    model: Any, reward_funcs: Any, dataset: Any, config: GRPOConfig, tools: Any = None, environment_factory: Any = None
) -> Inputs:
    """The inputs of an evaluation: a task's held-out rows, or a hub dataset's `test` split.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    if config.vram_budget is not None:
        raise InputError("vram_budget plans a training run; leave it out, and set rollout_token_budget if need be")
    model, task = expanded(model), find_task(dataset)
    toolbox = toolbox_of(tools, environment_factory, config)
    own = own_rewards(toolbox, config)
    _, _, reward_funcs, config = with_tasks(dataset, None, reward_funcs, config, needs_rewards=not own)
    rows = load_rows(dataset if task is None else held_out(task), config, name="eval_dataset", split="test")
    if config.dataset_take is not None:  # which is of what is trained on, where something is
        rows = rows.take(min(config.dataset_take, len(rows)))
    rewards, config = runner_of(reward_funcs, config, own)
    if not rewards.names:
        raise InputError("an evaluation needs reward_funcs, and a teacher is none; give one or several")
    find_model(model, config)
    refuse_lost_bases(rewards, model, config)
    notes = try_out(rewards, rows, "eval_dataset", config, toolbox, is_eval=True)
    tokenizer = load_tokenizer(model, config)
    prompts, dropped = tokenize_prompts(
        rows, tokenizer, config, name="eval_dataset", tools=schemas_of(toolbox, tokenizer, config),
        scenes=scenes_of(toolbox, rows, "eval_dataset"),
    )  # fmt: skip
    notes += [*_open_ends(model, tokenizer, prompts, config), *_left_out(0, dropped, config)]
    return Inputs(
        model=model, tokenizer=tokenizer, prompts=[], eval_prompts=prompts, rewards=rewards, given=config,
        config=config, device=run_device(config), notes=notes, toolbox=toolbox,
    )  # fmt: skip


def read_sampling_inputs(
    model: Any, reward_funcs: Any, dataset: Any, config: GRPOConfig, tokenizer: Any = None
) -> Inputs:
    """The inputs of completions that are sampled into a file: training rows, and rewards if there are any.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    found = read_data_inputs(model, reward_funcs, dataset, config, tokenizer, needs_weights=True)
    notes = [*found.notes, *_open_ends(found.model, found.tokenizer, found.prompts, found.config)]
    found = replace(found, notes=notes, device=run_device(found.config))
    longest = max(len(prompt.ids) for prompt in found.prompts)
    return settled(found, columns_of(found.prompts), longest, found.rewards)


def read_data_inputs(
    model: Any, reward_funcs: Any, dataset: Any, config: GRPOConfig, tokenizer: Any = None, *,
    needs_weights: bool = False, tools: Any = None, environment_factory: Any = None,
) -> Inputs:  # fmt: skip
    """The inputs of a look at training data: prompts and rewards, without folder and weights.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    model, toolbox = expanded(model), toolbox_of(tools, environment_factory, config)
    rows, rewards, config = _rows_and_rewards(dataset, reward_funcs, config, own_rewards(toolbox, config))
    find_model(model, config, needs_weights=needs_weights)
    if needs_weights:
        refuse_lost_bases(rewards, model, config)
    notes = try_out(rewards, rows, "train_dataset", config, toolbox)
    tokenizer = tokenizer_of(tokenizer, model, config)
    prompts, dropped = tokenize_prompts(
        rows, tokenizer, config, teachers=config.teacher_system_prompt, tools=schemas_of(toolbox, tokenizer, config),
        scenes=scenes_of(toolbox, rows, "train_dataset"),
    )  # fmt: skip
    notes += _left_out(dropped, 0, config)
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
        if parameters_of(function) & {"completion_ids", "prompt_ids"}:
            raise InputError(f"{name} reads completion_ids, and an endpoint gives texts alone; leave it out")
    prompts, num_texts, notes = chat_prompts(rows, config), sum(map(is_text, rows["prompt"])), []
    if num_texts:
        columns = {name: list(rows[name]) for name in rows.column_names}
        rows = Dataset.from_dict({**columns, "prompt": [prompt.text for prompt in prompts]})
        texts = counted(num_texts, "prompt is a text", "prompts are texts")
        notes = [f"{texts}, which the endpoint is given as what a user says"]
    notes += try_out(rewards, rows, "train_dataset", config)
    data = {**columns_of(prompts), "prompt": [prompt.text for prompt in prompts]}
    identity = {"endpoint": {"model": model}, **identity_of_data(data, rewards)}
    return Inputs(
        model=model, tokenizer=None, prompts=prompts, eval_prompts=[], rewards=rewards, given=config, config=config,
        device=torch.device("cpu"), notes=notes, identity=identity,
    )  # fmt: skip


def _rows_and_rewards(
    dataset: Any, reward_funcs: Any, config: GRPOConfig, own: Sequence[Callable] = ()
) -> tuple[Dataset, RewardRunner, GRPOConfig]:
    """Training rows and what scores them, which may be nothing, with what a task says of them."""
    rewards = RewardRunner([])
    if reward_funcs is not None or find_task(dataset) is not None or own:
        dataset, _, reward_funcs, config = with_tasks(dataset, None, reward_funcs, config, needs_rewards=not own)
        rewards, config = runner_of(reward_funcs, config, own)
    return load_rows(dataset, config), rewards, config


def _left_out(dropped: int, eval_dropped: int, config: DataFields) -> list[str]:
    return left_out(dropped, eval_dropped, "prompt", f"more than {config.max_prompt_length} tokens")


def _open_ends(model: Any, tokenizer: Any, prompts: list[Prompt], config: GRPOConfig) -> list[str]:
    """Sentences that say where completions may go on without an end, or beyond the model's context."""
    ends = ends_of_model(model, config) | named_ends(tokenizer)
    open_end = unseen_turn_end(tokenizer, ends, config.stop_strings or [])
    return [*filter(None, [check_prompts(model, prompts, config), open_end])]


def check_prompts(model: Any, prompts: list[Prompt], config: GRPOConfig, *, whose: str = "") -> str | None:
    """Say whether the longest sequence may have more tokens than the model was made for.

    Raises:
        InputError: one may have more tokens than a budget, or ids or positions that the model lacks.
    """
    has, remedy = (
        f"{whose}the longest prompt and its completion may have",
        "lower max_prompt_length or max_completion_length",
    )
    ids = [prompt.ids for prompt in prompts]
    return too_long(model, ids, config, has, remedy, added=config.max_completion_length)
