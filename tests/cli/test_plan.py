"""`mw plan`: everything a rank holds and sends, without a process."""

from __future__ import annotations

import json

import pytest


def explained(mw, *words):
    done = mw("plan", "sums.py", "--json", *words)
    assert done.status == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_explanation_says_what_each_rank_holds(mw, ranks):
    found = explained(mw, "--plan", "zero3", "-n", ranks, "--set", "width=64")
    assert found["mesh"]["axes"] == [["data", ranks]]
    assert (found["file"], found["name"]) == ("sums.py", "job")
    up = next(p for p in found["parameters"] if p["name"] == "up.weight")
    assert up["weights"] == "sharded(0) over data"
    assert up["local"]["0"] == [64 // ranks, 8]
    assert len(found["memory"]) == ranks
    assert all(
        {"weights", "gradients", "optimizer", "saved activations"} <= set(entry["parts"])
        for entry in found["memory"]
    )
    whole = 4 * (64 * 8 + 64 + 64 + 1)
    assert found["memory"][0]["parts"]["weights"] < whole
    assert found["fallbacks"] == []


def test_every_collective_is_on_the_page(mw):
    words = ("--plan", "zero3", "-n", 2, "--set", "width=64")
    found = explained(mw, *words)
    page = mw("plan", "sums.py", *words).out
    assert {c["op"] for c in found["collectives"]} == {
        "all_gather",
        "all_reduce",
        "reduce_scatter",
    }
    for entry in found["collectives"]:
        assert {"op", "axis", "bytes", "count", "source", "module", "why"} <= set(entry)
        row = [
            line
            for line in page.splitlines()
            if entry["op"] in line and entry["source"] in line and entry["why"] in line
        ]
        assert row, entry
    gathered = [c for c in found["collectives"] if c["op"] == "all_gather"]
    assert all(c["source"].startswith("sums.py:") for c in gathered)
    assert all(parameter["name"] in page for parameter in found["parameters"])


def test_auto_says_what_it_took(mw):
    done = mw("plan", "sums.py", "-n", 2)
    assert done.status == 0
    assert "auto takes data=2" in done.err
    assert done.out.startswith("data=2 ")


def test_ops_without_a_rule_are_named(mw, folder):
    text = (folder / "sums.py").read_text()
    odd = "torch.linalg.matrix_exp({}.reshape(-1, 4, 4)).flatten(1)"
    hidden = "F.gelu(self.up(x))"
    (folder / "odd.py").write_text(text.replace(hidden, odd.format(hidden)))
    done = mw("plan", "odd.py", "-n", 2, "--json")
    assert done.status == 0, done.err
    named = json.loads(done.out)["fallbacks"]
    assert any("matrix_exp" in op["op"] and op["source"].startswith("odd.py:") for op in named)
    assert "computed whole on every rank" in mw("plan", "odd.py", "-n", 2).out


def test_a_plan_for_ranks_that_are_not_there(mw):
    """No process is started, so a world larger than the machine can be explained."""
    found = explained(mw, "--plan", "zero1", "-n", 16)
    assert len(found["mesh"]["ranks"]) == 16
