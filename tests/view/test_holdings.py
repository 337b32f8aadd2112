"""The parameters as a table."""

import doctest

from meshwright.view import holdings
from meshwright.view.holdings import folded_name, modules
from meshwright.view.runfile import parse_setup
from tests.view.runs import run_record


def test_examples() -> None:
    assert doctest.testmod(holdings).failed == 0


def test_equal_layers_are_one_line_and_no_byte_is_lost() -> None:
    setup = parse_setup(run_record(4, 3, depth=8))
    found = modules(setup.parameters, setup.axes)
    attn = next(module for module in found if module.name == "blocks.0–7.attn.qkv")
    assert attn.count == 8
    assert sum(module.bytes for module in found) == sum(p.bytes for p in setup.parameters)
    assert sum(m.local_bytes for m in found) * 4 == sum(p.bytes for p in setup.parameters)


def test_a_layer_of_another_shape_stands_alone() -> None:
    run = run_record(4, 0, depth=3)
    odd = next(p for p in run["parameters"] if p["name"] == "blocks.1.mlp.up.weight")
    odd["shape"] = [7, 7]
    setup = parse_setup(run)
    names = [module.name for module in modules(setup.parameters, setup.axes)]
    assert "blocks.{0,2}.mlp.up" in names
    assert "blocks.1.mlp.up" in names


def test_uneven_shards_name_their_ranks() -> None:
    setup = parse_setup(run_record(3, 3, depth=1, dim=64))
    embed = modules(setup.parameters, setup.axes)[0].holdings[0]
    assert embed.local == "86 × 64 on rank 0; 85 × 64 on ranks 1–2"
    assert embed.local_bytes == 4 * 86 * 64


def test_a_range_never_stands_for_modules_that_are_not_there() -> None:
    assert folded_name([("a", "0", "b", "0"), ("a", "1", "b", "1")]) == "a.*.b.*"
    assert folded_name([("a", "0", "b", "0"), ("a", "0", "b", "1")]) == "a.0.b.0–1"
    assert folded_name([()]) == "(the model itself)"
