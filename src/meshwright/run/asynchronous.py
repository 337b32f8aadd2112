"""One rank of an asynchronous pipeline: forwards go ahead of the step, drains throw them away."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from meshwright.comm.base import Group
from meshwright.compile.lower import Segment
from meshwright.errors import PlanError, UsageError
from meshwright.program.assemble import Compiled
from meshwright.program.instruction import Instruction, InstructionList
from meshwright.run.build import Build, Lowered
from meshwright.run.data.samples import Source
from meshwright.run.executor import Machine, interpret
from meshwright.run.stale import StaleWork, Versions, mean, riders
from meshwright.run.step import Metrics, Policy
from meshwright.run.worker import Fetched, Make, Worker
from meshwright.schedule.action import Action
from meshwright.schedule.bubble import endless
from meshwright.schedule.endless import Endless, Passing, Turn
from meshwright.schedule.locals import Micro
from meshwright.schedule.pipedream import Asynchronous, Seat

__all__ = ["AsyncWorker", "pipe_of", "worker_of"]


def pipe_of(build: Build) -> Asynchronous:
    """The asynchronous pipeline that a plan asks for.

    Raises:
        PlanError: the papers do not say what it would be for this model.
    """
    pipe = endless(build.plan)
    assert pipe is not None
    for name, homes in build.homes.items():
        kind, _, bare = name.partition("/")
        if len(homes) > 1 and kind == "model" and build.model.parameters[bare].requires_grad:
            raise PlanError(
                f"schedule {pipe.name} updates each stage by itself, but {bare} is used by stages "
                f"{', '.join(map(str, homes))}, which would need it in one version; cut the "
                "pipeline so that one stage uses it, or use a schedule that flushes, such as 1f1b"
            )
        if kind == "buffer" and any(pipe.replicas[home] > 1 for home in homes):
            _require_constant(build, pipe, bare)
    return pipe


def _require_constant(build: Build, pipe: Asynchronous, name: str) -> None:
    """A buffer that the forward renews would differ between replicas."""
    assert build.stages is not None
    program = build.stages.program
    outputs, inputs = dict(program.outputs), dict(program.inputs)
    renewed = outputs.get(f"next/{name}")
    if renewed is not None and renewed != inputs.get(f"buffer/{name}"):
        text = "-".join(map(str, pipe.replicas))
        raise PlanError(
            f"schedule {pipe.name} with replicas={text} gives each replica every so many'th "
            f"minibatch, so that their running statistics {name} would differ; replicate stages "
            "without batch norm only, or use data=2, whose ranks share each minibatch"
        )


def worker_of(
    build: Build, rank: int, source: Source | None, policy: Policy, make: Make | None = None
) -> Worker:
    """A rank of a job, as its plan runs it."""
    kind = AsyncWorker if build.plan.asynchronous and build.stages is not None else Worker
    return kind(build, rank, source, policy, make)


class AsyncWorker(Worker):
    """A rank whose forwards are ahead of its steps."""

    def __init__(
        self,
        build: Build,
        rank: int,
        source: Source | None,
        policy: Policy,
        make: Make | None = None,
    ) -> None:
        """An empty pipe; arguments as of `Worker`."""
        super().__init__(build, rank, source, policy, make)
        self.pipe = pipe_of(build)
        stage, replica, _ = build.within(rank)
        self.seat = Seat(stage, replica)
        self.beside = self._beside()
        self.replicas = build.replicas(rank)
        names = (f"model/{n}" for n in self.state.trained if n in self.state.shards)
        self.versions = Versions(self.pipe.versions(stage), tuple(names))
        self.base: int | None = None  # the step since which the pipe flows; None: it is empty
        self.limit: int | None = None  # the step at which it is known to end
        self.done = 0
        self.factor = 1.0
        self.totals: tuple[str, ...] = ()
        self.gradients: tuple[str, ...] = ()
        self.batches: dict[int, Fetched] = {}
        self.passings: dict[int, Passing] = {}
        self.micros: dict[str, Micro] = {}
        self.functions: list[Segment] = []
        self.machine = Machine(self.functions, self.state.values, self.place, dtype=build.dtype)
        self.endless: Endless | None = None
        self.lists: dict[tuple[Instruction, ...], Lowered] = {}  # of steps that are traced
        self.paths: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        if source is not None:
            source.keep(self.pipe.ahead(0) + max(self.pipe.replicas))

    def _beside(self) -> Group:
        """The ranks that split this rank's minibatches with it."""
        mesh = self.build.mesh
        ranks = [r for r in range(mesh.size) if self.build.within(r)[:2] == self._where]
        return Group("stage", tuple(ranks))

    @property
    def _where(self) -> tuple[int, int]:
        return self.build.within(self.rank)[:2]

    def takes(self, minibatch: int) -> bool:
        """Whether this rank takes a minibatch."""
        return self.pipe.takes(self.seat, minibatch)

    def place_of(self, minibatch: int) -> int:
        """The slot of a minibatch; those that this rank takes no part in have one of their own."""
        if not self.takes(minibatch):
            return -1
        if self.pipe.microbatches > 1:
            return minibatch % 2
        return self._slot(minibatch)

    def _slot(self, number: int) -> int:
        stage = self.seat.stage
        return number // self.pipe.replicas[stage] % self.pipe.in_flight(stage)

    @override
    def fetch(self, step: int) -> Fetched:
        """Load the samples of a minibatch; those whose forward was thrown away are still there."""
        if step not in self.batches:
            self.batches[step] = super().fetch(step)
        return self.batches[step]

    @override
    def pushed(self, tree: Any, step: int, *, local: bool) -> Fetched:
        """Refused: later minibatches are begun before this one is done."""
        raise UsageError(
            f"run.step(batch) gives one batch, but schedule={self.pipe.name} begins the next ones "
            "before it is done; let the job's data give them (run.step()), or use a schedule that "
            "flushes, such as 1f1b"
        )

    @override
    def step(
        self, fetched: Fetched, upcoming: int | None
    ) -> Generator[Any, Any, tuple[Metrics, Any]]:
        """Run one step; an exchange. `until` says where forwards end."""
        step = fetched.step
        if self.base is not None and (step != self.done or step == self.limit):
            yield from self.drain()
        work = StaleWork(self, step)
        parts: list[Sequence[Instruction]] = []
        if self.base is None:
            yield from self._begin(step)
            prologue = self.pipe.prologue(self.seat, step, self.limit)
            parts += [self._forward(action.microbatch, work) for action in prologue]
        parts += self._body(step, work)
        self._learn()
        self._read_ahead()
        body = tuple(received_ahead(parts))
        committed = yield from interpret(self.machine, body, work)
        if self.observer is not None:
            self.observer(step, self._listed(body), committed)
        self.done = step + 1
        self.batches.pop(step, None)
        self.ahead = None if upcoming is None else Fetched(upcoming, (), (), (), 0)
        return committed.result, committed.timing

    def _listed(self, body: tuple[Instruction, ...]) -> Lowered:
        """A step's instructions as a list; equal ones are one."""
        assert self.endless is not None
        if body not in self.lists:
            table = self.endless.table
            told = (tuple(table.segments), tuple(table.calls), tuple(self.endless.told))
            self.lists[body] = Lowered(Compiled(InstructionList((), body, (), *told), (), ()), ())
        return self.lists[body]

    def _read_ahead(self) -> None:
        """Begin to read the next minibatch whose forward this rank does."""
        following = max(self.batches, default=self.done) + self.pipe.replicas[self.seat.stage]
        if self.limit is None or following < self.limit:
            self.reading.begin(following)

    def _begin(self, step: int) -> Generator[Any, Any, None]:
        """Fill the pipe from the newest weights."""
        values, fetched = self.state.values, self.fetch(step)
        yield from self.same_program(fetched)
        self.base, self.limit, self.done = step, self.until, step
        for name in [n for n in values if n.startswith("buffer/")]:
            values[name.replace("buffer/", "front/", 1)] = values[name]
        unit = self.build.unit(fetched.micros[0])
        self.totals = tuple(n for n, _ in unit.program.outputs if n.startswith("total/"))
        if self.endless is None:
            sums = len(riders(self.totals, self.flags))
            alone = len(self.beside.ranks) == 1
            self.endless = Endless(self.seat.stage, self.pipe.stages, sums, alone)
        first = self._micro(fetched, 0).tasks.gradients(self.seat.stage)
        self.gradients = tuple(n for n in self.state.trained if n in first)

    def _body(self, step: int, work: StaleWork) -> list[Sequence[Instruction]]:
        """What this rank does in a step, part after part."""
        assert self.base is not None
        assert self.endless is not None
        found: list[Sequence[Instruction]] = []
        for item in self.pipe.step(self.seat, step, self.base, self.limit):
            if not isinstance(item, Action):
                continue
            if item.kind == "F":
                found.append(self._forward(item.microbatch, work))
            else:
                found.append(self.passings.pop(item.microbatch).backward)
        stage = self.seat.stage
        if not self.takes(step):
            last = self.pipe.seat_of(self.pipe.stages - 1, step)
            source = self.build.peer(self.rank, last.stage, last.replica)
            found.append(self.endless.heard(-1, source))
        end = [Instruction("Agree", axis="step")]
        if self.pipe.updates(stage, step, self.base):
            if len(self.replicas.ranks) > 1:
                end.append(Instruction("Agree", axis="replicas"))
            end.append(Instruction("Update"))
        return [*found, [*end, Instruction("Commit")]]

    def _forward(self, number: int, work: StaleWork) -> Sequence[Instruction]:
        """The forward of a micro-batch; its backward is kept for its step."""
        assert self.endless is not None
        assert self.base is not None
        minibatch, k = divmod(number, self.pipe.microbatches)
        if minibatch not in self.batches:
            self.reading.finish(minibatch)
        fetched = self.batches[minibatch]
        work.order.loads.append(number)
        if k == self.pipe.microbatches - 1:
            work.order.finished.append(minibatch)
        turn = Turn(
            self._slot(number),
            self.place_of(minibatch),
            k == 0,
            k == self.pipe.microbatches - 1,
            *self._path(minibatch),
        )
        stage, base = self.seat.stage, self.base
        seen = self.pipe.seen(stage, minibatch, base)
        begun = max(base, (number - self.pipe.ahead(stage)) // self.pipe.microbatches)
        ages = (
            (self.pipe.applied(stage, at_, base) - seen) // self.pipe.replicas[stage]
            for at_ in (begun, minibatch)
        )
        self.passings[number] = self.endless.passing(self._micro(fetched, k), turn, *ages)
        return self.passings[number].forward

    def _path(self, minibatch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """By stage, the rank that takes this rank's part of a minibatch; those that take none."""
        phase = minibatch % math.lcm(*self.pipe.replicas)
        if phase not in self.paths:
            seats = [self.pipe.seat_of(stage, minibatch) for stage in range(self.pipe.stages)]
            peers = tuple(self.build.peer(self.rank, seat.stage, seat.replica) for seat in seats)
            last = self.seat.stage == self.pipe.stages - 1
            lie = self.build.within(self.rank)[2]
            alike = (r for r in range(self.build.mesh.size) if self.build.within(r)[2] == lie)
            self.paths[phase] = peers, tuple(r for r in alike if last and r not in peers)
        return self.paths[phase]

    def _micro(self, fetched: Fetched, k: int) -> Micro:
        micro = fetched.micros[k]
        if micro.key not in self.micros:
            unit = self.build.unit(micro)
            self.state.values.update(unit.constants)
            self.micros[micro.key] = self.build.staged_micro(self.rank, unit.program)
        return self.micros[micro.key]

    def _learn(self) -> None:
        """Lower what is new in the tables."""
        assert self.endless is not None
        segments = self.endless.table.segments
        self.functions += self.build.lower(self.rank, segments[len(self.functions) :])
        self.machine.learn(self.endless.table.calls, self.endless.told)

    def mean(self, values: dict[str, Tensor], count: int) -> Generator[Any, Any, None]:
        """The mean of the replicas' gradients; an exchange."""
        yield from mean(self.gradients, values, self.factor, count, self.replicas)
        self.factor = 1.0

    @override
    def restart(self) -> None:
        """What was read before is of another place in the data."""
        self.batches.clear()

    @property
    @override
    def flags_behind(self) -> int:
        """They travel with minibatches."""
        return self.pipe.ahead(0) // self.pipe.microbatches + max(self.pipe.replicas)

    @override
    def drain(self) -> Generator[Any, Any, None]:
        """Throw away the forwards in flight; what replicas still owe is applied; an exchange."""
        self.reading.close()
        if self.base is None:
            return
        work = StaleWork(self, self.done)
        dropped = self._dropped()
        self._learn()
        yield from interpret(self.machine, dropped, work)
        if owed := self.pipe.owed(self.seat.stage, self.done, self.base):
            yield from self.mean(self.state.values, owed)
            yield from work.update(self.state.values)
        self.passings.clear()
        self.base = None
        self._forget()

    def _dropped(self) -> list[Instruction]:
        """Receive what earlier stages have sent of forwards that this rank has not begun.

        And of those that it has begun what only their backwards would read.
        """
        assert self.endless is not None
        found: list[Instruction] = []
        here = self.seat.stage
        for source in self.pipe.seats:
            peer = self.build.peer(self.rank, source.stage, source.replica)
            begun = self.pipe.begun(source, self.done, self.limit) if source.stage < here else ()
            for number in begun:
                minibatch, k = divmod(number, self.pipe.microbatches)
                if not self.takes(minibatch):
                    continue
                micro = self._micro(self.fetch(minibatch), k)
                kinds = "B" if number in self.passings else "FB"
                last = k == self.pipe.microbatches - 1
                found += self.endless.dropped(micro, (source.stage, peer), kinds, last=last)
        return found


def received_ahead(parts: Sequence[Sequence[Instruction]]) -> list[Instruction]:
    """The parts one after the other, their receives posted before the part that comes before.

    So a send need not be buffered: what its receiver waits to send is wanted already.
    """
    posted = [[each for each in part if each.kind == "Recv"] for part in parts]
    found: list[Instruction] = [*posted[0]]
    for part, following in zip(parts, [*posted[1:], []], strict=True):
        found += following
        found += [each for each in part if each.kind != "Recv"]
    return found
