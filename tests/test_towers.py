"""Models of text and images: trained on their text alone, and saved so that their own class reads the adapter."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import SMALL, WRAPPERS, make_model, make_wrapper, wake_adapters
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    Kosmos2Config,
    VisionEncoderDecoderConfig,
    ViTConfig,
)

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.chats import Template
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs.training import tokenizer_of
from lowmem_grpo.model.adapter_names import PREFIX
from lowmem_grpo.model.attention import configs_of
from lowmem_grpo.model.chat_template import reading_texts
from lowmem_grpo.model.find import adapter_config, ends_of_model, find_model
from lowmem_grpo.model.load import load_policy, load_tokenizer
from lowmem_grpo.model.offload import use_liger_kernels
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.towers import beside_the_decoder, decoder_path, set_aside, within
from lowmem_grpo.planner.trace import Key, skeleton, trace
from lowmem_grpo.run.checkpoint import load_adapter, save_checkpoint

IDS = [9, 20, 33, 41, 52, 63, 70, 11, 12, 99]
OFTEN = {"qwen3_5", "gemma3", "mistral3", "qwen3_vl"}
EACH = [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in WRAPPERS]


def settings(**given) -> GRPOConfig:
    return GRPOConfig(**{"bf16": False, "use_cpu": True, "gradient_checkpointing": False, **given})


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tokenizer):
    """A function from a family to the folder of a model of it."""
    made: dict[str, Path] = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_wrapper(family).save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return str(made[family])

    return folder


@torch.no_grad()
def by_itself(model) -> torch.Tensor:
    """Log-probabilities of the last six of IDS, by a whole model's forward on them."""
    predicted = model.eval()(input_ids=torch.tensor([IDS])).logits[0, 3:-1].log_softmax(-1)
    return predicted.gather(1, torch.tensor(IDS[4:])[:, None])[:, 0]


@torch.no_grad()
def by_policy(policy) -> torch.Tensor:
    """The same log-probabilities, as a policy is trained on them."""
    (batch,) = pack(
        [IDS[:4]], [IDS[4:]], token_budget=100, pad_token_id=0, device=policy.device, padding_free=policy.packs
    )
    with policy.inference():
        return policy.logprobs(batch, 1.0)


def outside(policy, kind: type) -> list[str]:
    """Paths of modules of a kind that are not in the decoder."""
    path = decoder_path(policy.base)
    return [name for name, module in policy.base.named_modules() if isinstance(module, kind) and path not in name]


@pytest.mark.parametrize("family", EACH)
def test_a_model_of_text_and_images_is_trained_on_its_text_alone(family, folder_of, tokenizer):
    whole: Any = AutoModelForImageTextToText.from_pretrained(folder_of(family))
    towers = beside_the_decoder(whole)
    assert towers and not any(name.startswith(tuple(towers)) for name in (decoder_path(whole), "lm_head"))
    expected, ids = by_itself(whole), torch.tensor([IDS[:4]])
    told = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    written = whole.generate(input_ids=ids, **told)
    for model in (folder_of(family), whole):
        policy = load_policy(model, tokenizer, settings(load_in_4bit=False))
        assert (by_policy(policy) - expected).abs().max() < 1e-5
        assert not beside_the_decoder(policy.base)
        with policy.inference():
            assert torch.equal(policy.base.generate(input_ids=ids, **told), written)


@pytest.mark.parametrize("family", EACH)
def test_nothing_beside_the_decoder_gets_4_bits_or_an_adapter(family, folder_of, tokenizer):
    policies = [load_policy(model, tokenizer, settings()) for model in (folder_of(family), make_wrapper(family))]
    for policy in policies:
        assert not outside(policy, Linear4bit)
        assert all(decoder_path(policy.base) in name for name in policy.parameters_of(policy.adapter))
    assert torch.equal(by_policy(policies[0]), by_policy(policies[1]))


def test_a_towers_tensors_are_not_even_looked_for(folder_of, tokenizer, tmp_path):
    whole = make_wrapper("qwen3_vl")
    expected = by_itself(whole)
    whole.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "visual" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    policy = load_policy(str(tmp_path), tokenizer, settings(load_in_4bit=False))
    assert (by_policy(policy) - expected).abs().max() < 1e-5


