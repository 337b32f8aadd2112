"""Calls of ops on rows and experts, and of what counts and scatters."""

from __future__ import annotations

import meshwright.compile.experts  # noqa: F401 - registers ops
from tests.program.call import Call, f, unit, whole

EXPERTS = 3


def _products():
    ids = whole(7, high=EXPERTS)
    for routed in (False, True):
        args = (f(7, 4), ids, f(EXPERTS, 4, 5), routed)
        yield Call("meshwright.expert_mm.default", args, label=f"routed {routed}")
        args = (f(7, 4), f(7, 5), ids, EXPERTS, routed)
        yield Call("meshwright.expert_mm_weight.default", args, label=f"routed {routed}")
    some = whole(7, high=2) * 2
    args = (f(7, 4), some, f(EXPERTS, 4, 5), False)
    yield Call("meshwright.expert_mm.default", args, label="one has no rows")


def _moves():
    ids = whole(7, high=EXPERTS)
    for name in ("dispatch", "combine"):
        yield Call(f"meshwright.{name}.default", (f(7, 4), ids, EXPERTS))
    yield Call("meshwright.dispatch_ids.default", (ids, EXPERTS))


def _counts():
    yield Call("aten.histc.default", (unit(5, 6) * 4, 4, 0, 4))
    yield Call("aten.histc.default", (unit(7), 4, 0, 0), label="its own span")
    index = whole(7, high=5)
    yield Call("aten.index_put.default", (f(5, 4), [index], f(7, 4), True))
    yield Call("aten.index_put.default", (f(5), [whole(3, high=5)], f(3), False), label="written")
    yield Call("aten._unsafe_index_put.default", (f(5, 4), [index], f(7, 4), True), label="unsafe")
    yield Call("aten.scatter_add.default", (f(5), 0, index, f(7)), label="counted")


MAKERS = (_products, _moves, _counts)
