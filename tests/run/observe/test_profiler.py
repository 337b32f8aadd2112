"""The profiler: a rank's part holds every instruction of the traced steps, and reaches rank 0."""

from __future__ import annotations

import json

import pytest

from meshwright.run.observe.profiler import Profiler
from meshwright.run.observe.window import Steps
from tests.run.jobs import Net, job, on_ranks, step

MADE = job()


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def traced(folder, plan, first, last, steps, **how):
    """Train, tracing; per rank the notes, and the number of instructions of its list."""

    def body(session):
        told = []
        mine = folder if session.worker.rank == 0 else folder / "elsewhere"
        profiler = Profiler(session, mine, Steps(first, last), told.append)
        sizes = []
        for _ in range(steps):
            profiler.before()
            fetched = session.take()
            session.run_taken(fetched, steps)
            sizes.append(len(session.worker.lowered(fetched).compiled.instructions.body))
            profiler.after()
        profiler.close()
        return session.notes, sizes[-1], told, session.worker.observer

    return on_ranks(MADE, plan, body, **how)


@pytest.mark.parametrize("plan", ["data=1", "data=2,microbatches=2", "zero3,data=3"])
def test_every_instruction_of_the_traced_steps_and_of_no_other(plan, tmp_path):
    found = traced(tmp_path, plan, 2, 3, 5)
    for rank, (notes, size, told, observer) in enumerate(found):
        head, lists, *steps = entries(tmp_path / f"trace/rank{rank}.jsonl")
        assert (head["rank"], head["coordinates"]["data"]) == (rank, rank)
        assert (head["ahead"], head["error"]) == (0.0, 0.0)  # one host has one clock
        assert len(lists["instructions"]) == size
        assert [entry["step"] for entry in steps] == [2, 3]
        for entry in steps:
            assert len(entry["stamps"]) == size + 1
            assert entry["stamps"] == sorted(entry["stamps"])
        assert steps[0]["stamps"][-1] <= steps[1]["stamps"][0]
        assert observer is None
        assert told == ([tmp_path] if rank == 0 else [])
        assert notes == ([f"trace of steps 2 to 3 written to {tmp_path}/trace.json"] * (rank == 0))


def test_a_run_that_ends_early_keeps_the_steps_that_it_took(tmp_path):
    (notes, *_), _ = traced(tmp_path, "data=2", 2, 9, 2)
    assert notes == [f"trace of step 2 written to {tmp_path}/trace.json"]
    traced(tmp_path / "none", "data=2", 7, 9, 2)
    assert not (tmp_path / "none/trace").exists()


def test_the_part_of_a_rank_that_dies_is_whole_up_to_its_last_step(tmp_path):
    def body(session):
        profiler = Profiler(session, tmp_path, Steps(1, 5), print)
        for _ in range(2):
            profiler.before()
            step(session)
        # and is killed here: nothing is closed

    on_ranks(MADE, "data=2", body)
    for rank in range(2):
        _, _, *steps = entries(tmp_path / f"trace/rank{rank}.jsonl")
        assert [entry["step"] for entry in steps] == [1, 2]


def test_a_disk_that_takes_no_trace_ends_no_training(tmp_path):
    (tmp_path / "trace").write_text("in the way")
    (notes, *_), _ = traced(tmp_path, "data=2", 1, 1, 2)
    assert len(notes) == 1
    assert "trace was not written, training goes on" in notes[0]


def test_labels_say_what_is_computed_moved_and_for_whom(tmp_path):
    traced(tmp_path, "zero3,data=2", 1, 1, 1)
    _, lists, *_ = entries(tmp_path / "trace/rank0.jsonl")
    instructions = lists["instructions"]
    runs = [told for told in instructions if told["kind"] == "Run"]
    assert all(told["ops"] > 0 and told["phase"] in told["name"] for told in runs)
    assert any("jobs.py:" in line for told in runs for line in told["lines"])
    starts = {told["pending"]: told for told in instructions if told["kind"] == "Start"}
    waits = [told for told in instructions if told["kind"] == "Wait"]
    assert len(starts) == len(waits)
    for told in waits:
        begun = starts[told["pending"]]
        assert {**begun, "kind": "Wait", "name": told["name"]} == told
        assert begun["ranks"] == [0, 1]
        assert begun["bytes"] > 0
    weights = [t for t in starts.values() if any(n.startswith("model/") for n in t["serves"])]
    assert weights
    assert {told["op"] for told in weights} == {"all_gather"}


@pytest.mark.parametrize(
    ("plan", "how"),
    [("data=2", {}), ("zero1,data=2", {}), ("zero3,data=2", {}), ("data=2", {"eager": True})],
)
def test_the_bytes_of_gradients_are_those_of_the_parameters(plan, how, tmp_path):
    traced(tmp_path, plan, 1, 1, 1, **how)
    _, lists, *_ = entries(tmp_path / "trace/rank0.jsonl")
    starts = [told for told in lists["instructions"] if told["kind"] == "Start"]
    served = [n.removeprefix("gradient/") for told in starts for n in told["serves"] if "grad" in n]
    sizes = {name: value.numel() * 4 for name, value in Net().named_parameters()}
    assert sorted(served) == sorted(sizes)
    moved = sum(t["bytes"] for t in starts if any("gradient/" in name for name in t["serves"]))
    assert moved == sum(sizes.values())


def test_eager_code_computes_while_it_loads(tmp_path):
    traced(tmp_path, "data=1", 1, 1, 1, eager=True)
    _, lists, *_ = entries(tmp_path / "trace/rank0.jsonl")
    (load,) = [told for told in lists["instructions"] if told["kind"] == "Load"]
    assert load["phase"] == "forward/backward"
