"""torch's distributed checkpoints: what torch wrote is read, what is written torch reads."""

from __future__ import annotations

import pickle
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from meshwright.errors import StorageError
from meshwright.run.foreign import dcpwrite
from meshwright.run.foreign.dcp import METADATA, open_dcp
from meshwright.run.foreign.dcpwrite import write_dcp
from meshwright.run.foreign.pickled import pickled
from meshwright.run.foreign.source import bare, tensor_of
from meshwright.run.foreign.symbols import Global, Made
from meshwright.run.foreign.unpickled import unpickled
from tests.run.foreign.test_unpickled import Evil
from tests.run.foreign.things import (
    TIED,
    WEIGHTS,
    bits,
    damages,
    entries,
    held,
    only_storage_errors,
    source,
    wanted,
)

FILE = "__0_0.distcp"
pytestmark = pytest.mark.filterwarnings("ignore")


def trained(lr=0.3):
    """A small model, and its optimizer after a step."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model(torch.randn(5, 3)).pow(2).sum().backward()
    optimizer.step()
    return model, optimizer


def saved(folder, wrap=lambda tree: tree):
    """What torch writes of it, and its state dicts."""
    model, optimizer = get_state_dict(*trained())
    dcp.save(wrap({"model": model, "optimizer": optimizer}), checkpoint_id=folder)
    return model, optimizer


@pytest.mark.parametrize(
    "wrap", [lambda tree: tree, lambda tree: {"app": tree}], ids=["plain", "app"]
)
def test_what_torch_saved(tmp_path, wrap):
    model, optimizer = saved(tmp_path, wrap)
    found = open_dcp(tmp_path)
    want = {f"model/{name}": value for name, value in model.items()} | {
        f"optimizer/{slot}/{name}": value
        for name, slots in optimizer["state"].items()
        for slot, value in slots.items()
    }
    assert held(found) == wanted(want)
    assert found.check() == "crc32"
    assert found.step is None
    assert "no tensors" in found.notes[0]


def test_a_flat_state_dict_keeps_its_names(tmp_path):
    tensors = {"model.w": torch.ones(2), "head": torch.zeros(3)}
    dcp.save(dict(tensors), checkpoint_id=tmp_path)
    assert held(open_dcp(tmp_path)) == wanted({f"model/{n}": t for n, t in tensors.items()})


def test_every_kind_of_tensor(tmp_path):
    tensors = {f"model/{name}": value.contiguous() for name, value in WEIGHTS.items()}
    dcp.save(
        {"model": {bare(name): value for name, value in tensors.items()}}, checkpoint_id=tmp_path
    )
    assert held(open_dcp(tmp_path)) == wanted(tensors)


def test_torch_reads_what_is_written(tmp_path):
    saved(tmp_path / "theirs")
    names = list(dict(trained()[0].named_parameters()))
    group = {"parameters": names, "settings": {"lr": 0.3, "betas": [0.9, 0.999], "eps": 1e-8}}
    state = get_state_dict(*trained())[1]["param_groups"][0]
    group["settings"] |= {k: v for k, v in state.items() if k not in ("params", "betas")}
    meta = {"optimizer": {"class": "AdamW", "groups": [group], "state": {}}}
    ours = open_dcp(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write_dcp(source({n: tensor_of(ours, n) for n in ours.items}, meta=meta), tmp_path / "ours")

    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    found = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(found, checkpoint_id=tmp_path / "ours")
    set_state_dict(
        model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
    )
    one, two = trained()
    assert wanted(model.state_dict()) == wanted(one.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    for mine, theirs in zip(model.parameters(), one.parameters(), strict=True):
        assert wanted(optimizer.state[mine]) == wanted(two.state[theirs])


def test_all_there_and_back_with_tied_names(tmp_path):
    write_dcp(source(), tmp_path)
    found = held(open_dcp(tmp_path))
    (other, own), = TIED.items()  # fmt: skip
    assert found.pop(f"model/{other}") == bits(WEIGHTS[own])
    assert found == wanted(
        {n.replace("buffer/", "model/"): value for n, value in entries().items()}
    )
    assert (tmp_path / FILE).read_bytes().count(WEIGHTS[own].numpy().tobytes()) == 1


# ── tensors in chunks, and tables that lie ──────────────────────────────────────────────────────


@contextmanager
def table(folder):
    """The table of contents, as symbols that may be changed."""
    made = unpickled((folder / METADATA).read_bytes())
    yield made.state
    (folder / METADATA).write_bytes(pickled(made))


def size(*numbers):
    """A torch.Size."""
    return Made(Global("torch", "Size"), (numbers,))


@pytest.fixture
def chunked(tmp_path):
    """A tensor of [4, 6] in four chunks, in two files."""
    whole = torch.arange(24.0).reshape(4, 6)
    cuts = [((0, 0), (3, 2)), ((3, 0), (1, 2)), ((0, 2), (4, 3)), ((0, 5), (4, 1))]
    dcp.save({"w": whole}, checkpoint_id=tmp_path)
    with table(tmp_path) as state:
        entry = state["state_dict_metadata"]["w"]
        entry.state["chunks"], state["storage_data"] = [], {}
        for number, (start, shape) in enumerate(cuts):
            file = f"__{number % 2}_0.distcp"
            part = whole[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
            one = source({"w": part.clone()})
            with (tmp_path / file).open("r+b" if number > 1 else "wb") as out:
                begin, length = dcpwrite._append(
                    out, dcpwrite.rebuilt("0", one.items["w"]), {"0": dcpwrite.stored(one, "w")}
                )
            chunk = {"offsets": size(*start), "sizes": size(*shape)}
            entry.state["chunks"].append(dcpwrite._new("ChunkStorageMetadata", chunk))
            index = dcpwrite._new("MetadataIndex", {"fqn": "w", "offset": size(*start), "index": 0})
            info = {"relative_path": file, "offset": begin, "length": length}
            state["storage_data"][index] = dcpwrite._new(
                "_StorageInfo", info, "torch.distributed.checkpoint.filesystem"
            )
    return tmp_path, whole


def test_chunks_of_several_files(chunked):
    folder, whole = chunked
    theirs = {"w": torch.zeros(4, 6)}
    dcp.load(theirs, checkpoint_id=folder)
    assert torch.equal(theirs["w"], whole)  # so this is what torch means by it
    found = open_dcp(folder)
    assert found.items["model/w"].boxes == 4
    assert torch.equal(tensor_of(found, "model/w"), whole)


def chunk(state, number):
    """A chunk's claim."""
    return state["state_dict_metadata"]["w"].state["chunks"][number].state


