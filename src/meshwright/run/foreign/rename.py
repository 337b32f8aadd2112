"""Names changed on the way: `old.*=new.*`, and how what is there differs from what is wanted. Pure.

A pattern is of the model's own names, and then weights, buffers and optimizer state move together;
one that begins with `model/`, `buffer/` or `optimizer/` is of those alone. `*` stands for any text,
and each one on the left goes to its place on the right; nothing on the right leaves a tensor out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from meshwright.errors import UsageError, nearest
from meshwright.run.checkpoint.region import Region
from meshwright.run.foreign.source import Source, bare, kind, shown

__all__ = ["Renamed", "Rule", "new_name", "parse_rules", "renamed"]

_KINDS: Final = ("model/", "buffer/", "optimizer/", "ema/")


@dataclass(frozen=True, slots=True)
class Rule:
    """`old=new`, both with `*` in them."""

    old: str
    new: str

    @property
    def text(self) -> str:
        """As it was given."""
        return f"{self.old}={self.new}"


@dataclass(frozen=True, slots=True)
class Renamed:
    """A source under new names.

    Attributes:
        source: what is left of it.
        names: old global name -> new one, of those that changed.
        dropped: global names that are left out.
    """

    source: Source
    names: Mapping[str, str]
    dropped: tuple[str, ...]


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """Rules as they are typed.

    Raises:
        UsageError: one is no `old=new`, or its right side has a `*` that its left side lacks.
    """
    rules = []
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or not old or "=" in new:
            raise UsageError(f"--map {text!r} must be OLD=NEW, such as 'encoder.*=model.encoder.*'")
        if new and new.count("*") != old.count("*"):
            raise UsageError(
                f"--map {text!r} has {old.count('*')} * on the left and {new.count('*')} on the "
                "right; each * on the right takes what the one on the left stands for"
            )
        if old.startswith(_KINDS) and new and not new.startswith(_KINDS):
            raise UsageError(f"--map {text!r}: {new!r} must begin with one of {', '.join(_KINDS)}")
        rules.append(Rule(old, new))
    return tuple(rules)


def new_name(name: str, rules: Sequence[Rule]) -> tuple[str | None, Rule | None]:
    """The global name under the first rule that matches, None if that leaves it out; the rule."""
    own = bare(name)
    for rule in rules:
        full = rule.old.startswith(_KINDS)
        match = _pattern(rule.old).fullmatch(name if full else own)
        if match is None:
            continue
        if not rule.new:
            return None, rule
        parts = rule.new.split("*")
        text = parts[0] + "".join(a + b for a, b in zip(match.groups(), parts[1:], strict=True))
        return (text if full else name[: len(name) - len(own)] + text), rule
    return name, None


def _pattern(old: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(map(re.escape, old.split("*"))), re.DOTALL)


def renamed(source: Source, rules: Sequence[Rule]) -> Renamed:
    """The source under the names that `rules` make.

    Raises:
        UsageError: a rule matches nothing, or two tensors get one name.
    """
    if not rules:
        return Renamed(source, {}, ())
    if phases := (source.meta or {}).get("phases"):
        raise UsageError(
            f"{source.path} holds the optimizers of phases {', '.join(phases)}, which --map does "
            "not rename; write --to safetensors first, and rename the weights"
        )
    old_names: dict[str, str] = {}
    dropped, used = [], set[Rule]()
    for name in source.items:
        new, rule = new_name(name, rules)
        if rule is not None:
            used.add(rule)
        if new is None:
            dropped.append(name)
        elif new in old_names:
            raise UsageError(
                f"--map gives {shown(old_names[new])} and {shown(name)} one name, {shown(new)}"
            )
        else:
            old_names[new] = name
    for rule in rules:
        if rule not in used:
            raise UsageError(f"--map {rule.text!r} matches nothing; {_hint(rule, source)}")
    changed = {old: new for new, old in old_names.items() if old != new}
    items = {new: source.items[old] for new, old in old_names.items()}

    def boxes(name: str) -> Iterator[tuple[Region, Tensor]]:
        return source.boxes(old_names[name])

    meta = None if source.meta is None else _meta(source.meta, changed, dropped)
    moved = replace(source, items=items, boxes=boxes, meta=meta)
    return Renamed(moved, changed, tuple(dropped))


def _hint(rule: Rule, source: Source) -> str:
    names = list(source.items)
    known = names if rule.old.startswith(_KINDS) else sorted({bare(name) for name in names})
    return shown(nearest(rule.old.replace("*", ""), known)[:400])


def _meta(
    meta: Mapping[str, Any], changed: Mapping[str, str], dropped: Sequence[str]
) -> dict[str, Any]:
    """What a checkpoint says of parameters, under their new names."""
    names = {bare(old): bare(new) for old, new in changed.items() if kind(old) == "model"}
    gone = {bare(name) for name in dropped if kind(name) == "model"}
    told = dict(meta)
    optimizer = dict(meta.get("optimizer") or {})
    optimizer["groups"] = [
        {**group, "parameters": [names.get(n, n) for n in group["parameters"] if n not in gone]}
        for group in optimizer.get("groups", [])
    ]
    state = optimizer.get("state", {})
    optimizer["state"] = {names.get(n, n): value for n, value in state.items() if n not in gone}
    tied = meta.get("tied", {})
    told["tied"] = {other: names.get(n, n) for other, n in tied.items() if n not in gone}
    told["optimizer"] = optimizer
    return told
