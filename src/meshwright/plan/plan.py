"""`Plan`: how to lay a job over a mesh, as one frozen value with a short text form.

zero3,data=2,microbatches=4        [preset,]key=value,...
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Final, Literal, cast, get_args

from meshwright.errors import PlanError, UsageError, nearest
from meshwright.plan.named import ASYNCHRONOUS, OWN, PAIRED, PRESETS
from meshwright.plan.offload import Part, Tier, offloads

__all__ = ["AXES", "COUNTS", "KEYS", "PRECISIONS", "Attention", "Plan", "When"]

AXES: Final = ("data", "pipeline", "tensor", "context", "expert")
COUNTS: Final = (*AXES, "shard", "virtual", "microbatches")  # whole numbers, 1 or more
_WHOLE: Final = ("zero", "redundancy", "max_fallback")  # whole numbers, 0 or more
_WORDS: Final = (
    "sequence",
    "replicas",
    "schedule",
    "gather",
    "reduce",
    "remat",
    "precision",
    "offload",
    "regime",
    "codec",
    "attention",
)
_OPTIONAL: Final = (  # None: left to Meshwright
    "data", "shard", "replicas", "schedule", "gather", "reduce", "attention",
)  # fmt: skip
KEYS: Final = (*COUNTS, *_WHOLE, *_WORDS)  # those that have a text form
_WORD: Final = re.compile(r"[a-z0-9_][A-Za-z0-9_.:()+-]*")
_REPLICAS: Final = re.compile(r"[1-9][0-9]{0,5}(-[1-9][0-9]{0,5})*")
PRECISIONS: Final = ("float32", "bf16", "fp16")
"""What a module may compute in."""
_LARGEST: Final = 1_000_000  # of any count; more ranks than the largest machines have

When = Literal["step", "microbatch"]
Attention = Literal["gather", "all-to-all", "ring"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where and how a job runs; equal plans are the same layout, whatever text they came from.

    Attributes:
        data: ranks that share each micro-batch's samples; None fills the world.
        pipeline: stages.
        tensor: ranks that share each weight matrix.
        context: ranks that share each sequence.
        expert: ranks that share each layer's experts.
        sequence: `tensor`: activations that `tensor` would leave whole are split over it along the
            sequence; none.
        zero: 0 to 3, what the data axis shards: 1 optimizer state, 2 gradients too, 3 weights too.
        shard: ranks, next to each other on the data axis, that ZeRO shards state over; groups of
            them are replicas (hybrid sharding). None: the whole axis.
        replicas: data ranks of each pipeline rank, in place of `data`: `15-1` is a first stage on
            15 ranks, which take micro-batches in turn, and a second on one (PipeDream's notation).
        schedule: the pipeline's order of work; None takes 1f1b, or interleaved where `virtual` is
            more than 1.
        virtual: stages per pipeline rank.
        microbatches: parts a global batch is split into, run one after another.
        gather: when sharded weights are gathered; None takes the default for `zero`.
        reduce: when gradients are reduced: `microbatch`, each micro-batch's as the backward makes
            them; `step`, their sums, once. None takes `step` for zero 0 and 1 and with gather=step,
            else `microbatch`.
        remat: what the backward computes again instead of saving it: `none`; `full`, all but what
            goes from block to block; `selective`, what is cheap for its bytes; `marks`, the model's
            `torch.utils.checkpoint` regions; `budget:2GiB`, the least with which a rank's whole
            bill fits.
        precision: what forward and backward compute in: float32 (every tensor in its own dtype);
            bf16 or fp16, with float32 weights, accumulators, reductions and optimizer (fp16 scales
            the loss); or bf16-pure, whose weights, gradients and optimizer state are bf16 too.
        offload: what rests outside the device's memory: `none`; `host` or `disk`, all that can; or
            parts (`optimizer`, `gradients`, `params`, `activations`) with a tier each, joined by
            `+`: `optimizer:disk+params` (the tier left out is `host`).
        regime: how replicas stay consistent.
        codec: gradient compression on the wire.
        redundancy: snapshots kept on peers.
        attention: what `context` does at attention: `all-to-all` exchanges sequences for heads,
            `ring` sends keys and values around, `gather` gathers them; None takes, for each
            attention, the one of the first two that moves fewer bytes, where it can be.
        max_fallback: MiB that a rank may receive per step for an op that has no rule and is
            computed whole; more is refused.
        layouts: (parameter name pattern, mesh axis or None for each dim) pairs.
        precisions: (module path pattern, precision) pairs: modules that compute in another one.
        cuts: module paths at which pipeline stages begin.
        actions: a schedule of one's own in place of `schedule`: of each pipeline rank, its stages'
            forwards and backwards in order, as in `0F0,0F1,0B0,0B1`.

    Raises:
        PlanError: a field has a type or value that no plan can have.
    """

    data: int | None = None
    pipeline: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    sequence: str = "none"
    zero: int = 0
    shard: int | None = None
    replicas: str | None = None
    schedule: str | None = None
    virtual: int = 1
    microbatches: int = 1
    gather: When | None = None
    reduce: When | None = None
    remat: str = "none"
    precision: str = "float32"
    offload: str = "none"
    regime: str = "bsp"
    codec: str = "none"
    redundancy: int = 0
    attention: Attention | None = None
    max_fallback: int = 64
    layouts: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    precisions: tuple[tuple[str, str], ...] = ()
    cuts: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in KEYS:
            _require(key, self.value(key))
        _require_layouts(self.layouts)
        _require_precisions(self.precisions)
        _require_names("cuts", self.cuts)
        _require_names("actions", self.actions)

    def value(self, key: str) -> int | str | None:
        """The value of one of `KEYS`."""
        return cast("int | str | None", getattr(self, key))

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks along each mesh axis, in the order of `AXES`; an unfilled `data` counts as 1."""
        return {axis: int(self.value(axis) or 1) for axis in AXES}

    @property
    def ranks(self) -> int:
        """How many ranks the plan asks for; an unfilled `data` counts as 1."""
        if self.replicas is None:
            return math.prod(self.sizes.values())
        within = ("tensor", "context", "expert")
        return sum(self.widths) * math.prod(self.sizes[axis] for axis in within)

    @property
    def fills(self) -> bool:
        """Whether `data` is still to be filled with the ranks there are."""
        return self.data is None and self.replicas is None

    @property
    def widths(self) -> tuple[int, ...]:
        """Data ranks of each pipeline rank; an unfilled `data` counts as 1."""
        if self.replicas is None:
            return (self.sizes["data"],) * self.pipeline
        return tuple(int(width) for width in self.replicas.split("-"))

    @property
    def order(self) -> str:
        """The name of the schedule, its default filled in; of a plan with a pipeline."""
        usual = "interleaved" if self.virtual > 1 else "1f1b"
        return OWN if self.actions else self.schedule or usual

    @property
    def stages(self) -> int:
        """How many stages the model is cut into, over all pipeline ranks."""
        if self.actions:
            return len(set(re.findall(r"([0-9]+)[FBIW]", ",".join(self.actions))))
        return self.pipeline * (2 if self.schedule in PAIRED else self.virtual)

    @property
    def asynchronous(self) -> bool:
        """Whether the pipeline never flushes, so that gradients are of weights some updates old."""
        return self.schedule in ASYNCHRONOUS

    @property
    def offloads(self) -> dict[Part, Tier]:
        """Where the parts rest that are offloaded."""
        return offloads(self.offload)

    def filled(self, world: int) -> Plan:
        """This plan with `data` set, where it was absent, to as many ranks as `world` leaves it.

        A plan that says `replicas` is left as it is.

        Raises:
            PlanError: the other axes do not divide the world.
        """
        if not self.fills:
            return self
        if world % self.ranks:
            axes = {axis: size for axis, size in self.sizes.items() if size > 1}
            asked = " x ".join(f"{axis}={size}" for axis, size in axes.items())
            if len(axes) > 1:
                asked += f" = {self.ranks} ranks"
            raise PlanError(
                f"plan asks for groups of {asked}, which do not divide the world of {world}; "
                f"start {math.ceil(world / self.ranks) * self.ranks} ranks"
            )
        return replace(self, data=world // self.ranks)

    def text(self) -> str:
        """The shortest text that `parse` reads back as this plan.

        Raises:
            UsageError: the plan has `layouts`, `precisions`, `cuts` or `actions`, which only TOML
                can write.
        """
        for name in self.lists:
            raise UsageError(f"a plan with {name} has no one-line text; write it as TOML")
        set_keys = [key for key in KEYS if self.value(key) != _DEFAULTS[key]]
        items = [f"{key}={self.value(key)}" for key in set_keys if key != "zero"]
        if self.zero:
            items.insert(0, f"zero{self.zero}")
        return ",".join(items) or "data"

    @property
    def lists(self) -> tuple[str, ...]:
        """The fields it sets that have no one-line text."""
        found: dict[str, tuple[object, ...]] = {
            "layouts": self.layouts,
            "precisions": self.precisions,
            "cuts": self.cuts,
            "actions": self.actions,
        }
        return tuple(name for name, value in found.items() if value)

    @property
    def scales(self) -> bool:
        """Whether something computes in fp16, so that the loss is scaled."""
        return "fp16" in (self.precision, *(precision for _, precision in self.precisions))

    @property
    def short(self) -> bool:
        """Whether something computes in 16 bits."""
        asked = (self.precision, *(precision for _, precision in self.precisions))
        return any(precision != "float32" for precision in asked)

    @property
    def label(self) -> str:
        """The plan for people to read: its text, and how many layouts and cuts it has beside."""
        listed = (
            ("layout", len(self.layouts)),
            ("module precision", len(self.precisions)),
            ("cut", len(self.cuts)),
        )
        beside = [f"{n} {name}{'s' * (n > 1)}" for name, n in listed if n]
        beside += ["actions of its own"] * bool(self.actions)
        plain = replace(self, layouts=(), precisions=(), cuts=(), actions=())
        return " + ".join([plain.text(), *beside])

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that `[preset,]key=value,...` names.

        Raises:
            UsageError: an unknown preset or key, a key twice, a value of the wrong kind.
        """
        values: dict[str, int | str] = {}
        for place, item in enumerate(part.strip() for part in text.split(",")):
            key, equals, value = (word.strip() for word in item.partition("="))
            if equals:
                _require_new(key, values, text)
                values[key] = _converted(key, value)
            else:
                values.update(_preset(item, place, text))
        return from_values(values)


