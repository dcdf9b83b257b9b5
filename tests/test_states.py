"""States of layers that keep one, in the engine."""

import copy
import shutil
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_checkpoint import Stop, comparable, stop_at
from test_generate import PROMPTS, ShapedSampler, ids_of, own_logprobs, paged_shapes, run, shapes, slow
from test_train import ROWS, adapters, text_reward
from test_train import run as train_tiny
from tiny_models import DEMO_MODEL, HYBRIDS, OutOfMemory, make_model, make_policy
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowmem_grpo.benchmarks.measure import peak_allocated
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.generate import engine, hf
from lowmem_grpo.generate.graphs import Kept
from lowmem_grpo.generate.sampling import SamplingParams
from lowmem_grpo.generate.shape import StoreShape, state_tokens, store_shape, token_bytes
from lowmem_grpo.generate.states import States, clear, state_bytes, state_shapes
from lowmem_grpo.model.adapters import lora_config
from lowmem_grpo.model.mixing import mixers
from lowmem_grpo.model.outline import Unknown, read
from lowmem_grpo.model.trial import refused
from lowmem_grpo.pipeline.sample import sample
from lowmem_grpo.planner import plan as planner
from lowmem_grpo.planner import trace

hybrids = pytest.mark.parametrize("kind", ["qwen3_5_text", *(slow(name) for name in HYBRIDS if name != "qwen3_5_text")])
CPU = torch.device("cpu")
FAR = {"olmo_hybrid": 2.5e-5}  # by transformers' own cache it is 1.7e-5 from its forward


def why_refused(policy):
    """Why a trial of the engine refuses a policy, or None."""
    return refused(policy, partial(engine._difference, kv_dtype=policy.dtype))


