"""A plan's layouts by patterns of names."""

from __future__ import annotations

import pytest

from meshwright.errors import PlanError
from meshwright.plan.mesh import Axis
from meshwright.program.chosen import chosen_layouts
from meshwright.program.layout import Layout, Shard
from meshwright.program.program import Value

AXES = (Axis("data", 2), Axis("tensor", 4))
PARAMETERS = {
    "blocks.0.up.weight": Value("float32", (16, 8)),
    "blocks.1.up.weight": Value("float32", (16, 8)),
    "blocks.0.up.bias": Value("float32", (16,)),
    "head": Value("float32", (3, 8)),
}


def test_a_pattern_holds_for_every_name_that_it_matches():
    found = chosen_layouts([("blocks.*.up.weight", ("tensor", None))], PARAMETERS, AXES)
    split = Layout((("tensor", Shard(0)),))
    assert found == {"blocks.0.up.weight": split, "blocks.1.up.weight": split}


def test_the_later_of_two_patterns_holds():
    patterns = [("blocks.*", ("tensor", None)), ("blocks.1.*", (None, "tensor"))]
    weights = {name: v for name, v in PARAMETERS.items() if name.endswith("weight")}
    found = chosen_layouts(patterns, weights, AXES)
    assert found["blocks.1.up.weight"].on("tensor") == Shard(1)


def test_an_axis_of_one_rank_splits_nothing():
    (layout,) = chosen_layouts(
        [("head", (None, "tensor"))], PARAMETERS, (Axis("tensor", 1),)
    ).values()
    assert layout == Layout()


@pytest.mark.parametrize(
    ("pattern", "dims", "says"),
    [
        ("blocks.*.dwon.weight", ("tensor", None), "matches no parameter; .*blocks"),
        ("blocks.*.weight", ("tensor", "tensor"), "splits dims 0 and 1 over tensor"),
        ("blocks.*.weight", ("tensor",), r"names 1 dims, but blocks.0.up.weight has 2: \[16, 8\]"),
        ("blocks.*.weight", ("data", None), "splits dim 0 over data; .* zero=3"),
        ("head", ("tensor", None), "splits dim 0 of head over tensor=4, but it has 3 .* tensor=3"),
    ],
)
def test_what_does_not_fit_is_refused(pattern, dims, says):
    with pytest.raises(PlanError, match=says):
        chosen_layouts([(pattern, dims)], PARAMETERS, AXES)
