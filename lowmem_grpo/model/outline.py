"""Numbers that say what the layers of a decoder compute, so that a step of decoding need not call them.

Names say only which module stands where. Numbers are read off what the model does: what its layers call attention with,
which cosines they are given, what a norm, a rotation or an activation makes of probes. What is left unexplained is
Unknown. Whether all of it together is the model is for step_trial.py to try.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lowmem_grpo.errors import in_a_line
from lowmem_grpo.kernels.decode_layer import ACTIVATIONS, Activation, Norm, rms, rotated
from lowmem_grpo.kernels.nf4_product import Weight
from lowmem_grpo.model.attention import Scoring, Silent, attending, laid_out
from lowmem_grpo.model.head import forward_replaced
from lowmem_grpo.model.lora import plain_lora_layers
from lowmem_grpo.model.mixing import mixers
from lowmem_grpo.model.trial import TEXTS, pieces

# Which norms stand before, and which after, attention and MLP: by a name that only layers of the kind have.
NORMS = {
    "post_self_attn_layernorm": (  # GLM 4
        ("input_layernorm", "post_attention_layernorm"), ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    "pre_feedforward_layernorm": (  # Gemma 2 and 3
        ("input_layernorm", "pre_feedforward_layernorm"), ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "post_feedforward_layernorm": (  # OLMo 2 and 3, Exaone 4
        (None, None), ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "post_attention_layernorm": (("input_layernorm", "post_attention_layernorm"), (None, None)),  # Llama and most
}  # fmt: skip


class Unknown(ValueError):
    """A model whose layers are not understood, and the message says what of them."""


@dataclass(frozen=True)
class Product:
    """Linear layers that share their input, their outputs side by side."""

    linears: list[Any]  # as they stand in the model: an adapted one in PEFT's wrapper
    sizes: list[int]  # outputs of each
    bias: Tensor | None  # (sum of sizes,) in the compute dtype
    weights: list[Weight] | None  # of 4 bits; None where the linears are nn.Linear, or are not to decode

    @property
    def bases(self) -> list[Any]:
        """The linears without PEFT's wrappers."""
        return [base_of(linear) for linear in self.linears]


