"""The timeline of a traced step, read back as XML."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from meshwright.view.chart.timeline import KINDS, MOST_RANKS, timeline, typical_step
from meshwright.view.parts import read_parts
from meshwright.view.svg import NARROW, WIDE
from tests.view.traces import RUN, START, WAIT, written

SVG = "{http://www.w3.org/2000/svg}"
FORWARD, BACKWARD = RUN | {"phase": "forward"}, RUN | {"phase": "backward", "name": "backward"}
UPDATE = {"kind": "Update", "name": "optimizer"}
BODY = [FORWARD, START, BACKWARD, WAIT, UPDATE]


def steps(*starts, late=0.0):
    """Steps of a second each: forward 0.3, backward 0.4, waiting 0.2, update 0.1."""
    return [
        (number, [at + late, at + 0.3, at + 0.301, at + 0.7, at + 0.9, at + 1.0])
        for number, at in enumerate(starts, 3)
    ]


def blocks(drawing, class_):
    found = [el for el in ET.fromstring(drawing).iter(f"{SVG}rect") if el.get("class") == class_]
    return [(float(el.attrib["x"]), float(el.attrib["width"])) for el in found]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_widths_are_times_and_ranks_are_on_one_clock(width, tmp_path):
    written(tmp_path, 0, BODY, *steps(0.0))
    written(tmp_path, 1, BODY, *steps(500.0, late=0.1), ahead=500.0)
    drawing = timeline(read_parts(tmp_path), 3, width)
    second = width - 56
    (left, long), (late, short) = blocks(drawing, "part-forward")
    assert (left, late) == (pytest.approx(52), pytest.approx(52 + 0.1 * second, abs=0.1))
    assert (long, short) == pytest.approx((0.3 * second, 0.2 * second), abs=0.6)
    for _, wide in blocks(drawing, "part-compute"):
        assert wide == pytest.approx(0.399 * second, abs=0.6)
    for at, wide in blocks(drawing, "under-way"):  # from the Start to the end of the Wait
        assert (at, wide) == pytest.approx((52 + 0.3 * second, 0.6 * second), abs=0.6)
    drawn = {el.get("class") for el in ET.fromstring(drawing).iter(f"{SVG}rect")}
    assert drawn <= {class_ for _, class_ in KINDS} | {"track", "part-other"}


def test_slices_too_narrow_to_be_seen_share_a_block(tmp_path):
    body = [FORWARD, *[{"kind": "Free", "name": "free"}] * 500, BACKWARD]
    stamps = [0.0, 0.4, *(0.4 + 1e-6 * k for k in range(1, 501)), 1.0]
    written(tmp_path, 0, body, (3, stamps))
    drawing = timeline(read_parts(tmp_path), 3, WIDE)
    assert len(ET.fromstring(drawing).findall(f".//{SVG}rect")) <= 4  # the track is one
    assert "free and 499 more" in drawing


def test_the_typical_step_is_of_median_length_and_whole_on_all_ranks(tmp_path):
    written(tmp_path, 0, [RUN], (3, [0.0, 5.0]), (4, [5.0, 6.0]), (5, [6.0, 8.0]), (6, [8.0, 9.5]))
    assert typical_step(read_parts(tmp_path)) == 6
    written(tmp_path, 1, [RUN], (3, [0.0, 5.0]), (4, [5.0, 6.0]))
    assert typical_step(read_parts(tmp_path)) == 4
    written(tmp_path, 2, [RUN])
    assert typical_step(read_parts(tmp_path)) == 0
    assert typical_step([]) == 0


def test_of_many_ranks_the_first_are_drawn(tmp_path):
    for rank in range(MOST_RANKS + 3):
        written(tmp_path, rank, BODY, *steps(0.0))
    drawing = timeline(read_parts(tmp_path), 3, WIDE)
    assert len(blocks(drawing, "part-forward")) == MOST_RANKS
