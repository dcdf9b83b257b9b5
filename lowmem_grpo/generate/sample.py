"""Sampler: completions of prompts from the resident policy, as a configuration says."""

import contextlib
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import psutil
import torch

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.errors import InputError, NotFiniteError, in_a_line
from lowmem_grpo.generate import engine, hf
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.graphs import Captures
from lowmem_grpo.generate.sampling import NOT_FINITE, SamplingParams
from lowmem_grpo.generate.shape import StoreShape, state_tokens, store_shape, token_bytes
from lowmem_grpo.generate.states import StateShapes, state_bytes, state_shapes
from lowmem_grpo.generate.step import FastStep
from lowmem_grpo.generate.step_trial import known_step
from lowmem_grpo.generate.turns import Turns
from lowmem_grpo.generate.weights import dense_bytes
from lowmem_grpo.kernels import overlap
from lowmem_grpo.kernels.backend import switched_off
from lowmem_grpo.kernels.decode_attention import goes_by_addresses
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.trial import once_more
from lowmem_grpo.warn import warn

# Devices whose steps are FastSteps. On a CPU, which has no launches to save, one takes 1.07 times as long as the
# model's own layers (the demo and a 4 x 256 model in bf16), and with 4-bit weights 1.9 times.
FAST = {"cuda"}


class Sampled(NamedTuple):
    completions: list[Completion]  # B, group after group
    metrics: dict[str, float]  # how it was done, as rollout/slots, kv_mib, dense_weights_mib, cuda_graphs, ...
    # B instances, where a run has environments: None where one could not be reset, whose completion is not scored.
    environments: list[Any] | None = None


