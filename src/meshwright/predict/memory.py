"""The memory bill: what a rank's compiled programs hold, in named parts, in bytes.

Storages are counted, not tensors: a view carries its base. Within a program a value lives from the
op that makes it to the last one that reads it, as the lowered code frees it.
"""

from __future__ import annotations

from collections.abc import Collection

from meshwright.program.assemble import Compiled
from meshwright.program.donate import bases
from meshwright.program.program import Op, Program

__all__ = ["brought", "live_bytes", "memory_bill"]


def live_bytes(program: Program) -> tuple[int, int]:
    """(saved, peak): bytes made in the forward that the backward reads, and the most alive at once.

    Inputs (state, the batch) are not counted. Outputs stay to the end.
    """
    base = bases(program)
    inputs = {base[value] for _, value in program.inputs}
    end: dict[int, int] = {base[value]: len(program.ops) for _, value in program.outputs}
    for place, op in enumerate(program.ops):
        for value in op.inputs:
            end[base[value]] = max(end.get(base[value], 0), place)
    alive, peak, saved = 0, 0, 0
    dying: dict[int, list[int]] = {}
    for place, op in enumerate(program.ops):
        for value in op.results:
            if base[value] == value and value not in inputs:
                last = max(end.get(value, place), place)
                alive += program.values[value].bytes
                dying.setdefault(last, []).append(value)
                # A weight that is gathered ahead for the backward is there, but is not saved.
                saved += program.values[value].bytes if _is_saved(program, op, last) else 0
        peak = max(peak, alive)
        alive -= sum(program.values[value].bytes for value in dying.pop(place, []))
    return saved, peak


def _is_saved(program: Program, op: Op, last: int) -> bool:
    """Whether what a forward op makes is last read by one of the backward."""
    read = last < len(program.ops) and program.ops[last].phase == "backward"
    return op.phase == "forward" and read


def memory_bill(
    compiled: Compiled, optimizer_bytes: int, away: Collection[str] = ()
) -> dict[str, int]:
    """Bytes by part on one rank, without those that are offloaded (`away`, as a plan calls them).

    `weights`, `gradients`, `optimizer` and `buffers` stay from step to step (gradients from their
    micro-batch to the update); `saved activations` live from forward to backward; `working memory`
    is what the largest micro-batch needs beside that (gathered weights, temporaries).
    """
    _, unit = compiled.units[0]
    program = unit.program

    def held(prefix: str) -> int:
        return sum(program.values[v].bytes for n, v in program.inputs if n.startswith(prefix))

    gradients = sum(
        program.values[v].bytes for n, v in program.outputs if n.startswith("gradient/")
    )
    each = (live_bytes(u.program) for _, u in compiled.units)
    saved, peak = max(each, key=lambda x: x[1])
    if "params" in away:
        peak += brought(compiled)
    return {
        "weights": 0 if "params" in away else held("model/"),
        "gradients": gradients,
        "optimizer": 0 if "optimizer" in away else optimizer_bytes,
        "buffers": held("buffer/") + held("constant/"),
        "saved activations": saved,
        "working memory": max(0, peak - saved - gradients),
    }


def brought(compiled: Compiled) -> int:
    """The most bytes of offloaded weights that are there at once."""
    (_, unit), *_ = compiled.units
    sizes = {name: unit.program.values[value].bytes for name, value in unit.program.inputs}
    alive: dict[str, int] = {}
    most = 0
    for each in compiled.instructions.body:
        if each.kind == "Load" and each.offloads:
            alive |= {
                pending.removeprefix("~"): sizes.get(name, 0)
                for name, pending in zip(each.inputs, each.outputs, strict=True)
            }
            most = max(most, sum(alive.values()))
        elif each.kind == "Free":
            for name in each.inputs:
                alive.pop(name, None)
    return most
