"""An adapter's folder: read, and compared with the base that it names, before any weight of the base is."""

import contextlib
import copy
import pickle
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from peft.utils.save_and_load import load_peft_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_grpo.errors import InputError, in_a_line
from lowmem_grpo.model.adapter_names import PREFIX, AdapterNames
from lowmem_grpo.model.adapters import add_adapter, is_trained_whole, refuse_config
from lowmem_grpo.model.head import read_head
from lowmem_grpo.model.towers import set_aside
from lowmem_grpo.warn import warn

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
HALF = (torch.bfloat16, torch.float16)
MERGE = "merge it into that base with PEFT's merge_and_unload(), save the result, and train that"


def read_adapter_config(folder: str) -> PeftConfig:
    """The configuration in an adapter's folder. Raise InputError where it is damaged or cannot be trained here."""
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # whatever PEFT raises on a file of another format, or a kind that it does not know
        raise InputError(f"the adapter_config.json of {folder!r} cannot be read: {in_a_line(error)}") from error
    refuse_config(config, f"the adapter in {folder!r}", new=False)
    if not config.base_model_name_or_path:
        raise InputError(f"adapter {folder!r} does not name its base model; set base_model_name_or_path in it")
    return config


def refuse_misfit(folder: str, base: PreTrainedModel, names: AdapterNames) -> None:
    """Raise InputError if an adapter's folder does not fit its base: weights lack, are left over, or of other shapes.

    The adapter is put on `base`, which is one without memory that nobody else uses.
    """
    config, found = read_adapter_config(folder), names.from_file(read_weights(folder))
    beside = next((name for name in found if names.is_beside(name)), None)
    if beside is not None:
        raise InputError(
            f"the adapter in {folder!r} has {beside}, beside the decoder of texts, and only text is trained on; {MERGE}"
        )
    set_aside(base)
    own = {name: parameter.shape for name, parameter in base.named_parameters()}
    for name, values in _of_the_base(found, config, own).items():
        if values.shape != own[name]:
            raise InputError(
                f"the adapter in {folder!r} has a {name} of {_by(values)}, and its base one of {_by(own[name])}: its "
                f"vocabulary was resized; {MERGE}"
            )
    config = copy.copy(config)
    config.init_lora_weights = True  # type: ignore[attr-defined] # a LoraConfig's; what is put on has no values
    base_name, config.base_model_name_or_path = config.base_model_name_or_path, None  # which PEFT compares with ours
    model = add_adapter(base, config)
    read_head(base)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    lacking, left_over = _loaded(model, folder, names)
    if lacking or left_over:
        name = (lacking or left_over)[0]
        given = found.get(name.replace(".default.", "."))
        if given is not None and name in shapes:
            why = f"its {name} is of {_by(given)}, and by its settings of {_by(shapes[name])}"
        else:
            why = f"it has no {name}" if lacking else f"it has {name}, and the base no place for it"
        raise InputError(
            f"the adapter in {folder!r} is not one of {base_name!r} with the settings in its adapter_config.json: {why}"
        )


def refuse_changed_base(folder: str, base: nn.Module, names: AdapterNames) -> None:
    """Raise InputError if an adapter's folder holds weights of its base, such as embeddings, with other values."""
    own = dict(base.named_parameters())
    found = names.from_file(read_weights(folder))
    for name, values in _of_the_base(found, PeftConfig.from_pretrained(folder), own).items():
        theirs = own[name].detach()
        # Of one dtype they are equal; a 16-bit one may have been rounded to the other.
        if not torch.allclose(values.to(theirs.device, torch.float32), theirs.float(), rtol=0.02, atol=1e-3):
            raise InputError(f"the adapter in {folder!r} has a {name} that is not its base's; {MERGE}")


