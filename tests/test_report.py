"""report.html: a page of a run's files, whatever is in them, that shows no foreign markup and reads nothing else."""

import html.parser
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lowmem_grpo import GRPOConfig
from lowmem_grpo.cli import main
from lowmem_grpo.errors import InputError
from lowmem_grpo.output.folder import write_file
from lowmem_grpo.report.chart import COLUMNS, Dot, Series, chart, in_digits, limits, smoothed, smoothing, ticks
from lowmem_grpo.report.page import duration, page_of, state_of
from lowmem_grpo.report.reading import read_run, readable
from lowmem_grpo.report.report import write_report
from lowmem_grpo.run.card import card_of
from lowmem_grpo.run.publish import Publisher
from lowmem_grpo.watch.run import WatchedRun
from lowmem_grpo.watch.view import View

VOID = {"meta", "br", "link", "img", "input", "hr"}
SECTIONS = ["Curves", "Evaluations", "Time", "Memory", "Settings", "Again"]
HOSTILE = [
    "<script>alert(1)</script>", "</style></title><img src=x onerror=alert(1)>", "{{ 7 * 7 }}{% raw %}", "\x1b[31mred\x00",
    "שלום <b>עולם</b> \u202eevil\u202c", "👩‍👩‍👧 \ud800 é", "'\"&<>`", "x" * 100_000,
]  # fmt: skip


class Page(html.parser.HTMLParser):
    """A page read back: its tags, its text, and whether each tag is closed where it should be."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.headings = [], [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def read(folder) -> Page:
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert set(page.tags).isdisjoint({"script", "img", "link", "iframe", "object", "embed", "form", "base"})
    assert "url(" not in text and "@import" not in text and "://" not in re.sub(r"http-equiv", "", text)
    for name, value in page.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action", "xlink:href")
        assert name != "href" or re.fullmatch(r"\d\d+-[\w-]+/report\.html", value)
    return page


def line_of(step: int, rng: random.Random, total: int) -> dict:
    """A step's line as GRPO writes it, of a run that learns."""
    done = 1 - math.exp(-4 * step / total)
    reward = 0.3 + 0.6 * done + rng.gauss(0, 0.08)
    return {
        "step": step, "loss": rng.gauss(0, 0.01), "reward": reward, "rewards/accuracy_reward/mean": reward - 0.1,
        "rewards/format_reward/mean": 0.9 + 0.1 * done, "completions/mean_length": 180 + 200 * done + rng.gauss(0, 20),
        "completions/min_length": 40 + rng.gauss(0, 9), "completions/max_length": 512.0, "kl": 0.08 * done * rng.uniform(0.5, 1.5),
        "completions/clipped_ratio": 0.3 * (1 - done), "frac_reward_zero_std": 0.4 * done, "entropy": 1.2 - 0.9 * done,
        "grad_norm": 0.4 + rng.expovariate(8), "learning_rate": 1e-6 * (1 - step / total), "step_time": 9.1 + rng.gauss(0, 0.3),
        "time/rollout_s": 6.0, "time/reference_s": 0.9, "time/update_s": 2.1, "tokens_per_s/rollout": 2100.0,
        "memory/rollout/peak_mib": 5200.0, "memory/reference/peak_mib": 4100.0, "memory/update/peak_mib": 5900.0, "num_tokens": 16000 * step,
    }  # fmt: skip


def evaluation(step: int, accuracy: float) -> dict:
    found = {
        "step": step,
        "eval_reward": accuracy + 0.2,
        "eval_pass@1": accuracy,
        "eval_completions/mean_length": 200.0 + step,
    }
    for name, half in (("eval_reward", 0.04), ("eval_pass@1", 0.05)):
        found |= {f"{name}/ci_low": found[name] - half, f"{name}/ci_high": found[name] + half}
    if step:
        changed = "eval_pass@1/difference"
        found |= {changed: accuracy - 0.31, f"{changed}/ci_low": accuracy - 0.36, f"{changed}/ci_high": accuracy - 0.26}
    return found


