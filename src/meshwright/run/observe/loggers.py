"""Where records of a run go: a file of JSON lines, TensorBoard, Weights & Biases.

A logger is called with a record, such as `{"step": 20, "loss": 2.1, "evaluation": {...}}`, and has
`close()`. Any function of a record is one too.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from meshwright.errors import StorageError, UsageError

__all__ = ["JsonLines", "TensorBoard", "Wandb", "flattened"]

_Number = float | int | SupportsFloat  # plain numbers first: asking a Protocol takes 6 us


class JsonLines:
    """One line of strict JSON per record, flushed at once; NaN and infinity are written as null."""

    def __init__(self, path: str | os.PathLike[str], resumed_at: int | None = None) -> None:
        """Open for appending.

        Args:
            path: the file; its folder is made.
            resumed_at: the step that a resumed run goes on from: lines of later steps, which will
                be run again, and a line cut short by a crash are dropped.

        Raises:
            StorageError: the file cannot be written.
        """
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resumed_at is not None and self.path.exists():
                _drop_after(self.path, resumed_at)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Write a record.

        Raises:
            StorageError: the disk refused.
            UsageError: a value that JSON cannot hold.
        """
        try:
            line = json.dumps(_strict(record), allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise UsageError(f"a record cannot be written as JSON: {error}; log numbers") from error
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars by step, `evaluation/loss` and `time/data` for nested ones; notes as text."""

    def __init__(self, folder: str | os.PathLike[str], resumed_at: int | None = None) -> None:
        """Open an event file in `folder`; with `resumed_at`, later steps are hidden.

        Raises:
            UsageError: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "the TensorBoard logger needs tensorboard; run "
                "`pip install meshwright[tensorboard]`"
            ) from error
        purge = None if resumed_at is None else resumed_at + 1
        self._folder = Path(folder)
        self._told = threading.excepthook
        threading.excepthook = self._failed
        self._writer: Any = SummaryWriter(os.fspath(folder), purge_step=purge)

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Write a record.

        Raises:
            StorageError: the disk refused this record or, more likely, one before.
        """
        step = int(record.get("step", 0))
        try:
            values = flattened(record)
            if values:
                self._writer.file_writer.add_summary(self._summary(values), step)
            if "note" in record:
                self._writer.add_text("note", str(record["note"]), step)
        except OSError as error:
            raise _cannot_write(self._folder, error) from error

    def close(self) -> None:
        """Write what is pending and close."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._told

    @staticmethod
    def _summary(values: Mapping[str, float]) -> Any:
        """One event for all of a step's values: eight events cost twice as much."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        return Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])

    def _failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread raises again at the next call, which is where it is told."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._told(failure)


class Wandb:
    """A run at Weights & Biases; the keyword arguments are `wandb.init`'s."""

    def __init__(self, **settings: Any) -> None:
        """Begin the run.

        Raises:
            UsageError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise UsageError("the Wandb logger needs wandb; run `pip install wandb`") from error
        self._run: Any = wandb.init(**settings)

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Send a record's numbers."""
        values = flattened(record)
        if values:
            self._run.log(values, step=int(record.get("step", 0)))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def flattened(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """A record's numbers but its step; nested names are joined by `/`."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found.update(flattened(value, f"{prefix}{name}/"))
        elif isinstance(value, _Number) and (prefix or name != "step"):
            found[prefix + name] = float(value)
    return found


def _strict(value: Any) -> Any:
    """`value` with what JSON has no word for replaced: tensors by numbers, NaN by None."""
    if isinstance(value, Mapping):
        return {str(name): _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, _Number):
        number = float(value)
        return number if math.isfinite(number) else None
    return value


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`, written aside and renamed."""
    aside = path.with_name(f".{path.name}.tmp")
    with path.open(encoding="utf-8") as old, aside.open("w", encoding="utf-8") as new:
        new.writelines(line for line in old if _is_kept(line, step))
    aside.replace(path)


def _is_kept(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    at = record.get("step") if isinstance(record, dict) else None
    return line.endswith("\n") and isinstance(at, int) and at <= step


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}; free or change the disk")
