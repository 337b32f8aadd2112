"""`mw deepspeed`: what a DeepSpeed configuration means here, and what of it is left out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from meshwright.cli.output import print_json, show
from meshwright.cli.told import Task
from meshwright.cli.words import AsJson

__all__ = ["EXAMPLE", "deepspeed"]

EXAMPLE = "Example:  mw deepspeed ds_config.json -n 8"


def deepspeed(
    config: Annotated[Path, typer.Argument(help="A DeepSpeed JSON configuration.")],
    *,
    n: Annotated[int, typer.Option("-n", min=1, metavar="N", help="How many ranks.")] = 1,
    json: AsJson = False,
) -> Task:
    """Show the plan that CONFIG stands for, and what is left out and why."""
    return partial(_deepspeed, config, n, json)


def _deepspeed(config: Path, n: int, json: bool) -> int:
    from meshwright.compat.deepspeed.config import Settings, settings

    def told(found: Settings) -> dict[str, Any]:
        return {
            "plan": found.plan.text(),
            "batch_size": found.batch_size,
            "samples per micro-batch and rank": found.micro,
            "optimizer": found.optimizer,
            "schedule": found.schedule,
            "clip_norm": found.clip_norm,
            "loss_scale": None if found.loss_scale is None else found.loss_scale.initial,
            "offload folder": None if found.folder is None else str(found.folder),
        }

    found = settings(config, n)
    left = [{"key": one.key, "value": one.value, "why": one.why} for one in found.left]
    if json:
        print_json({**told(found), "left_out": left})
        return 0
    rows = Table(show_header=False, box=None, pad_edge=False)
    for name, value in told(found).items():
        if value is not None:
            rows.add_row(Text(name), Text(_said(value)))
    table = Table("left out", "why", box=None, pad_edge=False)
    for one in found.left:
        table.add_row(Text(one.key), Text(one.why))
    show(Group(rows, Text(), table) if left else rows)
    return 0


def _said(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    kind, params = value
    return f"{kind}({', '.join(f'{key}={setting}' for key, setting in params.items())})"
