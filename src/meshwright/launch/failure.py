"""Failure records: what a rank writes when it ends by an error, and the text made of all of them.

A record is JSON in `<run>/failures/rank<K>.json`. The text is at most twelve lines: the first
failing rank's message and the user's own lines, once; what became of the others; where the logs
are; the exit status.
"""

from __future__ import annotations

import json
import os
import signal
import sysconfig
import textwrap
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meshwright.errors import MeshwrightError, OutOfMemory, PeerLost, Stalled, UserCodeError

__all__ = ["Failure", "Frame", "clear", "deciding", "describe", "read", "record", "render"]

SIGNALLED, EXITED = "killed", "exited"  # kinds of failures that left no record
_CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch raises a RuntimeError for it
_MESSAGE_LINES, _FRAMES_SHOWN, _WRAP, _WIDTH = 4, 2, 116, 160


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a traceback; `user` is False for Python's, installed packages' and our own."""

    file: str
    line: int
    function: str
    text: str
    user: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one rank ended. `frames` has the user's own first, innermost first."""

    rank: int
    pid: int
    time: float
    kind: str
    message: str
    status: int
    frames: tuple[Frame, ...] = ()

    @property
    def consequence(self) -> bool:
        """Whether another rank is at fault: this one only lost it, or waited for it in vain."""
        return self.status in {PeerLost.exit_status, Stalled.exit_status} and self.kind in {
            PeerLost.__name__,
            Stalled.__name__,
        }


def describe(rank: int, error: BaseException) -> Failure:
    """The record of `error`, with the frames of what first caused it."""
    chain = _chain(error)
    frames = [frame for link in reversed(chain) for frame in _frames(link)]
    ordered = [f for f in frames if f.user] + [f for f in frames if not f.user]
    message = "\n".join([str(error).strip() or "(no message)", *_notes(error)])
    cause = chain[-1]
    if cause is not error and _said(cause) not in message:
        message += f"\nbecause of {type(cause).__name__}: {str(cause).strip()}"
    return Failure(
        rank,
        os.getpid(),
        time.time(),
        type(error).__name__,
        message,
        status_of(error),
        tuple(ordered),
    )


def _notes(error: BaseException) -> list[str]:
    """What was added to `error` on its way, a line each; longer notes are for the log."""
    found: list[str] = vars(error).get("__notes__", [])
    return [note for note in found if "\n" not in note.strip()]


def _said(error: BaseException) -> str:
    """What a message says that tells of `error` already."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error)


def status_of(error: BaseException) -> int:
    """The exit status for an error, whoever raised it."""
    if isinstance(error, MeshwrightError):
        return error.exit_status
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"} or _CPU_MEMORY in str(error):
        return OutOfMemory.exit_status
    return UserCodeError.exit_status if _by_user(error) else MeshwrightError.exit_status


def record(run_dir: Path, rank: int, error: BaseException) -> Failure:
    """Write `failures/rank<K>.json` under `run_dir` and return what it says."""
    failure = describe(rank, error)
    path = run_dir / "failures" / f"rank{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(asdict(failure), indent=1) + "\n")
    aside.replace(path)
    return failure


def read(run_dir: Path) -> tuple[Failure, ...]:
    """All records under `run_dir`, by rank; what does not read as a record is left out."""
    found = []
    for path in (run_dir / "failures").glob("rank*.json"):
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            frames = tuple(Frame(**frame) for frame in data.pop("frames"))
            found.append(Failure(**data, frames=frames))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # written by a rank that was killed meanwhile, or not by us
    return tuple(sorted(found, key=lambda failure: failure.rank))


def clear(run_dir: Path) -> None:
    """Remove the records of an earlier start in the same folder."""
    for path in (run_dir / "failures").glob("rank*.json"):
        path.unlink(missing_ok=True)


def deciding(failures: Iterable[Failure]) -> Failure:
    """The failure that the others follow from: the earliest that is no consequence."""
    return min(failures, key=lambda failure: (failure.consequence, failure.time))


def render(failures: Sequence[Failure], *, world: int, logs: Path | None = None) -> str:
    """At most twelve lines about `failures`, which must not be empty.

    Args:
        failures: one per rank that failed.
        world: how many ranks there were; 0 where nothing is known of the others.
        logs: the folder of the ranks' logs.
    """
    first = deciding(failures)
    same = [f.rank for f in failures if (f.kind, f.message) == (first.kind, first.message)]
    message = [line for line in first.message.splitlines() if line.strip()] or ["(no message)"]
    lines = _wrapped([_headline(first, same, message[0]), *message[1:]])
    shown = [frame for frame in first.frames if frame.user][:_FRAMES_SHOWN]
    for frame in shown:
        lines += [f"  {_short(frame.file)}:{frame.line} in {frame.function}", f"    {frame.text}"]
    folded = len(first.frames) - len(shown)
    if folded and logs is not None:
        frames = "1 more frame is" if folded == 1 else f"{folded} more frames are"
        lines.append(f"  ({frames} in the log)")
    others = _others(failures, same, world)
    if others:
        lines.append(others)
    if logs is not None:
        lines.append(f"log: {_short(str(logs))}/rank{first.rank}.log")
    lines.append(f"exit status {first.status}")
    return "\n".join(_printable(line[:_WIDTH]) for line in lines)


def _wrapped(message: Sequence[str]) -> list[str]:
    """At most `_MESSAGE_LINES` lines, all but the first indented; the rest is in the log."""
    lines = [
        part
        for line in message
        for part in textwrap.wrap(line, _WRAP, subsequent_indent="  ", break_on_hyphens=False)
    ]
    lines = [lines[0]] + ["  " + line.strip() for line in lines[1:]]
    if len(lines) > _MESSAGE_LINES:
        lines = lines[:_MESSAGE_LINES]
        lines[-1] += " ..."
    return lines


def _printable(line: str) -> str:
    """Without what could steer a terminal: messages may hold the user's data."""
    return "".join(char if char.isprintable() else " " for char in line)


