"""Sinks: one number a head that is in every softmax as the score of a key without a value."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_generate import PROMPTS, ids_of, own_logprobs, paged_shapes, run, shapes
from test_packing import packed, random_sequences, reference_attention, trained_on
from tiny_models import make_model, make_policy

from lowmem_grpo.generate import engine, hf, layouts
from lowmem_grpo.generate.sampling import SamplingParams
from lowmem_grpo.model import attention, packed_attention
from lowmem_grpo.model.attention import Scoring
from lowmem_grpo.model.packed_attention import Packed, by_blocks, by_segments, flash_with_sink

SINKS = torch.tensor([-30.0, -1.0, 2.0, 30.0])


def inputs_of(batch, dtype=torch.float32, device="cpu", size=16):
    """Queries, keys, values and sinks, of which all get a gradient; and the number of tokens that are not padding."""
    torch.manual_seed(0)
    width = batch.input_ids.shape[1]
    inputs = [torch.randn(width, heads, size, dtype=dtype, device=device, requires_grad=True) for heads in (4, 2, 2)]
    inputs.append(SINKS.to(device, dtype).requires_grad_())
    return inputs, int((batch.input_ids != 0).sum())


def a_batch(seed=0):
    prompts, completions = random_sequences(seed, 4, groups=4, longest_prompt=50)
    return packed(prompts, completions, 10_000, num_generations=4, padding_free=True)[0]


def assert_same(attentions, inputs, real, bounds):
    """Of two attentions of inputs: results, and gradients of all inputs, by head where heads differ in size."""
    q, k, v, sink = inputs
    torch.manual_seed(1)
    upstream = torch.randn(real, *q.shape[1:], device=q.device)
    found = []
    for attend in attentions:
        out = attend(q, k, v, sink)[:real].float()
        found.append((out, *torch.autograd.grad((out * upstream).sum(), inputs)))
    for ours, truth, bound in zip(*found, bounds, strict=True):
        assert (ours - truth).float().norm() / truth.float().norm() < bound
    ours, truth = (out.transpose(0, 1).flatten(1).norm(dim=1) for out, *_ in found)
    assert ((ours - truth).abs() / truth < 10 * bounds[0]).all(), "of heads whose sink takes nearly all, too"


@pytest.mark.parametrize("tile", [packed_attention.TILE, 16])
@pytest.mark.parametrize("dtype, softcap", [(torch.float32, None), (torch.float32, 2.0), (torch.bfloat16, None)])
@pytest.mark.parametrize("window", [None, 7])
def test_attention_by_blocks_has_the_sink_in_every_softmax(window, dtype, softcap, tile, monkeypatch):
    monkeypatch.setattr(packed_attention, "TILE", tile)
    batch = a_batch()
    inputs, real = inputs_of(batch, dtype)
    asked = Scoring(0, 0.3, window, softcap)
    assert_same(
        (
            lambda q, k, v, sink: by_blocks(q, k, v, batch.packing, asked._replace(sink=sink)),
            lambda q, k, v, sink: by_segments(
                q, k, v, batch.packing, asked, partial(reference_attention, softcap=softcap, sink=sink)
            ),
        ), inputs, real, [5e-6] * 5 if dtype == torch.float32 else [2e-2] * 5,
    )  # fmt: skip


def test_a_sink_in_16_bits_is_not_rounded_by_its_product_with_a_query(monkeypatch):
    """7.03 over a scaling of 0.3 is 0.07 off in bf16, and with its score the share of every token by 2 %."""
    monkeypatch.setattr(packed_attention, "flash_serves", lambda device, dtype: True)
    tokens = 300  # of fewer a CPU attends by plain products
    query, key, value = (torch.randn(1, heads, tokens, 16).bfloat16() for heads in (4, 2, 2))
    asked = Scoring(0, 0.3, None, None, torch.tensor([7.03, 5.3, 6.1, 4.7]))
    found = packed_attention.causal_attention((query, key, value), {}, asked)[0]
    starts = torch.tensor([0, tokens])
    q, k, v = (x[0].transpose(0, 1).double() for x in (query, key, value))
    truth = reference_attention(q, k, v, starts, starts, None, None, 0.3, None, sink=asked.sink)
    error = (found - truth).flatten(1).norm() / truth.flatten(1).norm()
    assert error < 4e-3


def forward_as_flash(query, key, value, segments, scaling, window):
    """A twin of the kernel: attention (T, H, D) without a sink, and its log-sum-exp (H, T)."""
    results, sums = [], []
    for q, _, v, scores in scores_of_segments(query, key, value, segments, scaling, window):
        results.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype))
        sums.append(scores.logsumexp(-1))
    return torch.cat(results).to(query.dtype), torch.cat(sums, 1).float()


def backward_as_flash(gradient, query, key, value, out, lse, segments, scaling, window):
    """A twin of the kernel, which makes shares anew from the log-sum-exp, and a sum from the result, that it is given."""
    found = [torch.zeros_like(x, dtype=torch.float64) for x in (query, key, value)]
    at_q, at_k = 0, 0
    for q, k, v, scores in scores_of_segments(query, key, value, segments, scaling, window):
        rows, columns = slice(at_q, at_q + len(q)), slice(at_k, at_k + len(k))
        g, o = gradient[rows].double(), out[rows].double()
        shares = (scores - lse[:, rows, None].double()).exp()
        rise = shares * (torch.einsum("qhd,khd->hqk", g, v) - (g * o).sum(-1).t()[..., None]) * scaling
        copies = query.shape[1] // key.shape[1]
        found[0][rows] += torch.einsum("hqk,khd->qhd", rise, k)
        found[1][columns] += torch.einsum("hqk,qhd->khd", rise, q).unflatten(1, (-1, copies)).sum(2)
        found[2][columns] += torch.einsum("hqk,qhd->khd", shares, g).unflatten(1, (-1, copies)).sum(2)
        at_q, at_k = rows.stop, columns.stop
    return [x.to(query.dtype) for x in found]


def scores_of_segments(query, key, value, segments, scaling, window):
    query_starts, key_starts, longest_query, longest_key = segments
    assert longest_query == query_starts.diff().max() and longest_key == key_starts.diff().max()
    for q, k, v in zip(*(x.double().tensor_split(starts[1:-1].long()) for x, starts in
                         ((query, query_starts), (key, key_starts), (value, key_starts))), strict=True):  # fmt: skip
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        back = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (back >= 0) & (back < (window or len(k)))
        yield q, k, v, (torch.einsum("qhd,khd->hqk", q, k) * scaling).masked_fill(~seen, -torch.inf)


@pytest.fixture
def flash(monkeypatch):
    """torch's flash attention as a CPU can have it."""
    monkeypatch.setattr(packed_attention, "_flash_forward", forward_as_flash)
    monkeypatch.setattr(packed_attention, "_flash_backward", backward_as_flash)
    return monkeypatch


