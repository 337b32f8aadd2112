"""One process of a contestant: builds its job once, then runs steps when it is told to.

It blocks in a read while others run, so that it costs them nothing. It is spoken to in JSON lines
over an inherited socket; stdout and stderr, which libraries write to, go to a log.

    python -m benchmarks.harness.worker '{"module": "ddp", ...}' FD
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.harness.task import Task

FIRST_STEPS = 3  # whose losses are compared


def say(line: TextIO, **what: Any) -> None:
    """One answer."""
    line.write(json.dumps(what) + "\n")
    line.flush()


def peak_memory() -> int:
    """Bytes; `ru_maxrss` would begin with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def main() -> None:
    """Build, tell the first losses, obey."""
    task, fd = Task(**json.loads(sys.argv[1])), int(sys.argv[2])
    if task.threads == 1 and task.bound:
        # Else two ranks of one contestant now and then share a core for a while: the control's
        # ratios of single rounds scattered by 15 % without, by 3 % with.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[task.rank % len(cores)]})
    torch.set_num_threads(task.threads)
    line = socket.socket(fileno=fd).makefile("rw")
    module = importlib.import_module(f"benchmarks.contestants.{task.module}")
    with module.opened(task) as step:
        say(line, losses=[step() for _ in range(FIRST_STEPS)])
        while True:
            asked = json.loads(line.readline() or '{"do": "quit"}')
            if asked["do"] == "quit":
                break
            for _ in range(asked["warm"]):
                step()
            say(line, warm=True)
            line.readline()  # all ranks are warm: go
            cpu, began = time.process_time(), time.monotonic()
            losses = [step() for _ in range(asked["steps"])]
            ended = time.monotonic()
            cpu = time.process_time() - cpu
            say(line, began=began, ended=ended, losses=losses, cpu=cpu, peak=peak_memory())
    line.close()
    os._exit(0)  # some peers' threads never end


if __name__ == "__main__":
    main()
