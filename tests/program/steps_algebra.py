"""Steps of random programs that compute: pointwise, products, sums."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from meshwright.program.program import Ref

SIZES = (2, 3, 4, 6, 8, 1)

THRESHOLD = 0.3137
"""No value that is computed equals it, so that rounding changes no comparison."""


def one(draw, *choices):
    return draw(st.sampled_from(choices))


def dim_of(draw, graph, x):
    return draw(st.integers(0, graph.tensors[x].dim() - 1))


def some_dims(draw, graph, x):
    rank = graph.tensors[x].dim()
    return sorted(draw(st.sets(st.integers(0, rank - 1), min_size=1, max_size=rank)))


def spread_shape(draw, shape):
    """A shape that broadcasts to `shape`: leading dims left out, some of size 1."""
    kept = shape[draw(st.integers(0, len(shape))) :]
    ones = draw(st.integers(0, 2 ** len(kept) - 1)) if draw(st.booleans()) else 0
    return tuple(1 if ones >> k & 1 else size for k, size in enumerate(kept))


def _broadcast(a, b):
    pairs = zip(a[::-1], b[::-1], strict=False)
    return all(m == n or 1 in (m, n) for m, n in pairs)


def partner(draw, graph, x):
    """A value that broadcasts with x: one that there is, or a fresh input."""
    shape = graph.shape(x)
    if draw(st.booleans()):
        return draw(
            st.sampled_from([k for k in graph.numbers() if _broadcast(graph.shape(k), shape)])
        )
    return graph.input(*spread_shape(draw, shape))


def unary(draw, graph, x):
    name = one(draw, "relu", "gelu", "tanh", "neg", "sigmoid", "clone", "sin", "abs", "silu")
    graph.call(f"{name}.default", Ref(x))


def _scaled(draw, graph, x):
    name = one(draw, "mul.Tensor", "div.Tensor", "add.Tensor", "sub.Tensor", "rsub.Scalar")
    graph.call(name, Ref(x), 1.5)


def _binary(draw, graph, x):
    y = partner(draw, graph, x)
    name = one(draw, "add.Tensor", "sub.Tensor", "mul.Tensor", "maximum.default", "minimum.default")
    graph.call(name, *draw(st.permutations([Ref(x), Ref(y)])))


def _mixed(draw, graph, x):
    """Linear combinations of two."""
    y = partner(draw, graph, x)
    if draw(st.booleans()):
        graph.call("add.Tensor", Ref(x), Ref(y), alpha=0.5)
    else:
        graph.call("lerp.Scalar", *(Ref(v) for v in _alike(graph, x, y)), 0.25)


def _alike(graph, x, y):
    return (x, y) if graph.shape(x) == graph.shape(y) else (x, graph.input(*graph.shape(x)))


def _masked(draw, graph, x):
    shape = graph.shape(x)
    mask = graph.mask(*spread_shape(draw, shape))
    how = one(draw, "where", "fill", "scalar", "nearly")
    if how == "where":
        graph.call(
            "where.self", Ref(mask), *draw(st.permutations([Ref(x), Ref(graph.input(*shape))]))
        )
    elif how == "fill":
        graph.call("masked_fill.Scalar", Ref(x), Ref(mask), 0.0)
    elif how == "scalar":
        graph.call("masked_fill.Scalar", Ref(x), Ref(mask), -2.0)
    else:
        (number,) = graph.call("full.default", [], 0.5, dtype=torch.float64)
        graph.call("where.self", Ref(mask), Ref(x), Ref(number))


def _compared(draw, graph, x):
    """Truth values of numbers, counted or used as a mask."""
    (truth,) = graph.call("gt.Scalar", Ref(x), THRESHOLD)
    how = one(draw, "where", "count", "any", "number")
    if how == "where":
        graph.call("where.self", Ref(truth), Ref(x), Ref(graph.input(*graph.shape(x))))
    elif how == "count":
        (count,) = graph.call("sum.dim_IntList", Ref(truth), some_dims(draw, graph, x), True)
        (count,) = graph.call("_to_copy.default", Ref(count), dtype=torch.float64)
        graph.call("add.Tensor", Ref(x), Ref(count))
    elif how == "any":
        name = one(draw, "any.dim", "all.dim")
        graph.call(name, Ref(truth), dim_of(draw, graph, x), draw(st.booleans()))
    else:
        graph.call("_to_copy.default", Ref(truth), dtype=torch.float64)


def _product(draw, graph, x):
    shape, width = graph.shape(x), one(draw, *SIZES)
    if len(shape) == 1:
        graph.call("mv.default", Ref(graph.input(width, *shape)), Ref(x))
    elif len(shape) == 2:
        fit = [k for k in graph.numbers(2) if graph.shape(k)[0] == shape[1]]
        old = fit and draw(st.booleans())
        y = draw(st.sampled_from(fit)) if old else graph.input(shape[1], width)
        _mm(draw, graph, x, y)
    elif len(shape) == 3:
        fit = [k for k in graph.numbers(3) if graph.shape(k)[:2] == (shape[0], shape[2])]
        old = fit and draw(st.booleans())
        y = draw(st.sampled_from(fit)) if old else graph.input(shape[0], shape[2], width)
        _bmm(draw, graph, x, y)


def _mm(draw, graph, x, y):
    made = (graph.shape(x)[0], graph.shape(y)[1])
    if draw(st.booleans()):
        graph.call("mm.default", Ref(x), Ref(y))
        return
    fit = [k for k in graph.numbers() if _spreads(graph.shape(k), made)]
    old = fit and draw(st.booleans())
    bias = draw(st.sampled_from(fit)) if old else graph.input(*spread_shape(draw, made))
    scales = {"beta": 0.5, "alpha": 2.0} if draw(st.booleans()) else {}
    graph.call("addmm.default", Ref(bias), Ref(x), Ref(y), **scales)


def _spreads(shape, to):
    return len(shape) <= len(to) and all(
        size in (1, wide) for size, wide in zip(shape[::-1], to[::-1], strict=False)
    )


def _bmm(draw, graph, x, y):
    made = (graph.shape(x)[0], graph.shape(x)[1], graph.shape(y)[2])
    if draw(st.booleans()):
        graph.call("bmm.default", Ref(x), Ref(y))
    else:
        bias = graph.input(*spread_shape(draw, made))
        graph.call("baddbmm.default", Ref(bias), Ref(x), Ref(y))


def _gram(draw, graph, x):
    """A value times itself, turned."""
    rank = graph.tensors[x].dim()
    if rank == 1:
        graph.call("dot.default", Ref(x), Ref(x))
    elif rank in (2, 3):
        (turned,) = graph.call("transpose.int", Ref(x), rank - 2, rank - 1)
        name = "mm.default" if rank == 2 else "bmm.default"
        graph.call(name, *draw(st.permutations([Ref(x), Ref(turned)])))


def linear(draw, graph, x):
    """x times a weight's transpose, as layers are; x of three dims is flattened."""
    *lead, inner = graph.shape(x)
    if not lead:
        return
    width = one(draw, *SIZES)
    weight = graph.input(width, inner)
    if len(lead) > 1:
        (x,) = graph.call("reshape.default", Ref(x), [-1, inner])
    (turned,) = graph.call("t.default", Ref(weight))
    if draw(st.booleans()):
        (made,) = graph.call("addmm.default", Ref(graph.input(width)), Ref(x), Ref(turned))
    else:
        (made,) = graph.call("mm.default", Ref(x), Ref(turned))
    if len(lead) > 1:
        graph.call("view.default", Ref(made), [*lead, width])


