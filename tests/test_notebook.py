"""examples/quickstart.ipynb: a valid notebook without outputs, whose every cell runs with a tiny model on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from tiny_models import DEMO_MODEL

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
SMALL = """
MODEL = {model!r}
DATA = {{"path": "json", "data_files": {{"train": "seen.jsonl", "test": "unseen.jsonl"}}}}
HELD_OUT = 4
RUN = "run"
STEPS = 2
PROMPTS, GENERATIONS = 2, 2
LENGTH = 8
BUDGET = None
"""
# The cells of a notebook one after the other in __main__, as a kernel runs them. IPython is not among what the suite
# needs: of it a notebook gets display() and HTML(), which say what they are given.
RUNNER = """
import json, sys, types
from matplotlib import pyplot
pyplot.switch_backend("Agg")
ipython, shown = types.ModuleType("IPython"), types.ModuleType("IPython.display")
ipython.version_info, ipython.get_ipython = (9, 0), lambda: None  # matplotlib asks
shown.HTML, shown.display = str, print
sys.modules |= {"IPython": ipython, "IPython.display": shown}
for number, source in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))):
    exec(compile(source, f"cell {number}", "exec"), globals())
"""


def code_cells():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_the_notebook_is_valid_and_has_no_outputs():
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT))
    for number, cell in enumerate(code_cells()):
        assert cell.outputs == [] and cell.execution_count is None
        compile(cell.source, f"cell {number}", "exec")


def test_the_notebook_has_one_cell_of_parameters_that_a_test_replaces_whole():
    (cell,) = (cell for cell in code_cells() if "parameters" in tags(cell))
    given, replaced = {}, {}
    exec(cell.source, given)
    exec(SMALL.format(model=""), replaced)
    assert given.keys() == replaced.keys()
    assert [tags(cell) for cell in code_cells()].count(["install"]) == 1


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path):
    for name, numbers in (("seen", range(10, 18)), ("unseen", range(18, 24))):
        rows = [{"question": f"{n}+{n}=", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in numbers]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    cells = [cell for cell in code_cells() if "install" not in tags(cell)]
    sources = [SMALL.format(model=str(DEMO_MODEL)) if "parameters" in tags(cell) else cell.source for cell in cells]
    (tmp_path / "cells.json").write_text(json.dumps(sources), encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-c", RUNNER, "cells.json"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "step 2: right" in ran.stdout
    assert (tmp_path / "adapter.zip").is_file() and (tmp_path / "merged/config.json").is_file()
