"""What benchmarks/ measures is what it says it measures."""

import contextlib
import json
import math
import pickle
import socket
import sys
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_grpo.benchmarks import (
    bench_budgets,
    bench_decode,
    bench_delta_step,
    bench_example,
    bench_expert_product,
    bench_gemm_4bit,
    bench_learning,
    bench_overlap,
    bench_ppo,
    bench_rollout,
    bench_scaling,
    bench_step,
    bench_sums,
    bench_update,
    measure,
    profile_step,
    random_model,
    report,
    sampling_error,
    suite,
    trainers,
)
from lowmem_grpo.benchmarks import bench_linear_logprobs as bench
from lowmem_grpo.benchmarks.measure import Failed, Timing
from lowmem_grpo.benchmarks.random_model import made, make_config, make_random_model, vocabulary_of
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.kernels import overlap
from lowmem_grpo.model.experts import Mxfp4Stack, Nf4Stack
from lowmem_grpo.planner import plan as planner
from lowmem_grpo.run.meter import Meter

CPU = torch.device("cpu")
MIB = 2**20
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@pytest.fixture(scope="module", autouse=True)
def children_that_start_at_once():
    if Path("/proc/self/clear_refs").exists():
        modules = (bench, bench_gemm_4bit, bench_rollout, bench_scaling, bench_update)
        measure.preload(*(module.__name__ for module in modules))  # else each child imports its own, in 4 CPU-seconds


@pytest.fixture
def in_this_process(monkeypatch):
    """What children would measure is called here, where the model is made already; children have tests of their own."""

    def here(build, device):
        pickle.loads(pickle.dumps(build))(small=False)()
        return 1

    monkeypatch.setattr(measure, "peak_above_inputs", here)


