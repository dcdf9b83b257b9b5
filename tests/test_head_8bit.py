"""The head in int8: what policy and sampler make of it, where it is refused, and how it is loaded and planned."""

from dataclasses import replace

import pytest
import torch
from test_offload import assert_same, run
from test_step import model_of
from tiny_models import DEMO_MODEL, HYBRIDS, make_policy
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.demo import task
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs import training
from lowmem_grpo.model import load
from lowmem_grpo.model.adapters import lora_config
from lowmem_grpo.model.find import find_model, read_config
from lowmem_grpo.model.head import probe_head, read_head
from lowmem_grpo.model.head_8bit import Head8bit, settle_head
from lowmem_grpo.model.packing import pack
from lowmem_grpo.planner import plan as planner


def variety(completion_ids, **_):
    return [len(set(ids)) / 8 for ids in completion_ids]


def untied(name="llama", **changes):
    return model_of(name, tie_word_embeddings=False, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's model with a head of its own."""
    path = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])  # plain, a softcap, scales
def test_policy_and_gradient_are_those_of_a_head_that_is_rounded_so(name):
    rounded = untied(name)
    ours = make_policy(untied(name), load_head_in_8bit=True)
    weight, scale = ours.head.weight, ours.head.scale
    assert weight.dtype == torch.int8 and ours.head.dtype == torch.float32
    error = (weight * scale[:, None] - rounded.lm_head.weight).abs()
    assert (error <= scale[:, None] * 0.501).all() and error.any()
    rounded.lm_head.weight.data = weight * scale[:, None]
    assert_same(run(ours), run(make_policy(rounded)))


def test_a_model_may_ask_the_weight_of_its_head_for_a_dtype():
    config = AutoConfig.for_model("mamba2", **HYBRIDS["mamba2"], tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    settle_head(model, model.device, torch.float32, in_8bit=True)
    probe_head(model, read_head(model))
    settle_head(model, model.device, torch.bfloat16, in_8bit=True)
    assert read_head(model).dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"bf16": None, "fp16": True}], ids=["fp32", "bf16", "fp16"])
def test_the_sampler_has_the_log_probabilities_that_are_trained_on(settings):
    policy = make_policy(untied(), load_head_in_8bit=True, **settings)
    (batch,) = pack([[5] * 9], [[7, 8, 9, 3]], token_budget=100, pad_token_id=0, device=policy.device)
    with torch.no_grad():
        trained = policy.logprobs(batch, 1.0)
        logits = policy.logits(policy.hidden_states(batch)).float()
        whole = policy.base(input_ids=batch.input_ids).logits[0, batch.predictors].float()
    limit = 3e-2 if settings else 1e-5  # a CPU's logits are rounded to 16 bits
    for found in (logits, whole):
        ours = found.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
        torch.testing.assert_close(ours, trained, atol=limit, rtol=0)


def test_a_run_learns_with_it_and_goes_on(folder, tmp_path):
    config = GRPOConfig(
        output_dir=str(tmp_path), load_head_in_8bit=True, max_steps=1, save_steps=1, max_completion_length=8,
        prompts_per_step=2, num_generations=4, use_cpu=True,
    )  # fmt: skip
    problems, _ = task.splits()

    def go(config):
        return train(folder, variety, task.rows(problems[:8]), config=config)

    result = go(config)
    assert isinstance(result.policy.base.lm_head, Head8bit)
    assert result.history[-1]["sampling/sampling_logp_difference/mean"] < 0.01
    more = replace(config, max_steps=2, resume_from_checkpoint="auto")
    assert go(more).history[-1]["step"] == 2
    with pytest.raises(InputError, match="load_head_in_8bit"):
        go(replace(more, max_steps=3, load_head_in_8bit=False))


def test_a_model_that_is_loaded_again_keeps_it():
    model = untied()
    first = make_policy(model, load_head_in_8bit=True)
    expected = run(first)
    for asked in (True, False):
        again = make_policy(first.model, load_head_in_8bit=asked)
        assert again.head.weight is first.head.weight
        assert_same(run(again), expected, bound=0, atol=0)


class Other(nn.Linear):
    pass


def test_a_head_that_is_the_embedding_or_another_layer_is_refused():
    config = GRPOConfig(load_head_in_8bit=True, use_cpu=True)
    for tied in (str(DEMO_MODEL), model_of("llama", tie_word_embeddings=True)):
        with pytest.raises(InputError, match="the head of this model is its embedding too.* leave load_head_in_8bit"):
            find_model(tied, config)
    model = untied()
    model.lm_head = Other(*model.lm_head.weight.shape[::-1], bias=False)
    with pytest.raises(InputError, match="load_head_in_8bit does not know Other"):
        find_model(model, config)


