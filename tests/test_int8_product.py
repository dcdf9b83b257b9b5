"""Products of few rows with an int8 head, kernel and twin, against fp64; its weights, bit for bit."""

import re

import pytest
import torch
from backends import CUDA, every_place, the_kernel
from interpreted import poison_masked_loads

from lowmem_grpo.kernels import int8_product as module
from lowmem_grpo.kernels.int8_product import WIDEN, permuted, product_int8
from lowmem_grpo.kernels.linear_logprobs import _dequantize, quantize_head

every_order = pytest.mark.parametrize("wgmma", [False, True], ids=["mma", "wgmma"])
# Rows of x, columns, rows of the weight: more than a block of each, multiples of nothing, and no rows.
SHAPES = [(0, 64, 40), (1, 192, 301), (5, 200, 129), (33, 32, 7), (70, 136, 257)]


@pytest.fixture(autouse=True)
def several_tiles_and_poison(poisoned_memory, monkeypatch):
    """What is allocated and not written is NaN, and so is what a load leaves that is masked without `other`."""
    poison_masked_loads(monkeypatch)
    monkeypatch.setattr(module, "ROWS", 96)


def inputs(rows, K, N, dtype, seed=0):
    """x (rows, K), and a head whose rows differ a hundredfold in size."""
    draw = torch.Generator().manual_seed(seed)
    head = torch.randn(N, K, generator=draw) * torch.logspace(-2, 0, N)[:, None]
    return torch.randn(rows, K, generator=draw).to(dtype), *quantize_head(head)


def multiplied(x, weight, scale, place):
    backend, device = place
    return product_int8(x.to(device), weight.to(device), scale.to(device), backend=backend).cpu()


def head_of(weight, scale, dtype, place):
    """The head that linear_logprobs trains with. Interpreted, bf16 is rounded towards 0."""
    if place == ("triton", "cpu") and dtype == torch.bfloat16:
        return ((weight * scale[:, None]).view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return _dequantize(weight, scale, dtype)


def assert_is_the_product(found, x, weight, scale, place):
    """Against fp64, within what a sum of K products in fp32 may lose: relative to the sum of their magnitudes."""
    head = head_of(weight, scale, x.dtype, place).double()
    assert found.shape == (len(x), len(weight)) and found.dtype == torch.float32
    magnitude = x.double().abs() @ head.abs().T
    assert ((found.double() - x.double() @ head.T).abs() <= 1e-6 * magnitude).all()


@every_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, K, N", SHAPES)
def test_it_is_the_product_with_the_head_that_is_trained_with(rows, K, N, dtype, place):
    x, weight, scale = inputs(rows, K, N, dtype)
    if place[0] == "triton" and dtype == torch.float32:
        with pytest.raises(ValueError, match=r"bf16 or fp16, not torch\.float32"):
            multiplied(x, weight, scale, place)
        place = ("auto", place[1])
    assert_is_the_product(multiplied(x, weight, scale, place), x, weight, scale, place)


@every_place
@every_order
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_weight_is_to_the_last_bit_the_head_that_is_trained_with(dtype, wgmma, place, monkeypatch):
    """x is the identity, so that the product is the head, and the head has each of 256 bytes in every row."""
    monkeypatch.setattr(module, "has_wgmma", lambda capability: wgmma)
    draw = torch.Generator().manual_seed(0)
    weight = torch.stack([torch.randperm(256, generator=draw) - 128 for _ in range(150)]).to(torch.int8)
    scale = torch.logspace(-4, -1, 150)
    found = multiplied(torch.eye(256, dtype=dtype), weight, scale, place)
    assert torch.equal(found.T, head_of(weight, scale, dtype, place).float())


@the_kernel
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 65])
def test_a_row_depends_on_no_other(rows, place):
    """Tiles of 16, 32 and 64 rows, and more than one of them."""
    x, weight, scale = inputs(80, 192, 140, torch.bfloat16)
    others = x.clone()
    others[rows:] = torch.nan
    whole, spoiled, alone = (multiplied(given, weight, scale, place) for given in (x, others, x[:rows]))
    assert torch.equal(whole[:rows], spoiled[:rows])
    assert_is_the_product(alone, x[:rows], weight, scale, place)


