"""One rank of a job: its state, and the exchange that runs a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from meshwright.comm.base import Group, all_reduce
from meshwright.compile.draw import position_operand
from meshwright.compile.example import example_of
from meshwright.compile.settings import in_dtype
from meshwright.errors import UserCodeError
from meshwright.program.program import Program
from meshwright.run.agreement import same_programs
from meshwright.run.build import Build, Lowered, Micro, micro_ranges
from meshwright.run.data.ahead import ReadAhead
from meshwright.run.data.batch import checked, cut, digest
from meshwright.run.data.samples import Source
from meshwright.run.executor import Committed, Step, execute
from meshwright.run.initial import Make, initial_state, rounding_of
from meshwright.run.meter import Meter
from meshwright.run.step import Metrics, Policy, RankState, StepWork

__all__ = ["Fetched", "Make", "Worker", "advance", "initial_state", "rounding_of"]

_STATE = ("model/", "buffer/", "constant/", "scale")
"""What a rank holds between steps, by how its names begin."""


_FAILED_AHEAD = "a rank cannot load the next batch"


@dataclass(frozen=True, slots=True)
class Fetched:
    """This rank's part of a global batch: per micro-batch its form, leaves and first position."""

    step: int
    micros: tuple[Micro, ...]
    leaves: tuple[list[Tensor], ...]
    firsts: tuple[int, ...]
    digest: int


