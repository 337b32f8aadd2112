"""Reading while a step computes: on a thread, between begin and finish, and right in every case."""

from __future__ import annotations

import threading

import pytest
from torch.utils.data import DataLoader

from meshwright.run.data import ahead as ahead_module
from meshwright.run.data.ahead import ReadAhead
from meshwright.run.data.samples import open_source
from tests.run.jobs import Points, alone, job, losses

ALWAYS = -1.0
MAIN = threading.main_thread()


class Reading:
    """Counts what is read, and where."""

    def __init__(self):
        self.steps, self.threads = [], []

    def __call__(self, step):
        self.steps.append(step)
        self.threads.append(threading.current_thread())
        return step * 10


def test_reading_goes_on_while_the_step_computes():
    computed = threading.Event()

    def read(step):
        assert computed.wait(30), "reading ended before the step did: they do not overlap"
        return step

    ahead = ReadAhead(read, long=ALWAYS)
    ahead.begin(1)
    computed.set()
    assert ahead.finish(1) == 1


def test_what_is_read_quickly_is_read_here():
    read = Reading()
    ahead = ReadAhead(read)
    for step in range(4):
        ahead.begin(step)
        assert ahead.finish(step) == step * 10
    assert read.steps == [0, 1, 2, 3]
    assert set(read.threads) == {MAIN}


def test_each_step_is_read_once():
    read = Reading()
    ahead = ReadAhead(read, long=ALWAYS)
    for step in range(5):
        ahead.begin(step)
        assert ahead.finish(step) == step * 10
    assert read.steps == [0, 1, 2, 3, 4]
    assert MAIN not in read.threads


def test_another_step_than_was_begun_is_read_anew():
    read = Reading()
    ahead = ReadAhead(read, long=ALWAYS)
    ahead.begin(1)
    assert ahead.finish(7) == 70
    ahead.begin(8)
    ahead.close()  # the step failed
    ahead.begin(8)
    assert ahead.finish(8) == 80
    assert read.steps == [1, 7, 8, 8]


@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_an_error_is_raised_where_it_ever_was(error):
    def read(step):
        raise error(step)

    ahead = ReadAhead(read, long=ALWAYS)
    ahead.begin(3)
    with pytest.raises(error) as caught:
        ahead.finish(3)
    assert caught.traceback[-1].frame.code.name == "read"


def test_what_knows_its_thread_is_read_there():
    """A sqlite connection may be used by the thread that made it only."""
    read = Reading()

    def bound(step):
        found = read(step)
        if threading.current_thread() is not MAIN:
            raise RuntimeError("made in another thread")
        return found

    ahead = ReadAhead(bound, long=ALWAYS)
    for step in range(3):
        ahead.begin(step)
        assert ahead.finish(step) == step * 10
    assert read.steps == [0, 0, 1, 2], "tried on a thread once"


class Threads(Points):
    """Notes the threads that samples are read on."""

    def __init__(self):
        super().__init__(48)
        self.seen = []

    def __getitem__(self, index):
        self.seen.append(threading.current_thread())
        return super().__getitem__(index)


def test_a_run_has_the_same_losses_and_reads_as_often():
    plain, data = Threads(), Threads()
    expected = losses(alone(job(data=lambda: plain)), 4)
    session = alone(job(data=lambda: data))
    session.worker.reading = ReadAhead(session.worker.fetch, long=ALWAYS)
    assert losses(session, 4) == expected
    assert len(data.seen) == len(plain.seen)
    assert MAIN in data.seen, "the first batch"
    assert len(set(data.seen)) == len(data.seen) / 12


def stream():
    yield {"x": 1}


@pytest.mark.parametrize(
    ("data", "ahead"),
    [
        (Points(48), False),
        (DataLoader(Points(48), batch_size=12, shuffle=True), False),
        (DataLoader(Points(48), batch_size=12, shuffle=True, num_workers=1), True),
        (stream(), False),
    ],
)
def test_no_thread_beside_processes_that_read_ahead(data, ahead):
    """Nor would they be started from one: what is forked then may hold locks for ever."""
    source = open_source(data, batch_size=12, seed=0)
    assert source.reads_ahead is ahead
    source.close()


class Clock:
    """A clock whose hands are set by what is read."""

    def __init__(self):
        self.now = self.used = 0.0

    def perf_counter(self):
        return self.now

    def thread_time(self):
        return self.used


@pytest.mark.parametrize(
    ("waits", "computes", "threads"),
    [
        ([1.0] * 6, 0.0, [False, False, False, True, True, True]),
        ([0.0] * 6, 1.0, [False] * 6),
        ([1.0, 1.0, 0.0, 1.0, 1.0, 1.0], 0.0, [False] * 6),
    ],
    ids=["waits", "computes", "waits at times"],
)
def test_what_waits_each_time_is_read_on_a_thread(monkeypatch, waits, computes, threads):
    clock, read = Clock(), Reading()
    monkeypatch.setattr(ahead_module, "time", clock)

    def slowly(step):
        clock.now += waits[step] + computes
        clock.used += computes
        return read(step)

    ahead = ReadAhead(slowly)
    for step in range(6):
        ahead.begin(step)
        ahead.finish(step)
    assert [thread is not MAIN for thread in read.threads] == threads
