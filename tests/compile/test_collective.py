"""Moves on tensors: what goes on the wire, and that unpacking undoes packing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.comm.base import Group
from meshwright.comm.local import collective
from meshwright.compile.collective import local_move, narrow, start, unpack, wire
from meshwright.program.layout import chunk
from meshwright.program.program import Op, Ref

NOTES = (("before", "sharded(0) over data"), ("after", "replicated"), ("value", "model/w"))


@st.composite
def slabs(draw, dim):
    """(slab, whole size): granules dealt over two or three members, also unevenly."""
    members = draw(st.integers(2, 3))
    outer, n, unit = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    parts = [chunk(n, members, k) for k in range(members)]
    starts, lengths = zip(*parts, strict=True)
    return (dim, outer, unit, starts, lengths), outer * n * unit


@st.composite
def cut_tensors(draw):
    """(slab, a whole tensor that it cuts)."""
    rank = draw(st.integers(1, 3))
    dim = draw(st.integers(0, rank - 1))
    slab, size = draw(slabs(dim))
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    shape[dim] = size
    return slab, torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


def members(slab):
    return len(slab[4])


def group(slab):
    return Group("data", tuple(range(members(slab))))


def move(name, *args):
    return Op(f"comm.{name}", (Ref(0), "data", *args), NOTES, (1,), source="gpt.py:41")


def run(op, tensors, ranks):
    """Every member's result of a collective."""
    starts = [start(wire((op,)), (tensor,), ranks, k) for k, tensor in enumerate(tensors)]
    assert all(t.is_contiguous() for s in starts for t in s.tensors), "transports want them so"
    return [unpack(wire((op,)), found)[0] for found in collective(starts)], starts


@given(case=cut_tensors())
def test_parts_are_what_numpy_would_take(case):
    slab, whole = case
    dim, outer, unit, starts, lengths = slab
    seen = whole.numpy().reshape(
        *whole.shape[:dim], outer, sum(lengths), unit, *whole.shape[dim + 1 :]
    )
    for k in range(members(slab)):
        part = narrow(whole, slab, k)
        taken = seen.take(range(starts[k], starts[k] + lengths[k]), axis=dim + 1)
        assert part.numpy().ravel().tolist() == taken.ravel().tolist()
        assert part.shape[dim] == outer * lengths[k] * unit


@given(case=cut_tensors())
def test_gathering_what_was_cut_gives_the_whole(case):
    slab, whole = case
    parts = [local_move(move("slice", slab), whole, {"data": k}) for k in range(members(slab))]
    assert all(part.is_contiguous() for part in parts)
    found, starts = run(move("all_gather", slab), parts, group(slab))
    assert all(torch.equal(tensor, whole) for tensor in found)
    for request in starts:
        assert request.shapes == tuple(tuple(part.shape) for part in parts)


@given(case=cut_tensors())
def test_a_gather_fills_the_memory_that_it_is_given(case):
    slab, whole = case
    parts = [narrow(whole, slab, k).clone() for k in range(members(slab))]
    memory = torch.full_like(whole, -1)
    (found,) = unpack(wire((move("all_gather", slab),)), parts, (memory,))
    assert found is memory
    assert torch.equal(memory, whole)


def test_parts_that_lie_end_to_end_are_the_whole():
    """A driver may gather into one piece of memory; then nothing is copied."""
    memory = torch.arange(24.0)
    gathered = [move("all_gather", (0, 1, 1, (0, 2), (2, 1)))] * 2
    parts = [memory[0:8].view(2, 4), memory[12:18].view(2, 3), memory[8:12].view(1, 4),
             memory[18:21].view(1, 3)]  # fmt: skip
    first, second = unpack(wire(gathered), parts)
    assert (first.data_ptr(), second.data_ptr()) == (parts[0].data_ptr(), parts[1].data_ptr())
    assert first.tolist() == memory[0:12].view(3, 4).tolist()
    assert second.tolist() == memory[12:21].view(3, 3).tolist()
    (apart,) = unpack(wire(gathered[:1]), [parts[0], parts[2].clone()])
    assert apart.tolist() == first.tolist()
    assert apart.data_ptr() != parts[0].data_ptr()