def _headline(failure: Failure, same: Sequence[int], text: str) -> str:
    if failure.kind == SIGNALLED:
        return f"rank {failure.rank} (pid {failure.pid}) {text}"
    kind = "" if failure.kind == EXITED else f"{failure.kind}: "
    return f"{_ranks(same)} failed: {kind}{text}"


def _others(failures: Sequence[Failure], same: Sequence[int], world: int) -> str:
    """What became of the ranks that are not told about, in one line."""
    kinds: dict[str, list[int]] = {}
    for failure in failures:
        if failure.rank not in same:
            kinds.setdefault(failure.kind, []).append(failure.rank)
    parts = [f"{_ranks(ranks)}: {kind}" for kind, ranks in kinds.items()]
    told = {failure.rank for failure in failures}
    rest = [rank for rank in range(world) if rank not in told]
    if rest:
        parts.append(f"{_ranks(rest)} ended as well")
    return "; ".join(parts)


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) > 6:  # more would not be read
        return f"ranks {ranks[0]}, {ranks[1]}, {ranks[2]} and {len(ranks) - 3} more"
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _chain(error: BaseException) -> list[BaseException]:
    """`error`, its cause, that one's cause, ..."""
    chain = [error]
    while True:
        last = chain[-1]
        before = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if before is None or before in chain:
            return chain
        chain.append(before)


def _frames(error: BaseException) -> list[Frame]:
    """The traceback's frames, innermost first; a syntax error's own line before them."""
    found = []
    if isinstance(error, SyntaxError) and error.filename:
        text, own = (error.text or "").strip(), _owner(error.filename) == "user"
        found.append(Frame(error.filename, error.lineno or 0, "<module>", text, own))
    return found + [
        Frame(
            frame.filename,
            frame.lineno or 0,
            frame.name,
            (frame.line or "").strip(),
            _owner(frame.filename) == "user",
        )
        for frame in reversed(traceback.extract_tb(error.__traceback__))
    ]


def _by_user(error: BaseException) -> bool:
    """Whether the innermost frame that is no library's is the user's rather than ours."""
    for frame in _frames(_chain(error)[-1]):
        owner = _owner(frame.file)
        if owner != "library":
            return owner == "user"
    return False


def _owner(file: str) -> str:
    """Whose a source file is: `user`, `meshwright` or `library`."""
    if file.startswith("<"):
        return "library"
    path = Path(file)
    if path.is_relative_to(_OURS):
        return "meshwright"
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return "library" if installed or any(map(path.is_relative_to, _PYTHON)) else "user"


def _short(file: str) -> str:
    """Relative to the working folder, where it is inside."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


_OURS = Path(__file__).parents[1]
_PYTHON = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
