"""The profiler: when each instruction of a few steps began and ended, on every rank.

The executor stamps instructions anyway; for the steps that are traced a rank keeps the stamps and
adds them to its part, `trace/rank<K>.jsonl`, after each step. So a part is whole up to the last
step that its rank finished, even where the rank was killed. A part's lines are

    {"rank": 0, "coordinates": {"data": 0}, "ahead": 0.0, "error": 0.0, "host": "a", "pid": 1}
    {"list": 0, "instructions": [{"kind": "Run", "name": ..., ...}, ...]}
    {"step": 3, "list": 0, "stamps": [seconds, one more than there are instructions]}
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from meshwright.comm.base import Group, Start, Wait, all_gather
from meshwright.errors import StorageError
from meshwright.run.build import Lowered
from meshwright.run.executor import Committed
from meshwright.run.observe.clock import compare_clocks
from meshwright.run.observe.label import labels
from meshwright.run.observe.window import Steps
from meshwright.run.session import Session

__all__ = ["Profiler"]


@final
class Profiler:
    """Traces some steps of a session: `before` and `after` each step, and `close` at the end."""

    def __init__(
        self, session: Session, folder: Path, steps: Steps, written: Callable[[Path], Any]
    ) -> None:
        """Every rank makes one, for the same steps.

        Args:
            session: whose steps.
            folder: of the run.
            steps: which.
            written: called on rank 0 with the run's folder once all parts are in it.
        """
        self._session, self._folder, self._steps, self._written = session, folder, steps, written
        self._part: list[str] = []
        self._lists: dict[int, int] = {}
        self._watching = False

    def before(self) -> None:
        """Begin where the next step is the first to trace; all ranks then compare clocks."""
        session = self._session
        if self._watching or session.step + 1 != self._steps.first:
            return
        if session.worker.rank == 0:
            self._clear()
        clock = session.comm.perform(
            compare_clocks(session.everyone, session.worker.rank, time.perf_counter, _host())
        )
        self._add(
            {
                "rank": session.worker.rank,
                "coordinates": {
                    axis.name: session.worker.place.coordinates[axis.name]
                    for axis in session.build.axes
                    if axis.size > 1 or axis.name == "data"
                },
                "ahead": clock.ahead,
                "error": clock.error,
                "host": platform.node(),
                "pid": os.getpid(),
            }
        )
        self._watching = True
        session.worker.observer = self._step

    def _clear(self) -> None:
        """What an earlier start left, that of more ranks included."""
        with suppress(OSError):
            (self._folder / "trace.json").unlink(missing_ok=True)
            for path in (self._folder / "trace").glob("rank*.jsonl"):
                if path.name not in {f"rank{rank}.jsonl" for rank in self._session.everyone.ranks}:
                    path.unlink()

    def _step(self, step: int, lowered: Lowered, committed: Committed) -> None:
        key = id(lowered)
        if key not in self._lists:
            self._lists[key] = len(self._lists)
            told = labels(lowered.compiled.instructions, self._session.worker.place, self._sizes())
            self._add({"list": self._lists[key], "instructions": told})
        self._add({"step": step + 1, "list": self._lists[key], "stamps": list(committed.stamps)})

    def _sizes(self) -> Mapping[str, int]:
        """Bytes of what a rank holds, by the names that instructions give them."""
        state = self._session.worker.state
        whole = self._session.build.values().items()
        held = {f"gradient/{name}": value.bytes for name, value in whole}
        held |= {name: tensor.nbytes for name, tensor in state.values.items()}
        return held | {f"shard/{name}": shard.nbytes for name, shard in state.shards.items()}

    def after(self, *, last: bool = False) -> None:
        """End where the last step to trace was taken, or the `last` of all."""
        if last or self._session.step >= self._steps.last:
            self.close()

    def close(self) -> None:
        """Bring all ranks' parts to rank 0, if any step was traced; every rank must come."""
        if not self._watching:
            return
        self._watching = False
        session = self._session
        session.worker.observer = None
        text = "".join(self._part)
        parts = session.comm.perform(_collected(text, session.everyone, session.worker.rank))
        if session.worker.rank != 0:
            return
        try:
            for rank, part in enumerate(parts):
                path = _path(self._folder, rank)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(part)
            self._written(self._folder)
        except (OSError, StorageError) as error:
            session.notes.append(f"the trace was not written, training goes on: {error}")
        else:
            session.notes.append(
                f"trace of {_steps_text(text)} written to {self._folder}/trace.json"
            )

    def _add(self, entry: Mapping[str, Any]) -> None:
        """To the part, in memory and on disk; this host's disk may not be rank 0's, or be full."""
        line = json.dumps(entry, separators=(",", ":")) + "\n"
        path = _path(self._folder, self._session.worker.rank)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a" if self._part else "w") as file:
                file.write(line)
        self._part.append(line)


def _path(folder: Path, rank: int) -> Path:
    return folder / "trace" / f"rank{rank}.jsonl"


def _steps_text(part: str) -> str:
    steps = [entry["step"] for line in part.splitlines() if "step" in (entry := json.loads(line))]
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _host() -> str:
    """Equal for processes that read one clock: one boot of one kernel, one time namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/time').readlink()}"
    except OSError:
        return f"{platform.node()} {os.getpid()}"  # no telling; compare the clocks


def _collected(text: str, group: Group, index: int) -> Generator[Any, Any, list[str]]:
    """Every member's text, in group order, on the first one (others get none), one at a time."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    size = torch.tensor([data.numel()], dtype=torch.int64)
    sizes = yield from all_gather(size, group, ((1,),) * len(group.ranks), "sizes of the trace")
    found = []
    for member, count in enumerate(sizes):
        part: Tensor = data if member == index else torch.empty(int(count), dtype=torch.uint8)
        if len(group.ranks) > 1:
            handle = yield Start("broadcast", group, (part,), root=member, label="trace")
            (part,) = yield Wait(handle)
        if index == 0:
            found.append(part.numpy().tobytes().decode())
    return found
