"""Messages between processes that share memory: order, bounds, disagreement, and death."""

from __future__ import annotations

import time

import pytest
import torch

from tests.comm.crew import Crew

pytestmark = pytest.mark.mp
SEED = 20_26
MIB = 1 << 18  # floats


@pytest.fixture(scope="module")
def crew():
    crew = Crew()
    yield crew
    crew.close()


@pytest.mark.parametrize(("n", "patterns"), [(2, 150), (4, 60)])
def test_hundreds_of_random_patterns_are_delivered_in_order(crew, n, patterns):
    crew.start(n, "pattern_after_pattern", seed=SEED, patterns=patterns, count=12)
    crew.answers(range(n))


def test_messages_and_collectives_do_not_mix(crew):
    crew.start(3, "mixed_with_collectives", seed=SEED, count=60)
    crew.answers(range(3))


def test_both_directions_cross_with_messages_that_outgrow_their_lane(crew):
    crew.start(2, "sizes", lengths=[0, 1, 1000, MIB // 4, MIB, 3 * MIB, 16 * MIB], rounds=2)
    crew.answers(range(2))


def test_what_is_larger_than_any_lane_goes_through_in_pieces(crew):
    crew.start(2, "sizes", lengths=[70 * MIB, 10], rounds=1)
    crew.answers(range(2))


def test_many_may_be_sent_before_any_is_taken(crew):
    crew.start(2, "ahead", count=200, length=1000)
    crew.answers(range(2))


def test_beyond_what_is_kept_the_wait_lasts_until_the_receiver_comes(crew):
    crew.start(2, "blocked", count=40, length=MIB // 2)
    crew.answers(range(2))


def test_every_dtype_and_emptiness_goes_in_one_message(crew):
    crew.start(2, "kinds")
    crew.answers(range(2))


def test_opening_lanes_and_groups_waits_for_nobody(crew):
    crew.start(3, "opposed")
    crew.answers(range(3))


@pytest.mark.parametrize(
    ("shape", "dtype", "label"),
    [((3,), torch.float32, "x 1"), ((2,), torch.int64, "x 1"), ((2,), torch.float32, "x 2")],
)
def test_sides_that_mean_different_messages_are_both_told(crew, shape, dtype, label):
    crew.start(2, "disagree", shape=shape, dtype=dtype, label=label)
    for kind, said, _ in crew.answers(range(2)):
        assert kind == "UserCodeError"
        assert "ranks 0 and 1 disagree about the next message from rank 0 to rank 1" in said
        name = str(dtype).removeprefix("torch.")
        assert "it sends message float32[2] (x 1)" in said
        assert f"the other expects message {name}{list(shape)} ({label})" in said


@pytest.mark.parametrize(
    ("what", "said"),
    [("killed", "recv of x 7 from rank 1 cannot finish"), ("full", "send of x 7 to rank 1")],
)
def test_a_killed_peer_is_named_at_once(crew, what, said):
    crew.start(2, "awaited", who=1, what="killed" if what == "killed" else "full")
    if what == "full":
        crew.answers([1])  # it stays alive, and has left the world: its process is killed now
    crew.joined(range(1))
    time.sleep(0.1)
    at = time.time()
    pid = crew.kill(1)
    ((kind, text, when),) = crew.answers([0])
    assert kind == "PeerLost"
    assert f"rank 1 (pid {pid}) is gone" in text
    assert said in text
    assert when - at < 5, "the kernel says so at once"


def test_who_does_not_send_is_named_past_the_deadline(crew):
    crew.start(2, "awaited", how={"seconds": 0.6}, who=1, what="late")
    (kind, said, _), _ = crew.answers(range(2))
    assert kind == "Stalled"
    assert "recv of x 7 from rank 1, message 1 took more than 0.6 s on rank 0" in said
    assert "rank 1 did not come" in said


@pytest.mark.parametrize("late", [True, False])
def test_who_leaves_has_sent_what_it_sent(crew, late):
    crew.start(2, "unreceived", late=late)
    assert crew.answers(range(2)) == [None, [0.0, 1.0, 2.0] if late else None]


def test_the_ledger_counts_bytes_at_the_sender(crew):
    crew.start(2, "told")
    assert crew.answers(range(2)) == [
        ("#1 send of x 3 to rank 1", 13),
        ("#1 recv of x 3 from rank 0", 0),
    ]
