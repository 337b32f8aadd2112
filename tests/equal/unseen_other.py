"""Vision, audio, multimodal and diffusion families that the rules were not developed against.

The list was committed before any of them was run.
"""

from __future__ import annotations

from collections.abc import Sequence

NAMES: Sequence[str] = (
    "swinv2", "convnextv2", "levit", "poolformer", "mobilevit", "bit", "focalnet", "hiera", "dpt",
    "detr", "vit_mae", "videomae", "wavlm", "speech_to_text", "ast", "siglip", "blip", "llava",
    "patchtst", "trocr", "diffusion", "wavenet", "tagger", "graph",
)  # fmt: skip

__all__ = ["NAMES"]
