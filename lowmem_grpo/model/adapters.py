"""Several adapters by name on one base, of which its layers wear one at a time, or none."""

import contextlib
import copy
import inspect
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import (
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_grpo.config.sections import AdapterFields
from lowmem_grpo.errors import InputError, did_you_mean, in_a_line, shown
from lowmem_grpo.model.experts import are_packed, experts_of, weight_names
from lowmem_grpo.model.head_8bit import head_path

# Starts of LoRA that leave the base as it is: the others of PEFT's take from its weights what the adapter starts with.
KEEP_THE_BASE = (True, False, "gaussian", "orthogonal")
# Leaves the base, too, and starts with what PEFT's initialize_lora_eva_weights() reads from data, which a run does not.
STARTS_FROM_DATA = "eva"
# Fields of a LoraConfig that a run obeys. One that is set and not named here would train, or save, something else.
OBEYED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias",
    "target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform",
    "layers_pattern", "use_dora", "bias", "init_lora_weights", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "megatron_core", "runtime_config", "ensure_weight_tying",
}  # fmt: skip


class Adapters:
    """The adapters of a model, and which of them its layers wear.

    PEFT's set_adapter and disable_adapter switch off the gradients of every adapter that is not worn, for good, and say
    nothing. So neither is called: here each adapter asks for gradients always, and gets one where a forward wore it.

    Attributes:
        layers: all that carry an adapter, and PEFT's wrappers around modules that are trained whole.
    """

    def __init__(self, model: PeftModel):
        self.model = model
        self._settle((active_adapter(model),))

    def _settle(self, names: tuple[str, ...]) -> None:
        """List the layers that PEFT has made, have each wear these names, and ask for gradients."""
        self.layers = tuned_layers(self.model)
        self._wear(names)
        self.model.set_requires_grad(list(self.model.peft_config))

    @property
    def worn(self) -> tuple[str, ...]:
        """The names that every layer wears now: one, or none where the base computes alone."""
        layer = self.layers[0]
        return () if layer.disable_adapters else tuple(layer.active_adapters)

    @contextlib.contextmanager
    def wearing(self, names: tuple[str, ...]) -> Iterator[None]:
        """Have every layer wear these adapters inside the `with`, and afterwards what it wore before."""
        before = self.worn
        self._wear(names)
        try:
            yield
        finally:
            self._wear(before)

    def _wear(self, names: tuple[str, ...]) -> None:
        for layer in self.layers:  # past nn.Module.__setattr__, which looks each name up among parameters and modules
            vars(layer).update(_disable_adapters=not names, _active_adapter=list(names))

    def config_of(self, name: str) -> LoraConfig:
        """The PEFT configuration of an adapter. Raise InputError where there is none of that name."""
        configs: dict[str, Any] = self.model.peft_config
        if name not in configs:
            raise InputError(f"there is no adapter {name!r}; there are {', '.join(configs)}")
        return configs[name]

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The trained parameters of an adapter, under the model's names and in the model's order."""
        self.config_of(name)
        own = {
            id(parameter)
            for layer in self.layers
            for by_name in layer.children()
            if isinstance(by_name, nn.ModuleDict | nn.ParameterDict)
            for path, parameter in by_name.named_parameters()
            if path.split(".")[0] == name
        }
        return {path: p for path, p in self.model.named_parameters() if p.requires_grad and id(p) in own}

    def add(self, name: str, config: LoraConfig) -> None:
        """Put one more adapter on the base, in fp32, without wearing it.

        Raises:
            InputError: the name is taken or no module's, or PEFT cannot add such an adapter to this base as it is.
        """
        if not re.fullmatch(r"\w+", name) or name in dir(nn.ModuleDict):
            raise InputError(
                f"adapter {name!r}: a name is letters, digits and _, and none that modules have; rename it"
            )
        if name in self.model.peft_config:
            raise InputError(f"adapter {name!r}: there is one of that name; choose another")
        refuse_config(config)
        if self._asks_for_the_head(config):
            raise InputError("the head is shared by all adapters; leave lm_head out of target_modules, modules_to_save")
        config = _fitted(config, self.model.get_base_model())
        worn = self.worn
        try:
            with expected_warnings_off():
                self.model.add_adapter(name, config)
        except ValueError as error:
            raise InputError(f"no adapter could be added: {error}") from error
        finally:
            self._settle(worn)

    def _asks_for_the_head(self, config: LoraConfig) -> bool:
        head = head_path(self.model.get_base_model())
        matched = config.target_modules not in (None, "all-linear") and check_target_module_exists(config, head)
        return bool(matched) or head.endswith(tuple(config.modules_to_save or ()))

    def copy(self, name: str, values_of: str) -> None:
        """Give an adapter the values of another one of the same configuration."""
        values = get_peft_model_state_dict(self.model, adapter_name=values_of)
        set_peft_model_state_dict(self.model, values, adapter_name=name)


def tuned_layers(model: nn.Module) -> list[Any]:
    """Modules that carry an adapter, and PEFT's wrappers around modules that are trained whole."""
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def active_adapter(model: PeftModel) -> str:
    """The name of the adapter that a model's layers wear, or would wear if they were not switched off.

    The model's own active_adapter is another one where base_model.set_adapter() was called past it.

    Raises:
        InputError: the layers wear several, or none that there is.
    """
    names = [*dict.fromkeys(name for layer in tuned_layers(model) for name in layer.active_adapters)]
    if model.active_adapter not in model.peft_config:  # it was deleted
        names = []
    if len(names) > 1:
        raise InputError(f"the model has the adapters {', '.join(names)} active at once; activate the one to train")
    if not names or names[0] not in model.peft_config:
        raise InputError("no adapter of the PeftModel is active; activate the one to train with set_adapter()")
    return names[0]


