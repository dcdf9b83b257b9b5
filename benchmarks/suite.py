"""`lowmem-grpo bench`: every benchmark that this machine can run, one after the other, into one JSON file and pictures.

    lowmem-grpo bench [NAME ...] [--quick] [--output_dir DIR]      the same as python -m lowmem_grpo.benchmarks

A part that the file has already is not run again, so that a suite which was stopped goes on. Peers that are not
installed are named and left out; out of memory is a result.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_grpo.benchmarks import forked


class Part(NamedTuple):
    """One command of the suite."""

    module: str
    arguments: str = ""
    limit_s: float | None = None  # after which it is stopped
    memory: bool = False  # it measures memory alone, which other work on the GPU does not change


CPU = {
    "scaling-length": Part("bench_scaling", "--sweep max_completion_length"),
    "scaling-group": Part("bench_scaling", "--sweep num_generations"),
    "scaling-vocabulary": Part("bench_scaling", "--sweep vocabulary"),
    "step": Part("bench_step", "--prompts 2 --num_generations 4 --max_completion_length 32 --steps 3"),
    "learning": Part("bench_learning"),
    "ppo": Part("bench_ppo"),
    "profile": Part("profile_step"),
    "head": Part("bench_linear_logprobs"),
    "policy_loss": Part("bench_policy_loss"),
    "delta_step": Part("bench_delta_step"),
    "expert_product": Part("bench_expert_product", "--rows 1 4 --repetitions 1"),
    "rollout": Part("bench_rollout"),
    "rollout-demo": Part("bench_rollout", "--shape demo --prompts 8 --max_completion_length 32"),
    "update": Part("bench_update", "--prompts 4"),
    "update-uneven": Part("bench_update", "--prompts 4 --uneven"),
    "rungs": Part("bench_update", "--prompts 4 --rungs"),
    "gemm_4bit": Part("bench_gemm_4bit"),
    "sampling_error": Part("sampling_error"),
    "budgets": Part("bench_budgets"),
    "context": Part("bench_context"),
}
# The most valuable first, for hours of a card of one's own; of these only the head's has been run.
CUDA = {
    "head-1.5b": Part("bench_linear_logprobs", "--shape 4096,1536,151936 --shape 16384,1536,151936"),
    "step-qwen2.5-1.5b": Part(
        "bench_step",
        "--shape qwen2.5-1.5b --prompts 4 --prompt_length 512 --max_completion_length 256 --steps 3",
    ),
    "rollout-qwen2.5-1.5b": Part("bench_rollout", "--shape qwen2.5-1.5b --prompts 8 --max_completion_length 256"),
    "ppo-qwen2.5-1.5b": Part("bench_ppo", "--shape qwen2.5-1.5b --steps 3"),
    "budgets-qwen2.5-1.5b": Part("bench_budgets", "--shape qwen2.5-1.5b --vram_budget 6GB --vram_budget 8GB"),
    "budgets-qwen2.5-7b": Part("bench_budgets", "--shape qwen2.5-7b --vram_budget 8GB --vram_budget 12GB"),
    "scaling-length": Part("bench_scaling", "--shape qwen2.5-1.5b --sweep max_completion_length"),
    "update-qwen2.5-1.5b": Part("bench_update", "--shape qwen2.5-1.5b --prompts 4 --checkpointing"),
    "rungs-qwen2.5-1.5b": Part("bench_update", "--shape qwen2.5-1.5b --prompts 4 --rungs --repetitions 3"),
    "paged-qwen2.5-1.5b": Part(
        "bench_rollout",
        "--shape qwen2.5-1.5b --prompts 32 --max_completion_length 1024 --mean_length 400 --repetitions 2 "
        "--rollout_token_budget 20000 --only ours --only 'ours, without pages'",
    ),
    "gemm_4bit-qwen2.5-1.5b": Part("bench_gemm_4bit", "--shape qwen2.5-1.5b"),
    "gemm_4bit-qwen2.5-7b": Part("bench_gemm_4bit", "--shape qwen2.5-7b"),
    "step-qwen2.5-7b": Part(
        "bench_step",
        "--shape qwen2.5-7b --prompts 2 --prompt_length 512 --max_completion_length 128 --steps 3 "
        "--only lowmem_grpo TRL",
    ),
    "head-7b": Part("bench_linear_logprobs", "--shape 4096,3584,151936 --shape 16384,3584,151936"),
    "policy_loss": Part("bench_policy_loss"),
    "delta_step": Part("bench_delta_step"),
    "expert_product": Part("bench_expert_product"),
    "rollout-qwen2.5-7b": Part("bench_rollout", "--shape qwen2.5-7b --prompts 8 --max_completion_length 128"),
    "rungs-qwen2.5-7b": Part("bench_update", "--shape qwen2.5-7b --rungs --repetitions 3"),
    "budgets-qwen2.5-0.5b": Part("bench_budgets", "--shape qwen2.5-0.5b --vram_budget 6GB"),
    "budgets-qwen2.5-3b": Part("bench_budgets", "--shape qwen2.5-3b --vram_budget 6GB --vram_budget 12GB"),
    "budgets-llama-3.1-8b": Part("bench_budgets", "--shape llama-3.1-8b --vram_budget 8GB --vram_budget 16GB"),
    "budgets-qwen2.5-14b": Part("bench_budgets", "--shape qwen2.5-14b --vram_budget 12GB --vram_budget 24GB"),
    "scaling-rest": Part("bench_scaling", "--shape qwen2.5-0.5b --sweep num_generations vocabulary"),
    "context": Part("bench_context"),
    "learning": Part("bench_learning"),  # on the CPU
    "sampling_error": Part("sampling_error"),
}
_EVEN = "--prompts 8 --num_generations 8 --prompt_length 256"  # 64 rows
_BOTH = f"{_EVEN} --longest 128 --repetitions 1 --only ours --only 'ours, without CUDA graphs'"
_SHORT = "--prompts 4 --prompt_length 256 --completion_length 128 --checkpointing"  # 5,120 tokens
_LONG = "--prompts 4 --prompt_length 512 --completion_length 448 --checkpointing"  # 16,384
_WAYS = "--only 'packed, prompt shared' --only 'packed, full_determinism' --only \"packed, by the model's own layers\""
_FIT = "--prompts_per_step 4 --max_prompt_length 256 --max_completion_length 128"
# What gpu_suite.sh runs in each of its calls, the most valuable first, with limits for an H100 or H200: a part is a
# fork of what has imported everything, and most of its kernels were compiled beside the tests.
PROGRAMME = {
    "update": {
        "update-short-1.5b": Part("bench_update", f"--shape qwen2.5-1.5b {_SHORT} {_WAYS} --repetitions 5", 20),
        "update-1.5b": Part("bench_update", f"--shape qwen2.5-1.5b {_LONG} {_WAYS} --repetitions 3", 25),
        "head-tiles": Part(
            "bench_linear_logprobs",
            "--shape 8192,1536,151936 --shape 8192,3584,152064 --repetitions 5 --sweep_chunks "
            "--only 'ours with entropy' --only 'ours, product and fold apart' --only TRL --only Liger --only CCE",
            50,
        ),
        "step-0.5b": Part(
            "bench_step", "--shape qwen2.5-0.5b --max_completion_length 128 --steps 3 --only lowmem_grpo", 20
        ),
        "step-1.5b": Part(
            "bench_step", "--shape qwen2.5-1.5b --max_completion_length 128 --steps 4 --only lowmem_grpo", 30
        ),
        "update-7b": Part("bench_update", f"--shape qwen2.5-7b {_LONG} {_WAYS} --repetitions 2", 50),
        "budget-7b-6gb": Part(
            "bench_budgets", "--shape qwen2.5-7b --vram_budget 6GB --prompts_per_step 1 --num_generations 4", 70, True
        ),
    },
    "critic": {
        "ppo-1.5b": Part(
            "bench_ppo",
            "--shape qwen2.5-1.5b --steps 3 --only 'GRPO, groups of 8' 'PPO, one a prompt' --limit_s 35",
            75,
        ),
        "overlap-1.5b": Part("bench_overlap", "--shape qwen2.5-1.5b --choose", 70),
        "expert_product": Part("bench_expert_product", "--rows 64 16 4 1", 25),
        "delta_step": Part("bench_delta_step", "", 20),
        "budget-qwen3.5-4b": Part("bench_budgets", f"--shape qwen3.5-4b --vram_budget 12GB {_FIT}", 75, True),
        "budget-gpt-oss-20b": Part("bench_budgets", f"--shape gpt-oss-20b --vram_budget 16GB {_FIT}", 75, True),
        "budget-qwen3-30b-a3b": Part("bench_budgets", f"--shape qwen3-30b-a3b --vram_budget 24GB {_FIT}", 75, True),
    },
    "families": {
        "decode-qwen3.5-4b": Part("bench_decode", f"--shape qwen3.5-4b {_BOTH}", 40),
        "decode-gpt-oss-20b": Part("bench_decode", f"--shape gpt-oss-20b {_BOTH}", 40),
        "decode-qwen3-30b-a3b": Part("bench_decode", f"--shape qwen3-30b-a3b {_BOTH}", 45),
        "choose-1.5b": Part("bench_gemm_4bit", "--shape qwen2.5-1.5b --choose --repetitions 3", 40),
        "decode-1.5b": Part("bench_decode", f"--shape qwen2.5-1.5b {_EVEN} --profile --only ours", 30),
    },
    "tests": {
        "rollout-1.5b": Part(
            "bench_rollout",
            f"--shape qwen2.5-1.5b {_EVEN} --max_completion_length 256 --repetitions 2 "
            "--only ours --only 'ours, int8 keys and values'",
            50,
        ),
        "budget-1.5b": Part(
            "bench_budgets",
            "--shape qwen2.5-1.5b --vram_budget 4GB --prompts_per_step 4 --max_prompt_length 256 "
            "--max_completion_length 256",
            90,
            True,
        ),
        "budget-7b": Part(
            "bench_budgets",
            "--shape qwen2.5-7b --vram_budget 8GB --prompts_per_step 4 --max_prompt_length 256 "
            "--max_completion_length 128",
            95,
            True,
        ),
    },
    "beside": {
        "step-beside": Part(
            "bench_step",
            "--shape qwen2.5-1.5b --max_completion_length 32 --steps 2 --only lowmem_grpo TRL Unsloth --limit_s 45",
            110,
        ),
        "decode-7b": Part("bench_decode", f"--shape qwen2.5-7b {_EVEN} --only ours", 45),
    },
}
# What makes a command short that is run for its kernels alone; what it would choose or profile is left out.
AHEAD = {
    "bench_update": "--repetitions 1 --warmups 0",
    "bench_linear_logprobs": "--repetitions 1 --warmups 0",
    "bench_step": "--steps 2",
    "bench_ppo": "--steps 2",
    "bench_decode": "--repetitions 1",
    "bench_overlap": "--turns 1",
    "bench_rollout": "--repetitions 1 --warmups 0",
    "bench_expert_product": "--repetitions 1",
    "bench_gemm_4bit": "--repetitions 1 --warmups 0",
    "bench_delta_step": "",
}
# Only whether everything runs: ours and TRL alone where each would be a process of its own.
QUICK = {
    "head": Part("bench_linear_logprobs", "--quick --repetitions 1 --only ours --only TRL --only Liger"),
    "policy_loss": Part("bench_policy_loss", "--quick"),
    "delta_step": Part("bench_delta_step", "--quick"),
    "expert_product": Part("bench_expert_product", "--quick"),
    "rollout": Part("bench_rollout", "--quick --warmups 0"),
    "update": Part("bench_update", "--quick --warmups 0"),
    "rungs": Part("bench_update", "--quick --warmups 0 --rungs"),
    "gemm_4bit": Part("bench_gemm_4bit", "--quick --warmups 0"),
    "scaling": Part("bench_scaling", "--quick --sweep max_completion_length --only lowmem_grpo TRL"),
    "step": Part("bench_step", "--quick --only lowmem_grpo TRL"),
    "learning": Part("bench_learning", "--quick --only lowmem_grpo TRL"),
    "ppo": Part("bench_ppo", "--quick --only 'PPO, one a prompt'"),
    "sampling_error": Part("sampling_error", "--prompts 2 --num_generations 2"),
    "budgets": Part("bench_budgets", "--shape tiny --vram_budget 1GB --max_completion_length 32 --predict_only"),
    "context": Part("bench_context", "--shape tiny --max_completion_length 32"),
    "profile": Part("profile_step", "--steps 1"),
}
# What makes a command tiny, beside its shape.
TINY = {
    "bench_linear_logprobs": "--repetitions 1 --warmups 0",
    "bench_policy_loss": "--quick",
    "bench_delta_step": "--quick",
    "bench_expert_product": "--quick",
    "bench_rollout": "--quick --warmups 0 --repetitions 1",
    "bench_decode": "--quick",
    "bench_overlap": "--quick",
    "bench_update": "--quick --warmups 0",
    "bench_gemm_4bit": "--quick --warmups 0",
    "bench_step": "--quick",
    "bench_scaling": "--quick --only lowmem_grpo TRL",
    "bench_budgets": "--max_completion_length 32",
    "bench_context": "--shape tiny --max_completion_length 32",
    "bench_learning": "--quick --only lowmem_grpo TRL",
    "bench_ppo": "--quick --only 'PPO, one a prompt'",
    "sampling_error": "--prompts 2 --num_generations 2",
}
OUT_OF_TIME, INTERRUPTED = "out of time", "interrupted"
AT_ONCE = 4  # parts beside the tests
LEAST_S = 60  # a part is not begun with less time than this
TIMES = ("seconds", "train_s", "score_s", "step_s")
FARTHEST = 1000.0  # two implementations of the same work whose times are farther apart than this did not do the same


def parts(quick: bool, dry_run: bool, call: str | None) -> dict[str, Part]:
    """The parts of a call of the GPU programme, or those for this machine; a dry run's are a GPU's."""
    import torch  # seconds, which a word of help does without

    known = PROGRAMME[call] if call else QUICK if quick else CUDA if dry_run or torch.cuda.is_available() else CPU
    return {name: dry(part) for name, part in known.items()} if dry_run else known


def dry(part: Part) -> Part:
    """A part's command with a tiny model and sizes, and without a limit."""
    from lowmem_grpo.benchmarks.random_model import FAMILIES

    def tiny(match: re.Match) -> str:
        return f"--shape tiny-{match[1]}" if match[1] in FAMILIES else "--shape tiny"

    arguments = re.sub(r"--shape \d\S+", "--shape 50,32,500", part.arguments)
    arguments = re.sub(r"--shape ([a-z]\S+)", tiny, arguments)
    arguments = re.sub("--only (CCE|'ours, product and fold apart')", "", arguments)  # which no CPU has
    return Part(part.module, f"{arguments} {TINY[part.module]}".strip(), memory=part.memory)


