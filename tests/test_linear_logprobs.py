import contextlib
import functools
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_grpo.kernels import linear_logprobs as module
from lowmem_grpo.kernels.linear_logprobs import linear_logprobs, quantize_head

ROOT = Path(__file__).parents[1]
# On a CPU the kernels run in Triton's interpreter, which cuts fp32 to bf16 where a GPU rounds.
both = pytest.mark.parametrize("backend", ["torch", "triton"] if module.triton else ["torch"])
BF16 = {"torch": 1.2e-2, "triton": 4e-2}  # of a row of the gradient; 0.0035 and 0.011 were measured


# What is allocated and not written is NaN.
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def exact(hidden, weight, labels, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, upstream=(1.0, 0.0)):
    """(logp, entropy, gradient of upstream[0] logp + upstream[1] entropy) in fp64 from the definition."""
    hidden = hidden.detach().double().requires_grad_()
    raw = hidden @ weight.double().T + (0 if bias is None else bias.double())
    scores = raw * logit_scale
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) / temperature
    log_p = scores.log_softmax(-1)
    logp = log_p.gather(1, labels[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (upstream[0] * logp + upstream[1] * entropy).sum().backward()
    return logp.detach(), entropy.detach(), hidden.grad


def inputs(n, d, v, *, dtype=torch.float32, scale=1.0, bias=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=draw).to(dtype)
    weight = (torch.randn(v, d, generator=draw) * scale / d**0.5).to(dtype)
    labels = torch.randint(v, (n,), generator=draw)
    return hidden, weight, labels, torch.randn(v, generator=draw).to(dtype) if bias else None


def run(hidden, weight, labels, bias=None, *, upstream=(1.0, 0.0), entropy=True, **options):
    """(logp, entropy or None, gradient). The reference follows other scores where the entropy is asked for."""
    hidden = hidden.detach().requires_grad_()
    result = linear_logprobs(
        hidden, weight, labels, bias=bias, return_entropy=entropy, entropy_grad=upstream[1] != 0, **options
    )
    logp, entropies = result if entropy else (result, None)
    (upstream[0] * logp + (upstream[1] * entropies if upstream[1] else 0)).sum().backward()
    return logp.detach(), entropies.detach() if entropy else None, hidden.grad


def row_error(given, truth):
    return ((given.double() - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=1e-30)).max().item()


CASES = {
    "one row": dict(n=1, d=33, v=17, chunks=(4, 5)),
    "rows one short of a chunk": dict(n=7, d=48, v=513, chunks=(8, 100)),
    "rows a chunk": dict(n=8, d=48, v=512, chunks=(8, 128)),
    "rows one over a chunk": dict(n=9, d=64, v=513, chunks=(8, 128)),
    "vocabulary below a chunk": dict(n=5, d=16, v=30, chunks=(2, 4096)),
    "vocabulary chunks of one": dict(n=3, d=16, v=9, chunks=(2, 1)),
    "bias": dict(n=9, d=64, v=300, chunks=(4, 64), bias=True),
    "softcap far beyond its cap": dict(n=9, d=64, v=300, chunks=(4, 64), scale=60, softcap=30.0),
    "all three, warm": dict(n=9, d=64, v=300, chunks=(4, 64), bias=True, softcap=20.0, logit_scale=0.25, temperature=2.0),
    "cold": dict(n=9, d=64, v=300, chunks=(4, 64), temperature=0.1),
    "logits to 250": dict(n=16, d=48, v=777, chunks=(5, 100), scale=75.0),
}  # fmt: skip


@both
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_match_fp64_autograd(name, backend):
    case = dict(CASES[name])
    shape = {key: case.pop(key) for key in ("n", "d", "v", "scale", "bias") if key in case}
    hidden, weight, labels, bias = inputs(**shape)
    chunk = min(case["chunks"][1], shape["v"])
    edges = torch.tensor([0, shape["v"] - 1, chunk - 1, min(chunk, shape["v"] - 1)])[: shape["n"]]
    labels[: len(edges)] = edges
    logp, entropy, gradient = run(hidden, weight, labels, bias, backend=backend, **case)
    chunks = case.pop("chunks")
    true_logp, true_entropy, true_gradient = exact(hidden, weight, labels, bias, **case)
    # fp32 products of D terms: the absolute error grows with the size of the logits.
    size = (hidden @ weight.T).abs().max().item() * case.get("logit_scale", 1.0) / case.get("temperature", 1.0)
    torch.testing.assert_close(logp.double(), true_logp, atol=8e-7 * max(size, 3), rtol=1e-6)
    torch.testing.assert_close(entropy.double(), true_entropy, atol=3e-5, rtol=1e-5)
    assert row_error(gradient, true_gradient) < 1e-5, chunks


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "everything", "logits to 150"])
def test_16_bit_inputs_lose_only_the_rounding_of_what_is_stored(name, dtype, backend):
    shape, options = {
        "plain": (dict(scale=3.0), {}),
        "everything": (dict(bias=True, scale=6.0), dict(softcap=20.0, logit_scale=0.5, temperature=0.7)),
        "logits to 150": (dict(scale=40.0), {}),
    }[name]
    hidden, weight, labels, bias = inputs(7, 100, 300, dtype=dtype, **shape)
    labels[:3] = torch.tensor([0, 299, 128])
    true_logp, true_entropy, true_gradient = exact(hidden, weight, labels, bias, **options)
    for with_entropy in (True, False):
        logp, entropy, gradient = run(
            hidden, weight, labels, bias, entropy=with_entropy, backend=backend, chunks=(4, 128), **options
        )
        atol = 4e-5 if name == "logits to 150" else 4e-6
        torch.testing.assert_close(logp.double(), true_logp, atol=atol, rtol=1e-6)
        assert row_error(gradient, true_gradient) < (BF16[backend] if dtype == torch.bfloat16 else 1.5e-3)
        if with_entropy:
            torch.testing.assert_close(entropy.double(), true_entropy, atol=2e-5, rtol=0)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_entropy_has_a_gradient_when_asked(dtype, backend):
    """Weighed against the log-probability's, with every option on; the two gradients are of about the same size."""
    hidden, weight, labels, bias = inputs(7, 100, 300, dtype=dtype, bias=True, scale=3.0)
    options = dict(softcap=20.0, logit_scale=0.8, temperature=0.9)
    for upstream in [(0.0, 1.0), (0.7, -1.3)]:
        _, entropy, gradient = run(
            hidden, weight, labels, bias, upstream=upstream, backend=backend, chunks=(4, 64), **options
        )
        _, true_entropy, truth = exact(hidden, weight, labels, bias, upstream=upstream, **options)
        torch.testing.assert_close(entropy.double(), true_entropy, atol=4e-6, rtol=0)
        bound = {torch.float32: 8e-6, torch.bfloat16: BF16[backend], torch.float16: 2e-3}[dtype]
        assert row_error(gradient, truth) < bound


