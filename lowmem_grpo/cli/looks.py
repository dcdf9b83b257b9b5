"""The commands that look at models and data: eval, data and plan."""

import json
import sys
from functools import partial
from typing import Any

from lowmem_grpo.cli.output import writing_output
from lowmem_grpo.cli.parser import Commands, Once, add_config_flags, add_inputs
from lowmem_grpo.cli.settings import INPUTS, OF_EVALUATION, PLANNED, count_of, read_settings
from lowmem_grpo.config.grpo import EVAL_FIELDS, GRPOConfig
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.config.sections import CALLED
from lowmem_grpo.errors import InputError
from lowmem_grpo.output.saved import as_json
from lowmem_grpo.paths import expanded
from lowmem_grpo.terminal import columns_of, show

EVAL_EXAMPLE = """\
example:
  lowmem-grpo eval --model gsm8k/adapter --dataset gsm8k --num_generations_eval 8 --max_completion_length 768
"""
DATA_EXAMPLE = """\
example:
  lowmem-grpo data --model Qwen/Qwen2.5-1.5B-Instruct --dataset rows.jsonl --reward_funcs accuracy_reward
"""
PLAN_EXAMPLE = """\
example:
  lowmem-grpo plan --model Qwen/Qwen2.5-7B-Instruct --vram_budget 8GB --max_completion_length 1024
  lowmem-grpo plan sft --model Qwen/Qwen2.5-7B --vram_budget 8GB --max_length 4096
  lowmem-grpo plan sample --model Qwen/Qwen2.5-7B-Instruct --vram_budget 8GB --prompts_per_step 32
"""


def add(commands: Commands) -> None:
    """Add eval, data and plan."""
    parser = commands.add(
        "eval", EVAL_EXAMPLE, help="evaluate a model or an adapter",
        description="Evaluate a model, or an adapter beside its base, on a hub dataset's test split, a file, or what a "
        "task holds out. A --config file may be that of training, of which learning's settings are not used.",
        usage="lowmem-grpo eval --model M --dataset D [--reward_funcs F [F ...]] [--num_generations_eval K] "
        "[--show N] [--json]",
    )  # fmt: skip
    parser.set_defaults(run=run_eval)
    of_eval = add_inputs(parser, "what to evaluate, on what, by what", OF_EVALUATION)
    of_eval.add_argument(
        "--show", action=Once, metavar="N", help="print N completions with their prompts and rewards (default 0)"
    )
    of_eval.add_argument("--json", action="store_true", help="print JSON")
    add_config_flags(parser, commands.every_setting, EVAL_FIELDS)

    parser = commands.add(
        "data", DATA_EXAMPLE, help="look at training data",
        description="Show prompts as the model gets them, their gold answers as rewards read them, and what each "
        "reward gives for the gold answer and for an empty completion. No weights are read, only the tokenizer.",
        usage="lowmem-grpo data --model M --dataset D [--reward_funcs F [F ...]] [--rows N] [options]",
    )  # fmt: skip
    parser.set_defaults(run=run_data)
    of_data = add_inputs(parser, "what to look at", OF_EVALUATION)
    of_data.add_argument("--rows", action=Once, metavar="N", help="show the first N prompts (default 3)")
    add_config_flags(parser, commands.every_setting)

    parser = commands.add(
        "plan", PLAN_EXAMPLE, help="predict what a run needs",
        description="Predict the peak memory of each phase from a model's configuration, on a GPU or with "
        "--use_cpu true on a CPU, and with --vram_budget choose settings that fit. No weights are downloaded, and no "
        "GPU is needed.",
        usage="lowmem-grpo plan [sft|reward|sample] --model M [--vram_budget 8GB] [--ranks N] [--json] [options]",
    )  # fmt: skip
    parser.set_defaults(run=partial(run_plan, commands.planned))
    parser.add_argument(
        "training", nargs="?", choices=tuple(PLANNED), default="train", help="what to plan (default train)"
    )
    # Of rewards, the reward adapters count.
    names = ("model", "reward_funcs") if commands.planned is GRPOConfig else ("model",)
    of_plan = add_inputs(parser, "what to plan", [one for one in INPUTS if one[0] in names])
    of_plan.add_argument("--json", action="store_true", help="print JSON, in bytes")
    of_plan.add_argument(
        "--ranks", action=Once, metavar="N", help="processes that torchrun starts, each on a GPU of its own (default 1)"
    )
    add_config_flags(parser, commands.every_setting, config=commands.planned)