@dataclass(frozen=True)
class Layer:
    """One layer: attention and a gated MLP, each added to the residual stream, with norms before or after it."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    before: tuple[Norm | None, Norm | None]  # of attention's and of the MLP's input; gains are fp32
    after: tuple[Norm | None, Norm | None]  # of their results, before these are added
    query_norm: Norm | None  # of each head, or with a gain of all heads' size over all of them
    key_norm: Norm | None
    kv_heads: int
    head_dim: int
    table: int | None  # which of the tables of cosines and sines; None: no positions
    paired: bool  # rotates columns 2 i and 2 i + 1 together, else i and i + rotary / 2
    scaling: float  # of attention's scores
    window: int | None
    softcap: float | None
    sink: Tensor | None  # (H,), the model's own
    share: float  # of a result that is added
    activation: Activation


@dataclass(frozen=True)
class Outline:
    """A decoder in numbers: embedding times scale, its layers, the last norm."""

    embedding: nn.Embedding
    embedding_scale: float
    layers: list[Layer]
    norm: Norm


class AttentionCall(NamedTuple):
    """Arguments that a layer calls attention with."""

    query: Tensor  # (B, H, T, D)
    key: Tensor  # (B, H_kv, T, D)
    value: Tensor  # (B, H_kv, T, D)
    asked: Scoring


class Listening(Silent):
    """A layout that keeps what each layer calls attention with."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        """Zeros (B, T, H, D); the call is kept."""
        if asked.layer in self.calls:
            raise Unknown("a layer of its attends twice")
        self.calls[asked.layer] = AttentionCall(query, key, value, asked._replace(scaling=float(asked.scaling)))
        return super().attend(query, key, value, asked)


def read(policy: Any) -> Outline:
    """The outline of a policy's decoder.

    Raises:
        Unknown: a parameter that nothing accounts for, or a part that answers a probe as no known one does.
    """
    decoder = policy.decoder
    with policy.inference(), policy.autocast():
        layers = read_layers(policy, decodes=True)
        for name in ("embed_tokens", "norm"):
            if not hasattr(decoder, name):
                raise Unknown(f"its decoder has no {name}")
        embedding_scale = _embedding_scale(policy)
        norm = _norm(decoder, "norm", policy.dtype)
    assert norm is not None
    _all_claimed(decoder, [decoder.embed_tokens, decoder.norm, *decoder.layers])
    return Outline(decoder.embed_tokens, embedding_scale, layers, norm)


def read_layers(policy: Any, *, decodes: bool = False, by_shape: bool = False) -> list[Layer]:
    """The outlines of a decoder's layers, inside of inference() and autocast().

    decodes: with 4-bit weights as decoding's kernel has them.
    by_shape: of tensors without numbers. Norms, rotations and activations are taken to be Llama's; shapes are right.

    Raises:
        Unknown: as read() does.
    """
    if mixers(policy.decoder):
        raise Unknown("it has layers that keep a state")
    layers = _part(policy.decoder, "layers")
    try:
        kinds = [0] * len(layers) if by_shape else rotations(policy, 1)[1]
        calls = _calls(policy, by_shape)
        return [_layer(layer, calls[i], kinds[i], policy.dtype, decodes, by_shape) for i, layer in enumerate(layers)]
    except (Unknown, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever foreign code raises where it is asked in our way
        raise Unknown(in_a_line(error)) from error


def rotations(policy: Any, num_positions: int) -> tuple[list[tuple[Tensor, Tensor]], list[int]]:
    """Cosines and sines of each position, (T, rotary) each, for each kind of layer; and the kind of each layer."""
    tables: list[tuple[Tensor, Tensor]] = []
    kinds: list[int] = []
    kind_of: dict[int, int] = {}
    given = _inputs(policy, [0] * num_positions)
    for layer, (_, cos_sin) in zip(policy.decoder.layers, given, strict=True):
        if cos_sin is None or any(x.shape[:-1] != (1, num_positions) for x in cos_sin):
            raise Unknown("its layers are not given cosines and sines by position")
        if id(cos_sin[0]) not in kind_of:
            kind_of[id(cos_sin[0])] = len(tables)
            cos, sin = (x[0] for x in cos_sin)
            if _paired(layer.self_attn):
                cos, sin = as_paired(cos), as_paired(sin)
            tables.append((cos.contiguous(), sin.contiguous()))
        kinds.append(kind_of[id(cos_sin[0])])
    return tables, kinds


def as_paired(table: Tensor) -> Tensor:
    """Cosines or sines (T, rotary) of a rotation of pairs: it takes the first half, and each of that twice."""
    return table[:, : table.shape[1] // 2].repeat_interleave(2, 1)


def _inputs(policy: Any, ids: list[int]) -> list[tuple[Tensor, Any]]:
    """Stream, cosines and sines that each layer is given for a text, when none of them does anything."""
    given: list[tuple[Tensor, Any]] = []

    def keep(hidden: Tensor, *, position_embeddings: Any = None, **_: Any) -> Tensor:
        given.append((hidden, position_embeddings))
        return hidden

    with ExitStack() as replaced:
        for layer in policy.decoder.layers:
            replaced.enter_context(forward_replaced(layer, keep))
        _forward(policy, ids, list(range(len(ids))))
    return given


def _forward(policy: Any, ids: list[int], positions: list[int]) -> None:
    """Run the decoder on one text."""
    token_ids, position_ids = torch.tensor([[ids], [positions]], device=policy.device)
    with attending(policy.configs):
        policy.decoder(input_ids=token_ids, position_ids=position_ids, use_cache=False)


def _embedding_scale(policy: Any) -> float:
    """The number that the first layer's input is, times the embedding's rows."""
    ids = pieces(policy, TEXTS[0], (64,))[0]
    hidden = _inputs(policy, ids)[0][0][0]
    rows = policy.decoder.embed_tokens.weight[ids].to(hidden.device).float()
    if hidden.dtype != policy.dtype:
        raise Unknown(f"its residual stream is in {hidden.dtype}, not in {policy.dtype}")
    fitted = ((rows * hidden.float()).sum() / rows.square().sum()).item()
    rounded = torch.tensor(fitted).to(policy.dtype).item()  # Gemma rounds it before it multiplies
    scale = min((rounded, fitted), key=lambda scale: ((rows * scale).to(policy.dtype) != hidden).sum().item())
    if not torch.allclose(rows * scale, hidden.float(), rtol=max(torch.finfo(policy.dtype).eps, 1e-6), atol=1e-7):
        raise Unknown("its embedding does something besides a scale")
    return scale


def _calls(policy: Any, by_shape: bool) -> dict[int, AttentionCall]:
    """Each layer's call of attention, for one token twice, 40 positions apart."""
    listening, longest = Listening(), 0
    if not by_shape:
        ids = pieces(policy, TEXTS[0], (64,))[0]
        rows = policy.decoder.embed_tokens.weight[ids].float()
        longest = ids[rows.norm(dim=1).argmax()]  # a row of zeros shows nothing
    with laid_out(listening):
        _forward(policy, [longest, longest], [0, 40])
    if sorted(listening.calls) != list(range(len(policy.decoder.layers))):
        raise Unknown("not every layer of its attends")
    return listening.calls


