"""A run folder, read: `run.json`, `metrics.jsonl` and `verify.json`, each where it is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.errors import StorageError, UsageError
from meshwright.view.again import remat_line
from meshwright.view.fields import finite, integer, mapping, numbers, text
from meshwright.view.history import History, parse_history
from meshwright.view.measured import Compared, compared
from meshwright.view.parts import Part, read_parts
from meshwright.view.runfile import Setup, parse_setup

__all__ = ["Folder", "Verification", "parse_verification", "read_folder", "read_record"]


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify.json` says: `errors` are the worst relative error of each kind of tensor.

    With `recurrence` they are against what an asynchronous pipeline computes, by its paper.
    """

    passed: bool
    plan: str
    ranks: int
    steps: int
    dtype: str
    errors: tuple[tuple[str, float], ...]
    laws: tuple[tuple[str, float], ...]
    worst_tensor: str
    recurrence: bool = False

    def law(self, kind: str) -> float | None:
        """The bound that `kind` is held to."""
        laws = dict(self.laws)
        return laws.get(kind, laws.get(""))


@dataclass(frozen=True, slots=True)
class Folder:
    """A run folder's contents.

    Attributes:
        measured: what ranks held, beside their bills.
        remat: what is computed again, in a sentence.
    """

    path: Path
    setup: Setup
    history: History
    verification: Verification | None
    trace: Sequence[Part] = ()
    measured: Sequence[Compared] = ()
    remat: str = ""


def read_record(path: Path) -> Mapping[str, Any]:
    """The decoded `run.json` of a run folder; empty where there is none.

    Raises:
        StorageError: it cannot be read.
    """
    return _load(path / "run.json") if (path / "run.json").is_file() else {}


def read_folder(path: Path) -> Folder:
    """The run in `path`.

    Raises:
        UsageError: `path` is no run folder.
        StorageError: a file in it cannot be read.
    """
    if not (path / "run.json").is_file():
        rule = "has no run.json" if path.is_dir() else "is not a folder"
        raise UsageError(
            f"{path} {rule}, so it is no run folder; "
            "name one that `mw train` made, such as runs/train-001"
        )
    verify, metrics = path / "verify.json", path / "metrics.jsonl"
    run = _load(path / "run.json")
    return Folder(
        path=path,
        setup=parse_setup(run),
        history=parse_history(_text(metrics).split("\n")) if metrics.is_file() else History(),
        verification=parse_verification(_load(verify)) if verify.is_file() else None,
        trace=tuple(part for part in read_parts(path) if part.slices),
        measured=compared(run),
        remat=remat_line(run),
    )


def parse_verification(verify: Mapping[str, Any]) -> Verification:
    """The verification that the decoded `verify.json` describes; `law` is one bound or several."""
    law = verify.get("law")
    single = finite(law)
    return Verification(
        passed=verify.get("passed") is True,
        plan=text(verify.get("plan")),
        ranks=integer(verify.get("ranks"), 1),
        steps=integer(verify.get("steps")),
        dtype=text(verify.get("dtype")).removeprefix("torch."),
        errors=_errors(verify.get("worst_relative_error")),
        laws=numbers(law) if single is None else (("", single),),
        worst_tensor=text(verify.get("worst_tensor")),
        recurrence=verify.get("recurrence") is True,
    )


def _errors(value: Any) -> tuple[tuple[str, float], ...]:
    """Errors by kind; one that is NaN or infinite is kept as infinite, the worst there is."""
    kinds = mapping(value)
    return tuple(
        (kind, float("inf") if (error := finite(kinds[kind])) is None else error)
        for kind in kinds
        if kinds[kind] is not None
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error


def _load(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise StorageError(
            f"{path} is not JSON ({error}); it was damaged or written by hand, "
            "and the run that made it has to write it again"
        ) from error
    if not isinstance(value, Mapping):
        raise StorageError(f"{path} holds a JSON {type(value).__name__}; it must hold an object")
    return value
