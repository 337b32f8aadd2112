"""The engine in one process: whatever a script does to outputs, and what it must not do."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright.compat import deepspeed
from meshwright.compat.deepspeed.lazy import Lazy
from meshwright.errors import StorageError, UsageError, UserCodeError

BATCH = 4
CONFIG = {
    "train_batch_size": BATCH,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
}


class Net(nn.Module):
    """Returns a dict, as Hugging Face's models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 5)
        self.register_buffer("seen", torch.zeros(()))
        self.double()

    def forward(self, x, labels=None):
        hidden = torch.tanh(self.body(x))
        found = {"logits": self.head(hidden), "hidden": (hidden,)}
        if labels is not None:
            found["loss"] = F.cross_entropy(found["logits"], labels)
        return found


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []

    def make(model=None, config=None, **how):
        engine, *rest = deepspeed.initialize(
            model=model or Net(), config={**CONFIG, **(config or {})}, **how
        )
        made.append(engine)
        return engine if not how else (engine, *rest)

    yield make
    for one in made:
        one.close()


def batches(count):
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        x = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 5, (BATCH,), generator=generator)


def plain(out, y):
    return F.cross_entropy(out["logits"], y)


def inside(out, y):
    del y
    return out["loss"]


def worked(out, y):
    """Views, indexing, in-place ops, constants, a namedtuple, a sum of two."""
    logits = out["logits"].float().double()
    logits = logits * torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5])
    logits[:, 0] = 0
    logits += 0.1
    top = logits.max(dim=1).values
    first = -F.log_softmax(logits, dim=-1)[torch.arange(BATCH), y]
    return (first.sum() / BATCH).add_(0.01 * top.pow(2).mean()) + out["hidden"][0].mean()


def targets(out, y):
    """A part without gradients."""
    with torch.no_grad():
        goal = out["logits"].softmax(-1) * 0.5
    return F.mse_loss(out["logits"], goal) + 0 * y.sum()


@pytest.mark.parametrize("loss", [plain, inside, worked, targets])
def test_steps_equal_plain_torch(engine, loss):
    made, twin = engine(), Net()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    given = {"labels": None}
    for x, y in batches(4):
        given["labels"] = y if loss is inside else None
        found = loss(made(x, **given), y)
        made.backward(found)
        made.step()
        want = loss(twin(x, **given), y)
        optimizer.zero_grad()
        want.backward()
        optimizer.step()
        assert found.item() == pytest.approx(want.item(), rel=1e-10)
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(made.module.state_dict()[name], tensor, rtol=1e-10, atol=1e-10)


def test_values_are_there_before_and_after_a_step(engine):
    made, twin = engine(), Net()
    for turn, (x, y) in enumerate(batches(3)):
        with torch.no_grad():
            want = made.module(x)["logits"]
        out = made(x)
        loss = plain(out, y)
        assert isinstance(loss, Lazy)
        assert (loss.shape, loss.dtype, out["logits"].size(0)) == ((), torch.float64, BATCH)
        if turn == 0:
            assert torch.equal(torch.tensor(out["logits"].tolist(), dtype=torch.float64), want)
            assert float(loss) == pytest.approx(plain(twin(x), y).item())
        made.backward(loss)
        made.step()
        if turn == 2:  # kept since the step after which it was first read
            torch.testing.assert_close(out["logits"].detach() + 0, want)
        (out["logits"].argmax(1) == y).sum().item()
        assert f"{loss:.3f}" == f"{loss.item():.3f}"


def lazy():
    """How many lazy tensors there are."""
    gc.collect()
    return sum(type(one) is Lazy for one in gc.get_objects())


def test_a_running_sum_holds_no_step(engine):
    made, total = engine(), 0.0
    before = lazy()
    for x, y in batches(5):
        loss = plain(made(x), y)
        made.backward(loss)
        made.step()
        total += loss.detach()
    del loss
    assert type(total) is torch.Tensor
    assert lazy() <= before


def test_a_schedule_of_torch_and_an_optimizer_of_ones_own(engine):
    model, twin = Net(), Net()

    def made_for(net):
        groups = [{"params": net.body.parameters(), "lr": 0.2}, {"params": net.head.parameters()}]
        optimizer = torch.optim.Adam(groups, lr=0.05, eps=1e-3)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    optimizer, schedule = made_for(model)
    made, back, loader, told = engine(model, optimizer=optimizer, lr_scheduler=schedule)
    assert back is optimizer
    assert loader is None
    other, other_schedule = made_for(twin)
    for x, y in batches(5):
        loss = plain(made(x), y)
        made.backward(loss)
        made.step()
        other.zero_grad()
        plain(twin(x), y).backward()
        other.step()
        other_schedule.step()
        assert made.get_lr() == told.get_last_lr() == other_schedule.get_last_lr()
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(made.module.state_dict()[name], tensor, rtol=1e-10, atol=1e-10)


