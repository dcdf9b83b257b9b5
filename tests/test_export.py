"""A merged model against PEFT's own merge, and what it says against what was trained."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_server import Hub
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_experts import mxfp4_checkpoint
from tiny_models import CONFIGS, DEMO_MODEL, make_model, make_wrapper, wake_adapters
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from lowmem_grpo.cli import main
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError, NotSavedError
from lowmem_grpo.exporting import check
from lowmem_grpo.exporting import export as exports
from lowmem_grpo.exporting.check import Difference, Share
from lowmem_grpo.exporting.export import Checked, _of_share, _refuse_difference, as_text, export
from lowmem_grpo.exporting.files import NEEDED, NOT_NEEDED, other_files, write_tensors
from lowmem_grpo.exporting.gguf import convert
from lowmem_grpo.exporting.merge import MergePlan, MergeSettings, merge
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.model.load import load_policy
from lowmem_grpo.model.product_4bit import dequantized

CPU = torch.device("cpu")
FP32 = torch.float32
NO_BF16 = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}


def make_run(folder: Path, family: str = "qwen2", dtype=torch.bfloat16, model=None, peft_config=None, **settings):
    """A base's folder, where it is not there, and a run's with a woken adapter of it; returns the policy."""
    if not (folder / "base").is_dir():
        model = make_model(family) if model is None else model
        model = model if dtype is None else model.to(dtype)
        model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder / "base")
    policy = load_policy(
        str(folder / "base"),
        AutoTokenizer.from_pretrained(DEMO_MODEL),
        GRPOConfig(**{**NO_BF16, **settings}),
        peft_config,
    )
    wake_adapters(policy)
    policy.save(folder / "run/adapter")
    kept = {"load_in_4bit": True, "bf16": False, **settings}
    (folder / "run/grpo_config.json").write_text(json.dumps(kept), encoding="utf-8")
    return policy


def merged(folder: Path, onto: str = "nf4", dtype=FP32, out: str = "out") -> dict[str, torch.Tensor]:
    """The tensors that a merge writes of a run that make_run() made."""
    (folder / out).mkdir()
    settings = MergeSettings(onto, dtype, FP32, CPU)
    merge(MergePlan(str(folder / "run/adapter"), folder / "base", settings), folder / out)
    found = {}
    for path in (folder / out).glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_a_merge_onto_the_original_is_pefts_own(tmp_path):
    make_run(tmp_path)
    found = merged(tmp_path, "original")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=FP32)
    whole = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).merge_and_unload().state_dict()
    assert found.keys() <= whole.keys()
    for name, values in found.items():
        assert values.dtype == FP32
        torch.testing.assert_close(values, whole[name], rtol=0, atol=1e-6)


def merged_by_peft(policy) -> dict[str, torch.Tensor]:
    """The adapted weights of a policy's 4-bit base, dequantized, with PEFT's own products added."""
    adapted = {name: module for name, module in policy.base.named_modules() if hasattr(module, "lora_A")}
    assert adapted
    return {
        f"{name}.weight": dequantized(layer.base_layer, FP32) + layer.get_delta_weight("default")
        for name, layer in adapted.items()
    }


def test_a_merge_onto_nf4_is_what_training_held_and_its_adapter(tmp_path):
    policy = make_run(tmp_path)
    found = merged(tmp_path)
    expected = merged_by_peft(policy)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)
    base = load_file(tmp_path / "base/model.safetensors")
    for name in found.keys() - expected.keys():
        assert torch.equal(found[name], base[name].float()), name


IDS = torch.randint(3, 120, (1, 12), generator=torch.Generator().manual_seed(0))


def logits_of(folder: Path, kind=AutoModelForCausalLM) -> torch.Tensor:
    with torch.inference_mode():
        return kind.from_pretrained(folder, dtype=FP32).eval()(input_ids=IDS).logits


def logits_by(policy) -> torch.Tensor:
    with policy.inference():
        return policy.model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "granite", "qwen3_5_text"])
def test_a_merged_model_of_each_family_says_what_the_policy_says(tmp_path, family):
    policy = make_run(tmp_path, family)
    found = merged(tmp_path)
    assert found.keys() == load_file(tmp_path / "base/model.safetensors").keys()
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_by(policy), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_what_stands_beside_the_decoder_is_written_as_it_was(tmp_path, family):
    policy = make_run(tmp_path, model=make_wrapper(family))
    found, base = merged(tmp_path), load_file(tmp_path / "base/model.safetensors")
    assert found.keys() == base.keys()
    beside = [name for name in base if "visual" in name or "vision" in name]
    assert beside
    for name in beside:
        assert torch.equal(found[name], base[name].float())
    kind = AutoModelForImageTextToText
    torch.testing.assert_close(logits_of(tmp_path / "out", kind), logits_by(policy), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_stays_tied_and_another_stays_apart(tmp_path, tied):
    torch.manual_seed(0)
    config = CONFIGS["qwen2"]()
    config.tie_word_embeddings = tied
    make_run(tmp_path, model=AutoModelForCausalLM.from_config(config))
    assert ("lm_head.weight" in merged(tmp_path)) is not tied
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


VARIANTS = {
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "dora": {"use_dora": True},
    "modules trained whole": {"modules_to_save": ["norm"]},
    "biases of lora": {"target_modules": ["q_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_kind_of_lora_is_merged_as_peft_does(tmp_path, variant):
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **VARIANTS[variant]}
    make_run(tmp_path, peft_config=LoraConfig(**given))
    found = merged(tmp_path, "original")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=FP32)
    before = {name: values.clone() for name, values in base.state_dict().items()}
    whole = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).merge_and_unload().state_dict()
    assert any(not torch.equal(before[name], values) for name, values in found.items())
    for name, values in found.items():
        torch.testing.assert_close(values, whole[name], rtol=0, atol=2e-6)


def test_files_and_index_are_as_the_bases(tmp_path):
    make_run(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    (tmp_path / "base/model.safetensors").unlink()
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_bytes())
    assert len(set(index["weight_map"].values())) > 2
    found = merged(tmp_path, dtype=None)
    written = json.loads((tmp_path / "out/model.safetensors.index.json").read_bytes())
    assert written["weight_map"] == index["weight_map"]
    assert written["metadata"]["total_size"] == sum(values.nbytes for values in found.values())
    assert {values.dtype for values in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_bytes())["dtype"] == "bfloat16"


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    make_run(tmp_path)
    plan = MergePlan(str(tmp_path / "run/adapter"), tmp_path / "base", MergeSettings("nf4", None, FP32, CPU))
    before: list[weakref.ref] = []

    def tensor(name: str) -> torch.Tensor:
        assert not before or before[-1]() is None
        values = plan.tensor(name)
        before.append(weakref.ref(values))
        return values

    write_tensors(tmp_path, plan.layout, tensor, {})
    assert len(before) == len(plan.layout)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(plan.layout)


def test_a_checkpoint_in_4_bits_is_written_in_16(tmp_path):
    make_model("qwen2").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quantization, dtype="bfloat16")
    policy = make_run(tmp_path, model=small, dtype=None)
    found = merged(tmp_path)
    assert not any("absmax" in name for name in found)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_bytes())
    for name, weight in merged_by_peft(policy).items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss"])  # which have their experts apart, and as one tensor
def test_experts_are_what_training_held_too(tmp_path, family):
    policy = make_run(tmp_path, family, peft_config=LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    found, base = merged(tmp_path), load_file(tmp_path / "base/model.safetensors")
    assert found.keys() == base.keys()
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_by(policy), rtol=0, atol=1e-4)
    found = merged(tmp_path, "original", out="original")
    experts = [name for name in found if ".experts." in name]
    assert experts and all(torch.equal(found[name], base[name].float()) for name in experts)


def test_experts_in_mxfp4_stay_as_they_are_beside_what_is_merged(tmp_path):
    mxfp4_checkpoint(tmp_path / "base")
    policy = make_run(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    base = load_file(tmp_path / "base/model.safetensors")
    for onto in ("nf4", "original"):
        found = merged(tmp_path, onto, out=onto)
        experts = [name for name in found if name.endswith(("_blocks", "_scales"))]
        assert len(experts) == 8 and all(torch.equal(found[name], base[name]) for name in experts)
    torch.testing.assert_close(logits_of(tmp_path / "nf4"), logits_by(policy), rtol=0, atol=1e-4)
    changed = [name for name in found if not torch.equal(found[name], base[name].to(found[name].dtype))]
    assert len(changed) == 2 * 2
    layer: Any = policy.model.get_submodule(f"base_model.model.{changed[0].removesuffix('.weight')}")
    expected = base[changed[0]].float() + layer.get_delta_weight("default")
    torch.testing.assert_close(found[changed[0]], expected, rtol=0, atol=1e-6)


def make_small_run(folder: Path, scale: float = 1.0, family: str | None = None) -> Path:
    """A run with samples, of the demo's model or a random one; returns the adapter's folder."""
    policy = make_run(folder, model=make_model(family) if family else AutoModelForCausalLM.from_pretrained(DEMO_MODEL))
    with torch.no_grad():
        for parameter in policy.parameters_of("default").values():
            parameter.mul_(scale)
    policy.save(folder / "run/adapter")
    lines = [{"step": step, "prompt": "12+3=", "completion": text} for step, text in ((0, "7"), (5, "15"), (5, "16"))]
    (folder / "run/samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return folder / "run/adapter"


def test_an_export_is_checked_by_the_completions_of_the_last_evaluation(tmp_path):
    adapter = make_small_run(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    result = export(str(adapter), str(tmp_path / "out"), dtype="float32", use_cpu=True)
    assert result.onto == "nf4" and result.merged == tmp_path / "out"
    assert result.checked is not None and (result.checked.num_texts, result.checked.num_tokens) == (2, 4)
    assert result.checked.merged.largest < 1e-4 < result.checked.base.mean
    assert {path: path.read_bytes() for path in before} == before
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("12+3=").input_ids
    assert "out" in as_text(result)[0]
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "of 4 tokens, its log-probabilities differ" in card and result.checked.share.value == pytest.approx(
        1, abs=1e-3
    )
    assert "AutoModelForCausalLM" in card


def test_the_share_of_what_training_changed_is_told_in_noise_that_is_larger():
    draw = torch.Generator().manual_seed(0)
    base, changed, noise = (scale * torch.randn(400, generator=draw) for scale in (1.0, 0.01, 0.02))
    policy = base + changed
    for part in (0.0, 0.5, 1.0):
        share = Share.of(policy, base + part * changed + noise, base)
        assert abs(share.value - part) < 2 * share.error < 0.3
    changed, *rounding = (scale * torch.randn(2000, generator=draw) for scale in (0.02, 0.02, 0.02, 0.02))
    policy, base, other = changed + rounding[0], rounding[1], rounding[2]
    lost, whole = Share.of(policy, other, base), Share.of(policy, changed + other, base)
    assert lost.value + 2 * lost.error < 0.5 < whole.value - 2 * whole.error
    of_two = Share.of(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), torch.zeros(2))
    assert (of_two.value, of_two.error) == (
        pytest.approx(4 / 10),
        pytest.approx(1 / 3),
    )  # 1/3 and 1 without one of them
    for few in (Share.of(base, other, base), Share.of(policy[:1], base[:1], base[:1])):
        assert few.error == math.inf
        assert "too little of these completions to tell" in _of_share(few)


@pytest.mark.parametrize(("share", "is_refused"), [(Share(0.02, 0.1), True), (Share(0.5, 0.2), False)])
def test_a_merge_that_lost_what_training_changed_is_refused_however_little_that_is(share, is_refused):
    found = Checked(8, 400, Difference(0.02, 0.1, 0.0), Difference(0.02, 0.1, 0.0), share)
    plan: Any = SimpleNamespace(dtype=FP32, settings=SimpleNamespace(onto="nf4"))
    with (
        pytest.raises(
            InputError, match=r"nearer to the base than to the trained policy: 2 % \(\+- 20\) of the way; serve"
        )
        if is_refused
        else nullcontext()
    ):
        _refuse_difference(found, plan, in_4bit=True)


def test_a_merge_that_says_something_else_is_refused_and_leaves_nothing(tmp_path):
    adapter = make_small_run(tmp_path, scale=0.3, family="qwen2")
    with pytest.raises(InputError, match="log-probabilities differ by .* merge onto nf4"):
        export(str(adapter), str(tmp_path / "out"), onto="original", dtype="float32", use_cpu=True)
    assert not list(tmp_path.glob("out*"))


def test_what_a_run_left_no_completions_of_is_asked_a_few_questions(tmp_path):
    adapter = make_small_run(tmp_path)
    (tmp_path / "run/samples.jsonl").unlink()
    result = export(str(adapter), str(tmp_path / "out"), dtype="float32", num_texts=2, use_cpu=True)
    assert result.checked is not None and result.checked.num_texts == 2


@pytest.mark.parametrize(
    ("onto", "dtype", "in_4bit", "remedy"),
    [
        ("original", torch.bfloat16, True, "; merge onto nf4, serve the adapter"),
        ("original", torch.bfloat16, False, "; write it with dtype float32, serve the adapter"),
        ("original", FP32, False, "; serve the adapter"),
        ("nf4", torch.float16, True, "; write it with dtype float32, serve the adapter"),
        ("nf4", FP32, True, "; serve the adapter"),
    ],
)
def test_a_remedy_is_one_that_is_not_refused_in_turn_or_taken_already(onto, dtype, in_4bit, remedy):
    plan: Any = SimpleNamespace(dtype=dtype, settings=SimpleNamespace(onto=onto))
    found = Checked(1, 2, Difference(math.nan, math.nan, math.nan), Difference(1.0, 1.0, 1.0), Share(1.0, 0.0))
    with pytest.raises(InputError, match=remedy):
        _refuse_difference(found, plan, in_4bit=in_4bit)


def test_questions_are_asked_with_the_types_that_the_run_had(tmp_path, monkeypatch):
    policy = make_run(tmp_path, model=AutoModelForCausalLM.from_pretrained(DEMO_MODEL))
    given = []
    monkeypatch.setattr(check, "Sampler", lambda *of: given.append(of[1]) or Sampler(*of))
    config = GRPOConfig(**NO_BF16, load_in_4bit=False)
    assert len(check.texts_of(policy, tmp_path, config, 1)) == 1
    assert given == [replace(config, max_completion_length=64)]


def test_a_prompt_or_a_completion_without_tokens_is_left_out(tmp_path):
    policy = make_run(tmp_path, model=AutoModelForCausalLM.from_pretrained(DEMO_MODEL))
    lines = [
        {"step": 1, "prompt": prompt, "completion": text} for prompt, text in (("", "3"), ("1+2=", ""), ("1+", "2"))
    ]
    (tmp_path / "run/samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    policy.tokenizer.chat_template = None
    (found,) = check.texts_of(policy, tmp_path / "run", GRPOConfig(**NO_BF16), 8)
    assert policy.tokenizer.decode(found.completion) == "2"


def test_an_adapter_that_left_its_run_is_taken_for_one_of_4_bits_with_a_warning(tmp_path):
    adapter = make_small_run(tmp_path).rename(tmp_path / "alone")
    given = {"num_texts": 0, "use_cpu": True}
    with pytest.warns(UserWarning, match="alone is taken to be trained on a base in 4 bits, since there is no grpo_c"):
        assert export(str(adapter), str(tmp_path / "out"), **given).onto == "nf4"
    (tmp_path / "grpo_config.json").write_text('{"load_in_4bit": false}', encoding="utf-8")
    with warnings.catch_warnings(action="error"):
        assert export(str(adapter), str(tmp_path / "other"), **given).onto == "original"


def test_the_file_that_is_loaded_is_the_one_that_is_merged(tmp_path):
    make_run(tmp_path)
    before = merged(tmp_path)
    (tmp_path / "base/model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    after = merged(tmp_path, out="again")
    assert after.keys() == before.keys() and not (tmp_path / "again/model.safetensors.index.json").exists()


def test_what_a_training_or_a_person_left_beside_a_base_is_not_copied(tmp_path):
    for name in ("config.json", "merges.txt", "tokenizer.model", "qwen.tiktoken", "modeling_own.py", "LICENSE.md"):
        (tmp_path / name).touch()
    read = sorted(path.name for path in tmp_path.iterdir())
    for name in (
        "README.md",
        "trainer_state.json",
        "run.json",
        "sft_config.json",
        "train_results.json",
        ".env",
        "a.log",
    ):
        (tmp_path / name).touch()
    assert [path.name for path in other_files(tmp_path)] == read


def test_a_base_on_the_hub_is_fetched_without_its_second_copies():
    there = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    besides = ["original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "metal/model.bin"]
    found = filter_repo_objects(there + besides, allow_patterns=NEEDED, ignore_patterns=NOT_NEEDED)
    assert list(found) == there


def test_experts_in_a_form_that_is_not_merged_onto_nf4_are_refused_before_any_weights_are_read(tmp_path):
    make_run(tmp_path, model=make_wrapper("qwen3_vl_moe"))
    with pytest.raises(InputError, match="has its experts in a form that is not put into 4 bits here; merge onto orig"):
        MergePlan(str(tmp_path / "run/adapter"), tmp_path / "base", MergeSettings("nf4", None, FP32, CPU))
    merged(tmp_path, "original")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a base and a run, none of which a test changes."""
    folder = tmp_path_factory.mktemp("run")
    make_small_run(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing is asked for; give merge"),
        ({"gguf": "m.gguf"}, "gguf needs llama_cpp, .* `git clone .*convert_lora_to_gguf.py .* --outfile m.gguf`"),
        ({"gguf": "~/m n.gguf"}, r"--outfile '/\S*/m n.gguf'`"),  # in quotes no shell reads a ~
        ({"merge_to": "out", "gguf": "m.gguf", "llama_cpp": "nowhere"}, "has no convert_hf_to_gguf.py"),
        ({"merge_to": "out", "llama_cpp": "nowhere"}, "llama_cpp has no effect without gguf"),
        ({"merge_to": "there"}, "'there' is there already; name another"),
        ({"merge_to": ""}, "names nothing"),
        ({"merge_to": "file/out"}, "cannot be written: .*/file: Not a directory"),
        ({"merge_to": "out/a", "onto": "nf5"}, "onto 'nf5' is none"),
        ({"merge_to": "out/", "gguf": "out", "llama_cpp": "llama"}, "gguf is '.*/out', and merge needs a folder there"),
        ({"merge_to": "out/a", "gguf": "out", "llama_cpp": "llama"}, "gguf is '.*/out', and merge needs a folder ther"),
        ({"merge_to": "out", "gguf": "out/model.safetensors", "llama_cpp": "llama"}, "may be a model's file; end it"),
        ({"merge_to": "out", "num_texts": -1}, "num_texts is -1, and is a number of completions from 0 on"),
        ({"merge_to": "out", "onto": "nf5"}, "onto 'nf5' is none; it is original or nf4"),
        ({"merge_to": "out", "dtype": "int8"}, "dtype 'int8' is none"),
        ({"gguf": "m.gguf", "llama_cpp": "llama", "onto": "nf4"}, "onto and dtype are about a merged model"),
        ({"gguf": "m.gguf", "llama_cpp": "llama", "push": "me/model"}, "push uploads a merged model"),
        ({"merge_to": "out", "private": True}, "private has no effect without push"),
        ({"merge_to": "out", "push": "a/b/c"}, "names no repository of the hub"),
        ({"model": "nowhere", "merge_to": "out"}, "model 'nowhere' is neither a model folder nor"),
        ({"model": "RUN", "merge_to": "out"}, "is the output of a run; its adapter is"),
        ({"model": "BASE", "merge_to": "out"}, "is no adapter's folder"),
    ],
)
def test_bad_input_is_one_sentence_before_any_weights_are_read(run, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/convert_lora_to_gguf.py").touch()
    names = {"RUN": str(run / "run"), "BASE": str(run / "base"), "": str(run / "run/adapter")}
    given = dict(given)
    model = given.pop("model", "")
    with pytest.raises(InputError, match=said) as error:
        export(names.get(model, model), **given, use_cpu=True)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "llama", "there"]


