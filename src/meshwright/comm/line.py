"""Messages over gloo: a connection for each ordered pair, and a thread at each of its ends.

gloo's own send lasts until the receiver has come, and a wait for it that ends early closes all
connections. So a thread does both, and meets the peer's thread to connect: no rank waits for
another to open a line, and data moves while both compute. What is sent is copied, up to a bound;
beyond it the wait for a send lasts until the message has gone.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torch.distributed import DistError

from meshwright.comm import fingerprint
from meshwright.comm.base import Start
from meshwright.comm.gloo import Link
from meshwright.comm.meeting import Meeting
from meshwright.comm.store import await_keys
from meshwright.errors import UserCodeError

__all__ = ["Job", "Lines"]

_KEPT = 1 << 26
_ALIGNED = 64
_TAGS = 1 << 30
_SLICE = 0.1
_LEAVE_WITHIN, _HANG_UP_WITHIN = 10.0, 1.0


@dataclass(slots=True, eq=False)
class Job:
    """One half of a message: `done` when it has gone or come, or failed with `error`.

    Attributes:
        kept: a copy is sent, so its sender need not wait.
    """

    request: Start
    number: int
    size: int
    payload: Tensor | None = None
    kept: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    answer: tuple[Tensor, ...] = ()


class _Closed(Exception):
    """This rank leaves."""


@final
class Lines:
    """The lines of one rank."""

    def __init__(self, meeting: Meeting, connect: Callable[[str, int], Link]) -> None:
        """`connect` joins a pair, given a name and this rank's place, when both do so."""
        self._meeting, self._connect = meeting, connect
        self._lines: dict[tuple[int, ...], _Line] = {}

    def post(self, request: Start) -> Job:
        """Begin one half of a message.

        Raises:
            UserCodeError: an earlier message was not what the other side meant.
        """
        ranks = request.group.ranks
        line = self._lines.get(ranks)
        if line is None:
            line = self._lines[ranks] = _Line(self._meeting, self._connect, request)
        return line.post(request)

    def check(self) -> None:
        """Raise UserCodeError if some receiver did not expect what this rank has sent."""
        for line in self._lines.values():
            line.check()

    def close(self) -> None:
        """Stay until what was sent has gone, or its receiver leaves too; then hang up."""
        self._meeting.roll.sign("closing")
        end = time.monotonic() + _LEAVE_WITHIN
        for line in self._lines.values():
            while (busy := line.busy) and time.monotonic() < end and not line.deserted():
                busy[0].done.wait(_SLICE)
        for line in self._lines.values():
            line.hang_up()
        self._lines = {}


@final
class _Line:
    """One end of a line."""

    def __init__(
        self, meeting: Meeting, connect: Callable[[str, int], Link], request: Start
    ) -> None:
        self._meeting, self._connect = meeting, connect
        self._ranks, self._sends = request.group.ranks, request.op == "send"
        self._peer = request.peer
        self._name = f"line/{self._ranks[0]},{self._ranks[1]}"
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._posted: list[Job] = []
        self._link: Link | None = None
        self._closing = threading.Event()
        self._number = 0
        self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> list[Job]:
        """The sends that have not gone yet."""
        self._posted = [job for job in self._posted if not job.done.is_set()]
        return self._posted if self._sends else []

    def post(self, request: Start) -> Job:
        """Let the thread do its half."""
        size = _layout(request)[-1]
        job = Job(request, self._number, size)
        self._number += 1
        if self._sends and sum(job.size for job in self.busy if job.kept) + size <= _KEPT:
            job.payload, job.kept = _packed(request), True
        self._posted.append(job)
        self._jobs.put(job)
        return job

    def check(self) -> None:
        """Raise UserCodeError if the receiver did not expect what was sent."""
        if self._sends and self._meeting.store.check([f"{self._name}/refused"]):
            raise UserCodeError(self._meeting.get(f"{self._name}/refused", self._name))

    def deserted(self) -> bool:
        """Whether the peer will take no more."""
        alive = self._meeting.roll.cards[self._peer].alive()
        try:
            return alive is False or self._meeting.store.check([f"closing/{self._peer}"])
        except DistError:
            return True

    def hang_up(self) -> None:
        """End the thread, whatever it waits for."""
        self._closing.set()
        self._jobs.put(None)
        # Where it is in the midst of a message, the other end hangs up as well, which ends it.
        self._thread.join(_HANG_UP_WITHIN)

    def _work(self) -> None:
        """The thread: one job after the other; after a failure all fail."""
        failure: Exception | None = None
        while (job := self._jobs.get()) is not None:
            try:
                if failure is not None:
                    raise failure
                self._do(job)
            except Exception as error:  # noqa: BLE001  whoever waits for the job raises it
                # Frames hold the link, and the other end must see that this one is gone.
                job.error = failure = error.with_traceback(None)
                self._link = None
            job.payload = None
            job.done.set()
        self._link = None

    def _do(self, job: Job) -> None:
        if self._link is None:
            self._meet()
            self._link = self._connect(self._name, self._ranks.index(self._meeting.world.rank))
        (self._send if self._sends else self._recv)(self._link, job)

    def _meet(self) -> None:
        """Until the thread at the other end has come, too."""
        self._meeting.roll.sign(self._name)
        while not await_keys(self._meeting.store, [f"{self._name}/{self._peer}"], _SLICE):
            if self._closing.is_set():
                raise _Closed

    def _send(self, link: Link, job: Job) -> None:
        payload = _packed(job.request) if job.payload is None else job.payload
        words = fingerprint.encode(fingerprint.text(job.request))
        tag = 2 * job.number % _TAGS
        works = [link.gloo.send([words], 1, tag)]
        if job.size:
            works.append(link.gloo.send([payload], 1, tag + 1))
        for work in works:
            work.wait()

    def _recv(self, link: Link, job: Job) -> None:
        words, tag = fingerprint.encode(""), 2 * job.number % _TAGS
        link.gloo.recv([words], 0, tag).wait()
        sent, wanted = fingerprint.decode(words), fingerprint.text(job.request)
        if sent != wanted:
            why = fingerprint.differing(self._ranks, sent, wanted)
            self._meeting.put(f"{self._name}/refused", why, self._name)
            raise UserCodeError(why)
        whole = torch.empty(job.size, dtype=torch.uint8)
        if job.size:
            link.gloo.recv([whole], 0, tag + 1).wait()
        job.answer = _unpacked(whole, job.request)


def _layout(request: Start) -> list[int]:
    """Where each tensor begins in a message's one piece of memory, and where the last ends."""
    if request.op == "send":
        sizes = [tensor.nbytes for tensor in request.tensors]
    else:
        kinds = zip(request.shapes, request.dtypes, strict=True)
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds]
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // _ALIGNED) * _ALIGNED)
    return places


def _packed(request: Start) -> Tensor:
    """A copy of the tensors of a message in one piece."""
    places = _layout(request)
    whole = torch.empty(places[-1], dtype=torch.uint8)
    for place, tensor in zip(places, request.tensors, strict=False):
        part = whole[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        part.copy_(tensor.detach())
    return whole


def _unpacked(whole: Tensor, request: Start) -> tuple[Tensor, ...]:
    """The tensors of a message that has come."""
    parts = []
    for place, shape, dtype in zip(_layout(request), request.shapes, request.dtypes, strict=False):
        size = math.prod(shape) * dtype.itemsize
        parts.append(whole[place : place + size].view(dtype).view(tuple(shape)))
    return tuple(parts)
