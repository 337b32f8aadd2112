"""No orphans: a process asks the kernel to end it when its parent ends (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["die_with_parent"]

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel send this process SIGKILL when its parent ends; elsewhere than Linux, nothing.

    Safe between fork and exec: the library is loaded when this module is.

    Args:
        parent: the parent's process id, if known: when it has ended already, so does this process.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
