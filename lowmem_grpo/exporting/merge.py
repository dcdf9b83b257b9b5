"""An adapter merged into its base's checkpoint: W + scale B A of each weight, one at a time.

The base is either the checkpoint's own weights, or what training's 4 bits make of them, from which the adapter was
trained. What the adapter does not change, towers and experts say, is written as it stands in the checkpoint.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from lowmem_grpo.errors import InputError, shown
from lowmem_grpo.exporting.files import DTYPES, NAMES, Stored, Tensors, other_files, write_tensors
from lowmem_grpo.model.adapter_folder import read_adapter_config, read_weights
from lowmem_grpo.model.adapter_names import PREFIX, names_of
from lowmem_grpo.model.adapters import is_trained_whole, scale_of
from lowmem_grpo.model.experts import dense_weights, experts_of
from lowmem_grpo.model.find import without_weights
from lowmem_grpo.model.quantizer import BITSANDBYTES, MXFP4, Quantizer, in_4bit, quantized_by
from lowmem_grpo.model.towers import set_aside

Change = Callable[[Tensor], Tensor]  # of a weight of the base: what the adapter makes of it
PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)")
STATE = re.compile(r"(.+)\.(?:quant_state\.bitsandbytes__\w+|absmax|quant_map|nested_absmax|nested_quant_map)")
OF_TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "vocab", "merges", "spiece")
OF_PROCESSOR = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class LowRank:
    """The change of a weight (out, in) to W + scale B A, with DoRA each row at its own length."""

    a: Tensor  # (r, in) fp32
    b: Tensor  # (out, r) fp32
    scale: float
    magnitude: Tensor | None = None  # (out,) fp32

    def __call__(self, weight: Tensor) -> Tensor:
        """The changed weight (out, in) of a weight of that shape, in its dtype and on its device."""
        to = weight.device
        changed = torch.addmm(weight, self.b.to(to), self.a.to(to), alpha=self.scale)
        if self.magnitude is None:
            return changed
        return changed * (self.magnitude.to(to) / changed.norm(dim=1))[:, None]


@dataclass(frozen=True)
class Added:
    """A bias with another, LoRA's, added to it."""

    values: Tensor

    def __call__(self, bias: Tensor) -> Tensor:
        """The sum, in the bias's dtype and on its device."""
        return bias + self.values.to(bias)


@dataclass(frozen=True)
class Replaced:
    """Values that were trained whole, and take the place of the base's."""

    values: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        """The trained values, in the weight's dtype and on its device."""
        return self.values.to(weight)


def read_changes(folder: str, config: Any, weights: Mapping[str, Tensor]) -> dict[str, Change]:
    """An adapter's changes, by the name of the parameter that each is of.

    Raises:
        InputError: the adapter changes what cannot be merged.
    """
    if config.target_parameters:
        raise InputError(
            f"the adapter in {folder!r} changes {shown(sorted(config.target_parameters)[0])}, which is no linear "
            "layer, and that is not merged here; serve the adapter beside its base, or use PEFT's merge_and_unload()"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Change] = {}
    for name, values in weights.items():
        bare = name.removeprefix(PREFIX)
        part = PART.fullmatch(bare)
        if part:
            parts.setdefault(part[1], {})[part[2]] = values.float()
        elif is_trained_whole(bare, config):
            found[bare] = Replaced(values)
        # What is left is the base's own, such as an embedding that PEFT saves beside LoRA of it.
    for path, of in parts.items():
        scale, magnitude = scale_of(config, path), of.get("lora_magnitude_vector")
        if "lora_embedding_A" in of:
            if magnitude is not None:
                raise InputError(f"the adapter in {folder!r} has DoRA on {path}, an embedding; use merge_and_unload()")
            # PEFT has them as (r, V) and (D, r), of a table (V, D).
            found[f"{path}.weight"] = LowRank(of["lora_embedding_B"].T, of["lora_embedding_A"].T, scale)
        else:
            found[f"{path}.weight"] = LowRank(of["lora_A.weight"], of["lora_B.weight"], scale, magnitude)
        if "lora_B.bias" in of:
            found[f"{path}.bias"] = Added(scale * of["lora_B.bias"])
    return found


@dataclass(frozen=True)
class Places:
    """The places of a checkpoint's tensors in the model that is trained."""

    of: dict[str, str]  # parameter by tensor, for the tensors that are a parameter as they are
    quantized: frozenset[str]  # parameters that training holds in 4 bits
    transposed: frozenset[str]  # parameters that are (in, out), which training quantizes, and adapts, as (out, in)
    experts: frozenset[str]  # parameters with the matrices of a mixture's experts, which training packs one by one
    parts: dict[str, list[str]]  # by tensor of one expert: those that together, in this order, are a matrix of it
    shared: frozenset[str]  # parameters that the model has at several places, such as a tied head


