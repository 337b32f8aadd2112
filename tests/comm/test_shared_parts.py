"""What the shared-memory driver stands on: segments, the pool, bells, pidfds, layouts."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.comm import futex, segment
from meshwright.comm.channel import SLOTS, Bells, Channel, Meaning, size_of
from meshwright.comm.pidfd import Peers
from meshwright.comm.pool import Pool
from meshwright.comm.pump import even
from meshwright.comm.segment import HEADER, NoRoom, Segment
from meshwright.comm.shares import shares

# ── segments ─────────────────────────────────────────────────────────────────────────────────────


def test_what_one_writes_the_other_reads():
    ours = Segment.create(1 << 16)
    theirs = Segment.attach(ours.card)
    ours.data[5000] = 77
    assert theirs.data[5000] == 77
    ours.close()
    theirs.data[5001] = 78  # the memory is there as long as somebody maps it
    assert ours.data[5001] == 78


def test_a_segment_is_known_by_its_nonce_not_by_its_place():
    first = Segment.create(1 << 16)
    card = json.loads(first.card) | {"nonce": "00" * 16}
    with pytest.raises(NoRoom, match=r"is not the segment of process"):
        Segment.attach(json.dumps(card))
    with pytest.raises(NoRoom, match=r"is not the segment of process"):
        Segment.attach(json.dumps(json.loads(first.card) | {"size": 1 << 15}))
    first.close()
    with pytest.raises(NoRoom, match=r"cannot open /proc/\d+/fd/\d+"):
        Segment.attach(json.dumps(card | {"fd": 1 << 20}))


def test_a_segment_cannot_be_cut_under_its_users():
    ours = Segment.create(1 << 16)
    assert ours.fd is not None
    with pytest.raises(PermissionError):
        os.ftruncate(ours.fd, 0)
    ours.close()


def test_more_than_there_is_is_refused_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(segment, "available", lambda: 3 << 20)
    with pytest.raises(NoRoom, match=r"4.0 MiB of shared memory asked for, and 3.0 MiB are free"):
        Segment.create(4 << 20)


def test_what_is_free_is_the_control_groups_if_that_is_less(tmp_path):
    host = segment.available(tmp_path)
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    assert segment.available(tmp_path) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert segment.available(tmp_path) > 3_000_000
    assert host > 3_000_000


# ── the pool ─────────────────────────────────────────────────────────────────────────────────────


def test_memory_comes_back_when_the_last_view_is_gone():
    pool = Pool()
    tensor = pool.empty((1 << 19,), torch.float32)
    where, row = tensor.data_ptr(), tensor.view(2, -1)[1]
    del tensor
    gc.collect()
    assert pool.idle == 0, "a view still uses it"
    del row
    gc.collect()
    assert pool.idle >= 2 << 20
    assert pool.empty((1 << 19,), torch.float32).data_ptr() == where


def test_a_larger_block_that_is_idle_is_taken_before_more_memory_is():
    pool = Pool()
    del [pool.empty((size << 18,), torch.float32) for size in (12, 32)][:]
    gc.collect()
    kept = pool.idle
    first = pool.empty((8 << 18,), torch.float32)
    second = pool.empty((10 << 18,), torch.float32)
    assert pool.idle == 0
    del first, second
    gc.collect()
    assert pool.idle == kept
    pool.empty((2 << 18,), torch.float32)
    gc.collect()
    small = pool.empty((1 << 18,), torch.float32)
    assert pool.idle == kept, "a block of 12 MiB is no place for 1"
    del small


def test_what_is_in_use_is_not_handed_out_again():
    pool = Pool()
    tensors = [pool.empty((1 << 18, 2), torch.float32).fill_(k) for k in range(5)]
    assert all(bool((tensor == k).all()) for k, tensor in enumerate(tensors))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,)])
def test_small_ones_are_ordinary(shape):
    pool = Pool()
    tensor = pool.empty(shape, torch.bfloat16)
    assert tensor.shape == shape
    assert tensor.dtype == torch.bfloat16
    del tensor
    assert pool.idle == 0


def test_no_more_is_kept_than_allowed():
    pool = Pool(kept=5 << 20)
    del [pool.empty((1 << 19,), torch.float32) for _ in range(5)][:]
    gc.collect()
    assert 0 < pool.idle <= 5 << 20


# ── bells ────────────────────────────────────────────────────────────────────────────────────────


def bells(ranks):
    shared = Segment.create(Bells.bytes(ranks))
    return [Bells(shared, rank, ranks) for rank in range(ranks)]


def test_a_bell_ends_a_sleep_that_begins_before_or_after():
    first, second = bells(2)
    first.doze()
    second.ring([0])  # before the sleep: it must not be slept through
    began = time.monotonic()
    first.sleep()
    assert time.monotonic() - began < futex._SLICE / 2
    first.doze()
    ringer = threading.Timer(0.002, second.ring, ([0],))
    ringer.start()
    first.sleep()
    assert not first._words[0]
    ringer.join()


def test_a_bell_that_nobody_waits_for_stays_silent():
    first, second = bells(2)
    second.ring([0])
    assert not first._words[0]


def test_the_first_word_on_who_is_lost_stands():
    first, second = bells(2)
    assert second.news() is None
    first.tell("rank 1 (pid 5) is gone: é")
    second.tell("another reason")
    assert second.news() == first.news() == "rank 1 (pid 5) is gone: é"


def test_cores_are_counted_once_however_ranks_are_bound():
    first, second = bells(2)
    first.declare({0})
    second.declare({3})
    assert first.cores(2) == second.cores(2) == 2
    second.declare({0})
    assert first.cores(2) == 1
    first.declare(range(1000))
    assert second.cores(2) == 256
    second.ring([0])
    first.doze()
    assert second.cores(2) == 256, "bells lie beside"


def test_this_machine_can_be_served():
    assert futex.problem() is None


@pytest.mark.parametrize(
    ("platform", "machine", "why"), [("darwin", "x86_64", "Linux"), ("linux", "aarch64", "aarch64")]
)
def test_machines_that_cannot_be_served_are_told_why(monkeypatch, platform, machine, why):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(futex.platform, "machine", lambda: machine)
    assert why in futex.problem()


# ── peers ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.mp
def test_a_process_that_ends_is_known():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    peers = Peers({0: os.getpid(), 3: child.pid})
    assert peers.ended([0, 3]) == []
    child.communicate(b"\n")
    assert peers.ended([0, 3]) == [3]
    assert peers.ended([0]) == []
    peers.close()
    with pytest.raises(OSError, match="No such process"):
        Peers({0: os.getpid(), 3: child.pid})


# ── layouts ──────────────────────────────────────────────────────────────────────────────────────


def channels(members, capacity):
    shared = Segment.create(size_of(members, capacity))
    ring = bells(members)
    ranks = tuple(range(members))
    return [Channel(shared, me, ranks, ring[me], capacity) for me in ranks]


@given(st.integers(2, 9), st.sampled_from([4096, 8192, 1 << 16]))
def test_nothing_overlaps_and_all_is_inside(members, capacity):
    one = channels(members, capacity)[0]
    spans = [(0, HEADER)]
    for stream in (one.inputs, one.results):
        words = (*stream.everyone, *stream.takes, stream._mine, stream._mine + 16)
        spans.extend((word * 8, word * 8 + 8) for word in words)
    for member in range(members):
        for number in range(SLOTS):
            start = one._slot(member, number) * 8
            spans.append((start, start + one._header * 8))
            start = one.input(member, number)
            spans.append((start, start + capacity))
            start = one.result(member, number)
            spans.append((start, start + one.share))
    spans.sort()
    assert all(low[1] <= high[0] for low, high in itertools.pairwise(spans))
    assert spans[-1][1] <= one.segment.data.numel() == size_of(members, capacity)


def test_a_slot_is_not_written_again_before_all_have_taken_what_it_held():
    first, second, third = channels(3, 4096)
    for number in range(SLOTS):
        assert first.inputs.may_post(number)
        first.inputs.publish()
    assert not first.inputs.may_post(SLOTS)
    for other in (second, third):
        assert not first.inputs.may_post(SLOTS)
        assert first.owing((first.inputs.takes, 1)) == {
            c.ranks[c.me] for c in (second, third) if c.inputs.taken == 0
        }
        assert other.inputs.may_take(0, [other.inputs.posts[0]])
        other.inputs.release()
    assert first.inputs.may_post(SLOTS)
    assert not first.inputs.may_post(SLOTS + 1), "not its turn"
    assert not second.inputs.may_take(0, [second.inputs.posts[0]]), "taken already"
    assert not second.inputs.may_take(1, second.inputs.everyone), "the third has posted nothing"


def test_members_read_what_others_announce():
    first, second = channels(2, 4096)
    meaning, other = Meaning(b"this".ljust(256, b"\0"), 5), Meaning(b"that".ljust(256, b"\0"), 6)
    first.announce(7, meaning, 3, [10, 20])
    second.announce(7, other, 1, [30, 40])
    assert first.differs(7, meaning, [1])
    assert not first.differs(7, other, [1])
    assert [text.rstrip(b"\0") for text in first.meanings(7)] == [b"this", b"that"]
    assert second.announced(0, 7) == (3, 20)
    assert first.announced(1, 7) == (1, 30)


@given(st.integers(0, 1 << 22), st.integers(1, 1 << 14).map(lambda lines: lines * 64))
def test_rounds_are_alike_and_hold_all(size, limit):
    piece = even(size, limit)
    assert piece % 64 == 0
    assert 0 < piece <= limit
    rounds = max(1, -(-size // piece))
    assert rounds == max(1, -(-size // limit))


@given(st.integers(0, 1 << 20), st.integers(2, 9))
def test_shares_meet_end_to_end_and_fit_their_slots(size, members):
    limit = members * 4096
    bounds = shares(size, limit, members)
    flat = [0, *(bound for row in bounds for bound in row[1:])]
    assert all(row[0] == before[-1] for before, row in itertools.pairwise(bounds))
    assert flat == sorted(flat)
    assert flat[-1] == size
    for row in bounds:
        assert all(high - low <= 4096 for low, high in itertools.pairwise(row))
        assert all(bound % 64 == 0 or bound == row[-1] for bound in row)
