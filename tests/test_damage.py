"""What a resume makes of checkpoints, logs and best adapters that are not as they were written."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import comparable, seal
from test_train import ROWS, run, text_reward
from tiny_models import DEMO_MODEL, make_policy

from lowmem_grpo import cli
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.objective.coefficients import Controllers
from lowmem_grpo.output.folder import (
    BEING_WRITTEN,
    REPLACED,
    checkpoints,
    find_checkpoint,
    flaw,
    mend_folder,
    read_state,
    set_damaged_aside,
)
from lowmem_grpo.output.manifest import damage
from lowmem_grpo.rollout.replay import ReplayBuffer
from lowmem_grpo.rollout.stream import Stream
from lowmem_grpo.run.best import BestAdapter
from lowmem_grpo.run.checkpoint import load_part
from lowmem_grpo.run.evaluations import Evaluations
from lowmem_grpo.run.randomness import restore_randomness
from lowmem_grpo.update.optimizer import Learner

pytestmark = pytest.mark.usefixtures("known_trials")

SETTINGS = dict(
    rewards=text_reward, beta=0.1, reference="initial", replay_buffer_size=4, dynamic_sampling_rounds=1, save_steps=1,
    eval_dataset=ROWS[:2], eval_steps=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of three steps, with everything that a checkpoint can hold."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, max_steps=3, **SETTINGS)
    return folder / "out"


@pytest.fixture
def out(tmp_path, finished):
    """A copy of that folder, to be damaged."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def resume(out, resume_from_checkpoint=True, max_steps=4):
    return run(out.parent, max_steps=max_steps, resume_from_checkpoint=resume_from_checkpoint, **SETTINGS)


def flip(path, position, bit) -> bytes:
    """Flip one bit of a file. Returns the file as it was."""
    before = path.read_bytes()
    after = bytearray(before)
    after[position] ^= 1 << bit
    path.write_bytes(after)
    return before


def listed(folder):
    """The files that a resume reads: those in the manifest, and the manifest itself."""
    lines = (folder / "manifest.sha256").read_text().splitlines()[:-1]
    return [*(folder / line.split("  ")[1] for line in lines), folder / "manifest.sha256"]


@pytest.mark.parametrize("name", ["checkpoint-3", "best"])
def test_a_flipped_bit_in_any_file_is_found(out, name):
    """At random, and in every byte of the manifest, which no checksum of another file covers."""
    draw, folder = random.Random(0), out / name
    assert damage(folder) is None
    *files, manifest = listed(folder)
    places = [(path, draw.randrange(path.stat().st_size)) for path in files * 3]
    for path, position in [*places, *((manifest, position) for position in range(manifest.stat().st_size))]:
        before = flip(path, position, draw.randrange(8))
        assert f"its {path.name} is damaged" in str(damage(folder)), position
        path.write_bytes(before)
    assert damage(folder) is None


@pytest.mark.parametrize("length", [0, 1, 0.5, -1])
def test_a_file_that_was_cut_short_or_is_gone_is_found(out, length):
    folder = out / "checkpoint-3"
    for path in listed(folder):
        before = path.read_bytes()
        path.write_bytes(before[: int(len(before) * length) if 0 < length < 1 else length])
        assert path.name in str(flaw(folder))
        path.unlink()
        assert path.name in str(flaw(folder))
        path.write_bytes(before)
    assert flaw(folder) is None


