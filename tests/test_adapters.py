"""Several adapters on one base: what each computes, whose gradients there are, and what is saved."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from test_generate import PROMPTS, ShapedSampler, ids_of, paged_shapes
from test_generate import run as complete
from test_graphs import captured_early, recorder  # noqa: F401
from test_train import adapters, run, text_reward
from tiny_models import DEMO_MODEL, SMALL, make_model, make_policy, wake_adapters
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError, NotFiniteError
from lowmem_grpo.generate import engine
from lowmem_grpo.inputs.prompts import read_training_inputs
from lowmem_grpo.model import offload
from lowmem_grpo.model.load import load_policy
from lowmem_grpo.model.packing import pack

pytestmark = pytest.mark.usefixtures("known_trials")

OTHERS = {
    "of the same layers": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "rslora": LoraConfig(r=9, lora_alpha=6, use_rslora=True, target_modules="all-linear"),
    "of few layers": LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "dora": LoraConfig(r=4, target_modules=["v_proj"], use_dora=True),
}


def wake(policy, name, seed=2):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in policy.parameters_of(name).items():
            if "magnitude" not in path:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)


def policy_with_critic(model: Any = "qwen2", config=None, **settings):
    policy = make_policy(model, **settings)
    policy.add("critic", config)
    wake(policy, "critic")
    return policy


def policy_of(config, **settings):
    """A policy whose own adapter is of this configuration, and has the values of policy_with_critic's critic."""
    policy = load_policy(
        make_model(),
        AutoTokenizer.from_pretrained(DEMO_MODEL),
        GRPOConfig(use_cpu=True, bf16=False, gradient_checkpointing=False, **settings),
        config,
    )
    wake(policy, policy.adapter)
    return policy


def logprobs(policy):
    (batch,) = pack([[5] * 20], [[7, 8, 9] * 10], token_budget=1000, pad_token_id=0, device=policy.device)
    return policy.logprobs(batch, 1.0)


def logprobs_of(completions) -> list[Any]:
    return [completion.logprobs for completion in completions]


def gradients(policy):
    """Of every parameter that has one, which then has none."""
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return found


def same(one, other):
    return {*one} == {*other} and all(torch.equal(one[name], other[name]) for name in one)


def settled(policy):
    """What must outlive whatever is worn for a while: what is worn now, and which parameters ask for a gradient."""
    flags = {name: p.requires_grad for name, p in policy.model.named_parameters()}
    worn = {(*layer.active_adapters, layer.disable_adapters) for layer in policy.adapters.layers}
    return policy.adapters.worn, worn, flags


def test_an_adapter_that_is_not_worn_changes_nothing_and_a_new_one_adds_nothing():
    policy = make_policy()
    before = logprobs(policy)
    before.sum().backward()
    learned, own = gradients(policy), policy.parameters_of(policy.adapter)
    policy.add("critic")
    now = logprobs(policy)
    now.sum().backward()
    assert torch.equal(now, before) and same(gradients(policy), learned)
    assert {*own} == {*learned} == {*policy.parameters_of(policy.adapter)}
    with policy.wearing("critic"):
        worn = logprobs(policy)
    with policy.as_base():
        assert torch.equal(worn, logprobs(policy)) and not torch.equal(worn, now)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_worn_adapter_computes_what_a_policy_of_that_adapter_computes(kind):
    policy, expected = policy_with_critic(config=OTHERS[kind]), policy_of(OTHERS[kind])
    with policy.wearing("critic"):
        found = logprobs(policy)
        found.sum().backward()
    theirs = logprobs(expected)
    theirs.sum().backward()
    assert torch.equal(found, theirs)
    learned = {name.replace("critic", expected.adapter): gradient for name, gradient in gradients(policy).items()}
    assert same(learned, gradients(expected)), "and no other adapter has a gradient"


