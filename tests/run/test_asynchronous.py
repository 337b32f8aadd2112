"""Sessions under asynchronous pipelines: what drains them, what goes on, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.errors import UsageError
from meshwright.plan.plan import Plan
from meshwright.program.instruction import Instruction
from meshwright.run.asynchronous import AsyncWorker, received_ahead
from meshwright.run.equality.begin import reference_for
from meshwright.run.equality.recurrence import Recurrence
from meshwright.run.prepare import prepare
from meshwright.run.session import Session, open_session
from tests.equal.test_asynchronous import CASE, job
from tests.run.crew import crew

PLANS = ["pipeline=2,schedule=pipedream", "pipeline=2,schedule=pipedream,replicas=2-1"]


def opened(plan: str, comm: Any, **changed: Any) -> Session:
    made = job(evaluation=CASE.job.data, **changed)
    return open_session(made, Plan.parse(plan), comm, dtype=torch.float64)


def ranks(plan: str) -> int:
    return Plan.parse(plan).ranks


def weights(session: Session) -> dict[str, Tensor]:
    """The whole model's, on rank 0."""
    module = session.module()
    return {} if module is None else {n: p.detach().double() for n, p in module.named_parameters()}


def expected(plan: str, steps: int, drains: tuple[int, ...]) -> dict[str, Tensor]:
    build = prepare(job(), Plan.parse(plan), ranks(plan), torch.float64, CASE.data)
    made = reference_for(build, CASE.source())
    assert isinstance(made, Recurrence)
    made.drains = frozenset(drains)
    made.after(steps - 1)
    made._drain(steps)
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def far(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert set(found) == set(wanted)
    return max(float((found[n] - wanted[n].to(found[n].dtype)).abs().max()) for n in found)


@pytest.mark.parametrize("plan", PLANS)
def test_evaluating_and_saving_drain_the_pipe_as_the_recurrence_does(plan: str, tmp_path: Path):
    def body(comm: Any) -> Any:
        session = opened(plan, comm)
        for _ in range(5):
            session.run_step()
        held_out = session.evaluate()["loss"]
        for _ in range(4):
            session.run_step()
        session.save(tmp_path)
        for _ in range(3):
            session.run_step()
        straight = weights(session)
        again = opened(plan, comm)
        assert again.resume(tmp_path) is not None
        assert again.step == 9
        for _ in range(3):
            again.run_step(until=12)
        return held_out, straight, weights(again)

    found = crew(ranks(plan), body)
    assert len({held_out for held_out, _, _ in found}) == 1
    wanted = expected(plan, 12, (5, 9))
    _, straight, again = found[0]
    assert far(straight, wanted) < 1e-6  # a module is float32
    assert far(again, straight) == 0.0


@pytest.mark.parametrize("plan", PLANS)
def test_every_rank_is_told_the_same_loss_and_the_flags_at_the_same_step(plan: str):
    def body(comm: Any) -> Any:
        session, told = opened(plan, comm), []
        for step in range(8):
            session.worker.flags = {"save": step >= 3 and comm.world.rank == 0, "stop": False}
            metrics = session.run_step(until=8).metrics
            told.append((metrics.loss, metrics["accuracy"], sorted(metrics.flags)))
        return told

    found = crew(ranks(plan), body)
    assert all(told == found[0] for told in found)
    flagged = [step for step, (_, _, flags) in enumerate(found[0]) if flags]
    assert flagged[0] == 4 if "replicas" not in plan else flagged[0] in (6, 7)


class Endless:
    """Global batches that depend on where the stream is."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Any:
        while True:
            generator = torch.Generator().manual_seed(self.place)
            self.place += 1
            yield (
                torch.randn(12, 6, generator=generator),
                torch.randint(0, 3, (12,), generator=generator),
            )

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


@pytest.mark.parametrize(
    "plan",
    ["pipeline=3,schedule=pipedream", pytest.param(PLANS[1], marks=pytest.mark.matrix)],
)
def test_what_a_stream_has_read_ahead_is_read_again_after_a_resume(plan: str, tmp_path: Path):
    def body(comm: Any) -> Any:
        session = opened(plan, comm, data=Endless)
        for _ in range(4):
            session.run_step()
        session.save(tmp_path)
        straight = [session.run_step(until=8).metrics.loss for _ in range(4)]
        again = opened(plan, comm, data=Endless)
        again.resume(tmp_path)
        return straight, [again.run_step(until=8).metrics.loss for _ in range(4)]

    for straight, resumed in crew(ranks(plan), body):
        assert straight == resumed


def test_a_pipe_that_has_ended_is_filled_again():
    plan = PLANS[0]

    def body(comm: Any) -> Any:
        session = opened(plan, comm)
        for _ in range(3):
            session.run_step(until=3)
        assert isinstance(session.worker, AsyncWorker)
        assert not session.worker.passings
        for _ in range(3):
            session.run_step(until=6)
        return weights(session)

    assert far(crew(2, body)[0], expected(plan, 6, (3,))) < 1e-6


def test_versions_take_no_more_memory_than_the_pipe_holds():
    def body(comm: Any) -> Any:
        session = opened("pipeline=3,schedule=pipedream", comm)
        for _ in range(6):
            session.run_step()
        values = session.worker.state.values
        ages = {n.split("/")[1] for n in values if n.startswith("older/")}
        return len(ages), len([n for n in values if n.startswith("model/")])

    assert [ages for ages, _ in crew(3, body)] == [2, 1, 0]


def test_a_batch_of_ones_own_is_refused():
    def body(comm: Any) -> Any:
        return opened(PLANS[0], comm).run_step((torch.zeros(12, 6), torch.zeros(12)))

    with pytest.raises(UsageError, match="begins the next ones before it is done"):
        crew(2, body)


def test_receives_are_posted_a_part_ahead():
    def part(name: str) -> list[Instruction]:
        return [Instruction("Recv", outputs=(name,)), Instruction("Wait", inputs=(name,))]

    found = received_ahead([part("~a"), [Instruction("Send")], part("~b"), part("~c")])
    kinds = [f"{i.kind} {' '.join((*i.inputs, *i.outputs))}".strip() for i in found]
    assert kinds == ["Recv ~a", "Wait ~a", "Recv ~b", "Send", "Recv ~c", "Wait ~b", "Wait ~c"]
