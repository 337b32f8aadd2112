"""Disks that refuse: every rank gets the same StorageError, and nothing saved before is touched."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess

import pytest
import torch

from meshwright.comm.base import Group
from meshwright.comm.local import run_local
from meshwright.errors import StorageError
from meshwright.run.checkpoint.save import newest, save
from tests.run.saving import rows, save_all
from tests.run.saving_killed import path_of

RANKS = 4


def pieces(rows_each=2):
    tensor = torch.arange(RANKS * rows_each * 64.0).reshape(-1, 64)
    return [[piece] for piece in rows("w", tensor, [rows_each] * RANKS)]


def failing_save(root, ranks, step=20):
    """Save; the one message with which all ranks failed."""
    group = Group.world(RANKS)
    messages = {}

    def guarded(rank):
        try:
            yield from save(root, step, ranks[rank], {}, group, rank)
        except StorageError as error:
            messages[rank] = str(error)

    run_local([guarded(rank) for rank in range(RANKS)])
    assert sorted(messages) == list(range(RANKS))
    assert len(set(messages.values())) == 1
    return messages[0]


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refuse(monkeypatch, name, part, number, after=0):
    """Let `os.<name>` fail with errno `number` at its call `after` on a path that has `part`."""
    perform = getattr(os, name)
    calls = []

    def refusing(target, *rest, **named):
        path = str(path_of(target))
        if part in path:
            calls.append(path)
            if len(calls) > after:
                raise OSError(number, os.strerror(number), *([path] if name == "mkdir" else []))
        return perform(target, *rest, **named)

    monkeypatch.setattr(os, name, refusing)
    return calls


@pytest.mark.parametrize(
    ("name", "part", "number", "after", "message"),
    [
        ("write", "rank2", errno.ENOSPC, 0, "rank 2: .*No space left on device; free space"),
        ("write", "rank2", errno.ENOSPC, 1, "rank 2: .*No space left on device; free space"),
        ("fsync", "rank3", errno.EIO, 0, "rank 3: .*Input/output error"),
        ("open", "rank1", errno.ENOENT, 0, "rank 1: .*every host must see this folder"),
        ("write", "manifest.json", errno.ENOSPC, 0, "rank 0: .*No space left"),
        ("fsync", "manifest.json", errno.EDQUOT, 0, "rank 0: .*free space under your quota"),
        ("mkdir", ".step-", errno.EROFS, 0, "rank 0: .*a disk that can be written to"),
        ("rename", ".step-", errno.EACCES, 0, "rank 0: .*a folder that you may write to"),
    ],
)
def test_one_rank_fails_and_all_learn_of_it(
    tmp_path, monkeypatch, name, part, number, after, message
):
    save_all(tmp_path, 10, pieces())
    before = contents(tmp_path)
    calls = refuse(monkeypatch, name, part, number, after)
    told = failing_save(tmp_path, pieces())
    monkeypatch.undo()

    assert len(calls) > after
    with pytest.raises(StorageError, match=message):
        raise StorageError(told)
    assert told.startswith("saving the checkpoint of step 20 failed: rank ")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    assert newest(tmp_path) == tmp_path / "step-00000010"
    save_all(tmp_path, 20, pieces())  # once the disk has room again
    assert newest(tmp_path) == tmp_path / "step-00000020"


def test_all_ranks_failing_is_told_shortly(tmp_path, monkeypatch):
    refuse(monkeypatch, "write", "rank", errno.ENOSPC)
    told = failing_save(tmp_path, pieces())
    assert told.count("No space left") == 3
    assert told.endswith("(and 1 more ranks)")


def test_old_checkpoints_that_cannot_be_removed_do_not_stop_a_run(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        save_all(tmp_path, step, pieces(), keep=2)
    refuse(monkeypatch, "rename", "step-00000001", errno.EACCES)
    save_all(tmp_path, 3, pieces(), keep=2)
    monkeypatch.undo()
    assert "could not remove the old checkpoint" in caplog.text
    assert newest(tmp_path) == tmp_path / "step-00000003"
    save_all(tmp_path, 4, pieces(), keep=2)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_size_limit_of_the_kernel(tmp_path):
    """A real refusal: the kernel takes a part of a write, then says EFBIG."""
    save_all(tmp_path, 10, pieces())
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        told = failing_save(tmp_path, pieces(rows_each=1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in told
    assert contents(tmp_path) == before
    assert newest(tmp_path) == tmp_path / "step-00000010"


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of one megabyte, where this machine lets us mount one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("there is no mount command")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root (the other tests of a full disk run everywhere)")
    yield folder
    subprocess.run([umount, folder], check=True)


def test_a_disk_that_is_really_full(tiny_disk):
    root = tiny_disk / "checkpoints"
    save_all(root, 10, pieces(rows_each=200))
    before = contents(root)
    for step in (20, 30, 40):  # a failed save gives its space back, however often
        told = failing_save(root, pieces(rows_each=1000), step)
        assert "No space left on device" in told
    assert contents(root) == before
    save_all(root, 50, pieces(rows_each=200))
    assert newest(root) == root / "step-00000050"
