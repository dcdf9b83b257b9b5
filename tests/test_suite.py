"""`lowmem-grpo bench`, what it says of results, and the documents made from them."""

import argparse
import functools
import importlib
import json
import math
import multiprocessing
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowmem_grpo.benchmarks import forked, measure, report, suite, trainers
from lowmem_grpo.cli import main

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
FORK = multiprocessing.get_context("fork")
DOCUMENTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}


@pytest.fixture(autouse=True)
def no_forks_afterwards(monkeypatch):
    """What preload() finds out of this process ends with a test: others compute in it."""
    monkeypatch.setattr(forked, "_threads", 0)


@pytest.fixture
def part_of(monkeypatch):
    """A function from the main() of a program to a part, which is a fork of this process."""
    monkeypatch.setattr(forked, "preload", lambda *modules: None)
    monkeypatch.setattr(forked, "serves", lambda: True)

    def make(main, arguments="", **settings):
        monkeypatch.setitem(sys.modules, f"lowmem_grpo.benchmarks.{main.__name__}", SimpleNamespace(main=main))
        return suite.Part(main.__name__, arguments, **settings)

    return make


def write(argv, found):
    output = argv[-1].removeprefix("--output=")
    Path(output).write_text(json.dumps(found))


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_a_document_has_what_the_results_say(name):
    assert report.fill(DOCUMENTS[name], RESULTS) == DOCUMENTS[name]


def test_every_result_that_is_shown_is_shown_whole_once():
    places = [match for text in DOCUMENTS.values() for match in report.PLACE.finditer(text)]
    whole = [(place["file"], place["part"]) for place in places if not place["rows"]]
    assert len(whole) == len(set(whole)) >= 18
    assert {(place["file"], place["part"]) for place in places} == set(whole)


def test_a_table_is_made_anew_from_its_part(tmp_path):
    table = {"benchmark": "sampling_error", "command": "c", "date": "d", "commit": "0123456789", "versions": {
        "torch": "1", "transformers": "2", "trl": None, "liger-kernel": "3"},
        "machine": {"cpu": "x", "threads": 1, "cores": 2},
        "errors": [{"dtype": "bf16", "weights": "4bit", "kv": "full", "mean": 0.001, "max": 0.5}]}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"parts": {"error": table}}))
    text = "before\n<!-- a.json error -->\nold\n<!-- end -->\nafter <!-- end -->"
    filled = report.fill(text, tmp_path)
    assert "| bf16  |    4bit |            full | 1.0e-03 | 5.0e-01 |" in filled and "old" not in filled
    assert "`c` on x, 1 of 2 cores, d, commit 0123456, torch 1, transformers 2, liger-kernel 3." in filled
    assert filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter <!-- end -->")
    with pytest.raises(ValueError, match=r"a\.json has no part none; it has error"):
        report.fill("<!-- a.json none -->\n<!-- end -->", tmp_path)
    with pytest.raises(ValueError, match=r"asks for b\.json, which is not in"):
        report.fill("<!-- b.json none -->\n<!-- end -->", tmp_path)


def test_a_place_with_a_star_has_the_newest_result_or_says_that_there_is_none(tmp_path):
    def save(file, date, mean, **part):
        error = {"benchmark": "sampling_error", "command": "c", "date": date, "commit": "0123456789", "versions": {
            "torch": "1", "transformers": "2", "trl": None, "liger-kernel": None}, "machine": {"gpu": "H9"},
            "errors": [{"dtype": "bf16", "weights": "4bit", "kv": "full", "mean": mean, "max": 0.5}]}  # fmt: skip
        (tmp_path / file).write_text(json.dumps({"parts": {"error": error, **part}}))

    text = "<!-- nvidia-*.json error -->\n<!-- end -->"
    assert report.fill(text, tmp_path) == "<!-- nvidia-*.json error -->\n\nNot measured yet.\n\n<!-- end -->"
    save("nvidia-a.json", "2026-11-26", 0.1)
    save("nvidia-b.json", "2026-11-25", 0.2)
    save("amd.json", "2026-11-27", 0.3)
    assert "| 1.0e-01 |" in report.fill(text, tmp_path)
    save("nvidia-b.json", "2026-11-26", 0.2)
    assert "| 2.0e-01 |" in report.fill(text, tmp_path), "of one date that of the last file"
    lost = {"error": {"incomplete": "out of time"}}
    (tmp_path / "nvidia-c.json").write_text(json.dumps({"parts": lost}))
    assert "| 2.0e-01 |" in report.fill(text, tmp_path), "a part without a result has none"
    assert report.fill(report.fill(text, tmp_path), tmp_path) == report.fill(text, tmp_path)


