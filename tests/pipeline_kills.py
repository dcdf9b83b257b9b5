"""Kill a pipeline in each of its phases and between them, go on, and compare with one that nothing disturbed.

    python tests/pipeline_kills.py             # one pipeline, killed at each of POINTS in turn
    python tests/pipeline_kills.py --short     # one of the two first phases, killed in the second
    python tests/pipeline_kills.py --kills 50  # fifty more, each killed up to three times at random

kills.py has the how: each run is a process of its own, and what is left is compared byte for byte.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import kills
from kills import Strike, draw, faults_in_turn, start

from lowmem_grpo import Phase, run_pipeline
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL

TRAIN, EVAL = task.splits()
SHORT = {"max_completion_length": 8}
STEPS = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-3}
REWARD = "lowmem_grpo.demo.task.answer_reward"
PHASES = [
    Phase("cold-start", "sft", dataset="cold.jsonl", examples_per_step=4, **STEPS),
    Phase(
        "rl", "grpo", dataset="sums.jsonl", reward_funcs=[REWARD, "lowmem_grpo.demo.task.tag_format_reward"],
        prompts_per_step=2, num_generations=2, beta=0.02, **SHORT, **STEPS,
    ),
    Phase("sampling", "sample", dataset="sums.jsonl", reward_funcs=REWARD, num_generations=2, prompts_per_step=3, **SHORT),
    Phase("selection", "select", dataset="sampling", per_prompt=1, finish=["eos", "length"]),
    Phase("again", "sft", from_="base", dataset=["selection", "cold.jsonl"], examples_per_step=4, **STEPS),
    Phase("taste", "reward", dataset="pairs.jsonl", pairs_per_step=2, **STEPS),
    Phase("last", "grpo", dataset="sums.jsonl", reward_funcs="taste", prompts_per_step=2, num_generations=2, beta=0.02,
          **SHORT, **STEPS),
]  # fmt: skip
# Each is where the process is killed that goes on from the one before: in a second step, between two phases, ...
POINTS = [
    Strike(signal.SIGKILL, "run/run.py Run.finish", "start", 2),  # of the cold start
    Strike(signal.SIGKILL, "pipeline/record.py write_record", "start", 1),  # after it
    Strike(signal.SIGKILL, "update/optimizer.py Learner.step", "end", 2),  # of rl
    Strike(signal.SIGKILL, "pipeline/sampled.py SampledFile.append", "end", 1),
    Strike(signal.SIGKILL, "pipeline/select.py write_rows", "end", 1),
    Strike(signal.SIGKILL, "pipeline/table.py write_table", "start", 3),  # within what is done, and after again
    Strike(signal.SIGKILL, "run/run.py Run.finish", "start", 2),  # of taste
    Strike(signal.SIGKILL, "update/optimizer.py Learner.step", "end", 2),  # of the last
]
# In the second step of rl, after the two of the cold start.
IN_SHORT = [Strike(signal.SIGKILL, "update/optimizer.py Learner.step", "end", 4)]


def run(folder: Path, settings: dict[str, Any]) -> int:
    """Run the pipeline in a folder, with settings of run_pipeline(); returns the exit status."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    random.seed(0)
    evaluation = {"dataset": "held.jsonl", "reward_funcs": REWARD, **SHORT}
    try:
        run_pipeline(
            str(MODEL), PHASES, "out", common={"use_cpu": True, "lora_r": 4}, **{"evaluation": evaluation, **settings}
        )
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def with_data(folder: Path) -> Path:
    """Make a folder with the pipeline's data."""
    folder.mkdir()
    cold = [
        {**row, "completion": [{"role": "assistant", "content": task.worked(problem)}]}
        for row, problem in zip(task.rows(TRAIN[:8]), TRAIN, strict=False)
    ]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": [{"role": "assistant", "content": "no"}]}
        for row in cold
    ]
    files = {"cold": cold, "pairs": pairs, "sums": task.rows(TRAIN[8:14]), "held": task.rows(EVAL[:3])}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="pipelines that are killed at random, besides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="the first two phases alone, without evaluations")
    options = parser.parse_args(arguments)
    settings, points = ({"until": "rl", "evaluation": None}, IN_SHORT) if options.short else ({}, POINTS)
    top = Path(tempfile.mkdtemp(prefix="pipeline-kills-"))
    whole = with_data(top / "whole")
    ended = start(whole, settings, count=options.kills > 0, run=run)
    assert ended.status == 0, (whole / "output.txt").read_text(encoding="utf-8")
    bad = 0
    for number in range(options.kills + 1):
        dice = random.Random(f"{options.seed} {number}")
        strikes = points if number == 0 else [
            draw(dice, signal.SIGKILL, ended.cpu_s / 2, ended.counts) for _ in range(dice.choice([1, 1, 2, 3]))
        ]  # fmt: skip
        found = faults_in_turn(whole, with_data(top / f"{number}"), settings, strikes, run)
        print(f"{number}: {'equal' if not found else '; '.join(found)}", flush=True)
        bad += bool(found)
        if not found:
            shutil.rmtree(top / f"{number}")
    print(f"{options.kills + 1 - bad} of {options.kills + 1} killed pipelines are equal to one that was not")
    if not bad:
        shutil.rmtree(top)
    return bad > 0


def both_in_short(said: Path) -> None:
    """Have kills.py and this one strike in short, and write what they print."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(kills.main(["--short"]) or main(["--short"]))


if __name__ == "__main__":
    sys.exit(main())
