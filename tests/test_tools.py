"""Tools: the form in which templates write calls, what is called, and completions that go on after a result."""

import asyncio
import inspect
import json
import re
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import DEMO_MODEL, make_policy
from transformers import AutoTokenizer

from lowmem_grpo import GRPOConfig, Phase, cli, run_pipeline
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.data.text import as_read
from lowmem_grpo.errors import InputError
from lowmem_grpo.generate import sample
from lowmem_grpo.generate.completion import Completion, Conversation
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.model.packing import pack
from lowmem_grpo.objective.coefficients import Coefficients
from lowmem_grpo.objective.gae import gae, token_rewards
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.pipeline.phases import resolve
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.run.log import write_completions
from lowmem_grpo.tools.call_forms import Call
from lowmem_grpo.tools.conversation import sampler_of
from lowmem_grpo.tools.form import ASK, Found, ToolForm
from lowmem_grpo.tools.names import find_tools
from lowmem_grpo.tools.toolbox import Result, Toolbox
from lowmem_grpo.update.critic import with_gae
from lowmem_grpo.update.passes import backward, logprobs_of
from lowmem_grpo.update.token_metrics import TokenMeter
from lowmem_grpo.watch.run import as_text

TEMPLATE = (  # of the demo's tokens, with tools
    "{% if tools %}<|user|>{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ 'user' if m.role == 'tool' else "
    "m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|assistant|>{% endif %}"
)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the one
        b: the other
    """
    return a + b


async def later(word: str, seconds: float = 0.0) -> str:
    """Say a word later.

    Args:
        word: the word
        seconds: how much later
    """
    await asyncio.sleep(seconds)
    return word


def sort(by: dict) -> list:
    """Sort something.

    Args:
        by: how
    """
    return sorted(by)


def broken(kind: str) -> dict:
    """Go wrong.

    Args:
        kind: in which way
    """
    if kind == "value":
        raise ValueError("no good\nat all")
    if kind == "exit":
        raise SystemExit(3)
    time.sleep(30)
    return {}


def tokenizer_with(template: str):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = template
    return tokenizer


# --- the form of calls ---------------------------------------------------------------------------------------------

SERVED = [
    "deepseekv3",
    "deepseekv3_training",
    "diffusion_gemma",
    "diffusion_gemma_training",
    "gemma4",
    "gemma4_v2",
    "gemma4_v3",
    "gemma4_v4",
    "gemma4_v5",
    "glm4moe",
    "glm4moe_training",
    "gptoss",
    "gptoss_training",
    "lfm2_2_5",
    "lfm2_2_5_v2",
    "lfm2_2_5_vl",
    "lfm2_v2",
    "lfm2_v2_training",
    "llama3_1",
    "llama3_2",
    "nemotron_3_5_lightning",
    "nemotron_3_nano",
    "nemotron_3_super",
    "nemotron_3_ultra",
    "qwen2_5",
    "qwen2_5_training",
    "qwen3",
    "qwen3_5_nothink",
    "qwen3_5_nothink_training",
    "qwen3_5_think",
    "qwen3_5_think_training",
    "qwen3_6",
    "qwen3_6_training",
    "qwen3_8",
    "qwen3_8_training",
    "qwen3_instruct_2507",
    "qwen3_instruct_2507_training",
    "qwen3_training",
    "qwen3_vl",
    "qwen3_vl_training",
]
ONE_CALL = {"gptoss", "gptoss_training", "llama3_1", "llama3_2"}
ADD, SAY = Call("add", {"a": 17, "b": -4}), Call("later", {"word": 'it\'s "so" {x}\n  <b>', "seconds": 0.5})
SCHEMAS = Toolbox([add, later, sort], None).schemas
CALLED = '<tool_call>{"name": "add", "arguments": {"a": 17, "b": -4}}</tool_call>'


def form_of(name: str) -> ToolForm:
    theirs = pytest.importorskip("trl", minversion="1.16").__path__[0]
    tokenizer = tokenizer_with(Path(theirs, f"chat_templates/{name}.jinja").read_text(encoding="utf-8"))
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return ToolForm(tokenizer, {"tools": SCHEMAS})


def turn(form: ToolForm, calls: list[Call]) -> str:
    """What a model would say to make these calls, by the template's own text of them."""
    return form._turn(form._message(calls)).removesuffix(form.end_of_turn)


@pytest.mark.parametrize("name", SERVED)
def test_calls_are_read_as_a_template_writes_them(name):
    form = form_of(name)
    say = replace(SAY, arguments={**SAY.arguments, "word": "so\n  <b>"}) if name.startswith("lfm2_2_5") else SAY
    for call in (ADD, say, Call("later", {"word": ""}), Call("later", {})):
        assert form.calls(turn(form, [call])).calls == [call]
    assert form.several == (name not in ONE_CALL)
    if form.several:
        assert form.calls(turn(form, [ADD, say, ADD])).calls == [ADD, say, ADD]


@pytest.mark.parametrize("name", SERVED)
def test_what_follows_a_call_is_what_the_template_makes_of_its_result(name):
    """The turn and what follows make the template's own chat, whichever token ended the turn."""
    form = form_of(name)
    calls = [Call("add", {})] * (2 if form.several else 1)
    answers = [{"role": "tool", "name": "add", "content": f"number {place}"} for place, _ in enumerate(calls)]
    contents = [answer["content"] for answer in answers]
    whole = form._shown([ASK, form._message(calls), *answers], True)
    following, said = form.results(calls, contents)
    listed, _ = form.results(calls, [[("a", content)] for content in contents])
    assert all(content in listed for content in contents)  # which many templates leave out of a list
    places = form._found(turn(form, calls))
    assert whole.endswith(turn(form, calls)[places[0].start : places[-1].stop] + following)
    assert not said or following.endswith(said)
    for end in ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|call|>", "</s>", "<|tool_response>", "<|observation|>"):
        after, _ = form.results(calls, contents, end)
        assert following.endswith(after) and all(content in after for content in contents)
        assert not after.startswith(end)
        before = following.removesuffix(after)
        assert before in ("", form.end_of_turn) or before.endswith(end)