def sample(step: int, prompt: str, completion: str) -> dict:
    rewards = {"accuracy_reward": float(step > 0), "format_reward": 1.0}
    return {"step": step, "prompt": prompt, "completion": completion, "reward": 1.0 + (step > 0), "rewards": rewards}


def make_run(folder, total=60, **about):
    """A folder as a run of `total` steps leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    lines = [line_of(step, rng, total) for step in range(1, total + 1)]
    evaluations = [evaluation(step, 0.31 + 0.4 * step / total) for step in range(0, total + 1, max(1, total // 4))]
    finding = {
        "step": 3,
        "doctor": "all_truncated",
        "text": "Every completion is cut off; raise max_completion_length.",
    }
    write_lines(folder / "metrics.jsonl", [*lines, *evaluations, finding])
    write_lines(
        folder / "samples.jsonl",
        [sample(step, f"{i} + 2 = ?", f"<answer>{i + 2}</answer>") for step in (0, total) for i in range(8)],
    )
    config = GRPOConfig(output_dir=str(folder), learning_rate=2e-6, vram_budget="8GB")
    (folder / "grpo_config.json").write_text(json.dumps(config.__dict__), encoding="utf-8")
    plan = {
        "peaks": {"rollout": 6.1e9, "reference": 4.4e9, "update": 6.4e9}, "budget": 8e9,
        "changes": [{"name": "token_budget", "value": 4096, "reason": "smaller micro-batches, and more of them"}],
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    write_about(folder, total, **about)
    return folder


def write_about(folder, total=60, **changes):
    about = {
        "kind": "grpo", "model": "Qwen/Qwen2.5-1.5B-Instruct", "datasets": {"train": "gsm8k", "eval": "held out by gsm8k"},
        "rows": {"train": 7473, "eval": 200}, "rewards": ["accuracy_reward", "format_reward"], "total_steps": total,
        "command": "lowmem-grpo train --model Qwen/Qwen2.5-1.5B-Instruct --dataset gsm8k", "device": "cuda:0, NVIDIA T4",
        "versions": {"python": "3.11.7", "torch": "2.13.0"}, "started": "2026-11-27T08:47:56+00:00",
        "resumed": [{"started": "2026-11-27T09:00:00+00:00", "step": 20}],
        "ended": {"at": "2026-11-27T09:30:00+00:00", "step": total, "how": "finished", "why": ""}, **changes,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about), encoding="utf-8")


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "out")


def test_a_page_has_every_section_and_the_numbers_of_the_run(run):
    page = read(run)
    assert [one for one in page.headings if not one.startswith("Held-out")] == SECTIONS
    assert "Held-out prompts, before training and after step 60" in page.headings
    for words in (
        "GRPO of Qwen/Qwen2.5-1.5B-Instruct on gsm8k", "All 60 steps are done.", "on 200 held-out prompts", "0.31", "0.71",
        "+0.400 [+0.350, +0.450]", "9 min", "5.76 GiB", "5.96 GiB", "Every completion is cut off", "learning_rate", "2e-06", str(GRPOConfig.learning_rate),
        "token_budget", "smaller micro-batches", "lowmem-grpo train --model", "torch 2.13.0", "2026-11-27 08:47 UTC",
        "from step 20", "7 + 2 = ?", "<answer>9</answer>", "Parts of the reward", "accuracy_reward", "KL to the reference",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.text.count("<answer>") == 16


def test_a_page_of_a_thousand_steps_has_less_than_1_mb_and_keeps_the_extremes(tmp_path):
    folder = make_run(tmp_path / "out", 1000)
    assert write_report(folder).stat().st_size < 1e6
    page = read(folder)
    points = [value.split() for name, value in page.attributes if name == "points"]
    assert max(len(one) for one in points) <= 400
    assert "at step 1000" in page.text


def test_a_picture_of_many_steps_has_a_band_that_keeps_every_extreme():
    points = [(step, 3.0 if step == 500 else 0.1 * (step % 7)) for step in range(1, 1001)]
    (band,) = chart("x", [Series("x", points)]).lines[0].band
    heights = [float(one.split(",")[1]) for one in band.split()]
    assert len(heights) <= 2 * COLUMNS
    assert min(heights) == 10.0 and heights.count(10.0) == 1  # 3.0, at the upper edge, in one column


def test_foreign_text_is_shown_and_never_becomes_markup(tmp_path):
    folder = make_run(tmp_path / "out")
    write_lines(folder / "samples.jsonl", [sample(step, text, text) for step in (0, 60) for text in HOSTILE])
    bad = HOSTILE[0]
    name = f"rewards/{HOSTILE[1]}/mean"
    lines = [{"step": step, "loss": 0.1, name: 0.5, f"rewards/{bad}/mean": 1.0, "reward": 0.5} for step in (1, 2)]
    lines += [
        {"step": 2, "doctor": bad, "text": HOSTILE[1]},
        {"step": 2, f"eval_rewards/{bad}/mean": 0.5, "eval_reward": 1.0},
    ]
    write_lines(folder / "metrics.jsonl", lines)
    write_about(
        folder, model=bad, datasets={"train": [bad, HOSTILE[4]], "eval": bad}, rewards=[bad], command=f"lowmem-grpo {bad}",
        device=bad, versions={bad: bad}, started=bad, ended={"how": "failed", "why": HOSTILE[1], "step": 2, "at": 1},
    )  # fmt: skip
    (folder / "grpo_config.json").write_text(json.dumps({"system_prompt": bad, "learning_rate": HOSTILE[4]}))
    (folder / "plan.json").write_text(
        json.dumps({"peaks": {bad: 1e9}, "changes": [{"name": bad, "value": bad, "reason": bad}]})
    )
    page = read(folder)
    for text in HOSTILE[:3]:
        assert text in page.text
    assert "\\x1b[31mred\\x00" in page.text and "\\u202eevil" in page.text and "\u202e" not in page.text
    assert "\\ud800" in page.text and "👩‍👩‍👧" in page.text and "… of 100,000 characters" in page.text
    write_lines(
        folder / "samples.jsonl", [sample(step, "\u202e" * 10**5, "<" * 10**5) for step in (0, 60) for _ in range(9)]
    )
    read(folder)
    assert (folder / "report.html").stat().st_size < 1e6


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xff\xfe{", b"[1, 2]", b'{"step": "x"}', b'{"step": 1, "loss": "high", "kl": [3]}\n{"st', b'{"kind": {}}'],
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "plan.json", "samples.jsonl", "grpo_config.json"])
def test_a_damaged_file_costs_its_own_section_alone(name, garbage, run, tmp_path):
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(garbage)
    page = read(tmp_path)
    assert [one for one in page.headings if not one.startswith("Held-out")] == SECTIONS


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "plan.json", "samples.jsonl", "grpo_config.json"])
def test_a_single_file_is_enough_where_it_says_that_a_run_is_there(name, run, tmp_path):
    (tmp_path / name).write_bytes((run / name).read_bytes())
    if name in ("plan.json", "samples.jsonl"):
        with pytest.raises(InputError, match="holds no run"):
            read_run(tmp_path)
    else:
        assert [one for one in read(tmp_path).headings if one in SECTIONS] == SECTIONS


ODD = [[], {}, 7, 10**400, "x" * 300, True]


@pytest.mark.parametrize(
    "name, field",
    [
        ("run.json", "kind"), ("run.json", "resumed"), ("run.json", "ended"), ("run.json", "datasets"),
        ("grpo_config.json", "loss_type"), ("grpo_config.json", "adv_estimator"), ("metrics.jsonl", "step"),
        ("adapter/adapter_config.json", "lora_alpha"), ("adapter/adapter_config.json", "base_model_name_or_path"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_stops_no_reader_of_a_runs_files(name, field, tmp_path):
    make_run(tmp_path, 3)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16}), encoding="utf-8")
    path = tmp_path / name
    first, *others = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for value in [*ODD, {"train": 10**400}]:
        path.write_text(json.dumps({**json.loads(first), field: value}) + "\n" + "".join(others), encoding="utf-8")
        assert page_of(read_run(tmp_path))["settings"]
        assert "## Use" in card_of(tmp_path / "adapter").text
        watched = WatchedRun(tmp_path)
        watched.refresh()
        assert View(80).of_run(watched)


def test_numbers_that_no_picture_can_have_are_left_out(tmp_path):
    odd = [None, True, "1", [], {}, 10**400, 1e308, -5e299, 0, 0.0]
    lines = [
        {"step": step, "loss": value, "reward": value, "kl": value, "step_time": value}
        for step, value in enumerate(odd)
    ]
    lines += [{"step": -3, "loss": 1.0}, {"step": 10**400, "loss": 1.0}, {"step": 10**30, "loss": 1.0}]
    write_lines(tmp_path / "metrics.jsonl", lines)
    text = read(tmp_path).text
    assert "nan" not in text.lower().replace("finance", "") and "inf" not in text.lower()


def test_a_folder_that_is_no_runs_is_refused_in_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", str(tmp_path)]) == 2 and main(["report", str(tmp_path / "gone")]) == 2
    assert main(["report", str(tmp_path / "file")]) == 2 and main(["report"]) == 2
    said = capsys.readouterr().err
    assert said.count("holds no run") == 2 and "is a file" in said and "RUN" in said


def test_the_command_writes_where_it_is_told(run, tmp_path, capsys):
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert (
        capsys.readouterr().out == f"report: {tmp_path / 'page.html'}\n"
        and (tmp_path / "page.html").stat().st_size > 50_000
    )
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0  # a page is replaced by another
    (tmp_path / "rows.jsonl").write_text("mine")
    assert main(["report", str(run), "--output", str(tmp_path / "rows.jsonl")]) == 2
    assert "is there, and is no page of a report; give another file" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_text() == "mine"
    assert main(["report", str(run), "--output", str(tmp_path / "no/page.html")]) == 1
    assert f"{tmp_path / 'no/page.html'} cannot be written (No such file or directory); " in capsys.readouterr().err
    for folder in ("", ".", "/", str(tmp_path)):
        assert main(["report", str(run), "--output", folder]) == 2
        assert "is a folder; give a file for the page" in capsys.readouterr().err


def test_a_folder_that_may_not_be_read_is_refused_in_a_sentence(run, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("lowmem_grpo.report.report.phases_of", refuse)
    with pytest.raises(InputError, match=r"cannot be read .*Permission denied.*; give a folder"):
        write_report(run)


def test_two_processes_may_write_one_page_at_once(tmp_path, monkeypatch):
    """Another process begins and ends while the first one flushes."""
    flush = os.fsync

    def flush_slowly(descriptor):
        monkeypatch.setattr(os, "fsync", flush)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            write_file(tmp_path / "report.html", "another's")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_slowly)
    write_file(tmp_path / "report.html", "the first one's")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "the first one's"


def test_the_command_needs_no_torch(run):
    program = "import sys; from lowmem_grpo.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program, "report", str(run)], check=True, capture_output=True)


@pytest.mark.parametrize(
    "about, lock, word",
    [
        ({}, None, "finished"),
        ({"ended": {"how": "stopped"}}, None, "stopped"),
        ({"ended": {"how": "failed", "why": "too hot"}}, None, "failed"),
        ({"ended": None}, f"process {os.getpid()} on {socket.gethostname()}\n", "running"),
        ({"ended": None}, f"process 999999999 on {socket.gethostname()}\n", "cut off"),
        ({"ended": None}, "process 1 on elsewhere\n", "cut off"),
        ({"ended": None}, "garbage", "cut off"),
        ({"ended": None}, None, "cut off"),
    ],
    # Without the process's number, which differs from worker to worker.
    ids=["whole", "stopped", "failed", "its lock is held", "its process is gone", "elsewhere", "garbage", "no lock"],
)
def test_a_page_says_how_the_run_ended(tmp_path, about, lock, word):
    make_run(tmp_path, 4, **about)
    if lock is not None:
        (tmp_path / "run.lock").write_text(lock)
    found = state_of(read_run(tmp_path))
    assert ("before its first checkpoint" in found["text"]) == (word in ("stopped", "cut off"))
    (tmp_path / "checkpoint-2").mkdir()
    assert ("it can be resumed" in state_of(read_run(tmp_path))["text"]) == (word in ("stopped", "cut off"))
    assert found["word"] == word and ("too hot" in found["text"]) == (word == "failed")


def test_a_page_says_whose_adapter_the_run_has_left_where_the_best_is_not_the_last(tmp_path):
    make_run(tmp_path)
    (tmp_path / "best").mkdir()
    for step, words in (
        (60, ""),
        (45, "The best evaluation was that of step 45 (reward 0.810), whose adapter best/ has."),
    ):
        record = {"step": step, "metric": "eval_reward", "value": 0.81}
        (tmp_path / "best/best.json").write_text(json.dumps(record))
        assert page_of(read_run(tmp_path))["best"] == words and words in read(tmp_path).text
    (tmp_path / "best/best.json").write_text('{"step": "<b>", "value": []}')
    assert page_of(read_run(tmp_path))["best"] == ""


def test_without_evaluations_the_headline_is_of_training_and_says_so(tmp_path):
    make_run(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "loss": 0.0, "reward": step / 10} for step in range(1, 21)])
    found = page_of(read_run(tmp_path))["headline"]
    assert (found["name"], found["before"], found["after"]) == ("Training reward", ("0.150", ""), ("1.950", ""))
    assert "nothing was held out" in found["of"] and "Nothing was evaluated" in read(tmp_path).text


def test_supervised_runs_and_reward_models_have_their_own_numbers(tmp_path):
    for kind, names in (("sft", ("loss", "mean_token_accuracy")), ("reward", ("accuracy", "margin", "loss"))):
        folder = tmp_path / kind
        folder.mkdir()
        lines = [{"step": step, "loss": 1 / step, **dict.fromkeys(names, step / 9)} for step in range(1, 6)]
        lines += [{"step": step, "eval_loss": 1.0 - step / 10, "eval_accuracy": 0.5 + step / 20} for step in (0, 5)]
        write_lines(folder / "metrics.jsonl", lines)
        write_about(folder, kind=kind, rows={"train": 5, "eval": 60})
        page = read(folder)
        wanted = (
            ("Held-out loss", "on 60 held-out examples")
            if kind == "sft"
            else ("Held-out accuracy", "on 60 held-out pairs")
        )
        assert all(words in page.text for words in wanted)
        assert (
            "In brackets" not in page.text and f"Differences are between the same {wanted[1].split()[-1]}" in page.text
        )


def test_a_pipeline_has_a_row_a_phase_with_links_to_their_pages(tmp_path):
    make_run(tmp_path / "01-cold")
    make_run(tmp_path / "02-rl", 5, ended=None)
    write_report(tmp_path / "01-cold")
    (tmp_path / "03-select").mkdir()
    (tmp_path / "00-base").mkdir()
    done = {"kind": "select", "inputs": {"dataset": [["sampled", "0" * 64]]}, "metrics": {"sampled": 1600, "kept": 374}}
    for name in ("01-cold", "03-select"):
        (tmp_path / name / "done.json").write_text(json.dumps(done))
    rows = [
        {"phase": "base", "from": None, **evaluation(0, 0.31)},
        {"phase": "cold", "from": "base", **evaluation(9, 0.75)},
    ]
    (tmp_path / "evaluations.json").write_text(json.dumps(rows))
    page = read(tmp_path)
    assert ("href", "01-cold/report.html") in page.attributes and ("href", "02-rl/report.html") not in page.attributes
    for words in (
        "2 of 3 phases that have begun are done",
        "0.750 [0.700, 0.800]",
        "+0.440 [+0.390, +0.490]",
        "on sampled",
        "kept 374",
        "from base",
        "Selection",
    ):
        assert words in page.text, words
    (tmp_path / "evaluations.json").write_text("[[1], {")
    assert "held-out accuracy" not in read(tmp_path).text


def test_a_report_that_fails_costs_no_run(monkeypatch, tmp_path):
    said = []
    Publisher._report(SimpleNamespace(folder=tmp_path, say=said.append))
    assert said == [f"{tmp_path / 'report.html'} cannot be made ({tmp_path} holds no run: it has neither metrics.jsonl nor run.json; "
                    "give the output_dir of a training or of a pipeline)"]  # fmt: skip


def test_ticks_are_round_and_enclose_the_range():
    assert ticks(0.31, 0.97, 5) == ([0.2, 0.4, 0.6000000000000001, 0.8, 1.0], ["0.2", "0.4", "0.6", "0.8", "1.0"])
    assert ticks(0, 1000, 6, whole=True)[1] == ["0", "200", "400", "600", "800", "1,000"]
    assert ticks(0, 1e-6, 5)[1][-1] == "1e-6" and ticks(5, 5, 5)[0][0] < 5 < ticks(5, 5, 5)[0][-1]
    for low, high in ((-3.7, 12.2), (1e-9, 2e-9), (0, 1e12), (-1e-3, 1e5)):
        values, words = ticks(low, high, 5)
        assert values[0] <= low + 1e-9 * abs(low) and values[-1] >= high * (1 - 1e-9) and 2 <= len(values) <= 7
        assert len(set(words)) == len(words) and max(map(len, words)) <= 8


def test_a_spike_is_outside_of_the_picture_and_said():
    points = [(step, 1.0 + step % 3) for step in range(1, 101)]
    assert limits([value for _, value in points]) == (1.0, 3.0)
    picture = chart("x", [Series("x", [*points, (101, 1e6)])])
    assert picture.notes == ["outside the picture: 1,000,000"] and picture.y_ticks[-1][1] == "4"


def test_a_line_is_the_mean_of_neighbours_and_keeps_a_constant():
    assert smoothing(15) == 1 and smoothing(60) % 2 == 1
    assert [value for _, value in smoothed([(i, 2.0) for i in range(50)])] == [2.0] * 50
    points = [(i, float(i)) for i in range(50)]
    assert smoothed(points)[25] == (25, 25.0)


def test_numbers_beside_each_other_have_as_many_decimals():
    words = {
        0: "0.000",
        0.25: "0.250",
        -9.5: "-9.500",
        10: "10.0",
        10.25: "10.2",
        212.4: "212",
        4e4: "40,000",
        2e-6: "2e-06",
    }
    assert {value: in_digits(value) for value in words} == words and in_digits(0.5, "+") == "+0.500"


def test_a_picture_says_its_values_in_words_and_needs_two_points_or_a_dot():
    assert chart("t", [Series("s", [(1, 2.0)])]) is None and chart("t", [Series("s", [])]) is None
    picture = chart(
        "Reward", [Series("training", [(1, 0.5), (2, 0.25)])], dots=[Dot(0, 0.3, 0.2, 0.4)], dots_label="held-out"
    )
    assert picture.summary == (
        "Reward. training: 0.5 at step 1, 0.25 at step 2, between 0.25 and 0.5; held-out at step 0: 0.300 [0.200, 0.400]."
    )
    assert [words for _, _, words in picture.strips] == [
        "step 0: held-out 0.300 [0.200, 0.400]",
        "step 1: training 0.5",
        "step 2: training 0.25",
    ]
    inside = [number for _, y in (one.split(",") for one in picture.lines[0].paths[0].split()) for number in [float(y)]]
    assert inside == sorted(inside) and inside[0] < inside[1]  # upside down: the greater value is above


@pytest.mark.parametrize(
    "seconds, words", [(0.456, "0.456 s"), (59.9, "59.9 s"), (192, "3 min 12 s"), (7500, "2 h 5 min")]
)
def test_a_time_is_said_as_people_say_it(seconds, words):
    assert duration(seconds) == words


def test_a_text_keeps_its_emoji_and_loses_what_turns_lines_around():
    assert readable("👩‍👧") == "👩‍👧" and readable("a\u2066b\u200fc") == "a\\u2066b\\u200fc"
