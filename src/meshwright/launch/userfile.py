"""The user's file: `FILE[:name]` imported, and the job in it, made with the `--set` values.

A file is imported as a module, so that its `__main__` guard does not run, with its own folder first
on the path, as Python does for a script.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from meshwright.errors import MeshwrightError, UsageError, UserCodeError, nearest
from meshwright.job import Job
from meshwright.launch.settings import converted

__all__ = ["load_job", "locate"]

DEFAULT_NAME = "job"


def locate(spec: str) -> tuple[Path, str]:
    """The file and the name in it that `FILE[:name]` means.

    Raises:
        UsageError: there is no such file.
    """
    path, name = Path(spec), DEFAULT_NAME
    if not path.exists() and ":" in spec:
        file, _, name = spec.rpartition(":")
        path = Path(file)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the Python file in it that has the job")
    if not path.is_file():
        raise UsageError(f"{path} is not there; {_near(path)}")
    if not name.isidentifier():
        raise UsageError(f"{spec!r} names {name!r} in {path}, which is no Python name")
    return path, name


def load_job(spec: str, settings: Sequence[str] = ()) -> Job:
    """Import `FILE[:name]` and return its job.

    Args:
        spec: the file, and which Job or function returning one; `job` by default.
        settings: `key=value` texts for the function's parameters.

    Raises:
        UsageError: no such file or name, not a job, a setting that it does not take.
        UserCodeError: the file or the function raised.
    """
    path, name = locate(spec)
    given = _pairs(settings)
    module = _imported(path)
    found = vars(module).get(name)
    if found is None:
        raise UsageError(f"{path} has no {name!r}; {_candidates(path, module)}")
    if not isinstance(found, Job):
        return _made(path, name, found, given)
    if given:
        raise UsageError(
            f"--set {settings[0]}, but {name!r} in {path} is a Job already; make it a function, "
            f"as in `def {name}({next(iter(given))}: int = 1) -> mw.Job`"
        )
    return found


def _near(path: Path) -> str:
    folder = path.parent
    beside = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
    return nearest(path.name, beside) if beside else f"there is no Python file in {folder}"


def _pairs(settings: Sequence[str]) -> dict[str, str]:
    """`key=value` texts by key."""
    found: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set {setting!r} is no key=value; use `--set depth=4`")
        if key in found:
            raise UsageError(f"--set gives {key} twice, {found[key]!r} and {value!r}; keep one")
        found[key] = value
    return found


def _imported(path: Path) -> ModuleType:
    """The file as a module of its stem's name; another module of that name is left alone."""
    file = path.resolve()
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_job_file"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    load: Callable[[ModuleType], None] = spec.loader.exec_module
    _guarded(f"importing {path}", load, module)
    return module


def _guarded(doing: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Call the user's code; what it raises is told as the user's."""
    try:
        return function(*args, **named)
    except MeshwrightError:
        raise
    except SystemExit as error:
        raise UserCodeError(
            f"{doing} ended the program by exit({error.code!r}); put what is to run only as a "
            "script under `if __name__ == '__main__':`"
        ) from error
    except Exception as error:
        raise UserCodeError(
            f"{doing} raised {type(error).__name__}: {error}{_near_argument(error)}"
        ) from error


def _near_argument(error: Exception) -> str:
    """For a mistyped argument of Job, the one that was meant (Python 3.11 does not say)."""
    mistyped = re.match(r"Job\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if mistyped is None:
        return ""
    return "; " + nearest(mistyped[1], [field.name for field in fields(Job)])


def _candidates(path: Path, module: ModuleType) -> str:
    """What to write instead: a job of another name, or how to make one."""
    jobs = [
        name
        for name, value in vars(module).items()
        if isinstance(value, Job)
        or (inspect.isfunction(value) and value.__annotations__.get("return") in _JOBS)
    ]
    if jobs:
        return f"it has {', '.join(jobs)}: use {path}:{jobs[0]}"
    return "define `job = mw.Job(...)`, or a function `job` that returns one"


_JOBS = (Job, "Job", "mw.Job", "meshwright.Job")


def _made(path: Path, name: str, function: Any, given: Mapping[str, str]) -> Job:
    """The job that the user's function returns for these settings."""
    if not callable(function):
        raise UsageError(
            f"{name!r} in {path} is of type {type(function).__name__}, but must be a Job or a "
            "function that returns one"
        )
    what = f"{name}() in {path}"
    values = converted(function, given, what)
    made = _guarded(f"calling {what}", function, **values)
    if not isinstance(made, Job):
        raise UsageError(
            f"{what} returned {type(made).__name__}, but must return a Job: "
            "end it with `return mw.Job(...)`"
        )
    return made
