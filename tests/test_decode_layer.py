"""Start, heads, residual and gated, kernel and twin, against fp64 and against transformers' own layers."""

import itertools
from typing import Any

import pytest
import torch
from backends import CUDA, PLACES, every_place, interpreted, the_kernel
from torch.nn import functional as F
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

from lowmem_grpo.generate.store import Group, Place, Rows
from lowmem_grpo.kernels import decode_layer as module
from lowmem_grpo.kernels.decode_layer import ACTIVATIONS, gated, heads, residual, start

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Of a norm: sums in another order in fp32; now and then another rounding in 16 bits. The interpreter rounds bf16 towards
# zero, everywhere.
BOUND = {torch.float32: 5e-7, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
PAGE = 16


def in_every_dtype(names):
    """Each of names by each backend in each dtype; in the interpreter, whose bf16 says less than fp16, one in bf16."""
    cases, (first, *_) = [], names
    for name in names:
        for dtype in DTYPES:
            some = [x for x in PLACES if x is not interpreted or dtype != torch.bfloat16 or name == first]
            cases += [pytest.param(name, dtype, *x.values, id=f"{name}-{dtype}-{x.id}", marks=x.marks) for x in some]
    return pytest.mark.parametrize("name, dtype, place", cases)


# What is allocated and not written is NaN.
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def product_of(rows, size, linears, *, rank=16, splits=2, bias=True, dtype=torch.float32, seed=0):
    """parts, low, b and bias of a product of `size` columns, `linears` times the rank in low; rank 0 is no adapter."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    low, b = (normal(splits, rows, linears * rank), (normal(rank, size) / 8).to(dtype)) if rank else (None, None)
    return normal(splits, rows, size), low, b, normal(size).to(dtype) if bias else None


def finished(product, sizes, dtype=torch.float64):
    """y (S, N) of a product, rounded as a training forward rounds it; in fp64 nowhere."""
    parts, low, b, bias = (None if x is None else x.double() for x in product)
    y = parts.sum(0) if bias is None else parts.sum(0) + bias
    y = y.to(dtype).double()
    if low is not None:
        low = low.sum(0).to(dtype).double().split(len(b), 1)
        low = low if len(low) > 1 else low * len(sizes)
        y = y + torch.cat([x @ part for x, part in zip(low, b.split(sizes, 1), strict=True)], 1)
    return y.to(dtype)


def on(place, *given) -> list[Any]:
    """Tensors, and tensors in tuples, on a place's device."""
    return [
        x.to(place[1]) if isinstance(x, torch.Tensor) else tuple(on(place, *x)) if isinstance(x, tuple) else x
        for x in given
    ]


def norm_of(size, early=True, seed=5):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) + 0.5, 1e-5, early


def normed(x, norm, dtype):
    """The RMS norm of fp64 numbers, rounded before the gain where it is early."""
    gain, eps, early = norm
    y = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return (y.to(dtype).double() if early else y).mul(gain.double()).to(dtype)


def close(found, expected, dtype, place):
    """The distance is a small part of what is expected, no number is far off, and few are rounded otherwise."""
    interpreted = dtype == torch.bfloat16 and place == ("triton", "cpu")
    bound = BOUND[dtype] * (8 if interpreted else 1)
    distance = found.cpu().double() - expected.double()
    assert distance.norm() <= bound * expected.double().norm(), distance.norm() / expected.double().norm()
    assert distance.abs().max() <= 16 * bound * expected.double().abs().max()
    if dtype != torch.float32 and not interpreted:
        assert (distance != 0).sum() <= 3 + 0.01 * distance.numel(), (distance != 0).double().mean()


# Start.


@every_place
@every_dtype
def test_the_stream_starts_as_the_scaled_embedding_and_its_norm(dtype, place):
    embedding = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    token_ids, norm = torch.tensor([3, 49, 0, 3, 7]), norm_of(200)
    given = on(place, token_ids, embedding, norm)
    stream, h = start(given[0], given[1], scale=3.25, before=given[2], dtype=dtype, backend=place[0])
    expected = (embedding[token_ids].double() * 3.25).to(dtype)
    close(stream, expected, dtype, place)
    close(h, normed(expected, norm, dtype), dtype, place)
    stream, h = start(given[0], given[1], scale=1.0, before=None, dtype=dtype, backend=place[0])
    assert h is stream and torch.equal(stream.cpu(), embedding[token_ids])


