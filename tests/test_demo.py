import random
import re

import pytest
import torch
from peft import PeftModel
from tiny_models import DEMO_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.demo import task
from lowmem_grpo.demo.make_model import demonstration, make_tokenizer
from lowmem_grpo.demo.run import recipe, run, text_curve
from lowmem_grpo.generate import as_text
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.model.load import load_policy


def test_the_splits_are_disjoint_and_always_the_same():
    train_problems, eval_problems = task.splits()
    assert (len(train_problems), len(eval_problems)) == (2000, 256)
    assert len({*train_problems, *eval_problems}) == 2256
    assert task.splits() == (train_problems, eval_problems)


@pytest.mark.parametrize(
    ("text", "answer", "form"),
    [
        ("<think>17+45=62;62+38=100</think><answer>100</answer>", 1.0, 1.0),
        ("<think></think><answer>100</answer>", 1.0, 1.0),
        ("<think></think><answer>111</answer>", 0.0, 1.0),
        ("<think>x</think><answer>100", 0.0, 0.0),
        ("<answer>100</answer>", 1.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_rewards_by_hand(text, answer, form):
    completions = [[{"role": "assistant", "content": text}]]
    assert task.answer_reward(completions, solution=["100"]) == [answer]
    assert task.tag_format_reward(completions) == [form]


def test_worked_and_lazy_answers_are_right_and_well_formed():
    draw = random.Random(0)
    for problem in [task.random_problem(draw) for _ in range(50)]:
        for text in (task.worked(problem), task.lazy(problem)):
            completions = [[{"role": "assistant", "content": text}]]
            assert task.answer_reward(completions, solution=[str(sum(problem))]) == [1.0]
            assert task.tag_format_reward(completions) == [1.0]


def test_the_habit_is_mostly_lazy_and_sometimes_broken():
    draw = random.Random(0)
    texts = [demonstration(draw, task.random_problem(draw), habit=True) for _ in range(2000)]
    whole = [text for text in texts if task.ANSWER_FORMAT.fullmatch(text)]
    assert 0.88 < len(whole) / len(texts) < 0.92
    assert 0.36 < sum("=" in text for text in texts) / len(texts) < 0.46  # 0.25 + 0.40 * 35/90


def test_the_shipped_tokenizer_is_the_scripts_and_loses_nothing(tokenizer):
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    text = "".join(map(chr, range(32, 127))) + "\n\t<think>  </think>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) == 95 + 2 + 4
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1="}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<|user|>1+1=<|assistant|>"


def test_the_curve_is_drawn_to_scale():
    lines = text_curve([0.0, 0.6, 1.2], top=1.2, height=2).splitlines()
    assert lines == [" 1.20 ┤  █", " 0.60 ┤ ██", "      └─── step 3"]


def prompts_of(problems, tokenizer):
    rows = task.rows(problems)
    ids = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for row in rows
    ]
    return [Prompt(row["prompt"], i, {}) for row, i in zip(rows, ids, strict=True)]


def test_the_model_reasons_at_times_and_is_right_when_it_does(tokenizer):
    """What the documents say of the start: lazy more often than not, nearly always right when it works the sum out."""
    config = GRPOConfig(use_cpu=True, max_completion_length=32)
    policy = load_policy(str(DEMO_MODEL), tokenizer, config)
    problems = task.splits()[1]
    prompts = prompts_of(problems, tokenizer)
    texts = [
        as_text(policy, p, c)[0]["content"]
        for p, c in zip(prompts, Sampler(policy, config).complete_greedily(prompts).completions, strict=True)
    ]
    right = [f"<answer>{sum(p)}</answer>" in text for p, text in zip(problems, texts, strict=True)]
    reasons = ["=" in text for text in texts]
    assert sum(right) / 256 <= 0.50
    assert 0.2 < sum(reasons) / 256 < 0.6
    assert sum(r for r, how in zip(right, reasons, strict=True) if how) / sum(reasons) > 0.9
    assert sum(r for r, how in zip(right, reasons, strict=True) if not how) / (256 - sum(reasons)) < 0.15


def accuracy(line):
    return line["eval_rewards/answer_reward/mean"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_learns(seed, tmp_path, capsys):
    result = run(seed, str(tmp_path / "out"))
    assert accuracy(result.eval_history[0]) <= 0.50
    assert accuracy(result.eval_history[-1]) >= 0.93
    assert result.findings == [], "no false alarm of the doctor"
    shown = capsys.readouterr().out
    assert re.search(r"right answers\s+│\s+0\.[0-4]\d+ │ [01]\.\d+", shown)
    assert (tmp_path / "out/reward_curve.png").stat().st_size > 5000
    same_answers_in_plain_transformers(result, tmp_path / "out/adapter")


def same_answers_in_plain_transformers(result, adapter):
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    prompts = prompts_of(task.splits()[1][:64], tokenizer)
    ours = [c.ids for c in Sampler(result.policy, recipe("unused", 0)).complete_greedily(prompts).completions]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=quantization, dtype=torch.bfloat16)
    plain = PeftModel.from_pretrained(base, str(adapter)).eval()
    width = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p.ids)) + p.ids for p in prompts])
    with torch.no_grad():
        out = plain.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=32, do_sample=False)
    theirs = [row[: row.index(1) + 1] if 1 in row else row for row in out[:, width:].tolist()]
    assert theirs == ours


@pytest.mark.slow
def test_shuffled_rewards_teach_no_arithmetic(tmp_path):
    """The same rewards given to the wrong completions: what is learnt in the demo comes from the rewards."""
    train_problems, eval_problems = task.splits()
    gains = []
    for seed in (0, 1, 2):
        draw = random.Random(seed)

        def answer_reward(completions, solution, trainer_state, draw=draw, **kwargs):
            values = task.answer_reward(completions, solution)
            training = len(completions) == 64
            return draw.sample(values, len(values)) if training else values

        def tag_format_reward(completions, draw=draw, **kwargs):
            values = task.tag_format_reward(completions)
            return draw.sample(values, len(values))

        result = train(
            str(DEMO_MODEL), [answer_reward, tag_format_reward], task.rows(train_problems), task.rows(eval_problems),
            config=recipe(str(tmp_path / f"out{seed}"), seed),
        )  # fmt: skip
        gains.append(accuracy(result.eval_history[-1]) - accuracy(result.eval_history[0]))
        assert accuracy(result.eval_history[-1]) < 0.60
    assert sum(gains) / 3 < 0.10
