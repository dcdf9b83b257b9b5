"""The program of a math-verify worker: gets (gold, answer), and answers true or false."""

import logging
import sys
from multiprocessing.connection import Connection

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

PARSING_LIMIT_S, VERIFYING_LIMIT_S = 3, 3
EXTRACTION = [LatexExtractionConfig(), ExprExtractionConfig()]


def is_equal(gold: str, answer: str) -> bool:
    r"""math-verify's verdict on two answers, each read as what stands in a `\boxed{}`."""
    gold_parsed, answer_parsed = (
        parse(rf"\boxed{{{text}}}", EXTRACTION, parsing_timeout=PARSING_LIMIT_S) for text in (gold, answer)
    )
    return bool(verify(gold_parsed, answer_parsed, timeout_seconds=VERIFYING_LIMIT_S))


def main() -> None:
    logging.disable(logging.CRITICAL)
    trainer = Connection(int(sys.argv[1]))
    while True:
        try:
            gold, answer = trainer.recv()
        except EOFError:  # the trainer is gone
            return
        try:
            verdict = is_equal(gold, answer)
        except Exception:  # whatever sympy makes of a model's output, it is not the gold answer
            verdict = False
        trainer.send(verdict)


if __name__ == "__main__":
    main()
