"""Several processes do what one does: their shares, what they put together, and a rank that is gone."""

import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pandas
import pytest
import rank_work
import torch
from ranks import ranks
from safetensors.torch import load_file
from torch.distributed import HashStore  # type: ignore[reportPrivateImportUsage] # in its docs

from lowmem_grpo import distributed
from lowmem_grpo.errors import LostRankError
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.rewards.runner import Scores
from lowmem_grpo.rollout import scoring
from lowmem_grpo.rollout.scoring import Judged

# An update of so many prompts with these settings, each told apart from one process's by its name below.
UPDATES = {
    **{
        name: (5, {"loss_type": name, "steps_per_generation": 2, "beta": 0.1, "prompts_per_step": 4})
        for name in ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "sapo", "vespo", "gmpo")
    },
    "cispo": (5, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "on policy, no KL, a group without a difference": (5, {}),
    "as many prompts as ranks": (3, {"loss_type": "grpo"}),
    "sequences' ratios and weights": (
        5,
        {"importance_sampling_level": "sequence", "importance_sampling_mode": "sequence_mask", "num_iterations": 2},
    ),
    "the tokens of the highest entropy": (5, {"top_entropy_quantile": 0.4, "entropy_coef": 0.01}),
    "off-policy mask": (5, {"off_policy_mask_threshold": 0.2, "steps_per_generation": 2}),
    "KL in the reward": (5, {"kl_in_reward": True, "beta": 0.1}),
    "without packing": (5, {"padding_free": False, "beta": 0.1}),
    "a critic": (5, {"adv_estimator": "gae", "kl_in_reward": True, "beta": 0.1, "whiten_advantages": True}),
}  # fmt: skip
EXACT = 1e-6  # relative, by the norm


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def several(request):
    with ranks(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def two():
    with ranks(2) as started:
        yield started


def test_one_process_puts_together_what_it_was_given():
    values = torch.tensor([1.0, 2.0])
    assert distributed.world_size() == 1 and distributed.rank() == 0 and distributed.is_main()
    assert distributed.share([3, 1, 2]) == range(3)
    assert distributed.gathered("one") == distributed.each(lambda: "one") == ["one"]
    assert distributed.from_main(7) == 7
    assert distributed.summed(values) is values and values.tolist() == [1.0, 2.0]
    with distributed.joined(torch.device("cpu")):
        assert not torch.distributed.is_initialized()


def test_who_waits_for_a_rank_that_does_not_start_hears_signals_and_names_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            distributed._wait_for_all(HashStore(), 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(0))
    with pytest.raises(LostRankError, match="rank 1 and rank 2 did not start within 0:00:00"):
        distributed._wait_for_all(HashStore(), 0)


def test_ranks_put_together_what_each_has(several):
    for rank, found in enumerate(several.call(rank_work.together)):
        size = len(several.processes)
        assert found["rank"] == (rank, size) and found["alone"] == (0, 1)
        assert found["gathered"] == [f"rank {i}" for i in range(size)]
        assert found["from main"] == "rank 0"
        assert found["sum"].tolist() == [size, sum(range(size))] and found["of bf16"].tolist() == [[float(size)]]
        assert found["of main"].tolist() == [0.0, 7.0]
        assert found["error"] == "ValueError('of rank 1')" and "a" in found["without pickle"]
        assert found["different"].startswith("the processes were given different settings (seed);") and found["same"]
        # The generator that all share is where it was, and what each drew is its own.
        assert found["shared draw"] == several.call(rank_work.together)[0]["shared draw"]
    assert len({found["own draw"] for found in several.call(rank_work.together)}) == len(several.processes)


@pytest.mark.parametrize("weights", [[1] * 5, [1] * 3, [7, 1, 1, 1, 1, 1], [1, 1, 9], [0, 0, 4, 0], [0, 0], [], [5]])
def test_shares_lie_side_by_side_and_are_even(several, weights):
    shares = several.call(rank_work.share, weights)
    assert [index for share in shares for index in share] == [*range(len(weights))]
    of_ranks = [sum(weights[index] for index in share) for share in shares]
    assert max(of_ranks) <= sum(weights) / len(shares) + max(weights, default=0)
    if weights == [1] * 5 or weights == [1] * 3:
        assert all(shares)


QUICK = {"dapo", "cispo", "vespo", "gmpo", "a critic", "KL in the reward", "the tokens of the highest entropy"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in UPDATES]
)
def test_an_update_of_several_processes_is_that_of_one(case, several):
    # A critic's score head computes in fp32, and the loss of centered advantages is what is left of a sum.
    exact = 5 * EXACT if case == "a critic" else EXACT
    for distances in several.call(rank_work.distances, *UPDATES[case]):
        assert not {name: value for name, value in distances.items() if not value <= exact}
        assert any(name.startswith("gradient") for name in distances)


