"""Mixtures whose experts are held in 4 bits, of which one is dequantized at a time, and again in the backward.

transformers' mixtures hold all experts of a layer in two parameters, (E, in, out) or (E, out, in), and ask
config._experts_implementation which function computes with them. Here the parameters become packed bytes, and the
function is ours: it sorts the tokens by expert, dequantizes that expert's two matrices, multiplies, and goes on.
"""

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lowmem_grpo.errors import InputError
from lowmem_grpo.kernels.expert_product import MOST, Stack, expert_product, grouped, serves
from lowmem_grpo.kernels.nf4_product import MXFP4_CODES
from lowmem_grpo.model.product_4bit import dequantize_nf4, from_nf4

NAME = "lowmem_grpo"  # by which transformers finds the function
ROWS = 2048  # of an expert's tokens at once: what they take does not grow with how unevenly tokens are routed
# What transformers tells of experts whose function it asks for. Others stay in 16 bits.
ASKED = {"has_gate", "has_bias", "is_transposed"}
FEW = 4  # choices, by the number of experts: so many are dequantized in a step that the host does not wait for
RAISES = 2  # torch.cuda's mode in which the host must not wait for the device
AT_ONCE = 2**26  # bytes of dequantized matrices in such a step


class Nf4Stack(nn.Module):
    """E matrices of one shape in NF4 with double quantization, each by itself: 0.516 bytes a number.

    Attributes:
        inputs_first: whether a matrix is (in, out), and not (out, in).
    """

    codes: Tensor
    scales: Tensor
    scales_of_scales: Tensor
    offsets: Tensor
    table: Tensor  # (256,) fp32: what the codes of scales mean

    def __init__(self, num_matrices: int, shape: tuple[int, int], inputs_first: bool, device: Any):
        super().__init__()
        self.shape, self.inputs_first = shape, inputs_first
        numbers = math.prod(shape)
        scales = math.ceil(numbers / 64)

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        # Filled up to whole blocks of 64 numbers, so that matrices() may dequantize several in one.
        self.register_buffer("codes", zeros(num_matrices, 32 * scales, dtype=torch.uint8))
        self.register_buffer("scales", zeros(num_matrices, scales, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", zeros(num_matrices, math.ceil(scales / 256), dtype=torch.float32))
        self.register_buffer("offsets", zeros(num_matrices, dtype=torch.float32))
        self.register_buffer("table", zeros(256, dtype=torch.float32))

    def pack(self, first: int, matrices: Tensor) -> None:
        """Quantize matrices (n, *shape) on the stack's device into the places from `first` on, one by one."""
        for place, matrix in enumerate(matrices, first):
            state: Any
            codes, state = quantize_4bit(matrix.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True)
            self.codes[place, : codes.numel()], self.scales[place] = codes.flatten(), state.absmax
            self.scales_of_scales[place], self.offsets[place] = state.state2.absmax, state.offset
            self.table.copy_(state.state2.code)

    def matrix(self, place: int, dtype: torch.dtype) -> Tensor:
        """One matrix, of the stack's shape, rounded once to dtype."""
        double = (self.scales[place], self.table, self.offsets[place])
        # As one row: bitsandbytes 0.50's kernel for CPUs scales rows wrongly that are no multiple of a block of 64.
        row = (1, math.prod(self.shape))
        codes, of_scales = self.codes[place, : math.ceil(row[1] / 2), None], self.scales_of_scales[place]
        return dequantize_nf4(codes, of_scales, double, row, dtype).view(self.shape)

    def matrices(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Matrices (P, *shape) by their places (P,), which the host need not know."""
        of_scales = self.scales_of_scales[places].repeat_interleave(256, dim=1)[:, : self.scales.shape[1]]
        scales = self.table[self.scales[places].int()] * of_scales + self.offsets[places, None]
        shape = (len(places), 64 * self.scales.shape[1])
        numbers = from_nf4(self.codes[places].view(-1, 1), scales.flatten(), shape, dtype)
        return numbers[:, : math.prod(self.shape)].unflatten(1, self.shape)

    def parts(self) -> Stack | None:
        """The tensors that the kernel for few tokens reads; None where a block is not of one output's numbers."""
        parts = Stack(self.codes, self.scales, self.scales_of_scales, self.offsets, self.table)
        return None if self.inputs_first else parts


class Mxfp4Stack(nn.Module):
    """E matrices (out, in) in MXFP4 as gpt-oss has them: blocks of 32 numbers with one exponent, 4.25 bits a number.

    Two numbers of 4 bits are a byte, the first in its low half. An exponent is stored 127 higher than it is.
    """

    inputs_first = False
    blocks: Tensor
    scales: Tensor
    pairs: Tensor  # (256, 2) fp32: what a byte means

    def __init__(self, num_matrices: int, shape: tuple[int, int], device: Any):
        super().__init__()
        outputs, inputs = self.shape = shape
        blocks = (num_matrices, outputs, inputs // 32)
        self.register_buffer("blocks", torch.zeros(*blocks, 16, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(*blocks, dtype=torch.uint8, device=device))
        self.register_buffer("pairs", torch.zeros(256, 2, device=device), persistent=False)

    def fill_table(self) -> None:
        """Write, for each byte, the two numbers that it means."""
        byte = torch.arange(256)
        self.pairs = torch.stack([MXFP4_CODES[byte & 15], MXFP4_CODES[byte >> 4]], dim=1).to(self.blocks.device)

    def matrix(self, place: int, dtype: torch.dtype) -> Tensor:
        """One matrix, of the stack's shape, in dtype; exact in bfloat16 and float32."""
        return self._numbers(self.blocks[place], self.scales[place], dtype).view(self.shape)

    def matrices(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Matrices (P, *shape) by their places (P,), which the host need not know."""
        return self._numbers(self.blocks[places], self.scales[places], dtype).view(-1, *self.shape)

    def parts(self) -> Stack:
        """The tensors that the kernel for few tokens reads."""
        return Stack(self.blocks, self.scales)

    def _numbers(self, blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        numbers = self.pairs.to(dtype)[blocks.int()]  # (..., out, in / 32, 16, 2)
        return torch.ldexp(numbers, (scales.int() - 127)[..., None, None], out=numbers)


def experts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and module of all experts that transformers computes by config._experts_implementation."""
    yield from ((path, module) for path, module in model.named_modules() if vars(module).keys() >= ASKED)


def weight_names(experts: Any) -> tuple[str, str]:
    """Names of the two parameters with the matrices of all experts, that before the activation first."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def dense_weights(experts: Any) -> list[str]:
    """Names of the parameters of all experts that are not packed."""
    return [name for name in weight_names(experts) if name in experts._parameters]


def packed_name(name: str) -> str:
    """The name of the packed matrices, none of those by which people choose the layers of an adapter."""
    return "weights_out" if name == "down_proj" else "weights_in"


def name_in_file(name: str) -> str:
    """The name of a model's tensor in its checkpoint, where it is another in MXFP4: down_proj_scales."""
    name = re.sub(r"weights_out\.(blocks|scales)$", r"down_proj_\1", name)
    return re.sub(r"weights_in\.(blocks|scales)$", r"gate_up_proj_\1", name)


def empty_stack(experts: Any, name: str, device: Any) -> Nf4Stack:
    """A stack that holds what a parameter of experts does."""
    num, *shape = experts._parameters[name].shape
    return Nf4Stack(num, tuple(shape), experts.is_transposed, device)


def install(experts: Any, name: str, stack: nn.Module) -> None:
    """Put packed matrices in the place of a parameter; with both, the experts are computed by this module."""
    del experts._parameters[name]
    experts.add_module(packed_name(name), stack)
    experts._is_hf_initialized = True  # or from_pretrained would write random numbers into what is not there
    if not dense_weights(experts):
        experts.config._experts_implementation = NAME


def pack_experts(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Put a loaded model's experts in NF4 on the device, in place, one by one, from their numbers in dtype."""
    for _, experts in experts_of(model):
        for name in dense_weights(experts):
            stack, weights = empty_stack(experts, name, device), experts._parameters[name].data
            for place, matrix in enumerate(weights):
                stack.pack(place, matrix[None].to(device, dtype))
            install(experts, name, stack)
    keep_from_files(model)


def keep_from_files(model: Any) -> None:
    """Have save_pretrained() of a model with packed experts raise InputError: it would leave the experts out."""
    if are_packed(model):
        model.save_pretrained = _refuse_to_save


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise InputError(
        "the model's experts are in 4 bits, in a form that only lowmem_grpo has in memory, and cannot be saved; save "
        "the adapter, and merge it into the model as it was, loaded anew without 4 bits"
    )


def lay_out(model: nn.Module, mxfp4: bool) -> None:
    """Put stacks without memory, in MXFP4 or in NF4, in the place of the experts of a model without weights."""
    for _, experts in experts_of(model):
        for name in dense_weights(experts):
            num, *shape = experts._parameters[name].shape
            outputs_first = shape[::-1] if experts.is_transposed else shape
            stack = Mxfp4Stack(num, tuple(outputs_first), "meta") if mxfp4 else empty_stack(experts, name, "meta")
            install(experts, name, stack)


def _stacks(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Nf4Stack | Mxfp4Stack)]


def are_packed(model: nn.Module) -> bool:
    """Whether any experts of a model are in 4 bits."""
    return bool(_stacks(model))


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the experts of a model that are in 4 bits."""
    return sum(buffer.nbytes for _, stack in _stacks(model) for buffer in stack.buffers())


def packed_codes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Path and bytes of the codes of all experts that are in 4 bits, their scales left out."""
    for path, stack in _stacks(model):
        yield path, stack.codes if isinstance(stack, Nf4Stack) else stack.blocks


class Expert(NamedTuple):
    """The weights of one expert in the compute dtype; of P experts, with a dimension of P before the others."""

    weight_in: Tensor  # (in, width)
    bias_in: Tensor | None  # (width,), of several (P, 1, width)
    weight_out: Tensor  # (width, out)
    bias_out: Tensor | None


def _dequantized(experts: Any, which: int | Tensor, dtype: torch.dtype) -> Expert:
    found: list[Any] = []
    for name in weight_names(experts):
        stack = getattr(experts, packed_name(name))
        weight = stack.matrix(which, dtype) if isinstance(which, int) else stack.matrices(which, dtype)
        found.append(weight if stack.inputs_first else weight.mT)
        bias = getattr(experts, f"{name}_bias")[which].detach().to(dtype) if experts.has_bias else None
        found.append(bias if bias is None or isinstance(which, int) else bias[:, None])
    return Expert(*found)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x, weight) if x.dim() == 2 else torch.baddbmm(bias, x, weight)


def _output(experts: Any, expert: Expert, x: Tensor) -> Tensor:
    x = _activated(experts, _product(x, expert.weight_in, expert.bias_in))
    return _finished(experts, _product(x, expert.weight_out, expert.bias_out))


def _activated(experts: Any, x: Tensor) -> Tensor:
    return experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)


def _finished(experts: Any, x: Tensor) -> Tensor:
    has_norm = getattr(experts, "has_post_expert_norm", False)  # before transformers 5.20 none of those asked has it
    return experts.post_expert_norm(x) if has_norm else x


def by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Places in chosen.flatten() in the order of experts, and how many each has; the host waits for the numbers.

    An expert of number num_experts is none: some routers leave a token out so.
    """
    if chosen.is_cuda and torch.cuda.get_sync_debug_mode() == RAISES:
        raise RuntimeError("which of its experts in 4 bits have tokens is read by the host")
    experts, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(num_experts, device=chosen.device), right=True).tolist()
    return order, [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _parts(experts: Any, order: Tensor, counts: list[int], dtype: torch.dtype) -> Iterator[tuple[Expert, Tensor]]:
    """Each expert that has tokens, dequantized, with the places of at most ROWS of them in top_k_index.flatten()."""
    begin = 0
    for number, count in enumerate(counts):
        if count:
            expert = _dequantized(experts, number, dtype)
            for places in order[begin : begin + count].split(ROWS):
                yield expert, places
            del expert  # before the next one is dequantized
        begin += count


class _Experts(torch.autograd.Function):
    """out[t] = sum_j w[t, j] expert[chosen[t, j]](hidden[t]), of which the backward computes each expert again.

    Saved are hidden (N, D), w (N, k) and the order of the tokens alone: no weight, and nothing inside an expert.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, chosen: Tensor, experts: Any, dtype: torch.dtype) -> Tensor:
        order, counts = by_expert(chosen, experts.num_experts)
        ctx.save_for_backward(hidden, weights, order)
        ctx.experts, ctx.counts, ctx.dtype = experts, counts, dtype
        out = torch.zeros_like(hidden, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for expert, places in _parts(experts, order, counts, dtype):
                rows = places // weights.shape[1]
                found = _output(experts, expert, hidden[rows].to(dtype)) * weights.flatten()[places, None]
                out.index_add_(0, rows, found.float())  # no row twice: the experts of a token are different ones
                del expert, found
        return out.to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        hidden, weights, order = ctx.saved_tensors
        for_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        for_weights = torch.zeros_like(weights).flatten()
        for expert, places in _parts(ctx.experts, order, ctx.counts, ctx.dtype):
            rows = places // weights.shape[1]
            with torch.enable_grad():
                x = hidden[rows].to(ctx.dtype).requires_grad_()
                w = weights.flatten()[places, None].requires_grad_()
                found = _output(ctx.experts, expert, x) * w
            for_x, for_w = torch.autograd.grad(found, (x, w), grad[rows].to(found.dtype))
            for_hidden.index_add_(0, rows, for_x.float())
            for_weights[places] = for_w[:, 0]
            del expert, found
        return for_hidden.to(hidden.dtype), for_weights.view_as(weights), None, None, None


def few_tokens(
    experts: Any, hidden: Tensor, weights: Tensor, chosen: Tensor, dtype: torch.dtype, stacks: list[Stack] | None
) -> Tensor:
    """The output of packed experts in calls that do not depend on the choices, without a gradient.

    Such calls can be captured. With for_kernel()'s stacks the kernel reads experts in 4 bits as they lie; else an
    expert is dequantized for each choice of each token, AT_ONCE bytes at a time.
    """
    compute = _each_dequantized if stacks is None else partial(_by_kernel, stacks=stacks)
    found = compute(experts, hidden.to(dtype), chosen)
    found.masked_fill_((chosen >= experts.num_experts).view(-1, 1), 0)
    found = found * weights.flatten()[:, None]
    return found.float().view(*chosen.shape, -1).sum(1).to(hidden.dtype)


def for_kernel(experts: Any, dtype: torch.dtype, device: torch.device) -> list[Stack] | None:
    """Both stacks' tensors for the kernel, or None where it does not serve."""
    found = []
    for name in weight_names(experts):
        stack: Any = getattr(experts, packed_name(name))
        parts = stack.parts()
        if parts is None or not serves(stack.shape[1], parts, dtype, device):
            return None
        found.append(parts)
    return found


def _by_kernel(experts: Any, hidden: Tensor, chosen: Tensor, stacks: list[Stack]) -> Tensor:
    """The output of each choice (N k, D), for hidden (N, D); of a choice of no expert anything."""
    groups, places = grouped(chosen.flatten(), experts.num_experts), chosen.flatten().clamp(max=experts.num_experts - 1)

    def product(name: str, x: Tensor, stack: Stack) -> Tensor:
        out = expert_product(x.contiguous(), stack, groups)
        return out.add_(getattr(experts, f"{name}_bias")[places]) if experts.has_bias else out

    (name_in, name_out), (stack_in, stack_out) = weight_names(experts), stacks
    return _finished(experts, product(name_out, _activated(experts, product(name_in, hidden, stack_in)), stack_out))


def _each_dequantized(experts: Any, hidden: Tensor, chosen: Tensor) -> Tensor:
    """The output of each choice (N k, D), for hidden (N, D); of a choice of no expert anything."""
    rows = torch.arange(len(hidden), device=hidden.device).repeat_interleave(chosen.shape[1])
    places = chosen.flatten().clamp(max=experts.num_experts - 1)
    largest = max(math.prod(getattr(experts, packed_name(name)).shape) for name in weight_names(experts))
    count = max(1, AT_ONCE // (largest * hidden.dtype.itemsize))
    parts = [
        _output(experts, _dequantized(experts, which, hidden.dtype), hidden[row][:, None])[:, 0]
        for which, row in zip(places.split(count), rows.split(count), strict=True)
    ]
    return torch.cat(parts)


def experts_in_4bit(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The output (N, D) of packed experts for hidden (N, D), of which chosen (N, k) take part by weights (N, k)."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # On a GPU, where the experts one by one are hundreds of launches; on a CPU they are what dequantizes least.
    if device == "cuda" and not torch.is_grad_enabled():
        stacks = for_kernel(experts, dtype, hidden.device)
        if chosen.numel() <= most_choices(experts, stacks):
            with torch.autocast(device, enabled=False):
                return few_tokens(experts, hidden, weights, chosen, dtype, stacks)
    return _Experts.apply(hidden, weights, chosen, experts, dtype)


def most_choices(experts: Any, stacks: list[Stack] | None) -> int:
    """The number of choices up to which a GPU computes by few_tokens with these stacks."""
    return FEW * experts.num_experts if stacks is None else MOST


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_in_4bit)
