"""Run unseen families once each, and say what traces, what falls back, what equals one device.

    python -m tests.equal.unseen tests.equal.unseen_text OUT.jsonl [FAMILY ...]

A module names its families in `UNSEEN`: name -> a function that makes the job. One JSON line each:

    {"family": .., "traces": true | "Error: ..", "fallbacks": {plan: [[op, bytes, source]]},
     "reduces": {"all_reduce forward": ..}, "verifies": {plan: worst error | "Error: .."}}

A plan that verifies has an error of 1e-10 or less.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from meshwright import Job
from meshwright.program.explain import collectives
from meshwright.program.fallback import fallbacks
from meshwright.run.form import first_micros
from tests.equal.harness import Case

FALLBACK_PLANS = ("data=2", "tensor=2")
PLANS = ("data=2", "tensor=2", "zero3,data=2,tensor=2,microbatches=3")
SECONDS = 120
"""That one question about one family may take."""


class TooLongError(Exception):
    """A question took more than its time."""


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise `TooLongError` in the body after so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(question: Callable[[], Any], seconds: int = SECONDS) -> Any:
    """The answer, or the error as text: whatever a family raises is a finding."""
    try:
        with limit(seconds):
            return question()
    except Exception as error:  # noqa: BLE001 - told, family by family
        return f"{type(error).__name__}: {error}"[:600]


def lowered(case: Case, plan: str) -> Any:
    """A plan's build and its compiled list."""
    build = case.build(plan + ",max_fallback=100000")
    return build, build.lowered(0, first_micros(build, case.data)).compiled


def traced(case: Case) -> bool:
    """Whether a micro-batch traces."""
    build = case.build("data=2")
    build.unit(first_micros(build, case.data)[0])
    return True


def fell_back(case: Case, plan: str) -> list[list[Any]]:
    """The ops without a rule: name, bytes gathered a step, source line."""
    build, compiled = lowered(case, plan)
    return [[found.op, found.bytes, found.source] for found in fallbacks(compiled, build.axes)]


def reduces(case: Case, plan: str = "tensor=2") -> dict[str, int]:
    """Collectives of a step over `tensor`, by op and phase."""
    build, compiled = lowered(case, plan)
    found: Counter[str] = Counter()
    for row in collectives(compiled, build.axes):
        found[f"{row.op} {row.phase}"] += row.count
    return dict(found)


def verified(case: Case, plan: str) -> float | str:
    """The worst error against one device of two steps; text where it is above the law."""
    report = case.verify(plan, steps=2)
    kind, worst = max(report.worst.items(), key=lambda item: item[1].error)
    if report.passed:
        return worst.error
    return f"differs: {kind} {worst.error:.1e} ({worst.tensor}, step {worst.step})"


def examine(name: str, job: Callable[[], Job]) -> dict[str, Any]:
    """All that is asked of one family."""
    began = time.monotonic()
    found: dict[str, Any] = {"family": name}
    case = answer(lambda: Case(job()))
    if isinstance(case, str):
        return {**found, "traces": case}
    found["traces"] = answer(lambda: traced(case))
    if found["traces"] is True:
        found["fallbacks"] = {p: answer(lambda p=p: fell_back(case, p)) for p in FALLBACK_PLANS}
        found["reduces"] = answer(lambda: reduces(case))
        found["verifies"] = {p: answer(lambda p=p: verified(case, p)) for p in PLANS}
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def main(module: str, out: str, *names: str) -> None:
    """Examine the families of a module, or those named, and append what was found to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    unseen = importlib.import_module(module).UNSEEN
    for name in names or unseen:
        line = json.dumps(examine(name, unseen[name]))
        with Path(out).open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