def test_a_rank_that_runs_out_of_memory_tries_again_by_itself(several):
    found = several.call(rank_work.short_of_memory, 40)
    assert [num_failures > 0 for _, num_failures in found] == [rank == 1 for rank in range(len(found))]
    assert all(value <= EXACT for distances, _ in found for value in distances.values())


RUNS = {
    "refilled, evaluated, towards a KL": dict(
        eval_steps=2, max_steps=2, num_generations_eval=2, dynamic_sampling_rounds=1, replay_buffer_size=4, curriculum_skip=0.5,
        beta=0.02, kl_target=0.01, temperature=1.2, save_steps=2, reference="initial", sync_ref_model=True,
        ref_model_sync_steps=2,
    ),
    "PPO": dict(adv_estimator="gae", beta=0.02, kl_in_reward=True, save_steps=3, critic_learning_rate=1e-3),
    "several optimizer steps": dict(
        num_iterations=2, steps_per_generation=2, use_adaptive_entropy=True, entropy_target=0.5,
        top_entropy_quantile=0.5, importance_sampling_mode="sequence_truncate", loss_type="gmpo", prompts_per_step=6,
        eval_steps=2,
    ),
    "from a teacher": dict(teacher=str(rank_work.DEMO_MODEL), prompts_per_step=5),
}  # fmt: skip
OF_A_PROCESS = ("time/", "memory/", "tokens_per_s/", "step_time", "rollout/")  # metrics that are not the algorithm's


@pytest.mark.parametrize("name", [next(iter(RUNS)), *(pytest.param(x, marks=pytest.mark.slow) for x in [*RUNS][1:])])
def test_a_run_of_two_processes_is_that_of_one(name, two, tmp_path):
    """Completions and random numbers bit for bit, all else as fp32 rounds sums in another order."""
    first, second = two.call(rank_work.run_together, str(tmp_path), RUNS[name])
    alone, _ = two.call(rank_work.run_alone, str(tmp_path), RUNS[name])
    for other in (second, alone):
        assert torch.equal(first["random"], other["random"])
        for history in ("history", "eval_history"):
            assert len(first[history]) == len(other[history])
            for found, truth in zip(first[history], other[history], strict=True):
                assert found.keys() == truth.keys()
                known = [key for key in truth if not key.startswith(OF_A_PROCESS) and truth[key] is not None]
                assert {key: found[key] for key in known} == pytest.approx(
                    {key: truth[key] for key in known}, rel=1e-3, abs=2e-5
                )
    for weight, value in first["weights"].items():
        assert torch.equal(value, second["weights"][weight])
        # Adam makes a whole step of a gradient however small, rounding and all.
        assert rank_work.distance(value, alone["weights"][weight]) < 1e-2
    for path in Path(alone["output_dir"]).rglob("*"):
        ours = Path(first["output_dir"]) / path.relative_to(alone["output_dir"])
        if path.suffix == ".parquet":
            found, truth = (pandas.read_parquet(one) for one in (ours, path))
            pandas.testing.assert_frame_equal(found, truth, rtol=1e-3, atol=1e-4)
        elif path.suffix == ".safetensors":
            found, truth = load_file(ours), load_file(path)
            assert found.keys() == truth.keys()
            assert all(rank_work.distance(found[key], truth[key]) < 1e-2 for key in truth)


