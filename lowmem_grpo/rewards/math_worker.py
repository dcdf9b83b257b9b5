"""The program of a math-verify worker: reads [gold, answer] as JSON lines, writes true or false for each."""

import json
import logging
import sys

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
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            verdict = is_equal(gold, answer)
        except Exception:  # whatever sympy makes of a model's output, it is not the gold answer
            verdict = False
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