def refuse_state(model: PreTrainedModel | PeftModel) -> None:
    """Raise InputError where a loaded model's adapters are in a state that cannot be trained, or saved as it is."""
    layers = tuned_layers(model)
    if not isinstance(model, PeftModel):
        if layers:
            raise InputError(
                "the model has an adapter in its layers and is no PeftModel; load its base anew, and continue the "
                "adapter with PeftModel.from_pretrained(base, folder)"
            )
        return
    for name, config in model.peft_config.items():
        refuse_config(config, "the model's adapter" + ("" if len(model.peft_config) == 1 else f" {name!r}"), new=False)
    others = [type(layer) for layer in layers if not isinstance(layer, LoraLayer | AuxiliaryTrainingWrapper)]
    if others:  # made before, by a configuration that the PeftModel does not know; PEFT would not save it
        raise InputError(f"the model has a {others[0].__module__}.{others[0].__name__} beside LoRA; load its base anew")
    merged = [name for layer in layers for name in getattr(layer, "merged_adapters", ())]
    if merged:
        # unmerge_adapter() gives back a base that is rounded, and in 4-bit another one.
        raise InputError(
            f"the adapter {merged[0]!r} is merged into the base; load the base anew, without merge_adapter()"
        )
    active_adapter(model)
    _refuse_scales(model)


def _refuse_scales(model: PeftModel) -> None:
    """Raise InputError where a layer scales an adapter otherwise than its configuration, which is what is saved."""
    for path, layer in model.get_base_model().named_modules():
        scales = layer.scaling if isinstance(layer, LoraLayer) else {}
        for name in scales.keys() & model.peft_config.keys():  # PEFT may leave the scale of one that was deleted
            scale, by_config = scales[name], scale_of(model.peft_config[name], path)
            if not math.isclose(scale, by_config, rel_tol=1e-6):
                raise InputError(
                    f"{path} scales the adapter {name!r} by {scale:g}, and its configuration by {by_config:g}, which "
                    "is what would be saved; make it with that lora_alpha, without set_scale() or scale_layer()"
                )


