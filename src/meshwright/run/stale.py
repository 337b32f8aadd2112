"""One step of an asynchronous pipeline on one rank: its sums, its update, versions of its weights.

Nobody waits for all ranks. A minibatch's sums travel with it: every stage adds its own on the way
forward, the last one sends their totals back with the gradients, and so each stage has them before
its update. What a rank wants to tell all others (stop, save) travels likewise, and all ranks act on
it at the step of the minibatch that it came with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from meshwright.comm.base import Group, Start, Wait, all_reduce
from meshwright.compile.draw import position_operand
from meshwright.errors import UserCodeError
from meshwright.run.build import Build, Micro
from meshwright.run.executor import older
from meshwright.run.step import Metrics, Policy, RankState, StepWork, Totals
from meshwright.schedule.endless import at
from meshwright.schedule.pipedream import Asynchronous, Seat

__all__ = ["Rank", "StaleWork", "Versions", "mean", "riders"]

_RIDERS = ("digest", "digest2", "ranks")


def riders(totals: Sequence[str], flags: Iterable[str]) -> tuple[str, ...]:
    """The names of what travels with a minibatch."""
    sums = (name.removeprefix("total/") for name in totals)
    return (*sums, *_RIDERS, *(f"flag/{name}" for name in flags))


@dataclass(slots=True)
class Versions:
    """A rank's weights of some updates ago: as many as minibatches in flight may meet."""

    count: int
    names: tuple[str, ...]

    def keep(self, values: dict[str, Tensor]) -> None:
        """Copy the newest weights before they are updated; the oldest give up their memory."""
        if self.count == 1 or not self.names:
            return
        free = [values.pop(older(name, self.count - 1), None) for name in self.names]
        for age in range(self.count - 2, 0, -1):
            for name in self.names:
                if (tensor := values.pop(older(name, age), None)) is not None:
                    values[older(name, age + 1)] = tensor
        newest = [values[name] for name in self.names]
        pairs = zip(free, newest, strict=True)
        copies = [torch.empty_like(new) if old is None else old for old, new in pairs]
        torch._foreach_copy_(copies, newest)
        values.update((older(n, 1), t) for n, t in zip(self.names, copies, strict=True))


class Batch(Protocol):
    """This rank's part of a minibatch."""

    @property
    def step(self) -> int:
        """Its number."""

    @property
    def micros(self) -> tuple[Micro, ...]:
        """The forms of its micro-batches."""

    @property
    def leaves(self) -> tuple[list[Tensor], ...]:
        """Of each micro-batch."""

    @property
    def firsts(self) -> tuple[int, ...]:
        """The position of each one's first sample."""

    @property
    def digest(self) -> int:
        """Equal for minibatches of one form."""


class Rank(Protocol):
    """What a step knows of the rank that does it.

    Attributes:
        build: of the job.
        pipe: that the rank is part of.
        seat: the rank's.
        state: read and changed.
        policy: what to do beside the plan.
        group: all ranks.
        beside: the ranks that split this rank's minibatches with it.
        flags: what the rank tells all others.
        totals: names of the sums of a minibatch.
        versions: of the weights.
        factor: of the gradients that wait for the update.
        keep_gradients: takes those that are applied.
    """

    build: Build
    pipe: Asynchronous
    seat: Seat
    state: RankState
    policy: Policy
    group: Group
    beside: Group
    flags: dict[str, bool]
    totals: tuple[str, ...]
    versions: Versions
    factor: float
    keep_gradients: dict[str, Tensor] | None

    @property
    def batches(self) -> Mapping[int, Batch]:
        """Those in flight."""

    def takes(self, minibatch: int) -> bool:
        """Whether the rank takes a minibatch."""

    def place_of(self, minibatch: int) -> int:
        """The slot of a minibatch."""

    def mean(self, values: dict[str, Tensor], count: int) -> Generator[Any, Any, None]:
        """The mean of the replicas' gradients; an exchange."""


@dataclass(slots=True)
class Order:
    """What a step's instructions serve, in their order: micro-batches and minibatches."""

    loads: deque[int] = field(default_factory=deque)
    finished: deque[int] = field(default_factory=deque)


