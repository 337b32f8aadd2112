"""Profiles of PipeDream's read, write and read the same; bad ones are told line by line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from meshwright.errors import UsageError
from meshwright.predict.layers import Layer, graph_of
from meshwright.predict.profile import computing, read_profile, write_profile
from tests.predict.instances import branching

PROFILES = Path(__file__).parent / "profiles"
COSTS = "forward_compute_time=1.5, backward_compute_time=2, activation_size=8, parameter_size=4.0"
GOOD = f"node1 -- Linear(2, 3) -- {COSTS}\nnode2 -- ReLU -- {COSTS}\n\tnode1 -- node2\n"


@pytest.mark.parametrize(
    ("name", "layers", "edges"),
    [("vgg16", 41, 41), ("alexnet", 23, 23), ("resnet50", 177, 193), ("gnmt_large", 96, 122)],
)
def test_round_trip_of_published_profiles(name, layers, edges):
    graph = read_profile((PROFILES / f"{name}.txt").read_text())
    assert (len(graph.layers), len(graph.edges)) == (layers, edges)
    assert read_profile(write_profile(graph)) == graph


def test_round_trip_keeps_every_bit():
    rng = random.Random(0)
    for _ in range(50):
        graph = branching(rng, 6)
        times = [rng.random() * 10 ** rng.randint(-9, 3) for _ in range(12)]
        layers = [
            Layer(f"n{k}", "Linear(2, 3)", times[k], times[k + 6], times[k] * 1e9, times[k + 6] / 3)
            for k in range(6)
        ]
        graph = graph_of(layers, graph.edges)
        assert read_profile(write_profile(graph)) == graph
        assert read_profile(write_profile(graph, stages=[0, 0, 1, 1, 2, 2])) == graph


def test_values():
    graph = read_profile(GOOD)
    assert graph.layers[0] == Layer("node1", "Linear(2, 3)", 0.0015, 0.002, 8.0, 4.0)
    assert graph.edges == ((0, 1),)


def test_several_results_are_summed_and_stages_are_skipped():
    listed = GOOD.replace("activation_size=8", "activation_size=[8.0; 0.5; 2.0]")
    listed = listed.replace("parameter_size=4.0", "parameter_size=4.0 -- stage_id=3")
    assert read_profile(listed).layers[0].activations == 10.5


def test_stages_are_written():
    text = write_profile(read_profile(GOOD), stages=[0, 1])
    assert [line.rsplit(" -- ")[-1] for line in text.splitlines()[:2]] == [
        "stage_id=0",
        "stage_id=1",
    ]


def test_inputs_and_unread_parts_are_no_work():
    text = "".join(
        f"{name} -- {what} -- {COSTS}\n"
        for name, what in [
            ("in", "Input0"), ("a", "LSTM"), ("b", "__getitem__(0)"), ("c", "__getitem__(1)"),
            ("d", "Add"),
        ]
    )  # fmt: skip
    graph = read_profile(text + "\tin -- a\n\ta -- b\n\ta -- c\n\tb -- d\n")
    kept = computing(graph)
    assert [layer.name for layer in kept.layers] == ["a", "b", "d"]
    assert kept.edges == ((0, 1), (1, 2))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("node1 -- Linear", "node1 - Linear", r"line 1: 'node1 .*2 parts; separate them by ' -- '"),
        ("forward_compute_time=1.5", "forward_compute_time=fast",
         r"line 1: 'forward_compute_time=fast': a number is needed; give 0"),
        ("forward_compute_time=1.5", "forward_compute_time=",
         r"line 1: 'forward_compute_time=': a number is needed"),
        ("parameter_size=4.0", "parameter_size=-4", r"line 1: 'parameter_size=-4'.*not negative"),
        ("activation_size=8", "activation_size=nan", r"'activation_size=nan': costs are finite"),
        ("activation_size=8", "activation_size=[8; x]", r"'activation_size=\[8; x\]': a number"),
        ("backward_compute_time=2, ", "", r"line 1: .*the costs of a layer are forward_compute_t"),
        ("backward_compute_time", "backwards", r"line 1: .*in this order; write each as name=numb"),
        ("node2 -- ReLU", "node1 -- ReLU", r"line 2: 'node1': a layer of this name was given bef"),
        ("\tnode1 -- node2", "\tnode1 -- node7", r"line 3: 'node7': no line before gives a layer"),
        ("\tnode1 -- node2", "\tnode1", r"line 3: 'node1': an edge's line has two layers' names"),
        ("\tnode1 -- node2", "\tnode1 -- node2\n\tnode1 -- node2", r"line 4: .*keep one of them"),
        ("\tnode1 -- node2", "\tnode1 -- node2\n\tnode2 -- node1", r"in a circle.*node1, node2"),
        ("\tnode1 -- node2", "\tnode1 -- node1", r"in a circle through or before node1"),
    ],
)  # fmt: skip
def test_bad_text(before, after, told):
    with pytest.raises(UsageError, match=told):
        read_profile(GOOD.replace(before, after, 1))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_layers(text):
    with pytest.raises(UsageError, match="no layers; it needs a line 'node1 -- Linear -- forward"):
        read_profile(text)
