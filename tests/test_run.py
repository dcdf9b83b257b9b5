"""Run around a loop that is not GRPO's: what a second kind of training gets from it without knowing how."""

import contextlib
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import seal
from tiny_models import make_policy

from lowmem_grpo.checkup.prompts import doctor_of
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.errors import InputError, NotFiniteError
from lowmem_grpo.inputs.prompts import Inputs
from lowmem_grpo.model.packing import pack
from lowmem_grpo.output.folder import find_checkpoint, read_state
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.run.evaluations import Evaluations
from lowmem_grpo.run.run import Run
from lowmem_grpo.update.optimizer import Learner

pytestmark = pytest.mark.usefixtures("known_trials")

PROMPTS = [Prompt(str(i), [5 + i, 9, 20], {}) for i in range(5)]


class Examples:
    """Where the loop stands among its examples, which it draws at random: a part of its checkpoints."""

    def __init__(self):
        self.seen: list[int] = []

    def draw(self) -> list[int]:
        self.seen.append(int(torch.randint(len(PROMPTS), ())))
        return PROMPTS[self.seen[-1]].ids

    def state(self):
        return {"seen": list(self.seen)}

    def load(self, state):
        self.seen = list(state["seen"])


def backward(policy, prompt, spoiled, token_budget):
    """The gradient of the likelihood of a fixed completion: supervised fine-tuning, in small."""
    (batch,) = pack([prompt], [[7, 8, 9]], token_budget=token_budget, pad_token_id=0, device=policy.device)
    loss = -policy.logprobs(batch, 1.0).mean() * (torch.nan if spoiled else 1.0)
    policy.model.zero_grad()
    loss.backward()
    return loss.detach(), batch


def fit(folder, stop_in=None, spoiled=(), callbacks=(), **settings):
    """A training loop of a dozen lines; stop_in raises in the middle of that step, spoiled ones have no finite loss."""
    config = GRPOConfig(**{
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "learning_rate": 1e-2, "save_steps": 2,
        "lr_scheduler_type": "cosine", "max_steps": 5, "doctor": "off", **settings,
    })  # fmt: skip
    torch.manual_seed(0)
    policy, examples = make_policy("qwen2"), Examples()
    folder.mkdir(exist_ok=True)
    inputs = Inputs(
        model=None, tokenizer=None, prompts=PROMPTS, eval_prompts=[], rewards=RewardRunner([len], None), given=config,
        config=config, device=policy.device, notes=["a note"], output_dir=folder,
        resume=find_checkpoint(folder, config.resume_from_checkpoint), callbacks=callbacks,
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    learner = Learner(policy.parameters_of(policy.adapter).values(), config, scaler, inputs.total_steps)
    with Run(inputs, policy, learner, {"examples": examples}, doctor_of(inputs), Evaluations(None, [])) as run:
        for step in run.steps():
            with step.phase("update"):
                work = partial(backward, policy, examples.draw(), step.number in spoiled)
                if step.number == stop_in:
                    raise RuntimeError("the machine is needed elsewhere")
                loss, _ = run.update(step, work, [6], lambda batch, loss, overflowed: f"a loss of {loss}")
            run.finish(step, {"loss": loss}, num_tokens=6)
    return run.result(), examples


def comparable(history):
    unlike = ("time/", "memory/", "step_time")
    return [{name: value for name, value in line.items() if not name.startswith(unlike)} for line in history]


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def test_a_loop_that_was_stopped_in_a_step_resumes_to_the_same_end(tmp_path, capsys):
    whole, examples = fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="needed elsewhere"):
        fit(tmp_path / "cut", stop_in=4)
    said = capsys.readouterr().err
    assert "a note" in said and "checkpoint-3 has everything up to step 3" in said
    assert read_state(tmp_path / "cut/checkpoint-3")["parts"]["examples"] == {"seen": examples.seen[:3]}
    resumed, again = fit(tmp_path / "cut", resume_from_checkpoint=True)
    assert comparable(resumed.history) == comparable(whole.history) and again.seen == examples.seen
    assert [line["num_tokens"] for line in whole.history] == [6, 12, 18, 24, 30]
    ours, theirs = adapter(tmp_path / "cut"), adapter(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole.history[-1]["loss"] < whole.history[0]["loss"] - 0.1, "it learns"


def test_an_interruption_while_a_whole_step_is_remembered_loses_nothing(tmp_path):
    """At every place where a part says its state: what is saved then resumes, with all parts, to the same end."""
    whole, examples = fit(tmp_path / "whole")
    own, calls = Examples.state, 0

    def interrupted(self, at):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return own(self)

    for at in range(1, 6):
        folder, calls = tmp_path / str(at), 0
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Examples, "state", lambda self, at=at: interrupted(self, at))
            with contextlib.suppress(KeyboardInterrupt):
                fit(folder)
        saved = find_checkpoint(folder, True) if any(folder.glob("checkpoint-*")) else None
        assert saved is None or "examples" in read_state(saved)["parts"]
        resumed, again = fit(folder, resume_from_checkpoint=saved is not None)
        assert comparable(resumed.history) == comparable(whole.history) and again.seen == examples.seen


def test_a_checkpoint_without_a_part_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(RuntimeError):
        fit(tmp_path, stop_in=3)
    path = tmp_path / "checkpoint-2/trainer_state.json"
    state = json.loads(path.read_text())
    del state["parts"]["examples"]
    path.write_text(json.dumps(state))
    seal(path.parent)
    with pytest.raises(InputError, match="checkpoint-2 has no state of its examples; resume from an older checkpoint"):
        fit(tmp_path, resume_from_checkpoint=True)
    path.write_text("[]")
    seal(path.parent)
    with pytest.raises(InputError, match="holds '\\[\\]' and no state of a run"):
        fit(tmp_path, resume_from_checkpoint=True)


def test_a_step_that_is_not_finite_changes_no_weight_and_too_many_end_the_run(tmp_path, capsys):
    result, _ = fit(tmp_path / "some", spoiled=(2, 3))
    assert [line["skipped_steps"] for line in result.history] == [0, 1, 1, 0, 0]
    said = capsys.readouterr().err
    assert "step 2: a loss of nan; no weight is changed" in said and "2 of 5 optimizer steps changed no weight" in said
    with pytest.raises(NotFiniteError, match=r"in step 3 a loss of nan; .*the last good checkpoint is .*checkpoint-3"):
        fit(tmp_path / "all", spoiled=(1, 2, 3), max_nonfinite_steps=2)


def test_callbacks_see_the_step_and_may_not_move_the_randomness_of_the_next_one_in_a_resume(tmp_path):
    def draws(step, metrics, policy):
        torch.rand(step)

    whole, examples = fit(tmp_path / "whole", callbacks=[draws])
    with contextlib.suppress(RuntimeError):
        fit(tmp_path / "cut", stop_in=4, callbacks=[draws])
    resumed, again = fit(tmp_path / "cut", callbacks=[draws], resume_from_checkpoint=True)
    assert again.seen == examples.seen and comparable(resumed.history) == comparable(whole.history)