def warn_of_another_base(base: Any) -> None:
    """Warn where a loaded model has other weights than what it was loaded from, which its adapter would name.

    So it is once merge_and_unload() has been called. The first row of each matrix is compared, where it is not
    quantized and the files are on this machine.
    """
    if getattr(base.config, "quantization_config", None) is not None:
        return
    own = {name.replace(".base_layer.", "."): values.detach() for name, values in base.named_parameters()}
    for file in _files_of(base.name_or_path):
        with safe_open(file, "pt") as saved:
            for name in [name for name in saved.keys() if name in own and own[name].dim() > 1]:  # noqa: SIM118
                theirs, mine = saved.get_slice(name), own[name]
                row, my_row = theirs[:1], mine[:1].cpu()
                # A row may have been rounded to 16 bits on its way.
                is_same = any(torch.equal(row.to(dtype).to(mine.dtype), my_row) for dtype in (mine.dtype, *HALF))
                if not is_same or theirs.get_shape() != [*mine.shape]:
                    warn(
                        f"the loaded model has another {name} than {base.name_or_path!r}, which its adapter will name "
                        "as its base: an adapter was merged into it, or it was changed; save it with "
                        "save_pretrained(), and train what is saved"
                    )
                    return


def _files_of(name: str) -> list[Path]:
    """The safetensors of a model's folder, or of its hub id in the cache; none where there are none."""
    folder = Path(name)
    if name and not folder.is_dir():
        with contextlib.suppress(HFValidationError):
            cached = try_to_load_from_cache(name, "config.json")
            folder = Path(cached).parent if isinstance(cached, str) else folder
    return sorted(folder.glob("*.safetensors")) if name else []


def read_weights(folder: str) -> dict[str, Tensor]:
    """The tensors in an adapter's folder, by name, on the CPU. Raise InputError where there are none."""
    if not any((Path(folder) / name).is_file() for name in WEIGHTS):
        raise InputError(f"adapter {folder!r} has no {WEIGHTS[0]}; copy it there, or name another folder")
    try:
        weights = load_peft_weights(folder, device="cpu")
        others = [f"{name} in {values.dtype}" for name, values in weights.items() if not values.is_floating_point()]
    except pickle.UnpicklingError as error:
        raise InputError(
            f"the weights of adapter {folder!r} hold more than tensors, or are cut short, and reading them could run "
            f"code; take a copy in {WEIGHTS[0]}"
        ) from error
    except Exception as error:  # of safetensors, or of what is no mapping of tensors
        raise InputError(
            f"the weights of adapter {folder!r} cannot be read: {in_a_line(error)}; copy the file anew"
        ) from error
    if others:
        raise InputError(f"the adapter in {folder!r} has {others[0]}, which is not trained; save it in fp32 or 16 bits")
    return weights


def _of_the_base(found: dict[str, Tensor], config: Any, own: Container[str]) -> dict[str, Tensor]:
    """The weights among an adapter's that are its base's, by the base's names; PEFT loads them over those."""
    bare = {name.removeprefix(PREFIX).replace(".base_layer.", "."): values for name, values in found.items()}
    return {name: values for name, values in bare.items() if name in own and not is_trained_whole(name, config)}


def _loaded(model: PeftModel, folder: str, names: AdapterNames) -> tuple[list[str], list[str]]:
    """The names that PEFT finds lacking, or of another shape, and those left over, as it loads a folder's weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of each mismatch, which is an error here
        try:
            mapping = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", {})
            result = model.load_adapter(
                folder, "default", torch_device="cpu", low_cpu_mem_usage=True,
                key_mapping={**names.key_mapping(), **mapping}, ignore_mismatched_sizes=True,
            )  # fmt: skip
        except KeyError as error:  # a module that is trained whole
            return [str(error.args[0])], []
    return result.missing_keys, result.unexpected_keys


def _by(of: Tensor | torch.Size) -> str:
    """A shape in words, such as "4 x 64"."""
    return " x ".join(map(str, of.shape if isinstance(of, Tensor) else of))
