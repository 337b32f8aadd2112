"""Segments compiled by torch's inductor: fused C++ loops in place of one kernel per op.

A segment is compiled when it first runs, since only then the strides of its operands are known; for
other strides it is compiled again. Segments that are equal are one already. What inductor makes is
kept on disk (TORCHINDUCTOR_CACHE_DIR), under locks, so that of the ranks of one host one compiles
what all need, and the next run compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, fx

from meshwright.errors import UsageError

__all__ = ["Compiled", "require_compiler"]

Segment = Callable[..., Sequence[Tensor]]


@final
class Compiled:
    """A segment that compiles itself."""

    def __init__(self, module: fx.GraphModule, traced: Segment) -> None:
        """Nothing is compiled yet.

        Args:
            module: the segment's graph.
            traced: runs it op by op, and tells which op failed.
        """
        self.module, self.traced = module, traced
        self.forms: dict[tuple[tuple[int, ...], ...], Segment] = {}

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Run; where that fails the ops are run one by one, for the sake of the message."""
        form = tuple(tensor.stride() for tensor in tensors)
        if form not in self.forms:
            self.forms[form] = _compiled(self.module, tensors)
        try:
            return self.forms[form](*tensors)
        except Exception:
            self.traced(*tensors)
            raise


def _compiled(module: fx.GraphModule, tensors: Sequence[Tensor]) -> Segment:
    from torch._inductor import config  # imports take a second
    from torch._inductor.compile_fx import compile_fx

    # No pool of compiling processes: they would outlive a rank that is killed.
    with torch.no_grad(), config.patch(compile_threads=1):
        made: Any = compile_fx(module, list(tensors))
    return torch.no_grad()(made)  # type: ignore[no-any-return]


def require_compiler() -> None:
    """See that compiling works, on a loop of one line.

    Raises:
        UsageError: there is no compiler, or it cannot build what inductor writes.
    """
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    remedy = "install g++ (on Debian: apt-get install g++ python3-dev), or leave --compile out"
    one = torch.zeros(64)
    module = fx.symbolic_trace(_probe)
    try:
        _compiled(module, [one])(one)
    except InvalidCxxCompiler:
        raise UsageError(f"--compile needs a C++ compiler, and none was found; {remedy}") from None
    except CppCompileError as error:
        reason = next((line for line in error.output.splitlines() if "error" in line), error.output)
        raise UsageError(
            f"--compile needs a C++ compiler, and {error.cmd[0]} failed: {reason}; {remedy}"
        ) from error


def _probe(x: Tensor) -> tuple[Tensor]:
    return (torch.ops.aten.exp.default(x),)
