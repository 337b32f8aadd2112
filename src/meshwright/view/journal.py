"""The journal of a run: metrics.jsonl, TensorBoard, the user's loggers, the display, run.json.

Rank 0 keeps it; the other ranks hold one that writes nowhere, so that nobody asks who he is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from meshwright.errors import UsageError
from meshwright.run.loggers import JsonLines, TensorBoard
from meshwright.run.session import Record
from meshwright.view.console import Console

__all__ = ["Journal", "Logger", "open_journal"]

Logger = Callable[[dict[str, Any]], None]


@final
class Journal:
    """Where records go."""

    def __init__(
        self,
        folder: Path | None = None,
        loggers: Sequence[Logger] = (),
        console: Console | None = None,
        closing: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Without a folder nothing is written."""
        self._folder, self._loggers = folder, tuple(loggers)
        self._console, self._closing = console, tuple(closing)
        self._info: dict[str, Any] = {}
        self._added: dict[str, Any] = {}

    def start(self, total: int, step: int) -> None:
        """Training begins: `total` steps in all, `step` of them done."""
        if self._console is not None:
            self._console.start(total, step)

    def add(self, values: Mapping[str, float]) -> None:
        """Put values into the next step's line."""
        self._added |= values

    def note(self, step: int, text: str) -> None:
        """Tell the user something."""
        if self._console is not None:
            self._console.note(text)
        self._log({"step": step, "note": text})

    def step(self, record: Record) -> None:
        """A step was taken."""
        line = {**line_of(record), **self._added}
        self._added = {}
        if record.metrics.skipped:
            self.note(line["step"], f"step {line['step']} was skipped: its loss is {line['loss']}")
        self._log(line)
        if self._console is not None:
            self._console.step(line)

    def evaluation(self, step: int, found: Mapping[str, float]) -> None:
        """Held-out numbers."""
        line = {"step": step, "evaluation": dict(found)}
        self._log(line)
        if self._console is not None:
            self._console.evaluation(line)

    def describe(self, describe: Callable[[], Mapping[str, Any]]) -> None:
        """Write run.json; `describe` is asked only where it is written."""
        if self._folder is not None:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            self._info = {**describe(), "started": started}
            self._write("running")

    def close(self, status: str) -> None:
        """Say in run.json how the run ended, and close the files."""
        if self._info:
            with suppress(OSError):  # a full disk must not hide how it ended
                self._write(status)
        if self._console is not None:
            self._console.close()
        for close in self._closing:
            close()

    def _log(self, line: dict[str, Any]) -> None:
        for logger in self._loggers:
            logger(line)

    def _write(self, status: str) -> None:
        assert self._folder is not None
        aside = self._folder / ".run.json"
        aside.write_text(json.dumps({**self._info, "status": status}, indent=1))
        aside.replace(self._folder / "run.json")


def open_journal(folder: Path, step: int, loggers: Sequence[Logger], *, quiet: bool) -> Journal:
    """The journal of rank 0: metrics.jsonl, TensorBoard where it is installed, and `loggers`.

    Args:
        folder: of the run.
        step: from which it goes on; later lines of an earlier start are dropped.
        loggers: the user's.
        quiet: no display.
    """
    lines = JsonLines(folder / "metrics.jsonl", resumed_at=step)
    own: list[Logger] = [lines]
    closing = [lines.close]
    with suppress(UsageError):  # the tensorboard extra is not installed
        board = TensorBoard(folder / "tensorboard", resumed_at=step)
        own.append(board)
        closing.append(board.close)
    return Journal(folder, (*own, *loggers), None if quiet else Console(), closing)


def line_of(record: Record) -> dict[str, Any]:
    """A step's line of metrics.jsonl."""
    metrics, timing = record.metrics, record.timing
    line: dict[str, Any] = {
        "step": metrics.step + 1,
        "loss": metrics.loss,
        "lr": record.lr,
        "samples": record.samples,
        "seconds": record.seconds,
        "time": {
            "data": timing.data,
            "compute": timing.compute,
            "communication": timing.communication,
            "update": timing.update,
        },
        **metrics.metrics,
    }
    if metrics.gradient_norm is not None:
        line["gradient_norm"] = metrics.gradient_norm
    return line
