"""Linear layers whose weights a model reads past their forwards, which in 4 bits are bytes: found by running it.

Mamba 1 multiplies by `dt_proj.weight` itself, and Gemma 3n clamps that of `prediction_coefs`.
"""

import contextlib
import copy
import inspect
import re
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lowmem_grpo.model.attention import Silent, attending, configs_of, laid_out, refusal
from lowmem_grpo.model.experts import experts_of
from lowmem_grpo.model.mixing import install

Kind = tuple[type, str]  # of the module that a layer is in, and the layer's name there


def read_past_forward(model: Any) -> list[str]:
    """Names of a model's linear layers whose weights are read by more than their own forwards, adapters left out.

    Where its code names such a weight at all, a copy without memory runs two tokens, in training mode and then without:
    code for a GPU's kernels, which is not run here, names some that it never reads here. Where the copy cannot go on,
    what it has read by then counts; a layer of another's kind is as that is. The model may have no weights yet, and
    stays as it is.
    """
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear and "lora_" not in name]
    files = {type(module).__module__ for module in model.modules()}
    named = {name for file in files if not file.startswith("torch.") for name in _weights_named(file)}
    kinds = {name: kind_of(model, name) for name in linears}
    if not any(child in named for _, child in kinds.values()):
        return []
    read: set[Kind] = set()
    # The device is that of tensors which layers make; transformers asks amid a load, where it is "meta".
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), torch.no_grad():
        few = _without_memory(model)
        for name in linears:
            few.get_submodule(name).__class__ = _noting(kinds[name], read)
        for training in (True, False):
            with contextlib.suppress(Exception):  # of foreign code where tensors have no memory
                _run(few.train(training))
    return [name for name, kind in kinds.items() if kind in read]


@cache
def _weights_named(file: str) -> frozenset[str]:
    """Names of modules whose weight a file of Python asks an object for, as `x` of self.x.weight."""
    try:
        source = inspect.getsource(sys.modules[file])
    except (KeyError, OSError, TypeError):  # of code that came without its source
        return frozenset()
    return frozenset(re.findall(r"\.(\w+)\.weight\b", source))


def kind_of(model: nn.Module, name: str) -> Kind:
    """The class of the module that a layer is in, and the layer's name there."""
    parent, _, child = name.removesuffix(".base_layer").rpartition(".")  # PEFT's, which has an adapter around it
    return type(model.get_submodule(parent)), child


def _noting(kind: Kind, read: set[Kind]) -> type[nn.Linear]:
    """A class of linear layers that note in `read` who asks for their weight."""

    class Noting(nn.Linear):
        @property
        def weight(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]: of a parameter
            read.add(kind)
            return self._parameters["weight"]

        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self._parameters["weight"], self.bias)  # type: ignore[arg-type] # no layer has none

    return Noting


def _without_memory(model: nn.Module) -> Any:
    """A copy of a model whose tensors have a shape and no memory, under a FakeTensorMode."""
    fakes: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), requires_grad=False)
        for parameter in model.parameters()
    }
    fakes |= {id(buffer): torch.empty(buffer.shape, dtype=buffer.dtype) for buffer in model.buffers()}
    return copy.deepcopy(model, fakes)


def _run(model: Any) -> None:
    """Run two tokens through a decoder whose attention and experts compute nothing."""
    for _, experts in experts_of(model):
        experts.forward = _same
    install(model)  # layers with a state do not take kernels for the whole layer
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with contextlib.ExitStack() as stack:
        if refusal(model) is None:
            stack.enter_context(attending(configs_of(model)))
            stack.enter_context(laid_out(Silent()))
        model.get_decoder()(input_ids=ids, position_ids=ids, use_cache=False)


def _same(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden
