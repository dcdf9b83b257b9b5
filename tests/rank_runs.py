"""What test_ranks has its processes do: whole trainings that torchrun would have started, and how they end."""

import contextlib
import io
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import psutil
import torch
from ranks import WAIT_S, forking
from tiny_models import DEMO_MODEL
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage] # in its docs

from lowmem_grpo import RewardConfig, SFTConfig, distributed, sft, train, train_reward_model
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.demo import task
from lowmem_grpo.output import folder
from lowmem_grpo.run import interruption

LENGTHS = (1, 9, 2, 3, 12, 1, 4)  # of uneven examples
COMMON = {
    "use_cpu": True, "bf16": False, "learning_rate": 1e-3, "gradient_checkpointing": False, "doctor": "off",
    "save_steps": 1,
}  # fmt: skip


def each_of(size: int, work: Callable, *given: Any) -> list[tuple[int, Any]]:
    """What work(*given) returned in each of `size` processes, or raised there, behind the exit status."""
    context = forking()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [context.Pipe() for _ in range(size)]
    started = [
        context.Process(target=_run, args=(rank, size, port, theirs, work, given), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    found = []
    for process in started:
        process.start()
    for ours, theirs in pipes:
        theirs.close()
        with contextlib.suppress(EOFError):
            assert ours.poll(WAIT_S), "a process does not answer"
            found.append(ours.recv())
            continue
        found.append(None)  # it was killed
    for process in started:
        process.join(WAIT_S)
        assert process.exitcode is not None, "a process does not end"
    return [(process.exitcode or 0, value) for process, value in zip(started, found, strict=True)]


def _run(rank: int, size: int, port: int, pipe: Any, work: Callable, given: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    said, error, speaks = io.StringIO(), None, False
    with contextlib.redirect_stderr(said):
        try:
            found = work(*given)
        except BaseException as raised:
            found, error = None, f"{type(raised).__name__}: {raised}"
            speaks = getattr(raised, "speaks", False)
            said.write(traceback.format_exc() if isinstance(raised, AssertionError) else "")
    pipe.send({"found": found, "error": error, "said": said.getvalue(), "speaks": speaks})


def examples() -> list[dict[str, Any]]:
    """Prompts with completions of many lengths, some of another weight."""
    problems = task.splits()[0]
    return [
        {"prompt": task.question(problem), "completion": task.worked(problem)[: 3 * length], "weight": 1.0 + n % 2}
        for n, (problem, length) in enumerate(zip(problems, LENGTHS * 4, strict=False))
    ]


def pairs() -> list[dict[str, Any]]:
    """Pairs of a longer and a shorter text, of many lengths."""
    return [
        {"prompt": row["prompt"], "chosen": row["completion"] + "7", "rejected": row["completion"][: n % 5 + 1]}
        for n, row in enumerate(examples())
    ]


def learn_examples(output_dir: str, strike: Callable | None = None, **settings: Any) -> dict[str, Any]:
    """A run of sft()."""
    given = {**COMMON, "max_steps": 3, "examples_per_step": 7, "output_dir": output_dir, **settings}
    eval_rows = examples()[:5] if "eval_steps" in given else None
    result = sft(str(DEMO_MODEL), examples(), eval_rows, SFTConfig(**given), callbacks=strike or ())
    return {"history": result.history, "eval_history": result.eval_history}


def learn_pairs(output_dir: str, **settings: Any) -> dict[str, Any]:
    """A run of train_reward_model()."""
    given = {**COMMON, "max_steps": 3, "pairs_per_step": 5, "output_dir": output_dir, **settings}
    result = train_reward_model(str(DEMO_MODEL), pairs(), pairs()[:5], RewardConfig(**given))
    return {"history": result.history, "eval_history": result.eval_history}


def variety(completions, **given):
    """How many different characters a completion has."""
    return [float(len(set(messages[0]["content"]))) for messages in completions]


def sample_and_learn(output_dir: str, strike: Callable | None = None, **settings: Any) -> dict[str, Any]:
    """A run of train()."""
    given = {
        **COMMON, "max_steps": 4, "prompts_per_step": 3, "num_generations": 2, "max_completion_length": 8,
        "output_dir": output_dir, "lora_dropout": 0.1, **settings,
    }  # fmt: skip
    rows = task.rows(task.splits()[0][:8])
    result = train(str(DEMO_MODEL), variety, rows, config=GRPOConfig(**given), callbacks=strike or ())
    return {"history": result.history, "random": torch.get_rng_state().tolist()}


def rank() -> int:
    return int(os.environ["RANK"])


def learn_with_its_own(output_dir: str) -> dict[str, Any]:
    """A run of sft() with a seed and an output_dir that each process has for itself."""
    return learn_examples(f"{output_dir}/{rank()}", seed=rank())


def learn_with_its_own_evaluation(folder: str) -> None:
    """A run of sft() that each process evaluates on other examples, in a current folder of its own."""
    os.chdir(f"{folder}/{rank()}")
    config = SFTConfig(**COMMON, max_steps=1, examples_per_step=2, output_dir="out", resume_from_checkpoint="auto")
    sft(str(DEMO_MODEL), examples(), examples()[rank() : rank() + 2], config)


def join_twice() -> list[list[int]]:
    """The ranks that came together, two times, in a store that outlives both, as torchrun's agent has one."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    port = int(os.environ["MASTER_PORT"])
    agent = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if rank() == 0 else None
    found = []
    for _ in range(2):
        if rank() == 0:
            time.sleep(0.5)  # while rank 1 looks for its address
        with distributed.joined(torch.device("cpu")):
            found.append(distributed.gathered(rank()))
    del agent
    return found


def enough_for_rank_1(step, metrics, policy) -> None:
    if rank() == 1:
        raise StopIteration


def stop_rank_1(step, metrics, policy) -> None:
    if step == 2 and rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def kill_rank_1(step, metrics, policy, killed: int = 1) -> None:
    """Kill rank 1, and then end rank 0 as torchrun does, before it waits for rank 1."""
    if step != 2:
        return
    if rank() == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    while distributed._is_alive(distributed._processes[killed]):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def hang_on_rank_1(step, metrics, policy) -> None:
    """Have rank 1 hang in the next backward, and rank 0 get SIGTERM once it waits for it."""
    if step != 2:
        return
    interruption.OTHERS_COME_S = distributed.PARTING_S = 0.3
    if rank() == 1:
        next(iter(policy.parameters_of(policy.adapter).values())).register_hook(_hang)
    else:
        threading.Thread(target=_end_once_it_waits, daemon=True).start()


def _hang(gradient) -> None:
    psutil.Process(distributed._processes[0]).wait(WAIT_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _end_once_it_waits() -> None:
    while distributed._while_waiting is None:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def fail_on_rank_1(step, metrics, policy) -> None:
    if step == 2 and rank() == 1:
        raise KeyError("of rank 1")


def on_a_full_disk(output_dir: str) -> dict[str, Any]:
    """A run whose disk refuses every folder to rank 0; no other rank writes one."""

    def refuse(path):
        assert rank() == 0
        raise OSError(28, "No space left on device", str(path))

    folder._flush = refuse
    return learn_examples(output_dir)
