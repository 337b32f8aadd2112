from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.comm.base import Group, Start
from meshwright.comm.fingerprint import BYTES, decode, encode, require_same, text
from meshwright.errors import UserCodeError

GROUP = Group("data", (0, 1))
X = torch.zeros(3, 5)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60))
def test_words_survive_the_wire(words):
    assert encode(words).numel() == BYTES
    assert decode(encode(words)) == words


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (
            Start("all_reduce", GROUP, (X,), "max", label="loss"),
            "all_reduce max float32[3, 5] (loss)",
        ),
        (Start("reduce_scatter", GROUP, (X, X)), "reduce_scatter sum float32[3, 5] float32[3, 5]"),
        (
            Start("all_gather", GROUP, (X,), shapes=((3, 5), (4, 5))),
            "all_gather float32 [3, 5] [4, 5]",
        ),
        (Start("broadcast", GROUP, (X,), root=1), "broadcast root=1 float32[3, 5]"),
        (Start("barrier", GROUP, label="end"), "barrier (end)"),
    ],
)
def test_what_members_must_have_in_common(request_, words):
    assert text(request_) == words


def test_uneven_parts_are_no_disagreement():
    ours = Start("all_to_all", GROUP, (X, X[:0]))
    theirs = Start("all_to_all", GROUP, (X[:1], X))
    assert text(ours) == text(theirs)


@given(st.integers(0, 80), st.text(max_size=90))
def test_many_shapes_are_cut_to_fit_the_wire(many, label):
    words = text(Start("reduce_scatter", GROUP, (X,) * many, label=label))
    assert len(words.encode()) <= max(BYTES, len(label.encode(errors="replace")) + 3)


def test_who_means_what_is_told():
    require_same(["a", "a"], (0, 2), "data")
    with pytest.raises(UserCodeError, match="over data: rank 0: a; ranks 2, 3: b"):
        require_same(["a", "b", "b"], (0, 2, 3), "data")