def test_a_copy_has_the_values_the_scale_and_memory_of_its_own():
    policy = policy_of(OTHERS["rslora"])
    policy.add("teacher", copy_of=policy.adapter)
    policy.add("student", copy_of="teacher")
    with policy.wearing("student"):
        assert torch.equal(logprobs(policy), logprobs(policy_of(OTHERS["rslora"])))
    wake(policy, "student", seed=3)
    with policy.wearing("teacher"):
        assert torch.equal(logprobs(policy), logprobs(policy_of(OTHERS["rslora"])))


@pytest.mark.parametrize("settings", [{"bf16": True}, {"bf16": True, "load_in_4bit": False}], ids=str)
def test_an_added_adapter_takes_4_bytes_a_parameter(settings):
    policy = make_policy(**settings)

    def tensors():
        storages = [p.untyped_storage() for p in [*policy.model.parameters(), *policy.model.buffers()]]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    before = tensors()
    policy.add("critic", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    added = policy.parameters_of("critic").values()
    assert tensors() - before == 4 * 2 * 4 * ((64 + 64) + (96 + 64)) == 4 * sum(p.numel() for p in added)
    assert {(p.dtype, p.device) for p in added} == {(torch.float32, policy.device)}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("default", {}, "'default': there is one of that name"),
        ("a.b", {}, "'a.b': a name is letters, digits and _"),
        ("", {}, "a name is letters, digits and _"),
        ("keys", {}, "and none that modules have"),
        ("a/b", {}, "a name is letters, digits and _"),
        ("new", {"copy_of": "nobody"}, "no adapter 'nobody'; there are default, critic"),
        ("new", {"copy_of": "critic", "peft_config": LoraConfig()}, "peft_config has no effect beside copy_of"),
        ("new", {"peft_config": LoraConfig(target_modules=["no_such_proj"])}, "no adapter could be added: .*no_such"),
        ("new", {"peft_config": LoraConfig(bias="all")}, "set bias='none'"),
        ("new", {"peft_config": LoraConfig(init_lora_weights="pissa")}, "'pissa', which takes from the base"),
        ("new", {"peft_config": LoraConfig(target_modules=["q_proj", "lm_head"])}, "leave lm_head out"),
        ("new", {"peft_config": LoraConfig(target_modules=".*_(proj|head)")}, "leave lm_head out"),
        (
            "new",
            {"peft_config": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])},
            "leave lm_head out",
        ),
    ],
)
def test_an_adapter_that_cannot_be_added_leaves_the_policy_as_it_is(name, given, message):
    policy = policy_with_critic("llama")
    before, worn = logprobs(policy), policy.adapters.worn
    with pytest.raises(ValueError, match=message):
        policy.add(name, **given)
    assert torch.equal(logprobs(policy), before) and policy.adapters.worn == worn
    assert [*policy.model.peft_config] == ["default", "critic"]


def test_only_an_adapter_that_is_there_is_worn_or_asked_for():
    policy = make_policy()
    with pytest.raises(ValueError, match="there is no adapter 'critic'; there are default"), policy.wearing("critic"):
        pass
    with pytest.raises(ValueError, match="there is no adapter 'critic'"):
        policy.parameters_of("critic")


@pytest.mark.parametrize("reference", ["base", "initial"])
def test_what_was_worn_is_worn_again_however_a_with_is_left(reference):
    policy = policy_with_critic()
    if reference == "initial":
        policy.snapshot_reference()
    before = settled(policy)
    assert before[0] == (policy.adapter,)
    with policy.as_reference():
        kept = logprobs(policy)
    with policy.wearing("critic"):
        inside, values = settled(policy), logprobs(policy)
        with pytest.raises(KeyError), policy.wearing(policy.adapter), policy.as_base(), policy.wearing("critic"):
            raise KeyError
        with policy.as_reference():
            assert torch.equal(logprobs(policy), kept), "whatever is worn around it"
        assert settled(policy) == inside and torch.equal(logprobs(policy), values)
    assert settled(policy) == before
    assert inside[0] == ("critic",) and inside[2] == before[2], "all ask for a gradient, always"


