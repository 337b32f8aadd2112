"""Memory that a step frees stays with the process, for the next step to take.

glibc gives large blocks back to the kernel as they are freed, and every page of the next one is a
fault: 5,000 to 16,000 a step of a 10M GPT, 8 to 27 ms of CPU time of 430.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from functools import cache

__all__ = ["keep_freed_memory"]

# Of malloc.h: the parameter, and what it is set to. Blocks above the largest threshold there is
# are still mapped one by one.
_TRIM, _PAD, _MAPPED = -1, -2, -3
_SETTINGS = ((_MAPPED, 32 << 20), (_TRIM, 2**31 - 1), (_PAD, 64 << 20))


@cache
def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed; whether it does.

    It is left alone where the user set it up in the environment, and elsewhere than on glibc.
    """
    if platform.libc_ver()[0] != "glibc" or _set_up(os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(parameter, value) == 1 for parameter, value in _SETTINGS]
    return all(taken)


def _set_up(environ: Mapping[str, str]) -> bool:
    return "glibc.malloc" in environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") and name.endswith("_") for name in environ
    )
