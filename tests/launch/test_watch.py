from __future__ import annotations

import itertools

import pytest

from meshwright.launch import kernel, watch

pytestmark = pytest.mark.mp


def test_a_rank_that_the_kernel_killed_for_memory_is_told_apart(ranks, monkeypatch):
    counts = itertools.count()
    monkeypatch.setattr(watch, "oom_kills", lambda: next(counts))
    done = ranks(2, command=["sh", "-c", '[ "$RANK" = 0 ] || kill -9 $$'])
    assert done.status == 72
    assert "was killed by SIGKILL: the kernel was out of memory" in done.err


def test_a_rank_that_others_killed_is_a_lost_peer(ranks, monkeypatch):
    monkeypatch.setattr(watch, "oom_kills", lambda: 3)
    done = ranks(2, command=["sh", "-c", '[ "$RANK" = 0 ] || kill -11 $$'])
    assert done.status == 75
    assert "was killed by SIGSEGV\n" in done.err


@pytest.mark.parametrize(
    ("text", "kills"),
    [
        ("low 0\nhigh 0\nmax 3\noom 2\noom_kill 2\n", 2),
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", 1),
        ("oom_kill soon\n", 0),
        ("", 0),
    ],
)
def test_the_kernels_count_is_read_in_both_forms(tmp_path, monkeypatch, text, kills):
    path = tmp_path / "memory.events"
    path.write_text(text)
    monkeypatch.setattr(kernel, "_COUNTERS", (tmp_path / "absent", path))
    assert kernel.oom_kills() == kills


def test_ranks_that_do_not_end_by_themselves_are_ended(ranks):
    script = "if [ $RANK = 0 ]; then exit 7; fi; trap '' TERM; while :; do sleep 100; done"
    done = ranks(2, command=["sh", "-c", script], grace=0.2)
    assert done.status == 7
    assert "rank 0 failed: exit status 7" in done.err
    assert "rank 1 ended as well" in done.err
