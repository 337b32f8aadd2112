"""A plan's pipeline as plain data: its stages, what they hold and send, its bubble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.program.explain import collectives
from meshwright.program.instruction import InstructionList
from meshwright.program.placing import forward_end
from meshwright.program.program import Program
from meshwright.run.build import Build, Micro
from meshwright.schedule.bubble import endless, idle, pipeline_notes
from meshwright.schedule.simulate import uniform

__all__ = ["describe_pipeline", "most_moved"]


def describe_pipeline(build: Build, micros: Sequence[Micro]) -> dict[str, Any] | None:
    """Schedule, bubble at equal stages, what to be warned of, stages; None without a pipeline."""
    plan, stages = build.plan, build.stages
    if plan.pipeline == 1 or stages is None:
        return None
    schedule = stages.schedule(plan.order, plan.microbatches)
    values, pipe = build.values(), endless(plan)
    simple = pipe is None and plan.replicas is None  # what the simulation knows
    found = []
    for stage, rank in enumerate(schedule.placement):
        begins, ends = _ends(stages.program, stages.placement.stages, stage)
        names = {
            name.removeprefix("model/").partition("[")[0]  # of a part of a fused one, all of it
            for name, homes in stages.placement.homes.items()
            if stage in homes and name.startswith("model/")
        }
        found.append(
            {
                "stage": stage,
                "rank": rank,
                "begins": begins,
                "ends": ends,
                "parameters": len(names),
                "bytes": sum(values[name].bytes for name in names),
                **({} if pipe is None else {"staleness": list(pipe.staleness(stage))}),
                **({} if pipe is None else {"versions": pipe.versions(stage)}),
            }
        )
    firsts = [_first(build, p) for p in range(plan.pipeline)]
    return {
        "schedule": plan.order,
        "microbatches": plan.microbatches,
        "remat": plan.remat,
        "bubble": idle(schedule, uniform(schedule.stages)) if simple else None,
        "estimated bubble": idle(schedule, stages.seconds()) if simple else None,
        "notes": list(pipeline_notes(plan, build.job.batch_size)),
        "stages": found,
        "traffic": [{"rank": p, **_traffic(build, r, micros)} for p, r in enumerate(firsts)],
    }


def most_moved(build: Build, piped: Mapping[str, Any]) -> int:
    """The first rank of the pipeline rank whose collectives move most."""
    most = max(piped["traffic"], key=lambda each: (each["moved"], -each["rank"]))
    return _first(build, most["rank"])


def _first(build: Build, pipeline: int) -> int:
    """The first rank of a pipeline rank."""
    return build.mesh.rank(pipeline, {axis.name: 0 for axis in build.axes})


def _traffic(build: Build, rank: int, micros: Sequence[Micro]) -> dict[str, int]:
    """Bytes that a rank moves in collectives, and what it sends to other stages, in a step."""
    compiled = build.lowered(rank, micros).compiled
    moved = sum(row.bytes for row in collectives(compiled, build.lines(rank)))
    return {"moved": moved, **_sent(compiled.instructions)}


def _ends(program: Program, stages: Sequence[int | None], stage: int) -> tuple[str, str]:
    """The modules that a stage's forward begins and ends with."""
    mine = [
        op.module
        for op, at in zip(program.ops[: forward_end(program)], stages, strict=False)
        if at == stage and op.module
    ]
    return (mine[0], mine[-1]) if mine else ("", "")


def _sent(instructions: InstructionList) -> dict[str, int]:
    """What a rank sends to other stages in a step."""
    found = [
        instructions.messages[each.segment]
        for each in instructions.body
        if each.kind == "Send" and each.segment is not None
    ]
    size = sum(value.bytes for message in found for value in message.values)
    return {"messages": len(found), "sent": size}
