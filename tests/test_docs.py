"""README.md, docs/ and what else a visitor reads: no line too many, no dead link, nothing that the code contradicts."""

import ast
import re
import runpy
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import lowmem_grpo

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(path: Path) -> str:
    """A page without its code blocks, in which neither links nor headings are."""
    return re.sub(r"^(```.*?^```$|    \S.*?$)", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_within_the_repository_leads_somewhere(path):
    for link in LINK.findall(prose(path)):
        if not link.startswith("https://"):
            target, _, anchor = link.partition("#")
            page = (path.parent / target).resolve() if target else path
            assert page.exists(), link
            assert not anchor or anchor in anchors(page), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_line_of_text_is_at_most_120_characters_wide(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        assert len(line) <= 120 or line.startswith(("|", "<!--", "`python -m lowmem_grpo.benchmarks.")), line


def test_every_page_of_docs_is_linked_from_the_readme():
    linked = set(LINK.findall(prose(ROOT / "README.md")))
    assert {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")} <= linked


def test_the_page_of_settings_is_made_from_the_configuration():
    made = runpy.run_path(str(ROOT / "docs/make_settings.py"))["page"]()
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == made, "run python docs/make_settings.py"


def test_the_settings_of_papers_are_a_configuration_each():
    page = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
    rows = [re.findall(r"`(\w+=[^`]+)`", line) for line in page.splitlines() if line.startswith("| [")]
    assert len(rows) == 7
    for settings in rows:
        eval(f"lowmem_grpo.GRPOConfig({', '.join(settings)})")


def test_the_page_of_models_has_what_their_tests_expect():
    pinned = re.search(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    if pinned is None or version("transformers") != pinned[1]:
        pytest.skip("how a model is served may be otherwise in another transformers than constraints.txt's")
    made = runpy.run_path(str(ROOT / "docs/make_models.py"))["page"]()
    assert (ROOT / "docs/models.md").read_text(encoding="utf-8") == made, "run python docs/make_models.py"


def test_the_page_of_models_says_what_each_configuration_takes():
    made = runpy.run_path(str(ROOT / "docs/make_plans.py"))
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    lines = page.partition(made["BEGIN"])[2].partition(made["END"])[0].strip().splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header[1:] == [*made["BUDGETS"]] and [row[0] for row in rows] == [*made["models"]()]
    assert made["with_table"](page, rows) == page


def named_in_the_tree(page: str) -> list[str]:
    """Every path of architecture.md: the drawn tree's, by its indentation, and those in the table of places."""
    tree = re.search(r"^```\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert tree is not None
    above, found = [], re.findall(r"`((?:\w+/)+\w+\.py)`", page)
    for line in tree[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], line.split()[0].rstrip("/")]
        found.append("/".join(above))
    return found


def test_the_tree_that_is_drawn_is_the_tree_that_is_there():
    named = named_in_the_tree((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert [path for path in named if not list(ROOT.glob(path))] == []
    elsewhere = {ROOT / "lowmem_grpo" / name for name in ("kernels", "benchmarks", "demo")}  # two links; not drawn out
    modules = [*ROOT.glob("kernels/*.py"), *ROOT.glob("lowmem_grpo/**/*.py")]
    there = {path for path in modules if path.name != "__init__.py" and elsewhere.isdisjoint(path.parents)}
    assert {path.relative_to(ROOT).as_posix() for path in there} <= set(named)


def texts_of_the_package() -> str:
    """Every text in the code, a line each; what an f-string fills in is left out."""
    found = []
    for path in (ROOT / "lowmem_grpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_what_troubleshooting_quotes_is_what_the_code_says():
    """Of each quoted sentence, whatever is not a number, a quoted value or a word in capitals stands in the code."""
    said = texts_of_the_package()
    quotes = re.findall(r"\*\*`([^`]+)`", prose(ROOT / "docs/troubleshooting.md"))
    assert len(quotes) > 30
    for quote in quotes:
        words = re.split(r"\.\.\.|'[A-Z]+'|\b[A-Z]+\b|\b\d+\w*\b", " ".join(quote.split()))
        fixed = [part for part in words if len(part.strip()) > 2]
        assert fixed and all(part.strip(" /") in said for part in fixed), quote


def test_every_fault_on_the_page_of_reliability_names_a_test_that_is_there():
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| fault | ")]
    assert len(rows) >= 40
    for row in rows:
        found = re.fullmatch(r"\| [^|]+ \| [^|]+ \| `(test_\w+\.py)::(test_\w+)` \|", row)
        assert found is not None, row
        assert f"\ndef {found[2]}(" in (ROOT / "tests" / found[1]).read_text(encoding="utf-8"), row


@pytest.mark.parametrize(
    "path", [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"], ids=lambda p: p.name
)
def test_a_file_for_the_host_can_be_read(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lowmem_grpo.__version__ and citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_hooks_have_the_ruff_that_the_suite_has():
    (pinned,) = re.findall(r"^ruff==.*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [hook["additional_dependencies"] for hook in hooks] == [[pinned]] * len(hooks) and hooks


def test_the_workflow_tests_every_python_that_the_package_names():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