def test_autocast_narrows_nothing():
    x, weight, scale = inputs(4, 64, 50, torch.bfloat16)
    for given in (x, x.float()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = product_int8(given, weight, scale)
        assert_is_the_product(found, given, weight, scale, ("torch", "cpu"))


@every_place
def test_x_may_be_rows_of_another_tensor(place):
    x, weight, scale = inputs(6, 128, 70, torch.bfloat16)
    assert torch.equal(
        multiplied(x.repeat(1, 2)[::2, :128], weight, scale, place), multiplied(x[::2], weight, scale, place)
    )


def test_the_ptx_turns_every_four_bytes_into_their_numbers():
    """Run here instruction by instruction, of words in which every byte stands at each of four places."""
    places = torch.arange(4)[:, None]
    registers = {"$4": ((torch.arange(256) + 61 * places) % 256 << 8 * places).sum(0)}

    def value(name):
        number = registers[name] if name in registers else torch.tensor(int(name.replace("0f", "0x"), 16))
        return number.expand(256).contiguous()

    def prmt(a, b, selector):
        table = torch.stack([word >> 8 * byte & 255 for word in (a, b) for byte in range(4)])
        chosen = selector[0] >> 4 * torch.arange(4) & 15
        return (table[chosen] << 8 * places).sum(0)

    def floats(words):
        return words.to(torch.uint32).view(torch.float32)

    operations = {
        "xor.b32": lambda a, b: a ^ b, "prmt.b32": prmt,
        "add.f32": lambda a, b: (floats(a) + floats(b)).view(torch.uint32).long(),
    }  # fmt: skip
    steps = re.findall(r"(xor\.b32|prmt\.b32|add\.f32) ([^;]+);", WIDEN)
    assert len(steps) == WIDEN.count(";") - 1, "but for the register"
    for operation, operands in steps:
        target, *sources = operands.split(", ")
        registers[target] = operations[operation](*map(value, sources))
    for place in range(4):
        expected = (registers["$4"] >> 8 * place & 255).to(torch.uint8).view(torch.int8)
        assert torch.equal(floats(registers[f"${place}"]), expected.float())


def test_columns_are_permuted_so_that_a_threads_sixteen_weights_are_its_own():
    """As wgmma takes them: thread t's of each 16 columns are 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t."""
    columns = permuted(torch.arange(128.0)[None]).view(2, 4, 2, 4, 2)  # of 64, of 16, half, thread, pair
    for thread in range(4):
        own = columns[:, :, :, thread].reshape(2, 16)
        assert torch.equal(own, 16 * thread + torch.arange(16.0) + 64 * torch.arange(2)[:, None])


def wrong(**change):
    x, weight, scale = inputs(2, 64, 5, torch.bfloat16)
    given = dict(x=x, weight=weight, scale=scale, backend="auto") | change
    return product_int8(given.pop("x"), given.pop("weight"), given.pop("scale"), **given)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(64)), r"x must be \(S, K\)"),
        (dict(x=torch.zeros(2, 64, dtype=torch.float64)), "bf16, fp16 or fp32, not"),
        (dict(x=torch.zeros(2, 32)), r"weight must be contiguous \(N, 32\)"),
        (dict(weight=torch.zeros(5, 64)), r"torch\.int8, not \(5, 64\) torch\.float32"),
        (dict(weight=torch.zeros(64, 5, dtype=torch.int8).T), "weight must be contiguous"),
        (dict(scale=torch.zeros(4)), r"scale must be contiguous \(5,\)"),
        (dict(scale=torch.zeros(5, dtype=torch.bfloat16)), r"not \(5,\) torch\.bfloat16"),
        (dict(scale=torch.zeros(5, 1)), "scale must be contiguous"),
        (dict(scale=torch.zeros(5, device="meta")), "on one device, not cpu, cpu, meta"),
        (dict(backend="cuda"), "backend must be"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        wrong(**change)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("rows", [1, 16, 32, 64, 300])
@pytest.mark.parametrize("N, K", [(152064, 3584), (128256, 4096), (49152, 576)])
def test_products_of_real_heads_are_those_of_the_twin(N, K, rows):
    draw = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, K, generator=draw, device="cuda").bfloat16()
    weight = torch.randint(-127, 128, (N, K), generator=draw, dtype=torch.int8, device="cuda")
    scale = torch.rand(N, generator=draw, device="cuda") * 1e-3
    found, twin = (product_int8(x, weight, scale, backend=backend) for backend in ("triton", "torch"))
    assert (found - twin).norm() < 1.5e-7 * K**0.5 * twin.norm()  # two fp32 sums of K products, in other orders


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_graph_replays_it_on_other_rows(backend):
    x, weight, scale = (given.cuda() for given in inputs(20, 256, 1000, torch.bfloat16))
    product_int8(x, weight, scale, backend=backend)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = product_int8(x, weight, scale, backend=backend)
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(found, product_int8(x, weight, scale, backend=backend))
