"""Creation ops: what is the same everywhere is made at local size; what counts is made whole."""

from __future__ import annotations

from meshwright.program.rules.factor import OpView, Rule, RuleMaker, einsum, whole

__all__ = ["RULES"]


def _constant(place: int) -> RuleMaker:
    """`full(size, ..)` and its like: any dim may be local; `place` is where the size stands."""

    def rule(view: OpView) -> Rule:
        rank = len(view.results[0].shape)
        letters = " ".join(f"d{k}" for k in range(rank))
        ignored = ["1 " * len(value.shape) for value in view.operands]
        return einsum(view, ignored, [letters], shape_args=[(place, 0)])

    return rule


def _draw(view: OpView) -> Rule:
    """`draw(kind, size, n, sample dim, outer, unit, ..)`: only the sample factor may be local."""
    dim = view.number(3, -1)
    shape = view.results[0].shape
    if dim < 0:
        return whole(view)
    outer, unit = view.number(4, 1), view.number(5, 1)
    n = shape[dim] // (outer * unit)
    dims: list[tuple[int, ...]] = [()] * len(shape)
    dims[dim] = (0, 1, 2)
    operands = tuple(((),) * len(value.shape) for value in view.operands)
    return Rule(
        (outer, n, unit), operands, (tuple(dims),), whole=frozenset({0, 2}), shape_args=((1, 0),),
        plain=frozenset({1}),
    )  # fmt: skip


RULES: dict[str, RuleMaker] = {
    **dict.fromkeys(("aten.full", "aten.zeros", "aten.ones", "aten.empty"), _constant(0)),
    **dict.fromkeys(
        ("aten.new_zeros", "aten.new_ones", "aten.new_empty", "aten.new_full"), _constant(1)
    ),
    "aten.arange": whole,
    "aten.linspace": whole,
    "aten.eye": whole,
    "aten.scalar_tensor": whole,
    "meshwright.draw": _draw,
}
