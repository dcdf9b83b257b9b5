"""A resumed run is the same run: model, adapter, tokenizer, data and rewards."""

import copy
import functools
import importlib
import json
import shutil
import warnings
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig
from test_checkpoint import seal
from test_reward_model import make as make_scorer
from test_train import ROWS, run, text_reward
from tiny_models import DEMO_MODEL, make_policy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lowmem_grpo.config.losses import LOSS_TYPES
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.demo.task import answer_reward
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs.identity import (
    columns_of,
    identity_of,
    models_of,
    refuse_another_run,
    refuse_other_ends,
    refuse_other_models,
    refuse_other_weights,
    source_of_objective,
    weights_of,
)
from lowmem_grpo.objective.loss import LOSSES, register_objective
from lowmem_grpo.rewards import (
    RewardRunner,
    get_code_reward,
    get_cosine_scaled_reward,
    get_judge_reward,
    get_model_reward,
    get_regex_reward,
    get_routed_reward,
)

SETTINGS = {"rewards": text_reward, "max_completion_length": 4}


def identity(prompts, **given):
    """identity_of() of prompts."""
    return identity_of(data=columns_of(prompts), **given)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, max_steps=1, **SETTINGS)
    return folder / "out"


@pytest.fixture
def given():
    """Everything that a run's identity is made of."""
    policy = make_policy("qwen2")
    prompts = [Prompt("1+1=", [1, 2, 3], {"solution": "2", "level": None}), Prompt("2+2=", [4, 5], {"solution": "4"})]
    return {
        "model": policy.base.config, "adapter": LoraConfig(), "tokenizer": AutoTokenizer.from_pretrained(DEMO_MODEL),
        "prompts": prompts, "rewards": RewardRunner([text_reward, get_regex_reward("yes")]),
    }  # fmt: skip


def resume_of(tmp_path, identity):
    """A checkpoint that has an identity."""
    state = {"format": 2, "step": 3, "identity": identity, "config": {}, "parts": {}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path


def test_the_same_inputs_are_the_same_run(tmp_path, given):
    resume = resume_of(tmp_path, identity(**given))
    refuse_another_run(resume, identity(**copy.deepcopy({**given, "rewards": None}) | {"rewards": given["rewards"]}))


def other_settings(**changes):
    def change(model):
        vars(model).update(changes)
        return model

    return change


def with_column(**columns):
    return lambda prompts: [*prompts[:-1], Prompt("2+2=", [4, 5], {**prompts[-1].columns, **columns})]


def another_template(tokenizer):
    tokenizer.chat_template += " "
    return tokenizer


def another_token(tokenizer):
    tokenizer.add_tokens(["a new token"])
    return tokenizer


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model", other_settings(rms_norm_eps=1e-3), "another model: rms_norm_eps is 0.001, and was 1e-06"),
        ("model", other_settings(rope_parameters={"rope_theta": 1.0}), "another model: rope_parameters is"),
        ("adapter", lambda adapter: LoraConfig(lora_alpha=99), "another adapter: lora_alpha is 99, and was 8"),
        ("adapter", lambda adapter: LoraConfig(use_rslora=True), "another adapter: use_rslora is True, and was False"),
        ("tokenizer", another_template, "another tokenizer: its chat template differs"),
        ("tokenizer", another_token, "another tokenizer: its vocabulary differs"),
        ("prompts", lambda prompts: prompts[:1], "on other prompts"),
        ("prompts", lambda prompts: prompts[::-1], "on other prompts"),
        ("prompts", with_column(solution="5"), "on other values in solution"),
        ("prompts", with_column(level=3), "on other values in level"),
        ("prompts", with_column(more=1), "on other values in more"),
        ("rewards", lambda rewards: RewardRunner([text_reward]), "the rewards text_reward, regex_reward, and these"),
        (
            "rewards", lambda rewards: RewardRunner([text_reward, get_regex_reward("no")]),
            r"another reward: regex_reward is \[\['no', 48\], False\], and was \[\['yes', 48\], False\]",
        ),
    ],
)  # fmt: skip
def test_another_run_is_refused_with_the_name_of_what_differs(tmp_path, given, name, change, words):
    resume = resume_of(tmp_path, identity(**given))
    changed = {**given, name: change(given[name])}
    with pytest.raises(InputError, match=f"is of a run (with )?{words}"):
        refuse_another_run(resume, identity(**changed))


