"""One rank of a trial: under its limit from the first import on, some steps, what they took.

python -m benchmarks.ladder.trial '{"side": "ours", "rung": 1, ...}'
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

from benchmarks.ladder.rungs import Trial


def main() -> None:
    """Run the steps, and tell."""
    trial = Trial(**json.loads(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_DATA, (trial.memory, trial.memory))
    side = importlib.import_module(f"benchmarks.ladder.{trial.side}")
    seconds, losses = [], []
    with side.opened(trial) as step:
        for _ in range(trial.steps):
            began = time.monotonic()
            losses.append(step())
            seconds.append(time.monotonic() - began)
        told = json.dumps({"seconds": seconds, "losses": losses})
        Path(trial.folder, f"told{trial.rank}.json").write_text(told)
        sys.stdout.flush()
        os._exit(0)  # some peers' threads never end


if __name__ == "__main__":
    main()
