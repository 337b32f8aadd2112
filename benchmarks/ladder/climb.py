"""Trials of the ladder: two ranks under their limit, watched from outside; the largest width."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event

from benchmarks.harness.crew import free_port
from benchmarks.harness.peers import PEERS, peers_environment
from benchmarks.ladder.rungs import HEAD, RANKS, Trial

ROOT = Path(__file__).parents[2]
LOOK_SECONDS = 0.02
STEP = HEAD  # widths are its multiples

_NO_MEMORY = (
    "OutOfMemory",
    "annot allocate memory",
    "MemoryError",
    "bad_alloc",
    "can't start new thread",
)
_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(8 << 20)}
"""For both sides: what a process frees the limit shall not count."""


@dataclass(slots=True)
class Held:
    """The most that was seen, bytes: of one rank's own memory, beside it, of files of all ranks."""

    private: int = 0
    shared: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a trial.

    Attributes:
        width: of the model.
        seconds: of each step but the first, on the slowest rank; empty where it did not fit.
        losses: of the first rank.
        held: the most that was seen.
        reason: why it did not end well.
    """

    width: int
    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    held: Held
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether it trained."""
        return bool(self.seconds)


def tried(trial: Trial, host: int, parent: Path, most: float = 300.0) -> Outcome:
    """Run a trial's ranks in a folder of its own in `parent`.

    Args:
        trial: what to run.
        host: bytes of memory beside the ranks' own, for both.
        parent: of the folder.
        most: seconds that it may take.
    """
    folder = Path(tempfile.mkdtemp(prefix="ladder-", dir=parent))
    port = free_port()
    mine = [replace(trial, folder=str(folder), rank=rank) for rank in range(RANKS)]
    ranks = [_started(each, port) for each in mine]
    held = Held()
    try:
        reason = _watched(ranks, held, host, folder, most)
        told = [folder / f"told{rank}.json" for rank in range(RANKS)]
        if reason or not all(path.exists() for path in told):
            return Outcome(trial.width, (), (), held, reason or _last_words(folder, ranks))
        found = [json.loads(path.read_text()) for path in told]
    finally:
        for rank in ranks:
            _end(rank)
        shutil.rmtree(folder, ignore_errors=True)
    seconds = [max(each) for each in zip(*(one["seconds"] for one in found), strict=True)]
    return Outcome(trial.width, tuple(seconds[1:]), tuple(found[0]["losses"]), held)


def largest(
    fits: Callable[[int], Outcome],
    guess: int,
    say: Callable[[str], None],
    seconds: float = math.inf,
) -> tuple[Outcome | None, Outcome | None]:
    """The largest width that fits, and the smallest tried that does not.

    Goes up or down from the guess by strides that double, then halves what is left.

    Args:
        fits: tries a width.
        guess: where to begin.
        say: told of each trial.
        seconds: after which what was found is taken for the largest.
    """
    good: Outcome | None = None
    bad: Outcome | None = None
    at, stride, began = (
        max(1, round(guess / STEP)),
        max(1, round(guess / STEP / 8)),
        time.monotonic(),
    )
    while True:
        found = fits(at * STEP)
        say(told(found))
        good, bad = (found, bad) if found.fits else (good, found)
        low, high = (0 if one is None else one.width // STEP for one in (good, bad))
        if bad is not None and high - low <= 1:
            return good, bad
        if good is not None and time.monotonic() - began > seconds:
            return good, bad
        if good is None:
            at = max(high - stride, 1)
        else:
            at = low + stride if bad is None else (low + high) // 2
        stride *= 2


def told(found: Outcome) -> str:
    """A trial in words."""
    held = found.held
    sizes = f"{held.private >> 20} MiB own, {held.shared >> 20} beside, {held.disk >> 20} on disk"
    how = f"{statistics.median(found.seconds):.1f} s a step" if found.fits else found.reason
    return f"width {found.width}: {how}; {sizes}"


def _started(trial: Trial, port: int) -> subprocess.Popen[bytes]:
    theirs = trial.side != "ours"
    python = PEERS / "bin" / "python" if theirs else Path(sys.executable)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MESHWRIGHT_")}
    environ |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "RANK": str(trial.rank),
        "LOCAL_RANK": str(trial.rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "LOCAL_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **_HEAP,
    }
    if theirs:
        environ |= peers_environment(environ)
    with Path(trial.folder, f"{trial.rank}.log").open("wb") as log:
        return subprocess.Popen(
            [python, "-m", "benchmarks.ladder.trial", json.dumps(asdict(trial))],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _watched(
    ranks: list[subprocess.Popen[bytes]], held: Held, host: int, folder: Path, most: float
) -> str:
    """Look at the ranks until they end; why they were not let go on."""
    deadline, never = time.monotonic() + most, Event()
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() not in (None, 0) for rank in ranks):
            return ""  # the log tells why
        _look(ranks, held, folder)
        if held.shared > host:
            return f"{held.shared >> 20} MiB of host memory"
        if time.monotonic() > deadline:
            return f"no end in {most:.0f} s"
        never.wait(LOOK_SECONDS)
    return ""


def _look(ranks: list[subprocess.Popen[bytes]], held: Held, folder: Path) -> None:
    status = [_status(rank.pid) for rank in ranks]
    held.private = max(held.private, *(one.get("RssAnon", 0) for one in status))
    held.shared = max(held.shared, sum(one.get("RssShmem", 0) for one in status))
    files = [path.stat().st_blocks * 512 for path in folder.rglob("*.offload")]
    held.disk = max(held.disk, sum(files))


def _status(pid: int) -> dict[str, int]:
    """Bytes by name."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) << 10 for name, value, _ in pairs}


def _last_words(folder: Path, ranks: list[subprocess.Popen[bytes]]) -> str:
    """What is behind the end of the ranks: memory that none was given, or the last line."""
    said = [(folder / f"{rank}.log").read_text(errors="replace") for rank in range(RANKS)]
    if any(word in text for text in said for word in _NO_MEMORY):
        return "memory"
    for rank, text in zip(ranks, said, strict=True):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("exit status")]
        if lines and rank.poll() not in (None, 0):
            return lines[-1][:200]
    return f"it ended: {[rank.poll() for rank in ranks]}"


def _end(rank: subprocess.Popen[bytes]) -> None:
    if rank.poll() is None:
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()
