"""Micro-batches written by hand: a chain of matrices with their gradients, and what can be odd."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from meshwright.program.assemble import accumulated
from meshwright.program.placing import placed_by
from meshwright.program.program import Op, Program, Ref, Value
from meshwright.program.stage import Tasks

SIZE = 4
BYTES = SIZE * SIZE * 4
"""Of any value that crosses a cut."""


@dataclass
class Chain:
    """A chain under construction: `layers.0` to the last, then `loss`.

    Attributes:
        weight: of each layer, the weight that it reads.
        skip: the last layer reads what the first one made too.
    """

    weight: tuple[int, ...]
    skip: bool = False
    values: list[Value] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    outputs: list[tuple[str, int]] = field(default_factory=list)

    def given(self, name: str) -> int:
        """An input, made when it is first asked for."""
        if name not in self.inputs:
            self.values.append(Value("float32", () if name == "scale" else (SIZE, SIZE)))
            self.inputs[name] = len(self.values) - 1
        return self.inputs[name]

    def call(self, name: str, *args: int, module: str, backward: bool = False) -> int:
        """The result of an op."""
        shape = () if name.startswith("sum") else (SIZE, SIZE)
        self.values.append(Value("float32", shape))
        made, phase = len(self.values) - 1, "backward" if backward else "forward"
        read = tuple(map(Ref, args))
        self.ops.append(Op(f"aten.{name}", read, (), (made,), phase=phase, module=module))
        return made

    def program(self) -> Program:
        """Forward, loss, backward."""
        self.given("batch/x")
        for number in self.weight:
            self.given(f"model/w{number}")
        inputs = self._forward()
        last = inputs.pop()
        loss = self.call("sum.default", last, module="loss")
        self.outputs.append(("total/loss", loss))
        self._backward(inputs, last)
        return Program(
            tuple(self.values), tuple(self.inputs.items()), tuple(self.ops), tuple(self.outputs)
        )

    def _forward(self) -> list[int]:
        """What each layer reads, and what the last one makes."""
        x, found = self.given("batch/x"), []
        for place, number in enumerate(self.weight):
            module = f"layers.{place}"
            if self.skip and place == len(self.weight) - 1:
                x = self.call("add.Tensor", x, found[1], module=module)
            found.append(x)
            x = self.call("mm.default", x, self.given(f"model/w{number}"), module=module)
        return [*found, x]

    def _backward(self, read: list[int], last: int) -> None:
        gradient = self.call("expand.default", self.given("scale"), module="loss", backward=True)
        self.ops[-1] = replace(self.ops[-1], args=(*self.ops[-1].args, (SIZE, SIZE)))
        skipped = None
        terms: dict[int, int] = {}
        for place in range(len(self.weight) - 1, -1, -1):
            number, module = self.weight[place], f"layers.{place}"
            turned = self.call("t.default", read[place], module=module, backward=True)
            term = self.call("mm.default", turned, gradient, module=module, backward=True)
            if number in terms:
                term = self.call("add.Tensor", terms[number], term, module="", backward=True)
            terms[number] = term
            if place == 0:
                break
            weight = self.given(f"model/w{number}")
            turned = self.call("t.default", weight, module=module, backward=True)
            gradient = self.call("mm.default", gradient, turned, module=module, backward=True)
            if self.skip and place == len(self.weight) - 1:
                skipped = gradient
            if skipped is not None and place == 1:
                gradient = self.call("add.Tensor", skipped, gradient, module="", backward=True)
        self.outputs += [(f"gradient/w{number}", term) for number, term in sorted(terms.items())]


def chain(*weight: int, skip: bool = False) -> Program:
    """A chain whose layers read these weights: `chain(0, 1, 0)` ties the last to the first."""
    return Chain(weight, skip).program()


def begins(program: Program, *layers: int) -> tuple[int, ...]:
    """The numbers of the ops with which these layers begin."""
    names = [op.module for op in program.ops]
    return tuple(names.index(f"layers.{layer}") for layer in layers)


def tasks(program: Program, *layers: int, kept: frozenset[int] | None = None) -> Tasks:
    """The tasks of a chain whose stages begin at these layers, and at the first."""
    placement = placed_by(program, begins(program, *layers))
    return Tasks(accumulated(program, first=False), placement, kept=kept)


def told(program: Program) -> list[str]:
    """Its ops, without what is common to their names."""
    return [op.base.removeprefix("aten.") for op in program.ops]
