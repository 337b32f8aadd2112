"""What optimizers check of their settings."""

from __future__ import annotations

__all__ = ["require_at_least"]


def require_at_least(least: float, **settings: float) -> None:
    """Refuse a setting below `least`.

    Raises:
        ValueError: names the first that is, as torch's optimizers do.
    """
    for name, value in settings.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}, but must be at least {least:g}")
