"""Sizes in bytes, as people write and read them: `2MiB`, `1.5 GiB`."""

from __future__ import annotations

import math
import re
from typing import Final

from meshwright.errors import UsageError

__all__ = ["bytes_text", "parse_bytes"]

_BINARY: Final = ("KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL: Final = ("kB", "MB", "GB", "TB", "PB")
_UNITS: Final = {
    "": 1,
    "b": 1,
    **{unit.lower(): 1024**power for power, unit in enumerate(_BINARY, 1)},
    **{unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL, 1)},
}
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str | int, what: str = "a size") -> int:
    """The bytes that a size names: a whole number, or a number and a unit.

    >>> parse_bytes("2MiB"), parse_bytes("1.5 GB"), parse_bytes(512)
    (2097152, 1500000000, 512)

    Raises:
        UsageError: it is no size; `what` says of what.
    """
    match = _SIZE.fullmatch(str(text).strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{what} takes bytes, as in 512KiB, 2MiB or 1.5GiB, not {text!r}")
    return int(float(match[1]) * unit)


def bytes_text(size: float) -> str:
    """`size` bytes with one decimal, as in `1.5 MiB`; below 1 KiB whole bytes.

    >>> bytes_text(512), bytes_text(1536), bytes_text(3 * 2**30)
    ('512 B', '1.5 KiB', '3.0 GiB')
    """
    if size < 1024:
        return f"{size:.0f} B"
    power = min(int(math.log2(size) // 10), len(_BINARY))
    if power < len(_BINARY) and round(size / 1024**power, 1) >= 1024:
        power += 1
    return f"{size / 1024**power:,.1f} {_BINARY[power - 1]}"