def test_the_summary_has_a_row_for_every_part_of_the_programme(tmp_path):
    known = {name for call in suite.PROGRAMME.values() for name in call}
    assert {part for part, _ in report.SUMMARY.values()} == known
    text = report.fill("<!-- nvidia-*.json summary -->\n<!-- end -->", tmp_path)
    assert text.count(report.NOT_YET) == len(report.SUMMARY)
    at = {"benchmark": "x", "date": "2026-11-26", "machine": {"gpu": "H9"}, "commit": "0123456789"}
    run = {"step_s": 2.0, "peak_mib": 1500.0}
    times = {"train_s": {"median": 3.0}, "score_s": {"median": 1.5}}
    head = {"ours": times, "two bare GEMMs": {"train_s": {"median": 2.0}, "score_s": {"median": 1.0}}}
    update = {"seconds": {"median": 0.5}, "peak_bytes": 2**31}
    plan = {"fits": True, "peak": 7.6e9, "changes": []}
    peaks = {"memory/update/peak_mib": 6000.0, "memory/out_of_memory": 0, "rollout/out_of_memory": 0}
    parts = {
        "decode-1.5b": {**at, "results": {"ours": {"tokens_per_s": 21234.5}}},
        "decode-7b": {**at, "results": {}},
        "rollout-1.5b": {**at, "lengths": [{"results": {"ours": {"tokens_per_s": 8000.0}}}]},
        "step-1.5b": {**at, "results": {"lowmem_grpo": [run]}},
        "step-beside": {**at, "results": {"lowmem_grpo": [run], "TRL": [{"failed": "not done in 35 s"}]}},
        "head-tiles": {**at, "shapes": [{"results": head}]},
        "update-1.5b": {**at, "results": {"packed": update, "own": {"failed": "out of memory"}}},
        "update-7b": {**at, "results": {"packed": update}},
        "budget-1.5b": {**at, "results": [{"plan": plan}]},
        "overlap-1.5b": {**at, "chosen": True, "results": {"1": {"steps": {"without": 3e-3, "with": 2.5e-3}}, "u": {}}},
        "budget-7b": {**at, "results": [{"plan": plan, "measured": peaks}]},
    }
    (tmp_path / "nvidia-a.json").write_text(json.dumps({"parts": parts}))
    rows = dict(line.strip("| ").split(" | ", 1) for line in report.summary(tmp_path, "nvidia-*.json").splitlines()[2:])
    found = {what.strip(): cells.split(" | ")[0].strip() for what, cells in rows.items()}
    assert found["64 even completions of a 1.5B model, in steps"] == "21,234 tokens/s"
    assert found["64 completions of 100 tokens in the mean, at most 256, in all"] == "8,000 tokens/s"
    assert found["a step of 4 x 8 x 128 tokens, 1.5B"] == "2.00 s, 1,500 MiB"
    overlapping = "a step of a 1.5B model by rows, without and with overlapping kernels"
    assert found[overlapping] == "1: 3.00 to 2.50 ms; chosen"
    beside = "lowmem_grpo: 2.00 s, 1,500 MiB; TRL: not done in 35 s"
    assert found["a step of 4 x 8 x 32 tokens, 1.5B, beside others"] == beside
    assert found["the head over two bare products, D 1536"] == "1.50, forward alone 1.50"
    assert found["the head over two bare products, D 3584"] == report.NOT_YET, "stopped before it"
    assert found["an update of 16,384 tokens, 1.5B, likewise"] == "0.50 s, 2,048 MiB; out of memory"
    assert found["an update of 16,384 tokens, 7B, likewise"] == report.NOT_YET, "measured before outlines"
    assert found["64 even completions of a 7B model, in steps"] == report.NOT_YET
    assert found["peak of a 1.5B model in 4 GB"] == report.NOT_YET, "predicted alone"
    assert found["peak of a 7B model in 8 GB"] == "7.6; measured 6.8 GB"