def scale_of(config: Any, path: str) -> float:
    """The factor of an adapter in a layer, by its configuration: lora_alpha / r, or with rslora / sqrt(r)."""
    path = path.removesuffix(".base_layer")  # LoRA on a module's parameter may be around another
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def refuse_config(config: PeftConfig | None, what: str = "peft_config", *, new: bool = True) -> None:
    """Raise InputError if an adapter's configuration, which `what` names, asks for what is not trained here.

    With new=False it is of an adapter that was trained before, and has its values.
    """
    if config is None:
        return
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:  # AdaLoraConfig is a LoraConfig
        raise InputError(f"{what} is a {type(config).__name__}; only LoraConfig is supported")
    if config.bias != "none":
        raise InputError(f"{what} trains biases, which bitsandbytes rounds to the compute dtype; set bias='none'")
    patterns: Any = config.alpha_pattern
    for alpha in (config.lora_alpha, *(patterns.values() if isinstance(patterns, dict) else ())):
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise InputError(f"{what} has a lora_alpha of {shown(alpha)}; make it a finite number")
    if not isinstance(config.lora_dropout, int | float) or not 0 <= config.lora_dropout < 1:
        raise InputError(f"{what} has lora_dropout={shown(config.lora_dropout)}; make it at least 0 and less than 1")
    start: Any = config.init_lora_weights
    if start not in KEEP_THE_BASE and not (start == STARTS_FROM_DATA and not new):
        remedy = "leave it at True" if new else "convert it to plain LoRA, as PEFT's documentation of it says"
        if start == STARTS_FROM_DATA:
            raise InputError(f"{what} has init_lora_weights={start!r}, which takes from data; {remedy}")
        raise InputError(
            f"{what} has init_lora_weights={start!r}, which takes from the base, which is the reference; {remedy}"
        )
    plain = LoraConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in OBEYED and value and value != getattr(plain, field.name, None):
            raise InputError(f"{what} sets {field.name}, which is not supported; leave it out")


def lora_config(config: AdapterFields) -> LoraConfig:
    """The LoraConfig of the config's lora fields."""
    return LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules, task_type="CAUSAL_LM",
    )  # fmt: skip


def refuse_fields(config: AdapterFields, base: nn.Module) -> None:
    """Raise InputError where lora_target_modules names what a base lacks, or lora_r is above its dimensions.

    LoRA's product has no higher rank than the layer that it is added to.
    """
    paths = [path for path, _ in base.named_modules()]
    names = config.lora_target_modules if isinstance(config.lora_target_modules, list) else []
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            leaves = {path.rpartition(".")[2] for path in paths}
            hint = did_you_mean(name, leaves, "all-linear takes every linear layer")
            if are_packed(base):
                hint = "the experts of a mixture in 4 bits get no adapter, and all-linear takes every linear layer"
            raise InputError(f"lora_target_modules has {shown(name)}, and no module of the model ends so; {hint}")
    largest = max((max(weight.shape) for weight in base.parameters() if weight.dim() == 2), default=config.lora_r)
    if config.lora_r > largest:
        raise InputError(f"lora_r={config.lora_r} is above {largest}, the model's largest dimension; lower it")


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """The model with an adapter of a configuration, which is left as it is. Raise InputError where PEFT refuses."""
    peft_config = _fitted(peft_config, model)
    refuse_whole_in_4bit(model, peft_config)
    with expected_warnings_off():
        try:
            return get_peft_model(model, peft_config)
        except Exception as error:  # whatever PEFT raises on patterns that are none, modules that are numbers
            what = in_a_line(error).rstrip("(. ")  # of a module, PEFT writes out all that is in it
            raise InputError(f"no adapter could be added: {what}; name linear layers as the target modules") from error


def _fitted(config: Any, model: nn.Module) -> Any:
    """A copy of an adapter's configuration, since PEFT writes into it, without the layers that it cannot be on."""
    config = copy.deepcopy(config)
    _leave_experts_out(config, model)
    config.task_type, config.inference_mode = config.task_type or "CAUSAL_LM", False
    _exclude_unfit(model, config)
    return config


def is_trained_whole(name: str, config: Any) -> bool:
    """Tell whether a parameter is of a module in modules_to_save, which PEFT finds by the end of its path.

    So "norm" is every layer's input_layernorm too.
    """
    steps, ends = name.split("."), tuple(one for one in config.modules_to_save or () if isinstance(one, str))
    return any(".".join(steps[:place]).endswith(ends) for place in range(1, len(steps)))


def refuse_whole_in_4bit(model: nn.Module, config: Any) -> None:
    """Raise InputError where a layer in 4 bits, which has no gradient, would be trained whole."""
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit) and is_trained_whole(f"{path}.weight", config):
            raise InputError(
                f"modules_to_save has {path}, which is held in 4 bits and so cannot be trained whole; name it in "
                "target_modules, or set load_in_4bit to False"
            )


