"""Stochastic rounding: its mean is the number itself, and every layout draws the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from meshwright.compile.draw import scrambled
from meshwright.compile.init import blueprint
from meshwright.run.optimizer import stochastic
from meshwright.run.optimizer.recipe import is_separable, recipe
from meshwright.run.optimizer.stochastic import Rounding, rounded

SHAPE = (12, 10)


def every_draw():
    return torch.arange(65536, dtype=torch.int32)


@pytest.mark.parametrize("x", [1.0 + 2**-10, -3.14159, 1e-20, 65504.25, 3 * 2.0**-134])
def test_over_all_draws_the_mean_is_the_number(x):
    exact = torch.tensor(x)
    found = rounded(exact.expand(65536), every_draw())
    assert found.dtype == torch.bfloat16
    assert len(found.unique()) == 2  # its neighbours
    assert found.double().mean() == exact.double()


@pytest.mark.parametrize("x", [0.0, -0.0, 1.5, -(2.0**100), float("inf"), float("-inf")])
def test_what_bf16_holds_stays(x):
    found = rounded(torch.full((65536,), x), every_draw())
    assert torch.equal(found.view(torch.int16), torch.full_like(found, x).view(torch.int16))


def test_nan_stays_one():
    quiet = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    for draw in (0, 1, 65535):
        assert rounded(quiet, torch.full((3,), draw, dtype=torch.int32)).isnan().all()


def test_rows_that_do_not_lie_in_order_are_rounded_where_they_are():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    draws = torch.arange(24, dtype=torch.int32).reshape(4, 6) * 2000
    assert torch.equal(rounded(x.T, draws), rounded(x.T.contiguous(), draws))


def drawn_by(make, name, at, count):
    """The first `count` draws of a step for a parameter, as numbers."""
    place = np.arange(65536, dtype=np.uint64)
    draws = stochastic._draws(place, make._secrets(name, at, count))
    return [draw.numpy().astype(np.float64) for draw, _ in zip(draws, range(count), strict=False)]


def test_draws_are_uniform_and_of_lanes_steps_and_parameters_unlike():
    """Fixed seeds: chi-square over 256 bins within 5 deviations, correlations within 5 too."""
    make = Rounding(3, {"a": 0, "b": 1}, {"a": (65536,), "b": (65536,)}, {})
    other = Rounding(4, {"a": 0}, {"a": (65536,)}, {})
    found = drawn_by(make, "a", 0, 6) + drawn_by(make, "a", 1, 1) + drawn_by(make, "b", 0, 1)
    found += drawn_by(other, "a", 0, 1)
    for drawn in found:
        for bins in (drawn // 256, drawn % 256):
            counts = np.bincount(bins.astype(int), minlength=256)
            chi = ((counts - 256.0) ** 2 / 256).sum()
            assert abs(chi - 255) < 5 * np.sqrt(2 * 255)
        assert abs(drawn.mean() - 32767.5) < 5 * 65536 / np.sqrt(12 * 65536)
        assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5 / 256
    apart = np.corrcoef(np.stack(found)) - np.eye(len(found))
    assert np.abs(apart).max() < 5 / 256


def test_places_are_splitmix64s():
    """The first outputs of the stream that begins at 1234567, as its authors' code prints them."""
    found = scrambled(np.arange(3, dtype=np.uint64), 1234567).tolist()
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def whole(numbers=None):
    numbers = {"w": 0} if numbers is None else numbers
    return Rounding(7, numbers, dict.fromkeys(numbers, SHAPE), {})


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16()


def gradient(step):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 + step)).bfloat16()


def trained(rounding, part=lambda tensor: tensor, steps=4, kind=torch.optim.AdamW):
    """A shard and its optimizer state after some steps."""
    shard = nn.Parameter(part(start()).clone())
    optimizer = kind([shard], lr=1e-2)
    for at in range(steps):
        rounding.step(optimizer, {"w": shard}, {"w": part(gradient(at)).clone()}, 0.5, at)
    slots = optimizer.state[shard]
    assert shard.dtype == torch.bfloat16
    assert shard.grad is None
    return {"w": shard.data, **{k: v for k, v in slots.items() if v.dim()}}


PARTS = {
    "rows": [(((0, 5), (0, 10)), ((0, 5), (0, 10))), (((5, 7), (0, 10)), ((0, 7), (0, 10)))],
    "columns": [(((0, 12), (0, 4)), ((0, 12), (0, 4))), (((0, 12), (4, 6)), ((0, 12), (0, 6)))],
}


def cut(tensor, bounds):
    for dim, (first, length) in enumerate(bounds):
        tensor = tensor.narrow(dim, first, length)
    return tensor


@pytest.mark.parametrize("how", PARTS)
def test_shards_are_rounded_as_the_whole(how):
    expected = trained(whole())
    assert expected["exp_avg"].dtype == expected["exp_avg_sq"].dtype == torch.bfloat16
    for there, here in PARTS[how]:
        made = Rounding(7, {"w": 0}, {"w": SHAPE}, {"w": ((there, here),)})
        found = trained(made, lambda tensor, there=there: cut(tensor, there))
        for name, tensor in found.items():
            assert torch.equal(tensor, cut(expected[name], there)), name


