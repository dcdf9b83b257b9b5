import math
from dataclasses import replace

import pytest
import torch
from tiny_models import DEMO_MODEL
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_grpo import GRPOConfig
from lowmem_grpo.demo import task
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.update.optimizer import clip_gradients, loss_scale_overflows, make_optimizer, step, total_norm

pytestmark = pytest.mark.usefixtures("known_trials")

ON_A_CPU = ["adamw_torch_fused", "adamw_torch", "adamw_8bit"]


def parameters():
    draw = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(size, generator=draw)) for size in ((64, 128), (8, 8))]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    return made


def unexpected():
    """Is told of an out-of-memory."""
    raise AssertionError("out of memory")


@pytest.mark.parametrize("optim", ON_A_CPU)
def test_every_optimizer_is_adamw(optim):
    """The first step of Adam is lr in the gradient's direction, and weight decay is decoupled."""
    made = parameters()
    before = [p.detach().clone() for p in made]
    config = GRPOConfig(optim=optim, learning_rate=0.01, weight_decay=0.5)
    step(make_optimizer(made, config), torch.amp.GradScaler("cpu", enabled=False), unexpected)
    for parameter, old in zip(made, before, strict=True):
        expected = old * (1 - 0.01 * 0.5) - 0.01 * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=0)
    (group,) = make_optimizer(made, replace(config, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-2)).param_groups
    assert tuple(group["betas"]) == (0.5, 0.6) and group["eps"] == 1e-2


def test_the_state_of_8_bits_takes_what_the_docstring_says():
    made = parameters()
    optimizer = make_optimizer(made, GRPOConfig(optim="adamw_8bit"))
    step(optimizer, torch.amp.GradScaler("cpu", enabled=False), unexpected)
    large, small = (
        sum(v.nbytes for name, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and "qmap" not in name)
        for p in made
    )
    assert large == 2 * made[0].numel() + 8 * made[0].numel() // 256
    assert small == 8 * made[1].numel(), "below 4,096 numbers the state is in 32 bits"


def test_out_of_memory_in_the_first_step_makes_the_state_again(monkeypatch):
    made, again = parameters(), parameters()
    config = GRPOConfig(optim="adamw_torch_fused")
    expected = make_optimizer(made, config)
    step(expected, torch.amp.GradScaler("cpu", enabled=False), unexpected)
    zeros_like, calls, told = torch.zeros_like, [], []

    def short_of_memory(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")
        return zeros_like(*arguments, **keywords)

    monkeypatch.setattr(torch, "zeros_like", short_of_memory)
    step(make_optimizer(again, config), torch.amp.GradScaler("cpu", enabled=False), lambda: told.append(1))
    assert len(calls) > 4 and told == [1]
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


class NoMemoryForNorms(TorchDispatchMode):
    """Out of memory where gradients' norms are computed, at the calls of these numbers."""

    def __init__(self, *which):
        super().__init__()
        self.which, self.calls = which, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket is torch.ops.aten._foreach_norm:
            self.calls += 1
            if self.calls in self.which:
                raise torch.OutOfMemoryError("injected")
        return function(*arguments, **(keywords or {}))


def test_out_of_memory_while_gradients_are_clipped_changes_nothing():
    made, again = parameters(), parameters()
    norm = torch.nn.utils.clip_grad_norm_(made, 1.0)
    told = []
    with NoMemoryForNorms(1) as mode:
        assert torch.equal(clip_gradients(again, 1.0, lambda: told.append(1)), norm) and norm > 1
    assert mode.calls == 2 and told == [1]
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(made, again, strict=True))


def test_a_run_that_cannot_clip_keeps_its_last_whole_step(tmp_path):
    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, prompts_per_step=2, num_generations=4, max_completion_length=8,
        max_steps=3, gradient_checkpointing=False,
    )  # fmt: skip
    rows = task.rows(task.splits()[0][:8])
    # Step 1 takes the gradients' norm and then the weights'.
    with pytest.raises(torch.OutOfMemoryError) as error, NoMemoryForNorms(3, 4) as mode:
        train(str(DEMO_MODEL), task.tag_format_reward, rows, config=config)
    assert "Set optim='adamw_8bit', or lower lora_r" in error.value.__notes__[0]
    assert mode.calls == 4 and (tmp_path / "checkpoint-1").is_dir()
    result = train(str(DEMO_MODEL), task.tag_format_reward, rows, config=replace(config, resume_from_checkpoint=True))
    assert [line["step"] for line in result.history] == [1, 2, 3]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_out_of_memory_in_a_step_that_changes_weights_on_the_way_is_an_error(optim, monkeypatch):
    made = parameters()
    optimizer = make_optimizer(made, GRPOConfig(optim=optim))
    calls, own = [], optimizer.step

    def short_of_memory(*arguments, **keywords):
        calls.append(1)
        own(*arguments, **keywords)
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(optimizer, "step", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        step(optimizer, torch.amp.GradScaler("cpu", enabled=False), unexpected)
    assert len(calls) == 1, "a second would apply part of the step twice"


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch_fused"])
def test_a_resumed_run_goes_on_with_the_optimizers_state(tmp_path, optim):
    def run(folder, **changes):
        config = GRPOConfig(
            output_dir=str(tmp_path / folder), use_cpu=True, prompts_per_step=2, num_generations=4, save_steps=1,
            max_completion_length=8, gradient_checkpointing=False, learning_rate=1e-3, optim=optim, bf16=False,
            rollout_weights="4bit", max_steps=2, **changes,
        )  # fmt: skip
        rows = task.rows(task.splits()[0][:8])
        return train(str(DEMO_MODEL), by_place, rows, config=config)

    def by_place(completions, **_):
        return [float(place % 4) for place in range(len(completions))]

    whole = run("whole")
    assert all(line["grad_norm"] > 0 for line in whole.history)
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    for (name, a), b in zip(
        whole.policy.parameters_of(whole.policy.adapter).items(),
        resumed.policy.parameters_of(resumed.policy.adapter).values(),
        strict=True,
    ):
        assert torch.equal(a, b), name


def test_what_was_done_again_is_logged(tmp_path):
    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, prompts_per_step=2, num_generations=4, max_completion_length=8,
        max_steps=2, gradient_checkpointing=False,
    )  # fmt: skip
    with NoMemoryForNorms(1):
        rows = task.rows(task.splits()[0][:8])
        lines = train(str(DEMO_MODEL), task.tag_format_reward, rows, config=config).history
    assert [line["memory/out_of_memory"] for line in lines] == [1, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20])
def test_a_norm_shows_one_number_that_is_not_finite(value):
    tensors = [parameter.grad for parameter in parameters()]
    assert total_norm(tensors, unexpected).isfinite()
    tensors[0][3, 5] = value
    assert not total_norm(tensors, unexpected).isfinite()


def test_a_loss_scale_is_to_blame_while_it_is_above_1_and_the_loss_finite():
    for scale, loss, blamed in [(2.0, 0.5, True), (1.0, 0.5, False), (2.0, math.nan, False), (2.0, math.inf, False)]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.zeros(()))
        assert loss_scale_overflows(scaler, loss) == blamed
    assert not loss_scale_overflows(torch.amp.GradScaler("cpu", enabled=False), 0.5)
