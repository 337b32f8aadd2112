"""Killed, or without power, at any moment of a save: what was there before is there, or the new."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meshwright.run.checkpoint.restore import is_committed
from meshwright.run.checkpoint.retention import listed
from meshwright.run.checkpoint.save import newest, open_checkpoint
from tests.run.saving import HEAD
from tests.run.saving_killed import SCENARIOS, digests, path_of, save_step


def check_whole(path):
    """Everything in a checkpoint verifies and is what was saved."""
    with open_checkpoint(path) as checkpoint:
        checkpoint.verify()
        assert torch.equal(checkpoint.read("model/head"), HEAD)
        return checkpoint.step, checkpoint.meta["generation"]


def visible(root):
    """What a reader looks at: whatever says that its saving came to its end."""
    found = listed(path.name for path in root.iterdir()) if root.is_dir() else []
    return [saved for saved in found if is_committed(root / saved.name)]


def check_after_crash(root, before, step):
    """All that is visible is whole, nothing old is lost before the new one is in; its newest."""
    found = [check_whole(root / saved.name) for saved in visible(root)]
    new_is_in = (step, "new") in found
    if not new_is_in:
        assert {(old, "old") for old in before} <= set(found)
    else:
        assert len({found_step for found_step, _ in found}) >= min(2, len({*before, step}))
    path = newest(root)
    return check_whole(path) if path else None


def killing(*words):
    """What `saving_killed` says after killing real processes."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.saving_killed", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_killed(folder, found):
    """What each killed save left; how many there were."""
    for name, told in found.items():
        scenario, how = name.split("-")
        before, step = SCENARIOS[scenario]
        labels = {int(at): label for at, label in told["labels"].items()}
        old = (max(before), "old") if before else None
        outcomes = []
        for at, label in sorted(labels.items()):
            root = folder / f"{name}-{at}"
            outcomes.append(check_after_crash(root, before, step))
            assert outcomes[-1] in (old, (step, "new"))
            check_unchanged(root, told["before"])
            if label is None:
                assert outcomes[-1] == (step, "new")
            save_step(root, 30, "later", how)  # a later save goes on, and cleans up
            assert newest(root) == root / "step-00000030"
            assert not [path for path in root.iterdir() if path.name.startswith(".")]
        turn = outcomes.index((step, "new"))
        assert outcomes == [old] * turn + [(step, "new")] * (len(outcomes) - turn)
    return sum(len(told["labels"]) - 1 for told in found.values())


def check_unchanged(root, before):
    """What was there before and still counts has not changed a byte."""
    for saved in visible(root):
        if check_whole(root / saved.name)[1] == "old":
            name = saved.name.removesuffix(".replaced")
            then = {path: told for path, told in before.items() if path.startswith(f"{name}/")}
            assert then
            assert {f"{name}/{p}": told for p, told in digests(root / saved.name).items()} == then


@pytest.mark.mp
@pytest.mark.timeout(180)
def test_killed_at_some_disk_operations(tmp_path):
    found = killing(tmp_path, "every", 7)
    assert check_killed(tmp_path, found) >= 30


@pytest.mark.mp
@pytest.mark.timeout(180)
def test_killed_at_random_moments(tmp_path):
    assert killing(tmp_path, "random", 20, 0) > 1


@pytest.mark.mp
@pytest.mark.matrix
@pytest.mark.timeout(600)
def test_killed_at_every_disk_operation(tmp_path):
    found = killing(tmp_path, "every", 1)
    for name, told in found.items():
        labels = list(told["labels"].values())[:-1]
        ranks = [labels.count(f"write rank{rank}.safetensors") for rank in range(2)]
        # On threads the ranks' operations come in another order each time.
        assert all(ranks) if name.endswith("now") else sum(ranks) >= 2
        assert "write commit.json" in labels
        assert sum(label.startswith("fsync") for label in labels) >= 5
        assert any(label.startswith("rename .step") for label in labels)
        if name.startswith(("again", "retire")):
            assert any(label.startswith("unlink") for label in labels)
    assert check_killed(tmp_path, found) >= 200


@pytest.mark.mp
@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_many_random_moments(tmp_path, seed):
    assert killing(tmp_path, "random", 150, seed) > 10


# ── power cuts: what was not synced may be lost ──────────────────────────────────────────────────


