"""Watched tensors."""

from __future__ import annotations

import torch

from meshwright.compile.watch import Watched, watch, watching


def test_what_is_shown_is_collected_by_name():
    watched, x = Watched(), torch.ones(2)
    with watching(watched):
        assert watch("a", x) is x
        watch("b", x + 1)
        watch("a", x + 2)
        watch("a", x + 3)
    assert list(watched.found) == ["a", "b", "a#2", "a#3"]
    assert watched.found["a#3"].tolist() == [4, 4]


def test_outside_nothing_is_collected():
    outer, inner, x = Watched(), Watched(), torch.ones(2)
    watch("a", x)
    with watching(outer):
        with watching(inner):
            watch("b", x)
        watch("c", x)
    watch("d", x)
    assert (list(outer.found), list(inner.found)) == (["c"], ["b"])
