"""The CTC loss: its two ops are torch's, and every way to give it targets equals eager."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meshwright import Job
from meshwright.compile.picked import Picks
from meshwright.errors import NotTraceable, UserCodeError
from tests.equal.families import adamw
from tests.equal.harness import Case, assert_equal, unruled
from tests.equal.zoo_other import Columns, generator

FRAMES, CLASSES, LONGEST, COUNT = 9, 6, 4, 48
PLAN = "data=2,tensor=2,microbatches=3"


class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x))).log_softmax(-1).transpose(0, 1)


def said():
    """Targets of one to four classes, the rest of a row -1."""
    g = generator(41)
    targets = torch.randint(1, CLASSES, (COUNT, LONGEST), generator=g)
    lengths = torch.randint(1, LONGEST + 1, (COUNT,), generator=g)
    padded = targets.masked_fill(torch.arange(LONGEST) >= lengths[:, None], -1)
    frames = torch.randint(2 * LONGEST, FRAMES + 1, (COUNT,), generator=g)
    return Columns(x=torch.randn(COUNT, FRAMES, 5, generator=g), y=padded, frames=frames)


def rows(model, batch, **how):
    lengths = (batch["y"] >= 0).sum(1)
    return F.ctc_loss(model(batch["x"]), batch["y"].clamp(min=0), batch["frames"], lengths, **how)


def picked(model, batch, **how):
    counted = batch["y"] >= 0
    targets = batch["y"].masked_select(counted)
    return F.ctc_loss(model(batch["x"]), targets, batch["frames"], counted.sum(-1), **how)


def indexed(model, batch, **how):
    counted = batch["y"] >= 0
    lengths = counted.sum(-1)
    return F.ctc_loss(model(batch["x"]), batch["y"][counted], batch["frames"], lengths, **how)


def summed(model, batch):
    return rows(model, batch, reduction="sum"), len(batch["x"])


def each(model, batch):
    return rows(model, batch, reduction="none").mean()


def short(model, batch):
    """Too few frames for most targets: their loss is infinite, and said to be zero."""
    frames = batch["frames"] // 4
    lengths = (batch["y"] >= 0).sum(1)
    args = model(batch["x"]), batch["y"].clamp(min=0), frames, lengths
    return F.ctc_loss(*args, blank=0, zero_infinity=True)


def job(loss):
    return Job(Sound, loss, adamw, said, 12)


LOSSES = {
    "rows": rows,
    "picked": picked,
    "indexed": indexed,
    "summed": summed,
    "each": each,
    "short": short,
    "blank last": partial(picked, blank=CLASSES - 1),
}


def equals(name):
    case = Case(job(LOSSES[name]))
    assert_equal(case.verify(PLAN, steps=2))
    assert unruled(case, PLAN) == set()


@pytest.mark.parametrize("name", ["picked", "short"])
def test_the_loss_equals_eager(name):
    equals(name)


@pytest.mark.matrix
@pytest.mark.parametrize("name", LOSSES)
def test_every_form_of_the_loss_equals_eager(name):
    equals(name)


def test_targets_that_were_moved_are_watched():
    """Lengths that do not say how many of each row were picked shift what torch reads."""

    def loss(model, batch):
        counted = batch["y"] >= 0
        lengths = counted.sum(-1).flip(0)
        targets = batch["y"].masked_select(counted)
        return F.ctc_loss(model(batch["x"]), targets, batch["frames"], lengths)

    with pytest.raises(UserCodeError, match=r"test_ctc\.py:\d+: in step 1 the condition there"):
        Case(job(loss)).verify("data=2", steps=1)


def test_what_else_reads_picked_elements_is_refused():
    def loss(model, batch):
        return model(batch["x"]).sum() * batch["y"].masked_select(batch["y"] >= 0).cumsum(0)[-1]

    with pytest.raises(NotTraceable, match=r"test_ctc\.py:\d+: the model makes a shape"):
        Case(job(loss)).verify("data=2", steps=1)


def test_the_mode_alone_gives_torchs_gradient():
    batch = {name: column[:12] for name, column in said().columns.items()}
    torch.manual_seed(2)
    model = Sound().double()
    batch["x"] = batch["x"].double()
    found = []
    for mode in (None, Picks()):
        if mode is None:
            loss = picked(model, batch)
        else:
            with mode:
                loss = picked(model, batch)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
