"""The ladder: its search, its guesses, its table; and real trials, in the matrix."""

from __future__ import annotations

import math

import pytest

from benchmarks import models, reach, special
from benchmarks.harness.result import as_json
from benchmarks.ladder import run
from benchmarks.ladder.climb import STEP, Held, Outcome, largest, tried
from benchmarks.ladder.run import Reached, as_raw
from benchmarks.ladder.rungs import GIB, RUNGS, Trial, guessed, parameters, shape_of, tokens
from benchmarks.page import ladder
from benchmarks.page.page import page
from meshwright.plan.plan import Plan

MACHINE = {
    "processor": "P", "cores": 2, "memory_bytes": 2**30, "system": "S", "python": "3",
    "versions": {}, "peers": {}, "commit": "c", "load": 0.0, "began": "now",
}  # fmt: skip


def outcome(width, most):
    fits = width <= most
    return Outcome(width, (1.0, 3.0) if fits else (), (), Held(1 << 20), "" if fits else "memory")


@pytest.mark.parametrize("most", [STEP, 5 * STEP, 640, 700, 4000])
@pytest.mark.parametrize("guess", [10, 640, 2000])
def test_the_largest_width_is_found_in_few_trials(most, guess):
    tried_, said = [], []

    def fits(width):
        tried_.append(width)
        return outcome(width, most)

    good, bad = largest(fits, guess, said.append)
    assert good.width == most // STEP * STEP
    assert bad.width == good.width + STEP
    assert len(tried_) == len(set(tried_)) == len(said)
    assert len(tried_) <= 4 * math.log2(max(most, guess) / STEP + 2)


def test_nothing_that_fits_ends_the_search():
    good, bad = largest(lambda width: outcome(width, 0), 640, lambda _: None)
    assert good is None
    assert bad.width == STEP


def test_a_search_whose_time_is_over_keeps_what_it_has():
    widths = []
    good, _ = largest(lambda w: widths.append(w) or outcome(w, 2000), 640, lambda _: None, 0.0)
    assert widths == [640]
    assert good.width == 640


def test_plans_are_plans_and_deepspeeds_config_names_what_they_say():
    for rung in RUNGS:
        plan = Plan.parse(rung.plan)
        assert rung.again == (plan.remat == "full")
        assert (rung.zero["stage"] == 3) == (plan.zero == 3)
        device = {"host": "cpu", "disk": "nvme"}.get(plan.offload)
        for part in ("offload_optimizer", "offload_param"):
            assert rung.zero.get(part, {}).get("device") == device


def test_the_model_has_as_many_parameters_as_are_told():
    model = models.of(shape_of(64))
    assert sum(p.numel() for p in model.parameters()) == parameters(64)


def test_batches_are_alike_on_all_ranks():
    (ids, targets), _ = tokens()
    assert ids.shape == targets.shape
    assert (ids[:, 1:] == targets[:, :-1]).all()
    assert (tokens()[0][0] == ids).all()


def test_guesses_grow_with_memory_and_keep_the_hosts():
    none, host = RUNGS[0], RUNGS[3]
    assert guessed(none, 1 * GIB, 0) < guessed(none, 4 * GIB, 0)
    assert guessed(host, 4 * GIB, GIB) < guessed(host, 4 * GIB, 64 * GIB)


def test_the_table_has_every_rung_of_both_and_says_why():
    found = {
        "ours": [Reached(outcome(640, 640), "memory")] * len(RUNGS),
        "deepspeed": [Reached(None, "no libaio")] * len(RUNGS),
    }
    raw = as_raw(found, 2 * GIB)
    told = ladder.table(raw)
    assert told.count("| ours |") == told.count("| DeepSpeed |") == len(RUNGS)
    assert told.count("did not run: no libaio") == len(RUNGS)
    assert "In 2 GiB a rank, and 4 GiB" in told
    speed = 4 * 128 / 2.0
    assert f"| 640 | {parameters(640) / 1e6:.0f} M | {speed:,.0f} | 1 |" in told


@pytest.mark.matrix
@pytest.mark.mp
def test_a_limit_is_kept_and_told(tmp_path):
    small = tried(Trial("ours", 4, 64, GIB, ""), GIB, tmp_path)
    assert small.fits
    assert 0 < small.held.private < GIB
    assert small.held.disk > 0
    short = tried(Trial("ours", 0, 64, 200 << 20, ""), GIB, tmp_path)
    assert not short.fits
    assert short.reason == "memory"
    assert list(tmp_path.iterdir()) == []


def test_the_part_judges_every_rung_and_the_page_shows_it(monkeypatch, tmp_path):
    most = {"ours": 960, "deepspeed": 640}

    def fake(trial, host, parent, most_seconds=0.0):
        if trial.side == "deepspeed" and RUNGS[trial.rung].what == "+ disk offload":
            return Outcome(trial.width, (), (), Held(), "no libaio")
        found = outcome(trial.width, max(64, most[trial.side]))
        return found if trial.memory == GIB else outcome(trial.width, trial.width)

    monkeypatch.setattr(run, "tried", fake)
    monkeypatch.setattr(special, "ROOT", tmp_path)
    found = special.ladder(lambda _: None, GIB, {}, 1.0, quick=False)
    *four, last = found.results
    assert [r.verdict for r in four] == ["holds"] * 4
    assert all(r.found.median == parameters(960) / parameters(640) for r in four)
    assert last.verdict == "did not run"
    assert last.reason == "DeepSpeed: no libaio"
    told = page(
        {
            "machine": MACHINE,
            "groups": {
                "ladder": {"results": [as_json(r) for r in found.results], "raw": found.raw}
            },
            "minutes": 0.0,
            "load_at_end": 0.0,
            "broken": {},
        },
        [],
    )
    assert f"## {reach.LADDER}" in told
    assert "| + disk offload | DeepSpeed |" in told
