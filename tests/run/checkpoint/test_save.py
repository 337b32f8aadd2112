"""Saving over simulated ranks: any layout in, any layout out; what may be removed."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from meshwright.comm.base import Group
from meshwright.comm.local import run_local
from meshwright.errors import StorageError
from meshwright.run.checkpoint.header import dtype_of
from meshwright.run.checkpoint.manifest import ITEM_BYTES
from meshwright.run.checkpoint.save import (
    Piece,
    newest,
    open_checkpoint,
    save,
)
from tests.run.saving import HEAD, resume_all, rows, save_all, two_ranks


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints of two ranks; the folder of the newest."""
    for step in (10, 20, 30):
        folder = save_all(tmp_path / "checkpoints", step, two_ranks(), {"plan": "data=2"})
    return folder


# ── what goes in comes out ───────────────────────────────────────────────────────────────────────


@st.composite
def cut_tensors(draw):
    """A tensor of any dtype, and a grid of boxes that tile it, strewn over one to four ranks."""
    dtype = dtype_of(draw(st.sampled_from(sorted(ITEM_BYTES))))
    parts = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=3))
    shape = tuple(map(sum, parts))
    size = torch.Size(shape).numel() * dtype.itemsize
    seed = draw(st.integers(0, 2**31))
    data = torch.tensor(list(random.Random(seed).randbytes(size)), dtype=torch.uint8)
    if dtype == torch.bool:
        data %= 2
    tensor = data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    cuts = [[sum(sizes[:i]) for i in range(len(sizes))] for sizes in parts]
    boxes = list(zip(product(*cuts), product(*parts), strict=True))
    world = draw(st.integers(1, 4))
    owners = [draw(st.integers(0, world - 1)) for _ in boxes]
    return tensor, boxes, owners, world


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


@given(cut_tensors(), st.data())
def test_any_box_of_any_layout_comes_back_bit_for_bit(tmp_path_factory, cut, data):
    tensor, boxes, owners, world = cut
    ranks = [[] for _ in range(world)]
    for (start, shape), owner in zip(boxes, owners, strict=True):
        part = tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
        ranks[owner].append(Piece("w", tuple(tensor.shape), tuple(start), part))
    folder = save_all(tmp_path_factory.mktemp("any"), 1, ranks)
    start = tuple(data.draw(st.integers(0, n)) for n in tensor.shape)
    shape = tuple(
        data.draw(st.integers(0, n - a)) for a, n in zip(start, tensor.shape, strict=True)
    )
    with open_checkpoint(folder) as checkpoint:
        checkpoint.verify()
        assert bits(checkpoint.read("w")) == bits(tensor)
        got = checkpoint.read("w", start, shape)
        want = tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert bits(got) == bits(want)


def test_what_was_saved_is_told_and_read(saved):
    assert saved.name == "step-00000030"
    with open_checkpoint(saved) as checkpoint:
        assert checkpoint.step == 30
        assert checkpoint.meta == {"plan": "data=2"}
        assert sorted(checkpoint.entries) == ["model/bias", "model/head", "optimizer/step/head"]
        assert checkpoint.entries["model/head"].shape == (4, 8)
        assert torch.equal(checkpoint.read("model/head", (1, 2), (2, 5)), HEAD[1:3, 2:7])
        assert checkpoint.read("optimizer/step/head").item() == 7


def test_shards_are_plain_safetensors(saved):
    with safe_open(saved / "rank1.safetensors", "pt") as file:
        assert list(file.keys()) == ["model/head@2,0"]
        assert torch.equal(file.get_tensor("model/head@2,0"), HEAD[2:])


def test_reading_fills_the_callers_own_memory(saved):
    target = torch.zeros(6, 4).t()[1:3]  # not contiguous
    with open_checkpoint(saved) as checkpoint:
        checkpoint.read_into(target, "model/head", (1, 2))
    assert torch.equal(target, HEAD[1:3, 2:8])


def test_what_was_read_stays_after_closing_and_removal(saved):
    with open_checkpoint(saved) as checkpoint:
        head = checkpoint.read("model/head")
    for path in saved.iterdir():
        path.write_bytes(b"")
    assert torch.equal(head, HEAD)


def test_tensors_that_are_not_dense_or_need_gradients_are_saved_by_value(tmp_path):
    transposed = torch.nn.Parameter(HEAD).t()
    conjugate = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj()
    pieces = [Piece("t", (8, 4), (0, 0), transposed), Piece("c", (2,), (0,), conjugate)]
    with open_checkpoint(save_all(tmp_path, 1, [pieces])) as checkpoint:
        assert torch.equal(checkpoint.read("t"), HEAD.t())
        assert torch.equal(checkpoint.read("c"), torch.tensor([1 - 2j, 3 + 4j]))


def test_a_rank_without_anything_to_write_writes_no_file(tmp_path):
    folder = save_all(tmp_path, 1, [[Piece("w", (4, 8), (0, 0), HEAD)], []])
    assert sorted(path.name for path in folder.iterdir()) == [
        "commit.json",
        "manifest.json",
        "rank0.safetensors",
    ]


