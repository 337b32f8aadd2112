"""Names changed on the way, and what is told of what does not fit."""

from __future__ import annotations

import pytest
import torch

from meshwright.errors import StorageError, UsageError
from meshwright.run.foreign.fit import difference, fitted
from meshwright.run.foreign.rename import new_name, parse_rules, renamed
from meshwright.run.foreign.source import Item, tensor_of
from tests.run.foreign.things import bits, meta, source


def under(text, *names):
    """The new names under rules."""
    rules = parse_rules(text.split())
    return [new_name(name, rules)[0] for name in names]


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        ("old.*=new.*", "model/old.w", "model/new.w"),
        ("old.*=new.*", "optimizer/exp_avg/old.w", "optimizer/exp_avg/new.w"),
        ("old.*=new.*", "model/older.w", "model/older.w"),
        ("module.*=*", "buffer/module.bn.mean", "buffer/bn.mean"),
        ("*=model.*", "model/w", "model/model.w"),
        ("h.*.attn.*=blocks.*.attention.*", "model/h.3.attn.q.w", "model/blocks.3.attention.q.w"),
        ("a=b", "model/a", "model/b"),
        ("a=", "model/a", None),
        ("model/a=buffer/a", "model/a", "buffer/a"),
        ("model/a=buffer/a", "optimizer/m/a", "optimizer/m/a"),
        ("optimizer/*/w=optimizer/*/v", "optimizer/exp_avg/w", "optimizer/exp_avg/v"),
        ("a.*=b.* *=c.*", "model/a.w", "model/b.w"),
        ("w.=v.", "model/wx", "model/wx"),
    ],
)
def test_rules(text, before, after):
    assert under(text, before) == [after]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("old", "must be OLD=NEW"),
        ("=new", "must be OLD=NEW"),
        ("a=b=c", "must be OLD=NEW"),
        ("a.*=b", "has 1 \\* on the left and 0"),
        ("a=b.*", "has 0 \\* on the left and 1"),
        ("model/a=b", "must begin with one of model/"),
    ],
)
def test_rules_that_are_none(text, word):
    with pytest.raises(UsageError, match=word):
        parse_rules([text])


SOME = {
    "model/old.w": torch.ones(2), "model/old.b": torch.zeros(1), "buffer/old.n": torch.tensor(3),
    "optimizer/exp_avg/old.w": torch.full((2,), 5.0),
}  # fmt: skip


def test_weights_buffers_and_optimizer_state_move_together_with_what_is_said_of_them():
    said = meta()
    said["tied"] = {"head": "old.w"}
    said["optimizer"]["groups"][0]["parameters"] = ["old.w", "old.b"]
    said["optimizer"]["state"] = {"old.w": {"k": 1}, "old.b": {"k": 2}}
    found = renamed(source(SOME, meta=said), parse_rules(["old.b=", "old.*=new.*"]))
    assert list(found.source.items) == ["model/new.w", "buffer/new.n", "optimizer/exp_avg/new.w"]
    assert found.dropped == ("model/old.b",)
    assert found.names["model/old.w"] == "model/new.w"
    for name in found.source.items:
        assert bits(tensor_of(found.source, name)) == bits(SOME[name.replace("new", "old")])
    assert found.source.meta["tied"] == {"head": "new.w"}
    assert found.source.meta["optimizer"]["groups"][0]["parameters"] == ["new.w"]
    assert found.source.meta["optimizer"]["state"] == {"new.w": {"k": 1}}
    assert said["tied"] == {"head": "old.w"}  # what was given is as it was


def test_two_tensors_with_one_name_are_refused():
    with pytest.raises(UsageError, match=r"model/old.w and model/old.b one name, model/x"):
        renamed(source(SOME), parse_rules(["old.w=x", "old.b=x"]))


def test_a_rule_that_matches_nothing_names_what_is_near():
    with pytest.raises(UsageError, match=r"'odl.w=x' matches nothing; did you mean 'old.w'"):
        renamed(source(SOME), parse_rules(["odl.w=x"]))


WANTED = {
    "model/old.w2": Item("float32", (2,)), "model/old.b": Item("float64", (1,)),
    "buffer/old.n": Item("int64", ()),
}  # fmt: skip


def test_the_difference():
    found = difference(source(SOME).items, WANTED)
    assert found.missing == {"old.w2": "old.w"}
    assert found.unexpected == ("old.w",)
    assert found.dtypes == {"old.b": ("float32", "float64")}
    assert found.shapes == {}
    other = difference(source(SOME).items, {"model/old.w": Item("float32", (3,))})
    assert other.shapes == {"old.w": ((2,), (3,))}


def test_what_does_not_fit_is_refused_with_what_is_near():
    with pytest.raises(StorageError) as told:
        fitted(source(SOME), WANTED, partial=False, tied={})
    assert "old.w2 is missing; there is old.w" in str(told.value)
    assert "old.w is there, but not wanted" in str(told.value)
    assert "--partial takes what fits" in str(told.value)


def test_partial_takes_what_fits():
    found, told = fitted(source(SOME), WANTED, partial=True, tied={})
    assert list(found.items) == ["model/old.b", "buffer/old.n"]
    assert told.missing == {"old.w2": "old.w"}


def test_another_shape_never_fits():
    with pytest.raises(StorageError, match=r"old.w has shape \[2\], wanted \[3\]"):
        fitted(source(SOME), {"model/old.w": Item("float32", (3,))}, partial=True, tied={})


def test_kinds_follow_what_is_wanted_and_a_tied_tensor_has_any_of_its_names():
    flat = {"model/head": torch.ones(2), "model/bn.n": torch.tensor(3)}
    want = {"model/wte": Item("float32", (2,)), "buffer/bn.n": Item("int64", ())}
    found, told = fitted(source(flat), want, partial=False, tied={"head": "wte"})
    assert list(found.items) == ["model/wte", "buffer/bn.n"]
    assert bits(tensor_of(found, "model/wte")) == bits(flat["model/head"])
    assert (told.missing, told.unexpected) == ({}, ())
    both = {**flat, "model/wte": torch.full((2,), 1.0)}
    found, _ = fitted(source(both), want, partial=False, tied={"head": "wte"})
    assert list(found.items) == ["model/wte", "buffer/bn.n"]