def test_a_shard_of_several_boxes_is_rounded_as_the_whole():
    """As fused weights lie: rows 1 to 2 and 8 to 10 one after another."""
    boxes = ((((1, 2), (0, 10)), ((0, 2), (0, 10))), (((8, 3), (0, 10)), ((2, 3), (0, 10))))
    found = trained(
        Rounding(7, {"w": 0}, {"w": SHAPE}, {"w": boxes}),
        lambda tensor: torch.cat([cut(tensor, there) for there, _ in boxes]),
    )
    expected = trained(whole())
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.cat([cut(expected[name], t) for t, _ in boxes])), name


def test_a_shard_that_draws_as_if_it_were_first_is_rounded_otherwise():
    """The law above sees what it forbids."""
    there, _ = PARTS["rows"][1]
    wrong = Rounding(7, {"w": 0}, {"w": SHAPE}, {"w": ((((0, 7), (0, 10)),) * 2,)})
    found = trained(wrong, lambda tensor: cut(tensor, there))
    assert not torch.equal(found["w"], cut(trained(whole())["w"], there))


def test_updates_below_a_unit_in_the_last_place_are_not_lost():
    """1 + 1000 steps of 2^-12: rounded to nearest, bf16 would stay at 1."""
    weight = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=2.0**-12)
    rounding = Rounding(0, {"w": 0}, {"w": (4000,)}, {})
    gone = torch.full((4000,), -1.0, dtype=torch.bfloat16)
    for at in range(1000):
        rounding.step(optimizer, {"w": weight}, {"w": gone.clone()}, 1.0, at)
    assert torch.tensor(1.0, dtype=torch.bfloat16) + 2.0**-12 == 1.0
    # A step is 1/32 of a unit: a binomial of 1000 draws, whose mean of 4000 deviates by 7e-4.
    assert weight.float().mean().item() == pytest.approx(1 + 1000 * 2.0**-12, abs=5 * 7e-4)


def pair(shards, sizes, monkeypatch, together=False):
    monkeypatch.setattr(stochastic, "CHUNK_ELEMENTS", sizes)
    names = list(shards)
    parameters = {n: nn.Parameter(t.clone()) for n, t in shards.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    calls = []
    optimizer.register_step_pre_hook(
        lambda *_: calls.append([n for n, p in parameters.items() if p.grad is not None])
    )
    numbers = {n: k for k, n in enumerate(names) if shards[n].dtype == torch.bfloat16}
    rounding = Rounding(7, numbers, dict.fromkeys(numbers, SHAPE), {}, together)
    for at in range(2):
        # What is wide comes times the factor already.
        given = {n: gradient(at).to(p.dtype) for n, p in parameters.items()}
        rounding.step(optimizer, parameters, given, 1.0, at)
    return {n: p.data for n, p in parameters.items()}, calls[: len(calls) // 2]


def test_how_many_are_widened_at_a_time_changes_no_bit(monkeypatch):
    shards = {"a": start(), "n": start().float(), "b": start(), "c": start()}
    at_once, calls = pair(shards, 10**6, monkeypatch)
    assert calls == [["a", "n", "b", "c"]]
    by_two, calls = pair(shards, 240, monkeypatch)
    assert calls == [["a", "n", "b"], ["c"]]
    single, calls = pair(shards, 1, monkeypatch)
    assert calls == [["a", "n"], ["b"], ["c"]]
    _, calls = pair(shards, 1, monkeypatch, together=True)
    assert calls == [["a", "n", "b", "c"]]
    for name, tensor in at_once.items():
        assert torch.equal(tensor, by_two[name])
        assert torch.equal(tensor, single[name])
    assert at_once["n"].dtype == torch.float32
    assert not torch.equal(at_once["a"], at_once["b"])  # each parameter has draws of its own


def test_a_scalar_and_what_has_no_gradient():
    one, other = nn.Parameter(torch.ones((), dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([one, other], lr=0.1)
    rounding = Rounding(0, {"s": 0}, {"s": ()}, {})
    taken = torch.ones((), dtype=torch.bfloat16)
    rounding.step(optimizer, {"s": one, "o": other}, {"s": taken}, 1.0, 0)
    rounding.step(optimizer, {"s": one, "o": other}, {}, 1.0, 1)
    assert one.dtype == torch.bfloat16
    assert one.item() == pytest.approx(0.9, abs=0.004)
    assert torch.equal(other, torch.ones(3))


class Counted(torch.optim.SGD):
    """Its steps depend on how often it was called: not one parameter at a time."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
            group["lr"] = 0.1 / group["calls"]
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "apart"),
    [(torch.optim.AdamW, True), (torch.optim.SGD, True), (Counted, False)],
)
def test_optimizers_that_count_their_steps_are_stepped_at_once(kind, apart):
    model = nn.Linear(3, 3)
    made = blueprint(lambda: model, 0)
    assert is_separable(recipe(made, lambda m: kind(m.parameters(), lr=0.1))) is apart
