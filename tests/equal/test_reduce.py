"""`reduce=step|microbatch`: gradient accumulation with and without delayed reduction."""

from __future__ import annotations

from functools import cache

import pytest

from meshwright.errors import PlanError
from meshwright.program.explain import collectives
from meshwright.program.zero import WHOLE_BELOW
from tests.equal.cells import example
from tests.equal.harness import Case, assert_equal
from tests.equal.traffic import first_step

MICROBATCHES = 3
PLANS = (
    "data=2",
    "zero1,data=2",
    "zero2,data=2",
    "zero3,data=2",
    "zero3,gather=step,data=2",
    "zero2,shard=2,data=4",
    "data=2,tensor=2",
    "data=2,context=2",
    "zero2,data=2,pipeline=2",
    "zero1,data=2,pipeline=2,schedule=zb-h1",
    "zero3,data=2,remat=full,offload=host",
)
SAMPLE = ("zero1,data=2", "zero2,data=2,pipeline=2")


@cache
def gpt():
    return Case(example("gpt").job(depth=2, width=32, context=16, batch=12, dropout=0.1))


def plan_of(plan, reduce):
    return f"{plan},microbatches={MICROBATCHES},reduce={reduce}"


@pytest.mark.parametrize(
    "plan", [pytest.param(p, marks=() if p in SAMPLE else pytest.mark.matrix) for p in PLANS]
)
@pytest.mark.parametrize("reduce", ["step", "microbatch"])
def test_equal_to_one_device(plan, reduce):
    assert_equal(gpt().verify(plan_of(plan, reduce), steps=3))


@pytest.mark.parametrize("reduce", [None, "step", "microbatch"])
@pytest.mark.parametrize("zero", range(4))
def test_a_gradient_moves_once_a_step_or_once_a_microbatch(zero, reduce):
    """An all-reduce moves it twice, a reduce-scatter once, times (N-1)/N, of N = 2."""
    plan = plan_of(f"zero={zero},data=2", reduce)
    plan = plan.removesuffix(",reduce=None")
    workers, fetched, _ = first_step(gpt(), plan)
    build = workers[0].build
    rows = collectives(workers[0].lowered(fetched[0]).compiled, build.axes)
    moved = sum(r.elements for r in rows if r.op != "all_gather" and r.phase != "forward")
    expected = 0
    for name, parameter in build.model.parameters.items():
        small = parameter.numel() * 4 < WHOLE_BELOW
        by_stage = 1 if zero < 2 or small else MICROBATCHES
        times = {None: by_stage, "step": 1, "microbatch": MICROBATCHES}[reduce]
        once = 2 if zero == 0 or small else 1
        expected += times * once * parameter.numel() // 2
        if name == "position.weight" and zero and times > 1:
            # No batch splits its rows: later micro-batches reduce whole what they are made of.
            expected += (times - 1) * parameter.numel() // 2
    assert moved == expected


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_is_reduced_at_once_is_held_in_shards(zero):
    """Held between micro-batches: whole gradients, or this rank's half of the large ones."""
    held = {}
    for reduce in ("step", "microbatch"):
        build = gpt().build(plan_of(f"zero={zero},data=2", reduce))
        held[reduce] = {n: str(s.gradients) for n, s in build.states.items()}
    assert all("Partial" in layout or "sum" in layout for layout in held["step"].values())
    large = [n for n, p in gpt().build("data=1").model.parameters.items() if p.numel() * 4 >= 1024]
    assert large
    assert all(held["microbatch"][n] != held["step"][n] for n in large)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (
            "replicas=2-1,pipeline=2,microbatches=4,reduce=microbatch",
            (
                "plan asks for reduce=microbatch, but replicas=2-1 take whole micro-batches in "
                "turn, and sum once a step; drop reduce, or use data in place of replicas"
            ),
        ),
        (
            "pipeline=2,data=1,schedule=pipedream,reduce=step",
            (
                "plan asks for reduce=step, but schedule=pipedream updates without waiting for a "
                "step's gradients; drop reduce, or use schedule=1f1b"
            ),
        ),
    ],
)
def test_what_it_cannot_go_with(plan, says):
    with pytest.raises(PlanError) as refusal:
        gpt().build(plan)
    assert says in str(refusal.value)
