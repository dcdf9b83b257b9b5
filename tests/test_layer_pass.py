"""A layer's norms, sums, heads and gates in a training pass, kernels and twins, against fp64 and its autograd."""

import pytest
import torch
from backends import every_place
from torch.nn import functional as F

from lowmem_grpo.kernels.layer_pass import added, gated, gated_backward, heads, heads_backward, normed, normed_backward

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# Sums in another order in fp32, two roundings in 16 bits. The interpreter rounds bf16 towards zero, everywhere.
BOUND = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def close(found, expected, place, *, rounded_alike=False):
    """All numbers, and each, are as near as their dtype has them; rounded_alike: in 16 bits few differ."""
    assert found.shape == expected.shape
    towards_zero = found.dtype == torch.bfloat16 and place == ("triton", "cpu")
    bound = BOUND[found.dtype] * (4 if towards_zero else 1)
    distance, expected = found.cpu().double() - expected.detach(), expected.detach()
    assert distance.norm() <= bound * expected.norm(), (distance.norm() / expected.norm()).item()
    if distance.numel():
        assert distance.abs().max() <= 8 * bound * expected.abs().max()
    if rounded_alike and found.dtype != torch.float32 and not towards_zero:
        assert (distance != 0).sum() <= 3 + 0.01 * distance.numel(), (distance != 0).double().mean()


def columns(shape, dtype, place, seed=0):
    """(T, N) numbers that are columns of a wider tensor, where they are given to a function, and in fp64."""
    wide = torch.randn(shape[0], shape[1] + 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return wide.to(place[1])[:, 8:-16], wide[:, 8:-16].double().requires_grad_()


def norm_of(size, early=True, gains=torch.float32):
    return (torch.rand(size, generator=torch.Generator().manual_seed(5)) + 0.5).to(gains), 1e-5, early


def on(place, norm):
    return None if norm is None else (norm[0].to(place[1]), *norm[1:])


def rounded(x, dtype):
    """fp64 numbers as dtype has them; their gradient passes."""
    return x + (x.to(dtype).double() - x).detach()


def normed_in_fp64(x, norm, dtype):
    gain, eps, early = norm
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return rounded((rounded(y, dtype) if early else y) * gain.double(), dtype)


def rotated_in_fp64(x, cos, sin, paired, dtype):
    """Heads (T, H, D) whose first columns are rotated, each with its partner."""
    front, rest = x[..., : cos.shape[1]], x[..., cos.shape[1] :]
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    if paired:
        other = (front.unflatten(-1, (-1, 2)).flip(-1) * sign).flatten(-2)
    else:
        other = (front.unflatten(-1, (2, -1)).flip(-2) * sign[:, None]).flatten(-2)
    product = dtype if cos.dtype == dtype else torch.float64
    front, other = (rounded(a * b[:, None].double(), product) for a, b in ((front, cos), (other, sin)))
    return torch.cat([rounded(front + other, dtype), rest], -1)


@every_place
@every_dtype
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 200), (2, 2050)])
def test_rows_are_normed_and_gradients_go_back(shape, dtype, place):
    x, wide = columns(shape, dtype, place)
    norm = norm_of(shape[1], early=shape[0] != 3, gains=dtype if shape[0] == 2 else torch.float32)
    close(normed(x, on(place, norm), backend=place[0]), normed_in_fp64(wide, norm, dtype), place, rounded_alike=True)
    grad, wide_grad = columns(shape, dtype, place, seed=1)
    onto, wide_onto = columns(shape, dtype, place, seed=2)
    (expected,) = torch.autograd.grad(normed_in_fp64(wide, norm, torch.float64), wide, wide_grad)
    before = grad.clone()
    # Of one column x / |x| has nearly no gradient.
    if shape != (1, 1):
        close(normed_backward(grad, x, on(place, norm), backend=place[0]), expected, place)
    found = normed_backward(grad, x, on(place, norm), onto, backend=place[0])
    close(found, rounded(expected + wide_onto, dtype), place, rounded_alike=True)
    assert torch.equal(grad, before) and found.is_contiguous()


ADDED = {
    "llama": dict(before=True),
    "granite": dict(share=0.22, before=True),
    "gemma": dict(after=True, before=True, early=False),
    "olmo": dict(after=True),
    "all": dict(after=True, share=1.5, before=True),
    "nothing": dict(),
}


@every_place
@every_dtype
@pytest.mark.parametrize("name", ADDED)
def test_a_share_of_a_result_is_added_and_the_sum_normed(name, dtype, place):
    case = dict(after=False, share=1.0, before=False, early=True) | ADDED[name]
    for shape in ((3, 200), (0, 64)) if name == "nothing" else ((3, 200),):
        (x, wide), (result, expected) = (columns(shape, dtype, place, seed) for seed in (0, 1))
        norm = norm_of(shape[1], case["early"], dtype if name == "all" else torch.float32)
        after, before = (norm if case[part] else None for part in ("after", "before"))
        given = x.clone()
        total, h = added(x, result, on(place, after), case["share"], on(place, before), backend=place[0])
        expected = expected if after is None else normed_in_fp64(expected, after, dtype)
        expected = rounded(wide + rounded(expected * case["share"], dtype), dtype)
        close(total, expected, place, rounded_alike=True)
        expected = expected if before is None else normed_in_fp64(expected, before, dtype)
        close(h, expected, place, rounded_alike=True)
        assert (h is total) == (before is None) and torch.equal(x, given)


