"""run_pipeline(): phases in a row, what is done and what has changed, and the four details that are often got wrong."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_models import DEMO_MODEL

from lowmem_grpo import Phase, cli, run_pipeline
from lowmem_grpo.demo import task
from lowmem_grpo.errors import InputError, NotSavedError
from lowmem_grpo.output.lock import lock_folder, releasing_locks
from lowmem_grpo.pipeline.check import AWAITED, check, with_datasets
from lowmem_grpo.pipeline.file import RECIPES, read_pipeline_file, recipes
from lowmem_grpo.pipeline.phases import resolve
from lowmem_grpo.pipeline.record import fingerprint, refuse_changed, write_record
from lowmem_grpo.rewards import resolve_reward_funcs
from lowmem_grpo.rewards.route import RoutedReward

pytestmark = pytest.mark.usefixtures("known_trials")

TRAIN, EVAL = task.splits()
REWARD = "lowmem_grpo.demo.task.answer_reward"
COMMON = {"use_cpu": True, "seed": 0, "lora_r": 8, "save_steps": 1}
EVALUATION = {"dataset": "held.jsonl", "reward_funcs": [REWARD], "max_completion_length": 24}
COLD = {"dataset": "cold.jsonl", "max_steps": 2, "examples_per_step": 4, "learning_rate": 1e-3}
RL = {
    "dataset": "sums.jsonl", "reward_funcs": REWARD, "max_steps": 1, "prompts_per_step": 2, "num_generations": 2,
    "max_completion_length": 8, "beta": 0.02,
}  # fmt: skip


def phases(cold=(), rl=()):
    """A cold start and reinforcement after it, with settings of the tests' own."""
    return [Phase("cold-start", "sft", **{**COLD, **dict(cold)}), Phase("rl", "grpo", **{**RL, **dict(rl)})]


def run(given=None, output_dir="out", common=COMMON, evaluation=EVALUATION, **options):
    return run_pipeline(str(DEMO_MODEL), given or phases(), output_dir, common=common, evaluation=evaluation, **options)


def resolved(*given, common=None, model="some/model"):
    return resolve(model, given, "out", common).runs


def write_rows(folder):
    def line(problem):
        chat = {"prompt": [{"role": "user", "content": task.question(problem)}]}
        return {**chat, "completion": [{"role": "assistant", "content": task.worked(problem)}]}

    files = {"cold": map(line, TRAIN[:8]), "sums": task.rows(TRAIN[:8]), "held": task.rows(EVAL[:4])}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a pipeline that has come to its end, with its data, and the result."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rows(folder)
        return folder, run()


@pytest.fixture
def copy(whole, tmp_path, monkeypatch):
    """A copy of that folder, in which the test runs."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with the data alone, in which the test runs."""
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_phase_is_a_run_in_a_folder_that_goes_on_from_the_one_before(whole):
    folder, result = whole
    cold, rl = folder / "out/01-cold-start", folder / "out/02-rl"
    assert (cold / "checkpoint-2").is_dir() and (rl / "checkpoint-1").is_dir()
    assert json.loads((rl / "grpo_config.json").read_text(encoding="utf-8"))["reference"] == "initial"
    assert (
        json.loads((rl / "adapter/adapter_config.json").read_text(encoding="utf-8"))["r"] == 8
    )  # begun by the cold start, and gone on with
    before, after = (load_file(one / "adapter/adapter_model.safetensors") for one in (cold, rl))
    moved = max((before[name] - after[name]).abs().max().item() for name in before)
    assert before.keys() == after.keys() and 0 < moved < 1e-3  # one step at 1e-5, and no new adapter
    assert Path(result.adapter) == Path("out/02-rl/adapter")
    assert result.metrics["cold-start"]["step"] == 2 and "reward" in result.metrics["rl"]


