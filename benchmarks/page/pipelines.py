"""The table of pipelines: everyone's speed-up over one process, share of the ideal, memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks import models, reach

STAGES = ("stage 0", "stage 1")
SOLOS = ("solo", "eager solo")


def table(raw: Mapping[str, Any]) -> str:
    """In Markdown, from a group's raw numbers."""
    times: Mapping[str, list[float]] = raw["seconds"]
    rows = [
        (
            "| pipeline, 2 stages | tok/s | speed-up | of ideal | of ideal at this balance |"
            " MiB, rank by rank |"
        ),
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    even = balance(times)
    for name, seconds in times.items():
        if name in (*STAGES, "copies A", "copies B"):
            continue
        task = raw["tasks"][name]
        tokens = task["rows"] * task["ranks"] * models.SHAPES[task["model"]].context
        peaks = " / ".join(f"{peak / 2**20:.0f}" for peak in raw["rank_peak_bytes"][name])
        told = f"{tokens / statistics.median(seconds):,.0f}"
        rows.append(f"| {name} | {told} | {_shares(name, times, even)} | {peaks} |")
    said = (
        f"Ours against our own program in one process, the others against eager torch's. Stages of"
        f" four blocks each, with the embedding and with the head, run alone in eager torch: their"
        f" balance is {even:.3f}; ours are cut by cost. DeepSpeed deals layers out alike."
        if even
        else ""
    )
    return "\n".join(["## Pipelines, everyone", "", said, "", *rows])


def balance(times: Mapping[str, list[float]]) -> float | None:
    """The mean stage's time over the longest's, by rounds; None where they did not run."""
    if not all(times.get(name) for name in STAGES):
        return None
    pairs = zip(*(times[name] for name in STAGES), strict=True)
    return statistics.median(sum(pair) / 2 / max(pair) for pair in pairs)


def _shares(name: str, times: Mapping[str, list[float]], even: float | None) -> str:
    """Speed-up and shares, medians of rounds."""
    solo = "solo" if name in (*SOLOS, *reach.CUT) else "eager solo"
    if name in SOLOS or not times.get(solo):
        return " | | "
    speed_up = statistics.median(a / b for a, b in zip(times[solo], times[name], strict=True))
    share = speed_up / reach.ideal(2, reach.CUT.get(name.removeprefix("torch "), 1))
    balanced = f"{share / even:.3f}" if even else ""
    return f"{speed_up:.3f} | {share:.3f} | {balanced}"
