"""`mw.annotate` inside a model: no more than a word to the compiler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import meshwright as mw
from meshwright import Job
from meshwright.errors import PlanError
from meshwright.program.layout import Shard
from meshwright.run.form import first_micros
from tests.equal.harness import Case, assert_equal
from tests.equal.odd import WIDTH, Mixed, adamw, classify


class Annotated(nn.Module):
    """Two linears; what is between them is annotated."""

    def __init__(self, *dims: str | None, whole: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.dims, self.whole = dims, whole
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, 5)

    def forward(self, x):
        inner = mw.annotate(F.gelu(self.up(x)), *self.dims, whole=self.whole)
        return self.down(inner)


def case(*dims, whole=()):
    return Case(Job(lambda: Annotated(*dims, whole=whole), classify("x"), adamw, Mixed, 12))


def test_outside_a_run_it_is_the_tensor_itself():
    x = torch.zeros(2, 3)
    assert mw.annotate(x, "data", "tensor") is x


@pytest.mark.parametrize("plan", ["data=2", "context=2", "tensor=2", "data=2,context=2"])
@pytest.mark.parametrize("dims", [(None, "context"), ("context", None), ("data", "tensor"), ()])
def test_numbers_do_not_depend_on_it(plan, dims):
    assert_equal(case(*dims).verify(plan, steps=2))


def test_weights_follow_the_annotation():
    found = case(None, "context").build("context=2").states
    assert found["up.weight"].work.on("context") == Shard(0)
    assert found["down.weight"].work.on("context") == Shard(1)


def test_an_axis_that_is_said_to_be_whole_is_gathered():
    made = case(whole=("tensor",))
    assert_equal(made.verify("tensor=2", steps=2))
    build = made.build("tensor=2")
    local = build.lowered(0, first_micros(build, made.data)).compiled.units[0][1]
    assert all(s.work.on("tensor") is None for s in build.states.values())
    assert not any(op.name == "comm.all_reduce" for op in local.program.ops)


@pytest.mark.parametrize(
    ("dims", "says"),
    [
        (("tensr",), "test_annotate.py:.*mesh axis 'tensr'; .*tensor"),
        (("tensor", "tensor"), "tensor twice"),
        ((None, None, "tensor"), r"3 dims of a tensor of shape \[2, 3\]"),
    ],
)
def test_what_cannot_be_is_refused_everywhere(dims, says):
    with pytest.raises(PlanError, match=says):
        mw.annotate(torch.zeros(2, 3), *dims)


def test_a_dim_that_is_too_short_is_refused_with_its_line():
    with pytest.raises(PlanError, match=r"test_annotate.py:\d+: annotate splits dim 0 over"):
        Case(Job(lambda: Annotated("context"), classify("x"), adamw, Mixed, 3)).build("context=4")
