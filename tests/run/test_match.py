"""Which saved tensor fills which of the model's, and what is likely a mistake."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import StorageError
from meshwright.run.match import compare

MODEL = {
    "wte.weight": (256, 8),
    **{
        f"h.{layer}.{part}": shape
        for layer in range(3)
        for part, shape in (("ln.weight", (8,)), ("ln.bias", (8,)), ("fc.weight", (8, 8)))
    },
    "norm.weight": (8,),
}


def match(weights, model=None, tied=None):
    return compare(weights, MODEL if model is None else model, tied, where="gpt2/")


def without(*names):
    return {name: shape for name, shape in MODEL.items() if name not in names}


@given(st.permutations(list(MODEL)))
def test_equal_names_match_in_any_order(names):
    found = match({name: MODEL[name] for name in names})
    assert found.sources == {name: name for name in MODEL}
    assert (found.fresh, found.unused, found.notes) == ((), (), ())


@pytest.mark.parametrize("prefix", ["transformer.", "model."])
def test_one_prefix_is_seen_through_on_either_side(prefix):
    longer = {prefix + name: shape for name, shape in MODEL.items()}
    assert match(MODEL, longer).sources == {prefix + name: name for name in MODEL}
    assert match(longer).sources == {name: prefix + name for name in MODEL}
    assert f"prefix {prefix!r}" in match(longer).notes[0]


def test_a_base_model_under_a_head():
    """gpt2 on the Hub has no `transformer.`, and no head, which is tied."""
    model = {f"transformer.{name}": shape for name, shape in MODEL.items()}
    found = match(MODEL, model, {"lm_head.weight": "transformer.wte.weight"})
    assert set(found.sources) == set(model)
    assert found.unused == ()


def test_a_new_head_is_initialised_with_a_note():
    found = match(MODEL, {**MODEL, "score.weight": (2, 8), "score.bias": (2,)})
    assert found.fresh == ("score.weight", "score.bias")
    assert found.notes == (
        "gpt2/ has no score.weight, score.bias: initialised from the job's seed",
    )


def test_what_the_model_does_not_use_is_left_out_with_a_note():
    found = match({**MODEL, "pooler.weight": (8, 8), "h.0.fc.mask": (1,)})
    assert found.unused == ("pooler.weight", "h.0.fc.mask")
    assert "which the model does not use" in found.notes[0]


@pytest.mark.parametrize(
    "saved", [("wte.weight",), ("head.weight",), ("wte.weight", "head.weight")]
)
def test_tied_tensors_may_be_saved_by_any_of_their_names(saved):
    weights = {**without("wte.weight"), **dict.fromkeys(saved, (256, 8))}
    found = match(weights, tied={"head.weight": "wte.weight"})
    assert found.sources["wte.weight"] == saved[0]
    assert found.fresh == found.unused == ()


@pytest.mark.parametrize(
    ("weights", "model", "words"),
    [
        ({**MODEL, "wte.weight": (255, 8)}, MODEL,
         r"wte.weight has shape \(256, 8\) in the model but \(255, 8\) in the weights"),
        (without("h.1.ln.bias"), MODEL, r"the weights lack h.1.ln.bias \(did you mean 'h.\d.ln.b"),
        (without("h.2.ln.weight", "h.2.ln.bias", "h.2.fc.weight"), MODEL,
         "the weights lack h.2.ln.weight, h.2.ln.bias, h.2.fc.weight"),
        (MODEL, without("h.2.ln.weight", "h.2.ln.bias", "h.2.fc.weight"),
         "the model has no h.2.ln.weight, h.2.ln.bias, h.2.fc.weight"),
        ({"a": (1,), "b": (2,)}, MODEL, r"lack wte.weight, .* and 6 more"),
        ({}, MODEL, "the weights lack wte.weight"),
    ],
    ids=["shape", "half a module", "too few layers", "too many layers", "nothing", "empty"],
)  # fmt: skip
def test_what_is_refused(weights, model, words):
    with pytest.raises(StorageError, match=r"gpt2/ does not fit the model: .*" + words):
        match(weights, model)


def test_all_problems_come_at_once():
    with pytest.raises(StorageError, match=r"wte.weight has shape.*; the weights lack h.0.ln.bias"):
        match({**without("h.0.ln.bias"), "wte.weight": (1, 1)})
