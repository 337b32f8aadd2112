"""bf16 in a run: checkpoints go either way, evaluation and prediction compute as training does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from meshwright.errors import PlanError, StorageError
from meshwright.plan.plan import Plan
from meshwright.run.describe import explain
from meshwright.run.optimizer import stochastic
from tests.run.jobs import (
    Net,
    Points,
    adamw,
    alone,
    fresh,
    job,
    losses,
    mean_loss,
    on_ranks,
    step,
    weighted_loss,
    weights,
)
from tests.run.test_persist import saved

BF16 = ",precision=bf16"


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def plain_losses(made, steps):
    """A torch loop under autocast over the same batches."""
    session = alone(made)
    model = fresh(made)
    optimizer = made.optimizer(model)
    found = []
    for at in range(steps):
        batch = session.worker.source.fetch(at, 0, made.batch_size, (0, made.batch_size)).tree
        with autocast():
            loss = made.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_a_run_is_an_autocast_loop():
    made = job(batch_size=16)  # a power of two: the loss times samples, and back, is exact
    assert losses(alone(made, "data=1" + BF16), 6) == plain_losses(made, 6)


@pytest.mark.parametrize(
    "plan", ["data=2", "zero1,data=2", "zero2,data=3", "zero3,data=2,microbatches=2"]
)
def test_so_it_is_on_ranks_to_rounding(plan):
    made = job(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    want = plain_losses(made, 6)
    for found in on_ranks(made, plan + BF16, lambda s: losses(s, 6)):
        assert found == pytest.approx(want, rel=2**-9)


@pytest.mark.parametrize("plan", ["data=1", "data=2"])
def test_the_door_eager_computes_in_it_too(plan):
    made = job()
    want = plain_losses(made, 4)
    for found in on_ranks(made, plan + BF16, lambda s: losses(s, 4), eager=True):
        assert found == pytest.approx(want, rel=2**-9)
        assert found != losses(alone(made), 4)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("zero3,data=2" + BF16, "data=2"),
        ("data=2", "zero2,data=3" + BF16),
        ("data=2" + BF16, "data=1"),
    ],
)
def test_a_checkpoint_of_either_precision_goes_on_in_the_other(first, then, tmp_path):
    made = job()
    saved(made, first, tmp_path, steps=5)
    held = on_ranks(made, first, lambda s: (losses(s, 5), weights(s))[1])[0]

    def go_on(session):
        assert session.resume(tmp_path) is not None
        return weights(session), losses(session, 3)

    found, after = on_ranks(made, then, go_on)[0]
    assert all(torch.equal(found[name], tensor) for name, tensor in held.items())
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    straight = losses(alone(made), 8)[5:]
    assert after == pytest.approx(straight, rel=2**-6)


PURE = ",precision=bf16-pure"


def state_of(session):
    """Everything a checkpoint holds, whole: of a world of one."""
    state = session.worker.state
    found = {n: t.clone() for n, t in state.values.items() if n.startswith("model/")}
    for name, shard in state.shards.items():
        slots = state.optimizer.state[shard].items()
        found |= {f"{slot}/{name}": t.clone() for slot, t in slots}
    return found


class Wide(Net):
    """Weights of enough bytes, in bf16 too, that ZeRO shards them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 256), nn.Linear(256, 3)


def read(made, root):
    """What a checkpoint holds, whole."""
    session = alone(made, "data=1" + PURE)
    session.resume(root)
    return state_of(session)


def test_ranks_that_do_not_draw_by_place_have_other_bits(monkeypatch, tmp_path):
    """The law below sees what it forbids."""
    made, places = job(model=Wide), stochastic._places
    saved(made, "zero3,data=2" + PURE, tmp_path / "right", steps=5)
    first = lambda boxes: tuple((0, size) for _, size in boxes[0][1])  # noqa: E731
    shape_of = lambda boxes: tuple(size for _, size in first(boxes))  # noqa: E731
    own = lambda boxes: ((first(boxes), first(boxes)),)  # noqa: E731
    wrong = lambda _, boxes, rows: places(shape_of(boxes), own(boxes), rows)  # noqa: E731
    monkeypatch.setattr(stochastic, "_places", wrong)
    saved(made, "zero3,data=2" + PURE, tmp_path / "wrong", steps=5)
    right, other = (read(made, tmp_path / name) for name in ("right", "wrong"))
    assert not torch.equal(right["model/up.weight"], other["model/up.weight"])


