"""N ranks in one thread: generators driven in rank order, collectives done on lists of tensors.

Deterministic and without locks. A collective is performed when its last member starts it; a rank
that waits for one that is not complete yields its turn. When nobody can move, that is the deadlock
report. This is how tests run eight ranks, and how `verify` runs by default.

A send is buffered, unless the world is told that sends wait for their recv (`comm/posted.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from meshwright.comm.base import MESSAGES, Exchange, Group, Handle, Start, Wait
from meshwright.comm.driving import require_mine
from meshwright.comm.ledger import describe
from meshwright.comm.posted import Place, Posted, Sends
from meshwright.errors import InternalError, Stalled

__all__ = ["LocalWorld", "collective", "run_local"]

_Key = tuple[Group, int]


@dataclass(slots=True)
class _Call:
    """One collective: what each member brought, and the answers once all have come."""

    starts: dict[int, Start] = field(default_factory=dict)
    results: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)


@final
class LocalWorld:
    """Drives one generator per rank; lives as long as its generators do."""

    def __init__(self, size: int, sends: Sends = "buffered") -> None:
        """A world of `size` ranks; `sends` says when a send is done."""
        self.size = size
        self._posted = Posted(sends)
        self._calls: dict[_Key, _Call] = {}
        self._entered: dict[tuple[Group, int], int] = defaultdict(int)

    def perform(self, exchanges: Sequence[Exchange]) -> list[Any]:
        """Run all exchanges to their end and return their values, in rank order."""
        return self._drive(exchanges, [None] * len(exchanges), to_return=True)

    def advance(self, exchanges: Sequence[Exchange], answers: Sequence[Any]) -> list[Any]:
        """Send each generator its answer; drive all until each yields what is no request."""
        return self._drive(exchanges, answers, to_return=False)

    def _drive(
        self, exchanges: Sequence[Exchange], answers: Sequence[Any], *, to_return: bool
    ) -> list[Any]:
        outcome: dict[int, Any] = {}
        waiting: dict[int, Wait | Handle] = {}  # a Handle is of a start that may not go on
        answer = dict(enumerate(answers))
        while len(outcome) < len(exchanges):
            moved = False
            for rank, exchange in enumerate(exchanges):
                if rank in outcome:
                    continue
                if rank in waiting:
                    ready = self._ready(rank, waiting[rank])
                    if ready is None:
                        continue
                    del waiting[rank]
                    answer[rank] = ready
                moved = True
                ended, value = self._turn(rank, exchange, answer.pop(rank, None))
                if isinstance(value, Wait | Handle) and not ended:
                    waiting[rank] = value
                elif ended or not to_return:
                    outcome[rank] = value
                else:
                    raise InternalError(f"rank {rank} yielded {value!r}, which is no request")
            if not moved:
                raise Stalled(self._deadlock(waiting, outcome))
        return [outcome[rank] for rank in range(len(exchanges))]

    def _turn(self, rank: int, exchange: Exchange, answer: Any) -> tuple[bool, Any]:
        """Let one rank run until it waits, yields something else, or returns."""
        try:
            request = exchange.send(answer)
            while isinstance(request, Start):
                handle = self._enter(rank, request)
                if request.op in MESSAGES and not self._posted.begun(request, handle.token):
                    return False, handle
                request = exchange.send(handle)
        except StopIteration as end:
            return True, end.value
        return False, request

    def _enter(self, rank: int, start: Start) -> Handle:
        if start.op in MESSAGES:
            require_mine(start, rank)
            return Handle(start, self._posted.enter(start))
        if rank not in start.group.ranks:
            raise InternalError(f"rank {rank} starts {start.op} on {start.group}, not a member")
        number = self._entered[start.group, rank]
        self._entered[start.group, rank] += 1
        key = (start.group, number)
        call = self._calls.setdefault(key, _Call())
        call.starts[rank] = start
        if len(call.starts) == len(start.group.ranks):
            ordered = [call.starts[member] for member in start.group.ranks]
            call.results = dict(zip(start.group.ranks, collective(ordered), strict=True))
        return Handle(start, key)

    def _ready(self, rank: int, wait: Wait | Handle) -> tuple[Tensor, ...] | Handle | None:
        if isinstance(wait, Handle):
            return wait if self._posted.begun(wait.request, wait.token) else None
        if isinstance(wait.handle.token, Place):
            return self._posted.ready(wait.handle.request, wait.handle.token)
        call = self._calls[wait.handle.token]
        if not call.results:
            return None
        result = call.results.pop(rank)
        if not call.results:
            del self._calls[wait.handle.token]
        return result

    def _deadlock(self, waiting: dict[int, Wait | Handle], outcome: dict[int, Any]) -> str:
        lines = ["no rank can move:"]
        for rank, wait in waiting.items():
            handle = wait if isinstance(wait, Handle) else wait.handle
            lines.append(f"  rank {rank} waits in {self._awaited(handle)}")
        lines += [f"  rank {rank} has ended its turn" for rank in outcome]
        return "\n".join(lines)

    def _awaited(self, handle: Handle) -> str:
        """What a rank waits in, and what for."""
        start = handle.request
        if isinstance(handle.token, Place):
            other = "recv" if start.op == "send" else "send"
            return f"{describe(start)} for its {other}, number {handle.token.number} that way"
        missing = [r for r in start.group.ranks if r not in self._calls[handle.token].starts]
        what = f"{start.op} over {start.group.axis} ({start.label or 'unlabelled'})"
        return f"{what} for ranks {missing}"


def run_local(exchanges: Sequence[Exchange], sends: Sends = "buffered") -> list[Any]:
    """Run one exchange per rank to its end, in one thread; their values in rank order."""
    return LocalWorld(len(exchanges), sends).perform(exchanges)


def collective(starts: Sequence[Start]) -> list[tuple[Tensor, ...]]:  # noqa: C901  a case each
    """What each member's `Wait` answers, given every member's `Start`, in group order.

    Reductions run in group order, so results do not depend on who came first.
    """
    first = starts[0]
    for start in starts[1:]:
        if (start.op, start.reduce) != (first.op, first.reduce):
            raise InternalError(
                f"ranks disagree about the next collective on axis {first.group.axis}: "
                f"{first.op} {first.reduce} ({first.label}) and "
                f"{start.op} {start.reduce} ({start.label})"
            )
    members = range(len(starts))
    _compare_shapes(starts)
    match first.op:
        case "barrier":
            return [() for _ in members]
        case "all_reduce":
            return [_reduced([s.tensors for s in starts], first.reduce) for _ in members]
        case "reduce_scatter":
            return [_reduced([_of(k, s) for s in starts], first.reduce) for k in members]
        case "all_gather":
            return [_side_by_side([s.tensors for s in starts]) for _ in members]
        case "all_to_all":
            return [tuple(t.clone() for s in starts for t in _of(k, s)) for k in members]
        case "broadcast":
            return [(starts[first.root].tensors[0].clone(),) for _ in members]
        case "permute":
            return [(starts[(k - first.root) % len(starts)].tensors[0].clone(),) for k in members]
        case "send" | "recv":
            raise InternalError(f"{describe(first)} is a message, and no collective")


def _compare_shapes(starts: Sequence[Start]) -> None:
    """What members bring must fit together, as a real transport would find out much later."""
    first = starts[0]
    for index, start in enumerate(starts):
        brought = [(tuple(t.shape), t.dtype) for t in start.tensors]
        if first.op in ("all_reduce", "reduce_scatter"):
            wanted = [(tuple(t.shape), t.dtype) for t in first.tensors]
        elif first.op == "all_gather" and first.shapes:
            k = len(first.tensors)
            shapes = first.shapes[index * k : (index + 1) * k]
            wanted = [(tuple(shape), first.tensors[0].dtype) for shape in shapes]
        else:
            continue
        if brought != wanted:
            raise InternalError(
                f"{first.op} over {first.group.axis} ({first.label}): rank"
                f" {first.group.ranks[index]} brings {brought}, but rank {first.group.ranks[0]}"
                f" expects {wanted}"
            )


def _of(member: int, start: Start) -> tuple[Tensor, ...]:
    """What `start` has for a member, of a list that goes member after member."""
    k = len(start.tensors) // len(start.group.ranks)
    return start.tensors[member * k : (member + 1) * k]


def _side_by_side(buckets: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Copies in one piece of memory, a tensor's parts end to end, as every driver answers."""
    laid = [tuple(torch.cat([t.flatten() for t in parts]).split([t.numel() for t in parts]))
            for parts in zip(*buckets, strict=True)]  # fmt: skip
    return tuple(
        laid[k][member].view(tensor.shape)
        for member, bucket in enumerate(buckets)
        for k, tensor in enumerate(bucket)
    )


def _reduced(buckets: Sequence[tuple[Tensor, ...]], how: str) -> tuple[Tensor, ...]:
    """The reduction of every place of the members' buckets."""
    return tuple(_reduce(parts, how) for parts in zip(*buckets, strict=True))


def _reduce(tensors: Sequence[Tensor], how: str) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        if how == "sum":
            total += tensor
        elif how == "max":
            torch.maximum(total, tensor, out=total)
        else:
            torch.minimum(total, tensor, out=total)
    return total
