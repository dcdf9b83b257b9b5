import pickle

import pytest
import torch
from tiny_models import DEMO_MODEL, SMALL
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2Model,
)

from lowmem_grpo.errors import InputError
from lowmem_grpo.rewards import RewardRunner, get_model_reward, resolve_reward_funcs
from lowmem_grpo.rewards.reward_model import _batches

PROMPTS = ["1+2=", "a much longer question, what is 7 + 8?", "3"]
COMPLETIONS = ["3", "it is 15 of course", "?"]


def make(folder, kind=Qwen2ForSequenceClassification, config=Qwen2Config, labels=1, **settings):
    torch.manual_seed(0)
    model = kind(config(**{**SMALL, "num_labels": labels, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return model.eval()


def alone(model, tokenizer, text):
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    return model(ids).logits[0, 0].item()


@pytest.mark.parametrize("budget", [16384, 60, 1])
@pytest.mark.parametrize(
    ("kind", "config"), [(Qwen2ForSequenceClassification, Qwen2Config), (LlamaForSequenceClassification, LlamaConfig)]
)
def test_a_batch_scores_like_each_text_alone(tmp_path, tokenizer, kind, config, budget):
    model = make(tmp_path, kind, config)
    reward = get_model_reward(str(tmp_path), token_budget=budget, device="cpu")
    wanted = [alone(model, tokenizer, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert len({round(value, 3) for value in wanted}) == 3
    assert reward(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(wanted, abs=1e-5)


def test_a_chat_goes_through_the_models_template(tmp_path, tokenizer):
    model = make(tmp_path)
    chats = [[{"role": "user", "content": p}] for p in PROMPTS]
    answers = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
    wanted = [
        alone(model, tokenizer, f"<|user|>{p}<|assistant|>{c}<|end|>")
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert get_model_reward(model, tokenizer)(prompts=chats, completions=answers) == pytest.approx(wanted, abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        get_model_reward(model, tokenizer)(prompts=chats, completions=answers)


def test_a_folder_or_a_loaded_model_is_a_reward_function(tmp_path, tokenizer):
    make(tmp_path / "scorer")
    loaded = Qwen2ForSequenceClassification.from_pretrained(tmp_path / "scorer")
    for given in (
        str(tmp_path / "scorer"),
        loaded,
        f"get_model_reward(model={str(tmp_path / 'scorer')!r}, token_budget=64)",
    ):
        functions = resolve_reward_funcs([given, "think_format_reward"])
        runner = RewardRunner(functions, 60)
        runner.try_out(["p"], {})
        assert runner.names == ["scorer", "think_format_reward"]
        assert runner(PROMPTS, COMPLETIONS, [[1]] * 3, {}, 1).metrics["rewards/scorer/failures"] == 0


def test_a_text_longer_than_the_positions_keeps_its_end(tmp_path, tokenizer):
    model = make(tmp_path, max_position_embeddings=8)
    reward = get_model_reward(model, tokenizer)
    assert reward(prompts=["123456789"], completions=["abc"]) == pytest.approx(
        reward(prompts=["56789"], completions=["abc"])
    )


def test_only_the_answer_is_scored_where_that_is_asked_for(tmp_path, tokenizer):
    model = make(tmp_path)
    answer, whole = (get_model_reward(model, tokenizer, part=part) for part in ("answer", "all"))
    thought = ["<think>1+1</think>2"]
    assert answer(prompts=["1+1="], completions=thought) == whole(prompts=["1+1="], completions=["2"])
    assert answer(prompts=["1+1="], completions=thought) != whole(prompts=["1+1="], completions=thought)
    with pytest.raises(InputError, match="part='thought' is not known"):
        get_model_reward(model, tokenizer, part="thought")


def test_batches_stay_within_the_budget():
    assert _batches([3, 9, 4, 1], 9) == [[1], [2, 0], [3]]
    assert _batches([3, 9], 1) == [[1], [0]]
    assert _batches([], 9) == []


def test_what_is_no_reward_model_is_refused(tmp_path):
    make(tmp_path / "two", labels=2)
    Qwen2Model(Qwen2Config(**SMALL)).save_pretrained(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("two", "loads: .*mismatch|labels"),
        ("base", "has no trained reward head .score.weight"),
        ("empty", "no reward model that loads"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            resolve_reward_funcs(str(tmp_path / folder))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="neither a model folder nor a model the hub gives"):
        resolve_reward_funcs("nobody/has-this-model")
    with pytest.raises(ValueError, match="has 2 labels"):
        get_model_reward(Qwen2ForSequenceClassification(Qwen2Config(**{**SMALL, "num_labels": 2})))


class RunsCode:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it has run')",))


@pytest.mark.parametrize("written", [pickle.dumps(RunsCode()), b"garbage", b""])
def test_a_pickle_of_a_reward_model_is_one_sentence_and_runs_nothing(tmp_path, written):
    make(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(written)
    with pytest.raises(ValueError, match="hold more than tensors, or are cut short, .* take a copy in safetensors$"):
        get_model_reward(str(tmp_path))
