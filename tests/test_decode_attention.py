"""One query per sequence over [prefix ; own], kernel and twin, against fp64 attention; unread memory is NaN throughout."""

from typing import Any

import pytest
import torch
from backends import CUDA, every_place, the_kernel

from lowmem_grpo.kernels import decode_attention as module
from lowmem_grpo.kernels.decode_attention import addressed, decode_attention, quantized, write_token

PAGE = 8
GARBAGE = 10**6  # in the table, past a sequence's pages


@pytest.fixture(autouse=True)
def short_splits(poisoned_memory, monkeypatch):
    """What is allocated and not written is NaN. The few tokens of these tests are several splits."""
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


def in_layer_1(keys_values):
    """(2, pages, H_kv, T, ...) as layer 1 of 3, of which all others are NaN or 127, in a store's order in memory."""
    other = torch.full_like(keys_values, torch.nan if keys_values.is_floating_point() else 127)
    return torch.stack([other, keys_values, other]).movedim(2, 0).contiguous().movedim(0, 2)


def as_called(given):
    """A store, and the other arguments of decode_attention, from those of exact()."""
    given = dict(given)
    parts = []
    for name in ("own", "prefix"):
        both = [given.pop(f"{name}_{kind}", None) for kind in ("keys", "values")]
        scales = given.pop(f"{name}_scales", None)
        keys_values = None if both[0] is None else torch.stack(both)
        parts += [None if x is None else in_layer_1(x) for x in (keys_values, scales)]
    before, lengths = given.pop("prefix_lengths", None), given.pop("lengths")
    positions = lengths - 1 if before is None else before + lengths - 1
    store = addressed(*parts)
    return store, given | dict(layer=1, positions=positions, prefilled=before)


def attended(given, place):
    backend, device = place
    given = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    store, others = as_called(given)
    return decode_attention(store=store, **others, backend=backend).cpu()


def exact(
    query, own_keys, own_values, table, lengths, scaling, prefix_keys=None, prefix_values=None, prefix_rows=None,
    prefix_lengths=None, softcap=None, window=None, own_scales=None, prefix_scales=None, sink=None,
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
            one_more = score[:0] if sink is None else sink[head : head + 1].double()
            out[row, head] = torch.cat([score, one_more]).softmax(0)[: len(score)] @ values[kv_head]
    return out


def assert_exact(given, place, scale=1.0):
    """Within 4e-6 of fp64 for values of deviation 1 (1e-6 was measured), and the rounding of the output's dtype."""
    found = attended(given, place)
    assert found.dtype == given["query"].dtype and found.shape == given["query"].shape
    eps = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    # A rounded number is half an eps off; the interpreter cuts bf16 off, and is a whole one.
    cut = place == ("triton", "cpu") and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact(**given), rtol=eps if cut else eps / 2, atol=4e-6 * scale)


SIZES = [(2, 2, 16), (6, 1, 80), (14, 2, 128), (20, 2, 16), (3, 1, 256), (2, 1, 512)]


@every_place
@pytest.mark.parametrize(
    "heads, kv_heads, size, dtype",
    [
        *((*sizes, torch.float32) for sizes in SIZES),
        *((*sizes, dtype) for sizes, dtype in zip(SIZES, (torch.bfloat16, torch.float16) * 3, strict=True)),
    ],
)
def test_attention_is_that_of_fp64(heads, kv_heads, size, dtype, place):
    given = case([1, 37, 50], [20, 0, 33], heads=heads, kv_heads=kv_heads, size=size, dtype=dtype)
    assert_exact(given, place)


@every_place
@pytest.mark.parametrize(
    "heads, kv_heads, size, dtype",
    [
        *((*sizes, dtype) for sizes in ((6, 1, 80), (14, 2, 128)) for dtype in (torch.float32, torch.bfloat16)),
        (2, 1, 512, torch.bfloat16),  # Gemma 4's full layers: the smallest tile
    ],
)
def test_int8_keys_and_values_are_read_with_their_scales(heads, kv_heads, size, dtype, place):
    given = rounded(case([1, 37, 50], [20, 0, 33], [1, 0, 2], heads=heads, kv_heads=kv_heads, size=size))
    given["query"] = given["query"].to(dtype)
    assert_exact(given, place)
    assert_exact(given | dict(window=25, softcap=30.0), place)


