"""Each example's main with the demo's model, for a step or two on whatever device is there."""

import importlib.util
import json
from pathlib import Path

import pytest
import test_reward_model as reward_model
from tiny_models import DEMO_MODEL, make_model
from transformers import AutoTokenizer

pytestmark = pytest.mark.usefixtures("known_trials")

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = [
    "--model",
    str(DEMO_MODEL),
    "--prompts_per_step",
    "2",
    "--num_generations",
    "2",
    "--max_completion_length",
    "8",
]


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main_of(name):
    return example(name).main


def lines(folder):
    """Those of steps and evaluations: the doctor may speak of so small a run."""
    found = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in found if "doctor" not in line]


def test_every_example_is_tested_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "gsm8k", "countdown", "reasoning_gym_task", "custom_reward", "reward_model", "cold_start",
        "rejection_sampling", "rlhf", "ppo_vs_grpo", "distill", "sums", "gsm8k_qwen3", "calculator",
    }  # fmt: skip


def test_a_reward_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reward_model.make(tmp_path / "scorer")
    main_of("reward_model")(
        [*SMALL, "--max_steps", "1", "--output_dir", "out", "--reward_model", str(tmp_path / "scorer")]
    )
    assert {"rewards/scorer/mean", "kl"} <= set(lines(tmp_path)[0])
    assert "kl" in capsys.readouterr().out


def test_rlhf(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "?"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    given = ["--max_steps", "1", "--max_completion_length", "8", "--output_dir", "out", "--model", str(DEMO_MODEL)]
    main_of("rlhf")([*given, "--pairs", "pairs.jsonl", "--prompts", "prompts.jsonl"])
    assert "rewards/rm/mean" in (tmp_path / "out/rl/metrics.jsonl").read_text(encoding="utf-8")
    assert "KL" in capsys.readouterr().out


def test_a_reward_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main_of("custom_reward")([*SMALL, "--max_steps", "1", "--output_dir", "out"])
    line = lines(tmp_path)[0]
    assert {"words", "rewards/first_letter_reward/mean", "rewards/brevity_reward/mean"} <= set(line)
    assert "words a completion" in capsys.readouterr().out


def test_countdown_from_a_base_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--dataset", "countdown?size=8&eval_size=2", "--num_generations_eval", "2"]
    main_of("countdown")([*SMALL, *small, "--max_steps", "2", "--output_dir", "out"])
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 2]
    assert "rewards/countdown_reward/mean" in lines(tmp_path)[1]
    assert "step 2: solved" in capsys.readouterr().out
    assert (tmp_path / "out/best/adapter_model.safetensors").is_file()


def test_ppo_beside_grpo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "solution": "2"}\n' * 4, encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "1+2=", "solution": "3"}\n', encoding="utf-8")
    small = ["--dataset", "rows.jsonl", "--max_steps", "1", "--critic_warmup", "0", "--output_dir", "out"]
    main_of("ppo_vs_grpo")([*SMALL, *small, "--eval_dataset", "held_out.jsonl"])
    printed = capsys.readouterr().out
    assert printed.count("held out, at step 0: 0.000 (0.000 to ") == 2 == printed.count("held out, at step 1: ")
    grpo, ppo = (line for line in printed.splitlines() if "peak in MiB" in line)
    assert grpo.startswith("grpo: ") and "critic" not in grpo
    assert ppo.startswith("ppo: ") and all(f"{phase} " in ppo for phase in ("rollout", "values", "update", "critic"))


def test_a_task_of_reasoning_gym(tmp_path, monkeypatch, capsys):
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    task = "chain_sum?size=8&eval_size=2&max_terms=2"
    main_of("reasoning_gym_task")([*SMALL, "--task", task, "--max_steps", "2", "--output_dir", "out"])
    assert "held-out score" in capsys.readouterr().out
    main_of("reasoning_gym_task")(["--list"])
    assert "chain_sum" in capsys.readouterr().out.splitlines()


def test_gsm8k_from_a_local_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main_of("gsm8k")([*SMALL, "--dataset", "rows.jsonl", "--max_steps", "2", "--output_dir", "out"])
    assert "rewards/accuracy_reward/mean" in lines(tmp_path)[0]
    assert "reward of the last step" in capsys.readouterr().out


