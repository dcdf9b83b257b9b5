import os
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_packing import reference_attention
from tiny_models import SMALL, make_policy
from transformers import AutoConfig, AutoModelForCausalLM, Exaone4Config, LlamaConfig, LlamaForCausalLM

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.generate import engine
from lowmem_grpo.model import packed_attention, trial
from lowmem_grpo.model import policy as policy_module
from lowmem_grpo.model.load import load_policy, load_tokenizer
from lowmem_grpo.model.mixing import mixers
from lowmem_grpo.model.packing import Block, pack
from lowmem_grpo.model.trial import difference_when_packed, refused
from lowmem_grpo.planner.plan import forecast

PRECISIONS = [dict(bf16=False), dict(bf16=True)]
both = pytest.mark.parametrize("precision", PRECISIONS, ids=["fp32", "bf16"])


@both
def test_every_family_packs_without_a_warning(family, precision):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert make_policy(family, **precision).packs


def test_a_tokenizer_that_reads_no_text_is_no_reason_to_refuse():
    policy = make_policy()
    policy.tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)  # what benchmarks of random models have
    assert policy.packs
    assert engine.refusal(policy, policy.dtype) is None


def by_the_rows_places(batch):
    return replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])


def blocks_changed(change):
    def changed(batch):
        blocks = tuple(change(block) for block in batch.packing.blocks)
        return replace(batch, packing=replace(batch.packing, blocks=blocks))

    return changed


def without_prompts(block):
    return replace(block, prompts=block.prompts[:, :0])


def with_a_neighbours_token(block):
    """Each sequence has the first token of the one before it in front of it."""
    tails = block.tails.flatten(0, 1)
    return block if block.prompts.numel() else Block(tails.roll(1, 0)[:, :1], tails[:, None])


LAYOUTS = {
    "positions of the row": by_the_rows_places,
    "the prompt is dropped": blocks_changed(without_prompts),
    "a neighbour's token is seen": blocks_changed(with_a_neighbours_token),
}


@both
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_wrong_layout_is_refused(name, precision, monkeypatch):
    """The trial has nothing of its own to tell by: the model's layers alone show it."""

    def wrong(*arguments, **settings):
        change = LAYOUTS[name] if settings["padding_free"] else lambda batch: batch
        return (change(batch) for batch in pack(*arguments, **settings))

    policy = make_policy("llama", **precision)
    monkeypatch.setattr(trial, "pack", wrong)
    assert "self_attn is" in refused(policy, difference_when_packed)


@both
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.parametrize("off", [1, -1, 1000])
def test_a_window_that_is_off_by_one_is_refused(family, off, precision, monkeypatch):
    """Of 24 tokens, and so of 4096, which no short text is longer than."""
    own = packed_attention.by_blocks

    def wrong(query, key, value, packing, asked):
        return own(query, key, value, packing, asked._replace(window=asked.window and asked.window + off))

    monkeypatch.setattr(packed_attention, "by_blocks", wrong)
    policy = make_policy(family, **precision)
    for owner in (policy.base.config, *policy.base.modules()):
        if getattr(owner, "sliding_window", None):
            owner.sliding_window = 4096
    assert "self_attn is" in refused(policy, difference_when_packed)
    assert policy.base.config.sliding_window == 4096


def test_a_window_that_a_full_layer_has_and_does_not_use_is_no_reason_to_refuse():
    """EXAONE 4 gives each of its layers the window, and a flag to those that slide."""
    config = Exaone4Config(**SMALL, sliding_window=24, layer_types=["sliding_attention", "full_attention"])
    policy = make_policy(AutoModelForCausalLM.from_config(config), load_in_4bit=False)
    assert policy.packs and engine.refusal(policy, policy.dtype) is None


OWN_ATTENTION = {"bloom": {}, "mpt": {}}


@pytest.mark.parametrize("kind", OWN_ATTENTION)
def test_a_model_that_never_calls_our_attention_is_refused_in_one_sentence(kind):
    config = AutoConfig.for_model(kind, **{**SMALL, "num_key_value_heads": 4, **OWN_ATTENTION[kind]})
    policy = make_policy(AutoModelForCausalLM.from_config(config), load_in_4bit=False)
    assert refused(policy, difference_when_packed) == "its attention cannot be replaced"
    assert engine.refusal(policy, policy.dtype) == "its attention cannot be replaced"
    short = GRPOConfig(use_cpu=True, max_prompt_length=32, max_completion_length=32)
    assert forecast(config, short).padded == "its attention cannot be replaced"


