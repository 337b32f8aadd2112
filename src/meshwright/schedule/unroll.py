"""An asynchronous pipeline unrolled over some steps: proved legal, timed, and drawn.

The proof does not trust the arithmetic of `pipedream`: it runs every rank's order to its end,
counts the updates that each rank has made when a forward or backward meets its weights, and
compares. The timing gives every action a length, and so shows that nobody waits in steady state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from meshwright.errors import PlanError
from meshwright.schedule.action import Action, Schedule
from meshwright.schedule.pipedream import Asynchronous, Item, Seat, Update
from meshwright.schedule.simulate import Span

__all__ = ["Facts", "Orders", "check", "idle", "as_schedule", "spans", "unrolled"]

Orders = Mapping[Seat, Sequence[Item]]
"""What each rank does, in order."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a legal pipeline holds.

    Attributes:
        in_flight: of each stage, most micro-batches that a rank holds from forward to backward.
        versions: of each stage, most versions of its weights that a rank holds, the newest counted.
    """

    in_flight: tuple[int, ...]
    versions: tuple[int, ...]


def unrolled(pipe: Asynchronous, steps: int, base: int = 0) -> Orders:
    """The orders of `steps` steps after a drain at `base`; nothing is left in flight."""
    until = base + steps
    return {
        seat: (
            *pipe.prologue(seat, base, until),
            *(item for t in range(base, until) for item in pipe.step(seat, t, base, until)),
        )
        for seat in pipe.seats
    }


def as_schedule(pipe: Asynchronous, steps: int) -> Schedule:
    """The actions of an unreplicated pipeline as a schedule, as if its steps were one."""
    orders = unrolled(pipe, steps)
    actions = (tuple(i for i in order if isinstance(i, Action)) for order in orders.values())
    count = steps * pipe.microbatches
    return Schedule(pipe.name, tuple(range(pipe.stages)), count, tuple(actions))


def check(pipe: Asynchronous, steps: int, base: int = 0, orders: Orders | None = None) -> Facts:
    """What the pipeline holds over `steps` steps, if it is legal.

    Args:
        pipe: any.
        steps: how many, from `base`.
        base: the step of the last drain.
        orders: the ranks' orders, where they are not the pipeline's own.

    Raises:
        PlanError: a stage lacks a minibatch or takes it twice, ranks wait for each other in a ring,
            or a minibatch would meet other weights than `seen` says.
    """
    found = _Walk(pipe, orders or unrolled(pipe, steps, base), base)
    for _ in found.run():
        pass
    found.require_whole(base, base + steps)
    return Facts(found.most(found.flights), found.most(found.kept))


def spans(
    pipe: Asynchronous,
    steps: int,
    forward: Sequence[float],
    backward: Sequence[float],
    base: int = 0,
) -> tuple[Span, ...]:
    """Every action with its time, rank by rank.

    Args:
        pipe: any.
        steps: how many, from `base`.
        forward: seconds of each stage; sends and updates take none.
        backward: the same.
        base: the step of the last drain.
    """
    walk = _Walk(pipe, unrolled(pipe, steps, base), base)
    walk.seconds = {"F": forward, "B": backward}
    return tuple(sorted(walk.run(), key=lambda span: (span.rank, span.begin)))


def idle(found: Sequence[Span], begin: float, end: float) -> tuple[float, ...]:
    """Of each rank, the time between `begin` and `end` in which it computes nothing."""
    busy = [0.0] * (1 + max(span.rank for span in found))
    for span in found:
        busy[span.rank] += max(0.0, min(span.end, end) - max(span.begin, begin))
    return tuple(end - begin - each for each in busy)


@dataclass(slots=True)
class _Walk:
    """Runs all ranks' orders to their ends, each as far as it can go."""

    pipe: Asynchronous
    orders: Orders
    base: int
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    at: dict[Seat, int] = field(default_factory=dict)
    free: dict[Seat, float] = field(default_factory=dict)
    ended: dict[Action, float] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)  # stage -> its newest weights
    met: dict[tuple[Seat, int], int] = field(default_factory=dict)  # in flight -> weights
    flights: dict[Seat, int] = field(default_factory=dict)
    kept: dict[Seat, int] = field(default_factory=dict)

    def run(self) -> Iterator[Span]:
        """Every action in an order in which they can run."""
        seats = self.pipe.seats
        self.at, self.free = dict.fromkeys(seats, 0), dict.fromkeys(seats, 0.0)
        self.taken = dict.fromkeys(range(self.pipe.stages), self.base)
        moved = True
        while moved:
            moved = False
            for rank, seat in enumerate(seats):
                while (item := self._next(seat)) is not None and self._ready(item):
                    moved = True
                    if isinstance(item, Update):
                        self._update(item)
                    else:
                        yield self._act(rank, seat, item)
        if any(self._next(seat) is not None for seat in seats):
            raise PlanError(f"schedule {self.pipe.name} deadlocks: {self._stuck()}")

    def _next(self, seat: Seat) -> Item | None:
        order = self.orders[seat]
        return order[self.at[seat]] if self.at[seat] < len(order) else None

    def _ready(self, item: Item) -> bool:
        if isinstance(item, Update):
            return all(self._next(other) == item for other in self._stage(item.stage))
        return all(need in self.ended for need in self._needs(item))

    def _needs(self, action: Action) -> list[Action]:
        stage, part = action.stage, action.microbatch
        if action.kind == "F":
            return [Action(stage - 1, "F", part)] if stage else []
        after = [Action(stage + 1, "B", part)] if stage + 1 < self.pipe.stages else []
        return [Action(stage, "F", part), *after]

    def _stage(self, stage: int) -> list[Seat]:
        return [seat for seat in self.pipe.seats if seat.stage == stage]

    def _act(self, rank: int, seat: Seat, action: Action) -> Span:
        if action in self.ended:
            raise PlanError(f"schedule {self.pipe.name} is not whole: {action} comes twice")
        begin = max([self.free[seat], *(self.ended[need] for need in self._needs(action))])
        length = self.seconds[action.kind][seat.stage] if self.seconds else 1.0
        end = self.free[seat] = self.ended[action] = begin + length
        self.at[seat] += 1
        self._meet(seat, action)
        return Span(rank, action, begin, end)

    def _meet(self, seat: Seat, action: Action) -> None:
        """The weights that an action meets are there, and are those that the arithmetic says."""
        part, stage = action.microbatch, seat.stage
        minibatch = part // self.pipe.microbatches
        wanted, newest = self.pipe.seen(stage, minibatch, self.base), self.taken[stage]
        if action.kind == "F":
            stashes = self.pipe.name == "pipedream"
            if newest < wanted or (stashes and newest != wanted):
                raise PlanError(
                    f"schedule {self.pipe.name}: {action} should meet the weights after {wanted} "
                    f"minibatches, but the newest on its rank are those after {newest}"
                )
            self.met[seat, part] = wanted
            mine = [version for (other, _), version in self.met.items() if other == seat]
            self.flights[seat] = max(self.flights.get(seat, 0), len(mine))
        self._count(seat)
        if action.kind == "B":
            del self.met[seat, part]

    def _count(self, seat: Seat) -> None:
        """Versions from the oldest that a minibatch in flight meets to the newest."""
        oldest = min(version for (other, _), version in self.met.items() if other == seat)
        count = self.pipe.replicas[seat.stage]
        held = (self.taken[seat.stage] - oldest) // count + 1
        self.kept[seat] = max(self.kept.get(seat, 0), held)

    def _update(self, update: Update) -> None:
        """All replicas of a stage at once, when the last of them has come."""
        seats = self._stage(update.stage)
        now = max(self.free[seat] for seat in seats)
        for seat in seats:
            self.at[seat] += 1
            self.free[seat] = now
        self.taken[update.stage] = update.minibatch + 1

    def require_whole(self, base: int, until: int) -> None:
        """Every stage has taken every micro-batch forward and back."""
        parts = range(base * self.pipe.microbatches, until * self.pipe.microbatches)
        for stage in range(self.pipe.stages):
            for kind in ("F", "B"):
                lacking = [k for k in parts if Action(stage, kind, k) not in self.ended]
                if lacking:
                    raise PlanError(
                        f"schedule {self.pipe.name} is not whole: stage {stage} lacks "
                        f"{Action(stage, kind, lacking[0])}"
                    )

    def most(self, found: Mapping[Seat, int]) -> tuple[int, ...]:
        """The largest of each stage's ranks."""
        return tuple(
            max((found.get(seat, 0) for seat in self._stage(stage)), default=0)
            for stage in range(self.pipe.stages)
        )

    def _stuck(self) -> str:
        told = []
        for rank, seat in enumerate(self.pipe.seats):
            item = self._next(seat)
            if isinstance(item, Update):
                told.append(f"rank {rank} waits for its replicas after minibatch {item.minibatch}")
            elif item is not None:
                lacks = [need for need in self._needs(item) if need not in self.ended]
                told.append(f"rank {rank} waits at {item} for {lacks[0]}")
        return "; ".join(told)
