"""JSON files of others: settings that have the type they must. ValueError names file, key, value, rule."""

import json
import reprlib
from pathlib import Path
from typing import Any

MAX_WHOLE = 2**31 - 1
MAX_NUMBER = 1e15  # the largest published is a rotary base of 4e9
_RULES = {
    int: f"a positive whole number up to {MAX_WHOLE}",
    float: f"a positive number up to {MAX_NUMBER:.0e}",
    bool: "true or false",
    dict: "an object",
}


def read(file: Path) -> dict[str, Any]:
    """The object in a file."""
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold an object, not a {type(found).__name__}")
    return found


def value(said: dict[str, Any], name: str, kind: type, file: Path) -> Any:
    """said[name], which must be there: a positive int or float (1 or 1.0 is either), a bool, a dict."""
    if name not in said:
        raise ValueError(f"{file} lacks {name}")
    found = said[name]
    fits = type(found) is kind or (kind is float and type(found) is int)
    fits = fits or (kind is int and type(found) is float and found.is_integer())
    if fits and kind in (int, float):
        fits = 0 < found <= (MAX_WHOLE if kind is int else MAX_NUMBER)  # NaN is not
    if not fits:
        raise ValueError(f"{file}: {name}={shown(found)} must be {_RULES[kind]}")
    return kind(found)


def _short() -> reprlib.Repr:
    """Nesting can be deeper than repr goes, and a list longer than a line."""
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist = 3, 8, 8
    short.maxstring = short.maxlong = short.maxother = 80
    return short


shown = _short().repr
