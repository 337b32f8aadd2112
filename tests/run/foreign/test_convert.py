"""Any format to any other: nothing is lost on the way, nor held twice in memory."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meshwright.errors import StorageError, UsageError
from meshwright.run.checkpoint.region import whole
from meshwright.run.checkpoint.save import open_checkpoint
from meshwright.run.foreign.convert import FORMATS, checked, convert, open_source, usual_format
from meshwright.run.foreign.sidecar import SIDECAR
from meshwright.run.foreign.source import Item, Source, bare, kind
from tests.run.foreign.things import bits, entries, held, meta, source, wanted

FULL = [name for name, kinds in FORMATS.items() if "optimizer" in kinds]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of every kind of tensor."""
    path = tmp_path_factory.mktemp("first") / "step-00000020"
    convert(source(), path, "meshwright")
    return path


def test_a_checkpoint_is_itself(checkpoint):
    with open_checkpoint(checkpoint) as found:
        found.verify()
        assert found.step == 20
        assert found.meta == meta()
        assert {n: bits(found.read(n)) for n in found.entries} == wanted(entries())


@pytest.mark.parametrize("form", FORMATS)
def test_there_and_back_to_the_bit(checkpoint, tmp_path, form):
    written = convert(open_source(checkpoint), tmp_path / "there", form)
    there = open_source(tmp_path / "there")
    assert there.format == form
    assert there.check() == ("digests" if form == "meshwright" else "sha256")
    convert(there, tmp_path / "back", "meshwright")
    back = open_source(tmp_path / "back")
    want = {name: value for name, value in entries().items() if kind(name) in FORMATS[form]}
    assert held(there) == held(back) == wanted(want)
    assert written.tensors == len(want)
    assert {*written.left_out, *want} == set(entries())
    assert back.step == 20
    assert back.meta == (meta() if form in FULL else {**meta(), "imported": form})


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "meshwright"])
def test_without_what_stands_beside_it_the_tensors_are_still_there(checkpoint, tmp_path, form):
    convert(open_source(checkpoint), tmp_path / "there", form)
    (tmp_path / "there" / SIDECAR).unlink()
    found = open_source(tmp_path / "there")
    assert found.meta is None
    assert found.check() == ("nothing" if form == "safetensors" else "crc32")
    want = {name: value for name, value in entries().items() if kind(name) in FORMATS[form]}
    tied = {"model/head.weight": want["model/wte.weight"]} if form in ("dcp", "torch") else {}
    flat = held(found)
    if form != "universal":
        want = {n.replace("buffer/", "model/"): value for n, value in want.items()}
    assert flat == wanted({**want, **tied})


@pytest.mark.parametrize("first", FULL)
@pytest.mark.parametrize("second", FULL)
def test_one_foreign_format_to_another(tmp_path, first, second):
    convert(source(), tmp_path / "a", first)
    convert(open_source(tmp_path / "a"), tmp_path / "b", second)
    assert held(open_source(tmp_path / "b")) == wanted(entries())
    assert open_source(tmp_path / "b").meta == meta()


def test_what_else_a_run_keeps_stays_in_its_own_format(tmp_path):
    more = {**entries(), "average/wte.weight": torch.ones(3)}
    assert convert(source(more), tmp_path / "a", "meshwright").left_out == ()
    assert held(open_source(tmp_path / "a")) == wanted(more)
    assert convert(source(more), tmp_path / "b", "dcp").left_out == ("average/wte.weight",)
    assert open_source(tmp_path / "b").meta["imported"] == "dcp"  # nothing goes on from a part


def test_the_usual_format_keeps_the_optimizer():
    assert usual_format(source()) == "meshwright"
    assert usual_format(source({"model/w": torch.ones(2)})) == "safetensors"


# ── memory ──────────────────────────────────────────────────────────────────────────────────────

COUNT, BYTES = 12, 4 << 20