def test_one_layer_that_never_calls_our_attention_is_named(monkeypatch):
    """Even one that would give the right numbers."""
    policy = make_policy()
    attention = policy.decoder.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states * 0, None))
    assert refused(policy, lambda *_: None) == "layers.1.self_attn mixes tokens in a way of its own"
    del attention.layer_idx  # as a layer of experts alone, which has nothing to call for
    assert refused(policy, lambda *_: None) is None


def shift(x):
    return torch.cat([x[:, :1] * 0, x[:, :-1]], 1)


def state(x):
    """What a recurrence makes of a row: each token's share halves with every token after it."""
    share = 0.5 ** (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).clamp(min=0).to(x.dtype)
    return share.tril(-1) @ x


# What one layer adds to its output: a thousandth of what it has in the row, or 2 % of the mean, which is small itself.
MIXERS = {
    "the token before": lambda x: 1e-3 * shift(x),
    "a convolution": lambda x: 1e-3 * (shift(x) + shift(shift(x)) + shift(shift(shift(x)))),
    "a recurrent state": lambda x: 1e-3 * state(x),
    "the token after": lambda x: 1e-3 * torch.cat([x[:, 1:], x[:, :1] * 0], 1),
    "the row's mean": lambda x: 2e-2 * x.mean(1, keepdim=True),
    "the place": lambda x: 1e-5 * x.abs().mean() * torch.arange(x.shape[1])[:, None],
}


@pytest.fixture(scope="module", params=PRECISIONS, ids=["fp32", "bf16"])
def deep(request):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 30})).eval()
    policy = make_policy(model, load_in_4bit=False, lora_target_modules=["q_proj"], **request.param)
    assert refused(policy, difference_when_packed) is None
    return policy


@pytest.mark.parametrize("place, name", [*enumerate(MIXERS)])
def test_one_layer_of_thirty_that_mixes_a_little_along_the_row_is_refused(place, name, deep, monkeypatch):
    """In bf16, too, in which its own rounding is more; by each of the texts, of which one that passes is enough."""
    part = ("self_attn", "mlp")[place % 2]
    monkeypatch.setattr(trial, "TEXTS", (trial.TEXTS[place % 3],))

    def mix(module, arguments, output):
        x = output[0] if isinstance(output, tuple) else output
        mixed = x + MIXERS[name](x)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    hook = getattr(deep.decoder.layers[17], part).register_forward_hook(mix)
    try:
        assert f"layers.17.{part} is" in refused(deep, difference_when_packed)
    finally:
        hook.remove()


LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)
TWO = dict(layer_types=["linear_attention", "full_attention"], head_dim=16)
STATES = {
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=4,
                  mamba_dt_rank=4, use_mamba_kernels=False),
    "bamba": dict(attn_layer_indices=[1], **MAMBA),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=64, **MAMBA),
    "qwen3_5_text": dict(**TWO, **LINEAR),
    "qwen3_next": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                       shared_expert_intermediate_size=32, **TWO, **LINEAR),
    "olmo_hybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "rwkv": dict(attention_hidden_size=64, context_length=256),
}  # fmt: skip


