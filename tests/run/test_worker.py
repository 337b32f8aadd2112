"""One rank's steps: looking ahead, shapes that differ, the state that ranks begin with."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from meshwright.errors import UserCodeError
from meshwright.run.part import part_of
from tests.run.jobs import Net, Points, alone, fresh, job, losses, mean_loss, on_ranks, step


class Breaking(Points):
    """One sample cannot be read."""

    def __init__(self, broken):
        super().__init__(48)
        self.broken = broken

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError("unreadable")
        return super().__getitem__(index)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("plan", ["data=1", "data=2", "zero3,data=3"])
def test_a_sample_that_cannot_be_read_fails_the_step_that_needs_it(plan, eager):
    if eager and "zero" in plan:
        plan = "data=3"
    bad, data = 2, Points(48)
    rows = alone(job(data=lambda: data)).worker.source.fetch(bad, 0, 12, (0, 12)).tree["x"]
    broken = next(k for k in range(48) if torch.equal(data.x[k], rows[-1]))
    made, ranks = job(data=lambda: Breaking(broken)), int(plan[-1])
    done: dict[int, int] = {}

    def body(session):
        for _ in range(4):
            step(session)
            done[session.worker.rank] = session.step

    with pytest.raises(UserCodeError, match=r"raised OSError.*unreadable"):
        on_ranks(made, plan, body, eager=eager)
    assert done == dict.fromkeys(range(ranks), bad)


class Sentences(Points):
    """Vectors in a row of 1 to 5, so that padding depends on who collates."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample | {"x": sample["x"].expand(1 + index % 5, 8) * 1.0}


def padded(samples):
    return {
        "x": pad_sequence([s["x"] for s in samples], batch_first=True),
        "y": torch.stack([s["y"] for s in samples]),
    }


def summed_loss(model, batch):
    return mean_loss(lambda x: model(x).sum(1), batch)


@pytest.mark.parametrize("plan", ["data=3", "data=2,microbatches=2"])
def test_shapes_that_differ_between_ranks_are_padded_alike(plan):
    made = job(data=Sentences, collate=padded, loss=summed_loss)
    want = losses(alone(made, f"data=1,microbatches={2 if 'micro' in plan else 1}"), 4)

    def body(session):
        return losses(session, 4), list(session.notes)

    for seen, notes in on_ranks(made, plan, body):
        assert seen == pytest.approx(want, rel=1e-5)
        assert sum("collates the whole micro-batch" in note for note in notes) == 1


def test_data_that_depends_on_the_rank_is_refused():
    """Not the padding: the samples themselves are of other shapes on other ranks."""
    ranks = iter(range(9))

    def data():
        width = 8 + next(ranks)

        class Wide(Points):
            def __getitem__(self, index):
                return super().__getitem__(index) | {"x": torch.zeros(width)}

        return Wide()

    with pytest.raises(UserCodeError, match=r"step 1 even when each collates all of it"):
        on_ranks(job(data=data), "data=2", lambda s: losses(s, 1))


@pytest.mark.parametrize("plan", ["data=2", "zero1,data=3", "zero3,data=3"])
def test_ranks_begin_with_parts_of_the_same_weights(plan):
    made = job(model=lambda: Net(nn.BatchNorm1d(40)))
    want = {**dict(fresh(made).named_parameters())}

    def body(session):
        worker, build = session.worker, session.build
        for name, tensor in want.items():
            layout, place = build.states[name].weights, worker.place
            part = part_of(tensor.detach(), layout, build.axes, place.coordinates)
            assert torch.equal(worker.state.values[f"model/{name}"], part)
        held = sum(worker.state.values[f"model/{n}"].numel() for n in want)
        slots = sum(shard.numel() for shard in worker.state.shards.values())
        return held, slots

    found = on_ranks(made, plan, body)
    total = sum(t.numel() for t in want.values())
    assert all(held == (total if "zero3" not in plan else slots) for held, slots in found)
    assert all((slots < total) == ("zero" in plan) for _, slots in found)


def test_the_optimizer_steps_on_views_of_the_weights():
    """Where weights are whole, a rank's shard is a part of them, not a copy."""
    session = alone(job())
    values = session.worker.state.values
    for name, shard in session.worker.state.shards.items():
        assert shard.data_ptr() == values[f"model/{name}"].data_ptr()