def test_every_file_that_a_resume_reads_is_in_the_manifest(out):
    """Without the other files, a resume from the second step ends in the third as the run did."""
    for path in (out / "checkpoint-2").iterdir():
        if path not in listed(out / "checkpoint-2"):
            path.unlink()
    shutil.rmtree(out / "checkpoint-3")
    before = load_file(out / "adapter/adapter_model.safetensors")
    resume(out, max_steps=3)
    after = load_file(out / "adapter/adapter_model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def nothing_but_a_name(kind, path):
    if kind == "an empty folder":
        path.mkdir()
    elif kind == "a file":
        path.write_text("a note of mine")
    elif kind == "a dangling link":
        path.symlink_to("/nowhere")
    else:
        shutil.copytree(path.parent / "checkpoint-3", path)
        (path / "trainer_state.json").unlink()


NOTHINGS = {
    "an empty folder": "it has no trainer_state.json", "a file": "it is not a folder",
    "a dangling link": "it does not exist", "a folder without its state": "it has no trainer_state.json",
}  # fmt: skip


@pytest.mark.parametrize("resume_from_checkpoint", [True, "auto"])
def test_the_newest_whole_checkpoint_is_resumed_from_and_the_damaged_ones_are_kept(out, resume_from_checkpoint):
    flip(out / "checkpoint-3/optimizer.safetensors", 9999, 0)
    for number, kind in enumerate(NOTHINGS, 4):
        nothing_but_a_name(kind, out / f"checkpoint-{number}")
    with pytest.warns(UserWarning) as said:
        result = resume(out, resume_from_checkpoint)
    for number, why in enumerate(["its optimizer.safetensors is damaged", *NOTHINGS.values()], 3):
        words = f"checkpoint-{number} cannot be resumed from, since {why}"
        assert [
            line for line in said if words in str(line.message) and "goes on from checkpoint-2" in str(line.message)
        ]
        assert os.path.lexists(out / f"checkpoint-{number}.damaged")
    assert [line["step"] for line in result.history] == [1, 2, 3, 4]
    assert [path.name for path in checkpoints(out)] == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert not flaw(out / "checkpoint-3") and (out / "checkpoint-5.damaged").read_text() == "a note of mine"


def test_a_run_that_fell_back_is_the_run_that_was_never_stopped(out):
    before = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    flip(out / "checkpoint-3/trainer_state.json", 99, 0)
    again = resume(out, max_steps=3)
    assert comparable(again.history) == comparable([line for line in before if "loss" in line])
    old, new = (load_file(out / f"{name}/adapter_model.safetensors") for name in ("checkpoint-3.damaged", "adapter"))
    assert all(torch.equal(value, new[name]) for name, value in old.items())


def test_a_damaged_checkpoint_that_is_named_is_refused_with_the_name_of_a_whole_one(out):
    flip(out / "checkpoint-3/trainer_state.json", 99, 0)
    words = (
        "checkpoint-3 is no .* its trainer_state.json is damaged.*; the newest whole one beside it is .*checkpoint-2"
    )
    with pytest.raises(InputError, match=words):
        find_checkpoint(out, str(out / "checkpoint-3"))
    assert find_checkpoint(out, str(out / "checkpoint-2")) == out / "checkpoint-2"
    with pytest.raises(InputError, match="holds checkpoint-2, which the run resumed from"):
        find_checkpoint(out, str(out / "checkpoint-1"))


def test_without_a_whole_checkpoint_true_is_refused_and_auto_starts_anew(tmp_path):
    settings = {"rewards": text_reward, "max_steps": 1, "max_completion_length": 4}
    with pytest.raises(InputError, match='has no whole checkpoint; leave .* or set it to "auto" to resume if'):
        run(tmp_path, resume_from_checkpoint=True, **settings)
    assert [line["step"] for line in run(tmp_path, resume_from_checkpoint="auto", **settings).history] == [1]
    again = run(tmp_path, resume_from_checkpoint="auto", **{**settings, "max_steps": 2})
    assert [line["step"] for line in again.history] == [1, 2]
    for step in (1, 2):
        (tmp_path / f"out/checkpoint-{step}/trainer_state.json").write_text("{}")
    with pytest.raises(
        InputError, match="no whole checkpoint; checkpoint-2 cannot be resumed from, since its trainer_"
    ):
        run(tmp_path, resume_from_checkpoint=True, **settings)


def test_a_run_that_begins_anew_beside_damaged_checkpoints_keeps_what_was_there(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/adapter")  # as if the run had been killed
    for folder in checkpoints(tmp_path / "out"):
        flip(folder / "optimizer.safetensors", 9999, 0)
    log, best = ((finished / name).read_bytes() for name in ("metrics.jsonl", "best/best.json"))
    (tmp_path / "config.yaml").write_text("resume_from_checkpoint: auto")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "solution": "2"}\n')
    command = ["train", "--model", str(DEMO_MODEL), "--dataset", str(rows), "--reward_funcs", "exact_match_reward"]
    settings = ["--use_cpu", "true", "--max_completion_length", "4", "--output_dir", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match=r"checkpoint-3 cannot be resumed from, .*; a new run begins"):
        assert cli.main([*command, *settings, "--config", str(tmp_path / "config.yaml"), "--max_steps", "1"]) == 0
    assert not flaw(tmp_path / "out/checkpoint-1") and flaw(tmp_path / "out/checkpoint-1.damaged")
    assert (tmp_path / "out/metrics.jsonl.damaged").read_bytes() == log
    assert (tmp_path / "out/best.damaged/best.json").read_bytes() == best
    assert cli.main([*command, *settings, "--resume_from_checkpoint", "auto", "--max_steps", "2"]) == 0
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("kind", NOTHINGS)
def test_what_is_no_checkpoint_does_not_stand_in_the_way_of_a_fresh_run(tmp_path, finished, kind):
    shutil.copytree(finished / "checkpoint-3", tmp_path / "checkpoint-3")
    nothing_but_a_name(kind, tmp_path / "checkpoint-1")
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert find_checkpoint(tmp_path, None) is None
    with pytest.warns(UserWarning, match=r"checkpoint-1 is none of this run's, .*; it is now checkpoint-1.damaged"):
        set_damaged_aside(tmp_path, 0, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1.damaged"]


def test_what_a_kill_left_in_the_folder_is_settled(tmp_path):
    for name in ("best", "checkpoint-3", "adapter"):
        for end in (BEING_WRITTEN, REPLACED):
            (tmp_path / f"{name}{end}").mkdir()
            (tmp_path / f"{name}{end}/which").write_text(end)
    for name in ("adapter", "best.old", "best.tmp", "replaced"):
        (tmp_path / name).mkdir()
    mend_folder(tmp_path)
    found = {path.name: path / "which" for path in tmp_path.iterdir()}
    assert sorted(found) == ["adapter", "best", "best.old", "best.tmp", "checkpoint-3", "replaced"]
    assert found["best"].read_text() == found["checkpoint-3"].read_text() == REPLACED
    assert not found["adapter"].exists()


def test_a_checkpoint_resumed_from_elsewhere_without_its_best_adapter_is_said(tmp_path, finished, capsys):
    given = {**SETTINGS, "resume_from_checkpoint": str(finished / "checkpoint-3"), "max_steps": 3}
    run(tmp_path, **given)
    words = "out has no best/ of the run so far: put it there before a resume, or the next evaluation is the best"
    assert words in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(finished / "best", tmp_path / "out/best")
    run(tmp_path, **given)
    assert words not in capsys.readouterr().err and (tmp_path / "out/best/best.json").is_file()


def test_the_best_adapter_survives_a_kill_between_the_two_renames(out):
    record = (out / "best/best.json").read_text()
    os.replace(out / "best", out / f"best{REPLACED}")
    resume(out, max_steps=3)
    assert (out / "best/best.json").read_text() == record


@pytest.mark.parametrize(
    "written", ["", "{}", "[]", "null", "3", '"x"', "[" * 100_000, '{"format": NaN}', "\x00\x01", "9" * 5000]
)
def test_a_state_that_is_none_is_one_sentence(out, written):
    path = out / "checkpoint-3/trainer_state.json"
    path.write_text(written)
    for is_sealed in (False, True):
        if is_sealed:
            seal(path.parent)
        with pytest.raises(
            InputError, match="trainer_state.json (is damaged|cannot|holds)|of format 0, and this"
        ) as error:
            find_checkpoint(out, str(out / "checkpoint-3"))
        assert len(str(error.value)) < 600


def change(out, path, value):
    """Put a value, or nothing for ..., at a path such as `parts.stream.position` of the newest checkpoint's state."""
    file, within = out / "checkpoint-3/trainer_state.json", path.split(".")
    state = json.loads(file.read_text())
    holder = state
    for name in within[:-1]:
        holder = holder[name]
    if value is ...:
        del holder[within[-1]]
    else:
        holder[within[-1]] = value
    file.write_text(json.dumps(state))
    seal(file.parent)


@pytest.mark.parametrize("value", [1, 4, 2.5, -1, True, None, "3", [3], {}, ...])
def test_a_step_that_is_not_the_folders_is_refused(out, value):
    change(out, "step", value)
    with pytest.raises(InputError, match="its trainer_state.json (has no step that can be read|is of step)"):
        find_checkpoint(out, str(out / "checkpoint-3"))


@pytest.mark.parametrize("value", [[], None, 3, ...])
@pytest.mark.parametrize("name", ["identity", "config", "parts"])
def test_a_state_without_one_of_its_mappings_is_refused(out, name, value):
    change(out, name, value)
    with pytest.raises(InputError, match=f"its trainer_state.json has no {name} that can be read"):
        find_checkpoint(out, str(out / "checkpoint-3"))


BAD_VALUES = {
    "optimizer.schedule_position": [-1, 2.5, None, "1", ...],
    "optimizer.numbers": [None, [], {"0.step": -1}, {"0.step": "x"}, {"x.step": 1}, ...],
    "optimizer.scaler": [None, [], {}, {"scale": 1.0}, {"scale": "x", "_growth_tracker": 0}, ...],
    "sampler.samples_dense": [3, "yes", [], ...],
    "stream.position": [-3, 2.5, None, True, "7", ...],
    "stream.dull_prompts": [None, 3, [-1], [2.5], [[1]], ["a"], ...],
    "first_evaluation.data": [...],
    "random_states.python": [None, [], [3, [1, 2], None], [3, [-1] * 625, None], [3, [1] * 625, "x"], ...],
    "random_states.numpy": [None, [], ["MT19937", [1], 0, 0, 0.0], ["x", [1] * 624, 0, 0, 0.0], ...],
    "controllers.beta": [-0.1, None, "0.1", True, ...],
    "controllers.entropy_coef": [-0.1, None, ...],
    "controllers.last_entropy": [-0.1, None, ...],
}


def test_a_state_that_a_part_cannot_load_is_one_sentence(finished):
    """Each value that a hand may have written, in the state of each part of a run that reads all it can."""
    config = GRPOConfig(beta=0.1, kl_target=0.1, use_adaptive_entropy=True, fp16=True)
    policy = make_policy("qwen2")
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    loads = {
        "optimizer": Learner(policy.parameters_of("default").values(), config, scaler, 9).load,
        "sampler": Sampler(policy, config).load, "stream": Stream(ReplayBuffer(0)).load,
        "controllers": Controllers(config).load, "first_evaluation": Evaluations(None, []).load,
        "random_states": restore_randomness,
    }  # fmt: skip
    folder = finished / "checkpoint-3"
    for path, values in BAD_VALUES.items():
        part, _, name = path.partition(".")
        for value in values:
            saved = read_state(folder)
            if value is ...:
                del saved["parts"][part][name]
            else:
                saved["parts"][part][name] = value
            with pytest.raises(InputError, match=f"checkpoint-3 has a state of its {part} that cannot be loaded: .*;"):
                load_part(folder, part, loads[part], saved)


@pytest.mark.parametrize("value", [-1, 2.5, None, ...])
def test_counts_that_cannot_be_read_are_one_sentence(out, value):
    change(out, "parts.counts.num_tokens", value)
    with pytest.raises(
        InputError, match=r"checkpoint-3 has a state of its counts that cannot be loaded: (it has no .)?num_"
    ):
        resume(out)


def test_a_damaged_log_blocks_no_resume_and_is_kept(out):
    path = out / "metrics.jsonl"
    first, *lines = path.read_bytes().splitlines(keepends=True)
    bad = [
        b"\xff\xfe\n",
        b"[1]\n",
        b"{}\n",
        b"3\n",
        b'{"step": "1"}\n',
        b'{"step": 1.5}\n',
        b"\x00\n",
        b"[" * 9999 + b"\n",
    ]
    damaged = b"".join([first, *bad, *lines, b'{"step": 3, "lo'])
    path.write_bytes(damaged)
    with pytest.warns(
        UserWarning, match=r"8 of [0-9]+ lines of .*metrics.jsonl cannot be read.* as it was is metrics.jsonl.damaged"
    ):
        again = resume(out)
    before = [json.loads(line) for line in (first, *lines)]
    assert again.history[:3] == [line for line in before if "loss" in line]
    assert again.eval_history[:-1] == [line for line in before if "eval_reward" in line]
    assert (out / "metrics.jsonl.damaged").read_bytes() == damaged


def spoil(path, kind):
    if kind == "gone":
        path.unlink()
    elif kind == "flipped":
        flip(path, path.stat().st_size // 2, 3)
    else:
        path.write_text(kind)
        seal(path.parent)


@pytest.mark.parametrize("kind", ["gone", "flipped", "", "[]", "{", '{"step": 1, "metric": "eval_reward"}'])
def test_a_damaged_best_adapter_is_set_aside(out, kind):
    spoil(out / "best/best.json", kind)
    with pytest.warns(UserWarning, match=r"best.* is now best.damaged, and the next evaluation is the best"):
        best = BestAdapter(out, GRPOConfig(), fresh=False)
    assert best.record() is None and (out / "best.damaged/adapter_model.safetensors").is_file()


def test_a_run_ends_where_its_best_adapter_was_damaged(out):
    flip(out / "best/adapter_model.safetensors", 9999, 3)
    with pytest.warns(UserWarning, match="best.* its adapter_model.safetensors is damaged.* it is now best.damaged"):
        result = run(out.parent, max_steps=4, resume_from_checkpoint=True, load_best_model_at_end=True, **SETTINGS)
    assert [line["step"] for line in result.history] == [1, 2, 3, 4]
    assert json.loads((out / "best/best.json").read_text())["step"] == 4