def test_one_table_has_the_evaluations_before_and_after_each_phase(whole):
    folder, result = whole
    assert [(row["phase"], row["from"]) for row in result.evaluations] == [
        ("base", None), ("cold-start", "base"), ("rl", "cold-start"),
    ]  # fmt: skip
    for row in result.evaluations:
        assert row["eval_pass@1/ci_low"] <= row["eval_pass@1"] <= row["eval_pass@1/ci_high"]
    base, cold, _ = result.evaluations
    assert cold["eval_pass@1/difference"] == pytest.approx(cold["eval_pass@1"] - base["eval_pass@1"])
    assert json.loads((folder / "out/evaluations.json").read_text(encoding="utf-8")) == result.evaluations
    lines = (folder / "out/evaluations.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| after | from | accuracy | change | answer_reward | tokens |" and len(lines) == 5
    assert lines[2].startswith(f"| base |  | {base['eval_pass@1']:.3f} [")
    card = (folder / "out/02-rl/adapter/README.md").read_text(encoding="utf-8")
    assert f"| `pass@1` | {result.evaluations[-1]['eval_pass@1']:.3f} [" in card and "one greedy completion" in card


def test_one_page_has_a_row_a_phase_and_leads_to_the_pages_of_the_runs(whole):
    text = (whole[0] / "out/report.html").read_text(encoding="utf-8")
    assert "2 of 2 phases are done" in text
    for folder, method in (("01-cold-start", "Supervised fine-tuning"), ("02-rl", "GRPO")):
        assert f'href="{folder}/report.html"' in text and method in text
        assert method in (whole[0] / "out" / folder / "report.html").read_text(encoding="utf-8")


def test_phases_that_are_done_are_neither_run_nor_evaluated_again(copy):
    def files():
        return {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file() and path.parent != copy}

    before, table = files(), json.loads((copy / "evaluations.json").read_text(encoding="utf-8"))
    assert run().evaluations == table
    assert files() == before


def test_the_table_keeps_the_rows_of_phases_after_the_last_that_is_to_run(copy):
    table = json.loads((copy / "evaluations.json").read_text(encoding="utf-8"))
    result = run(until="cold-start")
    assert result.evaluations == table and [row["phase"] for row in table][2:] == ["rl"]
    assert Path(result.adapter) == Path("out/01-cold-start/adapter")
    path = copy / "02-rl/evaluation.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**found, "of": {**found["of"], "dataset": "other prompts"}}), encoding="utf-8")
    assert run(until="cold-start").evaluations == table[:2], "what was measured on other prompts is not beside these"


def test_a_phases_teacher_is_known_by_what_it_holds_wherever_it_is(files):
    made = {}
    for name, weights in {"one": "1", "moved": "1", "other": "2"}.items():
        (files / name).mkdir()
        (files / name / "config.json").write_text("{}")
        (files / name / "model.safetensors").write_text(weights)
        pipeline = resolve("some/model", phases(rl={"teacher": name}), "out")
        made[name] = fingerprint(pipeline, pipeline.runs[1])
    assert made["one"] == made["moved"] != made["other"]


def test_a_pipeline_writes_where_it_begins_what_is_to_come(files, monkeypatch):
    monkeypatch.setattr("lowmem_grpo.pipeline.pipeline.fingerprint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert json.loads((files / "out/pipeline.json").read_text(encoding="utf-8"))["phases"] == [
        {"folder": "01-cold-start", "kind": "sft", "from": "base"}, {"folder": "02-rl", "kind": "grpo", "from": "cold-start"},
    ]  # fmt: skip
    page = (files / "out/report.html").read_text(encoding="utf-8")
    assert [row["phase"] for row in json.loads((files / "out/evaluations.json").read_bytes())] == ["base"]
    assert "0 of 2 phases are done" in page and page.count("not begun</span>") == 2 and "from cold-start" in page


def test_a_setting_that_does_not_decide_the_result_may_change(copy):
    run(phases({"save_total_limit": 1}), common={**COMMON, "save_steps": 7, "token_budget": 4096, "vram_budget": None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"given": phases({"learning_rate": 2e-3})}, "phase cold-start: it is done, with learning_rate 0.001, which is"),
        ({"given": phases({"max_steps": 3})}, "phase cold-start: it is done, with max_steps 2, which is 3 now; set that"),
        ({"given": phases(rl={"reward_funcs": "accuracy_reward"})}, "phase rl: it is done, with another reward_funcs"),
        ({"given": phases({"dataset": "sums.jsonl"})}, "phase cold-start: it is done, with another dataset"),
        ({"given": [phases()[0], Phase("rl", "grpo", from_="base", **RL)]}, "phase rl: .* with lora_r 16, which is 8 now"),
        ({"given": phases()[:1]}, "02-rl is of a phase that is not in this pipeline"),
        ({"given": phases()[::-1]}, "01-cold-start is of a phase that is not in this pipeline, or has another place"),
        ({"common": {**COMMON, "seed": 1}}, "phase cold-start: it is done, with seed 0, which is 1 now"),
    ],
)  # fmt: skip
def test_a_phase_that_is_done_and_has_changed_is_refused(copy, changes, words):
    with pytest.raises(InputError, match=words):
        run(**changes)


