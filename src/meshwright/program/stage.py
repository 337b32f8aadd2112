"""Stage: a micro-batch's program cut into tasks, each a stage's forward or (part of) its backward.

    F  forward              reads what earlier stages sent, gives what later ones and B read
    B  backward             = I + W
    I  input gradients      what earlier stages wait for, and all that this needs
    W  weight gradients     the rest

Tasks are programs with the value numbers of the whole; what one makes and another reads goes by the
name `value/number`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from meshwright.program.placing import Placement
from meshwright.program.program import Op, Program, Ref
from meshwright.program.remat import late, roots_of

__all__ = ["Key", "Kind", "Task", "Tasks", "named"]

Kind = Literal["F", "B", "I", "W"]
Key = tuple[int, Kind]


def named(value: int) -> str:
    """What a value is called between tasks."""
    return f"value/{value}"


@dataclass(frozen=True, slots=True)
class Task:
    """A stage's work of one kind on one micro-batch.

    Attributes:
        numbers: of each op of `program`, its number in the whole.
        reads, gives: values of the whole that other tasks make or read.
        sums: outputs that micro-batches sum up.
    """

    stage: int
    kind: Kind
    program: Program
    numbers: tuple[int, ...]
    reads: tuple[int, ...]
    gives: tuple[int, ...]
    sums: tuple[str, ...]


class Tasks:
    """The tasks of a micro-batch: forward, whole backward and its two parts of every stage."""

    def __init__(
        self, whole: Program, placement: Placement, *, kept: frozenset[int] | None = None
    ) -> None:
        """Cut a micro-batch.

        Args:
            whole: the micro-batch, its sums added to accumulators (`accumulated`).
            placement: of its ops; those that add to accumulators need none.
            kept: forward values that backwards may read, beside what comes from other stages; they
                make others again. None: they read what they need.
        """
        self.whole, self.placement = whole, placement
        self.inputs = {value: name for name, value in whole.inputs}
        self.made = whole.producers()
        self.ops = dict(enumerate(whole.ops))
        self.stage = dict(enumerate(placement.stages))
        self.sums: dict[str, int] = {}  # output -> the op that adds it to its accumulator
        for number in range(len(placement.stages), len(whole.ops)):
            self.sums[self.inputs[whole.ops[number].inputs[0]]] = number
            del self.ops[number]
        self.outputs: dict[int, list[tuple[str, int]]] = defaultdict(list)
        self._deliver()
        self.backward = self._backward_ops()
        self.chosen = self._chosen(kept)
        self.makes = {
            key: {v for n in numbers for v in self.ops[n].results}
            for key, numbers in self.chosen.items()
        }
        self.readers = self._readers()
        self._known: dict[tuple[Key, frozenset[str]], Task] = {}

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return bool(self.backward)

    def task(self, key: Key, assigned: frozenset[str] = frozenset()) -> Task:
        """A stage's work of a kind; the sums in `assigned` are new, others add to accumulators."""
        outputs = self._own_outputs(key)
        mine = frozenset(name for name, _ in outputs if name in self.sums and name in assigned)
        if (key, mine) not in self._known:
            self._known[key, mine] = self._task(key, outputs, mine)
        return self._known[key, mine]

    def makers(self, value: int, reader: Key) -> tuple[Key, ...]:
        """The tasks from which a reader may take a value: the one that the schedule has."""
        stage, kind = reader
        if kind == "W" and value in self.makes[stage, "I"]:
            return ((stage, "I"),)
        number = self.made[value]
        home = self.stage[number]
        assert home is not None
        if number not in self.backward:
            return ((home, "F"),)
        return ((home, "B"), (home, "I" if value in self.makes[home, "I"] else "W"))

    def crosses(self, value: int) -> bool:
        """Whether a stage reads it that does not make it."""
        home = self.stage[self.made[value]]
        return any(stage != home for stage, _ in self.readers[value])

    def gradients(self, stage: int) -> frozenset[str]:
        """Parameters whose gradients a stage gives."""
        named = (name for name, _ in self.outputs[stage] if name.startswith("gradient/"))
        return frozenset(name.removeprefix("gradient/") for name in named)

    def trained(self) -> frozenset[str]:
        """Parameters that have a gradient at any stage."""
        found = (name for stage in range(self.placement.count) for name in self.gradients(stage))
        return frozenset(name.partition("[")[0] for name in found)  # of a part, the parameter

    def _chosen(self, kept: frozenset[int] | None) -> dict[Key, set[int]]:
        """The ops of every task."""
        root = roots_of(self.whole)
        roots = {root[value] for value in kept or ()}
        there = frozenset(v for v in root if root[v] in roots and v in self.made)
        found: dict[Key, set[int]] = {}
        for stage in range(self.placement.count):
            mine = {n for n in self.ops if self.stage[n] == stage}
            forward, backward = mine - self.backward, mine & self.backward
            found[stage, "F"] = forward
            if not self.backward:
                continue
            again = set[int]() if kept is None else self._again(backward, forward, there)
            first = self._first_half(stage, backward)
            found |= {
                (stage, "B"): backward | again,
                (stage, "I"): first | again,
                (stage, "W"): backward - first,
            }
        return found

    def _readers(self) -> dict[int, set[Key]]:
        """Computed value -> the tasks, halves of backwards apart, that read and do not make it."""
        found: dict[int, set[Key]] = defaultdict(set)
        for key, numbers in self.chosen.items():
            if key[1] == "B":
                continue
            used = {v for n in numbers for v in self.ops[n].inputs}
            used |= {value for _, value in self._own_outputs(key)}
            for value in used - self.makes[key]:
                maker = self.made.get(value)
                if maker is not None and self.stage[maker] is not None:
                    found[value].add(key)
        return found

    def _deliver(self) -> None:
        """Say at which stage each output of the whole is given."""
        last = self.placement.count - 1
        for name, value in self.whole.outputs:
            bare = self._unsummed(name, value)
            producer = self.made.get(bare)
            if producer is None:
                if self.inputs[bare] != name.replace("next/", "buffer/", 1):
                    self.outputs[last].append((name, bare))  # not a buffer that stays as it is
            elif self.stage[producer] is None:
                self.outputs[self._home(name, last)].append((name, bare))
            elif name.startswith("gradient/"):
                for stage, part in self._terms(bare).items():
                    self.outputs[stage].append((name, part))
            else:
                self.outputs[self.stage[producer]].append((name, bare))  # type: ignore[index]

    def _unsummed(self, name: str, value: int) -> int:
        """What is added to the accumulator."""
        number = self.sums.get(name)
        return value if number is None else self.whole.ops[number].inputs[-1]

    def _home(self, name: str, last: int) -> int:
        """Where an output is given that any stage could make: once, where its state lives."""
        kind, _, bare = name.partition("/")
        state = {"next": "buffer", "gradient": "model"}.get(kind, "")
        return self.placement.homes[f"{state}/{bare}"][0] if state else last

    def _terms(self, value: int) -> dict[int, int]:
        """A gradient by stages: a sum over uses at several stages is taken apart.

        Each stage sums its own terms; between stages they are summed once a step.
        """
        ways: list[int] = []
        found: list[int] = []

        def open_(value: int) -> None:
            number = self.made[value]
            op = self.whole.ops[number]
            plain = op.name == "aten.add.Tensor" and not op.kwargs and len(op.inputs) == 2
            makers = [self.made.get(v) for v in op.inputs]
            stages = {self.stage.get(n) if n is not None else None for n in makers}
            below = [self._spread(v) for v in op.inputs] if plain else []
            if plain and None not in stages and len(frozenset().union(*below)) > 1:
                ways.append(number)
                for operand in op.inputs:
                    open_(operand)
            else:
                found.append(value)

        open_(value)
        by_stage: dict[int, list[int]] = defaultdict(list)
        for part in found:
            stage = self.stage[self.made[part]]
            assert stage is not None
            by_stage[stage].append(part)
        for number in ways:
            del self.ops[number]
        for parts in by_stage.values():
            parts.sort(key=self.made.__getitem__)
        # Each sum within a stage takes the place of one of those, after both that it adds.
        added = {part for parts in by_stage.values() for part in parts[1:]}
        latest = sorted(added, key=self.made.__getitem__, reverse=True)
        place = dict(zip(latest, sorted(ways, reverse=True), strict=False))
        total: dict[int, int] = {}
        for stage, parts in by_stage.items():
            current = parts[0]
            for part in parts[1:]:
                number = place[part]
                op = self.whole.ops[number]
                self.ops[number] = replace(op, args=(Ref(current), Ref(part)))
                self.stage[number] = stage
                current = op.results[0]
            total[stage] = current
        return total

    def _spread(self, value: int) -> frozenset[int]:
        """The stages of the terms of a sum."""
        number = self.made.get(value)
        stage = None if number is None else self.stage[number]
        if number is None or stage is None:
            return frozenset()
        op = self.whole.ops[number]
        if op.name != "aten.add.Tensor" or op.phase != "backward" or op.kwargs:
            return frozenset({stage})
        below = frozenset[int]().union(*(self._spread(v) for v in op.inputs))
        return below or frozenset({stage})

    def _backward_ops(self) -> set[int]:
        """Backward ops and what reads them."""
        found: set[int] = set()
        late: set[int] = set()
        for number, op in sorted(self.ops.items()):
            if self.stage[number] is None:
                continue
            if op.phase == "backward" or any(value in late for value in op.inputs):
                found.add(number)
                late.update(op.results)
        return found

    def _first_half(self, stage: int, numbers: set[int]) -> set[int]:
        """Of a backward, what earlier stages wait for, with all that it needs."""
        read = {
            value for n in self.backward if self.stage[n] != stage for value in self.ops[n].inputs
        }
        goals = {n for n in numbers if read.intersection(self.ops[n].results)}
        return self._leading(goals, numbers) if goals else self._shared(stage, numbers)

    def _leading(self, goals: Iterable[int], numbers: set[int]) -> set[int]:
        """Those of `numbers` that lead to the goals, themselves included."""
        found, waiting = set[int](), list(goals)
        while waiting:
            number = waiting.pop()
            if number in found:
                continue
            found.add(number)
            makers = (self.made.get(value) for value in self.ops[number].inputs)
            waiting += [n for n in makers if n in numbers]
        return found

    def _shared(self, stage: int, numbers: set[int]) -> set[int]:
        """Of the first stage, for which nobody waits: what leads to more than one gradient."""
        reached: dict[int, set[str]] = defaultdict(set)  # value -> gradients that need it
        for name, value in self.outputs[stage]:
            reached[value].add(name)
        found: set[int] = set()
        for number in sorted(numbers, reverse=True):
            goals = set[str]().union(*(reached[v] for v in self.ops[number].results))
            if len(goals) > 1:
                found.add(number)
            for value in self.ops[number].inputs:
                reached[value] |= goals
        return found

    def _again(self, numbers: set[int], forward: set[int], there: frozenset[int]) -> set[int]:
        """The forward ops to repeat for what `numbers` read that is not there."""
        found, waiting = set[int](), list(numbers)
        while waiting:
            for value in self.ops[waiting.pop()].inputs:
                maker = self.made.get(value)
                if maker in forward and maker not in found and value not in there:
                    found.add(maker)
                    waiting.append(maker)
        return found

    def _late(self, key: Key, ops: dict[int, Op]) -> dict[int, Op]:
        """A task's ops in order, those of the forward that a backward repeats as late as can be."""
        if key[1] == "F":
            return dict(sorted(ops.items()))
        repeated = {n for n in ops if n not in self.backward and self.stage[n] is not None}
        return dict(late(sorted(ops.items()), frozenset(repeated)))

    def _own_outputs(self, key: Key) -> list[tuple[str, int]]:
        """Outputs of the whole that a task gives."""
        stage, kind = key
        found = []
        for name, value in self.outputs[stage]:
            maker = self.made.get(value)
            if maker in self.backward:
                mine = kind != "F" and maker in self.chosen[key]
            else:
                late = name.startswith("gradient/")  # of what no op of a stage makes: zeros
                mine = kind in "BW" if late else kind == "F"
            if mine:
                found.append((name, value))
        return found

    def _task(self, key: Key, outputs: list[tuple[str, int]], assigned: frozenset[str]) -> Task:
        gives = sorted(v for v in self.makes[key] if self._given(v, key))
        reads = {v for v, keys in self.readers.items() if self._reads(key, keys, v)}
        ops = self._needed(key, {*gives, *(value for _, value in outputs)}, reads)
        sums: dict[int, Op] = {}
        told = []
        for name, value in outputs:
            if name not in self.sums or name in assigned:
                told.append((name, value))
                continue
            add = self.whole.ops[self.sums[name]]
            sums[self.sums[name]] = replace(add, args=(add.args[0], Ref(value)))
            told.append((name, add.results[0]))
        ordered = {**self._late(key, ops), **sums}
        used = {v for op in ordered.values() for v in op.inputs}
        used |= {value for _, value in told}
        made = {value for op in ordered.values() for value in op.results}
        inputs = [(name, v) for name, v in self.whole.inputs if v in used and v not in made]
        kept = tuple(v for v in sorted(reads) if v in used)
        inputs += [(named(value), value) for value in kept]
        told += [(named(value), value) for value in gives]
        program = Program(self.whole.values, tuple(inputs), tuple(ordered.values()), tuple(told))
        summed = tuple(name for name, _ in outputs if name in self.sums)
        return Task(*key, program, tuple(ordered), kept, tuple(gives), summed)

    def _given(self, value: int, key: Key) -> bool:
        """Whether another task takes a value from this one."""
        stage, kind = key
        if kind == "B":  # its halves have no need of one another then
            return self.made[value] in self.backward and any(
                other != stage for other, _ in self.readers[value]
            )
        return any(
            reader != key and key in self.makers(value, reader) for reader in self.readers[value]
        )

    def _reads(self, key: Key, readers: set[Key], value: int) -> bool:
        stage, kind = key
        if kind != "B":
            return key in readers
        return value not in self.makes[key] and bool({(stage, "I"), (stage, "W")} & readers)

    def _needed(self, key: Key, goals: set[int], reads: set[int]) -> dict[int, Op]:
        """A task's ops that lead to what is wanted, and those that are repeated for them."""
        found: dict[int, Op] = {}
        wanted, numbers = set(goals), self.chosen[key]
        for number in sorted(self.ops, reverse=True):
            mine = number in numbers or self.stage[number] is None
            op = self.ops[number]
            if mine and any(v in wanted and v not in reads for v in op.results):
                found[number] = op
                wanted.update(op.inputs)
        return found
