"""What test_distributed has its processes do: updates and runs, together and alone."""

import contextlib
import dataclasses
import os
import signal
import time
from functools import partial
from typing import Any

import torch
from test_update import fixed_rollout
from tiny_models import DEMO_MODEL, OutOfMemory, compute_in_fp64, head_by_definition, make_policy

from lowmem_grpo import distributed, train
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.demo import task
from lowmem_grpo.model import policy as policy_module
from lowmem_grpo.objective.coefficients import Coefficients
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.rollout.collect import with_kl_in_reward
from lowmem_grpo.run import interruption
from lowmem_grpo.update.critic import Critic, with_gae, with_values
from lowmem_grpo.update.critic import backward as value_backward
from lowmem_grpo.update.optimizer import Learner
from lowmem_grpo.update.passes import backward, needs_old_pass, with_old_logprobs, with_reference
from lowmem_grpo.update.token_metrics import TokenMeter


@contextlib.contextmanager
def in_fp64():
    """Dense policies made within compute in fp64, from the embedding to the loss."""
    head, policy_module.linear_logprobs = policy_module.linear_logprobs, head_by_definition
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        policy_module.linear_logprobs = head
        torch.set_default_dtype(torch.float32)


def rollout_of(num_prompts: int):
    """Uneven completions with sampling's log-probabilities and rewards; the second group has no difference."""
    rollout = fixed_rollout(prompts=num_prompts)
    rewards = torch.linspace(0, 1, len(rollout.completions))[:, None]
    rewards[2:4], advantages = 0.5, rollout.advantages.clone()
    advantages[2:4] = 0
    assert rollout.sampling_logprobs is not None
    proposal = rollout.sampling_logprobs + 0.1
    return dataclasses.replace(rollout, proposal_logprobs=proposal, rewards=rewards, advantages=advantages)


def updates(policy, num_prompts: int, settings: dict[str, Any], budget=None) -> dict[str, Any]:
    """Losses, gradients, log-probabilities and metrics of a rollout's optimizer steps, none of which moves a weight."""
    config = GRPOConfig(**{"use_cpu": True, "bf16": False, "token_budget": 60, "num_generations": 2, **settings})
    budget, scaler = budget or TokenBudget(config.token_budget), torch.amp.GradScaler("cpu", enabled=False)
    rollout = with_reference(policy, rollout_of(num_prompts), config, budget)
    if needs_old_pass(rollout, config):
        rollout = with_old_logprobs(policy, rollout, config, budget)
    works, learner = [], Learner(policy.parameters_of(policy.adapter).values(), config, scaler, 10)
    meter = TokenMeter(rollout, policy.device)
    found: dict[str, Any] = {}
    if config.has_critic:
        rollout = with_values(policy, rollout, config, budget)
        rollout = with_gae(rollout, config.beta, config)
        value_learner = Learner(policy.parameters_of("critic").values(), config, scaler, 10)
        works += [(partial(value_backward, policy, rollout, scaler, config), value_learner, rollout)]
        found["values"] = rollout.values
    elif config.kl_in_reward:
        rollout = with_kl_in_reward(rollout, config.beta, config)
    coefficients = Coefficients(config.beta, config.entropy_coef)
    for part in rollout.mini_batches(config.steps_per_generation):
        works += [(partial(backward, policy, part, meter, coefficients, scaler, config), learner, part)]
    for number, (work, learner, part) in enumerate(works):
        loss, more = budget.fit(work, part.lengths)
        learner.sum_over_ranks(loss, more)
        gradient = torch.cat([parameter.grad.flatten() for parameter in learner.parameters])
        found |= {f"loss {number}": loss, f"more {number}": more, f"gradient {number}": gradient}
        found[f"entropy {number}"] = torch.tensor(meter.mean("entropy", part) or 0.0)
        for parameter in learner.parameters:
            parameter.grad = None
    for name in ("ref_logprobs", "old_logprobs", "advantages", "token_advantages", "returns"):
        if getattr(rollout, name) is not None:
            found[name] = getattr(rollout, name)
    return found | {name: torch.tensor(value) for name, value in {**meter.metrics(), **rollout.metrics}.items()}


def distances(num_prompts: int, settings: dict[str, Any]) -> dict[str, float]:
    """How far the ranks' update is from rank 0's by itself, of each of updates(): by its norm, relative."""
    if "adv_estimator" in settings:  # a critic, whose score head computes in fp32
        policy = make_policy("qwen3", load_in_4bit=False)
        add_critic(policy, GRPOConfig(**{"use_cpu": True, "bf16": False, **settings}))
        return compared(policy, num_prompts, settings)
    with in_fp64():
        return compared(fp64_policy(), num_prompts, settings)


def fp64_policy():
    policy = make_policy("qwen3", load_in_4bit=False)
    compute_in_fp64(policy)
    return policy


def compared(policy, num_prompts: int, settings: dict[str, Any], budget=None) -> dict[str, float]:
    """The distances of the ranks' update, within this budget, from rank 0's."""
    together, whole = updates(policy, num_prompts, settings, budget), None
    if distributed.is_main():
        with distributed.alone():
            whole = updates(policy, num_prompts, settings)
    whole = distributed.from_main(whole)
    assert whole is not None and whole.keys() == together.keys()
    return {key: distance(together[key], whole[key]) for key in whole}


def short_of_memory(num_tokens: int) -> tuple[dict[str, float], int]:
    """The distances where rank 1 has no memory for so many tokens at once, and how often this rank ran out."""
    with in_fp64():
        policy, budget = fp64_policy(), TokenBudget(60)
        assert policy.packs  # which is tried once
        with OutOfMemory(tokens=num_tokens) if distributed.rank() == 1 else contextlib.nullcontext():
            return compared(policy, 5, {"beta": 0.1}, budget), budget.out_of_memory


