import gc
import hashlib
import json
import os
import signal
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, before full_determinism is tested on a GPU

import torch

if not torch.cuda.is_available():  # kernels run in the interpreter, which Triton decides on as it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import jinja2
import pytest
from tiny_models import DEMO_MODEL, FAMILIES, compute_in_fp64, head_by_definition, make_policy
from transformers import AutoTokenizer

from lowmem_grpo.config.losses import LOSS_TYPES
from lowmem_grpo.config.sections import AdapterFields, ModelFields
from lowmem_grpo.generate import engine
from lowmem_grpo.inputs import training
from lowmem_grpo.model import load
from lowmem_grpo.model import policy as policy_module
from lowmem_grpo.objective.loss import LOSSES, register_objective

# Every saved adapter has a model card, of one template that huggingface_hub compiles each time: 13 CPU ms.
compiled: Any = lru_cache(maxsize=64)(jinja2.Environment.compile)
jinja2.Environment.compile = compiled

# Of the 20 files of a run that are to outlast a power cut, each is waited for: 4 ms, which no test sees the use of.
os.fsync = lambda descriptor: None


def pytest_collection_finish():
    """Leave what the imports made out of every garbage collection: a full one went over all of it, 250 CPU ms."""
    gc.freeze()


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


SHARED = Path(os.environ.get("LOWMEM_GRPO_SHARED", Path(__file__).parents[2] / "shared"))
GSM8K_ROWS = [  # in the form of the data set's, for where it is not at hand
    {"question": "?", "answer": f"so\n#### {number}"} for number in ("72", "1,000", "-3", "0", "12.5", "1,234,567")
]


@pytest.fixture(scope="session")
def gsm8k() -> list[str]:
    """Solutions of GSM8K, each with its answer behind ####; a few in their form where the data set is not at hand."""
    path = SHARED / "data/gsm8k/train.jsonl"
    rows = [json.loads(line) for line in path.open(encoding="utf-8")] if path.is_file() else GSM8K_ROWS
    return [row["answer"] for row in rows]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


SPOILED = {  # token losses (N,) by what is not finite
    "loss": lambda tokens: tokens.logprobs * torch.nan,
    "infinity": lambda tokens: tokens.logprobs.exp() + torch.inf,
    "gradient": lambda tokens: (tokens.logprobs - tokens.logprobs.detach()).abs().sqrt(),  # infinity times 0, at 0
    "norm": lambda tokens: tokens.logprobs * 1e25,  # every number is finite, its square is not
}


@pytest.fixture
def spoil(monkeypatch):
    """spoil(what, when): make loss_type "spoiled", which is spoiled in those optimizer steps; returns its count."""
    monkeypatch.setattr("lowmem_grpo.inputs.prompts.try_out_objective", lambda *_: None)  # which would count

    def register(what: str, when) -> list[int]:
        calls = [0]

        @register_objective("spoiled")
        def losses(tokens, config):
            calls[0] += 1
            return SPOILED[what](tokens) if when(calls[0]) else -tokens.advantages * tokens.logprobs

        return calls

    yield register
    del LOSS_TYPES["spoiled"], LOSSES["spoiled"]


@pytest.fixture
def poisoned_memory(monkeypatch):
    """What torch.empty hands out is NaN, or True, until somebody writes it."""
    for name, make in (("empty", torch.empty), ("empty_like", torch.empty_like)):

        def poisoned(*args, make=make, **kwargs):
            made = make(*args, **kwargs)
            if made.is_floating_point():
                return made.fill_(torch.nan)
            return made.fill_(True) if made.dtype == torch.bool else made

        monkeypatch.setattr(torch, name, poisoned)


PASSED: set[str] = set()  # trials, by all that they read
READ_TO_FIND = [field.name for section in (ModelFields, AdapterFields) for field in fields(section)]


@pytest.fixture
def known_trials(request, monkeypatch):
    """Try a model once in a session that a module's tests train many times: 0.4 of the 0.9 CPU s of a run of one step.

    The demo's model is found once, too. What fails is tried again, and so is what a test counts the products of.
    """
    if "run_with_memory" in request.fixturenames:
        return

    def once(module, name):
        own = getattr(module, name)

        def tried(policy, *of):
            key = f"{name} {[x.keywords if isinstance(x, partial) else x for x in of]} {_read_by_trials(policy)}"
            if key in PASSED:
                return None
            found = own(policy, *of)
            if found is None:
                PASSED.add(key)
            return found

        monkeypatch.setattr(module, name, tried)

    find = training.find_model

    def find_once(model, config, peft_config=None):
        key = f"find {model} {peft_config} {[getattr(config, name) for name in READ_TO_FIND]}"
        if model != str(DEMO_MODEL) or key not in PASSED:
            find(model, config, peft_config)
            PASSED.add(key)

    monkeypatch.setattr(training, "find_model", find_once)
    once(policy_module, "refused")
    once(engine, "refused")
    once(load, "refuse_untrainable")


def _read_by_trials(policy) -> str:
    """A hash of a policy's weights and modules, with all their simple settings."""
    found = hashlib.sha256(f"{policy.dtype} {policy.base.config} {policy.model.peft_config}".encode())
    for name, module in policy.model.named_modules():
        simple = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        found.update(f"{name} {type(module)} {type(module).forward} {simple}".encode())
    for name, tensor in policy.model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@pytest.fixture
def make_fp64_policy(monkeypatch, known_trials):
    """make_policy of a dense model, from its embedding to its loss in fp64: for claims that two ways are one sum."""

    def make(family, **settings):
        policy = make_policy(family, load_in_4bit=False, **settings)
        assert policy.packs
        compute_in_fp64(policy)
        monkeypatch.setattr("lowmem_grpo.model.policy.linear_logprobs", head_by_definition)
        torch.set_default_dtype(torch.float64)
        return policy

    yield make
    torch.set_default_dtype(torch.float32)
