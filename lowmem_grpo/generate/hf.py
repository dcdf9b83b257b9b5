"""Sampling by transformers' `model.generate`, in waves under a token budget: for what the engine does not know."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from lowmem_grpo.errors import InputError, NotFiniteError, in_a_line
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.ending import ending
from lowmem_grpo.generate.sampling import NOT_FINITE, SamplingParams
from lowmem_grpo.generate.turns import Turns
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.out_of_memory import as_torch_says_it, tried_again


def sample(
    policy: Policy,
    prompts: list[list[int]],
    num_generations: int,
    params: SamplingParams,
    num_tokens: int,
) -> tuple[list[Completion], int | None]:
    """Draw num_generations completions of each prompt, group after group, without log-probabilities.

    A wave holds at most num_tokens tokens (prompt, completion and padding), and at least one completion. Out of memory
    it is sampled again in halves, with other random numbers. The second value is what then fitted, in tokens, or None.
    """
    rows = [ids for ids in prompts for _ in range(num_generations)]
    sampled: list[list[int]] = []
    fitting: int | None = None
    with policy.inference(), policy.autocast(), _prepared(policy, params):
        width = max(map(len, rows)) + params.max_completion_length
        wave = max(1, num_tokens // width)

        def failed(error: torch.OutOfMemoryError) -> None:
            nonlocal wave, fitting
            if wave == 1:
                error.add_note("One completion at a time does not fit. Lower max_completion_length.")
                raise error
            wave //= 2
            fitting = wave * width

        def next_wave() -> list[list[int]]:
            return _generate(policy, rows[len(sampled) : len(sampled) + wave], params)

        while len(sampled) < len(rows):
            wave = min(wave, len(rows) - len(sampled))
            sampled += tried_again(next_wave, failed)
    return [_cut(ids, ending(policy, params)) for ids in sampled], fitting


def go_on(
    policy: Policy, prompts: list[list[int]], completions: list[Completion], first: int, turns: Turns,
    params: SamplingParams,
) -> None:  # fmt: skip
    """Draw the later turns of completions[first:], of a prompt each, one after another from all that is before."""
    for number in range(first, len(completions)):
        turns.end(number, completions[number])
    while True:
        with policy.fork_rng():  # whatever the answers draw
            answers = turns.answers()
        if not answers:
            return
        for number, ids in answers.items():
            before = [*completions[number].ids, *ids]
            room = replace(params, max_completion_length=params.max_completion_length - len(before))
            [later], _ = sample(policy, [[*prompts[number - first], *before]], 1, room, 1)
            completions[number] = Completion([*before, *later.ids], None, None, later.finish)
            turns.end(number, completions[number])


def _cut(ids: list[int], finish_of: Callable[[list[int]], str | None]) -> Completion:
    """A row of `generate` up to the token that ends it, without the padding behind."""
    for length in range(1, len(ids) + 1):
        finish = finish_of(ids[:length])
        if finish is not None:
            return Completion(ids[:length], None, None, finish)
    return Completion(ids, None, None, "length")


def _generate(policy: Policy, rows: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Each row's new tokens by one call of `generate`, padded where a row ended before the others.

    Stop strings are looked for by ending(), which also cuts the rows: generate's own criterion finds some that the
    decoded text does not show, and the padding after them would be taken for sampled tokens.
    """
    finish_of = ending(policy, params)

    def at_stop_string(ids: Tensor, _: Any) -> Tensor:
        return torch.tensor([finish_of(row) == "stop" for row in ids[:, width:].tolist()], device=ids.device)

    def checked(ids: Tensor, logits: Tensor) -> Tensor:
        if not logits.amax(-1).isfinite().all():  # of which multinomial makes an error that a GPU does not survive
            raise NotFiniteError(NOT_FINITE)
        return logits

    criteria = StoppingCriteriaList([at_stop_string] if params.stop_strings else [])
    width = max(map(len, rows))
    ids = torch.tensor([[policy.pad_token_id] * (width - len(row)) + row for row in rows], device=policy.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=policy.device)
    try:
        with as_torch_says_it():
            out = policy.base.generate(
                input_ids=ids, attention_mask=mask, stopping_criteria=criteria,
                logits_processor=LogitsProcessorList([checked]),
            )  # fmt: skip
    except (torch.OutOfMemoryError, NotFiniteError):
        raise
    except Exception as error:  # of a family's own code, as xLSTM's, whose states have other sizes than its layers
        raise InputError(
            f"transformers' generate, which samples from {type(policy.base).__name__}, fails: {in_a_line(error)}; name "
            "another model"
        ) from error
    return out[:, width:].tolist()


@contextlib.contextmanager
def _prepared(policy: Policy, params: SamplingParams) -> Iterator[None]:
    """Run `generate` without the model's own generation config, and with contiguous inputs of the head.

    It fills whatever a call leaves open from the model's generation config (top_k 20, top_p 0.8 and a repetition
    penalty of 1.05 in Qwen2.5, for example), so the model's is replaced for the while. And it gives the head a strided
    slice, for which a CPU copies the whole bf16 head once a row (2 GB for 8 rows of a vocabulary of 151,936).
    """
    model = policy.base
    own = model.generation_config
    model.generation_config = generation_config(policy, params)
    contiguous = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    try:
        yield
    finally:
        contiguous.remove()
        model.generation_config = own


def generation_config(policy: Policy, params: SamplingParams) -> GenerationConfig:
    """Every sampling setting but the stop strings, so that no default fills a gap."""
    choice = {"do_sample": False}
    if not params.greedy:
        choice = {
            "do_sample": True, "temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p,
            "min_p": params.min_p,
        }  # fmt: skip
    return GenerationConfig(
        **choice, max_new_tokens=params.max_completion_length, repetition_penalty=params.repetition_penalty,
        eos_token_id=policy.eos_token_ids, pad_token_id=policy.pad_token_id, use_cache=True,
    )  # fmt: skip
