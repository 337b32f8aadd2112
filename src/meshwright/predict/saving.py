"""Saving: what a choice of values to save costs, in bytes at every op and in work done again.

Time is the number of an op of the program before anything is repeated. What is repeated for a
backward op is counted together, at its time; between, a storage is there

    saved      from its op to the last that reads it, be it a repeated one
    repeated   from the backward op for which it is made again to the last that reads it
    neither    as long as forward ops read it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from meshwright.program.program import Program
from meshwright.program.remat import Forward

__all__ = ["Account", "Saving", "Storage", "Work", "account", "saving_of"]


@dataclass(frozen=True, slots=True)
class Storage:
    """A forward value that may be saved, or computed again.

    Attributes:
        bytes: that it takes on a rank.
        copies: how many micro-batches have one at once.
        maker: the forward op.
        until: the last forward op that reads it; the maker if none does.
        first, last: the first and last backward op that reads it; None: none does.
        readers: the forward ops that read it and may be repeated.
    """

    bytes: int
    copies: int
    maker: int
    until: int
    first: int | None
    last: int | None
    readers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """A forward op that may be repeated.

    Attributes:
        cost: of doing it.
        reads, makes: storages.
        spare: bytes that it makes beside, and nobody reads.
    """

    cost: float
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    spare: int = 0


@dataclass(frozen=True, slots=True)
class Saving:
    """What may be chosen.

    Attributes:
        end: the number of the first backward op.
        fixed: at every op, the bytes that are there whatever is saved.
        storages: by their value.
        works: by the number of the op.
    """

    end: int
    fixed: tuple[int, ...]
    storages: Mapping[int, Storage]
    works: Mapping[int, Work]


@dataclass(frozen=True, slots=True)
class Account:
    """Of a choice: the cost of what is repeated, which ops that is, and the bytes at every op."""

    cost: float
    repeated: frozenset[int]
    bytes: tuple[int, ...]

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return max(self.bytes, default=0)


def saving_of(
    program: Program,
    sizes: Sequence[int],
    costs: Sequence[float],
    copies: Mapping[int, int] | None = None,
) -> Saving:
    """What may be chosen for a micro-batch.

    Args:
        program: the micro-batch, or the part of it that a rank does.
        sizes: bytes of each value on a rank.
        costs: seconds of each op.
        copies: of each op's values, how many micro-batches have them at once; 1 by itself.
    """
    forward, copies = Forward.of(program), copies or {}
    numbers = forward.repeats(())
    chosen = set(forward.direct) | {v for n in numbers for v in forward.read(n)}
    until: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    for number in range(forward.end):
        for value in forward.read(number):
            until[value] = number
            if number in numbers:
                readers.setdefault(value, []).append(number)
    storages = {}
    for value in sorted(chosen):
        maker, uses = forward.makers[value], forward.direct.get(value, ())
        storages[value] = Storage(
            sizes[value],
            copies.get(maker, 1),
            maker,
            until.get(value, maker),
            min(uses, default=None),
            max(uses, default=None),
            tuple(readers.get(value, ())),
        )
    works = {
        number: Work(
            costs[number],
            forward.read(number),
            tuple(sorted(forward.root_made(number) & chosen)),
            sum(
                sizes[value]
                for value in program.ops[number].results
                if forward.root[value] == value and value not in chosen
            ),
        )
        for number in sorted(numbers)
    }
    return Saving(forward.end, _fixed(forward, sizes, until), storages, works)


def _fixed(forward: Forward, sizes: Sequence[int], until: Mapping[int, int]) -> tuple[int, ...]:
    """Bytes at every op of what is not to be chosen, and of the forward while it is read there."""
    program, root = forward.program, forward.root
    inputs = {value for _, value in program.inputs}
    last: dict[int, int] = {}
    for number, op in enumerate(program.ops):
        last.update((root[value], number) for value in op.inputs)
    last.update((root[value], len(program.ops) - 1) for _, value in program.outputs)
    change = [0] * (len(program.ops) + 1)
    for number, op in enumerate(program.ops):
        for value in op.results:
            if root[value] != value or value in inputs:
                continue
            free = value in forward.makers and value not in forward.held
            ends = until.get(value, number) if free else max(last.get(value, number), number)
            change[number] += sizes[value]
            change[ends + 1] -= sizes[value]
    return tuple(accumulate(change[:-1]))


def account(saving: Saving, kept: Iterable[int]) -> Account:
    """What saving the storages `kept` comes to."""
    there = set(kept)
    begun = _begun(saving, there)
    last = {v: s.last for v, s in saving.storages.items() if s.last is not None}
    for number, time in begun.items():
        for value in saving.works[number].reads:
            last[value] = max(last.get(value, time), time)
    change = [0] * (len(saving.fixed) + 1)
    always = 0
    for value in there & last.keys():
        storage = saving.storages[value]
        change[storage.until + 1] += storage.bytes
        change[last[value] + 1] -= storage.bytes
        always += (storage.copies - 1) * storage.bytes
    for number, time in begun.items():
        change[time] += saving.works[number].spare
        change[time + 1] -= saving.works[number].spare
        for value in saving.works[number].makes:
            ends = time if value in there else max(last.get(value, time), time)
            change[time] += saving.storages[value].bytes
            change[ends + 1] -= saving.storages[value].bytes
    each = zip(accumulate(change), saving.fixed, strict=False)
    cost = sum(saving.works[number].cost for number in begun)
    return Account(cost, frozenset(begun), tuple(always + more + fixed for more, fixed in each))


def _begun(saving: Saving, there: set[int]) -> dict[int, int]:
    """Repeated op -> the backward op before which that is done."""
    found: dict[int, int] = {}
    wanted = ((s.first, v) for v, s in saving.storages.items() if s.first is not None)
    for time, first in sorted(wanted):
        waiting = [first]
        while waiting:
            value = waiting.pop()
            number = saving.storages[value].maker
            if value not in there and number not in found:
                found[number] = time
                waiting += saving.works[number].reads
    return found
