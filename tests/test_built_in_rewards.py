import math
import pickle
import random

import pytest

from lowmem_grpo.rewards import (
    BUILT_IN,
    BUILT_IN_FACTORIES,
    RewardRunner,
    answer_format_reward,
    exact_match_reward,
    get_cosine_scaled_reward,
    get_language_consistency_reward,
    get_regex_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    language_consistency_reward,
    reasoning_accuracy_reward,
    resolve_reward_funcs,
    solution_format_reward,
    tag_count_reward,
    think_format_reward,
)

# The name that a fresh RewardRunner, and so a metric, gives what each factory makes.
MADE = {
    "get_cosine_scaled_reward(max_len=10)": "cosine_scaled_reward",
    "get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)": "soft_overlong_punishment_reward",
    "get_repetition_penalty_reward()": "repetition_penalty_reward",
    "get_regex_reward(pattern='a.b', full=True)": "regex_reward",
    "get_regex_reward(pattern='(a)', name='has_a')": "has_a",
    "get_language_consistency_reward(scripts=['CJK'])": "script_reward",
    "in_processes(function='lowmem_grpo.rewards.accuracy.accuracy_reward', workers=1, timeout=2.5)": "accuracy_reward",
}


def chats(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


THINKING = [
    r"<think>so \boxed{3}</think> \boxed{4}", r"<think>so</think> \boxed{3}", r"<think>so \boxed{3}", r"\boxed{3}",
    r"<think>a</think> \boxed{4} </think> \boxed{3}", r"<think></think> \boxed{3.0}", "</think>", "",
    "<think>\na\n</think>\nb", "x<think>a</think>", "<think>a</think><think>b</think>", "<think>a</think>b</think>",
]  # fmt: skip


def test_reasoning_accuracy_is_trls():
    theirs = pytest.importorskip("trl.rewards").reasoning_accuracy_reward
    completions, gold = chats(THINKING), ["$3$"] * len(THINKING)
    assert reasoning_accuracy_reward(completions, gold) == theirs(completions, gold)
    ends = ["</reason>", "</think>"]
    completions = chats([r"a</reason> \boxed{3} </think> \boxed{4}", r"a</think>\boxed{3}", r"\boxed{3}"])
    ours = reasoning_accuracy_reward(completions, gold[:3], reasoning_delimiters=ends)
    assert ours == theirs(completions, gold[:3], reasoning_delimiters=ends) == [0.0, 1.0, 0.0]


def test_think_format_is_trls():
    theirs = pytest.importorskip("trl.rewards").think_format_reward
    assert think_format_reward(chats(THINKING)) == theirs(chats(THINKING))


@pytest.mark.parametrize(("longest", "cache"), [(100, 20), (100, 0), (100, 100), (7, 3)])
def test_soft_overlong_punishment_is_trls(longest, cache):
    theirs = pytest.importorskip("trl.rewards").get_soft_overlong_punishment(longest, cache)
    ids = [[1] * length for length in range(120)]
    assert get_soft_overlong_punishment(longest, cache)(completion_ids=ids) == pytest.approx(theirs(ids), abs=1e-12)


@pytest.mark.parametrize("values", [{}, {"min_value_wrong": -2.0, "max_value_wrong": 0.5, "max_value_correct": 3.0}])
def test_cosine_scaled_reward_is_trls(values):
    theirs = pytest.importorskip("trl.rewards").get_cosine_scaled_reward(max_len=10, **values)
    ours = get_cosine_scaled_reward(max_len=10, **values)
    completions = chats([r"\boxed{3}", r"\boxed{4}"] * 14)
    ids = [[1] * length for length in range(14) for _ in range(2)]
    given = {"completions": completions, "completion_ids": ids, "solution": ["$3$"] * 28}
    assert ours(**given) == pytest.approx(theirs(**given), abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_repetition_penalty_is_trls(size):
    theirs = pytest.importorskip("trl.rewards").get_repetition_penalty_reward(size, -0.5)
    numbers = random.Random(0)
    ids = [[numbers.randrange(4) for _ in range(length)] for length in range(30)]
    assert get_repetition_penalty_reward(size, -0.5)(completion_ids=ids) == theirs(ids)


def test_lengths_by_hand():
    ids = [[1] * n for n in (80, 90, 100, 101)]
    assert get_soft_overlong_punishment(100, 20)(completion_ids=ids) == [0.0, -0.5, -1.0, -1.0]
    cosine = get_cosine_scaled_reward(max_len=100)
    given = {"completions": ["3", "4", "3", "4"], "completion_ids": [[1] * 50, [1] * 50, [1] * 200, []]}
    assert cosine(**given, answer=["3"] * 4) == pytest.approx([0.75, -0.75, 0.5, -1.0])
    assert cosine(**given, answer=[None] * 4) == [None] * 4
    assert get_repetition_penalty_reward(2)(completion_ids=[[1, 2, 3, 4], [5] * 5, [], [1]]) == [0.0, -0.75, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "answer", "tags"),
    [
        ("<think>a</think><answer>b</answer>", 1.0, 1.0),
        ("\n<think>a\nb</think>\n<answer>\n4</answer>\n", 1.0, 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0, 1.0),
        ("<answer>b</answer><think>a</think>", 0.0, 1.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0, 0.5),
        ("<think>a<think></think><answer>b</answer>", 0.0, 0.75),
        ("<think>a</think><answer>b", 0.0, 0.75),
        ("", 0.0, 0.0),
    ],
)
def test_answer_format_and_tag_count(text, answer, tags):
    assert answer_format_reward([text]) == answer_format_reward(chats([text])) == [answer]
    assert tag_count_reward([text]) == [tags]


def test_solution_format_wants_one_final_mark():
    texts = [r"so \boxed{3}", "a\n#### 3", r"\boxed{3} or \boxed{4}", "a\n#### 3\n#### 4", "3", "#### 3 \\boxed{3}"]
    assert solution_format_reward(texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_exact_match():
    completions = ["Paris", r"\boxed{Paris}", "<answer> New  York </answer>", "It is Paris", "Rome"]
    gold = [" Paris", "#### Paris", "New York", "Paris", None]
    assert exact_match_reward(completions, solution=gold) == [1.0, 1.0, 1.0, 0.0, None]
    with pytest.raises(ValueError, match="column named solution or answer"):
        exact_match_reward(["x"])


def test_regex():
    assert get_regex_reward(r"a.b")(completions=["xa\nbx", "ab"]) == [1.0, 0.0]
    assert get_regex_reward(r"a.b", full=True)(completions=["xa\nbx", "a-b"]) == [0.0, 1.0]
    with pytest.raises(ValueError, match="no regular expression: missing"):
        get_regex_reward("(")


@pytest.mark.parametrize(
    ("prompt", "completion", "reward"),
    [
        ("How many?", "Four, of course", 1.0),
        ("How many?", "да да", 0.0),
        ("How many?", "ab да", 0.5),
        ("Сколько будет 2+2?", "Четыре", 1.0),
        ("日本語のテスト", "漢字とひらがなとカタカナー", 1.0),
        ("多少?", "four", 0.0),
        ("How many?", "4 + 4 = 8", 1.0),
        ("How many?", "Ｆｏｕｒ 𝑥", 1.0),
        ("多少?", "<think>是四</think><answer>四</answer>", 1.0),
        ("Сколько?", "<think>так so</think>", 0.6),
        ("A long question in English about the word нет", "нет", 0.0),
        ("2 + 2 =", "four", None),
    ],
)
def test_language_consistency(prompt, completion, reward):
    chat = [{"role": "system", "content": "Отвечай"}, {"role": "user", "content": prompt}]
    assert language_consistency_reward(prompts=[prompt], completions=[completion]) == [reward]
    assert language_consistency_reward(prompts=[chat], completions=chats([completion])) == [reward]


def test_a_language_may_be_given():
    assert get_language_consistency_reward(["cyrillic"])(completions=["да", "yes"]) == [1.0, 0.0]


def test_factories_are_called_by_name():
    functions = resolve_reward_funcs(list(MADE))
    assert RewardRunner(functions).names == list(MADE.values())
    assert {call.split("(")[0] for call in MADE} <= set(BUILT_IN_FACTORIES)
    cosine = resolve_reward_funcs("get_cosine_scaled_reward(max_len=4)")[0]
    value = cosine(completions=["3"], completion_ids=[[1]], answer=["3"])[0]
    assert value == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("call", [*MADE, "get_code_reward()"])
def test_what_a_factory_makes_can_be_pickled(call):
    made = resolve_reward_funcs(call)[0]
    assert pickle.loads(pickle.dumps(made)).__name__ == made.__name__


def test_a_pickled_cosine_reward_takes_trls_order_of_arguments_and_no_column_for_a_setting():
    cosine = pickle.loads(pickle.dumps(get_cosine_scaled_reward(max_len=100)))
    assert cosine([r"\boxed{3}", r"\boxed{4}"], ["3", "3"], [[1] * 50] * 2) == pytest.approx([0.75, -0.75])
    assert cosine(completions=["3"], completion_ids=[[1] * 50], answer=["3"], max_len=[1]) == pytest.approx([0.75])
    with pytest.raises(ValueError, match="needs completion_ids"):
        cosine(["3"], ["3"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("get_cosine_scaled_reward", r"makes a reward function; call it: get_cosine_scaled_reward\(max_len"),
        ("get_cosine_scaled_reward()", "missing a required argument: 'max_len'; its arguments are"),
        ("get_cosine_scaled_reward(10)", "write it as name.argument=value"),
        ("get_cosine_scaled_reward(max_len=len('abc'))", "write it as name.argument=value"),
        ("get_cosine_scaled_reward(max_len=1", "no reward function is named|cannot be imported"),
        ("get_cosine_scaled_reward(**{'max_len': 1})", "write it as name.argument=value"),
        ("get_cosine_scaled_reward(max_len=1, longest=1)", "got an unexpected keyword argument 'longest'"),
        ("get_cosine_scaled_reward(max_len='a')", "not supported between"),
        ("get_cosine_scaled_reward(max_len=0)", "must be at least 1"),
        ("get_language_consistency_reward(scripts=[5])", "'int' object has no attribute 'upper'; its arguments are"),
        ("get_code_reward(timeout=float('inf'))", "write it as name.argument=value"),
        ("get_code_reward(timeout=1e999)", "timeout=inf above 0 and at most 3600 s"),
        ("get_code_reward(memory_mb=100.5)", "memory_mb=100.5 a whole number"),
        ("in_processes(function='a.b', timeout=1e999)", "timeout=inf above 0 and at most 86400 s"),
        ("in_processes(function='a.b', workers=10000)", "workers=10000 from 1 to 1024"),
        (f"get_regex_reward(pattern={'-' * 50_000}1)", "write it as name.argument=value"),
        ("get_cosin_scaled_reward(max_len=1)", "did you mean get_cosine_scaled_reward"),
        ("get_repetition_penalty_reward(max_penalty=1)", "at most 0"),
        ("get_soft_overlong_punishment(max_completion_len=5, soft_punish_cache=6)", "must be from 0 to"),
    ],
)
def test_a_call_that_cannot_be_made_is_explained(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolve_reward_funcs(name)
    assert "\n" not in str(caught.value)


def test_no_completion_however_malformed_makes_a_built_in_fail():
    numbers = random.Random(0)
    pieces = [
        *"ab1 .,$%-\n{}\\<>/#é漢\ud800\x00",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        r"\boxed{",
        "####",
        "```python\n",
        "```",
    ]
    completions = ["".join(numbers.choices(pieces, k=numbers.randrange(40))) for _ in range(500)]
    functions = [f for name, f in BUILT_IN.items() if "accuracy" not in name and name != "code_reward"]
    functions += resolve_reward_funcs([call for call in MADE if "processes" not in call and "cosine" not in call])
    ids = [list(map(ord, completion)) for completion in completions]
    scores = RewardRunner(functions, 60)(completions, completions, ids, {"solution": ["3"] * 500}, 1)
    assert not any(value for name, value in scores.metrics.items() if name.endswith("/failures"))
