"""Placing: which stage does each op of a traced micro-batch, told where the stages begin.

Forward ops go by the order in which they were traced, so that a cut is legal wherever it stands: a
value goes from where it is made straight to the stages that read it. Each backward op is done at
the latest stage where all that it saved is at home.

    forward    embed | block 0 | block 1 || block 2 | block 3 | head, loss
    stage                    0           ||             1
    backward           ... block 1 || block 2 ...

Ops that depend on state by views alone, or on the batch by cheap ops alone (a mask, positions), are
in no stage: they are repeated wherever they are read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshwright.errors import PlanError
from meshwright.program.donate import VIEWS
from meshwright.program.program import Op, Program

__all__ = ["Placement", "forward_end", "placed_by", "placed_like", "repeatable"]

_STATE = ("model/", "buffer/", "constant/")
_BRINGING = ("batch/", "buffer/", "constant/", "position", "scale")

_COSTLY = (
    "mm", "convolution", "attention", "_fft", "embedding", "sort", "topk", "grid_sampler", "lstm",
    "gru", "cumsum", "linalg", "cdist",
)  # fmt: skip
"""In the name of an op that is too much work to be done twice."""

_OWN = ("meshwright.", "comm.")
_CASTS = frozenset({"aten._to_copy", "aten.clone", "meshwright.annotate", "aten.lift_fresh_copy"})


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a micro-batch's ops are done, and its state lives.

    Attributes:
        stages: of each op its stage; None where it is repeated wherever it is read.
        homes: of each input that is state, the stages that read it, in order; of what none reads,
            that of its module.
        count: how many stages there are.
    """

    stages: tuple[int | None, ...]
    homes: Mapping[str, tuple[int, ...]]
    count: int


def forward_end(program: Program) -> int:
    """The number of the first backward op; how many ops there are, where there is none."""
    numbers = (n for n, op in enumerate(program.ops) if op.phase == "backward")
    return next(numbers, len(program.ops))


def repeatable(program: Program) -> frozenset[int]:
    """The ops that may be done wherever their results are read."""
    cheap = {value for name, value in program.inputs if name.startswith(_BRINGING)}
    weights = {value for name, value in program.inputs if name.startswith("model/")}
    found: set[int] = set()
    for number, op in enumerate(program.ops):
        if all(value in cheap for value in op.inputs) and _is_cheap(op):
            found.add(number)
            cheap.update(op.results)
        elif op.inputs and op.inputs[0] in weights and _is_view(op):
            found.add(number)
            weights.update(op.results)
    return frozenset(found)


def _is_view(op: Op) -> bool:
    return len(op.inputs) == 1 and (op.base in VIEWS or op.base in _CASTS)


def _is_cheap(op: Op) -> bool:
    own = op.name.startswith(_OWN) and op.base not in _CASTS
    return not own and not any(word in op.base for word in _COSTLY)


def placed_by(program: Program, positions: Sequence[int]) -> Placement:
    """The placement whose stages begin at the forward ops with these numbers, the first's left out.

    Raises:
        PlanError: a backward op reads what no one stage holds.
    """
    return _Placing(program, tuple(positions)).run()


