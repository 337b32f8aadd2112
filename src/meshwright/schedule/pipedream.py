"""PipeDream: pipelines that are never flushed, and what weights that costs (Narayanan 2019, 2021).

    stage 0   0F0 0F1 0F2  .   .  0B0 0F3 0B1 0F4 0B2     updates follow each backward
    stage 1    .  1F0 1F1  .  1B0 1F2 1B1 1F3 1B2 1F4
    stage 2    .   .  2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3

A step is one minibatch (a global batch). A stage goes back over the step's minibatch, and before
that forward over one that is `ahead` of it. Which weights a minibatch meets is a matter of
arithmetic, told by `seen`: the schedule, its check and the recurrence that verifies a run all ask
it. Weights are named by how many minibatches' gradients they have taken in.

    pipedream            each stage's newest, kept for the backward (weight stashing)
    pipedream-vertical   at every stage those that the input stage had (vertical sync)
    pipedream-2bw        everywhere those of one minibatch before, whose parts are micro-batches

A stage may be replicated: replica r takes the minibatches t with t mod R = r, whole, and the stage
updates once per R minibatches, with the mean of their gradients. A drain (for a checkpoint, an
evaluation, the end) throws away the forwards in flight; the pipe fills again from the newest
weights, whose minibatch is then the *base* of all counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.errors import PlanError
from meshwright.schedule.action import Action

__all__ = ["Asynchronous", "Item", "Seat", "Update", "asynchronous_of"]


@dataclass(frozen=True, slots=True)
class Update:
    """A stage takes in the gradients of the minibatches up to this one, all replicas together."""

    stage: int
    minibatch: int


Item = Action | Update


@dataclass(frozen=True, slots=True, order=True)
class Seat:
    """A rank of the pipeline: its stage, and which of the stage's replicas it is."""

    stage: int
    replica: int = 0


