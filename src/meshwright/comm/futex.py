"""Sleeping on a word of shared memory until another process says so (futex, through ctypes).

A word is 1 while its owner sleeps or is about to. Whoever has published something looks at the
words of those that may wait for it, and only then pays for a system call.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import threading

__all__ = ["fence", "problem", "wait", "wake"]

_FUTEX = 202  # the system call's number on x86-64
_WAIT, _WAKE = 0, 1  # without FUTEX_PRIVATE_FLAG: the word is shared between processes
_SLICE = 0.025
_lock = threading.Lock()


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_UNTIL = ctypes.byref(_Timespec(0, int(_SLICE * 1e9)))
if _LIBC is not None:
    _LIBC.syscall.restype = ctypes.c_long
    _LIBC.syscall.argtypes = [
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_void_p,
    ]


def problem() -> str | None:
    """Why this machine cannot be served, or None.

    Counters are published by plain stores, in an order that x86-64 keeps and other processors do
    not.
    """
    if sys.platform != "linux":
        return f"shared memory collectives need Linux, and this is {sys.platform}"
    machine = platform.machine()
    if machine != "x86_64":
        return f"shared memory collectives rely on x86-64's memory order, and this is {machine}"
    return None


def fence() -> None:
    """Make earlier stores visible before any later load: an uncontended lock is a locked cycle."""
    _lock.acquire()
    _lock.release()


def wait(address: int, value: int) -> None:
    """Sleep while the 32-bit word at `address` is `value`: until woken, a signal, or 25 ms."""
    assert _LIBC is not None
    _LIBC.syscall(_FUTEX, address, _WAIT, value, _UNTIL)


def wake(address: int) -> None:
    """Wake whoever sleeps on the word at `address`."""
    assert _LIBC is not None
    _LIBC.syscall(_FUTEX, address, _WAKE, 1, None)