def total(draw, graph, x):
    dims, keep = some_dims(draw, graph, x), draw(st.booleans())
    name = one(draw, "sum.dim_IntList", "amax.default", "sum.dim_IntList", "amin.default")
    graph.call(name, Ref(x), dims, keep)


def _mean(draw, graph, x):
    dims, keep = some_dims(draw, graph, x), draw(st.booleans())
    (total,) = graph.call("sum.dim_IntList", Ref(x), dims, keep)
    graph.call("div.Tensor", Ref(total), graph.tensors[x].numel() // graph.tensors[total].numel())


def _whole_total(draw, graph, x):
    """Reductions that need their dims whole."""
    dims, keep = some_dims(draw, graph, x), draw(st.booleans())
    name = one(draw, "logsumexp", "var", "norm", "max", "prod", "argmax")
    if name == "logsumexp":
        graph.call("logsumexp.default", Ref(x), dims, keep)
    elif name == "var":
        graph.call("var.correction", Ref(x), dims, correction=0, keepdim=keep)
    elif name == "norm":
        (near,) = graph.call("add.Tensor", Ref(x), 2.0)
        graph.call("linalg_vector_norm.default", Ref(near), 2, dims, keep)
    elif name == "max" and x in graph.exact:
        graph.call("max.dim", Ref(x), dims[0], keep)
    elif name == "argmax" and x in graph.exact:
        graph.call("argmax.default", Ref(x), dims[0], keep)
    else:
        graph.call("prod.dim_int", Ref(x), dims[0], keep)


def _scalar(draw, graph, x):
    name = one(draw, "sum.default", "amax.default")
    graph.call(name, Ref(x))


STEPS = (
    unary, _scaled, _binary, _binary, _mixed, _masked, _compared, _product, _product, _gram,
    linear, linear, total, total, _mean, _whole_total, _scalar,
)  # fmt: skip
