import dataclasses
import os
from functools import partial

import pytest
import torch
from tiny_models import DEMO_MODEL, OutOfMemory, make_policy

from lowmem_grpo.config.grpo import GRPOConfig, refuse_by_sequence
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.determinism import prepare, torchs
from lowmem_grpo.errors import InputError
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.inputs import training
from lowmem_grpo.model.packing import pack
from lowmem_grpo.objective.coefficients import Coefficients
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.update.passes import (
    backward,
    lengths_with_gradient,
    try_largest_update,
    with_old_logprobs,
    with_reference,
)
from lowmem_grpo.update.token_metrics import TokenMeter


def gradient_of(policy) -> torch.Tensor:
    """Of all adapters, flat; they have none afterwards."""
    flat = torch.cat([p.grad.flatten() for p in policy.parameters_of(policy.adapter).values()])
    for parameter in policy.parameters_of(policy.adapter).values():
        parameter.grad = None
    return flat


def coefficients(config) -> Coefficients:
    return Coefficients(config.beta, config.entropy_coef)


def update(policy, rollout, config, budget=None, old_logprobs=None):
    """(loss, gradient, metrics) of a rollout, as the loop gets them."""
    budget = budget or TokenBudget(config.token_budget)
    scaler, tokens = torch.amp.GradScaler("cpu", enabled=False), TokenMeter(rollout, policy.device)
    rollout = dataclasses.replace(with_reference(policy, rollout, config, budget), old_logprobs=old_logprobs)
    work = partial(backward, policy, rollout, tokens, coefficients(config), scaler, config)
    loss, _ = budget.fit(work, rollout.lengths)
    return loss, gradient_of(policy), tokens.metrics()


def fixed_rollout(num_generations=2, prompts=3, seed=0):
    """Uneven completions, one of them masked, with made-up advantages."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(10, 100, (length,), generator=draw).tolist()

    completions = [Completion(ids(1, 20), None, None, "eos") for _ in range(prompts * num_generations)]
    lengths = torch.tensor([0] + [len(c.ids) for c in completions])
    return Rollout(
        prompts=[Prompt("", ids(2, 12), {}) for _ in range(prompts)],
        completions=completions,
        offsets=lengths.cumsum(0),
        sampling_logprobs=torch.randn(int(lengths.sum()), generator=draw, dtype=torch.float32) - 4,
        proposal_logprobs=None,
        rewards=torch.zeros(len(completions), 1),
        advantages=torch.randn(len(completions), generator=draw, dtype=torch.float32),
        completion_mask=torch.tensor([True] * (len(completions) - 1) + [False]),
        metrics={},
        table={},
    )


@pytest.mark.parametrize(
    ("family", "loss_type"),
    [
        *((family, "dapo") for family in ("qwen3", "mistral", "gemma2")),
        *(("qwen3", loss_type) for loss_type in ("grpo", "bnpo", "dr_grpo")),  # of which no model knows
    ],
)
def test_micro_batches_add_up_to_the_whole_batch(family, loss_type, make_fp64_policy):
    """Value, gradient and metrics are the step's, whatever the token budget and the layout."""
    policy = make_fp64_policy(family)
    rollout = fixed_rollout(num_generations=3)
    found = []
    for padding_free in (False, True):
        for token_budget in (100_000, 60, 1):
            config = GRPOConfig(
                loss_type=loss_type, beta=0.1, token_budget=token_budget, padding_free=padding_free, bf16=False
            )
            found.append(update(policy, rollout, config, old_logprobs=rollout.sampling_logprobs))
    for one in found[1:]:
        assert_same(one, found[0], bound=5e-7 if family == "gemma2" else 1e-12)  # a softcap's scores are fp32
    assert found[0][1].norm() > 0


def assert_same(found, expected, bound=1e-12):
    """Of two updates (loss, gradient, metrics): within a bound relative to the loss, the gradient, each metric."""
    assert (found[1] - expected[1]).norm() / expected[1].norm() < bound
    assert found[0].item() == pytest.approx(expected[0].item(), rel=bound, abs=0)
    assert found[2] == pytest.approx(expected[2], rel=bound, abs=bound)


