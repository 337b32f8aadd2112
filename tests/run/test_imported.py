"""Runs that go on from what others wrote: torch's checkpoints, and exports taken back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from meshwright.errors import StorageError
from meshwright.run.data.samples import open_source as open_data
from meshwright.run.foreign.convert import FORMATS, convert, open_source
from meshwright.run.foreign.sidecar import SIDECAR
from meshwright.run.imported import checkpoint_in, checkpoints_in
from tests.run.jobs import Net, adamw, alone, fresh, job, losses, on_ranks, weights

STEPS = 3
FEW = [("dcp", False), ("universal", True)]
pytestmark = pytest.mark.filterwarnings("ignore")


class Tied(nn.Module):
    """Two names of one weight, a batch norm, and a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(nn.BatchNorm1d(40))
        self.again = nn.Linear(8, 40)
        self.again.weight = self.net.up.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        return self.net(x) * self.scale + self.net.down(torch.tanh(self.again(x)))


JOB = job(model=Tied)


def by_hand(made, steps):
    """What a user would write for one device: model, optimizer and losses after some steps."""
    model = fresh(made)
    optimizer = made.optimizer(model)
    source = open_data(made.data(), batch_size=made.batch_size, seed=made.seed)

    def go_on(first, count):
        found = []
        for step in range(first, first + count):
            batch = source.fetch(step, 0, made.batch_size, (0, made.batch_size)).tree
            loss = made.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    go_on(0, steps)
    return model, optimizer, go_on


def imported(path, root):
    """The checkpoint's folder, made of another format's."""
    source = open_source(path)
    assert source.step == STEPS or not source.of("optimizer")
    source = replace(source, step=STEPS)
    to = root / f"step-{STEPS:08d}"
    convert(source, to, "meshwright")
    return to


@pytest.mark.parametrize("plan", ["zero3,data=2", "data=1"])
def test_a_run_goes_on_from_what_torch_saved(tmp_path, plan):
    """Weights, buffers and Adam's state; then the same losses as torch's own loop."""
    model, optimizer, go_on = by_hand(JOB, STEPS)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "dcp")
    want = go_on(STEPS, 3)
    imported(tmp_path / "dcp", tmp_path / "checkpoints")

    def body(session):
        assert session.resume(tmp_path / "checkpoints") is not None
        assert session.step == STEPS
        return losses(session, 3)

    for seen in on_ranks(JOB, plan, body):
        assert seen == pytest.approx(want, rel=1e-5, abs=1e-6)


EXPORTS = [
    pytest.param(form, beside, marks=[] if (form, beside) in FEW else [pytest.mark.matrix])
    for form, kinds in FORMATS.items()
    for beside in (True, False)
    if "optimizer" in kinds
]


@pytest.mark.parametrize(("form", "beside"), EXPORTS)
def test_a_run_goes_on_from_its_own_export(tmp_path, form, beside):
    def start(session):
        losses(session, STEPS)
        session.save(tmp_path / "first")
        return losses(session, 3)

    (want, *_) = on_ranks(JOB, "zero2,data=2", start)
    convert(open_source(tmp_path / "first"), tmp_path / "there", form)
    if not beside:
        (tmp_path / "there" / SIDECAR).unlink(missing_ok=True)
    imported(tmp_path / "there", tmp_path / "second")

    def body(session):
        session.resume(tmp_path / "second")
        return losses(session, 3)

    for seen in on_ranks(JOB, "zero3,data=3", body):
        assert seen == pytest.approx(want, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("beside", [True, False])
def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path, beside):
    session = alone(JOB)
    losses(session, STEPS)
    session.save(tmp_path / "first")
    convert(open_source(tmp_path / "first"), tmp_path / "there", "safetensors")
    if not beside:
        (tmp_path / "there" / SIDECAR).unlink()
    imported(tmp_path / "there", tmp_path / "second")
    with pytest.raises(StorageError, match=r"without an optimizer's state.*weights="):
        alone(JOB).resume(tmp_path / "second")


def test_another_model_is_still_told(tmp_path):
    model, optimizer, _ = by_hand(JOB, STEPS)
    found, state = get_state_dict(model, optimizer)
    found["net.extra"] = torch.ones(3)
    del found["net.down.bias"]
    dcp.save({"model": found, "optimizer": state}, checkpoint_id=tmp_path / "dcp")
    imported(tmp_path / "dcp", tmp_path / "checkpoints")
    with pytest.raises(
        StorageError, match=r"(?s)net.down.bias is in the model.*net.extra is in the"
    ):
        alone(JOB).resume(tmp_path / "checkpoints")


def test_a_job_begins_with_the_weights_of_a_checkpoint(tmp_path):
    first = alone(JOB)
    losses(first, STEPS)
    first.save(tmp_path / "checkpoints")
    want = weights(first)
    for inner in ("", "checkpoints", f"checkpoints/step-{STEPS:08d}"):
        found = weights(alone(replace(JOB, weights=tmp_path / inner, seed=7)))
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_which_checkpoint_a_folder_means(tmp_path):
    session = alone(job(optimizer=adamw))
    for _ in range(2):
        losses(session, 1)
        session.save(tmp_path / "run" / "checkpoints")
    root = tmp_path / "run" / "checkpoints"
    both = [root / "step-00000002", root / "step-00000001"]
    for path in (tmp_path / "run", root):
        assert checkpoint_in(path) == both[0]
        assert checkpoint_in(path, 1) == both[1]
        assert checkpoints_in(path) == both
        with pytest.raises(StorageError, match="no checkpoint of step 7; it has 1, 2"):
            checkpoint_in(path, 7)
    assert checkpoint_in(both[1]) == both[1]
    assert checkpoint_in(Path(tmp_path)) is None
    assert checkpoints_in(tmp_path) == [tmp_path]
