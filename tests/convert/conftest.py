"""Where a conversion goes, and a small checkpoint of Meta's."""

import numpy as np
import pytest

from benchmarks import synthetic
from tests.convert.small import MODEL


@pytest.fixture
def to(tmp_path):
    return tmp_path / "to"


@pytest.fixture
def meta(tmp_path):
    synthetic.write(tmp_path / "meta", MODEL, 2, np.dtype(np.float32))
    return tmp_path / "meta"
