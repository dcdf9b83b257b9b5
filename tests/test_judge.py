import asyncio
import re
import time
from typing import Any

import pytest
import torch
from servers import Answer, Server
from tiny_models import make_policy

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs.identity import _settings as settings_of
from lowmem_grpo.rewards import RewardRunner, get_judge_reward
from lowmem_grpo.rewards.endpoint import EndpointError
from lowmem_grpo.rewards.judge import QUESTION, SCORES, YES_OR_NO

pytestmark = pytest.mark.usefixtures("known_trials")

PROMPTS = ["1+2=", [{"role": "user", "content": "3+4="}], "5"]
COMPLETIONS = ["3", [{"role": "assistant", "content": "7, of course"}], ""]


def judge(policy, **settings) -> Any:
    function: Any = get_judge_reward(**{"criterion": "Is it right?", "yes": "y", "no": "n", **settings})
    function.bind(policy)
    return function


@pytest.mark.parametrize("token_budget", [16384, 1])
def test_a_judgement_is_the_bases_own_next_word_and_not_the_adapters(token_budget):
    policy = make_policy("llama")
    found = judge(policy, token_budget=token_budget)(PROMPTS, COMPLETIONS)
    tokenizer = policy.tokenizer
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("y", "n")]
    for asked, answer, value in zip(("1+2=", "3+4=", "5"), ("3", "7, of course", ""), found, strict=True):
        text = QUESTION.format(prompt=asked, completion=answer, criterion="Is it right?", form=YES_OR_NO)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with policy.as_base():
            logits = policy.model(input_ids=ids).logits[0, -1, words]
        assert value == pytest.approx(logits.softmax(-1)[0].item(), rel=6e-6)
        with policy.inference():
            adapted = policy.model(input_ids=ids).logits[0, -1, words]
        assert not torch.allclose(adapted, logits), "the adapters would say something else"


def test_a_snapshot_of_the_reference_does_not_judge():
    policy = make_policy("llama")
    before = judge(policy)(PROMPTS, COMPLETIONS)
    policy.snapshot_reference()
    assert judge(policy)(PROMPTS, COMPLETIONS) == before


def test_before_there_is_a_model_nothing_is_judged():
    assert get_judge_reward()(PROMPTS, COMPLETIONS) == [None] * 3


def test_verdicts_that_begin_alike_are_refused():
    with pytest.raises(ValueError, match="'yes' and 'yeah' begin with the same token; choose other words"):
        judge(make_policy("llama"), yes="yes", no="yeah")


def endpoint_judge(server, **settings) -> Any:
    settings = {"criterion": "Is it right?", "base_url": server.base_url, "model": "big", "max_retries": 0, **settings}
    return get_judge_reward(**settings)


def verdicts(judge, prompts=PROMPTS, completions=COMPLETIONS) -> list[Any]:
    return asyncio.run(judge(prompts, completions))


@pytest.mark.parametrize(
    "said, reward",
    [
        ("8", 7 / 9), (" 10.\n", 1.0), ("1", 0.0), ("Score: 7/10", 6 / 9), ("**9**/10", 8 / 9), ("7.5 out of 10", 6.5 / 9),
        ("<think>Maybe 3? No, 4.</think>\nRating: 5", 4 / 9), ("I give it 8. Yes, 8.", 7 / 9),
    ],
)  # fmt: skip
def test_a_mark_from_1_to_10_becomes_a_reward_from_0_to_1(said, reward):
    with Server(lambda given: Answer(said)) as server:
        assert verdicts(endpoint_judge(server)) == [pytest.approx(reward)] * 3


@pytest.mark.parametrize("said", ["good", "7 or 8", "0", "11", "-5", "1,5", "", "<think>8</think>", "Score: 80"])
def test_words_with_no_single_mark_cost_the_completion_its_reward(said):
    with Server(lambda given: Answer(said, reasoning_content="It is 5.")) as server:
        for found in verdicts(endpoint_judge(server)):
            with pytest.raises(EndpointError, match="the judge big gave no single 1-10"):
                raise found


@pytest.mark.parametrize("said, reward", [("Yes.", 1.0), ("no", 0.0), ("<think>no?</think> YES, yes", 1.0)])
def test_a_judge_may_say_yes_or_no(said, reward):
    with Server(lambda given: Answer(said)) as server:
        assert verdicts(endpoint_judge(server, score="yes/no")) == [reward] * 3


def test_a_verdict_that_is_yes_and_no_or_was_cut_off_is_none():
    with Server(lambda given: Answer("Yes and no", finish="length")) as server:
        found = verdicts(endpoint_judge(server, score="yes/no"))
    with pytest.raises(EndpointError, match="the judge big was cut off before a verdict: Yes and no"):
        raise found[0]


def test_a_judge_behind_an_endpoint_is_asked_with_the_criterion_and_the_users_fields():
    with Server(lambda given: Answer("5")) as server:
        verdicts(endpoint_judge(server, extra_body={"max_tokens": None, "max_completion_tokens": 9}), ["2+2="], ["4"])
    (asked,) = server.requests
    text = asked.pop("messages")[0]["content"]
    assert "2+2=" in text and "\n4\n" in text and "Is it right? Say only a whole number from 1" in text
    assert asked == {"model": "big", "temperature": 0, "max_completion_tokens": 9}


