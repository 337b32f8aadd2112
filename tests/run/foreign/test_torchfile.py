"""Files of torch.save: all that torch reads is read alike, and nothing is run or believed."""

from __future__ import annotations

import argparse
import collections
import io
import warnings
import zipfile

import pytest
import torch
from torch import nn

from meshwright.errors import StorageError
from meshwright.run.foreign.mapped import check, mapped
from meshwright.run.foreign.statedict import open_statedict
from meshwright.run.foreign.symbols import Global, Made, Persistent
from meshwright.run.foreign.torchfile import listed, open_torch
from meshwright.run.foreign.torchwrite import Stored, archive
from tests.run.foreign.test_unpickled import Evil
from tests.run.foreign.things import (
    WEIGHTS,
    bits,
    damages,
    held,
    only_storage_errors,
    source,
    wanted,
    zip_entry,
)

MANY = collections.OrderedDict(WEIGHTS, tied=WEIGHTS["wte.weight"], view=WEIGHTS["wte.weight"][2:4])


def read(path):
    """Every tensor of a file, to the bit."""
    tensors, _ = listed(open_torch(path.parent, path.name))
    return {name: bits(mapped(lies)) for name, lies in tensors.items()}


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saved(tmp_path, zipped):
    torch.save(MANY, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    assert read(tmp_path / "m.pt") == wanted(MANY)


def test_parameters_nested_dicts_and_lists(tmp_path):
    tree = {
        "model": {"w": nn.Parameter(torch.ones(2)), 3: torch.zeros(1)},
        "states": [{"m": torch.arange(3)}, {"m": torch.arange(4)}],
        "epoch": 7, "name": "x", "best": None, "betas": (0.9, 0.99), "shape": torch.Size([1, 2]),
    }  # fmt: skip
    torch.save(tree, tmp_path / "m.pt")
    assert set(read(tmp_path / "m.pt")) == {"model.w", "model.3", "states.0.m", "states.1.m"}
    assert open_torch(tmp_path, "m.pt")["shape"] == (1, 2)


def test_an_archive_inside_a_larger_file(tmp_path):
    out = io.BytesIO()
    torch.save({"w": WEIGHTS["half"]}, out)
    data = out.getvalue()
    (tmp_path / "big").write_bytes(b"before" + data + b"after")
    found = open_torch(tmp_path, "big", 6, len(data))
    assert bits(mapped(found["w"])) == bits(WEIGHTS["half"])
    with pytest.raises(StorageError, match="goes to byte"):
        open_torch(tmp_path, "big", 6, len(data) + 6)


def test_checksums_find_a_changed_byte_of_every_tensor(tmp_path):
    torch.save(WEIGHTS, tmp_path / "m.pt")
    tensors, _ = listed(open_torch(tmp_path, "m.pt"))
    data = (tmp_path / "m.pt").read_bytes()
    for name, lies in tensors.items():
        if not lies.elements:
            continue
        assert check(lies, name)
        changed = bytearray(data)
        changed[lies.begin] ^= 16
        (tmp_path / "m.pt").write_bytes(bytes(changed))
        with pytest.raises(StorageError, match=rf"m\.pt is damaged: .*'{name}'"):
            check(lies, name)
        (tmp_path / "m.pt").write_bytes(data)


def test_a_file_without_checksums_says_so(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    found = open_statedict(tmp_path / "m.pt")
    assert held(found) == wanted({f"model/{name}": value for name, value in WEIGHTS.items()})
    assert found.check() == "nothing"


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_never_ends_in_another_error_or_a_wrong_read(tmp_path, zipped):
    """Of an archive all flips outside of names and padding are seen; none goes unnoticed by crc."""
    small = {"a": torch.arange(6.0), "b": torch.ones(2, 2).t()}
    torch.save(small, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    data, want = (tmp_path / "m.pt").read_bytes(), wanted(small)

    def checked(tensors):
        return tensors and min([check(lies, name) for name, lies in tensors.items()])

    def attempt():
        tensors, _ = listed(open_torch(tmp_path, "m.pt"))
        found = {name: bits(mapped(lies)) for name, lies in tensors.items()}
        return found if checked(tensors) else None

    seen = 0
    for damaged in damages(data, 400, seed=zipped):
        (tmp_path / "m.pt").write_bytes(damaged)
        found = only_storage_errors(attempt)
        seen += found is None
        assert found is None or found == want or not zipped
    assert seen > 80


class Thing:
    """A class of the user's own."""


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (Thing(), "Thing"),
        ({"w": torch.ones(2), "args": argparse.Namespace(lr=1)}, "'args' is .* argparse.Namespace"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"s": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"epoch": 3}, "holds no tensors"),
        (torch.ones(3).expand(1000, 3), "repeats the 12 bytes"),
        ({"z": torch.zeros(2, dtype=torch.complex128)}, "ComplexDoubleStorage"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, value, word):
    torch.save(value, tmp_path / "m.pt")
    with pytest.raises(StorageError, match=word):
        open_statedict(tmp_path / "m.pt")


def test_objects_are_left_out_when_asked(tmp_path):
    torch.save({"w": torch.ones(2), "args": argparse.Namespace(lr=1)}, tmp_path / "m.pt")
    found = open_statedict(tmp_path / "m.pt", skip=True)
    assert list(found.items) == ["model/w"]
    assert found.notes == ("1 objects are left out (args, ...)",)


def test_a_hostile_file_is_refused_and_nothing_runs(tmp_path):
    torch.save({"w": torch.ones(2), "e": Evil(tmp_path / "ran")}, tmp_path / "m.pt")
    with pytest.raises(StorageError, match=r"only calling (posix|os)\.system would make"):
        open_statedict(tmp_path / "m.pt")
    open_statedict(tmp_path / "m.pt", skip=True)
    assert not (tmp_path / "ran").exists()


def made(path, tree, size=8):
    """An archive with one storage of `size` bytes, whose pickle says `tree`."""
    with path.open("wb") as out:
        archive(out, tree, {"0": Stored(size, lambda: iter([memoryview(bytes(size))]))})


def rebuilding(kind="FloatStorage", key="0", offset=0, shape=(2,), stride=(1,)):
    """The call that rebuilds a tensor, with one claim changed."""
    storage = Persistent(("storage", Global("torch", kind), key, "cpu", 2))
    args = (storage, offset, shape, stride, False, Made(Global("collections", "OrderedDict")))
    return {"w": Made(Global("torch._utils", "_rebuild_tensor_v2"), args)}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"shape": (3,)}, "goes past the 8 bytes"),
        ({"offset": 1}, "goes past the 8 bytes"),
        ({"offset": -1}, "claims shape"),
        ({"stride": (2,)}, "goes past"),
        ({"stride": (-1,)}, "claims shape"),
        ({"stride": (1, 1)}, "claims shape"),
        ({"shape": (2**40, 2**40), "stride": (0, 0)}, "repeats the 8 bytes"),
        ({"shape": (1,) * 17, "stride": (1,) * 17}, "claims shape"),
        ({"shape": (True,)}, "claims shape"),
        ({"shape": ("2",)}, "claims shape"),
        ({"key": "7"}, "in the storage '7'"),
        ({"key": "../../etc/passwd"}, "in the storage"),
        ({"kind": "QInt8Storage"}, "QInt8Storage"),
    ],
)
def test_claims_that_cannot_be(tmp_path, changes, word):
    made(tmp_path / "m.pt", rebuilding())
    assert read(tmp_path / "m.pt") == wanted({"w": torch.zeros(2)})
    made(tmp_path / "m.pt", rebuilding(**changes))
    with pytest.raises(StorageError, match=word):
        read(tmp_path / "m.pt")