@every_place
def test_lengths_at_the_edges_of_pages_and_splits(place):
    assert_exact(case([1, PAGE - 1, PAGE, PAGE + 1, 15, 16, 17, 31, 32, 33, 48]), place)


@every_place
def test_a_table_that_is_full_is_read_to_its_end(place):
    given = case([48, 41, 3])
    given["table"] = given["table"][:, :6]
    assert_exact(given, place)


@every_place
def test_sequences_share_prefixes_in_any_order(place):
    given = case([5, 20, 1, 9, 16], [33, 0, 33, 7, 16], [2, 0, 2, 3, 1])
    assert_exact(given, place)
    unused = dict(prefix_rows=torch.tensor([2, GARBAGE, 2, 3, 1]))  # of which no token is read
    assert torch.equal(attended(given | unused, place), attended(given, place))


@every_place
def test_a_prefix_that_is_full_is_read_to_its_end(place):
    given = case([5, 20], [32, 11])
    given |= {name: given[name][:, :, :32] for name in ("prefix_keys", "prefix_values")}
    assert_exact(given, place)


@every_place
@pytest.mark.parametrize("scaling", [0.02, 0.5, 40.0])
def test_scores_are_softened_by_the_cap(scaling, place):
    given = case([5, 40], [33, 2], heads=4) | dict(softcap=30.0, scaling=scaling)
    assert_exact(given, place, scale=1 if scaling < 1 else 10)  # scores of hundreds in fp32


@every_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads, kv_heads, size", [(4, 2, 16), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((6, 1, 80), (20, 2, 64)))]
)  # fmt: skip
def test_a_sink_is_one_more_key_without_a_value(heads, kv_heads, size, dtype, place):
    """From one that is not seen to one that takes nearly all, beside scores whose sizes are about 1."""
    given = case([1, 18], [20, 0], heads=heads, kv_heads=kv_heads, size=size, dtype=dtype)
    given["sink"] = torch.linspace(-30, 30, heads).to(dtype)
    assert_exact(given, place)
    assert_exact(rounded(given) | dict(query=given["query"], window=12, softcap=2.0), place)
    one_split = case([7, 9], heads=heads, kv_heads=kv_heads, size=size, dtype=dtype)
    assert_exact(one_split | dict(sink=given["sink"]), place)


@every_place
@pytest.mark.parametrize("window", [1, 5, 16, 20, 40, 10**12])
def test_a_window_shows_the_last_tokens_of_the_text(window, place):
    """Smaller than what a sequence has of its own, than the text with its prefix, and larger than all."""
    assert_exact(case([3, 37, 16, 20], [30, 18, 0, 32]) | dict(window=window), place)
    assert_exact(case([3, 37, 16, 20]) | dict(window=window), place)


@every_place
def test_large_scores_neither_overflow_nor_vanish(place):
    for shift in (-3e4, 3e4):
        given = case([5, 40], [33, 2])
        given["query"][..., 0] = 1.0
        for name in ("own_keys", "prefix_keys"):
            given[name] = torch.where(given[name].isnan(), torch.nan, given[name].round())
            given[name][..., 0] += 4 * shift
        given["query"] = given["query"].round()  # whole numbers: scores of 3e4 are exact in fp32
        assert_exact(given, place)


@every_place
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


@every_place
def test_what_is_attended_to_is_read(place):
    for name in ("own_keys", "own_values", "prefix_keys", "prefix_values"):
        given = case([3, 17], [20, 18])
        page = given["table"][1, 2] if name.startswith("own") else 1
        given[name][page, 0, 0 if name.startswith("own") else 17, -1] = torch.nan  # the last token
        assert attended(given, place).isnan().flatten(1).any(1).tolist() == [False, True]


@every_place
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
def test_a_row_does_not_depend_on_how_long_another_prefix_may_be(place):
    given = case([3, 37, 50], [30, 18, 0], heads=6)
    longer = {
        k: torch.cat([given[k], given[k].new_full((4, 1, 33, 16), torch.nan)], 2)
        for k in ("prefix_keys", "prefix_values")
    }
    assert torch.equal(attended(given | longer, place), attended(given, place))


