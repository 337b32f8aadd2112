"""Checkpoints of sessions: written under one plan, read under any other."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from examples import digits, gpt
from meshwright.errors import StorageError, UserCodeError
from meshwright.job import Job
from meshwright.run.checkpoint.manifest import record_of, seal
from meshwright.run.checkpoint.save import newest, open_checkpoint
from tests.run.jobs import Net, Points, adamw, alone, job, losses, on_ranks, sgd, step

STEP = 20


def tiny_gpt() -> Job:
    """The example's GPT, small, on the text of its own file."""
    text = Path(gpt.__file__).read_bytes()
    return Job(
        model=lambda: gpt.GPT(1, 32, 16, dropout=0.1),
        loss=gpt.loss,
        optimizer=lambda model: gpt.optimizer(model, 1e-3),
        data=lambda: gpt.Windows(text, 16),
        batch_size=8,
        schedule=lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
        clip_norm=1.0,
    )


def tied_gpt() -> Job:
    """The same without dropout; the head's weight is the embedding's."""
    return replace(tiny_gpt(), model=lambda: gpt.GPT(1, 32, 16, tied=True))


def tiny_digits() -> Job:
    """The example's convolutions, batch norm, dropout; SGD with momentum."""
    return digits.job(width=4, batch=16, lr=0.01)


def saved(made, plan, root, steps=STEP):
    """Save under a plan after some steps."""

    def body(session):
        losses(session, steps)
        session.extra["seen"] = steps
        return session.save(root)

    return on_ranks(made, plan, body)[0]


@pytest.mark.parametrize("example", [tiny_gpt, tiny_digits])
def test_a_run_goes_on_under_another_plan_as_if_nothing_had_happened(example, tmp_path):
    made = example()
    whole = alone(made)
    losses(whole, STEP)
    want = losses(whole, 5)
    saved(made, "zero3,data=2", tmp_path)

    def go_on(session):
        assert session.resume(tmp_path) is not None
        assert (session.step, session.extra) == (STEP, {"seen": STEP})
        return losses(session, 5)

    for plan in ("data=4", "data=1"):
        for seen in on_ranks(made, plan, go_on):
            assert seen == pytest.approx(want, rel=1e-6, abs=1e-6)


PLANS = [
    f"{zero}data={ranks}" for ranks in (1, 2, 3, 4) for zero in ("", "zero1,", "zero2,", "zero3,")
]
PAIRS = random.Random(20).sample(list(itertools.permutations(PLANS, 2)), 10)


def _normed():
    return Net(nn.BatchNorm1d(40))


SMALL = job(
    model=_normed,
    optimizer=lambda m: torch.optim.NAdam(m.parameters(), lr=1e-2, momentum_decay=0.01),
    schedule=lambda o: lr_scheduler.ExponentialLR(o, 0.9),
)


