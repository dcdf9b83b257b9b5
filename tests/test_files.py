"""JSONL, JSON and CSV files: each value reaches the rewards as it is written, or the file is refused with the row."""

import csv
import json
import math
from functools import partial

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.data import rows as reading
from lowmem_grpo.data.rows import load_rows, read_rows
from lowmem_grpo.errors import InputError

# What a reader that guesses takes for a date, a number, a truth value or nothing; and what a writer has to escape.
GUESSED = [
    "2023-01-02", "2023-01-02T03:04:05Z", "12:30", "1/2/2003", "0110", "007", "1.50", "1e5", "1E400", "+7", "1,000", "-0",
    "12345678901234567890123", "0x1A", "NaN", "nan", "NA", "N/A", "null", "None", "", "inf", "-Infinity", "true", "False",
    "yes", "1_000", " 7 ", "\t7", "7\n", '"', '""', "a,b", "a;b", "a\tb", "'", "\\frac{1}{2}", "\\n", "a\nb", "a\r\nb", "a\rb",
    "\u2028", "\x85", "\ufeff", "\x00", "½", "٣", "東京", "😀", "[1, 2]", '["34"]', '{"a": 1}', "#### 7", "# a comment", "=1+1",
]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(GUESSED), st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
COLUMNS = ("prompt", "solution", "answer")
ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, TEXTS)), min_size=20, max_size=20)


def write_csv(path, rows, **dialect):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **dialect)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows, **options):
    path.write_text("".join(json.dumps(row, **options) + "\n" for row in rows), encoding="utf-8", newline="")


def write_json(path, rows, **options):
    path.write_text(json.dumps(rows, **options), encoding="utf-8", newline="")


WRITERS = {
    "rows.csv": write_csv,
    "quoted.csv": lambda path, rows: write_csv(path, rows, quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "rows.jsonl": write_jsonl,
    "unescaped.jsonl": lambda path, rows: write_jsonl(path, rows, ensure_ascii=False),
    "rows.json": write_json,
    "indented.json": lambda path, rows: write_json(path, rows, indent=1, ensure_ascii=False),
}


def load(path, **settings):
    return load_rows(str(path), GRPOConfig(**settings)).to_list()


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(rows=ROWS)
def test_a_thousand_rows_of_texts_come_back_as_pythons_writers_wrote_them(name, rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / name
    WRITERS[name](path, rows)
    assert load(path) == rows


@pytest.mark.parametrize("name", WRITERS)
def test_a_text_that_looks_like_something_else_stays_a_text_alone_and_among_others(name, tmp_path):
    path = tmp_path / name
    for rows in [[text] for text in GUESSED], [GUESSED]:
        for column in rows:
            WRITERS[name](path, [{"prompt": "x", "answer": text} for text in column])
            assert [row["answer"] for row in load(path)] == column


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["7", "12"], [7, 12]),
        (["0.5", "2.25"], [0.5, 2.25]),
        (["7", "2.5"], ["7", "2.5"]),
        (["7", '"7 apples"'], ["7", "7 apples"]),
        (["1.50", "2"], ["1.50", "2"]),
        (["1e5"], ["1e5"]),
        (["-0", "1"], ["-0", "1"]),
        (["12345678901234567890123"], ["12345678901234567890123"]),
        (["0.1000000000000000055511151231257827"], ["0.1000000000000000055511151231257827"]),
        (["1" * 5000], ["1" * 5000]),
        (["7", "null"], [7, None]),
        (["NaN", "7"], [None, 7]),
        (["Infinity"], ["Infinity"]),
    ],
)  # fmt: skip
def test_a_number_of_json_is_what_is_written(written, read, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "x", "answer": {value}}}\n' for value in written))
    assert [row["answer"] for row in load(path)] == read


