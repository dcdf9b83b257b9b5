"""Loss and gradient of supervised training: by definition, beside TRL's trainer, and however examples are packed."""

import copy
from functools import partial

import pytest
import torch
from datasets import Dataset
from tiny_models import DEMO_MODEL, OutOfMemory, make_policy
from transformers import AutoTokenizer
from trl.trainer.sft_config import SFTConfig as TheirConfig
from trl.trainer.sft_trainer import SFTTrainer

from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.data.examples import Example, tokenize_examples
from lowmem_grpo.model.packing import filling_lengths
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.update.nll import backward, micro_batches, nll_and_accuracy, try_largest_update

WHOLE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def say(role, content):
    return {"role": role, "content": content}


ROWS = {
    "text": [{"text": f"{n}+{n}={2 * n}"} for n in range(10, 18)],
    "pair": [{"prompt": f"{n}+{n}=", "completion": f"{2 * n}"} for n in range(10, 18)],
    "chat": [
        {"prompt": [say("user", f"{n}+{n}=")], "completion": [say("assistant", f"<think></think>{2 * n}")]}
        for n in range(10, 18)
    ],
    "messages": [
        {"messages": [say("user", f"{n}+1="), say("assistant", f"{n + 1}"), say("user", "1+1="), say("assistant", "2")]}
        for n in range(10, 18)
    ],
}


def tokenizer_with(template=None):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def gradients(policy, examples, config, token_budget=10_000):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, _ = backward(policy, examples, range(len(examples)), scaler, config, token_budget)
    return loss.item(), {n: p.grad.clone() for n, p in policy.parameters_of(policy.adapter).items()}


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("text", {}), ("pair", {}), ("pair", {"completion_only_loss": False}), ("chat", {}), ("messages", {}),
        ("messages", {"assistant_only_loss": True}), ("chat", {"assistant_only_loss": True}),
    ],
)  # fmt: skip
def test_loss_and_gradient_are_those_of_trls_trainer(kind, settings, loss_type, tmp_path):
    tokenizer = tokenizer_with(WHOLE)
    policy = make_policy("qwen2", tokenizer, load_in_4bit=False)
    theirs = copy.deepcopy(policy.model)
    trainer = SFTTrainer(
        theirs, TheirConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, loss_type=loss_type, max_length=None,
            gradient_checkpointing=False, per_device_train_batch_size=8, disable_tqdm=True, **settings),
        train_dataset=Dataset.from_list(ROWS[kind]), processing_class=tokenizer,
    )  # fmt: skip
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    theirs.zero_grad()
    wanted = trainer.compute_loss(theirs, batch)
    wanted.backward()
    config = SFTConfig(use_cpu=True, max_length=None, loss_type=loss_type, **settings)
    examples, _ = tokenize_examples(Dataset.from_list(ROWS[kind]), tokenizer, config)
    loss, found = gradients(policy, examples, config, token_budget=100)
    assert loss == pytest.approx(wanted.item(), rel=1e-6)
    _, accuracy = nll_and_accuracy(policy, examples, range(len(examples)), config, 100)
    assert accuracy.item() == pytest.approx(trainer._metrics["train"]["mean_token_accuracy"][0])
    known = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert found.keys() == known.keys()
    largest = max(grad.abs().max() for grad in known.values())
    for name, grad in found.items():
        torch.testing.assert_close(grad, known[name], rtol=0, atol=2e-6 * largest.item())


SOME = [
    Example([*range(10, 34)], [False] + [True] * 23),
    Example([*range(20, 52)], [False] * 9 + [n % 3 > 0 for n in range(23)], weight=0.5),
    Example([*range(30, 42)], [False] * 4 + [True] * 8, weight=2.0),
] * 2