def info(state, number):
    """Where a chunk is said to lie."""
    return list(state["storage_data"].values())[number].state


def index(state, number):
    """The name under which a chunk's place is told."""
    return list(state["storage_data"])[number].state


LIES = {
    "traversal": (lambda s: info(s, 0).update(relative_path="../x.distcp"), "no plain file name"),
    "absolute": (lambda s: info(s, 0).update(relative_path="/etc/passwd"), "no plain file name"),
    "hidden": (lambda s: info(s, 0).update(relative_path=".metadata"), "no plain file name"),
    "missing": (lambda s: info(s, 0).update(relative_path="__9_0.distcp"), "__9_0.distcp cannot"),
    "beyond": (lambda s: info(s, 3).update(length=10**6), "cut short"),
    "negative": (lambda s: info(s, 0).update(offset=-1), "no count"),
    "huge": (lambda s: info(s, 0).update(offset=2**70), "no count"),
    "half": (lambda s: info(s, 2).update(offset=10), "share bytes"),
    "overlap": (lambda s: chunk(s, 0).update(sizes=size(4, 2)), "overlap"),
    "hole": (lambda s: chunk(s, 2).update(sizes=size(4, 2)), "hold 20 of 24"),
    "outside": (lambda s: chunk(s, 3).update(sizes=size(4, 2)), "lies outside"),
    "place": (lambda s: index(s, 1).update(offset=size(2, 0)), "no file is told"),
    "twice": (lambda s: index(s, 1).update(offset=size(0, 0)), "stands twice"),
    "shape": (lambda s: s["state_dict_metadata"]["w"].state.update(size=size(6, 6)), "of 36"),
    "product": (
        lambda s: s["state_dict_metadata"]["w"].state.update(size=size(2**40, 2**40)), "of"
    ),
    "dims": (lambda s: chunk(s, 0).update(offsets=size(0)), "no file is told"),
    "extension": (lambda s: info(s, 0).update(transform_descriptors=["zstd"]), "an extension"),
    "call": (lambda s: s.update(planner_data=Made(Global("os", "system"), ("x",))), "calls os.sys"),
    "kind": (lambda s: s.update(storage_data=[]), "storage_data is no dict"),
    "name": (lambda s: s["state_dict_metadata"].update({"a\nb": None}), "no text of printable"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_tables_that_lie(chunked, lie):
    change, word = LIES[lie]
    with table(chunked[0]) as state:
        change(state)
    with pytest.raises(StorageError, match=word):
        open_dcp(chunked[0])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: chunk(s, 0).update(sizes=size(2, 3)), "."),
        (
            lambda s: s["state_dict_metadata"]["w"].state["properties"].__setattr__(
                "state", (Global("torch", "float64"), None, False, None, False)
            ),
            "is torch.float32 .*, the table says torch.float64",
        ),
        (lambda s: info(s, 0).update(dict(info(s, 1))), r"\[1, 2\], the table says"),
    ],
    ids=["sizes", "dtype", "place"],
)  # fmt: skip
def test_archives_that_are_not_what_the_table_says(chunked, change, word):
    with table(chunked[0]) as state:
        change(state)
    with pytest.raises(StorageError, match=word):
        tensor_of(open_dcp(chunked[0]), "model/w")


def test_a_hostile_table_is_refused_and_nothing_runs(tmp_path):
    (tmp_path / METADATA).write_bytes(pickle.dumps({"w": Evil(tmp_path / "ran")}))
    with pytest.raises(StorageError, match=r"calls (posix|os)\.system"):
        open_dcp(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [METADATA, "__0_0.distcp"])
def test_links_are_not_followed(chunked, name, tmp_path_factory):
    folder, _ = chunked
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "file"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(StorageError, match="symbolic link"):
        open_dcp(folder)


def test_a_file_that_the_table_does_not_name_is_told(chunked):
    (chunked[0] / "__7_0.distcp").write_bytes(b"")
    assert "__7_0.distcp is there" in open_dcp(chunked[0]).notes[0]


def test_damage_is_seen_or_harmless(chunked):
    folder, whole = chunked
    for name in (METADATA, "__0_0.distcp"):
        data = (folder / name).read_bytes()

        def attempt():
            found = open_dcp(folder)
            there = found.check() == "crc32" and "model/w" in found.items
            return tensor_of(found, "model/w") if there else None

        refused = 0
        for damaged in damages(data, 150, seed=len(name)):
            (folder / name).write_bytes(damaged)
            found = only_storage_errors(attempt)
            refused += found is None
            assert found is None or torch.equal(found, whole)
        assert refused > 40
        (folder / name).write_bytes(data)
