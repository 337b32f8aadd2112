"""How fast a run goes and how long it will still take, from the steps seen so far. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Pace"]

# The weight of the newest step in the running mean, so that some ten steps count.
_NEW = 0.1


@dataclass(frozen=True, slots=True)
class Pace:
    """A running mean over about the last ten steps: seconds and samples of a step.

    The first step also traces and warms up, so it says nothing of the others.
    """

    steps: int = 0
    seconds: float = 0.0
    samples: float = 0.0

    def after(self, seconds: float, samples: float) -> Pace:
        """The pace after one more step of `seconds` that took in `samples`."""
        new = 1.0 if self.steps < 2 else _NEW
        return Pace(
            self.steps + 1,
            self.seconds + new * (seconds - self.seconds),
            self.samples + new * (samples - self.samples),
        )

    @property
    def samples_per_second(self) -> float | None:
        """Samples a second, or None before two steps were timed."""
        return self.samples / self.seconds if self._known else None

    def left(self, steps: int) -> float | None:
        """The seconds that `steps` more steps will take, or None before two steps were timed."""
        return self.seconds * max(0, steps) if self._known else None

    @property
    def _known(self) -> bool:
        return self.steps > 1 and self.seconds > 0