@pytest.mark.parametrize("plan", ["zero1,data=2", "zero2,data=2", "zero3,data=2"])
def test_every_layout_of_pure_bf16_has_the_same_bits(plan, tmp_path):
    """Two terms have one sum, so that only rounding could differ."""
    made = job(model=Wide, clip_norm=0.2)
    for text in ("data=2", plan):
        saved(made, text + PURE, tmp_path / text, steps=5)
    states = [read(made, tmp_path / text) for text in ("data=2", plan)]
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name
        assert name.startswith("step/") or tensor.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("zero3,data=2" + PURE, "zero1,data=2" + BF16),
        ("zero2,data=2" + PURE, "data=1"),
        ("zero3,data=2", "pipeline=2,microbatches=2" + PURE),
    ],
)
def test_a_checkpoint_goes_from_and_to_pure_bf16(first, then, tmp_path):
    made = job(model=Wide)
    saved(made, first, tmp_path, steps=5)
    held = on_ranks(made, first, lambda s: (losses(s, 5), weights(s))[1])[0]

    def go_on(session):
        assert session.resume(tmp_path) is not None
        return weights(session), losses(session, 3)

    found, after = on_ranks(made, then, go_on)[0]
    short = PURE in first or PURE in then
    assert short
    for name, tensor in held.items():
        assert torch.equal(found[name], tensor.bfloat16().float()), name
    assert after == pytest.approx(losses(alone(made), 8)[5:], rel=2**-5)


def test_a_model_of_another_dtype_is_still_another_model(tmp_path):
    saved(job(), "data=1", tmp_path, steps=1)
    other = alone(
        job(model=lambda: Net().bfloat16(), loss=lambda m, b: m(b["x"].bfloat16()).mean())
    )
    with pytest.raises(StorageError, match=r"up.weight is float32 in the checkpoint, bfloat16 in"):
        other.resume(tmp_path)


def test_the_optimizer_steps_in_float32_and_keeps_bf16():
    made = job(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))
    session = alone(made, "data=1" + PURE)
    seen = []
    session.worker.state.optimizer.register_step_pre_hook(
        lambda o, *_: seen.extend(
            p.dtype for g in o.param_groups for p in g["params"] if p.grad is not None
        )
    )
    losses(session, 2)
    assert set(seen) == {torch.float32}
    state = state_of(session)
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    assert len(state) == 8


def test_a_norm_of_bf16_gradients_is_taken_in_float32():
    made = job(clip_norm=1e9)
    record = on_ranks(made, "data=2" + PURE, step)[0]
    model = fresh(made).bfloat16()
    batch = alone(made).worker.source.fetch(0, 0, 12, (0, 12)).tree
    for half in (slice(0, 6), slice(6, 12)):
        with autocast():
            loss = made.loss(model, {k: v[half] for k, v in batch.items()}) / 2
        loss.backward()
    exact = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
    assert record.metrics.gradient_norm == pytest.approx(exact, rel=2**-9)


