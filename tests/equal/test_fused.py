"""Fused weights of unequal parts under tensor parallelism: equal to one device, split, counted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meshwright import Job
from meshwright.comm.local import LocalWorld
from meshwright.program.explain import collectives
from meshwright.program.layout import Shard, local_shape
from meshwright.run.checkpoint.restore import open_checkpoint
from meshwright.run.form import first_micros
from meshwright.run.persist import restore, save_worker
from meshwright.run.whole import gathered
from tests.equal.families import LENGTH, VOCABULARY, Tokens, adamw
from tests.equal.fused import BATCH, FUSED, KEY, WIDTH
from tests.equal.harness import Case, assert_equal, unruled

PLANS = ("tensor=2", "tensor=4", "data=2,tensor=2,microbatches=3", "zero3,data=2,tensor=2")
MORE = (
    "zero1,data=2,tensor=2", "zero2,data=2,tensor=2,microbatches=3", "context=2,tensor=2",
    "zero3,data=2,shard=2,tensor=2", "zero3,data=2,tensor=2,microbatches=3",
)  # fmt: skip
SAMPLE = tuple(zip(("falcon", "bigcode", "phi3", "mamba2"), PLANS, strict=True))


@cache
def case(name, layers=1):
    return Case(FUSED[name](layers))


def equals(name, plan):
    assert unruled(case(name), plan) == set()
    assert_equal(case(name).verify(plan, steps=2))


@pytest.mark.parametrize(("name", "plan"), [*SAMPLE, *(("uneven", plan) for plan in PLANS)])
def test_unequal_parts_equal_one_device(name, plan):
    equals(name, plan)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", [*PLANS, *MORE])
@pytest.mark.parametrize("name", FUSED)
def test_every_plan_equals_one_device(name, plan):
    equals(name, plan)


def test_what_is_whole_counts_once_in_the_norm():
    job = dataclasses.replace(FUSED["uneven"](), clip_norm=0.01)
    assert_equal(Case(job).verify("zero2,data=2,tensor=2", steps=2))


WHOLE = {"falcon": 2 * KEY, "bigcode": 2 * KEY, "phi3": 0, "mamba2": 2 * 4, "uneven": 2 * KEY}
"""Rows of the fused weight that are whole on every rank: one key and value, or B and C."""


@pytest.mark.parametrize("name", ["falcon", "uneven"])
def test_each_rank_holds_its_heads_and_what_all_need(name):
    holds(name)


@pytest.mark.matrix
@pytest.mark.parametrize("name", FUSED)
def test_of_every_family_each_rank_holds_its_share(name):
    holds(name)


def holds(name, ranks=2):
    """Of fused weights the share of a rank is what is split, by ranks, and what is whole."""
    build = case(name).build(f"tensor={ranks}")
    found = [
        (value.shape, build.states[n].weights)
        for n, value in build.values().items()
        if build.states[n].weights.fused
    ]
    assert found
    for shape, layout in found:
        place = layout.on("tensor")
        whole = sum(size for size, shard in place.parts if shard is None)
        held = local_shape(shape, layout, build.axes, {"tensor": 0})
        assert whole == WHOLE[name]
        assert held == ((shape[0] - whole) // ranks + whole, *shape[1:])


def reduces(name, layers):
    """All-reduces over `tensor` by phase and elements; other collectives by name."""
    build = case(name, layers).build("tensor=2", None)
    compiled = build.lowered(0, first_micros(build, case(name, layers).data)).compiled
    found = Counter()
    for row in collectives(compiled, build.axes):
        kind = row.phase if row.op == "all_reduce" else row.op
        found[kind] += row.count
        found[kind, "elements"] += row.elements
    return found


TOKENS = BATCH * LENGTH
WIDE = {"falcon": 2, "bigcode": 2, "phi3": 2, "mamba2": 1, "uneven": 1}
"""Products that are split in columns and contracted, in a layer: all-reduces each way."""


def counts(name):
    """Of two ranks each sends and receives as much as is reduced."""
    layer = reduces(name, 2)
    layer.subtract(reduces(name, 1))
    narrow = 2 * TOKENS if name == "mamba2" else 0  # sums of squares of the gated norm, both ways
    elements = WIDE[name] * TOKENS * WIDTH
    assert layer["forward"] == WIDE[name] + bool(narrow)
    assert layer["forward", "elements"] == elements + narrow // 2
    # Beside, once: the gradient of what is whole, of which each rank has what its heads add.
    assert layer["backward"] == WIDE[name] + bool(narrow) + bool(WHOLE[name])
    assert layer["backward", "elements"] == elements + narrow // 2 + TOKENS * WHOLE[name]
    assert {kind for kind in +layer if isinstance(kind, str)} == {"forward", "backward"}


@pytest.mark.parametrize("name", ["uneven"])
def test_a_layer_takes_megatrons_all_reduces(name):
    counts(name)


@pytest.mark.matrix
@pytest.mark.parametrize("name", FUSED)
def test_every_family_takes_megatrons_all_reduces(name):
    counts(name)


def wholes(workers, names):
    """Parameters whole again, as rank 0 has them."""
    world = LocalWorld(len(workers))
    return {name: world.perform([gathered(w, name) for w in workers])[0].clone() for name in names}


@pytest.mark.parametrize("after", ["zero3,data=2", "data=1", "zero3,data=2,tensor=2"])
def test_a_checkpoint_has_the_users_tensors(tmp_path, after):
    """Saved in parts, it goes on under another plan with the same bits."""
    played = case("uneven")
    names = [name for name in played.build("tensor=2").states if "fused" in name]
    workers = played.workers(played.build("tensor=2"))
    world = LocalWorld(2)
    for step in (0, 1):
        world.perform([w.step(w.fetch(step), None) for w in workers])
    world.perform([save_worker(w, tmp_path / "c", 2, {}, 3) for w in workers])
    (folder,) = (tmp_path / "c").glob("step-*")
    with open_checkpoint(folder) as found:
        assert found.entries[f"model/{names[0]}"].shape == (WIDTH + 2 * KEY, WIDTH)
    want = wholes(workers, names)
    losses = [m.loss for m, _ in world.perform([w.step(w.fetch(2), None) for w in workers])]

    plan = played.build(after)
    others = played.workers(plan)
    for worker in others:
        with open_checkpoint(folder) as found:
            restore(worker, found)
    assert all(torch.equal(want[name], again) for name, again in wholes(others, names).items())
    crew = LocalWorld(len(others))
    again = [m.loss for m, _ in crew.perform([w.step(w.fetch(2), None) for w in others])]
    assert again == pytest.approx([losses[0]] * len(others), rel=1e-12)


def test_equal_parts_are_laid_out_as_one_factor():
    """A gate and what it gates, of one width, in one weight: no parts are needed."""
    build = case("phi3").build("tensor=2,data=2,microbatches=3")
    name = "model.layers.0.mlp.gate_up_proj.weight"
    assert build.states[name].work.on("tensor") == Shard(0, 2)


class Parted(nn.Module):
    """One product cut into parts; some gate others, some only their sums are used."""

    def __init__(self, sizes: tuple[int, ...], summed: frozenset[int]) -> None:
        super().__init__()
        self.sizes, self.summed = sizes, summed
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.fused = nn.Linear(WIDTH, sum(sizes))
        self.out = nn.ModuleList(nn.Linear(n, WIDTH, bias=False) for n in sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        parts = F.silu(self.fused(x)).split(self.sizes, -1)
        for k, (part, out) in enumerate(zip(parts, self.out, strict=True)):
            whole = part.sum(-1, keepdim=True).tanh()
            x = x + (whole * parts[k - 1].mean() if k in self.summed else out(part))
        return x


@pytest.mark.matrix
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([3, 4, 16, 24, 48]), min_size=2, max_size=4),
    summed=st.frozensets(st.integers(0, 3)),
    plan=st.sampled_from(PLANS + MORE[:2]),
)
def test_any_widths_under_any_plan(sizes, summed, plan):
    def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["input_ids"]).square().mean()

    job = Job(lambda: Parted(tuple(sizes), summed), squares, adamw, Tokens, batch_size=BATCH)
    assert_equal(Case(job).verify(plan, steps=2))