@pytest.mark.parametrize("around", ["nothing", "wearing", "as_base"])
def test_adding_an_adapter_changes_neither_what_is_worn_nor_who_asks_for_a_gradient(around):
    policy = policy_with_critic(lora_target_modules=["q_proj"])
    contexts = {"nothing": contextlib.nullcontext(), "wearing": policy.wearing("critic"), "as_base": policy.as_base()}
    with contexts[around]:
        values, (worn, on_layers, _) = logprobs(policy), settled(policy)
        policy.add("reward", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))  # of layers that had none
        assert torch.equal(logprobs(policy), values)
        assert settled(policy)[:2] == (worn, on_layers)
    asking = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert asking == {name for name, _ in policy.model.named_parameters() if "lora_" in name}


RECOMPUTED: dict[str, Any] = {
    "layers": {"gradient_checkpointing": True},
    "tiles": {"tiled_mlp": True},
    "tiles of layers": {"gradient_checkpointing": True, "tiled_mlp": True},
}


@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_a_recomputation_wears_what_its_forward_wore_whatever_is_worn_in_the_backward(recomputed, monkeypatch):
    monkeypatch.setattr(offload, "TILE_TOKENS", 7)
    policy = policy_with_critic(**RECOMPUTED[recomputed])

    def learned(leave, backward_in):
        with policy.wearing("critic") if leave else contextlib.nullcontext():
            values = logprobs(policy)
        loss = (values * logprobs(policy).detach()).sum() + logprobs(policy).square().sum()
        with backward_in:
            loss.backward()
        return gradients(policy)

    def inside():
        own = logprobs(policy)
        own.square().sum().backward()
        with policy.wearing("critic"):
            (logprobs(policy) * own.detach()).sum().backward()
        return gradients(policy)

    expected = inside()
    assert {*expected} == {*policy.parameters_of(policy.adapter), *policy.parameters_of("critic")}
    for backward_in in (contextlib.nullcontext(), policy.wearing("critic"), policy.as_base()):
        assert same(learned(True, backward_in), expected)


def test_a_recomputation_without_adapters_has_none_in_the_backward_either():
    policy = policy_with_critic(gradient_checkpointing=True)
    inputs: list[Any] = []
    policy.base.get_input_embeddings().register_forward_hook(
        lambda _, __, looked_up: inputs.append(looked_up.detach().requires_grad_()) or inputs[-1]
    )
    for leave in (False, True):
        with policy.adapters.wearing(()):
            loss = logprobs(policy).square().sum()
            if not leave:
                loss.backward()
        if leave:
            loss.backward()
    inside, left = (given.grad for given in inputs)
    assert torch.equal(left, inside) and inside.abs().max() > 0
    assert not gradients(policy)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_sampled_is_the_worn_adapters(kind, dense):
    policy, expected = policy_with_critic(config=OTHERS[kind]), policy_of(OTHERS[kind])
    weights = "dense" if dense else "4bit"
    own = complete(policy, weights=weights)
    with policy.wearing("critic"):
        found = complete(policy, weights=weights)
    theirs = complete(expected, weights=weights)
    assert ids_of(found) == ids_of(theirs) != ids_of(own)
    assert all(torch.equal(*pair) for pair in zip(logprobs_of(found), logprobs_of(theirs), strict=True))
    assert ids_of(complete(policy, weights=weights)) == ids_of(own)


