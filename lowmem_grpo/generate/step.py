"""A step of decoding by a model's outline: 10 launches a layer and 4 outside, where its own layers take 58 and 52.

    start                                stream = embedding, h = its norm
    product, heads, attention (2)        queries, keys and values of h; keys and values go into the store
    product, residual                    stream += attention's result, h = the norm of the stream
    product, gated                       activation(gate) up
    product, residual                    stream += the MLP's result, h = the norm of the stream
    head, sample_next (2)                the next token

A product leaves fp32 parts; their sum, the bias, the adapter's second factor and all rounding are the first lines of
the kernel that comes next anyway (kernels/decode_layer.py). Rounding is where a training forward has it, but that the
adapter's scale is in its second factor: rounded once more where it is no power of two.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.generate.graphs import Kept
from lowmem_grpo.generate.layouts import Decode
from lowmem_grpo.generate.store import Store
from lowmem_grpo.kernels.decode_layer import Norm, gated, residual, start
from lowmem_grpo.kernels.nf4_product import product, splits_of
from lowmem_grpo.model.lora import adapters_of, foreach_copy, foreach_mul, matmul_in_fp32
from lowmem_grpo.model.outline import Outline, Product, rotations
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.product_4bit import dequantized, product_4bit

POSITIONS = 1024  # the tables of cosines and sines grow by so many: 0.5 MiB for heads of 128 in 16 bits
RANK = 16  # an adapter's rank is filled up with zeros to a multiple of it


class Linears:
    """A Product with the adapters that its linears wear.

    Attributes:
        rank: R, of the adapters filled up with zeros; 0 where none is worn.
        a: (n R, K) first factors of n linears, R rows of each. From wear() to doff().
        b: (R, N) second factors side by side, with their scale in them. From wear() to doff().
        splits: of K, by the kernel; None where bitsandbytes' product serves instead.
        matrices: (N_i, K) each, of linears that are not in 4 bits, or all in one for a rollout with dense weights.
    """

    def __init__(self, product: Product, dtype: torch.dtype):
        """Take the number of columns of the adapters that are worn now."""
        self.product, self.dtype = product, dtype
        self.a = self.b = None
        self.matrices = None if product.weights else [base.weight for base in product.bases]
        device, num_inputs = product.bases[0].weight.device, product.bases[0].in_features
        self.splits = splits_of(tuple(product.sizes), num_inputs, device)
        if device.type == "cuda" and dtype == torch.float32:  # which the kernel does not take
            self.splits = None
        self.by_bitsandbytes = [product_4bit(base) for base in product.bases] if product.weights else []
        rank = max(sum(len(a) for a, _, _ in adapters_of(linear)) for linear in product.linears)
        self.rank = -(-rank // RANK) * RANK

    def wear(self, kept: Kept, copies: "Copies") -> dict[Any, tuple[Tensor, Tensor]]:
        """Ask for copies of the adapters' values in what is kept; returns views of them by linear, (K, R), (R, N_i)."""
        if not self.rank:
            return {}
        linears, sizes = self.product.linears, self.product.sizes
        base = self.product.bases[0]
        on: dict[str, Any] = dict(dtype=self.dtype, device=base.weight.device)
        self.a = kept.zeros((linears[0], "A"), (len(linears) * self.rank, base.in_features), **on)
        self.b = kept.zeros((linears[0], "B"), (self.rank, sum(sizes)), **on)
        views = {}
        for linear, its_a, its_b in zip(linears, self.a.split(self.rank), self.b.split(sizes, 1), strict=True):
            at = 0
            for a, b, scale in adapters_of(linear):
                copies.plain.append((its_a[at : at + len(a)], a))
                copies.scaled.append((its_b[at : at + len(a)], b.t(), scale))
                at += len(a)
            views |= {linear: (its_a.t(), its_b)} if at else {}
        return views

    def doff(self) -> None:
        """Let the adapters' values go, but for what is kept."""
        self.a = self.b = None

    def dequantize(self) -> dict[Any, Tensor]:
        """Compute with one dense matrix of all linears until quantize(); returns its rows by linear layer."""
        if self.product.weights is None:
            return {}
        bases, sizes = self.product.bases, self.product.sizes
        matrix = self.product.weights[0].absmax.new_empty(sum(sizes), bases[0].in_features, dtype=self.dtype)
        self.matrices = [matrix]
        by_layer = dict(zip(bases, matrix.split(sizes), strict=True))
        for base, rows in by_layer.items():
            rows.copy_(dequantized(base, self.dtype))
        return by_layer

    def quantize(self) -> None:
        """Compute with the weights as they are in the model."""
        if self.product.weights is not None:
            self.matrices = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Parts (splits, S, N), low (splits, S, n R), b and bias of x (S, K): what a kernel finishes a product with."""
        if self.matrices is None and self.splits is not None:
            assert self.product.weights is not None
            parts, low = product(x, self.product.weights, self.a, splits=self.splits)
            return parts, low, self.b, self.product.bias
        bias = self.product.bias
        if self.matrices is None:
            wholes, bias = [by(x).float() for by in self.by_bitsandbytes], None  # it adds the bias itself
        else:
            wholes = [matmul_in_fp32(x, matrix.t()) for matrix in self.matrices]
        parts = wholes[0] if len(wholes) == 1 else torch.cat(wholes, 1)
        return parts[None], None if self.a is None else matmul_in_fp32(x, self.a.t())[None], self.b, bias


class Copies(NamedTuple):
    """Adapters' values to copy, and where to. Many go in one call, since each call costs the host a launch's time."""

    plain: list[tuple[Tensor, Tensor]]  # to, from
    scaled: list[tuple[Tensor, Tensor, float]]  # to, from, times

    @torch.no_grad()
    def make(self) -> None:
        if self.plain:
            to, values = (list(side) for side in zip(*self.plain, strict=True))
            foreach_copy(to, values)
        if self.scaled:
            to, values, scales = (list(side) for side in zip(*self.scaled, strict=True))
            foreach_copy(to, foreach_mul(values, scales))


@dataclass(frozen=True)
class Shared:
    """Tensors of a fast step that a prompt's forward computes with, too."""

    matrices: dict[Any, Tensor]  # (N_i, K) by 4-bit layer, where dense
    factors: dict[Any, tuple[Tensor, Tensor]]  # (K, R) and (R, N_i), its scale in it, by adapted layer


