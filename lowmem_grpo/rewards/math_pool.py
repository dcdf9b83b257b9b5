"""math_equal(): tells whether answers are equal, by math-verify in worker processes, which can be ended.

math-verify's own limit is an alarm signal, which works only in a main thread; a worker's only thread is one.
"""

from pathlib import Path

from lowmem_grpo.rewards.compare import compare
from lowmem_grpo.rewards.isolation.workers import WorkerPool

POOL = WorkerPool(Path(__file__).with_name("math_worker.py"))
TIME_LIMIT_S = 10.0  # for one comparison
START_LIMIT_S = 120.0  # for the first one, since a worker imports sympy before it


def math_equal(pairs: list[tuple[str, str]]) -> list[bool]:
    """A truth value for each (gold, answer): plain numbers and words at once, formulas by math-verify."""
    verdicts = [compare(gold, answer) for gold, answer in pairs]
    open_pairs = list(dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, tuple)))
    if not open_pairs:
        return [verdict is True for verdict in verdicts]
    verified = dict(zip(open_pairs, POOL.ask_all(open_pairs, TIME_LIMIT_S, START_LIMIT_S), strict=True))
    return [(verified[verdict] if isinstance(verdict, tuple) else verdict) is True for verdict in verdicts]
