"""Layouts: local shapes, slabs and boxes agree with splitting an array of indices."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from meshwright.plan.mesh import Axis
from meshwright.program.layout import (
    REPLICATED,
    Layout,
    Partial,
    Shard,
    chunk,
    disjoint,
    local_shape,
    pieces,
    primary,
    respelled,
    slab,
)
from tests.program.worlds import axes_of, everywhere, factored, held, layouts, meshes


@st.composite
def cases(draw):
    axes = draw(meshes())
    shape, shards = draw(factored())
    return shape, axes, draw(layouts(axes, shards))


@given(n=st.integers(0, 50), parts=st.integers(1, 9))
def test_chunks_are_those_of_array_split(n, parts):
    found = [chunk(n, parts, k) for k in range(parts)]
    wanted = np.array_split(np.arange(n), parts)
    assert [length for _, length in found] == [len(part) for part in wanted]
    assert [list(range(s, s + m)) for s, m in found] == [part.tolist() for part in wanted]


@given(case=cases())
def test_local_shapes_are_those_of_the_split_array(case):
    shape, axes, layout = case
    for here in everywhere(axes):
        assert local_shape(shape, layout, axes, here) == held(shape, layout, axes, here).shape


@given(case=cases())
def test_the_ranks_together_hold_each_element_once(case):
    shape, axes, layout = case
    copies = 1
    for axis in axes:
        copies *= 1 if isinstance(layout.on(axis.name), Shard) else axis.size
    seen = np.zeros(int(np.prod(shape)), int)
    for here in everywhere(axes):
        np.add.at(seen, held(shape, layout, axes, here).ravel(), 1)
    assert (seen == copies).all()
    total = sum(np.prod(local_shape(shape, layout, axes, here)) for here in everywhere(axes))
    assert total == copies * np.prod(shape)


@given(case=cases())
def test_slabs_cut_the_local_array_as_the_layout_says(case):
    """Narrowing what is held without an axis, by that axis's slab, gives what is held with it."""
    shape, axes, layout = case
    for here in everywhere(axes):
        for number, axis in enumerate(axes):
            shard = layout.on(axis.name)
            if not isinstance(shard, Shard) or shard in [
                layout.on(a.name) for a in axes[number + 1 :]
            ]:
                continue  # a later axis nests inside: the slab is of the innermost only
            without = layout.change(axes, axis.name, None)
            base = held(shape, without, axes, here)
            found = slab(shape, layout, axes, here, axis.name, shard)
            assert found.outer * found.n * found.unit == base.shape[shard.dim]
            seen = base.reshape(
                *base.shape[: shard.dim], found.outer, found.n, found.unit,
                *base.shape[shard.dim + 1 :],
            )  # fmt: skip
            for k in range(axis.size):
                start, length = found.starts[k], found.lengths[k]
                cut = np.take(seen, range(start, start + length), axis=shard.dim + 1)
                wanted = held(shape, layout, axes, {**here, axis.name: k})
                assert cut.reshape(wanted.shape).tolist() == wanted.tolist()


@given(case=cases(), data=st.data())
def test_written_otherwise_it_is_the_same_layout(case, data):
    shape, axes, layout = case
    shards = [
        Shard(dim, outer, unit)
        for dim, size in enumerate(shape)
        for outer in range(1, size + 1)
        for unit in range(1, size + 1)
        if size % (outer * unit) == 0
    ]
    like = data.draw(layouts(axes, shards or [None]))
    found = respelled(shape, layout, like, axes)
    for here in everywhere(axes):
        assert local_shape(shape, found, axes, here) == local_shape(shape, layout, axes, here)
        assert held(shape, found, axes, here).tolist() == held(shape, layout, axes, here).tolist()
    places = {place for _, place in found.placements}
    for a, b in itertools.combinations(places, 2):
        assert a.dim != b.dim or disjoint(shape[a.dim], a, b)


def slices(box):
    return tuple(slice(start, start + length) for start, length in box)


@given(case=cases())
def test_boxes_side_by_side_are_what_is_held(case):
    shape, axes, layout = case
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    for here in everywhere(axes):
        part = np.full(local_shape(shape, layout, axes, here), -1)
        for there, mine in pieces(shape, layout, axes, here):
            assert (part[slices(mine)] == -1).all()
            part[slices(mine)] = whole[slices(there)]
        assert part.tolist() == held(shape, layout, axes, here).tolist()


@given(case=cases())
def test_primary_parts_hold_each_element_once(case):
    shape, axes, layout = case
    count = np.zeros(shape, int)
    for here in everywhere(axes):
        if primary(layout, axes, here):
            for there, _ in pieces(shape, layout, axes, here):
                count[slices(there)] += 1
    assert (count == 1).all()


@given(units=st.integers(1, 4), n=st.integers(1, 7), sizes=st.lists(st.integers(1, 3), max_size=3))
def test_a_box_of_granules_keeps_them_whole(units, n, sizes):
    axes = axes_of(*sizes)
    layout = Layout.of(axes, {axis.name: Shard(0, 1, units) for axis in axes})
    for here in everywhere(axes):
        ((((start, length),), _),) = pieces((n * units,), layout, axes, here)
        assert list(range(start, start + length)) == held((n * units,), layout, axes, here).tolist()


def test_a_fused_projection_keeps_each_head_whole():
    axes = axes_of(2)
    qkv = Layout.of(axes, {"data": Shard(0, outer=3, unit=4)})  # 3 x 2 heads x 4
    assert held((24,), qkv, axes, {"data": 1}).tolist() == [
        4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23,
    ]  # fmt: skip
    assert local_shape((24,), qkv, axes, {"data": 1}) == (12,)


def test_a_layout_is_ordered_as_the_mesh_and_says_so():
    axes = (Axis("data", 2), Axis("tensor", 2))
    layout = Layout.of(axes, {"tensor": Shard(1, 3, 8), "data": Partial()})
    assert layout.placements == (("data", Partial()), ("tensor", Shard(1, 3, 8)))
    assert str(layout) == "partial(sum) over data, sharded(1 in (3, n, 8)) over tensor"
    assert layout.partial_axes == ("data",)
    assert layout.change(axes, "data", None) == Layout.of(axes, {"tensor": Shard(1, 3, 8)})
    assert layout.on("context") is None
    assert str(REPLICATED) == "replicated"
    assert Layout.of(axes, {"data": None, "tensor": None}) == REPLICATED


def test_a_shard_is_not_respelled_across_another():
    """Halves of a dim written as one of 4 elements would cut across an axis that splits each."""
    axes = (Axis("data", 2), Axis("context", 2))
    here = Layout((("data", Shard(1, 1, 2)), ("context", Shard(1, 2, 1))))
    like = Layout((("data", Shard(1)),))
    assert respelled((2, 4), here, like, axes) == here
    assert respelled((2, 4), Layout(here.placements[:1]), like, axes) == like
