"""Plans as TOML, which also writes `layouts`, `precisions`, `cuts`, `actions`; plans of any text.

data = 2
zero = 3
cuts = ["blocks.4"]

[layouts]
"blocks.*.attention.weight" = ["tensor", "none"]

[precisions]
"*norm*" = "float32"
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import Any, Final, Literal

from meshwright.errors import PlanError, UsageError, nearest
from meshwright.plan.plan import KEYS, Plan, from_values

__all__ = ["AUTO", "from_toml", "parse_plan", "to_toml"]

AUTO: Final = "auto"
_LISTS: Final = ("cuts", "actions")
_NO_AXIS: Final = "none"  # TOML has no null


def to_toml(plan: Plan) -> str:
    """TOML text that `from_toml` reads back as an equal plan; defaults are left out."""
    default = Plan()
    lines = [
        f"{key} = {_literal(plan.value(key))}"
        for key in KEYS
        if plan.value(key) != default.value(key)
    ]
    if plan.cuts:
        lines.append(f"cuts = {_literal(plan.cuts)}")
    if plan.actions:
        lines.append(f"actions = {_literal(plan.actions)}")
    if plan.layouts:
        lines += ["", "[layouts]"]
    for pattern, dims in plan.layouts:
        axes = tuple(_NO_AXIS if axis is None else axis for axis in dims)
        lines.append(f"{_literal(pattern)} = {_literal(axes)}")
    if plan.precisions:
        lines += ["", "[precisions]"]
    lines += [f"{_literal(pattern)} = {_literal(name)}" for pattern, name in plan.precisions]
    return "\n".join(lines) + "\n"


def from_toml(text: str, name: str = "plan") -> Plan:
    """The plan that TOML `text` describes; `name` says where it came from in errors.

    Raises:
        UsageError: not TOML (a key twice included), an unknown key, a value of the wrong kind.
    """
    values = _loaded(text, name)
    known = (*KEYS, "layouts", "precisions", *_LISTS)
    for key in values:
        if key not in known:
            raise UsageError(f"{name} has an unknown key {key!r}; {nearest(key, known)}")
    for key in _LISTS:
        if key in values:
            values[key] = _names(key, values[key], name)
    if "layouts" in values:
        values["layouts"] = _layouts(values["layouts"], name)
    if "precisions" in values:
        values["precisions"] = _precisions(values["precisions"], name)
    try:
        return from_values(values)
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from None


def parse_plan(text: str, read: Callable[[str], str]) -> Plan | Literal["auto"]:
    """The plan that a user's `text` names: `auto`, `[preset,]key=value,...` or a `.toml` file.

    Args:
        text: what the user wrote.
        read: answers a file's text (`lambda path: Path(path).read_text()`), for this room
            touches no disk.

    Raises:
        UsageError: the text, or the file it names, is no plan.
    """
    text = text.strip()
    if text == AUTO:
        return AUTO
    if not text.endswith(".toml"):
        return Plan.parse(text)
    try:
        content = read(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"plan file {text} cannot be read: {reason}") from error
    return from_toml(content, f"plan file {text}")


def _loaded(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise UsageError(f"{name} is not TOML: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{name} is not a plan: its values are nested too deep") from error


def _names(key: str, value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise UsageError(f"{name}: {key} takes a list of names, not {value!r}")
    return tuple(value)


def _layouts(value: object, name: str) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    if not isinstance(value, dict):
        raise UsageError(f"{name}: layouts takes a table of name pattern = [axes], not {value!r}")
    return tuple(
        (
            pattern,
            tuple(
                None if axis == _NO_AXIS else axis
                for axis in _names(f"layout {pattern!r}", dims, name)
            ),
        )
        for pattern, dims in value.items()
    )


def _precisions(value: object, name: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise UsageError(
            f"{name}: precisions takes a table of module pattern = precision, not {value!r}"
        )
    return tuple(value.items())


def _literal(value: object) -> str:
    """`value` as TOML; for printable strings, whole numbers and lists, JSON's form is TOML's."""
    return json.dumps(value, ensure_ascii=False)
