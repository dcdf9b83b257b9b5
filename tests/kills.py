"""Kill runs at chosen points and at random moments, resume them, and compare each with one that nothing disturbed.

    python tests/kills.py --kills 100 --interruptions 25
    python tests/kills.py --only iter2:17                 # one trial again, as a failure names it
    python tests/kills.py --short                         # one run, struck at each of IN_TURN

A trial is a run of a variant that is struck once to three times, and resumed after each: by SIGKILL, or by a signal
that a run is to hold until it has saved. Points are every function of the package at its start and end, every call that
changes a file's name or flushes it, and every file half-written. What a trial leaves is compared byte for byte.

Each run is a process of its own, forked from this one, which has imported torch and computed nothing.
"""

import argparse
import json
import os
import random
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a thread of another's pool would not be in a forked process
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil
import torch

import lowmem_grpo
from lowmem_grpo import GRPOConfig, RewardConfig, SFTConfig, sft, train, train_reward_model
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL
from lowmem_grpo.output.folder import checkpoints
from lowmem_grpo.preview import prompts

LIMIT_S = 300  # a run takes 2 s; one that takes this long hangs
EVERY_RUN: dict[str, Any] = dict(
    output_dir="out", use_cpu=True, max_steps=6, save_steps=2, eval_steps=3, prompts_per_step=2, num_generations=4,
    max_completion_length=8, learning_rate=1e-3, beta=0.02, lr_scheduler_type="cosine", log_completions=True,
    load_best_model_at_end=True, gradient_checkpointing=False, resume_from_checkpoint="auto",
)  # fmt: skip
REPLAY = dict(replay_buffer_size=6, dynamic_sampling_rounds=1)
ENTROPY = dict(entropy_coef=0.01, use_adaptive_entropy=True, entropy_target=0.5, entropy_coef_delta=0.01)
SYNC = dict(sync_ref_model=True, ref_model_sync_steps=2)
OF_GRPO = ("prompts_per_step", "num_generations", "max_completion_length", "beta", "log_completions")
EVERY_SFT = {name: value for name, value in EVERY_RUN.items() if name not in OF_GRPO} | dict(examples_per_step=8)
EVERY_REWARD = {name: value for name, value in EVERY_SFT.items() if name != "examples_per_step"} | dict(
    pairs_per_step=4, center_rewards_coefficient=0.01
)
VARIANTS: dict[str, dict[str, Any]] = {
    "all": dict(
        **REPLAY, **ENTROPY, **SYNC, kl_target=0.01, kl_horizon=20, curriculum_skip=0.5, steps_per_generation=2,
        num_iterations=2, top_p=0.9, lora_dropout=0.1, num_generations_eval=2, save_total_limit=2,
    ),
    "base": dict(eval_steps=None, load_best_model_at_end=False),
    "dropout": dict(lora_dropout=0.1),
    "dynamic sampling": dict(dynamic_sampling_rounds=2, curriculum_skip=0.5),
    "entropy": ENTROPY,
    "eval": dict(eval_steps=1),
    "eval of two": dict(eval_steps=2, num_generations_eval=2, metric_for_best_model="eval_reward"),
    "fp16": dict(fp16=True),
    "int8 kv": dict(rollout_kv="int8"),
    "iterations": dict(num_iterations=2),
    "kl in the reward": dict(kl_in_reward=True),
    "kl target": dict(kl_target=0.01, kl_horizon=20),
    "limit": dict(max_steps=4, save_steps=1, save_total_limit=1),
    "mini-batches": dict(steps_per_generation=2),
    "optimizer in 8 bits": dict(optim="adamw_8bit"),
    "ppo": dict(
        adv_estimator="gae", num_generations=1, prompts_per_step=8, critic_warmup=2, critic_learning_rate=1e-3,
        num_iterations=2, kl_in_reward=True,
    ),
    "replay": REPLAY,
    "save every step": dict(save_steps=1),
    "sync": SYNC,
    "teacher": dict(teacher=str(MODEL)),
    "teacher's prompt": dict(teacher="base", teacher_system_prompt="Sum up.", teacher_coef=0.1, steps_per_generation=2),
    # Of sft(), over rows that weigh differently.
    "sft": dict(sft=True),
    "sft, dft": dict(sft=True, loss_type="dft", eval_steps=None, load_best_model_at_end=False),
    "sft, dropout": dict(sft=True, lora_dropout=0.1, save_steps=1, save_total_limit=2),
    "sft, eval": dict(sft=True, eval_steps=1, metric_for_best_model="eval_mean_token_accuracy"),
    "sft of two datasets": dict(sft=True, dataset_weights=[3, 1], lora_dropout=0.1),
    # Of train_reward_model(), whose adapter has a score head.
    "reward": dict(reward=True),
    "reward, dropout": dict(reward=True, lora_dropout=0.1, save_steps=1, save_total_limit=2, token_budget=48),
}  # fmt: skip
PASSES = ("policy.py", "packing.py", "packed_attention.py", "attention.py", "lora.py", "product_4bit.py")
# The first that a function's path begins with is where it is. Trials choose among places, then among functions there.
PLACES = {
    "best": ("run/best.py",),
    "evaluation": ("evaluation/", "run/evaluations.py"),
    "log": ("run/log.py", "run/progress.py", "MetricsLog"),
    "checkpoint": ("run/checkpoint.py", "output/"),
    "end of a step": (
        "run/run.py",
        "run/step.py",
        "run/rest.py",
        "run/interruption.py",
        "run/randomness.py",
        "callback",
    ),
    "rollout": ("generate/", "rollout/"),
    "rewards": ("rewards/runner.py", "rewards/isolation/", "demo/task.py"),
    "forward and backward": ("kernels/", "objective/", *(f"model/{name}" for name in PASSES)),
    "clipping and optimizer": ("update/", "optim/", "out_of_memory.py"),
    "names and flushes of files": ("os.",),
    "files half-written": ("half of ",),
    "start": ("",),
}
PACKAGE = f"{Path(lowmem_grpo.__file__).parent}{os.sep}"
OPTIMIZERS = (f"torch{os.sep}optim{os.sep}", f"bitsandbytes{os.sep}optim{os.sep}")
FILE_CALLS = {"fsync", "replace", "rename", "unlink", "rmdir", "mkdir"}
WRITERS: dict[str, Callable[[dict[str, Any]], Any]] = {  # the functions that write files: which, of their variables
    "Path.write_text": lambda of: of["self"],
    "Path.write_bytes": lambda of: of["self"],
    "save_file": lambda of: of["filename"],
    "Dataset.to_parquet": lambda of: of["path_or_buf"],
    "MetricsLog.write": lambda of: of["self"].path,
}
SOFT = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
TIMES = ("time/", "memory/", "tokens_per_s/", "step_time")  # of metrics: what no two runs share


