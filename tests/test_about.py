"""What a run writes about itself: run.json, plan.json and samples.jsonl."""

import json
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from tiny_models import DEMO_MODEL
from transformers import AutoTokenizer

import lowmem_grpo
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.demo import task
from lowmem_grpo.evaluation.evaluate import Evaluation
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.inputs.training import name_of
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.output.saved import read_lines
from lowmem_grpo.run.about import command_line, is_stop, reason, write_about
from lowmem_grpo.run.samples import write_samples

ROWS = task.rows(task.splits()[0][:10])


def run(folder, callbacks=(), **changes):
    config = GRPOConfig(
        output_dir=str(folder), use_cpu=True, max_steps=2, prompts_per_step=1, num_generations=2,
        max_completion_length=4, gradient_checkpointing=False, doctor="off", save_steps=1, **changes,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    rewards = [task.answer_reward, task.tag_format_reward]
    return train(str(DEMO_MODEL), rewards, ROWS, ROWS[:9], config, tokenizer=tokenizer, callbacks=callbacks)


def about(folder) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def stop(step, metrics, policy):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that was stopped after its first step, and went on to its end; its run.json and page as the stop left."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    with pytest.raises(KeyboardInterrupt):
        run(folder, stop)
    (folder.parent / "stopped.json").write_bytes((folder / "run.json").read_bytes())
    (folder.parent / "stopped.html").write_bytes((folder / "report.html").read_bytes())
    run(folder, resume_from_checkpoint=True)
    return folder


def test_a_run_says_what_it_is_and_how_it_ended(folder):
    found = about(folder)
    assert found["kind"] == "grpo" and found["model"] == str(DEMO_MODEL) and found["total_steps"] == 2
    assert found["rewards"] == ["answer_reward", "tag_format_reward"] and found["rows"] == {"train": 10, "eval": 9}
    assert found["datasets"] == {"train": "10 rows in memory", "eval": "9 rows in memory"}
    assert found["command"] == "train() in Python" and found["device"].startswith("cpu, ")
    assert found["versions"]["torch"] == version("torch")  # torch.__version__ may end in +cu130
    assert found["versions"]["lowmem_grpo"] == lowmem_grpo.__version__
    assert found["ended"] == {"at": found["ended"]["at"], "step": 2, "how": "finished", "why": ""}
    assert not (folder / "plan.json").exists()


def test_a_resumed_run_keeps_its_first_start_and_lists_the_later_one(folder):
    stopped = json.loads((folder.parent / "stopped.json").read_text(encoding="utf-8"))
    assert (stopped["ended"]["how"], stopped["ended"]["step"], stopped["resumed"]) == ("stopped", 1, [])
    found = about(folder)
    assert found["started"] == stopped["started"] and [one["step"] for one in found["resumed"]] == [1]


def test_a_run_that_was_stopped_has_left_a_page_and_one_that_went_on_another(folder):
    before, after = (
        path.read_text(encoding="utf-8") for path in (folder.parent / "stopped.html", folder / "report.html")
    )
    assert "The run was stopped after step 1 of 2; it can be resumed." in before
    assert "All 2 steps are done." in after


def test_a_resumed_run_has_samples_of_the_first_evaluation_and_of_the_last(folder):
    lines, num_damaged = read_lines(folder / "samples.jsonl")
    assert [line["step"] for line in lines] == [0] * 8 + [2] * 8 and not num_damaged
    before, after = lines[:8], lines[8:]
    assert [line["prompt"] for line in before] == [row["prompt"][0]["content"] for row in ROWS[:8]]
    assert [line["prompt"] for line in before] == [line["prompt"] for line in after]
    for line in lines:
        assert line["reward"] == pytest.approx(sum(line["rewards"].values()))
        assert list(line["rewards"]) == ["answer_reward", "tag_format_reward"]


def test_a_run_that_fails_says_why(tmp_path):
    def fail(step, metrics, policy):
        raise OSError("no more\nfeathers")

    with pytest.raises(OSError, match="feathers"):
        run(tmp_path / "out", fail)
    ended = about(tmp_path / "out")["ended"]
    assert (ended["how"], ended["step"], ended["why"]) == ("failed", 1, "OSError: no more")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "The run failed after step 1 of 2: OSError: no more" in page


def test_samples_are_of_a_prompts_first_completion_and_of_the_first_and_last_steps_alone(tmp_path):
    prompts = [Prompt(f"prompt {i}", [1], {}) for i in range(3)]
    completions = [Completion([5], None, None, "length") for _ in range(6)]
    texts = [[{"role": "assistant", "content": f"text {i}"}] for i in range(6)]
    rewards = {"total": [float(i) for i in range(6)], "a": [float("nan")] * 6, "b": [1.0] * 6}
    samples = Evaluation({}, {}, prompts, completions, texts, rewards).samples()
    assert [one["completion"] for one in samples] == ["text 0", "text 2", "text 4"]
    assert [one["reward"] for one in samples] == [0.0, 2.0, 4.0] and list(samples[0]["rewards"]) == ["a", "b"]
    for step in (0, 2, 4, 3):  # the last as of a run that was resumed before step 4
        write_samples(tmp_path, step, samples)
    lines = read_lines(tmp_path / "samples.jsonl")[0]
    assert [line["step"] for line in lines] == [0, 0, 0, 3, 3, 3] and lines[0]["rewards"] == {"a": None, "b": 1.0}
    write_samples(tmp_path, 0, samples[:1])
    assert [line["step"] for line in read_lines(tmp_path / "samples.jsonl")[0]] == [0]


@pytest.mark.parametrize(
    "arguments, command",
    [
        (["/usr/bin/lowmem-grpo", "train", "--model", "a b"], "lowmem-grpo train --model 'a b'"),
        ([f"{lowmem_grpo.__path__[0]}/cli/__main__.py", "sft"], "lowmem-grpo sft"),
        (
            ["lowmem-grpo", "train", "--hub-token", "hf_1", "--token_budget", "9"],
            "lowmem-grpo train --hub-token ... --token_budget 9",
        ),
        (["lowmem-grpo", "train", "--hub_token=hf_1"], "lowmem-grpo train --hub_token=..."),
        (
            ["lowmem-grpo", "sft", "--model_init_kwargs", '{"token": "hf_1", "revision": "main"}'],
            """lowmem-grpo sft --model_init_kwargs '{"token": "...", "revision": "main"}'""",
        ),
        (
            ["lowmem-grpo", "train", "--reward_funcs", "m.judge(api_key='sk', url='http://me:pw@host/v1')"],
            """lowmem-grpo train --reward_funcs 'm.judge(api_key=..., url='"'"'http://...@host/v1'"'"')'""",
        ),
        (
            ["lowmem-grpo", "train", "--system_prompt", "The key: think", "--importance_sampling_level=token"],
            "lowmem-grpo train --system_prompt 'The key: think' --importance_sampling_level=token",
        ),
        (["sums.py", "--model", "m"], None),
        ([""], None),
    ],
)
def test_a_command_is_told_from_a_program_and_keeps_secrets(arguments, command):
    assert command_line(arguments) == command


def test_what_others_read_of_a_run_has_no_token_of_its_users(tmp_path):
    folder = tmp_path / "out"
    run(folder, model_init_kwargs={"token": "hf_nobodys"}, report_to="tensorboard")
    local = {folder / "grpo_config.json", *folder.glob("checkpoint-*/*")}  # which a resumed run reads
    read = [path for path in folder.rglob("*") if path.is_file() and path not in local]
    assert {"report.html", "run.json", "README.md"} <= {path.name for path in read}
    assert any("tfevents" in path.name for path in read)
    assert [path for path in read if b"hf_nobodys" in path.read_bytes()] == []
    assert "model_init_kwargs" in (folder / "report.html").read_text(encoding="utf-8")


def test_inputs_have_the_names_that_their_user_gave_them(tmp_path):
    assert name_of("gsm8k") == "gsm8k" and name_of(tmp_path) == str(tmp_path) and name_of(None) is None
    assert name_of(["a.jsonl", [{"prompt": "p"}]]) == ["a.jsonl", "1 row in memory"]
    assert name_of(torch.nn.Linear(1, 1)) == "Linear in memory"


def test_a_stop_is_somebodys_wish_and_has_no_reason():
    assert is_stop(KeyboardInterrupt()) and is_stop(SystemExit(143)) and not is_stop(ValueError())
    assert reason(KeyboardInterrupt()) == "" and reason(ZeroDivisionError("by 0")) == "ZeroDivisionError: by 0"


def test_a_plan_of_an_earlier_run_goes(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    config = SimpleNamespace(kind="sft")
    inputs = SimpleNamespace(
        output_dir=tmp_path, resume=None, plan=None, config=config, model="m", datasets={}, num_rows=1, num_eval_rows=0,
        total_steps=3, device=torch.device("cpu"),
    )  # fmt: skip
    write_about(inputs, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]
    assert about(tmp_path)["kind"] == "sft" and sys.version.startswith(about(tmp_path)["versions"]["python"])
