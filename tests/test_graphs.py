"""CUDA graphs without a GPU: a recorder with a capture's semantics takes their place, and below are tests for a GPU."""

import gc
import inspect
import warnings
import weakref
from dataclasses import replace
from functools import partial
from math import ceil

import pytest
import torch
from test_generate import PROMPTS, ShapedSampler, ids_of, paged_shapes, run, shapes, slow
from test_step import policy_of
from tiny_models import make_policy
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lowmem_grpo.generate import engine, graphs, sample, states, step, store
from lowmem_grpo.generate.graphs import Captures, Graphs
from lowmem_grpo.generate.shape import StoreShape, one_of_five
from lowmem_grpo.kernels import overlap
from lowmem_grpo.kernels.decode_attention import decode_attention
from lowmem_grpo.kernels.decode_layer import heads
from lowmem_grpo.out_of_memory import TokenBudget

pytestmark = pytest.mark.usefixtures("known_trials")


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class Place:
    """A tensor by its address: it does not keep its memory."""

    def __init__(self, x):
        self.storage = StorageWeakRef(x.untyped_storage())
        self.dtype, self.layout = x.dtype, (x.storage_offset(), x.size(), x.stride())

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError("a replay goes to memory that was given back")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Recorder(TorchDispatchMode):
    """Keeps every operation with the addresses that it read and wrote; what Python computed is fixed in them.

    As a capture of CUDA's, it leaves all tensors as they were, keeps none alive but those that it made, and a replay
    does the operations again in the same memory.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.waits = [], [], 0
        self.made = {}  # by storage: what the step itself allocates, a graph's own pool

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(x, x.clone()) for x in tensors(given)]
        self.before += [(x, x.clone()) for x in tensors(kwargs.get("out"))]
        out = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        # None where an output is a view, or was written in place.
        made = [None if x.untyped_storage()._cdata in given else x for x in tensors(out)]
        self.calls.append((func, tree_map(self.placed, (args, kwargs)), made))
        self.made |= {x.untyped_storage()._cdata: x for x in made if x is not None}
        return out

    def placed(self, x):
        if not isinstance(x, torch.Tensor) or x.untyped_storage()._cdata in self.made:
            return x
        return Place(x) if x.dim() else x  # a single number: Python makes such ones, and a launch has it as an argument

    def replay(self):
        for func, given, made in self.calls:
            args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, Place) else x, given)
            for old, new in zip(made, tensors(func(*args, **kwargs)), strict=True):
                if old is not None:
                    old.copy_(new)


def recorder(waits=None):
    """In place of cuda_capture. Like torch's, a pool of memory whose graphs are all gone serves no more."""
    used, there = [], weakref.WeakSet()

    def capture(step):
        assert there or not used, "use_count > 0 INTERNAL ASSERT FAILED"
        used.append(0)
        with Recorder() as recorded:
            out = step()
        for tensor, values in reversed(recorded.before):
            tensor.copy_(values)
        recorded.before.clear()
        out.zero_()  # nothing was computed yet
        if waits is not None:
            waits.append(recorded.waits)

        def replay():
            recorded.replay()
            return out

        there.add(replay)
        return replay

    return capture


def roomy(**settings):
    """A sampler that has pages for all nine completions at full length."""
    return ShapedSampler(make_policy(), next(paged_shapes(PROMPTS, 3, 12, 9)), **settings)


@pytest.fixture
def captured_early(monkeypatch):
    """Blocks of 3 steps, of which the first 2 of a number of rows are not replayed."""
    monkeypatch.setitem(engine.ASK_EVERY, "cpu", 3)
    monkeypatch.setattr(graphs, "EAGER", 2)


