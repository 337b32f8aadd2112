"""What stands behind an engine: its job, its run, and the schedule as a script sees it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from meshwright.api import Run
from meshwright.comm.base import Comm, Group
from meshwright.compat.deepspeed.config import Settings
from meshwright.compat.deepspeed.forms import Form
from meshwright.compat.deepspeed.given import Given
from meshwright.job import Job
from meshwright.launch.contract import Contract
from meshwright.launch.worker import guard
from meshwright.run.optimizer.recipe import Recipe, build, recorded

__all__ = ["EngineRun", "Schedule", "job_of", "recipe_of"]


class Engine(Protocol):
    """Of an engine, what its job and its run read."""

    asked: Settings
    given: Given
    contract: Contract
    example: Any
    forms: dict[str, Form]
    recipe: Recipe
    client_lr_scheduler: Callable[[Any], Any] | None

    @property
    def dp_world_size(self) -> int:
        """How many ranks share batches."""

    def get_lr(self) -> list[float]:
        """Of each parameter group."""


class EngineRun(Run):
    """A run whose weights are those of the first rank's module."""

    def __init__(self, engine: Engine, job: Job) -> None:
        super().__init__(job, engine.asked.plan, info={"file": sys.argv[0] or "deepspeed"})
        self.engine = engine

    @override
    def _connected(self, comm: Comm) -> None:
        contract = self.engine.contract
        if contract.world.size > 1:
            guard(contract, cast("Any", comm))
            comm.perform(self.engine.given.agree(Group.world(contract.world.size)))

    @override
    def _offload(self, contract: Contract) -> Path:
        return self.engine.asked.folder or super()._offload(contract)


class Schedule:
    """The learning-rate schedule as a script sees it: stepped by the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def step(self, *_: Any) -> None:
        """The engine does, after every step."""

    def get_last_lr(self) -> list[float]:
        """Of each parameter group."""
        return self._engine.get_lr()

    get_lr = get_last_lr


class Pushed:
    """The data of a job whose batches are all pushed: the form of the first one is all it knows."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __iter__(self) -> Iterator[Any]:
        copies = self._engine.dp_world_size

        def whole(leaf: Any) -> Any:
            return torch.cat([leaf] * copies) if isinstance(leaf, Tensor) else leaf

        while self._engine.example is not None:
            yield pytree.tree_map(whole, self._engine.example)


def job_of(engine: Engine) -> Job:
    """The job that an engine's steps are of."""
    asked = engine.asked

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return engine.forms[batch["form"]].loss(model, batch)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return build(engine.recipe, dict(model.named_parameters()))

    return Job(
        model=engine.given.factory,
        loss=loss,
        optimizer=optimizer,
        data=lambda: Pushed(engine),
        batch_size=asked.batch_size,
        schedule=engine.client_lr_scheduler,
        clip_norm=asked.clip_norm,
        loss_scale=asked.loss_scale,
    )


def recipe_of(given: Given, optimizer: torch.optim.Optimizer) -> Recipe:
    """A script's optimizer, its groups by parameters' names."""
    pairs = zip(given.tensors, given.names, strict=True)
    return recorded(optimizer, {id(tensor): name for tensor, name in pairs})
