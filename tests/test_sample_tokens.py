"""Drawing tokens by inverse CDF, kernel and twin, against fp64 arithmetic and against the distribution itself."""

import pytest
import torch
from backends import CUDA, every_place

from lowmem_grpo.kernels import sample_tokens as module
from lowmem_grpo.kernels.sample_tokens import BLOCK, sample_next, sample_tokens, selective_logprobs

every_shape = pytest.mark.parametrize(
    "rows, size", [(0, 7), (1, 1), (3, 300), (9, BLOCK), (2, 2 * BLOCK + 1), (9, 4 * BLOCK)]
)


def rows_of(rows, size, seed=0):
    """(logits (S, V), uniforms (S,)), the logits with a deviation of 3."""
    draw = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, size, generator=draw), torch.rand(rows, generator=draw)


def drawn(logits, uniforms, place, temperature=1.0):
    backend, device = place
    tokens, logprobs = sample_tokens(logits.to(device), uniforms.to(device), temperature=temperature, backend=backend)
    return tokens.cpu(), logprobs.cpu()


@every_place
@every_shape
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_a_token_is_where_the_cdf_passes_its_uniform_and_has_its_own_logprob(rows, size, temperature, place):
    logits, uniforms = rows_of(rows, size)
    tokens, logprobs = drawn(logits, uniforms, place, temperature)
    exact = (logits.double() / temperature).log_softmax(-1)
    cdf = exact.exp().cumsum(-1)
    row = torch.arange(rows)
    torch.testing.assert_close(logprobs.double(), exact[row, tokens], rtol=3e-7, atol=2e-6)
    before = cdf[row, tokens] - exact[row, tokens].exp()
    assert (before <= uniforms + 2e-6).all() and (uniforms <= cdf[row, tokens] + 2e-6).all()


@every_place
def test_given_tokens_have_the_logprobs_of_a_log_softmax(place):
    logits, _ = rows_of(5, 2 * BLOCK + 1)
    tokens = torch.tensor([0, 1, BLOCK - 1, BLOCK, 2 * BLOCK])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-5)):
        given = logits.to(place[1], dtype)
        found = selective_logprobs(given, tokens.to(place[1]), temperature=0.7, backend=place[0]).cpu()
        exact = (given.cpu().double() / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


@every_place
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_a_token_that_is_ruled_out_is_never_drawn(uniform, place):
    logits = torch.full((3, 2 * BLOCK), -torch.inf)
    logits[0, 5], logits[1, BLOCK + 7], logits[2, [BLOCK - 1, BLOCK + 1]] = 2.0, -300.0, 0.0
    tokens, logprobs = drawn(logits, torch.full((3,), uniform), place)
    assert tokens[:2].tolist() == [5, BLOCK + 7] and logprobs[:2].tolist() == [0.0, 0.0]
    assert tokens[2] == (BLOCK - 1 if uniform < 0.5 else BLOCK + 1)


@every_place
def test_the_largest_uniform_draws_no_token_that_is_ruled_out(place):
    """The sum over blocks is rounded otherwise than the sum that follows the largest logit, and may fall short of it."""
    logits = rows_of(16, 3 * BLOCK)[0].sort(1).values
    logits[:, -BLOCK - 50 :] = -torch.inf
    tokens, logprobs = drawn(logits, torch.full((16,), 1 - 2**-24), place)
    assert logprobs.isfinite().all() and (tokens < 2 * BLOCK - 50).all()


@every_place
def test_a_row_does_not_depend_on_its_neighbours(place):
    logits, uniforms = rows_of(11, 500)
    tokens, logprobs = drawn(logits, uniforms, place)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))[:4]
    some_tokens, some_logprobs = drawn(logits[order], uniforms[order], place)
    assert torch.equal(some_tokens, tokens[order]) and torch.equal(some_logprobs, logprobs[order])


def test_a_row_alone_is_added_up_as_among_others_by_any_number_of_threads():
    logits, uniforms = rows_of(3, 151936)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = sample_tokens(logits, uniforms, temperature=0.8, backend="torch")
        alone = [
            sample_tokens(logits[i : i + 1], uniforms[i : i + 1], temperature=0.8, backend="torch") for i in range(3)
        ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(together, zip(*alone, strict=True), strict=True))


