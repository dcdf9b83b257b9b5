import dataclasses
import errno
import io
import math
import os
import sys

import pytest
import torch
from test_update import fixed_rollout

from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.objective.advantages import compare
from lowmem_grpo.rollout.metrics import length_metrics, remarks, reward_metrics
from lowmem_grpo.run.progress import Progress
from lowmem_grpo.update.token_metrics import TokenMeter

NAN = math.nan


def completion(length, finish):
    return Completion([5] * length, None, None, finish)


def test_the_length_of_what_ended_is_no_number_where_nothing_did():
    found = length_metrics([completion(4, "length"), completion(4, "length")])
    assert found["completions/mean_length"] == 4 and found["completions/clipped_ratio"] == 1
    assert all(math.isnan(found[f"completions/{which}_terminated_length"]) for which in ("mean", "min", "max"))
    found = length_metrics([completion(4, "length"), completion(3, "eos")])
    assert {found[f"completions/{which}_terminated_length"] for which in ("mean", "min", "max")} == {3}


def test_a_reward_that_nobody_got_has_neither_mean_nor_deviation():
    rewards = torch.tensor([[1.0, NAN, 2.0], [0.0, NAN, NAN]])
    compared = compare(
        rewards, num_generations=2, reward_weights=None, adv_estimator="grpo", scale_rewards="group",
        multi_objective_aggregation="sum_then_normalize",
    )  # fmt: skip
    found = reward_metrics(["all", "none", "one"], rewards, compared)
    assert found["rewards/all/mean"] == 0.5 and found["rewards/all/std"] == pytest.approx(0.5**0.5)
    assert math.isnan(found["rewards/none/mean"]) and math.isnan(found["rewards/none/std"])
    assert found["rewards/one/mean"] == 2 and math.isnan(found["rewards/one/std"]), "one value deviates from nothing"
    assert found["reward"] == 1.5 and found["reward_std"] == pytest.approx(4.5**0.5)


def test_what_no_token_was_computed_for_is_no_number_and_never_0():
    rollout = fixed_rollout()
    tokens = int(rollout.offsets[-1])
    rollout = dataclasses.replace(
        rollout, sampling_logprobs=torch.zeros(tokens), ref_logprobs=torch.zeros(tokens), metrics={}
    )
    meter = TokenMeter(rollout, torch.device("cpu"))
    nothing = meter.metrics()
    assert nothing.pop("frac_tokens_skipped") == 1
    assert {"entropy", "kl", "clip_ratio/low_min", "clip_ratio/high_max", "clip_ratio/region_mean"} < set(nothing)
    assert {f"sampling/sampling_logp_difference/{which}" for which in ("mean", "max")} < set(nothing)
    assert all(math.isnan(value) for value in nothing.values())
    meter.add(torch.tensor([0, 1]), entropy=torch.tensor([0.0, 0.0]), kl=torch.tensor([0.0, 2.0]))
    something = meter.metrics()
    assert something["entropy"] == 0 and something["kl"] == 1, "a mean of zeros is 0"
    assert something["clip_ratio/low_min"] == something["sampling/sampling_logp_difference/max"] == 0
    meter.values["entropy"][0] = NAN
    assert math.isnan(meter.metrics()["entropy"])


def test_a_kl_in_the_reward_is_not_taken_for_missing():
    rollout = fixed_rollout()
    rollout = dataclasses.replace(rollout, ref_logprobs=torch.zeros(int(rollout.offsets[-1])), metrics={"kl": 0.5})
    assert "kl" not in TokenMeter(rollout, torch.device("cpu")).metrics()


METRICS = {
    "step": 3, "reward": 0.25, "completions/mean_length": 7.0, "completions/clipped_ratio": 0.5, "entropy": 0.0,
    "kl": 0.0, "frac_tokens_skipped": 0.5, "step_time": 1.0, "memory/update/peak_mib": 10.0,
}  # fmt: skip


def line_of(monkeypatch, advantages=None, mask=None, **changes) -> str:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    rollout = fixed_rollout()
    given = {"advantages": advantages, "completion_mask": mask}
    changed = {name: torch.tensor(values) for name, values in given.items() if values is not None}
    progress = Progress(9)
    given = {**METRICS, **changes}
    progress.step(given, remarks(given, dataclasses.replace(rollout, **changed)))
    return sys.stderr.getvalue()  # type: ignore[attr-defined] # a StringIO


ALIKE, NOTHING = [0.0] * 6, {"frac_tokens_skipped": 1.0, "entropy": NAN, "kl": NAN}


def test_a_steps_line_says_what_was_learned_from(monkeypatch):
    plain = "step 3/9  reward 0.250  length 7.0  entropy 0.000  kl 0.0000  1.00 s  peak 10 MiB\n"
    assert line_of(monkeypatch) == plain
    none = plain.replace("0.000 ", "- ").replace("0.0000", "-").replace("MiB", "MiB  no difference in any group")
    assert line_of(monkeypatch, ALIKE, **NOTHING) == none
    learned = line_of(monkeypatch, ALIKE)
    assert "entropy 0.000  kl 0.0000" in learned and learned.endswith("MiB  no difference in any group\n"), "a KL"
    masked = line_of(monkeypatch, mask=[False] * 6, **NOTHING)
    assert "entropy -  kl -" in masked and masked.endswith("MiB  all that differ are masked\n")


def test_a_number_that_is_broken_is_not_taken_for_one_that_is_missing(monkeypatch):
    assert "entropy nan  kl nan" in line_of(monkeypatch, entropy=NAN, kl=NAN)


def test_no_reward_is_no_number(monkeypatch):
    assert "reward -  " in line_of(monkeypatch, ALIKE, reward=NAN, **NOTHING)


@pytest.mark.parametrize(
    ("share", "words"), [(0.0, None), (0.5, None), (0.515625, "52 %"), (0.875, "88 %"), (1.0, "100 %")]
)
def test_the_share_cut_off_stands_in_the_line_where_it_is_over_a_half(share, words, monkeypatch):
    line = line_of(monkeypatch, **{"completions/clipped_ratio": share})
    assert line.endswith(f"  {words} cut off at max_completion_length\n") if words else "cut off" not in line


def test_what_is_said_is_printed_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    Progress(1).say("evaluation: [bold]x[/bold] :smile: [0.1, 0.2] " + "y" * 200)
    assert sys.stderr.getvalue() == "evaluation: [bold]x[/bold] :smile: [0.1, 0.2] " + "y" * 200 + "\n"  # type: ignore[attr-defined] # a StringIO


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_standard_output_goes_where_it_went_unless_it_would_tear_the_line(file, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", file())
    with Progress(9) as progress:
        progress.step(METRICS)
        print("the user's")
    torn, own = sys.stderr.getvalue(), sys.stdout.getvalue()  # type: ignore[attr-defined] # a StringIO
    assert "step 3/9" in torn
    assert (("the user's" in torn), own) == ((True, "") if file is Terminal else (False, "the user's\n"))


def test_a_terminal_that_is_closed_costs_a_run_nothing(monkeypatch):
    class Closed(Terminal):
        is_closed = False

        def write(self, text):
            if self.is_closed:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().write(text)

    terminal, own = Closed(), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", own)
    with Progress(9) as progress:
        terminal.is_closed = True
        progress.step(METRICS)
        progress.say("evaluation")
    assert (sys.stderr, sys.stdout) == (terminal, own)