def file_name() -> str:
    """machine-date.json, of the processor or the GPU."""
    import torch

    from lowmem_grpo.benchmarks import measure

    found = measure.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    text = str(found["gpu"]) if "gpu" in found else f"{found['cpu']} {found['cores']} cores"
    words = re.findall(r"[a-z0-9.]+", re.sub(r"\([^)]*\)", "", text.lower()))
    return "-".join([*words, time.strftime("%Y-%m-%d")]) + ".json"


class Running:
    """A part that has begun, in a process and a group of its own. It prints its tables meanwhile, unless quiet."""

    def __init__(self, part: Part, allowed_s: float | None, quiet: bool = False):
        self.folder, self.allowed_s = tempfile.TemporaryDirectory(), allowed_s
        self.output = Path(self.folder.name, "result.json")
        command = [sys.executable, "-m", f"lowmem_grpo.benchmarks.{part.module}", *shlex.split(part.arguments)]
        with open(os.devnull, "w") as nowhere:
            files = [nowhere, nowhere] if quiet else []
            self.process = forked.start([*command, f"--output={self.output}"], files, own_group=True)
        self.begun = time.monotonic()

    def has_ended(self) -> bool:
        late = self.allowed_s is not None and time.monotonic() - self.begun > self.allowed_s
        return late or self.process.exitcode is not None

    def end(self, is_late: bool = True) -> tuple[dict[str, Any] | None, str]:
        """(what it wrote, what went wrong or nothing), and where it runs still, stop it: it is late or interrupted."""
        status = self.process.exitcode
        wrong = f"exit status {status}" if status else ""
        if status is None:
            wrong = f"{OUT_OF_TIME} after {self.allowed_s or 0:.0f} s" if is_late else INTERRUPTED
            forked.kill_group(self.process)  # its own processes, which measure, end with it
        found = json.loads(self.output.read_text()) if self.output.exists() else None
        self.folder.cleanup()
        return found, wrong