def test_other_columns_are_numbers_texts_lists_and_objects(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "x", "target": 24, "level": 1, "share": 1, "numbers": [1, 2.5], "meta": {"a": 1e3}}\n'
        '{"prompt": "y", "target": 7, "level": "high", "share": 0.5, "numbers": [], "meta": {"a": null}}\n'
    )
    assert load(path) == [
        {"prompt": "x", "target": 24, "level": "1", "share": 1.0, "numbers": [1.0, 2.5], "meta": {"a": 1000.0}},
        {"prompt": "y", "target": 7, "level": "high", "share": 0.5, "numbers": [], "meta": {"a": None}},
    ]
    (tmp_path / "rows.csv").write_text("prompt,target,share,level,code\nx,24,1,1,007\ny,,0.5,high,42\n")
    assert load(tmp_path / "rows.csv") == [
        {"prompt": "x", "target": 24, "share": 1.0, "level": "1", "code": "007"},
        {"prompt": "y", "target": None, "share": 0.5, "level": "high", "code": "42"},
    ]


def test_a_column_that_only_a_later_row_has_is_there(tmp_path):
    rows = [{"prompt": "x"}, {"prompt": "y", "answer": "7"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [row["answer"] for row in load(tmp_path / "rows.jsonl")] == [None, "7"]
    assert load_rows(rows, GRPOConfig())["answer"] == [None, "7"]


def test_chats_of_a_file_are_chats(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": text} for text in ("2023-01-02", "1e5")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert load(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"prompt": "x"}\n{"prompt": }\n', "row 1 of train_dataset .* cannot be read as json: Expecting value at its character 12; mend it"),
        ("rows.jsonl", '{"prompt": "x"}\n\n[1]\n', "row 1 of train_dataset .* is no object"),
        ("rows.jsonl", '{"prompt": "x", "answer": "\\ud800"}\n', "row 0 of train_dataset .* UTF-8"),
        ("rows.jsonl", b'{"prompt": "x"}\n{"prompt": "\xe9"}\n', "row 1 of train_dataset .* UTF-8"),
        ("rows.jsonl", '{"prompt": "x", "answer": "7"}\n{"prompt": "x", "answer": ["7"]}\n', "the answer of row 1 of .* is a list"),
        ("rows.jsonl", '{"prompt": "x"}\n{"prompt": [{"role": "user", "content": "x"}]}\n', "the prompt of row 1 of .* is a list"),
        ("rows.json", '[{"prompt": "x"}, 7]', "row 1 of train_dataset .* is no object"),
        ("rows.json", '[{"prompt": "x"}', "cannot be read as json"),
        ("rows.csv", "prompt,answer\nx,7\ny,1,000\n", "row 1 of train_dataset .* has 3 cells for 2 columns"),
        ("rows.csv", "prompt,answer\nx\n", "row 0 of train_dataset .* has 1 cell for 2 columns"),
        ("rows.csv", 'prompt,answer\nx,7\n"y"z,8\n', "row 1 of train_dataset .* cannot be read as csv"),
        ("rows.csv", 'prompt,answer\nx,"7\n', "row 0 of train_dataset .* cannot be read as csv"),
        ("rows.csv", b"prompt,answer\nx,7\ny,\xbd\n", "row 1 of train_dataset .* UTF-8"),
        ("rows.csv", "prompt,prompt\nx,7\n", "the line of names in train_dataset .* has 'prompt' twice; rename"),
        ("rows.csv", "prompt,answer,,\nx,7,,\n", "the line of names in train_dataset .* has '' twice; name each"),
        ("rows.csv", '\ufeffprompt;answer\r\n"a, b";7,5\r\n', "is separated by semicolons; write the file with commas"),
        ("rows.csv", "prompt\tanswer\nx\t7\n", "is separated by tabs; write the file with commas"),
        ("rows.csv", "sep=,\r\nprompt,answer\r\nx,7\r\n", "is a mark for Excel, 'sep='; remove that line"),
        ("rows.jsonl", '[{"prompt": "x"}]\n', "row 0 of train_dataset .* begins a list; .* is named .json"),
        ("rows.jsonl", '[\n  {"prompt": "x"}\n]\n', "row 0 of train_dataset .* begins a list; .* is named .json"),
        ("rows.csv", "prompt,answer\n", "is empty; it needs"),
        ("rows.jsonl", "\n\n", "is empty; it needs"),
        ("rows.jsonl", '{"prompt": "x"}\n{"prompt": "x", "prompt": "y"}\n', "row 1 of train_dataset .* an object has 'prompt' twice"),
        ("rows.json", '[{"prompt": "x", "info": {"a": 1, "a": 2}}]', "an object has 'a' twice"),
        ("rows.jsonl", '{"prompt": "x", "info": ' + 500 * "[" + 500 * "]" + "}", "row 0 of train_dataset .* more than 100 lists"),
        ("rows.jsonl", '{"prompt": "x", "info": ' + 9000 * "[" + 9000 * "]" + "}", "row 0 of train_dataset .* cannot be read as json"),
        ("rows.jsonl", '{"prompt": "x"}'.encode("utf-16"), "row 0 of train_dataset .* write the file in UTF-8"),
        ("rows.json", '{"prompt": "x"}'.encode("utf-16"), "write the file in UTF-8"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused_with_the_rows_number(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_a_long_cell_are_no_trouble(tmp_path):
    long = "x" * 200_000
    (tmp_path / "rows.csv").write_text(f"prompt,answer\n{long},7\n", encoding="utf-8-sig")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "answer": "7"}\n', encoding="utf-8-sig")
    assert load(tmp_path / "rows.csv") == [{"prompt": long, "answer": "7"}]
    assert load(tmp_path / "rows.jsonl") == [{"prompt": "x", "answer": "7"}]
    assert csv.field_size_limit() == 131_072


def test_a_streamed_file_is_read_only_as_far_as_it_is_taken(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\nbroken')
    assert [row["prompt"] for row in load(tmp_path / "rows.jsonl", dataset_streaming=True, dataset_take=2)] == [
        "x",
        "y",
    ]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_a_folders_files_are_read_as_they_are_written_split_by_split(suffix, tmp_path):
    rows = [{"prompt": text, "answer": text} for text in GUESSED if text]
    cuts = {"train-0": rows[:9], "train-1": rows[9:], "test": rows[:3]}
    for name, part in cuts.items():
        WRITERS[f"rows.{suffix}"](tmp_path / f"{name}.{suffix}", part)
    assert load(tmp_path) == rows
    assert load(tmp_path, dataset_streaming=True, dataset_take=11) == rows[:11]
    read = {split: load_rows(str(tmp_path), GRPOConfig(), split=split) for split in ("test", "train[8:11]+test[:1]")}
    assert [of_split.to_list() for of_split in read.values()] == [rows[:3], rows[8:11] + rows[:1]]
    (tmp_path / f"train-1.{suffix}").write_bytes(b"\xff")
    with pytest.raises(InputError, match=rf"train-1\.{suffix}"):
        load(tmp_path)


def test_a_folders_card_may_say_how_its_files_are_read(tmp_path):
    card = "---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n  sep: ';'\n---\n"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "rows.csv").write_text("prompt;answer\nx;007\n")
    assert load(tmp_path) == [{"prompt": "x", "answer": "007"}]
    (tmp_path / "rows.csv").write_text("prompt;answer\nx;z\n")
    assert load(tmp_path) == [{"prompt": "x", "answer": "z"}], "the rows of the last run"


@pytest.mark.parametrize(
    ("name", "written", "read"),
    [
        ("rows.csv", ["007", "012"], ["007", "012"]),
        ("rows.csv", ["5", "", "7"], ["5", None, "7"]),
        ("rows.csv", ["1e3", "1.50"], ["1e3", "1.50"]),
        ("rows.csv", ["True", "False"], ["True", "False"]),
        ("rows.csv", ["2023-01-02", "NaN"], ["2023-01-02", None]),
        ("rows.jsonl", ['"2023-01-02"', '"2024-01-02"'], ["2023-01-02", "2024-01-02"]),
        ("rows.jsonl", ["7", "2.50"], ["7", "2.50"]),
        ("rows.jsonl", ["7", "null"], [7, None]),
        ("rows.jsonl", ['"007"', '"null"'], ["007", "null"]),
    ],
)
def test_a_hub_datasets_gold_answers_are_as_they_are_written(name, written, read, tmp_path, monkeypatch):
    is_csv = name.endswith(".csv")
    lines = [f"x,{one}" if is_csv else f'{{"prompt": "x", "answer": {one}}}' for one in written]
    (tmp_path / name).write_text("\n".join(["prompt,answer"] * is_csv + lines))
    monkeypatch.setattr(reading, "look_up_dataset", lambda *_: None)
    for function in ("load_dataset", "load_dataset_builder"):  # which ask the hub of a name
        monkeypatch.setattr(
            reading,
            function,
            partial(lambda own, name, *a, **k: own(str(tmp_path), *a, **k), getattr(reading, function)),
        )
    assert [row["answer"] for row in load_rows("somebody/rows", GRPOConfig()).to_list()] == read
    if is_csv:
        config = GRPOConfig(dataset_streaming=True, dataset_take=9)
        assert [row["answer"] for row in load_rows("somebody/rows", config).to_list()] == read


def test_whole_numbers_that_pandas_made_floats_for_a_missing_one_are_whole_again(tmp_path):
    given = {
        "prompt": ["x"] * 3,
        "answer": [5.0, None, 7.0],
        "solution": [5.5, None, 7.0],
        "final_answer": [5.0, 6.0, 7.0],
    }
    Dataset.from_dict(given).to_parquet(tmp_path / "rows.parquet")
    for dataset in (str(tmp_path / "rows.parquet"), Dataset.from_dict(given)):
        read = load_rows(dataset, GRPOConfig())
        assert [str(read[column][:]) for column in given] == [
            str({**given, "answer": [5, None, 7]}[column]) for column in given
        ]


def test_objects_of_any_shape_stay_as_they_are(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "7"}], "meta": {"n": 1}},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "[1]"}]}], "meta": {"n": "7", "m": None}},
        {"prompt": [{"role": "user", "content": "{}", "name": "Ann"}], "meta": {"n": 2.5, "m": [1, "a"]}},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert load(tmp_path / "rows.jsonl") == rows
    assert load_rows(rows, GRPOConfig()).to_list() == rows


