"""Segments compiled by torch's inductor: fused C++ loops in place of one kernel per op.

A segment is compiled when it first runs, since only then the strides of its operands are known; for
other strides it is compiled again. Segments that are equal are one already. What inductor makes is
kept on disk (TORCHINDUCTOR_CACHE_DIR), under locks, so that of the ranks of one host one compiles
what all need, and the next run compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, final

import torch
from torch import Tensor, fx
from torch._ops import OpOverload, OpOverloadPacket

from meshwright.errors import UsageError

__all__ = ["Compiled", "compile_module", "require_compiler"]

aten = torch.ops.aten

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
        self.forms: dict[Hashable, Segment] = {}

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Run; where that fails the ops are run one by one, for the sake of the message."""
        form = tuple([(tensor.shape, tensor.stride()) for tensor in tensors])
        if form not in self.forms:
            self.forms[form] = compile_module(self.module, tensors)
        try:
            return self.forms[form](*tensors)
        except Exception:
            self.traced(*tensors)
            raise


def compile_module(module: fx.GraphModule, tensors: Sequence[Tensor]) -> Segment:
    """What runs the graph on tensors of these shapes and strides."""
    from torch._inductor import config  # imports take a second
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    left_whole = {
        op: rule for op, rule in select_decomp_table().items() if op not in _overloads(_CHECKED)
    }
    # No pool of compiling processes: they would outlive a rank that is killed.
    with torch.no_grad(), config.patch(compile_threads=1), _as_they_are(_CHECKED):
        own = deepcopy(module)  # inductor changes what it is given
        made: Any = compile_fx(own, list(tensors), decompositions=left_whole)
    return torch.no_grad()(made)  # type: ignore[no-any-return]


_CHECKED = (
    aten.embedding,
    aten.embedding_dense_backward,
    aten.gather,
    aten.index,
    aten.index_add,
    aten.index_copy,
    aten.index_fill,
    aten.index_put,
    aten.index_select,
    aten.nll_loss_forward,
    aten.nll_loss_backward,
    aten.nll_loss2d_forward,
    aten.nll_loss2d_backward,
    aten.scatter,
    aten.scatter_add,
    aten.scatter_reduce,
    aten.take,
)
"""Ops that look at indices. Fused, they would end the process (an exception leaves a thread of
OpenMP) when an index is out of range; as they are, they raise an error that can be told."""


def _overloads(packets: Sequence[OpOverloadPacket]) -> frozenset[OpOverload]:
    return frozenset(getattr(packet, name) for packet in packets for name in packet.overloads())


@contextmanager
def _as_they_are(packets: Sequence[OpOverloadPacket]) -> Iterator[None]:
    """Within, inductor calls these ops' own kernels."""
    from torch._inductor.lowering import fallback_handler, lowerings

    own: dict[Any, Any] = {
        op: fallback_handler(op, add_to_fallback_set=False) for op in _overloads(packets)
    }
    before = {op: lowerings[op] for op in own if op in lowerings}
    lowerings.update(own)
    try:
        yield
    finally:
        for op in own:
            del lowerings[op]
        lowerings.update(before)


def require_compiler() -> None:
    """See that compiling works, on one op.

    Raises:
        UsageError: there is no compiler, or it cannot build what inductor writes.
    """
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    one = torch.zeros(64)
    try:
        compile_module(fx.symbolic_trace(_probe), [one])(one)
    except InductorError as error:
        cause = error.inner_exception
        if isinstance(cause, InvalidCxxCompiler):
            problem = "none was found"
        elif isinstance(cause, CppCompileError):
            lines = cause.output.splitlines() or [""]
            told = next((line for line in lines if "error" in line), lines[0])
            problem = f"{cause.cmd[0]} failed: {told}"
        else:
            raise
        raise UsageError(
            f"--compile needs a C++ compiler, and {problem}; install one (on Debian: apt-get "
            "install g++ python3-dev), or leave --compile out"
        ) from error


def _probe(x: Tensor) -> tuple[Tensor]:
    return (torch.ops.aten.exp.default(x),)
