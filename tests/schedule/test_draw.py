"""The SVG picture: a box for each action where its time is, bubbles hatched, nothing unescaped."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from meshwright.schedule.draw import svg
from meshwright.schedule.named import schedule_of
from meshwright.schedule.simulate import timeline, uniform

SVG = "{http://www.w3.org/2000/svg}"


def drawn(name, ranks, microbatches, virtual=1, **options):
    schedule = schedule_of(name, ranks, microbatches, virtual)
    spans = timeline(schedule, uniform(schedule.stages, transfer=0.25))
    return spans, ET.fromstring(svg(spans, **options))


def boxes(root, kinds="FBIW"):
    """Boxes of actions; those of the legend have round corners."""
    rects = root.iter(f"{SVG}rect")
    return [r for r in rects if r.get("class") in tuple(kinds) and not r.get("rx")]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-v", "dualpipe-v", "fill-drain"])
def test_every_action_has_its_box(name):
    spans, root = drawn(name, 3, 6)
    found = boxes(root)
    assert len(found) == len(spans)
    scale = (920 - 60 - 14) / max(span.end for span in spans)
    for span, box in zip(spans, found, strict=True):
        assert box.get("class") == span.action.kind
        assert float(box.get("x")) == pytest.approx(60 + span.begin * scale, abs=0.01)
        assert float(box.get("width")) == pytest.approx((span.end - span.begin) * scale, abs=0.01)
        assert box.find(f"{SVG}title").text.startswith(f"{span.action}: ")


def test_each_rank_lies_on_hatching_and_the_legend_says_how_much_is_bubble():
    _, root = drawn("1f1b", 4, 8)
    hatched = [r for r in root.iter(f"{SVG}rect") if r.get("fill") == "url(#bubble)"]
    assert len(hatched) == 4 + 1
    assert any(text.text.startswith("bubble, ") for text in root.iter(f"{SVG}text"))
    assert root.get("aria-label").startswith("timeline of 4 ranks, ")


def test_boxes_too_narrow_for_their_number_have_none():
    def numbers(width):
        _, root = drawn("gpipe", 2, 40, width=width)
        return sum(text.get("class") == "number" for text in root.iter(f"{SVG}text"))

    assert numbers(3000) == 160
    assert numbers(200) == 0


def test_chunks_get_paler():
    _, root = drawn("interleaved", 2, 4, 2)
    assert len({box.get("fill-opacity") for box in boxes(root, "F")}) == 2


def test_the_axis_has_its_unit():
    _, root = drawn("gpipe", 2, 4, unit=" <ms>")
    ticks = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "tick"]
    assert ticks[0] == "0 <ms>"
    assert 2 < len(ticks) <= 11
