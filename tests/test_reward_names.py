"""A name in a configuration calls only what is built in, or what a module of the user's own defines."""

import importlib.util
import sys

import pytest

from lowmem_grpo.errors import InputError
from lowmem_grpo.rewards import resolve_reward_funcs
from lowmem_grpo.rewards.isolation.origin import INSTALLED, OWN, PYTHON, origin_of

MODULE = """
import functools
import os
import subprocess
from os import system
from torch import zeros
from lowmem_grpo.rewards import get_code_reward, get_regex_reward

run = functools.partial(os.system, "touch was_run")
append = [].append
call = subprocess.Popen

def make(weight=1.0):
    def reward(completions, **kwargs):
        return [weight for _ in completions]
    return reward

@functools.lru_cache
def make_once(weight=1.0):
    return make(weight)

class Reward:
    def __init__(self, weight=1.0):
        self.weight = weight
    def __call__(self, completions, **kwargs):
        return [self.weight for _ in completions]

reward = make(2.0)
half = functools.partial(lambda weight, completions, **_: [weight for _ in completions], 0.5)
made = Reward(3.0)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_names.py").write_text(MODULE)
    (tmp_path / "leaves_names.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "fails_names.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("own_names", "leaves_names", "fails_names"):
        sys.modules.pop(name, None)


def resolve(name):
    return resolve_reward_funcs(name)[0]


@pytest.mark.parametrize(
    ("name", "reward"),
    [
        ("own_names.make(weight=5.0)", 5.0), ("own_names.make()", 1.0), ("own_names.make_once(weight=2.0)", 2.0),
        ("own_names.Reward(weight=4.0)", 4.0), ("own_names.reward", 2.0), ("own_names.half", 0.5), ("own_names.made", 3.0),
        ("own_names.get_regex_reward(pattern='a')", 1.0),
        ("lowmem_grpo.rewards.format.get_regex_reward(pattern='a')", 1.0), ("lowmem_grpo.rewards.format.tag_count_reward", 0.0),
    ],
)  # fmt: skip
def test_functions_of_a_module_of_ones_own_are_called(name, reward, own):
    assert resolve(name)(completions=["a"]) == [reward]


@pytest.mark.parametrize(
    "name",
    [
        "os.system(command='touch was_run')", "posix.system(command='touch was_run')", "own_names.system(command='touch was_run')",
        "subprocess.run(args='touch was_run', shell=True)", "subprocess.Popen(args='touch was_run', shell=True)",
        "own_names.call(args='touch was_run', shell=True)", "own_names.run()", "own_names.append()", "builtins.open(file='was_run', mode='w')",
        "builtins.exec(source='open(\"was_run\", \"w\")')", "pathlib.Path.touch(self='was_run')", "os.path.os.system(command='touch was_run')",
        "importlib.import_module(name='antigravity')", "torch.load(f='was_run', weights_only=False)", "torch.zeros(size=5)",
        "own_names.zeros(size=5)", "numpy.load(file='x', allow_pickle=True)", "transformers.pipeline(task='x')", "yaml.unsafe_load(stream='x')",
        "lowmem_grpo.train(model='x')", "lowmem_grpo.rewards.resolve_reward_funcs(reward_funcs='x')", "webbrowser.open(url='x')",
    ],
)  # fmt: skip
def test_no_function_of_python_or_of_a_package_is_called(name, own):
    with pytest.raises(
        InputError, match="is not called, since no module of your own|is of Python's own|cannot be imported"
    ):
        resolve(name)
    assert not (own / "was_run").exists()


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.print", "own_names.system", "own_names.run", "own_names.call", "json.dumps", "this.d"],
)
def test_no_function_of_python_is_a_reward(name, own):
    sys.modules.pop("this", None)
    with pytest.raises(InputError, match="is of Python's own and no reward function"):
        resolve(name)
    assert "this" not in sys.modules  # it is not even imported


def test_a_reward_function_may_be_a_packages():
    assert resolve("torch.zeros").__name__ == "zeros"
    trl = pytest.importorskip("trl.rewards")
    assert resolve("trl.rewards.think_format_reward") is trl.think_format_reward


@pytest.mark.parametrize(
    "name",
    [
        "leaves_names.f",
        "fails_names.f",
        "own_names.f",
        "torch.no_such_function",
        "..f",
        "a..b",
        ".a.f",
        "a.b\0.c",
        "a\ud800.b",
        "~nobody_here.x",
    ],
)
def test_what_cannot_be_imported_is_refused_in_a_sentence(name, own):
    with pytest.raises(InputError, match="cannot be imported") as refused:
        resolve(name)
    assert str(refused.value).isprintable()


def test_processes_call_nothing_of_pythons_own():
    with pytest.raises(InputError, match="os.system is of Python's own"):
        resolve("in_processes(function='os.system')")


@pytest.mark.parametrize(
    ("module", "origin"),
    [
        ("os", PYTHON), ("os.path", PYTHON), ("posix", PYTHON), ("builtins", PYTHON), ("json", PYTHON), ("_json", PYTHON), ("sys", PYTHON),
        ("zipimport", PYTHON), ("torch", INSTALLED), ("yaml", INSTALLED), ("lowmem_grpo.rewards", INSTALLED),
        ("tiny_models", OWN), ("no_such_module", OWN), ("", OWN),
    ],
)  # fmt: skip
def test_a_module_is_pythons_a_packages_or_ones_own(module, origin):
    assert origin_of(module) == origin


@pytest.mark.parametrize(("program", "origin"), [(None, OWN), ("tiny_models", OWN), ("pytest", INSTALLED)])
def test_the_main_module_is_that_of_the_script_or_of_what_python_m_runs(monkeypatch, program, origin):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", program and importlib.util.find_spec(program))
    assert origin_of("__main__") == origin
