"""Strides over memory, rewritten as lookups along dims: the same elements, from shards too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meshwright.compile.strided import DECOMPOSITIONS
from meshwright.errors import NotTraceable
from tests.equal.harness import Case, assert_equal, unruled
from tests.run.jobs import Net, alone, job, step

aten = torch.ops.aten
AS_STRIDED = DECOMPOSITIONS[aten.as_strided.default]
SCATTER = DECOMPOSITIONS[aten.as_strided_scatter.default]


def numbers(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


WINDOWS = {
    "windows of tokens": (numbers(3, 8, 2), (3, 3, 4, 2), (16, 4, 2, 1), None),
    "of tokens that lie last": (numbers(2, 3, 8).transpose(1, 2), (2, 3, 3, 4), (24, 8, 2, 1), 0),
    "from the second": (numbers(3, 8), (3, 3, 2), (8, 2, 1), 1),
    "across rows": (numbers(3, 8), (5, 4), (3, 1), 2),
    "a diagonal": (numbers(3, 4, 4), (3, 4), (16, 5), None),
    "of part of a memory": (numbers(4, 3, 8)[1:3], (2, 2, 4), (24, 4, 1), 28),
    "of one sample": (numbers(1, 8, 2), (1, 3, 4, 2), (16, 4, 2, 1), None),
    "repeated": (numbers(3, 4), (3, 2, 4), (4, 0, 1), None),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_the_same_elements(name):
    x, *how = WINDOWS[name]
    assert torch.equal(AS_STRIDED(x, *how), x.as_strided(*how))


@pytest.mark.parametrize("name", ["from the second", "a diagonal", "of part of a memory"])
def test_the_same_places_are_written(name):
    x, *how = WINDOWS[name]
    source = -1 - numbers(*how[0])
    assert torch.equal(SCATTER(x, source, *how), aten.as_strided_scatter(x, source, *how))


@pytest.mark.parametrize(
    ("x", "how"),
    [
        (numbers(3, 8), ((24,), (1,), 0)),  # all of it, in order: a view
        (numbers(3, 8)[:, :4], ((2, 2), (8, 1), 0)),  # memory that is not its own
        (numbers(4, 8)[2:], ((2, 2), (8, 1), 0)),
    ],
)
def test_what_is_left_alone(x, how):
    assert AS_STRIDED(x, *how) is NotImplemented


class Windows(nn.Module):
    """Each number with the three that follow it, as sliding attention cuts its windows."""

    def forward(self, x):
        ahead = torch.cat([x, x[:, :3]], 1)
        cut = ahead.as_strided((x.shape[0], x.shape[1], 4), (ahead.stride(0), 1, 1))
        return (cut * cut.softmax(-1)).sum(-1)


class Beyond(nn.Module):
    def forward(self, x):
        half = x[:, : x.shape[1] // 2]
        return half.as_strided(x.shape, x.stride())  # here


def test_windows_of_shards_are_those_of_one_device():
    case = Case(job(model=lambda: Net(Windows())))
    for plan in ("data=2", "zero3,data=2,microbatches=3"):
        assert unruled(case, plan) == set()
        assert_equal(case.verify(plan, steps=2))


def test_memory_that_is_another_tensors_is_refused_with_its_line():
    told = r"test_strided\.py:\d+: as_strided reads memory that is not its tensor's own.*--eager"
    with pytest.raises(NotTraceable, match=told):
        step(alone(job(model=lambda: Net(Beyond()))))
