"""One exception tree, split by who must act; each class carries the process's exit status.

    MeshwrightError
    ├── UsageError           2   the command line, a configuration or a name is wrong
    │   └── PlanError        2   the plan cannot be laid over this world, model or batch
    ├── InternalError       70   a bug of ours
    ├── UserCodeError       71   the user's model, loss, data or optimizer
    │   └── NotTraceable    71   the model cannot be traced; `--eager` runs it
    ├── OutOfMemory         72
    ├── Stalled             73   a wait passed its deadline
    ├── StorageError        74   a checkpoint, a weights folder, a disk
    ├── PeerLost            75   another rank died or left; a retry makes sense
    └── VerificationFailed  76   numbers differ from one device's

A message names the thing, its value, the rule and the remedy.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "InternalError",
    "MeshwrightError",
    "NotTraceable",
    "OutOfMemory",
    "PeerLost",
    "PlanError",
    "Stalled",
    "StorageError",
    "UsageError",
    "UserCodeError",
    "VerificationFailed",
    "nearest",
]


class MeshwrightError(Exception):
    """Base of all errors that Meshwright raises on purpose."""

    exit_status: ClassVar[int] = 70


class UsageError(MeshwrightError):
    """The user asked for something that cannot be: a flag, a key, a file, a name."""

    exit_status = 2


class PlanError(UsageError):
    """The plan does not fit the world, the model or the batch."""


class InternalError(MeshwrightError):
    """A bug of ours."""

    exit_status = 70


class UserCodeError(MeshwrightError):
    """The user's model, loss, data or optimizer raised or returned what it must not."""

    exit_status = 71


class NotTraceable(UserCodeError):
    """The user's model cannot be traced into a program."""


class OutOfMemory(MeshwrightError):
    """A rank ran out of memory."""

    exit_status = 72


class Stalled(MeshwrightError):
    """A wait passed its deadline."""

    exit_status = 73


class StorageError(MeshwrightError):
    """A checkpoint or weights file is missing, damaged or cannot be written."""

    exit_status = 74


class PeerLost(MeshwrightError):
    """Another rank died or closed its connection; starting again makes sense."""

    exit_status = 75


class VerificationFailed(MeshwrightError):
    """The plan's numbers differ from one device's."""

    exit_status = 76


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """A sentence naming the known name closest to `name`, or the known names."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))