@pytest.mark.parametrize(
    "family, kv, sampling",
    [
        ("qwen2", "int8", {"temperature": 0}), ("gemma2", "full", {"top_p": 0.9, "top_k": 30, "repetition_penalty": 1.3}),
        slow("qwen2", "full", {}),
        slow("qwen3_5_text", "int8", {}), slow("bamba", "full", {"temperature": 0}),
    ],
)  # fmt: skip
def test_replayed_steps_sample_what_steps_sample(family, kv, sampling, captured_early, monkeypatch):
    """Over refills, shrinking buckets, pages that grow, and preemption; no Python number of the captured step counts."""
    policy = make_policy(family)
    room, short = next(paged_shapes(PROMPTS, 3, 9, 4)), list(paged_shapes(PROMPTS, 3, 9, 9))[1]
    settings = dict(rollout_kv=kv, rollout_weights="4bit", max_completion_length=9)
    for shape in (room, short):
        sampled = partial(ShapedSampler(policy, shape, **settings).run, **sampling)
        truth, waits = sampled(), []
        monkeypatch.setitem(engine.CAPTURE, "cpu", partial(recorder, waits))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = sampled()
        monkeypatch.delitem(engine.CAPTURE, "cpu")
        assert ids_of(found) == ids_of(truth)
        for replayed, stepped in zip(found, truth, strict=True):
            assert torch.equal(replayed.logprobs, stepped.logprobs)
            assert torch.equal(replayed.proposal_logprobs, stepped.proposal_logprobs)
        # The sampler's twin asks, on a CPU alone, whether a rare case is there.
        assert waits and set(waits) == {0 if sampling.get("temperature") == 0 else 1}


@pytest.mark.parametrize("family", ["qwen3_5_text", slow("bamba")])
def test_a_trial_of_a_capture_leaves_states_as_they_are(family, captured_early, monkeypatch):
    """Bit for bit, though it runs a step twice; and the next step moves them on."""
    made, tried, own, own_init = [], [], Graphs._try, states.States.__init__

    def init(self, *given):
        made.append(self)
        own_init(self, *given)

    def watched(self, rows):
        before = [x.clone() for x in states._tensors(made[-1].own)]
        own(self, rows)
        tried.append([torch.equal(x, y) for x, y in zip(before, states._tensors(made[-1].own), strict=True)])
        assert before[0].any()

    monkeypatch.setattr(states.States, "__init__", init)
    monkeypatch.setattr(Graphs, "_try", watched)
    monkeypatch.setitem(engine.CAPTURE, "cpu", recorder)
    policy = make_policy(family)
    sampler = ShapedSampler(policy, ROOM, max_completion_length=5)
    found = sampler.run(prompts=PROMPTS[1:])
    assert sampler.captures.refusal is None
    assert tried and all(map(all, tried)) and made[-1].commit.all()
    assert_same(found, stepping(policy, ROOM, rollout_weights="auto", max_completion_length=5).run(prompts=PROMPTS[1:]))


def test_what_a_capture_fixed_would_be_seen(captured_early, monkeypatch):
    """The recorder is no better than a capture: a step that counts by the host's numbers goes wrong, and is found out."""
    policy = make_policy()
    shape = next(paged_shapes(PROMPTS, 3, 12, 9))
    truth = run(policy, shape=shape, temperature=0)
    own = engine.Slots.hidden

    def by_the_host(slots, rows):
        for row in range(rows):
            slots.positions[row] = slots.prefilled[row] + slots.columns[row]
        return own(slots, rows)

    monkeypatch.setattr(engine.Slots, "hidden", by_the_host)
    assert ids_of(run(policy, shape=shape, temperature=0)) == ids_of(truth)
    monkeypatch.setitem(engine.CAPTURE, "cpu", recorder)
    assert ids_of(run(policy, shape=shape, temperature=0)) != ids_of(truth)


def broken(step):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_no_garbage_is_collected_while_a_step_is_captured(captured_early, monkeypatch):
    """With which an earlier sampler's graphs may go, and the capture with them; a capture that fails ends it, too."""
    seen = []

    def watched(then):
        def capture(step):
            seen.append(gc.isenabled())
            return then(step)

        return lambda: capture

    for then in (recorder(), broken):
        monkeypatch.setitem(engine.CAPTURE, "cpu", watched(then))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            roomy().run()
        assert seen and not any(seen) and gc.isenabled()


def wrong(step):
    return lambda: torch.full_like(step(), 7.0)


def misweighted(step):
    """Right but for the log-probabilities that importance weights are made of."""
    replay = recorder()(step)

    def but(out):
        out[2:] = 123.0
        return out

    return lambda: but(replay())