OBJECTIVES = [
    dict(importance_sampling_level="sequence_token", loss_type="grpo"),
    dict(loss_type="luspo", importance_sampling_level="sequence"), dict(loss_type="gmpo", top_entropy_quantile=0.5),
    dict(loss_type="sapo", importance_sampling_level="sequence"), dict(kl_estimator="k2"),
    dict(entropy_coef=0.3, top_entropy_quantile=0.3, loss_type="cispo", epsilon_high=3.0),
    dict(off_policy_mask_threshold=0.1),
    dict(importance_sampling_mode="sequence_truncate", loss_type="vespo"), dict(importance_sampling_mode="token_mask"),
]  # fmt: skip


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
def test_no_objective_depends_on_micro_batches_packing_or_what_ran_out_of_memory(settings, make_fp64_policy):
    """With ratios, importance weights and divergences on both sides of 1."""
    policy, rollout = make_fp64_policy("qwen3"), fixed_rollout(num_generations=3, prompts=2)
    config = GRPOConfig(
        steps_per_generation=2, top_entropy_quantile=settings.get("top_entropy_quantile", 1.0), bf16=False
    )
    rollout = with_old_logprobs(policy, rollout, config, TokenBudget(10_000))
    own = rollout.old_logprobs
    assert own is not None
    draw = torch.Generator().manual_seed(4)
    old, drawn, proposal = (own + 0.3 * torch.randn(own.shape, generator=draw) for _ in range(3))
    assert (rollout.learn_mask is not None) == ("top_entropy_quantile" in settings)
    rollout = dataclasses.replace(rollout, sampling_logprobs=drawn, proposal_logprobs=proposal)
    found = []
    for padding_free, token_budget in ((False, 10_000), (False, 60), (True, 10_000)):
        config = GRPOConfig(**settings, beta=0.1, token_budget=token_budget, padding_free=padding_free, bf16=False)
        found.append(update(policy, rollout, config, old_logprobs=old))
    with OutOfMemory(tokens=70):
        found.append(update(policy, rollout, GRPOConfig(**settings, beta=0.1, bf16=False), old_logprobs=old))
    for one in found[1:]:
        assert_same(one, found[0])
    assert found[0][1].norm() > 0


@pytest.mark.parametrize("settings", [{}, dict(loss_type="grpo"), dict(loss_type="dr_grpo"), *OBJECTIVES], ids=str)
def test_advantages_by_token_that_are_one_for_a_completion_are_advantages_of_completions(settings, make_fp64_policy):
    policy, rollout = make_fp64_policy("qwen3"), fixed_rollout()
    config = GRPOConfig(**settings, beta=0.1, bf16=False)
    lengths = rollout.offsets.diff()
    by_token = dataclasses.replace(
        rollout, advantages=torch.full((6,), torch.nan), token_advantages=rollout.advantages.repeat_interleave(lengths)
    )
    found = [update(policy, each, config, old_logprobs=rollout.sampling_logprobs) for each in (rollout, by_token)]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2] and found[0][1].norm() > 0


BY_TOKEN = [
    settings for settings in [{}, *OBJECTIVES]
    if settings.get("importance_sampling_level") != "sequence" and settings.get("loss_type") != "gmpo"
]  # fmt: skip


@pytest.mark.parametrize("settings", [{}, dict(loss_type="vespo"), dict(off_policy_mask_threshold=0.1)], ids=str)
def test_advantages_by_token_do_not_depend_on_micro_batches_packing_or_what_ran_out_of_memory(
    settings, make_fp64_policy
):
    policy, rollout = make_fp64_policy("qwen3"), with_token_advantages(fixed_rollout(num_generations=3, prompts=2))
    found = []
    for padding_free, token_budget in ((False, 10_000), (False, 60), (True, 10_000)):
        config = GRPOConfig(**settings, beta=0.1, token_budget=token_budget, padding_free=padding_free, bf16=False)
        found.append(update(policy, rollout, config, old_logprobs=rollout.sampling_logprobs))
    with OutOfMemory(tokens=70):
        config = GRPOConfig(**settings, beta=0.1, bf16=False)
        found.append(update(policy, rollout, config, old_logprobs=rollout.sampling_logprobs))
    for one in found[1:]:
        assert_same(one, found[0])
    assert found[0][1].norm() > 0


