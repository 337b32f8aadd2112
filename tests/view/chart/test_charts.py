"""The report's pictures, read back as XML."""

import json
import math
from xml.etree import ElementTree as ET

import pytest

from meshwright.view.chart.gauge import error_gauge
from meshwright.view.chart.loss import loss_chart
from meshwright.view.chart.memory import equal_bills, memory_chart
from meshwright.view.chart.mesh import mesh_picture
from meshwright.view.chart.tape import layout_tape
from meshwright.view.chart.time import mean_time, time_chart
from meshwright.view.history import History, parse_history
from meshwright.view.runfile import parse_setup
from meshwright.view.svg import NARROW, WIDE
from tests.view.runs import metric_lines, run_record

SVG = "{http://www.w3.org/2000/svg}"


def history(steps: int, every: int = 50) -> History:
    return parse_history(json.dumps(line) for line in metric_lines(steps, every))


def parsed(drawing: str) -> ET.Element:
    return ET.fromstring(drawing)


def classes(drawing: ET.Element, name: str) -> list[ET.Element]:
    return [el for el in drawing.iter() if name in el.get("class", "").split()]


def coordinates(line: ET.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("steps", [2, 3, 19, 20, 300, 10_000])
def test_the_loss_stays_within_its_frame_and_within_reason(width: int, steps: int) -> None:
    drawing = parsed(loss_chart(history(steps), width))
    (line,) = classes(drawing, "train")[:1]
    points = coordinates(line)
    assert 2 <= len(points) <= width / 3
    height = float(drawing.attrib["height"])
    for name in ("train", "band", "raw"):
        for drawn in classes(drawing, name):
            if drawn.get("points"):
                assert all(0 <= x <= width and 0 <= y <= height for x, y in coordinates(drawn))
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_a_falling_loss_goes_down_the_page() -> None:
    points = coordinates(classes(parsed(loss_chart(history(1000), WIDE)), "train")[0])
    assert points[0][1] < points[-1][1]


def test_held_out_points_are_all_there() -> None:
    dots = classes(parsed(loss_chart(history(1000, 100), WIDE)), "held-out")
    assert sum(dot.tag == f"{SVG}circle" for dot in dots) == 10


def test_one_step_is_a_dot_and_none_is_no_picture() -> None:
    assert len(classes(parsed(loss_chart(history(1, 0), WIDE)), "dot")) == 1
    assert loss_chart(History(), WIDE) == ""


def test_a_pointer_reads_the_numbers_that_were_logged() -> None:
    logged = history(200, 100)
    readings = json.loads(parsed(loss_chart(logged, WIDE)).attrib["data-hover"])["at"]
    texts = [text for _, text in readings]
    assert any(text.startswith("step 1\nloss 5.") for text in texts)
    assert sum("held-out" in text for text in texts) == 2
    assert [x for x, _ in readings] == sorted(x for x, _ in readings)


def test_the_mean_step_is_made_of_its_parts_and_what_is_left() -> None:
    steps = history(50).steps[1:]
    time = mean_time(steps)
    assert time.total == pytest.approx(sum(step.seconds for step in steps) / len(steps))
    assert dict(time.parts)["other"] == pytest.approx(0.003)


def test_columns_are_as_high_as_their_time() -> None:
    drawing = parsed(time_chart(history(40).steps[1:], WIDE))
    low = {
        float(el.attrib["y"]) + float(el.attrib["height"])
        for el in classes(drawing, "part-compute")
    }
    assert len(low) == 1
    assert len(classes(drawing, "part-communication")) == 39
    assert not classes(drawing, "cut")


def test_a_slow_first_step_is_cut_and_its_true_time_is_written() -> None:
    logged = history(60).steps
    drawing = parsed(time_chart(logged, WIDE))
    assert len(classes(drawing, "cut")) == 1
    assert "step 1 took 2.5" in "".join(drawing.itertext())
    top = min(float(el.attrib["y"]) for el in classes(drawing, "part-compute"))
    assert top >= 26


def test_untimed_steps_have_no_time_chart() -> None:
    assert (
        time_chart(parse_history(['{"step":1,"loss":1}', '{"step":2,"loss":1}']).steps, WIDE) == ""
    )


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8, 16, 17, 64, 300])
def test_every_rank_has_its_place_on_the_page(ranks: int, width: int) -> None:
    setup = parse_setup(run_record(ranks, 3, depth=1, dim=64))
    cards = classes(parsed(mesh_picture(setup, width)), "card")
    boxes = [tuple(float(card.attrib[k]) for k in ("x", "y", "width", "height")) for card in cards]
    assert len(set(boxes)) == min(ranks, 256)
    assert all(x >= 0 and x + w <= width for x, _, w, _ in boxes)


def test_rows_of_the_picture_are_rows_of_the_mesh() -> None:
    run = run_record(8, 0, depth=1)
    run["mesh"]["axes"] = [["data", 2], ["tensor", 4]]
    cards = classes(parsed(mesh_picture(parse_setup(run), WIDE)), "card")
    assert len({card.attrib["y"] for card in cards}) == 2


def test_zero_fills_other_parts_on_each_rank_and_data_all_of_them() -> None:
    def tapes(zero: int) -> list[tuple[str, str]]:
        drawing = parsed(mesh_picture(parse_setup(run_record(4, zero)), WIDE))
        rows = classes(drawing, "part-weights")
        return [(row.attrib["x"], row.attrib["width"]) for row in rows]

    assert len({width for _, width in tapes(0)}) == 1
    assert float(tapes(0)[0][1]) == pytest.approx(4 * float(tapes(3)[0][1]), rel=0.01)


def test_ranks_with_equal_memory_share_a_bar_and_the_neediest_is_first() -> None:
    memory = parse_setup(run_record(8, 3)).memory
    assert [names for names, _ in equal_bills(memory)] == ["rank 0", "ranks 1–7"]
    bars = classes(parsed(memory_chart(memory, WIDE)), "part-optimizer")
    assert len(bars) == 2


def test_a_bar_is_as_long_as_its_bytes() -> None:
    memory = parse_setup(run_record(4, 3)).memory
    drawing = parsed(memory_chart(memory, WIDE))
    widths = [
        float(classes(drawing, f"part-{part}")[0].attrib["width"]) + 1
        for part in ("weights", "saved-activations")
    ]
    parts = dict(memory[0].parts)
    ratio = parts["saved activations"] / parts["weights"]
    assert widths[1] / widths[0] == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("error", [0.0, 1e-300, 1e-15, 1e-10, 1e-3, math.inf])
def test_a_gauge_passes_its_mark_when_the_law_is_broken(error: float) -> None:
    drawing = parsed(error_gauge(error, 1e-10))
    dot = next(el for el in drawing.iter() if el.tag == f"{SVG}circle")
    (law,) = classes(drawing, "law")
    assert (float(dot.attrib["cx"]) > float(law.attrib["x1"])) == (error > 1e-10)
    assert dot.attrib["class"] == ("good" if error <= 1e-10 else "bad")


@pytest.mark.parametrize(
    ("shards", "filled", "boxes"), [(0, 0, 1), (1, 1, 1), (4, 1, 4), (64, 1, 8)]
)
def test_a_tape_fills_one_part(shards: int, filled: int, boxes: int) -> None:
    drawing = parsed(layout_tape("weights", "any", shards))
    assert len(classes(drawing, "part-weights")) == filled
    assert len(list(drawing)) == boxes