def test_a_script_may_set_the_rate_itself(engine):
    made = engine()
    (x, y), *_ = batches(1)
    before = made.module.head.weight.clone()
    made.optimizer.param_groups[0]["lr"] = 0.0
    made.backward(plain(made(x), y))
    made.step()
    assert torch.equal(made.module.head.weight, before)


def test_a_checkpoint_goes_on(engine, tmp_path):
    made = engine()
    steps = list(batches(4))
    for x, y in steps[:2]:
        made.backward(plain(made(x), y))
        made.step()
    assert made.save_checkpoint(tmp_path / "ck", client_state={"epoch": 3})
    again = engine()
    path, state = again.load_checkpoint(tmp_path / "ck")
    assert state == {"epoch": 3}
    assert (again.global_steps, again.micro_steps) == (2, 2)
    assert "global_step2" in path
    for one in (made, again):
        for x, y in steps[2:]:
            one.backward(plain(one(x), y))
            one.step()
    for name, tensor in made.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor)
    assert again.load_checkpoint(tmp_path / "nothing") == (None, None)
    with pytest.raises(StorageError, match="no name of a folder"):
        made.save_checkpoint(tmp_path / "ck", tag="../out")
    with pytest.raises(StorageError, match="no checkpoint"):
        made.load_checkpoint(tmp_path / "ck", tag="other")


def test_weights_are_freed_between_evaluations(engine):
    made = engine()
    (x, y), *_ = batches(1)
    made.backward(plain(made(x), y))
    made.step()
    assert all(p.numel() == 0 for p in made.parameters())
    made.eval()
    with torch.no_grad():
        assert made(x)["logits"].shape == (BATCH, 5)
    assert all(p.numel() for p in made.parameters())


def wrong_rows(made, x, y):
    made.backward(plain(made(x[:3]), y[:3]))
    made.step()


def no_loss(made, x, y):
    del y
    made(x)
    made.step()


def no_scalar(made, x, y):
    del y
    made.backward(made(x)["logits"])
    made.step()


def earlier(made, x, y):
    old = plain(made(x), y)
    made.backward(plain(made(x), y))
    made.step()
    made(x)
    made.backward(old)
    made.step()


def strange(made, x, y):
    made.backward(plain(Net()(x), y))


def by_itself(made, x, y):
    plain(made(x), y).backward()


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (wrong_rows, UserCodeError, "train_micro_batch_size_per_gpu=4"),
        (no_loss, UsageError, "a step needs a loss"),
        (no_scalar, UserCodeError, "take its mean"),
        (earlier, UserCodeError, "of an earlier micro-batch"),
        (strange, UsageError, "that is not the engine's"),
        (by_itself, UserCodeError, "call engine.backward"),
    ],
)
def test_what_cannot_be_is_refused(engine, act, kind, words):
    (x, y), *_ = batches(1)
    with pytest.raises(kind, match=words):
        act(engine(), x, y)


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ({"model": 3, "config": CONFIG}, UserCodeError, "needs a torch.nn.Module"),
        ({"model": Net()}, UsageError, "got no configuration"),
        ({"model": Net(), "config": {"train_batch_size": 4}}, UsageError, "names an optimizer"),
        (
            {"model": Net(), "config": {**CONFIG, "optimizer": {"type": "OneBitAdam"}}},
            UsageError,
            "compresses what it sends",
        ),
        (
            {"model": Net(), "config": {**CONFIG, "optimizer": {"type": "Adamx"}}},
            UsageError,
            "did you mean 'Adam",
        ),
        (
            {
                "model": Net(),
                "config": {**CONFIG, "optimizer": {"type": "Adam", "params": {"lrr": 1}}},
            },
            UsageError,
            "did you mean 'lr'",
        ),
        (
            {"model": Net(), "config": CONFIG, "optimizer": torch.optim.SGD(Net().parameters())},
            UserCodeError,
            "no parameter of the model",
        ),
        ({"model": Net(), "config": CONFIG, "lr_scheduler": 3}, UserCodeError, "a function"),
    ],
)
def test_what_initialize_refuses(tmp_path, monkeypatch, how, kind, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words):
        deepspeed.initialize(**how)
