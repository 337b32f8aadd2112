"""From starting `mw train` to its first step done, against torchrun with DDP, in turn.

Both train one step of the 10M GPT, one sequence a rank, from their own initial weights. Ours is
done when its line stands in metrics.jsonl, theirs when the script has read the loss.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BIN = Path(sys.executable).parent
SECONDS, LOOK_SECONDS = 90.0, 0.002


def ours(folder: Path) -> float:
    """Seconds of `mw train`."""
    run = folder / "run"
    command = ["mw", "train", "benchmarks/first_step/job.py", "-n", "2", "--plan", "data=2"]
    lines = run / "metrics.jsonl"

    def done() -> float | None:
        found = lines.exists() and '"loss"' in lines.read_text()
        return time.monotonic() if found else None

    return _timed([*command, "--steps", "1", "--run-dir", str(run)], done)


def theirs(folder: Path) -> float:
    """Seconds of torchrun and DDP."""
    stamp = folder / "stamp"
    command = ["torchrun", "--standalone", "--nproc-per-node", "2"]

    def done() -> float | None:
        text = stamp.read_text() if stamp.exists() else ""
        return float(text) if text else None

    return _timed([*command, "benchmarks/first_step/ddp.py", str(stamp)], done)


def times(rounds: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds by contestant; each round runs both, the order turning."""
    found: dict[str, list[float]] = {"ours": [], "DDP": []}
    contestants = [("ours", ours), ("DDP", theirs)]
    for number in range(rounds):
        for name, start in contestants[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory(prefix="mw-first-") as folder:
                found[name].append(start(Path(folder)))
        say(f"round {number + 1}, s: ours {found['ours'][-1]:.2f}  DDP {found['DDP'][-1]:.2f}")
    return found


def _timed(command: list[str], done: Callable[[], float | None]) -> float:
    """Seconds until `done` tells the time; then the processes are let finish."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [BIN / command[0], *command[1:]],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            ended = _wait(process, done, began + SECONDS)
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if ended is None:
            said.seek(0)
            raise RuntimeError(f"{command[0]} did no step: {said.read().decode()[-300:]}")
    return ended - began


def _wait(
    process: subprocess.Popen[bytes], done: Callable[[], float | None], deadline: float
) -> float | None:
    while time.monotonic() < deadline:
        ended = done()
        if ended is not None or process.poll() is not None:
            return ended or done()
        time.sleep(LOOK_SECONDS)  # looking costs less than a process that would tell us
    return None


if __name__ == "__main__":
    for name, seconds in times(6, print).items():
        print(name, sorted(seconds))
