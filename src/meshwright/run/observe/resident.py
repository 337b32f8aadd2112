"""What this process holds in memory, as the kernel and malloc tell it."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Resident", "fields", "forget_peak", "give_back", "resident", "settled"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_PEAK_ONLY = "5"  # of clear_refs: only the most that was resident begins anew


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes of memory that a process has touched and not given back.

    Attributes:
        private: of its own.
        shared: with other processes: what collectives pass through, the host tier.
        peak: the most of both at once; code that is mapped from files is left out.
    """

    private: int
    shared: int
    peak: int


def resident() -> Resident | None:
    """Of this process, now; None where the system does not tell."""
    found = fields()
    if not {"RssAnon", "RssShmem", "RssFile", "VmHWM"} <= found.keys():
        return None
    private, shared = found["RssAnon"], found["RssShmem"]
    return Resident(private, shared, max(found["VmHWM"] - found["RssFile"], private + shared))


def fields() -> dict[str, int]:
    """Bytes by the kernel's names, as `VmData`."""
    found: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in _STATUS.read_text().splitlines():
            name, _, rest = line.partition(":")
            if rest.endswith(" kB"):
                found[name] = int(rest[:-3]) * 1024
    return found


def forget_peak() -> bool:
    """Let the peak begin anew from what is resident now; whether the system does that."""
    with suppress(OSError):
        _CLEAR.write_text(_PEAK_ONLY)
        return True
    return False


def give_back() -> None:
    """Give the kernel the pages that malloc has and nobody uses, where malloc can."""
    if (trim := _trim()) is not None:
        trim(0)


def settled() -> int:
    """Bytes of its own that this process uses, after what it does not is given back; 0: unknown."""
    give_back()
    found = resident()
    return 0 if found is None else found.private


@cache
def _trim() -> Callable[[int], int] | None:
    """Of glibc."""
    if platform.libc_ver()[0] != "glibc":
        return None
    function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    return function
