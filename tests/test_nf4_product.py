"""Products of few rows with 4-bit weights, kernel and twin, against fp64; the unpacking of bytes, in PTX and all."""

import json
import re

import pytest
import torch
from backends import CUDA, every_place, the_kernel
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from interpreted import poison_masked_loads

from lowmem_grpo.kernels import nf4_product as module
from lowmem_grpo.kernels.nf4_product import (
    CODES,
    MXFP4_CODES,
    NF4,
    Weight,
    default_splits,
    dequantized,
    first_words,
    has_wgmma,
    product,
    splits_of,
    splits_on,
    unpacking,
)

# Rows of x, columns, rows of each weight, splits: more than a block of each, multiples of nothing, and a split of none.
SHAPES = [(1, 256, [128, 64, 64], 2), (5, 320, [65, 40, 1], 3), (33, 192, [200], 1), (70, 128, [64], 3)]


@pytest.fixture(autouse=True)
def poisoned_loads(poisoned_memory, monkeypatch):
    """What is allocated and not written is NaN, and so is what a load leaves that is masked without `other`."""
    poison_masked_loads(monkeypatch)


def weights_of(sizes, K, nested, seed=0):
    """Weights, and what bitsandbytes makes of each, (N_j, K) fp32."""
    draw = torch.Generator().manual_seed(seed)
    made = [
        quantize_4bit(torch.randn(size, K, generator=draw) * 0.05, quant_type="nf4", compress_statistics=nested)
        for size in sizes
    ]
    weights = [
        Weight(packed, state.absmax, *((state.state2.absmax, state.offset, state.state2.code) if nested else ()))
        for packed, state in made
    ]
    return weights, [dequantize_4bit(packed, state) for packed, state in made]


def multiplied(x, weights, a, splits, place):
    backend, device = place
    weights = [Weight(*(None if part is None else part.to(device) for part in weight)) for weight in weights]
    a = None if a is None else a.to(device)
    parts, low = product(x.to(device), weights, a, splits=splits, backend=backend)
    return parts.cpu(), None if low is None else low.cpu()


def inputs(rows, K, dtype, seed=1):
    """x (rows, K) and A (32, K)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, K, generator=draw).to(dtype), (torch.randn(32, K, generator=draw) * 0.05).to(dtype)


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@every_place
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("rows, K, sizes, splits", SHAPES)
def test_the_parts_sum_to_a_product_nearer_than_one_with_weights_of_16_bits(
    rows, K, sizes, splits, nested, dtype, place
):
    x, a = inputs(rows, K, dtype)
    weights, dense = weights_of(sizes, K, nested)
    dense = torch.cat(dense)
    parts, low = multiplied(x, weights, a, splits, place)
    assert parts.shape == (splits, rows, sum(sizes)) and parts.dtype == torch.float32
    exact = x.double() @ dense.double().T
    eager = (x.float() @ dense.to(dtype).float().T).to(dtype)
    assert error(parts.sum(0), exact) < error(eager, exact)
    assert low.shape == (splits, rows, 32)
    assert error(low.sum(0), x.double() @ a.double().T) < 5e-7


@the_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("rows, K, sizes, splits", SHAPES)
def test_each_part_is_that_of_the_twin(rows, K, sizes, splits, nested, dtype, place):
    x, a = inputs(rows, K, dtype)
    weights, _ = weights_of(sizes, K, nested)
    found, expected = (multiplied(x, weights, a, splits, where) for where in (place, ("torch", "cpu")))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=4e-6)


@the_kernel
def test_without_an_adapter_there_is_no_low(place):
    x, _ = inputs(3, 128, torch.float16)
    weights, _ = weights_of([64], 128, True)
    parts, low = multiplied(x, weights, None, 2, place)
    assert low is None and torch.equal(parts.isfinite().all(), torch.tensor(True))


@every_place
def test_fp32_is_the_twins_and_the_kernel_says_so(place):
    x, a = inputs(4, 128, torch.float32)
    weights, dense = weights_of([64], 128, True)
    if place[0] == "triton":
        with pytest.raises(ValueError, match="bf16 or fp16, not torch.float32"):
            multiplied(x, weights, a, 1, place)
    parts, _ = multiplied(x, weights, a, 1, ("auto", place[1]))
    assert error(parts[0], x.double() @ dense[0].double().T) < 3e-7


@the_kernel
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 65])
def test_a_row_depends_neither_on_the_others_nor_on_their_number(rows, place):
    """Tiles of 16, 32 and 64 rows, and more than one of them; interpreted, a tile is numpy's product, of its width."""
    x, a = inputs(80, 192, torch.bfloat16)
    weights, _ = weights_of([96], 192, True)
    others = x.clone()
    others[rows:] = torch.nan
    whole, spoiled, alone = (multiplied(given, weights, a, 2, place) for given in (x, others, x[:rows]))
    for one, two, three in zip(whole, spoiled, alone, strict=True):
        assert torch.equal(one[:, :rows], two[:, :rows])
        torch.testing.assert_close(one[:, :rows], three, rtol=0, atol=0 if place[1] == "cuda" else 2e-6)


