"""Does this checkpoint belong to this model? Names, shapes and dtypes compared. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from meshwright.run.checkpoint.manifest import Entry

__all__ = ["Mismatch", "Wanted", "compare", "describe"]

# Looking for similar names is quadratic, and nobody reads more than a few.
_SUGGESTIONS = 20
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the model has under a name."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One difference between a checkpoint and a model."""

    kind: Literal["missing", "extra", "shape", "dtype"]
    name: str
    message: str


def compare(entries: Mapping[str, Entry], wanted: Mapping[str, Wanted]) -> tuple[Mismatch, ...]:
    """How the checkpoint's entries differ from what the model wants; empty where they agree.

    A name that only the model has is *missing*, one that only the checkpoint has is *extra*;
    a missing one names the extra one that is most like it, which is how renames are found.
    """
    missing = [name for name in wanted if name not in entries]
    extra = [name for name in entries if name not in wanted]
    return (
        *(_missing(name, extra if i < _SUGGESTIONS else ()) for i, name in enumerate(missing)),
        *(Mismatch("extra", n, f"{n} is in the checkpoint, not in the model") for n in extra),
        *(
            _differs(name, entries[name], wanted[name])
            for name in wanted
            if name in entries
            and (entries[name].dtype, entries[name].shape)
            != (wanted[name].dtype, wanted[name].shape)
        ),
    )


def describe(problems: Sequence[Mismatch], where: str) -> str:
    """The differences as text: a count, then the first few of them, one a line."""
    head = f"the checkpoint {where} is of another model: " + ", ".join(
        f"{count} {kind}"
        for kind in ("missing", "extra", "shape", "dtype")
        if (count := sum(problem.kind == kind for problem in problems))
    )
    lines = [f"  {problem.message}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  ... and {len(problems) - _SHOWN} more")
    return "\n".join([head, *lines])


def _missing(name: str, candidates: Sequence[str]) -> Mismatch:
    close = difflib.get_close_matches(name, candidates, n=1)
    hint = f"; the checkpoint has {close[0]}" if close else ""
    return Mismatch("missing", name, f"{name} is in the model, not in the checkpoint{hint}")


def _differs(name: str, entry: Entry, want: Wanted) -> Mismatch:
    if entry.shape != want.shape:
        text = f"{name} has shape {list(entry.shape)} in the checkpoint, {list(want.shape)} in"
        return Mismatch("shape", name, f"{text} the model")
    return Mismatch(
        "dtype", name, f"{name} is {entry.dtype} in the checkpoint, {want.dtype} in the model"
    )
