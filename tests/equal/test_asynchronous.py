"""Asynchronous pipelines equal their recurrences, a drain on the way; mutants do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.comm.local import LocalWorld
from meshwright.errors import PlanError, UserCodeError
from meshwright.job import Job
from meshwright.run import asynchronous, stale
from meshwright.run.equality import verify
from meshwright.run.equality.measure import KINDS, Report
from meshwright.run.equality.verify import verify_rank
from meshwright.schedule import endless
from tests.equal.harness import Case, told

STEPS = 20
EXACT = 1e-12


class Skipping(nn.Module):
    """Layers with dropout, the first one's result added to the last one's."""

    def __init__(self, norm: bool = False, skips: bool = True) -> None:
        super().__init__()
        self.skips = skips
        kind = nn.BatchNorm1d if norm else nn.LayerNorm
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(8 if k else 6, 8, bias=not norm), kind(8), nn.Tanh(), nn.Dropout(0.1)
            )
            for k in range(4)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(x + first if self.skips else x)


def samples() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (96,), generator=generator))


def loss(model: nn.Module, batch: Any) -> Any:
    out = model(batch[0])
    right = (out.argmax(1) == batch[1]).double().mean()
    return nn.functional.cross_entropy(out, batch[1]), {"accuracy": right}


def job(**changed: Any) -> Job:
    made: dict[str, Any] = {
        "model": Skipping,
        "loss": loss,
        "optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
        "data": samples,
        "batch_size": 12,
        "schedule": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.7),
    }
    return Job(**made | changed)


CASE = Case(job())


def assert_exact(report: Report) -> None:
    assert all(report.worst[kind].error <= EXACT for kind in KINDS), told(report)


PLANS = (
    "pipeline=2,schedule=pipedream",
    "pipeline=3,schedule=pipedream-vertical",
    "pipeline=4,schedule=pipedream-2bw,microbatches=4",
    "pipeline=2,schedule=pipedream,replicas=2-1",
)
MORE = (
    *(f"pipeline={n},schedule=pipedream" for n in (3, 4)),
    *(f"pipeline={n},schedule=pipedream-vertical" for n in (2, 4)),
    "pipeline=2,schedule=pipedream-2bw,microbatches=2",
    "pipeline=3,schedule=pipedream-2bw,microbatches=5",
    "pipeline=2,schedule=pipedream-vertical,replicas=2-1",
    "pipeline=3,schedule=pipedream,replicas=2-1-1",
    "pipeline=3,schedule=pipedream-vertical,replicas=2-3-1",
    "pipeline=2,schedule=pipedream,replicas=1-2",
    "pipeline=2,schedule=pipedream,replicas=3-1",
    "pipeline=2,schedule=pipedream,data=2",
    "pipeline=2,schedule=pipedream,tensor=2",
    "pipeline=2,schedule=pipedream,replicas=2-1,tensor=2",
    "pipeline=3,schedule=pipedream,remat=full",
)


@pytest.mark.parametrize("plan", PLANS)
def test_a_pipeline_equals_its_recurrence(plan: str):
    assert_exact(CASE.verify(plan, STEPS))


@pytest.mark.matrix
@pytest.mark.parametrize("plan", MORE)
def test_more_of_them(plan: str):
    assert_exact(CASE.verify(plan, STEPS))


@pytest.mark.parametrize("plan", ["pipeline=3,schedule=pipedream"])
def test_running_statistics_go_by_minibatches_in_their_order(plan: str):
    report = Case(job(model=lambda: Skipping(norm=True))).verify(plan, STEPS)
    assert_exact(report)


@pytest.mark.parametrize(
    "plan",
    [
        "pipeline=3,schedule=pipedream",
        *(pytest.param(plan, marks=pytest.mark.matrix) for plan in PLANS[:3]),
    ],
)
def test_sends_that_wait_for_their_receiver_do_not_lock_a_chain_up(plan: str):
    """What skips stages, and replicas, need room for one message of each pair of ranks."""
    case = Case(job(model=lambda: Skipping(skips=False)))
    build = case.build(plan)
    crew = case.workers(build)
    exchanges = [verify_rank(worker, case.reference(build), 9, Report()) for worker in crew]
    LocalWorld(len(crew), sends="strict").perform(exchanges)


def differs(plan: str = "pipeline=3,schedule=pipedream") -> bool:
    return not CASE.verify(plan, 10).passed


def test_without_stashed_weights_it_is_something_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endless.Passing, "aged", lambda self, _, __: self)
    assert differs()


def test_without_a_copy_before_the_update_it_is_something_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stale.Versions, "keep", lambda _, __: None)
    assert differs()


def test_without_the_drain_it_is_something_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "DRAINS", (5,))
    case = Case(job())
    monkeypatch.setattr(asynchronous.AsyncWorker, "drain", lambda _: iter(()))
    assert not case.verify("pipeline=3,schedule=pipedream", 10).passed


def test_without_the_other_replicas_gradient_it_is_something_else(
    monkeypatch: pytest.MonkeyPatch,
):
    def own(self: Any, values: dict[str, Tensor], count: int) -> Any:
        del values, count
        yield from ()

    monkeypatch.setattr(asynchronous.AsyncWorker, "mean", own)
    assert differs("pipeline=2,schedule=pipedream,replicas=2-1")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.tie = nn.Parameter(torch.eye(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x @ self.tie)) @ self.tie


def test_weights_of_two_stages_are_refused_by_name():
    case = Case(job(model=Tied))
    with pytest.raises(PlanError, match="tie is used by stages 0, 1"):
        case.verify("pipeline=2,schedule=pipedream", 1)


def test_statistics_that_replicas_would_each_have_their_own_of_are_refused():
    case = Case(job(model=lambda: Skipping(norm=True)))
    with pytest.raises(PlanError, match=r"running statistics .* would differ"):
        case.verify("pipeline=2,schedule=pipedream,replicas=2-1", 1)


def test_a_loss_that_is_no_number_is_told_with_its_step():
    def broken(model: nn.Module, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0]) / 0.0, batch[1])

    with pytest.raises(UserCodeError, match="loss is nan in step 1"):
        Case(job(loss=broken)).verify("pipeline=3,schedule=pipedream", 3)
