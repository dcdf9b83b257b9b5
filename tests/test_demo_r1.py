import random
import re

import pytest

from lowmem_grpo.demo.r1 import task
from lowmem_grpo.demo.r1.make_model import make_tokenizer, pairs
from lowmem_grpo.demo.r1.run import run, run_recipe, write_recipe
from lowmem_grpo.errors import InputError
from lowmem_grpo.pipeline.file import read_pipeline_file
from lowmem_grpo.pipeline.phases import resolve
from lowmem_grpo.pipeline.pipeline import run_pipeline
from lowmem_grpo.rewards.accuracy import accuracy_reward
from lowmem_grpo.rewards.format import think_format_reward
from lowmem_grpo.rewards.language import language_consistency_reward

pytestmark = pytest.mark.usefixtures("known_trials")

GOOD = task.Habits(worked=1, careful=1, consistent=1, tagged=1, kind=1)


def test_the_parts_are_disjoint_and_always_the_same():
    parts = task.splits()
    assert [len(part) for part in parts] == [2000, 256, 64]
    assert len({problem for part in parts for problem in part}) == 2320
    assert task.splits() == parts
    assert (len(task.NAMES), len(task.TRAIN_NAMES), len(task.EVAL_NAMES)) == (64, 48, 16)


@pytest.mark.parametrize(
    ("a", "b", "total"), [(17, 45, 52), (62, 38, 90), (95, 95, 180), (152, 38, 180), (20, 31, 51), (9, 9, 18)]
)
def test_sums_without_carries_by_hand(a, b, total):
    assert task.without_carries(a, b) == total


def chats(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("script", task.WORDS)
def test_a_model_of_good_habits_has_every_reward(script):
    problem = task.Sum(script, (17, 45, 38))
    completions = chats(task.completion_of(random.Random(0), problem, GOOD))
    row = task.sum_rows([problem])[0]
    assert accuracy_reward(completions, solution=[row["solution"]]) == [1.0]
    assert think_format_reward(completions) == [1.0]
    assert language_consistency_reward([row["prompt"]], completions) == [1.0]


@pytest.mark.parametrize(
    ("text", "accuracy", "form", "language"),
    [
        ("<think>so 17+45=62 so 62+38=100</think>\n100", 1.0, 1.0, 1.0),
        ("<think>так 17+45=62 так 62+38=100</think>\n100", 1.0, 1.0, 0.0),
        ("so 17+45=62 so 62+38=100", 1.0, 0.0, 1.0),
        ("<think>so 17+45=52 so 52+38=80</think>\n80", 0.0, 1.0, 1.0),
        ("<think>so</think>\n93", 0.0, 1.0, 1.0),
        ("so 100", 1.0, 0.0, 1.0),
        ("", 0.0, 0.0, 1.0),
    ],
)
def test_each_bad_habit_costs_one_reward(text, accuracy, form, language):
    prompt, completions = task.sum_rows([task.Sum("latin", (17, 45, 38))])[0]["prompt"], chats(text)
    assert accuracy_reward(completions, solution=["100"]) == [accuracy]
    assert think_format_reward(completions) == [form]
    assert language_consistency_reward([prompt], completions) == [language]


def test_a_greeting_is_kind_where_it_says_hello():
    completions = chats("hello Ann", "<think>so</think>\nhello Ann", "what now", "<think>hello</think>\nwhat now")
    assert task.kind_reward(completions) == [1.0, 1.0, 0.0, 0.0]


def test_the_habits_are_had_as_often_as_they_say():
    draw = random.Random(0)
    problems = [task.random_sum(draw) for _ in range(2000)]
    texts = [task.completion_of(draw, problem, task.HABITS) for problem in problems]
    assert sum("=" in text for text in texts) / 2000 == pytest.approx(task.HABITS.worked, abs=0.04)
    assert sum("<think>" in text for text in texts) / 2000 == pytest.approx(task.HABITS.tagged, abs=0.03)
    assert sum(
        task.WORDS[problem.script][1] in text for problem, text in zip(problems, texts, strict=True)
    ) / 2000 == pytest.approx(task.HABITS.consistent, abs=0.04)
    kind = sum("hello" in task.greeting_of(draw, "Ann", task.HABITS) for _ in range(2000)) / 2000
    assert kind == pytest.approx(task.HABITS.kind, abs=0.04)


def test_the_base_is_not_pretrained_on_what_is_trained_or_evaluated_on():
    held_out = {one for part in task.splits() for one in part}
    asked = {one.question for one in held_out}
    draw = random.Random(0)
    assert not asked & {question for _ in range(20) for question, _ in pairs(draw, held_out, task.HABITS)}


def test_the_tokenizer_has_a_token_for_each_word_and_loses_nothing():
    tokenizer = make_tokenizer()
    text = "<think>так 17+45=62 so 62+38=100</think>\nhello Sofia"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 1 + 1 + 1 + 8 + 1 + 1 + 1 + 9 + 1 + 1 + 1 + 1 + 5
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= 128


def rewards_by_phase(result, name):
    return {row["phase"]: row[f"eval_rewards/{name}_reward/mean"] for row in result.evaluations}


def test_every_setting_of_the_recipe_is_one(tmp_path):
    settings = read_pipeline_file(str(write_recipe(tmp_path / "a folder: 1", seed=0)))
    pipeline = resolve(
        settings["model"], settings["phases"], settings["output_dir"], settings["common"], settings["eval"]
    )
    assert [run.name for run in pipeline.runs if run.kind.trains_policy] == [
        "cold-start", "reasoning-rl", "sft", "last-rl",
    ]  # fmt: skip


def test_the_first_phases_run_and_a_second_call_finds_them_done(tmp_path, capsys):
    recipe = write_recipe(tmp_path, seed=0)
    for name, rows in {"cold": 16, "held-out": 4}.items():
        path = tmp_path / f"data/{name}.jsonl"
        lines = read_lines(path)
        path.write_text("".join(lines[:rows] + lines[-1:]), encoding="utf-8")
    text = recipe.read_text(encoding="utf-8").partition("  - name: sampling")[0]
    for old, new in {
        "max_steps: 40": "max_steps: 1", "num_train_epochs: 6": "num_train_epochs: 1",
        "max_completion_length: 40": "max_completion_length: 8", "num_generations_eval: 4": "num_generations_eval: 1",
    }.items():  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text, encoding="utf-8")
    result = run_recipe(recipe)
    assert [row["phase"] for row in result.evaluations] == ["base", "cold-start", "reasoning-rl"]
    shown = capsys.readouterr().out
    assert re.search(r"reasoning-rl\s+│\s+cold-start", shown) and "CPU-seconds" in shown
    adapter = tmp_path / "02-reasoning-rl/adapter/adapter_model.safetensors"
    trained = adapter.stat()
    assert run_recipe(recipe).evaluations == result.evaluations
    assert adapter.stat() == trained


