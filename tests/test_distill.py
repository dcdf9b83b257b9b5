"""On-policy distillation: the teacher's advantages are the reverse KL's gradient, and a teacher is what it says."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import DEMO_MODEL, compute_in_fp64, make_model, make_policy
from transformers import AutoTokenizer

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.cli import main
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import recipe
from lowmem_grpo.demo.run import run as demo
from lowmem_grpo.errors import InputError
from lowmem_grpo.evaluation.evaluate import evaluate
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.teacher import Teacher, find_teacher, load_teacher, refuse_other_tokens
from lowmem_grpo.objective.coefficients import Coefficients
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.update.distill import with_teacher
from lowmem_grpo.update.passes import backward
from lowmem_grpo.update.token_metrics import TokenMeter

pytestmark = pytest.mark.usefixtures("known_trials")

ROWS = task.rows(task.splits()[0][:32])
PROMPT = [5, 9, 17, 30, 11]
RUN = {
    "use_cpu": True, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 6, "learning_rate": 1e-3,
    "gradient_checkpointing": False,
}  # fmt: skip


def run(folder, reward_funcs=None, model=str(DEMO_MODEL), rows=ROWS, eval_dataset=None, **settings):
    config = GRPOConfig(output_dir=str(folder), **{**RUN, "max_steps": 2, **settings})
    return train(model, reward_funcs, rows, eval_dataset, config)


def logits_of(policy, ids):
    """The head's logits (T, V) of a row, with the gradient."""
    return policy.model(input_ids=torch.tensor([ids], device=policy.device)).logits[0]


def enumerated(policy, teacher, prompt, prefix=()):
    """Every next token of a prefix as a completion, and the probabilities (V,) of each by policy and teacher."""
    size = policy.head.weight.shape[0]
    with torch.no_grad():
        own = logits_of(policy, [*prompt, *prefix]).log_softmax(-1)[len(prompt) - 1 :]
    completions = [[*prefix, token] for token in range(size)]
    rollout = Rollout.bare([prompt], completions, torch.zeros(size))
    before = (
        own[: len(prefix)].gather(1, torch.tensor(prefix, dtype=torch.long)[:, None])[:, 0] if prefix else own[:0, 0]
    )
    logprobs = torch.cat([torch.cat([before, own[-1, token : token + 1]]) for token in range(size)])
    return dataclasses.replace(rollout, sampling_logprobs=logprobs), own[-1].exp()


def student_and_teacher(make_fp64_policy):
    """Two policies of other weights, in fp64."""
    other = make_policy(make_model("qwen3", seed=3), load_in_4bit=False)
    assert other.packs
    compute_in_fp64(other)
    return make_fp64_policy("qwen3"), other


def gradient_of(policy):
    return torch.cat([p.grad.flatten() for p in policy.parameters_of(policy.adapter).values()])


def our_gradient(policy, rollout, config):
    meter = TokenMeter(rollout, policy.device)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    backward(policy, rollout, meter, Coefficients(0.0, 0.0), scaler, config, 10_000)
    return gradient_of(policy)


@pytest.mark.parametrize("prefix", [(), (40, 7)], ids=str)
@pytest.mark.parametrize("coef", [1.0, 0.3])
def test_the_enumerated_gradient_is_that_of_the_reverse_kl(prefix, coef, make_fp64_policy):
    """Over all tokens of the vocabulary, each as often as the policy says it; the prefix teaches nothing here."""
    policy, other = student_and_teacher(make_fp64_policy)
    config = GRPOConfig(teacher="a model", teacher_coef=coef, bf16=False)
    rollout, probabilities = enumerated(policy, other, PROMPT, prefix)
    found = with_teacher(Teacher(other, None), rollout, config, TokenBudget(10_000))
    last = torch.zeros(found.num_tokens)
    last[found.offsets[1:] - 1] = probabilities  # in place of a mean over what was sampled
    weighed = dataclasses.replace(found, token_advantages=found.token_advantages * last * found.num_tokens)
    ours = our_gradient(policy, weighed, config)

    with torch.no_grad(), other.as_base():
        theirs = logits_of(other, [*PROMPT, *prefix])[-1].log_softmax(-1)
    for parameter in policy.parameters_of(policy.adapter).values():
        parameter.grad = None
    logprobs = logits_of(policy, [*PROMPT, *prefix])[-1].log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - theirs)).sum()
    (coef * kl).backward()
    expected = gradient_of(policy)
    assert kl > 0.1 and expected.norm() > 0
    assert (ours - expected).norm() / expected.norm() < 2**-23  # log-probabilities are kept in fp32
    distance = -found.token_advantages[found.offsets[1:] - 1] / coef
    assert (probabilities * distance).sum().item() == pytest.approx(kl.item(), rel=1e-6)