def with_token_advantages(rollout: Rollout) -> Rollout:
    draw = torch.Generator().manual_seed(8)
    return dataclasses.replace(rollout, token_advantages=torch.randn(rollout.num_tokens, generator=draw))


def test_a_token_advantage_weighs_the_gradient_of_its_own_token(make_fp64_policy):
    """On the policy that sampled, the loss is -sum_t w A_t log p_t, completion by completion."""
    policy, rollout, config = make_fp64_policy("qwen3"), with_token_advantages(fixed_rollout()), GRPOConfig(bf16=False)
    rollout = dataclasses.replace(rollout, sampling_logprobs=None)
    _, gradient, _ = update(policy, rollout, config)
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(5):  # the sixth is masked
        sequence = [(rollout.prompt_of(b).ids, rollout.completions[b].ids)]
        (logprobs,) = sample_logprobs(policy, sequence, 1.0)
        loss = loss - (logprobs * rollout.token_advantages[rollout.offsets[b] : rollout.offsets[b + 1]]).sum()
    (loss / rollout.offsets[5]).backward()
    expected = gradient_of(policy)
    assert (gradient - expected).norm() / expected.norm() < 2**-23


def test_mini_batches_have_their_own_tokens_advantages():
    rollout = with_token_advantages(fixed_rollout())
    parts = rollout.mini_batches(3)
    assert torch.equal(torch.cat([part.token_advantages for part in parts]), rollout.token_advantages)
    assert [part.num_tokens for part in parts] == [len(part.token_advantages) for part in parts]


def test_a_completion_all_of_whose_tokens_have_no_advantage_is_not_computed():
    """What it would have as a completion is not read; one token with an advantage is enough."""
    rollout = fixed_rollout()
    token_advantages = torch.zeros(rollout.num_tokens)
    token_advantages[rollout.offsets[3] - 1] = -0.5
    rollout = dataclasses.replace(rollout, token_advantages=token_advantages)
    assert rollout.has_advantage.tolist() == [False, False, True, False, False, False]
    assert lengths_with_gradient(rollout, GRPOConfig()) == rollout.lengths[2:3]


def test_losses_that_have_one_ratio_for_a_completion_take_no_advantages_by_token():
    for settings, remedy in (
        (dict(loss_type="gmpo"), "choose loss_type='dapo'"),
        (dict(importance_sampling_level="sequence"), "choose 'token' or 'sequence_token'"),
    ):
        with pytest.raises(InputError, match=remedy):
            refuse_by_sequence(GRPOConfig(**settings), "this")
    for settings in BY_TOKEN:
        refuse_by_sequence(GRPOConfig(**settings, beta=0.1), "this")


def definition_of_the_loss(policy, rollout, config):
    """GRPO's loss from full logits, one completion at a time, as the paper and TRL write it."""
    total, count = torch.zeros(()), int((rollout.offsets.diff() * rollout.completion_mask).sum())

    def logprobs(prompt, completion):
        logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0] / config.temperature
        return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]

    for b, completion in enumerate(rollout.completions):
        if not rollout.completion_mask[b]:
            continue
        prompt = rollout.prompt_of(b).ids
        with policy.as_reference():
            reference = logprobs(prompt, completion.ids)
        own = logprobs(prompt, completion.ids)
        old = rollout.sampling_logprobs[rollout.offsets[b] : rollout.offsets[b + 1]]
        ratio = (own - old).exp()
        clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon_high)
        gain = torch.minimum(ratio.clamp(max=config.delta) * rollout.advantages[b], clipped * rollout.advantages[b])
        kl = ((reference - own).exp() - (reference - own) - 1) * ratio
        total = total + (config.beta * kl - gain).sum() / count
    return total


