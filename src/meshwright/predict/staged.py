"""The memory bill of a rank of a pipeline, read off its instruction list.

Micro-batches are alive together there, as many as the schedule has in flight: what lives when is
told by the list itself, value by value, and storages are counted once, however many values view
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from meshwright.predict.memory import live_bytes
from meshwright.program.assemble import Compiled
from meshwright.program.away import AWAY
from meshwright.program.donate import bases
from meshwright.program.instruction import Instruction
from meshwright.program.partition import COLLECTIVES
from meshwright.program.program import Op, Program

__all__ = ["staged_bill"]

_SUMS = ("gradient/", "reduced/")


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
    walk = _Walk(compiled, resting=dict(weights))
    for instruction in compiled.instructions.body:
        walk.take(instruction)
    return {
        "weights": 0 if "params" in away else sum(weights.values()),
        "gradients": walk.most["gradient"],
        "optimizer": 0 if "optimizer" in away else optimizer,
        "buffers": buffers,
        "saved activations": walk.most["activation"],
        "working memory": max(0, walk.peak - walk.most["activation"] - walk.most["gradient"]),
    }


@dataclass(slots=True)
class _Walk:
    """Goes through a list and keeps account of the storages that are there.

    Attributes:
        held: name of a value -> its storage.
        sizes: of each storage, its kind and bytes.
        users: of each storage, how many names it has.
        alive, most: bytes by kind, now and at most.
        peak: most bytes of all kinds at once, what a segment makes included.
        sums: names of values that become gradients.
        insides: of each segment, most bytes that it makes at once.
        makers: of each collective, the program that holds it.
        resting: bytes of what is offloaded, by name.
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
    resting: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = [local.program for _, local in self.compiled.units]
        programs += [move.program for move in self.compiled.moves]
        self.sums = {
            source
            for each in self.compiled.instructions.body
            if each.kind == "Stash"
            for source, name in zip(each.inputs, each.outputs, strict=True)
            if name.startswith(_SUMS)
        }
        self.makers = {id(op): p for p in programs for op in p.ops if op.name in COLLECTIVES}

    def take(self, instruction: Instruction) -> None:
        """Go on by one instruction."""
        match instruction.kind:
            case "Load" | "Wait" | "Stash" if instruction.offloads:
                self._offloaded(instruction)
            case "Run":
                self._run(instruction)
            case "Wait":
                self._arrived(instruction)
            case "Stash":
                self._stash(instruction)
            case "Free":
                for name in instruction.inputs:
                    self._drop(name)

    def _offloaded(self, instruction: Instruction) -> None:
        """What rests elsewhere takes no room here but from its Load to its Free."""
        for source, name in zip(instruction.inputs, instruction.outputs, strict=True):
            if instruction.kind == "Stash":
                storage = self.held.get(source)
                self.resting[name] = 0 if storage is None else self.sizes[storage][1]
                self._drop(name)
            elif instruction.kind == "Load":
                kind = "activation" if source.startswith(AWAY) else "weight"
                self._name(name, self._new(kind, self.resting.get(source, 0)))
            else:
                self._name(name, self.held.get(source))
                self._drop(source)

    def _run(self, instruction: Instruction) -> None:
        lists, index = self.compiled.instructions, instruction.segment
        assert index is not None
        segment = lists.segments[index]
        if index not in self.insides:
            self.insides[index] = live_bytes(segment)[1]
        self.peak = max(self.peak, sum(self.alive.values()) + self.insides[index])
        base = bases(segment)
        given = {v: name for (_, v), name in zip(segment.inputs, instruction.inputs, strict=True)}
        made: dict[int, int] = {}
        outputs = list(zip(segment.outputs, instruction.outputs, strict=True))
        summed = {base[value] for (_, value), name in outputs if name in self.sums}
        for (_, value), name in outputs:
            root = base[value]
            if root in given:
                self._name(name, self.held.get(given[root]))
                continue
            if root not in made:
                kind = "gradient" if root in summed else "activation"
                made[root] = self._new(kind, segment.values[root].bytes)
            self._name(name, made[root])

    def _arrived(self, instruction: Instruction) -> None:
        """The result of a collective, or a message."""
        lists, index = self.compiled.instructions, instruction.segment
        if index is None:
            return
        if instruction.peer is not None:
            sizes: Iterable[tuple[str, int]] = (
                ("activation", value.bytes) for value in lists.messages[index].values
            )
        else:
            sizes = map(self._brought, lists.calls[index])
        for name, (kind, size) in zip(instruction.outputs, sizes, strict=True):
            self._name(name, self._new(kind, size))
        self.peak = max(self.peak, sum(self.alive.values()))

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
        self._count(kind, size)
        return storage

    def _count(self, kind: str, size: int) -> None:
        self.alive[kind] += size
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
            kind, size = self.sizes[storage]
            self.alive[kind] -= size
