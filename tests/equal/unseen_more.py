"""A second list of unseen families, chosen when the first had been run and before this one was."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["NAMES"]

NAMES: Sequence[str] = (
    "pvt", "cvt", "timesformer", "vivit", "glpn", "sew", "git", "pix2struct", "layoutlmv3", "sam",
    "owlvit", "qwen2_vl", "paligemma", "time_series", "decision", "clap", "efficientnet",
    "swin2sr", "encodec", "speecht5",
)  # fmt: skip
