"""One query per sequence over [prefix ; own], kernel and twin, against fp64 attention; unread memory is NaN throughout."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_grpo.kernels import decode_attention as module
from lowmem_grpo.kernels import linear_logprobs, policy_loss, sample_tokens
from lowmem_grpo.kernels.decode_attention import decode_attention

CUDA = torch.cuda.is_available()
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs CUDA"))
interpreted = pytest.param(
    ("triton", "cpu"),
    id="interpreter",
    marks=pytest.mark.skipif(CUDA or module.triton is None, reason="the kernel runs on the GPU, or not at all"),
)
gpu = pytest.param(("triton", "cuda"), id="gpu", marks=on_gpu)
every_backend = pytest.mark.parametrize(
    "place",
    [pytest.param(("torch", "cpu"), id="twin"), interpreted, pytest.param(("torch", "cuda"), id="twin-gpu", marks=on_gpu), gpu],
)  # fmt: skip
the_kernel = pytest.mark.parametrize("place", [interpreted, gpu])
PAGE = 8
GARBAGE = 10**6  # in the table, past a sequence's pages


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What is allocated and not written is NaN. The few tokens of these tests are several splits."""

    def poisoned(*args, make=torch.empty, **kwargs):
        return make(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(module, "SPLIT", 16)


def case(lengths, prefix_lengths=None, prefix_rows=None, *, heads=2, kv_heads=1, size=16, dtype=torch.float32, seed=0):
    """Arguments of decode_attention with pages of PAGE tokens in any order; whatever is not attended to is NaN."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(dtype)

    rows, most = len(lengths), -(-max(lengths) // PAGE) + 1
    own = normal(2, rows * most + 1, kv_heads, PAGE, size)
    pages = torch.randperm(rows * most + 1, generator=draw)
    table = torch.full((rows, most), GARBAGE)
    real = torch.zeros(rows * most + 1, PAGE, dtype=torch.bool)
    for row, length in enumerate(lengths):
        used = -(-length // PAGE)
        table[row, :used] = pages[row * most : row * most + used]
        real[table[row, :used]] = (torch.arange(used * PAGE) < length).view(used, PAGE)
    own.masked_fill_(~real[:, None, :, None], torch.nan)
    given = dict(
        query=normal(rows, heads, size), own_keys=own[0], own_values=own[1], table=table,
        lengths=torch.tensor(lengths), scaling=size**-0.5,
    )  # fmt: skip
    if prefix_lengths is not None:
        prefix_rows = list(range(rows)) if prefix_rows is None else prefix_rows
        prefix = normal(2, max(prefix_rows) + 2, kv_heads, max(prefix_lengths) + 5, size)
        real = torch.zeros(prefix.shape[1], prefix.shape[3], dtype=torch.bool)
        for row, length in zip(prefix_rows, prefix_lengths, strict=True):
            real[row, :length] = True
        prefix.masked_fill_(~real[:, None, :, None], torch.nan)
        given |= dict(
            prefix_keys=prefix[0], prefix_values=prefix[1], prefix_rows=torch.tensor(prefix_rows),
            prefix_lengths=torch.tensor(prefix_lengths),
        )  # fmt: skip
    return given


def rounded(given):
    """The same case in int8: numbers that are not attended to are 127, and their scales NaN."""
    changed = {}
    for name in ("own", "prefix") if "prefix_keys" in given else ("own",):
        both = torch.stack([given[f"{name}_keys"], given[f"{name}_values"]])
        scales = (both.abs().amax(-1) / 127).half()
        numbers = (both / scales[..., None].float()).round().nan_to_num(127).clamp(-127, 127).to(torch.int8)
        changed |= {f"{name}_keys": numbers[0], f"{name}_values": numbers[1], f"{name}_scales": scales}
    return given | changed


def attended(given, place):
    backend, device = place
    given = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    return decode_attention(**given, backend=backend).cpu()


def exact(
    query, own_keys, own_values, table, lengths, scaling, prefix_keys=None, prefix_values=None, prefix_rows=None,
    prefix_lengths=None, softcap=None, window=None, own_scales=None, prefix_scales=None,
):  # fmt: skip
    """Attention in fp64, row by row and head by head."""
    if own_scales is not None:
        own_keys, own_values = (
            x * s.double()[..., None] for x, s in zip((own_keys, own_values), own_scales, strict=True)
        )
    if prefix_scales is not None:
        prefix = zip((prefix_keys, prefix_values), prefix_scales, strict=True)
        prefix_keys, prefix_values = (x * s.double()[..., None] for x, s in prefix)
    out = torch.zeros(query.shape, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        pages = table[row, : -(-length // own_keys.shape[2])].tolist()
        keys, values = (torch.cat([x[page] for page in pages], 1)[:, :length].double() for x in (own_keys, own_values))
        if prefix_keys is not None:
            which, real = int(prefix_rows[row]), int(prefix_lengths[row])
            keys = torch.cat([prefix_keys[which, :, :real].double(), keys], 1)
            values = torch.cat([prefix_values[which, :, :real].double(), values], 1)
        if window is not None:
            keys, values = keys[:, -window:], values[:, -window:]
        for head in range(query.shape[1]):
            kv_head = head * keys.shape[0] // query.shape[1]
            score = keys[kv_head] @ query[row, head].double() * scaling
            if softcap is not None:
                score = softcap * (score / softcap).tanh()
            out[row, head] = score.softmax(0) @ values[kv_head]
    return out


def assert_exact(given, place, scale=1.0):
    """Within 4e-6 of fp64 for values of deviation 1 (1e-6 was measured), and the rounding of the output's dtype."""
    found = attended(given, place)
    assert found.dtype == given["query"].dtype and found.shape == given["query"].shape
    eps = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    # A rounded number is half an eps off; the interpreter cuts bf16 off, and is a whole one.
    cut = place == ("triton", "cpu") and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact(**given), rtol=eps if cut else eps / 2, atol=4e-6 * scale)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, size", [(2, 2, 16), (6, 1, 80), (14, 2, 128), (20, 2, 16), (3, 1, 256)])
