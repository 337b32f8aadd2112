"""Staleness: what a program would freeze without a word is refused.

Tracing turns Python values into constants: a counter that the forward advances, a draw from
Python's or numpy's generators. Each is caught by looking before and after.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

import numpy as np
from torch import nn

from meshwright.compile.trace import is_user_file
from meshwright.errors import UserCodeError

__all__ = ["not_stale", "python_seeded"]

_Made = TypeVar("_Made")


@contextlib.contextmanager
def python_seeded(seed: int) -> Iterator[None]:
    """Python's and numpy's global generators seeded alike on every rank, and restored."""
    before, before_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


def not_stale(run: Callable[[], _Made], module: nn.Module, seed: int) -> _Made:
    """What `run` makes, if it neither draws from outside nor changes plain attributes of `module`.

    Where it does, it is run once more, line by line, to find the user's line. Draws that do not
    come again (of a module that was imported meanwhile) freeze nothing, nor do attributes that only
    the first run sets: what a run makes with them set is for the caller to compare.

    Args:
        run: traces the user's forward.
        module: the user's.
        seed: of Python's and numpy's generators meanwhile.

    Raises:
        UserCodeError: it does; names the line.
    """
    before = _attributes(module)
    with python_seeded(seed):
        draws = {name: state() for name, state in _GENERATORS.items()}
        made = run()
        for name, state in _GENERATORS.items():
            line = _line(run, state) if state() != draws[name] else None
            if line is not None:
                raise UserCodeError(
                    f"{line}the forward draws from {name}, which a program would "
                    "freeze to one value; draw by torch (torch.rand, torch.bernoulli), or use "
                    "--eager"
                )
    _require_unchanged(run, module, before)
    return made


def _require_unchanged(
    run: Callable[[], object], module: nn.Module, before: Mapping[str, Any]
) -> None:
    """A program would change an attribute once, then never; so may a forward."""
    after = _attributes(module)
    if after == before:
        return
    run()
    if _attributes(module) == after:
        return
    for name, value in after.items():
        old = before.get(name, _ABSENT)
        if old is _ABSENT or old != value:
            _put_back(module, name, old)
            line = _line(run, lambda n=name: _attributes(module).get(n, _ABSENT))  # type: ignore[misc]
            was = "nothing" if old is _ABSENT else repr(old)
            raise UserCodeError(
                f"{line or ''}the forward changes {name} from {was} to {value!r}, which a program "
                "would freeze; keep it in a buffer (register_buffer), or use --eager"
            )


def _numpy_state() -> tuple[Any, ...]:
    """numpy's global generator as a value that can be compared."""
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    inner = state["state"]
    return tuple(inner["key"].tolist()), inner["pos"]


_GENERATORS = {"Python's random module": random.getstate, "numpy.random": _numpy_state}
_PLAIN = (bool, int, float, str, type(None))
_ABSENT = object()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of all modules, by path: a program bakes these in."""
    return {
        f"{path}.{name}" if path else name: value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, _PLAIN) and name != "training"
    }


def _put_back(module: nn.Module, path: str, value: object) -> None:
    where, _, name = path.rpartition(".")
    part = module.get_submodule(where)
    if value is _ABSENT:
        delattr(part, name)
    else:
        setattr(part, name, value)


def _line(run: Callable[[], object], probe: Callable[[], object]) -> str | None:
    """`file:line: ` of the user's line after which `probe` changes while `run` runs again.

    None where it does not change; nothing where no line of the user's did it.
    """
    before, found, last = probe(), "", ""

    def step(frame: FrameType, event: str, _: object) -> Any:
        nonlocal found, last
        if not is_user_file(frame.f_code.co_filename):
            return None
        if not found and probe() != before:
            found = last
        if event == "return" and frame.f_back is not None:
            frame = frame.f_back
        if is_user_file(frame.f_code.co_filename):
            last = f"{frame.f_code.co_filename}:{frame.f_lineno}: "
        return step

    traced = sys.gettrace()
    sys.settrace(step)
    try:
        run()
    finally:
        sys.settrace(traced)
    return (found or last) if probe() != before else None
