"""The identity of a run, as a checkpoint keeps it: model, adapter, tokenizer, data and rewards.

Models are known by what they hold, and not by their names. No large file is read for that: of a loaded model a few
numbers of each weight are hashed, of a teacher and what a critic starts from some blocks of each file.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Params4bit
from peft import PeftConfig
from transformers import PreTrainedConfig

from lowmem_grpo.config.sections import OWN_BASE
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs.sources import sources_used_by
from lowmem_grpo.lookup import is_adapter
from lowmem_grpo.model.adapter_folder import read_adapter_config
from lowmem_grpo.model.experts import packed_codes
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.teacher import FoundTeacher
from lowmem_grpo.objective.loss import LOSSES
from lowmem_grpo.output.folder import read_state
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.rewards.reward_adapter import AdapterReward
from lowmem_grpo.rewards.route import RoutedReward, inner_of
from lowmem_grpo.tools.toolbox import Toolbox
from lowmem_grpo.warn import warn

# Of a model's configuration, what says how it is stored or run. So do names that begin with _ or speak of dropout,
# which a base does not have here.
NOT_THE_MODEL = {
    "transformers_version", "architectures", "dtype", "torch_dtype", "quantization_config", "use_cache", "auto_map",
}  # fmt: skip
# Of an adapter's configuration, what its tensors do not show.
OF_THE_ADAPTER = (
    "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "fan_in_fan_out", "alpha_pattern", "rank_pattern", "bias",
)  # fmt: skip
EXACT = "exact"  # of weights, those that are not in 4 bits
DIFFERS = {
    "model": "settings of the model",
    "adapter": "settings of the adapter",
    "tokenizer": "settings of the tokenizer",
}
MODELS = "reward models"
ALWAYS = ("model", "adapter", "tokenizer", "data", "rewards", "sources")  # what else there is, older checkpoints lack
NUM_SAMPLES = 64  # numbers of each weight of the base, from its beginning to its end
BLOCKS, BLOCK_BYTES = 64, 4096  # of a file of weights, from its beginning to its end


def identity_of(
    model: PreTrainedConfig, adapter: PeftConfig, tokenizer: Any, data: Mapping[str, Iterable[Any]],
    rewards: RewardRunner | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Model, adapter, tokenizer, data and rewards of a run, as JSON: settings in words, all else as SHA-256.

    The data is by the name of a column its values, row by row.
    """
    identity = {
        "model": _of_the_model(model.to_dict()),
        "adapter": _of_the_adapter(adapter),
        "tokenizer": _of_the_tokenizer(tokenizer),
    }
    return _as_json(identity) | identity_of_data(data, rewards)


def identity_of_data(data: Mapping[str, Iterable[Any]], rewards: RewardRunner | None = None) -> dict[str, Any]:
    """Data and rewards of a run, as identity_of() has them."""
    functions = dict(zip(rewards.names, rewards.functions, strict=True)) if rewards else {}
    identity = {
        "data": {name: digest_of(values) for name, values in data.items()},
        "rewards": {name: _settings(one) if _is_ours(one) else None for name, one in functions.items()},
        "sources": {name: _of_the_users(function) for name, function in functions.items()},
        "helpers": {name: _helpers(function) for name, function in functions.items()},
    }
    return _as_json(identity)


def source_of_objective(name: str) -> dict[str, Any]:
    """SHA-256 of the sources of a registered objective, by the name of its loss_type; nothing for a built-in one."""
    function = LOSSES[name].token_losses
    return {} if _is_ours(function) else {name: [_of_the_users(function), _helpers(function)]}


def identity_of_tools(toolbox: Toolbox | None) -> dict[str, Any]:
    """Descriptions and sources of tools and environments, as SHA-256 by their names."""
    if toolbox is None:
        return {}
    found = {
        "tools": {schema["function"]["name"]: digest_of([schema]) for schema in toolbox.schemas},
        "tool_sources": {name: [_of_the_users(one), _helpers(one)] for name, one in toolbox.functions.items()},
    }
    if toolbox.environments is not None:
        kinds = toolbox.environments.kinds
        found["tools"] |= {
            f"{name or kind.name}, an environment,": digest_of(kind.schemas) for name, kind in kinds.items()
        }
        found["environment_sources"] = {
            name or kind.name: [_of_a_maker(kind.factory), _helpers(kind.factory), _helpers(kind.type)]
            for name, kind in kinds.items()
        }
    return found


