"""What an optimizer lets be done with its step, found by trying it on small tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.run.optimizer.recipe import Recipe, build

__all__ = ["fuses", "lets_fuse", "steps_apart"]

_SHAPES = ((6, 4), (37, 1))  # some optimizers take matrices only
_STEPS = 3
_ULPS = 64  # a fused kernel multiplies and adds in one, and in another order


def lets_fuse(group: Mapping[str, Any]) -> bool:
    """Whether the user left it open how a group is stepped."""
    undecided = all(key in group and group[key] is None for key in ("fused", "foreach"))
    plain = not any(group.get(key) for key in ("differentiable", "capturable"))
    return undecided and plain and not isinstance(group.get("lr"), Tensor)


def fuses(recipe: Recipe, dtype: torch.dtype) -> bool:
    """Whether groups that may be stepped by fused kernels are, with the same numbers."""
    groups = [how for _, how in recipe.groups if lets_fuse(how)]
    return bool(groups) and all(_alike(recipe, how, dtype) for how in groups)


def steps_apart(recipe: Recipe) -> bool:
    """Whether parameters may be stepped one after the other, by calls of their own."""
    parts = tuple(range(len(_SHAPES)))
    for _, how in recipe.groups:
        once = _run(recipe, how, [parts])
        each = _run(recipe, how, [(part,) for part in parts])
        if not all(map(torch.equal, once, each)):
            return False
    return True


def _alike(recipe: Recipe, how: Mapping[str, Any], dtype: torch.dtype) -> bool:
    parts = tuple(range(len(_SHAPES)))
    plain = _run(recipe, how, [parts], dtype)
    try:
        fused = _run(recipe, {**how, "fused": True}, [parts], dtype)
    except (RuntimeError, NotImplementedError, TypeError):  # there is no such kernel for them
        return False
    near = _ULPS * torch.finfo(dtype).eps
    return all(
        torch.allclose(a, b, rtol=near, atol=near) for a, b in zip(plain, fused, strict=True)
    )


def _run(
    recipe: Recipe,
    how: Mapping[str, Any],
    turns: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Small parameters after some steps, each step in `turns` of some of them."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = [
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in _SHAPES
        ]
        names = [str(k) for k in range(len(tensors))]
        single = Recipe(recipe.kind, recipe.defaults, ((tuple(names), dict(how)),))
        optimizer = build(single, dict(zip(names, tensors, strict=True)))
        for _ in range(_STEPS):
            gradients = [torch.randn(t.shape, generator=generator).to(dtype) for t in tensors]
            for turn in turns:
                for part in turn:
                    tensors[part].grad = gradients[part]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return [tensor.detach() for tensor in tensors]
