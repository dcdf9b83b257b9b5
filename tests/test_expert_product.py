"""Products of rows with the experts that they chose, kernel and twin, in NF4 and MXFP4, against fp64."""

import pytest
import torch
from backends import CUDA, gpu, interpreted, the_kernel, twin
from interpreted import poison_masked_loads

from lowmem_grpo.kernels import expert_product as module
from lowmem_grpo.kernels.expert_product import MOST, Stack, dense, expert_product, grouped, serves
from lowmem_grpo.model.experts import Mxfp4Stack, Nf4Stack

every_backend = pytest.mark.parametrize("place", [twin, interpreted, gpu])
both_kinds = pytest.mark.parametrize("kind", ["nf4", "mxfp4"])
EXPERTS, N, K = 5, 80, 128  # more than a block of each, multiples of nothing
# Rows and choices of each: fewer than experts; more, some of no expert; so many that a program has 32 of an expert.
SHAPES = [(1, 2), (4, 3), (14, 3)]


@pytest.fixture(autouse=True)
def poisoned_loads(poisoned_memory, monkeypatch):
    """What is allocated and not written is NaN, and so is what a load leaves that is masked without `other`."""
    poison_masked_loads(monkeypatch)


def stack_of(kind, experts=EXPERTS, rows=N, columns=K):
    """A module with random matrices, and what the kernel reads of it."""
    draw = torch.Generator().manual_seed(0)
    if kind == "nf4":
        made = Nf4Stack(experts, (rows, columns), False, "cpu")
        made.pack(0, torch.randn(experts, rows, columns, generator=draw) * 0.05)
    else:
        made = Mxfp4Stack(experts, (rows, columns), "cpu")
        made.fill_table()
        made.blocks.random_(0, 256, generator=draw)
        made.scales.random_(115, 125, generator=draw)
    return made, made.parts()


def choices(rows, each, experts=EXPERTS, seed=1):
    """Different experts of each row; where one would be number `experts`, which is none, a number far beyond."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(experts + 1, generator=draw)[:each] for _ in range(rows)]).flatten()
    return chosen.where(chosen < experts, 2**31 - 1)


def multiplied(x, stack, chosen, place, experts=EXPERTS):
    backend, device = place
    stack = Stack(*(None if part is None else part.to(device) for part in stack))
    groups = grouped(chosen.to(device), experts, backend=backend)
    return expert_product(x.to(device), stack, groups, backend=backend).cpu()


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@every_backend
@both_kinds
@pytest.mark.parametrize("shared", [True, False], ids=["row-of-several", "row-of-each"])
@pytest.mark.parametrize("rows, each", SHAPES)
def test_a_product_is_no_further_from_the_truth_than_one_with_weights_of_16_bits(rows, each, shared, kind, place):
    made, stack = stack_of(kind)
    chosen = choices(rows, each)
    x = torch.randn(rows if shared else rows * each, K, generator=torch.Generator().manual_seed(2)).half()
    found = multiplied(x, stack, chosen, place)
    assert found.shape == (rows * each, N) and found.dtype == torch.float16
    some = chosen < EXPERTS
    pairs = [(made.matrix(e, torch.float32), made.matrix(e, torch.float16)) for e in range(EXPERTS)]
    of = x.repeat_interleave(each, 0) if shared else x
    exact = torch.stack([pairs[e][0].double() @ row.double() for e, row in zip(chosen[some], of[some], strict=True)])
    eager = torch.stack(
        [(pairs[e][1].float() @ row.float()).half() for e, row in zip(chosen[some], of[some], strict=True)]
    )
    assert error(found[some], exact) <= 1.1 * error(eager, exact)  # of MXFP4 the weights are exact in both


@the_kernel
@both_kinds
@pytest.mark.parametrize("rows, each, wgmma", [(*SHAPES[1], False), (*SHAPES[2], True)])
def test_the_kernel_is_its_twin_in_bf16(rows, each, wgmma, kind, place, monkeypatch):
    """The interpreter cuts bf16 off, where a GPU rounds."""
    monkeypatch.setattr(module, "has_wgmma", lambda capability: wgmma)
    _, stack = stack_of(kind)
    chosen = choices(rows, each)
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    found, expected = (multiplied(x, stack, chosen, where)[chosen < EXPERTS] for where in (place, ("torch", "cpu")))
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=1e-5)


@the_kernel
@both_kinds
def test_a_choice_depends_on_no_other(kind, place):
    """Of three tiles of one expert's choices."""
    _, stack = stack_of(kind)
    chosen = torch.full((40,), 2)
    x = torch.randn(40, K, generator=torch.Generator().manual_seed(2)).half()
    spoiled = x.clone()
    spoiled[8:] = torch.nan
    whole, others, alone = (
        multiplied(given, stack, these, place)
        for given, these in ((x, chosen), (spoiled, chosen), (x[:8], chosen[:8]))
    )  # fmt: skip
    assert torch.equal(whole[:8], others[:8]) and whole.isfinite().all() and others[8:].isnan().all()
    torch.testing.assert_close(whole[:8], alone, rtol=0, atol=0 if place[1] == "cuda" else 1e-3)


@pytest.mark.parametrize("place", [interpreted])
@both_kinds
def test_where_a_choice_is_of_no_expert_nothing_beyond_the_last_one_is_read(kind, place, monkeypatch):
    _, stack = stack_of(kind)
    longer = [None if part is None else torch.cat([part, part[-1:]]) for part in stack]
    stack = Stack(*(None if part is None else part[:-1] for part in longer))
    read = []
    poison_masked_loads(monkeypatch, read)
    multiplied(torch.ones(2, K).half(), stack, torch.tensor([EXPERTS, 0]), place)
    for part, whole in zip(stack[:4], longer[:4], strict=True):  # a table is of all experts
        if part is not None:
            begin, size = whole.data_ptr() + part.nbytes, whole.nbytes - part.nbytes
            assert not any(((at >= begin) & (at < begin + size)).any() for at in read)


