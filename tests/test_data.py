import gzip
import json
import math
import zipfile

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from pyarrow.parquet import write_table
from tiny_models import DEMO_MODEL
from transformers import AutoTokenizer

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data import rows
from lowmem_grpo.data.prompts import Prompt, tokenize_prompts
from lowmem_grpo.data.rows import GIVEN, load_rows
from lowmem_grpo.errors import InputError
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.rollout.stream import prompts_at

ROWS = [{"prompt": "1+1=", "solution": "2"}, {"prompt": "2+2=", "solution": "4"}]
ENDLESS: list = []
ENDLESS.append(ENDLESS)
CHAT = [{"prompt": [{"role": "user", "content": "1+1="}], "solution": "2"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_local_files_are_read(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    rows = Dataset.from_list(ROWS)
    {"jsonl": rows.to_json, "json": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](path)
    loaded = load_rows(str(path), GRPOConfig())
    assert loaded["prompt"] == ["1+1=", "2+2="]


def test_gsm8k_columns_become_a_chat_and_a_solution(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "3 + 4\n#### 7"}) + "\n")
    row = load_rows(str(path), GRPOConfig())[0]
    assert row["prompt"] == [{"role": "user", "content": "How many?"}]
    assert row["solution"] == row["answer"] == "3 + 4\n#### 7"


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, ("openai/gsm8k", "main", "train")),
        ({"dataset_config": "socratic", "dataset_split": "test"}, ("openai/gsm8k", "socratic", "test")),
    ],
)
def test_the_hub_is_asked_for_the_right_configuration_and_split(monkeypatch, settings, asked):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(rows, "load_dataset", load_dataset)
    monkeypatch.setattr(rows, "look_up_dataset", lambda dataset, name: None)  # which would ask the hub
    load_rows("openai/gsm8k", GRPOConfig(**settings))
    assert calls == [asked]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder of files that are not what their names say."""
    folder = tmp_path_factory.mktemp("bad")
    Dataset.from_list(ROWS).save_to_disk(folder / "in.jsonl/saved")
    Dataset.from_list(ROWS).to_parquet(folder / "parquet.jsonl")
    (folder / "gzip.jsonl").write_bytes(gzip.compress(b'{"prompt": "1+1="}'))
    with zipfile.ZipFile(folder / "excel.csv", "w") as file:
        file.writestr("sheet1.xml", "x")
    (folder / "names.csv").write_text("prompt,solution\n")
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/no/such/file.jsonl", "train_dataset '/no/such/file.jsonl' is not a file on this machine"),
        ("nobody/no-such-dataset", "train_dataset 'nobody/no-such-dataset' is neither"),
        ([], "train_dataset is empty"),
        (["a", "b"], "row 0 of train_dataset is 'a'; a row is a mapping"),
        ([*ROWS, None], "row 2 of train_dataset is None; a row is a mapping"),
        ([{1: "x", "prompt": "y"}], "row 0 of train_dataset is {1: 'x', .*; a row is a mapping of texts"),
        (
            [*ROWS, {"prompt": [{"role": "user", "content": "y"}]}],
            "the prompt of row 2 of train_dataset is .*of another type than that of rows before",
        ),
        ([*ROWS, {"prompt": b"3+3="}], "the prompt of row 2 of train_dataset is b'3.*bytes and texts"),
        ([*ROWS, {"prompt": "a", "solution": ["4"]}], "the solution of row 2 of train_dataset is .'4'., of another"),
        ([{"prompt": "a"}, {"prompt": "b", "x": 10**40}], "the x of row 1 of train_dataset is 10{10,}.*cannot hold"),
        ([{"prompt": "a"}, {"prompt": "\ud800"}], "the prompt of row 1 of train_dataset is '.ud800', of a kind"),
        ([{"prompt": "a", "x": ["b"]}, {"prompt": "a", "x": ["\ud800"]}], "the x of row 1 of train_dataset"),
        ([{"prompt": "a", "x": ENDLESS}], "the x of row 0 of train_dataset is .*more than 100 lists or objects"),
        ({"prompt": ["a", "b"]}, "train_dataset is a dict of no splits; pass a list of rows"),
        (DatasetDict(), "train_dataset is a DatasetDict of no splits"),
        (Dataset.from_list(CHAT).with_transform(dict), "train_dataset has a transform of its own, .* with map\\(\\)"),
        ("", "train_dataset is '', which names nothing"),
        ("x" * 5000 + ".jsonl", "is not a file on this machine"),
        ("~nobody-here/x.jsonl", "is not a file on this machine"),
        ([{"text": "x"}], "has no column named prompt, only text"),
        (7, "train_dataset is a int; pass a hub id"),
        (None, "train_dataset is missing; pass a hub id"),
        ("FOLDER/gzip.jsonl", "gzip.jsonl' is a gzip file by what it begins with; unpack it"),
        ("FOLDER/excel.csv", "excel.csv' is a zip or Excel file"),
        ("FOLDER/parquet.jsonl", "parquet.jsonl' is a Parquet file"),
        ("FOLDER/in.jsonl", "in.jsonl' is a folder; name a file in it"),
        ("FOLDER/names.csv", "names.csv' is empty; it needs at least one row"),
        ("FOLDER/in.jsonl/saved", "saved' was written by save_to_disk..; write it with to_parquet"),
        (DatasetDict({"train": Dataset.from_list(ROWS)}), "has the splits train; pass one of them"),
        (IterableDataset.from_generator(lambda: iter(ROWS)), "of unknown length; set dataset_take"),
    ],
)
def test_bad_datasets_are_refused_in_one_sentence(given, message, bad_files):
    given = given.replace("FOLDER", str(bad_files)) if isinstance(given, str) else given
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(given, GRPOConfig())
    assert "\n" not in str(caught.value)


def test_an_empty_or_broken_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"\nnot json at all')
    with pytest.raises(ValueError, match="is empty"):
        load_rows(str(tmp_path / "empty.jsonl"), GRPOConfig())
    with pytest.raises(ValueError, match="cannot be read as json"):
        load_rows(str(tmp_path / "broken.jsonl"), GRPOConfig())


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        load_rows(str(path), GRPOConfig())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_endless_files_is_refused_and_one_of_data_is_read(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert load_rows(str(tmp_path), GRPOConfig())["prompt"] == ["1+1="]
    monkeypatch.setattr(rows, "MOST_FILES", 3)
    for name in "abcd":
        (tmp_path / name).touch()
    assert "is a folder of more than 3 files; name one with the data alone" in refusal(tmp_path)
    monkeypatch.undo()
    assert "is a folder of more than 10000 files" in refusal("/proc")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.tsv", "rows.txt", "rows.xlsx"])
def test_a_file_of_another_format_is_named_as_one(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(b'{"prompt": "1+1="}'))
    assert "is a file of another format than .jsonl, .json, .csv, .parquet; unpack" in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_pointer_in_place_of_a_file_is_named_as_one(suffix, tmp_path):
    (tmp_path / f"rows.{suffix}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    assert "is a Git LFS pointer and not the file; run `git lfs pull`" in refusal(tmp_path / f"rows.{suffix}")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"prompt": pa.array([], pa.string())}), "is empty; it needs at least one row"),
        (pa.table([["a"], ["b"]], names=["prompt", "prompt"]), "has two columns named 'prompt'; rename one"),
        (pa.table({"prompt": [None, "a"]}), "row 0 of train_dataset has no prompt; fill it, or leave the row out"),
    ],
)
def test_a_parquet_file_that_cannot_be_used_is_refused(table, message, tmp_path, tokenizer):
    write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=message):
        tokenize_prompts(load_rows(str(tmp_path / "rows.parquet"), GRPOConfig()), tokenizer, GRPOConfig())


def ids_of(rows, tokenizer, **settings):
    prompts, dropped = tokenize_prompts(Dataset.from_list(rows), tokenizer, GRPOConfig(**settings))
    return [tokenizer.decode(p.ids) for p in prompts], dropped


def test_a_text_is_tokenized_as_it_is_and_a_chat_by_its_template(tokenizer):
    assert ids_of(ROWS, tokenizer)[0] == ["1+1=", "2+2="]
    assert ids_of(CHAT, tokenizer)[0] == ["<|user|>1+1=<|assistant|>"]


def test_a_system_prompt_goes_first_unless_there_is_one():
    plain = AutoTokenizer.from_pretrained(DEMO_MODEL)
    plain.chat_template = None
    assert ids_of(CHAT, plain, system_prompt="Add.")[0] == ["System: Add.\n\nUser: 1+1=\n\nAssistant:"]
    own = [{"prompt": [{"role": "system", "content": "Mine."}, *CHAT[0]["prompt"]]}]
    assert ids_of(own, plain, system_prompt="Add.")[0] == ["System: Mine.\n\nUser: 1+1=\n\nAssistant:"]


def test_settings_of_the_chat_template_reach_it(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = "{{ mood }}{{ messages[0]['content'] }}"
    assert ids_of(CHAT, tokenizer, chat_template_kwargs={"mood": "glad "})[0] == ["glad 1+1="]


def test_long_prompts_are_dropped_and_counted(tokenizer):
    rows = [{"prompt": "x" * n} for n in (3, 9, 4, 30)]
    assert ids_of(rows, tokenizer, max_prompt_length=4) == (["xxx", "xxxx"], 2)
    assert ids_of(rows, tokenizer, max_prompt_length=None)[1] == 0
    with pytest.raises(ValueError, match="longer than max_prompt_length=2; the shortest has 3 tokens"):
        ids_of(rows, tokenizer, max_prompt_length=2)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "1+1="}, {"prompt": ""}], {}, "row 1 of train_dataset has a prompt without a single token"),
        ([{"prompt": "\u6f22"}], {}, "without a single token"),
        ([{"prompt": [{"role": "user", "content": None}]}], {}, "row 0 of train_dataset has the prompt"),
        (
            [{"prompt": [{"role": "user", "content": "x"}]}],
            {"chat_template_kwargs": {"messages": 3}},
            "chat_template_kwargs has 'messages', which is set here",
        ),
        ([{"prompt": [{"role": "user"}]}], {}, "a list of role and content"),
        (ROWS, {"system_prompt": "Add."}, "every prompt of train_dataset is a text"),
        (ROWS, {"chat_template_kwargs": {"a": 1}}, "every prompt of train_dataset is a text"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(rows, settings, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        ids_of(rows, tokenizer, **settings)


@pytest.mark.parametrize("column", GIVEN)
def test_a_column_that_would_hide_what_the_trainer_gives_is_refused(column):
    with pytest.raises(ValueError, match=f"train_dataset has a column named {column}, under which reward functions"):
        load_rows([{"prompt": "a", column: "b"}], GRPOConfig())


def test_every_name_that_the_trainer_gives_to_rewards_is_one_that_columns_may_not_have():
    def look(**given):
        assert set(given) == {*GIVEN, "solution"}
        return [1.0]

    RewardRunner([look]).try_out(["1+1="], {"solution": ["2"]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "  "}, "row 1 of train_dataset has a prompt of white space alone"),
        ({"prompt": "\n\t\n"}, "row 1 of train_dataset has a prompt of white space alone"),
        ({"question": " ", "answer": "2"}, "row 0 of train_dataset has a prompt of white space alone"),
        (
            {"question": math.nan, "answer": "2"},
            "row 0 of train_dataset has no question; fill it, or leave the row out",
        ),
    ],
)
def test_prompts_that_ask_nothing_are_refused(row, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        rows = load_rows([ROWS[0], row] if "prompt" in row else [row], GRPOConfig())
        tokenize_prompts(rows, tokenizer, GRPOConfig())


def test_every_prompt_comes_once_an_epoch_whatever_the_steps():
    prompts = [Prompt(str(i), [i], {}) for i in range(10)]

    def stream(step_size, shuffle):
        config = GRPOConfig(prompts_per_step=step_size, seed=3, shuffle_dataset=shuffle)
        return [
            p.text for at in range(0, 30, step_size) for p in prompts_at(prompts, range(at, at + step_size), config)
        ][:30]

    drawn = stream(3, True)
    assert drawn == stream(5, True) == stream(10, True)
    assert all(sorted(drawn[i : i + 10]) == sorted(map(str, range(10))) for i in (0, 10, 20))
    assert drawn[:10] != drawn[10:20]
    assert stream(3, False) == [str(i) for i in range(10)] * 3


def test_a_solution_of_its_own_is_kept():
    rows = load_rows([{"question": "q", "answer": "long", "solution": "7"}], GRPOConfig())
    assert rows[0]["solution"] == "7"


def test_paths_upper_case_and_other_formats_are_read(tmp_path):
    path = tmp_path / "rows.JSONL"
    path.write_text('{"prompt": "1+1="}\n')
    assert load_rows(path, GRPOConfig())["prompt"] == ["1+1="]
    assert load_rows(Dataset.from_list(CHAT).with_format("numpy"), GRPOConfig())[0]["prompt"] == CHAT[0]["prompt"]


@pytest.mark.parametrize(
    ("row", "solution"),
    [
        ({"solution": r"so \boxed{3}", "answer": "3"}, r"so \boxed{3}"),
        ({"solution": "a proof without a mark", "answer": r"\frac{1}{2}"}, r"\boxed{\frac{1}{2}}"),
        ({"answer": r"\boxed{4}"}, r"\boxed{4}"),
        ({"answer": 5}, r"\boxed{5}"),
        ({"solution": "the text is all there is"}, "the text is all there is"),
    ],
)
def test_maths_columns_become_a_chat_and_a_solution(row, solution):
    made = load_rows([{"problem": "What is x?", **row}], GRPOConfig())[0]
    assert made["prompt"] == [{"role": "user", "content": "What is x?"}]
    assert made["solution"] == solution


def test_a_streaming_dataset_is_read_as_far_as_it_is_taken(tmp_path):
    read = []

    def rows():
        for index in range(1000):
            read.append(index)
            yield {"prompt": str(index)}

    stream = IterableDataset.from_generator(rows)
    assert load_rows(stream, GRPOConfig(dataset_take=3))["prompt"] == ["0", "1", "2"]
    assert len(read) < 10
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{n}"}}\n' for n in range(9)))
    config = GRPOConfig(dataset_streaming=True, dataset_take=4)
    assert load_rows(str(path), config)["prompt"] == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="set dataset_take"):
        load_rows(str(path), GRPOConfig(dataset_streaming=True))


def test_a_dataset_in_memory_is_cut_to_what_is_taken_and_does_not_stream():
    assert load_rows(ROWS, GRPOConfig(dataset_take=1))["prompt"] == ["1+1="]
    assert len(load_rows(ROWS, GRPOConfig(dataset_take=99))) == 2
    assert len(load_rows(ROWS, GRPOConfig(dataset_take=1), name="eval_dataset")) == 2
    with pytest.raises(ValueError, match="train_dataset is in memory"):
        load_rows(ROWS, GRPOConfig(dataset_streaming=True, dataset_take=1))


def test_a_stream_that_breaks_is_refused_in_one_sentence():
    def rows():
        yield {"prompt": "x"}
        raise OSError("the line is cut")

    with pytest.raises(ValueError, match="cannot be streamed"):
        load_rows(IterableDataset.from_generator(rows), GRPOConfig(dataset_take=5))
