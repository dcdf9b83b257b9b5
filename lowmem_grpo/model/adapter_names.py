"""An adapter's names in its file: those of the class that its base was saved by.

Qwen3.5 is saved as a model of text and images, whose layers are at "model.language_model.layers", and its text alone,
which is trained here, has them at "model.layers". PEFT and vLLM load by the former. Towers are set aside here and not
there, so the file's settings leave them out.
"""

import contextlib
import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lowmem_grpo.errors import InputError
from lowmem_grpo.model.adapters import add_adapter
from lowmem_grpo.model.towers import beside_the_decoder, decoder_path, within

PREFIX = "base_model.model."  # of every name in an adapter's file
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
LORA = re.compile(r"(.+)\.lora_(?:A|B|embedding_A|embedding_B)(?:\.weight)?")


class AdapterNames(NamedTuple):
    """The decoder's place in our model, and in one of the class that the base was saved by."""

    here: str = ""  # such as "model"
    there: str = ""  # such as "model.language_model"
    beside: str = ""  # a regular expression of what is set aside there; empty where nothing is

    def to_file(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's tensors by the names that they have in its file."""
        return _moved(weights, self.here, self.there)

    def from_file(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter's file by the names that they have here; what has those already keeps them."""
        return _moved(weights, self.there, self.here)

    def is_beside(self, name: str) -> bool:
        """Tell whether a tensor of an adapter's file is of a module that is set aside."""
        return bool(self.beside) and re.fullmatch(self.beside, name.removeprefix(PREFIX)) is not None

    def key_mapping(self) -> dict[str, str]:
        """The moves of from_file() as PEFT's loading takes them: regular expressions of names without PREFIX."""
        return {rf"^{re.escape(self.there)}\.": f"{self.here}."} if self.there != self.here else {}

    def settings(self, given: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fields of an adapter's configuration that differ in its file.

        Modules are named from the decoder on, so that they are found wherever that is.
        """
        changed: dict[str, Any] = {}
        if self.here != self.there:
            targets = given.get("target_modules")
            if isinstance(targets, str):  # a regular expression of our names
                found = (LORA.fullmatch(name) for name in weights)
                targets = {one[1].removeprefix(PREFIX) for one in found if one}
            changed["target_modules"] = sorted(map(self._from_the_decoder, targets or ()))
            for patterns in ("rank_pattern", "alpha_pattern"):
                changed[patterns] = {self._from_the_decoder(k): v for k, v in (given.get(patterns) or {}).items()}
        if self.beside:
            changed["exclude_modules"] = self._with_towers(given.get("exclude_modules"))
        return changed

    def _from_the_decoder(self, path: str) -> str:
        return path.removeprefix(f"{self.here}.")

    def _with_towers(self, given: Any) -> str:
        """An exclude_modules with what is set aside."""
        if given and not isinstance(given, str):
            given = rf"(?:.*\.)?(?:{'|'.join(re.escape(self._from_the_decoder(one)) for one in sorted(given))})"
        return given if given and given.endswith(self.beside) else "|".join(filter(None, [given, self.beside]))

    def write(self, folder: Path) -> None:
        """Give the adapter that PEFT has saved in a folder the names and settings of its file."""
        settings = json.loads((folder / SETTINGS).read_bytes())
        weights = load_file(folder / WEIGHTS)
        changed = self.settings(settings, weights)
        if self.here != self.there:
            save_file(self.to_file(weights), folder / WEIGHTS, metadata={"format": "pt"})
        if changed:
            (folder / SETTINGS).write_text(json.dumps({**settings, **changed}, indent=2, sort_keys=True), "utf-8")


def _moved(weights: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    before, after = f"{PREFIX}{source}.", f"{PREFIX}{target}."
    moves = source != target
    return {after + k.removeprefix(before) if moves and k.startswith(before) else k: v for k, v in weights.items()}


def saved_config(base: Any) -> PreTrainedConfig:
    """The configuration in the files that a loaded model comes from, or its own where they are not here."""
    with contextlib.suppress(Exception):  # of no such folder, or of one with code of its own
        if base.name_or_path:
            return AutoConfig.from_pretrained(base.name_or_path, local_files_only=True)
    return base.config


def names_of(base: Any, saved: PreTrainedConfig) -> AdapterNames:
    """The names that adapters of a model have in their files, as its own files' configuration says."""
    whole = _saved_as(base, saved)
    if whole is None:
        return AdapterNames()
    beside = beside_the_decoder(whole)
    return AdapterNames(decoder_path(base), decoder_path(whole), within(beside) if beside else "")


def refuse_lost_targets(names: AdapterNames, model: PeftModel, adapter: str, saved: PreTrainedConfig) -> None:
    """Raise InputError where PEFT would give other layers the adapter in the class that the base was saved by."""
    base: Any = model.get_base_model()
    if names.here == names.there:
        return
    whole = _saved_as(base, saved)
    config, state = copy.copy(model.peft_config[adapter]), get_peft_model_state_dict(model, adapter_name=adapter)
    vars(config).update(names.settings(vars(config), state), init_lora_weights=True, base_model_name_or_path=None)
    with torch.device("meta"), torch.random.fork_rng([]):
        there = get_peft_model_state_dict(add_adapter(whole.requires_grad_(False), config))
    if {k: v.shape for k, v in there.items()} != {k: v.shape for k, v in names.to_file(state).items()}:
        raise InputError(
            f"target_modules or rank_pattern of the adapter would match other layers in a {type(whole).__name__}, by "
            "which the model was saved; name modules by their last names, such as q_proj"
        )


def _saved_as(base: Any, saved: PreTrainedConfig) -> Any:
    """A model of the class that a base was saved by, without memory; None for one of text alone."""
    if saved.get_text_config() is saved:
        return None
    named = getattr(transformers, (getattr(saved, "architectures", None) or [""])[0], None)
    kind = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else type(base)
    if kind.config_class is not type(saved):
        return None
    with torch.device("meta"), torch.random.fork_rng([]):
        return kind(copy.deepcopy(saved))
