"""That all do the same work, and what a group's times become."""

from __future__ import annotations

from benchmarks.harness.crew import Timed
from benchmarks.harness.measure import _results, different_work
from benchmarks.harness.result import FAILED, as_json, from_json
from benchmarks.harness.statistics import HOLDS
from benchmarks.harness.task import Task
from benchmarks.reach import GROUPS

COPIES = Task("ours", "gpt10m", 8, connected=False)
TASKS = {
    "copies A": COPIES,
    "copies B": COPIES,
    "data=2": Task("ours", "gpt10m", 8, plan="data=2"),
    "DDP": Task("ddp", "gpt10m", 8),
}
APART, TOGETHER = (6.4, 6.2, 6.1), (6.4, 6.3, 6.25)
EQUAL = {"copies A": APART, "copies B": APART, "data=2": TOGETHER, "DDP": TOGETHER}


def test_equal_work_passes():
    assert different_work(TASKS, EQUAL) == {}


def test_unconnected_copies_differ_after_the_first_step_and_may():
    assert different_work(TASKS, {**EQUAL, "copies B": (6.4, 5.0, 4.0)}) == {}


def test_another_first_loss_is_other_work():
    assert list(different_work(TASKS, {**EQUAL, "copies B": (6.5, 6.2, 6.1)})) == ["copies B"]


def test_another_third_loss_in_one_world_is_other_work():
    found = different_work(TASKS, {**EQUAL, "DDP": (6.4, 6.3, 6.26)})
    assert list(found) == ["DDP"]
    assert "not the same work" in found["DDP"]


def test_bf16_and_dropout_may_differ_by_more():
    tasks = {
        **TASKS,
        "bf16": Task("ours", "gpt10m", 8, plan="data=2,precision=bf16"),
        "dropout": Task("ours", "gpt10m", 8, plan="data=2", dropout=0.1),
    }
    losses = {**EQUAL, "bf16": (6.41, 6.31, 6.26), "dropout": (6.6, 6.4, 6.3)}
    assert different_work(tasks, losses) == {}
    assert list(different_work(tasks, {**losses, "bf16": (6.6, 6.5, 6.4)})) == ["bf16"]


def test_a_group_becomes_its_lines_and_the_failed_are_named():
    (group,) = [g for g in GROUPS if g.name == "data-8"]
    seconds = {"copies A": 2.0, "copies B": 2.0, "data=2": 2.02, "DDP": 2.2, "2 threads": 2.3}
    found = {name: [Timed(each, 0.0, (0, 0), ())] * 6 for name, each in seconds.items()}
    results = {r.key: r for r in _results(group, found, {"Accelerate": "no wheel"})}
    assert results["control-data-8"].verdict == HOLDS
    assert results["cost-8"].verdict == HOLDS
    assert results["ddp-8"].verdict == HOLDS
    assert results["accelerate-8"].verdict == FAILED
    assert "no wheel" in results["accelerate-8"].reason
    # 16 sequences of 256 tokens in either form
    assert results["2-threads-8"].ours == f"{4096 / 2.02:,.0f} tok/s"
    assert results["2-threads-8"].peer == f"{4096 / 2.3:,.0f} tok/s"


def test_results_survive_json():
    (group,) = [g for g in GROUPS if g.name == "gpt100k"]
    for rounds in (2, 9):
        found = {n: [Timed(0.01, 0.0, 0, ())] * rounds for n in group.contestants}
        results = _results(group, found, {})
        assert [from_json(as_json(r)) for r in results] == results