def test_sums_share_no_problem_with_those_that_are_held_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = example("sums")
    seen, unseen = module.rows(2000, 200)
    assert len(seen) == 2000 and len(unseen) == 200
    assert not {row["prompt"] for row in seen} & {row["prompt"] for row in unseen}
    for row in [*seen, *unseen]:
        a, b = map(int, row["prompt"].splitlines()[-1].removesuffix(" =").split(" + "))
        assert 10 <= a < 100 and 10 <= b < 100 and row["solution"] == str(a + b)
    assert module.sum_reward([" 68", "68\n", " 68 = 68", "", "068"], ["68"] * 5) == [1, 1, 0, 0, 0]
    module.main([*SMALL, "--max_steps", "1", "--held_out", "4", "--output_dir", "out"])
    shown = capsys.readouterr().out
    assert "step 0: right of 4 held-out sums" in shown and "step 1: right of 4 held-out sums" in shown
    assert "CPU-seconds, peak resident memory" in shown


def test_a_calculator(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = example("calculator")
    drawn = module.pairs(5000)
    assert len(set(drawn)) == 5000 and all(100 <= a < 1000 and 100 <= b < 1000 for a, b in drawn)
    talks = [[{"content": ""}, {"content": text}] for text in (" 391\n", "391.", "")]
    assert module.right_reward(talks, ["391"] * 3) == [1, 0, 0]
    few = ["--num_examples", "3", "--max_steps", "1", "--held_out", "2", "--max_completion_length", "8"]
    module.main(["--model", str(DEMO_MODEL), "--output_dir", "out", *few])
    shown = capsys.readouterr().out
    assert "step 0: right of 2 held-out products 0.00" in shown and "calls for each 0.00" in shown


@pytest.mark.parametrize("family, thinking", [("qwen3", False), ("qwen3_5_text", True)])
def test_gsm8k_with_the_thinking_switch(family, thinking, tmp_path, monkeypatch, capsys):
    """Qwen3's template closes the block of a model that shall not think, and Qwen3.5's opens that of one that shall."""
    monkeypatch.chdir(tmp_path)
    make_model(family).save_pretrained("model")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    switch = "{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"
    tokenizer.chat_template = f"{tokenizer.chat_template}{switch}"
    tokenizer.save_pretrained("model")
    rows = [{"question": f"{n} and {n}?", "answer": f"#### {2 * n}"} for n in range(32)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", "model", "--dataset", "gsm8k?file=rows.jsonl", "--max_steps", "1", "--output_dir", "out"]
    main_of("gsm8k_qwen3")([*SMALL, *given, *["--thinking"] * thinking])
    assert "held out: right" in capsys.readouterr().out
    (*_, prompt) = (tmp_path / "out/data_preview.txt").read_text(encoding="utf-8").partition("<|assistant|>")
    assert prompt.startswith("<think>\n" if thinking else "<think></think>\n")


def test_a_cold_start_and_what_goes_on_from_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n}+{n}="}],
            "completion": [{"role": "assistant", "content": f"{2 * n}"}],
        }
        for n in range(10, 18)
    ]
    (tmp_path / "cold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gold = [{"question": f"{n}+{n}=", "answer": f"#### {2 * n}"} for n in range(10, 18)]
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gold))
    main_of("cold_start")(
        ["--model", str(DEMO_MODEL), "--cold", "cold.jsonl", "--dataset", "gold.jsonl", "--output_dir", "out",
         "--epochs", "1", "--max_steps", "1", "--max_completion_length", "8"]
    )  # fmt: skip
    assert "then reward" in capsys.readouterr().out
    assert (tmp_path / "out/rl/adapter/adapter_model.safetensors").is_file()


def test_rejection_sampling_and_what_learns_from_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n}+{n + 1}+{n + 2}=", "answer": f"#### {3 * n + 3}"} for n in range(20, 28)]
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main_of("rejection_sampling")(
        ["--model", str(DEMO_MODEL), "--dataset", "gold.jsonl", "--output_dir", "out", "--num_generations", "4",
         "--max_completion_length", "32", "--epochs", "1"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "min_reward 1 (first)" in out and "answers of 32: loss" in out
    assert (tmp_path / "out/sft/adapter/adapter_model.safetensors").is_file()


def test_distillation(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main_of("distill")(["--model", str(DEMO_MODEL)])
    assert "give --model, --teacher and --dataset, or none of them" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}+1="} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", str(DEMO_MODEL), "--teacher", str(DEMO_MODEL), "--dataset", "prompts.jsonl"]
    main_of("distill")([*given, "--max_steps", "1", "--max_completion_length", "4", "--output_dir", "out"])
    assert "teacher_kl" in lines(tmp_path)[0] and "teacher_kl" in capsys.readouterr().out