def by_sinked_flash(packing, asked):
    return lambda q, k, v, sink: by_segments(q, k, v, packing, asked, partial(flash_with_sink, sink=sink))


@pytest.mark.parametrize("window", [None, 7])
def test_flash_attention_is_scaled_to_that_with_a_sink_and_so_is_its_gradient(window, flash):
    batch = a_batch()
    inputs, real = inputs_of(batch)
    asked = Scoring(0, 0.3, window, None)
    assert_same(
        (
            by_sinked_flash(batch.packing, asked),
            lambda q, k, v, sink: by_segments(q, k, v, batch.packing, asked, partial(reference_attention, sink=sink)),
        ), inputs, real, [5e-6] * 5,
    )  # fmt: skip


@pytest.mark.parametrize("window", [None, 7])
def test_the_calls_of_torchs_kernels_are_ones_that_they_take(window):
    """On the device `meta`, where shapes alone are computed."""
    query, key, value = (torch.empty(30, heads, 64, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2))
    starts = torch.empty(4, device="meta", dtype=torch.int32)
    segments = (starts, starts, 12, 12)
    out, lse = packed_attention._flash_forward(query, key, value, segments, 0.3, window)
    assert out.shape == query.shape and lse.shape == (4, 30) and lse.dtype == torch.float32
    found = packed_attention._flash_backward(out, query, key, value, out, lse, segments, 0.3, window)
    assert [x.shape for x in found] == [query.shape, key.shape, value.shape]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("window", [None, 7])
def test_torchs_flash_attention_with_a_sink_attends_as_blocks_do(window):
    prompts, completions = random_sequences(0, 4, groups=4, longest_prompt=50)
    batch = packed(prompts, completions, 10_000, num_generations=4, padding_free=True, device=torch.device("cuda"))[0]
    inputs, real = inputs_of(batch, torch.bfloat16, "cuda", size=64)
    asked = Scoring(0, 0.125, window, None)
    assert_same(
        (
            by_sinked_flash(batch.packing, asked),
            lambda q, k, v, sink: by_blocks(q, k, v, batch.packing, asked._replace(sink=sink)),
        ), inputs, real, [2e-2] * 5,
    )  # fmt: skip


def assert_as_exact_as_separate_rows(policy, name):
    """Log-probabilities and gradients of packed rows in bf16, which differ from those in fp32 as separate rows' do.

    Not compared with separate rows in bf16, to which blocks, rounded alike, are nearer than flash attention; and a
    rounding may send a token to other experts.
    """
    rounded = make_model(name).bfloat16().float()
    exact, exact_gradients = next(trained_on(make_policy(rounded, use_cpu=policy.device.type == "cpu")))

    def errors(flat, gradients):
        whole, truth = (torch.cat([x.flatten() for x in found.values()]) for found in (gradients, exact_gradients))
        return (flat - exact).abs().mean(), (whole - truth).norm() / truth.norm()

    (separate, separate_gradient), *packed_ones = (errors(*found) for found in trained_on(policy))
    assert 0 < separate < 0.05 and 0 < separate_gradient < 0.5
    for found, gradient in packed_ones:
        assert found < 1.3 * separate and gradient < 1.5 * separate_gradient


