"""A run's model, found, and looked at before any weights are read: can it be trained here?"""

import contextlib
import copy
import json
import os
import re
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from lowmem_grpo.config.sections import AdapterFields, ModelFields
from lowmem_grpo.config.training import TrainingConfig
from lowmem_grpo.errors import InputError, did_you_mean, in_a_line, shown
from lowmem_grpo.lookup import NO_MODEL, has_score_head, is_adapter, look_up_model
from lowmem_grpo.model.adapter_folder import read_adapter_config, refuse_misfit
from lowmem_grpo.model.adapter_names import names_of
from lowmem_grpo.model.adapters import (
    active_adapter,
    add_adapter,
    lora_config,
    refuse_config,
    refuse_fields,
    refuse_on_experts,
    refuse_state,
    tuned_layers,
)
from lowmem_grpo.model.experts import are_packed
from lowmem_grpo.model.head import output_embeddings, read_head
from lowmem_grpo.model.head_8bit import refuse_8bit
from lowmem_grpo.model.offload import refuse_offload
from lowmem_grpo.model.quantizer import BITSANDBYTES, MXFP4, lay_out_4bit, quantized_by
from lowmem_grpo.model.towers import (
    auto_class,
    beside_the_decoder,
    decoder_path,
    refuse_targets_beside,
    set_aside,
    within,
)
from lowmem_grpo.model.turn_end import named_ends
from lowmem_grpo.warn import warn

# Of model_init_kwargs: what settings of a run's own say, and what to do instead.
_COMPUTE_DTYPE = "the compute dtype is bfloat16 by default; set fp16=True, or bf16=False for float32"
OURS_TO_PASS = {
    "dtype": _COMPUTE_DTYPE, "torch_dtype": _COMPUTE_DTYPE,
    "device_map": "the model is on one device, the CPU with use_cpu=True; remove it",
    "quantization_config": "the base is in NF4 by default; set load_in_4bit",
    "trust_remote_code": "set trust_remote_code itself",
}  # fmt: skip
# Of model_init_kwargs: what from_pretrained reads; anything else is a setting of the model's configuration.
LOADING = (
    "attn_implementation", "cache_dir", "code_revision", "experts_implementation", "force_download", "gguf_file",
    "key_mapping", "local_files_only", "proxies", "revision", "subfolder", "token", "use_kernels", "use_safetensors",
    "variant", "weights_only",
)  # fmt: skip
# Of model_init_kwargs: which files of the hub are read, a tokenizer's too.
OF_THE_HUB = ("cache_dir", "local_files_only", "revision", "token")
# Of model_init_kwargs: with one of these, the weights are not in the files that a folder has by default.
OTHER_FILES = ("subfolder", "variant", "gguf_file")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # the last of those that read images, too
# Of the path of what a model looks its positions up in: embed_positions, wpe, pos_encoding; not post_layernorm.
POSITIONS = re.compile(r"wpe|pos(?!t)")


def find_model(model: Any, config: TrainingConfig, peft_config: Any = None, *, needs_weights: bool = True) -> None:
    """Raise InputError if a model cannot be found or trained, or its options clash, before any weights are read.

    A plan and a look at data, which read no weights, do without those of a model's folder.
    """
    if isinstance(model, str) and has_score_head(model):
        raise InputError(
            f"adapter {model!r} scores texts and writes none; give it as one of the reward_funcs, and as the model its "
            "base, or an adapter that writes"
        )
    continues = isinstance(model, PeftModel) or is_adapter(model)
    if continues and peft_config is not None:
        raise InputError(
            "peft_config is given, but the model already has an adapter; leave it out to continue that one"
        )
    refuse_config(peft_config)
    changed = [field.name for field in fields(AdapterFields) if getattr(config, field.name) != field.default]
    if changed and (continues or peft_config is not None):
        what = "the model's own adapter" if continues else "peft_config"
        raise InputError(f"{changed[0]} has no effect beside {what}; leave it out")
    given = config.model_init_kwargs or {}
    taken = [name for name in OURS_TO_PASS if name in given]
    if taken:
        raise InputError(f"model_init_kwargs has {taken[0]}: {OURS_TO_PASS[taken[0]]}")
    if given.get("attn_implementation") == "flex_attention":
        raise InputError("flex_attention is compiled anew for each length, for minutes each; use sdpa or eager")
    if isinstance(model, PreTrainedModel | PeftModel):
        if config.model_init_kwargs:
            raise InputError("model_init_kwargs has no effect on a model that is already loaded; leave it out")
        _refuse_loaded(model)
        if config.load_head_in_8bit:
            refuse_8bit(model.get_base_model() if isinstance(model, PeftModel) else model)
        if not config.load_in_4bit and is_4bit(model):
            raise InputError("the model was loaded in 4-bit; leave load_in_4bit at True")
        if isinstance(model, PeftModel) and config.load_in_4bit:
            for adapter in model.peft_config.values():
                refuse_on_experts(adapter, model)
        if isinstance(model, PreTrainedModel):
            _refuse_targets(model, config, peft_config)
    elif isinstance(model, str):
        _find_by_name(model, config, needs_weights)
        with torch.random.fork_rng([]):  # what is made at random here must not change the run
            settings = read_config(model, config)
            base: Any = without_weights(settings, config.trust_remote_code).requires_grad_(False)
            decoder_path(base)
            if config.load_head_in_8bit:
                refuse_8bit(base)
            if config.load_in_4bit:
                lay_out_4bit(base, settings)
                if are_packed(base) and "experts_implementation" in given:
                    raise InputError(
                        "model_init_kwargs has experts_implementation, and experts in 4 bits are computed here; leave "
                        "it out, or set load_in_4bit=False"
                    )
            if is_adapter(model):
                refuse_misfit(model, base, names_of(base, settings))
            else:
                _refuse_targets(base, config, peft_config)
                set_aside(base)
                add_adapter(base, peft_config or lora_config(config))
                read_head(base)
            if config.offload_embedding:
                refuse_offload(base)
    else:
        raise InputError(f"model is a {type(model).__name__}; pass a hub id, a folder or a loaded transformers model")


