"""pairs() and label(): better and worse completions, by their rewards or by a person at a terminal."""

import io
import json
import os
import signal
import sys

import pytest
from test_select import FILE, row, write

from lowmem_grpo import cli
from lowmem_grpo.errors import InputError, NotSavedError
from lowmem_grpo.pipeline.pairs import label, pairs

PROMPTS = ["question A", "question B", "question C"]


def test_the_best_and_the_worst_of_a_prompt_are_a_pair_by_the_sum_of_their_rewards():
    found = pairs(FILE)
    assert [(one["prompt"], one["chosen"], one["rejected"]) for one in found] == [
        ("question A", FILE[2]["completion"], FILE[0]["completion"]),  # 2.0 and 1.0; of equal ones the first
        ("question B", FILE[4]["completion"], FILE[6]["completion"]),  # 2.0 and 0.0
    ]  # and C's all have 0.5
    assert (found[0]["reward_chosen"], found[0]["reward_rejected"], found[0]["prompt_index"]) == (2.0, 1.0, 0)
    assert "margin" not in found[0], "a column that a reward model's loss would read"


def test_a_pair_that_is_too_near_is_none():
    assert [one["prompt"] for one in pairs(FILE, min_margin=1.5)] == ["question B"]
    with pytest.raises(InputError, match="no prompt has completions whose rewards differ, by at least 3; sample more"):
        pairs(FILE, min_margin=3)
    with pytest.raises(InputError, match="min_margin=-1 must be at least 0"):
        pairs(FILE, min_margin=-1)
    with pytest.raises(InputError, match="whose rewards differ; sample more"):
        pairs([row("question A", "four", 1.0), row("question A", "four", 0.0)])


def test_a_pair_of_chats_keeps_what_their_template_is_shown_with():
    def chat(text, reward):
        one = row("question A", [{"role": "assistant", "content": text}], reward)
        return {**one, "prompt": [{"role": "user", "content": "hi"}], "tools": [{"name": "t"}]}

    (found,) = pairs([chat("a", 0.0), chat("b", 1.0)])
    assert found["tools"] == [{"name": "t"}] and found["chosen"] == [{"role": "assistant", "content": "b"}]


def sit(output, typed, rows=FILE, seed=42):
    screen = io.StringIO()
    return label(rows, output, seed, io.StringIO(typed), screen), screen.getvalue()


def labels(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shown(screen):
    """The two texts of each question, as (first, second)."""
    found = []
    for part in screen.split("--- 1 ")[1:]:
        first, second = part.split("--- 2 ")
        found.append(tuple(text.split("\n", 1)[1].split("\n1 or 2")[0].strip() for text in (first, second)))
    return found


def test_a_person_chooses_and_each_decision_is_a_row(tmp_path):
    path = tmp_path / "new/pairs.jsonl"
    result, screen = sit(path, "1\n2\nmaybe\n1\n")
    assert result == (3, 0) and screen.count("1 or 2, the better one") == 4  # once again, after what is no answer
    for one, (first, second), choice in zip(labels(path), shown(screen), "121", strict=True):
        better, worse = (first, second) if choice == "1" else (second, first)
        assert one["chosen"].strip() == better and one["rejected"].strip() == worse
    assert "reward" not in screen, "which would sway a person"


def test_a_sitting_goes_on_where_the_last_one_ended_and_asks_again_what_was_skipped(tmp_path):
    path = tmp_path / "pairs.jsonl"
    assert sit(path, "1\nskip\nquit\n")[0] == (1, 2)
    first = path.read_bytes()
    path.write_bytes(first + b'{"prompt": "question B", "cho')  # a kill in the middle of a line
    result, screen = sit(path, "2\n")  # and the input ends
    assert result == (2, 1) and "1 of 2" in screen and "question A" not in screen
    assert path.read_bytes().startswith(first) and [one["prompt"] for one in labels(path)] == PROMPTS[:2]
    assert sit(path, "1\n")[0] == (3, 0) and sit(path, "")[0] == (3, 0)


def test_the_order_of_the_two_is_of_the_seed_and_any(tmp_path):
    def of(seed):
        return shown(sit(tmp_path / "none.jsonl", "s\ns\ns\n", seed=seed)[1])

    assert of(0) == of(0)
    orders = {tuple(of(seed)[2]) for seed in range(30)}
    assert {("six", "seven"), ("seven", "six")} <= orders


def test_completions_that_are_the_same_are_no_question(tmp_path):
    with pytest.raises(InputError, match="no prompt has two different completions"):
        sit(tmp_path / "pairs.jsonl", "1\n", rows=FILE[:2])


def test_what_a_model_wrote_does_not_move_the_cursor(tmp_path):
    rows = [row("question A", "\x1b[2Jgone", 1.0), row("question A", "here", 0.0)]
    assert "\x1b" not in sit(tmp_path / "pairs.jsonl", "q\n", rows=rows)[1]


@pytest.mark.parametrize(
    "there", ['{"a": 1}\n', "nothing\n", "[]\n", "my notes", '{"a": 1}', '{\n "a": 1}', "{}\nmine"]
)
def test_a_file_of_something_else_is_not_appended_to(tmp_path, there):
    path = tmp_path / "mine.jsonl"
    path.write_text(there)
    with pytest.raises(InputError, match="is there, and is no file of pairs; choose another one"):
        sit(path, "1\n")
    assert path.read_text() == there


def test_a_file_of_pairs_by_rewards_is_not_appended_to(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pairs(FILE)[0]) + "\n")
    with pytest.raises(InputError, match="has pairs by their rewards, and no person's; choose another one"):
        sit(path, "1\n")


