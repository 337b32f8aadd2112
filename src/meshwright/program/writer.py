"""Writing ops in place of one: new values, and where the old op came from kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from meshwright.program.program import Arg, Op, Ref, Symbol, Value

__all__ = ["Writer"]


@dataclass(slots=True)
class Writer:
    """Ops that stand for `op`.

    Attributes:
        values: the program's; new ones are appended.
        op: the old one, whose phase, module and source line the new ones take.
        ops: what was written.
    """

    values: list[Value]
    op: Op
    ops: list[Op] = field(default_factory=list)

    def value(self, place: int) -> Value:
        """The tensor that is positional argument `place` of the old op."""
        arg = self.op.args[place]
        assert isinstance(arg, Ref), (self.op.name, place)
        return self.values[arg.index]

    def write(
        self,
        name: str,
        args: tuple[Arg, ...],
        like: Value,
        result: int | None = None,
        dtype: str | None = None,
    ) -> Ref:
        """One op and its result: a new value `like` this, or one that the old op made."""
        if result is None:
            result = len(self.values)
            self.values.append(like)
        named = () if dtype is None else (("dtype", Symbol("dtype", dtype)),)
        written = replace(
            self.op, name=name, args=args, kwargs=named, outputs=(result,), packed=False
        )
        self.ops.append(written)
        return Ref(result)

    def full(self, number: float, dtype: str) -> Ref:
        """A scalar."""
        return self.write("aten.full.default", ((), number), Value(dtype, ()), dtype=dtype)

    def arange(self, count: int) -> Ref:
        """0 to `count` - 1."""
        like = Value("int64", (count,))
        return self.write("aten.arange.default", (count,), like, dtype="int64")
