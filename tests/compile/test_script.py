"""Scripts tell runs apart; a program is traced once where its run beside the trace is the same."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from meshwright.compile import unit
from meshwright.compile.example import example_of
from meshwright.compile.init import blueprint
from meshwright.compile.region import Precision
from meshwright.compile.script import Recorder, Script
from meshwright.errors import UserCodeError


def recorded(function, *tensors):
    script = Script()
    with Recorder(script):
        function(*tensors)
    return script.lines


x, y = torch.ones(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x, y: x + y, lambda x, y: x - y),
        (lambda x, y: x + y, lambda x, y: y + x * 1),
        (lambda x, y: (x + y) * x, lambda x, y: (x + y) * y),
        (lambda x, y: x * 2, lambda x, y: x * 2.0),
        (lambda x, y: x * 2, lambda x, y: (x * 2) * 2),
        (lambda x, y: x.sum(0), lambda x, y: x.sum(1)),
        (lambda x, y: x + torch.tensor(0.5), lambda x, y: x + torch.tensor(0.25)),
        (lambda x, y: x + y, lambda x, y: x + y.double()),
    ],
    ids=["op", "order", "operand", "type", "length", "dim", "constant", "dtype"],
)
def test_scripts_differ_where_runs_do(one, other):
    assert recorded(one, x, y) == recorded(one, x.clone(), y.clone())
    assert recorded(one, x, y) != recorded(other, x, y)


@pytest.fixture
def traces(monkeypatch):
    """One entry for each trace."""
    found, trace = [], unit.trace_function
    monkeypatch.setattr(unit, "trace_function", lambda *a: found.append(1) or trace(*a))
    return found


class Net(nn.Module):
    def __init__(self, forward=lambda x: x):
        super().__init__()
        self.inner, self.norm, self.then = nn.Linear(4, 4), nn.BatchNorm1d(4), forward

    def forward(self, x):
        return self.then(torch.dropout(self.norm(self.inner(x)).relu(), 0.1, self.training))


def traced(forward=lambda x: x, **how):
    batch = {"x": torch.ones(6, 4)}
    model = blueprint(lambda: Net(forward), 0)
    loss = lambda model, batch: model(batch["x"]).square().mean()  # noqa: E731
    return unit.trace_unit(model, loss, example_of(batch)[0], 6, **how)


@pytest.mark.parametrize(
    "how",
    [{}, {"dtype": torch.float64}, {"precision": Precision("bf16")}, {"training": False}],
    ids=["plain", "float64", "bf16", "evaluation"],
)
def test_a_program_is_traced_once(traces, how):
    traced(**how)
    assert len(traces) == 1


def test_what_differs_from_run_to_run_is_traced_again_and_refused(traces):
    count = iter(range(100))
    with pytest.raises(UserCodeError, match=r"test_script.py:\d+: two traces of the model differ"):
        traced(lambda x: x * (1.0 + next(count)))
    assert len(traces) == 2


def test_what_differs_only_beside_the_trace_is_traced_again_and_taken(traces):
    """The second trace decides, so nothing is refused that was not before."""
    beside = iter([False, True])

    def forward(x):
        return x.clone() if next(beside, False) else x * 1.0

    traced(forward)
    assert len(traces) == 2


def test_a_draw_from_python_is_still_told_as_one():
    with pytest.raises(UserCodeError, match="draws from Python's random module"):
        traced(lambda x: x * random.random())
