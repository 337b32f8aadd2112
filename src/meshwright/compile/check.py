"""Checks of values, which a trace cannot read: taken to pass, and watched as the program runs.

`if labels.max() >= classes: raise` and `if not isfinite(x).all(): x = clamp(x)` are Python's, but
which way they go is known beforehand: statements that only raise are not to, `all` holds, `any`
does not. How often it was otherwise is summed with the loss, and a step where it was is refused.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from meshwright.compile.trace import is_user_file

__all__ = ["Checks"]

aten = torch.ops.aten
_EVERY = {aten.all.default, aten._is_all_true.default}
_SOME = {aten.any.default, aten._is_any_true.default}
_NOT = {aten.logical_not.default, aten.bitwise_not.default}
_READ = aten._local_scalar_dense.default
_MOST = 300
"""Checks of one line; more of them is a loop that waits for a value."""


@dataclass(frozen=True, slots=True)
class _Expected:
    """What a scalar should be, and how many elements speak against it."""

    scalar: Tensor  # kept, since it is known by its id
    value: bool
    against: Tensor


class Checks(TorchDispatchMode):
    """Reads of conditions under it are answered; `totals` is what speaks against the answers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.totals: dict[str, Tensor] = {}
        self._known: dict[int, _Expected] = {}
        self._times: dict[str, int] = {}

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _READ and args[0].dtype == torch.bool and (said := self._answer(args[0])):
            return said.value
        result = func(*args, **(kwargs or {}))
        known = _expected(func, args[0], result, self._known) if args else None
        if known is not None:
            self._known[id(result)] = known
        return result

    def _answer(self, scalar: Tensor) -> _Expected | None:
        """What is read, noted; None where nothing says what it should be."""
        frame = _user_frame()
        if frame is None:
            return None
        known, required = self._known.get(id(scalar)), _required(frame)
        if required is not None and (known is None or known.value is not required):
            known = _Expected(scalar, required, scalar.logical_not() if required else scalar)
        if known is None:
            return None
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self._times[line] = times = self._times.get(line, 0) + 1
        if times > _MOST:
            return None
        name = f"check/{line}" if times == 1 else f"check/{line}#{times}"
        self.totals[name] = known.against.sum()
        return known


def _expected(func: Any, x: Any, scalar: Any, known: dict[int, _Expected]) -> _Expected | None:
    """What the result of an op should be: `all` is true, `any` is not."""
    if func in _EVERY:
        return _Expected(scalar, value=True, against=x == 0)
    if func in _SOME:
        return _Expected(scalar, value=False, against=x != 0)
    if func in _NOT and id(x) in known:
        return _Expected(scalar, not known[id(x)].value, known[id(x)].against)
    return None


def _user_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _required(frame: FrameType) -> bool | None:
    """What the condition that a frame reads must be, if its statement does nothing but raise."""
    line = frame.f_lineno
    for test, value in _tests(frame.f_code.co_filename):
        if test.lineno <= line <= (test.end_lineno or test.lineno):
            return _polarity(test, value, _span(frame))
    return None


_Span = tuple[int | None, int | None, int | None, int | None]


def _span(frame: FrameType) -> _Span:
    """(line, end line, column, end column) of the expression that a frame is at."""
    return next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))


def _polarity(node: ast.expr, value: bool, span: _Span) -> bool | None:
    """What the expression at `span` must be where `node`, which holds it, is to be `value`."""
    if (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == span:
        return value
    inner: list[ast.expr] = []
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner, value = [node.operand], not value
    elif isinstance(node, ast.BoolOp):
        inner = node.values
    found = (_polarity(part, value, span) for part in inner)
    return next((said for said in found if said is not None), None)


@lru_cache(maxsize=64)
def _tests(file: str) -> tuple[tuple[ast.expr, bool], ...]:
    """The conditions of a file's statements that only raise, and what each is to be."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ()
    return tuple(_checks(tree))


def _checks(tree: ast.AST) -> Iterator[tuple[ast.expr, bool]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.test, True
        elif isinstance(node, ast.If) and _raises(node.body):
            yield node.test, False


def _raises(body: list[ast.stmt]) -> bool:
    """Whether statements end in an error, whatever message they put together for it."""
    told = all(isinstance(part, ast.Expr | ast.Assign) for part in body[:-1])
    return told and isinstance(body[-1], ast.Raise)