def test_a_few_bytes_do_not_become_a_billion_values(tmp_path, monkeypatch):
    """Lists of ten times the same list, twelve deep."""
    monkeypatch.setattr("meshwright.run.foreign.torchfile._VALUES", 10_000)
    data = b"\x80\x02]"
    for number in range(12):
        data += b"q" + bytes([number]) + b"0](" + (b"h" + bytes([number])) * 10 + b"e"
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        file.writestr("a/data.pkl", data + b".")
    with pytest.raises(StorageError, match="claims more than"):
        open_torch(tmp_path, "m.pt")


def rewritten(path, change, **how):
    """The archive again, its members changed."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", **how) as new:
        warnings.simplefilter("ignore")  # of names that occur twice
        for name, data in change(members):
            new.writestr(name, data)


@pytest.mark.parametrize(
    ("change", "how", "word"),
    [
        (lambda m: m.items(), {"compression": zipfile.ZIP_DEFLATED}, "compressed or encrypted"),
        (lambda m: [*m.items(), next(iter(m.items()))], {}, "twice"),
        (lambda m: [(n, d) for n, d in m.items() if "pkl" not in n], {}, "holds 0 data.pkl"),
        (lambda m: [(n, d) for n, d in m.items() if "data/0" not in n], {}, "in the storage '0'"),
        (lambda m: [(n, b"big" if "order" in n else d) for n, d in m.items()], {}, "byte order"),
        (lambda m: [(n, d[:-1] if "data/" in n else d) for n, d in m.items()], {}, "goes past"),
    ],
)
def test_archives_that_torch_would_not_write(tmp_path, change, how, word):
    torch.save({"w": torch.ones(4)}, tmp_path / "m.pt")
    rewritten(tmp_path / "m.pt", change, **how)
    with pytest.raises(StorageError, match=word):
        open_torch(tmp_path, "m.pt")


def test_members_that_share_bytes(tmp_path):
    torch.save({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path / "m.pt")
    data = bytearray((tmp_path / "m.pt").read_bytes())
    first, second = zip_entry(data, b"m/data/0"), zip_entry(data, b"m/data/1")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    (tmp_path / "m.pt").write_bytes(bytes(data))
    with pytest.raises(StorageError, match="share bytes"):
        open_torch(tmp_path, "m.pt")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "it is empty"),
        (b"GGUF1234", "neither a zip archive nor a pickle"),
        (b"PK\x03\x04" + b"\0" * 100, "damaged or cut short"),
        (b"\x80\x02K\x01.", "none that torch.save wrote"),
    ],
)
def test_other_files(tmp_path, data, word):
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(StorageError, match=word):
        open_torch(tmp_path, "m.pt")


def test_what_is_written_torch_reads(tmp_path):
    from meshwright.run.foreign.statedict import write_statedict

    write_statedict(source(), tmp_path)
    written, _ = listed(open_torch(tmp_path, "model.pt"))
    assert all(lies.begin % 64 == 0 for lies in written.values())  # as torch's mmap wants
    for how in ({}, {"mmap": True}):
        found = torch.load(tmp_path / "model.pt", weights_only=True, **how)
        assert found["head.weight"].data_ptr() == found["wte.weight"].data_ptr()
        assert bits(found.pop("head.weight")) == bits(WEIGHTS["wte.weight"])
        assert {n: bits(t) for n, t in found.items() if n in WEIGHTS} == wanted(WEIGHTS)
