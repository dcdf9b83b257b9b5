"""sample() from a model behind an endpoint: rows, what fails and is asked again, and what no endpoint obeys."""

import datetime
import json
import threading

import pytest
from servers import Answer, Server

from lowmem_grpo import SampleConfig, SelectConfig, cli, sample, select
from lowmem_grpo.errors import InputError, UnansweredError
from lowmem_grpo.pipeline.pairs import pairs
from lowmem_grpo.pipeline.sampled import read_sampled

pytestmark = pytest.mark.usefixtures("known_trials")

ROWS = [{"prompt": [{"role": "user", "content": f"{n}+1="}], "solution": str(n + 1)} for n in range(6)]


def right(completions, solution, **kwargs):
    return [float(one[-1]["content"].endswith(gold)) for one, gold in zip(completions, solution, strict=True)]


def asked(request):
    """The number that a request's sum begins with."""
    return int(request["messages"][-1]["content"].partition("+")[0])


def teacher(request):
    return Answer(str(asked(request) + 1))


def run(server, output, rows=None, rewards=(right,), model="large", **settings):
    config = SampleConfig(**{
        "output": str(output), "num_generations": 2, "max_retries": 0, "base_url": server.base_url,
        "max_completion_length": 24, "max_concurrent": 4, **settings,  # of which http.server lets 5 wait
    })  # fmt: skip
    return sample(model, ROWS if rows is None else rows, [*rewards] or None, config)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "sampled.jsonl"


def test_a_line_has_what_the_server_says_and_its_reward(output):
    with Server(lambda request: Answer("2", reasoning_content="one more")) as server:
        result = run(server, output, ROWS[1:2], temperature=0.6, top_p=0.9, extra_body={"top_k": 20, "top_p": None})
    assert server.requests[0] == {
        "model": "large", "messages": ROWS[1]["prompt"], "max_tokens": 24, "temperature": 0.6, "top_k": 20
    }  # fmt: skip
    rows = read_sampled(output)
    assert rows == 2 * [
        {
            "prompt": ROWS[1]["prompt"],
            "completion": [{"role": "assistant", "content": "<think>\none more\n</think>\n\n2"}],
            "columns": {"solution": "2"}, "rewards": {"right": 1.0}, "reward": 1.0, "finish": "eos", "tokens": 7,
            "logprob_mean": None, "prompt_index": 0, "seed": None, "model": "large",
        }
    ]  # fmt: skip
    assert (result.num_prompts, result.num_completions, result.metrics["completions/mean_length"]) == (1, 2, 7)


def test_prompts_may_be_texts_alone_and_messages_may_have_dates(output):
    with Server(teacher) as server:
        run(server, output, [{"prompt": "1+1="}, {"prompt": "2+1="}], ())
        asked_of = [[{"role": "user", "content": f"{n}+1="}] for n in (1, 2)]
        assert sorted(map(str, (row["prompt"] for row in read_sampled(output)))) == sorted(map(str, asked_of * 2))
        message = {"role": "user", "content": "1+1=", "at": datetime.date(2020, 1, 2)}
        run(server, output.with_name("b.jsonl"), [{"prompt": [message]}], ())
    assert server.requests[-1]["messages"] == [{**message, "at": "2020-01-02"}]


def test_groups_are_whole_and_max_concurrent_are_asked_at_once(output):
    both = threading.Barrier(3, timeout=20)

    def answer(request):
        both.wait()
        return teacher(request)

    with Server(answer) as server:
        run(server, output, max_concurrent=3)
    rows = read_sampled(output)
    assert server.most_at_once == 3 and len(server.requests) == 12
    groups = [[row["prompt_index"] for row in rows[place : place + 2]] for place in range(0, 12, 2)]
    assert sorted(groups) == [[index, index] for index in range(6)]
    assert {row["reward"] for row in rows} == {1.0}


def test_a_whole_file_asks_nothing(output):
    with Server(teacher) as server:
        run(server, output)
        before = output.read_bytes()
        run(server, output)
    assert output.read_bytes() == before and len(server.requests) == 12


