"""The inputs that every training has, and what is checked of them before any weights are read."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from transformers import set_seed

from lowmem_grpo.config.fields import refuse_changes
from lowmem_grpo.config.sections import ModelFields
from lowmem_grpo.config.training import TrainingConfig
from lowmem_grpo.determinism import prepare
from lowmem_grpo.distributed import is_main, take_from_main, world_size
from lowmem_grpo.errors import InputError, counted
from lowmem_grpo.inputs.identity import identity_of, refuse_another_run
from lowmem_grpo.inputs.names import refuse_without_evaluation
from lowmem_grpo.inputs.rewards import worn_by
from lowmem_grpo.lookup import look_up_model
from lowmem_grpo.model.chat_template import reading_texts
from lowmem_grpo.model.find import adapter_config, beyond_context, find_model, read_config
from lowmem_grpo.model.load import load_policy, load_tokenizer, run_device
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.teacher import FoundTeacher
from lowmem_grpo.output.folder import find_checkpoint, read_state, writable_folder
from lowmem_grpo.output.hub import check_upload, repository
from lowmem_grpo.output.lock import lock_folder
from lowmem_grpo.output.results import refuse_results
from lowmem_grpo.output.saved import read_object
from lowmem_grpo.output.trackers import tracker_names
from lowmem_grpo.paths import expanded
from lowmem_grpo.planner.plan import STEP_SIZES, Plan, limit_memory, plan_to_fit
from lowmem_grpo.rewards import RewardRunner

T = TypeVar("T", bound="RunInputs")
HEAD = "load_head_in_8bit"  # of what a plan chooses, this alone makes another model


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
    unseen: Sequence[str] = ()  # columns of the question that no prompt shows
    empty: Mapping[str, int] = field(default_factory=dict)  # by column, how many training rows have nothing there
    has_joined_words: bool = False  # of a prompt and what follows
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
            policy = load_policy(self.model, self.tokenizer, self.config, self.peft_config, is_found=True)
        take_from_main([*policy.parameters_of(policy.adapter).values()])  # a loaded model's may be random
        return policy


def refuse_other_config(config: Any, wanted: type) -> None:
    """Raise InputError where a configuration is none of ours for this training, but TRL's, say."""
    if not isinstance(config, wanted):
        kind = type(config)
        name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise InputError(f"config is a {name}; pass the {wanted.__name__} of lowmem_grpo")


def begin(
    model: Any, config: TrainingConfig, peft_config: Any, tokenizer: Any, callbacks: Sequence[Callable],
    datasets: dict[str, Any],
) -> RunInputs:  # fmt: skip
    """The inputs that every training has, with the output folder locked, the model found and its tokenizer read.

    Raises:
        InputError: the configuration cannot be saved, a tracker or the hub's token is missing, or the folder, the
            model or the tokenizer cannot be used.
    """
    model = expanded(model)
    output_dir, resume, notes = _folder(config)
    try:
        find_model(model, config, peft_config)
    except InputError as error:
        if resume is None or not _may_be_the_first_adapter(model, resume):
            raise
        raise InputError(
            f"{error}; if it was the adapter that the run began from, give {resume} as the model, which has all that "
            "is still read of it"
        ) from error
    device = run_device(config)
    if config.full_determinism and device.type == "cuda":
        prepare(device)
    return RunInputs(
        model=model, peft_config=peft_config, tokenizer=tokenizer_of(tokenizer, model, config), given=config,
        config=config, device=device, notes=notes, output_dir=output_dir, resume=resume,
        callbacks=callbacks, datasets=datasets,
    )  # fmt: skip


def _may_be_the_first_adapter(model: Any, resume: Path) -> bool:
    """Tell whether a model that is gone may be the adapter that a run began from."""
    base = read_object(resume / "adapter_config.json").get("base_model_name_or_path")
    return isinstance(model, str) and not os.path.exists(model) and model != base


def _folder(config: TrainingConfig) -> tuple[Path, Path | None, list[str]]:
    """The output folder, locked; the checkpoint to go on from, if there is one; and what to tell of that."""
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
        check_upload(repository(config.hub_model_id, Path(expanded(config.output_dir))))
    output_dir = writable_folder(config.output_dir)
    if is_main():
        lock_folder(output_dir)
    resume = find_checkpoint(output_dir, config.resume_from_checkpoint)
    refuse_results(output_dir, resume, begin_anew=config.resume_from_checkpoint == "auto")
    if resume is None:
        return output_dir, None, []
    changed = refuse_changes(config, read_state(resume)["config"])
    return output_dir, resume, [f"going on from {resume}, with {', '.join(changed)}"] if changed else []


