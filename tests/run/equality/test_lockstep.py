"""The first op that differs, found by running all ranks beside one device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from meshwright.plan.plan import Plan
from meshwright.program.program import Program
from meshwright.run.build import Build, Lowered
from meshwright.run.data.samples import open_source
from meshwright.run.equality.lockstep import first_difference
from meshwright.run.prepare import prepare
from meshwright.run.step import Policy
from meshwright.run.worker import Worker
from tests.run.jobs import job, weighted_loss

MADE = job(loss=weighted_loss)


def crew(plan: str) -> tuple[Build, list[Worker]]:
    build = prepare(MADE, Plan.parse(plan), Plan.parse(plan).ranks, torch.float64)
    source = [open_source(MADE.data(), batch_size=12, seed=0) for _ in range(build.mesh.size)]
    return build, [Worker(build, rank, s, Policy()) for rank, s in enumerate(source)]


@pytest.mark.parametrize(
    "plan",
    [
        "data=2",
        "data=5",
        "zero3,data=3",
        "data=2,microbatches=2",
        "pipeline=2,microbatches=3",
        "pipeline=2,replicas=2-1,microbatches=2",
        "zero3,data=2,pipeline=2,schedule=zb-v,microbatches=2,remat=full,gather=step",
    ],
)
def test_ranks_that_are_right_differ_nowhere(plan):
    assert first_difference(*crew(plan)) is None


def spoilt(program: Program, base: str, change) -> Program:
    """The program with its first op of this kind changed."""
    place = next(k for k, op in enumerate(program.ops) if op.base == base)
    ops = list(program.ops)
    ops[place] = change(ops[place])
    return dataclasses.replace(program, ops=tuple(ops))


def with_program(build: Build, worker: Worker, change) -> None:
    """Spoil what one rank runs."""
    micros = worker.fetch(0).micros
    lowered = build.lowered(worker.rank, micros)
    (count, local), *rest = lowered.compiled.units
    unit = (count, dataclasses.replace(local, program=change(local.program)))
    compiled = dataclasses.replace(lowered.compiled, units=(unit, *rest))
    key = next(k for k, v in build.lists.items() if v is lowered)
    build.lists[key] = Lowered(compiled, lowered.functions)


def test_the_op_that_is_wrong_is_named_with_its_module_and_line():
    build, workers = crew("data=2")
    with_program(
        build,
        workers[1],
        lambda p: spoilt(
            p, "aten.tanh", lambda op: dataclasses.replace(op, name="aten.sin.default")
        ),
    )
    found = first_difference(build, workers)
    assert found is not None
    assert found["op"] in {"aten.tanh.default", "aten.sin.default"}
    assert "jobs.py:" in found["source"]
    assert found["phase"] == "forward"
    assert found["error"] > 1e-3


def test_an_op_of_a_stage_that_is_wrong_is_named():
    build, workers = crew("pipeline=2,data=2")
    micros = workers[3].fetch(0).micros
    micro = build.staged_micro(workers[3].rank, build.unit(micros[0]).program)
    sums = frozenset(micro.tasks.sums)
    for stage in range(2):
        local, *rest = micro.local((stage, "F"), sums, sums)
        if not any(op.base == "aten.tanh" for op in local.program.ops):
            continue
        change = spoilt(
            local.program, "aten.tanh", lambda op: dataclasses.replace(op, name="aten.sin.default")
        )
        key = next(k for k in micro.known if k[0] == (stage, "F"))
        micro.known[key] = (dataclasses.replace(local, program=change), *rest)
    found = first_difference(build, workers)
    assert found is not None
    assert found["op"] in {"aten.tanh.default", "aten.sin.default"}
    assert "jobs.py:" in found["source"]
    assert found["phase"] == "forward"
