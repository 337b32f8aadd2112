"""Run folders: `runs/<file>-<NNN>`, which one a start uses, and whether it goes on from there."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from meshwright.errors import StorageError, UsageError

__all__ = ["Choice", "choose"]

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
        resume: go on with the newest run of this file.
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
        if fresh and not overwrite and run_dir.is_dir() and any(run_dir.iterdir()):
            raise UsageError(
                f"--fresh, but {run_dir} is not empty; use another --run-dir, or --overwrite to "
                "lose it"
            )
        if fresh and overwrite:
            _empty(run_dir)
        return Choice(_made(run_dir), not fresh)
    numbered = sorted(_numbered(stem, root))
    if resume:
        if not numbered:
            raise UsageError(
                f"--resume, but there is no run of {stem} in {root}; start one without --resume"
            )
        return Choice(root / f"{stem}-{numbered[-1]:03d}", resume=True)
    return Choice(_next(stem, root, numbered[-1] + 1 if numbered else 1), resume=False)


def _numbered(stem: str, root: Path) -> list[int]:
    """Numbers of the runs of this file."""
    if not root.is_dir():
        return []
    found = (re.fullmatch(re.escape(stem) + r"-(\d+)", path.name) for path in root.iterdir())
    return [int(match[1]) for match in found if match]


def _next(stem: str, root: Path, number: int) -> Path:
    """The first free number's folder, made; two starts at once get two folders."""
    while True:
        path = root / f"{stem}-{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise StorageError(f"cannot make the run folder {path}: {error.strerror}") from error
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
        raise StorageError(f"cannot make the run folder {path}: {error.strerror}") from error
    return path
