"""Saving while training goes on: what steps wait for, what failures do, what exits leave."""

from __future__ import annotations

import errno
import os
import resource
import threading

import pytest
import torch

from meshwright.comm.base import Group
from meshwright.comm.local import run_local
from meshwright.errors import StorageError
from meshwright.run.checkpoint import saver as module
from meshwright.run.checkpoint import staging
from meshwright.run.checkpoint.save import Piece, newest, open_checkpoint
from meshwright.run.checkpoint.saver import Patience, Saver
from tests.run.jobs import alone, job, losses, on_ranks
from tests.run.saving import HEAD, rows, save_all, two_ranks
from tests.run.saving_killed import path_of

QUICK = Patience(room=0.05, end=0.05, leaving=0.05)
SOON = 30.0


def savers(size=2, patience=None):
    group = Group.world(size)
    return [Saver(group, rank, patience) for rank in range(size)]


def stage(all_, root, step, ranks=None, keep=3, meta=None):
    """Begin to save on all ranks; why not, told alike."""
    ranks = ranks or two_ranks()
    told = run_local(
        [s.stage(root, step, r, meta or {}, keep) for s, r in zip(all_, ranks, strict=True)]
    )
    assert len(set(told)) == 1
    return told[0]


def settle(all_):
    run_local([saver.settle() for saver in all_])


def advance(all_):
    run_local([saver.advance() for saver in all_])


def wait_for(all_):
    """Until the threads of this phase have ended."""
    for saver in all_:
        task = saver._pending[0].task
        assert task is None or task.wait(SOON)


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def steps_in(root):
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def gate(monkeypatch):
    """Ranks whose threads may write: `gate.open(0)`; closed for all at first."""

    class Gate:
        def __init__(self):
            self.events = {rank: threading.Event() for rank in range(4)}

        def open(self, *ranks):
            for rank in ranks:
                self.events[rank].set()

    made, write = Gate(), module._write

    def waiting(order, rank, pieces):
        assert made.events[rank].wait(SOON)
        write(order, rank, pieces)

    monkeypatch.setattr(module, "_write", waiting)
    yield made
    made.open(*made.events)


# ── a save ───────────────────────────────────────────────────────────────────────────────────────


def test_what_is_saved_is_the_state_when_it_was_staged(tmp_path, gate):
    weights = HEAD.clone()
    all_ = savers()
    assert stage(all_, tmp_path, 20, [[p] for p in rows("w", weights, [2, 2])]) == ""
    weights.mul_(0)
    assert not any(tmp_path.iterdir())  # the stall touches no disk
    gate.open(0, 1)
    settle(all_)
    assert [saver.saved for saver in all_] == [20, 20]
    assert steps_in(tmp_path) == ["step-00000020"]
    with open_checkpoint(tmp_path / "step-00000020") as checkpoint:
        assert torch.equal(checkpoint.read("w"), HEAD)
    names = sorted(path.name for path in (tmp_path / "step-00000020").iterdir())
    assert names == ["commit.json", "manifest.json", "rank0.safetensors", "rank1.safetensors"]


def test_nothing_counts_before_all_ranks_have_written(tmp_path, gate):
    all_ = savers()
    stage(all_, tmp_path, 20, meta={"by": "first"})
    gate.open(0)
    assert all_[0]._pending[0].task.wait(SOON)
    assert [saver.busy for saver in all_] == [False, True]  # told to all with the next step
    gate.open(1)
    wait_for(all_)
    assert not any(saver.busy for saver in all_)
    assert newest(tmp_path) is None
    advance(all_)
    wait_for(all_)
    assert [saver.saved for saver in all_] == [-1, -1]
    advance(all_)
    assert [saver.saved for saver in all_] == [20, 20]
    with open_checkpoint(newest(tmp_path)) as checkpoint:
        assert checkpoint.meta == {"by": "first"}
        checkpoint.verify()


