"""All-reduce in two phases: each member reduces its share of every piece, then all read all shares.

Inputs go through one stream of the channel and reduced shares through the other. A member reduces
straight from the others' slots.
"""

from __future__ import annotations

from typing import final

from meshwright.comm.cargo import Cargo
from meshwright.comm.channel import SLOTS, Need
from meshwright.comm.pump import LINE, Call, Steps, compare, even, fold

__all__ = ["reduce_in_shares", "shares"]


def reduce_in_shares(call: Call) -> Steps:
    """The steps of an all-reduce among three members or more."""
    inputs = call.channel.inputs
    while inputs.next is None:
        yield None
    work = _Work(call)
    while work.taken < work.rounds:
        if not (work.collect() or work.reduce() or work.post()):
            yield work.need()
    return work.answers


@final
class _Work:
    """One all-reduce under way: how many rounds this member has posted, reduced and taken."""

    def __init__(self, call: Call) -> None:
        self.call, self.channel = call, call.channel
        self.cargo, self.dtype = Cargo(call.tensors), call.tensors[0].dtype
        self.answers = call.tensors if call.request.donate else call.like(call.tensors)
        self.target = self.cargo if call.request.donate else Cargo(self.answers)
        members = self.channel.size
        self.pieces = shares(self.cargo.size, self.channel.share * members, members)
        self.rounds = len(self.pieces)
        inputs, results = self.channel.inputs, self.channel.results
        assert inputs.next is not None
        assert results.next is not None
        self.first, inputs.next = inputs.next, inputs.next + self.rounds
        self.then, results.next = results.next, results.next + self.rounds
        self.inputs, self.results = tuple(inputs.posts.values()), tuple(results.posts.values())
        self.posted = self.reduced = self.taken = 0

    def post(self) -> bool:
        """Copy in a piece, but for this member's own share of it; False if it may not yet."""
        k, channel = self.posted, self.channel
        number = self.first + k
        if k == self.rounds or not channel.inputs.may_post(number):
            return False
        if k == 0:
            channel.announce(number, self.call.meaning, self.rounds, ())
        bounds, me = self.pieces[k], channel.me
        slot, start = channel.address(channel.input(me, number)), bounds[0]
        for low, high in ((start, bounds[me]), (bounds[me + 1], bounds[-1])):
            if high > low:
                self.cargo.load(slot + low - start, low, high)
        channel.inputs.publish()
        self.posted += 1
        return True

    def reduce(self) -> bool:
        """Reduce this member's share of a piece and post it; False if it may not yet."""
        k, channel = self.reduced, self.channel
        number, then = self.first + k, self.then + k
        if (
            k == self.posted
            or not channel.inputs.may_take(number, self.inputs)
            or not channel.results.may_post(then)
        ):
            return False
        if k == 0:
            compare(self.call, number, channel.others)
        low, high = self.pieces[k][channel.me], self.pieces[k][channel.me + 1]
        if high > low:
            self._fold(low, high, low - self.pieces[k][0], number, then)
        channel.inputs.release(quiet=True)  # the same ranks are rung next
        channel.results.publish()
        self.reduced += 1
        return True

    def _fold(self, low: int, high: int, place: int, number: int, then: int) -> None:
        """Reduce bytes `low` to `high`, which are at `place` in the others' slots."""
        channel, dtype, own = self.channel, self.dtype, self.cargo.part(low, high)
        parts = [
            own
            if member == channel.me
            else channel.view(channel.input(member, number) + place, high - low, dtype)
            for member in range(channel.size)
        ]
        slot = channel.result(channel.me, then)
        fold(parts, self.call.request.reduce, channel.view(slot, high - low, dtype))
        self.target.unload(channel.address(slot), low, high)

    def collect(self) -> bool:
        """Copy out the others' shares of a piece; False if they are not there."""
        k, channel = self.taken, self.channel
        then = self.then + k
        if k == self.reduced or not channel.results.may_take(then, self.results):
            return False
        for member in channel.others:
            low, high = self.pieces[k][member], self.pieces[k][member + 1]
            if high > low:
                slot = channel.address(channel.result(member, then))
                self.target.unload(slot, low, high)
        channel.results.release()
        self.taken += 1
        return True

    def need(self) -> Need:
        """What it waits for when nothing can be done."""
        channel = self.channel
        if self.taken < self.reduced:
            return self.results, self.then + self.taken + 1
        number = self.first + self.reduced
        if self.reduced < self.posted and not channel.inputs.may_take(number, self.inputs):
            return self.inputs, number + 1
        if self.reduced < self.posted:
            return channel.results.takes, self.then + self.reduced - SLOTS + 1
        return channel.inputs.takes, self.first + self.posted - SLOTS + 1


def shares(size: int, limit: int, members: int) -> list[list[int]]:
    """For each round, where the members' shares of it begin, and where the last ends, in bytes.

    Args:
        size: bytes in all.
        limit: bytes of a round at most.
        members: how many take a share.
    """
    piece = even(size, limit)
    bounds = []
    for low in range(0, max(size, 1), piece):
        high = min(low + piece, size)
        share = -(-(high - low) // members // LINE) * LINE
        bounds.append([min(low + member * share, high) for member in range(members + 1)])
    return bounds