def state_of(path) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, whole."""
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.entries}


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_any_plan_reads_what_any_plan_wrote_to_the_bit(before, after, tmp_path):
    first = saved(SMALL, before, tmp_path / "a", steps=2)

    def copied(session):
        session.resume(tmp_path / "a")
        lr = session.lr
        return session.save(tmp_path / "b"), lr

    (second, lr), *_ = on_ranks(SMALL, after, copied)
    one, two = state_of(first), state_of(second)
    assert one.keys() == two.keys()
    assert {"optimizer/step/up.weight", "optimizer/mu_product/up.weight"} <= one.keys()
    assert one["optimizer/mu_product/up.weight"].shape == ()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    assert lr == pytest.approx(1e-2 * 0.9**2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tensor=2", ("zero3,data=2", "data=1")),
        pytest.param("zero3,data=2,tensor=2", ("context=2",), marks=pytest.mark.matrix),
        pytest.param("zero3,data=4,shard=2", ("tensor=4",), marks=pytest.mark.matrix),
    ],
)
def test_weights_split_by_their_use_are_read_under_other_plans_to_the_bit(before, after, tmp_path):
    made = tiny_gpt()
    first = state_of(saved(made, before, tmp_path / "0", steps=1))
    for number, plan in enumerate(after):

        def copied(session, number=number):
            assert session.resume(tmp_path / f"{number}") is not None
            return session.save(tmp_path / f"{number + 1}")

        found = state_of(on_ranks(made, plan, copied)[0])
        assert found.keys() == first.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, found[name]), (plan, name)


def test_stages_write_what_they_hold_and_read_it_under_any_other_plan(tmp_path):
    """Tied weights live at both ends of the pipeline, and are written once."""
    made = tied_gpt()
    plans = ["pipeline=2", "data=2", "zero3,data=2,pipeline=2,microbatches=2", "data=1"]
    first = state_of(saved(made, plans[0], tmp_path / "0", steps=1))
    whole = alone(made)
    losses(whole, 1)
    assert first.keys() == state_of(whole.save(tmp_path / "whole")).keys()
    want = losses(whole, 2)
    for number, plan in enumerate(plans[1:]):

        def copied(session, number=number):
            assert session.resume(tmp_path / f"{number}") is not None
            return session.save(tmp_path / f"{number + 1}"), losses(session, 2)

        (path, seen), *others = on_ranks(made, plan, copied)
        found = state_of(path)
        assert found.keys() == first.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, found[name]), (plan, name)
        assert seen == pytest.approx(want, rel=1e-4)
        assert all(other == (path, seen) for other in others)


@pytest.mark.parametrize("plan", ["pipeline=2", "pipeline=2,schedule=zb-v,microbatches=1"])
def test_batch_norms_statistics_are_kept_by_the_stage_that_has_them(plan, tmp_path):
    first = state_of(saved(SMALL, plan, tmp_path / "a", steps=2))

    def copied(session):
        session.resume(tmp_path / "a")
        return session.save(tmp_path / "b")

    second = state_of(on_ranks(SMALL, "data=2", copied)[0])
    assert first.keys() == second.keys()
    assert "buffer/middle.running_mean" in first
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("plan", ["zero3,data=2", "pipeline=2"])
def test_state_that_is_no_tensor_is_kept(plan, tmp_path):
    class Counting(torch.optim.SGD):
        """SGD that counts its steps as a Python number."""

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["count"] = self.state[p].get("count", 0) + 1
                    self.state[p]["note"] = None

    made = job(optimizer=lambda m: Counting(m.parameters(), lr=0.1, momentum=0.9))
    saved(made, plan, tmp_path, steps=3)
    session = alone(made)
    session.resume(tmp_path)
    losses(session, 1)
    held = session.worker.state.optimizer.state
    assert len(held) == 4
    assert {(slots["count"], slots["note"]) for slots in held.values()} == {(4, None)}


def refused(made, root, **how):
    with pytest.raises(StorageError) as caught:
        alone(made, **how).resume(root)
    return str(caught.value)


def test_what_a_checkpoint_is_of(tmp_path):
    """Another model, optimizer, batch size, seed, other groups: each is told."""
    saved(job(), "data=1", tmp_path, steps=1)

    class Renamed(Net):
        def __init__(self):
            super().__init__()
            self.top = self.down
            del self.down

    told = refused(job(model=Renamed), tmp_path)
    assert "is of another model: 2 missing, 2 extra" in told
    assert "model/top.weight is in the model, not in the checkpoint" in told

    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 41)
            self.down = nn.Linear(41, 3)

    assert "model/up.weight has shape [40, 8] in the checkpoint, [41, 8] in" in refused(
        job(model=Wider), tmp_path
    )
    assert "holds the state of AdamW, the job uses SGD; use the same optimizer" in refused(
        job(optimizer=sgd), tmp_path
    )
    assert "was trained with batch_size=12, the job has 10; samples would be" in refused(
        job(batch_size=10), tmp_path
    )
    assert "was trained with seed=0, the job has 3" in refused(job(seed=3), tmp_path)

    def two_groups(model):
        groups = [{"params": model.up.parameters()}, {"params": model.down.parameters()}]
        return torch.optim.AdamW(groups, lr=1e-2)

    assert "has 1 optimizer group, the job makes 2 optimizer groups; make the same" in refused(
        job(optimizer=two_groups), tmp_path
    )
    told = refused(job(optimizer=lambda m: adamw(m.up)), tmp_path)
    assert "down.bias is in the checkpoint's optimizer group 0 only (2 such parameters)" in told

    with pytest.raises(UserCodeError, match="has 40 samples, but had 50 when the checkpoint"):
        alone(job(data=lambda: Points(40))).resume(tmp_path)


def test_a_checkpoint_without_optimizer_state_is_no_place_to_go_on_from(tmp_path):
    path = saved(job(), "data=2", tmp_path, steps=1)
    manifest = path / "manifest.json"
    tree = json.loads(manifest.read_bytes())
    del tree["sha256"]
    assert tree["meta"]["optimizer"]["slots"] == {"step": 4, "exp_avg": 4, "exp_avg_sq": 4}
    del tree["entries"]["optimizer/exp_avg/up.weight"]
    data = seal(tree)
    manifest.write_bytes(data)
    (path / "commit.json").write_bytes(record_of(data))
    told = refused(job(), tmp_path)
    assert "has the optimizer's exp_avg of 3 of 4 parameters; take a whole one" in told


def test_the_newest_whole_one_is_taken(tmp_path):
    made = job()
    session = alone(made)
    for _ in range(3):
        losses(session, 1)
        session.save(tmp_path)
    file = tmp_path / "step-00000003" / "rank0.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)

    def body(again):
        path = again.resume(tmp_path)
        return path, again.step, again.notes, losses(again, 1)

    for path, at, notes, seen in on_ranks(made, "data=2", body):
        assert path == newest(tmp_path) == tmp_path / "step-00000002"
        assert at == 2
        assert any("step-00000003" in note for note in notes)
        assert seen == pytest.approx(losses(alone(made), 3)[2:])


def test_nothing_to_resume(tmp_path):
    assert alone(job()).resume(tmp_path / "none") is None


@pytest.mark.parametrize("value", [{1, 2}, Path("x"), torch.zeros(2), float("nan"), {3: 4}])
def test_extra_is_json(value, tmp_path):
    session = alone(job())
    session.extra["best"] = {"deep": [value]}
    with pytest.raises(UserCodeError, match=r"run\.extra cannot be saved: .*keep finite numbers"):
        session.save(tmp_path)
    session.extra["best"] = {"deep": [1, 2.5, None, "text", True]}
    session.save(tmp_path)
    again = alone(job())
    again.resume(tmp_path)
    assert again.extra == session.extra


class Counter:
    """Global batches of one's own; its place is its state."""

    def __init__(self):
        self.at = 0
        self.read = 0

    def __iter__(self):
        return self

    def __next__(self):
        g = torch.Generator().manual_seed(self.at)
        self.at, self.read = self.at + 1, self.read + 1
        return {
            "x": torch.randn(12, 8, generator=g),
            "y": torch.randint(0, 3, (12,), generator=g),
        }

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Forgetful:
    """The same batches, without a state."""

    def __iter__(self):
        return iter(list(itertools.islice(Counter(), 12)))