def test_value_and_enumerated_gradient_are_those_of_trls_distillation_at_beta_1(make_fp64_policy):
    trainer = pytest.importorskip("trl.trainer.distillation_trainer")
    policy, other = student_and_teacher(make_fp64_policy)
    config = GRPOConfig(teacher="a model", bf16=False)
    rollout, probabilities = enumerated(policy, other, PROMPT)
    found = with_teacher(Teacher(other, None), rollout, config, TokenBudget(10_000))
    weighed = dataclasses.replace(found, token_advantages=found.token_advantages * probabilities * found.num_tokens)
    ours = our_gradient(policy, weighed, config)
    for parameter in policy.parameters_of(policy.adapter).values():
        parameter.grad = None
    (batch,) = pack([PROMPT], [[1]], token_budget=100, pad_token_id=0, device=policy.device)
    with other.as_base():
        theirs = other.hidden_states(batch)
    own = policy.hidden_states(batch)
    loss, _, _ = trainer._chunked_divergence_loss(
        own[None].float(), theirs[None].float(), policy.head.weight.float(), other.head.weight.float(),
        torch.ones(1, 1), beta=1.0,
    )  # fmt: skip
    loss.backward()
    expected = gradient_of(policy)
    assert (ours - expected).norm() / expected.norm() < 1e-5
    assert -(probabilities * found.token_advantages).sum().item() == pytest.approx(loss.item(), rel=1e-5)


def sampled(policy, num_generations=3):
    """A rollout of made-up completions with the policy's own log-probabilities, the last of them masked."""
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 128, (length,), generator=draw).tolist() for length in (5, 3)]
    completions = [torch.randint(2, 128, (length,), generator=draw).tolist() for length in (7, 2, 9, 4, 1, 6)]
    rollout = Rollout.bare(prompts, completions, torch.randn(6, generator=draw))
    (batch,) = pack(prompts, completions, token_budget=10_000, pad_token_id=0, device=policy.device, num_generations=3)
    logprobs = torch.zeros(rollout.num_tokens)
    with policy.inference():
        logprobs[batch.token_index] = policy.logprobs(batch, 1.0)
    mask = torch.tensor([True] * 5 + [False])
    return dataclasses.replace(rollout, sampling_logprobs=logprobs, completion_mask=mask)


def test_a_teachers_advantages_are_added_to_those_of_the_rewards():
    policy, other = make_policy("llama"), make_policy(make_model("llama", seed=3))
    rollout = sampled(policy)
    found = with_teacher(Teacher(other, None), rollout, GRPOConfig(teacher="t", teacher_coef=0.5), TokenBudget(10_000))
    of_rewards = rollout.advantages.repeat_interleave(rollout.offsets.diff())
    added = found.token_advantages - of_rewards
    for b in range(5):
        ids = [*rollout.prompt_of(b).ids, *rollout.completions[b].ids]
        with other.as_base():
            logprobs = logits_of(other, ids[:-1]).log_softmax(-1)[-len(rollout.completions[b].ids) :]
        theirs = logprobs.gather(1, torch.tensor(rollout.completions[b].ids)[:, None])[:, 0]
        part = slice(rollout.offsets[b], rollout.offsets[b + 1])
        assert torch.allclose(added[part], 0.5 * (theirs - rollout.sampling_logprobs[part]), atol=1e-5)
    assert not added[rollout.offsets[5] :].any(), "what is masked teaches nothing"
    counted = rollout.offsets[5]
    assert found.metrics["teacher_kl"] == pytest.approx(-2 * added[:counted].mean().item(), rel=1e-5)
    assert found.table["teacher_kl"][1] == pytest.approx(-2 * added[7:9].mean().item(), rel=1e-5)
    assert rollout.token_advantages is None and found.has_advantage.all()


def test_the_policy_before_the_update_is_what_a_teacher_is_compared_with_where_it_is_known():
    policy = make_policy("llama")
    rollout = sampled(policy)
    rollout = dataclasses.replace(rollout, old_logprobs=rollout.sampling_logprobs - 1)
    before = with_teacher(Teacher(policy, policy.adapter), rollout, GRPOConfig(teacher="t"), TokenBudget(10_000))
    assert before.metrics["teacher_kl"] == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize("settings", [{"token_budget": 12}, {"padding_free": False}], ids=str)
