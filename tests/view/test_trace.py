"""`trace.json`: a strict reader of the trace-event format takes it, and nothing is missing."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest

from meshwright.errors import StorageError
from meshwright.run.observe.profiler import Profiler
from meshwright.run.observe.window import Steps
from meshwright.view.parts import last_to_start, read_parts, transfers
from meshwright.view.trace import TRACKS, write_trace
from tests.run.jobs import job, on_ranks, step
from tests.view.traces import RUN, START, WAIT, written

MADE = job()
COMMON = {"ph": str, "name": str, "pid": int, "tid": int}
NEEDED = {  # by phase, beside what all have
    "M": {"args": dict},
    "X": {"ts": float, "dur": float, "cat": str, "args": dict},
    "b": {"ts": float, "cat": str, "id": int, "args": dict},
    "e": {"ts": float, "cat": str, "id": int},
    "s": {"ts": float, "cat": str, "id": int},
    "f": {"ts": float, "cat": str, "id": int, "bp": str},
    "C": {"ts": float, "args": dict},
}


def strictly_read(path):
    """The events, by phase; everything that viewers rely on is asserted."""
    whole = json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    found = defaultdict(list)
    for event in whole["traceEvents"]:
        fields = COMMON | NEEDED[event["ph"]]
        assert set(event) == set(fields)
        for name, kind in fields.items():
            assert isinstance(event[name], (int, float) if kind is float else kind), (name, event)
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
        found[event["ph"]].append(event)
    named = {(e["pid"], e["tid"]) for e in found["M"] if e["name"] == "thread_name"}
    slices = defaultdict(list)
    for event in found["X"]:
        assert (event["pid"], event["tid"]) in named
        slices[event["pid"], event["tid"]].append(event)
    for track in slices.values():
        require_nesting(track)
    require_pairs(found["b"], found["e"])
    for begin, end in zip(found["s"], found["f"], strict=True):
        assert (begin["id"], begin["cat"], begin["name"]) == (end["id"], end["cat"], end["name"])
        for arrow, kind in ((begin, "Start"), (end, "Wait")):  # each lies on a slice to bind to
            track = slices[arrow["pid"], arrow["tid"]]
            assert any(
                e["ts"] <= arrow["ts"] <= e["ts"] + e["dur"] and e["cat"] == kind for e in track
            )
    require_pairs(found["s"], found["f"])
    return whole, found


def require_nesting(track):
    """Complete events of one thread lie apart or within each other, to the nanosecond."""
    ends = []
    for event in sorted(track, key=lambda e: (e["ts"], -e["dur"])):
        began, ended = round(event["ts"] * 1000), round((event["ts"] + event["dur"]) * 1000)
        while ends and ends[-1] <= began:
            ends.pop()
        assert not ends or ended <= ends[-1], event
        ends.append(ended)


def require_pairs(begins, ends):
    """Every id begins once, ends once, in time; and no two share one."""
    ended = {event["id"]: event for event in ends}
    assert len(ended) == len(ends) == len(begins) == len({event["id"] for event in begins})
    for event in begins:
        assert ended[event["id"]]["ts"] >= event["ts"]
        assert ended[event["id"]]["pid"] == event["pid"]


def traced(folder, plan, first=1, last=2):
    """A run folder with a trace, and each rank's number of instructions a step."""

    def body(session):
        profiler = Profiler(session, folder, Steps(first, last), write_trace)
        for _ in range(last):
            profiler.before()
            step(session, until=last + 1)
            profiler.after()
        return len(session.worker.lowered(session.take()).compiled.instructions.body)

    return on_ranks(MADE, plan, body)


@pytest.mark.parametrize("plan", ["data=1", "data=2,microbatches=2", "zero3,data=3"])
def test_a_strict_reader_takes_it_and_every_instruction_is_there(plan, tmp_path):
    sizes = traced(tmp_path, plan)
    _, found = strictly_read(tmp_path / "trace.json")
    per_rank = Counter(e["pid"] for e in found["X"] if e["cat"] != "step")
    assert per_rank == {rank: 2 * size for rank, size in enumerate(sizes)}
    steps = [(e["pid"], e["name"]) for e in found["X"] if e["cat"] == "step"]
    assert steps == [(rank, f"step {n}") for rank in range(len(sizes)) for n in (1, 2)]
    starts = Counter(e["cat"] for e in found["X"])["Start"]
    assert len(found["b"]) == len(found["s"]) == starts
    assert len(found["C"]) == 2 * starts
    assert (starts > 0) == (len(sizes) > 1)