def test_an_older_version_had_a_teacher_among_the_settings(tmp_path):
    teachers = [shutil.copytree(DEMO_MODEL, tmp_path / name) for name in ("one", "other")]
    (teachers[1] / "config.json").write_text("{}", encoding="utf-8")
    made_of = []
    for teacher in teachers:
        pipeline = resolve(str(DEMO_MODEL), [Phase("rl", "grpo", **RL, teacher=str(teacher))], tmp_path / "out", None)
        made_of.append(fingerprint(pipeline, pipeline.runs[0]))
    done = pipeline.runs[0]
    done.output.mkdir(parents=True)
    inputs = {name: value for name, value in made_of[0]["inputs"].items() if name != "teacher"}
    older = {**made_of[0], "settings": {**made_of[0]["settings"], "teacher": str(teachers[0])}, "inputs": inputs}
    write_record(done, older, {})
    refuse_changed(done, made_of[0])
    with pytest.raises(InputError, match="it is done, with another teacher"):
        refuse_changed(done, made_of[1])


def test_other_data_another_adapter_and_one_that_is_gone_are_refused(copy):
    with pytest.raises(InputError, match="--from cold-start, or choose another output_dir"):
        Path("cold.jsonl").write_text(Path("cold.jsonl").read_text(encoding="utf-8") * 2, encoding="utf-8")
        run()
    write_rows(Path())
    weights = copy / "01-cold-start/adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="phase rl: it is done, with another model"):
        run()
    weights.write_bytes(whole)
    shutil.rmtree(copy / "02-rl/adapter")
    with pytest.raises(InputError, match="phase rl: it is done, but out/02-rl/adapter is gone; put it back"):
        run()
    shutil.rmtree(copy / "01-cold-start")
    with pytest.raises(InputError, match="phase rl: it is done, and cold-start, which it is made from, is not"):
        run()


def test_a_dry_run_of_phases_that_are_done_anew_says_that_they_begin(copy, capsys):
    run(begin_at="rl", evaluation=None, dry_run=True)
    assert "phase 2 of 2, rl (grpo): begins, from cold-start" in capsys.readouterr().out