def test_no_layout_changes_what_the_teacher_says(settings):
    policy, other = make_policy("qwen3"), make_policy(make_model("qwen3", seed=3))
    found = [
        with_teacher(Teacher(other, None), sampled(policy), config, TokenBudget(config.token_budget)).token_advantages
        for config in (GRPOConfig(teacher="t"), GRPOConfig(teacher="t", **settings))
    ]
    assert torch.allclose(*found, atol=1e-5)


@pytest.fixture
def folders(tmp_path):
    """The folders of a tiny model with its tokenizer, and of an adapter of it that is awake."""
    model = tmp_path / "model"
    make_model("llama").save_pretrained(model)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(model)
    policy = make_policy(str(model))
    policy.save(tmp_path / "adapter")
    return str(model), str(tmp_path / "adapter")


def test_an_adapter_of_the_same_base_is_worn_on_it_and_says_what_a_second_model_with_it_says(folders, tmp_path):
    model, adapter = folders
    copied = shutil.copytree(model, tmp_path / "copy")
    elsewhere = Path(shutil.copytree(adapter, tmp_path / "of-copy"))
    text = json.loads((elsewhere / "adapter_config.json").read_text(encoding="utf-8"))
    (elsewhere / "adapter_config.json").write_text(json.dumps({**text, "base_model_name_or_path": str(copied)}), encoding="utf-8")  # fmt: skip
    found = []
    for name in (adapter, str(elsewhere)):
        policy = make_policy(model)
        with torch.no_grad():
            for parameter in policy.parameters_of(policy.adapter).values():
                parameter.mul_(0.5)  # not the teacher itself
        config = GRPOConfig(teacher=name, bf16=False, use_cpu=True)
        of_teacher = find_teacher(model, config)
        teacher = load_teacher(of_teacher, policy, config)
        assert (teacher.policy is policy) == (name == adapter) == (of_teacher.model is None)
        rollout = sampled(policy)
        found.append(with_teacher(teacher, rollout, config, TokenBudget(10_000)))
        assert torch.equal(sampled(policy).sampling_logprobs, rollout.sampling_logprobs), "the policy is as it was"
    assert torch.allclose(found[0].token_advantages, found[1].token_advantages, atol=1e-5)
    assert abs(found[0].metrics["teacher_kl"]) > 0.05


def test_loading_a_teacher_draws_no_random_number_of_the_run(folders):
    policy = make_policy(folders[0])
    for name in (folders[1], str(DEMO_MODEL)):
        config = GRPOConfig(teacher=name, use_cpu=True)
        state = torch.get_rng_state()
        load_teacher(find_teacher(folders[0], config), policy, config)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_system_prompt_is_read_by_the_teacher_alone(tmp_path):
    result = run(
        tmp_path, teacher="base", teacher_system_prompt="Sum up.", system_prompt="Be brief.", log_completions=True,
        max_steps=1,
    )  # fmt: skip
    policy = result.policy
    preview = (tmp_path / "data_preview.txt").read_text(encoding="utf-8").splitlines()
    at = preview.index("  as the teacher reads it")
    assert "Be brief." in preview[at - 1] and "Sum up." in preview[at + 1]
    (line,) = result.history
    assert line["teacher_kl"] > 0 and "reward" not in line and "reward_std" not in line
    (file,) = (tmp_path / "completions").glob("*.parquet")
    rows: Any = Dataset.from_parquet(str(file))
    for row in rows:
        assert [m["role"] for m in row["prompt"]] == ["system", "user"] and row["prompt"][0]["content"] == "Be brief."
    assert policy.adapters.model.peft_config.keys() == {"default"}, "and the base is the teacher, without an adapter"


def test_a_run_learns_from_its_teacher_and_is_resumed_bit_for_bit(tmp_path):
    settings = {"teacher": str(DEMO_MODEL), "max_steps": 4, "save_steps": 2, "temperature": 1.2}
    whole = run(tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "part/checkpoint-2")
    run(tmp_path / "part", **settings, resume_from_checkpoint=True)
    first, second = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "part"))
    assert first.read_bytes() == second.read_bytes()
    assert {"time/teacher_s", "memory/teacher/peak_mib", "tokens_per_s/teacher"} <= whole.history[0].keys()


def test_a_run_with_a_teacher_begins_as_one_without(tmp_path):
    """With the same adapter, and the same completions."""
    with_one = run(tmp_path / "a", task.tag_format_reward, teacher=str(DEMO_MODEL), max_steps=1)
    without = run(tmp_path / "b", task.tag_format_reward, max_steps=1)
    assert with_one.history[0]["completions/mean_length"] == without.history[0]["completions/mean_length"]
    assert with_one.history[0]["reward"] == without.history[0]["reward"]


