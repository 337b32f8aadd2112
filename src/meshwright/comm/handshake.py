"""Before the first step all ranks compare what must be equal: versions, program, plan, seed.

Different code on two ranks gives wrong numbers rather than an error, so it is refused here, naming
who differs in what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshwright.comm.base import Exchange, Group, gather_json
from meshwright.errors import UsageError

__all__ = ["agree", "differences"]

_SHOWN = 60


def agree(facts: Mapping[str, str], group: Group) -> Exchange:
    """Compare `facts` (name -> value) over the members of `group`.

    Raises:
        UsageError: on every member alike, naming which ranks have which value of which fact.
    """
    if len(group.ranks) == 1:
        return
    everyone = yield from gather_json(dict(facts), group, label="handshake")
    problems = differences(everyone, group.ranks)
    if problems:
        raise UsageError(
            "ranks differ, so they would not compute the same thing: "
            + "; ".join(problems)
            + "; start every rank with the same code, plan and versions"
        )


def differences(everyone: Sequence[Mapping[str, str]], ranks: Sequence[int]) -> tuple[str, ...]:
    """One text per fact whose value is not the same on all `ranks`; `everyone` is in their order.

    As in `plan is 'data=2' on ranks 0, 1 and 'zero3' on rank 2`.
    """
    names = sorted({name for facts in everyone for name in facts})
    problems = []
    for name in names:
        holders: dict[str | None, list[int]] = {}
        for rank, facts in zip(ranks, everyone, strict=True):
            holders.setdefault(facts.get(name), []).append(rank)
        if len(holders) > 1:
            parts = (f"{_shown(value)} on {_who(who)}" for value, who in holders.items())
            problems.append(f"{name} is " + " and ".join(parts))
    return tuple(problems)


def _shown(value: str | None) -> str:
    if value is None:
        return "not given"
    return repr(value if len(value) <= _SHOWN else value[: _SHOWN - 3] + "...")


def _who(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