@the_kernel
def test_scratch_is_what_the_planner_counts(place, monkeypatch):
    made, empty = [], torch.empty

    def noted(*args, **kwargs):
        made.append(empty(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "empty", noted)
    given = case([3, 37], [30, 18], heads=6, dtype=torch.bfloat16)
    attended(given, place)
    taken = sum(x.nbytes for x in made if x.dtype == torch.float32)
    assert taken == 2 * module.scratch_bytes(35, given["table"].shape[1] * PAGE, 6, 16)


@the_kernel
def test_one_split_and_many_agree(place, monkeypatch):
    given = case([3, 150, 97], [30, 18, 0], heads=6)
    many = attended(given, place)  # 11 and 3
    for split in (5, 1024):
        monkeypatch.setattr(module, "SPLIT", split)
        torch.testing.assert_close(attended(given, place), many, rtol=0, atol=1e-6)


@every_place
def test_pages_of_half_a_split_are_as_the_engine_has_them(place, monkeypatch):
    """Both halves' pages are looked up before the loop, and a window begins inside of a tile."""
    monkeypatch.setattr(module, "SPLIT", 128)
    monkeypatch.setitem(globals(), "PAGE", 64)
    given = case([65, 200, 1], [0, 3, 200], heads=3, dtype=torch.bfloat16)
    assert_exact(given, place)
    assert_exact(rounded(given) | dict(window=70), place)


@every_place
def test_a_store_of_one_row_a_slot_is_read_where_it_is(place):
    """As the rollout has it without pages, and queries of which no stride is 1."""
    own = torch.randn(2, 5, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    query = torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(1)).permute(1, 2, 0)
    table, lengths = torch.arange(4)[:, None], torch.tensor([1, 37, 16, 9])
    given = dict(query=query, own_keys=own[0], own_values=own[1], table=table, lengths=lengths, scaling=0.3)
    assert_exact(given, place)
    flipped = own.flip(1)
    prefix = dict(
        prefix_keys=flipped[0], prefix_values=flipped[1], prefix_rows=table.flip(0)[:, 0], prefix_lengths=lengths
    )
    assert_exact(given | prefix, place)


@every_place
def test_lengths_past_the_memory_read_none_beyond_it(place):
    given = case([48, 40], [20, 20])
    given["table"], given["prefix_keys"] = given["table"][:, :5], given["prefix_keys"][:, :, :20]
    given["prefix_values"] = given["prefix_values"][:, :, :20]
    expected = attended(given | dict(lengths=torch.tensor([40, 40])), place)
    longer = dict(lengths=torch.tensor([10**6, 41]), prefix_lengths=torch.tensor([21, 10**6]))
    assert torch.equal(attended(given | longer, place), expected)


@every_place
def test_no_rows_are_no_rows_and_a_row_of_nothing_is_nan_or_with_a_sink_0(place):
    given = case([3, 9])
    given["lengths"][1] = 0
    assert attended(given, place).isnan().flatten(1).all(1).tolist() == [False, True]
    with_sinks = attended(given | dict(sink=torch.zeros(2)), place)
    assert with_sinks[0].isfinite().all() and with_sinks[1].count_nonzero() == 0
    none = {k: given[k][:0] for k in ("query", "table", "lengths")}
    assert attended(given | none, place).shape == (0, 2, 16)


@every_place
def test_no_gradient_is_kept(place):
    given = case([3, 9])
    given["query"].requires_grad_()
    assert not attended(given, place).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_captured_calls_follow_positions_and_stores_that_change():
    given = rounded(case([30, 40], [20, 7]))
    there = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    store, others = as_called(there)
    key, value = torch.randn(2, 2, 1, 16, device="cuda")
    at = {name: others[name] for name in ("layer", "table", "positions", "prefilled")}

    def step():
        write_token(key, value, store, **at)
        return decode_attention(store=store, **others)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([30, 40], [1, 17]):
        again, _ = as_called(there)  # elsewhere
        store.addresses.copy_(again.addresses)
        at["positions"].copy_(torch.tensor(lengths) + torch.tensor([20, 7]) - 1)
        graph.replay()
        expected = decode_attention(store=again, **others, backend="torch")
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
        where = at["positions"] - at["prefilled"]
        pages = at["table"].gather(1, where[:, None] // PAGE)[:, 0]
        assert torch.equal(again.own[1, 0, pages, :, where % PAGE], quantized(key)[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.zeros(2, 16)), "query must be"),
        (dict(query=torch.zeros(2, 2, 16, dtype=torch.float64)), "query must be"),
        (dict(query=torch.zeros(2, 2, 15)), "query must be"),
        (dict(query=torch.zeros(2, 3, 16)), "must be a multiple of the store's 2"),
        (dict(table=torch.zeros(3, 1).long()), "table must be"),
        (dict(table=torch.zeros(2, 1).int()), "table must be"),
        (dict(table=torch.zeros(4, 2).long().T), "table must be"),
        (dict(positions=torch.ones(2)), "positions must be"),
        (dict(positions=torch.ones(3).long()), "positions must be"),
        (dict(positions=torch.ones(4).long()[::2]), "positions must be"),
        (dict(prefix_rows=None), "pass both or neither"),
        (dict(prefilled=torch.ones(2).int()), "prefilled must be"),
        (dict(positions=torch.ones(2, dtype=torch.int64, device="meta")), "one device"),
        (dict(layer=3), "layer must be one of 3"),
        (dict(softcap=0.0), "softcap must be positive"),
        (dict(window=0), "window must be positive"),
        (dict(sink=torch.zeros(3)), "sink must be"),
        (dict(sink=torch.zeros(2, dtype=torch.float64)), "sink must be"),
        (dict(sink=torch.zeros(4)[::2]), "sink must be"),
        (dict(sink=torch.zeros(2, device="meta")), "one device"),
        (dict(backend="cuda"), "backend must be"),
    ],
)
def test_bad_input_is_refused(change, message):
    store, given = as_called(case([3, 9], [4, 5], heads=2, kv_heads=2))
    with pytest.raises(ValueError, match=message):
        decode_attention(store=store, **given | change)


