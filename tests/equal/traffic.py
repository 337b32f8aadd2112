"""What really moves: a driver that writes down every collective that each rank starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from meshwright.comm.base import Start
from meshwright.comm.local import LocalWorld
from meshwright.run.worker import Fetched, Worker
from tests.equal.harness import Case


@dataclass(frozen=True)
class Sent:
    """One collective as a rank started it."""

    op: str
    label: str
    elements: int


def moved(start: Start, index: int) -> int:
    """Elements that the member at `index` has to receive, at least, for one bucket."""
    sizes = [tensor.numel() for tensor in start.tensors]
    members = len(start.group.ranks)
    match start.op:
        case "all_reduce":
            return sum(2 * (members - 1) * size // members for size in sizes)
        case "all_gather":
            return sum(math.prod(shape) for shape in start.shapes) - sum(sizes)
        case "reduce_scatter":
            count = len(sizes) // members
            return sum(sizes) - sum(sizes[index * count : (index + 1) * count])
    raise AssertionError(start.op)


def recorded(
    exchange: Generator[Any, Any, Any],
    rank: int,
    log: list[Sent],
    look: Callable[[], None] | None = None,
) -> Generator[Any, Any, Any]:
    """The same exchange, its collectives noted; `look` is called at each."""
    request = next(exchange)
    while True:
        if isinstance(request, Start):
            index = request.group.ranks.index(rank)
            log.append(Sent(request.op, request.label, moved(request, index)))
            if look is not None:
                look()
        answer = yield request
        try:
            request = exchange.send(answer)
        except StopIteration as end:
            return end.value


def first_step(
    case: Case, plan: str, look: Callable[[Worker], None] | None = None
) -> tuple[list[Worker], list[Fetched], list[list[Sent]]]:
    """Run step 0 in float32; the workers, their batches, and what each of them sent."""
    build = case.build(plan, None)
    workers = case.workers(build)
    world = LocalWorld(len(workers))
    fetched = world.perform([w.agree_on_shapes(w.fetch(0)) for w in workers])
    logs: list[list[Sent]] = [[] for _ in workers]

    def watched(worker: Worker) -> Callable[[], None] | None:
        return None if look is None else lambda: look(worker)

    world.perform(
        [
            recorded(w.step(f, None), w.rank, log, watched(w))
            for w, f, log in zip(workers, fetched, logs, strict=True)
        ]
    )
    return workers, fetched, logs
