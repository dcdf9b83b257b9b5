"""sample(): completions of prompts into a file, with their rewards: the sampling of rejection sampling."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.data.prompts import SETTINGS, Prompt
from lowmem_grpo.errors import NotSavedError
from lowmem_grpo.generate import as_text
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.identity import adapter_weights_of, weights_of
from lowmem_grpo.inputs import Inputs, read_sampling_inputs, refuse_other_config
from lowmem_grpo.model.adapter_folder import is_adapter
from lowmem_grpo.objective.advantages import weighted_rewards
from lowmem_grpo.output.lock import releasing_locks
from lowmem_grpo.pipeline.sampled import Row, SampledFile, read_sampled
from lowmem_grpo.planner.plan import as_text as as_text_of_plan
from lowmem_grpo.planner.plan import limit_memory
from lowmem_grpo.progress_bars import without_progress_bars
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.run.interruption import interruptible
from lowmem_grpo.run.meter import Meter
from lowmem_grpo.run.progress import Progress

LARGEST_SEED = 2**53  # which every reader of JSON keeps


@dataclass(frozen=True)
class SampleResult:
    """The result of sample()."""

    output: str  # the file
    num_prompts: int
    num_completions: int
    metrics: dict[str, float | None]  # of the whole file: reward, rewards/{name}/mean, completions/mean_length, ...


@interruptible
@releasing_locks()
@without_progress_bars
def sample(
    model: Any, dataset: Any = None, reward_funcs: Any = None, config: SampleConfig | None = None, tokenizer: Any = None
) -> SampleResult:
    """Sample completions of every prompt into config.output, a JSONL line each, with their rewards.

    Called again after a stop, it goes on with the prompts that have no whole group yet, and the file becomes the one
    that an undisturbed run writes. pipeline/sampled.py says what a line has.

    Args:
        model: hub id, model folder, 4-bit checkpoint, adapter folder, or a loaded model, which is changed in place.
        dataset: in any form that train() takes, with prompts; or a task's name, which brings its verifier.
        reward_funcs: as train() takes them; without any and without a task, nothing is scored.
        config: every setting; SampleConfig() by default.
        tokenizer: in place of the one that comes with the model; loaded, or its hub id or folder.

    Raises:
        InputError: bad input, or a file that is of another model, other data or other settings, in one sentence.
        NotFiniteError: the model's logits are not finite.
        NotSavedError: the disk refused the file.
    """
    config = SampleConfig() if config is None else config
    refuse_other_config(config, SampleConfig)
    inputs = read_sampling_inputs(model, reward_funcs, dataset, config.for_sampler(), tokenizer)
    file = SampledFile(config.output, config.num_generations)
    notes = inputs.notes + file.prepare(config, inputs.identity)
    num_batches = math.ceil(len(inputs.prompts) / config.prompts_per_step)
    with Progress(num_batches) as progress:
        for note in [*([] if inputs.plan is None else [as_text_of_plan(inputs.plan)]), *notes]:
            progress.say(note)
        if file.num_groups < len(inputs.prompts):
            with limit_memory(inputs.plan, inputs.device):
                sample_the_rest(inputs, file, config, progress)
    return summary(file)


def sample_the_rest(inputs: Inputs, file: SampledFile, config: SampleConfig, progress: Progress) -> None:
    """Sample and score the prompts that the file has no whole group of, prompts_per_step at a time."""
    policy, prompts = inputs.load_policy(), inputs.prompts
    identity = {**inputs.identity, "weights": weights_of(policy), "ends": {"ids": policy.eos_token_ids}}
    if is_adapter(inputs.model) or not isinstance(inputs.model, str):
        identity["adapter weights"] = {"adapter": adapter_weights_of(policy)}
    file.refuse_another(identity)
    sampler = Sampler(policy, inputs.config)
    if file.sampler is not None:
        sampler.load(file.sampler)
    name = inputs.model if isinstance(inputs.model, str) else str(policy.base.name_or_path)
    size = config.prompts_per_step
    # Batches are those of an undisturbed run: how many rows share a matrix product decides how it is rounded.
    for start in range(file.num_groups // size * size, len(prompts), size):
        began, meter = time.perf_counter(), Meter(policy.device)
        batch = range(start, min(start + size, len(prompts)))
        seeds = [seed_of(config.seed, index) for index in batch]
        asked = [prompts[index] for index in batch]
        with meter.phase("rollout"):
            drawn = sampler.complete(asked, config.num_generations, seeds=seeds).completions
        with meter.phase("rewards"):
            rows = rows_of(asked, drawn, sampler, inputs.rewards, inputs.config, batch.start // size + 1)
        groups = [rows[place : place + config.num_generations] for place in range(0, len(rows), config.num_generations)]
        for index, seed, group in zip(batch, seeds, groups, strict=True):
            for row in group:
                row.update(prompt_index=index, seed=seed, model=name)
        try:
            file.begin(dataclasses.asdict(config), identity, sampler.state())
            file.append(groups[file.num_groups - start :])
        except OSError as error:
            raise NotSavedError(
                f"{file.path} cannot be written ({error.strerror}) after {file.num_groups} prompts; make room and run "
                "the same again, which goes on there"
            ) from error
        metrics = {name: math.nan if value is None else value for name, value in metrics_of(rows).items()}
        progress.step({**metrics, **meter.metrics, "step": start // size + 1, "step_time": time.perf_counter() - began})


def seed_of(seed: int, prompt_index: int) -> int:
    """The seed of a prompt's group, by the run's seed and the prompt's index alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_index}".encode()).digest()[:8]) % LARGEST_SEED


