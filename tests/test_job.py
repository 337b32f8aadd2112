"""Job: what it takes, and how it refuses the rest."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import UsageError
from meshwright.job import Job, Phase


def job(**changes):
    """A job that is fine but for `changes`."""
    fine = {
        "model": lambda: torch.nn.Linear(2, 1),
        "loss": lambda model, batch: model(batch).mean(),
        "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        "data": lambda: [torch.zeros(2)],
        "batch_size": 8,
    }
    return Job(**{**fine, **changes})


def test_defaults():
    made = job()
    assert made.batch_size == 8
    assert made.seed == 0
    assert made.normalize_over is made.steps is made.epochs is made.schedule is None


def test_five_positional_then_keywords_only():
    made = job()
    args = (made.model, made.loss, made.optimizer, made.data, 4)
    assert Job(*args).batch_size == 4
    with pytest.raises(TypeError):
        Job(*args, None)


def test_a_job_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        job().batch_size = 9


def test_classes_are_factories():
    assert job(model=torch.nn.Identity).model is torch.nn.Identity


def test_good_options_are_kept():
    made = job(weights=Path("w"), clip_norm=1, epochs=2, normalize_over=4, seed=2**63 - 1)
    assert (made.weights, made.clip_norm, made.epochs) == (Path("w"), 1, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "model is None, but must be something to call"),
        ({"model": torch.nn.Linear(2, 1)}, "model is a Linear that is built already"),
        ({"loss": 3}, "loss is 3"),
        ({"loss": torch.nn.MSELoss()}, "loss is a MSELoss, but must be a function of the model"),
        ({"optimizer": "adam"}, "optimizer is 'adam'"),
        ({"data": [1, 2]}, "data is a list"),
        ({"schedule": 0.1}, "schedule is 0.1"),
        ({"evaluation": [1]}, "evaluation is a list"),
        ({"collate": {}}, "collate is a dict"),
        ({"batch_size": 0}, "batch_size=0, but must be 1 or more"),
        ({"batch_size": -4}, "batch_size=-4"),
        ({"batch_size": 8.0}, "batch_size is 8.0, but must be a whole number"),
        ({"batch_size": True}, "batch_size is True"),
        ({"batch_size": "8"}, "batch_size is '8'"),
        ({"steps": 0}, "steps=0"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"steps": 3, "epochs": 1}, "both steps=3 and epochs=1; keep one"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"seed": None}, "seed is None"),
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"clip_norm": math.nan}, "clip_norm=nan"),
        ({"clip_norm": math.inf}, "clip_norm=inf"),
        ({"clip_norm": "1"}, "clip_norm is '1'"),
        ({"weights": 5}, "weights is 5"),
        ({"weights": ""}, "weights is an empty path"),
        ({"normalize_over": 3}, "does not divide batch_size=8; use normalize_over=2"),
        ({"normalize_over": 16}, "does not divide batch_size=8; use normalize_over=8"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_value(changes, words):
    with pytest.raises(UsageError) as caught:
        job(**changes)
    assert words in str(caught.value)


@given(batch=st.integers(1, 500), over=st.integers(1, 500))
def test_normalize_over_is_accepted_exactly_when_it_divides(batch, over):
    if batch % over == 0:
        assert job(batch_size=batch, normalize_over=over).normalize_over == over
        return
    with pytest.raises(UsageError) as caught:
        job(batch_size=batch, normalize_over=over)
    offered = int(str(caught.value).rpartition("=")[2])
    assert batch % offered == 0


def phase(**changes):
    """A phase that is fine but for `changes`."""
    fine = {
        "loss": lambda model, batch: model(batch).mean(),
        "parameters": "*",
        "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    }
    return Phase(**{**fine, **changes})


def phased(phases, **changes):
    """A job with phases."""
    fine = {"model": torch.nn.Identity, "data": lambda: [torch.zeros(2)], "batch_size": 8}
    return Job(phases=phases, **{**fine, **changes})


def test_a_job_without_what_it_needs_is_refused():
    with pytest.raises(UsageError, match="the job has no loss; give loss=, or phases="):
        Job(torch.nn.Identity, data=list, batch_size=1)
    with pytest.raises(UsageError, match="the job has no optimizer"):
        Job(torch.nn.Identity, lambda model, batch: 0, data=list, batch_size=1)
    with pytest.raises(UsageError, match="the job has no data"):
        Job(torch.nn.Identity, phases={"a": phase()}, batch_size=1)


def test_phases_run_in_their_order():
    made = phased({"a": phase(), "b": phase(clip_norm=2.0)})
    assert [made.phase_at(step) for step in range(4)] == ["a", "b", "a", "b"]
    made = phased({"a": phase(), "b": phase()}, order=("b", "b", "a"))
    assert [made.phase_at(step) for step in range(4)] == ["b", "b", "a", "b"]
    assert job().phase_at(3) == ""


def test_a_phase_alone_is_a_job():
    made = phased({"a": phase(), "b": phase(clip_norm=2.0)}, ema=0.5)
    alone = made.of("b")
    assert (alone.phases, alone.clip_norm, alone.ema) == (None, 2.0, 0.5)
    assert alone.loss is made.phases["b"].loss
    assert job().of("").phases is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: phase(parameters=""), "a phase's parameters are ''"),
        (lambda: phase(parameters=[]), "a phase's parameters are []"),
        (lambda: phase(parameters=[3]), "a phase's parameters are [3]"),
        (lambda: phase(optimizer=None), "optimizer is None"),
        (lambda: phase(loss=torch.nn.MSELoss()), "loss is a MSELoss"),
        (lambda: phase(schedule=0.1), "schedule is 0.1"),
        (lambda: phase(clip_norm=0), "clip_norm=0"),
        (lambda: phased({}), "phases is a dict"),
        (lambda: phased([phase()]), "phases is a list"),
        (lambda: phased({"a b": phase()}), "a phase is called 'a b'"),
        (lambda: phased({"a": 3}), "phase a is 3, but must be a Phase"),
        (lambda: phased({"a": phase()}, order="a"), "order is 'a', but must list phases"),
        (lambda: phased({"a": phase()}, order=("c",)), "order names the phase 'c', which is none"),
        (
            lambda: phased({"a": phase(), "b": phase()}, order=("a",)),
            "order leaves out the phase 'b'",
        ),
        (lambda: phased({"a": phase()}, clip_norm=1.0), "gives both phases and clip_norm"),
        (lambda: phased({"a": phase()}, loss=lambda m, b: 0), "gives both phases and loss"),
        (lambda: job(order=("a",)), "of phases, but no phases="),
    ],
)
def test_phases_that_cannot_be_are_refused(make, words):
    with pytest.raises(UsageError) as caught:
        make()
    assert words in str(caught.value)
