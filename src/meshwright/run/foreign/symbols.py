"""What a pickle says, as values: `Global`s are names, `Made`s are calls that nobody makes.

A pickle is a program. Its reader here (`unpickled`) and its writer (`pickled`) treat it as text:
nothing that it names is imported, nothing that it calls is called.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Global", "Made", "Persistent"]


@dataclass(frozen=True, slots=True)
class Global:
    """A function or class that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Made:
    """What a call of `maker` would return, and what is then put into it.

    Attributes:
        maker: what would be called.
        args: with what.
        new: whether `maker` is a class whose `__new__` alone would be called.
        state: what `__setstate__` would be given.
        items: what would be appended or added.
        pairs: what would be set by key.
    """

    maker: Global
    args: tuple[Any, ...] = ()
    new: bool = False
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """What lies outside of the pickle, by its identity."""

    key: Any
