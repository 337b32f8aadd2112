"""What a run computes again instead of saving it, as a line of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshwright.view.fields import finite, integer, mapping, text
from meshwright.view.units import bytes_text, count_text, percent_text

__all__ = ["remat_line"]


def remat_line(run: Mapping[str, Any]) -> str:
    """`remat=full saves 1 MiB of 9 MiB ...` of a decoded `run.json`; nothing without it.

    All of it is of one micro-batch, over the ranks that share it.
    """
    told = mapping(run.get("remat"))
    if not told:
        return ""
    saved, whole = (bytes_text(integer(told.get(key))) for key in ("bytes", "all_bytes"))
    ops, every = (count_text(integer(told.get(key))) for key in ("ops", "of_ops"))
    work = (finite(told.get("flops")) or 0.0) / (finite(told.get("of_flops")) or 1.0)
    return (
        f"remat={text(told.get('policy'))}: a micro-batch saves {saved} for its backward instead "
        f"of {whole}, and computes {ops} of {every} forward ops again, "
        f"{percent_text(work)} more flops"
    )
