"""Sessions: a job trained by one rank or several, as a plain torch loop would."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from meshwright.errors import PlanError, StorageError, UsageError, UserCodeError
from meshwright.plan.plan import Plan
from meshwright.run.session import steps_to_run
from tests.run.jobs import (
    Net,
    Points,
    alone,
    close,
    fresh,
    job,
    losses,
    mean_loss,
    on_ranks,
    sgd,
    step,
    torch_loop,
    weighted_loss,
    weights,
)

MEAN, WEIGHTED = job(), job(loss=weighted_loss, optimizer=sgd)


@pytest.mark.parametrize(
    ("made", "plan"),
    [
        (MEAN, "data=1"), (MEAN, "data=3"), (MEAN, "zero2,data=3"), (MEAN, "data=5"),
        (WEIGHTED, "data=2,microbatches=5"), (WEIGHTED, "zero3,data=2"), (WEIGHTED, "zero1,data=5"),
    ],
)  # fmt: skip
def test_trains_as_a_plain_loop_does(made, plan):
    """Means and sums; batches that ranks and micro-batches do not divide."""
    model = fresh(made)
    want = list(torch_loop(made, model, 4))
    found = on_ranks(made, plan, lambda s: (losses(s, 4), weights(s)))
    for seen, _ in found:
        assert seen == pytest.approx(want, rel=1e-5)
    close(found[0][1], model.state_dict())


def everything(model, batch):
    """Every form that a metric may have."""
    logits = model(batch["x"])
    right = (logits.argmax(-1) == batch["y"]).float()
    counts = batch["w"].sum()
    return F.cross_entropy(logits, batch["y"]), {
        "mean": right.mean(),
        "pair": ((right * batch["w"]).sum(), counts),
        "number": 2.5,
        "share": (counts, len(batch["w"])),
    }


@pytest.mark.parametrize("plan", ["data=1", "data=3,microbatches=2", "zero3,data=2", "pipeline=2"])
def test_metrics_are_of_the_global_batch(plan):
    made = job(loss=everything)
    model, data = fresh(made), alone(made).worker.source
    batch = data.fetch(0, 0, 12, (0, 12)).tree
    with torch.no_grad():
        loss, want = everything(model, batch)
    for metrics in on_ranks(made, plan, lambda s: step(s).metrics):
        assert metrics["loss"] == pytest.approx(float(loss))
        assert metrics["mean"] == pytest.approx(float(want["mean"]))
        assert metrics["pair"] == pytest.approx(float(want["pair"][0] / want["pair"][1]))
        assert metrics["number"] == 2.5
        assert metrics["share"] == pytest.approx(float(batch["w"].mean()))


def in_form(form):
    def loss(model, batch):
        return form(mean_loss(model, batch), model(batch["x"]))

    return loss


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (lambda loss, logits: logits, r"the loss has shape \(12, 3\), but must be a scalar"),
        (lambda loss, logits: 3.0, "the loss is float, but must be a scalar tensor"),
        (lambda loss, logits: None, "the loss is NoneType, but must be"),
        (lambda loss, logits: (logits, 3), r"the loss's sum has shape \(12, 3\)"),
        (lambda loss, logits: (loss, 3, 4), "the loss is tuple"),
        (lambda loss, logits: logits.argmax(), r"the loss is torch.int64, but must be floating"),
        (lambda loss, logits: loss.detach(), "does not depend on any parameter"),
        (lambda loss, logits: (loss, {"m": logits}), r"metric 'm' has shape \(12, 3\), but must"),
        (lambda loss, logits: (loss, {"m": "high"}), r"metric 'm' is str, but must be a scalar"),
        (lambda loss, logits: (loss, logits), r"the loss's weight has shape \(12, 3\)"),
        (lambda loss, logits: (loss, "all"), "the loss's weight is str"),
    ],
)
def test_what_a_loss_must_be(form, told):
    for how in ({}, {"eager": True}):
        with pytest.raises(UserCodeError, match=told):
            step(alone(job(loss=in_form(form)), **how))


def test_one_element_is_a_scalar():
    made = job(loss=in_form(lambda loss, logits: loss.reshape(1, 1)))
    assert losses(alone(made), 2) == pytest.approx(losses(alone(MEAN), 2))


def test_a_batch_of_fewer_samples_than_ranks_is_refused():
    with pytest.raises(PlanError, match="batch_size=2 has fewer samples than data=3"):
        on_ranks(job(batch_size=2), "data=3", lambda s: losses(s, 1))


def loader():
    def collate(samples):
        x = torch.stack([s["x"] for s in samples])
        return x, torch.stack([s["y"] for s in samples])

    return DataLoader(Points(), batch_size=7, shuffle=True, collate_fn=collate)


def test_a_data_loader_gives_its_dataset_and_collate():
    """(b) of the three kinds of data; its batch size is not a step's."""

    def loss(model, batch):
        x, y = batch
        return F.cross_entropy(model(x), y)

    made = job(data=loader, loss=loss)
    want = losses(alone(MEAN), 3)
    for seen in on_ranks(made, "data=2", lambda s: losses(s, 3)):
        assert seen == pytest.approx(want, rel=1e-5)


