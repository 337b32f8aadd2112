"""The reach table: names that fit, the control everywhere, peers on equal terms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import contestants
from benchmarks.harness.lines import CONTROL
from benchmarks.models import SHAPES
from benchmarks.page.page import page, renewed
from benchmarks.reach import COLLECTIVES, CROWDED, GROUPS, SECTIONS
from benchmarks.special import KB, MB, collective_lines

MODULES = {path.stem for path in Path(contestants.__path__[0]).glob("*.py")} - {"torch_loop"}


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_lines_name_contestants_of_their_group(group):
    for section, line in group.lines:
        assert {line.ours, *line.others} <= set(group.contestants)
        assert section in SECTIONS


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_every_group_has_the_control_and_equal_work(group):
    tasks = group.contestants
    first, second = (tasks[name] for name in CONTROL)
    assert first == second
    assert first.module == "ours"
    assert not first.connected
    for task in tasks.values():
        assert task.module in MODULES
        assert task.model in SHAPES
        assert task.rows * task.ranks == group.rows * group.ranks
        alone = not task.connected and task.ranks == 1 and "pipe" in group.name
        assert alone or task.threads * task.ranks == group.ranks


def test_keys_are_unique():
    keys = [line.key for group in GROUPS for line in (group.control, *(x for _, x in group.lines))]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("size", "ranks", "sections"),
    [
        (4 * KB, 2, [COLLECTIVES] * 2),
        (64 * KB, 2, []),
        (16 * MB, 2, [COLLECTIVES]),
        (4 * KB, 4, [CROWDED]),
        (256 * MB, 4, [CROWDED]),
    ],
)
def test_collectives_are_asked_by_size_and_ranks(size, ranks, sections):
    seconds = {"ours": [1e-5] * 6, "gloo": [1e-3] * 6, "copy": [9e-6] * 6}
    cell = {"ranks": ranks, "op": "all_reduce", "bytes": size, "seconds": seconds}
    found = collective_lines(cell)
    assert [r.section for r in found] == sections
    assert all(r.verdict == "holds" for r in found)


def test_a_page_without_any_group_says_how_and_what_broke():
    machine = {
        "processor": "P", "cores": 2, "memory_bytes": 2**30, "system": "S", "python": "3",
        "versions": {}, "peers": {}, "commit": "c", "load": 0.0, "began": "now",
    }  # fmt: skip
    raw = {"machine": machine, "groups": {}, "minutes": 0.0, "load_at_end": 0.0}
    written = page(raw | {"broken": {"curve": "it broke"}}, [])
    assert "How it is measured" in written
    assert "curve did not run: it broke" in written


def test_parts_take_the_place_of_what_the_page_had(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    kept = {"machine": {"began": "then"}, "groups": {"a": {"results": [1]}, "b": {"results": [2]}}}
    (tmp_path / "benchmarks" / "raw.json").write_text(json.dumps(kept))
    found = renewed({"machine": {"began": "now"}, "groups": {"b": {"results": [3]}}}, tmp_path)
    assert found["groups"] == {"a": {"results": [1]}, "b": {"results": [3]}}
    assert found["machine"] == {"began": "then"}