@the_kernel
def test_an_embedding_of_another_dtype_is_rounded_first(place):
    embedding = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    given = on(place, torch.tensor([8, 1]), embedding)
    found, expected = (
        start(*given, scale=7.0, before=None, dtype=torch.float16, backend=backend)[0]
        for backend in (place[0], "torch")
    )
    assert torch.equal(found, expected)


# Residual.

RESIDUALS = {
    "llama": dict(rows=3, size=200, before=True),
    "granite": dict(rows=1, size=96, splits=1, share=0.22, before=True, rank=48),
    "gemma": dict(rows=5, size=130, before=True, after=True, early=False, bias=False),
    "olmo": dict(rows=2, size=64, after=True),
    "no adapter": dict(rows=33, size=72, rank=0, splits=3, bias=False, before=True),
    "many": dict(rows=64, size=64, rank=16, splits=1, before=True),
    "rounds of b": dict(rows=2, size=130, rank=128, splits=3, before=True),
    "rounds of parts": dict(rows=2, size=270, rank=0, splits=33, before=True, after=True),
}


def added(case, dtype, place):
    """(stream, h) as found, and as they should be."""
    case = dict(after=False, before=False, early=True, share=1.0) | case
    size, share = case["size"], case["share"]
    after, before = (
        norm_of(size, case["early"], seed) if case[x] else None for seed, x in enumerate(("after", "before"))
    )
    some = {key: case[key] for key in ("rank", "splits", "bias") if key in case}
    product = product_of(case["rows"], size, 1, dtype=dtype, **some)
    stream = torch.randn(case["rows"], size, generator=torch.Generator().manual_seed(9)).to(dtype)
    moved = stream.to(place[1], copy=True)
    gains = on(place, after, before)
    h = residual(moved, *on(place, *product), after=gains[0], share=share, before=gains[1], backend=place[0])
    y = finished(product, [size], dtype)
    y = y if after is None else normed(y, after, dtype)
    expected = (stream.double() + (y.double() * share).to(dtype).double()).to(dtype)
    return (moved, h), (expected, expected if before is None else normed(expected, before, dtype))


@in_every_dtype(RESIDUALS)
def test_the_stream_gets_a_share_of_what_a_product_left_and_is_normed(name, dtype, place):
    found, expected = added(RESIDUALS[name], dtype, place)
    for one, other in zip(found, expected, strict=True):
        close(one, other, dtype, place)
    assert (found[0] is found[1]) == ("before" not in RESIDUALS[name])


# Heads.

HEADS = {  # heads, kv heads, columns of each
    "qwen2": dict(sizes=(4, 2, 32)),
    "qwen3": dict(sizes=(2, 1, 32), norms="head", bias=False),
    "gemma3": dict(sizes=(2, 1, 48), norms="head", early=False, rank=48, splits=16),
    "phi3": dict(sizes=(2, 1, 80), rotary=40, linears=1, splits=3),
    "glm": dict(sizes=(2, 2, 32), rotary=16, paired=True),
    "smollm3, nowhere rotated": dict(sizes=(3, 1, 16), rotary=0, rank=0),
    "olmo2": dict(sizes=(4, 2, 32), norms="all", angles=torch.float32),
    "olmo2, odd": dict(sizes=(3, 3, 24), norms="all", rank=64, splits=5),
    "own pages alone": dict(sizes=(2, 1, 32), shared=False),
}


