"""The kernels compile for every card, without one: in a process of their own, since here they may be interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


def compiled(*targets: int) -> list[dict]:
    command = [sys.executable, "-m", "lowmem_grpo.benchmarks.compile_kernels", "--json", "--targets"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [*command, *map(str, targets)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    results = json.loads(ran.stdout)
    assert {result["target"] for result in results} == set(targets)
    return results


def check(results: list[dict]) -> None:
    for result in results:
        assert result["spill_bytes"] <= result["spill_limit"], result
        assert result["shared_bytes"] <= result["shared_limit"], result
        assert 0 < result["registers"] <= 255, result
        most, loads = result["loads"]
        assert loads <= most, result
        assert result["narrow"] <= result["narrow_limit"], result
        assert result["waits_limit"] is None or 0 < result["waits"] <= result["waits_limit"], result
        assert result["loop_limit"] is None or result["longest_loop"] <= result["loop_limit"], result
        # Below sm_90 a sum in bf16 is one with a factor of 1.
        assert result["target"] < 90 or result["unrounded"] == 0, result
        # One of a chain waits once, before any access, and prefetches before that; any other knows nothing of it.
        assert result["chain"] == result["chain_as_wanted"], result


def test_every_kernel_compiles_without_spills_for_an_ampere_and_a_hopper_card():
    check(compiled(86, 90))


@pytest.mark.slow
def test_every_kernel_compiles_without_spills_for_every_card():
    check(compiled(75, 80, 86, 89, 90, 100, 120))
