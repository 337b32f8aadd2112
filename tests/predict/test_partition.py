"""The partitioner finds what trying every partition finds, and what PipeDream's paper reports."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from pathlib import Path

import pytest

from meshwright.errors import PlanError
from meshwright.predict.antichain import antichains, members, prefixes
from meshwright.predict.layers import Layer, graph_of
from meshwright.predict.machine import Level, Memory
from meshwright.predict.partition import partition
from meshwright.predict.profile import computing, read_profile
from tests.predict.instances import Tried, bound, branching, chain, closed, machine

PROFILES = Path(__file__).parent / "profiles"
GB = 1e9


def profile(name):
    return computing(read_profile((PROFILES / f"{name}.txt").read_text()))


def found(graph, levels, **options):
    """The least seconds; infinite where the partitioner says that there is no partition."""
    try:
        return partition(graph, levels, **options).seconds
    except PlanError:
        return math.inf


def agrees(seed, make, layers, depth, most):
    """One random instance: replicated, straight, and with a bound on memory."""
    rng = random.Random(seed)
    graph, levels = make(rng, rng.randint(1, layers)), machine(rng, depth, most)
    memory = bound(rng, graph)
    for options in ({}, {"straight": True}, {"memory": memory}):
        best = Tried(graph, levels, **options).seconds
        assert found(graph, levels, **options) == pytest.approx(best, rel=1e-12), (seed, options)


@pytest.mark.parametrize("first", range(0, 1000, 500))
def test_chains_equal_brute_force(first):
    for seed in range(first, first + 500):
        agrees(seed, chain, 5, 1, 5)


@pytest.mark.parametrize("first", range(0, 500, 250))
def test_chains_on_two_levels_equal_brute_force(first):
    for seed in range(first, first + 250):
        agrees(seed, chain, 4, 2, 3)


@pytest.mark.parametrize("first", range(0, 500, 250))
def test_branches_equal_brute_force(first):
    for seed in range(first, first + 250):
        agrees(seed, branching, 5, 1, 4)


@pytest.mark.matrix
@pytest.mark.parametrize("first", range(0, 2000, 100))
@pytest.mark.parametrize(
    ("make", "layers", "depth", "most"),
    [(chain, 8, 1, 6), (chain, 6, 2, 3), (chain, 5, 3, 2), (branching, 6, 1, 5),
     (branching, 5, 2, 3)],
)  # fmt: skip
def test_larger_instances_equal_brute_force(make, layers, depth, most, first):
    for seed in range(10000 + first, 10000 + first + 100):
        agrees(seed, make, layers, depth, most)


# ── what it says of the partition that it finds ──────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(60))
def test_stages_cost_what_the_partition_says(seed):
    rng = random.Random(seed)
    graph, levels = branching(rng, rng.randint(2, 9)), machine(rng, 1, 8)
    best = partition(graph, levels)
    assert sum(stage.replicas for stage in best.stages) == levels[0].units
    assert sorted(n for stage in best.stages for n in stage.layers) == list(
        range(len(graph.layers))
    )
    path = [frozenset()]
    for stage in best.stages:
        path.append(path[-1].union(stage.layers))
    share = tuple(stage.replicas for stage in best.stages)
    tried = Tried(graph, levels)
    assert tried.priced(1, tuple(path), share, 0) == pytest.approx(best.seconds, rel=1e-12)
    assert set(path) <= set(tried.states)


@pytest.mark.parametrize("seed", range(60))
def test_stages_hold_what_the_memory_allows(seed):
    rng = random.Random(seed)
    graph, levels = chain(rng, 6), machine(rng, 2, 3)
    memory = bound(rng, graph)
    try:
        best = partition(graph, levels, memory=memory)
    except PlanError:
        assert Tried(graph, levels, memory=memory).seconds == math.inf
        return
    inner, outer = (level.units for level in levels)
    after = [Fraction(inner * outer)]
    for stage in best.stages:
        after.append(after[-1] - stage.replicas)
        kept = math.fsum(graph.layers[n].activations for n in stage.layers)
        weights = math.fsum(graph.layers[n].weights for n in stage.layers)
        assert memory.need(weights, kept, after[-1] / stage.replicas) <= memory.capacity
    assert after[-1] == 0


def test_more_memory_never_makes_it_slower_and_less_never_faster():
    rng = random.Random(3)
    for _ in range(30):
        graph, levels = chain(rng, 7), machine(rng, 1, 5)
        seconds = [found(graph, levels, memory=Memory(size)) for size in (60, 120, 240, 480, 1e9)]
        assert seconds == sorted(seconds, reverse=True)
        assert seconds[-1] == found(graph, levels)


@pytest.mark.parametrize("seed", range(40))
def test_bounds_that_hold_for_every_model(seed):
    rng = random.Random(seed)
    graph, levels = branching(rng, 8), machine(rng, rng.randint(1, 2), 4)
    best = partition(graph, levels)
    workers = math.prod(level.units for level in levels)
    assert best.single / workers <= best.seconds * (1 + 1e-12)
    assert best.seconds <= best.side_by_side
    assert best.seconds <= found(graph, levels, straight=True)
    faster = tuple(Level(level.units, 2 * level.bandwidth) for level in levels)
    assert partition(graph, faster).seconds <= best.seconds
    twice = graph_of([Layer(a.name, "", 2 * a.forward, 2 * a.backward, 2 * a.activations,
                            2 * a.weights) for a in graph.layers], graph.edges)  # fmt: skip
    assert partition(twice, levels).seconds == pytest.approx(2 * best.seconds)


def test_a_level_of_one_unit_changes_nothing():
    rng = random.Random(5)
    for _ in range(20):
        graph, (level,) = chain(rng, 6), machine(rng, 1, 4)
        alone = partition(graph, (level,)).seconds
        for levels in ((Level(1, 1.0), level), (level, Level(1, 1.0))):
            assert partition(graph, levels).seconds == pytest.approx(alone)


def test_mini_batches_in_flight_are_noam():
    graph = graph_of([Layer("conv", "", 3.0, 0, 0, 0), Layer("fc", "", 1.0, 0, 0, 1e9)])
    best = partition(graph, [Level(4, 1.0)])
    assert (best.replicas, best.in_flight) == ("3-1", 2)
    straight = partition(graph, [Level(2, 1.0)], straight=True)
    assert (straight.replicas, straight.in_flight) == ("1-1", 2)


def test_memory_counts_stashed_versions_or_two_or_one():
    """Of a first stage with 3 workers after it: four mini-batches in flight."""
    held = [
        Memory(0, versions, beside).need(10, 1, Fraction(3))
        for versions in (None, 2, 1)
        for beside in (0, 1)
    ]
    assert held == [44, 54, 24, 34, 14, 24]
    assert Memory(0, microbatches=3).need(10, 1, Fraction(3)) == 33
    assert Memory(0).need(10, 1, Fraction(1, 3)) == 22


# ── branches ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(80))
def test_states_are_the_closed_sets(seed):
    graph = branching(random.Random(seed), 8)
    states = antichains(graph)
    sets = [frozenset(members(state.mask)) for state in states]
    assert set(sets) == set(closed(graph))
    assert len(sets) == len(set(sets))
    tried = Tried(graph, ())
    for place, (state, layers) in enumerate(zip(states, sets, strict=True)):
        assert not any(later < layers for later in sets[place:])
        assert state.output == tried.crossing(layers)
        assert state.seconds == pytest.approx(tried.summed(layers, "seconds"))


def test_a_source_joins_with_the_layer_that_needs_it():
    layers = [Layer(name, "", 1.0) for name in ("a", "b", "c", "d", "e")]
    graph = graph_of(layers, [(0, 1), (2, 3), (1, 3)])
    sets = [set(members(state.mask)) for state in antichains(graph)]
    assert sets == [set(), {0}, {0, 1}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}]


def test_prefixes_are_the_states_of_an_order():
    graph = branching(random.Random(1), 9)
    masks = [state.mask for state in prefixes(graph)]
    assert masks == [(1 << count) - 1 for count in range(10)]


def test_too_many_branches_are_refused_and_prefixes_serve():
    layers = [Layer("in", "", 1.0), *(Layer(f"b{k}", "", 1.0) for k in range(30))]
    graph = graph_of(layers, [(0, k) for k in range(1, 31)])
    with pytest.raises(PlanError, match=r"more than 4000 ways.*prefixes"):
        antichains(graph)
    best = partition(graph, [Level(4, 1.0)], states=prefixes(graph))
    assert best.seconds == 31 / 4


# ── the paper's findings, on its own profiles ────────────────────────────────────────────────────


def test_vgg_on_16_workers_is_15_1():
    best = partition(profile("vgg16"), [Level(16, 1.25 * GB)])
    assert best.replicas == "15-1"
    assert best.in_flight == 2
    assert best.seconds == pytest.approx(best.single / 15, rel=0.02)


@pytest.mark.parametrize(
    "levels", [[Level(16, 1.25 * GB)], [Level(4, 8 * GB), Level(4, 1.25 * GB)]]
)
def test_resnet_is_data_parallel(levels):
    best = partition(profile("resnet50"), levels)
    assert best.replicas == "16"
    assert best.seconds == best.side_by_side


def test_large_translation_with_1496_states():
    graph = profile("gnmt_large")
    assert len(antichains(graph)) == 1496
    best = partition(graph, [Level(16, 1.25 * GB)])
    assert sum(stage.replicas for stage in best.stages) == 16
    assert best.side_by_side / best.seconds > 2


def test_a_model_that_costs_nothing():
    graph = graph_of([Layer(name) for name in "abcd"], [(0, 1), (0, 2), (1, 3), (2, 3)])
    assert partition(graph, [Level(2, 1.0)]).seconds == 0.0


def test_many_workers():
    """As deep as there are layers."""
    graph = graph_of([Layer(f"l{k}", "", 1.0, 2.0, 1.0, 1e12) for k in range(200)])
    best = partition(graph, [Level(200, 1.0)])
    assert best.seconds == 3.0
    assert best.replicas == "-".join(["1"] * 200)


def deep(count):
    return graph_of([Layer(f"l{k}", "", 1.0, 2.0, 1.0, 1e12) for k in range(count)])


@pytest.mark.matrix
def test_straight_with_more_stages_than_python_recurses():
    best = partition(deep(320), [Level(320, 1.0)], straight=True)
    assert best.seconds == 3.0
    assert len(best.stages) == 320


def test_replicated_with_more_stages_than_python_recurses():
    with pytest.raises(PlanError, match=r"1200 layers.*too deep a search; ask for a straight one"):
        partition(deep(1200), [Level(1200, 1.0)])


# ── bad input ────────────────────────────────────────────────────────────────────────────────────


def test_more_workers_than_a_straight_pipeline_has_layers():
    graph = chain(random.Random(0), 3)
    with pytest.raises(PlanError, match=r"4 workers needs 4 stages.*cut into 3.*fewer workers"):
        partition(graph, [Level(4, 1.0)], straight=True)


def test_no_partition_fits():
    graph = graph_of([Layer("a", "", 1, 1, 1, 100), Layer("b", "", 1, 1, 1, 100)])
    with pytest.raises(PlanError, match=r"over 2 workers holds.*in 50 bytes a worker; allow more"):
        partition(graph, [Level(2, 1.0)], memory=Memory(50))


@pytest.mark.parametrize("levels", [[], [Level(0, 1.0)], [Level(2, 0.0)], [Level(2, math.nan)]])
def test_levels_that_make_no_sense(levels):
    with pytest.raises(PlanError, match=r"level"):
        partition(chain(random.Random(0), 3), levels)


@pytest.mark.parametrize("memory", [Memory(1e9, versions=0), Memory(1e9, microbatches=-1)])
def test_memories_that_make_no_sense(memory):
    with pytest.raises(PlanError, match=r"(versions=0|microbatches=-1); a worker holds one"):
        partition(chain(random.Random(0), 3), [Level(2, 1.0)], memory=memory)