def headed(name, dtype, place, *, int8=False, rows=None, far=False):
    """(query, own pages) as found, and as they should be, by transformers' rotation and the store's own write."""
    case = dict(rotary=None, paired=False, norms=None, early=True, linears=3, angles=dtype, shared=True) | HEADS[name]
    H, kv_heads, D = case["sizes"]
    rotary = D if case["rotary"] is None else case["rotary"]
    sizes = [H * D, kv_heads * D, kv_heads * D]
    some = {key: case[key] for key in ("rank", "splits", "bias") if key in case}
    positions, prefilled = torch.tensor([40, 22, 31]), torch.tensor([12, 22, 0])
    prefilled = prefilled if case["shared"] else None
    product = product_of(3, sum(sizes), case["linears"], dtype=dtype, **some)
    table = torch.tensor([[1, 2, 8], [4, 6, 10**6], [0, 5, 10**6]])
    angle = torch.rand(64, max(rotary, 2) // 2, generator=torch.Generator().manual_seed(3)) * 6
    angle = angle.repeat_interleave(2, 1) if case["paired"] else torch.cat([angle, angle], 1)
    cos, sin = (angle.cos().to(case["angles"]), angle.sin().to(case["angles"])) if rotary else (None, None)
    norms = [None, None]
    if case["norms"]:
        norms = [norm_of(D if case["norms"] == "head" else n * D, case["early"], n) for n in (H, kv_heads)]
    if rows is not None:
        positions, table, product = (
            positions[:rows],
            table[:rows],
            tuple(x if i > 1 or x is None else x[:, :rows].contiguous() for i, x in enumerate(product)),
        )
        prefilled = None if prefilled is None else prefilled[:rows]

    def store():
        """Pages are outermost in memory, as a step that is captured has them; nothing is written yet."""
        numbers = torch.full((10, 2, 2, kv_heads, PAGE, D), torch.nan).to(dtype)
        numbers = torch.full(numbers.shape, 99, dtype=torch.int8) if int8 else numbers
        scales = torch.full(numbers.shape[:-1], torch.nan, dtype=torch.float16) if int8 else None
        return Group(numbers.movedim(0, 2), None if scales is None else scales.movedim(0, 2))

    own = Group(*on(place, *store()))
    given, addresses = own, None
    if far:  # what is given is elsewhere and must not be written
        addresses = torch.tensor([x.data_ptr() if x is not None else 0 for x in own] + [0, 0, 0], device=place[1])
        given = Group(*on(place, *store()))
    query = heads(
        *on(place, *product), own=given.numbers, scales=given.scales, layer=1, table=table.to(place[1]),
        positions=positions.to(place[1]), prefilled=on(place, prefilled)[0], query_norm=on(place, norms[0])[0],
        key_norm=on(place, norms[1])[0], cos=on(place, cos)[0], sin=on(place, sin)[0], paired=case["paired"],
        dtype=dtype, addresses=addresses, backend=place[0],
    )  # fmt: skip
    if far:
        assert all(
            torch.equal(
                x.cpu(),
                y,
            )
            or x.isnan().all()
            for x, y in zip(given, store(), strict=True)
            if x is not None
        )

    rotate = (modeling_glm if case["paired"] else modeling_llama).apply_rotary_pos_emb
    made = list(finished(product, sizes, dtype).split(sizes, 1))
    for i, norm in enumerate(norms):
        if norm is not None:
            made[i] = normed(made[i].unflatten(1, (-1, len(norm[0]))), norm, dtype).flatten(1)
    q, k, v = (x.unflatten(1, (-1, D))[:, :, None] for x in made)  # (S, heads, 1, D)
    if cos is not None:
        at = [x[positions][:, None] for x in (cos, sin)]
        if case["paired"]:  # glm's own repeats the first half of columns itself
            at = [torch.cat([x[..., ::2]] * 2, -1) for x in at]
        front = rotate(q[..., :rotary], k[..., :rotary], *at)
        q, k = (torch.cat([x.to(dtype), y[..., rotary:]], -1) for x, y in zip(front, (q, k), strict=True))
    columns = positions if prefilled is None else positions - prefilled
    expected = store()
    page = table.gather(1, (columns // PAGE)[:, None])[:, 0]
    rows = Rows([expected], {1: Place(0, 1, True)}, PAGE)
    rows.write(1, (page, slice(None), columns % PAGE), k[:, :, 0], v[:, :, 0])
    return (query.cpu(), Group(*on(("", "cpu"), *own))), (q[:, :, 0], expected)


def check_store(found, expected, dtype, place):
    """The right cells are written and no others, those of layer 0 included."""
    if expected.scales is None:
        assert torch.equal(found.numbers.isnan(), expected.numbers.isnan())
        written = ~expected.numbers.isnan()
        close(found.numbers[written], expected.numbers[written], dtype, place)
        return
    assert torch.equal(found.scales.isnan(), expected.scales.isnan())
    written = ~expected.scales.isnan()
    assert (found.numbers[~written] == 99).all()
    close(found.scales[written], expected.scales[written], dtype if dtype == torch.bfloat16 else torch.float16, place)
    distance = (found.numbers[written].int() - expected.numbers[written].int()).abs()
    assert distance.max() <= (1 if dtype != torch.bfloat16 else 4) and (
        dtype == torch.bfloat16 or distance.double().mean() < 0.01
    )


@in_every_dtype(HEADS)
def test_queries_keys_and_values_are_finished_normed_rotated_and_stored(name, dtype, place):
    (query, own), (expected_query, expected) = headed(name, dtype, place)
    close(query, expected_query, dtype, place)
    check_store(own, expected, dtype, place)


@in_every_dtype(["qwen2", "phi3", "olmo2, odd"])
def test_int8_keys_and_values_are_rounded_as_the_store_rounds_them(name, dtype, place):
    (_, own), (_, expected) = headed(name, dtype, place, int8=True)
    check_store(own, expected, dtype, place)


@the_kernel
@pytest.mark.parametrize("int8", [False, True])
def test_keys_and_values_go_where_the_addresses_say(int8, place):
    """Bit for bit what goes to a store that is given itself."""
    for name in ("qwen3", "olmo2, odd"):
        for one, other in zip(
            headed(name, torch.float16, place, int8=int8, far=True)[0][1],
            headed(name, torch.float16, place, int8=int8)[0][1], strict=True,
        ):  # fmt: skip
            assert one is other is None or torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@the_kernel
def test_a_key_that_is_not_finite_has_a_scale_that_is_not(place):
    product = product_of(1, 64, 3, rank=0)
    product[0][0, 0, 33] = torch.nan
    own, scales = (
        torch.zeros(1, 2, 1, 1, PAGE, 16, dtype=torch.int8),
        torch.zeros(1, 2, 1, 1, PAGE, dtype=torch.float16),
    )
    zero = torch.zeros(1, dtype=torch.int64)
    own, scales, zero, *product = on(place, own, scales, zero, *product)
    heads(
        *product, own=own, scales=scales, layer=0, table=zero[:, None], positions=zero, prefilled=None, query_norm=None,
        key_norm=None, cos=None, sin=None, paired=False, dtype=torch.float32, backend=place[0],
    )  # fmt: skip
    assert scales[0, 0, 0, 0, 0].isnan() and scales[0, 1, 0, 0, 0].isfinite()


# Gated.


@every_place
@every_dtype
@pytest.mark.parametrize(
    "rows, size, linears, rank, splits, activation",
    [
        (1, 40, 2, 16, 2, "silu"),
        (2, 600, 2, 16, 1, "silu"),
        (17, 72, 2, 48, 16, "silu"),
        (3, 40, 2, 128, 1, "silu"),
        (2, 72, 2, 0, 7, "silu"),
        *((9, 24, 1, 16, 1, activation) for activation in ACTIVATIONS),
    ],
)
def test_an_activation_of_the_gate_multiplies_up(rows, size, linears, rank, splits, activation, dtype, place):
    product = product_of(rows, 2 * size, linears, rank=rank, splits=splits, bias=rows == 1, dtype=dtype)
    found = gated(*on(place, *product), activation=activation, dtype=dtype, backend=place[0])
    gate, up = finished(product, [size, size], dtype).double().chunk(2, 1)
    definition = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    close(found, (definition(gate).to(dtype).double() * up).to(dtype), dtype, place)


# All of them.


@every_place
@pytest.mark.parametrize("rows", [1, 17])
def test_a_row_depends_neither_on_the_others_nor_on_their_number(rows, place):
    """Bit for bit by the kernels. A GEMM of another number of rows, in a twin, may sum otherwise."""
    same = {"triton": torch.equal, "torch": lambda a, b: torch.allclose(a, b, rtol=0, atol=2e-6)}[place[0]]
    parts, low, b, bias = on(place, *product_of(18, 64, 2))
    stream = torch.randn(18, 64, generator=torch.Generator().manual_seed(1)).to(place[1])
    norm = on(place, norm_of(64))[0]

    def of(parts, low, stream):
        stream = stream.clone()
        activated = gated(parts, low, b, bias, activation="silu", dtype=torch.float32, backend=place[0])
        h = residual(stream, parts, low[..., :16].contiguous(), b, bias, before=norm, backend=place[0])
        return activated, stream, h

    spoiled = [x.clone() for x in (parts, low, stream)]
    for x in spoiled[:2]:
        x[:, rows:] = torch.nan
    spoiled[2][rows:] = torch.nan
    whole = of(parts, low, stream)
    for found in (of(*spoiled), of(parts[:, :rows].contiguous(), low[:, :rows].contiguous(), stream[:rows])):
        assert all(same(one[:rows], other[:rows]) for one, other in zip(found, whole, strict=True))
    query, alone = (headed("qwen3", torch.float32, place, rows=n)[0][0] for n in (None, 2))
    assert same(query[:2], alone)


@pytest.mark.skipif(module.triton is None, reason="without Triton nothing is launched")
def test_rounds_ask_for_every_split_and_every_row_of_b_in_as_few_registers_as_there_are():
    for splits, rank in itertools.product(range(1, 17), range(16, 144, 16)):
        for columns, num_warps in ((64, 1), (576, 2), (1536, 8), (8192, 8)):
            hand, step = module.row_hand(splits, rank, columns, num_warps, 2)
            assert 0 < hand <= splits and rank % step == 0
            assert max(1, columns // (32 * num_warps)) * (hand + step / 2) < 255
        for tensor_cores in (True, False):
            hand, step = module.tile_hand(splits, rank, 2, tensor_cores)
            assert 0 < hand <= splits and rank % step == 0 and step >= 16
            assert 16 * hand <= 112 and (tensor_cores or step == 16)
    assert module.row_hand(16, 16, 1536, 8, 2) == module.row_hand(16, 16, 576, 4, 2) == (16, 16)  # in one round
    assert module.tile_hand(2, 64, 2, True) == (2, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("size, width, H, kv_heads", [(1536, 8960, 12, 2), (3584, 18944, 28, 4)], ids=["1.5B", "7B"])
def test_kernels_of_real_shapes_are_their_twins(size, width, H, kv_heads, rows):
    place, dtype = ("", "cuda"), torch.bfloat16
    backends = ("triton", "torch")
    norm = on(place, norm_of(size))[0]
    product = on(place, *product_of(rows, size, 1, splits=8, dtype=dtype))
    streams = [torch.randn(rows, size, device="cuda").to(dtype)] * 2
    streams[1] = streams[0].clone()
    found = [
        residual(stream, *product, before=norm, backend=backend)
        for stream, backend in zip(streams, backends, strict=True)
    ]
    close(streams[0], streams[1].cpu(), dtype, place)
    close(found[0], found[1].cpu(), dtype, place)
    product = on(place, *product_of(rows, 2 * width, 2, splits=2, dtype=dtype))
    found = [gated(*product, activation="silu", dtype=dtype, backend=backend) for backend in backends]
    close(found[0], found[1].cpu(), dtype, place)
    product = on(place, *product_of(rows, (H + 2 * kv_heads) * 128, 3, splits=4, dtype=dtype))
    angle = torch.rand(4096, 64, device="cuda").repeat(1, 2) * 6
    table = torch.randperm(rows * 8, device="cuda").view(rows, 8)
    positions = torch.randint(0, 8 * 64, (rows,), device="cuda")
    made = []
    for backend in backends:
        own = torch.zeros(rows * 8, 2, 2, kv_heads, 64, 128, dtype=dtype, device="cuda").movedim(0, 2)
        query = heads(
            *product, own=own, scales=None, layer=1, table=table, positions=positions, prefilled=None, query_norm=None,
            key_norm=None, cos=angle.cos().to(dtype), sin=angle.sin().to(dtype), paired=False, dtype=dtype,
            backend=backend,
        )  # fmt: skip
        made.append((query, own))
    for one, other in zip(*made, strict=True):
        close(one, other.cpu(), dtype, place)


def product_with(**change):
    parts, low, b, bias = product_of(2, 64, 1)
    return dict(stream=torch.zeros(2, 64), parts=parts, low=low, b=b, bias=bias) | change


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(parts=torch.zeros(2, 64)), "parts must be"),
        (dict(parts=torch.zeros(2, 2, 64, dtype=torch.float16)), "parts must be"),
        (dict(stream=torch.zeros(3, 64)), "stream must be"),
        (dict(bias=torch.zeros(63)), "bias must be"),
        (dict(b=None), "low and b go together"),
        (dict(b=torch.zeros(8, 64)), "R a multiple of 16"),
        (dict(low=torch.zeros(2, 2, 24)), "low must be"),
        (dict(low=torch.zeros(2, 16, 2).mT), "low must be contiguous"),
        (dict(backend="cuda"), "backend must be"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        residual(**product_with(**change))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation must be one of silu, gelu, gelu_tanh, not 'relu'"):
        gated(*product_of(2, 64, 2), activation="relu", dtype=torch.float32)  # type: ignore[arg-type]
