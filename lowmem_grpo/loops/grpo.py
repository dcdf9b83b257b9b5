"""train(): GRPO on one device, from top to bottom."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler, set_seed

from lowmem_grpo.config.grpo import GRPOConfig, refuse_changes
from lowmem_grpo.data.prompts import tokenize_prompts
from lowmem_grpo.data.rows import load_rows
from lowmem_grpo.errors import InputError, NotFiniteError
from lowmem_grpo.evaluation.evaluate import measure
from lowmem_grpo.evaluation.show import as_line
from lowmem_grpo.evaluation.statistics import differences
from lowmem_grpo.inputs import EVALUATION, check_budgets, check_vocabulary, is_continued
from lowmem_grpo.model.load import adapter_config, find_model, load_policy, load_tokenizer, read_config, run_device
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.objective.coefficients import (
    after_entropy,
    after_kl,
    coefficient_metrics,
    coefficients_of,
    first_coefficients,
)
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.planner.plan import as_text as plan_as_text
from lowmem_grpo.planner.plan import for_evaluation, limit_memory, plan_to_fit
from lowmem_grpo.progress_bars import without_progress_bars
from lowmem_grpo.rewards import BUILT_IN, BUILT_IN_FACTORIES, RewardRunner, resolve_reward_funcs
from lowmem_grpo.rollout.collect import Collected, collect_rollout, with_kl_in_reward
from lowmem_grpo.rollout.replay import ReplayBuffer
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.rollout.stream import Stream
from lowmem_grpo.run import checkpoint as checkpoints
from lowmem_grpo.run.best import BestAdapter
from lowmem_grpo.run.folder import writable_folder, write_folder
from lowmem_grpo.run.interruption import Interruption
from lowmem_grpo.run.log import MetricsLog, write_completions
from lowmem_grpo.run.meter import Meter
from lowmem_grpo.run.progress import Progress
from lowmem_grpo.run.randomness import randomness as current_randomness
from lowmem_grpo.run.randomness import same_randomness
from lowmem_grpo.run.run import TrainResult, eval_fingerprint, fingerprint
from lowmem_grpo.tasks import with_tasks
from lowmem_grpo.update.optimizer import clip_gradients, loss_scale_overflows, make_optimizer, state_bytes, total_norm
from lowmem_grpo.update.optimizer import step as optimizer_step
from lowmem_grpo.update.passes import (
    backward,
    high_entropy,
    kept_lengths,
    needs_old_pass,
    old_logprobs_and_entropy,
    reference_logprobs,
    try_largest_update,
    why_not_finite,
)
from lowmem_grpo.update.token_metrics import TokenMeter


@without_progress_bars
def train(
    model: Any,
    reward_funcs: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    config: GRPOConfig | None = None,
    peft_config: Any = None,
    tokenizer: Any = None,
    callbacks: Sequence[Callable[[int, dict[str, Any], Policy], None]] = (),
) -> TrainResult:
    """Train LoRA adapters on a frozen 4-bit model with GRPO (https://arxiv.org/abs/2402.03300).

    Args:
        model: hub id, model folder, 4-bit checkpoint, adapter folder to continue from, or a loaded model, which is
            changed in place.
        reward_funcs: one or several functions, names (a built-in's, `module.function`, or a call of what makes one,
            `get_regex_reward(pattern='yes')`) or reward models (hub id, folder, or loaded). Each is tried once on two
            made-up completions before the model is loaded. None for a task, which has its own.
        train_dataset: hub id, JSONL, JSON, CSV or Parquet file, Dataset, or list of rows, with a `prompt` column; or a
            task's name, such as "countdown".
        eval_dataset: likewise; evaluated before, after and every eval_steps. A hub dataset's `test` split. By default
            what a generated task holds out.
        peft_config: a LoraConfig in place of the config's lora fields.
        callbacks: called with (step, metrics, policy) after every step; a metric that is the mean of nothing is NaN,
            and None in TrainResult's history.

    Raises:
        InputError: bad input, in one sentence with the remedy, before any long work starts.
        NotFiniteError: what is computed is no longer finite; the sentence names the last good checkpoint.
    """
    config = config or GRPOConfig()
    if not isinstance(config, GRPOConfig):
        raise InputError(f"config is a {type(config).__name__}; pass a GRPOConfig")
    callbacks = [callbacks] if callable(callbacks) else list(callbacks or ())
    train_dataset, eval_dataset, reward_funcs, config = with_tasks(train_dataset, eval_dataset, reward_funcs, config)
    if isinstance(model, Path) or (isinstance(model, str) and model.startswith("~")):
        model = str(Path(model).expanduser())
    try:
        settings = json.dumps(asdict(config), indent=1)
    except TypeError as error:
        raise InputError(f"config holds what JSON does not: {error}; use texts, numbers, lists and mappings") from error
    functions = resolve_reward_funcs(reward_funcs, BUILT_IN, BUILT_IN_FACTORIES)
    rewards = RewardRunner(functions, config.reward_timeout)
    if config.reward_weights is not None and len(config.reward_weights) != len(rewards.names):
        raise InputError(
            f"reward_weights has {len(config.reward_weights)} entries for {len(rewards.names)} reward functions"
        )
    output_dir = writable_folder(config.output_dir)
    resume = checkpoints.find_checkpoint(output_dir, config.resume_from_checkpoint)
    if resume is not None:
        earlier = checkpoints.read_state(resume)
        refuse_changes(config, earlier["config"])
        if earlier.get("rewards", rewards.names) != rewards.names:
            raise InputError(
                f"{resume} is of a run with the rewards {', '.join(earlier['rewards'])}, and these are "
                f"{', '.join(rewards.names)}; resume with the same ones, or start a new run from the adapter"
            )
    rows = load_rows(train_dataset, config)
    eval_rows = None if eval_dataset is None else load_rows(eval_dataset, config, name="eval_dataset", split="test")
    for name in EVALUATION:
        if getattr(config, name) != getattr(GRPOConfig(), name) and eval_rows is None:
            raise InputError(
                f"{name}={getattr(config, name)}, but there is no eval_dataset; pass one or leave {name} out"
            )
    find_model(model, config, peft_config)
    if config.sync_ref_model and config.reference == "base" and is_continued(model):
        raise InputError("sync_ref_model follows the adapter that training starts from; set reference='initial'")
    device, given = run_device(config), config
    trial = rows[:2]
    rewards.try_out(trial["prompt"], {key: values for key, values in trial.items() if key != "prompt"})
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer or model, config)
    prompts, dropped = tokenize_prompts(rows, tokenizer, config)
    eval_prompts, eval_dropped = [], 0
    if eval_rows is not None:
        eval_prompts, eval_dropped = tokenize_prompts(eval_rows, tokenizer, config, name="eval_dataset")
    check_budgets(prompts + eval_prompts, config)
    planned = None
    if config.vram_budget is not None:
        longest, adapter = max(len(p.ids) for p in prompts + eval_prompts), adapter_config(model, config, peft_config)
        planned = plan_to_fit(read_config(model, config), config, adapter, longest)
        config = planned.config

    set_seed(config.seed)
    with limit_memory(planned, device):
        policy = load_policy(model, tokenizer, config, peft_config)
    check_vocabulary(prompts + eval_prompts, policy)
    rewards.bind(policy)
    parameters = list(policy.trainable_parameters().values())
    optimizer = make_optimizer(parameters, config)
    total_steps = config.max_steps
    if total_steps < 0:
        total_steps = ceil(config.num_train_epochs * len(prompts) / config.prompts_per_step)
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps
    )
    scaler = torch.amp.GradScaler(policy.device.type, enabled=config.fp16)
    # nonfinite_steps: how many optimizer steps in a row, up to now, changed no weight.
    state = {"step": 0, "num_tokens": 0, "nonfinite_steps": 0, **first_coefficients(config)}
    stream = Stream(0, set(), ReplayBuffer(config.replay_buffer_size))
    if config.reference == "initial" or config.sync_ref_model:
        policy.keep_reference()
    data, eval_data = fingerprint(prompts), eval_fingerprint(eval_prompts, config.num_generations_eval)
    # The evaluation before training: each prompt's values, by metric, and what they are of.
    first: dict[str, list[float]] = {}
    first_data = eval_data
    if resume is not None:
        saved = checkpoints.load_checkpoint(resume, policy, optimizer, scheduler, scaler)
        if saved["data"] != data:
            raise InputError(f"{resume} is of a run on other prompts; resume with its train_dataset and tokenizer")
        state = {key: saved.get(key, value) for key, value in state.items()}
        stream.position, stream.dull = saved["data_position"], set(saved.get("dull", ()))
        policy.samples_dense = saved.get("samples_dense")
        if "eval_data" in saved:
            kept = checkpoints.read_tensors(resume, "first_evaluation")
            first, first_data = {name: values.tolist() for name, values in kept.items()}, saved["eval_data"]
        if config.replay_buffer_size:
            stream.replay.load(checkpoints.read_tensors(resume, "replay"))
        if policy.reference is not None:
            policy.reference = {
                name: value.to(policy.device) for name, value in checkpoints.read_tensors(resume, "reference").items()
            }
    log = MetricsLog(output_dir, state["step"])
    best = BestAdapter(output_dir, config, fresh=resume is None)
    (output_dir / "grpo_config.json").write_text(settings, encoding="utf-8")

    def save(randomness: dict[str, Any]) -> Path:
        complete = {**state, "data": data, "config": asdict(given)}
        complete |= {"data_position": stream.position, "dull": sorted(stream.dull), "rewards": rewards.names}
        complete["samples_dense"] = policy.samples_dense
        tensors = {"replay": stream.replay.tensors()} if config.replay_buffer_size else {}
        if first:
            complete["eval_data"] = first_data
            tensors["first_evaluation"] = {n: torch.tensor(v, dtype=torch.float64) for n, v in first.items()}
        if policy.reference is not None:
            tensors["reference"] = policy.reference
        folder = checkpoints.save_checkpoint(
            output_dir, policy, optimizer, scheduler, scaler, complete, randomness, tensors
        )
        checkpoints.remove_old_checkpoints(output_dir, config.save_total_limit)
        return folder

    shown = list(dict.fromkeys([best.metric, "eval_pass@1"]))

    def evaluate_now() -> None:
        """Once a step: a resumed run finds in the log what was done before it stopped."""
        nonlocal first
        step = state["step"]
        if not eval_prompts or log.evaluation(step):
            return
        with same_randomness():  # a run is the same, however often it is evaluated
            found = measure(policy, eval_prompts, rewards, for_evaluation(planned, config), step)
        metrics, values = found.metrics, {name: found.values[name] for name in shown if name in found.values}
        if step == 0:
            first = found.values
        elif first_data == eval_data:
            metrics = metrics | differences(first, values)
        best.keep(policy, step, metrics)
        log.write({"step": step, **metrics})
        when = f"after {step} steps" if step == total_steps else f"at step {step}" if step else "before training"
        progress.say(f"evaluation {when}: {as_line(metrics, shown)}")

    with limit_memory(planned, device), Progress(total_steps) as progress, Interruption() as interruption:
        if planned is not None:
            progress.say(plan_as_text(planned))
        for what, left_out in (("prompts", dropped), ("evaluation prompts", eval_dropped)):
            if left_out:
                progress.say(f"{left_out} {what} have more than {config.max_prompt_length} tokens and are left out")
        if resume is not None and state["step"] >= total_steps:
            progress.say(f"{resume} is at step {state['step']} of {total_steps}: nothing is left to train")
        if eval_prompts and first_data != eval_data:
            progress.say("eval_dataset or num_generations_eval has changed, so there is no difference from the start")
        budget = TokenBudget(config.token_budget)
        if policy.device.type == "cuda" and state["step"] < total_steps:
            sizes = [parameter.numel() for parameter in policy.trainable_parameters().values()]
            to_come = 0 if optimizer.state else state_bytes(config.optim, sizes)
            try_largest_update(policy, max((prompt.ids for prompt in prompts), key=len), budget, config, to_come)
        if state["step"] == 0:
            evaluate_now()
        randomness = current_randomness()  # of the last finished step, so that a step cut short is begun anew
        told: set[str] = set()  # the causes of skipped optimizer steps that were said
        try:
            while state["step"] < total_steps:
                step, started = state["step"] + 1, time.perf_counter()
                meter = Meter(policy.device)

                # 1. Rollout: the policy answers every prompt num_generations times; rewards; group advantages.
                with meter.phase("rollout"):
                    collected = collect_rollout(policy, prompts, stream, rewards, config, step)
                    rollout = collected.rollout

                # 2. The reference, and where something must be known before the first gradient, the policy as it is.
                lengths = [n for n, counts in zip(rollout.lengths, rollout.completion_mask, strict=True) if counts]
                with meter.phase("reference"):
                    reference = budget.fit(partial(reference_logprobs, policy, rollout, config), lengths)
                    rollout = replace(rollout, ref_logprobs=reference)
                if needs_old_pass(rollout, config):
                    with meter.phase("old"):
                        work = partial(old_logprobs_and_entropy, policy, rollout, config)
                        old_logprobs, entropies = budget.fit(work, lengths)
                    if config.top_entropy_quantile < 1:
                        keep = high_entropy(entropies, rollout, config.top_entropy_quantile)
                        rollout = replace(rollout, keep=keep)
                    if config.steps_per_generation > 1 or config.kl_in_reward:
                        rollout = replace(rollout, old_logprobs=old_logprobs)
                if config.kl_in_reward:
                    rollout = with_kl_in_reward(rollout, state["beta"], config)

                # 3. Update: micro-batches, whose gradients add up, and one optimizer step for each part of the rollout;
                # all that num_iterations times.
                with meter.phase("update"):
                    learning_rate = scheduler.get_last_lr()[0]
                    tokens = TokenMeter(rollout, policy.device)
                    controls = {name: state[name] for name in first_coefficients(config)}
                    skipped, in_a_row, cause = 0, state["nonfinite_steps"], ""
                    for _ in range(config.num_iterations):
                        done = []
                        for part in rollout.parts(config.steps_per_generation):
                            coefficients = coefficients_of(controls, config)
                            work = partial(backward, policy, part, tokens, coefficients, scaler, config)
                            loss, logprobs = budget.fit(work, kept_lengths(part, config))
                            scaler.unscale_(optimizer)
                            grad_norm = clip_gradients(parameters, config.max_grad_norm, budget.note)
                            loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # the host waits for both here
                            done.append((loss, logprobs))
                            interruption.hold()  # from the first change of a weight until the step is whole
                            if math.isfinite(loss) and math.isfinite(grad_norm):
                                optimizer_step(optimizer, scaler, budget.note)
                                in_a_row = 0
                            else:
                                overflows = loss_scale_overflows(scaler, loss)
                                skipped, in_a_row = skipped + 1, in_a_row + (not overflows)
                                cause = why_not_finite(part, logprobs, loss, overflows, config)
                                if cause not in told:
                                    told.add(cause)
                                    progress.say(f"step {step}: {cause}; no weight is changed (see skipped_steps)")
                            scaler.update()
                            optimizer.zero_grad(set_to_none=False)
                            if config.use_adaptive_entropy:
                                controls = after_entropy(controls, tokens.mean("entropy", part), config)
                        if rollout.old_logprobs is None:  # those of the first pass, before any weight moved
                            rollout = replace(rollout, old_logprobs=torch.cat([logprobs for _, logprobs in done]))
                    loss = sum(loss for loss, _ in done) / len(done)
                    if skipped < config.num_iterations * config.steps_per_generation:
                        scheduler.step()
                    weights_norm = total_norm([parameter.detach() for parameter in parameters], budget.note)
                if not weights_norm.isfinite():
                    raise NotFiniteError(
                        f"step {step} moved the adapter's weights out of fp32's range (likely cause: "
                        f"learning_rate={config.learning_rate}, weight_decay={config.weight_decay} or "
                        f"adam_epsilon={config.adam_epsilon})"
                    )
                measured = {**rollout.metrics, **tokens.metrics()}
                state = {
                    "step": step,
                    "num_tokens": state["num_tokens"] + collected.tokens,
                    "nonfinite_steps": in_a_row,
                    **after_kl(controls, measured.get("kl"), len(rollout.completions), config),
                }
                stream = collected.stream
                if config.sync_ref_model and step % config.ref_model_sync_steps == 0:
                    policy.sync_reference(config.ref_model_mixup_alpha)

                # 4. Report.
                metrics = {
                    **measured,
                    "step": step,
                    "epoch": stream.position / len(prompts),
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "skipped_steps": skipped,
                    "learning_rate": learning_rate,
                    "num_tokens": state["num_tokens"],
                    **coefficient_metrics(state, config),
                    **budget.metrics(),
                    **meter.metrics,
                    **meter.rates(tokens_by_phase(collected, rollout, config)),
                    "step_time": time.perf_counter() - started,
                }
                log.write(metrics)
                randomness = current_randomness()
                interruption.release()
                progress.step(metrics, rollout)
                if config.log_completions:
                    write_completions(output_dir, step, rollout.table)
                if config.eval_steps and step % config.eval_steps == 0:
                    evaluate_now()
                for callback in callbacks:
                    callback(step, metrics, policy)
                randomness = current_randomness()
                if step == total_steps or step % config.save_steps == 0:
                    save(randomness)
                if in_a_row > config.max_nonfinite_steps:
                    raise NotFiniteError(
                        f"optimizer steps in a row that changed no weight: {in_a_row}, where max_nonfinite_steps is "
                        f"{config.max_nonfinite_steps}; in step {step} {cause}; lower learning_rate, or mend that cause"
                    )
            evaluate_now()
            line = log.evaluation(total_steps) or {}
            compared = [f"{name}/difference" for name in shown if f"{name}/difference" in line]
            if compared:
                progress.say(f"difference (after - before, 95 % intervals): {as_line(line, compared, '+.3f')}")
        except BaseException as error:
            if state["step"] and not interruption.holding:
                try:
                    progress.say(f"stopped; {save(randomness)} has everything up to step {state['step']}")
                except NotFiniteError as unfit:
                    progress.say(f"stopped; {unfit}")
            if isinstance(error, NotFiniteError):
                good = checkpoints.checkpoints(output_dir) or ([resume] if resume else [])
                where = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
                raise NotFiniteError(f"{error}; {where}") from error
            raise
        skipped = sum(line.get("skipped_steps", 0) for line in log.lines())
        if skipped:
            asked = state["step"] * config.num_iterations * config.steps_per_generation
            search = ", as while fp16 looks for its loss scale" if config.fp16 else ""
            progress.say(
                f"{skipped} of {asked} optimizer steps changed no weight: loss or gradient was not finite{search}"
            )
    if config.load_best_model_at_end:
        best.load(policy)
    write_folder(output_dir / "adapter", policy.save)
    lines = log.lines()
    return TrainResult(
        history=[line for line in lines if "loss" in line],
        eval_history=[line for line in lines if "eval_reward" in line],
        output_dir=str(output_dir),
        policy=policy,
    )


def tokens_by_phase(collected: Collected, rollout: Rollout, config: GRPOConfig) -> dict[str, int]:
    """What a phase had to do: a rollout its new tokens, the others what they compute, completions with prompts."""
    counted = sum(n for n, counts in zip(rollout.lengths, rollout.completion_mask, strict=True) if counts)
    return {
        "rollout": collected.new_tokens, "reference": counted if config.beta else 0, "old": counted,
        "update": config.num_iterations * sum(kept_lengths(rollout, config)),
    }  # fmt: skip