def _exclude_unfit(model: Any, config: Any) -> None:
    """Leave out of all-linear the layers that LoRA cannot be added to, or does nothing in, by their names.

    PEFT refuses some projections of models with a state, which a kernel reads past their forward: `out_proj` of Mamba.
    A router may be a linear layer by its class, and give more than its product. What chooses the tokens that a sparse
    attention sees has no gradient.
    """
    if config.target_modules != "all-linear":
        return
    linears = {
        path.rpartition(".")[2]: module for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    unfit = sorted(name for name, module in linears.items() if not _takes_adapter(name, module, model, config))
    unfit += sorted(set(_without_gradient(model)))
    excluded = config.exclude_modules or []
    if unfit and isinstance(excluded, str):
        config.exclude_modules = f"(?:{excluded})|.*\\.(?:{'|'.join(map(re.escape, unfit))})"
    elif unfit:
        config.exclude_modules = {*excluded, *unfit}


def _without_gradient(model: nn.Module) -> Iterator[str]:
    """The ends of paths of linear layers in modules whose forward is under no_grad, such as indexer.wq_b."""
    for path, module in model.named_modules():
        if _is_under_no_grad(type(module)):
            place = path.rpartition(".")[2]
            yield from (f"{place}.{name}" for name, part in module.named_modules() if isinstance(part, nn.Linear))


@cache
def _is_under_no_grad(kind: type) -> bool:
    forward: Any = kind.forward  # type: ignore[attr-defined] # a module's
    if not hasattr(forward, "__wrapped__"):
        return False
    try:
        decorators = inspect.getsource(forward).partition("def ")[0]
    except (OSError, TypeError):  # of code that came without its source
        return False
    return "no_grad" in decorators


def _takes_adapter(name: str, linear: Any, model: Any, config: PeftConfig) -> bool:
    """Whether PEFT adapts modules of this name in a model, and one of them gives a product and nothing else."""
    check = getattr(LoraModel, "_check_target_module_compatiblity", None)
    try:
        if check is not None:
            check(cast(Any, None), config, model, name)
    except ValueError:
        return False
    if isinstance(linear, Linear4bit) or type(linear).forward is nn.Linear.forward:
        return True
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            return isinstance(linear(linear.weight.new_zeros(1, linear.in_features)), Tensor)
    except Exception:  # of a forward that wants more than an input
        return False


def _leave_experts_out(peft_config: Any, model: nn.Module) -> None:
    """Have an adapter leave the experts out that are in 4 bits.

    PEFT takes gate_proj and the like, and with all-linear the router too, for parameters of a mixture's experts, which
    were linear layers before transformers 5; it adds the product of LoRA to all of such a parameter.

    Raises:
        InputError: the configuration names experts.
    """
    if not are_packed(model):
        return
    given, asked = set(peft_config.target_parameters or ()), peft_config.target_modules
    converted = copy.deepcopy(peft_config)
    with contextlib.suppress(Exception):  # of patterns that are none, which PEFT refuses later
        convert_peft_config_for_transformers(converted, model, None)
    if asked == "all-linear" and not given and _of_experts(converted, model):
        peft_config.target_modules = sorted(converted.target_modules)
    else:
        refuse_on_experts(converted, model)


def refuse_on_experts(peft_config: Any, model: nn.Module) -> None:
    """Raise InputError where an adapter is on the experts of a mixture, which is to have them in 4 bits."""
    named = _of_experts(peft_config, model)
    if named:
        raise InputError(
            f"the adapter is to change {named[0]} of the experts, which in 4 bits have none; name the linear layers of "
            "attention, such as q_proj, or set load_in_4bit=False"
        )


def _of_experts(peft_config: Any, model: nn.Module) -> list[str]:
    """Names of parameters of experts that an adapter is on."""
    weights = {name for _, experts in experts_of(model) for name in weight_names(experts)}
    return sorted(name for name in peft_config.target_parameters or () if name.rpartition(".")[2] in weights)


@contextlib.contextmanager
def expected_warnings_off() -> Iterator[None]:
    """Silence two warnings of peft, where nothing is wrong.

    It reads a name that transformers has given up, and it wants exclude_modules to match something, as those that a
    file has do in the model that has its towers.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"You have passed exclude_modules=.*\(\?:\\\.\.\*\)\? but no modules")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield
