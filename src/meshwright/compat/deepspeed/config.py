"""A DeepSpeed configuration as a plan, the rest of a job, and a list of what is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshwright.compat.deepspeed.keys import LEFT, READ, SECTIONS
from meshwright.errors import UsageError, nearest
from meshwright.job import LossScale
from meshwright.plan.plan import Plan

__all__ = ["LeftOut", "Settings", "load", "read", "settings"]

_MISSING = object()
_BATCH, _MICRO, _PARTS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
)  # fmt: skip
_TIERS = {"cpu": "host", "nvme": "disk", "none": None}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A key that nothing is done with, and why."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration asks for.

    Attributes:
        plan: how the job is laid out.
        batch_size: samples per step over all ranks.
        micro: samples per rank and micro-batch.
        clip_norm: the largest norm of the gradients.
        loss_scale: under fp16.
        optimizer: (type, params), where one is named.
        schedule: (type, params), where one is named.
        folder: where what is offloaded to disk goes.
        drop_last: leave an epoch's last, short batch out.
        left: what is left out.
    """

    plan: Plan
    batch_size: int
    micro: int
    clip_norm: float | None = None
    loss_scale: LossScale | None = None
    optimizer: tuple[str, dict[str, Any]] | None = None
    schedule: tuple[str, dict[str, Any]] | None = None
    folder: Path | None = None
    drop_last: bool = False
    left: tuple[LeftOut, ...] = field(default=())


def load(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A configuration as a dict: it may be one, or the path of a JSON file.

    Raises:
        UsageError: there is no such file, it is no JSON object, or names a key twice.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, str | Path):
        raise UsageError(
            f"the DeepSpeed config is a {type(source).__name__}, but must be a dict or the path of "
            "a JSON file"
        )
    try:
        text = Path(source).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the DeepSpeed config {source} cannot be read: {error}; give the path of a JSON file"
        ) from None
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{source}:{error.lineno}:{error.colno}: this is no JSON ({error.msg}); correct it"
        ) from None
    except RecursionError:
        raise UsageError(f"{source} is nested too deep; a config has three levels") from None
    if not isinstance(found, dict):
        raise UsageError(
            f"{source} holds a {type(found).__name__}, but must hold an object {{...}}"
        )
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UsageError(f"the DeepSpeed config names {key!r} twice; keep one of them")
        found[key] = value
    return found


def settings(source: Mapping[str, Any] | str | Path, world: int) -> Settings:
    """What a configuration asks for in a world of so many ranks; as of `load` and `read`."""
    return read(load(source), world)