def test_the_update_is_the_definition_on_full_logits(make_fp64_policy):
    policy = make_fp64_policy("qwen3")
    rollout = fixed_rollout()
    with policy.inference():  # ratios on both sides of every bound
        sequences = [(rollout.prompt_of(b).ids, c.ids) for b, c in enumerate(rollout.completions)]
        near = torch.cat(list(sample_logprobs(policy, sequences, 0.7)))
    draw = torch.Generator().manual_seed(2)
    rollout = dataclasses.replace(rollout, sampling_logprobs=near + torch.randn(near.shape, generator=draw) * 0.5)
    config = GRPOConfig(
        temperature=0.7, epsilon=0.1, epsilon_high=0.3, delta=1.6, beta=0.2, token_budget=60, bf16=False
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    tokens = TokenMeter(rollout, policy.device)
    known = with_reference(policy, rollout, config, TokenBudget(config.token_budget))
    given = dataclasses.replace(known, old_logprobs=rollout.sampling_logprobs)
    loss, _ = backward(policy, given, tokens, coefficients(config), scaler, config, config.token_budget)
    parameters = policy.parameters_of(policy.adapter)
    ours = torch.cat([p.grad.flatten() for p in parameters.values()])
    policy.model.zero_grad()
    truth = definition_of_the_loss(policy, rollout, config)
    truth.backward()
    theirs = torch.cat([p.grad.flatten() for p in parameters.values()])
    # Within the rounding of one number: what a token weighs is fp32.
    torch.testing.assert_close(loss, truth.detach(), rtol=2**-24, atol=0)
    assert (ours - theirs).norm() / theirs.norm() < 2**-24
    metrics = tokens.metrics()
    assert 0 < metrics["clip_ratio/low_mean"] != metrics["clip_ratio/high_mean"] > 0


def sample_logprobs(policy, sequences, temperature):
    for prompt, completion in sequences:
        (batch,) = pack([prompt], [completion], token_budget=1000, pad_token_id=0, device=policy.device)
        yield policy.logprobs(batch, temperature)


def test_checkpointing_really_recomputes():
    calls = []
    for gradient_checkpointing in (False, True):
        policy = make_policy("llama", gradient_checkpointing=gradient_checkpointing)
        assert policy.packs  # tries it
        count = []
        policy.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        rollout = dataclasses.replace(fixed_rollout(), sampling_logprobs=None)
        config = GRPOConfig(bf16=False)
        backward(
            policy,
            rollout,
            TokenMeter(rollout, policy.device),
            coefficients(config),
            torch.amp.GradScaler("cpu", enabled=False),
            config,
            config.token_budget,
        )
        calls.append(len(count))
    assert calls == [1, 2]


def test_groups_without_a_difference_are_skipped_and_change_nothing(make_fp64_policy):
    policy = make_fp64_policy("qwen3")
    rollout = fixed_rollout()
    rollout.advantages[:2] = 0
    found = []
    for beta in (0.0, 1e-30):  # a KL, however small, lets nothing be skipped
        config = GRPOConfig(beta=beta, bf16=False)
        tokens, scaler = TokenMeter(rollout, policy.device), torch.amp.GradScaler("cpu", enabled=False)
        known = with_reference(policy, rollout, config, TokenBudget(config.token_budget))
        given = dataclasses.replace(known, old_logprobs=rollout.sampling_logprobs)
        loss, _ = backward(policy, given, tokens, coefficients(config), scaler, config, config.token_budget)
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters_of(policy.adapter).values()])
        policy.model.zero_grad()
        found.append((loss, gradient, tokens.metrics()["frac_tokens_skipped"]))
    lengths = rollout.offsets.diff()
    total = lengths.sum()
    assert found[0][2] == pytest.approx(float((lengths[:2].sum() + lengths[-1]) / total), abs=1e-6)
    assert found[1][2] == pytest.approx(float(lengths[-1] / total), abs=1e-6), "the last one is masked"
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=0)
    assert (found[0][1] - found[1][1]).norm() / found[1][1].norm() < 1e-12
    assert found[1][1].norm() > 0


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_out_of_memory_anywhere_in_an_update_changes_nothing(gradient_checkpointing):
    """Bit-equal: the same work is done again. With dropout, so that the random numbers have to be the same too."""
    policy = make_policy("qwen3", gradient_checkpointing=gradient_checkpointing, lora_dropout=0.2)
    rollout, config = fixed_rollout(prompts=2), GRPOConfig(beta=0.1, bf16=False, token_budget=60)
    assert policy.packs
    torch.manual_seed(5)
    with OutOfMemory() as counted:
        loss, gradient, metrics = update(policy, rollout, config)
    drawn = torch.rand(3)
    for nth in torch.linspace(1, counted.calls, 3).long().tolist():
        torch.manual_seed(5)
        budget = TokenBudget(60)
        with OutOfMemory(nth):
            again = update(policy, rollout, config, budget)
        assert (budget.num_tokens, budget.out_of_memory) == (60, 1)
        assert torch.equal(again[0], loss) and torch.equal(again[1], gradient) and again[2] == metrics
        assert torch.equal(torch.rand(3), drawn), "what is drawn next is what would have been"