class FastStep:
    """Decodes tokens by an outline in place of the model's own layers, with the adapters that they wear.

    Attributes:
        num_positions: positions that there are cosines and sines for.
    """

    def __init__(self, policy: Policy, outline: Outline, num_positions: int):
        self.policy, self.outline = policy, outline
        self.num_positions = -(-num_positions // POSITIONS) * POSITIONS
        with policy.inference(), policy.autocast():
            self.tables, _ = rotations(policy, self.num_positions)
        self.layers = [
            [Linears(product, policy.dtype) for product in (layer.qkv, layer.out, layer.gate_up, layer.down)]
            for layer in outline.layers
        ]
        self.following = [*(layer.before[0] for layer in outline.layers[1:]), outline.norm]

    @contextlib.contextmanager
    def ready(self, *, dense: bool, kept: Kept | None = None) -> Iterator[Shared]:
        """Hold the adapters' values, in what is kept, and with dense all 4-bit layers' matrices, inside the `with`."""
        every = [linears for layer in self.layers for linears in layer]
        kept = kept or Kept()
        try:
            factors: dict[Any, tuple[Tensor, Tensor]] = {}
            for layer in self.layers:
                copies = Copies([], [])
                for linears in layer:
                    factors |= linears.wear(kept, copies)
                copies.make()
            yield Shared({base: rows for x in every if dense for base, rows in x.dequantize().items()}, factors)
        finally:
            for linears in every:
                linears.quantize()
                linears.doff()

    @torch.no_grad()
    def __call__(self, token_ids: Tensor, now: Decode) -> Tensor:
        """Last hidden states (S, D) of one token of each of S slots; its keys and values go into the store."""
        with torch.autocast(self.policy.device.type, enabled=False):  # the kernels' references have products in fp32
            stream, h = self.begin(token_ids)
            for index, following in enumerate(self.following):
                h = self.layer(index, stream, h, following, now)
        return h

    def begin(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream (S, D) of tokens, and the first layer's norm of it."""
        embedding, before = self.outline.embedding.weight, self.outline.layers[0].before[0]
        if embedding.device != token_ids.device:  # offload_embedding
            embedding = self.outline.embedding(token_ids)
            token_ids = torch.arange(len(token_ids), device=token_ids.device)
        scale, dtype = self.outline.embedding_scale, self.policy.dtype
        return start(token_ids, embedding, scale=scale, before=before, dtype=dtype)

    def layer(self, index: int, stream: Tensor, h: Tensor, following: Norm | None, now: Decode) -> Tensor:
        """Add a layer's results to the stream (S, D), in place; returns the norm of it that follows."""
        layer = self.outline.layers[index]
        _, out, gate_up, down = self.layers[index]
        where: dict[str, Any] = dict(
            layer=index, table=now.table, positions=now.positions, prefilled=now.prefix_lengths
        )
        query = self.heads(index, h, now.store, **where)
        scores: dict[str, Any] = dict(
            scaling=layer.scaling, softcap=layer.softcap, window=layer.window, sink=layer.sink
        )
        attended = now.store.attend(query, prefix_rows=now.prefix_rows, **scores, **where).flatten(1)
        h = residual(stream, *out(attended), after=layer.after[0], share=layer.share, before=layer.before[1])
        h = gated(*gate_up(h), activation=layer.activation, dtype=self.policy.dtype)
        return residual(stream, *down(h), after=layer.after[1], share=layer.share, before=following)

    def heads(self, index: int, h: Tensor, store: Store, **where: Any) -> Tensor:
        """A layer's queries (S, H, D); keys and values go to where `where` says, as kernels/decode_layer.py has it."""
        layer = self.outline.layers[index]
        cos, sin = (None, None) if layer.table is None else self.tables[layer.table]
        return store.heads(
            *self.layers[index][0](h), query_norm=layer.query_norm, key_norm=layer.key_norm, cos=cos, sin=sin,
            paired=layer.paired, dtype=self.policy.dtype, **where,
        )  # fmt: skip
