"""math_equal(): tells whether answers are equal, by math-verify in worker processes, which can be ended.

math-verify's own limit is a signal, which works only in a main thread; a worker's only thread is one.
"""

from pathlib import Path

from lowmem_grpo.rewards.compare import compare
from lowmem_grpo.rewards.isolation.workers import WorkerPool

POOL = WorkerPool(Path(__file__).with_name("math_worker.py"))
TIME_LIMIT_S = 10.0  # for one comparison, of CPU time
START_LIMIT_S = 120.0  # for the first one, since a worker imports sympy before it


def math_equal(pairs: list[tuple[str, str]]) -> list[bool | EOFError]:
    """A truth value for each (gold, answer): plain numbers and words at once, formulas by math-verify.

    A comparison without end is False. It is an EOFError where two workers in a row died of it, or were stopped.
    """
    verdicts = [compare(gold, answer) for gold, answer in pairs]
    verified = _verified(list(dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, tuple))))
    verified |= _verified([pair for pair, verdict in verified.items() if isinstance(verdict, EOFError)])
    return [verified[verdict] if isinstance(verdict, tuple) else verdict is True for verdict in verdicts]


def _verified(pairs: list[tuple[str, str]]) -> dict[tuple[str, str], bool | EOFError]:
    replies = POOL.ask_all(pairs, TIME_LIMIT_S, START_LIMIT_S, by_cpu_time=True) if pairs else []
    verdicts = [reply if isinstance(reply, EOFError) else reply is True for reply in replies]
    return dict(zip(pairs, verdicts, strict=True))
