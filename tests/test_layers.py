"""Imports point down, and the folder kernels/ does not shadow Hugging Face's package of that name."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowmem_grpo"
MODULES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace(os.sep, ".").removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if not path.is_relative_to(PACKAGE / "benchmarks")
}
# Rooms from the top of the house down: each may import those of lower floors, and of its own floor itself alone.
FLOORS = (
    "cli",
    "demo",
    "__init__",
    "pipeline exporting",
    "loops",
    "checkup",
    "preview",
    "run watch",
    "report",
    "evaluation",
    "inputs",
    "doctor planner",
    "update",
    "rollout tasks tools",
    "generate rewards",
    "model objective data out_of_memory distributed",
    "lookup determinism",
    "config output settings_file terminal",
    "errors paths warn progress_bars torchrun kernels",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: imports are absolute"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "lowmem_grpo"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= set(names)
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_room_imports_only_what_is_below_it(module):
    room = module.split(".")[0] or "__init__"
    ours = {name.split(".")[1] for name in imports(MODULES[module]) if name.startswith("lowmem_grpo.")}
    if room == "cli":
        ours -= {"benchmarks"}  # `lowmem-grpo bench`, which nothing else of the package knows
    above = {other for other in ours - {room} if FLOOR[other] <= FLOOR[room]}
    assert not above, f"{module} is on the floor of {FLOORS[FLOOR[room]]}"


def test_every_room_of_the_house_is_on_a_floor():
    rooms = {module.split(".")[0] or "__init__" for module in MODULES} | {"kernels"}
    assert rooms == set(FLOOR)


def test_the_wheel_has_every_room():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    rooms = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    assert sorted(listed) == sorted(rooms | {"lowmem_grpo.kernels", "lowmem_grpo.benchmarks"})


def test_the_page_of_the_architecture_has_the_floors_in_their_order():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    drawn = [" ".join(re.findall(r"`(\w+)`", line)) for line in re.findall(r"^\d+\. (`.*)$", page, re.MULTILINE)]
    assert drawn == [floor for floor in FLOORS if floor != "__init__"]


def test_kernels_import_torch_triton_and_one_another_and_nothing_else():
    for path in (ROOT / "kernels").glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path) if not f"{name}.".startswith("lowmem_grpo.kernels.")}
        assert roots <= {"torch", "triton", *sys.stdlib_module_names}, path


def test_the_config_needs_the_standard_library_alone():
    for path in [PACKAGE / "errors.py", *(PACKAGE / "config").glob("*.py")]:
        names = {name for name in imports(path) if not name.startswith(("lowmem_grpo.config", "lowmem_grpo.errors"))}
        assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names), path


@pytest.mark.parametrize("folder", ["kernels", "benchmarks"])
def test_a_folder_is_reached_through_its_link_and_shadows_nothing(folder):
    assert not (ROOT / folder / "__init__.py").exists()
    assert os.readlink(PACKAGE / folder) == f"../{folder}"


def test_hugging_faces_kernels_wins_over_the_folder(tmp_path):
    """Run from the root, as `python -m` does, with a regular package of that name installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("CUDAProperties = 'theirs'\n")
    program = (
        "import importlib.util, sys; sys.path.append(sys.argv[1]); from kernels import CUDAProperties; "
        "print(importlib.util.find_spec('lowmem_grpo.kernels.policy_loss').origin)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert Path(found.strip()).samefile(ROOT / "kernels/policy_loss.py")


def test_no_tracked_text_names_a_place_of_this_machine():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ""} and path.is_file() and not path.is_symlink():
            text = path.read_text(encoding="utf-8")
            assert not any(f"/{place}/" in text for place in ("work", "root", "home")), name