def evaluation_rows(given: Any, config: TrainingConfig, read: Callable[..., Dataset]) -> Dataset | None:
    """The rows that are held out, by read_rows() or load_rows(); None where there are none.

    Raises:
        InputError: they cannot be read, or a setting of evaluations has nothing to evaluate on.
    """
    if given is not None:
        return read(given, config, name="eval_dataset", split="test")
    refuse_without_evaluation(config)
    return None


def left_out(dropped: int, eval_dropped: int, what: str, size: str) -> list[str]:
    """Sentences that say how many rows are too long: "3 prompts are left out, with more than 512 tokens"."""
    counts = {what: dropped, f"evaluation {what}": eval_dropped}
    told = [counted(count, f"{which} is", f"{which}s are") for which, count in counts.items() if count]
    return [f"{words} left out, with {size}" for words in told]


def too_long(
    model: Any, sequences: list[list[int]], config: TrainingConfig, has: str, remedy: str, *, added: int = 0
) -> str | None:  # fmt: skip
    """Say whether the longest sequence, and `added` tokens after it, has more than the model was made for.

    Raises:
        InputError: it has more tokens than a budget, or ids or positions that the model lacks.
    """
    longest = max(map(len, sequences)) + added
    for name in ("token_budget", "rollout_token_budget"):
        budget = getattr(config, name, longest)
        if longest > budget:
            raise InputError(f"{has} {longest} tokens, more than {name}={budget}; raise it, or {remedy}")
    largest, num_ids = max(map(max, sequences)), read_config(model, config).get_text_config().vocab_size
    if largest >= num_ids:
        raise InputError(
            f"the tokenizer makes id {largest}, and the model has {num_ids}; pass the tokenizer of the model"
        )
    return beyond_context(model, config, longest, has, remedy)


def settled(
    run: T, data: Mapping[str, Iterable[Any]], longest: int, rewards: RewardRunner | None = None,
    teacher: FoundTeacher | None = None, more: Mapping[str, Any] | None = None,
) -> T:  # fmt: skip
    """The inputs with what a resumed run must share, compared with the checkpoint, and with the plan of its memory.

    `data` is by name what is trained on, row by row; `longest` the most tokens of a row; `more` is identity, too.

    Raises:
        InputError: the checkpoint is of another run, or nothing fits vram_budget.
    """
    base, adapter = read_config(run.model, run.config), adapter_config(run.model, run.config, run.peft_config)
    identity = {**identity_of(base, adapter, run.tokenizer, data, rewards), **(more or {})}
    if run.resume is not None:
        refuse_another_run(run.resume, identity)
    if run.config.vram_budget is None:
        return replace(run, identity=identity)
    worn = worn_by(base, rewards.functions) if rewards else []
    plan = plan_to_fit(base, run.config, adapter, longest, [one.config for one in worn], teacher)
    for one in worn:
        one.budget.num_tokens = min(one.budget.num_tokens, plan.config.token_budget)
    identity[HEAD] = plan.config.load_head_in_8bit
    if run.resume is not None and read_state(run.resume)["identity"].get(HEAD, identity[HEAD]) != identity[HEAD]:
        raise InputError(
            f"the plan for vram_budget={run.config.vram_budget} has {HEAD}={identity[HEAD]}, and that of the run to "
            "resume had not; resume with as many processes and the settings of memory that it had, or start a new run "
            "from the adapter"
        )
    return replace(run, identity=identity, plan=plan, config=plan.config)


def tokenizer_of(tokenizer: Any, model: Any, config: ModelFields) -> Any:
    """The tokenizer that is given or named, or the model's. Raise InputError for what is none."""
    tokenizer = expanded(tokenizer)
    if tokenizer is None or isinstance(tokenizer, str):
        if tokenizer and not os.path.isdir(tokenizer):
            look_up_model(tokenizer, what="tokenizer")
        if tokenizer:
            return load_tokenizer(tokenizer, replace(config, model_init_kwargs=None))  # which are of the model
        return load_tokenizer(model, config)
    if not hasattr(tokenizer, "chat_template"):
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__}; pass one that transformers loads, or its hub id or folder"
        )
    return reading_texts(tokenizer)


def name_of(given: Any) -> Any:
    """A model or a dataset as its user named it, or in words: "12 rows in memory". Of several a list."""
    if given is None or isinstance(given, (str, Path)):
        return None if given is None else str(given)
    if isinstance(given, torch.nn.Module):
        base = getattr(getattr(given, "config", None), "_name_or_path", "")
        return f"{type(given).__name__} in memory{f', of {base}' if base else ''}"
    if isinstance(given, (list, tuple)) and not all(isinstance(one, Mapping) for one in given):
        return [name_of(one) for one in given]
    held = counted(len(given), "row") if isinstance(given, Sized) else type(given).__name__
    return f"{held} in memory"
