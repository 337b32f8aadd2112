"""From a job and a plan to what ranks run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meshwright.compile.example import example_of
from meshwright.errors import PlanError
from meshwright.plan.plan import Plan
from meshwright.run.build import Micro, has_batch_norm, mesh_of, micro_ranges
from meshwright.run.prepare import prepare
from tests.run.jobs import Net, job


def test_micro_batches_cover_the_batch_and_differ_by_one_at_most():
    assert micro_ranges(12, 1) == ((0, 12),)
    assert micro_ranges(12, 5) == ((0, 3), (3, 6), (6, 8), (8, 10), (10, 12))
    for samples in range(1, 30):
        for parts in range(1, samples + 1):
            found = micro_ranges(samples, parts)
            assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
            assert found[-1][1] == samples
            sizes = {b - a for a, b in found}
            assert max(sizes) - min(sizes) <= 1


def test_ranks_samples_cover_each_micro_batch():
    build = prepare(job(batch_size=11), Plan.parse("data=3,microbatches=2"), 3)
    for range_ in micro_ranges(11, 2):
        parts = [build.samples_of(rank, range_) for rank in range(3)]
        assert [a for a, _ in parts] == [range_[0], *(b for _, b in parts[:-1])]
        assert parts[-1][1] == range_[1]
    assert [build.samples_of(rank, (0, 2)) for rank in range(3)] == [(0, 2)] * 3


def form(samples=12, width=8, text="a"):
    tree = {
        "x": torch.zeros(samples, width),
        "y": torch.zeros(samples).long(),
        "t": [text] * samples,
    }
    return Micro(example_of(tree)[0], samples)


def test_equal_forms_are_traced_and_lowered_once():
    build = prepare(job(), Plan.parse("data=2,microbatches=2"), 2)
    one, two = form(6), form(6, text="b")
    assert build.unit(one) is build.unit(two)
    first = build.lowered(0, [one, two])
    assert build.lowered(0, [two, one]) is first
    assert build.lowered(1, [one, two]) is not first
    assert build.unit(one, training=False) is not build.unit(one)
    assert build.unit(form(5)) is not build.unit(one)


def test_functions_are_told_apart_by_what_they_are():
    build = prepare(job(), Plan.parse("data=1"), 1)

    class Doubled:
        __hash__ = None

        def __call__(self, model, batch):
            return model(batch["x"]).mean() * 2

        def __eq__(self, other):
            return True

    class Method:
        def loss(self, model, batch):
            return model(batch["x"]).mean()

    odd, plain = Doubled(), Method()
    assert build.unit(form(), odd) is build.unit(form(), odd)
    assert build.unit(form(), odd) is not build.unit(form(), Doubled())
    assert build.unit(form(), plain.loss) is build.unit(form(), plain.loss)
    assert build.unit(form(), plain.loss) is not build.unit(form(), Method().loss)


@pytest.mark.parametrize(
    ("text", "ranks", "told"),
    [
        ("data=3", 2, "plan asks for data=3 = 3 ranks, but the world has 2"),
        ("data=2,microbatches=7", 2, "microbatches=7 splits batch_size=12"),
        ("data=1,microbatches=13", 1, "microbatches=13 splits batch_size=12"),
    ],
)
def test_plans_that_do_not_fit_are_refused_before_anything_is_built(text, ranks, told):
    built = []
    made = job(model=lambda: built.append(1) or Net())
    with pytest.raises(PlanError, match=told):
        prepare(made, Plan.parse(text), ranks)
    assert not built


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_batch_norm_fixes_the_micro_batch(norm):
    made = job(model=lambda: Net(norm(40)))
    assert has_batch_norm(made.model())
    with pytest.raises(PlanError, match=r"whole batch_size=12.*use microbatches=1"):
        prepare(made, Plan.parse("data=1,microbatches=2"), 1)
    fixed = job(model=lambda: Net(norm(40)), normalize_over=6)
    assert prepare(fixed, Plan.parse("data=1,microbatches=2"), 1).plan.microbatches == 2
    with pytest.raises(PlanError, match=r"normalize_over=6.*use microbatches=2"):
        prepare(fixed, Plan.parse("data=1"), 1)
    assert not has_batch_norm(Net(nn.LayerNorm(40)))


def test_places_are_those_of_the_mesh():
    build = prepare(job(), Plan.parse("data=4"), 4)
    assert mesh_of(build.plan).size == 4
    for rank in range(4):
        place = build.place(rank)
        assert place.coordinates["data"] == rank
        assert place.groups["data"].ranks == (0, 1, 2, 3)
        assert place.groups["world"] is place.groups["data"]
        others = [group for name, group in place.groups.items() if name not in ("data", "world")]
        assert all(len(group.ranks) == 1 for group in others)


def test_what_stays_still_has_no_state_to_shard():
    """Frozen, or not the optimizer's: ZeRO-1 and 2 leave it whole, ZeRO-3 shards it."""

    def model():
        net = Net(nn.Linear(40, 40))
        net.middle.requires_grad_(False)
        return net

    made = job(model=model, optimizer=lambda m: torch.optim.SGD(m.down.parameters(), lr=0.1))
    for zero in (1, 2, 3):
        build = prepare(made, Plan.parse(f"zero{zero},data=2"), 2)
        for name in ("up.weight", "middle.weight"):
            states = build.states[name]
            assert bool(states.optimizer.placements) == (zero == 3)
            assert states.optimizer == states.weights