def test_attention_is_that_of_fp64(heads, kv_heads, size, dtype, place):
    given = case([1, 37, 50], [20, 0, 33], heads=heads, kv_heads=kv_heads, size=size, dtype=dtype)
    assert_exact(given, place)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, size", [(6, 1, 80), (14, 2, 128)])
def test_int8_keys_and_values_are_read_with_their_scales(heads, kv_heads, size, dtype, place):
    given = rounded(case([1, 37, 50], [20, 0, 33], [1, 0, 2], heads=heads, kv_heads=kv_heads, size=size))
    given["query"] = given["query"].to(dtype)
    assert_exact(given, place)
    assert_exact(given | dict(window=25, softcap=30.0), place)
    store = torch.zeros(3, *given["own_scales"].shape, dtype=torch.float16)  # as a view of all layers'
    store[1] = given["own_scales"]
    assert torch.equal(attended(given | dict(own_scales=store[1]), place), attended(given, place))


@every_backend
def test_lengths_at_the_edges_of_pages_and_splits(place):
    assert_exact(case([1, PAGE - 1, PAGE, PAGE + 1, 15, 16, 17, 31, 32, 33, 48]), place)


@every_backend
def test_a_table_that_is_full_is_read_to_its_end(place):
    given = case([48, 41, 3])
    given["table"] = given["table"][:, :6].int()
    assert_exact(given, place)


@every_backend
def test_sequences_share_prefixes_in_any_order(place):
    given = case([5, 20, 1, 9, 16], [33, 0, 33, 7, 16], [2, 0, 2, 3, 1])
    assert_exact(given, place)
    unused = dict(prefix_rows=torch.tensor([2, GARBAGE, 2, 3, 1]))  # of which no token is read
    assert torch.equal(attended(given | unused, place), attended(given, place))


@every_backend
def test_a_prefix_that_is_full_is_read_to_its_end(place):
    given = case([5, 20], [32, 11])
    given |= {name: given[name][:, :, :32] for name in ("prefix_keys", "prefix_values")}
    assert_exact(given, place)


@every_backend
@pytest.mark.parametrize("scaling", [0.02, 0.5, 40.0])
def test_scores_are_softened_by_the_cap(scaling, place):
    given = case([5, 40], [33, 2], heads=4) | dict(softcap=30.0, scaling=scaling)
    assert_exact(given, place, scale=1 if scaling < 1 else 10)  # scores of hundreds in fp32


@every_backend
@pytest.mark.parametrize("window", [1, 5, 16, 20, 40, 60, 10**12])
def test_a_window_shows_the_last_tokens_of_the_text(window, place):
    """Smaller than what a sequence has of its own, than the text with its prefix, and larger than all."""
    assert_exact(case([3, 37, 16, 20], [30, 18, 0, 32]) | dict(window=window), place)
    assert_exact(case([3, 37, 16, 20]) | dict(window=window), place)