def rows_of(
    prompts: list[Prompt], drawn: list[Completion], sampler: Sampler, rewards: RewardRunner, config: GRPOConfig,
    step: int,
) -> list[Row]:  # fmt: skip
    """A row a completion, group after group, with its rewards; without what is the group's own."""
    num_generations = len(drawn) // len(prompts)
    asked = [prompt for prompt in prompts for _ in range(num_generations)]
    texts = [as_text(sampler.policy, prompt, one) for prompt, one in zip(asked, drawn, strict=True)]
    scores: list[dict[str, float | None]] = [{} for _ in drawn]
    sums: list[float | None] = [None] * len(drawn)
    if rewards.functions:
        columns = {key: [prompt.columns[key] for prompt in asked] for key in asked[0].columns}
        ids = [p.ids for p in asked]
        scored = rewards([p.text for p in asked], texts, [one.ids for one in drawn], columns, step, ids).rewards
        scores = [dict(zip(rewards.names, map(_or_none, row), strict=True)) for row in scored.tolist()]
        sums = [_or_none(value) for value in weighted_rewards(scored, config.reward_weights).tolist()]
    return [
        {
            "prompt": prompt.text,
            "completion": text,
            "columns": {key: value for key, value in prompt.columns.items() if key not in SETTINGS},
            **{key: prompt.columns[key] for key in SETTINGS if prompt.columns.get(key)},
            "rewards": of_functions,
            "reward": reward,
            "finish": one.finish,
            "tokens": len(one.ids),
            "logprob_mean": None if one.logprobs is None else _or_none(round(one.logprobs.mean().item(), 6)),
        }
        for prompt, text, one, of_functions, reward in zip(asked, texts, drawn, scores, sums, strict=True)
    ]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def summary(file: SampledFile) -> SampleResult:
    """The numbers of a whole file."""
    rows = read_sampled(file.path)
    return SampleResult(str(file.path), file.num_groups, len(rows), metrics_of(rows))


def metrics_of(rows: Sequence[Row]) -> dict[str, float | None]:
    """Means of rewards and lengths, under training's names; None for the mean of nothing."""
    names = dict.fromkeys(name for row in rows for name in row["rewards"])
    return {
        "reward": _mean([row["reward"] for row in rows]),
        **{f"rewards/{name}/mean": _mean([row["rewards"].get(name) for row in rows]) for name in names},
        "completions/mean_length": _mean([row["tokens"] for row in rows]),
        "completions/clipped_ratio": _mean([float(row["finish"] == "length") for row in rows]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
