"""Digests of what a checkpoint holds, one per chunk: damage is found where it is.

They are for accidents: a bit that flipped, a block that went astray. XXH3 keeps pace with memory,
but is of the optional package xxhash; where that is missing CRC-32 of the standard library is
written instead (docs/decisions/0021-asynchronous-saves.md). Each file says which it has.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping

from meshwright.errors import StorageError

__all__ = ["CHUNK", "KINDS", "chunks_of", "digest", "preferred", "usable"]

CHUNK = 1 << 20
"""Bytes that share a digest; the last chunk of a piece may be shorter."""

KINDS: Mapping[str, int] = {"xxh3-128": 32, "crc32": 8}
"""Digests by name, and their hexadecimal digits."""

_Data = memoryview | bytes


def _crc32(data: _Data) -> str:
    return f"{zlib.crc32(data):08x}"


def _found() -> Mapping[str, Callable[[_Data], str]]:
    try:
        from xxhash import xxh3_128_hexdigest
    except ImportError:  # the extra `fast` is not installed
        return {"crc32": _crc32}
    return {"xxh3-128": xxh3_128_hexdigest, "crc32": _crc32}


_FUNCTIONS = _found()


def preferred() -> str:
    """The fastest digest that this process has."""
    return next(kind for kind in KINDS if kind in _FUNCTIONS)


def usable(kind: str) -> Callable[[_Data], str]:
    """The function of a digest.

    Raises:
        StorageError: the package that has it is missing.
    """
    if kind not in _FUNCTIONS:
        raise StorageError(
            f"its digests are {kind}, which this Python does not have: pip install xxhash"
        )
    return _FUNCTIONS[kind]


def digest(kind: str, data: _Data) -> str:
    """The digest of some bytes, in hexadecimal digits."""
    return usable(kind)(data)


def chunks_of(size: int) -> Iterator[tuple[int, int]]:
    """Where the chunks of `size` bytes begin and end."""
    for begin in range(0, size, CHUNK):
        yield begin, min(begin + CHUNK, size)