@every_place
@pytest.mark.parametrize("wgmma", [False, True], ids=["mma", "wgmma"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_of_256_bytes_is_two_codes(dtype, wgmma, place, monkeypatch):
    """x is the identity and every absmax 1, so that the parts are the codes themselves, each in its row and column."""
    monkeypatch.setattr(module, "has_wgmma", lambda capability: wgmma)
    packed = torch.arange(256, dtype=torch.uint8).view(8, 32)
    weights = [Weight(packed, torch.ones(8))]
    parts, _ = multiplied(torch.eye(64, dtype=dtype), weights, None, 1, place)
    codes = torch.tensor(NF4).to(dtype).float()
    both = torch.stack([packed.int() >> 4, packed.int() & 15], -1).flatten(1)
    assert torch.equal(parts[0].T, codes[both])


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_a_weight_is_what_bitsandbytes_makes_of_it(nested):
    weights, dense = weights_of([96, 40], 320, nested)
    for weight, expected in zip(weights, dense, strict=True):
        assert torch.equal(dequantized(weight, 320, torch.float32), expected)


def ran(ptx, operands):
    """Registers $0 to $7 after a program of and, shifts, prmt, lop3 and mov, of 32-bit words (int64 tensors)."""
    registers = dict(operands)

    def value(name):
        return registers[name] if name in registers else torch.tensor(int(name, 0))  # else a number

    def prmt(a, b, selector):
        a, b, selector = torch.broadcast_tensors(a, b, selector)
        table = [a >> 8 * byte & 255 for byte in range(4)] + [b >> 8 * byte & 255 for byte in range(4)]
        made = torch.zeros_like(a)
        for byte in range(4):
            chosen = selector >> 4 * byte & 15
            picked = torch.stack(table).gather(0, (chosen & 7)[None])[0]
            signs = torch.where(picked >= 128, 255, 0)  # bit 3 of a selector: the sign in place of the byte
            made |= torch.where(chosen >= 8, signs, picked) << 8 * byte
        return made

    def lop3(a, b, c, table):
        made = torch.zeros_like(a)
        for bit in range(32):
            index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
            made |= (table >> index & 1) << bit
        return made

    operations = {
        "and.b32": lambda a, b: a & b, "shr.u32": lambda a, n: a >> n, "shl.b32": lambda a, n: a << n & 0xFFFFFFFF,
        "prmt.b32": prmt, "lop3.b32": lop3,
    }  # fmt: skip
    steps = re.findall(r"(and\.b32|shr\.u32|shl\.b32|prmt\.b32|lop3\.b32|mov\.b32) ([^;]+);", ptx)
    assert len(steps) == ptx.count(";") - 1, "but for the registers"
    for operation, arguments in steps:
        *targets, last = re.findall(r"[$\w]+", arguments)
        if operation == "mov.b32":
            registers[targets[0]], registers[targets[1]] = value(last) & 0xFFFF, value(last) >> 16
        else:
            registers[targets[0]] = operations[operation](*map(value, [*targets[1:], last]))
    return [registers[f"${index}"] for index in range(8)]


@pytest.mark.parametrize("codes, low_first", [(CODES, False), (MXFP4_CODES, True)], ids=["nf4", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_ptx_turns_every_four_bytes_into_their_eight_codes(dtype, codes, low_first):
    """Run here instruction by instruction: all 65,536 pairs in the lower half of a word, others in the upper one."""
    pairs = torch.arange(65536)
    word = pairs | pairs.flip(0) << 16
    tables = {f"${9 + i}": torch.tensor(first & 0xFFFFFFFF) for i, first in enumerate(first_words(dtype, codes))}
    found = ran(unpacking(dtype, codes, low_first), {"$8": word} | tables)
    codes = codes.to(dtype).view(torch.int16).long() & 0xFFFF
    for column, made in enumerate(found):
        shift = column // 2 * 8 + 4 * (column % 2 == int(low_first))
        assert torch.equal(made, codes[word >> shift & 15]), column


@the_kernel
def test_a_weight_that_the_kernel_cannot_read_is_refused(place):
    """A view of a larger tensor may begin anywhere; on a GPU such a load is an illegal address."""
    x, _ = inputs(3, 128, torch.float16)
    packed = torch.zeros(4 + 64 * 64, dtype=torch.uint8, device=place[1])[4:]
    with pytest.raises(ValueError, match="packed must begin at a multiple of 8 bytes"):
        product(x.to(place[1]), [Weight(packed, torch.ones(128, device=place[1]))], backend="triton")


def test_a_part_of_all_weights_together_is_beyond_offsets_of_32_bits():
    x = torch.empty(2**15, 64, device="meta")
    weight = Weight(torch.empty(2**15 * 32, dtype=torch.uint8, device="meta"), torch.empty(2**15, device="meta"))
    with pytest.raises(ValueError, match=r"2\*\*31 numbers of x or of a part"):
        product(x, [weight, weight])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize(
    "sizes, K, splits",
    [([1536, 256, 256], 1536, 8), ([8960, 8960], 1536, 2), ([3584], 18944, 8), ([18944, 18944], 3584, 1)],
)
def test_products_of_real_shapes_are_those_of_the_twin(sizes, K, splits, rows):
    x, a = inputs(rows, K, torch.bfloat16)
    weights, _ = weights_of(sizes, K, True)
    found, expected = (multiplied(x, weights, a, splits, (backend, "cuda")) for backend in ("triton", "torch"))
    for one, other in zip(found, expected, strict=True):  # two fp32 sums of K / splits products, in other orders
        assert error(one, other.double()) < 1.5e-7 * (K / splits) ** 0.5


def test_splits_make_programs_enough_for_a_card_and_no_split_is_tiny():
    assert default_splits([18944, 18944], 3584, 132) == 1  # 592 blocks of rows
    assert default_splits([3584], 18944, 132) == 9  # 56 blocks of rows: 504 programs
    assert default_splits([1536], 8960, 132) == 16  # 24 blocks of rows; 22 splits would be nearer to 528 programs
    assert default_splits([1536, 256, 256], 1536, 40) == 5  # a small card: 32 blocks of rows, 160 programs
    assert default_splits([64], 192, 132) == 1  # three blocks of K to a program


def test_what_was_measured_on_a_card_decides_and_else_its_age(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def splits(card, capability, sizes, K):
        return splits_on(card, capability, 132, sizes, K)

    assert [splits(*card, [3584], 18944) for card in (("T4", 75), ("A100", 80), ("H100", 90))] == [None, 9, 9]
    (tmp_path / "lowmem_grpo").mkdir()
    table = {"T4": {"3584x18944": 4}, "H100": {"3584x18944": None, "1536+256+256x1536": 2}}
    (tmp_path / "lowmem_grpo/nf4_product.json").write_text(json.dumps(table))
    assert [splits(*card, [3584], 18944) for card in (("T4", 75), ("A100", 80), ("H100", 90))] == [4, 9, None]
    assert splits("H100", 90, [1536, 256, 256], 1536) == 2
    assert splits("H100", 90, [1536], 1536) == 8, "not measured"


def test_hopper_alone_multiplies_by_wgmma():
    assert [has_wgmma(card) for card in (80, 89, 90, 100, 120)] == [False, False, True, False, False]


def test_on_a_cpu_nothing_is_split():
    assert splits_of((3584,), 18944, torch.device("cpu")) == 1


def wrong(**change):
    weights, _ = weights_of([64], 128, True)
    given = dict(x=torch.zeros(2, 128), weights=weights, a=torch.zeros(16, 128), splits=1, backend="auto") | change
    return product(given.pop("x"), given.pop("weights"), given.pop("a"), **given)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 96)), "K a multiple of 64"),
        (dict(x=torch.zeros(128, 2).T), "x must be contiguous"),
        (dict(x=torch.zeros(2, 192)), "whole rows of 96"),
        (dict(weights=[]), "1 to 3"),
        (dict(weights=weights_of([64], 128, True)[0] + weights_of([64], 128, False)[0]), "all nested or none"),
        (dict(weights=[weights_of([64], 128, True)[0][0]._replace(absmax=torch.zeros(3))]), "one of 64 numbers"),
        (dict(weights=[weights_of([64], 128, True)[0][0]._replace(outer=None)]), "go with an absmax of uint8"),
        (dict(a=torch.zeros(8, 128)), "R a multiple of 16"),
        (dict(a=torch.zeros(16, 128, dtype=torch.float16)), "a must be contiguous"),
        (dict(splits=0), "splits must be at least 1"),
        (dict(backend="cuda"), "backend must be"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        wrong(**change)
