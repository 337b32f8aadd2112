"""The driver over shared memory: the ranks of one host, at the speed of its memory.

Nothing runs in the background. A collective moves on while its rank is in any Start or Wait, so
several may be under way over different groups; a rank that can do nothing sleeps on its bell. While
it sleeps it looks after the others: a process that ended is known to the kernel at once, and what
ranks say about one another is in the store.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, final

from torch import Tensor

from meshwright.comm import driving, fingerprint
from meshwright.comm.base import MESSAGES, Exchange, Handle, Start, Wait, World
from meshwright.comm.channel import Channel, Meaning, Need
from meshwright.comm.ledger import Entry, Ledger, describe
from meshwright.comm.local import collective
from meshwright.comm.mail import Mail
from meshwright.comm.meeting import Meeting
from meshwright.comm.pool import Pool
from meshwright.comm.pump import Call, Steps
from meshwright.comm.rounds import begin
from meshwright.comm.sharing import Ground
from meshwright.errors import InternalError, PeerLost

__all__ = ["Shared"]

_SPIN, _VAIN = 30e-6, 6
_LOOK, _ASK = 0.05, 0.25
_RECIPES = 4096


@dataclass(slots=True, eq=False)
class _Place:
    """One collective of the program, however often it runs: `seen` once it has been finished."""

    seen: bool = False


@dataclass(slots=True, eq=False)
class _Group:
    """A channel, and how many collectives it has had."""

    channel: Channel
    calls: int = 0


@dataclass(slots=True, eq=False)
class _Recipe:
    """What is the same whenever tensors of the same shapes come to the same place.

    Messages have no group.
    """

    group: _Group | None
    meaning: Meaning
    place: _Place
    bytes: int


@dataclass(slots=True, eq=False)
class _Running:
    """A started collective or half of a message: `steps` until it is done, and its answer then."""

    request: Start
    entry: Entry
    recipe: _Recipe | None = None
    number: int = 0
    steps: Steps | None = None
    need: Need | None = None
    answer: tuple[Tensor, ...] = ()
    error: BaseException | None = None

    def name(self) -> str:
        """Alike on all members, by its number in the group."""
        kind = "message" if self.request.op in MESSAGES else "call"
        return f"{describe(self.request)}, {kind} {self.number}"


@final
class Shared:
    """A `Comm` over shared memory; use `Shared.over`."""

    def __init__(self, ground: Ground) -> None:
        self._ground: Ground | None = ground
        self._world = ground.meeting.world
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._places: dict[Hashable, _Place] = {}
        self._recipes: dict[Hashable, _Recipe] = {}
        self._running: list[_Running] = []
        self._pool = Pool()
        self._mail = Mail(ground.bells, ground.peers, self._pool)
        # Where ranks outnumber cores, whoever spins keeps another from doing its work.
        size = self._world.size
        self._spin = _SPIN if ground.bells.cores(size) >= size else 0.0
        self._vain = self._unspun = 0
        self.ledger = Ledger(self._world.rank)
        self.notes: tuple[str, ...] = ()

    @classmethod
    def over(cls, meeting: Meeting, refusal: str | None = None) -> Shared:
        """Share memory with all ranks of a meeting, if every one of them can.

        Args:
            meeting: the ranks.
            refusal: why this rank does not want to.

        Raises:
            Unsuited: some rank cannot; the same on every rank.
            PeerLost: one of them ended meanwhile.
        """
        return cls(Ground.prepare(meeting, refusal))

    @property
    def world(self) -> World:
        """Which rank this is, of how many."""
        return self._world

    def perform(self, exchange: Exchange, answer: Any = None) -> Any:
        """Drive `exchange` until it returns, and return its value."""
        return driving.perform(self, exchange, answer)

    def advance(self, exchange: Exchange, answer: Any = None) -> Any:
        """Drive `exchange` until it yields something that is no request, and return that.

        If the exchange returns instead, so does this, with its value.
        """
        return driving.advance(self, exchange, answer)

    def close(self) -> None:
        """Leave the world, once; rank 0, who keeps the store, waits a little for the others."""
        if self._ground is not None:
            self._mail.close()
            self._ground.meeting.leave()
            self._ground.close()
            for group in self._groups.values():
                group.channel.segment.close()
            self._ground = None
            self._groups, self._recipes, self._running = {}, {}, []

    def abandon(self, reason: str) -> None:
        """Tell the other ranks why this one ends, so that they stop at once and can say so."""
        if self._ground is not None:
            reason = f"rank {self._world.rank} ended: {reason}"
            self._ground.bells.tell(reason)
            self._ground.meeting.roll.tell(reason)

    def start(self, request: Start) -> Handle:
        """Begin a collective: copy in what there is room for, and go on with what others wait for.

        The tensors of `request` must stay as they are until it has been waited for.
        """
        recipe = self._recipes.get(_key(request)) or self._recipe(request)
        if recipe is None:
            (answer,) = collective([request])
            return Handle(request, _Running(request, self.ledger.enter(request), answer=answer))
        tensors = tuple([_dense(tensor) for tensor in request.tensors])
        entry = self.ledger.enter(request, recipe.bytes)
        number, steps = self._begin(request, tensors, recipe)
        running = _Running(request, entry, recipe, number, steps)
        self._running.append(running)
        self._go_on()
        return Handle(request, running)

    def wait(self, wait: Wait) -> tuple[Tensor, ...]:
        """Finish a collective."""
        running: _Running = wait.handle.token
        if running.error is not None:
            raise running.error
        if running.steps is not None and not self._spun(running):
            self._sleep(running)
        if running.recipe is not None:
            running.recipe.place.seen = True
        self.ledger.leave(running.entry)
        return running.answer

    def _begin(
        self, request: Start, tensors: tuple[Tensor, ...], recipe: _Recipe
    ) -> tuple[int, Steps]:
        """Its number in its group, or on its way, and its steps."""
        group = recipe.group
        if group is None:
            return self._mail.begin(request, tensors, recipe.meaning)
        group.calls += 1
        fresh = not recipe.place.seen
        call = Call(group.channel, request, tensors, recipe.meaning, self._pool, fresh)
        return group.calls, begin(call)

    def _group(self, request: Start) -> _Group | None:
        """Whose channel it goes through; None for a message."""
        ground, ranks = self._alive(), request.group.ranks
        if request.op in MESSAGES:
            return None
        group = self._groups.get(ranks)
        if group is None:
            channel = ground.channel(ranks, describe(request), self._go_on)
            group = self._groups[ranks] = _Group(channel)
        return group

    def _recipe(self, request: Start) -> _Recipe | None:
        """Look at a request whose like has not come before; None for a group of one."""
        driving.require_mine(request, self._world.rank)
        if len(request.group.ranks) == 1:
            return None
        group = self._group(request)
        words = fingerprint.text(request).encode(errors="replace")
        words = words[: fingerprint.BYTES].ljust(fingerprint.BYTES, b"\0")
        digest = int.from_bytes(blake2b(words, digest_size=8).digest(), "little")
        place = self._places.setdefault((request.op, request.group, request.label), _Place())
        if len(self._recipes) >= _RECIPES:
            self._recipes.clear()
        brought = sum(tensor.nbytes for tensor in request.tensors)
        recipe = _Recipe(group, Meaning(words, digest), place, brought)
        self._recipes[_key(request)] = recipe
        return recipe

    def _go_on(self) -> None:
        """Let every collective under way do what it can, in the order of their starts."""
        ended = False
        for running in self._running:
            assert running.steps is not None
            try:
                running.need = next(running.steps)
            except StopIteration as end:
                running.answer, running.steps, ended = end.value, None, True
            except BaseException as error:
                running.error = error  # its steps are gone: whoever waits for it must know
                raise
        if ended:
            self._running = [running for running in self._running if running.steps is not None]

    def _spun(self, running: _Running) -> bool:
        """Whether the collective ends within moments, where there are cores enough to look.

        After looking in vain it looks less often: another program may want the core, and then
        the peer may be waiting for just this one.
        """
        if self._ended(running):
            return True
        if self._unspun:
            self._unspun -= 1
            return False
        end, need = time.perf_counter() + self._spin, running.need
        while time.perf_counter() < end:
            if self._ended(running):
                self._vain = 0
                return True
            if running.need != need:  # it moves on, though it does not end yet
                end, need, self._vain = time.perf_counter() + self._spin, running.need, 0
        self._vain = min(self._vain + 1, _VAIN)
        self._unspun = (1 << self._vain) - 1
        return False

    def _ended(self, running: _Running) -> bool:
        """Go on, and tell whether the collective is done."""
        self._go_on()
        return running.steps is None

    def _sleep(self, running: _Running) -> None:
        """Sleep and go on by turns until the collective is done, with an eye on the others."""
        began, roll = time.monotonic(), self._alive().meeting.roll
        look, ask, told = began + _LOOK, began + _ASK, False
        while not (self._dozed(running) or self._spun(running)):
            now = time.monotonic()
            if now >= look:
                self._look_after(running)
                look = now + _LOOK
            if now >= ask:
                if not told:
                    roll.waits(running.name())
                    told = True
                roll.check_news(describe(running.request))
                self._in_time(running, now - began)
                ask = now + _ASK
        if told:
            roll.goes_on()

    def _dozed(self, running: _Running) -> bool:
        """Sleep for a moment at most, if there is nothing to do; whether the collective is done."""
        bells = self._alive().bells
        bells.doze()
        try:
            if self._ended(running):  # by what came before others could see that this rank sleeps
                return True
            bells.sleep()
        finally:
            bells.rise()
        return False

    def _look_after(self, running: _Running) -> None:
        """Raise PeerLost if a rank has ended that the collective needs, or somebody says so."""
        ground = self._alive()
        what, news = describe(running.request), ground.bells.news()
        if news is not None:
            raise PeerLost(f"{what} cannot finish: {news}")
        self._mail.check()
        if not ground.peers.ended(running.request.group.ranks):
            return
        self._go_on()  # what they published before they ended counts
        gone = ground.peers.ended(self._owing(running))
        if gone:
            roll, reason = ground.meeting.roll, ground.meeting.roll.obituary(gone)
            ground.bells.tell(reason)
            if 0 not in gone or ground.meeting.where.hosted:  # else the store went with it
                roll.check_news(what)
                roll.tell(reason)
            raise PeerLost(f"{what} cannot finish: {reason}")

    def _owing(self, running: _Running) -> set[int]:
        """The ranks without whose next move the collective, or one ahead of it, cannot go on."""
        if running.steps is None:
            return set()
        assert running.recipe is not None
        group = running.recipe.group
        if group is None:
            return {running.request.peer}
        ahead = self._running[: self._running.index(running) + 1]
        needs = [
            other.need
            for other in ahead
            if other.need is not None and other.recipe is not None and other.recipe.group is group
        ]
        return {rank for need in needs for rank in group.channel.owing(need)}

    def _in_time(self, running: _Running, waited: float) -> None:
        """Raise Stalled past the deadline."""
        assert running.recipe is not None
        meeting = self._alive().meeting
        deadline = meeting.deadline
        seconds = deadline.after if running.recipe.place.seen else deadline.first
        if waited > seconds:
            last = self.ledger.last_left.text() if self.ledger.last_left else "none"
            ranks = running.request.group.ranks
            error = meeting.stalled(running.name(), ranks, seconds, last)
            self._alive().bells.tell(str(error))
            raise error

    def _alive(self) -> Ground:
        if self._ground is None:
            raise InternalError(f"rank {self._world.rank} has left the world")
        return self._ground


def _key(request: Start) -> Hashable:
    """What tells recipes apart."""
    tensors, group = request.tensors, request.group
    shapes = tuple([tensor.shape for tensor in tensors])
    # A message's may differ.
    dtype = tuple([tensor.dtype for tensor in tensors]) if request.op == "send" else (
        tensors[0].dtype if tensors else request.dtypes
    )  # fmt: skip
    return (
        request.op, group.ranks, group.axis, request.label, request.reduce, request.root,
        request.shapes, shapes, dtype,
    )  # fmt: skip


def _dense(tensor: Tensor) -> Tensor:
    """The same numbers as plain memory."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.contiguous()
