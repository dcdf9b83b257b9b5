"""The commands that train: train, sft and reward."""

from pathlib import Path
from typing import Any

from lowmem_grpo.cli.output import tell
from lowmem_grpo.cli.parser import Commands, add_config_flags, add_inputs
from lowmem_grpo.cli.settings import OF_EXAMPLES, OF_PAIRS, TRAININGS, read_settings
from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.config.sections import CALLED
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.errors import InputError

TRAIN_EXAMPLE = """\
example:
  lowmem-grpo train --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k \
--reward_funcs accuracy_reward --max_completion_length 768 --output_dir gsm8k
"""
SFT_EXAMPLE = """\
example:
  lowmem-grpo sft --model Qwen/Qwen2.5-1.5B --dataset cold.jsonl --max_length 4096 --output_dir cold
"""
REWARD_EXAMPLE = """\
example:
  lowmem-grpo reward --model Qwen/Qwen2.5-1.5B-Instruct --dataset pairs.jsonl --output_dir rm
  lowmem-grpo train --model Qwen/Qwen2.5-1.5B-Instruct --dataset prompts.jsonl --reward_funcs rm/adapter --beta 0.02
"""


def add(commands: Commands) -> None:
    """Add train, sft and reward."""
    parser = commands.add(
        "train", TRAIN_EXAMPLE, help="train a model", description="Train LoRA adapters on a 4-bit model with GRPO.",
        usage="lowmem-grpo train --model M --dataset D [--reward_funcs F [F ...]] [options]",
    )  # fmt: skip
    parser.set_defaults(run=run_train)
    add_inputs(parser, "what to train, on what, for what")
    add_config_flags(parser, commands.every_setting)

    parser = commands.add(
        "sft", SFT_EXAMPLE, help="train a model to imitate examples, as the cold start of one",
        description="Train LoRA adapters on a 4-bit model by supervised fine-tuning.",
        usage="lowmem-grpo sft --model M --dataset D [options]",
    )  # fmt: skip
    parser.set_defaults(run=run_sft)
    add_inputs(parser, "what to train, on what", OF_EXAMPLES)
    add_config_flags(parser, commands.every_setting, config=SFTConfig)

    parser = commands.add(
        "reward", REWARD_EXAMPLE, help="train a reward model from pairs of a better and a worse text",
        description="Train LoRA adapters and a score head on a 4-bit model to score the better text of a pair higher. "
        "`lowmem-grpo train` takes the adapter as a reward, on the base that it trains anyway.",
        usage="lowmem-grpo reward --model M --dataset D [options]",
    )  # fmt: skip
    parser.set_defaults(run=run_reward)
    add_inputs(parser, "what to train, on what", OF_PAIRS)
    add_config_flags(parser, commands.every_setting, config=RewardConfig)


def run_train(given: dict[str, Any]) -> int:
    inputs, config = _read(given, "train")
    from lowmem_grpo.loops.grpo import train

    model, rewards, dataset, held_out = (inputs.get(n) for n in ("model", "reward_funcs", "dataset", "eval_dataset"))
    called: dict[str, Any] = {name: inputs.get(name) for name in CALLED}
    return _told(train(model, rewards, dataset, held_out, config, **called))


def run_sft(given: dict[str, Any]) -> int:
    inputs, config = _read(given, "sft", "sft imitates examples and has no rewards")
    from lowmem_grpo.loops.sft import sft

    return _told(sft(inputs["model"], inputs["dataset"], inputs.get("eval_dataset"), config))


def run_reward(given: dict[str, Any]) -> int:
    inputs, config = _read(given, "reward", "reward learns from pairs, and makes one")
    from lowmem_grpo.loops.reward import train_reward_model

    return _told(train_reward_model(inputs["model"], inputs["dataset"], inputs.get("eval_dataset"), config))


def _read(given: dict[str, Any], command: str, without_rewards: str = "") -> tuple[dict[str, Any], Any]:
    """The inputs and the configuration of a training, looked up; `without_rewards` says why it takes none."""
    inputs, fields = read_settings(given, command=command, config=TRAININGS[command])
    if without_rewards and "reward_funcs" in inputs:
        raise InputError(f"reward_funcs is for `lowmem-grpo train`; {without_rewards}")
    for name in [one for one in CALLED if without_rewards and one in inputs]:
        raise InputError(f"{name} is for `lowmem-grpo train`, where the model writes; leave it out")
    config = TRAININGS[command](**fields)
    from lowmem_grpo.inputs.names import look_up_training

    look_up_training(inputs, config, needs_rewards=not without_rewards)
    return inputs, config


def _told(result: Any) -> int:
    """Say where the adapter of a TrainResult is; the exit status."""
    tell(f"adapter: {Path(result.output_dir) / 'adapter'}")
    return 0
