"""Requests that generators yield, and the drivers' end that performs them.

Whatever communicates is a generator of requests (an `Exchange`); it uses `yield from` and never
touches a process group. Only drivers in `comm/` perform requests. A request's answer is sent back
in; an error is thrown in at the yield.

    handle = yield Start("all_reduce", group, (tensor,))     # the driver answers a Handle
    (total,) = yield Wait(handle)                            # the driver answers tensors

A message goes along an ordered pair of ranks, of which each side starts its own half:

    pair = Group("pipeline", (0, 1))                                           # from 0 to 1
    sent = yield Start("send", pair, (x,), label="activations 3")              # on rank 0
    come = yield Start("recv", pair, shapes=((2, 8),), dtypes=(x.dtype,), label="activations 3")

Messages of a pair match in the order of their starts on each side; those of (1, 0), and collectives
over the same ranks, go their own way.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # the supervisor reads World from here, and starts a second sooner without torch
    import torch
    from torch import Tensor

__all__ = [
    "Comm",
    "Exchange",
    "Group",
    "Handle",
    "MESSAGES",
    "Op",
    "Reduction",
    "Start",
    "Wait",
    "World",
    "all_gather",
    "all_reduce",
    "barrier",
    "gather_json",
    "recv",
    "send",
]

Op = Literal[
    "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "permute", "barrier",
    "send", "recv",
]  # fmt: skip
MESSAGES: frozenset[Op] = frozenset({"send", "recv"})
Reduction = Literal["sum", "max", "min"]


@dataclass(frozen=True, slots=True)
class World:
    """Which processes take part: `epoch` grows each time membership changes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks along one mesh axis (or `world`), in coordinate order."""

    axis: str
    ranks: tuple[int, ...]

    @classmethod
    def world(cls, size: int) -> Group:
        """Every rank."""
        return cls("world", tuple(range(size)))


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Begin a collective over `group`; the answer is a `Handle`.

    Every member passes its own `tensors`, k of one dtype where they come in buckets; lists for
    members go member after member, k for each. What `Wait` answers is a tuple:

    * `all_reduce`: k tensors -> k reduced
    * `all_gather`: k tensors -> k per member; `shapes`, k per member, names each member's (members
      may differ; without it all are like mine)
    * `reduce_scatter`: k tensors per member -> my k chunks, reduced
    * `all_to_all`: k tensors per member -> k per member, with `shapes` as received
    * `broadcast`: (tensor,) -> (the tensor of member `root`,)
    * `permute`: (tensor,) -> (the tensor of the member whose index is `root` before mine,)
    * `barrier`: () -> ()
    * `send`: k tensors of any dtypes -> (), when they may be written again. It is started without
      the receiver; `Wait` may have to stay until it takes what is more than a driver keeps
    * `recv`: () -> k tensors of `shapes` and `dtypes`, in memory of its own

    The group of a message is (source, destination), and both say the same `label`, shapes and
    dtypes.

    Answers may be views of one another's memory, end to end: those of an `all_gather`, member 0's
    j-th, member 1's j-th and so on, for each j.

    `label` says what it serves (a parameter, a source line): for the ledger and for errors. With
    `donate` the caller gives its tensors up: an `all_reduce` may leave its answer in their memory.
    `into` offers an `all_gather` memory for its answer, in the answer's order; a member's own part
    may lie in its own tensors.
    """

    op: Op
    group: Group
    tensors: tuple[Tensor, ...] = ()
    reduce: Reduction = "sum"
    shapes: tuple[tuple[int, ...], ...] = ()
    root: int = 0
    label: str = ""
    donate: bool = False
    into: tuple[Tensor, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def peer(self) -> int:
        """The rank at the other end of a message."""
        return self.group.ranks[self.op == "send"]


@dataclass(frozen=True, slots=True, eq=False)
class Handle:
    """What a driver answers to `Start`; only the driver that made it reads `token`."""

    request: Start
    token: Any


@dataclass(frozen=True, slots=True, eq=False)
class Wait:
    """Wait for a started collective; the answer is its tuple of tensors."""

    handle: Handle


Exchange = Generator[Any, Any, Any]


class Comm(Protocol):
    """A driver: performs the requests of one rank's generators over a real transport."""

    @property
    def world(self) -> World:
        """Which rank this is, of how many."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about how data travels."""

    def perform(self, exchange: Exchange, answer: Any = None) -> Any:
        """Drive `exchange` until it returns, and return its value."""

    def advance(self, exchange: Exchange, answer: Any = None) -> Any:
        """Drive `exchange` until it yields something that is no request, and return that."""

    def close(self) -> None:
        """Leave the world; peers that still wait get an error."""


def all_reduce(
    tensor: Tensor, group: Group, reduce: Reduction = "sum", label: str = ""
) -> Generator[Any, Any, Tensor]:
    """The reduction of every member's `tensor` (same shape and dtype on all)."""
    if len(group.ranks) == 1:
        return tensor
    handle = yield Start("all_reduce", group, (tensor,), reduce, label=label)
    (total,) = yield Wait(handle)
    return total  # type: ignore[no-any-return]


def all_gather(
    tensor: Tensor, group: Group, shapes: tuple[tuple[int, ...], ...], label: str = ""
) -> Generator[Any, Any, tuple[Tensor, ...]]:
    """Every member's tensor, in group order; `shapes` are the members' shapes."""
    if len(group.ranks) == 1:
        return (tensor,)
    handle = yield Start("all_gather", group, (tensor,), shapes=shapes, label=label)
    parts = yield Wait(handle)
    return tuple(parts)


def barrier(group: Group, label: str = "") -> Generator[Any, Any, None]:
    """Return once every member has come here."""
    if len(group.ranks) > 1:
        handle = yield Start("barrier", group, label=label)
        yield Wait(handle)


def send(
    tensors: tuple[Tensor, ...], source: int, to: int, label: str = "", axis: str = "pipeline"
) -> Generator[Any, Any, None]:
    """Send `tensors` and return once they may be written again."""
    yield Wait((yield Start("send", Group(axis, (source, to)), tensors, label=label)))


def recv(
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    source: int,
    to: int,
    label: str = "",
    axis: str = "pipeline",
) -> Generator[Any, Any, tuple[Tensor, ...]]:
    """What `source` sends next to `to`, which is this rank."""
    pair = Group(axis, (source, to))
    answer = yield Wait((yield Start("recv", pair, shapes=shapes, dtypes=dtypes, label=label)))
    return tuple(answer)


def gather_json(value: Any, group: Group, label: str = "") -> Generator[Any, Any, list[Any]]:
    """Every member's JSON-able `value`, in group order (canonical JSON bytes on the wire)."""
    import torch

    data = bytearray(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
    mine = torch.frombuffer(data, dtype=torch.uint8)
    count = torch.tensor([len(data)], dtype=torch.int64)
    counts = yield from all_gather(count, group, ((1,),) * len(group.ranks), label)
    shapes = tuple((int(n.item()),) for n in counts)
    parts = yield from all_gather(mine, group, shapes, label)
    return [json.loads(bytes(part.numpy().tobytes())) for part in parts]
