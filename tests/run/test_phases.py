"""What a phase trains, and builds that share one model state."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import meshwright as mw
from meshwright.errors import PlanError, UsageError
from meshwright.plan.plan import Plan
from meshwright.run.phases import builds_of, divided
from meshwright.run.prepare import prepare
from tests.run.duet import Duet, d_loss, duet, g_loss, phases


def phase(parameters, **more):
    return mw.Phase(
        g_loss,
        parameters=parameters,
        optimizer=lambda model: optim.SGD(model.parameters(), lr=0.1),
        **more,
    )


def test_each_phase_has_the_parameters_that_its_patterns_name():
    found = divided(duet())
    assert found["d"] == {f"critic.{k}.{n}" for k in (0, 2) for n in ("weight", "bias")}
    assert found["g"] == {f"generator.{k}.{n}" for k in (0, 2) for n in ("weight", "bias")}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"a": phase("critic.*")}, "no phase trains generator.0.weight, generator.0.bias, "),
        ({"a": phase("critic.*")}, " and 1 more; add them"),
        ({"a": phase("crtic.*")}, "phase a has parameters='crtic.*', which matches no parameter"),
        ({"a": phase("*"), "b": phase("critic.0.*")}, "phases a and b both train critic.0.weight"),
        (
            {"a": phase("*", overlap=True), "b": phase("critic.0.*")},
            "say overlap=True in each of them",
        ),
        ({"loss": phase("*")}, "a phase is called loss, which records keep"),
    ],
)
def test_phases_that_do_not_divide_the_parameters_are_refused(given, words):
    with pytest.raises(UsageError) as caught:
        divided(duet(phases=given))
    assert words in str(caught.value)


def test_an_overlap_that_is_stated_is_taken():
    given = {"a": phase("*", overlap=True), "b": phase("critic.*", overlap=True)}
    assert divided(duet(phases=given))["b"] < divided(duet(phases=given))["a"]
    with pytest.raises(UsageError, match=r"whose average \(ema=0.9\) would count"):
        divided(duet(phases=given, ema=0.9))


def test_what_the_model_freezes_is_in_no_phase():
    def model():
        made = Duet()
        made.generator.requires_grad_(requires_grad=False)
        return made

    assert divided(duet(model=model, phases={"d": phase("critic.*")})).keys() == {"d"}


def test_only_its_own_parameters_have_gradients():
    builds = builds_of(duet(), Plan.parse("zero2,data=2"), 2)
    for name, build in builds.items():
        own = "critic." if name == "d" else "generator."
        trained = {n for n, p in build.model.parameters.items() if p.requires_grad}
        assert trained == {n for n in build.model.parameters if n.startswith(own)}
        assert set(build.recipe.names) == trained
    weights = [{n: s.weights for n, s in b.states.items()} for b in builds.values()]
    assert weights[0] == weights[1]


class Apart(nn.Module):
    """One matrix that two losses would split over `tensor` by different dims."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32, bias=False)
        self.down = nn.Linear(32, 16, bias=False)
        self.after = nn.Linear(16, 32, bias=False)


def test_losses_that_would_split_a_weight_otherwise_are_refused():
    def one(model, batch):
        return model.down(torch.relu(model.up(batch[0]))).square().mean()

    def other(model, batch):
        return model.after(torch.relu(model.down(model.up(batch[0])))).square().mean()

    job = duet(
        model=Apart,
        phases={
            "one": mw.Phase(one, parameters=["up.*", "down.*"], optimizer=phase("*").optimizer),
            "other": mw.Phase(other, parameters="after.*", optimizer=phase("*").optimizer),
        },
    )
    assert builds_of(job, Plan.parse("data=2"), 2).keys() == {"one", "other"}
    try:
        builds = builds_of(job, Plan.parse("tensor=2"), 2)
    except PlanError as error:
        assert "name its dims in the plan's layouts" in str(error)  # noqa: PT017
        return
    each = [{n: s.work for n, s in build.states.items()} for build in builds.values()]
    assert each[0] == each[1]


def test_one_loss_alone_is_a_job_like_any_other():
    job = duet()
    with pytest.raises(PlanError, match=r"take one phase's job, as job.of\(name\) gives it"):
        prepare(job, Plan.parse("data=1"), 1)
    assert job.of("d").loss is d_loss
    assert prepare(job.of("d"), Plan.parse("data=1"), 1).recipe.names == tuple(
        f"critic.{k}.{n}" for k in (0, 2) for n in ("weight", "bias")
    )
    assert phases()["d"].patterns == ("critic.*",)