def test_a_busy_server_is_asked_again(output):
    busy = iter([429, 500])

    def answer(request):
        status = next(busy, 200)
        return teacher(request) if status == 200 else Answer(status=status, body=b"{}", headers={"Retry-After": "0"})

    with Server(answer) as server:
        run(server, output, max_retries=2, max_concurrent=1)
    assert len(read_sampled(output)) == 12 and len(server.requests) == 14


def test_prompts_without_a_whole_group_are_left_out_told_and_asked_by_the_next_run(output):
    def answer(request):
        return Answer(status=400, body={"error": {"message": "too long"}}) if asked(request) in (1, 4) else Answer("x")

    with Server(answer) as server, pytest.raises(UnansweredError) as error:
        run(server, output)
    assert str(error.value) == (
        f"2 of 6 prompts failed, the last since {server.base_url}/chat/completions answered 400: too long; {output} "
        "has whole groups of 4 of 6 prompts; run the same again, which asks for the others alone"
    )
    kept = output.read_bytes()
    assert {row["prompt_index"] for row in read_sampled(output)} == {0, 2, 3, 5}
    with Server(teacher) as server:  # at another address
        result = run(server, output)
    assert sorted(map(asked, server.requests)) == [1, 1, 4, 4]
    assert output.read_bytes().startswith(kept)
    assert (result.num_prompts, result.metrics["reward"]) == (6, 4 / 12)


def test_a_completion_that_ended_otherwise_is_none(output):
    words = "since large ended with finish_reason 'content_filter'"
    with (
        Server(lambda request: Answer("1", finish="content_filter")) as server,
        pytest.raises(UnansweredError, match=words),
    ):
        run(server, output, ROWS[:1])
    assert output.read_bytes() == b""


def test_a_server_that_dies_is_given_up_and_the_next_run_goes_on(output, monkeypatch):
    rows = [{"prompt": f"{n}+1=", "solution": str(n + 1)} for n in range(40)]
    with Server(teacher) as dying:
        num_left = iter(range(12))

        def answer(request):
            if next(num_left, None) is None:
                dying.http.socket.close()
                raise ConnectionResetError
            return teacher(request)

        dying.answer = answer
        monkeypatch.setattr(dying.http, "handle_error", lambda *arguments: None)
        with pytest.raises(UnansweredError, match="8 prompts in a row failed, so that no more are asked, the last"):
            run(dying, output, rows, max_concurrent=2)
        dying.http.server_close()
    num_whole = len(read_sampled(output)) // 2
    assert 5 <= num_whole <= 6
    output.write_bytes(output.read_bytes()[:-9])  # and a kill in the middle of a line
    with Server(teacher) as server:
        run(server, output, rows)
    assert len(server.requests) == 80 - 2 * (num_whole - 1)
    found = read_sampled(output)
    assert sorted(row["prompt_index"] for row in found) == sorted([*range(40)] * 2)
    assert {row["prompt"][0]["role"] for row in found} == {"user"}, "a text is what a user says"


def test_what_was_sampled_by_others_is_refused(output):
    with Server(teacher) as server:
        run(server, output)
        with pytest.raises(InputError, match=r"was sampled with other endpoint \(model\); go on with the same"):
            run(server, output, model="larger")
        with pytest.raises(InputError, match=r"was sampled with other data \(prompt, solution\)"):
            run(server, output, ROWS[1:])
        with pytest.raises(InputError, match="temperature is 0.5, and was 1.0 in the run to resume"):
            run(server, output, temperature=0.5)
        lines = output.read_bytes().splitlines(keepends=True)
        output.write_bytes(b"".join([*lines[:2], *lines[:2]]))
        with pytest.raises(InputError, match="line 3 of .* and not of another one: the file was changed"):
            run(server, output)
    record = json.loads(output.with_name("sampled.jsonl.run").read_text(encoding="utf-8"))
    assert record["config"]["base_url"] == server.base_url and record["identity"]["endpoint"] == {"model": "large"}


