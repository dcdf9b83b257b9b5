"""Layers with a state: called by our layouts, on packed rows with a shared prompt, and tried before."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny_models import HYBRIDS, SMALL, make_model, make_policy
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lowmem_grpo.model import mixing, packed_attention, trial
from lowmem_grpo.model.attention import laid_out
from lowmem_grpo.model.mixing import Call, install, mixers
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.trial import difference_in_parts, difference_when_packed, refused
from lowmem_grpo.planner.trace import Live

KINDS = ("qwen3_5_text", "bamba", "lfm2")
few = pytest.mark.parametrize("family", KINDS)
most = pytest.mark.parametrize(
    "family", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS if name not in KINDS)]
)


class InCalls:
    """A layout of one row, whose tokens come in calls of these lengths, each from the states of the one before."""

    def __init__(self, *lengths):
        self.lengths, self.seen = lengths, []

    def mix(self, mixer, forward, hidden):
        outputs, states = [], None
        for part in hidden.split(list(self.lengths), 1):
            call = Call(states, writable=part.shape[1] == 1)
            outputs.append(forward(part, call, None))
            states = call.after
        self.seen.append(mixer)
        return torch.cat(outputs, 1)


@most
def test_a_text_in_parts_is_what_it_is_in_one(family):
    model = make_model(family)
    ids = torch.randint(2, 128, (1, 12), generator=torch.Generator().manual_seed(1))
    decoder = model.get_decoder()
    with torch.no_grad():
        whole = decoder(input_ids=ids, use_cache=False).last_hidden_state
        install(model)
        for lengths in ((12,), (5, 7), (1, 1, 2, 8), (11, 1)):
            layout = InCalls(*lengths)
            with laid_out(layout):
                parted = decoder(input_ids=ids, use_cache=False).last_hidden_state
            assert layout.seen == mixers(model) and layout.seen
            torch.testing.assert_close(parted, whole, rtol=0, atol=1e-5)


@few
def test_a_state_before_a_call_is_as_it_was_after_it(family):
    """Mamba 2 writes into the one that it gets."""
    mixer = mixers(make_model(family))[0]
    with torch.no_grad():
        prompt = Call()
        mixer(torch.randn(2, 6, 64), prompt)
        before = {name: state.clone() for name, state in prompt.after.items()}
        step = Call(prompt.after, writable=True)
        mixer(torch.randn(2, 1, 64), step)
    assert before.keys() == step.after.keys()
    for name, state in before.items():
        assert torch.equal(prompt.after[name], state) and not torch.equal(step.after[name], state)


def test_states_are_where_transformers_before_5_21_looks_for_them():
    """A mixer that writes into its recurrent state has written into the one that comes out."""
    states = {("conv", 0): torch.ones(1, 2, 4), ("recurrent", 1): torch.zeros(1, 3)}
    call = Call(states, writable=True)
    layer = call.layers[7]
    assert layer.record_past and layer.conv_states[0] is None and layer.recurrent_states[0] is None
    layer.recurrent_states[1].add_(5)
    assert call.layers[7].record_past and call.after["recurrent", 1].tolist() == [[5.0] * 3]
    assert not states["recurrent", 1].any()


@few
def test_a_model_generates_with_its_own_cache(family):
    model = make_model(family)
    ids = torch.randint(2, 128, (2, 5), generator=torch.Generator().manual_seed(1))
    asked = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    own = model.generate(ids, past_key_values=DynamicCache(config=model.config), **asked)
    install(model)
    assert torch.equal(model.generate(ids, **asked), own)


@few
def test_in_training_a_mixer_has_an_empty_cache(family, monkeypatch):
    """Without, some take a kernel that reads out_proj.weight raw: 4-bit bytes, and no adapter on it."""
    policy = make_policy(family)
    (mixer,) = mixers(policy.base)
    given = []
    own = mixer.forward.own

    def watched(hidden, *arguments, **keywords):
        given.append(keywords[mixer.forward.cache])
        return own(hidden, *arguments, **keywords)

    monkeypatch.setattr(mixer.forward, "own", watched)
    policy.decoder(input_ids=torch.arange(2, 12)[None], use_cache=False)
    assert [type(cache) for cache in given] == [Call] and not given[0].before


def test_a_model_that_is_equipped_twice_has_its_own_forward_inside():
    model = make_model("lfm2")
    install(model)
    install(model)
    (mixer,) = mixers(model)
    assert mixer.forward.own.__func__ is type(mixer).forward


# Convolutions are of 3 or 4 tokens, chunks of 64 (GDN) and 16 (Mamba 2). Tails have one token less than completions.
PROMPTS = (1, 3, 4, 63, 64, 65, 2)
COMPLETIONS = ((5, 1, 2), (4, 2, 3), (3, 4, 1), (70, 2, 9), (2, 2, 33), (1, 8, 66), (40, 1, 25))
BUDGET = 140  # into which no whole group of a long prompt goes


def texts(vocabulary=128):
    draw = torch.Generator().manual_seed(0)
    lengths = [*PROMPTS, *(length for group in COMPLETIONS for length in group)]
    ids = [torch.randint(2, vocabulary, (length,), generator=draw).tolist() for length in lengths]
    return ids[: len(PROMPTS)], ids[len(PROMPTS) :]


def batches(prompts, completions, num_generations=3, token_budget=BUDGET, padding_free=True):
    return list(
        pack(
            prompts, completions, token_budget=token_budget, pad_token_id=0, device=torch.device("cpu"),
            num_generations=num_generations, padding_free=padding_free,
        )
    )  # fmt: skip


def alone(prompts, completions):
    """A micro-batch, without padding, for each sequence; its token_index is among all."""
    before = 0
    for b, completion in enumerate(completions):
        (batch,) = batches([prompts[b // 3]], [completion], token_budget=1, padding_free=False)
        yield replace(batch, token_index=batch.token_index + before)
        before += len(completion)


def run(policy, micro_batches):
    """Hidden states (M, D) before each token, and the adapter's gradients by name."""
    count = sum(map(sum, COMPLETIONS))
    weight = torch.randn(count, 64, generator=torch.Generator().manual_seed(2))
    policy.model.zero_grad()
    found = torch.full((count, 64), torch.nan)
    for batch in micro_batches:
        hidden = policy.hidden_states(batch)
        (hidden * weight[batch.token_index]).sum().backward()
        found[batch.token_index] = hidden.detach()
    return found, {name: p.grad.clone() for name, p in policy.parameters_of(policy.adapter).items()}


