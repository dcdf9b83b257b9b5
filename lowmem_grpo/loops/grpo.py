"""train(): GRPO, from top to bottom."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem_grpo.checkup.prompts import doctor_of
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.inputs.prompts import read_training_inputs
from lowmem_grpo.objective.coefficients import Controllers
from lowmem_grpo.output.lock import releasing_locks
from lowmem_grpo.preview.prompts import show_preview
from lowmem_grpo.progress_bars import without_progress_bars
from lowmem_grpo.rollout.collect import Collected, collect, with_kl_in_reward
from lowmem_grpo.rollout.metrics import remarks
from lowmem_grpo.rollout.refill import needs_refill, refill
from lowmem_grpo.rollout.replay import ReplayBuffer
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.rollout.stream import Stream
from lowmem_grpo.run.evaluations import evaluations_of
from lowmem_grpo.run.interruption import interruptible
from lowmem_grpo.run.ranks import across_ranks
from lowmem_grpo.run.run import Callback, Run, TrainResult
from lowmem_grpo.run.step import Step
from lowmem_grpo.tools.conversation import sampler_of
from lowmem_grpo.update.critic import Critic, saved_config, with_gae, with_values
from lowmem_grpo.update.critic import backward as value_backward
from lowmem_grpo.update.critic import why_not_finite as why_no_value
from lowmem_grpo.update.distill import as_asked, with_teacher
from lowmem_grpo.update.optimizer import Learner
from lowmem_grpo.update.passes import (
    backward,
    lengths_with_gradient,
    needs_old_pass,
    try_largest_update,
    why_not_finite,
    with_old_logprobs,
    with_reference,
)
from lowmem_grpo.update.token_metrics import TokenMeter


@without_progress_bars
@releasing_locks()
@interruptible
@across_ranks
def train(
    model: Any,
    reward_funcs: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    config: GRPOConfig | None = None,
    peft_config: Any = None,
    tokenizer: Any = None,
    callbacks: Callback | Sequence[Callback] = (),
    tools: Any = None,
    environment_factory: Any = None,
) -> TrainResult:
    """Train LoRA adapters on a frozen 4-bit model with GRPO (https://arxiv.org/abs/2402.03300).

    Args:
        model: hub id, model folder, 4-bit checkpoint, adapter folder to continue from, or a loaded model, which is
            changed in place.
        reward_funcs: one or several functions, names (a built-in's, `module.function`, or a call of what makes one,
            `get_regex_reward(pattern='yes')`) or reward models (hub id, folder, or loaded). Each is tried once on a
            made-up group before the model is loaded. None for a task, which has its own, where config names a teacher,
            which says what to learn, or where an environment has a get_reward.
        train_dataset: hub id, JSONL, JSON, CSV or Parquet file, Dataset, or list of rows, with a `prompt` column; or a
            task: its name, such as "countdown", or a Task of your own.
        eval_dataset: in any of these forms, a hub dataset's `test` split; evaluated before, after and every eval_steps.
            By default what a generated task holds out.
        config: every setting; GRPOConfig() by default.
        peft_config: a LoraConfig in place of the config's lora fields.
        tokenizer: in place of the one that comes with the model; loaded, or its hub id or folder.
        callbacks: one function or several, called with (step, metrics, policy) after every step, which a StopIteration
            of theirs makes the last one; a metric that is the mean of nothing is NaN, and None in the result's history.
        tools: one function or several, or names ("python", `module.function`), which the policy calls while it writes:
            each with a type hint for every parameter, and with a docstring that says what it and they are.
        environment_factory: a class, or a function that makes an instance, or `module.Class`; of several kinds a dict
            by what the rows' column `environment` has. Each completion has an instance, reset(**row) before, whose
            public methods are tools; what its get_reward() returns, where it has one, is a reward.

    Raises:
        InputError: bad input, in one sentence with the remedy, before any long work starts.
        NotFiniteError: what is computed is no longer finite; the sentence names the last good checkpoint.
        NotSavedError: the disk refused the last checkpoint or the adapter; the sentence has the last whole checkpoint.
        UnhealthyRunError: doctor="stop", and something keeps the run from learning.
    """
    inputs = read_training_inputs(
        model, reward_funcs, train_dataset, eval_dataset, GRPOConfig() if config is None else config, peft_config,
        tokenizer, callbacks, tools, environment_factory,
    )  # fmt: skip
    doctor = doctor_of(inputs, show_preview(inputs))  # before any long work
    config, prompts, rewards, policy = inputs.config, inputs.prompts, inputs.rewards, inputs.load_policy()
    scaler = torch.amp.GradScaler(policy.device.type, enabled=config.fp16)
    own = policy.parameters_of(policy.adapter).values()
    learner = Learner(own, config, scaler, inputs.total_steps - config.critic_warmup)
    critic = None
    if config.has_critic:  # as PPO has one
        critic = Critic(policy, config, inputs.total_steps, saved_config(inputs.resume))
    teacher = inputs.load_teacher(policy)
    sampler = sampler_of(policy, config, inputs.toolbox)
    stream = Stream(ReplayBuffer(config.replay_buffer_size))
    controllers = Controllers(config)
    if config.reference == "initial" or config.sync_ref_model:
        policy.snapshot_reference()
    collect_step = refill if needs_refill(config) else collect
    parts = {  # of a checkpoint; the policy's is the snapshot of the reference
        "sampler": sampler, "stream": stream, "replay": stream.replay, "reference": policy, "controllers": controllers,
    }  # fmt: skip

    with Run(inputs, policy, learner, parts, doctor, evaluations_of(inputs, sampler), critic) as run:
        run.budget.give_way = sampler.captures.give_way
        # Completions may grow long late in a run, which must not be when an update first runs out of memory.
        if policy.device.type == "cuda" and not run.is_over:
            reserved = sum(each.bytes_to_come() for each in run.learners)
            try_largest_update(policy, inputs.longest_prompt(), run.budget, config, reserved)
        for step in run.steps():
            # 1. Rollout: the policy completes every prompt num_generations times; rewards; advantages.
            with step.phase("rollout"):
                collected = collect_step(sampler, prompts, stream, rewards, config, step.number)
                rollout = collected.rollout

            # 2. Log-probabilities of the reference, and where they are needed before the update those of the policy.
            with step.phase("reference"):
                rollout = with_reference(policy, rollout, config, run.budget)
            if needs_old_pass(rollout, config):
                with step.phase("old"):
                    rollout = with_old_logprobs(policy, rollout, config, run.budget)
            if critic:  # which makes an advantage of each token
                with step.phase("values"):
                    rollout = with_values(policy, rollout, config, run.budget)
                rollout = with_gae(rollout, controllers.beta, config)
            elif config.kl_in_reward:
                rollout = with_kl_in_reward(rollout, controllers.beta, config)
            if teacher is not None:
                with step.phase("teacher"):
                    rollout = with_teacher(teacher, rollout, config, run.budget)

            # 3. Update: micro-batches, whose gradients add up, and one optimizer step for each part of the rollout;
            # all that num_iterations times. Then as many of the critic, which alone learns while it warms up.
            iterations = config.num_iterations if step.number > config.critic_warmup else 0
            token_meter = TokenMeter(rollout, policy.device)
            done: list[tuple[float, Tensor]] = []  # loss and log-probabilities of the last iteration's optimizer steps
            with step.phase("update"):
                for _ in range(iterations):
                    done = []
                    for mini_batch in rollout.mini_batches(config.steps_per_generation):
                        coefficients = controllers.coefficients()
                        work = partial(backward, policy, mini_batch, token_meter, coefficients, scaler, config)
                        lengths = lengths_with_gradient(mini_batch, config)
                        done.append(run.update(step, work, lengths, partial(why_not_finite, mini_batch, config)))
                        if config.use_adaptive_entropy:
                            controllers.move_entropy_coef(token_meter.mean("entropy", mini_batch))
                    if rollout.old_logprobs is None:  # there was one mini-batch, computed before any weight moved
                        rollout = replace(rollout, old_logprobs=torch.cat([logprobs for _, logprobs in done]))
            metrics = {**rollout.metrics, **token_meter.metrics()}
            if critic:
                with step.phase("critic"):
                    metrics |= teach(critic, run, step, rollout, config)
            controllers.move_beta(metrics.get("kl"), len(rollout.completions))
            if config.sync_ref_model and step.number % config.ref_model_sync_steps == 0:
                policy.sync_reference(config.ref_model_mixup_alpha)

            # 4. The step is whole: metrics, evaluation, checkpoint.
            metrics["epoch"] = stream.position / len(prompts)
            metrics["loss"] = sum(loss for loss, _ in done) / len(done) if done else math.nan
            run.finish(
                step, metrics | controllers.metrics(), num_tokens=collected.num_tokens, table=rollout.table,
                work=tokens_by_phase(collected, rollout, config, iterations), remarks=remarks(metrics, rollout),
            )  # fmt: skip
    return run.result()


def teach(critic: Critic, run: Run, step: Step, rollout: Rollout, config: GRPOConfig) -> dict[str, float]:
    """Take the critic's optimizer steps, as many as an update of the policy has; returns the last iteration's means."""
    done: list[tuple[float, Tensor]] = []  # loss, and the share of clipped values
    for _ in range(config.num_iterations):
        done = []
        for mini_batch in rollout.mini_batches(config.steps_per_generation):
            work = partial(value_backward, critic.policy, mini_batch, critic.scaler, config)
            why = partial(why_no_value, mini_batch, config)
            done.append(run.update(step, work, mini_batch.counted_lengths, why, critic.learner))
    return {
        "value_loss": sum(loss for loss, _ in done) / len(done),
        "value/clip_ratio": sum(clipped.item() for _, clipped in done) / len(done),
    }


def tokens_by_phase(collected: Collected, rollout: Rollout, config: GRPOConfig, iterations: int) -> dict[str, int]:
    """Number of tokens of each phase: a rollout's new ones, and what the others compute, with prompts.

    The policy's update went `iterations` times through the rollout: not at all while a critic warms up.
    """
    counted = sum(rollout.counted_lengths)
    return {
        "rollout": collected.num_new_tokens, "reference": counted if config.beta else 0, "old": counted,
        "teacher": sum(as_asked(rollout).counted_lengths),
        "update": iterations * sum(lengths_with_gradient(rollout, config)),
        "values": counted, "critic": config.num_iterations * counted,
    }  # fmt: skip