@every_place
def test_logits_that_are_all_the_smallest_number_are_equal(place):
    """As a mask by finfo.min leaves them."""
    _, logprobs = drawn(torch.full((2, 10), torch.finfo(torch.float32).min), torch.tensor([0.0, 0.9]), place)
    torch.testing.assert_close(logprobs, torch.full((2,), 10.0).log().neg())


@every_place
def test_no_gradient_is_kept(place):
    logits, uniforms = (x.to(place[1]) for x in rows_of(3, 30))
    logits.requires_grad_()
    tokens, logprobs = sample_tokens(logits, uniforms, temperature=1.0, backend=place[0])
    again = selective_logprobs(logits, tokens, temperature=1.0, backend=place[0])
    assert not logprobs.requires_grad and not again.requires_grad


@pytest.mark.skipif(module.triton is None, reason="needs Triton")
def test_a_token_outside_of_the_vocabulary_is_nan_by_the_kernel():
    device = "cuda" if CUDA else "cpu"
    logits, tokens = rows_of(3, 30)[0].to(device), torch.tensor([-1, 30, 2], device=device)
    found = selective_logprobs(logits, tokens, temperature=1.0, backend="triton")
    assert found.isnan().tolist() == [True, True, False]


@every_place
def test_frequencies_are_the_probabilities(place):
    """Of 200 evenly spaced uniforms each of 20 tokens gets 200 p of them, give or take one at an edge."""
    logits = rows_of(1, 20)[0].div(3).expand(200, 20)
    uniforms = (torch.arange(200) + 0.5) / 200
    counts = torch.bincount(drawn(logits, uniforms, place)[0], minlength=20)
    assert (counts - 200 * logits[0].softmax(-1)).abs().max() < 1.001


@every_place
def test_strided_logits_are_read_where_they_are(place):
    logits, uniforms = rows_of(4, 60)
    expected = drawn(logits[:, ::2].contiguous(), uniforms, place)
    backend, device = place
    found = sample_tokens(logits.to(device)[:, ::2], uniforms.to(device), temperature=1.0, backend=backend)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_a_row_of_nothing_has_nan_and_a_valid_token():
    logits = torch.full((2, 10), -torch.inf)
    tokens, logprobs = sample_tokens(logits, torch.tensor([0.0, 0.9]), temperature=1.0)
    assert ((tokens >= 0) & (tokens < 10)).all() and logprobs.isnan().all()


def next_of(logits, place, *, temperature=1.0, scale=1.0, softcap=None, uniform=None):
    """What sample_next makes of rows, token ids and positions after it, and the uniform that belongs to each row.

    Row i is completion 3 i + 1 of a table of uniforms, and has 4 i tokens prefilled and i drawn.
    """
    backend, device = place
    rows = len(logits)
    uniforms = torch.rand(3 * rows + 1, rows + 2, generator=torch.Generator().manual_seed(4))
    drawn = torch.arange(rows)
    completions, prefilled = 3 * drawn + 1, 4 * drawn
    if uniform is not None:
        uniforms[completions, drawn] = uniform
    token_ids, positions = torch.full((rows,), -1).to(device), (prefilled + drawn).to(device)
    out = sample_next(
        logits.to(device), uniforms.to(device), completions.to(device), token_ids, positions, prefilled.to(device),
        temperature=temperature, scale=scale, softcap=softcap, backend=backend,
    )  # fmt: skip
    assert positions.tolist() == (prefilled + drawn + 1).tolist()
    return out.cpu(), token_ids.cpu(), uniforms[completions, drawn]


