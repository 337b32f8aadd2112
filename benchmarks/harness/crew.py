"""A crew: the processes of one contestant; started, spoken to with deadlines, surely ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TextIO

from benchmarks.harness.peers import PEERS, peers_environment
from benchmarks.harness.task import Task

ROOT = Path(__file__).parents[2]
BUILD_SECONDS, STEP_SECONDS = 240.0, 120.0


class Failed(RuntimeError):
    """A contestant that cannot run, and why."""


@dataclass(slots=True)
class Member:
    """One process."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    line: TextIO
    log: Path


@dataclass(frozen=True, slots=True)
class Timed:
    """What a turn took.

    Attributes:
        seconds: per step, from the first rank's start to the last rank's end.
        cpu: seconds per step, of all ranks.
        peaks: memory of each rank so far, bytes.
        losses: of each step, the mean over the ranks that know it.
    """

    seconds: float
    cpu: float
    peaks: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(slots=True)
class Crew:
    """A contestant that runs."""

    name: str
    task: Task
    members: list[Member] = field(default_factory=list)

    @classmethod
    def started(cls, name: str, task: Task, folder: Path) -> Self:
        """Start the processes; `losses` waits for them."""
        folder.mkdir(parents=True, exist_ok=True)
        crew, port = cls(name, task), free_port()
        for rank in range(task.ranks):
            mine = replace(task, rank=rank, folder=str(_own(folder, task, rank)))
            crew.members.append(_start(mine, port, folder / f"{rank}.log"))
        return crew

    def losses(self) -> tuple[float, ...]:
        """Of the first steps, the mean over the ranks."""
        return _means(self._answers(BUILD_SECONDS))

    def turn(self, steps: int, warm: int) -> Timed:
        """Warm-up steps, then `steps` timed ones that all ranks begin together."""
        self._tell({"do": "run", "steps": steps, "warm": warm})
        self._answers(STEP_SECONDS)
        self._tell({"do": "go"})
        found = self._answers(STEP_SECONDS)
        spent = max(a["ended"] for a in found) - min(a["began"] for a in found)
        return Timed(
            spent / steps,
            sum(a["cpu"] for a in found) / steps,
            tuple(a["peak"] for a in found),
            _means(found),
        )

    def close(self) -> None:
        """Ask them to leave, then see to it."""
        for member in self.members:
            member.line.close()
            member.socket.close()
        deadline = time.monotonic() + 10.0
        for member in self.members:
            try:
                member.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(member.process.pid, signal.SIGKILL)
                member.process.wait()

    def _tell(self, what: dict[str, Any]) -> None:
        try:
            for member in self.members:
                member.line.write(json.dumps(what) + "\n")
                member.line.flush()
        except OSError as error:
            raise Failed(self._reason(str(error))) from None

    def _answers(self, seconds: float) -> list[dict[str, Any]]:
        found, deadline = [], time.monotonic() + seconds
        for member in self.members:
            member.socket.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                text = member.line.readline()
            except OSError:
                raise Failed(self._reason(f"no answer in {seconds:.0f} s")) from None
            if not text:
                with suppress(subprocess.TimeoutExpired):
                    member.process.wait(5)  # its socket closes a little before it is gone
                raise Failed(self._reason("it ended"))
            found.append(json.loads(text))
        return found

    def _reason(self, what: str) -> str:
        """The last line that a rank wrote, which mostly names the error."""
        for member in self.members:
            said = [s for s in member.log.read_text(errors="replace").splitlines() if s.strip()]
            if said and member.process.poll() not in (None, 0):
                return f"{what}: {said[-1].strip()[:200]}"
        return what


def _own(folder: Path, task: Task, rank: int) -> Path:
    return folder / "run" if task.connected else folder / f"run{rank}"


def _start(task: Task, port: int, log: Path) -> Member:
    ours, theirs = socket.socketpair()
    python = PEERS / "bin" / "python" if task.needs_peers else Path(sys.executable)
    with log.open("wb") as out, theirs:
        process = subprocess.Popen(
            [
                python,
                "-m",
                "benchmarks.harness.worker",
                json.dumps(asdict(task)),
                str(theirs.fileno()),
            ],
            cwd=ROOT,
            env=_environment(task, port),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Member(process, ours, ours.makefile("rw"), log)


def _environment(task: Task, port: int) -> dict[str, str]:
    found = {k: v for k, v in os.environ.items() if not k.startswith("MESHWRIGHT_")}
    found |= {"OMP_NUM_THREADS": str(task.threads), "PYTHONWARNINGS": "ignore"}
    if task.needs_peers:
        found |= peers_environment(found)
    if task.connected and task.ranks > 1:
        found |= {
            "RANK": str(task.rank),
            "LOCAL_RANK": str(task.rank),
            "WORLD_SIZE": str(task.ranks),
            "LOCAL_WORLD_SIZE": str(task.ranks),
            "LOCAL_SIZE": str(task.ranks),  # DeepSpeed's C++ op ends in SIGSEGV without it
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return found


def free_port() -> int:
    """Of this host, free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _means(answers: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """Of each step; of a pipeline only the last stage may know them."""
    known = [answer["losses"] for answer in answers if None not in answer["losses"]]
    return tuple(sum(losses) / len(losses) for losses in zip(*known, strict=True))