class Worker:
    """A rank: holds its state between steps and runs steps as exchanges."""

    def __init__(
        self,
        build: Build,
        rank: int,
        source: Source | None,
        policy: Policy,
        make: Make | None = None,
    ) -> None:
        """`source` is None where batches are pushed only; `make` reads given weights."""
        self.build = build
        self.rank = rank
        self.source = source
        self.policy = policy
        self.place = build.place(rank)
        self.group = build.everyone
        self.state = initial_state(build, rank, make)
        self.running: dict[int, Generator[Any, Any, None]] = {}
        self.agreed: set[tuple[str, ...]] = set()
        self.flags: dict[str, bool] = {}
        self.ahead: Fetched | None = None
        self.ahead_error: Exception | None = None
        self.reading = ReadAhead(self.fetch, math.inf)  # on no thread, unless `overlap_reading`
        self.observer: Callable[[int, Lowered, Committed], None] | None = None
        self.keep_gradients: dict[str, Tensor] | None = None
        self.meter: Meter | None = None
        self.until: int | None = None  # the last step but one that is to be run, where it is known
        self.read = False  # something of the source, since it was opened
        self.unread: int | None = None  # the last step, where the user pushed its batch instead

    def close(self) -> None:
        """End what runs beside the steps, and remove what was offloaded."""
        self.reading.close()
        for tier in (self.state.kept, self.state.store):
            if tier is not None:
                tier.close()

    @property
    def phases(self) -> Mapping[str, tuple[Build, RankState]]:
        """By name, what each of the job's losses runs and steps; one without a name is all."""
        return {"": (self.build, self.state)}

    @property
    def phase(self) -> str:
        """The name of the one that runs next."""
        return ""

    def turn(self, phase: str) -> None:
        """Let this phase run next."""
        assert not phase

    def turn_at(self, step: int) -> None:
        """Let the phase run next that the job's order has at a step."""

    def overlap_reading(self) -> None:
        """Read batches while steps compute; only where one rank alone uses this process."""
        if self.source is not None and not self.source.reads_ahead:
            self.reading = ReadAhead(self.fetch)

    def fetch(self, step: int) -> Fetched:
        """Load this rank's samples of `step`."""
        assert self.source is not None
        if self.ahead_error is not None:
            raise self.ahead_error
        self.read, self.unread = True, None
        ranges = micro_ranges(self.build.job.batch_size, self.build.plan.microbatches)
        micros, leaves, digest = [], [], 0
        for start, stop in ranges:
            low, high = self.build.samples_of(self.rank, (start, stop))
            batch = self.source.fetch(step, low, high, (start, stop))
            example, tensors = example_of(batch.tree)
            micros.append(Micro(example, stop - start))
            leaves.append(self._cast(tensors))
            digest = (digest * 1_000_003 + batch.digest) % 2**20
        base = step * self.build.job.batch_size
        firsts = tuple(base + start for start, _ in ranges)
        return Fetched(step, tuple(micros), tuple(leaves), firsts, digest)

    def _cast(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t.to(in_dtype(t.dtype, self.build.dtype)) for t in tensors]

    def agree_on_shapes(self, fetched: Fetched) -> Generator[Any, Any, Fetched]:
        """Have all ranks run the same program: where shapes differ, collate whole micro-batches."""
        same = yield from same_everywhere(fetched.digest, self.group)
        if same:
            return fetched
        again = yield from self._whole(fetched.step)
        return again

    def require_same_shapes(self, fetched: Fetched) -> Generator[Any, Any, None]:
        """Refuse pushed batches whose shapes differ between ranks."""
        same = yield from same_everywhere(fetched.digest, self.group)
        if not same:
            shapes = [tuple(t.shape) for t in fetched.leaves[0]]
            raise UserCodeError(
                f"the batch given to run.step() in step {fetched.step + 1} has other shapes or "
                f"dtypes on other ranks (here {shapes}); give every rank batches that differ in "
                "dim 0 only"
            )

    def _whole(self, step: int) -> Generator[Any, Any, Fetched]:
        assert self.source is not None
        self.source.whole = True
        self.source.notes.append(
            "ranks' samples collate to different shapes, so each rank collates the whole "
            "micro-batch "
            "and keeps its samples: exact, but slower; pad to a fixed length to avoid it"
        )
        fetched = self.fetch(step)
        same = yield from same_everywhere(fetched.digest, self.group)
        if not same:
            raise UserCodeError(
                f"ranks disagree about the shapes of the batch of step {step + 1} even when each "
                "collates"
                " all of it; the dataset or collate must give the same samples on every rank"
            )
        return fetched

    def lowered(self, fetched: Fetched) -> Lowered:
        """The compiled list for batches of this form."""
        return self.build.lowered(self.rank, fetched.micros)

    def step(
        self, fetched: Fetched, upcoming: int | None
    ) -> Generator[Any, Any, tuple[Metrics, Any]]:
        """Run one step; an exchange. `upcoming` is the step whose batch to look at ahead."""
        yield from self.same_program(fetched)
        lowered = self.lowered(fetched)
        work = self.work(fetched, upcoming)
        work.expected = lowered.totals
        committed: Committed = yield from self.run(lowered, work)
        if self.observer is not None:
            self.observer(fetched.step, lowered, committed)
        if self.ahead is not None and work.digests_differ and not work.failed_ahead:
            self.ahead = yield from self._whole(self.ahead.step)
        return committed.result, committed.timing

    @property
    def flags_behind(self) -> int:
        """How many steps ago a step's flags may have been raised."""
        return 0

    def drain(self) -> Generator[Any, Any, None]:
        """Leave nothing in flight between steps; an exchange."""
        yield from ()

    def restart(self) -> None:
        """The state is another's, of another step."""

    def same_program(self, fetched: Fetched) -> Generator[Any, Any, None]:
        """When batches take a new form, compare the traced programs of all ranks.

        Raises:
            UsageError: they differ; on every rank.
        """
        key = tuple(micro.key for micro in fetched.micros)
        if key not in self.agreed:
            self.agreed.add(key)
            yield from same_programs(self.programs(fetched), self.group)

    def programs(self, fetched: Fetched) -> tuple[Program, ...]:
        """The traced programs of a batch's micro-batches."""
        return tuple(self.build.unit(micro).program for micro in fetched.micros)

    def work(self, fetched: Fetched, upcoming: int | None) -> AheadWork:
        """What the executor is sent for one step."""
        return AheadWork(self, fetched, upcoming)

    def run(self, lowered: Lowered, work: Step) -> Generator[Any, Any, Committed]:
        """Send the list's executor its work and pass its requests on, until it commits."""
        key = id(lowered)
        if key not in self.running:
            self.state.values.update(lowered.constants)
            started = execute(
                lowered.compiled.instructions,
                lowered.functions,
                self.state.values,
                self.place,
                self.build.dtype,
                self.state.store,
            )
            next(started)
            self.running[key] = started
        try:
            committed: Committed = yield from advance(self.running[key], work)
        except BaseException:
            self.running.pop(key, None)
            self._forget()
            raise
        return committed

    def _forget(self) -> None:
        """What a step that did not commit left behind is no state."""
        values = self.state.values
        for name in [n for n in values if not n.startswith(_STATE)]:
            del values[name]

    def pushed(self, tree: Any, step: int, *, local: bool) -> Fetched:
        """A batch of the user's own: the global one, or this rank's rows of it."""
        self.unread = step
        size = self.build.job.batch_size
        ranges = micro_ranges(size, self.build.plan.microbatches)
        mine = [self.build.samples_of(self.rank, r) for r in ranges]
        rows = sum(stop - start for start, stop in mine) if local else size
        tree = checked(tree, rows)
        micros, leaves, taken = [], [], 0
        for (start, stop), (low, high) in zip(ranges, mine, strict=True):
            first = taken if local else low
            part = cut(tree, first, first + high - low, rows)
            taken += high - low
            example, tensors = example_of(part)
            micros.append(Micro(example, stop - start))
            leaves.append(self._cast(tensors))
        firsts = tuple(step * size + start for start, _ in ranges)
        found = 0
        for part_leaves in leaves:
            found = (found * 1_000_003 + digest(part_leaves, part_leaves[0].shape[0])) % 2**20
        return Fetched(step, tuple(micros), tuple(leaves), firsts, found)


