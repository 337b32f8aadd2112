"""Rows of a product of factors in which every two values stand together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product

__all__ = ["cover", "pairs"]

Row = tuple[str, ...]


def pairs(row: Row) -> frozenset[tuple[int, str, int, str]]:
    """Every two values of a row, with the places of their factors."""
    return frozenset((i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2))


def cover(factors: Sequence[Sequence[str]]) -> tuple[Row, ...]:
    """Few rows that hold every pair: the one with most new, again and again."""
    left = {row: pairs(row) for row in product(*factors)}
    wanted = set[tuple[int, str, int, str]]().union(*left.values())
    found: list[Row] = []
    while wanted:
        best = _most(left.items(), wanted)
        found.append(best)
        wanted -= left.pop(best)
    return tuple(found)


def _most(
    rows: Iterable[tuple[Row, frozenset[tuple[int, str, int, str]]]],
    wanted: set[tuple[int, str, int, str]],
) -> Row:
    return max(rows, key=lambda item: len(item[1] & wanted))[0]