def test_ranks_and_tracks_have_names(tmp_path):
    traced(tmp_path, "zero1,data=2")
    _, found = strictly_read(tmp_path / "trace.json")
    names = {e["pid"]: e["args"]["name"] for e in found["M"] if e["name"] == "process_name"}
    assert names == {0: "rank 0 (data=0)", 1: "rank 1 (data=1)"}
    tracks = [e["args"]["name"] for e in found["M"] if e["name"] == "thread_name"]
    assert tuple(tracks) == TRACKS * 2


def test_bytes_under_way_come_back_to_nothing(tmp_path):
    traced(tmp_path, "zero3,data=2")
    _, found = strictly_read(tmp_path / "trace.json")
    for rank in range(2):
        course = [e["args"]["bytes"] for e in found["C"] if e["pid"] == rank]
        assert max(course) > 0
        assert min(course) >= 0
        assert course[-1] == 0


# ── parts of ranks that other clocks measured, or that did not end well ──────────────────────────


def test_clocks_that_differ_are_brought_together(tmp_path):
    body = [RUN, START, WAIT]
    written(tmp_path, 0, body, (3, [10.0, 10.5, 10.6, 10.9]))
    written(tmp_path, 1, body, (3, [1010.1, 1010.7, 1010.8, 1010.9]), ahead=1000.0)
    assert write_trace(tmp_path) == tmp_path / "trace.json"
    whole, found = strictly_read(tmp_path / "trace.json")
    runs = {e["pid"]: e["ts"] for e in found["X"] if e["cat"] == "Run"}
    assert runs == {0: 0.0, 1: pytest.approx(1e5)}
    clocks = whole["otherData"]["clocks"]
    assert [clock["ahead_seconds"] for clock in clocks] == [0.0, 1000.0]
    assert [clock["error_seconds"] for clock in clocks] == [1e-4, 1e-4]
    waits = [e["args"] for e in found["X"] if e["cat"] == "Start"]
    for args in waits:
        assert args["last to start"] == "rank 1"
        assert args["seconds after the first"] == pytest.approx(0.2)


def test_what_began_before_or_ends_after_is_cut_at_the_borders(tmp_path):
    """A gather that a step starts for the next one."""
    body = [WAIT, RUN, START]
    written(tmp_path, 0, body, (3, [0.0, 1.0, 2.0, 2.5]), (4, [3.0, 3.5, 4.0, 4.5]))
    (part,) = read_parts(tmp_path)
    found = [(t.begun and t.begun.step, t.awaited and t.awaited.step) for t in transfers(part)]
    assert found == [(None, 3), (3, 4), (4, None)]
    write_trace(tmp_path)
    _, events = strictly_read(tmp_path / "trace.json")
    spans = [(b["ts"], e["ts"]) for b, e in zip(events["b"], events["e"], strict=True)]
    assert spans == [(0.0, 1e6), (2e6, 3.5e6), (4e6, 4.5e6)]
    assert len(events["s"]) == 1


def test_a_rank_killed_while_it_wrote_leaves_what_came_before(tmp_path):
    body = [RUN, START, WAIT]
    steps = ((3, [0.0, 0.1, 0.2, 0.3]), (4, [0.4, 0.5, 0.6, 0.7]))
    written(tmp_path, 0, body, *steps)
    written(tmp_path, 1, body, *steps, cut=9)
    parts = read_parts(tmp_path)
    assert [part.steps for part in parts] == [(3, 4), (3,)]
    assert {key[1] for key in last_to_start(parts)} == {3}
    write_trace(tmp_path)
    strictly_read(tmp_path / "trace.json")


def test_no_trace_is_none_and_a_damaged_one_says_so(tmp_path):
    assert write_trace(tmp_path) is None
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace/rank0.jsonl").write_text("")
    assert write_trace(tmp_path) is None
    (tmp_path / "trace/rank0.jsonl").write_text('{"step": 3}\n{"step": 4}\n')
    with pytest.raises(StorageError, match=r"rank0\.jsonl is no part of a trace"):
        write_trace(tmp_path)
