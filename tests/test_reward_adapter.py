"""A reward adapter in reinforcement learning: worn on the policy's own base, and what it scores."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_reward_training import TRAIN, pair_rows, settings_of
from test_sft_loss import say
from tiny_models import DEMO_MODEL, make_policy
from transformers import AutoTokenizer

from lowmem_grpo import GRPOConfig, cli, train, train_reward_model
from lowmem_grpo.data.pairs import tokenize_pairs
from lowmem_grpo.demo import task
from lowmem_grpo.errors import InputError
from lowmem_grpo.evaluation.evaluate import evaluate
from lowmem_grpo.inputs.identity import _settings
from lowmem_grpo.model.load import load_policy
from lowmem_grpo.model.turn_end import after_the_end
from lowmem_grpo.planner import plan as planner
from lowmem_grpo.rewards import get_adapter_reward, get_model_reward
from lowmem_grpo.rewards.names import resolve_reward_funcs
from lowmem_grpo.rewards.reward_adapter import _group
from lowmem_grpo.rewards.reward_model import ids_as_in_a_pair
from lowmem_grpo.update.pairs import scores_of

pytestmark = pytest.mark.usefixtures("known_trials")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """A reward adapter that likes worked answers and dislikes lazy ones."""
    folder = tmp_path_factory.mktemp("runs") / "rm"
    train_reward_model(str(DEMO_MODEL), pair_rows(TRAIN[:48]), config=settings_of(folder, max_steps=12))
    return str(folder / "adapter")


def run(folder, rewards, **settings):
    config = GRPOConfig(**{
        "output_dir": str(folder), "use_cpu": True, "max_steps": 2, "prompts_per_step": 4, "num_generations": 4,
        "max_completion_length": 40, "learning_rate": 1e-3, "save_steps": 1, **settings,
    })  # fmt: skip
    return train(str(DEMO_MODEL), rewards, task.rows(TRAIN[:32]), config=config)


def policy_on(model=str(DEMO_MODEL), **settings):
    return load_policy(model, AutoTokenizer.from_pretrained(DEMO_MODEL), GRPOConfig(use_cpu=True, **settings))


def test_sampled_ids_are_scored_as_the_pairs_were_that_it_learnt_from(adapter):
    policy, reward = policy_on(), get_adapter_reward(adapter)
    assert reward.bind(policy) == "rm is worn on the policy's own base: no second model is in memory"
    pairs, _ = tokenize_pairs(Dataset.from_list(pair_rows(TRAIN[:3])), policy.tokenizer, settings_of("rm"))
    with policy.wearing(reward.worn):
        wanted = scores_of(policy, pairs, GRPOConfig(use_cpu=True), 10_000).flatten().tolist()
    start = [len(policy.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
             for row in task.rows(TRAIN[:3]) for _ in range(2)]  # fmt: skip
    texts = [text for pair in pairs for text in pair.texts]
    asked = [row["prompt"] for row in task.rows(TRAIN[:3]) for _ in range(2)]
    found = reward(
        prompts=asked, completions=[[say("assistant", "")]] * 6,
        completion_ids=[text[at:] for text, at in zip(texts, start, strict=True)],
        prompt_ids=[text[:at] for text, at in zip(texts, start, strict=True)],
    )  # fmt: skip
    assert found == pytest.approx(wanted, abs=0.02), "bfloat16, packed otherwise"
    assert found[0] > found[1] and found[2] > found[3]
    answers = [[say("assistant", "<think>x</think>" + str(sum(p)))] for p in TRAIN[:3] for _ in range(2)]
    by_part = get_adapter_reward(adapter, part="answer")
    by_part.bind(policy)
    alone = [[say("assistant", str(sum(p)))] for p in TRAIN[:3] for _ in range(2)]
    given = dict(prompts=asked, completion_ids=[[5]] * 6, prompt_ids=[[5]] * 6)
    assert by_part(completions=answers, **given) == by_part(completions=alone, **given)


def test_a_reward_is_normalized_then_kept_in_its_range_then_less_a_penalty(adapter):
    reward = get_adapter_reward(adapter, normalize=True, reward_range=[-1, 2], missing_eos_penalty=0.5)
    assert reward.mean and reward.deviation != 1
    reward.mean, reward.deviation = 1.0, 2.0
    assert [reward._reward(score, True) for score in (1.0, 4.0, 9.0, -9.0)] == [0.0, 1.5, 2.0, -1.0]
    assert reward._reward(4.0, False) == 1.0


def test_an_adapter_without_a_score_head_is_no_reward(tmp_path):
    """transformers would draw it a head at random, and say so in a report that nobody reads."""
    make_policy().save(tmp_path)
    with pytest.raises(InputError, match="writes texts and scores none; give one that `lowmem-grpo reward` has"):
        resolve_reward_funcs(str(tmp_path))


def test_a_base_that_is_gone_is_said_before_weights_are_read(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "rm")
    settings = json.loads((tmp_path / "rm/adapter_config.json").read_bytes())
    lost = json.dumps({**settings, "base_model_name_or_path": "./gone"})
    (tmp_path / "rm/adapter_config.json").write_text(lost, encoding="utf-8")
    with pytest.raises(InputError, match="the base that adapter .* names cannot be taken: model './gone' is not a"):
        run(tmp_path / "out", str(tmp_path / "rm"))


def test_prompts_that_repeat_alike_are_computed_once():
    assert _group([[1], [1], [2], [2]]) == 2 and _group([[1], [1], [1]]) == 3 and _group([[1]]) == 1
    assert _group([[1], [1], [2]]) == 1 and _group([[1], [2], [2]]) == 1 and _group([]) == 1


def test_what_a_template_writes_after_its_end_belongs_to_a_text():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    end, line = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<|end|>", "="))
    assert after_the_end(tokenizer, end[0]) == []
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>={% endfor %}"
    assert after_the_end(tokenizer, end[0]) == line and after_the_end(tokenizer, 40) == []


def test_learning_from_a_reward_adapter_raises_its_score(adapter, tmp_path, capfd):
    result = run(tmp_path, adapter, max_steps=8, beta=0.01)
    means = [line["rewards/rm/mean"] for line in result.history]
    assert sum(means[-2:]) / 2 > sum(means[:2]) / 2 + 0.5
    assert result.history[0]["rm/length_correlation"] > 0, "a worked answer is longer than a lazy one"
    assert "rm is worn on the policy's own base: no second model is in memory" in capfd.readouterr().err
    assert [*result.policy.model.peft_config] == [result.policy.adapter, "reward0"]
    found = evaluate(
        str(tmp_path / "adapter"), adapter, task.rows(TRAIN[:4]), GRPOConfig(use_cpu=True, max_completion_length=40)
    )
    assert found["adapter"].metrics["eval_reward"] > found["base"].metrics["eval_reward"]


def test_a_worn_reward_changes_nothing_of_what_the_policy_computes(adapter, tmp_path):
    run(tmp_path / "one", task.tag_format_reward)
    run(tmp_path / "two", [task.tag_format_reward, adapter], reward_weights=[1, 0])
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_was_stopped_resumes_with_its_reward_and_no_other(adapter, tmp_path):
    given = dict(lr_scheduler_type="constant", max_completion_length=12)
    run(tmp_path / "cut", adapter, max_steps=1, **given)
    run(tmp_path / "whole", adapter, max_steps=2, **given)
    run(tmp_path / "cut", adapter, max_steps=2, resume_from_checkpoint=True, **given)
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = f"get_adapter_reward(adapter={adapter!r}, reward_range=[-1, 1])"
    with pytest.raises(InputError, match="another reward"):
        run(tmp_path / "cut", other, max_steps=3, resume_from_checkpoint=True, **given)
    shutil.copytree(adapter, tmp_path / "rm/adapter")
    path = tmp_path / "rm/adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "lora_alpha": 1}), encoding="utf-8")
    with pytest.raises(InputError, match="another reward model, by what it has of rm: lora_alpha; resume with that"):
        run(tmp_path / "cut", str(path.parent), max_steps=3, resume_from_checkpoint=True, **given)


def test_a_plan_has_the_adapter_on_the_device_and_its_phase(adapter, capsys):
    sizes = {"use_cpu": True, "max_prompt_length": 32, "max_completion_length": 32, "prompts_per_step": 2}
    policy, reward, config = policy_on(), get_adapter_reward(adapter), GRPOConfig(**sizes)
    reward.bind(policy)
    found = planner.plan(policy.base.config, config, rewards=[reward.config]).forecast
    worn = sum(4 * parameter.numel() for parameter in policy.parameters_of(reward.worn).values())
    assert found.resident["reward adapters"] == worn == 4 * reward.num_parameters
    assert found.phases["reward"]["activations"] > 0 and "reference" not in found.phases
    alone = planner.plan(policy.base.config, config).forecast
    assert sum(found.resident.values()) - sum(alone.resident.values()) == worn
    given = ["--model", str(DEMO_MODEL), *(f"--{name}={str(size).lower()}" for name, size in sizes.items())]
    assert cli.main(["plan", *given, "--json", "--reward_funcs", adapter, "accuracy_reward"]) == 0
    assert json.loads(capsys.readouterr().out)["resident"]["reward adapters"] == worn
    assert cli.main(["plan", "sft", *given[:3], "--reward_funcs", adapter]) == 2


def test_a_reward_that_was_worn_before_is_the_one_that_a_stopped_run_had(adapter):
    """As in a notebook, where Ctrl-C is followed by the same cell."""
    reward = get_adapter_reward(adapter)
    before = _settings(reward)
    reward.bind(policy_on())
    assert _settings(reward) == before != _settings(get_adapter_reward(adapter, part="answer"))


def test_an_adapter_in_bfloat16_is_worn(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "half")
    weights = load_file(tmp_path / "half/adapter_model.safetensors")
    half = {name: values.bfloat16() for name, values in weights.items()}
    save_file(half, tmp_path / "half/adapter_model.safetensors", metadata={"format": "pt"})
    reward = get_adapter_reward(str(tmp_path / "half"))
    reward.bind(policy_on())
    assert reward._scores([[5]], [[6, 7]]).isfinite().all()


def test_texts_are_scored_with_their_end_where_they_are_tokenized_anew(adapter):
    """As the texts of pairs have it: on the policy's base an answer alone, on another one all."""
    row = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    ((pair,), _) = tokenize_pairs(Dataset.from_list([row]), tokenizer, settings_of("rm"))
    assert ids_as_in_a_pair(tokenizer, "1+1=", "2") == pair.chosen and pair.chosen[-1] == tokenizer.eos_token_id
    reward = get_adapter_reward(adapter)
    reward.bind(make_policy())
    texts, given = ["2", f"2{tokenizer.eos_token}"], dict(completion_ids=[[5]] * 2, prompt_ids=[[5]] * 2)
    one, other = reward(prompts=["1+1="] * 2, completions=texts, **given)
    assert one == other