def test_a_capture_that_is_trusted_is_of_what_was_worn(captured_early, monkeypatch):  # noqa: F811
    policy, expected = policy_with_critic(), policy_of(OTHERS["of few layers"])
    policy.add("few", OTHERS["of few layers"])
    wake(policy, "few")
    monkeypatch.setitem(engine.CAPTURE, "cpu", recorder)
    sampler = ShapedSampler(policy, next(paged_shapes(PROMPTS, 3, 12, 9)), rollout_weights="4bit")
    own = ids_of(sampler.run())
    trusted = {*sampler.captures.trusted}
    assert trusted and own != ids_of(complete(expected, weights="4bit"))
    for _ in range(2):  # captured, and from then on replayed: each graph reads its own adapter's copy
        with policy.wearing("few"):
            found = sampler.sampled()
        assert ids_of(found.completions) == ids_of(complete(expected, weights="4bit"))
        assert ids_of(sampler.run()) == own
    assert found.metrics["rollout/replayed_share"] == 1
    assert len(sampler.captures.trusted) == 2 * len(trusted) and sampler.captures.refusal is None


def test_a_folder_holds_one_adapter_in_pefts_format_whatever_its_name(tmp_path):
    policy = policy_with_critic(config=OTHERS["of few layers"], load_in_4bit=False)
    for name in (policy.adapter, "critic"):
        policy.save(tmp_path / name, name)
        assert not [path for path in (tmp_path / name).iterdir() if path.is_dir()]
        plain = PeftModel.from_pretrained(make_model(), str(tmp_path / name)).eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad(), policy.wearing(name):
            torch.testing.assert_close(plain(input_ids=ids).logits, policy.base(input_ids=ids).logits)
    policy.save(tmp_path / "own")
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in (policy.adapter, "own")]
    assert same(*files) and len(files[0]) == len(policy.parameters_of(policy.adapter))


def test_a_broken_adapter_is_not_saved_and_does_not_stop_the_policys_own(tmp_path):
    policy = policy_with_critic()
    next(iter(policy.parameters_of("critic").values())).data[0, 0] = torch.nan
    policy.save(tmp_path / "own")
    with pytest.raises(NotFiniteError, match="the adapter is not saved, since .*critic"):
        policy.save(tmp_path / "critic", "critic")
    assert not (tmp_path / "critic").exists()


