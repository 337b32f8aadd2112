"""`trace.json`: what every rank did, for https://ui.perfetto.dev and chrome://tracing.

Format: "Trace Event Format" (Duvall, Google, 2016), JSON object form; times in microseconds since
the earliest of all ranks. A rank is a process; its tracks are threads, on which slices nest. What
is under way between a Start and its Wait is an asynchronous slice, with an arrow from one to the
other, and counted in bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from meshwright.errors import StorageError
from meshwright.view.parts import Part, Slice, last_to_start, read_parts, transfers

__all__ = ["events", "write_trace"]

Event = dict[str, Any]

TRACKS = ("steps", "compute", "waiting", "data", "update", "memory")
_TRACK = {
    "Start": "waiting",
    "Wait": "waiting",
    "Send": "waiting",
    "Recv": "waiting",
    "Agree": "waiting",
    "Load": "data",
    "Free": "memory",
    "Stash": "memory",
}
_ARGS = (
    "action",
    "peer",
    "segment",
    "microbatch",
    "ops",
    "lines",
    "op",
    "axis",
    "bytes",
    "serves",
    "why",
)


def write_trace(folder: Path) -> Path | None:
    """Merge the parts in a run's folder into `trace.json`; None where nothing was traced.

    Raises:
        StorageError: a part cannot be read, or the file not be written.
    """
    parts = read_parts(folder)
    if not any(part.slices for part in parts):
        return None
    path, aside = folder / "trace.json", folder / ".trace.json"
    whole = {
        "traceEvents": list(events(parts)),
        "displayTimeUnit": "ms",
        "otherData": {
            "source": "meshwright",
            "clocks": [
                {"rank": p.rank, "ahead_seconds": p.ahead, "error_seconds": p.error, "host": p.host}
                for p in parts
            ],
        },
    }
    try:
        aside.write_text(json.dumps(whole, separators=(",", ":")))
        aside.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    return path


def events(parts: Sequence[Part]) -> Iterator[Event]:
    """All events of the file."""
    zero = min(piece.began for part in parts for piece in part.slices)
    late = last_to_start(parts)
    first = 1  # ids are of one space in the whole file
    for part in parts:
        yield from _names(part)
        yield from _steps(part, zero)
        for piece in part.slices:
            yield _slice(part.rank, piece, zero, late.get((part.rank, piece.step, piece.place)))
        yield from _under_way(part, zero, first)
        first += len(part.slices)


def _names(part: Part) -> Iterator[Event]:
    where = ", ".join(f"{axis}={at}" for axis, at in part.coordinates.items())
    told: list[tuple[str, int, Event]] = [
        ("process_name", 0, {"name": f"rank {part.rank} ({where})"}),
        ("process_labels", 0, {"labels": f"{part.host}, process {part.pid}"}),
        ("process_sort_index", 0, {"sort_index": part.rank}),
    ]
    for thread, name in enumerate(TRACKS):
        told.append(("thread_name", thread, {"name": name}))
        told.append(("thread_sort_index", thread, {"sort_index": thread}))
    for name, thread, args in told:
        yield {"ph": "M", "name": name, "pid": part.rank, "tid": thread, "args": args}


def _steps(part: Part, zero: float) -> Iterator[Event]:
    for step in part.steps:
        own = [piece for piece in part.slices if piece.step == step]
        yield {
            "ph": "X",
            "name": f"step {step}",
            "cat": "step",
            "pid": part.rank,
            "tid": TRACKS.index("steps"),
            "ts": _time(own[0].began, zero),
            "dur": _lasting(own[0].began, own[-1].ended, zero),
            "args": {"step": step},
        }


def _slice(rank: int, piece: Slice, zero: float, late: tuple[int, float] | None) -> Event:
    args = {name: piece.what[name] for name in _ARGS if name in piece.what}
    if late is not None:
        args |= {"last to start": f"rank {late[0]}", "seconds after the first": late[1]}
    return {
        "ph": "X",
        "name": piece.what["name"],
        "cat": piece.kind,
        "pid": rank,
        "tid": TRACKS.index("compute" if piece.computes else _TRACK.get(piece.kind, "update")),
        "ts": _time(piece.began, zero),
        "dur": _lasting(piece.began, piece.ended, zero),
        "args": {"step": piece.step, "instruction": piece.place, **args},
    }


def _under_way(part: Part, zero: float, first: int) -> Iterator[Event]:
    """Each collective from its Start to the end of its Wait, an arrow, and the bytes under way."""
    changes: list[tuple[float, int]] = []
    for number, transfer in enumerate(transfers(part), first):
        begun, awaited, what = transfer.begun, transfer.awaited, transfer.what
        began = begun.began if begun else part.slices[0].began
        ended = awaited.ended if awaited else part.slices[-1].ended
        size = int(what.get("bytes", 0))
        changes += [(began, size), (ended, -size)]
        args = {name: what[name] for name in _ARGS if name in what}
        slice_ = {"cat": "collective", "name": _bare(what), "id": number, "pid": part.rank}
        slice_["tid"] = TRACKS.index("waiting")
        yield {"ph": "b", **slice_, "ts": _time(began, zero), "args": args}
        yield {"ph": "e", **slice_, "ts": _time(ended, zero)}
        if begun and awaited:
            arrow = {**slice_, "cat": "arrow"}
            yield {"ph": "s", **arrow, "ts": _time(begun.began, zero)}
            yield {"ph": "f", **arrow, "bp": "e", "ts": _time(awaited.began, zero)}
    total = 0
    for at, size in sorted(changes, key=lambda change: change[0]):
        total += size
        counter = {"name": "bytes under way", "pid": part.rank, "tid": 0}
        yield {"ph": "C", **counter, "ts": _time(at, zero), "args": {"bytes": total}}


def _bare(what: Any) -> str:
    """One name, and so one track, per kind of collective and axis."""
    return f"{what.get('op', 'collective')} over {what.get('axis', '?')}"


def _time(at: float, zero: float) -> float:
    """Microseconds, to the nanosecond."""
    return round((at - zero) * 1e6, 3)


def _lasting(began: float, ended: float, zero: float) -> float:
    """The microseconds between two times as written, so that neighbours touch and never overlap."""
    return round(_time(ended, zero) - _time(began, zero), 3)
