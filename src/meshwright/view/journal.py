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

from meshwright.errors import StorageError, UsageError
from meshwright.run.observe.loggers import JsonLines, TensorBoard
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
        own: Sequence[Logger] = (),
        loggers: Sequence[Logger] = (),
        console: Console | None = None,
        closing: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Without a folder nothing is written.

        Args:
            folder: of the run.
            own: loggers into the folder, without which training goes on.
            loggers: the user's.
            console: the display.
            closing: what closes `own`.
        """
        self._folder, self._own, self._loggers = folder, tuple(own), tuple(loggers)
        self._console, self._closing = console, tuple(closing)
        self._warned: set[int] = set()
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
            self.note(line["step"], _skipped(record))
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

    @property
    def told(self) -> Mapping[str, Any]:
        """What run.json says; empty where none is written."""
        return self._info

    def amend(self, more: Mapping[str, Any]) -> None:
        """Have run.json say this too, once it is closed."""
        if self._info:
            self._info |= more

    def close(self, status: str) -> None:
        """Say in run.json how the run ended, and close the files."""
        if self._info:
            with suppress(StorageError):  # a full disk must not hide how it ended
                self._write(status)
        if self._console is not None:
            self._console.close()
        for close in self._closing:
            with suppress(OSError):
                close()

    def _log(self, line: dict[str, Any]) -> None:
        for logger in self._own:
            try:
                logger(line)
            except (OSError, StorageError) as error:
                self._warn(logger, error)
        for logger in self._loggers:
            logger(line)

    def _warn(self, logger: Logger, error: Exception) -> None:
        """A full disk ends no training: it is told once, and later lines are tried again."""
        if id(logger) not in self._warned and self._console is not None:
            self._console.note(f"{error}; training goes on without these lines")
        self._warned.add(id(logger))

    def _write(self, status: str) -> None:
        assert self._folder is not None
        aside, path = self._folder / ".run.json", self._folder / "run.json"
        try:
            aside.write_text(json.dumps({**self._info, "status": status}, indent=1))
            aside.replace(path)
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror}; free the disk, or use another --run-dir"
            ) from error


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
    return Journal(folder, own, loggers, None if quiet else Console(), closing)


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
    if metrics.phase:
        own = {"loss": metrics.loss, "lr": record.lr, **metrics.metrics}
        line |= {"phase": metrics.phase, metrics.phase: own}
    if metrics.gradient_norm is not None:
        line["gradient_norm"] = metrics.gradient_norm
    if metrics.loss_scale is not None:
        line["loss_scale"] = metrics.loss_scale
    if metrics.gain is not None:
        line |= {"adascale_gain": metrics.gain, "adascale_iterations": metrics.iterations}
    return line


def _skipped(record: Record) -> str:
    """Why nothing of a step was applied."""
    metrics = record.metrics
    if metrics.overflowed:
        why = f"its gradients overflowed fp16 at a loss scale of {metrics.loss_scale:g}"
    else:
        why = f"its loss is {metrics.loss}"
    return f"step {metrics.step + 1} was skipped: {why}"