@hybrids
def test_logprobs_are_those_of_a_training_forward_and_greedy_is_generates(kind):
    """In shared prompts and not, in pages of which too few are there, with prompts that are prefilled together."""
    policy = make_policy(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert why_refused(policy) is None
    found = []
    for shape in (*shapes(PROMPTS, 3, 12, 4), list(paged_shapes(PROMPTS, 3, 12, 4))[1]):
        found.append(ShapedSampler(policy, shape, token_budget=1000).run())
        for index, completion in enumerate(found[-1]):
            truth = own_logprobs(policy, PROMPTS[index // 3], completion, 1.0)
            torch.testing.assert_close(completion.logprobs, truth, atol=FAR.get(kind, 1e-5), rtol=0)
    assert ids_of(found[0]) == ids_of(found[1]) == ids_of(found[2])
    greedy = SamplingParams(max_completion_length=12, temperature=0)
    assert ids_of(run(policy, 1, temperature=0)) == ids_of(hf.sample(policy, PROMPTS, 1, greedy, 10_000)[0])


@pytest.mark.parametrize("bf16", [False, True])
def test_shapes_are_those_that_the_layers_give(bf16):
    """The recurrent state is fp32, and the inputs of the convolution are of the compute dtype."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    delta = state_shapes(make_policy("qwen3_5_text", bf16=bf16))
    assert delta == {0: {("conv", 0): ((128, 4), dtype), ("recurrent", 0): ((4, 16, 16), torch.float32)}}
    assert state_bytes(delta) == 128 * 4 * dtype.itemsize + 4 * 16 * 16 * 4
    assert state_shapes(make_policy("lfm2", bf16=bf16)) == {0: {("conv", 0): ((64, 3), dtype)}}
    assert state_shapes(make_policy("bamba", bf16=bf16))[0]["recurrent", 0].size == (4, 32, 16)
    assert state_shapes(make_policy("qwen2", bf16=bf16)) == {}


def tables_of(states):
    return [table for of in (states.own, states.prefix) for named in of.values() for table in named.values()]


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2"])
def test_states_are_in_the_plan_and_in_what_is_reported(kind, monkeypatch):
    policy, made, own = make_policy(kind), [], States.__init__

    def init(self, *given):
        own(self, *given)
        made.append(sum(table.untyped_storage().nbytes() for table in tables_of(self)))

    monkeypatch.setattr(States, "__init__", init)
    sampler = ShapedSampler(policy, max_completion_length=4, rollout_token_budget=250)
    with OutOfMemory(nth=1):  # of the one token that tells the shapes, which is run anew
        size = state_bytes(sampler.state_shapes)
    token = token_bytes(policy.layer_shapes, policy.dtype)
    sampled = sampler.sampled(4)
    shape = sampler.store_shape(PROMPTS, 4, 250)
    assert shape.state_tokens == state_tokens(size, token) and sampled.metrics["rollout/slots"] == shape.slots < 12
    assert made == [shape.num_states * size]
    assert sampled.metrics["rollout/kv_mib"] * 2**20 == shape.num_tokens() * token + made[0]
    assert (shape.num_tokens() * token + made[0]) / token <= shape.cost() <= 250


def test_a_shape_with_states_keeps_to_its_budget_and_to_one_prefix_a_group_where_states_are_large():
    draw = torch.Generator().manual_seed(0)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=draw))

    for _ in range(200):
        asked = dict(
            prompt_tokens=number(2, 300), num_prompts=number(1, 6), num_generations=number(2, 8),
            max_completion_length=number(1, 200), budget_tokens=number(1, 20_000),
        )  # fmt: skip
        worth = number(0, 600)
        for paged in (False, True):
            shape = store_shape(**asked, paged=paged, state_tokens=worth)
            plain = store_shape(**asked, paged=paged)
            assert shape.state_tokens == worth and shape.slots <= plain.slots
            assert shape.cost() <= asked["budget_tokens"] or shape.slots == 1
            groups = -(-shape.slots // asked["num_generations"])
            if worth >= asked["prompt_tokens"]:
                assert shape.prefixes <= groups
            more = store_shape(**{**asked, "budget_tokens": shape.cost()}, paged=paged, state_tokens=worth)
            assert more.slots >= shape.slots, "what fitted fits again"
            assert shape.halved().cost() <= shape.cost() and shape.at_most(1).state_tokens == worth
            if not worth:
                assert replace(shape, state_tokens=0) == plain


def test_completions_begin_where_their_prompts_ended_move_and_are_parked():
    shapes = state_shapes(make_policy("qwen3_5_text", bf16=True))
    states = States(shapes, StoreShape(4, 8, 2, 8), CPU)
    for table in tables_of(states):
        table.copy_(torch.randn(table.shape))
    own, prefix = ([x.clone() for x in named[0].values()] for named in (states.own, states.prefix))
    states.start(torch.tensor([2, 0]), torch.tensor([1, 0]))
    states.move(torch.tensor([2]), torch.tensor([3]))
    saved = states.copied_out(1)
    clear(states.own, torch.tensor([1]))
    for now, was, of in zip(states.own[0].values(), own, prefix, strict=True):
        assert torch.equal(now, torch.stack([of[0], torch.zeros_like(was[1]), of[1], of[1]]))
    states.copy_in(1, saved)
    assert all(torch.equal(now[1], was[1]) for now, was in zip(states.own[0].values(), own, strict=True))


def test_a_prompt_of_one_token_begins_without_a_state_where_another_stood():
    """Each of the two slots, and each of the two prefix rows, has had three prompts by then."""
    policy = make_policy("qwen3_5_text")
    prompts = [*PROMPTS[1:], [10], [11]]
    for shape in shapes(prompts, 2, 8, 2):
        found = run(policy, 2, prompts=prompts, shape=shape, max_completion_length=8)
        for index, completion in enumerate(found[4:]):
            truth = own_logprobs(policy, prompts[2 + index // 2], completion, 1.0)
            torch.testing.assert_close(completion.logprobs, truth, atol=1e-5, rtol=0)


def test_kept_states_are_let_go_where_memory_runs_out():
    kept, shapes = Kept(), state_shapes(make_policy("lfm2"))
    large = States(shapes, StoreShape(9, 8, 2, 8), CPU, kept)
    again = States(shapes, StoreShape(4, 8, 2, 8), CPU, kept)
    assert again.own[0]["conv", 0].data_ptr() == large.own[0]["conv", 0].data_ptr()
    assert again.commit is not None and large.commit is not None and again.commit.data_ptr() == large.commit.data_ptr()
    kept.forget("own states")
    assert [*kept.tensors] == ["commit"]


def test_a_mixer_whose_steps_ignore_its_state_is_refused(monkeypatch):
    policy = make_policy("qwen3_5_text")
    own = States.advance

    def forgetful(self, mixer, forward, hidden):
        clear(self.own, torch.arange(len(hidden)))
        return own(self, mixer, forward, hidden)

    monkeypatch.setattr(States, "advance", forgetful)
    assert "layers.0.linear_attn is" in why_refused(policy)


def test_a_completion_that_is_moved_takes_its_states_along(monkeypatch):
    policy, moved, own = make_policy("qwen3_5_text"), [], States.move
    policy.eos_token_ids = list(range(2, 25))

    def move(self, sources, targets):
        moved.extend(targets.tolist())
        own(self, sources, targets)

    monkeypatch.setattr(States, "move", move)
    for index, completion in enumerate(run(policy, 3, max_completion_length=12)):
        truth = own_logprobs(policy, PROMPTS[index // 3], completion, 1.0)
        torch.testing.assert_close(completion.logprobs, truth, atol=1e-5, rtol=0)
    assert moved


@pytest.mark.parametrize("kind", ["qwen3_5_text", slow("bamba"), slow("zamba2")])
def test_the_planner_reads_the_bytes_of_states_off_tensors_without_memory(kind):
    """Of four layers of two kinds, of which one of each kind is run."""
    twice = {"num_hidden_layers": 4, "layer_types": 2 * HYBRIDS["qwen3_5_text"]["layer_types"]}
    settings = HYBRIDS[kind] | (twice if kind == "qwen3_5_text" else {})
    policy = make_policy(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)), bf16=True)
    config = GRPOConfig(output_dir="unused", use_cpu=True, bf16=True)
    whole = trace.skeleton(trace.Key(policy.base.config, lora_config(config)), "bfloat16", False, True)
    assert trace._shapes(whole, config.compute_dtype)[2].held == state_bytes(state_shapes(policy)) > 0


@pytest.mark.parametrize("kind", ["bamba", slow("zamba2")])
def test_the_planner_counts_the_copies_that_a_step_makes_of_states(kind):
    """In fp32, as PyTorch on a CPU has copies within an operation of two dtypes; by its own record of what it allocates."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **HYBRIDS[kind]))
    policy = make_policy(model, bf16=False, load_in_4bit=False)
    config = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    whole = trace.skeleton(trace.Key(policy.base.config, lora_config(config)), "float32", False, False)
    found, kept, rows = trace._shapes(whole, "float32")[2], state_shapes(policy), 12
    for planned, where in ((found.step, None), (found.captured_step, Kept())):
        states, mixer = States(kept, StoreShape(rows, 1, 0, 0), CPU, where), mixers(policy.decoder)[0]
        step = partial(states.advance, mixer, mixer.forward.one_call, torch.randn(rows, 1, 64))
        with policy.inference():
            seen = peak_allocated(step, CPU)
        assert abs(rows * planned - seen) <= 0.05 * seen and planned > 3 * found.start > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "bamba"])
def test_the_planner_counts_what_states_take(kind):
    """On a GPU, where captured steps last, those of completions stay between rollouts."""
    key = AutoConfig.for_model(kind, **HYBRIDS[kind])
    config = GRPOConfig(
        output_dir="unused", use_cpu=True, bf16=True, num_generations=4, prompts_per_step=2, max_prompt_length=40,
        max_completion_length=24, token_budget=100, rollout_token_budget=300,
    )  # fmt: skip
    sampler = ShapedSampler(make_policy(kind, bf16=True), max_completion_length=24, rollout_token_budget=300)
    prompts = [list(range(5, 45))] * 2
    shape = sampler.store_shape(prompts, 4, 300)
    allocated = sum(table.nbytes for table in tables_of(States(sampler.state_shapes, shape, CPU)))
    found = planner.forecast(key, config)
    rollout = found.phases["rollout"]
    assert rollout["states of completions"] + rollout["states of prompts"] == allocated
    assert found.state_tokens == shape.state_tokens
    on_a_gpu = replace(config, use_cpu=False)
    lasting = planner.forecast(key, on_a_gpu)
    again = planner.forecast(key, replace(on_a_gpu, rollout_graphs_last=False))
    assert lasting.resident["states of completions"] == again.phases["rollout"]["states of completions"] > 0
    assert "states of completions" not in lasting.phases["rollout"] | again.resident
    steps = shape.slots * trace.trace(trace.Key(key, lora_config(on_a_gpu)), on_a_gpu).states.captured_step
    assert steps <= again.phases["rollout"]["captured steps"] and steps > 0


@pytest.mark.slow
def test_a_run_of_a_model_with_states_resumes_bit_for_bit_and_is_sampled_from(tmp_path):
    """With evaluations, on packed rows; and sampled beside training, the tokens have training's log-probabilities."""
    folder, tokenizer = tmp_path / "model", AutoTokenizer.from_pretrained(DEMO_MODEL)
    make_model("qwen3_5_text").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    asked = dict(
        model=str(folder), rewards=text_reward, eval_dataset=ROWS[:2], bf16=False, max_steps=3, save_steps=2,
        eval_steps=2, beta=0.1, num_generations=3, max_completion_length=8,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(generate|padded rows)")
        whole = train_tiny(tmp_path / "whole", **asked)
        with pytest.raises(Stop):
            train_tiny(tmp_path / "cut", callbacks=[stop_at(3)], **asked)
        shutil.rmtree(tmp_path / "cut/out/checkpoint-3")
        resumed = train_tiny(tmp_path / "cut", resume_from_checkpoint=True, **asked)
        assert comparable(resumed.history) == comparable(whole.history) and len(resumed.history) == 3
        for name, value in adapters(resumed).items():
            assert torch.equal(value, adapters(whole)[name]), name
        assert max(line["sampling/sampling_logp_difference/max"] for line in whole.history) < 2e-5
        assert [line["step"] for line in whole.eval_history] == [0, 2, 3]
        output = tmp_path / "sampled.jsonl"
        config = SampleConfig(output=str(output), num_generations=2, max_completion_length=8, use_cpu=True, bf16=False)
        sample(str(tmp_path / "whole/out/adapter"), ROWS[:3], text_reward, config)
    assert len(output.read_text(encoding="utf-8").splitlines()) == 6


def test_a_fast_step_says_that_it_knows_no_states():
    with pytest.raises(Unknown, match="it has layers that keep a state"):
        read(make_policy("lfm2"))


class Two(nn.Module):
    """Two layers with a state in the place of one."""

    def __init__(self, mixer):
        super().__init__()
        self.first, self.second = mixer, copy.deepcopy(mixer)

    def forward(self, hidden, **given):
        return self.first(hidden, **given) + self.second(hidden, **given)


def test_a_layer_that_keeps_states_in_two_places_is_refused_by_the_engine_and_packs():
    """A store has one row for a layer, into which both would write; packed rows keep no states."""
    policy = make_policy("mamba2")
    policy.base.backbone.layers[1].mixer = Two(policy.base.backbone.layers[1].mixer)
    assert why_refused(policy) == "a layer of its keeps states in more than one place"
    assert policy.packs
