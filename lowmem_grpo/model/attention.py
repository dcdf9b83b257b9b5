"""Our attention in a model's layers, switched on while a forward runs in one of our layouts.

It is registered with transformers under NAME. A model under `attending` calls it in every layer, and it hands queries,
keys and values to the layout in force: a packed micro-batch of training, or a step of the rollout's. Outside of
`attending`, the model has the attention it came with.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig

from lowmem_grpo.model.adapters import Adapters

NAME = "lowmem_grpo"
# Arguments of an attention call that say nothing about its result here: positions are in the keys already.
HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "is_causal", "position_embeddings"}


class Scoring(NamedTuple):
    """Settings of one layer's attention: how scores are made of the products of queries and keys."""

    layer: int
    scaling: float  # of the products
    window: int | None  # a token sees itself and window - 1 before it
    softcap: float | None  # softcap tanh(score / softcap)
    sink: Tensor | None = None  # (H,): the score of a key without a value, in every softmax of a head


class Layout(Protocol):
    """An object that knows which token attends to which."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        """Attention in this layout: query (B, H, T, D), key and value (B, H_kv, T, D) -> (B, T, H, D)."""
        ...


class Silent:
    """A layout that computes nothing, for what a model's layers call it with."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        """Zeros (B, T, H, D) in place of attention."""
        return torch.zeros_like(query).transpose(1, 2)


_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


class UnknownAttention(ValueError):
    """A model whose attention takes something that is not understood here."""


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend by the layout in force: query (B, H, T, D), key and value (B, H_kv, T, D or D_v) -> (B, T, H, D_v).

    The call signature is transformers', where s_aux are sinks. An argument that is not known here raises
    UnknownAttention. A layout is given keys and values of one size: the smaller ones (MLA's values) are filled up with
    zeros, and the result is cut.
    """
    unknown = [name for name, given in others.items() if given is not None and name not in HARMLESS]
    if unknown:
        raise UnknownAttention(f"its attention takes {unknown[0]}, which is not known here")
    own = getattr(module, "sliding_window", None) if getattr(module, "is_sliding", True) else None
    if own not in (None, sliding_window):  # it counts on the mask for it
        raise UnknownAttention("its attention keeps its sliding window to itself")
    of_keys, of_values = key.shape, value.shape  # read once: each layer of a decoding step is here
    if of_keys != of_values and of_keys[:3] != of_values[:3]:
        raise UnknownAttention("its keys and values are of different numbers")
    if of_keys[2] != query.shape[2]:
        raise UnknownAttention("its attention has other keys than one of each token")
    if dropout:
        raise UnknownAttention("its attention has a dropout")
    if s_aux is not None and s_aux.shape != query.shape[1:2]:
        raise UnknownAttention("its sinks are not one number a head")
    layout = _LAYOUT.get()
    assert layout is not None, "attending() without a layout"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # A norm or embedding that an adapter trains whole is fp32, and so are keys then, once they are rotated. Autocast
    # casts them to its dtype where attention is PyTorch's.
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (of.to(torch.get_autocast_dtype(query.device.type)) for of in (query, key, value))
    asked = Scoring(module.layer_idx, scale, sliding_window, softcap, s_aux)
    if of_keys == of_values:
        attended = layout.attend(query, key, value, asked)
    else:
        more = of_keys[3] - of_values[3]
        if more > 0:
            value = F.pad(value, (0, more))
        else:  # zeros of queries and keys add nothing to a score
            query, key = (F.pad(of, (0, -more)) for of in (query, key))
        attended = layout.attend(query, key, value, asked)[..., : of_values[3]]
    return attended.contiguous(), None  # AFMoE's layers view it; others reshape it, which would copy it instead


AttentionInterface.register(NAME, attend)


def configs_of(model: Any) -> list[Any]:
    """The configurations in which a model's layers look up their attention."""
    held = (getattr(module, "config", None) for module in model.modules())
    return list({id(one): one for one in held if isinstance(one, PreTrainedConfig)}.values())  # IDEFICS holds a number


@contextlib.contextmanager
def attending(configs: list[Any], name: str = NAME) -> Iterator[None]:
    """Have layers with these configurations call `attend`, or another attention by name, inside the `with`."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


@contextlib.contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Have `attend` use this layout inside the `with`, in this thread."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def layout_in_force() -> Layout | None:
    """The layout of the `with` that this thread is in, or None."""
    return _LAYOUT.get()


class Recomputation(contextlib.ExitStack):
    """A forward's attention and adapters once more, around the recomputation of a checkpointed layer.

    It is made in the forward and entered in the backward, where the model may attend otherwise, and wear others: the
    gradients of a layer that is recomputed with another adapter are wrong, and nothing says so.
    """

    def __init__(self, configs: list[Any], adapters: Adapters):
        super().__init__()
        self.configs, self.layout = configs, _LAYOUT.get()
        self.adapters, self.worn = adapters, adapters.worn

    def __enter__(self) -> "Recomputation":
        if self.worn != self.adapters.worn:
            self.enter_context(self.adapters.wearing(self.worn))
        if self.layout is not None:
            self.enter_context(attending(self.configs))
            self.enter_context(laid_out(self.layout))
        return super().__enter__()


def refusal(model: Any) -> str | None:
    """Why the attention of a model cannot be ours, as far as its config tells, or None."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {value.get("rope_type") for value in (rope, *rope.values()) if isinstance(value, dict)}
    if kinds & {"dynamic", "longrope"}:
        return "its rotary embedding depends on the longest text of a batch"
    return None


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, asked: Scoring) -> Tensor:
    """Attention of (..., Q, D) queries over (..., K, D) keys, with scores and softmax in fp32.

    With sinks, queries are (..., H_kv, H / H_kv, D), of one token.
    """
    scores = scores_of(query, key, asked).masked_fill(~mask, -torch.inf)
    return shares_of(scores, sink_column(asked, query.shape[-3])).to(value.dtype) @ value


def scores_of(query: Tensor, key: Tensor, asked: Scoring) -> Tensor:
    """Scores (..., Q, K), fp32."""
    return soften((query @ key.transpose(-1, -2)).float() * asked.scaling, asked.softcap)


def soften(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def shares_of(scores: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax over the last dimension of scores (..., Q, K); a sink (..., Q, 1) is one more of them, then left out."""
    if sink is None:
        return scores.softmax(-1)
    return torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


def sink_column(asked: Scoring, kv_heads: int, queries: int = 1) -> Tensor | None:
    """A layer's sinks, if any, beside scores of queries that are folded by kv head: (H_kv, Q H / H_kv, 1) fp32."""
    if asked.sink is None:
        return None
    by_head = asked.sink.to(torch.promote_types(asked.sink.dtype, torch.float32)).view(kv_heads, 1, -1, 1)
    return by_head.expand(-1, queries, -1, -1).flatten(1, 2)