def from_values(values: dict[str, int | str]) -> Plan:
    """The plan with these values of `KEYS`, checked by `Plan` itself."""
    return Plan(**values)  # type: ignore[arg-type]  # __post_init__ checks each value


_DEFAULTS: Final = {field.name: field.default for field in fields(Plan)}


def _require(key: str, value: object) -> None:
    """Raise unless `value` is one that `key` can have."""
    if value is None and key in _OPTIONAL:
        return
    if key in _WORDS:
        if not isinstance(value, str) or not _WORD.fullmatch(value):
            raise PlanError(f"plan key {key} takes a word, not {value!r}")
        if key in ("gather", "reduce") and value not in get_args(When):
            raise PlanError(f"plan asks for {key}={value}; use {key}=step or {key}=microbatch")
        if key == "replicas" and not _REPLICAS.fullmatch(value):
            raise PlanError(
                f"plan asks for replicas={value}; write the data ranks of each pipeline rank, "
                "from the first, with dashes between them, as in replicas=2-1"
            )
        if key == "attention" and value not in get_args(Attention):
            listed = " or ".join(f"attention={form}" for form in get_args(Attention))
            raise PlanError(f"plan asks for attention={value}; use {listed}")
        return
    low, high = (1 if key in COUNTS else 0), (3 if key == "zero" else _LARGEST)
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"plan key {key} takes a whole number from {low} to {high}, not {value!r}")
    if not low <= value <= high:
        raise PlanError(f"plan asks for {key}={_short(value)}; use a number from {low} to {high}")