def adapted(model, tokenizer, peft_config=None, **given):
    policy = load_policy(model, tokenizer, settings(load_in_4bit=False, **given), peft_config)
    wake_adapters(policy)
    return policy


def on_its_own_class(folder: str, adapter: Path, kind=AutoModelForImageTextToText):
    """The adapter on the class that the folder's config.json names, and what PEFT warned of."""
    base = kind.from_pretrained(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(adapter))
    return model, [str(one.message) for one in told if "deprecated" not in str(one.message)]


CONFIGS = {
    "every linear layer": None,
    "layers by name": LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], exclude_modules=["layers.0.mlp.gate_proj"]),
    "a regular expression": LoraConfig(r=4, target_modules=r"model\.layers\.[13]\.(self_attn|linear_attn|mlp)\.\w+_proj"),
    "a rank for one layer": LoraConfig(
        r=4, target_modules=["q_proj", "model.layers.1.mlp.up_proj"], rank_pattern={"model.layers.1.mlp.up_proj": 2},
        alpha_pattern={"model.layers.1.mlp.up_proj": 7},
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", list(CONFIGS))
def test_an_adapter_of_the_text_loads_on_the_class_that_the_model_was_saved_by(config, folder_of, tokenizer, tmp_path):
    policy = adapted(folder_of("qwen3_5"), tokenizer, CONFIGS[config])
    assert type(policy.base).__name__ == "Qwen3_5ForCausalLM"
    policy.save(tmp_path)
    assert all(
        name.startswith(f"{PREFIX}model.language_model.layers.")
        for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    model, told = on_its_own_class(folder_of("qwen3_5"), tmp_path)
    assert told == [] and type(model.get_base_model()).__name__ == "Qwen3_5ForConditionalGeneration"
    assert (by_itself(model) - by_policy(policy)).abs().max() < 1e-5
    assert (by_itself(model) - by_itself(make_wrapper("qwen3_5"))).abs().max() > 0.01
    assert sum("visual" in name and "lora" in name for name, _ in model.named_modules()) == 0


def test_on_the_class_of_the_text_alone_peft_finds_no_weight_and_says_so(folder_of, tokenizer, tmp_path):
    adapted(folder_of("qwen3_5"), tokenizer, LoraConfig(r=4, target_modules=["q_proj"])).save(tmp_path)
    model, told = on_its_own_class(folder_of("qwen3_5"), tmp_path, AutoModelForCausalLM)
    assert any("missing adapter keys" in one for one in told)
    assert (by_itself(model) - by_itself(make_wrapper("qwen3_5"))).abs().max() < 1e-5


@pytest.mark.parametrize(
    "config", [pytest.param(name, marks=() if "layer" in name[-5:] else pytest.mark.slow) for name in CONFIGS]
)
def test_such_an_adapter_is_continued_from_its_file(config, folder_of, tokenizer, tmp_path):
    first = adapted(folder_of("qwen3_5"), tokenizer, CONFIGS[config])
    first.save(tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = load_policy(str(tmp_path / "first"), tokenizer, settings(load_in_4bit=False))
    assert torch.equal(by_policy(second), by_policy(first))
    second.save(tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    second.add_from("critic", str(tmp_path / "first"))
    with second.wearing("critic"):
        assert torch.equal(by_policy(second), by_policy(first))


@pytest.mark.parametrize("family", EACH)
def test_an_adapter_of_any_such_model_loads_on_its_own_class(family, folder_of, tokenizer, tmp_path):
    # Names that the decoder shares with some towers, which must get no adapter there.
    policy = adapted(folder_of(family), tokenizer, lora_target_modules=["q_proj", "v_proj"])
    policy.save(tmp_path)
    model, told = on_its_own_class(folder_of(family), tmp_path)
    assert told == []
    assert (by_itself(model) - by_policy(policy)).abs().max() < 1e-5
    towers = tuple(beside_the_decoder(model.get_base_model()))
    assert not [
        name for name, _ in model.get_base_model().named_modules() if "lora_A" in name and name.startswith(towers)
    ]


def test_the_text_alone_loaded_by_the_user_is_saved_under_the_same_names(folder_of, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder_of("qwen3_5"), dtype=torch.float32)
    adapted(model, tokenizer).save(tmp_path / "loaded")
    adapted(folder_of("qwen3_5"), tokenizer).save(tmp_path / "named")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "loaded" / name).read_bytes() == (tmp_path / "named" / name).read_bytes()


def test_an_adapter_under_the_texts_own_names_is_continued_too(folder_of, tokenizer, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder_of("qwen3_5"), dtype=torch.float32)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.save_pretrained(str(tmp_path))
    assert "language_model" not in "".join(load_file(tmp_path / "adapter_model.safetensors"))
    policy = load_policy(str(tmp_path), tokenizer, settings(load_in_4bit=False))
    assert (by_policy(policy) - by_itself(model)).abs().max() < 1e-5


def test_a_checkpoint_has_the_files_names_and_is_read_again(folder_of, tokenizer, tmp_path):
    policy = adapted(folder_of("qwen3_5"), tokenizer)
    expected = by_policy(policy)
    save_checkpoint(tmp_path / "checkpoint-1", policy, {}, {"step": 1})
    assert "language_model" in next(iter(load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")))
    other = load_policy(folder_of("qwen3_5"), tokenizer, settings(load_in_4bit=False))
    load_adapter(tmp_path / "checkpoint-1", other)
    assert torch.equal(by_policy(other), expected)
    file = tmp_path / "checkpoint-1" / "adapter_model.safetensors"
    save_file(policy.adapter_state(policy.adapter), file)  # as checkpoints had it before, under our names
    load_adapter(tmp_path / "checkpoint-1", other)
    assert torch.equal(by_policy(other), expected)


def test_a_score_head_is_read_by_the_class_for_sequence_classification(folder_of, tokenizer, tmp_path):
    policy = adapted(folder_of("qwen3_5"), tokenizer)
    policy.add_score_head(policy.adapter, seed=0)
    policy.save(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path), num_labels=1).eval()
    assert not any("missing" in str(one.message) for one in told)
    model.config.get_text_config().pad_token_id = 0
    (batch,) = pack([IDS[:4]], [[*IDS[4:], 0]], token_budget=100, pad_token_id=0, device=policy.device, last_only=True)
    with policy.inference():
        score = policy.scores(batch)
        theirs = model(input_ids=torch.tensor([IDS])).logits[0]
    assert (theirs - score[-1:]).abs().max() < 1e-4


def test_a_checkpoint_in_4_bits_has_its_towers_left_out(folder_of, tokenizer, tmp_path):
    for family in ("qwen3_5", "gemma3"):
        towers = beside_the_decoder(make_wrapper(family))
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=[*towers, "lm_head"], bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        whole = AutoModelForImageTextToText.from_pretrained(
            folder_of(family), quantization_config=four_bits, dtype=torch.float32
        )
        for module in whole.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
        expected = by_itself(whole)
        whole.save_pretrained(tmp_path / family)
        policy = load_policy(str(tmp_path / family), tokenizer, settings())
        assert not beside_the_decoder(policy.base)
        assert (by_policy(policy) - expected).abs().max() < 1e-3


def test_a_skeleton_has_no_tower():
    config = settings()
    base: Any = skeleton(
        Key(WRAPPERS["qwen3_vl"](), adapter_config("", config)), "float32", False, True
    ).get_base_model()
    assert not beside_the_decoder(base)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma4"])
def test_a_plan_counts_no_tower(family):
    def traced(depth: int):
        model = WRAPPERS[family]()
        model.vision_config.depth = model.vision_config.num_hidden_layers = depth
        config = settings(load_in_4bit=True, max_completion_length=32)
        return trace(Key(model, adapter_config("", config)), config)

    deep, flat = traced(7), traced(1)
    assert deep.resident == flat.resident and deep.adapter_sizes == flat.adapter_sizes
    assert deep.ran == flat.ran


def refusal(model, tokenizer, peft_config=None, **given) -> str:
    with pytest.raises(InputError) as caught:
        load_policy(model, tokenizer, settings(**given), peft_config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize("how", ["folder", "loaded"])
def test_a_target_beside_the_decoder_is_refused_by_its_name(how, folder_of, tokenizer):
    def model():
        return folder_of("qwen3_vl") if how == "folder" else make_wrapper("qwen3_vl")

    beside = r"model\.visual.*, beside the decoder of texts: it is set aside"
    assert re.search(
        f"lora_target_modules has 'linear_fc1', which is {beside}",
        refusal(model(), tokenizer, lora_target_modules=["q_proj", "linear_fc1"]),
    )
    for config in (
        LoraConfig(target_modules=["q_proj", "qkv"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["merger"]),
    ):
        assert re.search(f"peft_config has '(qkv|merger)', which is {beside}", refusal(model(), tokenizer, config))
    # Names that the tower shares with the decoder are of the decoder alone.
    policy = load_policy(
        folder_of("gemma3") if how == "folder" else make_wrapper("gemma3"), tokenizer,
        settings(lora_target_modules=["q_proj"]),
    )  # fmt: skip
    assert len(policy.parameters_of(policy.adapter)) == 2 * 2


def test_an_adapter_with_weights_in_a_tower_is_refused(folder_of, tokenizer, tmp_path):
    model = get_peft_model(make_wrapper("gemma3"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    told = refusal(model, tokenizer, load_in_4bit=False)
    assert "adapter has weights in model.vision_tower, beside the decoder" in told
    remedy = re.search(r"exclude_modules='(.*)'$", told)
    assert remedy
    config = LoraConfig(
        target_modules=["q_proj"], exclude_modules=remedy[1].replace(r"\\", "\\"), task_type="CAUSAL_LM"
    )
    policy = load_policy(get_peft_model(make_wrapper("gemma3"), config), tokenizer, settings(load_in_4bit=False))
    assert len(policy.parameters_of(policy.adapter)) == 2 * 2

    base = AutoModelForImageTextToText.from_pretrained(folder_of("gemma3"))
    old = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    old.save_pretrained(str(tmp_path))
    told = refusal(str(tmp_path), tokenizer, load_in_4bit=False)
    assert "model.vision_tower" in told and "merge_and_unload" in told


def test_models_without_a_decoder_of_texts_are_refused_in_a_sentence(tokenizer, tmp_path):
    text = dict(vocab_size=128, embed_dim=64, layers=2, ffn_dim=96, attention_heads=4)
    inside = Kosmos2Config(text_config=text, vision_config=dict(hidden_size=32, num_hidden_layers=1, image_size=16))
    inside.save_pretrained(tmp_path / "inside")
    with pytest.raises(InputError, match="Kosmos2ForConditionalGeneration has no decoder of texts apart from its head"):
        find_model(str(tmp_path / "inside"), settings(), needs_weights=False)
    encoder = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), CONFIG_MAPPING["bert"]())
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(InputError, match="which is no causal language model"):
        find_model(str(tmp_path / "encoder"), settings(), needs_weights=False)


def test_a_prompt_that_sees_what_follows_is_refused(tokenizer):
    text = {**SMALL, "model_type": "gemma", "head_dim": 16}
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    kind: Any = CONFIG_MAPPING["paligemma"]
    config = kind(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", **vision},
        projection_dim=64,
        image_token_index=5,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    assert "reads a text otherwise than its decoder does" in refusal(model, tokenizer, load_in_4bit=False)


def test_a_regular_expression_takes_in_what_it_names_and_nothing_that_begins_alike():
    pattern = within(["model.visual", "model.embed_vision"])
    assert re.fullmatch(pattern, "model.visual") and re.fullmatch(pattern, "model.embed_vision.layers.0")
    assert not re.fullmatch(pattern, "model.visual2.layers") and not re.fullmatch(pattern, "model_visual")


BY_PARTS = (
    "{% for message in messages %}<{{ message['role'] }}>{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)  # as SmolVLM's
CHAT = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "!"}]
SHOWN = "<user>1+1=?</s>\n<assistant>2</s>\n<user>!</s>\n"


def test_a_template_that_goes_through_parts_is_shown_texts_as_such(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(BY_PARTS, "utf-8")
    loaded = load_tokenizer(str(tmp_path), settings())
    told: dict[str, Any] = {"tokenize": False, "add_generation_prompt": False}
    assert loaded.apply_chat_template(CHAT, **told) == SHOWN
    in_parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in CHAT]
    assert loaded.apply_chat_template(in_parts, **told) == SHOWN
    assert Template(loaded).render(CHAT, {}, "row 0") == (SHOWN + "<assistant>", "")
    given = AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer_of(given, "", settings()).apply_chat_template(CHAT, **told) == SHOWN
    assert given.chat_template == BY_PARTS and given.apply_chat_template(CHAT, **told) != SHOWN


THROUGH_PARTS = "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("as_a_text", ["system", "user", "assistant"])
def test_a_role_that_a_template_takes_for_a_text_stays_one(as_a_text, tokenizer):
    given = copy.copy(tokenizer)
    given.chat_template = (
        f"{{% for m in messages %}}{{% if m['role'] == '{as_a_text}' %}}[{{{{ m['content'] }}}}]"
        f"{{% else %}}<{THROUGH_PARTS}>{{% endif %}}{{% endfor %}}"
    )
    chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    shown = reading_texts(given).apply_chat_template(chat, tokenize=False)
    assert shown == "".join(f"[{c}]" if c == as_a_text[0] else f"<{c}>" for c in "sua")


def test_a_template_that_only_a_processor_has_is_found(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": BY_PARTS}), "utf-8")
    assert AutoTokenizer.from_pretrained(str(tmp_path)).chat_template is None
    loaded = load_tokenizer(str(tmp_path), settings())
    assert loaded.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=False) == SHOWN


def test_any_other_template_stays_as_it_is(tokenizer):
    assert tokenizer_of(tokenizer, "", settings()) is tokenizer


def test_ends_are_those_that_any_part_of_the_configuration_names(folder_of, tokenizer, tmp_path):
    shutil.copytree(folder_of("qwen3_vl"), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    file = tmp_path / "model" / "config.json"
    saved = json.loads(file.read_bytes())
    del saved["text_config"]["eos_token_id"]  # a field that a Qwen3VLTextConfig has by no default
    file.write_text(json.dumps({**saved, "eos_token_id": [1, 7]}), "utf-8")
    assert ends_of_model(str(tmp_path / "model"), settings()) == {1, 7}
    policy = load_policy(str(tmp_path / "model"), tokenizer, settings(load_in_4bit=False))
    assert {1, 7} <= set(policy.eos_token_ids)


def test_a_decoder_with_an_attention_of_its_own_is_trained_on_padded_rows(tokenizer):
    text = {"vocab_size": 128, "hidden_size": 64, "num_layers": 2, "num_heads": 4}
    text |= {"attention_types": [[["global"], 2]], "tie_word_embeddings": False}
    kind: Any = CONFIG_MAPPING["llava"]
    config = kind(
        text_config={"model_type": "gpt_neo", **text}, image_token_index=5,
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, image_size=16, patch_size=8,
        ),
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    expected = by_itself(model)
    policy = load_policy(model, tokenizer, settings(load_in_4bit=False))
    with pytest.warns(UserWarning, match="its attention cannot be replaced"):
        assert not policy.packs
    assert (by_policy(policy) - expected).abs().max() < 1e-5


def test_what_a_module_calls_its_configuration_may_be_a_number():
    model = make_model()
    given = configs_of(model)
    model.model.layers[0].mlp.config = 0.1  # as IDEFICS does with its dropout
    assert configs_of(model) == given


def test_liger_kernel_that_asks_for_a_tower_is_refused_in_a_sentence():
    pytest.importorskip("liger_kernel")
    model = make_wrapper("gemma3")
    set_aside(model)
    with pytest.raises(InputError, match="liger-kernel cannot change a 'gemma3' model: .*; leave use_liger_kernel out"):
        use_liger_kernels(model)
