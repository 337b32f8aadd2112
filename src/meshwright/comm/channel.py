"""What the members of one group share: counters, slots for data, and who may touch which when.

A channel is a segment of memory:

    header | counters of every member | slot headers | slots of every member

Each member owns its counters and its slots and writes nothing else. Data goes in *rounds*, numbered
from 0 over the channel's life: in round n each member *posts* something (or nothing) in its slot
n mod SLOTS, and *takes* what it needs from the others' slots. A slot is written again only when all
others have taken the round that it held, so successive collectives cannot race. A channel has two
such streams, so that the two phases of an all-reduce need not alternate.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from meshwright.comm import futex
from meshwright.comm.segment import HEADER, Segment

__all__ = ["SLOTS", "Bells", "Channel", "Meaning", "Need", "Stream", "size_of"]

SLOTS = 4
_LINE = 64
_WORD = 8
_TEXT = 256  # bytes, in a slot's header
_WORDS = _LINE // _WORD
_VIEWS = 4096
_NEWS, _CARD = 1016, 192
_CORES = 256  # bits in the second half of a bell's line; more cores share bits
# The processor fetches lines in pairs, so what two processes write lies two lines apart.
_MEMBER = 4 * _WORDS

Need = tuple[Sequence[int], int]
"""Words of the channel, and what each must reach: what a collective waits for."""


@final
class Bells:
    """The segment of a world: the word that each rank sleeps on, and what ranks leave for others.

    That is the news of who is lost, and for each ordered pair the card of its first lane.
    """

    def __init__(self, segment: Segment, rank: int, size: int) -> None:
        """A segment of `Bells.bytes(size)` bytes, as rank `rank` uses it."""
        self.segment, self._rank = segment, rank
        self._words = memoryview(segment.memory)[HEADER:].cast("I")
        self._address = segment.data.data_ptr() + HEADER
        self._news = HEADER + size * _LINE
        self._cards, self._size = self._news + _WORD + _NEWS, size

    @staticmethod
    def bytes(size: int) -> int:
        """Bytes for a world of `size` ranks."""
        return HEADER + size * _LINE + _WORD + _NEWS + size * size * _CARD

    def declare(self, cores: Collection[int]) -> None:
        """Say on which cores this rank may run."""
        mask = sum(1 << core for core in {core % _CORES for core in cores})
        start = HEADER + self._rank * _LINE + _LINE // 2
        self.segment.memory[start : start + _CORES // 8] = mask.to_bytes(_CORES // 8, "little")

    def cores(self, size: int) -> int:
        """On how many cores the ranks may run, all together, once all have declared theirs."""
        starts = [HEADER + rank * _LINE + _LINE // 2 for rank in range(size)]
        masks = [self.segment.memory[start : start + _CORES // 8] for start in starts]
        union = 0
        for mask in masks:
            union |= int.from_bytes(mask, "little")
        return union.bit_count()

    def doze(self) -> None:
        """Announce that this rank is about to sleep; then look once more, then `sleep`."""
        self._words[self._rank * 16] = 1
        futex.fence()

    def sleep(self) -> None:
        """Sleep until rung, or for a moment."""
        futex.wait(self._address + self._rank * _LINE, 1)

    def rise(self) -> None:
        """Take back `doze`."""
        self._words[self._rank * 16] = 0

    def ring(self, ranks: Sequence[int]) -> None:
        """Wake those of `ranks` that sleep, after something has been published for them."""
        futex.fence()
        words = self._words
        for rank in ranks:
            if words[rank * 16]:
                words[rank * 16] = 0
                futex.wake(self._address + rank * _LINE)

    def tell(self, reason: str) -> None:
        """Leave word why the world cannot go on, for those who lose the store as well."""
        memory, start = self.segment.memory, self._news
        if not memory[start]:
            text = reason.encode(errors="replace")[:_NEWS]
            memory[start + _WORD : start + _WORD + len(text)] = text
            memory[start] = 1
            futex.fence()

    def news(self) -> str | None:
        """What somebody has told."""
        memory, start = self.segment.memory, self._news
        if not memory[start]:
            return None
        start += _WORD
        return memory[start : start + _NEWS].rstrip(b"\0").decode(errors="ignore")

    def leave(self) -> None:
        """Say that this rank will receive no more."""
        self._words[self._rank * 16 + 1] = 1

    def left(self, rank: int) -> bool:
        """Whether a rank will receive no more."""
        return bool(self._words[rank * 16 + 1])

    def leave_card(self, to: int, card: str) -> None:
        """Leave the card of the lane from this rank, for rank `to` to find; once."""
        data, start = card.encode(), self._card(self._rank, to)
        assert len(data) < _CARD
        self.segment.memory[start + 1 : start + 1 + len(data)] = data
        self.segment.memory[start] = 1  # last, and so seen last
        futex.fence()

    def card(self, source: int) -> str | None:
        """The card of the lane from rank `source` to this one, once it is there."""
        memory, start = self.segment.memory, self._card(source, self._rank)
        if not memory[start]:
            return None
        return memory[start + 1 : start + _CARD].rstrip(b"\0").decode()

    def _card(self, source: int, to: int) -> int:
        return self._cards + (source * self._size + to) * _CARD


@dataclass(frozen=True, slots=True)
class Meaning:
    """What all members must mean by their next collective: in words, and a digest of them."""

    words: bytes
    digest: int


@final
class Stream:
    """One sequence of rounds: this member's own counters, and those of its peers."""

    __slots__ = (
        "_bells", "_mine", "_peers", "_words", "everyone", "next", "posted", "posts", "taken",
        "takes",
    )  # fmt: skip

    def __init__(
        self, words: memoryview, base: int, me: int, ranks: Sequence[int], bells: Bells
    ) -> None:
        """Counters from word `base` on, of which member `me` of `ranks` writes its own."""
        others = [member for member in range(len(ranks)) if member != me]
        self._words, self._bells = words, bells
        self._mine = base + me * _MEMBER
        self._peers = tuple(ranks[member] for member in others)
        self.posts = {member: base + member * _MEMBER for member in others}
        self.everyone = tuple(self.posts.values())
        self.takes = tuple(base + member * _MEMBER + 2 * _WORDS for member in others)
        self.posted = self.taken = 0  # rounds so far, of this member
        self.next: int | None = 0  # the next round that no collective has yet, None while unknown

    def may_post(self, number: int) -> bool:
        """Whether it is round `number`'s turn, and all have taken what its slot held."""
        if number != self.posted:
            return False
        words, least = self._words, number - SLOTS + 1
        for word in self.takes:  # noqa: SIM110  half as slow as all(...), and on every path
            if words[word] < least:
                return False
        return True

    def may_take(self, number: int, words_of: Sequence[int]) -> bool:
        """Whether it is round `number`'s turn, and the senders with these words have posted it."""
        if number != self.taken:
            return False
        words = self._words
        for word in words_of:  # noqa: SIM110  as above
            if words[word] <= number:
                return False
        return True

    def publish(self) -> None:
        """What this member writes in the next round is in its slot."""
        self.posted += 1
        self._words[self._mine] = self.posted
        self._bells.ring(self._peers)

    def release(self, *, quiet: bool = False) -> None:
        """This member needs no more of the others' slots of the round that it takes."""
        self.taken += 1
        self._words[self._mine + 2 * _WORDS] = self.taken
        if not quiet:
            self._bells.ring(self._peers)


