"""Attention over split sequences: which of three forms each takes, written into the program.

all-to-all   queries, keys and values go from a share of the sequence to a share of the heads,
             attention sees whole sequences, its output goes back (DeepSpeed-Ulysses, Jacobs et al.
             2023); layouts say it all, the partitioner does it
ring         keys and values go around, a block at a time (Liu et al. 2023; `program.ring`)
gather       keys and values are gathered; a causal flag says nothing of where a rank's queries
             begin, so it becomes the mask that it stands for
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from meshwright.errors import PlanError
from meshwright.plan.mesh import Axis
from meshwright.program.computed import Ends, attentions
from meshwright.program.layout import REPLICATED, Placement, Shard
from meshwright.program.program import Op, Program, Ref, Value, map_refs
from meshwright.program.propagate import propagate
from meshwright.program.writer import Writer

__all__ = ["FLASH", "RING", "Choice", "Form", "formed"]

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"
RING = "meshwright.ring_attention"
_CAUSAL = {FLASH: 4, f"{FLASH}_backward": 7}
"""Where the flag stands among the arguments; the dropout stands before it."""

_SEQUENCE, _HEADS = 2, 1
"""Dims of queries, keys and values."""

Form = Literal["gather", "all-to-all", "ring"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The form that attention takes at one place, and why."""

    form: Form
    why: str
    source: str
    module: str

    def as_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Met:
    """Attention that meets split sequences.

    Attributes:
        op: forward.
        query, key, value: as they are in the program.
        splits: whether queries are split over their sequence, and whether keys are.
        parts: of a sequence.
        tensor: ranks that share the heads already.
    """

    op: Op
    query: Value
    key: Value
    value: Value
    splits: tuple[bool, bool]
    parts: int
    tensor: int

    @property
    def causal(self) -> bool:
        """Whether each query sees the keys up to its own place."""
        return _causal(self.op)

    def choose(self, asked: Form | None) -> Choice:
        """The form asked for, or the cheapest that can be.

        Raises:
            PlanError: what is asked for cannot be.
        """
        if not all(self.splits):
            which = "keys" if self.splits[0] else "queries"
            return self._chosen("gather", f"{which} are whole on every rank")
        reasons = {"all-to-all": self._no_heads(), "ring": self._no_ring(), "gather": ""}
        if asked is not None:
            if reasons[asked]:
                raise PlanError(_refusal(self.op, asked, reasons))
            return self._chosen(asked, "the plan asks for it")
        prices = {f: p for f, p in self.prices().items() if not reasons[f]}
        if not prices:
            return self._chosen(
                "gather", "; ".join(reason for reason in reasons.values() if reason)
            )
        best = min(prices, key=lambda form: prices[form])
        other: Form = "ring" if best == "all-to-all" else "all-to-all"
        beside = reasons[other] or f"{prices[other]:,} as {other}"
        return self._chosen(best, f"{prices[best]:,} bytes a micro-batch; {beside}")

    def prices(self) -> dict[Form, int]:
        """Bytes that a rank sends for it, forward and backward, by the papers' closed forms."""
        n, keys = self.parts, self.key.bytes + self.value.bytes
        queries = 2 * self.query.bytes  # and the output, which is as large
        return {
            "all-to-all": 2 * (queries + keys) * (n - 1) // n**2,
            "ring": 3 * keys * (n - 1) // n,
        }

    def _chosen(self, form: Form, why: str) -> Choice:
        return Choice(form, why, self.op.source, self.op.module)

    def _no_heads(self) -> str:
        return _undivided(self.key.shape[_HEADS], self.parts, self.tensor)

    def _no_ring(self) -> str:
        rows, columns = self.query.shape[_SEQUENCE], self.key.shape[_SEQUENCE]
        if self.causal and rows != columns:
            return f"{rows} causal queries do not stand at {columns} keys"
        if dict(self.op.kwargs).get("dropout_p", _argument(self.op, 3, 0.0)):
            return "the kernel draws its own dropout"
        return ""


def _undivided(heads: int, parts: int, tensor: int) -> str:
    """Why heads cannot be shared; empty if they can."""
    if heads % (parts * tensor) == 0:
        return ""
    shares = f" x tensor={tensor}" if tensor > 1 else ""
    few = "1 head of keys does" if heads == 1 else f"{heads} heads of keys do"
    return f"{few} not divide by context={parts}{shares}"


def _refusal(op: Op, asked: Form, reasons: Mapping[str, str]) -> str:
    use = [f"attention={form}" for form, reason in reasons.items() if not reason]
    return (
        f"{op.source}: plan asks for attention={asked}, but {reasons[asked]}; use "
        f"{' or '.join(use)}, or drop attention"
    )


