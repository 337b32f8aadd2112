"""How a collective moves through a channel: it posts and takes rounds, and never waits.

A collective is a generator that runs as far as it can and yields what it needs of its peers, to be
resumed later; its return value is its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.comm import fingerprint
from meshwright.comm.base import Reduction, Start
from meshwright.comm.cargo import views
from meshwright.comm.channel import SLOTS, Channel, Meaning, Need
from meshwright.comm.pool import Pool

__all__ = ["LINE", "Act", "Call", "Steps", "compare", "even", "fold", "pump"]

Steps = Generator[Need | None, None, tuple[Tensor, ...]]
Act = Callable[[int, int], None]
"""Given a round's place in the collective and its number in the channel, copies in or out."""

LINE = 64
_REDUCE: dict[Reduction, Callable[..., Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


@dataclass(slots=True, eq=False)  # not frozen: one is made at every collective
class Call:
    """A collective as its generator needs it: dense tensors, and what they mean.

    Attributes:
        fresh: whether all members shall compare their meanings, rather than those that meet anyway.
    """

    channel: Channel
    request: Start
    tensors: tuple[Tensor, ...]
    meaning: Meaning
    pool: Pool
    fresh: bool

    def like(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """New tensors like these, end to end in one piece of memory."""
        whole = self.pool.empty((sum([tensor.numel() for tensor in tensors]),), tensors[0].dtype)
        return views(whole, [tensor.shape for tensor in tensors])


def pump(
    call: Call,
    rounds: int,
    post: Act,
    take: Act,
    senders: Sequence[int] | None = None,
    counts: Sequence[int] = (),
) -> Generator[Need | None, None, None]:
    """Post and take all rounds, as soon as each may be.

    Args:
        call: whose rounds they are.
        rounds: how many this member needs; where members may differ, it has `counts`.
        post: given the round's place in the collective and its number in the channel, copies in.
        take: the same, copies out.
        senders: whose posts are taken; all others', if not given.
        counts: bytes for each member, if members cannot know them; then the longest decides.
    """
    channel, stream = call.channel, call.channel.inputs
    while stream.next is None:
        yield None
    first, stream.next = stream.next, None if counts else stream.next + rounds
    senders = channel.others if senders is None else senders
    words = tuple(stream.posts[member] for member in senders)
    meet = channel.others if call.fresh or counts else senders
    who = tuple(stream.posts[member] for member in meet)
    posted = taken = 0
    total = rounds
    while taken < total:
        if taken < posted and stream.may_take(first + taken, who):
            if taken == 0:
                compare(call, first, meet)
                if counts:
                    total = max(rounds, *(channel.announced(m, first)[0] for m in channel.others))
                    stream.next = first + total
                who = words
            take(taken, first + taken)
            stream.release()
            taken += 1
        elif posted < total and stream.may_post(first + posted):
            if posted == 0:
                channel.announce(first, call.meaning, rounds, counts)
            if posted < rounds:
                post(posted, first + posted)
            stream.publish()
            posted += 1
        elif taken < posted:
            yield (who, first + taken + 1) if stream.taken == first + taken else None
        else:
            turn = stream.posted == first + posted
            yield (stream.takes, first + posted - SLOTS + 1) if turn else None


def compare(call: Call, number: int, members: Sequence[int]) -> None:
    """See that these members mean the same collective as this one."""
    channel = call.channel
    if channel.differs(number, call.meaning, members):
        words = [text.rstrip(b"\0").decode(errors="replace") for text in channel.meanings(number)]
        fingerprint.require_same(words, channel.ranks, call.request.group.axis)


def even(size: int, limit: int) -> int:
    """Bytes a round, so that rounds are alike, at most `limit`."""
    rounds = max(1, -(-size // limit))
    return max(1, -(-size // rounds // LINE)) * LINE


def fold(parts: Sequence[Tensor], how: Reduction, out: Tensor | None = None) -> Tensor:
    """Reduce `parts` in their order, into `out` if given."""
    add = _REDUCE[how]
    total = add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        add(total, part, out=total)
    return total
