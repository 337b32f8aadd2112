"""What was measured on, and with which versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.peers import PEERS, versions

ROOT = Path(__file__).parents[2]
OURS, THEIRS = (
    ("torch", "numpy", "meshwright"),
    ("torch", "accelerate", "deepspeed", "fairscale", "jax", "torchgpipe"),
)


def machine() -> dict[str, Any]:
    """Plain data: processor, memory, software, commit, load."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(Path(sys.executable), OURS),
        "peers": versions(PEERS / "bin" / "python", THEIRS),
        "commit": _commit(),
        "load": os.getloadavg()[0],
        "began": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    ran = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    return ran.stdout.strip() or "unknown"
