"""`offload` in a plan: parts and tiers."""

from __future__ import annotations

import pytest

from meshwright.plan.check import Facts, check
from meshwright.plan.plan import Plan


@pytest.mark.parametrize(("text", "found"), [
    ("none", {}),
    ("host", dict.fromkeys(("optimizer", "gradients", "params", "activations"), "host")),
    ("disk", dict.fromkeys(("optimizer", "gradients", "params", "activations"), "disk")),
    ("params", {"params": "host"}),
    ("optimizer:disk+gradients:host+params", {
        "optimizer": "disk", "gradients": "host", "params": "host",
    }),
])  # fmt: skip
def test_parts_rest_in_tiers(text, found):
    plan = Plan.parse(f"zero3,data=2,offload={text}")
    assert plan.offloads == found
    assert Plan.parse(plan.text()) == plan
    assert not check(plan, Facts(2))


@pytest.mark.parametrize(("text", "why"), [
    ("cpu", "there is no part 'cpu'"),
    ("param", "did you mean 'params'"),
    ("params:ram", "params can rest in host or disk, not in 'ram'"),
    ("params+params:disk", "it names params twice"),
    ("host+params", "host stands alone"),
    ("params:", "params can rest in host or disk, not in ''"),
])  # fmt: skip
def test_others_are_refused(text, why):
    (problem,) = check(Plan.parse(f"data=2,offload={text}"), Facts(2))
    assert f"offload={text}" in str(problem)
    assert why in str(problem)


def test_weights_of_an_asynchronous_pipeline_stay():
    plan = Plan.parse("data=1,pipeline=2,schedule=pipedream,offload=params")
    (problem,) = check(plan, Facts(2))
    assert "keeps several versions" in str(problem)
    assert not check(Plan.parse("data=1,pipeline=2,schedule=pipedream,offload=optimizer"), Facts(2))
