"""Runs of a job with phases: turns, metrics, checkpoints of any plan under any other."""

from __future__ import annotations

import json

import pytest
import torch

import meshwright as mw
from meshwright.errors import StorageError, UsageError
from meshwright.run.checkpoint.save import newest, open_checkpoint
from tests.run.duet import BATCH, duet, points
from tests.run.jobs import alone, losses, on_ranks, step, weights


def test_checkpoints_hold_every_optimizer_and_go_on_under_another_plan(tmp_path):
    made = duet(ema=0.9, noisy=True)
    whole = alone(made)
    losses(whole, 3)
    want, after = losses(whole, 4), weights(whole)

    def saved(session):
        losses(session, 3)
        return session.save(tmp_path)

    on_ranks(made, "zero3,data=2", saved)
    with open_checkpoint(newest(tmp_path)) as checkpoint:
        names = set(checkpoint.entries)
        assert {"optimizer/d/exp_avg/critic.0.weight", "ema/critic.0.weight"} < names
        assert "optimizer/g/momentum_buffer/generator.2.bias" in names
        assert not any(n.startswith("optimizer/g/") and "critic" in n for n in names)
        assert checkpoint.meta["average"]["steps"] == {"d": 2, "g": 1}
        assert checkpoint.meta["phases"]["g"]["scheduler"]["last_epoch"] == 1

    def go_on(session):
        assert session.resume(tmp_path) is not None
        found = losses(session, 4)
        return found, weights(session), session.module("ema")

    (found, mine, average), _ = on_ranks(made, "zero1,data=2", go_on)
    assert found == pytest.approx(want, rel=1e-5)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-4, atol=1e-5)
    other = whole.module("ema")
    for name, tensor in average.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(tensor, mine[name])


def test_a_checkpoint_of_other_phases_is_refused(tmp_path):
    session = alone(duet())
    losses(session, 1)
    session.save(tmp_path)
    alone_job = duet(phases=None, loss=duet().phases["d"].loss, optimizer=lambda m: torch.optim.SGD(
        m.parameters(), lr=0.1))  # fmt: skip
    with pytest.raises(StorageError, match="is of a job with phases d, g, this one has one loss"):
        alone(alone_job).resume(tmp_path)


def test_a_phase_can_be_named_and_is_told(tmp_path):
    lines = []
    with mw.Run(duet(steps=3), run_dir=tmp_path, loggers=[lines.append], quiet=True) as run:
        first = run.step("g")
        assert first.phase == "g"
        assert run.lr == pytest.approx(0.05)  # its schedule was stepped once
        assert run.step("g").phase == "g"
        assert run.step().phase == "d"  # step 2 of (d, g)
        pushed = [t[:BATCH] for t in points().tensors]
        assert run.step(pushed, phase="d").phase == "d"
        with pytest.raises(UsageError, match="the job has no phase 'x'; it has 'd', 'g'"):
            run.step("x")
        held = run.evaluate(points())
        assert held.keys() == {"d/loss", "d/seen", "g/loss"}
        assert run.module().generator[0].weight.requires_grad
        assert run.module().critic[0].weight.requires_grad
    told = [line for line in lines if "phase" in line]
    assert [line["phase"] for line in told] == ["g", "g", "d", "d"]
    assert told[2]["d"].keys() == {"loss", "lr", "seen"}
    assert "g" not in told[2]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["phases"].keys() == {"d", "g"}


def test_one_loss_has_no_phases_to_name(tmp_path):
    made = duet().of("d")
    with mw.Run(made, run_dir=tmp_path, quiet=True) as run, pytest.raises(UsageError) as caught:
        run.step("d")
    assert "the job has no phase 'd'; it has one loss" in str(caught.value)


def test_the_bill_holds_all_optimizers_and_the_largest_phase():
    found = mw.explain(duet(), "data=2")
    each = {name: mw.explain(duet().of(name), "data=2") for name in ("d", "g")}
    bill = found["memory"][0]["parts"]
    assert found["phases"]["g"]["memory"] == found["phases"]["d"]["memory"] == found["memory"]
    parts = [each[name]["memory"][0]["parts"] for name in each]
    assert bill["optimizer"] == sum(part["optimizer"] for part in parts)
    assert min(part["optimizer"] for part in parts) > 0
    assert bill["weights"] == parts[0]["weights"]
    assert found["phases"]["d"]["optimizer"]["class"] == "Adam"
    assert found["phases"]["g"]["optimizer"]["class"] == "SGD"


def test_eager_has_no_phases(tmp_path):
    with (
        pytest.raises(UsageError, match="--eager runs one loss"),
        mw.Run(duet(), run_dir=tmp_path, eager=True, quiet=True),
    ):
        pass


def test_a_batch_is_drawn_for_every_step():
    session = alone(duet())
    seen = [step(session).metrics.step for _ in range(3)]
    assert seen == [0, 1, 2]
