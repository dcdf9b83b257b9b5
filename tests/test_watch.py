"""lowmem-grpo watch: what it reads of a run that goes on, what it shows of it, and that it disturbs nothing."""

import datetime
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len

from lowmem_grpo import cli
from lowmem_grpo.errors import InputError
from lowmem_grpo.output.lock import lock_folder, releasing_locks
from lowmem_grpo.run.log import write_completions
from lowmem_grpo.terminal import bar
from lowmem_grpo.watch import log as log_module
from lowmem_grpo.watch.chart import chart, in_columns, sparkline
from lowmem_grpo.watch.log import MOST_POINTS, Curve, Log
from lowmem_grpo.watch.run import WatchedRun
from lowmem_grpo.watch.view import View
from lowmem_grpo.watch.watch import Watched, watch

EVIL = "a\x1b[2J\rb\u202e\u0007 \U0001f600\u4e16\u754c[red]x[/red]\n\t" + "long " * 400
NOW = datetime.datetime.now(datetime.UTC)


def step_line(step, **more):
    return {
        "step": step, "reward": step / 10, "loss": 1 / step, "accuracy": 0.5, "kl": None, "entropy": 0.1,
        "completions/mean_length": 20.0 + step, "step_time": 2.0, "tokens_per_s/rollout": 1000.0,
        "memory/rollout/peak_mib": 1024.0 + step, "memory/update/peak_mib": 3072.0, "rewards/a/mean": 0.5,
        "rewards/b/mean": step / 20, "num_tokens": 10 * step, **more,
    }  # fmt: skip


