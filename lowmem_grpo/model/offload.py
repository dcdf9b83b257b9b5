"""Ways to need less GPU memory for more time, each a setting that load_policy() applies to the model."""

import contextlib
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_grpo.errors import InputError, in_a_line
from lowmem_grpo.model.checkpointing import Contexts, by_torch
from lowmem_grpo.model.experts import dense_weights, experts_of
from lowmem_grpo.model.head_8bit import are_one

TILE_TOKENS = 1024  # 6 x 2 x F bytes each in a bf16 MLP of width F: 222 MiB at 18,944, and 130 MiB for its weight
LEAST_BYTES = 2**20  # what is smaller stays: a copy takes longer than it is worth
LIGERS_ACTIVATIONS = {
    "LigerSwiGLUMLP": F.silu, "LigerPhi3SwiGLUMLP": F.silu, "LigerGEGLUMLP": partial(F.gelu, approximate="tanh"),
}  # fmt: skip
GATED = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}, {"fc1", "fc2"})


def tile_mlps(decoder: nn.Module, again: Contexts) -> None:
    """Compute each layer's MLP TILE_TOKENS rows at a time, and again in the backward: its rows are independent.

    Only one tile's intermediates exist at a time, for the input and the output of the whole. again() makes, in a tile's
    forward, the context of its recomputation.

    Raises:
        InputError: a layer's MLP is not a plain one.
    """
    for layer in _layers(decoder):
        mlp = getattr(layer, "mlp", None)
        if mlp is None or not any(names <= {name for name, _ in mlp.named_children()} for names in GATED):
            raise InputError(f"tiled_mlp does not know the MLP of {type(layer).__name__}; leave tiled_mlp out")
        mlp.forward = _Ours(_tiled(mlp.forward, by_torch(again)))


def _tiled(forward: Callable[[Tensor], Tensor], checkpoint: Callable) -> Callable[[Tensor], Tensor]:
    def tiled(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) <= TILE_TOKENS:
            return forward(x)
        tiles = rows.split(TILE_TOKENS)
        if torch.is_grad_enabled():
            out = [checkpoint(forward, tile) for tile in tiles]
        else:
            out = [forward(tile) for tile in tiles]
        return torch.cat(out).view(*x.shape[:-1], -1)

    return tiled


def offload_embedding(model: Any) -> None:
    """Keep embeddings of token ids in pinned CPU memory: a step looks up a few thousand of their rows.

    Each lookup waits for the ids to come to the CPU, also in every step of sampling.

    Raises:
        InputError: as refuse_offload() does.
    """
    refuse_offload(model)
    for table in token_embeddings(model):
        _move_to_cpu(table, model.get_output_embeddings().weight.device)


def refuse_offload(model: Any) -> None:
    """Raise InputError where a model's only embedding is its head too, or not a plain one, as with an adapter."""
    embedding: Any = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        kind = f"{type(embedding).__module__}.{type(embedding).__name__}"
        raise InputError(f"offload_embedding does not know {kind}; leave offload_embedding out")
    if not token_embeddings(model):
        raise InputError(
            "offload_embedding: the embedding of this model is its head too, which stays on the GPU; leave "
            "offload_embedding out"
        )


def token_embeddings(model: Any) -> list[nn.Embedding]:
    """The frozen embeddings with a row for about each token, but for one that is the head too.

    They are the input's, and such as Gemma 4 E's, which gives each token a vector for each layer. There are none where
    the input's is not a plain one, as with an adapter.
    """
    embedding: Any = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        return []
    least = embedding.num_embeddings / 2  # positions are fewer
    head = getattr(model.get_output_embeddings(), "weight", None)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [
        table
        for table in tables
        if table.num_embeddings >= least and not table.weight.requires_grad and not are_one(table.weight, head)
    ]


def _move_to_cpu(table: nn.Embedding, device: torch.device) -> None:
    """Compute a lookup on the CPU, whatever it does besides; its result comes to a device."""
    rows = table.weight.data.cpu()
    table.weight.data = rows.pin_memory() if device.type == "cuda" else rows
    _move_buffers(table, torch.device("cpu"))  # such as a scale, which multiplies the rows where they are
    own = table.forward
    vars(table)["forward"] = _Ours(lambda ids: own(ids.cpu()).to(device, non_blocking=True))


def _move_buffers(layer: nn.Module, device: torch.device) -> None:
    """Put moved buffers in a layer's own place: what else holds one of them keeps it where it was."""
    for name, buffer in layer.named_buffers(recurse=False):
        layer._buffers[name] = buffer.to(device)


class _Ours:
    """A layer's forward that this module has replaced, which undo() takes away."""

    def __init__(self, forward: Callable[..., Tensor]):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward(*args, **kwargs)


def undo(model: Any) -> None:
    """Take back tiled MLPs, an offloaded embedding and Liger's kernels of a model that was loaded before."""
    for layer in model.modules():
        if isinstance(vars(layer).get("forward"), _Ours):
            _take_back(layer)
            device = model.get_output_embeddings().weight.device
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            _move_buffers(layer, device)


def _take_back(layer: Any) -> None:
    """Give a layer its own forward back, and the names that Liger has replaced with it."""
    del layer.forward
    for name in ("_get_name", "extra_repr"):
        vars(layer).pop(name, None)