def add_critic(policy, config) -> None:
    """Put a critic on the base whose values are not all 0."""
    Critic(policy, config, 10)
    head = policy.score_heads["critic"]
    head.load(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3)))


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    found, truth = found.detach().double(), truth.detach().double()
    assert torch.equal(found.isnan(), truth.isnan())
    apart = (found - truth).nan_to_num().norm()
    return (apart / truth.nan_to_num().norm().clamp(min=1e-12)).item()


RUN = {
    "use_cpu": True, "bf16": False, "prompts_per_step": 4, "num_generations": 3, "max_completion_length": 8,
    "learning_rate": 1e-3, "gradient_checkpointing": False, "max_steps": 3, "doctor": "off", "log_completions": True,
}  # fmt: skip
ROWS = task.rows(task.splits()[0][:16])
HELD_OUT = task.rows(task.splits()[1][:5])


def variety(completions, log_extra, log_metric, **given):
    """How many different characters a completion has, of which a group seldom agrees."""
    texts = [messages[0]["content"] for messages in completions]
    found = [float(len(set(text))) for text in texts]
    log_extra("half", [value / 2 for value in found])
    log_metric("mean_variety", sum(found) / len(found))
    return found


def run(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A run's history, evaluations, weights and random state."""
    config = GRPOConfig(output_dir=folder, **{**RUN, **settings})
    given = {} if config.eval_steps is None else {"eval_dataset": HELD_OUT}
    result = train(str(DEMO_MODEL), None if config.teacher else variety, ROWS, config=config, **given)
    adapters = result.policy.parameters_of(result.policy.adapter)
    return {
        "history": result.history, "eval_history": result.eval_history, "random": torch.get_rng_state(),
        "weights": {name: value.detach() for name, value in adapters.items()}, "output_dir": folder,
    }  # fmt: skip


def run_together(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    return run(f"{folder}/together", settings)


def run_alone(folder: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The run that rank 0 makes by itself, while the others wait; None of theirs."""
    if not distributed.is_main():
        return None
    with distributed.alone():
        return run(f"{folder}/alone", settings)


class Unsendable(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, one, other):
        super().__init__(one)


def _raised(work) -> BaseException:
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def _fail(in_rank: int, error: Exception) -> None:
    if distributed.rank() == in_rank:
        raise error


def together() -> dict[str, Any]:
    """The results of every function of distributed.py."""
    rank = distributed.rank()
    torch.manual_seed(5)
    with distributed.own_randomness(torch.device("cpu"), 1, 2):
        own = torch.rand(()).item()
    with distributed.alone():
        alone = distributed.rank(), distributed.world_size()
    of_main = torch.tensor([-0.0, 7.0]) if rank == 0 else torch.tensor([torch.nan, torch.inf])
    distributed.take_from_main([of_main])
    values, of_bf16 = torch.tensor([1.0, rank]), torch.ones(1, 1, dtype=torch.bfloat16)
    distributed.sum_over_ranks([values, of_bf16])
    distributed.refuse_differences("settings", {"seed": 1})
    return {
        "rank": (rank, distributed.world_size()), "alone": alone, "own draw": own, "shared draw": torch.rand(()).item(),
        "gathered": distributed.gathered(f"rank {rank}"), "from main": distributed.from_main(f"rank {rank}"),
        "sum": values, "of bf16": of_bf16,
        "of main": of_main, "error": repr(_raised(lambda: distributed.each(lambda: _fail(1, ValueError("of rank 1"))))),
        "without pickle": str(_raised(lambda: distributed.each(lambda: _fail(1, Unsendable("a", "b"))))),
        "different": str(_raised(lambda: distributed.refuse_differences("settings", {"seed": rank, "beta": 0}))), "same": True,
    }  # fmt: skip


def share(weights: list[int]) -> range:
    return distributed.share(weights)


def sum_and_strike_rank_0() -> tuple[bool, list[float], list[int]]:
    """Whether a signal raised while this rank waited to sum, its part of the sum, and who was there afterwards."""
    if distributed.is_main():
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    else:
        time.sleep(0.5)
    values, struck = torch.ones(2), False
    try:
        distributed.summed(values)
    except KeyboardInterrupt:
        struck = True
    return struck, values.tolist(), distributed.gathered(distributed.rank())


def hold_while_rank_1_is_late() -> tuple[str, float, list[int]]:
    """What a held signal raised in rank 0, to which rank 1 did not come, after how many seconds, and who came later."""
    interruption.OTHERS_COME_S, begun = 0.2, time.monotonic()
    with interruption.Interruption() as held:
        if distributed.is_main():
            signal.signal(signal.SIGALRM, held._on_signal)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        else:
            time.sleep(1.5)
        try:
            held.hold_everywhere()
            raised = ""
        except BaseException as error:
            raised = repr(error)
        took = time.monotonic() - begun
        return raised, took, distributed.gathered(distributed.rank())


def sum_with_one_that_is_gone(ended: int) -> str:
    """What rank 0 says where the process of rank 1 has ended, as `ended` has, and its connection does not tell."""
    own = distributed._sum
    if distributed.is_main():
        distributed._processes[1] = ended
        return str(_raised(lambda: distributed.summed(torch.ones(2))))
    distributed._sum = lambda *given: (time.sleep(0.5), own(*given))
    return str(distributed.summed(torch.ones(2)).tolist())


def wait_for_others(killed: int) -> None:
    """Wait for what one rank does not live to say."""
    if distributed.rank() == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.gathered(None)
