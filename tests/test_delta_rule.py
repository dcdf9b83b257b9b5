"""The step of the gated delta rule that layers of transformers take while a token of each slot is computed."""

import inspect

import pytest
import torch
from tiny_models import HYBRIDS
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_grpo.generate import delta_rule
from lowmem_grpo.generate.delta_rule import STEP, steps_in_place
from lowmem_grpo.model.mixing import Call, mixers

RECURRENT = ("recurrent", 0)


def layer_of(kind, dtype=torch.float32):
    """A layer with a state, its states after 6 tokens of 3 rows, and the next token of each."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **HYBRIDS[kind]), dtype=dtype)
    (mixer,) = mixers(model.eval())
    prompt = Call()
    with torch.no_grad():
        mixer(torch.randn(3, 6, 64, dtype=dtype), prompt)
    return mixer, prompt.after, torch.randn(3, 1, 64, dtype=dtype)


def stepped(mixer, states, token, commit=None):
    """(out, the states after, whether they were written in place) of a step of ours; the states given are changed."""
    call = Call(states)
    with torch.no_grad(), steps_in_place(mixer, None if commit is None else torch.tensor(commit)) as in_place:
        return mixer(token, call), call.after, in_place


def copies(states):
    return {name: state.clone() for name, state in states.items()}


@pytest.fixture
def steps(monkeypatch):
    """The shapes of the states that our step was called with."""
    seen = []

    def counted(*arguments, step=delta_rule.delta_step, **keywords):
        seen.append(tuple(arguments[5].shape))
        return step(*arguments, **keywords)

    monkeypatch.setattr(delta_rule, "delta_step", counted)
    return seen


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_next", "olmo_hybrid"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_a_layer_computes_a_token_as_it_would_by_itself_and_its_state_is_written_where_it_stands(
    kind, dtype, bound, steps
):
    mixer, states, token = layer_of(kind, dtype)
    own = Call(copies(states))
    with torch.no_grad():
        expected = mixer(token, own)
    assert not steps
    out, after, in_place = stepped(mixer, states, token)
    assert in_place and steps[-1:] == [tuple(states[RECURRENT].shape)]
    assert after[RECURRENT] is states[RECURRENT]
    torch.testing.assert_close(out, expected, rtol=0, atol=bound)
    torch.testing.assert_close(after[RECURRENT], own.after[RECURRENT], rtol=0, atol=2e-6)


def test_states_of_more_slots_than_there_are_tokens_are_left_as_they_are():
    mixer, states, token = layer_of("qwen3_5_text")
    table = torch.full((7, *states[RECURRENT].shape[1:]), torch.nan)
    table[:3] = states[RECURRENT]
    out, _, _ = stepped(mixer, {**states, RECURRENT: table[:3]}, token)
    expected, own, _ = stepped(mixer, copies(states), token)
    assert torch.equal(out, expected) and torch.equal(table[:3], own[RECURRENT]) and table[3:].isnan().all()


def test_a_try_leaves_states_as_they_are():
    mixer, states, token = layer_of("qwen3_5_text")
    before = copies(states)
    tried, after, _ = stepped(mixer, states, token, commit=False)
    assert after[RECURRENT] is states[RECURRENT] and torch.equal(states[RECURRENT], before[RECURRENT])
    done, _, _ = stepped(mixer, states, token, commit=True)
    assert torch.equal(tried, done) and not torch.equal(states[RECURRENT], before[RECURRENT])


@pytest.mark.parametrize("kind", ["bamba", "lfm2"])
def test_layers_of_other_rules_go_on_as_they_are(kind, steps):
    mixer, states, token = layer_of(kind)
    own = Call(copies(states))
    with torch.no_grad():
        expected = mixer(token, own)
    out, _, in_place = stepped(mixer, states, token)
    assert not in_place and not steps and torch.equal(out, expected)


def test_a_state_that_the_kernel_does_not_serve_is_moved_on_by_the_layers_own_step(steps):
    mixer, states, token = layer_of("qwen3_5_text")
    del steps[:]
    states[RECURRENT] = states[RECURRENT].bfloat16()
    _, after, in_place = stepped(mixer, states, token)
    assert in_place and after[RECURRENT] is not states[RECURRENT] and not steps


def test_the_layers_own_step_is_back_in_its_place_after_an_error():
    mixer, _, _ = layer_of("qwen3_5_text")
    names = inspect.unwrap(type(mixer).forward).__globals__
    own = names[STEP]
    with pytest.raises(KeyError), steps_in_place(mixer, None):
        assert names[STEP] is not own
        raise KeyError
    assert names[STEP] is own


def without_decay(own):
    return lambda **given: own(**given | dict(g=torch.zeros_like(given["g"])))


def of_one_state_for_all_heads(own):
    def step(**given):
        out, state = own(**given)
        return out, state.mean(1, keepdim=True).expand_as(state)

    return step


def of_alternating_heads(own):
    """A key head for every other value head, and not for two that follow each other."""

    def step(query, key, **given):
        alternating = [x.repeat(1, 1, given["value"].shape[2] // x.shape[2], 1) for x in (query, key)]
        return own(*alternating, **given)

    return step


def of_another_signature(own):
    return lambda query, key, value, decay, **given: own(query, key, value, g=decay, **given)


@pytest.mark.parametrize(
    "other", [without_decay, of_one_state_for_all_heads, of_alternating_heads, of_another_signature]
)
def test_a_step_that_takes_or_makes_something_else_stays(other, monkeypatch):
    mixer, _, _ = layer_of("qwen3_5_text")
    names = inspect.unwrap(type(mixer).forward).__globals__
    step = other(inspect.unwrap(names[STEP]))
    monkeypatch.setitem(names, STEP, step)
    with steps_in_place(mixer, None) as in_place:
        assert not in_place and names[STEP] is step


def test_a_step_that_takes_as_many_key_heads_as_value_heads_alone_is_ours_too(monkeypatch):
    """As transformers' before 5.21."""
    mixer, _, _ = layer_of("qwen3_5_text")
    names = inspect.unwrap(type(mixer).forward).__globals__
    own = inspect.unwrap(names[STEP])

    def step(query, key, value, **given):
        if key.shape[2] != value.shape[2]:
            raise RuntimeError("sizes must match")
        return own(query, key, value, **given)

    monkeypatch.setitem(names, STEP, step)
    with steps_in_place(mixer, None) as in_place:
        assert in_place and names[STEP] is not step


def test_flas_step_stays_where_fla_is_installed(monkeypatch):
    mixer, _, _ = layer_of("qwen3_5_text")
    names = inspect.unwrap(type(mixer).forward).__globals__
    own = names[STEP]
    delta_rule._is_gated_delta_rule.cache_clear()
    monkeypatch.setattr(delta_rule, "find_spec", lambda name: object() if name == "fla" else None)
    with steps_in_place(mixer, None) as in_place:
        assert not in_place and names[STEP] is own
    delta_rule._is_gated_delta_rule.cache_clear()


def test_the_generator_of_a_run_is_not_asked():
    mixer, _, _ = layer_of("qwen3_5_text")
    delta_rule._is_gated_delta_rule.cache_clear()
    before = torch.get_rng_state()
    with steps_in_place(mixer, None) as in_place:
        assert in_place
    assert torch.equal(torch.get_rng_state(), before)
