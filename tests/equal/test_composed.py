"""What goes wrong without a word where parallelisms meet, a test for each kind.

The kinds are those of Megatron-LM's issue 7452: gradients of replicated parameters counted twice, a
wrong divisor under uneven accumulation, the norm of shards, randomness under tensor parallelism,
the scale of auxiliary losses, tied weights, and state whose names depend on the plan.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meshwright import Job
from meshwright.comm.local import LocalWorld
from meshwright.run.checkpoint.restore import open_checkpoint
from meshwright.run.persist import restore, save_worker
from tests.equal.cells import example
from tests.equal.harness import Case, assert_equal
from tests.equal.odd import CLASSES, WIDTH, Mixed, adamw

PLANS = ("tensor=2", "data=2,tensor=2", "zero2,data=2,context=2", "zero3,data=2,tensor=2")


def gpt(**settings):
    how = {"depth": 1, "width": 64, "context": 16, "batch": 14, "dropout": 0.0, **settings}
    return example("gpt").job(**how)


@cache
def case(kind):
    made = {
        "replicated": gpt,
        "clipped": lambda: dataclasses.replace(gpt(), clip_norm=0.05),
        "dropout": lambda: gpt(dropout=0.2),
        "tied": lambda: dataclasses.replace(
            gpt(), model=lambda: example("gpt").GPT(1, 64, 16, 0.0, tied=True)
        ),
    }
    return Case(made[kind]())


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_of_replicated_parameters_count_once(plan):
    report = case("replicated").verify(plan, steps=2)
    assert_equal(report)


@pytest.mark.parametrize("plan", [f"{plan},microbatches=3" for plan in PLANS])
def test_uneven_micro_batches_share_one_divisor(plan):
    """14 samples in 5 + 5 + 4, on two ranks in 3 + 2 and 2 + 2."""
    assert_equal(case("replicated").verify(plan, steps=2))


@pytest.mark.parametrize(
    "plan", [*PLANS, "zero3,data=4,shard=2", "zero1,data=2,context=2,tensor=2"]
)
def test_the_norm_of_shards_is_the_norm(plan):
    """Gradients are clipped to a fraction: a norm that counts a replica twice clips too much."""
    assert_equal(case("clipped").verify(plan, steps=2))


@pytest.mark.parametrize("plan", PLANS)
def test_masks_do_not_depend_on_the_plan(plan):
    assert_equal(case("dropout").verify(plan, steps=2))


@pytest.mark.parametrize("plan", PLANS)
def test_tied_weights_add_their_gradients_once(plan):
    assert_equal(case("tied").verify(plan, steps=2))


class Routed(nn.Module):
    """Experts that all see every sample, weighted by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, WIDTH, 16) * 0.1)
        self.down = nn.Parameter(torch.randn(4, 16, WIDTH) * 0.1)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        share = self.router(x).softmax(-1)
        inner = torch.einsum("bw,ewi->ebi", x, self.up).relu()
        outer = torch.einsum("ebi,eiw->ebw", inner, self.down)
        return self.head(x + torch.einsum("be,ebw->bw", share, outer)), share


def balanced(model, batch):
    """Cross-entropy, and a mean over the batch squared: not a mean over samples."""
    logits, share = model(batch["x"])
    load = share.mean(0)
    return F.cross_entropy(logits, batch["y"]) + 0.3 * (load * load).sum()


@pytest.mark.parametrize(
    "plan", ["tensor=2", "data=2,tensor=2", "zero3,data=3", "zero3,data=2,tensor=2"]
)
def test_an_auxiliary_loss_keeps_its_scale(plan):
    assert_equal(Case(Job(Routed, balanced, adamw, Mixed, 12)).verify(plan, steps=2))


def losses(workers, fetched):
    world = LocalWorld(len(workers))
    found = world.perform([w.step(f, None) for w, f in zip(workers, fetched, strict=True)])
    return [metrics.loss for metrics, _ in found]


def crew(plan):
    build = case("dropout").build(plan)
    return case("dropout").workers(build)


@pytest.mark.parametrize(
    "after", ["data=2", "tensor=4", "zero3,data=2,tensor=2", "zero2,data=4,shard=2"]
)
@pytest.mark.parametrize("before", ["data=2,tensor=2", "zero3,data=3", "context=2,tensor=2"])
def test_state_has_the_same_names_under_every_plan(tmp_path, before, after):
    """Two steps, saved, and the third under another plan: as if nothing had happened."""
    workers = crew(before)
    for step in (0, 1):
        losses(workers, [w.fetch(step) for w in workers])
    LocalWorld(len(workers)).perform([save_worker(w, tmp_path / "c", 2, {}, 3) for w in workers])
    want = losses(workers, [w.fetch(2) for w in workers])[0]
    others = crew(after)
    (folder,) = (tmp_path / "c").glob("step-*")
    for worker in others:
        with open_checkpoint(folder) as found:
            restore(worker, found)
    again = losses(others, [w.fetch(2) for w in others])
    assert again == pytest.approx([want] * len(others), rel=1e-10)
