"""Sessions whose state is offloaded: saved, gone on with, evaluated, exported, damaged."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import nn

from meshwright.errors import PlanError, StorageError, UsageError
from meshwright.run.checkpoint.save import open_checkpoint
from meshwright.run.weights import read
from tests.run.jobs import Points, alone, close, job, losses, on_ranks

SMALL = job()
PLANS = ("data=2", "zero1,data=2,offload=disk", "zero3,data=2,offload=host", "zero3,data=3",
         "data=1,offload=optimizer:disk")  # fmt: skip


def tensors(path):
    """All that a checkpoint holds."""
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.entries}


def trained(session, root, steps=2):
    losses(session, steps)
    path = session.save(root)
    return path, losses(session, 2)


SAMPLE = list(itertools.pairwise(PLANS[:4]))
REST = [pair for pair in itertools.permutations(PLANS, 2) if pair not in SAMPLE]


@pytest.mark.parametrize(
    ("before", "after"),
    [*SAMPLE, *(pytest.param(*pair, marks=pytest.mark.matrix) for pair in REST)],
)
def test_any_plan_goes_on_with_what_another_saved(before, after, tmp_path):
    first, want = on_ranks(SMALL, before, lambda s: trained(s, tmp_path / "a"))[0]

    def go_on(session):
        session.resume(tmp_path / "a")
        copy = session.save(tmp_path / "b")
        return copy, losses(session, 2)

    copy, seen = on_ranks(SMALL, after, go_on)[0]
    assert seen == pytest.approx(want, rel=1e-5)
    close(tensors(first), tensors(copy), to=0.0)


@pytest.mark.parametrize("plan", ["data=2,offload=disk", "zero3,data=2,offload=host"])
def test_it_evaluates_predicts_exports_and_gives_its_module_as_without(plan, tmp_path):
    def seen(session):
        losses(session, 2)
        session.export(tmp_path / session.build.plan.label)
        module = session.module()
        found = session.evaluate(Points(20, 9))
        told = session.predict(Points(7, 8), lambda model, batch: model(batch["x"]))
        return found, told, None if module is None else module.state_dict()

    (found, told, weights), *_ = on_ranks(SMALL, plan, seen)
    (want, said, held), *_ = on_ranks(SMALL, plan.partition(",offload")[0], seen)
    assert found == pytest.approx(want, rel=1e-6)
    close({"told": told}, {"told": said})
    close(weights, held)
    exported = [read(folder) for folder in tmp_path.iterdir()]
    assert len(exported) == 2
    close(*({n: e.tensor(n) for n in e.entries} for e in exported))


def flipped(path):
    """One bit of what lies there."""
    with path.open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize("damage", [flipped, lambda path: os.truncate(path, 0)])
@pytest.mark.parametrize("part", ["optimizer", "params"])
def test_what_a_disk_lost_ends_training_and_leaves_checkpoints_whole(part, damage, tmp_path):
    session = alone(SMALL, f"data=1,offload={part}:disk", offload=tmp_path / "offload")
    before, _ = trained(session, tmp_path / "saved")
    held = tensors(before)
    (file,) = (tmp_path / "offload").iterdir()
    damage(file)
    with pytest.raises(StorageError, match=rf"{file}.* is lost; start again from the newest") as it:
        losses(session, 1)
    assert it.value.exit_status == 74
    with pytest.raises(StorageError, match="is lost"):
        session.save(tmp_path / "saved")
    session.close()
    close(tensors(before), held, to=0.0)
    assert not list((tmp_path / "offload").iterdir())
    again = alone(SMALL, f"data=1,offload={part}:disk", offload=tmp_path / "offload")
    assert again.resume(tmp_path / "saved") == before
    again.close()


def together(parameters):
    """An optimizer whose step of one parameter depends on all."""

    class Shared(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                norm = nn.utils.get_total_norm(
                    [p.grad for p in group["params"] if p.grad is not None]
                )
                for p in group["params"]:
                    if p.grad is not None:
                        p.data.sub_(p.grad / (1 + norm), alpha=group["lr"])

    return Shared(parameters, lr=0.1)


def test_an_optimizer_that_steps_parameters_together_stays_in_memory():
    made = job(optimizer=lambda m: together(m.parameters()))
    with pytest.raises(PlanError, match=r"Shared steps parameters together.*optimizer:host"):
        alone(made, "data=1,offload=optimizer:disk")
    offloaded, plain = alone(made, "data=1,offload=optimizer"), alone(made)
    assert losses(offloaded, 3) == pytest.approx(losses(plain, 3), rel=1e-6)


def test_eager_code_is_not_offloaded():
    with pytest.raises(UsageError, match=r"--eager.*offload=host moves its state"):
        alone(SMALL, "data=1,offload=host", eager=True)