OWN = torch.zeros(4, 3, 2, 1, 8, 16).movedim(0, 2)  # four pages of three layers


@pytest.mark.parametrize(
    "given, message",
    [
        ((torch.zeros(3, 4, 1, 8, 16),), "own must be"),
        ((torch.zeros(0, 3, 2, 1, 8, 16).movedim(0, 2),), "own must be"),
        ((torch.zeros(4, 3, 2, 1, 8, 520).movedim(0, 2),), "head_dim of at most 512"),
        ((torch.zeros(3, 2, 4, 1, 8, 16),), "own must lie in memory"),
        ((OWN.to(torch.int8),), "own_scales go with int8"),
        ((OWN, torch.zeros(4, 3, 2, 1, 8).half()), "own_scales go with int8"),
        ((OWN.to(torch.int8), torch.zeros(4, 3, 2, 1, 8).movedim(0, 2)), "own_scales must be"),
        ((OWN, None, OWN.half()), "prefix must have own's"),
        ((OWN, None, torch.zeros(4, 2, 2, 1, 8, 16).movedim(0, 2)), "prefix must have own's"),
        ((OWN, None, None, torch.zeros(4, 3, 2, 1, 8).half()), "prefix_scales go with a prefix"),
        ((OWN, None, None, None, torch.zeros(4).long()), "addresses must be"),
        ((OWN, None, None, None, torch.zeros(5)), "addresses must be"),
    ],
)  # fmt: skip
def test_a_store_that_is_none_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        addressed(*given)


