"""Assemble: traced micro-batches and state layouts -> one rank's instruction list.

body   for each micro-batch: Load, its pieces, Stash what outlives it; the last one's pieces reduce
       the gradients as they are made
       Finish, Agree, Update, gather weights, Commit
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from meshwright.plan.mesh import SAMPLE_AXES, Axis
from meshwright.program.dispatch import routed
from meshwright.program.donate import donated
from meshwright.program.fused import Joint, by_part, closed, fused_of, part_layouts
from meshwright.program.instruction import Instruction, InstructionList
from meshwright.program.layout import REPLICATED, Layout, Partial, Shard
from meshwright.program.opened import opened
from meshwright.program.overlap import overlapped
from meshwright.program.partition import Local, partition
from meshwright.program.parts import Parts
from meshwright.program.pieces import Table, run_pieces
from meshwright.program.program import Op, Program, Ref, Value
from meshwright.program.propagate import Completed, propagate
from meshwright.program.remat import completed_again, rematerialised
from meshwright.program.sequence import along_sequences
from meshwright.program.slices import SQUARE
from meshwright.program.zero import StateLayouts

__all__ = [
    "Compiled",
    "accumulated",
    "assemble",
    "complete_unit",
    "gather_program",
    "in_one_piece",
    "in_place",
    "move_instructions",
    "move_program",
    "unit_outputs",
]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one rank runs, and the partitioned programs that it was made from.

    Attributes:
        instructions: the list.
        units: per distinct micro-batch program, (how many micro-batches run it, its local program).
        moves: gradients to the optimizer's layout, where no unit does it, and updated weights to
            their resting layout; each once a step.
        wholes: per unit, the global program that it is a part of, and how it was completed.
    """

    instructions: InstructionList
    units: tuple[tuple[int, Local], ...]
    moves: tuple[Local, ...]
    wholes: tuple[tuple[Program, Completed], ...] = ()


def accumulated(unit: Program, *, first: bool) -> Program:
    """The unit with its sums added to accumulators; the first micro-batch of a step assigns."""
    if first:
        return unit
    values, ops = list(unit.values), list(unit.ops)
    inputs = list(unit.inputs)
    outputs: list[tuple[str, int]] = []
    for name, value in unit.outputs:
        if not name.startswith(("gradient/", "total/")):
            outputs.append((name, value))
            continue
        values += [unit.values[value], unit.values[value]]
        old, new = len(values) - 2, len(values) - 1
        inputs.append((name, old))
        ops.append(Op("aten.add.Tensor", (Ref(old), Ref(value)), (), (new,), phase="backward"))
        outputs.append((name, new))
    return Program(tuple(values), tuple(inputs), tuple(ops), tuple(outputs))


def unit_outputs(
    unit: Program, axes: Sequence[Axis], states: Mapping[str, StateLayouts], *, last: bool
) -> dict[str, Layout]:
    """Where a unit's outputs must lie: sums partial, buffers and watched values whole.

    Gradients are partial or sharded while they accumulate, and as the optimizer needs them at last.
    """
    partial = Layout.of(axes, {a.name: Partial() for a in axes if a.size > 1})
    found: dict[str, Layout] = {}
    for name, _ in unit.outputs:
        if name.startswith("gradient/"):
            state = states[name.removeprefix("gradient/")]
            found[name] = state.optimizer if last else state.gradients
        else:
            found[name] = partial if name.startswith("total/") else REPLICATED
    return found


def complete_unit(
    unit: Program,
    axes: Sequence[Axis],
    states: Mapping[str, StateLayouts],
    *,
    sequence: bool = False,
) -> Completed:
    """Propagate the unit's annotations: batches split by sample, weights as they rest.

    With `sequence`, what `tensor` leaves whole is split over it along the sequence.
    """
    sums = unit_outputs(unit, axes, states, last=False)
    split = [axis for axis in axes if axis.name in SAMPLE_AXES and axis.size > 1]
    batch = Layout.of(axes, {axis.name: Shard(0) for axis in split})
    ranks = math.prod(axis.size for axis in split)  # fewer samples are done by all
    pinned: dict[int, Layout] = {}
    stored: dict[int, Layout] = {}
    for name, value in unit.inputs:
        if name.startswith("model/"):
            state = states[name.removeprefix("model/")]
            stored[value] = _resting(state)
            if state.work.placements:
                pinned[value] = state.work
        elif name.startswith("batch/"):
            pinned[value] = batch if unit.values[value].shape[0] >= ranks else REPLICATED
        else:
            pinned[value] = sums.get(name, REPLICATED)
    squares = {op.inputs[0] for op in unit.ops if op.base == SQUARE}
    wanted = {
        value: _wanted(states[name.removeprefix("gradient/")], axes, read=value in squares)
        for name, value in unit.outputs
        if name.startswith("gradient/")
    }
    completed = propagate(unit, axes, pinned, stored, wanted)
    return along_sequences(unit, axes, completed, pinned, stored) if sequence else completed