def run_part(part: Part, allowed_s: float | None = None) -> tuple[dict[str, Any] | None, str]:
    """(what it wrote, what went wrong or nothing); Ctrl-C and SIGTERM go wrong, too."""
    running = Running(part, allowed_s)
    try:
        forked.wait(running.process, allowed_s)
    except BaseException:
        return running.end(is_late=False)
    return running.end()


def ahead(part: Part) -> Part:
    """A part that has the same kernels compiled, and little more."""
    arguments = re.sub(r" --(choose|profile)\b", "", f" {part.arguments}")
    return part._replace(arguments=f"{arguments} {AHEAD[part.module]}".strip())


def run_beside(command: str, names: list[str], known: dict[str, Part], keep: Callable[..., object]) -> None:
    """Run parts of memory alone while a shell's command has the GPU, and the others ahead of their time.

    What the others find goes nowhere, and ends with the command.
    """
    memory = [name for name in names if known[name].memory]
    queue = memory + [name for name in names if not known[name].memory]
    running: dict[str, Running] = {}
    tests = subprocess.Popen(["bash", "-c", command], start_new_session=True)
    try:
        while tests.poll() is None or any(known[name].memory for name in [*queue, *running]):
            while queue and len(running) < AT_ONCE:
                name = queue.pop(0)
                part = known[name] if known[name].memory else ahead(known[name])
                print(f"\n# {'' if part.memory else 'ahead: '}{name}: {part.module} {part.arguments}", flush=True)
                running[name] = Running(part, part.limit_s if part.memory else None, quiet=not part.memory)
            for name in [name for name, one in running.items() if one.has_ended()]:
                one = running.pop(name)
                print(f"{name} took {time.monotonic() - one.begun:.0f} s", flush=True)
                found = one.end()
                if known[name].memory:
                    keep(name, *found)
            time.sleep(0.05)
    finally:
        if tests.poll() is None:
            os.killpg(tests.pid, signal.SIGKILL)
            tests.wait()
        for name, one in running.items():
            found = one.end(is_late=False)
            if known[name].memory:
                keep(name, *found)