def read(config: Mapping[str, Any], world: int) -> Settings:
    """What a configuration asks for.

    Args:
        config: as DeepSpeed's `ds_config.json` has it.
        world: ranks there are.

    Raises:
        UsageError: a key is unknown, of a wrong type, or contradicts another.
    """
    flat = dict(_flat(config))
    left = tuple(_left_out(flat))
    keys = _Keys({key: value for key, value in flat.items() if key in READ})
    tensor = keys.count("tensor_parallel.autotp_size", 1) or 1
    if world % tensor:
        raise UsageError(
            f"tensor_parallel.autotp_size={tensor} does not divide the {world} ranks; "
            f"start {-(-world // tensor) * tensor} of them"
        )
    micro, parts, batch = _batches(keys, world // tensor)
    offload, folder = _offload(keys)
    precision, loss_scale = _precision(keys)
    words = {"remat": "marks" if "activation_checkpointing" in config else None}
    words |= {"precision": precision, "offload": offload}
    plan = Plan(
        data=world // tensor,
        tensor=tensor,
        zero=_stage(keys),
        shard=keys.count("zero_optimization.mics_shard_size", None, least=-1),
        microbatches=parts,
        **{key: value for key, value in words.items() if value is not None},  # type: ignore[arg-type]
    )
    return Settings(
        plan,
        batch,
        micro,
        _clip(keys),
        loss_scale,
        _named(keys, "optimizer"),
        _named(keys, "scheduler"),
        folder,
        keys.flag("dataloader_drop_last"),
        left,
    )


def _flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Keys as `a.b`: sections that are read are opened, all others are values."""
    for key, value in config.items():
        if not isinstance(key, str):
            raise UsageError(f"the DeepSpeed config has a key {key!r}, but keys are text")
        name = f"{above}{key}"
        if name in SECTIONS:
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"{name} is {json.dumps(value, default=str)}, but must be an object {{...}}"
                )
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _left_out(flat: Mapping[str, Any]) -> Iterator[LeftOut]:
    """What is left out, and why.

    Raises:
        UsageError: DeepSpeed does not know a key; names all such.
    """
    unknown: list[str] = []
    for key, value in flat.items():
        if key in READ:
            continue
        if key.rpartition(".")[2].startswith("_"):
            yield LeftOut(key, value, "keys that begin with _ are comments")
        elif key in LEFT:
            yield LeftOut(key, value, LEFT[key])
        else:
            section = key.rpartition(".")[0]
            known = tuple(k for k in (*READ, *LEFT, *SECTIONS) if k.rpartition(".")[0] == section)
            unknown.append(
                f"the DeepSpeed config has {key!r}, which DeepSpeed does not know either; "
                f"{nearest(key, known)}"
            )
    if len(unknown) > 1:
        raise UsageError("\n  - ".join((f"{len(unknown)} keys are unknown:", *unknown)))
    if unknown:
        raise UsageError(*unknown)


class _Keys:
    """Values by key, their types checked as they are read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def of(self, key: str) -> Any:
        """A value; `_MISSING` where there is none, or none yet (`"auto"`)."""
        found = self.values.get(key, _MISSING)
        if found != "auto":
            return found
        if key in (_BATCH, _MICRO, _PARTS):
            return _MISSING
        raise UsageError(
            f'{key} is "auto", which only Hugging Face\'s Trainer fills in; put the value there'
        )

    def flag(self, key: str) -> bool:
        """True or false."""
        found = self.of(key)
        if found is _MISSING:
            return False
        if not isinstance(found, bool):
            raise UsageError(f"{key} is {found!r}, but must be true or false")
        return found

    def count(self, key: str, default: int | None = None, least: int = 1) -> int | None:
        """A whole number."""
        found = self.of(key)
        if found is _MISSING or (found == least and least < 0):
            return default
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        if isinstance(found, bool) or not isinstance(found, int) or found < max(least, 0):
            raise UsageError(
                f"{key} is {found!r}, but must be a whole number, {max(least, 0)} or more"
            )
        return found

    def number(self, key: str, default: float) -> float:
        """0 or more."""
        found = self.of(key)
        if found is _MISSING:
            return default
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 1e38:
            raise UsageError(f"{key} is {found!r}, but must be a number, 0 or more")
        return float(found)

    def word(self, key: str, allowed: tuple[str, ...]) -> str | None:
        """One of some words."""
        found = self.of(key)
        if found is _MISSING or found is None:
            return None
        if found not in allowed:
            told = (
                nearest(found, allowed)
                if isinstance(found, str)
                else "known: " + ", ".join(allowed)
            )
            raise UsageError(f"{key} is {found!r}; {told}")
        return str(found)


def _batches(keys: _Keys, copies: int) -> tuple[int, int, int]:
    """(micro, accumulation, batch): any two, or one of the sizes, say the rest."""
    micro, parts, batch = (keys.count(key) for key in (_MICRO, _PARTS, _BATCH))
    if micro is None and batch is None:
        raise UsageError(
            f"the DeepSpeed config says neither {_BATCH} nor {_MICRO}; give one of them a number"
        )
    if micro is None and batch is not None:
        micro = max(1, batch // ((parts or 1) * copies))
    assert micro is not None
    if parts is None:
        parts = 1 if batch is None else max(1, batch // (micro * copies))
    whole = micro * parts * copies
    if batch is not None and batch != whole:
        raise UsageError(
            f"{_BATCH}={batch}, but {_MICRO}={micro} x {_PARTS}={parts} x {copies} ranks that "
            f"share batches = {whole}; use {_BATCH}={whole}, or leave one of the three out"
        )
    return micro, parts, whole


def _stage(keys: _Keys) -> int:
    stage = keys.count("zero_optimization.stage", 0, least=0) or 0
    if stage > 3:
        raise UsageError(f"zero_optimization.stage is {stage}, but stages are 0 to 3")
    return stage


def _offload(keys: _Keys) -> tuple[str | None, Path | None]:
    """The plan's `offload`, and the folder of what goes to disk."""
    section = "zero_optimization"
    found: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name, parts, old in (
        ("offload_optimizer", ("optimizer", "gradients"), "cpu_offload"),
        ("offload_param", ("params",), "cpu_offload_params"),
    ):
        device = keys.word(f"{section}.{name}.device", tuple(_TIERS))
        if device is None and keys.flag(f"{section}.{old}"):
            device = "cpu"
        tier = _TIERS[device or "none"]
        path = keys.of(f"{section}.{name}.nvme_path")
        if tier is not None:
            found |= {part: tier if part != "gradients" else "host" for part in parts}
        if tier == "disk":
            if not isinstance(path, str) or not path:
                raise UsageError(
                    f"{section}.{name}.device is 'nvme', so {section}.{name}.nvme_path must name a "
                    "folder"
                )
            folders[name] = path
    if len(set(folders.values())) > 1:
        raise UsageError(
            f"offload_optimizer.nvme_path={folders['offload_optimizer']!r} and offload_param."
            f"nvme_path={folders['offload_param']!r}, but all that is offloaded goes into one "
            "folder; give both the same"
        )
    cpu = keys.of("activation_checkpointing.cpu_checkpointing")
    if cpu is not _MISSING and keys.flag("activation_checkpointing.cpu_checkpointing"):
        found["activations"] = "host"
    text = "+".join(part if tier == "host" else f"{part}:{tier}" for part, tier in found.items())
    return text or None, Path(next(iter(folders.values()))) if folders else None


def _precision(keys: _Keys) -> tuple[str | None, LossScale | None]:
    asked = {
        "bf16": keys.flag("bf16.enabled") or keys.flag("bfloat16.enabled"),
        "fp16": keys.flag("fp16.enabled"),
    }
    if keys.flag("torch_autocast.enabled"):
        names = {"bfloat16": "bf16", "float16": "fp16"}
        dtype = keys.word("torch_autocast.dtype", tuple(names)) or "bfloat16"
        asked[names[dtype]] = True
    if all(asked.values()):
        raise UsageError("both bf16 and fp16 are enabled; disable one of them")
    if asked["bf16"]:
        return "bf16", None
    if not asked["fp16"]:
        return None, None
    scale = keys.number("fp16.loss_scale", 0.0)
    power = keys.number("fp16.initial_scale_power", 16.0)
    if power > 126:
        raise UsageError(f"fp16.initial_scale_power is {power:g}, but scales end at 2**126")
    window = keys.count("fp16.loss_scale_window", 1000)
    assert window is not None
    return "fp16", LossScale(scale or 2.0**power, interval=2**62 if scale else window)


def _clip(keys: _Keys) -> float | None:
    return keys.number("gradient_clipping", 0.0) or None


def _named(keys: _Keys, section: str) -> tuple[str, dict[str, Any]] | None:
    kind, params = keys.of(f"{section}.type"), keys.of(f"{section}.params")
    if kind is _MISSING or kind is None:
        if params is not _MISSING:
            raise UsageError(f"{section}.params stands without {section}.type; name the type")
        return None
    if not isinstance(kind, str):
        raise UsageError(f"{section}.type is {kind!r}, but must be a name")
    params = {} if params is _MISSING else params
    if not isinstance(params, Mapping):
        raise UsageError(f"{section}.params is {params!r}, but must be an object {{...}}")
    waits = [name for name, value in params.items() if value == "auto"]
    if waits:
        raise UsageError(
            f'{section}.params.{waits[0]} is "auto", which only Hugging Face\'s Trainer fills in; '
            "put the value there"
        )
    return kind, dict(params)
