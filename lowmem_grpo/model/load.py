"""Load a Policy: a model found, put on the device in 4-bit, given adapters, and made ready to train."""

import contextlib
import os
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.pytorch_utils import Conv1D

from lowmem_grpo.config.sections import ModelFields
from lowmem_grpo.config.training import TrainingConfig
from lowmem_grpo.errors import InputError, in_a_line
from lowmem_grpo.lookup import is_adapter
from lowmem_grpo.model.adapter_folder import read_adapter_config, refuse_changed_base, warn_of_another_base
from lowmem_grpo.model.adapter_names import AdapterNames, names_of, refuse_lost_targets, saved_config
from lowmem_grpo.model.adapters import (
    active_adapter,
    add_adapter,
    expected_warnings_off,
    lora_config,
    refuse_whole_in_4bit,
)
from lowmem_grpo.model.attention import Recomputation
from lowmem_grpo.model.chat_template import reading_texts, template_of_processor
from lowmem_grpo.model.checkpointing import checkpoint_layers
from lowmem_grpo.model.experts import name_in_file, pack_experts
from lowmem_grpo.model.find import (
    LOADING,
    adapter_config,
    base_of,
    find_model,
    is_4bit,
    of_the_hub,
    read_config,
    without_weights,
)
from lowmem_grpo.model.head import probed_head
from lowmem_grpo.model.head_8bit import head_path, settle_head
from lowmem_grpo.model.lora import keep_one_input
from lowmem_grpo.model.mixing import install
from lowmem_grpo.model.offload import (
    Offloading,
    offload_embedding,
    tile_mlps,
    token_embeddings,
    undo,
    use_liger_kernels,
)
from lowmem_grpo.model.outlined import take_out
from lowmem_grpo.model.past_forward import read_past_forward
from lowmem_grpo.model.policy import Policy, not_finite
from lowmem_grpo.model.quantizer import in_4bit, reading_as_before
from lowmem_grpo.model.towers import auto_class, made_without_towers, set_aside
from lowmem_grpo.model.trial import refuse_untrainable

LINEAR = (nn.Linear, Conv1D)  # what bitsandbytes' loader puts in 4 bits, and no subclass of theirs
ONLY_ON_GPU = ("vram_budget", "activation_offloading", "offload_embedding", "use_liger_kernel")


def load_policy(
    model, tokenizer, config: TrainingConfig, peft_config: LoraConfig | None = None, *, is_found: bool = False
) -> Policy:
    """A Policy from a hub id, a model folder, a 4-bit checkpoint, an adapter folder, or a loaded model.

    A loaded model is changed in place: its linear layers become 4-bit if config says so, it gets adapters, and what it
    has beside its decoder of texts, such as a vision tower, is taken out. With is_found, find_model() has passed all
    this already.

    Raises:
        InputError: the model cannot be found, or cannot be trained here; the message has the remedy.
    """
    if not is_found:
        find_model(model, config, peft_config)
    device = run_device(config)
    dtype = getattr(torch, config.compute_dtype)
    if device.type == "cpu":
        # 1024 otherwise, at 0.3 MiB each. A layer's update has some 25 shapes of matrix products, and where they do not
        # all fit, each is compiled anew in every layer: with 16, a fifth of an update of the demo.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "48")
    peft_model, names = _load_model(model, config, peft_config, device, dtype)
    for module in peft_model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            # On CPUs with AVX512-BF16 bitsandbytes would repack the weight at the first inference; training on the
            # repacked weight then raises, or silently loses the adapters' gradient.
            module.support_avx512bf16_for_cpu = False
    policy = Policy(peft_model, tokenizer, dtype, names)
    equip(policy, config)
    if not policy.parameters_of(policy.adapter):
        raise InputError(f"the adapter {policy.adapter!r} has no weights to train; give it some target_modules")
    broken = not_finite(policy.parameters_of(policy.adapter))
    if broken:
        raise InputError(
            f"the adapter to continue has numbers that are not finite, in {broken}; take an older one, or start anew"
        )
    policy.head = probed_head(policy.base, policy.head)
    refuse_untrainable(policy)
    if config.activation_offloading:
        policy.saved_activations = Offloading(device)
    return policy


