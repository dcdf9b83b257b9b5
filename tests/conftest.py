import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other

import torch

if not torch.cuda.is_available():  # kernels run in the interpreter, which Triton decides on as it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from tiny_models import DEMO_MODEL, FAMILIES
from transformers import AutoTokenizer


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)