def test_a_micro_batch_that_does_not_fit_is_split_and_its_size_remembered(make_fp64_policy):
    policy = make_fp64_policy("qwen3")
    rollout, config = fixed_rollout(num_generations=4), GRPOConfig(beta=0.1, bf16=False)
    whole = update(policy, rollout, config)
    budget = TokenBudget(config.token_budget)
    with OutOfMemory(tokens=70):
        split = update(policy, rollout, config, budget)
        failures = budget.out_of_memory
        assert failures >= 2 and max(rollout.lengths) <= budget.num_tokens <= 70
        update(policy, rollout, config, budget)
    assert budget.out_of_memory == failures, "the size that fitted was remembered"
    assert budget.metrics() == {"memory/token_budget": budget.num_tokens, "memory/out_of_memory": failures}
    assert_same(split, whole)


HALVINGS = {
    # 20 + 4 x 10 tokens, padded to 64; of 32 there is room for one completion, of 30 tokens.
    "shared": ([20], [11] * 4, 16384, dict(tokens=45), [16384, 16384, 32]),
    # 20 + 8 x 10, padded to 112; of 56 the first has 20 + 3 x 10, which is more than 40 too; one sequence has 31.
    "shared, twice": ([20], [11] * 8, 16384, dict(tokens=40), [16384, 16384, 56, 31]),
    # 20 + 4 x 10 and 20 + 4 x 5; the second of each pass fails, of 40 tokens, and one sequence has 31.
    "a later one": ([20, 20], [11] * 4 + [6] * 4, 64, dict(forwards=(2, 4)), [64, 64, 31]),
    # 60 + 40 + 0 and 10 + 2 x 10, padded to 32: fewer tokens than the longest sequence, which did fit.
    "two short ones": ([60, 10], [41, 1, 11, 11], 104, dict(forwards=(2, 4)), [104, 104, 16]),
}


@pytest.mark.parametrize("name", HALVINGS)
def test_out_of_memory_twice_halves_the_micro_batch_that_failed(name, make_fp64_policy):
    """The passes that are done, by their token budgets: each but the second is of smaller micro-batches."""
    prompts, completions, token_budget, failing, expected = HALVINGS[name]
    policy, config = make_fp64_policy("qwen3"), GRPOConfig(bf16=False, token_budget=token_budget)
    rollout = Rollout.bare(
        [[5 + place % 90 for place in range(length)] for length in prompts],
        [[7 + b] * length for b, length in enumerate(completions)],
        torch.arange(1.0, len(completions) + 1),
    )
    scaler, tokens = torch.amp.GradScaler("cpu", enabled=False), TokenMeter(rollout, policy.device)
    backward(policy, rollout, tokens, coefficients(config), scaler, config, token_budget)
    gradient, passes, budget = gradient_of(policy), [], TokenBudget(token_budget)

    def work(token_budget):
        passes.append(token_budget)
        return backward(policy, rollout, tokens, coefficients(config), scaler, config, token_budget)

    with OutOfMemory(**failing):
        budget.fit(work, rollout.lengths)
    assert passes == expected
    assert (budget.num_tokens, budget.out_of_memory) == (expected[-1], len(expected) - 1)
    assert (gradient_of(policy) - gradient).norm() / gradient.norm() < 1e-12