def test_a_phase_is_done_anew_and_what_it_had_made_is_kept(copy, capsys):
    with pytest.raises(InputError, match="--from rl is after --until cold-start"):
        run(begin_at="rl", until="cold-start")
    result = run(phases(rl={"max_steps": 2}), begin_at="rl")
    assert result.metrics["rl"]["step"] == 2 and (copy / "02-rl.before/done.json").is_file()
    assert [row["phase"] for row in result.evaluations] == ["base", "cold-start", "rl"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation of ")]
    assert said[0] == "evaluation of rl begins" and said[1].startswith("evaluation of rl: reward 0.")
    assert len(said) == 2, "what is known is not measured again"


def test_two_runs_of_one_folder_are_kept_apart(copy):
    with releasing_locks():
        lock_folder(copy)
        with pytest.raises(InputError, match=r"out is in use by another run \(process"):
            run()


def test_a_disk_that_refuses_is_one_sentence_and_the_page_is_made_all_the_same(copy):
    (copy / "report.html").unlink()
    (copy / "evaluations.json").unlink()
    (copy / "evaluations.json").mkdir()  # which cannot be written as a file
    with pytest.raises(NotSavedError, match=r"^out/evaluations.json cannot be written \(.*; make room"):
        run()
    assert "2 of 2 phases are done" in (copy / "report.html").read_text(encoding="utf-8")


def test_a_dry_run_checks_and_plans_every_phase_and_writes_nothing(files, capsys):
    run(phases(rl={"num_train_epochs": 2, "max_steps": -1}), dry_run=True)
    printed = capsys.readouterr().out
    assert "phase 1 of 2, cold-start (sft): begins, from base, in out/01-cold-start\n  dataset: cold.jsonl" in printed
    assert "  8 rows, 2 steps" in printed and "  8 rows, 8 steps" in printed
    assert (
        printed.count("Predicted peak") == 2
        and "evaluation, before the first phase and after each\n  4 prompts" in printed
    )
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (phases(rl={"dataset": "missing.jsonl"}), "phase rl: train_dataset 'missing.jsonl' is not a file"),
        (phases(rl={"reward_funcs": "acuracy_reward"}), "phase rl: .*acuracy_reward'; did you mean accuracy_reward?"),
        (phases(rl={"dataset": "held.jsonl", "max_completion_length": 10**5}), "phase rl: the longest prompt and its"),
        (phases(rl={"vram_budget": "20MB", "use_cpu": False}), "phase rl: "),
        (phases({"eval_steps": 1}), "phase cold-start: eval_steps=1, but there is no eval_dataset"),
    ],
)
def test_what_a_later_phase_lacks_is_said_before_the_first_begins(files, given, words):
    with pytest.raises(InputError, match=words):
        run(given)
    assert not list((files / "out").glob("*/*"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "phases is"),
        ([Phase("a/b", "sft", **COLD)], "phase 'a/b' cannot be named so"),
        ([Phase("base", "sft", **COLD)], "base is what every pipeline begins with"),
        ([Phase("a", "sft", **COLD)] * 2, "a is the name of two phases"),
        ([Phase("a", "stf", **COLD)], "phase a: kind 'stf' is none; did you mean sft?"),
        ([Phase("a", "sft", max_steps=1)], "phase a: dataset is missing"),
        ([Phase("a", "sft", **COLD, lerning_rate=1)], "phase a: SFTConfig has no field 'lerning_rate'; did you mean"),
        ([Phase("a", "sft", **COLD, reward_funcs=REWARD)], "phase a: SFTConfig has no reward_funcs"),
        ([Phase("a", "sft", **COLD, output_dir="here")], "phase a: output_dir is the pipeline's to give"),
        ([Phase("a", "sft", **COLD, callbacks=[])], "phase a: a phase takes no callbacks"),
        ([Phase("a", "sft", **{**COLD, "learning_rate": "fast"})], "phase a: learning_rate: 'fast' is not a number"),
        ([Phase("a", "sft", from_="b", **COLD), Phase("b", "sft", **COLD)], "phase a: from: 'b' is no phase before it"),
        ([Phase("a", "sft", **COLD, push_to_hub=True)], "phase a: push_to_hub needs a repository that no other phase"),
        ([Phase(name, "sft", **COLD, push_to_hub=True, hub_model_id="me/a") for name in "ab"], "phase b: push_to_hub needs"),
    ],
)  # fmt: skip
def test_a_phase_that_is_none_is_refused_in_a_sentence(given, words):
    with pytest.raises(InputError, match=words):
        resolve("some/model", given, "out")


def test_common_settings_are_for_the_phases_that_have_them():
    cold, rl = resolved(*phases(), common={"seed": 7, "lora_r": 4, "max_length": 99, "beta": 0.5})
    assert (cold.config.seed, cold.config.lora_r, cold.config.max_length) == (7, 4, 99)
    assert (rl.config.seed, rl.config.beta) == (7, 0.02)  # a phase's own setting wins
    with pytest.raises(
        InputError, match="common has 'max_lenght', a setting of none of the phases; did you mean max_length?"
    ):
        resolved(*phases(), common={"max_lenght": 9})
    with pytest.raises(InputError, match="common has output_dir, which is the pipeline's to give"):
        resolved(*phases(), common={"output_dir": "there"})
    with pytest.raises(InputError, match="eval has 'learning_rate', which no evaluation reads"):
        resolve("m", phases(), "out", None, {"dataset": "d", "learning_rate": 1e-3})


# The four details.