class _Placing:
    """Places the ops of a program one after the other."""

    def __init__(self, program: Program, positions: tuple[int, ...]) -> None:
        self.program, self.positions = program, positions
        self.last = len(positions)
        self.repeats = repeatable(program)
        self.made: dict[int, int] = {}  # value -> the stage that makes it
        self.backward: set[int] = set()  # values that backward ops make
        self.home: dict[int, set[int]] = {}  # forward value -> stages that make or read it
        self.roots: dict[int, frozenset[int]] = {v: frozenset({v}) for _, v in program.inputs}
        self.state = {v: n for n, v in program.inputs if n.startswith(_STATE)}
        self.homes: dict[int, set[int]] = {value: set() for value in self.state}
        self.stages: list[int | None] = []
        self.bound = _bound(program)
        self.seed = {value for name, value in program.inputs if name == "scale"}
        self.carried: set[int] = set()  # values that gradients went into
        self.late: dict[int, set[int]] = {}  # backward op done where it is read -> where it may be

    def run(self) -> Placement:
        """Every op, then the state that no op reads."""
        end = forward_end(self.program)
        for number, op in enumerate(self.program.ops):
            if number in self.repeats:
                read = (self.roots[value] for value in op.inputs)
                roots = frozenset[int]().union(*read)
                self.roots.update(dict.fromkeys(op.results, roots))
                self.stages.append(None)
            elif op.phase == "backward":
                self.stages.append(self._backward(number, op))
            else:
                self.stages.append(self._forward(number, op, end))
        self._to_readers()
        self._updated()
        homes = {name: tuple(sorted(self.homes[value])) for value, name in self.state.items()}
        near = self._by_module()
        homes |= {n: (near.get(_module(n), 0),) for n, stages in homes.items() if not stages}
        return Placement(tuple(self.stages), homes, self.last + 1)

    def _updated(self) -> None:
        """A buffer that changes lives where it does: each micro-batch reads what the last one left.

        Raises:
            PlanError: another stage would have to read it too.
        """
        inputs = dict(self.program.inputs)
        for name, value in self.program.outputs:
            before = (
                inputs.get(name.replace("next/", "buffer/", 1))
                if name.startswith("next/")
                else None
            )
            if before is None or value == before:
                continue
            read, stage = self.homes[before], self.made.get(value)
            everywhere = read | ({stage} if stage is not None else set())
            if len(everywhere) > 1:
                raise PlanError(
                    f"the pipeline cannot be cut there: the forward updates buffer "
                    f"{name.removeprefix('next/')}, which stages {sorted(everywhere)} share, and a "
                    "micro-batch would read it before the one ahead has updated it; cut so that "
                    "one stage has all that uses it, by cuts"
                )
            self.homes[before] = everywhere

    def _by_module(self) -> dict[str, int]:
        """The first stage that computes in each module."""
        found: dict[str, int] = {}
        for op, stage in zip(self.program.ops, self.stages, strict=True):
            if stage is not None and op.phase == "forward":
                found.setdefault(op.module, stage)
        return found

    def _forward(self, number: int, op: Op, end: int) -> int:
        made = [self.made[value] for value in op.inputs if value in self.made]
        stage = bisect_right(self.positions, number) if number < end else max(made, default=0)
        for value in op.inputs:
            self.home.setdefault(value, set()).add(stage)
            for root in self.roots.get(value, ()):
                if root in self.state:
                    self.homes[root].add(stage)
        for value in op.results:
            self.made[value] = stage
            self.home[value] = {stage}
        return stage

    def _to_readers(self) -> None:
        """What no gradient goes into, and views, are done where they are read, not sent there."""
        least: dict[int, int] = {}  # value -> the last stage that reads it
        given = {value for _, value in self.program.outputs}
        for number in range(len(self.stages) - 1, -1, -1):
            op, stage = self.program.ops[number], self.stages[number]
            if stage is None:
                continue
            read = [least[value] for value in op.results if value in least]
            if number in self.late and read and not given.intersection(op.results):
                stage = min(s for s in self.late[number] if s >= max(read))
                self.stages[number] = stage
            for value in op.inputs:
                least[value] = max(least.get(value, 0), stage)

    def _is_free(self, op: Op) -> bool:
        """Whether what an op reads may be sent in place of what it makes: a view, no smaller."""
        values = self.program.values
        return _is_view(op) and values[op.inputs[0]].bytes <= values[op.results[0]].bytes

    def _backward(self, number: int, op: Op) -> int:
        limit = min((self.made[v] for v in op.inputs if v in self.backward), default=self.last)
        allowed = set(range(limit + 1))
        for value in op.inputs:
            if value in self.made and value not in self.backward:
                allowed &= self.home[value]
            for root in self.roots.get(value, ()):
                if root in self.state and self.homes[root]:
                    allowed &= self.homes[root]
        for value in op.results:  # a gradient is made where its parameter lives
            homes = self.homes.get(self.bound.get(value, -1), set())
            allowed &= homes or allowed
        if not allowed:
            raise PlanError(
                f"the pipeline cannot be cut there: {op.source or op.module or op.name} has a "
                "backward that reads what no one stage holds; move the cut to the border of a "
                "module, by cuts"
            )
        stage = max(allowed)
        if any(v in self.carried or self.seed & self.roots.get(v, frozenset()) for v in op.inputs):
            self.carried.update(op.results)
            if self._is_free(op):
                self.late[number] = allowed
        else:
            self.late[number] = allowed
        for value in op.results:
            self.made[value] = stage
            self.backward.add(value)
        return stage


def _bound(program: Program) -> dict[int, int]:
    """Gradient, or term of one that is a sum -> the parameter's value."""
    inputs, makers = dict(program.inputs), program.producers()
    found: dict[int, int] = {}
    for name, output in program.outputs:
        if not name.startswith("gradient/"):
            continue
        waiting = [output]
        while waiting:
            value = waiting.pop()
            found[value] = inputs[name.replace("gradient/", "model/", 1)]
            op = program.ops[makers[value]] if value in makers else None
            if op is not None and op.name == "aten.add.Tensor" and op.phase == "backward":
                waiting += op.inputs
    return found


def placed_like(program: Program, like: Program, chosen: Placement) -> Placement:
    """The placement of another traced micro-batch, whose state lives where it does in `chosen`.

    A stage begins at the first forward op that reads what only it or later ones hold.

    Args:
        program: to place: of another number of samples, or of an evaluation.
        like: the one that `chosen` places.
        chosen: how.
    """
    names = [op.name for op in program.ops]
    if names == [op.name for op in like.ops]:
        first = [chosen.stages.index(s) for s in range(1, chosen.count) if s in chosen.stages]
        if len(first) == chosen.count - 1:
            return placed_by(program, first)
    found = placed_by(program, _by_state(program, chosen))
    for name, stages in found.homes.items():
        held = chosen.homes.get(_bare(name), ())
        if held and not set(stages) <= set(held):
            raise PlanError(
                f"{_bare(name).partition('/')[2]} is read by stages {list(stages)} here, but "
                f"training keeps it at {list(held)}; cut the pipeline where modules end, by cuts"
            )
    return found


def _by_state(program: Program, chosen: Placement) -> list[int]:
    """Where stages begin, told by the state that they read."""
    least = {name: min(stages) for name, stages in chosen.homes.items() if stages}
    names = {value: _bare(name) for name, value in program.inputs}
    repeats, end = repeatable(program), forward_end(program)
    roots: dict[int, set[str]] = {value: {name} for value, name in names.items()}
    begins = [end] * (chosen.count - 1)
    for number, op in enumerate(program.ops[:end]):
        read = set[str]().union(*(roots.get(value, set()) for value in op.inputs))
        if number in repeats:
            roots.update(dict.fromkeys(op.results, read))
            continue
        stage = max((least.get(name, 0) for name in read if len(chosen.homes.get(name, ())) == 1),
                    default=0)  # fmt: skip
        for later in range(stage):
            begins[later] = min(begins[later], number)
    return begins


def _module(name: str) -> str:
    """The module that a parameter or buffer belongs to."""
    return name.partition("/")[2].rpartition(".")[0]


def _bare(name: str) -> str:
    """The parameter that a part of a fused one belongs to."""
    return name.partition("[")[0]
