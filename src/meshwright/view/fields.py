"""Reading single values out of decoded JSON: of the wanted type, or nothing.

A report is written after a crash too, from files of an older or newer version: a value that is
missing or of another type leaves its place on the page empty and never stops the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["finite", "integer", "mapping", "mappings", "numbers", "shape", "text"]


def finite(value: Any) -> float | None:
    """`value` as a finite float, or None (also for booleans, text, infinities and NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def integer(value: Any, default: int = 0) -> int:
    """`value` as an int, or `default`."""
    number = finite(value)
    return default if number is None else int(number)


def text(value: Any, default: str = "") -> str:
    """`value` if it is text, a number as text, else `default`."""
    if isinstance(value, str):
        return value
    return default if finite(value) is None else f"{value}"


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The objects in the list `value`."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return ()
    return tuple(item for item in value if isinstance(item, Mapping))


def numbers(value: Any) -> tuple[tuple[str, float], ...]:
    """The (name, finite number) pairs of the object `value`, in its order."""
    pairs = ((name, finite(number)) for name, number in mapping(value).items())
    return tuple((name, number) for name, number in pairs if number is not None)


def shape(value: Any) -> tuple[int, ...]:
    """A list of sizes as a tuple; anything else is the empty shape."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return ()
    return tuple(integer(size) for size in value)
