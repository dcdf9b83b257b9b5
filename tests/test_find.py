"""Folders that do not fit and models of other kinds: one sentence each, before any reward is tried or weight is read."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import DEMO_MODEL, SMALL, make_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BioGptConfig,
    BloomConfig,
    CTRLConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    MptConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    T5Config,
)

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs.prompts import read_training_inputs
from lowmem_grpo.model.find import beyond_context, find_model
from lowmem_grpo.model.load import load_policy

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)
ROWS = [{"prompt": "1+1=?"}, {"prompt": "a longer one, of 26 letters"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> Path:
    """A folder with "base", a model, and "adapter", one of it."""
    folder = tmp_path_factory.mktemp("folders")
    make_model("qwen2").save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    save_adapter(folder)
    return folder


def save_adapter(folder: Path, config=None, resize=None, **settings) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if resize is not None:
        model.resize_token_embeddings(resize)
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings}
    get_peft_model(model, config or LoraConfig(**settings)).save_pretrained(folder / "adapter")


def refusal(model: Any, tmp_path: Path, tokenizer, **settings) -> str:
    """The sentence by which a run refuses a model before it tries a reward."""

    def never(**_):
        raise AssertionError("the model is looked at before a reward is tried")

    config = GRPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, **settings)
    with pytest.raises(InputError) as caught:
        read_training_inputs(model, never, ROWS, None, config, tokenizer=tokenizer)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def another_base(folder: Path, **changes) -> None:
    shutil.rmtree(folder / "base")
    AutoModelForCausalLM.from_config(Qwen2Config(**{**SMALL, **changes})).save_pretrained(folder / "base")


def without(path: Path, part: str) -> None:
    save_file({name: value for name, value in load_file(path).items() if part not in name}, path)


def rewrite(path: Path, change) -> None:
    save_file({name: change(values) for name, values in load_file(path).items()}, path)


class RunsCode:
    def __reduce__(self):
        return exit, (3,)


WEIGHTS = "adapter/adapter_model.safetensors"
BROKEN_ADAPTERS = {
    "of another rank": (lambda folder: edit(folder, r=16), "is of 4 x 64, and by its settings of 16 x 64"),
    "of other modules": (lambda folder: edit(folder, target_modules=["v_proj"]), "it has no .*v_proj"),
    "of more modules": (lambda folder: edit(folder, target_modules=["q_proj", "v_proj"]), "it has no .*v_proj"),
    "of modules that are not there": (lambda folder: edit(folder, target_modules=["query"]), "no adapter could be added"),
    "without a module trained whole": (lambda folder: edit(folder, modules_to_save=["norm"]), "it has no .*norm.weight"),
    "of modules that are numbers": (lambda folder: edit(folder, target_modules=[1]), "no adapter could be added: "),
    "of a pattern that is none": (lambda folder: edit(folder, rank_pattern=[1]), "no adapter could be added: "),
    "of no rank": (lambda folder: edit(folder, r="4"), "no adapter could be added: "),
    "with an alpha that is NaN": (lambda folder: edit(folder, lora_alpha=float("nan")), "has a lora_alpha of nan; make it"),
    "with an alpha that is a text": (lambda folder: edit(folder, lora_alpha="8"), "has a lora_alpha of '8'; make it"),
    "with an infinite alpha of a module": (
        lambda folder: edit(folder, alpha_pattern={"q_proj": float("inf")}), "has a lora_alpha of inf; make it",
    ),
    "that drops all": (lambda folder: edit(folder, lora_dropout=1.0), "has lora_dropout=1.0; make it at least 0 and less"),
    "with a base of a long name": (
        lambda folder: edit(folder, base_model_name_or_path="x" * 300), "cannot be looked for: File name too long",
    ),
    "with a .bin that would run code": (
        lambda folder: (
            (folder / WEIGHTS).unlink(), (folder / "adapter/adapter_model.bin").write_bytes(pickle.dumps(RunsCode())),
        ),
        "hold more than tensors, or are cut short, and reading them could run code; take a copy in adapter_model.safet",
    ),
    "of a wider model": (lambda folder: another_base(folder, hidden_size=32), "is of 4 x 64, and by its settings of 4 x 32"),
    "of a deeper model": (lambda folder: another_base(folder, num_hidden_layers=1), "it has .*layers.1.*, and the base no place"),
    "of a flatter model": (lambda folder: another_base(folder, num_hidden_layers=3), "it has no .*layers.2"),
    "with a resized vocabulary": (
        lambda folder: save_adapter(folder, resize=131), "of 131 x 64, and its base one of 128 x 64: its vocabulary was resized",
    ),
    "without weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "cut short": (lambda folder: cut(folder / WEIGHTS), "the weights of adapter .* cannot be read"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "the weights of adapter .* cannot be read"),
    "without some weights": (lambda folder: without(folder / WEIGHTS, "layers.1."), "it has no .*layers.1"),
    "of integers": (
        lambda folder: rewrite(folder / WEIGHTS, lambda values: (values * 9).to(torch.int8)),
        "has base_model.* in torch.int8, which is not trained; save it in fp32",
    ),
    "with a .bin that is a text": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / "adapter/adapter_model.bin").write_text("error: 404")),
        "the weights of adapter .* cannot be read: .*[a-z]{4}.*; copy the file anew",
    ),
    "with a .bin of something else": (
        lambda folder: ((folder / WEIGHTS).unlink(), torch.save([1], folder / "adapter/adapter_model.bin")),
        "the weights of adapter .* cannot be read",
    ),
    "of modules by a broken pattern": (lambda folder: edit(folder, target_modules="(q_proj"), "no adapter could be added: .*unterminated"),
    "a Git LFS pointer": (lambda folder: (folder / WEIGHTS).write_text(POINTER), "is a Git LFS pointer .*git lfs pull"),
    "with a pointer for its settings": (
        lambda folder: (folder / "adapter/adapter_config.json").write_text(POINTER), "adapter_config.json is a Git LFS pointer",
    ),
    "with settings that are no JSON": (
        lambda folder: (folder / "adapter/adapter_config.json").write_text("{'r': 4}"), "adapter_config.json .* cannot be read",
    ),
    "of no known type": (lambda folder: edit(folder, peft_type="MORA"), "adapter_config.json .* cannot be read"),
    "of no type": (lambda folder: edit(folder, peft_type=None), "adapter_config.json .* cannot be read|only LoraConfig"),
    "of no base": (lambda folder: edit(folder, base_model_name_or_path=None), "does not name its base model"),
    "of a base that moved": (
        lambda folder: edit(folder, base_model_name_or_path="/gone/base"), "the base that adapter .* names .*'/gone/base' is not a folder",
    ),
    "of a revision of its base": (
        lambda folder: edit(folder, revision="v2", base_model_name_or_path="some/base"),
        r"is of the revision 'v2' of 'some/base'; set model_init_kwargs=\{'revision': 'v2'\}",
    ),
    "of an adapter": (
        lambda folder: edit(folder, base_model_name_or_path=str(folder / "adapter")), "an adapter too; merge that one",
    ),
    "with biases": (lambda folder: edit(folder, bias="lora_only"), "the adapter in .* trains biases"),
    "that started with PiSSA": (lambda folder: edit(folder, init_lora_weights="pissa"), "'pissa', which takes from the base"),
    "with a switch of another kind": (lambda folder: edit(folder, alora_invocation_tokens=[1]), "sets alora_invocation_tokens"),
    "on the head": (lambda folder: save_adapter(folder, target_modules=["lm_head"]), "leave lm_head and the embeddings out"),
    "AdaLoRA": (
        lambda folder: save_adapter(folder, AdaLoraConfig(total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM")),
        "is a AdaLoraConfig; only LoraConfig",
    ),
    "prompt tuning": (
        lambda folder: save_adapter(folder, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        "is a PromptTuningConfig; only LoraConfig",
    ),
    "IA3": (lambda folder: save_adapter(folder, IA3Config(task_type="CAUSAL_LM")), "is a IA3Config; only LoraConfig"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN_ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_folder_that_does_not_fit_is_refused_before_long_work(broken, folders, tmp_path, tokenizer):
    shutil.copytree(folders, tmp_path / "copy")
    edit(tmp_path / "copy", base_model_name_or_path=str(tmp_path / "copy/base"))
    spoil, words = BROKEN_ADAPTERS[broken]
    spoil(tmp_path / "copy")
    assert_says(refusal(str(tmp_path / "copy/adapter"), tmp_path, tokenizer), words)


def assert_says(sentence: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        raise InputError(sentence)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "with its base's embedding"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_folder_that_fits_is_loaded_as_it_is(kind, folders, tmp_path, tokenizer):
    shutil.copytree(folders, tmp_path / "copy")
    if kind == "with its base's embedding":
        save_adapter(tmp_path / "copy", target_modules=["embed_tokens", "q_proj"])
    values = load_file(tmp_path / "copy" / WEIGHTS)
    if kind == "bin":
        (tmp_path / "copy" / WEIGHTS).unlink()
        torch.save(values, tmp_path / "copy/adapter/adapter_model.bin")
    policy = load_policy(str(tmp_path / "copy/adapter"), tokenizer, GRPOConfig(use_cpu=True))
    for name, parameter in policy.parameters_of("default").items():
        assert torch.equal(parameter, values[name.replace(".default", "")])


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_of_other_values_in_an_adapter_folder_is_refused(folders, tmp_path, tokenizer):
    shutil.copytree(folders, tmp_path / "copy")
    save_adapter(tmp_path / "copy", target_modules=["embed_tokens", "q_proj"])
    values = load_file(tmp_path / "copy" / WEIGHTS)
    name = next(name for name in values if "embed_tokens.base_layer" in name)
    save_file({**values, name: values[name] + 0.5}, tmp_path / "copy" / WEIGHTS)
    with pytest.raises(InputError, match="has a model.embed_tokens.weight that is not its base's; merge it"):
        load_policy(str(tmp_path / "copy/adapter"), tokenizer, GRPOConfig(use_cpu=True))


def test_a_module_trained_whole_is_found_by_the_end_of_its_path_as_peft_finds_it(folders, tmp_path, tokenizer):
    shutil.copytree(folders, tmp_path / "copy")
    save_adapter(tmp_path / "copy", target_modules=["q_proj"], modules_to_save=["norm"])
    values = load_file(tmp_path / "copy" / WEIGHTS)
    changed = {name: value + 0.5 for name, value in values.items() if "input_layernorm" in name}
    assert changed
    save_file({**values, **changed}, tmp_path / "copy" / WEIGHTS)
    policy = load_policy(str(tmp_path / "copy/adapter"), tokenizer, GRPOConfig(use_cpu=True))
    found = {name.replace(".modules_to_save.default", ""): p for name, p in policy.parameters_of("default").items()}
    assert all(torch.equal(found[name], value) for name, value in changed.items())


@pytest.mark.parametrize("module", ["o_proj", "self_attn"])
def test_a_layer_that_would_be_trained_whole_in_4_bits_is_refused(module, tmp_path, tokenizer):
    lora = LoraConfig(target_modules=["down_proj"], modules_to_save=[module])
    policy = load_policy(str(DEMO_MODEL), tokenizer, GRPOConfig(use_cpu=True, load_in_4bit=False), lora)
    policy.save(tmp_path / "adapter")
    words = (
        r"modules_to_save has model.layers.0.self_attn.\w_proj, which is held in 4 bits and so cannot be trained whole"
    )
    for model, given in ((str(DEMO_MODEL), lora), (str(tmp_path / "adapter"), None)):
        with pytest.raises(InputError, match=words):
            load_policy(model, tokenizer, GRPOConfig(use_cpu=True), given)


def saved_by(kind, config) -> Any:
    return lambda folder: (shutil.rmtree(folder), kind.from_config(config).save_pretrained(folder))


BERT = dict(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
BROKEN_MODELS = {
    "without weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "cut short": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors cannot be read"),
    "a Git LFS pointer": (lambda folder: (folder / "model.safetensors").write_text(POINTER), "safetensors is a Git LFS pointer"),
    "with a pointer for its tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(POINTER), "tokenizer.json is a Git LFS pointer",
    ),
    "with a file less": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}})),
        ),
        "lacks model-1.safetensors, which its index names",
    ),
    "with an index that is a list": (
        lambda folder: (
            (folder / "model.safetensors").unlink(), (folder / "model.safetensors.index.json").write_text("[]"),
        ),
        "index.json cannot be read",
    ),
    "with numbers for files in its index": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 3}})),
        ),
        "index.json cannot be read",
    ),
    "of a number as its class": (
        lambda folder: settings_of(folder, architectures=[3]),
        "is a 3, which is no causal language model|error for field 'architectures'",
    ),
    "with a broken index": (
        lambda folder: (
            (folder / "model.safetensors").unlink(), (folder / "model.safetensors.index.json").write_text("{"),
        ),
        "index.json cannot be read",
    ),
    "of no known type": (
        lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "none_such"})), "is neither a model folder nor",
    ),
    "of settings that clash": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "none_such"})
        ),
        "cannot be made",
    ),
    "of adapters in folders": (
        lambda folder: (
            (folder / "config.json").unlink(), (folder / "mine").mkdir(), (folder / "mine/adapter_config.json").write_text("{}"),
        ),
        "holds adapters in folders; name one, such as .*mine",
    ),
    "a masked language model": (saved_by(AutoModelForMaskedLM, BertConfig(**BERT)), "is a BertForMaskedLM, which is no causal"),
    "another masked one": (saved_by(AutoModelForMaskedLM, RobertaConfig(**BERT)), "is a RobertaForMaskedLM, which is no causal"),
    "an encoder and a decoder": (
        saved_by(AutoModelForSeq2SeqLM, T5Config(vocab_size=128, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)),
        "is a T5ForConditionalGeneration, which is no causal",
    ),
    "a model with a score": (
        saved_by(AutoModelForSequenceClassification, Qwen2Config(**SMALL)),
        "is a Qwen2ForSequenceClassification, which is no causal",
    ),
    "a model without a head": (
        lambda folder: (shutil.rmtree(folder), Qwen2Model(Qwen2Config(**SMALL)).save_pretrained(folder)),
        "is a Qwen2Model, which is no causal",
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN_MODELS)
def test_a_model_folder_that_cannot_be_trained_is_refused_before_long_work(broken, folders, tmp_path, tokenizer):
    shutil.copytree(folders / "base", tmp_path / "base")
    spoil, words = BROKEN_MODELS[broken]
    spoil(tmp_path / "base")
    assert_says(refusal(str(tmp_path / "base"), tmp_path, tokenizer), words)


def settings_of(folder: Path, name: str = "config.json", **changes) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BROKEN_WHEN_LOADED = {
    "a .bin that would run code": (lambda folder: to_bin(folder, pickle.dumps(RunsCode())), "could run code; take a copy in"),
    "a .bin that is a text": (lambda folder: to_bin(folder, b"error: 404"), "cannot be loaded: "),
    "an empty .bin": (lambda folder: to_bin(folder, b""), "cannot be loaded: EOFError"),
    "no weights in its file": (lambda folder: rewrite_all(folder, lambda _: {}), "which transformers made up at random"),
    "weights that are NaN": (
        lambda folder: rewrite_all(folder, lambda weights: {k: v * torch.nan for k, v in weights.items()}),
        "the head of Qwen2ForCausalLM computes NaN: its weights are zero, infinite or NaN",
    ),
    "a text as its end of sequence": (
        lambda folder: settings_of(folder, "generation_config.json", eos_token_id="<|end|>"),
        "end-of-sequence token is '<.end.>'; set eos_token_id to a number|cannot be loaded",
    ),
}  # fmt: skip


def to_bin(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def rewrite_all(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("broken", BROKEN_WHEN_LOADED)
def test_a_model_folder_that_cannot_be_loaded_is_refused_in_one_sentence(broken, folders, tmp_path, tokenizer):
    shutil.copytree(folders / "base", tmp_path / "base")
    spoil, words = BROKEN_WHEN_LOADED[broken]
    spoil(tmp_path / "base")
    with pytest.raises(InputError, match=words) as caught:
        load_policy(str(tmp_path / "base"), tokenizer, GRPOConfig(use_cpu=True))
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_a_scale_of_positions_that_is_not_finite_is_no_number_of_them(folders):
    model = make_model("qwen2")
    model.config.rope_parameters = {**model.config.rope_parameters, "factor": float("nan")}
    beyond_context(model, GRPOConfig(use_cpu=True), 9)
    said = beyond_context(model, GRPOConfig(use_cpu=True), 900)
    assert said is not None and "more than the 256 that the model was made for" in said


def test_a_model_that_lacks_a_weight_is_refused_and_not_completed_at_random(folders, tmp_path, tokenizer):
    shutil.copytree(folders / "base", tmp_path / "base")
    without(tmp_path / "base/model.safetensors", "lm_head")
    with pytest.raises(InputError, match="has no lm_head.weight, which transformers made up at random"):
        load_policy(str(tmp_path / "base"), tokenizer, GRPOConfig(use_cpu=True))


@pytest.mark.parametrize(
    ("in_4bit", "changes", "words"),
    [
        (False, {"intermediate_size": 64}, "has a .*mlp.* of .*, and by its config.json it is of .*64"),
        (False, {"vocab_size": 100}, "has a .* of 128 x 64, and by its config.json it is of 100 x 64"),
        (True, {"vocab_size": 100}, "has a .* of 128 x 64, and by its config.json it is of 100 x 64"),
        (True, {"intermediate_size": 64}, "has a .*mlp.* of .*, and by its config.json it is of .*64"),
        (
            True,
            {"num_key_value_heads": 1},
            "has a .*self_attn.* of .*, and by its config.json",
        ),
    ],
)
def test_a_model_whose_settings_do_not_fit_its_weights_is_refused(
    in_4bit, changes, words, folders, tmp_path, tokenizer
):
    shutil.copytree(folders / "base", tmp_path / "base")
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=words) as caught:
        load_policy(str(tmp_path / "base"), tokenizer, GRPOConfig(use_cpu=True, load_in_4bit=in_4bit))
    assert "\n" not in str(caught.value)


def test_modules_that_are_not_there_are_refused_before_long_work(folders, tmp_path, tokenizer):
    sentence = refusal(str(folders / "base"), tmp_path, tokenizer, lora_target_modules=["no_such_proj"])
    assert_says(
        sentence, "lora_target_modules has 'no_such_proj', and no module of the model ends so; did you mean o_proj"
    )


IDS: Any = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SIZE: Any = {**IDS, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT: Any = {**IDS, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40}
POSITIONS = {  # that end at 40
    "GPT-2": lambda: GPT2Config(**GPT),
    "GPT-BigCode": lambda: GPTBigCodeConfig(**GPT),
    "GPT-J": lambda: GPTJConfig(**GPT, rotary_dim=8),
    "CTRL": lambda: CTRLConfig(**GPT, dff=48),
    "OpenAI GPT": lambda: OpenAIGPTConfig(**GPT),
    "OPT": lambda: OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=40),
    "BioGPT": lambda: BioGptConfig(**SIZE, intermediate_size=48, max_position_embeddings=40),
    "GPT-Neo": lambda: GPTNeoConfig(
        **IDS, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, max_position_embeddings=40,
        attention_types=[[["global"], 1]],
    ),
    "MPT": lambda: MptConfig(**IDS, d_model=32, n_layers=1, n_heads=2, max_seq_len=40),
}  # fmt: skip


@pytest.mark.parametrize("loaded", [False, True], ids=["by name", "loaded"])
@pytest.mark.parametrize("family", POSITIONS)
@pytest.mark.filterwarnings("ignore")
def test_positions_that_end_are_counted_with_the_longest_prompt(family, loaded, tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_config(POSITIONS[family](), dtype=torch.float32).eval()
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    longest = max(len(tokenizer(row["prompt"]).input_ids) for row in ROWS)

    def read(max_completion_length: int):
        config = GRPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, max_completion_length=max_completion_length)
        return read_training_inputs(
            model if loaded else folder, lambda completions, **_: [0.0 for _ in completions], ROWS, None, config,
            tokenizer=tokenizer,
        )  # fmt: skip

    assert read(40 - longest).longest_prompt()
    with torch.no_grad():
        model(input_ids=torch.full((1, 40), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 41), 5))
    with pytest.raises(
        InputError, match="the longest prompt .* may have 41 tokens, more than the model has positions, 40"
    ):
        read(41 - longest)


ROTARY = {  # what is set, and the tokens that the model was made for
    "plain": ({}, 40),
    "yarn as its readme says": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 40, "rope_theta": 1e4}},
        80,
    ),
    "linear": ({"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}, 120),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_positions_beyond_the_models_own_are_said(kind, tmp_path, tokenizer):
    settings, known = ROTARY[kind]
    model = AutoModelForCausalLM.from_config(Qwen2Config(**{**SMALL, "max_position_embeddings": 40}, **settings))
    config = GRPOConfig(use_cpu=True)
    assert beyond_context(model, config, known) is None
    said = beyond_context(model, config, known + 1)
    assert said is not None and f"may have {known + 1} tokens, more than the {known} that the model was made" in said


def test_models_without_positions_take_any_length():
    bloom = AutoModelForCausalLM.from_config(BloomConfig(**IDS, hidden_size=32, n_layer=1, n_head=2))
    assert beyond_context(bloom, GRPOConfig(use_cpu=True), 10**6) is None


def test_a_look_at_a_model_leaves_torchs_generator_alone(tmp_path):
    """So that a seeded run is what it was before there was a look."""
    make_model("llama").save_pretrained(tmp_path)
    before = torch.get_rng_state()
    find_model(str(tmp_path), GRPOConfig(use_cpu=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_is_cut_down_by_settings_is_said():
    with pytest.warns(UserWarning, match="num_hidden_layers=1, and .* has 3 layers: another model is trained"):
        find_model(str(DEMO_MODEL), GRPOConfig(use_cpu=True, model_init_kwargs={"num_hidden_layers": 1}))
