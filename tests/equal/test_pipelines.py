"""Pipelines equal one device: `make test` runs a sample of the matrix, `make matrix` every cell."""

from __future__ import annotations

from functools import cache

import pytest

from tests.equal.harness import Case, assert_equal
from tests.equal.piped import CHEAP, FEW, MODELS, pairs, piped, sampled
from tests.equal.pipelines import PIPELINES
from tests.equal.tables import PIPED

STEPS = 2
CELLS = {str(cell): cell for cell in piped()}
QUICK = sampled([cell for cell in piped() if cell.model in CHEAP])
SAMPLE = (*QUICK, *(CELLS[name] for name in FEW))


@cache
def _case(model, microbatches):
    return Case(PIPELINES[model](microbatches))


def case(model, microbatches=1):
    """A model's case, made once; batch norm's samples follow the micro-batches."""
    return _case(model, microbatches if model == "resnet" else 1)


def equals(cell):
    report = case(cell.model, cell.microbatches).verify(cell.plan, STEPS)
    assert_equal(report)
    return report


@pytest.mark.parametrize("cell", SAMPLE, ids=str)
def test_a_pipeline_equals_one_device(cell):
    equals(cell)


@pytest.mark.matrix
@pytest.mark.parametrize("cell", piped(), ids=str)
def test_every_pipeline_equals_one_device(record, cell):
    place = (cell.row, cell.beside, cell.microbatches)
    record.once(PIPED[cell.model], place, lambda: equals(cell))


def test_the_sample_meets_every_pair():
    cheap = [cell for cell in piped() if cell.model in CHEAP]
    assert set().union(*map(pairs, QUICK)) == set().union(*map(pairs, cheap))
    assert len(QUICK) < len(cheap) / 20
    assert {cell.model for cell in SAMPLE} == set(MODELS)


def test_the_page_has_a_place_for_every_cell():
    for model in MODELS:
        mine = {(c.row, c.beside, c.microbatches) for c in piped() if c.model == model}
        assert mine == set(PIPED[model].cells)
