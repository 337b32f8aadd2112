"""What a rank's instruction list holds, read off the list itself, value by value.

Storages are counted once, however many values view them. Large results of collectives lie in memory
of their own, which is kept for the next ones: it does not give room to anything else.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshwright.predict.memory import live_bytes
from meshwright.program.assemble import Compiled
from meshwright.program.away import AWAY
from meshwright.program.donate import bases
from meshwright.program.instruction import Instruction
from meshwright.program.offload import FLIGHT
from meshwright.program.partition import COLLECTIVES
from meshwright.program.program import Op, Program

__all__ = ["Held", "most_held", "staged_bill"]

_SUMS = ("gradient/", "reduced/")
_POOLED, _GRAIN, _WASTE = 1 << 20, 1 << 21, 8  # as comm/pool.py


@dataclass(slots=True)
class _Pool:
    """Memory that results of collectives lie in, as comm/pool.py hands it out and keeps it.

    Attributes:
        total: bytes of all blocks.
        idle: sizes of those that nobody uses.
        block: of each storage in one, the block.
        sizes, users: of each block, its bytes and how many storages it has.
    """

    total: int = 0
    idle: list[int] = field(default_factory=list)
    block: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    users: Counter[int] = field(default_factory=Counter)

    def lay(self, storages: Collection[int], size: int) -> None:
        """Have a block of `size` bytes for these."""
        fitting = [b for b in self.idle if size <= b <= _WASTE * size]
        if fitting:
            self.idle.remove(found := min(fitting))
        else:
            self.total += (found := size + -size % _GRAIN)
        number = len(self.sizes)
        self.sizes[number] = found
        self.users[number] = len(storages)
        self.block |= dict.fromkeys(storages, number)

    def leave(self, storage: int) -> None:
        """A storage goes; its block, with the last one."""
        number = self.block.pop(storage, None)
        if number is None:
            return
        self.users[number] -= 1
        if not self.users[number]:
            self.idle.append(self.sizes[number])


@dataclass(frozen=True, slots=True)
class Held:
    """The most bytes that a list holds beside state, at once and by kind.

    Attributes:
        peak: of all kinds at once.
        gradients, activations: each by itself.
    """

    peak: int
    gradients: int
    activations: int


def most_held(compiled: Compiled, weights: Mapping[str, int]) -> Held:
    """What a step holds; `weights` are bytes at rest, by `model/` name, of what is offloaded."""
    walk = _Walk(compiled, resting=dict(weights))
    for instruction in compiled.instructions.body:
        walk.take(instruction)
    return Held(walk.peak + walk.pool.total, walk.most["gradient"], walk.most["activation"])


def staged_bill(
    compiled: Compiled,
    weights: Mapping[str, int],
    buffers: int,
    optimizer: int,
    away: Collection[str] = (),
) -> dict[str, int]:
    """Bytes by part on one rank; as of `memory_bill`, activations of all micro-batches alive.

    Args:
        compiled: what the rank runs.
        weights: bytes that it holds of each between steps, by `model/` name.
        buffers: likewise.
        optimizer: bytes of its state.
        away: what is offloaded, as a plan calls it.
    """
    held = most_held(compiled, weights)
    return {
        "weights": 0 if "params" in away else sum(weights.values()),
        "gradients": held.gradients,
        "optimizer": 0 if "optimizer" in away else optimizer,
        "buffers": buffers,
        "saved activations": held.activations,
        "working memory": max(0, held.peak - held.activations - held.gradients),
    }


@dataclass(frozen=True, slots=True)
class _Leaving:
    """What is on its way: the stash's number, the tier, and what it is called there."""

    number: int
    tier: str | None
    rests: str

    @property
    def name(self) -> str:
        """Under which the account holds the storage meanwhile."""
        return f"leaving/{self.number}"