def run_device(config: TrainingConfig) -> torch.device:
    """The device of a run. Raise InputError for settings that it cannot obey."""
    if torch.cuda.is_available() and not config.use_cpu:
        device = torch.device("cuda", torch.cuda.current_device())  # some of torch.cuda wants the number
        if config.compute_dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError("this GPU has no bfloat16; set fp16=True")
        return device
    device = torch.device("cpu")
    for name in ONLY_ON_GPU:
        if getattr(config, name):
            raise InputError(f"{name} is about a GPU's memory, and this run is on a CPU; leave it out")
    if config.optim.startswith("paged"):
        raise InputError(f"optim={config.optim!r} pages from a GPU, and this run is on a CPU; use adamw_8bit")
    return device


def equip(policy: Policy, config: ModelFields) -> None:
    """Make a policy ready to train: fp32 adapters, no dropout of the base, the ways to save memory."""
    model, base = policy.model, policy.base
    undo(base)  # what an earlier load of it asked for
    take_out(policy.decoder)
    _switch_off_base_dropout(model)
    for given in policy.configs:  # transformers 5.17's sdpa leaves a softcap out, without a word
        if given._attn_implementation == "sdpa" and getattr(given, "attn_logit_softcapping", None) is not None:
            given._attn_implementation = "eager"
    keep_one_input(model)
    install(base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    again = partial(Recomputation, policy.configs, policy.adapters)
    if config.use_liger_kernel:
        use_liger_kernels(base)
    if config.tiled_mlp:
        tile_mlps(base.get_decoder(), again)
    if config.offload_embedding:
        offload_embedding(base)
    if config.gradient_checkpointing:
        checkpoint_layers(base, again)
    elif any(getattr(layer, "gradient_checkpointing", False) for layer in base.modules()):
        _disable_checkpointing(base)
    if hasattr(base, "_require_grads_hook"):  # PEFT's: the embedding's result would get a gradient that nobody reads
        base.disable_input_require_grads()
    model.train()


def _switch_off_base_dropout(model: PeftModel) -> None:
    """Switch off the base's dropout, so that the ratio of policy and sampler starts at 1. lora_dropout stays.

    Many models keep a probability as a number of a module or of a configuration, by many names: attention_dropout,
    hidden_dropout, attn_pdrop, layerdrop.
    """
    for path, module in model.named_modules():
        if "lora_dropout" in path:
            continue
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for owner in (module, *_configs_within(module)):
            for name, value in vars(owner).items():
                if "drop" in name and isinstance(value, float):
                    vars(owner)[name] = 0.0


def _configs_within(owner: Any) -> Iterator[PreTrainedConfig]:
    """The configurations that a module holds, and those within them."""
    for value in vars(owner).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _configs_within(value)


def _disable_checkpointing(model: Any) -> None:
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()


def _load_model(model, config: TrainingConfig, peft_config, device, dtype) -> tuple[PeftModel, AdapterNames]:
    """The model with its adapter on the device, and the names that adapters of it have in their files."""
    if isinstance(model, PeftModel | PreTrainedModel):
        if isinstance(model, PeftModel) and config.load_in_4bit and not is_4bit(model):
            raise InputError(
                "the base of this PeftModel is not 4-bit: load the base in 4-bit, or set load_in_4bit=False"
            )
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        warn_of_another_base(base)
        set_aside(base)
        model.requires_grad_(False)
    else:
        base = _load_base(base_of(model), config, device, dtype)
    settle_head(base, device, dtype, in_8bit=config.load_head_in_8bit)
    saved = read_config(model, config) if isinstance(model, str) else saved_config(base)
    names = names_of(base, saved)
    if isinstance(model, PeftModel):
        if config.load_in_4bit:
            pack_experts(base, device, dtype)
        model.set_requires_grad(list(model.peft_config))  # also of those that are not worn, which stay fp32 so
        adapted = _placed(model, device, dtype, offloads=config.offload_embedding)
    elif isinstance(model, PreTrainedModel):
        if config.load_in_4bit:
            if not is_4bit(model):
                quantize_linears(model, device, dtype)
            pack_experts(model, device, dtype)
        placed = _placed(model, device, dtype, offloads=config.offload_embedding)
        adapted = add_adapter(placed, peft_config or lora_config(config))
    elif is_adapter(model):
        refuse_changed_base(model, base, names)
        refuse_whole_in_4bit(base, read_adapter_config(model))
        with expected_warnings_off():
            adapted = PeftModel.from_pretrained(base, model, is_trainable=True, key_mapping=names.key_mapping() or None)
    else:
        adapted = add_adapter(base, adapter_config(model, config, peft_config))
    refuse_lost_targets(names, adapted, active_adapter(adapted), saved)
    return adapted, names


def _load_base(name: str, config: ModelFields, device, dtype) -> PreTrainedModel:
    settings = read_config(name, config)
    places = _places(settings, config, device)
    arguments = {
        "dtype": dtype, "device_map": places, "trust_remote_code": config.trust_remote_code,
        "ignore_mismatched_sizes": True,  # they are refused below, where they are named
    }  # fmt: skip
    given = config.model_init_kwargs or {}
    if config.load_in_4bit:
        arguments |= in_4bit(settings, dtype)
        if "config" in arguments:  # which has the other settings already
            given = {key: value for key, value in given.items() if key in LOADING}
    only_text: contextlib.AbstractContextManager = contextlib.nullcontext()
    if settings.get_text_config() is not settings:
        only_text = made_without_towers(type(without_weights(settings, config.trust_remote_code)))
    try:
        with only_text, reading_as_before(), _left_apart() if len(places) > 1 else contextlib.nullcontext():
            loaded: Any = auto_class(settings).from_pretrained(name, **arguments, **given, output_loading_info=True)
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"the weights of model {name!r} hold more than tensors, or are cut short, and reading them could run code; "
            "take a copy in safetensors"
        ) from error
    except Exception as error:  # of safetensors, torch's unpickling, or a family's own code
        raise InputError(f"model {name!r} cannot be loaded: {in_a_line(error)}") from error
    model, report = loaded
    mismatched = [*report["mismatched_keys"], *_of_other_shapes(model)]
    if mismatched:
        weight, *shapes = min(mismatched)
        found, wanted = (" x ".join(map(str, shape)) for shape in shapes)
        raise InputError(
            f"model {name!r} has a {name_in_file(weight)} of {found}, and by its config.json it is of {wanted}; take "
            "both files from one save"
        )
    if report["missing_keys"]:
        lacking = name_in_file(min(report["missing_keys"]))
        what = f"model {name!r} has no {lacking}, which transformers made up at random"
        beside = [key for key in report["unexpected_keys"] if key.startswith(lacking.rpartition(".")[0] + ".")]
        if beside:  # as of gpt-oss with an nn.Linear for each expert, which Unsloth saves
            raise InputError(
                f"{what}, and beside it a {min(beside)}, which it does not read; take the model as its makers "
                "published it"
            )
        raise InputError(f"{what}; name a whole model")
    return model