@cache
def each_alone(policy):
    return run(policy, alone(*texts()))


def assert_as_alone(policy, micro_batches):
    hidden, gradients = each_alone(policy)
    found, found_gradients = run(policy, micro_batches)
    assert ((found - hidden).norm() / hidden.norm()).item() < 1e-5
    errors = {name: (found_gradients[name] - gradients[name]).norm() for name in gradients}
    sizes = {name: gradient.norm() for name, gradient in gradients.items()}
    assert max(errors[name] / sizes[name] for name in errors) < 1e-3
    total, size = (torch.stack(list(norms.values())).norm() for norms in (errors, sizes))
    assert total / size < 1e-5


@pytest.fixture(scope="module")
def policies():
    """Policies by family and settings, made once."""
    made = {}

    def get(family, **settings):
        key = family, *settings.items()
        if key not in made:
            made[key] = make_policy(family, **settings)
        return made[key]

    return get


@most
def test_packed_sequences_have_hidden_states_and_gradients_as_each_alone(family, policies):
    micro_batches = batches(*texts())
    segments = [segment for batch in micro_batches for segment in batch.packing.segments]
    tails = [segment for segment in segments if segment.prompt]
    assert {len(tail.prompt) for tail in tails} == {*PROMPTS[:6]} and 1 in [len(tail.places) for tail in tails]
    begun = [len(segment.places) for segment in segments if not segment.prompt]
    assert begun.count(63) == 2 and {41, 26, 2} <= {*begun}  # a group in two pieces, and lone sequences
    assert_as_alone(policies(family, load_in_4bit=False), micro_batches)


@pytest.mark.parametrize("family", [KINDS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS[1:])])
def test_in_4_bits_and_computed_again_they_are_too(family, policies):
    settings = dict(tiled_mlp=True) if family == "qwen3_5_text" else {}
    assert_as_alone(policies(family, gradient_checkpointing=True, **settings), batches(*texts()))