def models_of(rewards: RewardRunner) -> dict[str, Any]:
    """The models that give rewards: their weights, settings and tokenizers, and those of their adapters.

    A reward adapter is asked once it is bound to a policy: of one that is worn, the model and the tokenizer are the
    policy's.
    """
    found: dict[str, Any] = {}
    for name, function in zip(rewards.names, map(inner_of, rewards.functions), strict=True):
        scores = function.model if isinstance(function, AdapterReward) else function
        scorer = getattr(scores, "scorer", None) if _is_ours(function) else None
        parts: dict[str, Any] = {}
        if scorer is not None:
            weights = {f"weights, {kind}": digest for kind, digest in _samples(scorer.named_parameters()).items()}
            parts = {**_of_the_model(scorer.config.to_dict()), **_of_the_tokenizer(scores.tokenizer), **weights}
            parts["part"] = scores.part
        worn = {"": function.config} if isinstance(function, AdapterReward) else getattr(scorer, "peft_config", {})
        for adapter in worn.values():
            parts |= _of_the_adapter(adapter)
        found |= {f"{name}: {part}": value for part, value in parts.items()}
    return _as_json(found)


def _wherever(settings: Any) -> Any:
    """Settings of a reward without the name or folder of a model, which is compared by what it holds."""
    if isinstance(settings, list):  # a routed reward's
        return [_wherever(one) for one in settings]
    is_model = isinstance(settings, dict) and "scorer" in settings
    return {of: value for of, value in settings.items() if of != "name"} if is_model else settings


def files_of_teacher(found: FoundTeacher) -> dict[str, str]:
    """SHA-256 of a teacher's weights by files_of(), and of an own base's below an adapter."""
    revision = str(getattr(found.model, "_commit_hash", None))
    names = {"weights": "" if found.name == OWN_BASE else found.name}
    if found.model is not None and is_adapter(found.name):
        names["weights of its base"] = str(read_adapter_config(found.name).base_model_name_or_path)
    return {what: files_of(name, revision) for what, name in names.items()}


