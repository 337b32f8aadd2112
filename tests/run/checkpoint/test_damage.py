"""Any bit of any file of a checkpoint flipped, any file cut short: caught, and named."""

from __future__ import annotations

import json
import os
import random
import re
from bisect import bisect_right

import pytest
import torch

from meshwright.errors import StorageError
from meshwright.run.checkpoint.digest import CHUNK
from meshwright.run.checkpoint.save import Piece, open_checkpoint
from meshwright.run.checkpoint.shards import Shards
from tests.run.saving import save_all, two_ranks

FILES = ("rank0.safetensors", "rank1.safetensors", "manifest.json", "commit.json")
TRIES = 10_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of two ranks, of whose tensors one has three chunks."""
    g = torch.Generator().manual_seed(1)
    long = torch.randint(0, 256, (2 * CHUNK + 999,), dtype=torch.uint8, generator=g)
    ranks = two_ranks()
    ranks[1].append(Piece("model/long", tuple(long.shape), (0,), long))
    folder = save_all(tmp_path_factory.mktemp("damage"), 7, ranks, {"plan": "data=2"})
    return folder, {name: (folder / name).read_bytes() for name in FILES}


def tensors_of(data):
    """Begin, end and entry of a shard's tensors, and where its header ends."""
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    places = ((told["data_offsets"], key.rpartition("@")[0]) for key, told in table.items())
    return 8 + length, sorted((8 + length + a, 8 + length + b, name) for (a, b), name in places)


def told_of(folder):
    """What the user is told of a checkpoint, read to its end."""
    with pytest.raises(StorageError) as caught, open_checkpoint(folder) as checkpoint:
        checkpoint.verify()
    return str(caught.value)


def check_flip(folder, data, name, bit):
    """Flip one bit; the file is named, and where it is a tensor's also that and the bytes."""
    at = bit // 8
    with (folder / name).open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1 << bit % 8]))
        file.flush()
        told = told_of(folder)
        file.seek(at)
        file.write(data[at : at + 1])
    assert name in told
    if not name.endswith(".safetensors"):
        return "text"
    end, places = tensors_of(data)
    if at < end:
        assert f"{name} cannot be used: its header does not match its digest" in told
        return "header"
    begin, _, entry = places[bisect_right(places, (at, 1 << 60, "")) - 1]
    first, last = re.search(r"bytes ([\d,]+) to ([\d,]+) of the file", told).groups()
    assert f"entry {entry!r}" in told
    assert int(first.replace(",", "")) <= at <= int(last.replace(",", ""))
    assert (int(first.replace(",", "")) - begin) % CHUNK == 0
    return entry


def check_cut(folder, data, name, length):
    """Cut a file short; it is named."""
    os.truncate(folder / name, length)
    told = told_of(folder)
    with (folder / name).open("r+b") as file:
        file.seek(length)
        file.write(data[length:])
    assert name in told
    if name.endswith(".safetensors"):
        assert f"expected {len(data):,}: it is cut short" in told


def damage(whole, tries, seed):
    """As many flips and cuts, in all files alike; what was hit."""
    folder, contents = whole
    dice = random.Random(seed)
    hit = set()
    for k in range(tries):
        name = FILES[k % len(FILES)]
        data = contents[name]
        if dice.random() < 0.2:
            check_cut(folder, data, name, dice.randrange(len(data)))
        else:
            # Half of the flips go to the first KiB, where the headers are.
            most = min(len(data), 1024) if dice.random() < 0.5 else len(data)
            hit.add(check_flip(folder, data, name, dice.randrange(8 * most)))
    with open_checkpoint(folder) as checkpoint:
        checkpoint.verify()
    return hit


def test_flips_and_cuts_are_caught_and_named(whole):
    hit = damage(whole, 400, seed=0)
    assert {"text", "header", "model/head", "model/long"} <= hit


@pytest.mark.matrix
@pytest.mark.timeout(600)
def test_ten_thousand_flips_and_cuts_are_caught_and_named(whole):
    hit = damage(whole, TRIES, seed=1)
    assert {"text", "header", "model/head", "model/bias", "model/long"} <= hit


@pytest.mark.parametrize("name", FILES)
def test_every_bit_of_the_small_files_and_headers(whole, name):
    folder, contents = whole
    data = contents[name]
    end = tensors_of(data)[0] if name.endswith(".safetensors") else len(data)
    for bit in random.Random(2).sample(range(8 * end), min(8 * end, 100)):
        check_flip(folder, data, name, bit)


def test_a_reader_that_compares_nothing_would_be_caught(whole, monkeypatch):
    """Else the sweeps could not fail."""
    folder, contents = whole
    monkeypatch.setattr(Shards, "_chunk", lambda *_: None)
    name = "rank1.safetensors"
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_flip(folder, contents[name], name, 8 * (len(contents[name]) - 1))