@final
class Channel:
    """A group's segment, as its member number `me` uses it."""

    def __init__(
        self, segment: Segment, me: int, ranks: tuple[int, ...], bells: Bells, capacity: int
    ) -> None:
        """`segment` has `size_of(len(ranks), capacity)` bytes."""
        self.segment, self.me, self.ranks, self.size = segment, me, ranks, len(ranks)
        self.others = tuple(member for member in range(self.size) if member != me)
        self.capacity = capacity
        self.share = _share(capacity, self.size)
        self.words = memoryview(segment.memory).cast("Q")
        counters = HEADER // _WORD
        self.inputs = Stream(self.words, counters, me, ranks, bells)
        counters += self.size * _MEMBER
        self.results = Stream(self.words, counters, me, ranks, bells)
        self._headers = counters + self.size * _MEMBER
        self._header = _header(self.size) // _WORD
        start = segment.data.data_ptr()
        first = _data(self.size)
        self._inputs = [first + m * SLOTS * capacity for m in range(self.size)]
        first += self.size * SLOTS * capacity
        self._results = [first + m * SLOTS * self.share for m in range(self.size)]
        self._start = start
        self._views: dict[Hashable, Tensor] = {}
        self._scratch = torch.empty(capacity, dtype=torch.uint8)

    def input(self, member: int, number: int) -> int:
        """Offset of a member's slot of `capacity` bytes for round `number` of `inputs`."""
        return self._inputs[member] + number % SLOTS * self.capacity

    def result(self, member: int, number: int) -> int:
        """Offset of a member's slot of `share` bytes for round `number` of `results`."""
        return self._results[member] + number % SLOTS * self.share

    def address(self, offset: int) -> int:
        """Where in this process's memory an offset is."""
        return self._start + offset

    def view(
        self, offset: int, size: int, dtype: torch.dtype, shape: Sequence[int] | None = None
    ) -> Tensor:
        """`size` bytes at `offset` as a tensor, flat or of a shape; kept, since slots return."""
        key = (offset, size, dtype, shape)
        known = self._views.get(key)
        if known is None:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            flat = self.segment.data[offset : offset + size].view(dtype)
            known = self._views[key] = flat if shape is None else flat.view(tuple(shape))
        return known

    def scratch(self, size: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of `size` bytes that stays in cache; it holds until the next call."""
        known = self._views.get((size, dtype))
        if known is None:
            known = self._views[size, dtype] = self._scratch[:size].view(dtype)
        return known

    def operands(self, number: int, mine: Tensor) -> list[Tensor]:
        """Every member's tensor of a round, each at its slot's start: all are like `mine`."""
        parts = [mine] * self.size
        for member in self.others:
            slot = self.input(member, number)
            parts[member] = self.view(slot, mine.nbytes, mine.dtype, mine.shape)
        return parts

    def announce(self, number: int, meaning: Meaning, rounds: int, counts: Sequence[int]) -> None:
        """Before posting a collective's first round: what it is, how long, bytes for each."""
        words, base = self.words, self._slot(self.me, number)
        if words[base] != meaning.digest:
            words[base] = meaning.digest
            start = (base + _WORDS) * _WORD
            self.segment.memory[start : start + _TEXT] = meaning.words
        if counts:
            words[base + 1] = rounds
            for member, count in enumerate(counts):
                words[base + _WORDS + _TEXT // _WORD + member] = count

    def differs(self, number: int, meaning: Meaning, members: Sequence[int]) -> bool:
        """Whether some of `members` announced another collective."""
        words, digest = self.words, meaning.digest
        first, step = self._slot(0, number), SLOTS * self._header
        for member in members:  # noqa: SIM110  on every path
            if words[first + member * step] != digest:
                return True
        return False

    def meanings(self, number: int) -> list[bytes]:
        """What each member announced, in words."""
        starts = [(self._slot(m, number) + _WORDS) * _WORD for m in range(self.size)]
        return [self.segment.memory[start : start + _TEXT] for start in starts]

    def announced(self, member: int, number: int) -> tuple[int, int]:
        """How many rounds a member wants, and how many bytes it has for this one."""
        base = self._slot(member, number)
        return self.words[base + 1], self.words[base + _WORDS + _TEXT // _WORD + self.me]

    def owing(self, need: Need) -> set[int]:
        """The ranks whose counters have not reached what is needed of them."""
        words, least = need
        first = HEADER // _WORD
        late = [word for word in words if self.words[word] < least]
        return {self.ranks[(word - first) // _MEMBER % self.size] for word in late}

    def _slot(self, member: int, number: int) -> int:
        return self._headers + (member * SLOTS + number % SLOTS) * self._header


def size_of(members: int, capacity: int) -> int:
    """Bytes of a channel's segment, when a round takes `capacity` bytes of each member."""
    return _data(members) + members * SLOTS * (capacity + _share(capacity, members))


def _share(capacity: int, members: int) -> int:
    """Bytes of a round that one member reduces or receives: whole lines, hence whole elements."""
    return max(capacity // members // _LINE, 1) * _LINE


def _header(members: int) -> int:
    """Bytes of a slot's header: digest and rounds, words, counts."""
    return -(-(_LINE + _TEXT + members * _WORD) // _LINE) * _LINE


def _data(members: int) -> int:
    """Where the slots begin: a page's border after all counters and headers."""
    used = HEADER + 2 * members * _MEMBER * _WORD + members * SLOTS * _header(members)
    return -(-used // 4096) * 4096
