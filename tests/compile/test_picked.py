"""What a mask picks: elementwise, then a mean or a sum, equals eager; all else is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meshwright import Job
from meshwright.compile.picked import Picks
from meshwright.errors import NotTraceable
from tests.equal.families import adamw
from tests.equal.harness import Case, assert_equal, unruled
from tests.equal.zoo_other import Columns, generator

COUNT, TIMES, CLASSES = 48, 5, 6
PLAN = "data=2,tensor=2,microbatches=3"


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def data():
    """One target in three is -100, of the last sample of four all."""
    g = generator(51)
    y = torch.randint(0, CLASSES, (COUNT, TIMES), generator=g)
    y = y.masked_fill(torch.rand(COUNT, TIMES, generator=g) < 0.3, -100)
    y[3::4] = -100
    return Columns(x=torch.randn(COUNT, TIMES, 4, generator=g), y=y)


def rows(logits, y):
    counted = y != -100
    return F.cross_entropy(logits[counted], y[counted], label_smoothing=0.1)


def flat_rows(logits, y):
    counted = y != -100
    found = logits[counted].contiguous().view(-1, CLASSES).to(logits.dtype)
    weight = torch.linspace(0.5, 1, CLASSES).to(logits.dtype)
    return F.cross_entropy(found, y[counted].view(-1), weight, reduction="sum") / COUNT


def logarithms(logits, y):
    """A log of nothing wherever nothing is picked: its gradient must not reach the weights."""
    counted = logits.detach() > 0
    apart = torch.log(F.relu(logits)[counted]) - torch.log(logits.detach()[counted] * 2)
    return torch.sqrt(torch.pow(apart, 2).mean() + 0.1 - 0.05 * apart.mean() ** 2)


def selected(logits, y):
    counted = (y != -100).unsqueeze(-1).expand_as(logits)
    wanted = torch.ones_like(logits).masked_select(counted)
    return (
        nn.L1Loss()(logits.masked_select(counted), wanted)
        + F.mse_loss(logits.masked_select(counted), wanted, reduction="sum") / COUNT
    )


def yes_or_no(logits, y):
    counted = y != -100
    wanted = (y[counted] > 2).to(logits.dtype)
    scores = logits[..., 0][counted]
    return nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))(scores, wanted)


def each_then_mean(logits, y):
    counted = y != -100
    wide = logits[counted] * torch.linspace(1, 2, CLASSES) + logits.sum()
    return (F.smooth_l1_loss(wide, 0.5 * wide.detach(), reduction="none") * 2).mean()


LOSSES = (rows, flat_rows, logarithms, selected, yes_or_no, each_then_mean)


def job(loss):
    return Job(Tokens, lambda model, batch: loss(model(batch["x"]), batch["y"]), adamw, data, 12)


def equals(loss, plan):
    case = Case(job(loss))
    assert_equal(case.verify(plan, steps=2))
    assert unruled(case, plan) == set()


@pytest.mark.parametrize("loss", [rows, logarithms])
def test_a_loss_of_what_is_picked_equals_eager(loss):
    equals(loss, PLAN)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", [PLAN, "zero3,data=3"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_what_is_picked_equals_eager(loss, plan):
    equals(loss, plan)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mode_alone_gives_torchs_gradients(loss):
    found = []
    batch = {name: column[:12] for name, column in data().columns.items()}
    for _ in range(2):
        torch.manual_seed(1)
        model = Tokens().double()
        logits = model(batch["x"].double())
        if found:
            with Picks():
                value = loss(logits, batch["y"])
        else:
            value = loss(logits, batch["y"])
        found.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for mine, torchs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-13)


def two_masks(logits, y):
    return (logits[..., 0][y > 0] - logits[..., 0][y != -100]).mean()


def counts(logits, y):
    found = logits[y != -100]
    return found.sum() / found.shape[0]


def asks_how_many(logits, y):
    found = logits[y != -100]
    return found.sum() / found.numel()


def along(logits, y):
    return logits[y != -100].mean(0).sum()


def dropped(logits, y):
    return F.dropout(logits[y != -100], 0.5).sum()


def beside_rows(logits, y):
    return (logits[..., 0][y != -100] * torch.ones(7)).mean()


REFUSED = (two_masks, counts, asks_how_many, along, dropped, beside_rows)


@pytest.mark.parametrize("loss", REFUSED)
def test_what_depends_on_how_much_is_picked_is_refused_with_its_line(loss):
    case = Case(job(loss))
    with pytest.raises(
        NotTraceable, match=r"test_picked\.py:\d+: .*a shape that depends on values"
    ):
        case.verify("data=2", steps=1)