def _refuse_targets(base: PreTrainedModel, config: AdapterFields, peft_config: PeftConfig | None) -> None:
    """Raise InputError where a new adapter is of modules that a base lacks, or that are beside its decoder."""
    what = "lora_target_modules" if peft_config is None else "peft_config"
    refuse_targets_beside(peft_config or lora_config(config), base, what)
    if peft_config is None:
        refuse_fields(config, base)


def find_base_of(folder: str, config: ModelFields) -> None:
    """Raise InputError if the base that an adapter names cannot be found; no weights are read."""
    _find_by_name(folder, config, needs_weights=True)


def read_config(model: Any, config: ModelFields) -> PreTrainedConfig:
    """The transformers configuration of what find_model() found; no weights are read."""
    if isinstance(model, PeftModel):
        return model.get_base_model().config  # type: ignore[return-value] # a PreTrainedModel's
    if isinstance(model, PreTrainedModel):
        return model.config
    return AutoConfig.from_pretrained(
        base_of(model), trust_remote_code=config.trust_remote_code, **(config.model_init_kwargs or {})
    )


def ends_of_model(model: Any, config: ModelFields) -> set[int]:
    """Ids that end a sequence by the model's own settings, its tokenizer's apart."""
    own = read_config(model, config)
    settings: list[Any] = [own, own.get_text_config()]
    if isinstance(model, PreTrainedModel | PeftModel):
        settings.append(model.generation_config)
    else:
        with contextlib.suppress(Exception):  # most models have no such file
            settings.append(GenerationConfig.from_pretrained(base_of(model), **of_the_hub(config)))
    return named_ends(*settings)


def of_the_hub(config: ModelFields) -> dict[str, Any]:
    """The part of model_init_kwargs that says which files of the hub are read."""
    return {name: value for name, value in (config.model_init_kwargs or {}).items() if name in OF_THE_HUB}


def base_of(model: str) -> str:
    """The name or folder of a model's base: of an adapter's, as its configuration says."""
    return str(PeftConfig.from_pretrained(model).base_model_name_or_path) if is_adapter(model) else model


def adapter_config(model: Any, config: AdapterFields, peft_config: PeftConfig | None = None) -> PeftConfig:
    """The adapter that a run trains: the model's own, which is continued, or peft_config, or config's."""
    if isinstance(model, PeftModel):
        return model.peft_config[active_adapter(model)]
    if is_adapter(model):
        return PeftConfig.from_pretrained(model)
    return peft_config or lora_config(config)


