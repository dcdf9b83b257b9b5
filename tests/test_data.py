import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tiny_models import DEMO_MODEL
from transformers import AutoTokenizer

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data import rows
from lowmem_grpo.data.prompts import Prompt, tokenize_prompts
from lowmem_grpo.data.rows import load_rows
from lowmem_grpo.rollout.stream import prompts_at

ROWS = [{"prompt": "1+1=", "solution": "2"}, {"prompt": "2+2=", "solution": "4"}]
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
    load_rows("openai/gsm8k", GRPOConfig(**settings))
    assert calls == [asked]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/no/such/file.jsonl", "train_dataset '/no/such/file.jsonl' is not a file on this machine"),
        ("nobody/no-such-dataset", "train_dataset 'nobody/no-such-dataset' .* is neither"),
        ([], "train_dataset is empty"),
        (["a", "b"], "is not a list of rows"),
        ([{"prompt": "x"}, {"prompt": [{"role": "user", "content": "y"}]}], "is not a list of rows"),
        ([{"text": "x"}], "has no column named prompt, only text"),
        (7, "train_dataset is a int; pass a hub id"),
        (DatasetDict({"train": Dataset.from_list(ROWS)}), "has the splits train; pass one of them"),
        (IterableDataset.from_generator(lambda: iter(ROWS)), "of unknown length; set dataset_take"),
    ],
)
def test_bad_datasets_are_refused_in_one_sentence(given, message):
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
            "cannot render row 0",
        ),
        ([{"prompt": [{"role": "user"}]}], {}, "a list of role and content"),
        (ROWS, {"system_prompt": "Add."}, "every prompt of train_dataset is a text"),
        (ROWS, {"chat_template_kwargs": {"a": 1}}, "every prompt of train_dataset is a text"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(rows, settings, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        ids_of(rows, tokenizer, **settings)


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
