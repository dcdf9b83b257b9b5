"""What a person gets who installs the wheel."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
WANTED = {
    "lowmem_grpo/loops/grpo.py", "lowmem_grpo/py.typed", "lowmem_grpo/kernels/linear_logprobs.py",
    "lowmem_grpo/benchmarks/random_model.py", "lowmem_grpo/benchmarks/configs/gpt-oss-20b.json", "lowmem_grpo/demo/model/model.safetensors",
    "lowmem_grpo/demo/model/tokenizer.json", "lowmem_grpo/generate/hf.py", "lowmem_grpo/rewards/math_worker.py",
    "lowmem_grpo/report/templates/run.html", "lowmem_grpo/report/templates/style.css", "lowmem_grpo/pipeline/pipeline.py", "lowmem_grpo/recipes/r1_zero.yaml", "lowmem_grpo/tasks/countdown.py", "lowmem_grpo/rewards/isolation/jail.py", "lowmem_grpo/rewards/isolation/function_worker.py",
}  # fmt: skip


def pip(*arguments, cwd=ROOT):
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], cwd=cwd, check=True
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The tracked files and links alone, as a fresh clone has them."""
    folder = tmp_path_factory.mktemp("source")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    archive = folder.with_suffix(".tar")
    subprocess.run(["tar", "-cf", archive, *names.stdout.splitlines()], cwd=ROOT, check=True)
    subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_every_part_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= WANTED
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"lowmem_grpo"}


def test_the_installed_wheel_works_from_any_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")  # which is all that installing it without its needs does
    program = (  # which finds the parts that import torch, and leaves that to the job of CI's that installs the wheel
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import lowmem_grpo.cli, lowmem_grpo.report.page, lowmem_grpo.watch.watch\n"
        "from importlib.util import find_spec\n"
        "found = [find_spec(f'lowmem_grpo.{name}').origin for name in ('kernels.linear_logprobs', 'loops.grpo')]\n"
        "found += [find_spec('lowmem_grpo.benchmarks.random_model').origin, lowmem_grpo.cli.__file__]\n"
        "assert all(path.startswith(sys.argv[1]) for path in found), found\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "site")], cwd=tmp_path, check=True)


def test_the_sdist_makes_the_same_wheel(source, wheel, tmp_path):
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        assert any(name.endswith("demo/model/model.safetensors") for name in packed.getnames())
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "again"), str(archive))
    again = next((tmp_path / "again").glob("*.whl"))
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_a_job_installs_the_lowest_versions_and_the_pinned_set_meets_them():
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    lowest = {
        name: Version(least) for name, least in re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(needs), re.MULTILINE)
    }
    job = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8").split("<<'END'\n")[1].split("END\n")[0]
    assert {name: Version(at) for name, at in re.findall(r"([\w-]+)==([\d.]+)", job)} == lowest
    pins = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    pinned = {name.lower().replace("_", "-"): Version(at) for name, at in pins}
    assert len(lowest) == len(needs) and all(pinned[name] >= least for name, least in lowest.items())


def test_the_pinned_set_has_all_that_is_asked_for():
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {plain(name) for name in re.findall(r"^([\w.-]+)==", pins, flags=re.MULTILINE)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = (
        project["dependencies"] + project["optional-dependencies"]["dev"] + project["optional-dependencies"]["tasks"]
    )
    loose = {plain(match[1]) for need in needs if (match := re.match(r"([\w.-]+)[^=]*>=", need))}
    assert loose - pinned == set()


def test_nothing_sends_for_this_package_to_an_index_that_lacks_it():
    """Status says that it is not released: until then another's package could have the name there."""
    names = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.ipynb"], cwd=ROOT, capture_output=True, text=True)
    asked = re.compile(r"pip install [^`\n]*lowmem[-_]grpo[^/]")
    for name in set(names.stdout.split()) - {"tests/test_packaging.py"}:
        assert not asked.search((ROOT / name).read_text(encoding="utf-8")), name
