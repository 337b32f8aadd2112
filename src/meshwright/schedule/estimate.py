"""Estimate: about how long the stages of a cut micro-batch take, from what their ops cost."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.program.assemble import accumulated
from meshwright.program.placing import Placement
from meshwright.program.program import Program
from meshwright.program.stage import Key, Tasks
from meshwright.schedule.simulate import Seconds

__all__ = ["estimated"]


def estimated(
    unit: Program,
    placement: Placement,
    costs: Sequence[float],
    seconds_per_byte: float,
    *,
    kept: frozenset[int] | None = None,
) -> Seconds:
    """Seconds of every stage's forward, backward and halves, and of what stages send.

    Args:
        unit: a traced micro-batch.
        placement: of its ops.
        costs: seconds of each op.
        seconds_per_byte: of what goes to the next stage.
        kept: forward values that backwards may read, making others again; None: all they need.
    """
    tasks = Tasks(accumulated(unit, first=False), placement, kept=kept)

    def cost(key: Key) -> float:
        numbers = tasks.task(key).numbers if key in tasks.chosen else ()
        return sum(costs[number] for number in numbers if number < len(costs))

    def sent(stage: int) -> float:
        given = tasks.task((stage, "F")).gives
        crossing = (value for value in given if tasks.crosses(value))
        return seconds_per_byte * sum(tasks.whole.values[value].bytes for value in crossing)

    stages = range(placement.count)
    return Seconds(
        forward=tuple(cost((stage, "F")) for stage in stages),
        inputs=tuple(cost((stage, "I")) for stage in stages),
        weights=tuple(cost((stage, "W")) for stage in stages),
        transfer=tuple(sent(stage) for stage in stages[:-1]),
        backward=tuple(cost((stage, "B")) for stage in stages),
    )
