"""Checkpointed layers by their outline: a forward that keeps its input alone, and a backward without autograd.

By a model's own layers a small update on a GPU is the host's time: casts, views and launches, a few hundred a layer.
The outline (outline.py) says what they compute. Here it takes under half of the launches (bench_update --host), is
computed again up to the last product alone, which no gradient needs, and is differentiated by hand. Attention is left
to autograd, inside the layer's backward. A layer's adapters are cast to the compute dtype at once, twice a pass.

A layer that is not understood, or that a trial finds to be computed otherwise, is the model's own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lowmem_grpo.kernels import layer_pass
from lowmem_grpo.kernels.backend import switched_off
from lowmem_grpo.model.attention import Scoring, layout_in_force
from lowmem_grpo.model.lora import (
    Worn,
    adapters_of,
    computes_as_its_class,
    drops,
    every_module,
    foreach_copy,
    foreach_mul_,
    is_plain,
    matmul_in_fp32,
    worn_by,
)
from lowmem_grpo.model.outline import Layer, Product, Unknown, as_paired
from lowmem_grpo.model.packed_attention import Packed
from lowmem_grpo.model.product_4bit import product_of, weight_4bit

Tables = dict[int, tuple[Tensor, Tensor]]  # of cosines and sines, (T, rotary) each
WornByALayer = list[list[Worn | None]]  # by the linears of its qkv, out, gate_up and down


class Factors(NamedTuple):
    """Copies in the compute dtype of the adapters of linear layers that share their input."""

    a: Tensor  # (R, K), the first factors one below the other
    b: list[Tensor | None]  # (N, r) of each linear, None where it wears none
    ranks: list[int]  # 0 where it wears none
    scales: list[float]  # likewise


class Linears:
    """Linear layers that share their input, with the adapters that they wear."""

    def __init__(self, product: Product):
        self.linears, self.bases = product.linears, product.bases
        self.read_weights()

    def read_weights(self) -> None:
        """Have products and weights be of the bases' weights as they are now; a merge makes another of one."""
        self.held = [base.weight for base in self.bases]
        self.products = [product_of(base) for base in self.bases]
        self.weights = [
            weight_4bit(base) if type(base) is Linear4bit else lambda _, base=base: base.weight for base in self.bases
        ]

    def worn(self) -> list[Worn | None]:
        """The adapter that each wears, or None.

        Raises:
            Unknown: one wears several, or one that drops numbers or is merged.
        """
        if any(base.weight is not weight for base, weight in zip(self.bases, self.held, strict=True)):
            self.read_weights()
        return [_worn(linear) for linear in self.linears]

    def __call__(self, x: Tensor, factors: Factors | None) -> tuple[list[Tensor], Tensor | None]:
        """Products (T, N_i) of rows x (T, K), and what the adapters' first factors make of them, (T, R)."""
        outs = [product(x) for product in self.products]
        if factors is None:
            return outs, None
        low = x @ factors.a.t()
        for out, b, scale, own in zip(outs, factors.b, factors.scales, _by_rank(low, factors), strict=True):
            if b is not None:
                out.addmm_(own, b.t(), alpha=scale)
        return outs, low

    def of_factors(
        self, grads: list[Tensor], x: Tensor, low: Tensor | None, factors: Factors | None
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of low, and in fp32 those of the adapters' factors, from those (T, N_i) of the products."""
        if factors is None or low is None:
            return None, []
        of_low, of_b = torch.empty_like(low), []
        lows, of_lows = _by_rank(low, factors), _by_rank(of_low, factors)
        for grad, b, scale, own, of_own in zip(grads, factors.b, factors.scales, lows, of_lows, strict=True):
            if b is not None:
                of_own.addmm_(grad, b, beta=0, alpha=scale)
                of_b.append(matmul_in_fp32(grad.t(), own))
        foreach_mul_(of_b, [scale for b, scale in zip(factors.b, factors.scales, strict=True) if b is not None])
        of_a = matmul_in_fp32(of_low.t(), x).split_with_sizes([rank for rank in factors.ranks if rank])
        return of_low, [factor for pair in zip(of_a, of_b, strict=True) for factor in pair]

    def of_input(self, grads: list[Tensor], of_low: Tensor | None, factors: Factors | None) -> Tensor:
        """The gradient of x (T, K). One weight at a time is dequantized."""
        of_x = None if factors is None or of_low is None else of_low @ factors.a
        for grad, weight in zip(grads, self.weights, strict=True):
            of_x = grad @ weight(grad.dtype) if of_x is None else of_x.addmm_(grad, weight(grad.dtype))
        assert of_x is not None
        return of_x

    def backward(
        self, grads: list[Tensor], x: Tensor, low: Tensor | None, factors: Factors | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradient of x, and in fp32 those of the adapters' factors."""
        of_low, of_factors = self.of_factors(grads, x, low, factors)
        return self.of_input(grads, of_low, factors), of_factors


def _by_rank(low: Tensor, factors: Factors) -> tuple[Tensor, ...]:
    """Each linear's own columns of what first factors made of rows."""
    return low.split_with_sizes(factors.ranks, 1)


def _worn(linear: Any) -> Worn | None:
    if not isinstance(linear, LoraLayer):
        return None
    if linear.merged:
        raise Unknown("an adapter of its is merged")
    adapters = adapters_of(linear)
    if not adapters:
        return None
    name = worn_by(linear)[0]
    if len(adapters) > 1 or not is_plain(linear, name) or drops(linear.lora_dropout[name]):
        raise Unknown("it wears several adapters at once, one that is not plain LoRA, or drops numbers of one")
    return adapters[0]


class Copies(NamedTuple):
    """The adapters of a layer's linears, copied."""

    qkv: Factors | None
    out: Factors | None
    gate_up: Factors | None
    down: Factors | None


def copies_of(groups: WornByALayer, dtype: torch.dtype) -> Copies:
    """Copies of the adapters that a layer wears, made by one call, as each costs the host.

    A copy to other strides would be a launch a factor on a GPU.
    """
    worn = [[one for one in group if one is not None] for group in groups]
    every = [one for own in worn for one in own]
    if not every:
        return Copies(None, None, None, None)
    originals = [one.a for one in every] + [one.b for one in every]
    sizes = [x.numel() for x in originals]
    room = every[0].a.new_empty(sum(sizes), dtype=dtype)
    parts = [part.view(x.shape) for x, part in zip(originals, room.split_with_sizes(sizes), strict=True)]
    foreach_copy(parts, originals)
    rest, at = iter(parts[len(every) :]), 0
    found: list[Factors | None] = []
    for group, own in zip(groups, worn, strict=True):
        if not own:
            found.append(None)
            continue
        ranks = [0 if one is None else one.a.shape[0] for one in group]
        stacked = room.narrow(0, at, sum(one.a.numel() for one in own)).view(sum(ranks), -1)
        at += stacked.numel()
        b = [None if one is None else next(rest) for one in group]
        found.append(Factors(stacked, b, ranks, [0.0 if one is None else one.scale for one in group]))
    return Copies(*found)


class Pass(NamedTuple):
    """Adapters, positions and layout that a layer computes with in a pass."""

    worn: WornByALayer
    cos_sin: tuple[Tensor, Tensor] | None  # (T, rotary) each
    layout: Packed
    autocast: dict[str, Any]  # of attention


class Attention(NamedTuple):
    """Tensors that the backward of a layer's attention needs."""

    query: Tensor | None  # (T, H D), before its norm, where it has one
    key: Tensor | None  # (T, H_kv D)
    leaves: tuple[Tensor, ...]  # query, key and value (T, heads, D) that attention was called with
    attended: Tensor  # (T, H D), of the leaves' graph
    low_qkv: Tensor | None
    result: Tensor  # (T, hidden), of the product of what was attended
    low_out: Tensor | None


class OutlinedLayer:
    """The forward of a layer in a model, by its outline where a pass is on, and else its own."""

    def __init__(self, layer: Any, index: int, outline: Layer):
        self.own, self.outline = layer, outline
        self.asked = Scoring(index, outline.scaling, outline.window, outline.softcap, outline.sink)
        products = (outline.qkv, outline.out, outline.gate_up, outline.down)
        self.qkv, self.out, self.gate_up, self.down = self.linears = [Linears(product) for product in products]
        # In a pass; tables by the identity of the cosines that they were made of.
        self.in_pass: WornByALayer | None = None
        self.tables: Tables = {}

    @property
    def serves(self) -> bool:
        """Whether a call now goes by the outline."""
        return self.in_pass is not None and isinstance(layout_in_force(), Packed)

    def worn(self) -> WornByALayer:
        """The adapters that its linears wear now.

        Raises:
            Unknown: one wears several, or one that drops numbers or is merged.
        """
        return [linears.worn() for linears in self.linears]

    def __call__(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if not self.serves:
            return type(self.own).forward(self.own, hidden, *arguments, **keywords)
        return self.forward(hidden, keywords.get("position_embeddings"))

    def forward(self, hidden: Tensor, cos_sin: Any) -> Tensor:
        """The layer's output (1, T, hidden), with its gradient where one is computed; inside a pass."""
        layout, device = layout_in_force(), hidden.device.type
        assert self.in_pass is not None and isinstance(layout, Packed)
        autocast = dict(
            device_type=device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        )  # fmt: skip
        cos_sin = None if self.outline.table is None else self._table(cos_sin)
        now = Pass(self.in_pass, cos_sin, layout, autocast)
        if not torch.is_grad_enabled():
            return self.compute(hidden[0], now)[None]
        return _Node.apply(hidden, self, now, *self.parameters_of(self.in_pass))

    def _table(self, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, rotary) as kernels take them, from (1, T, rotary) as the layer is given them."""
        if not self.outline.paired:
            return cos_sin[0][0], cos_sin[1][0]
        if id(cos_sin[0]) not in self.tables:
            self.tables[id(cos_sin[0])] = as_paired(cos_sin[0][0]), as_paired(cos_sin[1][0])
        return self.tables[id(cos_sin[0])]

    @staticmethod
    def parameters_of(worn: WornByALayer) -> list[Tensor]:
        """First and second factor of each adapter that a layer wears."""
        return [factor for group in worn for one in group if one is not None for factor in (one.a, one.b)]

    @contextlib.contextmanager
    def computing_with(self, worn: WornByALayer, tables: Tables | None = None) -> Iterator[None]:
        """Be in a pass inside the `with`, of which all layers share the tables."""
        self.in_pass, self.tables = worn, {} if tables is None else tables
        try:
            yield
        finally:
            self.in_pass, self.tables = None, {}

    def compute(self, x: Tensor, now: Pass) -> Tensor:
        """The stream (T, hidden) after the layer, from that before it."""
        outline, copies = self.outline, copies_of(now.worn, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            result = self._attend(x, now, copies, keep=False).result
            stream, h = layer_pass.added(x, result, outline.after[0], outline.share, outline.before[1])
            del result
            gate_up, _ = self.gate_up(h, copies.gate_up)
            inner = layer_pass.gated(gate_up, outline.activation)
            del h, gate_up
            (result,), _ = self.down(inner, copies.down)
            return layer_pass.added(stream, result, outline.after[1], outline.share, None)[0]

    def backward(self, grad: Tensor, x: Tensor, now: Pass, needs_x: bool) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of x (T, hidden), and of the adapters' factors, from that of compute(x)."""
        copies = copies_of(now.worn, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            kept = self._attend(x, now, copies, keep=True)
            grad, of_mlp = self._through_mlp(grad, x, kept.result, copies)
            of_x, of_attention = self._through_attention(grad, x, kept, now, copies, needs_x)
        return of_x, [*of_attention, *of_mlp]

    def _attend(self, x: Tensor, now: Pass, copies: Copies, *, keep: bool) -> Attention:
        outline = self.outline
        outs, low_qkv = self.qkv(_normed(x, outline.before[0]), copies.qkv)
        kv = outline.kv_heads * outline.head_dim
        query, key, value = outs if len(outs) == 3 else outs[0].split([outs[0].shape[1] - 2 * kv, kv, kv], 1)
        del outs
        leaves: tuple[Tensor, ...] = (
            layer_pass.heads(query, outline.query_norm, now.cos_sin, outline.head_dim, outline.paired),
            layer_pass.heads(key, outline.key_norm, now.cos_sin, outline.head_dim, outline.paired),
            value.unflatten(1, (-1, outline.head_dim)),
        )
        query = query if keep and outline.query_norm is not None else None
        key = key if keep and outline.key_norm is not None else None
        with torch.set_grad_enabled(keep), torch.autocast(**now.autocast):
            if keep:
                leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
            of_query, of_key, of_value = (leaf.transpose(0, 1)[None] for leaf in leaves)
            attended = now.layout.attend(of_query, of_key, of_value, self.asked).squeeze(0).flatten(1)
        (result,), low_out = self.out(attended.detach(), copies.out)
        return Attention(query, key, leaves, attended, low_qkv, result, low_out)

    def _through_mlp(self, grad: Tensor, x: Tensor, result: Tensor, copies: Copies) -> tuple[Tensor, list[Tensor]]:
        outline = self.outline
        stream, h = layer_pass.added(x, result, outline.after[0], outline.share, outline.before[1])
        gate_up, low = self.gate_up(h, copies.gate_up)
        inner = layer_pass.gated(gate_up, outline.activation)
        of_result = grad if outline.share == 1 else grad * outline.share
        if outline.after[1] is not None:
            (result,), _ = self.down(inner, copies.down)
            of_result = layer_pass.normed_backward(of_result, result, outline.after[1])
        low_down = None if copies.down is None else inner @ copies.down.a.t()
        of_inner, of_down = self.down.backward([of_result], inner, low_down, copies.down)
        del inner, of_result
        of_gate_up = layer_pass.gated_backward(of_inner, gate_up, outline.activation)
        del of_inner, gate_up
        of_h, of_factors = self.gate_up.backward(of_gate_up, h, low, copies.gate_up)
        return _normed_backward(of_h, stream, outline.before[1], grad), [*of_factors, *of_down]

    def _through_attention(
        self, grad: Tensor, x: Tensor, kept: Attention, now: Pass, copies: Copies, needs_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        outline = self.outline
        of_result = grad if outline.share == 1 else grad * outline.share
        if outline.after[0] is not None:
            of_result = layer_pass.normed_backward(of_result, kept.result, outline.after[0])
        of_attended, of_out = self.out.backward([of_result], kept.attended.detach(), kept.low_out, copies.out)
        with torch.autocast(**now.autocast):
            of_query, of_key, of_value = torch.autograd.grad(kept.attended, kept.leaves, of_attended)
        grads = [
            layer_pass.heads_backward(of_query, kept.query, outline.query_norm, now.cos_sin, outline.paired),
            layer_pass.heads_backward(of_key, kept.key, outline.key_norm, now.cos_sin, outline.paired),
            of_value.flatten(1),
        ]
        if len(outline.qkv.sizes) == 1:
            grads = [torch.cat(grads, 1)]
        of_low, of_qkv = self.qkv.of_factors(grads, _normed(x, outline.before[0]), kept.low_qkv, copies.qkv)
        of_x = None
        if needs_x:
            of_x = _normed_backward(self.qkv.of_input(grads, of_low, copies.qkv), x, outline.before[0], grad)
        return of_x, [*of_qkv, *of_out]


def _normed(x: Tensor, norm: Any) -> Tensor:
    return x if norm is None else layer_pass.normed(x, norm)


def _normed_backward(grad: Tensor, x: Tensor, norm: Any, onto: Tensor) -> Tensor:
    return grad.add_(onto) if norm is None else layer_pass.normed_backward(grad, x, norm, onto)


class _Node(torch.autograd.Function):
    """An OutlinedLayer's output from hidden (1, T, hidden), which alone is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: OutlinedLayer, now: Pass, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.now = layer, now
        ctx.save_for_backward(hidden)
        return layer.compute(hidden[0], now)[None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("a checkpointed layer has no second gradient; set gradient_checkpointing=False")
        (hidden,) = ctx.saved_tensors
        of_x, of_factors = ctx.layer.backward(grad[0], hidden[0], ctx.now, ctx.needs_input_grad[0])
        return None if of_x is None else of_x[None], None, None, *of_factors


def may_go_by_outline(decoder: Any) -> bool:
    """Whether a decoder's layers are checkpointed, and none has a part that was replaced, as by tiled_mlp.

    On a GPU, LOWMEM_GRPO_TRITON=0 has the model's own layers compute.
    """
    layers = list(getattr(decoder, "layers", ()))
    if not layers or (switched_off() and next(layers[0].parameters()).is_cuda):  # an embedding may be elsewhere
        return False
    return all(
        getattr(layer, "gradient_checkpointing", False) and all(map(computes_as_its_class, every_module(layer)))
        for layer in layers
    )


def take_out(decoder: Any) -> None:
    """Give a decoder's layers their own forward back, whichever policy of it put an OutlinedLayer there."""
    for layer in getattr(decoder, "layers", ()):
        if isinstance(vars(layer).get("forward"), OutlinedLayer):
            del layer.forward


class OutlinedLayers:
    """The layers of a decoder, each with its OutlinedLayer as its forward."""

    def __init__(self, decoder: Any, outlines: list[Layer]):
        """Put them in place.

        Raises:
            Unknown: something besides linear layers' adapters is trained.
        """
        self.modules = [module for layer in decoder.layers for module in layer.modules()]
        self.reach: int | None = None  # tokens of the longest text; None: however long
        self.layers = [
            OutlinedLayer(layer, index, outline)
            for index, (layer, outline) in enumerate(zip(decoder.layers, outlines, strict=True))
        ]
        factors = {
            id(p)
            for layer in self.layers for linears in layer.linears for linear in linears.linears
            if isinstance(linear, LoraLayer) for held in (linear.lora_A, linear.lora_B) for p in held.parameters()
        }  # fmt: skip
        for name, parameter in decoder.layers.named_parameters():
            if parameter.requires_grad and id(parameter) not in factors:
                raise Unknown(f"its {name} is trained, too")
        for layer in self.layers:
            vars(layer.own)["forward"] = layer

    @contextlib.contextmanager
    def a_pass(self, longest: int) -> Iterator[None]:
        """Have the layers go by their outlines inside the `with`, with the adapters that they wear as they are now.

        Nothing changes where the longest text is beyond their reach, or where a layer drops numbers, wears several
        adapters or one that is not plain, or has a part that is hooked. A backward may come after the `with`.
        """
        hooked = any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
            for module in self.modules
        )
        try:
            worn = None if hooked or (self.reach is not None and longest > self.reach) else self.worn()
        except Unknown:
            worn = None
        tables: Tables = {}
        with contextlib.ExitStack() as passing:
            for layer, own in zip(self.layers, worn or (), strict=worn is not None):
                passing.enter_context(layer.computing_with(own, tables))
            yield

    def worn(self) -> list[WornByALayer]:
        """The adapters that each layer wears now.

        Raises:
            Unknown: as of one.
        """
        return [layer.worn() for layer in self.layers]