def test_saving_copies_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Many views of one transposed tensor: each is made dense alone, and freed."""
    alive, peak = set(), []
    make_dense = torch.Tensor.contiguous

    def tracked(tensor):
        dense = make_dense(tensor)
        if dense.data_ptr() != tensor.data_ptr():
            import weakref

            alive.add(id(dense))
            weakref.finalize(dense, alive.discard, id(dense))
            peak.append(len(alive))
        return dense

    monkeypatch.setattr(torch.Tensor, "contiguous", tracked)
    tensor = torch.randn(64, 8, 16).transpose(1, 2)
    save_all(tmp_path, 1, [[Piece(f"w{i}", (16, 8), (0, 0), tensor[i]) for i in range(64)]])
    assert len(peak) == 64
    assert max(peak) == 1


# ── asking for what is not there ─────────────────────────────────────────────────────────────────


def test_an_unknown_entry_names_the_nearest(saved):
    with (
        open_checkpoint(saved) as checkpoint,
        pytest.raises(StorageError, match=r"no entry 'model/haed'; did you mean 'model/head'\?"),
    ):
        checkpoint.read("model/haed")


@pytest.mark.parametrize(
    ("start", "shape"),
    [((3, 0), (2, 8)), ((-1, 0), (1, 8)), ((0,), (4,)), ((0, 0), (4, 2**60)), ((0, 0), (-1, 8))],
)
def test_a_box_outside_is_refused_before_memory_is_taken(saved, start, shape):
    with (
        open_checkpoint(saved) as checkpoint,
        pytest.raises(StorageError, match=r"has shape \[4, 8\]; there is no box"),
    ):
        checkpoint.read("model/head", start, shape)


def test_another_dtype_is_refused(saved):
    with (
        open_checkpoint(saved) as checkpoint,
        pytest.raises(StorageError, match=r"is float32, asked for as torch\.float64"),
    ):
        checkpoint.read_into(torch.empty(4, 8, dtype=torch.float64), "model/head", (0, 0))


# ── pieces that do not make a tensor ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([rows("w", HEAD, [2, 2])[:1], []], "its pieces hold 16 of 32"),
        ([rows("w", HEAD, [2, 2])[:1], rows("w", HEAD, [2, 2])[:1]], "overlap"),
        ([rows("w", HEAD, [2, 2])[:1] * 2, []], "two pieces of 'w' start at"),
        ([rows("w", HEAD, [2, 2]), rows("w", HEAD.double(), [2, 2])[1:]], "ranks disagree about"),
        ([[Piece("w", (4, 8), (1, 0), HEAD)], []], "lies outside"),
        ([[Piece("w", (2,), (0,), torch.zeros(2, dtype=torch.complex128))], []], "cannot hold"),
        ([[Piece("w\n", (4, 8), (0, 0), HEAD)], []], "printable characters"),
    ],
    ids=["gap", "twice", "twice on one rank", "dtypes", "outside", "complex128", "name"],
)
def test_every_rank_learns_that_pieces_do_not_tile(tmp_path, ranks, message):
    save_all(tmp_path, 1, two_ranks())
    for rank in range(2):
        with pytest.raises(StorageError, match=message):
            run_both(tmp_path, ranks, raising=rank)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def run_both(root, ranks, raising):
    """Save on two ranks; raise what rank `raising` got, having seen that the other got it too."""
    group = Group.world(2)
    caught = []

    def guarded(rank):
        try:
            yield from save(root, 2, ranks[rank], {}, group, rank)
        except StorageError as error:
            caught.append((rank, error))

    run_local([guarded(rank) for rank in range(2)])
    assert [rank for rank, _ in sorted(caught, key=lambda pair: pair[0])] == [0, 1]
    assert len({str(error) for _, error in caught}) == 1
    raise dict(caught)[raising]


def test_meta_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(StorageError, match=r"rank 0: meta\.seen is a set"):
        save_all(tmp_path / "new", 1, two_ranks(), {"seen": {1}})
    assert not (tmp_path / "new").exists()


# ── retention and what is newest ─────────────────────────────────────────────────────────────────


def steps_in(root):
    return sorted(path.name for path in root.iterdir())


def test_the_newest_three_are_kept(tmp_path):
    for step in range(1, 6):
        save_all(tmp_path, step, two_ranks())
    assert steps_in(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    assert newest(tmp_path) == tmp_path / "step-00000005"


def test_two_are_always_kept_and_damaged_ones_do_not_count(tmp_path):
    for step in (1, 2, 3):
        save_all(tmp_path, step, two_ranks(), keep=1)
    assert steps_in(tmp_path) == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "rank1.safetensors").unlink()
    save_all(tmp_path, 4, two_ranks(), keep=1)
    assert steps_in(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_saving_a_step_again_replaces_it(tmp_path):
    for count in range(2):
        folder = save_all(tmp_path, 5, two_ranks(), {"count": count})
    assert steps_in(tmp_path) == ["step-00000005"]
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.meta == {"count": 1}


def test_leftovers_of_a_crash_are_removed_and_other_things_are_not(tmp_path):
    (tmp_path / ".step-00000007.tmp-00ff").mkdir()
    (tmp_path / ".step-00000007.tmp-00ff" / "rank0.safetensors").write_bytes(b"half")
    (tmp_path / ".step-00000003.old-00ff").mkdir()
    (tmp_path / "notes").mkdir()
    save_all(tmp_path, 8, two_ranks())
    assert steps_in(tmp_path) == ["notes", "step-00000008"]


def test_nothing_is_newest_where_nothing_was_saved(tmp_path):
    assert newest(tmp_path / "absent") is None
    assert newest(tmp_path) is None
    assert resume_all(tmp_path).damaged == ()