def two_adapters() -> Any:
    """The demo's model with two adapters that are not zero, of which the second is active."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.add_adapter("mine", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.set_adapter("mine")
    return adapted


def test_a_run_trains_the_active_one_of_two_adapters_and_leaves_the_other(tmp_path):
    """Also over a resume, whose checkpoint holds that one alone."""
    model = two_adapters()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    settings = dict(rewards=text_reward, load_in_4bit=False, save_steps=1)
    worn = []
    whole = run(
        tmp_path / "whole", model, callbacks=[lambda _, __, policy: worn.append(policy.adapters.worn)], **settings
    )
    assert {*worn} == {("mine",)} and {*adapters(whole)} == {name for name in before if ".mine." in name}
    for name, parameter in whole.policy.model.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, before[name]) == (".default." in name), name
    saved = load_file(tmp_path / "whole/out/checkpoint-2/adapter_model.safetensors")
    assert {f"{name.removesuffix('.weight')}.mine.weight" for name in saved} == {*adapters(whole)}
    run(tmp_path / "cut", two_adapters(), **settings, max_steps=1)
    resumed = run(tmp_path / "cut", two_adapters(), **settings, resume_from_checkpoint=True)
    assert same(adapters(resumed), adapters(whole))


def test_a_model_with_two_active_adapters_is_refused(tmp_path):
    model = two_adapters()
    model.base_model.set_adapter(["default", "mine"])
    with pytest.raises(ValueError, match="default, mine active at once; activate the one to train"):
        run(tmp_path, model, load_in_4bit=False)


def test_a_run_is_the_same_with_another_adapter_on_the_base(tmp_path):
    """Its metrics, checkpoint and gradient norm are of the policy's own adapter, which another's NaN does not touch."""

    def add(step, _, policy):
        if step == 1:
            with torch.random.fork_rng():
                policy.add("critic", LoraConfig(r=2, target_modules=["q_proj"]))
            for parameter in policy.parameters_of("critic").values():
                parameter.data.fill_(torch.nan)
                parameter.grad = torch.full_like(parameter, torch.nan)

    alone = run(tmp_path / "alone", rewards=text_reward, save_steps=2)
    beside = run(tmp_path / "beside", rewards=text_reward, save_steps=2, callbacks=[add])
    assert "critic" in beside.policy.model.peft_config
    norms = [[line["grad_norm"] for line in result.history] for result in (alone, beside)]
    assert norms[0] == norms[1] and min(norms[0]) > 0
    for name in ("adapter_model", "optimizer"):
        files = [load_file(tmp_path / which / f"out/checkpoint-2/{name}.safetensors") for which in ("alone", "beside")]
        assert same(*files), name


def test_a_model_that_is_loaded_again_keeps_its_adapters_and_what_they_are(tokenizer):
    policy = policy_with_critic(load_in_4bit=False, gradient_checkpointing=True, bf16=True)
    values = {name: p.detach().clone() for name, p in policy.parameters_of("critic").items()}
    config = GRPOConfig(use_cpu=True, load_in_4bit=False, gradient_checkpointing=True)
    again = load_policy(policy.model, tokenizer, config)
    assert again.packs and again.adapter == policy.adapter
    assert same(again.parameters_of("critic"), values)
    assert {p.dtype for p in again.parameters_of("critic").values()} == {torch.float32}
    wake_adapters(again)
    with again.wearing("critic"):
        values = logprobs(again)
    values.sum().backward()
    assert {*gradients(again)} == {*again.parameters_of("critic")}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(r=2, bias="all", task_type="CAUSAL_LM"), "the model's adapter trains biases"),
        (IA3Config(task_type="CAUSAL_LM"), "the model's adapter is a IA3Config; only LoraConfig is supported"),
    ],
)
def test_an_adapter_that_is_not_trained_here_is_refused_where_it_comes_with_the_model(config, words, tmp_path):
    model = get_peft_model(make_model(), config)
    with pytest.raises(InputError, match=words):
        read_training_inputs(model, len, [{"prompt": "1"}], None, GRPOConfig(output_dir=str(tmp_path), use_cpu=True))


MAMBA: dict[str, dict[str, Any]] = {
    "mamba2": dict(num_heads=8, head_dim=16, state_size=8, n_groups=1),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1),
}


@pytest.mark.parametrize("kind", MAMBA)
def test_layers_on_which_peft_allows_no_adapter_are_left_out_of_all_linear(kind, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, "num_hidden_layers": 1, **MAMBA[kind]})
    model = AutoModelForCausalLM.from_config(config)
    policy = make_policy(copy.deepcopy(model), load_in_4bit=False)
    policy.add("other", LoraConfig(target_modules="all-linear", exclude_modules=r".*\.up_proj"))
    with pytest.raises(InputError, match="'out_proj' is incompatible"):
        make_policy(copy.deepcopy(model), load_in_4bit=False, lora_target_modules=["out_proj"])
    own, other = policy.parameters_of(policy.adapter), policy.parameters_of("other")
    for parameters in (own, other):
        assert any("in_proj" in path for path in parameters) and not any("out_proj" in path for path in parameters)
    assert not any("up_proj" in path for path in other)
    policy.save(tmp_path)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(model, tmp_path))
    saved = policy.adapter_state(policy.adapter)
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[path], saved[path]) for path in saved)


def test_a_router_that_is_a_linear_layer_by_its_class_gets_no_adapter():
    config = AutoConfig.for_model(
        "phimoe", **{**SMALL, "num_hidden_layers": 1}, num_local_experts=4, router_jitter_noise=0.0
    )
    policy = make_policy(AutoModelForCausalLM.from_config(config), load_in_4bit=False)
    assert not any("router" in path for path in policy.parameters_of(policy.adapter))