@dataclass(frozen=True)
class Strike:
    """A signal to a run: at a point that it comes to, or when it has computed for so many seconds."""

    signal: signal.Signals
    point: str = ""  # a function's file and name, a call of the operating system, or the half of a file
    event: str = "start"  # or end
    number: int = 1  # the how many-th time there
    after_s: float = 0.0
    again_s: float | None = None  # once more, so long after the first

    def __str__(self) -> str:
        where = (
            f"at the {self.event} {self.number} of {self.point}" if self.point else f"after {self.after_s:.2f} CPU s"
        )
        return f"{self.signal.name} {where}" + (f", again {self.again_s:.3f} s later" if self.again_s else "")


# A run of the variant "limit", which saves and removes the most, goes on from the one before, and is struck there.
IN_TURN = [
    Strike(
        signal.SIGTERM, "rewards/runner.py RewardRunner.__call__", "start", 3
    ),  # in step 2, and of step 1 all is saved
    Strike(signal.SIGKILL, "half of trainer_state.json"),  # of step 2
    Strike(signal.SIGKILL, "run/best.py BestAdapter.keep", "end"),  # of step 3
    Strike(signal.SIGKILL, "os.rmdir"),  # of an old checkpoint, whose files are gone
]


def place_of(point: str) -> str:
    """The name in PLACES of a point; of a random moment, "any moment"."""
    return next(name for name, starts in PLACES.items() if point.startswith(starts)) if point else "any moment"