@pytest.mark.parametrize("data", [Counter, Forgetful])
def test_streams_go_on_where_they_were(data, tmp_path):
    made = job(data=data)
    want = losses(alone(made), 8)
    saved(made, "data=2", tmp_path, steps=5)

    def go_on(session):
        session.resume(tmp_path)
        seen = losses(session, 3)
        return seen, session.notes

    for seen, notes in on_ranks(made, "data=3", go_on):
        assert seen == pytest.approx(want[5:], rel=1e-5)
        assert any("no state_dict" in note for note in notes) == (data is Forgetful)


def test_a_stream_is_not_read_again_when_it_has_a_state(tmp_path):
    made = job(data=Counter)
    saved(made, "data=1", tmp_path, steps=5)
    opened = []

    def data():
        opened.append(Counter())
        return opened[0]

    session = alone(job(data=data))
    session.resume(tmp_path)
    losses(session, 1)
    assert opened[0].read <= 2


@pytest.mark.parametrize("pushed", [{0, 1, 2, 3}, {1}, {2, 3}, {0, 3}])
def test_a_streams_place_is_the_step_where_batches_were_pushed_too(pushed, tmp_path):
    made = job(data=Counter)
    want = losses(alone(made), 6)
    batches = list(itertools.islice(Counter(), 4))
    session = alone(made)
    for k in range(4):
        step(session, batches[k] if k in pushed else None, until=4)
    session.save(tmp_path)
    again = alone(made)
    again.resume(tmp_path)
    again.save(tmp_path)
    assert losses(again, 2) == pytest.approx(want[4:], rel=1e-6)


def test_pushed_batches_need_no_more_of_a_stream_than_it_has(tmp_path):
    batch = next(Counter())
    session = alone(job(data=lambda: iter([batch])))
    for _ in range(3):
        step(session, batch)
    assert session.save(tmp_path).name == "step-00000003"


def test_what_a_manifest_says(tmp_path):
    path = saved(job(), "zero1,data=2", tmp_path, steps=1)
    meta = json.loads((path / "manifest.json").read_text())["meta"]
    assert meta["plan"] == "zero1,data=2"
    assert meta["optimizer"]["groups"][0]["parameters"][0] == "up.weight"
    assert meta["optimizer"]["groups"][0]["settings"]["lr"] == 1e-2