def faults(document: Any, where: str = "") -> Iterator[str]:
    """Faults of a result: a failure that others do not share, or impossible times."""
    from lowmem_grpo.benchmarks import measure

    expected = (measure.OUT_OF_MEMORY, measure.NOT_INSTALLED, measure.NOT_DONE)
    if not isinstance(document, dict | list):
        return
    entries = list(document.items() if isinstance(document, dict) else enumerate(document))
    for key, value in entries:
        place = f"{where}/{key}"
        if key == "plan":  # whose reasons are no failures
            continue
        if key in ("failed", "reason") and isinstance(value, str):
            if not any(reason in value for reason in expected):
                yield f"{place}: {value}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{place}: {value}"
        yield from faults(value, place)
    for name in TIMES:
        times = [time for _, value in entries for time in _times(value, name)] if isinstance(document, dict) else []
        if times and not 0 < max(times) <= FARTHEST * min(times):
            yield f"{where}: {name} between {min(times):.2g} and {max(times):.2g}"


def _times(result: Any, name: str) -> list[float]:
    """Times of one implementation: its median, or that of its first run."""
    runs = result[:1] if isinstance(result, list) else [result]  # the sizes of a sweep are no repetitions
    found = [run[name] for run in runs if isinstance(run, dict) and name in run]
    return [value.get("median", math.nan) if isinstance(value, dict) else value for value in found]


