"""A traced step of a pipeline against its schedule: read off the trace, and drawn."""

from __future__ import annotations

import pytest

from meshwright.schedule.named import schedule_of
from meshwright.schedule.simulate import account, timeline, uniform
from meshwright.view.chart.pipeline import kinds_of, pipeline
from meshwright.view.findings import pipeline_finding
from meshwright.view.parts import read_parts
from meshwright.view.pipelined import action_of, pipelined
from tests.view.traces import RUN, WAIT, written


def traced(folder, name, late=0.0, virtual=1, ranks=2, lost=0):
    """Parts of a step of 4 micro-batches whose actions take what `uniform` says, or begin late."""
    schedule = schedule_of(name, ranks, 4, virtual)
    spans = timeline(schedule, uniform(schedule.stages))
    for rank in range(ranks):
        stamps, told = [1.0], []
        for span in (span for span in spans if span.rank == rank):
            told += [WAIT | {"pending": f"~{span.action}"}, RUN | {"action": str(span.action)}]
            stamps += [1.0 + span.begin + late, 1.0 + span.end + late]
        cut = len(told) - lost
        written(folder, rank, told[:cut], (3, stamps[: cut + 1]))
    return spans, read_parts(folder)


@pytest.mark.parametrize(
    ("name", "virtual"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 1)]
)
def test_what_ran_as_its_schedule_says_is_what_is_predicted(tmp_path, name, virtual):
    spans, parts = traced(tmp_path, name, 0.25, virtual)
    found = pipelined(parts, 3)
    assert found.ranks == (0, 1)
    assert found.predicted == spans
    assert found.measured == spans  # from its first action on
    assert pipelined(parts, 2) is None


def test_a_slow_rank_widens_the_measured_bubble_alone(tmp_path):
    traced(tmp_path, "1f1b")
    told = [RUN | {"action": f"1{kind}{k}"} for k in range(4) for kind in "FB"]
    waits = [step for run in told for step in (WAIT, run)]
    # each action of rank 1 begins 3 seconds after the one before it, which took 1 and 2
    times = [at for k in range(8) for at in (2.0 + 3 * k, 3.0 + 3 * k + k % 2)]
    written(tmp_path, 1, waits, (3, [1.0, *times]))
    measured, predicted = pipelined(read_parts(tmp_path), 3).accounts
    assert predicted.fraction == pytest.approx(account(parts_of("1f1b")).fraction)
    assert measured.fraction > predicted.fraction + 0.1


def parts_of(name):
    """The spans of a schedule at equal times."""
    schedule = schedule_of(name, 2, 4)
    return timeline(schedule, uniform(schedule.stages))


def test_data_replicas_are_shown_once_and_what_is_no_whole_schedule_is_not(tmp_path):
    _, parts = traced(tmp_path, "1f1b")
    assert pipelined([*parts, *parts], 3).ranks == (0, 1)
    assert pipelined(parts[1:], 3) is None
    _, cut = traced(tmp_path, "1f1b", lost=2)
    assert pipelined(cut, 3) is None
    assert pipelined([], 0) is None


def test_it_is_drawn_predicted_above_measured_with_bubbles_hatched(tmp_path):
    _, parts = traced(tmp_path, "zb-h1")
    found = pipelined(parts, 3)
    drawn = str(pipeline(found, 920))
    for word in ("rank 0", "rank 1", "predicted", "measured", "1W3", "hatch-920"):
        assert word in drawn
    assert drawn.index("predicted") < drawn.index("measured")
    # a title for each action of both
    assert drawn.count("<title>") == 2 * len(found.measured)
    assert drawn.count('fill="url(#hatch-920)"') == 4
    assert [class_ for _, class_ in kinds_of(found)] == ["action-f", "action-b", "action-w"]
    assert "Ranks stand idle" in pipeline_finding(found)


def test_actions_are_read_as_they_are_written():
    assert str(action_of("12F30")) == "12F30"
    assert action_of("0W1").stage == 0
