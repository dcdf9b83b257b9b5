import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_grpo.kernels.linear_logprobs import linear_logprobs


def exact(hidden, weight, labels, bias=None, temperature=1.0, logit_scale=1.0, softcap=None):
    """(logp, entropy, d logp / dh) in fp64 from the definition."""
    hidden = hidden.detach().double().requires_grad_()
    raw = hidden @ weight.double().T + (0 if bias is None else bias.double())
    scores = raw * logit_scale
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) / temperature
    log_p = scores.log_softmax(-1)
    logp = log_p.gather(1, labels[:, None])[:, 0]
    logp.sum().backward()
    return logp.detach(), -(log_p.exp() * log_p).sum(-1).detach(), hidden.grad


def inputs(n, d, v, *, dtype=torch.float32, scale=1.0, bias=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=draw).to(dtype)
    weight = (torch.randn(v, d, generator=draw) * scale / d**0.5).to(dtype)
    labels = torch.randint(v, (n,), generator=draw)
    return hidden, weight, labels, torch.randn(v, generator=draw).to(dtype) if bias else None


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


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_match_fp64_autograd(name):
    case = dict(CASES[name])
    shape = {key: case.pop(key) for key in ("n", "d", "v", "scale", "bias") if key in case}
    hidden, weight, labels, bias = inputs(**shape)
    labels[0], labels[-1] = 0, weight.shape[0] - 1
    hidden.requires_grad_()
    logp, entropy = linear_logprobs(hidden, weight, labels, bias=bias, return_entropy=True, **case)
    logp.sum().backward()
    chunks = case.pop("chunks")
    true_logp, true_entropy, true_gradient = exact(hidden, weight, labels, bias, **case)
    # fp32 products of D terms: the absolute error grows with the size of the logits.
    size = (hidden @ weight.T).abs().max().item() * case.get("logit_scale", 1.0) / case.get("temperature", 1.0)
    torch.testing.assert_close(logp.double(), true_logp, atol=2e-6 * max(size, 10), rtol=1e-6)
    torch.testing.assert_close(entropy.double(), true_entropy, atol=3e-5, rtol=1e-5)
    assert row_error(hidden.grad, true_gradient) < 2e-5, chunks


def test_no_rows_give_no_log_probabilities():
    hidden, weight, labels, _ = inputs(0, 8, 20)
    hidden.requires_grad_()
    logp, entropy = linear_logprobs(hidden, weight, labels, return_entropy=True)
    logp.sum().backward()
    assert logp.shape == entropy.shape == (0,)
    assert hidden.grad.shape == (0, 8)


@pytest.mark.parametrize("lead", [-200.0, -80.0, 30.0, 80.0, 200.0])
def test_a_label_far_below_or_above_the_rest_stays_exact(lead):
    """+-80 and 200 cross the threshold where the reference score moves, in the first and in later chunks."""
    weight = torch.eye(12)
    labels = torch.tensor([0, 5, 11])
    hidden = torch.zeros(3, 12)
    hidden[torch.arange(3), labels] = lead
    hidden[0, 3] += 1.0
    hidden.requires_grad_()
    logp = linear_logprobs(hidden, weight, labels, chunks=(2, 4))
    logp.sum().backward()
    # The truth by the label-free sum in fp64: at these p_y fp64's own log_softmax has no digits left.
    others = torch.exp(hidden.detach().double() - lead).scatter(1, labels[:, None], 0.0)
    rest = others.sum(-1)
    truth = (rest[:, None] * torch.eye(12).double()[labels] - others) / (1 + rest[:, None])
    torch.testing.assert_close(logp.double(), -torch.log1p(rest), rtol=1e-6, atol=1e-38)
    assert lead == 200 or row_error(hidden.grad, truth) < 1e-5
    assert lead < 200 or hidden.grad.abs().max() < 1e-38  # 1 - p_y is below fp32's smallest number


def test_equal_logits_give_the_uniform_distribution():
    logp, entropy = linear_logprobs(torch.zeros(2, 4), torch.zeros(10, 4), torch.tensor([0, 9]), return_entropy=True)
    torch.testing.assert_close(logp, torch.full((2,), -10.0).abs().log().neg())
    torch.testing.assert_close(entropy, torch.full((2,), 10.0).log())


