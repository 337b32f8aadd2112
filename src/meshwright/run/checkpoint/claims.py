"""What a checkpoint says beside its tensors, where a run or an export will read it.

Any of it may be left out (another program's checkpoint says little) but what is there must be of
the kind that it is read as: a checkpoint may come from a stranger, with digests that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from meshwright.errors import StorageError

__all__ = ["check_claims", "require_claims"]

_Is = Callable[[Any], bool]


def check_claims(meta: Mapping[str, Any]) -> None:
    """Refuse what is not of its kind.

    Raises:
        StorageError: names the part and what it must be.
    """
    _check(meta, _RUN, "meta")
    _check(meta, _LOSS, "meta")
    for phase, told in (meta.get("phases") or {}).items():
        _check(told, _LOSS, f"meta.phases.{phase}")


def require_claims(meta: Mapping[str, Any]) -> None:
    """Refuse what says too little for a run to go on from it.

    Raises:
        StorageError: names what is missing.
    """
    _require(meta, ("batch_size", "seed", "data", "extra"), "meta")
    losses = meta.get("phases") or {"": meta}
    for phase, told in losses.items():
        where = f"meta.phases.{phase}" if phase else "meta"
        _require(told, ("optimizer", "scheduler"), where)
        _require(told["optimizer"] or {}, ("class", "groups", "state"), f"{where}.optimizer")
        _require_gains(told, where)
    average = meta.get("average")
    if average is not None and isinstance(average["steps"], dict) != ("phases" in meta):
        raise StorageError("meta.average counts steps of phases where there are none, or not so")


def _check(told: Mapping[str, Any], rules: Mapping[str, tuple[_Is, str]], where: str) -> None:
    for key, (is_right, what) in rules.items():
        if key in told and not is_right(told[key]):
            raise StorageError(f"{where}.{ascii(key)[1:-1]} must be {what}")


def _require(told: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        if key not in told:
            raise StorageError(f"{where} does not say {key}, which a run goes on with")


def _require_gains(told: Mapping[str, Any], where: str) -> None:
    """AdaScale keeps a mean and a variance of each of the optimizer's groups."""
    gains = told.get("adascale")
    groups = 0 if told["optimizer"] is None else len(told["optimizer"]["groups"])
    if gains is not None and not groups == len(gains["means"]) == len(gains["variances"]):
        raise StorageError(
            f"{where}.adascale keeps {len(gains['means'])} means and {len(gains['variances'])} "
            f"variances, but the optimizer has {groups} groups"
        )


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_number(n) and n >= 0 for n in value)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _table(value: Any, inner: _Is) -> bool:
    return isinstance(value, dict) and all(map(inner, value.values()))


def _group(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(settings := value.get("settings"), dict):
        return False
    rate = settings.get("lr", 0.0)  # a tensor is an object here
    return _names(value.get("parameters")) and (_number(rate) or isinstance(rate, dict))


def _optimizer(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and isinstance(value.get("class", ""), str | None)
        and isinstance(value.get("groups", []), list)
        and all(map(_group, value.get("groups", [])))
        and _table(value.get("slots", {}), _count)
        and _table(value.get("state", {}), lambda inner: isinstance(inner, dict))
    )


def _scaling(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and _number(value.get("scale"))
        and value["scale"] > 0
        and _count(value.get("steps"))
        and _count(value.get("skipped"))
    )


def _gains(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and _count(value.get("scale"))
        and value["scale"] > 0
        and _numbers(value.get("means"))
        and _numbers(value.get("variances"))
        and _numbers([value.get("weight"), value.get("iterations")])
    )


def _average(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and _number(value.get("decay"))
        and (_count(value.get("steps")) or _table(value.get("steps"), _count))
    )


def _data(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and isinstance(value.get("kind"), str)
        and (value["kind"] != "map" or _count(value.get("length")))
    )


_RUN: Final[Mapping[str, tuple[_Is, str]]] = {
    "phases": (lambda v: _table(v, lambda inner: isinstance(inner, dict)), "an object of objects"),
    "tied": (lambda v: _table(v, lambda name: isinstance(name, str)), "names by names"),
    "transient": (_names, "a list of names"),
    "extra": (lambda v: isinstance(v, dict), "an object"),
    "data": (_data, "null, or an object with a kind"),
    "average": (_average, "null, or a decay and the steps it counted"),
}

_LOSS: Final[Mapping[str, tuple[_Is, str]]] = {
    "optimizer": (_optimizer, "a class, groups of parameters with settings, and their state"),
    "scheduler": (lambda v: v is None or isinstance(v, dict), "null or an object"),
    "scaling": (_scaling, "null, or a scale above 0 and the steps it counted"),
    "adascale": (_gains, "null, or a scale above 0, means, variances, a weight and iterations"),
}