@every_backend
def test_large_scores_neither_overflow_nor_vanish(place):
    for shift in (-3e4, 3e4):
        given = case([5, 40], [33, 2])
        given["query"][..., 0] = 1.0
        for name in ("own_keys", "prefix_keys"):
            given[name] = torch.where(given[name].isnan(), torch.nan, given[name].round())
            given[name][..., 0] += 4 * shift
        given["query"] = given["query"].round()  # whole numbers: scores of 3e4 are exact in fp32
        assert_exact(given, place)


@every_backend
def test_what_is_not_attended_to_is_not_read(place):
    """Every case here has NaN there; other garbage gives the same, bit for bit."""
    given: dict[str, Any] = case([3, 37, 16], [30, 18, 0]) | dict(window=25)
    for name in ("keys", "values"):  # before the window
        given[f"own_{name}"][given["table"][1, 0]] = given[f"prefix_{name}"][1] = torch.nan
        given[f"prefix_{name}"][0, :, :8] = torch.nan
    expected = attended(given, place)
    assert expected.isfinite().all()
    for garbage in (torch.inf, 1e30):
        other = {k: x.nan_to_num(garbage) if k.endswith(("keys", "values")) else x for k, x in given.items()}
        other["table"] = torch.where(given["table"] == GARBAGE, -7, given["table"])
        assert torch.equal(attended(other, place), expected)


@every_backend
def test_what_is_attended_to_is_read(place):
    for name in ("own_keys", "own_values", "prefix_keys", "prefix_values"):
        given = case([3, 17], [20, 18])
        page = given["table"][1, 2] if name.startswith("own") else 1
        given[name][page, 0, 0 if name.startswith("own") else 17, -1] = torch.nan  # the last token
        assert attended(given, place).isnan().flatten(1).any(1).tolist() == [False, True]


@every_backend
def test_a_row_does_not_depend_on_its_neighbours(place):
    given = case([3, 37, 16, 20, 50], [30, 18, 0, 32, 30], [1, 0, 2, 3, 1], heads=14, kv_heads=2, dtype=torch.float16)
    expected = attended(given, place)
    for order in ([4, 2, 0], [1]):
        rows = {k: given[k][order] for k in ("query", "table", "lengths", "prefix_rows", "prefix_lengths")}
        assert torch.equal(attended(given | rows, place), expected[order])


@the_kernel
def test_a_row_does_not_depend_on_the_width_of_the_table(place):
    given = case([3, 37, 16], [30, 18, 0])
    wide = torch.cat([given["table"], torch.full((3, 40), GARBAGE)], 1)
    assert torch.equal(attended(given | dict(table=wide), place), attended(given, place))


@the_kernel
def test_one_split_and_many_agree(place, monkeypatch):
    given = case([3, 150, 97], [30, 18, 0], heads=6)
    many = attended(given, place)  # 11 and 3
    for split in (5, 1024):
        monkeypatch.setattr(module, "SPLIT", split)
        torch.testing.assert_close(attended(given, place), many, rtol=0, atol=1e-6)


@every_backend
def test_a_store_of_one_row_a_slot_is_read_where_it_is(place):
    """Views of (L, 2, S, H_kv, T, D) as the rollout has them, and queries of which no stride is 1."""
    store = torch.randn(2, 2, 5, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    own = store[1, :, :4, :, :37]
    query = torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(1)).permute(1, 2, 0)
    table, lengths = torch.arange(8)[::2, None] // 2, torch.tensor([1, 37, 16, 9])
    given = dict(query=query, own_keys=own[0], own_values=own[1], table=table, lengths=lengths, scaling=0.3)
    assert_exact(given, place)
    apart = own[1].transpose(1, 2).contiguous().transpose(1, 2)
    assert_exact(given | dict(own_values=apart), place)
    prefix = dict(prefix_keys=own[0].flip(0), prefix_values=apart, prefix_rows=table[:, 0], prefix_lengths=lengths)
    assert_exact(given | prefix, place)


@every_backend
def test_lengths_past_the_memory_read_none_beyond_it(place):
    given = case([48, 40], [20, 20])
    given["table"], given["prefix_keys"] = given["table"][:, :5], given["prefix_keys"][:, :, :20]
    given["prefix_values"] = given["prefix_values"][:, :, :20]
    expected = attended(given | dict(lengths=torch.tensor([40, 40])), place)
    longer = dict(lengths=torch.tensor([10**6, 41]), prefix_lengths=torch.tensor([21, 10**6]))
    assert torch.equal(attended(given | longer, place), expected)