def test_a_key_is_sent_and_never_saved(output, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    with Server(teacher) as server:
        run(server, output, api_key_variable="TEACHER_KEY")
    assert set(server.keys) == {"Bearer sk-secret"}
    assert all(b"sk-secret" not in path.read_bytes() for path in output.parent.iterdir())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rollout_kv": "int8"}, "rollout_kv is about a model on this machine, and not behind base_url"),
        ({"load_in_4bit": False}, "load_in_4bit is about a model on this machine"),
        ({"seed": 1}, "seed is about a model on this machine"),
        ({"max_prompt_length": 9}, "max_prompt_length is about a model on this machine"),
        ({"min_p": 0.1}, "min_p is not among what every endpoint reads; leave it out, or write it into extra_body"),
        ({"extra_body": {"seed": 4}}, "extra_body has 'seed', with which a prompt's completions would be alike"),
        ({"base_url": None, "timeout": 9.0}, "timeout is about an endpoint; give its base_url, or leave timeout out"),
    ],
)
def test_settings_that_are_not_obeyed_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        SampleConfig(**{"base_url": "http://localhost:8000/v1", **settings})


def reads_ids(completions, completion_ids, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"base_url": "localhost:8000"}, "is no address; write it as http://localhost:8000/v1"),
        ({"api_key_variable": "NOT_SET"}, "the environment variable 'NOT_SET' is not set"),
        ({"extra_body": {"n": 4}}, "extra_body has n, which a request has or cannot have"),
        ({"model": ""}, "model is '', and base_url is given; name the model as the server lists it"),
        ({"rewards": ["get_judge_reward()"]}, "judge_reward scores by a model that is sampled on this machine"),
        ({"rewards": [reads_ids]}, "reads_ids reads completion_ids, and an endpoint gives texts alone"),
        ({"rows": [{"prompt": [*ROWS[0]["prompt"], {"role": "assistant", "content": "1"}]}]}, "no endpoint continues"),
        ({"rows": [{**ROWS[0], "tools": [{"a": 1}]}]}, "row 0 of .* has tools, which an endpoint is not given"),
        ({"rows": [{"prompt": " "}]}, "row 0 of .* has a prompt of white space alone"),
    ],
)
def test_inputs_that_an_endpoint_has_no_use_for_are_refused_before_any_request(output, given, words):
    with Server(teacher) as server, pytest.raises(InputError, match=words):
        run(server, output, **{"rewards": (), **given})
    assert not server.requests


def test_files_of_a_server_that_counts_nothing_are_selected_and_paired_as_others(output):
    texts = iter(["2", "wrong", "the answer is 2"])
    body = {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}

    def answer(request):
        body["choices"][0]["message"]["content"] = next(texts)
        return Answer(body=json.loads(json.dumps(body)))

    with Server(answer) as server:
        run(server, output, ROWS[1:2], num_generations=3, max_concurrent=1)
    rows = read_sampled(output)
    assert {row["tokens"] for row in rows} == {None}
    chosen, _ = select(rows, SelectConfig(min_reward=1.0, per_prompt=1))
    assert [row["completion"][0]["content"] for row in chosen] == ["2"], "the shortest of the best"
    assert pairs(rows, 0.5)[0]["rejected"][0]["content"] == "wrong"
    with pytest.raises(InputError, match="max_tokens is given, and the server that sampled did not count tokens"):
        select(rows, SelectConfig(max_tokens=9))


def test_half_of_a_surrogate_pair_is_written_as_a_question_mark(output):
    with Server(lambda request: Answer("1 \ud83d")) as server:
        run(server, output, ROWS[:1])
    assert read_sampled(output)[0]["completion"][0]["content"] == "1 ?"


def test_the_command_asks_a_task_of_an_endpoint_and_exits_with_1_where_prompts_are_left(tmp_path, capsys):
    data, output = tmp_path / "rows.jsonl", tmp_path / "sampled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    fails = {3}

    def answer(request):
        return Answer(status=403, body=b"no") if asked(request) in fails else teacher(request)

    with Server(answer) as server:
        arguments = ["sample", "--base_url", server.base_url, "--model", "large", "--dataset", str(data), "--output",
                     str(output), "--reward_funcs", "accuracy_reward", "--num_generations", "2"]  # fmt: skip
        assert cli.main(arguments) == 1
        said = capsys.readouterr().err
        assert "lowmem-grpo sample: 1 of 6 prompts failed" in said and "run the same again" in said
        fails.clear()
        assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"{output}: 12 completions of 6 prompts" in out and "rewards/accuracy_reward/mean" in out
    assert cli.main(["plan", "sample", "--model", "large", "--base_url", server.base_url]) == 2
    assert "there is nothing to plan" in capsys.readouterr().err
