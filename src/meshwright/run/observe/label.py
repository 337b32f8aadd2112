"""What each instruction of a list is, in words and numbers: the text of a trace."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from meshwright.program.instruction import Instruction, InstructionList
from meshwright.program.program import Op, Program
from meshwright.run.executor import Place

__all__ = ["labels"]

_NAMES = {
    "Load": "load batch",
    "Finish": "sums, next batch",
    "Agree": "agree",
    "Update": "optimizer",
    "Commit": "commit",
}
_MOST_LINES = 6
_ACTION = re.compile(r"\d+[FBIW]\d+")
"""What the values of an action of a pipeline are named after."""


def labels(
    program: InstructionList, place: Place, sizes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One JSON-able entry per instruction of the body.

    Each has `kind`, `name` and, where there is one, `microbatch`. A Run has its `segment`, its
    number of `ops`, their `phase` and `lines`, and under a pipeline the `action` that it is of. A
    Start and its Wait share `pending` and have `op`, `axis`, `ranks`, what it `serves` (several in
    a bucket), the `lines` that ask for it, and the `bytes` brought; a Send or Recv and its Wait
    share `pending`, `op`, `peer` and `bytes`.

    Args:
        program: a rank's.
        place: the rank's.
        sizes: bytes of the values that a step begins with, by name.
    """
    teller = _Teller(program, place, sizes)
    return [teller.label(instruction) for instruction in program.body]


class _Teller:
    """Follows values through the body: how large they are, and whose weights they hold."""

    def __init__(self, program: InstructionList, place: Place, sizes: Mapping[str, int]) -> None:
        self.program, self.place, self.sizes = program, place, dict(sizes)
        self.weights = {name: name for name in sizes if name.startswith("model/")}
        self.seen: set[int] = set()
        self.begun: dict[str, dict[str, Any]] = {}
        self.operands: dict[str, tuple[str, ...]] = {}

    def label(self, instruction: Instruction) -> dict[str, Any]:
        """The entry of the next instruction."""
        match instruction.kind:
            case "Run":
                told = self._run(instruction)
            case "Start":
                told = self._start(instruction)
            case "Send" | "Recv":
                told = self._message(instruction)
            case "Load" | "Wait" | "Stash" if instruction.offloads:
                told = self._moved(instruction)
            case "Wait" if instruction.peer is not None:
                told = self._arrived(instruction)
            case "Wait":
                told = self._wait(instruction)
            case "Load" if not instruction.outputs:  # eager: a Load does all the work
                told = {"name": "eager forward and backward", "phase": "forward/backward"}
            case "Stash":
                self._alias(instruction)
                told = {"name": f"keep {len(instruction.inputs)} values"}
            case "Free":
                told = {"name": f"free {len(instruction.inputs)} values"}
            case kind:
                told = {"name": _NAMES.get(kind, kind)}
        micro = {} if instruction.microbatch is None else {"microbatch": instruction.microbatch}
        return {"kind": instruction.kind, **told, **micro}

    def _moved(self, instruction: Instruction) -> dict[str, Any]:
        """What goes to another tier, or comes from it."""
        for read, made in zip(instruction.inputs, instruction.outputs, strict=True):
            self.sizes[made] = self.sizes.get(read, 0)
        names = [name for name in instruction.inputs if name in self.weights]
        self.weights |= {f"here/{name}": name for name in names}
        size = sum(self.sizes[name] for name in instruction.outputs)
        words = {"Load": "load from", "Stash": "stash in"}
        act = words.get(instruction.kind, "wait for")
        return {"name": f"{act} {instruction.axis}", "bytes": size}

    def _alias(self, instruction: Instruction) -> None:
        for read, made in zip(instruction.inputs, instruction.outputs, strict=True):
            self.sizes[made] = self.sizes.get(read, 0)

    def _run(self, instruction: Instruction) -> dict[str, Any]:
        number = instruction.segment
        assert number is not None
        segment = self.program.segments[number]
        for name, (_, value) in zip(instruction.outputs, segment.outputs, strict=True):
            self.sizes[name] = segment.values[value].bytes
        phases = "/".join(dict.fromkeys(op.phase for op in segment.ops))
        return {
            "name": f"{phases} {self._modules(instruction, segment)}".strip(),
            "segment": number,
            "ops": len(segment.ops),
            "phase": phases,
            "lines": _lines(segment),
            **_action(instruction),
        }

    def _modules(self, instruction: Instruction, segment: Program) -> str:
        """Where the ops stand; equal segments are one, whose ops tell the first place only."""
        number = instruction.segment
        assert number is not None
        if number not in self.seen:
            self.seen.add(number)
            return _span(op.module for op in segment.ops)
        read = [self.weights[name] for name in instruction.inputs if name in self.weights]
        here = _span(name.removeprefix("model/").rpartition(".")[0] for name in read)
        return here or f"as {_span(op.module for op in segment.ops)}"

    def _start(self, instruction: Instruction) -> dict[str, Any]:
        calls, axis = self._calls(instruction), instruction.axis or ""
        notes = [dict(call.kwargs) for call in calls]
        op = calls[0].name.removeprefix("comm.")
        told = {
            "name": f"{op} over {axis}",
            "op": op,
            "axis": axis,
            "ranks": list(self.place.groups[axis].ranks),
            "pending": instruction.outputs[0],
            "bytes": sum(self.sizes.get(name, 0) for name in instruction.inputs),
            "serves": [str(note["value"]) for note in notes if note.get("value")],
            "why": "; ".join(
                dict.fromkeys(f"{n.get('before')} -> {n.get('after')}" for n in notes)
            ),
            "lines": _shortened([_near(call.source) for call in calls if call.source]),
        }
        self.begun[instruction.outputs[0]] = told
        self.operands[instruction.outputs[0]] = instruction.inputs[: len(calls)]
        return {**told, "name": f"start {told['name']}"}

    def _message(self, instruction: Instruction) -> dict[str, Any]:
        assert instruction.segment is not None
        message, op = self.program.messages[instruction.segment], instruction.kind.lower()
        told = {
            "name": f"{op} {'to' if op == 'send' else 'from'} rank {instruction.peer}",
            "op": op,
            "axis": "pipeline",
            "peer": instruction.peer,
            "pending": instruction.outputs[0],
            "bytes": sum(value.bytes for value in message.values),
        }
        self.begun[instruction.outputs[0]] = told
        return told

    def _arrived(self, instruction: Instruction) -> dict[str, Any]:
        """The wait until a message has come, or may be forgotten."""
        told = self.begun.get(instruction.inputs[0], {"pending": instruction.inputs[0]})
        if instruction.outputs and instruction.segment is not None:
            values = self.program.messages[instruction.segment].values
            sizes = (value.bytes for value in values)
            self.sizes |= dict(zip(instruction.outputs, sizes, strict=True))
        return {**told, "name": f"wait for {told.get('name', 'a message')}"}

    def _wait(self, instruction: Instruction) -> dict[str, Any]:
        calls, axis = self._calls(instruction), instruction.axis or ""
        told = self.begun.get(instruction.inputs[0], {"pending": instruction.inputs[0]})
        members = len(self.place.groups[axis].ranks)
        grows = {"comm.all_gather": members, "comm.reduce_scatter": 1 / members}
        operands = self.operands.get(instruction.inputs[0], ("",) * len(calls))
        for name, operand, call in zip(instruction.outputs, operands, calls, strict=True):
            self.sizes[name] = int(self.sizes.get(operand, 0) * grows.get(call.name, 1))
            served = str(dict(call.kwargs).get("value") or "")
            if served.startswith("model/"):
                self.weights[name] = served
        return {**told, "name": f"wait for {told.get('name', calls[0].name)}"}

    def _calls(self, instruction: Instruction) -> Sequence[Op]:
        """The collective, or all of a bucket's."""
        assert instruction.segment is not None
        return self.program.calls[instruction.segment]


