"""The equality matrix: `make test` runs a pairwise sample of it, `make matrix` every cell."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from meshwright.errors import PlanError
from meshwright.run.equality.measure import Report, Worst
from tests.equal.cells import MODELS, cells, pairwise, refused
from tests.equal.harness import Case, assert_equal
from tests.equal.record import REFUSED, Record
from tests.equal.tables import BASE, Table

SAMPLE = pairwise(cells())


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """Model name -> its case, made once."""
    folder = tmp_path_factory.mktemp("matrix")
    return cache(lambda name: Case(MODELS[name](folder)))


def equals(case, cell):
    """The report, or the word `refused` where a check does so."""
    if refused(cell):
        with pytest.raises(PlanError, match=r"(normalize_over|batch norm).*microbatches="):
            case(cell.model).verify(cell.plan, steps=1)
        return REFUSED
    report = case(cell.model).verify(cell.plan)
    assert_equal(report)
    if cell.precision != "float32":
        rounded = case(cell.model).rounded(cell.plan)
        assert rounded["passed"], rounded
    return report


@pytest.mark.parametrize("cell", SAMPLE, ids=str)
def test_a_plan_equals_one_device(case, cell):
    equals(case, cell)


@pytest.mark.matrix
@pytest.mark.parametrize("cell", cells(), ids=str)
def test_every_plan_equals_one_device(case, record, cell):
    plan = replace(cell, microbatches=1).plan
    record.once(BASE, (cell.model, plan, cell.microbatches), lambda: equals(case, cell))


def test_the_sample_meets_every_pair():
    def pairs(some):
        return {
            pair
            for c in some
            for pair in [
                (c.model, c.zero), (c.model, c.microbatches), (c.zero, c.ranks),
                (c.model, c.ranks), (c.microbatches, c.zero), (c.microbatches, -c.ranks),
                (c.model, c.precision), (c.zero, c.precision), (c.microbatches, c.precision),
            ]
        }  # fmt: skip

    assert pairs(SAMPLE) == pairs(cells())
    assert len(SAMPLE) < len(cells()) / 4


def test_results_are_kept_by_tree(tmp_path):
    table = Table("Some", ("gpt", "vit"), ("data=2", "zero1,data=2"))
    report = Report()
    report.worst.update(loss=Worst(1e-16), weights=Worst(3e-12))
    ran = []

    def run():
        ran.append(1)
        return report

    for _ in range(2):
        Record("abc", tmp_path).once(table, ("gpt", "zero1,data=2", 3), run)
    Record("abc", tmp_path).once(table, ("vit", "data=2", 1), lambda: REFUSED)
    page = Record("abc", tmp_path).page((table,))
    assert len(ran) == 1
    assert "| gpt |  | 3e-12 |" in page
    assert "| vit | refused |  |" in page
    assert "2 of 8 cells" in page
    assert "0 of 8 cells" in Record("def", tmp_path).page((table,))


def test_the_page_has_a_place_for_every_cell():
    assert {(c.model, replace(c, microbatches=1).plan, c.microbatches) for c in cells()} == set(
        BASE.cells
    )
