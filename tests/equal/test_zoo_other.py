"""Vision, convolution and audio families equal one device under data, tensor and ZeRO plans."""

from __future__ import annotations

from functools import cache

import pytest

from meshwright.errors import PlanError
from meshwright.run.form import first_micros
from tests.equal.harness import Case, assert_equal, unruled
from tests.equal.record import REFUSED
from tests.equal.tables import OTHER, with_micros
from tests.equal.zoo_other import BATCH_NORMED, OTHERS

SPACE = ("context=2", "context=3", "data=2,context=2", "zero3,data=2,context=2,tensor=2")

SAMPLE = (
    ("swin", "tensor=2", 1),
    ("beit", "zero3,data=4,shard=2", 3),
    ("convnext", "data=2,tensor=2", 1),
    ("resnet", "tensor=2", 1),
    ("regnet", "zero3,data=2,tensor=2", 1),
    ("segformer", "data=2,tensor=2", 1),
    ("whisper", "tensor=2", 3),
    ("wav2vec2", "data=2,tensor=2", 1),
    ("clip", "zero3,data=2,tensor=2", 3),
    ("unet", "tensor=2", 1),
)
"""Every plan and most families once; `make matrix` runs all."""


@cache
def case(name):
    return Case(OTHERS[name]())


def check(name, plan, microbatches, steps):
    text = with_micros(plan, microbatches)
    if name in BATCH_NORMED and microbatches > 1:
        with pytest.raises(PlanError, match=r"batch norm.*microbatches="):
            case(name).verify(text, steps=1)
        return REFUSED
    report = case(name).verify(text, steps=steps)
    assert_equal(report)
    return report


@pytest.mark.parametrize(("name", "plan", "microbatches"), SAMPLE)
def test_a_family_equals_one_device(name, plan, microbatches):
    check(name, plan, microbatches, steps=2)


@pytest.mark.parametrize("name", BATCH_NORMED)
def test_micro_batches_that_would_split_statistics_are_refused(name):
    check(name, "tensor=2", 3, steps=1)


@pytest.mark.parametrize("plan", SPACE)
def test_images_split_in_height_equal_one_device(plan):
    assert_equal(case("field").verify(plan, steps=2))


def test_ranks_that_split_images_exchange_their_edges():
    build = case("field").build("context=2")
    (micro, *_) = first_micros(build, case("field").data)
    ((_, local),) = build.lowered(0, [micro]).compiled.units
    whole = [op for op in local.program.ops if op.name == "comm.all_gather"]
    edges = [op for op in local.program.ops if op.name == "comm.all_to_all"]
    assert whole == []
    assert len(edges) == 6 + 5  # four convolutions and two pools; the images have no gradient


@pytest.mark.matrix
@pytest.mark.parametrize("cell", OTHER.cells, ids=str)
def test_every_family_equals_one_device(record, cell):
    record.once(OTHER, cell, lambda: check(*cell, steps=3))


@pytest.mark.matrix
@pytest.mark.parametrize("name", OTHERS)
def test_every_op_of_a_family_has_a_rule(name):
    assert unruled(case(name), "data=2") == set()
