"""Messages over gloo: the same as over shared memory, with a thread at each end of a line."""

from __future__ import annotations

import time

import pytest
import torch

from meshwright.comm.meeting import Deadline
from tests.comm import mailing
from tests.comm.crew import Crew

MIB = 1 << 18  # floats


@pytest.mark.parametrize("n", [2, 3])
def test_random_patterns_are_delivered_in_order(threads, n):
    found = threads(n, lambda comm: mailing.pattern_after_pattern(comm, 20_27, 12, 12))
    assert found == [None] * n


def test_messages_and_collectives_do_not_mix(threads):
    assert threads(3, lambda comm: mailing.mixed_with_collectives(comm, 20_27, 15)) == [None] * 3


def test_both_directions_cross_with_small_and_large_messages(threads):
    lengths = [0, 1, 1000, MIB, 20 * MIB]
    assert threads(2, lambda comm: mailing.sizes(comm, lengths, 1)) == [None] * 2


def test_many_may_be_sent_before_any_is_taken(threads):
    assert threads(2, lambda comm: mailing.ahead(comm, 100, 1000)) == [None] * 2


def test_beyond_what_is_kept_the_wait_lasts_until_the_receiver_comes(threads):
    assert threads(2, lambda comm: mailing.blocked(comm, 5, 6 * MIB)) == [None] * 2


def test_every_dtype_and_emptiness_goes_in_one_message(threads):
    assert threads(2, mailing.kinds) == [None] * 2


def test_opening_lines_and_groups_waits_for_nobody(threads):
    assert threads(3, mailing.opposed) == [None] * 3


def test_sides_that_mean_different_messages_are_both_told(threads):
    found = threads(2, lambda comm: mailing.disagree(comm, (3,), torch.float32, "x 1"))
    for _, said, _ in found:
        assert "ranks 0 and 1 disagree about the next message from rank 0 to rank 1" in said
        assert "it sends message float32[2] (x 1)" in said
        assert "the other expects message float32[3] (x 1)" in said
    assert [kind for kind, _, _ in found] == ["UserCodeError"] * 2


def test_who_does_not_send_is_named_past_the_deadline(threads):
    (kind, said, _), _ = threads(
        2, lambda comm: mailing.awaited(comm, 1, "late"), deadline=Deadline(0.5, 0.5)
    )
    assert kind == "Stalled"
    assert "recv of x 7 from rank 1, message 1 took more than 0.5 s on rank 0" in said


@pytest.mark.parametrize("late", [True, False])
def test_who_leaves_has_sent_what_it_sent(threads, late):
    wanted = [None, [0.0, 1.0, 2.0] if late else None]
    assert threads(2, lambda comm: mailing.unreceived(comm, late)) == wanted


def test_the_ledger_counts_bytes_at_the_sender(threads):
    wanted = [("#1 send of x 3 to rank 1", 13), ("#1 recv of x 3 from rank 0", 0)]
    assert threads(2, mailing.told) == wanted


@pytest.mark.mp
def test_a_killed_peer_is_named():
    crew = Crew()
    try:
        crew.start(2, "awaited", how={"gloo": True}, who=1, what="killed")
        crew.joined(range(2))
        time.sleep(0.3)
        pid = crew.kill(1)
        ((kind, text, _),) = crew.answers([0])
    finally:
        crew.close()
    assert kind == "PeerLost"
    assert f"rank 1 (pid {pid}) is gone" in text
    assert "recv of x 7 from rank 1 cannot finish" in text
