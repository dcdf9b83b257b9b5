"""select(): each rule on a file made by hand, the funnel, and rows that supervised training takes."""

import json

import pytest
from tiny_models import DEMO_MODEL

from lowmem_grpo import SelectConfig, SFTConfig, cli, select, sft
from lowmem_grpo.errors import InputError, UnknownNameError
from lowmem_grpo.pipeline.sampled import read_sampled
from lowmem_grpo.pipeline.select import repetition, similarity, words_of
from lowmem_grpo.rewards import get_language_consistency_reward


def row(prompt, completion, reward, tokens=10, finish="eos", **rewards):
    rewards = {"right": reward, **rewards}
    known = [value for value in rewards.values() if value is not None]
    return {
        "prompt": prompt, "completion": completion, "columns": {}, "rewards": rewards,
        "reward": sum(known) if known else None, "finish": finish, "tokens": tokens, "logprob_mean": -0.1,
        "prompt_index": {"A": 0, "B": 1, "C": 2}[prompt[-1]], "seed": 1, "model": "m",
    }  # fmt: skip


# Twelve rows: A is easy (3 of 4 pass), B is of medium difficulty (2 of 5), C is never solved, and has no reward once.
LONG = "one two three four five six seven eight nine ten"
FILE = [
    row("question A", "the answer is four", 1.0, tokens=12, form=0.0),      # 0
    row("question A", "the  answer is\nfour", 1.0, tokens=13, form=0.0),    # 1: a copy of 0
    row("question A", "four, because two and two", 1.0, tokens=9, form=1.0),  # 2: the best of A
    row("question A", "five it is", 0.0, tokens=5, form=1.0),               # 3
    row("question B", f"{LONG} eleven", 1.0, tokens=30, form=1.0),          # 4
    row("question B", f"{LONG} twelve", 1.0, tokens=20, form=1.0),          # 5: nearly 4, and shorter
    row("question B", "no no no no no no no no", 0.0, tokens=8, form=0.0),  # 6: repeats itself
    row("question B", "ответ пять", 0.0, tokens=6, form=0.0),               # 7: in another script
    row("question B", "and so on and on", 0.0, tokens=64, finish="length", form=0.0),  # 8: cut off
    row("question C", "```python\nprint(4)\n```", 0.0, tokens=11, form=0.5),  # 9: a block of code
    row("question C", "six", 0.0, tokens=2, form=0.5),                      # 10
    row("question C", "seven", None, tokens=3, form=0.5),                   # 11
]  # fmt: skip
EVERYTHING = {"finish": ["eos", "stop", "length"], "drop_duplicates": False}


