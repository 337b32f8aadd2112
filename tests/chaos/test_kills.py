"""SIGKILL at random moments inside shared-memory collectives: who died is told, nothing is left.

pytest -m matrix -s tests/chaos/test_kills.py      # all 200, and how long survivors took
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest

from tests.comm.crew import Crew

pytestmark = pytest.mark.mp
WITHIN = 1.0


@pytest.fixture(scope="module")
def crew():
    crew = Crew()
    yield crew
    crew.close()


def kill_one(crew, seed):
    """Kill a rank of a new world: how long survivors waited for it, and what they said wrong."""
    dice = random.Random(seed)
    n = dice.choice([2, 3, 4])
    crew.start(n, "any_until_broken", seed=seed)
    crew.joined(range(n))
    time.sleep(dice.random() / 4)  # the moment of the kill is what varies here
    victim = dice.randrange(n)
    when = time.time()
    pid = crew.kill(victim)
    told = crew.answers([rank for rank in range(n) if rank != victim])
    wrong = [
        (seed, n, victim, kind, said)
        for _, _, kind, said in told
        if kind != "PeerLost" or f"rank {victim} (pid {pid}) is gone" not in said
    ]
    # A survivor that comes to a collective only later, waits from then on.
    return [at - max(when, began) for began, at, _, _ in told], wrong


def kill_many(crew, seeds):
    found = [kill_one(crew, seed) for seed in seeds]
    assert [wrong for _, wrongs in found for wrong in wrongs] == []
    crew.start(2, "mapped")
    # A world of two maps its bells and its channel; only their maker has them open.
    assert [maps for maps, _ in crew.answers(range(2))] == [2, 2]
    assert not [path for path in Path("/dev/shm").iterdir() if "meshwright" in path.name]
    return sorted(second for seconds, _ in found for second in seconds)


def test_a_few_kills_are_each_named_and_leave_nothing(crew):
    kill_many(crew, range(6))


@pytest.mark.matrix
@pytest.mark.timeout(1200)
def test_two_hundred_kills_are_each_named_within_a_second_and_leave_nothing(crew, capsys):
    took = kill_many(crew, range(1000, 1200))
    told = {share: took[int(share / 100 * (len(took) - 1))] for share in (0, 50, 90, 99, 100)}
    lines = [
        "seconds from the kill to a survivor's error, in percentiles:",
        "  ".join(f"p{share} {second:.3f}" for share, second in told.items()),
        f"{len(took)} survivors, {sum(second > WITHIN for second in took)} later than {WITHIN} s",
    ]
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    assert told[99] <= WITHIN
