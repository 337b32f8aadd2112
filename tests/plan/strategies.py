"""Hypothesis strategies for plans."""

from __future__ import annotations

from hypothesis import strategies as st

from meshwright.plan.plan import AXES, PRECISIONS, Plan

counts = st.integers(1, 999_999)
words = st.from_regex(r"[a-z0-9_][a-z0-9_.:()+-]{0,8}", fullmatch=True)
names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
dims = st.lists(st.sampled_from((*AXES, None)), max_size=3).map(tuple)


def _dashed(widths):
    return "-".join(map(str, widths))


def plans(*, named: bool = False):
    """Any plan; with `layouts` and `cuts` where `named`."""
    return st.builds(
        Plan,
        data=st.none() | counts,
        pipeline=counts,
        tensor=counts,
        context=counts,
        expert=counts,
        zero=st.integers(0, 3),
        replicas=st.none() | st.lists(counts, min_size=1, max_size=4).map(_dashed),
        schedule=st.none() | words,
        virtual=counts,
        microbatches=counts,
        gather=st.sampled_from([None, "step", "microbatch"]),
        reduce=st.sampled_from([None, "step", "microbatch"]),
        remat=words,
        precision=words,
        offload=words,
        regime=words,
        codec=words,
        attention=st.sampled_from([None, "gather", "all-to-all", "ring"]),
        redundancy=st.integers(0, 9),
        layouts=_layouts if named else st.just(()),
        precisions=_precisions if named else st.just(()),
        cuts=st.lists(names, max_size=3, unique=True).map(tuple) if named else st.just(()),
    )


_precisions = st.dictionaries(names, st.sampled_from(PRECISIONS), max_size=3).map(
    lambda found: tuple(found.items())
)
_layouts = st.lists(st.tuples(names, dims), max_size=3, unique_by=lambda pair: pair[0]).map(tuple)