# ── batches of one's own ─────────────────────────────────────────────────────────────────────────


def global_batch(step):
    return alone(MEAN).worker.source.fetch(step, 0, 12, (0, 12)).tree


@pytest.mark.parametrize(
    "plan", ["data=1", "data=2,microbatches=5", "zero3,data=5", "pipeline=2,microbatches=5"]
)
def test_pushed_batches_are_as_good_as_the_jobs(plan):
    want = losses(alone(MEAN), 4)
    batches = [global_batch(k) for k in range(4)]

    def body(session):
        build, rank = session.build, session.worker.rank
        one = step(session, batches[0]).metrics.loss
        ranges = [(0, 12)] if build.plan.microbatches == 1 else [
            (k, m) for k, m in zip([0, 3, 6, 8, 10], [3, 6, 8, 10, 12], strict=True)
        ]  # fmt: skip
        rows = [r for low, high in ranges for r in range(*build.samples_of(rank, (low, high)))]
        mine = {name: tensor[rows] for name, tensor in batches[1].items()}
        two = step(session, mine, local=True).metrics.loss
        three = step(session).metrics.loss
        return [one, two, three, step(session, batches[3]).metrics.loss]

    for seen in on_ranks(MEAN, plan, body):
        assert seen == pytest.approx(want, rel=1e-5)


def test_pushed_batches_that_do_not_fit_are_refused():
    batch = global_batch(0)
    short = {name: tensor[:5] for name, tensor in batch.items()}
    with pytest.raises(UserCodeError, match=r"batch\['x'\] has shape \(5, 8\).*the 12 samples"):
        step(alone(MEAN), short)

    def other_dtype(session):
        x = batch["x"].double() if session.worker.rank else batch["x"]
        step(session, {**batch, "x": x})

    with pytest.raises(UserCodeError, match=r"given to run.step\(\) in step 1 has other shapes"):
        on_ranks(MEAN, "data=2", other_dtype)


# ── weights in and out ───────────────────────────────────────────────────────────────────────────


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(64, 8)
        self.inside = Net()
        self.head = nn.Linear(8, 64, bias=False)
        self.mix = nn.Linear(3, 8)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.head.weight = self.token.weight

    def forward(self, tokens):
        return self.head(self.mix(self.inside(self.token(tokens)) + self.table[1]))


def next_token(model, batch):
    tokens = (batch["x"].abs() * 20).long().clamp(max=63)
    logits = model(tokens)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("plan", ["data=1", "zero3,data=3", "zero3,data=2,pipeline=2"])
def test_an_export_loads_back_to_the_bit(plan, tmp_path):
    made = job(model=Tied, loss=next_token)

    def body(session):
        losses(session, 2)
        session.export(tmp_path / "out")
        model = session.module()
        return model, losses(session, 2)

    (model, want), *others = on_ranks(made, plan, body)
    assert all(m is None for m, _ in others)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert set(saved) == set(model.state_dict()) - {"head.weight"}
    assert all(torch.equal(saved[n], model.state_dict()[n]) for n in saved)
    again = job(model=Tied, loss=next_token, weights=str(tmp_path / "out"), seed=5)
    loaded, *_ = on_ranks(again, "zero2,data=2", weights)
    assert all(torch.equal(loaded[n], t) for n, t in model.state_dict().items())
    assert loaded["head.weight"].data_ptr() != 0
    del want