@pytest.mark.parametrize("plan", ["data=1", "data=2"])
def test_the_door_eager_keeps_bf16_too(plan):
    """Its draws are those of traced runs, its gradients are summed in float32 as theirs are."""
    made = job(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    traced = on_ranks(made, plan + PURE, lambda s: (losses(s, 4), state_of(s)))
    eager = on_ranks(made, plan + PURE, lambda s: (losses(s, 4), state_of(s)), eager=True)
    for (one, state), (other, held) in zip(traced, eager, strict=True):
        assert other == pytest.approx(one, rel=2**-9)
        assert all(torch.equal(state[n], t) for n, t in held.items() if plan == "data=1")
        assert {t.dtype for t in held.values()} == {torch.bfloat16}


class Scaled(torch.optim.SGD):
    """Steps by the gradient's share of its norm: of the whole tensor's."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad /= p.grad.norm()
        return super().step(closure)


def test_what_ranks_step_jointly_is_not_rounded():
    made = job(model=Wide, optimizer=lambda model: Scaled(model.parameters(), lr=0.1))
    with pytest.raises(PlanError, match=r"bf16-pure, .*Scaled is not elementwise.*precision=bf16"):
        on_ranks(made, "zero3,data=2" + PURE, step)
    first, second = on_ranks(made, "data=2" + PURE, lambda s: losses(s, 3))
    assert first == second
    assert len(set(first)) == 3


def test_exports_have_the_dtypes_that_are_kept(tmp_path):
    on_ranks(job(), "zero3,data=2" + PURE, lambda s: (step(s), s.export(tmp_path)))
    found = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}


def bill(made, plan):
    ranks = Plan.parse(plan).ranks
    return explain(made, Plan.parse(plan), ranks)["memory"][0]["parts"]


@pytest.mark.parametrize(("zero", "ranks"), [(0, 1), (1, 2), (2, 2), (3, 2)])
@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=pytest.mark.matrix), "bf16-pure"])
def test_the_bill_is_the_formula(zero, ranks, precision):
    """Bytes of model state: 2 a number where it is pure, else 4; Adam keeps two per weight."""
    wide = 256  # small parameters stay whole, and are 1 % of these
    made = job(
        model=lambda: nn.Sequential(nn.Linear(8, wide), nn.Linear(wide, wide), nn.Linear(wide, 3))
    )
    made = replace(made, loss=lambda model, batch: model(batch["x"]).square().mean())
    count = sum(p.numel() for p in made.model().parameters())
    each = 2 if precision == "bf16-pure" else 4
    found = bill(made, f"data={ranks},zero={zero},microbatches=2,precision={precision}")
    parts = {"weights": 3, "gradients": 2, "optimizer": 1}
    for part, stage in parts.items():
        share = ranks if zero >= stage else 1
        times = 2 if part == "optimizer" else 1
        assert found[part] == pytest.approx(times * each * count / share, rel=0.05), part


def test_saved_activations_are_short_in_16_bits():
    saved_bytes = {
        p: bill(job(), f"data=1,precision={p}")["saved activations"] for p in ("float32", "fp16")
    }
    assert saved_bytes["fp16"] < saved_bytes["float32"]


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-2bw"])
@pytest.mark.parametrize("precision", ["fp16", "bf16-pure"])
def test_pipelines_that_never_flush_refuse_them(precision, schedule):
    plan = f"pipeline=2,microbatches=2,schedule={schedule},precision={precision}"
    with pytest.raises(PlanError, match="use precision=bf16"):
        on_ranks(job(), plan, step)


def held_out():
    return Points(25, seed=9)


@pytest.mark.parametrize("plan", ["data=1", "zero3,data=2"])
def test_evaluation_and_prediction_compute_in_it(plan):
    made = job(loss=weighted_loss, evaluation=held_out, batch_size=25)
    data = held_out()
    batch = {"x": data.x, "y": data.y, "w": data.w}
    model = fresh(made).eval()
    with torch.no_grad(), autocast():
        total, weight, _ = weighted_loss(model, batch)
        logits = model(data.x)

    def body(session):
        rows = session.predict(data, lambda model, batch: model(batch["x"]))
        return session.evaluate()["loss"], rows

    for loss, rows in on_ranks(made, plan + BF16, body):
        assert loss == pytest.approx(float(total / weight), rel=1e-6)
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows, logits)


def test_running_statistics_stay_float32():
    made = job(model=lambda: Net(nn.BatchNorm1d(40)), loss=mean_loss, optimizer=adamw)
    session = alone(made, "data=1" + BF16)
    want = plain_losses(made, 4)
    assert losses(session, 4) == pytest.approx(want, rel=1e-5)
    buffers = {n: t for n, t in session.worker.state.values.items() if n.startswith("buffer/")}
    assert buffers["buffer/middle.running_mean"].dtype == torch.float32
    assert buffers["buffer/middle.running_mean"].abs().max() > 0


def test_a_bill_follows_the_dtypes():
    """Half as much is saved for the backward, but for what norms and losses keep in float32."""
    from meshwright.run.describe import describe_build

    made = job(batch_size=48)
    saved_ = {}
    for plan in ("data=1", "data=1" + BF16):
        session = alone(made, plan)
        bill = describe_build(session.build, session.take().micros)["memory"][0]["parts"]
        saved_[plan] = bill
    wide, short = saved_.values()
    for part in ("weights", "gradients", "optimizer"):
        assert wide[part] == short[part]
    assert 0 < short["saved activations"] < wide["saved activations"]


def test_plans_that_differ_in_precision_are_two():
    assert Plan.parse("data=2,precision=bf16") == replace(Plan(data=2), precision="bf16")
    assert Plan.parse("data=2,precision=bf16").text() == "data=2,precision=bf16"
