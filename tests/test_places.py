"""Paths of this machine in what others read: which texts are paths, and what is left of each."""

import json
import os

import pytest

from lowmem_grpo.output.places import content_for_others, public_name, without_places

SAMPLES = {
    "/Users/al/data/sums.jsonl": "./sums.jsonl",
    "/Users/Al Smith/my models/smol lm": "./smol lm",
    "~/models/smollm2/": "./smollm2",
    "~al/models": "./models",
    "$HOME/al/models": "./models",
    "${SCRATCH}/$USER/Al Smith/rows.jsonl": "./rows.jsonl",
    "lowmem-grpo train --model '$HOME/al/m' '--dataset=${DATA}/al/a.jsonl'": "lowmem-grpo train --model ./m --dataset=./a.jsonl",
    "get_adapter_reward(adapter='$RUNS/Al Smith/rm'), or $RUNS/al/rm.": "get_adapter_reward(adapter='./rm'), or ./rm.",
    "../al/models": "./models",
    "C:\\Users\\al\\models": "./models",
    "file:///Users/al/rows.json": "./rows.json",
    "/runs/al/gsm8k/adapter": "./gsm8k/adapter",
    "/runs/al/gsm8k/checkpoint-20/": "./gsm8k/checkpoint-20",
    "/Users/al/.cache/huggingface/hub/models--Qwen--Qwen3-1.7B/snapshots/70d2": "Qwen/Qwen3-1.7B",
    "lowmem-grpo train --model /m/smol --dataset '/d/Al Smith/a.jsonl' --output_dir=../al/o": (
        "lowmem-grpo train --model ./smol --dataset ./a.jsonl --output_dir=./o"
    ),
    'gsm8k?file=/Users/al/a.jsonl, {"cache_dir": "/Users/Al Smith/c"}': 'gsm8k?file=./a.jsonl, {"cache_dir": "./c"}',
    "by /Users/al/reward.py:score and (/Users/al/b.py:3).": "by ./reward.py:score and (./b.py:3).",
    "Qwen2ForCausalLM in memory, of /Users/al/base": "Qwen2ForCausalLM in memory, of ./base",
    r"\\srv\share\x": "./x",
    "//srv/share": "./share",
    "//srv.local/Al Smith/my rows.jsonl": "./my rows.jsonl",
    r"rows of \\srv\share\al\x.jsonl, or //srv/share/y.jsonl": "rows of ./x.jsonl, or ./y.jsonl",
    r"get_adapter_reward(adapter='\\\\srv\\Al Smith\\rm')": "get_adapter_reward(adapter='./rm')",
    "lowmem-grpo train --model //srv/m --dataset=/tmp --output_dir /tmp/al/ --system_prompt '/no_think a/b, in /tmp'": (
        "lowmem-grpo train --model ./m --dataset=./tmp --output_dir ./al --system_prompt '/no_think a/b, in /tmp'"
    ),
    "/tmp": "./tmp",
    'json?file=/tmp, {"cache_dir": "/tmp"}, get_adapter_reward(adapter=\'/tmp\')': (
        'json?file=./tmp, {"cache_dir": "./tmp"}, get_adapter_reward(adapter=\'./tmp\')'
    ),
    "file:///data": "./data",
    "file://srv/share/x.jsonl": "./x.jsonl",
    "read file:///data and 'file://localhost/Users/Al Smith/x'.": "read ./data and './x'.",
    "~root": ".",
    "get_code_reward(path=~/x), [~/y,~/z]": "get_code_reward(path=./x), [./y,./z]",
}
OTHERS = (
    "Qwen/Qwen3-1.7B", "data/sums.jsonl", "<think>a</think>/<answer>", "3/4 of tokens/s, and 1 / 2", "/no_think",
    "https://a.org/b/c and http://localhost:8000/v1/chat", "gsm8k?style=tags", ".../x", "a ~5/10", "don't /s or 'x'",
    "/no_think Answer with yes and/or no", "1/2", "</think>", "a // b, 7 //2/3 and // c", "what is in /tmp or /etc?",
    r"\\quad\text{if } x \\mathbf\mathit{y} \\ab\end{cases}",
    r"get_regex_reward(pattern='\\d+\\.\\d+')", r"\d+\s/\s\d", r"\boxed{\frac{1}{2}} \\ \pi", "ftp://srv/share/x", "a//b/c",
    "$a/b$ of $AB/CD$, in '$AB/CD = 2$'", "$a/b$", "at $5/month", "$HOME",
    "get_regex_reward(pattern='/nothing')", "lowmem-grpo train --system_prompt 'a \"/x\" b' --stop_strings '</a>' /no_think",
)  # fmt: skip


@pytest.mark.parametrize("text", SAMPLES)
def test_a_path_has_its_end_alone(text):
    assert without_places({"a": [text, 3, None]}) == {"a": [SAMPLES[text], 3, None]}
    assert without_places(SAMPLES[text]) == SAMPLES[text]


@pytest.mark.parametrize("text", OTHERS)
def test_a_text_without_a_path_stays_as_it_is(text):
    assert without_places(text) == text


def test_the_home_of_a_user_whose_name_has_a_space_is_none_of_a_text(monkeypatch):
    monkeypatch.setenv("HOME", "/Users/Al Smith")
    assert without_places("rows of file=/Users/Al Smith/a/b.jsonl") == "rows of file=./b.jsonl"


def test_a_folder_that_is_there_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/smol").mkdir(parents=True)
    assert public_name("models/smol") == "./models/smol" and public_name("models/other") == "models/other"
    assert public_name(str(tmp_path)) == f"./{tmp_path.name}" and public_name(os.sep) == "."


def test_a_configuration_is_uploaded_without_paths_and_any_other_file_as_it_is(tmp_path):
    given = {
        "base_model_name_or_path": "/Users/al/base", "_name_or_path": "a/b", "x": {"vocab_file": "/Users/al/v.txt"},
        "content": "</s>", "chat_template": "{# /a/b #}\n", "r": 8,
    }  # fmt: skip
    for name in ("adapter_config.json", "tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps(given), encoding="utf-8")
    found = content_for_others(tmp_path / "adapter_config.json")
    assert isinstance(found, bytes)
    assert json.loads(found) == {**given, "base_model_name_or_path": "./base", "x": {"vocab_file": "./v.txt"}}
    assert content_for_others(tmp_path / "tokenizer.json") == tmp_path / "tokenizer.json"
    (tmp_path / "generation_config.json").write_bytes(b"\xff[")
    assert content_for_others(tmp_path / "generation_config.json") == tmp_path / "generation_config.json"
