"""Schedules by their names in a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from meshwright.errors import PlanError, nearest
from meshwright.schedule.action import Schedule
from meshwright.schedule.dualpipe_v import dualpipe_v
from meshwright.schedule.fill_drain import fill_drain
from meshwright.schedule.gpipe import gpipe
from meshwright.schedule.interleaved import interleaved
from meshwright.schedule.one_f_one_b import one_f_one_b
from meshwright.schedule.search import search_named
from meshwright.schedule.zero_bubble import zb_h1, zb_h2, zb_v

__all__ = ["SCHEDULES", "Generator", "schedule_of"]

Generator = Callable[[int, int, int], Schedule]
"""Of ranks, micro-batches and chunks per rank (`virtual`)."""


def schedule_of(name: str, ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """The schedule of that name.

    `zb-v` and `dualpipe-v` hold two stages on each rank, whether `virtual` says 1 or 2.

    Raises:
        PlanError: there is no such schedule, or it cannot have these numbers.
    """
    if name not in SCHEDULES:
        raise PlanError(f"there is no schedule {name!r}; {nearest(name, tuple(SCHEDULES))}")
    numbers = {"pipeline": ranks, "microbatches": microbatches, "virtual": virtual}
    for key, value in numbers.items():
        if value < 1:
            raise PlanError(f"schedule {name} has {key}={value}; it must be 1 or more")
    return SCHEDULES[name](ranks, microbatches, virtual)


def _single(name: str, make: Callable[[int, int], Schedule]) -> Generator:
    """A schedule of one stage on each rank."""

    def made(ranks: int, microbatches: int, virtual: int) -> Schedule:
        if virtual != 1:
            raise PlanError(
                f"schedule {name} has virtual={virtual}, but it holds one stage on each rank;"
                " leave virtual out, or take schedule=interleaved"
            )
        return make(ranks, microbatches)

    return made


def _pair(name: str, make: Callable[[int, int], Schedule]) -> Generator:
    """A schedule of two stages on each rank."""

    def made(ranks: int, microbatches: int, virtual: int) -> Schedule:
        if virtual > 2:
            raise PlanError(
                f"schedule {name} has virtual={virtual}, but it holds exactly two stages on each"
                " rank; leave virtual out, or take schedule=interleaved"
            )
        return make(ranks, microbatches)

    return made


SCHEDULES: Final[Mapping[str, Generator]] = MappingProxyType(
    {
        "gpipe": gpipe,
        "1f1b": _single("1f1b", one_f_one_b),
        "interleaved": interleaved,
        "zb-h1": _single("zb-h1", zb_h1),
        "zb-h2": _single("zb-h2", zb_h2),
        "zb-v": _pair("zb-v", zb_v),
        "dualpipe-v": _pair("dualpipe-v", dualpipe_v),
        "fill-drain": fill_drain,
        "search": search_named,
    }
)