@both
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, dict(softcap=20.0, logit_scale=0.8, temperature=0.9)),
        (torch.float16, dict(entropy=False)),
    ],
    ids=str,
)
def test_whether_the_label_is_the_top_is_told_when_asked_and_changes_nothing_else(dtype, options, backend):
    """Of labels half of which are the top, in the first tile, in the last, and on both sides of a tile's edge."""
    hidden, weight, labels, bias = inputs(10, 48, 150, dtype=dtype, bias=True, scale=3.0)
    options = dict(options)
    entropy = options.pop("entropy", True)
    places = torch.tensor([0, 149, 63, 64])
    hidden[:4] += 6 * weight[places]
    scores = hidden.double() @ weight.double().T + bias.double()
    labels[:4], labels[4::2] = places, scores[4::2].argmax(-1)
    wanted = scores.argmax(-1) == labels
    assert wanted[:4].all() and 7 <= wanted.sum() < 10
    asked = dict(return_entropy=entropy, bias=bias, backend=backend, chunks=(5, 64), **options)
    results = []
    for return_top in (False, True):
        states = hidden.clone().requires_grad_()
        found = linear_logprobs(states, weight, labels, return_top=return_top, **asked)
        found = found if isinstance(found, tuple) else (found,)
        found[0].sum().backward()
        with torch.no_grad():
            again = linear_logprobs(states, weight, labels, return_top=return_top, **asked)
            again = again if isinstance(again, tuple) else (again,)
        assert all(map(torch.equal, found, again))
        results.append((*found, states.grad))
    without, (*values, top, gradient) = results
    assert top.dtype == torch.bool and torch.equal(top, wanted)
    assert all(map(torch.equal, without, (*values, gradient)))


@both
def test_a_label_beside_an_equal_score_is_the_top_and_one_below_is_not(backend):
    hidden, weight = torch.ones(3, 1), torch.tensor([[2.0], [2.0], [1.0]])
    for chunks in [(3, 3), (3, 1)]:
        _, top = linear_logprobs(
            hidden, weight, torch.tensor([0, 1, 2]), return_top=True, backend=backend, chunks=chunks
        )
        assert top.tolist() == [True, True, False]
    _, top = linear_logprobs(hidden, weight[:1], torch.zeros(3, dtype=torch.int64), return_top=True, backend=backend)
    assert top.all(), "of one, it is the first"
    none = linear_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.int64), return_top=True, backend=backend)
    assert none[1].shape == (0,) and none[1].dtype == torch.bool


