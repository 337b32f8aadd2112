"""Reading checkpoints: damage is named and never loaded, a stranger's folder is not believed."""

from __future__ import annotations

import errno
import json
import os
import random

import pytest
import torch

from meshwright.errors import StorageError
from meshwright.run.checkpoint.digest import digest
from meshwright.run.checkpoint.manifest import record_of, seal
from meshwright.run.checkpoint.save import Piece, newest, open_checkpoint
from tests.run.saving import HEAD, resume_all, rows, save_all, two_ranks


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints of two ranks; the folder of the newest."""
    for step in (10, 20, 30):
        folder = save_all(tmp_path / "checkpoints", step, two_ranks(), {"plan": "data=2"})
    return folder


# ── damage ───────────────────────────────────────────────────────────────────────────────────────


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def refused(path):
    """The message with which a checkpoint is refused at the latest when all of it is read."""
    with pytest.raises(StorageError) as caught:
        read_all(path)
    return str(caught.value)


def read_all(path):
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.entries:
            checkpoint.read(name)


def test_no_flipped_bit_of_a_shard_is_read(saved):
    """Every bit of the header and a sample of the data, one at a time."""
    path = saved / "rank0.safetensors"
    size = path.stat().st_size * 8
    for bit in sorted(random.Random(0).sample(range(size), 400)):
        flip(path, bit)
        assert "does not match its digest" in refused(saved)
        flip(path, bit)
    with open_checkpoint(saved) as checkpoint:
        checkpoint.verify()


def test_a_flipped_bit_names_file_entry_region_and_digests(saved):
    flip(saved / "rank1.safetensors", (saved / "rank1.safetensors").stat().st_size * 8 - 1)
    message = refused(saved)
    assert message.startswith(f"checkpoint {saved} cannot be used: rank1.safetensors does not ")
    assert (
        "entry 'model/head' at [2, 0], shape [2, 8], bytes 128 to 191 of the file (expec" in message
    )


def test_other_entries_of_a_damaged_checkpoint_can_be_read(saved):
    """Digests are per piece: what is whole can be salvaged."""
    flip(saved / "rank1.safetensors", (saved / "rank1.safetensors").stat().st_size * 8 - 1)
    with open_checkpoint(saved) as checkpoint:
        assert torch.equal(checkpoint.read("model/bias"), torch.ones(8))
        assert torch.equal(checkpoint.read("model/head", (0, 0), (2, 8)), HEAD[:2])
        with pytest.raises(StorageError):
            checkpoint.read("model/head")


@pytest.mark.parametrize("length", [0, 4, 8, 60, -1])
def test_a_truncated_shard_is_refused_at_opening(saved, length):
    path = saved / "rank0.safetensors"
    size = path.stat().st_size
    os.truncate(path, length % size if length >= 0 else size - 1)
    with pytest.raises(StorageError, match=rf"rank0.safetensors has .*expected {size}: .*cut shor"):
        open_checkpoint(saved)


def test_a_shard_that_grew_is_refused(saved):
    with (saved / "rank0.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(StorageError, match="it has grown"):
        open_checkpoint(saved)


def test_shards_that_changed_places_are_refused(tmp_path):
    folder = save_all(tmp_path, 1, [[piece] for piece in rows("w", HEAD, [2, 2])])
    one, two = folder / "rank0.safetensors", folder / "rank1.safetensors"
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)
    assert "header does not match its digest" in refused(folder)


def test_a_shard_of_an_older_step_is_refused(tmp_path):
    old, new = (
        save_all(tmp_path, step, [[Piece("w", (4, 8), (0, 0), HEAD + step)]]) for step in (1, 2)
    )
    (new / "rank0.safetensors").write_bytes((old / "rank0.safetensors").read_bytes())
    assert "does not match its digest" in refused(new)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: (p / "rank1.safetensors").unlink(), "rank1.safetensors cannot be opened: No su"),
        (lambda p: (p / "manifest.json").unlink(), "there is no manifest.json in it"),
        (lambda p: (p / "manifest.json").write_bytes(b""), "it is no JSON"),
        (lambda p: os.truncate(p / "manifest.json", 300), "it is no JSON"),
        (lambda p: p.rename(p.with_name("step-00000031")), "there is no checkpoint"),
    ],
    ids=["shard", "manifest", "empty manifest", "half a manifest", "folder"],
)
def test_missing_parts_are_named(saved, break_it, message):
    break_it(saved)
    with pytest.raises(StorageError, match=message):
        open_checkpoint(saved)


def test_a_folder_that_was_renamed_to_another_step_is_refused(saved):
    moved = saved.rename(saved.with_name("step-00000031"))
    with pytest.raises(StorageError, match="its folder is of step 31, its manifest of 30"):
        open_checkpoint(moved)
    open_checkpoint(moved.rename(saved.with_name("best"))).close()


def test_the_folder_of_checkpoints_and_a_pickle_are_told_apart(saved, tmp_path):
    with pytest.raises(StorageError, match=r"did you mean .*step-00000030"):
        open_checkpoint(saved.parent)
    pickle = tmp_path / "model.pt"
    pickle.write_bytes(b"\x80\x04")
    with pytest.raises(StorageError, match="pickles, which can run commands"):
        open_checkpoint(pickle)


# ── a hostile checkpoint ─────────────────────────────────────────────────────────────────────────


def test_a_shard_that_is_a_link_is_not_followed(saved, tmp_path):
    path = saved / "rank0.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="it is a symbolic link"):
        open_checkpoint(saved)


def test_a_manifest_that_is_a_link_is_not_followed(saved, tmp_path):
    path = saved / "manifest.json"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="it is a symbolic link"):
        open_checkpoint(saved)


@pytest.mark.timeout(20)
def test_a_named_pipe_does_not_hang_the_reader(saved):
    path = saved / "rank0.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match="not a regular file"):
        open_checkpoint(saved)


def test_a_shard_that_is_a_folder_is_refused(saved):
    path = saved / "rank0.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="not a regular file"):
        open_checkpoint(saved)


def forge(saved, change):
    """Let a stranger who knows all digests change what the manifest says."""
    path = saved / "manifest.json"
    tree = json.loads(path.read_bytes())
    del tree["sha256"]
    change(tree)
    data = seal(tree)
    path.write_bytes(data)
    (saved / "commit.json").write_bytes(record_of(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["entries"]["model/head"].update(dtype="int32"), "expected int32"),
        (lambda t: t["entries"].update(x=t["entries"].pop("model/head")), "does not hold 'x@0,0'"),
        (
            lambda t: t["files"]["rank1.safetensors"].update(
                header="0" * len(t["files"]["rank1.safetensors"]["header"])
            ),
            "rank1.safetensors cannot be used: its header does not match its digest",
        ),
        (
            lambda t: t["files"].update({"rank2.safetensors": t["files"]["rank1.safetensors"]}),
            "rank2.safetensors cannot be opened",
        ),
    ],
    ids=["dtype", "name", "header", "files"],
)
def test_a_manifest_that_tells_another_story_than_its_shards_is_refused(saved, change, message):
    forge(saved, change)
    assert message in refused(saved)


def test_a_whole_manifest_without_its_own_record_is_refused(saved):
    record = (saved / "commit.json").read_bytes()
    forge(saved, lambda t: t["meta"].update(plan="data=4"))
    (saved / "commit.json").write_bytes(record)
    assert "manifest.json is not the one that commit.json is the record of" in refused(saved)


def places(saved):
    """The header of a shard of two ranks, as JSON."""
    data = (saved / "rank0.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


HEAD_KEY, BIAS_KEY = "model/head@0,0", "model/bias@0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[BIAS_KEY].update(data_offsets=[0, 32]), "a gap or overlap"),
        (lambda t: t[HEAD_KEY].update(data_offsets=[-64, 0]), "sizes that are no numbers"),
        (lambda t: t[HEAD_KEY].update(data_offsets=[64, 0]), "a gap or overlap"),
        (lambda t: t[HEAD_KEY].update(data_offsets=[8, 2**70]), "a gap or overlap"),
        (lambda t: t[HEAD_KEY].update(data_offsets=[8.0, 72]), "sizes that are no numbers"),
        (lambda t: t[HEAD_KEY].update(data_offsets=[8]), "none of safetensors"),
        (lambda t: t[HEAD_KEY].update(data_offsets="8"), "none of safetensors"),
        (lambda t: t[HEAD_KEY].update(shape=[2**40, 2**40]), "expected float32"),
        (lambda t: t[HEAD_KEY].update(shape=[8, 2]), "expected float32"),
        (lambda t: t[HEAD_KEY].update(shape=[True, 8]), "sizes that are no numbers"),
        (lambda t: t[HEAD_KEY].update(dtype="I32"), "is int32 [2, 8] of 64 bytes, expected float"),
        (lambda t: t[HEAD_KEY].update(dtype="F7"), "none of safetensors"),
        (lambda t: t[HEAD_KEY].update(dtype=["F32"]), "none of safetensors"),
        (lambda t: t.update({HEAD_KEY: None}), "none of safetensors"),
        (lambda t: t.pop(HEAD_KEY), "its header tells of"),
        (
            lambda t: t.update(more={"dtype": "F32", "shape": [1], "data_offsets": [104, 108]}),
            "the f",
        ),
        (lambda t: t.update({"n@0,0": t.pop(HEAD_KEY)}), "does not hold 'model/head@0,0'"),
    ],
    ids=range(17),
)
def test_a_header_that_cannot_be_is_refused_though_its_digest_fits(saved, change, message):
    table, data = places(saved)
    change(table)
    text = json.dumps(table).encode()
    reshard(saved, len(text).to_bytes(8, "little") + text, data)
    told = refused(saved)
    assert message in told
    assert "rank0.safetensors" in told


def reshard(saved, header, data):
    """Another file for rank 0, with the digests and the length that it has."""
    (saved / "rank0.safetensors").write_bytes(header + data)

    def change(tree):
        claim = tree["files"]["rank0.safetensors"]
        kind = claim["digest"]
        claim.update(bytes=len(header + data), header=digest(kind, header))

    forge(saved, change)


@pytest.mark.parametrize(
    "header",
    [b"", b"1234567", (2).to_bytes(8, "little") + b"[]", (10**17).to_bytes(8, "little"), b"x" * 90],
    ids=["none", "short", "list", "huge", "letters"],
)
def test_a_shard_that_is_no_safetensors_is_refused_though_its_digest_fits(saved, header):
    size = len(places(saved)[1])
    path = saved / "rank0.safetensors"
    path.write_bytes(header + b"x" * size)
    length = int.from_bytes((header + b"x" * size)[:8], "little")
    whole = (header + b"x" * size)[: 8 + min(length, 10**8)]

    def change(tree):
        claim = tree["files"]["rank0.safetensors"]
        claim.update(bytes=len(header) + size, header=digest(claim["digest"], whole))

    forge(saved, change)
    assert "rank0.safetensors cannot be used: its header is none of" in refused(saved)


def test_a_shard_of_another_save_beside_the_others_is_told(saved):
    (saved / "rank7.safetensors").write_bytes((saved / "rank1.safetensors").read_bytes())
    with pytest.raises(
        StorageError, match=r"'rank7.safetensors' lies in it, and manifest.json does"
    ):
        open_checkpoint(saved)


@pytest.mark.parametrize("name", ["rank0.safetensors", "manifest.json", "commit.json"])
def test_what_may_not_be_read_is_named(saved, monkeypatch, name):
    perform = os.open  # root may read everything, so the kernel's answer is given here

    def refusing(path, *rest, **named):
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return perform(path, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(StorageError, match=f"{name} cannot be opened: Permission denied"):
        open_checkpoint(saved)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(StorageError, match=r"is no checkpoint: there is no manifest\.json in it$"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_while_it_is_open_is_told_not_read_past_its_end(saved):
    with open_checkpoint(saved) as checkpoint:
        checkpoint.read("model/bias")
        os.truncate(saved / "rank0.safetensors", 150)
        with pytest.raises(StorageError, match=r"rank0.safetensors ends at byte .*cut short"):
            checkpoint.read("model/head")


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────


def test_the_newest_whole_one_is_found_and_the_damaged_are_told(saved):
    flip(saved / "rank1.safetensors", 1000)
    (saved.with_name("step-00000020") / "rank0.safetensors").unlink()
    found = resume_all(saved.parent)
    assert found.path == saved.with_name("step-00000010")
    assert len(found.damaged) == 2
    assert "step-00000030 cannot be used: rank1.safetensors" in found.damaged[0]
    assert "step-00000020 cannot be used: rank0.safetensors" in found.damaged[1]
    assert newest(saved.parent) == found.path


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_damage_is_found_whichever_rank_reads_the_file(saved, size):
    flip(saved / "rank1.safetensors", (saved / "rank1.safetensors").stat().st_size * 8 - 1)
    assert resume_all(saved.parent, size).path == saved.with_name("step-00000020")


def test_a_step_can_be_asked_for(saved):
    assert resume_all(saved.parent, at=20).path == saved.with_name("step-00000020")
    with pytest.raises(StorageError, match=r"no checkpoint of step 25; .* of steps 10, 20, 30"):
        resume_all(saved.parent, at=25)


def test_a_damaged_step_that_was_asked_for_is_refused_with_another_to_take(saved):
    flip(saved / "rank1.safetensors", (saved / "rank1.safetensors").stat().st_size * 8 - 1)
    with pytest.raises(StorageError) as caught:
        resume_all(saved.parent, at=30)
    lines = str(caught.value).splitlines()
    assert "rank1.safetensors does not match its digest" in lines[0]
    assert lines[1] == "the checkpoint of step 20 is whole: ask for that one"


def test_damaged_ones_alone_are_an_error_not_a_fresh_start(saved):
    for folder in saved.parent.iterdir():
        (folder / "rank0.safetensors").unlink()
    with pytest.raises(StorageError, match="no older checkpoint is whole either; --fresh"):
        resume_all(saved.parent)