def run_eval(given: dict[str, Any]) -> int:
    in_json, num_shown = given.pop("json", False), count_of(given, "show", "completions", 0)
    inputs, fields = read_settings(given, command="eval")
    config = GRPOConfig(**fields)
    model, dataset = inputs["model"], inputs["dataset"]
    rewards, called = inputs.get("reward_funcs"), {name: inputs.get(name) for name in CALLED}
    from lowmem_grpo.inputs.names import look_up_inputs

    named = {"model": model, "eval_dataset": dataset, "reward_funcs": rewards, **called}
    look_up_inputs(named, config, needs_rewards=True)
    from lowmem_grpo.evaluation.evaluate import evaluate
    from lowmem_grpo.evaluation.show import as_difference_table, as_table, examples, examples_as_text

    found = evaluate(model, rewards, dataset, config, **called)
    metrics, chosen = {who: one.metrics for who, one in found.items()}, examples(found, num_shown)
    if in_json:
        with writing_output():
            print(json.dumps(as_json({**metrics, "shown": chosen} if chosen else metrics), indent=1))
    else:
        width = columns_of(sys.stdout)
        with writing_output():
            if chosen:
                show(examples_as_text(chosen))
            print(as_table(metrics, width))
            if "adapter" in metrics:
                print(as_difference_table(metrics["adapter"], width))
    return 0


def run_data(given: dict[str, Any]) -> int:
    count = count_of(given, "rows", "prompts", 3)
    inputs, fields = read_settings(given, command="data")
    config = GRPOConfig(**fields)
    from lowmem_grpo.inputs.names import look_up_inputs

    look_up_inputs(inputs, config)
    from lowmem_grpo.inputs.prompts import read_data_inputs
    from lowmem_grpo.preview.prompts import as_text, faults, make_previews
    from lowmem_grpo.progress_bars import no_progress_bars

    with no_progress_bars():
        called: dict[str, Any] = {name: inputs.get(name) for name in CALLED}
        found = read_data_inputs(inputs["model"], inputs.get("reward_funcs"), inputs["dataset"], config, **called)
        previews = make_previews(found, count)
    with writing_output():
        told = [as_text(found, previews), *found.notes, *(fault.text for fault in faults(found.rewards, previews))]
        show("\n".join(told))
    return 0


def run_plan(planned: type, given: dict[str, Any]) -> int:
    """Print the plan of a training, by the type of its configuration; exit status 0 where everything fits, else 1."""
    in_json, training, ranks = given.pop("json", False), given.pop("training"), count_of(given, "ranks", "processes", 1)
    if PLANNED[training] is not planned:
        raise InputError(f"what is planned comes first; write `lowmem-grpo plan {training}` and then the settings")
    inputs, fields = read_settings(given, ("model",), "plan", planned)  # of a file for training, too
    model, config = expanded(inputs["model"]), planned(**fields)
    if not 1 <= ranks <= config.prompts_per_step or (ranks > 1 and planned is SampleConfig):
        raise InputError(
            f"--ranks {ranks} is none: a training has 1 to {config.prompts_per_step}, as many as a step has things to "
            "share, and sampling into a file has one process"
        )
    if isinstance(config, SampleConfig):
        if config.base_url is not None:
            raise InputError("a model behind base_url takes no memory here, so that there is nothing to plan")
        config = config.for_sampler()
    from lowmem_grpo.lookup import look_up_model

    look_up_model(model, config.model_init_kwargs)
    from lowmem_grpo.inputs.rewards import worn_by
    from lowmem_grpo.model.find import adapter_config, find_model, read_config
    from lowmem_grpo.model.load import run_device
    from lowmem_grpo.model.teacher import find_teacher
    from lowmem_grpo.planner import plan as planner
    from lowmem_grpo.progress_bars import no_progress_bars
    from lowmem_grpo.rewards.names import reward_adapters

    if config.use_cpu:
        run_device(config)  # refuses what is about a GPU
    with no_progress_bars():
        find_model(model, config, needs_weights=False)
        base = read_config(model, config)
        worn = [] if planned is not GRPOConfig else worn_by(base, reward_adapters(inputs.get("reward_funcs") or []))
        teacher = find_teacher(model, config, needs_weights=False) if isinstance(config, GRPOConfig) else None
        rewards = [one.config for one in worn]
        found = planner.plan(base, config, adapter_config(model, config), rewards=rewards, teacher=teacher, ranks=ranks)
    with writing_output():
        if in_json:
            print(json.dumps(planner.as_dict(found), indent=1))
        else:
            show(planner.as_text(found))
    return 0 if found.remedy is None else 1
