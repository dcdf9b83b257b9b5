"""A warning names the line of the user's program that called us."""

import functools
import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from tiny_models import DEMO_MODEL, make_policy

from lowmem_grpo import evaluate
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.demo import task
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.warn import OURS, warn

ROWS = task.rows(task.splits()[0][:4])


def ours(source: str, **names):
    """A function `f` as if it stood in a file of this package."""
    exec(compile(source, OURS + "made_up.py", "exec"), names)
    return names["f"]


def here() -> int:
    return inspect.stack()[1].lineno


def warned(call) -> tuple[str, int]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (only,) = [one for one in caught if one.category is UserWarning and "looked for" in str(one.message)]
    return only.filename, only.lineno


def test_the_line_is_the_callers_whatever_stands_between():
    inner = ours("def f():\n    warn('looked for')", warn=warn)
    through_torch = ours("def f():\n    return inner()", inner=torch.no_grad()(inner))
    through_functools = ours("def f():\n    return inner()", inner=functools.lru_cache(through_torch))
    for call in (inner, through_torch, through_functools):
        line = here() + 1
        assert warned(lambda: call()) == (__file__, line)  # noqa: B023


def test_of_two_calls_of_ours_the_outer_one_is_named():
    """A reward function of the user's that calls us again is not where the run was started."""
    inner = ours("def f():\n    warn('looked for')", warn=warn)
    outer = ours("def f(reward):\n    reward()", warn=warn)
    line = here() + 1
    assert warned(lambda: outer(lambda: inner())) == (__file__, line)


def test_a_file_beside_ours_is_not_ours():
    near = {"warn": warn}
    exec(compile("\n\ndef f():\n    warn('looked for')", OURS[:-1] + "_tests/near.py", "exec"), near)
    assert warned(near["f"]) == (OURS[:-1] + "_tests/near.py", 4)


def test_a_warning_obeys_the_filters_of_the_users_module():
    inner = ours("def f():\n    warn('looked for')", warn=warn)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=__name__.replace(".", r"\."))
        with pytest.raises(UserWarning, match="looked for"):
            inner()


@pytest.fixture
def packing_refused(monkeypatch):
    monkeypatch.setattr("lowmem_grpo.model.policy.difference_when_packed", lambda policy, text: "looked for")
    cached = Policy.__dict__["packs"]
    monkeypatch.setattr(Policy, "packs", property(cached.func))  # whose own frame there is not in 3.12


def settings(tmp_path, **changes):
    return GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, max_steps=1, prompts_per_step=1, num_generations=2,
        max_completion_length=4, gradient_checkpointing=False, **changes,
    )  # fmt: skip


def length_reward(completions, **kwargs):
    return list(range(len(completions)))


def test_training_on_padded_rows_names_the_call_of_train(packing_refused, tmp_path):
    line = here() + 1
    assert warned(lambda: train(str(DEMO_MODEL), length_reward, ROWS, config=settings(tmp_path))) == (__file__, line)


def test_sampling_by_generate_names_the_call(monkeypatch, tmp_path):
    monkeypatch.setattr("lowmem_grpo.generate.engine.refusal", lambda policy, dtype: "looked for")
    config = settings(tmp_path)
    line = here() + 1
    assert warned(lambda: evaluate(str(DEMO_MODEL), length_reward, ROWS, config)) == (__file__, line)


def test_a_property_read_by_the_user_names_that_line(packing_refused):
    policy = make_policy()
    line = here() + 1
    assert warned(lambda: policy.packs) == (__file__, line)


PROGRAM = """
import runpy, sys
from lowmem_grpo import cli, warn
from lowmem_grpo.cli import parser
parser.refuse_unknown_fields = lambda names, config: warn.warn("looked for")
sys.argv[1:] = ["plan"]
{call}
"""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("cli.main()", "lowmem-grpo: looked for"),
        (
            "sys.modules.pop('lowmem_grpo.cli'); runpy.run_module('lowmem_grpo.cli', run_name='__main__', alter_sys=True)",
            "lowmem-grpo: looked for",
        ),
        ("cli.main(['plan'])", "{program}:7: UserWarning: looked for\n  cli.main(['plan'])"),
    ],
)
def test_a_command_warns_in_a_sentence_and_a_program_with_its_line(call, said, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(call=call))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert (
        done.stderr
        == f"{said.format(program=program)}\nlowmem-grpo plan: --model is missing; see `lowmem-grpo plan --help`\n"
    )
