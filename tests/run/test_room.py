"""Who lacks memory: by a process's own limits, or by what ranks of a host share."""

from __future__ import annotations

import resource

from meshwright.run import room
from meshwright.run.room import machine_free, process_free, short


def need(still, own=None, free=1000, host="a", held=10, sure=None):
    known = {"host": host, "held": held, "still": still, "sure": still if sure is None else sure}
    return {**known, "own": own, "free": [free, "here"]}


def test_ranks_of_a_host_share_what_is_free():
    assert short([need(500), need(500)]) is None
    found = short([need(400), need(700)])
    assert (found.rank, found.why) == (1, "here for its 2 ranks")
    assert found.room == 10 + 1000 * 700 // 1100
    assert short([need(400), need(700, host="b")]) is None


def test_a_process_has_limits_of_its_own():
    assert short([need(50, own=[50, "RLIMIT_DATA"])]) is None
    found = short([need(1), need(60, own=[50, "RLIMIT_DATA"])])
    assert (found.rank, found.room, found.why) == (1, 60, "by RLIMIT_DATA")


def test_what_is_an_estimate_is_tried_where_that_ends_in_an_error():
    """Not where it ends in a kill."""
    assert short([need(60, own=[50, "RLIMIT_DATA"], sure=50)]) is None
    assert short([need(60, free=50, sure=50)]).rank == 0


def test_who_lacks_most_is_told():
    found = short([need(60, own=[50, "own"]), need(90, own=[50, "own"])])
    assert found.rank == 1


def test_limits_are_read_from_the_kernel(monkeypatch):
    free, why = machine_free()
    assert free > 0
    assert why in ("on this machine", "in this control group")
    assert process_free() is None or process_free()[0] > 0
    limits = {resource.RLIMIT_DATA: (2**40, 2**40)}
    unlimited = (resource.RLIM_INFINITY,) * 2
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits.get(which, unlimited))
    left, which = process_free()
    assert which == "RLIMIT_DATA"
    assert 2**39 < left < 2**40


def test_a_control_group_counts_where_it_has_less(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("1000\n")
    (tmp_path / "now").write_text("400\n")
    monkeypatch.setattr(room, "_CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "now")),))
    assert machine_free() == (600, "in this control group")
    (tmp_path / "max").write_text("max\n")
    assert machine_free()[1] == "on this machine"
