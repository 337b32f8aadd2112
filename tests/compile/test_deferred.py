"""GPipe's deferred batch norm: statistics of the whole batch, moved once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.compile.deferred import DeferredBatchNorm
from meshwright.errors import PlanError, UsageError
from tests.equal.harness import Case, assert_equal
from tests.equal.pipelines import NORMED, ResNet, resnet

MICROS = 4


def images(seed, samples=12):
    return torch.randn(samples, 3, 5, generator=torch.Generator().manual_seed(seed)).double() + 7


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (4, 2, 5, 1), (12,)])
def test_a_batch_in_parts_moves_the_statistics_as_the_whole_batch_does(sizes, momentum):
    whole = nn.BatchNorm1d(3, momentum=momentum).double()
    parts = mw.deferred_batch_norm(nn.BatchNorm1d(3, momentum=momentum).double(), len(sizes))
    for step in range(3):
        batch = images(step)
        whole(batch)
        before = parts.running_mean.clone()
        for k, part in enumerate(batch.split(sizes)):
            own = nn.BatchNorm1d(3).double()(part)
            assert torch.equal(parts.running_mean, before)
            torch.testing.assert_close(parts(part), own, rtol=0, atol=1e-13)
            assert int(parts.seen) == (k + 1) % len(sizes)
        for name, held in whole.named_buffers():
            torch.testing.assert_close(parts.get_buffer(name), held, rtol=1e-12, atol=0)
    x = images(9)
    torch.testing.assert_close(parts.eval()(x), whole.eval()(x), rtol=1e-12, atol=1e-12)


def test_large_means_do_not_cancel():
    norm = mw.deferred_batch_norm(nn.BatchNorm1d(1), 2)
    norm.running_mean += 1e4
    batch = 1e4 + torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    for part in batch.split(32):
        norm(part)
    true = 0.9 + 0.1 * float(batch.double().var())
    assert abs(float(norm.running_var) - true) < 1e-5


def test_only_norms_with_statistics_are_replaced_and_a_shared_one_stays_shared():
    shared, bare = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(shared, nn.Sequential(shared, bare), nn.LayerNorm(4))
    mine = dict(model.named_parameters())
    made = mw.deferred_batch_norm(model, 2)
    assert made is model
    assert isinstance(model[0], DeferredBatchNorm)
    assert model[0] is model[1][0]
    assert model[1][1] is bare
    assert dict(model.named_parameters()) == mine
    assert mw.deferred_batch_norm(model, 2)[0] is made[0]


@pytest.mark.parametrize("microbatches", [0, -1, 2.0, True, "2"])
def test_a_wrong_number_of_micro_batches_is_refused(microbatches):
    with pytest.raises(UsageError, match=r"needs a whole number of 1 or more"):
        mw.deferred_batch_norm(nn.BatchNorm1d(3), microbatches)


def deferred(microbatches, said=None):
    job = resnet(microbatches)
    return replace(job, model=lambda: mw.deferred_batch_norm(ResNet(), said or microbatches))


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param("data=2", marks=pytest.mark.matrix),
        "zero3,data=2",
        pytest.param("data=1,pipeline=2,schedule=1f1b", marks=pytest.mark.matrix),
        "data=2,pipeline=2,schedule=zb-h1",
        pytest.param("data=1,pipeline=2,schedule=gpipe,remat=full", marks=pytest.mark.matrix),
    ],
)
def test_deferred_statistics_equal_one_device_under_every_plan(plan):
    assert NORMED % MICROS == 0
    assert_equal(Case(deferred(MICROS)).verify(f"{plan},microbatches={MICROS}", 3))


def test_statistics_that_wait_for_another_number_of_micro_batches_are_refused():
    with pytest.raises(PlanError, match=r"over 3 micro-batches, but a batch has microbatches=4"):
        Case(deferred(MICROS, said=3)).verify(f"data=1,pipeline=2,microbatches={MICROS}", 1)