def without_weights(
    config: PreTrainedConfig, trust_remote_code: bool, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A causal language model of a configuration with its towers, on the device that has no memory.

    Raises:
        InputError: transformers makes none of it.
    """
    with torch.device("meta"), torch.random.fork_rng([]):
        try:
            return auto_class(config).from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # also what a family's own code raises on settings that it does not understand
            raise InputError(
                f"a {config.model_type!r} model of these settings cannot be made: {in_a_line(error)}"
            ) from error


def beyond_context(
    model: Any, config: ModelFields, num_tokens: int, has: str = "the longest prompt and its completion may have",
    remedy: str = "lower max_prompt_length or max_completion_length",
) -> str | None:  # fmt: skip
    """A sentence where the longest sequence has more tokens than the model was made for; None where it has not.

    Rotary positions go on, into what the model never saw.

    Raises:
        InputError: the model's positions are learned, and end before that.
    """
    settings = read_config(model, config)
    known = _last_position(settings)
    if known is None or num_tokens <= known:
        return None
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base = without_weights(settings, config.trust_remote_code) if isinstance(model, str) else base
    end = _end_of_positions(base, known)
    if end is not None and num_tokens > end:
        raise InputError(f"{has} {num_tokens} tokens, more than the model has positions, {end}; {remedy}")
    return (
        f"{has} {num_tokens} tokens, more than the {known} that the model was made for "
        f"(max_position_embeddings); beyond them it may write nonsense; {remedy}"
    )


def _last_position(settings: PreTrainedConfig) -> int | None:
    """How many positions a model was made for, as its configuration says, or None where that says nothing."""
    text = settings.get_text_config()
    known = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)  # the latter of MPT
    rope: Any = getattr(text, "rope_parameters", None) or {}
    for scaled in (rope, *rope.values()):  # by kind of layer, where these have different ones
        factor = scaled.get("factor") if isinstance(scaled, dict) else None
        if known and factor and isinstance(factor, int | float) and isfinite(factor):
            # Qwen's instructions for long texts leave max_position_embeddings at what the factor multiplies.
            original = scaled.get("original_max_position_embeddings") or known
            known = max(known, int(factor * original))
    return known


def _end_of_positions(base: nn.Module, known: int) -> int | None:
    """How many positions a model has where it looks them up in a table, which ends, or None."""
    if getattr(base.config, "model_type", None) == "mpt":  # its table of biases is made on the way, and has no more
        return known
    tables = [*base.named_parameters(), *base.named_buffers()]
    # OPT's has two rows more, which come first.
    lookups = (table for name, table in tables if POSITIONS.search(name) and table.dim() == 2)
    return known if any(known <= len(table) <= known + 2 for table in lookups) else None


def _refuse_loaded(model: PreTrainedModel | PeftModel) -> None:
    """Raise InputError where a loaded model cannot be trained here."""
    refuse_state(model)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise InputError(f"the base of the PeftModel is a {type(base).__name__}; a transformers model is needed")
    _refuse_quantization(base.config, f"the model, a {type(base).__name__},")
    if getattr(base.config, "is_encoder_decoder", False):
        raise InputError(f"the model is a {type(base).__name__}, which is no causal language model")
    output_embeddings(base)
    decoder_path(base)
    _refuse_adapters_beside(base)
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise InputError(
            f"the model has no values for {away}, which is offloaded or was never loaded; load the whole model into "
            "the memory of one device"
        )
    spread = sorted({str(place) for place in (getattr(base, "hf_device_map", None) or {}).values()})
    if len(spread) > 1:  # accelerate sends what layers are given from one to the next
        raise InputError(
            f"the model is spread over devices {' and '.join(spread)}; load the whole model into the memory of one"
        )


def _refuse_adapters_beside(base: Any) -> None:
    """Raise InputError where a loaded model's adapter has weights beside the decoder of texts."""
    beside = beside_the_decoder(base)
    found = next((path for path in beside if tuned_layers(base.get_submodule(path))), None)
    if found is not None:
        raise InputError(
            f"the model's adapter has weights in {found}, beside the decoder of texts, and only text is trained on; "
            f"make it with exclude_modules={within(beside)!r}"
        )


def _find_by_name(model: str, config: ModelFields, needs_weights: bool) -> None:
    look_up_model(model, config.model_init_kwargs)
    if is_adapter(model):
        adapter = read_adapter_config(model)
        base, revision = str(adapter.base_model_name_or_path), adapter.revision
        taken = (config.model_init_kwargs or {}).get("revision")
        if revision not in (None, taken) and not os.path.isdir(base):
            raise InputError(
                f"adapter {model!r} is of the revision {shown(revision)} of {base!r}; set "
                f"model_init_kwargs={{'revision': {shown(revision)}}}"
            )
        if is_adapter(base):
            raise InputError(f"the base of adapter {model!r} is {base!r}, an adapter too; merge that one into its base")
        try:
            return _find_by_name(base, config, needs_weights)
        except InputError as error:
            raise InputError(f"the base that adapter {model!r} names cannot be taken: {error}") from error
    try:
        _refuse_unread(model, config)
        found = read_config(model, config)
    except InputError:
        raise
    except Exception as error:  # also what a family's own checks of its configuration raise
        raise InputError(f"model {model!r} {NO_MODEL}: {in_a_line(error)}") from error
    _refuse_quantization(found, f"model {model!r}", config)
    _refuse_kind(found, model)
    if needs_weights and os.path.isdir(model) and not set(OTHER_FILES) & set(config.model_init_kwargs or {}):
        _refuse_missing_weights(Path(model))


def _refuse_unread(model: str, config: ModelFields) -> None:
    """Raise InputError for an entry of model_init_kwargs that neither from_pretrained nor the configuration reads."""
    given = config.model_init_kwargs or {}
    settings = [name for name in given if name not in LOADING]
    if not settings:
        return
    loading = {name: value for name, value in given.items() if name in LOADING}
    plain = AutoConfig.from_pretrained(model, trust_remote_code=config.trust_remote_code, **loading)
    known = [name for name in {**vars(plain), **plain.attribute_map} if not name.startswith("_")]
    for name in settings:
        if name not in known:
            hint = did_you_mean(name, [*known, *LOADING], "leave it out")
            raise InputError(
                f"model_init_kwargs has {shown(name)}, which neither from_pretrained nor a {plain.model_type} "
                f"configuration reads; {hint}"
            )
        if "drop" in name and given[name]:
            raise InputError(f"model_init_kwargs has {name}, and the base's dropout is always off; leave it out")
        is_depth = plain.attribute_map.get(name, name) == "num_hidden_layers"
        if is_depth and given[name] != getattr(plain, name):
            warn(
                f"model_init_kwargs has {name}={given[name]}, and {model!r} has {getattr(plain, name)} layers: another "
                "model is trained than the one that was saved; leave it out unless that is meant"
            )


def is_4bit(model: nn.Module) -> bool:
    """Whether any linear layer of a loaded model is bitsandbytes' in 4 bits."""
    return any(isinstance(module, Linear4bit) for module in model.modules())


def _refuse_quantization(found: PreTrainedConfig, what: str, config: ModelFields | None = None) -> None:
    saved = quantized_by(found)
    if not saved:
        return
    method = saved.get("quant_method")
    is_mxfp4 = config is not None and method == MXFP4  # by name: loaded, it is in the form of another package
    if not is_mxfp4 and (method != BITSANDBYTES or not saved.get("load_in_4bit")):
        raise InputError(f"{what} is quantized otherwise than in bitsandbytes 4-bit; use its unquantized form")
    if config is not None and not config.load_in_4bit:
        raise InputError(f"{what} is 4-bit already; leave load_in_4bit at True")


def _refuse_kind(found: PreTrainedConfig, model: str) -> None:
    """Raise InputError where the configuration is of a model of another kind, or was saved by one."""
    named = getattr(found, "architectures", None) or [None]
    saved_by = named if isinstance(named, str) else named[0] and str(named[0])
    auto = auto_class(found)
    remote = auto is not None and auto.__name__ in (getattr(found, "auto_map", None) or {})
    made: Any = None if auto is None else auto._model_mapping.get(type(found), None)
    names = [kind.__name__ for kind in (made if isinstance(made, tuple) else (made,)) if kind is not None]
    # A family may have several names, and heads for other tasks, which from_pretrained would replace by a random one.
    causal = saved_by is None or saved_by in names or saved_by.endswith(LANGUAGE_MODELS)
    if getattr(found, "is_encoder_decoder", False) or not (remote or (names and causal)):
        kind = saved_by or f"{found.model_type!r} model"
        raise InputError(f"model {model!r} is a {kind}, which is no causal language model; name one that is")


def _refuse_missing_weights(folder: Path) -> None:
    """Raise InputError if a model's folder has no weights, or files of them that are missing or cut short."""
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise InputError(f"model folder {str(folder)!r} has no weights; copy {WEIGHTS[0]} there")
    files = found[:1]
    if found[0].suffix == ".json":
        try:
            index = json.loads(found[0].read_text(encoding="utf-8"))
            files = sorted({folder / name for name in index["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{found[0]} cannot be read: {in_a_line(error)}") from error
    for path in files:
        if not path.is_file():
            raise InputError(f"model folder {str(folder)!r} lacks {path.name}, which its index names; copy it there")
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):  # reads the header, which says how long the file must be
                    pass
            except SafetensorError as error:
                raise InputError(f"{path} cannot be read: {in_a_line(error)}; copy it anew") from error