def likely(policy, count=8):
    """An example of which each token is the likeliest after those before it."""
    ids = [10]
    while len(ids) < count:
        ids.append(int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return Example(ids, [False] + [True] * (count - 1), weight=3.0)


def accuracy_by_definition(policy, examples):
    """The share of learnt tokens that are the likeliest of the full logits."""
    right = [
        bool(scores.argmax() == token_id)
        for one in examples
        for scores, token_id, counted in zip(
            policy.model(input_ids=torch.tensor([one.ids])).logits[0], one.ids[1:], one.counted[1:], strict=False
        )
        if counted
    ]
    return sum(right) / len(right)


def by_definition(policy, examples, loss_type):
    """The loss from full logits, one example at a time."""
    total, weights = torch.zeros(()), 0.0
    for one in examples:
        logits = policy.model(input_ids=torch.tensor([one.ids])).logits[0, :-1].float()
        logprobs = logits.log_softmax(-1)[range(len(one.ids) - 1), one.ids[1:]]
        counted = torch.tensor(one.counted[1:])
        losses = -logprobs * (logprobs.detach().exp() if loss_type == "dft" else 1)
        total = total + one.weight * losses[counted].sum()
        weights += one.weight * int(counted.sum())
    return total / weights


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"padding_free": False}, {"gradient_checkpointing": True}],
    ids=["packed", "padded", "checkpointed"],
)
def test_neither_micro_batches_nor_packing_nor_memory_change_the_gradient(settings, loss_type):
    policy = make_policy("qwen2", load_in_4bit=False, **{k: v for k, v in settings.items() if k != "padding_free"})
    config = SFTConfig(use_cpu=True, loss_type=loss_type, **settings)
    assert policy.packs  # tried once, now
    wanted = by_definition(policy, SOME, loss_type)
    wanted.backward()
    known = {n: p.grad.clone() for n, p in policy.parameters_of(policy.adapter).items()}
    largest = max(grad.abs().max() for grad in known.values()).item()
    scaler, budget = torch.amp.GradScaler("cpu", enabled=False), TokenBudget(200)
    with OutOfMemory(tokens=100):
        loss, _ = budget.fit(partial(backward, policy, SOME, range(len(SOME)), scaler, config), [24, 32, 12] * 2)
    assert budget.out_of_memory > 0
    found = {n: p.grad for n, p in policy.parameters_of(policy.adapter).items()}
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, grad in known.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=2e-6 * largest)


def test_the_loss_of_an_evaluation_is_that_of_training():
    policy = make_policy("qwen2", load_in_4bit=False)
    config = SFTConfig(use_cpu=True)
    loss, _ = gradients(policy, SOME, config)
    assert nll_and_accuracy(policy, SOME, range(len(SOME)), config, 100)[0].item() == pytest.approx(loss, rel=1e-6)


def test_the_accuracy_is_the_share_of_learnt_tokens_that_are_the_likeliest():
    policy = make_policy("qwen2", load_in_4bit=False)
    config, examples = SFTConfig(use_cpu=True), [*SOME[:3], likely(policy)]
    _, means = backward(policy, examples, range(len(examples)), torch.amp.GradScaler("cpu", enabled=False), config, 40)
    _, accuracy = nll_and_accuracy(policy, examples, range(len(examples)), config, 10_000)
    wanted = accuracy_by_definition(policy, examples)
    assert 7 / 53 <= wanted < 1, "7 of 53 at least, however much each weighs"
    assert means.accuracy.item() == accuracy.item() == pytest.approx(wanted)


@pytest.mark.parametrize("token_budget, lengths", [(70, [32, 32, 9]), (62, [32, 32]), (31, [32]), (200, [32] * 4)])
def test_the_largest_update_that_is_tried_fills_a_micro_batch(token_budget, lengths):
    """An example of 32 tokens takes the room of 31, since its last one predicts nothing."""
    assert filling_lengths(32, 4, token_budget) == lengths
    policy = make_policy("qwen2", load_in_4bit=False)
    tried = [Example([5] * length, [False] + [True] * (length - 1)) for length in lengths]
    batches = list(micro_batches(policy, tried, SFTConfig(use_cpu=True), token_budget))
    assert len(batches) == 1 and batches[0][0].input_ids.numel() <= token_budget


def test_trying_the_largest_update_leaves_weights_and_gradients_alone():
    policy = make_policy("qwen2", load_in_4bit=False)
    before = {n: p.detach().clone() for n, p in policy.parameters_of(policy.adapter).items()}
    assert policy.packs  # tried once, now
    state, budget = torch.get_rng_state(), TokenBudget(200)
    with OutOfMemory(tokens=100):
        try_largest_update(policy, SOME, budget, SFTConfig(use_cpu=True))
    assert budget.num_tokens < 200 and torch.equal(torch.get_rng_state(), state)
    for name, parameter in policy.parameters_of(policy.adapter).items():
        assert parameter.grad is None and torch.equal(parameter, before[name])