@every_backend
def test_no_rows_are_no_rows_and_a_row_of_nothing_is_nan(place):
    given = case([3, 9])
    given["lengths"][1] = 0
    assert attended(given, place).isnan().flatten(1).all(1).tolist() == [False, True]
    none = {k: given[k][:0] for k in ("query", "table", "lengths")}
    assert attended(given | none, place).shape == (0, 2, 16)


@pytest.mark.skipif(module.triton is None, reason="needs Triton")
def test_a_gpu_takes_triton_unless_the_environment_forbids_it(monkeypatch):
    on_a_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    for value, taken in ((None, True), ("1", True), ("0", False)):
        monkeypatch.delenv("LOWMEM_GRPO_TRITON", raising=False)
        if value is not None:
            monkeypatch.setenv("LOWMEM_GRPO_TRITON", value)
        for kernel in (module, linear_logprobs, sample_tokens):
            assert kernel._runs_by_triton("auto", "cuda") == taken and not kernel._runs_by_triton("auto", "cpu")
        assert policy_loss._use_triton("auto", on_a_gpu) == taken


@every_backend
def test_no_gradient_is_kept(place):
    given = case([3, 9])
    given["query"].requires_grad_()
    assert not attended(given, place).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_a_captured_call_follows_lengths_that_change():
    given = case([30, 40], [20, 7])
    there = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    decode_attention(**there)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(**there)
    for lengths in ([30, 40], [1, 17]):
        there["lengths"].copy_(torch.tensor(lengths))
        graph.replay()
        expected = exact(**given | dict(lengths=torch.tensor(lengths)))
        torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.zeros(2, 16)), "query must be"),
        (dict(query=torch.zeros(2, 2, 16, dtype=torch.float64)), "query must be"),
        (dict(query=torch.zeros(2, 2, 300)), "query must be"),
        (dict(own_keys=torch.zeros(4, 1, 8, 15)), "own_keys must be"),
        (dict(own_keys=torch.zeros(4, 4, 8, 16)), "kv heads that divide 2"),
        (dict(own_values=torch.zeros(7, 1, 9, 16)), "own_values must have own_keys' shape"),
        (dict(own_values=torch.zeros(7, 1, 8, 16).half()), "one dtype"),
        (dict(own_values=torch.zeros(7, 1, 16, 8).mT), "last stride of 1"),
        (dict(table=torch.zeros(3, 1).long()), "table must be"),
        (dict(table=torch.zeros(2, 1)), "table must be"),
        (dict(lengths=torch.ones(2)), "lengths must be"),
        (dict(lengths=torch.ones(3).long()), "lengths must be"),
        (dict(prefix_rows=None), "pass all or none"),
        (dict(prefix_keys=torch.zeros(4, 2, 8, 16)), "prefix_values must have"),
        (dict(prefix_keys=torch.zeros(3, 2, 8, 16), prefix_values=torch.zeros(3, 2, 8, 16)), "own_keys' 1 heads"),
        (dict(prefix_lengths=torch.ones(2).int()), "prefix_lengths must be"),
        (dict(lengths=torch.ones(2, dtype=torch.int64, device="meta")), "one device"),
        (dict(own_keys=torch.zeros(7, 1, 8, 16).char()), "own_scales go with int8"),
        (dict(own_scales=torch.zeros(2, 7, 1, 8).half()), "own_scales go with int8"),
        (dict(softcap=0.0), "softcap must be positive"),
        (dict(window=0), "window must be positive"),
        (dict(backend="cuda"), "backend must be"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**case([3, 9], [4, 5]) | change)


@pytest.mark.parametrize("name", ["own", "prefix"])
def test_scales_that_do_not_fit_are_refused(name):
    given = rounded(case([3, 9], [4, 5]))
    for wrong in (given[f"{name}_scales"].float(), given[f"{name}_scales"][:, 1:]):
        with pytest.raises(ValueError, match=f"{name}_scales must be"):
            decode_attention(**given | {f"{name}_scales": wrong})
    with pytest.raises(ValueError, match="prefix_scales go with prefix_keys"):
        decode_attention(**rounded(case([3, 9])), prefix_scales=given["prefix_scales"])
