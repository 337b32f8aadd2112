"""Live bytes of tensors, by storage, as code runs: a peak without a clock or an allocator."""

from __future__ import annotations

import weakref
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Counts the storages of all real tensors that ops under it make, while any tensor has them."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
                self._seen(leaf)
        return made

    def _seen(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self.users.get(key):
            self.now += size
            self.peak = max(self.peak, self.now)
        self.users[key] = self.users.get(key, 0) + 1
        weakref.finalize(tensor, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            self.now -= size
