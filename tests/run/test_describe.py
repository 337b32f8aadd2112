"""What run.json says of a plan."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from meshwright.plan.plan import Plan
from meshwright.run.describe import describe_run, explain, facts_of, nearby
from meshwright.run.prepare import prepare
from tests.laws.source import ROOT
from tests.program.accounted import gpt
from tests.run.jobs import Net, alone, job, on_ranks, step, weighted_loss


def test_every_rank_says_the_same():
    def body(session):
        return facts_of(session), describe_run(session, session.take())

    (facts, told), *others = on_ranks(job(), "zero3,data=3", body)
    assert all(other == (facts, told) for other in others)
    assert json.loads(json.dumps(told)) == told
    assert told["plan"] == "zero3,data=3"
    assert told["mesh"]["axes"] == [["data", 3]]
    assert [r["coordinates"] for r in told["mesh"]["ranks"]] == [{"data": k} for k in range(3)]


def test_what_a_rank_holds_is_what_it_holds():
    def body(session):
        step(session)
        state, rank = session.worker.state, session.worker.rank
        shapes = {n: list(state.values[f"model/{n}"].shape) for n in session.build.model.parameters}
        weights = sum(t.nbytes for n, t in state.values.items() if n.startswith("model/"))
        slots = sum(t.nbytes for s in state.optimizer.state.values() for t in s.values() if t.dim())
        return rank, shapes, weights, slots, describe_run(session, session.take())

    for rank, shapes, weights, slots, told in on_ranks(job(), "zero3,data=3", body):
        assert {p["name"]: p["local"][str(rank)] for p in told["parameters"]} == shapes
        bill = told["memory"][rank]["parts"]
        assert (bill["weights"], bill["optimizer"]) == (weights, slots)


@pytest.mark.parametrize(
    ("plan", "ops"),
    [
        ("data=1", set()),
        ("data=2", {"all_reduce"}),
        ("zero1,data=2", {"all_reduce", "reduce_scatter", "all_gather"}),
        ("zero3,data=2", {"all_reduce", "reduce_scatter", "all_gather"}),
    ],
)
def test_collectives_are_those_of_the_plan(plan, ops):
    told = explain(job(), Plan.parse(plan), Plan.parse(plan).ranks)
    assert {row["op"] for row in told["collectives"]} == ops
    assert all(row["axis"] == "data" and row["bytes"] > 0 for row in told["collectives"])


def test_ranks_that_are_alike_are_compiled_once(monkeypatch):
    """40 ranks of 2 or 3 samples: two lists, not forty."""
    made = job(batch_size=100, data=lambda: type(job().data())(200))
    compiled = []
    build = prepare(made, Plan.parse("data=40"), 40)
    real = type(build).lowered

    def counted(self, rank, *args, **how):
        compiled.append(rank)
        return real(self, rank, *args, **how)

    monkeypatch.setattr(type(build), "lowered", counted)
    told = explain(made, Plan.parse("data=40"), 40)
    assert len(told["memory"]) == 40
    assert set(compiled) == {0, 20}


def test_an_eager_run_has_no_collectives_to_tell():
    session = alone(job(), eager=True)
    told = describe_run(session, session.take())
    assert told["eager"] is True
    assert "collectives" not in told
    assert facts_of(session)["eager"] == "True"


def test_facts_differ_where_runs_would():
    one = facts_of(alone(job()))
    for changed in (job(seed=1), job(batch_size=10)):
        other = facts_of(alone(changed))
        assert sum(one[key] != other[key] for key in one) == 1
    wide = dataclasses.replace(job(), model=lambda: torch.nn.Linear(8, 3))
    assert facts_of(alone(wide))["parameters"] != one["parameters"]


def test_repeated_parameters_are_told_once_with_how_many_they_are():
    told = explain(gpt(3), Plan.parse("zero3,data=2"), 2)
    layouts = {entry["name"]: entry for entry in told["layouts"]}
    assert layouts["blocks.*.mlp.up.weight"]["count"] == 3
    assert layouts["head.weight"]["count"] == 1
    assert sum(entry["count"] for entry in told["layouts"]) == len(told["parameters"])
    assert sum(entry["count"] * entry["bytes"] for entry in told["layouts"]) == sum(
        entry["bytes"] for entry in told["parameters"]
    )


def test_what_a_step_moves_is_added_up():
    told = explain(gpt(1), Plan.parse("zero3,data=2"), 2)
    rows, traffic = told["collectives"], told["traffic"]
    assert traffic["bytes"] == sum(row["bytes"] for row in rows)
    assert traffic["exposed_bytes"] == sum(row["exposed_bytes"] for row in rows)
    assert traffic["calls"] == sum(row["count"] for row in rows)
    assert 0 < traffic["messages"] < traffic["calls"], "they travel in buckets"


def test_lines_are_told_from_the_working_folder(monkeypatch):
    monkeypatch.chdir(ROOT)
    told = explain(gpt(1), Plan.parse("tensor=2"), 2)
    sources = {row["source"] for row in told["collectives"]}
    sources |= {station["source"] for station in told["block"]["stations"]}
    assert any(source.startswith("examples/gpt.py:") for source in sources)
    assert not any(source.startswith("/") for source in sources)
    assert json.loads(json.dumps(told)) == told | {"block": json.loads(json.dumps(told["block"]))}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "/env/lib/python3.11/site-packages/transformers/models/x.py:3",
            "transformers/models/x.py:3",
        ),
        ("{here}/models/x.py:3", "models/x.py:3"),
        ("/elsewhere/x.py:3", "/elsewhere/x.py:3"),
        ("", ""),
    ],
)
def test_a_line_is_told_as_shortly_as_it_can_be_found(source, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nearby(source.format(here=Path.cwd())) == told


def test_stages_of_a_pipeline_and_what_their_ranks_hold_and_send():
    def body(session):
        step(session)
        state = session.worker.state.values
        held = {n.removeprefix("model/") for n in state if n.startswith("model/")}
        weights = sum(t.nbytes for n, t in state.items() if n.startswith("model/"))
        return held, weights, describe_run(session, session.take())

    plan = "zero1,data=2,pipeline=2,microbatches=2"
    found = on_ranks(job(loss=weighted_loss), plan, body)
    told = found[0][2]
    assert all(other == told for *_, other in found)
    assert json.loads(json.dumps(told)) == told
    assert told["mesh"]["axes"] == [["pipeline", 2], ["data", 2]]
    assert told["mesh"]["ranks"][3]["coordinates"] == {"pipeline": 1, "data": 1}
    for rank, (held, weights, _) in enumerate(found):
        assert {p["name"] for p in told["parameters"] if str(rank) in p["local"]} == held
        assert told["memory"][rank]["parts"]["weights"] == weights
    piped = told["pipeline"]
    assert (piped["schedule"], piped["bubble"]) == ("1f1b", pytest.approx(1 / 3))
    assert [stage["rank"] for stage in piped["stages"]] == [0, 1]
    assert sum(stage["parameters"] for stage in piped["stages"]) == 4
    # Of each micro-batch: activations forward, their gradients back.
    assert [each["messages"] for each in piped["traffic"]] == [2, 2]
    assert all(each["sent"] > 0 for each in piped["traffic"])
    assert piped["notes"] == []


def test_what_a_rank_saves_is_what_its_schedule_has_in_flight():
    """GPipe has all micro-batches alive at the turn, 1F1B as many as stages from there on."""

    def saved(text):
        deep = job(model=lambda: Net(nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))))
        told = explain(replace(deep, batch_size=48), Plan.parse(f"{text},microbatches=8"), 2)
        return [bill["parts"]["saved activations"] for bill in told["memory"]]

    (first, last), (more, most) = saved("pipeline=2"), saved("pipeline=2,schedule=gpipe")
    each, other = (more - first) / (8 - 2), (most - last) / (8 - 1)
    assert 2 * each <= first < 4 * each  # and what is on its way
    assert other <= last < most
    assert saved("pipeline=2,schedule=gpipe,remat=full")[0] < more / 2


def test_few_micro_batches_are_warned_of():
    (note,) = explain(job(), Plan.parse("pipeline=2"), 2)["pipeline"]["notes"]
    assert note.startswith("1 micro-batch a step cannot keep pipeline=2 busy under schedule=1f1b")
