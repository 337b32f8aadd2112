"""What a stage holds between forward and backward, in bytes of a real run: the closed forms."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from meshwright import Job
from meshwright.comm.local import LocalWorld
from meshwright.run.step import Policy
from meshwright.run.worker import Worker
from meshwright.schedule.check import check
from meshwright.schedule.named import schedule_of
from tests.equal.harness import Case

WIDTH, LAYERS, SAMPLES = 32, 32, 16


class Layers(nn.Module):
    """Layers that save far more than what one gives to the next, which messages hold."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(torch.sin(up(x))))
        return x


def job() -> Job:
    """One batch, again and again."""
    x = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(3))
    return Job(
        model=Layers,
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        data=lambda: [*x],
        batch_size=SAMPLES,
    )


CASE = Case(job())


class Counted(dict[str, Tensor]):
    """A rank's values that knows the most bytes of activations that it ever held.

    An activation is a value of a micro-batch that is no part of the batch and shares no storage
    with state; values that share one are counted once.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.own = {tensor.untyped_storage().data_ptr() for tensor in values.values()}
        self.peak = 0

    def pop(self, name, *default):
        self._count()  # a Free: what is alive is most before it
        return super().pop(name, *default)

    def _count(self) -> None:
        storages = {}
        for name, tensor in self.items():
            micro, colon, rest = name.partition(":")
            if colon and micro.isdecimal() and rest != "position" and "batch/" not in rest:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        held = sum(size for at, size in storages.items() if at not in self.own)
        self.peak = max(self.peak, held)


def peaks(plan: str) -> tuple[int, ...]:
    """Most bytes of activations on each rank in one step, all ranks driven in this thread."""
    build = CASE.build(plan)
    workers = [Worker(build, k, CASE.source(), Policy()) for k in range(build.plan.ranks)]
    for worker in workers:
        worker.state.values = Counted(worker.state.values)
    LocalWorld(len(workers)).perform([w.step(w.fetch(0), None) for w in workers])
    return tuple(worker.state.values.peak for worker in workers)


@pytest.mark.parametrize(
    ("name", "ranks", "virtual"),
    [
        ("gpipe", 2, 1),
        ("1f1b", 2, 1),
        ("interleaved", 2, 2),
        pytest.param("gpipe", 4, 1, marks=pytest.mark.matrix),
        pytest.param("1f1b", 4, 1, marks=pytest.mark.matrix),
    ],
)
def test_a_stage_holds_what_its_schedule_says(name, ranks, virtual):
    forms, once, found = measured(name, ranks, virtual)
    for peak, form, whole in zip(found, forms, once, strict=True):
        assert peak == pytest.approx(form * whole / 8 / virtual, rel=0.05)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "ranks", "stages"),
    [
        *[(name, ranks, 1) for name in ("zb-h1", "zb-h2") for ranks in (2, 4)],
        *[(name, ranks, 2) for name in ("zb-v", "dualpipe-v") for ranks in (2, 4)],
    ],
)
def test_a_split_backward_holds_no_more_than_its_schedule_says(name, ranks, stages):
    # Less: between the backward for inputs and that for weights only what the latter reads is held.
    forms, once, found = measured(name, ranks, 1)
    for peak, form, whole in zip(found, forms, once, strict=True):
        assert 0.6 * form * whole / 8 / stages < peak < 1.05 * form * whole / 8 / stages


def measured(name: str, ranks: int, virtual: int) -> tuple[tuple[int, ...], ...]:
    """Of each rank: micro-batches alive at once; bytes held of all samples as one; bytes held."""
    how = f"pipeline={ranks},schedule={name},virtual={virtual}"
    forms = check(schedule_of(name, ranks, 8, virtual)).peaks
    return forms, peaks(f"{how},microbatches=1"), peaks(f"{how},microbatches=8")