@both
def test_strided_inputs_are_read_where_they_lie(backend):
    hidden, weight, labels, bias = inputs(5, 33, 90, bias=True)
    plain = run(hidden, weight, labels, bias, backend=backend, chunks=(2, 32))
    apart = torch.zeros(180, 40)
    apart[::2, :33] = weight
    columns = hidden.t().contiguous().t()
    every_second = torch.stack([bias, bias], 1)[:, 0], torch.stack([labels, labels], 1)[:, 0]
    strided = run(columns, apart[::2, :33], every_second[1], every_second[0], backend=backend, chunks=(2, 32))
    for mine, theirs in zip(strided, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


@pytest.mark.skipif(module.triton is None, reason="needs Triton")
@pytest.mark.parametrize("upstream", [(1.0, 0.0), (1.0, 1.0)])
def test_kernels_and_twin_agree(upstream):
    hidden, weight, labels, bias = inputs(7, 70, 200, bias=True, scale=3.0)
    options = dict(softcap=30.0, temperature=0.8, chunks=(4, 64), upstream=upstream)
    twin = run(hidden, weight, labels, bias, backend="torch", **options)
    kernels = run(hidden, weight, labels, bias, backend="triton", **options)
    torch.testing.assert_close(kernels[0], twin[0], rtol=0, atol=1.2e-5)
    torch.testing.assert_close(kernels[1], twin[1], rtol=0, atol=5e-6)
    assert row_error(kernels[2], twin[2].double()) < 5e-6


@both
def test_an_int8_head_is_its_dequantized_self(backend):
    hidden, weight, labels, bias = inputs(6, 48, 150, bias=True, scale=4.0)
    quantized, scale = quantize_head(weight)
    assert quantized.dtype == torch.int8
    assert ((quantized * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()
    for dtype, bound in [(torch.float32, 8e-6), (torch.bfloat16, BF16[backend]), (torch.float16, 1.5e-3)]:
        narrow = hidden.to(dtype)
        logp, entropy, gradient = run(
            narrow, quantized, labels, bias, weight_scale=scale, backend=backend, chunks=(4, 64)
        )
        truth = exact(narrow, (quantized * scale[:, None]).to(dtype), labels, bias)
        torch.testing.assert_close(logp.double(), truth[0], atol=5e-6, rtol=0)
        torch.testing.assert_close(entropy.double(), truth[1], atol=1e-5, rtol=0)
        assert row_error(gradient, truth[2]) < bound


def test_bf16_tiles_round_the_scores_but_not_the_labels():
    hidden, weight, labels, bias = inputs(40, 64, 500, dtype=torch.bfloat16, bias=True, scale=4.0)
    logp, entropy, gradient = run(hidden, weight, labels, bias, tile_dtype=torch.bfloat16, chunks=(16, 128))
    truth = exact(hidden, weight, labels, bias)
    torch.testing.assert_close(logp.double(), truth[0], atol=0.1, rtol=0)  # logits to 16, in steps of 1/16
    torch.testing.assert_close(entropy.double(), truth[1], atol=0.1, rtol=0)
    assert row_error(gradient, truth[2]) < 4e-2
    # A label 30 above the rest: its share would be off by exp(0.06) if its own score were rounded too.
    hidden, weight = torch.eye(12)[:3].mul(30.1).bfloat16(), torch.eye(12).bfloat16()
    certain = linear_logprobs(hidden, weight, torch.arange(3), tile_dtype=torch.bfloat16, chunks=(2, 4))
    torch.testing.assert_close(
        certain, -torch.log1p(11 * torch.exp(-hidden[0, 0].float())).expand(3), rtol=1e-5, atol=0
    )


@both
def test_no_rows_give_no_log_probabilities(backend):
    hidden, weight, labels, _ = inputs(0, 8, 20)
    logp, entropy, gradient = run(hidden, weight, labels, backend=backend)
    assert logp.shape == entropy.shape == (0,)
    assert gradient.shape == (0, 8)


@both
def test_a_vocabulary_of_one_is_certain(backend):
    logp, entropy, gradient = run(
        torch.ones(2, 4), torch.ones(1, 4), torch.zeros(2, dtype=torch.int64), upstream=(1.0, 1.0), backend=backend
    )
    assert not logp.any()
    assert not entropy.any()
    assert not gradient.any()


@both
@pytest.mark.parametrize("lead", [-200.0, -80.0, 30.0, 80.0, 200.0])
def test_a_label_far_below_or_above_the_rest_stays_exact(lead, backend):
    """+-80 and 200 cross the threshold where the reference score moves, in the first and in later chunks."""
    weight = torch.eye(12)
    labels = torch.tensor([0, 5, 11])
    hidden = torch.zeros(3, 12)
    hidden[torch.arange(3), labels] = lead
    hidden[0, 3] += 1.0
    hidden.requires_grad_()
    logp = linear_logprobs(hidden, weight, labels, chunks=(2, 4), backend=backend)
    logp.sum().backward()
    # The truth by the label-free sum in fp64: at these p_y fp64's own log_softmax has no digits left.
    others = torch.exp(hidden.detach().double() - lead).scatter(1, labels[:, None], 0.0)
    rest = others.sum(-1)
    truth = (rest[:, None] * torch.eye(12).double()[labels] - others) / (1 + rest[:, None])
    torch.testing.assert_close(logp.double(), -torch.log1p(rest), rtol=3e-7, atol=1e-38)
    assert lead == 200 or row_error(hidden.grad, truth) < 5e-6
    assert lead < 200 or hidden.grad.abs().max() < 1e-38  # 1 - p_y is below fp32's smallest number


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [30.0, 80.0, 200.0])
def test_one_score_far_above_the_label_overflows_nothing_in_16_bits(lead, dtype, backend):
    """The other's tile comes after the label's, before it, and with it; fp16 ends at exp(11)."""
    weight = torch.eye(12, dtype=dtype)
    labels, others = torch.tensor([0, 11, 5]), torch.tensor([9, 1, 6])
    hidden = torch.zeros(3, 12, dtype=dtype)
    hidden[torch.arange(3), others] = lead
    for options in (dict(entropy=False), {}, dict(upstream=(1.0, 1.0))):
        logp, entropy, gradient = run(hidden, weight, labels, chunks=(2, 4), backend=backend, **options)
        torch.testing.assert_close(logp, torch.full((3,), -lead))
        assert entropy is None or entropy.abs().max() < 1.2e-5
        rtol = 4e-2 if dtype == torch.bfloat16 else 2e-3
        torch.testing.assert_close(gradient, weight[labels] - weight[others], rtol=rtol, atol=1e-3)


@both
@pytest.mark.parametrize("where", ["a row of the head", "a row of hidden states", "an infinite score"])
def test_a_nan_shows_and_stays_in_its_rows(where, backend):
    """Left unseen it would be a label that is certain: log-probability 0 and entropy 0."""
    hidden, weight, labels, bias = inputs(5, 16, 40, bias=True)
    labels[:] = torch.arange(5)
    bad = torch.ones(5, dtype=torch.bool)
    if where == "a row of hidden states":
        hidden[2], bad = torch.nan, torch.arange(5) == 2
    else:
        {"a row of the head": weight, "an infinite score": bias}[where][20] = (
            torch.nan if "head" in where else torch.inf
        )
    for options in (dict(entropy=False), {}, dict(upstream=(1.0, 1.0))):
        logp, entropy, gradient = run(hidden, weight, labels, bias, backend=backend, chunks=(2, 16), **options)
        assert torch.equal(logp.isnan(), bad) and torch.equal(gradient.isnan().all(1), bad)
        assert entropy is None or torch.equal(entropy.isnan(), bad)


@both
def test_equal_logits_give_the_uniform_distribution(backend):
    logp, entropy, gradient = run(
        torch.zeros(2, 4), torch.zeros(10, 4), torch.tensor([0, 9]), backend=backend, chunks=(2, 4)
    )
    torch.testing.assert_close(logp, torch.full((2,), -10.0).abs().log().neg())
    torch.testing.assert_close(entropy, torch.full((2,), 10.0).log())
    assert not gradient.any()


def naive_gradient(hidden, weight, labels):
    """W_y - E[W] with the expectation kept in bf16: what the target's own share must not be part of."""
    p = (hidden.float() @ weight.float().T).softmax(-1)
    return weight[labels].float() - (p @ weight.float()).bfloat16().float()


@functools.cache
def labels_of_every_certainty():
    """bf16 (hidden, weight, labels, ours, exact)"""
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(2000, 128, generator=draw) / 128**0.5).bfloat16()
    labels = torch.randint(2000, (4000,), generator=draw)
    lead = torch.rand(4000, 1, generator=draw) * 20
    hidden = (torch.randn(4000, 128, generator=draw) + lead * weight[labels].float()).bfloat16()
    ours = run(hidden, weight, labels, entropy=False, backend="torch")
    return hidden, weight, labels, ours, exact(hidden, weight, labels)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (0.5, 0.9), (0.9, 0.99), (0.99, 0.9999), (0.9999, 1.0)])
