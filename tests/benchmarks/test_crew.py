"""Real crews: they build, obey, say why they fail, and leave nobody behind."""

from __future__ import annotations

import os

import pytest

from benchmarks import models
from benchmarks.harness.crew import Crew, Failed
from benchmarks.harness.task import Task

pytestmark = pytest.mark.mp


def test_a_crew_tells_losses_runs_turns_and_ends(tmp_path):
    weights = tmp_path / "weights.safetensors"
    models.save_weights("gpt100k", weights)
    task = Task("eager", "gpt100k", 2, connected=False, weights=str(weights))
    crew = Crew.started("eager", task, tmp_path / "crew")
    try:
        first = crew.losses()
        timed = crew.turn(steps=2, warm=1)
    finally:
        crew.close()
    assert len(first) == 3
    assert len(timed.losses) == 2
    assert min(timed.seconds, timed.cpu, *timed.peaks) > 0
    # 4 batches in turn: the fifth and sixth steps repeat the first and second, and have learnt
    assert timed.losses[0] < first[0]
    assert [member.process.poll() for member in crew.members] == [0, 0]


def test_a_contestant_that_cannot_start_says_why(tmp_path):
    crew = Crew.started("none", Task("none", "gpt100k", 2, ranks=1), tmp_path)
    try:
        with pytest.raises(Failed, match=r"No module named 'benchmarks\.contestants\.none'"):
            crew.losses()
    finally:
        crew.close()
    with pytest.raises(ProcessLookupError):
        os.kill(crew.members[0].process.pid, 0)
