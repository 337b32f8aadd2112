"""Weights on disk: slices of them, what is damaged or unsafe, and export."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from meshwright.errors import StorageError
from meshwright.run.weights import Entry, export, read

TENSORS = {
    "wte.weight": torch.arange(24.0).reshape(6, 4),
    "h.0.bias": torch.arange(5, dtype=torch.bfloat16),
    "scale": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index."""
    names = list(TENSORS)
    shards = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, held in shards.items():
        save_file({name: TENSORS[name] for name in held}, tmp_path / file)
    where = {name: file for file, held in shards.items() for name in held}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tmp_path


def edit(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def test_a_sharded_folder_and_its_index_are_the_same_weights(folder):
    weights = read(folder)
    assert weights == read(str(folder / INDEX))
    assert weights.shapes() == {name: tuple(value.shape) for name, value in TENSORS.items()}
    assert weights.entries["h.0.bias"] == Entry(folder / "a.safetensors", "BF16", (5,))
    for name, value in TENSORS.items():
        assert torch.equal(weights.tensor(name), value)
        assert weights.tensor(name).dtype == value.dtype


@pytest.mark.parametrize("name", ["model.safetensors", "adapter.safetensors"])
def test_a_file_and_a_folder_with_one(tmp_path, name):
    save_file(TENSORS, tmp_path / name)
    assert read(tmp_path).entries == read(tmp_path / name).entries


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(TENSORS, file)
    return read(file)


@given(st.data())
def test_a_slice_is_the_block_of_the_whole(weights, data):
    name = data.draw(st.sampled_from(sorted(TENSORS)))
    value = TENSORS[name]
    start = tuple(data.draw(st.integers(0, size)) for size in value.shape)
    shape = tuple(data.draw(st.integers(0, size - s)) for size, s in zip(value.shape, start,
                                                                        strict=True))  # fmt: skip
    region = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
    got = weights.slice(name, start, shape)
    assert got.shape == shape
    assert torch.equal(got, value[region] if region else value)


@pytest.mark.parametrize(
    ("start", "shape"), [((0,), (4,)), ((3, 0), (4, 4)), ((-1, 0), (1, 4)), ((0, 0), (6, 4, 1))]
)
def test_a_block_that_is_not_there(weights, start, shape):
    with pytest.raises(StorageError, match=r"wte.weight in .* has shape \(6, 4\), which has no bl"):
        weights.slice("wte.weight", start, shape)


def test_an_unknown_name_gets_the_nearest(weights):
    with pytest.raises(StorageError, match=r"no tensor 'wte.weigth'; did you mean 'wte.weight'"):
        weights.tensor("wte.weigth")


# ── what is missing, damaged or unsafe ───────────────────────────────────────────────────────────


def test_nothing_there(tmp_path):
    with pytest.raises(StorageError, match=r"no weights at .*/gpt2; name .*hf download"):
        read(tmp_path / "gpt2")


def test_an_empty_folder(tmp_path):
    with pytest.raises(StorageError, match="holds no safetensors file; weights are read from mode"):
        read(tmp_path)


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(StorageError, match=r"pytorch_model.bin is not read, because a pickle"):
            read(path)


def test_several_files_without_an_index(folder):
    (folder / INDEX).unlink()
    with pytest.raises(StorageError, match=rf"2 safetensors files \(a.safetensors, .*no {INDEX}"):
        read(folder)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(StorageError, match=r"model.safetensors \(\d+ bytes\) cannot be read"):
        read(tmp_path)


def test_a_missing_shard(folder):
    (folder / "b.safetensors").unlink()
    with pytest.raises(StorageError, match=r"names the shard b.safetensors, which is missing"):
        read(folder)


def test_a_shard_that_lacks_what_the_index_says(folder):
    edit(folder, lambda index: index["weight_map"].update({"more": "a.safetensors"}))
    with pytest.raises(StorageError, match=r"1 tensors that their shards do not.*more \(a.safet"):
        read(folder)


@pytest.mark.parametrize(
    "file",
    ["../a.safetensors", "/etc/a.safetensors", "x/../a.safetensors", "..\\a.safetensors",
     "a.safetensors/", "a\0.safetensors", "..", 3, None],
)  # fmt: skip
def test_an_index_that_leads_out_of_its_folder(folder, file):
    edit(folder, lambda index: index["weight_map"].update({"scale": file}))
    with pytest.raises(StorageError, match="is no index of shards: the file of 'scale' is"):
        read(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000,
     '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "\xff"],
    ids=["empty", "list", "cut", "no map", "map a list", "map empty", "deep", "twice", "latin"],
)  # fmt: skip
def test_an_index_that_is_none(folder, text):
    (folder / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(StorageError, match="is no index of shards"):
        read(folder)


# ── export ───────────────────────────────────────────────────────────────────────────────────────


def held(folder):
    return sorted(file.name for file in folder.iterdir())


def test_an_export_reads_back(tmp_path):
    out = export(tmp_path / "new" / "out", TENSORS.items(), {"model_type": "gpt2"})
    assert held(out) == ["config.json", "model.safetensors"]
    assert json.loads((out / "config.json").read_text()) == {"model_type": "gpt2"}
    for name, value in TENSORS.items():
        assert torch.equal(read(out).tensor(name), value)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_export_is_sharded(tmp_path):
    tensors = {f"w{i}": torch.full((10,), float(i)) for i in range(5)}
    out = export(tmp_path, tensors.items(), shard_bytes=80)
    assert held(out) == [*(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    assert json.loads((out / INDEX).read_text())["metadata"] == {"total_size": 200}
    for name, value in tensors.items():
        assert torch.equal(read(out).tensor(name), value)


def test_a_smaller_export_replaces_a_larger_one_and_leaves_the_users_files(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    tensors = {f"w{i}": torch.full((10,), float(i)) for i in range(5)}
    export(tmp_path, tensors.items(), shard_bytes=80)
    export(tmp_path, TENSORS.items())
    assert held(tmp_path) == ["README.md", "model.safetensors"]
    export(tmp_path, tensors.items(), shard_bytes=100)
    assert "model.safetensors" not in held(tmp_path)
    assert read(tmp_path).shapes() == dict.fromkeys(tensors, (10,))


def test_tied_and_strided_tensors_are_written_whole(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    out = export(tmp_path, [("a", base), ("b", base), ("t", base.t()), ("row", base[1])])
    assert torch.equal(read(out).tensor("b"), base)
    assert torch.equal(read(out).tensor("t"), base.t())
    assert torch.equal(read(out).tensor("row"), base[1])


def test_no_tensors_at_all(tmp_path):
    assert read(export(tmp_path, [])).entries == {}


def test_configuration_and_tokenizer_are_copied_but_no_old_weights(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "merges.txt", "training.log"):
        (folder / name).write_text(name)
    out = export(tmp_path / "out", TENSORS.items(), folder)
    assert held(out) == ["config.json", "merges.txt", "model.safetensors", "tokenizer.json"]


def test_an_error_half_way_keeps_what_was_there(tmp_path):
    export(tmp_path, [("a", torch.ones(3))])

    def failing():
        yield "a", torch.zeros(3)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot export to .*No space left.*there before is ke"):
        export(tmp_path, failing())
    assert held(tmp_path) == ["model.safetensors"]
    assert torch.equal(read(tmp_path).tensor("a"), torch.ones(3))


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot export to .*out"):
        export(tmp_path / "out", TENSORS.items())
