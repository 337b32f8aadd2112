"""A checkpoint of another model is told by names, shapes and dtypes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshwright.run.checkpoint.compare import Wanted, compare, describe
from meshwright.run.checkpoint.manifest import Entry

kinds = st.tuples(st.sampled_from(["float32", "bfloat16"]), st.sampled_from([(), (2,), (2, 3)]))
models = st.dictionaries(st.sampled_from("abcdefgh"), kinds)


def entries(model):
    return {name: Entry(dtype, shape, ()) for name, (dtype, shape) in model.items()}


def wanted(model):
    return {name: Wanted(dtype, shape) for name, (dtype, shape) in model.items()}


@given(models, models)
def test_every_difference_is_told_once(saved, model):
    problems = compare(entries(saved), wanted(model))
    told = {(problem.kind, problem.name) for problem in problems}
    assert len(told) == len(problems)
    assert told == {
        *(("missing", name) for name in model.keys() - saved.keys()),
        *(("extra", name) for name in saved.keys() - model.keys()),
        *(
            ("shape" if saved[name][1] != model[name][1] else "dtype", name)
            for name in saved.keys() & model.keys()
            if saved[name] != model[name]
        ),
    }


def test_the_text_names_renames_shapes_and_dtypes():
    saved = {
        "model/attention": ("float32", (4, 4)),
        "model/head": ("float32", (4, 8)),
        "model/norm": ("float32", (4,)),
    }
    model = {
        "model/attn": ("float32", (4, 4)),
        "model/head": ("float32", (4, 16)),
        "model/norm": ("bfloat16", (4,)),
    }
    text = describe(compare(entries(saved), wanted(model)), "step-00000010")
    assert text.splitlines() == [
        "the checkpoint step-00000010 is of another model: 1 missing, 1 extra, 1 shape, 1 dtype",
        "  model/attn is in the model, not in the checkpoint; the checkpoint has model/attention",
        "  model/attention is in the checkpoint, not in the model",
        "  model/head has shape [4, 8] in the checkpoint, [4, 16] in the model",
        "  model/norm is float32 in the checkpoint, bfloat16 in the model",
    ]


def test_the_text_stays_short_for_a_whole_other_model():
    saved = {f"model/a{i}": ("float32", (2,)) for i in range(500)}
    model = {f"model/b{i}": ("float32", (2,)) for i in range(500)}
    text = describe(compare(entries(saved), wanted(model)), "x")
    assert len(text.splitlines()) <= 12
    assert "500 missing, 500 extra" in text
    assert "... and 992 more" in text
