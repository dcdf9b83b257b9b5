"""Imports point down, and the folder kernels/ does not shadow Hugging Face's package of that name."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowmem_grpo"
MODULES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace(os.sep, ".").removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if not path.is_relative_to(PACKAGE / "benchmarks")
}
# What each room may import of ours. Rooms further down know nothing of those above them.
ALLOWED = {
    "config": set(),
    "rollout": set(),
    "advantages": set(),
    "packing": set(),
    "interruption": set(),
    "meter": set(),
    "lora": set(),
    "offload": set(),
    "out_of_memory": set(),
    "warn": set(),
    "progress_bars": set(),
    "optimizer": {"config"},
    "kernels": set(),
    "objective": {"kernels"},
    "attention": set(),
    "packed_attention": {"attention", "packing"},
    "trial": {"attention", "packed_attention", "packing"},
    "policy": {"attention", "config", "kernels", "lora", "offload", "packed_attention", "packing", "trial", "warn"},
    "data": {"config", "rollout"},
    "rewards": {"packing", "rewards"},
    "tasks": {"config", "rewards"},
    "generate": {
        "attention",
        "generate",
        "kernels",
        "lora",
        "out_of_memory",
        "packing",
        "policy",
        "rollout",
        "trial",
        "warn",
    },
    "metrics": {"advantages", "rollout"},
    "tracing": {"attention", "config", "generate", "packing", "policy"},
    "memory": {"config", "generate", "kernels", "optimizer", "policy", "tracing"},
    "loss": {"config", "objective"},
    "replay": {"rollout"},
    "update": {"config", "loss", "metrics", "out_of_memory", "packing", "policy", "rollout"},
    "answering": {"config", "generate", "policy", "rollout"},
    "collect": {
        "advantages",
        "answering",
        "config",
        "data",
        "metrics",
        "objective",
        "policy",
        "replay",
        "rewards",
        "rollout",
    },
    "checkpoint": {"config", "optimizer", "policy"},
    "evaluate": {
        "advantages",
        "answering",
        "config",
        "data",
        "metrics",
        "policy",
        "progress_bars",
        "rewards",
        "rollout",
        "tasks",
    },
}
FREE = {"__init__", "train", "cli", "demo"}


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
    if room not in FREE:
        assert ours <= ALLOWED[room] | ({room} if room in ("generate", "rewards", "tasks") else set())
    if room not in {"__init__", "cli", "demo"}:
        assert not ours & {"train", "cli", "demo"}


def test_kernels_import_torch_and_triton_and_nothing_else():
    for path in (ROOT / "kernels").glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= {"torch", "triton", *sys.stdlib_module_names}, path


def test_the_config_needs_the_standard_library_alone():
    assert {name.split(".")[0] for name in imports(PACKAGE / "config.py")} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("folder", ["kernels", "benchmarks"])
def test_a_folder_is_reached_through_its_link_and_shadows_nothing(folder):
    assert not (ROOT / folder / "__init__.py").exists()
    assert os.readlink(PACKAGE / folder) == f"../{folder}"


def test_hugging_faces_kernels_wins_over_the_folder(tmp_path):
    """Run from the root, as `python -m` does, with a regular package of that name installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("CUDAProperties = 'theirs'\n")
    program = "import sys; sys.path.append(sys.argv[1]); from kernels import CUDAProperties; import lowmem_grpo.kernels.policy_loss"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True)


def test_no_tracked_text_names_a_place_of_this_machine():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ""} and path.is_file() and not path.is_symlink():
            text = path.read_text(encoding="utf-8")
            assert not any(f"/{place}/" in text for place in ("work", "root", "home")), name