def test_a_place_may_ask_for_some_rows_and_columns():
    table = "| a  |  b | c, ms |\n| -- | -: | ----: |\n| x  |  1 |     2 |\n| yy | 30 |     4 |"
    several = f"{table}\n\n| another |\n| ------- |"
    assert report.narrowed(several, "yy", "c, ms") == "| a  | c, ms |\n| -- | ----: |\n| yy |     4 |"
    assert report.narrowed(several, "yy; x", "c, ms; b").splitlines()[2:] == [
        "| yy |     4 | 30 |",
        "| x  |     2 |  1 |",
    ]
    assert report.narrowed(several, "x; yy", None) == table
    for rows, columns, known in (("z", None, "x; yy"), ("x", "d", "a; b; c, ms")):
        with pytest.raises(ValueError, match=f"the table has no '[zd]'; it has {known}"):
            report.narrowed(several, rows, columns)
    place = report.PLACE.search("<!-- a.json p-1: x; y, z | b; c, ms -->\n<!-- end -->")
    assert place is not None and place.group("part", "rows", "columns") == ("p-1", "x; y, z", "b; c, ms")


def test_pictures_are_drawn_from_whatever_parts_there_are(tmp_path):
    lengths = {"varied": "max_completion_length", "sizes": [8, 16], "results": {
        "lowmem_grpo": [{"seconds": 1.0, "peak_bytes": 2**20}, {"seconds": 2.0, "peak_bytes": 2**21}],
        "TRL": [{"seconds": 3.0, "peak_bytes": 2**22}, {"reason": "out of memory"}],
        "Liger": [{"reason": "not installed"}, {"reason": "not installed"}]},
        "work": {"prompt_length": 4, "max_completion_length": 0, "num_generations": 2, "vocabulary": 9}}  # fmt: skip
    scaling = {"benchmark": "bench_scaling", "machine": {"cpu": "x"}, "shape": "tiny", "sweeps": [lengths]}
    learning = {
        "benchmark": "bench_learning",
        "results": {"TRL": [{"failed": "?"}, {"evaluations": [[0, 0.1], [5, 0.9]]}]},
    }
    context = {"benchmark": "bench_context", "lengths": [8, 16], "predicted": {"a": {"defaults": [10**9, 2 * 10**9]}}}
    assert report.draw_all({"parts": {"lost": {"incomplete": "exit status 1"}}}, tmp_path / "none") == []
    for name, parts in {"one": [scaling], "all": [scaling, learning, context]}.items():
        drawn = report.draw_all({"parts": dict(enumerate(parts))}, tmp_path / name)
        texts = [path.read_text() for path in drawn]
        assert len(drawn) == (2 if name == "one" else 3) and all("<svg" in text for text in texts)
        assert "then out of memory" in texts[0]
        again = report.draw_all({"parts": dict(enumerate(parts))}, tmp_path / name)
        assert [path.read_text() for path in again] == texts


def test_what_is_wrong_with_a_result_is_said():
    good = {"seconds": {"median": 1.0, "low": 1.0, "high": 2.0}}
    assert not list(suite.faults({"results": {"ours": good, "TRL": {"failed": "not installed"}}}))
    assert not list(suite.faults({"ours": [{"reason": "out of memory"}, {"reason": "not tried: out of memory"}]}))
    assert list(suite.faults({"results": {"ours": {"failed": "RuntimeError"}}})) == [
        "/results/ours/failed: RuntimeError"
    ]
    assert list(suite.faults({"error": math.nan})) == ["/error: nan"]
    slow = {"seconds": {"median": 2000.0}}
    assert list(suite.faults({"results": {"ours": good, "TRL": slow}})) == ["/results: seconds between 1 and 2e+03"]
    plan = {"changes": [{"name": "token_budget", "reason": "smaller micro-batches"}]}
    assert not list(suite.faults({"results": [{"plan": plan}]})), "the planner's reasons are no failures"
    sizes = [{"seconds": 1e-3}, {"seconds": 100.0}]
    assert not list(suite.faults({"ours": sizes, "TRL": sizes})), "sizes are not compared with each other"
    runs = {"ours": [{"step_s": 1.0}], "TRL": [{"step_s": 0.0}]}
    assert ": step_s between 0 and 1" in list(suite.faults(runs))