def test_scores_of_packed_texts_have_gradients_as_each_alone(policies):
    """In 4 bits and computed again, by an adapter of its own, as a critic's and a reward adapter's."""
    policy = policies(KINDS[0], gradient_checkpointing=True, tiled_mlp=True)
    policy.add("critic", copy_of=policy.adapter)
    policy.add_score_head("critic", seed=1)
    found = []
    for micro_batches in (list(alone(*texts())), batches(*texts())):
        policy.model.zero_grad()
        with policy.wearing("critic"):
            scores = [policy.scores(batch) for batch in micro_batches]
        for one in scores:  # whose backward is outside, where another adapter is worn
            one.square().sum().backward()
        scores = torch.cat(scores)[torch.cat([batch.token_index for batch in micro_batches]).argsort()]
        gradients = [p.grad.flatten() for p in policy.adapters.parameters_of("critic").values()]
        found.append((scores, torch.cat(gradients)))
    for ours, theirs in zip(*found, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
    assert found[0][1].norm() > 0


@few
def test_padded_rows_have_hidden_states_and_gradients_as_each_sequence_alone(family, policies):
    """Padding stands on the right, where no state looks ahead."""
    assert_as_alone(policies(family, load_in_4bit=False), batches(*texts(), token_budget=600, padding_free=False))


@pytest.mark.parametrize("family, biased", [("lfm2", "conv_bias"), ("bamba", "mamba_proj_bias")])
def test_what_a_bias_makes_of_padding_is_no_part_of_a_text(family, biased):
    """Masked inputs of a projection are zero, and its outputs are its bias, which the convolution would see."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**HYBRIDS[family], biased: True}))
    with torch.no_grad():
        mixers(model)[0].in_proj.bias.fill_(1.0)
    policy = make_policy(model.float(), load_in_4bit=False)
    assert refused(policy, difference_in_parts) is None
    assert_as_alone(policy, batches(*texts()))


@most
def test_a_layer_that_goes_on_from_its_state_is_taken(family, policies):
    policy = policies(family, load_in_4bit=False)
    assert refused(policy, difference_in_parts) is refused(policy, difference_when_packed) is None


@pytest.mark.parametrize(
    "family",
    # The head of Mamba 2 rounds in a way of its own, and is refused in bf16.
    [KINDS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS if name not in (KINDS[0], "mamba2"))],
)
def test_in_bf16_and_4_bits_it_is_too(family):
    assert make_policy(family, bf16=True).packs


MAMBA_1 = {
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=4,
        mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "mamba": dict(state_size=4),
    "falcon_mamba": dict(state_size=4),
}  # fmt: skip


@pytest.mark.parametrize("kind, bf16", [*((kind, False) for kind in MAMBA_1), ("jamba", True)])
def test_a_state_that_is_ignored_is_refused_by_name(kind, bf16):
    """Mamba 1 has a state, and begins anew where a text goes on with several tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **MAMBA_1[kind]})).float()
    policy = make_policy(model, load_in_4bit=False, lora_target_modules=["x_proj"], bf16=bf16)
    with pytest.warns(UserWarning, match="trained on padded rows.*MambaMixer does not go on from its recurrent state"):
        assert not policy.packs


def changed(change):
    """A Call whose states, as a call begins, are changed."""

    class Changed(Call):
        def __init__(self, before=None, **settings):
            super().__init__({name: change(name[0], state) for name, state in (before or {}).items()}, **settings)

    return Changed


def without_masks(own):
    """by_runs, or a mixer's one_call, by which padding on the left is a part of the text."""

    def by_runs(forward, hidden, runs):
        return own(forward, hidden, replace(runs, prompts=tuple(replace(run, mask=None) for run in runs.prompts)))

    def one_call(mixed, hidden, call, mask=None):
        return own(mixed, hidden, call)

    return by_runs if own.__name__ == "by_runs" else one_call


STATES_OF_PACKED = {
    "begun anew": changed(lambda kind, state: 0 * state),
    "a recurrent state begun anew": changed(lambda kind, state: state * (kind != "recurrent")),
    "a convolution begun anew": changed(lambda kind, state: state * (kind != "conv")),
    "a neighbour's": changed(lambda kind, state: state.roll(1, 0)),
    "without its gradient": changed(lambda kind, state: state.detach()),
}


@pytest.mark.parametrize("name", [*STATES_OF_PACKED, "masks forgotten"])
def test_the_comparison_with_each_sequence_alone_sees_a_wrong_state(name, policies, monkeypatch):
    if name in STATES_OF_PACKED:
        monkeypatch.setattr(packed_attention, "Call", STATES_OF_PACKED[name])
    else:
        monkeypatch.setattr(packed_attention, "by_runs", without_masks(packed_attention.by_runs))
    with pytest.raises(AssertionError):
        assert_as_alone(policies("qwen3_5_text", load_in_4bit=False), batches(*texts()))


@pytest.mark.parametrize("name", [*STATES_OF_PACKED, "masks forgotten"])
def test_the_trial_refuses_a_wrong_state(name, policies, monkeypatch):
    policy = policies("qwen3_5_text", load_in_4bit=False)
    if name in STATES_OF_PACKED:
        monkeypatch.setattr(trial, "Call", STATES_OF_PACKED[name])
    else:
        monkeypatch.setattr(mixing._Mixed, "one_call", without_masks(mixing._Mixed.one_call))
    assert refused(policy, difference_in_parts).startswith("Qwen3_5GatedDeltaNet")


def test_packed_rows_of_a_hybrid_take_fewer_tokens_and_less_memory():
    """Eight completions of 128 tokens after a prompt of 512, in one micro-batch. `-s` prints both layouts."""
    settings = {**HYBRIDS["qwen3_5_text"], "hidden_size": 256, "intermediate_size": 512}
    policy = make_policy(AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_5_text", **settings)))
    prompt, completions = [5] * 512, [[7] * 128] * 8
    found = {}
    for padding_free in (False, True):
        (batch,) = pack(
            [prompt], completions, token_budget=8192, pad_token_id=0, device=policy.device, num_generations=8,
            padding_free=padding_free,
        )  # fmt: skip
        with Live(policy.model) as live:
            policy.logprobs(batch, 1.0).sum().backward()
        found[padding_free] = batch.input_ids.numel(), live.peak
    for padding_free, (tokens, peak) in found.items():
        print(f"{'packed' if padding_free else 'padded'}: {tokens} tokens, {peak / 2**20:.0f} MiB")
    assert found[True][0] < 0.4 * found[False][0] and found[True][1] < 0.6 * found[False][1]
