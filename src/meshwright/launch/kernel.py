"""What the kernel tells about memory: has it killed a process of this control group?"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from meshwright.plan.size import bytes_text

__all__ = ["bill_text", "oom_kills"]

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


def bill_text(run_dir: Path, rank: int) -> str:
    """What the plan of a run needs on a rank, by part, and how to find one that needs less."""
    with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        run = json.loads((run_dir / "run.json").read_text())
        entry = run["memory"][rank]
        parts = sorted({**entry["parts"], **entry["beside"]}.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts[:5] if size)
        return (
            f"plan {run['plan']} needs {bytes_text(entry['peak'])} there beside the process itself "
            f"({shown}); `mw plan {run.get('file', 'FILE')} --memory SIZE` names plans that fit, "
            "such as with zero3, remat=full, offload=disk or more ranks"
        )
    return "use more ranks, or zero3, remat=full or offload=disk"