def test_tensors_of_all_kinds_are_copied(tmp_path):
    tensors = {
        "transposed": HEAD.t(),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7),
        "none": torch.empty(0, 3),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(HEAD.bfloat16()),
    }
    pieces = [Piece(n, tuple(t.shape), (0,) * t.dim(), t) for n, t in tensors.items()]
    all_ = savers(1)
    stage(all_, tmp_path, 1, [pieces])
    settle(all_)
    with open_checkpoint(newest(tmp_path)) as checkpoint:
        for name, tensor in tensors.items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor.detach().resolve_conj())


def test_memory_is_taken_once_and_twice_where_two_are_in_flight(tmp_path, gate, monkeypatch):
    taken, make = [], staging._memory

    def counting(size):
        taken.append(size)
        return make(size)

    monkeypatch.setattr(staging, "_memory", counting)
    gate.open(0, 1)
    all_ = savers()
    for step in (1, 2, 3):
        stage(all_, tmp_path, step)
        settle(all_)
    assert len(taken) == 2  # a buffer a rank
    gate.events[0].clear()
    gate.events[1].clear()
    stage(all_, tmp_path, 4)
    stage(all_, tmp_path, 5)
    assert len(taken) == 4
    assert all_[0].pending == (4, 5)
    gate.open(0, 1)
    settle(all_)
    stage(all_, tmp_path, 6)
    stage(all_, tmp_path, 7)
    settle(all_)
    assert len(taken) == 4
    assert all(size >= HEAD.nbytes // 2 for size in taken)
    assert steps_in(tmp_path) == ["step-00000005", "step-00000006", "step-00000007"]


def test_memory_can_be_made_before_it_is_needed(tmp_path, monkeypatch):
    (saver,) = savers(1)
    piece = Piece("w", (4, 8), (0, 0), HEAD)
    saver.prepare([piece])
    monkeypatch.setattr(staging, "_memory", lambda size: pytest.fail("more memory was taken"))
    assert stage([saver], tmp_path, 1, [[piece]]) == ""
    settle([saver])
    assert newest(tmp_path) == tmp_path / "step-00000001"


def test_a_state_that_grew_takes_other_memory(tmp_path):
    all_ = savers(1)
    for step, tensor in enumerate((HEAD, torch.randn(9, 9), HEAD)):
        stage(all_, tmp_path, step, [[Piece("w", tuple(tensor.shape), (0, 0), tensor)]])
        settle(all_)
        with open_checkpoint(newest(tmp_path)) as checkpoint:
            assert torch.equal(checkpoint.read("w"), tensor)
    assert len(all_[0]._buffers._free) == 1


# ── a disk that refuses, or takes long ───────────────────────────────────────────────────────────


def refuse(monkeypatch, name, part, number):
    perform = getattr(os, name)

    def refusing(target, *rest, **named):
        if part in str(path_of(target)):
            raise OSError(number, os.strerror(number))
        return perform(target, *rest, **named)

    monkeypatch.setattr(os, name, refusing)


@pytest.mark.parametrize(
    ("name", "part", "number", "message"),
    [
        ("write", "rank1.safe", errno.ENOSPC, "rank 1: No space left on device; free space"),
        ("fsync", "rank0.safe", errno.EIO, "rank 0: Input/output error"),
        ("mkdir", ".step-", errno.EROFS, "rank 0: Read-only file system; choose a folder"),
        ("write", "manifest.json", errno.ENOSPC, "rank 0: No space left on device"),
        ("rename", ".step-", errno.EACCES, "rank 0: Permission denied"),
        ("write", "rank1.json", errno.ENOSPC, "rank 1: No space left on device"),
    ],
)
def test_a_failure_is_told_by_all_ranks_and_costs_nothing_else(
    tmp_path, monkeypatch, name, part, number, message
):
    save_all(tmp_path, 10, two_ranks())
    before = contents(tmp_path)
    all_ = savers()
    with monkeypatch.context() as patched:
        refuse(patched, name, part, number)
        stage(all_, tmp_path, 20)
        settle(all_)
    (told,), (other,) = (saver.told for saver in all_)
    assert told == other
    assert told.startswith("checkpoint of step 20 was not saved, training goes on: saving the ")
    assert message in told
    assert contents(tmp_path) == before
    assert steps_in(tmp_path) == ["step-00000010"]
    assert [saver.saved for saver in all_] == [-1, -1]
    stage(all_, tmp_path, 30)  # the disk is well again
    settle(all_)
    assert newest(tmp_path) == tmp_path / "step-00000030"


def test_a_real_limit_of_the_kernel(tmp_path):
    big = [[piece] for piece in rows("w", torch.randn(2000, 64), [1000, 1000])]
    save_all(tmp_path, 10, two_ranks())
    before = contents(tmp_path)
    all_ = savers()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        stage(all_, tmp_path, 20, big)
        settle(all_)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in all_[0].told[0]
    assert contents(tmp_path) == before
    assert newest(tmp_path) == tmp_path / "step-00000010"


def test_a_slow_disk_holds_two_saves_and_then_no_step(tmp_path, gate):
    all_ = savers(patience=Patience(alarm=0.0, room=0.05))
    assert stage(all_, tmp_path, 1) == stage(all_, tmp_path, 2) == ""
    assert all(saver.busy for saver in all_)
    assert [saver.told for saver in all_] == [[slow(1)]] * 2
    assert stage(all_, tmp_path, 3) == "disk"
    assert stage(all_, tmp_path, 4) == "disk"  # not waited for again
    assert all_[0].pending == (1, 2)
    gate.open(0, 1)
    wait_for(all_)
    assert stage(all_, tmp_path, 5) == ""
    settle(all_)
    assert steps_in(tmp_path) == ["step-00000001", "step-00000002", "step-00000005"]


def slow(step):
    return (
        f"the checkpoint of step {step} is still being written after 0 s; training goes on, older "
        "ones are as they were"
    )


def test_an_end_does_not_wait_for_a_disk_for_ever(tmp_path, gate):
    save_all(tmp_path, 10, two_ranks())
    all_ = savers(patience=QUICK)
    stage(all_, tmp_path, 20)
    gate.open(0)
    settle(all_)
    assert all("rank 1: the disk has not taken it in 0.05 s" in saver.told[0] for saver in all_)
    assert all(saver.pending == () for saver in all_)
    gate.open(1)
    assert newest(tmp_path) == tmp_path / "step-00000010"
    assert len(all_[1]._buffers._free) == 0  # the thread that hung may still read it
    assert len(all_[0]._buffers._free) == 1


def test_a_host_without_memory_for_a_copy_is_told(tmp_path, monkeypatch):
    all_ = savers()
    monkeypatch.setattr(all_[1]._buffers, "take", lambda size: None)
    assert stage(all_, tmp_path, 1) == "memory"
    assert all(saver.pending == () for saver in all_)
    assert all_[0]._buffers.taken == 0
    monkeypatch.undo()
    assert stage(all_, tmp_path, 1) == ""
    settle(all_)


def test_meta_that_is_no_json_is_refused_on_all_ranks(tmp_path):
    all_ = savers()
    with pytest.raises(StorageError, match=r"rank 0: meta\.seen is a set"):
        stage(all_, tmp_path, 1, meta={"seen": {1}})
    assert all_[0].pending == ()
    assert list(tmp_path.iterdir()) == []


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ranks_that_end_by_an_error_finish_without_each_other(tmp_path, order):
    all_ = savers()
    stage(all_, tmp_path, 20)
    stage(all_, tmp_path, 21)
    ends = [threading.Thread(target=all_[rank].leave) for rank in order]
    for end in ends:
        end.start()
    for end in ends:
        end.join(SOON)
    assert newest(tmp_path) == tmp_path / "step-00000021"
    assert steps_in(tmp_path) == ["step-00000020", "step-00000021"]


def test_a_rank_that_has_not_written_leaves_no_checkpoint(tmp_path, gate):
    save_all(tmp_path, 10, two_ranks())
    all_ = savers(patience=QUICK)
    stage(all_, tmp_path, 20)
    gate.open(0)
    all_[0].leave()
    assert newest(tmp_path) == tmp_path / "step-00000010"


def test_what_was_written_when_the_run_ends_is_committed_by_its_own_thread(tmp_path):
    all_ = savers()
    stage(all_, tmp_path, 20)
    wait_for(all_)
    advance(all_)
    all_[0].leave()
    assert newest(tmp_path) == tmp_path / "step-00000020"


def test_folders_of_a_crash_go_and_those_in_use_stay(tmp_path, gate):
    (tmp_path / ".step-00000007.tmp-00ff").mkdir()
    all_ = savers()
    stage(all_, tmp_path, 8)
    stage(all_, tmp_path, 9)
    gate.open(0, 1)
    settle(all_)
    assert steps_in(tmp_path) == ["step-00000008", "step-00000009"]
    assert all_[0].told == []


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────

PLANS = ["data=1", "zero3,data=2", "pipeline=2", "pipeline=2,schedule=pipedream"]


def bring_in(session, step):
    """Go on until the checkpoint of `step` is in, which takes a step or two a phase."""
    for _ in range(10):
        if session.saver.saved == step:
            return
        wait_for([session.saver])
        losses(session, 1)
    raise AssertionError(f"the checkpoint of step {step} did not come in")


@pytest.mark.parametrize("plan", PLANS)
def test_steps_go_on_while_it_is_written_and_it_comes_in_by_itself(plan, tmp_path):
    made = job()

    def body(session):
        losses(session, 2)
        session.save_soon(tmp_path / "soon")
        session.save(tmp_path / "now")
        losses(session, 1)
        session.save_soon(tmp_path / "soon")
        bring_in(session, 3)
        return session.notes

    for notes in on_ranks(made, plan, body):
        assert not [note for note in notes if "checkpoint" in note]
    with (
        open_checkpoint(tmp_path / "soon" / "step-00000002") as soon,
        open_checkpoint(tmp_path / "now" / "step-00000002") as now,
    ):
        assert soon.entries.keys() == now.entries.keys()
        assert soon.meta == now.meta
        for name in soon.entries:
            assert torch.equal(soon.read(name), now.read(name))


@pytest.mark.parametrize("plan", PLANS[1:])
def test_a_rank_that_still_writes_is_waited_for_by_nobody(plan, tmp_path, gate):
    made = job()
    gate.open(0)

    def body(session):
        losses(session, 1)
        session.save_soon(tmp_path)
        seen = losses(session, 6)
        assert session.saver.saved == -1
        gate.open(1)
        bring_in(session, 1)
        return seen

    seen = on_ranks(made, plan, body)
    assert seen[0] == seen[1]
    again = alone(made)
    again.resume(tmp_path)
    if "pipedream" not in plan:
        assert losses(again, 6) == pytest.approx(seen[0], rel=1e-4)


def test_where_there_is_no_memory_the_save_is_made_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(staging.Buffers, "take", lambda self, size: None)
    session = alone(job())
    losses(session, 1)
    session.save_soon(tmp_path)
    assert newest(tmp_path) == tmp_path / "step-00000001"
    assert any("written while training waited" in note for note in session.notes)
    assert session.saver.saved == 1


def test_a_save_at_once_comes_after_those_on_their_way(tmp_path, gate):
    session = alone(job())
    losses(session, 1)
    session.save_soon(tmp_path)
    losses(session, 1)
    gate.open(0)
    session.save(tmp_path)
    assert steps_in(tmp_path) == ["step-00000001", "step-00000002"]