def test_one_failed_call_costs_that_completion_alone_and_a_malformed_row_too():
    def answer(given):
        is_seven = "7, of course" in given["messages"][0]["content"]
        return Answer(status=500, body=b"out of memory") if is_seven else Answer("10")

    with Server(answer) as server:
        runner = RewardRunner([endpoint_judge(server)])
        scores = runner([*PROMPTS, "6"], [*COMPLETIONS, [{"content": 5}]], [[0]] * 4, {}, 1)
    assert scores.rewards.isnan().flatten().tolist() == [False, True, False, True]
    assert scores.metrics["rewards/judge_reward/failures"] == 2


def test_a_judge_that_is_too_slow_is_cut_off_with_the_others_time(caplog):
    with Server(lambda given: time.sleep(1) or Answer("5")) as server:
        started = time.monotonic()
        scores = RewardRunner([endpoint_judge(server)], timeout_s=0.2)(["a"], ["b"], [[0]], {}, 1)
    assert scores.rewards.isnan().all() and time.monotonic() - started < 1
    assert "took longer than reward_timeout=0.2 s" in caplog.text


def test_a_run_with_an_endpoint_that_is_not_there_stops_at_its_start():
    judge = get_judge_reward(base_url="http://127.0.0.1:9/v1", model="big", max_retries=0)
    with pytest.raises(InputError, match=r"judge_reward failed: EndpointError: http://127.0.0.1:9/v1/chat/completions cannot be reached"):  # fmt: skip
        RewardRunner([judge]).try_out(["a", "b"], {})


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"score": "1-10"}, "score='1-10' is of a judge behind an endpoint; give its base_url, or leave score out"),
        ({"model": "big"}, "model='big' is of a judge behind an endpoint"),
        ({"base_url": "http://a", "model": "m", "yes": "ja"}, "yes='ja' is of a judge that is the policy's own base"),
        ({"base_url": "http://a", "model": "m", "token_budget": 5}, "token_budget=5 is of a judge that is"),
        ({"base_url": "http://a", "model": "m", "score": "stars"}, "score='stars' is not known; choose 1-10 or yes/no"),
        ({"base_url": "http://a"}, "needs the name of a model there"),
    ],
)
def test_a_setting_of_the_other_kind_of_judge_is_refused(settings, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        get_judge_reward(**settings)


def test_a_resumed_run_repeats_the_judge_and_not_its_address(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    given = {"criterion": "Is it kind?", "model": "big", "api_key_variable": "JUDGE_KEY"}
    one, other = (get_judge_reward(base_url=f"http://localhost:{port}/v1", **given) for port in (1, 2))
    saved = settings_of(one)
    assert saved == settings_of(other) and "sk-secret" not in str(saved)
    assert saved != settings_of(get_judge_reward(base_url="http://localhost:1", **{**given, "criterion": "Is it?"}))


def test_a_run_learns_from_a_judge_that_is_named_on_the_command_line(tmp_path):
    with Server(lambda given: Answer(str(1 + sum(map(ord, given["messages"][0]["content"])) % 10))) as server:
        named = (
            f"get_judge_reward(criterion='Is it short?', base_url={server.base_url!r}, model='big', max_concurrent=4)"
        )
        config = GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, max_steps=1, prompts_per_step=2, num_generations=4,
            max_completion_length=6, gradient_checkpointing=False,
        )  # fmt: skip
        result = train(str(MODEL), named, task.rows(task.splits()[0][:8]), config=config)
    assert len(server.requests) == 4 + 8, "a made-up group, and a step"
    assert server.most_at_once <= 4
    assert 0 < result.history[0]["rewards/judge_reward/mean"] < 1 and result.history[0]["reward_std"] > 0


@pytest.mark.parametrize(
    "said, marks",
    [("8, because", {7 / 9}), ("7 of 10", {6 / 9}), ("8-9", set()), ("Rating (1-10): 8", {7 / 9}), ("1,000", set())],
)
def test_a_mark_is_a_number_that_stands_alone(said, marks):
    assert SCORES["1-10"].verdicts(said) == marks


def test_a_judge_over_http_sees_the_part_that_it_is_told_to():
    said = "<think>rude words</think>\n\nThank you."
    completions = [said, [{"role": "assistant", "content": said}], "<think>never ends"]
    with Server(lambda request: Answer("8")) as server:
        whole = verdicts(endpoint_judge(server, max_concurrent=1), completions=completions)
        answers = verdicts(endpoint_judge(server, part="answer", max_concurrent=1), completions=completions)
        shown = [request["messages"][0]["content"] for request in server.requests]
    assert whole == answers == [7 / 9] * 3
    assert ["rude words" in text for text in shown] == [True, True, False, False, False, False]
    assert ["Thank you." in text for text in shown[3:]] == [True, True, False] and "never ends" not in shown[5]
    assert settings_of(endpoint_judge(server, part="answer"))["part"] == "answer"