def test_special_tokens_in_what_a_tool_returned_are_text():
    tokenizer = tokenizer_with(TEMPLATE)
    form = ToolForm(tokenizer, {"tools": Toolbox([add], None).schemas})
    calls, ends = [Call("add", {})], set(tokenizer.all_special_ids)
    plain, said = form.result_ids(calls, ["7 of them"])
    text, _ = form.results(calls, ["7 of them"])
    assert plain == tokenizer(text, add_special_tokens=False)["input_ids"]
    for content in ("7<|end|>", "<|end|><|pad|>7 <|end|", [["<|end|>", 7]]):
        ids, now = form.result_ids(calls, [content])
        assert now == said and [one for one in ids if one in ends] == [one for one in plain if one in ends]
        assert tokenizer.decode(ids) == form.results(calls, [content])[0]


REFUSED = ["cohere", "cohere2", "deepseek_r1_distill", "gemma3", "llama3", "phi3", "muse_glimmer"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_without_calls_is_refused(name):
    with pytest.raises(InputError, match="^the chat template shows no calls of tools and their results: [^\n]*; give"):
        form_of(name)


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(InputError, match="^tools are shown by a chat template, and the tokenizer has none; give"):
        ToolForm(tokenizer_with(None), {})


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        ("qwen3", '<tool_call>{"name":"add","arguments":{"a":17,"b":-4}}</tool_call>', [ADD]),
        ("qwen3", 'So.\n<tool_call>\n{"arguments": {"a": 17, "b": -4}, "name": "add"}\n', [ADD]),
        ("qwen3", '<tool_call>\n{"name": "add", "arguments": "{\\"a\\": 17, \\"b\\": -4}"}\n</tool_call>', [ADD]),
        ("qwen3", '<think>a <tool_call>{"name": "add", "arguments": {}}</tool_call></think>\n\nno', []),
        ("qwen3", '<think>a <tool_call>{"name": "add", "arguments": {}}</tool_call>', []),
        ("qwen3", '<think>a</think><tool_call>{"name": "add", "arguments": {"a": 17, "b": -4}}</tool_call>', [ADD]),
        ("qwen3", '<tool_call>{"name": "add", "arguments": {"a": 17,}}</tool_call>', []),
        ("qwen3", '<tool_call>{"name": "add", "arguments": [17, 4]}</tool_call>', []),
        ("qwen3", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', []),
        ("qwen3", "<tool_call>[]</tool_call>", []),
        ("qwen3", '<tool_call>{"name": "add", "arguments": {}} and more', []),
        ("qwen3", "<tool_call>" * 2000, []),
        ("qwen3", "<tool_call>" + "[" * 5000, []),
        ("llama3_1", '{"name": "add", "parameters": {"a": 17, "b": -4}}', [ADD]),
        ("llama3_1", 'The call is {"name": "add", "parameters": {"a": 17, "b": -4}}', []),
        ("qwen3_6", "<tool_call>\n<function=add>\n<parameter=a>17</parameter><parameter=b>\n-4\n</parameter>"
         "</function></tool_call>", [ADD]),
        ("qwen3_6", "<tool_call>\n<function=add>\n<parameter=a>\n17\n", []),
        ("qwen3_6", "<tool_call>\n<function=add>\n<parameter=a>\n17\n</parameter>\n<parameter=b>-4</parameter>", [ADD]),
        ("qwen3_6", "<tool_call>\n<function=add>\n<parameter=a>17</parameter><parameter=b>-4</parameter></function>", [ADD]),
        ("qwen3_6", "<tool_call>\n<function=later>\n<parameter=word>\n  a</parameter> b\n</parameter>\n</function>\n"
         "</tool_call>", [Call("later", {"word": "  a</parameter> b"})]),
        ("qwen3", '<tool_call>{"name": "add", "arguments": {"a": "17", "b": "-4"}}</tool_call>', [ADD]),
        ("qwen3", '<tool_call>{"name": "later", "arguments": {"word": "5"}}</tool_call>', [Call("later", {"word": "5"})]),
        ("qwen3", '<tool_call>{"name": "add", "arguments": null}</tool_call>', [Call("add", {})]),
        ("qwen3", '<tool_call>{"name": "add"}</tool_call>', [Call("add", {})]),
        ("qwen3", '<tool_call>{"name": "\\"add\\"", "arguments": {}}</tool_call>', []),
        ("qwen3", '<tool_call>{"name": "later", "arguments": {"word": "</think><think>"}}</tool_call>',
         [Call("later", {"word": "</think><think>"})]),
        ("qwen3", 'Use <think> tags. <tool_call>{"name": "add", "arguments": {"a": 17, "b": -4}}</tool_call>', [ADD]),
        ("qwen3", "so it is</think>" + '<tool_call>{"name": "add", "arguments": {"a": 17, "b": -4}}</tool_call>', [ADD]),
        ("qwen3", '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 40 + "]" * 40 + "}}</tool_call>", []),
        ("qwen3", "Words. <think>maybe " + CALLED + " no</think> It is 3.", []),
        ("qwen3", "<think>a</think> x <think>" + CALLED + "</think> no", []),
        ("qwen3", CALLED + " and <think>so</think> " + CALLED, [ADD, ADD]),
        ("qwen3", '<tool_call>{"name": "sort", "arguments": {"by": "{(1, 2): 3}"}}</tool_call>',
         [Call("sort", {"by": "{(1, 2): 3}"})]),
        ("qwen3_6", "<tool_call>\n<function=add>\n</function>\n</tool", [Call("add", {})]),
        ("glm4moe", "I might use <tool_call>\nadd", []),
        ("llama3_1", '<|python_tag|>{"name": "add", "parameters": {"a": 17, "b": -4}}', [ADD]),
        ("llama3_1", '{"name": "Bob", "parameters": {"age": 5}}', []),
        ("gemma4", "<|channel>thought\nOr <|tool_call>call:add{a:1,b:2}<tool_call|>?<channel|>It is 3.", []),
        ("gemma4", "<|channel>thought\nSo.<channel|><|tool_call>call:add{a:17,b:-4}<tool_call|>", [ADD]),
        ("gemma4", "<|tool_call>call:add{a:17" * 2000, []),
        ("lfm2_v2", "<|tool_call_start|>[add(a=17, b=-4)]<|tool_c", [ADD]),
        ("gptoss", "<|channel|>analysis<|message|>I could use to=functions.add then. No.<|end|><|start|>assistant<|channel|>"
         'commentary to=functions.later <|constrain|>json<|message|>{"word": "x"}', [Call("later", {"word": "x"})]),
        ("gptoss", "<|channel|>analysis<|message|>Or to=functions.add?<|end|><|start|>assistant<|channel|>final<|message|>"
         '{"a": 1}', []),
        ("lfm2_v2", "<|tool_call_start|>[add(a=b'x')]<|tool_call_end|>", []),
        ("lfm2_v2", "<|tool_call_start|>[(lambda: 1)(a=2)]<|tool_call_end|>", []),
        ("qwen3_6", "<tool_call>" * 2000, []),
        ("gemma4", "<|tool_call>call:add{a:17,b:-4}", [ADD]),
        ("gemma4", "<|tool_call>call:add{a:17,b:", []),
        ("lfm2_v2", "<|tool_call_start|>[add(a=17, b=-4)]", [ADD]),
        ("lfm2_v2", "<|tool_call_start|>[add(17, b=-4)]<|tool_call_end|>", []),
        ("lfm2_v2", "<|tool_call_start|>[add(a=open('x'))]<|tool_call_end|>", []),
        ("gptoss", '<|channel|>analysis<|message|>We add.<|end|><|start|>assistant<|channel|>commentary to=functions.add '
         '<|constrain|>json<|message|>{"a": 17, "b": -4}', [ADD]),
    ],
)  # fmt: skip
def test_what_models_write_is_a_call_or_none(name, text, calls):
    started = time.process_time()
    assert form_of(name).calls(text).calls == calls
    assert time.process_time() - started < 2


def test_words_around_calls_are_kept():
    form = form_of("deepseekv3")
    frame, between = turn(form, [ADD, ADD]), form_of("qwen3")
    assert form.calls(f"So. {frame} Then.") == Found([ADD, ADD], "So.\nThen.")
    assert between.calls(f"A {CALLED} b {CALLED} c") == Found([ADD, ADD], "A\nb\nc")


def test_marks_are_told_from_what_tools_and_words_are_called():
    def less(a: int, b: int) -> bool:
        """Whether a < b.

        Args:
            a: the one
            b: the other
        """
        return a < b

    shown = "{% if tools %}[TOOLS] {{ tools | tojson }}[/TOOLS]{% endif %}"
    less_call = Call("less", {"a": 1, "b": 2})
    react = (
        "{% for m in messages %}{{ m.role }}: {% for c in m.tool_calls or [] %}Action: {{ c.function.name }} "
        "{{ c.function.arguments | tojson }}{% endfor %}{% if m.role == 'assistant' and not m.tool_calls %}Answer: "
        "{% endif %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for template in (shown + OF_OTHERS["mistral"][0], shown + OF_OTHERS["new mistral"][0], react):
        form = ToolForm(tokenizer_with(template), {"tools": Toolbox([less], None).schemas})
        assert form.calls(turn(form, [less_call])) == Found([less_call], "")
        assert form.calls(f"So. {turn(form, [less_call])}") == Found([less_call], "So.")


@pytest.mark.parametrize("name", SERVED)
def test_nothing_said_is_no_call(name):
    form = form_of(name)
    for text in ("", " ", "</think>", "x</think>", "<think>"):
        assert form.calls(text) == Found([], text)


OF_OTHERS = {  # as other models write calls and results
    "mistral": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' %}"
        "[TOOL_RESULTS] {{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}[/TOOL_RESULTS]"
        "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': "
        "c.function.arguments, 'id': c.id} | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]</s>"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 17, "b": -4}, "id": "Xy1234567"}]',
        'Xy1234567',
    ),
    "new mistral": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
        "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}{% for c in m.tool_calls %}[TOOL_CALLS]"
        "{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}</s>{% else %}{{ m.content }}</s>"
        "{% endif %}{% endfor %}",
        '[TOOL_CALLS]add[ARGS]{"a": 17, "b": -4}',
        "[TOOL_RESULTS]13",
    ),
    "command": (
        "{% for m in messages %}<|TURN|>{{ m.role }}: {% if m.tool_calls %}<|START_ACTION|>[{% for c in m.tool_calls %}"
        "{{ {'tool_name': c.function.name, 'parameters': c.function.arguments} | tojson }}{% if not loop.last %},"
        "{% endif %}{% endfor %}]<|END_ACTION|><|END|>{% elif m.role == 'assistant' %}<|RESPONSE|>{{ m.content }}"
        "<|END_RESPONSE|><|END|>{% else %}{{ m.content }}<|END|>{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "<|TURN|>assistant: {% endif %}",
        '<|START_ACTION|>[{"tool_name": "add", "parameters": {"a": 17, "b": -4}}]<|END_ACTION|>',
        "13",
    ),
    "new deepseek": (
        "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}<A>{% elif m.role == 'tool' %}<O>"
        "{{ m.content }}</O>{% elif m.tool_calls %}<calls_begin>{% for c in m.tool_calls %}<call_begin>"
        "{{ c.function.name }}<sep>{{ c.function.arguments | tojson }}<call_end>{% endfor %}<calls_end><E>{% else %}"
        "{{ m.content }}<E>{% endif %}{% endfor %}",
        '<calls_begin>\n<call_begin>add<sep>{"a": 17, "b": -4}<call_end>',
        "<O>13",
    ),
    "minimax": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}<call>\n<invoke name="
        "\"{{ c.function.name }}\">\n{% for k, v in c.function.arguments.items() %}<parameter name=\"{{ k }}\">"
        "{{ v if v is string else v | tojson }}</parameter>\n{% endfor %}</invoke>\n</call>{% endfor %}<end>\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
        '<call>\n<invoke name="add">\n<parameter name="a">17</parameter>\n<parameter name="b">-4</parameter>\n</invoke>',
        "13",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_OTHERS)
