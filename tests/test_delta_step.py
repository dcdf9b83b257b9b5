"""A step of the gated delta rule, kernel and twin, against transformers' own and against fp64 arithmetic."""

import inspect
from typing import Any

import pytest
import torch
from backends import every_place
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from lowmem_grpo.kernels.delta_step import delta_step

EAGER: Any = inspect.unwrap(torch_recurrent_gated_delta_rule)  # transformers' own, where fla would have its place
SHAPES = [  # rows, key heads, value heads, K, V
    (9, 1, 1, 1, 3),
    (3, 2, 2, 16, 16),
    (2, 2, 4, 24, 40),
    (2, 1, 4, 128, 72),  # V is more than one block
    (1, 1, 2, 160, 20),
]


# What is allocated and not written is NaN.
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def case(rows, key_heads, value_heads, K, V, dtype=torch.float32, seed=0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    return dict(
        query=normal(rows, key_heads, K).to(dtype),
        key=normal(rows, key_heads, K).to(dtype),
        value=normal(rows, value_heads, V).to(dtype),
        log_decay=-normal(rows, value_heads).exp(),
        strength=normal(rows, value_heads).sigmoid().to(dtype),
        state=normal(rows, value_heads, K, V),
    )


def step(given, place, *, normalize=True, commit=None) -> tuple[Tensor, Tensor]:
    """(out, state) on the CPU; what is given stays as it is."""
    backend, device = place
    given = {name: tensor.to(device) for name, tensor in given.items()}
    state = given.pop("state").clone()
    commit = None if commit is None else torch.tensor(commit, device=device)
    out = delta_step(**given, state=state, normalize=normalize, commit=commit, backend=backend)
    return out.cpu(), state.cpu()


def theirs(query, key, value, log_decay, strength, state, normalize) -> tuple[Tensor, Tensor]:
    query, key = (x.repeat_interleave(value.shape[1] // x.shape[1], 1) for x in (query, key))  # 5.17's takes no fewer
    out, after = EAGER(
        query[:, None], key[:, None], value[:, None], log_decay[:, None], strength[:, None],
        initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=normalize,
    )  # fmt: skip
    return out[:, 0], after


def by_definition(query, key, value, log_decay, strength, state, normalize) -> tuple[Tensor, Tensor]:
    """(out, state) in fp64, a value head at a time."""
    query, key, value, log_decay, strength, state = (
        x.double() for x in (query, key, value, log_decay, strength, state)
    )
    if normalize:
        query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    rows, heads, K, V = state.shape
    out, after = torch.zeros(rows, heads, V).double(), torch.zeros(rows, heads, K, V).double()
    for row in range(rows):
        for head in range(heads):
            shared = head * query.shape[1] // heads
            k, S = key[row, shared], log_decay[row, head].exp() * state[row, head]
            after[row, head] = S + torch.outer(k, strength[row, head] * (value[row, head] - S.T @ k))
            out[row, head] = after[row, head].T @ query[row, shared] / K**0.5
    return out, after


def error(found, exact):
    return (found.double() - exact).norm().item()


@every_place
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_step_is_no_further_from_the_truth_than_twice_transformers_own(shape, dtype, normalize, place):
    given = case(*shape, dtype=dtype)
    eager, exact = theirs(**given, normalize=normalize), by_definition(**given, normalize=normalize)
    found = step(given, place, normalize=normalize)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    for ours, other, truth in zip(found, eager, exact, strict=True):
        # Half an eps of fp32 more, for sums of one number. The interpreter cuts bf16 off, where a GPU rounds.
        cut = 2 if place == ("triton", "cpu") and ours.dtype == torch.bfloat16 else 1
        assert error(ours, truth) <= 2 * cut * error(other, truth) + 6e-8 * truth.norm()


@every_place
def test_many_steps_drift_no_further_than_transformers_own(place):
    given = case(2, 1, 2, 32, 16)
    ours = eager = exact = given["state"]
    for seed in range(1, 20):
        given = case(2, 1, 2, 32, 16, seed=seed)
        ours = step(given | dict(state=ours), place)[1]
        eager = theirs(**given | dict(state=eager), normalize=True)[1]
        exact = by_definition(**given | dict(state=exact), normalize=True)[1]
    assert error(ours, exact) <= 2 * error(eager, exact)


@every_place
def test_without_commit_every_state_stays_and_what_is_read_is_as_with_it(place):
    given = case(3, 1, 2, 24, 40)
    out, after = step(given, place)
    committed = step(given, place, commit=True)
    tried = step(given, place, commit=False)
    assert torch.equal(committed[0], out) and torch.equal(committed[1], after)
    assert torch.equal(tried[0], out) and torch.equal(tried[1], given["state"])
    assert not torch.equal(after, given["state"])


@every_place
def test_a_try_with_numbers_that_are_not_finite_leaves_the_states_too(place):
    given = case(2, 1, 2, 8, 8)
    given["key"][0], given["value"][1], given["log_decay"][0] = torch.nan, torch.inf, torch.nan
    assert torch.equal(step(given, place, commit=False)[1], given["state"])


@every_place
def test_a_row_is_that_of_its_row_alone(place):
    given = case(4, 2, 4, 24, 40)
    spoiled = {name: tensor.clone() for name, tensor in given.items()}
    for tensor in spoiled.values():
        tensor[2:] = torch.nan
    whole = step(given, place)
    some = step({name: tensor[:2] for name, tensor in given.items()}, place)
    other = step(spoiled, place)
    for all_rows, two, beside_nan in zip(whole, some, other, strict=True):
        assert torch.equal(all_rows[:2], two) and torch.equal(beside_nan[:2], two)


@every_place
def test_numbers_are_read_where_they_stand_and_rows_beyond_are_not_touched(place):
    """As a layer cuts them from the end of a convolution, and slots from a table with more of them."""
    backend, device = place
    given = case(3, 2, 4, 16, 24)
    expected = step(given, place)
    given = {name: tensor.to(device) for name, tensor in given.items()}
    table = torch.full((7, 2, *given["state"].shape[1:]), torch.nan, device=device)
    state = table[2:5, 1]
    state.copy_(given.pop("state"))
    strided = {}
    for name, tensor in given.items():
        wide = torch.full((*tensor.shape, 5), torch.nan, device=device)
        wide[..., 4] = tensor
        strided[name] = wide[..., 4]
    out = delta_step(**strided, state=state, normalize=True, commit=None, backend=backend)
    assert torch.equal(out.cpu(), expected[0]) and torch.equal(state.cpu(), expected[1])
    assert table.isfinite().sum() == state.numel()


@every_place
def test_autocast_changes_nothing(place):
    given = case(2, 1, 2, 24, 40)
    with torch.autocast(place[1], dtype=torch.bfloat16):
        cast = step(given, place)
    assert all(torch.equal(a, b) for a, b in zip(cast, step(given, place), strict=True))


@every_place
def test_no_rows_are_no_work(place):
    out, after = step(case(0, 1, 2, 8, 4), place)
    assert out.shape == (0, 2, 4) and after.shape == (0, 2, 8, 4)


def test_no_gradient_is_kept():
    given = case(2, 1, 2, 8, 4)
    given["query"].requires_grad_()
    assert not step(given, ("torch", "cpu"))[0].requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(key=torch.zeros(2, 2, 9)), "query and key must be"),
        (dict(value=torch.zeros(3, 4, 6)), "query and key must be"),
        (dict(value=torch.zeros(2, 3, 6)), "3 value heads are no multiple of 2"),
        (dict(log_decay=torch.zeros(2, 2)), "log_decay and strength must be"),
        (dict(strength=torch.zeros(2, 4, 1)), "log_decay and strength must be"),
        (dict(state=torch.zeros(2, 4, 8, 6, dtype=torch.bfloat16)), "state must be .* fp32"),
        (dict(state=torch.zeros(2, 4, 6, 8).mT), "contiguous rows"),
        (dict(state=torch.zeros(3, 4, 8, 6)), "state must be"),
        (dict(commit=torch.ones(1)), "commit must be"),
        (dict(backend="cuda"), "backend must be"),
    ],
)
def test_bad_input_is_refused(change, message):
    given: dict = case(2, 2, 4, 8, 6) | dict(normalize=True, commit=None) | change
    with pytest.raises(ValueError, match=message):
        delta_step(**given)