@every_place
@pytest.mark.parametrize("rows, size", [(1, 1), (3, 300), (9, BLOCK), (4, 2 * BLOCK + 1)])
@pytest.mark.parametrize(
    "temperature, scale, softcap", [(1.0, 1.0, None), (0.1, 1.0, None), (0.7, 0.25, None), (1.3, 2.0, 6.0)]
)
def test_the_next_token_is_where_the_cdf_of_a_capped_row_passes_its_uniform(
    rows, size, temperature, scale, softcap, place
):
    logits, _ = rows_of(rows, size)
    out, tokens, uniforms = next_of(logits, place, temperature=temperature, scale=scale, softcap=softcap)
    scores = logits.double() * scale
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    exact = (scores / temperature).log_softmax(-1)
    assert out.dtype == torch.float64 and torch.equal(out[0], tokens.double()) and torch.equal(out[1], out[2])
    row = torch.arange(rows)
    torch.testing.assert_close(out[1], exact[row, tokens], rtol=3e-7, atol=4e-6)
    cdf = exact.exp().cumsum(-1)
    before = cdf[row, tokens] - exact[row, tokens].exp()
    assert (before <= uniforms + 2e-6).all() and (uniforms <= cdf[row, tokens] + 2e-6).all()


@every_place
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_a_next_token_that_is_ruled_out_is_never_drawn(uniform, place):
    logits = torch.full((4, 3 * BLOCK), -torch.inf)
    logits[0, 5], logits[1, BLOCK + 7], logits[2, [BLOCK - 1, 2 * BLOCK]] = 2.0, -300.0, 0.0
    out, tokens, _ = next_of(logits, place, uniform=uniform)
    assert tokens[:2].tolist() == [5, BLOCK + 7] and out[1, :2].tolist() == [0.0, 0.0]
    assert tokens[2] == (BLOCK - 1 if uniform < 0.5 else 2 * BLOCK)
    assert 0 <= tokens[3] < 3 * BLOCK and out[1, 3].isnan()


@every_place
def test_a_next_token_is_that_of_its_row_alone(place):
    logits, _ = rows_of(6, 500)
    spoiled = logits.clone()
    spoiled[2:] = torch.nan
    whole, some, other = (next_of(x, place, uniform=0.4)[0] for x in (logits, logits[:2], spoiled))
    assert torch.equal(whole[:, :2], other[:, :2]) and torch.equal(whole[:, :2], some)
    assert other[1, 2:].isnan().all() and ((other[0] >= 0) & (other[0] < 500)).all()


@every_place
def test_a_row_that_has_all_its_tokens_draws_the_last_again_and_again(place):
    backend, device = place
    logits, uniforms = rows_of(2, 40)[0].to(device), torch.rand(2, 3).to(device)
    token_ids, completions = (torch.arange(2, device=device) for _ in range(2))
    positions, prefilled = torch.tensor([7, 6], device=device), torch.tensor([5, 5], device=device)
    made = [
        sample_next(logits, uniforms, completions, token_ids, positions, prefilled, temperature=1.0, backend=backend)
        for _ in range(3)
    ]
    assert positions.tolist() == [7, 7]
    assert torch.equal(made[0][:, 0], made[1][:, 0]) and torch.equal(made[1], made[2])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(3)), "logits must be"),
        (dict(logits=torch.zeros(3, 0)), "logits must be"),
        (dict(uniforms=torch.zeros(2)), "uniforms must be"),
        (dict(uniforms=torch.zeros(3, dtype=torch.float64)), "uniforms must be"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(backend="cuda"), "backend must be"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = dict(logits=torch.zeros(3, 5), uniforms=torch.zeros(3), temperature=1.0, backend="auto") | change
    with pytest.raises(ValueError, match=message):
        sample_tokens(given.pop("logits"), given.pop("uniforms"), **given)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(3, 0)), "logits must be"),
        (dict(logits=torch.zeros(3, 10)[:, ::2]), "last stride of 1"),
        (dict(uniforms=torch.zeros(3)), "uniforms must be"),
        (dict(positions=torch.zeros(3)), "positions must be"),
        (dict(completions=torch.zeros(4, dtype=torch.int64)), "completions must be"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(backend="cuda"), "backend must be"),
    ],
)
def test_bad_input_for_a_next_token_is_refused(change, message):
    given: dict = {name: torch.zeros(3, dtype=torch.int64) for name in ("completions", "token_ids", "positions")}
    given |= dict(logits=torch.zeros(3, 5), uniforms=torch.zeros(3, 4), prefilled=given["positions"].clone())
    with pytest.raises(ValueError, match=message):
        sample_next(**given | dict(temperature=1.0) | change)
