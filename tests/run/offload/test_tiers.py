"""Tiers: what is put comes back, on any file system; what a disk does wrong is told."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from meshwright.errors import StorageError
from meshwright.run.offload import disk as disks
from meshwright.run.offload.disk import ALIGNED, CHUNK, Disk, sweep
from meshwright.run.offload.host import Host, shared

SHAPES = [(), (3,), (5, 7), (0, 4), (CHUNK // 4,), (CHUNK // 4 + 5,)]


@pytest.fixture(params=["host", "direct", "cached", "memory"])
def tier(request, tmp_path):
    made = {
        "host": Host,
        "direct": lambda: Disk(tmp_path, 0),
        "cached": lambda: Disk(tmp_path, 0, direct=False),
        "memory": lambda: Disk(Path("/dev/shm") / f"mw-{os.getpid()}", 0),
    }[request.param]()
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_is_put_comes_back(tier, dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in SHAPES]
    places = [tier.place(f"t{k}", tuple(t.shape), dtype) for k, t in enumerate(tensors)]
    for place in places:
        assert not tier.settle(place).any()
        assert place.begin % ALIGNED == 0
    for place, tensor in zip(places, tensors, strict=True):
        tier.put(place, tensor)
    outs = [torch.empty_like(t) for t in tensors]
    for one in [tier.fetch(p, out) for p, out in zip(places, outs, strict=True)]:
        one.wait()
    for place, tensor, out in zip(places, tensors, outs, strict=True):
        assert torch.equal(out, tensor)
        assert torch.equal(tier.settle(place), tensor)
    total = sum(t.numel() * t.element_size() for t in tensors)
    assert (tier.moved.put, tier.moved.fetched, tier.bytes) == (total, total, total)


def test_transfers_of_one_place_keep_their_order(tier):
    place = tier.place("x", (CHUNK,), torch.float32)
    for k in range(5):
        tier.put(place, torch.full((CHUNK,), float(k)))
        out = torch.empty(CHUNK)
        tier.fetch(place, out).wait()
        assert torch.equal(out, torch.full((CHUNK,), float(k)))


SHARED = """
from pathlib import Path
import torch
from meshwright.run.offload.host import Host

def rss(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024

tier, source, size = Host(), torch.ones(1 << 24), 1 << 26
place = tier.place("x", (1 << 24,), torch.float32)
before = rss("RssAnon"), rss("RssShmem")
tier.put(place, source).wait()
assert rss("RssShmem") - before[1] > 0.9 * size
assert rss("RssAnon") - before[0] < 0.2 * size
del source
assert rss("RssAnon") - before[0] < -0.8 * size, "somebody keeps what was put"
"""


def test_host_memory_is_shared_and_not_private():
    """In a process of its own: what others have freed or keep is not counted."""
    done = subprocess.run(
        [sys.executable, "-c", SHARED], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def put(tier, count=CHUNK):
    place = tier.place("optimizer/exp_avg/w", (count,), torch.float32)
    tier.put(place, torch.arange(float(count))).wait()
    return place


def aligned(count):
    return shared("x", 4 * count).view(torch.float32)


def test_aligned_memory_is_read_and_written_in_place(tmp_path):
    tier, count = Disk(tmp_path, 0, seconds=1.0), 2 * CHUNK // 4 + 3 * ALIGNED
    if tier._direct is None:
        pytest.skip("a file system without O_DIRECT")
    place, source, out = tier.place("x", (count,), torch.float32), aligned(count), aligned(count)
    torch.arange(float(count), out=source)
    while not tier._buffers.empty():  # whoever wants one waits for ever
        tier._buffers.get()
    tier.put(place, source).wait()
    tier.fetch(place, out).wait()
    assert torch.equal(out, source)
    with tier.path.open("r+b") as file:
        file.write(b"\xff")
        os.fsync(file.fileno())
    with pytest.raises(StorageError, match="was changed between bytes 0 and"):
        tier.fetch(place, out).wait()
    with pytest.raises(StorageError, match="has not ended in 1 s"):
        tier.put(place, torch.ones(count + 1)[1:]).wait()


@pytest.mark.parametrize("direct", [True, False])
def test_a_bit_that_flips_is_found(tmp_path, direct):
    tier = Disk(tmp_path, 3, direct=direct)
    place = put(tier)
    with tier.path.open("r+b") as file:
        file.seek(CHUNK + 17)
        byte = file.read(1)[0]
        file.seek(CHUNK + 17)
        file.write(bytes([byte ^ 4]))
        file.flush()
        os.fsync(file.fileno())
    told = rf"{tier.path} was changed between bytes .* optimizer/exp_avg/w is lost"
    with pytest.raises(StorageError, match=told):
        tier.fetch(place, torch.empty(CHUNK)).wait()
    with pytest.raises(StorageError, match=told):
        tier.settle(place)


@pytest.mark.parametrize("size", [0, 1000, CHUNK, 2 * CHUNK + ALIGNED, 4 * CHUNK - 1])
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_is_cut_short_is_found(tmp_path, direct, size):
    tier = Disk(tmp_path, 0, direct=direct)
    place = put(tier)
    os.truncate(tier.path, size)
    with pytest.raises(StorageError, match=r"rank0-.*cut short, so optimizer/exp_avg/w is lost"):
        tier.fetch(place, torch.empty(CHUNK)).wait()


def test_a_disk_that_hangs_is_told(tmp_path, monkeypatch):
    go, tier = threading.Event(), Disk(tmp_path, 0, seconds=0.05)
    place = put(tier)
    monkeypatch.setattr(disks, "_filled", lambda *_: go.wait(9) * 0)
    with pytest.raises(StorageError, match=r"optimizer/exp_avg/w in .*rank0.*not ended in 0.05 s"):
        tier.fetch(place, torch.empty(CHUNK)).wait()
    go.set()


def test_a_full_disk_is_told(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tier = Disk(tmp_path, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot be grown for w.*MESHWRIGHT_OFFLOAD"):
            tier.place("w", (1 << 20,), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_that_takes_no_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file takes no file to offload to.*MESHWRIGHT_OFFLOAD"):
        Disk(tmp_path / "file", 0)


def test_files_go_with_their_tier_and_those_of_the_dead_with_the_next(tmp_path):
    tier = Disk(tmp_path, 0)
    killed = (
        "import os, signal, sys; from pathlib import Path;"
        "from meshwright.run.offload.disk import Disk;"
        "d = Disk(Path(sys.argv[1]), 1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False, timeout=60)
    assert len(list(tmp_path.iterdir())) == 2
    assert [path.name[:5] for path in sweep(tmp_path)] == ["rank1"]
    assert list(tmp_path.iterdir()) == [tier.path]
    tier.close()
    assert not list(tmp_path.iterdir())