def test_a_persons_labels_are_not_written_over(tmp_path, capsys):
    sampled, output = write(tmp_path / "sampled.jsonl"), tmp_path / "pairs.jsonl"
    sit(output, "1\nq\n")
    before = output.read_bytes()
    for command in ("pairs", "select"):
        assert cli.main([command, str(sampled), "--output", str(output)]) == 2
        assert "has a person's labels, which would be lost; choose another one" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_a_last_decision_whose_line_has_no_end_is_kept_and_a_kill_at_any_byte_costs_that_line_alone(tmp_path):
    path = tmp_path / "pairs.jsonl"
    sit(path, "1\n2\nq\n")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # as an editor leaves it
    assert sit(path, "q\n")[0] == (2, 1) and path.read_bytes() == whole
    first = whole.index(b"\n") + 1
    for num_bytes in range(len(whole) - 1):
        path.write_bytes(whole[:num_bytes])
        num_whole = int(num_bytes >= first - 1)
        assert sit(path, "q\n")[0] == (num_whole, 3 - num_whole)
        assert path.read_bytes() == whole[: first * num_whole]


@pytest.mark.skipif(os.name == "nt", reason="has no limits of a file's size")
def test_a_full_disk_ends_a_sitting_in_a_sentence_and_loses_one_decision(tmp_path):
    import resource

    path = tmp_path / "pairs.jsonl"
    sit(path, "1\nq\n")
    first, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(first) + 20, limits[1]))
    try:
        with pytest.raises(NotSavedError, match=r"pairs.jsonl cannot be written \(File too large\); make room and run"):
            sit(path, "1\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sit(path, "q\n")[0] == (1, 2) and path.read_bytes() == first


def test_the_commands_write_files_of_pairs(tmp_path, capsys, monkeypatch):
    sampled, output = write(tmp_path / "sampled.jsonl"), tmp_path / "pairs.jsonl"
    assert cli.main(["pairs", str(sampled), "--output", str(output), "--min_margin", "1.5"]) == 0
    assert f"{output}: 1 pair of 3 prompts" in capsys.readouterr().out
    assert [one["prompt"] for one in labels(output)] == ["question B"]
    monkeypatch.setattr("sys.stdin", io.StringIO("1\nq\n"))
    assert cli.main(["label", str(sampled), "--output", str(tmp_path / "mine.jsonl"), "--seed", "3"]) == 0
    assert f"{tmp_path / 'mine.jsonl'}: 1 pair, 2 prompts left" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["pairs", "s.jsonl"], "--output is missing; see `lowmem-grpo pairs --help`"),
        (["pairs", "s.jsonl", "--output", "s.jsonl"], "is what is read, and would be lost"),
        (["pairs", "s.jsonl", "--output", "a", "--min_margin", "x"], "min_margin: 'x' is not a number"),
        (
            ["pairs", "s.jsonl", "--output", "a", "--beta", "1"],
            "PairsConfig has no field 'beta'; see `lowmem-grpo pairs",
        ),
        (["pairs", "s.jsonl", "--output", "a", "--min_marign", "1"], "did you mean min_margin?"),
        (["label", "s.jsonl", "--output", "a", "--sed", "1"], "--sed 1 is not understood; see `lowmem-grpo label"),
        (["label", "s.jsonl", "--output", "a", "--seed", "x"], "seed: 'x' is not a whole number"),
        (["label", "s.jsonl", "--output", "s.jsonl"], "is no file of pairs"),
    ],
)
def test_the_commands_refuse_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s.jsonl")
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="has no pseudo-terminals")
def test_a_person_at_a_terminal_is_asked_and_what_was_decided_outlives_a_kill(tmp_path):
    import pty

    sampled, output = write(tmp_path / "sampled.jsonl"), tmp_path / "pairs.jsonl"
    ours, theirs = pty.openpty()
    process = os.fork()  # a process of its own, that need not import torch once more
    if not process:
        for number in range(3):
            os.dup2(theirs, number)
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # pytest has others
            setattr(sys, name, open(theirs, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        os._exit(cli.main(["label", str(sampled), "--output", str(output)]))
    os.close(theirs)

    def read_until(words, count):
        said = ""
        while said.count(words) < count:
            said += os.read(ours, 10_000).decode()
        return said

    assert "1 of 3" in read_until("q to quit: ", 1)
    os.write(ours, b"2\n")
    assert "2 of 3" in read_until("q to quit: ", 1)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(ours)
    assert [one["prompt"] for one in labels(output)] == PROMPTS[:1]
    assert sit(output, "1\n1\n")[0] == (3, 0)