def test_the_gradient_is_as_exact_where_the_label_is_certain(low, high):
    """bf16 inputs: the relative error of a row is bf16's rounding in every bucket of p_y. The usual form fails this."""
    hidden, weight, labels, (logp, _, gradient), (true_logp, _, truth) = labels_of_every_certainty()
    bucket = (true_logp.exp() > low) & (true_logp.exp() <= high)
    assert bucket.sum() > 20
    assert row_error(gradient[bucket], truth[bucket]) < BF16["torch"]
    torch.testing.assert_close(logp.double(), true_logp, atol=4e-6, rtol=2e-6)
    if low >= 0.99:
        naive = naive_gradient(hidden[bucket], weight, labels[bucket])
        assert row_error(naive, truth[bucket]) > 0.1


@pytest.mark.skipif(module.triton is None, reason="needs Triton")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, BF16["triton"]), (torch.float16, 2e-3)])
def test_the_kernels_gradient_is_as_exact_where_the_label_is_certain(dtype, bound):
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(500, 64, generator=draw) / 8).to(dtype)
    labels = torch.randint(500, (100,), generator=draw)
    lead = torch.linspace(0, 24, 100)[:, None]
    hidden = (torch.randn(100, 64, generator=draw) + lead * weight[labels].float()).to(dtype)
    logp, _, gradient = run(hidden, weight, labels, entropy=False, backend="triton", chunks=(100, 512))
    true_logp, _, truth = exact(hidden, weight, labels)
    torch.testing.assert_close(logp.double(), true_logp, atol=2e-6, rtol=2e-6)
    edges = [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0]
    for low, high in itertools.pairwise(edges):
        bucket = (true_logp.exp() > low) & (true_logp.exp() <= high)
        assert bucket.sum() > 3, (low, high)
        # fp16 keeps a gradient below 6e-5 only in steps of 6e-8, whatever made it: where p_y is nearly 1 that shows.
        steps = 6e-8 * 64**0.5 / truth[bucket].norm(dim=1).min().item() if dtype == torch.float16 else 0
        assert row_error(gradient[bucket], truth[bucket]) < bound + steps, (low, high)


@both
def test_neither_the_order_of_rows_nor_of_the_vocabulary_matters(backend):
    hidden, weight, labels, bias = inputs(7, 24, 150, scale=5, bias=True)
    first = run(hidden, weight, labels, bias, backend=backend, chunks=(3, 64))
    draw = torch.Generator().manual_seed(1)
    rows, ids = (torch.randperm(count, generator=draw) for count in (7, 150))
    moved = run(hidden[rows], weight[ids], ids.argsort()[labels[rows]], bias[ids], backend=backend, chunks=(3, 64))
    for mine, theirs in zip(moved, first, strict=True):
        torch.testing.assert_close(mine, theirs[rows], rtol=0, atol=1.2e-5)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repeated_run_gives_the_same_bits(dtype, backend):
    given = inputs(7, 24, 150, dtype=dtype, scale=5, bias=True)
    first, second = (run(*given, upstream=(1.0, 0.5), backend=backend, chunks=(3, 64)) for _ in range(2))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


@both
def test_chunk_sizes_do_not_change_the_result(backend):
    n = 37 if backend == "torch" else 5
    given = inputs(n, 24, 211, scale=30, bias=True)
    results = [
        run(*given, chunks=chunks, backend=backend)
        for chunks in [(37, 211), (5, 16), (1, 211), (64, 1 if backend == "torch" else 40)]
    ]
    for other in results[1:]:
        for mine, first in zip(other[:2], results[0][:2], strict=True):
            torch.testing.assert_close(mine, first, rtol=1e-6, atol=3e-5)  # logits reach 100
        assert row_error(other[2], results[0][2].double()) < 2e-5


@both
def test_the_no_gradient_pass_gives_the_same_bits(backend):
    hidden, weight, labels, _ = inputs(9, 32, 100)
    with_gradient = linear_logprobs(hidden.clone().requires_grad_(), weight, labels, backend=backend)
    assert torch.equal(linear_logprobs(hidden, weight, labels, backend=backend), with_gradient)
    with torch.no_grad():
        assert not linear_logprobs(hidden.clone().requires_grad_(), weight, labels).requires_grad


@both
def test_a_second_backward_raises_instead_of_reading_what_the_first_overwrote(backend):
    hidden, weight, labels, _ = inputs(4, 8, 20)
    logp = linear_logprobs(hidden.requires_grad_(), weight, labels, backend=backend)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


@both
def test_a_second_derivative_is_refused_instead_of_taken_for_zero(backend):
    hidden, weight, labels, _ = inputs(4, 8, 20)
    logp = linear_logprobs(hidden.requires_grad_(), weight, labels, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logp.square().sum(), hidden, create_graph=True)


def test_autocast_around_it_changes_nothing():
    hidden, weight, labels, _ = inputs(9, 32, 100)
    outside = linear_logprobs(hidden, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_logprobs(hidden, weight, labels), outside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=torch.zeros(3, dtype=torch.int64)), "labels must be"),
        (dict(labels=torch.zeros(4, dtype=torch.int32)), "labels must be"),
        (dict(weight=torch.zeros(20, 9)), "must be \\(N, D\\) and \\(V, D\\)"),
        (dict(weight=torch.zeros(20, 8, requires_grad=True)), "freeze it"),
        (dict(bias=torch.zeros(19)), "bias must be"),
        (dict(hidden_states=torch.zeros(4, 8, dtype=torch.float64)), "hidden_states must be"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(entropy_grad=True), "needs return_entropy"),
        (dict(backend="cuda"), "backend must be"),
        (dict(weight=torch.zeros(20, 8, dtype=torch.int8)), "needs weight_scale"),
        (dict(weight_scale=torch.zeros(20)), "only an int8"),
        (dict(weight=torch.zeros(20, 8, dtype=torch.int8), weight_scale=torch.zeros(8)), "weight_scale must be"),
        (dict(tile_dtype=torch.float16), "tile_dtype must be"),
        (
            dict(labels=torch.tensor([0, 1, 2, -100])),
            "labels must be in \\[0, 20\\), not -100 to 2; leave out rows",
        ),
        (dict(labels=torch.tensor([0, 1, 2, 20])), "labels must be in \\[0, 20\\)"),
        (dict(weight=torch.zeros(20, 8, device="meta")), "weight is on meta and hidden_states on cpu; move"),
        (dict(weight=torch.zeros(20, 8).double(), hidden_states=torch.zeros(4, 8).double()), "weight must be float32"),
        (dict(weight=torch.zeros(20, 8, dtype=torch.int32)), "weight must be float32"),
        (
            dict(weight=torch.zeros(20, 8, dtype=torch.int8), weight_scale=torch.ones(20, requires_grad=True)),
            "freeze it",
        ),
        (dict(softcap=0.0), "softcap must be positive, or None"),
        (dict(chunks=(0, 4)), "chunks must be"),
        (dict(chunks=()), "chunks must be"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, message):
    given = dict(hidden_states=torch.zeros(4, 8), weight=torch.zeros(20, 8), labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{**given, **change})