def _wanted(state: StateLayouts, axes: Sequence[Axis], *, read: bool) -> Layout:
    """Where a gradient should lie; one that is `read` in its micro-batch, sharded as its sum is."""
    shards = {a: p for a, p in state.gradients.placements if read and isinstance(p, Shard)}
    return Layout.of(axes, {**shards, **dict(state.work.placements)}) if shards else state.work


def _resting(state: StateLayouts) -> Layout:
    """What is split at rest only."""
    work = dict(state.work.placements)
    return Layout(tuple((n, p) for n, p in state.weights.placements if work.get(n) != p))


def move_program(
    moves: Mapping[str, tuple[Value, Layout, Layout]],
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
) -> Local:
    """A rank's program that only moves named values from one layout to another."""
    values = tuple(value for value, _, _ in moves.values())
    named = tuple((name, place) for place, name in enumerate(moves))
    program = Program(values, named, (), named)
    pinned = {place: before for place, (_, before, _) in enumerate(moves.values())}
    after = {name: layout for name, (_, _, layout) in moves.items()}
    return partition(program, propagate(program, axes, pinned), axes, coordinates, after)


def gather_program(
    moves: Mapping[str, tuple[Value, Layout]],
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
) -> Local:
    """A rank's program that makes named values whole on every rank; fused ones part by part."""
    fused = fused_of({name: layout for name, (_, layout) in moves.items()})
    found: dict[str, tuple[Value, Layout, Layout]] = {}
    for name, (value, layout) in moves.items():
        parts = fused.get(name)
        if parts is None:
            found[name] = (value, layout, REPLICATED)
            continue
        values = (Value(value.dtype, shape) for shape in parts.shapes(value.shape))
        each = zip(parts.names(name), values, part_layouts(layout, parts), strict=True)
        found |= {part: (made, lies, REPLICATED) for part, made, lies in each}
    joints = {name: Joint(parts) for name, parts in fused.items()}
    return closed(move_program(found, axes, coordinates), joints, joints)


def assemble(
    units: Sequence[Program],
    axes: Sequence[Axis],
    coordinates: Mapping[str, int],
    states: Mapping[str, StateLayouts],
    *,
    sequence: bool = False,
    kept: Callable[[Program], frozenset[int] | None] = lambda _: None,
    fine: bool = False,
) -> Compiled:
    """The instruction list of the rank at `coordinates`.

    Args:
        units: the traced program of each micro-batch, in order; equal ones may be one object.
        axes: of the mesh.
        coordinates: the rank's.
        states: layouts by parameter.
        sequence: split over `tensor` along the sequence what it would leave whole.
        kept: of a unit with fused parameters in parts, the forward values that are saved for the
            backward, which computes others again; None saves what it reads.
        fine: cut programs without repeated layers too.
    """
    table = Table(fine=fine)
    body: list[Instruction] = []
    made: dict[tuple[str, bool, bool], Local] = {}
    wholes: dict[tuple[str, bool, bool], tuple[Program, Completed]] = {}
    runs: dict[tuple[str, bool, bool], int] = {}
    fused = fused_of({name: state.work for name, state in states.items()})
    each = by_part(states)
    apart = {unit.digest: opened(unit, fused) for unit in units}
    for k, unit in enumerate(units):
        first, last = k == 0, k == len(units) - 1
        key = (unit.digest, first, last)
        if key not in made:
            program = accumulated(apart[unit.digest], first=first)
            completed = complete_unit(program, axes, each, sequence=sequence)
            if (saved := kept(apart[unit.digest])) is not None:
                repeats = rematerialised(program, saved)
                program, completed = repeats.program, completed_again(completed, repeats)
            wholes[key] = (program, completed)
            outputs = unit_outputs(program, axes, each, last=last)
            local = partition(program, completed, axes, coordinates, outputs)
            local = donated(routed(local, axes))
            local = in_one_piece(local, unit, fused, states, last=last)
            made[key] = replace(local, program=overlapped(local.program))
        runs[key] = runs.get(key, 0) + 1
        body += _microbatch(k, made[key].program, table, last=last)
    trained = [
        n.removeprefix("gradient/") for n, _ in units[0].outputs if n.startswith("gradient/")
    ]
    weights = {name: units[0].values[value] for name, value in units[0].inputs}
    gather = move_program(
        {
            f"model/{n}": (weights[f"model/{n}"], states[n].optimizer, states[n].weights)
            for n in trained
            if states[n].optimizer != states[n].weights
        },
        axes,
        coordinates,
    )
    gather = in_place(gather)
    body += [Instruction("Finish"), Instruction("Agree", axis="world"), Instruction("Update")]
    body += move_instructions(gather.program, table, "gather", "shard/", "gathered/")
    body.append(Instruction("Commit"))
    lists = InstructionList((), tuple(body), (), tuple(table.segments), tuple(table.calls))
    used = tuple((count, made[key]) for key, count in runs.items())
    return Compiled(lists, used, (gather,), tuple(wholes[key] for key in runs))


