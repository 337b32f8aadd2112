"""Mesh: ranks and coordinates are one numbering; groups along an axis part the ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.plan.mesh import AXES, Axis, Mesh, StageMesh


@st.composite
def stages(draw):
    names = draw(st.lists(st.sampled_from(AXES), unique=True, max_size=3))
    return StageMesh(tuple(Axis(name, draw(st.integers(1, 4))) for name in names))


meshes = st.lists(stages(), min_size=1, max_size=3).map(lambda found: Mesh(tuple(found)))


@given(mesh=meshes)
def test_coordinates_and_ranks_are_inverse(mesh):
    seen = [mesh.coordinates(rank) for rank in range(mesh.size)]
    assert [mesh.rank(stage, here) for stage, here in seen] == list(range(mesh.size))
    assert [stage for stage, _ in seen] == sorted(stage for stage, _ in seen)
    for stage, here in seen:
        axes = mesh.stages[stage].axes
        assert tuple(here) == tuple(axis.name for axis in axes)
        assert all(0 <= here[axis.name] < axis.size for axis in axes)


@given(mesh=meshes)
def test_ranks_outside_are_refused(mesh):
    for rank in (-1, mesh.size, mesh.size + 7):
        with pytest.raises(PlanError, match=f"rank {rank} is outside a mesh of {mesh.size} ranks"):
            mesh.coordinates(rank)


@given(mesh=meshes, axis=st.sampled_from(AXES))
def test_groups_part_the_ranks_of_a_stage(mesh, axis):
    for number, stage in enumerate(mesh.stages):
        groups = list(mesh.groups(number, axis))
        ranks = [rank for rank in range(mesh.size) if mesh.coordinates(rank)[0] == number]
        assert sorted(rank for group in groups for rank in group) == ranks
        assert all(len(group) == stage.axis_size(axis) for group in groups)


@given(mesh=meshes, axis=st.sampled_from(AXES))
def test_a_group_differs_in_its_axis_only_and_is_in_order(mesh, axis):
    for rank in range(mesh.size):
        group = mesh.group(rank, axis)
        assert rank in group
        stage, here = mesh.coordinates(rank)
        for place, member in enumerate(group):
            assert mesh.group(member, axis) == group
            there = {**here, axis: place} if axis in here else here
            assert mesh.coordinates(member) == (stage, there)


@given(stage=stages())
def test_the_last_axis_is_nearest(stage):
    if stage.size > 1:
        last = [axis for axis in stage.axes if axis.size > 1][-1]
        assert Mesh((stage,)).group(0, last.name) == tuple(range(last.size))


def test_of_orders_axes_and_repeats_stages():
    mesh = Mesh.of(pipeline=2, tensor=2, data=3)
    assert mesh.size == 12
    assert [axis.name for axis in mesh.stages[0].axes] == ["data", "tensor"]
    assert mesh.stages[0] == mesh.stages[1]
    assert mesh.coordinates(9) == (1, {"data": 1, "tensor": 1})
    assert mesh.group(9, "data") == (7, 9, 11)
    assert mesh.group(9, "tensor") == (8, 9)
    assert mesh.group(9, "context") == (9,)


def test_replicas_make_unequal_stages():
    mesh = Mesh.of(replicas=(2, 1), tensor=2, data=1)
    assert mesh.size == 6
    assert [stage.axis_size("data") for stage in mesh.stages] == [2, 1]
    assert mesh.coordinates(5) == (1, {"data": 0, "tensor": 1})
    assert mesh.group(3, "data") == (1, 3)


def test_a_mesh_of_nothing_is_one_rank():
    mesh = Mesh.of()
    assert mesh.size == 1
    assert mesh.coordinates(0) == (0, {})
    assert list(mesh.groups(0, "data")) == [(0,)]


@pytest.mark.parametrize(("size", "inner"), [(0, 1), (-1, 1), (4, 0), (4, 3)])
def test_sizes_and_splits_are_checked(size, inner):
    with pytest.raises(PlanError, match=f"data={size}"):
        Axis("data", size, inner)


def test_a_name_stands_once():
    with pytest.raises(PlanError, match="each name stands once"):
        StageMesh((Axis("data", 2), Axis("data", 2)))
