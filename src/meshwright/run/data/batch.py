"""Batches as trees: what a batch may hold, cutting samples out of one, and its digest.

A batch is any nesting of dicts, tuples, named tuples and lists. Its tensors have one row per sample
on dim 0. A list without tensors that is as long as the batch holds one entry per sample (texts,
ids) and is cut like a tensor; other plain values are the same for every sample.
"""

from __future__ import annotations

import hashlib
from collections import UserDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from meshwright.compile.example import Form, form_of, is_plain_list
from meshwright.errors import UserCodeError

__all__ = ["Batch", "checked", "cut", "digest", "rows"]

_PLAIN = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, type(None))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Samples of one step.

    Attributes:
        tree: what the loss gets; every tensor has one row per sample on dim 0.
        digest: 20 bits of everything but values and the number of samples: ranks whose digests
            differ would run different programs.
    """

    tree: Any
    digest: int


def rows(tree: Any) -> int:
    """Samples in `tree`: dim 0 of its first tensor.

    Raises:
        UserCodeError: it holds no tensor with a dim.
    """
    for leaf in pytree.tree_leaves(_opened(tree)):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise UserCodeError(
        f"the batch is {_described(tree)} that holds no tensor with a sample on dim 0; "
        "collate the samples into tensors whose dim 0 is the sample"
    )


def checked(tree: Any, samples: int) -> Any:
    """`tree` as the loss gets it.

    Args:
        tree: what collate returned, or one batch of a stream.
        samples: how many samples it must hold.

    Raises:
        UserCodeError: a tensor's dim 0 is not `samples`, there is no tensor, or a leaf is of a kind
            whose samples cannot be told apart.
    """
    if form_of(tree) is not None and all(t.shape[:1] == (samples,) for t in tree.values()):
        return tree
    opened = _opened(tree)
    rows(opened)
    for path, leaf in _leaves_with_path(opened):
        _check_leaf(pytree.keystr(path), leaf, samples)
    return opened


def cut(tree: Any, start: int, stop: int, samples: int) -> Any:
    """Samples `[start, stop)` of a checked batch of `samples`; tensors are views."""
    if (start, stop) == (0, samples):
        return tree
    if form_of(tree) is not None:
        return {name: tensor[start:stop] for name, tensor in tree.items()}

    def part(leaf: Any) -> Any:
        per_sample = isinstance(leaf, Tensor) or (isinstance(leaf, list) and len(leaf) == samples)
        return leaf[start:stop] if per_sample else leaf

    return pytree.tree_map(part, tree, is_leaf=is_plain_list)


def digest(tree: Any, samples: int) -> int:
    """20 bits of a checked batch's structure, dtypes, shapes without dim 0, and plain values."""
    form = form_of(tree)
    if form is not None:
        return _digest_of(form)
    return _digested(
        f"{pytree.keystr(path)}={_signature(leaf, samples)}"
        for path, leaf in _leaves_with_path(tree)
    )


@lru_cache(maxsize=256)
def _digest_of(form: Form) -> int:
    return _digested(f"[{name!r}]={dtype}{shape}" for name, dtype, shape in form)


def _digested(parts: Iterable[str]) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:3], "big") >> 4


def _signature(leaf: Any, samples: int) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype}{tuple(leaf.shape[1:])}"
    if isinstance(leaf, list) and len(leaf) == samples:
        return "one per sample"
    return repr(leaf)


def _check_leaf(name: str, leaf: Any, samples: int) -> None:
    where = f"batch{name}"
    if isinstance(leaf, Tensor):
        if not leaf.dim():
            raise UserCodeError(
                f"{where} is a tensor without dims, but every tensor of a batch has its sample on "
                f"dim 0; return one value per sample ({samples} of them), or a Python number"
            )
        if leaf.shape[0] != samples:
            raise UserCodeError(
                f"{where} has shape {tuple(leaf.shape)}, but dim 0 must be the {samples} samples "
                "of the batch; put the sample on dim 0"
            )
    elif not isinstance(leaf, (*_PLAIN, list)):
        raise UserCodeError(
            f"{where} is {_described(leaf)}, whose samples cannot be told apart; return tensors in "
            "dicts, tuples or lists (torch.as_tensor converts arrays)"
        )


def _opened(tree: Any) -> Any:
    """Hugging Face's `BatchEncoding` and its like are dicts in a wrapper that pytrees stop at."""

    def opened(leaf: Any) -> Any:
        return _opened(dict(leaf)) if isinstance(leaf, UserDict) else leaf

    return pytree.tree_map(opened, tree, is_leaf=is_plain_list)


def _leaves_with_path(tree: Any) -> list[tuple[Any, Any]]:
    leaves: Callable[..., tuple[list[tuple[Any, Any]], Any]] = pytree.tree_flatten_with_path
    return leaves(tree, is_leaf=is_plain_list)[0]


def _described(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[:1] in 'AEIOUaeiou' else 'a'} {kind}"
