"""Paths as their users write them: ~ and $NAME mean the same wherever a path is taken."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_layers import MODULES
from tiny_models import DEMO_MODEL

from lowmem_grpo import GRPOConfig
from lowmem_grpo.cli import main
from lowmem_grpo.data.rows import read_rows
from lowmem_grpo.exporting.asked import new_path
from lowmem_grpo.inputs.names import look_up_inputs, refuse_critic_init
from lowmem_grpo.inputs.training import tokenizer_of
from lowmem_grpo.model.teacher import find_teacher
from lowmem_grpo.output.folder import find_checkpoint, writable_folder
from lowmem_grpo.output.manifest import write_manifest
from lowmem_grpo.paths import expanded
from lowmem_grpo.pipeline.file import pipeline_file
from lowmem_grpo.pipeline.record import content
from lowmem_grpo.pipeline.sampled import SampledFile
from lowmem_grpo.rewards.names import look_up_rewards
from lowmem_grpo.rewards.reward_model import get_model_reward
from lowmem_grpo.settings_file import read_settings_file

CONFIG = GRPOConfig(use_cpu=True)
TAKES: dict[str, Any] = {  # by what it is: what is done with a path below the home folder; a fault raises
    "model": lambda home: look_up_inputs({"model": f"{home}/model/", "dataset": f"{home}/rows.jsonl"}, CONFIG),
    "tokenizer": lambda home: tokenizer_of(f"{home}/model", None, CONFIG),
    "dataset": lambda home: read_rows(f"{home}/rows.jsonl", CONFIG)[0]["prompt"] == "a" or 1 / 0,
    "reward model": lambda home: look_up_rewards([f"{home}/model"]),
    "teacher": lambda home: find_teacher("a/model", GRPOConfig(teacher=f"{home}/model", use_cpu=True)),
    "critic_init": lambda home: refuse_critic_init(GRPOConfig(adv_estimator="gae", critic_init=f"{home}/scores")),
    "output_dir": lambda home: (writable_folder(f"{home}/out") / "here").touch(),
    "resume_from_checkpoint": lambda home: find_checkpoint(Path("none"), f"{home}/checkpoint-1"),
    "settings": lambda home: read_settings_file(f"{home}/settings.yaml"),
    "pipeline": lambda home: pipeline_file(f"{home}/settings.yaml").stat(),
    "sampled": lambda home: SampledFile(f"{home}/sampled.jsonl", 1, in_order=True).path.parent.samefile(expanded("~")),
    "input of a phase": lambda home: content(f"{home}/rows.jsonl") == content(expanded("~/rows.jsonl")) or 1 / 0,
    "export": lambda home: new_path(f"{home}/merged").parent.stat(),
    "report": lambda home: main(["report", f"{home}/run", f"--output={home}/page.html"]) and 1 / 0,
    "plan": lambda home: main(["plan", f"--model={home}/model", "--use_cpu", "true"]) and 1 / 0,
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("OF_TEST", str(folder))
    for name in ("scores", "run", "checkpoint-1"):
        (folder / name).mkdir(parents=True)
    (folder / "model").symlink_to(DEMO_MODEL)
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "settings.yaml").write_text("model: m\n")
    (folder / "scores/adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    (folder / "run/metrics.jsonl").write_text('{"step": 1}\n')
    state = {"format": 2, "step": 1, "identity": {}, "config": {}, "parts": {}}
    (folder / "checkpoint-1/trainer_state.json").write_text(json.dumps(state))
    write_manifest(folder / "checkpoint-1", ["trainer_state.json"])
    return folder


@pytest.mark.parametrize("what", TAKES)
@pytest.mark.parametrize("written", ["~", "$OF_TEST", "${HOME}"])
def test_a_path_may_begin_with_the_home_folder_or_a_variable(what, written, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TAKES[what](written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]  # nothing of the name itself


def test_a_name_with_a_dollar_sign_is_itself_where_it_is_there(home):
    written = f"{home}/of $OF_TEST"  # as a run that was begun in such a folder names its adapter
    assert expanded(written) == f"{home}/of {home}"
    Path(written).mkdir()
    assert expanded(written) == written


def test_a_reward_models_own_arguments_are_paths_like_others(home):
    with pytest.raises(ValueError, match=re.escape(f"adapter '{home / 'none'}'") + "|no trained reward head"):
        get_model_reward("~/model")


def test_no_other_module_reads_a_home_folder():
    """But that of the hub's cache, and the one that is left out of what others read."""
    found = {name for name, path in MODULES.items() if "expanduser(" in path.read_text(encoding="utf-8")}
    assert found == {"paths", "lookup", "output.places"}
    assert expanded("Qwen/Qwen2.5") == "Qwen/Qwen2.5" and expanded("~nobody-here/$none") == "~nobody-here/$none"