@dataclass(frozen=True, slots=True)
class Asynchronous:
    """An asynchronous pipeline; `asynchronous_of` makes one that is legal.

    Attributes:
        name: as in a plan.
        replicas: of each stage.
        microbatches: parts of a minibatch, whose gradients are summed (`pipedream-2bw`).
    """

    name: str
    replicas: tuple[int, ...]
    microbatches: int = 1

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.replicas)

    @property
    def seats(self) -> tuple[Seat, ...]:
        """Every rank of the pipeline, stage by stage."""
        return tuple(
            Seat(stage, replica)
            for stage, count in enumerate(self.replicas)
            for replica in range(count)
        )

    def seat_of(self, stage: int, minibatch: int) -> Seat:
        """The rank that takes a minibatch at a stage."""
        return Seat(stage, minibatch % self.replicas[stage])

    def takes(self, seat: Seat, minibatch: int) -> bool:
        """Whether the rank takes the minibatch."""
        return minibatch % self.replicas[seat.stage] == seat.replica

    def ahead(self, stage: int) -> int:
        """How many micro-batches a stage's forwards are ahead of its backwards.

        As many for each replica as keep the later stages' ranks busy: with the one that it goes
        back over, ceil(ranks from here on / replicas), which at the input stage is NOAM.
        """
        here = self.replicas[stage]
        return here * -(-sum(self.replicas[stage + 1 :]) // here)

    def in_flight(self, stage: int) -> int:
        """Most micro-batches that a rank of the stage holds between forward and backward."""
        return self.ahead(stage) // self.replicas[stage] + 1

    def seen(self, stage: int, minibatch: int, base: int = 0) -> int:
        """The weights that a minibatch meets at a stage, forward and back."""
        if self.name == "pipedream-2bw":
            return max(base, minibatch - 1)
        if self.name == "pipedream":
            return self._newest(stage, minibatch - self.ahead(stage), base)
        stamp = self._newest(0, minibatch - self.ahead(0), base)
        return self._newest(stage, stamp, base)

    def _newest(self, stage: int, minibatches: int, base: int) -> int:
        """The newest weights of a stage, after so many minibatches."""
        count = self.replicas[stage]
        return base + max(0, minibatches - base) // count * count

    def updates(self, stage: int, minibatch: int, base: int = 0) -> bool:
        """Whether a stage updates its weights after the backward of a minibatch."""
        return (minibatch + 1 - base) % self.replicas[stage] == 0

    def applied(self, stage: int, steps: int, base: int = 0) -> int:
        """The newest weights of a stage when so many steps are done."""
        return self._newest(stage, steps, base)

    def owed(self, stage: int, steps: int, base: int = 0) -> int:
        """Minibatches whose gradients wait for their replicas'; a drain applies their mean."""
        return steps - self.applied(stage, steps, base)

    def staleness(self, stage: int) -> tuple[int, int]:
        """(least, most) minibatches before a minibatch that its weights have not taken in."""
        found = [t - self.seen(stage, t) for t in self._steady()]
        return min(found), max(found)

    def versions(self, stage: int) -> int:
        """Most versions of its weights that a rank of the stage holds at once."""
        return max(
            len(self.held(seat, step)) for step in self._steady() for seat in self._alike(stage)
        )

    def held(self, seat: Seat, step: int, base: int = 0) -> tuple[int, ...]:
        """The weights that a rank must hold during a step, oldest first, its newest last.

        Those that minibatches in flight or still to come meet, after the update of the step before.
        """
        count, newest = self.replicas[seat.stage], self.applied(seat.stage, step, base)
        mine = next(t for t in range(step, step + count) if self.takes(seat, t))
        oldest = min(self.seen(seat.stage, mine, base), newest)
        return tuple(range(oldest, newest + 1, count))

    def _alike(self, stage: int) -> Iterator[Seat]:
        return (seat for seat in self.seats if seat.stage == stage)

    def _steady(self) -> range:
        """Steps that meet every phase of the replicas, long after the start."""
        period = 1
        for count in self.replicas:
            period *= count
        first = period * (self.ahead(0) + 2)
        return range(first, first + period)

    def prologue(self, seat: Seat, base: int, until: int | None = None) -> Iterator[Action]:
        """The forwards that fill the pipe, before step `base`."""
        first = base * self.microbatches
        for part in range(first, first + self.ahead(seat.stage)):
            yield from self._forward(seat, part, until)

    def step(
        self, seat: Seat, minibatch: int, base: int, until: int | None = None
    ) -> Iterator[Item]:
        """What a rank does in a step; forwards of minibatch `until` and later are not begun."""
        if self.takes(seat, minibatch):
            first = minibatch * self.microbatches
            for part in range(first, first + self.microbatches):
                yield from self._forward(seat, part + self.ahead(seat.stage), until)
                yield Action(seat.stage, "B", part)
        if self.updates(seat.stage, minibatch, base):
            yield Update(seat.stage, minibatch)

    def _forward(self, seat: Seat, part: int, until: int | None) -> Iterator[Action]:
        minibatch = part // self.microbatches
        if self.takes(seat, minibatch) and (until is None or minibatch < until):
            yield Action(seat.stage, "F", part)

    def begun(self, seat: Seat, step: int, until: int | None = None) -> tuple[int, ...]:
        """Micro-batches whose forwards are in flight when a step begins: what a drain discards."""
        first = step * self.microbatches
        found = range(first, first + self.ahead(seat.stage))
        return tuple(a.microbatch for k in found for a in self._forward(seat, k, until))


def asynchronous_of(
    name: str, replicas: tuple[int, ...], microbatches: int = 1, virtual: int = 1
) -> Asynchronous:
    """The asynchronous pipeline of that name.

    Raises:
        PlanError: the papers do not say what it would be.
    """
    stages = len(replicas)
    if virtual != 1:
        raise PlanError(
            f"schedule {name} has virtual={virtual}, but it holds one stage on each rank; leave "
            "virtual out, or take schedule=interleaved"
        )
    if name == "pipedream-2bw":
        if any(count > 1 for count in replicas):
            text = "-".join(map(str, replicas))
            raise PlanError(
                f"schedule {name} has replicas={text}, but it sums the micro-batches of a "
                "minibatch on one rank of each stage; split their samples by data=2 instead, or "
                "take schedule=pipedream"
            )
        if microbatches < stages - 1:
            raise PlanError(
                f"schedule {name} has microbatches={microbatches}, but with pipeline={stages} the "
                "weights of one minibatch before are ready only if a minibatch has "
                f"{stages - 1} micro-batches or more; use microbatches={stages - 1}"
            )
    elif microbatches != 1:
        raise PlanError(
            f"schedule {name} has microbatches={microbatches}, but it takes minibatches whole and "
            "updates after each; leave microbatches out, or take schedule=pipedream-2bw, which "
            "sums over micro-batches"
        )
    return Asynchronous(name, replicas, microbatches)
