"""Lanes: work in order, errors told to who waits, no thread left behind."""

from __future__ import annotations

import gc
import threading
from threading import Event

import pytest

from meshwright.run.offload.lane import Lane

NAME = "a lane of this test"


def threads():
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def test_a_lane_that_nobody_holds_ends_its_threads():
    lane = Lane(3, NAME)
    assert not threads()
    lane.submit(lambda: None).result(10)
    left = threads()
    assert len(left) == 3
    del lane
    gc.collect()
    for thread in left:
        thread.join(10)
    assert not threads()


def test_work_that_is_queued_is_done_before_the_end():
    lane, go, done = Lane(1, NAME), Event(), []
    first = lane.submit(lambda: go.wait(10) and None)
    rest = [lane.submit(lambda n=n: done.append(n)) for n in range(3)]
    lane.close()
    go.set()
    for each in (first, *rest):
        each.result(10)
    assert done == [0, 1, 2]


def test_an_error_is_told_to_who_waits_and_others_go_on():
    lane = Lane(1, NAME)
    failed = lane.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failed.result(10)
    lane.submit(lambda: None).result(10)
    lane.close()