@both
@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_goes_on_from_one_sequence_into_the_next_is_refused(kind, precision):
    """Even with transformers' own weak random weights, where log-probabilities hardly change, and without its config."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **STATES[kind]})).eval()
    policy = make_policy(model, load_in_4bit=False, lora_target_modules="all-linear", **precision)
    for mixer in mixers(policy.base):
        del mixer.forward  # that asks the layout in force
    assert refused(policy, difference_when_packed)  # already because a layer does not ask
    with policy.inference():
        assert "away in a packed row" in difference_when_packed(policy, trial.TEXTS[0])


@pytest.fixture
def flash(monkeypatch):
    """Flash attention as a CPU can have it, in bf16."""
    monkeypatch.setattr(policy_module, "flash_serves", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(packed_attention, "flash", reference_attention)
    return monkeypatch


def test_flash_attention_that_is_right_is_taken(flash, family):
    policy = make_policy(family, bf16=True)
    assert policy.packs and policy.varlen


def one_more(query, key, value, query_starts, key_starts, longest_query, longest_key, scaling, window):
    given = (query_starts, key_starts, longest_query, longest_key, scaling)
    return reference_attention(query, key, value, *given, window and window + 1)


def no_causality(query, key, value, query_starts, key_starts, longest_query, longest_key, scaling, window):
    results = []
    for q, k, v in zip(*(x.tensor_split(starts[1:-1].long()) for x, starts in
                         ((query, query_starts), (key, key_starts), (value, key_starts))), strict=True):  # fmt: skip
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        results.append(torch.einsum("hqk,khd->qhd", (torch.einsum("qhd,khd->hqk", q, k) * scaling).softmax(-1), v))
    return torch.cat(results)


def without_a_gradient_of_keys(query, key, value, *others):
    return reference_attention(query, key.detach() + 0 * key, value, *others)


@pytest.mark.parametrize("wrong", [one_more, no_causality, without_a_gradient_of_keys])
def test_flash_attention_that_is_wrong_or_has_wrong_gradients_is_not_taken(wrong, flash):
    flash.setattr(packed_attention, "flash", wrong)
    policy = make_policy("mistral", bf16=True)
    with pytest.warns(UserWarning, match="without flash attention.*away from that in fp32") as caught:
        assert policy.packs and not policy.varlen
    assert len(caught) == 1


@both
def test_as_much_as_separate_rows_differ_in_other_batches_is_allowed_where_it_is_little(precision):
    """As a kernel would that rounds otherwise for other numbers of rows: two in the other batches, one packed."""
    policy = make_policy("llama", **precision)
    layer = policy.decoder.layers[1].mlp
    scales = {2: 1 + 2e-4, 1: 1 + 3e-4}
    layer.register_forward_hook(lambda _, __, out: out * scales.get(len(out), 1))
    assert refused(policy, difference_when_packed) is None
    del scales[2]
    assert "layers.1.mlp is" in refused(policy, difference_when_packed)
    scales.update({2: 1.02, 1: 1.02})
    assert "layers.1.mlp is" in refused(policy, difference_when_packed)


def looks(policy):
    """What a trial changes for the while."""
    tensors = [(t.dtype, t.data_ptr()) for t in (*policy.base.parameters(), *policy.base.buffers())]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in policy.base.modules()]
    simple = [getattr(m, name, None) for m in policy.base.modules() for name in ("sliding_window", "compute_dtype")]
    config = policy.base.config
    return tensors, hooks, simple, config.sliding_window, config._attn_implementation, policy.model.training


@pytest.mark.parametrize("settings", [dict(load_in_4bit=False), {}, dict(gradient_checkpointing=True)])
@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_leaves_the_model_and_random_numbers_as_they_were(settings, fails, monkeypatch):
    policy = make_policy("gemma3", bf16=True, **settings)
    if fails:
        monkeypatch.setattr(policy.decoder.layers[1].mlp, "forward", lambda x: x @ x)
    before, numbers, precision = looks(policy), torch.get_rng_state(), torch.backends.cuda.matmul.fp32_precision
    assert bool(refused(policy, difference_when_packed)) == fails
    assert looks(policy) == before
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.backends.cuda.matmul.fp32_precision == precision


def real_policy(name, **settings):
    folder = os.environ.get("LOWMEM_GRPO_MODELS")
    if not folder:
        pytest.skip("LOWMEM_GRPO_MODELS names no folder of real models")
    config = GRPOConfig(use_cpu=True, **settings)
    path = str(Path(folder) / name)
    return load_policy(path, load_tokenizer(path, config), config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma3-270m"])
@both
def test_a_real_model_is_packed_and_one_weak_mixer_in_it_is_refused(name, precision, monkeypatch):
    policy = real_policy(name, **precision)
    for text in trial.TEXTS:
        monkeypatch.setattr(trial, "TEXTS", (text,))
        assert refused(policy, difference_when_packed) is None
    policy.decoder.layers[11].mlp.register_forward_hook(lambda _, __, out: out + 1e-3 * shift(out))
    assert "layers.11.mlp is" in refused(policy, difference_when_packed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma3-270m"])
def test_a_real_model_is_sampled_from_stored_keys_and_values(name, monkeypatch):
    policy = real_policy(name)
    for text in trial.TEXTS:
        monkeypatch.setattr(trial, "TEXTS", (text,))
        assert engine.refusal(policy, torch.bfloat16) is engine.refusal(policy, torch.int8) is None