def naive_gradient(hidden, weight, labels):
    """W_y - E[W] with the expectation kept in bf16: what the target's own share must not be part of."""
    p = (hidden.float() @ weight.float().T).softmax(-1)
    return weight[labels].float() - (p @ weight.float()).bfloat16().float()


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (0.5, 0.9), (0.9, 0.99), (0.99, 0.9999), (0.9999, 1.0)])
def test_the_gradient_is_as_exact_where_the_label_is_certain(low, high):
    """bf16 inputs: the relative error of a row is bf16's rounding in every bucket of p_y. The usual form fails this."""
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(2000, 128, generator=draw) / 128**0.5).bfloat16()
    labels = torch.randint(2000, (4000,), generator=draw)
    lead = torch.rand(4000, 1, generator=draw) * 20
    hidden = (torch.randn(4000, 128, generator=draw) + lead * weight[labels].float()).bfloat16().requires_grad_()
    logp = linear_logprobs(hidden, weight, labels)
    logp.sum().backward()
    true_logp, _, truth = exact(hidden, weight, labels)
    bucket = (true_logp.exp() > low) & (true_logp.exp() <= high)
    assert bucket.sum() > 20
    assert row_error(hidden.grad[bucket], truth[bucket]) < 4e-3
    torch.testing.assert_close(logp.double(), true_logp, atol=2e-5, rtol=1e-5)
    if low >= 0.99:
        assert row_error(naive_gradient(hidden, weight, labels)[bucket], truth[bucket]) > 0.1


def test_chunk_sizes_do_not_change_the_result():
    hidden, weight, labels, bias = inputs(37, 24, 211, scale=30, bias=True)
    results = []
    for chunks in [(37, 211), (5, 16), (1, 211), (64, 1)]:
        hidden = hidden.detach().requires_grad_()
        logp, entropy = linear_logprobs(hidden, weight, labels, bias=bias, return_entropy=True, chunks=chunks)
        logp.sum().backward()
        results.append((logp.detach(), entropy, hidden.grad))
    for other in results[1:]:
        for mine, first in zip(other[:2], results[0][:2], strict=True):
            torch.testing.assert_close(mine, first, rtol=1e-6, atol=3e-5)  # logits reach 100
        assert row_error(other[2], results[0][2].double()) < 1e-5


def test_the_no_gradient_pass_gives_the_same_bits():
    hidden, weight, labels, _ = inputs(9, 32, 100)
    with_gradient = linear_logprobs(hidden.clone().requires_grad_(), weight, labels)
    assert torch.equal(linear_logprobs(hidden, weight, labels), with_gradient)
    with torch.no_grad():
        assert not linear_logprobs(hidden.clone().requires_grad_(), weight, labels).requires_grad


def test_a_second_backward_raises_instead_of_reading_what_the_first_overwrote():
    hidden, weight, labels, _ = inputs(4, 8, 20)
    logp = linear_logprobs(hidden.requires_grad_(), weight, labels)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


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
    ],
)
def test_what_does_not_belong_together_is_refused(change, message):
    given = dict(hidden_states=torch.zeros(4, 8), weight=torch.zeros(20, 8), labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{**given, **change})


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_no_tensor_has_tokens_times_vocabulary_elements(dtype, with_gradient, softcap):
    n, d, v, c, vb = 70, 24, 1000, 16, 64  # five token chunks, sixteen vocabulary chunks
    hidden, weight, labels, bias = inputs(n, d, v, dtype=dtype, bias=True)
    hidden.requires_grad_(with_gradient)
    with LargestTensor() as largest:
        logp, _ = linear_logprobs(
            hidden, weight, labels, bias=bias, softcap=softcap, return_entropy=True, chunks=(c, vb)
        )
        if with_gradient:
            logp.sum().backward()
    assert 0 < largest.elements <= max(c * vb, c * d, n * d, vb * d)


def test_the_size_test_sees_full_logits():
    hidden, weight, labels, _ = inputs(70, 24, 1000)
    with LargestTensor() as largest:
        F.linear(hidden, weight).log_softmax(-1).gather(1, labels[:, None])
    assert largest.elements == 70 * 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_and_gradients_match_fp64_on_a_gpu(dtype):
    hidden, weight, labels, bias = (x.cuda() for x in inputs(300, 256, 10007, dtype=dtype, scale=8, bias=True))
    hidden.requires_grad_()
    logp, entropy = linear_logprobs(hidden, weight, labels, bias=bias, return_entropy=True)
    logp.sum().backward()
    true_logp, true_entropy, true_gradient = exact(hidden, weight, labels, bias)
    torch.testing.assert_close(logp.double(), true_logp, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), true_entropy, atol=5e-5, rtol=1e-5)
    assert (
        row_error(hidden.grad, true_gradient) < {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    )
