"""A command's inputs and settings: what they are, and how flags and a YAML file give them."""

import contextlib
import json
from typing import Any

from lowmem_grpo.config.fields import from_text
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.config.sections import CALLED
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.config.trl import known_fields
from lowmem_grpo.errors import InputError, shown

TRAININGS: dict[str, type] = {"train": GRPOConfig, "sft": SFTConfig, "reward": RewardConfig}  # the commands that train
PLANNED = {**TRAININGS, "sample": SampleConfig}  # what can be planned
ONLY_DATASET = {"eval": "evaluate on", "data": "look at", "sample": "ask"}  # by command, what --dataset is for
INPUTS = (
    ("model", ("--model_name_or_path",), "hub id, model folder, or adapter folder to continue from"),
    (
        "dataset",
        ("--dataset_name", "--train_dataset"),
        "hub id, JSONL, JSON, CSV or Parquet file, or a task: gsm8k, countdown, reasoning_gym:NAME",
    ),
    (
        "eval_dataset",
        (),
        "hub id (its test split is read), file or task to evaluate on; by default what the task of --dataset holds out",
    ),
    (
        "reward_funcs",
        (),
        "one or more: accuracy_reward, get_regex_reward(pattern='...'), my_module.function; by default the task's own",
    ),
    ("tools", (), "one or more that the model may call: python (programs in a sandbox), my_module.function"),
    ("environment_factory", (), "my_module.Class, of which each completion has an instance whose methods are tools"),
)

OF_EXAMPLES = (
    INPUTS[0],
    (
        "dataset",
        INPUTS[1][1],
        "hub id, JSONL, JSON, CSV or Parquet file, or several; with prompt and completion, messages or text",
    ),
    ("eval_dataset", (), "hub id (its test split is read) or file of examples to measure the loss of"),
)

OF_PAIRS = (
    INPUTS[0],
    ("dataset", INPUTS[1][1], "hub id, JSONL, JSON, CSV or Parquet file, with chosen, rejected and perhaps a prompt"),
    ("eval_dataset", (), "hub id (its test split is read) or file of pairs to measure the accuracy on"),
)

OF_EVALUATION = [one for one in INPUTS if one[0] != "eval_dataset"]
OF_SAMPLING = [one for one in OF_EVALUATION if one[0] not in CALLED]


def read_settings(
    given: dict[str, Any],
    needed: tuple[str, ...] = ("model", "dataset"),
    command: str = "train",
    config: type = GRPOConfig,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and config fields from the flags and the YAML file that --config names; flags win.

    Raises:
        InputError: an unreadable file, an unknown name, a value that does not fit, or a missing input.
    """
    flags = dict(given)
    settings = read_config_file(flags.pop("config")) if "config" in flags else {}
    settings |= {name: as_list(value) for name, value in flags.items()}
    inputs = {name: settings.pop(name) for name, _, _ in INPUTS if name in settings}
    settings = known_fields(settings, config)
    for name in needed:
        if not inputs.get(name):
            raise InputError(f"--{name} is missing; see `lowmem-grpo {command} --help`")
    if "eval_dataset" in inputs and command in ("eval", "sample"):
        raise InputError(f"--eval_dataset is for training; name what to {ONLY_DATASET[command]} with --dataset")
    for name in [one for one in CALLED if one in inputs and command == "sample"]:
        raise InputError(f"{name} is for `lowmem-grpo train`, `eval` and `data`; sampling into a file has none")
    return inputs, {name: from_text(config, name, value) for name, value in settings.items()}


def as_list(value: Any) -> Any:
    """A flag's values, or where the only one is a list in JSON, as '["a", "b"]', what that holds."""
    if isinstance(value, list) and len(value) == 1 and value[0].startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value[0])
    return value


def read_config_file(path: str) -> dict[str, Any]:
    """The settings of a YAML file, under the names of the fields and INPUTS.

    Raises:
        InputError: a file that cannot be read, or one that says something twice.
    """
    from lowmem_grpo.settings_file import read_settings_file

    aliases = {alias[2:]: name for name, names, _ in INPUTS for alias in names}
    settings: dict[str, Any] = {}
    for written, value in read_settings_file(path).items():
        name = written.replace("-", "_")
        name = aliases.get(name, name)
        if name in settings:
            raise InputError(f"config file {shown(path)} gives {name} twice, by two names; keep one")
        if name == "config":
            raise InputError(f"config file {shown(path)} names another config; write its settings into one file")
        settings[name] = value
    return settings


def count_of(given: dict[str, Any], flag: str, what: str, default: int) -> int:
    """Take a flag with a count out of what is given."""
    text = given.pop(flag, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise InputError(f"--{flag} takes a number of {what}, such as 5, and not {shown(text)}")
    return int(text)


def output_of(given: dict[str, Any], command: str) -> str:
    """Take --output out of what is given."""
    if not given.get("output"):
        raise InputError(f"--output is missing; see `lowmem-grpo {command} --help`")
    return given.pop("output")
