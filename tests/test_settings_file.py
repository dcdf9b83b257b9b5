"""Files of settings: what is read as its reader would say, and what is refused in one sentence."""

import dataclasses
import random
import time

import pytest
from test_config import FIELDS

from lowmem_grpo import GRPOConfig
from lowmem_grpo.cli.settings import read_settings
from lowmem_grpo.errors import InputError
from lowmem_grpo.settings_file import plain_value, read_settings_file

MODEL = "model: m\ndataset: d\n"


def settings_of(path, content):
    """The fields of a file with these settings, or the sentence that refuses it."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        return read_settings({"config": str(path)})[1]
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("1e-5", 1e-5), ("-3", -3), (".5", 0.5), ("1.", 1.0), ("+7", 7), ("1_000", "1_000"), ("0x10", "0x10"), ("0o17", "0o17"),
        ("1:30", "1:30"), ("190:20:30.15", "190:20:30.15"), ("2024-01-01", "2024-01-01"), ("yes", "yes"), ("on", "on"), ("NO", "NO"),
        ("True", True), ("FALSE", False), ("~", None), ("", None), ("Null", None), (".inf", ".inf"), (".nan", ".nan"), ("1e5x", "1e5x"),
        ("١٢", "١٢"), ("9" * 5000, "9" * 5000), ("<<", "<<"), ("=", "="),
    ],
)  # fmt: skip
def test_a_plain_value_is_what_its_reader_would_say(text, value):
    assert plain_value(text) == value and type(plain_value(text)) is type(value)


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("seed: 010", {"seed": 10}), ("max_steps: 1_000", {"max_steps": 1000}), ("learning_rate: 1e-5", {"learning_rate": 1e-5}),
        ("system_prompt: yes", {"system_prompt": "yes"}), ("output_dir: 2024-01-01", {"output_dir": "2024-01-01"}),
        ("eval_steps: ~", {"eval_steps": None}), ("eval_steps: none", {"eval_steps": None}), ("use_cpu: 'true'", {"use_cpu": True}),
        ("stop_strings: [no, '010']", {"stop_strings": ["no", "010"]}), ("top-p: .5", {"top_p": 0.5}),
        ("system_prompt: |\n  One.\n  Two.\n", {"system_prompt": "One.\nTwo.\n"}),
        ("chat_template_kwargs: {enable_thinking: false, n: 1}", {"chat_template_kwargs": {"enable_thinking": False, "n": 1}}),
        ("chat_template_kwargs: {1: 2, yes: 3}", {"chat_template_kwargs": {"1": 2, "yes": 3}}),
        ("chat_template_kwargs: &k {a: 1}\nmodel_init_kwargs: *k", {"chat_template_kwargs": {"a": 1}, "model_init_kwargs": {"a": 1}}),
    ],
)  # fmt: skip
def test_a_line_is_read_as_meant(line, fields, tmp_path):
    assert settings_of(tmp_path / "run.yaml", MODEL + line) == fields
    assert settings_of(tmp_path / "run.yaml", b"\xef\xbb\xbf" + f"{MODEL}{line}\r\n".encode()) == fields


LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("seed: 1\nbeta: 0\nseed: 2", "line 5: 'seed' stands there a second time; keep one"),
        ("model_init_kwargs: {<<: {a: 1}}", "line 3: << merges no mapping here; write its settings out"),
        ("model_init_kwargs: {a: 1, a: 2}", "line 3: 'a' stands there a second time"),
        ("top-p: 1\ntop_p: 1", "gives top_p twice, by two names"), ("model_name_or_path: m", "gives model twice, by two names"),
        ("seed: 1:30", "seed: '1:30' is not a whole number"), ("seed: 0x10", "seed: '0x10' is not a whole number"),
        ("seed: 2024-01-01", "is not a whole number"), ("use_cpu: yes", "use_cpu: 'yes' is not true or false"), ("use_cpu: 1", "use_cpu: 1 is not true"),
        ("config: other.yaml", "names another config; write its settings into one file"), ("1: 2", "no field '1'"), ("~: 2", "no field '~'"),
        ("yes: 2", "no field 'yes'"), ("? [a]\n: 1", "line 3: it has a list or mapping for a name"), ("<<: {seed: 1}", "line 3: << merges no mapping here"),
        ("stop_strings: &a [*a]", "more than 20 in each other"), ("chat_template_kwargs: &a {b: *a}", "more than 20 in each other"),
        (f"a0: &a0 [x]\n{LAUGHS}", "more than 10000 values"), ("stop_strings: " + "[" * 500 + "]" * 500, "lists or mappings in each other"),
        ("\tseed: 1", "line 3: found character"), ("seed: 1\n---\nseed: 2", "line 4: but found another document"),
        ("seed: !!python/object/apply:os.getcwd []", "line 3: it has the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'"),
        ("seed: !!set {1}", "it has the tag"), ("system_prompt: !!binary aGk=", "it has the tag"), ("seed: !mine 1", "it has the tag '!mine'"),
        ("seed: *nowhere", "line 3: found undefined alias"), ("seed: 'a", "line 3: found unexpected end of stream"),
        (b"system_prompt: \xff\xfe", "'utf-8' codec can't decode"), (b"system_prompt: a\x00b", "special characters are not allowed"),
        ("system_prompt: \ud800", "can't decode"),
        ("model_init_kwargs: {a: .nan}", None), ("reward_weights: [.nan]", "is not a list of numbers"), ("seed: " + "9" * 5000, "is not a whole number"),
        ("seed: {}", "seed: {} is not a whole number"), ("seed: [1]", "seed: [1] is not"), ("seed:", "seed: None is not a whole number"),
    ],
)  # fmt: skip
def test_what_could_mean_two_things_or_nothing_is_refused_with_its_line(content, words, tmp_path):
    content = MODEL.encode() + content if isinstance(content, bytes) else MODEL + content
    found = settings_of(tmp_path / "run.yaml", content)
    assert isinstance(found, dict) if words is None else words in str(found)
    assert isinstance(found, dict) or (found.isprintable() and len(found) < 500)


def test_a_folder_a_missing_file_an_endless_one_and_no_name_are_refused(tmp_path):
    (tmp_path / "utf16.yaml").write_text(MODEL, encoding="utf-16")
    (tmp_path / "empty.yaml").write_text("")
    for path in (
        tmp_path,
        tmp_path / "none.yaml",
        "/dev/zero",
        "",
        "a\0b",
        "\ud800",
        tmp_path / "utf16.yaml",
        tmp_path / "empty.yaml",
    ):
        with pytest.raises(InputError, match="^config file .* (cannot be read: |must be a mapping)") as caught:
            read_settings_file(str(path))
        assert str(caught.value).isprintable()


PIECES = [
    *FIELDS, "model", "dataset", "config", "learning-rate", "<<", "1", "~", "yes", "?", ":", ": ", "- ", "[", "]", "{", "}", ",", "&a", "*a", "!", "!!int",
    "!!python/name:os.system", "!!float", "!!set", "!!timestamp", "|", ">", "'", '"', "%YAML 1.1", "---", "...", "#", "\n", "\n", "\n", "\n  ", "\n    ", "\t",
    "1e-5", "010", "1:30", "0x1", "1e999", ".inf", "-.inf", ".nan", "2024-01-01", "true", "no", "null", "x", "\u2028", "\x85", "\\x1b", "\\ud800", "🙂", "@", "`",
]  # fmt: skip


def test_no_file_of_random_yaml_ends_in_a_librarys_error(tmp_path):
    draw, started, taken = random.Random(0), time.process_time(), 0
    for number in range(400):
        lines = [
            f"{draw.choice(PIECES)}{draw.choice([': ', ':', ' '])}{''.join(draw.choices(PIECES, k=draw.randint(0, 3)))}"
            for _ in range(draw.randint(1, 3))
        ]
        text = "\n".join(lines) if number % 2 else "".join(draw.choices(PIECES, k=draw.randint(1, 12)))
        found = settings_of(tmp_path / "run.yaml", MODEL + text)
        if isinstance(found, str):
            assert all(map(str.isprintable, found.split("\n"))) and len(found) < 2000, text
            continue
        try:
            taken += dataclasses.is_dataclass(GRPOConfig(**found))
        except InputError as error:
            assert str(error).isprintable(), text
    assert taken > 5 and time.process_time() - started < 20