def test_how_a_model_is_stored_or_run_may_differ(tmp_path, given):
    resume = resume_of(tmp_path, identity(**given))
    change = other_settings(use_cache=False, attention_dropout=0.5, _name_or_path="elsewhere", dtype=torch.float16)
    refuse_another_run(resume, identity(**{**given, "model": change(given["model"])}))


@pytest.mark.parametrize("saved", [{}, {"model": None}, {"model": [], "rewards": {}}])
def test_an_identity_that_lacks_something_is_one_sentence(tmp_path, given, saved):
    with pytest.raises(InputError, match="does not say of which model it is; resume from an older checkpoint"):
        refuse_another_run(resume_of(tmp_path, saved), identity(**given))


def test_what_older_versions_did_not_write_down_is_not_compared(tmp_path, given):
    older = identity(**given)
    refuse_another_run(
        resume_of(tmp_path, older), {**older, "teacher": {"weights": "1"}, "critic_init": {"weights": "2"}}
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (get_cosine_scaled_reward(max_len=9), get_cosine_scaled_reward(max_len=10)),
        (get_code_reward(timeout=9), get_code_reward(timeout=10)),
        (get_judge_reward("Is it right?"), get_judge_reward("Is it wrong?")),
    ],
)
def test_a_built_in_reward_has_the_settings_that_it_had(tmp_path, given, before, after):
    was, same, other = (
        identity(**{**given, "rewards": RewardRunner([function])}) for function in (before, before, after)
    )
    refuse_another_run(resume_of(tmp_path, was), same)
    with pytest.raises(InputError, match=f"is of a run with another reward: {before.__name__} is"):
        refuse_another_run(resume_of(tmp_path, was), other)


def test_a_reward_whose_source_code_changed_is_said(tmp_path, given):
    def mended(completions, **kwargs):
        return [0.5 for _ in completions]

    mended.__name__ = "text_reward"
    resume = resume_of(tmp_path, identity(**{**given, "rewards": RewardRunner([text_reward])}))
    with pytest.warns(UserWarning, match="the reward text_reward has other source code or settings than in"):
        refuse_another_run(resume, identity(**{**given, "rewards": RewardRunner([mended])}))


def test_an_objective_whose_source_code_changed_is_said(tmp_path, given):
    def steep(tokens, config):
        return -2 * tokens.advantages * tokens.logprobs

    def flat(tokens, config):
        return -tokens.advantages * tokens.logprobs

    def by(objective):
        register_objective("own")(objective)
        return {**identity(**given), "objective": source_of_objective("own")}

    try:
        resume = resume_of(tmp_path, by(steep))
        refuse_another_run(resume, by(steep))
        with pytest.warns(UserWarning, match="the objective own has other source code or settings than in"):
            refuse_another_run(resume, by(flat))
    finally:
        del LOSSES["own"], LOSS_TYPES["own"]
    assert source_of_objective("dapo") == {}


class Scaled:
    """Rewards by a user's own class, function that makes one, or partial, of one source code."""

    def __init__(self, scale):
        self.scale, self.itself = scale, self

    def __call__(self, completions, scale=1.0, **kwargs):
        return [self.scale * scale for _ in completions]

    def method(self, completions, **kwargs):
        return self(completions)


def scaled(scale):
    def reward(completions, **kwargs):
        return [scale for _ in completions]

    return reward


@pytest.mark.parametrize(
    "make",
    [
        Scaled, scaled, lambda scale: Scaled(scale).method, lambda scale: functools.partial(scaled(1), scale=scale),
        lambda scale: functools.partial(scaled(scale), n=1), lambda scale: functools.partial(Scaled(1), scale=scale),
    ],
)  # fmt: skip
def test_a_reward_of_the_users_that_was_made_with_other_settings_is_said(tmp_path, given, make):
    was, same, other = (identity(**{**given, "rewards": RewardRunner([make(scale)])}) for scale in (0.1, 0.1, 5.0))
    resume = resume_of(tmp_path, was)
    refuse_another_run(resume, same)
    with pytest.warns(UserWarning, match="the reward .* has other source code or settings than in"):
        refuse_another_run(resume, other)