def test_templates_in_no_list_are_read(name):
    template, said, result = OF_OTHERS[name]
    form = ToolForm(tokenizer_with(template), {"tools": SCHEMAS})
    found = form.calls(f"So. {said}")
    assert found == Found([ADD], "So.")
    assert result in form.results(found.calls, ["13"], "<E>")[0]
    for calls in ([SAY], [ADD, SAY, ADD], [Call("later", {})]):
        assert form.calls(turn(form, calls)).calls == calls
    assert form.several


def test_calls_are_those_that_trl_reads():
    utils = pytest.importorskip("trl.chat_template_utils")
    compared = 0
    for name in SERVED:
        form, several = form_of(name), [ADD, Call("later", {"word": "so"})]
        try:
            utils.add_response_schema(form.tokenizer)
        except ValueError:  # it has none for this template
            continue
        said = turn(form, several[: 1 + form.several])
        ids = form.tokenizer(said, add_special_tokens=False)["input_ids"]
        theirs = utils.parse_response(form.tokenizer, ids, prefix=[], tools=[add, later]).get("tool_calls")
        if theirs is None:  # the demo's tokenizer has not the special tokens that theirs looks for
            continue
        ours = [call.as_message() for call in form.calls(said).calls]
        assert [one["function"] for one in theirs] == [one["function"] for one in ours]
        compared += 1
    assert compared > 5


