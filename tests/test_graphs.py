"""CUDA graphs without a GPU: a recorder with a capture's semantics takes their place, and below are tests for a GPU."""

import warnings
from functools import partial
from math import ceil

import pytest
import torch
from test_generate import PROMPTS, ShapedSampler, ids_of, paged_shapes, run, shapes
from tiny_models import make_policy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_grpo.generate import engine, graphs
from lowmem_grpo.generate.graphs import Captures, Graphs
from lowmem_grpo.generate.shape import StoreShape


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Keeps every operation with the very tensors that it read and wrote; what Python computed is fixed in them.

    As a capture of CUDA's, it leaves all tensors as they were, and a replay does the operations again in the same memory.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.waits = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(x, x.clone()) for x in tensors(given)]
        self.before += [(x, x.clone()) for x in tensors(kwargs.get("out"))]
        out = func(*args, **kwargs)
        shared = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        self.calls.append(
            (func, args, kwargs, [x for x in tensors(out) if x.untyped_storage().data_ptr() not in shared])
        )
        return out

    def replay(self):
        for func, args, kwargs, owned in self.calls:
            out = func(*args, **kwargs)
            if owned:
                for old, new in zip(owned, tensors(out), strict=True):
                    old.copy_(new)


def recorder(waits=None):
    """In place of cuda_capture."""

    def capture(step):
        with Recorder() as recorded:
            out = step()
        for tensor, values in reversed(recorded.before):
            tensor.copy_(values)
        out.zero_()  # nothing was computed yet
        if waits is not None:
            waits.append(recorded.waits)

        def replay():
            recorded.replay()
            return out

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
        ("qwen2", "full", {}), ("qwen2", "int8", {"temperature": 0}), ("gemma2", "full", {}),
        ("qwen2", "full", {"top_p": 0.9, "top_k": 30, "repetition_penalty": 1.3}),
    ],
)  # fmt: skip
def test_replayed_steps_sample_what_steps_sample(family, kv, sampling, captured_early, monkeypatch):
    """Over refills, shrinking buckets, pages that grow, and preemption; no Python number of the captured step counts."""
    policy = make_policy(family)
    room, short = next(paged_shapes(PROMPTS, 3, 12, 4)), list(paged_shapes(PROMPTS, 3, 12, 9))[1]
    for shape in (room, short):
        sampled = partial(ShapedSampler(policy, shape, rollout_kv=kv, rollout_weights="4bit").run, **sampling)
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


def test_what_a_capture_fixed_would_be_seen(captured_early, monkeypatch):
    """The recorder is no better than a capture: a step that counts by the host's numbers goes wrong, and is found out."""
    policy = make_policy()
    shape = next(paged_shapes(PROMPTS, 3, 12, 9))
    truth = run(policy, shape=shape, temperature=0)
    own = engine.Slots.hidden

    def by_the_host(slots, rows):
        slots.positions[:rows] = torch.tensor([slots.prefilled[i] + slots.columns[i] for i in range(rows)])
        return own(slots, rows)

    monkeypatch.setattr(engine.Slots, "hidden", by_the_host)
    assert ids_of(run(policy, shape=shape, temperature=0)) == ids_of(truth)
    monkeypatch.setitem(engine.CAPTURE, "cpu", recorder)
    assert ids_of(run(policy, shape=shape, temperature=0)) != ids_of(truth)


def broken(step):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


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


def test_a_row_that_rounding_tipped_once_costs_no_graph(captured_early, monkeypatch):
    sampler, tried = roomy(), []
    truth = sampler.run()
    monkeypatch.setitem(
        engine.CAPTURE, "cpu", lambda: lambda step: (recorder(), tried.append(0), wrong)[2 * (len(tried) == 1)](step)
    )
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
    state = torch.zeros(1)

    def step(rows):
        state.add_(1)
        return torch.stack([state.expand(rows)] * 3).double()

    steps = Graphs(captures, step, [state], lambda step: made.append(0) or recorder()(step), lambda: [0], "a kind")
    found = [steps(rows)[0, 0].item() for rows in [4] * (graphs.EAGER + 3) + [2] * graphs.EAGER + [4]]
    assert found == list(range(1, 2 * graphs.EAGER + 5)), "each step once, and each result a tensor of its own"
    assert len(made) == 1 and list(steps.replays) == [4]


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
    sampler.run(temperature=0)
    assert alone, "another kind of step was never compared"


def test_a_later_capture_that_fails_is_tried_from_the_start(captured_early, monkeypatch):
    sampler, tried = roomy(), []
    truth = sampler.run()
    monkeypatch.setitem(engine.CAPTURE, "cpu", recorder)
    sampler.run()
    trusted = set(sampler.captures.trusted)
    monkeypatch.setitem(
        engine.CAPTURE, "cpu", lambda: lambda step: tried.append(0) or (broken if len(tried) == 1 else recorder())(step)
    )
    assert ids_of(sampler.run()) == ids_of(truth)
    assert len(tried) > 1 and sampler.captures.refusal is None and sampler.captures.trusted == trusted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnAGpu:
    @pytest.mark.parametrize(
        "sampling", [{}, {"temperature": 0}, {"top_p": 0.9, "top_k": 30, "repetition_penalty": 1.3}]
    )
    @pytest.mark.parametrize("kv", ["full", "int8"])
    def test_graphs_sample_what_steps_sample(self, family, kv, sampling):
        policy = make_policy(family, use_cpu=False)
        longest = 100
        for shape in (
            *shapes(PROMPTS, 3, longest, 9), StoreShape(9, longest, 3, 79, 1 + 9 * ceil(longest / 16), 16),
            StoreShape(9, longest, 3, 79, 1 + 4 * ceil(longest / 16), 16),
        ):  # fmt: skip
            settings = dict(rollout_kv=kv, max_completion_length=longest)
            sampler = ShapedSampler(policy, shape, **settings)
            truth = ShapedSampler(policy, shape, rollout_cuda_graphs=False, **settings).run(**sampling)
            assert ids_of(sampler.run(**sampling)) == ids_of(truth)
            assert sampler.captures.refusal is None

    def test_the_memory_of_graphs_is_given_back(self):
        policy = make_policy("qwen2", use_cpu=False)
        sampler = ShapedSampler(policy, max_completion_length=60)
        sampler.run(4)  # cuBLAS keeps a workspace for the stream of captures, in their pool
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        sampler.run(4)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == before
