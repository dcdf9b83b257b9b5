"""Each model type of the matrix is served as its row says, or refused in one sentence; no traceback escapes."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from model_matrix import FAMILIES, INSTALLED, ROWS, Row
from packaging.version import Version
from test_generate import as_prompts
from tiny_models import make_policy
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.model.adapters import lora_config
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.planner import trace
from lowmem_grpo.planner.plan import forecast

ROOT = Path(__file__).parents[1]
IDS = [[20, 21, 22, 23, 24, 25], [40, 41]]
FIRST = {family[0].name for family in FAMILIES.values()}  # the others are tried by the slow tests


def marks(row: Row) -> list[pytest.MarkDecorator]:
    too_old = pytest.mark.skipif(Version(row.since) > INSTALLED, reason=f"of transformers {row.since}")
    return [too_old] if row.name in FIRST else [too_old, pytest.mark.slow]


every_row = pytest.mark.parametrize("row", [pytest.param(row, id=name, marks=marks(row)) for name, row in ROWS.items()])
short = GRPOConfig(use_cpu=True, max_prompt_length=64, max_completion_length=64, token_budget=512)


def random_model(row: Row) -> Any:
    """A random model of a row, fp32, whose log-probabilities are far from uniform."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(row.config(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 or not parameter.any():  # as ZAYA's keys are multiplied by 0 at first
                parameter.normal_(std=0.15)
    return model.eval()


def reason(caught: list[warnings.WarningMessage], words: str) -> str:
    """What follows these words in the last warning that has them, or nothing."""
    found = [re.search(f"{words}.*: (.*)", str(one.message)) for one in caught]
    return next((match.group(1) for match in reversed(found) if match), "")


def batches(policy: Policy, completions: list[list[int]], padding_free: bool) -> list[Any]:
    return list(
        pack(
            IDS, completions, num_generations=2, token_budget=1000, pad_token_id=policy.pad_token_id,
            device=policy.device, padding_free=padding_free,
        )
    )  # fmt: skip


def logprobs(policy: Policy, completions: list[list[int]], padding_free: bool) -> torch.Tensor:
    """Log-probabilities of all completions' tokens in a training forward, with their gradient."""
    found = torch.full((sum(map(len, completions)),), torch.nan)
    for batch in batches(policy, completions, padding_free):
        found = found.index_put((batch.token_index,), policy.logprobs(batch, 1.0))
    return found


def leave_bare_what_does_not_learn(policy: Policy) -> set[str]:
    """Set adapters that training passes by to zero, as they stay in a run; the names of their layers."""
    logprobs(policy, [[5, 6]] * 4, False).sum().backward()
    bare = set()
    with torch.no_grad():
        for name, parameter in policy.parameters_of(policy.adapter).items():
            if parameter.grad is None:
                parameter.zero_()
                bare.add(name.partition(".lora_")[0].rpartition(".")[2])
    return bare


def left_dense(model: PreTrainedModel) -> list[str]:
    """Linear layers and experts of a model, which was loaded in 4 bits, that are not."""
    head = model.get_output_embeddings()
    linears = [
        path.removesuffix(".base_layer")
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not head and "lora_" not in path
    ]
    experts = [
        path
        for path, parameter in model.named_parameters()
        if parameter.dim() == 3 and min(parameter.shape) > 1 and parameter.is_floating_point() and "conv" not in path
    ]
    return linears + experts


def as_told(words: str, found: str) -> bool:
    """Whether a reason is the expected one, or there is none and none is expected."""
    return words in found if words else found == ""


@every_row
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_served_as_its_row_says(row):
    model = random_model(row)
    settings: Any = dict(load_in_4bit=False, max_completion_length=4, rollout_weights="4bit")
    if row.refused:
        with pytest.raises(InputError, match=row.refused):
            make_policy(model, **settings)
        return
    policy = make_policy(model, **settings)
    assert leave_bare_what_does_not_learn(policy) == set(row.bare)
    sampler = Sampler(policy, GRPOConfig(max_completion_length=4, use_cpu=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        packs = policy.packs
        refusal = sampler.engine_refusal or ""
    padded = reason(caught, "is trained on padded rows")
    assert packs == (not padded) and as_told(row.padded, padded), padded
    assert as_told(row.generates, refusal), refusal
    torch.manual_seed(0)
    completions = sampler.complete(as_prompts(IDS), 2).completions
    ids = [completion.ids for completion in completions]
    for padding_free in [False, True] if packs else [False]:
        trained = logprobs(policy, ids, padding_free)
        if not refusal:
            sampled = torch.cat([completion.logprobs for completion in completions])
            assert (sampled - trained).abs().max() < 1e-5
    policy.model.zero_grad()
    trained.sum().backward()
    gradients = [parameter.grad for parameter in policy.parameters_of(policy.adapter).values()]
    assert any(g is not None and g.count_nonzero() for g in gradients)
    assert all(g is None or g.isfinite().all() for g in gradients)


@every_row
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_in_4_bits_is_what_the_row_says(row):
    if row.refused:
        with pytest.raises(InputError, match=row.refused):
            make_policy(random_model(row), bf16=True)
        return
    policy = make_policy(random_model(row), bf16=True)
    assert {path.rpartition(".")[2] for path in left_dense(policy.base)} == set(row.dense)
    assert logprobs(policy, [[5, 6]] * 4, False).isfinite().all()


@every_row
@pytest.mark.filterwarnings("ignore")
def test_the_planner_expects_of_a_model_what_its_row_says(row):
    if row.refused or row.unplanned:
        pytest.skip("it has no plan")
    config = row.config()
    whole = trace.skeleton(trace.Key(config, lora_config(short)), "float32", False, True)
    assert bool(trace._shapes(whole, short.compute_dtype)[0]) == bool(row.padded or row.generates) - row.unforeseen


@pytest.mark.slow
@every_row
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_planned_or_refused_in_one_sentence(row):
    try:
        found = forecast(copy.deepcopy(row.config()), short)
    except InputError as error:
        assert "\n" not in str(error) and row.unplanned in str(error)
    else:
        assert found.peak() > 0 and not row.unplanned


@pytest.mark.parametrize("page", ["README.md", "docs/status.md", "CHANGELOG.md"])
def test_pages_say_how_many_model_types_are_tried(page):
    kinds = {row.kind for row in ROWS.values()}
    assert f"{len(kinds)} model types" in (ROOT / page).read_text("utf-8")