HEADS = {  # heads, columns of each
    "llama": dict(sizes=(5, 32)),
    "qwen3": dict(sizes=(3, 64), norm="head"),
    "gemma3": dict(sizes=(2, 48), norm="head", early=False),
    "phi": dict(sizes=(3, 40), rotary=16),
    "qwen3.5": dict(sizes=(2, 256), rotary=64, norm="head"),
    "glm": dict(sizes=(5, 32), rotary=16, paired=True),
    "ernie, with norms": dict(sizes=(3, 24), paired=True, norm="head"),
    "olmo2": dict(sizes=(3, 32), norm="all", angles=torch.float32),
    "minimax": dict(sizes=(3, 32), norm="all", rotary=16),
    "nowhere rotated": dict(sizes=(2, 24), rotary=0, norm="head"),
    "nothing": dict(sizes=(3, 16), rotary=0),
}


@every_place
@every_dtype
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_normed_and_rotated_and_gradients_go_back(name, dtype, place):
    case = dict(rotary=None, paired=False, norm=None, early=True, angles=dtype) | HEADS[name]
    (H, D), paired = case["sizes"], case["paired"]
    rotary = D if case["rotary"] is None else case["rotary"]
    norm = norm_of(D if case["norm"] == "head" else H * D, case["early"]) if case["norm"] else None
    for T in (19, 1, 0) if name == "llama" else (3,):  # 19 x 5 heads are more than a program has
        x, wide = columns((T, H * D), dtype, place)
        angle = torch.rand(2, T, rotary, generator=torch.Generator().manual_seed(3)) * 6  # halves need not agree
        cos_sin = (angle[0].cos().to(case["angles"]), angle[1].sin().to(case["angles"])) if rotary else None
        given = None if cos_sin is None else tuple(y.to(place[1]) for y in cos_sin)

        def in_fp64(rounding, x=wide, cos_sin=cos_sin):
            if norm is not None:
                x = normed_in_fp64(x.unflatten(1, (-1, len(norm[0]))), norm, rounding).flatten(1)
            x = x.unflatten(1, (H, D))
            return x if cos_sin is None else rotated_in_fp64(x, *cos_sin, paired, rounding)

        found = heads(x, on(place, norm), given, D, paired, backend=place[0])
        close(found, in_fp64(dtype), place, rounded_alike=True)
        assert found.is_contiguous()
        grad = torch.randn(H, T, D, generator=torch.Generator().manual_seed(4)).to(dtype).transpose(0, 1)
        (expected,) = torch.autograd.grad(in_fp64(torch.float64), wide, grad.double())
        of_norm = None if norm is None else x
        found = heads_backward(grad.to(place[1]), of_norm, on(place, norm), given, paired, backend=place[0])
        close(found, expected, place)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@every_place
@every_dtype
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_a_gate_opens_and_gradients_go_back(activation, dtype, place):
    function = {"silu": F.silu, "gelu": F.gelu}.get(activation, lambda x: F.gelu(x, approximate="tanh"))
    for T, width in ((2, 1030), (1, 37), (0, 64)) if activation == "silu" else ((2, 1030),):
        both, wide = columns((T, 2 * width), dtype, place)
        with torch.no_grad():
            for x in (both, wide):
                x[1:, :8] = x[1:, :8].abs() * -100  # where exponentials overflow
        gate, up = both.chunk(2, 1)
        found = gated([both] if T == 2 else [gate, up], activation, backend=place[0])
        wide_gate, wide_up = wide.chunk(2, 1)
        expected = rounded(rounded(function(wide_gate), dtype) * wide_up, dtype)
        close(found, expected, place, rounded_alike=True)
        assert found.is_contiguous()
        grad, wide_grad = columns((T, width), dtype, place, seed=1)
        (expected,) = torch.autograd.grad(function(wide_gate) * wide_up, wide, wide_grad)
        apart = [gate.clone(), up.clone()]
        of_gate, of_up = gated_backward(grad.clone(), apart, activation, backend=place[0])
        close(of_gate, expected[:, :width], place)
        close(of_up, expected[:, width:], place)
        (together,) = gated_backward(grad.clone(), [both], activation, backend=place[0])
        close(together, expected, place)
        assert of_gate is apart[0] and together is both, "in their place"


def test_tensors_of_other_shapes_are_refused():
    x, wider = torch.zeros(2, 8), torch.zeros(2, 9)
    with pytest.raises(ValueError, match=r"result must be \(2, 8\), not \(2, 9\)"):
        added(x, wider, None, 1.0, None)
    with pytest.raises(ValueError, match="grad must be"):
        normed_backward(wider, x, norm_of(8))
    with pytest.raises(ValueError, match="onto must be"):
        normed_backward(x, x, norm_of(8), wider)
    with pytest.raises(ValueError, match="up must be"):
        gated([x, wider], "silu")
    with pytest.raises(ValueError, match="side by side"):
        gated_backward(x, [x, x.t().contiguous().t()], "silu")
    for given, norm in ((wider, norm_of(4)), (None, norm_of(4)), (x, None)):
        with pytest.raises(ValueError, match=r"with a norm, x must be \(2, 8\) for a gradient \(2, 2, 4\), and else"):
            heads_backward(torch.zeros(2, 2, 4), given, norm, None, False)