def is_done(document: dict[str, Any] | None, allowed_s: float | None) -> bool:
    """Tell whether a part ended, or timed out in the time it would have now, give or take 10 s."""
    if document is None or "incomplete" not in document:
        return document is not None
    return allowed_s is not None and allowed_s <= document.get("had_s", -10.0) + 10


def run_all(
    names: list[str], known: dict[str, Part], path: Path, allowed_s: float | None, beside: str | None = None
) -> list[str]:
    """Runs the parts and saves after each, those of memory alone beside a command; returns what went wrong."""
    from lowmem_grpo.benchmarks import measure

    begun, wrong = time.monotonic(), []

    def keep(name: str, document: dict[str, Any] | None, failed: str, had_s: float | None = None) -> None:
        wrong.extend([f"{name}: {failed}"] if failed else [])
        wrong.extend(f"{name}{fault}" for fault in faults(document))
        if failed or document is None:
            had_s = sooner(had_s, known[name].limit_s) if OUT_OF_TIME in failed else -10.0  # none
            document = {**(document or {}), "incomplete": failed or "no result", "had_s": had_s}
        found = read(path)  # anew: another suite may have written to it meanwhile
        found["parts"][name] = document
        measure.save(found, path)

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if beside:
            run_beside(beside, names, known, keep)
            names = [name for name in names if not known[name].memory]
        for count, name in enumerate(names):
            left = None if allowed_s is None else allowed_s - (time.monotonic() - begun)
            if left is not None and count and left < LEAST_S:
                print(f"\ntime is up, {', '.join(names[count:])} left: call again", flush=True)
                return wrong
            left = sooner(left, known[name].limit_s)
            print(f"\n# {name}: {known[name].module} {known[name].arguments}".rstrip(), flush=True)
            part_begun = time.monotonic()
            document, failed = run_part(known[name], left)
            print(f"{name} took {time.monotonic() - part_begun:.0f} s", flush=True)
            keep(name, document, failed, left)
            if failed == INTERRUPTED:
                print(f"\nwhat {name} had is in {path}; the same command begins it anew, and then the rest", flush=True)
                sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
    lost = [name for name, document in read(path)["parts"].items() if "incomplete" in document]
    print("\nall done" + (f", but incomplete: {', '.join(lost)}" if lost else ""), flush=True)
    return wrong