def test_a_gather_may_be_left_where_the_old_one_is():
    """Rows lie in one piece, columns do not; then what comes is copied there."""
    whole = torch.arange(12.0).reshape(4, 3)
    rows = Op("comm.all_gather", (Ref(0), "data", (0, 1, 1, (0, 2), (2, 2))), (("into", "model/w"),
              ("value", "model/w")), (1,))  # fmt: skip
    bucket = wire((rows,))
    assert bucket.into == ("model/w",)
    request = start(bucket, (whole[:2],), Group("data", (0, 1)), 0, (whole,))
    assert [part.data_ptr() for part in request.into] == [whole.data_ptr(), whole[2:].data_ptr()]
    (made,) = unpack(bucket, request.into, (whole,))
    assert made.data_ptr() == whole.data_ptr()
    assert made.tolist() == torch.arange(12.0).reshape(4, 3).tolist()
    columns = replace(rows, args=(Ref(0), "data", (1, 1, 1, (0, 2), (2, 1))))
    request = start(wire((columns,)), (whole[:, :2],), Group("data", (0, 1)), 0, (whole,))
    assert request.into == ()


@given(case=cut_tensors(), how=st.sampled_from(["sum", "max", "min"]))
def test_scattering_a_reduction_is_reducing_and_cutting(case, how):
    slab, whole = case
    terms = [whole * (k - 1.0) for k in range(members(slab))]
    stacked = torch.stack(terms)
    total = {"sum": stacked.sum(0), "max": stacked.amax(0), "min": stacked.amin(0)}[how]
    found, _ = run(move("reduce_scatter", slab, how), terms, group(slab))
    for k, part in enumerate(found):
        assert torch.equal(part, narrow(total, slab, k))
    found, _ = run(move("all_reduce", how), terms, group(slab))
    assert all(torch.equal(part, total) for part in found)


@given(data=st.data())
def test_exchanging_two_dims_is_gathering_one_and_cutting_the_other(data):
    source, rows = data.draw(slabs(0))
    target, columns = data.draw(slabs(1).filter(lambda found: members(found[0]) == members(source)))
    whole = torch.arange(float(rows * columns)).reshape(rows, columns)
    parts = [narrow(whole, source, k) for k in range(members(source))]
    found, starts = run(move("all_to_all", source, target), parts, group(source))
    for k, part in enumerate(found):
        assert torch.equal(part, narrow(whole, target, k))
        received = tuple(tuple(s.tensors[k].shape) for s in starts)
        assert starts[k].shapes == received, "each member knows what it will receive"


def test_a_request_says_what_it_serves():
    ranks = Group("data", (0, 1))
    assert start(wire((move("all_reduce", "sum"),)), (torch.ones(2),), ranks, 0).label == "model/w"
    unnamed = Op(
        "comm.all_reduce", (Ref(0), "data", "max"), (("value", ""),), (1,), source="a.py:3"
    )
    request = start(wire((unnamed,)), (torch.ones(2),), ranks, 1)
    assert (request.op, request.reduce, request.label) == ("all_reduce", "max", "a.py:3")
    assert request.group is ranks


@pytest.mark.parametrize(
    ("how", "dtype", "neutral"),
    [
        ("sum", torch.float32, 0.0),
        ("sum", torch.bool, False),
        ("max", torch.float64, float("-inf")),
        ("max", torch.bfloat16, float("-inf")),
        ("max", torch.int32, -(2**31)),
        ("max", torch.uint8, 0),
        ("max", torch.bool, False),
        ("min", torch.float16, float("inf")),
        ("min", torch.int64, 2**63 - 1),
        ("min", torch.bool, True),
    ],
)
def test_a_masked_value_changes_no_reduction(how, dtype, neutral):
    value = torch.tensor([1, 0, 1]).to(dtype)
    op = move("mask", how)
    assert local_move(op, value, {"data": 0}) is value
    other = local_move(op, value, {"data": 1})
    assert other.dtype == dtype
    assert other.tolist() == [neutral] * 3


def test_a_maximum_of_nothing_but_minus_infinity_survives():
    value = torch.tensor([float("-inf"), 1.0])
    op = move("mask", "max")
    terms = [local_move(op, value, {"data": k}) for k in range(2)]
    found, _ = run(move("all_reduce", "max"), terms, Group("data", (0, 1)))
    assert found[0].tolist() == [float("-inf"), 1.0]


def test_a_cut_tensor_can_be_viewed():
    """The program's view was traced on a whole, contiguous tensor."""
    whole = torch.arange(12.0).reshape(3, 4)
    part = local_move(move("slice", (1, 1, 1, (0, 2), (2, 2))), whole, {"data": 1})
    assert part.view(6).tolist() == [2.0, 3.0, 6.0, 7.0, 10.0, 11.0]
