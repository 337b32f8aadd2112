"""Remat: forward values that are computed again for the backward instead of saved.

What is *kept* lives from forward to backward. Whatever else the backward reads of the forward is
repeated, from what is kept, just before its first reader there; each op at most once. Random draws
are numbered, so that a repeated one is the same draw; what updates a buffer is read by no backward,
so that it is done once.

    forward    x -> norm -> up -> gelu -> down        backward   up', gelu' -> down's, up's, norm's
               kept: x, up                             (norm' from x, gelu' from up)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from meshwright.program.donate import VIEWS
from meshwright.program.placing import forward_end
from meshwright.program.program import Op, Program, map_refs
from meshwright.program.propagate import Completed

__all__ = ["Forward", "Repeats", "completed_again", "rematerialised", "roots_of"]


def roots_of(program: Program) -> dict[int, int]:
    """Value -> the value whose storage it shares, in a program that is not partitioned yet."""
    root = {value: value for _, value in program.inputs}
    for op in program.ops:
        shared = op.base in VIEWS or op.base == "meshwright.annotate"
        for value in op.results:
            root[value] = root[op.inputs[0]] if shared else value
    return root


@dataclass(frozen=True, slots=True)
class Forward:
    """What passes that choose have to know of a micro-batch.

    Attributes:
        end: the number of the first backward op.
        root: value -> the one whose storage it shares.
        makers: root that a forward op makes -> that op's number.
        direct: roots of the forward that the backward reads -> numbers of the ops that do.
        held: roots that are there whatever is kept: inputs, outputs, what is read after the
            backward by ops that are none of it.
    """

    program: Program
    end: int
    root: Mapping[int, int]
    makers: Mapping[int, int]
    direct: Mapping[int, tuple[int, ...]]
    held: frozenset[int]

    @classmethod
    def of(cls, program: Program) -> Forward:
        """A traced micro-batch's."""
        end, root = forward_end(program), roots_of(program)
        makers = {
            value: number
            for number, op in enumerate(program.ops[:end])
            for value in op.results
            if root[value] == value
        }
        held = {value for _, value in program.inputs}
        held |= {root[value] for _, value in program.outputs}
        direct: dict[int, list[int]] = {}
        for number in range(end, len(program.ops)):
            op = program.ops[number]
            read = {root[value] for value in op.inputs}
            if op.phase == "forward":
                held |= read
            for value in read & makers.keys():
                direct.setdefault(value, []).append(number)
        used = {value: tuple(numbers) for value, numbers in direct.items() if value not in held}
        return cls(program, end, root, makers, used, frozenset(held))

    def read(self, number: int) -> tuple[int, ...]:
        """The roots that an op reads, those that are always there left out."""
        found = (self.root[value] for value in self.program.ops[number].inputs)
        return tuple(dict.fromkeys(value for value in found if value not in self.held))

    def root_made(self, number: int) -> frozenset[int]:
        """The storages that an op makes, those that are always there left out."""
        made = (v for v in self.program.ops[number].results if self.root[v] == v)
        return frozenset(v for v in made if v not in self.held)

    def repeats(self, kept: Iterable[int], wanted: Iterable[int] | None = None) -> set[int]:
        """The forward ops to repeat for what the backward reads, or `wanted`; views left out."""
        there = set(kept)
        waiting = [v for v in (self.direct if wanted is None else wanted) if v not in there]
        found: set[int] = set()
        while waiting:
            number = self.makers[waiting.pop()]
            if number not in found:
                found.add(number)
                waiting += [v for v in self.read(number) if v not in there]
        return found

    def saved(self, kept: Iterable[int]) -> set[int]:
        """Of the kept roots, those that the backward or a repeated op reads."""
        there = set(kept)
        read = {v for number in self.repeats(there) for v in self.read(number)}
        return there & (read | self.direct.keys())


@dataclass(frozen=True, slots=True)
class Repeats:
    """A program that computes again.

    Attributes:
        program: with values of its own for what is repeated, after those there were.
        numbers: of each op, the number of the one that it is, or repeats, in the program before.
        copies: value of a repeated op -> the one that it is again.
    """

    program: Program
    numbers: tuple[int, ...]
    copies: Mapping[int, int]


