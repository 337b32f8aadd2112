"""Plans as TOML: the round trip, and what is refused."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import UsageError
from meshwright.plan.plan import Plan
from meshwright.plan.toml import from_toml, parse_plan, to_toml
from tests.plan.strategies import plans


@given(plan=plans(named=True))
def test_round_trip(plan):
    assert from_toml(to_toml(plan)) == plan


def test_the_text_is_what_a_person_would_write():
    plan = Plan(
        data=2, zero=3, cuts=("blocks.4",), layouts=(("blocks.*.weight", ("tensor", None)),)
    )
    assert to_toml(plan) == (
        "data = 2\n"
        "zero = 3\n"
        'cuts = ["blocks.4"]\n'
        "\n"
        "[layouts]\n"
        '"blocks.*.weight" = ["tensor", "none"]\n'
    )


def test_an_empty_file_is_the_default_plan():
    assert from_toml("") == Plan()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data = ", "is not TOML"),
        ("data = 1\ndata = 2", "is not TOML"),
        ("data = 1" + "0" * 5000, "is not TOML"),
        ("cuts = " + "[" * 3000, "nested too deep"),
        ("dta = 2", "unknown key 'dta'; did you mean 'data'?"),
        ("[data]\nx = 1", "data takes a whole number"),
        ("data = true", "not True"),
        ("data = 2.0", "not 2.0"),
        ("data = nan", "not nan"),
        ("data = inf", "not inf"),
        ("data = 0", "data=0; use a number from 1"),
        ("data = -1", "data=-1"),
        ('data = "2"', "not '2'"),
        ("zero = 4", "from 0 to 3"),
        ("precision = 32", "precision takes a word, not 32"),
        ('cuts = "a"', "cuts takes a list of names, not 'a'"),
        ("cuts = [1]", "printable names, not 1"),
        ("layouts = 3", "layouts takes a table"),
        ('[layouts]\nw = "tensor"', "takes a list of names"),
        ("[layouts]\nw = [1]", "names the mesh axis 1"),
        ("precisions = 3", "precisions takes a table"),
        ('[precisions]\nw = "bf17"', "did you mean 'bf16'?"),
        ('[precision]\nw = "bf16"', "precision takes a word"),
    ],
)
def test_refused_with_the_file_and_the_reason(text, words):
    with pytest.raises(UsageError) as caught:
        from_toml(text, "plan file p.toml")
    assert words in str(caught.value)
    assert "plan file p.toml" in str(caught.value)


@given(text=st.text())
def test_any_text_is_a_plan_or_a_usage_error(text):
    try:
        plan = from_toml(text)
    except UsageError:
        with pytest.raises((tomllib.TOMLDecodeError, AssertionError)):
            assert tomllib.loads(text) == {}
    else:
        assert from_toml(to_toml(plan)) == plan


def unread(path):
    raise AssertionError(f"nothing should be read, but {path} was")


def test_parse_plan_of_one_line_reads_nothing():
    assert parse_plan(" auto ", unread) == "auto"
    assert parse_plan("zero3,data=2", unread) == Plan(zero=3, data=2)


def test_parse_plan_of_a_file():
    assert parse_plan("p.toml", {"p.toml": "zero = 1"}.__getitem__) == Plan(zero=1)


def test_parse_plan_of_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "p.toml"

    def read(text):
        assert text == str(path)
        return path.read_text(encoding="utf-8")

    with pytest.raises(UsageError, match=r"p\.toml cannot be read: No such file"):
        parse_plan(str(path), read)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"p\.toml cannot be read: it is not UTF-8"):
        parse_plan(str(path), read)
