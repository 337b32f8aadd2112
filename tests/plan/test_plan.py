"""Plan: its text form, its sizes, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given

from meshwright.errors import PlanError, UsageError
from meshwright.plan import presets
from meshwright.plan.named import PRESETS
from meshwright.plan.plan import KEYS, Plan
from tests.plan.strategies import plans


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("data", Plan()),
        ("data=4", Plan(data=4)),
        ("zero3,data=2,microbatches=4", Plan(zero=3, data=2, microbatches=4)),
        (" zero1 , tensor = 2 ", Plan(zero=1, tensor=2)),
        ("zero=2,gather=step", Plan(zero=2, gather="step")),
        ("regime=local(8),codec=top-k", Plan(regime="local(8)", codec="top-k")),
    ],
)
def test_parse(text, plan):
    assert Plan.parse(text) == plan


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (Plan(), "data"),
        (Plan(zero=3), "zero3"),
        (Plan(data=2, zero=3, microbatches=4), "zero3,data=2,microbatches=4"),
        (Plan(data=1), "data=1"),
    ],
)
def test_text_is_the_shortest(plan, text):
    assert plan.text() == text


@given(plan=plans())
def test_text_parses_back(plan):
    assert Plan.parse(plan.text()) == plan


@given(plan=plans(named=True))
def test_plans_with_names_say_that_toml_writes_them(plan):
    if plan.layouts or plan.precisions or plan.cuts:
        with pytest.raises(UsageError, match="write it as TOML"):
            plan.text()
    else:
        assert Plan.parse(plan.text()) == plan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has an empty item"),
        ("data=2,,zero=1", "has an empty item"),
        ("auto,data=2", "auto is chosen for a job and a world; pass it alone"),
        ("zero4", "unknown preset 'zero4'; did you mean 'zero3'?"),
        ("data=2,zero3", "a preset comes first"),
        ("zero3,zero2", "a preset comes first"),
        ("dta=2", "unknown key 'dta'; did you mean 'data'?"),
        ("cuts=a", "unknown key 'cuts'"),
        ("data=1,data=2", "sets data twice"),
        ("zero3,zero=1", "sets zero twice"),
        ("tensor", "gives tensor no value; write tensor=VALUE"),
        ("data=", "data takes a whole number from 1 to 1000000, not ''"),
        ("data=two", "not 'two'"),
        ("data=2.0", "not '2.0'"),
        ("data=1_0", "not '1_0'"),
        ("data=٣", "not '٣'"),
        ("data=nan", "not 'nan'"),
        ("data=0", "data=0; use a number from 1"),
        ("data=-2", "data=-2; use a number from 1"),
        ("data=1000001", "data=1000001; use a number from 1 to 1000000"),
        ("zero=4", "zero=4; use a number from 0 to 3"),
        ("gather=never", "use gather=step or gather=microbatch"),
        ("replicas=2-", "replicas=2-; write the data ranks of each pipeline rank"),
        ("replicas=0-1", "replicas=0-1; write"),
        ("remat=", "remat takes a word, not ''"),
        ("remat=a=b", "remat takes a word, not 'a=b'"),
    ],
)
def test_parse_refuses(text, words):
    with pytest.raises(UsageError) as caught:
        Plan.parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data": True}, "data takes a whole number from 1 to 1000000, not True"),
        ({"pipeline": None}, "pipeline takes a whole number"),
        ({"zero": 1.0}, "not 1.0"),
        ({"tensor": 1 << 70}, "a number of"),
        ({"precision": None}, "precision takes a word"),
        ({"codec": "Two words"}, "codec takes a word"),
        ({"cuts": ["a"]}, "cuts takes a list of names, not ['a']"),
        ({"cuts": ("",)}, "cuts takes printable names, not ''"),
        ({"cuts": ("a\n",)}, "printable names"),
        ({"cuts": ("a", "a")}, "names 'a' twice"),
        ({"layouts": (("w", ("tensro",)),)}, "did you mean 'tensor'?"),
        ({"layouts": (("w", "tensor"),)}, "takes a list of mesh axes"),
        ({"layouts": (("w", ()), ("w", ()))}, "names 'w' twice"),
        ({"precisions": (("norm*", "bf16-pure"),)}, "one of float32, bf16, fp16; did you mean"),
        ({"precisions": (("norm*", 32),)}, "precision of 'norm*' is 32"),
        ({"precisions": (("a", "bf16"), ("a", "fp16"))}, "names 'a' twice"),
    ],
)
def test_a_plan_refuses_values_that_no_plan_can_have(fields, words):
    with pytest.raises(PlanError) as caught:
        Plan(**fields)
    assert words in str(caught.value)


def test_sizes_and_ranks():
    plan = Plan(data=2, pipeline=3, tensor=4)
    assert plan.sizes == {"data": 2, "pipeline": 3, "tensor": 4, "context": 1, "expert": 1}
    assert plan.ranks == 24
    assert Plan(tensor=4).ranks == 4


def test_replicas_add_up_to_the_ranks():
    plan = Plan(pipeline=3, replicas="4-2-1", tensor=2)
    assert plan.widths == (4, 2, 1)
    assert plan.ranks == 14
    assert plan.filled(99) == plan
    assert Plan(data=2, pipeline=3).widths == (2, 2, 2)
    assert Plan(pipeline=2).widths == (1, 1)


@pytest.mark.parametrize(
    ("text", "order", "stages"),
    [
        ("pipeline=3", "1f1b", 3),
        ("pipeline=3,virtual=2", "interleaved", 6),
        ("pipeline=3,schedule=gpipe,virtual=2", "gpipe", 6),
        ("pipeline=3,schedule=zb-v", "zb-v", 6),
        ("pipeline=3,schedule=dualpipe-v,virtual=2", "dualpipe-v", 6),
        ("pipeline=3,schedule=zb-h1", "zb-h1", 3),
    ],
)
def test_the_schedule_of_a_pipeline_and_its_stages(text, order, stages):
    plan = Plan.parse(text)
    assert (plan.order, plan.stages, plan.asynchronous) == (order, stages, False)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (presets.gpipe(2, 8), "pipeline=2,schedule=gpipe,microbatches=8,remat=full"),
        (presets.gpipe(2, 8, 3, remat=False), "data=3,pipeline=2,schedule=gpipe,microbatches=8"),
        (presets.interleaved(2, 8), "pipeline=2,schedule=interleaved,virtual=2,microbatches=8"),
        (presets.zero_bubble(2, 8), "pipeline=2,schedule=zb-h1,microbatches=8"),
        (presets.zero_bubble(2, 8, memory="2x"), "pipeline=2,schedule=zb-h2,microbatches=8"),
        (presets.zero_bubble(2, 8, memory="v"), "pipeline=2,schedule=zb-v,microbatches=8"),
        (presets.pipedream(3), "pipeline=3,schedule=pipedream"),
        (presets.pipedream("15-1"), "pipeline=2,replicas=15-1,schedule=pipedream"),
        (presets.pipedream(2, vertical=True), "pipeline=2,schedule=pipedream-vertical"),
        (presets.pipedream_2bw(3), "pipeline=3,schedule=pipedream-2bw,microbatches=3"),
        (
            presets.pipedream_2bw("2-1", 8),
            "pipeline=2,replicas=2-1,schedule=pipedream-2bw,microbatches=8",
        ),
    ],
)
def test_pipelines_by_the_names_of_their_papers(plan, text):
    assert plan == Plan.parse(text)
    assert plan.asynchronous == ("pipedream" in text)


def test_a_memory_that_no_zero_bubble_schedule_has():
    with pytest.raises(UsageError, match="memory='3x'; use '1x', '2x' or 'v'"):
        presets.zero_bubble(2, 8, memory="3x")


def test_data_fills_the_world():
    assert Plan(tensor=2, zero=1).filled(8) == Plan(data=4, tensor=2, zero=1)
    assert Plan(data=3).filled(8) == Plan(data=3)


def test_filling_a_world_that_the_other_axes_do_not_divide():
    with pytest.raises(PlanError, match=r"tensor=2 x context=2 = 4 ranks.*of 6; start 8 ranks"):
        Plan(tensor=2, context=2).filled(6)
    with pytest.raises(PlanError, match=r"groups of tensor=3, which.*of 4; start 6 ranks"):
        Plan(tensor=3).filled(4)


def test_plans_are_hashable_and_frozen():
    assert len({Plan.parse("zero3"), Plan(zero=3), Plan()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan().zero = 3


def test_keys_are_all_fields_but_the_named_ones():
    names = {field.name for field in dataclasses.fields(Plan)}
    assert set(KEYS) == names - {"layouts", "precisions", "cuts", "actions"}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_its_keys(name):
    assert Plan.parse(name) == Plan(**PRESETS[name])


def test_a_form_of_attention_that_there_is_not_is_told_from_those_that_there_are():
    with pytest.raises(PlanError, match="attention=sphere; use attention=gather or attention=all-"):
        Plan(context=2, attention="sphere")
