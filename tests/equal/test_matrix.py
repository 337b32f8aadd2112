"""The equality matrix: `make test` runs a pairwise sample of it, `make matrix` every cell."""

from __future__ import annotations

from functools import cache

import pytest

from meshwright.errors import PlanError
from tests.equal.cells import MODELS, Cell, cells, pairwise, refused
from tests.equal.harness import Case, assert_equal
from tests.equal.record import TABLE, Record, commit

SAMPLE = pairwise(cells())


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """Model name -> its case, made once."""
    folder = tmp_path_factory.mktemp("matrix")
    return cache(lambda name: Case(MODELS[name](folder)))


@pytest.fixture(scope="session")
def record():
    """The results so far; the table is written when the last cell of this session is done."""
    kept = Record.read(commit())
    yield kept
    TABLE.write_text(kept.table())


def errors_of(case, cell):
    """Worst error by kind; the word `refused` where a check does."""
    if refused(cell):
        with pytest.raises(PlanError, match=r"(normalize_over|batch norm).*microbatches="):
            case(cell.model).verify(cell.plan, steps=1)
        return "refused"
    report = case(cell.model).verify(cell.plan)
    assert_equal(report)
    if cell.precision != "float32":
        rounded = case(cell.model).rounded(cell.plan)
        assert rounded["passed"], rounded
    return {kind: worst.error for kind, worst in report.worst.items()}


@pytest.mark.parametrize("cell", SAMPLE, ids=str)
def test_a_plan_equals_one_device(case, cell):
    errors_of(case, cell)


@pytest.mark.matrix
@pytest.mark.parametrize("cell", cells(), ids=str)
def test_every_plan_equals_one_device(case, record, cell):
    if str(cell) not in record.found:
        record.put(cell, errors_of(case, cell))


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


def test_results_are_kept_by_commit(tmp_path):
    cell = Cell("gpt", 3, 2, 4)
    Record("abc", tmp_path / "m.json").put(cell, {"loss": 1e-16, "weights": 3e-12})
    again = Record.read("abc", tmp_path / "m.json")
    assert again.found[str(cell)]["weights"] == 3e-12
    assert "| 3e-12 |" in again.table()
    assert Record.read("def", tmp_path / "m.json").found == {}