@pytest.mark.parametrize("plan", ["data=1", "zero3,data=2", "pipeline=3"])
def test_the_module_forwards_as_predict_does(plan):
    def body(session):
        losses(session, 2)
        found = session.predict(Points(9), lambda model, batch: model(batch["x"]))
        return found, session.module()

    (found, model), *_ = on_ranks(MEAN, plan, body)
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(Points(9).x), rtol=1e-6, atol=1e-6)


def test_a_module_is_a_copy():
    session = alone(MEAN)
    model = session.module()
    before = weights(session)
    with torch.no_grad():
        model.up.weight.zero_()
    assert all(torch.equal(t, before[n]) for n, t in weights(session).items())


def folder(path, tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def given(session):
    return weights(session), session.notes


def test_weights_under_a_prefix(tmp_path):
    state = Net().state_dict()
    path = folder(tmp_path / "w", {f"model.{n}": t for n, t in state.items()})
    (found, notes), *_ = on_ranks(job(weights=path), "zero3,data=2", given)
    assert all(torch.equal(found[n], t) for n, t in state.items())
    assert any("without the prefix 'model.'" in note for note in notes)


def test_a_new_head_is_initialised_and_told(tmp_path):
    state = {n: t for n, t in Net().state_dict().items() if n.startswith("up")}
    path = folder(tmp_path / "w", state)
    made = job(weights=path)
    (found, notes), *_ = on_ranks(made, "data=2", given)
    assert torch.equal(found["up.weight"], state["up.weight"])
    assert torch.equal(found["down.weight"], fresh(made).down.weight)
    assert any("down" in note for note in notes)


def test_weights_that_do_not_fit(tmp_path):
    good = Net().state_dict()
    cases = {
        "lack": ({n: t for n, t in good.items() if n != "up.bias"}, "the weights lack up.bias"),
        "shape": (good | {"up.bias": torch.zeros(3)}, r"up.bias has shape \(40,\) in the model"),
        "other": ({"a.weight": torch.zeros(3)}, "does not fit the model: the weights lack"),
    }
    for name, (tensors, told) in cases.items():
        path = folder(tmp_path / name, tensors)
        with pytest.raises(StorageError, match=told):
            alone(job(weights=path))
    with pytest.raises(StorageError, match="none are not there; give a safetensors file or folder"):
        alone(job(weights=tmp_path / "none"))


@pytest.mark.parametrize("plan", ["data=1", "zero3,data=3", "pipeline=2"])
def test_an_export_that_cannot_be_written_is_told_on_all_ranks(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"export failed: rank 0: cannot export to .*file"):
        on_ranks(MEAN, plan, lambda s: s.export(tmp_path / "file"))


# ── how long ─────────────────────────────────────────────────────────────────────────────────────


def test_how_many_steps_a_job_takes():
    assert steps_to_run(alone(job(steps=7)), None) == 7
    assert steps_to_run(alone(job(steps=7)), 3) == 3
    assert steps_to_run(alone(job(epochs=2)), None) == 9  # 100 samples in batches of 12
    with pytest.raises(UsageError, match=r"nobody said how long to train; give steps=1000"):
        steps_to_run(alone(MEAN), None)


def test_nonfinite_is_one_of_three():
    with pytest.raises(UsageError, match="nonfinite='stop'; use 'raise', 'skip' or 'ignore'"):
        alone(MEAN, nonfinite="stop")


def test_asynchronous_pipelines_cannot_skip_a_step():
    words = "nonfinite='skip' leaves a whole step out, but schedule=pipedream"
    with pytest.raises(UsageError, match=words):
        alone(MEAN, "pipeline=2,schedule=pipedream", nonfinite="skip")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("pipeline=2", "which pipeline=2 would have to split; use data parallelism alone"),
        ("remat=full", "remat=full computes parts of it again; leave one of them out"),
    ],
)
def test_untraced_code_is_neither_cut_nor_repeated(plan, words):
    with pytest.raises(UsageError, match=words):
        alone(MEAN, plan, eager=True)


def test_the_last_step_looks_at_no_further_batch():
    class Exact:
        """Three batches, and no more."""

        def __iter__(self):
            return (global_batch(k) for k in range(3))

    made = job(data=lambda: iter(Exact()))
    session = alone(made)
    for _ in range(3):
        step(session, until=3)
    assert session.step == 3
    assert Plan.parse("data=1") == session.build.plan