@pytest.mark.parametrize(
    "rule, kept",
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ({"min_reward": 1.0}, [0, 1, 2, 4, 5]),
        ({"min_reward": 1.0, "reward_of": "all"}, [2, 4, 5]),
        ({"min_reward": 0.5, "reward_of": "all"}, [2, 4, 5, 11]),  # where a function gives none it has no say
        ({"min_reward": 2.0, "reward_of": "sum"}, [2, 4, 5]),
        ({"finish": ["eos"]}, [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11]),
        ({"finish": ["length"]}, [8]),
        ({"max_tokens": 9}, [2, 3, 6, 7, 10, 11]),
        ({"min_tokens": 12}, [0, 1, 4, 5, 8]),
        ({"min_pass_rate": 0.1}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"max_pass_rate": 0.5}, [4, 5, 6, 7, 8, 9, 10, 11]),
        ({"min_pass_rate": 0.4, "max_pass_rate": 0.75}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),  # both ends are within
        ({"drop_duplicates": True}, [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ({"max_similarity": 0.7}, [0, 2, 3, 5, 6, 7, 8, 9, 10, 11]),  # of 4 and 5 the shorter one
        ({"max_similarity": 0.9}, [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ({"language": ["prompt"]}, [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]),
        ({"language": ["CYRILLIC"]}, [7]),
        ({"max_repetition": 0.5}, [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]),
        ({"drop_regex": ["```", "^six"]}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 11]),
        ({"per_prompt": 1}, [2, 5, 10]),
        ({"per_prompt": 2, "min_reward": 1.0}, [0, 2, 4, 5]),
    ],
)  # fmt: skip
def test_each_rule_keeps_the_rows_that_it_says(rule, kept):
    found = select(FILE, SelectConfig(**{**EVERYTHING, **rule}))
    assert [FILE.index(one) for one in found.rows] == kept
    assert found.funnel[0][1:] == (12, 3) and found.funnel[-1].num_completions == len(kept)


def test_by_default_only_what_was_cut_off_and_copies_are_left_out():
    assert [FILE.index(one) for one in select(FILE).rows] == [0, 2, 3, 4, 5, 6, 7, 9, 10, 11]


def test_the_funnel_says_what_each_rule_has_left():
    config = SelectConfig(max_pass_rate=0.5, min_reward=1.0, max_similarity=0.7, per_prompt=1)
    assert select(FILE, config).funnel == [
        ("sampled", 12, 3),
        ("max_pass_rate 0.5", 8, 2),
        ("min_reward 1 (first)", 2, 1),
        ("finish eos, stop", 2, 1),
        ("drop_duplicates", 2, 1),
        ("max_similarity 0.7", 1, 1),
        ("per_prompt 1 (best)", 1, 1),
    ]


def test_a_random_choice_is_of_the_seed_and_takes_any():
    def of(seed, **settings):
        found = select(FILE, SelectConfig(choice="random", seed=seed, **EVERYTHING, **settings)).rows
        return [FILE.index(one) for one in found]

    assert of(0, per_prompt=1) == of(0, per_prompt=1)
    chosen = {index for seed in range(60) for index in of(seed, per_prompt=1)}
    assert chosen == set(range(12))
    assert all(len(of(seed, max_rows=5)) == 5 for seed in range(5))
    assert len({tuple(of(seed, max_rows=5)) for seed in range(9)}) > 3
    assert of(0, max_rows=99) == list(range(12))


def test_rows_of_several_files_are_of_one_prompt_where_its_text_is_one():
    again = [{**FILE[2], "tokens": 4, "completion": "four"}]
    assert select([*FILE[:4], *again], SelectConfig(per_prompt=1)).rows == again


def test_hand_computed_overlaps():
    assert words_of("Don't 四五 3.5") == ["don", "'", "t", "四", "五", "3", ".", "5"]
    assert repetition("no no no no no no no no") == pytest.approx(5 / 6)  # 6 n-grams, 1 of them new
    assert repetition("a b c d") == 0 and repetition("") == 0
    assert similarity({1, 2, 3}, {2, 3, 4}) == 0.5


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"min_reward": 3.0}, r"min_reward 3 \(first\) leaves nothing of 12 completions; loosen it, or sample more"),
        ({"min_tokens": 65}, "min_tokens 65 leaves nothing of 11 completions"),
    ],
)
def test_a_rule_that_leaves_nothing_is_an_error_with_the_funnel(settings, words):
    with pytest.raises(InputError, match=rf"{words}.*so far: sampled: 12"):
        select(FILE, SelectConfig(**settings))


def test_a_rule_about_rewards_needs_them():
    with pytest.raises(InputError, match="min_reward is given, and no completion has a reward; sample with reward_"):
        select([{**one, "rewards": {}, "reward": None} for one in FILE], SelectConfig(min_reward=1.0))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"finish": ["end"]}, "finish has 'end'; give some of eos, stop, length"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is above max_tokens=4, so that nothing would be left"),
        ({"drop_regex": ["("]}, "is no regular expression"),
        ({"reward_of": "all"}, "is read only with min_reward"),
        ({"min_language_share": 0.5}, "is read only with language"),
        ({"max_pass_rate": 1.5}, "max_pass_rate must be at most 1"),
    ],
)
def test_rules_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        SelectConfig(**settings)


def test_a_misspelt_rule_is_refused():
    with pytest.raises(UnknownNameError, match="did you mean per_prompt"):
        SelectConfig(per_promt=2)  # type: ignore[call-arg]


