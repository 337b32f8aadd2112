"""State dicts as JSON: everything that goes in comes out, and nothing else goes in."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import StorageError, UserCodeError
from meshwright.run.checkpoint.plain import from_plain, to_plain

scalars = st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.integers() | st.tuples(st.integers(), st.text()), inner)
    ),
    max_leaves=15,
)


def same(one, other):
    """Equal, of equal types, NaN included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    return one == other


@given(values)
def test_values_survive_json(value):
    text = json.dumps(to_plain(value), allow_nan=False)
    assert same(from_plain(json.loads(text)), value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.arange(6).reshape(2, 3).t(),
        torch.tensor([True, False]),
        torch.default_generator.get_state(),
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
def test_tensors_survive_json(tensor):
    got = from_plain(json.loads(json.dumps(to_plain({"a": [tensor]}))))["a"][0]
    assert got.dtype == tensor.dtype
    assert torch.equal(got, tensor)


def test_a_dict_with_our_tag_as_a_key_survives():
    value = {"__meshwright__": "tensor", "value": "x"}
    assert from_plain(to_plain(value)) == value


def test_other_types_are_refused_by_path():
    with pytest.raises(UserCodeError, match=r"state_dict\(\)\['a'\]\[1\] is of type set, .*pickle"):
        to_plain({"a": [0, {1, 2}]})


@pytest.mark.parametrize(
    "entry",
    [
        {"__meshwright__": "pickle", "value": "x"},
        {"__meshwright__": "tuple", "value": "x"},
        {"__meshwright__": "tensor", "dtype": "torch.float8", "shape": [1], "value": ""},
    ],
)
def test_unknown_tags_are_refused(entry):
    with pytest.raises(StorageError, match="a saved state holds"):
        from_plain([entry])