@pytest.mark.skipif(module.triton is None, reason="needs Triton")
@pytest.mark.parametrize("int8", [False, True])
def test_a_label_outside_of_the_vocabulary_is_nan_where_it_is_not_looked_at(int8, monkeypatch):
    """As on a GPU, where an unmasked read would return whatever lies there, and end in a certain label."""
    hidden, weight, labels, bias = inputs(5, 16, 40, bias=True)
    weight, scale = quantize_head(weight) if int8 else (weight, None)
    labels[1:3] = torch.tensor([-100, 40] if not int8 else [-1, -2])  # an int8 head is indexed, which asserts from V on
    monkeypatch.setattr(module, "_check", lambda *_: None)
    for options in (dict(entropy=False), dict(softcap=9.0), dict(upstream=(1.0, 1.0))):
        logp, entropy, gradient = run(
            hidden, weight, labels, bias, weight_scale=scale, backend="triton", chunks=(2, 16), **options
        )
        bad = [False, True, True, False, False]
        assert logp.isnan().tolist() == gradient.isnan().all(1).tolist() == bad
        assert entropy is None or entropy.isnan().tolist() == bad


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation makes; outputs that alias an input are left out."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        storages = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in storages:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_no_tensor_has_tokens_times_vocabulary_elements(dtype, with_gradient, softcap):
    n, d, v, c, vb = 70, 24, 1000, 16, 64  # five token chunks, sixteen vocabulary chunks
    hidden, weight, labels, bias = inputs(n, d, v, dtype=torch.float32 if dtype == torch.int8 else dtype, bias=True)
    weight, scale = quantize_head(weight) if dtype == torch.int8 else (weight, None)
    hidden.requires_grad_(with_gradient)
    with LargestTensor() as largest:
        logp, _ = linear_logprobs(
            hidden, weight, labels, bias=bias, weight_scale=scale, softcap=softcap, return_entropy=True,
            entropy_grad=True, chunks=(c, vb),
        )  # fmt: skip
        if with_gradient:
            logp.sum().backward()
    assert 0 < largest.elements <= max(c * vb, c * d, n * d, vb * d)


class Launches(TorchDispatchMode):
    """How often our kernels are launched, and those of torch's operations that compute. Memory that is NaN is not."""

    COMPUTING = ("mm", "addmm", "addmm_", "zero_", "copy_", "_to_copy", "cat", "mul", "add", "add_", "clone")

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts, self.in_a_kernel = Counter(), False
        for name in ("start", "fold", "finish"):
            monkeypatch.setattr(module, f"_triton_{name}", self.counted(name, getattr(module, f"_triton_{name}")))

    def counted(self, name, launch):
        def run(*args, **kwargs):
            self.counts[name], self.in_a_kernel = self.counts[name] + 1, True
            launch(*args, **kwargs)
            self.in_a_kernel = False

        return run

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not self.in_a_kernel and name in self.COMPUTING:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(module.triton is None, reason="needs Triton")
@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_tile_is_a_launch_a_product_and_one_for_the_fold(with_gradient, monkeypatch):
    """And a chunk three more at most, whatever its tiles."""
    hidden, weight, labels, _ = inputs(5, 16, 100)
    chunks, tiles = 3, 4
    hidden.requires_grad_(with_gradient)
    with Launches(monkeypatch) as launches:
        linear_logprobs(hidden, weight, labels, backend="triton", chunks=(2, 32))
    expected = {"start": chunks, "finish": chunks, "mm": chunks * tiles, "fold": chunks * tiles}
    if with_gradient:
        expected |= {"zero_": chunks, "addmm_": chunks * tiles}
    assert launches.counts == expected


