"""Several adapters by name on one base, of which its layers wear one at a time, or none."""

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lowmem_grpo.errors import InputError

# Starts of LoRA that leave the base as it is: the others of PEFT's take from its weights what the adapter starts with.
KEEP_THE_BASE = (True, False, "gaussian", "orthogonal")


class Adapters:
    """The adapters of a model, and which of them its layers wear.

    PEFT's set_adapter and disable_adapter switch off the gradients of every adapter that is not worn, for good, and say
    nothing. So neither is called: here each adapter asks for gradients always, and gets one where a forward wore it.

    Attributes:
        layers: all that carry an adapter, and PEFT's wrappers around modules that are trained whole.
    """

    def __init__(self, model: PeftModel):
        self.model = model
        self._settle((str(model.active_adapter),))

    def _settle(self, names: tuple[str, ...]) -> None:
        """List the layers that PEFT has made, have each wear these names, and ask for gradients."""
        kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
        self.layers: list[Any] = [layer for layer in self.model.modules() if isinstance(layer, kinds)]
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
        if config.init_lora_weights not in KEEP_THE_BASE:
            raise InputError(
                f"init_lora_weights={config.init_lora_weights!r} takes from the base, which all adapters share; "
                "leave it at True"
            )
        if self._asks_for_the_head(config):
            raise InputError("the head is shared by all adapters; leave lm_head out of target_modules, modules_to_save")
        config = copy.copy(config)  # the caller's is left as it is
        config.task_type, config.inference_mode = config.task_type or "CAUSAL_LM", False
        worn = self.worn
        try:
            self.model.add_adapter(name, config)
        except ValueError as error:
            raise InputError(f"no adapter could be added: {error}") from error
        finally:
            self._settle(worn)

    def _asks_for_the_head(self, config: LoraConfig) -> bool:
        base: Any = self.model.get_base_model()
        head = next(path for path, module in base.named_modules() if module is base.get_output_embeddings())
        matched = config.target_modules not in (None, "all-linear") and check_target_module_exists(config, head)
        return bool(matched) or head.endswith(tuple(config.modules_to_save or ()))

    def copy(self, name: str, values_of: str) -> None:
        """Give an adapter the values of another one of the same configuration."""
        values = get_peft_model_state_dict(self.model, adapter_name=values_of)
        set_peft_model_state_dict(self.model, values, adapter_name=name)


def refuse_config(config: PeftConfig | None, what: str = "peft_config") -> None:
    """Raise InputError if an adapter's configuration, which `what` names, asks for what is not trained here."""
    if config is not None and not isinstance(config, LoraConfig):
        raise InputError(f"{what} is a {type(config).__name__}; only LoraConfig is supported")
    if config is not None and config.bias != "none":
        raise InputError(f"{what} trains biases, which bitsandbytes rounds to the compute dtype; set bias='none'")
