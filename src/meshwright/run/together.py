"""An effect that every rank tries, and whose failures every rank learns of."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator
from typing import Any

from meshwright.comm.base import Group, gather_json
from meshwright.errors import MeshwrightError, StorageError

__all__ = ["failure", "together", "try_together"]

_REMEDIES = {
    errno.ENOSPC: "free space on that disk, or keep fewer checkpoints",
    errno.EDQUOT: "free space under your quota, or keep fewer checkpoints",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on a disk that can be written to",
    errno.ENOENT: "every host must see this folder: put it on a shared file system",
}


def try_together(
    act: Callable[[], Any], group: Group, label: str
) -> Generator[Any, Any, tuple[list[Any], list[str]]]:
    """Every member's JSON-able answer to its `act`, in group order, and what failed where.

    An error of storage or memory is an answer too, so nobody waits for a rank that failed.
    """
    try:
        mine = {"value": act(), "error": ""}
    except MeshwrightError as error:
        mine = {"value": None, "error": str(error)}
    except (OSError, MemoryError) as error:
        mine = {"value": None, "error": _told(error)}
    answers = yield from gather_json(mine, group, label)
    errors = [
        f"rank {rank}: {answer['error']}"
        for rank, answer in zip(group.ranks, answers, strict=True)
        if answer["error"]
    ]
    return [answer["value"] for answer in answers], errors


def together(act: Callable[[], Any], group: Group, label: str) -> Generator[Any, Any, list[Any]]:
    """Every member's JSON-able answer to its `act`, in group order.

    Raises:
        StorageError: on all members, if any failed; says on which and why.
    """
    values, errors = yield from try_together(act, group, label)
    if errors:
        raise StorageError(failure(label, errors))
    return values


def failure(label: str, errors: list[str]) -> str:
    """What failed on which ranks, in short."""
    more = f" (and {len(errors) - 3} more ranks)" if len(errors) > 3 else ""
    return f"{label} failed: " + "; ".join(errors[:3]) + more


def _told(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "out of memory"
    name = f"{error.filename}: " if error.filename is not None else ""
    number = error.errno or 0
    text = error.strerror or os.strerror(number)
    remedy = _REMEDIES.get(number)
    return f"{name}{text}; {remedy}" if remedy else f"{name}{text}"
