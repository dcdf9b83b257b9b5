"""Hostile values of every setting: each is taken with a meaning, or refused in one sentence."""

import dataclasses
import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem_grpo.config.fields import MOST, from_text
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError


class Odd:
    """An object whose every answer is an error."""

    __hash__ = None  # type: ignore[assignment] # as of a list

    def __repr__(self):
        raise RuntimeError("no words")

    def __eq__(self, other):
        raise RuntimeError("no comparison")


def nested(depth, kind):
    value = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


OWN_TAIL: list = []
OWN_TAIL.append(OWN_TAIL)
TIMES_TEN: list = []
for _ in range(15):  # 10**15 entries, as anchors of YAML make them
    TIMES_TEN = [TIMES_TEN] * 10
HOSTILE = [
    10**400, -(10**400), 10**5000, -1, 0, 1, 2**31, 2**64, 1e300, -1e300, 1e-300, -0.0, 1.5, math.nan, math.inf, -math.inf,
    "", " ", "\0", "\ud800", "x" * 10**6, "true", "none", "1", "1_000", "1e5", "0x10", "nan", "-inf", "\x1b[2J", "[bold]", "{", "[" * 5000,
    '{"a": NaN}', '{"a": 1, "a": 2}', '{"a":' * 5000, "9" * 5000, "9" * 5000 + "GB", b"x",
    [], [[]], [""], ["\ud800"], ["\0"], ["x", 1], [0], [0.0, 0.0], [1e308], [math.nan], [True], [None], OWN_TAIL, nested(3000, list),
    {}, {1: 2}, {None: 1}, {"a": Odd()}, {"a": math.nan}, {"a": 10**5000}, {"\ud800": 1}, {"a": "\ud800"}, {"a": {1}}, {"a": b"x"},
    {"a": OWN_TAIL}, {"a": TIMES_TEN}, nested(3000, dict), (), (1, 2), set(), frozenset(), range(3), None, True, False, object(), Odd(), len, int, 1j, ...,
    Decimal(1), Fraction(1, 2), Path("x"), np.float32(1), np.float64("nan"), np.int64(3), np.bool_(True), np.array([1, 2]), np.array(1.0),
    torch.tensor(1.0), torch.tensor([1, 2]),
]  # fmt: skip


def refusal(field, value, as_typed):
    """The sentence that refuses a value, or None where it is taken."""
    try:
        config = GRPOConfig(**{field: from_text(GRPOConfig, field, value) if as_typed else value})
    except InputError as error:
        return str(error)
    saved = json.dumps(dataclasses.asdict(config), allow_nan=False, ensure_ascii=False).encode()
    assert json.loads(saved) == dataclasses.asdict(config)
    return None


@pytest.mark.parametrize("as_typed", [False, True], ids=["in Python", "from a command or file"])
def test_every_value_of_every_field_is_taken_or_refused_in_one_sentence(as_typed):
    pairs = [(field.name, value) for field in dataclasses.fields(GRPOConfig) for value in enumerate(HOSTILE)]
    assert len(pairs) > 3500
    for field, (place, value) in pairs:
        try:
            words = refusal(field, value, as_typed)
        except Exception as error:
            pytest.fail(f"{field}, HOSTILE[{place}]: {type(error).__name__}: {error}")
        fits = words is None or (field in words and words.isprintable() and len(words) < 500)
        assert fits, f"{field}, HOSTILE[{place}]: {words!s:.500}"


COUNTS = {
    field.name: field
    for field in dataclasses.fields(GRPOConfig)
    if type(field.default) is int or field.type in ("int | None", int | None)
}


@pytest.mark.parametrize("field", COUNTS)
def test_no_count_is_endless(field):
    assert len(COUNTS) > 20
    with pytest.raises(InputError, match=f"^{field} must be at most [0-9]+, not [0-9]+; the default is "):
        GRPOConfig(**{field: max(MOST, 2**32) + 1})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompts_per_step": 10**6}, "makes 8000000 completions a step, more than 65536, .*; lower one$"),
        ({"prompts_per_step": 2**10, "num_generations": 2**7}, "makes 131072 completions"),
        ({"num_train_epochs": 1e7}, "num_train_epochs must be at most 1000000, not 10000000.0"),
        ({"curriculum_skip": 1 - 2**-53}, "curriculum_skip must be at most 0.999"),
        ({"reward_timeout": 1e300}, "reward_timeout=1e.300 is out of reach"),
        ({"reward_timeout": 1e9}, "reward_timeout must be at most 100000000"),
        ({"temperature": 1e-30}, "temperature must be at least 1e-06"),
        ({"reward_weights": [0.0, 0.0]}, "reward_weights has no weight but 0, so that nothing would be learned"),
        ({"reward_weights": []}, "reward_weights has no weight but 0"),
        ({"reward_weights": [1.0, 1e30]}, "reward_weights must be at most 1000000"),
        ({"vram_budget": "9" * 400 + "GB"}, "is not a size"),
        ({"output_dir": ""}, "output_dir has an empty text; remove it"),
        ({"output_dir": "a\0b"}, r"output_dir='a\\x00b' has a null character"),
        ({"stop_strings": ["a", "\ud800"]}, r"stop_strings has half a character, in '\\ud800', which a file of JSON cannot"),
        ({"model_init_kwargs": {1: 2}}, "model_init_kwargs has the name 1, which is no text"),
        ({"model_init_kwargs": {"a": TIMES_TEN}}, "model_init_kwargs has more than 10000 values"),
    ],
)  # fmt: skip
def test_what_would_run_for_ever_or_cannot_be_saved_is_refused(given, words):
    with pytest.raises(InputError, match=words):
        GRPOConfig(**given)


def test_what_a_large_run_has_is_taken():
    config = GRPOConfig(
        prompts_per_step=512, num_generations=64, num_iterations=16, steps_per_generation=32, lora_r=1024, lora_alpha=4096,
        max_completion_length=10**6, max_prompt_length=10**6, token_budget=10**9, rollout_token_budget=10**9, max_steps=10**7,
        dynamic_sampling_rounds=100, replay_buffer_size=10**5, num_generations_eval=1024, dataset_take=10**9, temperature=1e-5,
    )  # fmt: skip
    assert config.prompts_per_step * config.num_generations == 2**15
