"""Results on stdout: JSON, or for people."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import select
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from meshwright.errors import StorageError

__all__ = ["log", "print_json", "program", "show", "silenced", "user_output", "write_json"]

_WIDE = 240


def show(*parts: RenderableType) -> None:
    """Print for people; into a file or a pipe, lines are as long as they need to be."""
    if sys.stdout.isatty():
        Console(highlight=False).print(*parts, sep="\n")
        return
    page = Console(file=io.StringIO(), highlight=False, width=_WIDE, color_system=None)
    page.print(*parts, sep="\n")
    text = page.file.getvalue() if isinstance(page.file, io.StringIO) else ""
    print("\n".join(line.rstrip() for line in text.splitlines()), flush=True)


def print_json(value: Mapping[str, Any]) -> None:
    """Print strict JSON: a number that is not finite becomes its name, as text."""
    print(json.dumps(_strict(value), indent=2, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return value


def program() -> str:
    """How to call this program from here: `mw`, or where it is if the shell would not find it."""
    if shutil.which("mw"):
        return "mw"
    beside = Path(sys.executable).with_name("mw")
    if not beside.exists():
        return f"{sys.executable} -m meshwright"
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)


def log(text: str) -> None:
    """Print a line of the log; a reader that has gone is no reason to end."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        silenced()


def silenced() -> bool:
    """Whether a reader of what this process prints has gone; what is still printed goes nowhere."""
    gone = [number for number in (1, 2) if _unread(number)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in gone:
        os.dup2(nowhere, number)
    os.close(nowhere)
    return bool(gone)


def _unread(number: int) -> bool:
    """Whether a descriptor is a pipe (or socket) that was closed at its other end."""
    poll = select.poll()
    poll.register(number, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


@contextlib.contextmanager
def user_output(*, aside: bool) -> Iterator[None]:
    """Within, what the user's code prints goes to stderr, where stdout is for JSON alone."""
    with contextlib.redirect_stdout(sys.stderr) if aside else contextlib.nullcontext():
        yield


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON, all of it or none.

    Raises:
        StorageError: the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(json.dumps(_strict(value), indent=2, allow_nan=False) + "\n")
        aside.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
