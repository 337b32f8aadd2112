"""Names that differ in numbers only, as one: `blocks.*.up.weight` for those of all layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

__all__ = ["folded", "folded_name", "pattern_of"]


def pattern_of(name: str) -> str:
    """The name with its numbers left open.

    >>> pattern_of("blocks.3.attn.q.weight")
    'blocks.*.attn.q.weight'
    """
    return ".".join("*" if word.isdecimal() else word for word in name.split("."))


def folded(names: Iterable[str], others: Iterable[str] = ()) -> str:
    """One name for `names`, which differ in numbers only.

    `*` stands for every number there is; where `others` have the same pattern, and are not meant,
    the numbers are written out.

    >>> folded(["blocks.0.up", "blocks.1.up"])
    'blocks.*.up'
    >>> folded(["blocks.0.up", "blocks.1.up"], others=["blocks.2.up"])
    'blocks.0–1.up'
    """
    names = list(dict.fromkeys(names))
    if len(names) == 1:
        return names[0]
    pattern = pattern_of(names[0])
    if any(pattern_of(name) == pattern for name in set(others).difference(names)):
        return folded_name([tuple(name.split(".")) for name in names])
    return pattern


def folded_name(paths: Sequence[tuple[str, ...]]) -> str:
    """One name for modules that differ in numbers only, the numbers written out.

    >>> folded_name([("blocks", "0", "attn"), ("blocks", "1", "attn")])
    'blocks.0–1.attn'
    """
    columns = [list(dict.fromkeys(column)) for column in zip(*paths, strict=True)]
    ranges = [_range(column) for column in columns]
    # A range in two places stands for every pair; where some are missing only `*` is true.
    whole = prod(len(column) for column in columns) == len(paths)
    words = [r if len(c) == 1 or whole else "*" for r, c in zip(ranges, columns, strict=True)]
    return ".".join(words) or "(the model itself)"


def _range(words: Sequence[str]) -> str:
    if len(words) == 1:
        return words[0]
    numbers = sorted(int(word) for word in words)
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}"
    return "{" + ",".join(str(number) for number in numbers) + "}"