def sooner(*limits: float | None) -> float | None:
    """The least of some limits in seconds; None is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def read(path: Path) -> dict[str, Any]:
    """The content of a suite's file. Raises ValueError where it is none."""
    try:
        found = json.loads(path.read_text())
        assert isinstance(found["parts"], dict) and all(isinstance(part, dict) for part in found["parts"].values())
    except (FileNotFoundError, NotADirectoryError):
        return {"parts": {}}
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ValueError(f"{path} is not a file of this suite; move it away, or choose another --output_dir") from None
    return found


def of_name(name: str, known: dict[str, Part]) -> list[str]:
    """The part with a name, or all parts whose names begin with it and a hyphen."""
    found = [part for part in known if part == name or part.startswith(f"{name}-")]
    if not found:
        raise ValueError(f"no part {name}; there are {', '.join(known)}")
    return found


def chosen_file(given: argparse.Namespace, known: dict[str, Part]) -> Path:
    """The suite's file: --file, this machine's newest that lacks a part, or a new one."""
    if given.file:
        return given.output_dir / given.file
    today = ("quick-" if given.quick else "dry-run-" if given.dry_run else "") + file_name()
    begun = sorted(given.output_dir.glob(f"{today[: -len('YYYY-MM-DD.json')]}[0-9]*.json"))
    if begun and not known.keys() <= read(begun[-1])["parts"].keys():
        return begun[-1]
    return given.output_dir / today