def test_chunks_of_tokens_are_as_few_as_can_be_and_alike():
    assert [module.even_chunks(n, 4096) for n in (1, 128, 129, 4096, 4097, 5100, 8192, 8193)] == [
        128, 128, 256, 4096, 2176, 2560, 4096, 2816
    ]  # fmt: skip
    assert module.even_chunks(0, 4096) == 1, "no tokens are cut into chunks of one"
    assert module.even_chunks(100, 37) == 37, "never more than asked for"
    for n in range(1, 20000, 777):
        assert -(-n // module.even_chunks(n, 2048)) == -(-n // 2048), n


def test_the_size_test_sees_full_logits():
    hidden, weight, labels, _ = inputs(70, 24, 1000)
    with LargestTensor() as largest:
        F.linear(hidden, weight).log_softmax(-1).gather(1, labels[:, None])
    assert largest.elements == 70 * 1000


@pytest.fixture
def in_one(monkeypatch):
    """Product and fold by one kernel, in Triton's interpreter, and how often; in fp32, since it cuts bf16 otherwise."""
    calls, own = [], module.head_shares.fold
    monkeypatch.setattr(module.head_shares, "GROUP", 2)  # of three tiles of rows two are side by side, as of many 16
    monkeypatch.setattr(module.head_shares, "serves", lambda hidden, weight: True)
    monkeypatch.setattr(module.head_shares, "fold", lambda *given, **more: (calls.append(given), own(*given, **more)))
    return calls


@pytest.mark.skipif(module.triton is None, reason="needs Triton")
class TestInOneKernel:
    @pytest.mark.parametrize(
        "case",
        [
            dict(n=1, d=8, v=17, chunks=(1, 17)), dict(n=150, d=72, v=700, chunks=(100, 512)),
            dict(n=257, d=8, v=300, chunks=(257, 300)), dict(n=5, d=136, v=300, chunks=(2, 4096)),
            dict(n=9, d=64, v=300, chunks=(4, 64), scale=6, logit_scale=0.25, temperature=0.5),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("entropy", [False, True])
    def test_it_gives_the_definition(self, case, entropy, in_one):
        options = {key: case[key] for key in ("logit_scale", "temperature") if key in case}
        given = inputs(case["n"], case["d"], case["v"], scale=case.get("scale", 3.0))
        found = run(*given, entropy=entropy, backend="triton", chunks=case["chunks"], **options)
        truth = exact(*given, **options)
        assert in_one
        torch.testing.assert_close(found[0].double(), truth[0], atol=4e-6, rtol=1e-6)
        assert row_error(found[2], truth[2]) < 3e-6
        if entropy:
            torch.testing.assert_close(found[1].double(), truth[1], atol=8e-6, rtol=0)

    def test_whether_the_label_is_the_top_is_told(self, in_one):
        hidden, weight, labels, _ = inputs(60, 64, 700, scale=6)
        scores = hidden.double() @ weight.double().T
        labels[::2] = scores[::2].argmax(-1)
        asked = dict(return_entropy=True, backend="triton", chunks=(50, 512), logit_scale=0.5)
        *values, top = linear_logprobs(hidden, weight, labels, return_top=True, **asked)
        assert torch.equal(top, scores.argmax(-1) == labels) and 30 <= top.sum() < 60 and in_one
        assert all(map(torch.equal, values, linear_logprobs(hidden, weight, labels, **asked)))

    @pytest.mark.parametrize("entropy", [False, True])
    def test_labels_far_below_or_above_the_rest_stay_exact(self, entropy, in_one):
        """Also where the sums over the others are beyond fp32; rows beside them keep their bits."""
        hidden, weight, labels, _ = inputs(40, 64, 700, scale=3)
        calm = run(hidden, weight, labels, entropy=entropy, backend="triton", chunks=(40, 512))
        lead = torch.tensor([-300.0, -100.0, -70.0, -40.0, 10.0, 20.0]).repeat_interleave(2)
        rows = torch.arange(1, 25, 2)  # all of them looked through by the second program
        own = weight[labels[rows]]
        hidden[rows] += lead[:, None] * own / own.square().sum(1, keepdim=True)
        found = run(hidden, weight, labels, entropy=entropy, backend="triton", chunks=(40, 512))
        truth = exact(hidden, weight, labels)
        torch.testing.assert_close(found[0].double(), truth[0], atol=1e-5, rtol=1e-6)
        assert row_error(found[2], truth[2]) < 1e-5
        if entropy:
            torch.testing.assert_close(found[1].double(), truth[1], atol=2e-5, rtol=0)
        others = torch.ones(40, dtype=torch.bool).index_fill_(0, rows, False)
        for ours, before in zip(found, calm, strict=True):
            assert ours is None or torch.equal(ours[others], before[others])

    def test_a_nan_shows_and_stays_in_its_rows(self, in_one):
        hidden, weight, labels, _ = inputs(9, 64, 300)
        truth = run(hidden, weight, labels, backend="triton", chunks=(9, 300))
        hidden[4, 3] = torch.nan
        for found, before in zip(run(hidden, weight, labels, backend="triton", chunks=(9, 300)), truth, strict=True):
            assert found[4].isnan().all() and torch.equal(
                found[[*range(4), *range(5, 9)]], before[[*range(4), *range(5, 9)]]
            )

    def test_a_pass_without_gradient_and_slices_give_the_same_bits(self, in_one):
        hidden, weight, labels, _ = inputs(20, 64, 9000, scale=4)
        asked = dict(return_entropy=True, return_top=True, backend="triton")
        whole = linear_logprobs(hidden, weight, labels, chunks=(20, 4096), **asked)
        assert len(in_one) == 1
        sliced = linear_logprobs(hidden.requires_grad_(), weight, labels, chunks=(20, 4096), **asked)
        assert len(in_one) == 4 and all(map(torch.equal, whole, sliced))

    def test_few_tokens_have_wide_slices_in_the_same_room_and_the_same_bits(self, in_one):
        hidden, weight, labels, _ = inputs(3, 8, 9000, scale=4)
        asked = dict(return_entropy=True, return_top=True, backend="triton")
        whole = linear_logprobs(hidden, weight, labels, chunks=(3, 4096), **asked)
        wide = linear_logprobs(hidden.requires_grad_(), weight, labels, chunks=(6, 4096), **asked)
        assert [len(given[1]) for given in in_one] == [9000, 8192, 808]
        assert all(map(torch.equal, whole, wide))
        (wide[0].sum() + wide[1].sum() * 0).backward()
        found = run(hidden.detach(), weight, labels, backend="torch")
        assert row_error(hidden.grad, found[2]) < 3e-6
        width = module.head_shares.slice_width
        room = 4096 * 8192
        assert [width(n, 8192, room) for n in (256, 2048, 2560, 4096, 8192)] == [32768, 16384, 12288, 8192, 8192]
        assert width(2, 512, 2 * 4095) == 512 and width(2, 512, 2 * 4097) == 4096

    @pytest.mark.parametrize(
        "change",
        [dict(softcap=30.0), dict(temperature=0.4), dict(bias=torch.zeros(300)), dict(return_entropy=True, entropy_grad=True)],
        ids=str,
    )  # fmt: skip
    def test_what_it_does_not_know_goes_as_ever(self, change, in_one):
        hidden, weight, labels, _ = inputs(3, 64, 300)
        found = linear_logprobs(hidden.requires_grad_(), weight, labels, backend="triton", chunks=(3, 128), **change)
        assert (found[0] if isinstance(found, tuple) else found).isfinite().all() and not in_one

    def test_a_trial_finds_a_kernel_that_is_wrong_or_fails(self, in_one, monkeypatch):
        trial = functools.partial(module.head_shares.trial, torch.device("cpu"), 24, torch.float32)
        drawn = torch.get_rng_state()
        torch.set_default_dtype(torch.float64)
        try:
            lost = trial()
            assert isinstance(lost, float) and abs(lost) < 1e-7, "the interpreter rounds"
            assert torch.equal(torch.get_rng_state(), drawn)
        finally:
            torch.set_default_dtype(torch.float32)
        fold = module.head_shares.fold
        for row in (module.REST, module.MOMENT, module.BEST):

            def off(*given, row=row, **options):
                fold(*given, **options)
                given[3][row, 5:60] *= 1.1

            monkeypatch.setattr(module.head_shares, "fold", off)
            assert "gave something else" in trial()

        def wrong_without_shares(*given, programs, **options):
            fold(*given, **options)
            if given[5] is None:
                given[3][module.REST, 7] *= 1.1
            assert programs == 1, "one program takes a tile after the other, as in a real call"

        monkeypatch.setattr(module.head_shares, "fold", wrong_without_shares)
        assert trial() == "a trial of its kernel gave something else"
        monkeypatch.setattr(module.head_shares, "fold", lambda *given, **options: None)
        assert "gave something else" in trial()
        monkeypatch.setattr(
            module.head_shares, "fold", lambda *given, **options: (_ for _ in ()).throw(OSError("no\nmore"))
        )
        assert trial() == "a trial of its kernel failed (OSError: no)"

    def test_what_a_tensor_core_cuts_off_is_made_up_for(self, in_one, monkeypatch):
        """With one in the interpreter that cuts sums to 24 bits, 16 products at a time."""
        from triton.runtime import interpreter

        def cut_off(a, b, total, *_):
            acc = total.data
            for k in range(0, a.data.shape[1], 16):
                exact = acc + a.data[:, k : k + 16].astype(np.float64) @ b.data[k : k + 16].astype(np.float64)
                acc = exact.astype(np.float32)
                acc = np.where(abs(acc) > abs(exact), np.nextafter(acc, np.float32(0)), acc)
            return interpreter.TensorHandle(acc, total.dtype.scalar)

        monkeypatch.setattr(interpreter.interpreter_builder, "create_dot", lambda a, b, *more: cut_off(a, b, *more))
        d = 1536
        hidden, weight, labels, _ = inputs(24, d, 700, scale=2.5)
        truth = exact(hidden, weight, labels)

        def errors():
            found = run(hidden, weight, labels, backend="triton", chunks=(24, 1024))
            return [(found[i].double() - truth[i]).square().mean().sqrt().item() for i in range(2)]

        before = errors()
        lost = module.head_shares.trial(hidden.device, d, torch.float32)
        assert 1.9e-6 < lost < 2.3e-6
        monkeypatch.setitem(module.head_shares._lost, (hidden.device, d), lost)
        assert all(after < least / 4 for after, least in zip(errors(), before, strict=True)), (before, errors())

    def test_it_is_for_bf16_on_a_hopper_and_rows_that_tma_reads(self, monkeypatch):
        serves, tried = module.head_shares.serves, []
        monkeypatch.setattr(module.head_shares, "_lost", {})
        monkeypatch.setattr(module.head_shares, "trial", lambda *given: tried.append(given) or 0.0)
        card, on = [(9, 0)], []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card[0])
        monkeypatch.setattr(torch.cuda, "device_of", lambda x: on.append(x) or contextlib.nullcontext())

        def of(dtype=torch.bfloat16, d=64, device="cuda"):
            with FakeTensorMode():
                return serves(*(torch.empty(7, d, dtype=dtype, device=device) for _ in range(2)))

        monkeypatch.setattr(module.head_shares, "can_be_described", lambda rows: rows.shape[1] % 8 == 0)
        assert of() and not of(torch.float16) and not of(torch.float32) and not of(d=60) and not of(device="cpu")
        assert len(tried) == len(on) == 1, "and on that card, which may not be the current one"
        for card[0] in ((8, 9), (10, 0), (12, 0)):
            assert not of()
        card[0] = (9, 0)
        monkeypatch.setattr(module.head_shares, "trial", lambda *given: "made up")
        with pytest.warns(UserWarning, match="multiplied by a library, which is slower: made up"):
            assert of() and not of(d=72)
        assert not of(d=72), "and is said once"
        monkeypatch.undo()
        described = module.head_shares.can_be_described
        rows = torch.zeros(6, 72, dtype=torch.bfloat16)
        assert described(rows) and described(rows[:, :60]) and described(rows[2:]) and described(rows[::2])
        assert not described(rows[:1].expand(6, 72)), "TMA wants rows apart"
        assert not described(rows[:, 1:]) and not described(rows.t()) and not described(torch.zeros(6, 60).bfloat16())


on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
GPU_BOUND = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


class TestOnAGpu:
    pytestmark = on_a_gpu

    @both
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("options", [{}, dict(softcap=30.0, logit_scale=0.5, temperature=0.7)])
    def test_values_and_gradients_match_fp64(self, dtype, options, backend):
        given = [x.cuda() for x in inputs(300, 250, 10007, dtype=dtype, scale=8, bias=True)]
        for chunks in [None, (128, 1000)]:
            for upstream in [(1.0, 0.0), (1.0, 0.5)]:
                results = run(*given, upstream=upstream, backend=backend, chunks=chunks, **options)
                truth = exact(*given, upstream=upstream, **options)
                torch.testing.assert_close(results[0].double(), truth[0], atol=5e-5, rtol=1e-5)
                torch.testing.assert_close(results[1].double(), truth[1], atol=5e-5, rtol=1e-5)
                assert row_error(results[2], truth[2]) < GPU_BOUND[dtype] * (3 if upstream[1] else 1)

    @both
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_an_int8_head_is_its_dequantized_self(self, dtype, backend):
        hidden, weight, labels, _ = (x if x is None else x.cuda() for x in inputs(300, 256, 5003, scale=4.0))
        quantized, scale = quantize_head(weight)
        results = run(hidden.to(dtype), quantized, labels, weight_scale=scale, backend=backend, chunks=(128, 1024))
        truth = exact(hidden.to(dtype), (quantized * scale[:, None]).to(dtype), labels)
        torch.testing.assert_close(results[0].double(), truth[0], atol=5e-5, rtol=1e-5)
        assert row_error(results[2], truth[2]) < GPU_BOUND[dtype]

    @both
    def test_the_gradient_is_as_exact_where_the_label_is_certain(self, backend):
        draw = torch.Generator().manual_seed(0)
        weight = (torch.randn(20000, 256, generator=draw) / 16).bfloat16().cuda()
        labels = torch.randint(20000, (2000,), generator=draw).cuda()
        lead = torch.linspace(0, 24, 2000)[:, None].cuda()
        hidden = (torch.randn(2000, 256, generator=draw).cuda() + lead * weight[labels].float()).bfloat16()
        logp, _, gradient = run(hidden, weight, labels, entropy=False, backend=backend)
        true_logp, _, truth = exact(hidden, weight, labels)
        torch.testing.assert_close(logp.double(), true_logp, atol=2e-5, rtol=1e-5)
        edges = [0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0]
        for low, high in itertools.pairwise(edges):
            bucket = (true_logp.exp() > low) & (true_logp.exp() <= high)
            assert bucket.sum() > 5, (low, high)
            assert row_error(gradient[bucket], truth[bucket]) < 5e-3, (low, high)

    @both
    @pytest.mark.parametrize("lead", [-200.0, -80.0, 30.0, 80.0, 200.0])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_one_score_far_from_the_label_overflows_nothing(self, lead, dtype, backend):
        weight = torch.eye(2048, dtype=dtype, device="cuda")
        labels = torch.arange(0, 2048, 8, device="cuda")
        hidden = torch.zeros(256, 2048, dtype=dtype, device="cuda")
        hidden[torch.arange(256), (labels + 1024) % 2048] = lead
        truth = exact(hidden, weight, labels)
        for entropy in (True, False):
            results = run(hidden, weight, labels, entropy=entropy, backend=backend, chunks=(64, 512))
            torch.testing.assert_close(results[0].double(), truth[0], atol=1e-4, rtol=1e-6)
            assert row_error(results[2], truth[2]) < 5e-3

    @both
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_whether_the_label_is_the_top_is_told(self, dtype, backend):
        hidden, weight, labels, bias = (x.cuda() for x in inputs(300, 250, 10007, dtype=dtype, scale=8, bias=True))
        scores = hidden.double() @ weight.double().T + bias.double()
        labels[::2] = scores[::2].argmax(-1)
        asked = dict(bias=bias, return_entropy=True, backend=backend, chunks=(128, 1024))
        *values, top = linear_logprobs(hidden, weight, labels, return_top=True, **asked)
        assert torch.equal(top, scores.argmax(-1) == labels) and 150 <= top.sum() < 300
        assert all(map(torch.equal, values, linear_logprobs(hidden, weight, labels, **asked)))

    @both
    def test_a_repeated_run_gives_the_same_bits(self, backend):
        given = [x if x is None else x.cuda() for x in inputs(1000, 512, 20011, dtype=torch.bfloat16, scale=8)]
        first, second = (run(*given, upstream=(1.0, 0.5), backend=backend, chunks=(256, 4096)) for _ in range(2))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))

    @pytest.mark.parametrize("d, v, chunks", [(1536, 20011, (1000, 4096)), (3584, 4096, (128, 512)), (72, 700, None)])
    def test_product_and_fold_in_one_kernel_give_the_definition(self, d, v, chunks):
        """And rows whose label is far below all others are computed anew; a pass without gradient has the same bits."""
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("for a Hopper")
        hidden, weight, labels, _ = inputs(1001, d, v, dtype=torch.bfloat16, scale=4)
        far = torch.arange(0, 1001, 300)
        hidden[far] -= 100 * weight[labels[far]] / weight[labels[far]].square().sum(1, keepdim=True)
        hidden, weight, labels = hidden.cuda(), weight.cuda(), labels.cuda()
        assert module.head_shares.serves(hidden, weight)
        truth = exact(hidden, weight, labels)
        for entropy in (True, False):
            found = run(hidden, weight, labels, entropy=entropy, chunks=chunks)
            # A tensor core cuts its sum off 96 times at D 1536, 224 at 3584: by 4.3e-5 and 9.0e-5 here, and 0.9e-5 and
            # 2.8e-5 with what the trial measures made up for (simulated).
            torch.testing.assert_close(found[0].double(), truth[0], atol=2e-5 + 1e-8 * d, rtol=3e-7)
            assert row_error(found[2], truth[2]) < GPU_BOUND[torch.bfloat16]
            if entropy:
                torch.testing.assert_close(found[1].double(), truth[1], atol=5e-5 + 3e-8 * d, rtol=0)
        if chunks != (128, 512):
            whole = linear_logprobs(hidden, weight, labels, chunks=chunks, return_entropy=True, return_top=True)
            asked = dict(chunks=chunks, return_entropy=True, return_top=True)
            again = linear_logprobs(hidden.requires_grad_(), weight, labels, **asked)
            assert all(map(torch.equal, whole, again))
            assert torch.equal(again[2], (hidden.double() @ weight.double().T).argmax(1) == labels)

    @pytest.mark.parametrize("with_gradient", [True, False])
    def test_peak_memory_is_the_formulas(self, with_gradient):
        n, d, v, c, vb = 8192, 1536, 50000, 2048, 4096
        hidden, weight, labels, _ = (x if x is None else x.cuda() for x in inputs(n, d, v, dtype=torch.bfloat16))
        hidden.requires_grad_(with_gradient)
        linear_logprobs(hidden, weight, labels, chunks=(c, vb)).sum()  # cuBLAS keeps its workspace from here on
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        logp = linear_logprobs(hidden, weight, labels, chunks=(c, vb))
        if with_gradient:
            logp.sum().backward()
        scratch = 4 * c * vb + (4 * c * d if with_gradient else 0)
        kept = 2 * n * d if with_gradient else 0
        assert torch.cuda.max_memory_allocated() - before <= 1.05 * (scratch + kept)