def _layer(layer: Any, call: AttentionCall, kind: int, dtype: torch.dtype, decodes: bool, by_shape: bool) -> Layer:
    attention, mlp = (_part(layer, name) for name in ("self_attn", "mlp"))
    before, after = next(
        (names for name, names in NORMS.items() if hasattr(layer, name)), NORMS["post_attention_layernorm"]
    )
    query_norm, key_norm = (
        next((name for name in (f"{letter}_norm", f"{letter}_layernorm") if hasattr(attention, name)), None)
        for letter in "qk"
    )
    qkv = _linears(attention, ("qkv_proj",), ("q_proj", "k_proj", "v_proj"))
    gate_up = _linears(mlp, ("gate_up_proj",), ("gate_proj", "up_proj"))
    (out,), (down,) = _linears(attention, ("o_proj",)), _linears(mlp, ("down_proj",))
    norms = [_part(layer, name) for name in (*before, *after) if name]
    norms += [_part(attention, name) for name in (query_norm, key_norm) if name]
    _all_claimed(layer, [*norms, *qkv, out, *gate_up, down], call.asked.sink)
    _, heads, _, head_dim = call.query.shape
    kv_heads = call.key.shape[1]
    norm, product = (
        partial(_norm_by_shape if by_shape else _norm, dtype=dtype),
        partial(_product, dtype=dtype, decodes=decodes),
    )
    outline = Layer(
        qkv=product(qkv), out=product([out]), gate_up=product(gate_up), down=product([down]),
        before=(norm(layer, before[0]), norm(layer, before[1])), after=(norm(layer, after[0]), norm(layer, after[1])),
        query_norm=norm(attention, query_norm), key_norm=norm(attention, key_norm),
        kv_heads=kv_heads, head_dim=head_dim,
        table=kind if by_shape or _moves(call.key) else None, paired=not by_shape and _paired(attention),
        scaling=call.asked.scaling, window=call.asked.window, softcap=call.asked.softcap,
        sink=call.asked.sink,
        share=float(getattr(layer, "residual_multiplier", 1.0)),
        activation="silu" if by_shape else _activation(mlp),
    )  # fmt: skip
    if sum(outline.qkv.sizes) != (heads + 2 * kv_heads) * head_dim or sum(outline.gate_up.sizes) % 2:
        raise Unknown("its linear layers are of other sizes than its heads")
    return outline


def _part(module: Any, name: str) -> Any:
    part = getattr(module, name, None)
    if part is None:
        raise Unknown(f"its {type(module).__name__} has no {name}")
    return part


def _linears(module: Any, *choices: tuple[str, ...]) -> list[Any]:
    """The parts of a module by the first choice of names that it has."""
    names = next((names for names in choices if hasattr(module, names[0])), choices[-1])
    return [_part(module, name) for name in names]


def _all_claimed(module: nn.Module, parts: list[nn.Module], *tensors: Tensor | None) -> None:
    claimed = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
    claimed |= {id(tensor) for tensor in tensors}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if id(tensor) not in claimed and "rotary" not in name:  # whose cosines and sines were read
            raise Unknown(f"nothing is known of its {name}")


def base_of(linear: Any) -> Any:
    """A linear layer without PEFT's wrapper."""
    return linear.get_base_layer() if isinstance(linear, LoraLayer) else linear