def test_a_suite_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    """Each part costs 50 s of a clock of its own; the second of three is cut off where less than a minute is left."""
    clock, run = [0.0], []

    def run_part(part, allowed_s):
        run.append(part.arguments)
        clock[0] += 50
        return {"benchmark": part.module, "result": len(run)}, ""

    monkeypatch.setattr(suite, "parts", lambda *_: {name: suite.Part("measure", name) for name in "abc"})
    monkeypatch.setattr(suite, "run_part", run_part)
    monkeypatch.setattr(suite.time, "monotonic", lambda: clock[0])
    options = [f"--output_dir={tmp_path}", "--file=x.json"]
    assert suite.main(["--allowed_s=105", *options]) == 0
    assert run == ["a"] and "time is up, b, c left: call again" in capsys.readouterr().out
    assert suite.main(["--list", *options]) == 0
    assert capsys.readouterr().out.split("\n")[:3] == ["a  (done)", "b", "c"]
    assert suite.main(["--allowed_s=500", *options]) == 0
    assert run == ["a", "b", "c"] and "all done" in capsys.readouterr().out
    assert suite.main(["b", *options]) == 0 and len(run) == 3
    assert "b" in capsys.readouterr().out.splitlines()[0], "it is done"
    assert suite.main(["b", "--again", *options]) == 0
    found = json.loads((tmp_path / "x.json").read_text())["parts"]
    assert {name: document["result"] for name, document in found.items()} == {"a": 1, "b": 4, "c": 3}


def test_a_part_that_fails_or_takes_too_long_is_named_and_not_lost(tmp_path, monkeypatch, capfd, part_of):
    """And all that it began ends with it: each holds the end of a pipe for writing."""
    end, held = os.pipe()

    def bench_a(argv):
        write(argv, {"first": 1})
        {"refuses": lambda: sys.exit(2), "raises": lambda: 1 / 0, "leaves": lambda: os._exit(3),
         "killed": lambda: os.kill(os.getpid(), signal.SIGKILL)}[argv[0]]()  # fmt: skip

    def bench_b(argv):
        print("begun", flush=True)
        os.fork()
        signal.pause()

    ways = {
        "refuses": "exit status 2",
        "raises": "exit status 1",
        "leaves": "exit status 3",
        "killed": "exit status -9",
    }
    known = {**{way: part_of(bench_a, way) for way in ways}, "b": part_of(bench_b)}
    monkeypatch.setattr(suite, "parts", lambda *_: known)
    options = [f"--output_dir={tmp_path}", "--file=x.json"]
    assert suite.main([*ways, *options]) == 1
    said = capfd.readouterr().err
    assert all(f"{way}: {status}" in said for way, status in ways.items()) and "ZeroDivisionError" in said
    assert suite.main(["b", "--allowed_s=0.5", *options]) == 1
    assert "begun" in capfd.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())["parts"]
    assert {way: (found[way]["first"], found[way]["incomplete"]) for way in ways} == {
        way: (1, status) for way, status in ways.items()
    }
    assert not suite.is_done(found["leaves"], 9.0) and "out of time" in found["b"]["incomplete"]
    assert [suite.is_done(found["b"], allowed) for allowed in (0.1, 600.0, None)] == [True, False, False]
    os.close(held)
    assert select.select([end], [], [], 5)[0] and os.read(end, 1) == b"", "something of b is there still"
    os.close(end)


def test_an_interrupted_part_keeps_what_it_had_and_is_begun_anew(tmp_path, monkeypatch, capsys, part_of):
    """A real one: it writes a first result, and then gets Ctrl-C, as soon as the suite waits for its end.

    A shell starts what it runs in the background with SIGINT ignored, and Python leaves that so."""
    waits, wait = FORK.Event(), forked.wait

    def bench_a(argv):
        write(argv, {"first": 1})
        waits.wait(5)
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()

    monkeypatch.setattr(forked, "wait", lambda *given: (waits.set(), wait(*given)))
    monkeypatch.setattr(suite, "parts", lambda *_: {"a": part_of(bench_a), "b": suite.Part("bench_context")})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            suite.main([f"--output_dir={tmp_path}", "--file=x.json"])
    finally:
        signal.signal(signal.SIGINT, before)
    found = json.loads((tmp_path / "x.json").read_text())["parts"]
    assert ended.value.code == 130 and found["a"]["first"] == 1 and found["a"]["incomplete"] == "interrupted"
    assert "b" not in found and not suite.is_done(found["a"], None)
    assert "begins it anew" in capsys.readouterr().out