def files_of(name: str, revision: str = "") -> str:
    """SHA-256 of a model's or an adapter's folder: names, sizes and some blocks of each file of weights or settings.

    Of a model on the hub it is the revision's name.
    """
    digest, folder = hashlib.sha256(revision.encode()), Path(name)
    for path in sorted(folder.iterdir()) if name and folder.is_dir() else ():
        if path.suffix in (".safetensors", ".bin") or path.name in ("config.json", "adapter_config.json"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for place in range(0, size, max(BLOCK_BYTES, size // BLOCKS)):
                    file.seek(place)
                    digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The prompts' ids and all of their columns, each row by row."""
    names = sorted({name for prompt in prompts for name in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    return {"prompt": [prompt.ids for prompt in prompts], **columns}


def refuse_another_run(resume: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a run that is not the one of a checkpoint, and warn of rewards that have changed.

    Raises:
        InputError: model, adapter, tokenizer, data or rewards are others, in a sentence that names what differs.
    """
    saved = read_state(resume)["identity"]
    for name in [one for one in ALWAYS if one in identity]:
        if not isinstance(saved.get(name), dict):
            raise InputError(f"{resume} does not say of which {name} it is; resume from an older checkpoint")
    if list(saved["rewards"]) != list(identity["rewards"]):
        raise InputError(
            f"{resume} is of a run with the rewards {', '.join(saved['rewards'])}, and these are "
            f"{', '.join(identity['rewards'])}; resume with the same ones, or start a new run from the adapter"
        )
    for name in ("rewards", "model", "adapter"):
        now, before = identity.get(name, {}), saved.get(name, {})
        if name == "rewards" and MODELS in saved:
            now, before = ({one: _wherever(of) for one, of in each.items()} for each in (now, before))
        for changed in _changed(now, before, both=True):  # later versions of transformers and PEFT may know more
            raise InputError(
                f"{resume} is of a run with another {name.removesuffix('s')}: {changed} is {now[changed]!s:.200}, "
                f"and was {before[changed]!s:.200}; resume with that one, or start a new run from the adapter"
            )
    for changed in _changed(identity["tokenizer"], saved["tokenizer"]):
        raise InputError(f"{resume} is of a run with another tokenizer: its {changed} differs; resume with that one")
    for whose in ("teacher", "critic_init"):
        for changed in _changed(identity.get(whose, {}), saved.get(whose, {}), both=True):
            raise InputError(
                f"{resume} is of a run with another {whose}, of other {changed}; resume with that one, or start a new "
                "run from the adapter"
            )
    for changed in _changed(identity.get("tools", {}), saved.get("tools", {})):
        raise InputError(
            f"{resume} is of a run with other tools: {changed} is not in both, or is described otherwise; resume with "
            "the same ones, or start a new run from the adapter"
        )
    others = _changed(identity["data"], saved["data"])
    if others:
        differ = "prompts" if "prompt" in others else f"values in {' and '.join(others)}"
        raise InputError(f"{resume} is of a run on other {differ}; resume with its train_dataset and tokenizer")
    others = [*_changed(identity["sources"], saved["sources"], both=True)]
    others += _changed(identity["helpers"], saved.get("helpers", {}), both=True)
    for changed in dict.fromkeys(others):
        warn(
            f"the reward {changed} has other source code or settings than in {resume}; start a new run if its values "
            "are others"
        )
    for what in ("tool", "environment"):
        sources = f"{what}_sources"
        for changed in _changed(identity.get(sources, {}), saved.get(sources, {}), both=True):
            words = f"the {what} {changed} has other source code than in {resume}"
            warn(f"{words}; start a new run if its results are others")
    for changed in _changed(identity.get("objective", {}), saved.get("objective", {}), both=True):
        warn(
            f"the objective {changed} has other source code or settings than in {resume}; start a new run if its "
            "losses are others"
        )


def refuse_other_ends(resume: Path, ids: Sequence[int]) -> None:
    """Raise InputError where other tokens ended the completions of a checkpoint's run."""
    before = read_state(resume)["identity"].get("ends", ids)
    if before != ids:
        raise InputError(
            f"{resume} is of a run with another model: the ids that end a completion are {ids}, and were "
            f"{before!s:.200}; resume with its generation_config.json, or start a new run from the adapter"
        )


def refuse_other_weights(resume: Path, weights: Mapping[str, str]) -> None:
    """Raise InputError where the base of a checkpoint's run had other weights; compares what both have read."""
    saved = read_state(resume)["identity"].get("weights")
    if not isinstance(saved, dict) or EXACT not in saved or _changed(weights, saved, both=True):
        raise InputError(
            f"{resume} is of a run with another model: the weights of its base differ; resume with that one, or start "
            "a new run from the adapter"
        )


def refuse_other_models(resume: Path, models: Mapping[str, Any]) -> None:
    """Raise InputError where a model that gave rewards in a checkpoint's run was another, by models_of()."""
    for changed in _changed(models, read_state(resume)["identity"].get(MODELS, {}), both=True):
        raise InputError(
            f"{resume} is of a run with another reward model, by what it has of {changed}; resume with that one, or "
            "start a new run from the adapter"
        )


def first_difference(now: Mapping[str, Any], before: Mapping[str, Any]) -> str | None:
    """Name the first difference of two identities, as `settings of the model (vocab_size)`, or None."""
    for name in now:
        # Later versions of transformers and PEFT may know more of a model or an adapter.
        found = _changed(now[name], before.get(name) or {}, both=name in ("model", "adapter") or name not in ALWAYS)
        if found:
            return f"{DIFFERS.get(name, name)} ({', '.join(found)})"
    return None


def adapter_weights_of(policy: Policy) -> str:
    """SHA-256 of every number of the adapter that the policy wears."""
    numbers = [one.detach().flatten().contiguous() for one in policy.parameters_of(policy.adapter).values()]
    return _sha256(torch.cat([one.view(torch.uint8).cpu() for one in numbers]))


def weights_of(policy: Policy) -> dict[str, str]:
    """SHA-256 of a few numbers of each weight of the base, which takes 4 ms for a model of 0.5B.

    Weights in 4 bits are a digest apart, by kind of device, since two may round a tie differently.
    """
    weights = (*policy.base.named_parameters(), *packed_codes(policy.base))
    adapters = set(policy.model.peft_config)
    return _samples((name, parameter) for name, parameter in weights if not adapters & set(name.split(".")))


def _samples(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    samples: dict[str, list[torch.Tensor]] = {}
    for _, parameter in weights:
        in_4bit = parameter.dtype == torch.uint8
        kind = f"in 4 bits on {parameter.device.type}" if in_4bit or isinstance(parameter, Params4bit) else EXACT
        numbers = parameter.detach().flatten()
        sample = numbers[:: max(1, len(numbers) // NUM_SAMPLES)].contiguous()
        samples.setdefault(kind, []).append(sample.view(torch.uint8))
    return {kind: _sha256(torch.cat([one.cpu() for one in of_kind])) for kind, of_kind in samples.items()}


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _of_the_adapter(config: PeftConfig) -> dict[str, Any]:
    """The settings of an adapter that its tensors do not show."""
    return {name: getattr(config, name, None) for name in OF_THE_ADAPTER}


def _of_the_tokenizer(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocabulary": digest_of([sorted(tokenizer.get_vocab().items())]),
        "end of sequence": tokenizer.eos_token_id,
        "chat template": digest_of([tokenizer.chat_template]),
    }


def _of_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model's configuration, and of those within, that decide what it computes."""
    kept = {
        str(name): value
        for name, value in config.items()
        if name not in NOT_THE_MODEL and not str(name).startswith("_") and "drop" not in str(name)
    }
    return {name: _of_the_model(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _settings(function: Callable) -> Any:
    """The settings of a reward function: a partial's arguments, a closure's variables, an object's attributes."""
    if isinstance(function, RoutedReward):
        return [
            function.column,
            _plain(function.values),
            getattr(function.inner, "__name__", None),
            _settings(function.inner),
        ]
    if isinstance(function, AdapterReward):
        return _plain(function.settings)
    if isinstance(function, partial):
        named = [_plain(function.keywords)] if function.keywords else []
        return [*map(_plain, function.args), *named, *([] if _is_ours(function) else [_settings(function.func)])]
    if inspect.ismethod(function) and not _is_ours(function):
        return _settings_of(function.__self__)
    if inspect.isroutine(function):
        return _plain(inspect.getclosurevars(function).nonlocals)
    return _settings_of(function)


def _settings_of(one: Any) -> Any:
    """The attributes of an object that are texts or numbers."""
    return _plain({name: value for name, value in vars(one).items() if isinstance(value, (str, int, float))})


def _plain(value: Any) -> Any:
    """A setting as JSON; of what a process has by itself, such as a pool of workers, the type's name."""
    if isinstance(value, re.Pattern):
        return [value.pattern, value.flags]
    if dataclasses.is_dataclass(value):
        return _plain(vars(value))
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in sorted(value.items())}
    return value if value is None or isinstance(value, (str, int, float)) else type(value).__name__


def _of_the_users(function: Callable) -> str | None:
    """SHA-256 of the source code and of the settings of a user's function; None for a built-in one."""
    if _is_ours(function):
        return None
    source = settings = None
    with contextlib.suppress(OSError, TypeError):  # Python has no source code of it
        source = inspect.getsource(_innermost(function))
    with contextlib.suppress(Exception):  # of the user's own classes, or of a value within itself
        settings = _settings(function)
    return digest_of([source, settings])


def _of_a_maker(function: Callable) -> str | None:
    """SHA-256 as _of_the_users() has it; None for a class, whose numbers may be counters, and source a helper's."""
    return None if inspect.isclass(function) else _of_the_users(function)


def _helpers(function: Callable) -> str | None:
    """SHA-256 of the sources of what a user's function uses; None for a built-in one."""
    return None if _is_ours(function) else digest_of(sources_used_by(inner_of(function)))


def _is_ours(function: Callable) -> bool:
    return str(getattr(_innermost(function), "__module__", "")).startswith("lowmem_grpo.")


def _innermost(function: Callable) -> Any:
    """The function or class that has the source code of a partial, a routed or decorated function or an object."""
    function = inner_of(function)
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if inspect.isroutine(function) else type(function)


def _changed(now: Mapping[str, Any], before: Mapping[str, Any], *, both: bool = False) -> list[str]:
    """The names whose values differ; without `both`, also those that one of the two lacks."""
    names = [name for name in now if name in before] if both else [*now, *(name for name in before if name not in now)]
    return [name for name in names if name not in now or name not in before or now[name] != before[name]]


def digest_of(values: Iterable[Any]) -> str:
    """SHA-256 of values as JSON, in their order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