@dataclass(eq=False)
class Away:
    """A tensor in CPU memory, on its way back when it is asked for."""

    copy: Tensor
    copied: Any  # the event after which copy is whole
    before: Callable[[], "Away | None"]  # the one that was sent before it, which is asked for after it
    back: tuple[Tensor, Any] | None = None  # on the device again, and the event after which it is whole
    fetched: bool = False


class Offloading:
    """Sends the saved input of each checkpointed layer to the CPU; the backward brings it back.

    Copies have a stream of their own, ahead of their use: when one layer's input is asked for, the next one's is on its
    way. Without CUDA there are no streams, which only serves to test it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.going: deque[tuple[Tensor, Any]] = deque()  # inputs and the events after which they may be written over
        self.last: Callable[[], Away | None] = lambda: None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.last = lambda: None
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._send, self._fetch):
                yield
        finally:
            self._let_go(but=0)

    def _send(self, tensor: Tensor) -> Tensor | Away:
        # Positions and masks, which all layers share, ask for no gradient; neither does the embedding's result.
        if not tensor.requires_grad or tensor.is_leaf or tensor.nbytes < LEAST_BYTES:
            return tensor
        copy = torch.empty_like(tensor, device="cpu", pin_memory=self.stream is not None, requires_grad=False)
        with self._aside():
            copy.copy_(tensor.detach(), non_blocking=True)
        away = Away(copy, self._event(), self.last)
        self.going.append((tensor.detach(), away.copied))
        self._let_go(but=1)
        self.last = weakref.ref(away)
        return away

    def _let_go(self, but: int) -> None:
        """Let the sent inputs go, but for the last ones, once their copies are whole.

        record_stream would give their memory back only when the host sees that, which runs far ahead of the GPU: by
        then the forward would have taken new memory for every layer.
        """
        while len(self.going) > but:
            _, copied = self.going.popleft()
            if self.stream is not None:
                torch.cuda.current_stream(self.device).wait_event(copied)

    def _fetch(self, kept: Tensor | Away) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        tensor, whole = kept.back or self._bring(kept)
        kept.back, kept.fetched = None, True
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(whole)
        following = kept.before()
        if following is not None and not following.fetched:
            following.back = following.back or self._bring(following)
        return tensor

    def _bring(self, away: Away) -> tuple[Tensor, Any]:
        tensor = torch.empty_like(away.copy, device=self.device, pin_memory=False)  # of the memory that layers use
        with self._aside():
            if self.stream is not None:
                self.stream.wait_event(away.copied)
            tensor.copy_(away.copy, non_blocking=True)
        return tensor, self._event()

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def _event(self) -> Any:
        return None if self.stream is None else self.stream.record_event()


def use_liger_kernels(model: Any) -> None:
    """Have Liger's kernels compute a model's norms, rotary embedding and gated MLPs; its head stays as it is.

    Liger replaces names in transformers' module, too, which every model of the family there reads. They are put back,
    and a rotary embedding is Liger's only while this model attends.

    Raises:
        InputError: liger-kernel is not installed, does not know the model, or knows its MLP with another activation.
    """
    try:
        from liger_kernel.transformers.monkey_patch import (
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except ImportError as error:
        raise InputError("use_liger_kernel needs the package liger-kernel; install it, or leave it out") from error
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(f"liger-kernel does not know {model.config.model_type!r} models; leave use_liger_kernel out")
    names = vars(sys.modules[type(model).__module__])
    names_before = dict(names)
    forwards = {layer: vars(layer).get("forward") for layer in model.modules()}
    try:
        _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    except Exception as error:  # of what liger-kernel imports, or looks for in a tower that is set aside
        names.update(names_before)
        raise InputError(
            f"liger-kernel cannot change a {model.config.model_type!r} model: {in_a_line(error)}; leave "
            "use_liger_kernel out"
        ) from error
    rotary = {name: names[name] for name in names_before if "rotary" in name and names[name] is not names_before[name]}
    names.update(names_before)
    for layer, before in forwards.items():
        if vars(layer).get("forward") is not before:
            layer.forward = _Ours(layer.forward)
    for _, experts in experts_of(model):
        if not dense_weights(experts) and "forward" in vars(experts):
            _take_back(experts)  # Liger's reads parameters that are not there
    for name, layer in model.named_modules():
        if name.endswith("self_attn"):
            layer.forward = _Ours(_reading(rotary, names, layer.forward))
    _refuse_other_activations(model)


def _reading(others: dict[str, Any], names: dict[str, Any], forward: Callable) -> Callable:
    """A forward that finds others among the names of its module, where everybody else finds what is there."""

    def forward_with_others(*args: Any, **kwargs: Any) -> Any:
        before = {name: names[name] for name in others}
        names.update(others)
        try:
            return forward(*args, **kwargs)
        finally:
            names.update(before)

    return forward_with_others


def _refuse_other_activations(model: Any) -> None:
    """Raise InputError if a gated MLP has another activation than Liger's kernel, which does not ask."""
    x = torch.linspace(-8, 8, 101)
    for layer in model.modules():
        theirs = LIGERS_ACTIVATIONS.get(layer._get_name())  # which Liger has renamed
        ours = getattr(layer, "act_fn", getattr(layer, "activation_fn", None))
        if theirs is not None and ours is not None and not torch.allclose(ours(x), theirs(x), atol=1e-6):
            undo(model)
            raise InputError("liger-kernel has another activation than this model's MLPs; leave use_liger_kernel out")


def _layers(decoder: nn.Module) -> nn.ModuleList:
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"{type(decoder).__name__} has no list of layers; leave tiled_mlp out")
    return layers
