"""The mesh and a block as text, at any width."""

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from meshwright.view.accounts import parse_block
from meshwright.view.picture import block_text, mesh_text
from meshwright.view.runfile import parse_setup
from tests.view.runs import accounts_record


def printed(drawn: RenderableType, width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(drawn)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def meshed(**axes: int) -> Any:
    names, ranks = list(axes), [{}]
    for name, size in axes.items():
        ranks = [{**rank, name: k} for rank in ranks for k in range(size)]
    return parse_setup(
        {
            "mesh": {
                "axes": [[name, axes[name]] for name in names],
                "ranks": [{"rank": k, "coordinates": at} for k, at in enumerate(ranks)],
            }
        }
    )


def test_two_axes_are_a_grid_the_last_one_across() -> None:
    assert printed(mesh_text(meshed(data=2, tensor=3))) == [
        "mesh    tensor 0  tensor 1  tensor 2",
        "data 0  rank 0    rank 1    rank 2",
        "data 1  rank 3    rank 4    rank 5",
    ]


def test_one_axis_is_a_row_and_axes_of_one_rank_are_left_out() -> None:
    row = ["mesh  tensor 0  tensor 1", "      rank 0    rank 1"]
    assert printed(mesh_text(meshed(tensor=2))) == row
    assert printed(mesh_text(meshed(data=1, tensor=2))) == row


def test_a_third_axis_repeats_the_grid() -> None:
    lines = printed(mesh_text(meshed(data=2, context=2, tensor=2)))
    assert [line.split("  ")[0] for line in lines] == [
        "data 0", "context 0", "context 1", "data 1", "context 0", "context 1",
    ]  # fmt: skip
    assert lines[-1].split()[-1] == "7"


@pytest.mark.parametrize(
    "axes", [{"data": 64}, {"data": 40, "tensor": 12}, {"data": 9, "context": 2, "tensor": 2}]
)
def test_large_meshes_are_cut_and_say_so(axes: dict[str, int]) -> None:
    lines = printed(mesh_text(meshed(**axes)), 120)
    assert len(lines) < 30
    assert "in all" in "".join(lines) or "more such parts" in lines[-1]


def test_a_block_shows_modules_in_order_and_what_goes_between() -> None:
    lines = printed(block_text(parse_block(accounts_record()["block"])))
    assert lines == [
        "blocks.*, one of 3 alike",
        "module  reads            makes",
        "  ↓ all_reduce over tensor, 32.0 KiB, partial → whole, exposed",
        "norm    64               8 × 16 × 64",
        "  ↑ all_reduce over tensor, 32.0 KiB, partial → whole, overlapped",
        "up      256/tensor × 64  8 × 16 × 256/tensor, partial over tensor",
        "  ↑ all_gather over data, 32.0 KiB, for weights, overlapped",
    ]


def test_where_there_is_no_room_columns_are_given_up() -> None:
    lines = printed(block_text(parse_block(accounts_record()["block"]), 2), 60)
    assert lines[0] == "blocks.*, one of 3 alike; a micro-batch of 2"
    assert "norm    64 → 8 × 16 × 64" in lines
    assert all(len(line) <= 60 for line in lines)


def test_names_are_only_text() -> None:
    record = accounts_record()["block"]
    record["name"] = record["stations"][0]["module"] = "[bold]x[/]"
    assert "[bold]x[/]" in "\n".join(printed(block_text(parse_block(record))))
