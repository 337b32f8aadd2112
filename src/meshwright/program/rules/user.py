"""Rules that users declare for their own ops.

    mw.rule("mylib::scan", "b s d, d -> b s d", whole="s")

says that dims b and d may be split over mesh axes, and s may not.
"""

from __future__ import annotations

import re

from meshwright.errors import PlanError, UsageError
from meshwright.program.rules.factor import OpView, Rule, RuleMaker, einsum

__all__ = ["declared", "rule"]

_DECLARED: dict[str, RuleMaker] = {}

_NAME = re.compile(r"([A-Za-z_]\w*)::([A-Za-z_]\w*)")
_LETTER = re.compile(r"[A-Za-z]\w*|1|\.\.\.")


def rule(op: str, pattern: str, *, whole: str = "", sums: str = "") -> None:
    """Declare how the dims of an op's tensors hang together, so that it runs on shards.

    Args:
        op: `namespace::name`, as it was registered with torch; all its overloads.
        pattern: per tensor operand, then per result, a letter (or word) for each dim, as in einsum
            but apart by spaces: `"b s d, d -> b s d"`. `...` stands for leading dims, `1` for a dim
            that takes no part.
        whole: letters of dims that no rank may have a part of.
        sums: letters that some result lacks, because the op adds up over them: parts give terms
            of that result. Without it such dims are whole.

    Raises:
        UsageError: the name or the pattern is malformed.
    """
    match = _NAME.fullmatch(op)
    if match is None:
        raise UsageError(f"mw.rule takes an op as 'namespace::name', not {op!r}")
    sides = pattern.split("->")
    if len(sides) != 2:
        raise UsageError(
            f"mw.rule({op!r}): pattern {pattern!r} takes the form 'b s d, d -> b s d', with one ->"
        )
    left, right = ([_spelled(op, part) for part in side.split(",")] for side in sides)
    known = {letter for part in (*left, *right) for letter in part.split()} - {"1", "..."}
    for letter in (*whole.split(), *sums.split()):
        if letter not in known:
            raise UsageError(
                f"mw.rule({op!r}): {letter!r} is no letter of {pattern!r}; it has "
                f"{', '.join(sorted(known))}"
            )
    everywhere = set.intersection(*(set(part.split()) for part in right))
    kept = {*whole.split(), *(known - everywhere - set(sums.split()))}
    if wrong := set(sums.split()) & everywhere:
        raise UsageError(
            f"mw.rule({op!r}): {min(wrong)!r} is in every result, so nothing is summed over it"
        )

    def maker(view: OpView) -> Rule:
        _require_form(op, pattern, view, left, right)
        return einsum(view, left, right[: len(view.results)], keep=" ".join(sorted(kept)))

    _DECLARED[".".join(match.groups())] = maker


def declared(base: str) -> RuleMaker | None:
    """The rule that was declared for `mylib.scan`."""
    return _DECLARED.get(base)


def _spelled(op: str, part: str) -> str:
    letters = part.split()
    for letter in letters:
        if not _LETTER.fullmatch(letter):
            raise UsageError(f"mw.rule({op!r}): {letter!r} is neither a letter, 1 nor ...")
    return " ".join(letters)


def _require_form(op: str, pattern: str, view: OpView, left: list[str], right: list[str]) -> None:
    for what, parts, values in (
        ("operands", left, view.operands),
        ("results", right, view.results),
    ):
        ranks = [len(value.shape) for value in values]
        told = [len(part.split()) for part in parts]
        fits = len(told) == len(ranks) and all(
            n == rank if "..." not in part.split() else n - 1 <= rank
            for n, rank, part in zip(told, ranks, parts, strict=True)
        )
        if not fits:
            line = view.op.source or "the loss"
            raise PlanError(
                f"mw.rule({op!r}, {pattern!r}) does not fit its use at {line}: the op has {what} "
                f"of shapes {[list(value.shape) for value in values]}"
            )