@pytest.mark.slow
def test_masks_of_dropout_are_the_ranks_own_and_their_weights_the_same(two, tmp_path):
    settings = {"lora_dropout": 0.3, "max_steps": 1, "prompts_per_step": 5}
    first, second = two.call(rank_work.run_together, str(tmp_path), settings)
    assert torch.equal(first["random"], second["random"])
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


def test_a_signal_in_one_rank_takes_its_part_out_of_no_sum(two):
    """Or the other would sum alone, while the first goes on to the next exchange."""
    assert two.call(rank_work.sum_and_strike_rank_0) == [(True, [1.0, 1.0], [0, 1]), (False, [2.0, 2.0], [0, 1])]


def test_a_held_signal_does_not_wait_for_ever_for_a_rank_that_does_not_come(two):
    (raised, took, after), (late, _, later) = two.call(rank_work.hold_while_rank_1_is_late)
    assert raised == f"SystemExit({128 + signal.SIGALRM})" and 0.3 <= took < 1.5
    assert late == "" and after == later == [0, 1]


def test_a_rank_that_was_killed_ends_the_others_with_a_sentence():
    with ranks(3) as several:
        several.call(rank_work.share, [1])
        several.start(rank_work.wait_for_others, 1)
        begun = time.monotonic()
        for rank in (0, 2):
            error = several.answer(several.pipes[rank])
            assert isinstance(error, LostRankError)
            assert f"rank 1 (process {several.processes[1].pid}) is gone" in str(error)
        assert time.monotonic() - begun < 20


def test_who_waits_for_a_sum_sees_that_another_is_gone():
    """As NCCL does not, which waits on the GPU."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with ranks(2) as several:
        said, _ = several.call(rank_work.sum_with_one_that_is_gone, ended.pid)
    assert said == f"rank 1 (process {ended.pid}) is gone, and this one cannot go on alone"


def judged(count, metrics, columns, first=0):
    completions = [Completion([first + i], None, None, "eos") for i in range(count)]
    scores = Scores(torch.arange(float(first), first + count)[:, None], metrics, columns)
    return Judged(completions, [str(first + i) for i in range(count)], scores, {"rollout/slots": first, **metrics})


def test_the_completions_of_ranks_become_those_of_one():
    parts = [
        judged(2, {"time/reward/a_s": 1.0, "rewards/a/failures": 1.0, "mean": 1.0}, {"note": ["x", "y"]}),
        judged(0, {}, {}),
        judged(1, {"time/reward/a_s": 3.0, "rewards/a/failures": 0.0, "mean": 4.0}, {"other": [5]}, first=2),
    ]
    found = scoring._joined(parts)
    assert [completion.ids for completion in found.completions] == [[0], [1], [2]] and found.texts == ["0", "1", "2"]
    assert found.scores.rewards.tolist() == [[0.0], [1.0], [2.0]]
    assert found.scores.extra_columns == {"note": ["x", "y", None], "other": [None, None, 5]}
    assert found.metrics == {"rollout/slots": 2 / 3, "time/reward/a_s": 3.0, "rewards/a/failures": 1.0, "mean": 2.0}


def test_a_logged_column_that_cannot_be_sent_is_text():
    sent = scoring._as_sent(judged(2, {}, {"numbers": [1, 2], "functions": [len, lambda: 0]}))
    assert sent.scores.extra_columns["numbers"] == [1, 2]
    assert all(isinstance(value, str) for value in sent.scores.extra_columns["functions"])
