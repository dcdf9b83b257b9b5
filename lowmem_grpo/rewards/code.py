"""code_reward: does the code in a completion pass its tests? It is run in a sandbox."""

import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lowmem_grpo.data.text import completion_text
from lowmem_grpo.errors import InputError, in_a_line, shown
from lowmem_grpo.rewards.isolation.sandbox import Limits, SandboxError, cannot_isolate, run_program, run_tests
from lowmem_grpo.rewards.isolation.workers import WORKERS
from lowmem_grpo.rewards.made import made
from lowmem_grpo.rewards.rows import of_each

FENCE = re.compile(r"([ \t]*)```+([^`]*)")
SURROGATE = re.compile("[\ud800-\udfff]")
PYTHON = {"python", "python3", "py"}


def get_code_reward(
    timeout: float = 5.0, memory_mb: int = 1024, fraction: bool = False, allow_unsafe: bool = False
) -> Callable:
    """1.0 where the last ```python block of a completion passes all its tests, else 0.0; with `fraction`, their share.

    A block without a language is taken where it is the completion's only one.

    The dataset's column `tests` has for each row a list of assert statements, which run after the code, in its names;
    or of {"input": ..., "output": ...}, what a program reads and has to print (white space at the ends of lines aside);
    either may be JSON. None where a row has none. `timeout` is in seconds, for all asserts together or for one input.

    Asserts run in the same process as the code, so code that looks for them there could make them pass; outputs are
    compared outside. Isolation: see jail.py. allow_unsafe runs code without it, with limits alone.

    Raises:
        ValueError (the reward): no column `tests`, tests in another form, or a system that cannot isolate the code.
    """
    if not 0 < timeout <= 3600 or not isinstance(memory_mb, int) or not 64 <= memory_mb <= 1 << 20:
        raise InputError(
            f"get_code_reward needs timeout={timeout} above 0 and at most 3600 s, and memory_mb={memory_mb} a whole "
            "number from 64 to 1048576"
        )
    reward = made(_code_reward, Limits(timeout, memory_mb, isolate=not allow_unsafe), fraction, name="code_reward")
    vars(reward)["check_row"] = check_row
    return reward


def check_row(row: Mapping[str, Any]) -> None:
    """Raise InputError where a row's tests are in no form that code_reward reads."""
    _read_tests(row.get("tests"))


def _code_reward(
    limits: Limits, fraction: bool, /, completions: list, tests: list | None = None, **kwargs
) -> list[float | Exception | None]:
    if tests is None:
        raise InputError("code_reward needs a dataset column named tests: lists of asserts, or of inputs and outputs")
    reason = cannot_isolate() if limits.isolate else None
    if reason:
        raise InputError(
            f"code_reward cannot isolate code here: {reason}; use another machine, or "
            "get_code_reward(allow_unsafe=True) to run it with this process's rights"
        )
    wanted = of_each(_read_tests, tests)
    codes = [last_python_block(completion_text(completion)) for completion in completions]
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="code_reward")
    try:
        return list(pool.map(lambda code, row: _score(code, row, limits, fraction), codes, wanted))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C or the end of the reward's time


code_reward = get_code_reward()


def last_python_block(text: str) -> str | None:
    """The code of the last Python block; else that of a lone block without a language."""
    blocks = _blocks(text)
    python = [code for language, code in blocks if language in PYTHON]
    if python:
        return python[-1]
    return blocks[0][1] if len(blocks) == 1 and not blocks[0][0] else None


def _blocks(text: str) -> list[tuple[str, str]]:
    """Blocks that end, as (language, code): each at the next fence that is indented no further."""
    blocks: list[tuple[str, str]] = []
    language, indent, code = None, "", []
    for line in text.replace("\r\n", "\n").split("\n"):
        fence = FENCE.match(line)
        if fence is None or (language is not None and len(fence[1]) > len(indent)):
            code.append(line.removeprefix(indent))
            continue
        tag = (fence[2].lower().split() or [""])[0]
        if language is not None:
            blocks.append((language, "".join(line + "\n" for line in code)))
        opens = fence.end() == len(line) if language is None else tag in PYTHON
        language, indent, code = (tag, fence[1], []) if opens else (None, "", [])
    return blocks


def _score(code: str | None, tests: list | Exception, limits: Limits, fraction: bool) -> float | Exception | None:
    if isinstance(tests, Exception):
        return tests
    if not tests:
        return None
    if code is None:
        return 0.0
    try:
        if isinstance(tests[0], str):
            passed = run_tests(code, tests, limits)
        else:
            passed = []
            for given, wanted in tests:
                passed.append(_lines(run_program(code, given, limits)) == _lines(wanted))
                if not fraction and not passed[-1]:
                    return 0.0
    except (SandboxError, OSError) as error:  # OSError: no more processes, or no room for the folder
        return error
    return sum(passed) / len(tests) if fraction else float(all(passed))


def _lines(text: str | None) -> list[str] | None:
    return None if text is None else [line.rstrip() for line in text.rstrip().splitlines()]


def _read_tests(given: Any) -> list[str] | list[tuple[str, str]]:
    """Asserts, or (input, output) pairs. Raise InputError for another form."""
    tests: Any = given
    if isinstance(tests, str) and tests.strip()[:1] in ("[", "{"):
        try:
            tests = json.loads(tests)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"a row's tests are no JSON: {in_a_line(error)}") from error
    if isinstance(tests, str):
        tests = [tests] if tests.strip() else []
    if tests is None or (isinstance(tests, (list, tuple, dict)) and not tests):
        return []
    if isinstance(tests, dict) and {"input", "output"} <= set(tests):  # a list of mappings, as datasets may store it
        inputs, outputs = ([side] if isinstance(side, str) else side for side in (tests["input"], tests["output"]))
        if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs):
            tests = [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    read: Any = None
    if isinstance(tests, (list, tuple)):
        if all(isinstance(test, str) for test in tests):
            read = list(tests)
        elif all(isinstance(test, dict) and {"input", "output"} <= set(test) for test in tests):
            pairs: list[Any] = list(tests)
            read = [(str(pair["input"]), str(pair["output"])) for pair in pairs]
    if read is None:
        raise InputError(
            f"a row's tests are {shown(given)}; give a list of assert statements, or of {{'input': ..., 'output': ...}}"
        )
    if any(SURROGATE.search("".join(test)) for test in read):
        raise InputError("a row's tests have a lone surrogate, which no program can read; remove it")
    return read
