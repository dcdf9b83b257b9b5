"""sft(): supervised fine-tuning, from top to bottom."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lowmem_grpo.checkup.examples import doctor_of_examples
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.distributed import share
from lowmem_grpo.inputs.examples import read_example_inputs
from lowmem_grpo.output.lock import releasing_locks
from lowmem_grpo.preview.examples import show_example
from lowmem_grpo.progress_bars import without_progress_bars
from lowmem_grpo.run.evaluations import losses_of
from lowmem_grpo.run.interruption import interruptible
from lowmem_grpo.run.ranks import across_ranks
from lowmem_grpo.run.run import Callback, Run, TrainResult
from lowmem_grpo.update.nll import backward, try_largest_update, why_not_finite
from lowmem_grpo.update.optimizer import Learner


@without_progress_bars
@releasing_locks()
@interruptible
@across_ranks
def sft(
    model: Any,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    config: SFTConfig | None = None,
    peft_config: Any = None,
    tokenizer: Any = None,
    callbacks: Callback | Sequence[Callback] = (),
) -> TrainResult:
    """Train LoRA adapters on a frozen 4-bit model to imitate examples.

    Args:
        model: hub id, model folder, 4-bit checkpoint, adapter folder to continue from, or a loaded model, which is
            changed in place.
        train_dataset: hub id, JSONL, JSON, CSV or Parquet file, Dataset, or list of rows: with `prompt` and
            `completion`, texts or lists of messages; or with `messages`, `conversations` or `text`. A column `weight`
            says how much each row counts. Or a list of datasets, which are one, or mixed by config.dataset_weights.
        eval_dataset: in any of these forms, a hub dataset's `test` split; its loss is measured before, after and every
            eval_steps.
        config: every setting; SFTConfig() by default.
        peft_config: a LoraConfig in place of the config's lora fields.
        tokenizer: in place of the one that comes with the model; loaded, or its hub id or folder.
        callbacks: one function or several, called with (step, metrics, policy) after every step, which a StopIteration
            of theirs makes the last one.

    Raises:
        InputError: bad input, in one sentence with the remedy, before any long work starts.
        NotFiniteError: what is computed is no longer finite; the sentence names the last good checkpoint.
        NotSavedError: the disk refused the last checkpoint or the adapter.
        UnhealthyRunError: doctor="stop", and something keeps the run from learning.
    """
    config = SFTConfig() if config is None else config
    inputs = read_example_inputs(model, train_dataset, eval_dataset, config, peft_config, tokenizer, callbacks)
    show_example(inputs)
    doctor = doctor_of_examples(inputs)
    config, examples, policy = inputs.config, inputs.examples, inputs.load_policy()
    scaler = torch.amp.GradScaler(policy.device.type, enabled=config.fp16)
    learner = Learner(policy.parameters_of(policy.adapter).values(), config, scaler, inputs.total_steps)

    with Run(inputs, policy, learner, {"examples": examples}, doctor, losses_of(inputs, policy)) as run:
        if policy.device.type == "cuda" and not run.is_over:
            try_largest_update(policy, examples.all, run.budget, config, learner.bytes_to_come())
        for step in run.steps():
            batch = examples.take(config.examples_per_step)
            lengths = [len(one.ids) for one in batch]
            with step.phase("update"):
                work = partial(backward, policy, batch, share(lengths), scaler, config)
                loss, means = run.update(step, work, lengths, partial(why_not_finite, config))
            num_tokens = sum(lengths)
            metrics = {
                "epoch": examples.position / len(examples.all), "loss": loss, "entropy": means.entropy.item(),
                "mean_token_accuracy": means.accuracy.item(),
            }  # fmt: skip
            run.finish(step, metrics, num_tokens=num_tokens, work={"update": num_tokens})
    return run.result()
