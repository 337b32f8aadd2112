"""Attention with dropout: torch's own numbers, in fewer ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from meshwright.compile.attention import Attention, _cuts
from meshwright.compile.draw import draw, position_operand
from meshwright.compile.random import RandomMode


def operands(rows, columns, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, rows, 8), (2, 3, columns, 8), (2, 3, columns, 5)
    drawn = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return [tensor.requires_grad_() for tensor in drawn]


def attended(given, *, ours, **how):
    """(result, gradients), with the draws of Meshwright."""
    position = position_operand(1, 0, 0, 0)
    modes = [RandomMode(lambda kind, size, n: draw(kind, size, n, None, 0, position))]
    with modes[0] as random:
        if ours:
            with Attention():
                found = F.scaled_dot_product_attention(*given, **how)
        else:
            found = F.scaled_dot_product_attention(*given, **how)
        assert random.count == (how["dropout_p"] > 0)
    weights = torch.arange(found.numel(), dtype=found.dtype).reshape(found.shape)
    return [found, *torch.autograd.grad((found * weights).sum(), given)]


@pytest.mark.parametrize(
    ("rows", "columns", "how"),
    [
        (6, 6, {"is_causal": True}),
        (33, 33, {"is_causal": True}),
        (150, 150, {"is_causal": True}),
        (150, 150, {"is_causal": True, "scale": 0.3}),
        (40, 70, {}),
        (7, 9, {"attn_mask": torch.arange(63).reshape(7, 9) % 4 > 0}),
        (6, 6, {"dropout_p": 0.0, "is_causal": True}),
    ],
)
def test_numbers_are_those_of_torch(rows, columns, how):
    given = operands(rows, columns)
    how = {"dropout_p": 0.3, **how}
    for found, expected in zip(
        attended(given, ours=True, **how), attended(given, ours=False, **how), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_block_looks_no_further_than_the_mask_lets_it():
    assert _cuts(6, 6, causal=True) == [(0, 6, 6)]
    assert _cuts(256, 256, causal=True) == [
        (0, 64, 64),
        (64, 128, 128),
        (128, 192, 192),
        (192, 256, 256),
    ]
    assert _cuts(70, 70, causal=True) == [(0, 32, 32), (32, 64, 64), (64, 70, 70)]
    assert _cuts(256, 99, causal=False) == [(0, 256, 99)]


def test_autocast_computes_in_its_dtype():
    given = operands(40, 40, torch.float32)
    with Attention(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = F.scaled_dot_product_attention(*given, dropout_p=0.1, is_causal=True)
    assert found.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(found.float().sum(), given))
