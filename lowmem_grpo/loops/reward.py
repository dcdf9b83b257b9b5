"""train_reward_model(): a reward adapter from pairs, from top to bottom."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lowmem_grpo.checkup.pairs import doctor_of_pairs
from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.distributed import by_main, share
from lowmem_grpo.errors import NotSavedError
from lowmem_grpo.inputs.pairs import PairInputs, read_pair_inputs
from lowmem_grpo.model.score_head import RANGE, save_range
from lowmem_grpo.output.lock import releasing_locks
from lowmem_grpo.preview.pairs import show_pair
from lowmem_grpo.progress_bars import without_progress_bars
from lowmem_grpo.run.evaluations import accuracies_of
from lowmem_grpo.run.interruption import interruptible
from lowmem_grpo.run.ranks import across_ranks
from lowmem_grpo.run.room import refusal
from lowmem_grpo.run.run import Callback, Run, TrainResult
from lowmem_grpo.update.optimizer import Learner
from lowmem_grpo.update.pair_metrics import score_metrics
from lowmem_grpo.update.pairs import backward, scores_of_all, try_largest_update, why_not_finite

NUM_RANGED = 512  # pairs whose scores tell where an adapter's scores lie


@without_progress_bars
@releasing_locks()
@interruptible
@across_ranks
def train_reward_model(
    model: Any,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    config: RewardConfig | None = None,
    peft_config: Any = None,
    tokenizer: Any = None,
    callbacks: Callback | Sequence[Callback] = (),
) -> TrainResult:
    """Train LoRA adapters and a score head on a 4-bit model to score the better of two texts higher.

    train() takes output_dir/adapter as one of its reward_funcs, on the base that the policy has anyway.

    Args:
        model: hub id, model folder, 4-bit checkpoint, adapter folder to start from, or a loaded model, which is changed
            in place.
        train_dataset: hub id, JSONL, JSON, CSV or Parquet file, Dataset, or list of rows, with `chosen` and `rejected`,
            and optionally a `prompt` before both and a `margin` between their scores.
        eval_dataset: in any of these forms, a hub dataset's `test` split; accuracy and loss are measured on it before,
            after and every eval_steps.
        config: every setting; RewardConfig() by default.
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
    config = RewardConfig() if config is None else config
    inputs = read_pair_inputs(model, train_dataset, eval_dataset, config, peft_config, tokenizer, callbacks)
    show_pair(inputs)
    doctor = doctor_of_pairs(inputs)
    config, pairs, policy = inputs.config, inputs.pairs, inputs.load_policy()
    scaler = torch.amp.GradScaler(policy.device.type, enabled=config.fp16)
    learner = Learner(policy.parameters_of(policy.adapter).values(), config, scaler, inputs.total_steps)

    with Run(inputs, policy, learner, {"pairs": pairs}, doctor, accuracies_of(inputs, policy)) as run:
        if policy.device.type == "cuda" and not run.is_over:
            try_largest_update(policy, pairs.all, run.budget, config, learner.bytes_to_come())
        for step in run.steps():
            batch = pairs.take(config.pairs_per_step)
            lengths = [len(text) + 1 for pair in batch for text in pair.texts]  # with one to score the last by
            with step.phase("update"):
                mine = share([sum(map(len, pair.texts)) for pair in batch])
                work = partial(backward, policy, batch, mine, scaler, config)
                loss, scores = run.update(step, work, lengths, partial(why_not_finite, config))
            metrics = {"epoch": pairs.position / len(pairs.all), "loss": loss, **score_metrics(scores)}
            num_tokens = sum(lengths) - len(lengths)
            run.finish(step, metrics, num_tokens=num_tokens, work={"update": num_tokens})
        measure_range(run, inputs)
    return run.result()


def measure_range(run: Run, inputs: PairInputs) -> None:
    """Write mean and deviation of the training pairs' scores beside the adapter, for whoever normalizes by them.

    Raises:
        NotSavedError: the disk refuses.
    """
    first = inputs.pairs.all[:NUM_RANGED]
    scores = scores_of_all(run.policy, first, run.budget, inputs.config)
    try:
        by_main(save_range)(run.folder / "adapter", scores.mean().item(), scores.std().item())
    except OSError as error:
        raise NotSavedError(
            f"{run.folder / 'adapter' / RANGE} cannot be written ({refusal(error)}), by which normalize=True goes; the "
            "adapter is whole, and resume_from_checkpoint=True measures its scores again"
        ) from error