# --- what is called ------------------------------------------------------------------------------------------------


def test_a_toolbox_answers_every_call_in_its_place():
    toolbox = Toolbox([add, later, broken], 0.5)
    calls = [
        Call("add", {"a": 1, "b": 2}), Call("later", {"word": "x\ud800", "seconds": 0.2}), Call("add", {"a": 1}),
        Call("later", {"word": "y", "seconds": 0.2}), Call("nothing", {}), Call("broken", {"kind": "value"}),
        Call("broken", {"kind": "exit"}), Call("broken", {"kind": "sleep"}), Call("later", {"word": "z", "seconds": 9}),
    ]  # fmt: skip
    started = time.perf_counter()
    results = toolbox(calls)
    assert time.perf_counter() - started < 4  # async ones wait together
    assert [result.failed for result in results] == [False, False, True, False, True, True, True, True, True]
    contents = [result.content for result in results]
    assert contents[0] == "3" and contents[1] == "x?" and contents[3] == "y"
    assert json.loads(contents[4]) == {"error": "Tool nothing not found."}
    assert json.loads(contents[5]) == {"error": "no good"}
    assert "missing 1 required positional argument: 'b'" in contents[2]
    assert contents[7] == contents[8] == '{"error": "The tool took longer than 0.5 s."}'
    assert Toolbox([add], None)([]) == []


class Slow:
    """A value whose text is long in coming."""

    def __str__(self):
        time.sleep(9)
        return "late"


def slow_value() -> Slow:
    """Return what is slow to write."""
    return Slow()


async def slow_value_later() -> Slow:
    """Return what is slow to write, when it is awaited."""
    return Slow()


def test_writing_a_value_is_part_of_the_call():
    started = time.perf_counter()
    results = Toolbox([slow_value, slow_value_later], 0.3)([Call("slow_value", {}), Call("slow_value_later", {})])
    assert time.perf_counter() - started < 3
    assert [result.content for result in results] == ['{"error": "The tool took longer than 0.3 s."}'] * 2


class Uncopied:
    def __reduce__(self):
        raise TypeError

    def __str__(self):
        return "x"


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError


async def cancelled():
    raise asyncio.CancelledError


class Awaitable:
    def __await__(self):
        yield

    def __str__(self):
        return "more"


async def awaits_more():
    return Awaitable()


@pytest.mark.parametrize(
    ("returned", "content"),
    [
        ({(1, 2): 3}, "{(1, 2): 3}"), (None, "null"), (np.arange(3), "[0, 1, 2]"), ({"x": np.int64(5)}, '{"x": 5}'),
        ([("a", 1)], [("a", 1)]), ([Uncopied()], '["x"]'),
        (Unspeakable(), '{"error": "RuntimeError()"}'), (Unspeakable, '{"error": "Unspeakable"}'),
        (cancelled, '{"error": "CancelledError()"}'), (awaits_more, '"more"'), (GeneratorExit, '{"error": "GeneratorExit()"}'),
    ],
    ids=["tuple_keys", "none", "array", "number", "list", "odd_list", "no_text", "no_words", "cancelled", "awaits_more", "exit"],
)  # fmt: skip
def test_whatever_a_tool_returns_or_raises_the_run_goes_on(returned, content):
    def odd():
        """Return something."""
        value: Any = returned
        if isinstance(value, type) and issubclass(value, BaseException):
            raise value
        return value() if inspect.iscoroutinefunction(value) else value

    (result,) = Toolbox([odd], 5.0)([Call("odd", {})])
    assert result.content == content and result.failed == ("error" in content)
    around = [1]
    around.append(around)
    assert Toolbox([odd], 5.0)([Call("odd", {"x": around})])[0].content != content


def test_a_tool_changes_nothing_of_the_run():
    def draw(words: list[str]) -> float:
        """Draw a number.

        Args:
            words: some words
        """
        words.clear()
        torch.set_default_dtype(torch.float64)
        return torch.rand(()).item()

    state, call = torch.get_rng_state(), Call("draw", {"words": ["x"]})
    assert 0 <= float(Toolbox([draw], None)([call])[0].content) < 1
    assert call.arguments == {"words": ["x"]}
    assert torch.equal(state, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 3\nx ** 2", "9"), ("print('a')\nprint('b')", "a\nb"), ("", "The program printed nothing."),
        ("1 / 0", "ZeroDivisionError: division by zero"), ("exit()", "The program printed nothing."),
        ("print('x' * 5000)", "x" * 4000 + "\n... (cut off)"), ("def f(:", "SyntaxError: invalid syntax"),
        ("import socket\nsocket.create_connection(('192.0.2.1', 80))", "not permitted"),
    ],
)  # fmt: skip
def test_python_says_what_a_program_printed(code, said):
    (result,) = Toolbox(find_tools("python"), 30.0)([Call("python", {"code": code})])
    assert result.content.endswith(said) and not result.failed