def take(large: int, mib: int, small: bool):
    """A run that holds 1.5 `mib` at its peak and returns a third of that; its input is `large` MiB."""
    given = torch.ones((1 if small else large) * MIB // 4)

    def run():
        peak = torch.ones(1 if small else mib * MIB // 4)
        return given, peak[: len(peak) // 2].clone()

    return run


def test_the_order_rotates_and_warmups_are_not_counted():
    calls = []
    runs = {name: lambda turn, name=name: calls.append((turn, name)) for name in "abc"}
    timings = measure.time_each(runs, CPU, repetitions=2, warmups=1)
    assert "".join(name for _, name in calls) == "abcbcacab"
    assert [turn for turn, _ in calls] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for timing in timings.values():
        assert isinstance(timing, Timing) and timing.repetitions == 2 and timing.low <= timing.median <= timing.high


def test_a_run_that_fails_is_named_and_the_others_go_on():
    def fails(turn):
        raise torch.OutOfMemoryError("CUDA out of memory") if turn else KeyError("shape")

    timings = measure.time_each({"broken": fails, "sound": lambda turn: None}, CPU, repetitions=1, warmups=0)
    assert timings["broken"] == Failed("KeyError") and isinstance(timings["sound"], Timing)
    assert measure.attempt(partial(fails, 1)) == Failed(measure.OUT_OF_MEMORY)
    assert measure.attempt(lambda: torch.empty(2**60)) == Failed(measure.OUT_OF_MEMORY)


@LINUX
def test_the_peak_is_that_above_the_inputs():
    peak = measure.peak_above_inputs(partial(take, 50, 100), CPU)
    assert isinstance(peak, int) and 149 < peak / MIB < 158


@LINUX
def test_a_child_that_cannot_get_its_memory_is_a_result():
    assert measure.peak_above_inputs(partial(take, 1, 2**40), CPU) == Failed(measure.OUT_OF_MEMORY)


def test_inputs_are_like_those_of_a_model():
    inputs = bench.make_inputs((400, 64, 3000), CPU)
    scores = inputs.hidden.float() @ inputs.weight.float().T
    share = scores.softmax(-1).gather(-1, inputs.labels[:, None])[:, 0]
    assert 2.3 < scores[200:].std() < 2.7
    assert share.min() < 1e-5 and share.max() > 0.9999 and 0.05 < (share > 0.9).float().mean() < 0.6


def test_the_truth_is_what_autograd_gets_in_fp64():
    inputs = bench.make_inputs((30, 16, 9000), CPU)
    rows = torch.tensor([0, 7, 29])
    hidden = inputs.hidden[rows].double().requires_grad_()
    scores = hidden @ inputs.weight.double().T / 0.7
    logprobs = scores.log_softmax(-1).gather(-1, inputs.labels[rows, None])[:, 0]
    logprobs.backward(inputs.gradient[rows].double())
    exact = bench.truth(inputs, 0.7, rows)
    torch.testing.assert_close(exact, (logprobs.detach(), hidden.grad), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", bench.implementations(CPU))
def test_every_implementation_computes_the_same(name):
    implementation = bench.implementations(CPU)[name]
    if implementation.module and not find_spec(implementation.module.split(".")[0]):
        pytest.skip("not installed")
    inputs = bench.make_inputs((50, 32, 500), CPU)
    rows = torch.arange(25, 50)  # where nobody's gradient cancels
    given = inputs._replace(weight=implementation.head(inputs.weight))
    found = bench.call(implementation, given, 0.8, backward=True)
    assert found[0].shape == (50,) and found[1].shape == (50, 32) and found[1].dtype == torch.bfloat16
    if implementation.is_exact:
        error = bench.errors(found, bench.truth(inputs, 0.8, rows), rows)
        assert error.logprob_max < 0.15 and error.gradient_max < 0.05  # bf16 logits of 16 are off by 0.06
        (scored,) = bench.call(implementation, given, 0.8, backward=False)
        assert torch.equal(scored, found[0]) and not scored.requires_grad
    assert all(x.grad is None for x in tree_leaves(given.weight)) and not inputs.hidden.requires_grad


def test_the_bare_products_are_those_of_a_training_pass():
    inputs = bench.make_inputs((20, 32, 500), CPU)
    _, products = bench.call(bench.implementations(CPU)["two bare GEMMs"], inputs, 1.0, backward=True)
    hidden, weight = inputs.hidden.double(), inputs.weight.double()
    torch.testing.assert_close(products.double(), hidden @ weight.T @ weight, rtol=0.05, atol=0.3)


@LINUX
def test_the_command_prints_tables_and_writes_json(tmp_path, capsys, monkeypatch):
    sound = bench.implementations(CPU)
    broken = bench.Implementation(lambda *_: 1 / 0, "breaks")
    absent = bench.Implementation(lambda *_: 1 / 0, "a library", module="no_such_library.part")
    monkeypatch.setattr(bench, "implementations", lambda *_: {**sound, "broken": broken, "absent": absent})
    output = tmp_path / "result.json"
    names = ["ours", "full logits fp32", "two bare GEMMs", "broken", "absent"]
    bench.main(["--quick", "--repetitions=1", f"--output={output}", *(f"--only={name}" for name in names)])

    printed = capsys.readouterr()
    assert "ZeroDivisionError" in printed.out and "not installed" in printed.out and "division" in printed.err
    lines = [line for line in printed.out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5 + 2 + 2, "the second table is of those that ran"
    assert all(line.count("|") == lines[0].count("|") for line in lines[:7])

    document = json.loads(output.read_text())
    assert document["versions"]["torch"] == version("torch") and document["machine"]["threads"] > 0
    assert socket.gethostname() not in output.read_text() and str(tmp_path) not in output.read_text()
    ours = document["shapes"][0]["results"]["ours"]
    assert ours["train_s"]["repetitions"] == 1 and ours["errors"]["logprob_max"] < 1e-4
    assert 0 <= ours["train_bytes"] < 64 * MIB
    assert document["shapes"][0]["results"]["broken"] == {"calls": "breaks", "failed": "ZeroDivisionError"}


def test_no_option_is_offered_that_the_device_refuses():
    names = {device: bench.implementations(torch.device(device)) for device in ("cpu", "cuda")}
    assert "ours bf16 tiles" in names["cpu"] and "ours bf16 tiles" not in names["cuda"]


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(SystemExit, match="ours"):
        bench.main(["--only=our"])


def test_updates_in_every_layout_have_one_gradient(tmp_path, in_this_process):
    output = tmp_path / "result.json"
    bench_update.main(["--quick", "--warmups=0", f"--output={output}"])
    results = json.loads(output.read_text())["results"]
    assert list(results) == list(bench_update.LAYOUTS)
    assert all(result["error"] < 0.03 and result["seconds"]["repetitions"] == 1 for result in results.values())


def test_mfu_is_of_the_update_by_hand_and_of_a_known_card_alone():
    work = bench_update.Work("tiny", 1, 1, 3, 2, uneven=False, checkpointing=True, device="cpu")
    layer = 256 * (256 + 64 + 64 + 256) + 3 * 256 * 768
    pairs = 3 * 3 // 2 + 2 * 3 + 2 * 2 // 2
    by_hand = 4 * 4 * layer * (3 + 2) + 4 * 4096 * 256 * 2 + 12 * 256 * 4 * pairs
    assert bench_update.flops(work) == by_hand
    assert bench_update.mfu(work, 2.0, "NVIDIA H100 PCIe") == pytest.approx(by_hand / 2 / 756e12)
    assert bench_update.mfu(work, 2.0, "NVIDIA H100 80GB HBM3") == pytest.approx(by_hand / 2 / 989e12)
    assert bench_update.mfu(work, 2.0, "a card of tomorrow") is None


def test_the_hosts_time_is_measured_alone_and_products_come_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(random_model.SHAPES, "28-tiny-layers", (8, *random_model.SHAPES["28-tiny-layers"][1:]))
    output = tmp_path / "result.json"
    bench_update.main(["--host", "--repetitions=1", "--warmups=0", "--device=cpu", f"--output={output}"])
    found = json.loads(output.read_text())
    by_outline, own = (
        {name: found["host"][f"{name}, by {way}"] for name in ("update", "reference")}
        for way in ("outline", "the model's own layers")
    )
    for way in (by_outline, own):
        assert way["update"]["seconds"]["median"] > way["reference"]["seconds"]["median"] > 0
    assert by_outline["update"]["launches"] < own["update"]["launches"] / 2
    assert by_outline["reference"]["launches"] < own["reference"]["launches"] / 2
    assert "28 tiny layers" in capsys.readouterr().out
    policy = bench_update.make_policy("28-tiny-layers", "cpu", "", gradient_checkpointing=True, bf16=False)
    layer = policy.decoder.layers[0].mlp.up_proj.base_layer
    with torch.no_grad():
        assert layer(torch.ones(1, 64)).any()
        with bench_update.as_on_a_gpu():
            assert not layer(torch.ones(1, 64)).any()
        assert layer(torch.ones(1, 64)).any()


@LINUX
def test_rungs_have_the_gradient_and_optimizers_their_bytes(tmp_path):
    output = tmp_path / "result.json"
    names = ["gradient_checkpointing, tiled_mlp", bench_update.PEFTS, "none of these"]
    bench_update.main(
        [
            "--quick",
            "--rungs",
            "--warmups=0",
            "--device=cpu",
            f"--output={output}",
            *(f"--only={name}" for name in names),
        ]
    )
    found = json.loads(output.read_text())
    assert list(found["results"]) == names
    assert found["results"][bench_update.PEFTS]["error"] > 0, "computed another way"
    assert all(result["error"] < 0.03 and result["peak_bytes"] > 0 for result in found["results"].values())
    work = bench_update.Work(**found["work"])
    policy = bench_update.make_policy("tiny", "cpu", "", gradient_checkpointing=False)
    sizes = [p.numel() for p in policy.parameters_of(policy.adapter).values()]
    states = {name: result["state_bytes"] for name, result in found["optimizers"].items()}
    assert states["adamw_torch"] == states["adamw_torch_fused"] == 8 * sum(sizes)
    assert 2 * sum(sizes) < states["adamw_8bit"] < 8 * sum(sizes)
    not_on = {
        device: {n for n in bench_update.RUNGS if not bench_update.serves(work._replace(device=device), n)}
        for device in ("cpu", "cuda")
    }
    tied = "gradient_checkpointing, offload_embedding"
    assert not_on["cuda"] == {tied}
    assert not_on["cpu"] == {tied, "gradient_checkpointing, activation_offloading", bench_update.LIGERS}


def test_products_with_4_bit_weights_are_timed_by_rows(tmp_path, capsys):
    output = tmp_path / "result.json"
    bench_gemm_4bit.main(["--quick", "--warmups=0", "--device=cpu", f"--output={output}"])
    results = json.loads(output.read_text())["results"]
    assert set(results) == set(bench_gemm_4bit.IMPLEMENTATIONS) - {"fused"}
    assert all(result["error"] < 0.01 for rows in results.values() for result in rows.values())
    assert bench_gemm_4bit.sizes("qwen2.5-7b")[1] == (512, 3584)
    assert "| bf16 weights" in capsys.readouterr().out
    bench_gemm_4bit.main(["--quick", "--warmups=0", "--device=cpu", "--only=fused"])
    assert "Error" in capsys.readouterr().out, "a failure is a cell"


def test_a_step_of_the_gated_delta_rule_is_timed_beside_transformers_own(tmp_path, capsys):
    output = tmp_path / "result.json"
    bench_delta_step.main(["--quick", f"--output={output}"])
    (entry,) = json.loads(output.read_text())["slots"]
    assert set(entry["results"]) >= {"lowmem_grpo, PyTorch twin", "transformers"}
    assert all(result["error"] < 1e-6 for result in entry["results"].values() if "failed" not in result)
    assert "| GB/s of states |" in capsys.readouterr().out


@pytest.fixture
def saved(monkeypatch):
    """What a benchmark saves, as often as it does: that of a process that is stopped is the last one."""
    found, save = [], measure.save
    monkeypatch.setattr(measure, "save", lambda document, path: found.append(document) or save(document, path))
    return found


def test_the_fastest_product_of_each_shape_is_kept_for_a_card(tmp_path, monkeypatch, capsys, saved):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table, output = tmp_path / "lowmem_grpo/nf4_product.json", tmp_path / "result.json"
    table.parent.mkdir()
    table.write_text(json.dumps({"another card": {"1x64": 3}, "cpu": {"256x256": 77, "1x64": 5}}))
    arguments = ["--quick", "--choose", "--warmups=0", "--device=cpu", f"--output={output}"]
    bench_gemm_4bit.main(arguments)
    assert [len(one["results"]) for one in saved] == [1, 2, 3, 4]
    results = json.loads(output.read_text())["results"]
    assert not list(suite.faults(results))
    assert [result["key"] for result in results.values()] == ["256+64+64x256", "256x256", "768+768x256", "256x768"]
    kept = json.loads(table.read_text())
    assert kept["another card"] == {"1x64": 3} and kept["cpu"].pop("1x64") == 5
    assert kept["cpu"] == {result["key"]: result["splits"] for result in results.values()}
    for result in results.values():
        total = {
            name: math.prod(rows[name]["median"] for rows in result["by_rows"].values())
            for name in result["by_rows"]["1"]
        }
        assert total[result["chosen"]] == min(total.values())
        assert (result["splits"] is None) == (result["chosen"] == "bitsandbytes")
    assert "split in 2" in capsys.readouterr().out and "split in 2" in report.tables(saved[0])


def test_budgets_are_predicted_without_a_gpu(tmp_path, capsys):
    output = tmp_path / "result.json"
    bench_budgets.main(
        ["--shape=tiny", "--vram_budget=0.7GB", "--predict_only", f"--output={output}", "--max_completion_length=64",
         "--max_prompt_length=32"]
    )  # fmt: skip
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny"))
    assert float(row.split("|")[2].split()[0]) <= 0.7
    (result,) = json.loads(output.read_text())["results"]
    assert result["plan"]["fits"]
    for remedy, shown in (("choose a smaller model", "no"), ("max_completion_length=96 would fit", "no (96 tokens)")):
        assert bench_budgets.cell({"plan": {"fits": False, "remedy": remedy}}) == shown


def test_a_prediction_is_there_before_it_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(planner, "limit_memory", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(bench_budgets, "measured_peaks", lambda *_: {"memory/update/peak_mib": 1.0})
    config = GRPOConfig(max_completion_length=32, max_prompt_length=32, vram_budget="1GB")
    predicted, measured = bench_budgets.try_one("tiny", config, True)
    assert predicted["plan"]["fits"] and measured == predicted | {"measured": {"memory/update/peak_mib": 1.0}}


of_the_programme = [f"tiny-{name}" for name in ("qwen3.5-4b", "gpt-oss-20b", "qwen3-30b-a3b")]


@pytest.mark.parametrize(
    "shape", ["tiny", *(pytest.param(shape, marks=pytest.mark.slow) for shape in of_the_programme)]
)
def test_a_step_whose_peaks_a_gpu_would_measure_runs(shape):
    config = GRPOConfig(
        use_cpu=True, max_completion_length=8, max_prompt_length=8, prompts_per_step=2, num_generations=2
    )
    found = bench_budgets.measured_peaks(shape, config, "cpu")
    assert {"memory/rollout/peak_mib", "memory/reference/peak_mib", "memory/update/peak_mib"} <= found.keys()
    result = {"measured": found, "plan": {"fits": True, "changes": [], "peak": 10**9}}
    assert bench_budgets.cell(result).startswith("1.0; measured ")
    found["memory/out_of_memory"] = 1
    assert bench_budgets.cell(result).endswith(", after an out-of-memory")


def test_the_error_of_sampling_is_rounding_in_fp32_and_larger_in_int8(capsys):
    sampling_error.main(["--prompts", "2", "--num_generations", "2"])
    lines = [line.strip("| ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| fl", "| bf"))]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    means = {(dtype, weights, kv): float(mean) for dtype, weights, kv, mean, _ in cells}
    assert len(means) == 8
    assert means["float32", "4bit", "full"] < 1e-5 < 1e-4 < means["float32", "4bit", "int8"] < 0.01
    assert means["bfloat16", "4bit", "full"] < 0.01


@pytest.mark.parametrize("in_a_process_of_its_own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_and_a_run_beside_trl_are_measured(in_a_process_of_its_own, tmp_path, capsys, monkeypatch):
    """A peer that fails is a row of its own and not the end."""
    pytest.importorskip("trl")
    output, in_a_process = tmp_path / "step.json", trainers._in_a_process

    def here(command, limit_s):
        """One in a process of its own, as all are outside of tests, or all here, which has imported everything."""
        if in_a_process_of_its_own and bench_step.__name__ in command and "lowmem_grpo" in command:
            return in_a_process(command, limit_s)
        sys.modules[command[2]].main(command[3:])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(trainers, "_in_a_process", here)
    for module, name in (
        ("lowmem_grpo.inputs.training", "load_policy"),
        ("lowmem_grpo.run.meter", "time"),
    ):  # what run_ours replaces
        monkeypatch.setattr(sys.modules[module], name, getattr(sys.modules[module], name))
    small = ["--shape=tiny", "--prompts=2", "--num_generations=2", "--prompt_length=16", "--max_completion_length=4"]
    names = ["lowmem_grpo", "TRL, no checkpointing, as on a GPU"]
    bench_step.main([*small, "--steps=2", "--only", *names, f"--output={output}"])
    for (found,) in json.loads(output.read_text())["results"].values():
        assert found["step_s"] > 0 and found["peak_mib"] > 0 and len(found["rewards"]) == 2
        assert set(found["phases_s"]) == {"rollout", "reference", "update"}
        assert 0.5 * found["step_s"] < sum(found["phases_s"].values()) < 1.2 * found["step_s"]
    monkeypatch.setattr(bench_learning, "HELD_OUT", 8)
    bench_learning.main(["--steps=1", "--seeds=0", "--only", "lowmem_grpo"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| lowmem_grpo")]
    assert "never" in row
    assert "no such thing" in bench_learning.tables({"results": {"TRL": [{"failed": "no such thing"}]}})


@pytest.mark.slow
def test_ppo_is_measured_beside_grpo_by_phase(tmp_path, capsys):
    output = tmp_path / "ppo.json"
    small = ["--shape=tiny", "--completions=8", "--prompt_length=16", "--max_completion_length=4", "--steps=2"]
    names = ["GRPO, groups of 8", "PPO, one a prompt"]
    bench_ppo.main([*small, "--only", *names, f"--output={output}"])
    found = json.loads(output.read_text())
    grpo, ppo = (found["results"][name][0] for name in names)
    for what in ("phases_s", "phases_peak_mib"):
        assert set(ppo[what]) == {"rollout", "reference", "values", "update", "critic"}
        assert set(ppo[what]) - set(grpo[what]) == {"values", "critic"}
    times, peaks = bench_ppo.tables(found).split("\n\n")
    assert "CPU-ms of a step" in times and "peak above the model" in peaks
    assert capsys.readouterr().out.strip().endswith("|")


def test_the_table_of_ppo_says_how_soon_a_method_learnt_and_what_failed():
    learnt = {"evaluations": [[0, 0.4], [5, 0.91]], "step_s": 2.0, "phases_s": {"rollout": 1.0}}
    runs = {
        "PPO, one a prompt": [{**learnt, "phases_peak_mib": {"rollout": 3.0}}],
        "RLOO, groups of 8": [{"failed": "no"}],
    }
    shown = bench_ppo.tables({"work": {"completions": 64}, "machine": {}, "results": runs})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    assert ["PPO, one a prompt", "0.91", "5", "320", "10"] in cells and ["RLOO, groups of 8", "no", "", "", ""] in cells


def test_unsloth_is_imported_first_in_a_process_of_its_own(tmp_path, monkeypatch):
    """A stand-in for it, since it imports on CUDA alone; a peer that is not done in time or not there is a row."""
    (tmp_path / "unsloth.py").write_text("import sys; first = 'torch' not in sys.modules")
    program = "import json, sys, torch, unsloth; print(json.dumps({'argv': sys.argv[1:], 'first': unsloth.first}))"
    (tmp_path / "peer.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = trainers.in_turns("peer", [trainers.UNSLOTH], [["--steps=2"]], save=lambda results: None)
    assert found == {"Unsloth": [{"argv": ["--one", "Unsloth", "--steps=2"], "first": True}]}
    (tmp_path / "peer.py").write_text("import time; time.sleep(60)")
    found = trainers.in_turns("peer", [trainers.UNSLOTH], [[]], save=lambda results: None, limit_s=0.5)
    assert found["Unsloth"][0]["failed"].startswith(measure.NOT_DONE) and not list(suite.faults(found))
    monkeypatch.setattr(measure, "missing", lambda module: module == "unsloth")
    found = trainers.in_turns("peer", [trainers.UNSLOTH], [[]], save=lambda results: None)
    assert found == {"Unsloth": [{"failed": measure.NOT_INSTALLED}]} and not list(suite.faults(found))


def test_a_saved_random_model_made_layer_by_layer_is_loaded_as_it_was(tmp_path):
    """As on a GPU, where make_random_model makes it so; its embedding is its head."""
    model = made(make_config("tiny", [0], 5), torch.device("cpu"), in_4bit=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(torch.arange(4)[None]).logits, loaded(torch.arange(4)[None]).logits)


def test_ways_to_sample_are_measured(tmp_path, in_this_process):
    output = tmp_path / "rollout.json"
    names = ["ours, int8 keys and values", "generate_batch"]
    bench_rollout.main(
        ["--quick", "--warmups=0", "--device=cpu", f"--output={output}", *(f"--only={name}" for name in names)]
    )
    (found,) = json.loads(output.read_text())["lengths"]
    assert list(found["results"]) == names
    demo = bench_rollout.Work(bench_rollout.DEMO, 3, 2, 8, 4, 100, "cpu")
    assert len(demo.texts()) == 3
    for name in ("ours", "ours, dense weights", "generate, static cache"):
        assert bench_rollout.build(name, demo, first=True, small=True)()
    assert all(result["tokens_per_s"] > 0 for result in found["results"].values())
    assert all(result["peak_bytes"] == result["first_peak_bytes"] == 1 for result in found["results"].values())


def test_a_step_of_decoding_is_the_difference_of_two_rollouts(tmp_path, capsys, monkeypatch):
    """Of 8 and of 4 tokens, each once before it counts, by a clock of its own."""
    clock = iter([9.0, 5.0, 4.0, 3.0])
    monkeypatch.setattr(measure, "seconds_of", lambda run, turn, device: (run(turn), next(clock))[1])
    output = tmp_path / "decode.json"
    bench_decode.main(["--quick", "--prompts=2", "--only=ours", "--device=cpu", f"--output={output}"])
    found = json.loads(output.read_text())
    (result,) = found["results"].values()
    assert (result["longest"], result["first_s"], result["later_s"]) == (8, 9.0, 5.0)
    assert result["step_s"] == (5 - 3) / 4 and result["tokens_per_s"] == 16 / 0.5
    assert result["rollout_tokens_per_s"] == 16 * 8 / 5
    assert result["metrics"]["rollout/slots"] == 16
    assert "| ours " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_decode.main(["--longest=1"])
    assert "has no half" in capsys.readouterr().err


def test_kernels_overlap_from_now_on_where_steps_are_faster_and_the_same(tmp_path, capsys, monkeypatch):
    """By a clock of its own; a CPU has nothing that overlaps, so that the rest is said by hand."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bench_overlap, "ROWS", (8,))
    # Twice each without, with, and without again: uneven; of 4 tokens; of 2.
    clock = iter([1.0] * 6 + [9.0, 9.0, 9.0, 8.0, 6.0, 8.0] + [9.0, 9.0, 9.0, 4.0, 3.0, 4.0])
    monkeypatch.setattr(measure, "seconds_of", lambda run, turn, device: (run(turn), next(clock))[1])
    overlap.table_path().parent.mkdir()
    overlap.table_path().write_text('{"another card": true}')
    output = tmp_path / "overlap.json"
    bench_overlap.main(["--quick", "--choose", "--device=cpu", f"--output={output}"])
    found = json.loads(output.read_text())
    assert found["results"]["8"]["steps"] == {"without": 2.0, "with": 1.5, "without, again": 2.0}
    assert found["results"]["8"]["differing"] == {"with": 0, "without, again": 0} and found["chosen"] is False
    assert json.loads(overlap.table_path().read_text()) == {"another card": True, "cpu": False}
    assert "| with, not done |" in capsys.readouterr().out and not list(suite.faults(found))

    def chosen(where=lambda results: results, **change):
        results = json.loads(output.read_text())["results"]
        for run in (*results.values(), results["8"]["half"]):
            run |= {"overlapped": True, "replayed": 9}
        where(results).update(change)
        return bench_overlap.is_faster(results)

    assert chosen() and not chosen(failed={"failed": "out of memory"})
    assert not chosen(lambda results: results["8"]["half"], overlapped=False)
    assert not chosen(lambda results: results["64, uneven"]["differing"], **{"with": 1})
    assert not chosen(lambda results: results["8"]["steps"], **{"with": 1.99}), "within noise"


def test_completions_differ_by_a_token_or_a_log_probability():
    one, other, third = (Completion([1, last], logprobs, logprobs, "length") for last, logprobs in (
        (2, torch.tensor([-1.0, -2.0])), (2, torch.tensor([-1.0, -2.5])), (3, torch.tensor([-1.0, -2.0]))))  # fmt: skip
    found = [bench_overlap.difference(one, x) for x in (one, other, third)]
    assert found == [0.0, 0.5, 1000.0]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_random_model("tiny", None, folder, 4096)
    return str(folder)


def test_every_implementation_of_the_scaling_has_the_same_gradient(tiny_folder):
    pytest.importorskip("trl")
    work = bench_scaling.Work(16, 24, 4, 4096)
    policy, trainer = bench_scaling.our_policy(tiny_folder, "cpu"), bench_scaling.their_trainer(tiny_folder, "cpu")
    layers = [*policy.decoder.layers, *trainer.model.get_submodule("base_model.model.model.layers").children()]
    assert all(layer.gradient_checkpointing and layer.training for layer in layers), "both recompute activations"
    sides = policy.parameters_of(policy.adapter), bench_scaling.adapters(trainer)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sides[0].items():  # TRL's adapters are in bf16
            value = 0.02 * torch.randn(parameter.shape, generator=draw).bfloat16()
            parameter.copy_(value)
            sides[1][name].copy_(value)
    gradients = {}
    for name, run in bench_scaling.IMPLEMENTATIONS.items():
        parameters = run(tiny_folder, "cpu", work)
        gradients[name] = torch.cat([parameters[key].grad.float().flatten() for key in sides[0]])
        for parameter in parameters.values():
            parameter.grad = None
    exact = gradients.pop("full logits")
    assert all((gradient - exact).norm() < 0.04 * exact.norm() for gradient in gradients.values())


def test_a_slope_is_that_of_the_points():
    assert bench_scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert math.isnan(bench_scaling.exponent([1], [3]))
    sweep = {"varied": "length", "sizes": [1000, 3000], "results": {"ours": [{"seconds": 2.0}, {"seconds": 8.0}]}}
    sweep["results"]["other"] = [{"seconds": 2.0}, {"reason": "out of memory"}]
    rows = bench_scaling._table(sweep, "seconds", 1, "s", ".3g").splitlines()
    assert [cell.strip() for cell in rows[2].split("|")[2:6]] == ["2", "8", "1.26", "3"]
    assert [cell.strip() for cell in rows[3].split("|")[3:6]] == ["out of memory", "nan", "nan"]


@LINUX
def test_a_call_over_its_limit_is_out_of_memory_and_larger_ones_are_not_tried(tiny_folder):
    works = [bench_scaling.Work(16, length, 2, 4096) for length in (8, 16384, 20000)]
    first, *others = bench_scaling.measure_row("lowmem_grpo", works, lambda vocabulary: tiny_folder, CPU, 100 * 2**20)
    assert isinstance(first, measure.Once) and first.seconds > 0
    assert others == [Failed("out of memory"), Failed("not tried: out of memory")]


def test_a_profile_is_of_the_phases_after_the_first_and_of_what_ran_in_them():
    def event(name, start, end, own):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), self_cpu_time_total=own)

    step = [
        ("phase/rollout", 0, 100, 40), ("aten::mm", 10, 30, 20), ("aten::view", 40, 41, 1), ("aten::copy_", 50, 60, 9),
        ("phase/update", 200, 300, 50), ("MmBackward0", 210, 250, 7), ("aten::bmm", 220, 240, 13),
        ("aten::mm", 310, 320, 99), ("aten::mm", 290, 310, 99),
    ]  # fmt: skip
    events = [event(name, 1000 * k + a, 1000 * k + b, 1e3 * own) for k in range(3) for name, a, b, own in step]
    assert profile_step.milliseconds(events, 2) == {
        "rollout": {
            profile_step.PYTHON: 40, "matrix products": 20, profile_step.DISPATCH: 1, "copies, casts, lookups": 9,
        },
        "update": {profile_step.PYTHON: 50, profile_step.FUNCTIONS: 7, "matrix products": 13},
    }  # fmt: skip
    kinds = {name: profile_step.kind_of(f"aten::{name}") for name in ("exp", "exp_", "expand", "mul_", "index_put")}
    numbers = "sums, products, functions of numbers"
    assert list(kinds.values()) == [numbers, numbers, profile_step.DISPATCH, numbers, profile_step.DISPATCH]


def test_phases_are_named_for_a_profiler():
    with torch.profiler.profile() as profiled:
        with Meter(torch.device("cpu")).phase("rollout"):
            torch.mm(torch.ones(3, 3), torch.ones(3, 3))
        with Meter(torch.device("cpu")).phase("rollout"):
            torch.mm(torch.ones(3, 3), torch.ones(3, 3))
    found = profile_step.milliseconds(profiled.events(), 1)
    assert found["rollout"]["matrix products"] > 0 and found["rollout"][profile_step.PYTHON] > 0


@pytest.mark.parametrize("in_4bit", [True, False])
def test_a_random_model_made_layer_by_layer_is_a_model(in_4bit):
    model = made(make_config("tiny", [0], 5), torch.device("cpu"), in_4bit)
    with torch.no_grad():
        logits = model(torch.arange(4)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.05, "positions or weights are missing"
    dense = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert (dense == ["lm_head"]) == in_4bit and (in_4bit or len(dense) == 1 + 4 * 7)


@pytest.mark.parametrize(
    "family, stack", [("qwen3.5-4b", None), ("gpt-oss-20b", Mxfp4Stack), ("qwen3-30b-a3b", Nf4Stack)]
)
def test_a_random_model_of_a_family_has_its_experts_in_the_4_bits_of_its_checkpoint(family, stack):
    model = made(make_config(f"tiny-{family}", [0], 5), torch.device("cpu"), in_4bit=True)
    with torch.no_grad():
        logits = model(torch.arange(4)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0.05
    found = {type(module) for module in model.modules()} & {Mxfp4Stack, Nf4Stack}
    assert found == ({stack} if stack else set())
    assert make_config(family, 0, 1).vocab_size == vocabulary_of(family)


def test_what_reads_experts_is_timed_with_its_error_and_bytes(tmp_path, capsys, saved):
    bench_expert_product.main(["--quick", f"--output={tmp_path / 'x.json'}"])
    assert [[len(by_rows) for by_rows in one["shapes"].values()] for one in saved] == [[1], [2], [2, 1], [2, 2]]
    found = json.loads((tmp_path / "x.json").read_text())
    assert not list(suite.faults(found)) and list(found["shapes"]) == ["tiny-qwen3-30b-a3b", "tiny-gpt-oss-20b"]
    for by_rows in found["shapes"].values():
        assert list(by_rows) == ["1", "4"]
        results = [result for entry in by_rows.values() for result in entry["results"].values()]
        assert len(results) == 6 and all(0 < result["error"] < 4e-3 for result in results)  # rounded to bf16
    # Two of 4 matrices (128, 64) and (64, 64) a row, at 4 bits and an exponent for 32.
    assert found["shapes"]["tiny-gpt-oss-20b"]["1"]["bytes"] == 2 * (128 + 64) * 64 * 17 / 32
    assert "tiny-gpt-oss-20b: a layer's experts" in capsys.readouterr().out


def test_the_sums_are_others_to_train_on_and_to_measure_on():
    train, held_out = bench_sums.rows()
    assert len(train) == 2000 and len(held_out) == bench_sums.HELD_OUT
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert all(eval(row["prompt"].splitlines()[-1].rstrip(" =")) == int(row["solution"]) for row in train + held_out)
    assert bench_sums.sum_reward([" 68\n12", "68 or so", "", "068"], ["68"] * 4) == [1.0, 0.0, 0.0, 0.0]
    texts = [f" {n}" for n in range(64)]
    shuffled = bench_sums.shuffled_reward(texts, ["1"] * 32 + [str(n) for n in range(32, 64)])
    assert sum(shuffled) == 33 and shuffled != sorted(shuffled)


def test_every_token_with_a_line_break_ends_a_completion_of_the_sums(tiny_folder, tmp_path):
    folder = bench_sums.with_line_ends(Path(tiny_folder), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert {tokenizer.eos_token_id, *tokenizer("\n").input_ids} == set(ends)


def test_a_curve_of_the_sums_is_shown_with_its_intervals():
    run = {
        "evaluations": [(0, 0.3), (20, 0.6)],
        "step_s": 4.0,
        "peak_mib": 900.0,
        "sampling_differences": [0.02] * 20 + [None],
    }
    work = {"model": "smollm2", "seeds": [0, 1], "steps": 20, "every": 20}
    found = {"machine": {}, "work": work, "results": {"lowmem_grpo": [run, {"failed": "out of memory"}], "TRL": [run]}}
    lines = bench_sums.tables(found).splitlines()
    assert "0.300 (0.24 to 0.37)" in lines[2] and "0.0200" in lines[2]
    assert "out of memory" in lines[3] and "TRL" in lines[4]


def test_what_the_example_of_sums_printed_and_logged_is_shown_by_seed(tmp_path):
    ends = {"eval_pass@1": (0.3, 0.6), "eval_pass@1/ci_low": (0.24, 0.53), "eval_pass@1/ci_high": (0.37, 0.67)}
    change = {
        "eval_pass@1/difference": 0.3,
        "eval_pass@1/difference/ci_low": 0.2,
        "eval_pass@1/difference/ci_high": 0.4,
    }
    lines = [
        {"step": 0, **{name: values[0] for name, values in ends.items()}},
        {"step": 1, "loss": 0.0, "reward": 0.5},
        {"step": 1, **{name: values[1] for name, values in ends.items()}, **change},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run = bench_example.outcome(tmp_path, "a curve\n200 CPU-seconds, peak resident memory 1968 MiB; adapter in x\n")
    row = bench_example.tables({"work": {"model": "smollm2", "seeds": [3]}, "results": [run]}).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "seed 3", "0.300 (0.24 to 0.37)", "0.600 (0.53 to 0.67)", "+0.300 (+0.20 to +0.40)", "200", "1968",
    ]  # fmt: skip
    assert run["rewards"] == [0.5]
    with pytest.raises(ValueError, match="no CPU-seconds"):
        bench_example.outcome(tmp_path, "")
