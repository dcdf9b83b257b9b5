"""from_pretrained into 4 bits, experts included: tensor by tensor, and where a checkpoint has experts apart one by one.

transformers asks a quantizer how a checkpoint's tensors become the model's. Its own for bitsandbytes leaves experts in
16 bits, whichever form the checkpoint has; its own for MXFP4 needs a package of kernels, or makes 16 bits of them.
"""

import contextlib
import copy
import os
import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from lowmem_grpo.errors import InputError, in_a_line
from lowmem_grpo.model.experts import (
    NAME,
    Mxfp4Stack,
    dense_weights,
    empty_stack,
    experts_of,
    install,
    keep_from_files,
    lay_out,
    packed_name,
    weight_names,
)
from lowmem_grpo.model.past_forward import read_past_forward

MXFP4, BITSANDBYTES = "mxfp4", "bitsandbytes"  # how a checkpoint may be quantized
# Of the environment: with it, transformers' threads do not read a quantized checkpoint ahead, without a limit.
ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"

# Before transformers 5.21 a pattern of gate_up_proj finds gate_up_proj_bias, too; from then on it says this itself.
NAME_ENDS = r"(?!\w)" if Version(transformers.__version__) < Version("5.21") else ""


def quantized_by(found: PreTrainedConfig) -> dict[str, Any]:
    """How a configuration says that its checkpoint is quantized; empty where it is not."""
    saved: Any = getattr(found, "quantization_config", None) or {}
    return saved if isinstance(saved, dict) else saved.to_dict()


def lay_out_4bit(model: Any, found: PreTrainedConfig) -> None:
    """Give a model without weights experts in the 4 bits that a checkpoint with the configuration `found` has."""
    lay_out(model, mxfp4=quantized_by(found).get("quant_method") == MXFP4)


class FourBits(BitsAndBytesConfig):
    """bitsandbytes' configuration for a checkpoint that has nothing in 4 bits, its linear layers, or its experts."""

    def __init__(self, plain: BitsAndBytesConfig, saved: str = ""):
        vars(self).update(vars(plain))
        self.quant_method, self.plain, self.saved = NAME, plain, saved  # type: ignore[assignment] # which is no enum's


def in_4bit(found: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for from_pretrained of a checkpoint with the configuration `found`, quantized or not."""
    saved = quantized_by(found)
    method = str(saved.get("quant_method", ""))
    plain: Any
    if method == BITSANDBYTES:
        plain = BitsAndBytesConfig.from_dict(saved)
    else:
        plain = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    if not saved:
        return {"quantization_config": FourBits(plain)}
    bare: Any = copy.deepcopy(found)
    del bare.quantization_config  # or transformers would choose the quantizer by it
    return {"config": bare, "quantization_config": FourBits(plain, method)}


@contextlib.contextmanager
def reading_as_before() -> Iterator[None]:
    """Undo, after the `with`, that tensors are read one by one."""
    before = os.environ.get(ONE_BY_ONE)
    try:
        yield
    finally:
        os.environ.pop(ONE_BY_ONE, None)
        if before is not None:
            os.environ[ONE_BY_ONE] = before


class Quantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer of bitsandbytes for linear layers, with experts beside them."""

    quantization_config: FourBits

    def __init__(self, quantization_config: FourBits, **kwargs: Any):
        kwargs["pre_quantized"] = quantization_config.saved == BITSANDBYTES
        super().__init__(quantization_config, **kwargs)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of a number, by which memory is taken before the load."""
        path, _, name = param_name.rpartition(".")
        if name in weight_names_of(model.get_submodule(path)):
            return 0.5
        return super().param_element_size(model, param_name, param)

    def get_modules_to_not_convert(self, model: Any, *given: Any, **settings: Any) -> list[str]:  # type: ignore[override]
        """transformers' own, and layers of which 4 bits would be read as if they were a weight."""
        own = super().get_modules_to_not_convert(model, *given, **settings)
        return own if self.pre_quantized else [*own, *read_past_forward(model)]

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        self.model_of = weakref.ref(model)  # which has the quantizer, too
        if any(experts_of(model)):
            os.environ[ONE_BY_ONE] = "1"
        if self.quantization_config.saved == MXFP4:
            lay_out(model, mxfp4=True)

    def update_weight_conversions(self, weight_conversions: list, *given: Any) -> list:
        """transformers' conversions, of which those into experts' parameters end in packed bytes.

        Given is the model; before transformers 5.21 nothing is.
        """
        found = super().update_weight_conversions(weight_conversions, *given)
        model: Any = self.model_of()
        if self.quantization_config.saved == MXFP4:
            ours = [
                WeightRenaming(f"{name}_{part}", f"{packed_name(name)}.{part}")
                for _, experts in experts_of(model)
                for name in weight_names(experts)
                for part in ("blocks", "scales")
            ]
            return [*dict(zip((str(one) for one in ours), ours, strict=True)).values(), *found]
        targets = [f"{path}.{name}" for path, experts in experts_of(model) for name in dense_weights(experts)]
        changed = [_packing(one) if _makes_one_of(targets, one) else one for one in found]
        endings = dict.fromkeys("." + ".".join(target.split(".")[-2:]) for target in targets)
        return changed + [Packing([re.escape(ending) + NAME_ENDS], [ending], [AsItIs()]) for ending in endings]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, Mxfp4Stack):
                module.fill_table()
        keep_from_files(model)
        # From here on it is a model of bitsandbytes' as any other.
        model.config.quantization_config = self.quantization_config.plain
        model.quantization_method = self.quantization_config.plain.quant_method
        return super()._process_model_after_weight_loading(model, **kwargs)


