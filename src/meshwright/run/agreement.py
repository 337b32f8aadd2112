"""Before new batches run, all ranks compare what they traced from them, op by op if need be."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from meshwright.comm.base import Group, gather_json
from meshwright.comm.handshake import agree
from meshwright.errors import UsageError
from meshwright.program.program import Arg, Op, Program, Ref, Symbol

__all__ = ["same_programs"]


def same_programs(programs: Sequence[Program], group: Group) -> Generator[Any, Any, None]:
    """Compare the programs of a step's micro-batches over the members of `group`.

    Raises:
        UsageError: on every member: they differ; names the first op that does, and its lines.
    """
    try:
        yield from agree({"traced program": "-".join(p.digest for p in programs)}, group)
    except UsageError as error:
        different = error
    else:
        return
    ops = [op for program in programs for op in program.ops]
    hashes = [hashlib.sha256(_text(op).encode()).hexdigest()[:8] for op in ops]
    everyone = yield from gather_json(hashes, group, label="programs that differ")
    first = next((k for k, found in enumerate(zip_longest(*everyone)) if len(set(found)) > 1), None)
    if first is not None:
        mine = f"{_text(ops[first])}{_place(ops[first])}" if first < len(ops) else "not there"
        yield from agree({"the first op of the model or loss that differs": mine}, group)
    raise different


def _text(op: Op) -> str:
    """An op and its arguments, as `mul(%3, 2.0)`; tensors are the numbers of values."""
    named = () if op.name.startswith("comm.") else op.kwargs
    parts = [_argument(a) for a in op.args] + [f"{k}={_argument(v)}" for k, v in named]
    return f"{op.base.removeprefix('aten.')}({', '.join(parts)})"


def _argument(arg: Arg) -> str:
    if isinstance(arg, Ref):
        return f"%{arg.index}"
    if isinstance(arg, Symbol):
        return arg.name
    if isinstance(arg, tuple):
        return f"[{', '.join(map(_argument, arg))}]"
    return repr(arg)


def _place(op: Op) -> str:
    """Its line, without folders: they may differ between hosts."""
    return f" at {Path(op.source).name}" if op.source else ""
