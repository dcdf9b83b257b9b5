"""A docstring can be read alone: it begins with a verb or a noun, refers to no other, and comes to the point."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for room in ("lowmem_grpo", "kernels", "benchmarks") for path in (ROOT / room).rglob("*.py"))
MOST_WORDS = 20  # of a first sentence; code in backticks is one word, and what stands in parentheses is none
# A first word after which a reader has to guess what is meant: "Of parameters of so many numbers, on the device".
OPENERS = {
    "of", "to", "so", "that", "those", "these", "such", "it", "its", "with", "without", "but", "for", "from",
    "where", "what", "as", "in", "by", "on", "at", "and", "or", "likewise",
}  # fmt: skip
REFERENCE = re.compile(r"^(The same|Likewise)\b|\b(likewise|as above|see above)\b")


def docstrings(path: Path) -> dict[str, str]:
    """Docstrings by `name:line`, of a module and of every class and function in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    texts = {
        f"{getattr(node, 'name', path.stem)}:{getattr(node, 'lineno', 1)}": ast.get_docstring(node) for node in nodes
    }
    return {name: text for name, text in texts.items() if text}


def faults(docstring: str) -> list[str]:
    """What keeps a docstring from being read alone."""
    paragraph = re.sub(r"https?://\S+", "", " ".join(docstring.split("\n\n")[0].split()))
    paragraph = re.sub(r"\([^()]*\)", "", re.sub(r"`[^`]*`", "code", paragraph))
    sentence = re.split(r"(?<=[.?!])(?=\s|$)", paragraph)[0]
    words = re.findall(r"[A-Za-z][\w'./-]*", sentence)
    found = []
    opener = next(iter(sentence.split()), "").strip(",:")
    if opener.lower() in OPENERS:
        found.append(f"begins with {opener!r}")
    if REFERENCE.search(docstring):
        found.append("refers to another definition")
    if len(words) > MOST_WORDS:
        found.append(f"has a first sentence of {len(words)} words")
    if re.search(r"[\x00-\x09\x0b-\x1f]", docstring):
        found.append("has a control character, from a backslash that is not escaped")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_docstring_can_be_read_alone(path):
    assert {name: found for name, text in docstrings(path).items() if (found := faults(text))} == {}


@pytest.mark.parametrize(
    "docstring, fault",
    [
        ("So that a NaN of who had them before does not spread.", "begins with 'So'"),
        ("(N,) of the tokens.\n\nLikewise.", "begins with 'of'"),
        ("The same of a completion that waits.", "refers to another definition"),
        ("Its rate.", "begins with 'Its'"),
        ("What is in \text{}.", "has a control character, from a backslash that is not escaped"),
        ("Sum " + "of numbers " * 10 + "of these. Short.", "has a first sentence of 23 words"),
    ],
)
def test_a_fault_is_found(docstring, fault):
    assert fault in faults(docstring)


def test_a_good_docstring_has_no_fault():
    assert (
        faults("Sum of `a` and `b` (see https://x.org, and so on and on, of twenty-one words or more in all), (N,).")
        == []
    )