@pytest.mark.parametrize("name", ["gpt_oss", "granite_swa"])
def test_models_with_sinks_pack_by_flash_attention_as_exactly_as_separate_rows(name, flash):
    policy = make_policy(name, bf16=True)
    assert policy.packs and not policy.varlen
    policy.varlen = True
    assert_as_exact_as_separate_rows(policy, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["gpt_oss", "granite_swa"])
def test_on_a_gpu_models_with_sinks_sample_by_the_kernel_and_pack_by_flash_attention(name):
    policy = make_policy(name, use_cpu=False, bf16=True)
    assert engine.refusal(policy, policy.dtype) is None
    assert engine.refusal(policy, torch.int8) is None
    assert policy.packs and policy.varlen
    assert_as_exact_as_separate_rows(policy, name)


precisions = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


@precisions
def test_gpt_oss_is_not_refused(bf16, flash):
    policy = make_policy("gpt_oss", bf16=bf16)
    assert engine.refusal(policy, policy.dtype) is None
    assert engine.refusal(policy, torch.int8) is None
    flash.setattr("lowmem_grpo.model.policy.flash_serves", lambda device, dtype: dtype == torch.bfloat16)
    assert policy.packs and policy.varlen == bf16


def no_sinks(layout, own):
    return lambda self, query, key, value, asked: own(self, query, key, value, asked._replace(sink=None))


@precisions
@pytest.mark.parametrize("layout", [layouts.Prefill, layouts.Decode, Packed])
def test_a_layout_that_leaves_sinks_out_is_refused(layout, bf16, monkeypatch):
    policy = make_policy("gpt_oss", bf16=bf16)
    monkeypatch.setattr(layout, "attend", no_sinks(layout, layout.attend))
    if layout is Packed:
        with pytest.warns(UserWarning, match="self_attn is .* away in a packed row"):
            assert not policy.packs
    else:
        assert "away in a step from stored keys and values" in engine.refusal(policy, policy.dtype)


def test_sampled_logprobs_of_gpt_oss_are_those_of_a_training_forward():
    policy = make_policy("gpt_oss")
    for shape in (next(shapes(PROMPTS, 3, 12, 9)), next(paged_shapes(PROMPTS, 3, 12, 9))):
        for index, completion in enumerate(run(policy, shape=shape)):
            truth = own_logprobs(policy, PROMPTS[index // 3], completion, 1.0)
            torch.testing.assert_close(completion.logprobs, truth, atol=1e-5, rtol=0)


def test_greedy_completions_of_gpt_oss_are_those_of_generate():
    policy = make_policy("gpt_oss")
    theirs, _ = hf.sample(policy, PROMPTS, 1, SamplingParams(max_completion_length=20, temperature=0), 10_000)
    for shape in (*shapes(PROMPTS, 1, 20, 2), next(paged_shapes(PROMPTS, 1, 20, 3))):
        assert ids_of(run(policy, 1, shape=shape, temperature=0, max_completion_length=20)) == ids_of(theirs)


@pytest.mark.parametrize("gradient_checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_packed_rows_of_gpt_oss_give_what_separate_rows_give(gradient_checkpointing):
    """Log-probabilities, and gradients of every adapter, of each sequence alone by the model's own attention."""
    policy = make_policy("gpt_oss", gradient_checkpointing=gradient_checkpointing)
    (separate, truth), *others = trained_on(policy)
    for flat, gradients in others:
        torch.testing.assert_close(flat, separate, atol=1e-5, rtol=0)
        for name, gradient in gradients.items():
            assert (gradient - truth[name]).norm() / truth[name].norm() < 4e-6, name


def test_sinks_that_an_adapter_trains_get_their_gradient():
    """PEFT's modules_to_save: 2e-6 from that of each sequence alone, in the model's own attention."""
    kept = LoraConfig(r=4, target_modules=["down_proj"], modules_to_save=["self_attn"])
    policy = make_policy(get_peft_model(make_model("granite_swa"), kept), load_in_4bit=False)
    assert policy.packs and engine.refusal(policy, policy.dtype) is None
    (_, truth), (_, found), _ = trained_on(policy)
    sinks = [name for name in truth if name.endswith("sinks")]
    assert len(sinks) == 2
    for name in sinks:
        assert (found[name] - truth[name]).norm() / truth[name].norm() < 2e-5


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(s_aux=torch.zeros(4, 1)), "its sinks are not one number a head"),
        (dict(sinks=torch.zeros(1, 4, 3, 1)), "its attention takes sinks, which is not known here"),
        (dict(indices=torch.zeros(1, 3, 2)), "its attention takes indices, which is not known here"),
        (dict(key=torch.zeros(1, 4, 5, 16), value=torch.zeros(1, 4, 5, 16)), "other keys than one of each token"),
    ],
)
def test_attention_of_another_kind_is_refused(change, reason):
    states = torch.zeros(1, 4, 3, 16)
    given = dict(query=states, key=states, value=states, attention_mask=None) | change
    with pytest.raises(attention.UnknownAttention, match=reason):
        attention.attend(None, **given)
