"""Sampling completions from the resident policy: prompts and a group size in, completions out."""

import contextlib
from typing import Literal, NamedTuple

import psutil
import torch

from lowmem_grpo.errors import InputError, NotFiniteError
from lowmem_grpo.generate import engine, hf
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.plan import RolloutPlan, kv_shape, plan_rollout
from lowmem_grpo.generate.sampling import NOT_FINITE, SamplingParams
from lowmem_grpo.generate.weights import dense_bytes, fast_linears
from lowmem_grpo.model.attention import attending
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.warn import warn


class Sampled(NamedTuple):
    completions: list[Completion]  # B
    metrics: dict[str, float]  # how it was done, as rollout/slots, kv_mib, dense_weights_mib, cuda_graphs, ...


def sample(
    policy: Policy,
    prompts: list[list[int]],
    num_generations: int,
    params: SamplingParams,
    *,
    rollout_token_budget: int,
    token_budget: int,
    plan: RolloutPlan | None = None,
    weights: Literal["auto", "4bit", "dense"] = "auto",
    kv: Literal["full", "int8"] = "full",
    paged: bool = True,
    cuda_graphs: bool = True,
) -> Sampled:
    """num_generations completions of each prompt, group after group, with the adapters as they are now.

    At most rollout_token_budget tokens have their keys and values in memory at once, unless plan says otherwise;
    prompts are prefilled token_budget tokens at a time. "dense" weights are dequantized once for the call, which takes
    dense_bytes of memory; "auto" does so on a CPU whose free memory holds them eight times over when that is first
    asked of a policy. Adapters are added to either as in training. Keys and values are kept in the compute dtype, or in
    "int8". On a GPU they lie in pages, where paged, and steps of decoding are captured as cuda_graphs and replayed;
    where that does not work for a model, a warning says why. A model that the engine does not know is sampled from by
    transformers' `generate`, after a warning.

    Where a call ran out of memory, the next ones have the tokens that were enough for it.

    Raises:
        InputError: a prompt without a token, or dense weights or int8 keys and values of a model that the engine does
            not know.
        NotFiniteError: the policy's logits are not finite, by the engine in every completion; one of which they are
            not finite is nobody else's matter there, and its log-probabilities show it.
    """
    if not prompts:
        return Sampled([], {})
    if not all(prompts):
        raise InputError(f"prompt {prompts.index([])} has no token; a completion needs one to go on from")
    # One number of torch's own generator, which checkpoints keep, gives the whole call's. A greedy evaluation takes
    # none, so that it changes nothing of the training around it.
    draw = torch.Generator().manual_seed(0 if params.greedy else int(torch.randint(2**62, ())))
    kv_dtype = torch.int8 if kv == "int8" else policy.dtype
    if policy.engine_refusal == "unasked":
        policy.engine_refusal = engine.refusal(policy, kv_dtype)
        if policy.engine_refusal:
            warn(
                f"{type(policy.base).__name__} is sampled from by transformers' generate, which is slower and does not "
                f"say its log-probabilities, so that there are no importance weights: {policy.engine_refusal}"
            )
    rollout_token_budget = min(rollout_token_budget, policy.rollout_tokens or rollout_token_budget)
    if policy.engine_refusal:
        asked = "rollout_kv='int8'" if kv == "int8" else "rollout_weights='dense'" if weights == "dense" else None
        if asked:
            raise InputError(
                f"{asked} needs the engine, which does not know this model: {policy.engine_refusal}; leave it out"
            )
        with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
            torch.manual_seed(draw.initial_seed())  # `generate` knows torch's own generators alone
            completions = hf.sample(policy, prompts, num_generations, params, rollout_token_budget=rollout_token_budget)
        return Sampled(completions, {})
    plan = plan or plan_rollout(
        prompt_tokens=max(map(len, prompts)), prompts=len(prompts), num_generations=num_generations,
        max_completion_length=params.max_completion_length, budget_tokens=rollout_token_budget,
        paged=paged and policy.device.type == "cuda",
    )  # fmt: skip
    plan = plan.at_most(len(prompts) * num_generations)
    size = dense_bytes(policy.base, policy.dtype)
    if weights == "auto" and policy.samples_dense is None:
        policy.samples_dense = policy.device.type == "cpu" and 8 * size <= psutil.virtual_memory().available
    dense = weights == "dense" or (weights == "auto" and bool(policy.samples_dense))
    uniforms = torch.rand(len(prompts) * num_generations, params.max_completion_length, generator=draw)
    with contextlib.ExitStack() as stack:
        stack.enter_context(policy.inference())
        stack.enter_context(policy.autocast())
        stack.enter_context(attending(policy.configs))
        stack.enter_context(fast_linears(policy.base, policy.dtype, dense=dense))
        ran = engine.run(
            policy, prompts, num_generations, params, plan, uniforms.to(policy.device), token_budget, kv_dtype,
            cuda_graphs, dense,
        )  # fmt: skip
    if not any(completion.is_finite for completion in ran.completions):
        raise NotFiniteError(NOT_FINITE)
    if ran.plan != plan:
        policy.rollout_tokens = ran.plan.tokens()
    kv_bytes = ran.plan.tokens() * kv_shape(policy.base.config, kv_dtype).token_bytes
    return Sampled(
        ran.completions,
        {
            "rollout/slots": ran.plan.slots,
            "rollout/kv_mib": kv_bytes / 2**20,
            "rollout/dense_weights_mib": size / 2**20 if dense else 0.0,
            "rollout/cuda_graphs": ran.graphs,
            "rollout/preempted": ran.preempted,
            "rollout/out_of_memory": ran.out_of_memory,
        },
    )
