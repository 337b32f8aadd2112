"""Collectives added up."""

from meshwright.view.runfile import parse_setup
from meshwright.view.traffic import phases
from tests.view.runs import run_record


def test_nothing_is_lost_and_phases_and_rows_are_in_order() -> None:
    setup = parse_setup(run_record(4, 3))
    found = phases(setup.collectives)
    assert [phase.name for phase in found] == ["forward", "backward", "finish"]
    assert sum(phase.bytes for phase in found) == sum(c.bytes for c in setup.collectives)
    assert sum(phase.count for phase in found) == sum(c.count for c in setup.collectives)
    for phase in found:
        sizes = [row.bytes for row in phase.rows]
        assert sizes == sorted(sizes, reverse=True)


def test_layers_share_a_row_and_different_operations_do_not() -> None:
    backward = phases(parse_setup(run_record(4, 3)).collectives)[1]
    rows = [row for row in backward.rows if row.modules == "blocks.0–7.mlp.up"]
    assert [(row.op, row.count) for row in rows] == [("all_gather", 8), ("reduce_scatter", 8)]


def test_an_unknown_phase_comes_last() -> None:
    run = run_record(2, 0)
    run["collectives"].insert(
        0, {"op": "permute", "axis": "pipeline", "bytes": 1, "phase": "drain"}
    )
    assert phases(parse_setup(run).collectives)[-1].name == "drain"


def test_a_rank_alone_moves_nothing() -> None:
    assert phases(parse_setup(run_record(1)).collectives) == ()
