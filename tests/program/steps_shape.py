"""Steps of random programs that move: views, cuts, joins, lookups."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from meshwright.program.program import Ref
from tests.program.graphs import ELEMENTS, Unfit
from tests.program.steps_algebra import SIZES, dim_of, one, some_dims


def _turned(draw, graph, x):
    rank = graph.tensors[x].dim()
    if rank == 2 and draw(st.booleans()):
        graph.call("t.default", Ref(x))
    else:
        graph.call("permute.default", Ref(x), draw(st.permutations(range(rank))))


def _split_dim(draw, graph, x):
    shape = list(graph.shape(x))
    dim = dim_of(draw, graph, x)
    factors = [k for k in range(1, shape[dim] + 1) if shape[dim] % k == 0]
    part = draw(st.sampled_from(factors))
    shape[dim : dim + 1] = [part, shape[dim] // part]
    graph.call(one(draw, "view.default", "_unsafe_view.default"), Ref(dense(graph, x)), shape)


def _merged(draw, graph, x):
    shape = list(graph.shape(x))
    if len(shape) > 1:
        dim = draw(st.integers(0, len(shape) - 2))
        shape[dim : dim + 2] = [shape[dim] * shape[dim + 1]]
        graph.call("reshape.default", Ref(x), shape)


def _regrouped(draw, graph, x):
    """Any other dims with as many elements."""
    left, shape = graph.tensors[x].numel(), []
    while left > 1 and len(shape) < 3:
        shape.append(draw(st.sampled_from([k for k in range(1, left + 1) if left % k == 0])))
        left //= shape[-1]
    graph.call("view.default", Ref(dense(graph, x)), [*shape, left])


def dense(graph, x):
    if graph.tensors[x].is_contiguous():
        return x
    return graph.call("clone.default", Ref(x), memory_format=torch.contiguous_format)[0]


def _spread(draw, graph, x):
    dim = draw(st.integers(0, graph.tensors[x].dim()))
    (wider,) = graph.call("unsqueeze.default", Ref(x), dim)
    if draw(st.booleans()):
        shape = list(graph.shape(wider))
        shape[dim] = one(draw, *SIZES)
        graph.call("expand.default", Ref(wider), shape)


def _stretched(draw, graph, x):
    """Dims of size 1 made longer, or left out."""
    shape = graph.shape(x)
    ones = [k for k, size in enumerate(shape) if size == 1]
    if ones and draw(st.booleans()):
        graph.call("squeeze.dim", Ref(x), draw(st.sampled_from(ones)))
    elif ones:
        size = one(draw, *SIZES)
        graph.call("expand.default", Ref(x), [size if k in ones else -1 for k in range(len(shape))])


def _joined(draw, graph, x):
    dim, shape = dim_of(draw, graph, x), graph.shape(x)
    how = one(draw, "itself", "fresh", "stack", "longer", "three")
    if how == "itself":
        graph.call("cat.default", [Ref(x), Ref(x)], dim)
    elif how == "stack":
        y = graph.input(*shape)
        graph.call("stack.default", [Ref(x), Ref(y)], draw(st.integers(0, len(shape))))
    else:
        parts = [Ref(x)]
        for _ in range(2 if how == "three" else 1):
            size = one(draw, *SIZES) if how == "longer" else shape[dim]
            parts.append(Ref(graph.input(*shape[:dim], size, *shape[dim + 1 :])))
        graph.call("cat.default", draw(st.permutations(parts)), dim)


def _cut(draw, graph, x):
    dim = dim_of(draw, graph, x)
    size = graph.shape(x)[dim]
    start = draw(st.integers(0, size - 1))
    stop = draw(st.integers(start + 1, size))
    if draw(st.booleans()):
        start -= size  # counted from the end
    step = one(draw, 1, 1, 1, 2)
    graph.call("slice.Tensor", Ref(x), dim, start, one(draw, stop, stop, stop + 99), step)


def _selected(draw, graph, x):
    dim = dim_of(draw, graph, x)
    graph.call("select.int", Ref(x), dim, draw(st.integers(0, graph.shape(x)[dim] - 1)))


def _split(draw, graph, x):
    dim = dim_of(draw, graph, x)
    size = graph.shape(x)[dim]
    how = one(draw, "halves", "ones", "sizes", "unbind")
    if how == "halves":
        graph.call("split.Tensor", Ref(x), (size + 1) // 2, dim)
    elif how == "ones":
        graph.call("split.Tensor", Ref(x), 1, dim)
    elif how == "unbind":
        graph.call("unbind.int", Ref(x), dim)
    elif size > 1:
        first = draw(st.integers(1, size - 1))
        graph.call("split_with_sizes.default", Ref(x), [first, size - first], dim)


def _along(draw, graph, x):
    dim = dim_of(draw, graph, x)
    name = one(draw, "cumsum", "flip", "roll", "cumprod", "sort", "topk", "tril", "triu")
    if name in ("cumsum", "cumprod"):
        graph.call(f"{name}.default", Ref(x), dim)
    elif name == "flip":
        graph.call("flip.default", Ref(x), some_dims(draw, graph, x))
    elif name == "roll":
        graph.call("roll.default", Ref(x), [1], [dim] if draw(st.booleans()) else [])
    elif name in ("tril", "triu"):
        if graph.tensors[x].dim() > 1:
            graph.call(f"{name}.default", Ref(x), draw(st.integers(-1, 1)))
    elif x in graph.exact:  # places of equal values depend on rounding
        if name == "sort":
            graph.call("sort.default", Ref(x), dim, draw(st.booleans()))
        else:
            graph.call("topk.default", Ref(x), draw(st.integers(1, graph.shape(x)[dim])), dim)


def _padded(draw, graph, x):
    rank = graph.tensors[x].dim()
    amounts = draw(st.lists(st.integers(-1, 2), min_size=2, max_size=2 * rank))
    amounts = amounts[: len(amounts) // 2 * 2]
    shape = graph.shape(x)
    made = [
        shape[rank - 1 - k // 2] + amounts[k] + amounts[k + 1] for k in range(0, len(amounts), 2)
    ]
    if min(made) > 0:
        graph.call("constant_pad_nd.default", Ref(x), amounts, one(draw, 0.0, 0.0, 3.0))


def looked_up(draw, graph, x):
    """Rows of x by index."""
    shape, dim = graph.shape(x), dim_of(draw, graph, x)
    size, count = shape[dim], one(draw, 2, 3, 4, 6)
    how = one(draw, "embedding", "gather", "index", "select", "crossed")
    if how == "embedding" and len(shape) == 2:
        index = graph.index(shape[0], *((count,) if draw(st.booleans()) else (2, count)))
        graph.call("embedding.default", Ref(x), Ref(index))
    elif how == "gather":
        index = graph.index(size, *shape[:dim], count, *shape[dim + 1 :])
        graph.call("gather.default", Ref(x), dim, Ref(index))
    elif how == "select":
        graph.call("index_select.default", Ref(x), dim, Ref(graph.index(size, count)))
    elif how == "crossed" and len(shape) > 1:
        pair = [Ref(graph.index(shape[0], count, 1)), Ref(graph.index(shape[1], 1, 3))]
        graph.call("index.Tensor", Ref(x), pair)
    else:
        picks = [None] * dim + [Ref(graph.index(size, count))]
        graph.call("index.Tensor", Ref(x), picks)


def _put(draw, graph, x):
    """Values written into x by place."""
    shape, dim = graph.shape(x), dim_of(draw, graph, x)
    size, count = shape[dim], one(draw, 1, 2, 3, 4)
    part = (*shape[:dim], min(count, size), *shape[dim + 1 :])
    if math.prod(part) > ELEMENTS:
        raise Unfit
    how = one(draw, "slice", "select", "scatter", "add", "index_add", "index_put", "rows")
    if how == "slice":
        start = size - part[dim]
        args = (Ref(x), Ref(graph.input(*part)), dim, start, size)
        graph.call("slice_scatter.default", *args)
    elif how == "select":
        rest = graph.input(*shape[:dim], *shape[dim + 1 :])
        graph.call("select_scatter.default", Ref(x), Ref(rest), dim, size - 1)
    elif how == "scatter":  # of one place each, so that none is written twice
        one_each = (*shape[:dim], 1, *shape[dim + 1 :])
        index = graph.index(size, *one_each)
        graph.call("scatter.src", Ref(x), dim, Ref(index), Ref(graph.input(*one_each)))
    elif how == "add":
        index = graph.index(size, *part)
        graph.call("scatter_add.default", Ref(x), dim, Ref(index), Ref(graph.input(*part)))
    elif how == "index_add":
        args = (Ref(x), dim, Ref(graph.index(size, part[dim])), Ref(graph.input(*part)))
        graph.call("index_add.default", *args)
    elif how == "index_put":
        picks = [None] * dim + [Ref(graph.index(size, part[dim]))]
        graph.call("index_put.default", Ref(x), picks, Ref(graph.input(*part)), True)
    else:
        grown = graph.input(*shape[:dim], 1, *shape[dim + 1 :])
        picks = [None] * dim + [Ref(graph.index(size, 1))]
        graph.call("index_put.default", Ref(x), picks, Ref(grown), False)


def _placed_back(draw, graph, x):
    """What backward passes of cuts do: x among zeros."""
    shape, dim = graph.shape(x), dim_of(draw, graph, x)
    extra = draw(st.integers(0, 4))
    if draw(st.booleans()):
        begin = draw(st.integers(0, extra))
        made = [*shape[:dim], shape[dim] + extra, *shape[dim + 1 :]]
        args = (Ref(x), made, dim, begin, begin + shape[dim], 1)
        graph.call("slice_backward.default", *args)
    else:
        made = [*shape[:dim], extra + 1, *shape[dim:]]
        graph.call("select_backward.default", Ref(x), made, dim, draw(st.integers(0, extra)))


STEPS = (
    _turned, _split_dim, _split_dim, _merged, _merged, _regrouped, _spread, _stretched, _joined,
    _joined, _cut, _selected, _split, _along, _padded, looked_up, looked_up, _put, _placed_back,
)  # fmt: skip
