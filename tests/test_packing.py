import inspect
import random
from functools import partial

import pytest
import torch
from test_generate import in_turn
from tiny_models import FAMILIES, make_policy
from transformers import MambaConfig, MambaForCausalLM

from lowmem_grpo.determinism import deterministic
from lowmem_grpo.model import packed_attention
from lowmem_grpo.model.attention import Scoring, soften
from lowmem_grpo.model.packed_attention import Packed, by_blocks, by_segments
from lowmem_grpo.model.packing import pack

CPU = torch.device("cpu")
BUDGETS = [1, 64, 200, 10_000]


def random_sequences(seed, num_generations=1, groups=13, longest_prompt=20):
    draw = random.Random(seed)
    prompts = [[draw.randrange(2, 99) for _ in range(draw.randint(1, longest_prompt))] for _ in range(groups)]
    completions = [
        [draw.randrange(2, 99) for _ in range(draw.choice([0, 1, 2, draw.randint(0, 30)]))]
        for _ in range(groups * num_generations)
    ]
    return prompts, completions


def packed(prompts, completions, token_budget, device=CPU, **settings):
    return list(pack(prompts, completions, token_budget=token_budget, pad_token_id=0, device=device, **settings))


def what_it_sees(batch, place):
    """The ids that a token of a packed row sees, in the order of their positions, by the segments alone."""
    packing = batch.packing
    segment = int(torch.searchsorted(packing.query_starts, place, right=True)) - 1
    keys = packing.keys[packing.key_starts[segment] : packing.key_starts[segment + 1]]
    behind = packing.query_starts[segment + 1] - 1 - place  # the segment's last query has the segment's last key
    seen = keys[: len(keys) - behind]
    assert batch.position_ids[0, seen].tolist() == list(range(len(seen)))
    return batch.input_ids[0, seen].tolist()


@pytest.mark.parametrize("token_budget", BUDGETS)
@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_predicted_once_from_the_one_before_it(token_budget, seed):
    prompts, completions = random_sequences(seed)
    flat = torch.tensor([token for completion in completions for token in completion])
    owners = torch.tensor([b for b, completion in enumerate(completions) for _ in completion])
    seen = []
    for batch in packed(prompts, completions, token_budget):
        ids = batch.input_ids.flatten()
        assert torch.equal(ids[batch.predictors + 1], batch.labels)
        assert torch.equal(flat[batch.token_index], batch.labels)
        assert torch.equal(owners[batch.token_index], batch.sequences)
        rows = batch.predictors // batch.input_ids.shape[1]
        for row, b in {(int(r), int(b)) for r, b in zip(rows, batch.sequences, strict=True)}:
            whole = prompts[b] + completions[b]
            assert batch.input_ids[row].tolist() == whole + [0] * (batch.input_ids.shape[1] - len(whole))
        seen += batch.token_index.tolist()
    assert sorted(seen) == list(range(len(flat)))


