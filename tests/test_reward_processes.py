import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import FunctionType

import pytest

from lowmem_grpo.rewards import RewardRunner, in_processes
from lowmem_grpo.rewards.isolation import workers

MODULE = """
import os, pathlib, time

def score(completions, gold, prompts, completion_ids, trainer_state, log_metric, log_extra, **kwargs):
    print("a worker's own output goes nowhere")
    completion, = completions
    log_metric("letters", len(completion))
    log_extra("pid", [os.getpid()])
    if completion == "hang":
        time.sleep(600)
    if completion == "die":
        os._exit(0)
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "two":
        return [1.0, 2.0]
    if completion == "meet":  # comes back once three others have come too
        pathlib.Path(f"{__file__}.{os.getpid()}").touch()
        while len(list(pathlib.Path(__file__).parent.glob("own_rewards.py.*"))) < 4:
            time.sleep(0.01)
    if completion == "None":
        return [None]
    return [float(completion == gold[0]) + trainer_state.global_step + len(completion_ids[0])]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


def score(function, completions, gold=None):
    runner = RewardRunner([function], timeout_s=60)
    columns = {"gold": gold or completions}
    return runner(["p"] * len(completions), completions, [[7]] * len(completions), columns, 3)


def test_each_completion_is_scored_in_a_worker(module):
    scores = score(in_processes(f"{module}.score", workers=2), ["a", "bb", "None"], ["a", "x", "y"])
    assert scores.rewards[:2, 0].tolist() == [5.0, 4.0] and scores.rewards[2].isnan()
    assert scores.metrics["letters"] == 7 / 3 and scores.metrics["rewards/score/failures"] == 0
    assert os.getpid() not in scores.extra_columns["pid"]


def test_one_that_hangs_dies_or_raises_costs_no_other_its_reward(module, caplog):
    function = in_processes(f"{module}.score", workers=2, timeout=1.0)
    score(function, ["a", "a"])  # the workers are up
    scores = score(function, ["a", "hang", "die", "raise", "two", "b"])
    assert scores.rewards[:, 0].isnan().tolist() == [False, True, True, True, True, False]
    assert scores.metrics["rewards/score/failures"] == 4
    for said in ("no reply within 1 s", "worker process died", "KeyError: 'no such thing'"):
        assert said in caplog.text


def test_the_runners_own_limit_stops_the_workers_too(module):
    function = in_processes(f"{module}.score", workers=1, timeout=30.0)
    score(function, ["a"])
    runner = RewardRunner([function], timeout_s=0.5)
    assert runner(["p"], ["hang"], [[7]], {"gold": ["a"]}, 0).rewards.isnan().all()
    assert score(function, ["a"]).rewards.tolist() == [[5.0]], "it does not wait for the one that hangs"


def test_completions_are_scored_at_once(module):
    scores = score(in_processes(f"{module}.score", workers=4, timeout=60.0), ["meet"] * 4)
    assert scores.metrics["rewards/score/failures"] == 0


def at_the_top(completions, **kwargs):
    return [1.0 for _ in completions]


def test_what_no_process_can_import_is_refused():
    main = FunctionType(at_the_top.__code__, {})
    main.__module__ = "__main__"
    for function in (lambda **_: [], main, len.__call__):
        with pytest.raises(ValueError, match="in_processes cannot send.*module.function"):
            in_processes(function)
    with pytest.raises(ValueError, match="needs a function as module.function"):
        in_processes("score")


def test_a_module_that_is_not_there_stops_the_run_at_its_start():
    with pytest.raises(ValueError, match="ModuleNotFoundError.*no_such_module"):
        RewardRunner([in_processes("no_such_module.f")], 60).try_out(["p"], {})


@pytest.mark.parametrize("busy", ["while True: pass", "sum(range(10**12))", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_busy_or_stopped_worker_dies_with_its_trainer(busy, tmp_path):
    (tmp_path / "own_rewards.py").write_text(
        "import os, pathlib, signal\n"
        "def score(**kwargs):\n"
        "    pathlib.Path('part').write_text(str(os.getpid()))\n"
        "    os.rename('part', 'pid')\n"
        f"    {busy}\n"
    )
    folder = Path(shutil.copytree(Path(workers.__file__).parent, tmp_path / "alone"))  # it imports no PyTorch there
    program = (
        "import pathlib, workers\n"
        f"pool = workers.WorkerPool(pathlib.Path({str(folder / 'function_worker.py')!r}), 1)\n"
        "pool.ask_all([('own_rewards', 'score', {'trainer_state': {}})], 600, 600)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(folder)])
    trainer = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    until((tmp_path / "pid").exists)
    worker = int((tmp_path / "pid").read_text())
    trainer.kill()
    trainer.wait()
    until(lambda: not is_running(worker))


def until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