@the_kernel
@pytest.mark.parametrize("kv", ["full", "int8"])
def test_the_kernels_go_where_the_addresses_say(kv, place):
    """As a graph does that was captured with a store of another size, which is gone."""
    given = case([3, 37], [30, 18], kv_heads=2, heads=2)
    given = {k: x.to(place[1]) if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    given = rounded(given) if kv == "int8" else given
    store, others = as_called(given)
    parts = [None if x is None else x[:, :, :2] for x in store[:4]]
    gone = addressed(*(None if x is None else x.clone() for x in parts))
    moved = gone._replace(addresses=store.addresses)
    assert torch.equal(
        decode_attention(store=moved, **others, backend="triton"),
        decode_attention(store=store, **others, backend="triton"),
    )
    key, value = torch.randn(2, 2, 2, 16, generator=torch.Generator().manual_seed(0)).to(place[1])
    at = {name: others[name] for name in ("layer", "table", "positions", "prefilled")}
    before = [None if x is None else x.clone() for x in gone[:4]]
    write_token(key, value, moved, **at, backend="triton")
    for now, was in zip(gone[:4], before, strict=True):
        assert was is None or torch.equal(now.nan_to_num(), was.nan_to_num())
    again = addressed(*(None if x is None else x.clone() for x in store[:4]))
    write_token(key, value, again, **at, backend="torch")
    for now, expected in zip(store[:4], again[:4], strict=True):
        assert now is None or torch.equal(now.nan_to_num(), expected.nan_to_num())


def written(key, value, place, int8=False, prefilled=None):
    """A store of three layers in which tokens were written to layer 1, and the places where they went."""
    backend, device = place
    numbers = torch.full((7, 3, 2, key.shape[1], PAGE, key.shape[2]), 99, device=device)
    numbers = numbers.to(torch.int8 if int8 else key.dtype).movedim(0, 2)
    scales = torch.full(numbers.shape[:5], 9.0, device=device).movedim(2, 0).half().contiguous().movedim(0, 2)
    store = addressed(numbers, scales if int8 else None)
    table = torch.tensor([[3, 1], [5, GARBAGE], [6, 2]], device=device)
    columns = torch.tensor([8 + 5, 7, 8], device=device)
    before = torch.zeros(3, dtype=torch.int64, device=device) if prefilled is None else prefilled.to(device)
    write_token(
        key.to(device), value.to(device), store, layer=1, table=table, positions=columns + before,
        prefilled=None if prefilled is None else before, backend=backend,
    )  # fmt: skip
    return store.own.cpu(), None if store.own_scales is None else store.own_scales.cpu(), ([1, 5, 2], [5, 7, 0])


@every_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads, size", [(1, 16), (3, 80), (2, 128)])
def test_a_token_goes_to_its_column_and_nowhere_else(kv_heads, size, dtype, place):
    draw = torch.Generator().manual_seed(0)
    key = torch.randn(3, kv_heads, size, generator=draw).to(dtype)
    value = torch.randn(size, 3, kv_heads, generator=draw).to(dtype).permute(1, 2, 0)
    found, _, (pages, columns) = written(key, value, place, prefilled=torch.tensor([4, 0, 11]))
    expected = torch.full_like(found, 99)
    for row, (page, column) in enumerate(zip(pages, columns, strict=True)):
        expected[1, 0, page, :, column], expected[1, 1, page, :, column] = key[row], value[row]
    assert torch.equal(found, expected)


@every_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_tokens_are_rounded_as_prompts_are(dtype, place):
    """Bit for bit, with values of all magnitudes, zeros, and a NaN and an infinity, which stay to be seen."""
    key = torch.randn(3, 2, 80, generator=torch.Generator().manual_seed(0))
    key *= torch.tensor([[1.0, 1e-6], [1e-9, 300.0], [0.0, 1.0]])[..., None]
    value = key.flip(0).clone()
    value[0, 1, 7], value[1, 0, 3] = torch.nan, torch.inf
    key, value = key.to(dtype), value.to(dtype)
    found, scales, (pages, columns) = written(key, value, place, int8=True)
    for kind, x in enumerate((key, value)):
        numbers, sizes = quantized(x)
        for row, (page, column) in enumerate(zip(pages, columns, strict=True)):
            assert torch.equal(scales[1, kind, page, :, column].isfinite(), sizes[row].isfinite())
            sure = sizes[row].isfinite()
            assert torch.equal(scales[1, kind, page, :, column][sure], sizes[row][sure])
            assert torch.equal(found[1, kind, page, :, column][sure], numbers[row][sure])
    assert int((scales != 9).sum()) == 2 * 3 * 2
    assert int((found != 99).flatten(0, 4).any(1).sum()) <= 2 * 3 * 2


def test_a_token_that_does_not_fit_the_store_is_refused():
    store = addressed(OWN.clone(memory_format=torch.preserve_format))
    at = dict(layer=0, table=torch.zeros(2, 1).long(), positions=torch.zeros(2).long())
    for key in (torch.zeros(2, 2, 16), torch.zeros(2, 1, 16).long(), torch.zeros(3, 1, 16)):
        with pytest.raises(ValueError, match="key must be"):
            write_token(key, torch.zeros(2, 1, 16), store, **at)