def _argument(op: Op, place: int, default: Any) -> Any:
    return op.args[place] if len(op.args) > place else default


def _causal(op: Op) -> bool:
    place = _CAUSAL[op.base]
    return _argument(op, place, default=False) is True


def formed(
    program: Program, parts: int, tensor: int = 1, asked: Form | None = None
) -> tuple[Program, tuple[Choice, ...]]:
    """The program with each attention in a form for sequences in `parts`, and what was chosen.

    Args:
        program: annotated where sequences are split over `context`.
        parts: ranks that share a sequence.
        tensor: ranks that may share its heads already.
        asked: a form for all; None takes the cheapest.

    Raises:
        PlanError: the form asked for cannot be.
    """
    forwards = [op for op in program.ops if op.base == FLASH]
    computed = attentions(program)
    if not forwards and not computed:
        return program, ()
    places = _places(program, parts)
    chosen: dict[int, Choice] = {}
    for op in forwards:
        q, k, v = op.inputs[:3]
        splits = _split(places.get(q)), _split(places.get(k))
        query, key, value = (program.values[number] for number in (q, k, v))
        met = _Met(op, query, key, value, splits, parts, tensor)
        chosen[op.results[0]] = met.choose(asked)
    former = _Former(program, tensor, chosen)
    found = list(chosen.values())
    for ends in computed:
        found.append(_choose_computed(program, ends, places, (parts, tensor), asked))
        if found[-1].form == "all-to-all":
            former.inside |= dict.fromkeys(ends.inside, ends)
            former.makes |= {v: place.dim for v in ends.makes if (place := _lies(places.get(v)))}
    return former.run(), tuple(found)


def _choose_computed(
    program: Program,
    ends: Ends,
    places: Mapping[int, Placement],
    ranks: tuple[int, int],
    asked: Form | None,
) -> Choice:
    """The form of attention that is computed op by op, where no ring can be."""
    (parts, tensor), op = ranks, ends.softmax
    heads = {program.values[value].shape[_HEADS] for value in (*ends.reads, *ends.makes)}
    if not all(_lies(places.get(value)) for value in ends.reads):
        return Choice("gather", "a part of it is whole on every rank", op.source, op.module)
    no_heads = next((r for r in (_undivided(h, parts, tensor) for h in sorted(heads)) if r), "")
    no_ring = "it is computed op by op, and a ring needs a kernel's log-sum-exp"
    reasons = {"all-to-all": no_heads, "ring": no_ring, "gather": ""}
    if asked is not None and reasons[asked]:
        raise PlanError(_refusal(op, asked, reasons))
    if asked is not None:
        return Choice(asked, "the plan asks for it", op.source, op.module)
    if no_heads:
        return Choice("gather", f"{no_heads}; {no_ring}", op.source, op.module)
    moved = sum(program.values[value].bytes for value in (*ends.reads, *ends.makes))
    price = f"{moved * (parts - 1) // parts**2:,} bytes a micro-batch"
    return Choice("all-to-all", f"{price}; no ring: {no_ring}", op.source, op.module)


def _lies(place: Placement) -> Shard | None:
    """How a table of heads has its sequence split."""
    return place if isinstance(place, Shard) and place.dim > _HEADS else None


def _split(place: Placement) -> bool:
    return isinstance(place, Shard) and place.dim == _SEQUENCE


def _places(program: Program, parts: int) -> Mapping[int, Placement]:
    """Where values lie over `context` if attention lets queries lie where they are."""
    ops = tuple(ringed(op) if op.base in _CAUSAL else op for op in program.ops)
    pinned = {value: REPLICATED for _, value in program.inputs}
    axis = Axis("context", parts)
    return propagate(replace(program, ops=ops), (axis,), pinned).places[axis.name]


def ringed(op: Op) -> Op:
    """The op as a ring."""
    return replace(op, name=op.name.replace(FLASH, RING))


