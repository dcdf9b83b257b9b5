"""sample(): completions of prompts into a file, with their rewards: the sampling of rejection sampling."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.data.chats import SETTINGS
from lowmem_grpo.distributed import refuse_several
from lowmem_grpo.errors import NotSavedError, counted
from lowmem_grpo.inputs.prompts import Inputs, read_endpoint_inputs, read_sampling_inputs
from lowmem_grpo.inputs.training import refuse_other_config
from lowmem_grpo.objective.advantages import weighted_rewards
from lowmem_grpo.output.lock import releasing_locks
from lowmem_grpo.output.saved import as_json
from lowmem_grpo.pipeline.sampled import Row, SampledFile, read_sampled
from lowmem_grpo.pipeline.sources import Batch, FromEndpoint, FromModel, endpoint_of, num_steps
from lowmem_grpo.planner.plan import as_text as as_text_of_plan
from lowmem_grpo.planner.plan import limit_memory
from lowmem_grpo.progress_bars import without_progress_bars
from lowmem_grpo.run.interruption import interruptible
from lowmem_grpo.run.meter import Meter
from lowmem_grpo.run.progress import Progress


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
    that an undisturbed run writes. pipeline/sampled.py says what a line has. With config.base_url a server samples, and
    what is asked again comes out otherwise.

    Args:
        model: hub id, model folder, 4-bit checkpoint, adapter folder, or a loaded model, which is changed in place;
            with config.base_url, the name of a model there.
        dataset: in any form that train() takes, with prompts; or a task, which brings its verifier.
        reward_funcs: as train() takes them; without any and without a task, nothing is scored.
        config: every setting; SampleConfig() by default.
        tokenizer: in place of the one that comes with the model; loaded, or its hub id or folder.

    Raises:
        InputError: bad input, or a file that is of another model, other data or other settings, in one sentence.
        NotFiniteError: the model's logits are not finite.
        NotSavedError: the disk refused the file.
        UnansweredError: an endpoint left prompts without completions; all others are in the file.
    """
    refuse_several("sample()")
    config = SampleConfig() if config is None else config
    refuse_other_config(config, SampleConfig)
    inputs = read_inputs(model, dataset, reward_funcs, config, tokenizer)
    file = SampledFile(config.output, config.num_generations, in_order=config.base_url is None)
    notes = inputs.notes + file.prepare(config, inputs.identity)
    with Progress(num_steps(inputs, config)) as progress:
        for note in [*([] if inputs.plan is None else [as_text_of_plan(inputs.plan)]), *notes]:
            progress.say(note)
        if file.num_groups < len(inputs.prompts):
            with limit_memory(inputs.plan, inputs.device):
                sample_the_rest(inputs, file, config, progress)
    return summary(file)


def read_inputs(model: Any, dataset: Any, reward_funcs: Any, config: SampleConfig, tokenizer: Any = None) -> Inputs:
    """The inputs of sample(), which documents them, checked before any weights are read and any request is sent."""
    if config.base_url is None:
        return read_sampling_inputs(model, reward_funcs, dataset, config.for_sampler(), tokenizer)
    inputs = read_endpoint_inputs(model, reward_funcs, dataset, config.for_sampler(), tokenizer)
    endpoint_of(inputs, config)  # which refuses an address or a key
    return inputs


def sample_the_rest(inputs: Inputs, file: SampledFile, config: SampleConfig, progress: Progress) -> None:
    """Sample and score the prompts that the file has no whole group of, and write each batch of them."""
    source = (FromModel if config.base_url is None else FromEndpoint)(inputs, file, config)
    with contextlib.closing(source.batches()) as batches:
        while True:
            began, meter = time.perf_counter(), Meter(source.device)
            with meter.phase("rollout"):
                batch = next(batches, None)
            if batch is None:
                return
            with meter.phase("rewards"):
                groups = rows_of(batch, inputs, source.name)
            try:
                file.begin(dataclasses.asdict(config), source.identity, source.state())
                done = set(file.done)
                file.append([group for group in groups if group[0]["prompt_index"] not in done])
            except OSError as error:
                raise NotSavedError(
                    f"{file.path} cannot be written ({error.strerror}) after {counted(file.num_groups, 'prompt')}; "
                    "make room and run the same again, which goes on there"
                ) from error
            means = metrics_of([row for group in groups for row in group])
            metrics = {name: math.nan if value is None else value for name, value in means.items()}
            took = time.perf_counter() - began
            progress.step({**metrics, **meter.metrics, "step": batch.step, "step_time": took})


def rows_of(batch: Batch, inputs: Inputs, model: str) -> list[list[Row]]:
    """The rows of a batch's groups, with their rewards."""
    prompts = [inputs.prompts[group.prompt_index] for group in batch.groups for _ in group.completions]
    drawn = [one for group in batch.groups for one in group.completions]
    rewards = inputs.rewards
    scores: list[dict[str, float | None]] = [{} for _ in drawn]
    sums: list[float | None] = [None] * len(drawn)
    if rewards.functions:
        columns = {key: [prompt.columns[key] for prompt in prompts] for key in prompts[0].columns}
        texts, ids = [one.text for one in drawn], [one.ids for one in drawn]
        asked = [prompt.text for prompt in prompts]
        scored = rewards(asked, texts, ids, columns, batch.step, [prompt.ids for prompt in prompts]).rewards
        scores = [dict(zip(rewards.names, row, strict=True)) for row in as_json(scored.tolist())]
        sums = as_json(weighted_rewards(scored, inputs.config.reward_weights).tolist())
    rows = iter(
        {
            "prompt": as_json(prompt.text),
            "completion": one.text,
            "columns": {key: as_json(value) for key, value in prompt.columns.items() if key not in SETTINGS},
            **{key: as_json(prompt.columns[key]) for key in SETTINGS if prompt.columns.get(key)},
            "rewards": of_functions,
            "reward": reward,
            "finish": one.finish,
            "tokens": one.num_tokens,
            "logprob_mean": None if one.logprob_mean is None else as_json(round(one.logprob_mean, 6)),
        }
        for prompt, one, of_functions, reward in zip(prompts, drawn, scores, sums, strict=True)
    )
    return [
        [
            {**next(rows), "prompt_index": group.prompt_index, "seed": group.seed, "model": model}
            for _ in group.completions
        ]
        for group in batch.groups
    ]


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
