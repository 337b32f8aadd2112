"""The shared-memory driver against `comm/local.py`, between processes, back to back and at odds."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest

from tests.comm.crew import Crew

pytestmark = pytest.mark.mp
SEED = 20_24


@pytest.fixture(scope="module")
def crew():
    crew = Crew()
    yield crew
    crew.close()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_thousands_of_mixed_collectives_are_the_local_drivers_to_the_last_bit(crew, n):
    crew.start(n, "back_to_back", seed=SEED + n, calls=600, late=False)
    crew.answers(range(n))


@pytest.mark.matrix
@pytest.mark.parametrize("n", [2, 3, 4])
def test_ten_thousand_collectives_with_late_ranks_too(crew, n):
    crew.start(n, "back_to_back", seed=SEED + 10 * n, calls=10_000, late=True)
    crew.answers(range(n))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_ranks_that_come_late_at_random_change_nothing(crew, n):
    crew.start(n, "back_to_back", seed=SEED - n, calls=250, late=True)
    crew.answers(range(n))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_buckets_are_the_local_drivers_to_the_last_bit(crew, n):
    crew.start(n, "buckets")
    crew.answers(range(n))


def test_many_may_be_under_way_over_many_groups(crew):
    pairs = [list(pair) for pair in itertools.combinations(range(4), 2)]
    groups = [(0, 1, 2, 3), (0, 1, 2), *map(tuple, pairs)]
    crew.start(4, "in_flight", seed=SEED, calls=400, groups=groups)
    crew.answers(range(4))


def test_many_may_be_under_way_between_two(crew):
    crew.start(2, "in_flight", seed=SEED, calls=400, groups=[(0, 1)])
    crew.answers(range(2))


@pytest.mark.parametrize("size", [10, 300_000, 3_000_000])
@pytest.mark.parametrize("n", [2, 3])
def test_a_killed_rank_is_named(crew, n, size):
    dice = random.Random(size + n)
    crew.start(n, "until_broken", size=size, seed=size)
    crew.joined(range(n))
    time.sleep(dice.random() / 5)  # the moment of the kill is what varies here
    victim = n - 1
    pid = crew.kill(victim)
    for _, kind, said in crew.answers(list(range(n - 1))):
        assert kind == "PeerLost"
        assert f"rank {victim} (pid {pid}) is gone" in said
        assert "all_reduce over world (w) cannot finish" in said


def test_the_keeper_of_the_store_is_named_too(crew):
    crew.start(2, "until_broken", size=1000, seed=1)
    crew.joined(range(2))
    pid = crew.kill(0)
    ((_, kind, said),) = crew.answers([1])
    assert kind == "PeerLost"
    assert f"rank 0 (pid {pid}) is gone" in said


@pytest.mark.parametrize("who", [0, 2])
def test_why_a_rank_gave_up_is_known_to_the_others(crew, who):
    crew.start(3, "abandoned", who=who)
    for kind, said in crew.answers([rank for rank in range(3) if rank != who]):
        assert kind == "PeerLost"
        assert f"rank {who} ended: ValueError: bad label 12" in said
    crew.gone([who])


def test_who_does_not_come_is_named(crew):
    crew.start(3, "late", how={"seconds": 1.0}, who=1)
    first, _, third = crew.answers(range(3))
    told = [said for kind, said in (first, third) if kind == "Stalled"]
    assert told, (first, third)
    assert "barrier over world (w), call 2 took more than 1 s" in told[0]
    assert "rank 1 did not come" in told[0]
    assert "--timeout" in told[0]


def test_ranks_that_left_with_nothing_owed_are_not_missed(crew):
    crew.start(3, "leaves_early")
    crew.answers([0])
    crew.gone([1, 2])


def test_ranks_that_mean_different_collectives_are_told_apart(crew):
    each = [{"shape": (4,) if rank == 2 else (2, 2), "label": "w"} for rank in range(3)]
    crew.start(3, "meaning", each=each)
    said = set(crew.answers(range(3)))
    ((kind, only),) = said
    assert kind == "UserCodeError"
    assert only.startswith(
        "ranks disagree about the next collective over world: "
        "ranks 0, 1: all_reduce sum float32[2, 2] (w); rank 2: all_reduce sum float32[4] (w). All "
    )


def test_results_reuse_their_memory(crew):
    crew.start(2, "warm", size=1 << 20, calls=20)
    for before, after, faults in crew.answers(range(2)):
        assert before == after > 0
        assert faults < 20 * 8, "fresh memory would be a thousand pages a call"


@pytest.mark.parametrize("limit", [1 << 10, 1 << 16])
def test_too_small_a_space_is_a_reason_to_fall_back_that_all_ranks_know(crew, limit):
    crew.start(2, "connected", limit=limit)
    for kind, notes, total in crew.answers(range(2)):
        assert (kind, total) == ("TorchDist", 3)
        (note,) = notes
        assert note.startswith("collectives go through gloo: ranks 0, 1: ")
        assert "MiB of shared memory" in note
        assert "RLIMIT_FSIZE" in note


def test_shared_memory_that_was_asked_for_and_cannot_be_had_is_an_error(crew):
    crew.start(2, "connected", limit=1 << 16, comm="shared")
    for kind, said, _ in crew.answers(range(2)):
        assert kind == "UsageError"
        assert "MESHWRIGHT_COMM is 'shared', but ranks 0, 1: " in said
        assert "use MESHWRIGHT_COMM=gloo" in said


def test_ranks_of_one_host_share_memory_unless_told_otherwise(crew):
    crew.start(2, "connected", limit=1 << 30)
    assert crew.answers(range(2)) == [("Shared", (), 3)] * 2
    crew.start(2, "connected", limit=1 << 30, comm="gloo")
    assert crew.answers(range(2)) == [("TorchDist", (), 3)] * 2


def test_one_rank_that_does_not_want_to_decides_for_all(crew):
    each = [{"limit": 1 << 30, "comm": comm} for comm in (None, "gloo")]
    crew.start(2, "connected", each=each)
    first, second = crew.answers(range(2))
    assert first[0] == second[0] == "TorchDist"
    assert first[1] == ("collectives go through gloo: rank 1: MESHWRIGHT_COMM is 'gloo'",)


def test_another_token_is_refused_by_both_sides(crew):
    crew.start(2, "meaning", how={"seconds": 5.0, "tokens": ("one", "two")}, shape=(1,), label="w")
    said = crew.failures(range(2))
    assert "rank 1 holds another job token" in said[0]
    assert "rank 1 and rank 0 hold different job tokens" in said[1]


def test_nothing_is_left_in_the_file_system(crew):
    crew.start(2, "until_broken", size=100_000, seed=3)
    crew.joined(range(2))
    crew.kill(1)
    crew.answers([0])
    crew.start(2, "mapped")
    assert [maps for maps, _ in crew.answers(range(2))] == [2, 2]
    assert not [path for path in Path("/dev/shm").iterdir() if "meshwright" in path.name]