def test_one_sequence_that_does_not_fit_ends_the_run_with_a_remedy():
    policy, rollout = make_policy("qwen3"), fixed_rollout()
    assert policy.packs
    with pytest.raises(torch.OutOfMemoryError) as error, OutOfMemory(tokens=5):
        update(policy, rollout, GRPOConfig(bf16=False))
    (note,) = error.value.__notes__
    assert f"of {max(rollout.lengths)} tokens" in note and "Lower max_completion_length" in note


def test_the_longest_sequences_are_tried_before_the_first_step():
    policy, budget = make_policy("qwen3"), TokenBudget(200)
    assert policy.packs
    before = {name: p.detach().clone() for name, p in policy.parameters_of(policy.adapter).items()}
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with OutOfMemory(tokens=120):
        try_largest_update(policy, [5] * 20, budget, GRPOConfig(bf16=False, max_completion_length=30))
    assert budget.num_tokens == 98, "half of 4 x (20 + 29), which a CPU's padding to 224 would take above the budget"
    assert torch.equal(torch.rand(1), expected)
    for name, parameter in policy.parameters_of(policy.adapter).items():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_a_deterministic_budget_has_torch_sum_in_one_order_or_refuse():
    """Within its passes alone, whatever ends them."""
    mode = torch.get_deterministic_debug_mode
    assert TokenBudget(100).fit(lambda _: mode(), [10]) == 0
    budget = TokenBudget(100, deterministic=True)
    assert budget.fit(lambda _: mode(), [10]) == 2 and mode() == 0
    at = torch.tensor([0])
    with pytest.raises(InputError, match="full_determinism cannot be had with this model, for whose put_ .* leave it"):
        budget.fit(lambda _: torch.zeros(3).put_(at, torch.ones(1)), [10])
    with pytest.raises(RuntimeError, match="^other$"):
        budget.fit(lambda _: (_ for _ in ()).throw(RuntimeError("other")), [10])
    assert mode() == 0 and torchs.fill_uninitialized_memory


def test_what_torch_asks_of_the_environment_is_set_before_anything_is_computed(monkeypatch, tmp_path):
    """And where a product came before, the error says what to do."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    prepare(torch.device("cpu"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

    def prepared(device):
        raise InputError(f"before a model is loaded on {device}")

    monkeypatch.setattr(training, "run_device", lambda config: torch.device("cuda:0"))
    monkeypatch.setattr(training, "prepare", prepared)
    config = GRPOConfig(output_dir=str(tmp_path), full_determinism=True)
    with pytest.raises(InputError, match="^before a model is loaded on cuda:0$"):
        training.begin(str(DEMO_MODEL), config, None, None, (), {})

    def refused(_):
        raise RuntimeError("this operation is not deterministic because it uses CuBLAS; set CUBLAS_WORKSPACE_CONFIG=..")

    with pytest.raises(InputError, match="needs CUBLAS_WORKSPACE_CONFIG=:4096:8 .* before Python starts, or leave"):
        TokenBudget(100, deterministic=True).fit(refused, [10])


def test_what_is_not_computed_is_no_bound_on_the_size_of_a_micro_batch():
    """The longest completion is masked, as truncated ones are: the others still fit in halves."""
    policy, rollout = make_policy("qwen3"), fixed_rollout(num_generations=4)
    config = GRPOConfig(bf16=False)
    assert policy.packs
    masked = torch.tensor(rollout.lengths) < max(rollout.lengths)
    rollout = dataclasses.replace(rollout, completion_mask=masked)
    budget, longest = TokenBudget(config.token_budget), max(lengths_with_gradient(rollout, config))
    assert longest < max(rollout.lengths)
    scaler, tokens = torch.amp.GradScaler("cpu", enabled=False), TokenMeter(rollout, policy.device)
    with OutOfMemory(tokens=longest):
        work = partial(backward, policy, rollout, tokens, coefficients(config), scaler, config)
        budget.fit(work, lengths_with_gradient(rollout, config))
    assert budget.num_tokens <= longest
