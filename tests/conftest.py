import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network

import pytest
from tiny_models import DEMO_MODEL, FAMILIES
from transformers import AutoTokenizer


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)
