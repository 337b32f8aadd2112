"""The report's headings: each says what its section found, in the run's own numbers."""

from __future__ import annotations

from math import prod

from meshwright.view.accounts import Block
from meshwright.view.chart.memory import equal_bills
from meshwright.view.folder import Folder, Verification
from meshwright.view.history import History
from meshwright.view.layouts import shards
from meshwright.view.measures import Measures
from meshwright.view.overlap import Overlap
from meshwright.view.pipelined import Pipelined
from meshwright.view.runfile import Setup
from meshwright.view.units import (
    bytes_text,
    error_text,
    percent_text,
    seconds_text,
    value_text,
)

__all__ = [
    "axes_text",
    "block_finding",
    "loss_finding",
    "memory_finding",
    "mesh_finding",
    "time_finding",
    "pipeline_finding",
    "timeline_finding",
    "traffic_finding",
    "verification_finding",
    "verification_text",
]


def mesh_finding(setup: Setup) -> str:
    """How the batch and the weights are shared out."""
    ranks = len(setup.ranks)
    if ranks == 1:
        batch = f" and all {setup.batch_size:,} samples of a batch" if setup.batch_size else ""
        return f"One rank holds the whole model{batch}"
    whole = sum(parameter.bytes for parameter in setup.parameters)
    kept = _kept(setup)
    held = "all of" if not whole or kept > 0.995 * whole else f"{percent_text(kept / whole)} of"
    data = dict(setup.axes).get("data", 1)
    if dict(setup.axes).get("pipeline", 1) > 1:
        held = f"at most {held}"
    if not setup.batch_size or data == 1:
        return f"{ranks:,} ranks, each holds {held} the weights"
    each = setup.batch_size / data
    samples = f"{each:.0f}" if each == int(each) else f"{int(each):,} or {int(each) + 1:,}"
    return (
        f"{ranks:,} ranks: each takes {samples} of a batch’s {setup.batch_size:,} samples "
        f"and holds {held} the weights"
    )


def _kept(setup: Setup) -> float:
    """Bytes of weights on a rank; under a pipeline, on the one that holds most."""
    if dict(setup.axes).get("pipeline", 1) == 1:
        return sum(p.bytes / max(1, shards(p.weights, setup.axes)) for p in setup.parameters)
    found: dict[int, float] = {}
    for parameter in setup.parameters:
        for rank, shape in parameter.local:
            share = prod(shape) / (prod(parameter.shape) or 1)
            found[rank] = found.get(rank, 0.0) + parameter.bytes * share
    return max(found.values(), default=0.0)


def axes_text(setup: Setup) -> str:
    """The mesh's axes, as in `data 2 (down) × tensor 4 (across)`; empty for a rank alone."""
    axes = [axis for axis in setup.axes if axis[1] > 1] or setup.axes[:1]
    if len(axes) == 1:
        return f"One axis, {axes[0][0]}" if len(setup.ranks) > 1 else ""
    names = [f"{axis} {size:,}" for axis, size in axes]
    if len(names) == 2:
        names = [f"{names[0]} (down)", f"{names[1]} (across)"]
    return "Axes: " + " × ".join(names) if names else ""


def block_finding(block: Block) -> str:
    """What a block waits for."""
    rows = [r for s in block.stations for r in (*s.before, *s.backward) if not r.state]
    name = f"Each of {block.count:,} {block.name}" if block.count > 1 else "The model"
    if not rows:
        return f"{name} hands every value on without a collective"
    exposed = sum(row.exposed or 0 for row in rows)
    size, calls = sum(row.bytes for row in rows), sum(row.count for row in rows)
    waits = {0: "none of them exposed", calls: "all exposed"}.get(exposed, f"{exposed:,} exposed")
    many = f"{calls:,} collective{'s' * (calls != 1)}"
    return f"{name} moves {bytes_text(size)} of what it computes, in {many}, {waits}"