def weight_names_of(module: Any) -> tuple[str, ...]:
    """Names of the parameters of experts that are to be packed; none of a module that has no experts."""
    return tuple(dense_weights(module)) if dict(experts_of(module)).get("") is module else ()


class AsItIs(ConversionOps):
    """Leaves a checkpoint's tensor as it is."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Give back what is given."""
        return input_dict


def _makes_one_of(targets: list[str], conversion: Any) -> bool:
    if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
        return False
    return any(conversion.target_patterns[0] in target for target in targets)


def _packing(conversion: WeightConverter) -> "Packing":
    given = conversion._original_source_patterns, conversion._original_target_patterns
    packing = Packing(list(given[0]), list(given[1]), conversion.operations)
    packing.scope_prefix, packing.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return packing


class Packing(WeightConverter):
    """transformers' conversion into a parameter of experts, and from there into packed bytes, which it installs.

    Where the checkpoint has each expert apart, one at a time is read, converted and packed.
    """

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Any]:
        """Install the experts' packed bytes; nothing is left for transformers to do."""
        path, _, name = layer_name.rpartition(".")
        experts, waiting = model.get_submodule(path), dict(self.collected_tensors)
        expected, stack, first = tuple(experts._parameters[name].shape), None, 0
        turns = [waiting]
        if isinstance(self.operations[0], MergeModulelist) and self.operations[0].dim == 0:  # experts are apart
            wrong = {len(tensors) for tensors in waiting.values()} - {expected[0]}
            if wrong:
                loading_info.mismatched_keys.add((layer_name, (min(wrong), *expected[1:]), expected))
                return {}
            turns = [{pattern: [its[e]] for pattern, its in waiting.items()} for e in range(expected[0])]
        for given in turns:
            self.collected_tensors.update(given)
            dense = self._joined(layer_name, model, config)
            if not dense.is_floating_point():
                raise InputError(
                    "its experts are in 4 bits in a form that transformers 5 does not read; take its unquantized form"
                )
            found = (len(dense) * len(turns), *dense.shape[1:])
            if found != expected:
                loading_info.mismatched_keys.add((layer_name, found, expected))
                return {}
            stack = empty_stack(experts, name, dense.device) if stack is None else stack
            stack.pack(first, dense)
            first += len(dense)
            del dense
        assert stack is not None, "experts without a tensor"
        install(experts, name, stack)
        loading_info.missing_keys.discard(layer_name)
        return {}

    def _joined(self, layer_name: str, model: Any, config: Any) -> Tensor:
        """The tensors whose turn it is as some matrices of a parameter of experts."""
        try:
            (dense,) = super().convert(layer_name, model, config).values()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # transformers keeps them in a report, and names none of them in its error
            raise InputError(
                f"what it has of {layer_name} does not fit together ({in_a_line(error)}); take all files from one save"
            ) from error
        return dense[0] if isinstance(dense, list) else dense


register_quantization_config(NAME)(FourBits)
register_quantizer(NAME)(Quantizer)