def test_supervised_training_after_rejection_sampling_begins_from_the_base():
    """The data carries the ability: R1 trains its base on it, and not the policy that sampled it."""
    rl = Phase("rl", "grpo", **RL)
    again = Phase("again", "sft", from_="base", **COLD)
    cold, first, second, last = resolved(phases()[0], rl, again, Phase("last", "grpo", **RL), common={"lora_r": 4})
    assert (cold.origin, first.origin, second.origin, last.origin) == (None, cold, None, second)
    assert cold.config.lora_r == second.config.lora_r == 4  # each begins an adapter


def test_the_reference_of_reinforcement_is_what_it_goes_on_from(whole):
    rl = resolved(*phases())[1]
    assert rl.config.reference == "initial"
    assert resolved(Phase("rl", "grpo", **RL))[0].config.reference == "base"  # of R1-Zero, which is the same
    adapter = str(whole[0] / "out/01-cold-start/adapter")
    assert resolved(Phase("rl", "grpo", **RL), model=adapter)[0].config.reference == "initial"
    assert resolved(*phases(rl={"reference": "base"}))[1].config.reference == "base"
    assert resolved(*phases(rl={"beta": 0.0}))[1].config.reference == "base"  # which nothing reads


def test_one_adapter_is_gone_on_with_and_its_rank_is_fixed_by_the_phase_that_begins_it():
    rl = resolved(*phases(), common={"lora_r": 4})[1]
    assert rl.adapter_fields == {"lora_r": 4} and rl.config.lora_r == 16  # not read: the adapter's folder says it
    with pytest.raises(InputError, match="phase rl: lora_r is fixed by the phase that begins the adapter"):
        resolved(*phases(rl={"lora_r": 32}))
    resolved(phases()[0], Phase("rl", "grpo", from_="base", lora_r=32, **RL))


def test_the_recipes_have_the_rewards_of_r1_added_up_and_a_judge_of_the_answer_alone_at_the_end():
    zero = read_pipeline_file("r1_zero")["phases"][0].settings
    assert zero["reward_funcs"] == ["accuracy_reward", "think_format_reward"] and "reward_weights" not in zero
    assert (zero["beta"], zero["temperature"]) == (0.001, 1.0)
    r1 = {phase.name: phase for phase in read_pipeline_file("r1")["phases"]}
    assert r1["reasoning-rl"].settings["reward_funcs"] == [*zero["reward_funcs"], "language_consistency_reward"]
    assert r1["sft"].from_ == "base" and r1["sft"].settings["dataset"] == ["rejection", "general.jsonl"]
    functions = resolve_reward_funcs(r1["diverse-rl"].settings["reward_funcs"])
    rows = [{"dataset": "gsm8k"}, {"dataset": "chat.jsonl"}]
    routed = [one for one in functions if isinstance(one, RoutedReward)]
    assert [[one.applies(row) for row in rows] for one in routed] == [[True, False], [False, True]]
    assert routed[1].inner.part == "answer" and r1["diverse-rl"].settings["temperature"] == 0.7


SAMPLING = Phase("samples", "sample", dataset="sums.jsonl", reward_funcs=REWARD)
UNSCORED = Phase("samples", "sample", dataset="sums.jsonl")
TASTE = Phase("taste", "reward", dataset=[{"prompt": "1+1=", "chosen": "2", "rejected": "3"}])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([phases()[0], Phase("a", "grpo", **{**RL, "reward_funcs": "cold-start"})], "makes a policy; .* a reward model"),
        ([phases()[0], Phase("a", "grpo", **{**RL, "dataset": "cold-start"})], "dataset is the phase cold-start, which"),
        ([phases()[0], Phase("a", "select", dataset="cold-start")], "name one that makes completions"),
        ([SAMPLING, Phase("a", "reward", dataset="samples")], "makes completions; name one that makes pairs"),
        ([SAMPLING, Phase("p", "pairs", dataset="samples"), Phase("a", "sft", dataset="p")], "phase a: .* makes pairs"),
        ([TASTE, Phase("a", "grpo", **RL, critic_init="taste")], "critic_init='taste' is read only with adv_estimator"),
    ],
)  # fmt: skip
def test_a_phase_that_makes_something_else_than_is_read_is_refused(given, words):
    """Which would else be found out once that phase is done, after hours."""
    with pytest.raises(InputError, match=words):
        resolved(*given)