class Disk:
    """Files and folders as a disk keeps them: what is seen, and what was synced of it.

    After a power cut each file holds what was synced, what was seen, or a part; each folder has
    the names that were synced or those that were seen.
    """

    def __init__(self):
        self.seen = {}  # a folder is a dict of names, a file a bytearray
        self.synced = {}  # id of a folder or file -> a copy when it was last synced
        self.alive = []  # so that ids stay unique

    def at(self, path):
        node = self.seen
        for part in path:
            node = node[part]
        return node

    def perform(self, operation, path, argument=None):
        *folder, name = path or [None]
        match operation:
            case "create" | "mkdir":
                node = bytearray() if operation == "create" else {}
                self.alive.append(node)
                self.at(folder)[name] = node
            case "write":
                self.at(path).extend(argument)
            case "sync":
                self.synced[id(self.at(path))] = self.at(path).copy()
            case "rename":
                *to, target = argument
                self.at(to)[target] = self.at(folder).pop(name)
            case "remove":
                del self.at(folder)[name]

    def cut(self, node, choose):
        """What is found of a folder or file when the power is back."""
        synced = self.synced.get(id(node), type(node)())
        if isinstance(node, dict):
            kept = synced if choose() else node
            return {name: self.cut(inner, choose) for name, inner in kept.items()}
        if choose():
            return synced
        return node[: (len(node) + len(synced)) // 2] if choose() else node


def write_out(tree, folder):
    folder.mkdir()
    for name, node in tree.items():
        if isinstance(node, dict):
            write_out(node, folder / name)
        else:
            (folder / name).write_bytes(node)


def read_in(folder, disk, path=()):
    """Put a real folder on the simulated disk, synced."""
    for item in sorted(folder.iterdir()):
        place = [*path, item.name]
        if item.is_dir():
            disk.perform("mkdir", place)
            read_in(item, disk, place)
        else:
            disk.perform("create", place)
            disk.perform("write", place, item.read_bytes())
        disk.perform("sync", place)
    if not path:
        disk.perform("sync", [])


def recorded(monkeypatch, root, act):
    """The disk operations under `root` that `act()` makes, as arguments of `Disk.perform`."""
    log = []

    def parts(target, dir_fd=None):
        path = path_of(target if dir_fd is None else dir_fd)
        path = path if dir_fd is None else path / target
        return list(path.relative_to(root).parts) if path.is_relative_to(root) else None

    def hook(name, note):
        perform = getattr(os, name)

        def hooked(target, *rest, dir_fd=None, **named):
            place = parts(target, dir_fd)
            extra = {} if dir_fd is None else {"dir_fd": dir_fd}
            answer = perform(target, *rest, **extra, **named)
            if place is not None:
                note(place, answer, *rest)
            return answer

        monkeypatch.setattr(os, name, hooked)

    hook("write", lambda place, count, data: log.append(("write", place, bytes(data[:count]))))
    hook("fsync", lambda place, _: log.append(("sync", place)))
    hook("rename", lambda place, _, to: log.append(("rename", place, parts(to))))
    hook("mkdir", lambda place, *_: log.append(("mkdir", place)))
    for name in ("unlink", "rmdir"):
        hook(name, lambda place, *_: log.append(("remove", place)))
    hook(
        "open",
        lambda place, _, flags, *mode: flags & os.O_CREAT and log.append(("create", place)),
    )
    act()
    monkeypatch.undo()
    return log


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_power_at_every_disk_operation(tmp_path, monkeypatch, scenario):
    before, step = SCENARIOS[scenario]
    root = tmp_path / "real"
    root.mkdir()
    for old in before:
        save_step(root, old, "old")
    disk, numbers = Disk(), itertools.count()
    read_in(root, disk)
    log = recorded(monkeypatch, root, lambda: save_step(root, step, "new"))
    assert {operation for operation, *_ in log} >= {"create", "write", "sync", "mkdir", "rename"}

    dice = random.Random(0)
    choices = [lambda: True, lambda: False, *[lambda: dice.random() < 0.5] * 4]
    for k, operation in enumerate([None, *log]):
        if operation is not None:
            disk.perform(*operation)
        for choose in choices:
            left = tmp_path / str(next(numbers))
            write_out(disk.cut(disk.seen, choose), left)
            outcome = check_after_crash(left, before, step)
            if k == len(log):
                assert outcome == (step, "new")  # once `save` has answered, it stays


def test_the_simulated_disk_loses_what_was_not_synced(tmp_path):
    """A save that forgets to sync is caught: else the test above could not fail."""
    disk = Disk()
    disk.perform("mkdir", ["a"])
    disk.perform("create", ["a", "f"])
    disk.perform("write", ["a", "f"], b"1234")
    assert disk.cut(disk.seen, lambda: True) == {}
    assert disk.cut(disk.seen, lambda: False) == {"a": {"f": b"1234"}}
    turns = iter([False, False, False, True])
    assert disk.cut(disk.seen, lambda: next(turns)) == {"a": {"f": b"12"}}
    disk.perform("sync", ["a", "f"])
    disk.perform("sync", [])
    assert disk.cut(disk.seen, lambda: True) == {"a": {}}
    disk.perform("sync", ["a"])
    assert disk.cut(disk.seen, lambda: True) == {"a": {"f": b"1234"}}


@pytest.mark.parametrize("forgotten", ["files", "folders"])
def test_a_save_that_did_not_sync_would_be_caught(tmp_path, monkeypatch, forgotten):
    root = tmp_path / "real"
    root.mkdir()
    disk = Disk()
    read_in(root, disk)
    log = recorded(monkeypatch, root, lambda: save_step(root, 20, "new"))
    for operation, place, *rest in log:
        is_file = bool(place) and "." in place[-1][1:]
        is_file = is_file and place[-1].endswith((".safetensors", ".json"))
        if operation != "sync" or is_file != (forgotten == "files"):
            disk.perform(operation, place, *rest)
    dice = random.Random(0)
    broken = 0
    for k in range(20):
        write_out(disk.cut(disk.seen, lambda: dice.random() < 0.5), tmp_path / str(k))
        try:
            broken += check_after_crash(tmp_path / str(k), (), 20) != (20, "new")
        except Exception:  # noqa: BLE001 (whatever is wrong with it, it was noticed)
            broken += 1
    assert broken > 0
