"""What a run says it moves, read from any JSON."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshwright.view.accounts import alike, parse_block, parse_conflict, parse_fallback
from tests.view.runs import accounts_record
from tests.view.test_report import JSON


def test_layers_that_lose_alike_are_one_and_no_byte_is_lost() -> None:
    record = accounts_record()
    for found in (
        [parse_fallback(entry) for entry in record["fallbacks"]],
        [parse_conflict(entry) for entry in record["conflicts"]],
    ):
        (one,) = alike(found)  # type: ignore[type-var]
        assert one.module == "blocks.*.scan"
        assert one.bytes == sum(entry.bytes for entry in found)
        assert one.count == sum(entry.count for entry in found)


def test_a_block_is_read_whole() -> None:
    block = parse_block(accounts_record()["block"])
    assert (block.name, block.count) == ("blocks.*", 3)
    norm, up = block.stations
    assert norm.before[0].op == "all_reduce"
    assert norm.before[0].exposed == 1
    assert up.weights == (("weight", ("256/tensor", "64")),)
    assert (up.dims, up.owes) == (("8", "16", "256/tensor"), ("tensor",))


@given(JSON)
def test_any_json_is_some_block(value: Any) -> None:
    entry = {"weights": [value], "dims": value, "before": value}
    assert isinstance(parse_block(value).stations, tuple)
    (station,) = parse_block({"stations": [entry, "no station"]}).stations
    assert all(isinstance(dim, str) for dim in station.dims)


@given(st.dictionaries(st.sampled_from(["op", "bytes", "count", "module"]), JSON))
def test_any_entry_is_some_loss(entry: dict[str, Any]) -> None:
    assert isinstance(parse_fallback(entry).bytes, int)
    assert isinstance(parse_conflict(entry).count, int)
