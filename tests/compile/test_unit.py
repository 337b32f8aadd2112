"""The traced unit: what is refused, with the user's line; what a batch's form is."""

from __future__ import annotations

import inspect
import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meshwright.compile.example import example_of
from meshwright.errors import NotTraceable, UserCodeError
from tests.run.jobs import Net, Points, alone, job, losses, mean_loss, on_ranks, step

CLOCK = itertools.count()


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        y = x * 2
        self.calls += 1  # here
        return y


class Marks(nn.Module):
    """The attribute is not there before, and is the same ever after."""

    def forward(self, x):
        self.seen = True  # here
        return x


class First(nn.Module):
    """The first run does what no other does."""

    def forward(self, x):
        known = "seen" in vars(self)
        self.seen = True
        return x if known else 2 * x  # here


class DrawsPython(nn.Module):
    def forward(self, x):
        keep = random.random() < 2  # here
        return x * keep


class DrawsNumpy(nn.Module):
    def forward(self, x):
        return self.scaled(x)

    def scaled(self, x):
        factor = float(np.random.rand())  # noqa: NPY002 - what users write; here
        return x * factor


class ReadsAClock(nn.Module):
    def forward(self, x):
        y = x + 1
        return y * next(CLOCK)  # here


class ReadsAValue(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # here
            return x
        return -x


class PicksByValue(nn.Module):
    def forward(self, x):
        return x + x[x > 0].cumsum(0)[-1]  # here


def line_of(kind):
    """`file:line` of the line marked `# here`."""
    lines, start = inspect.getsourcelines(kind)
    marked = next(k for k, text in enumerate(lines) if "#" in text and "here" in text)
    return f"{__file__}:{start + marked}"


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Counts, r"the forward changes middle.calls from 0 to 1, which a program would freeze"),
        (First, r"two traces of the model differ"),
        (DrawsPython, r"the forward draws from Python's random module.*torch.rand"),
        (DrawsNumpy, r"the forward draws from numpy.random, which"),
        (ReadsAClock, r"two traces of the model differ"),
        (ReadsAValue, r"the model reads a tensor's value.*torch.where.*--eager"),
        (PicksByValue, r"the model makes a shape that depends on values"),
    ],
)
def test_what_a_program_would_freeze_is_refused_with_its_line(kind, told):
    session = alone(job(model=lambda: Net(kind())))
    with pytest.raises(UserCodeError, match=told) as caught:
        step(session)
    assert str(caught.value).startswith(f"{line_of(kind)}: ")


def test_an_attribute_that_only_the_first_run_sets_freezes_nothing():
    marked, plain = (alone(job(model=lambda m=m: Net(m()))) for m in (Marks, nn.Identity))
    assert losses(marked, 2) == losses(plain, 2)


@pytest.mark.parametrize("kind", [Counts, DrawsPython, DrawsNumpy, ReadsAClock, ReadsAValue])
def test_the_door_eager_runs_it(kind):
    assert len(losses(alone(job(model=lambda: Net(kind())), eager=True), 2)) == 2


def test_generators_are_as_they_were():
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    step(alone(job()))
    assert (random.getstate(), str(np.random.get_state())) == before  # noqa: NPY002


class Texts(Points):
    """A text, a nested list and a constant beside every sample's tensors."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"text": f"sample {index}", "place": ("a", index)}


def collate(samples):
    batch = {k: torch.stack([s[k] for s in samples]) for k in ("x", "y", "w")}
    return batch | {"text": [s["text"] for s in samples], "task": "classify", "scale": 2.0}


def scaled_loss(model, batch):
    assert batch["task"] == "classify"
    return F.cross_entropy(model(batch["x"]) * batch["scale"], batch["y"])


def test_texts_beside_the_tensors_cost_no_trace():
    made = job(data=Texts, collate=collate, loss=scaled_loss)

    def body(session):
        seen = losses(session, 4)
        return seen, len(session.build.units), len(session.build.lists)

    for seen, units, lists in on_ranks(made, "data=2,microbatches=5", body):
        assert len(seen) == 4
        assert units <= 4  # micro-batches of 3 and 2 samples, of which each rank gets 1 or 2
        assert lists == 1
    assert losses(alone(made, eager=True), 4) == pytest.approx(seen, rel=1e-5)


READS = {
    "len": len,
    "iter": list,
    "index": lambda texts: texts[0],
    "method": lambda texts: texts.count(""),
    "truth": lambda texts: 1 if texts else 0,
    "kind": lambda texts: isinstance(texts, dict),
    "equal": lambda texts: texts == [],
}


@pytest.mark.parametrize("how", READS)
def test_a_loss_that_reads_texts_is_refused(how):
    def loss(model, batch):
        READS[how](batch["text"])
        return mean_loss(model, batch)

    made = job(data=Texts, collate=collate, loss=loss)
    with pytest.raises(NotTraceable, match=r"test_unit.py:\d+: the loss reads text of the batch"):
        step(alone(made))
    assert len(losses(alone(made, eager=True), 1)) == 1


def test_plain_values_are_part_of_the_form():
    def collate(samples):
        collate.calls += 1
        x = torch.stack([s["x"] for s in samples])
        y = torch.stack([s["y"] for s in samples])
        return {"x": x, "y": y, "scale": float(collate.calls > 2)}

    collate.calls = 0

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]) * batch["scale"], batch["y"])

    session = alone(job(collate=collate, loss=loss))
    seen = losses(session, 4)
    assert seen[0] == seen[1] == pytest.approx(float(torch.log(torch.tensor(3.0))))
    assert seen[3] != seen[0]
    assert len(session.build.units) == 2


def test_a_form_is_of_shapes_and_structure():
    def form(**changes):
        x = {"x": torch.zeros(4, 3), "t": ["a", "b", "c", "d"], "k": 1} | changes
        return example_of(x)[0].key

    assert form() == form(x=torch.ones(4, 3), t=["e", "f", "g", "h"])
    assert form() != form(k=2)
    assert form() != form(x=torch.zeros(4, 2))
    assert form() != form(x=torch.zeros(4, 3, dtype=torch.float64))
    assert form() != form(t=["a"])
    assert example_of(torch.zeros(2))[0].leaves == (("batch", torch.float32, ()),)
    example, leaves = example_of([torch.zeros(2), {"a": (torch.ones(2), 5)}])
    assert [name for name, _, _ in example.leaves] == ["0", "1.a.0"]
    rebuilt = example.build(leaves)
    assert rebuilt[0] is leaves[0]
    assert rebuilt[1] == {"a": (leaves[1], 5)}
