"""The table of the ladder: every rung of both sides, what it held and how fast it went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {"ours": "ours", "deepspeed": "DeepSpeed"}


def table(raw: Mapping[str, Any]) -> str:
    """In Markdown, from the part's raw numbers."""
    memory, beside = (raw[key] / 2**30 for key in ("memory_bytes", "host_bytes"))
    rows = [
        f"In {memory:g} GiB a rank, and {beside:.3g} GiB of the host's beside it:",
        "",
        (
            "| rung | | width | parameters | tok/s | MiB of its own | beside, both ranks |"
            " on disk | a larger one lacks |"
        ),
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for number, first in enumerate(raw["sides"]["ours"]):
        for side, rungs in raw["sides"].items():
            rows.append(f"| {first['what']} | {NAMES[side]} {_cells(rungs[number])} |")
    return "\n".join(rows)


def _cells(rung: Mapping[str, Any]) -> str:
    why = rung["reason"].replace("|", "/")[:120]
    if not rung["parameters"]:
        return f"| | | | | | | did not run: {why}"
    held = rung["held"]
    sizes = " | ".join(f"{held[key] / 2**20:,.0f}" for key in ("private", "shared", "disk"))
    return (
        f"| {rung['width']} | {rung['parameters'] / 1e6:.0f} M | {rung['speed']:,.0f} | {sizes} |"
        f" {why}"
    )
