"""What the kernel tells about memory: has it killed a process of this control group?"""

from __future__ import annotations

from pathlib import Path

__all__ = ["oom_kills"]

_COUNTERS = (
    Path("/sys/fs/cgroup/memory.events"),
    Path("/sys/fs/cgroup/memory/memory.oom_control"),
)


def oom_kills() -> int:
    """How many processes the kernel has killed here for want of memory; 0 where it does not say."""
    for path in _COUNTERS:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.isdigit():
                return int(count)
    return 0