def in_one_piece(
    local: Local,
    unit: Program,
    fused: Mapping[str, Parts],
    states: Mapping[str, StateLayouts],
    *,
    last: bool,
) -> Local:
    """Fused parameters come in one piece, and their gradients go so; sums stay in parts."""
    if not fused:
        return local
    inputs, given = dict(unit.inputs), {name for name, _ in local.program.outputs}
    read = {name for name, _ in local.program.inputs}
    comes = {
        f"model/{name}": Joint(parts, inputs[f"model/{name}"], states[name].weights)
        for name, parts in fused.items()
        if read.issuperset(f"model/{part}" for part in parts.names(name))
    }
    goes = {
        f"gradient/{name}": Joint(parts)
        for name, parts in fused.items()
        if last and given.issuperset(f"gradient/{part}" for part in parts.names(name))
    }
    return closed(local, comes, goes)


def in_place(gather: Local) -> Local:
    """Gathers of updated weights may leave them where the old ones are."""
    program = gather.program
    names = {value: name for name, value in program.outputs}
    ops = tuple(
        replace(op, kwargs=(*op.kwargs, ("into", names[op.results[0]])))
        if op.name == "comm.all_gather" and op.results[0] in names
        else op
        for op in program.ops
    )
    return replace(gather, program=replace(program, ops=ops))


def _microbatch(k: int, program: Program, table: Table, *, last: bool) -> list[Instruction]:
    """Load micro-batch k, run its pieces, keep what outlives it.

    The last one turns accumulators (`gradient/`) into what the optimizer takes (`reduced/`).
    """
    own = [n for n, _ in program.inputs if n.startswith("batch/") or n == "position"]
    names = {name: f"{k}:{name}" for name in own}
    if k:  # buffers that an earlier micro-batch of this step updated
        updated = {n.removeprefix("next/") for n, _ in program.outputs if n.startswith("next/")}
        names |= {f"buffer/{n}": f"next/{n}" for n in updated}
    run = run_pieces(program, table, k, names)
    inputs = {value: names.get(name, name) for name, value in program.inputs}
    kept = {name: inputs.get(value, f"{k}:{value}") for name, value in program.outputs}
    done = [name for name in kept if last and name.startswith("gradient/")]
    kept |= {name.replace("gradient/", "reduced/", 1): kept.pop(name) for name in done}
    stash = Instruction("Stash", None, k, 0, tuple(kept.values()), tuple(kept))
    load = Instruction("Load", None, k, 0, (), tuple(names[name] for name in own))
    used = set(kept.values()) | set(load.outputs)
    dead = tuple(v for v in sorted(used) if v.startswith(f"{k}:"))
    sums = (name for name, _ in program.inputs if name.startswith("gradient/"))
    dead += tuple(name for name in sums if last)  # of the micro-batches before
    return [load, *run, stash, Instruction("Free", None, k, 0, dead)]


def move_instructions(
    program: Program, table: Table, prefix: str, read: str, give: str
) -> list[Instruction]:
    """Run a program of moves: reads `read`name, gives `give`name."""

    def bare(name: str) -> str:
        return name.partition("/")[2]

    if not program.inputs:
        return []
    names = {name: read + bare(name) for name, _ in program.inputs}
    found = list(run_pieces(program, table, None, names, prefix))
    inputs = {value: names[name] for name, value in program.inputs}
    kept = {give + bare(n): inputs.get(v, f"{prefix}:{v}") for n, v in program.outputs}
    found.append(Instruction("Stash", None, None, 0, tuple(kept.values()), tuple(kept)))
    dead = tuple(v for v in kept.values() if v.startswith(f"{prefix}:"))
    return [*found, Instruction("Free", None, None, 0, dead)] if dead else found