def test_what_does_not_stay_on_the_gpu_is_never_there(folder, monkeypatch):
    """Which a CPU shows by the places that transformers is given, and by the same ones within its memory."""
    config, gpu, cpu = GRPOConfig(bf16=True), torch.device("cuda", 0), torch.device("cpu")
    asked = {"offload_embedding": "model.embed_tokens", "load_head_in_8bit": "lm_head"}
    for names in ((), *((name,) for name in asked), tuple(asked)):
        wanted = replace(config, **dict.fromkeys(names, True))
        places = load._places(read_config(folder, wanted), wanted, gpu)
        assert places == {"": gpu, **{asked[name]: cpu for name in names}}
    assert load._places(read_config(folder, wanted), wanted, cpu) == {"": cpu}

    within = {place: cpu if place else torch.device("cpu", 0) for place in places}
    monkeypatch.setattr(load, "_places", lambda *_: within)
    model = load._load_base(folder, config, cpu, torch.bfloat16)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules()), "accelerate would move what it is given"
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()


def test_an_embedding_that_will_be_offloaded_stays_where_a_loaded_model_has_it():
    model = untied().requires_grad_(False)
    model.model.embed_tokens.to("meta")  # from where nothing can be moved
    load._placed(model, torch.device("cpu"), torch.bfloat16, offloads=True)
    assert model.lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match="meta tensor"):
        load._placed(model, torch.device("cpu"), torch.bfloat16)


def test_a_plan_counts_it_as_it_is():
    forecasts, sizes = [], []
    for in_8bit in (False, True):
        model = untied()
        settings = dict(bf16=True, use_cpu=True, load_head_in_8bit=in_8bit)
        config = GRPOConfig(**settings, prompts_per_step=1, num_generations=2, max_completion_length=8)
        forecasts.append(planner.forecast(model.config, replace(config, max_prompt_length=8)))
        base = make_policy(model, **settings).base
        sizes.append(sum(x.nbytes for x in (*base.parameters(), *base.buffers()) if x.dtype != torch.uint8))
    kind = "embedding, head and the rest"
    vocabulary, width = model.lm_head.rows.shape
    saved = forecasts[0].resident[kind] - forecasts[1].resident[kind]
    assert saved == sizes[0] - sizes[1] == vocabulary * (width - 4)
    more = [phase["head"] for phase in (forecast.phases["update"] for forecast in forecasts)]
    assert more[0] < more[1]


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_chooses_it_last_and_where_it_saves_anything(tied):
    config = GRPOConfig(vram_budget="0.56GB", prompts_per_step=1, num_generations=2, max_completion_length=8)
    found = planner.plan(model_of("llama", tie_word_embeddings=tied).config, config, lora_config(config), 8)
    names = [change.name for change in found.changes]
    assert found.remedy is not None
    assert ("load_head_in_8bit" in names) is not tied and (tied or names[-1] == "load_head_in_8bit")


def test_a_resumed_run_keeps_the_head_that_its_plan_chose(folder, tmp_path, monkeypatch):
    config = GRPOConfig(vram_budget="6GB", output_dir=str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begun = training.RunInputs(
        model=folder, peft_config=None, tokenizer=tokenizer, given=config, config=config, device=torch.device("cpu"),
        notes=[], output_dir=tmp_path, resume=None, callbacks=[], datasets={},
    )  # fmt: skip

    def settled(in_8bit, resume=None):
        chosen = replace(config, load_head_in_8bit=in_8bit)
        plan = planner.Plan(chosen, planner.Forecast({}, {}, None), None, [], 8, [])
        monkeypatch.setattr(training, "plan_to_fit", lambda *_: plan)
        return training.settled(replace(begun, resume=resume), {"prompt": ["2+3"]}, 8)

    state = {"identity": settled(True).identity}
    monkeypatch.setattr(training, "read_state", lambda _: state)
    monkeypatch.setattr(training, "refuse_another_run", lambda *_: None)
    assert settled(True, tmp_path).config.load_head_in_8bit
    with pytest.raises(InputError, match="load_head_in_8bit=False, and that of the run to resume had not"):
        settled(False, tmp_path)


@pytest.mark.gpu
def test_a_run_on_a_gpu(folder, tmp_path):
    config = GRPOConfig(
        output_dir=str(tmp_path), load_head_in_8bit=True, offload_embedding=True, max_steps=2, max_completion_length=8,
        prompts_per_step=2, num_generations=4,
    )  # fmt: skip
    problems, _ = task.splits()
    result = train(folder, variety, task.rows(problems[:8]), config=config)
    base = result.policy.base
    assert base.lm_head.rows.is_cuda
    assert not base.model.embed_tokens.weight.is_cuda
    assert result.history[-1]["sampling/sampling_logp_difference/mean"] < 0.05