def undescribed(a, b):
    """Add."""


def placed(a: int, /) -> int:
    """Say a number.

    Args:
        a: the number
    """
    return a


def test_tools_that_cannot_be_told_are_refused():
    with pytest.raises(InputError, match=r"^the tool undescribed cannot be described to the model: .*`Args:`"):
        Toolbox([undescribed], None)
    with pytest.raises(InputError, match="^the tool placed has a, which cannot be given by name; make it a plain"):
        Toolbox([placed], None)
    with pytest.raises(InputError, match="^two tools are named add; rename one"):
        Toolbox([add, add], None)
    for given, message in (
        ([], "^tools is empty; give a function or python, or leave it out"),
        ("pythom", r"^no tool is named 'pythom'; did you mean python\?"),
        ("os.remove", "^os.remove is of Python's own and no tool; give python, or module.function of your own"),
        ("numpy.zeros", "^tool 'numpy.zeros' is of an installed package; write a function in a module of your own"),
        (5, "^tool 5 is no function; write one that calls it, with type hints and a docstring"),
        (partial(add, b=1), "^tool functools.partial.* is no function; write one that calls it"),
        (dict, "^tool .* is no function"),
    ):
        with pytest.raises(InputError, match=message):
            find_tools(given)


# --- completions ---------------------------------------------------------------------------------------------------

LENGTH = 60


def by_sevens(self, text: str) -> Found:
    """Calls in what a random model says: one for each 7."""
    calls = [Call("add", {"a": 1, "b": place}) for place, one in enumerate(text) if one == "7"]
    return Found(calls, text[: text.index("7")] if calls else text)


@pytest.fixture
def calling(monkeypatch):
    """A policy whose completions end at a 3 or a 7, and call a tool where they have a 7."""
    return policy_that_calls(monkeypatch, by_sevens)


def policy_that_calls(monkeypatch, calls):
    """A policy with TEMPLATE whose turns end at a 3, too, and whose calls are what `calls` finds in them."""
    monkeypatch.setattr(ToolForm, "calls", calls)
    tokenizer = tokenizer_with(TEMPLATE)
    policy = make_policy(tokenizer=tokenizer)
    policy.eos_token_ids = [*policy.eos_token_ids, tokenizer.convert_tokens_to_ids("3")]
    return policy


def make_sampler(policy, **settings) -> Sampler:
    settings = {"max_completion_length": LENGTH, "stop_strings": ["7"], "temperature": 1.2, **settings}
    sampler = sampler_of(policy, GRPOConfig(use_cpu=True, bf16=False, **settings), Toolbox([add], None))
    sampler.engine_refusal = None
    return sampler


def prompts_of(policy, *texts: str) -> list[Prompt]:
    chats = [[{"role": "user", "content": text}] for text in texts]
    tokenizer = policy.tokenizer
    shown = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in shown]
    return [Prompt(chat, one, {}) for chat, one in zip(chats, ids, strict=True)]


def sampled(policy, sampler, *args, seed=10, **kwargs) -> list[Completion]:
    torch.manual_seed(seed)
    return sampler.complete(prompts_of(policy, "1+1=", "what is 5*5?"), 6, *args, **kwargs).completions


def test_a_completion_goes_on_after_the_results(calling):
    """Ids are what was sampled and what the template puts between, and nothing is tokenized twice."""
    sampler = make_sampler(calling)
    completions = sampled(calling, sampler)
    turns = [one.conversation.messages for one in completions]
    assert any(len(messages) >= 5 for messages in turns) and any(len(messages) == 1 for messages in turns)
    for one in completions:
        talk = one.conversation
        text, at = calling.tokenizer.decode(one.ids).replace("<|pad|>", ""), 0
        assert len(one.ids) == len(talk.sampled) == len(one.logprobs) == len(one.proposal_logprobs) <= LENGTH
        calls = [call for message in talk.messages for call in message.get("tool_calls", [])]
        results = [message for message in talk.messages if message["role"] == "tool"]
        for message in talk.messages:
            at = text.index(message["content"], at)
            assert message["role"] in ("assistant", "tool")
        assert [message["content"] for message in results] == [
            str(call["function"]["arguments"]["b"] + 1) for call in calls[: len(results)]
        ]
        assert talk.num_calls == len(calls) and talk.num_failures == 0
        assert one.sampled_ids == [token for token, drawn in zip(one.ids, talk.sampled.tolist(), strict=True) if drawn]
        assert (one.logprobs[~talk.sampled] == 0).all() and (one.logprobs[talk.sampled] < 0).all()
        assert bool(talk.sampled[-1]) and bool(talk.sampled[0])
        assert one.num_sampled == int(talk.sampled.sum())
        if one.finish != "length":
            assert calling.tokenizer.decode(one.ids[-1:]) in ("3", "<|end|>")
        elif len(one.ids) < LENGTH:  # a result that had no room
            assert "tool_calls" in talk.messages[-1]


def test_log_probabilities_are_those_of_a_training_forward(calling):
    sampler = make_sampler(calling)
    completions, prompts = sampled(calling, sampler), prompts_of(calling, "1+1=", "what is 5*5?")
    batches = pack(
        [prompt.ids for prompt in prompts], [one.ids for one in completions], token_budget=10_000,
        pad_token_id=calling.pad_token_id, device=calling.device, num_generations=6,
    )  # fmt: skip
    known = torch.cat([one.logprobs for one in completions])
    counted = torch.cat([one.conversation.sampled for one in completions])
    for batch in batches:
        batch = batch.only(counted[batch.token_index])
        with torch.no_grad():
            computed = calling.logprobs(batch, 1.2)
        assert (computed - known[batch.token_index]).abs().max() < 1e-5