def half_wrong(step):
    replay = recorder()(step)

    def but(out):
        out[0, : out.shape[1] // 2] += 1
        return out

    return lambda: but(replay())


@pytest.mark.parametrize(
    "capture, reason, tries",
    [
        (broken, "operation not permitted", 1), (wrong, "chose otherwise in 9 of 9 rows", 2),
        (misweighted, "chose otherwise in 9 of 9 rows", 2), (half_wrong, "chose otherwise in 4 of 9 rows", 2),
    ],
)  # fmt: skip
def test_a_capture_that_fails_changes_nothing_and_is_given_up(capture, reason, tries, captured_early, monkeypatch):
    sampler, tried = roomy(), []
    truth = sampler.run(repetition_penalty=1.3)
    monkeypatch.setitem(engine.CAPTURE, "cpu", lambda: lambda step: tried.append(0) or capture(step))
    with pytest.warns(UserWarning, match=f"without CUDA graphs, which is slower: .*{reason}[^\n]*$"):
        assert ids_of(sampler.run(repetition_penalty=1.3)) == ids_of(truth)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert ids_of(sampler.run(repetition_penalty=1.3)) == ids_of(truth)
    assert len(tried) == tries


def test_kernels_that_overlap_wrongly_are_given_up_before_graphs_are(captured_early, monkeypatch):
    """A capture is compared with the step without overlap; a second one, without it too, is what is kept."""
    sampler, ways = roomy(), []
    truth = sampler.run()
    sampler.captures.overlap = True
    own = engine.Slots.step
    monkeypatch.setattr(engine.Slots, "step", lambda *given: ways.append(overlap.launched()["OVERLAP"]) or own(*given))

    def in_new_pool():
        capture = recorder()

        def wrong_with_overlap(step):
            replay, overlaps = capture(step), sampler.captures.overlap
            return lambda: replay() + 7 * overlaps

        return wrong_with_overlap

    monkeypatch.setitem(engine.CAPTURE, "cpu", in_new_pool)
    with pytest.warns(
        UserWarning, match="without overlapping kernels, which is slower: a captured step chose otherwise"
    ):
        assert ids_of(sampler.run()) == ids_of(truth)
    assert not sampler.captures.overlap and sampler.captures.refusal is None and sampler.captures.counts.replayed
    # Two steps to warm up; of each of two tries the step that is compared, its capture and the step itself; then one.
    assert ways[:8] == [True, True, False, True, True, False, True, False]
    assert not any(ways[8:]) and overlap.launched() == {"OVERLAP": False}


@pytest.mark.parametrize(
    "text, chosen", [(None, False), ('{"H9": true, "H8": false}', True), ("[", False), ("3", False)]
)
def test_kernels_overlap_where_that_was_measured_on_the_card(text, chosen, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    if text is not None:
        overlap.table_path().parent.mkdir()
        overlap.table_path().write_text(text)
    device = torch.device("cuda")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert overlap.pays(device) is chosen and not overlap.pays(torch.device("cpu"))
    assert ["no kernels overlap" in str(one.message) for one in said] == ([True] if text in ("[", "3") else [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert not overlap.pays(device)


def test_a_row_that_rounding_tipped_once_costs_no_graph(captured_early, monkeypatch):
    """Nor is it the end of the pool of memory of a graph that was alone in it."""
    sampler, tried = roomy(), []
    truth = sampler.run()

    def in_new_pool():
        capture = recorder()

        def wrong_at_first(step):
            replay, first = capture(step), not tried
            tried.append(0)
            return lambda: replay() + 7 * first

        return wrong_at_first

    monkeypatch.setitem(engine.CAPTURE, "cpu", in_new_pool)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert ids_of(sampler.run()) == ids_of(truth)
    assert len(tried) > 1 and sampler.captures.refusal is None


def test_a_capture_for_which_there_is_no_memory_leaves_the_slots(captured_early, monkeypatch):
    sampler = roomy()
    truth = sampler.run()

    def capture(step):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(engine.CAPTURE, "cpu", lambda: capture)
    with pytest.warns(UserWarning, match="without CUDA graphs, which is slower: CUDA out of memory"):
        assert ids_of(sampler.run()) == ids_of(truth)
    assert sampler.fitting_tokens is None


def test_a_step_for_which_there_is_no_memory_halves_the_slots(captured_early, monkeypatch):
    sampler = roomy()
    truth, own, tried = sampler.run(), engine.Slots.step, []

    def step(slots, rows):
        tried.append(0)
        if len(tried) in (3, 4):  # the one that a capture is compared with, and the first after it
            raise torch.OutOfMemoryError
        return own(slots, rows)

    monkeypatch.setattr(engine.Slots, "step", step)
    monkeypatch.setitem(engine.CAPTURE, "cpu", recorder)
    assert ids_of(sampler.run()) == ids_of(truth)
    assert sampler.captures.refusal is None and sampler.fitting_tokens is not None


def test_switched_off_nothing_is_captured(captured_early, monkeypatch):
    monkeypatch.setitem(engine.CAPTURE, "cpu", lambda: broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        roomy(rollout_cuda_graphs=False).run()


def test_a_number_of_rows_is_captured_once_and_only_if_it_lasts():
    captures, made = Captures("a model"), []
    captures.in_new_pool = lambda: lambda step: made.append(0) or recorder()(step)
    state = torch.zeros(1)

    def step(rows):
        state.add_(1)
        return torch.stack([state.expand(rows)] * 3).double()

    steps = Graphs(captures, step, [state], lambda: [0], "a kind")
    found = [steps(rows)[0, 0].item() for rows in [4] * (graphs.EAGER + 3) + [2] * graphs.EAGER + [4]]
    assert found == list(range(1, 2 * graphs.EAGER + 5)), "each step once, and each result a tensor of its own"
    assert len(made) == 1 and list(captures.replays) == [("a kind", 4)]
    assert (captures.counts.steps, captures.counts.replayed) == (len(found), 4)
    assert captures.counts.capture_s > 0


def test_a_later_rollout_captures_its_first_step_and_takes_none_by_itself(captured_early, monkeypatch):
    sampler, alone = roomy(), []
    truth, own, recording = sampler.run(), engine.Slots.step, []

    def step(slots, rows):
        alone.extend([rows] * (not recording))
        return own(slots, rows)

    def capture(step):
        recording.append(0)
        replay = recorder()(step)
        recording.clear()
        return replay

    monkeypatch.setattr(engine.Slots, "step", step)
    monkeypatch.setitem(engine.CAPTURE, "cpu", lambda: capture)
    assert ids_of(sampler.run()) == ids_of(truth)
    assert alone
    alone.clear()
    assert ids_of(sampler.run()) == ids_of(truth)
    assert not alone
    sampler.captures.release()
    assert ids_of(sampler.run()) == ids_of(truth)
    assert not alone, "what was trusted is captured again at its first step"
    sampler.run(temperature=0)
    assert alone, "another kind of step was never compared"


def test_a_later_capture_that_fails_is_tried_from_the_start(captured_early, monkeypatch):
    sampler, tried = roomy(), []
    truth = sampler.run()
    monkeypatch.setitem(engine.CAPTURE, "cpu", recorder)
    sampler.run()
    trusted = set(sampler.captures.trusted)
    sampler.captures.release()
    monkeypatch.setitem(
        engine.CAPTURE, "cpu", lambda: lambda step: tried.append(0) or (broken if len(tried) == 1 else recorder())(step)
    )
    assert ids_of(sampler.run()) == ids_of(truth)
    assert len(tried) > 1 and sampler.captures.refusal is None and sampler.captures.trusted == trusted


ROOM = next(paged_shapes(PROMPTS, 3, 12, 9))


def in_4bit(*given, **settings):
    """A sampler from the 4-bit weights: on a CPU a copy of them is the default, and what reads a copy does not last."""
    return ShapedSampler(*given, **{"rollout_weights": "4bit", **settings})


def stepping(*given, **settings):
    """A sampler with the same numbers of rows, whose steps are not captured."""
    sampler = in_4bit(*given, **settings)
    sampler.captures.refusal = "this one is compared with"
    return sampler


@pytest.fixture
def captured(captured_early, monkeypatch):
    """Recordings in place of captures, from a kind's second step on; returns the list of those that were made."""
    made: list[int] = []

    def capture(step):
        made.append(0)
        return recorder()(step)

    monkeypatch.setattr(graphs, "EAGER", 1)
    monkeypatch.setitem(engine.CAPTURE, "cpu", lambda: capture)
    return made


@pytest.fixture
def fast_on_a_cpu(monkeypatch):
    monkeypatch.setattr(sample, "FAST", {"cpu"})


def poisoned(num_bytes):
    """Memory that an update takes where a store was, full of NaN, in pieces of every size."""
    return [torch.full((size,), torch.nan) for size in (num_bytes // 4, num_bytes // 8, *[num_bytes // 64] * 8)]


def change_adapters(policy):
    with torch.no_grad():
        for parameter in policy.parameters_of(policy.adapter).values():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
            parameter += 0.05 * noise.to(parameter.device)


def assert_same(found, truth):
    assert ids_of(found) == ids_of(truth)
    for one, other in zip(found, truth, strict=True):
        assert torch.equal(one.logprobs, other.logprobs)
        assert torch.equal(one.proposal_logprobs, other.proposal_logprobs)


@pytest.mark.parametrize(
    "family, kv, sampling",
    [
        ("gemma2", "int8", {}),
        ("qwen2", "full", {"top_p": 0.9, "repetition_penalty": 1.3}),
        slow("qwen2", "full", {}),
        slow("qwen3_5_text", "full", {}),
        slow("granite_swa", "full", {}),
    ],
)
def test_graphs_of_one_rollout_serve_the_later_ones(family, kv, sampling, captured, monkeypatch):
    """In stores elsewhere and of other sizes, with fewer pages, shorter prompts and moved adapters, bit for bit."""
    policy, settings = make_policy(family), dict(rollout_kv=kv, max_completion_length=8)
    lasting, plain = in_4bit(policy, **settings), stepping(policy, **settings)
    more, fewer = replace(ROOM, pages=ROOM.pages + 7, prefix_tokens=200), replace(ROOM, pages=8)
    small = replace(ROOM, prefix_tokens=20)
    rollouts = [(ROOM, PROMPTS), (more, PROMPTS), (fewer, PROMPTS), (small, [*PROMPTS[:2], [11]]), (ROOM, PROMPTS)]
    update, preempted = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for number, (shape, prompts) in enumerate([*rollouts, rollouts[1]]):
            lasting.given = plain.given = shape
            num_graphs = len(captured)
            found = lasting.sampled(seed=number, prompts=prompts, **sampling)
            assert_same(found.completions, plain.run(seed=number, prompts=prompts, **sampling))
            new = len(captured) - num_graphs
            counts, metrics = lasting.captures.counts, found.metrics
            assert counts.steps - counts.replayed == new, "a number of rows costs one step, once"
            assert metrics["rollout/replayed_share"] == counts.replayed / counts.steps
            assert (metrics["time/rollout_capture_s"] > 0) == (new > 0)
            preempted += metrics["rollout/preempted"]
            change_adapters(policy)
            update.append(poisoned(2**16))
    assert len(captured) <= 5 and new == 0 and preempted


@pytest.mark.parametrize(
    "family, kv, sampling",
    [
        ("gemma2", "int8", {"top_p": 0.9, "repetition_penalty": 1.3}), slow("qwen3", "full", {}),
        slow("granite_swa", "full", {}),
    ],
)  # fmt: skip
def test_graphs_of_a_fast_step_serve_the_later_rollouts(family, kv, sampling, captured, fast_on_a_cpu):
    """Bit for bit: with stores elsewhere and of other sizes, moved adapters, and others worn in between."""
    policy, settings = policy_of(family), dict(rollout_kv=kv, max_completion_length=9)
    policy.add("other")
    lasting, plain = in_4bit(policy, **settings), stepping(policy, **settings)
    update = []
    for number, shape in enumerate((ROOM, replace(ROOM, pages=8, prefix_tokens=200), ROOM)):
        lasting.given = plain.given = shape
        num_graphs = len(captured)
        found = lasting.sampled(seed=number, **sampling)
        assert_same(found.completions, plain.run(seed=number, **sampling))
        counts, new = lasting.captures.counts, len(captured) - num_graphs
        assert counts.steps - counts.replayed == new, "a number of rows costs one step, once"
        if number:
            with policy.wearing("other"):
                assert_same(lasting.run(seed=number, **sampling), plain.run(seed=number, **sampling))
        change_adapters(policy)
        update.append(poisoned(2**16))
    assert new == 0 and lasting.fast_steps[policy.adapters.worn] is not None


@pytest.mark.parametrize("thing", ["adapters", "store"])
def test_what_a_fast_step_finds_elsewhere_would_be_seen(thing, captured, fast_on_a_cpu, monkeypatch):
    if thing == "adapters":
        own = step.FastStep.ready
        monkeypatch.setattr(step.FastStep, "ready", lambda fast, *, dense, kept=None: own(fast, dense=dense))
    if thing == "store":  # by itself, and not by its address
        monkeypatch.setattr(
            store.Store, "heads", lambda self, *finished, layer, **where: heads(
                *finished, own=self.own.groups[0].numbers, scales=self.own.groups[0].scales,
                layer=self.places[layer].index, **where,
            )
        )  # fmt: skip
    sampler = in_4bit(policy_of("qwen3"), ROOM)
    sampler.run()
    with pytest.raises(RuntimeError, match="given back"):
        sampler.run(seed=1)


def test_a_fast_step_and_prompts_read_one_copy_of_the_adapters(captured, fast_on_a_cpu):
    """Which an update that runs out of memory gets back."""
    policy = policy_of("qwen3", bf16=True)
    sampler = in_4bit(policy, ROOM)
    sampler.run()
    kept = sampler.captures.kept.tensors
    sizes = [x.numel() for name, x in kept.items() if isinstance(name, tuple)]
    assert sum(sizes) == sum(x.numel() for x in policy.parameters_of(policy.adapter).values())
    sampler.captures.give_way()
    assert not kept and all(x.a is x.b is None for layer in sampler.fast_step(40).layers for x in layer)


@pytest.mark.parametrize("thing", ["adapters", "slots", "store"])
def test_what_is_made_anew_in_each_rollout_would_be_seen(thing, captured, monkeypatch):
    """The recorder keeps nothing alive, so that a replay fails that reads what the rollout before it gave back."""
    if thing == "adapters":
        monkeypatch.setattr(graphs.Kept, "copy", lambda kept, name, values, dtype: values.to(dtype, copy=True))
    if thing == "slots":
        monkeypatch.setattr(graphs.Kept, "zeros", lambda kept, name, size, dtype, _: torch.zeros(size, dtype=dtype))
    if thing == "store":  # by itself, and not by its address
        monkeypatch.setattr(
            store.Store, "attend", lambda self, query, **where: decode_attention(query, self.keys_values[0], **where)
        )
    sampler = in_4bit(make_policy(), ROOM)
    sampler.run()
    with pytest.raises(RuntimeError, match="given back"):
        sampler.run(seed=1)


def test_a_captured_step_reads_sinks_where_the_model_has_them(captured):
    """As an adapter that trains them changes them, in place."""
    policy = make_policy("granite_swa")
    lasting, plain = in_4bit(policy, ROOM), stepping(policy, ROOM)
    found = []
    for _ in range(2):
        num_graphs = len(captured)
        found.append(lasting.run(max_completion_length=6))
        assert_same(found[-1], plain.run(max_completion_length=6))
        for layer in policy.decoder.layers:
            layer.self_attn.sinks.data.fill_(3.0)
    assert len(captured) == num_graphs and found[0] != found[1]


def test_a_store_that_was_given_back_is_not_read(captured):
    sampler = in_4bit(make_policy(), ROOM)
    sampler.run()
    with pytest.raises(RuntimeError, match="a store that was given back"):
        next(iter(sampler.captures.replays.values()))()


@pytest.mark.parametrize(
    "change",
    [
        dict(params=dict(temperature=0)), dict(params=dict(top_k=3)), dict(params=dict(max_completion_length=4)),
        dict(shape=replace(ROOM, page_tokens=6)), dict(shape=replace(ROOM, slot_tokens=20, pages=60)),
        dict(shape=replace(ROOM, prefix_tokens=300)), dict(shape=StoreShape(5, 12, 3, 79, 28, 4)),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_graph_fixed_is_in_its_key(change, captured):
    """A rollout that needs other numbers in a kernel's arguments is captured for itself; the first kind's graphs stay."""
    policy = make_policy()
    sampler, plain = in_4bit(policy, ROOM, max_completion_length=6), stepping(policy, max_completion_length=6)
    truth = sampler.run()
    num_graphs = len(captured)
    sampler.given = plain.given = change.get("shape", ROOM)
    assert_same(sampler.run(**change.get("params", {})), plain.run(**change.get("params", {})))
    assert len(captured) > num_graphs
    sampler.given, num_graphs = ROOM, len(captured)
    again = sampler.sampled()
    assert_same(again.completions, truth)
    grown = change.get("shape", ROOM).slot_tokens > ROOM.slot_tokens  # a wider table lies elsewhere
    assert (len(captured) > num_graphs) == grown
    assert again.metrics["rollout/replayed_share"] == 1, "it was trusted"


def test_an_evaluation_of_more_prompts_moves_what_is_kept_once(captured):
    policy = make_policy()
    sampler = in_4bit(policy, ROOM, max_completion_length=5)
    plain = stepping(policy, StoreShape(24, 12, 24, 79, 100, 4), max_completion_length=5)
    truth = sampler.run()
    for turn in range(3):
        sampler.given = plain.given
        prompts = PROMPTS * 8
        assert_same(sampler.run(1, prompts=prompts, temperature=0), plain.run(1, prompts=prompts, temperature=0))
        num_graphs, sampler.given = len(captured), ROOM
        assert_same(sampler.run(), truth)
        assert (len(captured) > num_graphs) == (turn == 0)


def test_out_of_memory_lets_graphs_go_before_slots_are_halved(captured, monkeypatch):
    sampler = in_4bit(make_policy(), ROOM)
    truth, own = sampler.run(), store.Store.__init__
    num_graphs, there = len(captured), []

    def short_of_memory(self, *given):
        there.append(len(sampler.captures.replays))
        if len(there) == 1:
            raise torch.OutOfMemoryError("made up")
        own(self, *given)

    monkeypatch.setattr(store.Store, "__init__", short_of_memory)
    found = sampler.sampled()
    assert_same(found.completions, truth)
    assert there[0] > 0 and there[1] == 0 and len(there) == 2
    assert found.metrics["rollout/out_of_memory"] == 1 and sampler.fitting_tokens is None
    assert len(captured) == 2 * num_graphs
    assert_same(sampler.run(), truth)
    assert len(captured) == 2 * num_graphs, "they last again"


def test_an_update_that_runs_out_of_memory_lets_everything_go_for_good(captured):
    sampler = in_4bit(make_policy(), ROOM)
    truth = sampler.run()
    captures, budget = sampler.captures, TokenBudget(100)
    budget.give_way = captures.give_way
    nothing_yet = Captures("another model")
    nothing_yet.give_way()
    assert nothing_yet.last and captures.last, "as when the largest update is tried, before any rollout"
    assert captures.replays and captures.kept.tensors
    tried = []

    def work(num_tokens):
        tried.append((num_tokens, len(captures.replays), len(captures.kept.tensors)))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("made up")

    budget.fit(work, [10])
    assert tried[0][1] > 0 and tried[1] == (100, 0, 0), "before micro-batches become smaller"
    for _ in range(2):
        num_graphs = len(captured)
        found = sampler.sampled()
        assert_same(found.completions, truth)
        assert len(captured) > num_graphs and found.metrics["rollout/replayed_share"] == 1
        assert not captures.replays and not captures.kept.tensors


@pytest.mark.parametrize("settings", [dict(rollout_weights="dense"), dict(rollout_graphs_last=False)], ids=str)
def test_graphs_that_do_not_last_are_captured_in_each_rollout(settings, captured):
    sampler = in_4bit(make_policy(), ROOM, **settings)
    truth = sampler.run()
    num_graphs = len(captured)
    assert num_graphs and not sampler.captures.replays and not sampler.captures.kept.tensors
    found = sampler.sampled()
    assert_same(found.completions, truth)
    assert len(captured) == 2 * num_graphs and found.metrics["rollout/replayed_share"] == 1


def test_five_numbers_of_rows_are_captured():
    assert {one_of_five(n, 64) for n in range(1, 65)} == {1, 8, 16, 32, 64}
    assert [one_of_five(n, 9) for n in range(1, 10)] == [1, 2, 3, 5, 5, 9, 9, 9, 9]
    assert [one_of_five(n, 3) for n in (1, 2, 3)] == [1, 2, 3] and one_of_five(1, 1) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnAGpu:
    @pytest.mark.parametrize(
        "sampling", [{}, {"temperature": 0}, {"top_p": 0.9, "top_k": 30, "repetition_penalty": 1.3}]
    )
    @pytest.mark.parametrize("kv", ["full", "int8"])
    def test_graphs_sample_what_steps_sample(self, family, kv, sampling):
        """With kernels that overlap, where a card can have them, to the last bit as without."""
        policy = make_policy(family, use_cpu=False)
        longest = 100
        for shape in (
            *shapes(PROMPTS, 3, longest, 9), StoreShape(9, longest, 3, 79, 1 + 9 * ceil(longest / 16), 16),
            StoreShape(9, longest, 3, 79, 1 + 4 * ceil(longest / 16), 16),
        ):  # fmt: skip
            settings = dict(rollout_kv=kv, max_completion_length=longest)
            sampler = ShapedSampler(policy, shape, **settings)
            truth = ShapedSampler(policy, shape, rollout_cuda_graphs=False, **settings).run(**sampling)
            found = sampler.run(**sampling)
            assert ids_of(found) == ids_of(truth)
            assert sampler.captures.refusal is None
            if overlap.can_overlap(policy.device):
                chained = ShapedSampler(policy, shape, **settings)
                chained.captures.overlap = True
                for _ in range(2):  # captured, and replayed from the first step on
                    for one, other in zip(chained.run(**sampling), found, strict=True):
                        assert one.ids == other.ids and torch.equal(one.logprobs, other.logprobs)
                assert chained.captures.overlap and chained.captures.counts.replayed

    @pytest.mark.parametrize("family, kv", [("qwen2", "full"), ("qwen2", "int8"), ("granite_swa", "full")])
    def test_graphs_of_one_rollout_serve_the_later_ones(self, family, kv, monkeypatch):
        """And name no memory that was given back, where torch can tell (2.13)."""
        if "check_input_liveness" in inspect.signature(torch.cuda.graph.__init__).parameters:
            monkeypatch.setattr(torch.cuda, "graph", partial(torch.cuda.graph, check_input_liveness=True))
        policy, longest = make_policy(family, use_cpu=False), 100
        settings = dict(rollout_kv=kv, max_completion_length=longest)
        lasting, plain = ShapedSampler(policy, **settings), ShapedSampler(policy, rollout_cuda_graphs=False, **settings)
        for number, pages in enumerate((40, 70, 30, 40)):
            lasting.given = plain.given = StoreShape(9, longest, 3, 79, pages, 16)
            found = lasting.sampled(seed=number)
            assert ids_of(found.completions) == ids_of(plain.run(seed=number))
            # A number of rows that no rollout had before costs one step.
            assert found.metrics["rollout/replayed_share"] > 0.95 or number == 0
            change_adapters(policy)
            torch.full((2**24,), torch.nan, device="cuda")  # over the store that is gone
        assert lasting.captures.refusal is None

    def test_the_memory_of_graphs_is_given_back(self):
        policy = make_policy("qwen2", use_cpu=False)
        sampler = ShapedSampler(policy, max_completion_length=60, rollout_graphs_last=False)
        sampler.run(4)  # cuBLAS keeps a workspace for the stream of captures, in their pool
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        sampler.run(4)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == before

    def test_graphs_that_last_take_no_more_with_each_rollout(self):
        sampler = ShapedSampler(make_policy("qwen2", use_cpu=False), max_completion_length=60)
        sampler.run(4)
        sampler.run(4)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        sampler.run(4)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == before
        sampler.captures.release()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < before
