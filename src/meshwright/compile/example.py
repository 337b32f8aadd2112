"""The form of a batch: what a program is traced for, and cached by."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from meshwright.errors import NotTraceable

__all__ = ["Example", "Form", "Rows", "example_of", "form_of", "is_plain_list"]


@dataclass(frozen=True, slots=True)
class Rows:
    """A list with one plain value per sample (texts, ids): no part of a batch's form."""

    name: str
    values: list[Any]

    def __repr__(self) -> str:
        return "one per sample"


@dataclass(frozen=True, slots=True)
class Example:
    """The form of a micro-batch.

    Attributes:
        leaves: its tensors' names, dtypes and shapes without dim 0.
        spec: what holds them.
        plain: (place among the leaves, value) of what is no tensor.
    """

    leaves: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    spec: Any
    plain: tuple[tuple[int, Any], ...]

    @property
    def key(self) -> str:
        """Equal for batches of the same form."""
        return repr((self.leaves, str(self.spec), self.plain))

    def build(self, tensors: Sequence[Tensor], *, traced: bool = False) -> Any:
        """The batch with these tensors as leaves.

        Args:
            tensors: one for each of `leaves`.
            traced: a program is made of it: lists with one plain value per sample may not be read.
        """
        flat: list[Any] = list(tensors)
        for place, value in self.plain:
            if isinstance(value, Rows):
                flat.insert(place, _Unreadable(value.name) if traced else value.values)
            else:
                flat.insert(place, value)
        return pytree.tree_unflatten(flat, self.spec)


Form = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
"""Names, dtypes and shapes without dim 0."""


def form_of(tree: Any) -> Form | None:
    """The form of the plainest batch, a dict of tensors by name; None for any other.

    Walking a tree costs more than a step of a tiny model: what is known of a form is looked up.
    """
    if type(tree) is not dict:
        return None
    found = []
    for name, leaf in tree.items():
        if type(name) is not str or type(leaf) is not Tensor or not leaf.dim():
            return None
        found.append((name, leaf.dtype, tuple(leaf.shape[1:])))
    return tuple(found) or None


@lru_cache(maxsize=256)
def _example_of(form: Form) -> Example:
    empty = {name: torch.empty(0, *shape, dtype=dtype) for name, dtype, shape in form}
    return _walked(empty)[0]


def example_of(tree: Any) -> tuple[Example, list[Tensor]]:
    """The form of a batch, and its tensor leaves."""
    form = form_of(tree)
    return _walked(tree) if form is None else (_example_of(form), list(tree.values()))


def _walked(tree: Any) -> tuple[Example, list[Tensor]]:
    paths, spec = pytree.tree_flatten_with_path(tree, is_leaf=is_plain_list)
    leaves = [(_leaf_name(path), leaf) for path, leaf in paths if isinstance(leaf, Tensor)]
    named = tuple((name, t.dtype, tuple(t.shape[1:])) for name, t in leaves)
    rows = leaves[0][1].shape[0] if leaves else 0

    def form(path: Any, leaf: Any) -> Any:
        per_sample = isinstance(leaf, list) and len(leaf) == rows
        return Rows(_leaf_name(path), leaf) if per_sample else leaf

    plain = tuple(
        (k, form(path, leaf))
        for k, (path, leaf) in enumerate(paths)
        if not isinstance(leaf, Tensor)
    )
    return Example(named, spec, plain), [t for _, t in leaves]


def is_plain_list(node: Any) -> bool:
    """Lists without tensors are kept whole, so that one entry per sample can be seen."""
    return isinstance(node, list) and not any(
        isinstance(leaf, Tensor | UserDict) for leaf in pytree.tree_leaves(node)
    )


def _leaf_name(path: Any) -> str:
    """`['x'][0]` as `x.0`; a bare tensor is `batch`."""
    text = pytree.keystr(path)
    words = text.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")
    return words.strip(".") or "batch"


class _Unreadable:
    """In place of a list with one plain value per sample: whoever reads it is told off."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "name", name)

    def __getattribute__(self, attribute: str) -> Any:
        _refuse(object.__getattribute__(self, "name"))

    def __repr__(self) -> str:
        return "<one value per sample>"


def _refuse(name: str) -> NoReturn:
    # trace.py imports nothing of ours that would come back here; it knows what user code is.
    from meshwright.compile.trace import user_line

    raise NotTraceable(
        f"{user_line()}: the loss reads {name} of the batch, a list with one Python value per "
        "sample, which a program would freeze; make tensors of it in collate, or use --eager"
    )


def _reading(self: _Unreadable, *_: Any) -> NoReturn:
    _refuse(object.__getattribute__(self, "name"))


for _special in ("bool", "contains", "eq", "getitem", "hash", "iter", "len", "ne", "str", "format"):
    setattr(_Unreadable, f"__{_special}__", _reading)