def test_rewards_of_weight_0_are_measured_alone(tmp_path):
    """The update is that of a run without rewards, and the reward that is shown is their sum."""
    settings = {"teacher": "base", "teacher_system_prompt": "Sum up.", "max_completion_length": 24}
    funcs = [task.tag_format_reward, task.answer_reward]
    unseen = task.rows(task.splits()[1][:4])
    measured = run(tmp_path / "a", funcs, eval_dataset=unseen, **settings, reward_weights=[0, 0])
    run(tmp_path / "b", **settings)
    first, second = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    line = measured.history[0]
    assert line["reward"] == pytest.approx(line["rewards/tag_format_reward/mean"] + line["rewards/answer_reward/mean"])
    assert measured.eval_history[0]["eval_reward"] > 0 and measured.findings == []


def test_another_teacher_is_refused_on_resume(tmp_path, folders):
    model, adapter = folders
    settings = {"model": model, "teacher": adapter, "max_steps": 1}
    run(tmp_path / "out", **settings)
    again = {**settings, "max_steps": 2, "resume_from_checkpoint": True}
    for other in (str(tmp_path / "out/adapter"), str(DEMO_MODEL)):
        with pytest.raises(InputError, match="is of a run with another teacher, of other weights; resume with that"):
            run(tmp_path / "out", **{**again, "teacher": other})
    with pytest.raises(InputError, match="teacher is None, and was "):
        run(tmp_path / "out", task.tag_format_reward, **{**again, "teacher": None})
    moved = str(Path(adapter).rename(tmp_path / "moved"))
    run(tmp_path / "out", **{**again, "teacher": moved})
    again, adapter = {**again, "max_steps": 3, "teacher": moved}, moved
    settings_of = Path(adapter) / "adapter_config.json"
    text = settings_of.read_text(encoding="utf-8")
    settings_of.write_text(json.dumps({**json.loads(text), "lora_alpha": 1}), encoding="utf-8")
    with pytest.raises(InputError, match="is of a run with another teacher, of other weights; resume with that one"):
        run(tmp_path / "out", **again)
    settings_of.write_text(text, encoding="utf-8")
    policy = make_policy(model)
    with torch.no_grad():
        next(iter(policy.parameters_of(policy.adapter).values())).add_(1)
    policy.save(Path(adapter))
    with pytest.raises(InputError, match="is of a run with another teacher, of other weights; resume with"):
        run(tmp_path / "out", **again)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"teacher": "base"}, "teacher='base' would only hold the policy to its own base, as beta does"),
        ({"teacher": "./nothing"}, "the teacher cannot be taken: model './nothing' is not a folder on this machine"),
        ({"teacher_coef": 0.5}, "teacher_coef=0.5 is read only with a teacher; name one, or leave teacher_coef out"),
        ({"teacher_system_prompt": "x"}, "teacher_system_prompt='x' is read only with a teacher"),
        ({"teacher": "t", "loss_type": "gmpo"}, "a teacher gives each token an advantage of its own, and loss_type='gmpo'"),
        ({"teacher": str(DEMO_MODEL), "dynamic_sampling_rounds": 1}, "dynamic_sampling_rounds looks for differences of rewards"),
        ({"teacher": str(DEMO_MODEL), "scale_rewards": "none"}, "scale_rewards is about rewards, and there are no reward_funcs"),
        ({"teacher": str(DEMO_MODEL), "reward_funcs": "think_format_reward", "num_generations": 1}, "num_generations=1 serves a teacher, and leaves the rewards nothing to compare"),
        ({}, "reward_funcs is missing"),
    ],
)  # fmt: skip
def test_what_no_teacher_can_do_is_refused(tmp_path, settings, sentence):
    with pytest.raises(InputError) as refused:
        run(tmp_path, **settings)
    assert sentence in str(refused.value)


def test_evaluations_and_texts_that_a_teacher_cannot_read_are_refused(tmp_path):
    with pytest.raises(
        InputError, match="an eval_dataset is scored by reward_funcs, and there are none; give them with"
    ):
        run(tmp_path, teacher=str(DEMO_MODEL), eval_dataset=ROWS[:4])
    texts = [{"prompt": "1+2="}]
    with pytest.raises(
        InputError, match="teacher_system_prompt is for chats, and train_dataset has prompts that are texts"
    ):
        run(tmp_path, rows=texts, teacher="base", teacher_system_prompt="Sum up.")
    with pytest.raises(InputError, match="an evaluation needs reward_funcs, and a teacher is none"):
        evaluate(str(DEMO_MODEL), None, ROWS[:4], GRPOConfig(teacher=str(DEMO_MODEL), use_cpu=True))


