"""The memory of one ordered pair of ranks: a ring of bytes that one writes and the other reads.

A lane is a segment that its sender makes:

    header | sender's counter | receiver's counter | refusal | ring

Both counters count bytes over the lane's life and only grow. What is between them is in the ring
and not taken yet; a place is written again only once it has been taken.
"""

from __future__ import annotations

import struct
from typing import final

from meshwright.comm.cargo import Cargo, move
from meshwright.comm.segment import Segment

__all__ = ["HEAD", "TEXT", "Lane", "capacity_for", "size_of"]

TEXT = 256
_FACTS = struct.Struct("<QQ")
HEAD = _FACTS.size + TEXT  # of a message: digest of what it means, its bytes, and the words
# In words of 8 bytes, two lines apart: the processor fetches lines in pairs.
_WRITTEN, _TAKEN, _ATTACHED, _REFUSED = 8, 40, 41, 42
_WHY, _WHY_ENDS, _DATA = 1024, 3072, 4096
_LEAST, _OFTEN, _MOST = 1 << 20, (1 << 25) + (1 << 16), 1 << 26
_MESSAGES = 4
_PIECE = 1 << 19  # so that a large message is read while the rest of it is written


@final
class Lane:
    """A lane's segment, as one of its two ends uses it."""

    def __init__(self, segment: Segment) -> None:
        """`segment` has `size_of(capacity)` bytes."""
        self.segment = segment
        self.capacity = len(segment.memory) - _DATA
        self._words = memoryview(segment.memory).cast("Q")
        self._start = segment.data.data_ptr() + _DATA
        self._position = 0  # of this end: bytes written or taken, published or not

    @property
    def position(self) -> int:
        """How far this end has come."""
        return self._position

    @property
    def attached(self) -> bool:
        """Whether the receiver has it, and so does not need the sender any more."""
        return bool(self._words[_ATTACHED])

    def attach(self) -> None:
        """Say that the receiver has it."""
        self._words[_ATTACHED] = 1

    # ── the sender's end ──

    def free(self) -> int:
        """How many bytes may be written."""
        return self.capacity - (self._position - self._words[_TAKEN])

    def write_head(self, digest: int, size: int, words: bytes) -> None:
        """Write a message's head, for which there is room."""
        head = _FACTS.pack(digest, size) + words.ljust(TEXT, b"\0")
        offset = self._position % self.capacity
        first = min(HEAD, self.capacity - offset)
        move(self._start + offset, head[:first], first)
        move(self._start, head[first:], HEAD - first)
        self._position += HEAD

    def load(self, cargo: Cargo, done: int) -> int:
        """Write what follows `done` bytes of `cargo`, as far as there is room; how many bytes."""
        offset = self._position % self.capacity
        count = min(self.free(), cargo.size - done, _PIECE)
        first = min(count, self.capacity - offset)
        cargo.load(self._start + offset, done, done + first)
        if count > first:
            cargo.load(self._start, done + first, done + count)
        self._position += count
        return count

    def publish(self) -> None:
        """What has been written may be taken."""
        self._words[_WRITTEN] = self._position

    def refused(self) -> str | None:
        """Why the receiver will take no more."""
        if not self._words[_REFUSED]:
            return None
        return self.segment.memory[_WHY:_WHY_ENDS].rstrip(b"\0").decode(errors="ignore")

    # ── the receiver's end ──

    def there(self) -> int:
        """How many bytes may be taken."""
        return self._words[_WRITTEN] - self._position

    def read_head(self) -> tuple[int, int, bytes]:
        """Take a message's head, which is there: its digest, its bytes, its words."""
        place = self._position % self.capacity
        first = min(HEAD, self.capacity - place)
        memory = self.segment.memory
        head = memory[_DATA + place : _DATA + place + first] + memory[_DATA : _DATA + HEAD - first]
        self._position += HEAD
        digest, size = _FACTS.unpack_from(head)
        return digest, size, head[_FACTS.size :].rstrip(b"\0")

    def unload(self, cargo: Cargo, done: int) -> int:
        """Take what follows `done` bytes of `cargo`, as far as it is there; how many bytes."""
        offset = self._position % self.capacity
        count = min(self.there(), cargo.size - done, _PIECE)
        first = min(count, self.capacity - offset)
        cargo.unload(self._start + offset, done, done + first)
        if count > first:
            cargo.unload(self._start, done + first, done + count)
        self._position += count
        return count

    def release(self) -> None:
        """What has been taken may be written again."""
        self._words[_TAKEN] = self._position

    def refuse(self, why: str) -> None:
        """Take no more, and let the sender know why."""
        text = why.encode(errors="replace")[: _WHY_ENDS - _WHY]
        self.segment.memory[_WHY : _WHY + len(text)] = text
        self._words[_REFUSED] = 1


def capacity_for(message: int) -> int:
    """Bytes of a ring for messages of this many bytes: several, or one of the large ones."""
    wanted = min(_MESSAGES * message, max(_OFTEN, message), _MOST)
    return -(-max(wanted, _LEAST) // _DATA) * _DATA


def size_of(capacity: int) -> int:
    """Bytes of a lane's segment."""
    return _DATA + capacity