def test_a_part_is_a_fork_with_the_words_of_a_program_and_ends_at_once(monkeypatch, part_of):
    """Whatever a library does when an interpreter ends, such as to wait for a thread, is not done."""

    def bench_a(argv):
        threading.Thread(target=time.sleep, args=(60,)).start()
        words = measure.document("bench_a", argv, torch.device("cpu"))["command"]
        write(argv, {"command": words, "argv": sys.argv[1:-1], "parent": os.getppid(), "group": os.getpgrp()})

    found, wrong = suite.run_part(part_of(bench_a, "--only 'a b'"), 20)
    assert found and not wrong and found.pop("group") not in (os.getpgrp(), os.getpid())
    command = "python -m lowmem_grpo.benchmarks.bench_a --only 'a b'"
    assert found == {"command": command, "argv": ["--only", "a b"], "parent": os.getpid()}


def test_imports_leave_cuda_alone_and_forks_are_tried(tmp_path, monkeypatch):
    """With a stand-in for a GPU, which writes down who asks; and for bitsandbytes, whose import asks."""
    log = tmp_path / "log"

    def properties(device):
        log.open("a").write(f"{os.getpid()} ")
        if log.with_name("broken").exists():
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        return SimpleNamespace(name="H9", total_memory=2**30, major=9, minor=0)

    (tmp_path / "asks.py").write_text("import torch\ncapability = torch.cuda.get_device_capability(0)")
    monkeypatch.syspath_prepend(tmp_path)
    for name, stand_in in (
        ("is_available", lambda: True), ("is_initialized", lambda: False), ("current_device", lambda: 0),
        ("get_device_properties", properties),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(forked, "card", functools.cache(forked.card.__wrapped__))
    forked.preload("asks")
    assert sys.modules.pop("asks").capability == (9, 0) and forked.serves()
    assert len(log.read_text().split()) == 2 and f"{os.getpid()}" not in log.read_text().split()
    assert measure.machine(torch.device("cuda"))["gpu"] == "H9" and len(log.read_text().split()) == 2
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not forked.serves(), "a fork would find CUDA initialized"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    log.with_name("broken").touch()
    monkeypatch.setattr(forked, "_threads", 0)
    forked.preload("asks")
    assert not forked.serves(), "forks have no GPU here"


def test_a_part_has_a_new_interpreter_where_a_fork_would_fail(tmp_path, monkeypatch):
    """With the same words and the same ends, be it late."""
    (tmp_path / "program.py").write_text("import os, sys, time; print(os.getpid(), sys.argv[1:]); time.sleep(60)")
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "out").open("w") as out:
        process = forked.start([sys.executable, "-u", "-m", "program", "--a"], [out, out], own_group=True)
    deadline = time.monotonic() + 10
    while not (tmp_path / "out").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "out").read_text() == f"{process.pid} ['--a']\n"
    assert forked.wait(process, 0.1) is None
    forked.kill_group(process)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_forks_have_the_gpu():
    program = (
        "import os; os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'\n"
        "from lowmem_grpo.benchmarks import forked\n"
        "forked.preload('lowmem_grpo.benchmarks.bench_step')\n"
        "import torch\n"
        "assert forked.serves() and not torch.cuda.is_initialized()\n"
        "assert [forked.in_a_fork(lambda: torch.ones(9, device='cuda').sum().item()) for _ in '12'] == [9.0, 9.0]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_implementations_in_turns_are_forks_too(monkeypatch, part_of, capfd):
    def peer(argv):
        print(json.dumps({"argv": argv, "parent": os.getppid()}))
        if "--fails" in argv:
            raise ValueError("no such thing")
        while "--hangs" in argv:
            signal.pause()

    part_of(peer)
    one = functools.partial(
        trainers.in_turns, "lowmem_grpo.benchmarks.peer", ["lowmem_grpo"], save=lambda results: None
    )
    found = one([["--a"]])["lowmem_grpo"]
    assert found == [{"argv": ["--one", "lowmem_grpo", "--a"], "parent": os.getpid()}]
    assert one([["--fails"]])["lowmem_grpo"] == [{"failed": "ValueError: no such thing"}]
    assert one([["--hangs"]], limit_s=0.3)["lowmem_grpo"] == [{"failed": "not done in 0 s"}]
    assert not capfd.readouterr().out, "what they print is their result"


def test_memory_is_measured_beside_the_tests_and_kernels_are_compiled_for_the_rest(tmp_path, monkeypatch, part_of):
    log = tmp_path / "log"
    log.touch()

    def note(text):
        with log.open("a") as file:
            file.write(f"{text}\n")

    def bench_overlap(argv):
        note(" ".join(["overlap", *argv[:-1]]))
        while "--turns" in argv:
            signal.pause()
        write(argv, {"timed": True})

    def bench_budgets(argv):
        while "overlap" not in log.read_text():
            time.sleep(0.01)
        note("tests may end")
        while "tests ended" not in log.read_text():
            time.sleep(0.01)
        write(argv, {"memory": True})
        note("memory")

    class Noted(suite.Running):
        def __init__(self, part, allowed_s, quiet=False):
            limits.append((part.module, allowed_s, quiet))
            super().__init__(part, allowed_s, quiet)

    limits = []
    monkeypatch.setattr(suite, "Running", Noted)
    known = {"timed": part_of(bench_overlap, "--choose", limit_s=9), "memory": part_of(bench_budgets, memory=True)}
    monkeypatch.setattr(suite, "parts", lambda *_: known)
    tests = f"until grep -q may {log}; do sleep 0.02; done; echo tests ended >> {log}"
    assert suite.main([f"--output_dir={tmp_path}", "--file=x.json", f"--beside={tests}"]) == 0
    lines = ["overlap --turns 1", "tests may end", "tests ended", "memory", "overlap --choose"]
    assert log.read_text().splitlines() == lines
    ahead = ("bench_overlap", None, True)
    assert ahead in limits and ("bench_overlap", 9, False) in limits, "compiling may take the tests' whole time"
    assert json.loads((tmp_path / "x.json").read_text())["parts"] == {
        "memory": {"memory": True}, "timed": {"timed": True},
    }  # fmt: skip


def test_the_command_names_its_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--list"]) == 0 and not list(tmp_path.iterdir()), "a list leaves no folder behind"
    assert set(capsys.readouterr().out.split()) >= set(suite.CPU if not torch.cuda.is_available() else suite.CUDA)
    assert main(["bench", "--list", "--dry-run"]) == 0, "a flag's hyphens are taken here, too"
    assert main(["bench", "haed"]) == 2
    assert "no part haed; there are" in capsys.readouterr().err
    assert suite.of_name("update", suite.CPU) == ["update", "update-uneven"]


def test_bad_input_is_one_sentence(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{")
    assert suite.main(["--list", f"--output_dir={tmp_path}", "--file=x.json"]) == 2
    assert "is not a file of this suite" in capsys.readouterr().err
    assert suite.main(["head", f"--output_dir={tmp_path}/x.json"]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    (tmp_path / "y.json").write_text('{"parts": {"head": "text"}}')
    assert suite.main(["--list", f"--output_dir={tmp_path}", "--file=y.json"]) == 2
    assert "is not a file of this suite" in capsys.readouterr().err
    for wrong, reason in (
        (["--allowed_s=-5"], "is not above 0"), (["--quick", "--dry_run"], "two things; choose one"),
        (["--quick", "--call=tests"], "two things; choose one"), (["--call=all"], "invalid choice"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            suite.main(wrong)
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ("bench_update --warmups=-1", "-1 is not above 0"), ("bench_rollout --prompts=0", "0 is not above 0"),
        ("bench_update --output=/proc/none/x.json", "cannot be written to"), ("bench_step --steps=1", "at least 2"),
        ("bench_rollout --shape=demo,--mean_length=9", "lengths of their own"),
        ("bench_update --output=/", "is a folder|cannot be written to"), ("bench_scaling --longest=10", "is below"),
    ],
)  # fmt: skip
def test_a_bench_refuses_bad_input_before_it_measures(wrong, reason, capsys):
    module, arguments = wrong.split()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"lowmem_grpo.benchmarks.{module}").main(arguments.split(","))
    assert ended.value.code == 2 and re.search(reason, capsys.readouterr().err)


def test_a_suite_goes_on_past_midnight(tmp_path):
    given = SimpleNamespace(output_dir=tmp_path, file=None, quick=False, dry_run=False, call=None)
    today = suite.chosen_file(given, suite.CPU)
    yesterday = tmp_path / re.sub(r"\d{4}-\d\d-\d\d", "2020-01-01", today.name)
    yesterday.write_text(json.dumps({"parts": {"head": {}}}))
    assert suite.chosen_file(given, suite.CPU) == yesterday
    assert suite.chosen_file(given, {"head": suite.CPU["head"]}) == today, "that one is whole"


ALL_PARTS = [
    *suite.CPU.values(), *suite.CUDA.values(), *suite.QUICK.values(), *(suite.dry(part) for part in suite.CUDA.values()),
    *(part for call in suite.PROGRAMME for part in suite.parts(False, False, call).values()),
    *(part for call in suite.PROGRAMME for part in suite.parts(False, True, call).values()),
]  # fmt: skip


@pytest.mark.parametrize("part", sorted(set(ALL_PARTS), key=str), ids=lambda part: f"{part.module} {part.arguments}")
def test_every_part_is_understood_by_its_module(part, monkeypatch):
    class Parsed(Exception):
        pass

    def parse_args(parser, argv):
        parse(parser, argv)
        raise Parsed

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        importlib.import_module(f"lowmem_grpo.benchmarks.{part.module}").main(
            [*shlex.split(part.arguments), "--output=x"]
        )


def test_every_part_of_a_gpu_has_a_tiny_form():
    for part in (*suite.CUDA.values(), *(part for call in suite.PROGRAMME.values() for part in call.values())):
        tiny = suite.dry(part)
        assert not re.search(r"(?<!tiny-)(qwen|llama|gpt)|15\d{4}", tiny.arguments), tiny
        assert tiny.limit_s is None


def test_each_call_of_the_programme_ends_within_4_and_a_half_minutes():
    """By the limits of their parts, which run_all() passes on; the tests' own stand in the script."""
    script = (ROOT / "benchmarks/gpu_suite.sh").read_text()
    of_tests = {call: int(seconds) for call, seconds in re.findall(r"^(\w+)_s=(\d+)", script, re.MULTILINE)}
    assert set(of_tests) | {"beside"} == set(suite.PROGRAMME)
    for call, parts in suite.PROGRAMME.items():
        memory = [part.limit_s or 0.0 for part in parts.values() if part.memory]
        timed = [part.limit_s or 0.0 for part in parts.values() if not part.memory]
        assert all(0 < limit <= 110 for limit in memory + timed)
        assert len(memory) <= suite.AT_ONCE, "they begin with the tests"
        assert max([of_tests.get(call, 0), *memory]) + sum(timed) <= 270, call
        assert call in of_tests or not memory


@pytest.mark.parametrize("part", [part for call in suite.PROGRAMME.values() for part in call.values()], ids=str)
def test_what_runs_ahead_is_short_and_chooses_nothing(part):
    if not part.memory:
        words = suite.ahead(part).arguments
        assert "--choose" not in words and "--profile" not in words
        assert words.startswith(part.arguments.split(" --choose")[0].split(" --profile")[0])


def test_a_part_of_the_programme_gets_no_more_than_its_limit(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(forked, "preload", lambda *modules: None)
    monkeypatch.setattr(suite, "run_part", lambda part, allowed_s: given.append(allowed_s) or ({"benchmark": "x"}, ""))
    options = [f"--output_dir={tmp_path}", "--file=x.json", "--call=critic"]
    assert suite.main([*options, "--allowed_s=55"]) == 0 and given[0] <= 55, "the second would have less than a minute"
    assert suite.main(options) == 0 and given[1:4] == [70, 25, 20]


def test_the_programme_calls_what_it_says_and_asks_for_one_of_them(tmp_path, monkeypatch):
    """By an interpreter that writes down what it was to run, and by what the suite makes of that; slow tests run it."""
    python, asked, out = tmp_path / "python", tmp_path / "asked", tmp_path / "out"
    runs_tests = 'for word; do [ "$before" != --beside ] || bash -c "$word"; before=$word; done'
    python.write_text(f'#!/bin/bash\necho "$@" >> "{asked}"\n{runs_tests}\n')
    python.chmod(0o755)
    environment = {**os.environ, "DRY_RUN": "1", "OUT": str(out), "PYTHON": str(python)}
    for call in ("beside decode-7b --again", "tests", "critic"):
        subprocess.run(["bash", "benchmarks/gpu_suite.sh", *call.split()], cwd=ROOT, env=environment, check=True)
    new = " ".join(files_of("critic"))
    of_suite = "-m lowmem_grpo.benchmarks "
    last = f"--call beside --output_dir {out} --dry_run decode-7b --again"
    assert asked.read_text().splitlines() == [
        of_suite + last,
        of_suite + f"--call tests --output_dir {out} --beside run_tests 190 gpu-tests --dry_run",
        "-m lowmem_grpo.benchmarks.measure", "-c import xdist",
        "-m pytest -v --tb=short -m gpu --collect-only -n 11 --dist load",
        of_suite + f"--call critic --output_dir {out} --beside run_tests 75 gpu-tests-critic {new} --dry_run",
        "-m lowmem_grpo.benchmarks.measure", "-c import xdist",
        f"-m pytest -v --tb=short -m gpu --collect-only -n 11 --dist load {new}",
    ]  # fmt: skip
    assert {file.name for file in out.glob("nvidia*")} == {file.name for file in RESULTS.glob("nvidia-*.json")}
    given = []
    monkeypatch.setattr(suite, "run_part", lambda part, allowed_s: given.append(part) or ({"benchmark": "x"}, ""))
    assert suite.main(last.split()) == 0 and given == [suite.dry(suite.PROGRAMME["beside"]["decode-7b"])]
    (path,) = out.glob("dry-run-*.json")
    assert list(json.loads(path.read_text())["parts"]) == ["decode-7b"]
    done = subprocess.run(["bash", "benchmarks/gpu_suite.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "gpu_suite.sh update    tests of a layer's pass" in done.stdout


def files_of(name: str) -> list[str]:
    (words,) = re.findall(rf'^{name}="([^"]*)"', (ROOT / "benchmarks/gpu_suite.sh").read_text(), re.MULTILINE)
    return words.split()


@pytest.mark.parametrize("place", [*files_of("update"), *files_of("critic"), *files_of("families")])
def test_the_tests_that_a_gpu_runs_first_are_there(place):
    file, _, name = place.partition("::")
    text = (ROOT / file).read_text()
    assert f"def {name}(" in text if name else re.search("pytest.mark.gpu|from backends import", text)


@pytest.mark.slow
def test_the_whole_programme_of_a_gpu_runs_dry(tmp_path):
    for call in suite.PROGRAMME:
        run_dry(tmp_path, call, [])
    assert "collected" in (tmp_path / "dry-run-gpu-tests.txt").read_text()
    assert "test_expert_product" in (tmp_path / "dry-run-gpu-tests-critic.txt").read_text()
    assert len(list(tmp_path.iterdir())) <= 11


def run_dry(out: Path, call: str, names: list[str]) -> Path:
    """A call's parts in small, with results in OUT beside those that the checkout has."""
    environment = {**os.environ, "DRY_RUN": "1", "OUT": str(out), "PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu_suite.sh", call, *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "all done" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = out.glob("dry-run-*.json")
    assert set(json.loads(path.read_text())["parts"]) >= set(names or suite.PROGRAMME[call])
    assert sorted(file.name for file in out.glob("nvidia*")) == sorted(
        file.name for file in RESULTS.glob("nvidia-*.json")
    )
    return out


@pytest.mark.slow
def test_quick_runs_everything(tmp_path):
    command = [sys.executable, "-m", "lowmem_grpo.benchmarks", "--quick", f"--output_dir={tmp_path}"]
    subprocess.run(command, check=True)  # and not from here, where others may have computed, whose threads no fork has