def test_a_teacher_that_is_the_policys_own_base_is_told(tmp_path, recwarn):
    """Under a system prompt of its own it has something to teach."""
    shutil.copytree(DEMO_MODEL, tmp_path / "other")
    for teacher, prompt, is_told in ((DEMO_MODEL, None, True), (DEMO_MODEL, "Sum up.", False), (tmp_path / "other", None, False)):  # fmt: skip
        assert find_teacher(
            str(DEMO_MODEL), GRPOConfig(teacher=str(teacher), teacher_system_prompt=prompt, use_cpu=True)
        )
        told = [str(warning.message) for warning in recwarn]
        assert any("is the policy's own base, which is held twice" in text for text in told) == is_told
        recwarn.clear()


def teacher_folder(folder, change_tokenizer=lambda tokenizer: None, **config):
    """A copy of the demo's model whose tokenizer and configuration are others."""
    shutil.copytree(DEMO_MODEL, folder)
    path = Path(folder) / "tokenizer.json"
    given = json.loads(path.read_text(encoding="utf-8"))
    change_tokenizer(given)
    path.write_text(json.dumps(given), encoding="utf-8")
    settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    (Path(folder) / "config.json").write_text(json.dumps({**settings, **config}), encoding="utf-8")


def swap(given):
    vocabulary = given["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    teacher_folder(tmp_path / "t", swap)
    with pytest.raises(InputError, match=r"has another vocabulary: 2 of the policy's \d+ tokens are others there, such as 'a', \d+ here and \d+ there; name a teacher of the same family, or let it write examples"):  # fmt: skip
        run(tmp_path / "out", teacher=str(tmp_path / "t"))


def test_a_teacher_that_ends_what_it_says_otherwise_or_cannot_read_all_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    config = GRPOConfig(teacher="t", use_cpu=True)
    found = find_teacher(str(DEMO_MODEL), GRPOConfig(teacher=str(DEMO_MODEL), use_cpu=True))
    smaller = dataclasses.replace(found, model=type(found.model)(**{**found.model.to_dict(), "vocab_size": 100}))
    with pytest.raises(InputError, match="has 100 tokens in its embedding, and the policy 128, so that it cannot read"):
        refuse_other_tokens(smaller, str(DEMO_MODEL), tokenizer, config)

    teacher_folder(tmp_path / "t", eos_token_id=9)
    for name in ("generation_config.json", "tokenizer_config.json"):
        path = tmp_path / "t" / name
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.update({"eos_token_id": 9} if name.startswith("gen") else {"eos_token": "<unk>"})
        path.write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "t/chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"ends what it says with .*, and the policy with '<\|end\|>', so that it would teach never to end"):  # fmt: skip
        run(tmp_path / "out", teacher=str(tmp_path / "t"))


def test_a_teacher_is_planned_and_named_on_the_command_line(tmp_path, capsys):
    given = ["plan", "--model", str(DEMO_MODEL), "--use_cpu", "true", "--json"]
    for name in ("max_prompt_length", "max_completion_length", "num_generations", "prompts_per_step"):
        given += [f"--{name}", "4"]
    assert main([*given, "--teacher", str(DEMO_MODEL)]) == 0
    planned = json.loads(capsys.readouterr().out)
    for name in ("4-bit linear layers", "embedding, head and the rest"):
        assert planned["resident"][f"the teacher's {name}"] == planned["resident"][name]
    assert planned["phases"]["teacher"]["activations"] > 0


@pytest.mark.slow
def test_a_student_of_the_demos_adapter_reaches_its_accuracy(tmp_path):
    """In a quarter of the steps that reinforcement learning took, from the teacher alone."""
    taught = demo(seed=0, output_dir=str(tmp_path / "rl"))
    seen, unseen = task.splits()
    config = dataclasses.replace(
        recipe(str(tmp_path / "out"), seed=1), max_steps=15, beta=0.0, loss_type="dapo",
        teacher=str(tmp_path / "rl/adapter"), reward_weights=[0.0, 0.0],
    )  # fmt: skip
    rewards = [task.answer_reward, task.tag_format_reward]
    result = train(str(DEMO_MODEL), rewards, task.rows(seen), task.rows(unseen), config=config)
    before, after = (
        line["eval_rewards/answer_reward/mean"] for line in (result.eval_history[0], result.eval_history[-1])
    )
    assert before < 0.5 and after >= taught.eval_history[-1]["eval_rewards/answer_reward/mean"] - 0.03
