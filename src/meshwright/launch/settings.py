"""`--set key=value`: a function's parameters from text, converted by their annotations."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from meshwright.errors import UsageError, nearest

__all__ = ["converted"]

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NONE = ("none", "")


def converted(function: Callable[..., Any], given: Mapping[str, str], what: str) -> dict[str, Any]:
    """Keyword arguments for `function`, from texts by name.

    Args:
        function: whose annotations say what the texts mean; without one, its default's type does.
        given: text by parameter name.
        what: the function, in messages.

    Raises:
        UsageError: an unknown name, a text that does not convert, a parameter without a value.
    """
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {
        name: p
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    for key in given:
        if key not in named and not open_ended:
            hint = nearest(key, list(named)) if named else "it takes no --set keys"
            raise UsageError(f"--set {key}={given[key]}: {what} has no parameter {key!r}; {hint}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in given:
            raise UsageError(f"{what} needs a value for {name!r}; give `--set {name}=...`")
    hints = _hints(function)
    return {
        key: _value(key, text, _kind(named[key], hints)) if key in named else text
        for key, text in given.items()
    }


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations; none where they name what cannot be found."""
    try:
        return get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}


def _kind(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Any:
    if parameter.name in hints:
        return hints[parameter.name]
    default = parameter.default
    return str if default is parameter.empty or default is None else type(default)


def _value(key: str, text: str, kind: Any) -> Any:
    """`text` as a value of the annotation `kind`."""
    if kind is bool:
        return _one_of(key, text, {**dict.fromkeys(_YES, True), **dict.fromkeys(_NO, False)})
    if kind in (int, float):
        return _number(key, text, kind)
    if kind in (str, Any):
        return text
    if kind is Path:
        return Path(text)
    if get_origin(kind) is Literal:
        return _one_of(key, text, {str(choice).lower(): choice for choice in get_args(kind)})
    if get_origin(kind) in (Union, types.UnionType):
        return _either(key, text, get_args(kind))
    raise UsageError(
        f"--set {key}={text}: {key} is a {kind}, which has no text form; use int, float, bool, "
        "str, Path, Literal or an Optional of these"
    )


def _number(key: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        takes = "a whole number" if kind is int else "a number"
        raise UsageError(f"--set {key}={text}: {key} takes {takes}, not {text!r}") from None


def _one_of(key: str, text: str, choices: Mapping[str, Any]) -> Any:
    if text.lower() not in choices:
        hint = nearest(text.lower(), list(choices))
        raise UsageError(f"--set {key}={text}: {key} takes one of a few words; {hint}")
    return choices[text.lower()]


def _either(key: str, text: str, kinds: tuple[Any, ...]) -> Any:
    """The first of several annotations that `text` fits; None is written `none`."""
    if type(None) in kinds and text.lower() in _NONE:
        return None
    problems = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return _value(key, text, kind)
            except UsageError as error:
                problems.append(error)
    raise problems[0]
