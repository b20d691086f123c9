import dataclasses

import pytest

from tests.conftest import MODEL


@pytest.fixture
def model():
    """With a token for every byte."""
    return dataclasses.replace(MODEL, vocab_size=260, kv_heads=2)