def find_places(names: list[str], config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> Places:
    """The places of a checkpoint's tensors in the model that training makes of it; no weights are read."""
    model: Any = without_weights(config, trust_remote_code)
    set_aside(model)
    own, prefix = model.state_dict(), model.base_model_prefix
    known = get_model_conversion_mapping(model)
    renamings = [one for one in known if isinstance(one, WeightRenaming)]
    converters = [one for one in known if isinstance(one, WeightConverter)]
    packs = quantized_by(config).get("quant_method") != MXFP4  # whose experts stay as they are
    experts = {f"{path}.{name}" for path, one in experts_of(model) if packs for name in dense_weights(one)}
    of: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for name in names:
        to, converted = rename_source_key(name, renamings, converters, prefix, own)
        if to not in own and name in own:  # as transformers' loading does
            to, converted = name, None
        if to in own and converted is None:
            of[name] = to
        elif to in experts:
            parts[name] = _parts_of(name, converted, converters)
    transposed = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}
    names_of_one: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of_one.setdefault(id(parameter), []).append(name)
    shared = {name: all_[0] for all_ in names_of_one.values() if len(all_) > 1 for name in all_}
    quantizer = Quantizer(in_4bit(config, dtype)["quantization_config"])
    quantizer.preprocess_model(model, device_map={"": "cpu"})
    quantized = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    return Places(of, frozenset(quantized), frozenset(transposed), frozenset(experts), parts, frozenset(shared))


def _parts_of(name: str, pattern: str | None, converters: list[WeightConverter]) -> list[str]:
    """The tensors that make a matrix of an expert, one above the other; none where files have it otherwise."""
    converter = next(one for one in converters if pattern in one.source_patterns)
    kinds = [type(one).__name__ for one in converter.operations]
    if kinds not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) or pattern is None:
        return []
    if any(getattr(one, "dim", None) != at for at, one in enumerate(converter.operations)):
        return []
    ends = [each.partition("*")[2] for each in converter.source_patterns]
    return [name.removesuffix(pattern.partition("*")[2]) + end for end in ends]


@dataclass(frozen=True)
class MergeSettings:
    """How an adapter is merged."""

    onto: str  # "original" or "nf4"
    dtype: torch.dtype | None  # of the result; None: the base's own
    compute_dtype: torch.dtype  # in which training has the base, and from which it makes 4 bits
    device: torch.device
    trust_remote_code: bool = False


def merge(plan: "MergePlan", out: Path) -> None:
    """Write the model of an adapter and its base into a folder, in files as the base's are.

    Raises:
        OSError: the disk refused.
    """
    adapter, base = plan.adapter, plan.tensors.folder
    write_tensors(out, plan.layout, plan.tensor, plan.tensors.metadata())
    for path in other_files(base):
        shutil.copyfile(path, out / path.name)
    if not any((base / name).is_file() for name in OF_PROCESSOR):  # whose template reads images too
        for path in Path(adapter).iterdir():
            if path.is_file() and path.name.startswith(OF_TOKENIZER):
                shutil.copyfile(path, out / path.name)
    config = json.loads((base / "config.json").read_bytes())
    (out / "config.json").write_text(json.dumps(_plain(config, plan.dtype), indent=2) + "\n", encoding="utf-8")


