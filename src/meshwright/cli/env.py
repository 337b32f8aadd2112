"""`mw env`: versions, machine and launch contract, as a report of a problem needs them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from typing import Any

from rich.table import Table
from rich.text import Text

from meshwright.cli.output import print_json, show
from meshwright.cli.told import Task
from meshwright.cli.words import AsJson
from meshwright.view.units import bytes_text

__all__ = ["EXAMPLE", "env"]

EXAMPLE = "Example:  mw env --json"

_OPTIONAL = ("mpi4py", "ray", "pyspark", "tensorboard", "tensorflow", "transformers", "wandb")


def env(*, json: AsJson = False) -> Task:
    """Show versions, this machine, and the launch contract that is found."""
    return partial(_env, json)


def _env(json: bool) -> int:
    found = _environment()
    if json:
        print_json(found)
    else:
        show(_table(found))
    return 0


def _environment() -> dict[str, Any]:
    """Everything as plain data."""
    import torch

    from meshwright.launch.contract import here
    from meshwright.run.describe import host, versions

    contract = here()
    world = contract.world
    return {
        "versions": {
            **versions(),
            **{n: v for n in ("numpy", "safetensors", *_OPTIONAL) if (v := _version(n))},
        },
        "host": {**host(), "system": platform.platform(), "devices": torch.cuda.device_count()},
        "contract": {
            "engine": contract.engine,
            "rank": world.rank,
            "ranks": world.size,
            "local_rank": world.local_rank,
            "local_ranks": world.local_size,
            "address": f"{contract.address}:{contract.port}" if contract.address else None,
            "token": contract.token is not None,
            "run_dir": None if contract.run_dir is None else str(contract.run_dir),
            "plan": contract.plan,
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(style="dim")
    table.add_column()
    for part, facts in found.items():
        for index, (name, value) in enumerate(facts.items()):
            shown = bytes_text(value) if name == "memory" else _shown(value)
            table.add_row("" if index else part, name.replace("_", " "), Text(shown))
    return table


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