def _places(settings: PreTrainedConfig, config: ModelFields, device: torch.device) -> dict[str, torch.device]:
    """Devices to which from_pretrained brings a model's parts, by their names; "" is all others.

    What is not on the GPU in the end, or not in 16 bits, is never there.
    """
    away: list[str] = []
    if device.type != "cpu" and (config.offload_embedding or config.load_head_in_8bit):
        whole: Any = without_weights(settings, config.trust_remote_code).requires_grad_(False)
        tables = token_embeddings(whole) if config.offload_embedding else []
        away += [path for path, module in whole.named_modules() if any(module is table for table in tables)]
        away += [head_path(whole)] if config.load_head_in_8bit else []
    return {"": device, **dict.fromkeys(away, torch.device("cpu"))}


@contextlib.contextmanager
def _left_apart() -> Iterator[None]:
    """Have no hooks on a model's parts that are on several devices: each lookup here says itself where it goes."""
    loading: Any = modeling_utils
    own = loading.accelerate_dispatch
    loading.accelerate_dispatch = lambda *_, **__: None
    try:
        yield
    finally:
        loading.accelerate_dispatch = own


def _of_other_shapes(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Name, shape and shape by the configuration of weights of which the two differ.

    transformers takes those in 4 bits, and beside them, before 5.23, an embedding.
    """
    for path, layer in model.named_modules():
        weight: Any = getattr(layer, "weight", None)
        if isinstance(layer, nn.Embedding):
            shape, by_config = weight.shape, (layer.num_embeddings, layer.embedding_dim)
        elif isinstance(layer, Linear4bit) and isinstance(weight, Params4bit) and weight.quant_state is not None:
            shape, by_config = weight.quant_state.shape, (layer.out_features, layer.in_features)
        else:
            continue
        if shape != by_config:
            yield f"{path}.weight", shape, by_config


def quantize_linears(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Put a model's linear layers, but for the head, on the device in NF4 with double quantization, one by one.

    Those whose weights are read past their forwards, or shared, stay as they are. The dense weight of a layer is let go
    before the next one's turn, so the device never holds more than one. GPT-2's Conv1D is a linear layer with its
    weight as (in, out).
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    names = [name for name, module in model.named_modules() if type(module) in LINEAR and module is not head]
    as_they_are, shared = set(read_past_forward(model)), shared_weights(model)
    for name in names:
        if name in as_they_are or f"{name}.weight" in shared:
            continue
        linear: Any = model.get_submodule(name)
        dense = linear.weight.data.t().contiguous() if type(linear) is Conv1D else linear.weight.data
        outputs, inputs = dense.shape
        with torch.device("meta"):
            small = Linear4bit(inputs, outputs, linear.bias is not None, compute_dtype=dtype, quant_type="nf4")
        weight: Any = Params4bit  # its __new__ has the arguments, which a type checker does not see
        small.weight = weight(dense.to(dtype), requires_grad=False, quant_type="nf4")
        small.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, small.to(device))  # the move quantizes


def shared_weights(model: nn.Module) -> set[str]:
    """Names of weights that stand in several places, as Zamba 2's; from_pretrained leaves them out of 4 bits."""
    return {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}


def _placed(model: Any, device: torch.device, dtype: torch.dtype, *, offloads: bool = False) -> Any:
    """The model with parameters and buffers on the device; frozen ones get the dtype too.

    With offloads, embeddings of token ids stay where they are: they will be in CPU memory.
    """
    refuse_4bit_elsewhere(model, device)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    tables = {id(table.weight) for table in token_embeddings(base)} if offloads else set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, Params4bit) and parameter.is_floating_point():
                to = parameter.device if id(parameter) in tables else device
                parameter.data = parameter.data.to(to, parameter.dtype if parameter.requires_grad else dtype)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model


def refuse_4bit_elsewhere(model: nn.Module, device: torch.device) -> None:
    """Raise InputError if any weight in 4-bit lies on another device, whose memory kernels would read by address."""
    found = {str(p.device) for p in model.parameters() if isinstance(p, Params4bit)} - {str(device)}
    if found:
        raise InputError(
            f"the model is 4-bit on {' and '.join(sorted(found))}, and the run is on {device}; load it there"
            + (", or set use_cpu" if found == {"cpu"} else "")
        )


def load_tokenizer(model, config: ModelFields):
    """The tokenizer of a model, by its name or where it was loaded from; of an adapter, its base's.

    One on the hub is of the revision that model_init_kwargs names.
    """
    loading = of_the_hub(config)
    name = model if isinstance(model, str) else model.name_or_path
    if is_adapter(name) and not (Path(name) / "tokenizer_config.json").is_file():
        name = PeftConfig.from_pretrained(name).base_model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code, **loading)
    except Exception as error:  # also a plain Exception, of a file that is no tokenizer's
        raise InputError(f"no tokenizer comes with {name!r} ({in_a_line(error)}); pass one as tokenizer=") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = template_of_processor(str(name), **loading)
    return reading_texts(tokenizer)