class StaleWork(StepWork):
    """The `Step` of a rank of an asynchronous pipeline."""

    def __init__(self, worker: Rank, step: int) -> None:
        """What rank and step do; `order` is filled with the instructions."""
        super().__init__(
            worker.state, worker.policy, step, self._operands, worker.group, dict(worker.flags)
        )
        self.worker, self.order = worker, Order()
        self.keep_gradients = worker.keep_gradients
        if self.keep_gradients is not None:
            self.keep_gradients.clear()
        self.latest = 0  # the minibatch whose forward has ended last
        self.updated = False

    @override
    def load(self, microbatch: int) -> Mapping[str, Tensor]:
        """The operands of the next micro-batch; its slot says nothing here."""
        return super().load(self.order.loads.popleft())

    def _operands(self, number: int) -> tuple[Mapping[str, Tensor], Tensor]:
        minibatch, k = divmod(number, self.worker.pipe.microbatches)
        fetched = self.worker.batches[minibatch]
        names = [name for name, _, _ in fetched.micros[k].example.leaves]
        seed = self.worker.build.job.seed
        position = position_operand(seed, fetched.firsts[k], fetched.step, k)
        return dict(zip(names, fetched.leaves[k], strict=True)), position

    @override
    def finish(self, values: dict[str, Tensor]) -> None:
        """A minibatch's forward is done here: add this rank's sums to those that came with it."""
        minibatch = self.latest = self.order.finished.popleft()
        place = self.worker.place_of(minibatch)
        digest = float(self.worker.batches[minibatch].digest)
        known = {"digest": digest, "digest2": digest * digest, "ranks": 1.0}
        known |= {f"flag/{name}": float(raised) for name, raised in self.flags.items()}
        nothing = torch.zeros((), dtype=torch.float64)
        sums = [values.pop(at(place, name), nothing) for name in self.worker.totals]
        vector = torch.stack([total.to(torch.float64) for total in sums])
        vector = torch.cat([vector, vector.new_tensor(list(known.values()))])
        before = values.pop(at(place, "coming"), None)
        values[at(place, "totals")] = vector if before is None else vector + before

    def share(self, axis: str, values: dict[str, Tensor]) -> Generator[Any, Any, None]:
        """Of the last stage's ranks, their sums; of replicas, their gradients; of the step, all."""
        if axis == "stage":
            name = at(self.worker.place_of(self.latest), "totals")
            group = self.worker.beside
            values[name] = yield from all_reduce(values[name], group, label="totals of the stage")
        elif axis == "replicas":
            yield from self.worker.mean(values, self.worker.pipe.replicas[self.worker.seat.stage])
        else:
            self._decide(values)

    def _decide(self, values: dict[str, Tensor]) -> None:
        """The step's totals have come: raise where they must not be."""
        name = at(self.worker.place_of(self.step), "totals")
        self.totals = Totals(torch.zeros(0), riders(self.worker.totals, self.flags))
        self.totals.reduced(values.pop(name))
        ranks, digest = self.totals["ranks"], self.totals["digest"]
        if digest * digest != ranks * self.totals["digest2"]:
            raise UserCodeError(
                f"ranks disagree about the shapes of the batch of step {self.step + 1}, which an "
                "asynchronous pipeline has begun to compute; pad to a fixed length, or use a "
                "schedule that flushes, such as 1f1b"
            )
        self.judge()
        if self.worker.takes(self.step):
            self.worker.factor = 1.0 / (self.totals["weight"] * float(self.scale))

    @override
    def update(self, values: dict[str, Tensor]) -> Generator[Any, Any, None]:
        """Step the optimizer on the newest weights, after a copy for minibatches in flight."""
        gradients = self.gradients(values)
        factor = self.worker.factor
        if factor != 1.0 and gradients:
            torch._foreach_mul_(list(gradients.values()), factor)
        self.worker.versions.keep(values)
        yield from self.apply(gradients)
        self.updated = True

    @override
    def commit(self, values: dict[str, Tensor]) -> Metrics:
        """New buffers become the state."""
        watched: dict[str, Tensor] = {}
        if self.worker.takes(self.step):
            prefix = at(self.worker.place_of(self.step), "")
            for name in [n for n in values if n.startswith(prefix)]:
                kind, _, bare = name.removeprefix(prefix).partition("/")
                tensor = values.pop(name)
                if kind == "next":
                    values[f"buffer/{bare}"] = tensor
                elif kind == "watch":
                    watched[bare] = tensor
        if not self.updated:
            self.state.optimizer.step()  # of no gradients: schedulers look for it
        if self.state.scheduler is not None:
            self.state.scheduler.step()
        return self.metrics(watched)


def mean(
    names: Sequence[str], values: dict[str, Tensor], factor: float, count: int, group: Group
) -> Generator[Any, Any, None]:
    """The mean of replicas' gradients; one that has none brings zeros; an exchange.

    Args:
        names: of parameters with a gradient.
        values: of the rank; its gradients are replaced.
        factor: of its own gradients.
        count: how many replicas have some.
        group: the replicas.
    """
    mine: dict[torch.dtype, dict[str, Tensor]] = {}
    for name in names:
        gradient = values.pop(f"reduced/{name}", None)
        weight = values[f"model/{name}"]
        brought = torch.zeros_like(weight) if gradient is None else gradient.to(weight.dtype)
        mine.setdefault(weight.dtype, {})[name] = brought
    for found in mine.values():
        tensors = list(found.values())
        torch._foreach_mul_(tensors, factor)
        handle = yield Start("all_reduce", group, tuple(tensors), label="gradients of replicas")
        totals = list((yield Wait(handle)))
        torch._foreach_div_(totals, float(count))
        values.update((f"reduced/{n}", t) for n, t in zip(found, totals, strict=True))
