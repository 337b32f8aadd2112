"""What a plan's `offload` may say: which parts of a rank's memory rest where."""

from __future__ import annotations

from typing import Final, Literal, get_args

from meshwright.errors import UsageError, nearest

__all__ = ["PARTS", "TIERS", "Part", "Tier", "offloads"]

Part = Literal["optimizer", "gradients", "params", "activations"]
Tier = Literal["host", "disk"]

PARTS: Final = get_args(Part)
TIERS: Final = get_args(Tier)


def offloads(text: str) -> dict[Part, Tier]:
    """The tier of each part that `offload=text` names.

    Args:
        text: `none`, `host`, `disk` (all parts there), or `part[:tier]` joined by `+`.

    Raises:
        UsageError: an unknown part or tier, or a part twice.
    """
    if text == "none":
        return {}
    if text in TIERS:
        return dict.fromkeys(PARTS, text)  # type: ignore[arg-type]  # one of them
    found: dict[Part, Tier] = {}
    for item in text.split("+"):
        part, colon, tier = item.partition(":")
        if part not in PARTS:
            raise UsageError(_unknown(part))
        if colon and tier not in TIERS:
            raise UsageError(f"{part} can rest in host or disk, not in {tier!r}")
        if part in found:
            raise UsageError(f"it names {part} twice; keep one of them")
        found[part] = tier if colon else "host"  # type: ignore[index,assignment]
    return found


def _unknown(part: str) -> str:
    if part in ("none", *TIERS):
        return f"{part} stands alone; write offload={part}, or name parts: {', '.join(PARTS)}"
    return f"there is no part {part!r}; {nearest(part, PARTS)}"