def test_a_text_is_scored_at_its_end_where_the_tokenizer_pads_with_it(adapter):
    """As those of Qwen2.5's and Llama's bases; transformers takes the last token that is no padding."""
    found, given = [], dict(prompts=["1+1=", "23+4="], completions=["2", "27"])
    for name in ("<|pad|>", "<|end|>"):
        tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, pad_token=name)
        found.append(get_model_reward(adapter, tokenizer, device="cpu")(**given))
    assert found[0] == found[1] and tokenizer.pad_token == tokenizer.eos_token


def test_an_adapter_of_another_base_has_a_model_of_its_own(adapter):
    reward = get_adapter_reward(adapter)
    assert "has a model of its own in memory" in reward.bind(make_policy())
    question, prompt = task.question(TRAIN[0]), [say("user", task.question(TRAIN[0]))]
    good, bad = ([say("assistant", answer(TRAIN[0]))] for answer in (task.worked, task.lazy))
    assert question and reward.model is not None
    found = reward(prompts=[prompt] * 2, completions=[good, bad], completion_ids=[[1], [1]], prompt_ids=[[5]] * 2)
    assert found[0] > found[1]


def test_what_is_no_reward_adapter_is_refused(adapter, tmp_path):
    with pytest.raises(InputError, match="is no reward adapter; train one with `lowmem-grpo reward`"):
        get_adapter_reward(str(tmp_path))
    for wrong in (
        {"adapter": None}, {"normalize": "no"}, {"reward_range": [1, 0]}, {"reward_range": 1}, {"reward_range": "ab"},
        {"reward_range": [0, math.nan]}, {"missing_eos_penalty": "1"}, {"missing_eos_penalty": -1},
        {"missing_eos_penalty": math.nan}, {"token_budget": 0}, {"token_budget": "many"},
    ):  # fmt: skip
        ((name, value),) = wrong.items()
        with pytest.raises(InputError, match=rf"^{name}={re.escape(repr(value))} is no"):
            get_adapter_reward(**{"adapter": adapter, **wrong})
    (Path(adapter) / "score_range.json").rename(tmp_path / "kept")
    with pytest.raises(InputError, match="has no score_range.json to normalize by, which is in a finished run"):
        get_adapter_reward(adapter, normalize=True)
    (tmp_path / "kept").rename(Path(adapter) / "score_range.json")
    with pytest.raises(InputError, match="scores texts and writes none; give it as one of the reward_funcs"):
        train(
            adapter,
            task.tag_format_reward,
            task.rows(TRAIN[:4]),
            config=GRPOConfig(use_cpu=True, output_dir=str(tmp_path / "o")),
        )