def rematerialised(program: Program, kept: frozenset[int]) -> Repeats:
    """The program whose backward reads of the forward what is kept, and computes the rest again.

    Args:
        program: a traced micro-batch.
        kept: forward values; with one, all that share its storage.
    """
    return _Rewriting(program, kept).run()


class _Rewriting:
    """Writes the program op by op, repeated ones before their first readers."""

    def __init__(self, program: Program, kept: frozenset[int]) -> None:
        self.program, self.forward = program, Forward.of(program)
        root = self.forward.root
        self.there = self.forward.held | {root[value] for value in kept}
        self.made = {
            value: number
            for number, op in enumerate(program.ops[: self.forward.end])
            for value in op.results
        }
        self.values = list(program.values)
        self.again: dict[int, int] = {}
        self.ops: list[tuple[int, Op]] = []

    def run(self) -> Repeats:
        end = self.forward.end
        self.ops += enumerate(self.program.ops[:end])
        for number, op in enumerate(self.program.ops[end:], end):
            if op.phase == "forward":
                self.ops.append((number, op))
                continue
            for repeated in sorted(self._missing(op)):
                self._repeat(repeated)
            self.ops.append((number, self._reading(op)))
        self._drop_dead()
        found = replace(self.program, values=tuple(self.values), ops=tuple(o for _, o in self.ops))
        copies = {new: old for old, new in self.again.items()}
        return Repeats(found, tuple(number for number, _ in self.ops), copies)

    def _missing(self, op: Op) -> set[int]:
        """The forward ops to repeat before `op`, views among them."""
        found: set[int] = set()
        waiting = list(op.inputs)
        while waiting:
            value = waiting.pop()
            there = self.forward.root[value] in self.there or value in self.again
            if value not in self.made or there or self.made[value] in found:
                continue
            found.add(self.made[value])
            waiting += self.program.ops[self.made[value]].inputs
        return found

    def _repeat(self, number: int) -> None:
        op = self.program.ops[number]
        told = self._reading(op)
        for value in op.results:
            self.again[value] = len(self.values)
            self.values.append(self.program.values[value])
        outputs = tuple(None if value is None else self.again[value] for value in op.outputs)
        self.ops.append((number, replace(told, outputs=outputs, phase="backward")))

    def _reading(self, op: Op) -> Op:
        """The op with what is made again in place of what is not kept."""

        def now(value: int) -> int:
            held = self.forward.root[value] in self.there
            return value if held else self.again.get(value, value)

        args, kwargs = map_refs((op.args, op.kwargs), now)
        return replace(op, args=args, kwargs=kwargs)

    def _drop_dead(self) -> None:
        """Without forward ops that only the backward read."""
        needed = {value for _, value in self.program.outputs}
        kept: list[tuple[int, Op]] = []
        for number, op in reversed(self.ops):
            if needed.intersection(op.results):
                needed.update(op.inputs)
                kept.append((number, op))
        self.ops = kept[::-1]


def completed_again(completed: Completed, repeats: Repeats) -> Completed:
    """How the program was completed, said of the one that computes again: repeats lie alike."""
    places = {
        axis: {
            **found,
            **{new: found[old] for new, old in repeats.copies.items() if old in found},
        }
        for axis, found in completed.places.items()
    }
    resting = {new for new, old in repeats.copies.items() if old in completed.resting}
    return replace(
        completed,
        rules=tuple(completed.rules[number] for number in repeats.numbers),
        carried=tuple(completed.carried[number] for number in repeats.numbers),
        resting=completed.resting | resting,
        places=places,
    )


def late(ops: Sequence[tuple[int, Op]], movable: frozenset[int]) -> list[tuple[int, Op]]:
    """Numbered ops in which those that may be moved stand just before their first readers."""
    makers = {v: place for place, (_, op) in enumerate(ops) for v in op.results}
    found: list[tuple[int, Op]] = []
    done: set[int] = set()
    for place, (number, op) in enumerate(ops):
        if number in movable:
            continue
        waiting, before = [*op.inputs], set[int]()
        while waiting:
            maker = makers.get(waiting.pop())
            if maker is None or maker in done or maker in before or maker > place:
                continue
            if ops[maker][0] in movable:
                before.add(maker)
                waiting += ops[maker][1].inputs
        done |= before
        found += [ops[maker] for maker in sorted(before)]
        found.append((number, op))
    left = [entry for place, entry in enumerate(ops) if entry[0] in movable and place not in done]
    return found + left