def _require_names(key: str, names: object) -> None:
    """Raise unless `names` is a tuple of different printable strings."""
    if not isinstance(names, tuple):
        raise PlanError(f"plan key {key} takes a list of names, not {names!r}")
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name or not name.isprintable():
            raise PlanError(f"plan key {key} takes printable names, not {name!r}")
        if name in names[:place]:
            raise PlanError(f"plan key {key} names {name!r} twice; keep one of them")


def _require_layouts(layouts: tuple[tuple[str, tuple[str | None, ...]], ...]) -> None:
    _require_names("layouts", tuple(pattern for pattern, _ in layouts))
    for pattern, dims in layouts:
        if not isinstance(dims, tuple):
            raise PlanError(f"layout of {pattern!r} takes a list of mesh axes, not {dims!r}")
        for axis in dims:
            if axis is not None and axis not in AXES:
                raise PlanError(
                    f"layout of {pattern!r} names the mesh axis {axis!r}; "
                    f"{nearest(str(axis), AXES)}"
                )


def _require_precisions(precisions: tuple[tuple[str, str], ...]) -> None:
    _require_names("precisions", tuple(pattern for pattern, _ in precisions))
    for pattern, precision in precisions:
        if precision not in PRECISIONS:
            raise PlanError(
                f"precision of {pattern!r} is {precision!r}, but a module computes in one of "
                f"{', '.join(PRECISIONS)}; {nearest(str(precision), PRECISIONS)}"
            )


def _require_new(key: str, values: dict[str, int | str], text: str) -> None:
    if key not in KEYS:
        raise UsageError(f"plan {text!r} has an unknown key {key!r}; {nearest(key, KEYS)}")
    if key in values:
        raise UsageError(f"plan {text!r} sets {key} twice; keep one of them")


def _converted(key: str, value: str) -> int | str:
    """The text `value` as `key` takes it; what is no number is left for `Plan` to refuse."""
    return int(value) if key not in _WORDS and re.fullmatch(r"-?[0-9]{1,18}", value) else value


def _preset(item: str, place: int, text: str) -> dict[str, int | str]:
    if not item:
        raise UsageError(f"plan {text!r} has an empty item; write [preset,]key=value,...")
    if item in KEYS and item not in PRESETS:
        raise UsageError(f"plan {text!r} gives {item} no value; write {item}=VALUE")
    if item == "auto":
        raise UsageError(
            f"plan {text!r}: auto is chosen for a job and a world; pass it alone, as plan='auto'"
        )
    if item not in PRESETS:
        known = tuple(PRESETS)
        raise UsageError(f"plan {text!r} has an unknown preset {item!r}; {nearest(item, known)}")
    if place:
        raise UsageError(f"plan {text!r} has the preset {item} after a key; a preset comes first")
    return PRESETS[item]


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**18 else f"a number of {len(hex(value)) * 4 - 8} bits"