def test_a_share_is_what_it_is_among_all(calling):
    sampler = make_sampler(calling)
    whole, shares = sampled(calling, sampler), []
    for share in (range(0, 1), range(1, 2)):
        shares += sampled(calling, sampler, share)
    assert [one.ids for one in whole] == [one.ids for one in shares]
    assert sampled(calling, sampler, range(2, 2)) == []
    assert [one.ids for one in whole] != [one.ids for one in sampled(calling, sampler, seed=1)]
    seeds = [sampled(calling, sampler, seeds=[5, 6], seed=seed) for seed in (0, 1)]
    assert [one.ids for one in seeds[0]] == [one.ids for one in seeds[1]]
    alone = sampler.complete(prompts_of(calling, "what is 5*5?"), 6, seeds=[6]).completions
    assert [one.ids for one in alone] == [one.ids for one in seeds[0][6:]]


def test_little_memory_and_generate_keep_the_limits(calling):
    """Room for one completion at a time; and a model that the engine does not know."""
    prompts = prompts_of(calling, "what is 5*5?")
    budget = LENGTH + len(prompts[0].ids)
    sampler, costs = make_sampler(calling, rollout_token_budget=budget), []
    run = sample.engine.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample.engine, "run", lambda request, shape: costs.append(shape.cost()) or run(request, shape))
        torch.manual_seed(0)
        little = sampler.complete(prompts, 24).completions
    torch.manual_seed(0)
    assert [one.ids for one in little] == [one.ids for one in make_sampler(calling).complete(prompts, 24).completions]
    assert costs == [costs[0]] and costs[0] <= budget
    by_generate = make_sampler(calling)
    by_generate.engine_refusal = "it is said so"
    torch.manual_seed(1)
    completions = by_generate.complete(prompts_of(calling, "what is 5*5?"), 8).completions
    assert any(one.conversation.num_calls for one in completions)
    assert all(len(one.ids) <= LENGTH and one.logprobs is None for one in completions)


def test_a_result_that_cannot_fit_is_not_tokenized(calling, monkeypatch):
    sampler = make_sampler(calling)
    monkeypatch.setattr(Toolbox, "__call__", lambda self, calls, _: [Result("x" * 20_000_000, False)] * len(calls))
    started = time.process_time()
    completions = sampled(calling, sampler)
    assert time.process_time() - started < 5
    cut = [one for one in completions if one.conversation.num_calls]
    assert cut and all(one.finish == "length" and one.conversation.num_calls == 1 for one in cut)


