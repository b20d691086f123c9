"""What tests of checkpoints that are refused share."""

import json
from pathlib import Path

import pytest

from tests.convert import small

GATE = "model.layers.1.mlp.gate_proj.weight"
WQ = "layers.1.attention.wq.weight"
NUMBER, WHOLE = "must be a positive number up to 1e+15", "must be a positive whole number up to"
DEEP = '{"a":' * 100_000  # json's scanner calls itself


def refused(came: Path, to: Path, *words: str, kind: str = "native", dtype=None) -> str:
    """The message of the refusal, which must have all the words; nothing may be written."""
    with pytest.raises(ValueError, match=r".") as error:
        small.convert(came, to, kind, dtype)
    small.assert_nothing_written(to)
    message = str(error.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message
    return message


def nested(depth: int) -> list:
    """A list that json reads, but whose repr fails or fills pages."""
    return json.loads("[" * depth + "]" * depth)
