"""The form of a batch: what a program is traced for, and cached by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Example", "example_of"]


@dataclass(frozen=True, slots=True)
class Example:
    """The form of a micro-batch: `leaves` (dtype, shape without dim 0) and what holds them."""

    leaves: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    spec: Any
    plain: tuple[tuple[int, Any], ...]

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """The batch with these tensors as leaves."""
        flat: list[Any] = list(tensors)
        for place, value in self.plain:
            flat.insert(place, value)
        return pytree.tree_unflatten(flat, self.spec)


def example_of(tree: Any) -> tuple[Example, list[Tensor]]:
    """The form of a batch, and its tensor leaves."""
    paths, spec = pytree.tree_flatten_with_path(tree)
    leaves = [(pytree.keystr(path), leaf) for path, leaf in paths if isinstance(leaf, Tensor)]
    plain = tuple((k, leaf) for k, (_, leaf) in enumerate(paths) if not isinstance(leaf, Tensor))
    named = tuple((_leaf_name(path), t.dtype, tuple(t.shape[1:])) for path, t in leaves)
    return Example(named, spec, plain), [t for _, t in leaves]


def _leaf_name(path: str) -> str:
    """`['x'][0]` as `x.0`; a bare tensor is `batch`."""
    words = path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")
    return words.strip(".") or "batch"
