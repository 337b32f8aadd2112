"""Which saved tensor fills which of the model's: pure functions of names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshwright.errors import StorageError, nearest

__all__ = ["Match", "compare"]

_SHOWN = 5  # names of each kind in a message
_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Match:
    """How a model is filled.

    Attributes:
        sources: the model's name -> the name in the weights.
        fresh: names of the model that the weights lack, initialised from the seed.
        unused: names in the weights that the model lacks.
        notes: what the user should be told.
    """

    sources: Mapping[str, str]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def compare(
    weights: _Shapes, model: _Shapes, tied: Mapping[str, str] | None = None, *, where: str
) -> Match:
    """Match saved names to the model's, and refuse what is likely a mistake.

    A whole module that the weights lack (a new head) is initialised from the seed, and a whole
    module that the model lacks is left out; both are told in `notes`. What is refused: no name in
    common, another shape, a module that is filled in part, and another number of layers. One prefix
    (`transformer.`) on all names of one side is seen through.

    Args:
        weights: saved name -> shape.
        model: name -> shape of the parameters and buffers to fill.
        tied: another name of a tensor -> the one in `model` (`lm_head.weight` -> `wte.weight`).
        where: what to call the weights in an error.

    Raises:
        StorageError: with all problems at once.
    """
    tied = tied or {}
    saved, prefix_note = _aligned(weights, model, tied)
    sources = _sources(saved, model, tied)
    used = set(sources.values())
    fresh = tuple(name for name in model if name not in sources)
    unused = tuple(
        own for name, own in saved.items() if own not in used and tied.get(name) not in sources
    )
    renamed = {own: name for name, own in saved.items()}
    problems = [
        *_shape_problems(weights, model, sources),
        *_missing_problems(fresh, list(saved), sources, tied),
        *_extra_problems([renamed[own] for own in unused], list(model)),
    ]
    if problems:
        raise StorageError(
            f"{where} does not fit the model: " + "; ".join(problems)
            + "; change the model or name other weights"
        )  # fmt: skip
    notes = [*prefix_note, *_notes(where, fresh, unused)]
    return Match(sources, fresh, unused, tuple(notes))


def _sources(saved: Mapping[str, str], model: _Shapes, tied: Mapping[str, str]) -> dict[str, str]:
    """The model's name -> the name in the weights; a tied tensor may be saved by any name."""
    found = {kept: saved[other] for other, kept in tied.items() if other in saved and kept in model}
    found.update({name: saved[name] for name in model if name in saved})
    return {name: found[name] for name in model if name in found}


def _aligned(
    weights: _Shapes, model: _Shapes, tied: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Saved names as the model would say them -> as they are, under the best single prefix."""
    known = {*model, *tied}
    plain = {name: name for name in weights}
    prefixes = sorted({name.partition(".")[0] + "." for name in (*known, *weights) if "." in name})
    best, note = plain, list[str]()
    for prefix in prefixes:
        changes: tuple[tuple[str, Callable[[str], str]], ...] = (
            ("with", lambda name, p=prefix: name if name in known else p + name),  # type: ignore[misc]
            ("without", lambda name, p=prefix: name if name in known else name.removeprefix(p)),  # type: ignore[misc]
        )
        for word, change in changes:
            named = {change(name): name for name in weights}
            if len(named) == len(weights) and len(known & set(named)) > len(known & set(best)):
                best, note = named, [f"the weights' names are read {word} the prefix {prefix!r}"]
    return best, note


def _shape_problems(weights: _Shapes, model: _Shapes, sources: Mapping[str, str]) -> list[str]:
    wrong = [
        f"{name} has shape {model[name]} in the model but {weights[own]} in the weights"
        for name, own in sources.items()
        if model[name] != weights[own]
    ]
    return [_some(wrong)] if wrong else []


def _missing_problems(
    fresh: tuple[str, ...], saved: list[str], sources: Mapping[str, str], tied: Mapping[str, str]
) -> list[str]:
    modules, layers = {name.rpartition(".")[0] for name in saved}, _layers(saved)
    wrong = [
        name
        for name in fresh
        if not sources or name.rpartition(".")[0] in modules or _other_layer(name, layers)
    ]
    if not wrong:
        return []
    hint = f" ({nearest(wrong[0], saved)})" if saved else ""
    others = [f"{other} is tied to {kept}" for other, kept in tied.items() if kept in wrong]
    either = f" ({', '.join(others)}: either name will do)" if others else ""
    return [f"the weights lack {_some(wrong)}{hint}{either}"]


def _extra_problems(extra: list[str], model: list[str]) -> list[str]:
    layers = _layers(model)
    wrong = [name for name in extra if _other_layer(name, layers)]
    return [f"the model has no {_some(wrong)}"] if wrong else []


def _layers(names: list[str]) -> dict[str, set[str]]:
    """Where layers are numbered: `blocks.` -> {"0", "1", ...}."""
    found: dict[str, set[str]] = {}
    for name in names:
        for stem, number in _numbered(name):
            found.setdefault(stem, set()).add(number)
    return found


def _numbered(name: str) -> list[tuple[str, str]]:
    parts = name.split(".")
    return [(".".join(parts[:at]), part) for at, part in enumerate(parts) if part.isdecimal()]


def _other_layer(name: str, layers: Mapping[str, set[str]]) -> bool:
    """Whether `name` is in a numbered layer that is not there, though others of its list are."""
    return any(stem in layers and number not in layers[stem] for stem, number in _numbered(name))


def _notes(where: str, fresh: tuple[str, ...], unused: tuple[str, ...]) -> list[str]:
    notes = []
    if fresh:
        notes.append(f"{where} has no {_some(list(fresh))}: initialised from the job's seed")
    if unused:
        notes.append(f"{where} has {_some(list(unused))}, which the model does not use")
    return notes


def _some(items: list[str]) -> str:
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