@pytest.mark.parametrize(
    ("sampling", "reader", "words"),
    [
        (UNSCORED, Phase("a", "select", dataset="samples", min_reward=1), "min_reward needs rewards, and samples has no"),
        (UNSCORED, Phase("a", "pairs", dataset="samples"), "a pair needs rewards, and samples has no reward_funcs"),
        (Phase("samples", "sample", dataset="sums.jsonl", reward_funcs=REWARD, num_generations=1),
         Phase("a", "pairs", dataset="samples"), "a pair needs two completions; samples has num_generations=1"),
        (UNSCORED, Phase("a", "select", dataset="samples"), None),
        (SAMPLING, Phase("a", "select", dataset="samples", min_reward=1), None),
        (Phase("samples", "sample", dataset="gsm8k"), Phase("a", "pairs", dataset="samples"), None),
    ],
)  # fmt: skip
def test_rewards_that_a_phase_chooses_by_are_there_before_anything_is_sampled(sampling, reader, words):
    pipeline = resolve("some/model", [sampling, reader], "out")
    with contextlib.nullcontext() if words is None else pytest.raises(InputError, match=words):
        check(pipeline, pipeline.runs[1], pipeline.runs, planned=False)


def test_the_rows_of_a_dataset_that_is_there_say_so_while_another_is_still_to_be_made(files):
    """So that a reward routed by the column `dataset` finds it."""
    routed = "get_routed_reward(reward='taste', column='dataset', values=['sums.jsonl', 'samples'])"
    rl = Phase("rl", "grpo", **{**RL, "dataset": ["samples", "sums.jsonl"], "reward_funcs": routed})
    pipeline = resolve(str(DEMO_MODEL), [SAMPLING, TASTE, rl], "out", {"use_cpu": True})
    facts = check(pipeline, pipeline.runs[2], pipeline.runs, planned=False).facts
    assert facts[-2:] == ["dataset is still to be made by samples", "reward_funcs is still to be made by taste"]


def test_the_memory_of_sampling_is_that_of_the_adapter_which_is_still_to_be_trained(files):
    common = {"use_cpu": True, "max_completion_length": 8, "max_prompt_length": 16}

    def peak(*before, lora_r):
        pipeline = resolve(str(DEMO_MODEL), [*before, SAMPLING], "out", {**common, "lora_r": lora_r})
        return check(pipeline, pipeline.runs[-1], pipeline.runs, planned=True).plan.forecast.peak()

    cold = phases()[0]
    assert peak(cold, lora_r=64) > peak(cold, lora_r=8)
    with pytest.raises(InputError, match="common has 'lora_r', a setting of none"):
        peak(lora_r=8)


# Files and the command.


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_a_pipeline_whose_names_and_settings_are_right(name):
    found = read_pipeline_file(name)
    resolve(found["model"], found["phases"], found["output_dir"], found.get("common"), found.get("eval"))


