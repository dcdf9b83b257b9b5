"""Compare what two commits make of the same runs, bit for bit: metrics, the tensors of checkpoints, the adapter.

    python tests/same_run.py BEFORE [AFTER]

AFTER is by default the working tree. Each commit is checked out into a folder of its own, and each run is a process of
its own. Runs are named in RUNS; times, memory and speeds are left out of the comparison, as what no two runs share.
Exit status 1 where anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
# Of the demo's recipe, the settings that a run changes. Together they take every branch of the loop that a CPU has.
EVERY_STEP = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}
RUNS = {
    "the demo": {"save_steps": 20},
    "kl in the reward, replay": dict(
        **EVERY_STEP, kl_in_reward=True, replay_buffer_size=8, dynamic_sampling_rounds=2, curriculum_skip=0.5,
        kl_target=0.01, temperature=0.9, top_p=0.9, repetition_penalty=1.05,
    ),
    "several optimizer steps": dict(
        **EVERY_STEP, steps_per_generation=2, num_iterations=2, use_adaptive_entropy=True, entropy_target=0.5,
        top_entropy_quantile=0.5, off_policy_mask_threshold=0.5, sync_ref_model=True, ref_model_sync_steps=2,
        lora_dropout=0.1, gradient_checkpointing=True,
    ),
    "padded rows in fp32": dict(
        **EVERY_STEP, padding_free=False, bf16=False, mask_truncated_completions=True, num_generations_eval=2,
        importance_sampling_mode="token_truncate", importance_sampling_level="sequence", optim="adamw_8bit",
        load_best_model_at_end=True, lr_scheduler_type="cosine", warmup_steps=2, log_completions=True,
    ),
    **{
        f"loss_type {name}": dict(
            max_steps=2, loss_type=name, num_iterations=2, **({"epsilon_high": 5.0} if name == "cispo" else {})
        )
        for name in ("dapo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo", "gmpo")
    },
    "dense, unshared, by batch": dict(
        max_steps=2, rollout_weights="dense", rollout_kv="int8", adv_estimator="reinforce_plus_plus", beta=0.0,
    ),
    "rloo": dict(max_steps=2, adv_estimator="rloo", stop_strings=["9"], kl_estimator="k2"),
    "several rewards apart": dict(
        max_steps=2, multi_objective_aggregation="normalize_then_sum", use_bias_correction_kl=False,
    ),
}  # fmt: skip
RESUMED = "kl in the reward, replay"  # is stopped after its third step, and goes on
PROGRAM = """
import dataclasses, json, sys
from lowmem_grpo import train
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL, recipe
settings, held_out = json.loads(sys.argv[1])
config = dataclasses.replace(recipe("out", 0), **settings)
rewards, (seen, unseen) = [task.answer_reward, task.tag_format_reward], task.splits()
train(str(MODEL), rewards, task.rows(seen), task.rows(unseen[:held_out]), config=config)
"""
UNLIKE = ("time/", "memory/", "tokens_per_s/", "step_time")


def run(tree: Path, folder: Path, settings: dict) -> None:
    """One run of a commit's code in a folder, which then has `out`."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    given = json.dumps([settings, 256 if settings.get("max_steps") is None else 8])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, given], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{folder.name}: {done.stderr}")


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(UNLIKE)} for line in lines]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a run has saved, by file and name."""
    found = {}
    for path in sorted((folder / "out").rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder / 'out')}: {name}": value for name, value in load_file(path).items()}
    return found


def differences(before: Path, after: Path) -> list[str]:
    """What two folders of the same run do not share, a line each."""
    found = []
    for number, (one, other) in enumerate(zip(metrics(before), metrics(after), strict=False)):
        for name in sorted({*one, *other}):
            if one.get(name) != other.get(name):
                found.append(f"metrics.jsonl, line {number}: {name} was {one.get(name)}, is {other.get(name)}")
    if len(metrics(before)) != len(metrics(after)):
        found.append(f"metrics.jsonl had {len(metrics(before))} lines, has {len(metrics(after))}")
    one, other = tensors(before), tensors(after)
    found += [f"{name} is in one of the two alone" for name in sorted({*one} ^ {*other})]
    # NaN is a reward that does not apply.
    return found + [
        name for name in sorted({*one} & {*other}) if not torch.equal(one[name].nan_to_num(), other[name].nan_to_num())
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="names of RUNS")
    options = parser.parse_args()
    status = 0
    with tempfile.TemporaryDirectory() as made:
        trees = {}
        for commit in filter(None, (options.before, options.after)):
            trees[commit] = Path(made) / f"tree-{len(trees)}"
            subprocess.run(["git", "worktree", "add", "-q", "--detach", trees[commit], commit], cwd=ROOT, check=True)
        try:
            for name in options.only:
                folders = [Path(made) / which / name for which in ("before", "after")]
                for folder, tree in zip(folders, (trees[options.before], trees.get(options.after, ROOT)), strict=True):
                    run(tree, folder, RUNS[name] | ({"max_steps": 3} if name == RESUMED else {}))
                    if name == RESUMED:
                        run(tree, folder, RUNS[name] | {"resume_from_checkpoint": True})
                found = differences(*folders)
                counts = f"{len(metrics(folders[0]))} lines, {len(tensors(folders[0]))} tensors"
                print(f"{name}: {f'{len(found)} differ' if found else f'the same ({counts})'}", flush=True)
                print("".join(f"    {line}\n" for line in found[:10]), end="", flush=True)
                status |= bool(found)
        finally:
            for tree in trees.values():
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
