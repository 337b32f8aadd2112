"""Names in a folder of checkpoints, and which of them a new one makes superfluous. Pure.

step-00000020            a checkpoint
step-00000020.replaced   one of a step that is being saved again; counts until the new one is in
.step-00000020.tmp-9f3c  being written; .old-9f3c: being removed. No reader looks at these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["Saved", "doomed", "is_leftover", "listed", "replaced_name", "step_name", "step_of"]

_FEWEST = 2  # the newest might turn out damaged when it is needed

_SAVED = re.compile(r"step-([0-9]{8,18})(\.replaced)?", re.ASCII)
_LEFTOVER = re.compile(r"\.step-[0-9]{8,18}\.(tmp|old)-[0-9a-f]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint's folder name and the step it is of."""

    step: int
    name: str


def step_name(step: int) -> str:
    """The folder of the checkpoint of `step`."""
    return f"step-{step:08d}"


def replaced_name(step: int) -> str:
    """The folder to which the checkpoint of `step` moves while it is saved again."""
    return f"{step_name(step)}.replaced"


def step_of(name: str) -> int | None:
    """The step that a folder name tells, or None where it is no checkpoint's name."""
    match = _SAVED.fullmatch(name)
    return int(match[1]) if match else None


def is_leftover(name: str) -> bool:
    """Whether a save or removal that was cut short left this."""
    return _LEFTOVER.fullmatch(name) is not None


def listed(names: Iterable[str]) -> list[Saved]:
    """The checkpoints among `names`, newest first; a replaced one after what replaces it."""
    found = [Saved(step, name) for name in names if (step := step_of(name)) is not None]
    return sorted(found, key=lambda saved: (-saved.step, saved.name))


def doomed(
    names: Iterable[str], saved: int, keep: int, sound: Callable[[str], bool]
) -> tuple[str, ...]:
    """What may be removed once the checkpoint of step `saved` is in: all older than the kept.

    Kept are the newest `keep` that are `sound`, two at the least. Later steps than `saved` belong
    to a run that was given up; whoever gave it up may want them, so they stay, uncounted.
    """
    past = [one for one in listed(names) if one.step <= saved]
    kept = 0
    for index, one in enumerate(past):
        if kept == max(keep, _FEWEST):
            return tuple(old.name for old in past[index:])
        kept += sound(one.name)
    return ()
