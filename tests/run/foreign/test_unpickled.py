"""Pickles are read as data: right for what is plain, inert for what would run."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import StorageError
from meshwright.run.foreign.pickled import pickled
from meshwright.run.foreign.symbols import Global, Made, Persistent
from meshwright.run.foreign.unpickled import allow, unpickled
from tests.run.foreign.things import damages, only_storage_errors

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@settings(max_examples=60)
@given(TREES, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_plain_values_of_any_protocol(value, protocol):
    assert unpickled(pickle.dumps(value, protocol)) == value


@settings(max_examples=60)
@given(TREES)
def test_what_is_written_is_a_pickle(value):
    assert pickle.loads(pickled(value)) == value
    assert unpickled(pickled(value)) == value


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_called(tmp_path, protocol):
    data = pickle.dumps({"w": Evil(tmp_path / "ran")}, protocol)
    found = unpickled(data)["w"]
    assert isinstance(found, Made)
    assert (found.maker.name, found.args) == ("system", (f"touch {tmp_path / 'ran'}",))
    with pytest.raises(StorageError, match=r"it calls (posix|os)\.system, which no weights need"):
        allow({"inside": [found]}, {Global("collections", "OrderedDict")})
    assert not (tmp_path / "ran").exists()
    pickle.loads(data)  # and so the test would have seen it
    assert (tmp_path / "ran").exists()


def test_calls_are_kept_with_what_is_put_into_them():
    found = unpickled(pickle.dumps(OrderedDict(a=1), 2))
    assert (found.maker, found.pairs) == (Global("collections", "OrderedDict"), {"a": 1})
    allow(found, {Global("collections", "OrderedDict")})


def test_symbols_go_through_and_back():
    made = Made(Global("a.b", "C"), (1, Persistent("x")), new=True, state={"k": [1]}, items=[2])
    found = unpickled(pickled(made))
    assert (found.maker, found.args[0], found.new, found.state, found.items) == (
        made.maker, 1, True, {"k": [1]}, [2],
    )  # fmt: skip
    assert found.args[1].key == "x"


def test_every_cut_is_seen():
    data = pickle.dumps({"a": [1, 2.5, ("x", None)], "b": Evil("x")}, 4)
    for length in range(len(data)):
        with pytest.raises(StorageError):
            unpickled(data[:length])


def test_damage_never_ends_in_another_error():
    data = pickle.dumps({"a": [1, 2.5, ("x", None)], "b": OrderedDict(c=1), "d": 2**80}, 4)
    for damaged in damages(data, 1500):
        only_storage_errors(lambda damaged=damaged: unpickled(damaged))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "whole pickle"),
        (b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.", "stands twice"),
        (b"\x80\x02}(]K\x01u.", "key is a list"),
        (b"\x80\x02}((K\x01tK\x01u.", "key is a tuple"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02h\x05.", "whole pickle"),
        (b"\x80\x02R.", "whole pickle"),
        (b"\x80\x02K\x01K\x02.", "whole pickle"),
        (b"\x80\x02(K\x01.", "whole pickle"),
        (b"\x80\x02K\x01)R.", "no name"),
        (b"\x80\x02\x8a\xffK.", "whole pickle"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "whole pickle"),
        (b"\x89PNG\r\n", "PERSID"),
    ],
)
def test_what_is_no_pickle_of_weights(data, word):
    with pytest.raises(StorageError, match=word):
        unpickled(data)


def test_nesting_is_no_recursion():
    assert unpickled(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".") != []