def write(path):
    path.write_text("".join(json.dumps(one) + "\n" for one in FILE), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "change, words",
    [
        ({"reward": "1"}, "has no reward as"), ({"reward": float("nan")}, "has no reward as"),
        ({"reward": 10**400}, "has no reward as"), ({"rewards": {"right": True}}, "has no rewards as"),
        ({"rewards": {"right": [1]}}, "has no rewards as"), ({"tokens": -1}, "has no tokens as"),
        ({"completion": ["a"]}, "has no completion as"), ({"completion": []}, "has no completion as"),
        ({"prompt": [{"role": "user", "content": [1]}]}, "has no prompt as"), ({"finish": "end"}, "has no finish as"),
        ({"completion": "half \ud800"}, "is no JSON"),
    ],
)  # fmt: skip
def test_a_line_that_no_sampling_writes_is_refused_with_its_number(tmp_path, change, words):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(FILE[0]) + "\n" + json.dumps({**FILE[1], **change}) + "\n")
    with pytest.raises(InputError, match=f"line 2 of .*{words}"):
        read_sampled(path)
    path.write_text(json.dumps({name: value for name, value in FILE[0].items() if name != "reward"}) + "\n")
    with pytest.raises(InputError, match="line 1 of .* has no reward as"):
        read_sampled(path)


def test_a_whole_last_line_without_an_end_is_read_and_one_that_a_kill_cut_short_is_not(tmp_path):
    path = write(tmp_path / "s.jsonl")
    whole = path.read_bytes()
    for num_bytes, num_rows in ((1, 12), (2, 11), (40, 11)):
        path.write_bytes(whole[:-num_bytes])
        assert len(read_sampled(path)) == num_rows
    path.write_bytes(b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n"))  # as Windows writes it
    assert read_sampled(path) == FILE


def test_the_command_writes_rows_that_sft_trains_on(tmp_path, capsys):
    sampled, output = write(tmp_path / "sampled.jsonl"), tmp_path / "chosen/sft.jsonl"
    arguments = ["select", str(sampled), "--output", str(output), "--min_reward", "1", "--per_prompt", "1"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert ["min_reward", "1", "(first)", "5", "2"] in map(str.split, out.splitlines()) and f"{output}: 2 rows" in out
    assert read_sampled(output) == [FILE[2], FILE[5]]
    assert cli.main(arguments) == 0  # and again
    config = SFTConfig(output_dir=str(tmp_path / "sft"), use_cpu=True, max_steps=1, examples_per_step=2, doctor="off")
    assert len(sft(str(DEMO_MODEL), str(output), None, config).history) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sampled.jsonl"], "--output is missing; see `lowmem-grpo select --help`"),
        (["sampled.jsonl", "--output", "sampled.jsonl"], "is what is read, and would be lost; choose another one"),
        (["sampled.jsonl", "--output", "other.jsonl"], "was sampled by a model, and would be lost"),
        (["sampled.jsonl", "--output", "mine.py"], "is there, is no file of `select` or `pairs`, and would be lost"),
        (
            ["sampled.jsonl", "--output", "foreign.jsonl"],
            "is there, is no file of `select` or `pairs`, and would be lost",
        ),
        (["missing.jsonl", "--output", "a.jsonl"], "'missing.jsonl' cannot be read: No such file"),
        (["empty.jsonl", "--output", "a.jsonl"], "has no line; sample into it first"),
        (["foreign.jsonl", "--output", "a.jsonl"], "line 1 of foreign.jsonl has no completion as"),
        (["sampled.jsonl", "--output", "a.jsonl", "--beta", "1"], "SelectConfig has no field 'beta'"),
        (["--output", "a.jsonl"], "required: SAMPLED"),
    ],
)
def test_the_command_refuses_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sampled.jsonl")
    (tmp_path / "other.jsonl.run").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "mine.py").write_text("work of days\n")
    (tmp_path / "foreign.jsonl").write_text('{"prompt": "x"}\n')
    assert cli.main(["select", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_what_no_row_can_answer_is_refused():
    rows = [{**row, "rewards": {name: 1.0}} for row, name in zip(FILE[:2], ("right", "brief"), strict=True)]
    with pytest.raises(InputError, match="the first reward, which is brief in some rows and right in others"):
        select(rows, SelectConfig(min_reward=1))
    with pytest.raises(InputError, match="language has 'klingon', which no letter's Unicode name begins with"):
        SelectConfig(language=["klingon"])
    assert SelectConfig(language=["cyrillic", "prompt"]).language == ["cyrillic", "prompt"]
    with pytest.raises(InputError, match="scripts has 'KLINGON'"):
        get_language_consistency_reward(["klingon"])


@pytest.mark.parametrize("row", [{"a": 1}, "text", None])
def test_what_is_no_row_of_a_sampled_file_is_refused_in_python_too(row):
    with pytest.raises(InputError, match="row 1 has no prompt as `lowmem-grpo sample` writes it"):
        select([FILE[0], row])