def loss_finding(history: History, measures: Measures) -> str:
    """Where the loss began and ended."""
    first, last, held_out = measures.first_loss, measures.last_loss, measures.last
    if first is None or last is None:
        return "No finite loss was logged" if history.steps else "No step was logged"
    steps = history.steps[-1].step
    verb = "fell" if last < first else "rose"
    course = f"{verb} from {value_text(first)} to {value_text(last)} by step {steps:,}"
    if len(history.steps) == 1:
        course = f"was {value_text(last)} at step {steps:,}"
    if held_out is None or held_out.loss is None:
        return f"The loss {course}"
    return f"The loss {course}; on held-out data it is {value_text(held_out.loss)}"


def time_finding(measures: Measures) -> str:
    """How long a step takes and what most of it is."""
    time = measures.time
    if time is None or not time.total:
        return "The parts of a step were not timed"
    name, seconds = max(time.parts, key=lambda part: part[1])
    share = percent_text(seconds / time.total)
    text = f"A step takes {seconds_text(time.total)} on average; {share} of it is {name}"
    waiting = dict(time.parts)["communication"] / time.total
    if name != "communication" and waiting >= 0.005:
        text += f", {percent_text(waiting)} communication"
    return text


def timeline_finding(found: Overlap) -> str:
    """How much ranks wait for each other, and how much of the communication is hidden."""
    if not found.under_way:
        return "What a step does, instruction by instruction"
    waits = percent_text(found.waiting / found.total)
    hidden = percent_text(found.hidden / found.under_way)
    return (
        f"Ranks spend {waits} of a step on waiting; while collectives are under way they compute "
        f"{hidden} of the time"
    )


def pipeline_finding(step: Pipelined) -> str:
    """How much of the pipeline's time is bubbles, and how much its schedule has."""
    measured, predicted = step.accounts
    return (
        f"Ranks stand idle {percent_text(measured.fraction)} of the pipeline’s time; its schedule "
        f"has {percent_text(predicted.fraction)}"
    )


def traffic_finding(measures: Measures) -> str:
    """How much a rank moves in a step."""
    sent, messages = measures.sent
    between = f"send up to {bytes_text(sent)} a step to other stages, in {messages:,} messages"
    if not measures.calls:
        alone = "Nothing is moved: a rank alone needs no collective"
        return f"Ranks {between}; no collective is needed" if messages else alone
    calls = f"{measures.calls:,} collective{'s' if measures.calls > 1 else ''}"
    moved = f"Each rank moves {bytes_text(measures.moved)} a step, in {calls}"
    return f"{moved}; ranks {between}" if messages else moved


def memory_finding(setup: Setup) -> str:
    """What the neediest rank needs and what for."""
    bills = equal_bills(setup.memory)
    if not bills or not bills[0][1].total:
        return "Memory was not accounted for"
    names, memory = bills[0]
    part, size = max(memory.parts, key=lambda item: item[1])
    most = f"{percent_text(size / memory.total)} of it {part}"
    if len(setup.memory) == 1:
        return f"The rank needs {bytes_text(memory.total)}, {most}"
    if len(bills) == 1:
        return f"Every rank needs {bytes_text(memory.total)}, {most}"
    verb = "needs" if names.startswith("rank ") else "need"
    return f"{names.capitalize()} {verb} most, {bytes_text(memory.total)}, {most}"


def verification_finding(folder: Folder) -> str:
    """Whether the plan's numbers are those of one device."""
    result = folder.verification
    if result is None:
        return "Not compared with one device yet"
    return verification_text(result)


def verification_text(result: Verification) -> str:
    """The verdict in a sentence."""
    worst = max((error for _, error in result.errors), default=0.0)
    of = "its own recurrence on one device" if result.recurrence else "one device"
    if not result.passed:
        return f"Not the numbers of {of}: worst relative error {error_text(worst)}"
    if worst == 0:
        return f"The numbers of {of}, bit for bit"
    return f"The numbers of {of}: worst relative error {error_text(worst)}"