@dataclass(slots=True)
class _Former:
    """Writes the program's attention in the forms chosen, by the forward op's output.

    Attributes:
        heads: value -> it with its heads split.
        back: value -> it with its sequence split again, for all who read it but attention.
        inside: ops of attention that is computed op by op and exchanges, by number.
        makes: what comes of it -> the dim of its sequence.
    """

    program: Program
    tensor: int
    chosen: Mapping[int, Choice]
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    heads: dict[int, int] = field(default_factory=dict)
    back: dict[int, int] = field(default_factory=dict)
    inside: dict[int, Ends] = field(default_factory=dict)
    makes: dict[int, int] = field(default_factory=dict)

    def run(self) -> Program:
        """The program."""
        self.values += self.program.values
        for number, op in enumerate(self.program.ops):
            if op.base not in _CAUSAL:
                self._plain(op, self.inside.get(number))
                continue
            output = op.results[0] if op.base == FLASH else op.inputs[4]
            form = self.chosen[output].form if output in self.chosen else "gather"
            if form == "all-to-all":
                self._exchanged(op)
            elif form == "ring":
                self.ops.append(ringed(self._reading(op)))
            else:
                self._masked(self._reading(op))
        outputs = tuple((name, self.back.get(v, v)) for name, v in self.program.outputs)
        values, ops = tuple(self.values), tuple(self.ops)
        return replace(self.program, values=values, ops=ops, outputs=outputs)

    def _reading(self, op: Op) -> Op:
        args, kwargs = map_refs((op.args, op.kwargs), lambda value: self.back.get(value, value))
        return replace(op, args=args, kwargs=kwargs)

    def _plain(self, op: Op, ends: Ends | None) -> None:
        """An op that is no kernel of attention; inside one, it reads heads."""
        changes: dict[int, int] = {}
        if ends is not None:
            for value in ends.reads.keys() & set(op.inputs):
                shared = self.program.values[value].shape[_HEADS]
                changes[value] = self._with_heads(op, value, shared)
        args, kwargs = map_refs((op.args, op.kwargs), lambda v: changes.get(v, self.back.get(v, v)))
        self.ops.append(replace(op, args=args, kwargs=kwargs))
        for value in op.results:
            if value in self.makes:
                dims = "," * self.makes[value] + "context"
                self.back[value] = self._annotated(op, value, dims)

    def _exchanged(self, op: Op) -> None:
        """Operands come with their heads split; results go back, but for what backward reads."""
        backward = op.base != FLASH
        first, tensors = (1, (0, 1, 2, 3)) if backward else (0, (0, 1, 2))
        shared = self.program.values[op.inputs[first + 1]].shape[_HEADS]
        changes = {op.inputs[k]: self._with_heads(op, op.inputs[k], shared) for k in tensors}
        args, kwargs = map_refs((op.args, op.kwargs), lambda value: changes.get(value, value))
        self.ops.append(replace(op, args=args, kwargs=kwargs))
        for value in op.results if backward else op.results[:1]:
            self.back[value] = self._annotated(op, value, ",,context")

    def _with_heads(self, op: Op, value: int, shared: int) -> int:
        """A value, each of whose shares of heads that `tensor` makes is shared in turn."""
        if value not in self.heads:
            group = self.program.values[value].shape[_HEADS] // shared
            before = self.back.get(value, value)
            self.heads[value] = self._annotated(op, before, f",context:{self.tensor}:{group}")
        return self.heads[value]

    def _annotated(self, op: Op, value: int, dims: str) -> int:
        writer = Writer(self.values, op)
        made = writer.write(
            "meshwright.annotate.default", (Ref(value), dims, ""), self.values[value]
        )
        self.ops += writer.ops
        return made.index

    def _masked(self, op: Op) -> None:
        """An explicit mask takes the place of a causal flag."""
        if not _causal(op):
            self.ops.append(op)
            return
        writer, place = Writer(self.values, op), _CAUSAL[op.base]
        mask = _mask(writer, *(self.values[index] for index in _query_and_key(op)))
        args = (*op.args[:place], False, *op.args[place + 1 :])
        named = {**dict(op.kwargs), "attn_mask": mask}
        self.ops += [*writer.ops, replace(op, args=args, kwargs=tuple(named.items()))]


def _query_and_key(op: Op) -> Sequence[int]:
    first = 1 if op.base.endswith("_backward") else 0
    return op.inputs[first : first + 2]


def _mask(w: Writer, query: Value, key: Value) -> Ref:
    """(queries, keys): 0 where a query sees a key, else -inf."""
    t, s = query.shape[_SEQUENCE], key.shape[_SEQUENCE]
    rows = w.write("aten.unsqueeze.default", (w.arange(t), 1), Value("int64", (t, 1)))
    seen = w.write("aten.ge.Tensor", (rows, w.arange(s)), Value("bool", (t, s)))
    zero, never = w.full(0.0, query.dtype), w.full(-math.inf, query.dtype)
    return w.write("aten.where.self", (seen, zero, never), Value(query.dtype, (t, s)))