@the_kernel
@both_kinds
def test_codes_that_the_kernel_cannot_read_are_refused(kind, place):
    """A view of a larger tensor may begin anywhere; on a GPU such a load is an illegal address."""
    _, stack = stack_of(kind)
    shifted = torch.cat([torch.zeros(2, dtype=torch.uint8), stack.codes.flatten()])
    device = place[1]
    stack = Stack(shifted.to(device)[2:], *(None if part is None else part.to(device) for part in stack[1:]))
    groups = grouped(torch.tensor([0, 1], device=device), EXPERTS, backend="triton")
    with pytest.raises(ValueError, match=r"codes must begin at a multiple of [48] bytes"):
        expert_product(torch.ones(2, K, device=device).half(), stack, groups, backend="triton")


@every_backend
@pytest.mark.parametrize("chosen", [[], [0], [5, 5, 5], [3, 0, 3, 9, 1, 3, 0], [2] * 70])
def test_choices_are_in_the_order_of_their_experts(chosen, place):
    groups = grouped(torch.tensor(chosen, dtype=torch.int64, device=place[1]), EXPERTS, backend=place[0])
    order = sorted(range(len(chosen)), key=lambda choice: min(chosen[choice], EXPERTS))
    assert groups.order.tolist() == order
    assert groups.begins.tolist() == [sum(choice < expert for choice in chosen) for expert in range(EXPERTS + 1)]


@both_kinds
def test_an_expert_is_what_its_stack_makes_of_it(kind):
    made, stack = stack_of(kind)
    for expert in range(EXPERTS):
        assert torch.equal(dense(stack, expert, K, torch.float32), made.matrix(expert, torch.float32))


@every_backend
def test_a_block_of_the_least_scale_is_no_zero(place):
    _, stack = stack_of("mxfp4", experts=1)
    stack.scales.zero_()
    x = torch.zeros(1, K, dtype=torch.bfloat16)
    x[0, 5] = 2.0**100
    found = multiplied(x, stack, torch.tensor([0]), place, experts=1)
    assert 0 < found.abs().max() == 6 * 2.0**-27
    assert torch.equal(found[0].float(), dense(stack, 0, K, torch.float32)[:, 5] * 2.0**100)


@both_kinds
def test_without_memory_is_allocated_what_the_kernel_would(kind):
    _, stack = stack_of(kind)
    stack = Stack(*(None if part is None else part.to("meta") for part in stack))
    groups = grouped(torch.empty(32, dtype=torch.int64, device="meta"), EXPERTS)
    assert [part.dtype for part in groups] == [torch.int64, torch.int32, torch.int32]
    out = expert_product(torch.empty(8, K, dtype=torch.bfloat16, device="meta"), stack, groups)
    assert out.shape == (32, N) and out.is_meta


@pytest.mark.skipif(module.triton is None, reason="needs Triton")
def test_what_is_not_served_is_said(monkeypatch):
    _, nf4 = stack_of("nf4")
    _, mxfp4 = stack_of("mxfp4")
    meta, bf16 = torch.device("meta"), torch.bfloat16
    assert serves(128, nf4, bf16, meta) and serves(96, mxfp4, torch.float16, meta)
    assert not serves(96, nf4, bf16, meta), "blocks of two rows"
    assert not serves(192, nf4, torch.float32, meta) and not serves(192, nf4, bf16, torch.device("cpu"))
    of_8 = torch.zeros(8, dtype=torch.int64, device="meta")
    assert module._runs_by_triton("auto", of_8)
    monkeypatch.setenv("LOWMEM_GRPO_TRITON", "0")
    assert not serves(192, nf4, bf16, meta) and not module._runs_by_triton("auto", of_8)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@both_kinds
@pytest.mark.parametrize("rows, each", [(1, 8), (16, 8), (64, 8), (64, 10)])
def test_products_of_real_shapes_are_those_of_the_twin(rows, each, kind):
    _, stack = stack_of(kind, 64, 1536, 2048)
    chosen, x = choices(rows, each, 64), torch.randn(rows, 2048).bfloat16()
    found, expected = (multiplied(x, stack, chosen, (where, "cuda"), 64)[chosen < 64] for where in ("triton", "torch"))
    assert error(found, expected.double()) < 2**-9


def wrong(**change):
    given = dict(x=torch.zeros(2, K), stack=stack_of("nf4")[1], groups=grouped(choices(2, 2), EXPERTS)) | change
    return expert_product(given.pop("x"), given.pop("stack"), given.pop("groups"), **given)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 96)), "K a multiple of 64"),
        (dict(x=torch.zeros(K, 2).T), "x must be contiguous"),
        (dict(x=torch.zeros(3, K)), "4 choices are no multiple of 3 rows"),
        (dict(x=torch.zeros(2, 192)), "whole rows of 192"),
        (dict(stack=stack_of("nf4", experts=4)[1]), "codes and scales must be of 5 experts"),
        (dict(stack=stack_of("nf4")[1]._replace(table=None)), "outer, offsets and table go together"),
        (dict(backend="cuda"), "backend must be"),
        (dict(backend="triton"), "multiplies bf16 or fp16, not torch.float32"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        wrong(**change)


@pytest.mark.parametrize("chosen", [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2), torch.zeros(MOST + 1).long()])
def test_choices_that_are_none_are_refused(chosen):
    with pytest.raises(ValueError, match=r"chosen must be contiguous \(C,\) int64"):
        grouped(chosen, EXPERTS)