def test_a_run_in_16_bits_is_merged_onto_the_original(tmp_path):
    adapter = make_small_run(tmp_path)
    settings = {"load_in_4bit": False, "bf16": False}
    (tmp_path / "run/grpo_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match="its base was never in NF4; merge onto original"):
        export(str(adapter), str(tmp_path / "out"), onto="nf4", use_cpu=True)
    assert export(str(adapter), str(tmp_path / "out"), num_texts=0, use_cpu=True).onto == "original"


def test_a_second_export_to_one_place_is_refused_and_the_first_is_whole(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter, refused, said = str(run / "run/adapter"), [], []
    given = {"num_texts": 0, "use_cpu": True}

    def other(plan, folder):
        for place in ("out", f"{tmp_path}/out"):
            with pytest.raises(InputError) as error:
                export(adapter, place, **given)
            refused.append(str(error.value))
        merge(plan, folder)

    monkeypatch.setattr(exports, "merge", other)
    assert export(adapter, "out", say=said.append, **given).merged == Path("out")
    assert len(said) == 1 and said[0].startswith("merged onto nf4: out (")
    holder = f"is in use by another run (process {os.getpid()} on "
    assert len(refused) == 2 and all(holder in one and one.endswith("choose another output") for one in refused)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out/model.safetensors").is_file()


def test_what_is_written_while_an_export_waits_for_its_base_is_not_replaced(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "find_model", lambda *_: (tmp_path / "out").mkdir())
    with pytest.raises(InputError, match="out' is there already; name another"):
        export(str(run / "run/adapter"), str(tmp_path / "out"), num_texts=0, use_cpu=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_base_without_safetensors_says_how_to_make_them(tmp_path):
    adapter = make_small_run(tmp_path)
    torch.save(load_file(tmp_path / "base/model.safetensors"), tmp_path / "base/pytorch_model.bin")
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(InputError, match="has no safetensors, .*; write them with AutoModelForCausalLM"):
        export(str(adapter), str(tmp_path / "out"), use_cpu=True)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    adapter = make_small_run(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(NotSavedError, match="cannot be written to .*out .No space left on device"):
        export(str(adapter), str(tmp_path / "out"), num_texts=0, use_cpu=True)
    assert not list(tmp_path.glob("out*"))


def test_a_signal_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "merge", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        export(str(run / "run/adapter"), str(tmp_path / "out"), num_texts=0, use_cpu=True)
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_adapter_of_a_tied_head_is_refused(tmp_path):
    config = CONFIGS["qwen2"]()
    config.tie_word_embeddings = True
    lora = LoraConfig(r=4, target_modules=["embed_tokens"])
    make_run(tmp_path, model=AutoModelForCausalLM.from_config(config), peft_config=lora)
    with pytest.raises(InputError, match="which the model has at two places, and an adapter at one"):
        merged(tmp_path)


CONVERTER = """\
import pathlib, sys
source, flag, out, *more = sys.argv[1:]
if "fail" in out:
    sys.exit("cannot read \\x1b[2J it")
names = sorted(path.name for path in pathlib.Path(source).iterdir())
pathlib.Path(out).write_text(repr((flag, "config.json" in names, "adapter_config.json" in names, more)))
"""


def test_llama_cpps_converters_are_called_with_what_they_convert(run, tmp_path):
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (tmp_path / name).write_text(CONVERTER, encoding="utf-8")
    adapter, given = str(run / "run/adapter"), {"llama_cpp": str(tmp_path), "use_cpu": True, "num_texts": 0}
    alone = export(adapter, gguf=str(tmp_path / "adapter.gguf"), **given)
    assert alone.gguf is not None
    assert alone.gguf.read_text() == repr(("--outfile", False, True, ["--base", str(run / "base")]))
    export(adapter, str(tmp_path / "out"), gguf=str(tmp_path / "model.gguf"), **given)
    assert (tmp_path / "model.gguf").read_text() == repr(("--outfile", True, False, []))
    inside = export(adapter, str(tmp_path / "with"), gguf=str(tmp_path / "with/m.gguf"), **given)
    assert inside.gguf == tmp_path / "with/m.gguf" and (tmp_path / "with/model.safetensors").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(NotSavedError, match="m.gguf cannot be written .*; .*run/adapter is there"):
        convert(tmp_path / "convert_lora_to_gguf.py", Path(adapter), tmp_path / "file/m.gguf")
    with pytest.raises(InputError, match=r"said last: cannot read \\x1b\[2J it; with its requirements"):
        export(adapter, gguf=str(tmp_path / "fail.gguf"), **given)
    assert not list(tmp_path.glob("*being-written"))


def test_the_command_prints_what_it_wrote_before_something_else_is_refused(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (tmp_path / name).write_text(CONVERTER, encoding="utf-8")
    adapter = ["--model", str(run / "run/adapter"), "--use-cpu", "true"]
    given = [*adapter, "--merge", "out", "--dtype", "float32"]
    assert main(["export", *given, "--gguf", "fail.gguf", "--llama_cpp", "."]) == 2
    printed = capsys.readouterr()
    assert "merged onto nf4: out (" in printed.out and "convert_hf_to_gguf.py of llama.cpp failed" in printed.err
    assert "merged, by transformers" in printed.out and "base without the adapter" in printed.out
    assert main(["export", *adapter, "--gguf", "new/adapter.gguf", "--llama_cpp", "."]) == 0
    assert capsys.readouterr().out == f"GGUF: {Path('new/adapter.gguf')}\n"
    assert main(["export", *given]) == 2
    assert "is there already; name another" in capsys.readouterr().err
    assert main(["export", "--model", "a", "--merge", "b", "--private", "maybe"]) == 2
    assert "--private takes true, false or nothing, and not 'maybe'" in capsys.readouterr().err


def test_wrong_arguments_are_refused_before_what_computes_is_imported():
    code = (
        "import sys; from lowmem_grpo.cli import main; status = main(['export', '--model', 'a', '--gguf', 'b']); "
        "assert status == 2 and 'huggingface_hub' in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "gguf needs llama_cpp" in done.stderr


def test_a_merged_model_is_pushed_with_its_card(run, tmp_path, monkeypatch):
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        given = {"num_texts": 0, "push": "me/merged", "private": True, "use_cpu": True}
        result = export(str(run / "run/adapter"), str(tmp_path / "out"), **given)
        assert result.url == f"{hub.address}/me/merged" and hub.private == {"me/merged": True}
        assert {"README.md", "model.safetensors", "config.json"} <= hub.files["me/merged@main"].keys()
        assert b"me/merged" in hub.files["me/merged@main"]["README.md"]
