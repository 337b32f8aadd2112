"""A block as a picture."""

from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given

from meshwright.view.accounts import parse_block
from meshwright.view.chart.block import block_picture
from meshwright.view.svg import NARROW, WIDE
from tests.view.runs import accounts_record
from tests.view.test_report import HOSTILE, JSON

SVG = "{http://www.w3.org/2000/svg}"


def drawn(record: Any, width: int = WIDE) -> ET.Element:
    return ET.fromstring(block_picture(parse_block(record), width))


def texts(picture: ET.Element) -> list[str]:
    return ["".join(text.itertext()) for text in picture.iter(f"{SVG}text")]


def test_boxes_and_collectives_come_from_top_to_bottom() -> None:
    picture = drawn(accounts_record()["block"])
    assert texts(picture) == [
        "↓ all_reduce over tensor · 32.0 KiB · partial → whole · exposed",
        "norm", "64", "8 × 16 × 64",
        "↑ all_reduce over tensor · 32.0 KiB · partial → whole · overlapped",
        "up", "256/tensor × 64", "8 × 16 × 256/tensor, partial over tensor",
        "↑ all_gather over data · 32.0 KiB · for weights · overlapped",
    ]  # fmt: skip
    tops = [
        float(g.get("transform", "").split()[1].rstrip(")")) for g in picture.findall(f"{SVG}g")
    ]
    assert tops == sorted(tops)
    assert tops[-1] < float(picture.get("height", "0"))


def test_what_is_exposed_is_filled_and_what_is_split_is_bold() -> None:
    picture = drawn(accounts_record()["block"])
    classes = [rect.get("class") for rect in picture.iter(f"{SVG}rect")]
    assert classes == ["exposed", "card", "beside", "card", "beside"]
    bold = [t.text for t in picture.iter(f"{SVG}tspan") if t.get("class") == "strong"]
    assert bold == ["256/tensor", "256/tensor"]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_is_wider_than_the_picture(width: int) -> None:
    record = accounts_record()["block"]
    record["stations"][0]["module"] = "a.very." + "long." * 30 + "name"
    record["stations"][0]["before"][0]["axis"] = "x" * 200
    picture = drawn(record, width)
    for rect in picture.iter(f"{SVG}rect"):
        assert float(rect.get("x", "0")) + float(rect.get("width", "0")) <= width
    assert all(len(text) < width / 5 for text in texts(picture) if text.endswith("…"))


def test_a_long_block_is_cut() -> None:
    record = accounts_record()["block"]
    record["stations"] = record["stations"] * 100
    assert len([t for t in texts(drawn(record)) if t == "norm"]) == 20


def test_names_are_only_text() -> None:
    record = accounts_record()["block"]
    record["name"] = record["stations"][0]["module"] = record["stations"][0]["source"] = HOSTILE
    picture = drawn(record)
    assert not list(picture.iter("script"))
    assert HOSTILE in picture.get("aria-label", "")


@given(JSON)
def test_any_json_is_some_picture(value: Any) -> None:
    entry = {"weights": [["w", value]], "dims": value, "owes": value, "before": value}
    assert block_picture(parse_block({"stations": [entry]}), WIDE).startswith("<svg ")