def write_lines(path, lines, mode="w"):
    with path.open(mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder, kind="grpo", steps=6, ended=None, holder=None, text="hello"):
    """A run's folder, as by hand. `holder` is the process that its lock names."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "kind": kind, "model": text, "rewards": ["a", "b"], "total_steps": 10, "resumed": [{"step": 3}],
        "ended": {"at": (NOW - datetime.timedelta(hours=1)).isoformat(), **ended} if ended else None,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about), encoding="utf-8")
    (folder / "plan.json").write_text(json.dumps({"peaks": {"rollout": 2**30, "update": 2**33}}), encoding="utf-8")
    (folder / f"{kind}_config.json").write_text(json.dumps({"max_steps": 10, "adv_estimator": "gae"}), encoding="utf-8")
    evaluation = {"eval_reward": 0.25, "eval_reward/ci_low": 0.2, "eval_reward/ci_high": 0.3}
    change = {
        "eval_reward/difference": 0.5,
        "eval_reward/difference/ci_low": 0.4,
        "eval_reward/difference/ci_high": 0.6,
    }
    lines = [{"step": 0, **evaluation}, *map(step_line, range(1, steps + 1))]
    lines += [
        {"step": steps, "doctor": "x", "text": text},
        {"step": steps, **evaluation, "eval_reward": 0.75, **change},
    ]
    write_lines(folder / "metrics.jsonl", lines)
    sample = {"step": steps, "prompt": text, "completion": text, "reward": 1.0, "rewards": {text: 1.0, "b": None}}
    write_lines(folder / "samples.jsonl", [{**sample, "step": 0, "prompt": "earlier"}, sample])
    if holder is not None:
        (folder / "run.lock").write_text(f"process {holder} on {socket.gethostname()}\n", encoding="utf-8")
    return folder


def shown(folder, width=100, height=None, **settings):
    run = WatchedRun(folder)
    run.refresh()
    return View(width, **settings).of_run(run, height)


def text_of(folder, **settings):
    return "\n".join(line.plain for line in shown(folder, **settings))


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_log_is_followed_line_by_line_and_a_torn_line_waits_for_its_end(tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    assert not log.read() and log.step_time is None
    write_lines(log.path, [step_line(1)])
    with log.path.open("a") as file:
        file.write('{"step": 2, "rew')
    assert log.read() and log.last["step"] == 1
    assert not log.read()
    with log.path.open("a") as file:
        file.write('ard": 7.0}\n{"step": oops}\n[]\n')
    assert log.read() and (log.last["step"], log.last["reward"]) == (2, 7.0)
    assert log.curves["reward"].values() == [(1, 0.1), (2, 7.0)] and "kl" not in log.curves
    assert log.peaks == {"rollout": 1025.0, "update": 3072.0} and log.step_time == 2.0


def test_a_log_that_is_replaced_by_a_resumed_run_or_cut_is_read_anew(tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    write_lines(log.path, map(step_line, range(1, 9)))
    log.read()
    write_lines(tmp_path / "new", map(step_line, range(1, 4)))
    os.replace(tmp_path / "new", log.path)
    assert log.read() and log.last["step"] == 3 and len(log.curves["reward"].values()) == 3
    write_lines(log.path, [step_line(1)])
    assert log.read() and log.last["step"] == 1
    log.path.unlink()
    assert not log.read() and log.last["step"] == 1


def test_of_a_long_log_a_part_of_the_steps_is_read_and_every_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "MOST_BYTES", 20_000)
    monkeypatch.setattr(log_module, "CHUNK", 3_000)
    read, own = [], log_module.read_line
    monkeypatch.setattr(log_module, "read_line", lambda text: read.append(text) or own(text))
    log = Log(tmp_path / "metrics.jsonl")
    lines = [step_line(step) for step in range(1, 3001)]
    lines[1234:1234] = [{"step": 1234, "doctor": "x", "text": "y"}, {"step": 1234, "eval_reward": 1.0}]
    write_lines(log.path, lines)
    assert log.read() and log.is_thinned and len(read) < 80
    assert log.last["step"] == 3000 and log.findings and log.evaluations[0]["step"] == 1234
    read.clear()
    write_lines(log.path, [step_line(3001)], "a")
    assert log.read() and len(read) == 1 and log.last["step"] == 3001


def test_a_curve_of_many_steps_keeps_their_means(tmp_path):
    curve = Curve()
    for step in range(1, 5001):
        curve.add(step, float(step))
    values = curve.values()
    assert len(values) <= MOST_POINTS and curve.steps_a_point == 16
    assert values[0] == (0, 8.0) and values[1] == (16, 23.5), "of steps 1 to 15, and of 16 to 31"
    assert sum(count for _, _, count in curve.points) == 5000


def test_a_curve_is_drawn_from_its_least_value_to_its_greatest():
    rising = chart([(step, float(step)) for step in range(8)], 4, 2, is_ascii=False)
    assert rising == ["  ⡠⠊", "⡠⠊  "]
    assert chart([(1, 5.0), (2, 5.0)], 2, 3, is_ascii=True) == ["  ", "**", "  "]
    assert chart([(1, 0.0), (9, 1.0)], 3, 3, is_ascii=True) == ["  *", " * ", "*  "], "what lies between is drawn"
    assert chart([], 3, 2, is_ascii=False) == ["   ", "   "]
    assert in_columns([(0, 1.0), (1, 3.0), (10, 2.0)], 2) == [2.0, 2.0], "a mean of steps that share a column"
    assert sparkline([(1, 0.0), (2, 7.0)], 9, is_ascii=False) == "▁█" and sparkline([], 9, is_ascii=True) == ""
    assert bar(0.5, 4, is_ascii=True) == "==--" and bar(7.0, 4, is_ascii=True) == "===="


@pytest.mark.parametrize(
    "ended, holder, word, is_over",
    [
        ({"how": "finished"}, None, "finished", True), ({"how": "stopped"}, None, "stopped", True),
        ({"how": "failed", "why": "a disk"}, None, "failed", True), (None, "dead", "cut off", True),
        (None, "alive", "running", False), ({"how": "finished"}, "alive", "starting", False),
        ({"how": "finished", "at": (NOW + datetime.timedelta(hours=1)).isoformat()}, "alive", "finished", True),
    ],
)  # fmt: skip
def test_a_run_stands_as_its_lock_and_its_end_say(tmp_path, ended, holder, word, is_over):
    process = {"dead": dead_process(), "alive": os.getpid()}.get(holder)
    run = WatchedRun(make_run(tmp_path / "run", ended=ended, holder=process))
    run.refresh()
    assert (run.state.word, run.state.is_over) == (word, is_over)
    assert ("a disk" in run.state.text) == (word == "failed")
    assert ("killed, or on another machine" in run.state.text) == (word == "cut off")


def test_a_running_run_is_shown_with_all_that_its_files_say(tmp_path):
    text = text_of(make_run(tmp_path / "run", holder=os.getpid()))
    for words in (
        "running", "PPO of hello", "step 6 of 10", "60 %", "2 s a step", "8 s left", "1,000 tokens/s rollout",
        "resumed at step 3", "reward  0.600", "tokens a completion  26.0", "held out, at step 6",
        "0.750 [0.200, 0.300]  +0.500 [+0.400, +0.600]  before 0.250 [0.200, 0.300]", "doctor, step 6: hello",
        "rollout 1.01 of 1.00 planned", "update 3.00 of 8.00 planned", "held out, at step 6", "hello 1.000  b -",
    ):  # fmt: skip
        assert words in text, words
    assert "KL" not in text and "earlier" not in text


@pytest.mark.parametrize("width", [40, 60, 80, None])
def test_three_intervals_are_there_whole_however_narrow_the_terminal_and_in_a_file_on_one_line(tmp_path, width):
    lines = [
        line.plain for line in shown(make_run(tmp_path / "run", ended={"how": "failed", "why": "so " * 99}), width)
    ]
    held_out = lines[lines.index("held out, at step 6") + 1 :]
    whole = "  reward  0.750 [0.200, 0.300]  +0.500 [+0.400, +0.600]  before 0.250 [0.200, 0.300]"
    split = {None: 1, 80: 2, 60: 2, 40: 3}[width]
    assert "  ".join([held_out[0], *map(str.lstrip, held_out[1:split])]) == whole and not held_out[split]
    assert any(line.startswith("after step 6: so so") for line in lines)
    assert max(map(len, lines)) > 200 if width is None else all(cell_len(line) <= width for line in lines)


@pytest.mark.parametrize("kind, title", [("sft", "loss  0.167"), ("reward", "accuracy  0.500")])
def test_supervised_runs_and_reward_models_have_their_own_curves(tmp_path, kind, title):
    text = text_of(make_run(tmp_path / "run", kind))
    assert title in text and "tokens a completion" not in text


@pytest.mark.parametrize("is_ascii", [False, True])
def test_a_view_fits_its_terminal_and_moves_no_cursor_whatever_the_texts(tmp_path, is_ascii):
    folder = make_run(tmp_path / "run", text=EVIL)
    for width, height in ((15, 3), (40, 10), (80, 24), (120, 50), (250, 200)):
        lines = shown(folder, width, height, is_ascii=is_ascii)
        assert len(lines) <= height and all(cell_len(line.plain) <= width for line in lines)
        text = "".join(line.plain for line in lines)
        assert text.isascii() if is_ascii else text.isprintable()
    assert "[red]x[/red]" in text, "and no markup is read"


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b'{"a": ',
        b"\xff\x00",
        b'{"ended": 3, "resumed": {}, "kind": []}',
        b'{"resumed": 3, "total_steps": 1%s}' % (b"0" * 400),
    ],
)
def test_files_that_are_damaged_or_missing_cost_what_they_would_say(tmp_path, damage):
    folder = make_run(tmp_path / "run")
    for path in [*folder.iterdir()]:
        path.write_bytes(damage)
        assert text_of(folder)
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "reward": "x", "step_time": [], "eval_x": {}}\n{"step": 2}\n{"step": 1%s}\n' % ("0" * 400)
    )
    for path in folder.glob("*.json"):
        path.unlink()
        assert text_of(folder)


def test_the_last_steps_best_and_worst_completion_are_shown_where_they_are_logged(tmp_path):
    folder = make_run(tmp_path / "run")
    chat = [{"role": "user", "content": "how\nmuch"}]
    table = {
        "prompt": [chat, chat, chat, [{"role": "user", "content": "second"}]], "completion": ["mean", "worst", "best", "not"],
        "a": [0.5, 0.0, 1.0, 9.0], "advantage": [0.0, -1.0, 1.0, 2.0],
    }  # fmt: skip
    write_completions(folder, 6, table)
    text = text_of(folder)
    assert "step 6: of the first prompt, the best and the worst completion of 3" in text and "how ↵ much" in text
    assert text.index("a 1.000") < text.index("best", text.index("how")) < text.index("a 0.000") < text.rindex("worst")
    assert "second" not in text and "hello 1.000" not in text
    (folder / "completions/completions_00006.parquet").write_bytes(b"PAR1 no more")
    assert text_of(folder)


def test_a_pipeline_is_shown_by_its_phases_and_the_one_that_goes_on(tmp_path):
    for name in ("00-base", "01-cold", "02-reason", "03-last"):
        (tmp_path / name).mkdir()
    make_run(tmp_path / "01-cold", "sft", ended={"how": "finished"})
    (tmp_path / "01-cold/done.json").write_text("{}")
    measured = {"eval_pass@1": 0.03, "eval_pass@1/ci_low": 0.01, "eval_pass@1/ci_high": 0.06, "eval_x": None}
    (tmp_path / "00-base/evaluation.json").write_text(json.dumps({"metrics": measured}))
    (tmp_path / "01-cold/evaluation.json").write_text(json.dumps({"metrics": {**measured, "eval_pass@1": 0.05}}))
    (tmp_path / "02-reason/evaluation.json").write_text('{"metrics": 3}')
    make_run(tmp_path / "02-reason", holder=os.getpid())
    to_come = [{"folder": "03-last"}, {"folder": "04-more"}, {"folder": "../05-x"}, 3]
    (tmp_path / "pipeline.json").write_text(json.dumps({"phases": to_come}))
    watched = Watched(tmp_path)
    watched.refresh()
    lines = [line.plain for line in watched.lines(80, None, is_ascii=True)]
    assert lines[:3] == [
        f"{tmp_path.name}  a pipeline  not running",
        "  00-base  pass@1 0.030 [0.010, 0.060]", "  01-cold  done  pass@1 0.050 [0.010, 0.060]",
    ]  # fmt: skip
    assert lines[3:7] == ["> 02-reason  running", "  03-last  begun", "  04-more  not begun", ""]
    assert "02-reason" in lines[7]
    assert not watched.is_over and "step 6 of 10" in "\n".join(lines)


def test_a_pipeline_of_which_no_phase_has_begun_is_shown_by_what_is_to_come(tmp_path, capsys):
    (tmp_path / "pipeline.json").write_text('{"phases": [{"folder": "01-cold", "kind": "sft"}]}')
    with releasing_locks():  # while the base is evaluated
        lock_folder(tmp_path)
        watch(tmp_path, once=True)
    assert capsys.readouterr().out == f"{tmp_path.name}  a pipeline  running\n  01-cold  not begun\n"


def test_looking_writes_nothing_locks_nothing_and_needs_no_torch(tmp_path):
    folder = make_run(tmp_path / "run")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    program = (
        "import sys, resource\nfrom lowmem_grpo.cli import main\n"
        "status = main(['watch', sys.argv[1]])\nused = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(status, 'torch' in sys.modules, used.ru_utime + used.ru_stime, file=sys.stderr)"
    )
    environment = {**os.environ, "COLUMNS": "70"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, env=environment, encoding="utf-8"
    )
    status, has_torch, cpu_s = done.stderr.split()
    assert (status, has_torch) == ("0", "False") and float(cpu_s) < 1.5
    assert "cut off" in done.stdout and "\x1b" not in done.stdout
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
    with releasing_locks():  # of a run that begins while it is looked at
        run = WatchedRun(folder)
        run.refresh()
        lock_folder(folder)
        run.refresh()
        assert run.state.word == "running"


def test_a_folder_that_holds_no_run_is_an_error_or_is_waited_for(tmp_path, capsys):
    for folder in (tmp_path / "gone", tmp_path):
        assert cli.main(["watch", str(folder)]) == 2
        assert f"{folder} holds no run" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError):
        watch(tmp_path / "file", once=True)
    make_run(tmp_path / "run")
    watch(tmp_path / "run", wait=True)
    assert "step 6 of 10" in capsys.readouterr().out


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("lowmem_grpo.watch.watch.is_run", refuse)
    with pytest.raises(InputError, match=r"cannot be read .*Permission denied"):
        watch(make_run(tmp_path / "run"), once=True)


class Terminal:
    """lowmem-grpo watch in a terminal of its own; `text` is what it has written so far."""

    def __init__(self, *arguments):
        self.fd, other = pty.openpty()
        command = [sys.executable, "-m", "lowmem_grpo.cli", "watch", *arguments]
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(command, stdout=other, stderr=subprocess.PIPE, env=environment)
        os.close(other)
        self.text = ""

    def read_to(self, words):
        """Read until these words, or the end where they are None."""
        deadline = time.monotonic() + 60
        while (words is None or words not in self.text) and time.monotonic() < deadline:
            try:
                self.text += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                break
        assert words is None or words in self.text


def test_a_run_is_watched_until_its_end_and_then_stays_on_the_terminal(tmp_path):
    folder = make_run(tmp_path / "run", holder=os.getpid())
    terminal = Terminal(str(folder))
    terminal.read_to("step 6 of 10")
    assert "\x1b[?1049h" in terminal.text, "the terminal is another while it goes on"
    write_lines(folder / "metrics.jsonl", [step_line(7)], "a")
    terminal.read_to("step 7 of 10")
    make_run(folder, steps=10, ended={"how": "finished"})
    (folder / "run.lock").unlink()
    terminal.read_to(None)
    last = terminal.text.rpartition("\x1b[?1049l")[2]
    assert "finished" in last and "step 10 of 10" in last and terminal.process.wait(20) == 0


def test_ctrl_c_ends_watching_in_silence(tmp_path):
    terminal = Terminal(str(make_run(Path(tmp_path) / "run", holder=os.getpid())))
    terminal.read_to("step 6 of 10")
    terminal.process.send_signal(signal.SIGINT)
    terminal.read_to(None)
    _, said = terminal.process.communicate(timeout=20)
    assert terminal.process.returncode == 130 and said == b"" and terminal.text.rstrip().endswith("\x1b[?1049l")