def _action(instruction: Instruction) -> dict[str, str]:
    """The action of a pipeline that a Run is part of."""
    first = instruction.outputs[0] if instruction.outputs else ""
    found = _ACTION.fullmatch(first.partition(":")[0])
    return {"action": found.group()} if found else {}


def _span(modules: Iterable[str]) -> str:
    """`blocks.0.attn` where all is there, else `blocks.0 … head`: from the first to the last."""
    named = [module.split(".") for module in modules if module]
    if not named:
        return ""
    first, last = named[0], named[-1]
    pairs = zip(first, last, strict=False)
    shared = len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
    layers = first[shared:] and first[shared].isdecimal()
    if shared and not layers:  # they part below one layer, not between layers
        return ".".join(first[:shared])
    return f"{_top(first)} … {_top(last)}"


def _top(module: Sequence[str]) -> str:
    """`blocks.3` of `blocks.3.attn.q`: up to the first number, which tells layers apart."""
    numbers = [place for place, part in enumerate(module) if part.isdecimal()]
    return ".".join(module[: numbers[0] + 1] if numbers else module[:1])


def _lines(segment: Program) -> list[str]:
    """The user's lines in it, in order."""
    return _shortened([_near(op.source) for op in segment.ops if op.source])


def _shortened(lines: Sequence[str]) -> list[str]:
    """Each line once; of many, the first and the last few."""
    once, half = list(dict.fromkeys(lines)), _MOST_LINES // 2
    return once if len(once) <= _MOST_LINES else [*once[:half], "...", *once[-half:]]


def _near(source: str) -> str:
    """The file's name and the line."""
    return source.rpartition("/")[2]
