"""`initialize` and what scripts call before it."""

from __future__ import annotations

import argparse
import atexit
import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from meshwright.compat.deepspeed.config import Settings, settings
from meshwright.compat.deepspeed.engine import Engine
from meshwright.compat.deepspeed.optimizers import built
from meshwright.compat.deepspeed.schedules import schedule_of
from meshwright.errors import UsageError, UserCodeError
from meshwright.launch.contract import here

__all__ = ["add_config_arguments", "init_distributed", "initialize"]


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed` and `--deepspeed_config FILE`, as scripts expect."""
    group = parser.add_argument_group("DeepSpeed", "read by meshwright.compat.deepspeed")
    group.add_argument("--deepspeed", action="store_true", help="taken for granted")
    group.add_argument("--deepspeed_config", metavar="FILE", help="a DeepSpeed JSON configuration")
    return parser


def init_distributed(*_: Any, **__: Any) -> None:
    """Ranks meet in `initialize`; here only what they were told is checked.

    Raises:
        UsageError: the environment contradicts itself.
    """
    here()


def initialize(  # noqa: PLR0913 - DeepSpeed's own parameters
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,  # noqa: FBT001 - DeepSpeed's
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    mesh_param: Any = None,
    config_params: Mapping[str, Any] | str | Path | None = None,
) -> tuple[Engine, torch.optim.Optimizer, DataLoader[Any] | None, Any]:
    """DeepSpeed's `initialize`: (engine, optimizer, data loader, schedule).

    Args:
        args: its `deepspeed_config` is the configuration, where `config` is not given.
        model: that was built; the first rank's weights count.
        optimizer: over the model's parameters, or a function that makes one; else the
            configuration's.
        model_parameters: or groups of them, for the configuration's optimizer.
        training_data: a dataset to make this rank's loader of.
        lr_scheduler: over the optimizer, or a function of it; else the configuration's.
        distributed_port: not used: ranks meet where the launcher says.
        mpu: not used: the mesh follows from the configuration.
        dist_init_required: not used.
        collate_fn: for the loader.
        config: a dict, or the path of a JSON file.
        mesh_param: not used.
        config_params: older name of `config`.

    Raises:
        UsageError: the configuration is missing or wrong.
        UserCodeError: the model or the optimizer is.
    """
    del distributed_port, mpu, dist_init_required, mesh_param
    if not isinstance(model, nn.Module):
        raise UserCodeError(
            f"initialize(model=...) got {type(model).__name__}, but needs a torch.nn.Module"
        )
    asked = settings(_source(args, config, config_params), here().world.size)
    trained = [p for p in model.parameters() if p.requires_grad]
    made = _optimizer(asked, optimizer, list(model_parameters or trained))
    schedule = _schedule(asked, lr_scheduler)
    loader = None if training_data is None else _loader(asked, training_data, collate_fn)
    engine = Engine(model, asked, made, schedule, loader)
    atexit.register(engine.leave)
    for left in asked.left:
        engine.run.session.notes.append(f"DeepSpeed config: {left.key} is left out: {left.why}")
    return engine, made, loader, engine.lr_scheduler


def _source(args: Any, *given: Any) -> Any:
    named = vars(args).get("deepspeed_config") if isinstance(args, argparse.Namespace) else None
    found = [one for one in (*given, named) if one is not None]
    if not found:
        raise UsageError(
            "initialize() got no configuration; give config=, a dict or the path of a JSON file, "
            "or --deepspeed_config FILE"
        )
    return found[0]


def _optimizer(asked: Settings, given: Any, over: list[Any]) -> torch.optim.Optimizer:
    if given is None:
        if asked.optimizer is None:
            raise UsageError(
                "neither initialize(optimizer=...) nor the configuration names an optimizer; add "
                '"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}'
            )
        return built(*asked.optimizer, over)
    made = given if isinstance(given, torch.optim.Optimizer) else given(over)
    if not isinstance(made, torch.optim.Optimizer):
        raise UserCodeError(
            f"initialize(optimizer=...) is {type(made).__name__}, but must be a "
            "torch.optim.Optimizer"
        )
    return made


def _schedule(asked: Settings, given: Any) -> Callable[[Any], Any] | None:
    """A factory of the schedule over another optimizer with the same groups."""
    if given is None:
        return None if asked.schedule is None else schedule_of(*asked.schedule)
    if not isinstance(given, torch.optim.lr_scheduler.LRScheduler):
        if not callable(given):
            raise UserCodeError(
                f"initialize(lr_scheduler=...) is {type(given).__name__}, but must be one of "
                "torch.optim.lr_scheduler, or a function of the optimizer"
            )
        return given  # type: ignore[no-any-return]

    def moved(optimizer: torch.optim.Optimizer) -> Any:
        found = copy.copy(given)
        found.optimizer = optimizer
        found._step_count += 1  # noqa: SLF001 - else it looks for its own mark on optimizer.step
        return found

    return moved


def _loader(
    asked: Settings, data: Dataset[Any], collate: Callable[[list[Any]], Any] | None
) -> DataLoader[Any]:
    """This rank's share of a dataset, shuffled, in micro-batches."""
    how: dict[str, Any] = {"batch_size": asked.micro, "collate_fn": collate, "drop_last": True}
    if isinstance(data, IterableDataset):
        return DataLoader(data, **how)
    copies = asked.plan.data or 1
    rank = here().world.rank // asked.plan.tensor
    return DataLoader(data, sampler=DistributedSampler(data, copies, rank), **how)