@pytest.mark.parametrize("num_generations", [1, 2, 8])
@pytest.mark.parametrize("token_budget", BUDGETS)
@pytest.mark.parametrize("seed", range(4))
def test_a_packed_token_is_predicted_from_its_own_sequence_alone(token_budget, seed, num_generations):
    prompts, completions = random_sequences(seed, num_generations, groups=5, longest_prompt=60)
    offsets = torch.tensor([0, *map(len, completions)]).cumsum(0)
    found = []
    batches = packed(prompts, completions, token_budget, num_generations=num_generations, padding_free=True)
    for batch in batches:
        for predictor, label, token, b in zip(
            batch.predictors, batch.labels, batch.token_index, batch.sequences, strict=True
        ):
            t = int(token - offsets[b])
            assert completions[b][t] == label
            assert what_it_sees(batch, predictor) == prompts[b // num_generations] + completions[b][:t]
            found.append(int(token))
    assert sorted(found) == list(range(int(offsets[-1])))


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("token_budget", BUDGETS)
def test_no_micro_batch_exceeds_the_budget_unless_one_sequence_does(token_budget, padding_free):
    sequences = random_sequences(7, 4)
    for batch in packed(*sequences, token_budget, num_generations=4, padding_free=padding_free):
        assert batch.input_ids.numel() <= token_budget or len(set(batch.sequences.tolist())) == 1


def test_a_prompt_stands_once_for_its_group_where_that_pays():
    long, short = list(range(2, 66)), [100, 101]
    completions = [[10, 11, 12, 1]] * 4 + [[20] * 50] * 4
    (batch,) = packed([long, short], completions, 10_000, num_generations=4, padding_free=True)
    ids = batch.input_ids[0].tolist()
    assert ids.count(65) == 1, "64 + 4 * 3 tokens in place of 4 * 67"
    assert ids.count(101) == 4, "a prompt of 2 before 49 saves 3 %: each of the four has its own"
    unpadded = 64 + 4 * 3 + 4 * (2 + 49)
    assert len(ids) - unpadded <= unpadded / 4


def test_a_group_larger_than_the_budget_is_split_with_its_prompt():
    batches = packed([[7] * 40], [[9] * 21] * 6, 100, num_generations=6, padding_free=True)
    assert [batch.input_ids.shape[1] for batch in batches] == [100, 100]
    assert [len(set(batch.sequences.tolist())) for batch in batches] == [3, 3]


@pytest.mark.parametrize("lengths", [[4096, *[40] * 63], [4096, 1, 2, 40, 900] * 8, [30] * 64])
@pytest.mark.parametrize("prompt_tokens", [16, 4000])
def test_the_token_budget_bounds_what_attention_holds_of_an_uneven_group(lengths, prompt_tokens):
    """Filled up to the longest, the first with the long prompt had 524,160 keys."""
    for batch in packed(
        [[7] * prompt_tokens], [[9] * n for n in lengths], 10_000, num_generations=len(lengths), padding_free=True
    ):
        packing = batch.packing
        assert len(packing.keys) <= 4 * 10_000
        filled = sum(block.tails.numel() for block in packing.blocks)
        assert filled <= 2 * batch.input_ids.numel() + 31 * len(lengths), "no tail is filled to twice its length"
        keys = [block.prompts.shape[1] + block.tails.shape[2] for block in packing.blocks]
        rows = [block.prompts.shape[0] * block.tails.shape[1] for block in packing.blocks]
        assert sum(k * r for k, r in zip(keys, rows, strict=True)) <= 2 * 4 * 10_000
        results = [place for block in packing.blocks for place in block.tails.flatten().tolist()]
        assert [results[i] for i in packing.outputs.tolist()[: len(set(results))]] == sorted(set(results))


@pytest.mark.parametrize("padding_free", [False, True])
def test_rows_that_are_not_kept_are_left_out_and_keep_their_numbers(padding_free):
    given = dict(chosen=[False, True, True], padding_free=padding_free)
    batches = packed([[5], [6], [7]], [[1, 2], [3, 4], [8]], 100, **given)
    assert sorted(torch.cat([b.token_index for b in batches]).tolist()) == [2, 3, 4]
    assert set(torch.cat([b.sequences for b in batches]).tolist()) == {1, 2}


@pytest.mark.parametrize("padding_free", [False, True])
def test_nothing_to_keep_makes_no_micro_batch(padding_free):
    assert packed([[5]], [[1]], 100, chosen=[False], padding_free=padding_free) == []
    assert packed([[5]], [[]], 100, padding_free=padding_free) == []


def reference_attention(query, key, value, query_starts, key_starts, _, __, scaling, window, softcap=None, sink=None):
    """What a varlen attention returns, from its definition, in fp64: one segment at a time, aligned at the end."""
    results = []
    for s in range(len(query_starts) - 1):
        q = query[query_starts[s] : query_starts[s + 1]].double()
        k, v = (x[key_starts[s] : key_starts[s + 1]].double() for x in (key, value))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        back = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (back >= 0) & (back < (window or len(k)))
        scores = soften(torch.einsum("qhd,khd->hqk", q, k) * scaling, softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sink is not None:
            scores = torch.cat([scores, sink.double()[:, None, None].expand(-1, len(q), 1)], -1)
        shares = scores.softmax(-1)[..., : len(k)]
        results.append(torch.einsum("hqk,khd->qhd", shares, v))
    return torch.cat(results).to(query.dtype)


@pytest.mark.parametrize("tile", [packed_attention.TILE, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7, 2])
@pytest.mark.parametrize("seed", range(3))
def test_attention_by_blocks_is_that_by_segments(window, seed, dtype, tile, monkeypatch):
    """Values and gradients; the sum of all that a shared prompt's copies would get goes to its keys and values."""
    monkeypatch.setattr(packed_attention, "TILE", tile)
    prompts, completions = random_sequences(seed, 4, groups=4, longest_prompt=50)
    (batch,) = packed(prompts, completions, 10_000, num_generations=4, padding_free=True)
    real = int((batch.input_ids != 0).sum())
    torch.manual_seed(seed)
    inputs = [torch.randn(batch.input_ids.shape[1], heads, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    q, k, v = inputs
    upstream = torch.randn(real, 4, 16)
    found = []
    for attention in (
        lambda: by_blocks(q, k, v, batch.packing, Scoring(0, 0.3, window, None)),
        lambda: by_segments(q, k, v, batch.packing, Scoring(0, 0.3, window, None), reference_attention),
    ):
        out = attention()[:real].float()
        found.append((out, *torch.autograd.grad((out * upstream).sum(), inputs)))
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    for ours, truth in zip(*found, strict=True):
        assert (ours - truth).norm() / truth.norm() < bound
    assert all(mask.shape[0] <= tile for mask in batch.packing.masks.values())


def documented(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """A twin of flash-attn's flash_attn_varlen_func, with the signature and the meaning that its documentation has."""
    others = (dropout_p, alibi_slopes, return_attn_probs, block_table)
    assert causal and others == (0.0, None, False, None)
    assert deterministic == torch.are_deterministic_algorithms_enabled(), "which flash-attn does not ask by itself"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    assert window_size[1] in (-1, 0), "no key after the query, which causal sees to anyway"
    window = None if window_size[0] == -1 else window_size[0] + 1
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return reference_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, None, None, scale, window, softcap or None)


@pytest.mark.parametrize("window", [None, 7])
def test_flash_attn_is_called_as_its_documentation_has_it(window, monkeypatch):
    monkeypatch.setattr(packed_attention, "flash_attn_varlen_func", documented)
    prompts, completions = random_sequences(0, 4, groups=4, longest_prompt=50)
    (batch,) = packed(prompts, completions, 10_000, num_generations=4, padding_free=True)
    real = int((batch.input_ids != 0).sum())
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, batch.input_ids.shape[1], 16, requires_grad=True) for heads in (4, 2, 2)]
    q, k, v = inputs
    upstream, found = torch.randn(real, 4, 16), []
    for varlen in (False, True):
        with deterministic(window == 7):
            out = Packed(batch.packing, varlen).attend(q, k, v, Scoring(0, 0.3, window, 2.0))[0, :real]
            found.append((out, *torch.autograd.grad((out * upstream).sum(), inputs)))
    for ours, truth in zip(*found, strict=True):
        assert (ours - truth).norm() / truth.norm() < 2e-6


def test_a_varlen_attention_is_chosen_by_what_it_can_do(monkeypatch):
    for installed, with_softcap in ((None, None), (documented, packed_attention.flash_with_softcap)):
        monkeypatch.setattr(packed_attention, "flash_attn_varlen_func", installed)
        for softcap, sink, expected in (
            (None, None, packed_attention.flash), (50.0, None, with_softcap),
            (None, torch.zeros(4), packed_attention.flash_with_sink), (50.0, torch.zeros(4), None),
        ):  # fmt: skip
            found = packed_attention.varlen_attention(Scoring(0, 1.0, None, softcap, sink))
            assert getattr(found, "func", found) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7])