def anonymous():
    """Bytes of memory of this process that are no file's."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def large():
    """Tensors that are made when they are read, so that nobody but the writer holds them."""
    items = {f"model/{n}": Item("float32", (BYTES // 4,)) for n in range(COUNT)}

    def boxes(name):
        yield whole((BYTES // 4,)), torch.full((BYTES // 4,), float(bare(name)))

    return Source("memory", Path("nowhere"), items, boxes, lambda: "nothing", 1)


@pytest.mark.parametrize("form", FORMATS)
def test_one_tensor_is_in_memory_at_a_time(tmp_path, form, monkeypatch):
    """What is read from files is mapped: written from there, no whole model is ever held."""
    if form == "meshwright":
        convert(large(), tmp_path / "from", "safetensors")
    else:
        convert(large(), tmp_path / "from", form)
    found = open_source(tmp_path / "from")
    most, written, write = [0], [0], os.write
    start = anonymous()

    def watched(file, data):
        most[0] = max(most[0], anonymous() - start)
        written[0] += len(data)
        return write(file, data)

    monkeypatch.setattr(os, "write", watched)
    convert(found, tmp_path / "to", "meshwright" if form == "meshwright" else "safetensors")
    assert written[0] >= COUNT * BYTES
    assert most[0] < 4 * BYTES < COUNT * BYTES


# ── what cannot be written, and what cannot be read ─────────────────────────────────────────────


def test_a_folder_that_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    convert(source(), tmp_path / "out", "torch")  # empty: that is where it goes
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(UsageError, match="there already and not empty"):
        convert(source(), tmp_path / "out", "torch")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="there already"):
        convert(source(), tmp_path / "file", "torch")
    assert sorted((tmp_path / "out").iterdir()) == before


def test_the_name_of_another_step(tmp_path):
    with pytest.raises(UsageError, match="another step's checkpoint; this one's is step-00000020"):
        convert(source(), tmp_path / "step-00000021", "meshwright")
    convert(source(), tmp_path / "step-00000021", "torch")  # there it is a name like any other


@pytest.mark.parametrize("form", FORMATS)
def test_a_disk_that_refuses_leaves_nothing(tmp_path, form, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        convert(source(), tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_half_way_leaves_nothing(tmp_path):
    def boxes(name):
        if name == "model/scalar":
            raise StorageError("scalar is damaged")
        return source().boxes(name)

    with pytest.raises(StorageError, match="scalar is damaged"):
        convert(replace(source(), boxes=boxes), tmp_path / "out", "safetensors")
    assert list(tmp_path.iterdir()) == []


def test_below_a_file_no_folder_can_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        convert(source(), tmp_path / "file" / "out", "torch")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda p: None, "there is nothing at"),
        (lambda p: p.mkdir(), "is empty, but no checkpoint"),
        (lambda p: (p.mkdir(), (p / "x.txt").touch()), r"holds x\.txt, but no checkpoint"),
        (lambda p: (p.mkdir(), (p / "a.pt").touch(), (p / "b.pt").touch()), "holds 2 torch files"),
        (os.mkfifo, "neither a file nor a folder"),
        (lambda p: (p.mkdir(), (p / "a.safetensors").touch()), "cannot be read"),
        (lambda p: (p.mkdir(), (p / ".metadata").mkdir()), "not a regular file"),
    ],
    ids=["nothing", "empty", "other", "several", "pipe", "cut", "folder"],
)
def test_what_is_no_checkpoint(tmp_path, make, word):
    make(tmp_path / "it")
    with pytest.raises(StorageError, match=word):
        open_source(tmp_path / "it")


def test_a_missing_shard_is_named(tmp_path):
    from meshwright.run.foreign.hub import write_hub

    files = write_hub(source(), tmp_path, shard_bytes=100)
    gone = min(files.values())
    (tmp_path / gone).unlink()
    with pytest.raises(StorageError, match=gone):
        open_source(tmp_path)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "meshwright"])
def test_any_changed_byte_is_found_by_its_file(tmp_path, form):
    convert(source(), tmp_path / "out", form)
    files = [f for f in (tmp_path / "out").rglob("*") if f.is_file() and f.name != SIDECAR]
    for file in files[:6]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
        found = checked(tmp_path / "out")
        assert not found["whole"]
        assert file.name in found["problem"]
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    assert checked(tmp_path / "out")["whole"]


LIES = {
    "step": (lambda t: t.update(step=-1), "the step is"),
    "traversal": (lambda t: t["files"].update({"../x": t["files"].popitem()[1]}), "no file inside"),
    "absolute": (lambda t: t["files"].update({"/x": t["files"].popitem()[1]}), "no file inside"),
    "missing": (lambda t: t["files"].update(x=t["files"].popitem()[1]), "x cannot be opened"),
    "length": (lambda t: next(iter(t["files"].values())).update(bytes=3), "says 3"),
    "digest": (lambda t: next(iter(t["files"].values())).update(sha256="no"), "claim of"),
    "keys": (lambda t: t.update(more=1), "must hold"),
    "buffers": (lambda t: t.update(buffers=[3]), "list of names"),
    "meta": (lambda t: t.update(meta=[]), "meta must be a JSON object"),
    "files": (lambda t: t.update(files=[]), "is damaged"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_stands_beside_may_lie(tmp_path, lie):
    import json

    from meshwright.run.checkpoint.manifest import seal

    convert(source(), tmp_path / "out", "safetensors")
    path = tmp_path / "out" / SIDECAR
    tree = json.loads(path.read_text())
    del tree["sha256"]
    change, word = LIES[lie]
    change(tree)
    path.write_bytes(seal(tree))
    with pytest.raises(StorageError, match=word):
        open_source(tmp_path / "out")


def test_what_stands_beside_is_read_whole_or_not_at_all(tmp_path):
    convert(source(), tmp_path / "out", "torch")
    path = tmp_path / "out" / SIDECAR
    data = path.read_bytes()
    for damaged in (data[:-1], data[1:], data.replace(b"zero3", b"zero2"), b"", b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=SIDECAR):
            open_source(tmp_path / "out")