def advance(executor: Generator[Any, Any, Any], answer: Any) -> Generator[Any, Any, Committed]:
    """Send `answer` to an executor and pass its requests on, until it yields what is done."""
    request = executor.send(answer)
    while not isinstance(request, Committed):
        try:
            answer = yield request
        except BaseException as error:
            executor.throw(error)
            raise
        request = executor.send(answer)
    return request


class AheadWork(StepWork):
    """A step that loads the next step's batch before Agree, so that its shapes travel along."""

    def __init__(self, worker: Worker, fetched: Fetched, upcoming: int | None) -> None:
        self.worker = worker
        self.upcoming = upcoming
        self.fetched = fetched
        super().__init__(
            worker.state,
            worker.policy,
            fetched.step,
            self._operands,
            worker.group,
            {**worker.flags, _FAILED_AHEAD: False},
        )
        self.failed_ahead = False
        self.keep_gradients = worker.keep_gradients
        self.meter = worker.meter
        if upcoming is not None and worker.source is not None:
            worker.reading.begin(upcoming)

    def _operands(self, microbatch: int) -> tuple[Mapping[str, Tensor], Tensor]:
        fetched = self.fetched
        names = [name for name, _, _ in fetched.micros[microbatch].example.leaves]
        position = position_operand(
            self.worker.build.job.seed, fetched.firsts[microbatch], fetched.step, microbatch
        )
        return dict(zip(names, fetched.leaves[microbatch], strict=True)), position

    def finish(self, values: dict[str, Tensor]) -> None:
        """Look ahead, then take the sums together."""
        worker = self.worker
        worker.ahead = None
        if self.upcoming is not None and worker.source is not None:
            try:
                worker.ahead = worker.reading.finish(self.upcoming)
                self.next_digest = worker.ahead.digest
            except Exception as error:  # noqa: BLE001 - this step is whole; the next one raises it
                worker.ahead_error = error
                self.flags[_FAILED_AHEAD] = True
        super().finish(values)

    @override
    def commit(self, values: dict[str, Tensor]) -> Metrics:
        """Note whether a rank could not look ahead: shapes are then not to be compared."""
        metrics = super().commit(values)
        self.failed_ahead = _FAILED_AHEAD in metrics.flags
        return replace(metrics, flags=metrics.flags - {_FAILED_AHEAD})


def same_everywhere(digest: int, group: Group) -> Generator[Any, Any, bool]:
    """Whether all members hold the same 20-bit digest (N times the sum of squares tells)."""
    vector = torch.tensor([digest, digest * digest], dtype=torch.float64)
    total = yield from all_reduce(vector, group, label="shapes of the next batch")
    return float(total[0]) ** 2 == len(group.ranks) * float(total[1])
