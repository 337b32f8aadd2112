"""What a batch may hold, cutting it, and its digest."""

from __future__ import annotations

from collections import UserDict, namedtuple
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from meshwright.compile.example import example_of
from meshwright.errors import UserCodeError
from meshwright.run.data.batch import checked, cut, digest, rows

Pair = namedtuple("Pair", "x y")


def batch(n=6, width=3):
    return {
        "x": torch.arange(n * width).reshape(n, width),
        "more": (torch.zeros(n), [torch.ones(n, 2), torch.ones(n)]),
        "texts": [f"text {i}" for i in range(n)],
        "scale": 2.5,
        "kind": None,
    }


@given(st.integers(0, 6), st.integers(0, 6))
def test_a_cut_holds_the_rows_asked_for(a, b):
    start, stop = sorted((a, b))
    part = cut(checked(batch(), 6), start, stop, 6)
    assert_close(part["x"], batch()["x"][start:stop])
    assert part["more"][1][0].shape == (stop - start, 2)
    assert part["texts"] == batch()["texts"][start:stop]
    assert part["scale"] == 2.5


@given(st.sets(st.integers(1, 5)))
def test_cuts_put_together_are_the_batch(cuts):
    bounds = [0, *sorted(cuts), 6]
    tree = checked(batch(), 6)
    parts = [cut(tree, a, b, 6) for a, b in pairwise(bounds)]
    assert_close(torch.cat([part["x"] for part in parts]), tree["x"])
    assert [text for part in parts for text in part["texts"]] == tree["texts"]
    sizes = [b - a for a, b in pairwise(bounds)]
    assert {digest(part, n) for part, n in zip(parts, sizes, strict=True)} == {digest(tree, 6)}


def test_named_tuples_and_bare_tensors_are_batches():
    pair = cut(checked(Pair(torch.zeros(4, 2), torch.ones(4)), 4), 1, 3, 4)
    assert isinstance(pair, Pair)
    assert pair.x.shape == (2, 2)
    assert cut(checked(torch.arange(4), 4), 1, 3, 4).tolist() == [1, 2]


def test_hugging_faces_batch_encoding_is_opened():
    encoding = UserDict({"ids": torch.zeros(4, 2), "inner": UserDict({"mask": torch.ones(4)})})
    tree = checked(encoding, 4)
    assert type(tree) is dict
    assert cut(tree, 0, 1, 4)["inner"]["mask"].shape == (1,)


CHANGES = {
    "dtype": lambda b: {**b, "x": b["x"].float()},
    "width": lambda b: {**b, "x": b["x"][:, :2]},
    "name": lambda b: {("z" if k == "x" else k): v for k, v in b.items()},
    "missing": lambda b: {k: v for k, v in b.items() if k != "more"},
    "plain value": lambda b: {**b, "scale": 3.5},
    "value of another type": lambda b: {**b, "scale": "2.5"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_sees(change):
    changed = CHANGES[change](batch())
    assert digest(checked(changed, 6), 6) != digest(checked(batch(), 6), 6)


def test_the_digest_does_not_see_values_or_the_number_of_samples():
    values = {**batch(), "x": batch()["x"] + 1, "texts": ["other"] * 6}
    assert digest(checked(values, 6), 6) == digest(checked(batch(), 6), 6)
    assert digest(checked(batch(4), 4), 4) == digest(checked(batch(), 6), 6)


@given(st.integers(1, 50))
def test_the_digest_has_20_bits(width):
    assert 0 <= digest(torch.zeros(2, width), 2) < 2**20


def test_digests_are_the_same_in_every_process():
    assert digest({"x": torch.zeros(4, 2), "s": "a"}, 4) == 229101


BAD = {
    "rows": ({"a": torch.zeros(4), "x": torch.zeros(3, 4)},
             r"batch\['x'\] has shape \(3, 4\), but dim 0 must be the 4 samples"),
    "no dims": ({"a": [torch.zeros(4), torch.tensor(1.0)]},
                r"batch\['a'\]\[1\] is a tensor without dims"),
    "array": ({"a": torch.zeros(4), "x": np.zeros(4)},
              r"batch\['x'\] is a ndarray, whose samples .*torch.as_tensor"),
    "nothing": ({}, "the batch is a dict that holds no tensor"),
    "none": (None, "the batch is a NoneType that holds no tensor"),
    "texts only": ({"texts": ["a"] * 4}, "holds no tensor with a sample on dim 0"),
    "object": ({"x": torch.zeros(4), "o": object()}, r"batch\['o'\] is an object, whose samples"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_a_batch_must_not_be(name):
    tree, words = BAD[name]
    with pytest.raises(UserCodeError, match=words):
        checked(tree, 4)


def test_rows_are_those_of_the_first_tensor():
    assert rows({"n": 3, "x": torch.zeros(5, 2)}) == 5


@pytest.mark.parametrize(
    "plain",
    [{"x": torch.zeros(4, 3)}, {"b": torch.ones(4), "a": torch.zeros(4, 2, dtype=torch.int8)}],
)
def test_the_plainest_batch_is_looked_up_and_means_the_same(plain):
    """A dict of tensors takes a short way; in a dict of its own kind it takes the long one."""

    class Named(dict):
        pass

    torch.utils._pytree._private_register_pytree_node(
        Named,
        lambda tree: (list(tree.values()), list(tree)),
        lambda values, names: Named(zip(names, values, strict=True)),
        flatten_with_keys_fn=lambda tree: (
            [(torch.utils._pytree.MappingKey(name), leaf) for name, leaf in tree.items()],
            list(tree),
        ),
    )
    long = Named(plain)
    assert digest(plain, 4) == digest(long, 4)
    assert example_of(plain)[0].leaves == example_of(long)[0].leaves
    assert checked(plain, 4) is plain
    for one, other in zip(cut(plain, 1, 3, 4).values(), cut(long, 1, 3, 4).values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserCodeError, match="dim 0 must be the 5 samples"):
        checked(plain, 5)
