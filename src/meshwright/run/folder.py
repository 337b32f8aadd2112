"""Run folders: `runs/<file>-<NNN>`, which one a start uses, and whether it goes on from there."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from meshwright.errors import StorageError, UsageError
from meshwright.run.checkpoint.retention import listed

__all__ = ["OFFLOAD", "Choice", "choose"]

OFFLOAD = "offload"
"""The folder, in a run's own, of what it offloads to disk."""

_OURS = ("checkpoints", "failures", "ledger", "logs", "tensorboard", "metrics.jsonl",
         "report.html", "run.json", "verify.json")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choice:
    """The folder of a run, and whether to go on from its checkpoints."""

    path: Path
    resume: bool


def choose(
    stem: str,
    *,
    root: Path = Path("runs"),
    run_dir: Path | None = None,
    resume: bool = False,
    fresh: bool = False,
    overwrite: bool = False,
) -> Choice:
    """Make the folder of a run.

    Args:
        stem: of the user's file; names folders under `root`.
        root: of all runs.
        run_dir: a folder of the user's choice; going on from what is in it is the default.
        resume: go on with the newest run of this file that has a checkpoint, or with `run_dir`,
            which must have one.
        fresh: start anew, and refuse a folder that is not empty.
        overwrite: with `fresh`, remove what an earlier run wrote there.

    Raises:
        UsageError: the choices contradict, or there is nothing to resume.
        StorageError: the folder cannot be made.
    """
    if resume and fresh:
        raise UsageError("--resume and --fresh contradict each other; use one of them")
    if overwrite and not fresh:
        raise UsageError("--overwrite is for --fresh; use `--fresh --overwrite`")
    if run_dir is not None:
        if fresh and not overwrite and run_dir.is_dir() and _used(run_dir):
            raise UsageError(
                f"--fresh, but {run_dir} is not empty; use another --run-dir, or --overwrite to "
                "lose it"
            )
        if resume and not _has_checkpoint(run_dir):
            raise UsageError(
                f"--resume, but {run_dir} has no checkpoint; leave --resume out to start in it"
            )
        if fresh and overwrite:
            _empty(run_dir)
        return Choice(_made(run_dir), not fresh)
    numbered = sorted(_numbered(stem, root))
    if resume:
        # A start that failed early left a folder with nothing to go on from.
        runs = [root / f"{stem}-{number:03d}" for number in reversed(numbered)]
        found = next(filter(_has_checkpoint, runs), None)
        if found is None:
            lacking = "with a checkpoint " if runs else ""
            raise UsageError(
                f"--resume, but there is no run of {stem} {lacking}in {root}; start one without "
                "--resume"
            )
        return Choice(found, resume=True)
    return Choice(_next(stem, root, numbered[-1] + 1 if numbered else 1), resume=False)


def _used(run_dir: Path) -> bool:
    """Whether anything lies there but what this run offloads, which may have begun."""
    return any(found.name != OFFLOAD for found in run_dir.iterdir())


def _numbered(stem: str, root: Path) -> list[int]:
    """Numbers of the runs of this file."""
    if not root.is_dir():
        return []
    found = (re.fullmatch(re.escape(stem) + r"-(\d+)", path.name) for path in root.iterdir())
    return [int(match[1]) for match in found if match]


def _has_checkpoint(run: Path) -> bool:
    """Whether something was saved there; whether it is whole is seen when it is read."""
    folder = run / "checkpoints"
    return folder.is_dir() and bool(listed(path.name for path in folder.iterdir()))


def _next(stem: str, root: Path, number: int) -> Path:
    """The first free number's folder, made; two starts at once get two folders."""
    while True:
        path = root / f"{stem}-{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise StorageError(
                f"cannot make the run folder {path}: {error.strerror}; use another --run-dir"
            ) from error
        else:
            return path


def _empty(path: Path) -> None:
    """Remove what runs have written into a folder, and nothing else."""
    try:
        for name in _OURS:
            thing = path / name
            if thing.is_dir() and not thing.is_symlink():
                shutil.rmtree(thing)
            else:
                thing.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot empty the run folder {path}: {error}") from error


def _made(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make the run folder {path}: {error.strerror}; use another --run-dir"
        ) from error
    return path
