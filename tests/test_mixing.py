"""Layers with a state, called by our layouts."""

import pytest
import torch
from test_trial import STATES
from tiny_models import SMALL, make_policy
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lowmem_grpo.model.attention import laid_out
from lowmem_grpo.model.mixing import Call, install, mixers

KINDS = ("qwen3_5_text", "bamba", "lfm2")


def tiny(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **STATES[kind]}))
    return model.float().eval()


class InParts:
    """A layout of one row, whose tokens come in calls of these lengths; each begins with the states of the one before."""

    def __init__(self, *lengths):
        self.lengths, self.seen = lengths, []

    def mix(self, mixer, forward, hidden):
        outputs, states = [], None
        for part in hidden.split(list(self.lengths), 1):
            call = Call(states, writable=part.shape[1] == 1)
            outputs.append(forward(part, call))
            states = call.after
        self.seen.append(mixer)
        return torch.cat(outputs, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_parts_is_what_it_is_in_one(kind):
    model = tiny(kind)
    ids = torch.randint(2, 128, (1, 12), generator=torch.Generator().manual_seed(1))
    decoder = model.get_decoder()
    with torch.no_grad():
        whole = decoder(input_ids=ids, use_cache=False).last_hidden_state
        install(model)
        for lengths in ((12,), (5, 7), (1, 1, 2, 8), (11, 1)):
            layout = InParts(*lengths)
            with laid_out(layout):
                parted = decoder(input_ids=ids, use_cache=False).last_hidden_state
            assert layout.seen == mixers(model) and len(layout.seen) == 1
            torch.testing.assert_close(parted, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_before_a_call_is_as_it_was_after_it(kind):
    """Mamba 2 writes into the one that it gets."""
    (mixer,) = mixers(tiny(kind))
    with torch.no_grad():
        prompt, step = Call(), None
        mixer(torch.randn(2, 6, 64), prompt)
        before = {name: state.clone() for name, state in prompt.after.items()}
        step = Call(prompt.after, writable=True)
        mixer(torch.randn(2, 1, 64), step)
    assert before.keys() == step.after.keys()
    for name, state in before.items():
        assert torch.equal(prompt.after[name], state) and not torch.equal(step.after[name], state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_generates_with_its_own_cache(kind):
    model = tiny(kind)
    ids = torch.randint(2, 128, (2, 5), generator=torch.Generator().manual_seed(1))
    asked = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    own = model.generate(ids, past_key_values=DynamicCache(config=model.config), **asked)
    install(model)
    assert torch.equal(model.generate(ids, **asked), own)


@pytest.mark.parametrize("kind", KINDS)
def test_in_training_a_mixer_has_an_empty_cache(kind, monkeypatch):
    """Without, some take a kernel that reads out_proj.weight raw: 4-bit bytes, and no adapter on it."""
    policy = make_policy(tiny(kind), load_in_4bit=False, lora_target_modules="all-linear")
    (mixer,) = mixers(policy.base)
    given = []
    own = mixer.forward.own

    def watched(hidden, *arguments, **keywords):
        given.append(keywords[mixer.forward.cache])
        return own(hidden, *arguments, **keywords)

    monkeypatch.setattr(mixer.forward, "own", watched)
    policy.decoder(input_ids=torch.arange(2, 12)[None], use_cache=False)
    assert [type(cache) for cache in given] == [Call] and not given[0].before


def test_a_model_that_is_equipped_twice_has_its_own_forward_inside():
    model = tiny("lfm2")
    install(model)
    install(model)
    (mixer,) = mixers(model)
    assert mixer.forward.own.__func__ is type(mixer).forward