def test_a_recipe_is_named_printed_and_run_with_a_model_and_a_folder_of_ones_own(files, capsys):
    assert cli.main(["r1", "--config", "r1_zero", "--print"]) == 0
    assert capsys.readouterr().out == (RECIPES / "r1_zero.yaml").read_text(encoding="utf-8")
    assert cli.main(["r1", "--config", "r1-zero"]) == 2
    assert (
        "lowmem-grpo r1: --config 'r1-zero' is neither a YAML file nor a recipe; did you mean r1_zero?"
        in capsys.readouterr().err
    )
    text = f"model: elsewhere\noutput_dir: there\ncommon: {{use_cpu: true}}\nphases:\n- {json.dumps({'name': 'cold', 'kind': 'sft', **COLD})}\n"
    (files / "mine.yaml").write_text(text, encoding="utf-8")
    assert (
        cli.main(["pipeline", "--config", "mine.yaml", "--model", str(DEMO_MODEL), "--output_dir", "here", "--dry-run"])
        == 0
    )
    assert "phase 1 of 1, cold (sft): begins, from base, in here/01-cold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: m\nfases: []\n", "'fases'; did you mean phases?"),
        ("model: m\n", "needs phases: a list"),
        ("phases: [{name: a}]\n", "phase 1 of config file 'p.yaml' has no kind"),
        ("common: 3\nphases: []\n", "common: 3; make it a mapping"),
        ("phases: [{name: 1, kind: sft}]\n", "phase 1 of config file 'p.yaml' has name: 1; give it a text, in quotes"),
        ("phases: [{name: a, kind: sft, from_: base}]\n", "has from_, as in Python; write from"),
        ("phases: [{name: a, kind: sft, lora-r: 8, lora_r: 4}]\n", "has lora_r twice, with a hyphen and"),
        ("common: {lora-r: 8, lora_r: 4}\nphases: []\n", "common of config file 'p.yaml' has lora_r twice"),
    ],
)
def test_a_file_that_says_no_pipeline_is_refused(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_pipeline_file("p.yaml")


def test_names_with_hyphens_are_those_with_underscores_everywhere(tmp_path):
    text = "common: {lora-r: 8}\neval: {reward-funcs: r}\nphases: [{name: a, kind: sft, max-steps: 1, self: 2}]\n"
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    found = read_pipeline_file(str(tmp_path / "p.yaml"))
    assert found["common"] == {"lora_r": 8} and found["eval"] == {"reward_funcs": "r"}
    assert found["phases"][0].settings == {"max_steps": 1, "self": 2}  # of which SFTConfig has no second one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config is missing"),
        (["--config", "r1_zero", "--learning_rate", "1"], "--learning_rate is no flag of a pipeline"),
        (
            ["--config", "r1_zero", "--until", "nowhere"],
            "--until 'nowhere' is none of the phases; they are reasoning-rl",
        ),
    ],
)
def test_the_command_refuses_in_a_sentence(arguments, words, capsys):
    assert cli.main(["r1", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_rows_of_several_datasets_say_which_they_are_of(files):
    rows = [{"prompt": [{"role": "user", "content": "hello"}], "tone": "kind"}]
    (rl,) = resolve(str(DEMO_MODEL), [Phase("rl", "grpo", **{**RL, "dataset": ["sums.jsonl", rows]})], "out").runs
    joined = with_datasets(rl, rl.inputs)["dataset"]
    assert [row["dataset"] for row in joined] == ["sums.jsonl"] * 8 + ["dataset 2"]
    assert joined[-1]["prompt"] == rows[0]["prompt"] and joined[-1]["tone"] == "kind"
    (rl,) = resolved(Phase("rl", "grpo", **{**RL, "dataset": ["sums.jsonl", "held.jsonl"]}, dataset_take=3))
    with pytest.raises(InputError, match="dataset_take=3 is for one dataset, and dataset has several"):
        with_datasets(rl, rl.inputs)


def test_several_datasets_to_imitate_are_mixed_though_one_is_still_to_be_made(files):
    mixed = Phase("a", "sft", from_="base", **{**COLD, "dataset": ["s", "cold.jsonl"]}, dataset_weights=[3.0, 1.0])
    sampling = Phase("s", "sample", dataset="sums.jsonl")
    pipeline = resolve(str(DEMO_MODEL), [sampling, mixed], "out", {"use_cpu": True})
    assert with_datasets(pipeline.runs[1], pipeline.runs[1].inputs)["dataset"] == ["s", "cold.jsonl"]
    assert check(pipeline, pipeline.runs[1], pipeline.runs, planned=False).facts == ["dataset is still to be made by s"]
    mixed.settings["dataset_weights"] = [1.0]
    pipeline = resolve(str(DEMO_MODEL), [sampling, mixed], "out", {"use_cpu": True})
    with pytest.raises(InputError, match="dataset_weights has 1 weight for 2 datasets"):
        check(pipeline, pipeline.runs[1], pipeline.runs, planned=False)


def test_what_was_sampled_is_selected_from_and_paired_by_phases(files):
    def line(number, text, reward):
        prompt = [{"role": "user", "content": f"{number}+1="}]
        row = {"prompt": prompt, "completion": [{"role": "assistant", "content": text}], "columns": {}, "finish": "eos"}
        return {**row, "rewards": {"r": reward}, "reward": reward, "tokens": len(text), "prompt_index": number}

    rows = [line(1, "2", 1.0), line(1, "3", 0.0), line(2, "4", 0.0), line(2, "5", 0.0)]
    (files / "sampled.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    rules = [
        Phase("right", "select", dataset="sampled.jsonl", min_reward=1),
        Phase("both", "pairs", dataset="sampled.jsonl", min_margin=0.5),
    ]
    result = run(rules, common={}, evaluation=None)
    chosen, pairs = ([json.loads(one) for one in Path(result.output_dir, name).read_text(encoding="utf-8").splitlines()]
                     for name in ("01-right/selected.jsonl", "02-both/pairs.jsonl"))  # fmt: skip
    assert chosen == rows[:1] and (pairs[0]["chosen"], pairs[0]["rejected"]) == (
        rows[0]["completion"],
        rows[1]["completion"],
    )
    assert result.adapter is None and result.metrics["both"] == {"pairs": 1}
    with pytest.raises(InputError, match="phase right: it is done, with min_reward 1, which is 2 now"):
        run([Phase("right", "select", dataset="sampled.jsonl", min_reward=2), rules[1]], common={}, evaluation=None)
    with pytest.raises(InputError, match="phase right: from: 'base' is of no use to the kind select"):
        resolved(Phase("right", "select", from_="base", dataset="sampled.jsonl"))


def test_rewards_and_critics_may_be_phases_before(files):
    """By name, and in quotes within a call; while they are still to be made, a stand-in is checked."""
    pairs = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 2
    routed = f"get_routed_reward(reward='taste', column='solution', values=['{TRAIN[0][0]}'])"
    given = {**RL, "reward_funcs": [routed, "taste", REWARD], "adv_estimator": "gae", "critic_init": "taste"}
    pipeline = resolve(
        str(DEMO_MODEL),
        [phases()[0], Phase("taste", "reward", dataset=pairs), Phase("rl", "grpo", **given)],
        "out",
        COMMON,
    )
    cold, taste, rl = pipeline.runs
    assert (taste.origin, rl.origin) == (cold, cold) and pipeline.needed(rl) == [cold, taste, taste, taste]
    assert pipeline.filled(rl, routed, lambda run: str(run.output)) == routed.replace(
        "'taste'", "'out/02-taste/adapter'"
    )
    assert pipeline.filled(rl, "taste", lambda run: "there") == "there" and pipeline.named(rl, "tasteful") == []
    facts = check(pipeline, rl, pipeline.runs, planned=False).facts
    assert facts[0] == "8 rows, 1 step" and "reward_funcs is still to be made by taste" in facts
    assert resolve_reward_funcs(AWAITED)[0](completions=["a", "b"]) == [0.0, 0.0]


@pytest.mark.slow
def test_the_example_is_a_pipeline_that_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(RECIPES.parents[1])
    arguments = ["r1", "--config", "examples/sums/pipeline.yaml", "--output_dir", str(tmp_path / "out"), "--dry_run"]
    assert cli.main(arguments) == 0
    assert "phase 5 of 5, sft (sft): begins, from base" in capsys.readouterr().out


def test_the_example_for_a_real_model_is_a_pipeline_whose_sums_are_right_and_held_out():
    folder = RECIPES.parents[1] / "examples/r1_sums"
    found = read_pipeline_file(str(folder / "r1.yaml"))
    resolve(found["model"], found["phases"], found["output_dir"], found["common"], found["eval"])
    asked = {}
    for name in ("cold", "sums", "few_sums", "held_out"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        asked[name] = {row["prompt"][0]["content"] for row in rows}
        for row in rows:
            a, b = map(int, row["prompt"][0]["content"].removeprefix("What is ").removesuffix("?").split(" + "))
            worked = f"<think>{a} + {b} = {a + b}</think>\\boxed{{{a + b}}}"
            assert row.get("solution", str(a + b)) == str(a + b)
            assert "completion" not in row or row["completion"][0]["content"] == worked
    assert len(asked["held_out"]) == 200 and not asked["held_out"] & (asked["cold"] | asked["sums"] | asked["few_sums"])