@dataclass(slots=True)
class _Walk:
    """Goes through a list and keeps account of the storages that are there.

    Attributes:
        held: name of a value -> its storage.
        sizes: of each storage, its kind and bytes.
        users: of each storage, how many names it has.
        alive, most: bytes by kind, now and at most.
        peak: most bytes of all kinds at once, what a segment makes included, but those in the pool.
        pool: memory that collectives keep.
        inside: bytes of it that are in use.
        fresh: storages that were made just now.
        coming: of each collective under way, the storages of its results.
        sums: names of values that become gradients.
        insides: of each segment, most bytes that it makes at once.
        makers: of each collective, the program that holds it.
        resting: bytes of what is offloaded, by name.
        leaving: what is on its way to a tier, in order.
        stashes: how many stashes there were.
        loads: of each load under way, its tier, what it loads and the stashes before it.
    """

    compiled: Compiled
    held: dict[str, int] = field(default_factory=dict)
    sizes: dict[int, tuple[str, int]] = field(default_factory=dict)
    users: Counter[int] = field(default_factory=Counter)
    alive: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    sums: set[str] = field(default_factory=set)
    insides: dict[int, int] = field(default_factory=dict)
    makers: dict[int, Program] = field(default_factory=dict)
    pool: _Pool = field(default_factory=_Pool)
    inside: int = 0
    fresh: list[int] = field(default_factory=list)
    coming: dict[str, list[int | None]] = field(default_factory=dict)
    resting: dict[str, int] = field(default_factory=dict)
    leaving: deque[_Leaving] = field(default_factory=deque)
    stashes: int = 0
    loads: dict[str, tuple[str | None, str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = [local.program for _, local in self.compiled.units]
        programs += [move.program for move in self.compiled.moves]
        self.sums = _summed(self.compiled.instructions.body)
        self.makers = {id(op): p for p in programs for op in p.ops if op.name in COLLECTIVES}

    def take(self, instruction: Instruction) -> None:
        """Go on by one instruction."""
        match instruction.kind:
            case "Load" | "Wait" | "Stash" if instruction.offloads:
                self._offloaded(instruction)
            case "Run":
                self._run(instruction)
            case "Start":
                self._started(instruction)
            case "Wait":
                self._arrived(instruction)
            case "Stash":
                self._stash(instruction)
            case "Free":
                for name in instruction.inputs:
                    self._drop(name)

    def _offloaded(self, instruction: Instruction) -> None:
        """What rests elsewhere takes no room here but from its Load to its Free.

        What leaves takes room until it is there: at worst until as much leaves as may at once.
        """
        for source, name in zip(instruction.inputs, instruction.outputs, strict=True):
            if instruction.kind == "Stash":
                storage = self.held.get(source)
                self.resting[name] = 0 if storage is None else self.sizes[storage][1]
                self._drop(name)
                self._leave(storage, instruction.axis, name)
            elif instruction.kind == "Load":
                kind = "activation" if source.startswith(AWAY) else "weight"
                self.loads[name] = instruction.axis, source, self.stashes
                self._name(name, self._new(kind, self.resting.get(source, 0)))
            else:
                self._name(name, self.held.get(source))
                self._drop(source)
                self._settled(*self.loads.pop(source))

    def _settled(self, tier: str | None, name: str, before: int) -> None:
        """What was loaded has come: what left before it is there, or what left under its name."""
        for each in [*self.leaving]:
            copied = tier == each.tier == "host"  # by one thread, in order
            if each.number <= before and (copied or each.rests == name):
                self._drop(each.name)
                self.leaving.remove(each)

    def _leave(self, storage: int | None, tier: str | None, rests: str) -> None:
        """A storage is on its way to a tier, as `Store.stash` lets it go."""
        while sum(self.sizes[self.held[each.name]][1] for each in self.leaving) > FLIGHT:
            self._drop(self.leaving.popleft().name)
        self.stashes += 1
        if storage is not None:
            each = _Leaving(self.stashes, tier, rests)
            self._name(each.name, storage)
            self.leaving.append(each)

    def _run(self, instruction: Instruction) -> None:
        lists, index = self.compiled.instructions, instruction.segment
        assert index is not None
        segment = lists.segments[index]
        if index not in self.insides:
            self.insides[index] = live_bytes(segment)[1]
        self.peak = max(self.peak, self._heap() + self.insides[index])
        base = bases(segment)
        given = {v: name for (_, v), name in zip(segment.inputs, instruction.inputs, strict=True)}
        made: dict[int, int] = {}
        outputs = list(zip(segment.outputs, instruction.outputs, strict=True))
        adding = {base[value] for (_, value), name in outputs if name in self.sums}
        for (_, value), name in outputs:
            root = base[value]
            if root in given:
                storage = self.held.get(given[root])
                if storage is not None and name in self.sums:
                    self._becomes(storage, "gradient")
                self._name(name, storage)
                continue
            if root not in made:
                kind = "gradient" if root in adding else "activation"
                made[root] = self._new(kind, segment.values[root].bytes)
            self._name(name, made[root])

    def _started(self, instruction: Instruction) -> None:
        """A collective: from now on its results have room."""
        lists, index = self.compiled.instructions, instruction.segment
        assert index is not None
        calls, pending = lists.calls[index], instruction.outputs[0]
        if all("into" in dict(op.kwargs) for op in calls):
            found: list[int | None] = [None] * len(calls)
            self._pass_through(calls, pending)
        else:
            found = [
                self._reduced(op, source)
                for op, source in zip(calls, instruction.inputs, strict=False)
            ]
        self._lay()
        self.coming[pending] = found
        self.peak = max(self.peak, self._heap())

    def _pass_through(self, calls: Sequence[Op], pending: str) -> None:
        """What comes to be left in weights' own memory takes room meanwhile, if some is in pieces.

        Drivers gather a bucket straight into memory, or not at all.
        """
        if all(map(self._in_one_piece, calls)):
            return
        for number, op in enumerate(calls):
            self.fresh.append(self._new(*self._brought(op)))
            self._name(f"{pending}/{number}", self.fresh[-1])

    def _in_one_piece(self, gather: Op) -> bool:
        """Whether each member's part of the whole is contiguous."""
        slab: Any = gather.args[2]
        dim, outer, *_ = slab
        shape = self.makers[id(gather)].values[gather.results[0]].shape
        return outer == 1 and math.prod(shape[:dim]) == 1

    def _reduced(self, op: Op, source: str) -> int | None:
        """The storage of what a collective makes."""
        if dict(op.kwargs).get("donate") is True:
            return self.held.get(source)
        new = self._new(*self._brought(op))
        self.fresh.append(new)
        return new

    def _lay(self) -> None:
        """What came just now lies in one block, if it is large."""
        size = sum(self.sizes[storage][1] for storage in self.fresh)
        if size >= _POOLED:
            self.pool.lay(self.fresh, size)
            self.inside += size
        self.fresh = []

    def _arrived(self, instruction: Instruction) -> None:
        """The results of a collective; or a message, which takes room once it comes."""
        index, found = instruction.segment, self.coming.pop(instruction.inputs[0], [])
        if instruction.peer is not None and index is not None:
            values = self.compiled.instructions.messages[index].values
            found = []
            for value in values:
                self.fresh = [self._new("activation", value.bytes)]
                found += self.fresh
                self._lay()
        for name, storage in zip(instruction.outputs, found, strict=False):
            if storage is not None and name in self.sums:
                self._becomes(storage, "gradient")
            self._name(name, storage)
        self.peak = max(self.peak, self._heap())
        for number in range(len(found)):
            self._drop(f"{instruction.inputs[0]}/{number}")

    def _heap(self) -> int:
        """Bytes that are there now, but those in the pool."""
        return sum(self.alive.values()) - self.inside

    def _brought(self, op: Op) -> tuple[str, int]:
        """The kind and bytes of what a collective brings: gathered weights, or else."""
        value = str(dict(op.kwargs).get("value", ""))
        kinds = {"model": "weight", "gradient": "gradient"}
        kind = kinds.get(value.partition("/")[0], "activation")
        return kind, self.makers[id(op)].values[op.results[0]].bytes

    def _stash(self, instruction: Instruction) -> None:
        for source, name in zip(instruction.inputs, instruction.outputs, strict=True):
            self._name(name, self.held.get(source))

    def _new(self, kind: str, size: int) -> int:
        storage = len(self.sizes)
        self.sizes[storage] = kind, size
        self._count(storage, 1)
        return storage

    def _becomes(self, storage: int, kind: str) -> None:
        """What was of another kind is of this one."""
        self._count(storage, -1)
        self.sizes[storage] = kind, self.sizes[storage][1]
        self._count(storage, 1)

    def _count(self, storage: int, sign: int) -> None:
        """A storage comes, or goes."""
        kind, size = self.sizes[storage]
        self.alive[kind] += sign * size
        self.most[kind] = max(self.most[kind], self.alive[kind])

    def _name(self, name: str, storage: int | None) -> None:
        """Call a storage so; None is state, which is counted by itself."""
        if storage is not None:
            self.users[storage] += 1
        self._drop(name)
        if storage is not None:
            self.held[name] = storage

    def _drop(self, name: str) -> None:
        storage = self.held.pop(name, None)
        if storage is None:
            return
        self.users[storage] -= 1
        if not self.users[storage]:
            self._count(storage, -1)
            if storage in self.pool.block:
                self.inside -= self.sizes[storage][1]
                self.pool.leave(storage)


def _summed(body: Sequence[Instruction]) -> set[str]:
    """The names of values that become gradients: what is stashed as one, or reduced to one."""
    sums: set[str] = set()
    waited: dict[str, tuple[bool, ...]] = {}
    for each in reversed(body):
        if each.kind == "Stash":
            pairs = zip(each.inputs, each.outputs, strict=True)
            sums |= {source for source, name in pairs if name.startswith(_SUMS) or name in sums}
        elif each.kind == "Wait" and each.peer is None and not each.offloads:
            waited[each.inputs[0]] = tuple(name in sums for name in each.outputs)
        elif each.kind == "Start":
            flags = waited.get(each.outputs[0], ())
            sums |= {name for name, is_sum in zip(each.inputs, flags, strict=False) if is_sum}
    return sums