def check_writable(folder: Path) -> None:
    """Make the folder of the results. Raises ValueError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to ({error.strerror})") from None


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where a part failed or found what cannot be, 2 for bad input."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="lowmem-grpo bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts to run; all by default, see --list")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, minutes: does everything run?")
    parser.add_argument("--dry_run", action="store_true", help="a GPU's parts with tiny sizes, also on a CPU")
    parser.add_argument("--call", choices=PROGRAMME, help="a part of the GPU programme, see gpu_suite.sh")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-results"), help="(default %(default)s)")
    parser.add_argument("--file", help="name of the JSON file; by default that of machine and date")
    parser.add_argument("--again", action="store_true", help="run parts that the file has already, too")
    parser.add_argument("--allowed_s", type=float, help="seconds after which no part is begun, and one is stopped")
    parser.add_argument("--beside", metavar="COMMAND", help="of bash; while it runs, so do parts of memory alone")
    parser.add_argument("--list", action="store_true", help="print the parts for this machine, and which are done")
    given = parser.parse_args(argv)
    if given.quick + bool(given.dry_run or given.call) > 1:
        parser.error("--quick and --dry_run or --call are two things; choose one")
    if given.allowed_s is not None and given.allowed_s <= 0:
        parser.error(f"--allowed_s {given.allowed_s:g} is not above 0")
    # Else torch would ask the driver whether there is a GPU, after which no fork of this process has one.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    known = parts(given.quick, given.dry_run, given.call)
    try:
        asked = [part for name in given.names for part in of_name(name, known)] or list(known)
        if not given.list:
            check_writable(given.output_dir)
        path = chosen_file(given, known)
        stored = read(path)["parts"]
    except ValueError as error:
        print(f"lowmem-grpo bench: {error}", file=sys.stderr)
        return 2
    allowed = {name: sooner(given.allowed_s, part.limit_s) for name, part in known.items()}
    done = [name for name in known if is_done(stored.get(name), allowed[name])]
    if given.list:
        print("\n".join(f"{name}{'  (done)' if name in done else ''}" for name in known))
        return 0
    again = given.again or given.quick
    if not again and set(asked) & set(done):
        print(f"in {path} already, --again runs them again: {', '.join(name for name in asked if name in done)}")
    todo = [name for name in asked if again or name not in done]
    modules = {f"lowmem_grpo.benchmarks.{known[name].module}" for name in todo}
    forked.preload(*sorted(modules))
    then = "parts are forks of this process" if forked.serves() else "parts import it anew"
    print(f"imported everything in {time.monotonic() - begun:.0f} s; {then}", flush=True)
    wrong = run_all(todo, known, path, given.allowed_s, given.beside)
    from lowmem_grpo.benchmarks import report

    pictures = report.draw_all(read(path), path.with_suffix(""))
    print(f"\nresults   {path}", *(f"picture   {picture}" for picture in pictures), sep="\n")
    print(*(f"wrong     {fault}" for fault in wrong), sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
