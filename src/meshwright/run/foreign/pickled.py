"""Pickles written as text, opcode by opcode, for formats of others that are made of them.

Protocol 2, as torch writes it. No object is pickled: what is not plain is a `Made`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from meshwright.run.foreign.symbols import Global, Made, Persistent

__all__ = ["pickled"]


def pickled(value: Any) -> bytes:
    """A pickle of `value`: None, bools, numbers, texts, lists, tuples, dicts and symbols."""
    return b"".join([b"\x80\x02", *_ops(value), b"."])


def _ops(value: Any) -> Iterator[bytes]:
    match value:
        case None:
            yield b"N"
        case bool():
            yield b"\x88" if value else b"\x89"
        case int():
            yield _int(value)
        case float():
            yield b"G" + struct.pack(">d", value)
        case str():
            yield _text(value)
        case list():
            yield from (b"]", b"(", *_all(value), b"e")
        case tuple():
            yield from (b"(", *_all(value), b"t")
        case dict():
            yield b"}"
            yield from _set(value)
        case _:
            yield from _symbol(value)


def _symbol(value: Any) -> Iterator[bytes]:
    match value:
        case Global():
            yield f"c{value.module}\n{value.name}\n".encode()
        case Persistent():
            yield from (*_ops(value.key), b"Q")
        case Made():
            yield from _made(value)
        case _:
            raise AssertionError(f"no symbol: {type(value).__name__}")


def _made(value: Made) -> Iterator[bytes]:
    yield from (*_ops(value.maker), *_ops(value.args), b"\x81" if value.new else b"R")
    if value.items:
        yield from (b"(", *_all(value.items), b"e")
    yield from _set(value.pairs)
    if value.state is not None:
        yield from (*_ops(value.state), b"b")


def _set(pairs: dict[Any, Any]) -> Iterator[bytes]:
    if pairs:
        yield b"("
        for key, value in pairs.items():
            yield from _ops(key)
            yield from _ops(value)
        yield b"u"


def _all(values: Any) -> Iterator[bytes]:
    for value in values:
        yield from _ops(value)


def _int(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data