class Tracer:
    """Counts how often a run comes to each point, and strikes it at one."""

    def __init__(self, strike: Strike | None, before_striking: Callable[[], Any]):
        self.strike, self.before_striking = strike, before_striking
        self.counts: Counter[tuple[str, str]] = Counter()
        self.points: dict[int, str] = {}  # by the id of a function's code; hashing a code reads all of it
        self.ends: Counter[str] = Counter()  # of the function whose end is to be struck

    def begin(self) -> None:
        """Watch this process from now on."""
        for name in FILE_CALLS:
            setattr(os, name, self.counted(getattr(os, name)))
        sys.settrace(self.on_call)

    def counted(self, call: Callable) -> Callable:
        """A call of the operating system that is counted, at its start and at its end."""

        def counting(*args, **kwargs):
            self.come_to(f"os.{call.__name__}", "start")
            result = call(*args, **kwargs)
            self.come_to(f"os.{call.__name__}", "end")
            return result

        return counting

    def on_call(self, frame: FrameType, event: str, arg: Any) -> Callable | None:
        """Count a function's start. For sys.settrace(): what it returns is told of the rest of that call."""
        point = self.points.get(id(frame.f_code))
        if point is None:
            point = self.points[id(frame.f_code)] = point_of(frame.f_code)
        if not point:
            return None
        if point in WRITERS:
            frame.f_trace_lines = False
            return self.on_written
        self.counts[point, "end"] += 1
        self.come_to(point, "start")
        if self.strike and (self.strike.point, self.strike.event) == (point, "end"):
            frame.f_trace_lines = False
            return self.on_end
        return None

    def on_end(self, frame: FrameType, event: str, arg: Any) -> Callable | None:
        """Strike the end of a function, where it is due."""
        if event == "return":
            self.ends[self.strike.point] += 1
            if self.ends[self.strike.point] == self.strike.number:
                self.do_strike()
        return self.on_end

    def on_written(self, frame: FrameType, event: str, arg: Any) -> Callable | None:
        """Count a file that has been written; where that is to be struck, half of the file is all that there is."""
        writer = point_of(frame.f_code)
        path = WRITERS[writer](frame.f_locals) if event == "return" else None
        if isinstance(path, str | Path) and Path(path).resolve().is_relative_to(Path.cwd()):
            point = f"half of {Path(path).name}"
            self.counts[point, "start"] += 1
            if self.is_due(point, "start"):
                written = Path(path).read_bytes()
                line = written.splitlines()[-1] if written.endswith(b"\n") else written  # a log grows by lines
                os.truncate(path, max(0, len(written) - 1 - len(line) // 2))
                self.do_strike()
        return self.on_written

    def come_to(self, point: str, event: str) -> None:
        self.counts[point, event] += 1
        if self.is_due(point, event):
            self.do_strike()

    def is_due(self, point: str, event: str) -> bool:
        due = self.strike and (self.strike.point, self.strike.event, self.strike.number)
        return due == (point, event, self.counts[point, event])

    def do_strike(self) -> None:
        sys.settrace(None)
        self.before_striking()
        os.kill(os.getpid(), self.strike.signal)


def point_of(code: CodeType) -> str:
    """A function's file and name, where it is the package's, an optimizer's or a writer of files; else an empty text.

    Lambdas and comprehensions are no points: they are within others.
    """
    name = code.co_qualname
    if code.co_name.startswith("<"):
        return ""
    if name in WRITERS:
        return name
    if code.co_filename.startswith(PACKAGE):
        return f"{code.co_filename.removeprefix(PACKAGE)} {name}"
    for folder in OPTIMIZERS:
        if folder in code.co_filename:
            return f"optim/{code.co_filename.split(folder)[1]} {name}"
    return "callback" if code is callback.__code__ else ""


def noisy_reward(completions, **kwargs):
    """Draws from every generator that a checkpoint keeps, so that rewards differ, and differ where one is lost."""
    return [random.random() + np.random.rand() + torch.rand(1).item() + len(c[0]["content"]) % 7 for c in completions]


def examples(problems) -> list[dict[str, Any]]:
    """Problems with their worked answers, to imitate, every second with half of the weight."""
    return [
        {"prompt": task.question(problem), "completion": task.worked(problem), "weight": 0.5 + number % 2 / 2}
        for number, problem in enumerate(problems)
    ]


def pairs(problems) -> list[dict[str, Any]]:
    """Problems with a worked answer and a lazy one, of which the worked one is better."""
    return [
        {"prompt": task.question(problem), "chosen": task.worked(problem), "rejected": task.lazy(problem)}
        for problem in problems
    ]


def callback(step, metrics, policy):
    """Write down what it was called with, in a line."""
    with open("callbacks.jsonl", "a", encoding="utf-8") as file:
        file.write(
            json.dumps([step, {name: str(v) for name, v in metrics.items() if not name.startswith(TIMES)}]) + "\n"
        )


def run(folder: Path, settings: dict[str, Any]) -> int:
    """Train in a folder, from its newest checkpoint if it has one; returns the exit status."""
    for number in SOFT:  # `nohup` and `&` have some of them ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    random.seed(0)  # a fork has another state, and the preview calls the rewards before the run has set one
    settings = dict(settings)
    is_sft, is_reward = settings.pop("sft", False), settings.pop("reward", False)
    try:
        seen, unseen = task.splits()  # which a signal may strike, too
        if is_sft:
            config, data = SFTConfig(**{**EVERY_SFT, **settings}), examples(seen[:32])
            data = [data, examples(seen[32:72])] if config.dataset_weights else data
            sft(str(MODEL), data, examples(unseen[:4]), config, callbacks=callback)
        elif is_reward:
            config = RewardConfig(**{**EVERY_REWARD, **settings})
            train_reward_model(str(MODEL), pairs(seen[:32]), pairs(unseen[:4]), config, callbacks=callback)
        else:
            train(
                str(MODEL), [task.tag_format_reward, noisy_reward], task.rows(seen[:32]), task.rows(unseen[:4]),
                config=GRPOConfig(**{**EVERY_RUN, **settings}), callbacks=callback,
            )  # fmt: skip
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit:
        return int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int  # negative: the signal that killed it
    was_struck: bool
    had_checkpoint: bool  # to go on from; else it began anew
    cpu_s: float
    counts: dict[tuple[str, str], int]  # of points by event, where it was not killed and was to count


def start(
    folder: Path, settings: dict[str, Any], strike: Strike | None = None, count: bool = False,
    run: Callable[[Path, dict[str, Any]], int] = run,
) -> Ended:  # fmt: skip
    """Run in a forked process, strike that, and wait for its end."""
    folder.mkdir(parents=True, exist_ok=True)
    had_checkpoint = any(folder.glob("out/checkpoint-*/manifest.sha256"))
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        prompts.SLOW_S = LIMIT_S  # so that a preview has the same words, however busy the machine is
        tracer = Tracer(strike, lambda: os.write(writing, b"!"))
        if count or (strike and strike.point):
            tracer.begin()
        status = run(folder, settings)
        sys.settrace(None)
        counts = [[*key, number] for key, number in tracer.counts.items()]
        Path("counts.json").write_text(json.dumps(counts if count else []), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(writing)
    was_struck = False
    if strike and not strike.point:
        process = psutil.Process(child)
        while not was_struck and not wait_for(reading, 0.005):
            if sum(process.cpu_times()[:2]) >= strike.after_s:  # no matter how busy the machine is
                os.kill(child, strike.signal)
                was_struck = True
    elif strike:
        was_struck = bool(select.select([reading], [], [], LIMIT_S)[0]) and os.read(reading, 1) == b"!"
    if was_struck and strike.again_s is not None and not wait_for(reading, strike.again_s):
        os.kill(child, strike.signal)
    if not wait_for(reading, LIMIT_S):
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, exit_status, used = os.wait4(child, 0)
    status = os.waitstatus_to_exitcode(exit_status)
    counted = json.loads((folder / "counts.json").read_text(encoding="utf-8")) if count and status >= 0 else []
    counts = {(point, event): number for point, event, number in counted}
    return Ended(status, was_struck, had_checkpoint, used.ru_utime + used.ru_stime, counts)


def wait_for(reading: int, seconds: float) -> bool:
    """True where the process at the pipe's other end ends within so many seconds."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        if select.select([reading], [], [], left)[0] and not os.read(reading, 1):
            return True
    return False


def content(path: Path) -> Any:
    """What two runs must share of a file: all of it, but for times, resumes, and the order of names in JSON."""
    if path.name in ("README.md", "report.html"):  # which say when the run was started and gone on with
        return path.read_bytes()[:1]
    if path.name == "run.json":
        about = json.loads(path.read_text(encoding="utf-8"))
        ended = {name: about["ended"][name] for name in ("how", "step", "why")}
        return {**about, "started": None, "resumed": None, "command": None, "ended": ended}
    if path.name == "manifest.sha256":  # of files that are compared by themselves, and JSON's order is in it
        return [line.split()[-1] for line in path.read_text(encoding="utf-8").splitlines()[:-1]]
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix != ".jsonl":
        return path.read_bytes()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.name == "callbacks.jsonl":  # a step that is done again calls again
        return dict(lines)
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in lines]


def differences(whole: Path, struck: Path, may_save: bool = False) -> list[str]:
    """What a run that was struck and resumed does not share with one that nothing disturbed, a line each.

    One that may_save where it is interrupted has other checkpoints on its way, but the same last one.
    """
    ours, theirs = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        - {"output.txt", "counts.json"}
        for folder in (struck, whole)
    )
    if may_save:
        last = f"out/{checkpoints(whole / 'out')[-1].name}/"
        on_the_way = {
            name for name in ours ^ theirs if name.startswith("out/checkpoint-") and not name.startswith(last)
        }
        ours, theirs = ours - on_the_way, theirs - on_the_way
    found = [f"{name} is missing" for name in sorted(theirs - ours)]
    found += [f"{name} is left" for name in sorted(ours - theirs)]
    for name in sorted(ours & theirs):
        try:
            if content(struck / name) != content(whole / name):
                found.append(f"{name} is another")
        except ValueError as error:
            found.append(f"{name} cannot be read: {error}")
    return found


@dataclass(frozen=True)
class Whole:
    """A variant's run that nothing disturbed, and how often it comes to each point."""

    folder: Path
    cpu_s: float
    counts: dict[tuple[str, str], int]


def run_whole(folder: Path, variant: str) -> Whole:
    """Run a variant to its end."""
    ended = start(folder, VARIANTS[variant], count=True)
    assert ended.status == 0, f"{variant} fails undisturbed: {(folder / 'output.txt').read_text(encoding='utf-8')}"
    if variant == "all":
        assert {place_of(point) for point, _ in ended.counts} == set(PLACES), "a place to which no run comes"
    return Whole(folder, ended.cpu_s, ended.counts)


def points_of_a_resume(folder: Path, settings: dict[str, Any]) -> dict[tuple[str, str], int]:
    """How often a resumed run comes to each point."""
    middle = Strike(signal.SIGKILL, "run/run.py Run.finish", "start", 4)  # of at least 4 steps
    killed, resumed = start(folder, settings, middle), start(folder, settings, count=True)
    assert (killed.status, resumed.status) == (-signal.SIGKILL, 0), folder
    return resumed.counts


def draw(dice: random.Random, kind: signal.Signals, cpu_s: float, counts: dict[tuple[str, str], int]) -> Strike:
    """A strike at a random moment, or at a point: a place, a function there, and the how many-th time are drawn.

    Of two times that are drawn the later one is taken, since before its first checkpoint a run is only begun anew.
    """
    again_s = dice.uniform(0, 0.1) if kind != signal.SIGKILL and dice.random() < 0.5 else None
    if dice.random() < 1 / 6:
        return Strike(kind, after_s=max(dice.uniform(0, cpu_s), dice.uniform(0, cpu_s)), again_s=again_s)
    places: dict[str, list[tuple[str, str]]] = {}
    for point, event in sorted(counts):
        if kind == signal.SIGKILL or not point.startswith("half"):  # a signal that is held leaves no half
            places.setdefault(place_of(point), []).append((point, event))
    point, event = dice.choice(places[dice.choice(sorted(places))])
    most = counts[point, event]
    return Strike(kind, point, event, max(dice.randint(1, most), dice.randint(1, most)), again_s=again_s)


@dataclass(frozen=True)
class Trial:
    """What became of a run that was struck and resumed."""

    name: str
    kind: signal.Signals
    strikes: list[Strike]  # those that met it
    has_resumed: bool  # from a checkpoint, the last time; else it was begun anew
    faults: list[str]


def attempt(
    whole: Whole,
    resumed: dict[tuple[str, str], int],
    variant: str,
    number: int,
    dice: random.Random,
    kind: signal.Signals,
) -> Trial:
    """Strike a run up to three times, resume it each time until it ends, and compare."""
    folder, strikes, faults = whole.folder.parent / f"{number}", [], []
    cpu_s = whole.cpu_s / 2  # counting takes a third of it
    for turn in range(dice.choice([1, 1, 1, 2, 2, 3])):
        if turn:  # what is left is less
            strike = draw(dice, kind, cpu_s / 2, {point: (count + 1) // 2 for point, count in resumed.items()})
        else:
            begun = {key: count for key, count in whole.counts.items() if place_of(key[0]) != "start"}
            strike = draw(dice, kind, cpu_s, begun)
        ended = start(folder, VARIANTS[variant], strike)
        strikes += [strike] * ended.was_struck
        faults += faults_of(ended, strike, folder, is_first=turn == 0)
        if ended.status == 0:
            break
    else:
        ended = start(folder, VARIANTS[variant])
    if ended.status:
        faults.append(f"the last resume ended with status {ended.status}")
    faults += differences(whole.folder, folder, may_save=kind != signal.SIGKILL)
    if not faults:
        shutil.rmtree(folder)
    return Trial(f"{variant}:{number}", kind, strikes, ended.had_checkpoint, faults)


def faults_of(ended: Ended, strike: Strike, folder: Path, is_first: bool) -> Iterator[str]:
    """What is wrong with how a struck process ended."""
    expected = {0} if not ended.was_struck else {-signal.SIGKILL}
    if ended.was_struck and strike.signal != signal.SIGKILL:
        # 0: it had nothing left to do. The signal's own end: it had not begun to train.
        expected = {0, 128 + strike.signal, -strike.signal}
    if ended.status not in expected:
        yield f"{strike}: ended with status {ended.status}"
    log = folder / "out/metrics.jsonl"
    if is_first and ended.status > 0 and log.is_file():
        steps = [line["step"] for line in content(log) if "loss" in line]
        saved = [int(path.name.split("-")[1]) for path in checkpoints(folder / "out")]
        if max(steps, default=0) > max(saved, default=0):
            yield f"{strike}: step {max(steps)} was finished, and step {max(saved, default=0)} is the last one saved"


def faults_in_turn(
    whole: Path, folder: Path, settings: dict[str, Any], strikes: list[Strike],
    run: Callable[[Path, dict[str, Any]], int] = run,
) -> list[str]:  # fmt: skip
    """What is wrong with a run that was struck at each point, went on after each, and then came to its end."""
    found = []
    for turn, strike in enumerate(strikes):
        ended = start(folder, settings, strike, run=run)
        print(f"  {strike}: {'struck' if ended.was_struck else 'not reached'}", flush=True)
        found += faults_of(ended, strike, folder, is_first=turn == 0)
        if ended.status == 0:
            break
    else:
        last = start(folder, settings, run=run)
        found += [f"the last one ended with status {last.status}"] if last.status else []
    return found + differences(whole, folder)


def main_in_turn(top: Path) -> int:
    """Strike one run at each of IN_TURN; returns the exit status."""
    settings = VARIANTS["limit"]
    ended = start(top / "whole", settings)
    assert ended.status == 0, (top / "whole/output.txt").read_text(encoding="utf-8")
    found = faults_in_turn(top / "whole", top / "struck", settings, IN_TURN)
    print(f"see {top}: {'; '.join(found)}" if found else "a run that was struck in turn is equal to an undisturbed one")
    if not found:
        shutil.rmtree(top)
    return bool(found)


def trials(options: argparse.Namespace) -> Iterator[tuple[str, int, list[signal.Signals]]]:
    """Variant, number and signals of each trial: the variants in turn, first those that are killed."""
    for i in range(options.kills + options.interruptions):
        number, of_variant = divmod(i, len(options.variants))
        yield options.variants[of_variant], number, [signal.SIGKILL] if i < options.kills else SOFT


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="runs that are killed")
    parser.add_argument("--interruptions", type=int, default=0, help="runs that get SIGTERM, SIGINT or SIGHUP")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--only", metavar="VARIANT:NUMBER", help="one trial; the other flags as they were")
    parser.add_argument("--short", action="store_true", help="one run, struck at chosen points in turn")
    options = parser.parse_args(arguments)
    top = Path(tempfile.mkdtemp(prefix="kills-"))
    if options.short:
        return main_in_turn(top)
    wholes: dict[str, Whole] = {}
    resumed = points_of_a_resume(top / "resumed", VARIANTS[options.variants[0]])  # of "all", which is the first
    done: list[Trial] = []
    for variant, number, signals in trials(options):
        if options.only in (None, f"{variant}:{number}"):
            if variant not in wholes:
                wholes[variant] = run_whole(top / variant.replace(" ", "-") / "whole", variant)
            dice = random.Random(f"{options.seed} {variant} {number}")
            trial = attempt(wholes[variant], resumed, variant, number, dice, dice.choice(signals))
            done.append(trial)
            print(f"{trial.name}: {'; '.join(map(str, trial.strikes)) or 'not struck'}", flush=True)
            for fault in trial.faults:
                print(f"    {fault}", flush=True)
    bad = [trial for trial in done if trial.faults]
    for word, kinds in (("killed", [signal.SIGKILL]), ("interrupted", SOFT)):
        struck = [trial for trial in done if trial.strikes and trial.kind in kinds]
        places = Counter(place_of(strike.point) for trial in struck for strike in trial.strikes)
        equal = sum(not trial.faults for trial in struck)
        print(f"{equal} of {len(struck)} {word} runs are equal to undisturbed ones, {sum(t.has_resumed for t in struck)} "
              f"from a checkpoint, struck {places.total()} times: {', '.join(f'{place} {count}' for place, count in places.most_common())}")  # fmt: skip
    if not bad:
        shutil.rmtree(top)
        return 0
    for trial in bad:
        print(f"see {top}; again: python tests/kills.py --kills {options.kills} --interruptions {options.interruptions}"
              f" --seed {options.seed} --variants {shlex.join(options.variants)} --only '{trial.name}'")  # fmt: skip
    return 1


if __name__ == "__main__":
    sys.exit(main())
