"""Errors of a trace: whose they are, told with the user's line and the way out.

While torch traces the user's code, its own code, ours and the user's call each other in turns, so
that the innermost frame alone does not tell who is to act.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from meshwright.compile.trace import is_our_file, is_user_file
from meshwright.errors import MeshwrightError, NotTraceable, UserCodeError

__all__ = ["blamed"]

_UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
_WORDS = {
    "aten._local_scalar_dense.default": "reads a tensor's value (.item(), bool(), float(), if)",
    "aten.nonzero.default": "makes a shape that depends on values (nonzero, boolean indexing)",
}
_OP_OF_ONES_OWN = "make what computes with them an op (torch.library.custom_op) with an mw.rule"
_NO_VALUES = (".numpy() is not supported", "Cannot access data pointer", "Cannot access storage")
"""How torch says that a tensor of a trace has no values."""


@contextmanager
def blamed(whose: str = "the model or loss") -> Iterator[None]:
    """Within, the user's code is traced.

    Args:
        whose: what runs, in messages.

    Raises:
        NotTraceable: the code does what no program can; names the user's line and `--eager`.
        UserCodeError: the code, or torch called by it, raised.
    """
    try:
        with _told_once():
            yield
    except MeshwrightError:
        raise
    except _UNTRACEABLE as error:
        what = _WORDS.get(str(error.func)) or _uses(error.func)
        raise NotTraceable(_untraceable(error, what)) from error
    except Exception as error:
        files = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
        if is_our_file(files[-1]):
            raise  # a bug of ours, whoever called
        if any(text in str(error) for text in _NO_VALUES):
            what = "takes a tensor's values (.numpy())"
            raise NotTraceable(_untraceable(error, what, _OP_OF_ONES_OWN)) from error
        if not any(map(is_user_file, files)):
            whose = "backward of the loss"
        raise UserCodeError(f"{whose} raised {type(error).__name__}: {error}") from error


def _uses(func: Any) -> str:
    """What an op that cannot be traced does."""
    name = func._schema.name.replace("aten::", "torch.")  # noqa: SLF001 - without its overload
    if torch.Tag.dynamic_output_shape in func.tags:
        return f"makes a shape that depends on values ({name})"
    return f"uses {name}"


def _untraceable(
    error: BaseException, what: str, remedy: str = "write it with torch.where or fixed shapes"
) -> str:
    return (
        f"{_line_of(error)}: the model {what}, which cannot be traced into a program; {remedy}, or "
        "run it with --eager"
    )


def _line_of(error: BaseException) -> str:
    """The innermost user line of a traceback."""
    lines = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    known = [f"{file}:{line}" for file, line in lines if is_user_file(file)]
    return known[-1] if known else "the model"


@contextmanager
def _told_once() -> Iterator[None]:
    """torch logs a traceback for operands that do not fit; the exception says the same."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
