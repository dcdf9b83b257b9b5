"""Errors of others within a sentence of ours."""

import json

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from lowmem_grpo import GRPOConfig
from lowmem_grpo.errors import MOST_CHARACTERS, InputError, cause, counted, in_a_line
from lowmem_grpo.model.load import find_model, load_policy


@pytest.mark.parametrize("words", [in_a_line, cause])
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("No such file.\nMore words.", "No such file."),
        ("Short.", "Short."),
        (f"Unknown class. It should be one of {', '.join(['T5Config'] * 400)}", "Unknown class."),
        ("x" * 3000, "x" * MOST_CHARACTERS + "..."),
        ("", "ValueError"),
    ],
)
def test_the_first_sentences_of_an_error_make_one_line(words, text, line):
    assert words(ValueError(text)).replace("('')", "") == line


def test_a_count_has_the_words_that_fit_it():
    assert [counted(count, "row") for count in (0, 1, 2, 1234)] == ["0 rows", "1 row", "2 rows", "1,234 rows"]
    assert [counted(count, "row has", "rows have") for count in (1, 2)] == ["1 row has", "2 rows have"]


def test_a_model_of_another_kind_is_one_line_and_no_list_of_classes(tmp_path):
    model = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        load_policy(str(tmp_path), None, GRPOConfig(use_cpu=True))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_an_architecture_that_transformers_does_not_know_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nosuch"}))
    with pytest.raises(InputError, match="neither a model folder nor a model the hub gives") as caught:
        find_model(str(tmp_path), GRPOConfig())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
