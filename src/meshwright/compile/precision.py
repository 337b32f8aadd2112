"""Precision: what computes in 16 bits while what stays from step to step is float32.

A unit of `precision=bf16` or `fp16` is traced with the user's code under `torch.autocast`, whose
policy users know: products in 16 bits, sums that need it in float32. Weights, gradients,
accumulators, optimizer and buffers keep their dtype, so the casts between are ops of the Program.
Under `bf16-pure` the weights are bf16 themselves (`region.py`), and so are their gradients.

To verify such a program in float64, it is run as it is with every cast, creation and 16- or 32-bit
tensor promoted: same ops, same layouts, same collectives, without the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from meshwright.program.program import Op, Program, map_refs, without_dead_ops

__all__ = [
    "DTYPES",
    "Promoting",
    "computing",
    "notes_on",
    "promoted",
    "promoting",
    "with_shared_casts",
]

_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}


DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "bf16-pure": torch.bfloat16,
    "fp16": torch.float16,
}
"""What a plan's precision casts to."""


@contextmanager
def computing(precision: str) -> Iterator[None]:
    """Run user code in the dtype of a plan's `precision`; the backward is to run outside.

    A parameter is cast once however often it is read: autocast keeps its casts until the end of the
    outermost region, which is here and now.
    """
    if precision not in DTYPES:
        yield
        return
    torch.clear_autocast_cache()
    with torch.autocast("cpu", dtype=DTYPES[precision]):
        yield


def notes_on(precision: str) -> tuple[str, ...]:
    """What to tell a user who asks for this precision on this processor."""
    has: Mapping[str, Any] = torch.cpu.get_capabilities()
    kind = precision.partition("-")[0]
    if precision not in DTYPES or any(there for name, there in has.items() if kind in name):
        return ()
    slow = f"this processor has no {kind} instructions ({_INSTRUCTIONS[kind]})"
    return (f"{slow}: precision={precision} gives the right numbers here, but slower than float32",)


_INSTRUCTIONS = {
    "bf16": "such as AVX512-BF16 or AMX",
    "fp16": "such as AVX512-FP16 or AMX-FP16",
}


def with_shared_casts(program: Program) -> Program:
    """The program in which a value that several ops read in another dtype is cast once.

    Autocast shares the casts of parameters only: a layer's input, read by three projections, would
    be cast three times. Within a phase, so that nothing more is kept for the backward.
    """
    seen: dict[Any, int] = {}
    same: dict[int, int] = {}
    ops: list[Op] = []
    for op in program.ops:
        args, kwargs = map_refs((op.args, op.kwargs), lambda v: same.get(v, v))
        op = replace(op, args=args, kwargs=kwargs)  # noqa: PLW2901
        if op.base == "aten._to_copy":
            known = seen.setdefault((op.phase, args, kwargs), op.results[0])
            if known != op.results[0]:
                same[op.results[0]] = known
                continue
        ops.append(op)
    outputs = tuple((name, same.get(value, value)) for name, value in program.outputs)
    return without_dead_ops(replace(program, ops=tuple(ops), outputs=outputs))


class Promoting(TorchDispatchMode):
    """Every op under it computes in float64 what it would in a shorter floating dtype."""

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = promoted(func, args, kwargs or {})
        return func(*args, **kwargs)


def promoting(function: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    """The function with all its ops promoted to float64."""

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        with Promoting():  # type: ignore[no-untyped-call]
            return function(*tensors)

    return run


def promoted(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in float64: dtypes asked for, and tensors that the code brought along.

    What the op writes to stays as it is.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    if not any((x.dtype if isinstance(x, Tensor) else x) in _WIDE for x in leaves):
        return args, kwargs
    schema = func._schema.arguments  # noqa: SLF001 - torch offers no other way to its names
    names = [a.name for a in schema]
    written = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}

    def raised(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(_WIDE.get(leaf.dtype, leaf.dtype))
        return _WIDE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf

    def up(name: str, value: Any) -> Any:
        return value if name in written else pytree.tree_map(raised, value)

    found = tuple(up(name, value) for name, value in zip(names, args, strict=False))
    return found, {name: up(name, value) for name, value in kwargs.items()}
