from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.comm.base import Group
from meshwright.comm.handshake import agree, differences
from meshwright.comm.local import run_local
from meshwright.errors import UsageError

FACTS = st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=5), max_size=4)


@given(FACTS, st.integers(1, 5))
def test_equal_facts_agree(facts, n):
    assert run_local([agree(facts, Group.world(n)) for _ in range(n)]) == [None] * n


@given(FACTS, st.text(min_size=6, max_size=8), st.integers(0, 3))
def test_one_rank_with_one_more_fact_is_named(facts, name, odd):
    everyone = [{**facts, name: "x"} if rank == odd else facts for rank in range(4)]
    (problem,) = differences(everyone, range(4))
    assert f"'x' on rank {odd}" in problem
    assert "not given on ranks" in problem


def test_all_differences_are_told_at_once_with_the_ranks_that_hold_each_value():
    facts = {"torch": "2.13.0", "plan": "data=2", "seed": "0"}
    everyone = [facts, facts, {"torch": "2.12.0", "plan": "zero3", "seed": "0"}]
    with pytest.raises(UsageError) as caught:
        run_local([agree(mine, Group.world(3)) for mine in everyone])
    assert str(caught.value) == (
        "ranks differ, so they would not compute the same thing: "
        "plan is 'data=2' on ranks 0, 1 and 'zero3' on rank 2; "
        "torch is '2.13.0' on ranks 0, 1 and '2.12.0' on rank 2; "
        "start every rank with the same code, plan and versions"
    )


def test_long_values_are_cut():
    assert len(differences([{"hash": "a" * 500}, {"hash": "b"}], (0, 1))[0]) < 150
