"""The exponential moving average of the weights, over the shards that the optimizer steps.

As `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`: after the first step it
is the weights, after each further one `decay` of itself and `1 - decay` of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Average", "averaged_dtype"]


def averaged_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of an average of weights kept in `dtype`: steps of `1 - decay` vanish in 16 bits."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(slots=True)
class Average:
    """A rank's part of the average.

    Attributes:
        decay: how much of it stays at a step.
        tensors: by name of the parameter, laid out as the optimizer holds it.
        steps: that were taken in; before the first it is the weights that training began with.
    """

    decay: float
    tensors: dict[str, Tensor]
    steps: int = 0

    @classmethod
    def of(cls, decay: float, shards: Mapping[str, nn.Parameter]) -> Average:
        """An average that begins with these; what is not trained has none."""
        return cls(decay, {n: _copy(p.data) for n, p in shards.items() if p.requires_grad})

    def begin(self, shards: Mapping[str, nn.Parameter]) -> None:
        """Begin anew with these."""
        for name, tensor in self.tensors.items():
            tensor.copy_(shards[name].data)
        self.steps = 0

    def take(self, shards: Mapping[str, nn.Parameter]) -> None:
        """Take the weights in after a step that was applied."""
        if not self.steps:
            self.begin(shards)
        else:
            self._lerp((tensor, shards[name].data) for name, tensor in self.tensors.items())
        self.steps += 1

    def _lerp(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        weight = 1.0 - self.decay
        alike: list[tuple[Tensor, Tensor]] = []
        for tensor, now in pairs:
            if tensor.dtype == now.dtype:
                alike.append((tensor, now))
            else:
                tensor.lerp_(now.to(tensor.dtype), weight)
        if alike:
            torch._foreach_lerp_([t for t, _ in alike], [now for _, now in alike], weight)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to(averaged_dtype(tensor.dtype), copy=True)
