"""Loss and gradient of a reward model: by hand, beside TRL's trainer, and however pairs are packed."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_sft_loss import WHOLE, say, tokenizer_with
from tiny_models import OutOfMemory, make_model, make_policy
from transformers import AutoModelForSequenceClassification, Qwen2Config
from trl.trainer.reward_config import RewardConfig as TheirConfig
from trl.trainer.reward_trainer import RewardTrainer

from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.data.pairs import Pair, tokenize_pairs
from lowmem_grpo.model.score_head import SCORE
from lowmem_grpo.objective.formulas import pair_losses
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.update.pairs import backward, mean_loss, scores_of, try_largest_update, whole_pairs

ROWS: dict[str, list[dict[str, Any]]] = {
    "texts": [{"chosen": f"{n}+{n}={2 * n}", "rejected": f"{n}+{n}={n}"} for n in range(10, 18)],
    "prompt": [{"prompt": f"{n}+{n}=", "chosen": f"{2 * n}", "rejected": "1"} for n in range(10, 18)],
    "margin": [{"prompt": f"{n}+{n}=", "chosen": f"{2 * n}", "rejected": "1", "margin": n / 9} for n in range(10, 18)],
    "chats": [
        {"prompt": [say("user", f"{n}+{n}=")], "chosen": [say("assistant", f"{2 * n}")],
         "rejected": [say("assistant", "no")]}
        for n in range(10, 18)
    ],
    "whole chats": [
        {"chosen": [say("user", f"{n}+1="), say("assistant", f"{n + 1}")],
         "rejected": [say("user", f"{n}+1="), say("assistant", "1"), say("user", "?"), say("assistant", "2")]}
        for n in range(10, 18)
    ],
    "apart": [{"chosen": f"{n}+{n}", "rejected": f"={n}"} for n in range(10, 18)],
}  # fmt: skip


def policy_of(tokenizer=None, **settings):
    policy = make_policy("qwen2", tokenizer, load_in_4bit=False, **settings)
    policy.add_score_head(policy.adapter, seed=1)
    assert policy.packs  # tried once, now
    return policy


def gradients(policy, pairs, config, token_budget=10_000):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, scores = backward(policy, pairs, range(len(pairs)), scaler, config, token_budget)
    return loss.item(), scores, {n: p.grad.clone() for n, p in policy.parameters_of(policy.adapter).items()}


def classifier_of(policy):
    """TRL's model of the same numbers: a model for sequence classification with peft's adapter and score."""
    config = Qwen2Config(**{**policy.base.config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    bare = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    bare.load_state_dict({k: v for k, v in make_model().state_dict().items() if "lm_head" not in k}, strict=False)
    model = get_peft_model(
        bare,
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", exclude_modules=["score"]),
    )
    own = policy.parameters_of(policy.adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own[SCORE if "score" in name else name])
    return model


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("kind", ROWS)
def test_loss_and_gradient_are_those_of_trls_trainer(kind, center, tmp_path):
    tokenizer = tokenizer_with(WHOLE)
    policy = policy_of(tokenizer)
    theirs = classifier_of(policy)
    trainer = RewardTrainer(
        theirs, TheirConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=None, disable_tqdm=True,
            gradient_checkpointing=False, per_device_train_batch_size=8, center_rewards_coefficient=center),
        train_dataset=Dataset.from_list(ROWS[kind]), processing_class=tokenizer,
    )  # fmt: skip
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    theirs.zero_grad()
    wanted: Any = trainer.compute_loss(theirs, batch)
    wanted.backward()
    config = RewardConfig(use_cpu=True, max_length=None, center_rewards_coefficient=center)
    pairs, _ = tokenize_pairs(Dataset.from_list(ROWS[kind]), tokenizer, config)
    known = {SCORE if "score" in n else n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    largest = max(grad.abs().max().item() for grad in known.values())
    for token_budget in (10_000, 60):
        loss, scores, found = gradients(policy, pairs, config, token_budget)
        assert loss == pytest.approx(wanted.item(), rel=1e-6)
        assert found.keys() == known.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, known[name], rtol=0, atol=2e-6 * largest)
    assert (scores[:, 0] > scores[:, 1]).float().mean() == trainer._metrics["train"]["accuracy"][-1]


def test_the_loss_of_a_pair_is_that_computed_by_hand():
    one, none = (torch.tensor([value], requires_grad=True) for value in (1.0, 0.0))
    loss = pair_losses(one, none, torch.zeros(1), center=0.0)
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    (pull,) = torch.autograd.grad(loss, one)
    assert pull.item() == pytest.approx(-0.268941, abs=1e-6)
    loss = pair_losses(one, none, torch.zeros(1), center=0.01)
    assert loss.item() == pytest.approx(0.323262, abs=1e-6)
    (pull,) = torch.autograd.grad(loss, one)
    assert pull.item() == pytest.approx(-0.268941 + 0.02, abs=1e-6)
    assert pair_losses(one, none, torch.ones(1), center=0.0).item() == pytest.approx(0.693147, abs=1e-6)


SOME = [
    Pair([*range(10, 34)], [*range(10, 30), 40, 41], margin=0.5),
    Pair([*range(20, 52)], [*range(20, 52), 60]),  # one begins the other
    Pair([30, 31, 32], [40, 41]),  # which share nothing
    Pair([*range(60, 100)], [*range(60, 99), 3], margin=-1.0),
    Pair([5, 6], [5, 6]),
    Pair([7], [8]),
] * 2


def by_definition(policy, pairs, config):
    """The loss of scores that are computed text by text."""
    head = policy.score_heads[policy.adapter].weight[0]
    texts = [text for pair in pairs for text in pair.texts]
    states = [policy.decoder(input_ids=torch.tensor([text])).last_hidden_state[0, -1] for text in texts]
    return mean_loss((torch.stack(states) @ head).view(-1, 2), pairs, config)


@pytest.mark.parametrize(
    "settings",
    [{}, {"padding_free": False}, {"gradient_checkpointing": True}],
    ids=["packed", "padded", "checkpointed"],
)
def test_neither_micro_batches_nor_packing_nor_memory_change_the_gradient(settings):
    policy = policy_of(**{k: v for k, v in settings.items() if k != "padding_free"})
    config = RewardConfig(use_cpu=True, center_rewards_coefficient=0.1, **settings)
    wanted = by_definition(policy, SOME, config)
    wanted.backward()
    known = {n: p.grad.clone() for n, p in policy.parameters_of(policy.adapter).items()}
    largest = max(grad.abs().max().item() for grad in known.values())
    counts, scores = [], scores_of(policy, SOME, config, 10_000)

    def equal(loss, found):
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        for name, grad in found.items():
            torch.testing.assert_close(grad, known[name], rtol=0, atol=5e-6 * largest)

    for token_budget in (10_000, 150, 90, 41):
        with OutOfMemory() as counted:
            loss, found_scores, found = gradients(policy, SOME, config, token_budget)
        counts.append(counted.forwards)
        equal(loss, found)
        torch.testing.assert_close(found_scores, scores, rtol=0, atol=1e-5)
    assert sorted({*counts}) == counts, "one forward a micro-batch, and two where a pair is split"
    budget = TokenBudget(10_000)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with OutOfMemory(tokens=60):
        loss, _ = budget.fit(
            partial(backward, policy, SOME, range(len(SOME)), scaler, config),
            [len(t) + 1 for p in SOME for t in p.texts],
        )
    assert budget.out_of_memory and budget.num_tokens <= 80
    equal(loss.item(), {n: p.grad for n, p in policy.parameters_of(policy.adapter).items()})


def test_a_pair_that_fits_is_in_one_micro_batch_with_its_prompt_once():
    pairs = [Pair([*range(50), 1], [*range(50), 2]), Pair([*range(50), 3], [*range(50), 4]), Pair([5], [6])]
    assert whole_pairs(pairs, 104, packed=True) == [[2], [0, 1]]  # 50 + 1 + 1 tokens each
    assert whole_pairs(pairs, 103, packed=True) == [[2], [0], [1]]
    assert whole_pairs(pairs, 223, packed=False) == [[2], [0], [1]]  # rows of 56
    assert whole_pairs(pairs, 224, packed=False) == [[2], [0, 1]]


def test_a_split_pair_has_the_dropout_masks_of_its_own_scores():
    policy = policy_of(lora_dropout=0.5)
    config, scaler = RewardConfig(use_cpu=True, lora_dropout=0.5), torch.amp.GradScaler("cpu", enabled=False)
    pair = [Pair([*range(60, 100)], [*range(60, 99), 3])]
    torch.manual_seed(0)
    _, scores = backward(policy, pair, range(len(pair)), scaler, config, 40)
    after = torch.get_rng_state()
    found: list[torch.Tensor] = []
    own = policy.scores
    policy.scores = lambda batch: found.append(own(batch)) or found[-1]
    torch.manual_seed(0)
    backward(policy, pair, range(len(pair)), scaler, config, 40)
    assert torch.equal(torch.get_rng_state(), after)
    assert [score.item() for score in found] == [*scores[0].tolist()] * 2


def test_the_largest_update_is_tried_without_a_trace():
    policy = policy_of()
    before, drawn = copy.deepcopy(policy.adapter_state(policy.adapter)), torch.get_rng_state()
    budget, config = TokenBudget(400), RewardConfig(use_cpu=True)
    with OutOfMemory(tokens=200):
        try_largest_update(policy, SOME, budget, config)
    assert budget.out_of_memory and budget.num_tokens <= 200
    assert all(torch.equal(value, before[name]) for name, value in policy.adapter_state(policy.adapter).items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p.grad is None for p in policy.parameters_of(policy.adapter).values())
