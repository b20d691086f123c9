"""What the data tests share."""

import pytest

from llama_jax.data import prepare
from tests.data.small import data_of, files, quiet, write_texts


@pytest.fixture
def two_sources(tmp_path):
    """(data, prepared): "long" has several times the rows of "short", whose weight is 3 to 1."""
    data = data_of(
        tmp_path,
        files(write_texts(tmp_path / "long", 26, seed=1, lines=20), "long", weight=1.0),
        files(write_texts(tmp_path / "short", 5, seed=2), "short", weight=3.0),
        seed=5,
    )
    return data, prepare.prepare(data, 259, quiet)