class Sampler:
    """Draws completions from a policy, with its adapters as they are, and remembers what a call has shown.

    Made once a run. A model that the engine does not know is sampled from by transformers' `generate`, after a warning.

    Attributes:
        params, greedy: how complete() and complete_greedily() choose the next token.
        fitting_tokens: how many tokens' keys and values fitted, and states as so many, after a call ran out of memory;
            None if none did.
        samples_dense: what rollout_weights="auto" came to in its first call; None before that.
        captures: the steps of decoding that are replayed as CUDA graphs.
        fast_steps: what decodes in place of the model's layers, by the adapters that are worn; None where it cannot.
    """

    def __init__(self, policy: Policy, config: GRPOConfig):
        self.policy, self.config = policy, config
        length, stop_strings = config.max_completion_length, tuple(config.stop_strings or ())
        self.params = SamplingParams(
            max_completion_length=length, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
            min_p=config.min_p, repetition_penalty=config.repetition_penalty, stop_strings=stop_strings,
        )  # fmt: skip
        self.greedy = SamplingParams(max_completion_length=length, temperature=0, stop_strings=stop_strings)
        self.kv_dtype = torch.int8 if config.rollout_kv == "int8" else policy.dtype
        self.fitting_tokens: int | None = None
        self.samples_dense: bool | None = None
        self.captures = Captures(
            type(policy.base).__name__, last=config.rollout_graphs_last, overlap=overlap.pays(policy.device)
        )
        self.fast_steps: dict[tuple[str, ...], FastStep | None] = {}

    def complete(
        self, prompts: list[Prompt], num_generations: int, share: range | None = None, *, at_most: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Sampled:  # fmt: skip
        """Draw num_generations completions of each prompt, all from one random number of torch's generator.

        With a share, completions of prompts[share.start : share.stop] alone. By the engine these are, but for rounding,
        what a call without a share makes of them: random numbers are drawn for all prompts. With seeds, one a prompt,
        each prompt's completions are drawn from its own alone, whatever the other prompts.

        At most rollout_token_budget tokens have their keys and values in memory at once, or at_most if that is less;
        the states of layers that keep one count as the tokens whose keys and values take as much.

        Raises:
            InputError: a prompt has no token, or dense weights or int8 keys and values are asked of a model that the
                engine does not know.
            NotFiniteError: the logits of every completion are not finite (by `generate`, of one). Of a single one by
                the engine, the log-probabilities are NaN.
        """
        return self._sample([prompt.ids for prompt in prompts], num_generations, self.params, share, at_most, seeds)

    def complete_greedily(self, prompts: list[Prompt], *, at_most: int | None = None) -> Sampled:
        """Take the likeliest token each time, for one completion a prompt, without a random number.

        Memory and errors are as complete() has them.
        """
        return self._sample([prompt.ids for prompt in prompts], 1, self.greedy, at_most=at_most)

    def state(self) -> dict[str, Any]:
        """JSON from which a resumed run samples the completions that this run would have sampled."""
        return {"samples_dense": self.samples_dense}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what state() returned."""
        if not isinstance(state["samples_dense"], bool | None):
            raise ValueError(f"samples_dense is {state['samples_dense']!r}, which is neither true, false nor null")
        self.samples_dense = state["samples_dense"]

    @cached_property
    def engine_refusal(self) -> str | None:
        """Why the engine cannot sample from this model, or None. Tried on a few tokens, once, with a warning."""
        reason = engine.refusal(self.policy, self.kv_dtype)
        if reason:
            warn(
                f"{type(self.policy.base).__name__} is sampled from by transformers' generate, which is slower and "
                f"does not say its log-probabilities, so that there are no importance weights: {reason}"
            )
        return reason

    @cached_property
    def state_shapes(self) -> StateShapes:
        """The shapes of the states that a completion has, of layers that keep one."""
        return once_more(partial(state_shapes, self.policy))

    @cached_property
    def copy_bytes(self) -> int:
        """Bytes of dense weights to sample from."""
        return dense_bytes(self.policy.base, self.policy.dtype)

    def fast_step(self, num_positions: int) -> FastStep | None:
        """A step that decodes with the adapters that are worn, or None. Tried once of them, with a warning."""
        device = self.policy.device
        if device.type not in FAST or switched_off():
            return None
        if device.type == "cuda" and not goes_by_addresses(device):  # no Triton: the twins would be slower
            return None
        worn = self.policy.adapters.worn
        known = self.fast_steps.get(worn)
        if worn not in self.fast_steps or (known is not None and known.num_positions < num_positions):
            self.fast_steps[worn] = self._known_step(num_positions)
        return self.fast_steps[worn]

    def _known_step(self, num_positions: int) -> FastStep | None:
        try:
            with contextlib.suppress(torch.OutOfMemoryError):
                return known_step(self.policy, num_positions)
            self.captures.drop_graphs()
            return known_step(self.policy, num_positions)
        except Exception as error:  # Unknown, no memory, or whatever foreign code raises when it is asked in our way
            name = type(self.policy.base).__name__
            warn(f"{name} is sampled from by its own layers, which is slower: {in_a_line(error)}")
            return None

    def store_shape(self, prompts: list[list[int]], num_generations: int, num_tokens: int) -> StoreShape:
        """The shape of a store with at most num_tokens tokens, or with room for one completion of the longest.

        A benchmark or test that wants another store overrides this.
        """
        return store_shape(
            prompt_tokens=max(map(len, prompts)), num_prompts=len(prompts), num_generations=num_generations,
            max_completion_length=self.config.max_completion_length, budget_tokens=num_tokens,
            paged=self.config.rollout_paged and self.policy.device.type == "cuda",
            state_tokens=self._state_tokens,
        )  # fmt: skip

    @property
    def _state_tokens(self) -> int:
        token = token_bytes(self.policy.layer_shapes, self.kv_dtype)
        return state_tokens(state_bytes(self.state_shapes), token)

    def _sample(
        self, prompts: list[list[int]], num_generations: int, params: SamplingParams, share: range | None = None,
        at_most: int | None = None, seeds: Sequence[int] | None = None, turns: Turns | None = None,
    ) -> Sampled:  # fmt: skip
        """Completions as complete() draws them. With turns, what those say stands between theirs."""
        if not prompts:
            return Sampled([], {})
        if not all(prompts):
            raise InputError(f"prompt {prompts.index([])} has no token; a completion needs one to go on from")
        # One number of torch's own generator, which checkpoints keep, gives the whole call's. A greedy evaluation takes
        # none, so that it changes nothing of the training around it.
        if seeds is None:
            seeds = [0 if params.greedy else int(torch.randint(2**62, ()))]
        share = range(len(prompts)) if share is None else share
        if not share:
            return Sampled([], {})
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        limits = (self.config.rollout_token_budget, at_most, self.fitting_tokens)
        num_tokens = min(limit for limit in limits if limit is not None)
        by = self._by_generate if self.engine_refusal else self._by_engine
        return by(prompts, num_generations, params, draws, share, num_tokens, turns)

    def _by_generate(
        self,
        prompts: list[list[int]],
        num_generations: int,
        params: SamplingParams,
        draws: list[torch.Generator],  # one, or one a prompt
        share: range,  # of the prompts
        num_tokens: int,
        turns: Turns | None,
    ) -> Sampled:
        for name, value in (("rollout_kv", "int8"), ("rollout_weights", "dense")):
            if getattr(self.config, name) == value:
                raise InputError(
                    f"{name}={value!r} needs the engine, which does not know this model: {self.engine_refusal}; leave "
                    "it out"
                )
        completions: list[Completion] = []
        prompts = prompts[share.start : share.stop]
        if len(draws) == 1:
            draws[0].manual_seed(draws[0].initial_seed() + share.start)  # other numbers than another share's
        else:
            draws = draws[share.start : share.stop]
        size = len(prompts) // len(draws)
        with self.policy.fork_rng():
            for place, draw in enumerate(draws):
                torch.manual_seed(draw.initial_seed())  # `generate` knows torch's own generators alone
                drawn = prompts[place * size : (place + 1) * size]
                sampled, fitting = hf.sample(self.policy, drawn, num_generations, params, num_tokens)
                self.fitting_tokens = fitting or self.fitting_tokens
                first, completions = len(completions), completions + sampled
                if turns is not None:
                    asked = [prompt for prompt in drawn for _ in range(num_generations)]
                    hf.go_on(self.policy, asked, completions, first, turns, params)
        return Sampled(completions, {})

    def _by_engine(
        self,
        prompts: list[list[int]],
        num_generations: int,
        params: SamplingParams,
        draws: list[torch.Generator],  # one, or one a prompt
        share: range,  # of the prompts
        num_tokens: int,
        turns: Turns | None,
    ) -> Sampled:
        config, policy = self.config, self.policy
        rows, length = len(prompts) * num_generations // len(draws), params.max_completion_length
        uniforms = torch.cat([torch.rand(rows, length, generator=draw) for draw in draws])
        uniforms = uniforms[share.start * num_generations : share.stop * num_generations]
        prompts = prompts[share.start : share.stop]
        shape = self.store_shape(prompts, num_generations, num_tokens)
        shape = shape.at_most(len(prompts) * num_generations)
        copy_bytes = self.copy_bytes
        if config.rollout_weights == "auto" and self.samples_dense is None:
            self.samples_dense = policy.device.type == "cpu" and 8 * copy_bytes <= psutil.virtual_memory().available
        dense = bool(self.samples_dense) if config.rollout_weights == "auto" else config.rollout_weights == "dense"
        ran = engine.run(
            engine.Request(
                policy, prompts, num_generations, params, uniforms.to(policy.device),
                prefill_tokens=config.token_budget, kv_dtype=self.kv_dtype, dense=dense,
                captures=self.captures if config.has_cuda_graphs else None,
                fast=self.fast_step(shape.prefix_tokens + shape.slot_tokens), states=self.state_shapes, turns=turns,
            ),
            shape,
        )  # fmt: skip
        if not any(completion.is_finite for completion in ran.completions):
            raise NotFiniteError(NOT_FINITE)
        if ran.shape != shape:
            self.fitting_tokens = ran.shape.cost()
        kv_bytes = ran.shape.num_tokens() * token_bytes(policy.layer_shapes, self.kv_dtype)
        kv_bytes += ran.shape.num_states * state_bytes(self.state_shapes)
        return Sampled(
            ran.completions,
            {
                "rollout/slots": ran.shape.slots,
                "rollout/kv_mib": kv_bytes / 2**20,
                "rollout/dense_weights_mib": copy_bytes / 2**20 if dense else 0.0,
                "rollout/cuda_graphs": ran.graphs,
                "rollout/replayed_share": ran.replayed_share,
                "time/rollout_capture_s": ran.capture_s,
                "rollout/preempted": ran.preempted,
                "rollout/out_of_memory": ran.out_of_memory,
            },
        )