def test_flash_attn_attends_as_blocks_do(window):
    flash_attn = pytest.importorskip("flash_attn")
    parameters = inspect.signature(flash_attn.flash_attn_varlen_func).parameters
    known = inspect.signature(documented).parameters
    assert {name: p.default for name, p in known.items()}.items() <= {
        n: p.default for n, p in parameters.items()
    }.items()
    prompts, completions = random_sequences(0, 4, groups=4, longest_prompt=50)
    batch = next(
        pack(
            prompts, completions, token_budget=10_000, pad_token_id=0, device=torch.device("cuda"), num_generations=4,
            padding_free=True,
        )
    )  # fmt: skip
    real = int((batch.input_ids != 0).sum())
    torch.manual_seed(0)
    width, dtype = batch.input_ids.shape[1], torch.bfloat16
    inputs = [torch.randn(width, heads, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    q, k, v = inputs
    asked = Scoring(0, 0.125, window, 2.0)
    upstream, found = torch.randn(real, 4, 64, device="cuda"), []
    flash = partial(packed_attention.flash_with_softcap, softcap=2.0)
    for attention in (
        lambda: by_blocks(q, k, v, batch.packing, asked),
        lambda: by_segments(q, k, v, batch.packing, asked, flash),
    ):
        out = attention()[:real].float()
        found.append((out, *torch.autograd.grad((out * upstream).sum(), inputs)))
    for ours, truth in zip(*found, strict=True):
        assert (ours - truth).float().norm() / truth.float().norm() < 2e-2


def test_the_tiles_of_a_long_tail_keep_one_mask(monkeypatch):
    """Between forward and backward, in whatever layer."""
    monkeypatch.setattr(packed_attention, "TILE", 64)
    (batch,) = packed([[5] * 700], [[7] * 400] * 2, 10_000, num_generations=2, padding_free=True)
    width, kept = batch.input_ids.shape[1], {}
    q, k, v = (torch.randn(width, heads, 8, requires_grad=True) for heads in (4, 2, 2))

    def keep(tensor):
        if tensor.dim() == 2 and tensor.shape[0] <= 64:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        by_blocks(q, k, v, batch.packing, Scoring(0, 0.3, None, None))
    (mask,) = batch.packing.masks.values()
    assert sum(kept.values()) <= mask.nbytes == 64 * 1104 * 4


def batches_of(policy, prompts, completions, **settings):
    return pack(prompts, completions, pad_token_id=0, device=policy.device, num_generations=4, **settings)


SEPARATE_AND_PACKED = ({"token_budget": 1}, {"padding_free": True}, {"padding_free": True, "token_budget": 130})


def trained_on(policy):
    """Log-probabilities, and gradients of every adapter, by each of SEPARATE_AND_PACKED."""
    draw = random.Random(3)
    prompts = [[draw.randrange(2, 99) for _ in range(length)] for length in (30, 1, 30, 12)]
    completions = [[draw.randrange(2, 99) for _ in range(draw.choice([1, 2, 7, 19, 40]))] for _ in range(16)]
    weights = torch.randn(sum(map(len, completions)), generator=torch.Generator().manual_seed(0)).to(policy.device)
    for settings in SEPARATE_AND_PACKED:
        flat = torch.zeros_like(weights)
        for batch in batches_of(policy, prompts, completions, **{"token_budget": 10_000, **settings}):
            logprobs = policy.logprobs(batch, 1.0)
            (logprobs * weights[batch.token_index]).sum().backward()
            flat[batch.token_index] = logprobs.detach()
        yield flat, {name: p.grad.clone() for name, p in policy.parameters_of(policy.adapter).items()}
        policy.model.zero_grad()


@pytest.mark.parametrize(("family", "gradient_checkpointing"), in_turn(FAMILIES, False, True))
def test_packed_rows_give_what_separate_rows_give(family, gradient_checkpointing):
    """Log-probabilities within 1e-5, gradients of every adapter within 4e-6, whatever the budget."""
    policy = make_policy(family, gradient_checkpointing=gradient_checkpointing)
    assert policy.packs
    (separate, truth), *others = trained_on(policy)
    for flat, gradients in others:
        torch.testing.assert_close(flat, separate, atol=1e-5, rtol=0)
        for name, gradient in gradients.items():
            assert (gradient - truth[name]).norm() / truth[name].norm() < 4e-6, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_flash_attention_trains_as_separate_rows_do(family):
    """In bf16, in which a rounding or two of each log-probability differ."""
    policy = make_policy(family, use_cpu=False, bf16=True)
    assert policy.packs and policy.varlen
    (separate, truth), *others = trained_on(policy)
    for flat, gradients in others:
        assert (flat - separate).abs().mean() < 0.02
        for name, gradient in gradients.items():
            assert (gradient - truth[name]).norm() / truth[name].norm() < 0.1, name


def test_the_reference_is_packed_too():
    policy = make_policy("qwen3")
    prompts, completions = [[5] * 40, [6] * 30], [[7, 8, 9], [10, 11], [12], [13] * 9] * 2
    found = []
    for padding_free in (False, True):
        flat = torch.zeros(30)
        with policy.as_reference():
            for batch in batches_of(policy, prompts, completions, token_budget=1000, padding_free=padding_free):
                flat[batch.token_index] = policy.logprobs(batch, 1.0)
        found.append(flat)
    torch.testing.assert_close(*found, atol=4e-6, rtol=0)


def test_a_packed_row_leaves_the_models_own_attention_in_place():
    policy = make_policy("llama", gradient_checkpointing=True)
    own = policy.base.config._attn_implementation
    (batch,) = batches_of(policy, [[5] * 40], [[7, 8, 9]] * 4, token_budget=1000, padding_free=True)
    logprobs = policy.logprobs(batch, 1.0)
    assert policy.base.config._attn_implementation == own
    policy.model(input_ids=torch.tensor([[5, 6, 7]]))  # between a forward and its backward
    logprobs.sum().backward()
    assert policy.base.config._attn_implementation == own


def test_a_model_that_carries_state_is_trained_row_by_row():
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=1)
    policy = make_policy(MambaForCausalLM(config), load_in_4bit=False, lora_target_modules=["in_proj"])
    with pytest.warns(UserWarning, match="MambaForCausalLM is trained on padded rows.*MambaMixer does not go on"):
        assert not policy.packs


def test_a_model_that_a_packed_row_would_change_is_trained_row_by_row():
    """The self-check: what a layer adds by the place in the row, it adds to the wrong tokens of a packed one."""
    policy = make_policy("llama")

    def by_place(module, arguments, output):
        return output + torch.linspace(0, 1, output.shape[1])[:, None]

    policy.decoder.layers[0].mlp.register_forward_hook(by_place)
    with pytest.warns(UserWarning, match="trained on padded rows.*layers.0.mlp is .* away in a packed row"):
        assert not policy.packs