def _product(linears: list[Any], dtype: torch.dtype, decodes: bool) -> Product:
    for linear in linears:
        if base_of(linear) is not linear and (linear.merged or not plain_lora_layers(linear)):
            raise Unknown("an adapter of its is merged, or not plain LoRA")
    bases = [base_of(linear) for linear in linears]
    kinds = {type(base) for base in bases}
    if len(kinds) > 1 or not kinds <= {nn.Linear, Linear4bit}:
        raise Unknown(f"it has a {kinds.pop().__name__} among its linear layers")
    weights = [_weight(base) for base in bases] if kinds == {Linear4bit} and decodes else None
    if kinds == {nn.Linear} and any(base.weight.dtype != dtype for base in bases):
        raise Unknown(f"its linear layers are not in {dtype}")
    sizes = [base.out_features for base in bases]
    bias = None
    if any(base.bias is not None for base in bases):
        bias = torch.zeros(sum(sizes), dtype=dtype, device=bases[0].weight.device)
        for base, part in zip(bases, bias.split(sizes), strict=True):
            if base.bias is not None:
                part.copy_(base.bias)
    return Product(linears, sizes, bias, weights)


def _weight(base: Any) -> Weight:
    state = base.weight.quant_state
    outer = state.state2 if state.nested else None
    if (
        state.quant_type != "nf4"
        or state.blocksize != 64
        or base.in_features % 64
        or (outer is not None and outer.blocksize != 256)
    ):
        raise Unknown("its 4-bit weights are not NF4 in blocks of 64")
    packed = base.weight.data.view(torch.uint8)
    if outer is None:
        return Weight(packed, state.absmax)
    return Weight(packed, state.absmax, outer.absmax, state.offset, outer.code)


def _norm(owner: Any, name: str | None, dtype: torch.dtype) -> Norm | None:
    """The formula that gives what a module makes of rows of sizes from 0.001 to 30."""
    if name is None:
        return None
    module = _part(owner, name)
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    unknown = Unknown(f"its {type(module).__name__} is not an RMS norm")
    if weight is None or weight.dim() != 1 or eps is None or len([*module.parameters()]) > 1:
        raise unknown
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [0.03], [1], [30]]
    )
    x = x.to(weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        theirs = module(x).float()
        for gain in (weight.float(), 1 + weight.float()):
            if torch.allclose(rms(x, Norm(gain, eps, False)), theirs, rtol=1e-5, atol=1e-6):
                break
        else:
            raise unknown
        if dtype == torch.float32:
            return Norm(gain, eps, False)
        x = x.to(dtype)
        theirs = module(x)
        early = min((True, False), key=lambda early: (rms(x, Norm(gain, eps, early)) != theirs).sum().item())
    return Norm(gain, eps, early)


def _norm_by_shape(owner: Any, name: str | None, dtype: torch.dtype) -> Norm | None:
    """A norm of as many numbers as a module's."""
    weight = None if name is None else getattr(_part(owner, name), "weight", None)
    if name is not None and (weight is None or weight.dim() != 1):
        raise Unknown(f"its {name} is not an RMS norm")
    return None if weight is None else Norm(weight.float(), 1e-6, dtype != torch.float32)


def _moves(key: Tensor) -> bool:
    """Whether a layer's keys (1, H_kv, 2, D) of one token at two positions differ."""
    here, there = key[0].float().unbind(1)
    return bool((here - there).norm() > 1e-2 * here.norm())


def _paired(attention: Any) -> bool:
    """Whether columns 2 i and 2 i + 1 are rotated together, or else i and i + rotary / 2."""
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is not None:
        draw = torch.Generator().manual_seed(0)
        x, angle = torch.randn(1, 1, 3, 16, generator=draw), torch.randn(1, 3, 8, generator=draw)
        given = torch.cat([angle, angle], -1)
        theirs = rotate(x, x, given.cos(), given.sin())[0]
        for paired, angles in ((False, given), (True, angle.repeat_interleave(2, -1))):
            if torch.allclose(theirs, rotated(x, angles.cos(), angles.sin(), paired), atol=1e-5):
                return paired
    raise Unknown("it rotates queries and keys in a way that is not known")


def _activation(mlp: Any) -> Activation:
    function = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    x = torch.linspace(-8, 8, 101)
    for name in get_args(Activation):
        if function is not None and torch.allclose(function(x), ACTIVATIONS[name](x), atol=1e-6):
            return name
    raise Unknown("its activation is not known")
