"""The bars of other libraries are off while we run, and as they were afterwards."""

import json

import datasets
import huggingface_hub.utils as hub
import pytest
from datasets.utils import tqdm as datasets_tqdm
from tiny_models import DEMO_MODEL
from transformers.utils import logging as transformers_logging

from lowmem_grpo import GRPOConfig, cli
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.progress_bars import no_progress_bars, without_progress_bars


def shown() -> tuple[bool, bool]:
    return transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()


def hubs() -> list[bool]:
    return [hub.are_progress_bars_disabled(name) for name in (None, "some.group", "another")]


@pytest.fixture(params=[(True, True), (False, True), (True, False), (False, False)])
def users_choice(request):
    before = shown()
    of_transformers, of_datasets = request.param
    (transformers_logging.enable_progress_bar if of_transformers else transformers_logging.disable_progress_bar)()
    (datasets.enable_progress_bars if of_datasets else datasets.disable_progress_bars)()
    hub.enable_progress_bars()
    hub.disable_progress_bars("some.group")
    yield request.param
    (transformers_logging.enable_progress_bar if before[0] else transformers_logging.disable_progress_bar)()
    (datasets.enable_progress_bars if before[1] else datasets.disable_progress_bars)()
    hub.enable_progress_bars()


def test_bars_are_off_inside_and_as_the_user_had_them_afterwards(users_choice):
    with no_progress_bars():
        assert shown() == (False, False)
        assert hubs() == [False, True, False], "of downloads, as the user has set them"
        with no_progress_bars():
            assert shown() == (False, False)
        assert shown() == (False, False)
    assert shown() == users_choice and hubs() == [False, True, False]


def test_bars_come_back_after_an_error(users_choice):
    @without_progress_bars
    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert shown() == users_choice


def test_a_run_shows_no_bar_but_its_own(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)  # so that splits are generated
    rows = "\n".join(json.dumps({"question": f"{i}+1=", "answer": str(i + 1)}) for i in range(8))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "rewards_by_place.py").write_text("def reward(completions, **_): return list(range(len(completions)))")
    before = shown()
    given = ["--dataset", "rows.jsonl", "--reward_funcs", "rewards_by_place.reward", "--use_cpu", "true"]
    given += ["--max_completion_length", "4"]
    steps = ["--max_steps", "1", "--prompts_per_step", "1", "--num_generations", "2", "--log_completions", "true"]
    assert cli.main(["train", "--model", str(DEMO_MODEL), *given, *steps, "--output_dir", "out"]) == 0
    assert cli.main(["eval", "--model", "out/adapter", *given]) == 0
    assert "%|" not in capfd.readouterr().err
    assert shown() == before


def test_a_reward_functions_own_bar_is_the_users_business(tmp_path, capfd):
    from tqdm import tqdm

    def counting(completions, **kwargs):
        return [float(place) for place in tqdm(range(len(completions)), desc="mine", mininterval=0)]

    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, max_steps=1, prompts_per_step=1, num_generations=2,
        max_completion_length=4, gradient_checkpointing=False,
    )  # fmt: skip
    train(str(DEMO_MODEL), counting, [{"prompt": "1+1="}], config=config)
    assert "mine" in capfd.readouterr().err
    assert not datasets_tqdm(disable=False).disable, "and theirs are back"
