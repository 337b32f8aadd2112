"""Hugging Face's folders: streamed to files that transformers and safetensors read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from meshwright.errors import StorageError
from meshwright.run.foreign.hub import open_hub, write_hub
from meshwright.run.foreign.sidecar import with_sidecar, write_sidecar
from meshwright.run.weights import INDEX, SINGLE, read
from tests.run.foreign.things import BUFFERS, WEIGHTS, bits, held, meta, source, wanted

NAMED = {**WEIGHTS, **BUFFERS}


def test_one_file(tmp_path):
    write_hub(source(), tmp_path)
    assert wanted(load_file(tmp_path / SINGLE)) == wanted(NAMED)
    assert held(open_hub(tmp_path)) == wanted({f"model/{n}": t for n, t in NAMED.items()})


def test_several_files_and_an_index(tmp_path):
    files = write_hub(source(), tmp_path, shard_bytes=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in NAMED.values())
    assert set(index["weight_map"]) == set(NAMED)
    assert len(set(files.values())) > 3
    for file in set(files.values()):
        found = load_file(tmp_path / file)
        assert sum(t.nbytes for t in found.values()) <= 100 or len(found) == 1
        assert {n for n, f in index["weight_map"].items() if f == file} == set(found)
    assert read(tmp_path).shapes() == {n: tuple(t.shape) for n, t in NAMED.items()}


def test_with_what_stands_beside_it_buffers_are_buffers_again(tmp_path):
    write_hub(source(), tmp_path)
    write_sidecar(source(), tmp_path, whole=False)
    found = with_sidecar(open_hub(tmp_path))
    want = {f"model/{n}": t for n, t in WEIGHTS.items()} | {
        f"buffer/{n}": t for n, t in BUFFERS.items()
    }
    assert held(found) == wanted(want)
    assert (found.step, found.check()) == (20, "sha256")
    assert found.meta == {**meta(), "imported": "safetensors"}  # the optimizer's state is not there


def test_buffers_that_no_state_dict_has_are_left_out(tmp_path):
    write_hub(source(meta={**meta(), "transient": ["bn.mean"]}), tmp_path)
    assert set(NAMED) - set(load_file(tmp_path / SINGLE)) == {"bn.mean"}


def test_a_configuration_goes_along(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "secrets.txt").write_text("no")
    write_hub(source(), tmp_path / "out", tmp_path / "base")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "gpt2"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "config.json", "tokenizer.json", SINGLE,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda h: h["b"].update(data_offsets=[0, 8]), "overlap|[Ii]nvalid|cannot be read"),
        (lambda h: h["b"].update(data_offsets=[8, 80]), "cannot be read"),
        (lambda h: h["b"].update(shape=[3]), "cannot be read"),
        (lambda h: h["b"].update(dtype="F1"), "cannot be read"),
        (lambda h: h["b"].update(shape=[2**40, 2**40]), "cannot be read"),
    ],
    ids=["overlap", "beyond", "shape", "dtype", "product"],
)
def test_headers_that_lie(tmp_path, change, word):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(StorageError, match=word):
        open_hub(tmp_path)


def test_a_small_exact_file(tmp_path):
    """What stands in the file, byte by byte, so that nobody's loader has to guess."""
    write_hub(source({"model/w": torch.tensor([1.0, 2.0])}), tmp_path)
    data = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length]) == {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    assert data[8 + length :] == bits(torch.tensor([1.0, 2.0]))[2]