def test_a_row_goes_on_by_its_own_settings_of_the_template(calling):
    calling.tokenizer.chat_template = TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|>{{ mood }}{% endif")
    prompts = prompts_of(calling, *["what is 5*5?"] * 2)
    prompts[1] = replace(prompts[1], columns={"chat_template_kwargs": '{"mood": "<think>"}'})
    torch.manual_seed(0)
    completions = make_sampler(calling).complete(prompts, 6).completions
    for place, one in enumerate(completions):
        after = [message["content"][:7] for message in one.conversation.messages[1:] if message["role"] == "assistant"]
        assert all((words == "<think>") == (place >= 6) for words in after)
    assert any(one.conversation.num_calls for one in completions[6:])


@pytest.mark.parametrize("most", [0, 1, 2])
def test_calls_are_answered_as_often_as_configured(calling, most):
    completions = sampled(calling, make_sampler(calling, max_tool_calling_iterations=most))
    turns = [sum(message["role"] == "assistant" for message in one.conversation.messages) for one in completions]
    assert max(turns) == most + 1
    assert most > 1 or any("tool_calls" in one.conversation.messages[-1] for one in completions)
    assert any(one.conversation.num_calls for one in completions) == (most > 0), "those that were answered"


def test_greedy_completions_take_no_random_number(calling):
    sampler, state = make_sampler(calling), torch.get_rng_state()
    prompts = prompts_of(calling, *(f"{number}+1=" for number in range(8)))
    completions = sampler.complete_greedily(prompts).completions
    assert torch.equal(state, torch.get_rng_state())
    assert all(one.conversation is not None for one in completions)
    assert any(one.conversation.num_calls for one in completions)
    assert [one.ids for one in completions] == [one.ids for one in sampler.complete_greedily(prompts).completions]


# --- learning ------------------------------------------------------------------------------------------------------


def rollout_of(policy, completions, prompts, advantages) -> Rollout:
    known = torch.cat([one.logprobs for one in completions])
    bare = Rollout.bare([prompt.ids for prompt in prompts], [one.ids for one in completions], advantages)
    counted = torch.cat([one.conversation.sampled for one in completions])
    return replace(bare, completions=completions, sampling_logprobs=known, proposal_logprobs=known, sampled=counted)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_the_loss_is_of_sampled_tokens_alone(calling, loss_type):
    """The gradient is that of the formula, written out over the tokens that the policy drew."""
    config = GRPOConfig(
        use_cpu=True, bf16=False, temperature=1.2, loss_type=loss_type, max_completion_length=LENGTH,
        importance_sampling_correction=False,
        **({"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}),
    )  # fmt: skip
    prompts, completions = prompts_of(calling, "1+1=", "what is 5*5?"), sampled(calling, make_sampler(calling))
    advantages = torch.linspace(-1, 1.3, len(completions))
    rollout = rollout_of(calling, completions, prompts, advantages)
    meter = TokenMeter(rollout, calling.device)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, computed = backward(calling, rollout, meter, Coefficients(0.0, 0.0), scaler, config, 150)
    found = torch.cat([p.grad.flatten() for p in calling.parameters_of(calling.adapter).values()])
    assert (computed[~rollout.sampled] == 0).all()
    assert torch.equal(meter.seen, rollout.sampled)
    assert meter.metrics()["frac_tokens_skipped"] == 0

    total, place = torch.zeros(()), 0
    lengths = [one.num_sampled for one in completions]
    for b, one in enumerate(completions):
        ids = torch.tensor([rollout.prompt_of(b).ids + one.ids])
        logits = calling.model(input_ids=ids).logits[0, -len(one.ids) - 1 : -1] / 1.2
        own = logits.log_softmax(-1).gather(1, ids[0, -len(one.ids) :, None])[:, 0][one.conversation.sampled]
        weight = {
            "dapo": 1 / sum(lengths), "grpo": 1 / lengths[b] / len(lengths), "dr_grpo": 1 / LENGTH / len(lengths),
            "luspo": 1 / len(lengths),
        }[loss_type]  # fmt: skip
        ratios = (
            (own - own.detach()).mean().exp().expand(len(own)) if loss_type == "luspo" else (own - own.detach()).exp()
        )
        total = total - (weight * advantages[b] * ratios).sum()
        place += len(one.ids)
    calling.model.zero_grad()
    total.backward()
    truth = torch.cat([p.grad.flatten() for p in calling.parameters_of(calling.adapter).values()])
    assert abs(loss.item() - total.item()) < 1e-5
    assert (found - truth).abs().max() < 1e-5 * truth.abs().max() + 1e-7


def test_passes_compute_sampled_tokens_alone(calling):
    prompts, completions = prompts_of(calling, "1+1=", "what is 5*5?"), sampled(calling, make_sampler(calling))
    rollout = rollout_of(calling, completions, prompts, torch.ones(len(completions)))
    config = GRPOConfig(use_cpu=True, bf16=False, temperature=1.2)
    with torch.no_grad():
        computed = logprobs_of(calling, rollout, config, TokenBudget(500))
    assert (computed - rollout.sampling_logprobs).abs().max() < 1e-5
    parts = rollout.mini_batches(2)
    assert [part.num_counted_tokens for part in parts] == [
        sum(one.num_sampled for one in half) for half in (completions[:6], completions[6:])
    ]
    assert torch.equal(torch.cat([part.counted for part in parts]), rollout.counted)


def test_advantages_by_token_pass_over_results():
    """A critic's advantages are those of the sampled tokens side by side."""
    draw = torch.Generator().manual_seed(0)
    kept = [torch.tensor([1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 1, 1]).bool(), torch.ones(3).bool()]
    completions = [
        Completion([5] * len(mask), None, None, "eos", Conversation([], mask, 0, 0)) for mask in kept
    ]  # fmt: skip
    sampled_mask, rewards = torch.cat(kept), torch.tensor([[1.0], [0.0], [0.5]])
    bare = Rollout.bare([[1], [2], [3]], [one.ids for one in completions], torch.zeros(3))
    values = torch.randn(12, generator=draw) * sampled_mask
    rollout = replace(bare, completions=completions, sampled=sampled_mask, values=values, rewards=rewards)
    config = GRPOConfig(adv_estimator="gae", gamma=0.9, lam=0.8, whiten_advantages=False, num_generations=1)
    found = with_gae(rollout, 0.0, config)
    offsets = torch.tensor([0, 3, 6, 9])
    advantages, returns = gae(
        token_rewards(rewards[:, 0], offsets, None), values[sampled_mask], offsets, gamma=0.9, lam=0.8
    )
    assert torch.allclose(found.token_advantages[sampled_mask], advantages)
    assert torch.allclose(found.returns[sampled_mask], returns)
    assert (found.token_advantages[~sampled_mask] == 0).all() and (found.returns[~sampled_mask] == 0).all()


# --- runs ----------------------------------------------------------------------------------------------------------


def last_reward(completions, **kwargs) -> list[float]:
    return [float(sum(map(ord, completion[-1]["content"])) % 5) for completion in completions]


def none_reward(completions, **kwargs) -> list[None]:
    return [None] * len(completions)


def run(folder, tools=add, rows=None, rewards=None, **changes):
    settings = {
        "max_steps": 2, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": LENGTH,
        "max_prompt_length": None, "learning_rate": 1e-3, "gradient_checkpointing": False, "temperature": 1.5,
        "lr_scheduler_type": "constant", "stop_strings": ["7"], "use_cpu": True, "bf16": False, "output_dir": str(folder), **changes,
    }  # fmt: skip
    rewards = rewards or last_reward
    rows = rows or [{"prompt": [{"role": "user", "content": f"{n}+1="}]} for n in range(20)]
    config = GRPOConfig(**settings)
    return train(
        str(DEMO_MODEL), rewards, rows, None, config, tokenizer=tokenizer_with(TEMPLATE), tools=tools
    )  # fmt: skip


@pytest.mark.usefixtures("known_trials")
def test_calls_are_in_a_runs_line_and_on_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ToolForm, "calls", by_sevens)
    run(tmp_path)
    assert re.search(r"step 2/2  reward .*  calls \d\.\d\d  ", capsys.readouterr().err)
    assert "Calls of tools" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("known_trials")
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"beta": 0.1, "kl_in_reward": True, "steps_per_generation": 2, "top_entropy_quantile": 0.5},
        {"adv_estimator": "gae", "num_generations": 1, "kl_in_reward": True, "beta": 0.1},
        {"dynamic_sampling_rounds": 1, "num_iterations": 2, "beta": 0.1, "loss_type": "grpo"},
        {"teacher": "base", "teacher_system_prompt": "Add.", "entropy_coef": 0.01},
    ],
    ids=["as_it_is", "kl_in_reward", "critic", "dynamic", "teacher"],
)  # fmt: skip
def test_a_run_with_tools_learns_and_logs(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(ToolForm, "calls", by_sevens)
    history = run(tmp_path, **changes).history
    assert any(line["tools/call_frequency"] > 0 for line in history)
    for line in history:
        assert line["tools/failure_frequency"] == 0 and line["time/tools_s"] >= 0
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert 0 < line["completions/max_length"] <= LENGTH
        assert line["grad_norm"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_a_run_with_tools_samples_as_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(ToolForm, "calls", by_sevens)
    history = run(tmp_path, use_cpu=False, bf16=True, max_steps=4, prompts_per_step=8).history
    assert all(line["tools/call_frequency"] > 0 for line in history)
    assert max(line["sampling/sampling_logp_difference/mean"] for line in history) < 0.05
    assert all(line["grad_norm"] > 0 for line in history)


@pytest.mark.usefixtures("known_trials")
def test_a_resumed_run_with_tools_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(ToolForm, "calls", by_sevens)
    whole = run(tmp_path / "whole", max_steps=2)
    run(tmp_path / "part", max_steps=1)
    again = run(tmp_path / "part", max_steps=2, resume_from_checkpoint=True)
    assert again.history[-1]["loss"] == whole.history[-1]["loss"] != 0
    assert again.history[-1]["tools/call_frequency"] > 0

    def add(a: int, b: int, c: int = 0) -> int:
        """Add numbers.

        Args:
            a: one
            b: another
            c: a third
        """
        return a + b + c

    with pytest.raises(InputError, match="of a run with other tools: add is not in both, or is described otherwise"):
        run(tmp_path / "part", tools=add, max_steps=4, resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": None, "tool_timeout": 5.0}, "^tool_timeout is about tools, and there are none; give some, or"),
        ({"tools": None, "max_tool_calling_iterations": 2}, "^max_tool_calling_iterations is about tools"),
        ({"replay_buffer_size": 4}, "^replay_buffer_size keeps what was sampled, but no conversation with tools"),
        ({"rows": [{"prompt": "1+1="}], "rewards": none_reward}, "^row 0 of train_dataset is a text, and tools are shown by a chat"),
        (
            {"rows": [{"prompt": [{"role": "user", "content": "1"}], "tools": SCHEMAS}]},
            "^row 0 of train_dataset has tools of its own, which nothing calls beside the run's; remove the column",
        ),
        ({"tools": "nowhere.function"}, "^tool 'nowhere.function' cannot be imported"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_tools_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, **changes)


@pytest.mark.usefixtures("known_trials")
def test_a_pipeline_takes_tools_for_its_phases_and_its_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ToolForm, "calls", by_sevens)
    shutil.copytree(DEMO_MODEL, "model")
    Path("model/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1="}]} for n in range(4)]
    common = {"use_cpu": True, "bf16": False, "max_prompt_length": None, "max_completion_length": LENGTH}
    phase = Phase(
        "rl", "grpo", dataset=rows, reward_funcs=last_reward, tools=[add], max_steps=1, prompts_per_step=2,
        num_generations=4, temperature=1.5, stop_strings=["7"],
    )  # fmt: skip
    evaluation = {"dataset": rows, "reward_funcs": last_reward, "tools": [add], "stop_strings": ["7"]}
    result = run_pipeline("model", [phase], "out", common=common, evaluation=evaluation)
    assert result.metrics["rl"]["tools/call_frequency"] > 0
    assert all("eval_tools/call_frequency" in row for row in result.evaluations)
    with pytest.raises(InputError, match="tools is the phase rl, which makes .*; name one that makes tools"):
        resolve("model", [phase, Phase("more", "grpo", dataset=rows, tools="rl")], "out", common)


