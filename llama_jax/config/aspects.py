"""Whether a setting says what is computed, how, or where something lies.

A run may go on with others of the last two. What lies somewhere is compared by what it is: text by the
fingerprint that checkpoints keep, weights by train.init_checksum.
"""

import dataclasses
from typing import Any

ASPECT = "aspect"
WHAT, HOW, WHERE = "what", "how", "where"


def how(default: Any) -> Any:
    """A field that says how a run is carried out; of a whole part, all of its fields do."""
    return dataclasses.field(default=default, metadata={ASPECT: HOW})


def where(default: Any) -> Any:
    """A field that says where something lies."""
    return dataclasses.field(default=default, metadata={ASPECT: WHERE})