class MergePlan:
    """A merge before any weights are read, which makes a tensor when it is asked for one.

    Attributes:
        layout: type, shape and file of each.
        dtype: of the weights of the result.

    Raises:
        InputError: the adapter or the base cannot be merged so.
    """

    def __init__(self, adapter: str, base: Path, settings: MergeSettings):
        self.adapter, self.settings, self.tensors = adapter, settings, Tensors(base)
        config = AutoConfig.from_pretrained(base, trust_remote_code=settings.trust_remote_code)
        stored = self.tensors.stored
        states = [name for name in stored if (found := STATE.fullmatch(name)) and found[1] in stored]
        self.states: dict[str, list[str]] = {}  # of a weight in 4 bits in the checkpoint: its scales
        for name in states:
            self.states.setdefault(name.rpartition(".weight.")[0] + ".weight", []).append(name)
        kept = [name for name in stored if name not in set(states)]
        self.places = find_places(kept, config, settings.compute_dtype, settings.trust_remote_code)
        if settings.onto == "nf4" and not all(self.places.parts.values()):
            raise InputError(f"{base} has its experts in a form that is not put into 4 bits here; merge onto original")
        self.changes = self._changes(adapter, config)
        self.own_dtype = _main_dtype(stored, config)
        self.dtype = settings.dtype or self.own_dtype
        self.layout = {name: self._stored(name) for name in kept}

    def _changes(self, adapter: str, config: PreTrainedConfig) -> dict[str, Change]:
        given = read_adapter_config(adapter)
        names = names_of(without_weights(config, self.settings.trust_remote_code), config)
        changes = read_changes(adapter, given, names.from_file(read_weights(adapter)))
        reached = set(self.places.of.values())
        for name in changes:
            if name in self.places.shared:
                raise InputError(
                    f"the adapter in {adapter!r} changes {name}, which the model has at two places, and an adapter at "
                    "one; serve the adapter beside its base"
                )
            if name not in reached:
                raise InputError(
                    f"the adapter in {adapter!r} changes {name}, which the base's files have in another form, or not "
                    "at all; use PEFT's merge_and_unload(), or serve the adapter beside its base"
                )
        return changes

    def _stored(self, name: str) -> Stored:
        """Type, shape and file of a tensor of the result."""
        of = self.tensors.stored[name]
        if name in self.states:
            shape = self._state(name).shape
            assert shape is not None
            return Stored(of.file, NAMES[self.dtype], tuple(shape))
        dtype = NAMES[self.dtype] if of.dtype == NAMES[self.own_dtype] else of.dtype
        return Stored(of.file, dtype, of.shape)

    def _state(self, name: str) -> QuantState:
        state = {part: self.tensors.read(part) for part in self.states[name]}
        return QuantState.from_dict(state, self.settings.device)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the result, on the CPU."""
        parameter, dtype = self.places.of.get(name, ""), DTYPES.get(self.layout[name].dtype)
        change = self.changes.get(parameter)
        in_4bit = self.settings.onto == "nf4" and parameter in self.places.quantized
        if self.settings.onto == "nf4" and change is None and dtype is not None:
            if parameter in self.places.experts:
                return self._stack(name, dtype)
            if name in self.places.parts:
                return self._part(name, dtype)
        values = self.tensors.read(name)
        if change is None and not in_4bit and name not in self.states:
            return values if dtype is None else values.to(dtype)
        values = values.to(self.settings.device)
        transposed = parameter in self.places.transposed
        if name in self.states:
            values = _dequantized(values, self._state(name))
        else:
            values = values.T.contiguous() if transposed else values
            values = through_nf4(values.to(self.settings.compute_dtype)) if in_4bit else values.float()
        values = values if change is None else change(values)
        return (values.T if transposed else values).to(dtype).cpu()

    def _stack(self, name: str, dtype: torch.dtype) -> Tensor:
        """The matrices of all experts (E, ...) through 4 bits, one by one."""
        matrices = self.tensors.read(name)
        found = torch.empty(matrices.shape, dtype=dtype)
        for place, matrix in enumerate(matrices):
            found[place] = _of_expert(matrix.to(self.settings.device, self.settings.compute_dtype))
        return found

    def _part(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of one expert through 4 bits, which training makes of the whole matrix that it is a part of."""
        parts = self.places.parts[name]
        matrices = [self.tensors.read(part).to(self.settings.device, self.settings.compute_dtype) for part in parts]
        place = parts.index(name)
        return _of_expert(torch.cat(matrices)).split([len(one) for one in matrices])[place].to("cpu", dtype)


def through_nf4(weight: Tensor) -> Tensor:
    """A weight (out, in) as training has it on this device, in fp32: NF4 in blocks of 64 with double quantization."""
    codes, state = quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True)
    return _dequantized(codes, state)


def _of_expert(matrix: Tensor) -> Tensor:
    """A matrix of an expert as training has it, in fp32, which reads it as one row."""
    return through_nf4(matrix.reshape(1, -1)).view(matrix.shape)


def _dequantized(codes: Tensor, state: Any) -> Tensor:
    """The fp32 numbers of codes in 4 bits."""
    state.dtype = torch.float32
    return dequantize_4bit(codes, state)


def _main_dtype(stored: Mapping[str, Stored], config: PreTrainedConfig) -> torch.dtype:
    """The type that most of a checkpoint's numbers have; of one in 4 bits, that of its configuration."""
    if quantized_by(config).get("quant_method") == BITSANDBYTES:
        return getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    sizes = {name: sum(of.num_bytes for of in stored.values() if of.dtype == name) for name in DTYPES}
    return DTYPES[max(sizes, key=lambda name: sizes[name])]


def _plain(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json of a model whose linear layers are not quantized, and are of a type."""
    found = {name: value for name, value in config.items() if name != "_name_or_path"}  # a place, by old versions
    if (found.get("quantization_config") or {}).get("quant_method") != MXFP4:  # whose experts stay as they are
        found.pop("quantization_config", None)
    for name, value in found.items():
        if name in ("dtype", "torch_dtype"):
            found[name] = str(dtype).removeprefix("torch.")
        elif isinstance(value, dict) and name.endswith("_config"):
            found[name] = _plain(value, dtype)
    return found