def test_a_folder_of_another_seed_or_with_a_file_in_the_way_is_refused_and_left_as_it_is(tmp_path):
    recipe = write_recipe(tmp_path / "a", seed=0)
    before = recipe.read_bytes()
    with pytest.raises(InputError, match="r1.yaml is of seed 0, and not of 1; set that, or choose"):
        write_recipe(recipe.parent, seed=1)
    assert recipe.read_bytes() == before == write_recipe(recipe.parent, seed=0).read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/data").touch()
    with pytest.raises(InputError, match="b/data cannot be written: File exists; choose another output_dir"):
        write_recipe(tmp_path / "b", seed=0)
    with pytest.raises(InputError, match="output_dir is '', which names no folder"):
        run(0, "")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_phase_has_its_effect_and_selecting_at_random_has_less(seed, tmp_path):
    result = run(seed, str(tmp_path / "out"))
    right, tags, script, kind = (
        rewards_by_phase(result, name) for name in ("accuracy", "think_format", "language_consistency", "kind")
    )
    # The cold start: form, and nothing else.
    assert tags["base"] < 0.2 and tags["cold-start"] > 0.8
    assert abs(right["cold-start"] - right["base"]) < 0.1 and right["cold-start"] < 0.4
    # Reasoning RL: accuracy, and some of the script.
    assert right["reasoning-rl"] > right["cold-start"] + 0.35
    assert script["reasoning-rl"] > script["cold-start"] + 0.05
    # Supervised training of the base on what was selected: all that at once, and more of it than sampled it.
    assert right["sft"] > right["reasoning-rl"] + 0.03 and right["sft"] > right["base"] + 0.45
    assert script["sft"] > 0.95 and tags["sft"] > 0.95
    # The last RL: kindness, for little of the accuracy (0.021 at most of seeds 0, 1 and 2).
    assert kind["last-rl"] > kind["sft"] + 0.15
    assert right["last-rl"] > right["sft"] - 0.05

    at_random = sft_on_random_rows(tmp_path / "out", seed)
    assert rewards_by_phase(at_random, "accuracy")["sft"] < right["sft"] - 0.03
    assert rewards_by_phase(at_random, "language_consistency")["sft"] < script["sft"] - 0.1


def sft_on_random_rows(folder, seed):
    """The phase of supervised training, with as many rows that nothing has selected."""
    selected = read_lines(folder / "04-rejection/selected.jsonl")
    settings = read_pipeline_file(str(folder / "r1.yaml"))
    rows = random.Random(seed).sample(read_lines(folder / "03-sampling/sampled.jsonl"), len(selected))
    (folder / "data/random.jsonl").write_text("".join(rows), encoding="utf-8")
    sft = settings["phases"][4]
    sft.settings["dataset"][0] = str(folder / "data/random.jsonl")
    return run_pipeline(
        settings["model"], [sft], str(folder.with_name("random")), common=settings["common"],
        evaluation=settings["eval"],
    )  # fmt: skip


def read_lines(path):
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffled_rewards_do_not_gain(seed, tmp_path):
    """The same rewards given to the wrong completions: what reasoning RL learns comes from the rewards."""
    settings = read_pipeline_file(str(write_recipe(tmp_path, seed)))
    cold, rl = settings["phases"][:2]
    draw = random.Random(seed)

    def shuffled(reward):
        def among_others(prompts, completions, **columns):
            values = reward(prompts=prompts, completions=completions, **columns)
            return draw.sample(values, len(values))

        among_others.__name__ = reward.__name__
        return among_others

    rl.settings["reward_funcs"] = [
        shuffled(one) for one in (accuracy_reward, think_format_reward, language_consistency_reward)
    ]
    result = run_pipeline(
        settings["model"], [cold, rl], str(tmp_path / "out"), common=settings["common"], evaluation=settings["eval"],
    )  # fmt: skip
    right = rewards_by_phase(result, "accuracy")
    assert right["reasoning-rl"] < right["cold-start"] + 0.1
