"""Initialisation: each tensor alone, and the same numbers as the factory's own run."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from meshwright.compile import init
from meshwright.compile.init import blueprint, built, seeded
from meshwright.errors import UserCodeError
from tests.equal import odd


class Many(nn.Module):
    """Every way in which a factory fills tensors."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.embedding = nn.Embedding(10, 4, padding_idx=0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.lstm = nn.LSTM(3, 5, num_layers=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.xavier = nn.Parameter(nn.init.xavier_normal_(torch.empty(6, 4)))
        self.orthogonal = nn.Parameter(nn.init.orthogonal_(torch.empty(6, 4)))
        self.truncated = nn.Parameter(nn.init.trunc_normal_(torch.empty(40), std=0.1, b=0.2))
        self.python = nn.Parameter(torch.full((3,), random.random()))
        self.numpy = nn.Parameter(torch.from_numpy(np.random.randn(4)).float())  # noqa: NPY002
        self.scaled = nn.Parameter(torch.randn(5) * torch.rand(5).mean())
        self.register_buffer("table", torch.arange(6.0).outer(torch.ones(2)).sin())
        self.register_buffer("drawn", torch.randn(3), persistent=False)
        self.note = torch.randn(2)  # a plain attribute
        with torch.no_grad():
            self.linear.weight[0] = 7.0
            self.linear.weight.mul_(0.5)


def tensors(model):
    named = (*model.named_parameters(), *model.named_buffers(), ("note", model.note))
    return {name: tensor.detach().clone() for name, tensor in named}


def test_each_tensor_is_as_the_factory_makes_it():
    with seeded(3):
        want = tensors(Many())
    found = blueprint(Many, 3)
    fakes = found.parameters | found.buffers | found.constants
    assert set(fakes) == set(want)
    for name in sorted(want, reverse=True):  # in any order
        assert torch.equal(found.make(fakes[name]), want[name]), name
    assert found.notes == []


def test_another_seed_makes_others():
    one, two = blueprint(Many, 3), blueprint(Many, 4)
    for name in ("linear.bias", "orthogonal", "truncated", "python", "numpy"):
        assert not torch.equal(one.make(one.parameters[name]), two.make(two.parameters[name]))


def test_generators_are_as_they_were():
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    blueprint(Many, 3)
    with seeded(3):
        Many()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_building_takes_no_memory():
    """A model of 4 TB is a blueprint like any other."""
    found = blueprint(lambda: nn.Sequential(*(nn.Linear(10**6, 10**5) for _ in range(10))), 0)
    assert sum(p.numel() for p in found.parameters.values()) > 10**12
    assert found.make(found.parameters["9.bias"]).shape == (10**5,)


def test_a_tensor_is_made_without_the_others(monkeypatch):
    model = blueprint(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(50))), 0)
    replayed = []
    real = init._replayed
    monkeypatch.setattr(init, "_replayed", lambda c, w: replayed.extend(c) or real(c, w))
    model.make(model.parameters["49.weight"])
    assert 0 < len(replayed) < 10


def test_tied_tensors_stand_once():
    found = blueprint(odd.Tied, 0)
    assert found.tied["head.weight"] == "token.weight"
    assert "head.weight" not in found.parameters
    assert {"again.weight": "mix.weight", "again.bias": "mix.bias"}.items() <= found.tied.items()


def on_meta():
    with torch.device("meta"):
        return odd.Tied()


def test_what_a_factory_leaves_on_the_meta_device_is_made_and_stays_tied():
    with seeded(3):
        want = odd.Tied()
    module = built(on_meta, 3, blueprint(on_meta, 3))
    assert module.head.weight is module.token.weight
    assert module.again.weight is module.mix.weight
    found, wanted = module.state_dict(), want.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class Blank(nn.Module):
    """Parameters and buffers of which nothing says what is in them."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.table = nn.Parameter(torch.empty(4, 2, device=device))
        self.none = nn.Parameter(torch.empty(0, 2))
        self.filled = nn.Parameter(torch.empty(4).view(2, 2).fill_(2.0).flatten())
        self.register_buffer("cache", torch.empty(3, device=device))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_parameter_without_values_is_refused_and_a_buffer_is_zero(device):
    """Ranks would begin with whatever lay in their memory."""
    found = blueprint(lambda: Blank(device), 0)
    with pytest.raises(UserCodeError, match=r"parameter table of shape \[4, 2\] is made without"):
        found.make(found.parameters["table"])
    assert found.make(found.parameters["none"]).shape == (0, 2)
    assert found.make(found.parameters["filled"]).tolist() == [2.0] * 4
    assert found.make(found.buffers["cache"]).tolist() == [0.0] * 3
    if device == "meta":  # a module whose values are given later needs none
        assert built(lambda: Blank(device), 0, found).table.tolist() == [[0.0, 0.0]] * 4


class Reads(nn.Linear):
    """Looks at its own values."""

    def __init__(self):
        super().__init__(3, 3)
        with torch.no_grad():
            self.weight /= float(self.weight.norm())


def test_a_factory_that_reads_values_runs_for_real_and_says_so():
    found = blueprint(Reads, 5)
    assert len(found.notes) == 1
    assert "reads tensor values" in found.notes[0]
    with seeded(5):
        want = Reads()
    assert torch.equal(found.make(found.parameters["weight"]), want.weight)
    assert found.make(found.parameters["weight"]) is not found.parameters["weight"]


@pytest.mark.parametrize("made", [None, torch.zeros(3), nn.Linear])
def test_what_is_no_module_is_refused(made):
    with pytest.raises(UserCodeError, match=r"model\(\) returned \w+, but must return a torch.nn"):
        blueprint(lambda: made, 0)


def test_an_error_of_the_factory_is_the_users():
    def factory():
        raise RuntimeError("no such layer")

    with pytest.raises(UserCodeError, match=r"model\(\) raised RuntimeError: no such layer"):
        blueprint(factory, 0)
