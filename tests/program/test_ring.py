"""Ring attention: blocks that go around give what whole sequences give, and nobody has them all."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import pytest
import torch

from meshwright.plan.mesh import Axis
from meshwright.program.layout import REPLICATED, Layout, Shard
from tests.program.call import Call, f, program_of
from tests.program.worlds import give, run_everywhere, run_global

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
RING = "meshwright.ring_attention"
SEQUENCE = 2


def hidden(queries, keys, number):
    """A mask that hides all keys from the first query, and the first keys from all but the last."""
    mask = torch.zeros(queries, keys, dtype=torch.float64)
    mask[0] = number
    mask[:-1, : keys // 2] = number
    return mask


def masks(queries, keys):
    least = torch.finfo(torch.float64).min
    return {
        "": None,
        "mask": f(queries, keys),
        "hidden": hidden(queries, keys, -math.inf),
        "least": hidden(queries, keys, least),
        "padding": f(3, 1, 1, keys),
        "heads": f(1, 4, queries, keys),
    }


@cache
def both(queries, keys, heads, mask, causal, backward):
    """A call of attention, forward or backward, with 4 heads of queries."""
    found = masks(queries, keys)[mask]
    named = {} if found is None else {"attn_mask": found}
    q, k, v = f(3, 4, queries, 8), f(3, heads, keys, 8), f(3, heads, keys, 8)
    if not backward:
        return Call(f"{RING}.default", (q, k, v, 0.0, causal), named)
    out, total = flash.default(q, k, v, 0.0, causal, **named)
    args = (f(3, 4, queries, 8), q, k, v, out, total, 0.0, causal)
    return Call(f"{RING}_backward.default", args, named)


def run(call, parts):
    """(what is expected, what the ranks deliver, their programs)."""
    program, tensors = program_of(call)
    axes = (Axis("context", parts),)
    (op,) = program.ops
    first = 1 if op.base.endswith("backward") else 0
    split = Layout.of(axes, {"context": Shard(SEQUENCE)})
    tables = {value for value in op.inputs[: first + 4] if len(program.values[value].shape) == 4}
    rows = {op.inputs[5]} if first else set()
    mask = dict(op.kwargs).get("attn_mask")
    kept = set() if mask is None else {mask.index}
    pinned = dict.fromkeys((tables | rows) - kept, split)
    whole = {name: REPLICATED for name, _ in program.outputs}
    local = give(program, tensors, axes)
    expected = run_global(program, tensors)
    found, _, programs = run_everywhere(program, axes, local, whole, pinned)
    return expected, found, programs


CASES = [
    (6, 6, 4, "", False), (6, 6, 4, "", True), (7, 7, 4, "", True), (7, 7, 2, "", True),
    (5, 9, 4, "", False), (6, 9, 1, "mask", False), (7, 7, 4, "hidden", False),
    (7, 7, 4, "least", False), (5, 8, 2, "padding", False), (6, 6, 4, "heads", False),
]  # fmt: skip


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_around_gives_what_is_whole(case, backward, parts):
    expected, found, _ = run(both(*case, backward), parts)
    for rank in found:
        for name, wanted in expected.items():
            assert rank[name].dtype == wanted.dtype
            torch.testing.assert_close(rank[name], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("backward", "moved"), [(False, 2), (True, 4)])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_block_hops_to_every_other_rank_once_and_its_gradient_with_it(parts, backward, moved):
    _, _, programs = run(both(12, 12, 4, "", True, backward), parts)
    for program in programs:
        hops = [op for op in program.ops if op.name == "comm.permute"]
        assert len(hops) == moved * (parts - 1)
        sent = sum(program.values[op.inputs[0]].elements for op in hops)
        assert sent == moved * (3 * 4 * 12 * 8) * (parts - 1) // parts
        others = {op.name for op in program.ops if op.name.startswith("comm.")} - {"comm.permute"}
        assert others <= {"comm.all_gather"}, "which delivers the results whole"


@pytest.mark.parametrize("backward", [False, True])
def test_no_rank_ever_has_all_keys(backward):
    _, _, programs = run(both(6, 12, 4, "", False, backward), 3)
    for program in programs:
        outputs = {value for _, value in program.outputs}
        for value in set(range(len(program.values))) - outputs:
            assert program.values[value].shape[2:3] != (12,), "of 12 keys"


def test_a_causal_future_is_not_computed():
    _, _, programs = run(both(8, 8, 4, "", True, False), 4)
    seen = [
        Counter(op.args[5] for op in p.ops if op.base == "meshwright.ring_step") for p in programs
    ]
    assert seen == [
        {"causal": 1, "none": 3 - rank, "all": rank} if 0 < rank < 3
        else {"causal": 1, "none": 3} if rank == 0 else {"causal": 1, "all": 3}
        for rank in range(4)
    ]  # fmt: skip


def test_all_ranks_write_the_same_ops():
    """Else their hops would not fall into the same buckets."""
    _, _, programs = run(both(7, 7, 4, "", True, True), 3)
    assert len({tuple(op.name for op in program.ops) for program in programs}) == 1