@pytest.mark.parametrize("other", [math.inf, 1e300, 2.5])
def test_floats_that_are_no_whole_numbers_of_arrow_stay_as_they_are(other):
    rows = Dataset.from_dict({"prompt": ["x"] * 3, "solution": [5.0, other, math.nan]})
    assert load_rows(rows, GRPOConfig())["solution"][:2] == [5.0, other]


def test_texts_to_imitate_are_read_as_they_are_written(tmp_path):
    lines = [{"instruction": "Add.", "input": 3, "output": 7}, {"instruction": "Add.", "input": 4, "output": 2.5}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)).replace("2.5", "2.50"))
    (tmp_path / "a.csv").write_text("instruction,input,output\nAdd.,3,7\nAdd.,4,2.5\n")
    (tmp_path / "b.csv").write_text("prompt,output\nx,7\ny,\n")
    (tmp_path / "c.jsonl").write_text('{"prompt": "x", "context": "a"}\n{"prompt": "y", "context": ["a"]}\n')
    read = {path.name: read_rows(path, SFTConfig(use_cpu=True)) for path in tmp_path.iterdir()}
    assert [read[name]["output"][:] for name in ("a.jsonl", "a.csv")] == [["7", "2.50"], ["7", "2.5"]]
    assert read["a.csv"]["input"][:] == [3, 4]
    assert read["b.csv"]["output"][:] == [7, None]
    assert read["c.jsonl"]["context"][:] == ["a", ["a"]]
