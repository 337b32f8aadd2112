"""The run on a terminal: one progress display, or plain lines where the stream is a file.

    console = Console()                     # rank 0 only; writes to stderr
    console.start(total=1000, resume_from=0)
    console.step({"step": 1, "loss": 5.5, "samples": 64, "seconds": 0.2})
    console.evaluation({"step": 100, "evaluation": {"loss": 2.1}})
    console.note("saved step 100")
    console.close()

A value of a record is read only when it is shown, so that lazy metrics cost no sync in between.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from meshwright.view.fields import finite
from meshwright.view.pace import Pace
from meshwright.view.tables import plan_table, verify_table
from meshwright.view.units import count_text, seconds_text, value_text

__all__ = ["Console", "plan_table", "verify_table"]

Record = Mapping[str, Any]
_REDRAW_SECONDS = 0.1
_LEAST_BAR = 12  # columns, the spaces around it included
# A reader that has gone (`2>&1 | head`, a closed terminal) or a full disk must not end a training.
_VANISHED = suppress(OSError)


class Console:
    """Shows a run as it goes. Not for several threads."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        every: float = 10.0,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write to `stream`, standard error by default.

        Args:
            stream: where to write.
            every: seconds between plain lines.
            live: draw a progress display; None does where `stream` is a terminal that can.
            clock: a monotonic clock in seconds.
        """
        stream = sys.stderr if stream is None else stream
        terminal = _Terminal(file=stream, highlight=False, soft_wrap=True)
        if live is None:
            live = stream.isatty() and not terminal.is_dumb_terminal
        self._display: _Display = _Live(terminal) if live else _Lines(stream)
        self._interval = _REDRAW_SECONDS if live else every
        self._clock = clock
        self._next = float("-inf")
        self._pace = Pace()
        self._total: int | None = None
        self._held_out: float | None = None
        self._unseen: Record | None = None

    def start(self, total: int | None, resume_from: int = 0) -> None:
        """Begin: `total` steps in all (None: not known), of which `resume_from` are done."""
        self._total = total
        with _VANISHED:
            self._display.open(total, resume_from)

    def step(self, record: Record) -> None:
        """A step was taken; keys as in metrics.jsonl."""
        seconds, samples = _number(record, "seconds") or 0.0, _number(record, "samples") or 0.0
        self._pace = self._pace.after(seconds, samples)
        now = self._clock()
        self._unseen = record
        if now >= self._next or record.get("step") == self._total:
            self._next = now + self._interval
            self._show(record)

    def evaluation(self, record: Record) -> None:
        """Held-out metrics, as in metrics.jsonl; they stay in view."""
        values = record.get("evaluation", {})
        self._held_out = _number(values, "loss")
        numbers = ((name, _number(values, name)) for name in values)
        parts = [f"{name} {value_text(value)}" for name, value in numbers if value is not None]
        self.note(f"step {_step(record):,}  held-out " + "  ".join(parts or ["metrics: none"]))

    def note(self, text: str) -> None:
        """Print `text` above the display."""
        with _VANISHED:
            self._display.line(text)

    def close(self) -> None:
        """Show the last step and leave the terminal as it was; may be called again."""
        if self._unseen is not None:
            self._show(self._unseen)
        with _VANISHED:
            self._display.close()

    def _show(self, record: Record) -> None:
        self._unseen = None
        step = _step(record)
        left = None if self._total is None else self._pace.left(self._total - step)
        fields = self._fields(record, left)
        with _VANISHED:
            self._display.step(step, self._total, fields)

    def _fields(self, record: Record, left: float | None) -> list[str]:
        loss, speed = _number(record, "loss"), self._pace.samples_per_second
        rate = _number(record, "lr")
        return [
            "loss not finite" if loss is None else f"loss {value_text(loss)}",
            *([] if self._held_out is None else [f"held-out {value_text(self._held_out)}"]),
            *([] if speed is None else [f"{count_text(speed)} samples/s"]),
            *([f"{_left_text(left)} left"] if left else []),
            *([] if rate is None else [f"lr {rate:.1e}"]),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _step(record: Record) -> int:
    return int(_number(record, "step") or 0)


def _number(record: Record, key: str) -> float | None:
    """The finite number under `key`; a lazy metric or a tensor is read by `float`."""
    value = record.get(key)
    if value is None or isinstance(value, str):
        return None
    return finite(float(value))


class _Display(Protocol):
    """What a run is shown on."""

    def open(self, total: int | None, done: int) -> None:
        """Begin, with `done` of `total` steps taken."""

    def step(self, step: int, total: int | None, fields: list[str]) -> None:
        """Show a step."""

    def line(self, text: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """End."""


class _Lines:
    """Plain lines, for files and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def open(self, total: int | None, done: int) -> None:
        self.line(_beginning(total, done))

    def step(self, step: int, total: int | None, fields: list[str]) -> None:
        of = "" if total is None else f"/{total}"
        self.line("  ".join([f"step {step}{of}", *fields]))

    def line(self, text: str) -> None:
        print(_visible(text), file=self._stream, flush=True)

    def close(self) -> None:
        return


class _Terminal(Terminal):
    """A terminal whose end is not the program's: rich's own exits the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class _Live:
    """A progress bar at the bottom of a terminal, everything else above it."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._progress = Progress(
            TextColumn(
                "{task.completed:,.0f}{task.fields[of]}",
                style="bold",
                table_column=Column(no_wrap=True),
            ),
            BarColumn(bar_width=None, complete_style="cyan", table_column=Column(ratio=1)),
            TextColumn(
                "{task.fields[facts]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=terminal,
            expand=True,
            # What the user prints to a redirected stdout must stay there.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task: TaskID | None = None

    def open(self, total: int | None, done: int) -> None:
        of = "" if total is None else f" / {total:,}"
        facts = "the first step also traces the model"
        self._task = self._progress.add_task("", total=total, completed=done, of=of, facts=facts)
        if done:
            self.line(_beginning(total, done))
        self._progress.start()

    def step(self, step: int, total: int | None, fields: list[str]) -> None:
        if self._task is None:
            self.open(total, 0)
        assert self._task is not None
        room = self._terminal.width - 2 * len(f"{total or step:,}") - 3 - _LEAST_BAR
        shown = list(fields)
        while len(shown) > 1 and len(" · ".join(shown)) > room:
            shown.pop()
        self._progress.update(self._task, completed=step, facts=" · ".join(shown))

    def line(self, text: str) -> None:
        self._terminal.print(Text(_visible(text)))

    def close(self) -> None:
        self._progress.stop()


def _left_text(seconds: float) -> str:
    """A forecast, in whole seconds at the finest."""
    return f"{max(1, round(seconds))} s" if seconds < 59.5 else seconds_text(seconds)


def _beginning(total: int | None, done: int) -> str:
    steps = "" if total is None else f", {max(0, total - done):,} steps to take"
    return (f"resuming after step {done:,}" if done else "training") + steps


def _visible(text: str) -> str:
    """`text` without control characters, which could move the cursor or hide other lines."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