HELPERS = """
import functools, re, time
SEP = "x"
WORDS, PATTERN = ("a", "b"), re.compile(SEP)
UNUSED = 1
CALLS, START, SEEN = 0, time.time(), {}
def parse(text):
    global CALLS
    CALLS, SEEN[text] = CALLS + 1, START
    return size(text)
@functools.cache
def size(text):
    return len(text)
class Base:
    def verdict(self):
        return mark()
def mark():
    return 2
"""
REWARD = """
import HELPERS as h
from HELPERS import WORDS as words
class Judge(h.Base):
    pass
def made():
    def inner(text):
        return 3
    def score(completions, judge=Judge(), **kwargs):
        return [inner(c) + h.parse(c) + judge.verdict() for c in completions if c not in words and h.PATTERN]
    return score
score = made()
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("len(text)", "len(text) + 1"), ("return 2", "return 3"), ("return 3", "return 4"), ('"b")', '"c")'),
        ('SEP = "x"', 'SEP = "y"'), ("UNUSED = 1", "UNUSED = 2"),
    ],
)  # fmt: skip
def test_what_a_reward_of_the_users_calls_and_reads_is_of_its_source(tmp_path, given, monkeypatch, before, after):
    """By name, by module, as a closure, a base or a default; and not what changes from run to run, or is unused."""
    monkeypatch.syspath_prepend(tmp_path)
    runs = []
    for number, texts in enumerate(
        ((HELPERS, REWARD), (HELPERS.replace(before, after), REWARD.replace(before, after)))
    ):
        names = [f"{kind}_of_a_test_{number}_{abs(hash(after))}" for kind in ("helpers", "rewards")]
        for name, text in zip(names, texts, strict=True):
            (tmp_path / f"{name}.py").write_text(text.replace("HELPERS", names[0]))
        score = importlib.import_module(names[1]).score
        runs.append(identity(**{**given, "rewards": RewardRunner([score])}))
    resume = resume_of(tmp_path, runs[0])
    changed = runs[1]
    if before.startswith("UNUSED"):
        score(["called"])
        changed = identity(**{**given, "rewards": RewardRunner([score])})
        with warnings.catch_warnings(action="error"):
            refuse_another_run(resume, changed)
        return
    with pytest.warns(UserWarning, match="the reward score has other source code or settings than in"):
        refuse_another_run(resume, changed)
    older = {name: value for name, value in runs[0].items() if name != "helpers"}
    with warnings.catch_warnings(action="error"):
        refuse_another_run(resume_of(tmp_path, older), changed)


def another_weight(model, tokenizer):
    with torch.no_grad():
        model.score.weight[0, 0] += 1


def another_norm(model, tokenizer):
    model.config.rms_norm_eps = 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_weight, "weights, exact"), (another_norm, "rms_norm_eps"),
        (lambda model, tokenizer: another_template(tokenizer), "chat template"),
    ],
)  # fmt: skip
def test_a_reward_model_is_known_by_what_it_holds_wherever_it_is(tmp_path, given, change, words):
    """Saved elsewhere under the same name; a checkpoint of an older version does not know its models."""
    make_scorer(tmp_path / "a/scorer")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    folders = [f"{tmp_path}/{name}/scorer" for name in "ab"]
    runners = [RewardRunner([get_model_reward(one), get_routed_reward(one, values=["a"])]) for one in folders]
    before, same = map(models_of, runners)
    was, moved = (identity(**{**given, "rewards": runner}) for runner in runners)
    with pytest.raises(InputError, match="is of a run with another reward: scorer is"):
        refuse_another_run(resume_of(tmp_path, was), moved)  # by name, as an older version kept it
    resume = resume_of(tmp_path, {**was, "reward models": before})
    refuse_another_run(resume, moved)
    refuse_other_models(resume, same)
    with pytest.raises(InputError, match="another reward model, by what it has of scorer: part; resume with that one"):
        refuse_other_models(resume, models_of(RewardRunner([get_model_reward(folders[1], part="answer")])))
    model = AutoModelForSequenceClassification.from_pretrained(folders[1])
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    change(model, tokenizer)
    other = models_of(RewardRunner([get_model_reward(model, tokenizer)]))
    with pytest.raises(InputError, match=f"another reward model, by what it has of scorer: {words}; resume with that"):
        refuse_other_models(resume, other)
    refuse_other_models(resume_of(tmp_path, {}), other)


def test_other_tokens_that_end_a_completion_are_refused(tmp_path):
    """As after an edit of generation_config.json, which no other part of an identity shows."""
    resume = resume_of(tmp_path, {"ends": [1]})
    refuse_other_ends(resume, [1])
    with pytest.raises(InputError, match=r"another model: the ids that end a completion are \[1, 2\], and were \[1\];"):
        refuse_other_ends(resume, [1, 2])


def test_the_weights_of_the_base_are_those_of_the_checkpoint(tmp_path):
    """Whichever weight differs, in 4 bits or not; an adapter and the way of storing do not count."""
    for changes in ({}, {"load_in_4bit": False}):
        resume = resume_of(tmp_path, {"weights": weights_of(make_policy("qwen2", **changes))})
        policy = make_policy("qwen2", **changes)
        with torch.no_grad():
            for parameter in policy.parameters_of("default").values():
                parameter.add_(1)
        refuse_other_weights(resume, weights_of(policy))
        for parameter in policy.base.parameters():
            if not parameter.requires_grad:
                before = parameter.data.clone()
                parameter.data.view(-1)[0] += 1
                with pytest.raises(InputError, match="with another model: the weights of its base differ"):
                    refuse_other_weights(resume, weights_of(policy))
                parameter.data.copy_(before)
        refuse_other_weights(resume, weights_of(policy))


def test_a_run_on_another_base_of_the_same_name_is_refused(tmp_path, out):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(InputError, match="checkpoint-1 is of a run with another model: the weights of its base differ"):
        run(out.parent, model, max_steps=2, resume_from_checkpoint=True, **SETTINGS)
    other_rows = [{**row, "solution": "0"} for row in ROWS]
    with pytest.raises(InputError, match="checkpoint-1 is of a run on other values in solution"):
        run(out.parent, rows=other_rows, max_steps=2, resume_from_checkpoint=True, **SETTINGS)
    with pytest.raises(InputError, match="is of a run with the rewards text_reward, and these are answer_reward"):
        run(out.parent, max_steps=2, resume_from_checkpoint=True, **{**SETTINGS, "rewards": answer_reward})


def test_what_a_resumed_run_changes_and_may_change_is_said_in_one_line(tmp_path, out, capsys):
    shutil.copytree(out, tmp_path / "out")
    run(tmp_path, max_steps=2, resume_from_checkpoint=True, save_steps=7, **SETTINGS)
    assert "checkpoint-1, with max_steps 2 (was 1), save_steps 7 (was 20)\n" in capsys.readouterr().err


def test_what_no_setting_says_and_may_round_otherwise_is_said(tmp_path, out, capsys, monkeypatch):
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out/checkpoint-1/trainer_state.json"
    state = json.loads(path.read_bytes())
    state["circumstances"] |= {"torch": "1.0", "processes": 2}
    path.write_text(json.dumps(state))
    seal(path.parent)
    monkeypatch.setenv("LOWMEM_GRPO_TRITON", "0")
    run(tmp_path, max_steps=1, resume_from_checkpoint=True, **SETTINGS)
    said = (
        f"going on with torch {version('torch')} (was 1.0), processes 1 (was 2), Triton kernels off (was on): what is"
    )
    assert said in capsys.readouterr().err


def test_an_adapter_that_a_run_began_from_may_be_gone(tmp_path, out):
    """A checkpoint has all that is still read of it, and stands for it."""
    shutil.copytree(out, tmp_path / "out")
    gone, checkpoint = str(tmp_path / "gone"), tmp_path / "out/checkpoint-1"
    with pytest.raises(
        InputError, match=f"is not a folder .* began from, give {checkpoint} as the model, which has all"
    ):
        run(tmp_path, gone, max_steps=2, resume_from_checkpoint=True, **SETTINGS)
    with pytest.raises(InputError, match="is not a folder on this machine$"):
        run(tmp_path / "new", gone, **SETTINGS)
    assert len(run(tmp_path, str(checkpoint), max_steps=2, resume_from_checkpoint=True, **SETTINGS).history) == 2


def test_a_config_of_other_names_is_refused(tmp_path, out):
    path = out / "checkpoint-1/trainer_state.json"
    written = path.read_text()
    for change in (lambda c: c.pop("beta"), lambda c: c.update(greed=1), lambda c: c.clear()):
        state = json.loads(written)
        change(state["config"])
        path.write_text(json.dumps(state))
        seal(path.parent)
        with pytest.raises(
            InputError, match="differ in the settings that they know: .*(beta|greed).*; resume with the"
        ):
            run(out.parent, max_steps=2, resume_from_checkpoint=True, **SETTINGS)
    path.write_text(written)
    seal(path.parent)
