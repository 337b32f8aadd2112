"""The commands a report names: how to run, verify and resume what it shows."""

from __future__ import annotations

import shlex
from dataclasses import replace
from itertools import pairwise

from meshwright.errors import UsageError
from meshwright.plan.plan import Plan
from meshwright.view.runfile import Setup

__all__ = ["changed_plan", "target", "train_command", "verify_command"]

_OF_THE_JOB = ("--set", "--seed")


def target(setup: Setup) -> str:
    """`FILE` or `FILE:name`, as the command line takes it."""
    file = setup.file or "FILE"
    return file if setup.name == "job" else f"{file}:{setup.name}"


def train_command(setup: Setup, plan: str | None = None) -> str:
    """The command that trains this job; with `plan`, under that plan instead."""
    if plan is None and setup.command:
        return setup.command
    return _command("train", setup, setup.plan if plan is None else plan)


def verify_command(setup: Setup) -> str:
    """The command that proves this plan against one device."""
    return _command("verify", setup, setup.plan)


def _command(verb: str, setup: Setup, plan: str) -> str:
    words = ["mw", verb, target(setup)]
    if len(setup.ranks) > 1:
        words += ["-n", str(len(setup.ranks))]
    if plan:
        words += ["--plan", plan]
    return shlex.join(words + _settings(setup.command))


def _settings(command: str) -> list[str]:
    """The words of the run's own command that make its job what it is."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that is not closed: written by hand
        return []
    return [
        word for flag, value in pairwise(words) if flag in _OF_THE_JOB for word in (flag, value)
    ]


def changed_plan(
    setup: Setup, *, zero: int | None = None, microbatches: int | None = None
) -> str | None:
    """The text of the run's plan with a key changed, where the plan has a text form."""
    try:
        plan = Plan.parse(setup.plan)
        return replace(
            plan,
            zero=plan.zero if zero is None else zero,
            microbatches=plan.microbatches if microbatches is None else microbatches,
        ).text()
    except UsageError:
        return None