def test_the_command_line_names_tools(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO_MODEL, "model")
    Path("model/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    Path("my_tools_of_a_test.py").write_text(inspect.getsource(add), encoding="utf-8")
    rows = [{"prompt": [{"role": "user", "content": "1+1="}], "solution": "2"}]
    Path("rows.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    given = ["--model", "model", "--dataset", "rows.jsonl", "--reward_funcs", "accuracy_reward", "--use_cpu", "true"]
    given += ["--tools", "python", "my_tools_of_a_test.add", "--max_prompt_length", "none"]
    assert cli.main(["data", *given]) == 0
    shown = capsys.readouterr().out
    assert '"name": "python"' in shown and '"name": "add"' in shown
    assert cli.main(["eval", *given, "--max_completion_length", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["eval_tools/call_frequency"] == 0
    Path("tools.yaml").write_text("tools: python\n", encoding="utf-8")
    for command, message in (
        ("sample", "tools is for `lowmem-grpo train`"),
        ("sft", "tools is for `lowmem-grpo train`"),
    ):
        assert cli.main([command, "--model", "model", "--dataset", "rows.jsonl", "--config", "tools.yaml"]) == 2
        assert message in capsys.readouterr().err
    for command, message in (("sft", "--tools is for `lowmem-grpo train`"), ("pipeline", "--tools is no flag of a")):
        assert cli.main([command, "--config", "tools.yaml", "--tools", "python"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["eval", *given, "--tools", "pythn"]) == 2


def test_without_tools_a_sampler_is_as_ever(calling):
    assert type(sampler_of(calling, GRPOConfig(use_cpu=True), None)) is Sampler


def test_a_conversation_is_read_whole(tmp_path):
    talk = [
        {"role": "assistant", "content": "So.", "tool_calls": [ADD.as_message(), SAY.as_message()]},
        {"role": "tool", "name": "add", "content": "13"},
        {"role": "tool", "name": "later", "content": [(1, 2)]},
        {"role": "assistant", "content": "13."},
    ]
    told = "So.\n[add(a=17, b=-4)]\n[later(word='it\\'s \"so\" {x}\\n  <b>', seconds=0.5)]\n[add: 13]\n[later: [[1, 2]]]\n13."
    assert as_read(talk) == told
    assert as_read("x") == "x" and as_read(talk[-1:]) == "13."
    odd = [{**talk[0], "tool_calls": [Call("x", given).as_message()]} for given in ({}, {"a": "z"}, {"a": [1, None]})]
    write_completions(tmp_path, 1, {"completion": [talk, talk[-1:], *([one] for one in odd)]})  # of one type
    (path,) = tmp_path.rglob("*.parquet")
    written = [row["completion"] for row in pq.read_table(path).to_pylist()]
    assert [as_text(one) for one in written[:2]] == [told, "13."]
    assert as_text([*written[4], *talk[1:2]]) == "So.\n[x(a=[1, None])]\n[add: 13]"
